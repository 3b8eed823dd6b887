//! Garbage collection: makes free segments of segments of which little lives.
//!
//! Owns the collector task, which sleeps until free segments run short, takes the closed segment with the least live bytes
//! and empties it: live fragments of a data segment are sealed again elsewhere (`FragmentMove` records, volumes' maps do
//! not change), live nodes of a metadata segment are marked changed so that the next checkpoint writes them elsewhere
//! (which it is not asked to do at once, unless space is short: most of them would have changed anyway).
//! What lives is found by the plain headers in the segment and decided by the container tables and trees, never by the
//! headers alone. Chunks of a fragment that are dead are left behind: what lives of it is sealed anew.
//!
//! How fast that goes is [`crate::pace`]'s.

use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reactor::memory::{Buf, Prefetch, SgList, prefetch};
use cryptfold_reduce_format::block::BLOCK_BYTES;
use cryptfold_reduce_format::codec::{Codec, Compression};
use cryptfold_reduce_format::container::FragmentEntry;
use cryptfold_reduce_format::entry::{FragmentRaw, Record};
use cryptfold_reduce_format::fragment::{
    CHUNK_BYTES, FRAGMENT_HEADER_BYTES, FragmentHeader, MAX_FRAGMENT_BYTES,
};
use cryptfold_reduce_format::ids::{ChunkAddr, DomainId, Incarnation, POOL_DOMAIN};
use cryptfold_reduce_format::journal::Scope;
use cryptfold_reduce_format::node::{self, FANOUT, MAX_NODE_UNIT_BYTES, NODE_HEADER_BYTES, NodeHeader};
use cryptfold_reduce_format::segment::Class;
use cryptfold_reduce_format::segtable::{SEGMENTS_PER_LEAF, SegmentEntry};

use smallvec::{SmallVec, smallvec};

use crate::base::{Base, Reading};
use crate::load::Pins;
use crate::log::{Appended, DataLog, NotAppended, bound};
use crate::pace::Pace;
use crate::pool::{Life, Pool};
use crate::segments::{Purpose, Segment};

/// Bytes read at once from a segment that is collected: whole blocks.
const PART_BYTES: u32 = 256 << 10;
/// Of these, so many are on their way.
const PARTS_AHEAD: usize = 4;
/// Of a fragment with fewer dead chunks than this share, all chunks are moved: one in so many.
const TRIM_SHARE: usize = 8;
const _: () = assert!((PART_BYTES as usize).is_multiple_of(BLOCK_BYTES));

/// Segment handles kept in RAM (about 1 KiB each).
const MOST_HANDLES: usize = 8192;

/// Reads a segment front to back, ahead of what is asked for: a device answers in a later turn of the reactor at best, and a
/// collector that waited for each part would fall behind the hosts, who write in every turn.
struct Scanner<'a> {
    pool: &'a Pool,
    segment: &'a Segment,
    end: u32,
    /// What was read and not passed: its buffers (a device may lend single pages), from `at` on.
    window: SgList,
    at: u32,
    have: usize,
    /// The parts that are being read, in order, and where the one after them begins.
    ahead: VecDeque<Reading>,
    next: u32,
    /// What the caller wants to see in one piece.
    unit: Vec<u8>,
}

impl<'a> Scanner<'a> {
    fn new(pool: &'a Pool, segment: &'a Segment, end: u32) -> Self {
        let (window, ahead) = (SgList::new(), VecDeque::new());
        Scanner { pool, segment, end, window, at: 0, have: 0, ahead, next: 0, unit: Vec::new() }
    }

    /// Makes the window begin at `at`, which is not before an earlier one, with `len` bytes, or fewer at the end: how many.
    async fn seek(&mut self, at: u32, len: usize) -> Result<usize, Status> {
        let len = len.min(self.end.saturating_sub(at) as usize);
        let skip = (at - self.at) as usize;
        while self.have < skip + len {
            while self.ahead.len() < PARTS_AHEAD && self.next < self.end {
                let take = PART_BYTES.min(self.end - self.next);
                let at = self.segment.start_bytes + u64::from(self.next);
                self.ahead.push_back(self.pool.base.start_read(at, take as usize));
                self.next += take;
            }
            let Some(reading) = self.ahead.pop_front() else { return Err(Status::INTERNAL_ERROR) };
            let part = Base::finish_list(reading).await?.0;
            self.have += part.len_bytes();
            self.window.append(part);
        }
        drop(self.window.split_to(skip));
        (self.at, self.have) = (at, self.have - skip);
        Ok(len)
    }

    /// Up to `len` bytes at `at`; fewer at the end.
    async fn head(&mut self, at: u32, len: usize) -> Result<&[u8], Status> {
        let len = self.seek(at, len).await?;
        self.unit.clear();
        for buf in self.window.iter() {
            let more = (len - self.unit.len()).min(buf.len());
            self.unit.extend_from_slice(&buf[..more]);
            if self.unit.len() == len {
                break;
            }
        }
        Ok(&self.unit)
    }

    /// The buffers of up to `len` bytes at `at`. They are on their way to the cache.
    async fn unit(&mut self, at: u32, len: usize) -> Result<SgList, Status> {
        let len = self.seek(at, len).await?;
        let unit = self.window.slice(0..len);
        unit.iter().for_each(|buf| prefetch(&buf[..], Prefetch::Read));
        Ok(unit)
    }
}

/// A live fragment that is moved when the next one has been found: until then its bytes come from memory.
struct Live<'a> {
    at: u32,
    header: FragmentHeader,
    sealed: SgList,
    /// Keeps its container in RAM.
    _pins: Pins<'a>,
}

/// Neighbouring slots.
type Runs = SmallVec<[Range<u16>; 4]>;

/// Why a fragment stays where it is.
enum NotMoved {
    /// It does not open.
    Damaged(String),
    /// The log has no room for it, which was made before.
    Log,
}

impl From<NotAppended> for NotMoved {
    fn from(why: NotAppended) -> NotMoved {
        match why {
            NotAppended::Failed(error) => NotMoved::Damaged(error.to_string()),
            _ => NotMoved::Log,
        }
    }
}

fn next_block(at: u32) -> u32 {
    (at / BLOCK_BYTES as u32 + 1) * BLOCK_BYTES as u32
}

impl Pool {
    /// The collector task.
    pub(crate) async fn run_collector(self: Rc<Self>) {
        while !matches!(self.life.get(), Life::Closed | Life::Failed) {
            if !self.is_short() {
                self.see_shortage();
                self.collect.notified().await;
                continue;
            }
            let _busy = self.enter();
            self.wait_for_audit().await;
            if matches!(self.life.get(), Life::Closed | Life::Failed) {
                continue;
            }
            let progress = self.collect_one().await;
            self.rest(!matches!(progress, Ok(true)));
            drop(_busy);
            self.collections.set(self.collections.get() + 1);
            self.wake_waiters();
            match progress {
                Ok(true) => reactor::yield_now().await,
                Ok(false) => self.collect.notified().await,
                Err(status) => {
                    tracing::warn!(pool = %self.name(), %status, "garbage collection was interrupted");
                    self.collect.notified().await;
                }
            }
        }
    }

    /// Lets the collector do one segment (or find that there is none worth it) and waits for it.
    pub(crate) async fn collect_once_or_wait(&self) {
        let before = self.collections.get();
        self.collect.notify_one();
        while self.collections.get() == before && self.is_short() && self.check_alive().is_ok() {
            self.wait_for_audit().await;
            self.wait_progress().await;
        }
    }

    /// Empties one segment. False: there is none of which enough is dead.
    async fn collect_one(self: &Rc<Self>) -> Result<bool, Status> {
        let gain = self.worthwhile();
        let beside = self.emptying_metadata.get();
        let metadata = !beside && self.commits.checkpoints.get() >= self.metadata_after.get();
        let victim = self.shard.borrow().segments.emptiest(gain, metadata);
        let Some(number) = victim else {
            // Only a checkpoint makes room now: hosts do not wait for the collector.
            self.rest(true);
            self.metadata_urgent.set(beside);
            while self.emptying_metadata.get() {
                self.check_alive()?;
                self.wait_progress().await;
            }
            return Ok(beside);
        };
        let Some(entry) = self.shard.borrow().segments.entry(number).copied() else { return Ok(false) };
        let segment = match self.segment(number).await {
            Err(Status::UNRECOVERED_READ) => {
                // Its header is damaged: nothing in it can be moved.
                self.shard.borrow_mut().segments.spoil(number);
                return Ok(true);
            }
            segment => segment?,
        };
        self.rest(false);
        if entry.class == Some(Class::Metadata) {
            self.collect_metadata(&segment, &entry).await?;
            drop(segment);
            self.finish_metadata(number, entry.incarnation);
            return Ok(true);
        }
        let started = reactor::now();
        self.collect_data(&segment, &entry).await?;
        drop(segment);
        self.finish_segment(number, entry.incarnation);
        tracing::debug!(
            pool = %self.name(), segment = number, live_bytes = entry.live_bytes,
            free_segments = self.shard.borrow().segments.free_count(),
            ms = (reactor::now() - started).as_millis() as u64, "segment collected"
        );
        Ok(true)
    }

    /// Nodes of a metadata segment have been marked: the next checkpoint, which others wait for as well, empties it. Data goes
    /// on being collected meanwhile.
    fn finish_metadata(self: &Rc<Self>, number: u32, incarnation: Incarnation) {
        self.emptying_metadata.set(true);
        self.metadata_urgent.set(false);
        let commits = &self.commits;
        let target = commits.checkpoints.get() + 1 + u64::from(commits.checkpointing.get());
        let failures = commits.failures.get();
        let pool = self.clone();
        self.background(async move {
            let commits = &pool.commits;
            let ended = || {
                commits.checkpoints.get() >= target
                    || commits.failures.get() > failures + 1
                    || !matches!(pool.life.get(), Life::Open)
            };
            while !ended() {
                if pool.metadata_urgent.get() || pool.shortage() > 0.5 {
                    commits.checkpoint_wanted.set(true);
                    pool.wait_progress().await;
                } else {
                    commits.done.notified().await;
                }
            }
            if commits.checkpoints.get() >= target {
                pool.finish_segment(number, incarnation);
            } else {
                pool.metadata_after.set(commits.checkpoints.get() + 1);
            }
            pool.emptying_metadata.set(false);
            pool.wake_waiters();
        });
    }

    /// A segment has been gone through: what is left in it can not be moved. It may be in use again already.
    fn finish_segment(&self, number: u32, incarnation: Incarnation) {
        let left = {
            let shard = self.shard.borrow();
            let entry = shard.segments.entry(number).filter(|entry| entry.incarnation == incarnation);
            entry.map_or(0, |entry| entry.live_bytes)
        };
        if left > 0 {
            tracing::warn!(
                pool = %self.name(), segment = number, left_bytes = left,
                "a segment could not be emptied; it is left alone until the pool is opened again"
            );
            self.shard.borrow_mut().segments.spoil(number);
        } else {
            self.emptied.set(self.emptied.get() + 1);
            self.see_shortage();
            self.ready_segments();
        }
    }

    /// Moves what lives in a data segment, as far as it can be read: the rest stays.
    pub(crate) async fn collect_data(
        self: &Rc<Self>,
        segment: &Arc<Segment>,
        entry: &SegmentEntry,
    ) -> Result<(), Status> {
        match self.move_all(segment, entry).await {
            Err(Status::UNRECOVERED_READ) => Ok(()),
            moved => moved,
        }
    }

    async fn move_all(self: &Rc<Self>, segment: &Arc<Segment>, entry: &SegmentEntry) -> Result<(), Status> {
        let mut scanner = Scanner::new(self, segment, entry.used_bytes.min(self.segment_bytes));
        let mut at = BLOCK_BYTES as u32;
        let mut pace = Pace::new(self, entry.live_bytes);
        let (mut found, mut sealed) = (None, Vec::new());
        while at + (FRAGMENT_HEADER_BYTES as u32) < scanner.end {
            let head = scanner.head(at, FRAGMENT_HEADER_BYTES).await?;
            let Ok(header) = FragmentHeader::parse(head) else {
                at = next_block(at);
                continue;
            };
            let unit = header.unit_bytes(&segment.key);
            if unit > MAX_FRAGMENT_BYTES || at as usize + unit > scanner.end as usize {
                at = next_block(at);
                continue;
            }
            let mut pins = self.pins();
            let container = header.first.container().get();
            self.load_leaf(node::Tree::Containers, entry.domain.0, container, &mut pins).await?;
            let spent;
            if self.fragment_at(entry.domain, segment, at, header.first).is_some() {
                let live = Live { at, header, sealed: scanner.unit(at, unit).await?, _pins: pins };
                if let Some(before) = found.replace(live) {
                    self.move_live(entry.domain, segment, &before, &mut sealed).await?;
                }
                spent = pace.moved(self, unit);
            } else {
                spent = pace.passed(unit.min(BLOCK_BYTES) / 8);
            }
            if spent {
                self.throttle_background().await?;
                pace.renew(self);
            }
            at += unit as u32;
        }
        match found {
            Some(last) => self.move_live(entry.domain, segment, &last, &mut sealed).await,
            None => Ok(()),
        }
    }

    async fn move_live(
        self: &Rc<Self>,
        domain: DomainId,
        segment: &Arc<Segment>,
        live: &Live<'_>,
        sealed: &mut Vec<u8>,
    ) -> Result<(), Status> {
        sealed.clear();
        live.sealed.iter().for_each(|buf| sealed.extend_from_slice(buf));
        let bytes = self.move_fragment(domain, segment, live.at, &live.header, sealed).await?;
        self.moved_bytes.set(self.moved_bytes.get() + bytes);
        Ok(())
    }

    /// The fragment that lies at `at`, and the runs of its slots that live, by its container (which is in RAM): a header
    /// proves nothing. A fragment of which nearly all lives counts as one run.
    fn fragment_at(
        &self,
        domain: DomainId,
        segment: &Segment,
        at: u32,
        first: ChunkAddr,
    ) -> Option<(FragmentEntry, Runs)> {
        let shard = self.shard.borrow();
        let container = shard.domains.get(&domain.0)?.containers.peek(first.container().get())?;
        let fragment = container.fragment_of(first.slot())?;
        if fragment.first_slot != first.slot() || fragment.place != segment.key.place(at) {
            return None;
        }
        let all = usize::from(fragment.chunks);
        let live = container.live_in(&fragment);
        let mut runs = Runs::new();
        if live > 0 && (all - live) * TRIM_SHARE < all {
            runs.push(fragment.first_slot..fragment.end_slot());
            return Some((fragment, runs));
        }
        for slot in (fragment.first_slot..fragment.end_slot()).filter(|&slot| container.refs(slot) > 0) {
            match runs.last_mut().filter(|run| run.end == slot) {
                Some(run) => run.end += 1,
                None => runs.push(slot..slot + 1),
            }
        }
        Some((fragment, runs))
    }

    /// Moves what lives of the fragment at `at`; the bytes that it had, 0 if it is where it was.
    pub(crate) async fn move_fragment(
        self: &Rc<Self>,
        domain: DomainId,
        segment: &Arc<Segment>,
        at: u32,
        header: &FragmentHeader,
        sealed: &mut [u8],
    ) -> Result<u64, Status> {
        let lane = self.lane(domain, Purpose::Collector);
        let chunks = usize::from(header.chunks);
        // As many fragments as it may fall apart into.
        self.make_ready(&lane, bound(chunks) + chunks / 2 * bound(0)).await?;
        self.check_alive()?;
        // Looked at again: hosts went on meanwhile.
        let Some((old, runs)) = self.fragment_at(domain, segment, at, header.first) else { return Ok(0) };
        let generation = self.shard.borrow().domains.get(&domain.0).map(|d| d.generation);
        let Some(generation) = generation else { return Ok(0) };
        let scope = Scope::Domain { domain, generation };
        let whole = runs.first().is_some_and(|run| run.len() == chunks);
        let moved = if whole {
            lane.log.append_moved(segment, at, sealed).map_err(NotMoved::from).map(|(_, appended)| {
                let Appended { place, unit_bytes, .. } = appended;
                smallvec![FragmentRaw::from(&FragmentEntry { place, unit_bytes, ..old })]
            })
        } else {
            self.append_runs(&lane.log, segment, (&old, header.first), &runs, sealed)
        };
        match moved {
            // None when nothing lives: its writer died before it was referenced.
            Ok(fragments) => {
                self.record(scope, &Record::FragmentMove { first: header.first, fragments: &fragments })?;
                Ok(u64::from(old.unit_bytes))
            }
            Err(NotMoved::Damaged(error)) => {
                // It stays where it is.
                self.fragment_damaged(domain, &old, header.first, &error);
                Ok(0)
            }
            Err(NotMoved::Log) => Err(Status::INTERNAL_ERROR),
        }
    }

    /// Seals runs of a fragment's chunks anew, each as a fragment of its own.
    fn append_runs(
        &self,
        log: &Rc<DataLog>,
        segment: &Segment,
        (old, first): (&FragmentEntry, ChunkAddr),
        runs: &Runs,
        sealed: &[u8],
    ) -> Result<SmallVec<[FragmentRaw; 4]>, NotMoved> {
        if runs.is_empty() {
            return Ok(SmallVec::new());
        }
        let mut plain = Buf::alloc(usize::from(old.chunks) * CHUNK_BYTES);
        let out = plain.get_mut().ok_or(NotMoved::Log)?;
        let mut decoder = self.core.decoder.borrow_mut();
        decoder.decode(segment, old, first, sealed, out).map_err(NotMoved::Damaged)?;
        let setting = match old.codec {
            Codec::Raw => Compression::Off,
            Codec::Lz4 => Compression::Lz4,
            Codec::Zstd => Compression::Adaptive,
        };
        let mut compressor = self.core.compressor.borrow_mut();
        let mut fragments = SmallVec::new();
        for run in runs {
            let from = usize::from(run.start - old.first_slot) * CHUNK_BYTES;
            let bytes = &plain[from..from + run.len() * CHUNK_BYTES];
            let addr = ChunkAddr::new(first.container(), run.start).ok_or(NotMoved::Log)?;
            let Appended { place, unit_bytes, codec } =
                log.append(addr, run.len() as u8, &[bytes], &mut compressor, setting)?;
            let new =
                FragmentEntry { first_slot: run.start, chunks: run.len() as u8, codec, place, unit_bytes };
            fragments.push(FragmentRaw::from(&new));
        }
        Ok(fragments)
    }

    /// Background work waits while hosts have to wait.
    async fn throttle_background(self: &Rc<Self>) -> Result<(), Status> {
        self.check_alive()?;
        reactor::yield_now().await;
        if self.dirty_bytes() > 2 * self.dirty_limit() {
            self.checkpoint().await?;
        }
        Ok(())
    }

    pub(crate) async fn collect_metadata(
        self: &Rc<Self>,
        segment: &Arc<Segment>,
        entry: &SegmentEntry,
    ) -> Result<(), Status> {
        // Of the pool's own segments the table does not know the end: it is written before they are.
        let end = if entry.domain == POOL_DOMAIN {
            self.segment_bytes
        } else {
            entry.used_bytes.min(self.segment_bytes)
        };
        let mut scanner = Scanner::new(self, segment, end);
        let mut pace = Pace::new(self, entry.live_bytes);
        let mut at = BLOCK_BYTES as u32;
        while at + (NODE_HEADER_BYTES as u32) < scanner.end {
            let head = scanner.head(at, NODE_HEADER_BYTES).await?;
            let parsed = NodeHeader::parse(head).ok().map(|header| (header.unit_bytes(&segment.key), header));
            let Some((unit, header)) = parsed.filter(|(unit, _)| *unit <= MAX_NODE_UNIT_BYTES) else {
                at = next_block(at);
                continue;
            };
            self.touch_node(segment, at, &header).await?;
            // Hosts that wait go on meanwhile: the next checkpoint makes the room.
            pace.moved(self, unit);
            if self.dirty_bytes() > self.dirty_limit() {
                self.checkpoint().await?;
            }
            at += unit as u32;
        }
        Ok(())
    }

    /// Makes the next checkpoint write the node anew, if it is the current one.
    async fn touch_node(&self, segment: &Segment, at: u32, header: &NodeHeader) -> Result<(), Status> {
        let id = header.id;
        let Ok(owner) = u32::try_from(id.owner) else { return Ok(()) };
        match id.tree {
            node::Tree::Segments => {
                let leaf = id.index << (8 * u32::from(id.level).min(7));
                if (leaf as usize) < (self.shard.borrow().segments.len() as usize).div_ceil(SEGMENTS_PER_LEAF)
                {
                    self.shard.borrow_mut().segments.touch_page(leaf as usize);
                }
                return Ok(());
            }
            node::Tree::Map | node::Tree::Containers | node::Tree::Fingerprints => {}
            // The rest of the catalogue is written whole by every checkpoint.
            _ => return Ok(()),
        }
        // The parents decide; loading them is part of the look.
        let place = segment.key.place(at);
        let mut level = id.level;
        let mut index = id.index;
        match self.stored(id.tree, owner, level, index).await? {
            Some(ptr) if ptr.place == place => {}
            _ => return Ok(()),
        }
        // An interior node is written when a leaf below it is.
        while level > 0 {
            let Some(node) = self.load_inner(id.tree, owner, level, index).await? else { return Ok(()) };
            let Some((child, _)) = node.iter().next() else { return Ok(()) };
            index = index * FANOUT as u64 + child as u64;
            level -= 1;
        }
        let mut pins = self.pins();
        self.load_leaf(id.tree, owner, index, &mut pins).await?;
        self.with_tree(id.tree, owner, |tree| {
            if tree.is_ready(index) {
                tree.touch(index);
            }
        });
        Ok(())
    }

    /// Drops containers that have lost their last reference. Runs after each checkpoint.
    pub(crate) async fn sweep(self: Rc<Self>) {
        let emptied = std::mem::take(&mut self.shard.borrow_mut().emptied);
        for (domain, container) in emptied {
            if self.check_writable().is_err() {
                return;
            }
            if self.auditing.get() || self.is_filling(domain, container) {
                // It comes again when it is full, or when the pool is opened the next time.
                self.shard.borrow_mut().emptied.push((domain, container));
                continue;
            }
            let mut pins = self.pins();
            if self.load_leaf(node::Tree::Containers, domain.0, container.get(), &mut pins).await.is_err() {
                continue;
            }
            let scope = {
                let shard = self.shard.borrow();
                let Some(d) = shard.domains.get(&domain.0) else { continue };
                match d.containers.peek(container.get()) {
                    Some(leaf) if leaf.live() == 0 && leaf.used() > 0 => d.scope(),
                    _ => continue,
                }
            };
            if self.is_filling(domain, container)
                || self.record(scope, &Record::ContainerDrop { container }).is_err()
            {
                continue;
            }
        }
    }

    /// What follows a checkpoint.
    pub(crate) fn after_checkpoint(self: &Rc<Self>) {
        if !self.shard.borrow().emptied.is_empty() && self.life.get() == Life::Open {
            let pool = self.clone();
            self.background(async move {
                let _busy = pool.enter();
                pool.clone().sweep().await;
            });
        }
        self.shard.borrow_mut().segments.bound_handles(MOST_HANDLES);
        // What was changed can go now.
        self.eviction_pause.set(0);
        self.keep_budget();
        if self.is_short() {
            self.collect.notify_one();
        }
        self.start_late_if_worth_it();
    }
}
