//! Hints to the processor's caches. They change nothing that a program can see.

/// What the memory will be touched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefetch {
    /// To read it.
    Read,
    /// To overwrite it.
    Write,
}

/// Bytes in a cache line; where lines are longer, hints repeat themselves.
const LINE_BYTES: usize = 64;

/// Asks for `value` to be brought into the cache. Worth it when some 100 ns of other work come before its use.
#[inline]
pub fn prefetch<T: ?Sized>(value: &T, purpose: Prefetch) {
    let start = std::ptr::from_ref(value).cast::<u8>();
    let skew = start as usize % LINE_BYTES;
    for at in (0..skew + size_of_val(value)).step_by(LINE_BYTES) {
        line(start.wrapping_sub(skew).wrapping_add(at), purpose);
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn line(address: *const u8, purpose: Prefetch) {
    use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch accesses no memory as the language sees it, and does not fault at any address.
    unsafe {
        match purpose {
            Prefetch::Read => _mm_prefetch::<_MM_HINT_T0>(address.cast()),
            Prefetch::Write => _mm_prefetch::<_MM_HINT_ET0>(address.cast()),
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline]
pub(super) fn line(_address: *const u8, _purpose: Prefetch) {}
