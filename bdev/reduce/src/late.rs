//! Late deduplication: finds what the sampled index has missed, in the background, and makes one chunk of two.
//!
//! Containers are compared with each other from the first to the last, a batch at a time: the fingerprints of the batch's
//! chunks are put into a table, those of all containers before it are looked up there. Then the maps of the domain's volumes
//! are gone through, and every entry that is the later of two chunks with the same fingerprint becomes the earlier one
//! (`MapRetarget`: birth and everything else stay). The later chunk loses its references and dies as any other.
//!
//! Invariants:
//! - what was found is only a hint: an entry changes in one step without waiting, in which both chunks have references and
//!   the same fingerprint of the present generation, and neither is known to be damaged;
//! - containers below a domain's mark ([`DomainRecord::compared`]) have been compared. The mark moves after the batch's entries
//!   have changed, and is saved by checkpoints, so a pass that is interrupted repeats a batch at most;
//! - its tables count as cache: while they are there, the trees have less.
//!
//! [`DomainRecord::compared`]: cryptfold_reduce_format::record::DomainRecord::compared

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::entry::{Record, Retarget};
use cryptfold_reduce_format::fingerprint::Fingerprint;
use cryptfold_reduce_format::ids::{ChunkAddr, ContainerId, DomainId, Generation, SLOTS, VolumeId};
use cryptfold_reduce_format::map::MapLeaf;
use cryptfold_reduce_format::node;

use crate::info::{LateInfo, ScrubState};
use crate::load::Lists;
use crate::pool::{Life, Pool};
use crate::shard::{Domain, MAX_REFS, Needs, Shard};
use crate::tree::Found;

/// Bytes of the tables for a chunk of the batch: its row, its twin, its bits.
const CHUNK_BYTES: usize = size_of::<Row>() + size_of::<Twin>() + 2;
/// Containers that are read at once.
const AT_ONCE: usize = 8;
/// Steps (a container, a leaf) between two looks at what hosts want.
const STEPS: u32 = 8;
/// New containers (2 MiB of data each) at which a pass begins by itself while the index is sampled.
const WORTH_IT: u64 = 2048;

/// A chunk of the batch.
#[derive(Clone, Copy)]
struct Row {
    print: u64,
    addr: u64,
    /// The first chunk before the batch with this fingerprint (its first 64 bits); 0 = none.
    older: u64,
}

/// A chunk, and the one that it is to become.
type Twin = (u64, u64);

/// The chunks of a batch by fingerprint, with a filter before them: nearly all look-ups find nothing.
struct Batch {
    rows: Vec<Row>,
    filter: Vec<u64>,
}

impl Batch {
    fn new(mut rows: Vec<Row>) -> Batch {
        rows.sort_unstable_by_key(|row| (row.print, row.addr));
        let words = (rows.len() / 4).max(1).next_power_of_two();
        let mut filter = vec![0; words];
        for row in &rows {
            filter[row.print as usize & (words - 1)] |= 1 << (row.print >> 58);
        }
        Batch { rows, filter }
    }

    /// A chunk before the batch.
    fn meet(&mut self, print: u64, addr: u64) {
        if self.filter[print as usize & (self.filter.len() - 1)] >> (print >> 58) & 1 == 0 {
            return;
        }
        let from = self.rows.partition_point(|row| row.print < print);
        for row in self.rows[from..].iter_mut().take_while(|row| row.print == print) {
            if row.older == 0 || row.older > addr {
                row.older = addr;
            }
        }
    }

    /// What is to become what, ascending.
    fn twins(self) -> Vec<Twin> {
        let mut twins = Vec::new();
        for group in self.rows.chunk_by(|a, b| a.print == b.print) {
            let first = if group[0].older > 0 { group[0].older } else { group[0].addr };
            twins.extend(group.iter().filter(|row| row.addr != first).map(|row| (row.addr, first)));
        }
        twins.sort_unstable();
        twins
    }
}

/// Bytes of RAM that are taken from the caches' share.
struct Taken<'a>(&'a Pool, usize);

impl<'a> Taken<'a> {
    fn new(pool: &'a Pool, bytes: usize) -> Self {
        let shard = pool.shard.borrow();
        shard.meter.bytes.set(shard.meter.bytes.get() + bytes);
        drop(shard);
        pool.keep_budget();
        Taken(pool, bytes)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let shard = self.0.shard.borrow();
        shard.meter.bytes.set(shard.meter.bytes.get().saturating_sub(self.1));
    }
}

/// Lets hosts go first.
struct Manners {
    steps: Cell<u32>,
    began: Cell<reactor::Nanos>,
    host_bytes: Cell<u64>,
}

impl Manners {
    fn new(pool: &Pool) -> Manners {
        Manners {
            steps: Cell::default(),
            began: Cell::new(reactor::now()),
            host_bytes: Cell::new(pool.host_bytes.get()),
        }
    }

    /// After a step. While hosts write, three quarters of the time are theirs.
    async fn step(&self, pool: &Pool) {
        self.steps.set(self.steps.get() + 1);
        if self.steps.get() < STEPS {
            return;
        }
        self.steps.set(0);
        let written = pool.host_bytes.get();
        if self.host_bytes.replace(written) == written {
            reactor::yield_now().await;
        } else {
            let took: Duration = reactor::now() - self.began.get();
            reactor::sleep((took * 3).min(Duration::from_millis(100))).await;
        }
        self.began.set(reactor::now());
    }
}

/// Slots of a container with data that could be referenced, with their fingerprints.
fn live<'a>(
    d: &Domain,
    number: u64,
    (container, prints): &'a Lists,
) -> impl Iterator<Item = (ChunkAddr, &'a Fingerprint)> {
    let current = prints.generation == d.generation;
    let id = ContainerId::new(number).filter(|_| current);
    let slots = prints.slots.iter().enumerate().take(SLOTS);
    slots.filter_map(move |(slot, print)| {
        let there = *print != Fingerprint::NONE && container.refs(slot as u16) > 0;
        Some((ChunkAddr::new(id?, slot as u16).filter(|_| there)?, print))
    })
}

impl Pool {
    /// Starts a pass, unless one runs. `batch`: containers at a time; `None` = as many as the budget allows.
    pub(crate) fn start_late(self: &Rc<Self>, batch: Option<u64>) -> Result<LateInfo, Status> {
        self.check_writable()?;
        let mut late = self.late.borrow_mut();
        if late.state == ScrubState::Running {
            return Ok(late.clone());
        }
        *late = LateInfo { state: ScrubState::Running, ..LateInfo::default() };
        tracing::info!(pool = %self.name(), "late deduplication begins");
        let pool = self.clone();
        self.background(async move {
            let state = match pool.run_late(batch).await {
                Ok(state) => state,
                Err(status) => {
                    tracing::warn!(pool = %pool.name(), %status, "late deduplication was interrupted");
                    ScrubState::Stopped
                }
            };
            let mut late = pool.late.borrow_mut();
            late.state = state;
            tracing::info!(
                pool = %pool.name(), ?state, containers = late.containers, found = late.found, blocks = late.blocks,
                "late deduplication ended"
            );
        });
        Ok(late.clone())
    }

    /// Ends a pass before its next step.
    pub(crate) fn stop_late(&self) -> LateInfo {
        let mut late = self.late.borrow_mut();
        if late.state == ScrubState::Running {
            late.state = ScrubState::Stopped;
        }
        late.clone()
    }

    /// Starts a pass if the index is sampled and there is enough that has not been compared.
    pub(crate) fn start_late_if_worth_it(self: &Rc<Self>) {
        let worth_it = {
            let shard = self.shard.borrow();
            let mut new = shard.domains.values().map(|d| d.next_container.saturating_sub(d.record.compared));
            shard.index.hook_bits() > 0 && new.any(|new| new > WORTH_IT)
        };
        if worth_it && self.life.get() == Life::Open {
            // Refused only while the pool is closed.
            let _ = self.start_late(None);
        }
    }

    fn late_goes_on(&self) -> bool {
        self.late.borrow().state == ScrubState::Running && self.life.get() == Life::Open
    }

    /// First container of a domain that is still being filled.
    fn first_filling(&self, domain: DomainId) -> u64 {
        let lanes = self.lanes.borrow();
        let open =
            lanes.values().filter(|lane| lane.domain == domain).filter_map(|lane| lane.open_container());
        open.chain(self.lent_containers(domain)).map(ContainerId::get).min().unwrap_or(u64::MAX)
    }

    async fn run_late(self: &Rc<Self>, batch: Option<u64>) -> Result<ScrubState, Status> {
        let most = (self.cache_bytes / 8 / (CHUNK_BYTES * SLOTS)).max(1) as u64;
        let batch = batch.unwrap_or(most).clamp(1, most);
        let domains: Vec<DomainId> = self.shard.borrow().domains.values().map(|d| d.record.id).collect();
        let range = |domain: DomainId| {
            let shard = self.shard.borrow();
            shard.domains.get(&domain.0).map_or(0..0, |d| d.record.compared.max(1)..d.next_container)
        };
        let ranges: Vec<Range<u64>> = domains.iter().map(|id| range(*id)).collect();
        self.late.borrow_mut().total_containers = ranges.iter().map(|range| range.end - range.start).sum();
        for (domain, range) in domains.into_iter().zip(ranges) {
            let mut from = range.start;
            let keys = self.settled_keys(domain);
            while from < range.end {
                let to = range.end.min(from + batch);
                let _taken = Taken::new(self, (to - from) as usize * SLOTS * CHUNK_BYTES);
                let filling = self.first_filling(domain);
                let twins = self.find_twins(domain, from..to).await;
                self.late.borrow_mut().found += twins.len() as u64;
                if !twins.is_empty() && self.late_goes_on() {
                    self.retarget_all(domain, &twins).await?;
                }
                if !self.late_goes_on() {
                    return Ok(ScrubState::Stopped);
                }
                // Lists of other generations are passed over: then all has to be compared again.
                if keys.is_some()
                    && self.settled_keys(domain) == keys
                    && let Some(d) = self.shard.borrow_mut().domains.get_mut(&domain.0)
                {
                    d.record.compared = d.record.compared.max(to.min(filling));
                }
                self.late.borrow_mut().containers += to - from;
                from = to;
            }
        }
        Ok(ScrubState::Done)
    }

    /// Generation of a domain's keys, unless they are being changed.
    fn settled_keys(&self, domain: DomainId) -> Option<Generation> {
        let shard = self.shard.borrow();
        shard.domains.get(&domain.0).filter(|d| !d.is_changing()).map(|d| d.generation)
    }

    /// Gives all containers of a range to `f`, in no order, several being read at once. Ends early when `goes_on` says so.
    /// What can not be read is left out; the loader has reported it.
    pub(crate) async fn each_list(
        self: &Rc<Self>,
        domain: DomainId,
        range: Range<u64>,
        goes_on: fn(&Pool) -> bool,
        f: impl FnMut(&Pool, u64, &Lists) + 'static,
    ) {
        let next = Rc::new(Cell::new(range.start));
        let f = Rc::new(RefCell::new(f));
        let workers: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                let (pool, next, f, end) = (self.clone(), next.clone(), f.clone(), range.end);
                reactor::spawn_local(async move {
                    let manners = Manners::new(&pool);
                    while next.get() < end && goes_on(&pool) {
                        let number = next.replace(next.get() + 1);
                        if let Ok(Some(lists)) = pool.lists(domain, number).await {
                            (f.borrow_mut())(&pool, number, &lists);
                        }
                        manners.step(&pool).await;
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.await;
        }
    }

    /// Chunks of a range of containers that are there twice: in the range, or before it.
    async fn find_twins(self: &Rc<Self>, domain: DomainId, range: Range<u64>) -> Vec<Twin> {
        let rows = Rc::new(RefCell::new(Vec::new()));
        let into = rows.clone();
        self.each_list(domain, range.clone(), Pool::late_goes_on, move |pool, number, lists| {
            let shard = pool.shard.borrow();
            let Some(d) = shard.domains.get(&domain.0) else { return };
            let new = live(d, number, lists);
            into.borrow_mut().extend(new.map(|(addr, print)| Row {
                print: print.prefix(),
                addr: addr.raw(),
                older: 0,
            }));
        })
        .await;
        let batch = Rc::new(RefCell::new(Batch::new(rows.take())));
        let into = batch.clone();
        self.each_list(domain, 1..range.start, Pool::late_goes_on, move |pool, number, lists| {
            let shard = pool.shard.borrow();
            let Some(d) = shard.domains.get(&domain.0) else { return };
            let mut batch = into.borrow_mut();
            live(d, number, lists).for_each(|(addr, print)| batch.meet(print.prefix(), addr.raw()));
        })
        .await;
        batch.replace(Batch { rows: Vec::new(), filter: vec![0] }).twins()
    }

    /// Goes through all maps of a domain.
    async fn retarget_all(self: &Rc<Self>, domain: DomainId, twins: &[Twin]) -> Result<(), Status> {
        let volumes: Vec<VolumeId> = {
            let shard = self.shard.borrow();
            let mine = shard.volumes.values().filter(|v| v.record.domain == domain);
            mine.map(|v| v.record.id).collect()
        };
        let manners = Manners::new(self);
        for volume in volumes {
            let mut leaf = 0;
            while let Some(at) = self.leaf_from(volume, leaf).await {
                if !self.late_goes_on() {
                    return Ok(());
                }
                leaf = at + 1;
                self.retarget(domain, volume, at, twins).await?;
                manners.step(self).await;
            }
        }
        Ok(())
    }

    /// The first leaf of a volume's map from `leaf` on that may exist.
    async fn leaf_from(&self, volume: VolumeId, mut leaf: u64) -> Option<u64> {
        loop {
            {
                let shard = self.shard.borrow();
                let v = shard.volumes.get(&volume.0)?;
                let end = v.record.blocks.div_ceil(512);
                for _ in 0..4096 {
                    if leaf >= end {
                        return None;
                    }
                    if !matches!(v.tree.find(leaf), Found::Absent) {
                        return Some(leaf);
                    }
                    leaf += 1;
                }
            }
            reactor::yield_now().await;
        }
    }

    /// Changes what is to be changed in one leaf.
    async fn retarget(
        self: &Rc<Self>,
        domain: DomainId,
        volume: VolumeId,
        leaf: u64,
        twins: &[Twin],
    ) -> Result<(), Status> {
        let _busy = self.enter();
        self.throttle().await?;
        let mut pins = self.pins();
        if self.load_leaf(node::Tree::Map, volume.0, leaf, &mut pins).await.is_err() {
            // Reported; what it maps stays as it is.
            return Ok(());
        }
        loop {
            let mut needs = Needs::new();
            {
                let shard = self.shard.borrow();
                let (Some(v), Some(d)) = (shard.volumes.get(&volume.0), shard.domains.get(&domain.0)) else {
                    return Ok(());
                };
                let Some(entries) = v.tree.peek(leaf) else { return Ok(()) };
                for (_, old, new) in wanted(entries, twins) {
                    for addr in [old, new] {
                        let number = addr.container().get();
                        Shard::need(&d.containers, domain.0, number, &mut needs);
                        Shard::need(&d.fingerprints, domain.0, number, &mut needs);
                    }
                }
            }
            if needs.is_empty() {
                break;
            }
            if self.load_all(needs, &mut pins).await.is_err() {
                return Ok(());
            }
        }
        // ---- no wait from here on.
        self.check_writable()?;
        let (changes, scope) = {
            let shard = self.shard.borrow();
            let (Some(v), Some(d)) = (shard.volumes.get(&volume.0), shard.domains.get(&domain.0)) else {
                return Ok(());
            };
            let Some(entries) = v.tree.peek(leaf).filter(|_| !v.is_deleting()) else { return Ok(()) };
            let same = wanted(entries, twins).filter(|(_, old, new)| shard.are_same(d, *old, *new));
            (same.map(|(slot, _, new)| Retarget::new(slot, new)).collect::<Vec<_>>(), d.scope())
        };
        if changes.is_empty() {
            return Ok(());
        }
        self.late.borrow_mut().blocks += changes.len() as u64;
        self.record(scope, &Record::MapRetarget { volume, leaf, changes: &changes })
    }
}

/// Entries of a leaf that are the later of two: entry, what it is, what it is to become.
fn wanted<'a>(
    entries: &'a MapLeaf,
    twins: &'a [Twin],
) -> impl Iterator<Item = (u16, ChunkAddr, ChunkAddr)> + use<'a> {
    entries.iter().enumerate().filter_map(|(slot, entry)| {
        let old = entry.chunk()?;
        let at = twins.binary_search_by_key(&old.raw(), |twin| twin.0).ok()?;
        Some((slot as u16, old, ChunkAddr::from_raw(twins[at].1)?))
    })
}

impl Shard {
    /// Whether two chunks, whose tables are in RAM, have the same content, and the second can take more references.
    fn are_same(&self, d: &Domain, old: ChunkAddr, new: ChunkAddr) -> bool {
        let print = |addr: ChunkAddr| {
            let leaf = d.fingerprints.peek(addr.container().get())?;
            let print = leaf.slots.get(usize::from(addr.slot()))?;
            (leaf.generation == d.generation && *print != Fingerprint::NONE).then_some(print)
        };
        // Damaged: the second must not be referred to, the first is healed instead.
        let fine = |addr: ChunkAddr, most: u32| {
            let container = d.containers.peek(addr.container().get());
            container.is_some_and(|c| {
                (1..most).contains(&c.refs(addr.slot())) && !self.is_damaged(d.record.id, c, addr)
            })
        };
        let equal = print(old).is_some_and(|old| print(new) == Some(old));
        // One entry of a leaf at a time is counted; a leaf has 512.
        old != new && equal && fine(old, u32::MAX) && fine(new, MAX_REFS - 512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_chunk_stays() {
        let row = |print: u64, addr| Row { print: print << 50, addr, older: 0 };
        let mut batch =
            Batch::new(vec![row(3, 30), row(1, 10), row(2, 21), row(2, 20), row(1, 11), row(4, 40)]);
        batch.meet(1 << 50, 7);
        batch.meet(1 << 50, 5);
        batch.meet(3 << 50, 6);
        batch.meet(9 << 50, 1);
        assert_eq!(batch.twins(), [(10, 5), (11, 5), (21, 20), (30, 6)]);
    }
}
