//! A connection: one byte stream, one queue. Lives on one reactor and is touched by it alone.
//!
//! Owns the stream, the parser, the output queue and the command slots. `state` says where it is in its life and moves
//! only through its table; `rx` takes PDUs in, `exec` carries commands out and answers them.
//!
//! Invariants:
//! - `inner` is never borrowed while code of another room runs that could come back here: devices complete by message,
//!   and what goes to other connections goes by message.
//! - Each command slot is answered or dropped once; `executing` counts those that devices, tasks or other cores hold.
//! - Memory is bounded: slots by the queue's size, data that was asked for by [`R2T_WINDOW_BYTES`], and nothing more is
//!   received while [`OUT_LIMIT_BYTES`] wait to be sent.

mod auth;
mod exec;
mod fused;
pub mod out;
mod rx;
mod slot;
pub mod state;
mod tasks;
mod transfer;

use std::cell::{Cell, Ref, RefCell};
use std::collections::VecDeque;
use std::net::Shutdown;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cryptfold_bdev::trace::{self, Stage};
use cryptfold_nvmf_spec::pdu::build::{self, Format};
use cryptfold_nvmf_spec::pdu::{MAX_TERM_BYTES, Parser, Role, Term};
use cryptfold_nvmf_spec::{Nsid, Qid, Status};
use cryptfold_reactor::{self as reactor, Nanos};

use crate::TransportOptions;
use crate::audit;
use crate::budget::{Place, STEP_BYTES};
use crate::controller::Controller;
use crate::door::Standing;
use crate::group::{ConnRef, Group, LOAD_CONNECTION, LOAD_IO, TICK, Turns};
use crate::port::Port;
use crate::reservation::{Access, Rights};
use crate::stats::QueueStats;
use crate::subsystem::{NsChannel, locked};
use crate::watch::{Ready, WatchId};
use crate::wire::{Wake, Wire};
use auth::{Auth, MAX_MESSAGE_BYTES};
use fused::Fused;
use out::Out;
use rx::Rx;
use slot::{Phase, Slots};
use state::{Event, State};

/// Data that a host may be asked for at once, bytes; a single larger command is always let through.
const R2T_WINDOW_BYTES: u64 = 4 << 20;
/// Memory that a connection keeps for its next commands, bytes.
const SPARE_BYTES: u64 = 4 * STEP_BYTES;
/// R2Ts of one command at once, however many the host takes.
const R2TS_MAX: u32 = 8;
/// How long a connection waits that found no memory.
const MEMORY_WAIT: Duration = Duration::from_millis(1);
/// Output beyond which nothing more is received, bytes.
const OUT_LIMIT_BYTES: usize = 4 << 20;
/// How long a peer has to take the termination request and close, before we do.
const TERMINATE_WAIT: Duration = Duration::from_secs(5);

/// The queue that Connect made.
pub(crate) struct Queue {
    pub controller: Arc<Controller>,
    pub qid: Qid,
    /// Entries.
    size: u16,
    /// Submission queue head.
    sqhd: u16,
    /// The host does without SQ flow control.
    no_flow_control: bool,
    stats: Arc<QueueStats>,
}

/// What `inner` guards.
struct Inner {
    wire: Option<Box<dyn Wire>>,
    readable: bool,
    writable: bool,
    /// A short read does not mean that nothing is left: the end waits behind the bytes (or the wire has no descriptor, and
    /// does not tell).
    read_on: bool,
    parser: Parser,
    /// How PDUs to the host are built.
    format: Format,
    out: Out,
    slots: Slots,
    rx: Rx,
    /// Commands that wait for memory, in order.
    waiting: VecDeque<u16>,
    /// R2Ts of one command that the host takes at once.
    max_r2ts: u32,
    /// Its part of the host's share.
    place: Option<Place>,
    /// It will be served in a moment because it waits for memory.
    retrying: bool,
    /// Bytes asked for and not received.
    r2t_bytes: u64,
    fused: Fused,
    queue: Option<Queue>,
    auth: Auth,
    /// When the authentication under way began.
    auth_since: Nanos,
    /// By namespace identifier, from 1: the channel, or why the namespace can not be used through this port now (ANA).
    channels: Vec<Option<Result<Rc<NsChannel>, Status>>>,
    channels_generation: u64,
    /// By namespace identifier, from 1: what reservations let this host do.
    rights: Vec<Rights>,
    executing: usize,
    /// Since when output waits without the host taking any of it, and how much had been sent then.
    stalled: Option<(Nanos, u64)>,
    /// Close, or when terminating stop sending, when everything is sent.
    closing: bool,
    /// Start of the current state.
    since: Nanos,
}

/// See the module's head.
pub(crate) struct Conn {
    pub id: u64,
    me: Weak<Conn>,
    group: Weak<Group>,
    pub port: Arc<Port>,
    pub peer: String,
    options: Arc<TransportOptions>,
    pub watch: Cell<Option<WatchId>>,
    state: Cell<State>,
    /// On the group's ready list.
    listed: Cell<bool>,
    load: Cell<u32>,
    /// As the door knows it.
    standing: Cell<Standing>,
    /// Shared by the connections of its host.
    turns: RefCell<Rc<Turns>>,
    inner: RefCell<Inner>,
}

impl Conn {
    pub fn new(id: u64, group: &Rc<Group>, wire: Box<dyn Wire>, port: Arc<Port>, peer: String) -> Rc<Conn> {
        let read_on = wire.descriptor().is_none();
        Rc::new_cyclic(|me| Conn {
            id,
            me: me.clone(),
            group: Rc::downgrade(group),
            port,
            peer,
            options: group.target.options(),
            watch: Cell::new(None),
            state: Cell::new(State::AwaitIcReq),
            listed: Cell::new(false),
            load: Cell::new(LOAD_CONNECTION),
            standing: Cell::new(Standing::Stranger),
            turns: RefCell::new(group.strangers()),
            inner: RefCell::new(Inner {
                wire: Some(wire),
                readable: false,
                writable: false,
                read_on,
                parser: Parser::new(Role::Controller),
                format: Format::default(),
                out: Out::default(),
                // Connect, until it says how many there will be.
                slots: Slots::new(1),
                rx: Rx::None,
                waiting: VecDeque::new(),
                max_r2ts: 1,
                place: None,
                retrying: false,
                r2t_bytes: 0,
                fused: Fused::None,
                queue: None,
                auth: Auth::Idle,
                auth_since: Nanos(0),
                channels: Vec::new(),
                channels_generation: 0,
                rights: Vec::new(),
                executing: 0,
                stalled: None,
                closing: false,
                since: reactor::now(),
            }),
        })
    }

    pub fn on_ready(&self, wake: Wake) {
        if let Some(wire) = &self.inner.borrow().wire {
            wire.on_ready(wake);
        }
    }

    /// How others reach it.
    pub fn reference(&self) -> Option<ConnRef> {
        let group = self.group.upgrade()?;
        Some(ConnRef { handle: group.seat.handle.clone(), target: group.target.id, id: self.id })
    }

    /// Bytes or room have come.
    pub fn ready(&self, ready: Ready) {
        // A memory wire calls this from inside our own receiving and sending, which then looks at the wire again anyway.
        if let Ok(mut inner) = self.inner.try_borrow_mut() {
            inner.readable |= ready.readable;
            inner.writable |= ready.writable;
            inner.read_on |= ready.hangup;
        }
        self.list();
    }

    /// Has the group serve this connection in its next turn.
    fn list(&self) {
        if self.state.get() != State::Closed
            && !self.listed.replace(true)
            && let (Some(group), Some(me)) = (self.group.upgrade(), self.me.upgrade())
        {
            group.push_ready(me);
        }
    }

    /// What counts the turns of its host.
    pub fn turns(&self) -> Ref<'_, Rc<Turns>> {
        self.turns.borrow()
    }

    /// One turn: receives once, sends once.
    pub fn serve(self: Rc<Self>, staging: &mut [u8]) {
        self.listed.set(false);
        let mut inner = self.inner.borrow_mut();
        if self.state.get().is_open() {
            self.receive(&mut inner, staging);
        }
        if self.state.get().is_open() {
            self.flush(&mut inner);
        }
        self.start_waiting(&mut inner);
        let held = inner.slots.held_bytes() + inner.out.bytes() as u64;
        if let Some(place) = &mut inner.place {
            place.trim(held, SPARE_BYTES);
        }
        let again = inner.readable && self.wants_input(&inner) || inner.writable && !inner.out.is_empty();
        drop(inner);
        if again && self.state.get().is_open() {
            self.list();
        }
    }

    /// Whether bytes are taken from the stream now.
    fn wants_input(&self, inner: &Inner) -> bool {
        match self.state.get() {
            State::Terminating => true,
            s => s.receives() && !inner.closing && inner.out.bytes() <= OUT_LIMIT_BYTES,
        }
    }

    /// Sends what is queued, as far as the stream takes it.
    fn flush(&self, inner: &mut Inner) {
        let Some(wire) = &inner.wire else { return };
        if !inner.out.is_empty() && inner.writable {
            let slices = inner.out.slices();
            let offered: usize = slices.iter().map(|s| s.len()).sum();
            let begun = trace::begin();
            let result = wire.send(&slices);
            begun.end(Stage::SocketSend);
            drop(slices);
            match result {
                Ok(n) => {
                    inner.out.sent(n);
                    inner.writable = n == offered;
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => inner.writable = false,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return self.lost(inner, &e),
            }
        }
        if inner.out.is_empty() && inner.closing {
            inner.closing = false;
            match (self.state.get(), &inner.wire) {
                // The peer closes when it has read that far. Once: a shutdown is an event on the socket itself.
                (State::Terminating, Some(wire)) => wire.shutdown(Shutdown::Write),
                _ => self.advance(inner, Event::Deleted),
            }
        }
    }

    /// The stream has failed.
    fn lost(&self, inner: &mut Inner, error: &std::io::Error) {
        // Who fails at the handshake is in the audit log; what is wrong with a record of a host that is known is nowhere else.
        let known = || inner.wire.as_ref().and_then(|w| w.tls()).is_some_and(|t| t.proven);
        if error.kind() == std::io::ErrorKind::InvalidData && known() {
            tracing::warn!("{}: {error}; ending the connection", self.peer);
        } else {
            tracing::debug!("{}: connection lost: {error}", self.peer);
        }
        self.audit_handshake(inner, error);
        self.advance(inner, Event::PeerGone);
    }

    /// Whoever fails at TLS has been turned away.
    fn audit_handshake(&self, inner: &Inner, why: &dyn std::fmt::Display) {
        let tls = inner.wire.as_ref().and_then(|w| w.tls());
        if let Some(peer) = tls.filter(|t| !t.proven) {
            audit::refused(&self.peer, &peer.host, &peer.subsystem, "tls", &why.to_string());
        }
    }

    /// The only way from one state to the next.
    fn advance(&self, inner: &mut Inner, event: Event) {
        let Some(next) = self.state.get().next(event) else { return };
        tracing::trace!("{}: {:?} -> {next:?} on {event:?}", self.peer, self.state.get());
        self.state.set(next);
        inner.since = reactor::now();
        match next {
            State::Draining => self.drain(inner),
            State::Closed => self.closed(inner),
            State::Terminating => {
                inner.closing = true;
                self.abandon_input(inner);
            }
            State::Ready => self.rise(inner),
            State::AwaitIcReq | State::AwaitConnect | State::Authenticating => {}
        }
    }

    /// The host is known from here on, as far as it has to be.
    fn rise(&self, inner: &Inner) {
        let proven = inner.wire.as_ref().is_some_and(|w| w.tls().is_some());
        let asks = inner.queue.as_ref().is_some_and(|q| q.controller.is_discovery());
        let to = if asks && !proven { Standing::Caller } else { Standing::Guest };
        let (Some(group), Some(queue)) = (self.group.upgrade(), &inner.queue) else { return };
        // Who has proven nothing does not take the turns of the host whose name it gives.
        if to == Standing::Guest {
            *self.turns.borrow_mut() = group.host(&queue.controller.host.nqn);
        }
        if group.target.door.rise(self.id, to) {
            self.standing.set(to);
        }
    }

    /// Commands that still wait for the host are dropped: it will not send any more.
    fn abandon_input(&self, inner: &mut Inner) {
        inner.rx = Rx::None;
        inner.fused = Fused::None;
        inner.waiting.clear();
        inner.r2t_bytes = 0;
        for slot in inner.slots.busy() {
            match inner.slots[slot].phase {
                Phase::Executing => {}
                _ => inner.slots.release(slot),
            }
        }
    }

    /// Shuts the stream, asks devices to hurry, and waits for them.
    fn drain(&self, inner: &mut Inner) {
        self.abandon_input(inner);
        inner.out.clear();
        if let Some(wire) = inner.wire.take() {
            wire.shutdown(Shutdown::Both);
        }
        if let (Some(watch), Some(group)) = (self.watch.take(), self.group.upgrade()) {
            group.unwatch(watch);
        }
        for slot in inner.slots.busy() {
            inner.slots[slot].cancelled = true;
            if let Some(ns) = &inner.slots[slot].channel {
                ns.channel.abort(self.tag(slot));
            }
        }
        if inner.executing == 0 {
            self.advance(inner, Event::Drained);
        }
    }

    /// Gives everything back. Reached once.
    fn closed(&self, inner: &mut Inner) {
        inner.channels.clear();
        inner.place = None;
        inner.auth = Auth::Idle;
        let queue = inner.queue.take();
        if let Some(group) = self.group.upgrade() {
            group.load(-(self.load.get() as i32));
            group.forget(self.id);
            group.target.door.leave(self.id, self.standing.get());
            if let Some(q) = &queue {
                group.leave(&q.controller.host.nqn, self.turns.replace(group.strangers()));
                let mut past = locked(&group.seat.past);
                *past = *past + q.stats.totals();
            }
        }
        if let Some(q) = queue {
            q.controller.detach(q.qid);
        }
    }

    /// Ends the connection with a termination request.
    fn fatal(&self, inner: &mut Inner, term: Option<Term>, header: &[u8], why: &dyn std::fmt::Display) {
        tracing::warn!("{}: {why}; ending the connection", self.peer);
        let Some(term) = term else { return self.advance(inner, Event::PeerGone) };
        // It has to fit: the buffer is as long as the longest request.
        let queued = inner.out.head(MAX_TERM_BYTES, |b| build::term_req(b, Role::Controller, term, header));
        let event = if queued.is_ok() { Event::Fatal } else { Event::PeerGone };
        self.advance(inner, event);
    }

    /// Ended by us: the controller, subsystem, port or target goes away.
    pub fn delete(&self) {
        self.advance(&mut self.inner.borrow_mut(), Event::Deleted);
    }

    /// Looks at deadlines. `lost`: so long nobody has looked, beyond what is usual.
    pub fn tick(&self, now: Nanos, lost: Duration) {
        let mut inner = self.inner.borrow_mut();
        if lost > TICK {
            self.forgive(&mut inner, now, lost);
        }
        let held = inner.slots.held_bytes() + inner.out.bytes() as u64;
        if let Some(place) = &mut inner.place {
            place.trim(held, 0);
        }
        let age = now.since(inner.since);
        let expired = match self.state.get() {
            State::AwaitIcReq | State::AwaitConnect => {
                age > Duration::from_millis(self.options.connect_timeout_ms.into())
            }
            State::Authenticating => self.auth_overdue(&inner, now, inner.since),
            State::Ready => self.overdue(&mut inner, now),
            State::Terminating => age > TERMINATE_WAIT,
            State::Draining | State::Closed => false,
        };
        if expired {
            self.audit_handshake(&inner, &"not finished in time");
            tracing::warn!(
                "{}: a deadline passed while {:?}; ending the connection",
                self.peer,
                self.state.get()
            );
            self.advance(&mut inner, Event::Expired);
        }
    }

    /// All that is waited for gets so much longer.
    fn forgive(&self, inner: &mut Inner, now: Nanos, lost: Duration) {
        let later = |since: Nanos| (since + lost).min(now);
        inner.since = later(inner.since);
        inner.auth_since = later(inner.auth_since);
        inner.stalled = inner.stalled.map(|(since, sent)| (later(since), sent));
        for slot in inner.slots.busy() {
            inner.slots[slot].asked = later(inner.slots[slot].asked);
        }
        if let Some(queue) = inner.queue.as_ref().filter(|q| q.qid.is_admin()) {
            queue.controller.forgive(now, lost);
        }
    }

    fn auth_overdue(&self, inner: &Inner, now: Nanos, since: Nanos) -> bool {
        let late = now.since(since) > Duration::from_millis(self.options.auth_timeout_ms.into());
        if late && let Some(q) = &inner.queue {
            let (host, subsystem) = (&q.controller.host.nqn, q.controller.subsystem.nqn());
            audit::refused(&self.peer, host, subsystem, "dh-hmac-chap", "not finished in time");
        }
        late
    }

    fn overdue(&self, inner: &mut Inner, now: Nanos) -> bool {
        let Some(queue) = &inner.queue else { return false };
        if !inner.auth.is_idle() && self.auth_overdue(inner, now, inner.auth_since) {
            return true;
        }
        if queue.qid.is_admin() {
            queue.controller.sample(now);
        }
        if queue.qid.is_admin() && queue.controller.expired(now) {
            tracing::warn!(
                "{}: keep-alive timer of controller {} expired ({} ms)",
                queue.controller.host.nqn,
                queue.controller.cntlid,
                queue.controller.kato_ms()
            );
            return true;
        }
        let limit = Duration::from_millis(self.options.r2t_timeout_ms.into());
        let sent = inner.out.sent_bytes();
        inner.stalled = match inner.stalled {
            _ if inner.out.is_empty() => None,
            Some(since) if since.1 == sent => Some(since),
            _ => Some((now, sent)),
        };
        if inner.stalled.is_some_and(|(since, _)| now.since(since) > limit) {
            return true;
        }
        self.fused_overdue(inner, now, limit);
        let late = |s: u16| {
            let slot = &inner.slots[s];
            matches!(slot.phase, Phase::HostData | Phase::Capsule) && now.since(slot.asked) > limit
        };
        let owes = inner.r2t_bytes > 0 || matches!(inner.rx, Rx::Capsule { .. });
        owes && inner.slots.busy().into_iter().any(late)
    }

    /// Connect has made a queue: room for its commands, and where it has to authenticate first, for nothing else yet.
    fn connected(&self, inner: &mut Inner, queue: Queue, authenticate: bool) {
        inner.slots.grow(queue.size);
        if let Some(group) = self.group.upgrade() {
            let seat = &group.seat;
            let count = if queue.qid.is_admin() { &seat.admin_qpairs } else { &seat.io_qpairs };
            count.fetch_add(1, Ordering::Relaxed);
            if !queue.qid.is_admin() {
                group.load(LOAD_IO as i32);
                self.load.set(self.load.get() + LOAD_IO);
            }
        }
        inner.queue = Some(queue);
        if authenticate {
            return self.advance(inner, Event::AuthRequired);
        }
        self.advance(inner, Event::Connected);
        self.ready_queue(inner);
    }

    /// From here on capsules of an I/O queue have its size: Fabrics commands may need more before. Hosts prove again who they are on
    /// queues in use, with messages in capsules whatever the queue's size is.
    fn ready_queue(&self, inner: &mut Inner) {
        if let (Some(queue), Some(group)) = (&inner.queue, self.group.upgrade()) {
            let tls = inner.wire.as_ref().is_some_and(|w| w.tls().is_some());
            group.target.arrives(&queue.controller, &self.peer, tls || queue.stats.auth().is_some());
        }
        let io = inner.queue.as_ref().is_some_and(|q| !q.qid.is_admin());
        if let Some(mut limits) = inner.parser.limits().filter(|_| io) {
            limits.max_capsule_data_bytes = self.options.in_capsule_data_size.max(MAX_MESSAGE_BYTES);
            inner.parser.establish(limits);
        }
    }

    /// The channel to a namespace of the queue's subsystem.
    fn channel(&self, inner: &mut Inner, nsid: Nsid) -> Result<Rc<NsChannel>, Status> {
        let invalid = Status::INVALID_NAMESPACE.with_dnr();
        let Some(queue) = &inner.queue else { return Err(invalid) };
        let subsystem = &queue.controller.subsystem;
        let generation = subsystem.generation.load(Ordering::Acquire);
        if generation != inner.channels_generation {
            inner.channels.clear();
            inner.channels_generation = generation;
        }
        let index = (nsid.0 as usize).wrapping_sub(1);
        if let Some(Some(known)) = inner.channels.get(index) {
            return known.clone();
        }
        // The identifier is that of an existing namespace from here on, so it is small.
        let ns = subsystem.namespace(nsid, &queue.controller.host.nqn).ok_or(invalid)?;
        let group = self.group.upgrade().ok_or(Status::INTERNAL_ERROR)?;
        let usable = match subsystem.ana_state(&self.port, ns.anagrpid()).status() {
            Some(status) => Err(status),
            None => Ok(group.channel(&ns).map_err(|e| {
                tracing::error!("{}: namespace {nsid}: {e}", subsystem.nqn());
                Status::NAMESPACE_NOT_READY
            })?),
        };
        if inner.channels.len() <= index {
            inner.channels.resize(index + 1, None);
        }
        inner.channels[index] = Some(usable.clone());
        usable
    }

    /// Whether a command may do this to its namespace now.
    fn may(&self, inner: &mut Inner, ns: &NsChannel, access: Access) -> Result<(), Status> {
        let Some(queue) = &inner.queue else { return Err(Status::INTERNAL_ERROR) };
        let index = ns.ns.nsid.0 as usize - 1;
        if inner.rights.len() <= index {
            inner.rights.resize(index + 1, Rights::default());
        }
        ns.ns.reservations.check(&queue.controller.host.id, access, &mut inner.rights[index])
    }

    /// Namespaces have changed: lets go of channels, so that removed devices can end. Commands that still wait for the host or for
    /// memory fail if theirs is gone; what devices have comes back from them.
    pub fn refresh_namespaces(&self) {
        let mut inner = self.inner.borrow_mut();
        inner.channels.clear();
        let Some(controller) = inner.queue.as_ref().map(|q| q.controller.clone()) else { return };
        if !self.state.get().answers() {
            return;
        }
        for index in inner.slots.busy() {
            let slot = &inner.slots[index];
            let Some(ns) = slot.channel.as_ref().filter(|_| slot.phase != Phase::Executing) else { continue };
            let current = controller.subsystem.namespace(ns.ns.nsid, &controller.host.nqn);
            if current.is_none_or(|current| current.uid != ns.ns.uid) {
                self.end_early(&mut inner, index, Status::INVALID_NAMESPACE.with_dnr());
                // It may have to take its data yet.
                inner.slots[index].channel = None;
            }
        }
    }

    /// What names the I/O of a slot to a device.
    fn tag(&self, slot: u16) -> u64 {
        self.id << 16 | u64::from(slot)
    }
}
