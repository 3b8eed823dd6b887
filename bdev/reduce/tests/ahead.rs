//! Read-ahead: who reads in order and in small pieces waits for the device at the beginning only; nothing else changes.

mod support;

use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Op, Registry, Status};
use cryptfold_bdev_sim::{Effect, Fault, Image, Rng, SimDisk, When};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, Sim};
use cryptfold_reduce::{CreateOptions, LocalPool, VolumeOptions};
use support::{fast, key};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 16 * MIB;
const BLOCKS: u64 = 512;
const LATENCY: Duration = Duration::from_micros(100);
/// What a host does between two reads.
const THINKS: Duration = Duration::from_micros(20);

/// A block that a codec makes smaller, and that no other is like.
fn block(lba: u64, stamp: u64) -> Vec<u8> {
    let mut rng = Rng::new(lba << 20 ^ stamp);
    let mut block: Vec<u8> = (0..128).flat_map(|_| rng.next().to_le_bytes()).collect();
    block.resize(4096, lba as u8 | 1);
    block
}

fn open(registry: &Arc<Registry>) -> Channel {
    registry.open("p/v", Access::ReadWrite, |_| ()).unwrap().channel().unwrap()
}

/// A pool with a written volume, opened anew: nothing of its data is in memory.
async fn prepare() -> (Arc<Registry>, Arc<SimDisk>, LocalPool) {
    let registry = Registry::new();
    let mut options = fast("disk", 64 * MIB);
    options.latency = LATENCY..LATENCY + Duration::from_nanos(1);
    let (disk, _) = SimDisk::create(&registry, options, Image::zeroed(), 1).unwrap();
    let options = CreateOptions { memory_budget: Some(MEMORY), ..CreateOptions::new(key()) };
    let pool = LocalPool::create(&registry, "disk", "p", &options).await.unwrap();
    let volume = VolumeOptions { name: "v".into(), size_bytes: BLOCKS * 4096, ..VolumeOptions::default() };
    pool.create_volume(&volume).await.unwrap();
    let channel = open(&registry);
    for lba in (0..BLOCKS).step_by(32) {
        let data: Vec<u8> = (lba..lba + 32).flat_map(|n| block(n, 0)).collect();
        channel.write(lba, Buf::from_slice(&data), false).await.unwrap();
    }
    drop(channel);
    pool.close().await.unwrap();
    let pool = LocalPool::open(&registry, "disk", &key(), Some(MEMORY)).await.unwrap().unwrap();
    // The map, the containers and the segments' headers are no matter here.
    let channel = open(&registry);
    for lba in (0..BLOCKS).step_by(64) {
        channel.read(lba, 1).await.unwrap();
    }
    (registry, disk, pool)
}

/// Reads these blocks one after the other, and compares: for how many the device was waited for.
async fn waits(channel: &Channel, blocks: impl Iterator<Item = u64>) -> usize {
    let mut waits = 0;
    for lba in blocks {
        let begun = reactor::now();
        let found = channel.read(lba, 1).await.unwrap().to_contiguous();
        assert!(found.as_slice() == block(lba, 0), "block {lba}");
        waits += usize::from(reactor::now() - begun >= LATENCY / 2);
        reactor::sleep(THINKS).await;
    }
    waits
}

#[test]
fn a_stream_waits_at_its_beginning_only() {
    let mut sim = Sim::new(1).cores(2);
    let handles = sim.handles().to_vec();
    sim.run(move || async move {
        let (registry, disk, pool) = prepare().await;
        // A fragment has sixteen blocks. The cache has some of the first ones already.
        let before = disk.reads();
        let home = waits(&open(&registry), 32..BLOCKS).await;
        assert!(home <= 3, "the device was waited for {home} times");
        assert!(disk.reads() - before <= BLOCKS / 16 + 4, "{} reads", disk.reads() - before);
        let (reader, other) = (registry.clone(), handles[1].clone());
        let away = other.call(move || async move { waits(&open(&reader), 0..BLOCKS).await }).await.unwrap();
        assert!(away <= 4, "the device was waited for {away} times from another core");
        // Backwards and by leaps nothing is brought that is not asked for.
        let before = disk.reads();
        let leaps = waits(&open(&registry), (0..BLOCKS).rev().step_by(16)).await;
        assert!(disk.reads() - before <= leaps as u64, "{} reads, {leaps} wanted", disk.reads() - before);
        pool.close().await.unwrap();
    });
}

#[test]
fn what_changes_ahead_of_a_stream_is_read_as_it_is_then() {
    Sim::new(2).run(|| async {
        let (registry, _disk, pool) = prepare().await;
        let channel = open(&registry);
        let mut stamps = vec![0; BLOCKS as usize];
        let mut rng = Rng::new(9);
        for lba in 0..BLOCKS {
            let found = channel.read(lba, 1).await.unwrap().to_contiguous();
            assert!(found.as_slice() == block(lba, stamps[lba as usize]), "block {lba}");
            let changed = (lba + rng.below(40)).min(BLOCKS - 1);
            stamps[changed as usize] = lba + 1;
            let data = block(changed, lba + 1);
            channel.write(changed, Buf::from_slice(&data), false).await.unwrap();
        }
        assert!(pool.check(true).await.unwrap().is_clean());
        drop(channel);
        pool.close().await.unwrap();
    });
}

/// An error of the device is told to who wanted what it was about, once that is read.
#[test]
fn an_error_ahead_is_told_where_it_is() {
    Sim::new(3).run(|| async {
        let (registry, disk, pool) = prepare().await;
        let channel = open(&registry);
        assert!(waits(&channel, 0..4).await <= 3);
        // From here on nothing can be read, for a while.
        disk.inject(Fault {
            when: When::always(Op::Read, 0..64 * MIB),
            effect: Effect::Fail(Status::UNRECOVERED_READ),
        });
        let mut failed = None;
        for lba in 4..BLOCKS {
            match channel.read(lba, 1).await {
                Ok(found) => assert!(found.to_contiguous().as_slice() == block(lba, 0), "block {lba}"),
                Err(status) => {
                    assert_eq!(status, Status::UNRECOVERED_READ);
                    failed = Some(lba);
                    break;
                }
            }
            reactor::sleep(THINKS).await;
        }
        let failed = failed.expect("what is not in memory can not be read");
        assert!((16..80).contains(&failed), "block {failed}");
        assert!(disk.clear_faults() > 0);
        waits(&channel, failed..BLOCKS).await;
        assert!(pool.check(true).await.unwrap().is_clean());
        drop(channel);
        pool.close().await.unwrap();
    });
}
