//! [`SecretBytes`]: key memory. Pages of its own, locked in RAM, out of core dumps and children, zeroed at the end.

use super::arena;
use std::fmt;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use zeroize::Zeroize;

const PAGE: usize = 4096;

/// Key material. Compared in constant time; never printed.
pub struct SecretBytes {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned by this value alone.
unsafe impl Send for SecretBytes {}
// SAFETY: a shared reference gives only shared slices.
unsafe impl Sync for SecretBytes {}

/// Keeps this process out of core dumps and away from other users' debuggers (`PR_SET_DUMPABLE`): ciphers keep what they
/// derive from keys in memory of their own.
///
/// # Errors
/// The kernel's.
pub fn forbid_core_dumps() -> std::io::Result<()> {
    // SAFETY: the call takes integers only.
    match unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Bytes of stack that [`on_wiped_stack`] overwrites: more than a hash, an HMAC or a base64 text of a key need.
const WIPED_BYTES: usize = 16 << 10;

/// Runs `f`, and overwrites the stack that it used (16 KiB of it): ciphers and hashes are moved around by value and leave copies of
/// what they were given, which a later value that is not filled in everywhere may carry to the heap.
///
/// What `f` returns is moved like anything else: it should be a handle of the secret, not the secret.
#[inline(never)]
pub fn on_wiped_stack<R>(f: impl FnOnce() -> R) -> R {
    #[inline(never)]
    fn below<R>(f: impl FnOnce() -> R) -> R {
        f()
    }
    #[inline(never)]
    fn wipe() {
        let mut stack = [0_u8; WIPED_BYTES];
        std::hint::black_box(&mut stack);
    }
    let result = below(f);
    wipe();
    result
}

impl SecretBytes {
    /// `len` zero bytes. Aborts when the system has no memory; goes on with a warning when it may not be locked.
    pub fn zeroed(len: usize) -> SecretBytes {
        let size = SecretBytes::mapped(len);
        // SAFETY: a new anonymous mapping touches no existing memory.
        let address = unsafe {
            libc::mmap(
                null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let base = NonNull::new(address.cast::<u8>()).filter(|_| address != libc::MAP_FAILED);
        let Some(base) = base else {
            std::alloc::handle_alloc_error(std::alloc::Layout::new::<[u8; PAGE]>())
        };
        arena::no_dump(address as usize, size);
        // SAFETY: both calls concern only the new mapping.
        let locked = unsafe {
            libc::madvise(address, size, libc::MADV_DONTFORK);
            libc::mlock(address, size)
        };
        static SAID: AtomicBool = AtomicBool::new(false);
        if locked != 0 && !SAID.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "keys cannot be locked in RAM and might be swapped out (raise RLIMIT_MEMLOCK): {}",
                std::io::Error::last_os_error()
            );
        }
        SecretBytes { base, len }
    }

    /// A copy of `bytes`; the caller clears its own.
    pub fn from_slice(bytes: &[u8]) -> SecretBytes {
        let mut secret = SecretBytes::zeroed(bytes.len());
        secret.expose_mut().copy_from_slice(bytes);
        secret
    }

    /// Takes over `bytes` and clears the vector.
    pub fn from_vec(mut bytes: Vec<u8>) -> SecretBytes {
        let secret = SecretBytes::from_slice(&bytes);
        bytes.zeroize();
        secret
    }

    /// Fresh bytes from the random source ([`crate::fill_random`]).
    pub fn random(len: usize) -> SecretBytes {
        let mut secret = SecretBytes::zeroed(len);
        crate::fill_random(secret.expose_mut());
        secret
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The key bytes. Do not copy them to ordinary memory.
    pub fn expose(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes are mapped at `base` as long as this value lives.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// The key bytes for filling in.
    pub fn expose_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `expose`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }

    fn mapped(len: usize) -> usize {
        len.max(1).next_multiple_of(PAGE)
    }
}

impl Clone for SecretBytes {
    fn clone(&self) -> SecretBytes {
        SecretBytes::from_slice(self.expose())
    }
}

impl PartialEq for SecretBytes {
    fn eq(&self, other: &SecretBytes) -> bool {
        let difference = self.expose().iter().zip(other.expose()).fold(0, |acc, (a, b)| acc | (a ^ b));
        self.len == other.len && std::hint::black_box(difference) == 0
    }
}

impl Eq for SecretBytes {}

impl Drop for SecretBytes {
    fn drop(&mut self) {
        self.expose_mut().zeroize();
        // SAFETY: the mapping is ours and nobody can use it any more. Unmapping also unlocks.
        unsafe { libc::munmap(self.base.as_ptr().cast(), SecretBytes::mapped(self.len)) };
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes({} bytes, redacted)", self.len)
    }
}
