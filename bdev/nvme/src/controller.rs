//! A controller: what all its reactors share, and how it is found by the parts of it that live on them.
//!
//! Its home reactor owns the admin queue and every change of state (`home`); each reactor with a queue pair owns that (`pair`).
//! They talk by message. What is here is constant, atomic, or touched by set-up and control calls only.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cryptfold_bdev::{BdevError, Io, Registry, Status};
use cryptfold_nvmf_spec::identify::{IdentifyController, sgls};
use cryptfold_reactor::{self as reactor, Handle};

use crate::admin::AdminError;
use crate::bus::{ALL_ONES, Bus, BusError};
use crate::home::Home;
use crate::lifecycle::{Event, State};
use crate::pair::Pair;

/// Events that are remembered.
const EVENTS_KEPT: usize = 32;

/// How controllers are driven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// An I/O command that takes longer is aborted; one that takes twice as long has the controller reset.
    pub io_timeout: Duration,
    /// An admin command that takes longer has the controller reset.
    pub admin_timeout: Duration,
    /// Times that a command is sent again after an abort or a reset that was not its fault.
    pub retries: u8,
    /// Entries of an I/O queue, at most.
    pub queue_depth: u16,
    /// I/O queue pairs, at most; the drive and the number of reactors limit them too.
    pub max_pairs: u16,
    /// How often an idle controller is looked at.
    pub look_period: Duration,
    /// Whether the drive sends interrupts, so that reactors may sleep. Without, those that want to sleep keep polling.
    pub interrupts: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            io_timeout: Duration::from_secs(8),
            admin_timeout: Duration::from_secs(8),
            retries: 3,
            queue_depth: 256,
            max_pairs: 64,
            look_period: Duration::from_secs(1),
            interrupts: true,
        }
    }
}

/// What can go wrong with a controller as a whole.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NvmeError {
    /// The system below refuses.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// An admin command failed.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// It did not do in time what its registers promise.
    #[error("the controller did not become {what} within {seconds} s")]
    Never {
        /// "ready" or "disabled".
        what: &'static str,
        /// The limit, from CAP.TO or CRTO.
        seconds: f32,
    },
    /// It is up, and does not answer all of what it was asked meanwhile.
    #[error("no answer to {0}")]
    Silent(&'static str),
    /// CSTS.CFS.
    #[error("the controller reports a fatal status (CSTS.CFS)")]
    Fatal,
    /// Registers read as all ones.
    #[error(
        "the controller does not answer (all registers read as ones): it is gone, or its memory space is off"
    )]
    Vanished,
    /// It lacks what the driver needs.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// It is another one than before the reset.
    #[error("after the reset another controller answered: serial number \"{0}\"")]
    Another(String),
    /// Not in this state.
    #[error("the controller is {0}")]
    State(&'static str),
    /// A device of it can not be registered.
    #[error(transparent)]
    Bdev(#[from] BdevError),
    /// A reactor has stopped.
    #[error(transparent)]
    Reactor(#[from] reactor::ReactorGone),
    /// Somebody holds its devices open.
    #[error("its devices were not closed within {0} s")]
    Busy(u64),
}

impl NvmeError {
    /// The negative errno that SPDK's clients expect for this.
    pub fn code(&self) -> i32 {
        match self {
            NvmeError::Bus(e) => -e.errno,
            NvmeError::Bdev(e) => e.code(),
            NvmeError::Vanished => -19,
            NvmeError::Unsupported(_) => -95,
            NvmeError::State(_) | NvmeError::Busy(_) => -16,
            _ => -5,
        }
    }
}

/// What a controller has been through. Counters only grow.
#[derive(Debug, Default)]
pub struct Counters {
    /// Commands that ended with an error status.
    pub errors: AtomicU64,
    /// I/O commands that took longer than the limit.
    pub timeouts: AtomicU64,
    /// Abort commands sent.
    pub aborts: AtomicU64,
    /// Resets begun, and those that failed.
    pub resets: AtomicU64,
    /// Resets that failed.
    pub failed_resets: AtomicU64,
    /// Completions of commands that nobody had sent.
    pub bogus: AtomicU64,
    /// Commands whose data went through a buffer of the driver.
    pub bounced: AtomicU64,
    /// Asynchronous events.
    pub events: AtomicU64,
}

/// What a reactor tells a controller's home.
#[derive(Debug)]
pub(crate) enum Notice {
    /// This command takes too long: abort it.
    Expired { qid: u16, cid: u16 },
    /// Somebody asked to abort this command.
    Abort { qid: u16, cid: u16 },
    /// The controller has to be reset, for this reason.
    ResetNeeded(String),
    /// Its registers read as all ones.
    Vanished,
}

/// A controller that is attached. Any thread.
pub struct Controller {
    /// Name, of which its devices' names are made: `NAMEn1`.
    pub name: String,
    pub(crate) uid: u64,
    pub(crate) bus: Arc<dyn Bus>,
    /// Owns the admin queue.
    pub(crate) home: Handle,
    /// Reactors that use it.
    pub(crate) cores: Vec<Handle>,
    pub(crate) registry: Arc<Registry>,
    /// How it is driven.
    pub options: Options,
    state: AtomicU8,
    /// What it has been through.
    pub counters: Counters,
    identity: Mutex<Box<IdentifyController>>,
    sgl: AtomicBool,
    /// Owners of the queue pairs, in the order of their identifiers.
    pub(crate) owners: Mutex<Vec<Handle>>,
    /// Registered namespaces and their devices' names.
    pub(crate) namespaces: Mutex<BTreeMap<u32, String>>,
    events: Mutex<VecDeque<String>>,
}

/// Takes a lock whose holder panicked as it is.
pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Local<T> {
    uid: u64,
    /// More than one reactor may run on a thread (in the simulator).
    reactor: Handle,
    part: Weak<T>,
}

thread_local! {
    static PAIRS: RefCell<Vec<Local<Pair>>> = const { RefCell::new(Vec::new()) };
    static HOMES: RefCell<Vec<Local<Home>>> = const { RefCell::new(Vec::new()) };
}

fn find<T>(all: &RefCell<Vec<Local<T>>>, uid: u64, index: impl Fn(&T) -> bool) -> Option<Rc<T>> {
    let mine = |l: &&Local<T>| l.uid == uid && l.reactor.is_current();
    all.borrow().iter().filter(mine).filter_map(|l| l.part.upgrade()).find(|part| index(part))
}

fn add<T>(all: &RefCell<Vec<Local<T>>>, uid: u64, part: &Rc<T>) {
    let mut all = all.borrow_mut();
    all.retain(|l| l.part.strong_count() > 0);
    all.push(Local { uid, reactor: reactor::current(), part: Rc::downgrade(part) });
}

impl Controller {
    pub(crate) fn new(
        name: String,
        bus: Arc<dyn Bus>,
        cores: Vec<Handle>,
        registry: Arc<Registry>,
        options: Options,
    ) -> Controller {
        static UIDS: AtomicU64 = AtomicU64::new(1);
        Controller {
            name,
            uid: UIDS.fetch_add(1, Ordering::Relaxed),
            bus,
            home: reactor::current(),
            cores,
            registry,
            options,
            state: AtomicU8::new(State::Attaching as u8),
            counters: Counters::default(),
            identity: Mutex::new(Box::default()),
            sgl: AtomicBool::new(false),
            owners: Mutex::default(),
            namespaces: Mutex::default(),
            events: Mutex::default(),
        }
    }

    /// Where it is in its life.
    pub fn state(&self) -> State {
        State::from_u8(self.state.load(Ordering::Acquire))
    }

    /// Moves it on; false when the event changes nothing in its state. Home only, so nobody moves it in between.
    pub(crate) fn on(&self, event: Event) -> bool {
        let state = self.state();
        let Some(next) = state.on(event) else { return false };
        tracing::info!("{}: {} -> {} ({event:?})", self.name, state.name(), next.name());
        self.state.store(next as u8, Ordering::Release);
        true
    }

    /// Who it is on its bus.
    pub fn address(&self) -> crate::bus::Address {
        self.bus.address()
    }

    /// What it said of itself.
    pub fn identity(&self) -> Box<IdentifyController> {
        lock(&self.identity).clone()
    }

    pub(crate) fn set_identity(&self, id: &IdentifyController) {
        **lock(&self.identity) = *id;
        let offered = sgls::SUPPORTED | sgls::DWORD_ALIGNED;
        self.sgl.store(id.sgls.get() & offered != 0, Ordering::Relaxed);
    }

    pub(crate) fn offers_sgl(&self) -> bool {
        self.sgl.load(Ordering::Relaxed)
    }

    /// Names of its devices, by namespace.
    pub fn devices(&self) -> BTreeMap<u32, String> {
        lock(&self.namespaces).clone()
    }

    /// I/O queue pairs in use.
    pub fn pairs(&self) -> usize {
        lock(&self.owners).len()
    }

    /// The latest events (asynchronous ones, resets and why), oldest first.
    pub fn events(&self) -> Vec<String> {
        lock(&self.events).iter().cloned().collect()
    }

    pub(crate) fn note(&self, event: String) {
        tracing::warn!("{}: {event}", self.name);
        let mut events = lock(&self.events);
        if events.len() == EVENTS_KEPT {
            events.pop_front();
        }
        events.push_back(event);
    }

    /// From any reactor.
    pub(crate) fn tell(self: &Arc<Self>, notice: Notice) {
        let this = self.clone();
        self.home.send(move || {
            if let Some(home) = this.here() {
                home.notice(notice);
            }
        });
    }

    /// What CSTS says beyond being ready.
    pub(crate) fn look_at_status(self: &Arc<Self>, csts: u32) {
        if csts == ALL_ONES {
            self.tell(Notice::Vanished);
        } else if csts & 2 != 0 {
            self.tell(Notice::ResetNeeded("fatal status (CSTS.CFS)".into()));
        }
    }

    /// The part that lives on the home reactor, there.
    pub(crate) fn here(&self) -> Option<Rc<Home>> {
        HOMES.with(|all| find(all, self.uid, |_| true))
    }

    pub(crate) fn add_home(&self, home: &Rc<Home>) {
        HOMES.with(|all| add(all, self.uid, home));
    }

    /// Queue pair `index`, on its owner.
    pub(crate) fn pair(&self, index: usize) -> Option<Rc<Pair>> {
        PAIRS.with(|all| find(all, self.uid, |p| p.index == index))
    }

    pub(crate) fn add_pair(&self, pair: &Rc<Pair>) {
        PAIRS.with(|all| add(all, self.uid, pair));
    }

    /// Which pair a reactor uses, and its owner.
    pub(crate) fn pair_for(&self, reactor: &Handle) -> Option<(usize, Handle)> {
        let owners = lock(&self.owners);
        let own = owners.iter().position(|o| o == reactor);
        let index = own.or_else(|| (reactor.id().0 as usize).checked_rem(owners.len()))?;
        Some((index, owners[index].clone()))
    }

    /// Resets the controller for an I/O that asks for it, which ends when that is done.
    pub(crate) fn reset_for(self: Arc<Self>, io: Box<Io>) {
        reactor::spawn_local(async move {
            let status = match self.reset().await {
                Ok(()) => Status::SUCCESS,
                Err(_) => Status::INTERNAL_ERROR,
            };
            io.up(status);
        })
        .detach();
    }

    /// Resets the controller and waits for the end of it. From any reactor. I/O waits meanwhile and is sent again.
    ///
    /// # Errors
    /// It does not come back, or is gone.
    pub async fn reset(self: &Arc<Self>) -> Result<(), NvmeError> {
        let this = self.clone();
        self.home
            .call(move || async move {
                let home = this.here().ok_or(NvmeError::State(this.state().name()))?;
                home.reset("asked for".into()).await
            })
            .await?
    }
}
