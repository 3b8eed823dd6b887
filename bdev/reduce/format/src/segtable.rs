//! The segment table: per device a tree whose leaves hold 256 entries of 32 bytes.
//!
//! ```text
//! 0    incarnation u64
//! 8    used bytes u32, live bytes u32
//! 16   domain u32, key generation u32
//! 24   state u8, class u8, shard u16, reserved u32
//! ```

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::ids::{DomainId, Generation, Incarnation, ShardIx};
use crate::segment::Class;
use crate::wire::{WireError, range};

/// Entries of a leaf.
pub const SEGMENTS_PER_LEAF: usize = 256;

/// Life of a segment.
///
/// ```text
/// Free -> Open -> Sealed -> PendingFree -> Free
/// (any) -> Bad; Reserved (anchors, journal rings) never changes
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(u8)]
pub enum SegmentState {
    /// May be opened.
    #[default]
    Free = 0,
    /// Being filled.
    Open = 1,
    /// Full or abandoned: never appended to again.
    Sealed = 2,
    /// Emptied; free once that is durable and its readers are gone.
    PendingFree = 3,
    /// The device fails here.
    Bad = 4,
    /// An anchor or a journal ring lies in it.
    Reserved = 5,
}

impl SegmentState {
    /// From its number.
    pub fn from_raw(raw: u8) -> Option<Self> {
        use SegmentState::*;
        [Free, Open, Sealed, PendingFree, Bad, Reserved].into_iter().find(|&state| state as u8 == raw)
    }

    /// Whether the life of a segment has this step.
    pub fn may_become(self, next: Self) -> bool {
        use SegmentState::*;
        matches!(
            (self, next),
            (Free, Open)
                | (Open, Sealed)
                | (Sealed, PendingFree)
                | (PendingFree, Free)
                | (Free | Open | Sealed | PendingFree, Bad)
        )
    }
}

/// A segment's entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SegmentEntry {
    /// State.
    pub state: SegmentState,
    /// What it holds; `None` while free, bad or reserved.
    pub class: Option<Class>,
    /// Whose key.
    pub domain: DomainId,
    /// Which generation.
    pub generation: Generation,
    /// Incarnation of the newest opening; 0 = never opened.
    pub incarnation: Incarnation,
    /// Bytes appended, header and padding included.
    pub used_bytes: u32,
    /// Bytes of units that something refers to.
    pub live_bytes: u32,
    /// The shard that filled it.
    pub shard: ShardIx,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    incarnation: U64,
    used_bytes: U32,
    live_bytes: U32,
    domain: U32,
    generation: U32,
    state: u8,
    class: u8,
    shard: U16,
    reserved: U32,
}

const _: () = assert!(size_of::<Raw>() == 32);

impl SegmentEntry {
    fn raw(&self) -> Raw {
        Raw {
            incarnation: self.incarnation.0.into(),
            used_bytes: self.used_bytes.into(),
            live_bytes: self.live_bytes.into(),
            domain: self.domain.0.into(),
            generation: self.generation.0.into(),
            state: self.state as u8,
            class: self.class.map_or(0, |class| class as u8),
            shard: self.shard.0.into(),
            reserved: 0.into(),
        }
    }

    fn from_raw(raw: &Raw) -> Result<Self, WireError> {
        let state = SegmentState::from_raw(raw.state).ok_or(range("segment state", raw.state))?;
        let class = match raw.class {
            0 => None,
            class => Some(Class::from_raw(class).ok_or(range("segment class", class))?),
        };
        use SegmentState::{Open, PendingFree, Sealed};
        if class.is_none() && matches!(state, Open | Sealed | PendingFree) {
            return Err(range("segment class", raw.class));
        }
        if raw.reserved != 0 {
            return Err(range("segment entry's reserved field", raw.reserved.get()));
        }
        if raw.live_bytes.get() > raw.used_bytes.get() {
            return Err(range("live bytes", raw.live_bytes.get()));
        }
        Ok(Self {
            state,
            class,
            domain: DomainId(raw.domain.get()),
            generation: Generation(raw.generation.get()),
            incarnation: Incarnation(raw.incarnation.get()),
            used_bytes: raw.used_bytes.get(),
            live_bytes: raw.live_bytes.get(),
            shard: ShardIx(raw.shard.get()),
        })
    }
}

/// A leaf's content, from 1 ..= [`SEGMENTS_PER_LEAF`] entries.
pub fn encode_leaf(entries: &[SegmentEntry]) -> Vec<u8> {
    entries.iter().map(SegmentEntry::raw).collect::<Vec<_>>().as_bytes().to_vec()
}

/// Parses a leaf's content.
pub fn decode_leaf(bytes: &[u8]) -> Result<Vec<SegmentEntry>, WireError> {
    let raws = <[Raw]>::ref_from_bytes(bytes).map_err(|_| range("segment leaf bytes", bytes.len() as u64))?;
    if raws.is_empty() || raws.len() > SEGMENTS_PER_LEAF {
        return Err(range("segment leaf entries", raws.len() as u64));
    }
    raws.iter().map(SegmentEntry::from_raw).collect()
}

#[cfg(test)]
pub(crate) fn layouts() -> Vec<crate::layout::Layout> {
    use crate::layout::layout;
    vec![
        layout!("segment entry", Raw { incarnation used_bytes live_bytes domain generation state class shard reserved }),
    ]
}
