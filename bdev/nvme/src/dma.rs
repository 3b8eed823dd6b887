//! Memory that a controller reads and writes while we do: queues, lists, buffers of admin commands. One of the crate's three
//! modules with unsafe code.
//!
//! Invariants: the memory is the arena's, which is never unmapped; a [`DmaBuf`] is touched by volatile accesses only, never by
//! reference; data buffers that a command names are owned by that command's slot until the controller has completed it, has
//! been disabled or is gone.

use std::cell::Cell;
use std::marker::PhantomData;

use cryptfold_reactor::memory::{Buf, SLAB_BYTES, slab_at, slab_count};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::bus::{self, Bus, BusError};

/// Zeroed memory in the arena, at a bus address, shared with a controller.
pub(crate) struct DmaBuf {
    buf: Buf,
    iova: u64,
    /// Not to be shared between threads: accesses are not atomic.
    _cell: PhantomData<Cell<()>>,
}

impl DmaBuf {
    /// `bytes` (up to 1 MiB) of zeroes, page aligned.
    ///
    /// # Errors
    /// The controller can not be shown the memory.
    pub fn zeroed(bus: &dyn Bus, bytes: usize) -> Result<DmaBuf, BusError> {
        let buf = Buf::alloc_zeroed(bytes);
        let Some(place) = buf.place() else {
            return Err(BusError {
                what: format!("{bytes} bytes of memory for a controller"),
                reason: "the arena is used up (32 GiB can be shared with devices)".into(),
                errno: libc::ENOMEM,
            });
        };
        bus.map(usize::from(place.slab) + 1)?;
        Ok(DmaBuf { iova: bus::iova(bus.window(), place), buf, _cell: PhantomData })
    }

    /// A second view of the same memory, for another reactor, which has its own words in it.
    pub fn share(&self) -> DmaBuf {
        DmaBuf { buf: self.buf.clone(), iova: self.iova, _cell: PhantomData }
    }

    /// Where the controller sees byte 0.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    #[inline]
    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(align_of::<T>()) && offset + size_of::<T>() <= self.buf.len());
        self.buf.as_ptr().wrapping_add(offset).cast_mut().cast()
    }

    /// A number at a byte offset that is aligned to it.
    #[inline]
    pub fn load<T: FromBytes + Copy>(&self, offset: usize) -> T {
        // SAFETY: in bounds and aligned (checked), initialised, and no reference to it exists (module head).
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    /// Stores a number, as [`DmaBuf::load`].
    #[inline]
    pub fn store<T: IntoBytes + Copy>(&self, offset: usize, value: T) {
        // SAFETY: as in `load`.
        unsafe { self.at::<T>(offset).write_volatile(value) }
    }

    /// A structure, copied out.
    pub fn read<T: FromBytes + FromZeros>(&self, offset: usize) -> T {
        let mut value = T::new_zeroed();
        assert!(offset + size_of::<T>() <= self.buf.len());
        // SAFETY: in bounds (checked); any bytes are a valid T; T and the arena do not overlap.
        unsafe {
            let from = self.buf.as_ptr().wrapping_add(offset);
            from.copy_to_nonoverlapping((&raw mut value).cast(), size_of::<T>());
        }
        value
    }

    /// A structure, copied in.
    pub fn write<T: IntoBytes>(&self, offset: usize, value: &T) {
        assert!(offset + size_of::<T>() <= self.buf.len());
        let to = self.buf.as_ptr().wrapping_add(offset).cast_mut();
        // SAFETY: in bounds (checked), no reference to the target exists (module head), no overlap.
        unsafe { (&raw const *value).cast::<u8>().copy_to_nonoverlapping(to, size_of::<T>()) }
    }

    /// The first `len` bytes, copied out.
    pub fn to_vec(&self, len: usize) -> Vec<u8> {
        let mut all = vec![0; len.min(self.buf.len())];
        // SAFETY: in bounds, initialised; no overlap with a fresh vector.
        unsafe { self.buf.as_ptr().copy_to_nonoverlapping(all.as_mut_ptr(), all.len()) };
        all
    }
}

/// The simulated controller's end of the same memory: by bus address.
pub(crate) struct Seen {
    /// Where it sees slab 0.
    pub window: u64,
    /// How many slabs it was shown.
    pub slabs: usize,
}

impl Seen {
    /// Calls `each(address, offset in the range, bytes)` for the parts of a range, slab by slab. False: part of it is not
    /// visible, as an IOMMU would find.
    fn parts(&self, address: u64, len: usize, mut each: impl FnMut(*mut u8, usize, usize)) -> bool {
        let Some(start) = address.checked_sub(self.window) else { return false };
        let visible = (self.slabs.min(slab_count()) * SLAB_BYTES) as u64;
        if start.checked_add(len as u64).is_none_or(|end| end > visible) {
            return false;
        }
        let mut done = 0;
        while done < len {
            let at = start as usize + done;
            let (slab, offset) = (at / SLAB_BYTES, at % SLAB_BYTES);
            let n = (SLAB_BYTES - offset).min(len - done);
            each(slab_at(slab).wrapping_add(offset), done, n);
            done += n;
        }
        true
    }

    /// Reads memory. False: not visible.
    #[must_use]
    pub fn read(&self, address: u64, target: &mut [u8]) -> bool {
        self.parts(address, target.len(), |from, at, n| {
            // SAFETY: within a slab; queues and lists are never referenced (module head), data belongs to its command.
            unsafe { from.copy_to_nonoverlapping(target[at..at + n].as_mut_ptr(), n) }
        })
    }

    /// Writes memory. False: not visible.
    #[must_use]
    pub fn write(&self, address: u64, source: &[u8]) -> bool {
        self.parts(address, source.len(), |to, at, n| {
            // SAFETY: as in `read`; and a command's data buffers have no other owner.
            unsafe { source[at..at + n].as_ptr().copy_to_nonoverlapping(to, n) }
        })
    }
}
