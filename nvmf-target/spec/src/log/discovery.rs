//! Discovery log page (NVMe Base 2.0 section 5.16.1.23).

use zerocopy::little_endian::{U16, U64};

use crate::ids::Cntlid;
use crate::nqn::Nqn;
use crate::opcode::opcodes;
use crate::wire::wire;

opcodes! {
    /// TRTYPE: transport type.
    TransportType {
        /// RDMA.
        Rdma = 1,
        /// Fibre Channel.
        FibreChannel = 2,
        /// TCP.
        Tcp = 3,
        /// Within one host.
        Loop = 254,
    }
}

opcodes! {
    /// ADRFAM: address family.
    AddressFamily {
        /// AF_INET.
        Ipv4 = 1,
        /// AF_INET6.
        Ipv6 = 2,
        /// InfiniBand.
        Ib = 3,
        /// Fibre Channel.
        FibreChannel = 4,
        /// Within one host.
        Loop = 254,
    }
}

opcodes! {
    /// SUBTYPE: what an entry leads to.
    SubsystemType {
        /// Another discovery service.
        Referral = 1,
        /// A subsystem with namespaces.
        Nvm = 2,
        /// This discovery subsystem.
        CurrentDiscovery = 3,
    }
}

/// TREQ bits: transport requirements.
pub mod treq {
    /// Bits 1:0: a secure channel is required.
    pub const SECURE_REQUIRED: u8 = 1;
    /// Bits 1:0: a secure channel is not required.
    pub const SECURE_NOT_REQUIRED: u8 = 2;
    /// The controller can disable SQ flow control.
    pub const DISABLE_SQ_FLOW_CONTROL: u8 = 1 << 2;
}

/// EFLAGS bits.
pub mod eflags {
    /// Other ports of this discovery subsystem return the same information.
    pub const DUPLICATE: u16 = 1 << 0;
    /// Explicit persistent connections supported.
    pub const PERSISTENT: u16 = 1 << 1;
}

/// SECTYPE, TSAS byte 0 of a TCP entry (NVMe/TCP 1.0 section 3.1).
pub mod sectype {
    /// No TLS.
    pub const NONE: u8 = 0;
    /// TLS 1.2.
    pub const TLS12: u8 = 1;
    /// TLS 1.3.
    pub const TLS13: u8 = 2;
}

wire! {
    /// Header of the page; `numrec` entries follow.
    pub struct DiscoveryHeader: 1024 {
        /// GENCTR: changes whenever the page does.
        0 => pub genctr: U64,
        /// NUMREC: entries.
        8 => pub numrec: U64,
        /// RECFMT: 0.
        16 => pub recfmt: U16,
        18 => _rsvd18: [u8; 1006],
    }
}

wire! {
    /// Discovery Log Page Entry.
    pub struct DiscoveryEntry: 1024 {
        /// TRTYPE, a [`TransportType`].
        0 => pub trtype: u8,
        /// ADRFAM, an [`AddressFamily`].
        1 => pub adrfam: u8,
        /// SUBTYPE, a [`SubsystemType`].
        2 => pub subtype: u8,
        /// TREQ, see [`treq`].
        3 => pub treq: u8,
        /// PORTID: port of the subsystem.
        4 => pub portid: U16,
        /// CNTLID: FFFFh for the dynamic controller model.
        6 => pub cntlid: U16,
        /// ASQSZ: entries of an admin queue at most; at least 32.
        8 => pub asqsz: U16,
        /// EFLAGS, see [`eflags`].
        10 => pub eflags: U16,
        12 => _rsvd12: [u8; 20],
        /// TRSVCID: service, for TCP the decimal port; padded with spaces.
        32 => pub trsvcid: [u8; 32],
        64 => _rsvd64: [u8; 192],
        /// SUBNQN, NUL terminated.
        256 => pub subnqn: [u8; 256],
        /// TRADDR: address, for TCP a textual IP address; padded with spaces.
        512 => pub traddr: [u8; 256],
        /// TSAS: for TCP, byte 0 is [`sectype`].
        768 => pub tsas: [u8; 256],
    }
}

/// Text of a TRADDR or TRSVCID field: ASCII up to the padding of NULs or spaces.
fn trimmed(field: &[u8]) -> Option<&str> {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    core::str::from_utf8(&field[..end]).ok().filter(|t| t.is_ascii()).map(|t| t.trim_end_matches(' '))
}

fn padded<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut field = [b' '; N];
    let printable = text.bytes().all(|b| (b'!'..=b'~').contains(&b));
    field.get_mut(..text.len()).filter(|_| printable)?.copy_from_slice(text.as_bytes());
    Some(field)
}

impl DiscoveryEntry {
    /// A TCP entry of the dynamic controller model. `None` if an address or service is too long or not
    /// printable ASCII.
    pub fn tcp(
        subtype: SubsystemType,
        family: AddressFamily,
        traddr: &str,
        trsvcid: &str,
        portid: u16,
        subnqn: Nqn<'_>,
    ) -> Option<Self> {
        let mut entry = Self {
            trtype: TransportType::Tcp as u8,
            adrfam: family as u8,
            subtype: subtype as u8,
            treq: treq::SECURE_NOT_REQUIRED,
            portid: U16::new(portid),
            cntlid: U16::new(Cntlid::DYNAMIC.0),
            asqsz: U16::new(32),
            trsvcid: padded(trsvcid)?,
            subnqn: subnqn.to_field(),
            traddr: padded(traddr)?,
            ..Default::default()
        };
        entry.tsas[0] = sectype::NONE;
        Some(entry)
    }

    /// TRADDR without padding; `None` if it is not ASCII.
    pub fn traddr(&self) -> Option<&str> {
        trimmed(&self.traddr)
    }

    /// TRSVCID without padding; `None` if it is not ASCII.
    pub fn trsvcid(&self) -> Option<&str> {
        trimmed(&self.trsvcid)
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    #[test]
    fn golden_entry() {
        let nqn = Nqn::parse("nqn.2016-06.io.spdk:cnode1").expect("legal");
        let entry = |addr: &str, port: &str| {
            DiscoveryEntry::tcp(SubsystemType::Nvm, AddressFamily::Ipv4, addr, port, 1, nqn)
        };
        let e = entry("192.168.0.1", "4420").expect("it fits");
        let b = e.as_bytes();
        assert_eq!(b[..12], [3, 1, 2, 2, 1, 0, 0xff, 0xff, 32, 0, 0, 0]);
        assert_eq!(&b[32..38], b"4420  ");
        assert_eq!(&b[512..525], b"192.168.0.1  ");
        assert_eq!(&b[256..283], b"nqn.2016-06.io.spdk:cnode1\0");
        assert!(b[64..256].iter().chain(&b[768..]).all(|b| *b == 0));
        assert_eq!((e.traddr(), e.trsvcid()), (Some("192.168.0.1"), Some("4420")));
        assert_eq!(entry(&"1".repeat(257), "4420"), None);
        assert_eq!(entry("::1", &"1".repeat(33)), None);
        assert_eq!(entry("a b", "4420"), None);
        assert_eq!(DiscoveryEntry { traddr: [0xff; 256], ..e }.traddr(), None);
        assert_eq!(
            DiscoveryEntry { trsvcid: *b"4420\0xxxxxxxxxxxxxxxxxxxxxxxxxxx", ..e }.trsvcid(),
            Some("4420")
        );
    }
}
