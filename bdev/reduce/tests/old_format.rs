//! A pool that the first version of the engine has made (commit 72ecc1e of the main branch, format 1.0), and left without closing it: its
//! journal is replayed, everything is there, it is used, audited and repaired, and snapshots, which it did not know, work.
//!
//! `first-format.bin`: 4 KiB pages as address u32, length u16 (without the zeros at the end), bytes; a disk of 32 MiB. The
//! volumes: "big" and "other" (domain "tenant") of 4 KiB blocks, "small" of 512-byte blocks, 4 MiB each. A checkpoint came before
//! what [`LATER`] lists; what "big" has in block 410 was not flushed.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use cryptfold_bdev::{Access, Channel, Registry};
use cryptfold_bdev_sim::{Image, SimDisk};
use cryptfold_reactor::Sim;
use cryptfold_reactor::memory::Buf;
use cryptfold_reduce::{CheckReport, Falsify, LocalPool, Part};
use support::{disk, key};

const MIB: u64 = 1 << 20;
const BYTES: u64 = 32 * MIB;
const VOLUMES: [&str; 3] = ["big", "small", "other"];

fn first() -> Image {
    let mut image = Image::zeroed();
    let mut rest = include_bytes!("first-format.bin").as_slice();
    while let Some((head, after)) = rest.split_first_chunk::<6>() {
        let [a, b, c, d, e, f] = *head;
        let (at, len) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]));
        let (page, after) = after.split_at(len.into());
        image.write(at.into(), page);
        rest = after;
    }
    assert!(rest.is_empty());
    image
}

fn text(n: u64) -> Vec<u8> {
    let line = |line| format!("{n:010} line {line:02}: what the first version has written, and kept\n");
    (0..64).flat_map(|n| line(n).into_bytes()).take(4096).collect()
}

fn noise(n: u64) -> Vec<u8> {
    let mut x = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..512).flat_map(|_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    });
    words.collect()
}

/// What a volume has, by 4 KiB; the rest is zeros.
fn content(volume: &str) -> BTreeMap<u64, Vec<u8>> {
    let mut blocks = BTreeMap::new();
    match volume {
        "big" => {
            blocks.extend((0..32).map(|n| (n, text(n))));
            blocks.extend((0..8).map(|n| (100 + n, noise(n))));
            blocks.extend((0..32).map(|n| (200 + n, text(n))));
            blocks.extend((0..4).map(|n| (300 + n, vec![0x5a; 4096])));
            // Later than the checkpoint.
            blocks.retain(|lba, _| !(16..20).contains(lba));
            blocks.extend((50..58).map(|n| (350 + n, text(n))));
        }
        "small" => {
            let mut head = vec![0; 4096];
            head[3 * 512..5 * 512].copy_from_slice(&text(60)[..1024]);
            blocks.extend([(0, head), (8, text(61))]);
        }
        _ => {
            blocks.extend((0..16).map(|n| (7 + n, text(n))));
            blocks.insert(0, noise(9));
        }
    }
    blocks
}

fn open(registry: &Arc<Registry>, name: &str) -> Channel {
    registry.open(&format!("old/{name}"), Access::ReadWrite, |_| ()).unwrap().channel().unwrap()
}

/// All of a volume, 4 KiB each; `None` where it can not be read.
async fn read(registry: &Arc<Registry>, name: &str) -> Vec<Option<Vec<u8>>> {
    let channel = open(registry, name);
    let per_chunk = 4096 / u64::from(channel.bdev().block_size_bytes());
    let mut all = Vec::new();
    for at in 0..channel.bdev().size_bytes() / 4096 {
        let data = channel.read(at * per_chunk, per_chunk).await;
        all.push(data.ok().map(|data| data.to_contiguous().to_vec()));
    }
    all
}

/// Whether all volumes have what they had; blocks that can not be read are counted.
async fn verify(registry: &Arc<Registry>) -> usize {
    let mut lost = 0;
    for name in VOLUMES {
        let wanted = content(name);
        for (at, block) in (0..).zip(read(registry, name).await) {
            let Some(block) = block else {
                lost += 1;
                continue;
            };
            if name == "big" && at == 410 {
                assert!(block == text(70) || block == vec![0; 4096]);
            } else if name == "big" && at == 500 {
                // Written by this version.
            } else {
                assert!(&block == wanted.get(&at).unwrap_or(&vec![0; 4096]), "{name}, block {at}");
            }
        }
    }
    lost
}

fn clean(report: &CheckReport) {
    assert!(report.is_clean(), "{:#?}", report.problems);
}

async fn reopen(registry: &Arc<Registry>) -> LocalPool {
    LocalPool::open(registry, "disk", &key(), Some(16 * MIB)).await.unwrap().expect("a pool")
}

fn on<F: Future<Output = ()> + 'static>(f: impl FnOnce(Arc<Registry>, Arc<SimDisk>) -> F + 'static) {
    Sim::new(1).run(move || async move {
        let (registry, disk) = disk(BYTES, first());
        f(registry, disk).await;
    });
}

#[test]
fn a_pool_of_the_first_version_is_read_audited_and_used() {
    on(|registry, disk| async move {
        let audited = LocalPool::audit(&registry, "disk", &key(), true).await.unwrap();
        let (_, audit) = audited.expect("a pool");
        clean(&audit);
        let pool = reopen(&registry).await;
        assert_eq!(verify(&registry).await, 0);
        clean(&pool.check(true).await.unwrap());
        // New data finds the old, and what the first version did not have works on it.
        let unique = pool.info().space.unique_bytes;
        let big = open(&registry, "big");
        big.write(500, Buf::from_slice(&text(3)), true).await.unwrap();
        assert_eq!(pool.info().space.unique_bytes, unique);
        pool.snapshot_volume("big", "then").await.unwrap();
        big.write(500, Buf::from_slice(&text(99)), true).await.unwrap();
        drop(big);
        assert_eq!(verify(&registry).await, 0);
        pool.close().await.unwrap();

        let (registry, _disk) = support::disk(BYTES, disk.content());
        let pool = reopen(&registry).await;
        assert_eq!(verify(&registry).await, 0);
        assert_eq!(read(&registry, "big").await[500].as_ref().unwrap(), &text(99));
        let then = registry.open("old/then", Access::ReadOnly, |_| ()).unwrap().channel().unwrap();
        assert!(then.read(500, 1).await.unwrap().to_contiguous().as_slice() == text(3));
        clean(&pool.check(true).await.unwrap());
    });
}

#[test]
fn a_pool_of_the_first_version_is_repaired() {
    for part in [Part::Fingerprints, Part::Container, Part::Map] {
        on(move |registry, disk| async move {
            let pool = reopen(&registry).await;
            pool.falsify("big", 1, Falsify::References(3)).await.unwrap();
            assert!(!pool.check(true).await.unwrap().is_clean());
            let report = pool.repair(true).await.unwrap();
            clean(&report);
            assert!(report.repair_count > 0);
            assert_eq!(verify(&registry).await, 0);
            let (at, bytes) = pool.place_of("big", 1, part).await.unwrap();
            pool.close().await.unwrap();
            disk.rot(at + u64::from(bytes) / 2, 1);

            let (registry, _disk) = support::disk(BYTES, disk.content());
            let pool = reopen(&registry).await;
            assert!(!pool.check(true).await.unwrap().is_clean(), "{part:?} was not found");
            let before = verify(&registry).await;
            let report = pool.repair(true).await.unwrap();
            assert_eq!(report.problem_count, 0, "{part:?}: {:#?}", report.problems);
            // A map's leaf of 512 blocks, or what the container has.
            assert!(verify(&registry).await <= before);
            assert_eq!(part == Part::Fingerprints, before == 0);
            clean(&pool.check(true).await.unwrap());
        });
    }
}
