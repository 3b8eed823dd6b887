//! Header and data digests: CRC32C (Castagnoli, reflected, initial value and final XOR FFFFFFFFh), stored
//! little-endian behind what they cover (NVMe/TCP 1.0 section 3.3.1.1).

/// Bytes of a digest on the wire.
pub const DIGEST_BYTES: usize = 4;

/// Digest of one contiguous buffer.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
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
        self.0 = crc32c::crc32c_append(self.0, bytes);
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
}
