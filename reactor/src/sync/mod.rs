//! Synchronisation between tasks of one core: no atomics, not `Send`. Waiters are served first come, first served, and a
//! waiter that is dropped leaves its place (and hands on what it was granted).

pub mod mpsc;
mod mutex;
mod notify;
pub mod oneshot;
mod semaphore;
mod wait_list;

pub use mutex::{Mutex, MutexGuard};
pub use notify::{Event, Notify};
pub use semaphore::{Permit, Semaphore};
