//! A listening address, shared by the subsystems that listen there.

use crate::ListenAddr;

/// What of TLS is spoken at a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PortSecurity {
    /// Nothing.
    #[default]
    None,
    /// Nothing else: hosts need a key (`psk`).
    Tls,
    /// A host without a key authenticates first, without TLS, and comes back with TLS by the key that this has generated
    /// (secure channel concatenation). Without TLS there is no I/O. Hosts with a key (`psk`) come with TLS at once.
    Concatenation,
}

impl PortSecurity {
    /// For people: what the port is used.
    pub const fn name(self) -> &'static str {
        match self {
            PortSecurity::None => "without TLS",
            PortSecurity::Tls => "for TLS only",
            PortSecurity::Concatenation => "for secure channel concatenation",
        }
    }
}

/// A port of the target: an address where connections come from.
pub struct Port {
    /// Number in the discovery log and in ANA; unique in the target.
    pub id: u16,
    /// Address, with the port number that the system chose if 0 was asked for.
    pub addr: ListenAddr,
    /// TLS there.
    pub security: PortSecurity,
}
