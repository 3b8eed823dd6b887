//! Snapshots, clones and what becomes of them, against a model that copies everything; in the simulator, without power cuts
//! (those are in `simulation.rs`).

mod support;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Class, Registry, Status};
use cryptfold_bdev_sim::{Image, Rng};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, Sim};
use cryptfold_reduce::{
    CreateOptions, DeletionInfo, LocalPool, PoolError, ScrubState, VolumeInfo, VolumeOptions,
};
use support::{disk, key};

const MIB: u64 = 1 << 20;
const CHUNK: usize = 4096;

async fn new_pool(registry: &Arc<Registry>) -> LocalPool {
    let mut options = CreateOptions::new(key());
    options.memory_budget = Some(16 * MIB);
    options.segment_bytes = Some(MIB as u32);
    LocalPool::create(registry, "disk", "p", &options).await.unwrap()
}

async fn reopen(pool: LocalPool, registry: &Arc<Registry>) -> LocalPool {
    pool.close().await.unwrap();
    LocalPool::open(registry, "disk", &key(), Some(16 * MIB)).await.unwrap().unwrap()
}

fn open(registry: &Arc<Registry>, name: &str, access: Access) -> Channel {
    registry.open(&format!("p/{name}"), access, |_| ()).unwrap().channel().unwrap()
}

/// The block of a value: 0 is zeros, even ones a pattern, others noise.
fn block(value: u64) -> Vec<u8> {
    let mut rng = Rng::new(value);
    match value {
        0 => vec![0; CHUNK],
        even if even % 2 == 0 => even.to_le_bytes().repeat(CHUNK / 8),
        _ => (0..CHUNK / 8).flat_map(|_| rng.next().to_le_bytes()).collect(),
    }
}

async fn write(registry: &Arc<Registry>, name: &str, lba: u64, values: &[u64]) {
    let data: Vec<u8> = values.iter().flat_map(|value| block(*value)).collect();
    let channel = open(registry, name, Access::ReadWrite);
    channel.write(lba, Buf::from_slice(&data), false).await.unwrap();
}

async fn shows(registry: &Arc<Registry>, name: &str, lba: u64, values: &[u64], when: &str) {
    let channel = open(registry, name, Access::ReadOnly);
    let data = channel.read(lba, values.len() as u64).await.unwrap().to_contiguous();
    for (n, value) in values.iter().enumerate() {
        let found = &data[n * CHUNK..][..CHUNK];
        let at = lba + n as u64;
        let head: Vec<u64> =
            [found, &block(*value)].map(|b| u64::from_le_bytes(b[..8].try_into().unwrap())).into();
        assert!(
            found == block(*value),
            "{when}: block {at} of {name}: found {:x}, expected {:x}",
            head[0],
            head[1]
        );
    }
}

async fn clean(pool: &LocalPool, when: &str) {
    let report = pool.check(true).await.unwrap();
    assert!(report.is_clean(), "{when}: {:#?}", report.problems);
}

/// Waits until everything deleted is gone.
async fn settled(pool: &LocalPool) {
    while pool.is_deleting() {
        let deletion = pool.info().deletion;
        assert!(deletion.volumes > 0 && deletion.state == ScrubState::Running, "{deletion:?}");
        reactor::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(pool.info().deletion, DeletionInfo { state: ScrubState::Never, volumes: 0 });
}

fn info(pool: &LocalPool, name: &str) -> VolumeInfo {
    pool.volumes().into_iter().find(|v| v.name == name).unwrap_or_else(|| panic!("no volume {name}"))
}

fn options(name: &str, blocks: u64) -> VolumeOptions {
    VolumeOptions { name: name.into(), size_bytes: blocks * 4096, ..VolumeOptions::default() }
}

fn run<F: Future<Output = ()> + 'static>(seed: u64, f: impl FnOnce() -> F + 'static) {
    Sim::new(seed).run(f);
}

#[derive(Clone)]
struct Model {
    values: Vec<u64>,
    read_only: bool,
}

/// Where things happen: around the borders of leaves, so that they meet.
const PLACES: [std::ops::Range<u64>; 4] = [0..20, 505..520, 1018..1040, 1530..1545];

struct World {
    registry: Arc<Registry>,
    pool: Option<LocalPool>,
    rng: Rng,
    models: BTreeMap<String, Model>,
    made: u64,
    next_value: u64,
}

impl World {
    fn pool(&self) -> &LocalPool {
        self.pool.as_ref().unwrap()
    }

    fn pick(&mut self, writable: bool) -> Option<String> {
        let names: Vec<String> = self
            .models
            .iter()
            .filter(|(_, m)| m.read_only != writable)
            .map(|(name, _)| name.clone())
            .collect();
        (!names.is_empty()).then(|| names[self.rng.below(names.len() as u64) as usize].clone())
    }

    fn name(&mut self, kind: &str) -> String {
        self.made += 1;
        format!("{kind}{}", self.made)
    }

    fn place(&mut self, blocks: u64) -> (u64, u64) {
        let place = PLACES[self.rng.below(4) as usize].clone();
        let lba = (place.start + self.rng.below(place.end - place.start)).min(blocks - 1);
        (lba, (1 + self.rng.below(12)).min(blocks - lba))
    }

    async fn step(&mut self, when: &str) {
        let draw = self.rng.below(100);
        match draw {
            0..50 => self.change(when).await,
            50..62 => {
                if let Some(of) = self.pick(true).filter(|_| self.models.len() < 14) {
                    let name = self.name("s");
                    let made = self.pool().snapshot_volume(&of, &name).await.unwrap();
                    assert!(made.snapshot && made.read_only, "{when}");
                    let model = Model { read_only: true, ..self.models[&of].clone() };
                    self.models.insert(name, model);
                }
            }
            62..69 => {
                if let Some(of) = self.pick(false).filter(|_| self.models.len() < 14) {
                    let name = self.name("c");
                    self.pool().clone_volume(&of, &name).await.unwrap();
                    let model = Model { read_only: false, ..self.models[&of].clone() };
                    self.models.insert(name, model);
                }
            }
            69..80 => {
                let writable = self.rng.one_in(3);
                if let Some(name) = self.pick(writable).filter(|_| self.models.len() > 1) {
                    match self.pool().delete_volume(&name).await {
                        Ok(()) => drop(self.models.remove(&name)),
                        Err(PoolError::HasClones { clones, .. }) => assert!(clones.len() > 1, "{when}"),
                        Err(error) => panic!("{when}: {error}"),
                    }
                }
            }
            80..85 => {
                if let Some(name) = self.pick(true) {
                    let blocks = 400 + self.rng.below(1300);
                    self.pool().resize_volume(&name, blocks * 4096).await.unwrap();
                    self.models.get_mut(&name).unwrap().values.resize(blocks as usize, 0);
                }
            }
            85..90 => {
                if let Some(name) = self.pick(true) {
                    let parent_only = self.rng.one_in(2);
                    let parent = info(self.pool(), &name).parent;
                    match self.pool().own_volume(&name, parent_only).await {
                        Ok(()) => {}
                        Err(PoolError::Invalid(_)) if parent_only && parent.is_none() => {}
                        Err(error) => panic!("{when}: {error}"),
                    }
                    let after = info(self.pool(), &name).parent;
                    assert!(
                        after.is_none() || (parent_only && after != parent),
                        "{when}: {parent:?} to {after:?}"
                    );
                }
            }
            90..92 => {
                let pool = self.pool.take().unwrap();
                self.pool = Some(reopen(pool, &self.registry).await);
            }
            92..94 => self.pool().checkpoint().await.unwrap(),
            94..96 => {
                settled(self.pool()).await;
                clean(self.pool(), when).await;
            }
            _ => {
                let writable = self.rng.one_in(2);
                if let Some(name) = self.pick(writable) {
                    self.verify(&name, when).await;
                }
            }
        }
    }

    async fn change(&mut self, when: &str) {
        let Some(name) = self.pick(true) else {
            let name = self.name("v");
            self.pool().create_volume(&options(&name, 1600)).await.unwrap();
            self.models.insert(name, Model { values: vec![0; 1600], read_only: false });
            return;
        };
        let blocks = self.models[&name].values.len() as u64;
        let (lba, count) = self.place(blocks);
        let all = self.rng.one_in(40);
        if all || self.rng.one_in(4) {
            let (lba, count) = if all { (0, blocks) } else { (lba, count) };
            open(&self.registry, &name, Access::ReadWrite).unmap(lba, count).await.unwrap();
            self.models.get_mut(&name).unwrap().values[lba as usize..(lba + count) as usize].fill(0);
        } else {
            let mut values = Vec::new();
            for _ in 0..count {
                self.next_value += 1;
                // New data, data of others, patterns, zeros.
                values.push(match self.rng.below(4) {
                    0 => self.rng.below(self.next_value),
                    1 => 0,
                    _ => self.next_value,
                });
            }
            write(&self.registry, &name, lba, &values).await;
            self.models.get_mut(&name).unwrap().values[lba as usize..][..count as usize]
                .copy_from_slice(&values);
            shows(&self.registry, &name, lba, &values, when).await;
        }
    }

    async fn verify(&mut self, name: &str, when: &str) {
        let values = &self.models[name].values;
        let blocks = values.len() as u64;
        assert_eq!(info(self.pool(), name).size_bytes, blocks * 4096, "{when}");
        for place in PLACES {
            let (from, to) = (place.start.min(blocks), place.end.min(blocks));
            if from < to {
                shows(&self.registry, name, from, &values[from as usize..to as usize], when).await;
            }
        }
    }
}

async fn life(seed: u64) {
    let (registry, _disk) = disk(96 * MIB, Image::zeroed());
    let pool = Some(new_pool(&registry).await);
    let models = BTreeMap::new();
    let mut world = World { registry, pool, rng: Rng::new(seed), models, made: 0, next_value: 0 };
    for step in 0..150 {
        world.step(&format!("seed {seed}, step {step}")).await;
    }
    let when = format!("seed {seed}, at the end");
    for name in world.models.keys().cloned().collect::<Vec<_>>() {
        world.verify(&name, &when).await;
    }
    settled(world.pool()).await;
    clean(world.pool(), &when).await;
    let pool = world.pool.take().unwrap();
    world.pool = Some(reopen(pool, &world.registry).await);
    for name in world.models.keys().cloned().collect::<Vec<_>>() {
        world.verify(&name, &when).await;
    }
    // Youngest first, so that nothing has clones.
    let mut names: Vec<VolumeInfo> = world.pool().volumes();
    names.sort_by_key(|v| std::cmp::Reverse(v.id.0));
    while let Some(volume) = names.iter().position(|v| info(world.pool(), &v.name).clones.len() < 2) {
        world.pool().delete_volume(&names.remove(volume).name).await.unwrap();
    }
    assert!(names.is_empty(), "{when}: {names:?}");
    settled(world.pool()).await;
    clean(world.pool(), &when).await;
    let space = world.pool().info().space;
    assert_eq!((space.stored_bytes, space.unique_bytes, space.logical_bytes), (0, 0, 0), "{when}");
    world.pool.take().unwrap().close().await.unwrap();
}

#[test]
fn random_lives_agree_with_a_model() {
    let seeds = if cfg!(debug_assertions) { 25 } else { 400 };
    let only = std::env::var("CRYPTFOLD_SEED").ok().and_then(|seed| seed.parse().ok());
    for seed in only.map_or(0..seeds, |seed: u64| seed..seed + 1) {
        run(seed, move || life(seed));
    }
}

#[test]
fn a_snapshot_stays_and_a_clone_goes_its_own_way() {
    run(1, || async {
        let (registry, _disk) = disk(64 * MIB, Image::zeroed());
        let pool = new_pool(&registry).await;
        pool.create_volume(&options("v", 2000)).await.unwrap();
        write(&registry, "v", 10, &[1, 3, 5]).await;
        pool.snapshot_volume("v", "s").await.unwrap();
        pool.clone_volume("s", "c").await.unwrap();
        write(&registry, "v", 11, &[7]).await;
        write(&registry, "c", 12, &[9, 11]).await;
        open(&registry, "c", Access::ReadWrite).unmap(10, 1).await.unwrap();
        for _ in 0..2 {
            shows(&registry, "v", 9, &[0, 1, 7, 5, 0], "volume").await;
            shows(&registry, "s", 9, &[0, 1, 3, 5, 0], "snapshot").await;
            shows(&registry, "c", 9, &[0, 0, 3, 9, 11], "clone").await;
            pool.checkpoint().await.unwrap();
        }
        let refused =
            open(&registry, "s", Access::ReadWrite).write(0, Buf::from_slice(&block(1)), false).await;
        assert_eq!(refused.unwrap_err(), Status::NAMESPACE_WRITE_PROTECTED);
        // Relations as SPDK has them.
        let (v, s, c) = (info(&pool, "v"), info(&pool, "s"), info(&pool, "c"));
        assert_eq!((v.parent.as_deref(), c.parent.as_deref(), s.parent), (Some("s"), Some("s"), None));
        assert_eq!(s.clones, ["v", "c"]);
        assert!(matches!(pool.delete_volume("s").await, Err(PoolError::HasClones { .. })));
        assert!(matches!(pool.snapshot_volume("s", "t").await, Err(PoolError::Invalid(_))));
        assert!(matches!(pool.clone_volume("v", "t").await, Err(PoolError::Invalid(_))));
        assert!(matches!(pool.snapshot_volume("v", "c").await, Err(PoolError::VolumeExists { .. })));
        assert!(matches!(pool.resize_volume("s", MIB).await, Err(PoolError::Invalid(_))));
        // With the volume gone, the clone is the only one that goes on from the snapshot.
        pool.delete_volume("v").await.unwrap();
        pool.delete_volume("s").await.unwrap();
        settled(&pool).await;
        shows(&registry, "c", 9, &[0, 0, 3, 9, 11], "clone").await;
        assert_eq!(info(&pool, "c").parent, None);
        assert_eq!(pool.info().space.unique_bytes, 3 * 4096);
        clean(&pool, "end").await;
        pool.close().await.unwrap();
    });
}

#[test]
fn the_space_of_each_is_known() {
    run(1, || async {
        let (registry, _disk) = disk(64 * MIB, Image::zeroed());
        let pool = new_pool(&registry).await;
        pool.create_volume(&options("v", 2000)).await.unwrap();
        let exclusive = |name: &str| info(&pool, name).exclusive_bytes / 4096;
        let odd = |from: u64, count: u64| (0..count).map(|n| 2 * (from + n) + 1).collect::<Vec<u64>>();
        write(&registry, "v", 0, &odd(0, 100)).await;
        assert_eq!(exclusive("v"), 100);
        pool.snapshot_volume("v", "s1").await.unwrap();
        assert_eq!((exclusive("v"), exclusive("s1")), (0, 0));
        write(&registry, "v", 0, &odd(1000, 10)).await;
        assert_eq!((exclusive("v"), exclusive("s1")), (10, 10));
        pool.snapshot_volume("v", "s2").await.unwrap();
        write(&registry, "v", 5, &odd(2000, 10)).await;
        // 5 blocks that only s2 has, 5 that s1 and s2 share.
        assert_eq!((exclusive("v"), exclusive("s2"), exclusive("s1")), (10, 5, 10));
        let before = pool.info().space.unique_bytes / 4096;
        assert_eq!(before, 120);
        pool.delete_volume("s1").await.unwrap();
        settled(&pool).await;
        assert_eq!(pool.info().space.unique_bytes / 4096, 110);
        assert_eq!((exclusive("v"), exclusive("s2")), (10, 10));
        pool.delete_volume("s2").await.unwrap();
        settled(&pool).await;
        assert_eq!(pool.info().space.unique_bytes / 4096, 100);
        assert_eq!(exclusive("v"), 100);
        clean(&pool, "end").await;
        pool.close().await.unwrap();
    });
}

/// What a write costs does not depend on how many snapshots there are: what the disk is told to write and read (metadata
/// included, and what the snapshots keep) grows by less than a tenth with 1,000 of them.
#[test]
fn a_thousand_snapshots_cost_writes_nothing() {
    let cost = |snapshots: u64| {
        let result = Rc::new(Cell::new((0, 0)));
        let answer = result.clone();
        run(3, move || async move {
            let (registry, _disk) = disk(256 * MIB, Image::zeroed());
            let pool = new_pool(&registry).await;
            pool.create_volume(&options("v", 16384)).await.unwrap();
            let all: Vec<u64> = (0..16384).map(|n| 2 * n + 1).collect();
            for (n, values) in all.chunks(256).enumerate() {
                write(&registry, "v", n as u64 * 256, values).await;
            }
            for n in 0..snapshots {
                pool.snapshot_volume("v", &format!("s{n}")).await.unwrap();
                write(&registry, "v", n * 7 % 16384, &[100_001 + 2 * n]).await;
            }
            pool.checkpoint().await.unwrap();
            let transferred = || {
                let disk = registry.get("disk").unwrap();
                (disk.stats().totals(Class::Write).bytes, disk.stats().totals(Class::Read).bytes)
            };
            let before = transferred();
            let mut rng = Rng::new(5);
            for n in 0..4000 {
                write(&registry, "v", rng.below(16384), &[1_000_001 + 2 * n]).await;
            }
            pool.checkpoint().await.unwrap();
            let after = transferred();
            answer.set((after.0 - before.0, after.1 - before.1));
            pool.close().await.unwrap();
        });
        result.get()
    };
    let (none, one, many) = (cost(0), cost(1), cost(1000));
    println!(
        "4,000 overwrites, bytes written and read: {none:?} without snapshots, {one:?} with one, {many:?} with 1,000"
    );
    for fewer in [none, one] {
        assert!((many.0 + many.1) * 10 <= (fewer.0 + fewer.1) * 11, "{many:?} against {fewer:?}");
    }
}
