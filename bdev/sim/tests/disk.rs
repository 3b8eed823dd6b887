//! The simulated disk does what its documentation says: cache, power cuts, tears, faults.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Io, Op, Registry, Status};
use cryptfold_bdev_sim::{DiskOptions, Effect, Fault, Image, Rng, SimDisk, Survivors, Tear, When};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{Sim, now, sleep, spawn_local};

const BLOCK: usize = 4096;

fn disk_with(options: DiskOptions, image: Image) -> (Arc<SimDisk>, Arc<Registry>) {
    let registry = Registry::new();
    let (disk, _) = SimDisk::create(&registry, options, image, 7).unwrap();
    (disk, registry)
}

/// Runs `test` on a 1 MiB disk.
fn with_disk<Fut: Future<Output = ()> + 'static>(
    options: DiskOptions,
    test: impl FnOnce(Arc<SimDisk>, Channel) -> Fut + 'static,
) {
    let (disk, registry) = disk_with(options, Image::zeroed());
    Sim::new(3).run(move || async move {
        let channel = registry.open("disk", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        test(disk, channel).await;
    });
}

fn options() -> DiskOptions {
    DiskOptions::new("disk", 1 << 20)
}

fn block(n: u8) -> Buf {
    Buf::from_slice(&[n; BLOCK])
}

fn on(image: &Image, lba: u64) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    image.read(lba * BLOCK as u64, &mut bytes);
    bytes
}

/// The first byte of a block of a surface that holds one value throughout.
fn value(image: &Image, lba: u64) -> u8 {
    let bytes = on(image, lba);
    assert_eq!(bytes, [bytes[0]; BLOCK], "block {lba} is a mixture");
    bytes[0]
}

fn whole(disk: &SimDisk, survivors: Survivors) -> Image {
    disk.crash(survivors, Tear::Whole, &mut Rng::new(1))
}

#[test]
fn unflushed_writes_are_volatile_and_flushed_ones_durable() {
    with_disk(options(), |disk, c| async move {
        c.write(0, block(1), false).await.unwrap();
        c.write(1, block(2), true).await.unwrap();
        assert_eq!(disk.volatile(), 1);
        let image = whole(&disk, Survivors::None);
        assert_eq!((value(&image, 0), value(&image, 1)), (0, 2));
        assert_eq!(value(&whole(&disk, Survivors::All), 0), 1);
        c.flush().await.unwrap();
        assert_eq!(disk.volatile(), 0);
        assert_eq!(value(&whole(&disk, Survivors::None), 0), 1);
        c.write(0, block(3), false).await.unwrap();
        c.unmap(1, 1).await.unwrap();
        let image = whole(&disk, Survivors::Only(0));
        assert_eq!((value(&image, 0), value(&image, 1)), (3, 2));
        let image = whole(&disk, Survivors::AllBut(0));
        assert_eq!((value(&image, 0), value(&image, 1)), (1, 0));
        assert_eq!(value(&disk.content(), 0), 3);
    });
}

#[test]
fn a_flush_covers_only_what_completed_before_it_was_submitted() {
    let mut options = options();
    options.latency = Duration::from_micros(10)..Duration::from_micros(10);
    with_disk(options, |disk, c| async move {
        // The flush is submitted while the write is under way, and ends long after it.
        disk.inject(Fault { when: When::nth(Op::Flush, 0), effect: Effect::Slow(Duration::from_secs(1)) });
        let flush = spawn_local({
            let c = c.clone();
            async move {
                sleep(Duration::from_micros(5)).await;
                c.flush().await
            }
        });
        c.write(0, block(1), false).await.unwrap();
        flush.await.unwrap();
        assert_eq!(disk.volatile(), 1);
        c.flush().await.unwrap();
        assert_eq!(disk.volatile(), 0);
    });
}

#[test]
fn older_writes_never_win_over_newer_durable_ones() {
    with_disk(options(), |disk, c| async move {
        c.write(0, block(1), false).await.unwrap();
        c.write(0, block(2), true).await.unwrap();
        for seed in 0..50 {
            let image = disk.crash(Survivors::Random, Tear::Sectors, &mut Rng::new(seed));
            assert_eq!(value(&image, 0), 2);
        }
    });
}

#[test]
fn without_cache_a_completed_write_is_durable() {
    let mut options = options();
    options.write_cache = false;
    with_disk(options, |disk, c| async move {
        c.write(3, block(9), false).await.unwrap();
        assert_eq!(value(&whole(&disk, Survivors::None), 3), 9);
        c.write(3, block(8), false).await.unwrap();
        assert_eq!(value(&whole(&disk, Survivors::None), 3), 8);
    });
}

#[test]
fn volatile_writes_are_torn_at_sectors() {
    with_disk(options(), |disk, c| async move {
        c.write(0, block(1), true).await.unwrap();
        c.write(0, block(2), false).await.unwrap();
        let mut mixtures = 0;
        for seed in 0..200 {
            let image = disk.crash(Survivors::All, Tear::Sectors, &mut Rng::new(seed));
            let bytes = on(&image, 0);
            for sector in bytes.chunks(512) {
                assert!(sector == [1; 512] || sector == [2; 512], "a sector is never torn");
            }
            mixtures += usize::from(bytes != [1; BLOCK] && bytes != [2; BLOCK]);
        }
        assert!(mixtures > 50, "{mixtures} of 200");
    });
}

#[test]
fn writes_under_way_may_survive() {
    let (disk, registry) = disk_with(options(), Image::zeroed());
    let mut sim = Sim::new(1);
    sim.spawn(0, move || async move {
        let c = registry.open("disk", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        c.write(0, block(1), true).await
    })
    .detach();
    let d = disk.clone();
    assert!(sim.run_until(move || d.events() == 1));
    assert_eq!(value(&whole(&disk, Survivors::None), 0), 0);
    assert_eq!(value(&whole(&disk, Survivors::All), 0), 1);
}

#[test]
fn nothing_completes_after_the_power_went_off() {
    let (disk, registry) = disk_with(options(), Image::zeroed());
    disk.cut_power_after(5);
    let acknowledged = Rc::new(RefCell::new(0));
    let seen = acknowledged.clone();
    let result = Sim::new(1).try_run(move || async move {
        let c = registry.open("disk", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        for lba in 0..10 {
            c.write(lba, block(1), false).await.unwrap();
            *seen.borrow_mut() += 1;
        }
    });
    assert!(result.is_err(), "it waits for ever");
    assert!(disk.is_off());
    assert_eq!((disk.events(), *acknowledged.borrow()), (5, 2));
}

#[test]
fn the_record_shows_every_point() {
    let mut options = options();
    options.record = true;
    with_disk(options, |disk, c| async move {
        for n in 1..=3 {
            c.write(0, block(n), false).await.unwrap();
            c.flush().await.unwrap();
        }
        let record = disk.record();
        assert_eq!(record.events(), 12);
        let rng = &mut Rng::new(1);
        let durable: Vec<u8> =
            (0..=12).map(|k| value(&record.image(k, Survivors::None, Tear::Whole, rng), 0)).collect();
        assert_eq!(durable, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]);
        let latest: Vec<u8> =
            (0..=12).map(|k| value(&record.image(k, Survivors::All, Tear::Whole, rng), 0)).collect();
        assert_eq!(latest, [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]);
        assert_eq!([0, 1, 2, 4, 5].map(|k| record.volatile(k)), [0, 1, 1, 0, 1]);
    });
}

#[test]
fn folding_keeps_the_surface() {
    // The same operations with and without record give the same surfaces.
    let surface = |record: bool| {
        let (disk, registry) = disk_with(DiskOptions { record, ..options() }, Image::noise(4));
        let d = disk.clone();
        Sim::new(9).run(move || async move {
            let c = registry.open("disk", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
            let mut rng = Rng::new(2);
            for n in 0..300u64 {
                let data = block(n as u8);
                match rng.below(6) {
                    0 => c.flush().await.unwrap(),
                    _ => c.write(rng.below(20), data, rng.one_in(5)).await.unwrap(),
                }
            }
        });
        (0..20).map(|lba| on(&whole(&d, Survivors::None), lba).to_vec()).collect::<Vec<_>>()
    };
    assert_eq!(surface(true), surface(false));
}

#[test]
fn completions_are_reordered_and_reads_are_one_moment() {
    with_disk(options(), |_, c| async move {
        let order = Rc::new(RefCell::new(Vec::new()));
        let tasks: Vec<_> = (0..40u8)
            .map(|n| {
                let (c, order) = (c.clone(), order.clone());
                spawn_local(async move {
                    c.write(u64::from(n), block(n), false).await.unwrap();
                    order.borrow_mut().push(n);
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        assert!(!order.borrow().is_sorted());
        let write = spawn_local({
            let c = c.clone();
            async move { c.write(0, Buf::from_slice(&[7; 8 * BLOCK]), false).await }
        });
        let data = c.read(0, 8).await.unwrap().to_contiguous();
        let new = data.chunks(BLOCK).filter(|b| b[0] == 7).count();
        // Block 7 holds sevens before and after.
        assert!(new == 1 || new == 8, "{new} of 8");
        write.await.unwrap();
    });
}

#[test]
fn read_into_the_callers_buffers() {
    with_disk(options(), |_, c| async move {
        c.write(1, block(5), false).await.unwrap();
        let mut io = Io::new(Op::Read, 1, 1);
        io.data.push(Buf::alloc(1000));
        io.data.push(Buf::alloc(3096));
        let io = c.io(io).await;
        assert_eq!(io.status(), Status::SUCCESS);
        assert_eq!(io.data.segments().len(), 2);
        assert_eq!(&io.data.clone().to_contiguous()[..], &[5; BLOCK]);
    });
}

#[test]
fn statuses_by_number_and_range() {
    with_disk(options(), |disk, c| async move {
        disk.inject(Fault { when: When::nth(Op::Write, 2), effect: Effect::Fail(Status::WRITE_FAULT) });
        disk.inject(Fault {
            when: When::always(Op::Read, 8192..12288),
            effect: Effect::Fail(Status::UNRECOVERED_READ),
        });
        disk.inject(Fault {
            when: When::nth(Op::Write, 3),
            effect: Effect::FailAfter(Status::CAPACITY_EXCEEDED),
        });
        let mut results = Vec::new();
        for lba in 0..5 {
            results.push(c.write(lba, block(1), false).await.err());
        }
        let expected = [None, None, Some(Status::WRITE_FAULT), Some(Status::CAPACITY_EXCEEDED), None];
        assert_eq!(results, expected);
        let image = disk.content();
        assert_eq!([0, 1, 2, 3, 4].map(|lba| value(&image, lba)), [1, 1, 0, 1, 1]);
        for _ in 0..3 {
            assert_eq!(c.read(0, 3).await.err(), Some(Status::UNRECOVERED_READ));
            assert!(c.read(0, 2).await.is_ok() && c.read(3, 1).await.is_ok());
        }
        assert_eq!(disk.clear_faults(), 1);
        assert!(c.read(0, 3).await.is_ok());
    });
}

#[test]
fn lost_misdirected_stale_and_flipped() {
    with_disk(options(), |disk, c| async move {
        disk.inject(Fault { when: When::nth(Op::Write, 0), effect: Effect::Lost });
        c.write(0, block(1), true).await.unwrap();
        assert_eq!(value(&disk.content(), 0), 0);

        disk.inject(Fault { when: When::nth(Op::Write, 0), effect: Effect::Misdirected(5 * BLOCK as u64) });
        c.write(1, block(2), true).await.unwrap();
        let image = whole(&disk, Survivors::None);
        assert_eq!((value(&image, 1), value(&image, 5)), (0, 2));

        c.write(2, block(3), false).await.unwrap();
        c.write(2, block(4), false).await.unwrap();
        disk.inject(Fault { when: When::nth(Op::Read, 0), effect: Effect::Stale });
        assert_eq!(c.read(2, 1).await.unwrap().to_contiguous()[0], 3);
        assert_eq!(c.read(2, 1).await.unwrap().to_contiguous()[0], 4);

        let flip = Effect::Flip { offset: 10, mask: 0x80 };
        disk.inject(Fault { when: When::nth(Op::Read, 0), effect: flip.clone() });
        let data = c.read(2, 1).await.unwrap().to_contiguous();
        assert_eq!((data[9], data[10], data[11]), (4, 0x84, 4));
        disk.inject(Fault { when: When::nth(Op::Write, 0), effect: flip });
        c.write(3, block(1), false).await.unwrap();
        assert_eq!(on(&disk.content(), 3)[10], 0x81);
        assert_eq!(disk.clear_faults(), 0);
    });
}

#[test]
fn bit_rot_stays() {
    with_disk(options(), |disk, c| async move {
        c.write(1, block(1), true).await.unwrap();
        disk.rot(4096 + 700, 0x10);
        let data = c.read(1, 1).await.unwrap().to_contiguous();
        assert_eq!((data[699], data[700]), (1, 0x11));
        assert_eq!(on(&whole(&disk, Survivors::None), 1)[700], 0x11);
    });
}

#[test]
fn slow_and_stalled() {
    with_disk(options(), |disk, c| async move {
        disk.inject(Fault { when: When::nth(Op::Read, 0), effect: Effect::Slow(Duration::from_secs(2)) });
        let start = now();
        c.read(0, 1).await.unwrap();
        assert!(now() - start >= Duration::from_secs(2));

        disk.inject(Fault {
            when: When { op: Some(Op::Write), bytes: None, skip: 0, hits: 2 },
            effect: Effect::Stall,
        });
        let stalled: Vec<_> = (0..2)
            .map(|n| {
                let mut io = Io::new(Op::Write, n, 1);
                io.data = block(1).into();
                io.tag = 40 + n;
                let c = c.clone();
                spawn_local(async move { c.io(io).await.status() })
            })
            .collect();
        sleep(Duration::from_secs(60)).await;
        assert!(stalled.iter().all(|task| !task.is_finished()));
        assert!(c.abort(41) && !c.abort(99));
        let mut stalled = stalled.into_iter();
        let (first, second) = (stalled.next().unwrap(), stalled.next().unwrap());
        assert_eq!(second.await, Status::ABORTED_BY_REQUEST);
        assert!(!first.is_finished());
        assert_eq!(c.io(Io::new(Op::Reset, 0, 0)).await.status(), Status::SUCCESS);
        assert_eq!(first.await, Status::ABORTED_BY_REQUEST);
    });
}

#[test]
fn liars() {
    with_disk(options(), |disk, c| async move {
        disk.ignore_flush(true);
        c.write(0, block(1), false).await.unwrap();
        c.flush().await.unwrap();
        assert_eq!(value(&whole(&disk, Survivors::None), 0), 0);
        disk.ignore_flush(false);
        c.flush().await.unwrap();
        assert_eq!(value(&whole(&disk, Survivors::None), 0), 1);
        disk.ignore_fua(true);
        c.write(0, block(2), true).await.unwrap();
        assert_eq!(value(&whole(&disk, Survivors::None), 0), 1);
    });
}

#[test]
fn used_disks_hold_noise() {
    let mut options = options();
    options.block_bytes = 512;
    let (disk, registry) = disk_with(options, Image::noise(5));
    Sim::new(1).run(move || async move {
        let c = registry.open("disk", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        let before = c.read(8, 8).await.unwrap().to_contiguous();
        assert!(before.iter().filter(|b| **b == 0).count() < 100);
        c.write(9, Buf::from_slice(&[1; 512]), true).await.unwrap();
        let after = c.read(8, 8).await.unwrap().to_contiguous();
        assert_eq!(after[..512], before[..512]);
        assert_eq!(after[512..1024], [1; 512]);
        assert_eq!(after[1024..], before[1024..]);
        assert_eq!(disk.reads(), 2);
    });
}
