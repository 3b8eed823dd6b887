//! The load generator: keeps a number of I/Os going on each core and measures what comes back.
//!
//! It does not know what it loads. A *sink* takes `Box<Io>` on a reactor: a channel of a block device, or a queue of
//! our NVMe/TCP initiator. A worker (one per job) owns `iodepth` I/Os that go down, come back to
//! [`cryptfold_bdev::Complete::complete`] and go down again: nothing is allocated per I/O, and one look at the clock
//! ends one I/O and begins the next.

mod data;
mod options;
mod pattern;
mod readback;
mod result;
mod run;
mod stamp;
mod worker;

pub(crate) use data::block as sample_block;
pub use data::{DataSource, Generator};
pub use options::{Bytes, Cores, LoadArgs, Rw};
pub(crate) use pattern::Rng;
pub use readback::read_back;
pub use result::{Latency, LoadResult};
pub use run::{Geometry, Opener, plans, run};
pub use stamp::{Mismatch, Stamper};
pub use worker::{Plan, Sink, WorkerReport, run_worker};
