//! Latencies of one kind of operation in fixed buckets. Always counted: by one writer, with a load and a store.
//!
//! A unit is 125 ns: eight buckets of one unit up to 1 us, then eight equal ones in each power of two up to 2^23 us (8.4 s), and
//! one for what takes longer. So no bucket is wider than an eighth of what is in it, and every power of two of a microsecond
//! is a border. What lies on a border is counted above it.

use std::sync::OnceLock;

use crate::stats::Counter;

const UNIT_NS: u64 = 125;
/// Buckets in a power of two.
const STEPS: usize = 8;
/// Powers of two between the first and the last border.
const OCTAVES: usize = 23;
/// Of each kind of operation.
const BUCKETS: usize = STEPS + STEPS * OCTAVES + 1;
/// Powers of two of a microsecond that are borders: 1 us, 2 us, ... 2^23 us.
pub const BORDERS: usize = OCTAVES + 1;

/// The borders in seconds, ascending.
pub fn borders_s() -> [f64; BORDERS] {
    std::array::from_fn(|i| (1u64 << i) as f64 * 1e-6)
}

#[inline]
fn bucket(latency_ns: u64) -> usize {
    let units = latency_ns / UNIT_NS;
    if units < STEPS as u64 {
        return units as usize;
    }
    let octave = (units.ilog2() - STEPS.ilog2()) as usize;
    // Of units without its lower bits the highest one adds STEPS, which skips the first buckets.
    if octave < OCTAVES { octave * STEPS + (units >> octave) as usize } else { BUCKETS - 1 }
}

/// Where a bucket begins.
fn begins_ns(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64 * UNIT_NS;
    }
    let (octave, step) = (bucket / STEPS - 1, bucket % STEPS);
    (((STEPS + step) as u64) << octave) * UNIT_NS
}

/// One channel's. Takes memory with the first operation.
#[derive(Default)]
pub(crate) struct Latencies(OnceLock<Box<[Counter; BUCKETS]>>);

impl Latencies {
    /// Only its one writer may call this.
    #[inline]
    pub fn record(&self, latency_ns: u64) {
        let counters = self.0.get_or_init(|| Box::new(std::array::from_fn(|_| Counter::default())));
        counters[bucket(latency_ns)].add(1);
    }

    pub fn count(&self) -> u64 {
        self.0.get().map_or(0, |counters| counters.iter().map(Counter::get).sum())
    }

    pub fn add_to(&self, all: &mut LatencyCounts) {
        if let Some(counters) = self.0.get() {
            for (sum, counter) in all.buckets().iter_mut().zip(&**counters) {
                *sum += counter.get();
            }
        }
    }
}

/// Latencies as they were counted up to one moment, or between two.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LatencyCounts {
    /// None, or one for each bucket.
    counts: Vec<u64>,
    /// All latencies added up.
    pub sum_ns: u64,
}

impl LatencyCounts {
    fn buckets(&mut self) -> &mut [u64] {
        if self.counts.is_empty() {
            self.counts = vec![0; BUCKETS];
        }
        &mut self.counts
    }

    /// Counts one more.
    pub fn record(&mut self, latency_ns: u64) {
        self.buckets()[bucket(latency_ns)] += 1;
        self.sum_ns += latency_ns;
    }

    /// Operations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Counts these, too.
    pub fn add(&mut self, other: &LatencyCounts) {
        if !other.counts.is_empty() {
            for (sum, n) in self.buckets().iter_mut().zip(&other.counts) {
                *sum += n;
            }
        }
        self.sum_ns += other.sum_ns;
    }

    /// What has come on top of `earlier`; everything, if that is no earlier state of these.
    pub fn since(&self, earlier: &LatencyCounts) -> LatencyCounts {
        if earlier.counts.is_empty() {
            return LatencyCounts { sum_ns: self.sum_ns.saturating_sub(earlier.sum_ns), ..self.clone() };
        }
        let counts = self.counts.iter().zip(&earlier.counts).map(|(now, was)| now.checked_sub(*was));
        match (counts.collect::<Option<Vec<u64>>>(), self.sum_ns.checked_sub(earlier.sum_ns)) {
            (Some(counts), Some(sum_ns)) if !counts.is_empty() => LatencyCounts { counts, sum_ns },
            _ => self.clone(),
        }
    }

    /// The latency in seconds that a share `q` (0 to 1) of the operations did not exceed: to an eighth, or 125 ns. None without an
    /// operation; of what takes longer than the last border, that border.
    pub fn quantile_s(&self, q: f64) -> Option<f64> {
        let wanted = q.clamp(0.0, 1.0) * self.count() as f64;
        let mut below = 0.0;
        let mut found = None;
        for (i, n) in self.counts.iter().enumerate().filter(|(_, n)| **n > 0) {
            let (begin, share) = (begins_ns(i) as f64, ((wanted - below) / *n as f64).clamp(0.0, 1.0));
            let width = if i + 1 < BUCKETS { begins_ns(i + 1) as f64 - begin } else { 0.0 };
            found = Some((begin + width * share) * 1e-9);
            below += *n as f64;
            if below >= wanted {
                break;
            }
        }
        found
    }

    /// Operations between the borders of [`borders_s`]: below the first one, ..., above the last one.
    pub fn between_borders(&self) -> [u64; BORDERS + 1] {
        std::array::from_fn(|i| {
            let (from, to) = (i * STEPS, ((i + 1) * STEPS).min(BUCKETS));
            self.counts.get(from..to).map_or(0, |counts| counts.iter().sum())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(all: &[u64]) -> LatencyCounts {
        let mut counts = LatencyCounts::default();
        all.iter().for_each(|ns| counts.record(*ns));
        counts
    }

    proptest! {
        #[test]
        fn a_value_lies_in_its_bucket(ns in prop_oneof![0..20_000u64, 0..20_000_000_000u64, any::<u64>()]) {
            let i = bucket(ns);
            prop_assert!(begins_ns(i) <= ns);
            if i + 1 < BUCKETS {
                let (begin, end) = (begins_ns(i), begins_ns(i + 1));
                prop_assert!(ns < end && (end - begin) * STEPS as u64 <= begin.max(STEPS as u64 * UNIT_NS));
            }
        }

        #[test]
        fn a_quantile_is_near_the_sorted_list(mut all in proptest::collection::vec(1_000..8_000_000_000u64, 1..200), q in 0.0..1.0f64) {
            let found = of(&all).quantile_s(q).unwrap() * 1e9;
            all.sort_unstable();
            let exact = all[((q * all.len() as f64).ceil() as usize).clamp(1, all.len()) - 1] as f64;
            prop_assert!((found - exact).abs() <= exact / 8.0 + 1.0, "{found} for {exact}");
        }
    }

    #[test]
    fn borders_are_powers_of_two_of_a_microsecond() {
        let counts = of(&[0, 999, 1_000, 1_999, 2_000, 8_388_607_999, 8_388_608_000, u64::MAX / 4]);
        let mut wanted = [0; BORDERS + 1];
        (wanted[0], wanted[1], wanted[2], wanted[BORDERS - 1], wanted[BORDERS]) = (2, 2, 1, 1, 2);
        assert_eq!(counts.between_borders(), wanted);
        assert_eq!((borders_s()[0], borders_s()[BORDERS - 1]), (1e-6, 8.388608));
        assert_eq!(LatencyCounts::default().between_borders(), [0; BORDERS + 1]);
    }

    #[test]
    fn differences_never_go_below_zero() {
        let (before, mut after) = (of(&[5_000, 70_000]), of(&[5_000, 70_000]));
        after.add(&of(&[70_000, 9_000]));
        assert_eq!(after.since(&before), of(&[70_000, 9_000]));
        assert_eq!(after.since(&LatencyCounts::default()), after);
        assert_eq!(after.since(&after).count(), 0);
        // Another device with the same name.
        assert_eq!(before.since(&after), before);
        assert_eq!(of(&[1]).since(&of(&[1_000_000])), of(&[1]));
        assert_eq!(LatencyCounts::default().since(&before), LatencyCounts::default());
        assert_eq!(LatencyCounts::default().quantile_s(0.5), None);
    }
}
