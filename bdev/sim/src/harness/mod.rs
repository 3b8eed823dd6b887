//! Power cuts under random workloads: for any [`Stack`] on a simulated disk, in the reactor's simulator.
//!
//! One seed is one life of a disk ([`life`]): the stack is created, used from several virtual cores, loses power after a
//! random event (also while it is created, recovers or closes), recovers from a surface that kept a random part of the
//! volatile writes, is verified block by block and checked, and so on for some rounds. [`every_point`] records one use (that may
//! begin with a recovery) and cuts the power after each of its events, with each way of losing one volatile write.

mod operator;
mod points;
mod runner;
mod session;
mod workload;

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Registry, Status};
use cryptfold_reactor::Handle;

pub use operator::{Deed, Manage};
pub use points::{Points, Recording, every_point};
pub use runner::seeds;
pub use workload::Mix;

use crate::{DiskOptions, History, Image, Rng, Survivors, Tear};
use operator::Entry;
use session::Session;

/// A future of one core.
pub type LocalFuture<T> = Pin<Box<dyn Future<Output = T>>>;

/// The simulated machine that a stack runs on. The stack's calls run on its first core.
#[derive(Clone)]
pub struct Machine {
    /// Its devices; empty but for the disk.
    pub registry: Arc<Registry>,
    /// Name of the disk.
    pub disk: String,
    /// Its virtual cores.
    pub cores: Vec<Handle>,
}

/// What is put to the test. A new one is made for every power-up.
pub trait Stack {
    /// Builds the stack on the disk for the first time. Called again, on whatever is left, when the power fails meanwhile.
    fn create(&self, machine: Machine) -> LocalFuture<Result<(), String>>;
    /// Brings it back from the disk.
    fn open(&self, machine: Machine) -> LocalFuture<Result<(), String>>;
    /// Names of the devices to use, the same each time.
    fn volumes(&self) -> Vec<String>;
    /// Device of what a deed makes of the device `of` under `name`.
    fn device(&self, of: &str, name: &str) -> String {
        match of.rsplit_once('/') {
            Some((parent, _)) => format!("{parent}/{name}"),
            None => name.into(),
        }
    }
    /// How often reads of this device that were under way may have been ended with Namespace Not Ready. Others may not.
    fn interruptions(&self, _device: &str) -> u64 {
        0
    }
    /// Changes its volumes while they are used. Stacks without that are given nothing to do ([`Options::deeds`]).
    fn manage(&self, _: Machine, deed: Deed) -> Manage {
        Box::pin(async move { Err(format!("{deed:?} is not possible")) })
    }
    /// The stack's own audit.
    fn check(&self, machine: Machine) -> LocalFuture<Result<(), String>>;
    /// Puts it away in order.
    fn close(&self, machine: Machine) -> LocalFuture<Result<(), String>>;
}

/// Makes a stack.
pub type MakeStack<'a> = &'a (dyn Fn() -> Rc<dyn Stack> + Sync);

/// What a run is like.
#[derive(Clone, Debug)]
pub struct Options {
    /// Virtual cores.
    pub cores: usize,
    /// The disk; a new one each power-up, with the content of the last.
    pub disk: DiskOptions,
    /// Workers, spread over the cores; each does one I/O at a time.
    pub workers: usize,
    /// Operations of each worker between two power cuts, at most.
    pub ops: u64,
    /// Changes of the volumes themselves between two power cuts, at most.
    pub deeds: u64,
    /// Whether they change sizes, too.
    pub resize: bool,
    /// Power-ups with a workload.
    pub rounds: u64,
    /// What the workers do.
    pub mix: Mix,
    /// Failures that the stack may report to a worker.
    pub allowed: fn(Status) -> bool,
    /// Simulator steps after which something hangs.
    pub step_limit: u64,
    /// The disk acknowledges flushes and ignores them (negative control).
    pub ignore_flush: bool,
    /// The disk ignores FUA (negative control).
    pub ignore_fua: bool,
}

impl Options {
    /// Four cores, six workers, `bytes` of disk.
    pub fn new(bytes: u64) -> Options {
        Options {
            cores: 4,
            disk: DiskOptions::new("disk", bytes),
            workers: 6,
            ops: 60,
            deeds: 0,
            resize: true,
            rounds: 3,
            mix: Mix::default(),
            allowed: |_| false,
            step_limit: 20_000_000,
            ignore_flush: false,
            ignore_fua: false,
        }
    }
}

/// What one life has seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// Power cuts.
    pub cuts: u64,
    /// Of them while the stack was created, recovered, verified or closed.
    pub nested: u64,
    /// Recoveries that were verified to the end.
    pub recoveries: u64,
    /// Changes of volumes (snapshots, clones, deletions, ...) that were done or interrupted.
    pub deeds: u64,
    /// Virtual time.
    pub time: Duration,
}

/// State of a disk's life between power-ups.
struct Life<'a> {
    make: MakeStack<'a>,
    options: &'a Options,
    rng: Rng,
    history: History,
    volumes: Vec<Entry>,
    /// Volumes ever made by the operator.
    made: u64,
    image: Image,
    created: bool,
    generation: u64,
    summary: Summary,
}

/// One life: see the module's head.
///
/// # Errors
/// What the stack did wrong, in words.
pub fn life(make: MakeStack<'_>, options: &Options, seed: u64) -> Result<Summary, String> {
    let mut life = Life::new(make, options, seed);
    for round in 0..options.rounds {
        life.round(true).map_err(|e| format!("round {round}: {e}"))?;
    }
    life.round(false).map_err(|e| format!("last round: {e}"))?;
    Ok(life.summary)
}

impl<'a> Life<'a> {
    fn new(make: MakeStack<'a>, options: &'a Options, seed: u64) -> Life<'a> {
        Life {
            make,
            options,
            rng: Rng::new(seed),
            history: History::new(),
            volumes: Vec::new(),
            made: 0,
            image: Image::zeroed(),
            created: false,
            generation: 0,
            summary: Summary::default(),
        }
    }

    /// Powers up (as often as it takes), works, and loses power or closes in order.
    fn round(&mut self, work: bool) -> Result<(), String> {
        let mut attempts = 0;
        let mut session = loop {
            let cut = work && attempts < 3 && self.rng.one_in(3);
            if let Some(session) = self.power_up(cut)? {
                break session;
            }
            attempts += 1;
        };
        if !work {
            return self.put_away(session);
        }
        // Early and late cuts alike.
        let most = self.options.ops * self.options.workers as u64 * 2;
        let events = if self.rng.one_in(2) { self.rng.magnitude(most) } else { self.rng.below(most) };
        session.disk.cut_power_after(events);
        if !self.work(&mut session)? {
            self.summary.cuts += 1;
            return self.power_down(session);
        }
        match self.rng.below(3) {
            0 => self.put_away(session),
            _ => {
                self.summary.cuts += 1;
                self.power_down(session)
            }
        }
    }

    /// Creates or recovers, verifies and checks. None: the power went off meanwhile.
    fn power_up(&mut self, cut: bool) -> Result<Option<Session>, String> {
        let mut session = Session::new(self.make, self.options, self.image.clone(), &mut self.rng)?;
        if cut {
            session.disk.cut_power_after(self.rng.magnitude(400));
        }
        let up = if self.created { self.recover(&mut session)? } else { self.create(&mut session)? };
        if !up {
            self.summary.cuts += 1;
            self.summary.nested += 1;
            self.power_down(session)?;
            return Ok(None);
        }
        session.disk.cut_power_after(u64::MAX / 2);
        Ok(Some(session))
    }

    fn create(&mut self, session: &mut Session) -> Result<bool, String> {
        if session.step("create", |stack, machine| stack.create(machine))?.is_none() {
            return Ok(false);
        }
        self.created = true;
        for name in session.stack.volumes() {
            let bdev = session.machine.registry.get(&name).map_err(|e| e.to_string())?;
            let id = self.history.add_volume(&name, bdev.block_size_bytes() as usize);
            self.volumes.push(Entry::first(&name, id));
        }
        Ok(true)
    }

    fn recover(&mut self, session: &mut Session) -> Result<bool, String> {
        let history = std::mem::take(&mut self.history);
        let (history, verdict) = session.recover(history, &mut self.volumes);
        self.history = history;
        if verdict? {
            self.summary.recoveries += 1;
            return Ok(true);
        }
        Ok(false)
    }

    /// False: the power went off.
    fn work(&mut self, session: &mut Session) -> Result<bool, String> {
        let history = std::mem::take(&mut self.history);
        let (history, verdict) = session.work(
            history,
            &mut self.volumes,
            (&mut self.made, &mut self.summary.deeds),
            &mut self.generation,
            &mut self.rng,
        );
        self.history = history;
        verdict
    }

    fn put_away(&mut self, mut session: Session) -> Result<(), String> {
        if session.step("close", |stack, machine| stack.close(machine))?.is_some() {
            self.history.closed();
        } else {
            self.summary.nested += 1;
        }
        self.summary.cuts += 1;
        self.power_down(session)
    }

    fn power_down(&mut self, session: Session) -> Result<(), String> {
        let survivors = match self.rng.below(8) {
            0 => Survivors::None,
            1 => Survivors::All,
            2 => Survivors::AllBut(self.rng.below(session.disk.volatile() as u64) as usize),
            3 => Survivors::Only(self.rng.below(session.disk.volatile() as u64) as usize),
            4 => Survivors::Prefix(self.rng.below(session.disk.volatile() as u64 + 1) as usize),
            _ => Survivors::Random,
        };
        let tear = if self.rng.one_in(2) { Tear::Sectors } else { Tear::Whole };
        self.image = session.disk.crash(survivors, tear, &mut self.rng);
        self.summary.time += Duration::from_nanos(session.sim.now().0);
        Ok(())
    }
}
