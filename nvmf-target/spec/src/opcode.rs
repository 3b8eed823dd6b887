//! Command opcodes. Bits 1:0 of an opcode give the data's direction (NVMe Base 2.0 section 3.3.3.1).

/// Direction of a command's data, bits 1:0 of its opcode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// 00b: no data.
    None,
    /// 01b: host to controller.
    HostToController,
    /// 10b: controller to host.
    ControllerToHost,
    /// 11b: both.
    Bidirectional,
}

impl Direction {
    /// Of an opcode, or of a Fabrics command type (NVMe Base 2.0 section 6).
    pub const fn of(code: u8) -> Self {
        match code & 3 {
            0 => Self::None,
            1 => Self::HostToController,
            2 => Self::ControllerToHost,
            _ => Self::Bidirectional,
        }
    }
}

macro_rules! opcodes {
    ($(#[$meta:meta])* $name:ident { $( $(#[$vmeta:meta])* $variant:ident = $code:literal ),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $( $(#[$vmeta])* $variant = $code ),+ }

        impl $name {
            /// All values, ascending.
            pub const ALL: &[Self] = &[$( Self::$variant ),+];

            /// The value of this code, `None` if unknown.
            pub const fn from_u8(code: u8) -> Option<Self> {
                match code { $( $code => Some(Self::$variant), )+ _ => None }
            }
        }
    };
}
pub(crate) use opcodes;

/// Opcode of every Fabrics command, on any queue (NVMe Base 2.0 section 6).
pub const FABRICS: u8 = 0x7f;

opcodes! {
    /// Admin commands (NVMe Base 2.0 section 5).
    Admin {
        /// Delete I/O Submission Queue (PCIe only).
        DeleteSq = 0x00,
        /// Create I/O Submission Queue (PCIe only).
        CreateSq = 0x01,
        /// Get Log Page.
        GetLogPage = 0x02,
        /// Delete I/O Completion Queue (PCIe only).
        DeleteCq = 0x04,
        /// Create I/O Completion Queue (PCIe only).
        CreateCq = 0x05,
        /// Identify.
        Identify = 0x06,
        /// Abort.
        Abort = 0x08,
        /// Set Features.
        SetFeatures = 0x09,
        /// Get Features.
        GetFeatures = 0x0a,
        /// Asynchronous Event Request.
        AsyncEventRequest = 0x0c,
        /// Namespace Management.
        NamespaceManagement = 0x0d,
        /// Firmware Commit.
        FirmwareCommit = 0x10,
        /// Firmware Image Download.
        FirmwareDownload = 0x11,
        /// Device Self-test.
        DeviceSelfTest = 0x14,
        /// Namespace Attachment.
        NamespaceAttachment = 0x15,
        /// Keep Alive.
        KeepAlive = 0x18,
        /// Directive Send.
        DirectiveSend = 0x19,
        /// Directive Receive.
        DirectiveReceive = 0x1a,
        /// Virtualization Management.
        VirtualizationManagement = 0x1c,
        /// NVMe-MI Send.
        NvmeMiSend = 0x1d,
        /// NVMe-MI Receive.
        NvmeMiReceive = 0x1e,
        /// Capacity Management.
        CapacityManagement = 0x20,
        /// Discovery Information Management.
        DiscoveryInformation = 0x21,
        /// Lockdown.
        Lockdown = 0x24,
        /// Doorbell Buffer Config (PCIe only).
        DoorbellBufferConfig = 0x7c,
        /// Fabrics commands, see [`Fabrics`].
        Fabrics = 0x7f,
        /// Format NVM.
        FormatNvm = 0x80,
        /// Security Send.
        SecuritySend = 0x81,
        /// Security Receive.
        SecurityReceive = 0x82,
        /// Sanitize.
        Sanitize = 0x84,
        /// Get LBA Status.
        GetLbaStatus = 0x86,
    }
}

opcodes! {
    /// I/O commands of the NVM Command Set (NVMe Base 2.0 section 7, NVM 1.0 section 3).
    Io {
        /// Flush.
        Flush = 0x00,
        /// Write.
        Write = 0x01,
        /// Read.
        Read = 0x02,
        /// Write Uncorrectable.
        WriteUncorrectable = 0x04,
        /// Compare.
        Compare = 0x05,
        /// Write Zeroes.
        WriteZeroes = 0x08,
        /// Dataset Management.
        DatasetManagement = 0x09,
        /// Verify.
        Verify = 0x0c,
        /// Reservation Register.
        ReservationRegister = 0x0d,
        /// Reservation Report.
        ReservationReport = 0x0e,
        /// Reservation Acquire.
        ReservationAcquire = 0x11,
        /// Reservation Release.
        ReservationRelease = 0x15,
        /// Copy.
        Copy = 0x19,
        /// Fabrics commands, see [`Fabrics`].
        Fabrics = 0x7f,
    }
}

opcodes! {
    /// Fabrics command types, FCTYPE (NVMe Base 2.0 section 6). Bits 1:0 are the data's direction.
    Fabrics {
        /// Property Set.
        PropertySet = 0x00,
        /// Connect.
        Connect = 0x01,
        /// Property Get.
        PropertyGet = 0x04,
        /// Authentication Send.
        AuthenticationSend = 0x05,
        /// Authentication Receive.
        AuthenticationReceive = 0x06,
        /// Disconnect.
        Disconnect = 0x08,
    }
}
