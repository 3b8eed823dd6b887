//! The control plane: JSON-RPC over a Unix socket, SPDK's methods and configuration files, keys by reference.
//!
//! ```text
//!   bytes -> jsonrpc::Framer -> jsonrpc::answer -> Control::call -> table::Table -> methods::* -> registry, pools, target
//!   file  -> config::Config ------------------------^
//! ```
//!
//! Everything here runs on ordinary threads and may block; reactors are reached by message. `jsonrpc`, `params`,
//! `table` and the parser of `config` do no I/O.

pub mod access;
pub mod audit;
mod caller;
pub mod certificate;
pub mod client;
pub mod config;
mod control;
mod deferred;
mod events;
pub mod fips;
pub mod jsonrpc;
pub mod keyring;
pub mod keys;
pub mod kms;
pub mod logging;
mod luks;
mod methods;
pub mod offline;
mod options;
mod overview;
pub mod params;
mod peer;
mod pools;
mod refusals;
mod roles;
pub mod server;
pub mod table;
mod watch;

pub use control::{Control, ControlConfig, Signal};
