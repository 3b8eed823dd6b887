//! Copies past the caches, for what is not read again soon: an ordinary store first fetches the line that it overwrites, which
//! costs as much of the memory's time as writing it.
//!
//! Invariant: whoever streams has [`fence_streams`] executed on the same thread before another thread or a device may see the
//! bytes. (A block that goes back to the pools unseen needs none: they hand blocks between threads by locked instructions,
//! which wait for streams too.)

/// Copies `from` past the caches where the processor can, and `to` is aligned as whole buffers are.
///
/// # Panics
/// If the lengths differ.
#[inline]
pub fn stream(to: &mut [u8], from: &[u8]) {
    assert_eq!(to.len(), from.len(), "lengths of a copy");
    #[cfg(target_arch = "x86_64")]
    if x86::fits(to) && std::arch::is_x86_feature_detected!("avx") {
        // SAFETY: the processor has AVX, and alignment and length were looked at.
        unsafe { x86::copy(to, from) };
        return;
    }
    to.copy_from_slice(from);
}

/// Orders what was streamed before everything that this thread stores later.
#[inline]
pub fn fence_streams() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: no memory is touched; SSE is part of x86_64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_stream_si256};

    const PART: usize = size_of::<__m256i>();
    /// Two cache lines at a time.
    const PARTS: usize = 4;

    pub fn fits(to: &[u8]) -> bool {
        to.as_ptr().addr().is_multiple_of(64) && to.len().is_multiple_of(PART * PARTS)
    }

    /// # Safety
    /// `to` is one that [`fits`], `from` has its length, and the processor has AVX.
    #[target_feature(enable = "avx")]
    pub unsafe fn copy(to: &mut [u8], from: &[u8]) {
        let parts = to.len() / PART;
        let (to, from) = (to.as_mut_ptr().cast::<__m256i>(), from.as_ptr().cast::<__m256i>());
        for at in (0..parts).step_by(PARTS) {
            // SAFETY: `at + n` is below the number of parts of both, and `to` is aligned.
            unsafe {
                let read = [0, 1, 2, 3].map(|n| _mm256_loadu_si256(from.add(at + n)));
                for (n, part) in read.into_iter().enumerate() {
                    _mm256_stream_si256(to.add(at + n), part);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Buf;

    #[test]
    fn any_length_at_any_place_is_copied_and_nothing_beside_it() {
        let from: Vec<u8> = (0..9000u32).map(|n| (n * 7 + n / 256) as u8).collect();
        for (at, len) in
            [(0, 4096), (64, 128), (0, 8192), (0, 0), (1, 4096), (32, 256), (64, 127), (4096, 4096)]
        {
            let mut buf = Buf::alloc_zeroed(8192 + 64);
            let bytes = buf.get_mut().expect("fresh");
            stream(&mut bytes[at..at + len], &from[3..3 + len]);
            fence_streams();
            assert_eq!(&bytes[at..at + len], &from[3..3 + len], "{len} bytes at {at}");
            assert!(bytes[..at].iter().chain(&bytes[at + len..]).all(|b| *b == 0), "{len} bytes at {at}");
        }
    }
}
