//! The AWS-LC engine: AES-256-XTS through `EVP_CIPHER`. All unsafe code of this crate.
//!
//! One `EVP_CIPHER_CTX` per direction, keyed once; a data unit costs an `EVP_CipherInit_ex` that sets only the tweak
//! and an `EVP_Cipher` that runs straight through, without the update call's buffering. AWS-LC cleanses what it frees,
//! key schedules included.
//!
//! Invariant: the contexts are never null, hold an AES-256-XTS key for their direction, and are used by one thread at
//! a time ([`AwsLc`] is not `Sync`).

use std::ffi::{CStr, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::ptr::{self, NonNull};

#[cfg(feature = "fips")]
use aws_lc_fips_sys as ffi;
#[cfg(not(feature = "fips"))]
use aws_lc_sys as ffi;

use cryptfold_reactor::memory::heap;

use super::{EngineError, EngineKind, XtsCipher, XtsEngine, XtsKey, check_unit};

unsafe extern "C" fn allocate(len: usize, _: *const c_char, _: c_int) -> *mut c_void {
    heap::alloc(len).cast()
}

/// What the FIPS module's self-test has allocated before the program began: the 8 bytes in front of it are its length (AWS-LC's `mem.c`,
/// `OPENSSL_MALLOC_PREFIX`), and it holds no keys of ours.
fn is_older(at: *const c_void) -> bool {
    // SAFETY: it is either of the heap or as said.
    cfg!(feature = "fips") && !at.is_null() && !unsafe { heap::is_own(at.cast()) }
}

unsafe extern "C" fn reallocate(at: *mut c_void, len: usize, _: *const c_char, _: c_int) -> *mut c_void {
    if is_older(at) {
        let new = heap::alloc(len);
        if !new.is_null() {
            // SAFETY: both have as many bytes as are copied, and are not the same. The old one stays.
            unsafe {
                let before = at.cast::<u8>().sub(8).cast::<usize>().read_unaligned();
                ptr::copy_nonoverlapping(at.cast::<u8>(), new, before.min(len));
            }
        }
        return new.cast();
    }
    // SAFETY: AWS-LC gives what `allocate` or this has given it.
    unsafe { heap::realloc(at.cast(), len).cast() }
}

unsafe extern "C" fn release(at: *mut c_void, _: *const c_char, _: c_int) {
    // The few bytes that are older stay: `malloc`'s heap must not get what it might not have given.
    if !is_older(at) {
        // SAFETY: as above, and it does not use it any more.
        unsafe { heap::free(at.cast()) }
    }
}

/// Has AWS-LC keep everything in memory that no core dump has ([`heap`]): its key schedules begin with the keys. For the start of a
/// program: what it has allocated before could not be freed. Whether it will.
///
/// # Safety
/// Nothing in this process has used AWS-LC yet (the FIPS module's self-test apart, which runs before `main`).
pub unsafe fn keep_out_of_dumps() -> bool {
    // SAFETY: the three functions belong together; no memory of another allocator comes to them, the caller says.
    unsafe { ffi::CRYPTO_set_mem_functions(Some(allocate), Some(reallocate), Some(release)) == 1 }
}

/// AWS-LC's version: what the FIPS module says, else that of the headers.
pub fn version() -> &'static str {
    #[cfg(feature = "fips")]
    {
        // SAFETY: no arguments; a text that is there for ever.
        let text = unsafe { CStr::from_ptr(ffi::awslc_version_string()) }.to_str().unwrap_or_default();
        text.strip_prefix("AWS-LC FIPS ").unwrap_or(text)
    }
    #[cfg(not(feature = "fips"))]
    {
        let text = CStr::from_bytes_with_nul(ffi::AWSLC_VERSION_NUMBER_STRING).unwrap_or_default();
        text.to_str().unwrap_or_default()
    }
}

/// The version of the FIPS module, if that is what was built in.
pub fn fips_module() -> Option<&'static str> {
    // SAFETY: no arguments, no state.
    (cfg!(feature = "fips") && unsafe { ffi::FIPS_mode() } == 1).then(version)
}

/// Runs AWS-LC's known-answer tests; in the FIPS module these and its integrity test have run before `main`, or there was no `main`.
pub fn self_test() -> bool {
    // SAFETY: no arguments.
    unsafe { ffi::BORINGSSL_self_test() == 1 }
}

/// What `call` gives, and whether the FIPS module has counted an approved service on this thread meanwhile; never, without the module.
pub fn is_approved<T>(call: impl FnOnce() -> T) -> (T, bool) {
    #[cfg(feature = "fips")]
    {
        // SAFETY: no arguments; a counter of this thread.
        let before = unsafe { ffi::FIPS_service_indicator_before_call() };
        let done = call();
        // SAFETY: as above.
        (done, before != unsafe { ffi::FIPS_service_indicator_after_call() })
    }
    #[cfg(not(feature = "fips"))]
    (call(), false)
}

struct Context {
    ctx: NonNull<ffi::EVP_CIPHER_CTX>,
    /// Working state behind the pointer changes under `&self`: not for two threads at once.
    _not_sync: PhantomData<std::cell::Cell<u8>>,
}

// SAFETY: an EVP_CIPHER_CTX is plain heap memory without thread affinity; moving the only handle to it is fine.
unsafe impl Send for Context {}

fn setup_error(cipher: XtsCipher) -> EngineError {
    let mut text = [0 as c_char; 256];
    // SAFETY: the buffer is as long as said, and ERR_error_string_n ends what it writes with a zero; ERR_get_error
    // only pops this thread's error queue.
    let reason = unsafe {
        ffi::ERR_error_string_n(ffi::ERR_get_error(), text.as_mut_ptr(), text.len());
        CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned()
    };
    EngineError::Setup { engine: EngineKind::AwsLc, cipher, reason }
}

impl Context {
    fn new(key: &XtsKey, encrypt: bool) -> Result<Context, EngineError> {
        // SAFETY: EVP_CIPHER_CTX_new returns null or a fresh context that is ours to free.
        let ctx =
            NonNull::new(unsafe { ffi::EVP_CIPHER_CTX_new() }).ok_or_else(|| setup_error(key.cipher()))?;
        let context = Context { ctx, _not_sync: PhantomData };
        debug_assert_eq!(key.bytes().len(), 64);
        // SAFETY: the context is live; AES-256-XTS reads 64 bytes of key, which XtsKey of that cipher has; no IV yet.
        let ok = unsafe {
            ffi::EVP_CipherInit_ex(
                ctx.as_ptr(),
                ffi::EVP_aes_256_xts(),
                ptr::null_mut(),
                key.bytes().as_ptr(),
                ptr::null(),
                i32::from(encrypt),
            )
        };
        if ok == 1 { Ok(context) } else { Err(setup_error(key.cipher())) }
    }

    /// Runs one data unit of `len` bytes from `src` to `dst`, which may be the same address.
    ///
    /// # Safety
    /// `src` is readable and `dst` writable for `len` bytes; they are equal or do not overlap.
    #[inline]
    unsafe fn run(&self, tweak: u128, src: *const u8, dst: *mut u8, len: usize) {
        check_unit(len);
        let iv = tweak.to_le_bytes();
        // SAFETY: the context is live, keyed and used by this thread only (not Sync, and nothing below calls back);
        // the IV has the 16 bytes that XTS reads; the caller vouches for src and dst. XTS writes exactly len bytes,
        // and AWS-LC supports equal addresses.
        let ok = unsafe {
            let ctx = self.ctx.as_ptr();
            ffi::EVP_CipherInit_ex(ctx, ptr::null(), ptr::null_mut(), ptr::null(), iv.as_ptr(), -1) == 1
                && ffi::EVP_Cipher(ctx, dst, src, len) == 1
        };
        // With the length checked there is no way to fail; going on would store plaintext or serve garbage.
        assert!(ok, "AWS-LC refused an XTS data unit of {len} bytes");
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by EVP_CIPHER_CTX_new, freed once.
        unsafe { ffi::EVP_CIPHER_CTX_free(self.ctx.as_ptr()) }
    }
}

/// A key set up on AWS-LC, both directions.
pub struct AwsLc {
    enc: Context,
    dec: Context,
}

impl AwsLc {
    /// Sets up an AES-256-XTS `key`.
    ///
    /// # Errors
    /// When the key is for another cipher, or AWS-LC can not make a context.
    pub fn new(key: &XtsKey) -> Result<AwsLc, EngineError> {
        if !EngineKind::AwsLc.supports(key.cipher()) {
            return Err(EngineError::Unsupported { engine: EngineKind::AwsLc, cipher: key.cipher() });
        }
        Ok(AwsLc { enc: Context::new(key, true)?, dec: Context::new(key, false)? })
    }
}

impl XtsEngine for AwsLc {
    #[inline]
    fn encrypt(&self, tweak: u128, src: &[u8], dst: &mut [u8]) {
        assert_eq!(src.len(), dst.len(), "source and destination of a data unit");
        // SAFETY: both slices have that length, and a shared and a mutable slice can not overlap.
        unsafe { self.enc.run(tweak, src.as_ptr(), dst.as_mut_ptr(), dst.len()) }
    }

    #[inline]
    fn decrypt(&self, tweak: u128, src: &[u8], dst: &mut [u8]) {
        assert_eq!(src.len(), dst.len(), "source and destination of a data unit");
        // SAFETY: both slices have that length, and a shared and a mutable slice can not overlap.
        unsafe { self.dec.run(tweak, src.as_ptr(), dst.as_mut_ptr(), dst.len()) }
    }

    #[inline]
    fn encrypt_in_place(&self, tweak: u128, unit: &mut [u8]) {
        let p = unit.as_mut_ptr();
        // SAFETY: one slice as both source and destination, through one pointer.
        unsafe { self.enc.run(tweak, p, p, unit.len()) }
    }

    #[inline]
    fn decrypt_in_place(&self, tweak: u128, unit: &mut [u8]) {
        let p = unit.as_mut_ptr();
        // SAFETY: one slice as both source and destination, through one pointer.
        unsafe { self.dec.run(tweak, p, p, unit.len()) }
    }
}
