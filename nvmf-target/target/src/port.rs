//! A listening address, shared by the subsystems that listen there.

use crate::ListenAddr;

/// A port of the target: an address where connections come from.
pub struct Port {
    /// Number in the discovery log and in ANA; unique in the target.
    pub id: u16,
    /// Address, with the port number that the system chose if 0 was asked for.
    pub addr: ListenAddr,
    /// Only TLS is spoken there.
    pub secure: bool,
}
