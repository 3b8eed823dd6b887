//! What an I/O ended with: an NVMe status code type and code (NVM Express Base Specification 2.0, section 3.3.3.2.1),
//! so that a device's verdict reaches the host unchanged.

use std::fmt;

/// Outcome of an I/O: NVMe status code type (`sct`, bits 10:8), status code (`sc`, bits 7:0) and Do Not Retry (bit 14).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(u16);

const DNR: u16 = 1 << 14;

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = ($sct:expr, $sc:expr, $text:expr);)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Status = Status(($sct as u16) << 8 | $sc as u16);)*
        }
        fn text(raw: u16) -> Option<&'static str> {
            $(if raw == Status::$name.0 { return Some($text); })*
            None
        }
    };
}

statuses! {
    /// Completed without error.
    SUCCESS = (0, 0x00, "success");
    /// The operation is not supported by this device.
    INVALID_OPCODE = (0, 0x01, "invalid opcode");
    /// A field of the command is not acceptable.
    INVALID_FIELD = (0, 0x02, "invalid field in command");
    /// Data could not be transferred.
    DATA_TRANSFER_ERROR = (0, 0x04, "data transfer error");
    /// A failure inside the device that is none of the others.
    INTERNAL_ERROR = (0, 0x06, "internal device error");
    /// Ended by an Abort command.
    ABORTED_BY_REQUEST = (0, 0x07, "command abort requested");
    /// Ended because its queue went away.
    ABORTED_SQ_DELETION = (0, 0x08, "command aborted due to SQ deletion");
    /// The other half of a fused command failed.
    FAILED_FUSED = (0, 0x09, "command aborted due to failed fused command");
    /// The namespace, or the device below it, is gone.
    INVALID_NAMESPACE = (0, 0x0B, "invalid namespace or format");
    /// The namespace is write protected (read-only).
    NAMESPACE_WRITE_PROTECTED = (0, 0x20, "namespace is write protected");
    /// A transient lack of resources; hosts retry.
    COMMAND_INTERRUPTED = (0, 0x21, "command interrupted");
    /// A transient transport error; hosts retry.
    TRANSIENT_TRANSPORT_ERROR = (0, 0x22, "transient transport error");
    /// The range leaves the device.
    LBA_OUT_OF_RANGE = (0, 0x80, "LBA out of range");
    /// A thin volume found no space in its pool.
    CAPACITY_EXCEEDED = (0, 0x81, "capacity exceeded");
    /// The namespace can not serve I/O now (locked, being recovered).
    NAMESPACE_NOT_READY = (0, 0x82, "namespace not ready");
    /// Conflicts with a reservation.
    RESERVATION_CONFLICT = (0, 0x83, "reservation conflict");
    /// Write of a read-only range.
    WRITE_TO_READ_ONLY = (1, 0x82, "attempted write to read only range");
    /// The device could not store the data.
    WRITE_FAULT = (2, 0x80, "write fault");
    /// The data can not be read back as it was written.
    UNRECOVERED_READ = (2, 0x81, "unrecovered read error");
    /// Compare found a difference.
    COMPARE_FAILURE = (2, 0x85, "compare failure");
    /// Access denied to the namespace or LBA range.
    ACCESS_DENIED = (2, 0x86, "access denied");
    /// Deallocated or never written, and the device reports that as an error.
    DEALLOCATED_BLOCK = (2, 0x87, "deallocated or unwritten logical block");
}

impl Status {
    /// A status from its parts: `sct` 0..=7, `sc` 0..=255.
    pub const fn new(sct: u8, sc: u8) -> Status {
        Status(((sct & 7) as u16) << 8 | sc as u16)
    }
    /// Status code type, 0..=7.
    pub const fn sct(self) -> u8 {
        (self.0 >> 8) as u8 & 7
    }
    /// Status code.
    pub const fn sc(self) -> u8 {
        self.0 as u8
    }
    /// Whether the host is told not to retry.
    pub const fn dnr(self) -> bool {
        self.0 & DNR != 0
    }
    /// The same status with Do Not Retry set.
    #[must_use]
    pub const fn do_not_retry(self) -> Status {
        Status(self.0 | DNR)
    }
    /// Whether the I/O succeeded.
    pub const fn is_ok(self) -> bool {
        self.0 == 0
    }
    /// `Ok` for success, the status itself otherwise.
    pub const fn ok(self) -> Result<(), Status> {
        if self.is_ok() { Ok(()) } else { Err(self) }
    }
    /// The status that a failed system call of a device amounts to. `errno` is positive.
    pub fn from_errno(errno: i32, write: bool) -> Status {
        // Numbers of Linux's asm-generic/errno-base.h; libc is not needed for five of them.
        match errno {
            28 | 122 => Status::CAPACITY_EXCEEDED,
            22 => Status::INVALID_FIELD,
            95 => Status::INVALID_OPCODE,
            125 => Status::ABORTED_BY_REQUEST,
            5 | 61 | 84 if write => Status::WRITE_FAULT,
            5 | 61 | 84 => Status::UNRECOVERED_READ,
            _ => Status::INTERNAL_ERROR,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match text(self.0 & !DNR) {
            Some(t) => write!(f, "{t} (sct {:#x}, sc {:#04x})", self.sct(), self.sc()),
            None => write!(f, "sct {:#x}, sc {:#04x}", self.sct(), self.sc()),
        }
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Status {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_back() {
        let s = Status::COMPARE_FAILURE;
        assert_eq!((s.sct(), s.sc(), s.dnr()), (2, 0x85, false));
        let d = s.do_not_retry();
        assert_eq!((d.sct(), d.sc(), d.dnr()), (2, 0x85, true));
        assert!(!d.is_ok() && d != s);
        assert_eq!(d.to_string(), "compare failure (sct 0x2, sc 0x85)");
    }
}
