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
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::codec::{self, Compression};
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
use reactor::memory::{Buf, SgList};
use reactor::sync::Mutex;
use smallvec::SmallVec;
use std::sync::Arc;

use crate::log::{DataLog, NotAppended, bound};
use crate::pool::Pool;
use crate::segments::{Purpose, Segment};
use crate::shard::{FIRST_CONTAINER, Needs};

/// Blocks that are written in one step.
pub(crate) const PIECE: usize = 32;
/// Chunks that are compressed together.
const GROUP: usize = 16;
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

/// Where a chunk of a write lies.
#[derive(Clone, Copy)]
struct Source<'a> {
    buf: &'a Buf,
    /// Chunk of that buffer.
    nth: usize,
    /// Block of the piece.
    block: usize,
}

/// What a write needs to know of its volume, read at its start.
#[derive(Clone)]
pub(crate) struct Target4k {
    pub volume: VolumeId,
    pub domain: DomainId,
    pub generation: Generation,
    pub blocks: u64,
    pub epoch: Epoch,
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
            epoch: shard.epoch(),
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
        let blocks = data.len_bytes() / CHUNK_BYTES;
        if lba + blocks as u64 > target.blocks {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        let mut at = lba;
        while !data.is_empty() {
            self.throttle().await?;
            let count = PIECE.min(data.len_bytes() / CHUNK_BYTES);
            let mut piece = data.split_to(count * CHUNK_BYTES);
            if piece.iter().any(|buf| !buf.len().is_multiple_of(CHUNK_BYTES)) {
                piece = piece.to_contiguous().into();
            }
            self.write_piece(target, at, &piece, host_key).await?;
            at += count as u64;
        }
        Ok(())
    }

    async fn write_piece(
        self: &Rc<Self>,
        target: &Target4k,
        lba: u64,
        piece: &SgList,
        host_key: HostKeyId,
    ) -> Result<(), Status> {
        let mut entries: SmallVec<[MapEntry; PIECE]> = SmallVec::new();
        let mut data: SmallVec<[&Chunk; PIECE]> = SmallVec::new();
        let mut sources: SmallVec<[Source<'_>; PIECE]> = SmallVec::new();
        for buf in piece.iter() {
            for (nth, chunk) in buf.as_chunks::<CHUNK_BYTES>().0.iter().enumerate() {
                let kind = match codec::pattern(chunk) {
                    Some(0) => Target::Zero,
                    Some(word) => Target::Pattern(word),
                    None => {
                        data.push(chunk);
                        sources.push(Source { buf, nth, block: entries.len() });
                        Target::Uncorrectable
                    }
                };
                entries.push(MapEntry { target: kind, birth: target.epoch, host_key });
            }
        }
        let mut fingerprints: SmallVec<[Fingerprint; PIECE]> = SmallVec::new();
        fingerprints.resize(data.len(), Fingerprint::NONE);
        target.hasher.hash_chunks(&data, &mut fingerprints);

        let lane = self.lane(target.domain, Purpose::Host);
        let mut found: SmallVec<[Option<ChunkAddr>; 32]> = SmallVec::new();
        let mut pins = self.pins();
        let mut dedupe = true;
        loop {
            let mut needs = Needs::new();
            {
                let shard = self.shard.borrow();
                shard
                    .needs_of_fill(target.volume, lba, entries.len() as u64, &mut needs)
                    .map_err(|_| Status::INVALID_NAMESPACE)?;
            }
            if !needs.is_empty() {
                self.load_all(needs, &mut pins).await?;
                continue;
            }
            if dedupe {
                let shard = self.shard.borrow();
                shard
                    .lookup(target.domain, &fingerprints, &mut found, &mut needs)
                    .map_err(|_| Status::INVALID_NAMESPACE)?;
            } else {
                found.clear();
                found.resize(fingerprints.len(), None);
            }
            if !needs.is_empty() {
                // A list that can not be read costs a second copy, not the write.
                dedupe = self.load_all(needs, &mut pins).await.is_ok();
                continue;
            }
            let new = found.iter().filter(|found| found.is_none()).count();
            let bytes = new.div_ceil(GROUP) * bound(0) + new * CHUNK_BYTES + bound(0);
            if new > 0 && !self.has_room(&lane, bytes) {
                self.make_ready(&lane, bytes).await?;
                continue;
            }
            break;
        }
        // From here on nothing waits.
        self.check_writable()?;
        self.store(target, &lane, &sources, &fingerprints, &mut found)?;
        for (found, source) in found.iter().zip(&sources) {
            entries[source.block].target = found.map_or(Target::Uncorrectable, Target::Chunk);
        }
        self.set_blocks(target, lba, &entries)
    }

    /// Stores the chunks that were not found, and fills in where they are.
    fn store(
        &self,
        target: &Target4k,
        lane: &Lane,
        data: &[Source<'_>],
        fingerprints: &[Fingerprint],
        found: &mut [Option<ChunkAddr>],
    ) -> Result<(), Status> {
        let mut new: SmallVec<[usize; PIECE]> = SmallVec::new();
        let mut same: SmallVec<[(usize, usize); 8]> = SmallVec::new();
        for at in 0..found.len() {
            if found[at].is_some() {
                continue;
            }
            match new.iter().find(|&&earlier| fingerprints[earlier] == fingerprints[at]) {
                Some(&earlier) => same.push((at, earlier)),
                None => new.push(at),
            }
        }
        let mut rest = new.as_slice();
        while !rest.is_empty() {
            let (container, slot) = self.container(lane);
            let count = rest.len().min(GROUP).min(SLOTS - usize::from(slot));
            let (group, others) = rest.split_at(count);
            rest = others;
            let first = ChunkAddr::new(container, slot).ok_or(Status::INTERNAL_ERROR)?;
            self.store_group(target, lane, first, group, data, fingerprints)?;
            for (n, &at) in group.iter().enumerate() {
                found[at] = first.plus(n as u16);
            }
            lane.container.set(Some((container, slot + count as u16)));
        }
        for (at, earlier) in same {
            found[at] = found[earlier];
        }
        Ok(())
    }

    fn store_group(
        &self,
        target: &Target4k,
        lane: &Lane,
        first: ChunkAddr,
        group: &[usize],
        data: &[Source<'_>],
        fingerprints: &[Fingerprint],
    ) -> Result<(), Status> {
        // Chunks that are neighbours in a buffer are one piece.
        let mut pieces: SmallVec<[&[u8]; GROUP]> = SmallVec::new();
        let prints: SmallVec<[Fingerprint; GROUP]> = group.iter().map(|&at| fingerprints[at]).collect();
        for run in
            group.chunk_by(|&a, &b| std::ptr::eq(data[a].buf, data[b].buf) && data[a].nth + 1 == data[b].nth)
        {
            let Source { buf, nth, .. } = data[run[0]];
            pieces.push(&buf[nth * CHUNK_BYTES..(nth + run.len()) * CHUNK_BYTES]);
        }
        let appended = {
            let mut compressor = self.compressor.borrow_mut();
            lane.log.append(first, group.len() as u8, &pieces, &mut compressor, target.compression)
        };
        let appended = appended.map_err(|why| {
            if let NotAppended::Failed(error) = &why {
                tracing::error!(pool = %self.name(), %error, "a fragment can not be sealed");
            }
            Status::INTERNAL_ERROR
        })?;
        let fragment = FragmentEntry {
            first_slot: first.slot(),
            chunks: group.len() as u8,
            codec: appended.codec,
            place: appended.place,
            unit_bytes: appended.unit_bytes,
        };
        let scope = Scope::Domain { domain: target.domain, generation: target.generation };
        let container = first.container();
        self.push(scope, &Record::FragmentAdd { container, fragment, fingerprints: &prints });
        let mut shard = self.shard.borrow_mut();
        shard
            .fragment_add(target.domain, target.generation, container, &fragment, &prints)
            .map_err(|error| self.inconsistent(&error))?;
        shard.index_fragment(target.domain, first, &prints);
        Ok(())
    }

    /// Points blocks of a volume to `entries`. Their leaves are in RAM, their chunks alive or just stored.
    fn set_blocks(&self, target: &Target4k, lba: u64, entries: &[MapEntry]) -> Result<(), Status> {
        let mut list: Vec<MapRun> = Vec::with_capacity(4);
        runs(entries.iter().copied(), &mut list);
        let scope = Scope::Domain { domain: target.domain, generation: target.generation };
        self.push(scope, &Record::MapSet { volume: target.volume, lba: Lba(lba), runs: &list });
        let now = self.now();
        let result = self.shard.borrow_mut().map_set(target.volume, Lba(lba), &list, now);
        result.map_err(|error| self.inconsistent(&error))
    }

    /// The lane's open container with a free slot; a new one if need be.
    fn container(&self, lane: &Lane) -> (ContainerId, u16) {
        match lane.container.get() {
            Some((container, slot)) if usize::from(slot) < SLOTS => (container, slot),
            old => {
                let mut shard = self.shard.borrow_mut();
                let Some(d) = shard.domains.get_mut(&lane.domain.0) else {
                    return (FIRST_CONTAINER, 0);
                };
                if let Some((old, _)) = old {
                    d.containers.unpin(old.get());
                    d.fingerprints.unpin(old.get());
                }
                d.draw_container = d.draw_container.max(d.next_container);
                let number = ContainerId::new(d.draw_container).unwrap_or(FIRST_CONTAINER);
                d.draw_container += 1;
                // Absent until its first fragment; kept in RAM while it is filled.
                d.containers.pin(number.get());
                d.fingerprints.pin(number.get());
                lane.container.set(Some((number, 0)));
                (number, 0)
            }
        }
    }

    /// Whether a container is being filled, so must not be dropped.
    pub(crate) fn is_filling(&self, domain: DomainId, container: ContainerId) -> bool {
        let lanes = self.lanes.borrow();
        lanes
            .values()
            .any(|lane| lane.domain == domain && lane.container.get().is_some_and(|open| open.0 == container))
    }

    fn has_room(&self, lane: &Lane, bytes: usize) -> bool {
        lane.log.room_for(bytes).is_ok()
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
                    let _one = lane.opening.lock().await;
                    if matches!(lane.log.room_for(bytes), Err(NotAppended::NoSegment)) {
                        self.open_data_segment(lane).await?;
                    }
                }
            }
        }
    }

    /// Closes the lane's segment and opens another.
    async fn open_data_segment(self: &Rc<Self>, lane: &Lane) -> Result<(), Status> {
        if let Some(old) = lane.log.finish() {
            let now = self.now();
            self.shard.borrow_mut().segments.close(old.number(), now);
        }
        let number = self.free_segment(lane.purpose).await?;
        let (addr, start, incarnation, generation) = {
            let mut shard = self.shard.borrow_mut();
            let generation = shard.domains.get(&lane.domain.0).map(|d| d.generation);
            let Some(generation) = generation else {
                let now = self.now();
                shard.segments.put_back(number, now);
                return Err(Status::INVALID_NAMESPACE);
            };
            let incarnation = shard.segments.draw_incarnation();
            (shard.segments.addr(number), shard.segments.start_bytes(number), incarnation, generation)
        };
        let header = self.segment_header(addr, incarnation, Class::Data, lane.domain, generation);
        let Some(key) = self.segment_key(&header) else { return Err(Status::INTERNAL_ERROR) };
        self.record(
            Scope::Pool,
            &Record::SegmentOpen {
                addr,
                incarnation,
                class: Class::Data,
                domain: lane.domain,
                generation,
                shard: ShardIx(0),
            },
        )?;
        let segment = Segment::open(key, start);
        self.shard.borrow_mut().segments.set_handle(segment.clone());
        lane.log.begin(segment, &header.encode(self.keys.block()));
        if self.is_short() {
            self.collect.notify_one();
        }
        Ok(())
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
            let before = self.space_progress();
            self.flush().await?;
            if self.space_progress() == before && purpose != Purpose::Host {
                // The collector itself: a checkpoint may free metadata segments.
                self.checkpoint().await?;
            } else if self.space_progress() == before {
                self.collect_once_or_wait().await;
            }
            let after = self.space_progress();
            fruitless = if after > before { 0 } else { fruitless + 1 };
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

    /// Unmaps blocks or makes them plaintext zeros. `lba` and `count` in 4 KiB blocks.
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
        let entry = MapEntry { target: kind, birth: target.epoch, host_key };
        let scope = Scope::Domain { domain: target.domain, generation: target.generation };
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
                if v.chunks + v.special == 0 {
                    return Ok(end);
                }
                for _ in 0..4096 {
                    let absent = matches!(v.tree.find(at / 512), crate::tree::Found::Absent);
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
