//! [`Buf`]: an owned view of a reference-counted block of memory.
//!
//! Invariants:
//! - `off + len <= block.capacity`.
//! - A mutable slice exists only through `&mut Buf` of a writable block whose count is 1; a block with more references
//!   is read-only for everybody. That is what makes `Buf` both `Send` and `Sync`.
//! - The zero block and [`Buf::immortal`] ones are never freed and not counted, so that sharing them costs no atomic
//!   traffic.

use super::{Prefetch, arena, pool, prefetch};
use std::cell::UnsafeCell;
use std::fmt;
use std::ops::{Deref, Range};
use std::ptr::{NonNull, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Size of the shared region of zeroes. Bytes.
const ZERO_BYTES: usize = 2 << 20;

static LARGE: AtomicU64 = AtomicU64::new(0);
static LENT: AtomicU64 = AtomicU64::new(0);

pub(super) fn large_bytes() -> u64 {
    LARGE.load(Ordering::Relaxed)
}

pub(super) fn lent_blocks() -> u64 {
    LENT.load(Ordering::Relaxed)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// From a pool; the header is immortal.
    Pool,
    /// A mapping of its own; the header is a `Box`.
    Large,
    /// Somebody else's memory, kept alive by `owner`; the header is a `Box`.
    Lent,
    /// The shared zeroes; never counted or freed.
    Zero,
    /// [`Buf::immortal`]: neither counted nor freed.
    Immortal,
}

impl Kind {
    #[inline]
    fn is_counted(self) -> bool {
        !matches!(self, Kind::Zero | Kind::Immortal)
    }
}

/// Header of a block. One cache line: neighbours' counts must not share it.
#[repr(C, align(64))]
pub(super) struct Block {
    refs: AtomicU32,
    kind: Kind,
    class: u8,
    slab: u16,
    data: NonNull<u8>,
    capacity: usize,
    /// Link of the free list; meaningful only while the block is free.
    pub(super) next: UnsafeCell<*mut Block>,
    owner: Option<Box<dyn Send + Sync>>,
}

// SAFETY: the count is atomic; `next` belongs to the one free list that owns the block; the other fields are constant
// while the block is shared; `owner` is Send + Sync.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    pub(super) fn pooled(class: usize, slab: u16, data: NonNull<u8>, capacity: usize) -> Block {
        Block { class: class as u8, slab, ..Block::new(Kind::Pool, 0, data, capacity, None) }
    }

    /// Address of the block's memory.
    #[inline]
    pub(super) fn start(&self) -> NonNull<u8> {
        self.data
    }

    fn new(
        kind: Kind,
        refs: u32,
        data: NonNull<u8>,
        capacity: usize,
        owner: Option<Box<dyn Send + Sync>>,
    ) -> Block {
        Block {
            refs: AtomicU32::new(refs),
            kind,
            class: 0,
            slab: arena::NO_INDEX,
            data,
            capacity,
            next: UnsafeCell::new(null_mut()),
            owner,
        }
    }
}

/// Where in the arena a buffer begins, for devices that know the arena by its slabs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the slab, below [`super::slab_count`].
    pub slab: u16,
    /// Bytes from the slab's start. All of the buffer lies in this slab.
    pub offset: u32,
}

/// Owned view of a reference-counted buffer: 16 bytes, cheap to clone, slice and send between cores.
///
/// Lengths are below 4 GiB. Memory from [`Buf::alloc`] is 4096-byte aligned.
pub struct Buf {
    block: NonNull<Block>,
    off: u32,
    len: u32,
}

// SAFETY: see the module's invariants: shared blocks are read-only and the count is atomic.
unsafe impl Send for Buf {}
// SAFETY: a `&Buf` gives only shared slices and clones.
unsafe impl Sync for Buf {}

impl Buf {
    /// A writable buffer of `len` bytes, 4096-byte aligned, from the current thread's pool. The contents are
    /// unspecified (data of earlier users) but initialised. Aborts only when the system has no memory.
    ///
    /// # Panics
    /// If `len` is 4 GiB or more: lengths from outside must be limited before.
    #[inline]
    pub fn alloc(len: usize) -> Buf {
        match pool::class_for(len) {
            Some(class) if len > 0 => {
                let block = pool::take(class);
                // SAFETY: pool headers are immortal; the block was free, so this thread alone refers to it.
                unsafe { block.as_ref() }.refs.store(1, Ordering::Relaxed);
                Buf { block, off: 0, len: len as u32 }
            }
            _ => Buf::alloc_other(len),
        }
    }

    #[cold]
    fn alloc_other(len: usize) -> Buf {
        if len == 0 {
            return Buf::empty();
        }
        Buf::map(Kind::Large, len)
    }

    fn map(kind: Kind, len: usize) -> Buf {
        let short = u32::try_from(len).expect("a buffer is below 4 GiB");
        let capacity = len.next_multiple_of(super::ALIGNMENT);
        let data = arena::map_large(capacity);
        LARGE.fetch_add(capacity as u64, Ordering::Relaxed);
        let block = Box::new(Block::new(kind, 1, data, capacity, None));
        Buf { block: NonNull::from(Box::leak(block)), off: 0, len: short }
    }

    /// A read-only buffer of `len` bytes (above 0) that live as long as the process, written once by `fill`. Its clones and
    /// slices are not counted: sharing it costs no locked instruction, which would wait for all stores before it.
    ///
    /// # Panics
    /// As [`Buf::alloc`]; if `len` is 0.
    pub fn immortal(len: usize, fill: impl FnOnce(&mut [u8])) -> Buf {
        assert!(len > 0, "an immortal buffer has bytes");
        let buf = Buf::map(Kind::Immortal, len);
        // SAFETY: fresh zeroed memory of `len` bytes that nobody else refers to yet.
        fill(unsafe { std::slice::from_raw_parts_mut(buf.as_ptr().cast_mut(), len) });
        buf
    }

    /// A writable buffer of `len` zero bytes. See [`Buf::zeroes`] for one that is only read.
    pub fn alloc_zeroed(len: usize) -> Buf {
        let mut buf = Buf::alloc(len);
        if buf.block().kind == Kind::Pool {
            buf.get_mut().expect("a fresh pool buffer is writable").fill(0);
        }
        buf
    }

    /// A writable copy of `bytes`.
    pub fn from_slice(bytes: &[u8]) -> Buf {
        let mut buf = Buf::alloc(bytes.len());
        if let Some(target) = buf.get_mut() {
            target.copy_from_slice(bytes);
        }
        buf
    }

    /// A read-only buffer of `len` zero bytes: a view of one shared region up to 2 MiB, allocated above.
    #[inline]
    pub fn zeroes(len: usize) -> Buf {
        if len <= ZERO_BYTES {
            Buf { block: zero_block(), off: 0, len: len as u32 }
        } else {
            Buf::alloc_zeroed(len)
        }
    }

    /// A buffer without bytes.
    pub fn empty() -> Buf {
        Buf::zeroes(0)
    }

    /// A read-only buffer over memory lent by `owner`, which is dropped with the last reference (on that thread).
    ///
    /// Allocates a header: lend a large region once and [`Buf::slice`] it, rather than once per I/O.
    ///
    /// # Safety
    /// `len` bytes (below 4 GiB) at `ptr` are initialised and stay readable until `owner` is dropped. Nobody writes
    /// them while a slice obtained from the buffer is in use, except where the reader treats the bytes as racy by
    /// contract (kernel I/O on a RAM disk that is being overwritten).
    pub unsafe fn from_owner(ptr: *const u8, len: usize, owner: Box<dyn Send + Sync>) -> Buf {
        let short = u32::try_from(len).expect("a buffer is below 4 GiB");
        let data = NonNull::new(ptr.cast_mut()).expect("lent memory is not null");
        LENT.fetch_add(1, Ordering::Relaxed);
        let block = Box::new(Block::new(Kind::Lent, 1, data, len, Some(owner)));
        Buf { block: NonNull::from(Box::leak(block)), off: 0, len: short }
    }

    #[inline]
    fn block(&self) -> &Block {
        // SAFETY: this Buf holds a reference (or the block is never freed), so the header lives.
        unsafe { self.block.as_ref() }
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    #[inline]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: off + len <= capacity, initialised memory, and read-only while shared (module invariants).
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len()) }
    }

    /// Address of the first byte. Valid while this buffer or a clone lives.
    #[inline]
    pub fn as_ptr(&self) -> *const u8 {
        // SAFETY: off <= capacity.
        unsafe { self.block().data.as_ptr().add(self.off as usize) }
    }

    /// Asks for the reference count to be brought into the cache, before a clone or a drop. See [`super::prefetch()`] for
    /// the bytes.
    #[inline]
    pub fn prefetch_count(&self) {
        prefetch::line(self.block.as_ptr().cast_const().cast(), Prefetch::Write);
    }

    /// The buffer as one word, for tables of many: only one that shows all of a pool's block. Nothing is counted down.
    ///
    /// # Errors
    /// The buffer itself, if it is another kind.
    #[inline]
    pub fn into_raw(self) -> Result<NonNull<()>, Buf> {
        let block = self.block();
        if block.kind != Kind::Pool || self.off != 0 || self.len() != block.capacity {
            return Err(self);
        }
        Ok(std::mem::ManuallyDrop::new(self).block.cast())
    }

    /// The buffer that a word stands for.
    ///
    /// # Safety
    /// The word is from [`Buf::into_raw`], and each is taken back once.
    #[inline]
    pub unsafe fn from_raw(raw: NonNull<()>) -> Buf {
        let block = raw.cast::<Block>();
        // SAFETY: pool headers are immortal.
        let len = unsafe { block.as_ref() }.capacity as u32;
        Buf { block, off: 0, len }
    }

    /// [`Buf::prefetch_count`] for a buffer that may be gone: a hint reads nothing.
    #[inline]
    pub fn prefetch_raw(raw: *const ()) {
        prefetch::line(raw.cast(), Prefetch::Write);
    }

    /// A second view of a part of the bytes.
    ///
    /// # Panics
    /// If the range is out of bounds.
    #[inline]
    pub fn slice(&self, range: Range<usize>) -> Buf {
        assert!(
            range.start <= range.end && range.end <= self.len(),
            "slice {range:?} of a buffer of {} bytes",
            self.len
        );
        let mut part = self.clone();
        part.off += range.start as u32;
        part.len = (range.end - range.start) as u32;
        part
    }

    /// Cuts off and returns the first `n` bytes; both parts share the block.
    ///
    /// # Panics
    /// If `n` exceeds the length.
    pub fn split_to(&mut self, n: usize) -> Buf {
        let head = self.slice(0..n);
        self.off += n as u32;
        self.len -= n as u32;
        head
    }

    /// Keeps the first `len` bytes; no effect when there are fewer.
    #[inline]
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(u32::try_from(len).unwrap_or(u32::MAX));
    }

    /// Whether this is the only reference to a writable block.
    #[inline]
    pub fn is_unique(&self) -> bool {
        matches!(self.block().kind, Kind::Pool | Kind::Large) && !self.is_shared()
    }

    /// Whether there are other references to the block, writable or not. What is not counted (zeroes) is not shared.
    #[inline]
    pub fn is_shared(&self) -> bool {
        let block = self.block();
        block.kind.is_counted() && block.refs.load(Ordering::Acquire) != 1
    }

    /// Whether this is the only reference to a writable block and shows all of it: keeping the view wastes no memory.
    #[inline]
    pub fn is_whole(&self) -> bool {
        self.is_unique() && self.len() == self.block().capacity
    }

    /// The bytes for writing, when this is the only reference to a writable block (not zeroes, not lent memory).
    #[inline]
    pub fn get_mut(&mut self) -> Option<&mut [u8]> {
        if !self.is_unique() {
            return None;
        }
        // SAFETY: unique (acquire pairs with the release of the dropped references), writable, and borrowed mutably.
        Some(unsafe { std::slice::from_raw_parts_mut(self.as_ptr().cast_mut(), self.len()) })
    }

    /// The bytes for writing; copies them into a fresh buffer first when they are shared or read-only.
    pub fn make_mut(&mut self) -> &mut [u8] {
        if !self.is_unique() {
            *self = Buf::from_slice(self);
        }
        // An empty buffer has no writable block, and needs none.
        self.get_mut().unwrap_or_default()
    }

    /// Whether all bytes are zero. Immediate for [`Buf::zeroes`].
    pub fn is_zero(&self) -> bool {
        self.block().kind == Kind::Zero || is_zero(self)
    }

    /// Index of the arena slab that holds the bytes: the index of the registered buffer in a ring.
    pub(crate) fn slab_index(&self) -> Option<u16> {
        let block = self.block();
        (block.kind == Kind::Pool && block.slab != arena::NO_INDEX).then_some(block.slab)
    }

    /// Where in the arena the bytes begin. None: outside of it, or in a part that has no number.
    #[inline]
    pub fn place(&self) -> Option<Place> {
        let slab = self.slab_index()?;
        // Slabs are aligned to their size.
        Some(Place { slab, offset: (self.as_ptr().addr() & (super::SLAB_BYTES - 1)) as u32 })
    }

    /// Last reference gone: returns the block to where it came from.
    fn release(block: NonNull<Block>) {
        // SAFETY: the header lives until it is given back below.
        let (kind, class) = unsafe { (block.as_ref().kind, block.as_ref().class) };
        match kind {
            Kind::Pool => pool::give(class as usize, block),
            Kind::Zero | Kind::Immortal => {}
            Kind::Large | Kind::Lent => {
                // SAFETY: headers of these kinds come from Box::leak, and the count is 0: nobody else refers to it.
                let block = unsafe { Box::from_raw(block.as_ptr()) };
                if kind == Kind::Large {
                    LARGE.fetch_sub(block.capacity as u64, Ordering::Relaxed);
                    // SAFETY: data and capacity are those of map_large, and no view is left.
                    unsafe { arena::unmap_large(block.data, block.capacity) };
                } else {
                    LENT.fetch_sub(1, Ordering::Relaxed);
                }
            }
        }
    }
}

impl Clone for Buf {
    #[inline]
    fn clone(&self) -> Buf {
        let block = self.block();
        if block.kind.is_counted() {
            let before = block.refs.fetch_add(1, Ordering::Relaxed);
            // An overflow would free memory in use; 2^31 references mean a leak that must not become that.
            assert!(before < u32::MAX / 2, "too many references to one buffer");
        }
        Buf { ..*self }
    }
}

impl Drop for Buf {
    #[inline]
    fn drop(&mut self) {
        let block = self.block();
        if !block.kind.is_counted() {
            return;
        }
        // A count of 1 is ours and cannot grow behind our back, so the usual case needs no atomic write.
        if block.refs.load(Ordering::Acquire) != 1 {
            if block.refs.fetch_sub(1, Ordering::Release) != 1 {
                return;
            }
            fence(Ordering::Acquire);
        }
        Buf::release(self.block);
    }
}

impl Default for Buf {
    fn default() -> Buf {
        Buf::empty()
    }
}

impl Deref for Buf {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl AsRef<[u8]> for Buf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<&[u8]> for Buf {
    fn from(bytes: &[u8]) -> Buf {
        Buf::from_slice(bytes)
    }
}

/// Contents are plaintext and stay out of logs.
impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

fn zero_block() -> NonNull<Block> {
    static ZERO: OnceLock<&'static Block> = OnceLock::new();
    let block = ZERO.get_or_init(|| {
        let data = arena::map_zeroes(ZERO_BYTES);
        Box::leak(Box::new(Block::new(Kind::Zero, 1, data, ZERO_BYTES, None)))
    });
    NonNull::from(*block)
}

/// Whether all bytes are zero; compiles to wide ORs.
fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<128>();
    blocks.iter().all(|block| block.iter().fold(0, |acc, &byte| acc | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}

const _: () = assert!(size_of::<Buf>() == 16 && size_of::<Block>() == 64);
