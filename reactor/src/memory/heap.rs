//! A heap for libraries that keep keys in memory of their own (a cipher's key schedule begins with the key): its pages are in no core
//! dump and no child, locked in RAM as far as the process may, and zeroed block by block when they are given back.
//!
//! Blocks have the sizes 2^6 to 2^16 and 1.5 times those, with a head of 16 bytes that says how long they are, and are never given
//! back to the system; a larger one is a mapping of its own. One lock: this is for what is set up once and used often.

use std::ptr::{NonNull, null_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::arena;

/// Bytes in front of each block: its length, then [`MARK`]; keeps the alignment of `malloc`.
const HEAD: usize = 16;
/// Says that a block is one of ours.
const MARK: usize = 0x7061_6568_5f79_656b;
const SMALLEST_SHIFT: u32 = 6;
const LARGEST_SHIFT: u32 = 16;
/// Two for each power of two.
const CLASSES: usize = 2 * (LARGEST_SHIFT - SMALLEST_SHIFT) as usize + 1;
/// Bytes that are mapped at once.
const STEP: usize = 1 << 18;
const PAGE: usize = 4096;

struct Heap {
    /// Free blocks by size; the first word of each is the address of the next.
    free: [*mut u8; CLASSES],
    /// What is mapped and was never used.
    rest: *mut u8,
    rest_bytes: usize,
}

// SAFETY: the addresses are of mappings that belong to the heap and are reached under its lock only.
unsafe impl Send for Heap {}

static HEAP: Mutex<Heap> = Mutex::new(Heap { free: [null_mut(); CLASSES], rest: null_mut(), rest_bytes: 0 });

/// Bytes of the block, head included, and its class; no class: a mapping of its own. `None`: nobody has that much.
fn layout(len: usize) -> Option<(usize, Option<usize>)> {
    let whole = len.checked_add(HEAD)?.max(1 << SMALLEST_SHIFT);
    if whole > 1 << LARGEST_SHIFT {
        let bytes = whole.checked_next_multiple_of(PAGE).filter(|b| isize::try_from(*b).is_ok());
        return bytes.map(|bytes| (bytes, None));
    }
    let power = whole.next_power_of_two();
    let class = 2 * (power.trailing_zeros() - SMALLEST_SHIFT) as usize;
    // A cipher's context just misses 512.
    match power / 4 * 3 {
        between if whole <= between => Some((between, Some(class - 1))),
        _ => Some((power, Some(class))),
    }
}

fn map(bytes: usize) -> *mut u8 {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new anonymous mapping touches no existing memory.
    let address = unsafe { libc::mmap(null_mut(), bytes, prot, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return null_mut();
    }
    arena::no_dump(address as usize, bytes);
    // SAFETY: both calls concern only the new mapping.
    unsafe {
        libc::madvise(address, bytes, libc::MADV_DONTFORK);
        libc::mlock(address, bytes);
    }
    address.cast()
}

impl Heap {
    /// Null when there is neither a free block nor enough that was never used.
    fn take(&mut self, bytes: usize, class: usize) -> *mut u8 {
        let first = self.free[class];
        if !first.is_null() {
            // SAFETY: a free block begins with the address of the next one, or null.
            self.free[class] = unsafe { first.cast::<*mut u8>().read() };
            return first;
        }
        if self.rest_bytes < bytes {
            return null_mut();
        }
        let block = self.rest;
        // SAFETY: `bytes` of the rest are left.
        self.rest = unsafe { block.add(bytes) };
        self.rest_bytes -= bytes;
        block
    }
}

fn heap() -> MutexGuard<'static, Heap> {
    HEAP.lock().unwrap_or_else(PoisonError::into_inner)
}

fn block(bytes: usize, class: usize) -> *mut u8 {
    let found = heap().take(bytes, class);
    if !found.is_null() {
        return found;
    }
    // The system takes its time: nobody waits for that.
    let more = map(STEP);
    let mut heap = heap();
    let found = heap.take(bytes, class);
    if more.is_null() || !found.is_null() {
        if !more.is_null() {
            // SAFETY: nobody else has seen this mapping.
            unsafe { libc::munmap(more.cast(), STEP) };
        }
        return found;
    }
    // What was left is too small for this one, and stays unused: 64 KiB at most.
    (heap.rest, heap.rest_bytes) = (more, STEP);
    heap.take(bytes, class)
}

/// `len` bytes, aligned to 16; null when there are none.
pub fn alloc(len: usize) -> *mut u8 {
    let Some((bytes, class)) = layout(len) else { return null_mut() };
    let block = match class {
        Some(class) => block(bytes, class),
        None => map(bytes),
    };
    let Some(block) = NonNull::new(block) else { return null_mut() };
    // SAFETY: the block has 64 bytes or more, is ours alone and aligned to 32.
    unsafe {
        block.cast::<[usize; 2]>().write([len, MARK]);
        block.as_ptr().add(HEAD)
    }
}

/// Whether [`alloc`] has given this: for a library that had memory of `malloc`'s before it was given this heap.
///
/// # Safety
/// `at` is what [`alloc`] has given, or the 8 bytes in front of it are readable and are not [`MARK`] (a length, say).
pub unsafe fn is_own(at: *const u8) -> bool {
    // SAFETY: the caller's.
    unsafe { at.sub(8).cast::<usize>().read_unaligned() == MARK }
}

/// Zeroes memory and gives it back.
///
/// # Safety
/// `at` is null, or what [`alloc`] or [`realloc`] has given and nobody has given back or uses.
pub unsafe fn free(at: *mut u8) {
    if at.is_null() {
        return;
    }
    // SAFETY: the caller's: there is a head in front, which says how long the block is.
    let (block, len) = unsafe { (at.sub(HEAD), at.sub(HEAD).cast::<usize>().read()) };
    let Some((bytes, class)) = layout(len) else { return };
    // SAFETY: the block is ours again, and so long. Volatile: nobody reads it before it is used again.
    unsafe {
        for word in 0..bytes / 8 {
            block.cast::<u64>().add(word).write_volatile(0);
        }
    }
    let Some(class) = class else {
        // SAFETY: a mapping of its own, of this length.
        unsafe { libc::munmap(block.cast(), bytes) };
        return;
    };
    let mut heap = heap();
    // SAFETY: the block is free: its first word is for the list.
    unsafe { block.cast::<*mut u8>().write(heap.free[class]) };
    heap.free[class] = block;
}

/// Memory of another length with the same content; null, and nothing changed, when there is none.
///
/// # Safety
/// As for [`free`].
pub unsafe fn realloc(at: *mut u8, len: usize) -> *mut u8 {
    let new = alloc(len);
    if at.is_null() || new.is_null() {
        return new;
    }
    // SAFETY: the caller's: a head is in front. Both blocks have as many bytes as are copied, and are not the same.
    unsafe {
        let before = at.sub(HEAD).cast::<usize>().read();
        std::ptr::copy_nonoverlapping(at, new, before.min(len));
        free(at);
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_apart_aligned_and_zeroed() {
        let lens = [0, 1, 47, 48, 49, 1000, 65_519, 65_520, 65_521, 300_000];
        let mut blocks = Vec::new();
        for (i, len) in lens.into_iter().cycle().take(200).enumerate() {
            let at = alloc(len);
            assert!(!at.is_null() && (at as usize).is_multiple_of(16));
            // SAFETY: `len` bytes were given.
            unsafe { at.write_bytes(i as u8, len) };
            blocks.push((at, len, i as u8));
        }
        for (at, len, byte) in &mut blocks {
            // SAFETY: as many bytes are there; longer by one, then as before.
            unsafe {
                assert!(std::slice::from_raw_parts(*at, *len).iter().all(|b| b == byte));
                *at = realloc(realloc(*at, *len + 1), *len);
                assert!(std::slice::from_raw_parts(*at, *len).iter().all(|b| b == byte));
            }
        }
        for (at, len, _) in blocks {
            // SAFETY: ours, and the words in front of `[1]` are no mark.
            unsafe { assert!(is_own(at) && !is_own([9_usize, 9, 9].as_ptr().add(1).cast())) };
            // SAFETY: given once; small blocks stay mapped, and all but the first words is zero.
            unsafe {
                free(at);
                if len + HEAD <= 1 << LARGEST_SHIFT {
                    assert!(std::slice::from_raw_parts(at, len).iter().all(|b| *b == 0));
                }
            }
        }
        assert!(alloc(usize::MAX).is_null() && alloc(usize::MAX - HEAD).is_null());
    }
}
