//! Completion queue entry (NVMe Base 2.0 section 3.3.3.2).

use zerocopy::little_endian::{U16, U32, U64};

use crate::ids::{Cid, Qid};
use crate::status::Status;
use crate::wire::wire;

wire! {
    /// 16-byte completion queue entry (NVMe Base 2.0 section 3.3.3.2). On fabrics the phase tag and, without a queue
    /// of its own per SQ, the SQ identifier are reserved (section 3.3.3.2).
    pub struct Cqe: 16 {
        /// DW0, command specific.
        0 => pub dw0: U32,
        /// DW1, command specific.
        4 => pub dw1: U32,
        /// SQHD: submission queue head after this command was taken; FFFFh when flow control is off.
        8 => pub sqhd: U16,
        /// SQID: submission queue identifier; fabrics: reserved.
        10 => pub sqid: U16,
        /// CID of the command.
        12 => pub cid: U16,
        /// Phase tag in bit 0 (fabrics: reserved), status in bits 15:1.
        14 => pub status: U16,
    }
}

impl Cqe {
    /// A completion without a command-specific result.
    pub fn new(cid: Cid, sqhd: u16, status: Status) -> Self {
        Self {
            sqhd: U16::new(sqhd),
            cid: U16::new(cid.0),
            status: U16::new(status.to_wire()),
            ..Default::default()
        }
    }

    /// Sets DW0.
    #[must_use]
    pub fn with_dw0(mut self, dw0: u32) -> Self {
        self.dw0 = U32::new(dw0);
        self
    }

    /// Sets DW0 and DW1 as one 64-bit value (Property Get of an 8-byte property).
    #[must_use]
    pub fn with_result(mut self, value: u64) -> Self {
        self.dw0 = U32::new(value as u32);
        self.dw1 = U32::new((value >> 32) as u32);
        self
    }

    /// DW0 and DW1 as one 64-bit value.
    pub fn result(&self) -> U64 {
        U64::new(u64::from(self.dw0.get()) | u64::from(self.dw1.get()) << 32)
    }

    /// CID.
    pub const fn cid(&self) -> Cid {
        Cid(self.cid.get())
    }

    /// SQID.
    pub const fn sqid(&self) -> Qid {
        Qid(self.sqid.get())
    }

    /// Status, phase tag removed.
    pub const fn status(&self) -> Status {
        Status::from_wire(self.status.get())
    }

    /// Phase tag (PCIe only).
    pub const fn phase(&self) -> bool {
        self.status.get() & 1 != 0
    }
}
