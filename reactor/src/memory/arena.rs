//! The arena: maps memory from the kernel and cuts it into 2 MiB slabs. Slow path only; one lock.
//!
//! Invariants: a slab belongs to one pool for ever; slab `n` of the table is written before the count exceeds `n`.

use super::{MemoryConfig, SLAB_BYTES};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Slabs that can have a number (the kernel's limit on registered buffers). 32 GiB.
pub const MAX_INDEXED_SLABS: usize = 1 << 14;
/// Growth step when the configured arena is used up.
const CHUNK_BYTES: usize = 64 << 20;
/// Index of a slab that is not in the table.
pub(crate) const NO_INDEX: u16 = u16::MAX;

static SLABS: [AtomicPtr<u8>; MAX_INDEXED_SLABS] = [const { AtomicPtr::new(null_mut()) }; MAX_INDEXED_SLABS];
static SLAB_COUNT: AtomicUsize = AtomicUsize::new(0);
static STATE: Mutex<Arena> =
    Mutex::new(Arena { hugepages: true, free: Vec::new(), mapped: 0, huge: 0, taken: 0, last_kind: None });

struct Arena {
    hugepages: bool,
    /// Mapped ranges not yet cut up: (address, bytes), multiples of a slab.
    free: Vec<(usize, usize)>,
    mapped: usize,
    huge: usize,
    taken: usize,
    last_kind: Option<bool>,
}

/// A 2 MiB piece of the arena, 2 MiB aligned, initialised (zero) memory.
pub(super) struct Slab {
    pub(super) base: NonNull<u8>,
    pub(super) index: u16,
}

pub(super) fn configure(config: &MemoryConfig) {
    let mut arena = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    arena.hugepages = config.hugepages;
    let want = config.arena_bytes.div_ceil(SLAB_BYTES) * SLAB_BYTES;
    while arena.mapped < want {
        let missing = want - arena.mapped;
        arena.grow(missing);
    }
}

pub(super) fn take_slab() -> Slab {
    let mut arena = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    if arena.free.is_empty() {
        arena.grow(CHUNK_BYTES);
    }
    let (address, bytes) = arena.free.pop().expect("grow adds a range or aborts");
    if bytes > SLAB_BYTES {
        arena.free.push((address + SLAB_BYTES, bytes - SLAB_BYTES));
    }
    let base = NonNull::new(address as *mut u8).expect("mmap does not return null");
    let n = arena.taken;
    arena.taken += 1;
    let index = if n < MAX_INDEXED_SLABS {
        SLABS[n].store(base.as_ptr(), Ordering::Relaxed);
        SLAB_COUNT.store(n + 1, Ordering::Release);
        n as u16
    } else {
        NO_INDEX
    };
    Slab { base, index }
}

/// Slabs that are in use so far and have a number: 0 up to this. Only grows.
pub fn slab_count() -> usize {
    SLAB_COUNT.load(Ordering::Acquire)
}

/// Address of slab `n`, which must be below [`slab_count`]: [`super::SLAB_BYTES`] bytes that are never unmapped.
pub fn slab_at(n: usize) -> *mut u8 {
    SLABS[n].load(Ordering::Relaxed)
}

/// (mapped, of which hugetlb, handed to pools), bytes.
pub(super) fn usage() -> (u64, u64, u64) {
    let arena = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    (arena.mapped as u64, arena.huge as u64, (arena.taken * SLAB_BYTES) as u64)
}

impl Arena {
    /// Maps up to `bytes` (at least one slab). Reserved pages may run out half-way, hence "up to".
    fn grow(&mut self, bytes: usize) {
        if self.hugepages {
            let mut size = bytes.max(SLAB_BYTES);
            while size >= SLAB_BYTES {
                if let Some(address) = map(size, libc::MAP_HUGETLB | (21 << libc::MAP_HUGE_SHIFT)) {
                    self.huge += size;
                    self.add(address, size, true);
                    return;
                }
                size = size / 2 / SLAB_BYTES * SLAB_BYTES;
            }
        }
        let size = bytes.max(SLAB_BYTES);
        let address = map_aligned(size);
        self.add(address, size, false);
    }

    fn add(&mut self, address: usize, size: usize, huge: bool) {
        self.mapped += size;
        self.free.push((address, size));
        if self.last_kind == Some(huge) {
            return;
        }
        match (self.last_kind, huge) {
            (_, true) => tracing::info!("I/O memory: reserved 2 MiB hugepages"),
            (None, false) if self.hugepages => tracing::warn!(
                "I/O memory: no reserved hugepages (vm.nr_hugepages); going on with ordinary pages, transparent huge pages asked for"
            ),
            (None, false) => tracing::info!("I/O memory: ordinary pages (hugepages switched off)"),
            (Some(_), false) => {
                tracing::warn!("I/O memory: reserved hugepages used up; growing with ordinary pages")
            }
        }
        self.last_kind = Some(huge);
    }
}

fn map(size: usize, extra_flags: i32) -> Option<usize> {
    // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
    let address = unsafe {
        libc::mmap(
            null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | extra_flags,
            -1,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return None;
    }
    no_dump(address as usize, size);
    Some(address as usize)
}

/// Ordinary pages, 2 MiB aligned so that transparent huge pages can back them. Aborts when the system has no memory.
fn map_aligned(size: usize) -> usize {
    let Some(address) = map(size + SLAB_BYTES, 0) else { out_of_memory(size) };
    let aligned = address.next_multiple_of(SLAB_BYTES);
    let (head, tail) = (aligned - address, address + SLAB_BYTES - aligned);
    // SAFETY: both ranges lie inside the mapping just made, outside of [aligned, aligned + size), and nobody knows them yet.
    unsafe {
        if head > 0 {
            libc::munmap(address as *mut libc::c_void, head);
        }
        if tail > 0 {
            libc::munmap((aligned + size) as *mut libc::c_void, tail);
        }
        libc::madvise(aligned as *mut libc::c_void, size, libc::MADV_HUGEPAGE);
    }
    aligned
}

/// A mapping of its own for one large buffer, zeroed. Aborts when the system has no memory.
pub(super) fn map_large(size: usize) -> NonNull<u8> {
    let Some(address) = map(size, 0) else { out_of_memory(size) };
    if size >= SLAB_BYTES {
        // SAFETY: advice on the mapping just made.
        unsafe { libc::madvise(address as *mut libc::c_void, size, libc::MADV_HUGEPAGE) };
    }
    NonNull::new(address as *mut u8).expect("mmap does not return null")
}

/// SAFETY: `base` and `size` must be those of [`map_large`], and nothing may use the memory any more.
pub(super) unsafe fn unmap_large(base: NonNull<u8>, size: usize) {
    // SAFETY: by this function's contract.
    unsafe { libc::munmap(base.as_ptr().cast(), size) };
}

/// A read-only mapping of zeroes that the kernel backs with its shared zero page.
pub(super) fn map_zeroes(size: usize) -> NonNull<u8> {
    let base = map_large(size);
    // SAFETY: the mapping was just made and nobody holds a mutable reference to it.
    unsafe { libc::mprotect(base.as_ptr().cast(), size, libc::PROT_READ) };
    base
}

/// Takes memory out of core dumps; says so once if the kernel refuses.
pub(super) fn no_dump(address: usize, size: usize) {
    static SAID: AtomicBool = AtomicBool::new(false);
    // SAFETY: advice on a mapping of ours; MADV_DONTDUMP does not change contents.
    let result = unsafe { libc::madvise(address as *mut libc::c_void, size, libc::MADV_DONTDUMP) };
    if result != 0 && !SAID.swap(true, Ordering::Relaxed) {
        tracing::warn!("I/O memory cannot be excluded from core dumps: {}", std::io::Error::last_os_error());
    }
}

fn out_of_memory(size: usize) -> ! {
    match std::alloc::Layout::from_size_align(size, SLAB_BYTES) {
        Ok(layout) => std::alloc::handle_alloc_error(layout),
        Err(_) => std::process::abort(),
    }
}
