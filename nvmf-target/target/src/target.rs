//! The target: transports, subsystems, listeners and the control requests that change them.
//!
//! [`Target`] is used by ordinary threads; its calls may block until connections or I/O have ended. [`Shared`] is what the
//! reactors see of it: Connect, discovery, and where a new connection goes.
//!
//! No lock is held while a call waits for a reactor.

use std::collections::btree_map::Entry;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use cryptfold_bdev::Registry;
use cryptfold_nvmf_auth::{Names, Offer, Psk, Secret};
use cryptfold_nvmf_spec::fabrics::{Connect, ConnectData, ConnectReject, ipo};
use cryptfold_nvmf_spec::log::{
    AddressFamily, AnaState, DiscoveryEntry, DiscoveryHeader, SubsystemType, sectype, treq,
};
use cryptfold_nvmf_spec::{Cntlid, Nqn, Nsid, Qid, nqn};
use cryptfold_reactor::{self as reactor, Handle};
use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::arrival::{Arrival, OnArrival};
use crate::budget::{Hosts, Place};
use crate::controller::events::EventKind;
use crate::controller::{Controller, Host, NewController, QueueRef};
use crate::door::Door;
use crate::generated::GeneratedKeys;
use crate::group::{ConnRef, Group, LOAD_CONNECTION, Seat};
use crate::info::{
    ControllerInfo, DiscoveryFilter, DoorInfo, HostInfo, ListenerInfo, NsInfo, PollGroupStats, QpairInfo,
    Referral, SubsystemInfo,
};
use crate::port::{Port, PortSecurity};
use crate::stats::Totals;
use crate::subsystem::{Listener, Subsystem, locked, unique};
use crate::wire::{TcpWire, TlsPeer, Wire};
use crate::{HostAccess, Named};
use crate::{ListenAddr, NsOptions, SubsystemOptions, TargetError, TransportOptions, sys};

/// How long control requests wait for connections and I/O to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// Subsystems at most, unless set otherwise.
const MAX_SUBSYSTEMS: u32 = 1024;

struct Listening {
    port: Arc<Port>,
    /// Names its socket on reactor 0; `None` without a socket.
    key: Option<u64>,
}

struct State {
    transport: Option<Arc<TransportOptions>>,
    /// The discovery subsystem first.
    subsystems: Vec<Arc<Subsystem>>,
    ports: Vec<Listening>,
    next_port: u16,
    max_subsystems: u32,
    crdt: [u16; 3],
    filter: DiscoveryFilter,
    offer: Offer,
    referrals: Vec<Referral>,
    stopped: bool,
}

/// What the reactors see of the target.
pub(crate) struct Shared {
    pub id: u64,
    registry: Arc<Registry>,
    seats: Vec<Arc<Seat>>,
    /// GENCTR of the discovery log.
    generation: AtomicU64,
    pub door: Door,
    pub hosts: Hosts,
    pub generated: GeneratedKeys,
    /// Connections from now on leave the records of TLS to the kernel, where it takes them.
    pub kernel_tls: AtomicBool,
    on_arrival: OnceLock<OnArrival>,
    state: Mutex<State>,
}

/// What [`Shared::connect`] takes.
pub(crate) struct NewQueue<'a> {
    pub command: &'a Connect,
    pub data: &'a ConnectData,
    pub port: &'a Arc<Port>,
    pub options: &'a Arc<TransportOptions>,
    pub queue: QueueRef,
    /// What TLS says about the host.
    pub tls: Option<&'a TlsPeer>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// The transport's parameters, or the defaults before it is created.
    pub fn options(&self) -> Arc<TransportOptions> {
        self.state().transport.clone().unwrap_or_default()
    }

    /// Hash functions and groups of DH-HMAC-CHAP.
    pub fn offer(&self) -> Offer {
        self.state().offer.clone()
    }

    /// Command retry delays, units of 100 ms.
    pub fn crdt(&self) -> [u16; 3] {
        self.state().crdt
    }

    fn find(&self, nqn: &str) -> Option<Arc<Subsystem>> {
        self.state().subsystems.iter().find(|s| s.nqn() == nqn).cloned()
    }

    /// The TLS key of a host of a subsystem.
    pub fn psk(&self, subnqn: &str, hostnqn: &str) -> Option<Psk> {
        self.find(subnqn)?.access(hostnqn).psk.map(|k| k.key)
    }

    /// Whether a host of a subsystem has a DH-HMAC-CHAP secret.
    pub fn authenticates(&self, subnqn: &str, hostnqn: &str) -> bool {
        self.find(subnqn).is_some_and(|s| s.access(hostnqn).dhchap.is_some())
    }

    /// Whether a host may connect to a subsystem through this port.
    pub fn admits(&self, subnqn: &str, hostnqn: &str, port: &Arc<Port>) -> bool {
        self.find(subnqn).is_some_and(|s| s.admits(hostnqn, port))
    }

    /// Why TLS (or that there is none) keeps this host from connecting a queue at this port.
    pub fn tls_refuses(
        &self,
        names: &Names,
        tls: Option<&TlsPeer>,
        port: &Port,
        qid: Qid,
    ) -> Option<&'static str> {
        let subsystem = self.find(&names.subsystem);
        let access = subsystem.as_ref().map(|s| s.access(&names.host)).unwrap_or_default();
        let why = TlsPeer::refuses(tls, &names.host, &names.subsystem, access.psk.is_some());
        // Who asks what there is to be found has nothing to be kept secret.
        let secret = subsystem.is_some_and(|s| !s.discovery);
        let demanded = port.security == PortSecurity::Concatenation && tls.is_none() && secret;
        match why {
            None if demanded && !qid.is_admin() => Some("I/O queues come with TLS at this port"),
            None if demanded && access.dhchap.is_none() => {
                Some("at this port a host without TLS has to authenticate, and it has no DH-HMAC-CHAP key")
            }
            why => why,
        }
    }

    /// Gives an accepted socket to the least loaded reactor.
    pub fn assign(&self, stream: TcpStream, peer: SocketAddr, port: Arc<Port>) {
        let options = self.options();
        if let Err(e) = sys::prepare(&stream, options.sock_priority, options.ack_timeout) {
            tracing::warn!("{peer}: a connection could not be set up: {e}");
            return;
        }
        let Some(seat) = self.seats.iter().min_by_key(|s| s.load.load(Ordering::Relaxed)) else { return };
        let conn = ConnRef { handle: seat.handle.clone(), target: self.id, id: unique() };
        if !self.door.enter(&conn, options.max_connections, reactor::now()) {
            return;
        }
        seat.load.fetch_add(LOAD_CONNECTION, Ordering::Relaxed);
        seat.handle.send(move || {
            if let Some(group) = Group::here(conn.target) {
                let wire = Box::new(TcpWire(std::rc::Rc::new(stream)));
                group.adopt(conn.id, wire, port, peer.to_string());
            }
        });
    }

    /// Connect: checks everything, then makes a controller or adds a queue to one.
    pub fn connect(self: &Arc<Self>, n: NewQueue<'_>) -> Result<(Arc<Controller>, Place), ConnectReject> {
        let (command, qid) = (n.command, n.command.qid());
        let entries = if qid.is_admin() { n.options.max_aq_depth } else { n.options.max_queue_depth };
        command.check(entries - 1)?;
        let names = n.data.names()?;
        let subsystem = self.find(names.subnqn).ok_or(ConnectReject::Data(ipo::SUBNQN))?;
        if !subsystem.admits(names.hostnqn, n.port) {
            return Err(ConnectReject::Host);
        }
        let place = self.hosts.place(names.hostnqn, n.options.limits()).ok_or(ConnectReject::Busy)?;
        let host = Host { nqn: names.hostnqn.to_owned(), id: names.hostid };
        if !qid.is_admin() {
            let controller = subsystem.tables().controllers.get(&names.cntlid.0).cloned();
            let controller = controller.ok_or(ConnectReject::Data(ipo::CNTLID))?;
            let generated = n.tls.and_then(|t| t.generated.as_deref());
            // A queue is as secure as the association, by its own key.
            let fits = generated.is_none_or(|identity| self.generated.is_used(identity, &controller));
            if !fits || n.tls.is_none() && controller.has_tls() {
                return Err(ConnectReject::Host);
            }
            controller.attach(qid, &host, n.queue)?;
            return Ok((controller, place));
        }
        // The dynamic controller model: any other identifier names a controller that does not exist yet.
        if names.cntlid != Cntlid::DYNAMIC {
            return Err(ConnectReject::Data(ipo::CNTLID));
        }
        let made = subsystem.add_controller(names.hostnqn, |cntlid| {
            Controller::new(NewController {
                subsystem: subsystem.clone(),
                cntlid,
                host,
                port: n.port.clone(),
                options: n.options.clone(),
                target: Arc::downgrade(self),
                kato_ms: command.kato_ms.get(),
                admin: n.queue,
            })
        });
        let controller = made.ok_or(ConnectReject::Busy)?;
        if let Some(identity) = n.tls.and_then(|t| t.generated.as_deref())
            && !self.generated.claim(identity, &controller)
        {
            subsystem.remove_controller(controller.cntlid);
            return Err(ConnectReject::Host);
        }
        tracing::info!("{}: controller {} for {}", subsystem.nqn(), controller.cntlid, controller.host.nqn);
        Ok((controller, place))
    }

    /// A queue of this controller is about to be used.
    pub fn arrives(&self, controller: &Controller, peer: &str, proven: bool) {
        if let Some(tell) = self.on_arrival.get().filter(|_| !controller.is_discovery()) {
            tell(&Arrival::of(controller, peer, proven));
        }
    }

    /// The discovery log as this host sees it through this port.
    pub fn discovery_page(&self, hostnqn: &str, through: &Arc<Port>) -> Vec<u8> {
        let (subsystems, filter, asqsz, referrals) = {
            let s = self.state();
            (
                s.subsystems.clone(),
                s.filter,
                s.transport.clone().unwrap_or_default().max_aq_depth,
                s.referrals.clone(),
            )
        };
        let mut entries = Vec::new();
        for s in subsystems.iter().filter(|s| !s.discovery) {
            let t = s.tables();
            if !t.allows(hostnqn) {
                continue;
            }
            for port in t.listeners.iter().map(|l| &l.port) {
                let same_ip = port.addr.ip == through.addr.ip;
                let same_port = port.addr.port == through.addr.port;
                if filter.address && !same_ip || filter.svcid && !same_port {
                    continue;
                }
                let family = if port.addr.ip.is_ipv4() { AddressFamily::Ipv4 } else { AddressFamily::Ipv6 };
                let (traddr, trsvcid) = (port.addr.ip.to_string(), port.addr.port.to_string());
                let Ok(name) = Nqn::parse(s.nqn()) else { continue };
                let entry = DiscoveryEntry::tcp(SubsystemType::Nvm, family, &traddr, &trsvcid, port.id, name);
                if let Some(mut entry) = entry {
                    entry.asqsz = asqsz.into();
                    (entry.treq, entry.tsas[0]) = match port.security {
                        PortSecurity::None => (entry.treq, sectype::NONE),
                        PortSecurity::Tls => (treq::SECURE_REQUIRED, sectype::TLS13),
                        // TLS need not be there from the start. Hosts understand that they are to concatenate.
                        PortSecurity::Concatenation => (treq::SECURE_NOT_REQUIRED, sectype::TLS13),
                    };
                    entry.treq |= treq::DISABLE_SQ_FLOW_CONTROL;
                    entries.push(entry);
                }
            }
        }
        entries.extend(referrals.iter().filter_map(|r| referral_entry(r, asqsz)));
        let mut header = DiscoveryHeader::default();
        header.genctr = self.generation.load(Ordering::Relaxed).into();
        header.numrec = (entries.len() as u64).into();
        [header.as_bytes(), entries.as_bytes()].concat()
    }

    /// The discovery log has changed: hosts that asked to be told are.
    fn discovery_changed(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
        let discovery = self.find(nqn::DISCOVERY);
        for c in discovery.iter().flat_map(|s| s.controllers()) {
            c.raise(EventKind::DiscoveryChange);
        }
    }
}

/// An NVMe/TCP target.
pub struct Target {
    shared: Arc<Shared>,
}

/// Waits (on an ordinary thread) until `done`; on a reactor, which must not wait, only looks.
fn wait_until(limit: Duration, done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while !done() {
        if reactor::try_current().is_some() {
            return true;
        }
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

impl Target {
    /// A target whose connections live on `reactors` (one or more) and whose namespaces are devices of `registry`. It has
    /// the discovery subsystem and nothing else.
    pub fn new(registry: Arc<Registry>, reactors: &[Handle]) -> Target {
        let seats: Vec<_> = reactors.iter().map(|h| Arc::new(Seat::new(h.clone()))).collect();
        let discovery = SubsystemOptions {
            allow_any_host: true,
            serial_number: String::new(),
            model_number: String::new(),
            ..SubsystemOptions::new(nqn::DISCOVERY)
        };
        let shared = Arc::new(Shared {
            id: unique(),
            registry,
            seats: seats.clone(),
            generation: AtomicU64::new(0),
            door: Door::default(),
            hosts: Hosts::default(),
            generated: GeneratedKeys::default(),
            kernel_tls: AtomicBool::new(false),
            on_arrival: OnceLock::new(),
            state: Mutex::new(State {
                transport: None,
                subsystems: vec![Subsystem::new(discovery, true)],
                ports: Vec::new(),
                next_port: 1,
                max_subsystems: MAX_SUBSYSTEMS,
                crdt: [0; 3],
                filter: DiscoveryFilter::default(),
                offer: Offer::default(),
                referrals: Vec::new(),
                stopped: false,
            }),
        });
        for seat in seats {
            let (shared, handle) = (shared.clone(), seat.handle.clone());
            handle.send(move || Group::start(shared, seat));
        }
        Target { shared }
    }

    /// Whether connections from now on leave the records of TLS to the kernel, where it takes them. At first they do not. The kernel may
    /// load a module for it, which takes a moment.
    pub fn set_kernel_tls(&self, may: bool) {
        if may {
            cryptfold_nvmf_tls::load_kernel_tls();
        }
        self.shared.kernel_tls.store(may, Ordering::Relaxed);
    }

    /// Has `tell` called with each queue (discovery's excepted) when [`Target::qpairs`] lists it already and its host can not use it
    /// yet. It is called on reactors, and must not wait for them; once set, it stays.
    pub fn on_arrival(&self, tell: impl Fn(&Arrival) + Send + Sync + 'static) {
        if self.shared.on_arrival.set(Box::new(tell)).is_err() {
            tracing::error!("somebody is told of arrivals already");
        }
    }

    fn running(&self) -> Result<MutexGuard<'_, State>, TargetError> {
        let s = self.shared.state();
        if s.stopped { Err(TargetError::Stopped) } else { Ok(s) }
    }

    fn subsystem(&self, nqn: &str) -> Result<Arc<Subsystem>, TargetError> {
        self.shared.find(nqn).ok_or_else(|| TargetError::NoSubsystem(nqn.into()))
    }

    /// Creates the transport; only `"TCP"` exists.
    ///
    /// # Errors
    /// Another type, created before, or parameters out of range.
    pub fn create_transport(&self, trtype: &str, options: TransportOptions) -> Result<(), TargetError> {
        if !trtype.eq_ignore_ascii_case("tcp") {
            return Err(TargetError::NoTransport(trtype.into()));
        }
        options.check()?;
        let mut s = self.running()?;
        if s.transport.is_some() {
            return Err(TargetError::TransportExists("TCP"));
        }
        s.transport = Some(Arc::new(options));
        Ok(())
    }

    /// The transports that were created, with their types.
    pub fn transports(&self) -> Vec<(&'static str, TransportOptions)> {
        self.shared.state().transport.iter().map(|t| ("TCP", (**t).clone())).collect()
    }

    /// Creates a subsystem.
    ///
    /// # Errors
    /// Name taken or no NQN, texts too long, identifiers out of range, too many subsystems.
    pub fn create_subsystem(&self, options: SubsystemOptions) -> Result<(), TargetError> {
        check_subsystem(&options)?;
        let mut s = self.running()?;
        if s.subsystems.iter().any(|x| x.nqn() == options.nqn) {
            return Err(TargetError::SubsystemExists(options.nqn));
        }
        if s.subsystems.len() >= s.max_subsystems as usize {
            return Err(TargetError::TooManySubsystems(s.max_subsystems));
        }
        s.subsystems.push(Subsystem::new(options, false));
        Ok(())
    }

    /// Deletes a subsystem: ends its controllers and waits for their I/O, then lets go of its devices.
    ///
    /// # Errors
    /// Unknown, the discovery subsystem, or I/O that does not end.
    pub fn delete_subsystem(&self, nqn: &str) -> Result<(), TargetError> {
        let subsystem = self.subsystem(nqn)?;
        if subsystem.discovery {
            return Err(TargetError::WrongState("the discovery subsystem can not be deleted"));
        }
        subsystem.tables().deleted = true;
        self.end_controllers(&subsystem, |_| true)?;
        let devices: Vec<_> =
            subsystem.nsids().into_iter().filter_map(|n| subsystem.remove_ns(n).ok()).collect();
        subsystem.tables().listeners.clear();
        self.shared.generated.wipe(nqn, None);
        self.shared.state().subsystems.retain(|s| !Arc::ptr_eq(s, &subsystem));
        self.close_unused_ports();
        self.shared.discovery_changed();
        if wait_until(DRAIN_LIMIT, || devices.iter().all(|d| d.strong_count() == 0)) {
            Ok(())
        } else {
            Err(TargetError::Busy(nqn.into(), DRAIN_LIMIT.as_secs()))
        }
    }

    /// Ends the controllers for which `which` is true, and waits until they are gone.
    fn end_controllers(
        &self,
        subsystem: &Arc<Subsystem>,
        which: impl Fn(&Controller) -> bool,
    ) -> Result<(), TargetError> {
        let ended: Vec<_> = subsystem.controllers().into_iter().filter(|c| which(c)).collect();
        ended.iter().for_each(|c| c.delete());
        let gone = |c: &Arc<Controller>| {
            subsystem.tables().controllers.get(&c.cntlid.0).is_none_or(|x| !Arc::ptr_eq(x, c))
        };
        if wait_until(DRAIN_LIMIT, || ended.iter().all(gone)) {
            Ok(())
        } else {
            Err(TargetError::Busy(subsystem.nqn().into(), DRAIN_LIMIT.as_secs()))
        }
    }

    /// Adds a device to a subsystem and returns its namespace identifier.
    ///
    /// # Errors
    /// Unknown subsystem or device, identifier taken or out of range, device in use.
    pub fn add_ns(&self, nqn: &str, options: &NsOptions) -> Result<u32, TargetError> {
        drop(self.running()?);
        Ok(self.subsystem(nqn)?.add_ns(&self.shared.registry, options)?.0)
    }

    /// Takes a namespace out of its subsystem and waits for its I/O.
    ///
    /// # Errors
    /// Unknown, or I/O that does not end.
    pub fn remove_ns(&self, nqn: &str, nsid: u32) -> Result<(), TargetError> {
        let device = self.subsystem(nqn)?.remove_ns(Nsid(nsid))?;
        if wait_until(DRAIN_LIMIT, || device.strong_count() == 0) {
            Ok(())
        } else {
            Err(TargetError::Busy(format!("Namespace {nsid} of {nqn}"), DRAIN_LIMIT.as_secs()))
        }
    }

    /// Shows a namespace that was added with `no_auto_visible` to a host, or hides it from the host again. Idempotent.
    ///
    /// # Errors
    /// Unknown subsystem or namespace, no NQN, or a namespace that every host sees.
    pub fn set_ns_visible(&self, nqn: &str, nsid: u32, host: &str, visible: bool) -> Result<(), TargetError> {
        let subsystem = self.subsystem(nqn)?;
        Nqn::parse(host).map_err(|reason| TargetError::Nqn { nqn: host.into(), reason })?;
        subsystem.set_visible(Nsid(nsid), host, visible)
    }

    /// Makes a subsystem reachable at an address; returns the address with the port that was chosen for port 0.
    ///
    /// # Errors
    /// Unknown subsystem, no transport, listens there already, or the system's refusal (port in use).
    pub fn add_listener(&self, nqn: &str, addr: &ListenAddr) -> Result<ListenAddr, TargetError> {
        self.add_secure_listener(nqn, addr, PortSecurity::None)
    }

    /// As [`Target::add_listener`], with what of TLS is spoken there.
    ///
    /// # Errors
    /// As [`Target::add_listener`]; the port is used otherwise already.
    pub fn add_secure_listener(
        &self,
        nqn: &str,
        addr: &ListenAddr,
        security: PortSecurity,
    ) -> Result<ListenAddr, TargetError> {
        let subsystem = self.subsystem(nqn)?;
        let port = {
            let mut s = self.running()?;
            if s.transport.is_none() {
                return Err(TargetError::NoTransport("TCP".into()));
            }
            match s.ports.iter().find(|p| p.port.addr == *addr && addr.port != 0) {
                Some(p) if p.port.security != security => {
                    let now = p.port.security.name();
                    let why = format!("{addr} is used {now} already; choose another trsvcid");
                    return Err(TargetError::Invalid("secure_channel", why));
                }
                Some(p) => p.port.clone(),
                None => self.bind(&mut s, addr, security)?,
            }
        };
        self.join_port(&subsystem, &port)?;
        Ok(port.addr.clone())
    }

    /// As [`Target::add_listener`], without a socket: connections are brought by [`Target::attach`]. For simulations.
    ///
    /// # Errors
    /// As [`Target::add_listener`].
    pub fn add_listener_unbound(&self, nqn: &str, addr: &ListenAddr) -> Result<(), TargetError> {
        let subsystem = self.subsystem(nqn)?;
        let port = {
            let mut s = self.running()?;
            let known = s.ports.iter().find(|p| p.port.addr == *addr).map(|p| p.port.clone());
            known.unwrap_or_else(|| add_port(&mut s, addr.clone(), None, PortSecurity::None))
        };
        self.join_port(&subsystem, &port)
    }

    /// Brings a connection to this reactor, as if it had come in at `addr`. For simulations.
    ///
    /// # Errors
    /// Nothing listens at `addr`, this is no reactor of the target, or there are too many connections.
    pub fn attach(&self, addr: &ListenAddr, wire: Box<dyn Wire>) -> Result<(), TargetError> {
        let port = self.shared.state().ports.iter().find(|p| p.port.addr == *addr).map(|p| p.port.clone());
        let port =
            port.ok_or_else(|| TargetError::NoListener { nqn: String::new(), addr: addr.to_string() })?;
        let group = Group::here(self.shared.id).ok_or(TargetError::Stopped)?;
        let conn = ConnRef { handle: group.seat.handle.clone(), target: self.shared.id, id: unique() };
        let limit = self.shared.options().max_connections;
        if !self.shared.door.enter(&conn, limit, reactor::now()) {
            return Err(TargetError::WrongState("there are as many connections as there may be"));
        }
        group.load(LOAD_CONNECTION as i32);
        group.adopt(conn.id, wire, port, "memory".into());
        Ok(())
    }

    fn join_port(&self, subsystem: &Arc<Subsystem>, port: &Arc<Port>) -> Result<(), TargetError> {
        let mut t = subsystem.tables();
        if t.listeners.iter().any(|l| Arc::ptr_eq(&l.port, port)) {
            let addr = port.addr.to_string();
            return Err(TargetError::ListenerExists { nqn: subsystem.nqn().into(), addr });
        }
        t.listeners.push(Listener { port: port.clone(), ana: Default::default() });
        drop(t);
        self.shared.discovery_changed();
        Ok(())
    }

    fn bind(
        &self,
        s: &mut State,
        addr: &ListenAddr,
        security: PortSecurity,
    ) -> Result<Arc<Port>, TargetError> {
        let what = || format!("listen on {addr}");
        let hint = |e: &std::io::Error| match e.kind() {
            std::io::ErrorKind::AddrInUse => "stop what listens there, or choose another trsvcid",
            std::io::ErrorKind::AddrNotAvailable => "traddr is no address of this machine",
            std::io::ErrorKind::PermissionDenied => "ports below 1024 need CAP_NET_BIND_SERVICE",
            _ => "",
        };
        let fail = |e: std::io::Error| TargetError::os(what(), &e, hint(&e));
        let socket = TcpListener::bind(addr.socket_addr()).map_err(fail)?;
        socket.set_nonblocking(true).map_err(fail)?;
        let actual = ListenAddr { ip: addr.ip, port: socket.local_addr().map_err(fail)?.port() };
        let key = unique();
        let port = add_port(s, actual, Some(key), security);
        let (id, listening) = (self.shared.id, port.clone());
        let first = self.shared.seats.first().ok_or(TargetError::Stopped)?;
        first.handle.send(move || {
            if let Some(group) = Group::here(id) {
                group.listen(key, socket, listening);
            }
        });
        Ok(port)
    }

    /// Ends a listener; connections of the subsystem that came through it are closed.
    ///
    /// # Errors
    /// Unknown subsystem or listener, or I/O that does not end.
    pub fn remove_listener(&self, nqn: &str, addr: &ListenAddr) -> Result<(), TargetError> {
        let subsystem = self.subsystem(nqn)?;
        let port = {
            let mut t = subsystem.tables();
            let at = t.listeners.iter().position(|l| l.port.addr == *addr);
            let at = at.ok_or_else(|| TargetError::NoListener { nqn: nqn.into(), addr: addr.to_string() })?;
            t.listeners.remove(at).port
        };
        self.close_unused_ports();
        self.shared.discovery_changed();
        self.end_controllers(&subsystem, |c| Arc::ptr_eq(&c.port, &port))
    }

    fn close_unused_ports(&self) {
        let mut s = self.shared.state();
        let ports = |x: &Arc<Subsystem>| x.tables().listeners.iter().map(|l| l.port.id).collect::<Vec<_>>();
        let used: Vec<_> = s.subsystems.iter().flat_map(ports).collect();
        let unused = s.ports.extract_if(.., |p| !used.contains(&p.port.id));
        let keys: Vec<_> = unused.filter_map(|p| p.key).collect();
        drop(s);
        let (id, Some(first)) = (self.shared.id, self.shared.seats.first()) else { return };
        for key in keys {
            first.handle.send(move || {
                if let Some(group) = Group::here(id) {
                    group.unlisten(key);
                }
            });
        }
    }

    /// Sets the ANA state of a group, or of all groups, behind a listener.
    ///
    /// # Errors
    /// Unknown subsystem, listener or group, or a subsystem without ANA reporting.
    pub fn set_ana_state(
        &self,
        nqn: &str,
        addr: &ListenAddr,
        state: AnaState,
        group: Option<u32>,
    ) -> Result<(), TargetError> {
        let subsystem = self.subsystem(nqn)?;
        if !subsystem.options.ana_reporting {
            return Err(TargetError::WrongState("the subsystem was created without ana_reporting"));
        }
        let max = subsystem.max_namespaces();
        if let Some(g) = group.filter(|g| *g == 0 || *g > max) {
            return Err(TargetError::Invalid("anagrpid", format!("{g} is not within 1 to {max}")));
        }
        {
            let mut t = subsystem.tables();
            let listener = t.listeners.iter_mut().find(|l| l.port.addr == *addr);
            let listener = listener
                .ok_or_else(|| TargetError::NoListener { nqn: nqn.into(), addr: addr.to_string() })?;
            match group {
                Some(g) => {
                    listener.ana.insert(g, state);
                }
                None => listener.ana = (1..=max).map(|g| (g, state)).collect(),
            }
        }
        subsystem.ana_changed();
        Ok(())
    }

    /// Moves a namespace to another ANA group.
    ///
    /// # Errors
    /// Unknown subsystem or namespace, group out of range, or a subsystem without ANA reporting.
    pub fn set_ns_ana_group(&self, nqn: &str, nsid: u32, group: u32) -> Result<(), TargetError> {
        let subsystem = self.subsystem(nqn)?;
        if !subsystem.options.ana_reporting {
            return Err(TargetError::WrongState("the subsystem was created without ana_reporting"));
        }
        let max = subsystem.max_namespaces();
        if group == 0 || group > max {
            return Err(TargetError::Invalid("anagrpid", format!("{group} is not within 1 to {max}")));
        }
        subsystem.set_ana_group(Nsid(nsid), group)
    }

    /// Lets a host connect, once it has proven what `access` asks for.
    ///
    /// # Errors
    /// Unknown subsystem, no NQN, in the list already, or keys that make no sense together.
    pub fn add_host(&self, nqn: &str, host: &str, access: HostAccess) -> Result<(), TargetError> {
        let subsystem = self.subsystem(nqn)?;
        Nqn::parse(host).map_err(|reason| TargetError::Nqn { nqn: host.into(), reason })?;
        check_access(&access)?;
        if subsystem.discovery && access.dhchap.is_some() {
            let why = "the discovery subsystem takes no DH-HMAC-CHAP keys";
            return Err(TargetError::Invalid("dhchap_key", why.into()));
        }
        match subsystem.tables().hosts.entry(host.into()) {
            Entry::Occupied(_) => {
                return Err(TargetError::HostExists { nqn: nqn.into(), host: host.into() });
            }
            Entry::Vacant(v) => v.insert(access),
        };
        self.shared.discovery_changed();
        Ok(())
    }

    /// Changes a host's DH-HMAC-CHAP secrets (re-key): they count from the next authentication on.
    ///
    /// # Errors
    /// Unknown subsystem or host, or keys that make no sense together.
    pub fn set_keys(
        &self,
        nqn: &str,
        host: &str,
        dhchap: Option<Named<Secret>>,
        dhchap_ctrlr: Option<Named<Secret>>,
    ) -> Result<(), TargetError> {
        let subsystem = self.subsystem(nqn)?;
        let mut t = subsystem.tables();
        let access = t.hosts.get_mut(host);
        let access = access.ok_or_else(|| TargetError::NoHost { nqn: nqn.into(), host: host.into() })?;
        let fresh = HostAccess { dhchap, dhchap_ctrlr, psk: access.psk.clone() };
        check_access(&fresh)?;
        *access = fresh;
        Ok(())
    }

    /// Sets the hash functions and groups that DH-HMAC-CHAP may use.
    ///
    /// # Errors
    /// One of the lists is empty.
    pub fn set_auth_offer(&self, offer: Offer) -> Result<(), TargetError> {
        for (name, empty) in
            [("dhchap_digests", offer.hashes.is_empty()), ("dhchap_dhgroups", offer.groups.is_empty())]
        {
            if empty {
                return Err(TargetError::Invalid(name, "at least one is needed".into()));
            }
        }
        self.shared.state().offer = offer;
        Ok(())
    }

    /// The hash functions and groups that DH-HMAC-CHAP may use.
    pub fn auth_offer(&self) -> Offer {
        self.shared.offer()
    }

    /// Takes a host out of the list and ends its controllers, unless any host may connect.
    ///
    /// # Errors
    /// Unknown subsystem or host, or I/O that does not end.
    pub fn remove_host(&self, nqn: &str, host: &str) -> Result<(), TargetError> {
        let subsystem = self.subsystem(nqn)?;
        if subsystem.tables().hosts.remove(host).is_none() {
            return Err(TargetError::NoHost { nqn: nqn.into(), host: host.into() });
        }
        self.shared.generated.wipe(nqn, Some(host));
        self.shared.discovery_changed();
        if subsystem.tables().allow_any_host {
            return Ok(());
        }
        self.end_controllers(&subsystem, |c| c.host.nqn == host)
    }

    /// Lets any host connect, or only those of the list. Existing connections stay.
    ///
    /// # Errors
    /// Unknown subsystem.
    pub fn allow_any_host(&self, nqn: &str, allow: bool) -> Result<(), TargetError> {
        self.subsystem(nqn)?.tables().allow_any_host = allow;
        self.shared.discovery_changed();
        Ok(())
    }

    /// All subsystems, the discovery subsystem first.
    pub fn subsystems(&self) -> Vec<SubsystemInfo> {
        let all = self.shared.state().subsystems.clone();
        all.iter().map(|s| describe(s)).collect()
    }

    /// Memory that is set aside for the data of hosts' commands now, bytes.
    pub fn buffer_bytes(&self) -> u64 {
        self.shared.hosts.used()
    }

    /// Connections, and what became of those that were too many.
    pub fn door(&self) -> DoorInfo {
        self.shared.door.info()
    }

    /// Keys for TLS that DH-HMAC-CHAP has generated and that are not wiped yet.
    pub fn generated_keys(&self) -> usize {
        self.shared.generated.count()
    }

    /// Listeners of a subsystem.
    ///
    /// # Errors
    /// Unknown subsystem.
    pub fn listeners(&self, nqn: &str) -> Result<Vec<ListenerInfo>, TargetError> {
        Ok(describe(self.subsystem(nqn)?.as_ref()).listeners)
    }

    /// Controllers of a subsystem.
    ///
    /// # Errors
    /// Unknown subsystem.
    pub fn controllers(&self, nqn: &str) -> Result<Vec<ControllerInfo>, TargetError> {
        let controllers = self.subsystem(nqn)?.controllers();
        let describe = |c: &Arc<Controller>| ControllerInfo {
            cntlid: c.cntlid.0,
            hostnqn: c.host.nqn.clone(),
            hostid: Uuid::from_bytes(c.host.id),
            num_io_qpairs: c.queues().iter().filter(|q| !q.0.is_admin()).count() as u32,
            kato_ms: c.kato_ms(),
            keep_alive_age: c.keep_alive_age(),
            totals: c.totals(),
        };
        Ok(controllers.iter().map(describe).collect())
    }

    /// Queues of a subsystem's controllers.
    ///
    /// # Errors
    /// Unknown subsystem.
    pub fn qpairs(&self, nqn: &str) -> Result<Vec<QpairInfo>, TargetError> {
        let mut all = Vec::new();
        for c in self.subsystem(nqn)?.controllers() {
            all.extend(c.queues().into_iter().map(|(qid, q)| QpairInfo {
                cntlid: c.cntlid.0,
                qid: qid.0,
                hostnqn: c.host.nqn.clone(),
                listen_address: c.port.addr.clone(),
                peer_address: q.peer,
                depth: q.size,
                reactor: q.conn.handle.id().0,
                totals: q.stats.totals(),
                auth: q.stats.auth(),
                tls: q.tls,
            }));
        }
        Ok(all)
    }

    /// What each reactor has done and does.
    pub fn stats(&self) -> Vec<PollGroupStats> {
        let subsystems = self.shared.state().subsystems.clone();
        let queues: Vec<_> =
            subsystems.iter().flat_map(|s| s.controllers()).flat_map(|c| c.queues()).collect();
        let one = |seat: &Arc<Seat>| {
            let mine = || queues.iter().filter(|q| q.1.conn.handle == seat.handle);
            let totals = mine().fold(*locked(&seat.past), |sum: Totals, q| sum + q.1.stats.totals());
            let current_admin_qpairs = mine().filter(|q| q.0.is_admin()).count() as u64;
            PollGroupStats {
                name: format!("nvmf_tgt_poll_group_{:03}", seat.handle.id().0),
                reactor: seat.handle.id().0,
                admin_qpairs: seat.admin_qpairs.load(Ordering::Relaxed),
                io_qpairs: seat.io_qpairs.load(Ordering::Relaxed),
                current_admin_qpairs,
                current_io_qpairs: mine().count() as u64 - current_admin_qpairs,
                completed_nvme_io: totals.reads + totals.writes + totals.other,
            }
        };
        self.shared.seats.iter().map(one).collect()
    }

    /// Sets which listeners the discovery log names.
    pub fn set_config(&self, filter: DiscoveryFilter) {
        self.shared.state().filter = filter;
        self.shared.discovery_changed();
    }

    /// The discovery filter.
    pub fn config(&self) -> DiscoveryFilter {
        self.shared.state().filter
    }

    /// Names another discovery service in the discovery log.
    ///
    /// # Errors
    /// No NQN, or named already.
    pub fn add_referral(&self, referral: Referral) -> Result<(), TargetError> {
        let reason = Nqn::parse(&referral.subnqn).err();
        if let Some(reason) = reason {
            return Err(TargetError::Nqn { nqn: referral.subnqn, reason });
        }
        let mut s = self.running()?;
        if s.referrals.iter().any(|r| r.addr == referral.addr && r.subnqn == referral.subnqn) {
            return Err(TargetError::ReferralExists(referral.addr.to_string()));
        }
        s.referrals.push(referral);
        drop(s);
        self.shared.discovery_changed();
        Ok(())
    }

    /// Takes a referral out of the discovery log.
    ///
    /// # Errors
    /// There is none of that address and name.
    pub fn remove_referral(&self, addr: &ListenAddr, subnqn: &str) -> Result<(), TargetError> {
        {
            let mut s = self.running()?;
            let at = s.referrals.iter().position(|r| r.addr == *addr && r.subnqn == subnqn);
            s.referrals.remove(at.ok_or_else(|| TargetError::NoReferral(addr.to_string()))?);
        }
        self.shared.discovery_changed();
        Ok(())
    }

    /// The referrals, in the order they were added.
    pub fn referrals(&self) -> Vec<Referral> {
        self.shared.state().referrals.clone()
    }

    /// Sets how many subsystems there may be, the discovery subsystem included.
    ///
    /// # Errors
    /// Fewer than there are.
    pub fn set_max_subsystems(&self, max: u32) -> Result<(), TargetError> {
        let mut s = self.running()?;
        if (max as usize) < s.subsystems.len() {
            let why = format!("there are {} subsystems already", s.subsystems.len());
            return Err(TargetError::Invalid("max_subsystems", why));
        }
        s.max_subsystems = max;
        Ok(())
    }

    /// Subsystems at most.
    pub fn max_subsystems(&self) -> u32 {
        self.shared.state().max_subsystems
    }

    /// Sets the command retry delays that controllers report, units of 100 ms.
    pub fn set_crdt(&self, crdt: [u16; 3]) {
        self.shared.state().crdt = crdt;
    }

    /// The command retry delays, units of 100 ms.
    pub fn crdt(&self) -> [u16; 3] {
        self.shared.crdt()
    }

    /// Ends everything: no new connections, controllers closed, I/O waited for, devices let go.
    ///
    /// # Errors
    /// I/O that does not end; the rest has ended nevertheless.
    pub fn stop(&self) -> Result<(), TargetError> {
        let subsystems = {
            let mut s = self.shared.state();
            if std::mem::replace(&mut s.stopped, true) {
                return Ok(());
            }
            s.subsystems.clone()
        };
        subsystems.iter().for_each(|s| s.tables().deleted = true);
        let mut result = Ok(());
        for s in &subsystems {
            if !s.discovery {
                result = result.and(self.delete_subsystem(s.nqn()));
            } else {
                result = result.and(self.end_controllers(s, |_| true));
            }
        }
        let id = self.shared.id;
        for seat in &self.shared.seats {
            // In the simulator nobody can wait; there the message does it.
            if seat.handle.block_on(move || async move { Group::stop(id) }).is_err() {
                seat.handle.send(move || Group::stop(id));
            }
        }
        result
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            tracing::error!("while stopping the target: {e}");
        }
    }
}

fn add_port(s: &mut State, addr: ListenAddr, key: Option<u64>, security: PortSecurity) -> Arc<Port> {
    let port = Arc::new(Port { id: s.next_port, addr, security });
    s.next_port = s.next_port.wrapping_add(1);
    s.ports.push(Listening { port: port.clone(), key });
    port
}

fn referral_entry(r: &Referral, asqsz: u16) -> Option<DiscoveryEntry> {
    let family = if r.addr.ip.is_ipv4() { AddressFamily::Ipv4 } else { AddressFamily::Ipv6 };
    let (traddr, trsvcid) = (r.addr.ip.to_string(), r.addr.port.to_string());
    let name = Nqn::parse(&r.subnqn).ok()?;
    let mut entry = DiscoveryEntry::tcp(SubsystemType::Referral, family, &traddr, &trsvcid, 0, name)?;
    entry.asqsz = asqsz.into();
    if r.secure_channel {
        entry.treq = treq::SECURE_REQUIRED;
        entry.tsas[0] = sectype::TLS13;
    }
    Some(entry)
}

fn check_access(access: &HostAccess) -> Result<(), TargetError> {
    if access.dhchap.is_none() && access.dhchap_ctrlr.is_some() {
        return Err(TargetError::Invalid("dhchap_ctrlr_key", "dhchap_key is needed too".into()));
    }
    Ok(())
}

fn check_subsystem(o: &SubsystemOptions) -> Result<(), TargetError> {
    Nqn::parse(&o.nqn).map_err(|reason| TargetError::Nqn { nqn: o.nqn.clone(), reason })?;
    let text = |name, value: &str, max: usize| {
        let printable = value.bytes().all(|b| (b' '..=b'~').contains(&b));
        if value.len() <= max && printable {
            return Ok(());
        }
        Err(TargetError::Invalid(name, format!("\"{value}\" is not up to {max} printable ASCII characters")))
    };
    text("serial_number", &o.serial_number, 20)?;
    text("model_number", &o.model_number, 40)?;
    if o.min_cntlid == 0 || o.min_cntlid > o.max_cntlid || o.max_cntlid > Cntlid::MAX.0 {
        let why = format!("{} to {} is no range within 1 to {}", o.min_cntlid, o.max_cntlid, Cntlid::MAX.0);
        return Err(TargetError::Invalid("min_cntlid", why));
    }
    if o.max_namespaces > 65_536 {
        return Err(TargetError::Invalid("max_namespaces", "more than 65536".into()));
    }
    Ok(())
}

fn describe(s: &Subsystem) -> SubsystemInfo {
    let t = s.tables();
    let groups: Vec<u32> = (1..=s.max_namespaces()).collect();
    let listener = |l: &Listener| ListenerInfo {
        addr: l.port.addr.clone(),
        ana_states: groups
            .iter()
            .map(|g| (*g, l.ana.get(g).copied().unwrap_or(AnaState::Optimized)))
            .collect(),
        security: l.port.security,
    };
    let host = |(nqn, a): (&String, &HostAccess)| HostInfo {
        nqn: nqn.clone(),
        dhchap_key: a.dhchap.as_ref().map(|k| k.name.clone()),
        dhchap_ctrlr_key: a.dhchap_ctrlr.as_ref().map(|k| k.name.clone()),
        psk: a.psk.as_ref().map(|k| k.name.clone()),
    };
    let namespace = |n: &Arc<crate::Namespace>| NsInfo {
        nsid: n.nsid.0,
        bdev_name: n.bdev().name().into(),
        nguid: n.nguid,
        eui64: n.eui64,
        uuid: n.uuid,
        anagrpid: n.anagrpid(),
        ptpl_file: n.reservations.file().map(|f| f.path().display().to_string()),
        visible_to: t.visible_to.get(&n.nsid.0).map(|hosts| hosts.iter().cloned().collect()),
    };
    SubsystemInfo {
        options: SubsystemOptions { allow_any_host: t.allow_any_host, ..s.options.clone() },
        discovery: s.discovery,
        listeners: t.listeners.iter().map(listener).collect(),
        hosts: t.hosts.iter().map(host).collect(),
        namespaces: t.namespaces.values().map(namespace).collect(),
    }
}

impl Seat {
    fn new(handle: Handle) -> Seat {
        Seat {
            handle,
            load: AtomicU32::new(0),
            admin_qpairs: AtomicU64::new(0),
            io_qpairs: AtomicU64::new(0),
            past: Mutex::new(Totals::default()),
        }
    }
}
