//! For measurements: large pools without large devices.
//!
//! A pool can be filled with chunks whose data is never written (all of their metadata and journal records are, as if hosts
//! had written random data), the index can be made to sample, and a crash can be prepared with as long a journal as there may be.

use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reactor::sync::MutexGuard;
use cryptfold_reduce_format::codec::Codec;
use cryptfold_reduce_format::container::FragmentEntry;
use cryptfold_reduce_format::entry::{MapRun, Record, runs};
use cryptfold_reduce_format::fingerprint::Fingerprint;
use cryptfold_reduce_format::fragment::CHUNK_BYTES;
use cryptfold_reduce_format::ids::{ChunkAddr, HostKeyId, Lba, SLOTS, VolumeId};
use cryptfold_reduce_format::journal::Scope;
use cryptfold_reduce_format::map::{MapEntry, Target};

use crate::log::{NotAppended, bound};
use crate::meta::Meta;
use crate::pool::Pool;
use crate::segments::Purpose;
use crate::shard::Needs;

/// Chunks of a fragment, as random data has them.
const GROUP: usize = 4;

/// How much a recovery would find to do now.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Backlog {
    /// Blocks of the journal in use.
    pub journal_blocks: u64,
    /// Blocks of its ring.
    pub ring_blocks: u64,
    /// Bytes of changed leaves that no checkpoint has.
    pub dirty_bytes: u64,
    /// As many at which a checkpoint begins; at twice as many, changes wait.
    pub dirty_limit: u64,
}

/// While it lives no checkpoint is written.
pub struct HeldCheckpoints<'a> {
    _meta: MutexGuard<'a, Meta>,
}

fn noise(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Pool {
    /// Maps blocks `lba .. lba + count` (at most 32) to new chunks that are not written.
    pub(crate) async fn pretend(
        self: &Rc<Self>,
        volume: VolumeId,
        lba: u64,
        count: usize,
        seed: u64,
    ) -> Result<(), Status> {
        let _busy = self.enter();
        let target = self.target(volume)?;
        self.throttle().await?;
        let lane = self.lane(target.domain, Purpose::Host);
        let count = count.clamp(1, 32);
        let bytes = count.div_ceil(GROUP) * bound(0) + count * CHUNK_BYTES;
        let mut pins = self.pins();
        let place = loop {
            let mut needs = Needs::new();
            self.shard
                .borrow()
                .needs_of_fill(volume, lba, count as u64, &mut needs)
                .map_err(|_| Status::INVALID_NAMESPACE)?;
            if !needs.is_empty() {
                self.load_all(needs, &mut pins).await?;
                continue;
            }
            match lane.log.skip(bytes) {
                Ok(place) => break place,
                Err(NotAppended::NoSegment) => self.open_data_segment(&lane).await?,
                Err(_) => lane.log.written(lane.log.cut()).await?,
            }
        };
        // ---- no wait from here on.
        let epoch = self.shard.borrow().epoch();
        let mut state = seed ^ lba << 20;
        let mut at = place;
        let mut entries = Vec::with_capacity(count);
        for first in (0..count).step_by(GROUP) {
            let chunks = GROUP.min(count - first);
            let (container, slot) = self.container(&lane, chunks);
            debug_assert!(usize::from(slot) + chunks <= SLOTS);
            let addr = ChunkAddr::new(container, slot).ok_or(Status::INTERNAL_ERROR)?;
            let prints: Vec<Fingerprint> = (0..chunks)
                .map(|_| {
                    let mut bytes = [0; 16];
                    bytes[..8].copy_from_slice(&noise(&mut state).to_le_bytes());
                    bytes[8..].copy_from_slice(&noise(&mut state).to_le_bytes());
                    Fingerprint(bytes)
                })
                .collect();
            let unit_bytes = (bound(0) + chunks * CHUNK_BYTES) as u32;
            let fragment = FragmentEntry {
                first_slot: slot,
                chunks: chunks as u8,
                codec: Codec::Raw,
                place: at,
                unit_bytes,
            };
            at.offset += unit_bytes;
            let scope = Scope::Domain { domain: target.domain, generation: target.generation };
            self.push(scope, &Record::FragmentAdd { container, fragment, fingerprints: &prints });
            let mut shard = self.shard.borrow_mut();
            shard
                .fragment_add(target.domain, target.generation, container, &fragment, &prints)
                .map_err(|error| self.inconsistent(&error))?;
            shard.index_fragment(target.domain, addr, &prints);
            drop(shard);
            lane.filled(container, slot + chunks as u16);
            for n in 0..chunks {
                let chunk = addr.plus(n as u16).ok_or(Status::INTERNAL_ERROR)?;
                entries.push(MapEntry { target: Target::Chunk(chunk), birth: epoch, host_key: HostKeyId(0) });
            }
        }
        let mut all: Vec<MapRun> = Vec::new();
        runs(entries, &mut all);
        let scope = Scope::Domain { domain: target.domain, generation: target.generation };
        self.record(scope, &Record::MapSet { volume, lba: Lba(lba), runs: &all })?;
        reactor::yield_now().await;
        Ok(())
    }

    pub(crate) fn backlog(&self) -> Backlog {
        let (journal_blocks, ring_blocks) = self.journal.borrow().usage();
        Backlog {
            journal_blocks,
            ring_blocks,
            dirty_bytes: self.dirty_bytes() as u64,
            dirty_limit: self.dirty_limit() as u64,
        }
    }

    pub(crate) async fn hold_checkpoints(&self) -> HeldCheckpoints<'_> {
        HeldCheckpoints { _meta: self.meta.lock().await }
    }
}
