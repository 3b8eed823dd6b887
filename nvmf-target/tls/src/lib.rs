//! TLS 1.3 with pre-shared keys for the byte streams of NVMe/TCP, for both sides (NVMe/TCP Transport 1.0 section 3.6).
//!
//! `session` owns a connection of s2n-tls and what is between it and a non-blocking stream; `hello` finds the identities in a
//! ClientHello; `socket` is the kernel's record layer on a TCP socket, which gets the keys after the handshake where it is to be had.
//! Keys and identities themselves are `nvmf-auth`'s (`psk`).
//!
//! What is negotiated: TLS 1.3 and nothing older, PSK with (EC)DHE, AES-GCM with the hash that belongs to the key. No
//! certificates, no early data, no resumption.
//!
//! Invariants: nothing here blocks; keys are zeroed by their owners (s2n-tls wipes its copies); after an error a session only
//! says good-bye. `session::pipe` and `socket` are the only places of `unsafe` code.

mod hello;
mod session;
mod socket;

pub use hello::identities;
pub use session::{Direction, Keys, Layer, Offload, Raw, RecordKeys, Session, TlsError, require_approved};
pub use socket::load_kernel_tls;
