//! Parameters of control requests, with SPDK's names and defaults.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use uuid::Uuid;

use crate::TargetError;
use crate::budget::Limits;

/// Parameters of `nvmf_create_transport`. Only TCP exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportOptions {
    /// Entries of an I/O queue, 2..=4096.
    pub max_queue_depth: u16,
    /// I/O queues of a controller, 1..=65,534.
    pub max_io_qpairs_per_ctrlr: u16,
    /// Bytes of data in a command capsule of an I/O queue: a multiple of 16 up to `max_io_size`.
    pub in_capsule_data_size: u32,
    /// Largest transfer of a command, bytes: a power of two, 8 KiB to 16 MiB. Also MAXH2CDATA.
    pub max_io_size: u32,
    /// Unit of buffers, bytes; shown as given: here a transfer always has one buffer.
    pub io_unit_size: u32,
    /// Entries of an Admin Queue, 32..=4096.
    pub max_aq_depth: u16,
    /// Shown as given: buffers come from the process's arena.
    pub num_shared_buffers: u32,
    /// Shown as given: the arena has a cache per core.
    pub buf_cache_size: u32,
    /// Protection information inserted by the target; must be false.
    pub dif_insert_or_strip: bool,
    /// Shown as given: there is nothing but zero copy where the device lends buffers.
    pub zcopy: bool,
    /// Let the last C2HData stand for the completion where the host allows it.
    pub c2h_success: bool,
    /// SO_PRIORITY of connections; 0 leaves the system's.
    pub sock_priority: u32,
    /// Time after which unacknowledged data ends a connection (TCP_USER_TIMEOUT), ms; 0 leaves the system's.
    pub ack_timeout: u32,
    /// How long Abort waits to see whether a command that a device promised to end did end so, s; 0 does not wait.
    pub abort_timeout_sec: u32,
    /// Granularity of keep-alive timers, units of 100 ms (KAS).
    pub kas: u16,
    /// Shortest keep-alive timer, ms; shorter ones are raised to it.
    pub min_kato: u32,
    /// Time in which ICReq and Connect have to come, ms. (Ours.)
    pub connect_timeout_ms: u32,
    /// Time in which a host has to authenticate, where it has to, ms. (Ours.)
    pub auth_timeout_ms: u32,
    /// Time in which a host has to send data that it was asked for or began or the other half of a fused operation, and to take some
    /// of what it is sent, ms. (Ours.)
    pub r2t_timeout_ms: u32,
    /// Connections of all hosts, 1 or more. (Ours.)
    pub max_connections: u32,
    /// Connections of one host, 1 or more. (Ours.)
    pub max_connections_per_host: u32,
    /// Memory for the data of all hosts' commands, MiB, 1 or more. (Ours.)
    pub max_buffer_mib: u32,
    /// Memory for the data of one host's commands, MiB, 1 or more. (Ours.)
    pub max_buffer_mib_per_host: u32,
}

impl Default for TransportOptions {
    fn default() -> Self {
        TransportOptions {
            max_queue_depth: 128,
            max_io_qpairs_per_ctrlr: 127,
            in_capsule_data_size: 4096,
            max_io_size: 131_072,
            io_unit_size: 131_072,
            max_aq_depth: 128,
            num_shared_buffers: 511,
            buf_cache_size: u32::MAX,
            dif_insert_or_strip: false,
            zcopy: false,
            c2h_success: true,
            sock_priority: 0,
            ack_timeout: 0,
            abort_timeout_sec: 1,
            kas: 100,
            min_kato: 10_000,
            connect_timeout_ms: 10_000,
            auth_timeout_ms: 30_000,
            r2t_timeout_ms: 60_000,
            max_connections: 8192,
            max_connections_per_host: 1024,
            max_buffer_mib: 2048,
            max_buffer_mib_per_host: 512,
        }
    }
}

impl TransportOptions {
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            host_connections: self.max_connections_per_host,
            host_bytes: u64::from(self.max_buffer_mib_per_host) << 20,
            bytes: u64::from(self.max_buffer_mib) << 20,
        }
    }

    /// Checks the ranges named at the fields.
    ///
    /// # Errors
    /// [`TargetError::Invalid`], naming the parameter.
    pub fn check(&self) -> Result<(), TargetError> {
        let bad = |name, why: String| Err(TargetError::Invalid(name, why));
        if !(2..=4096).contains(&self.max_queue_depth) {
            return bad("max_queue_depth", format!("{} is not within 2 to 4096", self.max_queue_depth));
        }
        if !(32..=4096).contains(&self.max_aq_depth) {
            return bad("max_aq_depth", format!("{} is not within 32 to 4096", self.max_aq_depth));
        }
        if !(1..=65_534).contains(&self.max_io_qpairs_per_ctrlr) {
            return bad("max_io_qpairs_per_ctrlr", "must be within 1 to 65534".into());
        }
        if !self.max_io_size.is_power_of_two() || !(8192..=16 << 20).contains(&self.max_io_size) {
            let why = format!("{} is not a power of two within 8192 to 16777216", self.max_io_size);
            return bad("max_io_size", why);
        }
        if !self.in_capsule_data_size.is_multiple_of(16) || self.in_capsule_data_size > self.max_io_size {
            let why = format!("{} is not a multiple of 16 up to max_io_size", self.in_capsule_data_size);
            return bad("in_capsule_data_size", why);
        }
        if self.dif_insert_or_strip {
            return bad("dif_insert_or_strip", "protection information is not supported".into());
        }
        for (name, limit) in [
            ("max_connections", self.max_connections),
            ("max_connections_per_host", self.max_connections_per_host),
            ("max_buffer_mib", self.max_buffer_mib),
            ("max_buffer_mib_per_host", self.max_buffer_mib_per_host),
        ] {
            if limit == 0 {
                return bad(name, "must not be 0".into());
            }
        }
        if self.kas == 0 {
            return bad("kas", "must not be 0".into());
        }
        Ok(())
    }
}

/// Parameters of `nvmf_create_subsystem`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubsystemOptions {
    /// Name.
    pub nqn: String,
    /// Serial number, up to 20 printable ASCII characters.
    pub serial_number: String,
    /// Model number, up to 40 printable ASCII characters.
    pub model_number: String,
    /// Any host may connect.
    pub allow_any_host: bool,
    /// Report asymmetric namespace access.
    pub ana_reporting: bool,
    /// Namespace identifiers are 1 to this; 0 means 32.
    pub max_namespaces: u32,
    /// Smallest controller identifier.
    pub min_cntlid: u16,
    /// Largest controller identifier, up to 65,519.
    pub max_cntlid: u16,
}

impl SubsystemOptions {
    /// SPDK's defaults under this name.
    pub fn new(nqn: impl Into<String>) -> Self {
        SubsystemOptions {
            nqn: nqn.into(),
            serial_number: "00000000000000000000".into(),
            model_number: "cryptfold bdev Controller".into(),
            allow_any_host: false,
            ana_reporting: false,
            max_namespaces: 32,
            min_cntlid: 1,
            max_cntlid: 0xffef,
        }
    }
}

/// Parameters of `nvmf_subsystem_add_ns`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NsOptions {
    /// The device: name, alias or UUID.
    pub bdev_name: String,
    /// Identifier; the lowest free one if absent.
    pub nsid: Option<u32>,
    /// 128-bit globally unique identifier; the UUID if absent.
    pub nguid: Option<[u8; 16]>,
    /// 64-bit extended unique identifier.
    pub eui64: Option<[u8; 8]>,
    /// The device's own if absent.
    pub uuid: Option<Uuid>,
    /// ANA group; the namespace identifier if absent.
    pub anagrpid: Option<u32>,
    /// File for what of the namespace outlives a power loss: reservations and write protection. Without one hosts can not
    /// make these persist.
    pub ptpl_file: Option<String>,
    /// No host sees it until `nvmf_ns_add_host` names one.
    pub no_auto_visible: bool,
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenAddr {
    /// Address.
    pub ip: IpAddr,
    /// TCP port (`trsvcid`); 0 in a request picks a free one.
    pub port: u16,
}

impl ListenAddr {
    /// From SPDK's `trtype`, `adrfam`, `traddr` and `trsvcid`.
    ///
    /// # Errors
    /// Not TCP, no IP address, the wrong family, or no port number.
    pub fn parse(
        trtype: &str,
        adrfam: Option<&str>,
        traddr: &str,
        trsvcid: &str,
    ) -> Result<Self, TargetError> {
        if !trtype.eq_ignore_ascii_case("tcp") {
            return Err(TargetError::NoTransport(trtype.into()));
        }
        let bare = traddr.trim_start_matches('[').trim_end_matches(']');
        let ip: IpAddr = bare
            .parse()
            .map_err(|_| TargetError::Invalid("traddr", format!("\"{traddr}\" is no IP address")))?;
        let family = if ip.is_ipv4() { "ipv4" } else { "ipv6" };
        if adrfam.is_some_and(|f| !f.eq_ignore_ascii_case(family)) {
            let why = format!("\"{traddr}\" is an {family} address");
            return Err(TargetError::Invalid("adrfam", why));
        }
        let port = trsvcid
            .parse()
            .map_err(|_| TargetError::Invalid("trsvcid", format!("\"{trsvcid}\" is no port number")))?;
        Ok(ListenAddr { ip, port })
    }

    /// "IPv4" or "IPv6".
    pub const fn adrfam(&self) -> &'static str {
        if self.ip.is_ipv4() { "IPv4" } else { "IPv6" }
    }

    /// For the operating system.
    pub const fn socket_addr(&self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }
}

impl From<SocketAddr> for ListenAddr {
    fn from(a: SocketAddr) -> Self {
        ListenAddr { ip: a.ip().to_canonical(), port: a.port() }
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.socket_addr().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let a = ListenAddr::parse("TCP", Some("IPv4"), "127.0.0.1", "4420").expect("valid");
        assert_eq!((a.to_string().as_str(), a.adrfam()), ("127.0.0.1:4420", "IPv4"));
        let a = ListenAddr::parse("tcp", None, "::1", "0").expect("valid");
        assert_eq!((a.to_string().as_str(), a.adrfam()), ("[::1]:0", "IPv6"));
        let cases = [
            ("RDMA", None, "127.0.0.1", "4420"),
            ("TCP", Some("IPv6"), "127.0.0.1", "4420"),
            ("TCP", None, "localhost", "4420"),
            ("TCP", None, "127.0.0.1", "65536"),
            ("TCP", None, "127.0.0.1", ""),
        ];
        for (t, f, a, s) in cases {
            let e = ListenAddr::parse(t, f, a, s).expect_err("refused");
            assert_eq!(e.code(), -32602, "{e}");
        }
    }

    #[test]
    fn defaults_are_legal_and_limits_hold() {
        assert_eq!(TransportOptions::default().check(), Ok(()));
        let with = |f: fn(&mut TransportOptions)| {
            let mut o = TransportOptions::default();
            f(&mut o);
            o.check().expect_err("refused").to_string()
        };
        assert!(with(|o| o.max_io_size = 100_000).contains("max_io_size"));
        assert!(with(|o| o.max_queue_depth = 1).contains("max_queue_depth"));
        assert!(with(|o| o.in_capsule_data_size = 4100).contains("in_capsule_data_size"));
        assert!(with(|o| o.max_aq_depth = 31).contains("max_aq_depth"));
    }
}
