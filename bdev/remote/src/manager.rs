//! All remote controllers of a process, by name. For ordinary threads: calls block until what they ask for has happened.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use cryptfold_bdev::Registry;
use cryptfold_nvmf_initiator::Layer;
use cryptfold_reactor::Handle;
use serde_json::Value;

use crate::RemoteError;
use crate::link::{self, Address, Link, Phase, Renewal};
use crate::options::{AttachOptions, Multipath};
use crate::remote::{Remote, locked};
use crate::signal::STOP;

/// How long a removal waits for I/O to drain; then connections are taken down, and what is under way fails.
const DRAIN: Duration = Duration::from_secs(10);
/// How long links may take to end, and resets to be over.
const SETTLE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(5);

/// See the module.
pub struct Remotes {
    registry: Arc<Registry>,
    table: Arc<Mutex<Vec<Arc<Remote>>>>,
    /// One change at a time.
    changing: Mutex<()>,
}

/// Which paths are meant; what is not given does not matter.
#[derive(Clone, Debug, Default)]
pub struct PathFilter {
    /// Address.
    pub traddr: Option<String>,
    /// Port.
    pub trsvcid: Option<String>,
    /// Subsystem.
    pub subnqn: Option<String>,
    /// Address of this host.
    pub hostaddr: Option<IpAddr>,
}

impl PathFilter {
    fn is_everything(&self) -> bool {
        self.traddr.is_none() && self.trsvcid.is_none() && self.subnqn.is_none() && self.hostaddr.is_none()
    }

    fn takes(&self, a: &Address) -> bool {
        let fits = |want: &Option<String>, have: &str| want.as_deref().is_none_or(|w| w == have);
        let o = &a.options;
        fits(&self.traddr, &o.traddr)
            && fits(&self.trsvcid, &o.trsvcid)
            && fits(&self.subnqn, &o.subnqn)
            && (self.hostaddr.is_none() || self.hostaddr == o.hostaddr)
    }
}

/// A controller, as `bdev_nvme_get_controllers` shows it.
#[derive(Clone, Debug)]
pub struct ControllerInfo {
    /// Its name.
    pub name: String,
    /// Its links.
    pub links: Vec<LinkInfo>,
}

/// One association.
#[derive(Clone, Debug)]
pub struct LinkInfo {
    /// SPDK's word for its state.
    pub state: &'static str,
    /// The transport identifier in use.
    pub trid: Value,
    /// Others that it may use.
    pub alternates: Vec<Value>,
    /// The controller's identifier, while connected.
    pub cntlid: Option<u16>,
    /// While connected with TLS: who makes the records that its admin connection sends, and who opens those that it receives.
    pub tls: Option<(Layer, Layer)>,
    /// This host's name there.
    pub hostnqn: String,
    /// This host's address there, if it was given.
    pub hostaddr: Option<IpAddr>,
}

impl Remotes {
    /// None yet; devices go to this registry.
    pub fn new(registry: Arc<Registry>) -> Remotes {
        Remotes { registry, table: Arc::default(), changing: Mutex::default() }
    }

    fn find(&self, name: &str) -> Result<Arc<Remote>, RemoteError> {
        let found = locked(&self.table).iter().find(|r| r.name == name).cloned();
        found.ok_or_else(|| RemoteError::NotFound(name.into()))
    }

    /// Whether there is a controller of this name.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_ok()
    }

    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        locked(&self.table).is_empty()
    }

    /// How the first path of a controller introduces this host, for further paths: (NQN, identifier).
    pub fn host_of(&self, name: &str) -> Option<(String, [u8; 16])> {
        let links = self.find(name).ok()?.links();
        links.first().map(|l| l.address().options).map(|o| (o.hostnqn, o.hostid))
    }

    /// Attaches a controller, or a further path to one that is there. Replies the names of its devices.
    ///
    /// # Errors
    /// The name or the path is taken, parameters do not fit, the target does not let us in.
    pub fn attach(&self, reactors: &[Handle], mut o: AttachOptions) -> Result<Vec<String>, RemoteError> {
        let _one = locked(&self.changing);
        if reactors.is_empty() {
            return Err(RemoteError::NoReactor);
        }
        if o.name.is_empty() || o.name.len() > 200 {
            return Err(RemoteError::Invalid("name: 1 to 200 bytes are needed".into()));
        }
        if usize::from(o.connect.io_queues) < reactors.len() {
            return Err(RemoteError::Invalid(format!(
                "num_io_queues: {} was given; each of the {} cores needs one",
                o.connect.io_queues,
                reactors.len()
            )));
        }
        o.connect.io_queues = reactors.len() as u16;
        match self.find(&o.name) {
            Ok(remote) => self.add_path(&remote, reactors, o),
            Err(_) => self.create(reactors, &o),
        }
    }

    fn create(&self, reactors: &[Handle], o: &AttachOptions) -> Result<Vec<String>, RemoteError> {
        let table = Arc::downgrade(&self.table);
        let on_end = move |name: &str| {
            if let Some(table) = table.upgrade() {
                locked(&table).retain(|r| r.name != name);
            }
        };
        let remote = Remote::new(o, self.registry.clone(), Box::new(on_end));
        locked(&self.table).push(remote.clone());
        start(&remote, &reactors[0], o)?;
        Ok(remote.bdev_names())
    }

    fn add_path(
        &self,
        remote: &Arc<Remote>,
        reactors: &[Handle],
        o: AttachOptions,
    ) -> Result<Vec<String>, RemoteError> {
        let already = |why: &str| {
            Err(RemoteError::Already(format!("A controller named {} already exists {why}", o.name)))
        };
        if o.multipath == Multipath::Disable || remote.multipath == Multipath::Disable {
            return already("and multipath is disabled");
        }
        let links = remote.links();
        let same = PathFilter {
            traddr: Some(o.connect.traddr.clone()),
            trsvcid: Some(o.connect.trsvcid.clone()),
            subnqn: Some(o.connect.subnqn.clone()),
            hostaddr: None,
        };
        // From another address of this host it is another path.
        let is_same = |a: &Address| same.takes(a) && a.options.hostaddr == o.connect.hostaddr;
        if links.iter().flat_map(|l| l.addresses()).any(|a| is_same(&a)) {
            return already("with the specified network path");
        }
        if remote.subnqn != o.connect.subnqn {
            return already(&format!("for another subsystem, {}", remote.subnqn));
        }
        if links.iter().any(|l| l.address().options.hostnqn != o.connect.hostnqn) {
            return already("with another hostnqn");
        }
        if remote.multipath != o.multipath {
            return Err(RemoteError::Invalid(format!(
                "multipath: \"{}\" was given; the first path of {} was attached with \"{}\"",
                o.multipath.word(),
                o.name,
                remote.multipath.word()
            )));
        }
        match (o.multipath, links.first()) {
            (Multipath::Failover, Some(link)) => {
                let options = o.connect.clone();
                let tried = link.home.block_on(move || link::probe(options));
                tried.map_err(|_| RemoteError::NoReactor)??;
                link.add_address(Address { options: o.connect, saved: o.saved });
            }
            _ => start(remote, &reactors[links.len() % reactors.len()], &o)?,
        }
        Ok(remote.bdev_names())
    }

    /// Detaches a controller with its devices, or one path of it.
    ///
    /// # Errors
    /// No such controller or path; devices whose users do not let go.
    pub fn detach(&self, name: &str, filter: &PathFilter) -> Result<(), RemoteError> {
        let _one = locked(&self.changing);
        let remote = self.find(name)?;
        if filter.is_everything() {
            return remove(&remote);
        }
        let links = remote.links();
        let meant: Vec<&Arc<Link>> =
            links.iter().filter(|l| l.addresses().iter().any(|a| filter.takes(a))).collect();
        if meant.is_empty() {
            return Err(RemoteError::NoPath(name.into()));
        }
        let mut over = Vec::new();
        for link in meant {
            if link.remove_addresses(|a| filter.takes(a)).is_err() {
                over.push(link.clone());
            }
        }
        if over.len() == links.len() {
            return remove(&remote);
        }
        over.iter().for_each(|l| l.signal.raise(STOP));
        wait(|| over.iter().all(|l| matches!(l.phase(), Phase::Ended)));
        Ok(())
    }

    /// Connects anew: the link to this controller, or all.
    ///
    /// # Errors
    /// No such controller; not connected again in time.
    pub fn reset(&self, name: &str, cntlid: Option<u16>) -> Result<(), RemoteError> {
        let remote = self.find(name)?;
        let is_meant = |l: &Arc<Link>| cntlid.is_none_or(|c| l.up().is_some_and(|u| u.cntlid == c));
        let links: Vec<Arc<Link>> = remote.links().into_iter().filter(is_meant).collect();
        if links.is_empty() {
            return Err(RemoteError::NoPath(name.into()));
        }
        let renewals: Vec<Renewal> = links.into_iter().map(Renewal::begin).collect();
        if wait(|| renewals.iter().all(Renewal::is_done)) {
            Ok(())
        } else {
            Err(RemoteError::NotConnected(name.into()))
        }
    }

    /// All of them, in order of attachment.
    pub fn list(&self) -> Vec<ControllerInfo> {
        let all = locked(&self.table).clone();
        let link = |l: &Arc<Link>| {
            let addresses = l.addresses();
            LinkInfo {
                state: l.phase().word(),
                trid: addresses[0].json(),
                alternates: addresses[1..].iter().map(Address::json).collect(),
                cntlid: l.up().map(|u| u.cntlid),
                tls: l.up().and_then(|u| u.tls),
                hostnqn: addresses[0].options.hostnqn.clone(),
                hostaddr: addresses[0].options.hostaddr,
            }
        };
        let one = |r: &Arc<Remote>| ControllerInfo {
            name: r.name.clone(),
            links: r.links().iter().map(link).collect(),
        };
        all.iter().map(one).collect()
    }

    /// The parameters that attach everything again, in order.
    pub fn saved(&self) -> Vec<Value> {
        let all = locked(&self.table).clone();
        let addresses = all.iter().flat_map(|r| r.links()).flat_map(|l| l.addresses());
        addresses.map(|a| a.saved).collect()
    }

    /// The process is about to end: what is connected goes on, but no I/O waits for a path that is lost.
    pub fn hurry(&self) {
        locked(&self.table).clone().iter().for_each(|r| r.hurry());
    }

    /// Ends everything, for the end of the process: devices are gone already, or fail.
    pub fn stop(&self) {
        let _one = locked(&self.changing);
        let all = locked(&self.table).clone();
        for remote in all {
            if let Err(e) = remove(&remote) {
                tracing::warn!("{e}");
            }
        }
    }
}

/// Starts a link and waits for its first association.
fn start(remote: &Arc<Remote>, home: &Handle, o: &AttachOptions) -> Result<(), RemoteError> {
    let address = Address { options: o.connect.clone(), saved: o.saved.clone() };
    let link = Link::new(home.clone(), address);
    remote.add_link(link.clone());
    let (sender, first) = mpsc::sync_channel(1);
    let remote = remote.clone();
    home.spawn(move || link::run(remote, link, move |result| drop(sender.send(result))));
    match first.recv() {
        Ok(result) => result.map_err(RemoteError::from),
        Err(_) => Err(RemoteError::NoReactor),
    }
}

/// Takes a controller down: devices first, while their I/O can still end well.
fn remove(remote: &Arc<Remote>) -> Result<(), RemoteError> {
    let removals = remote.remove_namespaces();
    let end = Instant::now() + DRAIN;
    let gone =
        |until: Instant| removals.iter().all(|r| r.wait(until.saturating_duration_since(Instant::now())));
    let drained = gone(end);
    let links = remote.links();
    links.iter().for_each(|l| l.signal.raise(STOP));
    wait(|| remote.links().is_empty());
    if drained || gone(Instant::now() + DRAIN) { Ok(()) } else { Err(RemoteError::Busy(remote.name.clone())) }
}

fn wait(done: impl Fn() -> bool) -> bool {
    let end = Instant::now() + SETTLE;
    while !done() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(POLL);
    }
    true
}
