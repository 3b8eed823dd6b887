//! A data log: the open segment of a domain that a core fills with sealed fragments.
//!
//! Owns the open segment, its active buffer, and what has been handed to the device but is not known to be on it.
//!
//! Fragments are sealed straight into the active buffer, byte after byte. A full buffer is written in whole blocks; the
//! started block at its end goes on in the next buffer. A *cut* (durability point) pads to a whole block: a block that
//! may be durable is never written again.
//!
//! Invariants:
//! - every fragment lies whole in one buffer, and that buffer is kept until all of it is on the device;
//! - places are sealed once, ascending; the segment is closed, never reopened;
//! - writes may complete in any order, `Segment::written` only advances over a gapless prefix.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::Status;
use cryptfold_bdev::trace::{self, Stage};
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::block::{BLOCK_BYTES, Block};
use cryptfold_reduce_format::codec::{Codec, Compression, Compressor};
use cryptfold_reduce_format::fragment::{
    self, CHUNK_BYTES, FRAGMENT_HEADER_BYTES, FragmentHeader, MoveError,
};
use cryptfold_reduce_format::ids::{ChunkAddr, Place};
use cryptfold_reduce_format::sealed::{SealError, TAG_BYTES};
use reactor::memory::Buf;
use reactor::sync::{Notify, Semaphore};

use crate::base::Base;
use crate::segments::Segment;

/// Bytes of a buffer: the size of a device write under load.
pub(crate) const BUFFER_BYTES: usize = 256 << 10;
/// Buffers on their way to the device at once, per log.
const IN_FLIGHT: usize = 8;
/// How often a failed write is tried, and how long it waits in between.
const WRITE_TRIES: u32 = 3;
const RETRY_AFTER: Duration = Duration::from_millis(20);

struct Active {
    segment: Arc<Segment>,
    buf: Buf,
    /// Offset of the buffer's first byte in the segment; whole blocks.
    start: u32,
    /// Bytes in the buffer.
    len: usize,
}

/// A buffer that has been handed to the device.
struct Sent {
    segment: Arc<Segment>,
    buf: Buf,
    start: u32,
    /// Bytes that are written by this buffer, from `start` on.
    writes: u32,
    done: bool,
    number: u64,
}

#[derive(Default)]
struct Inner {
    active: Option<Active>,
    sent: VecDeque<Sent>,
    /// Buffers handed to the device, ever.
    submitted: u64,
    /// All of those up to this number are on it.
    completed: u64,
}

/// See the module's head.
pub(crate) struct DataLog {
    base: Base,
    segment_bytes: u32,
    inner: RefCell<Inner>,
    slots: Rc<Semaphore>,
    progress: Notify,
    failed: Cell<Option<Status>>,
}

/// A fragment in the log.
pub(crate) struct Appended {
    pub place: Place,
    pub unit_bytes: u32,
    pub codec: Codec,
}

/// Why nothing was appended.
#[derive(Debug)]
pub(crate) enum NotAppended {
    /// [`DataLog::make_room`] first.
    NoBuffer,
    /// The segment is full or there is none: [`DataLog::begin`] first.
    NoSegment,
    /// The fragment can not be sealed, or not be opened where it was.
    Failed(MoveError),
}

/// Most bytes that a fragment of `chunks` chunks takes.
pub(crate) fn bound(chunks: usize) -> usize {
    FRAGMENT_HEADER_BYTES + 12 + chunks * CHUNK_BYTES + TAG_BYTES
}

impl DataLog {
    pub fn new(base: Base, segment_bytes: u32) -> Rc<DataLog> {
        Rc::new(DataLog {
            base,
            segment_bytes,
            inner: RefCell::default(),
            slots: Rc::new(Semaphore::new(IN_FLIGHT)),
            progress: Notify::new(),
            failed: Cell::new(None),
        })
    }

    /// For measurements: gives up the next `bytes` of the segment, which are not written. The buffer must be empty.
    pub fn skip(&self, bytes: usize) -> Result<Place, NotAppended> {
        let mut inner = self.inner.borrow_mut();
        let Some(active) = &mut inner.active else { return Err(NotAppended::NoSegment) };
        let whole = bytes.next_multiple_of(BLOCK_BYTES);
        if active.start as usize + active.len + whole > self.segment_bytes as usize {
            return Err(NotAppended::NoSegment);
        }
        if active.len > 0 {
            return Err(NotAppended::NoBuffer);
        }
        let place = active.segment.key.place(active.start);
        active.start += whole as u32;
        Ok(place)
    }

    /// Whether `bytes` more (less than a buffer has) can be appended at once, and what to do if not.
    pub fn room_for(&self, bytes: usize) -> Result<(), NotAppended> {
        let inner = self.inner.borrow();
        let Some(active) = &inner.active else { return Err(NotAppended::NoSegment) };
        if active.start as usize + active.len + bytes > self.segment_bytes as usize {
            return Err(NotAppended::NoSegment);
        }
        // A fresh buffer takes it, and there may be one at once.
        let full = active.len + bytes > active.buf.len();
        let under_way = (inner.submitted - inner.completed) as usize;
        if full && under_way >= IN_FLIGHT { Err(NotAppended::NoBuffer) } else { Ok(()) }
    }

    /// Goes on in a new buffer if the active one does not take `bytes` more, which the log has room for.
    fn advance_to(self: &Rc<Self>, bytes: usize) -> Result<(), NotAppended> {
        self.room_for(bytes)?;
        let full = self.inner.borrow().active.as_ref().is_some_and(|a| a.len + bytes > a.buf.len());
        if full {
            self.rotate(false);
        }
        let fits = self.inner.borrow().active.as_ref().is_some_and(|a| a.len + bytes <= a.buf.len());
        if fits { Ok(()) } else { Err(NotAppended::NoBuffer) }
    }

    /// Compresses, seals and appends the chunks in `pieces` (whole chunks, together `chunks` of them).
    pub fn append(
        self: &Rc<Self>,
        first: ChunkAddr,
        chunks: u8,
        pieces: &[&[u8]],
        compressor: &mut Compressor,
        setting: Compression,
    ) -> Result<Appended, NotAppended> {
        self.advance_to(bound(chunks.into()))?;
        let mut inner = self.inner.borrow_mut();
        let Some(active) = &mut inner.active else { return Err(NotAppended::NoSegment) };
        let key = &active.segment.key;
        let offset = active.start + active.len as u32;
        let Some(out) = active.buf.get_mut() else { return Err(NotAppended::NoBuffer) };
        let out = &mut out[active.len..];
        let body_at = fragment::body_at(key);
        let plain = usize::from(chunks) * CHUNK_BYTES;
        let mut begun = trace::begin();
        let compressed = compressor.compress(setting, pieces, &mut out[body_at..body_at + plain]);
        begun.next(Stage::Compress);
        let sealed = match compressed {
            Some((codec, bytes)) => {
                let header = FragmentHeader { first, chunks, codec, body_bytes: bytes as u32 };
                let unit = header.unit_bytes(key);
                fragment::seal_in_place(key, offset, &header, None, &mut out[..unit]).map(|()| (codec, unit))
            }
            None => {
                let header = FragmentHeader { first, chunks, codec: Codec::Raw, body_bytes: plain as u32 };
                let unit = header.unit_bytes(key);
                fragment::seal_fragment(key, offset, &header, pieces, None, &mut out[..unit])
                    .map(|()| (Codec::Raw, unit))
            }
        };
        begun.end(Stage::Seal);
        let (codec, unit) = sealed.map_err(|error: SealError| NotAppended::Failed(error.into()))?;
        active.len += unit;
        let place = active.segment.key.place(offset);
        Ok(Appended { place, unit_bytes: unit as u32, codec })
    }

    /// Moves a fragment here: opens `unit`, which was read from `from` in `old`, and seals its body again.
    pub fn append_moved(
        self: &Rc<Self>,
        old: &Segment,
        from: u32,
        unit: &mut [u8],
    ) -> Result<(FragmentHeader, Appended), NotAppended> {
        let header = FragmentHeader::parse(unit).map_err(|error| NotAppended::Failed(error.into()))?;
        self.advance_to(bound(header.chunks.into()))?;
        let mut inner = self.inner.borrow_mut();
        let Some(active) = &mut inner.active else { return Err(NotAppended::NoSegment) };
        let key = &active.segment.key;
        let offset = active.start + active.len as u32;
        let bytes = header.unit_bytes(key);
        let Some(out) = active.buf.get_mut() else { return Err(NotAppended::NoBuffer) };
        let out = &mut out[active.len..active.len + bytes];
        let header = fragment::move_fragment((&old.key, from), unit, (key, offset), None, out)
            .map_err(NotAppended::Failed)?;
        active.len += bytes;
        let place = active.segment.key.place(offset);
        Ok((header, Appended { place, unit_bytes: bytes as u32, codec: header.codec }))
    }

    /// Goes on in a new segment, whose header block is `header`. The old one must have been finished.
    pub fn begin(self: &Rc<Self>, segment: Arc<Segment>, header: &Block) {
        debug_assert!(self.inner.borrow().active.is_none(), "began a segment before finishing the last");
        let mut buf = Buf::alloc(BUFFER_BYTES.min(self.segment_bytes as usize));
        if let Some(bytes) = buf.get_mut() {
            bytes[..BLOCK_BYTES].copy_from_slice(header);
        }
        self.inner.borrow_mut().active = Some(Active { segment, buf, start: 0, len: BLOCK_BYTES });
    }

    /// Writes out the rest of the segment and gives it up; it takes no more. Returns its number.
    pub fn finish(self: &Rc<Self>) -> Option<Arc<Segment>> {
        self.cut();
        Some(self.inner.borrow_mut().active.take()?.segment)
    }

    /// Sends the active buffer to the device and goes on in a new one. Waits while too many are on their way.
    pub async fn make_room(self: &Rc<Self>) -> Result<(), Status> {
        let permit = self.slots.acquire(1).await;
        drop(permit);
        if let Some(status) = self.failed.get() {
            return Err(status);
        }
        self.rotate(false);
        Ok(())
    }

    /// Pads to a whole block and sends everything; returns the number to wait for with [`DataLog::written`].
    pub fn cut(self: &Rc<Self>) -> u64 {
        self.rotate(true);
        self.inner.borrow().submitted
    }

    /// Waits until all buffers up to `number` are on the device.
    pub async fn written(&self, number: u64) -> Result<(), Status> {
        loop {
            if let Some(status) = self.failed.get() {
                return Err(status);
            }
            if self.inner.borrow().completed >= number {
                return Ok(());
            }
            self.progress.notified().await;
        }
    }

    fn rotate(self: &Rc<Self>, pad: bool) {
        let sent = {
            let mut inner = self.inner.borrow_mut();
            let Some(mut active) = inner.active.take() else { return };
            if active.len == 0 || (!pad && active.len < BLOCK_BYTES) {
                inner.active = Some(active);
                return;
            }
            let whole = if pad {
                let padded = active.len.next_multiple_of(BLOCK_BYTES);
                if let Some(bytes) = active.buf.get_mut() {
                    bytes[active.len..padded].fill(0);
                }
                active.len = padded;
                padded
            } else {
                active.len / BLOCK_BYTES * BLOCK_BYTES
            };
            let tail = active.len - whole;
            let next_start = active.start + whole as u32;
            let room = (self.segment_bytes - next_start) as usize;
            let mut next = Buf::alloc(BUFFER_BYTES.min(room.max(BLOCK_BYTES)));
            if let Some(bytes) = next.get_mut() {
                bytes[..tail].copy_from_slice(&active.buf[whole..active.len]);
            }
            inner.submitted += 1;
            let number = inner.submitted;
            let (segment, start) = (active.segment, active.start);
            let mut buf = active.buf;
            buf.truncate(active.len);
            let data = buf.slice(0..whole);
            let at = segment.start_bytes + u64::from(start);
            inner.sent.push_back(Sent {
                segment: segment.clone(),
                buf,
                start,
                writes: whole as u32,
                done: false,
                number,
            });
            inner.active = Some(Active { segment, buf: next, start: next_start, len: tail });
            (number, at, data)
        };
        let log = self.clone();
        reactor::spawn_local(async move { log.write(sent.0, sent.1, sent.2).await }).detach();
    }

    async fn write(self: Rc<Self>, number: u64, at: u64, data: Buf) {
        let slots = self.slots.clone();
        let _slot = slots.acquire(1).await;
        let mut tries = 0;
        let result = loop {
            tries += 1;
            match self.base.write(at, data.clone(), false).await {
                Err(status) if tries < WRITE_TRIES && self.failed.get().is_none() => {
                    tracing::warn!(offset_bytes = at, %status, "a write of the pool's log failed, trying again");
                    reactor::sleep(RETRY_AFTER).await;
                }
                other => break other,
            }
        };
        if let Err(status) = result {
            tracing::error!(offset_bytes = at, %status, "the pool's device does not take data");
            self.failed.set(Some(status));
            self.progress.notify_waiters();
            return;
        }
        if let Some(sent) = self.inner.borrow_mut().sent.iter_mut().find(|sent| sent.number == number) {
            sent.done = true;
        }
        self.advance();
    }

    /// Moves `written` on and lets go of buffers that nobody needs.
    fn advance(&self) {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        for sent in inner.sent.iter().take_while(|sent| sent.done) {
            if sent.number > inner.completed {
                inner.completed = sent.number;
                sent.segment.set_written(sent.start + sent.writes);
            }
        }
        // The started block at a buffer's end is written by the next one.
        while let Some(sent) = inner.sent.front()
            && sent.done
            && sent.segment.is_written(sent.start + sent.buf.len() as u32)
        {
            inner.sent.pop_front();
        }
        self.progress.notify_waiters();
    }

    /// The `len` bytes at `offset` of `segment`, if this log has them in RAM. A copy while they are in the active buffer.
    pub fn unwritten(&self, segment: &Segment, offset: u32, len: u32) -> Option<Buf> {
        let inner = self.inner.borrow();
        let within = |start: u32, have: usize| {
            let from = offset.checked_sub(start)? as usize;
            (from + len as usize <= have).then_some(from..from + len as usize)
        };
        let same = |other: &Segment| {
            other.key.incarnation() == segment.key.incarnation() && other.number() == segment.number()
        };
        if let Some(active) = inner.active.as_ref().filter(|active| same(&active.segment))
            && let Some(range) = within(active.start, active.len)
        {
            return Some(Buf::from_slice(&active.buf[range]));
        }
        inner
            .sent
            .iter()
            .filter(|sent| same(&sent.segment))
            .find_map(|sent| Some(sent.buf.slice(within(sent.start, sent.buf.len())?)))
    }

    /// Whether the device has refused a write for good.
    pub fn has_failed(&self) -> bool {
        self.failed.get().is_some()
    }

    /// The segment that is being filled.
    pub fn segment(&self) -> Option<Arc<Segment>> {
        self.inner.borrow().active.as_ref().map(|active| active.segment.clone())
    }

    /// Bytes of RAM in buffers.
    pub fn memory_bytes(&self) -> usize {
        let inner = self.inner.borrow();
        (inner.sent.len() + usize::from(inner.active.is_some())) * BUFFER_BYTES
    }
}
