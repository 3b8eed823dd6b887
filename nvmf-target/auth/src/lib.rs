//! Who is there: DH-HMAC-CHAP for both sides. No I/O, no clock, no source of randomness.
//!
//! `secret` owns the format in which secrets are handed around (`DHHC-1:...`), `dh` the Diffie-Hellman groups, `chap` the
//! two state machines. Messages are those of `nvmf-spec`.
//!
//! Invariants: key bytes are zeroed when dropped and printed by nothing; responses are compared in constant time; one
//! failure ends a machine for good.

pub mod chap;
pub mod dh;
mod mac;
pub mod secret;

pub use chap::{Controller, Entropy, Host, HostNext, Names, Offer, Progress};
pub use cryptfold_nvmf_spec::auth::{DhGroup, Failure, HashId};
pub use secret::{Secret, SecretError};
