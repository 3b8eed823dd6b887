//! One I/O on its way down a stack of devices and back up.
//!
//! An [`Io`] is a box that **moves**: whoever holds it owns it. A layer that wants to see it again pushes a
//! [`Frame`] and hands the box down; the device at the bottom calls [`Io::finish`], and the frames are taken off one
//! by one, each layer getting the box back. There is no allocation per layer, no reference count on the I/O, and no
//! way to complete it twice.
//!
//! Invariants:
//! - `Queue::submit` never completes an I/O inside the caller's stack frame: [`Io::finish`] defers to the reactor.
//!   So a submitter never re-enters itself, and a chain of instant completions can not overflow the stack.
//! - A layer's completion calls [`Io::up`] (still inside the reactor's turn) to pass the box on.
//! - Data moves by ownership. A write hands its buffers down: whoever finds a buffer unique may change it in place.
//!   A read that comes **without** buffers lets the device lend or allocate them; a read **with** buffers (of the whole
//!   length) wants the data there.
//! - `op`, `lba`, `blocks` and `tag` come back as they were submitted: a layer that changes them puts them back.
//!
//! Units: `lba` and `blocks` are in blocks of the device that the I/O is submitted to.

use std::rc::Rc;

use cryptfold_reactor as reactor;
use reactor::memory::SgList;
use smallvec::SmallVec;

use crate::Status;

/// What an I/O asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// `data` is filled, lent or allocated (see the module's head).
    Read,
    /// `data` holds exactly `blocks` blocks.
    Write,
    /// All writes that completed before this was submitted become durable.
    Flush,
    /// The range need not keep its data; it then reads as zeros where the device reports unmapped ranges.
    Unmap,
    /// The range reads as zeros afterwards.
    WriteZeroes,
    /// Compares the range with `data`; ends with `COMPARE_FAILURE` on a difference.
    Compare,
    /// Atomically: compares the range with `compare`, then writes `data`.
    CompareAndWrite,
    /// Copies `blocks` from `src_lba` to `lba`.
    Copy,
    /// Reads of the range fail with `UNRECOVERED_READ` until it is written again.
    WriteUncorrectable,
    /// Brings the device back to a working state; outstanding I/O ends first.
    Reset,
}

impl Op {
    /// All operations, in the order of their bits in [`OpSet`].
    pub const ALL: [Op; 10] = [
        Op::Read,
        Op::Write,
        Op::Flush,
        Op::Unmap,
        Op::WriteZeroes,
        Op::Compare,
        Op::CompareAndWrite,
        Op::Copy,
        Op::WriteUncorrectable,
        Op::Reset,
    ];
    /// Whether the operation can change what a later read returns.
    pub const fn modifies(self) -> bool {
        matches!(
            self,
            Op::Write | Op::Unmap | Op::WriteZeroes | Op::CompareAndWrite | Op::Copy | Op::WriteUncorrectable
        )
    }
    /// The name that SPDK's `supported_io_types` gives it, or would.
    pub const fn spdk_name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Unmap => "unmap",
            Op::WriteZeroes => "write_zeroes",
            Op::Compare => "compare",
            Op::CompareAndWrite => "compare_and_write",
            Op::Copy => "copy",
            Op::WriteUncorrectable => "write_uncorrectable",
            Op::Reset => "reset",
        }
    }
}

/// A set of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct OpSet(u16);

impl OpSet {
    /// The set of `ops`.
    pub const fn of(ops: &[Op]) -> OpSet {
        let mut bits = 0;
        let mut i = 0;
        while i < ops.len() {
            bits |= 1 << ops[i] as u16;
            i += 1;
        }
        OpSet(bits)
    }
    /// Whether `op` is in the set.
    pub const fn has(self, op: Op) -> bool {
        self.0 & (1 << op as u16) != 0
    }
    /// The operations in both sets.
    pub const fn intersect(self, other: OpSet) -> OpSet {
        OpSet(self.0 & other.0)
    }
    /// The set with `op` in it.
    #[must_use]
    pub const fn with(self, op: Op) -> OpSet {
        OpSet(self.0 | 1 << op as u16)
    }
    /// The set without `op`.
    #[must_use]
    pub const fn without(self, op: Op) -> OpSet {
        OpSet(self.0 & !(1 << op as u16))
    }
}

/// Parts of an I/O, in blocks from its start.
pub type BlockRanges = SmallVec<[BlockRange; 2]>;

/// A run of blocks inside an I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// First block, counted from the start of the I/O.
    pub start: u32,
    /// Number of blocks.
    pub blocks: u32,
}

/// A layer's note to itself, put on the I/O when it goes down and handed back when it comes up.
#[derive(Clone, Copy, Default)]
pub struct Frame {
    /// For the layer's own use (often the address the I/O came with).
    pub lba: u64,
    /// For the layer's own use.
    pub word: u64,
    /// Buffers were put aside with it: [`Io::saved`].
    saved: bool,
}

/// Who gets an I/O back, the last one first. Slots stay when their frames are taken: a frame is stored where it belongs, field by field.
/// What `Vec::push` does, to make it on the stack and copy it in larger pieces, waits for the stores; that was 15% of a null
/// device's time.
struct Frames {
    slots: Vec<(Option<Rc<dyn Complete>>, Frame)>,
    depth: usize,
}

impl Frames {
    fn new() -> Frames {
        let slot = || (None, Frame::default());
        Frames { slots: (0..8).map(|_| slot()).collect(), depth: 0 }
    }

    fn is_empty(&self) -> bool {
        self.depth == 0
    }

    #[inline(always)]
    fn push(&mut self, who: Rc<dyn Complete>, frame: Frame) {
        match self.slots.get_mut(self.depth) {
            Some(slot) => {
                // `pop` has left nothing there. To have to drop it would put `who` on the stack.
                std::mem::forget(slot.0.replace(who));
                slot.1 = frame;
            }
            None => self.lengthen(who, frame),
        }
        self.depth += 1;
    }

    #[cold]
    #[inline(never)]
    fn lengthen(&mut self, who: Rc<dyn Complete>, frame: Frame) {
        self.slots.push((Some(who), frame));
    }

    #[inline]
    fn pop(&mut self) -> Option<(Rc<dyn Complete>, Frame)> {
        let depth = self.depth.checked_sub(1)?;
        let slot = self.slots.get_mut(depth)?;
        self.depth = depth;
        Some((slot.0.take()?, slot.1))
    }
}

/// Gets an I/O back.
pub trait Complete {
    /// `io` has ended with `io.status()`; `frame` is what was pushed. Passes it on with [`Io::up`], keeps it, or
    /// submits it again.
    fn complete(self: Rc<Self>, io: Box<Io>, frame: Frame);
}

/// An I/O. See the module's head for who may touch what, when.
pub struct Io {
    /// What is asked for.
    pub op: Op,
    /// Force unit access: durable when it completes.
    pub fua: bool,
    /// Which host key the data was decrypted with; 0 = none, stored as the host sent it. Of a read: which one its data goes
    /// through on its way up.
    pub host_key: u16,
    /// Chosen by the submitter, for [`Queue::abort`](crate::Queue::abort); unique among its outstanding I/O.
    pub tag: u64,
    /// First block.
    pub lba: u64,
    /// Number of blocks (0 for flush and reset: the whole device).
    pub blocks: u64,
    /// First block of the source of a copy.
    pub src_lba: u64,
    /// Payload.
    pub data: SgList,
    /// What `CompareAndWrite` expects to find.
    pub compare: SgList,
    /// Filled by reads of devices that know: which blocks are unmapped. They hold zeros in `data`.
    pub unmapped: BlockRanges,
    /// Filled by reads under a host key, of devices that know: which mapped blocks were stored as the host had sent them.
    pub as_sent: BlockRanges,
    status: Status,
    /// Whoever hands it up has just looked at the clock.
    timed: bool,
    frames: Frames,
    /// What frames put aside. Not in the frames: few have any, and moving empty lists costs more than all of the rest.
    saved: Vec<SgList>,
}

impl Io {
    /// An I/O with nothing in it but the operation. Comes from this thread's store of used ones where possible.
    pub fn new(op: Op, lba: u64, blocks: u64) -> Box<Io> {
        let mut io = STORE.with_borrow_mut(|s| s.pop()).unwrap_or_else(|| {
            Box::new(Io {
                op,
                fua: false,
                host_key: 0,
                tag: 0,
                lba,
                blocks,
                src_lba: 0,
                data: SgList::new(),
                compare: SgList::new(),
                unmapped: BlockRanges::new(),
                as_sent: BlockRanges::new(),
                status: Status::SUCCESS,
                timed: false,
                frames: Frames::new(),
                saved: Vec::new(),
            })
        });
        io.reset(op, lba, blocks);
        io
    }

    /// Gives the box back to this thread's store.
    pub fn recycle(mut self: Box<Self>) {
        debug_assert!(self.frames.is_empty(), "recycled an I/O that somebody waits for");
        debug_assert!(self.saved.is_empty(), "a layer did not take its buffers back");
        self.data = SgList::new();
        self.compare = SgList::new();
        STORE.with_borrow_mut(|s| {
            if s.len() < STORE_MAX {
                s.push(self);
            }
        });
    }

    /// Makes the box a new I/O; buffers and flags of the last one are gone.
    pub fn reset(&mut self, op: Op, lba: u64, blocks: u64) {
        debug_assert!(self.frames.is_empty(), "reset an I/O that somebody waits for");
        self.op = op;
        self.fua = false;
        self.host_key = 0;
        self.tag = 0;
        self.lba = lba;
        self.blocks = blocks;
        self.src_lba = 0;
        if !self.data.is_empty() {
            self.data = SgList::new();
        }
        if !self.compare.is_empty() {
            self.compare = SgList::new();
        }
        self.unmapped.clear();
        self.as_sent.clear();
        self.status = Status::SUCCESS;
        self.timed = false;
    }

    /// What the I/O ended with; meaningful once it came back.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Asks to get the I/O back, with a word to remember.
    #[inline]
    pub fn push(&mut self, who: Rc<dyn Complete>, lba: u64, word: u64) {
        self.frames.push(who, Frame { lba, word, saved: false });
    }

    /// Asks to get the I/O back, with buffers to remember (often the caller's destination of a read): [`Io::saved`].
    #[inline]
    pub fn push_with(&mut self, who: Rc<dyn Complete>, lba: u64, word: u64, data: SgList) {
        let saved = !data.is_empty();
        if saved {
            self.saved.push(data);
        }
        self.frames.push(who, Frame { lba, word, saved });
    }

    /// The buffers that were put aside with the frame that has just come back; to be called once, by who pushed them.
    #[inline]
    pub fn saved(&mut self, frame: &Frame) -> SgList {
        if frame.saved { self.saved.pop().unwrap_or_default() } else { SgList::new() }
    }

    /// Ends the I/O: the layer above gets it back on this core, soon, not inside this call.
    #[inline]
    pub fn finish(mut self: Box<Self>, status: Status) {
        self.status = status;
        reactor::defer(self);
    }

    /// Passes the I/O to the layer above, at once. Only from inside [`Complete::complete`] or a task.
    #[inline]
    pub fn up(mut self: Box<Self>, status: Status) {
        self.timed = false;
        self.pass(status);
    }

    /// As [`Io::up`], for a layer that has done nothing that takes time since it got the I/O back: the next one need not look
    /// at the clock again.
    #[inline]
    pub fn pass(mut self: Box<Self>, status: Status) {
        self.status = status;
        match self.frames.pop() {
            Some((who, frame)) => who.complete(self, frame),
            None => self.recycle(),
        }
    }
}

impl Io {
    /// The time it came back, for a channel's statistics.
    #[inline]
    pub(crate) fn came_back(&mut self) -> reactor::Nanos {
        if std::mem::replace(&mut self.timed, true) { reactor::recent() } else { reactor::now() }
    }
}

impl reactor::Deferred for Io {
    #[inline]
    fn run(self: Box<Self>) {
        let status = self.status;
        self.up(status);
    }
}

/// Boxes kept per thread for reuse; more than the deepest queues of a core need is given back to the allocator.
const STORE_MAX: usize = 4096;

thread_local! {
    static STORE: std::cell::RefCell<Vec<Box<Io>>> = const { std::cell::RefCell::new(Vec::new()) };
}
