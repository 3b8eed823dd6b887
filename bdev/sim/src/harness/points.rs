//! Every crash point of one recorded run.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::operator::Entry;
use super::runner::isolated;
use super::{Life, MakeStack, Options, Session, Summary};
use crate::{History, Image, Record, Rng, Survivors, Tear};

/// What was tried.
#[derive(Clone, Copy, Debug, Default)]
pub struct Points {
    /// Events of the recorded run: crash points.
    pub events: u64,
    /// Surfaces that were recovered and verified.
    pub surfaces: u64,
}

struct Recorded {
    record: Record,
    history: History,
    volumes: Vec<Entry>,
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
    seed: u64,
    stride: u64,
    limit: usize,
) -> Result<Points, String> {
    let recorded = isolated(&|seed| record(make, options, seed), seed)?;
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
        Ok(Points { events, surfaces: surfaces.into_inner() })
    } else {
        Err(failures.join("\n"))
    }
}

/// Creates the stack and puts it away, then opens it on a recording disk and works.
fn record(make: MakeStack<'_>, options: &Options, seed: u64) -> Result<Recorded, String> {
    let mut options = options.clone();
    options.disk.record = true;
    let mut life = Life {
        make,
        options: &options,
        rng: Rng::new(seed),
        history: History::new(),
        volumes: Vec::new(),
        made: 0,
        image: Image::zeroed(),
        created: false,
        generation: 0,
        summary: Summary::default(),
    };
    let powered = "the power stayed on";
    let session = life.power_up(false)?.ok_or(powered)?;
    life.put_away(session)?;
    let mut session = life.power_up(false)?.ok_or(powered)?;
    life.work(&mut session)?;
    session.step("close", |stack, machine| stack.close(machine))?;
    Ok(Recorded { record: session.disk.record(), history: life.history, volumes: life.volumes })
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
    let history = recorded.history.at(k);
    for (survivors, tear) in &ways {
        let image = recorded.record.image(k, *survivors, *tear, &mut rng);
        let mut session = Session::new(make, options, image, &mut rng)?;
        let (_, verdict) = session.recover(history.clone(), &mut recorded.volumes.clone());
        verdict.map_err(|e| format!("{survivors:?} of {volatile} survive, {tear:?}: {e}"))?;
    }
    Ok(ways.len() as u64)
}
