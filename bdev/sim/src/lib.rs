//! A simulated disk that can lose power, and what proves that a stack on top of it survives that.
//!
//! - [`SimDisk`]: content in RAM, a volatile write cache with exact flush and FUA semantics, drawn latencies (so
//!   completions are reordered), faults by schedule, and a record of every write and flush from which the surface of the
//!   disk after a power cut at any point can be made ([`Record::image`]).
//! - [`History`]: every write, flush and their completions per block, and from them the verdict on what is read: while
//!   running and after a power cut.
//! - [`content`]: blocks of data that tell where they belong.
//! - [`harness`]: random workloads on a [`harness::Stack`] in the reactor's simulator, power cuts (also during recovery),
//!   verification; random seeds in parallel or every crash point of one recorded run.
//!
//! Nothing here depends on the machine: a run is a function of its seed.

pub mod content;
mod crash;
mod disk;
mod fault;
pub mod harness;
mod history;
mod image;
mod rng;

pub use crash::{Record, Survivors, Tear};
pub use disk::{DiskOptions, SimDisk};
pub use fault::{Effect, Fault, When};
pub use history::{History, VolumeId, WriteId, fingerprint};
pub use image::{Image, SECTOR_BYTES};
pub use rng::Rng;
