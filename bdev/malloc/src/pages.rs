//! The pages of a RAM disk, shared by all cores. Each has a spin lock that is held for one reference count or one
//! 4 KiB copy. This is the crate's only module with unsafe code.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, Ordering};

use cryptfold_reactor::memory::{Buf, Prefetch, SgList, prefetch};

use crate::{PAGE, by_page};

struct Page {
    taken: AtomicBool,
    buf: UnsafeCell<Buf>,
}

// SAFETY: `buf` is only touched by `Page::with`, while `taken` is held.
unsafe impl Sync for Page {}

impl Page {
    #[inline]
    fn with<R>(&self, f: impl FnOnce(&mut Buf) -> R) -> R {
        let mut spins = 0u32;
        while self.taken.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            spins += 1;
            if spins > 1000 {
                // The holder may have lost its core.
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        // SAFETY: `taken` is ours until the store below, so nobody else has a reference to the content.
        let result = f(unsafe { &mut *self.buf.get() });
        self.taken.store(false, Ordering::Release);
        result
    }
}

pub(crate) struct Pages(Box<[Page]>);

/// Pages of one I/O that hints are given for: what long transfers touch next, the processor sees by itself.
const HINTED_PAGES: usize = 8;
/// Bytes of each lent page that hints are given for; the processor's own prefetching does the rest, and more would push other
/// I/O's data out of the cache.
const HINTED_BYTES: usize = 512;

impl Pages {
    pub fn new(count: usize) -> Pages {
        let page = |_| Page { taken: AtomicBool::new(false), buf: UnsafeCell::new(Buf::alloc_zeroed(PAGE)) };
        Pages((0..count).map(page).collect())
    }

    fn hinted(&self, at: usize, len: usize) -> &[Page] {
        let first = at / PAGE;
        let count = (at % PAGE + len).div_ceil(PAGE).min(HINTED_PAGES);
        &self.0[first..first + count]
    }

    /// First hint of what an I/O will touch: the places of its pages.
    #[inline]
    pub fn hint_places(&self, at: usize, len: usize) {
        prefetch(self.hinted(at, len), Prefetch::Write);
    }

    /// Second hint: the pages' reference counts.
    #[inline]
    pub fn hint_counts(&self, at: usize, len: usize) {
        for page in self.hinted(at, len) {
            page.with(|b| b.prefetch_count());
        }
    }

    /// The bytes from `at`, as they are now; each page is whole, old or new.
    pub fn lend(&self, at: usize, len: usize) -> SgList {
        let mut out = SgList::new();
        let (mut at, end) = (at, at + len);
        while at < end {
            let offset = at % PAGE;
            let n = (PAGE - offset).min(end - at);
            out.push(
                self.0[at / PAGE].with(|b| if n == PAGE { b.clone() } else { b.slice(offset..offset + n) }),
            );
            at += n;
        }
        if len <= HINTED_PAGES * PAGE {
            out.iter().for_each(|buf| prefetch(&buf[..HINTED_BYTES.min(buf.len())], Prefetch::Read));
        }
        out
    }

    /// Replaces the bytes from `at`.
    pub fn write(&self, at: usize, data: SgList) {
        by_page(at, data, |page, offset, piece| {
            let piece = &mut Some(piece);
            let old = self.0[page].with(|b| put(b, offset, piece));
            // Freed outside the lock.
            drop(old);
        });
    }
}

/// Puts a piece into a page; returns what is no longer needed.
fn put(page: &mut Buf, offset: usize, piece: &mut Option<Buf>) -> Option<Buf> {
    let mut new = piece.take()?;
    if new.len() == PAGE && new.is_whole() {
        return Some(std::mem::replace(page, new));
    }
    let range = offset..offset + new.len();
    if let Some(bytes) = page.get_mut() {
        bytes[range].copy_from_slice(&new);
        return Some(new);
    }
    let mut fresh = Buf::alloc(PAGE);
    if let Some(bytes) = fresh.get_mut() {
        bytes[..range.start].copy_from_slice(&page[..range.start]);
        bytes[range.end..].copy_from_slice(&page[range.end..]);
        bytes[range].copy_from_slice(&new);
    }
    std::mem::swap(page, &mut fresh);
    new = fresh;
    Some(new)
}
