//! Range locks: compare-and-write is atomic across the channels of several cores, and never waits for ever.

use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, BdevError, Channel, Device, DeviceInfo, Io, Op, Queue, Registry, Status};
use cryptfold_bdev_sim::{DiskOptions, Image, Rng, SimDisk};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{Sim, Task, sleep};

const BLOCK: usize = 512;
const CORES: usize = 4;

fn machine(seed: u64) -> (Sim, Arc<Registry>) {
    let registry = Registry::new();
    let mut options = DiskOptions::new("disk", 1 << 20);
    options.block_bytes = BLOCK as u32;
    // Without native compare and copy: the core makes them of reads and writes.
    SimDisk::create(&registry, options, Image::zeroed(), seed).unwrap();
    (Sim::new(seed).cores(CORES), registry)
}

fn channel(registry: &Registry) -> Channel {
    registry.open("disk", Access::ReadWrite, |_| ()).unwrap().channel().unwrap()
}

fn finish<T>(sim: &mut Sim, tasks: &[Task<T>]) {
    assert!(sim.run_until(|| tasks.iter().all(Task::is_finished)), "stalled: a lock was never given");
}

/// Blocks that all hold `value`.
fn counter(value: u64, blocks: u64) -> Buf {
    let mut buf = Buf::alloc_zeroed(BLOCK * blocks as usize);
    for block in buf.make_mut().chunks_mut(BLOCK) {
        block[..8].copy_from_slice(&value.to_le_bytes());
    }
    buf
}

async fn compare_and_write(c: &Channel, lba: u64, blocks: u64, old: u64, new: u64) -> Status {
    let mut io = Io::new(Op::CompareAndWrite, lba, blocks);
    io.compare = counter(old, blocks).into();
    io.data = counter(new, blocks).into();
    c.io(io).await.status()
}

async fn value(c: &Channel, lba: u64) -> u64 {
    let data = c.read(lba, 1).await.unwrap().to_contiguous();
    u64::from_le_bytes(data[..8].try_into().unwrap())
}

/// Counts up one counter by compare-and-write until `n` times succeeded.
async fn count_up(c: Channel, lba: u64, blocks: u64, n: u64, mut rng: Rng) {
    let mut done = 0;
    while done < n {
        let old = value(&c, lba).await;
        if rng.one_in(4) {
            sleep(Duration::from_nanos(rng.below(100_000))).await;
        }
        match compare_and_write(&c, lba, blocks, old, old + 1).await {
            Status::SUCCESS => done += 1,
            Status::COMPARE_FAILURE => {}
            other => panic!("{other}"),
        }
    }
}

/// Another name for a device: a lock of one does not know the channels of the other.
struct Alias(DeviceInfo, Arc<dyn Device>);

impl Device for Alias {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }
    fn open_queue(self: Arc<Self>) -> Result<std::rc::Rc<dyn Queue>, BdevError> {
        self.1.clone().open_queue()
    }
}

/// Eight tasks count up two counters by 10 each; the totals. Every second task goes through `other`.
fn totals(seed: u64, other: &'static str) -> (u64, u64, u64) {
    let (mut sim, registry) = machine(seed);
    let disk = registry.get("disk").unwrap().device().clone();
    let mut info = DeviceInfo::new("alias", "Alias", BLOCK as u32, 2048);
    info.ops = disk.info().ops;
    registry.register(Arc::new(Alias(info, disk))).unwrap();
    let mut tasks = Vec::new();
    for n in 0..8u64 {
        let registry = registry.clone();
        tasks.push(sim.spawn(n as usize % CORES, move || async move {
            // Four of them on a counter of two blocks, four on one of one block, apart from it.
            let (lba, blocks) = if n < 4 { (10, 2) } else { (20, 1) };
            let name = if n % 2 == 0 { "disk" } else { other };
            let c = registry.open(name, Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
            count_up(c, lba, blocks, 10, Rng::new(seed * 100 + n)).await;
        }));
    }
    finish(&mut sim, &tasks);
    sim.run(move || async move {
        let c = channel(&registry);
        (value(&c, 10).await, value(&c, 11).await, value(&c, 20).await)
    })
}

#[test]
fn no_increment_is_lost() {
    for seed in 0..60 {
        assert_eq!(totals(seed, "disk"), (40, 40, 40), "seed {seed}");
    }
    // The control: where no lock is, increments are lost.
    assert!((0..20).all(|seed| totals(seed, "alias") < (40, 40, 40)));
}

#[test]
fn writes_of_other_channels_do_not_slip_in_between() {
    // One task writes n = 1, 2, 3, ...; the others add a million by compare-and-write. So the last six digits are always
    // those of the last write, unless it was overwritten by somebody who had compared with what was there before it.
    const MILLION: u64 = 1_000_000;
    let mut swaps = 0;
    for seed in 0..60 {
        let (mut sim, registry) = machine(seed);
        let mut tasks = Vec::new();
        for n in 1..CORES as u64 {
            let registry = registry.clone();
            tasks.push(sim.spawn(n as usize, move || async move {
                let c = channel(&registry);
                let mut done = 0;
                for _ in 0..40 {
                    let old = value(&c, 30).await;
                    done += u64::from(compare_and_write(&c, 30, 2, old, old + MILLION).await.is_ok());
                }
                done
            }));
        }
        tasks.push(sim.spawn(0, move || async move {
            let c = channel(&registry);
            for n in 1..=40 {
                c.write(30, counter(n, 2), false).await.unwrap();
                for _ in 0..2 {
                    assert_eq!(value(&c, 30).await % MILLION, n, "seed {seed}: a write was lost");
                }
            }
            0
        }));
        finish(&mut sim, &tasks);
        for task in tasks {
            swaps += sim.run(move || task);
        }
    }
    assert!(swaps > 100, "only {swaps} compare-and-writes succeeded");
}

#[test]
fn what_is_written_again_undoes_no_write() {
    let mut written = 0;
    for seed in 0..60 {
        let (mut sim, registry) = machine(seed);
        let (claimed, tell) =
            (Arc::new(std::sync::atomic::AtomicBool::new(false)), std::sync::atomic::Ordering::SeqCst);
        let mut tasks = Vec::new();
        for n in 1..CORES as u64 {
            let (registry, claimed) = (registry.clone(), claimed.clone());
            tasks.push(sim.spawn(n as usize, move || async move {
                while !claimed.load(tell) {
                    sleep(Duration::from_micros(1)).await;
                }
                // Beside a claim.
                let c = registry.open("disk", Access::ReadOnly, |_| ()).unwrap().channel().unwrap();
                let mut done = 0;
                for turn in 0..40 {
                    // Both blocks, or the second one.
                    let start = turn % 2;
                    let part = cryptfold_bdev::BlockRange { start, blocks: 2 - start };
                    done += c.rewrite(30, 2, |_| [part].into_iter().collect()).await.unwrap();
                }
                assert_eq!(c.rewrite(2047, 2, |_| Default::default()).await, Err(Status::LBA_OUT_OF_RANGE));
                done
            }));
        }
        tasks.push(sim.spawn(0, move || async move {
            let descriptor = registry.open("disk", Access::ReadWrite, |_| ()).unwrap();
            descriptor.claim("a host").unwrap();
            claimed.store(true, tell);
            let c = descriptor.channel().unwrap();
            for n in 1..=40 {
                c.write(30, counter(n, 2), false).await.unwrap();
                for lba in [30, 31] {
                    assert_eq!(value(&c, lba).await, n, "seed {seed}: a write was undone");
                }
            }
            0
        }));
        finish(&mut sim, &tasks);
        for task in tasks {
            written += sim.run(move || task);
        }
    }
    assert_eq!(written, 60 * 3 * 40 * 3 / 2);
}

#[test]
fn overlapping_locks_of_many_sizes_end() {
    // Ranges chosen so that waiters overlap each other in chains, with channels that come and go meanwhile.
    for seed in 0..60 {
        let (mut sim, registry) = machine(seed);
        let mut tasks = Vec::new();
        for n in 0..12u64 {
            let registry = registry.clone();
            tasks.push(sim.spawn(n as usize % CORES, move || async move {
                let mut rng = Rng::new(seed * 31 + n);
                for _ in 0..6 {
                    let c = channel(&registry);
                    for _ in 0..3 {
                        let (lba, blocks) = (rng.below(12), 1 + rng.below(6));
                        let status = match rng.below(3) {
                            0 => c.write(lba, counter(rng.next(), blocks), false).await.err(),
                            _ => Some(compare_and_write(&c, lba, blocks, 0, rng.next()).await),
                        };
                        assert!(matches!(status, None | Some(Status::SUCCESS | Status::COMPARE_FAILURE)));
                    }
                }
            }));
        }
        finish(&mut sim, &tasks);
        // All locks are gone: a write of everything goes through.
        sim.run(move || async move { channel(&registry).write(0, counter(1, 32), false).await.unwrap() });
    }
}

#[test]
fn a_lock_waits_for_a_write_under_way_on_another_core() {
    let (mut sim, registry) = machine(1);
    let theirs = registry.clone();
    let write = sim.spawn(1, move || async move {
        let c = channel(&theirs);
        for n in 1..=20 {
            c.write(5, counter(n, 1), false).await.unwrap();
        }
    });
    let swap = sim.spawn(2, move || async move {
        let c = channel(&registry);
        let mut tries = 0;
        loop {
            tries += 1;
            let seen = value(&c, 5).await;
            if compare_and_write(&c, 5, 1, seen, 1_000_000).await.is_ok() {
                // Nobody wrote between the comparison and this.
                return tries;
            }
        }
    });
    assert!(sim.run_until(|| write.is_finished() && swap.is_finished()));
}
