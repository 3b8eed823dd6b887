//! Which key the host had encrypted a volume with: a record that is kept with the volume, and inherited by what is derived from
//! it. What is in the record is its writer's.
//!
//! Invariant: it changes only while nothing is stored behind the part that is never decrypted, so that everything behind it
//! was stored under the key that the record names, or (without a record) as the host sent it.

use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_reduce_format::ids::VolumeId;
use cryptfold_reduce_format::map::{MAP_ENTRIES, Target};

use crate::error::PoolError;
use crate::pool::Pool;
use crate::shard::{ApplyError, Needs, Shard, Volume};
use crate::tree::Found;

/// Longest record, bytes.
const MAX_RECORD_BYTES: usize = 1024;

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
}
