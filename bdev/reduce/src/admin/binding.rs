//! Which key the host had encrypted a volume with: a record that is kept with the volume, and inherited by what is derived from
//! it. What is in the record is its writer's.
//!
//! Invariant: it goes, or becomes that of another key, only while nothing is stored behind the part that is never decrypted, or
//! its writer has seen that nothing there is under a key ([`Pool::as_sent`]) while nobody writes. So
//! what is stored there under a host's key ([`MapEntry::host_key`]) is under the one that the record names; the rest, which may
//! have been there before the record, is as the host had sent it.

use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_reduce_format::ids::VolumeId;
use cryptfold_reduce_format::map::{MAP_ENTRIES, Target};

use crate::error::PoolError;
use crate::info::AsSent;
use crate::pool::Pool;
use crate::read::{entry_at, inherited};
use crate::shard::{ApplyError, Needs, Shard, Volume, leaf_of};
use crate::tree::Found;

/// Longest record, bytes.
const MAX_RECORD_BYTES: usize = 1024;
/// Leaves that are looked at in one step, and those that are not there.
const LEAVES: usize = 64;
const ABSENT: usize = 4096;

impl Pool {
    /// Changes the record of a volume's host key, durably, if nothing is stored from byte `from` on. Whether it did.
    pub(crate) async fn set_host_key(
        self: &Rc<Self>,
        id: VolumeId,
        from: u64,
        key: Option<Vec<u8>>,
    ) -> Result<bool, PoolError> {
        if key.as_ref().is_some_and(|k| k.is_empty() || k.len() > MAX_RECORD_BYTES) {
            return Err(PoolError::Invalid(format!(
                "the record of a host's key has 1 to {MAX_RECORD_BYTES} bytes"
            )));
        }
        let _busy = self.enter();
        self.throttle().await.map_err(|status| self.stopped(status))?;
        self.check_writable().map_err(|status| self.stopped(status))?;
        // Nothing is awaited between the look's end and the change: nothing is stored in between.
        if !self.is_empty_behind(id, from).await? {
            return Ok(false);
        }
        let mut record = self.record_of(id).map_err(|status| self.stopped(status))?;
        record.host_keys = key.into_iter().collect();
        self.update(&record).map_err(|status| self.stopped(status))?;
        self.flush().await.map_err(|status: Status| self.stopped(status))?;
        Ok(true)
    }
}

impl Pool {
    /// Whether nothing is stored in a volume from byte `from` on.
    pub(crate) async fn is_empty_behind(&self, id: VolumeId, from: u64) -> Result<bool, PoolError> {
        let mut pins = self.pins();
        loop {
            let mut needs = Needs::new();
            let empty = self.shard.borrow().is_empty_behind(id, from.div_ceil(4096), &mut needs);
            let empty = empty.map_err(|_| self.no_volume(&id.to_string()))?;
            if needs.is_empty() {
                return Ok(empty);
            }
            self.load_all(needs, &mut pins).await.map_err(|status| self.stopped(status))?;
        }
    }
}

impl Pool {
    /// Where chunks lie that were stored as the host had sent them, in some blocks of a volume from block `from` on. What can not be
    /// read is left out.
    pub(crate) async fn as_sent(&self, id: VolumeId, from: u64) -> Result<AsSent, PoolError> {
        let mut pins = self.pins();
        let mut leaves = LEAVES;
        loop {
            let mut needs = Needs::new();
            let found = self.shard.borrow().as_sent(id, from, leaves, &mut needs);
            let found = found.map_err(|status| self.stopped(status))?;
            if needs.is_empty() {
                return Ok(found);
            }
            match self.load_all(needs, &mut pins).await {
                Ok(()) => {}
                // One of many: one after the other.
                Err(Status::UNRECOVERED_READ) if leaves > 1 => leaves = 1,
                Err(Status::UNRECOVERED_READ) => return Ok(self.shard.borrow().unreadable(id, from)),
                Err(status) => return Err(self.stopped(status)),
            }
        }
    }
}

impl Volume {
    /// The record of the host's key.
    pub fn host_key(&self) -> Option<&[u8]> {
        self.record.host_keys.first().map(Vec::as_slice)
    }
}

impl Shard {
    /// Whether nothing is stored from block `from` on; meaningless while something is needed. Snapshots and clones are never
    /// empty: what they show of other maps is not counted.
    fn is_empty_behind(&self, id: VolumeId, from: u64, needs: &mut Needs) -> Result<bool, ApplyError> {
        let v = self.volume(id)?;
        // Behind its end nothing is, in no volume.
        if from >= v.record.blocks {
            return Ok(true);
        }
        if v.record.base.is_some() || v.is_snapshot() {
            return Ok(false);
        }
        let per_leaf = MAP_ENTRIES as u64;
        let mut before = 0;
        for index in 0..from.min(v.record.blocks).div_ceil(per_leaf) {
            match v.tree.find(index) {
                Found::Here(leaf) => {
                    let here = (from - index * per_leaf).min(per_leaf) as usize;
                    let stored =
                        |target| matches!(target, Target::Chunk(_) | Target::Zero | Target::Pattern(_));
                    before += (0..here).filter(|slot| stored(leaf.get(*slot).target)).count() as u64;
                }
                Found::Absent => {}
                Found::Away(_) => {
                    Shard::need(&v.tree, id.0, index, needs);
                }
            }
        }
        Ok(v.chunks + v.special == before)
    }

    /// See [`Pool::as_sent`]; meaningless while something is needed.
    fn as_sent(&self, id: VolumeId, from: u64, limit: usize, needs: &mut Needs) -> Result<AsSent, Status> {
        let v = self.volumes.get(&id.0).ok_or(Status::INVALID_NAMESPACE)?;
        let mut found = AsSent { runs: Vec::new(), keyed: false, next: None };
        let (mut at, end) = (from, v.record.blocks);
        let (mut leaves, mut absent) = (0, 0);
        while at < end {
            if leaves == limit || absent == ABSENT {
                found.next = Some(at);
                break;
            }
            let (index, first) = leaf_of(at);
            let here = (MAP_ENTRIES - first).min((end - at).try_into().unwrap_or(MAP_ENTRIES));
            let own = match v.tree.find(index) {
                _ if v.is_snapshot() => None,
                Found::Here(leaf) => Some(leaf),
                Found::Absent => None,
                Found::Away(_) => {
                    Shard::need(&v.tree, id.0, index, needs);
                    leaves += 1;
                    at += here as u64;
                    continue;
                }
            };
            let base = inherited(self, v, index, needs)?.flatten();
            if own.is_none() && base.is_none() {
                absent += 1;
                at += here as u64;
                continue;
            }
            leaves += 1;
            for slot in first..first + here {
                let entry = entry_at(own, base.as_ref(), slot);
                found.keyed |= entry.host_key.0 != 0 && entry.target != Target::Unmapped;
                if entry.host_key.0 == 0 && entry.chunk().is_some() {
                    let block = index * MAP_ENTRIES as u64 + slot as u64;
                    match found.runs.last_mut().filter(|run| run.0 + run.1 == block) {
                        Some(run) => run.1 += 1,
                        None => found.runs.push((block, 1)),
                    }
                }
            }
            at += here as u64;
        }
        Ok(found)
    }

    /// What is said of the leaf at block `from` when it can not be read.
    fn unreadable(&self, id: VolumeId, from: u64) -> AsSent {
        let end = self.volumes.get(&id.0).map_or(0, |v| v.record.blocks);
        let (index, _) = leaf_of(from);
        let next = Some((index + 1) * MAP_ENTRIES as u64).filter(|next| *next < end);
        AsSent { runs: Vec::new(), keyed: true, next }
    }
}
