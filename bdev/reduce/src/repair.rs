//! The audit's other half: puts right what can be put right without guessing.
//!
//! Changes are held back for the whole repair. In this order, so that no step can make worse what a later one mends, also
//! if the power fails in between:
//!
//! 1. segments of which too little is said to live are raised: nothing may be written over what lives;
//! 2. maps: nodes that do not verify, and entries whose fragment is gone, become *uncorrectable* (reads are errors on
//!    exactly these blocks); the references of all others are counted;
//! 3. containers: those that do not verify are given up (nothing refers to them any more), references become what was
//!    counted, fingerprint lists are made again from the data;
//! 4. a checkpoint; live bytes and counters become what a second audit adds up; a checkpoint; a third audit reports.
//!
//! What can be read stays as it is. A damaged fragment stays too: its blocks are errors as before, and a later write of
//! the same data heals them all ([`crate::heal`]). A node that the device merely did not give is left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::fingerprint::Fingerprint;
use cryptfold_reduce_format::ids::{ChunkAddr, ContainerId, DomainId, Epoch, HostKeyId, SLOTS};
use cryptfold_reduce_format::map::{MAP_ENTRIES, MapEntry, Target};
use cryptfold_reduce_format::node::{self, FANOUT, Interior};

use crate::check::{FragmentError, Sums};
use crate::info::CheckReport;
use crate::load::NodeError;
use crate::pool::Pool;
use crate::tree::{Found, Missing};

/// What the maps have told.
#[derive(Default)]
struct Seen {
    /// Containers that do not verify.
    lost: BTreeSet<(u32, u64)>,
    /// References by domain and container.
    counts: BTreeMap<(u32, u64), Box<[u32; SLOTS]>>,
}

impl Pool {
    /// Audits, repairs and audits again; see the module's head.
    pub(crate) async fn repair(self: &Rc<Self>, data: bool) -> Result<CheckReport, Status> {
        let _turn = self.audits.lock().await;
        let _paused = self.pause().await?;
        let before = self.audit(data).await?;
        if before.report.is_clean() {
            return Ok(before.report);
        }
        let mut log = CheckReport { found: before.report.problem_count, ..CheckReport::default() };
        self.repair_live(&before, false, &mut log);
        let misprinted = before.misprinted;
        let mut found = Seen::default();
        let volumes: Vec<u32> = self.shard.borrow().volumes.keys().copied().collect();
        for id in volumes {
            self.repair_map(id, &mut found, &mut log).await?;
        }
        let domains: Vec<(u32, u64)> =
            self.shard.borrow().domains.iter().map(|(id, d)| (*id, d.next_container)).collect();
        for (id, end) in domains {
            for number in 1..end {
                self.repair_container(DomainId(id), number, &mut found, &mut log).await?;
            }
        }
        drop(found);
        for (domain, number) in misprinted {
            self.repair_fingerprints(domain, number, true, &mut log).await?;
        }
        self.checkpoint().await?;
        let counted = self.audit(false).await?;
        self.repair_live(&counted, true, &mut log);
        self.repair_counters(&counted, &mut log);
        // From the correction of the table to this checkpoint nothing may happen, so nothing may happen if it fails.
        self.checkpoint().await.inspect_err(|status| self.fail(*status))?;
        let mut report = self.audit(data).await?.report;
        (report.found, report.repairs, report.repair_count) = (log.found, log.repairs, log.repair_count);
        Ok(report)
    }

    /// Live bytes of segments become what was added up; without `exact` only where that is more.
    fn repair_live(&self, sums: &Sums, exact: bool, log: &mut CheckReport) {
        let mut shard = self.shard.borrow_mut();
        let now = self.now();
        for number in 0..shard.segments.len() {
            let Some(have) = shard.segments.entry(number).map(|entry| entry.live_bytes) else { continue };
            let live = sums.live.get(&number).copied().unwrap_or(0).min(u64::from(u32::MAX)) as u32;
            if live > have || (exact && live != have) {
                shard.segments.correct(number, live, now);
                log.repair(format!("segment {number}: {have} live bytes corrected to {live}"));
            }
        }
    }

    fn repair_counters(&self, sums: &Sums, log: &mut CheckReport) {
        let mut shard = self.shard.borrow_mut();
        for (id, d) in &mut shard.domains {
            let Some(&(mapped, unique, stored)) = sums.domains.get(id) else { continue };
            if (d.mapped, d.unique, d.stored_bytes) != (mapped, unique, stored) {
                (d.mapped, d.unique, d.stored_bytes) = (mapped, unique, stored);
                log.repair(format!(
                    "domain {id}: counters corrected to {mapped} references to {unique} chunks in {stored} bytes"
                ));
            }
        }
    }

    /// Tells whether leaf `index` can be used (`None`), or the node on the way to it that is lost for good.
    async fn lost_node(&self, tree: node::Tree, owner: u32, index: u64) -> Result<Option<Missing>, Status> {
        loop {
            let mut pins = self.pins();
            if self.load_leaf(tree, owner, index, &mut pins).await.is_ok() {
                return Ok(None);
            }
            let Some(Some(missing)) = self.with_tree(tree, owner, |tree| tree.missing(0, index)) else {
                return Ok(None);
            };
            match self.read_node(tree, owner.into(), missing).await {
                Ok(_) => {}
                Err(NodeError::Damaged(_) | NodeError::Io(Status::UNRECOVERED_READ)) => {
                    return Ok(Some(missing));
                }
                Err(NodeError::Io(status)) => return Err(status),
            }
        }
    }

    /// Gives up what lies below a lost node, of which nothing is known: what is in RAM is written again.
    fn replace_node(&self, tree: node::Tree, owner: u32, missing: Missing) {
        let first = missing.index << (8 * u32::from(missing.level)).min(63);
        let leaves = 1u64 << (8 * u32::from(missing.level)).min(63);
        self.with_tree(tree, owner, |tree| {
            if missing.level > 0 {
                tree.insert_inner(missing.level, missing.index, Rc::new(Interior::default()));
                tree.touch_cached(first, leaves);
            } else {
                tree.clear(missing.index);
            }
        });
    }

    // ---- maps

    async fn repair_map(&self, id: u32, found: &mut Seen, log: &mut CheckReport) -> Result<(), Status> {
        let facts = self.shard.borrow().volumes.get(&id).map(|v| (v.record.blocks, v.record.domain));
        let Some((blocks, domain)) = facts else { return Ok(()) };
        let (mut chunks, mut special) = (0, 0);
        let mut births = BTreeMap::new();
        for index in 0..blocks.div_ceil(MAP_ENTRIES as u64) {
            if index % 64 == 63 {
                reactor::yield_now().await;
            }
            let absent = self
                .shard
                .borrow()
                .volumes
                .get(&id)
                .is_none_or(|v| matches!(v.tree.find(index), Found::Absent));
            if absent {
                continue;
            }
            if let Some(missing) = self.lost_node(node::Tree::Map, id, index).await? {
                self.give_up_map(id, missing, blocks, log)?;
            }
            let counted = self.repair_leaf(id, domain, index, (&mut *found, &mut births), log).await?;
            chunks += counted.0;
            special += counted.1;
            self.relieve().await?;
        }
        let mut shard = self.shard.borrow_mut();
        if shard.recount_births(id, &births) {
            log.repair(format!("volume {id}: chunks by birth counted again"));
        }
        if let Some(v) = shard.volumes.get_mut(&id)
            && (v.chunks, v.special) != (chunks, special)
        {
            (v.chunks, v.special) = (chunks, special);
            log.repair(format!(
                "volume {id}: counters corrected to {chunks} chunks and {special} zero or pattern blocks"
            ));
        }
        Ok(())
    }

    /// All blocks below a lost node of a map become uncorrectable: which of them were written is not known any more.
    fn give_up_map(
        &self,
        id: u32,
        missing: Missing,
        blocks: u64,
        log: &mut CheckReport,
    ) -> Result<(), Status> {
        if missing.level > 1 {
            // Half of it durable would be blocks that read as if they had never been written.
            tracing::error!(
                pool = %self.name(), volume = id, level = missing.level, index = missing.index,
                "an upper node of a map is lost; delete the volume"
            );
            return Err(Status::UNRECOVERED_READ);
        }
        let span = if missing.level == 0 { 1 } else { FANOUT as u64 };
        let first = missing.index * span;
        self.replace_node(node::Tree::Map, id, missing);
        let mut shard = self.shard.borrow_mut();
        let Some(v) = shard.volumes.get_mut(&id) else { return Ok(()) };
        let mut lost = 0;
        for index in first..first + span {
            let start = index * MAP_ENTRIES as u64;
            let kept = missing.level > 0 && matches!(v.tree.find(index), Found::Here(_));
            if kept || start >= blocks {
                continue;
            }
            let leaf = v.tree.get_mut(index);
            for at in 0..(blocks - start).min(MAP_ENTRIES as u64) {
                // As old as can be: snapshots that showed what was here have lost it too.
                leaf.set(at as usize, uncorrectable(OLDEST));
                lost += 1;
            }
        }
        log.repair(format!(
            "volume {id}: {lost} blocks from {} on are uncorrectable: the node that knew them is lost",
            first * MAP_ENTRIES as u64
        ));
        Ok(())
    }

    /// Gives up the entries of a leaf whose chunks are gone, and counts the others. Gives chunks and special blocks.
    async fn repair_leaf(
        &self,
        id: u32,
        domain: DomainId,
        index: u64,
        (found, births): (&mut Seen, &mut BTreeMap<u32, u64>),
        log: &mut CheckReport,
    ) -> Result<(u64, u64), Status> {
        let mut pins = self.pins();
        self.load_leaf(node::Tree::Map, id, index, &mut pins).await?;
        let entries: Vec<MapEntry> = {
            let shard = self.shard.borrow();
            let Some(leaf) = shard.volumes.get(&id).and_then(|v| v.tree.peek(index)) else {
                return Ok((0, 0));
            };
            leaf.iter().collect()
        };
        let (mut chunks, mut special) = (0, 0);
        let mut gone = Vec::new();
        for (at, entry) in entries.iter().enumerate() {
            match entry.target {
                Target::Unmapped | Target::Uncorrectable => {}
                Target::Zero | Target::Pattern(_) => special += 1,
                Target::Chunk(addr) if !self.is_there(domain, addr, found).await? => gone.push(at),
                Target::Chunk(addr) => {
                    chunks += 1;
                    *births.entry(entry.birth.0).or_default() += 1;
                    let key = (domain.0, addr.container().get());
                    let counts = found.counts.entry(key).or_insert_with(|| Box::new([0; SLOTS]));
                    counts[usize::from(addr.slot())] += 1;
                }
            }
        }
        if !gone.is_empty() {
            let mut shard = self.shard.borrow_mut();
            if let Some(v) = shard.volumes.get_mut(&id) {
                let leaf = v.tree.get_mut(index);
                // Whoever showed the chunk shows this.
                gone.iter().for_each(|&at| leaf.set(at, uncorrectable(entries[at].birth)));
            }
            log.repair(format!(
                "volume {id}: {} of the blocks {} .. {} are uncorrectable: their chunks are gone",
                gone.len(),
                index * MAP_ENTRIES as u64,
                (index + 1) * MAP_ENTRIES as u64
            ));
        }
        Ok((chunks, special))
    }

    /// Whether a chunk has a fragment that can be, or may be, read.
    async fn is_there(&self, domain: DomainId, addr: ChunkAddr, found: &mut Seen) -> Result<bool, Status> {
        let number = addr.container().get();
        if found.lost.contains(&(domain.0, number)) {
            return Ok(false);
        }
        let mut pins = self.pins();
        if self.load_leaf(node::Tree::Containers, domain.0, number, &mut pins).await.is_err()
            && self.lost_node(node::Tree::Containers, domain.0, number).await?.is_some()
        {
            found.lost.insert((domain.0, number));
            return Ok(false);
        }
        let (entry, fits) = {
            let shard = self.shard.borrow();
            let container = shard.domains.get(&domain.0).and_then(|d| d.containers.peek(number));
            let Some(entry) = container.and_then(|container| container.fragment_of(addr.slot())) else {
                return Ok(false);
            };
            (entry, shard.holds(domain, &entry))
        };
        if fits {
            return Ok(true);
        }
        let Some(first) = ChunkAddr::new(addr.container(), entry.first_slot) else { return Ok(false) };
        match self.read_fragment(&entry, first).await {
            Ok(_) => Ok(true),
            Err(FragmentError::Damaged(_)) => Ok(false),
            Err(FragmentError::Io(status)) => Err(status),
        }
    }

    // ---- containers

    async fn repair_container(
        &self,
        id: DomainId,
        number: u64,
        found: &mut Seen,
        log: &mut CheckReport,
    ) -> Result<(), Status> {
        if number % 64 == 63 {
            reactor::yield_now().await;
        }
        let counts = found.counts.remove(&(id.0, number));
        if let Some(missing) = self.lost_node(node::Tree::Containers, id.0, number).await? {
            self.replace_node(node::Tree::Containers, id.0, missing);
            log.repair(format!("domain {id}: container {number} is given up: it can not be read"));
        }
        if let Some(missing) = self.lost_node(node::Tree::Fingerprints, id.0, number).await? {
            self.replace_node(node::Tree::Fingerprints, id.0, missing);
        }
        let mut pins = self.pins();
        self.load_leaf(node::Tree::Containers, id.0, number, &mut pins).await?;
        self.repair_references(id, number, counts.as_deref(), log)?;
        self.repair_fingerprints(id, number, false, log).await?;
        self.relieve().await
    }

    fn repair_references(
        &self,
        id: DomainId,
        number: u64,
        counts: Option<&[u32; SLOTS]>,
        log: &mut CheckReport,
    ) -> Result<(), Status> {
        let wanted = |slot: u16| counts.map_or(0, |counts| counts[usize::from(slot)]);
        let mut shard = self.shard.borrow_mut();
        let Some(d) = shard.domains.get_mut(&id.0) else { return Ok(()) };
        let Some(container) = d.containers.peek(number) else { return Ok(()) };
        let wrong = (0..SLOTS as u16).filter(|&slot| container.refs(slot) != wanted(slot)).count();
        if wrong == 0 {
            return Ok(());
        }
        let container = d.containers.get_mut(number);
        for slot in 0..SLOTS as u16 {
            // In steps, because a change has 31 bits.
            while container.refs(slot) != wanted(slot) {
                let delta = i64::from(wanted(slot)) - i64::from(container.refs(slot));
                let delta = delta.clamp(-(1 << 30), 1 << 30) as i32;
                container.change_refs(slot, delta).map_err(|_| Status::INTERNAL_ERROR)?;
            }
        }
        let dead: Vec<u16> = container
            .fragments()
            .filter(|fragment| container.live_in(fragment) == 0)
            .map(|fragment| fragment.first_slot)
            .collect();
        for first in dead {
            container.replace(first, &[]).map_err(|_| Status::INTERNAL_ERROR)?;
        }
        log.repair(format!("domain {id}: references of {wrong} chunks of container {number} corrected"));
        if container.live() == 0
            && container.used() > 0
            && let Some(container) = ContainerId::new(number)
        {
            shard.emptied.push((id, container));
        }
        Ok(())
    }

    /// Makes the list again from the data, where it is missing or (`wrong`) does not fit it.
    async fn repair_fingerprints(
        &self,
        id: DomainId,
        number: u64,
        wrong: bool,
        log: &mut CheckReport,
    ) -> Result<(), Status> {
        let mut pins = self.pins();
        self.load_leaf(node::Tree::Containers, id.0, number, &mut pins).await?;
        self.load_leaf(node::Tree::Fingerprints, id.0, number, &mut pins).await?;
        let (fragments, used, generation) = {
            let shard = self.shard.borrow();
            let Some(d) = shard.domains.get(&id.0) else { return Ok(()) };
            let Some(container) = d.containers.peek(number).filter(|container| container.used() > 0) else {
                drop(shard);
                self.drop_fingerprints(id, number, log);
                return Ok(());
            };
            let have = d.fingerprints.peek(number).map_or(0, |prints| prints.slots.len());
            if have >= usize::from(container.used()) && !wrong {
                return Ok(());
            }
            (container.fragments().collect::<Vec<_>>(), container.used(), d.generation)
        };
        let mut slots = vec![Fingerprint::NONE; used.into()];
        for entry in fragments {
            let Some(first) = ContainerId::new(number).and_then(|c| ChunkAddr::new(c, entry.first_slot))
            else {
                continue;
            };
            match self.read_fragment(&entry, first).await {
                Ok(plain) => {
                    let from = usize::from(entry.first_slot);
                    let prints = self.fingerprints_of(id, &plain);
                    slots[from..from + prints.len()].copy_from_slice(&prints);
                }
                Err(FragmentError::Damaged(_)) => {}
                Err(FragmentError::Io(status)) => return Err(status),
            }
        }
        if let Some(d) = self.shard.borrow_mut().domains.get_mut(&id.0) {
            let leaf = d.fingerprints.get_mut(number);
            (leaf.generation, leaf.hash, leaf.slots) = (generation, d.hasher.id(), slots);
        }
        if let Ok(Some(lists)) = self.lists(id, number).await {
            self.shard.borrow_mut().index_container(id, number, &lists);
        }
        log.repair(format!("domain {id}: fingerprints of container {number} made again from its data"));
        Ok(())
    }

    fn drop_fingerprints(&self, id: DomainId, number: u64, log: &mut CheckReport) {
        let mut shard = self.shard.borrow_mut();
        let Some(d) = shard.domains.get_mut(&id.0) else { return };
        if d.fingerprints.peek(number).is_some_and(|prints| !prints.slots.is_empty()) {
            d.fingerprints.clear(number);
            log.repair(format!(
                "domain {id}: fingerprints of container {number}, which does not exist, dropped"
            ));
        }
    }

    /// Keeps what is changed within what a checkpoint and the caches can take.
    async fn relieve(&self) -> Result<(), Status> {
        if self.dirty_bytes() > self.dirty_limit() {
            self.checkpoint().await?;
        }
        Ok(())
    }
}

/// Birth of what was there before all snapshots.
const OLDEST: Epoch = Epoch(1);

fn uncorrectable(birth: Epoch) -> MapEntry {
    MapEntry { target: Target::Uncorrectable, birth, host_key: HostKeyId(0) }
}
