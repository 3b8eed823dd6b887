//! An open pool: everything that lives on its home reactor.
//!
//! Owns the shard's state, the journal, the logs, the caches and the background tasks of one pool. Lives in an `Rc` on the
//! home reactor; other threads reach it through [`PoolRef`].

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cryptfold_bdev::{Descriptor, Room, Space, Status};
use cryptfold_reactor::sync::{Event, Mutex as AsyncMutex, Notify};
use cryptfold_reactor::{self as reactor, Handle};
use cryptfold_reduce_format::ids::{DomainId, VolumeId};
use cryptfold_reduce_format::journal::JournalEpoch;
use cryptfold_reduce_format::keys::{DomainWraps, PoolKey, PoolKeys};
use cryptfold_reduce_format::slots::KeyBlock;
use cryptfold_reduce_format::superblock::{ANCHORS, Superblock};
use uuid::Uuid;

use crate::base::Base;
use crate::chunklock::ChunkLocks;
use crate::commit::Commits;
use crate::core::Core;
use crate::hash::FastMap;
use crate::info::{LateInfo, PoolEvent, RenewalInfo, ScrubInfo};
use crate::ingest::{Lane, Scratch};
use crate::journal::Journal;
use crate::lend::Loan;
use crate::load::LoadKey;
use crate::log::DataLog;
use crate::meta::Meta;
use crate::pace::Demand;
use crate::shard::{ApplyError, Shard};
use crate::tree::LEAF_BYTES;
use crate::volume::Gathered;

/// How a pool is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Life {
    /// In order.
    Open,
    /// No new changes are let in; what is under way ends.
    Closing,
    /// The device refused a write for good, or the state makes no sense: reads only.
    Failed,
    /// Over.
    Closed,
}

/// An open pool, from any thread.
#[derive(Clone)]
pub(crate) struct PoolRef {
    pub id: u64,
    pub uuid: Uuid,
    pub home: Handle,
    pub name: Arc<Mutex<String>>,
    pub base_name: String,
    /// The pool's opening of its device, while it is open.
    pub descriptor: std::sync::Weak<Descriptor>,
    /// Bytes that hosts have left, and had, as of the last heartbeat.
    pub space: Arc<[AtomicU64; 2]>,
    /// 4 KiB blocks that each volume has, where nothing of it is another one's, as of the last heartbeat.
    pub allocated: Arc<Mutex<HashMap<u32, u64>>>,
    /// Who wants to know what happens to it.
    pub listener: Arc<OnceLock<Listener>>,
}

/// Gets told, on the pool's home: must not wait.
pub(crate) type Listener = Arc<dyn Fn(&str, PoolEvent) + Send + Sync>;

thread_local! {
    /// Pools whose home this thread is.
    static POOLS: RefCell<HashMap<u64, Rc<Pool>>> = RefCell::default();
}

static NEXT_POOL: AtomicU64 = AtomicU64::new(1);

impl PoolRef {
    pub fn new(uuid: Uuid, home: Handle, name: &str, descriptor: &Arc<Descriptor>) -> PoolRef {
        PoolRef {
            id: NEXT_POOL.fetch_add(1, Ordering::Relaxed),
            uuid,
            home,
            name: Arc::new(Mutex::new(name.to_owned())),
            base_name: descriptor.bdev().name().to_owned(),
            descriptor: Arc::downgrade(descriptor),
            space: Arc::default(),
            allocated: Arc::default(),
            listener: Arc::default(),
        }
    }

    /// Space for hosts, a few seconds old; `None` before it is known.
    pub fn space(&self) -> Option<Space> {
        let [free_bytes, total_bytes] = [0, 1].map(|i| self.space[i].load(Ordering::Relaxed));
        (total_bytes > 0).then_some(Space { free_bytes, total_bytes })
    }

    /// Something has happened to it.
    pub fn tell(&self, event: PoolEvent) {
        if let Some(listener) = self.listener.get() {
            listener(&self.name(), event);
        }
    }

    /// Bytes of a volume that have content, a moment old; `None` where that is not known.
    pub fn allocated_bytes(&self, volume: VolumeId) -> Option<u64> {
        let allocated = self.allocated.lock().unwrap_or_else(PoisonError::into_inner);
        allocated.get(&volume.0).map(|blocks| blocks * 4096)
    }

    /// Whether its device is to go away.
    pub fn loses_device(&self) -> bool {
        self.descriptor.upgrade().is_some_and(|descriptor| descriptor.bdev().is_removing())
    }

    /// The pool; only on its home reactor, while it is open.
    pub fn get(&self) -> Option<Rc<Pool>> {
        POOLS.with_borrow(|pools| pools.get(&self.id).cloned())
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.name.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// See the module's head.
pub(crate) struct Pool {
    pub handle: PoolRef,
    pub uuid: Uuid,
    pub descriptor: Arc<Descriptor>,
    pub base: Base,
    pub keys: PoolKeys,
    /// What domains' keys are wrapped with.
    pub wraps: RefCell<DomainWraps>,
    pub pool_key: PoolKey,
    /// As on the device; [`crate::keyslots`] changes it.
    pub key_block: RefCell<KeyBlock>,
    /// Copies of it differ or are damaged.
    pub stale_keys: Cell<bool>,
    /// The salt changes ([`Pool::renew_journal`]), the owner epoch does not.
    pub epoch: Cell<JournalEpoch>,
    pub owner: [u8; 16],
    pub anchors: [u64; ANCHORS],
    pub segment_bytes: u32,
    pub superblock: RefCell<Superblock>,
    pub shard: RefCell<Shard>,
    pub journal: RefCell<Journal>,
    pub commits: Commits,
    pub meta: AsyncMutex<Meta>,
    pub loading: RefCell<FastMap<LoadKey, Rc<Event>>>,
    /// The home's own part.
    pub core: Rc<Core>,
    pub lanes: RefCell<FastMap<(DomainId, bool), Rc<Lane>>>,
    pub logs: RefCell<Vec<Rc<DataLog>>>,
    pub loans: RefCell<Vec<Loan>>,
    #[allow(clippy::vec_box)] // Moved in and out of writes; a kilobyte each time otherwise.
    pub scratch: RefCell<Vec<Box<Scratch>>>,
    pub gathered: Gathered,
    /// The last piece of a write was mostly new data.
    pub expects_new: Cell<bool>,
    /// A metadata segment is being emptied, beside other collection.
    pub emptying_metadata: Cell<bool>,
    /// There is nothing else to collect: its checkpoint must not wait.
    pub metadata_urgent: Cell<bool>,
    /// No other metadata segment is tried before so many checkpoints: the last try failed.
    pub metadata_after: Cell<u64>,
    pub locks: ChunkLocks,
    /// Bytes of RAM for the trees' caches.
    pub cache_bytes: usize,
    /// Calls of [`Pool::keep_budget`] to pass before it looks again.
    pub eviction_pause: Cell<u32>,
    pub memory_budget: u64,
    pub life: Cell<Life>,
    pub failure: Cell<Option<Status>>,
    /// Damaged nodes and fragments met since the pool was opened.
    pub damaged: Cell<u64>,
    /// Bytes of fragments that hosts' writes have appended since the pool was opened.
    pub host_bytes: Cell<u64>,
    /// Bytes of fragments that the collector has moved.
    pub moved_bytes: Cell<u64>,
    /// Chunks healed since the pool was opened.
    pub healed: Cell<u64>,
    pub scrub: RefCell<ScrubInfo>,
    pub late: RefCell<LateInfo>,
    /// The rewriting of data under new keys.
    pub renewal: RefCell<RenewalInfo>,
    /// One change of the key block at a time.
    pub changing_keys: AsyncMutex<()>,
    /// Wakes the collector.
    pub collect: Notify,
    pub collections: Cell<u64>,
    /// What hosts and the collector know of each other.
    pub demand: Demand,
    /// Segments that the collector has emptied.
    pub emptied: Cell<u64>,
    /// Changes under way; closing waits for them.
    pub busy: Cell<u64>,
    pub idle: Notify,
    /// Of the changes under way, those that wait for the end of an audit.
    pub parked: Cell<u64>,
    /// Volumes that background work is at.
    pub jobs: RefCell<std::collections::HashSet<cryptfold_reduce_format::ids::VolumeId>>,
    /// Deletions are being finished.
    pub deleting: Cell<bool>,
    /// The last attempt left a deletion undone, because the device failed.
    pub deletion_failed: Cell<bool>,
    /// The journal that was replayed is not covered by a checkpoint yet.
    pub recovered: Cell<bool>,
    /// Changes are held back while the pool is repaired, or its keys change.
    pub auditing: Cell<bool>,
    /// One audit at a time, ...
    pub audits: AsyncMutex<()>,
    /// ... with so many bytes of RAM.
    pub audit_bytes: Cell<usize>,
    /// Opened to be audited only: nothing is written.
    pub read_only: bool,
    /// The heartbeat task has ended.
    pub heart_stopped: Cell<bool>,
    /// How much room its last heartbeat found.
    pub room: Cell<Room>,
}

impl Pool {
    /// Makes the pool reachable through its [`PoolRef`] on this (its home) thread.
    pub fn publish(self: &Rc<Self>) {
        POOLS.with_borrow_mut(|pools| pools.insert(self.handle.id, self.clone()));
    }

    /// The reverse of [`Pool::publish`].
    pub fn unpublish(&self) {
        let gone = POOLS.with_borrow_mut(|pools| pools.remove(&self.handle.id));
        drop(gone);
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.handle.name()
    }

    /// Bytes that a checkpoint of the changed leaves needs, at most.
    pub fn dirty_bytes(&self) -> usize {
        self.shard.borrow().meter.dirty_bytes.get()
    }

    /// Bytes of changed leaves at which a checkpoint is made: a third of what the free space (the reserve at least, which hosts
    /// do not take) and half of what the cache would hold. Changes wait at twice as many, and there is still room to write them.
    pub fn dirty_limit(&self) -> usize {
        let shard = self.shard.borrow();
        let free = shard.segments.free_count() * self.segment_bytes as usize;
        (free / 3).min(self.cache_bytes / 2).max(64 * LEAF_BYTES)
    }

    /// Stops all changes: what is on the device is the last durable state.
    pub fn fail(&self, status: Status) {
        if matches!(self.life.get(), Life::Open | Life::Closing) {
            tracing::error!(pool = %self.name(), %status, "the pool stops: its device can not be relied on; close and open it again");
            self.life.set(Life::Failed);
            self.failure.set(Some(status));
            self.handle.tell(PoolEvent::Failed);
            self.wake_waiters();
        }
    }

    /// A record did not fit the state: a bug or damaged memory. Nothing further may become durable.
    pub fn inconsistent(&self, error: &ApplyError) -> Status {
        tracing::error!(pool = %self.name(), %error, "the pool's state is inconsistent");
        self.fail(Status::INTERNAL_ERROR);
        Status::INTERNAL_ERROR
    }

    /// An error when the pool can not make anything durable any more.
    pub fn check_alive(&self) -> Result<(), Status> {
        match self.life.get() {
            Life::Open | Life::Closing => Ok(()),
            Life::Failed => Err(self.failure.get().unwrap_or(Status::INTERNAL_ERROR)),
            Life::Closed => Err(Status::INVALID_NAMESPACE),
        }
    }

    /// An error when the pool takes no changes.
    pub fn check_writable(&self) -> Result<(), Status> {
        self.check_alive()?;
        if self.life.get() == Life::Closing { Err(Status::INVALID_NAMESPACE) } else { Ok(()) }
    }

    /// Space for hosts: what garbage collection can win is not counted as free.
    pub fn host_space(&self) -> Space {
        let shard = self.shard.borrow();
        let segment = u64::from(self.segment_bytes);
        let bytes = |segments: usize| segments.saturating_sub(shard.segments.reserve().0) as u64 * segment;
        Space { free_bytes: bytes(shard.segments.free_count()), total_bytes: bytes(shard.segments.usable()) }
    }

    /// Tells other threads how much space there is, and who has it.
    pub fn publish_space(&self) {
        let space = self.host_space();
        self.handle.space[0].store(space.free_bytes, Ordering::Relaxed);
        let before = self.handle.space[1].swap(space.total_bytes, Ordering::Relaxed);
        if before != 0 && before != space.total_bytes {
            self.handle.tell(PoolEvent::Capacity);
        }
        let (was, room) = (self.room.get(), self.room.get().next(space.free_percent()));
        if room != was {
            self.room.set(room);
            self.handle.tell(PoolEvent::Room(room));
        }
        let shard = self.shard.borrow();
        let mut allocated = self.handle.allocated.lock().unwrap_or_else(PoisonError::into_inner);
        allocated.clear();
        // A clone shows blocks of its snapshot too; how many is not counted.
        let whole = shard.volumes.values().filter(|v| v.record.base.is_none());
        allocated.extend(whole.map(|v| (v.record.id.0, v.shown_blocks())));
    }

    /// Sends all started buffers of all logs to the device; what to wait for.
    pub fn cut_logs(&self) -> Vec<(Rc<DataLog>, u64)> {
        self.logs.borrow().iter().map(|log| (log.clone(), log.cut())).collect()
    }

    /// Counts a change in; the guard counts it out.
    pub fn enter(self: &Rc<Self>) -> Busy {
        self.busy.set(self.busy.get() + 1);
        Busy(self.clone())
    }

    /// Waits until no change is under way.
    pub async fn wait_idle(&self) {
        while self.busy.get() > 0 {
            self.idle.notified().await;
        }
    }

    /// Waits until no change is under way but those that wait for the audit's end.
    pub async fn wait_parked(&self) {
        while self.busy.get() > self.parked.get() {
            self.idle.notified().await;
        }
    }

    /// Waits until no audit goes on. Only for changes that are counted in (see [`Pool::enter`]), between two steps.
    pub async fn wait_for_audit(&self) {
        while self.auditing.get() {
            let _parked = Parked::new(self);
            self.commits.done.notified().await;
        }
    }

    /// Starts a background task that lasts as long as the pool.
    pub fn background(self: &Rc<Self>, task: impl Future<Output = ()> + 'static) {
        reactor::spawn_local(task).detach();
    }
}

/// A change that waits for an audit's end, or for a change that may.
pub(crate) struct Parked<'a>(&'a Pool);

impl<'a> Parked<'a> {
    pub fn new(pool: &'a Pool) -> Self {
        pool.parked.set(pool.parked.get() + 1);
        pool.idle.notify_waiters();
        Parked(pool)
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.0.parked.set(self.0.parked.get() - 1);
    }
}

/// A change under way.
pub(crate) struct Busy(Rc<Pool>);

impl Drop for Busy {
    fn drop(&mut self) {
        let left = self.0.busy.get() - 1;
        self.0.busy.set(left);
        if left <= self.0.parked.get() {
            self.0.idle.notify_waiters();
        }
    }
}
