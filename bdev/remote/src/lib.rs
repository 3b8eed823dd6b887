//! Namespaces of other targets as block devices: our own initiator below a device per namespace (`NAMEn1`, as SPDK calls
//! them), with reconnecting and several paths.
//!
//! ```text
//!   Remotes ---- all controllers by name; attach, detach, reset (ordinary threads, may block)
//!     Remote ---- one name: its links, its namespaces (the devices)
//!       Link ---- one association at a time: a task on the link's home reactor connects, keeps the association, hears of
//!                 changes, connects again; what is true now is a snapshot that all cores read (Up)
//!     Local ---- a Remote on one reactor: an I/O connection per link, I/O that waits for a path
//!       RemoteQueue ---- a namespace's end on one core
//! ```
//!
//! Invariants:
//! - Only a link's task changes its association. Other cores tell it what they see by its [`signal`].
//! - An I/O that ends because its connection ended, or because its path is inaccessible, goes out again by another path, or
//!   waits for one as long as the time-outs allow. A fused compare-and-write does not: whether it happened is unknown.
//! - A namespace keeps its identity: one that comes back as something else under its number is another device.
//!
//! What a target had completed, not flushed, and lost when it died is lost, as with a drive that loses its power: nothing
//! here can tell, and the next flush succeeds.

mod error;
mod link;
mod local;
mod manager;
mod options;
mod remote;
mod signal;

pub use error::RemoteError;
pub use manager::{ControllerInfo, LinkInfo, PathFilter, Remotes};
pub use options::{AttachOptions, Multipath, Recovery};
