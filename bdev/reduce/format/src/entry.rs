//! The journal's records. The pool's state is the fold of its records over the last checkpoint, so a record says what
//! is, completely: applying it needs nothing but the state before.
//!
//! Records of containers and maps stand in a group of their domain ([`crate::journal::Scope`]), which names it; all
//! others stand in the pool's. Encoded: kind u8, zero u8, body bytes u16, body. A body is a fixed structure, then an
//! array or bytes that fill it up. Kind numbers are never reused; an unknown one refuses the batch.

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::codec::Codec;
use crate::container::FragmentEntry;
use crate::fingerprint::Fingerprint;
use crate::ids::{
    ChunkAddr, ContainerId, DeviceIx, DomainId, Epoch, Generation, Incarnation, Lba, Place, SegmentAddr,
    SegmentNo, ShardIx, VolumeId,
};
use crate::map::{MAP_ENTRIES, MapEntry, MapEntryRaw, Target};
use crate::sealed::OpenError;
use crate::segment::Class;
use crate::wire::{Reader, WireError, range};

/// Bytes before a record's body.
pub const RECORD_HEADER_BYTES: usize = 4;
/// Bytes of a record's body, at most.
pub const MAX_BODY_BYTES: usize = 60 << 10;

/// A run of consecutive blocks of a volume. A chunk's run goes on through the slots of its container; every other target
/// repeats.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MapRun {
    entry: MapEntryRaw,
    count: U16,
}

const _: () = assert!(size_of::<MapRun>() == 18);

impl MapRun {
    /// `count` (1 ..= 512) blocks from `first` on. `None` if a run of chunks leaves its container.
    pub fn new(first: MapEntry, count: u16) -> Option<Self> {
        let run = Self { entry: first.to_raw(), count: count.into() };
        run.check().is_ok().then_some(run)
    }

    fn check(&self) -> Result<MapEntry, WireError> {
        let first = MapEntry::from_raw(&self.entry).map_err(|error| match error {
            OpenError::Malformed { field, value } => range(field, value),
            _ => range("map entry", 0u8),
        })?;
        let count = self.count.get();
        if !(1..=MAP_ENTRIES as u16).contains(&count) {
            return Err(range("run's blocks", count));
        }
        match first.target {
            Target::Chunk(addr) if addr.plus(count - 1).is_none() => Err(range("run's blocks", count)),
            _ => Ok(first),
        }
    }

    /// Blocks of the run.
    pub fn count(&self) -> u16 {
        self.count.get()
    }

    /// The first block's entry.
    pub fn first(&self) -> MapEntry {
        // Checked when it was made.
        self.check().unwrap_or_default()
    }

    /// The entries of the run.
    pub fn entries(&self) -> impl Iterator<Item = MapEntry> + use<> {
        let first = self.first();
        (0..self.count()).map(move |at| {
            let target = match first.target {
                Target::Chunk(addr) => addr.plus(at).map_or(Target::Uncorrectable, Target::Chunk),
                other => other,
            };
            MapEntry { target, ..first }
        })
    }

    /// Extends the run by `entry` if it continues it.
    pub fn extend(&mut self, entry: &MapEntry) -> bool {
        let (first, count) = (self.first(), self.count());
        let next = match first.target {
            Target::Chunk(addr) => addr.plus(count).map(Target::Chunk),
            other => Some(other),
        };
        let fits = usize::from(count) < MAP_ENTRIES
            && next.is_some_and(|target| MapEntry { target, ..first } == *entry);
        if fits {
            self.count = (count + 1).into();
        }
        fits
    }
}

/// A change of one slot's references.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RefChange {
    slot: U16,
    delta: I32,
}

impl RefChange {
    /// `slot` gets `delta` references more.
    pub fn new(slot: u16, delta: i32) -> Self {
        Self { slot: slot.into(), delta: delta.into() }
    }

    /// The slot.
    pub fn slot(&self) -> u16 {
        self.slot.get()
    }

    /// The change.
    pub fn delta(&self) -> i32 {
        self.delta.get()
    }
}

/// Another chunk with the same content for an entry of a map's leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Retarget {
    slot: U16,
    addr: U64,
}

const _: () = assert!(size_of::<Retarget>() == 10);

impl Retarget {
    /// Entry `slot` (below 512) of the leaf is `addr` now.
    pub fn new(slot: u16, addr: ChunkAddr) -> Self {
        Self { slot: slot.into(), addr: addr.raw().into() }
    }

    fn check(&self) -> Result<ChunkAddr, WireError> {
        if usize::from(self.slot.get()) >= MAP_ENTRIES {
            return Err(range("entry of a leaf", self.slot.get()));
        }
        ChunkAddr::from_raw(self.addr.get()).ok_or(range("chunk", self.addr.get()))
    }

    /// The entry of the leaf.
    pub fn slot(&self) -> u16 {
        self.slot.get()
    }

    /// The chunk; `None` for one out of range, which does not come out of a record.
    pub fn addr(&self) -> Option<ChunkAddr> {
        self.check().ok()
    }
}

/// On-disk form of a [`FragmentEntry`] in a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FragmentRaw {
    device: U16,
    first_slot: U16,
    segment: U32,
    offset: U32,
    unit_bytes: U32,
    chunks: u8,
    codec: u8,
}

impl FragmentRaw {
    /// The entry, if its fields are in range.
    pub fn entry(&self) -> Result<FragmentEntry, WireError> {
        let segment =
            SegmentAddr { device: DeviceIx(self.device.get()), segment: SegmentNo(self.segment.get()) };
        let entry = FragmentEntry {
            first_slot: self.first_slot.get(),
            chunks: self.chunks,
            codec: Codec::from_raw(self.codec).ok_or(range("fragment's codec", self.codec))?,
            place: Place { segment, offset: self.offset.get() },
            unit_bytes: self.unit_bytes.get(),
        };
        entry.check()?;
        Ok(entry)
    }
}

impl From<&FragmentEntry> for FragmentRaw {
    fn from(entry: &FragmentEntry) -> Self {
        Self {
            device: entry.place.segment.device.0.into(),
            first_slot: entry.first_slot.into(),
            segment: entry.place.segment.segment.0.into(),
            offset: entry.place.offset.into(),
            unit_bytes: entry.unit_bytes.into(),
            chunks: entry.chunks,
            codec: entry.codec as u8,
        }
    }
}

/// What [`Record::MapOwn`] makes a volume independent of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum OwnFrom {
    /// Its snapshots: they get entries of their own.
    Snapshots = 1,
    /// Its base (but not what that is based on).
    Base = 2,
    /// All that it is based on.
    Bases = 3,
}

impl OwnFrom {
    fn from_raw(raw: u8) -> Option<Self> {
        [Self::Snapshots, Self::Base, Self::Bases].into_iter().find(|&from| from as u8 == raw)
    }
}

/// A record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Record<'a> {
    /// A free segment is being filled.
    SegmentOpen {
        /// Segment.
        addr: SegmentAddr,
        /// Its incarnation.
        incarnation: Incarnation,
        /// What it holds.
        class: Class,
        /// Whose key.
        domain: DomainId,
        /// Which generation.
        generation: Generation,
        /// Who fills it.
        shard: ShardIx,
    },
    /// A segment is never appended to again.
    SegmentSeal {
        /// Segment.
        addr: SegmentAddr,
        /// Its incarnation.
        incarnation: Incarnation,
        /// Bytes appended.
        used_bytes: u32,
    },
    /// A segment was emptied.
    SegmentEmpty {
        /// Segment.
        addr: SegmentAddr,
        /// Its incarnation.
        incarnation: Incarnation,
    },
    /// An emptied segment may be opened again.
    SegmentFree {
        /// Segment.
        addr: SegmentAddr,
        /// Its incarnation.
        incarnation: Incarnation,
    },
    /// The device fails in this segment.
    SegmentBad {
        /// Segment.
        addr: SegmentAddr,
    },
    /// A container begins, empty.
    ContainerOpen {
        /// Container.
        container: ContainerId,
    },
    /// A container gives out no more slots.
    ContainerClose {
        /// Container.
        container: ContainerId,
    },
    /// A container without references is dropped.
    ContainerDrop {
        /// Container.
        container: ContainerId,
    },
    /// New chunks, without references so far.
    FragmentAdd {
        /// Container.
        container: ContainerId,
        /// The fragment.
        fragment: FragmentEntry,
        /// Fingerprints of its chunks, one each, of the group's generation.
        fingerprints: &'a [Fingerprint],
    },
    /// A fragment lies elsewhere now, perhaps split or without dead chunks, or is dropped
    /// ([`Container::replace`](crate::container::Container::replace)).
    FragmentMove {
        /// The fragment: address of its first chunk.
        first: ChunkAddr,
        /// What holds its chunks now.
        fragments: &'a [FragmentRaw],
    },
    /// The fingerprints of a container's slots, from the first on, made anew with the secret of the group's generation.
    Fingerprints {
        /// Container.
        container: ContainerId,
        /// One for each slot that has been given out; [`Fingerprint::NONE`] where a slot has none.
        fingerprints: &'a [Fingerprint],
    },
    /// References of a container's slots change.
    Refs {
        /// Container.
        container: ContainerId,
        /// Changes.
        changes: &'a [RefChange],
    },
    /// Blocks of a volume become what the runs say, one run after the other.
    MapSet {
        /// Volume.
        volume: VolumeId,
        /// First block.
        lba: Lba,
        /// Runs.
        runs: &'a [MapRun],
    },
    /// `count` blocks of a volume all become `entry`, which is no chunk.
    MapFill {
        /// Volume.
        volume: VolumeId,
        /// First block.
        lba: Lba,
        /// Blocks.
        count: u64,
        /// What they become.
        entry: MapEntry,
    },
    /// Leaves of a deleted volume's or snapshot's map are given up: what the snapshot before it shares goes there.
    MapMerge {
        /// The volume or snapshot.
        volume: VolumeId,
        /// First leaf.
        leaf: u64,
        /// Leaves.
        count: u32,
    },
    /// Leaves of a volume's map stop depending on others.
    MapOwn {
        /// The volume or snapshot.
        volume: VolumeId,
        /// First leaf.
        leaf: u64,
        /// Leaves.
        count: u32,
        /// Of what.
        from: OwnFrom,
    },
    /// Entries of a leaf of a volume's map, which are chunks, are other chunks with the same content now; whatever else an entry
    /// says stays, as when it was written.
    MapRetarget {
        /// Volume.
        volume: VolumeId,
        /// Leaf.
        leaf: u64,
        /// Entries.
        changes: &'a [Retarget],
    },
    /// A volume is made.
    VolumeCreate {
        /// An encoded [`VolumeRecord`](crate::record::VolumeRecord).
        record: &'a [u8],
    },
    /// A volume's size changes; blocks beyond it become unmapped.
    VolumeResize {
        /// Volume.
        volume: VolumeId,
        /// New size in 4 KiB blocks.
        blocks: u64,
    },
    /// A volume's name changes.
    VolumeRename {
        /// Volume.
        volume: VolumeId,
        /// New name.
        name: &'a str,
    },
    /// A volume's flags change.
    VolumeFlags {
        /// Volume.
        volume: VolumeId,
        /// Flags set.
        set: u32,
        /// Flags cleared.
        clear: u32,
    },
    /// Any other field of a volume changes (but its roots and counters, which the fold keeps).
    VolumeUpdate {
        /// An encoded [`VolumeRecord`](crate::record::VolumeRecord).
        record: &'a [u8],
    },
    /// A volume is to be deleted.
    VolumeDelete {
        /// Volume.
        volume: VolumeId,
    },
    /// A deleted volume has given back everything.
    VolumeGone {
        /// Volume.
        volume: VolumeId,
    },
    /// A snapshot is made; the epoch advances.
    Snapshot {
        /// Volume.
        volume: VolumeId,
        /// New epoch.
        epoch: Epoch,
        /// The snapshot's encoded [`VolumeRecord`](crate::record::VolumeRecord).
        record: &'a [u8],
    },
    /// A clone of a snapshot is made.
    Clone {
        /// Snapshot.
        snapshot: VolumeId,
        /// The clone's encoded [`VolumeRecord`](crate::record::VolumeRecord).
        record: &'a [u8],
    },
    /// A domain is made.
    DomainCreate {
        /// An encoded [`DomainRecord`](crate::record::DomainRecord).
        record: &'a [u8],
    },
    /// A domain's name, flags or keys change (its roots and counters are the fold's).
    DomainUpdate {
        /// An encoded [`DomainRecord`](crate::record::DomainRecord).
        record: &'a [u8],
    },
    /// A domain's keys are destroyed.
    DomainErase {
        /// Domain.
        domain: DomainId,
    },
    /// The epoch advances.
    EpochAdvance {
        /// New epoch.
        epoch: Epoch,
    },
    /// The pool's settings change (its roots and counters are the fold's).
    PoolUpdate {
        /// An encoded [`PoolRecord`](crate::record::PoolRecord).
        record: &'a [u8],
    },
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SegmentRaw {
    device: U16,
    shard: U16,
    segment: U32,
    incarnation: U64,
    domain: U32,
    generation: U32,
    used_bytes: U32,
    class: u8,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct FillRaw {
    volume: U32,
    lba: U64,
    count: U64,
    entry: MapEntryRaw,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct AddRaw {
    container: U64,
    fragment: FragmentRaw,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SetRaw {
    volume: U32,
    lba: U64,
}

/// Last block of a volume, at most 2^40 (4 PiB): keeps sums of blocks far from overflow.
const MAX_BLOCKS: u64 = 1 << 40;
/// Leaves of such a volume's map.
const MAX_LEAVES: u64 = MAX_BLOCKS / MAP_ENTRIES as u64;

impl<'a> Record<'a> {
    /// Appends the record. Fails, leaving a partial record behind, if it is out of range.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        let start = out.len();
        out.extend_from_slice(&[0; RECORD_HEADER_BYTES]);
        let kind = self.body(out);
        let len = out.len() - start - RECORD_HEADER_BYTES;
        if len > MAX_BODY_BYTES {
            return Err(range("record's bytes", len as u64));
        }
        out[start] = kind;
        out[start + 2..start + 4].copy_from_slice(&(len as u16).to_le_bytes());
        // The same rules hold in both directions.
        Record::decode(kind, &out[start + RECORD_HEADER_BYTES..]).map(|_| ())
    }

    fn body(&self, out: &mut Vec<u8>) -> u8 {
        let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
        match *self {
            Self::SegmentOpen { addr, incarnation, class, domain, generation, shard } => {
                let mut raw = segment_raw(addr, incarnation);
                raw.class = class as u8;
                raw.domain = domain.0.into();
                raw.generation = generation.0.into();
                raw.shard = shard.0.into();
                put(raw.as_bytes());
                1
            }
            Self::SegmentSeal { addr, incarnation, used_bytes } => {
                let mut raw = segment_raw(addr, incarnation);
                raw.used_bytes = used_bytes.into();
                put(raw.as_bytes());
                2
            }
            Self::SegmentEmpty { addr, incarnation } => {
                put(segment_raw(addr, incarnation).as_bytes());
                3
            }
            Self::SegmentFree { addr, incarnation } => {
                put(segment_raw(addr, incarnation).as_bytes());
                4
            }
            Self::SegmentBad { addr } => {
                put(segment_raw(addr, Incarnation(0)).as_bytes());
                5
            }
            Self::ContainerOpen { container } => {
                put(&container.get().to_le_bytes());
                10
            }
            Self::ContainerClose { container } => {
                put(&container.get().to_le_bytes());
                11
            }
            Self::ContainerDrop { container } => {
                put(&container.get().to_le_bytes());
                12
            }
            Self::FragmentAdd { container, ref fragment, fingerprints } => {
                put(AddRaw { container: container.get().into(), fragment: fragment.into() }.as_bytes());
                put(fingerprints.as_bytes());
                13
            }
            Self::FragmentMove { first, fragments } => {
                put(&first.raw().to_le_bytes());
                put(fragments.as_bytes());
                14
            }
            Self::Refs { container, changes } => {
                put(&container.get().to_le_bytes());
                put(changes.as_bytes());
                15
            }
            Self::Fingerprints { container, fingerprints } => {
                put(&container.get().to_le_bytes());
                put(fingerprints.as_bytes());
                16
            }
            Self::MapSet { volume, lba, runs } => {
                put(SetRaw { volume: volume.0.into(), lba: lba.0.into() }.as_bytes());
                put(runs.as_bytes());
                20
            }
            Self::MapFill { volume, lba, count, entry } => {
                let (volume, lba) = (volume.0.into(), lba.0.into());
                put(FillRaw { volume, lba, count: count.into(), entry: entry.to_raw() }.as_bytes());
                21
            }
            Self::MapMerge { volume, leaf, count } => {
                put(&volume.0.to_le_bytes());
                put(&leaf.to_le_bytes());
                put(&count.to_le_bytes());
                22
            }
            Self::MapOwn { volume, leaf, count, from } => {
                put(&volume.0.to_le_bytes());
                put(&leaf.to_le_bytes());
                put(&count.to_le_bytes());
                put(&[from as u8]);
                23
            }
            Self::MapRetarget { volume, leaf, changes } => {
                put(&volume.0.to_le_bytes());
                put(&leaf.to_le_bytes());
                put(changes.as_bytes());
                24
            }
            Self::VolumeCreate { record } => {
                put(record);
                30
            }
            Self::VolumeResize { volume, blocks } => {
                put(&volume.0.to_le_bytes());
                put(&blocks.to_le_bytes());
                31
            }
            Self::VolumeRename { volume, name } => {
                put(&volume.0.to_le_bytes());
                put(name.as_bytes());
                32
            }
            Self::VolumeFlags { volume, set, clear } => {
                put(&volume.0.to_le_bytes());
                put(&set.to_le_bytes());
                put(&clear.to_le_bytes());
                33
            }
            Self::VolumeUpdate { record } => {
                put(record);
                34
            }
            Self::VolumeDelete { volume } => {
                put(&volume.0.to_le_bytes());
                35
            }
            Self::VolumeGone { volume } => {
                put(&volume.0.to_le_bytes());
                36
            }
            Self::Snapshot { volume, epoch, record } => {
                put(&volume.0.to_le_bytes());
                put(&epoch.0.to_le_bytes());
                put(record);
                37
            }
            Self::Clone { snapshot, record } => {
                put(&snapshot.0.to_le_bytes());
                put(record);
                38
            }
            Self::DomainCreate { record } => {
                put(record);
                40
            }
            Self::DomainUpdate { record } => {
                put(record);
                41
            }
            Self::DomainErase { domain } => {
                put(&domain.0.to_le_bytes());
                42
            }
            Self::EpochAdvance { epoch } => {
                put(&epoch.0.to_le_bytes());
                50
            }
            Self::PoolUpdate { record } => {
                put(record);
                51
            }
        }
    }

    fn decode(kind: u8, body: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader(body);
        let record = match kind {
            1..=5 => decode_segment(kind, &mut reader)?,
            10 => Self::ContainerOpen { container: container(&mut reader)? },
            11 => Self::ContainerClose { container: container(&mut reader)? },
            12 => Self::ContainerDrop { container: container(&mut reader)? },
            13..=16 => decode_container(kind, &mut reader)?,
            20 | 21 => decode_map(kind, &mut reader)?,
            22 | 23 => {
                let (volume, leaf, count) = (volume(&mut reader)?, reader.u64()?, reader.u32()?);
                if count == 0 || leaf.checked_add(count.into()).is_none_or(|end| end > MAX_LEAVES) {
                    return Err(range("leaves", count));
                }
                if kind == 22 {
                    Self::MapMerge { volume, leaf, count }
                } else {
                    let raw = reader.u8()?;
                    let from =
                        OwnFrom::from_raw(raw).ok_or(range("what a map is made independent of", raw))?;
                    Self::MapOwn { volume, leaf, count, from }
                }
            }
            24 => {
                let (volume, leaf) = (volume(&mut reader)?, reader.u64()?);
                if leaf >= MAX_LEAVES {
                    return Err(range("leaf", leaf));
                }
                let changes = array::<Retarget>(&mut reader)?;
                if changes.len() > MAP_ENTRIES {
                    return Err(range("entries", changes.len() as u64));
                }
                changes.iter().try_for_each(|change| change.check().map(|_| ()))?;
                Self::MapRetarget { volume, leaf, changes }
            }
            30 => Self::VolumeCreate { record: rest(&mut reader) },
            31 => {
                let (volume, blocks) = (volume(&mut reader)?, reader.u64()?);
                if blocks > MAX_BLOCKS {
                    return Err(range("volume's blocks", blocks));
                }
                Self::VolumeResize { volume, blocks }
            }
            32 => {
                let volume = volume(&mut reader)?;
                let name = rest(&mut reader);
                let name = std::str::from_utf8(name).map_err(|_| range("name", name.len() as u64))?;
                crate::record::check_name(name)?;
                Self::VolumeRename { volume, name }
            }
            33 => {
                Self::VolumeFlags { volume: volume(&mut reader)?, set: reader.u32()?, clear: reader.u32()? }
            }
            34 => Self::VolumeUpdate { record: rest(&mut reader) },
            35 => Self::VolumeDelete { volume: volume(&mut reader)? },
            36 => Self::VolumeGone { volume: volume(&mut reader)? },
            37 => {
                let (volume, epoch) = (volume(&mut reader)?, Epoch(reader.u32()?));
                Self::Snapshot { volume, epoch, record: rest(&mut reader) }
            }
            38 => Self::Clone { snapshot: volume(&mut reader)?, record: rest(&mut reader) },
            40 => Self::DomainCreate { record: rest(&mut reader) },
            41 => Self::DomainUpdate { record: rest(&mut reader) },
            42 => Self::DomainErase { domain: DomainId(reader.u32()?) },
            50 => Self::EpochAdvance { epoch: Epoch(reader.u32()?) },
            51 => Self::PoolUpdate { record: rest(&mut reader) },
            _ => return Err(WireError::Unknown { what: "journal record", kind: kind.into() }),
        };
        reader.end()?;
        Ok(record)
    }
}

fn segment_raw(addr: SegmentAddr, incarnation: Incarnation) -> SegmentRaw {
    SegmentRaw {
        device: addr.device.0.into(),
        segment: addr.segment.0.into(),
        incarnation: incarnation.0.into(),
        ..zerocopy::FromZeros::new_zeroed()
    }
}

fn rest<'a>(reader: &mut Reader<'a>) -> &'a [u8] {
    std::mem::take(&mut reader.0)
}

fn volume(reader: &mut Reader<'_>) -> Result<VolumeId, WireError> {
    match reader.u32()? {
        0 => Err(range("volume", 0u8)),
        id => Ok(VolumeId(id)),
    }
}

fn container(reader: &mut Reader<'_>) -> Result<ContainerId, WireError> {
    let number = reader.u64()?;
    ContainerId::new(number).ok_or(range("container", number))
}

fn fixed<'a, T: FromBytes + KnownLayout + Immutable + Unaligned>(
    reader: &mut Reader<'a>,
) -> Result<&'a T, WireError> {
    let bytes = reader.take(size_of::<T>())?;
    T::ref_from_bytes(bytes).map_err(|_| range("record's bytes", bytes.len() as u64))
}

fn array<'a, T: FromBytes + KnownLayout + Immutable + Unaligned>(
    reader: &mut Reader<'a>,
) -> Result<&'a [T], WireError> {
    let bytes = rest(reader);
    <[T]>::ref_from_bytes(bytes).map_err(|_| range("record's bytes", bytes.len() as u64))
}

fn decode_segment<'a>(kind: u8, reader: &mut Reader<'a>) -> Result<Record<'a>, WireError> {
    let raw = fixed::<SegmentRaw>(reader)?;
    let addr = SegmentAddr { device: DeviceIx(raw.device.get()), segment: SegmentNo(raw.segment.get()) };
    let incarnation = Incarnation(raw.incarnation.get());
    if (incarnation.0 == 0) != (kind == 5) {
        return Err(range("incarnation", incarnation.0));
    }
    let mut plain = segment_raw(addr, incarnation);
    let record = match kind {
        1 => {
            let class = Class::from_raw(raw.class).ok_or(range("segment class", raw.class))?;
            plain = *raw;
            plain.used_bytes = 0.into();
            let (domain, generation) = (DomainId(raw.domain.get()), Generation(raw.generation.get()));
            let shard = ShardIx(raw.shard.get());
            Record::SegmentOpen { addr, incarnation, class, domain, generation, shard }
        }
        2 => {
            plain.used_bytes = raw.used_bytes;
            Record::SegmentSeal { addr, incarnation, used_bytes: raw.used_bytes.get() }
        }
        3 => Record::SegmentEmpty { addr, incarnation },
        4 => Record::SegmentFree { addr, incarnation },
        _ => Record::SegmentBad { addr },
    };
    if plain.as_bytes() != raw.as_bytes() {
        return Err(range("unused fields of segment record", kind));
    }
    Ok(record)
}

fn decode_container<'a>(kind: u8, reader: &mut Reader<'a>) -> Result<Record<'a>, WireError> {
    match kind {
        13 => {
            let raw = fixed::<AddRaw>(reader)?;
            let number = raw.container.get();
            let container = ContainerId::new(number).ok_or(range("container", number))?;
            let fragment = raw.fragment.entry()?;
            let fingerprints = array::<Fingerprint>(reader)?;
            if fingerprints.len() != usize::from(fragment.chunks) {
                return Err(range("fingerprints", fingerprints.len() as u64));
            }
            Ok(Record::FragmentAdd { container, fragment, fingerprints })
        }
        14 => {
            let raw = reader.u64()?;
            let first = ChunkAddr::from_raw(raw).ok_or(range("fragment", raw))?;
            let fragments = array::<FragmentRaw>(reader)?;
            fragments.iter().try_for_each(|fragment| fragment.entry().map(|_| ()))?;
            Ok(Record::FragmentMove { first, fragments })
        }
        16 => {
            let container = container(reader)?;
            let fingerprints = array::<Fingerprint>(reader)?;
            if fingerprints.len() > crate::ids::SLOTS {
                return Err(range("fingerprints", fingerprints.len() as u64));
            }
            Ok(Record::Fingerprints { container, fingerprints })
        }
        _ => {
            let container = container(reader)?;
            let changes = array::<RefChange>(reader)?;
            if let Some(bad) = changes.iter().find(|change| usize::from(change.slot()) >= crate::ids::SLOTS) {
                return Err(range("slot", bad.slot()));
            }
            Ok(Record::Refs { container, changes })
        }
    }
}

fn decode_map<'a>(kind: u8, reader: &mut Reader<'a>) -> Result<Record<'a>, WireError> {
    let set = |raw: &SetRaw, count: u64| {
        if raw.volume == 0 {
            return Err(range("volume", 0u8));
        }
        let end = raw.lba.get().checked_add(count).filter(|&end| end <= MAX_BLOCKS && count > 0);
        end.ok_or(range("blocks", count))?;
        Ok((VolumeId(raw.volume.get()), Lba(raw.lba.get())))
    };
    if kind == 20 {
        let raw = fixed::<SetRaw>(reader)?;
        let runs = array::<MapRun>(reader)?;
        runs.iter().try_for_each(|run| run.check().map(|_| ()))?;
        let (volume, lba) = set(raw, runs.iter().map(|run| u64::from(run.count())).sum())?;
        return Ok(Record::MapSet { volume, lba, runs });
    }
    let raw = fixed::<FillRaw>(reader)?;
    let entry = MapRun { entry: raw.entry, count: 1.into() }.check()?;
    if entry.chunk().is_some() {
        return Err(range("fill with a chunk", raw.count.get()));
    }
    let (volume, lba) = set(&SetRaw { volume: raw.volume, lba: raw.lba }, raw.count.get())?;
    Ok(Record::MapFill { volume, lba, count: raw.count.get(), entry })
}

/// Reads the records of a group, in order; ends after the first error.
#[derive(Clone, Debug)]
pub struct RecordReader<'a>(&'a [u8]);

impl<'a> RecordReader<'a> {
    /// Over encoded records.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn read(&mut self) -> Result<Record<'a>, WireError> {
        let mut reader = Reader(self.0);
        let (kind, zero, len) = (reader.u8()?, reader.u8()?, reader.u16()?);
        if zero != 0 || usize::from(len) > MAX_BODY_BYTES {
            return Err(range("record's bytes", len));
        }
        let body = reader.take(len.into())?;
        self.0 = reader.0;
        Record::decode(kind, body)
    }
}

impl<'a> Iterator for RecordReader<'a> {
    type Item = Result<Record<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let record = self.read();
        if record.is_err() {
            self.0 = &[];
        }
        Some(record)
    }
}

/// Turns the entries of consecutive blocks into runs.
pub fn runs(entries: impl IntoIterator<Item = MapEntry>, out: &mut Vec<MapRun>) {
    let start = out.len();
    for entry in entries {
        let extended = out.len() > start && out.last_mut().is_some_and(|run| run.extend(&entry));
        if !extended {
            out.push(MapRun { entry: entry.to_raw(), count: 1.into() });
        }
    }
}

#[cfg(test)]
pub(crate) fn layouts() -> Vec<crate::layout::Layout> {
    use crate::layout::layout;
    vec![
        layout!("segment record", SegmentRaw { device shard segment incarnation domain generation used_bytes class }),
        layout!("fragment place", FragmentRaw { device first_slot segment offset unit_bytes chunks codec }),
        layout!("fragment record", AddRaw { container fragment }),
        layout!("map run", MapRun { entry count }),
        layout!("map fill", FillRaw { volume lba count entry }),
        layout!("map set", SetRaw { volume lba }),
        layout!("reference change", RefChange { slot delta }),
        layout!("retarget", Retarget { slot addr }),
    ]
}
