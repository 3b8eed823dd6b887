//! What the target tells control requests about itself: plain values, taken at one moment.

use std::fmt;
use std::time::Duration;

use cryptfold_nvmf_spec::auth::{DhGroup, HashId};
use cryptfold_nvmf_spec::log::AnaState;
use cryptfold_nvmf_tls::Layer;
use uuid::Uuid;

use crate::stats::Totals;
use crate::{ListenAddr, PortSecurity, SubsystemOptions};

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NsInfo {
    /// Identifier.
    pub nsid: u32,
    /// Name of the device.
    pub bdev_name: String,
    /// NGUID.
    pub nguid: [u8; 16],
    /// EUI64, zeros if there is none.
    pub eui64: [u8; 8],
    /// UUID.
    pub uuid: Uuid,
    /// ANA group.
    pub anagrpid: u32,
    /// File for reservations.
    pub ptpl_file: Option<String>,
    /// The hosts that see it; `None`: all that may connect.
    pub visible_to: Option<Vec<String>>,
}

/// A listener of a subsystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerInfo {
    /// Where.
    pub addr: ListenAddr,
    /// State of each ANA group, 1 to the number of namespaces at most.
    pub ana_states: Vec<(u32, AnaState)>,
    /// TLS there.
    pub security: PortSecurity,
}

/// A host of a subsystem's list, with the names of its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostInfo {
    /// Its NQN.
    pub nqn: String,
    /// DH-HMAC-CHAP secret of the host.
    pub dhchap_key: Option<String>,
    /// DH-HMAC-CHAP secret of the controller.
    pub dhchap_ctrlr_key: Option<String>,
    /// TLS key of the host.
    pub psk: Option<String>,
}

/// A subsystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubsystemInfo {
    /// As created; `allow_any_host` as it is now.
    pub options: SubsystemOptions,
    /// Whether it is the discovery subsystem.
    pub discovery: bool,
    /// Listeners, in the order they were added.
    pub listeners: Vec<ListenerInfo>,
    /// Hosts that may connect.
    pub hosts: Vec<HostInfo>,
    /// Namespaces, by identifier.
    pub namespaces: Vec<NsInfo>,
}

/// A controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerInfo {
    /// Identifier.
    pub cntlid: u16,
    /// Host's name.
    pub hostnqn: String,
    /// Host's identifier.
    pub hostid: Uuid,
    /// I/O queues that are connected.
    pub num_io_qpairs: u32,
    /// Keep-alive timer, ms.
    pub kato_ms: u32,
    /// Since the host's last sign of life that counts for this timer; none while there is no timer.
    pub keep_alive_age: Option<Duration>,
    /// Commands so far.
    pub totals: Totals,
}

/// A connected queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QpairInfo {
    /// Controller.
    pub cntlid: u16,
    /// Queue; 0 is the admin queue.
    pub qid: u16,
    /// Host's name.
    pub hostnqn: String,
    /// Where it came in.
    pub listen_address: ListenAddr,
    /// Host's address and port.
    pub peer_address: String,
    /// Entries.
    pub depth: u32,
    /// Number of its reactor.
    pub reactor: u32,
    /// Commands so far.
    pub totals: Totals,
    /// How the host was last authenticated on it, if it was.
    pub auth: Option<(HashId, DhGroup)>,
    /// `None` without TLS.
    pub tls: Option<TlsUse>,
}

/// How TLS is done on a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsUse {
    /// Cipher suite.
    pub cipher: String,
    /// Who makes the records that are sent.
    pub send: Layer,
    /// Who opens those that are received.
    pub receive: Layer,
}

/// By what a device of a namespace is claimed.
pub const CLAIM: &str = "NVMe-oF Target";

/// A reactor's share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PollGroupStats {
    /// Name of the group.
    pub name: String,
    /// Number of the reactor.
    pub reactor: u32,
    /// Admin queues so far.
    pub admin_qpairs: u64,
    /// I/O queues so far.
    pub io_qpairs: u64,
    /// Admin queues now.
    pub current_admin_qpairs: u64,
    /// I/O queues now.
    pub current_io_qpairs: u64,
    /// Commands completed so far.
    pub completed_nvme_io: u64,
}

/// How many connections there are, and what became of those that were too many (`max_connections`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DoorInfo {
    /// Now.
    pub connections: u32,
    /// Of these: of hosts that have not connected a queue, or have to authenticate and have not, or only ask what there is to be found.
    pub unauthenticated: u32,
    /// Such ones that made room for others so far.
    pub displaced: u64,
    /// Refused so far, because nobody could make room.
    pub refused: u64,
}

/// Another discovery service (or subsystem) that the discovery log names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Referral {
    /// Where.
    pub addr: ListenAddr,
    /// Its name: the well-known discovery NQN, or a unique one.
    pub subnqn: String,
    /// TLS is needed there.
    pub secure_channel: bool,
}

/// Which listeners the discovery log names to a host, by what they share with the one it asks through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiscoveryFilter {
    /// Same address.
    pub address: bool,
    /// Same port.
    pub svcid: bool,
}

impl DiscoveryFilter {
    /// From SPDK's `match_any` or a comma separated list of `transport`, `address`, `svcid`.
    pub fn parse(text: &str) -> Option<DiscoveryFilter> {
        let mut f = DiscoveryFilter::default();
        for part in text.split(',') {
            match part.trim() {
                // There is one kind of transport, so it is always the same.
                "match_any" | "transport" => {}
                "address" => f.address = true,
                "svcid" => f.svcid = true,
                _ => return None,
            }
        }
        Some(f)
    }
}

impl fmt::Display for DiscoveryFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.address, self.svcid) {
            (false, false) => "match_any",
            (true, false) => "address",
            (false, true) => "svcid",
            (true, true) => "address,svcid",
        })
    }
}
