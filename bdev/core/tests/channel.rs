//! What every device gets from its channels: checks, limits, statistics, emulated operations, removal, resizing, abort.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cryptfold_bdev::{
    Access, BdevError, BdevEvent, Channel, Class, Device, DeviceInfo, Io, Op, OpSet, QosLimits, Queue,
    Registry, Status,
};
use cryptfold_bdev_sim::{DiskOptions, Effect, Fault, Image, SimDisk, When};
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reactor::{Sim, now, sleep, spawn_local};

const BLOCK: usize = 4096;

fn with_disk<T: 'static, Fut: Future<Output = T> + 'static>(
    test: impl FnOnce(Arc<SimDisk>, Arc<Registry>, Channel) -> Fut + 'static,
) -> T {
    let registry = Registry::new();
    let mut options = DiskOptions::new("disk", 64 << 20);
    options.latency = Duration::from_micros(20)..Duration::from_micros(20);
    let (disk, _) = SimDisk::create(&registry, options, Image::zeroed(), 1).unwrap();
    Sim::new(11).run(move || async move {
        let channel = registry.open("disk", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        test(disk, registry, channel).await
    })
}

fn bytes(n: u8, blocks: usize) -> Buf {
    Buf::from_slice(&vec![n; BLOCK * blocks])
}

async fn status(c: &Channel, op: Op, lba: u64, blocks: u64, data: impl Into<SgList>) -> Status {
    let mut io = Io::new(op, lba, blocks);
    io.data = data.into();
    c.io(io).await.status()
}

#[test]
fn bad_ranges_and_buffers_do_not_reach_the_device() {
    with_disk(|disk, _, c| async move {
        let end = 64 << 8;
        for (lba, blocks) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)] {
            assert_eq!(status(&c, Op::Read, lba, blocks, SgList::new()).await, Status::LBA_OUT_OF_RANGE);
            assert_eq!(status(&c, Op::Unmap, lba, blocks, SgList::new()).await, Status::LBA_OUT_OF_RANGE);
        }
        assert_eq!(status(&c, Op::Write, 0, 2, bytes(1, 1)).await, Status::INVALID_FIELD);
        assert_eq!(status(&c, Op::Write, 0, 1, SgList::new()).await, Status::INVALID_FIELD);
        assert_eq!(status(&c, Op::Read, 0, 1, bytes(1, 2)).await, Status::INVALID_FIELD);
        assert_eq!(status(&c, Op::Compare, 0, 1, bytes(1, 2)).await, Status::INVALID_FIELD);
        assert_eq!(c.write(0, Buf::alloc(100), false).await, Err(Status::INVALID_FIELD));
        let mut io = Io::new(Op::Copy, 0, 2);
        io.src_lba = end - 1;
        assert_eq!(c.io(io).await.status(), Status::LBA_OUT_OF_RANGE);
        assert_eq!((disk.events(), disk.reads()), (0, 0));
        assert_eq!(status(&c, Op::Write, end - 1, 1, bytes(1, 1)).await, Status::SUCCESS);
    });
}

#[test]
fn read_only_openings_do_not_write() {
    with_disk(|disk, registry, _| async move {
        let c = registry.open("disk", Access::ReadOnly, |_| ()).unwrap().channel().unwrap();
        for op in [Op::Write, Op::Unmap, Op::WriteZeroes] {
            let data = if op == Op::Write { bytes(1, 1).into() } else { SgList::new() };
            assert_eq!(status(&c, op, 0, 1, data).await, Status::ACCESS_DENIED);
        }
        assert!(c.read(0, 1).await.is_ok() && c.flush().await.is_ok());
        assert_eq!(disk.events(), 2, "only the flush");
    });
}

#[test]
fn rates_in_virtual_time() {
    let run = |limits: QosLimits, write: bool, n: u64| {
        with_disk(move |_, registry, c| async move {
            registry.get("disk").unwrap().set_qos(limits);
            let start = now();
            let tasks: Vec<_> = (0..n)
                .map(|i| {
                    let c = c.clone();
                    spawn_local(async move {
                        if write {
                            c.write(i % 64, bytes(1, 1), false).await.unwrap();
                        } else {
                            c.read(i % 64, 1).await.unwrap();
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            (now() - start).as_secs_f64()
        })
    };
    let near = |seconds: f64, expected: f64| (seconds - expected).abs() < expected * 0.05 + 0.005;
    let ios = QosLimits { rw_ios_per_sec: 1000, ..QosLimits::default() };
    assert!(near(run(ios, false, 3000), 3.0), "{}", run(ios, false, 3000));
    let writes = QosLimits { w_mbytes_per_sec: 4, ..QosLimits::default() };
    assert!(near(run(writes, true, 2048), 2.0), "{}", run(writes, true, 2048));
    assert!(run(writes, false, 2048) < 0.1, "reads are not limited by a limit of writes");
    let both = QosLimits { rw_mbytes_per_sec: 8, r_mbytes_per_sec: 2, ..QosLimits::default() };
    assert!(near(run(both, false, 1024), 2.0), "the tighter limit counts");
}

#[test]
fn a_lifted_limit_lets_the_held_go() {
    with_disk(|_, registry, c| async move {
        let bdev = registry.get("disk").unwrap();
        bdev.set_qos(QosLimits { rw_ios_per_sec: 1, ..QosLimits::default() });
        let tasks: Vec<_> = (0..50)
            .map(|_| {
                let c = c.clone();
                spawn_local(async move { c.read(0, 1).await.is_ok() })
            })
            .collect();
        sleep(Duration::from_millis(500)).await;
        assert!(tasks.iter().filter(|t| t.is_finished()).count() <= 2);
        bdev.set_qos(QosLimits::default());
        let lifted = now();
        for task in tasks {
            assert!(task.await);
        }
        assert!(now() - lifted < Duration::from_millis(10));
        assert_eq!(bdev.qos(), QosLimits::default());
    });
}

#[test]
fn held_io_can_be_aborted() {
    with_disk(|_, registry, c| async move {
        let bdev = registry.get("disk").unwrap();
        bdev.set_qos(QosLimits { rw_ios_per_sec: 1, ..QosLimits::default() });
        let tasks: Vec<_> = (0..3)
            .map(|n| {
                let mut io = Io::new(Op::Read, 0, 1);
                io.tag = 70 + n;
                let c = c.clone();
                spawn_local(async move { c.io(io).await.status() })
            })
            .collect();
        sleep(Duration::from_millis(100)).await;
        assert!(c.abort(72) && !c.abort(72) && !c.abort(5));
        let statuses = [&tasks[0], &tasks[1], &tasks[2]].map(|t| t.is_finished());
        assert!(!statuses[1]);
        let mut tasks = tasks;
        assert_eq!(tasks.remove(2).await, Status::ABORTED_BY_REQUEST);
        for task in tasks {
            assert_eq!(task.await, Status::SUCCESS);
        }
    });
}

#[test]
fn statistics_count() {
    with_disk(|disk, registry, c| async move {
        let bdev = registry.get("disk").unwrap();
        bdev.enable_histogram(true);
        for lba in 0..10 {
            c.write(lba, bytes(1, 2), false).await.unwrap();
        }
        for _ in 0..5 {
            c.read(0, 3).await.unwrap();
        }
        c.flush().await.unwrap();
        c.unmap(0, 4).await.unwrap();
        disk.inject(Fault { when: When::nth(Op::Read, 0), effect: Effect::Fail(Status::UNRECOVERED_READ) });
        c.read(0, 1).await.unwrap_err();
        let writes = bdev.stats().totals(Class::Write);
        assert_eq!((writes.ops, writes.bytes), (10, 20 * BLOCK as u64));
        assert!(writes.min_latency_ns >= 20_000 && writes.max_latency_ns >= writes.min_latency_ns);
        assert!(writes.latency_ns >= 10 * writes.min_latency_ns);
        let reads = bdev.stats().totals(Class::Read);
        assert_eq!((reads.ops, reads.bytes), (6, 16 * BLOCK as u64));
        assert_eq!(bdev.stats().totals(Class::Unmap).bytes, 4 * BLOCK as u64);
        assert_eq!(bdev.stats().totals(Class::Other).ops, 1);
        assert_eq!(bdev.stats().errors().into_iter().collect::<Vec<_>>(), [((2, 0x81), 1)]);
        let histogram = bdev.stats().histogram(Class::Write).unwrap();
        assert_eq!(histogram.len(), 10);
        assert!(histogram.min() >= 19_000);
        // What a closed channel counted stays; a reset starts from zero.
        drop(c);
        assert_eq!(bdev.stats().totals(Class::Write).ops, 10);
        assert_eq!(bdev.stats().histogram(Class::Read).unwrap().len(), 6);
        bdev.stats().reset();
        assert_eq!(bdev.stats().totals(Class::Write).ops, 0);
        // Latencies are counted without being asked for; they outlive channels and resets, so that differences stay right.
        let writes = bdev.stats().latencies(Class::Write);
        assert_eq!((writes.count(), bdev.stats().latencies(Class::Read).count()), (10, 6));
        assert!(writes.quantile_s(0.0).is_some_and(|s| s >= 16e-6) && writes.sum_ns >= 190_000, "{writes:?}");
        assert_eq!(bdev.stats().latencies(Class::Copy).count(), 0);
        assert!(bdev.stats().errors().is_empty());
        let c = registry.open("disk", Access::ReadOnly, |_| ()).unwrap().channel().unwrap();
        c.read(0, 1).await.unwrap();
        assert_eq!(bdev.stats().totals(Class::Read).ops, 1);
    });
}

/// A device with read and write only, over a RAM disk's queue.
struct Bare {
    info: DeviceInfo,
    base: Arc<dyn Device>,
}

impl Device for Bare {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn open_queue(self: Arc<Self>) -> Result<std::rc::Rc<dyn Queue>, BdevError> {
        self.base.clone().open_queue()
    }
}

#[test]
fn operations_are_emulated() {
    with_disk(|disk, registry, _| async move {
        let mut info = DeviceInfo::new("bare", "Bare", BLOCK as u32, 16 << 8);
        info.ops = OpSet::of(&[Op::Read, Op::Write]);
        registry.register(Arc::new(Bare { info, base: disk.clone() })).unwrap();
        let c = registry.open("bare", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        // More than one step of the emulation.
        c.write(0, bytes(7, 600), false).await.unwrap();
        assert_eq!(status(&c, Op::Compare, 0, 600, bytes(7, 600)).await, Status::SUCCESS);
        assert_eq!(status(&c, Op::Compare, 1, 2, bytes(8, 2)).await, Status::COMPARE_FAILURE);
        c.write_zeroes(10, 550).await.unwrap();
        let data = c.read(0, 600).await.unwrap().to_contiguous();
        assert!(data[..10 * BLOCK].iter().all(|b| *b == 7));
        assert!(data[10 * BLOCK..560 * BLOCK].iter().all(|b| *b == 0));
        assert!(data[560 * BLOCK..].iter().all(|b| *b == 7));
        let mut copy = Io::new(Op::Copy, 1000, 600);
        copy.src_lba = 0;
        assert_eq!(c.io(copy).await.status(), Status::SUCCESS);
        let copied = c.read(1000, 600).await.unwrap().to_contiguous();
        assert_eq!(copied[..], data[..]);
        let mut overlapping = Io::new(Op::Copy, 5, 10);
        overlapping.src_lba = 0;
        assert_eq!(c.io(overlapping).await.status(), Status::INVALID_FIELD.do_not_retry());
        let mut swap = Io::new(Op::CompareAndWrite, 0, 1);
        swap.compare = bytes(7, 1).into();
        swap.data = bytes(9, 1).into();
        assert_eq!(c.io(swap).await.status(), Status::SUCCESS);
        assert_eq!(c.read(0, 1).await.unwrap().to_contiguous()[0], 9);
        let unsupported = Status::INVALID_OPCODE.do_not_retry();
        assert_eq!(status(&c, Op::Unmap, 0, 1, SgList::new()).await, unsupported);
        assert_eq!(status(&c, Op::Reset, 0, 0, SgList::new()).await, unsupported);
        c.flush().await.unwrap();
    });
}

#[test]
fn claims_and_names() {
    with_disk(|_, registry, c| async move {
        let bdev = registry.get("disk").unwrap();
        let uuid = bdev.info().uuid;
        assert!(Arc::ptr_eq(&registry.get(&uuid.to_string().to_uppercase()).unwrap(), &bdev));
        assert!(Arc::ptr_eq(&registry.get(&uuid.simple().to_string()).unwrap(), &bdev));
        let again = SimDisk::create(&registry, DiskOptions::new("disk", 1 << 20), Image::zeroed(), 1);
        assert!(matches!(again.map(|_| ()), Err(BdevError::Exists(_))));

        let second = registry.open("disk", Access::ReadWrite, |_| ()).unwrap();
        assert!(matches!(second.claim("me"), Err(BdevError::Claimed { .. })), "another writer is there");
        drop(c);
        second.claim("me").unwrap();
        second.claim("me").unwrap();
        assert_eq!(bdev.claimed_by().as_deref(), Some("me"));
        let refused = registry.open("disk", Access::ReadWrite, |_| ()).map(|_| ()).unwrap_err();
        assert_eq!(refused, BdevError::Claimed { name: "disk".into(), by: "me".into() });
        assert!(registry.open("disk", Access::ReadOnly, |_| ()).is_ok());
        // A channel keeps the opening, and with it the claim.
        let channel = second.channel().unwrap();
        drop(second);
        assert_eq!(bdev.claimed_by().as_deref(), Some("me"));
        drop(channel);
        assert_eq!(bdev.claimed_by(), None);
        assert!(registry.open("disk", Access::ReadWrite, |_| ()).is_ok());
    });
}

#[test]
fn removal_waits_for_outstanding_io() {
    with_disk(|_, registry, first| async move {
        drop(first);
        let told = Arc::new(AtomicBool::new(false));
        let flag = told.clone();
        let opened = registry.open("disk", Access::ReadWrite, move |event| {
            assert_eq!(event, BdevEvent::Removed);
            flag.store(true, Ordering::Relaxed);
        });
        let descriptor = opened.unwrap();
        let c = descriptor.channel().unwrap();
        drop(descriptor);
        let mut io = Io::new(Op::Write, 0, 1);
        io.data = bytes(1, 1).into();
        let under_way = c.io(io);
        let removal = registry.unregister("disk").unwrap();
        assert!(told.load(Ordering::Relaxed) && !removal.is_done());
        assert!(matches!(registry.unregister("disk").map(drop), Err(BdevError::Removing(_))));
        assert!(matches!(
            registry.open("disk", Access::ReadOnly, |_| ()).map(drop),
            Err(BdevError::Removing(_))
        ));
        assert_eq!(c.read(0, 1).await.err(), Some(Status::INVALID_NAMESPACE.do_not_retry()));
        assert_eq!(under_way.await.status(), Status::SUCCESS, "what was under way ends in order");
        assert!(!removal.is_done());
        drop(c);
        assert!(removal.is_done());
        assert!(matches!(registry.get("disk").map(drop), Err(BdevError::NotFound(_))));
        // The name is free again.
        SimDisk::create(&registry, DiskOptions::new("disk", 1 << 20), Image::zeroed(), 1).unwrap();
    });
}

#[test]
fn removal_of_a_base_takes_the_layers_along() {
    with_disk(|_, registry, first| async move {
        drop(first);
        for (name, base) in [("a", "disk"), ("b", "a")] {
            let options = cryptfold_bdev_passthru::PassthruOptions {
                name: name.into(),
                base_bdev_name: base.into(),
                uuid: None,
            };
            cryptfold_bdev_passthru::create(&registry, options).unwrap();
        }
        let c = registry.open("b", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        let removal = registry.unregister("disk").unwrap();
        assert!(!removal.is_done());
        assert_eq!(c.flush().await, Err(Status::INVALID_NAMESPACE.do_not_retry()));
        drop(c);
        assert!(removal.is_done());
        assert!(registry.list().is_empty());
    });
}

#[test]
fn resizing_is_told_through_the_layers() {
    with_disk(|_, registry, first| async move {
        drop(first);
        let options = cryptfold_bdev_passthru::PassthruOptions {
            name: "p".into(),
            base_bdev_name: "disk".into(),
            uuid: None,
        };
        cryptfold_bdev_passthru::create(&registry, options).unwrap();
        let events: Arc<Mutex<Vec<BdevEvent>>> = Arc::default();
        let seen = events.clone();
        let opened = registry.open("p", Access::ReadWrite, move |e| seen.lock().unwrap().push(e)).unwrap();
        let c = opened.channel().unwrap();
        registry.get("disk").unwrap().set_blocks(100);
        registry.get("disk").unwrap().set_blocks(100);
        assert_eq!(*events.lock().unwrap(), [BdevEvent::Resized { blocks: 100 }]);
        assert_eq!(registry.get("p").unwrap().blocks(), 100);
        assert_eq!(c.read(100, 1).await.err(), Some(Status::LBA_OUT_OF_RANGE));
        assert!(c.read(99, 1).await.is_ok());
    });
}

#[test]
fn nonsense_is_not_registered() {
    with_disk(|disk, registry, _| async move {
        let register = |name: &str, block: u32, blocks: u64| {
            let info = DeviceInfo::new(name, "Bare", block, blocks);
            registry.register(Arc::new(Bare { info, base: disk.clone() })).map(drop)
        };
        for (name, block, blocks) in [
            ("", 512, 1),
            (&*"x".repeat(256), 512, 1),
            ("x", 0, 1),
            ("x", 520, 1),
            ("x", 8192, 1),
            ("x", 512, u64::MAX / 512 + 1),
        ] {
            assert!(
                matches!(register(name, block, blocks), Err(BdevError::Invalid(_))),
                "{name} {block} {blocks}"
            );
        }
        register("x", 1024, 5).unwrap();
    });
}
