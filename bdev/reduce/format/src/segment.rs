//! The segment header, and the key that everything in the segment is sealed with.
//!
//! A segment is opened by drawing a salt, counting up its incarnation and writing this header as its first block; then
//! sealed units are appended byte by byte. It is never appended to after a crash, so a (key, place) pair is used once.
//!
//! ```text
//! 0      block head, with device, segment, byte offset; generation = incarnation
//! 56     domain u32, key generation u32, salt [32]
//! 96     class u8, cipher u8, hash u8, codec u8 (default), shard u16, reserved
//! 104    owner epoch u64, segment bytes u32
//! 116    reserved, zero
//! ```

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::{
    self, Block, BlockError, BlockHead, BlockKey, BlockKind, BlockPlace, Unverified, malformed,
};
use crate::codec::Codec;
use crate::fingerprint::HashId;
use crate::ids::{DeviceIx, DomainId, Generation, Incarnation, OwnerEpoch, SegmentAddr, SegmentNo, ShardIx};
use crate::superblock::{MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES};

/// What a segment holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Class {
    /// Fragments.
    Data = 1,
    /// Nodes of the metadata tree.
    Metadata = 2,
}

impl Class {
    /// From its number.
    pub fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            1 => Some(Self::Data),
            2 => Some(Self::Metadata),
            _ => None,
        }
    }
}

/// How a segment's units are sealed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Cipher {
    /// AES-256-GCM, the nonce is the place.
    Gcm = 1,
    /// AES-256-GCM, the nonce (12 bytes, made by the cipher module) lies between header and ciphertext: pools of the FIPS
    /// modes ([`FEATURE_APPROVED`](crate::superblock::FEATURE_APPROVED)).
    GcmStoredNonce = 2,
    /// Encryption off: plaintext with an AES-256-GMAC tag (NIST SP 800-38D section 3), so that damage is found as surely.
    Gmac = 3,
}

impl Cipher {
    /// From its number.
    pub fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            1 => Some(Self::Gcm),
            2 => Some(Self::GcmStoredNonce),
            3 => Some(Self::Gmac),
            _ => None,
        }
    }

    /// Bytes between a unit's header and its ciphertext.
    pub const fn nonce_bytes(self) -> usize {
        match self {
            Self::GcmStoredNonce => 12,
            Self::Gcm | Self::Gmac => 0,
        }
    }
}

/// Header of a segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// The pool.
    pub pool: Uuid,
    /// The segment's address.
    pub addr: SegmentAddr,
    /// Bytes of the segment.
    pub segment_bytes: u32,
    /// Counts the openings of this segment.
    pub incarnation: Incarnation,
    /// Random, drawn at opening.
    pub salt: [u8; 32],
    /// What it holds.
    pub class: Class,
    /// Whose data key.
    pub domain: DomainId,
    /// Which generation of it.
    pub generation: Generation,
    /// How units are sealed.
    pub cipher: Cipher,
    /// What made the fingerprints of the chunks in it.
    pub hash: HashId,
    /// Codec that most units will have; each unit names its own.
    pub codec: Codec,
    /// The shard that fills it.
    pub shard: ShardIx,
    /// Owner that opened it.
    pub owner_epoch: OwnerEpoch,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SegmentRaw {
    head: BlockHead,
    domain: U32,
    generation: U32,
    salt: [u8; 32],
    class: u8,
    cipher: u8,
    hash: u8,
    codec: u8,
    shard: U16,
    reserved0: U16,
    owner_epoch: U64,
    segment_bytes: U32,
    reserved: [[u8; 4]; 983],
}

const _: () = {
    assert!(size_of::<SegmentRaw>() == 4048);
    assert!(std::mem::offset_of!(SegmentRaw, salt) == 64 && std::mem::offset_of!(SegmentRaw, class) == 96);
    assert!(std::mem::offset_of!(SegmentRaw, owner_epoch) == 104);
};

impl SegmentHeader {
    /// The header block.
    pub fn encode(&self, key: &BlockKey) -> Box<Block> {
        let place = BlockPlace {
            device: self.addr.device,
            copy: 0,
            segment: self.addr.segment,
            offset_bytes: self.offset_bytes(),
        };
        let raw = SegmentRaw {
            head: BlockHead::new(BlockKind::Segment, self.pool, place, self.incarnation.0),
            domain: self.domain.0.into(),
            generation: self.generation.0.into(),
            salt: self.salt,
            class: self.class as u8,
            cipher: self.cipher as u8,
            hash: self.hash as u8,
            codec: self.codec as u8,
            shard: self.shard.0.into(),
            reserved0: 0.into(),
            owner_epoch: self.owner_epoch.0.into(),
            segment_bytes: self.segment_bytes.into(),
            reserved: [[0; 4]; 983],
        };
        block::stamp(&raw, key)
    }

    /// Parses the first block of segment `addr`, read at byte `offset_bytes` of its device, and checks the MAC.
    pub fn open(
        block: &Block,
        addr: SegmentAddr,
        offset_bytes: u64,
        key: &BlockKey,
    ) -> Result<Self, BlockError> {
        let header = Self::parse(block, offset_bytes)?.verify(key)?;
        let found = (header.addr.device.0, header.addr.segment.0);
        if found.0 != addr.device.0 {
            let (found, expected) = (found.0.into(), addr.device.0.into());
            return Err(BlockError::Misplaced { what: "device", found, expected });
        }
        if found.1 != addr.segment.0 {
            let (found, expected) = (found.1.into(), addr.segment.0.into());
            return Err(BlockError::Misplaced { what: "segment", found, expected });
        }
        Ok(header)
    }

    /// Parses a segment header read at byte `offset_bytes` of a device.
    pub fn parse(block: &Block, offset_bytes: u64) -> Result<Unverified<Self>, BlockError> {
        let raw = block::open::<SegmentRaw>(block, BlockKind::Segment, offset_bytes)?;
        block::zero("reserved", raw.reserved0.as_bytes())?;
        block::zero("reserved", raw.reserved.as_bytes())?;
        let incarnation = raw.head.generation.get();
        if incarnation == 0 {
            return Err(malformed("incarnation", incarnation));
        }
        let segment_bytes = raw.segment_bytes.get();
        if !segment_bytes.is_power_of_two()
            || !(MIN_SEGMENT_BYTES..=MAX_SEGMENT_BYTES).contains(&segment_bytes)
        {
            return Err(malformed("segment size", segment_bytes));
        }
        let header = Self {
            pool: raw.head.pool(),
            addr: SegmentAddr {
                device: DeviceIx(raw.head.device.get()),
                segment: SegmentNo(raw.head.segment.get()),
            },
            segment_bytes,
            incarnation: Incarnation(incarnation),
            salt: raw.salt,
            class: Class::from_raw(raw.class).ok_or_else(|| malformed("class", raw.class))?,
            domain: DomainId(raw.domain.get()),
            generation: Generation(raw.generation.get()),
            cipher: Cipher::from_raw(raw.cipher).ok_or_else(|| malformed("cipher", raw.cipher))?,
            hash: HashId::from_raw(raw.hash).ok_or_else(|| malformed("hash", raw.hash))?,
            codec: Codec::from_raw(raw.codec).ok_or_else(|| malformed("codec", raw.codec))?,
            shard: ShardIx(raw.shard.get()),
            owner_epoch: OwnerEpoch(raw.owner_epoch.get()),
        };
        if header.offset_bytes() != offset_bytes {
            return Err(malformed("segment number", header.addr.segment.0));
        }
        Ok(block::unverified(header, block))
    }

    fn offset_bytes(&self) -> u64 {
        u64::from(self.addr.segment.0) * u64::from(self.segment_bytes)
    }
}

#[cfg(test)]
pub(crate) fn layouts() -> Vec<crate::layout::Layout> {
    use crate::layout::layout;
    vec![
        layout!("segment header", SegmentRaw { head domain generation salt class cipher hash codec shard reserved0 owner_epoch segment_bytes reserved }),
    ]
}
