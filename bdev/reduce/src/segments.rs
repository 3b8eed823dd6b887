//! The segment table: which segment holds what, how much of it lives, and which may be opened next.
//!
//! Owns the table of the pool's (one) device and the handles of segments in use.
//!
//! Two kinds of change, which never touch the same segment at once:
//! - *data* segments change by journal records (opened, bytes added, live bytes up and down): a fold, repeated on recovery;
//! - *metadata* segments change with checkpoints: what checkpoint `g` writes and replaces takes effect when `g` is durable.
//!
//! A segment is free when nothing in it lives and nobody fills it. It may be opened again when that has been durable
//! (`free_since` is a durable batch, so no recovery can want its old content) and nobody else holds its handle: readers,
//! writers and the collector keep an `Arc` of it, so a handle is also a pin.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use cryptfold_reactor::Handle;
use cryptfold_reduce_format::block::BLOCK_BYTES;
use cryptfold_reduce_format::ids::{
    DeviceIx, DomainId, Generation, Incarnation, OwnerEpoch, SegmentAddr, SegmentNo, Sequence,
};
use cryptfold_reduce_format::sealed::SegmentKey;
use cryptfold_reduce_format::segment::Class;
use cryptfold_reduce_format::segtable::{SEGMENTS_PER_LEAF, SegmentEntry, SegmentState};
use cryptfold_reduce_format::superblock::Geometry;

/// A segment in use. Shared between cores; whoever holds it keeps the segment from being opened again.
pub(crate) struct Segment {
    /// Its key and address.
    pub key: SegmentKey,
    /// Byte offset on the device.
    pub start_bytes: u64,
    /// Bytes that can be read from the device; `u32::MAX` once it is closed.
    written: AtomicU32,
    /// Who fills it, if that is not the pool's home.
    pub filler: Option<Filler>,
}

/// Another core that fills a segment: it has what is not written yet.
pub(crate) struct Filler {
    pub core: Handle,
    pub pool: u64,
    pub domain: DomainId,
}

impl Segment {
    /// A segment that is only read.
    pub fn sealed(key: SegmentKey, start_bytes: u64) -> Arc<Segment> {
        Arc::new(Segment { key, start_bytes, written: AtomicU32::new(u32::MAX), filler: None })
    }
    /// A segment that begins to be filled.
    pub fn open(key: SegmentKey, start_bytes: u64, filler: Option<Filler>) -> Arc<Segment> {
        Arc::new(Segment { key, start_bytes, written: AtomicU32::new(0), filler })
    }
    /// Number on its device.
    pub fn number(&self) -> u32 {
        self.key.addr().segment.0
    }
    /// Whether everything below `end` can be read from the device.
    #[inline]
    pub fn is_written(&self, end: u32) -> bool {
        end <= self.written.load(Ordering::Acquire)
    }
    /// Everything below `end` is on the device now.
    pub fn set_written(&self, end: u32) {
        self.written.store(end, Ordering::Release);
    }
}

struct Row {
    entry: SegmentEntry,
    handle: Option<Arc<Segment>>,
    /// Journal batch that made it free.
    free_since: Sequence,
    /// Being filled, by a data log or by checkpoints.
    open: bool,
    /// In the queue of free segments.
    queued: bool,
    /// Collection failed: not tried again in this opening.
    spoilt: bool,
    /// Its header was found damaged.
    damaged: bool,
}

impl Row {
    /// Nobody has it, and it may be opened at once if it is free.
    fn new(entry: SegmentEntry) -> Row {
        Row {
            entry,
            handle: None,
            free_since: Sequence(0),
            open: false,
            queued: false,
            spoilt: false,
            damaged: false,
        }
    }

    /// Whether somebody else has its handle.
    fn is_pinned(&self) -> bool {
        let pinned = self.handle.as_ref().is_some_and(|h| Arc::strong_count(h) > 1);
        // Whoever let go of it on another core has done with the segment before.
        fence(Ordering::Acquire);
        pinned
    }
}

/// For whom a segment is opened: what of the reserve they may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// Data that a host writes.
    Host,
    /// Data that the collector moves.
    Collector,
    /// Metadata.
    Checkpoint,
}

/// See the module's head.
pub(crate) struct Segments {
    geometry: Geometry,
    rows: Vec<Row>,
    free: VecDeque<u32>,
    /// Free ones that are kept for the checkpoint under way; `free_count` counts them.
    set_aside: VecDeque<u32>,
    free_count: usize,
    usable: usize,
    next_incarnation: u64,
    /// Domains, and the pool itself: each has segments of its own.
    streams: usize,
    dirty_pages: Vec<bool>,
    /// Sum over data segments.
    pub live_data_bytes: u64,
    /// Sum over metadata segments.
    pub live_meta_bytes: u64,
}

/// The entry of a segment that was never opened.
fn fresh(geometry: &Geometry, number: u32) -> SegmentEntry {
    let reserved = geometry.is_reserved(SegmentNo(number));
    let state = if reserved { SegmentState::Reserved } else { SegmentState::Free };
    SegmentEntry { state, ..SegmentEntry::default() }
}

fn addr(number: u32) -> SegmentAddr {
    SegmentAddr { device: DeviceIx(0), segment: SegmentNo(number) }
}

impl Segments {
    /// The table of a new pool.
    pub fn new(geometry: Geometry, epoch: OwnerEpoch) -> Segments {
        let entries = (0..geometry.segments).map(|number| fresh(&geometry, number)).collect();
        Segments::from_entries(geometry, entries, epoch)
    }

    /// The table as a checkpoint has it; what a device that has grown since has more is free. Nothing is open; what is free now may be opened at once.
    pub fn from_entries(geometry: Geometry, entries: Vec<SegmentEntry>, epoch: OwnerEpoch) -> Segments {
        let known = entries.len() as u32;
        let more = (known..geometry.segments).map(|number| fresh(&geometry, number));
        let rows: Vec<Row> = entries.into_iter().chain(more).map(Row::new).collect();
        let pages = rows.len().div_ceil(SEGMENTS_PER_LEAF);
        let mut table = Segments {
            geometry,
            usable: 0,
            free: VecDeque::new(),
            set_aside: VecDeque::new(),
            free_count: 0,
            // Unique over the pool's life: owner epochs are.
            next_incarnation: epoch.0 << 32 | 1,
            streams: 2,
            dirty_pages: vec![true; pages],
            live_data_bytes: 0,
            live_meta_bytes: 0,
            rows,
        };
        for n in 0..table.rows.len() {
            let entry = &table.rows[n].entry;
            if !matches!(entry.state, SegmentState::Reserved | SegmentState::Bad) {
                table.usable += 1;
                match entry.class {
                    Some(Class::Metadata) => table.live_meta_bytes += u64::from(entry.live_bytes),
                    _ => table.live_data_bytes += u64::from(entry.live_bytes),
                }
            }
            table.settle(n as u32, Sequence(0));
        }
        table
    }

    /// Byte offset of a segment on the device.
    pub fn start_bytes(&self, number: u32) -> u64 {
        self.geometry.offset_bytes(SegmentNo(number))
    }
    /// Segments of the device, reserved ones included.
    pub fn len(&self) -> u32 {
        self.rows.len() as u32
    }
    /// Segments that can hold something.
    pub fn usable(&self) -> usize {
        self.usable
    }
    /// Segments in which nothing lives (not all may be durable yet).
    pub fn free_count(&self) -> usize {
        self.free_count
    }
    /// A segment's entry.
    pub fn entry(&self, number: u32) -> Option<&SegmentEntry> {
        self.rows.get(number as usize).map(|row| &row.entry)
    }
    /// All entries.
    pub fn entries(&self) -> impl Iterator<Item = &SegmentEntry> {
        self.rows.iter().map(|row| &row.entry)
    }
    /// The handle, if the segment is in use.
    pub fn handle(&self, number: u32) -> Option<Arc<Segment>> {
        self.rows.get(number as usize)?.handle.clone()
    }

    /// Remembers a handle that was made from the segment's header.
    pub fn set_handle(&mut self, handle: Arc<Segment>) {
        if let Some(row) = self.rows.get_mut(handle.number() as usize) {
            row.handle = Some(handle);
        }
    }

    /// Drops the handles that nobody uses if there are more than `most`; they are made again from the headers.
    pub fn bound_handles(&mut self, most: usize) {
        if self.rows.iter().filter(|row| row.handle.is_some()).count() <= most {
            return;
        }
        for row in &mut self.rows {
            if !row.open && !row.is_pinned() {
                row.handle = None;
            }
        }
    }

    fn is_free(row: &Row) -> bool {
        !row.open
            && row.entry.live_bytes == 0
            && !matches!(row.entry.state, SegmentState::Reserved | SegmentState::Bad)
    }

    /// Queues the segment if it has become free.
    fn settle(&mut self, number: u32, now: Sequence) {
        let row = &mut self.rows[number as usize];
        if !Segments::is_free(row) {
            return;
        }
        // Also of one that was queued already and has been referenced since.
        row.free_since = row.free_since.max(now);
        if !row.queued {
            row.queued = true;
            self.free.push_back(number);
            self.free_count += 1;
        }
    }

    /// Forgets which queued segments are not free any more: a replay uses segments without taking them.
    pub fn recount(&mut self) {
        let rows = &mut self.rows;
        self.free.retain(|&number| {
            let row = &mut rows[number as usize];
            row.queued = Segments::is_free(row);
            row.queued
        });
        self.free_count = self.free.len();
    }

    /// The device has become larger: `geometry` has more segments, of the same size.
    pub fn grow(&mut self, geometry: Geometry) {
        let first = self.rows.len() as u32;
        for number in first..geometry.segments {
            self.rows.push(Row::new(fresh(&geometry, number)));
            if self.rows[number as usize].entry.state == SegmentState::Free {
                self.usable += 1;
            }
            self.settle(number, Sequence(0));
        }
        // The page that was the last one is longer now.
        let page = first as usize / SEGMENTS_PER_LEAF;
        self.dirty_pages.resize(self.rows.len().div_ceil(SEGMENTS_PER_LEAF), true);
        self.touch_page(page);
        self.geometry = geometry;
    }

    fn touch(&mut self, number: u32) {
        self.dirty_pages[number as usize / SEGMENTS_PER_LEAF] = true;
    }

    /// Segments that hosts must leave to metadata, deletion and collection, and those of them that the collector may not
    /// take either.
    ///
    /// The collector has an open segment for each domain, and so have checkpoints: if hosts could take these too, the
    /// collector could not begin, and nothing would ever become free again.
    pub fn reserve(&self) -> (usize, usize) {
        let checkpoint = (self.usable / 50).max(4);
        (checkpoint + (self.usable / 50).max(2 * self.streams), checkpoint)
    }

    /// Tells how many domains there are.
    pub fn set_domains(&mut self, count: usize) {
        self.streams = count + 1;
    }

    /// Takes a free segment. `None`: there is none that may be opened now.
    ///
    /// `durable`: newest durable batch; a checkpoint passes the batch that it is the state of, because what became free
    /// later is not free in it.
    pub fn take_free(&mut self, purpose: Purpose, durable: Sequence) -> Option<u32> {
        let (host, collector) = self.reserve();
        let floor = match purpose {
            Purpose::Host => host,
            Purpose::Collector => collector,
            Purpose::Checkpoint => 0,
        };
        if self.free_count <= floor {
            return None;
        }
        if purpose == Purpose::Checkpoint
            && let Some(number) = self.take_of(|table| &mut table.set_aside, durable)
        {
            return Some(number);
        }
        self.take_of(|table| &mut table.free, durable)
    }

    /// Takes the first of a queue that may be opened.
    fn take_of(&mut self, queue: fn(&mut Self) -> &mut VecDeque<u32>, durable: Sequence) -> Option<u32> {
        for _ in 0..queue(self).len() {
            let number = queue(self).pop_front()?;
            let row = &mut self.rows[number as usize];
            if !Segments::is_free(row) {
                // Something in it was referenced again by a writer that had it pinned.
                row.queued = false;
                self.free_count -= 1;
                continue;
            }
            if row.free_since > durable || row.is_pinned() {
                queue(self).push_back(number);
                continue;
            }
            row.queued = false;
            row.handle = None;
            row.open = true;
            row.spoilt = false;
            row.damaged = false;
            self.free_count -= 1;
            return Some(number);
        }
        None
    }

    /// Keeps free segments, of those that only checkpoints may take, for a checkpoint of at most `bytes` of the present state, until
    /// [`Segments::give_back`]: others would take the oldest first, and what becomes free while it is written is not free in it.
    pub fn set_aside(&mut self, bytes: usize) {
        let (_, reserve) = self.reserve();
        let most = reserve.min(bytes / self.geometry.segment_bytes as usize + self.streams + 1);
        while self.set_aside.len() < most
            && let Some(number) = self.free.pop_front()
        {
            self.set_aside.push_back(number);
        }
    }

    /// The checkpoint has ended.
    pub fn give_back(&mut self) {
        while let Some(number) = self.set_aside.pop_back() {
            self.free.push_front(number);
        }
    }

    /// Free segments that may be opened now.
    pub fn ready_count(&self, durable: Sequence) -> usize {
        self.free
            .iter()
            .filter(|&&number| {
                let row = &self.rows[number as usize];
                Segments::is_free(row) && row.free_since <= durable && !row.is_pinned()
            })
            .count()
    }

    /// A number for the next opening: never used before for any segment.
    pub fn draw_incarnation(&mut self) -> Incarnation {
        self.next_incarnation += 1;
        Incarnation(self.next_incarnation - 1)
    }

    /// Gives a taken segment back unused.
    pub fn put_back(&mut self, number: u32, now: Sequence) {
        self.rows[number as usize].open = false;
        self.settle(number, now);
    }

    // ---- the fold over records

    /// A data segment was opened. False: the record does not fit the table.
    pub fn apply_open(
        &mut self,
        number: u32,
        incarnation: Incarnation,
        domain: DomainId,
        generation: Generation,
    ) -> bool {
        let Some(row) = self.rows.get_mut(number as usize) else { return false };
        let gone = matches!(row.entry.state, SegmentState::Reserved | SegmentState::Bad);
        if gone || row.entry.live_bytes != 0 {
            return false;
        }
        row.entry = SegmentEntry {
            state: SegmentState::Open,
            class: Some(Class::Data),
            domain,
            generation,
            incarnation,
            used_bytes: BLOCK_BYTES as u32,
            live_bytes: 0,
            ..SegmentEntry::default()
        };
        self.touch(number);
        true
    }

    /// Bytes up to `end` have been appended to a data segment.
    pub fn apply_used(&mut self, number: u32, end: u32) {
        let Some(row) = self.rows.get_mut(number as usize) else { return };
        row.entry.used_bytes = row.entry.used_bytes.max(end);
        self.touch(number);
    }

    /// A fragment of `bytes` came alive or died. False: more die than live.
    pub fn apply_live(&mut self, number: u32, bytes: u32, alive: bool, now: Sequence) -> bool {
        let Some(row) = self.rows.get_mut(number as usize) else { return false };
        let live = if alive {
            row.entry.live_bytes.checked_add(bytes)
        } else {
            row.entry.live_bytes.checked_sub(bytes)
        };
        let Some(live) = live else { return false };
        row.entry.live_bytes = live;
        row.entry.used_bytes = row.entry.used_bytes.max(live);
        if alive {
            self.live_data_bytes += u64::from(bytes);
        } else {
            self.live_data_bytes = self.live_data_bytes.saturating_sub(u64::from(bytes));
        }
        self.touch(number);
        if live == 0 {
            self.settle(number, now);
        }
        true
    }

    /// A data segment is full or given up: nothing is appended any more.
    pub fn close(&mut self, number: u32, now: Sequence) {
        let row = &mut self.rows[number as usize];
        row.open = false;
        if row.entry.state == SegmentState::Open {
            row.entry.state = SegmentState::Sealed;
        }
        self.touch(number);
        self.settle(number, now);
    }

    /// A repair has counted what lives in a segment. The checkpoint that makes it durable must follow before anything else.
    pub fn correct(&mut self, number: u32, live: u32, now: Sequence) {
        let Some(row) = self.rows.get_mut(number as usize) else { return };
        let total = match row.entry.class {
            Some(Class::Metadata) => &mut self.live_meta_bytes,
            _ => &mut self.live_data_bytes,
        };
        *total = (*total + u64::from(live)).saturating_sub(row.entry.live_bytes.into());
        row.entry.live_bytes = live;
        self.touch(number);
        self.settle(number, now);
    }

    /// A domain is gone: nothing lives in its segments. They are free when that is durable and their readers are done.
    pub fn erase(&mut self, domain: DomainId, now: Sequence) {
        for number in 0..self.rows.len() as u32 {
            let row = &mut self.rows[number as usize];
            let Some(class) = row.entry.class.filter(|_| row.entry.domain == domain) else { continue };
            let total = match class {
                Class::Metadata => &mut self.live_meta_bytes,
                _ => &mut self.live_data_bytes,
            };
            *total = total.saturating_sub(row.entry.live_bytes.into());
            row.entry.live_bytes = 0;
            row.open = false;
            if row.entry.state == SegmentState::Open {
                row.entry.state = SegmentState::Sealed;
            }
            self.touch(number);
            self.settle(number, now);
        }
    }

    // ---- metadata segments, by checkpoints

    /// What a checkpoint did to metadata segments takes effect, now that it is durable: their new entries; `still_open` are
    /// appended to by the next one.
    pub fn install(&mut self, entries: &[(u32, SegmentEntry)], still_open: &[u32]) {
        for &(number, entry) in entries {
            let row = &mut self.rows[number as usize];
            let before = u64::from(row.entry.live_bytes);
            let was_meta = row.entry.class == Some(Class::Metadata);
            row.entry = entry;
            row.open = still_open.contains(&number);
            self.live_meta_bytes += u64::from(entry.live_bytes);
            if was_meta {
                self.live_meta_bytes = self.live_meta_bytes.saturating_sub(before);
            }
            // No recovery goes back behind the checkpoint that emptied it.
            self.settle(number, Sequence(0));
        }
    }

    /// A checkpoint failed: a metadata segment that it had open is not appended to any more.
    pub fn release(&mut self, number: u32) {
        let row = &mut self.rows[number as usize];
        row.open = false;
        if row.entry.live_bytes == 0 {
            row.handle = None;
        }
        if row.entry.state == SegmentState::Open {
            row.entry.state = SegmentState::Sealed;
        }
        self.touch(number);
        self.settle(number, Sequence(0));
    }

    /// Adds the live bytes of a node of the catalogue, which the table does not store.
    pub fn add_catalogue(&mut self, number: u32, bytes: u32) {
        if let Some(row) = self.rows.get_mut(number as usize) {
            row.entry.live_bytes += bytes;
            row.entry.used_bytes = row.entry.used_bytes.max(row.entry.live_bytes);
            self.live_meta_bytes += u64::from(bytes);
        }
    }

    /// Pages that changed since the last call.
    pub fn take_dirty_pages(&mut self) -> Vec<usize> {
        let pages = (0..self.dirty_pages.len()).filter(|&p| self.dirty_pages[p]).collect();
        self.dirty_pages.fill(false);
        pages
    }

    /// Marks pages changed again, after a checkpoint failed.
    pub fn redirty(&mut self, pages: &[usize]) {
        pages.iter().for_each(|&p| self.dirty_pages[p] = true);
    }

    /// Makes the next checkpoint write the page of the table anew.
    pub fn touch_page(&mut self, page: usize) {
        if let Some(dirty) = self.dirty_pages.get_mut(page) {
            *dirty = true;
        }
    }

    // ---- for the collector

    /// The closed segment of which the least lives, among those where collection gains at least `gain` bytes; `metadata`: also
    /// of those that hold metadata.
    pub fn emptiest(&self, gain: u32, metadata: bool) -> Option<u32> {
        let bytes = self.geometry.segment_bytes;
        (0..self.rows.len() as u32)
            .filter(|&n| {
                let row = &self.rows[n as usize];
                !row.open
                    && !row.spoilt
                    && !row.is_pinned()
                    && row.entry.live_bytes > 0
                    && row.entry.class.is_some_and(|class| metadata || class != Class::Metadata)
                    && bytes - row.entry.live_bytes.min(bytes) >= gain
            })
            .min_by_key(|&n| self.rows[n as usize].entry.live_bytes)
    }

    // ---- for changes of keys

    fn old(&self, domain: DomainId, generation: Generation) -> impl Iterator<Item = (u32, &Row)> {
        let rows = (0..).zip(&self.rows);
        rows.filter(move |(_, row)| {
            row.entry.class.is_some() && row.entry.domain == domain && row.entry.generation != generation
        })
    }

    /// Whether a segment was opened with other keys than those of this generation.
    pub fn is_old(&self, number: u32, generation: Generation) -> bool {
        self.rows.get(number as usize).is_some_and(|row| row.entry.generation != generation)
    }

    /// Bytes of a domain that live under keys of other generations than this.
    pub fn old_bytes(&self, domain: DomainId, generation: Generation) -> u64 {
        self.old(domain, generation).map(|(_, row)| u64::from(row.entry.live_bytes)).sum()
    }

    /// Whether a segment is being filled under keys of another generation than this.
    pub fn is_old_open(&self, domain: DomainId, generation: Generation) -> bool {
        self.old(domain, generation).any(|(_, row)| row.open)
    }

    /// Metadata segments of other generations than this in which something lives.
    pub fn old_metadata(&self, domain: DomainId, generation: Generation) -> Vec<u32> {
        let live = self
            .old(domain, generation)
            .filter(|(_, row)| row.entry.class == Some(Class::Metadata) && row.entry.live_bytes > 0);
        live.map(|(number, _)| number).collect()
    }

    /// The closed data segment of another generation than this of which the least lives.
    pub fn emptiest_old(&self, domain: DomainId, generation: Generation) -> Option<u32> {
        let live = self.old(domain, generation).filter(|(_, row)| {
            row.entry.class == Some(Class::Data) && !row.open && !row.spoilt && row.entry.live_bytes > 0
        });
        live.min_by_key(|(_, row)| row.entry.live_bytes).map(|(number, _)| number)
    }

    /// Takes a free segment that is `wanted`, whatever is left for others: it is given back soon ([`Segments::put_back`]).
    pub fn take_if(&mut self, durable: Sequence, wanted: impl Fn(u32) -> bool) -> Option<u32> {
        let at = self.free.iter().position(|&number| {
            let row = &self.rows[number as usize];
            wanted(number) && Segments::is_free(row) && row.free_since <= durable && !row.is_pinned()
        })?;
        let number = self.free.remove(at)?;
        let row = &mut self.rows[number as usize];
        row.queued = false;
        row.handle = None;
        row.open = true;
        self.free_count -= 1;
        Some(number)
    }

    /// Whether a segment is being filled, and its entry.
    pub fn filling(&self, number: u32) -> Option<(bool, &SegmentEntry)> {
        self.rows.get(number as usize).map(|row| (row.open, &row.entry))
    }

    /// Whether a segment may ever hold something.
    pub fn is_usable(&self, number: u32) -> bool {
        let row = self.rows.get(number as usize);
        row.is_some_and(|row| !matches!(row.entry.state, SegmentState::Reserved | SegmentState::Bad))
    }

    /// Lets go of the derived keys of segments of other generations than this, in which nothing lives.
    pub fn forget_old(&mut self, domain: DomainId, generation: Generation) {
        for row in &mut self.rows {
            let old = row.entry.domain == domain && row.entry.generation != generation;
            if old && row.entry.live_bytes == 0 && !row.open && !row.is_pinned() {
                row.handle = None;
            }
        }
    }

    /// Does not offer the segment to the collector again.
    pub fn spoil(&mut self, number: u32) {
        self.rows[number as usize].spoilt = true;
    }

    /// Remembers that the segment's header is damaged; false: that is known.
    pub fn is_new_damage(&mut self, number: u32) -> bool {
        self.rows.get_mut(number as usize).is_some_and(|row| !std::mem::replace(&mut row.damaged, true))
    }

    /// Bytes in closed segments that are neither live nor free: what collection could win.
    pub fn dead_bytes(&self) -> u64 {
        let bytes = self.geometry.segment_bytes;
        self.rows
            .iter()
            .filter(|row| !row.open && row.entry.live_bytes > 0 && row.entry.class.is_some())
            .map(|row| u64::from(bytes - row.entry.live_bytes.min(bytes)))
            .sum()
    }

    /// The address of segment `number`.
    pub fn addr(&self, number: u32) -> SegmentAddr {
        addr(number)
    }
}
