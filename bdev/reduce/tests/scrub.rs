//! The scrub finds what the device has spoilt, errors hit exactly the blocks concerned, and a later write of the same data
//! heals all that refer to it. And the pool grows with its device.

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Op, Registry, Status};
use cryptfold_bdev_sim::{Effect, Fault, Image, Rng, When};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, Sim};
use cryptfold_reduce::{CreateOptions, LocalPool, Part, ScrubInfo, ScrubState, VolumeOptions};
use support::{disk, key};

const MIB: u64 = 1 << 20;
const BLOCKS: u64 = 8192;
const FAST: u64 = 10_000_000_000;

async fn create(registry: &Arc<Registry>) -> LocalPool {
    let mut options = CreateOptions::new(key());
    options.memory_budget = Some(16 * MIB);
    let pool = LocalPool::create(registry, "disk", "p", &options).await.unwrap();
    let volume = VolumeOptions { name: "v".into(), size_bytes: BLOCKS * 4096, ..VolumeOptions::default() };
    pool.create_volume(&volume).await.unwrap();
    pool
}

fn open(registry: &Arc<Registry>) -> Channel {
    registry.open("p/v", Access::ReadWrite, |_| ()).unwrap().channel().unwrap()
}

/// Block number `n` of an endless file; two of three compress.
fn block(n: u64) -> Vec<u8> {
    let mut rng = Rng::new(n + 1);
    let words = if n.is_multiple_of(3) { 512 } else { 32 };
    let mut block: Vec<u8> = (0..words).flat_map(|_| rng.next().to_le_bytes()).collect();
    block.resize(4096, n as u8);
    block
}

fn blocks(from: u64, count: u64) -> Buf {
    Buf::from_slice(&(from..from + count).flat_map(block).collect::<Vec<u8>>())
}

/// The file's blocks `0 .. count` twice: at 0 and at 4096.
async fn fill(channel: &Channel, count: u64) {
    for base in [0, 4096] {
        for n in (0..count).step_by(32) {
            channel.write(base + n, blocks(n, 32), false).await.unwrap();
        }
    }
    channel.flush().await.unwrap();
}

/// Those of the file's blocks that can not be read at `base`; the others are right.
async fn lost(channel: &Channel, base: u64, count: u64) -> BTreeSet<u64> {
    let mut lost = BTreeSet::new();
    for n in 0..count {
        match channel.read(base + n, 1).await {
            Ok(data) => assert!(data.to_contiguous().as_slice() == block(n), "block {} is wrong", base + n),
            Err(status) => {
                assert_eq!(status, Status::UNRECOVERED_READ);
                lost.insert(n);
            }
        }
    }
    lost
}

async fn scrubbed(pool: &LocalPool, rate: u64) -> ScrubInfo {
    pool.start_scrub(rate).unwrap();
    while pool.info().scrub.state == ScrubState::Running {
        reactor::sleep(Duration::from_millis(1)).await;
    }
    pool.info().scrub
}

async fn clean(pool: &LocalPool) {
    let report = pool.check(true).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.problems);
}

#[test]
fn flipped_bits_are_found_and_healed_by_a_write_of_the_same_data() {
    for seed in 0..6 {
        Sim::new(seed).run(move || async move {
            let (registry, disk) = disk(64 * MIB, Image::zeroed());
            let pool = create(&registry).await;
            let channel = open(&registry);
            fill(&channel, 512).await;
            let mut rng = Rng::new(seed);
            let mut hit = BTreeSet::new();
            for _ in 0..4 {
                let n = rng.below(512);
                let (at, bytes) = pool.place_of("v", n, Part::Fragment).await.unwrap();
                if hit.insert(at) {
                    disk.rot(at + 20 + rng.below(u64::from(bytes) - 40), 1 << rng.below(8));
                }
            }
            let scrub = scrubbed(&pool, FAST).await;
            assert_eq!((scrub.state, scrub.damaged), (ScrubState::Done, hit.len() as u64));
            assert_eq!(scrub.bytes, scrub.total_bytes);
            let broken = lost(&channel, 0, 512).await;
            assert!(!broken.is_empty() && broken.len() <= 16 * hit.len());
            assert_eq!(lost(&channel, 4096, 512).await, broken, "both that refer to it");
            assert!(!pool.check(true).await.unwrap().is_clean());
            // Some of it is written again, to a third place, one block at a time: exactly that heals.
            let some: Vec<u64> = broken.iter().copied().filter(|_| rng.one_in(2)).collect();
            for (at, &n) in some.iter().enumerate() {
                channel.write(7000 + at as u64, blocks(n, 1), false).await.unwrap();
            }
            reactor::sleep(Duration::from_millis(100)).await;
            let rest: BTreeSet<u64> = broken.iter().copied().filter(|n| !some.contains(n)).collect();
            let left = lost(&channel, 0, 512).await;
            assert!(left.is_subset(&broken), "{left:?}");
            assert!(rest.is_subset(&left));
            assert!(left.len() <= broken.len() - some.len() / 2, "{broken:?}, {some:?}, {left:?}");
            assert_eq!(lost(&channel, 4096, 512).await, left);
            // Then all of it.
            for n in (0..512).step_by(32) {
                channel.write(6000 + n, blocks(n, 32), false).await.unwrap();
            }
            reactor::sleep(Duration::from_millis(100)).await;
            assert!(lost(&channel, 0, 512).await.is_empty());
            assert!(lost(&channel, 4096, 512).await.is_empty());
            assert!(pool.info().healed >= broken.len() as u64);
            clean(&pool).await;
            drop(channel);
            pool.close().await.unwrap();
            let pool = LocalPool::open(&registry, "disk", &key(), Some(16 * MIB)).await.unwrap().unwrap();
            let channel = open(&registry);
            assert!(lost(&channel, 0, 512).await.is_empty() && lost(&channel, 4096, 512).await.is_empty());
            clean(&pool).await;
        });
    }
}

#[test]
fn lost_and_misdirected_writes_are_found() {
    let mut found = 0;
    for seed in 0..24 {
        let (send, receive) = std::sync::mpsc::channel();
        Sim::new(seed).run(move || async move {
            let (registry, disk) = disk(64 * MIB, Image::zeroed());
            let pool = create(&registry).await;
            let channel = open(&registry);
            fill(&channel, 128).await;
            pool.checkpoint().await.unwrap();
            let mut rng = Rng::new(seed);
            let effect = match rng.below(3) {
                0 => Effect::Lost,
                1 => Effect::Misdirected((40 + rng.below(20)) * MIB),
                _ => Effect::Flip { offset: rng.below(4096), mask: 0x20 },
            };
            disk.inject(Fault { when: When::nth(Op::Write, rng.below(6)), effect });
            for n in (128..512).step_by(32) {
                channel.write(n, blocks(n, 32), false).await.unwrap();
            }
            if channel.flush().await.is_err() {
                return;
            }
            let scrub = scrubbed(&pool, FAST).await;
            let broken = lost(&channel, 0, 512).await;
            assert_eq!(scrub.state, ScrubState::Done);
            assert_eq!(scrub.damaged > 0, !broken.is_empty(), "{scrub:?}, {broken:?}");
            send.send(!broken.is_empty()).unwrap();
            // The data comes once more, and all of it is well.
            for n in (0..512).step_by(32) {
                channel.write(4096 + n, blocks(n, 32), false).await.unwrap();
            }
            reactor::sleep(Duration::from_millis(200)).await;
            assert!(lost(&channel, 0, 512).await.is_empty());
        });
        found += u64::from(receive.try_recv() == Ok(true));
    }
    assert!(found >= 6, "only {found} of the faults hit data");
}

#[test]
fn a_scrub_keeps_its_rate_stops_when_asked_and_bears_hosts_and_collection() {
    Sim::new(3).run(|| async {
        let (registry, _disk) = disk(48 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        let channel = open(&registry);
        fill(&channel, 512).await;
        let started = reactor::now();
        let scrub = scrubbed(&pool, 1_000_000).await;
        let took = (reactor::now() - started).as_secs_f64();
        assert_eq!((scrub.state, scrub.damaged), (ScrubState::Done, 0));
        let least = scrub.bytes as f64 / 1e6;
        assert!((least..least * 1.2 + 0.1).contains(&took), "{took} s for {least} s");
        pool.start_scrub(10_000).unwrap();
        reactor::sleep(Duration::from_secs(2)).await;
        assert_eq!(pool.stop_scrub().state, ScrubState::Stopped);
        reactor::sleep(Duration::from_secs(60)).await;
        let stopped = pool.info().scrub;
        assert!(
            stopped.state == ScrubState::Stopped && stopped.bytes < stopped.total_bytes / 2,
            "{stopped:?}"
        );
        // Overwrites that make the collector move what the scrub reads.
        pool.start_scrub(20_000_000).unwrap();
        let mut rng = Rng::new(1);
        for round in 0..3000 {
            let n = 512 + rng.below(3000);
            channel.write(n, blocks(10_000 + 7 * round, 16), false).await.unwrap();
            if pool.info().scrub.state == ScrubState::Done {
                pool.start_scrub(20_000_000).unwrap();
            }
        }
        assert_eq!(pool.info().scrub.damaged, 0);
        assert!(lost(&channel, 0, 512).await.is_empty());
        clean(&pool).await;
        drop(channel);
        pool.close().await.unwrap();
    });
}

#[test]
fn a_pool_grows_with_its_device_while_hosts_write() {
    let (send, receive) = std::sync::mpsc::channel();
    Sim::new(4).run(move || async move {
        let (registry, disk) = disk(160 * MIB, Image::zeroed());
        let base = registry.get("disk").unwrap();
        base.set_blocks(32 * MIB / u64::from(base.block_size_bytes()));
        let pool = create(&registry).await;
        let channel = open(&registry);
        let before = pool.info();
        // Random data until the pool is full.
        let noise = |n: u64| {
            let mut rng = Rng::new(n);
            Buf::from_slice(&(0..16 * 512).flat_map(|_| rng.next().to_le_bytes()).collect::<Vec<u8>>())
        };
        let mut n = 0;
        while channel.write(n * 16, noise(n), false).await.is_ok() {
            n += 1;
            assert!(n * 16 < BLOCKS, "never full");
        }
        assert_eq!(pool.grow().await.unwrap().segments, before.segments, "nothing to take yet");
        base.set_blocks(160 * MIB / u64::from(base.block_size_bytes()));
        let after = pool.grow().await.unwrap();
        assert!(after.free_bytes > 90 * MIB && after.segments > before.segments + 100, "{after:?}");
        for more in n..(n + 100).min(BLOCKS / 16) {
            channel.write(more * 16, noise(more), false).await.unwrap();
        }
        channel.flush().await.unwrap();
        // The power fails before any checkpoint of the grown table.
        send.send(disk.content()).unwrap();
        clean(&pool).await;
        base.set_blocks(32 * MIB / u64::from(base.block_size_bytes()));
        let smaller = pool.grow().await.unwrap_err().to_string();
        assert!(smaller.contains("pools do not shrink"), "{smaller}");
    });
    let image = receive.recv().unwrap();
    Sim::new(5).run(move || async move {
        let (registry, _disk) = disk(160 * MIB, image);
        let pool = LocalPool::open(&registry, "disk", &key(), Some(16 * MIB)).await.unwrap().unwrap();
        clean(&pool).await;
        let channel = open(&registry);
        let mut rng = Rng::new(0);
        let first: Vec<u8> = (0..16 * 512).flat_map(|_| rng.next().to_le_bytes()).collect();
        assert!(channel.read(0, 16).await.unwrap().to_contiguous().as_slice() == first);
    });
}
