//! Changes of domains' keys: new ones, encryption off and on, while hosts read and write; and what is left on the device.

mod support;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Op, Registry, Status};
use cryptfold_bdev_sim::{Effect, Fault, Image, Rng, SimDisk, Survivors, Tear, When};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, Sim};
use cryptfold_reduce::keys::{DomainWraps, PoolKeys};
use cryptfold_reduce::{
    CreateOptions, DomainInfo, KeyChange, LocalPool, Part, PoolError, ScrubState, VolumeOptions,
};
use support::{count, key};

const MIB: u64 = 1 << 20;
const FAST: u64 = 1 << 40;

fn disk(image: Image) -> (Arc<Registry>, Arc<SimDisk>) {
    support::disk(96 * MIB, image)
}

async fn new_pool(registry: &Arc<Registry>) -> LocalPool {
    let mut options = CreateOptions::new(key());
    options.memory_budget = Some(16 * MIB);
    options.segment_bytes = Some(MIB as u32);
    let pool = LocalPool::create(registry, "disk", "p", &options).await.unwrap();
    pool.create_domain("tenant").await.unwrap();
    for (name, domain) in [("v", None), ("w", None), ("t", Some("tenant".to_owned()))] {
        let options =
            VolumeOptions { name: name.into(), size_bytes: 8 * MIB, domain, ..VolumeOptions::default() };
        pool.create_volume(&options).await.unwrap();
    }
    pool
}

async fn reopen(registry: &Arc<Registry>) -> LocalPool {
    LocalPool::open(registry, "disk", &key(), Some(16 * MIB)).await.unwrap().unwrap()
}

fn open(registry: &Arc<Registry>, name: &str, access: Access) -> Channel {
    registry.open(&format!("p/{name}"), access, |_| ()).unwrap().channel().unwrap()
}

/// Blocks from this one on do not compress.
const NOISE: u64 = 100_000;

/// A block; every third compresses.
fn block(value: u64) -> Vec<u8> {
    let mut rng = Rng::new(value + 1);
    let words = if value.is_multiple_of(3) && value < NOISE { 32 } else { 512 };
    let mut block: Vec<u8> = (0..words).flat_map(|_| rng.next().to_le_bytes()).collect();
    block.resize(4096, value as u8);
    block
}

/// Writes these values from block `at` on.
async fn write(channel: &Channel, at: u64, values: std::ops::Range<u64>) {
    let mut at = at;
    for from in values.clone().step_by(16) {
        let to = values.end.min(from + 16);
        let data: Vec<u8> = (from..to).flat_map(block).collect();
        channel.write(at, Buf::from_slice(&data), false).await.unwrap();
        at += to - from;
    }
    channel.flush().await.unwrap();
}

async fn verify(channel: &Channel, at: u64, values: std::ops::Range<u64>) {
    for (at, value) in (at..).zip(values) {
        let data = channel.read(at, 1).await.unwrap().to_contiguous();
        assert!(data.as_slice() == block(value), "block {at}");
    }
}

async fn clean(pool: &LocalPool) {
    let report = pool.check(true).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.problems);
}

fn domain(pool: &LocalPool, name: &str) -> DomainInfo {
    pool.domains().into_iter().find(|d| d.name == name).unwrap()
}

async fn done(pool: &LocalPool) {
    while pool.info().renewal.state == ScrubState::Running {
        reactor::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(pool.info().renewal.state, ScrubState::Done, "{:?}", pool.info().renewal);
}

fn unique(pool: &LocalPool, name: &str) -> u64 {
    domain(pool, name).space.unique_bytes / 4096
}

#[test]
fn a_domain_gets_new_keys_and_nothing_is_left_under_the_old_ones() {
    Sim::new(1).run(|| async {
        let (registry, disk) = disk(Image::zeroed());
        let pool = new_pool(&registry).await;
        let (v, t) = (open(&registry, "v", Access::ReadWrite), open(&registry, "t", Access::ReadWrite));
        write(&v, 0, 0..1500).await;
        write(&t, 0, 0..300).await;
        pool.snapshot_volume("v", "s").await.unwrap();
        pool.clone_volume("s", "c").await.unwrap();
        write(&v, 100, 5000..5100).await;
        pool.checkpoint().await.unwrap();
        let (old, other) = (pool.wrapped_keys("default"), pool.wrapped_keys("tenant"));
        let before = pool.key_block();
        let stored = pool.info().space.stored_bytes;

        pool.change_domain_keys("default", KeyChange::Rotate, FAST).await.unwrap();
        let begun = domain(&pool, "default");
        assert!(begun.changing && begun.generation == 2 && begun.old_bytes > 0, "{begun:?}");
        let again = pool.change_domain_keys("default", KeyChange::Rotate, FAST).await;
        assert!(matches!(again, Err(PoolError::Busy(_))));
        // New writes at once: among themselves they are found, and the old ones are not yet.
        let w = open(&registry, "w", Access::ReadWrite);
        write(&w, 0, 7000..7064).await;
        write(&w, 64, 7000..7064).await;
        done(&pool).await;

        let ended = domain(&pool, "default");
        assert_eq!((ended.changing, ended.generation, ended.old_bytes), (false, 2, 0));
        assert_eq!((domain(&pool, "tenant").generation, domain(&pool, "tenant").changing), (1, false));
        let s = open(&registry, "s", Access::ReadOnly);
        let c = open(&registry, "c", Access::ReadWrite);
        for channel in [&s, &c] {
            verify(channel, 0, 0..1500).await;
        }
        verify(&v, 0, 0..100).await;
        verify(&v, 100, 5000..5100).await;
        verify(&v, 200, 200..1500).await;
        verify(&w, 64, 7000..7064).await;
        verify(&t, 0, 0..300).await;
        assert_eq!(unique(&pool, "default"), 1500 + 100 + 64);
        // What was stored before is found by the new fingerprints.
        write(&w, 200, 0..1500).await;
        assert_eq!(unique(&pool, "default"), 1500 + 100 + 64);
        assert!(pool.info().space.stored_bytes < stored * 3 / 2);
        clean(&pool).await;

        // The keys that were: what opened them is gone from the device, and what is there opens none of them.
        let keys = PoolKeys::derive(&pool.pool_key(), pool.info().uuid);
        let wraps = |erasure| DomainWraps::open(&keys, &erasure).unwrap();
        let (then, now) = (wraps(before.erasure), wraps(pool.key_block().erasure));
        assert!(old.len() == 2 && other.len() == 2);
        assert!(old.iter().chain(&other).all(|key| then.unwrap(key).is_ok() && now.unwrap(key).is_err()));
        assert_eq!(count(&disk.content(), &before.erasure[0].unwrap()), 0);
        assert_eq!(pool.wrapped_keys("default").len(), 2);
        assert!(pool.wrapped_keys("default").iter().all(|key| now.unwrap(key).is_ok()));

        drop((v, t, w, s, c));
        pool.close().await.unwrap();
        let pool = reopen(&registry).await;
        let (v, t) = (open(&registry, "v", Access::ReadOnly), open(&registry, "t", Access::ReadOnly));
        verify(&v, 200, 200..1500).await;
        verify(&t, 0, 0..300).await;
        clean(&pool).await;
    });
}

/// How many of these blocks, which do not compress, have something of theirs on the device in clear.
fn in_clear(image: &Image, values: std::ops::Range<u64>) -> usize {
    let word = |value| u64::from_le_bytes(block(value)[1000..1008].try_into().unwrap());
    let words: HashSet<u64> = values.map(word).collect();
    let mut found = HashSet::new();
    for page in image.written_pages() {
        let mut window = [0; 4104];
        image.read(page, &mut window[..4096]);
        image.read(page + 4096, &mut window[4096..]);
        let there = window.windows(8).map(|w| u64::from_le_bytes(w.try_into().unwrap()));
        found.extend(there.filter(|word| words.contains(word)));
    }
    found.len()
}

#[test]
fn encryption_is_switched_off_and_on_with_live_data() {
    Sim::new(2).run(|| async {
        let (registry, disk) = disk(Image::zeroed());
        let pool = new_pool(&registry).await;
        let (v, t) = (open(&registry, "v", Access::ReadWrite), open(&registry, "t", Access::ReadWrite));
        write(&v, 0, NOISE..NOISE + 1200).await;
        write(&t, 0, NOISE + 20000..NOISE + 20200).await;
        pool.snapshot_volume("v", "s").await.unwrap();
        let refused = pool.change_domain_keys("default", KeyChange::Enable, FAST).await;
        assert!(matches!(refused, Err(PoolError::Invalid(_))));
        assert_eq!(in_clear(&disk.content(), NOISE..NOISE + 1200), 0);

        pool.change_domain_keys("default", KeyChange::Disable, FAST).await.unwrap();
        write(&v, 300, NOISE + 3000..NOISE + 3100).await;
        done(&pool).await;
        let off = domain(&pool, "default");
        assert_eq!((off.encrypted, off.changing, off.generation), (false, false, 2));
        assert!(in_clear(&disk.content(), NOISE..NOISE + 1200) >= 1000);
        assert_eq!(in_clear(&disk.content(), NOISE + 20000..NOISE + 20200), 0, "another domain's");
        for change in [KeyChange::Rotate, KeyChange::Disable] {
            let refused = pool.change_domain_keys("default", change, FAST).await;
            assert!(matches!(refused, Err(PoolError::Invalid(_))));
        }
        // Destroying keys would erase nothing of it.
        for erased in [pool.erase_domain("default").await.map(drop), pool.clone().erase().await.map(drop)] {
            assert!(matches!(erased, Err(PoolError::Invalid(_))), "{erased:?}");
        }
        // Damage is still found, duplicates too, and the segments are used again and again.
        for round in 0..4 {
            let from = NOISE + 4000 + round * 1000;
            write(&v, 400, from..from + 800).await;
        }
        drop((v, t));
        pool.close().await.unwrap();
        let pool = reopen(&registry).await;
        let v = open(&registry, "v", Access::ReadWrite);
        assert!(!domain(&pool, "default").encrypted);
        verify(&v, 300, NOISE + 3000..NOISE + 3100).await;
        clean(&pool).await;

        pool.change_domain_keys("default", KeyChange::Enable, FAST).await.unwrap();
        write(&v, 100, NOISE + 30000..NOISE + 30100).await;
        done(&pool).await;
        let on = domain(&pool, "default");
        assert_eq!((on.encrypted, on.changing, on.generation), (true, false, 3));
        // Not what lives, nor what was deleted or overwritten while encryption was off.
        let image = disk.content();
        for (from, count) in
            [(0, 1200), (3000, 100), (4000, 800), (5000, 800), (6000, 800), (7000, 800), (30_000, 100)]
        {
            assert_eq!(in_clear(&image, NOISE + from..NOISE + from + count), 0, "{from}");
        }
        let s = open(&registry, "s", Access::ReadOnly);
        verify(&s, 0, NOISE..NOISE + 1200).await;
        verify(&v, 0, NOISE..NOISE + 100).await;
        verify(&v, 100, NOISE + 30000..NOISE + 30100).await;
        verify(&v, 400, NOISE + 7000..NOISE + 7800).await;
        clean(&pool).await;
    });
}

/// Data that can not be read keeps the old keys, and says so; what a repair gives up no longer does.
#[test]
fn damaged_data_is_not_given_up_with_the_old_keys() {
    Sim::new(3).run(|| async {
        let (registry, disk) = disk(Image::zeroed());
        let pool = new_pool(&registry).await;
        let v = open(&registry, "v", Access::ReadWrite);
        write(&v, 0, 0..600).await;
        pool.checkpoint().await.unwrap();
        let (at, bytes) = pool.place_of("v", 100, Part::Fragment).await.unwrap();
        let mut image = disk.content();
        let mut sealed = vec![0; bytes as usize];
        image.read(at, &mut sealed);
        sealed[20] ^= 1;
        image.write(at, &sealed);
        drop(v);
        pool.close().await.unwrap();
        let mut closed = disk.content();
        closed.write(at, &sealed);
        let (registry, _disk) = self::disk(closed);
        let pool = reopen(&registry).await;
        let before = pool.key_block().erasure[0];
        pool.change_domain_keys("default", KeyChange::Rotate, FAST).await.unwrap();
        while pool.info().renewal.state == ScrubState::Running {
            reactor::sleep(Duration::from_millis(1)).await;
        }
        let renewal = pool.info().renewal;
        assert_eq!(renewal.state, ScrubState::Stopped);
        assert!(renewal.reason.as_ref().unwrap().contains("repair"), "{renewal:?}");
        let held = domain(&pool, "default");
        assert!(held.changing && held.old_bytes > 0 && renewal.damaged > 0, "{held:?}");
        assert_eq!(pool.key_block().erasure[0], before);
        // Its blocks are overwritten: nothing needs the old keys any more.
        let v = open(&registry, "v", Access::ReadWrite);
        write(&v, 90, 9000..9030).await;
        pool.start_renewal(FAST).unwrap();
        done(&pool).await;
        assert!(!domain(&pool, "default").changing);
        assert_ne!(pool.key_block().erasure[0], before);
        verify(&v, 0, 0..90).await;
        verify(&v, 90, 9000..9030).await;
        verify(&v, 120, 120..600).await;
        clean(&pool).await;
    });
}

/// A pool so full that hosts get no more space has room enough to be rewritten, while they overwrite what is there.
#[test]
fn a_full_pool_gets_new_keys() {
    Sim::new(5).run(|| async {
        let (registry, _disk) = support::disk(40 * MIB, Image::zeroed());
        let mut options = CreateOptions::new(key());
        options.memory_budget = Some(16 * MIB);
        options.segment_bytes = Some(MIB as u32);
        let pool = LocalPool::create(&registry, "disk", "p", &options).await.unwrap();
        let volume = VolumeOptions { name: "v".into(), size_bytes: 64 * MIB, ..VolumeOptions::default() };
        pool.create_volume(&volume).await.unwrap();
        let v = open(&registry, "v", Access::ReadWrite);
        let mut blocks = 0;
        loop {
            let from = NOISE + blocks;
            let data: Vec<u8> = (from..from + 16).flat_map(block).collect();
            if v.write(blocks, Buf::from_slice(&data), false).await.is_err() {
                break;
            }
            blocks += 16;
        }
        v.flush().await.unwrap();
        assert!(blocks > 4000 && pool.info().free_bytes == 0, "{blocks} {:?}", pool.info());
        pool.change_domain_keys("default", KeyChange::Rotate, FAST).await.unwrap();
        let mut again = 0;
        while pool.info().renewal.state == ScrubState::Running && again < 64 {
            // Some of it may be refused while nothing is free.
            let data: Vec<u8> = (0..4).flat_map(|n| block(2 * NOISE + again + n)).collect();
            if v.write(again, Buf::from_slice(&data), false).await.is_ok() {
                again += 4;
            }
            reactor::sleep(Duration::from_micros(300)).await;
        }
        done(&pool).await;
        assert!(!domain(&pool, "default").changing);
        verify(&v, 0, 2 * NOISE..2 * NOISE + again).await;
        verify(&v, again, NOISE + again..NOISE + blocks).await;
        clean(&pool).await;
    });
}

/// A pass of late deduplication that began before the switch does not say that it has compared what it has not.
#[test]
fn late_deduplication_under_way_does_not_spoil_a_change_of_keys() {
    Sim::new(6).run(|| async {
        let (registry, _disk) = disk(Image::zeroed());
        let pool = new_pool(&registry).await;
        pool.sample_index(8);
        pool.limit_neighbours(0);
        let (v, w) = (open(&registry, "v", Access::ReadWrite), open(&registry, "w", Access::ReadWrite));
        write(&v, 0, NOISE..NOISE + 1536).await;
        for n in (0..1536).rev() {
            w.write(n, Buf::from_slice(&block(NOISE + n)), false).await.unwrap();
        }
        w.flush().await.unwrap();
        assert!(unique(&pool, "default") > 2500, "the sample finds too much to test anything");
        pool.start_late(Some(1)).unwrap();
        pool.change_domain_keys("default", KeyChange::Rotate, FAST).await.unwrap();
        done(&pool).await;
        for _ in 0..2 {
            // One that began before the end passes lists over; the next one does not.
            while pool.info().late.state == ScrubState::Running {
                reactor::sleep(Duration::from_millis(1)).await;
            }
            pool.start_late(None).unwrap();
        }
        while pool.info().late.state == ScrubState::Running {
            reactor::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(unique(&pool, "default"), 1536);
        verify(&v, 0, NOISE..NOISE + 1536).await;
        verify(&w, 0, NOISE..NOISE + 1536).await;
        clean(&pool).await;
    });
}

#[test]
fn a_pool_of_the_first_format_says_that_it_can_not_change_keys() {
    Sim::new(4).run(|| async {
        let (registry, _disk) = disk(Image::zeroed());
        let mut options = CreateOptions::new(key());
        options.first_format = true;
        let pool = LocalPool::create(&registry, "disk", "p", &options).await.unwrap();
        let refused = pool.change_domain_keys("default", KeyChange::Rotate, FAST).await;
        assert!(matches!(refused, Err(PoolError::NotErasable(_))));
        pool.close().await.unwrap();
    });
}

#[test]
fn a_power_cut_in_between_leaves_all_data_and_a_change_that_goes_on() {
    for (seed, after) in (0..12u64).map(|n| (n, 40 + n * 97)) {
        Sim::new(seed).run(move || async move {
            let (registry, disk) = disk(Image::zeroed());
            let pool = new_pool(&registry).await;
            let v = open(&registry, "v", Access::ReadWrite);
            write(&v, 0, 0..1000).await;
            let rotating = pool.clone();
            disk.cut_power_after(after);
            reactor::spawn_local(async move {
                let _ = rotating.change_domain_keys("default", KeyChange::Rotate, FAST).await;
            })
            .detach();
            for _ in 0..100_000 {
                if disk.is_off() {
                    break;
                }
                reactor::sleep(Duration::from_micros(5)).await;
            }
            let image = disk.crash(Survivors::Random, Tear::Sectors, &mut Rng::new(seed));
            drop((v, pool, registry));
            let (registry, _disk) = self::disk(image);
            let pool = reopen(&registry).await;
            let v = open(&registry, "v", Access::ReadWrite);
            verify(&v, 0, 0..1000).await;
            let found = domain(&pool, "default");
            done_or_never(&pool).await;
            let ended = domain(&pool, "default");
            assert_eq!((ended.changing, ended.generation), (false, found.generation), "cut {after}");
            assert_eq!(pool.key_block().erasure[1], None);
            verify(&v, 0, 0..1000).await;
            clean(&pool).await;
        });
    }
}

async fn done_or_never(pool: &LocalPool) {
    if pool.info().renewal.state != ScrubState::Never {
        done(pool).await;
    }
}

/// A write that fails, whichever it is: a change that says that it is done has taken away what opens the old keys.
#[test]
fn a_write_that_fails_in_between_keeps_no_old_keys() {
    let (mut done, mut stopped, mut refused) = (0, 0, 0);
    for nth in 0.. {
        let all = Sim::new(nth).run(move || async move {
            let (registry, disk) = disk(Image::zeroed());
            let pool = new_pool(&registry).await;
            let v = open(&registry, "v", Access::ReadWrite);
            write(&v, 0, 0..48).await;
            pool.checkpoint().await.unwrap();
            let before = pool.key_block().erasure[0].unwrap();
            let effect = Effect::Fail(Status::INTERNAL_ERROR);
            disk.inject(Fault { when: When::nth(Op::Write, nth), effect });
            if pool.change_domain_keys("default", KeyChange::Rotate, FAST).await.is_err() {
                return (disk.clear_faults() > 0, None);
            }
            while pool.info().renewal.state == ScrubState::Running {
                reactor::sleep(Duration::from_millis(1)).await;
            }
            let state = pool.info().renewal.state;
            let unused = disk.clear_faults() > 0;
            if state == ScrubState::Done {
                assert!(
                    pool.key_block().erasure[1].is_none(),
                    "write {nth}: the secret before is still there"
                );
                assert_eq!(count(&disk.content(), &before), 0, "write {nth}: on the device, too");
            }
            // It may have hit what came after.
            if state == ScrubState::Done && pool.info().failed.is_none() {
                verify(&v, 0, 0..48).await;
                clean(&pool).await;
            }
            (unused, Some(state))
        });
        match all {
            // It was not reached any more.
            (true, _) => break,
            (false, Some(ScrubState::Done)) => done += 1,
            (false, Some(_)) => stopped += 1,
            (false, None) => refused += 1,
        }
    }
    println!(
        "of the writes of a change, {done} may fail and are made again, {stopped} end the pool, {refused} refuse it"
    );
    assert!(done > 0 && stopped + refused > 0, "{done} {stopped} {refused}");
}
