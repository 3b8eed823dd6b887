//! LUKS2 headers as a host writes them (LUKS2 On-Disk Format Specification 1.1), read from bytes. No I/O.
//!
//! ```text
//! 0 ............ hdr_size ......... 2 x hdr_size ....... segment's offset ......... end
//! | first copy | second copy | keyslots (not looked at) | payload: dm-crypt's sectors  |
//! each copy: 4096 bytes of fixed fields, big-endian (binary.rs) | JSON text, padded with zeros (json.rs)
//! ```
//!
//! Owns: which copy counts, what the payload is, whether it is one that can be undone, and the proof that a volume key is
//! this header's. Keyslots, and with them passwords, are none of its business.
//!
//! Invariants:
//! - The bytes are a guest's input. Whatever they are: no panic, no allocation beyond the area's size, no work beyond the
//!   iterations that the caller allows.
//! - What is not understood to the last member that matters is refused with a [`Refusal`]: then the caller passes the data as
//!   it is, which is always right.
//!
//! Units: offsets and sizes in bytes unless a name says sectors; a sector of `iv_tweak` has 512 bytes.

mod binary;
mod json;
mod proof;

use aws_lc_rs::digest;
use thiserror::Error;
use uuid::Uuid;

pub use binary::Copy;
pub use json::{KmipToken, Token};
pub use proof::{Hash, KeyDigest, ProofError};

/// What has to be read to know how long a header is.
pub const PROBE_BYTES: usize = 4096;
/// The longest area with both copies.
pub const MAX_AREA_BYTES: usize = 2 * binary::MAX_COPY_BYTES;
/// Iterations of a digest that a proof may take unless the caller says otherwise: some seconds.
pub const DEFAULT_MAX_ITERATIONS: u32 = 20_000_000;

/// Where the header lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// At the start of the device that holds the payload.
    Attached,
    /// Elsewhere: offsets count from the start of a device without a header.
    Detached,
}

/// A header that is none, although it begins like one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// Neither copy can be used.
    #[error("LUKS2 header: first copy: {first}; second copy: {second}")]
    Damaged {
        /// What is wrong with the first copy.
        first: String,
        /// What is wrong with the second one.
        second: String,
    },
    /// LUKS1.
    #[error("LUKS version {0}; version 2 is needed (cryptsetup convert --type luks2)")]
    Version(u16),
}

/// Why a payload can not be undone. Its data passes as it is.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Encryption, decryption or a change of the key is going on.
    #[error("re-encryption is in progress")]
    Reencryption,
    /// A requirement that is not known: nobody may use the device who does not know it.
    #[error("the header requires \"{0}\", which is not known")]
    Requirement(String),
    /// More or less than one segment.
    #[error("{0} segments; one is needed")]
    Segments(usize),
    /// The drive encrypts.
    #[error("the drive's own encryption (OPAL) is in use")]
    Opal,
    /// dm-integrity, or tags in the drive's metadata.
    #[error("the payload has integrity tags")]
    Integrity,
    /// Not encrypted at all.
    #[error("the segment is of type \"{0}\"; \"crypt\" is needed")]
    SegmentType(String),
    /// Another cipher.
    #[error("the cipher is \"{0}\"; \"aes-xts-plain64\" is needed")]
    Cipher(String),
    /// A key of another length.
    #[error("the volume key has {0} bytes; 32 or 64 are needed")]
    KeyBytes(u64),
    /// A sector size that the target does not have.
    #[error("sectors of {0} bytes; 512 or 4096 are needed")]
    SectorSize(u64),
    /// Numbers that do not go together or leave the device.
    #[error("{what} is {value}: {why}")]
    Geometry {
        /// The member.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it would have to be.
        why: &'static str,
    },
    /// No digest for the segment, several, or one of an unknown kind.
    #[error("digest of the volume key: {0}")]
    Digest(String),
    /// A member is missing or is not what the specification says.
    #[error("JSON: {0}")]
    Json(String),
}

/// The part of a device that dm-crypt encrypts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Where it starts.
    pub offset_bytes: u64,
    /// How long it is; none: to the device's end.
    pub size_bytes: Option<u64>,
    /// Number of its first 512-byte sector, for the tweak.
    pub iv_tweak: u64,
    /// Bytes in a data unit of the cipher: 512 or 4096.
    pub sector_bytes: u32,
}

/// What is needed to undo the host's encryption. If any of this changes, the volume is another one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Payload {
    /// Identity of the LUKS volume.
    pub uuid: Uuid,
    /// Where, and how numbered.
    pub segment: Segment,
    /// Length of the volume key, if a keyslot tells.
    pub key_bytes: Option<u32>,
    /// Proves the volume key.
    pub digest: KeyDigest,
}

impl Payload {
    /// SHA-256 of where the payload lies, how it is numbered and what proves its key: as long as this is the same, the same
    /// bytes mean the same. A host changes it by no passphrase, label, token or UUID.
    pub fn identity(&self) -> [u8; 32] {
        let s = &self.segment;
        let d = &self.digest;
        let mut sum = digest::Context::new(&digest::SHA256);
        sum.update(b"LUKS2 payload");
        // No size is a number that no size is: sizes are multiples of 512.
        for n in [s.offset_bytes, s.size_bytes.unwrap_or(u64::MAX), s.iv_tweak, s.sector_bytes.into()] {
            sum.update(&n.to_le_bytes());
        }
        sum.update(&[d.hash as u8]);
        sum.update(&d.iterations.to_le_bytes());
        for part in [&d.salt, &d.value] {
            sum.update(&(part.len() as u64).to_le_bytes());
            sum.update(part);
        }
        let mut identity = [0; 32];
        identity.copy_from_slice(sum.finish().as_ref());
        identity
    }
}

/// A valid header.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// Identity; hosts make it, and may make it twice.
    pub uuid: Uuid,
    /// For people.
    pub label: String,
    /// Grows with every change.
    pub sequence: u64,
    /// Which copy counts.
    pub copy: Copy,
    /// Bytes of one copy.
    pub copy_bytes: u64,
    json: json::Json,
}

impl Header {
    /// Bytes with both copies, told by the device's first [`PROBE_BYTES`]; none: they are no start of a header.
    pub fn area_bytes(probe: &[u8]) -> Option<usize> {
        binary::area_bytes(probe)
    }

    /// The header in `area`, a device's first bytes (more than needed is fine). `Ok(None)`: there is none. Of two valid
    /// copies the one with the higher sequence counts; a damaged one is passed over.
    ///
    /// # Errors
    /// See [`HeaderError`].
    pub fn parse(area: &[u8]) -> Result<Option<Header>, HeaderError> {
        let Some(found) = binary::choose(area)? else { return Ok(None) };
        Ok(Some(Header {
            uuid: found.fixed.uuid,
            label: found.fixed.label,
            sequence: found.fixed.sequence,
            copy: found.copy,
            copy_bytes: found.fixed.copy_bytes,
            json: found.json,
        }))
    }

    /// Tokens, as far as they have a type.
    pub fn tokens(&self) -> Vec<Token> {
        self.json.tokens()
    }

    /// The objects of a key server that hold the volume key, if a token names them.
    ///
    /// # Errors
    /// When the token is there but can not be read, or there are several.
    pub fn kmip_token(&self) -> Result<Option<KmipToken>, Refusal> {
        self.json.kmip_token()
    }

    /// The payload on a device of this size.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn payload(&self, place: Place, device_bytes: u64) -> Result<Payload, Refusal> {
        self.json.requirements()?;
        let segment = self.json.segment()?;
        self.check(&segment, place, device_bytes)?;
        let (digest, key_bytes) = self.json.digest()?;
        Ok(Payload { uuid: self.uuid, segment, key_bytes, digest })
    }

    fn check(&self, segment: &Segment, place: Place, device_bytes: u64) -> Result<(), Refusal> {
        let sector = u64::from(segment.sector_bytes);
        let wrong = |what, value, why| Err(Refusal::Geometry { what, value, why });
        let offset = segment.offset_bytes;
        if !offset.is_multiple_of(sector) {
            return wrong("segment's offset", offset, "it must be a multiple of the sector size");
        }
        if place == Place::Attached && offset < 2 * self.copy_bytes {
            return wrong(
                "segment's offset",
                offset,
                "it lies inside the header (is this a detached header?)",
            );
        }
        if offset >= device_bytes {
            return wrong("segment's offset", offset, "it must be less than the device's size");
        }
        if let Some(size) = segment.size_bytes {
            if size == 0 || !size.is_multiple_of(sector) {
                return wrong("segment's size", size, "it must be a multiple of the sector size");
            }
            if size > device_bytes - offset {
                return wrong("segment's size", size, "it must end inside the device");
            }
        }
        if !segment.iv_tweak.is_multiple_of(sector / 512) {
            return wrong("iv_tweak", segment.iv_tweak, "it must be a multiple of a sector's 512-byte units");
        }
        if segment.iv_tweak > u64::MAX - device_bytes / 512 {
            return wrong("iv_tweak", segment.iv_tweak, "sector numbers would wrap around");
        }
        Ok(())
    }
}

/// Text of a guest as it may appear in a message: short, escaped.
fn shown(text: &str) -> String {
    text.chars().take(60).flat_map(char::escape_default).collect()
}

/// For fuzzers and tests.
#[doc(hidden)]
pub mod testing {
    /// Makes the checksum of the copy at `at` right (SHA-256), if there is room for one.
    pub fn stamp(area: &mut [u8], at: usize) {
        crate::binary::stamp(area, at);
    }
}
