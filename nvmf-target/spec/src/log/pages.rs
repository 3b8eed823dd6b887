//! Log pages of fixed layout.

use zerocopy::little_endian::{U16, U32, U64, U128};

use crate::ids::Nsid;
use crate::wire::{bits, wire};

bits! {
    /// LID Supported and Effects (NVMe Base 2.0 section 5.16.1).
    pub struct LidSupport(u32) {
        /// LSUPP: the page is supported.
        lsupp, with_lsupp: 0, 1;
        /// IOS: index offsets are supported.
        ios, with_ios: 1, 1;
    }
}

wire! {
    /// Supported Log Pages (LID 00h; NVMe Base 2.0 section 5.16.1).
    pub struct SupportedLogPages: 1024 {
        /// A [`LidSupport`] per LID.
        0 => pub lid: [U32; 256],
    }
}

wire! {
    /// Error Information entry (LID 01h; NVMe Base 2.0 section 5.16.1), newest first.
    pub struct ErrorEntry: 64 {
        /// Error count, unique and increasing; 0 = entry unused.
        0 => pub error_count: U64,
        /// SQID of the command; FFFFh = none.
        8 => pub sqid: U16,
        /// CID of the command; FFFFh = none.
        10 => pub cid: U16,
        /// Status of the command in bits 15:1, as in its completion.
        12 => pub status: U16,
        /// Bits 7:0 byte, bits 10:8 bit of the parameter in the command; FFFFh = none.
        14 => pub parameter_location: U16,
        /// First LBA in error.
        16 => pub lba: U64,
        /// Namespace.
        24 => pub nsid: U32,
        /// Vendor specific log page, 80h and up; 0 = none.
        28 => pub vendor_log: u8,
        /// TRTYPE, as in the discovery log; 0 = not transport related.
        29 => pub trtype: u8,
        30 => _rsvd30: [u8; 2],
        /// Command specific information.
        32 => pub command_specific: U64,
        /// Transport type specific information.
        40 => pub transport_specific: U16,
        42 => _rsvd42: [u8; 22],
    }
}

wire! {
    /// SMART / Health Information (LID 02h; NVMe Base 2.0 section 5.16.1).
    pub struct Health: 512 {
        /// Critical warnings: bit 0 spare, 1 temperature, 2 reliability, 3 read only, 4 backup failed.
        0 => pub critical_warning: u8,
        /// Composite temperature, kelvin.
        1 => pub temperature_k: U16,
        /// Available spare, percent: 0..=100.
        3 => pub available_spare_pct: u8,
        /// Available spare threshold, percent: 0..=100.
        4 => pub spare_threshold_pct: u8,
        /// Percentage used: 0..=255.
        5 => pub used_pct: u8,
        /// Critical warnings of endurance groups.
        6 => pub endurance_warning: u8,
        7 => _rsvd7: [u8; 25],
        /// Data read, units of 512,000 bytes, rounded up.
        32 => pub data_units_read: U128,
        /// Data written, units of 512,000 bytes, rounded up.
        48 => pub data_units_written: U128,
        /// Read and Compare commands.
        64 => pub host_reads: U128,
        /// Write commands.
        80 => pub host_writes: U128,
        /// Controller busy time, minutes.
        96 => pub busy_min: U128,
        /// Power cycles.
        112 => pub power_cycles: U128,
        /// Power on hours.
        128 => pub power_on_h: U128,
        /// Unsafe shutdowns.
        144 => pub unsafe_shutdowns: U128,
        /// Media and data integrity errors.
        160 => pub media_errors: U128,
        /// Error log entries over the life of the controller.
        176 => pub error_log_entries: U128,
        /// Time above the warning temperature, minutes.
        192 => pub warning_temperature_min: U32,
        /// Time above the critical temperature, minutes.
        196 => pub critical_temperature_min: U32,
        /// Temperature sensors 1 to 8, kelvin; 0 = absent.
        200 => pub sensor_k: [U16; 8],
        /// Transitions by thermal management temperatures 1 and 2.
        216 => pub thermal_transitions: [U32; 2],
        /// Time in thermal management 1 and 2, seconds.
        224 => pub thermal_time_s: [U32; 2],
        232 => _rsvd232: [u8; 280],
    }
}

/// Bits of [`Health::critical_warning`].
pub mod health_warning {
    /// Available spare is below its threshold.
    pub const SPARE: u8 = 1 << 0;
    /// All media is read only.
    pub const READ_ONLY: u8 = 1 << 3;
}

impl Health {
    /// Data units of this many bytes: thousands of 512 bytes, rounded up (NVMe Base 2.0 section 5.16.1).
    pub fn data_units(bytes: u128) -> U128 {
        U128::new(bytes.div_ceil(512_000))
    }
}

wire! {
    /// Firmware Slot Information (LID 03h; NVMe Base 2.0 section 5.16.1).
    pub struct FirmwareSlots: 512 {
        /// AFI: bits 2:0 active slot, bits 6:4 slot after the next reset (0 = the same).
        0 => pub afi: u8,
        1 => _rsvd1: [u8; 7],
        /// FRS1 to FRS7: revisions, ASCII; zeros = empty.
        8 => pub frs: [[u8; 8]; 7],
        64 => _rsvd64: [u8; 448],
    }
}

wire! {
    /// Changed Namespace List (LID 04h; NVMe Base 2.0 section 5.16.1.5): ascending, 0 after the last.
    pub struct ChangedNamespaces: 4096 {
        /// The NSIDs.
        0 => pub nsid: [U32; 1024],
    }
}

impl ChangedNamespaces {
    /// The list of these NSIDs (ascending); of more than 1,024 the page only says so, with FFFFFFFFh first.
    pub fn new(nsids: impl IntoIterator<Item = Nsid>) -> Self {
        let mut page = Self::default();
        let mut slots = page.nsid.iter_mut();
        for nsid in nsids {
            match slots.next() {
                Some(slot) => *slot = U32::new(nsid.0),
                None => {
                    page = Self::default();
                    page.nsid[0] = U32::new(Nsid::ALL.0);
                    return page;
                }
            }
        }
        page
    }
}

/// Bits of a Commands Supported and Effects entry (NVMe Base 2.0 section 5.16.1).
pub mod effects {
    /// CSUPP: supported.
    pub const SUPPORTED: u32 = 1 << 0;
    /// LBCC: may change data.
    pub const DATA_CHANGE: u32 = 1 << 1;
    /// NCC: may change a namespace's capabilities.
    pub const NAMESPACE_CHANGE: u32 = 1 << 2;
    /// NIC: may change the inventory of namespaces.
    pub const INVENTORY_CHANGE: u32 = 1 << 3;
    /// CCC: may change controller capabilities.
    pub const CONTROLLER_CHANGE: u32 = 1 << 4;
}

wire! {
    /// Commands Supported and Effects (LID 05h; NVMe Base 2.0 section 5.16.1).
    pub struct CommandEffects: 4096 {
        /// Per admin opcode, see [`effects`].
        0 => pub admin: [U32; 256],
        /// Per I/O opcode, see [`effects`].
        1024 => pub io: [U32; 256],
        2048 => _rsvd2048: [u8; 2048],
    }
}

wire! {
    /// Reservation Notification (LID 80h; NVMe Base 2.0 section 5.16.1).
    pub struct ReservationNotification: 64 {
        /// Log page count; wraps to 1, 0 = no notification.
        0 => pub count: U64,
        /// Type: 0 empty, 1 registration preempted, 2 reservation released, 3 reservation preempted.
        8 => pub kind: u8,
        /// Further pages available; 255 = 255 or more.
        9 => pub available: u8,
        10 => _rsvd10: [u8; 2],
        /// Namespace.
        12 => pub nsid: U32,
        16 => _rsvd16: [u8; 48],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_units_round_up() {
        for (bytes, units) in [(0, 0), (1, 1), (512_000, 1), (512_001, 2)] {
            assert_eq!(Health::data_units(bytes).get(), units);
        }
    }

    #[test]
    fn changed_namespaces() {
        let page = ChangedNamespaces::new((1..=1024).map(Nsid));
        assert_eq!((page.nsid[0].get(), page.nsid[1023].get()), (1, 1024));
        let page = ChangedNamespaces::new((1..=1025).map(Nsid));
        assert_eq!((page.nsid[0].get(), page.nsid[1].get()), (u32::MAX, 0));
    }
}
