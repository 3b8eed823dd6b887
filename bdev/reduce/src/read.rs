//! The read path: from blocks of a volume to plaintext.
//!
//! Owns the small cache of fragments that were decoded for a part of them, as far as that took. First everything is resolved (map, containers,
//! segment handles) in one step, which pins the segments; then the device is read, neighbouring fragments together; then
//! fragments are verified, decrypted and decoded straight to where the data is wanted: all of them, or, where only a part
//! is wanted, their front up to it.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::trace::{self, Stage};
use cryptfold_bdev::{BlockRange, BlockRanges, Status};
use cryptfold_reactor as reactor;
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reduce_format::codec::{Codec, Decompressor};
use cryptfold_reduce_format::container::FragmentEntry;
use cryptfold_reduce_format::fragment::{self, CHUNK_BYTES};
use cryptfold_reduce_format::ids::{ChunkAddr, DomainId, Incarnation, VolumeId};
use cryptfold_reduce_format::map::{MAP_ENTRIES, MapEntry, MapLeaf, Target};
use smallvec::SmallVec;

use crate::base::Base;
use crate::core::Core;
use crate::lend::from_filler;
use crate::pool::Pool;
use crate::segments::Segment;
use crate::shard::{Need, Needs, Shard, Volume, leaf_of};
use crate::tree::{Found, Leaf, Tree};

/// Blocks that are read in one step: 1 MiB.
const STEP: u64 = 256;
/// Decoded fragments kept.
const CACHED: usize = 32;
/// Of them, those that one stream may fill at once.
const MOST_BROUGHT: usize = CACHED / 3;
/// Device reads of neighbouring fragments are joined across gaps up to this, up to the second.
const JOIN_GAP_BYTES: u32 = 8 << 10;
const JOIN_MOST_BYTES: u32 = 512 << 10;

/// A run of blocks of a read that come from one place.
struct Extent {
    /// First block, from the start of the read.
    at: usize,
    count: usize,
    source: Source,
    /// Data, patterns or zeros that were stored as the host had sent them.
    as_sent: bool,
}

enum Source {
    Unmapped,
    Zero,
    Pattern(u64),
    /// Slots `slot ..` of unit `unit`.
    Unit {
        unit: usize,
        slot: u16,
    },
}

/// A fragment that a read needs.
struct Unit {
    domain: DomainId,
    segment: Arc<Segment>,
    entry: FragmentEntry,
    first: ChunkAddr,
    /// Behind the last slot that is wanted.
    end: u16,
    /// Its sealed bytes, while the home has them and the device has not.
    unwritten: Option<Buf>,
}

impl Unit {
    /// Plain bytes from its start to the end of what is wanted.
    fn wanted_bytes(&self) -> usize {
        usize::from(self.end - self.entry.first_slot) * CHUNK_BYTES
    }

    /// Whether the device may not have it yet, but another core than the home.
    fn is_elsewhere(&self) -> bool {
        self.segment.filler.is_some()
            && !self.segment.is_written(self.entry.place.offset + self.entry.unit_bytes)
    }

    /// Its sealed bytes, while another core than the home has them and the device has not.
    async fn ask_filler(&self) -> Result<Option<Buf>, Status> {
        from_filler(&self.segment, self.entry.place.offset, self.entry.unit_bytes).await
    }
}

type Extents = SmallVec<[Extent; 2]>;
type Units = SmallVec<[Unit; 1]>;

struct CacheEntry {
    segment: u32,
    incarnation: Incarnation,
    offset: u32,
    /// The front of the fragment, or all of it.
    plain: Buf,
}

impl CacheEntry {
    fn is(&self, segment: &Segment, offset: u32) -> bool {
        self.offset == offset
            && self.segment == segment.number()
            && self.incarnation == segment.key.incarnation()
    }
}

/// Fragments decoded lately, each as far as it was wanted.
#[derive(Default)]
pub(crate) struct FragmentCache {
    entries: VecDeque<CacheEntry>,
}

impl FragmentCache {
    /// What is there of a fragment.
    fn get(&self, segment: &Segment, offset: u32) -> Option<Buf> {
        self.entries.iter().find(|entry| entry.is(segment, offset)).map(|entry| entry.plain.clone())
    }

    fn put(&mut self, segment: &Segment, offset: u32, plain: Buf) {
        let known = self.entries.iter().position(|entry| entry.is(segment, offset));
        if let Some(at) = known {
            self.entries.remove(at);
        } else if self.entries.len() >= CACHED {
            self.entries.pop_front();
        }
        let (segment, incarnation) = (segment.number(), segment.key.incarnation());
        self.entries.push_back(CacheEntry { segment, incarnation, offset, plain });
    }
}

fn need<L: Leaf>(tree: &Tree<L>, owner: u32, index: u64, needs: &mut Needs) {
    if let Some(missing) = tree.locate(index)
        && needs.len() < 64
    {
        needs.push(Need::Node { tree: L::TREE, owner, missing });
    }
}

/// What some blocks are, and what has to be fetched for them. Pins the segments that it names.
pub(crate) struct Resolved {
    extents: Extents,
    units: Units,
}

/// A fragment that does not verify.
pub(crate) struct Damage {
    domain: DomainId,
    entry: FragmentEntry,
    first: ChunkAddr,
    error: String,
}

/// Why a read has no data.
pub(crate) enum ReadError {
    Status(Status),
    Damage(Box<Damage>),
}

impl From<Status> for ReadError {
    fn from(status: Status) -> ReadError {
        ReadError::Status(status)
    }
}

/// Blocks of a read that are resolved in one step, from its first: (first block, blocks).
pub(crate) fn steps(count: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..count).step_by(STEP as usize).map(move |done| (done, STEP.min(count - done) as usize))
}

/// What is to be known of a read's blocks besides their bytes: runs of them, in order.
#[derive(Default)]
pub(crate) struct Runs {
    /// Not mapped.
    pub unmapped: BlockRanges,
    /// Mapped, and stored as the host had sent them.
    pub as_sent: BlockRanges,
}

impl Resolved {
    /// Adds the runs, `base` blocks into the read.
    pub fn add_runs(&self, base: u64, runs: &mut Runs) {
        for extent in &self.extents {
            let kind = match extent.source {
                Source::Unmapped => &mut runs.unmapped,
                _ if extent.as_sent => &mut runs.as_sent,
                _ => continue,
            };
            let (start, blocks) = (base as u32 + extent.at as u32, extent.count as u32);
            match kind.last_mut().filter(|last| last.start + last.blocks == start) {
                Some(last) => last.blocks += blocks,
                None => kind.push(BlockRange { start, blocks }),
            }
        }
    }

    /// Whether all blocks read as zeros.
    fn is_zero(&self) -> bool {
        self.units.is_empty() && !self.extents.iter().any(|e| matches!(e.source, Source::Pattern(_)))
    }
}

impl Pool {
    /// Reads 4 KiB blocks of a volume, on the pool's home: their bytes, and of which runs of them there is more to say.
    pub(crate) async fn read_blocks(
        &self,
        volume: VolumeId,
        lba: u64,
        count: u64,
    ) -> Result<(SgList, Runs), Status> {
        let mut data = SgList::new();
        let mut runs = Runs::default();
        for (done, blocks) in steps(count) {
            let resolved = self.resolve_blocks(volume, lba + done, blocks).await?;
            resolved.add_runs(done, &mut runs);
            let part = self.core.read(&resolved, blocks).await;
            data.append(part.map_err(|error| self.read_failed(error))?);
        }
        Ok((data, runs))
    }

    /// Finds out what blocks are, loading what that takes.
    pub(crate) async fn resolve_blocks(
        &self,
        volume: VolumeId,
        lba: u64,
        count: usize,
    ) -> Result<Resolved, Status> {
        let mut pins = self.pins();
        loop {
            let mut needs = Needs::new();
            let (extents, mut units) = resolve(&self.shard.borrow(), volume, lba, count, &mut needs)?;
            if !needs.is_empty() {
                self.load_all(needs, &mut pins).await?;
                continue;
            }
            for unit in &mut units {
                let (offset, bytes) = (unit.entry.place.offset, unit.entry.unit_bytes);
                if unit.segment.filler.is_none() && !unit.segment.is_written(offset + bytes) {
                    let logs = self.logs.borrow();
                    let found = logs.iter().find_map(|log| log.unwritten(&unit.segment, offset, bytes));
                    unit.unwritten = Some(found.ok_or(Status::INTERNAL_ERROR)?);
                }
            }
            return Ok(Resolved { extents, units });
        }
    }

    /// The status of a read that failed; damage is remembered.
    pub(crate) fn read_failed(&self, error: ReadError) -> Status {
        match error {
            ReadError::Status(status) => status,
            ReadError::Damage(d) => self.fragment_damaged(d.domain, &d.entry, d.first, &d.error),
        }
    }

    /// Remembers and reports (once) that a fragment is damaged.
    pub(crate) fn fragment_damaged(
        &self,
        domain: DomainId,
        entry: &FragmentEntry,
        first: ChunkAddr,
        error: &str,
    ) -> Status {
        if self.shard.borrow_mut().damaged.insert((domain, first)) {
            self.damaged.set(self.damaged.get() + 1);
            tracing::error!(
                pool = %self.name(), %domain, place = ?entry.place, chunk = ?first, chunks = entry.chunks, error,
                "a fragment is damaged: its blocks can not be read"
            );
        }
        Status::UNRECOVERED_READ
    }
}

impl Core {
    /// The bytes of `count` blocks.
    pub(crate) async fn read(&self, resolved: &Resolved, count: usize) -> Result<SgList, ReadError> {
        if resolved.is_zero() {
            return Ok(SgList::zeroes(count * CHUNK_BYTES));
        }
        let fetched = self.fetch(&resolved.units).await?;
        let mut out = Buf::alloc(count * CHUNK_BYTES);
        let Some(bytes) = out.get_mut() else { return Err(Status::INTERNAL_ERROR.into()) };
        self.materialise(bytes, &resolved.extents, &resolved.units, &fetched)?;
        Ok(out.into())
    }

    /// Decodes what is not in the cache yet, for reads to come: whole fragments. Damage is found again, and told, by who wants them.
    pub(crate) async fn bring(&self, resolved: &mut Resolved) -> Result<(), Status> {
        if resolved.units.len() > MOST_BROUGHT {
            // What lies scattered would push out what others have brought.
            return Ok(());
        }
        for unit in &mut resolved.units {
            unit.end = unit.entry.end_slot();
        }
        let fetched = self.fetch(&resolved.units).await?;
        for (unit, fetched) in resolved.units.iter().zip(fetched) {
            let Fetched::Sealed(sealed) = fetched else { continue };
            let mut plain = Buf::alloc(unit.wanted_bytes());
            let out = plain.get_mut().ok_or(Status::INTERNAL_ERROR)?;
            if self.decode(unit, &sealed, out, out.len()).is_ok() {
                self.fragments.borrow_mut().put(&unit.segment, unit.entry.place.offset, plain);
            }
            // Others first: each takes as long as several small reads.
            reactor::yield_now().await;
        }
        Ok(())
    }

    /// Brings the units' bytes, sealed or (from the cache) plain.
    async fn fetch(&self, units: &[Unit]) -> Result<SmallVec<[Fetched; 1]>, Status> {
        let mut fetched: SmallVec<[Fetched; 1]> = SmallVec::new();
        let mut from_device: SmallVec<[usize; 8]> = SmallVec::new();
        for (at, unit) in units.iter().enumerate() {
            let offset = unit.entry.place.offset;
            let known = self.fragments.borrow().get(&unit.segment, offset);
            if let Some(plain) = known.filter(|plain| plain.len() >= unit.wanted_bytes()) {
                fetched.push(Fetched::Plain(plain));
            } else if let Some(sealed) = &unit.unwritten {
                fetched.push(Fetched::Sealed(sealed.clone()));
            } else if unit.is_elsewhere()
                && let Some(sealed) = Box::pin(unit.ask_filler()).await?
            {
                fetched.push(Fetched::Sealed(sealed));
            } else {
                fetched.push(Fetched::Nothing);
                from_device.push(at);
            }
        }
        from_device.sort_unstable_by_key(|&at| (units[at].segment.start_bytes, units[at].entry.place.offset));
        // All reads are started before the first is waited for.
        let mut reads = Vec::new();
        let mut rest = from_device.as_slice();
        while let Some(&first) = rest.first() {
            let start = units[first].entry.place.offset;
            let mut end = start;
            let mut n = 0;
            for &at in rest {
                let entry = &units[at].entry;
                let joins = Arc::ptr_eq(&units[at].segment, &units[first].segment)
                    && entry.place.offset <= end + JOIN_GAP_BYTES
                    && entry.place.offset + entry.unit_bytes - start <= JOIN_MOST_BYTES;
                if n > 0 && !joins {
                    break;
                }
                end = end.max(entry.place.offset + entry.unit_bytes);
                n += 1;
            }
            let (group, others) = rest.split_at(n);
            rest = others;
            let at = units[first].segment.start_bytes + u64::from(start);
            reads.push((group, start, self.base.start_read(at, (end - start) as usize)));
        }
        for (group, start, read) in reads {
            let bytes = Base::finish_read(read).await?;
            for &at in group {
                let entry = &units[at].entry;
                let from = (entry.place.offset - start) as usize;
                fetched[at] = Fetched::Sealed(bytes.slice(from..from + entry.unit_bytes as usize));
            }
        }
        Ok(fetched)
    }

    fn materialise(
        &self,
        out: &mut [u8],
        extents: &[Extent],
        units: &[Unit],
        fetched: &[Fetched],
    ) -> Result<(), ReadError> {
        let mut plain: SmallVec<[Option<Buf>; 8]> = SmallVec::new();
        plain.resize(units.len(), None);
        for extent in extents {
            let bytes = &mut out[extent.at * CHUNK_BYTES..(extent.at + extent.count) * CHUNK_BYTES];
            match extent.source {
                Source::Unmapped | Source::Zero => bytes.fill(0),
                Source::Pattern(word) => {
                    let (words, _) = bytes.as_chunks_mut::<8>();
                    words.fill(word.to_le_bytes());
                }
                Source::Unit { unit, slot } => {
                    let Unit { segment, entry, .. } = &units[unit];
                    let whole = slot == entry.first_slot && extent.count == usize::from(entry.chunks);
                    match &fetched[unit] {
                        Fetched::Sealed(sealed) if whole => {
                            self.decode(&units[unit], sealed, bytes, bytes.len())?;
                        }
                        Fetched::Sealed(sealed) => {
                            if plain[unit].is_none() {
                                let mut buf = Buf::alloc(usize::from(entry.chunks) * CHUNK_BYTES);
                                let target = buf.get_mut().ok_or(Status::INTERNAL_ERROR)?;
                                // Who comes back for more of it, is likely to want all.
                                let again =
                                    self.fragments.borrow().get(segment, entry.place.offset).is_some();
                                let wanted = if again { target.len() } else { units[unit].wanted_bytes() };
                                let found = self.decode(&units[unit], sealed, target, wanted)?;
                                buf.truncate(found);
                                self.fragments.borrow_mut().put(segment, entry.place.offset, buf.clone());
                                plain[unit] = Some(buf);
                            }
                            if let Some(buf) = &plain[unit] {
                                copy_slots(buf, entry, slot, bytes);
                            }
                        }
                        Fetched::Plain(buf) => copy_slots(buf, entry, slot, bytes),
                        Fetched::Nothing => return Err(Status::INTERNAL_ERROR.into()),
                    }
                }
            }
        }
        Ok(())
    }

    /// Verifies, decrypts and decodes a fragment to `out` (all its chunks): at least the first `wanted` bytes of them; how many.
    fn decode(&self, unit: &Unit, sealed: &[u8], out: &mut [u8], wanted: usize) -> Result<usize, ReadError> {
        let Unit { domain, segment, entry, first, .. } = unit;
        let mut decoder = self.decoder.borrow_mut();
        decoder.decode_front(segment, entry, *first, sealed, out, wanted).map_err(|error| {
            ReadError::Damage(Box::new(Damage { domain: *domain, entry: *entry, first: *first, error }))
        })
    }
}

/// Verifies, decrypts and decodes fragments; the errors are for people.
#[derive(Default)]
pub(crate) struct Decoder {
    pub codec: Decompressor,
    scratch: Vec<u8>,
}

impl Decoder {
    /// Of all chunks of a fragment, to `out`.
    pub fn decode(
        &mut self,
        segment: &Segment,
        entry: &FragmentEntry,
        first: ChunkAddr,
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<(), String> {
        let wanted = out.len();
        self.decode_front(segment, entry, first, sealed, out, wanted).map(|_| ())
    }

    /// Of at least the first `wanted` bytes of a fragment, to `out`, which has room for all; how many are there. All of the
    /// fragment is verified.
    pub fn decode_front(
        &mut self,
        segment: &Segment,
        entry: &FragmentEntry,
        first: ChunkAddr,
        sealed: &[u8],
        out: &mut [u8],
        wanted: usize,
    ) -> Result<usize, String> {
        let offset = entry.place.offset;
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let (header, found);
        let mut begun = trace::begin();
        if entry.codec == Codec::Raw {
            header = fragment::open_fragment(&segment.key, offset, sealed, out).map_err(|e| text(&e))?;
            begun.end(Stage::Open);
            found = out.len();
        } else {
            self.scratch.resize(fragment::MAX_FRAGMENT_BYTES, 0);
            header = fragment::open_fragment(&segment.key, offset, sealed, &mut self.scratch)
                .map_err(|e| text(&e))?;
            begun.next(Stage::Open);
            if header.plain_bytes() != out.len() {
                return Err(format!("it has {} bytes, expected {}", header.plain_bytes(), out.len()));
            }
            let body = &self.scratch[..header.body_bytes as usize];
            found = self.codec.decompress_front(header.codec, body, out, wanted).map_err(|e| text(&e))?;
            begun.end(Stage::Decompress);
        }
        if header.first != first || header.chunks != entry.chunks || header.codec != entry.codec {
            return Err(format!("it is {:?} of {} chunks", header.first, header.chunks));
        }
        Ok(found)
    }
}

enum Fetched {
    Nothing,
    Sealed(Buf),
    Plain(Buf),
}

fn copy_slots(plain: &Buf, entry: &FragmentEntry, slot: u16, out: &mut [u8]) {
    let from = usize::from(slot - entry.first_slot) * CHUNK_BYTES;
    out.copy_from_slice(&plain[from..from + out.len()]);
}

/// What blocks `lba .. lba + count` are; incomplete as long as there are `needs`.
fn resolve(
    shard: &Shard,
    volume: VolumeId,
    lba: u64,
    count: usize,
    needs: &mut Needs,
) -> Result<(Extents, Units), Status> {
    let v = shard.volumes.get(&volume.0).ok_or(Status::INVALID_NAMESPACE)?;
    let d = shard.domains.get(&v.record.domain.0).ok_or(Status::INTERNAL_ERROR)?;
    let mut extents = Extents::new();
    let mut units = Units::new();
    let mut at = 0;
    while at < count {
        let (index, first) = leaf_of(lba + at as u64);
        let here = (512 - first).min(count - at);
        let own = match v.tree.find(index) {
            _ if v.is_snapshot() => None,
            Found::Here(leaf) => Some(leaf),
            Found::Absent => None,
            Found::Away(_) => {
                need(&v.tree, volume.0, index, needs);
                at += here;
                continue;
            }
        };
        let base = match inherited(shard, v, index, needs)? {
            Some(leaf) => leaf,
            None => {
                at += here;
                continue;
            }
        };
        if own.is_none() && base.is_none() {
            push(&mut extents, at, here, Source::Unmapped, false);
            at += here;
            continue;
        }
        for slot in first..first + here {
            let entry = entry_at(own, base.as_ref(), slot);
            let source = match entry.target {
                Target::Unmapped => Some(Source::Unmapped),
                Target::Zero => Some(Source::Zero),
                Target::Pattern(word) => Some(Source::Pattern(word)),
                Target::Chunk(addr) => resolve_chunk(shard, d, addr, &mut units, needs)?,
                Target::Uncorrectable => return Err(Status::UNRECOVERED_READ),
            };
            if let Some(source) = source {
                push(&mut extents, at, 1, source, entry.host_key.0 == 0);
            }
            at += 1;
        }
    }
    Ok((extents, units))
}

/// A leaf that shows what a volume does not have itself, up to which slot.
pub(crate) type Inherited = (Rc<MapLeaf>, usize);

/// What a volume inherits in a leaf, if anything; the outer `None`: something is missing.
#[allow(clippy::option_option)]
pub(crate) fn inherited(
    shard: &Shard,
    v: &Volume,
    index: u64,
    needs: &mut Needs,
) -> Result<Option<Option<Inherited>>, Status> {
    let (from, below) = match v.record.base {
        _ if v.is_snapshot() => (v.record.id, v.record.blocks),
        Some(base) => base,
        None => return Ok(Some(None)),
    };
    let below = below.saturating_sub(index * MAP_ENTRIES as u64).min(MAP_ENTRIES as u64) as usize;
    if below == 0 {
        return Ok(Some(None));
    }
    let leaf = shard.view(from, index, needs).map_err(|_| Status::INTERNAL_ERROR)?;
    Ok(leaf.map(|leaf| leaf.map(|leaf| (leaf, below))))
}

/// A block's entry: the volume's own one, or what it inherits.
#[inline]
pub(crate) fn entry_at(own: Option<&MapLeaf>, base: Option<&Inherited>, slot: usize) -> MapEntry {
    let entry = own.map_or_else(MapEntry::default, |leaf| leaf.get(slot));
    match base {
        Some((leaf, below)) if entry.is_none() && slot < *below => leaf.get(slot),
        _ => entry,
    }
}

fn resolve_chunk(
    shard: &Shard,
    d: &crate::shard::Domain,
    addr: ChunkAddr,
    units: &mut Units,
    needs: &mut Needs,
) -> Result<Option<Source>, Status> {
    let in_unit = |unit: &Unit| unit.first.container() == addr.container() && unit.entry.holds(addr.slot());
    if let Some(unit) = units.iter().rposition(in_unit) {
        units[unit].end = units[unit].end.max(addr.slot() + 1);
        return Ok(Some(Source::Unit { unit, slot: addr.slot() }));
    }
    let number = addr.container().get();
    let container = match d.containers.find(number) {
        Found::Here(container) => container,
        Found::Absent => {
            tracing::error!(chunk = ?addr, "a map entry points to a container that is not there");
            return Err(Status::UNRECOVERED_READ);
        }
        Found::Away(_) => {
            need(&d.containers, d.record.id.0, number, needs);
            return Ok(None);
        }
    };
    let Some(entry) = container.fragment_of(addr.slot()) else {
        tracing::error!(chunk = ?addr, "a map entry points to a slot without a fragment");
        return Err(Status::UNRECOVERED_READ);
    };
    let segment = entry.place.segment.segment.0;
    let Some(handle) = shard.segments.handle(segment) else {
        if needs.len() < 64 {
            needs.push(Need::Segment(segment));
        }
        return Ok(None);
    };
    let first = ChunkAddr::new(addr.container(), entry.first_slot).ok_or(Status::INTERNAL_ERROR)?;
    let end = addr.slot() + 1;
    units.push(Unit { domain: d.record.id, segment: handle, entry, first, end, unwritten: None });
    Ok(Some(Source::Unit { unit: units.len() - 1, slot: addr.slot() }))
}

/// Appends a run, or lengthens the last one.
fn push(extents: &mut Extents, at: usize, count: usize, source: Source, as_sent: bool) {
    if let Some(last) = extents.last_mut()
        && last.at + last.count == at
        && last.as_sent == as_sent
    {
        let goes_on = match (&last.source, &source) {
            (Source::Unmapped, Source::Unmapped) | (Source::Zero, Source::Zero) => true,
            (Source::Pattern(a), Source::Pattern(b)) => a == b,
            (Source::Unit { unit: a, slot: from }, Source::Unit { unit: b, slot }) => {
                a == b && usize::from(*from) + last.count == usize::from(*slot)
            }
            _ => false,
        };
        if goes_on {
            last.count += count;
            return;
        }
    }
    extents.push(Extent { at, count, source, as_sent });
}
