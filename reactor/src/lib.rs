//! The reactor: one pinned thread per core that runs futures, pollers, timers and cross-core messages to completion, with
//! its io_uring, its buffer pools and its clock; and the same interfaces in a seeded, single-threaded simulator.
//!
//! Code of the upper rooms calls the functions of this module. They act on the reactor that runs the calling thread
//! ([`thread`](Runtime)) or on the virtual core that the simulator is stepping ([`sim`]), so the same code runs on both.
//!
//! Map: `core` holds the scheduler's state and knows no operating system; `thread` and `sim` drive it; `ring` is the
//! io_uring of a thread; [`memory`] the buffers; [`sync`] helpers for tasks of one core.
//!
//! Rules on a reactor: run to completion, no blocking calls, no locks. Slow work belongs on ordinary threads, which talk to
//! a reactor through its [`Handle`].

mod clock;
mod context;
mod core;
mod handle;
pub mod memory;
mod random;
mod reply;
pub mod ring;
pub mod sim;
pub mod sync;
mod thread;
mod timer;

pub use async_task::Task;
pub use clock::Nanos;
pub use context::{
    Elapsed, Sleep, YieldNow, current, defer, fill_random, now, random_u64, recent, register_poller, sleep,
    sleep_until, spawn_local, timeout, try_current, yield_now,
};
pub use core::{Deferred, Poller, PollerGuard, SleepVerdict};
pub use handle::{Handle, Message, PollerStats, ReactorGone, ReactorId, ReactorStats};
pub use memory::{Buf, MemoryConfig, SecretBytes, SgList};
pub use random::set_random_source;
pub use sim::Sim;
pub use thread::{IdlePolicy, Inline, Runtime, RuntimeConfig, StartError};
