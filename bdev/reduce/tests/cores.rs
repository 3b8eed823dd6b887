//! Several cores that use one pool, in the simulator: each compresses and seals new data by itself, into segments that the
//! pool's home lends it.

mod support;

use std::sync::Arc;

use cryptfold_bdev::{Access, Channel, Op, Registry, Status};
use cryptfold_bdev_sim::{Effect, Fault, Image, Rng, Survivors, Tear, When};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{Handle, Sim};
use cryptfold_reduce::{CreateOptions, LocalPool, Part, VolumeOptions};
use support::{disk, key};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 16 * MIB;
const CHUNK: usize = 4096;
const CORES: usize = 3;

async fn create(registry: &Arc<Registry>, volume_bytes: u64) -> LocalPool {
    let options = CreateOptions { memory_budget: Some(MEMORY), ..CreateOptions::new(key()) };
    let pool = LocalPool::create(registry, "disk", "p", &options).await.unwrap();
    let options = VolumeOptions { name: "v".into(), size_bytes: volume_bytes, ..VolumeOptions::default() };
    pool.create_volume(&options).await.unwrap();
    pool
}

async fn reopen(registry: &Arc<Registry>) -> LocalPool {
    LocalPool::open(registry, "disk", &key(), Some(MEMORY)).await.unwrap().unwrap()
}

/// Chunks that no codec makes smaller.
fn noise(seed: u64, chunks: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..chunks * CHUNK / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
}

/// Chunks that one does.
fn text(seed: u64, chunks: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..chunks * CHUNK / 64)
        .flat_map(|_| {
            format!("{:016x} the quick brown fox jumps over the lazy dogs..\n", rng.next()).into_bytes()
        })
        .take(chunks * CHUNK)
        .collect()
}

fn open(registry: &Arc<Registry>) -> Channel {
    registry.open("p/v", Access::ReadWrite, |_| ()).unwrap().channel().unwrap()
}

/// Writes on another core, through a channel of its own that is closed then.
async fn write(core: &Handle, registry: &Arc<Registry>, lba: u64, data: Vec<u8>) -> Result<(), Status> {
    let registry = registry.clone();
    let write = move || async move { open(&registry).write(lba, Buf::from_slice(&data), false).await };
    core.call(write).await.unwrap()
}

async fn read(core: &Handle, registry: &Arc<Registry>, lba: u64, blocks: u64) -> Vec<u8> {
    let registry = registry.clone();
    let read = move || async move { open(&registry).read(lba, blocks).await };
    core.call(read).await.unwrap().unwrap().to_contiguous().to_vec()
}

async fn clean(pool: &LocalPool) {
    let report = pool.check(true).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.problems);
}

#[test]
fn what_other_cores_sealed_is_read_everywhere_and_survives() {
    let mut sim = Sim::new(3).cores(CORES);
    let handles = sim.handles().to_vec();
    let content: Vec<Vec<u8>> = vec![noise(1, 96), text(2, 96), noise(3, 96), text(4, 40)];
    let expected = content.clone();
    let image = sim.run(move || async move {
        let (registry, disk) = disk(96 * MIB, Image::zeroed());
        let pool = create(&registry, 32 * MIB).await;
        for (n, data) in content.iter().enumerate() {
            write(&handles[n % CORES], &registry, n as u64 * 100, data.clone()).await.unwrap();
        }
        assert_eq!(pool.lent(), 2, "two cores fill something");
        // The same from another core is found, though nothing of it is on the disk.
        let stored = pool.info().space.stored_bytes;
        write(&handles[2], &registry, 1000, content[1].clone()).await.unwrap();
        write(&handles[0], &registry, 1100, content[2].clone()).await.unwrap();
        assert_eq!(pool.info().space.stored_bytes, stored);
        for (n, data) in content.iter().enumerate() {
            for core in &handles {
                let found = read(core, &registry, n as u64 * 100, data.len() as u64 / 4096).await;
                assert!(found == *data, "write {n} read on {core:?}");
            }
        }
        clean(&pool).await;
        open(&registry).flush().await.unwrap();
        // Not flushed: may be lost.
        write(&handles[1], &registry, 2000, noise(9, 64)).await.unwrap();
        disk.crash(Survivors::None, Tear::Whole, &mut Rng::new(5))
    });
    let mut sim = Sim::new(4).cores(CORES);
    let handles = sim.handles().to_vec();
    sim.run(move || async move {
        let (registry, _disk) = disk(96 * MIB, image);
        let pool = reopen(&registry).await;
        for (n, data) in expected.iter().enumerate() {
            let found = read(&handles[n % CORES], &registry, n as u64 * 100, data.len() as u64 / 4096).await;
            assert!(found == *data, "write {n} after the power cut");
        }
        clean(&pool).await;
        // Closing takes back what is lent: the disk is free, and nothing is lost.
        write(&handles[1], &registry, 3000, expected[0].clone()).await.unwrap();
        write(&handles[1], &registry, 3100, noise(10, 96)).await.unwrap();
        assert_eq!(pool.lent(), 1);
        pool.close().await.unwrap();
        let pool = reopen(&registry).await;
        assert!(read(&handles[0], &registry, 3100, 96).await == noise(10, 96));
        clean(&pool).await;
        pool.close().await.unwrap();
    });
}

/// After many new pieces another core seals before it asks: duplicates that come then are found nevertheless, also those that are mixed
/// with new chunks, and nothing of what was sealed for nothing is seen.
#[test]
fn duplicates_after_a_run_of_new_data_are_found() {
    let mut sim = Sim::new(8).cores(CORES);
    let handles = sim.handles().to_vec();
    let mixed = |n: u64| {
        let (old, new) = (noise(20, 16 * 32), noise(30 + n, 32));
        let chunks = (0..32).map(|at| match at % 3 {
            0 => old[(n as usize * 32 + at) * CHUNK..][..CHUNK].to_vec(),
            _ => new[at * CHUNK..][..CHUNK].to_vec(),
        });
        chunks.flatten().collect::<Vec<u8>>()
    };
    let image = sim.run(move || async move {
        let (registry, disk) = disk(96 * MIB, Image::zeroed());
        let pool = create(&registry, 32 * MIB).await;
        write(&handles[1], &registry, 0, noise(20, 16 * 32)).await.unwrap();
        let stored = pool.info().space.stored_bytes;
        write(&handles[1], &registry, 1000, noise(20, 16 * 32)).await.unwrap();
        assert_eq!(pool.info().space.stored_bytes, stored, "duplicates are not stored");
        // Another run of new pieces, and then some that are a third of each.
        write(&handles[1], &registry, 2000, text(21, 12 * 32)).await.unwrap();
        for n in 0..4 {
            write(&handles[1], &registry, 3000 + n * 32, mixed(n)).await.unwrap();
        }
        // What was sealed once more for nothing is not where they are looked for.
        let stored = pool.info().space.stored_bytes;
        write(&handles[0], &registry, 5000, noise(20, 16 * 32)).await.unwrap();
        assert_eq!(pool.info().space.stored_bytes, stored);
        assert!(read(&handles[2], &registry, 1000, 16 * 32).await == noise(20, 16 * 32));
        clean(&pool).await;
        open(&registry).flush().await.unwrap();
        write(&handles[1], &registry, 4000, text(22, 12 * 32)).await.unwrap();
        disk.crash(Survivors::None, Tear::Whole, &mut Rng::new(5))
    });
    let mut sim = Sim::new(9).cores(CORES);
    let handles = sim.handles().to_vec();
    sim.run(move || async move {
        let (registry, _disk) = disk(96 * MIB, image);
        let pool = reopen(&registry).await;
        for (lba, data) in [(0, noise(20, 16 * 32)), (1000, noise(20, 16 * 32)), (2000, text(21, 12 * 32))] {
            assert!(read(&handles[0], &registry, lba, data.len() as u64 / 4096).await == data, "at {lba}");
        }
        for n in 0..4 {
            assert!(read(&handles[2], &registry, 3000 + n * 32, 32).await == mixed(n), "mixed {n}");
        }
        clean(&pool).await;
        pool.close().await.unwrap();
    });
}

#[test]
fn what_is_lent_is_taken_back_when_space_runs_out() {
    let mut sim = Sim::new(5).cores(CORES);
    let handles = sim.handles().to_vec();
    sim.run(move || async move {
        let (registry, _disk) = disk(64 * MIB, Image::zeroed());
        let pool = create(&registry, 64 * MIB).await;
        for core in &handles[1..] {
            write(core, &registry, 8192 + 100 * u64::from(core.id().0), noise(core.id().0.into(), 32))
                .await
                .unwrap();
        }
        assert_eq!(pool.lent(), 2);
        // One core alone fills the pool.
        let mut written = 0;
        while let Ok(()) = write(&handles[0], &registry, written, noise(100 + written, 32)).await {
            written += 32;
        }
        assert_eq!(pool.lent(), 0, "the collector can have what was begun");
        // Another one can not store more either, but what it gives up is room again.
        assert_eq!(
            write(&handles[1], &registry, written, noise(7, 32)).await,
            Err(Status::CAPACITY_EXCEEDED)
        );
        open(&registry).unmap(0, written / 2).await.unwrap();
        for n in 0..written / 128 {
            let core = &handles[n as usize % CORES];
            let done = write(core, &registry, n * 32, noise(5000 + n, 32)).await;
            assert_eq!(done, Ok(()), "write {n} of {}, {:?}", written / 128, pool.info());
        }
        clean(&pool).await;
        pool.close().await.unwrap();
    });
}

#[test]
fn a_disk_that_takes_no_data_of_another_core_stops_the_pool() {
    let mut sim = Sim::new(6).cores(CORES);
    let handles = sim.handles().to_vec();
    sim.run(move || async move {
        let (registry, disk) = disk(96 * MIB, Image::zeroed());
        let pool = create(&registry, 32 * MIB).await;
        write(&handles[1], &registry, 0, noise(1, 32)).await.unwrap();
        open(&registry).flush().await.unwrap();
        write(&handles[1], &registry, 100, noise(2, 32)).await.unwrap();
        disk.inject(Fault {
            when: When::always(Op::Write, 0..96 * MIB),
            effect: Effect::Fail(Status::WRITE_FAULT),
        });
        open(&registry).flush().await.unwrap_err();
        assert!(pool.info().failed.is_some());
        assert!(read(&handles[2], &registry, 0, 32).await == noise(1, 32), "what is durable can be read");
        write(&handles[1], &registry, 200, noise(3, 32)).await.unwrap_err();
        let _ = pool.close().await;
    });
}

#[test]
fn a_closing_commits_nothing_whose_data_another_core_could_not_write() {
    let mut sim = Sim::new(7).cores(CORES);
    let handles = sim.handles().to_vec();
    let image = sim.run(move || async move {
        let (registry, disk) = disk(96 * MIB, Image::zeroed());
        let pool = create(&registry, 32 * MIB).await;
        write(&handles[1], &registry, 0, noise(1, 32)).await.unwrap();
        open(&registry).flush().await.unwrap();
        // What the core writes next lies behind; the journal is elsewhere.
        let (at, _) = pool.place_of("v", 0, Part::Fragment).await.unwrap();
        disk.inject(Fault {
            when: When::always(Op::Write, at..at + MIB / 2),
            effect: Effect::Fail(Status::WRITE_FAULT),
        });
        write(&handles[1], &registry, 0, noise(2, 32)).await.unwrap();
        assert!(pool.info().failed.is_none(), "nothing has been written yet");
        pool.close().await.unwrap_err();
        assert_eq!(disk.clear_faults(), 1);
        let image = disk.content();
        // The device was let go of all the same.
        let pool = reopen(&registry).await;
        assert!(read(&handles[2], &registry, 0, 32).await == noise(1, 32));
        clean(&pool).await;
        pool.close().await.unwrap();
        image
    });
    let mut sim = Sim::new(8).cores(CORES);
    let handles = sim.handles().to_vec();
    sim.run(move || async move {
        let (registry, _disk) = disk(96 * MIB, image);
        let pool = reopen(&registry).await;
        assert!(read(&handles[1], &registry, 0, 32).await == noise(1, 32), "what was durable is there");
        clean(&pool).await;
        pool.close().await.unwrap();
    });
}
