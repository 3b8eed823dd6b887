//! Every crash point of one recorded run.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::operator::Entry;
use super::runner::isolated;
use super::{Life, MakeStack, Options, Session};
use crate::{History, Record, Rng, Survivors, Tear};

/// What was tried.
#[derive(Clone, Copy, Debug, Default)]
pub struct Points {
    /// Events of the recorded run: crash points.
    pub events: u64,
    /// Of them while the stack was opened and verified.
    pub opening: u64,
    /// Surfaces that were recovered and verified.
    pub surfaces: u64,
}

/// What is recorded.
#[derive(Clone, Copy, Debug)]
pub struct Recording<'a> {
    /// Where everything drawn comes from.
    pub seed: u64,
    /// Work that is done before, and not recorded: [`Options::rounds`] of it.
    pub before: Option<&'a Options>,
    /// The power fails after that, so that what is recorded begins with a recovery.
    pub recovery: bool,
}

impl Recording<'_> {
    /// A use of a stack that was just created.
    pub fn new(seed: u64) -> Recording<'static> {
        Recording { seed, before: None, recovery: false }
    }
}

/// What was written and what is where, as far as it can be known.
#[derive(Clone)]
struct Known {
    history: History,
    volumes: Vec<Entry>,
}

struct Recorded {
    record: Record,
    /// Before the recorded run, and after how many of its events it was opened and verified.
    before: Known,
    opened: u64,
    after: Known,
}

/// Records one workload, then recovers from the surfaces of a power cut after each `stride`th of its events: nothing
/// volatile survives, all of it does, every prefix, every write lost alone, every write surviving alone, and two random
/// ones with torn writes; at most `limit` (randomly chosen) of them per event. Uses all cores.
///
/// # Errors
/// The first crash points at which the stack did something wrong.
pub fn every_point(
    make: MakeStack<'_>,
    options: &Options,
    recording: &Recording<'_>,
    stride: u64,
    limit: usize,
) -> Result<Points, String> {
    let seed = recording.seed;
    let recorded = isolated(&|_| record(make, options, recording), seed)?;
    let events = recorded.record.events();
    let next = AtomicU64::new(0);
    let surfaces = AtomicU64::new(0);
    let failures: Mutex<Vec<String>> = Mutex::default();
    let work = || loop {
        let k = next.fetch_add(stride.max(1), Ordering::Relaxed);
        let enough = failures.lock().unwrap_or_else(PoisonError::into_inner).len() >= 5;
        if k > events || enough {
            return;
        }
        match isolated(&|k| point(make, options, &recorded, seed, k, limit), k) {
            Ok(tried) => drop(surfaces.fetch_add(tried, Ordering::Relaxed)),
            Err(what) => failures
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(format!("seed {seed}, cut after event {k} of {events}: {what}")),
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    if failures.is_empty() {
        Ok(Points { events, opening: recorded.opened, surfaces: surfaces.into_inner() })
    } else {
        Err(failures.join("\n"))
    }
}

/// Creates the stack, works unrecorded, puts it away or cuts its power; then opens it on a recording disk, works, and closes.
fn record(make: MakeStack<'_>, options: &Options, recording: &Recording<'_>) -> Result<Recorded, String> {
    let mut recorded = options.clone();
    recorded.disk.record = true;
    let mut life = Life::new(make, recording.before.unwrap_or(options), recording.seed);
    let powered = "the power stayed on";
    let mut session = life.power_up(false)?.ok_or(powered)?;
    for round in 0..recording.before.map_or(0, |before| before.rounds) {
        if round > 0 {
            life.put_away(session)?;
            session = life.power_up(false)?.ok_or(powered)?;
        }
        life.work(&mut session)?;
    }
    if recording.recovery {
        life.power_down(session)?
    } else {
        life.put_away(session)?
    }
    life.options = &recorded;
    life.history.restart_stamps();
    let before = Known { history: life.history.clone(), volumes: life.volumes.clone() };
    let mut session = life.power_up(false)?.ok_or(powered)?;
    let opened = session.disk.events();
    life.work(&mut session)?;
    session.step("close", |stack, machine| stack.close(machine))?;
    let after = Known { history: life.history, volumes: life.volumes };
    Ok(Recorded { record: session.disk.record(), before, opened, after })
}

fn point(
    make: MakeStack<'_>,
    options: &Options,
    recorded: &Recorded,
    seed: u64,
    k: u64,
    limit: usize,
) -> Result<u64, String> {
    let mut rng = Rng::new(seed ^ k.rotate_left(20));
    let volatile = recorded.record.volatile(k);
    let mut ways = vec![(Survivors::None, Tear::Whole), (Survivors::Random, Tear::Sectors)];
    if volatile > 0 {
        ways.extend([(Survivors::All, Tear::Whole), (Survivors::Random, Tear::Sectors)]);
    }
    if volatile > 1 {
        for n in 0..volatile {
            ways.extend(
                [Survivors::AllBut(n), Survivors::Only(n), Survivors::Prefix(n)].map(|s| (s, Tear::Whole)),
            );
        }
    }
    while ways.len() > limit.max(1) {
        ways.swap_remove(rng.below(ways.len() as u64) as usize);
    }
    // What the opening has shown counts when it was over.
    let known = match k <= recorded.opened {
        true => recorded.before.clone(),
        false => Known { history: recorded.after.history.at(k), volumes: recorded.after.volumes.clone() },
    };
    for (survivors, tear) in &ways {
        let image = recorded.record.image(k, *survivors, *tear, &mut rng);
        let mut session = Session::new(make, options, image, &mut rng)?;
        let (_, verdict) = session.recover(known.history.clone(), &mut known.volumes.clone());
        verdict.map_err(|e| format!("{survivors:?} of {volatile} survive, {tear:?}: {e}"))?;
    }
    Ok(ways.len() as u64)
}
