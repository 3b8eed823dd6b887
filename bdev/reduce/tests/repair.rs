//! The audit finds what is wrong, the repair mends what can be mended, and what could be read can be read after it.

mod support;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{Access, Channel, Registry};
use cryptfold_bdev_sim::{Image, Rng, SimDisk};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, Sim};
use cryptfold_reduce::{CheckReport, CreateOptions, Falsify, LocalPool, Part, VolumeOptions};
use support::key;

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
const BLOCKS: u64 = 4096;

async fn reopen(registry: &Arc<Registry>) -> LocalPool {
    LocalPool::open(registry, "disk", &key(), Some(16 * MIB)).await.unwrap().expect("a pool")
}

fn open(registry: &Arc<Registry>) -> Channel {
    registry.open("p/v", Access::ReadWrite, |_| ()).unwrap().channel().unwrap()
}

/// Blocks of which some compress, some do not, and every 8th is like others.
fn block(lba: u64) -> Vec<u8> {
    let lba = if lba.is_multiple_of(8) { lba % 64 } else { lba };
    let mut rng = Rng::new(lba + 1);
    let words = if lba.is_multiple_of(3) { 16 } else { 512 };
    let mut block: Vec<u8> = (0..words).flat_map(|_| rng.next().to_le_bytes()).collect();
    block.resize(4096, lba as u8);
    block
}

/// A pool whose blocks 0 .. 2048 are written, by 32, and checkpointed.
async fn filled(registry: &Arc<Registry>) -> LocalPool {
    let mut options = CreateOptions::new(key());
    options.memory_budget = Some(16 * MIB);
    let pool = LocalPool::create(registry, "disk", "p", &options).await.unwrap();
    let volume = VolumeOptions { name: "v".into(), size_bytes: BLOCKS * 4096, ..VolumeOptions::default() };
    pool.create_volume(&volume).await.unwrap();
    let channel = open(registry);
    for lba in (0..2048).step_by(32) {
        let data: Vec<u8> = (lba..lba + 32).flat_map(block).collect();
        channel.write(lba, Buf::from_slice(&data), false).await.unwrap();
    }
    channel.flush().await.unwrap();
    pool.checkpoint().await.unwrap();
    pool
}

/// Every block is right, or an error; never wrong. Gives those that are errors.
async fn lost(registry: &Arc<Registry>) -> Vec<u64> {
    let channel = open(registry);
    let mut lost = Vec::new();
    for lba in 0..2048 {
        match channel.read(lba, 1).await {
            Ok(data) => assert!(data.to_contiguous().as_slice() == block(lba), "block {lba} is wrong"),
            Err(_) => lost.push(lba),
        }
    }
    for lba in (2048..BLOCKS).step_by(64) {
        match channel.read(lba, 1).await {
            Ok(data) => {
                assert!(data.to_contiguous().iter().all(|&byte| byte == 0), "block {lba} is not zero")
            }
            Err(_) => lost.push(lba),
        }
    }
    lost
}

fn clean(report: &CheckReport) {
    assert!(report.is_clean(), "{:#?}", report.problems);
}

/// Opens an image, lets `f` work, closes in order, and gives what is on the disk then.
fn on<F: Future<Output = LocalPool> + 'static>(
    image: Image,
    f: impl FnOnce(Arc<Registry>, Arc<SimDisk>) -> F + 'static,
) -> Image {
    let (send, receive) = std::sync::mpsc::channel();
    Sim::new(5).run(move || async move {
        let (registry, disk) = support::disk(DISK, image);
        let pool = f(registry, disk.clone()).await;
        pool.close().await.unwrap();
        send.send(disk.content()).unwrap();
    });
    receive.recv().unwrap()
}

#[test]
fn wrong_counts_are_made_right_and_nothing_is_lost() {
    for what in [
        Falsify::References(3),
        Falsify::LiveBytes(1000),
        Falsify::NoLiveBytes,
        Falsify::Fingerprint,
        Falsify::Counters,
    ] {
        let image = on(Image::zeroed(), move |registry, _| async move {
            let pool = filled(&registry).await;
            clean(&pool.check(true).await.unwrap());
            pool.falsify("v", 77, what).await.unwrap();
            let report = pool.check(true).await.unwrap();
            assert!(!report.is_clean(), "{what:?} was not found");
            let report = pool.repair(true).await.unwrap();
            clean(&report);
            assert!(report.found > 0 && report.repair_count > 0, "{what:?}: {report:?}");
            assert!(lost(&registry).await.is_empty());
            pool
        });
        on(image, |registry, _| async move {
            let pool = reopen(&registry).await;
            clean(&pool.check(true).await.unwrap());
            assert!(lost(&registry).await.is_empty());
            pool
        });
    }
}

#[test]
fn a_forgotten_fragment_is_an_error_on_exactly_its_blocks() {
    on(Image::zeroed(), |registry, _| async move {
        let pool = filled(&registry).await;
        pool.falsify("v", 77, Falsify::FragmentGone).await.unwrap();
        assert!(!pool.check(false).await.unwrap().is_clean());
        let before = lost(&registry).await;
        assert!(before.contains(&77) && before.len() <= 32, "{before:?}");
        let report = pool.repair(true).await.unwrap();
        clean(&report);
        assert_eq!(report.uncorrectable, before.len() as u64);
        assert_eq!(lost(&registry).await, before);
        // What is written again is there again.
        let channel = open(&registry);
        for &lba in &before {
            channel.write(lba, Buf::from_slice(&block(lba)), false).await.unwrap();
        }
        drop(channel);
        assert!(lost(&registry).await.is_empty());
        clean(&pool.check(true).await.unwrap());
        pool
    });
}

/// Damages the node (or data) that block 77 depends on; `most` blocks may be lost, all of them below it.
fn damaged_part(part: Part, most: usize) {
    let image = on(Image::zeroed(), move |registry, disk| async move {
        let pool = filled(&registry).await;
        let (at, bytes) = pool.place_of("v", 77, part).await.unwrap();
        pool.close().await.unwrap();
        disk.rot(at + u64::from(bytes) / 2, 0x10);
        let pool = reopen(&registry).await;
        let report = pool.check(true).await.unwrap();
        assert!(!report.is_clean(), "{part:?} was not found");
        let before = lost(&registry).await;
        let report = pool.repair(true).await.unwrap();
        let kept = u64::from(part == Part::Fragment);
        assert_eq!((report.problem_count, report.damaged), (kept, kept), "{part:?}: {:#?}", report.problems);
        let after = lost(&registry).await;
        assert!(after.iter().all(|lba| before.contains(lba)), "{part:?}: the repair lost {after:?}");
        assert!(after.len() <= most, "{part:?}: {after:?}");
        assert_eq!(part == Part::Fingerprints, after.is_empty(), "{part:?}");
        // The range can be written again, and then all is well.
        let channel = open(&registry);
        for lba in after {
            let data = if lba < 2048 { block(lba) } else { vec![0; 4096] };
            channel.write(lba, Buf::from_slice(&data), false).await.unwrap();
        }
        drop(channel);
        assert!(lost(&registry).await.is_empty());
        pool
    });
    on(image, |registry, _| async move {
        let pool = reopen(&registry).await;
        clean(&pool.check(true).await.unwrap());
        assert!(lost(&registry).await.is_empty());
        pool
    });
}

#[test]
fn a_damaged_leaf_of_a_map_costs_its_blocks() {
    damaged_part(Part::Map, 512);
}

#[test]
fn a_damaged_node_above_maps_costs_what_is_below() {
    damaged_part(Part::MapParent, 2048 + 32);
}

#[test]
fn a_damaged_container_costs_its_chunks() {
    damaged_part(Part::Container, 512 + 256);
}

#[test]
fn damaged_fingerprints_cost_nothing() {
    damaged_part(Part::Fingerprints, 0);
}

#[test]
fn a_damaged_fragment_costs_its_chunks() {
    damaged_part(Part::Fragment, 64);
}

#[test]
fn whatever_is_damaged_the_repair_loses_nothing_that_can_be_read() {
    let count = std::env::var("CRYPTFOLD_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let image = on(Image::zeroed(), |registry, _| async move { filled(&registry).await });
    let pages: Vec<u64> = image.written_pages().filter(|&at| at >= MIB).collect();
    let mut repaired = 0;
    for seed in 0..count {
        let mut rng = Rng::new(seed);
        let mut image = image.clone();
        for _ in 0..rng.range(1, 6) {
            let page = pages[rng.below(pages.len() as u64) as usize];
            image.flip(page + rng.below(4096), 1 << rng.below(8));
        }
        let (send, receive) = std::sync::mpsc::channel();
        Sim::new(seed).run(move || async move {
            let (registry, _disk) = support::disk(DISK, image);
            let Ok(Some(pool)) = LocalPool::open(&registry, "disk", &key(), Some(16 * MIB)).await else {
                return;
            };
            let before = lost(&registry).await;
            let report = pool.repair(true).await.unwrap();
            assert_eq!(report.problem_count, report.damaged, "{:#?}", report.problems);
            let after = lost(&registry).await;
            assert!(after.iter().all(|lba| before.contains(lba)), "lost {after:?}, before {before:?}");
            send.send(report.repair_count).unwrap();
            pool.close().await.unwrap();
            let pool = reopen(&registry).await;
            let again = pool.check(true).await.unwrap();
            assert_eq!(again.problem_count, again.damaged, "{:#?}", again.problems);
            assert_eq!(lost(&registry).await, after);
            pool.close().await.unwrap();
        });
        repaired += u64::from(receive.try_recv().is_ok_and(|repairs| repairs > 0));
    }
    assert!(repaired > 0, "no seed needed a repair");
}

#[test]
fn an_audit_offline_writes_nothing_and_replays_the_journal() {
    let crashed = {
        let (send, receive) = std::sync::mpsc::channel();
        Sim::new(9).run(move || async move {
            let (registry, disk) = support::disk(DISK, Image::zeroed());
            let _pool = filled(&registry).await;
            let channel = open(&registry);
            for lba in 100..140 {
                channel.write(lba, Buf::from_slice(&block(lba + 1000)), false).await.unwrap();
            }
            channel.flush().await.unwrap();
            send.send(disk.content()).unwrap();
        });
        receive.recv().unwrap()
    };
    Sim::new(10).run(move || async move {
        let (registry, disk) = support::disk(DISK, crashed.clone());
        let (info, report) = LocalPool::audit(&registry, "disk", &key(), true).await.unwrap().unwrap();
        clean(&report);
        assert_eq!((info.name.as_str(), report.blocks), ("p", 2048));
        let after = disk.content();
        let (mut a, mut b) = (vec![0; 4096], vec![0; 4096]);
        for page in (0..DISK).step_by(4096) {
            crashed.read(page, &mut a);
            after.read(page, &mut b);
            assert!(a == b, "the audit wrote at {page}");
        }
        // Somebody who has it open is left alone.
        let pool = reopen(&registry).await;
        let channel = open(&registry);
        assert_eq!(channel.read(100, 1).await.unwrap().to_contiguous().as_slice(), block(1100));
        let (other, _second) = support::disk(DISK, disk.content());
        drop(channel);
        let beating = reactor::spawn_local(async move {
            LocalPool::audit(&other, "disk", &key(), false).await.map(|found| found.is_some())
        });
        // The copy's heart stands still, so it may be audited.
        assert!(beating.await.unwrap());
        pool.close().await.unwrap();
    });
}

#[test]
fn an_audit_lets_writers_go_on_when_it_is_over() {
    on(Image::zeroed(), |registry, _| async move {
        let pool = filled(&registry).await;
        let writers: Vec<_> = (0..4u64)
            .map(|n| {
                let registry = registry.clone();
                reactor::spawn_local(async move {
                    let channel = open(&registry);
                    for round in 0..30 {
                        // Several steps each, so that audits find writes half done.
                        let lba = (n * 512 + round * 13) % 1900;
                        let data: Vec<u8> = (lba..lba + 100).flat_map(block).collect();
                        channel.write(lba, Buf::from_slice(&data), round % 7 == 0).await.unwrap();
                    }
                })
            })
            .collect();
        for round in 0..6 {
            let report = if round % 2 == 0 { pool.check(true).await } else { pool.repair(false).await };
            clean(&report.unwrap());
        }
        for writer in writers {
            writer.await;
        }
        assert!(lost(&registry).await.is_empty());
        clean(&pool.check(true).await.unwrap());
        pool
    });
}

/// What hosts and the operator do beside audits.
struct Beside {
    registry: Arc<Registry>,
    pool: LocalPool,
    /// The audit that goes on.
    audit: Rc<Cell<u64>>,
    /// Writes that began and ended while it did.
    within: Rc<Cell<u64>>,
}

impl Beside {
    async fn write(&self, channel: &Channel, lba: u64, blocks: impl Iterator<Item = u64>) {
        let data: Vec<u8> = blocks.flat_map(block).collect();
        let audit = self.audit.get();
        channel.write(lba, Buf::from_slice(&data), false).await.unwrap();
        self.within.set(self.within.get() + u64::from(self.audit.get() == audit));
    }

    /// Overwrites, duplicates, discards, snapshots, clones and their deletion.
    async fn work(self, seed: u64, steps: u64) {
        let mut rng = Rng::new(seed);
        let channel = open(&self.registry);
        for step in 0..steps {
            let (lba, count) = (rng.below(1900), 1 + rng.below(100));
            match rng.below(8) {
                0 => channel.unmap(lba, count).await.unwrap(),
                1 => channel.flush().await.unwrap(),
                2 => self.pool.checkpoint().await.unwrap(),
                3 => {
                    let (snapshot, clone) = (format!("s{seed}-{step}"), format!("c{seed}-{step}"));
                    self.pool.snapshot_volume("v", &snapshot).await.unwrap();
                    self.pool.clone_volume(&snapshot, &clone).await.unwrap();
                    let copy = self.registry.open(&format!("p/{clone}"), Access::ReadWrite, |_| ()).unwrap();
                    self.write(&copy.channel().unwrap(), lba, (0..64).map(|n| n * 7 + step)).await;
                    drop(copy);
                    self.pool.delete_volume(&clone).await.unwrap();
                    self.pool.delete_volume(&snapshot).await.unwrap();
                }
                _ => {
                    let first = rng.below(3000);
                    self.write(&channel, lba, first..first + count).await;
                }
            }
        }
    }
}

#[test]
fn audits_beside_hosts_see_one_state_at_every_step_and_hosts_do_not_wait() {
    for seed in 0..9 {
        println!("seed {seed}");
        on(Image::zeroed(), move |registry, _| async move {
            let pool = filled(&registry).await;
            // In several walks, in one, and with nothing in the cache that need not be there.
            pool.limit_audits([600, 1 << 20, 1 << 30][seed as usize % 3]);
            let (audit, within) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
            let workers: Vec<_> = (0..3)
                .map(|n| {
                    let (registry, pool) = (registry.clone(), pool.clone());
                    let beside = Beside { registry, pool, audit: audit.clone(), within: within.clone() };
                    reactor::spawn_local(beside.work(10 * seed + n, 60))
                })
                .collect();
            while !workers.iter().all(|worker| worker.is_finished()) {
                clean(&pool.check(audit.get() % 2 == 1).await.unwrap());
                audit.set(audit.get() + 1);
            }
            for worker in workers {
                worker.await;
            }
            assert!(within.get() > 10, "{} writes within {} audits", within.get(), audit.get());
            clean(&pool.check(true).await.unwrap());
            pool
        });
    }
}

#[test]
fn an_audit_finds_what_is_wrong_while_hosts_go_on() {
    for what in [Falsify::References(3), Falsify::LiveBytes(1000), Falsify::Counters] {
        on(Image::zeroed(), move |registry, _| async move {
            let pool = filled(&registry).await;
            pool.falsify("v", 77, what).await.unwrap();
            let (audit, within) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
            let beside = Beside { registry, pool: pool.clone(), audit, within };
            let worker = reactor::spawn_local(beside.work(3, 40));
            assert!(!pool.check(false).await.unwrap().is_clean(), "{what:?} was not found");
            assert!(!worker.is_finished());
            worker.await;
            clean(&pool.repair(true).await.unwrap());
            pool
        });
    }
}
