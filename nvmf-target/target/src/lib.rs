//! The NVMe/TCP target: transport, queues, controllers, subsystems, discovery. It knows the wire (`nvmf-spec`) and the
//! block device contract (`bdev/core`), and no single device.
//!
//! ```text
//!   Target (control threads) ---- Subsystem ---- Namespace -> Descriptor of a block device
//!                                     |
//!                                 Controller (shared by the reactors of its queues)
//!                                     |
//!   reactor: Group ---- Conn (one stream, one queue, its command slots) ---- NsChannel -> Channel of the device
//!               |         |
//!            Watches    Wire (TCP, with or without TLS, or memory in simulations)
//! ```
//!
//! One connection belongs to one reactor, from accept to close, and everything one command needs happens there. What
//! queues of a controller share is behind a mutex that I/O commands do not take.
//!
//! Sources: NVM Express Base Specification 2.0, NVM Command Set Specification 1.0, NVMe/TCP Transport Specification 1.0.
//! Units: bytes unless a name says otherwise.

mod access;
mod arrival;
pub mod audit;
mod budget;
mod conn;
mod controller;
mod door;
mod error;
mod generated;
mod group;
mod info;
mod io;
mod later;
mod options;
mod port;
mod reservation;
mod stats;
mod subsystem;
mod sys;
mod target;
mod tls;
mod watch;
pub mod wire;

pub use access::{HostAccess, Named};
pub use arrival::Arrival;
pub use controller::{Controller, Host};
pub use cryptfold_nvmf_spec::log::AnaState;
pub use cryptfold_nvmf_tls::Layer;
pub use error::TargetError;
pub use info::{
    CLAIM, ControllerInfo, DiscoveryFilter, DoorInfo, HostInfo, ListenerInfo, NsInfo, PollGroupStats,
    QpairInfo, Referral, SubsystemInfo, TlsUse,
};
pub use options::{ListenAddr, NsOptions, SubsystemOptions, TransportOptions};
pub use port::PortSecurity;
pub use stats::Totals;
pub use subsystem::Namespace;
pub use target::Target;
