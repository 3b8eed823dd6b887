//! Header and data digests: CRC32C (Castagnoli, reflected, initial value and final XOR FFFFFFFFh), stored
//! little-endian behind what they cover (NVMe/TCP 1.0 section 3.3.1.1).

use crc_fast::CrcAlgorithm::Crc32Iscsi;

/// Bytes of a digest on the wire.
pub const DIGEST_BYTES: usize = 4;

/// Digest of one contiguous buffer.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// Running digest over data that arrives, or is sent, in pieces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest(u32);

impl Digest {
    /// A digest over nothing yet.
    pub const fn new() -> Self {
        Self(0)
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        let mut running = crc_fast::Digest::new_with_init_state(Crc32Iscsi, u64::from(!self.0));
        running.update(bytes);
        self.0 = running.finalize() as u32;
    }

    /// The value over everything added so far, as it goes on the wire in little-endian order.
    pub const fn value(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 3720 appendix B.4.
    #[test]
    fn rfc3720_vectors() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let up: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&up), 0x46dd_794e);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let mut d = Digest::new();
        up.chunks(5).for_each(|c| d.update(c));
        assert_eq!(d.value(), 0x46dd_794e);
        assert_eq!(Digest::new().value(), crc32c(&[]));
    }

    /// The library has another way for each processor and length; this is the definition, bit by bit.
    #[test]
    fn any_length_in_any_pieces() {
        let bytes: Vec<u8> = (0..5000u32).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 24) as u8).collect();
        let mut crc = u32::MAX;
        for (len, byte) in (1..).zip(&bytes) {
            crc ^= u32::from(*byte);
            (0..8).for_each(|_| crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()));
            assert_eq!(crc32c(&bytes[..len]), !crc, "{len} bytes");
            let (front, back) = bytes[..len].split_at(len * 2 / 3);
            let mut d = Digest::new();
            d.update(front);
            d.update(back);
            assert_eq!(d.value(), !crc, "{} and {} bytes", front.len(), back.len());
        }
    }
}
