//! What the pool's four kinds of stand-alone 4 KiB block (superblock, key block, owner block, segment header) share.
//!
//! ```text
//! 0      magic "CRYPTFLD"                                      the same first 56 bytes in every kind
//! 8      format version: major u16, minor u16
//! 12     kind u16 (BlockKind), reserved u16
//! 16     pool UUID
//! 32     own device u16, copy number u16, segment u32, own byte offset on the device u64
//! 48     generation u64
//! 56     ...                                                   the kind's own fields
//! 4048   checksum: first 16 bytes of BLAKE3 of bytes 0..4048   tells "damaged"
//! 4064   HMAC-SHA-256 of bytes 0..4064, keyed from the pool    tells "wrong key" or "forged"
//! ```
//!
//! The places of magic, version, checksum and MAC are the same in every future version, so "no pool", "damaged",
//! "other version" and "key does not fit" can always be told apart, and in this order.

use aws_lc_rs::hmac;
use thiserror::Error;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::ids::{DeviceIx, SegmentNo};

/// Bytes of a device block: the unit of these structures and of durability.
pub const BLOCK_BYTES: usize = 4096;
/// First eight bytes of every stand-alone block.
pub const MAGIC: [u8; 8] = *b"CRYPTFLD";
/// Format version written; blocks of another major version are refused.
pub const VERSION_MAJOR: u16 = 1;
/// Minor version written; a reader accepts any minor version.
pub const VERSION_MINOR: u16 = 0;

const CHECKSUM_AT: usize = 4048;
const MAC_AT: usize = 4064;

/// One device block.
pub type Block = [u8; BLOCK_BYTES];

/// Kind of a stand-alone block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum BlockKind {
    /// [`crate::superblock::Superblock`]
    Superblock = 1,
    /// [`crate::slots::KeyBlock`]
    Keys = 2,
    /// [`crate::owner::OwnerBlock`]
    Owner = 3,
    /// [`crate::segment::SegmentHeader`]
    Segment = 4,
}

/// Where a stand-alone block lies; part of the block, so that a misplaced one is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockPlace {
    /// Device.
    pub device: DeviceIx,
    /// Number of the copy (0 for a segment header).
    pub copy: u16,
    /// Segment of a segment header, else 0.
    pub segment: SegmentNo,
    /// Byte offset on the device.
    pub offset_bytes: u64,
}

/// Why a stand-alone block is not usable.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum BlockError {
    /// Neither zero nor ours.
    #[error("no pool here: the block begins with {found:02x?}")]
    NotOurs {
        /// First eight bytes.
        found: [u8; 8],
    },
    /// Only zeros.
    #[error("no pool here: the block is blank")]
    Blank,
    /// The unkeyed checksum does not fit.
    #[error("the block is damaged: its checksum is wrong")]
    Checksum,
    /// Another format.
    #[error(
        "pool format {found_major}.{found_minor} is not supported (this program reads {VERSION_MAJOR}.x)"
    )]
    Version {
        /// Version found.
        found_major: u16,
        /// Version found.
        found_minor: u16,
    },
    /// A whole block, but another kind than asked for.
    #[error("block of kind {found} where kind {expected} belongs")]
    Kind {
        /// Kind found.
        found: u16,
        /// Kind asked for.
        expected: u16,
    },
    /// A whole block that belongs elsewhere: a misdirected write, or a copied device.
    #[error("misplaced block: {what} is {found}, expected {expected}")]
    Misplaced {
        /// Which part of the address.
        what: &'static str,
        /// Value in the block.
        found: u64,
        /// Value of the place.
        expected: u64,
    },
    /// Belongs to another pool.
    #[error("block of pool {found}, expected pool {expected}")]
    OtherPool {
        /// Pool in the block.
        found: Uuid,
        /// Pool expected.
        expected: Uuid,
    },
    /// Needs features that this program does not have.
    #[error("the pool needs features that this program does not know (flags {unknown:#x})")]
    Features {
        /// Unknown incompatible flags.
        unknown: u64,
    },
    /// The checksum fits but a field is out of range.
    #[error("malformed block: {field} is {value}")]
    Malformed {
        /// Field.
        field: &'static str,
        /// Value.
        value: u64,
    },
    /// The checksum fits, the keyed tag does not.
    #[error("the key does not fit this pool, or the block was forged")]
    WrongKey,
}

pub(crate) fn malformed(field: &'static str, value: impl Into<u64>) -> BlockError {
    BlockError::Malformed { field, value: value.into() }
}

/// A value that parsed but whose keyed tag was not checked yet.
#[derive(Clone, Debug)]
pub struct Unverified<T> {
    value: T,
    block: Box<Block>,
}

impl<T> Unverified<T> {
    /// The value, not to be trusted: anybody may have written it.
    pub fn peek(&self) -> &T {
        &self.value
    }

    /// The value, if the block's MAC fits.
    pub fn verify(self, key: &BlockKey) -> Result<T, BlockError> {
        hmac::verify(&key.0, &self.block[..MAC_AT], &self.block[MAC_AT..])
            .map_err(|_| BlockError::WrongKey)?;
        Ok(self.value)
    }
}

/// Key of the stand-alone blocks' MAC (HMAC-SHA-256), derived from the pool key.
#[derive(Clone)]
pub struct BlockKey(hmac::Key);

impl BlockKey {
    pub(crate) fn new(secret: &[u8; 32]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }
}

impl std::fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlockKey(..)")
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct BlockHead {
    pub magic: [u8; 8],
    pub major: U16,
    pub minor: U16,
    pub kind: U16,
    pub reserved: U16,
    pub pool: [u8; 16],
    pub device: U16,
    pub copy: U16,
    pub segment: U32,
    pub offset: U64,
    pub generation: U64,
}

const _: () = assert!(size_of::<BlockHead>() == 56);

impl BlockHead {
    pub(crate) fn new(kind: BlockKind, pool: Uuid, place: BlockPlace, generation: u64) -> Self {
        Self {
            magic: MAGIC,
            major: VERSION_MAJOR.into(),
            minor: VERSION_MINOR.into(),
            kind: (kind as u16).into(),
            reserved: 0.into(),
            pool: pool.into_bytes(),
            device: place.device.0.into(),
            copy: place.copy.into(),
            segment: place.segment.0.into(),
            offset: place.offset_bytes.into(),
            generation: generation.into(),
        }
    }

    pub(crate) fn pool(&self) -> Uuid {
        Uuid::from_bytes(self.pool)
    }
}

/// Recomputes the unkeyed checksum of a block: for tests and fuzzers, which want to get past it. No secret is involved.
pub fn refresh_checksum(block: &mut Block) {
    let checksum = blake3::hash(&block[..CHECKSUM_AT]);
    block[CHECKSUM_AT..MAC_AT].copy_from_slice(&checksum.as_bytes()[..16]);
}

/// Writes checksum and MAC over `raw` (a 4048-byte structure).
pub(crate) fn stamp<T: IntoBytes + Immutable>(raw: &T, key: &BlockKey) -> Box<Block> {
    let mut block = Box::new([0; BLOCK_BYTES]);
    block[..CHECKSUM_AT].copy_from_slice(raw.as_bytes());
    refresh_checksum(&mut block);
    let tag = hmac::sign(&key.0, &block[..MAC_AT]);
    block[MAC_AT..].copy_from_slice(tag.as_ref());
    block
}

/// Checks magic, checksum, version, kind and place, in this order, and gives the structure.
///
/// `offset_bytes` is the byte offset on the device where the block was read.
pub(crate) fn open<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    block: &Block,
    kind: BlockKind,
    offset_bytes: u64,
) -> Result<&T, BlockError> {
    const { assert!(size_of::<T>() == CHECKSUM_AT) };
    let Ok((head, _)) = BlockHead::ref_from_prefix(block) else {
        return Err(malformed("size", block.len() as u64));
    };
    if head.magic != MAGIC {
        let blank = block.iter().all(|&byte| byte == 0);
        return Err(if blank { BlockError::Blank } else { BlockError::NotOurs { found: head.magic } });
    }
    if blake3::hash(&block[..CHECKSUM_AT]).as_bytes()[..16] != block[CHECKSUM_AT..MAC_AT] {
        return Err(BlockError::Checksum);
    }
    if head.major != VERSION_MAJOR {
        return Err(BlockError::Version { found_major: head.major.get(), found_minor: head.minor.get() });
    }
    if head.kind != kind as u16 {
        return Err(BlockError::Kind { found: head.kind.get(), expected: kind as u16 });
    }
    if head.reserved != 0 {
        return Err(malformed("reserved", head.reserved.get()));
    }
    if head.offset != offset_bytes {
        return Err(BlockError::Misplaced {
            what: "offset",
            found: head.offset.get(),
            expected: offset_bytes,
        });
    }
    T::ref_from_bytes(&block[..CHECKSUM_AT]).map_err(|_| malformed("size", CHECKSUM_AT as u64))
}

/// Wraps a parsed value with the bytes that its MAC covers.
pub(crate) fn unverified<T>(value: T, block: &Block) -> Unverified<T> {
    Unverified { value, block: Box::new(*block) }
}

/// Fails unless every byte is zero.
pub(crate) fn zero(field: &'static str, bytes: &[u8]) -> Result<(), BlockError> {
    match bytes.iter().find(|&&byte| byte != 0) {
        None => Ok(()),
        Some(&byte) => Err(malformed(field, byte)),
    }
}

/// Text in a fixed field: UTF-8, no control characters, padded with zeros.
pub(crate) fn text(field: &'static str, bytes: &[u8]) -> Result<String, BlockError> {
    let len = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    zero(field, &bytes[len..])?;
    match std::str::from_utf8(&bytes[..len]) {
        Ok(text) if !text.chars().any(char::is_control) => Ok(text.to_owned()),
        _ => Err(malformed(field, len as u64)),
    }
}

/// The reverse of [`text`]; what does not fit is cut at a character's end.
pub(crate) fn put_text<const N: usize>(text: &str) -> [u8; N] {
    let mut out = [0; N];
    let mut len = text.len().min(N);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    out[..len].copy_from_slice(&text.as_bytes()[..len]);
    out
}

#[cfg(test)]
pub(crate) fn layouts() -> Vec<crate::layout::Layout> {
    use crate::layout::layout;
    vec![
        layout!("block head", BlockHead { magic major minor kind reserved pool device copy segment offset generation }),
    ]
}
