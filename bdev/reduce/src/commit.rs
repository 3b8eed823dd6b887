//! Group commit: makes what has happened durable, in the one order that recovery relies on.
//!
//! A commit: (1) take all records so far (seal them into batches) and send all sealed data so far to the device, also what other
//! cores have sealed; (2) wait for the data; (3) flush the device; (4) write the batches; (5) flush; (6) wake who waited. So a record on the device
//! implies its data, and what a power cut takes from the journal is a tail.
//!
//! One commit runs at a time (the committer task), what comes meanwhile is collected for the next. At a commit's cut the
//! state can be frozen for a checkpoint: exactly the effect of all batches up to that one.
//!
//! The journal ring never blocks a commit for good: when the batches do not fit, the checkpoint of that very cut is written
//! instead of them.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::entry::Record;
use cryptfold_reduce_format::ids::Sequence;
use cryptfold_reduce_format::journal::Scope;
use reactor::memory::Buf;
use reactor::sync::Notify;

use crate::checkpoint::Frozen;
use crate::journal::Sealed;
use crate::pool::{Life, Pool};

/// Records that nobody waits for are committed after this time.
const COMMIT_AFTER: Duration = Duration::from_secs(1);
/// Bytes of records that are committed without being asked.
const COMMIT_BYTES: usize = 256 << 10;
/// Bytes of records at which changes wait for the commit.
const MOST_BYTES: usize = 4 << 20;

/// What the committer and those who wait for it share.
#[derive(Default)]
pub(crate) struct Commits {
    /// Wakes the committer.
    wake: Notify,
    /// Wakes who waits for a commit, a checkpoint or an audit's end.
    pub done: Notify,
    /// Records durable.
    durable_records: Cell<u64>,
    /// Somebody waits for a commit.
    urgent: Cell<bool>,
    /// A checkpoint was asked for.
    pub checkpoint_wanted: Cell<bool>,
    /// A checkpoint is being written.
    pub checkpointing: Cell<bool>,
    /// Checkpoints finished, in order or not.
    pub checkpoints: Cell<u64>,
    /// Checkpoints that failed in a row.
    pub failures: Cell<u64>,
    stopped: Cell<bool>,
}

impl Pool {
    /// Puts a record into the journal. The caller applies it in the same step.
    pub(crate) fn push(&self, scope: Scope, record: &Record<'_>) {
        let mut journal = self.journal.borrow_mut();
        let was_dirty = journal.is_dirty();
        if let Err(error) = journal.push(scope, record) {
            // Records are made in range; one that is not would be lost to recovery, so nothing may go on.
            tracing::error!(pool = %self.name(), %error, "a journal record is out of range");
            self.fail(Status::INTERNAL_ERROR);
        }
        if !was_dirty || journal.pending_bytes() > COMMIT_BYTES {
            self.commits.wake.notify_one();
        }
    }

    /// Journals and applies a record whose needs are met.
    pub(crate) fn record(&self, scope: Scope, record: &Record<'_>) -> Result<(), Status> {
        self.push(scope, record);
        let now = self.now();
        let result = self.shard.borrow_mut().apply(scope, record, &self.wraps.borrow(), now);
        result.map_err(|error| self.inconsistent(&error))
    }

    /// The batch that holds the last record pushed.
    pub(crate) fn now(&self) -> Sequence {
        self.journal.borrow().now()
    }

    /// Makes everything that has been applied so far durable.
    pub(crate) async fn flush(&self) -> Result<(), Status> {
        let target = self.journal.borrow().records();
        self.wait_for(target).await
    }

    async fn wait_for(&self, target: u64) -> Result<(), Status> {
        while self.commits.durable_records.get() < target {
            self.check_alive()?;
            self.want_commit();
            self.commits.done.notified().await;
        }
        Ok(())
    }

    /// Whether changes have to wait: too much is not durable or not checkpointed yet, or an audit is going on. Asks for what
    /// will end that.
    #[inline]
    pub(crate) fn must_wait(&self) -> Result<bool, Status> {
        self.check_writable()?;
        // New leaves come without being loaded.
        self.keep_budget();
        let journal = self.journal.borrow();
        let (used, all) = journal.usage();
        let (dirty, limit) = (self.dirty_bytes(), self.dirty_limit());
        if (used * 2 > all || dirty > limit)
            && !self.commits.checkpoint_wanted.get()
            && !self.commits.checkpointing.get()
        {
            self.want_checkpoint();
        }
        // What recovery has found may fill the ring that far already.
        let most = if self.recovered.get() { all / 32 * 31 } else { all / 8 * 7 };
        let full = journal.pending_bytes() > MOST_BYTES || used > most || dirty > 2 * limit;
        Ok(full || self.auditing.get())
    }

    /// Waits as long as [`Pool::must_wait`]. Everything that changes the pool goes through here, counted in.
    pub(crate) async fn throttle(&self) -> Result<(), Status> {
        while self.must_wait()? {
            if self.auditing.get() {
                self.wait_for_audit().await;
                continue;
            }
            self.want_commit();
            self.commits.done.notified().await;
        }
        Ok(())
    }

    /// Writes a checkpoint of the state as it is now (or later) and waits for it.
    pub(crate) async fn checkpoint(&self) -> Result<(), Status> {
        // One that runs already began before now.
        let target = self.commits.checkpoints.get() + 1 + u64::from(self.commits.checkpointing.get());
        let failures = self.commits.failures.get();
        while self.commits.checkpoints.get() < target {
            self.check_alive()?;
            if self.commits.failures.get() > failures + 1 {
                return Err(Status::CAPACITY_EXCEEDED);
            }
            self.commits.checkpoint_wanted.set(true);
            self.commits.wake.notify_one();
            self.commits.done.notified().await;
        }
        Ok(())
    }

    /// Asks for a commit.
    pub(crate) fn want_commit(&self) {
        self.commits.urgent.set(true);
        self.commits.wake.notify_one();
    }

    /// Asks for a checkpoint.
    pub(crate) fn want_checkpoint(&self) {
        self.commits.checkpoint_wanted.set(true);
        self.commits.wake.notify_one();
    }

    /// Wakes everybody who waits for progress, to look again.
    pub(crate) fn wake_waiters(&self) {
        self.commits.done.notify_waiters();
    }

    /// Waits until a commit or a checkpoint ends.
    pub(crate) async fn wait_progress(&self) {
        self.want_commit();
        self.commits.done.notified().await;
    }

    /// The committer: runs until the pool is closed or failed.
    pub(crate) async fn run_committer(self: Rc<Self>) {
        while self.life.get() != Life::Closed {
            let idle = !self.commits.urgent.get() && !self.commits.checkpoint_wanted.get();
            let few = self.journal.borrow().pending_bytes() <= COMMIT_BYTES;
            let dirty = self.journal.borrow().is_dirty();
            if idle && few && !dirty {
                self.commits.wake.notified().await;
                continue;
            }
            if idle && few {
                let waited = reactor::timeout(COMMIT_AFTER, self.commits.wake.notified()).await;
                let still = !self.commits.urgent.get() && !self.commits.checkpoint_wanted.get();
                if waited.is_ok() && still && self.journal.borrow().pending_bytes() <= COMMIT_BYTES {
                    // Woken by the first record, or for nothing: a fixed wait from here on.
                    self.wait_quietly().await;
                }
            }
            match self.life.get() {
                // A closing makes its last commit while it is under way. What it left may lack its data.
                Life::Open | Life::Closing => {}
                Life::Failed => {
                    self.commits.done.notify_waiters();
                    self.commits.wake.notified().await;
                    continue;
                }
                Life::Closed => continue,
            }
            if let Err(status) = self.commit_once().await {
                self.fail(status);
            }
            self.commits.done.notify_waiters();
        }
        self.commits.stopped.set(true);
        self.commits.done.notify_waiters();
    }

    /// Waits until somebody is in a hurry or the time is over.
    async fn wait_quietly(&self) {
        let hurry = async {
            loop {
                self.commits.wake.notified().await;
                let many = self.journal.borrow().pending_bytes() > COMMIT_BYTES;
                if many
                    || self.commits.urgent.get()
                    || self.commits.checkpoint_wanted.get()
                    || self.life.get() != Life::Open
                {
                    return;
                }
            }
        };
        // The time over or somebody in a hurry: both mean to commit now.
        let _ = reactor::timeout(COMMIT_AFTER, hurry).await;
    }

    async fn commit_once(self: &Rc<Self>) -> Result<(), Status> {
        self.commits.urgent.set(false);
        let mut freeze = self.commits.checkpoint_wanted.get();
        if !self.journal.borrow().has_room() {
            freeze = true;
        }
        if freeze && self.commits.checkpointing.get() {
            if self.journal.borrow().has_room() {
                if !self.journal.borrow().is_dirty() {
                    // Nothing else to do until it ends; a loop without a wait would keep it from ending.
                    self.commits.done.notified().await;
                    return Ok(());
                }
                // It will be asked for again.
                freeze = false;
            } else {
                while self.commits.checkpointing.get() {
                    self.commits.done.notified().await;
                }
            }
        }
        // ---- the cut: no await from here to its end
        let records = self.journal.borrow().records();
        let room = self.journal.borrow().has_room();
        let cuts = self.cut_logs();
        let elsewhere = self.cut_loans();
        let sealed = self.seal_pending()?;
        let frozen = freeze.then(|| {
            self.commits.checkpoint_wanted.set(false);
            self.commits.checkpointing.set(true);
            self.freeze()
        });
        // ---- the cut's end
        for (log, number) in cuts {
            log.written(number).await?;
        }
        for cut in elsewhere {
            cut.await?;
        }
        if room {
            if !sealed.is_empty() {
                self.base.flush().await?;
                self.write_batches(&sealed).await?;
                self.base.flush().await?;
            }
            self.batches_durable(&sealed, records);
            if let Some(frozen) = frozen {
                let pool = self.clone();
                reactor::spawn_local(async move { pool.run_checkpoint(frozen).await }).detach();
            }
        } else if let Some(frozen) = frozen {
            // The superblock takes the batches' place; it is written after a flush of everything.
            let ok = self.clone().run_checkpoint(frozen).await;
            if !ok {
                return Err(Status::CAPACITY_EXCEEDED);
            }
            self.batches_durable(&sealed, records);
        }
        self.journal.borrow_mut().recycle(sealed);
        Ok(())
    }

    fn batches_durable(&self, sealed: &[Sealed], records: u64) {
        if let Some(last) = sealed.last() {
            self.journal.borrow_mut().set_durable(last.sequence);
        }
        self.commits.durable_records.set(records);
        self.commits.done.notify_waiters();
    }

    /// Changes the journal's keys where they have sealed as much as random nonces allow: another salt, so other keys. It is in each batch's
    /// header, so recovery finds them.
    fn renew_journal(&self) {
        if !self.journal.borrow().is_worn() {
            return;
        }
        let mut epoch = self.epoch.get();
        reactor::fill_random(&mut epoch.salt);
        self.epoch.set(epoch);
        self.journal.borrow_mut().renew(self.keys.journal(), epoch);
        for domain in self.shard.borrow_mut().domains.values_mut() {
            domain.derive_journal(self.uuid, epoch);
        }
    }

    fn seal_pending(&self) -> Result<Vec<Sealed>, Status> {
        self.renew_journal();
        let shard = self.shard.borrow();
        let key = |scope| match scope {
            Scope::Domain { domain, generation } => shard.domains.get(&domain.0)?.journals.get(&generation),
            _ => None,
        };
        self.journal.borrow_mut().cut(key).map_err(|error| {
            tracing::error!(pool = %self.name(), %error, "a journal batch can not be sealed");
            Status::INTERNAL_ERROR
        })
    }

    async fn write_batches(&self, sealed: &[Sealed]) -> Result<(), Status> {
        for batch in sealed {
            let places = self.journal.borrow().places(batch.position, batch.bytes.len());
            for (at, range) in places {
                if !range.is_empty() {
                    self.base.write(at, Buf::from_slice(&batch.bytes[range]), false).await?;
                }
            }
        }
        Ok(())
    }

    async fn run_checkpoint(self: Rc<Self>, frozen: Frozen) -> bool {
        let result = self.write_checkpoint(frozen).await;
        self.commits.checkpointing.set(false);
        let ok = result.is_ok();
        match result {
            Ok(()) => {
                self.recovered.set(false);
                self.commits.checkpoints.set(self.commits.checkpoints.get() + 1);
                self.commits.failures.set(0);
            }
            Err(status) => {
                tracing::error!(pool = %self.name(), %status, "a checkpoint failed");
                self.commits.failures.set(self.commits.failures.get() + 1);
            }
        }
        self.commits.done.notify_waiters();
        self.after_checkpoint();
        ok
    }

    /// Waits until the committer has seen that the pool is closed.
    pub(crate) async fn stop_committer(&self) {
        while !self.commits.stopped.get() {
            self.commits.wake.notify_one();
            self.commits.done.notified().await;
        }
    }
}
