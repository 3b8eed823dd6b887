//! A client of key servers that speak KMIP (Key Management Interoperability Protocol, OASIS, 1.2 to 1.4) over mutually
//! authenticated TLS.
//!
//! ```text
//!   Client (servers, fail-over, retries) -> session (one connection, time limits) -> TLS
//!      message (requests, responses, attributes; no I/O) -> ttlv (codec; no I/O)
//! ```
//!
//! Owns: the wire format, the choice of a protocol version per server, the choice of a server. Blocks: it belongs on
//! ordinary threads.
//!
//! Invariants:
//! - Every byte string of a message is a [`Secret`]: zeroed when dropped, never in debug output or in an error. What the
//!   TLS library holds while a message passes through it is the library's.
//! - Nothing is allocated for a length that was not checked against a limit first.
//! - What only reads is tried again and on other servers. What changes something is sent once; when no answer comes, the
//!   error says that the outcome is unknown.
//!
//! Units: sizes in bytes, key lengths in bits where KMIP counts them so (the names say which).

mod client;
pub mod message;
mod session;
pub mod ttlv;

pub use client::{Client, ClientConfig, Identity, IdentityError, KmipError, ServerAddress, require_approved};
pub use message::{
    Attributes, Filter, KeyObject, NewObject, ObjectType, Operation, Reason, Refusal, RevocationReason,
    State, Version,
};
pub use session::{Connect, SessionError, Stream};
pub use ttlv::Secret;
