//! Identify Controller (CNS 01h) and the NVM command set's part of it (CNS 06h).

use zerocopy::little_endian::{U16, U32, U64, U128};

use crate::ids::Cntlid;
use crate::nqn::Nqn;
use crate::property::Vs;
use crate::wire::wire;

/// ASCII text, left justified and padded with spaces.
pub type Text<const N: usize> = [u8; N];

/// Writes `text` left justified and padded with spaces; what is not printable ASCII becomes `?`, what does not
/// fit is cut.
pub fn set_text<const N: usize>(field: &mut Text<N>, text: &str) {
    field.fill(b' ');
    for (to, from) in field.iter_mut().zip(text.chars()) {
        *to = if matches!(from, ' '..='~') { from as u8 } else { b'?' };
    }
}

/// CNTRLTYPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ControllerType {
    /// I/O controller.
    Io = 1,
    /// Discovery controller.
    Discovery = 2,
    /// Administrative controller.
    Admin = 3,
}

/// CMIC bits (byte 76).
pub mod cmic {
    /// The subsystem may have several ports.
    pub const MULTI_PORT: u8 = 1 << 0;
    /// The subsystem may have several controllers.
    pub const MULTI_CONTROLLER: u8 = 1 << 1;
    /// The controller is of an SR-IOV virtual function.
    pub const VIRTUAL_FUNCTION: u8 = 1 << 2;
    /// Asymmetric Namespace Access reporting.
    pub const ANA: u8 = 1 << 3;
}

/// OAES bits (bytes 92 to 95): optional asynchronous events.
pub mod oaes {
    /// Namespace Attribute Notices.
    pub const NAMESPACE_ATTRIBUTES: u32 = 1 << 8;
    /// Firmware Activation Notices.
    pub const FIRMWARE_ACTIVATION: u32 = 1 << 9;
    /// ANA Change Notices.
    pub const ANA_CHANGE: u32 = 1 << 11;
    /// Normal NVM Subsystem Shutdown event.
    pub const SUBSYSTEM_SHUTDOWN: u32 = 1 << 15;
    /// Discovery Log Page Change Notices.
    pub const DISCOVERY_CHANGE: u32 = 1 << 31;
}

/// CTRATT bits (bytes 96 to 99): controller attributes.
pub mod ctratt {
    /// 128-bit host identifiers.
    pub const HOSTID_128: u32 = 1 << 0;
    /// Traffic based keep alive.
    pub const TBKAS: u32 = 1 << 6;
    /// Extended LBA formats.
    pub const ELBAS: u32 = 1 << 15;
}

/// OACS bits (bytes 256 and 257): optional admin commands.
pub mod oacs {
    /// Security Send and Receive.
    pub const SECURITY: u16 = 1 << 0;
    /// Format NVM.
    pub const FORMAT: u16 = 1 << 1;
    /// Firmware Commit and Download.
    pub const FIRMWARE: u16 = 1 << 2;
    /// Namespace Management and Attachment.
    pub const NAMESPACE_MANAGEMENT: u16 = 1 << 3;
    /// Device Self-test.
    pub const SELF_TEST: u16 = 1 << 4;
}

/// ONCS bits (bytes 520 and 521): optional NVM commands and features.
pub mod oncs {
    /// Compare.
    pub const COMPARE: u16 = 1 << 0;
    /// Write Uncorrectable.
    pub const WRITE_UNCORRECTABLE: u16 = 1 << 1;
    /// Dataset Management.
    pub const DSM: u16 = 1 << 2;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u16 = 1 << 3;
    /// Save and Select of features.
    pub const SAVE: u16 = 1 << 4;
    /// Reservations.
    pub const RESERVATIONS: u16 = 1 << 5;
    /// Timestamp feature.
    pub const TIMESTAMP: u16 = 1 << 6;
    /// Verify.
    pub const VERIFY: u16 = 1 << 7;
    /// Copy.
    pub const COPY: u16 = 1 << 8;
}

/// SGLS bits (bytes 536 to 539).
pub mod sgls {
    /// SGLs supported, without alignment.
    pub const SUPPORTED: u32 = 1 << 0;
    /// SGLs supported, data blocks dword aligned.
    pub const DWORD_ALIGNED: u32 = 1 << 1;
    /// Keyed data block descriptors.
    pub const KEYED: u32 = 1 << 2;
    /// Offsets in data block descriptors: in-capsule data.
    pub const OFFSET: u32 = 1 << 20;
    /// Transport data block descriptors.
    pub const TRANSPORT: u32 = 1 << 21;
}

/// ANACAP bits (byte 343).
pub mod anacap {
    /// Reports Optimized.
    pub const OPTIMIZED: u8 = 1 << 0;
    /// Reports Non-Optimized.
    pub const NON_OPTIMIZED: u8 = 1 << 1;
    /// Reports Inaccessible.
    pub const INACCESSIBLE: u8 = 1 << 2;
    /// Reports Persistent Loss.
    pub const PERSISTENT_LOSS: u8 = 1 << 3;
    /// Reports Change.
    pub const CHANGE: u8 = 1 << 4;
    /// A namespace's group never changes.
    pub const GROUP_FIXED: u8 = 1 << 6;
}

wire! {
    /// Power State Descriptor (NVMe Base 2.0 section 5.17.2.1).
    pub struct PowerState: 32 {
        /// MP: maximum power, 0.01 W, or 0.0001 W with MXPS.
        0 => pub mp: U16,
        2 => _rsvd2: u8,
        /// MXPS in bit 0, NOPS in bit 1.
        3 => pub flags: u8,
        /// ENLAT: entry latency, microseconds.
        4 => pub enlat_us: U32,
        /// EXLAT: exit latency, microseconds.
        8 => pub exlat_us: U32,
        /// RRT, RRL, RWT, RWL: relative read and write throughput and latency; smaller is better.
        12 => pub relative: [u8; 4],
        /// IDLP: idle power.
        16 => pub idlp: U16,
        /// IPS: scale of IDLP.
        18 => pub ips: u8,
        19 => _rsvd19: u8,
        /// ACTP: active power.
        20 => pub actp: U16,
        /// APW and APS: active power workload and scale.
        22 => pub apws: u8,
        23 => _rsvd23: [u8; 9],
    }
}

wire! {
    /// Identify Controller (NVMe Base 2.0 section 5.17.2.1).
    pub struct IdentifyController: 4096 {
        /// VID: PCI vendor identifier; 0 on fabrics.
        0 => pub vid: U16,
        /// SSVID: PCI subsystem vendor identifier; 0 on fabrics.
        2 => pub ssvid: U16,
        /// SN: serial number.
        4 => pub sn: Text<20>,
        /// MN: model number.
        24 => pub mn: Text<40>,
        /// FR: firmware revision.
        64 => pub fr: Text<8>,
        /// RAB: recommended arbitration burst, 2^n commands.
        72 => pub rab: u8,
        /// IEEE: OUI, least significant byte first.
        73 => pub ieee: [u8; 3],
        /// CMIC, see [`cmic`].
        76 => pub cmic: u8,
        /// MDTS: largest data transfer, 2^n units of CAP.MPSMIN pages; 0 = no limit.
        77 => pub mdts: u8,
        /// CNTLID.
        78 => pub cntlid: U16,
        /// VER: as VS.
        80 => pub ver: U32,
        /// RTD3R: RTD3 resume latency, microseconds.
        84 => pub rtd3r_us: U32,
        /// RTD3E: RTD3 entry latency, microseconds: how long a shutdown may take.
        88 => pub rtd3e_us: U32,
        /// OAES, see [`oaes`].
        92 => pub oaes: U32,
        /// CTRATT, see [`ctratt`].
        96 => pub ctratt: U32,
        /// RRLS: read recovery levels.
        100 => pub rrls: U16,
        102 => _rsvd102: [u8; 9],
        /// CNTRLTYPE, a [`ControllerType`].
        111 => pub cntrltype: u8,
        /// FGUID: FRU globally unique identifier.
        112 => pub fguid: [u8; 16],
        /// CRDT1: command retry delay, 100 ms.
        128 => pub crdt1: U16,
        /// CRDT2: command retry delay, 100 ms.
        130 => pub crdt2: U16,
        /// CRDT3: command retry delay, 100 ms.
        132 => pub crdt3: U16,
        134 => _rsvd134: [u8; 119],
        /// NVMSR: NVM subsystem report (MI).
        253 => pub nvmsr: u8,
        /// VWCI: VPD write cycles.
        254 => pub vwci: u8,
        /// MEC: management endpoint capabilities.
        255 => pub mec: u8,
        /// OACS, see [`oacs`].
        256 => pub oacs: U16,
        /// ACL: Abort commands outstanding, 0's based.
        258 => pub acl: u8,
        /// AERL: Asynchronous Event Requests outstanding, 0's based.
        259 => pub aerl: u8,
        /// FRMW: firmware updates; bit 0 slot 1 read only, bits 3:1 slots.
        260 => pub frmw: u8,
        /// LPA: log page attributes; bit 0 SMART per namespace, bit 1 effects, bit 2 extended data.
        261 => pub lpa: u8,
        /// ELPE: error log entries, 0's based.
        262 => pub elpe: u8,
        /// NPSS: power states, 0's based.
        263 => pub npss: u8,
        /// AVSCC: admin vendor specific command configuration.
        264 => pub avscc: u8,
        /// APSTA: autonomous power state transitions.
        265 => pub apsta: u8,
        /// WCTEMP: warning temperature, kelvin.
        266 => pub wctemp_k: U16,
        /// CCTEMP: critical temperature, kelvin.
        268 => pub cctemp_k: U16,
        /// MTFA: firmware activation time, 100 ms.
        270 => pub mtfa: U16,
        /// HMPRE: host memory buffer preferred, 4 KiB.
        272 => pub hmpre: U32,
        /// HMMIN: host memory buffer minimum, 4 KiB.
        276 => pub hmmin: U32,
        /// TNVMCAP: total capacity, bytes.
        280 => pub tnvmcap: U128,
        /// UNVMCAP: unallocated capacity, bytes.
        296 => pub unvmcap: U128,
        /// RPMBS: replay protected memory block.
        312 => pub rpmbs: U32,
        /// EDSTT: extended self-test time, minutes.
        316 => pub edstt_min: U16,
        /// DSTO: self-test options.
        318 => pub dsto: u8,
        /// FWUG: firmware update granularity, 4 KiB; FFh = none.
        319 => pub fwug: u8,
        /// KAS: keep alive granularity, 100 ms; 0 = not supported.
        320 => pub kas: U16,
        /// HCTMA: host controlled thermal management.
        322 => pub hctma: U16,
        /// MNTMT: minimum thermal management temperature, kelvin.
        324 => pub mntmt_k: U16,
        /// MXTMT: maximum thermal management temperature, kelvin.
        326 => pub mxtmt_k: U16,
        /// SANICAP: sanitize capabilities.
        328 => pub sanicap: U32,
        /// HMMINDS: host memory buffer minimum descriptor size, 4 KiB.
        332 => pub hmminds: U32,
        /// HMMAXD: host memory buffer descriptors.
        336 => pub hmmaxd: U16,
        /// NSETIDMAX: largest NVM set identifier.
        338 => pub nsetidmax: U16,
        /// ENDGIDMAX: largest endurance group identifier.
        340 => pub endgidmax: U16,
        /// ANATT: ANA transition time, seconds.
        342 => pub anatt_s: u8,
        /// ANACAP, see [`anacap`].
        343 => pub anacap: u8,
        /// ANAGRPMAX: largest ANA group identifier.
        344 => pub anagrpmax: U32,
        /// NANAGRPID: ANA groups.
        348 => pub nanagrpid: U32,
        /// PELS: persistent event log size, 64 KiB.
        352 => pub pels: U32,
        /// Domain identifier.
        356 => pub domainid: U16,
        358 => _rsvd358: [u8; 10],
        /// MEGCAP: largest endurance group, bytes.
        368 => pub megcap: U128,
        384 => _rsvd384: [u8; 128],
        /// SQES: submission queue entry size; bits 3:0 required, 7:4 maximum, 2^n bytes: 66h.
        512 => pub sqes: u8,
        /// CQES: completion queue entry size; bits 3:0 required, 7:4 maximum, 2^n bytes: 44h.
        513 => pub cqes: u8,
        /// MAXCMD: outstanding commands per queue; required on fabrics.
        514 => pub maxcmd: U16,
        /// NN: largest NSID.
        516 => pub nn: U32,
        /// ONCS, see [`oncs`].
        520 => pub oncs: U16,
        /// FUSES: bit 0, Compare and Write.
        522 => pub fuses: U16,
        /// FNA: Format NVM attributes.
        524 => pub fna: u8,
        /// VWC: bit 0 volatile write cache present; bits 2:1 Flush with NSID FFFFFFFFh: 10b no, 11b yes.
        525 => pub vwc: u8,
        /// AWUN: atomic write unit, blocks, 0's based.
        526 => pub awun: U16,
        /// AWUPF: atomic write unit over a power failure, blocks, 0's based.
        528 => pub awupf: U16,
        /// ICSVSCC: I/O vendor specific command configuration.
        530 => pub icsvscc: u8,
        /// NWPC: namespace write protection.
        531 => pub nwpc: u8,
        /// ACWU: atomic compare and write unit, blocks, 0's based.
        532 => pub acwu: U16,
        /// CDFS: copy descriptor formats supported, one bit each.
        534 => pub cdfs: U16,
        /// SGLS, see [`sgls`].
        536 => pub sgls: U32,
        /// MNAN: namespaces at most; 0 = NN.
        540 => pub mnan: U32,
        /// MAXDNA: domain namespace attachments.
        544 => pub maxdna: U128,
        /// MAXCNA: I/O controller namespace attachments.
        560 => pub maxcna: U32,
        564 => _rsvd564: [u8; 204],
        /// SUBNQN, NUL terminated.
        768 => pub subnqn: [u8; 256],
        1024 => _rsvd1024: [u8; 768],
        /// IOCCSZ: I/O command capsule, 16 bytes; at least 4.
        1792 => pub ioccsz: U32,
        /// IORCSZ: I/O response capsule, 16 bytes; at least 1.
        1796 => pub iorcsz: U32,
        /// ICDOFF: in-capsule data offset, 16 bytes; 0 for TCP.
        1800 => pub icdoff: U16,
        /// FCATT: bit 0 set: static controller model.
        1802 => pub fcatt: u8,
        /// MSDBD: SGL data block descriptors per command; 0 = no limit.
        1803 => pub msdbd: u8,
        /// OFCS: bit 0, Disconnect.
        1804 => pub ofcs: U16,
        /// DCTYPE: discovery controller; 0 not reported, 1 direct, 2 central.
        1806 => pub dctype: u8,
        1807 => _rsvd1807: [u8; 241],
        /// Power State Descriptors.
        2048 => pub psd: [PowerState; 32],
        /// Vendor specific.
        3072 => pub vs: [u8; 1024],
    }
}

impl IdentifyController {
    /// A controller with what every fabrics controller of this kind reports: entry sizes, SGLs of NVMe/TCP,
    /// capsules of `capsule_data_bytes` of data, spaces in the texts.
    pub fn fabrics(kind: ControllerType, cntlid: Cntlid, subnqn: Nqn<'_>, version: Vs) -> Self {
        let mut id = Self {
            cntlid: U16::new(cntlid.0),
            ver: U32::new(version.0),
            cntrltype: kind as u8,
            sgls: U32::new(sgls::SUPPORTED | sgls::OFFSET | sgls::TRANSPORT),
            subnqn: subnqn.to_field(),
            iorcsz: U32::new(1),
            ..Default::default()
        };
        id.set_capsule_data(0);
        if kind == ControllerType::Io {
            (id.sqes, id.cqes) = (0x66, 0x44);
        }
        set_text(&mut id.sn, "");
        set_text(&mut id.mn, "");
        set_text(&mut id.fr, "");
        id
    }

    /// Sets IOCCSZ for this much in-capsule data; a remainder of 16 bytes is dropped.
    pub fn set_capsule_data(&mut self, bytes: u32) {
        self.ioccsz = U32::new((64 + (bytes / 16) * 16) / 16);
    }

    /// In-capsule data that I/O queues accept, bytes: what IOCCSZ leaves behind the 64-byte entry.
    pub fn capsule_data_bytes(&self) -> u32 {
        self.ioccsz.get().saturating_sub(4).saturating_mul(16)
    }

    /// Largest data transfer, bytes; `None` = no limit. `mpsmin` is CAP.MPSMIN.
    pub fn max_transfer_bytes(&self, mpsmin: u32) -> Option<u64> {
        match self.mdts {
            0 => None,
            n => Some(1u64.checked_shl(u32::from(n) + 12 + mpsmin).unwrap_or(u64::MAX)),
        }
    }
}

wire! {
    /// NVM command set Identify Controller (CNS 06h, CSI 00h; NVM 1.0 section 4.1.5).
    pub struct NvmController: 4096 {
        /// VSL: Verify size limit, 2^n units of CAP.MPSMIN pages; 0 = none.
        0 => pub vsl: u8,
        /// WZSL: Write Zeroes size limit, likewise.
        1 => pub wzsl: u8,
        /// WUSL: Write Uncorrectable size limit, likewise.
        2 => pub wusl: u8,
        /// DMRL: Dataset Management ranges; 0 = no limit.
        3 => pub dmrl: u8,
        /// DMRSL: blocks in one range; 0 = no limit.
        4 => pub dmrsl: U32,
        /// DMSL: blocks in all ranges of a command; 0 = no limit.
        8 => pub dmsl: U64,
        16 => _rsvd16: [u8; 4080],
    }
}
