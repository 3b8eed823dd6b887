//! I/O of a namespace: [`Io`] boxes become NVMe commands; those too large for one command are cut.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{Complete, Frame, Io, Op, Queue, Status};
use cryptfold_nvmf_spec as spec;
use cryptfold_reactor::memory::{Buf, SgList};
use spec::copy::{CopyCdw12, CopyRange};
use spec::dsm::{DsmCdw11, DsmRange};
use spec::opcode;
use spec::sqe::{Fuse, RwControl};
use spec::{Cid, Nsid, Sqe};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use crate::conn::{Conn, Payload, State};
use crate::controller::{Connector, NamespaceInfo};
use crate::slots::Owner;
use crate::{CloseReason, Error};

/// Commands of one cut I/O under way at once.
const SPLIT_DEPTH: usize = 8;

/// What a command needs to know of its namespace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ns {
    pub nsid: Nsid,
    pub block_bytes: u32,
}

/// One connection for I/O, on the reactor that opened it. Closed when the last reference (namespace queues hold one each)
/// is dropped.
pub struct IoQueue {
    conn: Rc<Conn>,
    depth: u16,
    /// Keeps the association's facts alive, not the association.
    _connector: Arc<Connector>,
}

impl IoQueue {
    pub(crate) fn new(conn: Rc<Conn>, depth: u16, connector: Arc<Connector>) -> IoQueue {
        IoQueue { conn, depth, _connector: connector }
    }

    /// Commands that can be under way; more wait inside.
    pub fn depth(&self) -> u16 {
        self.depth
    }

    /// Commands under way or waiting.
    pub fn outstanding(&self) -> usize {
        self.conn.outstanding()
    }

    /// Why the connection ended, if it did.
    pub fn closed(&self) -> Option<CloseReason> {
        self.conn.close_reason()
    }

    /// `Ok` while the connection lives, else the error to show.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn check(&self) -> Result<(), Error> {
        self.conn.close_reason().map_or(Ok(()), |reason| Err(self.conn.closed_error(reason)))
    }

    /// Ends the connection now; what is under way ends with an error.
    pub fn close(&self) {
        self.conn.close(CloseReason::Local);
    }

    /// Takes I/O for a namespace over this connection.
    pub fn namespace(&self, info: &NamespaceInfo) -> Rc<NamespaceQueue> {
        Rc::new(NamespaceQueue {
            conn: self.conn.clone(),
            ns: Ns { nsid: info.nsid, block_bytes: info.block_bytes },
            ops: info.ops,
            max_blocks: info.max_transfer_blocks(),
            max_copy_blocks: info.max_copy_blocks,
        })
    }
}

/// Takes I/O for one namespace. Units of `lba` and `blocks`: the namespace's blocks.
pub struct NamespaceQueue {
    conn: Rc<Conn>,
    ns: Ns,
    ops: cryptfold_bdev::OpSet,
    max_blocks: u64,
    max_copy_blocks: u64,
}

impl NamespaceQueue {
    /// Blocks of one command at most; 0 = one command does it.
    fn limit(&self, op: Op) -> u64 {
        match op {
            Op::Read | Op::Write | Op::Compare | Op::CompareAndWrite | Op::WriteZeroes => self.max_blocks,
            // Its length field has 16 bits, and it carries no data.
            Op::WriteUncorrectable => 1 << 16,
            Op::Unmap => u64::from(u32::MAX),
            Op::Copy => self.max_copy_blocks,
            Op::Flush | Op::Reset => 0,
        }
    }
}

impl Queue for NamespaceQueue {
    #[inline]
    fn submit(self: Rc<Self>, io: Box<Io>) {
        if !self.ops.has(io.op) {
            return io.finish(Status::INVALID_OPCODE);
        }
        let limit = self.limit(io.op);
        if limit > 0 {
            if io.blocks == 0 {
                return io.finish(Status::SUCCESS);
            }
            if io.blocks > limit {
                return match io.op {
                    // Cut in two it would no longer be atomic.
                    Op::CompareAndWrite => io.finish(Status::INVALID_FIELD),
                    _ => Split::start(self, io, limit),
                };
            }
        }
        if io.op == Op::Read && !io.data.segments().iter().all(Buf::is_unique) {
            return io.finish(Status::INVALID_FIELD);
        }
        self.conn.submit(self.ns, io);
    }
}

/// Slots that an I/O takes.
pub(crate) fn slots_needed(io: &Io) -> usize {
    if io.op == Op::CompareAndWrite { 2 } else { 1 }
}

/// Makes the command of an I/O that fits one, and queues it. There are free slots.
pub(crate) fn begin(state: &mut State, ns: Ns, io: Box<Io>) {
    let bytes = (io.blocks * u64::from(ns.block_bytes)) as u32;
    let (sqe, payload) = match io.op {
        Op::Read => (rw(opcode::Io::Read, ns, &io), Payload::In(bytes)),
        Op::Write => (rw(opcode::Io::Write, ns, &io), Payload::Out(io.data.clone())),
        Op::Compare => (rw(opcode::Io::Compare, ns, &io), Payload::Out(io.data.clone())),
        Op::WriteZeroes => (rw(opcode::Io::WriteZeroes, ns, &io), Payload::Nothing),
        Op::WriteUncorrectable => (rw(opcode::Io::WriteUncorrectable, ns, &io), Payload::Nothing),
        Op::Flush => (Sqe::io(opcode::Io::Flush, Cid(0), ns.nsid), Payload::Nothing),
        Op::Unmap => unmap(ns, &io),
        Op::Copy => copy(ns, &io),
        Op::CompareAndWrite => return fused(state, ns, io),
        Op::Reset => return io.finish(Status::INVALID_OPCODE),
    };
    if let Some((slot, cid)) = state.take_slot(Owner::Io(io)) {
        state.command(slot, cid, sqe, &payload);
    }
}

fn rw(opcode: opcode::Io, ns: Ns, io: &Io) -> Sqe {
    let mut sqe = Sqe::io(opcode, Cid(0), ns.nsid);
    sqe.set_rw(io.lba, io.blocks as u32, RwControl::default().with_fua(u32::from(io.fua)));
    sqe
}

fn unmap(ns: Ns, io: &Io) -> (Sqe, Payload) {
    let mut sqe = Sqe::io(opcode::Io::DatasetManagement, Cid(0), ns.nsid);
    sqe.cdw11 = U32::new(DsmCdw11::default().with_ad(1).0);
    let range =
        DsmRange { blocks: U32::new(io.blocks as u32), slba: U64::new(io.lba), ..DsmRange::default() };
    (sqe, Payload::Out(Buf::from_slice(range.as_bytes()).into()))
}

fn copy(ns: Ns, io: &Io) -> (Sqe, Payload) {
    let mut sqe = Sqe::io(opcode::Io::Copy, Cid(0), ns.nsid);
    sqe.set_slba(io.lba);
    // One source range (NR is 0's based), descriptor format 0h.
    sqe.cdw12 = U32::new(CopyCdw12::default().with_fua(u32::from(io.fua)).0);
    let mut range = CopyRange::default();
    range.slba = U64::new(io.src_lba);
    range.nlb = U16::new((io.blocks - 1) as u16);
    (sqe, Payload::Out(Buf::from_slice(range.as_bytes()).into()))
}

/// Compare and Write, fused: two commands, one after the other, one I/O.
fn fused(state: &mut State, ns: Ns, io: Box<Io>) {
    let mut first = rw(opcode::Io::Compare, ns, &io);
    first.set_fuse(Fuse::First);
    let mut second = rw(opcode::Io::Write, ns, &io);
    second.set_fuse(Fuse::Second);
    let (expected, new) = (Payload::Out(io.compare.clone()), Payload::Out(io.data.clone()));
    let Some((main, cid)) = state.take_slot(Owner::Io(io)) else { return };
    state.slots.get(main).pending = 2;
    state.command(main, cid, first, &expected);
    if let Some((half, cid)) = state.take_slot(Owner::Half(main)) {
        state.command(half, cid, second, &new);
    }
}

/// An I/O that needs several commands.
struct Split {
    queue: Rc<NamespaceQueue>,
    parent: RefCell<Option<Box<Io>>>,
    op: Op,
    step: u64,
    /// Blocks handed out so far, of how many.
    next: Cell<u64>,
    blocks: u64,
    children: Cell<usize>,
    status: Cell<Status>,
    /// What reads returned, by their order.
    parts: RefCell<Vec<SgList>>,
}

impl Split {
    fn start(queue: Rc<NamespaceQueue>, io: Box<Io>, step: u64) {
        let count = io.blocks.div_ceil(step);
        let children = count.min(SPLIT_DEPTH as u64) as usize;
        let parts = if io.op == Op::Read { vec![SgList::new(); count as usize] } else { Vec::new() };
        let split = Rc::new(Split {
            queue,
            op: io.op,
            step,
            next: Cell::new(0),
            blocks: io.blocks,
            children: Cell::new(children),
            status: Cell::new(Status::SUCCESS),
            parts: RefCell::new(parts),
            parent: RefCell::new(Some(io)),
        });
        for _ in 0..children {
            split.clone().feed(Io::new(split.op, 0, 0));
        }
    }

    /// Sends a child out for the next part, or retires it.
    fn feed(self: Rc<Self>, mut io: Box<Io>) {
        let at = self.next.get();
        if at == self.blocks || !self.status.get().is_ok() {
            io.recycle();
            self.children.set(self.children.get() - 1);
            if self.children.get() == 0 {
                self.finish();
            }
            return;
        }
        let n = self.step.min(self.blocks - at);
        self.next.set(at + n);
        if let Some(parent) = &*self.parent.borrow() {
            io.reset(self.op, parent.lba + at, n);
            io.fua = parent.fua;
            io.src_lba = parent.src_lba + at;
            if matches!(self.op, Op::Write | Op::Compare) {
                let bytes = u64::from(self.queue.ns.block_bytes);
                io.data = parent.data.slice((at * bytes) as usize..((at + n) * bytes) as usize);
            }
        }
        io.push(self.clone(), at / self.step, 0);
        self.queue.conn.submit(self.queue.ns, io);
    }

    fn finish(&self) {
        let Some(mut parent) = self.parent.borrow_mut().take() else { return };
        let mut status = self.status.get();
        if self.op == Op::Read && status.is_ok() {
            let parts = std::mem::take(&mut *self.parts.borrow_mut());
            let all: SgList = parts.into_iter().flatten().collect();
            if parent.data.is_empty() {
                parent.data = all;
            } else if !parent.data.copy_from(&all) {
                status = Status::INVALID_FIELD;
            }
        }
        parent.finish(status);
    }
}

impl Complete for Split {
    fn complete(self: Rc<Self>, mut io: Box<Io>, frame: Frame) {
        if !io.status().is_ok() && self.status.get().is_ok() {
            self.status.set(io.status());
        }
        if self.op == Op::Read
            && let Some(part) = self.parts.borrow_mut().get_mut(frame.lba as usize)
        {
            *part = std::mem::take(&mut io.data);
        }
        self.feed(io);
    }
}
