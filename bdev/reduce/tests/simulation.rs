//! The pool on a simulated disk that loses power at random events, also while the pool is created, recovers, collects
//! garbage or closes: every block is what the history allows, and the audit is clean.
//!
//! `CRYPTFOLD_SEEDS` sets the number of seeds, `CRYPTFOLD_SEED` runs one; `CRYPTFOLD_SURFACES` sets how many surfaces are tried
//! at each point of the recorded runs (0: all of them), every one of which is tried when it is set. `scripts/sim-seeds` does both.

mod support;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cryptfold_bdev::{Access, Status};
use cryptfold_bdev_sim::harness::{
    Deed, LocalFuture, Machine, Manage, Options, Recording, Stack, Summary, every_point, life, seeds,
};
use cryptfold_reactor as reactor;
use cryptfold_reduce::block::Block;
use cryptfold_reduce::keys::PoolKeys;
use cryptfold_reduce::{CreateOptions, KeyChange, LocalPool, PoolError, ScrubState, VolumeOptions};
use cryptfold_reduce_format::fingerprint::HashId;
use cryptfold_reduce_format::segment::{Cipher, SegmentHeader};
use support::key;

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 24 * MIB;

/// A pool with volumes of both block sizes, two of them in one domain, one in another.
#[derive(Default)]
struct PoolStack {
    pool: Rc<RefCell<Option<LocalPool>>>,
    /// The index keeps one fingerprint in 256; the rest is found late.
    sampled: bool,
    /// The keys of both domains are changed, again and again: new ones, encryption off, encryption on.
    rotating: bool,
    /// With the algorithms of the FIPS modes; these keep encryption on.
    approved: bool,
    /// Snapshots that were deleted.
    deleted: Rc<Cell<u64>>,
    seen: Arc<Seen>,
}

/// Stored bytes a second that are rewritten under new keys: about as fast as hosts write here.
const RENEWAL: u64 = 100_000_000;

/// Changes the keys of all domains that are not being changed.
async fn rotate(pool: &LocalPool) -> Result<(), String> {
    for domain in pool.domains() {
        let change = match (domain.encrypted, domain.generation % 3) {
            (false, _) => KeyChange::Enable,
            (true, 0) if !pool.info().approved => KeyChange::Disable,
            (true, _) => KeyChange::Rotate,
        };
        match pool.change_domain_keys(&domain.name, change, RENEWAL).await {
            Ok(()) | Err(PoolError::Busy(_)) => {}
            Err(error) => return Err(text(error)),
        }
    }
    Ok(())
}

/// Waits until all keys are changed, and looks at the device: everything that lives is in a segment whose header names its domain's
/// present generation.
async fn all_renewed(pool: &LocalPool, machine: &Machine) -> Result<(), String> {
    pool.start_renewal(1 << 40).map_err(|status| status.to_string())?;
    while pool.info().renewal.state == ScrubState::Running {
        reactor::sleep(Duration::from_millis(1)).await;
    }
    let renewal = pool.info().renewal;
    let changing = pool.domains().into_iter().find(|domain| domain.changing || domain.old_bytes > 0);
    if renewal.state != ScrubState::Done || changing.is_some() {
        return Err(format!("{renewal:?} leaves {changing:?}"));
    }
    let keys = PoolKeys::derive(&pool.pool_key(), pool.info().uuid);
    let disk = machine.registry.open(&machine.disk, Access::ReadOnly, |_| ()).map_err(|e| e.to_string())?;
    let (channel, size) = (disk.channel().map_err(|e| e.to_string())?, disk.bdev().block_size_bytes());
    let blocks = u64::from(4096 / size);
    for at in pool.live_segments() {
        let read = channel.read(at / 4096 * blocks, blocks).await.map_err(|status| status.to_string())?;
        let block: Block = read.to_contiguous().as_slice().try_into().map_err(|_| "a short block")?;
        let header = SegmentHeader::parse(&block, at).and_then(|header| header.verify(keys.block()));
        let header = header.map_err(|error| format!("segment at {at}: {error}"))?;
        let domain = pool.domains().into_iter().find(|domain| domain.id == header.domain);
        let Some(domain) = domain else { continue };
        let (cipher, hash) = match (domain.encrypted, pool.info().approved) {
            (false, _) => (Cipher::Gmac, HashId::Blake3),
            (true, false) => (Cipher::Gcm, HashId::Blake3),
            (true, true) => (Cipher::GcmStoredNonce, HashId::HmacSha256),
        };
        if (header.generation.0, header.cipher, header.hash) != (domain.generation, cipher, hash) {
            return Err(format!("{domain:?} lives in {header:?}"));
        }
    }
    Ok(())
}

/// What happened in the last run that was closed in order.
#[derive(Default)]
struct Seen {
    /// Bytes that were moved to empty segments.
    moved: AtomicU64,
    /// Snapshots that were deleted.
    deleted: AtomicU64,
}

/// Late deduplication from the opening on, a container at a time.
fn sample(pool: &LocalPool) -> Result<(), String> {
    pool.sample_index(8);
    pool.limit_neighbours(1);
    pool.start_late(Some(1)).map(drop).map_err(|status| status.to_string())
}

/// An audit beside whatever else happens. One that the end of the pool, or of the disk, has ended says nothing.
async fn audit(pool: &LocalPool, data: bool) -> Result<bool, String> {
    match pool.check(data).await {
        Ok(report) if !report.is_clean() => Err(format!("an audit beside hosts: {:?}", report.problems)),
        Ok(_) => Ok(true),
        Err(_) => Ok(false),
    }
}

const VOLUMES: [(&str, u64, u32, Option<&str>); 4] = [
    ("a", 4 * MIB, 4096, None),
    ("b", 3 * MIB, 4096, None),
    ("small", MIB, 512, None),
    ("other", MIB, 4096, Some("tenant")),
];

/// Every few commits, for pools of the FIPS modes.
const SEALS_OF_A_JOURNAL_KEY: u64 = 20;

fn text(error: PoolError) -> String {
    error.to_string()
}

impl PoolStack {
    fn current(&self) -> Result<LocalPool, String> {
        self.pool.borrow().clone().ok_or_else(|| "no pool is open".into())
    }
}

impl Stack for PoolStack {
    fn create(&self, machine: Machine) -> LocalFuture<Result<(), String>> {
        let (slot, sampled, rotating) = (self.pool.clone(), self.sampled, self.rotating);
        let approved = self.approved;
        Box::pin(async move {
            let mut options = CreateOptions { approved, ..CreateOptions::new(key()) };
            options.force = true;
            options.segment_bytes = Some(MIB as u32);
            options.memory_budget = Some(MEMORY);
            let pool =
                LocalPool::create(&machine.registry, &machine.disk, "pool", &options).await.map_err(text)?;
            pool.limit_journal_keys(SEALS_OF_A_JOURNAL_KEY);
            *slot.borrow_mut() = Some(pool.clone());
            pool.create_domain("tenant").await.map_err(text)?;
            for (name, size_bytes, block, domain) in VOLUMES {
                let options = VolumeOptions {
                    name: name.into(),
                    size_bytes,
                    block_size: Some(block),
                    domain: domain.map(str::to_owned),
                    ..VolumeOptions::default()
                };
                pool.create_volume(&options).await.map_err(text)?;
            }
            if sampled {
                sample(&pool)?;
            }
            if rotating { rotate(&pool).await } else { Ok(()) }
        })
    }

    fn open(&self, machine: Machine) -> LocalFuture<Result<(), String>> {
        let (slot, sampled, rotating) = (self.pool.clone(), self.sampled, self.rotating);
        Box::pin(async move {
            let pool = LocalPool::open(&machine.registry, &machine.disk, &key(), Some(MEMORY)).await;
            let pool = pool.map_err(text)?.ok_or("no pool on the disk")?;
            pool.limit_journal_keys(SEALS_OF_A_JOURNAL_KEY);
            *slot.borrow_mut() = Some(pool.clone());
            if sampled {
                sample(&pool)?;
            }
            if rotating { rotate(&pool).await } else { Ok(()) }
        })
    }

    fn volumes(&self) -> Vec<String> {
        VOLUMES.iter().map(|(name, ..)| format!("pool/{name}")).collect()
    }

    fn manage(&self, _: Machine, deed: Deed) -> Manage {
        let (pool, rotating, deleted) = (self.current(), self.rotating, self.deleted.clone());
        Box::pin(async move {
            let pool = pool?;
            // Devices are POOL/NAME.
            let own = |name: &str| name.rsplit('/').next().unwrap_or_default().to_owned();
            let done = match &deed {
                // Hosts go on meanwhile.
                Deed::Maintain { how, .. } if how % 8 == 2 => return audit(&pool, how % 16 == 2).await,
                Deed::Snapshot { of, name } => pool.snapshot_volume(&own(of), name).await.map(drop),
                Deed::Clone { of, name } => pool.clone_volume(&own(of), name).await.map(drop),
                Deed::Delete { name } => {
                    let done = pool.delete_volume(&own(name)).await;
                    let counts = done.is_ok() && own(name).starts_with("snap");
                    deleted.set(deleted.get() + u64::from(counts));
                    done
                }
                Deed::Resize { name, bytes } => pool.resize_volume(&own(name), *bytes).await.map(drop),
                Deed::Maintain { .. } if rotating => return rotate(&pool).await.map(|()| true),
                Deed::Maintain { how, .. } if how % 4 == 3 => pool
                    .start_late(Some(1 + how / 4 % 3))
                    .map(drop)
                    .map_err(|status| PoolError::Stopped { pool: "pool".into(), status }),
                Deed::Maintain { name, how } => pool.own_volume(&own(name), how % 2 == 0).await,
            };
            match done {
                Ok(()) => Ok(true),
                Err(PoolError::HasClones { .. }) => Ok(false),
                Err(PoolError::Invalid(_)) if matches!(deed, Deed::Maintain { .. }) => Ok(false),
                Err(error) => Err(text(error)),
            }
        })
    }

    fn check(&self, machine: Machine) -> LocalFuture<Result<(), String>> {
        let (pool, rotating) = (self.current(), self.rotating);
        Box::pin(async move {
            let pool = pool?;
            if rotating {
                all_renewed(&pool, &machine).await?;
            }
            let report = pool.check(true).await.map_err(|status| status.to_string())?;
            let info = pool.info();
            if !report.is_clean() {
                return Err(format!("{} problems: {:?}", report.problem_count, report.problems));
            }
            match (info.damaged, info.failed) {
                (0, None) => Ok(()),
                (damaged, failed) => Err(format!("{damaged} damaged, failed: {failed:?}")),
            }
        })
    }

    fn close(&self, _: Machine) -> LocalFuture<Result<(), String>> {
        let (pool, seen, deleted) = (self.pool.borrow_mut().take(), self.seen.clone(), self.deleted.clone());
        Box::pin(async move {
            let pool = pool.ok_or("no pool is open")?;
            seen.moved.store(pool.info().moved_bytes, Ordering::Relaxed);
            seen.deleted.store(deleted.get(), Ordering::Relaxed);
            pool.close().await.map_err(text)
        })
    }
}

fn pool() -> Rc<dyn Stack> {
    Rc::new(PoolStack::default())
}

/// One seed in three finds most of its duplicates late.
fn life_of(seed: u64) -> Result<Summary, String> {
    let make = || -> Rc<dyn Stack> { Rc::new(PoolStack { sampled: seed % 3 == 1, ..PoolStack::default() }) };
    life(&make, &options(seed), seed)
}

/// Seeds differ in what they stress, too.
fn options(seed: u64) -> Options {
    let mut options = Options::new(40 * MIB);
    options.step_limit = 1_500_000;
    // Writes behind the end of a volume that has just shrunk.
    options.allowed = |status| status == Status::LBA_OUT_OF_RANGE;
    options.deeds = if seed % 8 < 6 { 30 } else { 0 };
    match seed % 4 {
        // Large writes: the log wraps and garbage is collected.
        0 => {
            options.ops = 400;
            options.rounds = 2;
            options.mix.max_bytes = 512 << 10;
            options.mix.sets = 2000;
        }
        // Many small ones over few blocks, often flushed.
        1 => {
            options.ops = 200;
            options.mix.max_bytes = 16 << 10;
            options.mix.flush = 25;
        }
        // A disk with small blocks.
        2 => options.disk.block_bytes = 512,
        _ => {}
    }
    options
}

const AGAIN: &str = "cargo test --release -p cryptfold-reduce --test simulation power_cuts";

fn default_seeds() -> u64 {
    if cfg!(debug_assertions) { 24 } else { 1000 }
}

#[test]
fn power_cuts_at_random_events() {
    seeds(AGAIN, default_seeds(), life_of);
}

/// Seeds that failed once: 72, 106, 543 ran out of room for prepared groups; 328, 1000, 3424 were refused space that the
/// collector was about to make.
#[test]
fn power_cuts_of_seeds_that_failed_once() {
    for seed in [72, 106, 328, 543, 1000, 3424] {
        life_of(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }
}

/// Surfaces that are tried at each point, and which points: each one, if that was asked for, otherwise about `few`.
fn effort(few: u64) -> (usize, impl Fn(u64) -> u64) {
    let asked = std::env::var("CRYPTFOLD_SURFACES").ok();
    let surfaces = asked.as_ref().map_or(3, |n| n.parse().expect("CRYPTFOLD_SURFACES is no number"));
    let every = asked.is_some() || !cfg!(debug_assertions);
    (if surfaces == 0 { usize::MAX } else { surfaces }, move |n| if every { 1 } else { n / few + 1 })
}

/// Cuts the power at the points of a run; gives what was seen in it.
fn points_of(name: &str, options: &Options, recording: &Recording<'_>, about: u64) -> Arc<Seen> {
    let seen = Arc::<Seen>::default();
    let make = || -> Rc<dyn Stack> { Rc::new(PoolStack { seen: seen.clone(), ..PoolStack::default() }) };
    let (surfaces, stride) = effort(40);
    let stride = stride(about);
    let points = every_point(&make, options, recording, stride, surfaces).unwrap();
    println!(
        "{name}: {} events, {} of them while it was opened; power cut after each{}, {} surfaces recovered and verified",
        points.events,
        points.opening,
        if stride > 1 { format!(" {stride}th") } else { String::new() },
        points.surfaces
    );
    assert!(points.surfaces >= points.events / stride, "{points:?}");
    seen
}

#[test]
fn power_cuts_at_every_event_of_a_use() {
    let options = Options { ops: 6, ..options(3) };
    points_of("use", &options, &Recording::new(77), 400);
}

/// What comes before is cut off while much of it is in the journal.
#[test]
fn power_cuts_at_every_event_of_a_recovery() {
    let before = Options { rounds: 1, ..options(1) };
    let options = Options { ops: 3, deeds: 4, ..options(3) };
    let recording = Recording { before: Some(&before), recovery: true, ..Recording::new(78) };
    points_of("recovery", &options, &recording, 400);
}

/// The disk is full of what has been overwritten, and of snapshots.
#[test]
fn power_cuts_at_every_event_of_collection_and_deletion() {
    let before = Options { ops: 150, ..options(0) };
    let options = Options { ops: 5, deeds: 12, ..options(0) };
    let recording = Recording { before: Some(&before), ..Recording::new(79) };
    let seen = points_of("collection and deletion", &options, &recording, 400);
    let (moved, deleted) = (seen.moved.load(Ordering::Relaxed), seen.deleted.load(Ordering::Relaxed));
    println!("{moved} bytes moved, {deleted} snapshots deleted");
    assert!(moved > 0 && deleted > 0);
}

fn rotating(seed: u64) -> Rc<dyn Stack> {
    Rc::new(PoolStack { rotating: true, sampled: seed % 3 == 1, ..PoolStack::default() })
}

/// Hosts read and write, snapshots and clones come and go, and the power fails, while keys change; after each recovery the changes
/// go on to their end.
#[test]
fn power_cuts_while_keys_change() {
    let again = "cargo test --release -p cryptfold-reduce --test simulation power_cuts_while";
    let life_of = |seed| life(&|| rotating(seed), &options(seed), seed);
    seeds(again, if cfg!(debug_assertions) { 16 } else { 100 }, life_of);
}

#[test]
fn power_cuts_at_every_event_of_a_change_of_keys() {
    let mut options = options(3);
    options.ops = 4;
    // Many events, and each recovery goes on with the change to its end.
    let (surfaces, all) = match std::env::var("CRYPTFOLD_SURFACES") {
        Ok(_) => (effort(1).0, true),
        Err(_) => (3, false),
    };
    let stride = if all { 1 } else { 11 };
    let points = every_point(&|| rotating(0), &options, &Recording::new(78), stride, surfaces).unwrap();
    println!("{points:?}");
    assert!(points.events > 100 && points.surfaces >= points.events / stride);
}

/// Fragments, nodes and batches with stored nonces, fingerprints of the other hash; every other seed changes keys as well.
#[test]
fn power_cuts_in_pools_of_the_fips_modes() {
    let again = "cargo test --release -p cryptfold-reduce --test simulation power_cuts_in";
    let make = |seed: u64| -> Rc<dyn Stack> {
        let (sampled, rotating) = (seed % 3 == 1, seed % 2 == 1);
        Rc::new(PoolStack { approved: true, sampled, rotating, ..PoolStack::default() })
    };
    let life_of = |seed| life(&|| make(seed), &options(seed), seed);
    seeds(again, if cfg!(debug_assertions) { 16 } else { 200 }, life_of);
}

#[test]
fn a_disk_that_ignores_flush_is_caught() {
    let failures = |ignore_flush: bool| {
        let options = Options { ignore_flush, ..options(3) };
        (0..12).filter_map(|seed| life(&pool, &options, seed).err()).collect::<Vec<String>>()
    };
    assert_eq!(failures(false), Vec::<String>::new(), "an honest disk");
    let liar = failures(true);
    println!("{liar:#?}");
    assert!(liar.len() >= 6, "{} of 12 seeds", liar.len());
}
