//! Features (NVMe Base 2.0 section 5.27.1) and asynchronous events (section 5.2).

use zerocopy::little_endian::U16;

use crate::log::Lid;
use crate::opcode::opcodes;
use crate::status::Status;
use crate::wire::{bits, wire};

opcodes! {
    /// FID: feature identifiers (NVMe Base 2.0 section 5.27.1).
    Fid {
        /// Arbitration.
        Arbitration = 0x01,
        /// Power Management.
        PowerManagement = 0x02,
        /// Temperature Threshold.
        TemperatureThreshold = 0x04,
        /// Error Recovery.
        ErrorRecovery = 0x05,
        /// Volatile Write Cache.
        VolatileWriteCache = 0x06,
        /// Number of Queues.
        NumberOfQueues = 0x07,
        /// Interrupt Coalescing (PCIe only).
        InterruptCoalescing = 0x08,
        /// Interrupt Vector Configuration (PCIe only).
        InterruptVector = 0x09,
        /// Write Atomicity Normal.
        WriteAtomicity = 0x0a,
        /// Asynchronous Event Configuration.
        AsyncEventConfig = 0x0b,
        /// Autonomous Power State Transition.
        AutonomousPowerState = 0x0c,
        /// Host Memory Buffer (PCIe only).
        HostMemoryBuffer = 0x0d,
        /// Timestamp.
        Timestamp = 0x0e,
        /// Keep Alive Timer.
        KeepAliveTimer = 0x0f,
        /// Host Behavior Support.
        HostBehavior = 0x16,
        /// I/O Command Set Profile.
        CommandSetProfile = 0x19,
        /// Host Identifier.
        HostIdentifier = 0x81,
        /// Reservation Notification Mask.
        ReservationMask = 0x82,
        /// Reservation Persistence.
        ReservationPersistence = 0x83,
        /// Namespace Write Protection Config.
        WriteProtection = 0x84,
    }
}

opcodes! {
    /// SEL of Get Features: which value.
    Select {
        /// Current.
        Current = 0,
        /// Default.
        Default = 1,
        /// Saved.
        Saved = 2,
        /// Capabilities, see [`Capabilities`].
        Supported = 3,
    }
}

bits! {
    /// DW0 of Get Features with SEL = 3 (NVMe Base 2.0 section 5.15).
    pub struct Capabilities(u32) {
        /// The value can be saved.
        saveable, with_saveable: 0, 1;
        /// The value is per namespace.
        namespace_specific, with_namespace_specific: 1, 1;
        /// The value can be changed.
        changeable, with_changeable: 2, 1;
    }
}

bits! {
    /// Number of Queues: CDW11 as requested, DW0 as allocated (NVMe Base 2.0 section 5.27.1).
    pub struct NumberOfQueues(u32) {
        /// I/O submission queues, 0's based.
        nsq, with_nsq: 0, 16;
        /// I/O completion queues, 0's based.
        ncq, with_ncq: 16, 16;
    }
}

impl NumberOfQueues {
    /// What a controller with `max` I/O queues (1 or more) grants to this request. FFFFh is not a legal request.
    pub fn grant(self, max: u16) -> Result<Self, Status> {
        if self.nsq() == 0xffff || self.ncq() == 0xffff {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        // The admin SQ exists in any case, 0's based counts cannot express no queue.
        let cap = u32::from(max.max(1)) - 1;
        Ok(self.with_nsq(self.nsq().min(cap)).with_ncq(self.ncq().min(cap)))
    }

    /// I/O queue pairs that can be connected: 1..=65,535.
    pub fn pairs(self) -> u32 {
        self.nsq().min(self.ncq()) + 1
    }
}

bits! {
    /// Asynchronous Event Configuration (NVMe Base 2.0 section 5.27.1); the bits of OAES and their critical warnings.
    pub struct AsyncEventConfig(u32) {
        /// SMART / Health critical warnings.
        critical_warnings, with_critical_warnings: 0, 8;
        /// Namespace Attribute Notices.
        namespace_attributes, with_namespace_attributes: 8, 1;
        /// Firmware Activation Notices.
        firmware_activation, with_firmware_activation: 9, 1;
        /// Telemetry Log Notices.
        telemetry, with_telemetry: 10, 1;
        /// ANA Change Notices.
        ana_change, with_ana_change: 11, 1;
        /// Normal NVM Subsystem Shutdown.
        subsystem_shutdown, with_subsystem_shutdown: 15, 1;
        /// Discovery Log Page Change Notices.
        discovery_change, with_discovery_change: 31, 1;
    }
}

bits! {
    /// Arbitration (NVMe Base 2.0 section 5.27.1).
    pub struct Arbitration(u32) {
        /// AB: burst, 2^n commands; 111b = no limit.
        ab, with_ab: 0, 3;
        /// LPW: low priority weight, 0's based.
        lpw, with_lpw: 8, 8;
        /// MPW: medium priority weight, 0's based.
        mpw, with_mpw: 16, 8;
        /// HPW: high priority weight, 0's based.
        hpw, with_hpw: 24, 8;
    }
}

bits! {
    /// Power Management (NVMe Base 2.0 section 5.27.1).
    pub struct PowerManagement(u32) {
        /// PS: power state.
        ps, with_ps: 0, 5;
        /// WH: workload hint.
        wh, with_wh: 5, 3;
    }
}

bits! {
    /// Temperature Threshold (NVMe Base 2.0 section 5.27.1).
    pub struct TemperatureThreshold(u32) {
        /// TMPTH: kelvin.
        tmpth_k, with_tmpth_k: 0, 16;
        /// TMPSEL: 0 composite, 1 to 8 sensors, 15 all.
        tmpsel, with_tmpsel: 16, 4;
        /// THSEL: 0 over, 1 under.
        thsel, with_thsel: 20, 2;
    }
}

bits! {
    /// Error Recovery (NVM 1.0 section 4.1.3).
    pub struct ErrorRecovery(u32) {
        /// TLER: time limited error recovery, 100 ms; 0 = no limit.
        tler, with_tler: 0, 16;
        /// DULBE: report deallocated or unwritten blocks as errors.
        dulbe, with_dulbe: 16, 1;
    }
}

bits! {
    /// Volatile Write Cache (NVMe Base 2.0 section 5.27.1).
    pub struct VolatileWriteCache(u32) {
        /// WCE: enabled.
        wce, with_wce: 0, 1;
    }
}

bits! {
    /// Write Atomicity Normal (NVM 1.0 section 4.1.3).
    pub struct WriteAtomicity(u32) {
        /// DN: AWUN and NAWUN need not be honoured, only the power fail units.
        dn, with_dn: 0, 1;
    }
}

bits! {
    /// Host Identifier, CDW11 (NVMe Base 2.0 section 5.27.1). On fabrics the identifier comes with Connect.
    pub struct HostIdentifier(u32) {
        /// EXHID: the data is 128 bits instead of 64.
        exhid, with_exhid: 0, 1;
    }
}

bits! {
    /// Reservation Notification Mask: 1 masks (NVMe Base 2.0 section 5.27.1).
    pub struct ReservationMask(u32) {
        /// REGPRE: registration preempted.
        regpre, with_regpre: 1, 1;
        /// RESREL: reservation released.
        resrel, with_resrel: 2, 1;
        /// RESPRE: reservation preempted.
        respre, with_respre: 3, 1;
    }
}

bits! {
    /// Reservation Persistence (NVMe Base 2.0 section 5.27.1).
    pub struct ReservationPersistence(u32) {
        /// PTPL: reservations and registrants survive a power loss.
        ptpl, with_ptpl: 0, 1;
    }
}

bits! {
    /// Namespace Write Protection Config (NVMe Base 2.0 section 5.27.1).
    pub struct WriteProtection(u32) {
        /// 000b none, 001b write protect, 010b until power cycle, 011b permanent.
        state, with_state: 0, 3;
    }
}

wire! {
    /// Timestamp (NVMe Base 2.0 section 5.27.1).
    pub struct Timestamp: 8 {
        /// Milliseconds since 1970-01-01 00:00 UTC, or since the controller started; 48 bits, little-endian.
        0 => pub ms: [u8; 6],
        /// Bit 0 SYNCH: may have stopped; bits 3:1 origin: 000b reset, 001b Set Features.
        6 => pub attributes: u8,
        7 => _rsvd7: u8,
    }
}

impl Timestamp {
    /// A timestamp; `ms` is cut to 48 bits, `set_by_host` is its origin.
    pub fn new(ms: u64, set_by_host: bool) -> Self {
        let mut t = Self { attributes: u8::from(set_by_host) << 1, ..Default::default() };
        t.ms.copy_from_slice(&ms.to_le_bytes()[..6]);
        t
    }

    /// Milliseconds.
    pub fn ms(&self) -> u64 {
        let mut ms = [0; 8];
        ms[..6].copy_from_slice(&self.ms);
        u64::from_le_bytes(ms)
    }
}

wire! {
    /// Host Behavior Support (NVMe Base 2.0 section 5.27.1).
    pub struct HostBehavior: 512 {
        /// ACRE: Advanced Command Retry Enable: the host understands CRD.
        0 => pub acre: u8,
        /// ETDAS: Extended Telemetry Data Area 4.
        1 => pub etdas: u8,
        /// LBAFEE: extended LBA formats.
        2 => pub lbafee: u8,
        3 => _rsvd3: u8,
        /// CDFE: Copy descriptor formats enabled (NVMe Base 2.1).
        4 => pub cdfe: U16,
        6 => _rsvd6: [u8; 506],
    }
}

bits! {
    /// DW0 of an Asynchronous Event Request's completion (NVMe Base 2.0 section 5.2).
    pub struct AsyncEvent(u32) {
        /// Type: 0 error, 1 SMART / Health, 2 notice, 6 command set specific, 7 vendor specific.
        kind, with_kind: 0, 3;
        /// Information, depending on the type.
        info, with_info: 8, 8;
        /// LID: the log page that tells more; reading it clears the event.
        lid, with_lid: 16, 8;
    }
}

impl AsyncEvent {
    /// Notice: the inventory or an attribute of namespaces changed.
    pub const NAMESPACE_CHANGED: Self = Self::new(2, 0x00, Lid::ChangedNamespaces);
    /// Notice: an ANA group changed.
    pub const ANA_CHANGE: Self = Self::new(2, 0x03, Lid::Ana);
    /// Notice: the discovery log page changed.
    pub const DISCOVERY_CHANGE: Self = Self::new(2, 0xf0, Lid::Discovery);
    /// Command set specific: a reservation log page is available.
    pub const RESERVATION: Self = Self::new(6, 0x00, Lid::Reservation);
    /// Error: persistent internal error.
    pub const PERSISTENT_ERROR: Self = Self::new(0, 0x03, Lid::Error);
    /// Error: transient internal error.
    pub const TRANSIENT_ERROR: Self = Self::new(0, 0x04, Lid::Error);
    /// SMART / Health: available spare has fallen below its threshold.
    pub const SPARE_BELOW: Self = Self::new(1, 0x02, Lid::Health);
    /// SMART / Health: reliability is compromised.
    pub const RELIABILITY: Self = Self::new(1, 0x00, Lid::Health);

    /// An event.
    pub const fn new(kind: u8, info: u8, lid: Lid) -> Self {
        Self((kind & 7) as u32 | (info as u32) << 8 | (lid as u32) << 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_events() {
        assert_eq!(AsyncEvent::NAMESPACE_CHANGED.0, 0x0004_0002);
        assert_eq!(AsyncEvent::ANA_CHANGE.0, 0x000c_0302);
        assert_eq!(AsyncEvent::DISCOVERY_CHANGE.0, 0x0070_f002);
        assert_eq!(AsyncEvent::RESERVATION.0, 0x0080_0006);
    }

    #[test]
    fn queues_granted() {
        let ask = |n| NumberOfQueues::default().with_nsq(n).with_ncq(n);
        assert_eq!(ask(7).grant(64).map(|q| (q.0, q.pairs())), Ok((0x0007_0007, 8)));
        assert_eq!(ask(127).grant(64).map(|q| q.0), Ok(0x003f_003f));
        assert_eq!(ask(0).grant(0).map(|q| q.pairs()), Ok(1));
        assert_eq!(ask(0xfffe).grant(u16::MAX).map(|q| q.pairs()), Ok(0xffff));
        assert_eq!(ask(0xffff).grant(64), Err(Status::INVALID_FIELD.with_dnr()));
        let uneven = NumberOfQueues(0x0003_0009).grant(64).expect("legal");
        assert_eq!(uneven.pairs(), 4);
    }

    #[test]
    fn timestamps() {
        let t = Timestamp::new(0x0123_4567_89ab, true);
        assert_eq!((t.ms, t.attributes, t.ms()), ([0xab, 0x89, 0x67, 0x45, 0x23, 1], 2, 0x0123_4567_89ab));
        assert_eq!(Timestamp::new(u64::MAX, false).ms(), (1 << 48) - 1);
    }
}
