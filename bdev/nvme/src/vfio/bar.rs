//! Registers in our address space, which stay readable when the kernel takes them away.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::null_mut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use super::{failed, refused};
use crate::bus::{ALL_ONES, BusError};
use crate::controller::lock;

/// Register bytes that are mapped, at most: doorbells for thousands of queues.
pub(super) const BAR_BYTES: usize = 64 << 10;

/// A function's registers in our address space.
pub(super) struct Bar {
    base: *mut u8,
    pub bytes: usize,
    slot: usize,
}

// SAFETY: the registers are accessed by volatile reads and writes of whole words only; the range is constant.
unsafe impl Send for Bar {}
// SAFETY: as above.
unsafe impl Sync for Bar {}

/// Ranges of registers, for the SIGBUS handler: address and length; 0 is free.
const MAX_BARS: usize = 256;
static BARS: [(AtomicUsize, AtomicUsize); MAX_BARS] =
    [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; MAX_BARS];

impl Bar {
    pub fn map(device: &File, offset: u64, bytes: usize) -> Result<Bar, BusError> {
        guard_against_sigbus().map_err(|e| failed("cannot guard the registers", &e, ""))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(null_mut(), bytes, protection, libc::MAP_SHARED, device.as_raw_fd(), offset as i64)
        };
        if base == libc::MAP_FAILED {
            return Err(failed("cannot map the registers", &io::Error::last_os_error(), ""));
        }
        let free = |slot: &(AtomicUsize, AtomicUsize)| {
            slot.0.compare_exchange(0, base.addr(), Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let Some(slot) = BARS.iter().position(free) else {
            // SAFETY: the mapping just made, which nobody knows.
            unsafe { libc::munmap(base, bytes) };
            return Err(refused("registers", format!("more than {MAX_BARS} drives"), libc::ENFILE));
        };
        BARS[slot].1.store(bytes, Ordering::Release);
        Ok(Bar { base: base.cast(), bytes, slot })
    }

    #[inline]
    fn word(&self, offset: u32) -> Option<*mut u32> {
        let fits = offset.is_multiple_of(4) && offset as usize + 4 <= self.bytes;
        fits.then(|| self.base.wrapping_add(offset as usize).cast())
    }

    pub fn read(&self, offset: u32) -> u32 {
        // SAFETY: within the mapping and aligned; the range stays mapped (module head).
        self.word(offset).map_or(ALL_ONES, |word| unsafe { word.read_volatile() })
    }

    #[inline]
    pub fn write(&self, offset: u32, value: u32) {
        if let Some(word) = self.word(offset) {
            // SAFETY: as in `read`.
            unsafe { word.write_volatile(value) }
        }
    }

    /// Puts memory of all ones in the registers' place.
    pub fn retire(&self) {
        // SAFETY: the range is this mapping's; nobody holds references into it.
        unsafe { replace(self.base.addr(), self.bytes) };
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        BARS[self.slot].1.store(0, Ordering::Release);
        BARS[self.slot].0.store(0, Ordering::Release);
        // SAFETY: the range is this mapping's, and its owner goes.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}

/// A file of [`BAR_BYTES`] ones, from the first mapping on.
static ONES: AtomicI32 = AtomicI32::new(-1);

/// Replaces a range by memory of all ones, in one step: nobody reads anything else. A single system call.
///
/// # Safety
/// The range is a mapping of registers that nobody refers to, of [`BAR_BYTES`] at most.
unsafe fn replace(address: usize, bytes: usize) -> bool {
    let at: *mut libc::c_void = std::ptr::without_provenance_mut(address);
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_FIXED);
    // SAFETY: by this function's contract.
    unsafe { libc::mmap(at, bytes, protection, flags, ONES.load(Ordering::Acquire), 0) != libc::MAP_FAILED }
}

/// The kernel takes a register mapping away when the function is reset or removed behind our back; the next access is then a
/// SIGBUS, which has to look like a function that is gone instead of ending the process.
fn guard_against_sigbus() -> io::Result<()> {
    static GUARDED: Mutex<bool> = Mutex::new(false);
    let mut guarded = lock(&GUARDED);
    if *guarded {
        return Ok(());
    }
    // SAFETY: makes a descriptor; the name is a string that ends in NUL.
    let fd = unsafe { libc::memfd_create(c"ones".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let ones = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    ones.write_all_at(&[0xff; BAR_BYTES], 0)?;
    ONES.store(ones.into_raw_fd(), Ordering::Release);
    // SAFETY: installs a handler that makes system calls only.
    let installed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &raw const action, null_mut())
    };
    if installed < 0 {
        return Err(io::Error::last_os_error());
    }
    *guarded = true;
    Ok(())
}

extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO.
    let address = unsafe { (*info).si_addr() }.addr();
    for (start, bytes) in &BARS {
        let (start, bytes) = (start.load(Ordering::Acquire), bytes.load(Ordering::Acquire));
        // SAFETY: ranges in the table are register mappings.
        if bytes > 0 && (start..start + bytes).contains(&address) && unsafe { replace(start, bytes) } {
            return;
        }
    }
    // Somebody else's: the default action, when the access is tried again.
    // SAFETY: resets a signal's action.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Registers that the kernel takes away read as all ones, and the process goes on.
    #[test]
    fn registers_that_go_away() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let bar = Bar::map(&file, 0, 8192).unwrap();
        bar.write(0x1000, 7);
        assert_eq!((bar.read(0x1000), bar.read(8192), bar.read(2)), (7, ALL_ONES, ALL_ONES));
        // An access beyond the end of a file is a SIGBUS.
        file.set_len(0).unwrap();
        assert_eq!((bar.read(0x1000), bar.read(0)), (ALL_ONES, ALL_ONES));
        bar.write(0, 5);
        bar.retire();
        assert_eq!(bar.read(0), ALL_ONES);
    }
}
