//! The audit log: who was turned away, and why. Events of the tracing target [`TARGET`] with the fields `event`, `peer`,
//! `hostnqn`, `subnqn`, `method` and `reason`. No key material; names are what hosts sent, and sinks escape them.

/// Target of the events.
pub const TARGET: &str = "cryptfold_audit";

/// A host was turned away. `method`: what it failed at ("host list", "dh-hmac-chap", "tls").
pub(crate) fn refused(peer: &str, hostnqn: &str, subnqn: &str, method: &str, reason: &str) {
    tracing::warn!(target: TARGET, event = "access refused", peer, hostnqn, subnqn, method, reason);
}
