//! Containers: tables of 512 chunk slots, between the volumes' maps and places on devices.
//!
//! [`Container`] (one leaf of [`crate::node::Tree::Containers`]) says how often each slot is referenced and which fragments
//! hold the slots. [`Fingerprints`] (one leaf of [`crate::node::Tree::Fingerprints`]) lists the slots' fingerprints; it is
//! only read to find duplicates, so it is a leaf of its own.
//!
//! A fragment holds neighbouring slots and is known by its first one: "fragment 17" is the fragment that begins at slot
//! 17. Invariants: fragments do not overlap; a slot with references lies in a fragment; slots are given out once, in order, but
//! what was given out may be filled in any order, or never (`used`: behind the last one filled). Moving or splitting a
//! fragment ([`Container::replace`]) keeps all of them.
//!
//! Content of a container's leaf, numbers as LEB128 varints in shortest form:
//!
//! ```text
//! version u8 (1) | flags u8 (1 = closed: no slot is given out any more) | used | fragments
//! per fragment, ascending: slots since the end of the one before | chunks u8 | codec u8 | device |
//!                          segment, zigzag difference to the one before | offset, zigzag difference to its end |
//!                          unit bytes
//! references of slots 0 .. used as runs: length | value
//! ```
//!
//! Content of a fingerprint leaf: version u8 (1), hash u8, count u16, generation u32, count fingerprints of 16 bytes.

use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

use crate::codec::Codec;
use crate::fingerprint::{FINGERPRINT_BYTES, Fingerprint, HashId};
use crate::fragment::{FRAGMENT_HEADER_BYTES, MAX_CHUNKS, MAX_FRAGMENT_BYTES};
use crate::ids::{DeviceIx, Generation, Place, SLOTS, SegmentAddr, SegmentNo};
use crate::sealed::TAG_BYTES;
use crate::wire::{Reader, WireError, put_varint, range, unzigzag, zigzag};

const VERSION: u8 = 1;
const FLAG_CLOSED: u8 = 1;

/// A fragment, as its container knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FragmentEntry {
    /// First slot: the fragment's name.
    pub first_slot: u16,
    /// Slots that it holds, 1 ..= [`MAX_CHUNKS`].
    pub chunks: u8,
    /// How the body is encoded.
    pub codec: Codec,
    /// Where it lies.
    pub place: Place,
    /// Bytes there, from header to tag.
    pub unit_bytes: u32,
}

impl FragmentEntry {
    /// The slots after its last one.
    pub fn end_slot(&self) -> u16 {
        self.first_slot + u16::from(self.chunks)
    }

    /// Whether `slot` is in it.
    pub fn holds(&self, slot: u16) -> bool {
        (self.first_slot..self.end_slot()).contains(&slot)
    }

    pub(crate) fn check(&self) -> Result<(), WireError> {
        let chunks = usize::from(self.chunks);
        if !(1..=MAX_CHUNKS).contains(&chunks) || usize::from(self.first_slot) + chunks > SLOTS {
            return Err(range("fragment's chunks", self.chunks));
        }
        let bytes = self.unit_bytes as usize;
        if !(FRAGMENT_HEADER_BYTES + 1 + TAG_BYTES..=MAX_FRAGMENT_BYTES).contains(&bytes) {
            return Err(range("fragment's bytes", self.unit_bytes));
        }
        if self.place.offset.checked_add(self.unit_bytes).is_none() {
            return Err(range("fragment's offset", self.place.offset));
        }
        Ok(())
    }
}

/// A [`FragmentEntry`] in 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq, IntoBytes, zerocopy::Immutable)]
#[repr(C)]
struct Packed {
    segment: u32,
    offset: u32,
    /// Bits 0..9 first slot, 9..15 chunks - 1, 15..19 codec, 19..38 unit bytes, 38..54 device.
    rest: u64,
}

const _: () = assert!(MAX_FRAGMENT_BYTES < 1 << 19 && SLOTS <= 1 << 9 && MAX_CHUNKS <= 1 << 6);

impl Packed {
    fn new(entry: &FragmentEntry) -> Self {
        let rest = u64::from(entry.first_slot)
            | u64::from(entry.chunks - 1) << 9
            | (entry.codec as u64) << 15
            | u64::from(entry.unit_bytes) << 19
            | u64::from(entry.place.segment.device.0) << 38;
        Self { segment: entry.place.segment.segment.0, offset: entry.place.offset, rest }
    }

    fn first_slot(&self) -> u16 {
        (self.rest & 0x1ff) as u16
    }

    fn entry(&self) -> FragmentEntry {
        let segment =
            SegmentAddr { device: DeviceIx((self.rest >> 38) as u16), segment: SegmentNo(self.segment) };
        FragmentEntry {
            first_slot: self.first_slot(),
            chunks: (self.rest >> 9 & 0x3f) as u8 + 1,
            codec: Codec::from_raw((self.rest >> 15 & 0xf) as u8).unwrap_or(Codec::Raw),
            place: Place { segment, offset: self.offset },
            unit_bytes: (self.rest >> 19 & 0x7_ffff) as u32,
        }
    }
}

/// References per slot: one byte each until one outgrows it.
#[derive(Clone, PartialEq, Eq)]
enum Refs {
    Narrow(Box<[u8; SLOTS]>),
    Wide(Box<[u32; SLOTS]>),
}

impl Refs {
    fn get(&self, slot: usize) -> u32 {
        match self {
            Self::Narrow(refs) => refs[slot].into(),
            Self::Wide(refs) => refs[slot],
        }
    }

    fn set(&mut self, slot: usize, value: u32) {
        if let (Self::Narrow(narrow), Err(_)) = (&*self, u8::try_from(value)) {
            *self = Self::Wide(Box::new(std::array::from_fn(|slot| narrow[slot].into())));
        }
        match self {
            Self::Narrow(refs) => refs[slot] = value as u8,
            Self::Wide(refs) => refs[slot] = value,
        }
    }
}

/// Most bytes of a fragment in a container's leaf: gap, chunks, codec, device, segment, offset, unit.
const FRAGMENT_BOUND: usize = 2 + 1 + 1 + 3 + 5 + 5 + 3;

/// Appends runs of equal values: length | value.
fn put_runs<T: Copy + PartialEq + Into<u64>>(out: &mut Vec<u8>, values: &[T]) {
    for run in values.chunk_by(|a, b| a == b) {
        put_varint(out, run.len() as u64);
        put_varint(out, run[0].into());
    }
}

/// Why a container refuses a change. On replay it means that journal and container do not belong together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum ContainerError {
    /// A slot beyond the container.
    #[error("slot {slot} is not in a container")]
    NoSuchSlot {
        /// Slot.
        slot: u16,
    },
    /// Other fragments have some of the fragment's slots, or the container is closed.
    #[error("fragment at slot {first_slot} cannot be added: its slots are taken")]
    Taken {
        /// Its first slot.
        first_slot: u16,
    },
    /// No fragment begins at this slot.
    #[error("no fragment begins at slot {first_slot}")]
    NoFragment {
        /// Slot.
        first_slot: u16,
    },
    /// The replacement reaches outside of the old fragment, overlaps itself, or leaves out a slot in use.
    #[error("the fragments that replace the one at slot {first_slot} do not fit: slot {slot}")]
    Misfit {
        /// The old one's first slot.
        first_slot: u16,
        /// Where it does not fit.
        slot: u16,
    },
    /// More references than 2^32 - 1: store another copy of the chunk.
    #[error("slot {slot} cannot take more references")]
    TooManyReferences {
        /// Slot.
        slot: u16,
    },
    /// More references dropped than there are, or one added to a slot without a fragment.
    #[error("slot {slot} has {refs} references, cannot change them by {delta}")]
    BadReference {
        /// Slot.
        slot: u16,
        /// References that it has.
        refs: u32,
        /// Change asked for.
        delta: i32,
    },
    /// Fields out of range.
    #[error(transparent)]
    Entry(#[from] WireError),
}

/// A container's slots, references and fragments.
#[derive(Clone, PartialEq, Eq)]
pub struct Container {
    refs: Refs,
    /// Ascending by first slot.
    fragments: Vec<Packed>,
    used: u16,
    live: u16,
    closed: bool,
}

impl Default for Container {
    fn default() -> Self {
        Self {
            refs: Refs::Narrow(Box::new([0; SLOTS])),
            fragments: Vec::new(),
            used: 0,
            live: 0,
            closed: false,
        }
    }
}

impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Container")
            .field("used", &self.used)
            .field("live", &self.live)
            .field("closed", &self.closed)
            .field("fragments", &self.fragments.len())
            .finish()
    }
}

impl Container {
    /// The slots below this have been given out; the last of them is, or was, filled.
    pub fn used(&self) -> u16 {
        self.used
    }

    /// Slots with references.
    pub fn live(&self) -> u16 {
        self.live
    }

    /// Whether no slot is given out any more.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Gives out no more slots.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// References of `slot` (0 beyond the container).
    pub fn refs(&self, slot: u16) -> u32 {
        if usize::from(slot) < SLOTS { self.refs.get(slot.into()) } else { 0 }
    }

    /// Bytes of memory, about.
    pub fn memory_bytes(&self) -> usize {
        let refs = match self.refs {
            Refs::Narrow(_) => SLOTS,
            Refs::Wide(_) => 4 * SLOTS,
        };
        size_of::<Self>() + refs + self.fragments.capacity() * size_of::<Packed>()
    }

    /// The fragments, ascending by slot.
    pub fn fragments(&self) -> impl ExactSizeIterator<Item = FragmentEntry> + '_ {
        self.fragments.iter().map(Packed::entry)
    }

    /// Where among the fragments the one of `slot` is, if those that are gone were spread evenly.
    fn guess(&self, slot: u16) -> usize {
        usize::from(slot) * self.fragments.len() / usize::from(self.used).max(1)
    }

    /// Fragments that begin at `slot` or before it. The search begins where the last of them should be and widens: it stays
    /// within few lines of memory.
    fn begun(&self, slot: u16) -> usize {
        let all = &self.fragments;
        let begins = |at: usize| all[at].first_slot() <= slot;
        let guess = self.guess(slot).min(all.len());
        let (mut low, mut high, mut step) = (0, all.len(), 4);
        if guess < all.len() && begins(guess) {
            if all[guess].first_slot() == slot {
                return guess + 1;
            }
            low = guess + 1;
            while low + step < all.len() {
                if !begins(low + step) {
                    high = low + step;
                    break;
                }
                low += step + 1;
                step *= 2;
            }
        } else {
            high = guess;
            while high > step {
                if begins(high - step) {
                    low = high - step + 1;
                    break;
                }
                high -= step;
                step *= 2;
            }
        }
        low + all[low..high].partition_point(|packed| packed.first_slot() <= slot)
    }

    /// The fragment that holds `slot`.
    pub fn fragment_of(&self, slot: u16) -> Option<FragmentEntry> {
        let entry = self.fragments[..self.begun(slot)].last()?.entry();
        entry.holds(slot).then_some(entry)
    }

    /// Shows about what a change of `slot` will touch, so that it can be asked for.
    pub fn touched_by(&self, slot: u16, ask: impl Fn(&[u8])) {
        let slot = usize::from(slot);
        match &self.refs {
            Refs::Narrow(refs) => ask(refs.get(slot..=slot).unwrap_or_default()),
            Refs::Wide(refs) => ask(refs.get(slot..=slot).unwrap_or_default().as_bytes()),
        }
        let guess = self.guess(slot as u16);
        let near = guess.saturating_sub(4).min(self.fragments.len())..(guess + 5).min(self.fragments.len());
        ask(self.fragments[near].as_bytes());
    }

    /// Slots with references in the fragment at `first_slot`.
    pub fn live_in(&self, entry: &FragmentEntry) -> usize {
        (entry.first_slot..entry.end_slot()).filter(|&slot| self.refs(slot) > 0).count()
    }

    fn find(&self, first_slot: u16) -> Result<usize, ContainerError> {
        let last = self.begun(first_slot).checked_sub(1);
        last.filter(|&at| self.fragments[at].first_slot() == first_slot)
            .ok_or(ContainerError::NoFragment { first_slot })
    }

    /// Adds a fragment at free slots: the next ones, further on, or late, where slots have been passed over. Its slots begin
    /// without references.
    pub fn add(&mut self, entry: &FragmentEntry) -> Result<(), ContainerError> {
        entry.check()?;
        let at = self.begun(entry.first_slot);
        let before = at.checked_sub(1).map_or(0, |before| self.fragments[before].entry().end_slot());
        let after = self.fragments.get(at).map_or(SLOTS as u16, Packed::first_slot);
        if self.closed || entry.first_slot < before || after < entry.end_slot() {
            return Err(ContainerError::Taken { first_slot: entry.first_slot });
        }
        self.fragments.insert(at, Packed::new(entry));
        self.used = self.used.max(entry.end_slot());
        Ok(())
    }

    /// Replaces the fragment at `first_slot` by `new` (ascending; none to drop it): they must lie within its slots and hold
    /// every one that has references. Gives back the old one.
    pub fn replace(
        &mut self,
        first_slot: u16,
        new: &[FragmentEntry],
    ) -> Result<FragmentEntry, ContainerError> {
        let at = self.find(first_slot)?;
        let old = self.fragments[at].entry();
        let mut next = old.first_slot;
        for entry in new {
            entry.check()?;
            if entry.first_slot < next || entry.end_slot() > old.end_slot() {
                return Err(ContainerError::Misfit { first_slot, slot: entry.first_slot });
            }
            next = entry.end_slot();
        }
        let lost = (old.first_slot..old.end_slot())
            .find(|&slot| self.refs(slot) > 0 && !new.iter().any(|entry| entry.holds(slot)));
        if let Some(slot) = lost {
            return Err(ContainerError::Misfit { first_slot, slot });
        }
        self.fragments.splice(at..=at, new.iter().map(Packed::new));
        Ok(old)
    }

    /// Changes the references of `slot` by `delta`; gives the new count.
    pub fn change_refs(&mut self, slot: u16, delta: i32) -> Result<u32, ContainerError> {
        if usize::from(slot) >= SLOTS {
            return Err(ContainerError::NoSuchSlot { slot });
        }
        let refs = self.refs.get(slot.into());
        if delta > 0 && self.fragment_of(slot).is_none() {
            return Err(ContainerError::BadReference { slot, refs, delta });
        }
        let new = i64::from(refs) + i64::from(delta);
        if new < 0 {
            return Err(ContainerError::BadReference { slot, refs, delta });
        }
        let new = u32::try_from(new).map_err(|_| ContainerError::TooManyReferences { slot })?;
        self.refs.set(slot.into(), new);
        match (refs, new) {
            (0, 1..) => self.live += 1,
            (1.., 0) => self.live -= 1,
            _ => {}
        }
        Ok(new)
    }

    /// Takes a reference away from `slot`: how many are left. When that was the last one also the fragment that holds the slot,
    /// and how many of its slots live; one in which none does is gone.
    pub fn drop_ref(&mut self, slot: u16) -> Result<(u32, Option<(FragmentEntry, usize)>), ContainerError> {
        let left = self.change_refs(slot, -1)?;
        if left > 0 {
            return Ok((left, None));
        }
        let Some(at) = self.begun(slot).checked_sub(1) else { return Ok((0, None)) };
        let entry = self.fragments[at].entry();
        if !entry.holds(slot) {
            return Ok((0, None));
        }
        let live = self.live_in(&entry);
        if live == 0 {
            self.fragments.remove(at);
        }
        Ok((0, Some((entry, live))))
    }

    /// Adds a reference to each of `count` slots from `first` on. `woken` gets each fragment in which slots came alive, with how
    /// many of them lived before and live now.
    pub fn take_refs(
        &mut self,
        first: u16,
        count: u16,
        mut woken: impl FnMut(&FragmentEntry, usize, usize),
    ) -> Result<(), ContainerError> {
        let end = first.saturating_add(count);
        let mut slot = first;
        while slot < end {
            if usize::from(slot) >= SLOTS {
                return Err(ContainerError::NoSuchSlot { slot });
            }
            let fragment = self.fragment_of(slot);
            let fragment =
                fragment.ok_or(ContainerError::BadReference { slot, refs: self.refs(slot), delta: 1 })?;
            let before = self.live_in(&fragment);
            let mut now = before;
            for slot in slot..end.min(fragment.end_slot()) {
                let refs = self.refs.get(slot.into());
                let more = refs.checked_add(1).ok_or(ContainerError::TooManyReferences { slot })?;
                self.refs.set(slot.into(), more);
                now += usize::from(refs == 0);
            }
            self.live += (now - before) as u16;
            if now > before {
                woken(&fragment, before, now);
            }
            slot = fragment.end_slot();
        }
        Ok(())
    }

    /// The leaf's content.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 + 9 * self.fragments.len());
        out.push(VERSION);
        out.push(if self.closed { FLAG_CLOSED } else { 0 });
        put_varint(&mut out, self.used.into());
        put_varint(&mut out, self.fragments.len() as u64);
        let (mut slot, mut segment, mut offset) = (0, 0, 0);
        for entry in self.fragments() {
            put_varint(&mut out, u64::from(entry.first_slot - slot));
            out.push(entry.chunks);
            out.push(entry.codec as u8);
            put_varint(&mut out, entry.place.segment.device.0.into());
            put_varint(&mut out, zigzag(i64::from(entry.place.segment.segment.0) - segment));
            put_varint(&mut out, zigzag(i64::from(entry.place.offset) - offset));
            put_varint(&mut out, entry.unit_bytes.into());
            slot = entry.end_slot();
            segment = entry.place.segment.segment.0.into();
            offset = i64::from(entry.place.offset) + i64::from(entry.unit_bytes);
        }
        let used = usize::from(self.used);
        match &self.refs {
            Refs::Narrow(refs) => put_runs(&mut out, &refs[..used]),
            Refs::Wide(refs) => put_runs(&mut out, &refs[..used]),
        }
        out
    }

    /// Bytes that [`Container::encode`] makes, at most, now and after fragments have lost chunks, moved or been split.
    pub fn encoded_bound(&self) -> usize {
        // As many fragments as now, or one for each living slot.
        let fragments = self.fragments.len().max(self.live.into());
        let value = match self.refs {
            Refs::Narrow(_) => 2,
            Refs::Wide(_) => 5,
        };
        let runs = (2 * usize::from(self.live) + 1).min(self.used.into());
        8 + FRAGMENT_BOUND * fragments + (2 + value) * runs
    }

    /// Parses a leaf's content. Accepts exactly what [`Container::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        let version = reader.u8()?;
        if version != VERSION {
            return Err(WireError::Unknown { what: "container version", kind: version.into() });
        }
        let flags = reader.u8()?;
        if flags & !FLAG_CLOSED != 0 {
            return Err(range("container flags", flags));
        }
        let used = reader.varint()?;
        if used > SLOTS as u64 {
            return Err(range("used slots", used));
        }
        let count = reader.varint()?;
        if count > used {
            return Err(range("fragments", count));
        }
        let mut container = Self { used: used as u16, closed: flags & FLAG_CLOSED != 0, ..Self::default() };
        container.decode_fragments(&mut reader, count as usize)?;
        container.decode_refs(&mut reader)?;
        reader.end()?;
        Ok(container)
    }

    fn decode_fragments(&mut self, reader: &mut Reader<'_>, count: usize) -> Result<(), WireError> {
        self.fragments.reserve_exact(count);
        let (mut slot, mut segment, mut offset) = (0u64, 0i64, 0i64);
        for _ in 0..count {
            let gap = reader.varint()?;
            let first_slot = slot.checked_add(gap).filter(|&slot| slot < self.used.into());
            let first_slot = first_slot.ok_or(range("fragment's slot", gap))? as u16;
            let chunks = reader.u8()?;
            let codec = reader.u8()?;
            let codec = Codec::from_raw(codec).ok_or(range("fragment's codec", codec))?;
            let device = reader.varint()?;
            let device = u16::try_from(device).map_err(|_| range("fragment's device", device))?;
            let next = |field, base: i64, reader: &mut Reader<'_>| {
                let delta = reader.varint()?;
                let value = base.checked_add(unzigzag(delta)).and_then(|value| u32::try_from(value).ok());
                value.ok_or(range(field, delta))
            };
            let number = next("fragment's segment", segment, reader)?;
            let start = next("fragment's offset", offset, reader)?;
            let unit_bytes = reader.varint()?;
            let unit_bytes = u32::try_from(unit_bytes).map_err(|_| range("fragment's bytes", unit_bytes))?;
            let addr = SegmentAddr { device: DeviceIx(device), segment: SegmentNo(number) };
            let place = Place { segment: addr, offset: start };
            let entry = FragmentEntry { first_slot, chunks, codec, place, unit_bytes };
            entry.check()?;
            if entry.end_slot() > self.used {
                return Err(range("fragment's chunks", chunks));
            }
            self.fragments.push(Packed::new(&entry));
            slot = entry.end_slot().into();
            segment = number.into();
            offset = i64::from(start) + i64::from(unit_bytes);
        }
        Ok(())
    }

    fn decode_refs(&mut self, reader: &mut Reader<'_>) -> Result<(), WireError> {
        let (mut slot, mut before) = (0u16, None);
        while slot < self.used {
            let run = reader.varint()?;
            let value = reader.varint()?;
            let refs = u32::try_from(value).map_err(|_| range("references", value))?;
            if run == 0 || run > u64::from(self.used - slot) || before == Some(refs) {
                return Err(range("run of references", run));
            }
            for _ in 0..run {
                if refs > 0 && self.fragment_of(slot).is_none() {
                    return Err(range("references without a fragment, slot", slot));
                }
                if refs > 0 {
                    self.live += 1;
                }
                self.refs.set(slot.into(), refs);
                slot += 1;
            }
            before = Some(refs);
        }
        Ok(())
    }
}

/// The fingerprints of a container's slots, all of one generation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fingerprints {
    /// Generation of the secret that made them.
    pub generation: Generation,
    /// What made them.
    pub hash: HashId,
    /// By slot, at most [`SLOTS`]; [`Fingerprint::NONE`] where a slot has none.
    pub slots: Vec<Fingerprint>,
}

const FINGERPRINTS_HEAD: usize = 8;

impl Fingerprints {
    /// The leaf's content. Fingerprints beyond [`SLOTS`] are left out.
    pub fn encode(&self) -> Vec<u8> {
        let slots = &self.slots[..self.slots.len().min(SLOTS)];
        let mut out = Vec::with_capacity(FINGERPRINTS_HEAD + slots.len() * FINGERPRINT_BYTES);
        out.push(VERSION);
        out.push(self.hash as u8);
        out.extend_from_slice(&(slots.len() as u16).to_le_bytes());
        out.extend_from_slice(&self.generation.0.to_le_bytes());
        out.extend_from_slice(slots.as_bytes());
        out
    }

    /// Parses a leaf's content.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        let version = reader.u8()?;
        if version != VERSION {
            return Err(WireError::Unknown { what: "fingerprint leaf version", kind: version.into() });
        }
        let hash = reader.u8()?;
        let hash = HashId::from_raw(hash).ok_or(range("hash", hash))?;
        let count = reader.u16()?;
        if usize::from(count) > SLOTS {
            return Err(range("fingerprints", count));
        }
        let generation = Generation(reader.u32()?);
        let slots = reader.take(usize::from(count) * FINGERPRINT_BYTES)?;
        reader.end()?;
        let slots =
            <[Fingerprint]>::ref_from_bytes(slots).map_err(|_| range("fingerprints", count))?.to_vec();
        Ok(Self { generation, hash, slots })
    }
}
