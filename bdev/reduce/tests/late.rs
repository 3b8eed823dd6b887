//! Late deduplication: what a sampled index has missed is found, maps change and nothing that can be read does.

mod support;

use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Registry};
use cryptfold_bdev_sim::{Image, Rng, Survivors, Tear};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, Sim};
use cryptfold_reduce::{CreateOptions, LateInfo, LocalPool, ScrubState, VolumeOptions};
use support::key;

const MIB: u64 = 1 << 20;
/// Distinct blocks: eight containers.
const VALUES: u64 = 4096;

fn volume(name: &str) -> VolumeOptions {
    VolumeOptions { name: name.into(), size_bytes: 2 * VALUES * 4096, ..VolumeOptions::default() }
}

/// A pool whose index keeps next to nothing, with one volume.
async fn new_pool(registry: &Arc<Registry>) -> LocalPool {
    let mut options = CreateOptions::new(key());
    options.memory_budget = Some(16 * MIB);
    options.segment_bytes = Some(MIB as u32);
    let pool = LocalPool::create(registry, "disk", "p", &options).await.unwrap();
    pool.create_volume(&volume("v")).await.unwrap();
    pool.sample_index(8);
    pool.limit_neighbours(0);
    pool
}

async fn reopen(registry: &Arc<Registry>) -> LocalPool {
    let pool = LocalPool::open(registry, "disk", &key(), Some(16 * MIB)).await.unwrap().unwrap();
    pool.sample_index(8);
    pool.limit_neighbours(0);
    pool
}

fn open(registry: &Arc<Registry>, name: &str, access: Access) -> Channel {
    registry.open(&format!("p/{name}"), access, |_| ()).unwrap().channel().unwrap()
}

/// A block; every third compresses.
fn block(value: u64) -> Vec<u8> {
    let mut rng = Rng::new(value + 1);
    let words = if value.is_multiple_of(3) { 32 } else { 512 };
    let mut block: Vec<u8> = (0..words).flat_map(|_| rng.next().to_le_bytes()).collect();
    block.resize(4096, value as u8);
    block
}

/// Writes all values twice: in order to the first half, shuffled to the second; gives which is where.
async fn fill(channel: &Channel, seed: u64) -> Vec<u64> {
    for n in (0..VALUES).step_by(32) {
        let data: Vec<u8> = (n..n + 32).flat_map(block).collect();
        channel.write(n, Buf::from_slice(&data), false).await.unwrap();
    }
    let mut rng = Rng::new(seed);
    let mut second: Vec<u64> = (0..VALUES).collect();
    for n in (1..second.len()).rev() {
        second.swap(n, rng.below(n as u64 + 1) as usize);
    }
    for (n, value) in second.iter().enumerate() {
        channel.write(VALUES + n as u64, Buf::from_slice(&block(*value)), false).await.unwrap();
    }
    channel.flush().await.unwrap();
    (0..VALUES).chain(second).collect()
}

async fn verify(channel: &Channel, values: &[u64]) {
    for (n, value) in values.iter().enumerate() {
        let data = channel.read(n as u64, 1).await.unwrap().to_contiguous();
        assert!(data.as_slice() == block(*value), "block {n}");
    }
}

fn unique(pool: &LocalPool) -> u64 {
    pool.info().space.unique_bytes / 4096
}

async fn pass(pool: &LocalPool, batch: Option<u64>) -> LateInfo {
    pool.start_late(batch).unwrap();
    while pool.info().late.state == ScrubState::Running {
        reactor::sleep(Duration::from_millis(1)).await;
    }
    pool.info().late
}

async fn clean(pool: &LocalPool) {
    let report = pool.check(true).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.problems);
}

#[test]
fn all_that_the_sample_has_missed_is_found() {
    for batch in [None, Some(3)] {
        Sim::new(3).run(move || async move {
            let (registry, _disk) = support::disk(192 * MIB, Image::zeroed());
            let pool = new_pool(&registry).await;
            let channel = open(&registry, "v", Access::ReadWrite);
            let values = fill(&channel, 7).await;
            let before = unique(&pool);
            assert!(
                before > VALUES * 3 / 2,
                "{before} of {}: the sample finds too much to test anything",
                2 * VALUES
            );
            let stored = pool.info().space.stored_bytes;
            let late = pass(&pool, batch).await;
            assert_eq!((late.state, late.blocks), (ScrubState::Done, before - VALUES));
            assert_eq!(unique(&pool), VALUES);
            assert!(pool.info().space.stored_bytes < stored * 3 / 4);
            verify(&channel, &values).await;
            clean(&pool).await;
            // Only what is new is looked at again: the containers that were being filled.
            let again = pass(&pool, batch).await;
            assert!(again.total_containers <= 2 && again.blocks == 0, "{again:?}");
        });
    }
}

#[test]
fn snapshots_and_clones_show_the_same_afterwards() {
    Sim::new(4).run(|| async {
        let (registry, _disk) = support::disk(192 * MIB, Image::zeroed());
        let pool = new_pool(&registry).await;
        let channel = open(&registry, "v", Access::ReadWrite);
        let values = fill(&channel, 8).await;
        pool.snapshot_volume("v", "s").await.unwrap();
        pool.clone_volume("s", "c").await.unwrap();
        // The snapshot has these in its own map now; and it is read, so that views of it are cached.
        for n in (0..2 * VALUES).step_by(64) {
            channel.write(n, Buf::from_slice(&block(100_000 + n)), false).await.unwrap();
        }
        let (s, c) = (open(&registry, "s", Access::ReadOnly), open(&registry, "c", Access::ReadWrite));
        verify(&s, &values).await;
        verify(&c, &values).await;
        let late = pass(&pool, Some(5)).await;
        assert_eq!(unique(&pool), VALUES + 2 * VALUES / 64, "{late:?}");
        pool.checkpoint().await.unwrap();
        verify(&s, &values).await;
        verify(&c, &values).await;
        clean(&pool).await;
        // What the volume alone had is gone with it.
        drop((s, c, channel));
        pool.delete_volume("c").await.unwrap();
        pool.delete_volume("s").await.unwrap();
        pool.delete_volume("v").await.unwrap();
        while pool.is_deleting() {
            reactor::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(unique(&pool), 0);
        clean(&pool).await;
    });
}

#[test]
fn a_pass_that_loses_power_goes_on_where_it_was() {
    Sim::new(5).run(|| async {
        let (registry, disk) = support::disk(192 * MIB, Image::zeroed());
        let pool = new_pool(&registry).await;
        let channel = open(&registry, "v", Access::ReadWrite);
        let values = fill(&channel, 9).await;
        pool.checkpoint().await.unwrap();
        pool.start_late(Some(2)).unwrap();
        while pool.info().late.containers < 10 && pool.info().late.state == ScrubState::Running {
            reactor::sleep(Duration::from_micros(100)).await;
        }
        let first = pool.stop_late();
        pool.checkpoint().await.unwrap();
        // Half a batch more, of which the power cut leaves what it likes.
        pool.start_late(Some(2)).unwrap();
        let found = pool.info().late.total_containers;
        assert!(found + first.containers <= first.total_containers + 2, "{found} after {first:?}");
        reactor::sleep(Duration::from_millis(5)).await;
        disk.cut_power();
        let image = disk.crash(Survivors::Random, Tear::Sectors, &mut Rng::new(5));
        drop((channel, pool));
        let (registry, _disk) = support::disk(192 * MIB, image);
        let pool = reopen(&registry).await;
        let channel = open(&registry, "v", Access::ReadWrite);
        verify(&channel, &values).await;
        let late = pass(&pool, Some(2)).await;
        assert!(late.total_containers < first.total_containers, "{late:?} after {first:?}");
        assert_eq!(unique(&pool), VALUES);
        verify(&channel, &values).await;
        clean(&pool).await;
    });
}

#[test]
fn hosts_that_overwrite_meanwhile_have_what_they_wrote() {
    for seed in 0..4 {
        Sim::new(seed).run(move || async move {
            let (registry, _disk) = support::disk(192 * MIB, Image::zeroed());
            let pool = new_pool(&registry).await;
            let channel = open(&registry, "v", Access::ReadWrite);
            let mut now = fill(&channel, seed).await;
            pool.start_late(Some(2)).unwrap();
            let mut rng = Rng::new(seed);
            while pool.info().late.state == ScrubState::Running {
                let (n, value) = (rng.below(2 * VALUES), rng.below(VALUES + 100));
                channel.write(n, Buf::from_slice(&block(value)), false).await.unwrap();
                now[n as usize] = value;
            }
            verify(&channel, &now).await;
            clean(&pool).await;
        });
    }
}
