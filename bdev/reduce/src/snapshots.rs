//! Snapshots, clones, and the background work that ends sharing: deleting, inflating, decoupling.
//!
//! Taking a snapshot or a clone is one record. Everything that goes through maps works leaf by leaf, each step a record of
//! its own ([`Record::MapMerge`], [`Record::MapOwn`]), yields to hosts in between, and goes on after a restart (a deletion
//! by itself, the rest when asked for again).

use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::entry::{OwnFrom, Record};
use cryptfold_reduce_format::ids::{Epoch, VolumeId};
use cryptfold_reduce_format::journal::Scope;
use cryptfold_reduce_format::map::MAP_ENTRIES;
use cryptfold_reduce_format::record::{VolumeRecord, volume_flags};

use crate::admin::check_name;
use crate::error::PoolError;
use crate::info::VolumeInfo;
use crate::pool::Pool;
use crate::shard::{ApplyError, Needs, Shard};
use crate::tree::Found;
use crate::volume::VolumeDevice;

/// Leaves that are looked at before others may run.
const LOOKED: u64 = 4096;

/// A leaf by leaf change.
#[derive(Clone, Copy)]
enum Step {
    Merge,
    Own(OwnFrom),
}

/// Keeps other long work away from a volume until it is dropped.
struct Job {
    pool: Rc<Pool>,
    id: VolumeId,
}

impl Drop for Job {
    fn drop(&mut self) {
        self.pool.jobs.borrow_mut().remove(&self.id);
    }
}

impl Pool {
    fn begin_job(self: &Rc<Self>, id: VolumeId) -> Option<Job> {
        self.jobs.borrow_mut().insert(id).then(|| Job { pool: self.clone(), id })
    }

    fn check_not_working(&self, id: VolumeId) -> Result<(), PoolError> {
        if self.jobs.borrow().contains(&id) {
            return Err(PoolError::Busy(format!("volume {} is being inflated", self.name_of(id))));
        }
        Ok(())
    }

    /// POOL/NAME.
    pub(crate) fn name_of(&self, id: VolumeId) -> String {
        let shard = self.shard.borrow();
        let name = shard.volumes.get(&id.0).map_or_else(|| id.to_string(), |v| v.record.name.clone());
        format!("{}/{name}", self.name())
    }

    /// A new record that goes on from `source`.
    fn successor(&self, source: VolumeId, name: &str) -> Result<(VolumeRecord, Epoch), PoolError> {
        check_name("volume", name)?;
        self.check_name_free(name)?;
        let shard = self.shard.borrow();
        let v = shard.volume(source).map_err(|_| self.no_volume(&source.to_string()))?;
        let mut record = VolumeRecord::new(
            shard.pool.next_volume,
            crate::admin::draw_uuid(),
            name,
            v.record.domain,
            v.record.blocks,
        );
        record.created_ms = crate::open::now_ms();
        record.block_bytes = v.record.block_bytes;
        record.compression = v.record.compression;
        record.host_keys = v.record.host_keys.clone();
        record.birth = shard.epoch();
        Ok((record, shard.epoch()))
    }

    /// Takes a snapshot; its device is for the caller to register. It has everything that was written before, and of what is
    /// being written, block by block, the old or the new.
    pub(crate) async fn snapshot_volume(
        self: &Rc<Self>,
        id: VolumeId,
        name: &str,
    ) -> Result<(VolumeInfo, Arc<VolumeDevice>), PoolError> {
        let _busy = self.enter();
        self.throttle().await.map_err(|status| self.stopped(status))?;
        self.check_not_working(id)?;
        let (mut record, epoch) = self.successor(id, name)?;
        {
            let shard = self.shard.borrow();
            let v = shard.volume(id).map_err(|_| self.no_volume(&id.to_string()))?;
            if v.is_read_only() {
                return Err(PoolError::Invalid(format!(
                    "{} is read-only: a snapshot of it would be the same; clone it instead",
                    self.name_of(id)
                )));
            }
            record.flags = volume_flags::SNAPSHOT | volume_flags::READ_ONLY;
            record.family = Some(v.record.family_id());
            record.base = v.record.base;
            record.counters[2] = v.chunks + v.special;
        }
        let next = Epoch(epoch.0.checked_add(1).ok_or_else(|| {
            PoolError::Invalid("the pool has had 2^32 snapshots, no more are possible".into())
        })?);
        let bytes = record.encode().map_err(|error| PoolError::Invalid(error.to_string()))?;
        self.record(Scope::Pool, &Record::Snapshot { volume: id, epoch: next, record: &bytes })
            .map_err(|s| self.stopped(s))?;
        self.made(&record).await
    }

    /// Makes a volume that begins with what a snapshot (or read-only volume) has.
    pub(crate) async fn clone_volume(
        self: &Rc<Self>,
        id: VolumeId,
        name: &str,
    ) -> Result<(VolumeInfo, Arc<VolumeDevice>), PoolError> {
        let _busy = self.enter();
        self.throttle().await.map_err(|status| self.stopped(status))?;
        let (mut record, _) = self.successor(id, name)?;
        if !self.shard.borrow().volume(id).is_ok_and(|v| v.is_read_only()) {
            return Err(PoolError::Invalid(format!(
                "{} is writable: clone a snapshot of it, or make it read-only",
                self.name_of(id)
            )));
        }
        record.base = Some((id, record.blocks));
        let bytes = record.encode().map_err(|error| PoolError::Invalid(error.to_string()))?;
        self.record(Scope::Pool, &Record::Clone { snapshot: id, record: &bytes })
            .map_err(|s| self.stopped(s))?;
        self.made(&record).await
    }

    async fn made(&self, record: &VolumeRecord) -> Result<(VolumeInfo, Arc<VolumeDevice>), PoolError> {
        self.flush().await.map_err(|status| self.stopped(status))?;
        let made = self.volume_info(record.id).zip(self.device(record.id));
        made.ok_or_else(|| self.no_volume(&record.name))
    }

    // ---- deleting

    /// Whether a volume can be deleted: at most one other goes on from it.
    pub(crate) fn check_deletable(&self, id: VolumeId) -> Result<(), PoolError> {
        self.check_not_working(id)?;
        let shard = self.shard.borrow();
        let v = shard.volume(id).map_err(|_| self.no_volume(&id.to_string()))?;
        let children: Vec<String> = shard.children(v).iter().map(|c| c.record.name.clone()).collect();
        if children.len() > 1 {
            return Err(PoolError::HasClones { volume: self.name_of(id), clones: children });
        }
        Ok(())
    }

    /// Deletes a volume or snapshot whose device is gone from the registry. Its space comes back in the background.
    pub(crate) async fn delete_volume(self: &Rc<Self>, id: VolumeId) -> Result<(), PoolError> {
        self.check_writable().map_err(|status| self.stopped(status))?;
        self.check_deletable(id)?;
        self.record(Scope::Pool, &Record::VolumeDelete { volume: id }).map_err(|s| self.stopped(s))?;
        self.flush().await.map_err(|status| self.stopped(status))?;
        self.background(self.clone().finish_deletions());
        Ok(())
    }

    /// Gives back what volumes and snapshots have that are being deleted.
    pub(crate) async fn finish_deletions(self: Rc<Self>) {
        if self.deleting.replace(true) {
            // The one that runs looks again before it ends.
            return;
        }
        self.deletion_failed.set(false);
        let mut failed = HashSet::new();
        while let Some(id) = self.next_deletion(&failed) {
            let Some(_job) = self.begin_job(id) else { break };
            if let Err(status) = self.finish_deletion(id).await {
                failed.insert(id);
                self.deletion_failed.set(true);
                tracing::warn!(pool = %self.name(), volume = %id, %status, "a deletion was interrupted; it goes on when the pool is opened again");
            }
        }
        self.deleting.set(false);
    }

    /// Bases last: their clones may be going too.
    fn next_deletion(&self, failed: &HashSet<VolumeId>) -> Option<VolumeId> {
        let shard = self.shard.borrow();
        let jobs = self.jobs.borrow();
        let ids = shard.volumes.values().filter(|v| v.is_deleting()).map(|v| v.record.id);
        let ids = ids.filter(|id| !failed.contains(id) && !jobs.contains(id));
        ids.min_by_key(|id| shard.based(*id))
    }

    async fn finish_deletion(self: &Rc<Self>, id: VolumeId) -> Result<(), Status> {
        while let Some(clone) = self.based_on(id) {
            self.each_leaf(clone, Step::Own(OwnFrom::Base)).await?;
            self.rebase(clone, Some(id))?;
        }
        self.each_leaf(id, Step::Merge).await?;
        self.check_writable()?;
        self.record(Scope::Pool, &Record::VolumeGone { volume: id })
    }

    fn based_on(&self, id: VolumeId) -> Option<VolumeId> {
        let shard = self.shard.borrow();
        if shard.based(id) == 0 {
            return None;
        }
        // The volume before its snapshots, so that they see what it has got.
        let based = shard.volumes.values().filter(|v| v.record.base.is_some_and(|(base, _)| base == id));
        based.max_by_key(|v| (!v.is_snapshot(), v.record.birth)).map(|v| v.record.id)
    }

    /// A volume no longer depends on its base: with `through`, on what that is based on instead.
    fn rebase(&self, id: VolumeId, through: Option<VolumeId>) -> Result<(), Status> {
        self.check_alive()?;
        let mut record = self.record_of(id)?;
        let above = through.and_then(|base| self.record_of(base).ok()).and_then(|base| base.base);
        let below = record.base.map_or(0, |(_, below)| below);
        record.base = above.map(|(base, blocks)| (base, blocks.min(below)));
        self.update(&record)
    }

    pub(crate) fn record_of(&self, id: VolumeId) -> Result<VolumeRecord, Status> {
        let shard = self.shard.borrow();
        shard.volume(id).map(|v| v.record.clone()).map_err(|_| Status::INVALID_NAMESPACE)
    }

    pub(crate) fn update(&self, record: &VolumeRecord) -> Result<(), Status> {
        let bytes = record.encode().map_err(|error| {
            tracing::error!(pool = %self.name(), %error, "a volume's record can not be encoded");
            Status::INTERNAL_ERROR
        })?;
        self.record(Scope::Pool, &Record::VolumeUpdate { record: &bytes })
    }

    // ---- independence

    /// Gives a volume a map of its own: nothing of it is shared with its snapshots or comes from a base. With `parent_only`
    /// only with the snapshot that it goes on from.
    pub(crate) async fn own_volume(
        self: &Rc<Self>,
        id: VolumeId,
        parent_only: bool,
    ) -> Result<(), PoolError> {
        self.check_writable().map_err(|status| self.stopped(status))?;
        let busy = || PoolError::Busy(format!("volume {} is being inflated", self.name_of(id)));
        let _job = self.begin_job(id).ok_or_else(busy)?;
        let (keeper, base) = {
            let shard = self.shard.borrow();
            let v = shard.volume(id).map_err(|_| self.no_volume(&id.to_string()))?;
            if v.is_read_only() {
                return Err(PoolError::Invalid(format!("{} is read-only", self.name_of(id))));
            }
            if parent_only && shard.parent(v).is_none() {
                return Err(PoolError::Invalid(format!("{} has no parent", self.name_of(id))));
            }
            (v.keeper, v.record.base)
        };
        let work = async {
            if keeper.is_some() {
                self.each_leaf(id, Step::Own(OwnFrom::Snapshots)).await?;
                // A family of its own: the snapshots stay among themselves.
                let mut record = self.record_of(id)?;
                record.family = Some(self.shard.borrow().pool.next_volume);
                self.update(&record)?;
            }
            match base {
                Some((base, _)) if parent_only && keeper.is_none() => {
                    self.each_leaf(id, Step::Own(OwnFrom::Base)).await?;
                    self.rebase(id, Some(base))?;
                }
                Some(_) if !parent_only => {
                    self.each_leaf(id, Step::Own(OwnFrom::Bases)).await?;
                    self.rebase(id, None)?;
                }
                _ => {}
            }
            self.flush().await
        };
        work.await.map_err(|status| self.stopped(status))?;
        // A base that was being deleted may have waited for this.
        self.background(self.clone().finish_deletions());
        Ok(())
    }

    // ---- leaf by leaf

    async fn each_leaf(self: &Rc<Self>, id: VolumeId, step: Step) -> Result<(), Status> {
        let mut at = 0;
        while let Some(leaf) = self.next_leaf(id, at, step).await? {
            let _busy = self.enter();
            self.throttle().await?;
            let mut pins = self.pins();
            loop {
                let mut needs = Needs::new();
                let needed = match step {
                    Step::Merge => self.shard.borrow().needs_of_merge(id, leaf, &mut needs),
                    Step::Own(from) => self.shard.borrow().needs_of_own(id, leaf, from, &mut needs),
                };
                needed.map_err(|_| Status::INVALID_NAMESPACE)?;
                if needs.is_empty() {
                    break;
                }
                self.load_all(needs, &mut pins).await?;
            }
            self.check_alive()?;
            let scope = {
                let shard = self.shard.borrow();
                let domain = shard.volume(id).and_then(|v| shard.domain(v.record.domain));
                domain.map_err(|_| Status::INVALID_NAMESPACE)?.scope()
            };
            let record = match step {
                Step::Merge => Record::MapMerge { volume: id, leaf, count: 1 },
                Step::Own(from) => Record::MapOwn { volume: id, leaf, count: 1, from },
            };
            self.record(scope, &record)?;
            at = leaf + 1;
            reactor::yield_now().await;
        }
        Ok(())
    }

    /// The first leaf at or after `at` that a step may have to change.
    async fn next_leaf(&self, id: VolumeId, mut at: u64, step: Step) -> Result<Option<u64>, Status> {
        loop {
            match next_leaf(&self.shard.borrow(), id, at, step) {
                Err(_) => return Err(Status::INVALID_NAMESPACE),
                Ok(Looked::Found(leaf)) => return Ok(Some(leaf)),
                Ok(Looked::End) => return Ok(None),
                Ok(Looked::Until(end)) => at = end,
            }
            reactor::yield_now().await;
        }
    }
}

enum Looked {
    Found(u64),
    Until(u64),
    End,
}

fn next_leaf(shard: &Shard, id: VolumeId, at: u64, step: Step) -> Result<Looked, ApplyError> {
    let v = shard.volume(id)?;
    let leaves = |blocks: u64| blocks.div_ceil(MAP_ENTRIES as u64);
    let (end, base) = match (step, v.record.base) {
        (Step::Own(OwnFrom::Base | OwnFrom::Bases), Some((base, below))) => (leaves(below), Some(base)),
        _ => (leaves(v.record.blocks), None),
    };
    for leaf in at..end.min(at + LOOKED) {
        let nothing = match base {
            Some(base) => shard.shows_nothing(base, leaf),
            None => matches!(v.tree.find(leaf), Found::Absent),
        };
        if !nothing {
            return Ok(Looked::Found(leaf));
        }
    }
    Ok(if at + LOOKED >= end { Looked::End } else { Looked::Until(at + LOOKED) })
}
