//! The write path: from plaintext blocks to fragments in the log and records in the journal.
//!
//! Owns the lanes: per domain one data log and one open container for hosts, and one for the collector.
//!
//! A write goes in pieces of at most [`PIECE`] blocks. For each piece everything that may wait comes first (loading leaves,
//! room in the log, a segment); then, in one step without waiting: look up, compress, seal, journal, apply. So between
//! the look-up and the reference nothing can disappear, and of two identical writes the second finds the first.

use std::cell::Cell;
use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_bdev::trace::{self, Stage};
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::block::Block;
use cryptfold_reduce_format::codec::{self, Compression, Compressor};
use cryptfold_reduce_format::container::FragmentEntry;
use cryptfold_reduce_format::entry::{MapRun, Record, runs};
use cryptfold_reduce_format::fingerprint::{Chunk, Fingerprint, Hasher};
use cryptfold_reduce_format::fragment::CHUNK_BYTES;
use cryptfold_reduce_format::ids::{
    ChunkAddr, ContainerId, DomainId, Epoch, Generation, HostKeyId, Lba, SLOTS, ShardIx, VolumeId,
};
use cryptfold_reduce_format::journal::Scope;
use cryptfold_reduce_format::map::{MapEntry, Target};
use cryptfold_reduce_format::segment::Class;
use reactor::memory::SgList;
use reactor::sync::Mutex;
use smallvec::SmallVec;
use std::sync::Arc;

use crate::lend::{LentLane, LoanId};
use crate::log::{Appended, DataLog, NotAppended, bound};
use crate::pool::{Parked, Pool};
use crate::segments::{Filler, Purpose, Segment};
use crate::shard::{ApplyError, FIRST_CONTAINER, Needs, Shard};

/// Blocks that are written in one step.
pub(crate) const PIECE: usize = 32;
/// Chunks that are hashed at once.
const LANES: usize = 16;
/// Small writes that are hashed together, at most.
pub(crate) const HASHED: usize = 16;
/// Chunks that are compressed together: more of them compress better and faster, but a read of one decodes them all.
pub(crate) const GROUP: usize = 16;
/// Chunks that are stored together when no codec helps: enough to make headers not count.
pub(crate) const RAW_GROUP: usize = 4;
/// Leaves of the map that one step of a fill touches.
const FILL_STEP: u64 = 4 * 512;

/// Where new data of a domain goes.
pub(crate) struct Lane {
    pub domain: DomainId,
    purpose: Purpose,
    pub log: Rc<DataLog>,
    /// The open container and its next free slot.
    container: Cell<Option<(ContainerId, u16)>>,
    opening: Mutex<()>,
}

impl Lane {
    /// The container that is being filled.
    pub fn open_container(&self) -> Option<ContainerId> {
        self.container.get().map(|open| open.0)
    }

    /// The slots of the open container below `next` are given out.
    pub fn filled(&self, container: ContainerId, next: u16) {
        self.container.set(Some((container, next)));
    }

    /// Ends the open container: which it was.
    pub fn end_container(&self) -> Option<ContainerId> {
        self.container.take().map(|open| open.0)
    }
}

/// Where a chunk of a piece lies.
#[derive(Clone, Copy)]
struct Source {
    /// Buffer of the piece.
    buf: u16,
    /// Chunk of that buffer.
    nth: u16,
    /// Block of the piece.
    block: u16,
}

/// What is worked out about a piece; reused, so that a write allocates nothing and its future stays small.
#[derive(Default)]
pub(crate) struct Scratch {
    entries: Vec<MapEntry>,
    /// The chunks that are data: where they lie, their fingerprints, where they are stored.
    sources: Vec<Source>,
    fingerprints: Vec<Fingerprint>,
    found: Vec<Option<ChunkAddr>>,
    new: Vec<u16>,
    /// (chunk, earlier chunk of the same piece with the same content)
    same: Vec<(u16, u16)>,
    runs: Vec<MapRun>,
    /// What another core has sealed already.
    sealed: Option<Sealed>,
    /// Duplicates are not looked for: their lists can not be read.
    blind: bool,
    /// New chunks are not stored but reported: another core is to seal them.
    unsealed: bool,
    /// There are chunks, and the last look-up found none of them.
    all_new: bool,
}

/// A small write that came with others.
pub(crate) struct Small<'a> {
    pub volume: VolumeId,
    pub lba: u64,
    pub data: &'a SgList,
    pub host_key: HostKeyId,
}

/// What a piece needs before it can be stored.
enum Attempt {
    /// Nothing: it is.
    Done,
    /// That the core that it came to seals its new chunks.
    Seal,
    /// Fingerprints of the domain's generation of now.
    Rehash,
    /// These are missing; `true`: only for finding duplicates.
    Load(Needs, bool),
    /// So many bytes of room in the log.
    Room(usize),
}

/// What became of a piece.
enum Written {
    /// It is stored.
    Whole,
    /// The core that it came to has to seal it first.
    Unsealed,
    /// The domain has got other keys while it waited.
    Outdated,
}

/// What a write needs to know of its volume, read at its start.
#[derive(Clone)]
pub(crate) struct Target4k {
    pub volume: VolumeId,
    pub domain: DomainId,
    pub generation: Generation,
    pub blocks: u64,
    pub compression: Compression,
    pub hasher: Arc<Hasher>,
}

impl Pool {
    /// What is to be known of a volume before writing to it.
    pub(crate) fn target(&self, volume: VolumeId) -> Result<Target4k, Status> {
        let shard = self.shard.borrow();
        let v = shard.volumes.get(&volume.0).filter(|v| !v.is_deleting()).ok_or(Status::INVALID_NAMESPACE)?;
        let d = shard.domains.get(&v.record.domain.0).ok_or(Status::INTERNAL_ERROR)?;
        Ok(Target4k {
            volume,
            domain: d.record.id,
            generation: d.generation,
            blocks: v.record.blocks,
            compression: v.record.compression.unwrap_or(shard.pool.compression),
            hasher: d.hasher.clone(),
        })
    }

    /// The lane of a domain.
    pub(crate) fn lane(&self, domain: DomainId, purpose: Purpose) -> Rc<Lane> {
        let mut lanes = self.lanes.borrow_mut();
        let lane = lanes.entry((domain, purpose == Purpose::Collector)).or_insert_with(|| {
            let log = DataLog::new(self.base.clone(), self.segment_bytes);
            self.logs.borrow_mut().push(log.clone());
            Rc::new(Lane { domain, purpose, log, container: Cell::new(None), opening: Mutex::new(()) })
        });
        lane.clone()
    }

    /// Writes whole blocks (4 KiB) of a volume.
    pub(crate) async fn write_blocks(
        self: &Rc<Self>,
        target: &Target4k,
        lba: u64,
        mut data: SgList,
        host_key: HostKeyId,
    ) -> Result<(), Status> {
        if lba + (data.len_bytes() / CHUNK_BYTES) as u64 > target.blocks {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        let mut at = lba;
        while !data.is_empty() {
            self.admit().await;
            self.throttle().await?;
            let count = PIECE.min(data.len_bytes() / CHUNK_BYTES);
            let piece = whole_chunks(data.split_to(count * CHUNK_BYTES));
            let mut scratch = self.scratch.borrow_mut().pop().unwrap_or_default();
            let mut newer;
            let mut target = target;
            let result = loop {
                self.hash_piece(target, &piece, host_key, &mut scratch);
                match self.write_piece(target, at, &piece, &mut scratch).await {
                    Ok(Written::Outdated) => match self.target(target.volume) {
                        Ok(now) => {
                            newer = now;
                            target = &newer;
                        }
                        Err(status) => break Err(status),
                    },
                    other => break other,
                }
            };
            self.scratch.borrow_mut().push(scratch);
            let _done = result?;
            at += count as u64;
        }
        Ok(())
    }

    fn hash_piece(&self, target: &Target4k, piece: &SgList, host_key: HostKeyId, scratch: &mut Scratch) {
        let mut chunks = SmallVec::new();
        classify(piece, host_key, scratch, &mut chunks);
        scratch.fingerprints.clear();
        scratch.fingerprints.resize(chunks.len(), Fingerprint::NONE);
        for (chunks, prints) in chunks.chunks(LANES).zip(scratch.fingerprints.chunks_mut(LANES)) {
            let begun = trace::begin();
            target.hasher.hash_chunks(chunks, prints);
            begun.end(Stage::Hash);
            if self.expects_new.get() {
                // No cache holds the table; the next ones are hashed meanwhile.
                self.shard.borrow().hint(target.domain, prints);
            }
        }
    }

    /// Writes a piece that another core has prepared. Comes back unwritten if it has new chunks that could be sealed there.
    pub(crate) async fn write_prepared(
        self: &Rc<Self>,
        volume: VolumeId,
        generation: Generation,
        lba: u64,
        mut prepared: Prepared,
    ) -> Result<Back, Status> {
        self.admit().await;
        self.throttle().await?;
        let mut target = self.target(volume)?;
        let written = match target.generation == generation {
            true => self.write_piece(&target, lba, &prepared.piece, &mut prepared.scratch).await?,
            false => Written::Outdated,
        };
        let Target4k { domain, compression, .. } = target;
        let seal = SealAs { domain, compression, segment_bytes: self.segment_bytes };
        let all_new = prepared.scratch.all_new;
        match written {
            Written::Whole => Ok(Back { seal, all_new, unsealed: None }),
            Written::Unsealed => Ok(Back { seal, all_new, unsealed: Some(prepared) }),
            Written::Outdated => {
                // Its fingerprints mean nothing now, and what has been sealed is under old keys.
                target = self.target(volume)?;
                self.write_blocks(&target, lba, prepared.piece, prepared.host_key).await?;
                Ok(Back { seal, all_new: false, unsealed: None })
            }
        }
    }

    /// Writes several small pieces at once, each if nothing has to be waited for; `answer` gets each one's number and result
    /// (`None`: it has to go the long way). Their chunks are hashed together, which is what makes small writes fast.
    pub(crate) fn try_writes<'a>(
        self: &Rc<Self>,
        writes: impl Iterator<Item = Small<'a>> + Clone,
        mut answer: impl FnMut(usize, Option<Result<(), Status>>),
    ) {
        let mut pieces: SmallVec<[(Target4k, Box<Scratch>); HASHED]> = SmallVec::new();
        let mut chunks: SmallVec<[&Chunk; PIECE]> = SmallVec::new();
        for write in writes.clone() {
            // Checked for each: the volume may be gone.
            let Ok(target) = self.target(write.volume) else { break };
            let mut scratch = self.scratch.borrow_mut().pop().unwrap_or_default();
            classify(write.data, write.host_key, &mut scratch, &mut chunks);
            pieces.push((target, scratch));
        }
        let shard = self.shard.borrow();
        let touched = shard.touch_old(writes.clone().map(|write| (write.volume, write.lba)));
        let mut prints: SmallVec<[Fingerprint; PIECE]> = SmallVec::new();
        prints.resize(chunks.len(), Fingerprint::NONE);
        let one_domain = pieces.windows(2).all(|pair| pair[0].0.domain == pair[1].0.domain);
        if let Some((target, _)) = pieces.first().filter(|_| one_domain) {
            let begun = trace::begin();
            target.hasher.hash_chunks(&chunks, &mut prints);
            begun.end(Stage::Hash);
            shard.hint(target.domain, &prints);
        }
        shard.touch_prints(&touched);
        drop(touched);
        drop(shard);
        let mut pieces = pieces.into_iter();
        let mut rest = prints.as_slice();
        for (nth, write) in writes.enumerate() {
            let Some((target, mut scratch)) = pieces.next() else {
                answer(nth, None);
                continue;
            };
            let (mine, others) = rest.split_at(scratch.sources.len());
            rest = others;
            scratch.fingerprints.clear();
            scratch.fingerprints.extend_from_slice(mine);
            let fits = write.lba + scratch.entries.len() as u64 <= target.blocks;
            let result =
                if one_domain && fits { self.try_piece(&target, &write, &mut scratch) } else { None };
            self.scratch.borrow_mut().push(scratch);
            answer(nth, result);
        }
    }

    fn try_piece(
        self: &Rc<Self>,
        target: &Target4k,
        write: &Small<'_>,
        scratch: &mut Scratch,
    ) -> Option<Result<(), Status>> {
        if !self.try_admit() || self.must_wait().ok()? {
            return None;
        }
        let lane = self.lane(target.domain, Purpose::Host);
        match self.attempt(target, &lane, write.lba, write.data, scratch) {
            Ok(Attempt::Done) => Some(Ok(())),
            Ok(_) => None,
            Err(status) => Some(Err(status)),
        }
    }

    /// Stores a piece.
    async fn write_piece(
        self: &Rc<Self>,
        target: &Target4k,
        lba: u64,
        piece: &SgList,
        scratch: &mut Scratch,
    ) -> Result<Written, Status> {
        let lane = self.lane(target.domain, Purpose::Host);
        let mut pins = self.pins();
        loop {
            match self.attempt(target, &lane, lba, piece, scratch)? {
                Attempt::Done => return Ok(Written::Whole),
                Attempt::Seal => return Ok(Written::Unsealed),
                Attempt::Rehash => return Ok(Written::Outdated),
                Attempt::Load(needs, only_duplicates) => {
                    // Boxed: rare, and it would make every write's future large.
                    let loaded = Box::pin(self.load_all(needs, &mut pins)).await;
                    if only_duplicates {
                        // A list that can not be read costs a second copy, not the write.
                        scratch.blind |= loaded.is_err();
                    } else {
                        loaded?;
                    }
                }
                Attempt::Room(bytes) => Box::pin(self.make_ready(&lane, bytes)).await?,
            }
        }
    }

    /// Stores a piece in one step, or says what is missing (and has changed nothing then).
    fn attempt(
        self: &Rc<Self>,
        target: &Target4k,
        lane: &Lane,
        lba: u64,
        piece: &SgList,
        scratch: &mut Scratch,
    ) -> Result<Attempt, Status> {
        self.check_alive()?;
        let mut needs = Needs::new();
        {
            let shard = self.shard.borrow();
            let gone = |_| Status::INVALID_NAMESPACE;
            if shard.domain(target.domain).map_err(gone)?.generation != target.generation {
                return Ok(Attempt::Rehash);
            }
            let volume = shard.volume(target.volume).map_err(gone)?;
            volume.check_change(lba + scratch.entries.len() as u64)?;
            shard
                .needs_of_fill(target.volume, lba, scratch.entries.len() as u64, &mut needs)
                .map_err(gone)?;
            // It may have been lent just when the keys changed, and be gone with them soon.
            scratch.sealed.take_if(|sealed| {
                let of = sealed.segment.filler.as_ref().map(|filler| filler.domain);
                of != Some(target.domain) || shard.segments.is_old(sealed.segment.number(), target.generation)
            });
            if let Some(sealed) = &scratch.sealed {
                shard.needs_of_sealed(target.domain, sealed, &mut needs).map_err(gone)?;
            }
            if !needs.is_empty() {
                return Ok(Attempt::Load(needs, false));
            }
            if scratch.blind {
                scratch.found.clear();
                scratch.found.resize(scratch.fingerprints.len(), None);
            } else {
                let (prints, found) = (&scratch.fingerprints, &mut scratch.found);
                shard.lookup(target.domain, prints, found, &mut needs).map_err(gone)?;
                if !needs.is_empty() {
                    return Ok(Attempt::Load(needs, true));
                }
            }
        }
        let new = scratch.found.iter().filter(|found| found.is_none()).count();
        scratch.all_new = new > 0 && new == scratch.found.len();
        self.expects_new.set(2 * new > scratch.found.len());
        if new > 0 && scratch.unsealed {
            return Ok(Attempt::Seal);
        }
        if new > 0 {
            // A chunk that was sealed elsewhere may have been found then and be gone now; others are stored there.
            let left = scratch.sealed.as_ref().map_or(new, |sealed| sealed.lacks(scratch));
            let bytes = most_bytes(left);
            if left > 0 && lane.log.room_for(bytes).is_err() {
                return Ok(Attempt::Room(bytes));
            }
            self.adopt(target, scratch)?;
            self.store(target, lane, piece, scratch)?;
        }
        for (found, source) in scratch.found.iter().zip(&scratch.sources) {
            scratch.entries[usize::from(source.block)].target =
                found.map_or(Target::Uncorrectable, Target::Chunk);
        }
        self.set_blocks(target, lba, scratch)?;
        self.heal_soon();
        Ok(Attempt::Done)
    }

    /// Stores the chunks that were not found, and fills in where they are.
    fn store(
        &self,
        target: &Target4k,
        lane: &Lane,
        piece: &SgList,
        scratch: &mut Scratch,
    ) -> Result<(), Status> {
        let Scratch { sources, fingerprints, found, new, same, .. } = scratch;
        split_new(fingerprints, found, new, same);
        let added = |first: ChunkAddr, members: &[u16], appended: Appended| {
            let prints = prints_of(members, fingerprints);
            self.record_fragment(target, first, &prints, &prints, &appended)?;
            lane.filled(first.container(), first.slot() + members.len() as u16);
            assign(found, members, first);
            Ok(())
        };
        let compressor = &mut self.core.compressor.borrow_mut();
        let container = || Some(self.container(lane, 1));
        append_new(&lane.log, (compressor, target.compression), (piece, sources), new, container, added)?;
        for &(at, earlier) in same.iter() {
            found[usize::from(at)] = found[usize::from(earlier)];
        }
        Ok(())
    }

    /// Records what another core has sealed, where it is still needed.
    fn adopt(&self, target: &Target4k, scratch: &mut Scratch) -> Result<(), Status> {
        let Scratch { fingerprints, found, sealed, .. } = scratch;
        let Some(sealed) = sealed else { return Ok(()) };
        for SealedFragment { first, members, appended } in &sealed.fragments {
            // What has been found since needs no second copy; all of a fragment or nothing is recorded.
            if members.iter().any(|&at| found[usize::from(at)].is_none()) {
                let prints = prints_of(members, fingerprints);
                let mut new = prints.clone();
                for (print, &at) in new.iter_mut().zip(members) {
                    // It is somewhere else, and nothing will refer to it here.
                    if found[usize::from(at)].is_some() {
                        *print = Fingerprint::NONE;
                    }
                }
                self.record_fragment(target, *first, &prints, &new, appended)?;
                self.recorded(sealed.loan);
                assign(found, members, *first);
            }
        }
        Ok(())
    }

    /// Records a fragment that is in a log now. `new`: the fingerprints under which its chunks are to be found.
    fn record_fragment(
        &self,
        target: &Target4k,
        first: ChunkAddr,
        prints: &[Fingerprint],
        new: &[Fingerprint],
        appended: &Appended,
    ) -> Result<(), Status> {
        let chunks = prints.len() as u8;
        let fragment = FragmentEntry {
            first_slot: first.slot(),
            chunks,
            codec: appended.codec,
            place: appended.place,
            unit_bytes: appended.unit_bytes,
        };
        let scope = Scope::Domain { domain: target.domain, generation: target.generation };
        let container = first.container();
        self.push(scope, &Record::FragmentAdd { container, fragment, fingerprints: prints });
        let mut shard = self.shard.borrow_mut();
        shard
            .fragment_add(target.domain, target.generation, container, &fragment, prints)
            .map_err(|error| self.inconsistent(&error))?;
        shard.index_fragment(target.domain, first, new);
        drop(shard);
        self.charge(appended.unit_bytes);
        Ok(())
    }

    /// Points blocks of a volume to the piece's entries. Their leaves are in RAM, their chunks alive or just stored.
    fn set_blocks(&self, target: &Target4k, lba: u64, scratch: &mut Scratch) -> Result<(), Status> {
        // The epoch of now, not of the write's start: a snapshot may have come in between.
        let epoch = self.shard.borrow().epoch();
        scratch.entries.iter_mut().for_each(|entry| entry.birth = epoch);
        scratch.runs.clear();
        runs(scratch.entries.iter().copied(), &mut scratch.runs);
        let scope = Scope::Domain { domain: target.domain, generation: target.generation };
        self.push(scope, &Record::MapSet { volume: target.volume, lba: Lba(lba), runs: &scratch.runs });
        let now = self.now();
        let result = self.shard.borrow_mut().map_set(target.volume, Lba(lba), &scratch.runs, now);
        result.map_err(|error| self.inconsistent(&error))
    }

    /// The lane's open container with `count` free slots; a new one if need be (what is left of the old one stays unused).
    pub(crate) fn container(&self, lane: &Lane, count: usize) -> (ContainerId, u16) {
        match lane.container.get() {
            Some((container, slot)) if usize::from(slot) + count <= SLOTS => (container, slot),
            old => {
                if let Some((old, _)) = old
                    && let Some(d) = self.shard.borrow_mut().domains.get_mut(&lane.domain.0)
                {
                    d.containers.unpin(old.get());
                    d.fingerprints.unpin(old.get());
                }
                let Some(number) = self.draw_container(lane.domain) else { return (FIRST_CONTAINER, 0) };
                lane.container.set(Some((number, 0)));
                (number, 0)
            }
        }
    }

    /// A container that is to be filled. Absent until its first fragment; kept in RAM while it is filled.
    pub(crate) fn draw_container(&self, domain: DomainId) -> Option<ContainerId> {
        let mut shard = self.shard.borrow_mut();
        let d = shard.domains.get_mut(&domain.0)?;
        d.draw_container = d.draw_container.max(d.next_container);
        let number = ContainerId::new(d.draw_container).unwrap_or(FIRST_CONTAINER);
        d.draw_container += 1;
        d.containers.pin(number.get());
        d.fingerprints.pin(number.get());
        Some(number)
    }

    /// Whether a container is being filled, so must not be dropped.
    pub(crate) fn is_filling(&self, domain: DomainId, container: ContainerId) -> bool {
        let lanes = self.lanes.borrow();
        lanes
            .values()
            .any(|lane| lane.domain == domain && lane.container.get().is_some_and(|open| open.0 == container))
            || self.lent_containers(domain).contains(&container)
    }

    /// Waits until `bytes` fit the lane's log.
    pub(crate) async fn make_ready(self: &Rc<Self>, lane: &Lane, bytes: usize) -> Result<(), Status> {
        loop {
            match lane.log.room_for(bytes) {
                Ok(()) => return Ok(()),
                Err(NotAppended::NoBuffer) => {
                    if let Err(status) = lane.log.make_room().await {
                        self.fail(status);
                        return Err(status);
                    }
                }
                Err(_) => {
                    let _one = {
                        // Who has it may wait for an audit's end.
                        let _parked = Parked::new(self);
                        lane.opening.lock().await
                    };
                    self.wait_for_audit().await;
                    if matches!(lane.log.room_for(bytes), Err(NotAppended::NoSegment)) {
                        self.open_data_segment(lane).await?;
                    }
                }
            }
        }
    }

    /// Closes the lane's segment and opens another.
    pub(crate) async fn open_data_segment(self: &Rc<Self>, lane: &Lane) -> Result<(), Status> {
        if let Some(old) = lane.log.finish() {
            let now = self.now();
            self.shard.borrow_mut().segments.close(old.number(), now);
        }
        let number = self.free_segment(lane.purpose).await?;
        let (segment, header) = self.begin_segment(number, lane.domain, None)?;
        lane.log.begin(segment, &header);
        Ok(())
    }

    /// Opens a free segment that has been taken: its handle, and the block that it begins with.
    pub(crate) fn begin_segment(
        &self,
        number: u32,
        domain: DomainId,
        filler: Option<Filler>,
    ) -> Result<(Arc<Segment>, Box<Block>), Status> {
        let (addr, start, incarnation, generation) = {
            let mut shard = self.shard.borrow_mut();
            let generation = shard.domains.get(&domain.0).map(|d| d.generation);
            let Some(generation) = generation else {
                let now = self.now();
                shard.segments.put_back(number, now);
                return Err(Status::INVALID_NAMESPACE);
            };
            let incarnation = shard.segments.draw_incarnation();
            (shard.segments.addr(number), shard.segments.start_bytes(number), incarnation, generation)
        };
        let header = self.segment_header(addr, incarnation, Class::Data, domain, generation);
        let Some(key) = self.segment_key(&header) else { return Err(Status::INTERNAL_ERROR) };
        self.record(
            Scope::Pool,
            &Record::SegmentOpen {
                addr,
                incarnation,
                class: Class::Data,
                domain,
                generation,
                shard: ShardIx(0),
            },
        )?;
        let segment = Segment::open(key, start, filler);
        self.shard.borrow_mut().segments.set_handle(segment.clone());
        self.see_shortage();
        if self.is_short() {
            self.collect.notify_one();
        }
        Ok((segment, header.encode(self.keys.block())))
    }

    /// Takes a free segment; waits while space is on its way (a commit, a checkpoint, the collector).
    async fn free_segment(self: &Rc<Self>, purpose: Purpose) -> Result<u32, Status> {
        let mut fruitless = 0;
        loop {
            self.check_alive()?;
            let durable = self.journal.borrow().durable();
            if let Some(number) = self.shard.borrow_mut().segments.take_free(purpose, durable) {
                return Ok(number);
            }
            let (ready, emptied) = (self.space_progress(), self.emptied.get());
            self.flush().await?;
            if self.space_progress() == ready && purpose != Purpose::Host {
                // The collector itself: a checkpoint may free metadata segments.
                self.checkpoint().await?;
            } else if self.space_progress() == ready {
                self.collect_once_or_wait().await;
            }
            // What the collector empties, it or others may take at once; each time there is less that is dead.
            let progress =
                self.space_progress() > ready || self.emptied.get() > emptied || self.emptying_metadata.get();
            fruitless = if progress { 0 } else { fruitless + 1 };
            if fruitless == 2 && self.recall().await? {
                // What other cores had begun to fill can be collected.
                fruitless = 0;
            }
            if fruitless > 2 {
                return Err(Status::CAPACITY_EXCEEDED);
            }
        }
    }

    /// Free segments that could be opened now: more of them is progress.
    fn space_progress(&self) -> usize {
        let durable = self.journal.borrow().durable();
        self.shard.borrow().segments.ready_count(durable)
    }

    /// Unmaps blocks, or makes them plaintext zeros or uncorrectable. `lba` and `count` in 4 KiB blocks.
    pub(crate) async fn fill_blocks(
        self: &Rc<Self>,
        target: &Target4k,
        lba: u64,
        count: u64,
        kind: Target,
        host_key: HostKeyId,
    ) -> Result<(), Status> {
        if lba + count > target.blocks {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        let mut at = lba;
        let end = lba + count;
        while at < end {
            self.throttle().await?;
            if kind == Target::Unmapped {
                at = self.skip_absent(target.volume, at, end).await?;
                if at >= end {
                    break;
                }
            }
            let step = (FILL_STEP - at % FILL_STEP).min(end - at);
            let mut pins = self.pins();
            loop {
                let mut needs = Needs::new();
                self.shard
                    .borrow()
                    .needs_of_fill(target.volume, at, step, &mut needs)
                    .map_err(|_| Status::INVALID_NAMESPACE)?;
                if needs.is_empty() {
                    break;
                }
                self.load_all(needs, &mut pins).await?;
            }
            self.check_alive()?;
            let (entry, scope) = {
                let shard = self.shard.borrow();
                let v = shard.volume(target.volume).map_err(|_| Status::INVALID_NAMESPACE)?;
                let domain = shard.domain(target.domain).map_err(|_| Status::INVALID_NAMESPACE)?;
                // Giving up is always possible, also what is being cut off.
                v.check_change(if kind == Target::Unmapped { 0 } else { at + step })?;
                (MapEntry { target: kind, birth: shard.epoch(), host_key }, domain.scope())
            };
            self.push(scope, &Record::MapFill { volume: target.volume, lba: Lba(at), count: step, entry });
            let now = self.now();
            let result = self.shard.borrow_mut().map_fill(target.volume, Lba(at), step, entry, now);
            result.map_err(|error| self.inconsistent(&error))?;
            at += step;
        }
        Ok(())
    }

    /// First block at or after `at` whose leaf may exist.
    async fn skip_absent(&self, volume: VolumeId, mut at: u64, end: u64) -> Result<u64, Status> {
        let mut looked = 0;
        while at < end {
            {
                let shard = self.shard.borrow();
                let v = shard.volumes.get(&volume.0).ok_or(Status::INVALID_NAMESPACE)?;
                if v.chunks + v.special == 0 && v.record.base.is_none() {
                    return Ok(end);
                }
                for _ in 0..4096 {
                    let absent = matches!(v.tree.find(at / 512), crate::tree::Found::Absent)
                        && v.record
                            .base
                            .is_none_or(|(base, below)| at >= below || shard.shows_nothing(base, at / 512));
                    if at >= end || !absent {
                        return Ok(at.min(end));
                    }
                    at = (at / 512 + 1) * 512;
                }
            }
            looked += 1;
            if looked % 4 == 0 {
                reactor::yield_now().await;
            }
        }
        Ok(end)
    }
}

/// The same bytes in buffers of whole chunks.
pub(crate) fn whole_chunks(piece: SgList) -> SgList {
    if piece.iter().all(|buf| buf.len().is_multiple_of(CHUNK_BYTES)) {
        piece
    } else {
        piece.to_contiguous().into()
    }
}

/// The bytes of chunks of a piece; those that are neighbours in a buffer as one slice.
fn neighbours<'a>(group: &[u16], piece: &'a SgList, sources: &[Source]) -> SmallVec<[&'a [u8]; GROUP]> {
    let source = |at: u16| sources[usize::from(at)];
    let runs = group.chunk_by(|&a, &b| {
        let (a, b) = (source(a), source(b));
        a.buf == b.buf && a.nth + 1 == b.nth
    });
    runs.map(|run| {
        let Source { buf, nth, .. } = source(run[0]);
        let from = usize::from(nth) * CHUNK_BYTES;
        &piece.segments()[usize::from(buf)][from..from + run.len() * CHUNK_BYTES]
    })
    .collect()
}

/// Finds zeros and patterns; the rest is appended to `data`.
fn classify<'a>(
    piece: &'a SgList,
    host_key: HostKeyId,
    scratch: &mut Scratch,
    data: &mut SmallVec<[&'a Chunk; PIECE]>,
) {
    scratch.entries.clear();
    scratch.sources.clear();
    scratch.sealed = None;
    scratch.blind = false;
    scratch.unsealed = false;
    scratch.all_new = false;
    for (at, buf) in piece.iter().enumerate() {
        for (nth, chunk) in buf.as_chunks::<CHUNK_BYTES>().0.iter().enumerate() {
            let target = match codec::pattern(chunk) {
                Some(0) => Target::Zero,
                Some(word) => Target::Pattern(word),
                None => {
                    data.push(chunk);
                    let block = scratch.entries.len() as u16;
                    scratch.sources.push(Source { buf: at as u16, nth: nth as u16, block });
                    Target::Uncorrectable
                }
            };
            scratch.entries.push(MapEntry { target, birth: Epoch(0), host_key });
        }
    }
}

/// A piece on another core than the pool's home: what that core works out by itself.
pub(crate) struct Prepared {
    piece: SgList,
    host_key: HostKeyId,
    scratch: Box<Scratch>,
}

impl Prepared {
    /// Classifies and hashes a piece (at most [`PIECE`] blocks in whole chunks).
    pub fn new(piece: SgList, host_key: HostKeyId, hasher: &Hasher) -> Prepared {
        let mut scratch = Box::<Scratch>::default();
        let mut chunks = SmallVec::new();
        classify(&piece, host_key, &mut scratch, &mut chunks);
        scratch.fingerprints.resize(chunks.len(), Fingerprint::NONE);
        let begun = trace::begin();
        hasher.hash_chunks(&chunks, &mut scratch.fingerprints);
        begun.end(Stage::Hash);
        drop(chunks);
        scratch.unsealed = true;
        Prepared { piece, host_key, scratch }
    }

    /// Chunks that the home has not found, and the bytes that they take at most, sealed.
    pub fn new_chunks(&self) -> (usize, usize) {
        let chunks = self.scratch.found.iter().filter(|found| found.is_none()).count();
        (chunks, most_bytes(chunks))
    }

    /// Takes all of its chunks for new, so that they are sealed before the home is asked. False: it has none.
    pub fn assume_new(&mut self) -> bool {
        self.scratch.found.clear();
        self.scratch.found.resize(self.scratch.fingerprints.len(), None);
        !self.scratch.found.is_empty()
    }

    /// Has the home store it.
    pub fn leave(&mut self) {
        self.scratch.unsealed = false;
    }

    /// Compresses and seals what the home has not found. The lane is ready for [`Prepared::new_chunks`].
    pub fn seal(
        &mut self,
        lane: &LentLane,
        setting: Compression,
        compressor: &mut Compressor,
    ) -> Result<(), Status> {
        let Prepared { piece, scratch, .. } = self;
        scratch.unsealed = false;
        let Scratch { sources, fingerprints, found, new, same, sealed, .. } = &mut **scratch;
        let Some((loan, segment)) = lane.open() else { return Ok(()) };
        split_new(fingerprints, found, new, same);
        let mut fragments = Vec::new();
        let added = |first: ChunkAddr, members: &[u16], appended: Appended| {
            lane.filled(first.container(), first.slot() + members.len() as u16);
            fragments.push(SealedFragment { first, members: members.into(), appended });
            Ok(())
        };
        append_new(&lane.log, (compressor, setting), (piece, sources), new, || lane.container(), added)?;
        *sealed = Some(Sealed { loan, segment, fragments });
        Ok(())
    }
}

/// What the home says of a piece.
pub(crate) struct Back {
    /// How new chunks of the volume are sealed.
    pub seal: SealAs,
    /// None of its chunks was there already.
    pub all_new: bool,
    /// It is not written: to be sealed first.
    pub unsealed: Option<Prepared>,
}

/// How another core seals new chunks of a volume.
#[derive(Clone, Copy)]
pub(crate) struct SealAs {
    pub domain: DomainId,
    pub compression: Compression,
    pub segment_bytes: u32,
}

/// What another core has sealed of a piece.
pub(crate) struct Sealed {
    loan: LoanId,
    /// Not opened again before this is recorded.
    segment: Arc<Segment>,
    fragments: Vec<SealedFragment>,
}

struct SealedFragment {
    first: ChunkAddr,
    members: SmallVec<[u16; GROUP]>,
    appended: Appended,
}

impl Sealed {
    /// Chunks that are neither found nor here.
    fn lacks(&self, scratch: &Scratch) -> usize {
        let Scratch { fingerprints, found, .. } = scratch;
        let here = |at: usize| {
            let mut members = self.fragments.iter().flat_map(|fragment| &fragment.members);
            members.any(|&member| fingerprints[usize::from(member)] == fingerprints[at])
        };
        (0..found.len()).filter(|&at| found[at].is_none() && !here(at)).count()
    }
}

impl Shard {
    /// Adds what is missing before fragments that another core has sealed can be recorded.
    fn needs_of_sealed(
        &self,
        domain: DomainId,
        sealed: &Sealed,
        needs: &mut Needs,
    ) -> Result<(), ApplyError> {
        let d = self.domain(domain)?;
        let mut last = None;
        for container in sealed.fragments.iter().map(|fragment| fragment.first.container()) {
            if last.replace(container) != Some(container) {
                Shard::need(&d.containers, domain.0, container.get(), needs);
                Shard::need(&d.fingerprints, domain.0, container.get(), needs);
            }
        }
        Ok(())
    }
}

/// Most bytes that `chunks` new chunks take in the log.
fn most_bytes(chunks: usize) -> usize {
    (chunks.div_ceil(RAW_GROUP) + 1) * bound(0) + chunks * CHUNK_BYTES
}

/// Of the chunks that were not found, those to be stored, and those that are the same as earlier ones.
fn split_new(
    fingerprints: &[Fingerprint],
    found: &[Option<ChunkAddr>],
    new: &mut Vec<u16>,
    same: &mut Vec<(u16, u16)>,
) {
    new.clear();
    same.clear();
    for at in 0..found.len() {
        if found[at].is_some() {
            continue;
        }
        match fingerprints[..at].iter().position(|earlier| *earlier == fingerprints[at]) {
            Some(earlier) => same.push((at as u16, earlier as u16)),
            None => new.push(at as u16),
        }
    }
}

/// Appends new chunks to a log that has room for them, cut into fragments as their content and the containers ask for.
fn append_new(
    log: &Rc<DataLog>,
    (compressor, wanted): (&mut Compressor, Compression),
    (piece, sources): (&SgList, &[Source]),
    new: &[u16],
    container: impl Fn() -> Option<(ContainerId, u16)>,
    mut added: impl FnMut(ChunkAddr, &[u16], Appended) -> Result<(), Status>,
) -> Result<(), Status> {
    let mut rest = new;
    // Of the next chunks, those that were found to be nothing for a codec.
    let mut raw = 0;
    while !rest.is_empty() {
        let (container, slot) = container().ok_or(Status::INTERNAL_ERROR)?;
        let most = rest.len().min(GROUP).min(SLOTS - usize::from(slot));
        let mut setting = wanted;
        let mut pieces = neighbours(&rest[..most], piece, sources);
        if raw == 0 && most > RAW_GROUP && setting != Compression::Off {
            raw = if codec::looks_incompressible(&pieces) { most } else { 0 };
        }
        if raw > 0 || setting == Compression::Off {
            setting = Compression::Off;
            let most = if raw > 0 { most.min(raw) } else { most };
            pieces = neighbours(&rest[..most.min(RAW_GROUP)], piece, sources);
        }
        let count = pieces.iter().map(|piece| piece.len() / CHUNK_BYTES).sum();
        let (group, others) = rest.split_at(count);
        rest = others;
        raw = raw.saturating_sub(count);
        let first = ChunkAddr::new(container, slot).ok_or(Status::INTERNAL_ERROR)?;
        let appended = log.append(first, count as u8, &pieces, compressor, setting).map_err(|why| {
            tracing::error!(?why, chunk = ?first, "a fragment can not be sealed");
            Status::INTERNAL_ERROR
        })?;
        added(first, group, appended)?;
    }
    Ok(())
}

fn prints_of(members: &[u16], fingerprints: &[Fingerprint]) -> SmallVec<[Fingerprint; GROUP]> {
    members.iter().map(|&at| fingerprints[usize::from(at)]).collect()
}

/// The chunks that were not found are in the slots from `first` on.
fn assign(found: &mut [Option<ChunkAddr>], members: &[u16], first: ChunkAddr) {
    for (n, &at) in members.iter().enumerate() {
        if found[usize::from(at)].is_none() {
            found[usize::from(at)] = first.plus(n as u16);
        }
    }
}
