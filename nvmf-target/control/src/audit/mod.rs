//! The audit log: one JSON object a line, each with the hash of the one before.
//!
//! ```text
//!   tracing event of the target `cryptfold_audit` -> layer::AuditLayer -(bounded channel)-> log::AuditLog's thread -> file
//!   file -> verify::Verifier -> `cryptfold audit verify | show`
//! ```
//!
//! `record` and `verify` do no I/O. Whoever has something to say never waits for the file: what does not fit into the
//! channel is counted, and the count is a record of its own.

mod layer;
mod log;
mod record;
mod verify;

pub use layer::AuditLayer;
pub use log::{AuditError, AuditLog};
pub use record::{Hash, Head, MAX_RECORD_BYTES, Record, RecordError};
pub use verify::{Flaw, Verifier};
