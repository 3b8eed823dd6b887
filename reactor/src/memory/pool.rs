//! Pools of fixed-size blocks: per-thread magazines over global lock-free queues.
//!
//! A thread keeps at most [`FULL_BATCHES`] full batches and one open batch per size class; what is beyond goes to the
//! class's global queue, from where threads refill. So buffers allocated on one core and freed on another circulate
//! instead of piling up, and the usual allocation touches only this thread's lists and the block's own header.
//!
//! Invariants: a block is either owned by exactly one free list (count 0) or referred to by [`super::Buf`]s (count > 0).

use super::arena;
use super::{Prefetch, SLAB_BYTES, buf::Block, prefetch};
use crossbeam::queue::SegQueue;
use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Size of each class, bytes. 132 KiB: a 128 KiB transfer with room for headers.
pub(super) const CLASS_BYTES: [usize; CLASSES] = [4 << 10, 16 << 10, 64 << 10, 132 << 10, 256 << 10, 1 << 20];
const CLASSES: usize = 6;
/// Blocks that move between a thread and the global queue at once.
const BATCH: [u32; CLASSES] = [128, 64, 16, 15, 8, 2];
const FULL_BATCHES: usize = 4;

static GLOBAL: [SegQueue<Batch>; CLASSES] = [const { SegQueue::new() }; CLASSES];
static THREADS: Mutex<Vec<Arc<AtomicI64>>> = Mutex::new(Vec::new());
/// Bytes in use on account of threads that have ended (may be negative: they freed what others allocated).
static ENDED: AtomicI64 = AtomicI64::new(0);

/// The smallest class that holds `len` bytes.
#[inline]
pub(super) fn class_for(len: usize) -> Option<usize> {
    if len <= CLASS_BYTES[0] {
        return Some(0);
    }
    CLASS_BYTES.iter().position(|&size| len <= size)
}

/// A chain of free blocks linked through `Block::next`.
struct Batch {
    head: *mut Block,
    count: u32,
}

// SAFETY: a batch owns its free blocks; they carry no thread affinity.
unsafe impl Send for Batch {}

impl Batch {
    const EMPTY: Batch = Batch { head: std::ptr::null_mut(), count: 0 };

    #[inline]
    fn push(&mut self, block: NonNull<Block>) {
        // SAFETY: the caller hands over a free block: nobody else reads or writes its link.
        unsafe { *block.as_ref().next.get() = self.head };
        self.head = block.as_ptr();
        self.count += 1;
    }

    /// Brings the start of the next block's memory (its translation above all) near while the caller fills this one.
    #[inline]
    fn hint(&self) {
        if let Some(block) = NonNull::new(self.head) {
            // SAFETY: as in `pop`.
            prefetch::line(unsafe { block.as_ref() }.start().as_ptr(), Prefetch::Write);
        }
    }

    #[inline]
    fn pop(&mut self) -> Option<NonNull<Block>> {
        let block = NonNull::new(self.head)?;
        // SAFETY: blocks of a batch are live headers (never freed) owned by the batch.
        self.head = unsafe { *block.as_ref().next.get() };
        self.count -= 1;
        Some(block)
    }
}

struct Magazine {
    open: Batch,
    full: [Batch; FULL_BATCHES],
    full_count: usize,
}

struct Cache {
    classes: UnsafeCell<[Magazine; CLASSES]>,
    /// This thread's allocated minus freed bytes; written by this thread only.
    bytes: UnsafeCell<Option<Arc<AtomicI64>>>,
}

thread_local! {
    static CACHE: Cache = const {
        Cache {
            classes: UnsafeCell::new(
                [const { Magazine { open: Batch::EMPTY, full: [Batch::EMPTY; FULL_BATCHES], full_count: 0 } }; CLASSES],
            ),
            bytes: UnsafeCell::new(None),
        }
    };
}

/// A free block of `class` with count 0; the caller sets the count.
#[inline]
pub(super) fn take(class: usize) -> NonNull<Block> {
    CACHE.try_with(|cache| cache.take(class)).unwrap_or_else(|_| {
        // The thread is ending and its lists are gone.
        ENDED.fetch_add(CLASS_BYTES[class] as i64, Ordering::Relaxed);
        let mut batch = refill(class);
        let block = batch.pop().expect("a refill is not empty");
        if batch.count > 0 {
            GLOBAL[class].push(batch);
        }
        block
    })
}

/// Takes back a block whose count has reached 0.
#[inline]
pub(super) fn give(class: usize, block: NonNull<Block>) {
    let ended = CACHE.try_with(|cache| cache.give(class, block)).is_err();
    if ended {
        ENDED.fetch_sub(CLASS_BYTES[class] as i64, Ordering::Relaxed);
        let mut batch = Batch::EMPTY;
        batch.push(block);
        GLOBAL[class].push(batch);
    }
}

pub(super) fn in_use_bytes() -> u64 {
    let threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    let live: i64 = threads.iter().map(|t| t.load(Ordering::Relaxed)).sum();
    (live + ENDED.load(Ordering::Relaxed)).max(0) as u64
}

impl Cache {
    #[inline]
    fn count(&self, bytes: i64) {
        // SAFETY: `bytes` is touched by this thread only, and no reference to it outlives this call.
        let slot = unsafe { &mut *self.bytes.get() };
        let counter = slot.get_or_insert_with(register_thread);
        counter.store(counter.load(Ordering::Relaxed) + bytes, Ordering::Relaxed);
    }

    #[inline]
    fn take(&self, class: usize) -> NonNull<Block> {
        self.count(CLASS_BYTES[class] as i64);
        // SAFETY: thread-local, and nothing called below re-enters this cache.
        let magazine = unsafe { &mut (&mut *self.classes.get())[class] };
        if let Some(block) = magazine.open.pop() {
            magazine.open.hint();
            return block;
        }
        magazine.open = match magazine.full_count.checked_sub(1) {
            Some(last) => {
                magazine.full_count = last;
                std::mem::replace(&mut magazine.full[last], Batch::EMPTY)
            }
            None => refill(class),
        };
        magazine.open.pop().expect("a refill is not empty")
    }

    #[inline]
    fn give(&self, class: usize, block: NonNull<Block>) {
        self.count(-(CLASS_BYTES[class] as i64));
        // SAFETY: as in `take`.
        let magazine = unsafe { &mut (&mut *self.classes.get())[class] };
        magazine.open.push(block);
        if magazine.open.count >= BATCH[class] {
            let batch = std::mem::replace(&mut magazine.open, Batch::EMPTY);
            if magazine.full_count < FULL_BATCHES {
                magazine.full[magazine.full_count] = batch;
                magazine.full_count += 1;
            } else {
                GLOBAL[class].push(batch);
            }
        }
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        for (class, magazine) in self.classes.get_mut().iter_mut().enumerate() {
            let open = std::mem::replace(&mut magazine.open, Batch::EMPTY);
            let full = magazine.full.iter_mut().map(|batch| std::mem::replace(batch, Batch::EMPTY));
            for batch in full.chain([open]).filter(|batch| batch.count > 0) {
                GLOBAL[class].push(batch);
            }
        }
        if let Some(counter) = self.bytes.get_mut().take() {
            let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
            threads.retain(|other| !Arc::ptr_eq(other, &counter));
            ENDED.fetch_add(counter.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }
}

#[cold]
fn register_thread() -> Arc<AtomicI64> {
    let counter = Arc::new(AtomicI64::new(0));
    THREADS.lock().unwrap_or_else(PoisonError::into_inner).push(counter.clone());
    counter
}

/// A batch from the global queue, or cut from a new slab.
#[cold]
fn refill(class: usize) -> Batch {
    if let Some(batch) = GLOBAL[class].pop() {
        return batch;
    }
    let slab = arena::take_slab();
    let size = CLASS_BYTES[class];
    let headers: &'static [Block] = (0..SLAB_BYTES / size)
        .map(|n| {
            // SAFETY: n * size + size <= SLAB_BYTES, inside the slab.
            let data = unsafe { slab.base.add(n * size) };
            Block::pooled(class, slab.index, data, size)
        })
        .collect::<Vec<_>>()
        .leak();
    let mut batch = Batch::EMPTY;
    for block in headers {
        if batch.count >= BATCH[class] {
            GLOBAL[class].push(std::mem::replace(&mut batch, Batch::EMPTY));
        }
        batch.push(NonNull::from(block));
    }
    batch
}
