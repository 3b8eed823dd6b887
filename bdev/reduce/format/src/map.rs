//! The leaf of a volume's map: 512 entries, 2 MiB of the volume.
//!
//! Entry, 16 bytes in memory and in the leaf's plain form:
//!
//! ```text
//! 0    target u64: chunk address (container << 16 | slot), or the pattern; 0 otherwise
//! 8    birth epoch u32, host-key id u16, state u8, flags u8 (zero)
//! ```
//!
//! The node's content is the same entries in columns (states, host keys, births, chunk addresses as differences to the
//! chunk before, each split into byte planes): neighbours mostly differ by one and then compress to nearly nothing.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::ids::{ChunkAddr, Epoch, HostKeyId};
use crate::sealed::OpenError;

/// Entries of a leaf.
pub const MAP_ENTRIES: usize = 512;
/// Bytes of a leaf's content.
pub const MAP_LEAF_BYTES: usize = MAP_ENTRIES * 16;

const CHUNK: u8 = 3;

/// What a block of a volume is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Target {
    /// Never written or discarded: reads as raw zeros, whatever the host's key. With a birth it is that for sure; without
    /// one, a snapshot's or clone's entry says nothing, and others are asked ([`crate::record::VolumeRecord::family`]).
    #[default]
    Unmapped,
    /// Zeros before the host's encryption (raw zeros if the host-key id is 0).
    Zero,
    /// 4 KiB of this 8-byte pattern, little-endian.
    Pattern(u64),
    /// A chunk.
    Chunk(ChunkAddr),
    /// Lost: reads fail until it is written again.
    Uncorrectable,
}

/// A block of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MapEntry {
    /// What it is.
    pub target: Target,
    /// Epoch of writing.
    pub birth: Epoch,
    /// Key under which the host had encrypted it; 0 = stored as sent.
    pub host_key: HostKeyId,
}

/// On-disk form of an entry.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct MapEntryRaw {
    word: U64,
    birth: U32,
    host_key: U16,
    state: u8,
    flags: u8,
}

const _: () = assert!(size_of::<MapEntryRaw>() == 16);

impl MapEntry {
    /// The on-disk form.
    pub fn to_raw(self) -> MapEntryRaw {
        let (state, word) = match self.target {
            Target::Unmapped => (0, 0),
            Target::Zero => (1, 0),
            Target::Pattern(word) => (2, word),
            Target::Chunk(addr) => (CHUNK, addr.raw()),
            Target::Uncorrectable => (4, 0),
        };
        MapEntryRaw {
            word: word.into(),
            birth: self.birth.0.into(),
            host_key: self.host_key.0.into(),
            state,
            flags: 0,
        }
    }

    /// From the on-disk form.
    pub fn from_raw(raw: &MapEntryRaw) -> Result<Self, OpenError> {
        let word = raw.word.get();
        let bad = |field, value| Err(OpenError::Malformed { field, value });
        let target = match raw.state {
            0 => Target::Unmapped,
            1 => Target::Zero,
            2 => Target::Pattern(word),
            CHUNK => match ChunkAddr::from_raw(word) {
                Some(addr) => Target::Chunk(addr),
                None => return bad("map entry's chunk", word),
            },
            4 => Target::Uncorrectable,
            state => return bad("map entry's state", state.into()),
        };
        if raw.flags != 0 {
            return bad("map entry's flags", raw.flags.into());
        }
        if word != 0 && !matches!(target, Target::Pattern(_) | Target::Chunk(_)) {
            return bad("map entry's word", word);
        }
        Ok(Self { target, birth: Epoch(raw.birth.get()), host_key: HostKeyId(raw.host_key.get()) })
    }

    /// Whether it says nothing: others are asked, and if there are none it is unmapped.
    pub fn is_none(&self) -> bool {
        self.target == Target::Unmapped && self.birth == Epoch(0)
    }

    /// The chunk, if it is one.
    pub fn chunk(&self) -> Option<ChunkAddr> {
        match self.target {
            Target::Chunk(addr) => Some(addr),
            _ => None,
        }
    }
}

/// A leaf of a volume's map.
#[derive(Clone, PartialEq, Eq)]
pub struct MapLeaf(Box<[MapEntryRaw; MAP_ENTRIES]>);

impl Default for MapLeaf {
    fn default() -> Self {
        Self(Box::new([MapEntryRaw::default(); MAP_ENTRIES]))
    }
}

impl std::fmt::Debug for MapLeaf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map()
            .entries(self.iter().enumerate().filter(|(_, entry)| *entry != MapEntry::default()))
            .finish()
    }
}

impl MapLeaf {
    /// Entry `at`, below [`MAP_ENTRIES`].
    pub fn get(&self, at: usize) -> MapEntry {
        // Checked when it came in.
        MapEntry::from_raw(&self.0[at]).unwrap_or_default()
    }

    /// Where entry `at` lies, to be asked for before it is needed.
    pub fn raw(&self, at: usize) -> &MapEntryRaw {
        &self.0[at]
    }

    /// Sets entry `at`.
    pub fn set(&mut self, at: usize, entry: MapEntry) {
        self.0[at] = entry.to_raw();
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = MapEntry> {
        (0..MAP_ENTRIES).map(|at| self.get(at))
    }

    /// Whether no entry says anything: such a leaf need not exist.
    pub fn is_empty(&self) -> bool {
        self.0.as_bytes().iter().all(|&byte| byte == 0)
    }

    /// The node's content: [`MAP_LEAF_BYTES`] bytes in columns.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; MAP_LEAF_BYTES];
        let mut before = 0u64;
        for (at, raw) in self.0.iter().enumerate() {
            let mut raw = *raw;
            if raw.state == CHUNK {
                let word = raw.word.get();
                raw.word = word.wrapping_sub(before).into();
                before = word;
            }
            for (column, &byte) in raw.as_bytes().iter().enumerate() {
                out[column * MAP_ENTRIES + at] = byte;
            }
        }
        out
    }

    /// Parses a node's content; every entry is checked.
    pub fn decode(bytes: &[u8]) -> Result<Self, OpenError> {
        if bytes.len() != MAP_LEAF_BYTES {
            return Err(OpenError::Malformed { field: "map leaf bytes", value: bytes.len() as u64 });
        }
        let mut leaf = Self::default();
        let mut before = 0u64;
        for (at, out) in leaf.0.iter_mut().enumerate() {
            let entry: [u8; 16] = std::array::from_fn(|column| bytes[column * MAP_ENTRIES + at]);
            let mut raw: MapEntryRaw = zerocopy::transmute!(entry);
            if raw.state == CHUNK {
                before = before.wrapping_add(raw.word.get());
                raw.word = before.into();
            }
            MapEntry::from_raw(&raw)?;
            *out = raw;
        }
        Ok(leaf)
    }
}

#[cfg(test)]
pub(crate) fn layouts() -> Vec<crate::layout::Layout> {
    use crate::layout::layout;
    vec![layout!("map entry", MapEntryRaw { word birth host_key state flags })]
}
