//! The owner block: who has the pool open, and whether they are alive.
//!
//! It lies in every anchor. The owner rewrites it as a heartbeat, one anchor after another, so that a torn write leaves
//! the others; opening a pool first reads all copies, waits for more than the owner's interval, reads again.
//!
//! ```text
//! 0      block head, generation = heartbeat counter
//! 56     owner epoch u64, owner id [16], heartbeat time (ms since 1970) u64, interval ms u32, state u8, reserved [3]
//! 96     host name [64]
//! 160    reserved, zero
//! ```

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::{
    self, Block, BlockError, BlockHead, BlockKey, BlockKind, BlockPlace, Unverified, malformed,
};
use crate::ids::{DeviceIx, OwnerEpoch};

/// Whether the pool is open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum OwnerState {
    /// Closed in order.
    Closed = 1,
    /// Open, or its owner died.
    Open = 2,
}

/// Who has the pool open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnerBlock {
    /// The pool.
    pub pool: Uuid,
    /// Counts the openings.
    pub epoch: OwnerEpoch,
    /// Random, drawn by each opening.
    pub owner: [u8; 16],
    /// State.
    pub state: OwnerState,
    /// Heartbeats of this opening, from 1.
    pub beat: u64,
    /// When, by the owner's clock, in ms since 1970: for people only.
    pub beat_ms: u64,
    /// Longest time between heartbeats.
    pub interval_ms: u32,
    /// The owner's host, at most 64 bytes.
    pub host: String,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct OwnerRaw {
    head: BlockHead,
    epoch: U64,
    owner: [u8; 16],
    beat_ms: U64,
    interval_ms: U32,
    state: u8,
    reserved0: [u8; 3],
    host: [u8; 64],
    reserved: [[u8; 8]; 486],
}

const _: () = assert!(size_of::<OwnerRaw>() == 4048 && std::mem::offset_of!(OwnerRaw, host) == 96);

/// What two readings of the owner blocks say to one who wants to open the pool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ownership {
    /// Closed in order.
    Free,
    /// The asker's own opening.
    Mine,
    /// Another owner beat between the readings: do not open.
    Alive(OwnerBlock),
    /// Open, but no beat between the readings: its owner died (if the readings were more than `interval_ms` apart).
    Dead(OwnerBlock),
}

impl OwnerBlock {
    /// Judges from the newest block of a first and of a second reading.
    pub fn judge(me: &[u8; 16], first: &Self, second: &Self) -> Ownership {
        if second.state == OwnerState::Closed {
            Ownership::Free
        } else if second.owner == *me {
            Ownership::Mine
        } else if (second.epoch, second.beat, second.owner) != (first.epoch, first.beat, first.owner) {
            Ownership::Alive(second.clone())
        } else {
            Ownership::Dead(second.clone())
        }
    }

    /// Which of two blocks is newer.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        (self.epoch, self.beat) > (other.epoch, other.beat)
    }

    /// The block for copy `copy` at byte `offset_bytes` of `device`.
    pub fn encode(&self, key: &BlockKey, device: DeviceIx, copy: u16, offset_bytes: u64) -> Box<Block> {
        let place = BlockPlace { device, copy, segment: Default::default(), offset_bytes };
        let raw = OwnerRaw {
            head: BlockHead::new(BlockKind::Owner, self.pool, place, self.beat),
            epoch: self.epoch.0.into(),
            owner: self.owner,
            beat_ms: self.beat_ms.into(),
            interval_ms: self.interval_ms.into(),
            state: self.state as u8,
            reserved0: [0; 3],
            host: block::put_text(&self.host),
            reserved: [[0; 8]; 486],
        };
        block::stamp(&raw, key)
    }

    /// Parses the block read at byte `offset_bytes` of a device.
    pub fn parse(block: &Block, offset_bytes: u64) -> Result<Unverified<Self>, BlockError> {
        let raw = block::open::<OwnerRaw>(block, BlockKind::Owner, offset_bytes)?;
        block::zero("reserved", &raw.reserved0)?;
        block::zero("reserved", raw.reserved.as_bytes())?;
        let state = match raw.state {
            1 => OwnerState::Closed,
            2 => OwnerState::Open,
            other => return Err(malformed("owner state", other)),
        };
        let owner = Self {
            pool: raw.head.pool(),
            epoch: OwnerEpoch(raw.epoch.get()),
            owner: raw.owner,
            state,
            beat: raw.head.generation.get(),
            beat_ms: raw.beat_ms.get(),
            interval_ms: raw.interval_ms.get(),
            host: block::text("host name", &raw.host)?,
        };
        Ok(block::unverified(owner, block))
    }
}

#[cfg(test)]
pub(crate) fn layouts() -> Vec<crate::layout::Layout> {
    use crate::layout::layout;
    vec![
        layout!("owner block", OwnerRaw { head epoch owner beat_ms interval_ms state reserved0 host reserved }),
    ]
}
