//! One core's end of a file: a fixed set of slots, one per operation in the ring. One of the crate's modules
//! with unsafe code.
//!
//! Invariant: while an entry is in the ring, its slot owns the buffers and the vector that the entry names, and the
//! queue owns the file. The queue lives until all of its I/O is back, because the channel in front of it does.

use std::cell::{OnceCell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{BdevError, Io, Op, Queue, Status};
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reactor::ring;
use io_uring::{opcode, squeue, types};

use crate::file::Backing;

/// Operations in the ring at once, per queue; more wait here.
const SLOTS: u32 = 256;
/// Longest vector that one operation takes (the kernel's UIO_MAXIOV is 1024).
const MAX_PIECES: usize = 256;

#[derive(Default)]
struct Slot {
    io: Option<Box<Io>>,
    /// What the kernel reads into or writes from.
    data: SgList,
    iov: Vec<libc::iovec>,
    /// Bytes that earlier, short, operations moved.
    done: usize,
    /// `data` is an aligned stand-in for the caller's buffers.
    bounced: bool,
}

// The vectors point into `data` of their own slot.
type Slots = Vec<Slot>;

pub(crate) struct UringQueue {
    backing: Arc<Backing>,
    block_size_bytes: u64,
    slots: RefCell<Slots>,
    free: RefCell<Vec<u32>>,
    waiting: RefCell<VecDeque<Box<Io>>>,
    ring: OnceCell<ring::ClientGuard>,
}

impl ring::RingClient for UringQueue {
    fn complete(&self, token: u32, result: i32, _flags: u32) {
        self.completed(token, result);
    }
}

impl UringQueue {
    pub fn open(backing: Arc<Backing>, block_size_bytes: u32) -> Result<Rc<dyn Queue>, BdevError> {
        let queue = Rc::new(UringQueue {
            backing,
            block_size_bytes: u64::from(block_size_bytes),
            slots: RefCell::new((0..SLOTS).map(|_| Slot::default()).collect()),
            free: RefCell::new((0..SLOTS).rev().collect()),
            waiting: RefCell::default(),
            ring: OnceCell::new(),
        });
        let guard = ring::register(queue.clone()).map_err(|e| BdevError::NoResources(e.to_string()))?;
        let _ = queue.ring.set(guard);
        Ok(queue)
    }

    /// Puts an I/O into a slot and its operation into the ring.
    fn start(&self, token: u32, mut io: Box<Io>) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token as usize];
        slot.done = 0;
        slot.bounced = false;
        let bytes = (io.blocks * self.block_size_bytes) as usize;
        match io.op {
            Op::Read if io.data.is_empty() => slot.data = Buf::alloc(bytes).into(),
            Op::Read if self.fits(&io.data) => slot.data = std::mem::take(&mut io.data),
            Op::Read => {
                slot.data = Buf::alloc(bytes).into();
                slot.bounced = true;
            }
            Op::Write if self.fits(&io.data) => slot.data = std::mem::take(&mut io.data),
            Op::Write => slot.data = gather(std::mem::take(&mut io.data)).into(),
            _ => {}
        }
        slot.io = Some(io);
        self.enter(token, slot);
    }

    /// Whether the kernel takes these pieces as they are.
    fn fits(&self, data: &SgList) -> bool {
        let align = self.backing.align_bytes;
        let aligned = |b: &Buf| b.as_ptr().addr().is_multiple_of(align) && b.len().is_multiple_of(align);
        data.segments().len() <= MAX_PIECES && data.iter().all(aligned)
    }

    fn enter(&self, token: u32, slot: &mut Slot) {
        let entry = match self.entry(slot) {
            Ok(entry) => entry,
            Err(status) => {
                // Comes back like any other, but not from inside `submit`: `finish` defers.
                if let Some(io) = slot.io.take() {
                    io.finish(status);
                }
                slot.data = SgList::new();
                return self.free.borrow_mut().push(token);
            }
        };
        let Some(ring) = self.ring.get() else { return };
        // SAFETY: the entry names the file (owned by `backing`), `slot.iov` and the memory of `slot.data`; none of
        // them is touched or freed until `completed` has taken the slot's I/O (module head).
        unsafe { ring.submit(token, entry) };
    }

    fn entry(&self, slot: &mut Slot) -> Result<squeue::Entry, Status> {
        let fd = types::Fd(self.backing.fd());
        let Some(io) = &slot.io else { return Err(Status::INTERNAL_ERROR) };
        let offset = io.lba * self.block_size_bytes + slot.done as u64;
        let len = io.blocks * self.block_size_bytes;
        Ok(match io.op {
            Op::Read => {
                slot.iov = vector(&mut slot.data, slot.done, usize::MAX, true)?;
                match (&slot.iov[..], fixed(&slot.data)) {
                    ([one], Some(index)) => {
                        opcode::ReadFixed::new(fd, one.iov_base.cast(), one.iov_len as u32, index)
                            .offset(offset)
                            .build()
                    }
                    ([one], None) => {
                        opcode::Read::new(fd, one.iov_base.cast(), one.iov_len as u32).offset(offset).build()
                    }
                    (all, _) => opcode::Readv::new(fd, all.as_ptr(), all.len() as u32).offset(offset).build(),
                }
            }
            Op::Write => {
                let flags = if io.fua { libc::RWF_DSYNC } else { 0 };
                slot.iov = vector(&mut slot.data, slot.done, usize::MAX, false)?;
                match (&slot.iov[..], fixed(&slot.data)) {
                    ([one], Some(index)) => opcode::WriteFixed::new(
                        fd,
                        one.iov_base.cast_const().cast(),
                        one.iov_len as u32,
                        index,
                    )
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
                    ([one], None) => {
                        opcode::Write::new(fd, one.iov_base.cast_const().cast(), one.iov_len as u32)
                            .offset(offset)
                            .rw_flags(flags)
                            .build()
                    }
                    (all, _) => opcode::Writev::new(fd, all.as_ptr(), all.len() as u32)
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                }
            }
            Op::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Op::Unmap => fallocate(fd, offset, len, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
            Op::WriteZeroes => {
                fallocate(fd, offset, len, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE)
            }
            // Nothing to bring back to life; ends when what is in the ring has ended is not needed for a file.
            Op::Reset => opcode::Nop::new().build(),
            _ => return Err(Status::INVALID_OPCODE),
        })
    }

    fn completed(&self, token: u32, result: i32) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token as usize];
        let Some(io) = &slot.io else { return };
        let write = io.op != Op::Read;
        let status = if result < 0 {
            match -result {
                libc::EAGAIN | libc::EINTR => return self.enter(token, slot),
                e => Status::from_errno(e, write),
            }
        } else if matches!(io.op, Op::Read | Op::Write) {
            slot.done += result as usize;
            if slot.done < slot.data.len_bytes() {
                if result != 0 {
                    return self.enter(token, slot);
                }
                // The end of a file that has become shorter than the device.
                if write { Status::WRITE_FAULT } else { Status::UNRECOVERED_READ }
            } else {
                Status::SUCCESS
            }
        } else {
            Status::SUCCESS
        };
        self.end(token, slot, status);
        drop(slots);
        self.next();
    }

    fn end(&self, token: u32, slot: &mut Slot, status: Status) {
        let data = std::mem::take(&mut slot.data);
        slot.iov.clear();
        if let Some(mut io) = slot.io.take() {
            let mut status = status;
            if io.op == Op::Read {
                if slot.bounced {
                    let mut out = std::mem::take(&mut io.data);
                    if !out.copy_from(&data) {
                        status = Status::DATA_TRANSFER_ERROR;
                    }
                    io.data = out;
                } else {
                    io.data = data;
                }
            }
            io.finish(status);
        }
        self.free.borrow_mut().push(token);
    }

    fn next(&self) {
        while !self.waiting.borrow().is_empty() {
            let Some(token) = self.free.borrow_mut().pop() else { return };
            match self.waiting.borrow_mut().pop_front() {
                Some(io) => self.start(token, io),
                None => self.free.borrow_mut().push(token),
            }
        }
    }
}

impl Queue for UringQueue {
    fn submit(self: Rc<Self>, io: Box<Io>) {
        let token = self.free.borrow_mut().pop();
        match token {
            Some(token) => self.start(token, io),
            None => self.waiting.borrow_mut().push_back(io),
        }
    }

    fn abort(&self, tag: u64) -> bool {
        let mut waiting = self.waiting.borrow_mut();
        let found = waiting.iter().position(|io| io.tag == tag).and_then(|i| waiting.remove(i));
        found.map(|io| io.finish(Status::ABORTED_BY_REQUEST)).is_some()
    }
}

fn fallocate(fd: types::Fd, offset: u64, len: u64, mode: i32) -> squeue::Entry {
    opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
}

/// Where a single piece is registered with the ring, which saves the kernel from looking up and pinning its pages.
fn fixed(data: &SgList) -> Option<u16> {
    match data.segments() {
        [one] => ring::fixed_buffer_index(one),
        _ => None,
    }
}

/// One aligned buffer with the bytes of all pieces.
pub(crate) fn gather(data: SgList) -> Buf {
    let mut all = Buf::alloc(data.len_bytes());
    if let Some(bytes) = all.get_mut() {
        data.copy_to_slice(bytes);
    }
    all
}

/// The pieces of `len` bytes (or what there is) from byte `skip` on, for the kernel. A read needs buffers that nobody else sees.
pub(crate) fn vector(
    data: &mut SgList,
    mut skip: usize,
    mut len: usize,
    into: bool,
) -> Result<Vec<libc::iovec>, Status> {
    let mut iov = Vec::with_capacity(data.segments().len());
    for piece in data.segments_mut() {
        if into && piece.get_mut().is_none() {
            return Err(Status::DATA_TRANSFER_ERROR);
        }
        if skip >= piece.len() {
            skip -= piece.len();
            continue;
        }
        if len == 0 {
            break;
        }
        let base = piece.as_ptr().wrapping_add(skip).cast_mut().cast();
        let iov_len = (piece.len() - skip).min(len);
        iov.push(libc::iovec { iov_base: base, iov_len });
        len -= iov_len;
        skip = 0;
    }
    Ok(iov)
}
