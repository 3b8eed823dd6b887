//! The pages of a RAM disk, shared by all cores. Each is one word, a buffer, with a lock in its lowest bit that is held for one
//! reference count or one 4 KiB copy; a whole page is replaced without it. This is the crate's only module with unsafe code.

use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, Ordering};

use cryptfold_reactor::memory::{Buf, Prefetch, SgList, fence_streams, prefetch, stream};

use crate::{PAGE, by_page};

/// A buffer from [`Buf::into_raw`]; headers are aligned, so the lowest bit is free.
struct Page(AtomicPtr<()>);

const LOCKED: usize = 1;

fn is_locked(word: *mut ()) -> bool {
    word.addr() & LOCKED != 0
}

/// The word of a buffer that is one whole block of [`PAGE`] bytes, as every page is.
fn word_of(buf: Buf) -> *mut () {
    buf.into_raw().unwrap_or_else(|_| unreachable!("a page is one whole block")).as_ptr()
}

impl Page {
    fn new(buf: Buf) -> Page {
        Page(AtomicPtr::new(word_of(buf)))
    }

    /// Waits a little for who holds the lock.
    #[cold]
    fn wait(&self, spins: &mut u32) {
        *spins += 1;
        if *spins > 1000 {
            // The holder may have lost its core.
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }

    /// Asks for the buffer's count to be brought near.
    #[inline]
    fn hint_count(&self) {
        Buf::prefetch_raw(self.0.load(Ordering::Relaxed).map_addr(|a| a & !LOCKED));
    }

    /// Takes the page's buffer, and the lock with it: [`Page::unlock`] has to put one back.
    #[inline]
    fn lock(&self) -> ManuallyDrop<Buf> {
        let mut spins = 0;
        let word = loop {
            let word = self.0.load(Ordering::Relaxed);
            let locked = word.map_addr(|a| a | LOCKED);
            if !is_locked(word)
                && self.0.compare_exchange_weak(word, locked, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                break word;
            }
            self.wait(&mut spins);
        };
        let raw = NonNull::new(word).expect("a page has a buffer");
        // SAFETY: the word is from `into_raw`. It is ours until `unlock` puts one back for it.
        ManuallyDrop::new(unsafe { Buf::from_raw(raw) })
    }

    /// Puts a buffer into a page that is locked by the caller.
    #[inline]
    fn unlock(&self, buf: ManuallyDrop<Buf>) {
        self.0.store(word_of(ManuallyDrop::into_inner(buf)), Ordering::Release);
    }

    #[inline]
    fn with<R>(&self, f: impl FnOnce(&mut Buf) -> R) -> R {
        let mut buf = self.lock();
        let result = f(&mut buf);
        self.unlock(buf);
        result
    }

    /// Puts a whole page in place of the old one.
    #[inline]
    fn replace(&self, new: Buf) -> Buf {
        let new = word_of(new);
        let mut spins = 0;
        loop {
            let old = self.0.load(Ordering::Relaxed);
            if !is_locked(old)
                && self.0.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            {
                let raw = NonNull::new(old).expect("a page has a buffer");
                // SAFETY: the word is from `into_raw`, and nobody else has it now.
                return unsafe { Buf::from_raw(raw) };
            }
            self.wait(&mut spins);
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        if let Some(raw) = NonNull::new(*self.0.get_mut()) {
            // SAFETY: the word is from `into_raw`; it is not used again.
            drop(unsafe { Buf::from_raw(raw) });
        }
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
        Pages((0..count).map(|_| Page::new(Buf::alloc_zeroed(PAGE))).collect())
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
            page.hint_count();
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
        let mut at = at;
        for mut buf in data {
            let whole = buf.len() / PAGE;
            if at.is_multiple_of(PAGE) && whole > 1 {
                let bytes = buf.split_to(whole * PAGE);
                let pages = &self.0[at / PAGE..at / PAGE + whole];
                let (contents, _) = bytes.as_chunks::<PAGE>();
                pages.chunks(RUN).zip(contents.chunks(RUN)).for_each(|(pages, new)| copy_run(pages, new));
                at += bytes.len();
            }
            let len = buf.len();
            by_page(at, buf.into(), |page, offset, piece| self.write_piece(page, offset, piece));
            at += len;
        }
    }

    /// Replaces the bytes from `at`: the usual case, a page.
    #[inline]
    pub fn write_buf(&self, at: usize, data: Buf) {
        if data.len() == PAGE && at.is_multiple_of(PAGE) {
            self.write_piece(at / PAGE, 0, data);
        } else {
            self.write(at, data.into());
        }
    }

    #[inline]
    fn write_piece(&self, page: usize, offset: usize, piece: Buf) {
        let page = &self.0[page];
        if piece.len() == PAGE && piece.is_whole() {
            drop(page.replace(piece));
            return;
        }
        let piece = &mut Some(piece);
        let old = page.with(|b| put(b, offset, piece));
        // Freed outside the lock.
        drop(old);
    }
}

/// Pages that are copied together.
const RUN: usize = 16;

/// Replaces whole neighbouring pages, at most [`RUN`]. They are locked together, in ascending order: a lock or a count between
/// two copies would wait for the first to reach memory.
fn copy_run(pages: &[Page], new: &[[u8; PAGE]]) {
    pages.iter().for_each(Page::hint_count);
    let mut held: [Option<ManuallyDrop<Buf>>; RUN] = [const { None }; RUN];
    // What was lent out, and goes when nobody holds a lock.
    let mut old: [Option<Buf>; RUN] = [const { None }; RUN];
    for (held, page) in held.iter_mut().zip(pages) {
        *held = Some(page.lock());
    }
    for (at, new) in new.iter().enumerate() {
        let Some(buf) = &mut held[at] else { continue };
        match buf.get_mut() {
            Some(page) => stream(page, new),
            None => old[at] = Some(std::mem::replace(&mut **buf, Buf::from_slice(new))),
        }
    }
    fence_streams();
    for (held, page) in held.into_iter().zip(pages) {
        held.into_iter().for_each(|buf| page.unlock(buf));
    }
}

/// Puts a piece into a page; returns what is no longer needed.
fn put(page: &mut Buf, offset: usize, piece: &mut Option<Buf>) -> Option<Buf> {
    let mut new = piece.take()?;
    let range = offset..offset + new.len();
    if let Some(bytes) = page.get_mut() {
        if range.len() == PAGE {
            stream(bytes, &new);
            fence_streams();
        } else {
            bytes[range].copy_from_slice(&new);
        }
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
