//! [`Handle`]: how other threads and other cores reach a reactor.

use crate::clock::{Nanos, machine_now};
use crate::core;
use crate::reply::{ReplySender, reply};
use async_task::Runnable;
use crossbeam::queue::SegQueue;
use std::any::Any;
use std::fmt;
use std::future::poll_fn;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::Poll;

/// Number of a reactor within its runtime or simulator, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReactorId(pub u32);

impl fmt::Display for ReactorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a call to a reactor has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReactorGone {
    /// The reactor stopped before the call was finished.
    #[error("the reactor has stopped")]
    Stopped,
    /// [`Handle::block_on`] was called where blocking would stop a reactor (perhaps the one called).
    #[error("block_on was called on a reactor; await `call` instead")]
    OnReactor,
}

/// Something to run on another core. A closure goes through [`Handle::send`].
pub trait Message: Send {
    /// Runs on the receiving reactor.
    fn run(self: Box<Self>);
}

struct Closure<F>(F);

impl<F: FnOnce() + Send> Message for Closure<F> {
    fn run(self: Box<Self>) {
        (self.0)();
    }
}

/// What comes in from other threads.
pub(crate) enum Remote {
    Wake(Runnable),
    Message(Box<dyn Message>),
}

/// A counter that one thread writes and any thread reads.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Only the owning thread may call this.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

pub(crate) struct PollerCounters {
    pub(crate) name: String,
    pub(crate) run_count: Counter,
    pub(crate) busy_count: Counter,
}

/// The part of a reactor that all threads see.
pub(crate) struct Shared {
    pub(crate) id: ReactorId,
    pub(crate) cpu: usize,
    /// Unlike `id`, unique in the process.
    pub(crate) instance: u64,
    pub(crate) remote: SegQueue<Remote>,
    /// Set while the owner sleeps or is about to; whoever clears it must write `wake_fd`.
    pub(crate) sleeping: AtomicBool,
    /// None in the simulator, whose driver looks at all queues.
    pub(crate) wake_fd: Option<OwnedFd>,
    /// The owner should stop, or is stopping: no new messages.
    pub(crate) closing: AtomicBool,
    /// The owner is done; nobody will drain `remote`.
    pub(crate) closed: AtomicBool,
    pub(crate) busy_ns: Counter,
    pub(crate) idle_ns: Counter,
    /// Start of the sleep under way, which `idle_ns` does not have yet; 0: awake.
    pub(crate) asleep_since_ns: AtomicU64,
    /// The most idle time told so far.
    idle_told_ns: AtomicU64,
    pub(crate) sleeps: Counter,
    pub(crate) wakes: AtomicU64,
    pub(crate) messages: Counter,
    pub(crate) tasks: AtomicUsize,
    pollers: Mutex<Vec<Arc<PollerCounters>>>,
}

impl Shared {
    pub(crate) fn new(id: ReactorId, cpu: usize, wake_fd: Option<OwnedFd>) -> Arc<Shared> {
        static INSTANCES: AtomicU64 = AtomicU64::new(0);
        Arc::new(Shared {
            id,
            cpu,
            instance: INSTANCES.fetch_add(1, Ordering::Relaxed),
            remote: SegQueue::new(),
            sleeping: AtomicBool::new(false),
            wake_fd,
            closing: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            busy_ns: Counter::default(),
            idle_ns: Counter::default(),
            asleep_since_ns: AtomicU64::new(0),
            idle_told_ns: AtomicU64::new(0),
            sleeps: Counter::default(),
            wakes: AtomicU64::new(0),
            messages: Counter::default(),
            tasks: AtomicUsize::new(0),
            pollers: Mutex::default(),
        })
    }

    /// Idle time with that of a sleep under way, ns. A turn under way is told at its end, when it is known what it was.
    fn idle_until_now(&self) -> u64 {
        let idle = self.idle_ns.get();
        // Pairs with the fence in Loop::sleep: whoever sees the sleep's time counted sees its end.
        fence(Ordering::Acquire);
        let asleep = match self.asleep_since_ns.load(Ordering::Relaxed) {
            0 => 0,
            since => (machine_now() - Nanos(since)).as_nanos() as u64,
        };
        let told = idle + asleep;
        // Who looked while it woke may have been told a little more.
        self.idle_told_ns.fetch_max(told, Ordering::Relaxed).max(told)
    }

    pub(crate) fn push(&self, remote: Remote) {
        self.remote.push(remote);
        self.wake();
        if self.closed.load(Ordering::Relaxed) {
            self.discard();
        }
    }

    /// Wakes the owner if it sleeps.
    pub(crate) fn wake(&self) {
        // Pairs with the fence between setting `sleeping` and the last look at the queues: either the sleeper sees the
        // push or this thread sees the flag. The same fence orders the push before the look at `closed`.
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) && self.sleeping.swap(false, Ordering::AcqRel) {
            self.wakes.fetch_add(1, Ordering::Relaxed);
            if let Some(fd) = &self.wake_fd {
                let one = 1u64.to_ne_bytes();
                // SAFETY: writes eight bytes from a live buffer to a descriptor that `self` owns.
                unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
            }
        }
    }

    /// Drops what arrived after the end. Futures may not be dropped on this thread, so wake-ups are forgotten; the owner
    /// has already dropped the futures themselves.
    pub(crate) fn discard(&self) {
        while let Some(remote) = self.remote.pop() {
            match remote {
                Remote::Wake(runnable) => std::mem::forget(runnable),
                Remote::Message(message) => drop(message),
            }
        }
    }

    pub(crate) fn add_poller(&self, name: &str) -> Arc<PollerCounters> {
        let counters = Arc::new(PollerCounters {
            name: name.to_owned(),
            run_count: Counter::default(),
            busy_count: Counter::default(),
        });
        self.pollers.lock().unwrap_or_else(PoisonError::into_inner).push(counters.clone());
        counters
    }

    pub(crate) fn remove_poller(&self, counters: &Arc<PollerCounters>) {
        let mut pollers = self.pollers.lock().unwrap_or_else(PoisonError::into_inner);
        pollers.retain(|other| !Arc::ptr_eq(other, counters));
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.discard();
    }
}

/// What a poller has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PollerStats {
    /// The name it was registered with.
    pub name: String,
    /// Times it was polled.
    pub run_count: u64,
    /// Times it found work.
    pub busy_count: u64,
}

/// What a reactor has done. Counters only grow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReactorStats {
    /// Time of turns that found work, ns.
    pub busy_ns: u64,
    /// Time of turns that found none, and of sleep, the one under way too, ns.
    pub idle_ns: u64,
    /// Times it went to sleep.
    pub sleeps: u64,
    /// Times another thread woke it from sleep.
    pub wakes: u64,
    /// Live tasks now.
    pub tasks: u64,
    /// Messages run.
    pub messages: u64,
    /// The registered pollers.
    pub pollers: Vec<PollerStats>,
}

/// Reaches a reactor from anywhere. Cheap to clone.
#[derive(Clone)]
pub struct Handle(pub(crate) Arc<Shared>);

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle(reactor {}, core {})", self.0.id, self.0.cpu)
    }
}

impl PartialEq for Handle {
    fn eq(&self, other: &Handle) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Handle {}

type Outcome<T> = Result<T, Box<dyn Any + Send>>;

impl Handle {
    /// The reactor's number.
    pub fn id(&self) -> ReactorId {
        self.0.id
    }

    /// The CPU it was asked to run on.
    pub fn core(&self) -> usize {
        self.0.cpu
    }

    /// Whether the caller runs on this reactor.
    #[inline]
    pub fn is_current(&self) -> bool {
        core::try_with(|core| Arc::ptr_eq(&core.shared, &self.0)).unwrap_or(false)
    }

    /// Whether the reactor has stopped or been told to: messages are dropped.
    pub fn is_gone(&self) -> bool {
        self.0.closing.load(Ordering::Acquire)
    }

    /// Runs `f` on the reactor, after what was sent before by this thread. Dropped if the reactor stops first.
    pub fn send(&self, f: impl FnOnce() + Send + 'static) {
        self.send_boxed(Box::new(Closure(f)));
    }

    /// As [`Handle::send`], with a message that exists already: no allocation of its own.
    pub fn send_boxed(&self, message: Box<dyn Message>) {
        if !self.is_gone() {
            self.0.push(Remote::Message(message));
        }
    }

    /// Starts a detached task on the reactor. `f` runs there, so the future need not be `Send`.
    pub fn spawn<F, Fut>(&self, f: F)
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        self.send(move || crate::spawn_local(f()).detach());
    }

    /// Runs a future on the reactor and waits for its result. From any reactor, also from this one. If the future
    /// panics, the caller panics with the same payload.
    ///
    /// Dropping the returned future does not stop the other one.
    pub async fn call<F, Fut, T>(&self, f: F) -> Result<T, ReactorGone>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (sender, receiver) = reply::<Outcome<T>>();
        self.send_call(f, move |outcome| ReplySender::send(sender, outcome));
        match receiver.await {
            Some(outcome) => Ok(outcome.unwrap_or_else(|payload| resume_unwind(payload))),
            None => Err(ReactorGone::Stopped),
        }
    }

    /// As [`Handle::call`] from an ordinary thread, which it blocks.
    pub fn block_on<F, Fut, T>(&self, f: F) -> Result<T, ReactorGone>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        // A simulated core makes no progress while the thread that steps it waits.
        if core::try_with(|_| ()).is_some() || self.0.wake_fd.is_none() {
            return Err(ReactorGone::OnReactor);
        }
        let (sender, receiver) = mpsc::sync_channel::<Outcome<T>>(1);
        self.send_call(f, move |outcome| drop(sender.send(outcome)));
        match receiver.recv() {
            Ok(outcome) => Ok(outcome.unwrap_or_else(|payload| resume_unwind(payload))),
            Err(_) => Err(ReactorGone::Stopped),
        }
    }

    fn send_call<F, Fut, T>(&self, f: F, answer: impl FnOnce(Outcome<T>) + Send + 'static)
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        self.spawn(move || async move { answer(catch_panic(f).await) });
    }

    /// What the reactor has done so far. From any thread.
    pub fn stats(&self) -> ReactorStats {
        let shared = &*self.0;
        let pollers = shared.pollers.lock().unwrap_or_else(PoisonError::into_inner);
        ReactorStats {
            busy_ns: shared.busy_ns.get(),
            idle_ns: shared.idle_until_now(),
            sleeps: shared.sleeps.get(),
            wakes: shared.wakes.load(Ordering::Relaxed),
            tasks: shared.tasks.load(Ordering::Relaxed) as u64,
            messages: shared.messages.get(),
            pollers: pollers
                .iter()
                .map(|counters| PollerStats {
                    name: counters.name.clone(),
                    run_count: counters.run_count.get(),
                    busy_count: counters.busy_count.get(),
                })
                .collect(),
        }
    }
}

/// Runs `f` and its future; a panic becomes a value for the caller, instead of ending the reactor.
async fn catch_panic<F, Fut>(f: F) -> Outcome<Fut::Output>
where
    F: FnOnce() -> Fut,
    Fut: Future,
{
    let mut future = pin!(catch_unwind(AssertUnwindSafe(f))?);
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(Poll::Pending) => Poll::Pending,
        Ok(Poll::Ready(value)) => Poll::Ready(Ok(value)),
        Err(payload) => Poll::Ready(Err(payload)),
    })
    .await
}
