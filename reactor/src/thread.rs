//! Drives cores on pinned operating system threads: the loop, idle policies, start and stop. And one on a thread that has a loop
//! of its own.

use crate::clock::{Nanos, machine_now};
use crate::core::{self, Core, Source};
use crate::handle::{Handle, ReactorId, Shared};
use crate::memory::{self, MemoryConfig};
use crate::ring::Ring;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc;
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bounds on what one turn of the loop takes from each queue, so that none starves the others.
const DEFERRED_BATCH: usize = 256;
const READY_BATCH: usize = 256;
const REMOTE_BATCH: usize = 256;
/// What comes from other threads between two tasks of one's own.
const REMOTE_FIRST: usize = 16;
/// How long the end of a reactor waits for wake-ups that other threads are just delivering.
const TEARDOWN_LIMIT: Duration = Duration::from_secs(5);

/// What a reactor does when it finds no work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdlePolicy {
    /// Polls for ever: lowest latency, a whole core.
    Poll,
    /// Polls for `spin` after the last event, then sleeps until woken.
    Adaptive {
        /// Time of polling.
        spin: Duration,
    },
    /// Sleeps at once.
    Interrupt,
}

impl Default for IdlePolicy {
    fn default() -> Self {
        IdlePolicy::Adaptive { spin: Duration::from_micros(50) }
    }
}

/// How to start a [`Runtime`].
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// One reactor per entry, on that CPU.
    pub cores: Vec<usize>,
    /// What idle reactors do.
    pub policy: IdlePolicy,
    /// Pin each thread to its CPU. If that fails, says so once and goes on.
    pub pin: bool,
    /// Submission queue entries of each ring.
    pub ring_entries: u32,
    /// The arena.
    pub memory: MemoryConfig,
    /// End the process when a task, poller or message panics, instead of only that reactor.
    pub abort_on_panic: bool,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        RuntimeConfig {
            cores: vec![0],
            policy: IdlePolicy::default(),
            pin: true,
            ring_entries: 1024,
            memory: MemoryConfig::default(),
            abort_on_panic: false,
        }
    }
}

/// Why a runtime could not start. No thread is left behind.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration names no core.
    #[error("no cores given: name at least one, for example 0")]
    NoCores,
    /// The kernel has no io_uring for us.
    #[error("io_uring is not available on core {core}: {source}. {hint}")]
    Ring {
        /// CPU of the reactor.
        core: usize,
        /// The kernel's answer.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// The system has no thread or descriptor left.
    #[error("cannot start the reactor of core {core}: {source}")]
    System {
        /// CPU of the reactor.
        core: usize,
        /// The system's answer.
        source: io::Error,
    },
}

/// The reactors of a process, one thread each. Dropping it stops them.
#[derive(Debug)]
pub struct Runtime {
    handles: Vec<Handle>,
    threads: Vec<JoinHandle<()>>,
}

impl Runtime {
    /// Maps the arena, starts a thread per core and returns when all are running.
    pub fn start(config: RuntimeConfig) -> Result<Runtime, StartError> {
        if config.cores.is_empty() {
            return Err(StartError::NoCores);
        }
        memory::configure(&config.memory);
        machine_now();
        warn_if_crowded(&config);
        let mut runtime = Runtime { handles: Vec::new(), threads: Vec::new() };
        // On an error the runtime is dropped, which stops the reactors already running.
        for (n, &cpu) in config.cores.iter().enumerate() {
            let system = |source| StartError::System { core: cpu, source };
            let shared = Shared::new(ReactorId(n as u32), cpu, Some(eventfd().map_err(system)?));
            let (started, wait) = mpsc::channel();
            let (thread_shared, thread_config) = (shared.clone(), config.clone());
            let thread = std::thread::Builder::new()
                .name(format!("reactor_{n}"))
                .spawn(move || run_thread(thread_shared, &thread_config, &started))
                .map_err(system)?;
            match wait.recv() {
                Ok(Ok(())) => {
                    runtime.handles.push(Handle(shared));
                    runtime.threads.push(thread);
                }
                Ok(Err(source)) => {
                    let hint = ring_hint(&source);
                    return Err(StartError::Ring { core: cpu, source, hint });
                }
                Err(_) => return Err(system(io::Error::other("the thread ended at once"))),
            }
        }
        Ok(runtime)
    }

    /// The reactors in the order of the configured cores.
    pub fn handles(&self) -> &[Handle] {
        &self.handles
    }

    /// Stops all reactors and joins their threads. Remaining tasks are dropped, each on its own reactor.
    pub fn stop(self) {}
}

impl Drop for Runtime {
    fn drop(&mut self) {
        for handle in &self.handles {
            handle.0.closing.store(true, Ordering::SeqCst);
            handle.0.wake();
        }
        let on_reactor = core::try_with(|_| ()).is_some();
        for thread in self.threads.drain(..) {
            // A reactor that drops its own runtime cannot wait for itself.
            if !on_reactor && thread.join().is_err() {
                tracing::error!("a reactor thread ended by a panic");
            }
        }
    }
}

fn ring_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "Allow it with `sysctl kernel.io_uring_disabled=0`, or in the container's seccomp profile."
        }
        Some(libc::ENOSYS) => "The kernel was built without io_uring, or a seccomp profile hides it.",
        Some(libc::ENOMEM) => "Raise the limit on locked memory (ulimit -l) or use fewer ring entries.",
        _ => "Linux 5.13 or later is needed, with `sysctl kernel.io_uring_disabled=0`.",
    }
}

fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: creates a descriptor.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn warn_if_crowded(config: &RuntimeConfig) {
    static SAID: AtomicBool = AtomicBool::new(false);
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut distinct = config.cores.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let crowded = config.cores.len() > cpus || distinct.len() < config.cores.len();
    if crowded && !SAID.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            "{} reactors share {} of {cpus} usable CPUs: expect long latencies",
            config.cores.len(),
            distinct.len().min(cpus)
        );
    }
}

fn pin_to(cpu: usize) {
    static SAID: AtomicBool = AtomicBool::new(false);
    let result = if cpu < libc::CPU_SETSIZE as usize {
        // SAFETY: an all-zero cpu_set_t is the empty set, and `cpu` is within its size.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(cpu, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
        }
    } else {
        -1
    };
    if result != 0 && !SAID.swap(true, Ordering::Relaxed) {
        tracing::warn!("cannot pin a reactor to CPU {cpu}; it runs wherever the kernel puts it");
    }
}

fn run_thread(shared: Arc<Shared>, config: &RuntimeConfig, started: &mpsc::Sender<io::Result<()>>) {
    if config.pin {
        pin_to(shared.cpu);
    }
    let wake_fd = shared.wake_fd.as_ref().map_or(-1, |fd| fd.as_raw_fd());
    let ring = match Ring::new(config.ring_entries, wake_fd, config.memory.fixed_buffers) {
        Ok(ring) => Rc::new(ring),
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let core = Core::new(shared, Source::Machine, Some(ring.clone()));
    let entered = core::enter(&core);
    let _ = started.send(Ok(()));
    let mut reactor = Loop {
        core: &core,
        ring: &ring,
        policy: config.policy,
        last: machine_now(),
        last_event: machine_now(),
    };
    if catch_unwind(AssertUnwindSafe(|| reactor.run())).is_err() {
        tracing::error!("reactor {} ends: a task, poller or message panicked", core.shared.id.0);
        if config.abort_on_panic {
            std::process::abort();
        }
    }
    tear_down(&core, &ring);
    drop(entered);
}

struct Loop<'a> {
    core: &'a Core,
    ring: &'a Ring,
    policy: IdlePolicy,
    /// End of the last turn.
    last: Nanos,
    /// Last time something came from outside: a completion, a message, a poller's work.
    last_event: Nanos,
}

impl Loop<'_> {
    fn run(&mut self) {
        while !self.core.shared.closing.load(Ordering::Relaxed) {
            let worked = self.turn();
            if !worked {
                self.idle();
            }
        }
    }

    /// True: there was work.
    fn turn(&mut self) -> bool {
        let core = self.core;
        let local = core.run_deferred(DEFERRED_BATCH) + core.run_ready_and_remote(READY_BATCH, REMOTE_FIRST);
        let remote = core.run_remote(REMOTE_BATCH);
        let (mut completions, mut clients) = self.ring.turn();
        if let Some(wide) = core.wide.get() {
            let (all, of_clients) = wide.turn();
            (completions, clients) = (completions + all, clients + of_clients);
        }
        let polled = core.run_pollers();
        let now = core.now();
        let fired = core.fire_timers(now);
        let worked = polled || local + remote + completions + fired > 0;
        let counter = if worked { &core.shared.busy_ns } else { &core.shared.idle_ns };
        counter.add((now - self.last).as_nanos() as u64);
        self.last = now;
        if polled || remote + clients > 0 {
            self.last_event = now;
        }
        worked
    }

    fn idle(&mut self) {
        let spin = match self.policy {
            IdlePolicy::Poll => None,
            IdlePolicy::Adaptive { spin } => Some(spin),
            IdlePolicy::Interrupt => Some(Duration::ZERO),
        };
        if spin.is_some_and(|spin| self.last - self.last_event >= spin) && self.core.may_sleep() {
            self.sleep();
        } else {
            std::hint::spin_loop();
        }
    }

    fn sleep(&mut self) {
        let shared = &*self.core.shared;
        shared.sleeping.store(true, Ordering::SeqCst);
        // Pairs with the fence in Shared::wake: whoever pushed before it is seen here, whoever pushes later sees the flag.
        fence(Ordering::SeqCst);
        let now = self.core.now();
        let limit = self.core.next_timer().map(|at| at - now);
        let found = self.core.has_work()
            || shared.closing.load(Ordering::Relaxed)
            || limit == Some(Duration::ZERO)
            || self.ring.has_completions()
            || self.core.wide.get().is_some_and(|wide| wide.may_wake());
        if !found {
            shared.sleeps.add(1);
            shared.asleep_since_ns.store(self.last.0, Ordering::Relaxed);
            self.ring.sleep(limit);
            shared.asleep_since_ns.store(0, Ordering::Relaxed);
            // Pairs with the one in Shared::idle_until_now.
            fence(Ordering::Release);
        }
        self.core.wide.get().iter().for_each(|wide| wide.stay_awake());
        shared.sleeping.store(false, Ordering::Relaxed);
        let now = self.core.now();
        shared.idle_ns.add((now - self.last).as_nanos() as u64);
        self.last = now;
    }
}

/// A reactor that its owner's thread runs, a turn at a time: for programs that bring their own loop. Everything on it runs in
/// [`Inline::turn`] and [`Inline::block_on`], and what calls the functions of this crate goes through [`Inline::enter`].
/// Dropping it drops what is left on it.
pub struct Inline {
    // Boxed: `enter` hands its address out.
    core: Box<Core>,
    ring: Rc<Ring>,
    policy: IdlePolicy,
    last: Nanos,
    last_event: Nanos,
}

impl Inline {
    /// Makes one on the calling thread, which it does not pin. Of the configuration, the first core is only its name.
    ///
    /// # Errors
    /// What the machine does not have.
    pub fn new(config: &RuntimeConfig) -> Result<Inline, StartError> {
        let cpu = *config.cores.first().ok_or(StartError::NoCores)?;
        memory::configure(&config.memory);
        let wake_fd = eventfd().map_err(|source| StartError::System { core: cpu, source })?;
        let ring = Ring::new(config.ring_entries, wake_fd.as_raw_fd(), config.memory.fixed_buffers);
        let ring = ring.map_err(|source| {
            let hint = ring_hint(&source);
            StartError::Ring { core: cpu, source, hint }
        })?;
        let (shared, ring) = (Shared::new(ReactorId(0), cpu, Some(wake_fd)), Rc::new(ring));
        let core = Box::new(Core::new(shared, Source::Machine, Some(ring.clone())));
        let now = machine_now();
        Ok(Inline { core, ring, policy: config.policy, last: now, last_event: now })
    }

    /// How others reach it. What they send waits for the next turn.
    pub fn handle(&self) -> Handle {
        Handle(self.core.shared.clone())
    }

    /// Runs `f` on this reactor.
    pub fn enter<R>(&self, f: impl FnOnce() -> R) -> R {
        let _entered = core::enter(&self.core);
        f()
    }

    /// One turn of the loop. True: there was work. When there was none and `wait` is given, idles as the policy says: comes back
    /// when something happens, or earlier.
    pub fn turn(&mut self, wait: bool) -> bool {
        let _entered = core::enter(&self.core);
        let (core, ring) = (&*self.core, &*self.ring);
        let mut turn = Loop { core, ring, policy: self.policy, last: self.last, last_event: self.last_event };
        let worked = turn.turn();
        if !worked && wait {
            turn.idle();
        }
        (self.last, self.last_event) = (turn.last, turn.last_event);
        worked
    }

    /// Runs turns until the future has its result.
    pub fn block_on<F: Future<Output: 'static> + 'static>(&mut self, future: F) -> F::Output {
        let mut task = self.enter(|| crate::spawn_local(future));
        loop {
            let mut context = Context::from_waker(Waker::noop());
            if let Poll::Ready(output) = Pin::new(&mut task).poll(&mut context) {
                return output;
            }
            self.turn(true);
        }
    }
}

impl Drop for Inline {
    fn drop(&mut self) {
        let _entered = core::enter(&self.core);
        tear_down(&self.core, &self.ring);
    }
}

/// Drops all that is left on this reactor, on its thread.
fn tear_down(core: &Core, ring: &Rc<Ring>) {
    let shared = &*core.shared;
    shared.closing.store(true, Ordering::SeqCst);
    let start = Instant::now();
    // Another thread may be between taking a task for a wake-up and pushing it: wait for it.
    loop {
        let dropped = catch_unwind(AssertUnwindSafe(|| core.drop_everything()));
        if !dropped.unwrap_or(true) {
            break;
        }
        if start.elapsed() > TEARDOWN_LIMIT {
            tracing::error!("reactor {}: some tasks could not be dropped", shared.id);
            break;
        }
        std::thread::yield_now();
    }
    let wide = core.wide.get();
    let drained = catch_unwind(AssertUnwindSafe(|| ring.drain() & wide.is_none_or(|wide| wide.drain())))
        .unwrap_or(false);
    if !drained {
        // The kernel may still write to the clients' memory: never free it.
        tracing::error!("reactor {}: I/O is still in flight; its memory is left to the kernel", shared.id);
        std::mem::forget((ring.clone(), wide.cloned()));
    }
    let _ = catch_unwind(AssertUnwindSafe(|| core.drop_everything()));
    shared.closed.store(true, Ordering::SeqCst);
    // Pairs with the fence in Shared::wake: a later push sees `closed` and discards it itself.
    fence(Ordering::SeqCst);
    let _ = catch_unwind(AssertUnwindSafe(|| core.drop_everything()));
}
