//! Carrying commands out, and answering them.

use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::trace::Stage;
use cryptfold_bdev::{Complete, Frame, Io, Op};
use cryptfold_nvmf_auth::Names;
use cryptfold_nvmf_spec::fabrics::{Command, ConnectData, ConnectReject, ConnectResult};
use cryptfold_nvmf_spec::opcode::FABRICS;
use cryptfold_nvmf_spec::pdu::build::{self, DataPart};
use cryptfold_nvmf_spec::pdu::{Digest, MAX_HDR_BYTES};
use cryptfold_nvmf_spec::sqe::Fuse;
use cryptfold_nvmf_spec::{Cqe, Qid, Status};
use cryptfold_reactor as reactor;
use cryptfold_reactor::memory::SgList;
use zerocopy::FromBytes;

use super::slot::Phase;
use super::state::State;
use super::{Conn, Inner, Queue};
use crate::audit;
use crate::controller::events::Report;
use crate::controller::{Answer, QueueRef};
use crate::info::TlsUse;
use crate::io::{self, Plan};
use crate::later::Later;
use crate::port::PortSecurity;
use crate::reservation::Access;
use crate::stats::QueueStats;
use crate::subsystem::NsChannel;
use crate::target::NewQueue;
use crate::wire::TlsPeer;

/// Header, digest and padding of a PDU to the host.
const HEAD_MAX_BYTES: usize = MAX_HDR_BYTES + 4;
/// SQHD of a Connect response that agrees to do without flow control.
const SQHD_NO_FLOW_CONTROL: u16 = 0xffff;

impl Conn {
    /// All of the command's data is here.
    pub(super) fn execute(&self, inner: &mut Inner, index: u16) {
        if let Some(status) = inner.slots[index].failed {
            self.unpair(inner, index);
            return self.complete(inner, index, status, 0);
        }
        let Some(queue) = &inner.queue else { return self.connect(inner, index) };
        let sqe = inner.slots[index].sqe;
        if sqe.opcode == FABRICS {
            return self.fabrics(inner, index);
        }
        if !queue.qid.is_admin() {
            return self.submit(inner, index);
        }
        let controller = queue.controller.clone();
        let room = sqe.sgl.length.get().min(self.options.max_io_size);
        let data = std::mem::take(&mut inner.slots[index].data);
        let generation = inner.slots[index].generation;
        let later = || self.reference().map(|back| Arc::new(Later::new(back, index, generation)));
        let answer = controller.admin(&sqe, index, &data, room, &later);
        self.answer(inner, index, answer);
    }

    fn answer(&self, inner: &mut Inner, index: u16, answer: Answer) {
        match answer {
            Answer::Done(status, result) => self.complete(inner, index, status, result),
            Answer::Data(buf) => self.complete_read(inner, index, SgList::from(buf)),
            Answer::Waits => inner.slots[index].phase = Phase::Event,
            Answer::Abort(qid, cid) => self.abort_command(inner, index, qid, cid),
            // Completes by message, so not before this.
            Answer::Later(later) => {
                self.begin(inner, index);
                drop(later);
            }
        }
    }

    fn fabrics(&self, inner: &mut Inner, index: u16) {
        let sqe = inner.slots[index].sqe;
        let Some(controller) = inner.queue.as_ref().map(|q| q.controller.clone()) else { return };
        match sqe.fabrics() {
            Ok(Command::PropertyGet(c)) => self.answer(inner, index, controller.property(c, false).0),
            Ok(Command::PropertySet(c)) => {
                let (answer, ended) = controller.property(c, true);
                for event in ended {
                    self.complete(inner, event, Status::ABORTED_SQ_DELETION, 0);
                }
                self.answer(inner, index, answer);
            }
            Ok(Command::Disconnect(c)) if c.recfmt.get() == 0 => {
                self.complete(inner, index, Status::SUCCESS, 0);
                inner.closing = true;
            }
            Ok(Command::Disconnect(_)) => {
                self.complete(inner, index, Status::CONNECT_INCOMPATIBLE_FORMAT.with_dnr(), 0);
            }
            Ok(Command::AuthenticationSend(_)) => self.auth_send(inner, index),
            Ok(Command::AuthenticationReceive(_)) => self.auth_receive(inner, index),
            // Admission let nothing else through.
            _ => self.complete(inner, index, Status::INVALID_OPCODE.with_dnr(), 0),
        }
    }

    /// Whether a Connect fits what TLS has proven, and why not.
    fn tls_refuses(&self, data: &ConnectData, qid: Qid, tls: Option<&TlsPeer>) -> Option<&'static str> {
        let names = data.names().ok()?;
        let both = Names { host: names.hostnqn.into(), subsystem: names.subnqn.into() };
        let why = self.group.upgrade()?.target.tls_refuses(&both, tls, &self.port, qid)?;
        audit::refused(&self.peer, names.hostnqn, names.subnqn, "tls", why);
        Some(why)
    }

    fn connect(&self, inner: &mut Inner, index: u16) {
        let sqe = inner.slots[index].sqe;
        let data = std::mem::take(&mut inner.slots[index].data);
        let (Ok(Command::Connect(command)), Ok((data, _))) =
            (sqe.fabrics(), ConnectData::ref_from_prefix(&data))
        else {
            return self.complete(inner, index, Status::DATA_SGL_LENGTH_INVALID.with_dnr(), 0);
        };
        let (Some(group), Some(conn)) = (self.group.upgrade(), self.reference()) else { return };
        let tls = inner.wire.as_ref().and_then(|w| w.tls());
        if let Some(why) = self.tls_refuses(data, command.qid(), tls.as_ref()) {
            tracing::warn!("{}: {why}", self.peer);
            let (status, dw0) = ConnectReject::Host.completion();
            return self.complete(inner, index, status, dw0.into());
        }
        let stats = Arc::new(QueueStats::default());
        // Below 65,536 entries: Connect checks SQSIZE against the limits before it is used.
        let size = u32::from(command.sqsize.get()) + 1;
        let used = |t: &TlsPeer| TlsUse { cipher: t.cipher.clone(), send: t.layers.0, receive: t.layers.1 };
        let used = tls.as_ref().map(used);
        let queue = QueueRef { conn, stats: stats.clone(), size, peer: self.peer.clone(), tls: used };
        let tls = tls.as_ref();
        let new = NewQueue { command, data, port: &self.port, options: &self.options, queue, tls };
        match group.target.connect(new) {
            Ok((controller, place)) => {
                inner.place = Some(place);
                let no_flow_control = command.cattr().no_sq_flow_control() != 0;
                let cntlid = controller.cntlid;
                // Who has a generated key has authenticated for it.
                let proven = tls.is_some_and(|t| t.generated.is_some());
                let authenticate =
                    !proven && controller.subsystem.access(&controller.host.nqn).dhchap.is_some();
                let concatenate =
                    authenticate && tls.is_none() && self.port.security == PortSecurity::Concatenation;
                let queue = Queue {
                    controller,
                    qid: command.qid(),
                    size: u16::try_from(size).unwrap_or(u16::MAX),
                    sqhd: 1,
                    no_flow_control,
                    stats,
                };
                self.connected(inner, queue, authenticate);
                let sqhd = if no_flow_control { SQHD_NO_FLOW_CONTROL } else { 1 };
                let result = ConnectResult::default().with_cntlid(cntlid.0.into());
                let result = result.with_atr(authenticate.into()).with_ascr(concatenate.into()).0;
                self.respond(inner, index, Status::SUCCESS, result.into(), sqhd);
            }
            Err(reject) => {
                tracing::warn!("{}: {reject}", self.peer);
                if reject == ConnectReject::Host
                    && let Ok(names) = data.names()
                {
                    let (method, why) = match group.target.admits(names.subnqn, names.hostnqn, &self.port) {
                        false => ("host list", "not in it"),
                        true => ("tls", "the association has another key, or the key is another's"),
                    };
                    audit::refused(&self.peer, names.hostnqn, names.subnqn, method, why);
                }
                let (status, dw0) = reject.completion();
                self.complete(inner, index, status, dw0.into());
            }
        }
    }

    /// Hands an I/O command to its device.
    fn submit(&self, inner: &mut Inner, index: u16) {
        let slot = &mut inner.slots[index];
        if slot.sqe.fuse() != Fuse::None {
            (slot.phase, slot.asked) = (Phase::Fused, reactor::now());
            let other = slot.partner.filter(|p| inner.slots[*p].phase == Phase::Fused);
            if let Some(other) = other {
                self.submit_fused(inner, index, other);
            }
            return;
        }
        let (Some(plan), Some(ns)) = (slot.plan, slot.channel.clone()) else {
            // Admission gave every I/O command both.
            return self.complete(inner, index, Status::INTERNAL_ERROR, 0);
        };
        if let Err(status) = self.may(inner, &ns, plan.access()) {
            return self.complete(inner, index, status, 0);
        }
        let slot = &mut inner.slots[index];
        match plan {
            Plan::Block { op, lba, blocks, fua, .. } => {
                let mut io = Io::new(op, lba, blocks);
                io.fua = fua;
                io.data = SgList::from(std::mem::take(&mut slot.data));
                self.start(inner, index, &ns, io);
            }
            Plan::Ranges { deallocate, .. } => self.deallocate(inner, index, ns, deallocate),
            Plan::Verify { lba, blocks } => self.verify(inner, index, ns, lba, blocks),
            Plan::Copy { .. } => self.copy(inner, index, ns),
            Plan::Reservation { .. } => self.reserve(inner, index, &ns),
            Plan::ReservationReport { bytes } => self.report_reservations(inner, index, &ns, bytes),
        }
    }

    /// Both halves are here: one operation, under the write's slot.
    fn submit_fused(&self, inner: &mut Inner, index: u16, other: u16) {
        let write_second = inner.slots[index].sqe.fuse() == Fuse::Second;
        let (first, second) = if write_second { (other, index) } else { (index, other) };
        let expected = std::mem::take(&mut inner.slots[first].data);
        if let Some(ns) = inner.slots[second].channel.clone()
            && let Err(status) = self.may(inner, &ns, Access::Write)
        {
            self.complete(inner, first, status, 0);
            return self.complete(inner, second, Status::ABORTED_FAILED_FUSED, 0);
        }
        inner.slots[first].phase = Phase::Executing;
        let slot = &mut inner.slots[second];
        let (Some(Plan::Block { lba, blocks, fua, .. }), Some(ns)) = (slot.plan, slot.channel.clone()) else {
            return;
        };
        let mut io = Io::new(Op::CompareAndWrite, lba, blocks);
        io.fua = fua;
        io.compare = SgList::from(expected);
        io.data = SgList::from(std::mem::take(&mut slot.data));
        self.start(inner, second, &ns, io);
    }

    fn start(&self, inner: &mut Inner, index: u16, ns: &NsChannel, mut io: Box<Io>) {
        let (Some(me), Some(queue)) = (self.me.upgrade(), &inner.queue) else { return };
        io.fua |= queue.controller.write_through() && io.op.modifies();
        io.tag = self.tag(index);
        io.push(me, 0, u64::from(index));
        self.begin(inner, index);
        // Completes by message, never in here.
        ns.channel.submit(io);
    }

    /// A device, task or other core has the command now.
    pub(super) fn begin(&self, inner: &mut Inner, index: u16) {
        let slot = &mut inner.slots[index];
        slot.phase = Phase::Executing;
        slot.begun.next(Stage::Receive);
        inner.executing += 1;
        if let Some(queue) = &inner.queue {
            queue.stats.set_executing(inner.executing);
        }
    }

    /// What a device, task or other core held is back: answers it, or in a connection that ends, lets go of it.
    pub(super) fn finished(&self, index: u16, answer: impl FnOnce(&Conn, &mut Inner)) {
        let mut inner = self.inner.borrow_mut();
        inner.executing -= 1;
        if let Some(queue) = &inner.queue {
            queue.stats.set_executing(inner.executing);
        }
        if self.state.get().answers() {
            return answer(self, &mut inner);
        }
        if let Some(partner) = inner.slots[index].partner {
            inner.slots.release(partner);
        }
        inner.slots.release(index);
        if self.state.get() == State::Draining && inner.executing == 0 {
            self.advance(&mut inner, super::state::Event::Drained);
        }
    }

    pub(super) fn io_done(&self, inner: &mut Inner, index: u16, mut status: Status, data: SgList) {
        let slot = &inner.slots[index];
        if slot.preempted && status.code() == Status::ABORT_REQUESTED {
            status = Status::ABORTED_PREEMPT;
        }
        let bytes = slot.plan.map_or(0, |p| p.bytes());
        match slot.plan {
            Some(Plan::Block { op: Op::Read, .. }) if status.is_success() => {
                if data.len_bytes() == bytes as usize {
                    return self.complete_read(inner, index, data);
                }
                tracing::error!("a device returned {} bytes of {bytes}", data.len_bytes());
                self.complete(inner, index, Status::INTERNAL_ERROR, 0);
            }
            _ => match inner.slots[index].partner {
                Some(first) => {
                    let (a, b) = io::fused(status);
                    self.complete(inner, first, a, 0);
                    self.complete(inner, index, b, 0);
                }
                None => self.complete(inner, index, status, 0),
            },
        }
    }

    /// Answers a command and frees its slot.
    pub(super) fn complete(&self, inner: &mut Inner, index: u16, status: Status, result: u64) {
        let sqhd = inner.queue.as_ref().map_or(0, |q| q.sqhd);
        self.respond(inner, index, status, result, sqhd);
    }

    fn respond(&self, inner: &mut Inner, index: u16, status: Status, result: u64, sqhd: u16) {
        let cid = inner.slots[index].sqe.cid();
        let cqe = Cqe::new(cid, sqhd, status).with_result(result);
        let format = inner.format;
        let built = inner.out.head(HEAD_MAX_BYTES, |b| build::capsule_resp(b, &cqe, format));
        // A response always fits its buffer.
        debug_assert!(built.is_ok());
        self.count(inner, index, status);
        if status.code() == Status::ABORT_REQUESTED {
            inner.slots[index].waited_for.iter().for_each(|l| l.set_dw0(0));
        }
        inner.slots.release(index);
        self.list();
    }

    /// Answers a command with data: C2HData, and a response where the data can not stand for it.
    pub(super) fn complete_read(&self, inner: &mut Inner, index: u16, data: SgList) {
        let cid = inner.slots[index].sqe.cid();
        // At most max_io_size.
        let len = data.len_bytes() as u32;
        if len == 0 {
            return self.complete(inner, index, Status::SUCCESS, 0);
        }
        let instead = self.options.c2h_success && inner.queue.as_ref().is_some_and(|q| q.no_flow_control);
        let part = DataPart { cid, offset: 0, len, last: true };
        let format = inner.format;
        let built = inner.out.head(HEAD_MAX_BYTES, |b| build::c2h_data(b, part, instead, format));
        if built.is_err() {
            return self.complete(inner, index, Status::INTERNAL_ERROR, 0);
        }
        let digest = format.ddgst.then(|| {
            let mut digest = Digest::new();
            data.iter().for_each(|b| digest.update(b));
            digest.value().to_le_bytes()
        });
        inner.out.data(data);
        if let Some(digest) = digest {
            inner.out.copy(&digest);
        }
        if instead {
            self.count(inner, index, Status::SUCCESS);
            inner.slots.release(index);
            self.list();
        } else {
            self.complete(inner, index, Status::SUCCESS, 0);
        }
    }

    fn count(&self, inner: &Inner, index: u16, status: Status) {
        let Some(queue) = &inner.queue else { return };
        match inner.slots[index].plan {
            Some(Plan::Block { op: Op::Read | Op::Compare, bytes, .. }) => queue.stats.read(bytes.into()),
            Some(Plan::Block { op: Op::Write, bytes, .. }) => queue.stats.write(bytes.into()),
            Some(Plan::Verify { blocks, .. }) => {
                let ns = inner.slots[index].channel.as_ref();
                queue.stats.read(ns.map_or(0, |ns| blocks * u64::from(ns.ns.bdev().block_size_bytes())));
            }
            _ => queue.stats.other(),
        }
        if !status.is_success() {
            queue.stats.error();
            queue.controller.log_error(queue.qid, &inner.slots[index].sqe, status);
        }
    }

    /// An event is to be reported by the request in this slot.
    pub fn complete_event(&self, report: Report) {
        let mut inner = self.inner.borrow_mut();
        let waits = inner.slots.get_mut(report.slot).is_some_and(|s| s.phase == Phase::Event);
        if waits && self.state.get() == State::Ready {
            self.complete(&mut inner, report.slot, Status::SUCCESS, report.dw0.into());
        }
    }
}

impl Complete for Conn {
    fn complete(self: Rc<Self>, mut io: Box<Io>, frame: Frame) {
        let index = frame.word as u16;
        let status = io::status(io.status());
        let data = std::mem::take(&mut io.data);
        io.recycle();
        self.finished(index, |conn, inner| {
            let mut begun = inner.slots[index].begun;
            begun.next(Stage::Device);
            conn.io_done(inner, index, status, data);
            begun.end(Stage::Answer);
        });
    }
}
