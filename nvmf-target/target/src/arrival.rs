//! Queues whose hosts have just connected, for who has to know before they do anything.

use crate::controller::Controller;

/// A queue that may be used from now on: its host has connected, and authenticated where it has to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The subsystem's NQN.
    pub subsystem: String,
    /// The host's NQN.
    pub host: String,
    /// Address of the host's end.
    pub peer: String,
    /// It has authenticated (DH-HMAC-CHAP) or has the key of its TLS.
    pub proven: bool,
    /// Names of the devices that it sees as namespaces.
    pub bdevs: Vec<String>,
}

/// Is called on reactors: must not wait for one.
pub(crate) type OnArrival = Box<dyn Fn(&Arrival) + Send + Sync>;

impl Arrival {
    pub(crate) fn of(controller: &Controller, peer: &str, proven: bool) -> Arrival {
        let (host, subsystem) = (&controller.host.nqn, &controller.subsystem);
        Arrival {
            subsystem: subsystem.nqn().into(),
            host: host.clone(),
            peer: peer.into(),
            proven,
            bdevs: subsystem.namespaces(host).iter().map(|n| n.bdev().name().into()).collect(),
        }
    }
}
