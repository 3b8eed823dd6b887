//! The block device contract: what a device is ([`Device`]), how I/O moves through a stack of them ([`Io`], [`Queue`],
//! [`Complete`]), how they are named, opened, claimed and removed ([`Registry`]), and what every device gets for free
//! in front of its queue ([`Channel`]): checks, statistics, rate limits, range locks, emulated operations.
//!
//! ```text
//!   submitter (nvmf queue, perf, a layer above)
//!       |  Channel::submit(Box<Io>)            one Channel per core and descriptor
//!       v
//!   [checks] -> [rate limits] -> [range locks] -> [statistics]
//!       |  Queue::submit(Box<Io>)              one Queue per Channel, made by Device::open_queue
//!       v
//!   device ... Io::finish(status)  ->  reactor  ->  frames popped, layer by layer, up to the submitter
//! ```
//!
//! A layer on top of another device opens it with [`Registry::open`], claims it, and in its queue holds a [`Channel`]
//! of the base. Control calls (create, open, remove) come from ordinary threads and may block; queues and channels
//! live on reactors and may not.

mod channel;
mod device;
mod emulate;
mod error;
mod io;
mod latency;
mod locks;
mod qos;
mod registry;
mod stacked;
mod stats;
mod status;
pub mod trace;

pub use channel::{Channel, IoFuture};
pub use device::{AsAny, Device, DeviceInfo, LOW_PERCENT, Queue, Room, Space};
pub use error::BdevError;
pub use io::{BlockRange, BlockRanges, Complete, Frame, Io, Op, OpSet};
pub use latency::{BORDERS, LatencyCounts, borders_s};
pub use qos::QosLimits;
pub use registry::{Access, Bdev, BdevEvent, Descriptor, Registry, Removal};
pub use stacked::{Base, OnResize};
pub use stats::{BdevStats, Class, ClassTotals};
pub use status::Status;
