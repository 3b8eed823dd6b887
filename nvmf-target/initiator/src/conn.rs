//! One connection of one queue: the only owner of its socket, parser, slots and output.
//!
//! Life: greeting (ICReq sent, ICResp awaited) -> open -> closed, for ever. Closing fails whatever is under way, once.
//!
//! A turn of the poller receives what is there and sends what is queued, each with one system call if that suffices.
//! Nobody is called while the state is borrowed: finished I/O is deferred to the reactor, futures are woken.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::net::Shutdown;
use std::rc::{Rc, Weak};
use std::time::Duration;

use cryptfold_bdev::{Io, Status as IoStatus};
use cryptfold_nvmf_spec as spec;
use cryptfold_nvmf_tls::Layer;
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reactor::sync::oneshot;
use cryptfold_reactor::{self as reactor, Poller, PollerGuard, SleepVerdict};
use smallvec::SmallVec;
use spec::pdu::build::{self, DataPart, Format};
use spec::pdu::{ADMIN_CAPSULE_DATA_BYTES, Digest, Event, Fes, Header, Limits, Parser, Pdu, Role, Term};
use spec::{Cid, Cqe, Sgl, Sqe, Status, Ttag};
use zerocopy::little_endian::U16;

use crate::output::Output;
use crate::queue::{self, Ns};
use crate::slots::{Owner, Reply, ReplySender, Slot, Slots};
use crate::watch::{OnReady, Ready, Watch};
use crate::{CloseReason, ConnectOptions, Error, Wire};

/// Bytes received at once when they have no better place to go.
const STAGING_BYTES: usize = 256 << 10;
/// The same while large reads are under way, whose data then goes past it into place.
const SMALL_STAGING_BYTES: usize = 4 << 10;
/// Mean size of reads from which that is better.
const LARGE_READ_BYTES: u64 = 16 << 10;
/// Data that is worth a place of its own in a receive call.
const DIRECT_BYTES: usize = 2 << 10;
/// Receive calls in one turn.
const RECEIVES: usize = 4;
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(250);
/// R2Ts per command that this host keeps: MAXR2T, 0's based.
const MAX_R2T: u32 = 15;
/// Data in one C2HData that is accepted; the command's own length is the real limit.
const MAX_C2H_DATA_BYTES: u32 = 1 << 30;
/// Header, digest and padding of any PDU.
const HEADER_ROOM: usize = 160;

/// A command that is no I/O.
pub(crate) struct Call {
    pub sqe: Sqe,
    pub payload: Payload,
    /// Whether the time limit of I/O applies.
    pub timed: bool,
    pub reply: ReplySender,
}

/// A command's data.
pub(crate) enum Payload {
    /// None, and the bytes of the descriptor mean something else (Property Get and Set).
    Raw,
    /// None.
    Nothing,
    /// So many bytes to be received.
    In(u32),
    /// To be sent.
    Out(SgList),
}

/// Work that waits for slots.
enum Job {
    Io(Ns, Box<Io>),
    Call(Call),
}

impl Job {
    fn slots(&self) -> usize {
        match self {
            Job::Io(_, io) => queue::slots_needed(io),
            Job::Call(_) => 1,
        }
    }
}

/// Why the connection has to end, and what the target is told.
struct Fatal {
    reason: CloseReason,
    term: Option<Term>,
}

fn violation(text: &'static str, fes: Fes) -> Fatal {
    Fatal { reason: CloseReason::Answer(text), term: Some(Term::plain(fes)) }
}

enum Phase {
    Greeting(Option<oneshot::Sender<Result<(), CloseReason>>>),
    Open,
    Closed(CloseReason),
}

/// The C2HData being received.
struct Receiving {
    slot: usize,
    last: bool,
    success: bool,
    digest: Digest,
}

pub(crate) struct State {
    phase: Phase,
    parser: Parser,
    hdgst: bool,
    ddgst: bool,
    format: Format,
    max_h2c_bytes: u32,
    /// In-capsule data that the target takes on this queue.
    pub capsule_bytes: u32,
    pub slots: Slots,
    waiting: VecDeque<Job>,
    output: Output,
    receiving: Option<Receiving>,
    staging: Box<[u8]>,
    /// Reads under way, and their bytes.
    reads: u64,
    read_bytes: u64,
    tick: u32,
}

/// A connection. Closed when the last reference is dropped.
pub(crate) struct Conn {
    wire: Box<dyn Wire>,
    /// Address and queue, for people.
    label: String,
    state: RefCell<State>,
    readable: Cell<bool>,
    writable: Cell<bool>,
    /// The end was seen: bytes that do not fill the buffers are not the last to come.
    ending: Cell<bool>,
    watch: RefCell<Option<Watch>>,
    poller: RefCell<Option<PollerGuard>>,
}

struct Pump(Weak<Conn>);

impl Poller for Pump {
    fn poll(&self) -> bool {
        self.0.upgrade().is_some_and(|c| c.turn())
    }
    fn prepare_sleep(&self) -> SleepVerdict {
        let busy = self
            .0
            .upgrade()
            .is_some_and(|c| c.readable.get() || (c.writable.get() && !c.state.borrow().output.is_empty()));
        if busy { SleepVerdict::KeepPolling } else { SleepVerdict::MaySleep }
    }
}

impl OnReady for Conn {
    fn ready(&self, ready: Ready) {
        self.readable.set(self.readable.get() | ready.readable);
        self.writable.set(self.writable.get() | ready.writable);
        self.ending.set(self.ending.get() | ready.ending);
    }
}

impl Conn {
    /// Greets the target: returns when ICResp has come. `slots`: commands under way at most.
    pub async fn open(
        wire: Box<dyn Wire>,
        label: String,
        slots: usize,
        options: &ConnectOptions,
    ) -> Result<Rc<Conn>, Error> {
        let (greeted, greeting) = oneshot::channel();
        let mut output = Output::default();
        let mut header = [0; HEADER_ROOM];
        // 128 bytes fit, and there is no data whose length could be wrong.
        let n = build::ic_req(&mut header, 0, options.hdgst, options.ddgst, MAX_R2T).unwrap_or(0);
        output.push_bytes(&header[..n]);
        let conn = Rc::new(Conn {
            wire,
            label,
            state: RefCell::new(State {
                phase: Phase::Greeting(Some(greeted)),
                parser: Parser::new(Role::Host),
                hdgst: options.hdgst,
                ddgst: options.ddgst,
                format: Format::default(),
                max_h2c_bytes: 0,
                capsule_bytes: ADMIN_CAPSULE_DATA_BYTES,
                slots: Slots::new(slots),
                waiting: VecDeque::new(),
                output,
                receiving: None,
                staging: vec![0; STAGING_BYTES].into_boxed_slice(),
                reads: 0,
                read_bytes: 0,
                tick: 0,
            }),
            readable: Cell::new(true),
            writable: Cell::new(true),
            ending: Cell::new(false),
            watch: RefCell::new(None),
            poller: RefCell::new(None),
        });
        conn.start(options.io_timeout);
        let limit = options.connect_timeout;
        match reactor::timeout(limit, greeting).await {
            Ok(Ok(Ok(()))) => Ok(conn),
            Ok(Ok(Err(reason))) => Err(conn.closed_error(reason)),
            Ok(Err(_)) => Err(conn.closed_error(CloseReason::Local)),
            Err(_) => Err(Error::Timeout {
                address: conn.label.clone(),
                what: "the connection request (ICReq)",
                seconds: limit.as_secs(),
            }),
        }
    }

    fn start(self: &Rc<Self>, io_timeout: Duration) {
        let me = Rc::downgrade(self);
        match self.wire.descriptor() {
            Some(fd) => *self.watch.borrow_mut() = Watch::new(fd, me.clone() as Weak<dyn OnReady>),
            None => {
                let me = me.clone();
                self.wire.on_ready(Rc::new(move || {
                    if let Some(conn) = me.upgrade() {
                        conn.ready(Ready { readable: true, writable: true, ending: true });
                    }
                }));
            }
        }
        *self.poller.borrow_mut() = Some(reactor::register_poller("nvmf_host", Rc::new(Pump(me.clone()))));
        let limit = io_timeout.as_millis().div_ceil(TICK.as_millis()) as u32;
        reactor::spawn_local(async move {
            loop {
                reactor::sleep(TICK).await;
                let Some(conn) = me.upgrade() else { return };
                if conn.is_closed() {
                    return;
                }
                conn.tick(limit, io_timeout);
            }
        })
        .detach();
    }

    pub fn label(&self) -> &str {
        &self.label
    }

    pub fn is_closed(&self) -> bool {
        matches!(self.state.borrow().phase, Phase::Closed(_))
    }

    /// Why it is closed, if it is.
    pub fn close_reason(&self) -> Option<CloseReason> {
        match &self.state.borrow().phase {
            Phase::Closed(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    pub fn closed_error(&self, reason: CloseReason) -> Error {
        Error::Closed { address: self.label.clone(), reason }
    }

    /// In-capsule data that the target takes, from now on. Bytes.
    pub fn set_capsule_bytes(&self, bytes: u32) {
        self.state.borrow_mut().capsule_bytes = bytes;
    }

    /// Commands under way, and waiting to be.
    pub fn outstanding(&self) -> usize {
        let s = self.state.borrow();
        s.slots.in_use() + s.waiting.len()
    }

    /// Runs a command and waits for its answer.
    pub async fn call(&self, sqe: Sqe, payload: Payload, timed: bool) -> Result<Reply, Error> {
        let (reply, answer) = oneshot::channel();
        self.state.borrow_mut().submit(Job::Call(Call { sqe, payload, timed, reply }));
        match answer.await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(reason)) => Err(self.closed_error(reason)),
            Err(_) => Err(self.closed_error(CloseReason::Local)),
        }
    }

    #[inline]
    pub fn submit(&self, ns: Ns, io: Box<Io>) {
        self.state.borrow_mut().submit(Job::Io(ns, io));
    }

    /// Ends the connection and everything under way.
    pub fn close(&self, reason: CloseReason) {
        self.end(&mut self.state.borrow_mut(), Fatal { reason, term: None });
    }

    fn tick(&self, limit: u32, io_timeout: Duration) {
        let mut s = self.state.borrow_mut();
        s.tick = s.tick.wrapping_add(1);
        if s.slots.overdue(s.tick, limit) {
            let reason = CloseReason::Timeout(io_timeout.as_secs().max(1));
            self.end(&mut s, Fatal { reason, term: None });
        }
    }

    fn turn(&self) -> bool {
        let mut worked = false;
        let mut s = self.state.borrow_mut();
        if self.readable.get() {
            worked |= self.receive(&mut s);
        }
        if self.writable.get() && !s.output.is_empty() {
            worked = true;
            self.send(&mut s);
        }
        worked
    }

    fn send(&self, s: &mut State) {
        while !s.output.is_empty() {
            let pieces = s.output.pieces();
            match self.wire.send(&pieces) {
                Ok(n) => {
                    drop(pieces);
                    s.output.sent(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return self.writable.set(false),
                Err(e) => {
                    drop(pieces);
                    // What the target said before it went is still worth knowing.
                    self.receive(s);
                    return self.end(s, Fatal { reason: CloseReason::socket(&e), term: None });
                }
            }
        }
    }

    fn receive(&self, s: &mut State) -> bool {
        let mut worked = false;
        for _ in 0..RECEIVES {
            if matches!(s.phase, Phase::Closed(_)) {
                self.readable.set(false);
                return worked;
            }
            match s.receive_once(&*self.wire) {
                Ok(None) => {}
                Ok(Some(full)) => {
                    worked = true;
                    if full || self.ending.get() {
                        continue;
                    }
                    // The next bytes make an edge.
                    self.readable.set(false);
                    return true;
                }
                Err(fatal) => {
                    self.end(s, fatal);
                    return true;
                }
            }
            self.readable.set(false);
            return worked;
        }
        worked
    }

    /// See [`Wire::layers`].
    pub fn tls_layers(&self) -> Option<(Layer, Layer)> {
        self.wire.layers()
    }

    fn end(&self, s: &mut State, fatal: Fatal) {
        if matches!(s.phase, Phase::Closed(_)) {
            return;
        }
        if let Some(term) = fatal.term {
            let mut pdu = [0; spec::pdu::MAX_TERM_BYTES];
            let n = build::term_req(&mut pdu, Role::Host, term, s.parser.header_bytes()).unwrap_or(0);
            s.output.push_bytes(&pdu[..n]);
            // Best effort: if there is no room now, closing says enough.
            let _ = self.wire.send(&s.output.pieces());
        }
        if fatal.reason != CloseReason::Local {
            tracing::debug!("{}: {}", self.label, fatal.reason);
        }
        self.wire.shutdown(Shutdown::Both);
        s.fail_all(fatal.reason);
        // Not dropped here: this may run inside the poller or the watch.
        self.readable.set(false);
        self.writable.set(false);
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        self.wire.shutdown(Shutdown::Both);
        // Without a reactor (its end) nobody is left to get the I/O back.
        if reactor::try_current().is_some() {
            self.state.get_mut().fail_all(CloseReason::Local);
        }
    }
}

/// Mutable slices of the bytes `from..from + len` of a list; nothing if a segment is shared.
fn slices(list: &mut SgList, from: usize, len: usize) -> SmallVec<[&mut [u8]; 4]> {
    let (mut skip, mut left) = (from, len);
    let mut out = SmallVec::new();
    for buf in list.segments_mut() {
        let size = buf.len();
        if skip >= size {
            skip -= size;
            continue;
        }
        if left == 0 {
            break;
        }
        let n = left.min(size - skip);
        let Some(bytes) = buf.get_mut() else { return SmallVec::new() };
        out.push(&mut bytes[skip..skip + n]);
        (skip, left) = (0, left - n);
    }
    out
}

impl State {
    fn submit(&mut self, job: Job) {
        if let Phase::Closed(reason) = &self.phase {
            let reason = reason.clone();
            return fail(job, &reason);
        }
        if self.waiting.is_empty() && job.slots() <= self.slots.available() {
            self.begin(job);
        } else {
            self.waiting.push_back(job);
        }
    }

    fn begin(&mut self, job: Job) {
        match job {
            Job::Io(ns, io) => queue::begin(self, ns, io),
            Job::Call(call) => {
                let born = call.timed.then_some(self.tick);
                if let Some((slot, cid)) = self.slots.take(Owner::Call(call.reply), born) {
                    self.command(slot, cid, call.sqe, &call.payload);
                }
            }
        }
    }

    fn begin_waiting(&mut self) {
        while let Some(job) = self.waiting.front()
            && job.slots() <= self.slots.available()
            && let Some(job) = self.waiting.pop_front()
        {
            self.begin(job);
        }
    }

    pub fn take_slot(&mut self, owner: Owner) -> Option<(usize, Cid)> {
        self.slots.take(owner, Some(self.tick))
    }

    /// Queues a command for sending. Its CID and, but for [`Payload::Raw`], its descriptor are set here.
    pub fn command(&mut self, slot: usize, cid: Cid, mut sqe: Sqe, payload: &Payload) {
        sqe.cid = U16::new(cid.0);
        let mut capsule: Option<&SgList> = None;
        match payload {
            Payload::Raw => {}
            Payload::Nothing => sqe.sgl = Sgl::transport(0),
            Payload::In(bytes) => {
                sqe.sgl = Sgl::transport(*bytes);
                self.slots.get(slot).incoming = *bytes;
                self.reads += 1;
                self.read_bytes += u64::from(*bytes);
            }
            Payload::Out(data) => {
                // Nobody submits 4 GiB in one command: commands are limited before.
                let bytes = data.len_bytes() as u32;
                if bytes <= self.capsule_bytes {
                    sqe.sgl = Sgl::in_capsule(0, bytes);
                    capsule = Some(data);
                } else {
                    sqe.sgl = Sgl::transport(bytes);
                    let slot = self.slots.get(slot);
                    (slot.out, slot.outgoing) = (data.clone(), bytes);
                }
            }
        }
        let mut header = [0; HEADER_ROOM];
        let bytes = capsule.map_or(0, SgList::len_bytes) as u32;
        let n = build::capsule_cmd(&mut header, &sqe, bytes, self.format);
        self.output.push_bytes(&header[..n.expect("the room suffices and the alignment was checked")]);
        if let Some(data) = capsule {
            self.push_data(data);
        }
    }

    fn push_data(&mut self, data: &SgList) {
        self.output.push_data(data);
        if self.format.ddgst {
            let mut digest = Digest::new();
            data.iter().for_each(|b| digest.update(b));
            self.output.push_bytes(&digest.value().to_le_bytes());
        }
    }

    /// One receive call. `None`: nothing was there; else whether there may be more.
    fn receive_once(&mut self, wire: &dyn Wire) -> Result<Option<bool>, Fatal> {
        let mut staging = std::mem::take(&mut self.staging);
        let result = self.receive_into(wire, &mut staging);
        self.staging = staging;
        result
    }

    fn receive_into(&mut self, wire: &dyn Wire, staging: &mut [u8]) -> Result<Option<bool>, Fatal> {
        let large = self.reads > 0 && self.read_bytes / self.reads > LARGE_READ_BYTES;
        let room = if large { SMALL_STAGING_BYTES } else { staging.len() };
        let wanted = self.parser.data_wanted() as usize;
        let mut bufs: SmallVec<[IoSliceMut<'_>; 8]> = SmallVec::new();
        let mut direct = 0;
        if wanted >= DIRECT_BYTES
            && let Some(r) = &self.receiving
        {
            let slot = self.slots.get(r.slot);
            let at = slot.received as usize;
            for piece in slices(slot.destination(), at, wanted) {
                direct += piece.len();
                bufs.push(IoSliceMut::new(piece));
            }
        }
        bufs.push(IoSliceMut::new(&mut staging[..room]));
        let received = loop {
            match wire.recv(&mut bufs) {
                Ok(0) if self.parser.at_boundary() => return Err(ended(CloseReason::Eof)),
                Ok(0) => return Err(ended(CloseReason::Truncated)),
                Ok(n) => break n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(ended(CloseReason::socket(&e))),
            }
        };
        drop(bufs);
        let placed = received.min(direct);
        if placed > 0 {
            self.placed(placed);
        }
        self.feed(&staging[..received - placed])?;
        Ok(Some(received == direct + room))
    }

    /// `n` bytes of data were received right into place.
    fn placed(&mut self, n: usize) {
        self.parser.data_received(n as u32);
        let Some(r) = &mut self.receiving else { return };
        let slot = self.slots.get(r.slot);
        if self.format.ddgst {
            let at = slot.received as usize;
            slices(slot.destination(), at, n).iter().for_each(|p| r.digest.update(p));
        }
        slot.received += n as u32;
    }

    fn feed(&mut self, mut input: &[u8]) -> Result<(), Fatal> {
        loop {
            let step = self.parser.feed(input);
            let step = step.map_err(|e| Fatal { reason: CloseReason::Protocol(e), term: e.term() })?;
            match step.event {
                Event::NeedMore => return Ok(()),
                Event::Header(pdu) => self.header(&pdu)?,
                Event::Data { start, len } => self.data(&input[start..start + len]),
                Event::End { ddgst } => self.data_end(ddgst)?,
            }
            input = &input[step.consumed..];
        }
    }

    fn header(&mut self, pdu: &Pdu) -> Result<(), Fatal> {
        match pdu.header {
            Header::IcResp { align_bytes, hdgst, ddgst, max_h2c_data_bytes } => {
                if (hdgst && !self.hdgst) || (ddgst && !self.ddgst) {
                    let term = Term::invalid_field(spec::pdu::field::DGST);
                    let reason = CloseReason::Answer("digests that were not asked for");
                    return Err(Fatal { reason, term: Some(term) });
                }
                if (hdgst, ddgst) != (self.hdgst, self.ddgst) {
                    return Err(ended(CloseReason::Answer("digests were asked for, the target has none")));
                }
                self.format = Format { hdgst, ddgst, align_bytes };
                self.max_h2c_bytes = max_h2c_data_bytes;
                let limits = Limits { hdgst, ddgst, max_data_bytes: MAX_C2H_DATA_BYTES, ..Limits::default() };
                self.parser.establish(limits);
                if let Phase::Greeting(greeted) = std::mem::replace(&mut self.phase, Phase::Open)
                    && let Some(greeted) = greeted
                {
                    // Nobody waits any more if the time was over.
                    let _ = greeted.send(Ok(()));
                }
            }
            Header::TermReq { fes, fei } => return Err(ended(CloseReason::Terminated { fes, fei })),
            Header::CapsuleResp(cqe) => self.response(&cqe)?,
            Header::C2hData { cid, offset, last, success } => {
                let slot = self.slots.find(cid);
                let slot = slot.ok_or(violation("data of no command", Fes::InvalidHeaderField))?;
                self.data_begins(slot, offset, pdu.layout.data_len)?;
                self.receiving = Some(Receiving { slot, last, success, digest: Digest::new() });
            }
            Header::R2t { cid, ttag, offset, len } => {
                let slot = self.slots.find(cid);
                let slot = slot.ok_or(violation("R2T of no command", Fes::InvalidHeaderField))?;
                self.ready_to_transfer(slot, cid, ttag, offset, len)?;
            }
            // The parser lets only what a host receives through.
            Header::IcReq { .. } | Header::CapsuleCmd(_) | Header::H2cData { .. } => {}
        }
        Ok(())
    }

    /// Data must come in order and stay within what was asked for.
    fn data_begins(&mut self, index: usize, offset: u32, len: u32) -> Result<(), Fatal> {
        let slot = self.slots.get(index);
        // The parser has checked that the sum does not overflow.
        if offset != slot.received || offset + len > slot.incoming {
            return Err(violation("data that was not asked for, or out of order", Fes::OutOfRange));
        }
        let bytes = slot.incoming as usize;
        let target = slot.destination();
        if target.is_empty() {
            target.push(Buf::alloc(bytes));
        }
        Ok(())
    }

    fn data(&mut self, mut bytes: &[u8]) {
        // The data of a termination request has no slot, and nobody looks at it.
        let Some(r) = &mut self.receiving else { return };
        let slot = self.slots.get(r.slot);
        let (at, len) = (slot.received as usize, bytes.len());
        if self.format.ddgst {
            r.digest.update(bytes);
        }
        for piece in slices(slot.destination(), at, len) {
            let (head, rest) = bytes.split_at(piece.len());
            piece.copy_from_slice(head);
            bytes = rest;
        }
        slot.damaged |= !bytes.is_empty();
        slot.received += len as u32;
    }

    fn data_end(&mut self, ddgst: Option<u32>) -> Result<(), Fatal> {
        let Some(r) = self.receiving.take() else { return Ok(()) };
        let slot = self.slots.get(r.slot);
        slot.damaged |= ddgst.is_some_and(|d| d != r.digest.value());
        if r.last && slot.received != slot.incoming {
            return Err(violation("less data than was asked for", Fes::OutOfRange));
        }
        if r.success {
            self.answered(r.slot, Status::SUCCESS, &Cqe::default());
        }
        Ok(())
    }

    fn response(&mut self, cqe: &Cqe) -> Result<(), Fatal> {
        let slot = self.slots.find(cqe.cid());
        let slot = slot.ok_or(violation("completion of no command", Fes::InvalidHeaderField))?;
        self.answered(slot, cqe.status(), cqe);
        Ok(())
    }

    fn ready_to_transfer(
        &mut self,
        index: usize,
        cid: Cid,
        ttag: Ttag,
        offset: u32,
        len: u32,
    ) -> Result<(), Fatal> {
        let slot = self.slots.get(index);
        // In order and once: a target that asks for the same bytes again and again gets no work out of us.
        if offset != slot.granted || offset + len > slot.outgoing {
            return Err(violation("R2T beyond the command's data, or out of order", Fes::OutOfRange));
        }
        slot.granted += len;
        let (mut at, end) = (offset, offset + len);
        let mut header = [0; HEADER_ROOM];
        while at < end {
            let n = self.max_h2c_bytes.min(end - at);
            let part = DataPart { cid, offset: at, len: n, last: at + n == end };
            let data = self.slots.get(index).out.slice(at as usize..(at + n) as usize);
            let k = build::h2c_data(&mut header, part, ttag, self.format);
            self.output.push_bytes(&header[..k.expect("the room suffices and the alignment was checked")]);
            self.push_data(&data);
            at += n;
        }
        Ok(())
    }

    /// A command has its answer; when its owner has all of them, it gets its slot's contents back.
    fn answered(&mut self, index: usize, status: Status, cqe: &Cqe) {
        if let Owner::Half(first) = self.slots.get(index).owner {
            self.slots.release(index);
            self.merge(first, status);
            if self.slots.get(first).pending > 0 {
                return;
            }
            return self.complete(first, cqe);
        }
        self.merge(index, status);
        let slot = self.slots.get(index);
        if slot.pending > 0 {
            slot.answered = true;
            return;
        }
        self.complete(index, cqe);
    }

    /// The half that failed by itself says what happened, not the one that failed because of it.
    fn merge(&mut self, index: usize, status: Status) {
        let slot = self.slots.get(index);
        slot.pending = slot.pending.saturating_sub(1);
        let follows = slot.status.code() == Status::ABORTED_FAILED_FUSED;
        if slot.status.is_success() || (follows && !status.is_success()) {
            slot.status = status;
        }
    }

    fn complete(&mut self, index: usize, cqe: &Cqe) {
        let slot = self.slots.release(index);
        if slot.incoming > 0 {
            self.reads -= 1;
            self.read_bytes -= u64::from(slot.incoming);
        }
        if self.receiving.as_ref().is_some_and(|r| r.slot == index) {
            self.receiving = None;
        }
        deliver(slot, cqe);
        if !self.waiting.is_empty() {
            self.begin_waiting();
        }
    }

    fn fail_all(&mut self, reason: CloseReason) {
        if let Phase::Greeting(Some(greeted)) =
            std::mem::replace(&mut self.phase, Phase::Closed(reason.clone()))
        {
            let _ = greeted.send(Err(reason.clone()));
        }
        self.output.clear();
        self.receiving = None;
        (self.reads, self.read_bytes) = (0, 0);
        for slot in self.slots.release_all() {
            match slot.owner {
                Owner::Io(io) => io.finish(closed_status(&reason)),
                Owner::Call(reply) => drop(reply.send(Err(reason.clone()))),
                Owner::Half(_) | Owner::Nobody => {}
            }
        }
        for job in std::mem::take(&mut self.waiting) {
            fail(job, &reason);
        }
    }
}

fn ended(reason: CloseReason) -> Fatal {
    Fatal { reason, term: None }
}

fn closed_status(reason: &CloseReason) -> IoStatus {
    match reason {
        CloseReason::Local => IoStatus::ABORTED_SQ_DELETION,
        _ => IoStatus::TRANSIENT_TRANSPORT_ERROR,
    }
}

fn fail(job: Job, reason: &CloseReason) {
    match job {
        Job::Io(_, io) => io.finish(closed_status(reason)),
        Job::Call(call) => drop(call.reply.send(Err(reason.clone()))),
    }
}

fn deliver(slot: Slot, cqe: &Cqe) {
    match slot.owner {
        Owner::Io(io) => {
            let status = io_status(slot.status);
            let status = match () {
                () if !status.is_ok() => status,
                () if slot.damaged => IoStatus::TRANSIENT_TRANSPORT_ERROR,
                () if slot.received != slot.incoming => IoStatus::DATA_TRANSFER_ERROR,
                () => status,
            };
            io.finish(status);
        }
        Owner::Call(reply) => {
            let mut data = slot.buf;
            let received = data.split_to((slot.received as usize).min(data.len_bytes()));
            let mut cqe = *cqe;
            if slot.damaged && cqe.status().is_success() {
                cqe = Cqe::new(cqe.cid(), 0, Status::TRANSIENT_TRANSPORT_ERROR);
            }
            // Whoever asked may have stopped waiting.
            let _ = reply.send(Ok(Reply { cqe, data: received }));
        }
        Owner::Half(_) | Owner::Nobody => {}
    }
}

/// The same status as a block device's.
pub(crate) fn io_status(status: Status) -> IoStatus {
    if status.is_success() {
        return IoStatus::SUCCESS;
    }
    let s = IoStatus::new((status.0 >> 8) as u8 & 7, status.sc());
    if status.dnr() { s.do_not_retry() } else { s }
}
