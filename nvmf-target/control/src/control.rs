//! What the methods act on: the registry of devices, the runtime, the target, the pools, the keys and the options; and
//! the phases of the program's life (before initialisation, running, stopping).
//!
//! Everything here is called from ordinary threads and may block; reactors are reached by message only.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use cryptfold_bdev::Registry;
use cryptfold_bdev_nvme::Drives;
use cryptfold_bdev_remote::Remotes;
use cryptfold_nvmf_target::Target;
use cryptfold_nvmf_target::audit::TARGET as AUDIT;
use cryptfold_reactor::{Handle, IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};
use cryptfold_reduce::PoolManager;
use cryptfold_view::Hub;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::access::{Grant, Peer};
use crate::caller::{Caller, MAX_DEPTH};
use crate::deferred::Deferred;
use crate::fips::FipsMode;
use crate::jsonrpc::{Handler, RpcError, RpcResult};
use crate::keyring::Keyring;
use crate::keys::KeyStore;
use crate::kms::Kms;
use crate::logging::LogControl;
use crate::luks::Volumes;
use crate::options::Options;
use crate::pools::{Locked, Pools, Try};
use crate::refusals::{Lines, Refusals};
use crate::table::{Role, Table};
use crate::watch::Watch;

/// Signals that `spdk_kill_instance` may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Ends in order.
    Int,
    /// Ends in order.
    Term,
    /// Ends in order.
    Quit,
    /// As the process has it set.
    Hup,
    /// Ends at once.
    Kill,
    /// As the process has it set.
    Usr1,
}

/// How a [`Control`] is made.
pub struct ControlConfig {
    /// CPUs, one reactor each.
    pub cores: Vec<usize>,
    /// What idle reactors do.
    pub idle: IdlePolicy,
    /// Pin reactors to their CPUs.
    pub pin: bool,
    /// The arena.
    pub memory: MemoryConfig,
    /// Where pools' key files lie that are not named.
    pub key_dir: PathBuf,
    /// The logger's levels.
    pub log: LogControl,
    /// Who besides root and this process's user may do what on the control socket.
    pub grants: Vec<Grant>,
    /// Which algorithms may be used; entered already ([`FipsMode::enter`]).
    pub fips: FipsMode,
    /// Delivers a signal to the process.
    pub on_signal: Box<dyn Fn(Signal) + Send + Sync>,
}

impl Default for ControlConfig {
    fn default() -> Self {
        ControlConfig {
            cores: vec![0],
            idle: IdlePolicy::default(),
            pin: true,
            memory: MemoryConfig::default(),
            key_dir: crate::keys::default_key_dir(),
            log: LogControl::detached(),
            grants: Vec::new(),
            fips: FipsMode::Off,
            on_signal: Box::new(|_| {}),
        }
    }
}

/// How long the end waits for one device.
const DEVICE_END: Duration = Duration::from_secs(5);

/// Between two looks at a key server that did not answer.
const UNLOCK_PAUSE: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Startup,
    Running,
    Ended,
}

/// What exists from initialisation on.
pub(crate) struct Running {
    pub handles: Vec<Handle>,
    target: Target,
    pools: Pools,
    runtime: Mutex<Option<Runtime>>,
}

/// The control plane's state. One per process (tests make several).
pub struct Control {
    pub(crate) registry: Arc<Registry>,
    /// Controllers of other targets.
    pub(crate) remotes: Remotes,
    /// This host, to other targets, when no other name is given.
    pub(crate) host_uuid: OnceLock<Uuid>,
    /// PCIe drives.
    pub(crate) drives: Drives,
    pub(crate) keys: KeyStore,
    pub(crate) ring: Keyring,
    pub(crate) kms: Arc<Kms>,
    /// Volumes on which hosts put LUKS.
    pub(crate) luks: Arc<Volumes>,
    /// Calls that need devices of locked pools.
    pub(crate) deferred: Deferred,
    pub(crate) options: Mutex<Options>,
    pub(crate) log: LogControl,
    pub(crate) watch: Arc<Watch>,
    /// Calls that were refused.
    pub(crate) refusals: Refusals,
    /// Of calls that fail, in the log.
    refused_lines: Lines,
    /// Kind of I/O that `bdev_get_histogram` shows, by device.
    pub(crate) histogram_opc: Mutex<HashMap<String, String>>,
    pub(crate) config: ControlConfig,
    /// What people see.
    pub(crate) hub: Hub,
    table: Table,
    running: OnceLock<Running>,
    phase: Mutex<Phase>,
    phase_changed: Condvar,
    held: AtomicBool,
    /// A thread waits for key servers.
    retrying: AtomicBool,
    started: Instant,
    /// For threads.
    me: Weak<Control>,
}

/// Takes a lock whose holder panicked as it is.
pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    /// Before initialisation: no reactor runs yet.
    pub fn new(config: ControlConfig) -> Arc<Control> {
        let registry = Registry::new();
        Arc::new_cyclic(|me: &Weak<Control>| Control {
            remotes: Remotes::new(registry.clone()),
            host_uuid: OnceLock::new(),
            drives: {
                let me = me.clone();
                Drives::new(registry.clone(), move || me.upgrade().into_iter().for_each(|c| c.look_for_new()))
            },
            registry,
            keys: KeyStore::default(),
            ring: Keyring::default(),
            kms: Arc::default(),
            luks: Arc::default(),
            deferred: Deferred::default(),
            me: me.clone(),
            options: Mutex::default(),
            log: config.log.clone(),
            watch: Arc::default(),
            refusals: Refusals::default(),
            refused_lines: Lines::default(),
            histogram_opc: Mutex::default(),
            config,
            hub: Hub::default(),
            table: Table::new(crate::methods::all()),
            running: OnceLock::new(),
            phase: Mutex::new(Phase::Startup),
            phase_changed: Condvar::new(),
            held: AtomicBool::new(false),
            retrying: AtomicBool::new(false),
            started: Instant::now(),
        })
    }

    /// For threads.
    pub(crate) fn weak(&self) -> Weak<Control> {
        self.me.clone()
    }

    /// The methods.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// All devices.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Whether run-time methods may be called.
    pub fn is_initialized(&self) -> bool {
        *lock(&self.phase) == Phase::Running
    }

    /// Whether the end has begun; methods that wait give up.
    pub(crate) fn is_ending(&self) -> bool {
        *lock(&self.phase) == Phase::Ended
    }

    /// Time since the program's start.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Starts the reactors and what lives on them. Once.
    ///
    /// # Errors
    /// When a reactor can not start; nothing is left running then.
    pub fn initialize(&self) -> Result<(), RpcError> {
        let mut phase = lock(&self.phase);
        match *phase {
            Phase::Startup => {}
            Phase::Running => return Ok(()),
            Phase::Ended => return Err(RpcError::new(RpcError::INVALID_STATE, "the target is ending")),
        }
        let memory = lock(&self.options).memory(&self.config.memory);
        let runtime = Runtime::start(RuntimeConfig {
            cores: self.config.cores.clone(),
            policy: self.config.idle,
            pin: self.config.pin,
            memory,
            ..RuntimeConfig::default()
        })
        .map_err(|e| RpcError::internal(e.to_string()))?;
        let handles = runtime.handles().to_vec();
        let target = Target::new(self.registry.clone(), &handles);
        let luks = self.luks.clone();
        target.on_arrival(move |arrival| luks.arrives(arrival));
        target.set_auth_offer(self.config.fips.offer())?;
        crate::methods::apply_nvmf_options(self, &target)?;
        let manager = PoolManager::new(self.registry.clone(), handles.clone());
        if self.config.fips.is_on() {
            manager.require_approved();
        }
        let watch = Arc::downgrade(&self.watch);
        manager.listen(move |pool, event| {
            if let Some(watch) = watch.upgrade() {
                watch.pool_event(pool, event);
            }
        });
        let pools = Pools::new(
            manager,
            self.registry.clone(),
            self.kms.clone(),
            self.config.key_dir.clone(),
            self.config.fips,
        );
        let running = Running { handles, target, pools, runtime: Mutex::new(Some(runtime)) };
        if self.running.set(running).is_err() {
            return Err(RpcError::internal("initialised twice"));
        }
        *phase = Phase::Running;
        self.phase_changed.notify_all();
        Ok(())
    }

    /// A configuration is about to be loaded: `framework_wait_init` waits for [`Control::release`] too.
    pub fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    /// The configuration is loaded.
    pub fn release(&self) {
        let _phase = lock(&self.phase);
        self.held.store(false, Ordering::SeqCst);
        self.phase_changed.notify_all();
    }

    /// Waits until initialised and configured, or ended.
    pub fn wait_initialized(&self) {
        let mut phase = lock(&self.phase);
        while *phase == Phase::Startup || (*phase == Phase::Running && self.held.load(Ordering::SeqCst)) {
            phase = self.phase_changed.wait(phase).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The reactors; none before initialisation.
    pub fn handles(&self) -> &[Handle] {
        self.running.get().map_or(&[], |r| &r.handles)
    }

    /// The target.
    ///
    /// # Errors
    /// There is none before initialisation.
    pub fn target(&self) -> Result<&Target, RpcError> {
        let early = || RpcError::new(RpcError::INVALID_STATE, "not initialised yet");
        self.running.get().map(|r| &r.target).ok_or_else(early)
    }

    /// The pools; there are none before initialisation.
    pub(crate) fn pools(&self) -> Result<&Pools, RpcError> {
        let early = || RpcError::new(RpcError::INVALID_STATE, "not initialised yet");
        self.running.get().map(|r| &r.pools).ok_or_else(early)
    }

    /// `thread_get_io_channels` of one reactor.
    pub(crate) fn channels_on(&self, reactor: &Handle) -> Vec<Value> {
        let Ok(t) = self.target() else { return Vec::new() };
        let groups = t.stats();
        let here = groups.iter().filter(|g| g.reactor == reactor.id().0);
        here.map(|g| json!({"name": "nvmf_tgt", "ref": 1 + g.current_admin_qpairs + g.current_io_qpairs}))
            .collect()
    }

    /// Looks for a pool on a device and opens it if a key is at hand.
    pub(crate) fn examine(&self, name: &str) -> Result<(), RpcError> {
        let pools = self.pools()?;
        let bdev = self.registry.get(name)?;
        if !pools.is_candidate(&bdev) {
            return Ok(());
        }
        match pools.open(name, Try::All, None) {
            Ok(Some(info)) => {
                tracing::info!(bdev = name, pool = info.name, "pool opened");
                self.watch.note("pool_open", &info.name);
                Ok(())
            }
            Ok(None) => Ok(()),
            // It is listed, and was looked at.
            Err(_) if pools.find_locked(bdev.name()).is_some_and(|l| pools.held(l.pool.uuid).is_some()) => {
                Ok(())
            }
            Err(e) => {
                self.retry_unlocks();
                Err(e)
            }
        }
    }

    /// A pool was opened: what had waited for its volumes is made now.
    pub(crate) fn pool_opened(&self, name: &str) {
        self.watch.note("pool_open", name);
        self.deferred.retry(self);
    }

    /// Tries pools whose key server did not answer until it does, on a thread of its own.
    pub(crate) fn retry_unlocks(&self) {
        let waiting = |c: &Control| -> Vec<Locked> {
            let all = c.pools().map(Pools::locked).unwrap_or_default();
            all.into_iter().filter(|l| l.waiting).collect()
        };
        if waiting(self).is_empty() || self.retrying.swap(true, Ordering::SeqCst) {
            return;
        }
        let me = self.me.clone();
        let spawned = std::thread::Builder::new().name("unlock".into()).spawn(move || {
            loop {
                std::thread::sleep(UNLOCK_PAUSE);
                let Some(c) = me.upgrade() else { return };
                let mut left = waiting(&c);
                if left.is_empty() || c.is_ending() {
                    c.retrying.store(false, Ordering::SeqCst);
                    return;
                }
                for locked in left.drain(..) {
                    let opened = c.pools().and_then(|p| p.open(&locked.pool.base_bdev, Try::All, None));
                    if let Ok(Some(info)) = opened {
                        c.pool_opened(&info.name);
                    }
                }
            }
        });
        if let Err(error) = spawned {
            self.retrying.store(false, Ordering::SeqCst);
            tracing::error!(%error, "no thread to wait for a key server");
        }
    }

    /// After each call, and when a drive has come by itself: what is new is noted and examined.
    fn look_for_new(&self) {
        let new = self.watch.look(&self.registry);
        let auto = lock(&self.options).auto_examine.unwrap_or(true);
        for name in &new {
            if (self.watch.take_wanted(name) || (auto && !self.watch.is_spared(name)))
                && let Err(e) = self.examine(name)
            {
                tracing::warn!(bdev = name, error = e.message, "examining failed");
            }
        }
        self.watch.examined(new.len());
    }

    /// Where subsystems listen: (NQN, address).
    pub fn listening(&self) -> Vec<(String, String)> {
        let all = self.target().map(Target::subsystems).unwrap_or_default();
        all.iter()
            .flat_map(|s| s.listeners.iter().map(|l| (s.options.nqn.clone(), l.addr.to_string())))
            .collect()
    }

    /// Ends whoever waits in a method, so that the RPC server can stop.
    pub fn end_waits(&self) {
        *lock(&self.phase) = Phase::Ended;
        self.phase_changed.notify_all();
    }

    /// Ends in order. Idempotent.
    ///
    /// # Errors
    /// The first thing that did not end as it should; the rest is ended all the same.
    pub fn shutdown(&self) -> Result<(), RpcError> {
        self.end_waits();
        self.refusals.end();
        self.kms.end();
        let Some(running) = self.running.get() else { return Ok(()) };
        let Some(runtime) = lock(&running.runtime).take() else { return Ok(()) };
        self.drives.stop_hotplug();
        // A pool on a lost namespace must not keep the end waiting.
        self.remotes.hurry();
        let drained = running.target.stop().map_err(RpcError::from);
        // Also when a host's I/O hangs: what has arrived is made durable.
        running.pools.manager().shutdown();
        // Upper devices first; files are closed and their locks given back.
        for b in self.registry.list().iter().rev() {
            if let Ok(removal) = self.registry.unregister(b.name())
                && !removal.wait(DEVICE_END)
            {
                tracing::warn!(bdev = b.name(), "still in use at the end");
            }
        }
        self.remotes.stop();
        self.drives.stop();
        runtime.stop();
        drained
    }
}

impl Control {
    /// A call on behalf of somebody, who is written down if it changes something.
    pub(crate) fn call_by(&self, caller: &Caller, method: &str, params: Option<&Value>) -> RpcResult {
        if caller.within.len() >= MAX_DEPTH {
            return Err(RpcError::new(
                -40,
                format!("{method}: {MAX_DEPTH} calls are within each other: Too many levels"),
            ));
        }
        let started = Instant::now();
        let _within = caller.enter(method);
        let result = self.table.call(self, method, params);
        self.look_for_new();
        if method.starts_with("nvmf_") || method.starts_with("bdev_") {
            self.luks.recheck(self);
        }
        let ms = started.elapsed().as_millis() as u64;
        match &result {
            Ok(_) => tracing::debug!(method, ms, "rpc"),
            Err(e) => self.log_refused(method, params, ms, e),
        }
        if let Some(m) = self.table.get(method).filter(|m| m.role_of(params) != Role::Viewer) {
            let shown = m.shown(params).to_string();
            let (code, error) = result.as_ref().err().map(|e| (e.code, e.message.as_str())).unzip();
            // A record has an end: whose call it was comes first.
            let error = error.map(|e: &str| e.chars().take(1024).collect::<String>());
            let error = error.as_deref();
            let (by, roles, within) = (caller.by.as_str(), caller.roles.as_deref(), caller.within());
            let within = within.as_deref();
            tracing::debug!(target: AUDIT, event = "configuration", method = m.name, by, roles, within, params = shown.as_str(), code, error);
        }
        result
    }

    /// Into the program's log; what anybody may call, or call in vain, so many times a minute.
    fn log_refused(&self, method: &str, params: Option<&Value>, ms: u64, e: &RpcError) {
        let anybodys = self.table.get(method).is_none_or(|m| m.role_of(params) == Role::Viewer);
        let line = if anybodys { self.refused_lines.next(Instant::now()) } else { Some(0) };
        // What others sent has an end.
        let method = method.char_indices().nth(64).map_or(method, |(end, _)| &method[..end]);
        match line {
            Some(before) => {
                let besides = (before > 0).then_some(before);
                tracing::info!(method, ms, code = e.code, error = e.message, besides, "rpc refused");
            }
            None => tracing::debug!(method, ms, code = e.code, error = e.message, "rpc refused"),
        }
    }

    /// The handler for one end of the control socket.
    ///
    /// # Errors
    /// It may do nothing here.
    pub fn session(self: &Arc<Self>, peer: Peer) -> Result<Arc<dyn Handler>, RpcError> {
        crate::access::session(self, peer)
    }
}

/// What the program calls itself, for whoever has called a method that does: configurations, and what waited for a pool.
impl Handler for Control {
    fn call(&self, method: &str, params: Option<&Value>) -> RpcResult {
        self.call_by(&Caller::current(), method, params)
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

    use super::*;

    /// Whoever may call anything at all can call what is not there again and again.
    #[test]
    fn calls_in_vain_do_not_fill_the_log() {
        struct Counts(Arc<Mutex<u64>>);
        impl<S: tracing::Subscriber> Layer<S> for Counts {
            fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
                *lock(&self.0) += u64::from(*event.metadata().level() == tracing::Level::INFO);
            }
        }
        let (control, lines, started) =
            (Control::new(ControlConfig::default()), Arc::default(), Instant::now());
        let subscriber = tracing_subscriber::registry().with(Counts(Arc::clone(&lines)));
        tracing::subscriber::with_default(subscriber, || {
            for n in 0..500 {
                let what = if n % 2 == 0 { "no_such_method" } else { "bdev_get_bdevs" };
                control.call(what, Some(&json!({"name": "none"}))).unwrap_err();
            }
        });
        let minutes = 1 + started.elapsed().as_secs() / 60;
        let lines = *lock(&lines);
        assert!((1..=60 * minutes).contains(&lines), "{lines} lines in {minutes} minutes");
    }
}
