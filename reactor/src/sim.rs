//! The simulator: many virtual cores stepped in one thread, in seeded random order, in virtual time.
//!
//! Owns the virtual cores, their clock and the seed. The context functions ([`crate::spawn_local`], [`crate::now`], ...) act
//! on the core being stepped. Nothing depends on the machine: a run is a function of its seed and of the code.
//!
//! Invariants: virtual time never goes back; each step costs 1 to 200 ns; when nothing is runnable, time jumps to the next
//! timer; within one core, tasks, deferred calls and messages each keep their order.
//!
//! A power cut is a run that is abandoned: [`Sim::run_until`] or [`Sim::run_for`], then drop the `Sim`.

use crate::clock::Nanos;
use crate::core::{self, Core, Source};
use crate::handle::{Handle, ReactorId, Shared};
use crate::random::Rng;
use async_task::Task;
use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// A step takes at most this much virtual time, ns.
const STEP_LIMIT_NS: u64 = 200;
/// One step in so many may go to a core that has nothing but pollers.
const POLL_ONE_IN: u64 = 8;
/// Time that passes when only pollers without wake-up source are left, ns.
const POLL_STEP_NS: u64 = 1_000;
/// So many of those without any work are a stall.
const MAX_IDLE_POLLS: u32 = 100_000;

/// Nothing can ever run again, but the future is not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stalled after {steps} steps at {at:?}: no task can ever run again (seed {seed})")]
pub struct Stalled {
    /// Seed of the run.
    pub seed: u64,
    /// Steps made.
    pub steps: u64,
    /// Virtual time of the stall.
    pub at: Nanos,
}

/// A simulated machine. Prints its seed when a panic passes through.
pub struct Sim {
    seed: u64,
    cores: Vec<Core>,
    handles: Vec<Handle>,
    now: Rc<Cell<Nanos>>,
    rng: Rng,
    steps: u64,
    trace: u64,
    idle_polls: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum Work {
    Deferred,
    Ready,
    Remote,
    Pollers,
}

impl Sim {
    /// A machine with one core, at time 0.
    pub fn new(seed: u64) -> Sim {
        let sim = Sim {
            seed,
            cores: Vec::new(),
            handles: Vec::new(),
            now: Rc::default(),
            rng: Rng::new(seed),
            steps: 0,
            trace: 0,
            idle_polls: 0,
        };
        sim.cores(1)
    }

    /// Sets the number of cores (at least 1), before anything was spawned.
    pub fn cores(mut self, count: usize) -> Sim {
        self.cores.clear();
        for n in 0..count.max(1) {
            let rng = RefCell::new(Rng::new(self.seed ^ (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            let source = Source::Sim { now: self.now.clone(), rng };
            self.cores.push(Core::new(Shared::new(ReactorId(n as u32), n, None), source, None));
        }
        self.handles = self.cores.iter().map(|core| Handle(core.shared.clone())).collect();
        self
    }

    /// The virtual cores.
    pub fn handles(&self) -> &[Handle] {
        &self.handles
    }

    /// Virtual time.
    pub fn now(&self) -> Nanos {
        self.now.get()
    }

    /// The seed of this run.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Steps made so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Hash of every scheduling decision so far: equal for equal runs.
    pub fn trace(&self) -> u64 {
        self.trace
    }

    /// Starts a task on a core. It runs when the simulator is stepped.
    ///
    /// # Panics
    /// If there is no such core.
    pub fn spawn<F, Fut>(&mut self, core: usize, f: F) -> Task<Fut::Output>
    where
        F: FnOnce() -> Fut + 'static,
        Fut: Future + 'static,
    {
        let core = &self.cores[core];
        let _entered = core::enter(core);
        core.spawn(async move { f().await })
    }

    /// Runs a future on core 0 and everything it needs, until it is finished. Other tasks stay for the next call.
    ///
    /// # Panics
    /// If the future panics, or with "stalled" when it can never finish.
    pub fn run<F, Fut, T>(&mut self, f: F) -> T
    where
        F: FnOnce() -> Fut + 'static,
        Fut: Future<Output = T> + 'static,
        T: 'static,
    {
        self.try_run(f).unwrap_or_else(|stalled| panic!("{stalled}"))
    }

    /// As [`Sim::run`], with a stall as an error. The future is then dropped.
    pub fn try_run<F, Fut, T>(&mut self, f: F) -> Result<T, Stalled>
    where
        F: FnOnce() -> Fut + 'static,
        Fut: Future<Output = T> + 'static,
        T: 'static,
    {
        let mut task = pin!(self.spawn(0, f));
        self.idle_polls = 0;
        while !task.is_finished() {
            if !self.step() {
                return Err(Stalled { seed: self.seed, steps: self.steps, at: self.now() });
            }
        }
        match task.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Ok(value),
            Poll::Pending => unreachable!("a finished task has its value"),
        }
    }

    /// Makes at most `steps` steps; returns how many, fewer when nothing can run any more.
    pub fn run_for(&mut self, steps: u64) -> u64 {
        self.idle_polls = 0;
        (0..steps).take_while(|_| self.step()).count() as u64
    }

    /// Steps until `done` says so (looked at before each step). False: nothing can run any more, and it never did.
    pub fn run_until(&mut self, mut done: impl FnMut() -> bool) -> bool {
        self.idle_polls = 0;
        while !done() {
            if !self.step() {
                return done();
            }
        }
        true
    }

    /// The whole machine stands still (paused, suspended): time passes, nothing runs.
    pub fn stand_still(&mut self, time: Duration) {
        self.note(time.as_nanos() as u64);
        self.set_time(self.now() + time);
    }

    /// Runs one thing on one core. False: nothing can ever run.
    pub fn step(&mut self) -> bool {
        let Some((index, work)) = self.choose() else { return self.advance() };
        self.note(index as u64 * 4 + work as u64);
        self.idle_polls = 0;
        let core = &self.cores[index];
        let entered = core::enter(core);
        match work {
            Work::Deferred => core.run_deferred(1),
            Work::Ready => core.run_ready(1),
            Work::Remote => core.run_remote(1),
            Work::Pollers => usize::from(core.run_pollers()),
        };
        drop(entered);
        let cost = 1 + self.rng.below(STEP_LIMIT_NS);
        self.set_time(self.now() + Duration::from_nanos(cost));
        true
    }

    /// A random core that has something to run, and a random choice of what. Now and then also one that only has
    /// pollers, so that a busy core elsewhere cannot starve them.
    fn choose(&mut self) -> Option<(usize, Work)> {
        if !self.cores.iter().any(Core::has_work) {
            return None;
        }
        let poll_too = self.rng.below(POLL_ONE_IN) == 0;
        let eligible = |core: &Core| core.has_work() || (poll_too && core.has_pollers());
        let count = self.cores.iter().filter(|core| eligible(core)).count() as u64;
        let pick = self.rng.below(count) as usize;
        let (index, _) = self.cores.iter().enumerate().filter(|(_, core)| eligible(core)).nth(pick)?;
        let core = &self.cores[index];
        let choices = [
            (core.has_deferred(), Work::Deferred),
            (core.has_ready(), Work::Ready),
            (core.has_remote(), Work::Remote),
            (core.has_pollers(), Work::Pollers),
        ];
        let count = choices.iter().filter(|(there, _)| *there).count() as u64;
        let pick = self.rng.below(count) as usize;
        let (_, work) = *choices.iter().filter(|(there, _)| *there).nth(pick)?;
        Some((index, work))
    }

    /// Nothing is runnable: polls all pollers, then lets time pass.
    fn advance(&mut self) -> bool {
        let mut order: Vec<usize> = (0..self.cores.len()).collect();
        for last in (1..order.len()).rev() {
            order.swap(last, self.rng.below(last as u64 + 1) as usize);
        }
        let (mut worked, mut keep_polling) = (false, false);
        for &index in &order {
            let core = &self.cores[index];
            let _entered = core::enter(core);
            worked |= core.run_pollers();
            keep_polling |= !core.may_sleep();
        }
        if worked || self.cores.iter().any(Core::has_work) {
            self.idle_polls = 0;
            self.note(u64::MAX);
            self.set_time(self.now() + Duration::from_nanos(1));
            return true;
        }
        let timer = self.cores.iter().filter_map(Core::next_timer).min();
        let poll_again = keep_polling.then(|| self.now() + Duration::from_nanos(POLL_STEP_NS));
        let next = match (timer, poll_again) {
            (Some(timer), Some(poll)) => timer.min(poll),
            (Some(timer), None) => timer,
            (None, Some(poll)) => {
                self.idle_polls += 1;
                if self.idle_polls > MAX_IDLE_POLLS {
                    return false;
                }
                poll
            }
            (None, None) => return false,
        };
        self.note(next.0);
        self.set_time(next);
        true
    }

    fn set_time(&mut self, now: Nanos) {
        self.now.set(self.now().max(now));
        for core in &self.cores {
            if core.next_timer().is_some_and(|at| at <= now) {
                let _entered = core::enter(core);
                core.fire_timers(now);
            }
        }
    }

    fn note(&mut self, decision: u64) {
        self.steps += 1;
        self.trace = (self.trace ^ decision).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("simulation seed: {} ({} steps, {:?})", self.seed, self.steps, self.now());
        }
        for core in &self.cores {
            core.shared.closing.store(true, Ordering::SeqCst);
        }
        // Dropping on one core may wake or send to another.
        let mut left = true;
        while left {
            left = false;
            for core in &self.cores {
                let _entered = core::enter(core);
                left |= core.drop_everything();
            }
        }
        for core in &self.cores {
            core.shared.closed.store(true, Ordering::SeqCst);
        }
    }
}
