//! The audit: everything that is derived, computed again from its source and compared.
//!
//! - references of every slot against the map entries of all volumes;
//! - live bytes of every segment against the fragments and nodes in it, overlaps among them;
//! - counters of volumes, domains and the pool;
//! - fingerprint lists against containers, and with `data` every fragment against its fingerprints.
//!
//! Changes are held back meanwhile (reads go on): the audit sees one state. It changes nothing; [`crate::repair`] does. RAM:
//! about 6 bytes per stored chunk.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::container::FragmentEntry;
use cryptfold_reduce_format::fingerprint::{Chunk, Fingerprint};
use cryptfold_reduce_format::fragment::CHUNK_BYTES;
use cryptfold_reduce_format::ids::{ChunkAddr, ContainerId, DomainId, POOL_DOMAIN, SLOTS};
use cryptfold_reduce_format::map::{MapEntry, Target};
use cryptfold_reduce_format::node::{self, FANOUT, NodePtr};
use cryptfold_reduce_format::record::TreeRoot;
use cryptfold_reduce_format::segment::Class;

use crate::info::CheckReport;
use crate::lend::from_filler;
use crate::pool::Pool;
use crate::shard::{Volume, live_bytes};
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

type Counts = HashMap<u64, Box<[u32; SLOTS]>>;

/// What the audit has added up.
#[derive(Default)]
pub(crate) struct Sums {
    pub report: CheckReport,
    /// References per domain and container.
    counts: BTreeMap<u32, Counts>,
    /// References, chunks and stored bytes per domain.
    pub domains: BTreeMap<u32, (u64, u64, u64)>,
    /// Live bytes per segment.
    pub live: BTreeMap<u32, u64>,
    /// Containers whose data does not have its fingerprints.
    pub misprinted: BTreeSet<(DomainId, u64)>,
    /// Live units per segment: offset and end.
    spans: BTreeMap<u32, Vec<(u32, u32)>>,
}

/// Keeps changes back; lets them go on again when dropped.
pub(crate) struct Paused<'a>(&'a Pool);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.auditing.set(false);
        self.0.wake_waiters();
    }
}

impl Pool {
    /// Audits the pool. With `data` every fragment is read and verified too.
    pub(crate) async fn check(self: &Rc<Self>, data: bool) -> Result<CheckReport, Status> {
        if self.read_only {
            return Ok(self.audit(data).await?.report);
        }
        let _paused = self.pause().await?;
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

    /// Adds everything up. Nothing may change meanwhile.
    pub(crate) async fn audit(&self, data: bool) -> Result<Sums, Status> {
        let meta = self.meta.lock().await;
        let mut sums = Sums::default();
        let volumes: Vec<u32> = self.shard.borrow().volumes.keys().copied().collect();
        for id in volumes {
            self.check_volume(id, &mut sums).await?;
        }
        let domains: Vec<(u32, u64)> =
            self.shard.borrow().domains.iter().map(|(id, d)| (*id, d.next_container)).collect();
        for (id, end) in domains {
            self.check_domain(DomainId(id), end, data, &mut sums).await?;
        }
        self.check_nodes(&meta, &mut sums).await?;
        self.check_segments(&mut sums);
        Ok(sums)
    }

    async fn check_volume(&self, id: u32, sums: &mut Sums) -> Result<(), Status> {
        sums.report.volumes += 1;
        let (blocks, domain) = {
            let shard = self.shard.borrow();
            let Some(v) = shard.volumes.get(&id) else { return Ok(()) };
            (v.record.blocks, v.record.domain.0)
        };
        let (mut chunks, mut special) = (0u64, 0u64);
        let mut births: BTreeMap<u32, u64> = BTreeMap::new();
        let before = {
            let shard = self.shard.borrow();
            shard.volumes.get(&id).and_then(|v| shard.before(v)).map(|v| v.record.id.0)
        };
        for index in 0..blocks.div_ceil(512) {
            if index % 64 == 63 {
                reactor::yield_now().await;
            }
            let absent = |v: &Volume| matches!(v.tree.find(index), Found::Absent);
            if self.shard.borrow().volumes.get(&id).is_none_or(absent) {
                continue;
            }
            let mut pins = self.pins();
            if let Err(status) = self.load_leaf(node::Tree::Map, id, index, &mut pins).await {
                sums.report.problem(format!("volume {id}: map leaf {index} can not be read: {status}"));
                continue;
            }
            if let Some(before) = before {
                // A leaf that can not be read is reported where it belongs.
                let _ = self.load_leaf(node::Tree::Map, before, index, &mut pins).await;
            }
            let shard = self.shard.borrow();
            let Some(v) = shard.volumes.get(&id) else { continue };
            let Some(leaf) = v.tree.peek(index) else { continue };
            let earlier = before.and_then(|id| shard.volumes.get(&id)?.tree.peek(index));
            for (at, entry) in leaf.iter().enumerate() {
                let earlier = earlier.map_or_else(MapEntry::default, |leaf| leaf.get(at));
                if let Some(wrong) = shard.misplaced(v, &entry, &earlier) {
                    sums.report.problem(format!("volume {id}: block {} {wrong}", index * 512 + at as u64));
                }
                if entry.chunk().is_some() {
                    *births.entry(entry.birth.0).or_default() += 1;
                }
                match entry.target {
                    Target::Unmapped => continue,
                    Target::Uncorrectable => {
                        sums.report.uncorrectable += 1;
                        continue;
                    }
                    Target::Zero | Target::Pattern(_) => special += 1,
                    Target::Chunk(addr) => {
                        chunks += 1;
                        let counts = sums.counts.entry(domain).or_default();
                        let slots =
                            counts.entry(addr.container().get()).or_insert_with(|| Box::new([0; SLOTS]));
                        slots[usize::from(addr.slot())] += 1;
                    }
                }
                if index * 512 + at as u64 >= blocks {
                    sums.report
                        .problem(format!("volume {id}: block {} is beyond its end", index * 512 + at as u64));
                }
            }
        }
        sums.report.blocks += chunks + special;
        let shard = self.shard.borrow();
        if let Some(wrong) = shard.volumes.get(&id).and_then(|v| shard.miscounted(v, &births)) {
            sums.report.problem(format!("volume {id}: births: {wrong}"));
        }
        if let Some(v) = shard.volumes.get(&id)
            && (v.chunks, v.special) != (chunks, special)
        {
            sums.report.problem(format!(
                "volume {id}: counts {} chunks and {} zero or pattern blocks, its map has {chunks} and {special}",
                v.chunks, v.special
            ));
        }
        Ok(())
    }

    async fn check_domain(&self, id: DomainId, end: u64, data: bool, sums: &mut Sums) -> Result<(), Status> {
        let mut counts = sums.counts.remove(&id.0).unwrap_or_default();
        let mapped: u64 = counts.values().flat_map(|slots| slots.iter()).map(|&n| u64::from(n)).sum();
        let (mut unique, mut stored) = (0u64, 0u64);
        for number in 1..end {
            if number % 64 == 63 {
                reactor::yield_now().await;
            }
            let expected = counts.remove(&number);
            let mut readable = true;
            let mut pins = self.pins();
            for tree in [node::Tree::Containers, node::Tree::Fingerprints] {
                if let Err(status) = self.load_leaf(tree, id.0, number, &mut pins).await {
                    sums.report
                        .problem(format!("domain {id}: {tree:?} leaf {number} can not be read: {status}"));
                    readable = false;
                }
            }
            if !readable {
                continue;
            }
            let fragments =
                self.check_container(id, number, expected.as_deref(), &mut unique, &mut stored, sums);
            if data {
                for fragment in fragments {
                    self.verify_fragment(id, number, &fragment, sums).await?;
                }
            }
        }
        for (number, slots) in counts {
            let refs: u64 = slots.iter().map(|&n| u64::from(n)).sum();
            sums.report.problem(format!(
                "domain {id}: {refs} map entries point to container {number}, which was never made"
            ));
        }
        sums.domains.insert(id.0, (mapped, unique, stored));
        let shard = self.shard.borrow();
        if let Some(d) = shard.domains.get(&id.0)
            && (d.mapped, d.unique, d.stored_bytes) != (mapped, unique, stored)
        {
            sums.report.problem(format!(
                "domain {id}: counts {} references to {} chunks in {} bytes, there are {mapped} to {unique} in {stored}",
                d.mapped, d.unique, d.stored_bytes
            ));
        }
        Ok(())
    }

    /// Gives the container's live fragments.
    fn check_container(
        &self,
        id: DomainId,
        number: u64,
        expected: Option<&[u32; SLOTS]>,
        unique: &mut u64,
        stored: &mut u64,
        sums: &mut Sums,
    ) -> Vec<FragmentEntry> {
        let mut live_fragments = Vec::new();
        let shard = self.shard.borrow();
        let Some(d) = shard.domains.get(&id.0) else { return live_fragments };
        let report = &mut sums.report;
        let Some(container) = d.containers.peek(number).filter(|c| c.used() > 0) else {
            let refs: u64 = expected.iter().flat_map(|slots| slots.iter()).map(|&n| u64::from(n)).sum();
            if refs > 0 {
                report.problem(format!(
                    "domain {id}: {refs} map entries point to container {number}, which is not there"
                ));
            }
            return live_fragments;
        };
        report.containers += 1;
        for slot in 0..SLOTS as u16 {
            let (have, want) = (container.refs(slot), expected.map_or(0, |slots| slots[usize::from(slot)]));
            if have != want {
                report.problem(format!(
                    "domain {id}: chunk {number}:{slot} has {have} references, {want} map entries point to it"
                ));
            }
            *unique += u64::from(have > 0);
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
            let segment = fragment.place.segment.segment.0;
            let span = (fragment.place.offset, fragment.place.offset + fragment.unit_bytes);
            let live = u64::from(live_bytes(container, &fragment));
            *stored += live;
            *sums.live.entry(segment).or_default() += live;
            sums.spans.entry(segment).or_default().push(span);
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

    async fn check_nodes(&self, meta: &crate::meta::Meta, sums: &mut Sums) -> Result<(), Status> {
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
            count_node(sums, &ptr);
            let mut level = root.level;
            let mut nodes = vec![0u64];
            while level > 0 {
                let mut below = Vec::new();
                for index in nodes {
                    match self.load_inner(tree, owner, level, index).await {
                        Ok(Some(inner)) => {
                            for (child, ptr) in inner.iter() {
                                count_node(sums, &ptr);
                                below.push(index * FANOUT as u64 + child as u64);
                            }
                        }
                        Ok(None) => {}
                        Err(status) => {
                            let text = format!(
                                "{tree:?} tree of {owner}: node {index} of level {level} can not be read: {status}"
                            );
                            sums.report.problem(text);
                        }
                    }
                }
                nodes = below;
                level -= 1;
            }
        }
        for ptr in meta.catalogue_pointers() {
            count_node(sums, &ptr);
        }
        Ok(())
    }

    fn check_segments(&self, sums: &mut Sums) {
        let shard = self.shard.borrow();
        let (mut data, mut metadata) = (0u64, 0u64);
        for (number, entry) in shard.segments.entries().enumerate() {
            let live = sums.live.get(&(number as u32)).copied().unwrap_or(0);
            match entry.class {
                Some(Class::Metadata) => metadata += live,
                _ => data += live,
            }
            if u64::from(entry.live_bytes) != live {
                sums.report.problem(format!(
                    "segment {number} ({:?}, {}): counts {} live bytes, {live} are referred to",
                    entry.state,
                    match entry.class {
                        Some(Class::Metadata) if entry.domain == POOL_DOMAIN => "catalogue",
                        Some(Class::Metadata) => "metadata",
                        Some(Class::Data) => "data",
                        None => "empty",
                    },
                    entry.live_bytes
                ));
            }
        }
        for number in sums.live.range(shard.segments.len()..).map(|(number, _)| number) {
            sums.report.problem(format!("units in segment {number}, which the device does not have"));
        }
        for (number, spans) in &mut sums.spans {
            spans.sort_unstable();
            let overlaps = spans.windows(2).filter(|pair| pair[0].1 > pair[1].0).count();
            if overlaps > 0 {
                sums.report.problem(format!("segment {number}: {overlaps} units overlap"));
            }
        }
        if (shard.segments.live_data_bytes, shard.segments.live_meta_bytes) != (data, metadata) {
            sums.report.problem(format!(
                "the pool counts {} bytes of data and {} of metadata, there are {data} and {metadata}",
                shard.segments.live_data_bytes, shard.segments.live_meta_bytes
            ));
        }
    }
}

fn count_node(sums: &mut Sums, ptr: &NodePtr) {
    sums.report.nodes += 1;
    let segment = ptr.place.segment.segment.0;
    *sums.live.entry(segment).or_default() += u64::from(ptr.unit_bytes);
    sums.spans.entry(segment).or_default().push((ptr.place.offset, ptr.place.offset + ptr.unit_bytes));
}
