//! A descriptor's end on one core: checks, counts, limits and orders I/O before the device's queue sees it, and gives
//! it an `async` face.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use cryptfold_reactor as reactor;
use reactor::memory::SgList;

use crate::emulate;
use crate::io::{BlockRanges, Complete, Frame, Io, Op};
use crate::locks::{self, Ack, ChannelId, LockId, Range};
use crate::registry::gate;
use crate::stats::ChannelStats;
use crate::{Bdev, BdevError, Descriptor, Queue, Status};

/// A per-core handle to submit I/O to a device. Cheap to clone; stays on its reactor.
#[derive(Clone)]
pub struct Channel {
    inner: Rc<ChannelInner>,
}

pub(crate) struct ChannelInner {
    id: ChannelId,
    pub(crate) desc: Arc<Descriptor>,
    pub(crate) queue: Rc<dyn Queue>,
    stats: Arc<ChannelStats>,
    outstanding: Cell<u64>,
    /// Changes under way, by epoch (see `locks`).
    changes: [Cell<u64>; 2],
    epoch: Cell<usize>,
    locks: RefCell<Vec<(LockId, Range)>>,
    any_lock: Cell<bool>,
    /// Acknowledgements due, each with the epochs (as bits) that have to run empty first.
    acks: RefCell<Vec<(u8, Ack)>>,
    held: RefCell<VecDeque<Box<Io>>>,
    throttled: RefCell<VecDeque<Box<Io>>>,
    throttle_task: Cell<bool>,
}

impl Channel {
    pub(crate) fn open(desc: Arc<Descriptor>) -> Result<Channel, BdevError> {
        let bdev = desc.bdev().clone();
        let queue = bdev.device().clone().open_queue()?;
        let id = locks::next_id();
        let inner = Rc::new(ChannelInner {
            id,
            desc,
            queue,
            stats: bdev.stats.open(),
            outstanding: Cell::new(0),
            changes: Default::default(),
            epoch: Cell::new(0),
            locks: RefCell::default(),
            any_lock: Cell::new(false),
            acks: RefCell::default(),
            held: RefCell::default(),
            throttled: RefCell::default(),
            throttle_task: Cell::new(false),
        });
        bdev.locks.attach(id, &inner);
        Ok(Channel { inner })
    }

    /// The device.
    pub fn bdev(&self) -> &Arc<Bdev> {
        self.inner.desc.bdev()
    }

    /// I/O submitted and not yet back.
    pub fn outstanding(&self) -> u64 {
        self.inner.outstanding.get()
    }

    /// Submits an I/O whose frame has been pushed; it comes back through that frame, always, and never inside this
    /// call.
    #[inline]
    pub fn submit(&self, io: Box<Io>) {
        self.inner.clone().submit(io);
    }

    /// Ends an outstanding I/O early if it is held back here or the device can. True when it was found.
    pub fn abort(&self, tag: u64) -> bool {
        for q in [&self.inner.held, &self.inner.throttled] {
            let found = {
                let mut q = q.borrow_mut();
                q.iter().position(|io| io.tag == tag).and_then(|i| q.remove(i))
            };
            if let Some(io) = found {
                io.finish(Status::ABORTED_BY_REQUEST);
                return true;
            }
        }
        self.inner.queue.abort(tag)
    }

    /// Submits and waits. The I/O must carry no frames.
    pub fn io(&self, io: Box<Io>) -> IoFuture {
        IoFuture::start(io, |io| self.submit(io))
    }

    /// Reads `blocks` blocks; the buffers may be lent by the device.
    ///
    /// # Errors
    /// The device's status.
    pub async fn read(&self, lba: u64, blocks: u64) -> Result<SgList, Status> {
        let mut io = self.io(Io::new(Op::Read, lba, blocks)).await;
        let data = std::mem::take(&mut io.data);
        let status = io.status();
        io.recycle();
        status.ok().map(|()| data)
    }

    /// Writes whole blocks.
    ///
    /// # Errors
    /// The device's status; `INVALID_FIELD` when `data` is no whole number of blocks.
    pub async fn write(&self, lba: u64, data: impl Into<SgList>, fua: bool) -> Result<(), Status> {
        let data = data.into();
        let bs = u64::from(self.bdev().block_size_bytes());
        let bytes = data.len_bytes() as u64;
        if !bytes.is_multiple_of(bs) {
            return Err(Status::INVALID_FIELD);
        }
        let mut io = Io::new(Op::Write, lba, bytes / bs);
        io.data = data;
        io.fua = fua;
        self.run(io).await
    }

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// The device's status.
    pub async fn flush(&self) -> Result<(), Status> {
        self.run(Io::new(Op::Flush, 0, 0)).await
    }

    /// Gives the range's data up.
    ///
    /// # Errors
    /// The device's status.
    pub async fn unmap(&self, lba: u64, blocks: u64) -> Result<(), Status> {
        self.run(Io::new(Op::Unmap, lba, blocks)).await
    }

    /// Makes the range read as zeros.
    ///
    /// # Errors
    /// The device's status.
    pub async fn write_zeroes(&self, lba: u64, blocks: u64) -> Result<(), Status> {
        self.run(Io::new(Op::WriteZeroes, lba, blocks)).await
    }

    /// Reads a range (of a few MiB at most) and writes the parts of it that `which` picks again, as they are, while no other change of
    /// it is under way: for layers below that store what they get in another way by now. How many blocks were written. As no
    /// user of the device sees a change, this is possible beside a claim, is not limited and does not count in statistics.
    ///
    /// # Errors
    /// The device's status; a part may be written. `NAMESPACE_WRITE_PROTECTED` when the device is read-only.
    pub async fn rewrite(
        &self,
        lba: u64,
        blocks: u64,
        which: impl FnOnce(&Io) -> BlockRanges,
    ) -> Result<u64, Status> {
        let bdev = self.bdev();
        if lba.checked_add(blocks).is_none_or(|end| end > bdev.blocks()) {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        if bdev.is_read_only() {
            return Err(Status::NAMESPACE_WRITE_PROTECTED);
        }
        emulate::rewrite(&self.inner, lba, blocks, which).await
    }

    async fn run(&self, io: Box<Io>) -> Result<(), Status> {
        let io = self.io(io).await;
        let status = io.status();
        io.recycle();
        status.ok()
    }
}

impl ChannelInner {
    #[inline]
    fn submit(self: Rc<Self>, io: Box<Io>) {
        if let Err(status) = self.check(&io) {
            return io.finish(status);
        }
        self.route(io);
    }

    /// Range, buffers and access; everything a device may rely on.
    #[inline]
    fn check(&self, io: &Io) -> Result<(), Status> {
        let bdev = self.desc.bdev();
        let end = io.lba.checked_add(io.blocks).ok_or(Status::LBA_OUT_OF_RANGE)?;
        if end > bdev.blocks() {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        let bytes = io.blocks * u64::from(bdev.block_size_bytes());
        match io.op {
            Op::Read if io.data.is_empty() => {}
            Op::Read | Op::Write | Op::Compare if io.data.len_bytes() as u64 == bytes => {}
            Op::CompareAndWrite
                if io.data.len_bytes() as u64 == bytes && io.compare.len_bytes() as u64 == bytes => {}
            Op::Copy => {
                let end = io.src_lba.checked_add(io.blocks).ok_or(Status::LBA_OUT_OF_RANGE)?;
                if end > bdev.blocks() {
                    return Err(Status::LBA_OUT_OF_RANGE);
                }
            }
            Op::Flush | Op::Reset | Op::Unmap | Op::WriteZeroes | Op::WriteUncorrectable => {}
            _ => return Err(Status::INVALID_FIELD),
        }
        if io.op.modifies() {
            if self.desc.access() == crate::Access::ReadOnly {
                return Err(Status::ACCESS_DENIED);
            }
            if bdev.is_read_only() {
                return Err(Status::NAMESPACE_WRITE_PROTECTED);
            }
        }
        Ok(())
    }

    #[inline]
    fn route(self: Rc<Self>, io: Box<Io>) {
        let gates = self.desc.bdev().gate.load(Ordering::Relaxed);
        if gates & gate::REMOVING != 0 {
            return io.finish(Status::INVALID_NAMESPACE.do_not_retry());
        }
        if gates & gate::QOS != 0 && !self.admit(&io) {
            self.throttled.borrow_mut().push_back(io);
            return self.start_throttle_task();
        }
        self.pass_locks(io);
    }

    #[inline]
    fn pass_locks(self: Rc<Self>, io: Box<Io>) {
        if self.any_lock.get() && io.op.modifies() {
            let range = Range { lba: io.lba, blocks: io.blocks };
            if self.locks.borrow().iter().any(|l| l.1.overlaps(&range)) {
                return self.held.borrow_mut().push_back(io);
            }
        }
        self.start(io);
    }

    /// Counts the I/O in and hands it to the device, or to the emulation of what the device does not do.
    #[inline]
    fn start(self: Rc<Self>, mut io: Box<Io>) {
        let epoch = self.epoch.get();
        // A compare-and-write that is emulated takes the lock itself: counting it would make it wait for itself.
        let native = self.desc.bdev().info().ops.has(io.op);
        let counted = io.op.modifies() && (native || io.op != Op::CompareAndWrite);
        if counted {
            self.changes[epoch].set(self.changes[epoch].get() + 1);
        }
        self.outstanding.set(self.outstanding.get() + 1);
        let word = (io.op as u64) << 8 | u64::from(counted) << 1 | epoch as u64;
        let now = reactor::now().0;
        let queue = self.queue.clone();
        if native {
            io.push(self, now, word);
            queue.submit(io);
        } else {
            let inner = self.clone();
            io.push(self, now, word);
            emulate::run(inner, io);
        }
    }

    fn admit(&self, io: &Io) -> bool {
        if !matches!(io.op, Op::Read | Op::Write | Op::CompareAndWrite | Op::Compare) {
            return true;
        }
        if !self.throttled.borrow().is_empty() {
            return false;
        }
        let bdev = self.desc.bdev();
        let bytes = io.blocks * u64::from(bdev.block_size_bytes());
        bdev.qos.admit(bytes, io.op.modifies(), reactor::now())
    }

    fn start_throttle_task(self: Rc<Self>) {
        if self.throttle_task.replace(true) {
            return;
        }
        reactor::spawn_local(async move {
            loop {
                reactor::sleep(Duration::from_nanos(crate::qos::SLICE_NS)).await;
                loop {
                    let Some(io) = self.throttled.borrow_mut().pop_front() else { break };
                    let bdev = self.desc.bdev();
                    let bytes = io.blocks * u64::from(bdev.block_size_bytes());
                    let free = bdev.gate.load(Ordering::Relaxed) & gate::QOS == 0;
                    if free || bdev.qos.admit(bytes, io.op.modifies(), reactor::now()) {
                        self.clone().pass_locks(io);
                    } else {
                        self.throttled.borrow_mut().push_front(io);
                        break;
                    }
                }
                if self.throttled.borrow().is_empty() {
                    self.throttle_task.set(false);
                    return;
                }
            }
        })
        .detach();
    }

    /// Holds changes to `range` back from now on; `ack` is given when those let through before are done.
    pub(crate) fn hold(&self, id: LockId, range: Range, ack: Option<Ack>) {
        // A new channel may have learnt of the lock from the table already.
        if !self.locks.borrow().iter().any(|l| l.0 == id) {
            self.locks.borrow_mut().push((id, range));
        }
        self.any_lock.set(true);
        let Some(ack) = ack else { return };
        let busy = (0..2).filter(|e| self.changes[*e].get() != 0).fold(0, |m, e| m | 1 << e);
        if busy == 0 {
            return;
        }
        self.acks.borrow_mut().push((busy, ack));
        let other = 1 - self.epoch.get();
        if self.changes[other].get() == 0 {
            self.epoch.set(other);
        }
    }

    pub(crate) fn release(self: &Rc<Self>, id: LockId) {
        self.locks.borrow_mut().retain(|l| l.0 != id);
        self.any_lock.set(!self.locks.borrow().is_empty());
        let held = std::mem::take(&mut *self.held.borrow_mut());
        for io in held {
            self.clone().pass_locks(io);
        }
    }
}

impl Complete for ChannelInner {
    #[inline]
    fn complete(self: Rc<Self>, mut io: Box<Io>, frame: Frame) {
        let now = io.came_back().0;
        let bdev = self.desc.bdev();
        let histogram = bdev.gate.load(Ordering::Relaxed) & gate::HISTOGRAM != 0;
        let bytes = io.blocks * u64::from(bdev.block_size_bytes());
        let status = io.status();
        self.stats.record(io.op, bytes, now.saturating_sub(frame.lba), status, histogram);
        self.outstanding.set(self.outstanding.get() - 1);
        if frame.word & 2 != 0 {
            let epoch = (frame.word & 1) as usize;
            let left = self.changes[epoch].get() - 1;
            self.changes[epoch].set(left);
            if left == 0 {
                self.epoch_empty(epoch);
            }
        }
        io.pass(status);
    }
}

impl ChannelInner {
    #[cold]
    fn epoch_empty(&self, epoch: usize) {
        let mut acks = self.acks.borrow_mut();
        acks.retain_mut(|(waits_for, _)| {
            *waits_for &= !(1 << epoch);
            *waits_for != 0
        });
        // What still waits, waits for the epoch in use: switch, so that it can run empty.
        if !acks.is_empty() && epoch != self.epoch.get() {
            self.epoch.set(epoch);
        }
    }
}

impl Drop for ChannelInner {
    fn drop(&mut self) {
        let bdev = self.desc.bdev();
        bdev.locks.detach(self.id);
        bdev.stats.close(&self.stats);
    }
}

/// An I/O that somebody waits for. Dropping it lets the I/O run to its end unattended (its buffers stay its own).
pub struct IoFuture {
    waiter: Rc<Waiter>,
}

#[derive(Default)]
struct Waiter {
    io: RefCell<Option<Box<Io>>>,
    waker: RefCell<Option<Waker>>,
    gone: Cell<bool>,
}

impl IoFuture {
    pub(crate) fn start(mut io: Box<Io>, submit: impl FnOnce(Box<Io>)) -> IoFuture {
        let waiter = Rc::new(Waiter::default());
        io.push(waiter.clone(), 0, 0);
        submit(io);
        IoFuture { waiter }
    }
}

impl Future for IoFuture {
    type Output = Box<Io>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Box<Io>> {
        match self.waiter.io.borrow_mut().take() {
            Some(io) => Poll::Ready(io),
            None => {
                *self.waiter.waker.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for IoFuture {
    fn drop(&mut self) {
        self.waiter.gone.set(true);
        if let Some(io) = self.waiter.io.borrow_mut().take() {
            io.recycle();
        }
    }
}

impl Complete for Waiter {
    fn complete(self: Rc<Self>, io: Box<Io>, _frame: Frame) {
        if self.gone.get() {
            return io.recycle();
        }
        *self.io.borrow_mut() = Some(io);
        if let Some(w) = self.waker.borrow_mut().take() {
            w.wake();
        }
    }
}
