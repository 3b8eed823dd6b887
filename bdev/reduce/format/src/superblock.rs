//! The superblock, and where everything lies on a device.
//!
//! Every device carries four *anchors* of 16 KiB at fixed places ([`anchor_offsets`]): at 0, at 1 MiB, near the middle and
//! at the end. An anchor is four blocks: superblock, key block, owner block, one reserved. The rest of the device is
//! segments: segment `n` is the bytes from `n * segment_bytes` on; segments that an anchor or a journal ring touches
//! are never opened.
//!
//! Update rule: generation `g` is written to two of the four copies ([`copies_of`]) and flushed; the other two still
//! hold `g - 1`. What `g - 1` refers to is reused only after `g` is durable. The newest copy that verifies counts.
//!
//! ```text
//! 0      block head (see `block`), generation = checkpoint number
//! 56     compatible, read-only-compatible, incompatible feature flags, u64 each
//! 80     name, 64 bytes UTF-8
//! 144    block bytes u32 (4096), segment bytes u32, slots per container u32 (512), shards u16, devices u16
//! 160    owner epoch u64, created (ms since 1970) u64, reserved
//! 184    root: NodePtr of the pool record; 304 bytes reserved
//! 512    16 device entries of 64 bytes
//! 1536   48 shard entries of 48 bytes
//! 3840   reserved, zero
//! ```

use thiserror::Error;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::{
    self, BLOCK_BYTES, Block, BlockError, BlockHead, BlockKey, BlockKind, BlockPlace, Unverified, malformed,
    zero,
};
use crate::ids::{DeviceIx, OwnerEpoch, SLOTS, SegmentNo, Sequence};
use crate::node::{NodePtr, NodePtrRaw};

/// Bytes of an anchor: superblock, key block, owner block, reserved block.
pub const ANCHOR_BYTES: u64 = 4 * BLOCK_BYTES as u64;
/// Anchors per device.
pub const ANCHORS: usize = 4;
/// Byte offset of the key block in an anchor.
pub const KEYS_AT: u64 = BLOCK_BYTES as u64;
/// Byte offset of the owner block in an anchor.
pub const OWNER_AT: u64 = 2 * BLOCK_BYTES as u64;
/// Devices of a pool, at most.
pub const MAX_DEVICES: usize = 16;
/// Shards of a pool, at most.
pub const MAX_SHARDS: usize = 48;
/// Smallest segment.
pub const MIN_SEGMENT_BYTES: u32 = 1 << 20;
/// Largest segment.
pub const MAX_SEGMENT_BYTES: u32 = 1 << 30;
/// Smallest device.
pub const MIN_DEVICE_BYTES: u64 = 16 << 20;
/// Journal blocks of a shard, at least.
pub const MIN_JOURNAL_BLOCKS: u32 = 16;

/// Why a device cannot carry a pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum GeometryError {
    /// Too small.
    #[error("a pool device needs at least {MIN_DEVICE_BYTES} bytes, this one has {bytes}")]
    DeviceTooSmall {
        /// Its size.
        bytes: u64,
    },
    /// Not a power of two in range.
    #[error("segment size {bytes} is not a power of two from {MIN_SEGMENT_BYTES} to {MAX_SEGMENT_BYTES}")]
    SegmentBytes {
        /// Size given.
        bytes: u32,
    },
}

/// Byte offsets of a device's four anchors: 0, 1 MiB, the middle rounded down to 1 MiB, the last aligned 16 KiB.
///
/// `size_bytes` is the size when the device joined the pool (`DeviceEntry::anchor_blocks`): growing moves no anchor.
pub fn anchor_offsets(size_bytes: u64) -> Result<[u64; ANCHORS], GeometryError> {
    if size_bytes < MIN_DEVICE_BYTES {
        return Err(GeometryError::DeviceTooSmall { bytes: size_bytes });
    }
    const MIB: u64 = 1 << 20;
    Ok([0, MIB, size_bytes / 2 / MIB * MIB, size_bytes / ANCHOR_BYTES * ANCHOR_BYTES - ANCHOR_BYTES])
}

/// The two copies that generation `generation` is written to.
pub fn copies_of(generation: u64) -> [usize; 2] {
    if generation.is_multiple_of(2) { [0, 2] } else { [1, 3] }
}

/// Segments of a device and the ones among them that hold no data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes of a segment.
    pub segment_bytes: u32,
    /// Whole segments on the device, reserved ones included.
    pub segments: u32,
    reserved: Vec<(u64, u64)>,
}

impl Geometry {
    /// The geometry of device `device` of a pool, from its superblock.
    pub fn of(superblock: &Superblock, device: DeviceIx) -> Option<Self> {
        let entry = superblock.devices.iter().find(|entry| entry.device == device)?;
        let mut reserved: Vec<_> = anchor_offsets(entry.anchor_blocks.checked_mul(BLOCK_BYTES as u64)?)
            .ok()?
            .iter()
            .map(|&at| (at, at + ANCHOR_BYTES))
            .collect();
        for shard in superblock.shards.iter().filter(|shard| shard.device == device) {
            let start = shard.start_block * BLOCK_BYTES as u64;
            reserved.push((start, start + u64::from(shard.blocks) * BLOCK_BYTES as u64));
        }
        let segments = entry.blocks.checked_mul(BLOCK_BYTES as u64)? / u64::from(superblock.segment_bytes);
        let segments = u32::try_from(segments).ok()?;
        Some(Self { segment_bytes: superblock.segment_bytes, segments, reserved })
    }

    /// Byte offset of a segment on its device.
    pub fn offset_bytes(&self, segment: SegmentNo) -> u64 {
        u64::from(segment.0) * u64::from(self.segment_bytes)
    }

    /// Whether `segment` overlaps an anchor or a journal ring (or lies outside), so is never opened.
    pub fn is_reserved(&self, segment: SegmentNo) -> bool {
        let start = self.offset_bytes(segment);
        let end = start + u64::from(self.segment_bytes);
        segment.0 >= self.segments || self.reserved.iter().any(|&(from, to)| from < end && start < to)
    }
}

/// Feature flags beyond version 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Features {
    /// May be ignored.
    pub compatible: u64,
    /// Who does not know them may read, not write.
    pub read_only_compatible: u64,
    /// Who does not know them must leave the pool alone.
    pub incompatible: u64,
}

/// Incompatible feature: domains' keys are wrapped through the key block's erasure secret.
pub const FEATURE_ERASURE: u64 = 1;
/// Incompatible feature: domains' keys have been changed. There are [`Record::Fingerprints`](crate::entry::Record::Fingerprints)
/// and [`Record::DomainUpdate`](crate::entry::Record::DomainUpdate), and domains that are [`PLAIN`](crate::record::domain_flags::PLAIN).
pub const FEATURE_ROTATION: u64 = 2;
/// Incompatible feature: made where only algorithms that FIPS 140-3 approves may be used. Fingerprints are HMAC-SHA-256, segments are
/// sealed with [`GcmStoredNonce`](crate::segment::Cipher::GcmStoredNonce), journal batches with stored nonces; all of it is encrypted.
pub const FEATURE_APPROVED: u64 = 4;
/// Incompatible feature flags that this program knows.
pub const KNOWN_INCOMPATIBLE: u64 = FEATURE_ERASURE | FEATURE_ROTATION | FEATURE_APPROVED;
/// Read-only-compatible feature flags that this program knows.
pub const KNOWN_READ_ONLY: u64 = 0;

/// State of a device in the pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum DeviceState {
    /// In use.
    Active = 1,
    /// Being emptied, to be removed.
    Draining = 2,
    /// Given up; its data must come from redundancy.
    Failed = 3,
}

/// A device of the pool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceEntry {
    /// Its index: what addresses name.
    pub device: DeviceIx,
    /// Its identity, drawn when it joins.
    pub id: Uuid,
    /// State.
    pub state: DeviceState,
    /// Size in use, in 4 KiB blocks.
    pub blocks: u64,
    /// Size when it joined, in 4 KiB blocks: places the anchors.
    pub anchor_blocks: u64,
    /// Redundancy, all zero in version 1: mirror group and member, parity group, width and index.
    pub redundancy: Redundancy,
}

/// Redundancy fields of a device, reserved: version 1 writes zeros and refuses others.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Redundancy {
    /// Mirror group, 0 = none.
    pub mirror_group: u16,
    /// Member of it.
    pub mirror_member: u16,
    /// Parity group, 0 = none.
    pub parity_group: u16,
    /// Devices of the parity group.
    pub parity_width: u8,
    /// Index in it.
    pub parity_index: u8,
}

/// A shard's journal ring and where replay begins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardEntry {
    /// Device of the ring.
    pub device: DeviceIx,
    /// Blocks of the ring.
    pub blocks: u32,
    /// First block of the ring on its device.
    pub start_block: u64,
    /// Where replay begins: a count of blocks since the pool was made; the ring index is this modulo `blocks`.
    pub tail_position: u64,
    /// Sequence number of the first batch to replay.
    pub tail_sequence: Sequence,
    /// Tag of the batch before it (zeros before the first).
    pub tail_chain: [u8; 16],
}

/// The pool's root block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Identity of the pool.
    pub pool: Uuid,
    /// Name, at most 64 bytes UTF-8 without control characters.
    pub name: String,
    /// Number of this checkpoint; grows by one with every write of the superblock.
    pub generation: u64,
    /// Feature flags.
    pub features: Features,
    /// The device that carries this copy.
    pub device: DeviceIx,
    /// Bytes of a segment.
    pub segment_bytes: u32,
    /// Counts the openings of the pool; the owner of the newest epoch alone may write.
    pub owner_epoch: OwnerEpoch,
    /// When the pool was made, in ms since 1970.
    pub created_ms: u64,
    /// The pool record; null before the first checkpoint.
    pub root: Option<NodePtr>,
    /// The pool's devices, indices ascending.
    pub devices: Vec<DeviceEntry>,
    /// The shards' journals, by shard.
    pub shards: Vec<ShardEntry>,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct DeviceRaw {
    id: [u8; 16],
    blocks: U64,
    anchor_blocks: U64,
    device: U16,
    state: u8,
    reserved0: u8,
    mirror_group: U16,
    mirror_member: U16,
    parity_group: U16,
    parity_width: u8,
    parity_index: u8,
    reserved: [u8; 20],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ShardRaw {
    device: U16,
    reserved: U16,
    blocks: U32,
    start_block: U64,
    tail_position: U64,
    tail_sequence: U64,
    tail_chain: [u8; 16],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SuperblockRaw {
    head: BlockHead,
    compatible: U64,
    read_only_compatible: U64,
    incompatible: U64,
    name: [u8; 64],
    block_bytes: U32,
    segment_bytes: U32,
    slots_per_container: U32,
    shard_count: U16,
    device_count: U16,
    owner_epoch: U64,
    created_ms: U64,
    reserved0: U64,
    root: NodePtrRaw,
    reserved1: [u8; 288],
    devices: [DeviceRaw; MAX_DEVICES],
    shards: [ShardRaw; MAX_SHARDS],
    reserved2: [u8; 208],
}

const _: () = {
    assert!(
        size_of::<DeviceRaw>() == 64 && size_of::<ShardRaw>() == 48 && size_of::<SuperblockRaw>() == 4048
    );
    assert!(std::mem::offset_of!(SuperblockRaw, name) == 80);
    assert!(std::mem::offset_of!(SuperblockRaw, block_bytes) == 144);
    assert!(std::mem::offset_of!(SuperblockRaw, owner_epoch) == 160);
    assert!(std::mem::offset_of!(SuperblockRaw, root) == 184);
    assert!(std::mem::offset_of!(SuperblockRaw, devices) == 512);
    assert!(std::mem::offset_of!(SuperblockRaw, shards) == 1536);
};

impl Superblock {
    /// The block for copy `copy` at byte `offset_bytes` of device `self.device`.
    ///
    /// Fails if the superblock breaks a rule that [`Superblock::parse`] checks.
    pub fn encode(&self, key: &BlockKey, copy: u16, offset_bytes: u64) -> Result<Box<Block>, BlockError> {
        if self.devices.len() > MAX_DEVICES {
            return Err(malformed("device count", self.devices.len() as u64));
        }
        if self.shards.len() > MAX_SHARDS {
            return Err(malformed("shard count", self.shards.len() as u64));
        }
        if self.name.len() > 64 {
            return Err(malformed("name length", self.name.len() as u64));
        }
        let place = BlockPlace { device: self.device, copy, segment: SegmentNo(0), offset_bytes };
        let mut raw = SuperblockRaw {
            head: BlockHead::new(BlockKind::Superblock, self.pool, place, self.generation),
            compatible: self.features.compatible.into(),
            read_only_compatible: self.features.read_only_compatible.into(),
            incompatible: self.features.incompatible.into(),
            name: block::put_text(&self.name),
            block_bytes: (BLOCK_BYTES as u32).into(),
            segment_bytes: self.segment_bytes.into(),
            slots_per_container: (SLOTS as u32).into(),
            shard_count: (self.shards.len() as u16).into(),
            device_count: (self.devices.len() as u16).into(),
            owner_epoch: self.owner_epoch.0.into(),
            created_ms: self.created_ms.into(),
            reserved0: 0.into(),
            root: NodePtr::to_raw(self.root.as_ref()),
            reserved1: [0; 288],
            devices: zerocopy::FromZeros::new_zeroed(),
            shards: zerocopy::FromZeros::new_zeroed(),
            reserved2: [0; 208],
        };
        for (raw, entry) in raw.devices.iter_mut().zip(&self.devices) {
            *raw = entry.raw();
        }
        for (raw, entry) in raw.shards.iter_mut().zip(&self.shards) {
            *raw = entry.raw();
        }
        Self::from_raw(&raw)?;
        Ok(block::stamp(&raw, key))
    }

    /// Parses the block read at byte `offset_bytes` of a device.
    pub fn parse(block: &Block, offset_bytes: u64) -> Result<Unverified<Self>, BlockError> {
        let raw = block::open::<SuperblockRaw>(block, BlockKind::Superblock, offset_bytes)?;
        Ok(block::unverified(Self::from_raw(raw)?, block))
    }

    /// Whether a program that knows only this version may write the pool.
    pub fn is_writable(&self) -> bool {
        self.features.read_only_compatible & !KNOWN_READ_ONLY == 0
    }

    /// Whether it was made with the algorithms of the FIPS modes ([`FEATURE_APPROVED`]).
    pub fn is_approved(&self) -> bool {
        self.features.incompatible & FEATURE_APPROVED != 0
    }

    fn from_raw(raw: &SuperblockRaw) -> Result<Self, BlockError> {
        let unknown = raw.incompatible.get() & !KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            return Err(BlockError::Features { unknown });
        }
        if raw.block_bytes != BLOCK_BYTES as u32 {
            return Err(malformed("block size", raw.block_bytes.get()));
        }
        if raw.slots_per_container != SLOTS as u32 {
            return Err(malformed("slots per container", raw.slots_per_container.get()));
        }
        let segment_bytes = raw.segment_bytes.get();
        if !segment_bytes.is_power_of_two()
            || !(MIN_SEGMENT_BYTES..=MAX_SEGMENT_BYTES).contains(&segment_bytes)
        {
            return Err(malformed("segment size", segment_bytes));
        }
        let (devices, shards) = (usize::from(raw.device_count.get()), usize::from(raw.shard_count.get()));
        if !(1..=MAX_DEVICES).contains(&devices) {
            return Err(malformed("device count", devices as u64));
        }
        if !(1..=MAX_SHARDS).contains(&shards) {
            return Err(malformed("shard count", shards as u64));
        }
        zero("reserved", raw.reserved0.as_bytes())?;
        zero("reserved", &raw.reserved1)?;
        zero("unused devices", raw.devices[devices..].as_bytes())?;
        zero("unused shards", raw.shards[shards..].as_bytes())?;
        let devices =
            raw.devices[..devices].iter().map(DeviceEntry::from_raw).collect::<Result<Vec<_>, _>>()?;
        if !devices.is_sorted_by(|a, b| a.device < b.device) {
            return Err(malformed("device order", devices.len() as u64));
        }
        let device = DeviceIx(raw.head.device.get());
        if !devices.iter().any(|entry| entry.device == device) {
            return Err(malformed("own device", device.0));
        }
        let shards = raw.shards[..shards]
            .iter()
            .map(|shard| ShardEntry::from_raw(shard, &devices))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            pool: raw.head.pool(),
            name: block::text("name", &raw.name)?,
            generation: raw.head.generation.get(),
            features: Features {
                compatible: raw.compatible.get(),
                read_only_compatible: raw.read_only_compatible.get(),
                incompatible: raw.incompatible.get(),
            },
            device,
            segment_bytes,
            owner_epoch: OwnerEpoch(raw.owner_epoch.get()),
            created_ms: raw.created_ms.get(),
            root: NodePtr::from_raw(&raw.root).map_err(|_| malformed("root", raw.root.stored_len.get()))?,
            devices,
            shards,
        })
    }
}

impl DeviceEntry {
    fn raw(&self) -> DeviceRaw {
        DeviceRaw {
            id: self.id.into_bytes(),
            blocks: self.blocks.into(),
            anchor_blocks: self.anchor_blocks.into(),
            device: self.device.0.into(),
            state: self.state as u8,
            reserved0: 0,
            mirror_group: self.redundancy.mirror_group.into(),
            mirror_member: self.redundancy.mirror_member.into(),
            parity_group: self.redundancy.parity_group.into(),
            parity_width: self.redundancy.parity_width,
            parity_index: self.redundancy.parity_index,
            reserved: [0; 20],
        }
    }

    fn from_raw(raw: &DeviceRaw) -> Result<Self, BlockError> {
        let state = match raw.state {
            1 => DeviceState::Active,
            2 => DeviceState::Draining,
            3 => DeviceState::Failed,
            other => return Err(malformed("device state", other)),
        };
        let redundancy = Redundancy {
            mirror_group: raw.mirror_group.get(),
            mirror_member: raw.mirror_member.get(),
            parity_group: raw.parity_group.get(),
            parity_width: raw.parity_width,
            parity_index: raw.parity_index,
        };
        if redundancy != Redundancy::default() {
            return Err(malformed("device redundancy", raw.mirror_group.get()));
        }
        zero("device reserved", &[raw.reserved0])?;
        zero("device reserved", &raw.reserved)?;
        let (blocks, anchor_blocks) = (raw.blocks.get(), raw.anchor_blocks.get());
        let smallest = MIN_DEVICE_BYTES / BLOCK_BYTES as u64;
        if !(smallest..=blocks).contains(&anchor_blocks) || blocks > u64::MAX / BLOCK_BYTES as u64 {
            return Err(malformed("device size", blocks));
        }
        let (device, id) = (DeviceIx(raw.device.get()), Uuid::from_bytes(raw.id));
        Ok(Self { device, id, state, blocks, anchor_blocks, redundancy })
    }
}

impl ShardEntry {
    fn raw(&self) -> ShardRaw {
        ShardRaw {
            device: self.device.0.into(),
            reserved: 0.into(),
            blocks: self.blocks.into(),
            start_block: self.start_block.into(),
            tail_position: self.tail_position.into(),
            tail_sequence: self.tail_sequence.0.into(),
            tail_chain: self.tail_chain,
        }
    }

    fn from_raw(raw: &ShardRaw, devices: &[DeviceEntry]) -> Result<Self, BlockError> {
        zero("shard reserved", raw.reserved.as_bytes())?;
        let device = DeviceIx(raw.device.get());
        let Some(entry) = devices.iter().find(|entry| entry.device == device) else {
            return Err(malformed("journal device", device.0));
        };
        let (start_block, blocks) = (raw.start_block.get(), raw.blocks.get());
        if blocks < MIN_JOURNAL_BLOCKS {
            return Err(malformed("journal size", blocks));
        }
        if start_block.checked_add(u64::from(blocks)).is_none_or(|end| end > entry.blocks) {
            return Err(malformed("journal start", start_block));
        }
        if raw.tail_sequence == 0 {
            return Err(malformed("journal sequence", 0u64));
        }
        Ok(Self {
            device,
            blocks,
            start_block,
            tail_position: raw.tail_position.get(),
            tail_sequence: Sequence(raw.tail_sequence.get()),
            tail_chain: raw.tail_chain,
        })
    }
}

#[cfg(test)]
pub(crate) fn layouts() -> Vec<crate::layout::Layout> {
    use crate::layout::layout;
    vec![
        layout!("superblock", SuperblockRaw { head compatible read_only_compatible incompatible name block_bytes segment_bytes slots_per_container shard_count device_count owner_epoch created_ms reserved0 root reserved1 devices shards reserved2 }),
        layout!("device entry", DeviceRaw { id blocks anchor_blocks device state reserved0 mirror_group mirror_member parity_group parity_width parity_index reserved }),
        layout!("shard entry", ShardRaw { device reserved blocks start_block tail_position tail_sequence tail_chain }),
    ]
}
