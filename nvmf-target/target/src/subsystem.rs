//! Subsystems: their namespaces, hosts, listeners and controllers. Shared by all reactors and by control threads.
//!
//! The tables are behind one mutex that is taken for set-up, admin commands and control requests, never per I/O: a
//! connection keeps the namespaces it uses, and looks again when `generation` has moved.
//!
//! Lock order: target, subsystem, controller. Nothing blocks while one of them is held.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cryptfold_bdev::{Access, Bdev, BdevEvent, Channel, Descriptor, Op, Registry};
use cryptfold_nvmf_spec::log::AnaState;
use cryptfold_nvmf_spec::{Cntlid, Nsid};
use uuid::Uuid;

use crate::access::HostAccess;
use crate::controller::Controller;
use crate::controller::events::EventKind;
use crate::io::Geometry;
use crate::port::Port;
use crate::reservation::{Reservations, StateFile};
use crate::{NsOptions, SubsystemOptions, TargetError};

/// Takes a lock whose holder panicked as it is: tables are changed in single steps.
pub(crate) fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number that no two objects of the process share.
pub(crate) fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A namespace: a device under an identifier.
pub struct Namespace {
    /// Identifier in its subsystem.
    pub nsid: Nsid,
    /// Unique in the process.
    pub(crate) uid: u64,
    descriptor: Arc<Descriptor>,
    /// NGUID.
    pub nguid: [u8; 16],
    /// EUI64; zeros if there is none.
    pub eui64: [u8; 8],
    /// UUID.
    pub uuid: Uuid,
    anagrpid: AtomicU32,
    /// Reservations and write protection.
    pub(crate) reservations: Reservations,
}

impl Namespace {
    /// ANA group.
    pub fn anagrpid(&self) -> u32 {
        self.anagrpid.load(Ordering::Relaxed)
    }

    /// Whether changes are refused, by the device or because a host wanted it.
    pub fn is_protected(&self) -> bool {
        self.bdev().is_read_only() || self.reservations.is_protected()
    }

    /// The device.
    pub fn bdev(&self) -> &Arc<Bdev> {
        self.descriptor.bdev()
    }

    /// What commands are checked against, now.
    pub fn geometry(&self) -> Geometry {
        let (bdev, info) = (self.bdev(), self.bdev().info());
        let can_deallocate = info.ops.has(Op::Unmap);
        Geometry {
            block_bytes: bdev.block_size_bytes(),
            blocks: bdev.blocks(),
            deallocate_zeroes: can_deallocate && info.reports_unmapped,
            can_deallocate,
            can_uncorrectable: info.ops.has(Op::WriteUncorrectable),
        }
    }
}

/// A namespace as one reactor uses it.
pub struct NsChannel {
    /// The namespace.
    pub ns: Arc<Namespace>,
    /// Where I/O goes.
    pub channel: Channel,
}

impl NsChannel {
    pub(crate) fn open(ns: Arc<Namespace>) -> Result<NsChannel, cryptfold_bdev::BdevError> {
        let channel = ns.descriptor.channel()?;
        Ok(NsChannel { ns, channel })
    }
}

/// A port as a subsystem uses it.
pub(crate) struct Listener {
    pub port: Arc<Port>,
    /// By ANA group; groups that are not here are optimized.
    pub ana: BTreeMap<u32, AnaState>,
}

#[derive(Default)]
pub(crate) struct Tables {
    pub namespaces: BTreeMap<u32, Arc<Namespace>>,
    /// Namespaces that only these hosts see; the others are seen by all.
    pub visible_to: BTreeMap<u32, BTreeSet<String>>,
    /// Hosts that may connect, and what they have to prove.
    pub hosts: BTreeMap<String, HostAccess>,
    pub allow_any_host: bool,
    pub listeners: Vec<Listener>,
    pub controllers: BTreeMap<u16, Arc<Controller>>,
    last_cntlid: u16,
    /// No new controllers or namespaces.
    pub deleted: bool,
    /// Counts changes of ANA states.
    pub ana_changes: u64,
}

impl Tables {
    /// Whether this host may connect.
    pub fn allows(&self, hostnqn: &str) -> bool {
        !self.deleted && (self.allow_any_host || self.hosts.contains_key(hostnqn))
    }

    /// Whether a namespace exists for this host.
    fn shows(&self, nsid: u32, hostnqn: &str) -> bool {
        self.visible_to.get(&nsid).is_none_or(|hosts| hosts.contains(hostnqn))
    }
}

/// A subsystem.
pub struct Subsystem {
    /// As created.
    pub options: SubsystemOptions,
    /// Whether it is the discovery subsystem.
    pub discovery: bool,
    /// Moves when a namespace comes or goes, or an ANA state changes.
    pub(crate) generation: AtomicU64,
    pub(crate) tables: Mutex<Tables>,
}

impl Subsystem {
    pub(crate) fn new(options: SubsystemOptions, discovery: bool) -> Arc<Subsystem> {
        let tables = Tables { allow_any_host: options.allow_any_host, ..Default::default() };
        Arc::new(Subsystem { options, discovery, generation: AtomicU64::new(1), tables: Mutex::new(tables) })
    }

    /// Its name.
    pub fn nqn(&self) -> &str {
        &self.options.nqn
    }

    pub(crate) fn tables(&self) -> MutexGuard<'_, Tables> {
        locked(&self.tables)
    }

    /// Number of namespace identifiers (NN).
    pub fn max_namespaces(&self) -> u32 {
        if self.options.max_namespaces == 0 { 32 } else { self.options.max_namespaces }
    }

    /// Whether this host may connect through this port.
    pub(crate) fn admits(&self, hostnqn: &str, port: &Arc<Port>) -> bool {
        let t = self.tables();
        let listens = self.discovery || t.listeners.iter().any(|l| Arc::ptr_eq(&l.port, port));
        listens && t.allows(hostnqn)
    }

    /// What this host has to prove now.
    pub(crate) fn access(&self, hostnqn: &str) -> HostAccess {
        self.tables().hosts.get(hostnqn).cloned().unwrap_or_default()
    }

    /// The namespace with this identifier, if this host may see it.
    pub(crate) fn namespace(&self, nsid: Nsid, hostnqn: &str) -> Option<Arc<Namespace>> {
        let t = self.tables();
        t.namespaces.get(&nsid.0).filter(|_| t.shows(nsid.0, hostnqn)).cloned()
    }

    /// All namespaces that this host may see, by identifier.
    pub(crate) fn namespaces(&self, hostnqn: &str) -> Vec<Arc<Namespace>> {
        let t = self.tables();
        t.namespaces.iter().filter(|(n, _)| t.shows(**n, hostnqn)).map(|(_, ns)| ns.clone()).collect()
    }

    /// Identifiers of all namespaces, seen or not.
    pub(crate) fn nsids(&self) -> Vec<Nsid> {
        self.tables().namespaces.keys().map(|n| Nsid(*n)).collect()
    }

    /// Shows a namespace to a host, or hides it; its controllers are told. Only for namespaces that were added with
    /// `no_auto_visible`.
    pub(crate) fn set_visible(&self, nsid: Nsid, hostnqn: &str, visible: bool) -> Result<(), TargetError> {
        let nqn = || self.nqn().to_owned();
        {
            let mut t = self.tables();
            if !t.namespaces.contains_key(&nsid.0) {
                return Err(TargetError::NoNamespace { nqn: nqn(), nsid: nsid.0 });
            }
            let hosts = t.visible_to.get_mut(&nsid.0);
            let hosts = hosts.ok_or(TargetError::AutoVisible { nqn: nqn(), nsid: nsid.0 })?;
            let changed = if visible { hosts.insert(hostnqn.into()) } else { hosts.remove(hostnqn) };
            if !changed {
                return Ok(());
            }
        }
        self.generation.fetch_add(1, Ordering::Release);
        for c in self.controllers().iter().filter(|c| c.host.nqn == hostnqn) {
            c.namespace_changed(nsid);
        }
        if !visible {
            self.purge_channels();
        }
        Ok(())
    }

    /// State of an ANA group behind a port.
    pub(crate) fn ana_state(&self, port: &Arc<Port>, group: u32) -> AnaState {
        let t = self.tables();
        let listener = t.listeners.iter().find(|l| Arc::ptr_eq(&l.port, port));
        listener.and_then(|l| l.ana.get(&group).copied()).unwrap_or(AnaState::Optimized)
    }

    /// Adds a device as a namespace.
    pub(crate) fn add_ns(self: &Arc<Self>, registry: &Registry, o: &NsOptions) -> Result<Nsid, TargetError> {
        let nqn = || self.nqn().to_owned();
        let max = self.max_namespaces();
        let uid = unique();
        let me: Weak<Subsystem> = Arc::downgrade(self);
        let on_event = move |event| {
            if let Some(s) = me.upgrade() {
                s.bdev_event(uid, event);
            }
        };
        let mut t = self.tables();
        let nsid = match o.nsid {
            Some(n) if n == 0 || n > max => {
                return Err(TargetError::Invalid("nsid", format!("{n} is not within 1 to {max}")));
            }
            Some(n) if t.namespaces.contains_key(&n) => {
                return Err(TargetError::NsidInUse { nqn: nqn(), nsid: n });
            }
            Some(n) => n,
            None => (1..=max)
                .find(|n| !t.namespaces.contains_key(n))
                .ok_or_else(|| TargetError::TooManyNamespaces { nqn: nqn(), max })?,
        };
        if t.deleted || self.discovery {
            return Err(TargetError::WrongState("the subsystem takes no namespaces"));
        }
        let anagrpid = o.anagrpid.unwrap_or(nsid);
        if anagrpid == 0 || anagrpid > max {
            return Err(TargetError::Invalid("anagrpid", format!("{anagrpid} is not within 1 to {max}")));
        }
        let descriptor = registry.open(&o.bdev_name, Access::ReadWrite, on_event)?;
        descriptor.claim(crate::info::CLAIM)?;
        let device = descriptor.bdev().info().uuid;
        let uuid = o.uuid.unwrap_or(device);
        let file = o.ptpl_file.as_deref().map(|f| StateFile::open(f, device)).transpose()?;
        let ns = Namespace {
            nsid: Nsid(nsid),
            uid,
            descriptor,
            nguid: o.nguid.unwrap_or(*uuid.as_bytes()),
            eui64: o.eui64.unwrap_or_default(),
            uuid,
            anagrpid: AtomicU32::new(anagrpid),
            reservations: Reservations::new(file),
        };
        t.namespaces.insert(nsid, Arc::new(ns));
        if o.no_auto_visible {
            t.visible_to.insert(nsid, BTreeSet::new());
        }
        self.generation.fetch_add(1, Ordering::Release);
        drop(t);
        self.namespace_changed(Nsid(nsid));
        Ok(Nsid(nsid))
    }

    /// Takes a namespace out; returns a way to see when nobody uses its device any more.
    pub(crate) fn remove_ns(&self, nsid: Nsid) -> Result<Weak<Descriptor>, TargetError> {
        let (removed, seen_by) = {
            let mut t = self.tables();
            (t.namespaces.remove(&nsid.0), t.visible_to.remove(&nsid.0))
        };
        let ns =
            removed.ok_or_else(|| TargetError::NoNamespace { nqn: self.nqn().to_owned(), nsid: nsid.0 })?;
        self.generation.fetch_add(1, Ordering::Release);
        let device = Arc::downgrade(&ns.descriptor);
        drop(ns);
        for c in self.controllers() {
            if seen_by.as_ref().is_none_or(|hosts| hosts.contains(&c.host.nqn)) {
                c.namespace_changed(nsid);
            }
        }
        self.purge_channels();
        Ok(device)
    }

    /// Any thread; does not block.
    fn bdev_event(&self, uid: u64, event: BdevEvent) {
        let nsid = self.tables().namespaces.values().find(|n| n.uid == uid).map(|n| n.nsid);
        let Some(nsid) = nsid else { return };
        match event {
            BdevEvent::Removed => {
                tracing::info!("{}: the device of namespace {nsid} is removed", self.nqn());
                // An error means that somebody else was faster.
                let _ = self.remove_ns(nsid);
            }
            BdevEvent::Resized { .. } => self.namespace_changed(nsid),
        }
    }

    pub(crate) fn namespace_changed(&self, nsid: Nsid) {
        let told: Vec<_> = {
            let t = self.tables();
            t.controllers.values().filter(|c| t.shows(nsid.0, &c.host.nqn)).cloned().collect()
        };
        told.iter().for_each(|c| c.namespace_changed(nsid));
    }

    /// Tells all connections to let go of channels that are not current any more.
    fn purge_channels(&self) {
        for c in self.controllers() {
            for q in c.connections() {
                q.send(|conn| conn.refresh_namespaces());
            }
        }
    }

    /// Moves a namespace to another ANA group; its hosts are told of both the change of the namespace and of the groups.
    pub(crate) fn set_ana_group(&self, nsid: Nsid, group: u32) -> Result<(), TargetError> {
        let ns = self.tables().namespaces.get(&nsid.0).cloned();
        let ns = ns.ok_or_else(|| TargetError::NoNamespace { nqn: self.nqn().to_owned(), nsid: nsid.0 })?;
        if ns.anagrpid.swap(group, Ordering::Relaxed) != group {
            self.namespace_changed(nsid);
            self.ana_changed();
        }
        Ok(())
    }

    /// Percent of space left behind the namespaces that a host sees: the least of them; 100 if none can run out.
    pub(crate) fn free_percent(&self, hostnqn: &str) -> u8 {
        let spaces = self.namespaces(hostnqn);
        let spaces = spaces.iter().filter_map(|n| n.bdev().device().space());
        spaces.map(|s| s.free_percent()).min().unwrap_or(100)
    }

    /// Tells controllers of an ANA change.
    pub(crate) fn ana_changed(&self) {
        self.tables().ana_changes += 1;
        self.generation.fetch_add(1, Ordering::Release);
        for c in self.controllers() {
            c.raise(EventKind::AnaChange);
        }
    }

    /// All controllers, by identifier.
    pub(crate) fn controllers(&self) -> Vec<Arc<Controller>> {
        self.tables().controllers.values().cloned().collect()
    }

    /// A free controller identifier, and the controller that `make` builds for it, both entered at once; nothing if the
    /// host is not (or no longer) allowed.
    pub(crate) fn add_controller(
        &self,
        hostnqn: &str,
        make: impl FnOnce(Cntlid) -> Arc<Controller>,
    ) -> Option<Arc<Controller>> {
        let mut t = self.tables();
        let (min, max) = (self.options.min_cntlid.max(1), self.options.max_cntlid.min(Cntlid::MAX.0));
        if !t.allows(hostnqn) {
            return None;
        }
        // After the last one: an identifier is not reused while an old controller may still be remembered.
        let after = t.last_cntlid.max(min - 1);
        let free = |n: &u16| !t.controllers.contains_key(n);
        let id = (after.saturating_add(1)..=max).find(free).or_else(|| (min..=max).find(free))?;
        t.last_cntlid = id;
        let controller = make(Cntlid(id));
        t.controllers.insert(id, controller.clone());
        Some(controller)
    }

    pub(crate) fn remove_controller(&self, cntlid: Cntlid) {
        self.tables().controllers.remove(&cntlid.0);
    }
}
