//! Key slots of a pool: who opens it, what power cuts leave, and what of older formats.

mod support;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Op, Registry, Status};
use cryptfold_bdev_sim::{Effect, Fault, Image, Rng, SimDisk, Survivors, Tear, When};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, Sim};
use cryptfold_reduce::keys::Kek;
use cryptfold_reduce::slots::{Kdf, KeySlot, MAX_KEY_SLOTS, SlotKind};
use cryptfold_reduce::{CreateOptions, KeySource, LocalPool, PoolError, VolumeOptions};
use support::count;

const MIB: u64 = 1 << 20;
const KEYS_AT: u64 = 4096;

fn bytes(n: u8) -> Vec<u8> {
    (0..32).map(|i| i ^ n).collect()
}

fn key(n: u8) -> KeySource {
    KeySource::Bytes(bytes(n))
}

fn kek(n: u8) -> Kek {
    Kek::from_file(&bytes(n)).unwrap()
}

async fn create(registry: &Arc<Registry>, first_format: bool) -> LocalPool {
    let mut options = CreateOptions::new(key(0));
    options.memory_budget = Some(16 * MIB);
    options.first_format = first_format;
    let pool = LocalPool::create(registry, "disk", "p", &options).await.unwrap();
    let volume = VolumeOptions { name: "v".into(), size_bytes: MIB, ..VolumeOptions::default() };
    pool.create_volume(&volume).await.unwrap();
    let channel = open(registry);
    channel.write(3, Buf::from_slice(&[7; 4096]), true).await.unwrap();
    pool
}

fn open(registry: &Arc<Registry>) -> Channel {
    registry.open("p/v", Access::ReadWrite, |_| ()).unwrap().channel().unwrap()
}

async fn reopen(registry: &Arc<Registry>, n: u8) -> Result<LocalPool, PoolError> {
    Ok(LocalPool::open(registry, "disk", &key(n), Some(16 * MIB)).await?.expect("a pool"))
}

async fn is_whole(registry: &Arc<Registry>) {
    let data = open(registry).read(3, 1).await.unwrap().to_contiguous();
    assert!(data.iter().all(|&byte| byte == 7));
}

/// Slots that these keys open.
fn slots(pool: &LocalPool, keys: &[u8]) -> [Option<KeySlot>; MAX_KEY_SLOTS] {
    let mut slots = [const { None }; MAX_KEY_SLOTS];
    for (at, n) in keys.iter().enumerate() {
        let slot = KeySlot::seal(SlotKind::KeyFile, Kdf::None, &kek(*n), &pool.pool_key(), 5).unwrap();
        slots[at] = Some(slot);
    }
    slots
}

#[test]
fn several_keys_open_a_pool_until_they_are_removed() {
    Sim::new(1).run(|| async {
        let (registry, _disk) = support::disk(40 * MIB, Image::zeroed());
        let pool = create(&registry, false).await;
        pool.change_slots(slots(&pool, &[0, 1, 2])).await.unwrap();
        pool.close().await.unwrap();
        for n in 0..3 {
            let pool = reopen(&registry, n).await.unwrap();
            is_whole(&registry).await;
            pool.close().await.unwrap();
        }
        let pool = reopen(&registry, 2).await.unwrap();
        pool.change_slots(slots(&pool, &[2])).await.unwrap();
        pool.close().await.unwrap();
        assert!(matches!(reopen(&registry, 0).await, Err(PoolError::WrongKey { .. })));
        let sealed = LocalPool::peek(&registry, "disk").await.unwrap().unwrap();
        assert_eq!((sealed.name.as_str(), sealed.keys.slots.iter().flatten().count()), ("p", 1));
        let pool = reopen(&registry, 2).await.unwrap();
        assert_eq!(sealed.uuid, pool.info().uuid);
        pool.close().await.unwrap();
    });
}

/// An old copy of the key block, put back, opens nothing while a newer one is there; and the next opening overwrites it.
#[test]
fn a_removed_slot_does_not_come_back_with_an_old_copy() {
    Sim::new(2).run(|| async {
        let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
        let pool = create(&registry, false).await;
        let mut old = vec![0; 4096];
        disk.content().read(MIB + KEYS_AT, &mut old);
        pool.change_slots(slots(&pool, &[1])).await.unwrap();
        pool.close().await.unwrap();
        let mut image = disk.content();
        image.write(MIB + KEYS_AT, &old);
        let (registry, disk) = support::disk(40 * MIB, image);
        assert!(matches!(reopen(&registry, 0).await, Err(PoolError::WrongKey { .. })));
        let pool = reopen(&registry, 1).await.unwrap();
        let mut now = vec![0; 4096];
        disk.content().read(MIB + KEYS_AT, &mut now);
        assert_ne!(now, old, "mended");
        is_whole(&registry).await;
        pool.close().await.unwrap();
    });
}

/// Whatever event the power fails at: the old slots or the new ones are in force, never none and never both; and when the change
/// was reported, the new ones.
#[test]
fn a_power_cut_leaves_the_old_slots_or_the_new_ones() {
    let (mut olds, mut news) = (0, 0);
    for cut in 1..40 {
        for survivors in [Survivors::None, Survivors::All, Survivors::Random] {
            let new = Rc::new(Cell::new(false));
            let (told, is_new) = (Rc::new(Cell::new(false)), new.clone());
            let done = Rc::new(Cell::new(false));
            let (tell, finished) = (told.clone(), done.clone());
            Sim::new(cut).run(move || async move {
                let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
                let pool = create(&registry, false).await;
                disk.cut_power_after(cut);
                let change = pool.clone();
                let said = tell.clone();
                reactor::spawn_local(async move {
                    let changed = change.change_slots(slots(&change, &[1])).await;
                    said.set(changed.is_ok());
                })
                .detach();
                while !disk.is_off() && !tell.get() {
                    reactor::sleep(Duration::from_micros(5)).await;
                }
                finished.set(tell.get());
                let image = disk.crash(survivors, Tear::Sectors, &mut Rng::new(cut));
                let (registry, _disk) = support::disk(40 * MIB, image);
                let (n, other) = match reopen(&registry, 0).await {
                    Ok(pool) => {
                        is_whole(&registry).await;
                        pool.close().await.unwrap();
                        (0, 1)
                    }
                    Err(PoolError::WrongKey { .. }) => (1, 0),
                    Err(error) => panic!("cut {cut}: {error}"),
                };
                is_new.set(n == 1);
                let pool = reopen(&registry, n).await.unwrap();
                is_whole(&registry).await;
                pool.close().await.unwrap();
                assert!(matches!(reopen(&registry, other).await, Err(PoolError::WrongKey { .. })));
            });
            assert!(new.get() || !told.get() || !done.get(), "cut {cut}: reported, and lost");
            if new.get() { news += 1 } else { olds += 1 }
        }
    }
    assert!(olds >= 3 && news >= 3, "{olds} old, {news} new: the cuts miss the change");
}

#[test]
fn a_pool_of_the_first_format_opens() {
    Sim::new(3).run(|| async {
        let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
        let pool = create(&registry, true).await;
        assert_eq!(pool.key_block().erasure, [None, None]);
        pool.close().await.unwrap();
        let pool = reopen(&registry, 0).await.unwrap();
        is_whole(&registry).await;
        pool.create_domain("d").await.unwrap();
        pool.change_slots(slots(&pool, &[4])).await.unwrap();
        disk.cut_power();
        let image = disk.crash(Survivors::All, Tear::Whole, &mut Rng::new(1));
        let (registry, _disk) = support::disk(40 * MIB, image);
        let pool = reopen(&registry, 4).await.unwrap();
        is_whole(&registry).await;
        assert_eq!(pool.domains().len(), 2);
        pool.close().await.unwrap();
    });
}

/// What a person has who lost everything but the back-up and a key: all anchors are wiped.
#[test]
fn a_back_up_brings_a_pool_without_anchors_back() {
    Sim::new(4).run(|| async {
        let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
        let pool = create(&registry, false).await;
        let (old, _) = pool.backup().unwrap();
        pool.change_slots(slots(&pool, &[1, 2])).await.unwrap();
        pool.checkpoint().await.unwrap();
        let (keys, superblock) = pool.backup().unwrap();
        let restore = async |registry: &Arc<Registry>, keys, n: u8, force| {
            LocalPool::restore(registry, "disk", keys, &superblock, &kek(n), force).await
        };
        pool.close().await.unwrap();
        // Slots in order are not replaced by accident; on purpose they are, by a key of the back-up.
        assert!(matches!(restore(&registry, &keys, 1, false).await, Err(PoolError::Invalid(_))));
        assert!(matches!(restore(&registry, &keys, 0, true).await, Err(PoolError::WrongKey { .. })));
        assert!(!restore(&registry, &old, 0, true).await.unwrap(), "the superblock was there");
        let pool = reopen(&registry, 0).await.unwrap();
        pool.close().await.unwrap();
        assert!(matches!(reopen(&registry, 1).await, Err(PoolError::WrongKey { .. })));

        let mut image = disk.content();
        for anchor in [0, MIB, 20 * MIB, 40 * MIB - 16384] {
            image.write(anchor, &[0; 16384]);
        }
        let (registry, _disk) = support::disk(40 * MIB, image);
        assert!(LocalPool::open(&registry, "disk", &key(1), None).await.unwrap().is_none());
        assert!(restore(&registry, &keys, 2, false).await.unwrap());
        let pool = reopen(&registry, 1).await.unwrap();
        is_whole(&registry).await;
        assert!(pool.check(true).await.unwrap().is_clean());
        pool.close().await.unwrap();
    });
}

/// What a domain to be erased has, and what has to survive.
async fn with_tenant(registry: &Arc<Registry>) -> LocalPool {
    let pool = create(registry, false).await;
    pool.create_domain("tenant").await.unwrap();
    for name in ["t", "u"] {
        let domain = Some("tenant".to_owned());
        let options =
            VolumeOptions { name: name.into(), size_bytes: 4 * MIB, domain, ..VolumeOptions::default() };
        pool.create_volume(&options).await.unwrap();
    }
    let channel = registry.open("p/t", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
    let mut rng = Rng::new(11);
    for n in (0..1024).step_by(32) {
        let data: Vec<u8> = (0..32 * 512).flat_map(|_| rng.next().to_le_bytes()).collect();
        channel.write(n, Buf::from_slice(&data), false).await.unwrap();
    }
    channel.flush().await.unwrap();
    drop(channel);
    pool.snapshot_volume("t", "s").await.unwrap();
    pool.checkpoint().await.unwrap();
    pool
}

fn names(pool: &LocalPool) -> Vec<String> {
    let mut names: Vec<String> = pool.volumes().into_iter().map(|v| v.name).collect();
    names.sort();
    names
}

async fn is_clean(pool: &LocalPool) {
    let report = pool.check(true).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.problems);
}

#[test]
fn an_erased_domain_is_gone_and_its_space_is_free() {
    Sim::new(5).run(|| async {
        let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
        let pool = with_tenant(&registry).await;
        let (wrapped, others) = (pool.wrapped_keys("tenant"), pool.wrapped_keys("default"));
        let before = pool.key_block();
        let secret = before.erasure[0].unwrap();
        assert_eq!(count(&disk.content(), &secret), 4, "in the four key blocks and nowhere else");
        let stored = pool.info();
        let erased = pool.erase_domain("tenant").await.unwrap();
        assert_eq!((erased.name.as_str(), erased.volumes.len(), erased.overwritten.len()), ("tenant", 3, 4));
        assert_eq!(count(&disk.content(), &secret), 0);
        assert_eq!(names(&pool), ["v"]);
        assert!(registry.get("p/t").is_err() && pool.erase_domain("tenant").await.is_err());
        assert!(pool.info().free_segments >= stored.free_segments + 4, "{:?}", pool.info());
        assert!(pool.info().space.stored_bytes < stored.space.stored_bytes / 10);
        // What opened its keys opens them no more; nor does anything else that is left.
        let pool_key = pool.pool_key();
        let keys = cryptfold_reduce::keys::PoolKeys::derive(&pool_key, pool.info().uuid);
        let wraps = |erasure| cryptfold_reduce::keys::DomainWraps::open(&keys, &erasure).unwrap();
        let (then, now) = (wraps(before.erasure), wraps(pool.key_block().erasure));
        assert!(wrapped.len() == 2 && others.len() == 2);
        for key in wrapped.iter().chain(&others) {
            assert!(then.unwrap(key).is_ok() && now.unwrap(key).is_err());
        }
        assert!(pool.wrapped_keys("default").iter().all(|key| now.unwrap(key).is_ok()));
        is_whole(&registry).await;
        is_clean(&pool).await;
        // Its name and its space may be used again.
        pool.create_domain("tenant").await.unwrap();
        pool.close().await.unwrap();
        let pool = reopen(&registry, 0).await.unwrap();
        is_whole(&registry).await;
        is_clean(&pool).await;
        // The default domain gets a successor.
        pool.erase_domain("default").await.unwrap();
        assert_eq!((names(&pool).len(), pool.domains().len()), (0, 2));
        let volume = VolumeOptions { name: "n".into(), size_bytes: MIB, ..VolumeOptions::default() };
        pool.create_volume(&volume).await.unwrap();
        pool.close().await.unwrap();
        let pool = reopen(&registry, 0).await.unwrap();
        is_clean(&pool).await;
        pool.close().await.unwrap();
    });
}

/// Runs `work` until it ends or the power is off; whether it ended.
async fn until_off<T: 'static>(disk: &Arc<SimDisk>, work: impl Future<Output = T> + 'static) -> Option<T> {
    let done: Rc<Cell<Option<T>>> = Rc::default();
    let result = done.clone();
    reactor::spawn_local(async move { result.set(Some(work.await)) }).detach();
    loop {
        if let Some(result) = done.take() {
            return Some(result);
        }
        if disk.is_off() {
            return None;
        }
        reactor::sleep(Duration::from_micros(5)).await;
    }
}

#[test]
fn a_power_cut_during_an_erasure_leaves_a_domain_whole_or_gone() {
    let outcome = |cut: u64, survivors: Survivors| {
        let gone = Rc::new(Cell::new((false, false)));
        let said = gone.clone();
        Sim::new(cut).run(move || async move {
            let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
            let pool = with_tenant(&registry).await;
            let secret = pool.key_block().erasure[0].unwrap();
            disk.cut_power_after(cut);
            let erasing = pool.clone();
            let done = until_off(&disk, async move { erasing.erase_domain("tenant").await.is_ok() }).await;
            let image = disk.crash(survivors, Tear::Sectors, &mut Rng::new(cut));
            drop((pool, registry));
            let (registry, disk) = support::disk(40 * MIB, image);
            let pool = reopen(&registry, 0).await.unwrap();
            is_whole(&registry).await;
            is_clean(&pool).await;
            let is_gone = names(&pool) == ["v"];
            assert!(is_gone || names(&pool) == ["s", "t", "u", "v"], "{:?}", names(&pool));
            assert!(is_gone || done != Some(true), "cut {cut}: reported, and not done");
            if is_gone {
                assert_eq!(count(&disk.content(), &secret), 0, "cut {cut}: its keys still open");
            } else {
                pool.erase_domain("tenant").await.unwrap();
                assert_eq!(count(&disk.content(), &secret), 0);
                assert_eq!(names(&pool), ["v"]);
            }
            said.set((is_gone, done.is_some()));
            pool.close().await.unwrap();
            let pool = reopen(&registry, 0).await.unwrap();
            is_whole(&registry).await;
            is_clean(&pool).await;
            assert_eq!(pool.key_block().erasure[1], None);
            pool.close().await.unwrap();
        });
        gone.get()
    };
    let (mut whole, mut gone, mut ended) = (0, 0, 0);
    for cut in 1..200 {
        for survivors in [Survivors::None, Survivors::All, Survivors::Random] {
            let (is_gone, is_done) = outcome(cut, survivors);
            if is_gone {
                gone += 1
            } else {
                whole += 1
            }
            ended += u32::from(is_done);
        }
        if ended >= 3 {
            break;
        }
    }
    assert!(whole >= 3 && gone >= 3 && ended >= 3, "{whole} whole, {gone} gone, {ended} ended");
}

#[test]
fn an_erased_pool_opens_with_nothing() {
    let (mut whole, mut erased, mut complete) = (0, 0, 0);
    for cut in (1..).step_by(1) {
        let said = Rc::new(Cell::new(0));
        let say = said.clone();
        Sim::new(cut).run(move || async move {
            let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
            let pool = create(&registry, false).await;
            pool.change_slots(slots(&pool, &[0, 3])).await.unwrap();
            let block = pool.key_block();
            let wrapped: Vec<_> =
                block.slots.iter().flatten().map(|s| s.wrapped).chain(block.erasure[0]).collect();
            assert!(wrapped.iter().all(|key| count(&disk.content(), key) == 4));
            // The first events are those of closing it.
            disk.cut_power_after(cut * 3);
            let done = until_off(&disk, async move { pool.erase().await.is_ok() }).await;
            let image = disk.crash(Survivors::Random, Tear::Sectors, &mut Rng::new(cut));
            drop(registry);
            let left: usize = wrapped.iter().map(|key| count(&image, key)).sum();
            let (registry, disk) = support::disk(40 * MIB, image);
            match LocalPool::open(&registry, "disk", &key(3), Some(16 * MIB)).await {
                Ok(Some(pool)) => {
                    assert!(done.is_none() && left >= 3);
                    is_whole(&registry).await;
                    is_clean(&pool).await;
                    pool.erase().await.unwrap();
                    assert!(wrapped.iter().all(|key| count(&disk.content(), key) == 0));
                    say.set(1);
                }
                Err(PoolError::Erased { .. }) | Ok(None) => {
                    assert_eq!(left, 0);
                    say.set(if done == Some(true) { 3 } else { 2 });
                }
                // Its last copy was torn.
                Err(PoolError::Block { .. }) => say.set(2),
                Err(error) => panic!("cut {cut}: {error}"),
            }
        });
        match said.get() {
            1 => whole += 1,
            2 => erased += 1,
            _ => complete += 1,
        }
        if complete > 0 {
            break;
        }
    }
    assert!(whole >= 3 && complete == 1, "{whole} whole, {erased} erased by a cut");
}

#[test]
fn a_pool_of_the_first_format_says_that_it_can_not_erase_a_domain() {
    Sim::new(6).run(|| async {
        let (registry, _disk) = support::disk(40 * MIB, Image::zeroed());
        let pool = create(&registry, true).await;
        assert!(matches!(pool.erase_domain("default").await, Err(PoolError::NotErasable(_))));
        is_whole(&registry).await;
        pool.close().await.unwrap();
    });
}

/// The first copy of the key block is written `writes` times and then no more.
fn fail_keys_after(disk: &SimDisk, writes: u64) {
    let bytes = Some(KEYS_AT..KEYS_AT + 4096);
    let when = When { op: Some(Op::Write), bytes, skip: writes, hits: u64::MAX };
    disk.inject(Fault { when, effect: Effect::Fail(Status::WRITE_FAULT) });
}

#[test]
fn an_erasure_after_one_that_failed_takes_away_the_secret_in_use() {
    Sim::new(7).run(|| async {
        let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
        let pool = with_tenant(&registry).await;
        let first = pool.key_block().erasure[0].unwrap();
        // The new secret gets there; what overwrites the old one does not.
        fail_keys_after(&disk, 1);
        assert!(pool.erase_domain("tenant").await.is_err());
        assert_eq!(disk.clear_faults(), 1);
        let then = pool.key_block();
        let second = then.erasure[0].unwrap();
        assert!(second != first && then.erasure[1] == Some(first));
        // The keys of this one are wrapped through the second secret, and are in a checkpoint.
        pool.create_domain("other").await.unwrap();
        pool.checkpoint().await.unwrap();
        let wrapped = pool.wrapped_keys("other");
        pool.erase_domain("other").await.unwrap();
        let now = pool.key_block();
        assert_eq!(now.erasure[1], None);
        assert!(![first, second].contains(&now.erasure[0].unwrap()), "a third one");
        assert_eq!((count(&disk.content(), &first), count(&disk.content(), &second)), (0, 0));
        let keys = cryptfold_reduce::keys::PoolKeys::derive(&pool.pool_key(), pool.info().uuid);
        let wraps = |erasure| cryptfold_reduce::keys::DomainWraps::open(&keys, &erasure).unwrap();
        let (then, now) = (wraps(then.erasure), wraps(now.erasure));
        assert_eq!(wrapped.len(), 2);
        assert!(wrapped.iter().all(|key| then.unwrap(key).is_ok() && now.unwrap(key).is_err()));
        assert!(pool.wrapped_keys("default").iter().all(|key| now.unwrap(key).is_ok()));
        is_whole(&registry).await;
        is_clean(&pool).await;
        pool.close().await.unwrap();
        let pool = reopen(&registry, 0).await.unwrap();
        is_whole(&registry).await;
        pool.close().await.unwrap();
    });
}

#[test]
fn an_opening_that_can_not_finish_an_erasure_lets_go_of_the_device() {
    Sim::new(8).run(|| async {
        let (registry, disk) = support::disk(40 * MIB, Image::zeroed());
        let pool = with_tenant(&registry).await;
        fail_keys_after(&disk, 1);
        assert!(pool.erase_domain("tenant").await.is_err());
        pool.close().await.unwrap();
        assert_eq!(disk.clear_faults(), 1);
        fail_keys_after(&disk, 0);
        assert!(reopen(&registry, 0).await.is_err());
        assert_eq!(disk.clear_faults(), 1);
        let written = disk.events();
        reactor::sleep(Duration::from_secs(5)).await;
        assert_eq!(disk.events(), written, "no heart beats");
        let pool = reopen(&registry, 0).await.unwrap();
        assert_eq!(pool.key_block().erasure[1], None);
        assert_eq!(names(&pool), ["v"]);
        is_whole(&registry).await;
        is_clean(&pool).await;
        pool.close().await.unwrap();
    });
}
