//! A controller by name: its links, and its namespaces as devices. Shared by all cores; no I/O passes here.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use cryptfold_bdev::{BdevError, Device, DeviceInfo, Op, Queue, Registry};
use cryptfold_nvmf_initiator::{AnaState, NamespaceInfo};
use cryptfold_nvmf_spec::Nsid;
use cryptfold_reactor::{self as reactor, Handle, Nanos};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::link::{Link, Phase, Up};
use crate::local::{self, Local};
use crate::options::{Multipath, Recovery};
use crate::signal;

/// I/O waits so long for a namespace to become accessible while paths to it are connected.
const ACCESS_WAIT: Duration = Duration::from_secs(30);
/// A namespace that comes back as another one waits so often, and so long each time, for its name.
const NAME_TRIES: usize = 300;
const NAME_WAIT: Duration = Duration::from_millis(100);

pub(crate) fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module.
pub(crate) struct Remote {
    pub id: u64,
    pub name: String,
    pub subnqn: String,
    pub multipath: Multipath,
    pub recovery: Recovery,
    pub retries: u32,
    max_bdevs: usize,
    pub registry: Arc<Registry>,
    me: Weak<Remote>,
    links: Mutex<Vec<Arc<Link>>>,
    namespaces: Mutex<BTreeMap<Nsid, Arc<Namespace>>>,
    /// Reactors that have a [`Local`].
    locals: Mutex<Vec<Handle>>,
    /// I/O does not wait for lost paths any more.
    ending: AtomicBool,
    /// Called when the last link is gone by itself.
    on_end: Box<dyn Fn(&str) + Send + Sync>,
}

impl Remote {
    pub fn new(
        o: &crate::AttachOptions,
        registry: Arc<Registry>,
        on_end: Box<dyn Fn(&str) + Send + Sync>,
    ) -> Arc<Remote> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new_cyclic(|me| Remote {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            name: o.name.clone(),
            subnqn: o.connect.subnqn.clone(),
            multipath: o.multipath,
            recovery: o.recovery,
            retries: o.retries,
            max_bdevs: o.max_bdevs,
            registry,
            me: me.clone(),
            links: Mutex::default(),
            namespaces: Mutex::default(),
            locals: Mutex::default(),
            ending: AtomicBool::new(false),
            on_end,
        })
    }

    pub fn links(&self) -> Vec<Arc<Link>> {
        locked(&self.links).clone()
    }

    pub fn add_link(&self, link: Arc<Link>) {
        locked(&self.links).push(link);
    }

    /// A link is over. With the last one the devices go too.
    pub fn forget_link(&self, link: &Arc<Link>) {
        let last = {
            let mut links = locked(&self.links);
            links.retain(|l| !Arc::ptr_eq(l, link));
            links.is_empty()
        };
        if last {
            self.remove_namespaces();
            (self.on_end)(&self.name);
            self.end();
        } else {
            self.publish();
        }
    }

    /// Devices' names, by namespace.
    pub fn bdev_names(&self) -> Vec<String> {
        locked(&self.namespaces).values().map(|n| n.info.name.clone()).collect()
    }

    /// Takes the devices off the registry, which goes on without waiting; what waits for a path fails.
    pub fn remove_namespaces(&self) -> Vec<cryptfold_bdev::Removal> {
        let all = std::mem::take(&mut *locked(&self.namespaces));
        let removed = all.values().filter_map(|n| n.remove(&self.registry)).collect();
        self.publish();
        removed
    }

    /// Tells all reactors that links or namespaces have changed.
    pub fn publish(&self) {
        let id = self.id;
        for handle in locked(&self.locals).iter() {
            handle.send(move || local::refresh(id));
        }
    }

    /// A reactor wants to be told.
    pub fn tell(&self, handle: Handle) {
        locked(&self.locals).push(handle);
    }

    /// From now on I/O that finds no path fails; what waits for one fails too.
    pub fn hurry(&self) {
        self.ending.store(true, Ordering::Relaxed);
        self.publish();
    }

    /// Takes the reactors' connections down.
    pub fn end(&self) {
        let id = self.id;
        for handle in locked(&self.locals).drain(..) {
            handle.send(move || local::forget(id));
        }
    }

    /// Whether waiting for a path to a namespace makes sense for an I/O that waits since `since`.
    pub fn may_wait(&self, nsid: Nsid, since: Nanos) -> bool {
        let now = reactor::now();
        let within = |from: Nanos, limit: Duration| now.0.saturating_sub(from.0) < limit.as_nanos() as u64;
        let fast = self.recovery.fast_io_fail;
        let ending = self.ending.load(Ordering::Relaxed);
        self.links().iter().any(|link| match link.phase() {
            Phase::Up(up) => match up.namespaces.get(&nsid).map(|p| p.ana) {
                // A core's connection is being opened, or that fails and the link is lost.
                Some(AnaState::Optimized | AnaState::NonOptimized) => true,
                Some(AnaState::PersistentLoss) | None => false,
                Some(_) => within(since.max(up.since), fast.unwrap_or(ACCESS_WAIT)),
            },
            Phase::Down { .. } | Phase::Connecting if ending => false,
            Phase::Down { since } => fast.is_none_or(|limit| within(since, limit)),
            Phase::Connecting => true,
            Phase::Failed | Phase::Ended => false,
        })
    }

    /// Brings the devices in line with what a link has just seen. Returns the namespaces that can be used over it.
    pub fn reconcile(&self, link: &Arc<Link>, seen: Vec<NamespaceInfo>) -> Vec<NamespaceInfo> {
        let elsewhere: Vec<Arc<Up>> =
            self.links().iter().filter(|l| !Arc::ptr_eq(l, link)).filter_map(|l| l.up()).collect();
        let mut usable = Vec::new();
        let mut namespaces = locked(&self.namespaces);
        let shared = |nsid: &Nsid| elsewhere.iter().any(|up| up.namespaces.contains_key(nsid));
        let is_gone = |nsid: &Nsid, ns: &Arc<Namespace>| {
            let here = seen.iter().find(|i| i.nsid == *nsid);
            !here.is_some_and(|i| ns.is(i)) && !shared(nsid)
        };
        let gone: Vec<Nsid> =
            namespaces.iter().filter(|(id, ns)| is_gone(id, ns)).map(|(id, _)| *id).collect();
        for nsid in gone {
            if let Some(ns) = namespaces.remove(&nsid) {
                tracing::info!(bdev = ns.info.name, "the remote namespace is gone");
                drop(ns.remove(&self.registry));
            }
        }
        for info in seen {
            match namespaces.get(&info.nsid) {
                Some(ns) if ns.is(&info) => {
                    if let Ok(bdev) = self.registry.get(&ns.info.name) {
                        bdev.set_blocks(info.blocks);
                        bdev.set_read_only(info.read_only);
                    }
                    usable.push(info);
                }
                Some(ns) => {
                    tracing::warn!(
                        bdev = ns.info.name,
                        path = link.address().text(),
                        "another namespace has its number there; not used"
                    );
                }
                None => match self.add(&info, namespaces.len()) {
                    Ok(ns) => {
                        namespaces.insert(info.nsid, ns);
                        usable.push(info);
                    }
                    Err(e) => {
                        let name = self.bdev_name(info.nsid);
                        tracing::warn!(bdev = name, error = %e, "the remote namespace gets no device");
                        if self.registry.get(&name).is_ok_and(|b| b.is_removing()) {
                            look_again(self.registry.clone(), name, link.clone());
                        }
                    }
                },
            }
        }
        usable
    }

    fn bdev_name(&self, nsid: Nsid) -> String {
        format!("{}n{nsid}", self.name)
    }

    fn add(&self, info: &NamespaceInfo, count: usize) -> Result<Arc<Namespace>, BdevError> {
        if count >= self.max_bdevs {
            return Err(BdevError::NoResources(format!("max_bdevs is {}", self.max_bdevs)));
        }
        let me = self.me.upgrade().ok_or_else(|| BdevError::Removing(self.name.clone()))?;
        let mut device =
            DeviceInfo::new(self.bdev_name(info.nsid), "NVMe disk", info.block_bytes, info.blocks);
        device.uuid = info.uuid.unwrap_or(match info.nguid {
            none if none == [0; 16] => device.uuid,
            nguid => Uuid::from_bytes(nguid),
        });
        device.ops = info.ops.with(Op::Reset);
        device.write_cache = info.write_cache;
        device.atomic_blocks = info.atomic_blocks;
        device.read_only = info.read_only;
        let ns = Arc::new(Namespace {
            info: device,
            nsid: info.nsid,
            identity: identity(info),
            remote: me,
            gone: AtomicBool::new(false),
        });
        self.registry.register(ns.clone())?;
        tracing::info!(bdev = ns.info.name, blocks = info.blocks, "remote namespace");
        Ok(ns)
    }
}

/// Asks the link to look again when a name is free: its old owner is still being let go.
fn look_again(registry: Arc<Registry>, name: String, link: Arc<Link>) {
    reactor::spawn_local(async move {
        for _ in 0..NAME_TRIES {
            reactor::sleep(NAME_WAIT).await;
            if registry.get(&name).is_err() {
                return link.signal.raise(signal::CHANGED);
            }
        }
        tracing::warn!(
            bdev = name,
            "its name does not get free; the remote namespace stays without a device"
        );
    })
    .detach();
}

/// What stays the same while a namespace is the same: identifiers and the size of its blocks.
type Identity = (Option<Uuid>, [u8; 16], [u8; 8], u32);

fn identity(info: &NamespaceInfo) -> Identity {
    (info.uuid, info.nguid, info.eui64, info.block_bytes)
}

/// A namespace as a device.
pub(crate) struct Namespace {
    pub info: DeviceInfo,
    pub nsid: Nsid,
    identity: Identity,
    pub remote: Arc<Remote>,
    gone: AtomicBool,
}

impl Namespace {
    fn is(&self, info: &NamespaceInfo) -> bool {
        self.identity == identity(info)
    }

    /// I/O for it does not wait any more.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    fn remove(&self, registry: &Registry) -> Option<cryptfold_bdev::Removal> {
        self.gone.store(true, Ordering::Relaxed);
        registry.unregister(&self.info.name).ok()
    }
}

impl Device for Namespace {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        let local = Local::here(&self.remote);
        Ok(local.queue(self))
    }

    fn driver_specific(&self) -> Value {
        let links = self.remote.links();
        let one = |link: &Arc<Link>| {
            let up = link.up();
            let ana = up.as_ref().and_then(|u| u.namespaces.get(&self.nsid)).map(|p| format!("{:?}", p.ana));
            json!({
                "trid": link.address().json(),
                "ctrlr_data": {"cntlid": up.as_ref().map(|u| u.cntlid), "state": link.phase().word(),
                    "multi_ctrlr": true, "ana_reporting": up.as_ref().is_some_and(|u| u.reports_ana)},
                "ns_data": {"id": self.nsid.0, "can_share": true, "ana_state": ana},
            })
        };
        json!({"nvme": links.iter().map(one).collect::<Vec<_>>(), "mp_policy": "active_passive"})
    }
}
