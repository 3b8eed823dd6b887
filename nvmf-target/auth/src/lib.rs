//! Who is there: DH-HMAC-CHAP for both sides, and the pre-shared keys of TLS. No I/O, no clock, no source of randomness.
//!
//! `interchange` owns the text form of all keys, `secret` those of DH-HMAC-CHAP (`DHHC-1:...`), `dh` the Diffie-Hellman groups, `chap` the
//! two state machines; messages are those of `nvmf-spec`. `psk` owns keys for TLS (`NVMeTLSkey-1:...`), their identities
//! and what is derived from them; the handshake is `nvmf-tls`'s.
//!
//! Invariants: key bytes are zeroed when dropped and printed by nothing; responses are compared in constant time; one
//! failure ends a machine for good.

pub mod chap;
pub mod dh;
mod interchange;
mod mac;
pub mod psk;
pub mod secret;

pub use chap::{Controller, Entropy, Host, HostNext, Names, Offer, Progress};
pub use cryptfold_nvmf_spec::auth::{Concat, DhGroup, Failure, HashId};
pub use psk::{Identity, Psk, PskError, TlsPsk, Version, expand_label};
pub use secret::{Secret, SecretError};

/// Whether this looks like the text of a secret or a key, which nobody writes down: the forms of [`Secret`] and [`Psk`].
pub fn is_key_text(text: &str) -> bool {
    let follows = |prefix| text.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(':'));
    follows(secret::PREFIX) || follows(psk::PREFIX)
}
