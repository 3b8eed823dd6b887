//! Taking PDUs in: from the stream through the parser to slots and buffers.

use std::io::IoSliceMut;

use cryptfold_bdev::trace::{self, Stage};
use cryptfold_nvmf_spec::opcode::{Admin, Direction, FABRICS};
use cryptfold_nvmf_spec::pdu::build::{self, Format};
use cryptfold_nvmf_spec::pdu::{
    ADMIN_CAPSULE_DATA_BYTES, Digest, Event as PduEvent, Fes, Header, Limits, MAX_HDR_BYTES, Pdu, Term, field,
};
use cryptfold_nvmf_spec::{Cid, Sqe, Status, Ttag, fabrics};
use cryptfold_reactor as reactor;
use cryptfold_reactor::memory::Buf;

use super::slot::{Phase, Slot};
use super::state::{Event, State};
use super::transfer::{self, Transfer, TransferLimits};
use super::{Conn, Inner, MEMORY_WAIT, R2T_WINDOW_BYTES, R2TS_MAX};

/// Where the data of the current PDU goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rx {
    /// There is none.
    None,
    /// Nowhere.
    Discard,
    /// In-capsule data: to this slot, after so many bytes in front of what the SGL names.
    Capsule {
        /// The slot.
        slot: u16,
        /// Bytes still to skip.
        skip: u32,
    },
    /// Data that this slot's R2T asked for.
    HostData {
        /// The slot.
        slot: u16,
        /// This PDU completes it.
        last: bool,
    },
}

/// Less than this is not worth a buffer of its own in a receive.
const DIRECT_MIN_BYTES: usize = 4096;
/// With so much data on its way that belongs elsewhere, only headers are to land in the staging buffer.
const SMALL_STAGE_BYTES: usize = 4096;
/// R2T and response headers with digest and padding.
const HEAD_MAX_BYTES: usize = MAX_HDR_BYTES + 4;

/// Data that one R2T asks for, bytes: larger commands have several.
const R2T_BYTES: u32 = 128 << 10;

/// Where the R2T ends that asks for the byte at `at` of `total`.
fn r2t_end(at: u32, total: u32) -> u32 {
    (at / R2T_BYTES + 1).saturating_mul(R2T_BYTES).min(total)
}

/// Whether an admin command only asks: what a host may do without TLS that will come back with it.
fn prepares(opcode: u8) -> bool {
    use Admin::*;
    let all = [Identify, GetLogPage, GetFeatures, KeepAlive, AsyncEventRequest, Abort];
    all.iter().any(|o| *o as u8 == opcode)
}

/// A violation that ends the connection.
struct Violation {
    term: Term,
    why: &'static str,
}

fn violation(term: Term, why: &'static str) -> Result<(), Violation> {
    Err(Violation { term, why })
}

impl Conn {
    /// Receives once and takes apart what came.
    pub(super) fn receive(&self, inner: &mut Inner, staging: &mut [u8]) {
        if !inner.readable || !self.wants_input(inner) {
            return;
        }
        let (direct, staged) = match self.receive_once(inner, staging) {
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                inner.readable = false;
                return;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => return,
            Err(e) => return self.lost(inner, &e),
        };
        if direct + staged == 0 {
            return self.advance(inner, Event::PeerGone);
        }
        if direct > 0 {
            self.direct_data(inner, direct);
        }
        self.parse(inner, &staging[..staged]);
    }

    /// Returns (bytes that went to their buffer, bytes in `staging`).
    fn receive_once(&self, inner: &mut Inner, staging: &mut [u8]) -> std::io::Result<(usize, usize)> {
        let Some(wire) = &inner.wire else { return Ok((0, 0)) };
        let limit =
            if inner.r2t_bytes as usize >= 2 * SMALL_STAGE_BYTES { SMALL_STAGE_BYTES } else { staging.len() };
        let staging = &mut staging[..limit];
        let wanted = inner.parser.data_wanted() as usize;
        let target = match inner.rx {
            Rx::Capsule { slot, skip: 0 } | Rx::HostData { slot, .. } if wanted >= DIRECT_MIN_BYTES => {
                let slot = &mut inner.slots[slot];
                let at = slot.received as usize;
                slot.data.get_mut().and_then(|d| d.get_mut(at..)).map(|d| {
                    let len = d.len().min(wanted);
                    &mut d[..len]
                })
            }
            _ => None,
        };
        let begun = trace::begin();
        let (n, first, asked) = match target {
            Some(target) if !target.is_empty() => {
                let first = target.len();
                let asked = first + staging.len();
                let mut bufs = [IoSliceMut::new(target), IoSliceMut::new(staging)];
                // What follows the data belongs behind it only if the PDU's data ends there.
                let used = if first == wanted { 2 } else { 1 };
                let asked = if used == 2 { asked } else { first };
                (wire.recv(&mut bufs[..used])?, first, asked)
            }
            _ => (wire.recv(&mut [IoSliceMut::new(staging)])?, 0, limit),
        };
        begun.end(Stage::SocketReceive);
        // Less than there was room for: the stream is empty until it says otherwise.
        inner.readable = n == asked || n == 0 || inner.read_on;
        Ok((n.min(first), n.saturating_sub(first)))
    }

    /// `n` bytes went straight to the buffer of the current slot.
    fn direct_data(&self, inner: &mut Inner, n: usize) {
        let (Rx::Capsule { slot, .. } | Rx::HostData { slot, .. }) = inner.rx else { return };
        let ddgst = inner.format.ddgst;
        let slot = &mut inner.slots[slot];
        let at = slot.received as usize;
        if ddgst {
            slot.digest.update(&slot.data[at..at + n]);
        }
        slot.received += n as u32;
        inner.parser.data_received(n as u32);
    }

    fn parse(&self, inner: &mut Inner, mut input: &[u8]) {
        while self.state.get().receives() && !inner.closing {
            let progress = match inner.parser.feed(input) {
                Ok(p) => p,
                Err(e) => {
                    let header: smallvec::SmallVec<[u8; MAX_HDR_BYTES]> = inner.parser.header_bytes().into();
                    return self.fatal(inner, e.term(), &header, &e);
                }
            };
            let (now, rest) = input.split_at(progress.consumed);
            let result = match progress.event {
                PduEvent::NeedMore => return,
                PduEvent::Header(pdu) => self.header(inner, &pdu),
                PduEvent::Data { start, len } => {
                    self.data(inner, &now[start..start + len]);
                    Ok(())
                }
                PduEvent::End { ddgst } => {
                    self.data_end(inner, ddgst);
                    Ok(())
                }
            };
            if let Err(v) = result {
                let header: smallvec::SmallVec<[u8; MAX_HDR_BYTES]> = inner.parser.header_bytes().into();
                return self.fatal(inner, Some(v.term), &header, &v.why);
            }
            input = rest;
        }
    }

    fn header(&self, inner: &mut Inner, pdu: &Pdu) -> Result<(), Violation> {
        inner.rx = Rx::Discard;
        match pdu.header {
            Header::IcReq { align_bytes, hdgst, ddgst, max_r2t, .. } => {
                inner.max_r2ts = max_r2t.min(R2TS_MAX.into()) as u32;
                self.ic_req(inner, align_bytes, hdgst, ddgst)
            }
            Header::CapsuleCmd(sqe) => self.capsule(inner, sqe, pdu.layout.data_len),
            Header::H2cData { cid, ttag, offset, last } => {
                self.host_data(inner, (cid, ttag), offset, pdu.layout.data_len, last)
            }
            Header::TermReq { fes, fei } => {
                tracing::warn!("{}: the host ends the connection: FES {fes:#x}, FEI {fei:#x}", self.peer);
                self.advance(inner, Event::PeerGone);
                Ok(())
            }
            // The parser lets only PDUs to a controller through.
            _ => violation(Term::invalid_field(field::TYPE), "a PDU that flows the other way"),
        }
    }

    fn ic_req(&self, inner: &mut Inner, align: u32, hdgst: bool, ddgst: bool) -> Result<(), Violation> {
        let max_data_bytes = self.options.max_io_size;
        let written = inner.out.head(MAX_HDR_BYTES, |b| build::ic_resp(b, 0, hdgst, ddgst, max_data_bytes));
        if written.is_err() {
            return violation(Term::plain(Fes::SequenceError), "no ICResp could be built");
        }
        inner.format = Format { hdgst, ddgst, align_bytes: align };
        inner.parser.establish(Limits {
            hdgst,
            ddgst,
            align_bytes: 4,
            max_capsule_data_bytes: ADMIN_CAPSULE_DATA_BYTES.max(self.options.in_capsule_data_size),
            max_data_bytes,
        });
        self.advance(inner, Event::IcReq);
        Ok(())
    }

    /// A command.
    fn capsule(&self, inner: &mut Inner, sqe: Sqe, capsule_bytes: u32) -> Result<(), Violation> {
        // Only Fabrics commands, which authenticate queues in use, may have more than an I/O queue's capsules.
        let io = inner.queue.as_ref().is_some_and(|q| !q.qid.is_admin());
        if io && sqe.opcode != FABRICS && capsule_bytes > self.options.in_capsule_data_size {
            return violation(
                Term::invalid_field(field::PLEN),
                "more data in a capsule than the queue takes",
            );
        }
        let Some(index) = inner.slots.take(&sqe, Phase::Capsule) else {
            return violation(Term::plain(Fes::SequenceError), "more commands than the queue has entries");
        };
        if let Some(q) = &mut inner.queue {
            q.sqhd = if q.sqhd + 1 >= q.size { 0 } else { q.sqhd + 1 };
        }
        let admitted = if inner.slots[index].tracked {
            self.admit(inner, index, capsule_bytes)
        } else {
            Err(Status::COMMAND_ID_CONFLICT.with_dnr())
        };
        match self.pair_up(inner, index, admitted) {
            Err(status) if capsule_bytes > 0 => {
                inner.slots[index].failed = Some(status);
                inner.slots[index].asked = reactor::now();
                inner.rx = Rx::Capsule { slot: index, skip: capsule_bytes };
            }
            Err(status) => self.complete(inner, index, status, 0),
            Ok(Transfer::Capsule { offset, len }) => {
                // It comes in any case, in what room the queue's capsules have; others see that it is taken.
                if !self.take_memory(inner, index, len) {
                    inner.slots.charge(index, len);
                }
                let slot = &mut inner.slots[index];
                slot.data = Buf::alloc(len as usize);
                slot.asked = reactor::now();
                inner.rx = Rx::Capsule { slot: index, skip: offset };
                if capsule_bytes == 0 {
                    // Zero bytes of data were named, and none came.
                    self.execute(inner, index);
                }
            }
            Ok(Transfer::ToHost(bytes)) if inner.slots[index].plan.is_some() => {
                // Without a queue in front of it, and with memory, it need not wait.
                if inner.waiting.is_empty() && self.take_memory(inner, index, bytes) {
                    self.execute(inner, index);
                } else {
                    self.wait(inner, index);
                }
            }
            Ok(Transfer::FromHost(0) | Transfer::None | Transfer::ToHost(_)) => self.execute(inner, index),
            Ok(Transfer::FromHost(_)) => {
                self.wait(inner, index);
                self.start_waiting(inner);
            }
        }
        Ok(())
    }

    /// Checks a command as far as it can be without its data.
    fn admit(&self, inner: &mut Inner, index: u16, capsule_bytes: u32) -> Result<Transfer, Status> {
        let sqe = inner.slots[index].sqe;
        let limits = TransferLimits { max_io_bytes: self.options.max_io_size };
        let Some(queue) = &inner.queue else {
            // Nothing but Connect before there is a queue.
            let connect = matches!(sqe.fabrics(), Ok(fabrics::Command::Connect(_)));
            if self.state.get() != State::AwaitConnect || !connect {
                return Err(Status::COMMAND_SEQUENCE_ERROR);
            }
            return transfer::decode(&sqe, Direction::HostToController, capsule_bytes, limits);
        };
        let fabrics = if sqe.opcode == FABRICS { Some(sqe.fabrics()?) } else { None };
        match fabrics {
            Some(fabrics::Command::AuthenticationSend(c)) => {
                self.admit_auth(inner, &sqe, c)?;
                return transfer::decode(&sqe, Direction::HostToController, capsule_bytes, limits);
            }
            Some(fabrics::Command::AuthenticationReceive(c)) => {
                self.admit_auth(inner, &sqe, c)?;
                return transfer::decode(&sqe, Direction::ControllerToHost, capsule_bytes, limits);
            }
            _ if self.state.get() == State::Authenticating => {
                return Err(Status::AUTHENTICATION_REQUIRED.with_dnr());
            }
            _ => {}
        }
        if let Some(command) = fabrics {
            return match command {
                fabrics::Command::PropertyGet(_) | fabrics::Command::PropertySet(_)
                    if queue.qid.is_admin() =>
                {
                    Ok(Transfer::None)
                }
                fabrics::Command::Disconnect(_) if !queue.qid.is_admin() => Ok(Transfer::None),
                fabrics::Command::Connect(_) => Err(Status::COMMAND_SEQUENCE_ERROR.with_dnr()),
                _ => Err(Status::INVALID_OPCODE.with_dnr()),
            };
        }
        if queue.qid.is_admin() {
            if self.is_provisional(inner) && !prepares(sqe.opcode) {
                return Err(Status::AUTHENTICATION_REQUIRED.with_dnr());
            }
            let direction = queue.controller.admin_direction(&sqe)?;
            return transfer::decode(&sqe, direction, capsule_bytes, limits);
        }
        if !queue.controller.executes() {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        let ns = self.channel(inner, sqe.nsid())?;
        let plan = crate::io::plan(&sqe, &ns.ns.geometry())?;
        let transfer = transfer::decode(&sqe, plan.direction(), capsule_bytes, limits)?;
        if plan.direction() != Direction::None {
            plan.check_transfer(transfer.bytes(), limits.max_io_bytes)?;
        }
        let slot = &mut inner.slots[index];
        slot.plan = Some(plan);
        slot.channel = Some(ns);
        Ok(transfer)
    }

    fn wait(&self, inner: &mut Inner, index: u16) {
        inner.slots[index].phase = Phase::Waiting;
        inner.waiting.push_back(index);
        self.list();
    }

    /// Takes memory for a command's data; `false` if there is none now.
    fn take_memory(&self, inner: &mut Inner, index: u16, bytes: u32) -> bool {
        let held = inner.slots.held_bytes() + inner.out.bytes() as u64;
        let Some(place) = &mut inner.place else { return true };
        // One command may always go on.
        if !place.cover(held + u64::from(bytes)) && held > 0 {
            return false;
        }
        inner.slots.charge(index, bytes);
        true
    }

    /// Goes on with the commands that wait, in order, as far as there is memory for their data.
    pub(super) fn start_waiting(&self, inner: &mut Inner) {
        while let Some(&index) = inner.waiting.front() {
            if !self.state.get().answers() {
                return;
            }
            let len = inner.slots[index].sqe.sgl.length.get();
            let to_host =
                inner.slots[index].plan.is_some_and(|p| p.direction() == Direction::ControllerToHost);
            if !to_host && inner.r2t_bytes > 0 && inner.r2t_bytes + u64::from(len) > R2T_WINDOW_BYTES {
                return;
            }
            if !self.take_memory(inner, index, len) {
                return self.retry(inner);
            }
            inner.waiting.pop_front();
            if to_host {
                self.execute(inner, index);
                continue;
            }
            let slot = &mut inner.slots[index];
            slot.data = Buf::alloc(len as usize);
            slot.phase = Phase::HostData;
            inner.r2t_bytes += u64::from(len);
            self.ask_for_data(inner, index);
        }
    }

    /// Looks again in a moment: it may be others that have the memory.
    fn retry(&self, inner: &mut Inner) {
        if std::mem::replace(&mut inner.retrying, true) {
            return;
        }
        let me = self.me.clone();
        reactor::spawn_local(async move {
            reactor::sleep(MEMORY_WAIT).await;
            if let Some(conn) = me.upgrade() {
                conn.inner.borrow_mut().retrying = false;
                conn.list();
            }
        })
        .detach();
    }

    /// Sends R2Ts for the rest of a command's data, as many as the host takes.
    fn ask_for_data(&self, inner: &mut Inner, index: u16) {
        loop {
            let slot = &inner.slots[index];
            let (at, total) = (slot.asked_bytes, slot.data.len() as u32);
            if at == total || slot.r2ts >= inner.max_r2ts {
                return;
            }
            let (cid, format, len) = (slot.sqe.cid(), inner.format, r2t_end(at, total) - at);
            let built = inner.out.head(HEAD_MAX_BYTES, |b| build::r2t(b, cid, Ttag(index), at, len, format));
            // Header, digest and padding fit.
            debug_assert!(built.is_ok());
            let slot = &mut inner.slots[index];
            slot.asked_bytes += len;
            slot.r2ts += 1;
            slot.asked = reactor::now();
            self.list();
        }
    }

    /// A piece of the data that was asked for: in order, within what was asked, LAST exactly at its end.
    fn host_data(
        &self,
        inner: &mut Inner,
        (cid, ttag): (Cid, Ttag),
        offset: u32,
        len: u32,
        last: bool,
    ) -> Result<(), Violation> {
        let known = |s: &&mut Slot| s.phase == Phase::HostData;
        let Some(slot) = inner.slots.get_mut(ttag.0).filter(known) else {
            return violation(Term::invalid_field(field::TTAG), "H2CData with a tag that was not given out");
        };
        if slot.sqe.cid() != cid {
            return violation(Term::invalid_field(field::CCCID), "H2CData with another command's tag");
        }
        // R2Ts are answered in their order.
        let end = r2t_end(slot.received, slot.data.len() as u32);
        if u64::from(offset) + u64::from(len) > u64::from(slot.asked_bytes) {
            return violation(Term::plain(Fes::OutOfRange), "H2CData beyond what was asked for");
        }
        if offset != slot.received {
            return violation(Term::invalid_field(field::DATAO), "H2CData out of order");
        }
        if last != (offset + len == end) || offset + len > end {
            return violation(Term::invalid_field(field::FLAGS), "H2CData with LAST in the wrong place");
        }
        slot.digest = Digest::new();
        inner.rx = Rx::HostData { slot: ttag.0, last };
        Ok(())
    }

    /// Data that came through the staging buffer.
    fn data(&self, inner: &mut Inner, mut bytes: &[u8]) {
        let index = match &mut inner.rx {
            Rx::Capsule { slot, skip } => {
                // The digest covers the whole capsule's data, also what the SGL leaves out.
                let skipped = bytes.len().min(*skip as usize);
                if inner.format.ddgst {
                    inner.slots[*slot].digest.update(&bytes[..skipped]);
                }
                *skip -= skipped as u32;
                bytes = &bytes[skipped..];
                *slot
            }
            Rx::HostData { slot, .. } => *slot,
            Rx::None | Rx::Discard => return,
        };
        let slot = &mut inner.slots[index];
        if inner.format.ddgst {
            slot.digest.update(bytes);
        }
        let at = slot.received as usize;
        let n = bytes.len().min(slot.data.len() - at);
        if n > 0
            && let Some(target) = slot.data.get_mut()
        {
            target[at..at + n].copy_from_slice(&bytes[..n]);
            slot.received += n as u32;
        }
    }

    /// The current PDU is complete.
    fn data_end(&self, inner: &mut Inner, ddgst: Option<u32>) {
        let (index, done) = match std::mem::replace(&mut inner.rx, Rx::None) {
            Rx::Capsule { slot, .. } => (slot, true),
            Rx::HostData { slot, last } => {
                let s = &mut inner.slots[slot];
                s.r2ts -= u32::from(last);
                (slot, s.received as usize == s.data.len())
            }
            Rx::None | Rx::Discard => return,
        };
        let slot = &mut inner.slots[index];
        if ddgst.is_some_and(|d| d != slot.digest.value()) {
            tracing::warn!("{}: data digest error of command {}", self.peer, slot.sqe.cid());
            slot.failed = slot.failed.or(Some(Status::TRANSIENT_TRANSPORT_ERROR));
        }
        if !done {
            return self.ask_for_data(inner, index);
        }
        if slot.phase == Phase::HostData {
            inner.r2t_bytes -= slot.data.len() as u64;
            self.start_waiting(inner);
        }
        self.execute(inner, index);
    }
}
