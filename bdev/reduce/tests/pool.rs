//! A pool's promises one by one, in the simulator: reduction and its accounting, thin volumes, both block sizes, damage,
//! space running out and coming back, ownership, refusals.

mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Io, Op, Registry, Status};
use cryptfold_bdev_sim::{Image, Rng, Survivors, Tear};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, Sim};
use cryptfold_reduce::{Compression, CreateOptions, KeySource, LocalPool, PoolError, VolumeOptions};
use cryptfold_reduce_format::journal::{BatchHeader, JournalEpoch};
use support::{disk, key};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 16 * MIB;
const CHUNK: usize = 4096;

fn options() -> CreateOptions {
    let mut options = CreateOptions::new(key());
    options.memory_budget = Some(MEMORY);
    options
}

fn volume(name: &str, size_bytes: u64) -> VolumeOptions {
    VolumeOptions { name: name.into(), size_bytes, ..VolumeOptions::default() }
}

async fn create(registry: &Arc<Registry>) -> LocalPool {
    LocalPool::create(registry, "disk", "p", &options()).await.unwrap()
}

async fn reopen(registry: &Arc<Registry>) -> LocalPool {
    LocalPool::open(registry, "disk", &key(), Some(MEMORY)).await.unwrap().unwrap()
}

fn open(registry: &Arc<Registry>, name: &str) -> Channel {
    registry.open(name, Access::ReadWrite, |_| ()).unwrap().channel().unwrap()
}

/// `chunks` chunks that no codec makes smaller.
fn noise(seed: u64, chunks: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..chunks * CHUNK / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
}

/// `chunks` different chunks that a codec makes much smaller.
fn text(seed: u64, chunks: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let line = |n: u64| format!("{n:08x} the quick brown fox jumps over the lazy dog {:04x}\n", n & 0xfff);
    let mut out = Vec::new();
    while out.len() < chunks * CHUNK {
        out.extend_from_slice(line(rng.next() & 0xffff_ffff).as_bytes());
    }
    out.truncate(chunks * CHUNK);
    out
}

async fn write(channel: &Channel, lba: u64, data: &[u8]) {
    channel.write(lba, Buf::from_slice(data), false).await.unwrap();
}

async fn read(channel: &Channel, lba: u64, blocks: u64) -> Vec<u8> {
    channel.read(lba, blocks).await.unwrap().to_contiguous().to_vec()
}

async fn clean(pool: &LocalPool) {
    let report = pool.check(true).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.problems);
}

fn run<F: Future<Output = ()> + 'static>(f: impl FnOnce() -> F + 'static) {
    Sim::new(7).run(f);
}

/// Fast, so that virtual time stays short.

#[test]
fn reduces_and_accounts() {
    run(|| async {
        let (registry, _disk) = disk(64 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        pool.create_volume(&volume("a", 8 * MIB)).await.unwrap();
        pool.create_volume(&volume("b", 8 * MIB)).await.unwrap();
        let (a, b) = (open(&registry, "p/a"), open(&registry, "p/b"));
        let (random, words) = (noise(1, 64), text(2, 64));
        write(&a, 0, &random).await;
        write(&a, 100, &words).await;
        // Duplicates in the same volume, in another one, and within one write.
        write(&a, 200, &random).await;
        write(&b, 7, &words).await;
        write(&b, 500, &[&random[..CHUNK], &random[..CHUNK]].concat()).await;
        // Zeros and a pattern.
        write(&a, 300, &vec![0; 32 * CHUNK]).await;
        write(&a, 400, &[0xab; 16 * CHUNK]).await;
        let info = pool.info();
        assert_eq!(info.space.logical_bytes, (64 * 4 + 2 + 32 + 16) * 4096);
        assert_eq!(info.space.zero_bytes, 48 * 4096);
        assert_eq!(info.space.unique_bytes, 128 * 4096);
        // Noise is stored raw with 32 bytes of header and tag per 4 chunks, text at a fraction.
        let raw = 64 * 4096 + 16 * 32;
        assert!((raw..raw + 64 * 4096 / 3).contains(&info.space.stored_bytes), "{:?}", info.space);
        assert_eq!(read(&a, 0, 64).await, random);
        assert_eq!(read(&a, 200, 64).await, random);
        assert_eq!(read(&a, 100, 64).await, words);
        assert_eq!(read(&b, 7, 64).await, words);
        assert_eq!(read(&b, 9, 3).await, words[2 * CHUNK..5 * CHUNK]);
        assert_eq!(read(&a, 400, 16).await, vec![0xab; 16 * CHUNK]);
        assert_eq!(read(&b, 500, 2).await, [&random[..CHUNK], &random[..CHUNK]].concat());
        clean(&pool).await;
        drop((a, b));
        pool.close().await.unwrap();
        let pool = reopen(&registry).await;
        let again = pool.info();
        assert_eq!(
            (
                again.space.logical_bytes,
                again.space.zero_bytes,
                again.space.unique_bytes,
                again.space.stored_bytes
            ),
            (
                info.space.logical_bytes,
                info.space.zero_bytes,
                info.space.unique_bytes,
                info.space.stored_bytes
            )
        );
        let a = open(&registry, "p/a");
        assert_eq!(read(&a, 100, 64).await, words);
        // The index comes back in the background: what is stored is found again.
        reactor::sleep(Duration::from_secs(1)).await;
        write(&a, 1000, &words).await;
        assert_eq!(pool.info().space.unique_bytes, 128 * 4096);
        clean(&pool).await;
    });
}

#[test]
fn unmapped_blocks_are_reported_and_zeros_are_not() {
    run(|| async {
        let (registry, _disk) = disk(64 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        pool.create_volume(&volume("a", 8 * MIB)).await.unwrap();
        let a = open(&registry, "p/a");
        write(&a, 10, &text(3, 20)).await;
        write(&a, 15, &vec![0; 2 * CHUNK]).await;
        a.unmap(12, 2).await.unwrap();
        a.write_zeroes(20, 1).await.unwrap();
        let io = a.io(cryptfold_bdev::Io::new(cryptfold_bdev::Op::Read, 8, 24)).await;
        assert!(io.status().is_ok());
        let ranges: Vec<(u32, u32)> = io.unmapped.iter().map(|r| (r.start, r.blocks)).collect();
        assert_eq!(ranges, [(0, 2), (4, 2), (12, 1), (22, 2)]);
        a.unmap(0, 2048).await.unwrap();
        assert_eq!(pool.info().space.logical_bytes, 0);
        assert_eq!(pool.info().space.stored_bytes, 0);
        clean(&pool).await;
    });
}

#[test]
fn small_blocks_change_parts_of_chunks() {
    run(|| async {
        let (registry, _disk) = disk(64 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        let options = VolumeOptions { block_size: Some(512), ..volume("s", MIB) };
        pool.create_volume(&options).await.unwrap();
        let s = open(&registry, "p/s");
        let mut model = vec![0u8; MIB as usize];
        let mut rng = Rng::new(5);
        for _ in 0..300 {
            let lba = rng.below(2040);
            let blocks = rng.range(1, 40).min(2048 - lba);
            let bytes = (lba * 512) as usize..((lba + blocks) * 512) as usize;
            match rng.below(4) {
                0 => {
                    s.unmap(lba, blocks).await.unwrap();
                    model[bytes].fill(0);
                }
                1 => assert_eq!(read(&s, lba, blocks).await, model[bytes]),
                _ => {
                    let data = text(rng.next(), (blocks as usize * 512).div_ceil(CHUNK));
                    model[bytes.clone()].copy_from_slice(&data[..bytes.len()]);
                    write(&s, lba, &data[..bytes.len()]).await;
                }
            }
        }
        assert_eq!(read(&s, 0, 2048).await, model);
        clean(&pool).await;
    });
}

#[test]
fn concurrent_changes_of_one_chunk_do_not_undo_each_other() {
    run(|| async {
        let (registry, _disk) = disk(64 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        let options = VolumeOptions { block_size: Some(512), ..volume("s", MIB) };
        pool.create_volume(&options).await.unwrap();
        let s = open(&registry, "p/s");
        for round in 0..20u8 {
            let tasks: Vec<_> = (0..16u64)
                .map(|n| {
                    let s = s.clone();
                    reactor::spawn_local(async move {
                        write(&s, n, &[round.wrapping_mul(16).wrapping_add(n as u8) | 1; 512]).await;
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            let data = read(&s, 0, 16).await;
            for (n, block) in data.chunks(512).enumerate() {
                assert_eq!(
                    block,
                    [round.wrapping_mul(16).wrapping_add(n as u8) | 1; 512],
                    "round {round} block {n}"
                );
            }
        }
    });
}

#[test]
fn a_full_pool_refuses_writes_and_lives_on() {
    run(|| async {
        let (registry, _disk) = disk(48 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        pool.create_volume(&volume("big", 256 * MIB)).await.unwrap();
        let big = open(&registry, "p/big");
        let mut written = 0;
        let full = loop {
            let data = noise(written, 32);
            match big.write(written * 32, Buf::from_slice(&data), false).await {
                Ok(()) => written += 1,
                Err(status) => break status,
            }
            assert!(written * 128 < 48 << 10, "more data than the device has");
        };
        assert_eq!(full, Status::CAPACITY_EXCEEDED);
        assert!(written * 128 > 24 << 10, "full after {} KiB", written * 128);
        // Everything is there, and what needs no space goes on.
        for n in [0, 1, written / 2, written - 1] {
            assert_eq!(read(&big, n * 32, 32).await, noise(n, 32));
        }
        big.flush().await.unwrap();
        clean(&pool).await;
        // Freed space becomes usable without a restart, also when it is freed in pieces.
        for n in (0..written).filter(|n| n % 2 == 0) {
            big.unmap(n * 32, 32).await.unwrap();
        }
        for n in 0..written / 3 {
            let data = noise(1000 + n, 32);
            big.write(30_000 + n * 32, Buf::from_slice(&data), false).await.unwrap();
        }
        for n in (0..written).filter(|n| n % 2 == 1) {
            assert_eq!(read(&big, n * 32, 32).await, noise(n, 32));
        }
        for n in 0..written / 3 {
            assert_eq!(read(&big, 30_000 + n * 32, 32).await, noise(1000 + n, 32));
        }
        clean(&pool).await;
    });
}

/// Fragments that are small beside what a segment may waste at its end: the collector does not take that for something to win.
#[test]
fn a_pool_full_of_small_fragments_is_full() {
    run(|| async {
        let (registry, _disk) = disk(32 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        pool.create_volume(&volume("big", 4096 * MIB)).await.unwrap();
        let big = open(&registry, "p/big");
        let mut at = 0;
        let full = loop {
            // Pages that nearly are alike, and no two are.
            let data: Vec<u8> = (at..at + 32)
                .flat_map(|n: u64| {
                    let mut page = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes().repeat(6);
                    page.resize(CHUNK, n as u8 | 1);
                    page
                })
                .collect();
            let write = big.write(at, Buf::from_slice(&data), false);
            match reactor::timeout(Duration::from_secs(30), write).await.expect("an answer in 30 s") {
                Ok(()) => at += 32,
                Err(status) => break status,
            }
        };
        assert_eq!(full, Status::CAPACITY_EXCEEDED);
        let ratio = pool.info().space.ratio();
        assert!(ratio > 15.0, "{ratio}");
        // Nobody writes, and soon the collector has nothing to do either.
        let mut moved = pool.info().moved_bytes;
        for _ in 0..100 {
            reactor::sleep(Duration::from_secs(5)).await;
            let now = pool.info().moved_bytes;
            if now == moved {
                clean(&pool).await;
                return;
            }
            moved = now;
        }
        panic!("after 500 s the collector still moves something: {:?}", pool.info());
    });
}

#[test]
fn overwrites_for_ever() {
    run(|| async {
        let (registry, _disk) = disk(48 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        pool.create_volume(&volume("v", 16 * MIB)).await.unwrap();
        let v = open(&registry, "p/v");
        let mut model = vec![u64::MAX; 4096];
        let mut rng = Rng::new(11);
        for step in 0..12_000u64 {
            let lba = rng.below(4096);
            write(&v, lba, &noise(step, 1)).await;
            model[lba as usize] = step;
            if rng.one_in(200) {
                v.flush().await.unwrap();
            }
        }
        for (lba, step) in model.iter().enumerate().filter(|(_, step)| **step != u64::MAX) {
            assert_eq!(read(&v, lba as u64, 1).await, noise(*step, 1), "block {lba}");
        }
        clean(&pool).await;
        drop(v);
        pool.close().await.unwrap();
        let pool = reopen(&registry).await;
        let v = open(&registry, "p/v");
        for (lba, step) in model.iter().enumerate().filter(|(_, step)| **step != u64::MAX).step_by(17) {
            assert_eq!(read(&v, lba as u64, 1).await, noise(*step, 1), "block {lba}");
        }
        clean(&pool).await;
    });
}

#[test]
fn damage_is_an_error_on_exactly_its_blocks() {
    run(|| async {
        let (registry, disk) = disk(64 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        let mut options = volume("a", 8 * MIB);
        options.compression = Some(Compression::Off);
        pool.create_volume(&options).await.unwrap();
        let a = open(&registry, "p/a");
        let data = noise(1, 256);
        for n in 0..8 {
            write(&a, n * 32, &data[n as usize * 32 * CHUNK..][..32 * CHUNK]).await;
        }
        a.flush().await.unwrap();
        drop(a);
        pool.close().await.unwrap();
        let mut image = disk.content();
        let used: Vec<u64> = image.written_pages().collect();
        // Nothing but data fills a segment.
        let mut segments = used.chunk_by(|x, y| x / MIB == y / MIB);
        let page = segments.find(|pages| pages.len() > 200).unwrap()[100];
        image.flip(page + 1000, 0x10);
        drop(registry);
        let (registry, _disk) = self::disk(64 * MIB, image);
        let pool = reopen(&registry).await;
        let a = open(&registry, "p/a");
        let mut bad = Vec::new();
        for lba in 0..256 {
            match a.read(lba, 1).await {
                Ok(found) => {
                    assert_eq!(found.to_contiguous().to_vec(), data[lba as usize * CHUNK..][..CHUNK], "{lba}")
                }
                Err(status) => {
                    assert_eq!(status, Status::UNRECOVERED_READ);
                    bad.push(lba);
                }
            }
        }
        assert_eq!(bad.len(), 4, "one fragment: {bad:?}");
        assert!(!pool.check(true).await.unwrap().is_clean());
        // Writing the same again makes them good, and nothing of the damage is left.
        let lost = &data[bad[0] as usize * CHUNK..][..4 * CHUNK];
        write(&a, bad[0], lost).await;
        assert_eq!(read(&a, bad[0], 4).await, lost);
        clean(&pool).await;
    });
}

#[test]
fn refuses_what_it_should() {
    run(|| async {
        let (registry, disk) = disk(64 * MIB, Image::zeroed());
        let error = LocalPool::open(&registry, "disk", &key(), None).await;
        assert!(matches!(error, Ok(None)), "a blank disk is no pool");
        let pool = create(&registry).await;
        let error = LocalPool::open(&registry, "disk", &key(), None).await.err().unwrap();
        assert!(error.to_string().contains("claimed"), "{error}");
        pool.create_volume(&volume("a", MIB)).await.unwrap();
        let error = pool.create_volume(&volume("a", MIB)).await.err().unwrap();
        assert!(matches!(error, PoolError::VolumeExists { .. }), "{error}");
        let error = pool
            .create_volume(&VolumeOptions { domain: Some("nobody".into()), ..volume("b", MIB) })
            .await
            .err()
            .unwrap();
        assert!(matches!(error, PoolError::NoDomain { .. }), "{error}");
        for bad in ["", "a/b", "a\nb"] {
            assert!(pool.create_volume(&volume(bad, MIB)).await.is_err());
        }
        assert!(pool.create_volume(&volume("b", 0)).await.is_err());
        pool.close().await.unwrap();
        let before = disk.content();
        let wrong = KeySource::Bytes((1..33).collect());
        let error = LocalPool::open(&registry, "disk", &wrong, None).await.err().unwrap();
        assert!(matches!(error, PoolError::WrongKey { .. }), "{error}");
        let error = LocalPool::create(&registry, "disk", "q", &options()).await.err().unwrap();
        assert!(matches!(error, PoolError::Foreign { .. }), "{error}");
        let (mut a, mut b) = (vec![0; 4096], vec![0; 4096]);
        for page in before.written_pages() {
            before.read(page, &mut a);
            disk.content().read(page, &mut b);
            assert_eq!(a, b, "the block at {page} was written");
        }
        reopen(&registry).await.close().await.unwrap();
    });
}

#[test]
fn a_device_that_is_too_small_is_refused() {
    run(|| async {
        let (registry, _disk) = disk(16 * MIB, Image::zeroed());
        let error = LocalPool::create(&registry, "disk", "p", &options()).await.err().unwrap();
        assert!(matches!(error, PoolError::TooSmall { need_bytes, .. } if need_bytes <= 64 * MIB), "{error}");
    });
}

#[test]
fn one_owner_at_a_time() {
    run(|| async {
        let (registry, disk) = disk(64 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        pool.create_volume(&volume("a", MIB)).await.unwrap();
        // Another machine sees the same disk.
        let other = Registry::new();
        other.register(disk.clone()).unwrap();
        let error = LocalPool::open(&other, "disk", &key(), Some(MEMORY)).await.err().unwrap();
        assert!(matches!(error, PoolError::OpenElsewhere { .. }), "{error}");
        // The owner has noticed nothing.
        let a = open(&registry, "p/a");
        write(&a, 0, &noise(1, 4)).await;
        a.flush().await.unwrap();
        drop(a);
        pool.close().await.unwrap();
        let started = reactor::now();
        let pool = reopen(&other).await;
        assert!(
            reactor::now() - started < Duration::from_millis(100),
            "closed in order: nothing to wait for"
        );
        assert_eq!(read(&open(&other, "p/a"), 0, 4).await, noise(1, 4));
        pool.close().await.unwrap();
    });
}

#[test]
fn deletes_in_the_background_and_across_restarts() {
    run(|| async {
        let (registry, _disk) = disk(64 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        pool.create_volume(&volume("keep", 4 * MIB)).await.unwrap();
        pool.create_volume(&volume("go", 64 * MIB)).await.unwrap();
        let (keep, go) = (open(&registry, "p/keep"), open(&registry, "p/go"));
        let shared = text(4, 128);
        write(&keep, 0, &shared).await;
        write(&go, 0, &shared).await;
        write(&go, 4000, &noise(8, 256)).await;
        drop(go);
        pool.delete_volume("go").await.unwrap();
        assert!(registry.get("p/go").is_err());
        reactor::sleep(Duration::from_secs(3)).await;
        let info = pool.info();
        assert_eq!((info.volumes, info.space.unique_bytes), (1, 128 * 4096));
        assert_eq!(read(&keep, 0, 128).await, shared);
        clean(&pool).await;
        drop(keep);
        pool.close().await.unwrap();
        let pool = reopen(&registry).await;
        assert_eq!(pool.info().volumes, 1);
        clean(&pool).await;
    });
}

#[test]
fn domains_share_nothing() {
    run(|| async {
        let (registry, _disk) = disk(64 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        pool.create_domain("x").await.unwrap();
        pool.create_volume(&volume("a", MIB)).await.unwrap();
        pool.create_volume(&VolumeOptions { domain: Some("x".into()), ..volume("b", MIB) }).await.unwrap();
        let (a, b) = (open(&registry, "p/a"), open(&registry, "p/b"));
        let data = noise(1, 32);
        write(&a, 0, &data).await;
        write(&b, 0, &data).await;
        assert_eq!(pool.info().space.unique_bytes, 64 * 4096);
        assert_eq!(read(&b, 0, 32).await, data);
        clean(&pool).await;
    });
}

#[test]
fn memory_stays_within_its_budget() {
    run(|| async {
        let (registry, _disk) = disk(192 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        pool.create_volume(&volume("huge", 64 << 30)).await.unwrap();
        let huge = open(&registry, "p/huge");
        // Each block has a map leaf of its own: five times what the cache holds.
        let count = 5000u64;
        let place = |n: u64| (n * 7919 % count) * 512 + n % 512;
        let mut most = 0;
        for n in 0..count {
            write(&huge, place(n), &noise(n, 1)).await;
            most = most.max(pool.info().memory_bytes);
        }
        for n in (0..count).rev() {
            assert_eq!(read(&huge, place(n), 1).await, noise(n, 1), "block {}", place(n));
            most = most.max(pool.info().memory_bytes);
        }
        // Overwriting brings back cold leaves of maps and containers.
        for n in (0..count).step_by(3) {
            write(&huge, place(n), &text(n, 1)).await;
            most = most.max(pool.info().memory_bytes);
        }
        assert!(most <= MEMORY, "{most} bytes of {MEMORY}");
        assert!(most > MEMORY / 4, "the test is too small: {most}");
        clean(&pool).await;
        drop(huge);
        pool.close().await.unwrap();
        let pool = reopen(&registry).await;
        let huge = open(&registry, "p/huge");
        for n in (0..count).step_by(7) {
            let expected = if n % 3 == 0 { text(n, 1) } else { noise(n, 1) };
            assert_eq!(read(&huge, place(n), 1).await, expected);
        }
        assert!(pool.info().memory_bytes <= MEMORY);
        huge.unmap(0, huge.bdev().blocks()).await.unwrap();
        assert_eq!(pool.info().space.stored_bytes, 0);
        clean(&pool).await;
    });
}

/// Write Uncorrectable: reads of exactly those blocks fail, also after a restart, until they are written or given up.
#[test]
fn uncorrectable_blocks() {
    run(|| async {
        let (registry, _) = disk(64 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        pool.create_volume(&volume("v", MIB)).await.unwrap();
        let channel = open(&registry, "p/v");
        let data = noise(3, 16);
        write(&channel, 0, &data).await;
        let mark = |channel: Channel, lba, blocks| async move {
            let io = channel.io(Io::new(Op::WriteUncorrectable, lba, blocks)).await;
            let status = io.status();
            io.recycle();
            status.ok()
        };
        mark(channel.clone(), 4, 3).await.unwrap();
        assert_eq!(channel.read(3, 2).await.unwrap_err(), Status::UNRECOVERED_READ);
        drop(channel);
        clean(&pool).await;
        pool.close().await.unwrap();

        let pool = reopen(&registry).await;
        let channel = open(&registry, "p/v");
        assert!(read(&channel, 0, 4).await == data[..4 * CHUNK]);
        for lba in 4..7 {
            assert_eq!(channel.read(lba, 1).await.unwrap_err(), Status::UNRECOVERED_READ, "block {lba}");
        }
        assert!(read(&channel, 7, 9).await == data[7 * CHUNK..]);
        write(&channel, 4, &data[..CHUNK]).await;
        channel.unmap(5, 1).await.unwrap();
        channel.write_zeroes(6, 1).await.unwrap();
        assert!(read(&channel, 4, 1).await == data[..CHUNK]);
        assert!(read(&channel, 5, 2).await.iter().all(|b| *b == 0));
        assert_eq!(mark(channel.clone(), 255, 2).await.unwrap_err(), Status::LBA_OUT_OF_RANGE);
        drop(channel);
        clean(&pool).await;
        pool.close().await.unwrap();
    });
}

#[test]
fn a_durable_pool_completes_what_survives() {
    run(|| async {
        let (registry, disk) = disk(64 * MIB, Image::zeroed());
        let options = CreateOptions { durable: true, ..options() };
        let pool = LocalPool::create(&registry, "disk", "p", &options).await.unwrap();
        pool.create_volume(&volume("v", 8 * MIB)).await.unwrap();
        let bdev = registry.get("p/v").unwrap();
        assert!(pool.info().durable && !bdev.info().write_cache);
        let channel = open(&registry, "p/v");
        // Small and large, and several at once: they share a commit.
        let writes = (0..8u64).map(|n| {
            let channel = channel.clone();
            reactor::spawn_local(async move { write(&channel, n * 64, &noise(n, 1 + n as usize * 5)).await })
        });
        for done in writes.collect::<Vec<_>>() {
            done.await;
        }
        channel.unmap(0, 1).await.unwrap();
        // Not flushed by anybody; all that was not made durable is lost.
        disk.cut_power();
        let image = disk.crash(Survivors::None, Tear::Whole, &mut Rng::new(5));
        drop((channel, pool));
        let (registry, _disk) = self::disk(64 * MIB, image);
        let pool = reopen(&registry).await;
        let channel = open(&registry, "p/v");
        assert!(pool.info().durable);
        for n in 1..8u64 {
            assert_eq!(read(&channel, n * 64, 1 + n * 5).await, noise(n, 1 + n as usize * 5), "write {n}");
        }
        assert_eq!(read(&channel, 0, 1).await, vec![0; CHUNK]);
        clean(&pool).await;
    });
}

#[test]
fn the_journal_changes_its_keys_before_random_nonces_wear_them_out() {
    run(|| async {
        for (approved, renewed) in [(true, true), (false, false)] {
            let (registry, disk) = disk(64 * MIB, Image::zeroed());
            let options = CreateOptions { approved, ..options() };
            let pool = LocalPool::create(&registry, "disk", "p", &options).await.unwrap();
            pool.create_volume(&volume("v", 8 * MIB)).await.unwrap();
            pool.limit_journal_keys(6);
            let channel = open(&registry, "p/v");
            for n in 0..24 {
                write(&channel, n, &noise(n, 1)).await;
                channel.flush().await.unwrap();
            }
            let image = disk.content();
            let headers = image.written_pages().filter_map(|at| {
                let mut block = [0; CHUNK];
                image.read(at, &mut block);
                BatchHeader::parse(&block).ok()
            });
            let mut epochs: HashMap<_, u32> = HashMap::new();
            headers.for_each(|header| *epochs.entry(JournalEpoch::of(&header)).or_default() += 1);
            assert!(epochs.values().sum::<u32>() >= 24, "{epochs:?}");
            // A batch is sealed, and a group in it.
            assert_eq!(epochs.len() > 6, renewed, "{epochs:?}");
            assert!(!renewed || epochs.values().filter(|batches| **batches > 6).count() <= 1, "{epochs:?}");
            disk.cut_power();
            let image = disk.crash(Survivors::None, Tear::Whole, &mut Rng::new(5));
            drop((channel, pool));
            let (registry, _disk) = self::disk(64 * MIB, image);
            let pool = reopen(&registry).await;
            let channel = open(&registry, "p/v");
            for n in 0..24 {
                assert!(read(&channel, n, 1).await == noise(n, 1), "write {n}");
            }
            clean(&pool).await;
        }
    });
}

#[test]
fn a_sampled_index_finds_runs_also_between_other_streams() {
    run(|| async {
        let (registry, _disk) = disk(128 * MIB, Image::zeroed());
        let pool = create(&registry).await;
        pool.create_volume(&volume("a", 64 * MIB)).await.unwrap();
        pool.sample_index(4);
        let a = open(&registry, "p/a");
        let data = text(9, 4096);
        for n in (0..4096).step_by(32) {
            write(&a, n as u64, &data[n * CHUNK..(n + 32) * CHUNK]).await;
        }
        assert_eq!(pool.info().index_sampling, 16);
        let unique = pool.info().space.unique_bytes;
        assert_eq!(unique, 4096 * 4096);
        // Four streams of the same data, by turns, from where no earlier write began.
        for n in (0..1024 - 32).step_by(32) {
            for stream in 0..4 {
                let from = stream * 1024 + n + 7;
                write(&a, 8192 + from as u64, &data[from * CHUNK..(from + 32) * CHUNK]).await;
            }
        }
        let again = (pool.info().space.unique_bytes - unique) / 4096;
        // Of each stream's start, about a hook's distance.
        assert!(again < 31 * 4 * 32 / 20, "{again} blocks were stored again");
        clean(&pool).await;
    });
}
