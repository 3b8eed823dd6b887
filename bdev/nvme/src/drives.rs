//! All PCIe drives of the process by name, for control calls: from ordinary threads, which wait.
//!
//! Hot-plug: a thread looks now and then for NVMe functions that are bound to vfio-pci and that a filter allows, attaches them as
//! `HotInNvmeN`, and says so. One that was detached by a call, or that did not work, has to be away first. That a drive is gone is
//! found by its controller.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use cryptfold_bdev::Registry;
use cryptfold_reactor::{Handle, ReactorGone};
use serde_json::{Value, json};

use crate::bus::Bus;
use crate::controller::{Controller, NvmeError, Options, lock};
use crate::identity::text;
use crate::lifecycle::State;
use crate::pci::{self, Function};
use crate::vfio::VfioBus;

/// Longest wait for devices to be closed when a controller is detached.
const DETACH_LIMIT: Duration = Duration::from_secs(30);
/// Shortest and longest time between two looks for new drives.
const HOTPLUG_PERIODS: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(10);

/// Why a call about a drive was refused.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DriveError {
    /// No controller has this name.
    #[error("controller \"{0}\": No such device")]
    NotFound(String),
    /// The name is taken.
    #[error("controller \"{0}\": File exists (names of controllers are unique)")]
    Exists(String),
    /// The drive is attached already.
    #[error("{0} is attached already: File exists")]
    Attached(String),
    /// A name that can not be one.
    #[error("name: 1 to 200 characters are possible")]
    Name,
    /// What the controller, or the way to it, says.
    #[error("{what}: {reason}")]
    Drive {
        /// The drive or controller.
        what: String,
        /// The reason.
        reason: NvmeError,
    },
}

impl DriveError {
    /// The negative errno that SPDK's clients expect for this.
    pub fn code(&self) -> i32 {
        match self {
            DriveError::NotFound(_) => -19,
            DriveError::Exists(_) | DriveError::Attached(_) => -17,
            DriveError::Name => -22,
            DriveError::Drive { reason, .. } => reason.code(),
        }
    }
}

/// Which new drives are attached by themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hotplug {
    /// Whether any are.
    pub enable: bool,
    /// Time between two looks: 1 ms to 10 s.
    pub period: Duration,
    /// Only these addresses (canonical); all when empty.
    pub allowed: Vec<String>,
}

impl Default for Hotplug {
    fn default() -> Self {
        Hotplug { enable: false, period: Duration::from_millis(100), allowed: Vec::new() }
    }
}

/// See the module's head.
pub struct Drives {
    inner: Arc<Inner>,
    watcher: Mutex<Option<JoinHandle<()>>>,
}

struct Inner {
    registry: Arc<Registry>,
    sys: PathBuf,
    all: Mutex<Vec<Arc<Controller>>>,
    /// Held while a controller is attached or detached: names and addresses are checked and taken in one step.
    changing: Mutex<()>,
    hotplug: Mutex<(Hotplug, bool)>,
    changed: Condvar,
    /// Names of those that came by themselves.
    hot: Mutex<Vec<String>>,
    /// Addresses that hot-plug leaves alone until they have been away.
    refused: Mutex<Vec<String>>,
    came: Box<dyn Fn() + Send + Sync>,
}

impl Drives {
    /// None yet; devices go to `registry`. `came` is called, on a thread that may block, when hot-plug has attached a drive.
    pub fn new(registry: Arc<Registry>, came: impl Fn() + Send + Sync + 'static) -> Drives {
        Drives::under(registry, pci::sys(), came)
    }

    /// With another directory for the kernel's PCI functions.
    pub fn under(registry: Arc<Registry>, sys: PathBuf, came: impl Fn() + Send + Sync + 'static) -> Drives {
        let inner = Inner {
            registry,
            sys,
            all: Mutex::default(),
            changing: Mutex::default(),
            hotplug: Mutex::default(),
            changed: Condvar::new(),
            hot: Mutex::default(),
            refused: Mutex::default(),
            came: Box::new(came),
        };
        Drives { inner: Arc::new(inner), watcher: Mutex::default() }
    }

    /// Takes a drive over; `cores` will use it. Returns its devices' names.
    ///
    /// # Errors
    /// Name or drive taken; what stands against the drive.
    pub fn attach(
        &self,
        cores: &[Handle],
        name: &str,
        traddr: &str,
        options: Options,
    ) -> Result<Vec<String>, DriveError> {
        let attached = self.inner.attach(cores, name, traddr, options)?;
        lock(&self.inner.hot).retain(|hot| hot != name);
        Ok(attached)
    }

    fn find(&self, name: &str) -> Result<Arc<Controller>, DriveError> {
        let all = self.inner.alive();
        all.into_iter().find(|c| c.name == name).ok_or_else(|| DriveError::NotFound(name.into()))
    }

    /// Whether a controller has this name.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_ok()
    }

    /// Removes a controller's devices and gives the drive back.
    ///
    /// # Errors
    /// Unknown; devices that stay open.
    pub fn detach(&self, name: &str) -> Result<(), DriveError> {
        let _changing = lock(&self.inner.changing);
        let controller = self.find(name)?;
        lock(&self.inner.refused).push(controller.address().traddr);
        let home = controller.home.clone();
        let fail = |reason| DriveError::Drive { what: format!("controller \"{name}\""), reason };
        let done = home.block_on(move || async move { crate::detach(&controller, DETACH_LIMIT).await });
        done.map_err(NvmeError::from).and_then(|r| r).map_err(fail)
    }

    /// Resets a controller and waits for the end of it.
    ///
    /// # Errors
    /// Unknown; it does not come back.
    pub fn reset(&self, name: &str) -> Result<(), DriveError> {
        let controller = self.find(name)?;
        let home = controller.home.clone();
        let fail = |reason| DriveError::Drive { what: format!("controller \"{name}\""), reason };
        let done = home.block_on(move || async move { controller.reset().await });
        done.map_err(NvmeError::from).and_then(|r| r).map_err(fail)
    }

    /// SMART, firmware slots and errors of a controller.
    ///
    /// # Errors
    /// Unknown; it does not answer.
    pub fn health(&self, name: &str) -> Result<Value, DriveError> {
        let controller = self.find(name)?;
        let home = controller.home.clone();
        let fail = |reason| DriveError::Drive { what: format!("controller \"{name}\""), reason };
        let done = home.block_on(move || async move { controller.health().await });
        done.map_err(NvmeError::from).and_then(|r| r).map_err(fail)
    }

    /// The controllers, as `bdev_nvme_get_controllers` shows them.
    pub fn list(&self) -> Vec<Value> {
        self.inner.alive().iter().map(describe).collect()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.inner.alive().is_empty()
    }

    /// The calls that attach the controllers again: not those that go, nor those that came by themselves and that nobody uses
    /// (they come by themselves again).
    pub fn saved(&self) -> Vec<Value> {
        let hot = lock(&self.inner.hot).clone();
        let stays = |c: &Arc<Controller>| {
            matches!(c.state(), State::Ready | State::Resetting | State::Failed)
                && (!hot.contains(&c.name) || self.inner.is_claimed(c))
        };
        let call =
            |c: Arc<Controller>| json!({"name": c.name, "trtype": "PCIe", "traddr": c.address().traddr});
        self.inner.alive().into_iter().filter(stays).map(call).collect()
    }

    /// Starts or stops looking for new drives.
    ///
    /// # Errors
    /// A period that can not be.
    pub fn set_hotplug(&self, cores: &[Handle], hotplug: Hotplug) -> Result<(), NvmeError> {
        if !HOTPLUG_PERIODS.contains(&hotplug.period) {
            return Err(NvmeError::Unsupported(format!(
                "a period of {:?}; 1 ms to 10 s is possible",
                hotplug.period
            )));
        }
        lock(&self.inner.hotplug).0 = hotplug;
        self.inner.changed.notify_all();
        let mut watcher = lock(&self.watcher);
        if watcher.is_none() {
            let (inner, cores) = (self.inner.clone(), cores.to_vec());
            let thread = std::thread::Builder::new().name("nvme_hotplug".into());
            match thread.spawn(move || inner.watch(&cores)) {
                Ok(thread) => *watcher = Some(thread),
                Err(_) => return Err(NvmeError::Reactor(ReactorGone::Stopped)),
            }
        }
        Ok(())
    }

    /// How new drives are looked for.
    pub fn hotplug(&self) -> Hotplug {
        lock(&self.inner.hotplug).0.clone()
    }

    /// All PCI functions that a driver here could take, or has: `framework_get_pci_devices`.
    pub fn functions(&self) -> Vec<Value> {
        let ours: Vec<String> = self.inner.alive().iter().map(|c| c.address().traddr).collect();
        let shown = |f: &Function| f.class == pci::NVME_CLASS;
        let object = |f: Function| {
            let [vendor, device, subvendor, subdevice] = f.ids.map(|id| format!("{id:#06x}"));
            json!({
                "address": f.address,
                "type": "nvme",
                "attached": ours.contains(&f.address),
                "driver": f.driver,
                "iommu_group": f.group,
                "vendor_id": vendor,
                "device_id": device,
                "subvendor_id": subvendor,
                "subdevice_id": subdevice,
            })
        };
        pci::list(&self.inner.sys).into_iter().filter(shown).map(object).collect()
    }

    /// Ends hot-plug for good.
    pub fn stop_hotplug(&self) {
        lock(&self.inner.hotplug).1 = true;
        self.inner.changed.notify_all();
        if let Some(watcher) = lock(&self.watcher).take() {
            // A watcher that panicked has said so.
            let _ = watcher.join();
        }
    }

    /// Shuts all drives down; what still uses them has had its time. Before the reactors stop.
    pub fn stop(&self) {
        self.stop_hotplug();
        for controller in self.inner.alive() {
            if let Err(e) = self.detach(&controller.name) {
                tracing::warn!("{e}");
            }
        }
    }
}

impl Inner {
    /// Controllers that are not gone.
    fn alive(&self) -> Vec<Arc<Controller>> {
        let mut all = lock(&self.all);
        all.retain(|c| c.state() != State::Gone);
        all.clone()
    }

    fn is_claimed(&self, controller: &Controller) -> bool {
        let claimed = |name: &String| self.registry.get(name).is_ok_and(|bdev| bdev.claimed_by().is_some());
        controller.devices().values().any(claimed)
    }

    fn attach(
        &self,
        cores: &[Handle],
        name: &str,
        traddr: &str,
        options: Options,
    ) -> Result<Vec<String>, DriveError> {
        let _changing = lock(&self.changing);
        if name.is_empty() || name.len() > 200 {
            return Err(DriveError::Name);
        }
        let alive = self.alive();
        if alive.iter().any(|c| c.name == name) {
            return Err(DriveError::Exists(name.into()));
        }
        let canonical = pci::canonical(traddr).unwrap_or_else(|| traddr.into());
        if alive.iter().any(|c| c.address().traddr == canonical) {
            return Err(DriveError::Attached(canonical));
        }
        let fail = |reason: NvmeError| DriveError::Drive { what: canonical.clone(), reason };
        let home = cores.first().ok_or_else(|| fail(NvmeError::Reactor(ReactorGone::Stopped)))?;
        let bus: Arc<dyn Bus> = Arc::new(VfioBus::open(&self.sys, traddr).map_err(|e| fail(e.into()))?);
        let (name, registry, all) = (name.to_string(), self.registry.clone(), cores.to_vec());
        let attached = home
            .block_on(move || async move { crate::attach(bus, name, registry, all, options).await })
            .map_err(NvmeError::from)
            .and_then(|r| r)
            .map_err(fail)?;
        let devices = attached.devices().into_values().collect();
        lock(&self.all).push(attached);
        Ok(devices)
    }

    fn watch(&self, cores: &[Handle]) {
        loop {
            let hotplug = {
                let state = lock(&self.hotplug);
                if state.1 {
                    return;
                }
                let period = if state.0.enable { state.0.period } else { Duration::from_secs(3600) };
                let (state, _) = self
                    .changed
                    .wait_timeout(state, period)
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                if state.1 {
                    return;
                }
                state.0.clone()
            };
            if hotplug.enable {
                self.look(cores, &hotplug);
            }
        }
    }

    fn look(&self, cores: &[Handle], hotplug: &Hotplug) {
        let ready = |f: &Function| f.class == pci::NVME_CLASS && f.driver.as_deref() == Some("vfio-pci");
        let found: Vec<String> = pci::list(&self.sys).into_iter().filter(ready).map(|f| f.address).collect();
        let refused = {
            let mut refused = lock(&self.refused);
            refused.retain(|address| found.contains(address));
            refused.clone()
        };
        let attached: Vec<String> = self.alive().iter().map(|c| c.address().traddr).collect();
        for address in found {
            let wanted = hotplug.allowed.is_empty() || hotplug.allowed.contains(&address);
            if !wanted || attached.contains(&address) || refused.contains(&address) {
                continue;
            }
            let alive = self.alive();
            let free = |n: &String| alive.iter().all(|c| c.name != *n);
            let Some(name) = (0..).map(|n| format!("HotInNvme{n}")).find(free) else { return };
            match self.attach(cores, &name, &address, Options::default()) {
                Ok(devices) => {
                    tracing::info!("{address} has come: {}", devices.join(", "));
                    lock(&self.hot).push(name);
                    (self.came)();
                }
                Err(e) => {
                    tracing::warn!("{address} has come and can not be attached: {e}");
                    lock(&self.refused).push(address);
                }
            }
        }
    }
}

fn describe(c: &Arc<Controller>) -> Value {
    use std::sync::atomic::Ordering::Relaxed;
    let (id, address, n) = (c.identity(), c.address(), &c.counters);
    json!({
        "name": c.name,
        "ctrlrs": [{
            "state": c.state().name(),
            "trid": {"trtype": "PCIe", "traddr": address.traddr},
            "cntlid": id.cntlid.get(),
            "host": {"nqn": "", "addr": "", "svcid": ""},
            "numa_id": -1,
            "model_number": text(&id.mn),
            "serial_number": text(&id.sn),
            "io_queue_pairs": c.pairs(),
            "counters": {
                "errors": n.errors.load(Relaxed),
                "timeouts": n.timeouts.load(Relaxed),
                "aborts": n.aborts.load(Relaxed),
                "resets": n.resets.load(Relaxed),
                "failed_resets": n.failed_resets.load(Relaxed),
                "bogus_completions": n.bogus.load(Relaxed),
                "bounced": n.bounced.load(Relaxed),
                "events": n.events.load(Relaxed),
            },
            "events": c.events(),
        }],
    })
}
