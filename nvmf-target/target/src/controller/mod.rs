//! A controller: what a host's queues have in common. Shared by the reactors of its connections.
//!
//! Data-path commands look at two atomics (`executes`, `write_through`); everything else is behind a mutex that admin
//! commands, Connect and control requests take for moments.
//!
//! Life: made by Connect on an admin queue; enabled, reset and shut down by CC as `spec::enable` says, where a reset or
//! shutdown ends the I/O queues and is complete when the last one is gone; ended when the admin connection goes, the
//! keep-alive timer expires or somebody deletes it. It leaves its subsystem with its last connection.

pub mod events;
mod features;
mod identify;
mod log;
mod records;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use cryptfold_bdev::Room;
use cryptfold_nvmf_spec::enable;
use cryptfold_nvmf_spec::fabrics::{ConnectReject, PropertyCommand, ipo};
use cryptfold_nvmf_spec::opcode::{Admin, Direction};
use cryptfold_nvmf_spec::property::{Cap, Cc, Property, Vs};
use cryptfold_nvmf_spec::sqe::AbortCdw10;
use cryptfold_nvmf_spec::{Cid, Cntlid, Nsid, Qid, Sqe, Status};
use cryptfold_reactor::Nanos;
use cryptfold_reactor::memory::Buf;

use crate::TransportOptions;
use crate::group::ConnRef;
use crate::info::TlsUse;
use crate::later::Later;
use crate::port::Port;
use crate::reservation::Notice;
use crate::stats::QueueStats;
use crate::subsystem::{Subsystem, locked};
use crate::target::Shared;
use events::{EventKind, Events};
use features::Features;
use records::{ErrorLog, NoticeLog};

/// NVMe 1.4.0: what the target promises to implement.
const VERSION: Vs = Vs::V1_4;
/// Abort commands that may be outstanding, 0's based (ACL).
const ACL: u8 = 3;
/// How often space is looked at.
const SPACE_INTERVAL: Duration = Duration::from_secs(2);
/// Changed namespaces that are remembered one by one (NVMe Base 2.0 section 5.16.1.5).
const CHANGED_MAX: usize = 1024;

/// Who connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// HOSTNQN.
    pub nqn: String,
    /// HOSTID.
    pub id: [u8; 16],
}

/// A connected queue, as others see it.
#[derive(Clone)]
pub(crate) struct QueueRef {
    pub conn: ConnRef,
    pub stats: Arc<QueueStats>,
    /// Entries.
    pub size: u32,
    /// Address of the host's end.
    pub peer: String,
    /// `None` without TLS.
    pub tls: Option<TlsUse>,
}

/// What an admin command ends with.
pub(crate) enum Answer {
    /// Status and the two result dwords.
    Done(Status, u64),
    /// Success, with data for the host.
    Data(Buf),
    /// Waits for an event.
    Waits,
    /// Abort: the queue takes it from here.
    Abort(Qid, Cid),
    /// Completes when the last reference to this is dropped.
    Later(Arc<Later>),
}

/// Makes a [`Later`] of the command that is being executed; `None` when its connection is going away.
pub(crate) type MakeLater<'a> = &'a dyn Fn() -> Option<Arc<Later>>;

impl From<Status> for Answer {
    fn from(status: Status) -> Answer {
        Answer::Done(status, 0)
    }
}

/// The state behind the mutex.
pub(crate) struct State {
    life: enable::State,
    cc: Cc,
    pub events: Events,
    changed: BTreeSet<u32>,
    changed_overflow: bool,
    queues: BTreeMap<u16, QueueRef>,
    features: Features,
    /// Totals of queues that are gone.
    past: crate::stats::Totals,
    errors: ErrorLog,
    notices: NoticeLog,
    /// When the controller was last looked at, and how long it had I/O then.
    sampled: Nanos,
    busy: Duration,
    /// When space was last looked at, and whether there was too little.
    space_sampled: Nanos,
    room: Room,
}

impl State {
    /// The controller is reset, or its admin queue gone. Gives the event requests that waited.
    fn forget_events(&mut self) -> Vec<u16> {
        // A host that comes back has not been told how little space there is.
        self.room = Room::Enough;
        self.events.reset()
    }
}

/// A controller.
pub struct Controller {
    /// Its subsystem.
    pub subsystem: Arc<Subsystem>,
    /// Its identifier.
    pub cntlid: Cntlid,
    /// Whose it is.
    pub host: Host,
    /// Where the host came in.
    pub port: Arc<Port>,
    pub(crate) options: Arc<TransportOptions>,
    target: Weak<Shared>,
    cap: Cap,
    executes: AtomicBool,
    write_through: AtomicBool,
    kato_ms: AtomicU64,
    alive: AtomicU64,
    born: Nanos,
    state: Mutex<State>,
}

/// What [`Controller::new`] takes.
pub(crate) struct NewController {
    pub subsystem: Arc<Subsystem>,
    pub cntlid: Cntlid,
    pub host: Host,
    pub port: Arc<Port>,
    pub options: Arc<TransportOptions>,
    pub target: Weak<Shared>,
    pub kato_ms: u32,
    pub admin: QueueRef,
}

impl Controller {
    pub(crate) fn new(n: NewController) -> Arc<Controller> {
        let mqes = u64::from(n.options.max_queue_depth - 1);
        // Ready within 7.5 s (units of 500 ms); NVM command set; pages of 4 KiB.
        let cap = Cap(0).with_mqes(mqes).with_cqr(1).with_to(15).with_css(1);
        let now = cryptfold_reactor::now();
        let c = Arc::new(Controller {
            subsystem: n.subsystem,
            cntlid: n.cntlid,
            host: n.host,
            port: n.port,
            target: n.target,
            cap,
            executes: AtomicBool::new(false),
            write_through: AtomicBool::new(false),
            kato_ms: AtomicU64::new(0),
            alive: AtomicU64::new(now.0),
            born: now,
            state: Mutex::new(State {
                life: enable::State::Disabled,
                cc: Cc(0),
                events: Events::default(),
                changed: BTreeSet::new(),
                changed_overflow: false,
                queues: BTreeMap::from([(0, n.admin)]),
                features: Features::new(n.options.max_io_qpairs_per_ctrlr),
                past: Default::default(),
                errors: ErrorLog::default(),
                notices: NoticeLog::default(),
                sampled: now,
                busy: Duration::ZERO,
                space_sampled: now,
                room: Room::Enough,
            }),
            options: n.options,
        });
        c.set_kato(n.kato_ms);
        c
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Whether it is a discovery controller.
    pub fn is_discovery(&self) -> bool {
        self.subsystem.discovery
    }

    /// Whether commands other than Fabrics ones are executed.
    #[inline]
    pub(crate) fn executes(&self) -> bool {
        self.executes.load(Ordering::Relaxed)
    }

    /// Whether the host switched the volatile write cache off.
    #[inline]
    pub(crate) fn write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }

    /// Keep-alive timer as in force, ms; 0 = off.
    pub fn kato_ms(&self) -> u32 {
        self.kato_ms.load(Ordering::Relaxed) as u32
    }

    /// Rounds up to the granularity that Identify reports.
    fn set_kato(&self, ms: u32) {
        let step = u64::from(self.options.kas) * 100;
        let min = u64::from(self.options.min_kato);
        let ms = if ms == 0 { 0 } else { u64::from(ms).max(min).next_multiple_of(step) };
        self.kato_ms.store(ms.min(u64::from(u32::MAX)), Ordering::Relaxed);
        self.keep_alive();
    }

    fn keep_alive(&self) {
        self.alive.store(cryptfold_reactor::now().0, Ordering::Relaxed);
    }

    /// Since the host was last heard of; none without a timer.
    pub fn keep_alive_age(&self) -> Option<Duration> {
        let alive = Nanos(self.alive.load(Ordering::Relaxed));
        (self.kato_ms() > 0).then(|| cryptfold_reactor::now().since(alive))
    }

    /// The host gets so much longer for its next Keep Alive.
    pub(crate) fn forgive(&self, now: Nanos, lost: Duration) {
        let alive = Nanos(self.alive.load(Ordering::Relaxed)) + lost;
        self.alive.store(alive.min(now).0, Ordering::Relaxed);
    }

    /// Whether the keep-alive timer has expired; then the controller has failed for good.
    pub(crate) fn expired(&self, now: Nanos) -> bool {
        let kato = self.kato_ms.load(Ordering::Relaxed);
        if kato == 0 || now.since(Nanos(self.alive.load(Ordering::Relaxed))) <= Duration::from_millis(kato) {
            return false;
        }
        self.move_on(&mut self.state(), enable::Event::Fatal);
        true
    }

    /// Moves CC's state machine; false where the move is not legal.
    fn move_on(&self, s: &mut State, event: enable::Event) -> bool {
        let Some(next) = s.life.on(event) else { return false };
        s.life = next;
        self.executes.store(next.executes_commands(), Ordering::Relaxed);
        true
    }

    /// Whether its admin queue has TLS.
    pub(crate) fn has_tls(&self) -> bool {
        self.state().queues.get(&0).is_some_and(|admin| admin.tls.is_some())
    }

    /// An I/O queue wants to join.
    pub(crate) fn attach(&self, qid: Qid, host: &Host, queue: QueueRef) -> Result<(), ConnectReject> {
        if self.is_discovery() {
            return Err(ConnectReject::Command(ipo::QID));
        }
        if self.host.nqn != host.nqn {
            return Err(ConnectReject::Data(ipo::HOSTNQN));
        }
        if self.host.id != host.id {
            return Err(ConnectReject::Data(ipo::HOSTID));
        }
        let mut s = self.state();
        if qid.0 > s.features.io_queues || s.queues.contains_key(&qid.0) {
            return Err(ConnectReject::Command(ipo::QID));
        }
        if !s.life.executes_commands() || !s.queues.contains_key(&0) {
            return Err(ConnectReject::Busy);
        }
        s.features.io_queues_used = true;
        s.queues.insert(qid.0, queue);
        Ok(())
    }

    /// A queue's connection is gone. Without its admin queue the controller ends; resets and shutdowns that waited for
    /// the I/O queues are completed.
    pub(crate) fn detach(&self, qid: Qid) {
        let mut s = self.state();
        if let Some(q) = s.queues.remove(&qid.0) {
            s.past = s.past + q.stats.totals();
        }
        if qid.is_admin() {
            s.forget_events();
        }
        let io_queues = s.queues.keys().any(|q| *q != 0);
        if !io_queues {
            self.quiesced(&mut s);
        }
        let last = s.queues.is_empty();
        drop(s);
        if qid.is_admin() {
            if let Some(target) = self.target.upgrade() {
                target.generated.ended(self);
            }
            self.delete();
        }
        if last {
            tracing::info!(
                "{}: controller {} of {} is gone",
                self.subsystem.nqn(),
                self.cntlid,
                self.host.nqn
            );
            self.subsystem.remove_controller(self.cntlid);
        }
    }

    /// No I/O queue is left: what waited for that is done.
    fn quiesced(&self, s: &mut State) {
        match s.life {
            enable::State::Resetting => {
                self.move_on(s, enable::Event::Quiesced);
                s.cc = Cc(0);
                s.features = Features::new(self.options.max_io_qpairs_per_ctrlr);
                self.write_through.store(false, Ordering::Relaxed);
                s.changed.clear();
                s.changed_overflow = false;
                s.notices = NoticeLog::default();
            }
            enable::State::ShuttingDown => {
                self.move_on(s, enable::Event::ShutdownDone);
            }
            _ => {}
        }
    }

    /// Ends it: all its connections are closed, and the last one takes it out of the subsystem.
    pub fn delete(&self) {
        for q in self.connections() {
            q.send(|conn| conn.delete());
        }
    }

    pub(crate) fn connections(&self) -> Vec<ConnRef> {
        self.state().queues.values().map(|q| q.conn.clone()).collect()
    }

    pub(crate) fn queues(&self) -> Vec<(Qid, QueueRef)> {
        self.state().queues.iter().map(|(q, r)| (Qid(*q), r.clone())).collect()
    }

    /// The connection of a queue.
    pub(crate) fn queue(&self, qid: Qid) -> Option<ConnRef> {
        self.state().queues.get(&qid.0).map(|q| q.conn.clone())
    }

    /// Reports an event to the host, if it wants to know and has asked.
    pub(crate) fn raise(&self, kind: EventKind) {
        let mut s = self.state();
        let report = s.events.raise(kind);
        let admin = s.queues.get(&0).map(|q| q.conn.clone());
        drop(s);
        if let (Some(report), Some(admin)) = (report, admin) {
            admin.send(move |conn| conn.complete_event(report));
        }
    }

    /// A namespace came, went or changed.
    pub(crate) fn namespace_changed(&self, nsid: Nsid) {
        let mut s = self.state();
        if s.changed.len() < CHANGED_MAX {
            s.changed.insert(nsid.0);
        } else {
            s.changed_overflow |= !s.changed.contains(&nsid.0);
        }
        drop(s);
        self.raise(EventKind::NamespaceChanged);
    }

    /// Property Get and Set. The second value: slots of event requests that end because of it.
    pub(crate) fn property(&self, c: &PropertyCommand, set: bool) -> (Answer, Vec<u16>) {
        let property = match c.property() {
            Ok(p) => p,
            Err(status) => return (status.into(), Vec::new()),
        };
        if set {
            return self.property_set(property, c.value.get());
        }
        let s = self.state();
        let value = match property {
            Property::Cap => self.cap.0,
            Property::Vs => VERSION.0.into(),
            Property::Cc => s.cc.0.into(),
            Property::Csts => s.life.csts().0.into(),
            Property::Nssr => 0,
            // CAP.CRMS is 0: there are no ready time-outs.
            Property::Crto => return (Status::INVALID_FIELD.with_dnr().into(), Vec::new()),
        };
        (Answer::Done(Status::SUCCESS, value), Vec::new())
    }

    fn property_set(&self, property: Property, value: u64) -> (Answer, Vec<u16>) {
        let mut s = self.state();
        if property != Property::Cc {
            // CSTS.NSSRO is never set and NSSR is not offered: both writes change nothing (NVMe Base 2.0 3.1.3.6, .7).
            return (Status::SUCCESS.into(), Vec::new());
        }
        let (old, new) = (s.cc, Cc(value as u32));
        s.cc = new;
        let (mut end_io, mut end_events) = (false, false);
        for event in enable::Event::of_cc_write(old, new).into_iter().flatten() {
            self.move_on(&mut s, event);
            match event {
                enable::Event::Enable => match new.check(self.cap, !self.is_discovery()) {
                    Ok(()) => {
                        self.keep_alive();
                        self.move_on(&mut s, enable::Event::Started);
                    }
                    Err(why) => {
                        tracing::warn!("{}: controller {}: {why}", self.subsystem.nqn(), self.cntlid);
                        self.move_on(&mut s, enable::Event::Fatal);
                    }
                },
                _ => (end_io, end_events) = (true, true),
            }
        }
        let mut ended = Vec::new();
        if end_events {
            ended = s.forget_events();
        }
        let io: Vec<_> = s.queues.iter().filter(|q| *q.0 != 0).map(|q| q.1.conn.clone()).collect();
        if end_io && io.is_empty() {
            self.quiesced(&mut s);
        }
        drop(s);
        if end_io {
            io.iter().for_each(|q| q.send(|conn| conn.delete()));
        }
        (Status::SUCCESS.into(), ended)
    }

    /// Which way the data of an admin command goes; the status if it is not executed at all.
    pub(crate) fn admin_direction(&self, sqe: &Sqe) -> Result<Direction, Status> {
        let opcode = Admin::from_u8(sqe.opcode).ok_or(Status::INVALID_OPCODE.with_dnr())?;
        if !self.executes() {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        match opcode {
            Admin::Identify | Admin::GetLogPage => Ok(Direction::ControllerToHost),
            Admin::GetFeatures => Ok(features::get_direction(sqe)),
            Admin::SetFeatures => Ok(features::set_direction(sqe)),
            Admin::KeepAlive | Admin::AsyncEventRequest => Ok(Direction::None),
            Admin::Abort if !self.is_discovery() => Ok(Direction::None),
            _ => Err(Status::INVALID_OPCODE.with_dnr()),
        }
    }

    /// Executes an admin command. `data`: from the host; `room`: bytes that the host takes; `slot`: where the command
    /// waits for an event; `later`: for what takes longer.
    pub(crate) fn admin(&self, sqe: &Sqe, slot: u16, data: &[u8], room: u32, later: MakeLater<'_>) -> Answer {
        let answer = match Admin::from_u8(sqe.opcode) {
            Some(Admin::Identify) => self.identify(sqe, room),
            Some(Admin::GetLogPage) => self.get_log_page(sqe, room),
            Some(Admin::GetFeatures) => self.get_features(sqe, room),
            Some(Admin::SetFeatures) => self.set_features(sqe, data, later),
            Some(Admin::KeepAlive) => {
                self.keep_alive();
                Ok(Status::SUCCESS.into())
            }
            Some(Admin::AsyncEventRequest) => match self.state().events.request(sqe.cid(), slot) {
                Ok(None) => Ok(Answer::Waits),
                Ok(Some(report)) => {
                    // Requests are answered oldest first; without older ones it is this one.
                    debug_assert_eq!(report.slot, slot);
                    Ok(Answer::Done(Status::SUCCESS, report.dw0.into()))
                }
                Err(_) => Err(Status::ASYNC_EVENT_LIMIT_EXCEEDED.with_dnr()),
            },
            Some(Admin::Abort) => {
                let (qid, cid) = AbortCdw10(sqe.cdw10.get()).target();
                Ok(Answer::Abort(qid, cid))
            }
            _ => Err(Status::INVALID_OPCODE.with_dnr()),
        };
        answer.unwrap_or_else(Answer::from)
    }

    /// A command has failed.
    pub(crate) fn log_error(&self, qid: Qid, sqe: &Sqe, status: Status) {
        // Ended because somebody wanted it: no errors.
        if !matches!(status.code(), Status::ABORT_REQUESTED | Status::ABORTED_SQ_DELETION) {
            self.state().errors.add(qid, sqe, status);
        }
    }

    /// Another host did something to this one's registration or to the reservation of a namespace.
    pub(crate) fn reservation_notice(&self, nsid: Nsid, notice: Notice) {
        let mut s = self.state();
        if s.features.is_masked(nsid, notice) {
            return;
        }
        s.notices.add(nsid, notice);
        drop(s);
        self.raise(EventKind::Reservation);
    }

    /// Called regularly: what is only known by looking now and then.
    pub(crate) fn sample(&self, now: Nanos) {
        let mut s = self.state();
        let since = now.since(s.sampled);
        s.sampled = now;
        if s.queues.iter().any(|(qid, q)| *qid != 0 && q.stats.is_busy()) {
            s.busy += since;
        }
        if self.is_discovery() || now.since(s.space_sampled) < SPACE_INTERVAL {
            return;
        }
        s.space_sampled = now;
        drop(s);
        // Lock order: subsystem before controller.
        let free = self.subsystem.free_percent(&self.host.nqn);
        let mut s = self.state();
        let (was, now) = (s.room, s.room.next(free));
        s.room = now;
        drop(s);
        if now == was {
            return;
        }
        let nqn = self.subsystem.nqn();
        match now {
            Room::Enough => tracing::info!("{nqn}: {free}% of the space are free again"),
            Room::Low => tracing::warn!("{nqn}: {free}% of the space are left"),
            Room::Critical => tracing::error!("{nqn}: {free}% of the space are left; writes will fail soon"),
        }
        if now > was {
            self.raise(EventKind::SpareBelow);
        }
    }

    /// Takes back a waiting event request, to be aborted.
    pub(crate) fn abort_event(&self, cid: Cid) -> Option<u16> {
        self.state().events.abort(cid)
    }

    /// Commands and blocks so far, over all queues.
    pub(crate) fn totals(&self) -> crate::stats::Totals {
        let s = self.state();
        s.queues.values().fold(s.past, |sum, q| sum + q.stats.totals())
    }
}
