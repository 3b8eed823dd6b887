//! A device that fails or lies: errors, never wrong data, and what was made durable comes back.

mod support;

use std::sync::Arc;

use cryptfold_bdev::{Access, Channel, Op, Registry, Status};
use cryptfold_bdev_sim::{Effect, Fault, Image, Rng, When};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, Sim};
use cryptfold_reduce::{CreateOptions, KeyChange, LocalPool, Part, PoolError, ScrubState, VolumeOptions};
use support::key;

const MIB: u64 = 1 << 20;
const BLOCKS: u64 = 1024;

async fn create(registry: &Arc<Registry>) -> LocalPool {
    let mut options = CreateOptions::new(key());
    options.memory_budget = Some(16 * MIB);
    let pool = LocalPool::create(registry, "disk", "p", &options).await.unwrap();
    let volume = VolumeOptions { name: "v".into(), size_bytes: BLOCKS * 4096, ..VolumeOptions::default() };
    pool.create_volume(&volume).await.unwrap();
    pool
}

async fn reopen(registry: &Arc<Registry>) -> Result<LocalPool, PoolError> {
    Ok(LocalPool::open(registry, "disk", &key(), Some(16 * MIB)).await?.expect("a pool"))
}

fn open(registry: &Arc<Registry>) -> Channel {
    registry.open("p/v", Access::ReadWrite, |_| ()).unwrap().channel().unwrap()
}

/// A block that nothing else looks like; some compress, some do not.
fn block(lba: u64, stamp: u64) -> Vec<u8> {
    let mut rng = Rng::new(lba << 32 ^ stamp);
    let words = if stamp.is_multiple_of(3) { 16 } else { 512 };
    let mut block: Vec<u8> = (0..words).flat_map(|_| rng.next().to_le_bytes()).collect();
    block.resize(4096, (lba + stamp) as u8);
    block
}

/// What each block may hold: the stamp of its last write; `None` after a write that failed.
type Model = Vec<Option<u64>>;

async fn work(channel: &Channel, model: &mut Model, rng: &mut Rng, stamp: &mut u64, steps: u64) {
    for _ in 0..steps {
        let blocks = rng.range(1, 33);
        let lba = rng.below(BLOCKS - blocks);
        match rng.below(10) {
            0 => drop(channel.flush().await),
            1..=3 => verify(channel, model, lba, blocks).await,
            _ => {
                *stamp += 1;
                let data: Vec<u8> = (lba..lba + blocks).flat_map(|n| block(n, *stamp)).collect();
                let done = channel.write(lba, Buf::from_slice(&data), rng.one_in(20)).await;
                for n in lba..lba + blocks {
                    model[n as usize] = done.is_ok().then_some(*stamp);
                }
            }
        }
    }
}

/// Every block is an error or what was written last. Gives the number of errors.
async fn verify(channel: &Channel, model: &Model, lba: u64, blocks: u64) {
    let Ok(data) = channel.read(lba, blocks).await else {
        for n in lba..lba + blocks {
            if let Ok(data) = channel.read(n, 1).await {
                expect(model, n, &data.to_contiguous());
            }
        }
        return;
    };
    for (n, data) in data.to_contiguous().chunks(4096).enumerate() {
        expect(model, lba + n as u64, data);
    }
}

fn expect(model: &Model, lba: u64, data: &[u8]) {
    match model[lba as usize] {
        Some(0) => assert!(data.iter().all(|&byte| byte == 0), "block {lba} was never written"),
        Some(stamp) => assert!(data == block(lba, stamp), "block {lba} is not what was written"),
        None => {}
    }
}

async fn one_lie(seed: u64) {
    let mut rng = Rng::new(seed);
    let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
    let pool = create(&registry).await;
    let channel = open(&registry);
    let mut model: Model = vec![Some(0); BLOCKS as usize];
    let mut stamp = 0;
    work(&channel, &mut model, &mut rng, &mut stamp, 60).await;
    let effect = match rng.below(5) {
        0 => Effect::Lost,
        1 => Effect::Misdirected(rng.below(40 * MIB / 4096) * 4096),
        2 => Effect::Stale,
        3 => Effect::Flip { offset: rng.below(4096), mask: 1 << rng.below(8) },
        _ => Effect::Fail(Status::UNRECOVERED_READ),
    };
    let op = match effect {
        Effect::Stale | Effect::Fail(_) => Op::Read,
        Effect::Flip { .. } if rng.one_in(2) => Op::Read,
        _ => Op::Write,
    };
    disk.inject(Fault { when: When::nth(op, rng.below(60)), effect });
    work(&channel, &mut model, &mut rng, &mut stamp, 120).await;
    verify(&channel, &model, 0, BLOCKS).await;
    drop(channel);
    let closed = pool.close().await;
    disk.clear_faults();
    if closed.is_err() {
        return;
    }
    // Closed in order, so nothing may be missing: it opens and tells the truth, or it does not open.
    let Ok(pool) = reopen(&registry).await else { return };
    let channel = open(&registry);
    verify(&channel, &model, 0, BLOCKS).await;
    drop(channel);
    let _ = pool.close().await;
}

#[test]
fn a_device_that_lies_once_gives_errors_and_no_wrong_data() {
    let count = std::env::var("CRYPTFOLD_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(100);
    for seed in 0..count {
        let caught = std::panic::catch_unwind(|| Sim::new(seed).run(move || one_lie(seed)));
        assert!(caught.is_ok(), "seed {seed}");
    }
}

#[test]
fn a_device_that_takes_no_data_stops_the_pool_and_loses_nothing() {
    Sim::new(3).run(|| async {
        let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        let channel = open(&registry);
        let mut model: Model = vec![Some(0); BLOCKS as usize];
        let (mut rng, mut stamp) = (Rng::new(1), 0);
        work(&channel, &mut model, &mut rng, &mut stamp, 60).await;
        channel.flush().await.unwrap();
        disk.inject(Fault {
            when: When::always(Op::Write, 0..40 * MIB),
            effect: Effect::Fail(Status::WRITE_FAULT),
        });
        channel.write(0, Buf::from_slice(&block(0, 999)), false).await.unwrap();
        assert_eq!(channel.flush().await, Err(Status::WRITE_FAULT));
        assert_eq!(channel.write(1, Buf::from_slice(&block(1, 999)), false).await, Err(Status::WRITE_FAULT));
        assert!(pool.info().failed.is_some());
        model[0] = None;
        verify(&channel, &model, 0, BLOCKS).await;
        drop(channel);
        assert!(pool.close().await.is_err() || disk.events() > 0);
        disk.clear_faults();
        let pool = reopen(&registry).await.unwrap();
        let channel = open(&registry);
        verify(&channel, &model, 0, BLOCKS).await;
        assert!(pool.check(true).await.unwrap().is_clean());
    });
}

#[test]
fn a_hole_in_the_journal_is_refused_and_a_torn_end_is_not() {
    Sim::new(4).run(|| async {
        let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        let channel = open(&registry);
        pool.checkpoint().await.unwrap();
        let before = disk.content();
        let mut batches = Vec::new();
        // Each flush is one batch of the journal (2 MiB into the disk).
        for n in 0..5u64 {
            let image = disk.content();
            channel.write(n, Buf::from_slice(&block(n, 1)), false).await.unwrap();
            channel.flush().await.unwrap();
            let (mut a, mut b) = (vec![0; 4096], vec![0; 4096]);
            let changed = (0..256).map(|page| 2 * MIB + page * 4096).find(|&at| {
                image.read(at, &mut a);
                disk.content().read(at, &mut b);
                a != b
            });
            batches.push(changed.unwrap());
        }
        drop(before);
        let full = disk.content();
        let reopened = |image: Image| async move {
            let (registry, _disk) = support::disk(40 * MIB, image);
            match reopen(&registry).await {
                Ok(pool) => {
                    let channel = open(&registry);
                    let mut there = Vec::new();
                    for n in 0..5 {
                        let data = channel.read(n, 1).await.unwrap().to_contiguous();
                        there.push(data.as_slice() == block(n, 1));
                    }
                    drop(channel);
                    pool.close().await.unwrap();
                    Ok(there)
                }
                Err(error) => Err(error.to_string()),
            }
        };
        assert_eq!(reopened(full.clone()).await.unwrap(), [true; 5]);
        let mut torn = full.clone();
        torn.flip(batches[4] + 1000, 1);
        assert_eq!(reopened(torn).await.unwrap(), [true, true, true, true, false]);
        let mut hole = full.clone();
        hole.flip(batches[2] + 1000, 1);
        let error = reopened(hole).await.unwrap_err();
        assert!(error.contains("journal batch"), "{error}");
        let _ = reactor::now();
    });
}

/// A block that does not compress.
fn noise(lba: u64, stamp: u64) -> Vec<u8> {
    block(lba, 3 * stamp + 1)
}

/// Writes blocks `0 .. blocks`, but not `bad`.
async fn write_others(channel: &Channel, blocks: u64, bad: u64, stamp: u64) {
    for lba in (0..blocks).step_by(16) {
        let parts = if (lba..lba + 16).contains(&bad) {
            [lba..bad, bad + 1..lba + 16]
        } else {
            [lba..lba + 16, 0..0]
        };
        for part in parts.into_iter().filter(|part| !part.is_empty()) {
            let data: Vec<u8> = part.clone().flat_map(|n| noise(n, stamp)).collect();
            channel.write(part.start, Buf::from_slice(&data), false).await.unwrap();
        }
    }
    channel.flush().await.unwrap();
}

/// The device says of the fragment of block `bad` that it can not be read and that trying again is useless, as drives do.
async fn spoil(pool: &LocalPool, disk: &cryptfold_bdev_sim::SimDisk, bad: u64) {
    let (at, bytes) = pool.place_of("v", bad, Part::Fragment).await.unwrap();
    disk.inject(Fault {
        when: When::always(Op::Read, at..at + u64::from(bytes)),
        effect: Effect::Fail(Status::UNRECOVERED_READ.do_not_retry()),
    });
}

async fn verify_others(channel: &Channel, blocks: u64, bad: u64, stamp: u64) {
    for lba in (0..blocks).filter(|lba| *lba != bad) {
        let data = channel.read(lba, 1).await.unwrap_or_else(|e| panic!("block {lba}: {e}"));
        assert!(data.to_contiguous().as_slice() == noise(lba, stamp), "block {lba}");
    }
}

#[test]
fn a_place_that_can_not_be_read_does_not_stop_collection_and_is_damage() {
    Sim::new(6).run(|| async {
        let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
        let pool = small_segments(&registry).await;
        let channel = open(&registry);
        let bad = 77;
        channel.write(bad, Buf::from_slice(&noise(bad, 1)), false).await.unwrap();
        channel.flush().await.unwrap();
        spoil(&pool, &disk, bad).await;
        // Nothing else lives in its segment soon: the collector comes to it first.
        for stamp in 1..=12 {
            write_others(&channel, 3072, bad, stamp).await;
        }
        let info = pool.info();
        assert!(info.written_bytes > 3 * info.capacity_bytes, "all space was used several times");
        verify_others(&channel, 3072, bad, 12).await;
        assert_eq!(channel.read(bad, 1).await.unwrap_err(), Status::UNRECOVERED_READ);
        // Audit and repair find damage, no failure of the device: that block is told of, and no other is touched.
        let report = pool.check(true).await.unwrap();
        assert_eq!(report.problem_count, 1, "{:#?}", report.problems);
        let report = pool.repair(true).await.unwrap();
        assert_eq!(report.problem_count, 1, "{:#?}", report.problems);
        assert_eq!(channel.read(bad, 1).await.unwrap_err(), Status::UNRECOVERED_READ);
        verify_others(&channel, 3072, bad, 12).await;
    });
}

#[test]
fn a_place_that_can_not_be_read_does_not_stop_a_change_of_keys() {
    Sim::new(7).run(|| async {
        let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
        let pool = small_segments(&registry).await;
        let channel = open(&registry);
        let bad = 5;
        channel.write(bad, Buf::from_slice(&noise(bad, 1)), false).await.unwrap();
        channel.flush().await.unwrap();
        write_others(&channel, 16, bad, 1).await;
        let mut blocks = 16;
        // Until space is short: then segments are emptied one after the other, not container by container.
        while pool.info().free_segments > 8 {
            let data: Vec<u8> = (blocks..blocks + 16).flat_map(|n| noise(n, 1)).collect();
            channel.write(blocks, Buf::from_slice(&data), false).await.unwrap();
            blocks += 16;
        }
        channel.flush().await.unwrap();
        spoil(&pool, &disk, bad).await;
        pool.change_domain_keys("default", KeyChange::Rotate, 1 << 40).await.unwrap();
        renewed(&pool).await;
        let domain = &pool.domains()[0];
        assert!(domain.changing && domain.old_bytes > 0, "{domain:?}");
        assert!(domain.old_bytes < 2 * MIB, "all but what shares its segment is under new keys: {domain:?}");
        verify_others(&channel, blocks, bad, 1).await;
        // The drive has come to itself: the change ends.
        disk.clear_faults();
        pool.start_renewal(1 << 40).unwrap();
        renewed(&pool).await;
        let domain = &pool.domains()[0];
        assert!(!domain.changing && domain.old_bytes == 0, "{domain:?} {:?}", pool.info().renewal);
        verify_others(&channel, blocks, u64::MAX, 1).await;
    });
}

const SEGMENT: u64 = MIB;

/// A pool with small segments.
async fn small_segments(registry: &Arc<Registry>) -> LocalPool {
    let mut options = CreateOptions::new(key());
    options.memory_budget = Some(16 * MIB);
    options.segment_bytes = Some(SEGMENT as u32);
    let pool = LocalPool::create(registry, "disk", "p", &options).await.unwrap();
    let volume = VolumeOptions { name: "v".into(), size_bytes: 32 * MIB, ..VolumeOptions::default() };
    pool.create_volume(&volume).await.unwrap();
    pool
}

/// Where the segment of a block begins on the disk.
async fn segment_of(pool: &LocalPool, lba: u64) -> u64 {
    let (at, _) = pool.place_of("v", lba, Part::Fragment).await.unwrap();
    pool.live_segments().into_iter().filter(|start| *start <= at).max().unwrap()
}

/// Of blocks 0 .. 200 all but each fourth die. The pool is closed and opened, `spoil` does something to their segment, and other
/// blocks are overwritten: their segment is the one that is emptied first. Gives those that are still there.
async fn left_behind(spoil: impl FnOnce(&cryptfold_bdev_sim::SimDisk, u64)) -> Vec<u64> {
    let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
    let pool = small_segments(&registry).await;
    let channel = open(&registry);
    for stamp in [1, 2] {
        for lba in (0..200).filter(|lba| stamp == 1 || lba % 4 != 0) {
            channel.write(lba, Buf::from_slice(&noise(lba, stamp)), false).await.unwrap();
        }
    }
    channel.flush().await.unwrap();
    drop(channel);
    pool.close().await.unwrap();
    let pool = reopen(&registry).await.unwrap();
    let segment = segment_of(&pool, 100).await;
    pool.close().await.unwrap();
    let pool = reopen(&registry).await.unwrap();
    let channel = open(&registry);
    spoil(&disk, segment);
    let mut rng = Rng::new(5);
    for n in 0..12_000u64 {
        let lba = if n < 4500 { 200 + n } else { 200 + rng.below(4500) };
        channel.write(lba, Buf::from_slice(&noise(lba, n)), false).await.unwrap();
    }
    channel.flush().await.unwrap();
    assert!(pool.info().moved_bytes > 4 * SEGMENT, "{:?}", pool.info());
    let mut left = Vec::new();
    for lba in (0..200).step_by(4) {
        let (at, _) = pool.place_of("v", lba, Part::Fragment).await.unwrap();
        if (segment..segment + SEGMENT).contains(&at) {
            left.push(lba);
        } else {
            let data = channel.read(lba, 1).await.unwrap().to_contiguous();
            assert!(data.as_slice() == noise(lba, 1), "block {lba}");
        }
    }
    left
}

#[test]
fn a_segment_that_can_not_be_read_for_a_moment_is_collected_later() {
    // Any error of its header's read kept it from being collected until the pool was opened again.
    let left = Sim::new(9).run(|| {
        left_behind(|disk, segment| {
            disk.inject(Fault {
                when: When { hits: 1, ..When::always(Op::Read, segment..segment + 4096) },
                effect: Effect::Fail(Status::NAMESPACE_NOT_READY),
            });
        })
    });
    assert_eq!(left, [0; 0]);
}

/// Waits for the end of a renewal, which has to come.
async fn renewed(pool: &LocalPool) {
    let limit = reactor::now() + std::time::Duration::from_secs(600);
    while pool.info().renewal.state == ScrubState::Running {
        assert!(reactor::now() < limit, "the renewal does not end: {:?}", pool.info().renewal);
        reactor::sleep(std::time::Duration::from_millis(1)).await;
    }
}

async fn change_with_a_lost_header(short: bool) {
    let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
    let pool = small_segments(&registry).await;
    let channel = open(&registry);
    let mut blocks = 0;
    while blocks < 512 || (short && pool.info().free_segments > 8) {
        let data: Vec<u8> = (blocks..blocks + 16).flat_map(|n| noise(n, 1)).collect();
        channel.write(blocks, Buf::from_slice(&data), false).await.unwrap();
        blocks += 16;
    }
    drop(channel);
    pool.close().await.unwrap();
    let pool = reopen(&registry).await.unwrap();
    let segment = segment_of(&pool, 100).await;
    let mut others = Vec::new();
    for lba in 0..blocks {
        let (at, _) = pool.place_of("v", lba, Part::Fragment).await.unwrap();
        if !(segment..segment + SEGMENT).contains(&at) {
            others.push(lba);
        }
    }
    pool.close().await.unwrap();
    let pool = reopen(&registry).await.unwrap();
    let channel = open(&registry);
    let header = segment..segment + 4096;
    let effect = Effect::Fail(Status::UNRECOVERED_READ);
    disk.inject(Fault { when: When::always(Op::Read, header), effect });
    pool.change_domain_keys("default", KeyChange::Rotate, 1 << 40).await.unwrap();
    renewed(&pool).await;
    let domain = &pool.domains()[0];
    assert!(domain.changing && domain.old_bytes > 0 && domain.old_bytes <= SEGMENT, "{domain:?}");
    assert!(pool.info().renewal.damaged > 0, "{:?}", pool.info().renewal);
    for lba in others {
        let data = channel.read(lba, 1).await.unwrap_or_else(|e| panic!("block {lba}: {e}"));
        assert!(data.to_contiguous().as_slice() == noise(lba, 1), "block {lba}");
    }
}

#[test]
fn a_segment_whose_header_is_lost_does_not_hold_up_a_change_of_keys() {
    // The renewal took it for something that passes, and tried again for ever.
    Sim::new(10).run(|| change_with_a_lost_header(false));
    Sim::new(11).run(|| change_with_a_lost_header(true));
}
