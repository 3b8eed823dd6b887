//! A link: one association at a time with one of its addresses, kept by a task on the link's home reactor.
//!
//! ```text
//!   Connecting --ok--> Up --lost, reset--> Down --ok--> Up
//!       |               |                   |  `--no attempt left--> Failed --reset--> (attempt)
//!     refused          stop                 | ctrlr_loss_timeout
//!       v               v                   v
//!     Ended <-----------+-------------------+
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use cryptfold_nvmf_initiator::{
    AnaState, CloseReason, ConnectOptions, Connector, Controller, Error, Layer, NamespaceInfo,
};
use cryptfold_nvmf_spec::Nsid;
use cryptfold_nvmf_spec::identify::cmic;
use cryptfold_reactor::{self as reactor, Handle, Nanos};
use serde_json::{Value, json};

use crate::remote::{Remote, locked};
use crate::signal::{CHANGED, LOST, RESET, STOP, Signal};

/// How often a controller without events is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Where a subsystem is, and how to get in.
#[derive(Clone)]
pub(crate) struct Address {
    pub options: ConnectOptions,
    /// The parameters that attach it again.
    pub saved: Value,
}

impl Address {
    pub fn json(&self) -> Value {
        let o = &self.options;
        let family = if o.traddr.contains(':') { "IPv6" } else { "IPv4" };
        json!({"trtype": "TCP", "adrfam": family, "traddr": o.traddr, "trsvcid": o.trsvcid, "subnqn": o.subnqn})
    }

    pub fn text(&self) -> String {
        self.options.address()
    }
}

/// A namespace over one link.
#[derive(Clone)]
pub(crate) struct NsPath {
    pub info: NamespaceInfo,
    pub ana: AnaState,
}

/// An association, as it was when it was last looked at.
pub(crate) struct Up {
    /// When it was looked at.
    pub since: Nanos,
    pub connector: Arc<Connector>,
    pub cntlid: u16,
    /// With TLS: who makes the records that are sent, and who opens those that are received.
    pub tls: Option<(Layer, Layer)>,
    pub reports_ana: bool,
    pub namespaces: BTreeMap<Nsid, NsPath>,
}

#[derive(Clone)]
pub(crate) enum Phase {
    /// For the first time.
    Connecting,
    Up(Arc<Up>),
    Down {
        since: Nanos,
    },
    /// Not connected, and nobody tries.
    Failed,
    Ended,
}

impl Phase {
    /// SPDK's word.
    pub fn word(&self) -> &'static str {
        match self {
            Phase::Up(_) => "enabled",
            Phase::Connecting => "resetting",
            Phase::Down { .. } => "reconnect_is_delayed",
            Phase::Failed => "failed",
            Phase::Ended => "deleting",
        }
    }
}

struct State {
    phase: Phase,
    /// The first is the one in use. Never empty.
    addresses: VecDeque<Address>,
}

/// See the module.
pub(crate) struct Link {
    pub home: Handle,
    pub signal: Signal,
    state: Mutex<State>,
}

/// An association that is to be made anew.
pub(crate) struct Renewal {
    link: Arc<Link>,
    before: Option<Arc<Connector>>,
}

impl Renewal {
    pub fn begin(link: Arc<Link>) -> Renewal {
        let before = link.up().map(|up| up.connector.clone());
        link.signal.raise(RESET);
        Renewal { link, before }
    }

    /// There is an association, and another one than before.
    pub fn is_done(&self) -> bool {
        match (self.link.up(), &self.before) {
            (Some(up), Some(before)) => !Arc::ptr_eq(&up.connector, before),
            (up, _) => up.is_some(),
        }
    }

    /// What was there is over, whatever came after it.
    pub fn is_past(&self) -> bool {
        self.link.up().is_none() || self.is_done()
    }
}

/// Why an association is over.
enum End {
    Stop,
    Reset,
    Lost(String),
}

impl Link {
    pub fn new(home: Handle, address: Address) -> Arc<Link> {
        let state = State { phase: Phase::Connecting, addresses: VecDeque::from([address]) };
        Arc::new(Link { home, signal: Signal::default(), state: Mutex::new(state) })
    }

    pub fn phase(&self) -> Phase {
        locked(&self.state).phase.clone()
    }

    pub fn up(&self) -> Option<Arc<Up>> {
        match &locked(&self.state).phase {
            Phase::Up(up) => Some(up.clone()),
            _ => None,
        }
    }

    fn set(&self, phase: Phase) {
        locked(&self.state).phase = phase;
    }

    /// The address in use.
    pub fn address(&self) -> Address {
        locked(&self.state).addresses[0].clone()
    }

    pub fn addresses(&self) -> Vec<Address> {
        locked(&self.state).addresses.iter().cloned().collect()
    }

    /// Another address, to be used when this one is lost.
    pub fn add_address(&self, address: Address) {
        locked(&self.state).addresses.push_back(address);
    }

    /// Takes the addresses that are meant away; when it was the one in use, another is connected to. `Err`: all are meant.
    pub fn remove_addresses(&self, is_meant: impl Fn(&Address) -> bool) -> Result<(), ()> {
        let in_use = {
            let mut s = locked(&self.state);
            if s.addresses.iter().all(&is_meant) {
                return Err(());
            }
            let in_use = is_meant(&s.addresses[0]);
            s.addresses.retain(|a| !is_meant(a));
            in_use
        };
        if in_use {
            self.signal.raise(RESET);
        }
        Ok(())
    }

    fn rotate(&self) {
        locked(&self.state).addresses.rotate_left(1);
    }
}

/// The first of two futures to end.
async fn either<A, B>(a: impl Future<Output = A>, b: impl Future<Output = B>) -> Result<A, B> {
    let (mut a, mut b) = (pin!(a), pin!(b));
    poll_fn(|cx| match a.as_mut().poll(cx) {
        Poll::Ready(v) => Poll::Ready(Ok(v)),
        Poll::Pending => b.as_mut().poll(cx).map(Err),
    })
    .await
}

/// The link's life, on its home reactor. `first` hears how the first attempt went.
pub(crate) async fn run(remote: Arc<Remote>, link: Arc<Link>, first: impl FnOnce(Result<(), Error>)) {
    let mut first = Some(first);
    let mut down_since = reactor::now();
    // Failed attempts since the last association; all addresses are one round.
    let mut attempts = 0;
    let mut refusal = None;
    loop {
        let begin = reactor::now();
        match either(connect(&remote, &link), link.signal.wait(STOP)).await {
            Err(_) => break,
            Ok(Ok(controller)) => {
                if let Some(first) = first.take() {
                    first(Ok(()));
                }
                attempts = 0;
                let end = serve(&remote, &link, &controller).await;
                down_since = reactor::now();
                link.set(Phase::Down { since: down_since });
                remote.publish();
                match &end {
                    End::Lost(why) => {
                        let path = link.address().text();
                        tracing::warn!(controller = remote.name, path, why, "path lost");
                        link.rotate();
                    }
                    End::Reset | End::Stop => shut_down(controller).await,
                }
                if matches!(end, End::Stop) {
                    break;
                }
            }
            Ok(Err(e)) if first.is_some() => {
                refusal = Some(e);
                break;
            }
            Ok(Err(e)) => {
                let path = link.address().text();
                tracing::info!(controller = remote.name, path, error = %e, "path still lost");
                attempts += 1;
                link.rotate();
            }
        }
        if !pause(&remote, &link, down_since, begin, attempts).await {
            break;
        }
    }
    link.set(Phase::Ended);
    remote.forget_link(&link);
    if let (Some(first), Some(e)) = (first, refusal) {
        first(Err(e));
    }
}

/// Waits for the next attempt; false when there is none.
async fn pause(remote: &Remote, link: &Link, down_since: Nanos, begin: Nanos, attempts: usize) -> bool {
    let r = &remote.recovery;
    let elapsed = |from: Nanos| Duration::from_nanos(reactor::now().0.saturating_sub(from.0));
    let round = locked(&link.state).addresses.len();
    if r.loss == Some(Duration::ZERO) {
        if attempts < round {
            return !link.signal.is_raised(STOP);
        }
        link.set(Phase::Failed);
        remote.publish();
        tracing::warn!(
            controller = remote.name,
            "no path, and no further attempt (ctrlr_loss_timeout_sec is 0)"
        );
        return link.signal.wait(STOP | RESET).await & STOP == 0;
    }
    if r.loss.is_some_and(|limit| elapsed(down_since) >= limit) {
        tracing::warn!(
            controller = remote.name,
            path = link.address().text(),
            "path given up (ctrlr_loss_timeout_sec)"
        );
        return false;
    }
    // At once after a loss and through the other addresses; but what comes and goes at once waits too.
    let short_lived = attempts == 0 && elapsed(begin) < r.delay;
    let whole_round = attempts > 0 && attempts.is_multiple_of(round);
    if !short_lived && !whole_round {
        return !link.signal.is_raised(STOP);
    }
    let left = r.loss.map_or(r.delay, |limit| r.delay.min(limit.saturating_sub(elapsed(down_since))));
    match reactor::timeout(left, link.signal.wait(STOP | RESET)).await {
        Ok(bits) => bits & STOP == 0,
        Err(_) => true,
    }
}

async fn connect(remote: &Remote, link: &Arc<Link>) -> Result<Rc<Controller>, Error> {
    let controller = Rc::new(Controller::connect(&link.address().options).await?);
    let (granted, wanted) = (controller.connector().queues(), link.address().options.io_queues);
    if granted < wanted {
        let why = format!("{granted} are granted, and each of {wanted} cores needs one");
        return Err(Error::Unsupported { what: "I/O queues", why });
    }
    // What was seen of the last association does not count.
    link.signal.clear(LOST | CHANGED | RESET);
    look(remote, link, &controller).await?;
    Ok(controller)
}

/// Looks at the namespaces and their access states, and tells everybody.
async fn look(remote: &Remote, link: &Arc<Link>, controller: &Controller) -> Result<(), Error> {
    let states = controller.ana_states().await?;
    let mut seen = Vec::new();
    for nsid in controller.namespaces().await? {
        match controller.namespace(nsid).await {
            Ok(info) => seen.push(info),
            // Gone since the list was read, or of a kind that is no block device here.
            Err(e @ (Error::Unsupported { .. } | Error::Status { .. })) => {
                tracing::info!(controller = remote.name, error = %e, "namespace not used");
            }
            Err(e) => return Err(e),
        }
    }
    let path = |info: NamespaceInfo| {
        let ana = states.get(&info.ana_group).copied().unwrap_or(AnaState::Optimized);
        (info.nsid, NsPath { info, ana })
    };
    link.set(Phase::Up(Arc::new(Up {
        since: reactor::now(),
        connector: controller.connector().clone(),
        cntlid: controller.cntlid().0,
        tls: controller.tls_layers(),
        reports_ana: controller.identify().cmic & cmic::ANA != 0,
        namespaces: remote.reconcile(link, seen).into_iter().map(path).collect(),
    })));
    remote.publish();
    Ok(())
}

/// Keeps an association until it is over.
async fn serve(remote: &Remote, link: &Arc<Link>, controller: &Rc<Controller>) -> End {
    let events = reactor::spawn_local(hear(link.clone(), controller.clone()));
    let end = watch(remote, link, controller).await;
    events.cancel().await;
    end
}

async fn watch(remote: &Remote, link: &Arc<Link>, controller: &Controller) -> End {
    loop {
        let bits = link.signal.wait(STOP | RESET | LOST | CHANGED).await;
        if bits & STOP != 0 {
            return End::Stop;
        }
        if let Some(reason) = controller.closed() {
            return End::Lost(reason.to_string());
        }
        if bits & RESET != 0 {
            return End::Reset;
        }
        if bits & LOST != 0 {
            return End::Lost("an I/O connection ended".into());
        }
        let changed = async {
            controller.acknowledge_changes().await?;
            look(remote, link, controller).await
        };
        if let Err(e) = changed.await {
            if !matches!(e, Error::Status { .. } | Error::Unsupported { .. }) {
                return End::Lost(e.to_string());
            }
            tracing::warn!(controller = remote.name, error = %e, "what changed can not be read");
        }
    }
}

/// Makes signals of what the controller reports, and of its end.
async fn hear(link: Arc<Link>, controller: Rc<Controller>) {
    while controller.next_event().await.is_some() {
        link.signal.raise(CHANGED);
    }
    // One that takes no requests for events is looked at instead.
    while controller.closed().is_none() {
        reactor::sleep(LOOK).await;
    }
    link.signal.raise(LOST);
}

async fn shut_down(controller: Rc<Controller>) {
    // Nobody else has it: the task that heard its events is gone.
    if let Some(controller) = Rc::into_inner(controller) {
        controller.shutdown().await;
    }
}

/// Connects once to see whether an address leads to the same subsystem, and leaves.
pub(crate) async fn probe(options: ConnectOptions) -> Result<(), Error> {
    let controller = Controller::connect(&options).await?;
    match controller.closed() {
        Some(reason) if reason != CloseReason::Local => {
            Err(Error::Closed { address: options.address(), reason })
        }
        _ => {
            controller.shutdown().await;
            Ok(())
        }
    }
}
