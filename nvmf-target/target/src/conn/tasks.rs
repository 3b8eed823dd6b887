//! Commands that are more than one operation of a device, that wait for other threads, or that end other commands.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Io, Op};
use cryptfold_nvmf_spec::{Cid, Qid, Status};
use cryptfold_reactor as reactor;
use cryptfold_reactor::memory::{Buf, SgList};

use super::slot::Phase;
use super::{Conn, Inner};
use crate::io;
use crate::later::Later;
use crate::reservation::{Outcome, Request};
use crate::subsystem::NsChannel;

/// Dword 0 of Abort: the command was not aborted.
const NOT_ABORTED: u32 = 1;
/// Longest that an Abort waits, whatever `abort_timeout_sec` says: each holds a timer.
const LONGEST_ABORT: Duration = Duration::from_secs(60);

impl Conn {
    /// Carries a command out as a task that yields its status.
    fn task<F>(&self, inner: &mut Inner, index: u16, work: impl FnOnce(Rc<Conn>) -> F)
    where
        F: Future<Output = Result<(), Status>> + 'static,
    {
        let Some(me) = self.me.upgrade() else { return };
        self.begin(inner, index);
        let work = work(me.clone());
        reactor::spawn_local(async move {
            let status = work.await.err().unwrap_or(Status::SUCCESS);
            me.finished(index, |conn, inner| {
                conn.io_done(inner, index, status, SgList::new());
            });
        })
        .detach();
    }

    /// A step of a task, if it is to go on: an I/O that an Abort of the command reaches. Returns what was read.
    async fn step(&self, index: u16, ns: &NsChannel, mut io: Box<Io>) -> Result<SgList, Status> {
        if self.inner.borrow().slots[index].cancelled {
            return Err(Status::ABORT_REQUESTED);
        }
        io.tag = self.tag(index);
        let mut io = ns.channel.io(io).await;
        let (status, data) = (io.status(), std::mem::take(&mut io.data));
        io.recycle();
        status.ok().map(|()| data).map_err(io::status)
    }

    /// Dataset Management: gives the ranges up one after the other.
    pub(super) fn deallocate(&self, inner: &mut Inner, index: u16, ns: Rc<NsChannel>, deallocate: bool) {
        let slot = &mut inner.slots[index];
        let ranges = match io::dsm_ranges(&slot.sqe, &slot.data, &ns.ns.geometry()) {
            Ok(r) => r,
            Err(status) => return self.complete(inner, index, status, 0),
        };
        slot.data = Buf::empty();
        if !deallocate || ranges.is_empty() {
            return self.complete(inner, index, Status::SUCCESS, 0);
        }
        self.task(inner, index, move |conn| async move {
            for (lba, blocks) in ranges {
                conn.step(index, &ns, Io::new(Op::Unmap, lba, blocks)).await?;
            }
            Ok(())
        });
    }

    /// Verify: reads, so that a device that checks what it reads has checked it.
    pub(super) fn verify(&self, inner: &mut Inner, index: u16, ns: Rc<NsChannel>, lba: u64, blocks: u64) {
        let Some(group) = self.group.upgrade() else { return };
        self.task(inner, index, move |conn| async move {
            let step = io::STEP_BYTES / u64::from(ns.ns.bdev().block_size_bytes());
            let mut done = 0;
            while done < blocks {
                let _permit = group.large_commands.acquire(1).await;
                let now = step.min(blocks - done);
                conn.step(index, &ns, Io::new(Op::Read, lba + done, now)).await?;
                done += now;
            }
            Ok(())
        });
    }

    /// Copy: reads all sources before it writes, so that they may overlap with the destination.
    pub(super) fn copy(&self, inner: &mut Inner, index: u16, ns: Rc<NsChannel>) {
        let (Some(group), Some(queue)) = (self.group.upgrade(), &inner.queue) else { return };
        let through = queue.controller.write_through();
        let slot = &mut inner.slots[index];
        let sqe = slot.sqe;
        let (ranges, _) = match io::copy_ranges(&sqe, &slot.data, &ns.ns.geometry()) {
            Ok(r) => r,
            Err(status) => return self.complete(inner, index, status, 0),
        };
        slot.data = Buf::empty();
        let fua = through || cryptfold_nvmf_spec::copy::control(&sqe).fua() == 1;
        self.task(inner, index, move |conn| async move {
            let _permit = group.large_commands.acquire(1).await;
            let mut data = SgList::new();
            for (lba, blocks) in ranges {
                data.append(conn.step(index, &ns, Io::new(Op::Read, lba, blocks)).await?);
            }
            let blocks = data.len_bytes() as u64 / u64::from(ns.ns.bdev().block_size_bytes());
            let mut write = Io::new(Op::Write, sqe.slba(), blocks);
            (write.data, write.fua) = (data, fua);
            conn.step(index, &ns, write).await.map(drop)
        });
    }

    /// Reservation Register, Acquire and Release.
    pub(super) fn reserve(&self, inner: &mut Inner, index: u16, ns: &Rc<NsChannel>) {
        let (Some(queue), Some(back)) = (&inner.queue, self.reference()) else { return };
        let controller = queue.controller.clone();
        let slot = &inner.slots[index];
        let make = || Arc::new(Later::new(back.clone(), index, slot.generation));
        let done = Request::parse(&slot.sqe, &slot.data).and_then(|request| {
            let aborts = matches!(request, Request::Preempt { abort: true, .. });
            let (outcome, later) = ns.ns.reservations.execute(controller.host.id, request, make)?;
            Ok((outcome, later, aborts))
        });
        let (outcome, mut later, aborts) = match done {
            Ok(done) => done,
            Err(status) => return self.complete(inner, index, status, 0),
        };
        let Outcome { notices, preempted, .. } = outcome;
        if aborts && !preempted.is_empty() {
            later.get_or_insert_with(make);
        }
        for other in controller.subsystem.controllers() {
            for (_, notice) in notices.iter().filter(|n| n.0 == other.host.id) {
                other.reservation_notice(ns.ns.nsid, *notice);
            }
            if let Some(later) = later.as_ref().filter(|_| aborts && preempted.contains(&other.host.id)) {
                for queue in other.connections() {
                    let (uid, later) = (ns.ns.uid, later.clone());
                    queue.send(move |conn| conn.abort_namespace(uid, &later));
                }
            }
        }
        match later {
            Some(later) => {
                self.begin(inner, index);
                drop(later);
            }
            None => self.complete(inner, index, Status::SUCCESS, 0),
        }
    }

    /// Reservation Report.
    pub(super) fn report_reservations(&self, inner: &mut Inner, index: u16, ns: &NsChannel, bytes: u32) {
        let Some(queue) = &inner.queue else { return };
        let controllers = queue.controller.subsystem.controllers();
        let controllers: Vec<_> = controllers.iter().map(|c| (c.cntlid, c.host.id)).collect();
        match ns.ns.reservations.report(&inner.slots[index].sqe, &controllers) {
            Ok(mut report) => {
                report.resize(bytes as usize, 0);
                self.complete_read(inner, index, SgList::from(Buf::from_slice(&report)));
            }
            Err(status) => self.complete(inner, index, status, 0),
        }
    }

    /// What a command waited for has happened.
    pub(crate) fn later_done(&self, index: u16, generation: u32, status: Status, dw0: u32) {
        let current =
            self.inner.borrow_mut().slots.get_mut(index).is_some_and(|s| s.generation == generation);
        assert!(current, "slot {index} was freed while its command waited");
        self.finished(index, |conn, inner| conn.complete(inner, index, status, dw0.into()));
    }

    /// Preempt and Abort by another host: ends the commands of this one on a namespace; `later` waits for them.
    fn abort_namespace(&self, uid: u64, later: &Arc<Later>) {
        let mut inner = self.inner.borrow_mut();
        if !self.state.get().answers() {
            // Its I/O was asked to end when it was closed.
            let executing = inner.slots.busy();
            for index in executing {
                inner.slots[index].waited_for.push(later.clone());
            }
            return;
        }
        for index in inner.slots.busy() {
            if inner.slots[index].channel.as_ref().is_none_or(|ns| ns.ns.uid != uid) {
                continue;
            }
            let slot = &mut inner.slots[index];
            slot.preempted = true;
            if slot.phase == Phase::Executing {
                slot.waited_for.push(later.clone());
            }
            self.end_early(&mut inner, index, Status::ABORTED_PREEMPT);
        }
    }

    /// Tries to end a command before its time, with this status. True: it will (or has just ended otherwise).
    pub(super) fn end_early(&self, inner: &mut Inner, index: u16, status: Status) -> bool {
        let slot = &mut inner.slots[index];
        match slot.phase {
            Phase::Executing => {
                slot.cancelled = true;
                // Tasks end with their next step, if there is one.
                slot.channel.as_ref().is_some_and(|ns| ns.channel.abort(self.tag(index)))
            }
            Phase::Waiting | Phase::Fused | Phase::Capsule | Phase::HostData => {
                self.unpair(inner, index);
                self.fail(inner, index, status);
                true
            }
            Phase::Free | Phase::Event => false,
        }
    }

    /// Abort: here for event requests, on the queue's own reactor for everything else.
    pub(super) fn abort_command(&self, inner: &mut Inner, index: u16, qid: Qid, cid: Cid) {
        let Some(controller) = inner.queue.as_ref().map(|q| q.controller.clone()) else { return };
        if qid.is_admin() {
            let event = controller.abort_event(cid);
            if let Some(event) = event {
                self.complete(inner, event, Status::ABORT_REQUESTED, 0);
            }
            return self.complete(inner, index, Status::SUCCESS, u64::from(event.is_none()));
        }
        let (Some(other), Some(back)) = (controller.queue(qid), self.reference()) else {
            return self.complete(inner, index, Status::SUCCESS, 1);
        };
        let later = Arc::new(Later::new(back, index, inner.slots[index].generation));
        later.set_dw0(NOT_ABORTED);
        self.begin(inner, index);
        other.send(move |conn| conn.abort(cid, &later));
    }

    /// Tries to end a command early, and tells `later` whether it did. What a device or a task has is looked at when it is back, so
    /// that the answer is true, but not waited for longer than `abort_timeout_sec`.
    fn abort(&self, cid: Cid, later: &Arc<Later>) {
        let mut inner = self.inner.borrow_mut();
        let Some(index) = inner.slots.find(cid) else { return };
        let executing = inner.slots[index].phase == Phase::Executing;
        let is_task = inner.slots[index].plan.is_some_and(|p| p.is_task());
        if !self.end_early(&mut inner, index, Status::ABORT_REQUESTED) && !is_task {
            return;
        }
        if !executing {
            return later.set_dw0(0);
        }
        // Devices complete by message: the command is still here.
        let slot = &mut inner.slots[index];
        slot.waited_for.push(later.clone());
        let (me, generation, later) = (self.me.clone(), slot.generation, Arc::downgrade(later));
        let limit = Duration::from_secs(self.options.abort_timeout_sec.into()).min(LONGEST_ABORT);
        reactor::spawn_local(async move {
            reactor::sleep(limit).await;
            let (Some(conn), Some(later)) = (me.upgrade(), later.upgrade()) else { return };
            let mut inner = conn.inner.borrow_mut();
            if let Some(slot) = inner.slots.get_mut(index).filter(|s| s.generation == generation) {
                slot.waited_for.retain(|l| !Arc::ptr_eq(l, &later));
                // "Not aborted" is true from here on, unless something else ends it.
                slot.cancelled = slot.preempted || !conn.state.get().answers();
            }
        })
        .detach();
    }
}
