//! The audit: everything that is derived, computed again from its source and compared.
//!
//! - references of every slot against the map entries of all volumes;
//! - live bytes of every segment against the fragments and nodes in it, overlaps among them;
//! - counters of volumes, domains and the pool;
//! - fingerprint lists against containers, and with `data` every fragment against its fingerprints.
//!
//! Hosts go on meanwhile, with everything else: what has been counted and changes is counted anew ([`crate::tally`]), so each comparison
//! is between two sums of one moment. Only checkpoints wait, for the walk over the interior nodes. It changes nothing;
//! [`crate::repair`] does, and holds changes back for that.
//!
//! RAM: a share of the cache, whatever the pool's size. References are counted for as many containers at a time as that has room for,
//! with a walk over the domain's maps for each, live bytes for so many segments with a walk over the containers.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::container::FragmentEntry;
use cryptfold_reduce_format::fingerprint::{Chunk, Fingerprint};
use cryptfold_reduce_format::fragment::CHUNK_BYTES;
use cryptfold_reduce_format::ids::{ChunkAddr, ContainerId, DomainId, POOL_DOMAIN, SLOTS};
use cryptfold_reduce_format::map::{MAP_ENTRIES, MapEntry, Target};
use cryptfold_reduce_format::node::{self, FANOUT, NodePtr};
use cryptfold_reduce_format::record::TreeRoot;
use cryptfold_reduce_format::segment::Class;
use cryptfold_reduce_format::segtable::SegmentEntry;

use crate::hash::FastMap;
use crate::info::CheckReport;
use crate::lend::from_filler;
use crate::pool::Pool;
use crate::tally::{COUNTED_BYTES, Maps, SPAN_BYTES, Tables, overlaps};
use crate::tree::Found;

/// Why a fragment is not usable.
pub(crate) enum FragmentError {
    /// The device did not give it; it may another time.
    Io(Status),
    /// It is lost.
    Damaged(String),
}

impl From<Status> for FragmentError {
    fn from(status: Status) -> Self {
        FragmentError::Io(status)
    }
}

/// What the audit has found.
#[derive(Default)]
pub(crate) struct Sums {
    pub report: CheckReport,
    /// References, chunks and stored bytes per domain.
    pub domains: BTreeMap<u32, (u64, u64, u64)>,
    /// Live bytes per segment.
    pub live: BTreeMap<u32, u64>,
    /// Containers whose data does not have its fingerprints.
    pub misprinted: BTreeSet<(DomainId, u64)>,
}

/// An audit at work.
#[derive(Default)]
struct Audit {
    sums: Sums,
    /// The walk that is going on.
    maps: Option<Maps>,
    tables: Option<Tables>,
}

/// Keeps changes back; lets them go on again when dropped.
pub(crate) struct Paused<'a>(&'a Pool);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.auditing.set(false);
        self.0.wake_waiters();
    }
}

/// Has the trees keep what changes, and the audit's share of the cache free for it.
struct Watch<'a> {
    pool: &'a Pool,
    room: usize,
}

impl<'a> Watch<'a> {
    fn new(pool: &'a Pool) -> Watch<'a> {
        let room = pool.audit_bytes.get();
        let meter = pool.shard.borrow().meter.clone();
        meter.bytes.set(meter.bytes.get() + room);
        meter.watched.set(true);
        pool.keep_budget();
        Watch { pool, room }
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        let meter = self.pool.shard.borrow().meter.clone();
        meter.bytes.set(meter.bytes.get().saturating_sub(self.room));
        meter.watched.set(false);
        self.pool.catch_up(&mut Audit::default());
    }
}

impl Pool {
    /// Audits the pool. With `data` every fragment is read and verified too.
    pub(crate) async fn check(self: &Rc<Self>, data: bool) -> Result<CheckReport, Status> {
        let _turn = self.audits.lock().await;
        Ok(self.audit(data).await?.report)
    }

    /// Holds changes back and makes a checkpoint of what there is.
    pub(crate) async fn pause(&self) -> Result<Paused<'_>, Status> {
        while self.auditing.replace(true) {
            self.wait_progress().await;
        }
        let paused = Paused(self);
        self.wait_parked().await;
        self.flush().await?;
        self.checkpoint().await?;
        Ok(paused)
    }

    /// Adds everything up. One at a time: the caller holds [`Pool::audits`].
    pub(crate) async fn audit(&self, data: bool) -> Result<Sums, Status> {
        let mut audit = Audit::default();
        let watch = Watch::new(self);
        let domains: Vec<u32> = self.shard.borrow().domains.keys().copied().collect();
        for id in domains {
            self.check_domain(DomainId(id), data, watch.room, &mut audit).await?;
        }
        self.check_data_segments(watch.room, &mut audit).await?;
        self.check_metadata(&mut audit.sums).await?;
        Ok(audit.sums)
    }

    /// An audit ends when the pool is closed.
    fn check_going(&self) -> Result<(), Status> {
        if self.read_only { Ok(()) } else { self.check_writable() }
    }

    /// Takes in what has changed since the last time. What follows without a wait in between sees one state.
    fn catch_up(&self, audit: &mut Audit) {
        let mut shard = self.shard.borrow_mut();
        let shard = &mut *shard;
        if !shard.meter.changed.replace(false) {
            return;
        }
        for (id, v) in shard.volumes.iter_mut().chain(&mut shard.gone) {
            for (index, before) in v.tree.take_changed() {
                if let Some(maps) = audit.maps.as_mut().filter(|maps| maps.domain() == v.record.domain) {
                    maps.changed(*id, index, &before, v.tree.peek(index));
                }
            }
        }
        for (id, d) in &mut shard.domains {
            for (number, before) in d.containers.take_changed() {
                if let Some(tables) = &mut audit.tables {
                    tables.changed(*id, number, &before, d.containers.peek(number));
                }
            }
        }
    }

    // ---- references

    /// What a domain's maps have, and the references of all its containers.
    async fn check_domain(
        &self,
        id: DomainId,
        data: bool,
        room: usize,
        audit: &mut Audit,
    ) -> Result<(), Status> {
        // What is made from now on is not looked at.
        let Some(end) = self.shard.borrow().domains.get(&id.0).map(|d| d.next_container) else {
            return Ok(());
        };
        let at_once = (room / COUNTED_BYTES).max(1) as u64;
        let mut first = 1u64;
        loop {
            let range = first..end.min(first.saturating_add(at_once));
            audit.maps = Some(Maps::new(id, range.clone()));
            self.count_maps(id, first == 1, audit).await?;
            for number in range.clone() {
                self.check_container(id, number, data, audit).await?;
            }
            audit.maps = None;
            first = range.end;
            if first >= end {
                return Ok(());
            }
        }
    }

    /// Walks over the maps of a domain's volumes. The first time it tells what it finds there.
    async fn count_maps(&self, id: DomainId, tell: bool, audit: &mut Audit) -> Result<(), Status> {
        let mut next = 0;
        loop {
            let volume = {
                let shard = self.shard.borrow();
                let mut rest = shard.volumes.range(next..).filter(|(_, v)| v.record.domain == id);
                rest.next().map(|(volume, _)| *volume)
            };
            let Some(volume) = volume else { break };
            self.count_map(volume, tell, audit).await?;
            next = volume + 1;
        }
        self.catch_up(audit);
        let Some(maps) = &mut audit.maps else { return Ok(()) };
        maps.pass(u32::MAX, u64::MAX);
        let shard = self.shard.borrow();
        let Some(d) = shard.domains.get(&id.0).filter(|_| tell) else { return Ok(()) };
        let report = &mut audit.sums.report;
        let mut mapped = 0;
        for (volume, v) in shard.volumes.iter().filter(|(_, v)| v.record.domain == id) {
            let none = Default::default();
            let found = maps.blocks(*volume).unwrap_or(&none);
            mapped += found.chunks;
            report.volumes += 1;
            report.blocks += found.chunks + found.special;
            if let Some(wrong) = shard.miscounted(v, &found.births) {
                report.problem(format!("volume {volume}: births: {wrong}"));
            }
            if (v.chunks, v.special) != (found.chunks, found.special) {
                report.problem(format!(
                    "volume {volume}: counts {} chunks and {} zero or pattern blocks, its map has {} and {}",
                    v.chunks, v.special, found.chunks, found.special
                ));
            }
        }
        if d.mapped != mapped {
            report.problem(format!("domain {id}: counts {} references, its maps have {mapped}", d.mapped));
        }
        audit.sums.domains.entry(id.0).or_default().0 = mapped;
        Ok(())
    }

    async fn count_map(&self, id: u32, tell: bool, audit: &mut Audit) -> Result<(), Status> {
        let mut index = 0;
        loop {
            if index % 4 == 3 {
                reactor::yield_now().await;
            }
            self.check_going()?;
            let (absent, before) = {
                let shard = self.shard.borrow();
                let Some(v) = shard.volumes.get(&id) else { return Ok(()) };
                if index >= v.record.blocks.div_ceil(MAP_ENTRIES as u64) {
                    break;
                }
                (matches!(v.tree.find(index), Found::Absent), shard.before(v).map(|v| v.record.id.0))
            };
            let mut pins = self.pins();
            if !absent {
                if let Err(status) = self.load_leaf(node::Tree::Map, id, index, &mut pins).await {
                    if tell {
                        let text = format!("volume {id}: map leaf {index} can not be read: {status}");
                        audit.sums.report.problem(text);
                    }
                } else if let Some(before) = before {
                    // A leaf that can not be read is reported where it belongs.
                    let _ = self.load_leaf(node::Tree::Map, before, index, &mut pins).await;
                }
            }
            self.catch_up(audit);
            let Some(maps) = &mut audit.maps else { return Ok(()) };
            let shard = self.shard.borrow();
            if let Some(leaf) = shard.volumes.get(&id).and_then(|v| v.tree.peek(index)) {
                if tell {
                    self.look_at_leaf(id, index, before, &mut audit.sums.report);
                }
                maps.count(id, index, leaf);
            } else {
                maps.pass(id, index + 1);
            }
            index += 1;
        }
        self.catch_up(audit);
        if let Some(maps) = &mut audit.maps {
            maps.pass(id, u64::MAX);
        }
        Ok(())
    }

    /// What is wrong with the entries of a leaf, each for itself. `before`: the member of the family before this one, a while ago.
    fn look_at_leaf(&self, id: u32, index: u64, before: Option<u32>, report: &mut CheckReport) {
        let shard = self.shard.borrow();
        let Some(v) = shard.volumes.get(&id) else { return };
        let Some((d, leaf)) = shard.domains.get(&v.record.domain.0).zip(v.tree.peek(index)) else { return };
        let same = shard.before(v).map(|v| v.record.id.0) == before;
        let earlier = before.and_then(|id| shard.volumes.get(&id)?.tree.peek(index));
        for (at, entry) in leaf.iter().enumerate() {
            let block = index * MAP_ENTRIES as u64 + at as u64;
            let earlier = earlier.map_or_else(MapEntry::default, |leaf| leaf.get(at));
            if let Some(wrong) = shard.misplaced(v, &entry, &earlier).filter(|_| same) {
                report.problem(format!("volume {id}: block {block} {wrong}"));
            }
            match entry.target {
                Target::Unmapped => continue,
                Target::Uncorrectable => {
                    report.uncorrectable += 1;
                    continue;
                }
                Target::Zero | Target::Pattern(_) => {}
                Target::Chunk(addr) if addr.container().get() >= d.next_container => {
                    report.problem(format!(
                        "volume {id}: block {block} points to container {}, which was never made",
                        addr.container()
                    ));
                }
                Target::Chunk(_) => {}
            }
            if block >= v.record.blocks {
                report.problem(format!("volume {id}: block {block} is beyond its end"));
            }
        }
    }

    /// Compares a container's references with what was counted, and has its fragments verified.
    async fn check_container(
        &self,
        id: DomainId,
        number: u64,
        data: bool,
        audit: &mut Audit,
    ) -> Result<(), Status> {
        if number % 4 == 3 {
            reactor::yield_now().await;
        }
        self.check_going()?;
        let mut pins = self.pins();
        for tree in [node::Tree::Containers, node::Tree::Fingerprints] {
            if let Err(status) = self.load_leaf(tree, id.0, number, &mut pins).await {
                let text = format!("domain {id}: {tree:?} leaf {number} can not be read: {status}");
                audit.sums.report.problem(text);
                return Ok(());
            }
        }
        self.catch_up(audit);
        let Some(maps) = &audit.maps else { return Ok(()) };
        for fragment in self.compare_container(id, number, maps, &mut audit.sums.report) {
            if data {
                self.verify_fragment(id, number, &fragment, &mut audit.sums).await?;
            }
        }
        Ok(())
    }

    /// Gives the container's live fragments.
    fn compare_container(
        &self,
        id: DomainId,
        number: u64,
        maps: &Maps,
        report: &mut CheckReport,
    ) -> Vec<FragmentEntry> {
        let mut live_fragments = Vec::new();
        let shard = self.shard.borrow();
        let Some(d) = shard.domains.get(&id.0) else { return live_fragments };
        let slots = 0..SLOTS as u16;
        let Some(container) = d.containers.peek(number).filter(|c| c.used() > 0) else {
            let refs: i64 = slots.map(|slot| maps.references(number, slot)).sum();
            if refs != 0 {
                report.problem(format!(
                    "domain {id}: {refs} map entries point to container {number}, which is not there"
                ));
            }
            return live_fragments;
        };
        report.containers += 1;
        for slot in slots {
            let (have, want) = (container.refs(slot), maps.references(number, slot));
            if i64::from(have) != want {
                report.problem(format!(
                    "domain {id}: chunk {number}:{slot} has {have} references, {want} map entries point to it"
                ));
            }
        }
        let prints = d.fingerprints.peek(number);
        if prints.is_none_or(|prints| prints.slots.len() < usize::from(container.used())) {
            report.problem(format!(
                "domain {id}: container {number} has {} slots, but fewer fingerprints",
                container.used()
            ));
        }
        for fragment in container.fragments() {
            report.fragments += 1;
            if container.live_in(&fragment) == 0 {
                report.orphans += 1;
                continue;
            }
            if !shard.holds(id, &fragment) {
                report.problem(format!(
                    "domain {id}: fragment {number}:{} lies at {:?}, which is no data of this domain",
                    fragment.first_slot, fragment.place
                ));
            }
            live_fragments.push(fragment);
        }
        live_fragments
    }

    // ---- live bytes

    /// What lives in the segments that hold data, so many of them at a time.
    async fn check_data_segments(&self, room: usize, audit: &mut Audit) -> Result<(), Status> {
        // A fragment is at least a chunk.
        let (all, most) = {
            let shard = self.shard.borrow();
            let chunks: u64 = shard.domains.values().map(|d| d.unique).sum();
            (shard.segments.len(), chunks as usize * SPAN_BYTES)
        };
        let at_once = (u64::from(all) / (most / room.max(1) + 1) as u64).max(1) as u32;
        let mut first = 0;
        while first < all {
            // The device may grow.
            let end = if all - first <= at_once { u32::MAX } else { first + at_once };
            audit.tables = Some(Tables::new(first..end));
            self.count_tables(audit).await?;
            self.catch_up(audit);
            if let Some(tables) = audit.tables.take() {
                self.compare_segments(tables, first..end, &mut audit.sums);
            }
            first = end;
        }
        Ok(())
    }

    /// Walks over all containers.
    async fn count_tables(&self, audit: &mut Audit) -> Result<(), Status> {
        let (mut domain, mut number) = (0, 1);
        loop {
            if number % 4 == 3 {
                reactor::yield_now().await;
            }
            self.check_going()?;
            let next = {
                let shard = self.shard.borrow();
                let first = shard.domains.range(domain..).next();
                first.map(|(id, d)| (*id, d.next_container))
            };
            let Some((id, end)) = next else { break };
            if id != domain {
                (domain, number) = (id, 1);
            }
            let mut pins = self.pins();
            if number < end {
                // What can not be read has been reported.
                let _ = self.load_leaf(node::Tree::Containers, id, number, &mut pins).await;
            }
            self.catch_up(audit);
            let Some(tables) = &mut audit.tables else { return Ok(()) };
            let shard = self.shard.borrow();
            let Some(d) = shard.domains.get(&id) else { continue };
            if number >= d.next_container {
                tables.pass(id, u64::MAX);
                (domain, number) = (id + 1, 1);
            } else if let Some(container) = d.containers.peek(number) {
                tables.count(id, number, container);
                number += 1;
            } else {
                tables.pass(id, number + 1);
                number += 1;
            }
        }
        self.catch_up(audit);
        if let Some(tables) = &mut audit.tables {
            tables.pass(u32::MAX, u64::MAX);
        }
        Ok(())
    }

    fn compare_segments(&self, mut tables: Tables, range: std::ops::Range<u32>, sums: &mut Sums) {
        let shard = self.shard.borrow();
        for (number, entry) in (0..).zip(shard.segments.entries()) {
            if !range.contains(&number) || entry.class == Some(Class::Metadata) {
                continue;
            }
            let live = tables.live(number, entry.domain.0);
            sums.live.insert(number, live);
            compare_live(number, entry, live, &mut sums.report);
        }
        for number in tables.live_from(shard.segments.len()) {
            sums.report.problem(format!("fragments in segment {number}, which the device does not have"));
        }
        for (number, overlaps) in tables.overlaps() {
            sums.report.problem(format!("segment {number}: {overlaps} fragments overlap"));
        }
        if range.start > 0 {
            return;
        }
        for (id, d) in &shard.domains {
            let (unique, stored) = tables.of_domain(*id);
            if (d.unique, d.stored_bytes) != (unique, stored) {
                sums.report.problem(format!(
                    "domain {id}: counts {} chunks in {} bytes, there are {unique} in {stored}",
                    d.unique, d.stored_bytes
                ));
            }
            let found = sums.domains.entry(*id).or_default();
            (found.1, found.2) = (unique, stored);
        }
    }

    /// What lives in the segments that hold metadata, and the pool's own counters.
    async fn check_metadata(&self, sums: &mut Sums) -> Result<(), Status> {
        // No checkpoint meanwhile: interior nodes, and so where nodes lie, are those of the last one.
        let meta = self.meta.lock().await;
        let mut nodes = Nodes::default();
        self.count_nodes(&meta, &mut nodes, &mut sums.report).await?;
        let shard = self.shard.borrow();
        let (mut data, mut metadata) = (0, 0);
        for (number, entry) in (0..).zip(shard.segments.entries()) {
            let live = nodes.live.remove(&number).unwrap_or(0);
            if entry.class == Some(Class::Metadata) {
                metadata += u64::from(entry.live_bytes);
                sums.live.insert(number, live);
                compare_live(number, entry, live, &mut sums.report);
            } else {
                data += u64::from(entry.live_bytes);
                if live > 0 {
                    let text = format!("segment {number} ({}): nodes lie in it", kind(entry));
                    sums.report.problem(text);
                }
            }
        }
        for number in nodes.live.keys() {
            sums.report.problem(format!("nodes in segment {number}, which the device does not have"));
        }
        for (number, spans) in &mut nodes.spans {
            let overlaps = overlaps(spans);
            if overlaps > 0 {
                sums.report.problem(format!("segment {number}: {overlaps} nodes overlap"));
            }
        }
        let counted = (shard.segments.live_data_bytes, shard.segments.live_meta_bytes);
        if counted != (data, metadata) {
            sums.report.problem(format!(
                "the pool counts {} bytes of data and {} of metadata, its segments {data} and {metadata}",
                counted.0, counted.1
            ));
        }
        Ok(())
    }

    /// Reads a fragment and compares each chunk with its fingerprint.
    async fn verify_fragment(
        &self,
        id: DomainId,
        number: u64,
        entry: &FragmentEntry,
        sums: &mut Sums,
    ) -> Result<(), Status> {
        let name = format!("domain {id}: fragment {number}:{}", entry.first_slot);
        let Some(first) = ContainerId::new(number).and_then(|c| ChunkAddr::new(c, entry.first_slot)) else {
            return Ok(());
        };
        let plain = match self.read_fragment(entry, first).await {
            Ok(plain) => plain,
            Err(FragmentError::Io(status)) => return Err(status),
            // It may have moved meanwhile; who moved it has verified it.
            Err(FragmentError::Damaged(_)) if !self.is_live(id, number, entry) => return Ok(()),
            Err(FragmentError::Damaged(error)) => {
                let chunks = entry.chunks;
                sums.report.damaged += 1;
                sums.report.problem(format!(
                    "{name} at {:?} is damaged: {error}; its {chunks} chunks can not be read until their data is written again",
                    entry.place
                ));
                self.fragment_damaged(id, entry, first, &error);
                return Ok(());
            }
        };
        if !self.is_live(id, number, entry) {
            return Ok(());
        }
        let found = self.fingerprints_of(id, &plain);
        sums.report.verified += 1;
        let shard = self.shard.borrow();
        let Some(d) = shard.domains.get(&id.0) else { return Ok(()) };
        let Some(prints) = d.fingerprints.peek(number) else { return Ok(()) };
        let from = usize::from(entry.first_slot);
        if prints.generation == d.generation && prints.slots.get(from..from + found.len()) != Some(&found[..])
        {
            sums.report.problem(format!("{name}: its data does not have its fingerprints"));
            sums.misprinted.insert((id, number));
        }
        Ok(())
    }

    /// Whether a container, which the caller keeps in RAM, has this fragment, with references.
    fn is_live(&self, id: DomainId, number: u64, entry: &FragmentEntry) -> bool {
        let shard = self.shard.borrow();
        let container = shard.domains.get(&id.0).and_then(|d| d.containers.peek(number));
        container.is_some_and(|c| c.fragment_of(entry.first_slot) == Some(*entry) && c.live_in(entry) > 0)
    }

    /// The current fingerprints of whole chunks.
    pub(crate) fn fingerprints_of(&self, id: DomainId, plain: &[u8]) -> Vec<Fingerprint> {
        let (chunks, _) = plain.as_chunks::<CHUNK_BYTES>();
        let chunks: Vec<&Chunk> = chunks.iter().collect();
        let mut found = vec![Fingerprint::NONE; chunks.len()];
        let shard = self.shard.borrow();
        if let Some(d) = shard.domains.get(&id.0) {
            d.hasher.hash_chunks(&chunks, &mut found);
        }
        found
    }

    /// Reads, verifies and decodes a fragment.
    pub(crate) async fn read_fragment(
        &self,
        entry: &FragmentEntry,
        first: ChunkAddr,
    ) -> Result<Vec<u8>, FragmentError> {
        let segment = match self.segment(entry.place.segment.segment.0).await {
            Ok(segment) => segment,
            Err(Status::UNRECOVERED_READ) => {
                return Err(FragmentError::Damaged("its segment's header is damaged".into()));
            }
            Err(status) => return Err(FragmentError::Io(status)),
        };
        let end = entry.place.offset + entry.unit_bytes;
        let asked = from_filler(&segment, entry.place.offset, entry.unit_bytes).await;
        let found = asked.map_err(FragmentError::Io)?;
        let sealed = if segment.is_written(end) {
            let at = segment.start_bytes + u64::from(entry.place.offset);
            match self.base.read(at, entry.unit_bytes as usize).await {
                Err(Status::UNRECOVERED_READ) => {
                    return Err(FragmentError::Damaged("the device can not read it".into()));
                }
                sealed => sealed?,
            }
        } else if let Some(sealed) = found {
            sealed
        } else {
            let logs = self.logs.borrow();
            logs.iter()
                .find_map(|log| log.unwritten(&segment, entry.place.offset, entry.unit_bytes))
                .ok_or_else(|| FragmentError::Damaged("it is neither written nor in a buffer".into()))?
        };
        let mut plain = vec![0; usize::from(entry.chunks) * CHUNK_BYTES];
        let mut decoder = self.core.decoder.borrow_mut();
        decoder.decode(&segment, entry, first, &sealed, &mut plain).map_err(FragmentError::Damaged)?;
        Ok(plain)
    }

    async fn count_nodes(
        &self,
        meta: &crate::meta::Meta,
        nodes_found: &mut Nodes,
        report: &mut CheckReport,
    ) -> Result<(), Status> {
        let roots: Vec<(node::Tree, u32, TreeRoot)> = {
            let shard = self.shard.borrow();
            // Those that are gone give their nodes back with the next checkpoint.
            let volumes = shard.volumes.iter().chain(&shard.gone);
            let maps = volumes.map(|(id, v)| (node::Tree::Map, *id, v.tree.root()));
            let domains = shard.domains.iter().flat_map(|(id, d)| {
                [
                    (node::Tree::Containers, *id, d.containers.root()),
                    (node::Tree::Fingerprints, *id, d.fingerprints.root()),
                ]
            });
            maps.chain(domains).collect()
        };
        for (tree, owner, root) in roots {
            let Some(ptr) = root.ptr else { continue };
            nodes_found.count(&ptr, report);
            let mut level = root.level;
            let mut nodes = vec![0u64];
            while level > 0 {
                let mut below = Vec::new();
                for index in nodes {
                    self.check_going()?;
                    match self.load_inner(tree, owner, level, index).await {
                        Ok(Some(inner)) => {
                            for (child, ptr) in inner.iter() {
                                nodes_found.count(&ptr, report);
                                below.push(index * FANOUT as u64 + child as u64);
                            }
                        }
                        Ok(None) => {}
                        Err(status) => {
                            let text = format!(
                                "{tree:?} tree of {owner}: node {index} of level {level} can not be read: {status}"
                            );
                            report.problem(text);
                        }
                    }
                }
                nodes = below;
                level -= 1;
            }
        }
        for ptr in meta.catalogue_pointers() {
            nodes_found.count(&ptr, report);
        }
        Ok(())
    }
}

/// Where nodes lie.
#[derive(Default)]
struct Nodes {
    /// Bytes per segment.
    live: BTreeMap<u32, u64>,
    /// Offset and end, per segment.
    spans: FastMap<u32, Vec<(u32, u32)>>,
}

impl Nodes {
    fn count(&mut self, ptr: &NodePtr, report: &mut CheckReport) {
        report.nodes += 1;
        let segment = ptr.place.segment.segment.0;
        *self.live.entry(segment).or_default() += u64::from(ptr.unit_bytes);
        self.spans.entry(segment).or_default().push((ptr.place.offset, ptr.place.offset + ptr.unit_bytes));
    }
}

fn kind(entry: &SegmentEntry) -> String {
    let what = match entry.class {
        Some(Class::Metadata) if entry.domain == POOL_DOMAIN => "catalogue",
        Some(Class::Metadata) => "metadata",
        Some(Class::Data) => "data",
        None => "empty",
    };
    format!("{:?}, {what}", entry.state)
}

fn compare_live(number: u32, entry: &SegmentEntry, live: u64, report: &mut CheckReport) {
    if u64::from(entry.live_bytes) != live {
        report.problem(format!(
            "segment {number} ({}): counts {} live bytes, {live} are referred to",
            kind(entry),
            entry.live_bytes
        ));
    }
}
