//! The scheduler of one core, without operating system: queues, deferred calls, timers, pollers, counters.
//!
//! Owns: the tasks spawned on the core and everything that makes them run. `thread` and `sim` decide when.
//!
//! Invariants:
//! - Futures are polled and dropped only while this core is [`enter`]ed, on the thread that made it. Their `Runnable`s may
//!   travel (a wake-up on another thread), but only into `Shared::remote`, which the owner drains.
//! - No `RefCell` is borrowed while foreign code (a task, a waker, a destructor) runs.

use crate::clock::{Nanos, machine_now};
use crate::handle::{PollerCounters, Remote, Shared};
use crate::random::{self, Rng};
use crate::ring::{Ring, RingUnavailable, WideRing, WideRingError};
use crate::timer::Timers;
use async_task::{Runnable, Task};
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::ptr::null;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;

thread_local! {
    static CURRENT: Cell<*const Core> = const { Cell::new(null()) };
}

/// Runs soon on the core that deferred it, never inside the caller's stack frame, in order.
pub trait Deferred {
    /// The call.
    fn run(self: Box<Self>);
}

/// Whether a poller can do without being polled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SleepVerdict {
    /// The reactor may sleep: the poller has armed something that will wake it.
    MaySleep,
    /// There is no wake-up source; the reactor must keep polling.
    KeepPolling,
}

/// Something that looks for work once per turn of the loop.
pub trait Poller {
    /// Looks for work and does it. True: did some.
    fn poll(&self) -> bool;

    /// Called when the reactor wants to sleep. Arms the wake-up source (for example a poll of a file descriptor on the
    /// ring), once until it fires, and looks once more after arming.
    fn prepare_sleep(&self) -> SleepVerdict {
        SleepVerdict::KeepPolling
    }
}

pub(crate) struct PollerEntry {
    /// None once unregistered.
    poller: RefCell<Option<Rc<dyn Poller>>>,
    counters: Arc<PollerCounters>,
}

/// Keeps a poller registered; dropping it unregisters, also from inside the poller.
#[must_use = "dropping the guard unregisters the poller"]
pub struct PollerGuard {
    entry: Rc<PollerEntry>,
    shared: Arc<Shared>,
}

impl Drop for PollerGuard {
    fn drop(&mut self) {
        let poller = self.entry.poller.borrow_mut().take();
        self.shared.remove_poller(&self.entry.counters);
        drop(poller);
    }
}

/// Where time and randomness come from.
pub(crate) enum Source {
    Machine,
    Sim { now: Rc<Cell<Nanos>>, rng: RefCell<Rng> },
}

pub(crate) struct Core {
    pub(crate) shared: Arc<Shared>,
    pub(crate) ring: Option<Rc<Ring>>,
    /// Once there is a client for it.
    pub(crate) wide: OnceCell<Rc<WideRing>>,
    source: Source,
    ready: RefCell<VecDeque<Runnable>>,
    deferred: RefCell<VecDeque<Box<dyn Deferred>>>,
    timers: RefCell<Timers>,
    pollers: RefCell<Vec<Rc<PollerEntry>>>,
    tasks: Rc<RefCell<TaskTable>>,
}

/// Makes `core` the current one until the guard is dropped.
pub(crate) struct Entered<'a> {
    before: *const Core,
    _core: &'a Core,
}

pub(crate) fn enter(core: &Core) -> Entered<'_> {
    Entered { before: CURRENT.replace(core), _core: core }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        CURRENT.set(self.before);
    }
}

/// The current core, if any.
#[inline]
pub(crate) fn try_with<R>(f: impl FnOnce(&Core) -> R) -> Option<R> {
    // SAFETY: the pointer is set only while an `Entered` borrows the core, and guards nest like the stack.
    unsafe { CURRENT.get().as_ref() }.map(f)
}

/// The current core.
#[inline]
#[track_caller]
pub(crate) fn with<R>(f: impl FnOnce(&Core) -> R) -> R {
    match try_with(f) {
        Some(result) => result,
        None => {
            panic!("called outside of a reactor: this function needs a reactor thread or a simulated core")
        }
    }
}

impl Core {
    pub(crate) fn new(shared: Arc<Shared>, source: Source, ring: Option<Rc<Ring>>) -> Core {
        Core {
            shared,
            ring,
            wide: OnceCell::new(),
            source,
            ready: RefCell::default(),
            deferred: RefCell::default(),
            timers: RefCell::default(),
            pollers: RefCell::default(),
            tasks: Rc::default(),
        }
    }

    pub(crate) fn wide_ring(&self) -> Result<Rc<WideRing>, WideRingError> {
        if let Some(wide) = self.wide.get() {
            return Ok(wide.clone());
        }
        let wide = Rc::new(self.ring.as_ref().ok_or(RingUnavailable)?.widened()?);
        Ok(self.wide.get_or_init(|| wide).clone())
    }

    #[inline]
    pub(crate) fn now(&self) -> Nanos {
        match &self.source {
            Source::Machine => machine_now(),
            Source::Sim { now, .. } => now.get(),
        }
    }

    pub(crate) fn random_u64(&self) -> u64 {
        match &self.source {
            Source::Machine => random::machine_u64(),
            Source::Sim { rng, .. } => rng.borrow_mut().next(),
        }
    }

    pub(crate) fn fill_random(&self, target: &mut [u8]) {
        match &self.source {
            Source::Machine => random::machine_fill(target),
            Source::Sim { rng, .. } => rng.borrow_mut().fill(target),
        }
    }

    pub(crate) fn timers(&self) -> &RefCell<Timers> {
        &self.timers
    }

    pub(crate) fn spawn<F: Future + 'static>(&self, future: F) -> Task<F::Output> {
        let key = self.tasks.borrow_mut().reserve();
        let entry = TaskEntry { table: self.tasks.clone(), shared: self.shared.clone(), key };
        self.shared.tasks.fetch_add(1, Ordering::Relaxed);
        let tracked = async move {
            let _entry = entry;
            future.await
        };
        let shared = self.shared.clone();
        // SAFETY: the future need not be Send because it is only polled and dropped by running or dropping its Runnable,
        // and those end only in `ready` and `remote` of this core, both emptied only by the owning thread (what is left in
        // `remote` when the last handle goes is forgotten, see Shared::drop). Future and schedule function are 'static;
        // the schedule function is Send + Sync, so wakers may be used anywhere.
        let (runnable, task) =
            unsafe { async_task::spawn_unchecked(tracked, move |runnable| schedule(&shared, runnable)) };
        self.tasks.borrow_mut().set(key, runnable.waker());
        self.ready.borrow_mut().push_back(runnable);
        task
    }

    #[inline]
    pub(crate) fn defer(&self, call: Box<dyn Deferred>) {
        self.deferred.borrow_mut().push_back(call);
    }

    pub(crate) fn register_poller(&self, name: &str, poller: Rc<dyn Poller>) -> PollerGuard {
        let counters = self.shared.add_poller(name);
        let entry = Rc::new(PollerEntry { poller: RefCell::new(Some(poller)), counters });
        self.pollers.borrow_mut().push(entry.clone());
        PollerGuard { entry, shared: self.shared.clone() }
    }

    /// Runs deferred calls that are there now, at most `limit`. Returns how many.
    pub(crate) fn run_deferred(&self, limit: usize) -> usize {
        let count = self.deferred.borrow().len().min(limit);
        for _ in 0..count {
            let Some(call) = self.deferred.borrow_mut().pop_front() else { break };
            call.run();
        }
        count
    }

    /// Polls ready tasks, at most `limit`; those that become ready meanwhile belong to the next turn.
    pub(crate) fn run_ready(&self, limit: usize) -> usize {
        let count = self.ready.borrow().len().min(limit);
        for _ in 0..count {
            let Some(runnable) = self.ready.borrow_mut().pop_front() else { break };
            runnable.run();
        }
        count
    }

    /// As [`Core::run_ready`], but what comes from other threads goes first, as far as `remote_limit` after each task: cores
    /// that wait for an answer of this one do not wait for all of its own work.
    pub(crate) fn run_ready_and_remote(&self, limit: usize, remote_limit: usize) -> usize {
        let count = self.ready.borrow().len().min(limit);
        for _ in 0..count {
            let Some(runnable) = self.ready.borrow_mut().pop_front() else { break };
            runnable.run();
            if self.has_remote() {
                let before = self.ready.borrow().len();
                self.run_remote(remote_limit);
                let came = self.ready.borrow().len() - before;
                for _ in 0..came {
                    // Tasks only add to the end, so the next one that came is at the same place again.
                    let Some(runnable) = self.ready.borrow_mut().remove(before) else { break };
                    runnable.run();
                }
            }
        }
        count
    }

    /// Takes in messages and wake-ups from other threads, at most `limit`.
    pub(crate) fn run_remote(&self, limit: usize) -> usize {
        let mut count = 0;
        while count < limit
            && let Some(remote) = self.shared.remote.pop()
        {
            count += 1;
            match remote {
                Remote::Wake(runnable) => self.ready.borrow_mut().push_back(runnable),
                Remote::Message(message) => {
                    self.shared.messages.add(1);
                    message.run();
                }
            }
        }
        count
    }

    /// Polls every poller once. True when one of them did work.
    pub(crate) fn run_pollers(&self) -> bool {
        let mut worked = false;
        self.each_poller(|poller, counters| {
            let busy = poller.poll();
            counters.run_count.add(1);
            counters.busy_count.add(u64::from(busy));
            worked |= busy;
            true
        });
        worked
    }

    /// Asks every poller until one must be polled on.
    pub(crate) fn may_sleep(&self) -> bool {
        let mut verdict = true;
        self.each_poller(|poller, _| {
            verdict = poller.prepare_sleep() == SleepVerdict::MaySleep;
            verdict
        });
        verdict
    }

    /// Calls `f` for each registered poller until it returns false. Pollers may come and go meanwhile.
    fn each_poller(&self, mut f: impl FnMut(&dyn Poller, &PollerCounters) -> bool) {
        let mut index = 0;
        loop {
            let Some(entry) = self.pollers.borrow().get(index).cloned() else { break };
            let poller = entry.poller.borrow().clone();
            match poller {
                Some(poller) => {
                    if !f(&*poller, &entry.counters) {
                        break;
                    }
                    index += 1;
                }
                None => drop(self.pollers.borrow_mut().remove(index)),
            }
        }
    }

    /// Wakes what is due. Returns how many.
    pub(crate) fn fire_timers(&self, now: Nanos) -> usize {
        let mut count = 0;
        loop {
            let Some(waker) = self.timers.borrow_mut().pop_due(now) else { break };
            waker.wake();
            count += 1;
        }
        count
    }

    pub(crate) fn next_timer(&self) -> Option<Nanos> {
        self.timers.borrow().next()
    }

    pub(crate) fn has_pollers(&self) -> bool {
        !self.pollers.borrow().is_empty()
    }

    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.borrow().is_empty()
    }

    pub(crate) fn has_deferred(&self) -> bool {
        !self.deferred.borrow().is_empty()
    }

    pub(crate) fn has_remote(&self) -> bool {
        !self.shared.remote.is_empty()
    }

    /// Whether a turn would find something without polling.
    pub(crate) fn has_work(&self) -> bool {
        self.has_ready() || self.has_deferred() || self.has_remote()
    }

    /// Drops tasks, messages, deferred calls, timers and pollers without running them. Destructors may bring new ones;
    /// call until it returns false. The core must be entered.
    pub(crate) fn drop_everything(&self) -> bool {
        // Waking a task hands out its Runnable; dropping that drops the future here.
        let wakers = self.tasks.borrow_mut().take_wakers();
        let mut any = !wakers.is_empty();
        wakers.into_iter().for_each(Waker::wake);
        loop {
            let runnable = self.ready.borrow_mut().pop_front();
            let remote = self.shared.remote.pop();
            let call = self.deferred.borrow_mut().pop_front();
            let timer = self.timers.borrow_mut().pop_due(Nanos(u64::MAX));
            let poller = self.pollers.borrow_mut().pop();
            let poller = poller.and_then(|entry| entry.poller.borrow_mut().take());
            if runnable.is_none() && remote.is_none() && call.is_none() && timer.is_none() && poller.is_none()
            {
                break;
            }
            any = true;
        }
        any || !self.tasks.borrow().is_empty()
    }
}

/// Puts a woken task where its core will find it.
fn schedule(shared: &Arc<Shared>, runnable: Runnable) {
    // SAFETY: as in `try_with`.
    let core = unsafe { CURRENT.get().as_ref() };
    match core {
        Some(core) if Arc::ptr_eq(&core.shared, shared) => core.ready.borrow_mut().push_back(runnable),
        _ => shared.push(Remote::Wake(runnable)),
    }
}

/// The live tasks of a core, so that they can be dropped when it ends.
#[derive(Default)]
struct TaskTable {
    slots: Vec<Option<Waker>>,
    free: Vec<u32>,
    live: usize,
}

impl TaskTable {
    fn reserve(&mut self) -> u32 {
        self.live += 1;
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as u32 - 1
        })
    }

    fn set(&mut self, key: u32, waker: Waker) {
        self.slots[key as usize] = Some(waker);
    }

    fn release(&mut self, key: u32) -> Option<Waker> {
        self.live -= 1;
        self.free.push(key);
        self.slots[key as usize].take()
    }

    fn take_wakers(&mut self) -> Vec<Waker> {
        self.slots.iter_mut().filter_map(Option::take).collect()
    }

    fn is_empty(&self) -> bool {
        self.live == 0
    }
}

/// Lives inside a task's future: leaves the table when the future is dropped.
struct TaskEntry {
    table: Rc<RefCell<TaskTable>>,
    shared: Arc<Shared>,
    key: u32,
}

impl Drop for TaskEntry {
    fn drop(&mut self) {
        self.shared.tasks.fetch_sub(1, Ordering::Relaxed);
        let waker = self.table.borrow_mut().release(self.key);
        drop(waker);
    }
}
