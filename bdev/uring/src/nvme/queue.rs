//! One core's end of a namespace that the kernel passes commands through to: a fixed set of slots, one per I/O. One of the
//! crate's modules with unsafe code.
//!
//! An I/O that is larger than a command can be goes out piece by piece, one after the other.
//!
//! Invariant: while an entry is in the ring, its slot owns the buffers, the vector and the range that the entry names, and stays
//! where it is; the queue owns the node. The queue lives until all of its I/O is back, because the channel in front of it does.

use std::cell::{OnceCell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{BdevError, Io, Op, Queue, Status};
use cryptfold_bdev_nvme::identity::{self, Target};
use cryptfold_nvmf_spec::dsm::DsmRange;
use cryptfold_nvmf_spec::status::Status as Wire;
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reactor::ring;
use io_uring::{opcode, squeue, types};
use zerocopy::little_endian::{U32, U64};

use super::abi::{self, Command};
use super::node::Node;
use crate::queue::{gather, vector};

/// Commands under way at once, per queue; more wait here.
const SLOTS: u32 = 256;
/// Longest vector of one command; the kernel counts segments, and the rest of a transfer's has to fit.
const MAX_PIECES: usize = 32;
/// Memory page of the kernel, bytes: between two pieces of a vector there has to be the end of one.
const PAGE_BYTES: usize = 4096;
/// How often a command is sent again that the kernel or the drive ended for a reason that is none of its own.
const RETRIES: u8 = 4;

#[derive(Default)]
struct Slot {
    io: Option<Box<Io>>,
    /// What the drive reads or writes.
    data: SgList,
    iov: Vec<libc::iovec>,
    range: DsmRange,
    /// Blocks that earlier commands of this I/O dealt with, and those of the one under way.
    done: u64,
    now: u64,
    /// Of the command under way.
    retries: u8,
    /// `data` is a stand-in for the caller's buffers.
    bounced: bool,
}

pub(crate) struct PassQueue {
    node: Arc<Node>,
    target: Target,
    // Never grows: entries in the ring name ranges in slots.
    slots: RefCell<Box<[Slot]>>,
    free: RefCell<Vec<u32>>,
    waiting: RefCell<VecDeque<Box<Io>>>,
    ring: OnceCell<ring::WideGuard>,
}

impl ring::RingClient for PassQueue {
    fn complete(&self, token: u32, result: i32, _flags: u32) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token as usize];
        let Some(io) = &slot.io else { return };
        match verdict(result, io.op != Op::Read) {
            Verdict::Again if slot.retries < RETRIES => {
                slot.retries += 1;
                self.enter(token, slot);
            }
            Verdict::Ended(Status::SUCCESS) if slot.done + slot.now < io.blocks => {
                slot.done += slot.now;
                slot.retries = 0;
                self.enter(token, slot);
            }
            Verdict::Ended(status) => self.end(token, slot, status),
            Verdict::Again => self.end(token, slot, Status::ABORTED_BY_REQUEST),
        }
        drop(slots);
        self.next();
    }
}

/// What becomes of a command.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Ended(Status),
    /// The kernel ended it with a reset of the drive, or the drive because the kernel had it aborted.
    Again,
}

/// Reads an entry's result: a status of the drive (its 15 bits, positive) or `-errno`.
fn verdict(result: i32, write: bool) -> Verdict {
    if result >= 0 {
        let wire = Wire(result as u16);
        let status = identity::status_of(wire);
        let again = !wire.dnr() && matches!(status, Status::ABORTED_BY_REQUEST | Status::ABORTED_SQ_DELETION);
        return if again { Verdict::Again } else { Verdict::Ended(status) };
    }
    match -result {
        libc::EINTR | libc::EAGAIN => Verdict::Again,
        libc::ENODEV | libc::ENXIO => Verdict::Ended(Status::INVALID_NAMESPACE.do_not_retry()),
        e => Verdict::Ended(Status::from_errno(e, write)),
    }
}

/// Whether one command can take these pieces as they are: no hole between two of them within a page.
fn fits(data: &SgList) -> bool {
    let last = data.segments().len().saturating_sub(1);
    data.segments().len() <= MAX_PIECES
        && data.iter().enumerate().all(|(n, piece)| {
            let (start, end) = (piece.as_ptr().addr(), piece.as_ptr().addr() + piece.len());
            start.is_multiple_of(if n == 0 { 4 } else { PAGE_BYTES })
                && end.is_multiple_of(if n == last { 4 } else { PAGE_BYTES })
        })
}

impl PassQueue {
    pub fn open(node: Arc<Node>, target: Target) -> Result<Rc<dyn Queue>, BdevError> {
        let queue = Rc::new(PassQueue {
            node,
            target,
            slots: RefCell::new((0..SLOTS).map(|_| Slot::default()).collect()),
            free: RefCell::new((0..SLOTS).rev().collect()),
            waiting: RefCell::default(),
            ring: OnceCell::new(),
        });
        let guard = ring::register_wide(queue.clone()).map_err(|e| BdevError::NoResources(e.to_string()))?;
        let _ = queue.ring.set(guard);
        Ok(queue)
    }

    /// Puts an I/O into a slot and its first command into the ring.
    fn start(&self, token: u32, mut io: Box<Io>) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token as usize];
        (slot.done, slot.retries, slot.bounced) = (0, 0, false);
        let bytes = (io.blocks << self.target.block_shift) as usize;
        match io.op {
            Op::Read if io.data.is_empty() => slot.data = Buf::alloc(bytes).into(),
            Op::Read if fits(&io.data) => slot.data = std::mem::take(&mut io.data),
            Op::Read => {
                slot.data = Buf::alloc(bytes).into();
                slot.bounced = true;
            }
            Op::Write | Op::Compare if fits(&io.data) => slot.data = std::mem::take(&mut io.data),
            Op::Write | Op::Compare => slot.data = gather(std::mem::take(&mut io.data)).into(),
            _ => {}
        }
        slot.io = Some(io);
        self.enter(token, slot);
    }

    /// Puts the next command of a slot's I/O into the ring.
    fn enter(&self, token: u32, slot: &mut Slot) {
        let (Some(entry), Some(ring)) = (self.entry(slot), self.ring.get()) else {
            // `finish` defers: the submitter is not entered again.
            return self.end(token, slot, Status::DATA_TRANSFER_ERROR);
        };
        // SAFETY: the entry names the node (owned by this queue), `slot.iov`, `slot.range` and the memory of `slot.data`; none of
        // them is touched, moved or freed until `complete` has taken the slot (module head).
        unsafe { ring.submit(token, entry) };
    }

    /// None: a read's buffers are not its own.
    fn entry(&self, slot: &mut Slot) -> Option<squeue::Entry128> {
        let io = slot.io.as_ref()?;
        let fd = types::Fd(self.node.fd());
        if io.op == Op::Reset {
            // The kernel resets its drives by itself.
            return Some(opcode::Nop::new().build().into());
        }
        slot.now = self.target.limit(io.op).min(io.blocks - slot.done);
        let (sqe, range) = identity::command(&self.target, io, io.lba + slot.done, slot.now);
        if let Some((lba, blocks)) = range {
            slot.range = DsmRange { cattr: U32::new(0), blocks: U32::new(blocks), slba: U64::new(lba) };
            let at = &raw const slot.range;
            return Some(pass(fd, abi::URING_CMD_IO, &sqe, at.addr() as u64, size_of::<DsmRange>(), None));
        }
        if slot.data.is_empty() {
            return Some(pass(fd, abi::URING_CMD_IO, &sqe, 0, 0, None));
        }
        let (skip, len) =
            ((slot.done << self.target.block_shift) as usize, (slot.now << self.target.block_shift) as usize);
        slot.iov = vector(&mut slot.data, skip, len, io.op == Op::Read).ok()?;
        Some(match (&slot.iov[..], slot.data.segments()) {
            ([one], [buf]) => {
                let fixed = self.ring.get().and_then(|ring| ring.fixed_buffer_index(buf));
                pass(fd, abi::URING_CMD_IO, &sqe, one.iov_base.addr() as u64, one.iov_len, fixed)
            }
            ([one], _) => pass(fd, abi::URING_CMD_IO, &sqe, one.iov_base.addr() as u64, one.iov_len, None),
            (all, _) => pass(fd, abi::URING_CMD_IO_VEC, &sqe, all.as_ptr().addr() as u64, all.len(), None),
        })
    }

    fn end(&self, token: u32, slot: &mut Slot, status: Status) {
        let data = std::mem::take(&mut slot.data);
        slot.iov.clear();
        if let Some(mut io) = slot.io.take() {
            let mut status = status;
            if io.op == Op::Read {
                if !slot.bounced {
                    io.data = data;
                } else if status.is_ok() && !io.data.copy_from(&data) {
                    status = Status::DATA_TRANSFER_ERROR;
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

/// An entry that has the kernel pass a command through. `fixed`: the data lies in this registered buffer.
fn pass(
    fd: types::Fd,
    operation: u32,
    sqe: &cryptfold_nvmf_spec::Sqe,
    addr: u64,
    len: usize,
    fixed: Option<u16>,
) -> squeue::Entry128 {
    let command = Command::new(sqe, addr, len as u32).to_entry();
    opcode::UringCmd80::new(fd, operation).cmd(command).buf_index(fixed).build()
}

impl Queue for PassQueue {
    fn submit(self: Rc<Self>, io: Box<Io>) {
        if io.blocks == 0 && !matches!(io.op, Op::Flush | Op::Reset) {
            return io.finish(Status::SUCCESS);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_the_kernel_and_of_the_drive() {
        use Verdict::{Again, Ended};
        for (result, write, want) in [
            (0, true, Ended(Status::SUCCESS)),
            // SCT 2h, SC 81h, More; then with Do Not Retry.
            (0x2281, false, Ended(Status::UNRECOVERED_READ)),
            (0x4281, false, Ended(Status::UNRECOVERED_READ.do_not_retry())),
            (0x285, true, Ended(Status::COMPARE_FAILURE)),
            (0x80, true, Ended(Status::LBA_OUT_OF_RANGE)),
            (0x20, true, Ended(Status::NAMESPACE_WRITE_PROTECTED)),
            (0x07, true, Again),
            (0x08, false, Again),
            (0x4007, false, Ended(Status::ABORTED_BY_REQUEST.do_not_retry())),
            (-libc::EINTR, true, Again),
            (-libc::EAGAIN, false, Again),
            (-libc::ENODEV, false, Ended(Status::INVALID_NAMESPACE.do_not_retry())),
            (-libc::EIO, true, Ended(Status::WRITE_FAULT)),
            (-libc::EIO, false, Ended(Status::UNRECOVERED_READ)),
            (-libc::EOPNOTSUPP, false, Ended(Status::INVALID_OPCODE)),
        ] {
            assert_eq!(verdict(result, write), want, "{result:#x}");
        }
    }

    #[test]
    fn pieces_that_one_command_takes() {
        let page = |len: usize| Buf::alloc(4 * PAGE_BYTES).slice(0..len);
        let list = |all: &[Buf]| all.iter().cloned().collect::<SgList>();
        assert!(fits(&list(&[page(512)])) && fits(&list(&[page(4096), page(8192), page(512)])));
        assert!(
            fits(&list(&[Buf::alloc(8192).slice(512..4096), page(4096)])),
            "the first may begin anywhere"
        );
        assert!(!fits(&list(&[page(512), page(4096)])), "a hole after the first");
        assert!(!fits(&list(&[page(4096), Buf::alloc(8192).slice(512..4096)])), "one before the last");
        assert!(!fits(&list(&[Buf::alloc(4096).slice(1..513)])));
        assert!(!fits(&list(&vec![page(4096); MAX_PIECES + 1])));
    }
}
