//! A simulated NVMe controller in the process, behind the same [`Bus`](crate::bus::Bus) as a drive. Its namespaces are
//! block devices of the registry, so that what is below them (a disk that loses power, a RAM disk) is below the driver too.
//!
//! It obeys the NVMe Base Specification 2.0 and the PCIe Transport 1.0: enable and reset with their time-outs, admin queue,
//! Identify, features, log pages, queues, abort, asynchronous events, doorbells and shadow doorbells, PRP and SGL, phase tags.
//! What a host does wrong (a tail beyond the queue, an address it was not shown, a queue that does not exist) is answered as the
//! specification says, and counted. And it fails as it is told to ([`Fault`]).
//!
//! It runs as tasks of the reactor's simulator (or of a single reactor): registers are only remembered when they are written,
//! so nothing happens inside of the driver's stack frame, and a run is a function of its seed.

mod admin;
mod device;
mod fault;
mod io;
mod queue;

pub use device::{SimController, SimNamespace, SimOptions};
pub use fault::Fault;
