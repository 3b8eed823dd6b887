//! What a controller looks like from the outside: its registers, its view of our memory, its interrupts.
//!
//! Implemented by [`crate::vfio`] for drives and by [`crate::sim`] for the simulated one. Registers are those of the NVMe Base
//! Specification 2.0 section 3.1.3 and doorbells those of the PCIe Transport Specification 1.0 section 3.1.2. All of the
//! driver's DMA is in the reactor's arena, which a controller sees as one window: slab `n` at `window + n * 2 MiB`.

use std::os::fd::RawFd;
use std::sync::Arc;

use cryptfold_reactor::memory::{Place, SLAB_BYTES};

use crate::elsewhere::Waiting;

/// Offsets of registers, bytes (NVMe Base 2.0 section 3.1.3).
pub mod reg {
    /// Controller Capabilities, 8 bytes.
    pub const CAP: u32 = 0x00;
    /// Version.
    pub const VS: u32 = 0x08;
    /// Controller Configuration.
    pub const CC: u32 = 0x14;
    /// Controller Status.
    pub const CSTS: u32 = 0x1c;
    /// Admin Queue Attributes: ASQS in bits 11:0, ACQS in bits 27:16, both 0's based.
    pub const AQA: u32 = 0x24;
    /// Admin Submission Queue Base Address, 8 bytes.
    pub const ASQ: u32 = 0x28;
    /// Admin Completion Queue Base Address, 8 bytes.
    pub const ACQ: u32 = 0x30;
    /// Controller Ready Timeouts.
    pub const CRTO: u32 = 0x68;
    /// First doorbell.
    pub const DOORBELLS: u32 = 0x1000;
}

/// What any register of a controller that is gone reads as.
pub const ALL_ONES: u32 = u32::MAX;

/// Offset of a doorbell (PCIe Transport 1.0 section 3.1.2.1): the tail of submission queue `qid`, or the head of its completion
/// queue. `dstrd` is CAP.DSTRD.
pub const fn doorbell(qid: u16, completion: bool, dstrd: u32) -> u32 {
    reg::DOORBELLS + (2 * qid as u32 + completion as u32) * (4 << dstrd)
}

/// What wakes a sleeping reactor when a vector fires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// An eventfd.
    Eventfd(RawFd),
    /// Nothing: whoever has a queue there has to poll.
    None,
    /// Nothing is needed: the simulator looks at all pollers before it lets time pass.
    Simulated,
}

/// Refused by the system below.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {reason}")]
pub struct BusError {
    /// What was tried.
    pub what: String,
    /// The answer, and what would help.
    pub reason: String,
    /// Positive errno.
    pub errno: i32,
}

/// Who a controller is, as far as its bus knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Address {
    /// `0000:04:00.0`.
    pub traddr: String,
    /// PCI vendor, device, subsystem vendor and subsystem device.
    pub ids: [u16; 4],
}

/// A controller's registers, memory and interrupts. Any thread.
pub trait Bus: Send + Sync + 'static {
    /// A register. [`ALL_ONES`] once the controller is gone.
    fn read32(&self, offset: u32) -> u32;

    /// Writes a register; nothing happens once the controller is gone.
    fn write32(&self, offset: u32, value: u32);

    /// A register of 8 bytes, low half first.
    fn read64(&self, offset: u32) -> u64 {
        u64::from(self.read32(offset)) | u64::from(self.read32(offset + 4)) << 32
    }

    /// Writes a register of 8 bytes, low half first.
    fn write64(&self, offset: u32, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }

    /// Bytes of registers that there are: no doorbell beyond.
    fn registers_bytes(&self) -> u32;

    /// Where the controller sees slab 0 of the arena.
    fn window(&self) -> u64;

    /// Lets the controller see slabs 0 to `slabs`, each once and for good. May take long: memory is pinned.
    ///
    /// # Errors
    /// The system refuses (limit on locked memory, no room in the window).
    fn map(&self, slabs: usize) -> Result<(), BusError>;

    /// As [`Bus::map`], for a reactor, which does not wait in the system.
    fn map_more(self: Arc<Self>, slabs: usize) -> Waiting<Result<(), BusError>>;

    /// Interrupt vectors.
    fn vectors(&self) -> u16;

    /// Switches interrupts on, all vectors at once; a second call does nothing.
    ///
    /// # Errors
    /// The system refuses.
    fn enable_interrupts(&self) -> Result<(), BusError>;

    /// What `vector` wakes.
    fn interrupt(&self, vector: u16) -> Interrupt;

    /// Resets the function, beyond what its registers can.
    ///
    /// # Errors
    /// It can not be reset.
    fn reset(self: Arc<Self>) -> Waiting<Result<(), BusError>>;

    /// Keeps the controller from reading or writing memory, whatever state it is in, until [`Bus::allow_dma`].
    fn stop_dma(&self);

    /// Lets the controller read and write memory.
    fn allow_dma(&self);

    /// Whether the system has asked to let go of the controller, because it is being removed.
    fn wants_removal(&self) -> bool;

    /// Gives the controller back to the system for good. Registers read as [`ALL_ONES`] from the call on; the system has it when
    /// that was waited for. A second call does nothing.
    fn release(self: Arc<Self>) -> Waiting<()>;

    /// Who it is.
    fn address(&self) -> Address;
}

/// Where a controller whose window begins at `window` sees this place.
#[inline]
pub(crate) fn iova(window: u64, place: Place) -> u64 {
    window + u64::from(place.slab) * SLAB_BYTES as u64 + u64::from(place.offset)
}
