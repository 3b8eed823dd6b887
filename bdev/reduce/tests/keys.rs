//! Key slots of a pool: who opens it, what power cuts leave, and what of older formats.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Registry};
use cryptfold_bdev_sim::{DiskOptions, Image, Rng, SimDisk, Survivors, Tear};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, Sim};
use cryptfold_reduce::keys::Kek;
use cryptfold_reduce::slots::{Kdf, KeySlot, MAX_KEY_SLOTS, SlotKind};
use cryptfold_reduce::{CreateOptions, KeySource, LocalPool, PoolError, VolumeOptions};

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

fn disk(image: Image) -> (Arc<Registry>, Arc<SimDisk>) {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
    let registry = Registry::new();
    let mut options = DiskOptions::new("disk", 40 * MIB);
    options.latency = Duration::from_micros(1)..Duration::from_micros(4);
    let (disk, _) = SimDisk::create(&registry, options, image, 1).unwrap();
    (registry, disk)
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
        let (registry, _disk) = disk(Image::zeroed());
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
        let (registry, disk) = disk(Image::zeroed());
        let pool = create(&registry, false).await;
        let mut old = vec![0; 4096];
        disk.content().read(MIB + KEYS_AT, &mut old);
        pool.change_slots(slots(&pool, &[1])).await.unwrap();
        pool.close().await.unwrap();
        let mut image = disk.content();
        image.write(MIB + KEYS_AT, &old);
        let (registry, disk) = self::disk(image);
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
                let (registry, disk) = disk(Image::zeroed());
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
                let (registry, _disk) = self::disk(image);
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
        let (registry, disk) = disk(Image::zeroed());
        let pool = create(&registry, true).await;
        assert_eq!(pool.key_block().erasure, [None, None]);
        pool.close().await.unwrap();
        let pool = reopen(&registry, 0).await.unwrap();
        is_whole(&registry).await;
        pool.create_domain("d").await.unwrap();
        pool.change_slots(slots(&pool, &[4])).await.unwrap();
        disk.cut_power();
        let image = disk.crash(Survivors::All, Tear::Whole, &mut Rng::new(1));
        let (registry, _disk) = self::disk(image);
        let pool = reopen(&registry, 4).await.unwrap();
        is_whole(&registry).await;
        assert_eq!(pool.domains().len(), 2);
        pool.close().await.unwrap();
    });
}
