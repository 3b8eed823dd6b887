//! The connections of one reactor: who has something to do, and one turn of doing it.
//!
//! A connection is on the ready list when bytes may have come, there may be room to send, or output is queued. A turn
//! serves each of them once with one receive and one send at most, so a greedy one can not starve the others; nothing is
//! asked of the kernel for connections that are not on the list.
//!
//! Where there are several hosts, a turn serves [`SERVED_PER_HOST`] connections of each at most; the others are first in the next one.
//! So how long a turn takes for a host depends on how many others there are, not on how many connections these have.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cryptfold_bdev::BdevError;
use cryptfold_reactor::sync::Semaphore;
use cryptfold_reactor::{self as reactor, Handle, Poller, PollerGuard, SleepVerdict};

use crate::conn::Conn;
use crate::door::Standing;
use crate::port::{Port, PortSecurity};
use crate::stats::Totals;
use crate::subsystem::{Namespace, NsChannel};
use crate::target::Shared;
use crate::tls::{EitherWire, TargetKeys, Terms, TlsWire};
use crate::watch::{Ready, WatchId, Watcher, Watches};
use crate::wire::Wire;

/// Bytes taken from a socket at once, when they have no better place to go.
pub(crate) const STAGING_BYTES: usize = 256 << 10;
/// Copy and Verify commands that hold data at the same time.
const LARGE_COMMANDS: usize = 16;
/// Connections of one host that a turn serves, if there are other hosts.
const SERVED_PER_HOST: u32 = 4;
/// How often deadlines are looked at.
pub(crate) const TICK: Duration = Duration::from_millis(250);

thread_local! {
    /// The groups of this thread, by target and reactor (a simulation has many reactors on one thread).
    static GROUPS: RefCell<HashMap<(u64, u32), Rc<Group>>> = RefCell::default();
}

/// A reactor as the target sees it from anywhere.
pub(crate) struct Seat {
    pub handle: Handle,
    /// Connections, weighted; for choosing the least loaded.
    pub load: AtomicU32,
    /// Admin queues so far.
    pub admin_qpairs: AtomicU64,
    /// I/O queues so far.
    pub io_qpairs: AtomicU64,
    /// Commands of queues that are gone.
    pub past: Mutex<Totals>,
}

/// What a connection counts before it has a queue, and as an admin queue.
pub(crate) const LOAD_CONNECTION: u32 = 1;
/// What an I/O queue counts on top.
pub(crate) const LOAD_IO: u32 = 7;

/// Reaches a connection from anywhere.
#[derive(Clone)]
pub(crate) struct ConnRef {
    pub handle: Handle,
    pub target: u64,
    pub id: u64,
}

impl ConnRef {
    /// Runs `f` with the connection on its reactor, if it still exists then.
    pub fn send(&self, f: impl FnOnce(&Rc<Conn>) + Send + 'static) {
        let (target, id) = (self.target, self.id);
        self.handle.send(move || {
            if let Some(conn) = Group::here(target).and_then(|g| g.conn(id)) {
                f(&conn);
            }
        });
    }
}

/// A listening socket.
struct Listening {
    socket: Rc<TcpListener>,
    port: Arc<Port>,
    watch: Option<WatchId>,
}

/// How many connections of a host have been served in this turn. Those of whom nobody knows yet whose they are count as one host.
#[derive(Default)]
pub(crate) struct Turns {
    turn: Cell<u64>,
    served: Cell<u32>,
}

impl Turns {
    /// Whether one more may be served.
    fn take(&self, turn: u64) -> bool {
        let before = if self.turn.replace(turn) == turn { self.served.get() } else { 0 };
        self.served.set(before + 1);
        before < SERVED_PER_HOST
    }
}

/// The connections of one target on one reactor.
pub(crate) struct Group {
    pub target: Arc<Shared>,
    pub seat: Arc<Seat>,
    conns: RefCell<HashMap<u64, Rc<Conn>>>,
    listeners: RefCell<HashMap<u64, Listening>>,
    ready: RefCell<Vec<Rc<Conn>>>,
    serving: RefCell<Vec<Rc<Conn>>>,
    /// Those that this turn leaves to the next.
    late: RefCell<Vec<Rc<Conn>>>,
    turn: Cell<u64>,
    hosts: RefCell<HashMap<String, Weak<Turns>>>,
    strangers: Rc<Turns>,
    staging: RefCell<Box<[u8]>>,
    channels: RefCell<HashMap<u64, Weak<NsChannel>>>,
    /// Permits for commands that hold a megabyte at a time.
    pub large_commands: Semaphore,
    watches: RefCell<Option<Watches>>,
    poller: RefCell<Option<PollerGuard>>,
    ticking: Cell<bool>,
    /// Accepting is to be tried again in a moment.
    retrying: Cell<bool>,
}

impl Group {
    /// The group of this reactor, if the target has been started here.
    pub fn here(target: u64) -> Option<Rc<Group>> {
        let reactor = reactor::try_current()?.id().0;
        GROUPS.with_borrow(|g| g.get(&(target, reactor)).cloned())
    }

    /// Makes the group of this reactor.
    pub fn start(target: Arc<Shared>, seat: Arc<Seat>) {
        let key = (target.id, reactor::current().id().0);
        let group = Rc::new(Group {
            target,
            seat,
            conns: RefCell::default(),
            listeners: RefCell::default(),
            ready: RefCell::default(),
            serving: RefCell::default(),
            late: RefCell::default(),
            turn: Cell::new(0),
            hosts: RefCell::default(),
            strangers: Rc::default(),
            staging: RefCell::new(vec![0; STAGING_BYTES].into_boxed_slice()),
            channels: RefCell::default(),
            large_commands: Semaphore::new(LARGE_COMMANDS),
            watches: RefCell::new(None),
            poller: RefCell::new(None),
            ticking: Cell::new(false),
            retrying: Cell::new(false),
        });
        let watcher: Weak<dyn Watcher> = Rc::downgrade(&group) as Weak<dyn Watcher>;
        *group.watches.borrow_mut() = Some(Watches::new(watcher));
        *group.poller.borrow_mut() = Some(reactor::register_poller("nvmf_tcp", group.clone()));
        GROUPS.with_borrow_mut(|g| g.insert(key, group));
    }

    /// Forgets the group of this reactor; its connections have ended.
    pub fn stop(target: u64) {
        let key = (target, reactor::current().id().0);
        let group = GROUPS.with_borrow_mut(|g| g.remove(&key));
        if let Some(group) = group {
            group.listeners.borrow_mut().clear();
            let conns = std::mem::take(&mut *group.conns.borrow_mut());
            conns.values().for_each(|c| c.delete());
            let poller = group.poller.borrow_mut().take();
            let watches = group.watches.borrow_mut().take();
            drop((poller, watches));
        }
    }

    pub fn conn(&self, id: u64) -> Option<Rc<Conn>> {
        self.conns.borrow().get(&id).cloned()
    }

    pub fn conns(&self) -> Vec<Rc<Conn>> {
        self.conns.borrow().values().cloned().collect()
    }

    /// Takes a new stream in, which [`Seat::load`] and the door count already. `peer`: the host's address, for people.
    pub fn adopt(self: &Rc<Self>, id: u64, wire: Box<dyn Wire>, port: Arc<Port>, peer: String) {
        let terms = |generated| Terms {
            keys: Arc::new(TargetKeys { target: Arc::downgrade(&self.target), generated }),
            kernel: self.target.kernel_tls.load(Ordering::Relaxed),
        };
        let wire = match port.security {
            PortSecurity::None => Ok(wire),
            PortSecurity::Tls => TlsWire::new(wire, terms(false)).map(|w| Box::new(w) as Box<dyn Wire>),
            PortSecurity::Concatenation => Ok(Box::new(EitherWire::new(wire, terms(true))) as Box<dyn Wire>),
        };
        let wire = match wire {
            Ok(wire) => wire,
            Err(e) => {
                tracing::warn!("{peer}: refused: {e}");
                self.target.door.leave(id, Standing::Stranger);
                return self.load(-(LOAD_CONNECTION as i32));
            }
        };
        let descriptor = wire.descriptor();
        let conn = Conn::new(id, self, wire, port, peer);
        self.conns.borrow_mut().insert(id, conn.clone());
        if let Some(fd) = descriptor
            && let Some(watches) = &*self.watches.borrow()
        {
            conn.watch.set(watches.watch(id, fd));
        }
        let me = Rc::downgrade(&conn);
        conn.on_ready(Rc::new(move || {
            if let Some(conn) = me.upgrade() {
                conn.ready(Ready::MAYBE);
            }
        }));
        conn.ready(Ready::MAYBE);
        self.start_ticking();
    }

    /// Accepts connections on `socket` (non-blocking) from now on.
    pub fn listen(self: &Rc<Self>, key: u64, socket: TcpListener, port: Arc<Port>) {
        let socket = Rc::new(socket);
        let watch = self.watches.borrow().as_ref().and_then(|w| w.watch(key, socket.clone() as Rc<dyn AsFd>));
        self.listeners.borrow_mut().insert(key, Listening { socket, port, watch });
        self.accept(key);
    }

    /// Stops listening.
    pub fn unlisten(&self, key: u64) {
        let removed = self.listeners.borrow_mut().remove(&key);
        if let (Some(watch), Some(watches)) = (removed.and_then(|l| l.watch), &*self.watches.borrow()) {
            watches.end(watch);
        }
    }

    fn accept(self: &Rc<Self>, key: u64) {
        let listening = self.listeners.borrow().get(&key).map(|l| (l.socket.clone(), l.port.clone()));
        let Some((socket, port)) = listening else { return };
        loop {
            match socket.accept() {
                Ok((stream, peer)) => self.target.assign(stream, peer, port.clone()),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
                // The connection was gone before it was taken; there may be more.
                Err(e)
                    if matches!(e.raw_os_error(), Some(libc::ECONNABORTED | libc::EINTR | libc::EPROTO)) => {}
                Err(e) => {
                    // Out of descriptors or memory: those that wait stay in the backlog for a moment.
                    tracing::warn!("{}: can not accept a connection: {e}", port.addr);
                    if self.retrying.replace(true) {
                        return;
                    }
                    self.target.door.thin_out(reactor::now());
                    let me = self.clone();
                    reactor::spawn_local(async move {
                        reactor::sleep(Duration::from_millis(100)).await;
                        me.retrying.set(false);
                        let keys: Vec<u64> = me.listeners.borrow().keys().copied().collect();
                        keys.into_iter().for_each(|k| me.accept(k));
                    })
                    .detach();
                    return;
                }
            }
        }
    }

    /// Puts a connection on the ready list.
    pub fn push_ready(&self, conn: Rc<Conn>) {
        self.ready.borrow_mut().push(conn);
    }

    /// What counts a connection whose host is not known.
    pub fn strangers(&self) -> Rc<Turns> {
        self.strangers.clone()
    }

    /// What counts the connections of a host. To be given back to [`Group::leave`].
    pub fn host(&self, hostnqn: &str) -> Rc<Turns> {
        let mut hosts = self.hosts.borrow_mut();
        if let Some(known) = hosts.get(hostnqn).and_then(Weak::upgrade) {
            return known;
        }
        let fresh = Rc::<Turns>::default();
        hosts.insert(hostnqn.into(), Rc::downgrade(&fresh));
        fresh
    }

    /// A connection of this host has ended.
    pub fn leave(&self, hostnqn: &str, turns: Rc<Turns>) {
        drop(turns);
        let mut hosts = self.hosts.borrow_mut();
        if hosts.get(hostnqn).is_some_and(|t| t.strong_count() == 0) {
            hosts.remove(hostnqn);
        }
    }

    /// A connection has ended: forgets it.
    pub fn forget(&self, id: u64) {
        let gone = self.conns.borrow_mut().remove(&id);
        drop(gone);
    }

    pub fn unwatch(&self, id: WatchId) {
        if let Some(w) = &*self.watches.borrow() {
            w.end(id);
        }
    }

    /// This reactor's channel to a namespace, shared by its connections.
    pub fn channel(&self, ns: &Arc<Namespace>) -> Result<Rc<NsChannel>, BdevError> {
        if let Some(c) = self.channels.borrow().get(&ns.uid).and_then(Weak::upgrade) {
            return Ok(c);
        }
        let channel = Rc::new(NsChannel::open(ns.clone())?);
        let mut channels = self.channels.borrow_mut();
        channels.retain(|_, c| c.strong_count() > 0);
        channels.insert(ns.uid, Rc::downgrade(&channel));
        Ok(channel)
    }

    pub fn load(&self, n: i32) {
        let load = &self.seat.load;
        if n < 0 {
            load.fetch_sub(n.unsigned_abs(), Ordering::Relaxed);
        } else {
            load.fetch_add(n.unsigned_abs(), Ordering::Relaxed);
        }
    }

    /// Looks at deadlines as long as there are connections. What a look comes late is time in which this reactor stood still (the
    /// process was stopped, the machine was paused, others had the core), and no host is charged for it: what hosts have sent
    /// meanwhile may not have been read yet.
    fn start_ticking(self: &Rc<Self>) {
        if self.ticking.replace(true) {
            return;
        }
        let me = Rc::downgrade(self);
        reactor::spawn_local(async move {
            let mut last = reactor::now();
            loop {
                reactor::sleep(TICK).await;
                let Some(group) = me.upgrade() else { return };
                let conns = group.conns();
                if conns.is_empty() {
                    group.ticking.set(false);
                    return;
                }
                let now = reactor::now();
                let lost = now.since(last).saturating_sub(TICK);
                last = now;
                conns.iter().for_each(|c| c.tick(now, lost));
            }
        })
        .detach();
    }
}

impl Watcher for Group {
    fn ready(&self, key: u64, ready: Ready) {
        if let Some(conn) = self.conn(key) {
            return conn.ready(ready);
        }
        let me = Group::here(self.target.id);
        if ready.readable
            && let Some(me) = me
        {
            me.accept(key);
        }
    }
}

impl Poller for Group {
    fn poll(&self) -> bool {
        if self.ready.borrow().is_empty() {
            return false;
        }
        let mut serving = self.serving.borrow_mut();
        std::mem::swap(&mut *serving, &mut *self.ready.borrow_mut());
        let mut staging = self.staging.borrow_mut();
        let mut late = self.late.borrow_mut();
        let turn = self.turn.get() + 1;
        self.turn.set(turn);
        let several = self.hosts.borrow().len() > 1;
        for conn in serving.drain(..) {
            // Not borrowed while it is served: it may get another one then.
            let too_many = {
                let turns = conn.turns();
                (several || Rc::ptr_eq(&turns, &self.strangers)) && !turns.take(turn)
            };
            if too_many {
                late.push(conn);
            } else {
                conn.serve(&mut staging);
            }
        }
        if !late.is_empty() {
            let mut ready = self.ready.borrow_mut();
            late.append(&mut ready);
            std::mem::swap(&mut *late, &mut *ready);
        }
        true
    }

    fn prepare_sleep(&self) -> SleepVerdict {
        // Readiness arrives through the ring, output and messages put connections on the list.
        if self.ready.borrow().is_empty() { SleepVerdict::MaySleep } else { SleepVerdict::KeepPolling }
    }
}
