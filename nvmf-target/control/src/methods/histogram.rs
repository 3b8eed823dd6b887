//! Latency histograms in the form of SPDK's `bdev_get_histogram`: 64-bit little-endian counts in base64, in ranges of
//! 2^granularity equal buckets. Range 0 holds 0 to 2^granularity - 1 (times 2^min_range); range `i` starts at
//! 2^(granularity + i - 1) and its buckets are 2^(i - 1) wide.

use hdrhistogram::Histogram;

/// Buckets in a range, as a power of two.
pub const GRANULARITY: u32 = 7;
/// Smallest value told apart, as a power of two in ticks.
pub const MIN_RANGE: u32 = 0;
/// One past the last range: 2^(GRANULARITY + 31) ns are 274 s.
pub const MAX_RANGE: u32 = 32;

const BUCKETS: usize = ((MAX_RANGE - MIN_RANGE) as usize) << GRANULARITY;

/// Index of the bucket of a value.
pub fn bucket(value: u64) -> usize {
    let s = value >> MIN_RANGE;
    let at = if s < 1 << GRANULARITY {
        s as usize
    } else {
        let range = s.ilog2() - GRANULARITY + 1;
        let sub = (s >> (range - 1)) as usize & ((1 << GRANULARITY) - 1);
        ((range as usize) << GRANULARITY) + sub
    };
    at.min(BUCKETS - 1)
}

/// Merges histograms into SPDK's buckets.
pub fn buckets(all: &[Histogram<u64>]) -> Vec<u64> {
    let mut counts = vec![0u64; BUCKETS];
    for h in all {
        for v in h.iter_recorded() {
            counts[bucket(v.value_iterated_to())] += v.count_at_value();
        }
    }
    counts
}

/// RFC 4648, section 4.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for c in bytes.chunks(3) {
        let n = u32::from(c[0]) << 16
            | u32::from(*c.get(1).unwrap_or(&0)) << 8
            | u32::from(*c.get(2).unwrap_or(&0));
        for i in 0..4 {
            if i <= c.len() {
                out.push(DIGITS[(n >> (18 - 6 * i)) as usize & 63] as char);
            } else {
                out.push('=');
            }
        }
    }
    out
}

/// The counts as they travel.
pub fn encode(counts: &[u64]) -> String {
    let bytes: Vec<u8> = counts.iter().flat_map(|c| c.to_le_bytes()).collect();
    base64(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_vectors() {
        // RFC 4648, section 10.
        for (plain, coded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    /// Upper edge of a bucket, as SPDK's histogram.py computes it.
    fn upper(i: u64, j: u64) -> u64 {
        if i > 0 { (1 << (i + 7 - 1)) + ((j + 1) << (i - 1)) } else { j + 1 }
    }

    #[test]
    fn values_fall_into_the_buckets_that_clients_compute() {
        for v in (0..2000).chain([5000, 123_456, 999_999, 10_000_000_000]) {
            let b = bucket(v) as u64;
            let (i, j) = (b >> 7, b & 127);
            let lower = if b == 0 { 0 } else { upper((b - 1) >> 7, (b - 1) & 127) };
            assert!((lower..upper(i, j)).contains(&v), "{v} in bucket {i}/{j}: {lower}..{}", upper(i, j));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }
}
