//! Command status (NVMe Base 2.0 section 3.3.3.2.1).
//!
//! A [`Status`] is the 15-bit status field without the phase tag: SC in bits 7:0, SCT in bits 10:8, CRD in bits
//! 12:11, M in bit 13, DNR in bit 14. The constants carry SCT and SC alone; two have the same value where
//! the command sets share a code.

/// The status field of a completion, phase tag removed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Status(pub u16);

/// Status code types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Sct {
    /// 0h: Generic Command Status.
    Generic = 0,
    /// 1h: Command Specific Status.
    CommandSpecific = 1,
    /// 2h: Media and Data Integrity Errors.
    Media = 2,
    /// 3h: Path Related Status.
    Path = 3,
    /// 4h to 6h: reserved.
    Reserved = 4,
    /// 7h: Vendor Specific.
    VendorSpecific = 7,
}

const DNR: u16 = 1 << 14;
const MORE: u16 = 1 << 13;
const CODE_MASK: u16 = 0x7ff;

impl Status {
    /// A status of this type and code, all flags clear.
    pub const fn new(sct: Sct, sc: u8) -> Self {
        Self((sct as u16) << 8 | sc as u16)
    }

    /// From the last word of a completion, whose bit 0 is the phase tag.
    pub const fn from_wire(word: u16) -> Self {
        Self(word >> 1)
    }

    /// The last word of a completion, phase tag 0.
    pub const fn to_wire(self) -> u16 {
        self.0 << 1
    }

    /// SC, status code.
    pub const fn sc(self) -> u8 {
        self.0 as u8
    }

    /// SCT, status code type.
    pub const fn sct(self) -> Sct {
        match self.0 >> 8 & 7 {
            0 => Sct::Generic,
            1 => Sct::CommandSpecific,
            2 => Sct::Media,
            3 => Sct::Path,
            7 => Sct::VendorSpecific,
            _ => Sct::Reserved,
        }
    }

    /// CRD, command retry delay: index of the CRDT field of Identify Controller, 0 = none.
    pub const fn crd(self) -> u8 {
        (self.0 >> 11 & 3) as u8
    }

    /// M: more information in the Error Information log.
    pub const fn more(self) -> bool {
        self.0 & MORE != 0
    }

    /// DNR: the same command would fail again.
    pub const fn dnr(self) -> bool {
        self.0 & DNR != 0
    }

    /// With DNR set.
    #[must_use]
    pub const fn with_dnr(self) -> Self {
        Self(self.0 | DNR)
    }

    /// With M set.
    #[must_use]
    pub const fn with_more(self) -> Self {
        Self(self.0 | MORE)
    }

    /// With this CRD (0..=3).
    #[must_use]
    pub const fn with_crd(self, crd: u8) -> Self {
        Self(self.0 & !(3 << 11) | (crd as u16 & 3) << 11)
    }

    /// SCT and SC alone, for comparison with the constants.
    pub const fn code(self) -> Self {
        Self(self.0 & CODE_MASK)
    }

    /// Whether SCT and SC are those of Successful Completion.
    pub const fn is_success(self) -> bool {
        self.0 & CODE_MASK == 0
    }

    /// The specification's name of SCT and SC. Where the NVM command set and Fabrics share a code, both
    /// names. `None` if reserved or vendor specific.
    pub fn name(self) -> Option<&'static str> {
        let code = self.code();
        NAMES.binary_search_by_key(&code.0, |&(value, _)| value).ok().map(|i| NAMES[i].1)
    }
}

impl core::fmt::Display for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name}")?,
            None => write!(f, "unknown status")?,
        }
        write!(
            f,
            " (SCT {:#x} SC {:#04x}{})",
            self.0 >> 8 & 7,
            self.sc(),
            if self.dnr() { " DNR" } else { "" }
        )
    }
}

impl core::fmt::Debug for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

/// Generic command status (NVMe Base 2.0 section 3.3.3.2.1).
impl Status {
    /// 00h: Successful Completion.
    pub const SUCCESS: Self = Self::new(Sct::Generic, 0x00);
    /// 01h: Invalid Command Opcode.
    pub const INVALID_OPCODE: Self = Self::new(Sct::Generic, 0x01);
    /// 02h: Invalid Field in Command.
    pub const INVALID_FIELD: Self = Self::new(Sct::Generic, 0x02);
    /// 03h: Command ID Conflict.
    pub const COMMAND_ID_CONFLICT: Self = Self::new(Sct::Generic, 0x03);
    /// 04h: Data Transfer Error.
    pub const DATA_TRANSFER_ERROR: Self = Self::new(Sct::Generic, 0x04);
    /// 05h: Commands Aborted due to Power Loss Notification.
    pub const ABORTED_POWER_LOSS: Self = Self::new(Sct::Generic, 0x05);
    /// 06h: Internal Error.
    pub const INTERNAL_ERROR: Self = Self::new(Sct::Generic, 0x06);
    /// 07h: Command Abort Requested.
    pub const ABORT_REQUESTED: Self = Self::new(Sct::Generic, 0x07);
    /// 08h: Command Aborted due to SQ Deletion.
    pub const ABORTED_SQ_DELETION: Self = Self::new(Sct::Generic, 0x08);
    /// 09h: Command Aborted due to Failed Fused Command.
    pub const ABORTED_FAILED_FUSED: Self = Self::new(Sct::Generic, 0x09);
    /// 0Ah: Command Aborted due to Missing Fused Command.
    pub const ABORTED_MISSING_FUSED: Self = Self::new(Sct::Generic, 0x0a);
    /// 0Bh: Invalid Namespace or Format.
    pub const INVALID_NAMESPACE: Self = Self::new(Sct::Generic, 0x0b);
    /// 0Ch: Command Sequence Error.
    pub const COMMAND_SEQUENCE_ERROR: Self = Self::new(Sct::Generic, 0x0c);
    /// 0Dh: Invalid SGL Segment Descriptor.
    pub const INVALID_SGL_SEGMENT: Self = Self::new(Sct::Generic, 0x0d);
    /// 0Eh: Invalid Number of SGL Descriptors.
    pub const INVALID_SGL_COUNT: Self = Self::new(Sct::Generic, 0x0e);
    /// 0Fh: Data SGL Length Invalid.
    pub const DATA_SGL_LENGTH_INVALID: Self = Self::new(Sct::Generic, 0x0f);
    /// 10h: Metadata SGL Length Invalid.
    pub const METADATA_SGL_LENGTH_INVALID: Self = Self::new(Sct::Generic, 0x10);
    /// 11h: SGL Descriptor Type Invalid.
    pub const SGL_DESCRIPTOR_TYPE_INVALID: Self = Self::new(Sct::Generic, 0x11);
    /// 12h: Invalid Use of Controller Memory Buffer.
    pub const INVALID_CMB_USE: Self = Self::new(Sct::Generic, 0x12);
    /// 13h: PRP Offset Invalid.
    pub const PRP_OFFSET_INVALID: Self = Self::new(Sct::Generic, 0x13);
    /// 14h: Atomic Write Unit Exceeded.
    pub const ATOMIC_WRITE_UNIT_EXCEEDED: Self = Self::new(Sct::Generic, 0x14);
    /// 15h: Operation Denied.
    pub const OPERATION_DENIED: Self = Self::new(Sct::Generic, 0x15);
    /// 16h: SGL Offset Invalid.
    pub const SGL_OFFSET_INVALID: Self = Self::new(Sct::Generic, 0x16);
    /// 18h: Host Identifier Inconsistent Format.
    pub const HOST_ID_INCONSISTENT_FORMAT: Self = Self::new(Sct::Generic, 0x18);
    /// 19h: Keep Alive Timer Expired.
    pub const KEEP_ALIVE_EXPIRED: Self = Self::new(Sct::Generic, 0x19);
    /// 1Ah: Keep Alive Timeout Invalid.
    pub const KEEP_ALIVE_INVALID: Self = Self::new(Sct::Generic, 0x1a);
    /// 1Bh: Command Aborted due to Preempt and Abort.
    pub const ABORTED_PREEMPT: Self = Self::new(Sct::Generic, 0x1b);
    /// 1Ch: Sanitize Failed.
    pub const SANITIZE_FAILED: Self = Self::new(Sct::Generic, 0x1c);
    /// 1Dh: Sanitize In Progress.
    pub const SANITIZE_IN_PROGRESS: Self = Self::new(Sct::Generic, 0x1d);
    /// 1Eh: SGL Data Block Granularity Invalid.
    pub const SGL_GRANULARITY_INVALID: Self = Self::new(Sct::Generic, 0x1e);
    /// 1Fh: Command Not Supported for Queue in CMB.
    pub const QUEUE_IN_CMB_UNSUPPORTED: Self = Self::new(Sct::Generic, 0x1f);
    /// 20h: Namespace is Write Protected.
    pub const NAMESPACE_WRITE_PROTECTED: Self = Self::new(Sct::Generic, 0x20);
    /// 21h: Command Interrupted.
    pub const COMMAND_INTERRUPTED: Self = Self::new(Sct::Generic, 0x21);
    /// 22h: Transient Transport Error.
    pub const TRANSIENT_TRANSPORT_ERROR: Self = Self::new(Sct::Generic, 0x22);
    /// 23h: Command Prohibited by Command and Feature Lockdown.
    pub const PROHIBITED_BY_LOCKDOWN: Self = Self::new(Sct::Generic, 0x23);
    /// 24h: Admin Command Media Not Ready.
    pub const ADMIN_MEDIA_NOT_READY: Self = Self::new(Sct::Generic, 0x24);
    /// 80h: LBA Out of Range.
    pub const LBA_OUT_OF_RANGE: Self = Self::new(Sct::Generic, 0x80);
    /// 81h: Capacity Exceeded.
    pub const CAPACITY_EXCEEDED: Self = Self::new(Sct::Generic, 0x81);
    /// 82h: Namespace Not Ready.
    pub const NAMESPACE_NOT_READY: Self = Self::new(Sct::Generic, 0x82);
    /// 83h: Reservation Conflict.
    pub const RESERVATION_CONFLICT: Self = Self::new(Sct::Generic, 0x83);
    /// 84h: Format In Progress.
    pub const FORMAT_IN_PROGRESS: Self = Self::new(Sct::Generic, 0x84);
}

/// Command specific status (NVMe Base 2.0 section 3.3.3.2.1).
impl Status {
    /// 00h: Completion Queue Invalid.
    pub const CQ_INVALID: Self = Self::new(Sct::CommandSpecific, 0x00);
    /// 01h: Invalid Queue Identifier.
    pub const QUEUE_ID_INVALID: Self = Self::new(Sct::CommandSpecific, 0x01);
    /// 02h: Invalid Queue Size.
    pub const QUEUE_SIZE_INVALID: Self = Self::new(Sct::CommandSpecific, 0x02);
    /// 03h: Abort Command Limit Exceeded.
    pub const ABORT_LIMIT_EXCEEDED: Self = Self::new(Sct::CommandSpecific, 0x03);
    /// 05h: Asynchronous Event Request Limit Exceeded.
    pub const ASYNC_EVENT_LIMIT_EXCEEDED: Self = Self::new(Sct::CommandSpecific, 0x05);
    /// 06h: Invalid Firmware Slot.
    pub const FIRMWARE_SLOT_INVALID: Self = Self::new(Sct::CommandSpecific, 0x06);
    /// 07h: Invalid Firmware Image.
    pub const FIRMWARE_IMAGE_INVALID: Self = Self::new(Sct::CommandSpecific, 0x07);
    /// 08h: Invalid Interrupt Vector.
    pub const INTERRUPT_VECTOR_INVALID: Self = Self::new(Sct::CommandSpecific, 0x08);
    /// 09h: Invalid Log Page.
    pub const LOG_PAGE_INVALID: Self = Self::new(Sct::CommandSpecific, 0x09);
    /// 0Ah: Invalid Format.
    pub const FORMAT_INVALID: Self = Self::new(Sct::CommandSpecific, 0x0a);
    /// 0Bh: Firmware Activation Requires Conventional Reset.
    pub const FIRMWARE_NEEDS_RESET: Self = Self::new(Sct::CommandSpecific, 0x0b);
    /// 0Ch: Invalid Queue Deletion.
    pub const QUEUE_DELETION_INVALID: Self = Self::new(Sct::CommandSpecific, 0x0c);
    /// 0Dh: Feature Identifier Not Saveable.
    pub const FEATURE_NOT_SAVEABLE: Self = Self::new(Sct::CommandSpecific, 0x0d);
    /// 0Eh: Feature Not Changeable.
    pub const FEATURE_NOT_CHANGEABLE: Self = Self::new(Sct::CommandSpecific, 0x0e);
    /// 0Fh: Feature Not Namespace Specific.
    pub const FEATURE_NOT_NAMESPACE_SPECIFIC: Self = Self::new(Sct::CommandSpecific, 0x0f);
    /// 10h: Firmware Activation Requires NVM Subsystem Reset.
    pub const FIRMWARE_NEEDS_SUBSYSTEM_RESET: Self = Self::new(Sct::CommandSpecific, 0x10);
    /// 11h: Firmware Activation Requires Controller Level Reset.
    pub const FIRMWARE_NEEDS_CONTROLLER_RESET: Self = Self::new(Sct::CommandSpecific, 0x11);
    /// 12h: Firmware Activation Requires Maximum Time Violation.
    pub const FIRMWARE_NEEDS_MAX_TIME: Self = Self::new(Sct::CommandSpecific, 0x12);
    /// 13h: Firmware Activation Prohibited.
    pub const FIRMWARE_PROHIBITED: Self = Self::new(Sct::CommandSpecific, 0x13);
    /// 14h: Overlapping Range.
    pub const OVERLAPPING_RANGE: Self = Self::new(Sct::CommandSpecific, 0x14);
    /// 15h: Namespace Insufficient Capacity.
    pub const NAMESPACE_INSUFFICIENT_CAPACITY: Self = Self::new(Sct::CommandSpecific, 0x15);
    /// 16h: Namespace Identifier Unavailable.
    pub const NAMESPACE_ID_UNAVAILABLE: Self = Self::new(Sct::CommandSpecific, 0x16);
    /// 18h: Namespace Already Attached.
    pub const NAMESPACE_ALREADY_ATTACHED: Self = Self::new(Sct::CommandSpecific, 0x18);
    /// 19h: Namespace Is Private.
    pub const NAMESPACE_IS_PRIVATE: Self = Self::new(Sct::CommandSpecific, 0x19);
    /// 1Ah: Namespace Not Attached.
    pub const NAMESPACE_NOT_ATTACHED: Self = Self::new(Sct::CommandSpecific, 0x1a);
    /// 1Bh: Thin Provisioning Not Supported.
    pub const THIN_PROVISIONING_UNSUPPORTED: Self = Self::new(Sct::CommandSpecific, 0x1b);
    /// 1Ch: Controller List Invalid.
    pub const CONTROLLER_LIST_INVALID: Self = Self::new(Sct::CommandSpecific, 0x1c);
    /// 1Dh: Device Self-test In Progress.
    pub const SELF_TEST_IN_PROGRESS: Self = Self::new(Sct::CommandSpecific, 0x1d);
    /// 1Eh: Boot Partition Write Prohibited.
    pub const BOOT_PARTITION_WRITE_PROHIBITED: Self = Self::new(Sct::CommandSpecific, 0x1e);
    /// 1Fh: Invalid Controller Identifier.
    pub const CONTROLLER_ID_INVALID: Self = Self::new(Sct::CommandSpecific, 0x1f);
    /// 20h: Invalid Secondary Controller State.
    pub const SECONDARY_STATE_INVALID: Self = Self::new(Sct::CommandSpecific, 0x20);
    /// 21h: Invalid Number of Controller Resources.
    pub const CONTROLLER_RESOURCES_INVALID: Self = Self::new(Sct::CommandSpecific, 0x21);
    /// 22h: Invalid Resource Identifier.
    pub const RESOURCE_ID_INVALID: Self = Self::new(Sct::CommandSpecific, 0x22);
    /// 23h: Sanitize Prohibited While Persistent Memory Region is Enabled.
    pub const SANITIZE_PROHIBITED_PMR: Self = Self::new(Sct::CommandSpecific, 0x23);
    /// 24h: ANA Group Identifier Invalid.
    pub const ANA_GROUP_ID_INVALID: Self = Self::new(Sct::CommandSpecific, 0x24);
    /// 25h: ANA Attach Failed.
    pub const ANA_ATTACH_FAILED: Self = Self::new(Sct::CommandSpecific, 0x25);
    /// 26h: Insufficient Capacity.
    pub const INSUFFICIENT_CAPACITY: Self = Self::new(Sct::CommandSpecific, 0x26);
    /// 27h: Namespace Attachment Limit Exceeded.
    pub const NAMESPACE_ATTACHMENT_LIMIT: Self = Self::new(Sct::CommandSpecific, 0x27);
    /// 28h: Prohibition of Command Execution Not Supported.
    pub const LOCKDOWN_UNSUPPORTED: Self = Self::new(Sct::CommandSpecific, 0x28);
    /// 29h: I/O Command Set Not Supported.
    pub const IO_COMMAND_SET_UNSUPPORTED: Self = Self::new(Sct::CommandSpecific, 0x29);
    /// 2Ah: I/O Command Set Not Enabled.
    pub const IO_COMMAND_SET_NOT_ENABLED: Self = Self::new(Sct::CommandSpecific, 0x2a);
    /// 2Bh: I/O Command Set Combination Rejected.
    pub const IO_COMMAND_SET_COMBINATION_REJECTED: Self = Self::new(Sct::CommandSpecific, 0x2b);
    /// 2Ch: Invalid I/O Command Set.
    pub const IO_COMMAND_SET_INVALID: Self = Self::new(Sct::CommandSpecific, 0x2c);
    /// 2Dh: Identifier Unavailable.
    pub const ID_UNAVAILABLE: Self = Self::new(Sct::CommandSpecific, 0x2d);
    /// 2Eh: Namespace Is Dispersed (NVMe Base 2.1 section 3.3.3.2.1).
    pub const NAMESPACE_DISPERSED: Self = Self::new(Sct::CommandSpecific, 0x2e);
    /// 2Fh: Invalid Discovery Information (NVMe Base 2.1 section 3.3.3.2.1).
    pub const DISCOVERY_INFORMATION_INVALID: Self = Self::new(Sct::CommandSpecific, 0x2f);
    /// 30h: Zoning Data Structure Locked (NVMe Base 2.1 section 3.3.3.2.1).
    pub const ZONING_DATA_LOCKED: Self = Self::new(Sct::CommandSpecific, 0x30);
    /// 31h: Zoning Data Structure Not Found (NVMe Base 2.1 section 3.3.3.2.1).
    pub const ZONING_DATA_NOT_FOUND: Self = Self::new(Sct::CommandSpecific, 0x31);
    /// 32h: Insufficient Discovery Resources (NVMe Base 2.1 section 3.3.3.2.1).
    pub const INSUFFICIENT_DISCOVERY_RESOURCES: Self = Self::new(Sct::CommandSpecific, 0x32);
    /// 33h: Requested Function Disabled (NVMe Base 2.1 section 3.3.3.2.1).
    pub const REQUESTED_FUNCTION_DISABLED: Self = Self::new(Sct::CommandSpecific, 0x33);
    /// 34h: ZoneGroup Originator Invalid (NVMe Base 2.1 section 3.3.3.2.1).
    pub const ZONEGROUP_ORIGINATOR_INVALID: Self = Self::new(Sct::CommandSpecific, 0x34);
    /// 80h: Conflicting Attributes (NVM 1.0).
    pub const CONFLICTING_ATTRIBUTES: Self = Self::new(Sct::CommandSpecific, 0x80);
    /// 81h: Invalid Protection Information (NVM 1.0).
    pub const INVALID_PROTECTION_INFORMATION: Self = Self::new(Sct::CommandSpecific, 0x81);
    /// 82h: Attempted Write to Read Only Range (NVM 1.0).
    pub const WRITE_TO_READ_ONLY_RANGE: Self = Self::new(Sct::CommandSpecific, 0x82);
    /// 83h: Command Size Limit Exceeded (NVM 1.0).
    pub const COMMAND_SIZE_LIMIT_EXCEEDED: Self = Self::new(Sct::CommandSpecific, 0x83);
    /// 80h: Connect Incompatible Format (Fabrics).
    pub const CONNECT_INCOMPATIBLE_FORMAT: Self = Self::new(Sct::CommandSpecific, 0x80);
    /// 81h: Connect Controller Busy (Fabrics).
    pub const CONNECT_CONTROLLER_BUSY: Self = Self::new(Sct::CommandSpecific, 0x81);
    /// 82h: Connect Invalid Parameters (Fabrics); DW0 says which, see [`crate::fabrics::ConnectReject`].
    pub const CONNECT_INVALID_PARAMETERS: Self = Self::new(Sct::CommandSpecific, 0x82);
    /// 83h: Connect Restart Discovery (Fabrics).
    pub const CONNECT_RESTART_DISCOVERY: Self = Self::new(Sct::CommandSpecific, 0x83);
    /// 84h: Connect Invalid Host (Fabrics).
    pub const CONNECT_INVALID_HOST: Self = Self::new(Sct::CommandSpecific, 0x84);
    /// 85h: Invalid Queue Type (Fabrics, Disconnect).
    pub const INVALID_QUEUE_TYPE: Self = Self::new(Sct::CommandSpecific, 0x85);
    /// 90h: Discover Restart (Fabrics).
    pub const DISCOVER_RESTART: Self = Self::new(Sct::CommandSpecific, 0x90);
    /// 91h: Authentication Required (Fabrics).
    pub const AUTHENTICATION_REQUIRED: Self = Self::new(Sct::CommandSpecific, 0x91);
}

/// Media and data integrity errors (NVMe Base 2.0 section 3.3.3.2.1).
impl Status {
    /// 80h: Write Fault.
    pub const WRITE_FAULT: Self = Self::new(Sct::Media, 0x80);
    /// 81h: Unrecovered Read Error.
    pub const UNRECOVERED_READ_ERROR: Self = Self::new(Sct::Media, 0x81);
    /// 82h: End-to-end Guard Check Error.
    pub const GUARD_CHECK_ERROR: Self = Self::new(Sct::Media, 0x82);
    /// 83h: End-to-end Application Tag Check Error.
    pub const APP_TAG_CHECK_ERROR: Self = Self::new(Sct::Media, 0x83);
    /// 84h: End-to-end Reference Tag Check Error.
    pub const REF_TAG_CHECK_ERROR: Self = Self::new(Sct::Media, 0x84);
    /// 85h: Compare Failure.
    pub const COMPARE_FAILURE: Self = Self::new(Sct::Media, 0x85);
    /// 86h: Access Denied.
    pub const ACCESS_DENIED: Self = Self::new(Sct::Media, 0x86);
    /// 87h: Deallocated or Unwritten Logical Block.
    pub const DEALLOCATED_BLOCK: Self = Self::new(Sct::Media, 0x87);
    /// 88h: End-to-End Storage Tag Check Error.
    pub const STORAGE_TAG_CHECK_ERROR: Self = Self::new(Sct::Media, 0x88);
}

/// Path related status (NVMe Base 2.0 section 3.3.3.2.1).
impl Status {
    /// 00h: Internal Path Error.
    pub const INTERNAL_PATH_ERROR: Self = Self::new(Sct::Path, 0x00);
    /// 01h: Asymmetric Access Persistent Loss.
    pub const ANA_PERSISTENT_LOSS: Self = Self::new(Sct::Path, 0x01);
    /// 02h: Asymmetric Access Inaccessible.
    pub const ANA_INACCESSIBLE: Self = Self::new(Sct::Path, 0x02);
    /// 03h: Asymmetric Access Transition.
    pub const ANA_TRANSITION: Self = Self::new(Sct::Path, 0x03);
    /// 60h: Controller Pathing Error.
    pub const CONTROLLER_PATHING_ERROR: Self = Self::new(Sct::Path, 0x60);
    /// 70h: Host Pathing Error.
    pub const HOST_PATHING_ERROR: Self = Self::new(Sct::Path, 0x70);
    /// 71h: Command Aborted By Host.
    pub const ABORTED_BY_HOST: Self = Self::new(Sct::Path, 0x71);
}

/// Every named status, ascending.
pub const NAMES: &[(u16, &str)] = &[
    (0x000, "Successful Completion"),
    (0x001, "Invalid Command Opcode"),
    (0x002, "Invalid Field in Command"),
    (0x003, "Command ID Conflict"),
    (0x004, "Data Transfer Error"),
    (0x005, "Commands Aborted due to Power Loss Notification"),
    (0x006, "Internal Error"),
    (0x007, "Command Abort Requested"),
    (0x008, "Command Aborted due to SQ Deletion"),
    (0x009, "Command Aborted due to Failed Fused Command"),
    (0x00a, "Command Aborted due to Missing Fused Command"),
    (0x00b, "Invalid Namespace or Format"),
    (0x00c, "Command Sequence Error"),
    (0x00d, "Invalid SGL Segment Descriptor"),
    (0x00e, "Invalid Number of SGL Descriptors"),
    (0x00f, "Data SGL Length Invalid"),
    (0x010, "Metadata SGL Length Invalid"),
    (0x011, "SGL Descriptor Type Invalid"),
    (0x012, "Invalid Use of Controller Memory Buffer"),
    (0x013, "PRP Offset Invalid"),
    (0x014, "Atomic Write Unit Exceeded"),
    (0x015, "Operation Denied"),
    (0x016, "SGL Offset Invalid"),
    (0x018, "Host Identifier Inconsistent Format"),
    (0x019, "Keep Alive Timer Expired"),
    (0x01a, "Keep Alive Timeout Invalid"),
    (0x01b, "Command Aborted due to Preempt and Abort"),
    (0x01c, "Sanitize Failed"),
    (0x01d, "Sanitize In Progress"),
    (0x01e, "SGL Data Block Granularity Invalid"),
    (0x01f, "Command Not Supported for Queue in CMB"),
    (0x020, "Namespace is Write Protected"),
    (0x021, "Command Interrupted"),
    (0x022, "Transient Transport Error"),
    (0x023, "Command Prohibited by Command and Feature Lockdown"),
    (0x024, "Admin Command Media Not Ready"),
    (0x080, "LBA Out of Range"),
    (0x081, "Capacity Exceeded"),
    (0x082, "Namespace Not Ready"),
    (0x083, "Reservation Conflict"),
    (0x084, "Format In Progress"),
    (0x100, "Completion Queue Invalid"),
    (0x101, "Invalid Queue Identifier"),
    (0x102, "Invalid Queue Size"),
    (0x103, "Abort Command Limit Exceeded"),
    (0x105, "Asynchronous Event Request Limit Exceeded"),
    (0x106, "Invalid Firmware Slot"),
    (0x107, "Invalid Firmware Image"),
    (0x108, "Invalid Interrupt Vector"),
    (0x109, "Invalid Log Page"),
    (0x10a, "Invalid Format"),
    (0x10b, "Firmware Activation Requires Conventional Reset"),
    (0x10c, "Invalid Queue Deletion"),
    (0x10d, "Feature Identifier Not Saveable"),
    (0x10e, "Feature Not Changeable"),
    (0x10f, "Feature Not Namespace Specific"),
    (0x110, "Firmware Activation Requires NVM Subsystem Reset"),
    (0x111, "Firmware Activation Requires Controller Level Reset"),
    (0x112, "Firmware Activation Requires Maximum Time Violation"),
    (0x113, "Firmware Activation Prohibited"),
    (0x114, "Overlapping Range"),
    (0x115, "Namespace Insufficient Capacity"),
    (0x116, "Namespace Identifier Unavailable"),
    (0x118, "Namespace Already Attached"),
    (0x119, "Namespace Is Private"),
    (0x11a, "Namespace Not Attached"),
    (0x11b, "Thin Provisioning Not Supported"),
    (0x11c, "Controller List Invalid"),
    (0x11d, "Device Self-test In Progress"),
    (0x11e, "Boot Partition Write Prohibited"),
    (0x11f, "Invalid Controller Identifier"),
    (0x120, "Invalid Secondary Controller State"),
    (0x121, "Invalid Number of Controller Resources"),
    (0x122, "Invalid Resource Identifier"),
    (0x123, "Sanitize Prohibited While Persistent Memory Region is Enabled"),
    (0x124, "ANA Group Identifier Invalid"),
    (0x125, "ANA Attach Failed"),
    (0x126, "Insufficient Capacity"),
    (0x127, "Namespace Attachment Limit Exceeded"),
    (0x128, "Prohibition of Command Execution Not Supported"),
    (0x129, "I/O Command Set Not Supported"),
    (0x12a, "I/O Command Set Not Enabled"),
    (0x12b, "I/O Command Set Combination Rejected"),
    (0x12c, "Invalid I/O Command Set"),
    (0x12d, "Identifier Unavailable"),
    (0x12e, "Namespace Is Dispersed"),
    (0x12f, "Invalid Discovery Information"),
    (0x130, "Zoning Data Structure Locked"),
    (0x131, "Zoning Data Structure Not Found"),
    (0x132, "Insufficient Discovery Resources"),
    (0x133, "Requested Function Disabled"),
    (0x134, "ZoneGroup Originator Invalid"),
    (0x180, "Conflicting Attributes / Connect Incompatible Format"),
    (0x181, "Invalid Protection Information / Connect Controller Busy"),
    (0x182, "Attempted Write to Read Only Range / Connect Invalid Parameters"),
    (0x183, "Command Size Limit Exceeded / Connect Restart Discovery"),
    (0x184, "Connect Invalid Host"),
    (0x185, "Invalid Queue Type"),
    (0x190, "Discover Restart"),
    (0x191, "Authentication Required"),
    (0x280, "Write Fault"),
    (0x281, "Unrecovered Read Error"),
    (0x282, "End-to-end Guard Check Error"),
    (0x283, "End-to-end Application Tag Check Error"),
    (0x284, "End-to-end Reference Tag Check Error"),
    (0x285, "Compare Failure"),
    (0x286, "Access Denied"),
    (0x287, "Deallocated or Unwritten Logical Block"),
    (0x288, "End-to-End Storage Tag Check Error"),
    (0x300, "Internal Path Error"),
    (0x301, "Asymmetric Access Persistent Loss"),
    (0x302, "Asymmetric Access Inaccessible"),
    (0x303, "Asymmetric Access Transition"),
    (0x360, "Controller Pathing Error"),
    (0x370, "Host Pathing Error"),
    (0x371, "Command Aborted By Host"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_disturb_each_other() {
        for sct in [Sct::Generic, Sct::CommandSpecific, Sct::Media, Sct::Path, Sct::VendorSpecific] {
            for sc in 0..=255 {
                let s = Status::new(sct, sc).with_dnr().with_more().with_crd(2);
                assert_eq!((s.sct(), s.sc(), s.crd(), s.more(), s.dnr()), (sct, sc, 2, true, true));
                assert_eq!(Status::from_wire(s.to_wire()), s);
                assert_eq!(s.code(), Status::new(sct, sc));
            }
        }
    }

    #[test]
    fn wire_value_and_text() {
        // Generic 02h with DNR, phase 0: (1 << 14 | 2) << 1.
        assert_eq!(Status::INVALID_FIELD.with_dnr().to_wire(), 0x8004);
        assert_eq!(Status::COMPARE_FAILURE.to_wire(), 0x050a);
        assert_eq!(Status::COMPARE_FAILURE.with_dnr().to_string(), "Compare Failure (SCT 0x2 SC 0x85 DNR)");
        assert_eq!(Status::new(Sct::VendorSpecific, 1).name(), None);
        assert!(NAMES.is_sorted_by(|a, b| a.0 < b.0));
        assert!(Status(0).with_dnr().is_success() && !Status::INVALID_FIELD.is_success());
    }
}
