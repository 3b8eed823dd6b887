//! An NVMe/TCP host (initiator) on reactors: connects to a controller, opens I/O queues on any core, and takes the same
//! [`cryptfold_bdev::Io`] boxes that block devices take.
//!
//! ```text
//!   Controller::connect ---- admin queue: Connect, enable, Identify, Set Features, Keep Alive, events
//!        | connector()  (an Arc: goes to other cores)
//!        v
//!   Connector::io_queue ---- one TCP connection on the current reactor
//!        | IoQueue::namespace
//!        v
//!   NamespaceQueue: cryptfold_bdev::Queue      Io -> command(s) -> slots -> Conn -> wire, and back
//! ```
//!
//! `conn` owns a connection: parser, slots, output. `slots` knows which command identifiers are in use, `output` what is
//! still to be sent, `wire` and `watch` the socket. Nothing is allocated per I/O in steady state, except buffers of reads
//! that bring none. What a target says is checked against what was asked; a violation ends the connection with a
//! termination request, never the process. A lost connection fails its I/O with a transient transport error;
//! reconnecting is the caller's decision.

mod auth;
mod conn;
mod controller;
mod dial;
mod discover;
mod error;
mod options;
mod output;
mod queue;
mod slots;
mod watch;
mod wire;

pub use auth::{Credentials, TlsKey};
pub use controller::{Connector, Controller, NamespaceInfo};
pub use dial::{Dial, TcpDial};
pub use discover::{DiscoveredSubsystem, discover};
pub use error::{CloseReason, Error};
pub use options::ConnectOptions;
pub use queue::{IoQueue, NamespaceQueue};
pub use wire::{TcpWire, TlsWire, Wire};

pub use cryptfold_nvmf_auth::{DhGroup, HashId, Offer, Psk, PskError, Secret, Version};
pub use cryptfold_nvmf_spec::features::AsyncEvent;
pub use cryptfold_nvmf_spec::log::AnaState;
pub use cryptfold_nvmf_tls::Layer;
