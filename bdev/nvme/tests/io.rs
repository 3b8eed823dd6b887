//! I/O through the driver and a simulated controller: formats, pieces, limits, queues.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{machine, quick, ram};
use cryptfold_bdev::{Access, Io, Op, Status};
use cryptfold_bdev_nvme::sim::{SimNamespace, SimOptions};
use cryptfold_bdev_nvme::{State, detach, verify};
use cryptfold_bdev_sim::Rng;
use cryptfold_reactor::memory::{Buf, SgList};

/// Random I/O against a model, with buffers of every shape.
fn model(seed: u64, block: u32, options: impl FnOnce(SimOptions) -> SimOptions + 'static) {
    machine(seed, 2, move |m| async move {
        let count = (2 << 20) / u64::from(block);
        ram(&m.registry, "ram", block, count);
        let drive = m.controller(options(SimOptions::new("ram")));
        let controller = m.attach(&drive).await;
        let c = m.open("Nn1");
        let bs = block as usize;
        assert_eq!((c.bdev().block_size_bytes(), c.bdev().blocks()), (block, count));
        let mut rng = Rng::new(seed);
        let mut model = vec![0u8; count as usize * bs];
        for _ in 0..150 {
            let most = if rng.one_in(4) { count / 2 } else { 24 };
            let blocks = 1 + rng.below(most);
            let lba = rng.below(count - blocks + 1);
            let range = lba as usize * bs..(lba + blocks) as usize * bs;
            match rng.below(6) {
                0 | 1 => {
                    let mut data = vec![0; range.len()];
                    rng.fill(&mut data);
                    model[range].copy_from_slice(&data);
                    let pieces = cut(&mut rng, &data);
                    c.write(lba, pieces, rng.one_in(3)).await.unwrap();
                }
                2 => {
                    c.write_zeroes(lba, blocks).await.unwrap();
                    model[range].fill(0);
                }
                3 => {
                    // A destination of pieces.
                    let mut io = Io::new(Op::Read, lba, blocks);
                    io.data = cut(&mut rng, &vec![0xee; range.len()]);
                    let io = c.io(io).await;
                    assert_eq!(io.status(), Status::SUCCESS);
                    assert_eq!(&io.data.clone().to_contiguous()[..], &model[range], "lba {lba} x {blocks}");
                }
                4 => {
                    let mut io = Io::new(Op::Compare, lba, blocks);
                    io.data = cut(&mut rng, &model[range.clone()]);
                    assert_eq!(c.io(io).await.status(), Status::SUCCESS);
                    let mut other = model[range].to_vec();
                    let at = rng.below(other.len() as u64) as usize;
                    other[at] ^= 1;
                    let mut io = Io::new(Op::Compare, lba, blocks);
                    io.data = Buf::from_slice(&other).into();
                    assert_eq!(c.io(io).await.status().sc(), Status::COMPARE_FAILURE.sc());
                }
                _ => {
                    let data = c.read(lba, blocks).await.unwrap();
                    assert_eq!(&data.to_contiguous()[..], &model[range], "lba {lba} x {blocks}");
                }
            }
        }
        c.flush().await.unwrap();
        verify(c.bdev(), 0, count).await.unwrap();
        assert_eq!(drive.offences(), Vec::<String>::new());
        assert_eq!(controller.counters.resets.load(std::sync::atomic::Ordering::Relaxed), 0);
        drop(c);
        detach(&controller, Duration::from_secs(1)).await.unwrap();
        assert_eq!(controller.state(), State::Gone);
        assert!(!drive.is_live());
        assert_eq!(m.registry.list().len(), 1);
    });
}

/// The same bytes in up to six pieces at odd places, some of them outside of the arena's pools.
fn cut(rng: &mut Rng, data: &[u8]) -> SgList {
    let mut list = SgList::new();
    let mut rest = data;
    while !rest.is_empty() {
        let last = list.segments().len() == 5 || rng.one_in(3);
        let unit = if rng.one_in(4) { 1 } else { 512 };
        let n = if last {
            rest.len()
        } else {
            ((1 + rng.below(rest.len() as u64)) as usize).next_multiple_of(unit)
        };
        let (part, after) = rest.split_at(n.min(rest.len()));
        // Often not at the start of a page.
        let skip = [0, 0, 4, 64, 512, 1, 4096][rng.below(7) as usize];
        let mut buf = Buf::alloc(skip + part.len());
        buf.make_mut()[skip..].copy_from_slice(part);
        let len = buf.len();
        let view = buf.slice(skip..len);
        drop(buf);
        list.push(view);
        rest = after;
    }
    list
}

#[test]
fn reads_and_writes_are_what_was_written() {
    for seed in 0..6 {
        model(seed, 4096, |o| o);
        model(seed, 512, |o| o);
        model(seed, 4096, |o| SimOptions { sgl: false, ..o });
        model(seed, 512, |o| SimOptions { sgl: false, mdts: 1, queue_depth: 4, ..o });
        model(seed, 512, |o| SimOptions { shadow: true, stride: 2, ..o });
        model(seed, 4096, |o| SimOptions { mdts: 0, queue_depth: 1024, ..o });
    }
}

#[test]
fn unmap_is_deallocate() {
    use cryptfold_bdev_sim::{DiskOptions, Image, SimDisk};
    machine(1, 1, |m| async move {
        let disk = DiskOptions::new("disk", 1 << 20);
        SimDisk::create(&m.registry, disk, Image::default(), 3).unwrap();
        let drive = m.controller(SimOptions::new("disk"));
        let controller = m.attach(&drive).await;
        let c = m.open("Nn1");
        assert!(c.bdev().info().write_cache);
        c.write(0, SgList::from(Buf::from_slice(&[7; 32768])), true).await.unwrap();
        c.unmap(2, 3).await.unwrap();
        let all = c.read(0, 8).await.unwrap().to_contiguous();
        assert!(all[..8192].iter().all(|b| *b == 7) && all[8192..20480].iter().all(|b| *b == 0));
        assert!(all[20480..].iter().all(|b| *b == 7));
        drop(c);
        detach(&controller, Duration::from_secs(1)).await.unwrap();
        assert_eq!(drive.offences(), Vec::<String>::new());
    });
}

#[test]
fn two_namespaces_of_two_formats() {
    machine(2, 3, |m| async move {
        ram(&m.registry, "a", 512, 256);
        ram(&m.registry, "b", 4096, 256);
        let mut options = SimOptions::new("a");
        options.namespaces.push(SimNamespace { nsid: 7, bdev: "b".into() });
        let drive = m.controller(options);
        let controller = m.attach(&drive).await;
        assert_eq!(controller.devices().into_values().collect::<Vec<_>>(), ["Nn1", "Nn7"]);
        let (a, b) = (m.open("Nn1"), m.open("Nn7"));
        a.write(9, Buf::from_slice(&[1; 512]), false).await.unwrap();
        b.write(9, Buf::from_slice(&[2; 4096]), false).await.unwrap();
        assert_eq!(a.read(9, 1).await.unwrap().to_contiguous()[..], [1; 512]);
        assert_eq!(b.read(9, 1).await.unwrap().to_contiguous()[..], [2; 4096]);
        drop((a, b));
        // One goes, as the controller reports.
        drive.remove_namespace(7);
        cryptfold_reactor::sleep(Duration::from_millis(100)).await;
        assert_eq!(controller.devices().into_values().collect::<Vec<_>>(), ["Nn1"]);
        assert!(m.registry.get("Nn7").is_err());
        detach(&controller, Duration::from_secs(1)).await.unwrap();
    });
}

/// Cores that share one pair: all see the same data, nothing is lost, aborts find their way.
#[test]
fn fewer_pairs_than_cores() {
    for seed in 0..8 {
        machine(seed, 4, move |m| async move {
            ram(&m.registry, "ram", 4096, 512);
            let drive = m.controller(SimOptions { pairs: 2, ..SimOptions::new("ram") });
            let controller = m.attach(&drive).await;
            assert_eq!(controller.pairs(), 2);
            let mut tasks = Vec::new();
            for (n, core) in m.cores.iter().enumerate() {
                let registry = m.registry.clone();
                let core = core.clone();
                let task = async move {
                    core.call(move || async move {
                        let c = registry.open("Nn1", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
                        for round in 0..20u64 {
                            let lba = n as u64 * 100 + round;
                            let data = Buf::from_slice(&[n as u8 * 20 + round as u8; 8192]);
                            c.write(lba, data.clone(), round % 3 == 0).await.unwrap();
                            assert_eq!(c.read(lba, 2).await.unwrap().to_contiguous()[..], data[..]);
                            let mut io = Io::new(Op::Read, lba, 2);
                            io.data = Buf::alloc(8192).into();
                            let io = c.io(io).await;
                            assert_eq!(io.data.clone().to_contiguous()[..], data[..]);
                        }
                        c.flush().await.unwrap();
                    })
                    .await
                };
                tasks.push(cryptfold_reactor::spawn_local(task));
            }
            for task in tasks {
                task.await.unwrap();
            }
            detach(&controller, Duration::from_secs(1)).await.unwrap();
            assert_eq!(drive.offences(), Vec::<String>::new());
        });
    }
}

/// More I/O at once than there are slots.
#[test]
fn a_short_queue_makes_nobody_lose() {
    machine(4, 1, |m| async move {
        ram(&m.registry, "ram", 512, 4096);
        let drive = m.controller(SimOptions { queue_depth: 2, shadow: true, ..SimOptions::new("ram") });
        let controller = m.attach(&drive).await;
        let c = m.open("Nn1");
        let mut waiting = Vec::new();
        for n in 0..200u64 {
            let mut io = Io::new(Op::Write, n, 1);
            io.data = Buf::from_slice(&[n as u8; 512]).into();
            waiting.push(c.io(io));
        }
        for io in waiting {
            assert_eq!(io.await.status(), Status::SUCCESS);
        }
        let all = c.read(0, 200).await.unwrap().to_contiguous();
        assert!(all.chunks(512).enumerate().all(|(n, b)| b.iter().all(|x| *x == n as u8)));
        drop(c);
        detach(&controller, Duration::from_secs(1)).await.unwrap();
        assert_eq!(drive.offences(), Vec::<String>::new());
    });
}

/// Shadow doorbells: registers are written less often than commands are sent.
#[test]
fn shadow_doorbells_spare_registers() {
    let doorbells = |shadow| {
        let count = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let out = count.clone();
        machine(5, 1, move |m| async move {
            ram(&m.registry, "ram", 4096, 512);
            let drive = m.controller(SimOptions { shadow, ..SimOptions::new("ram") });
            let controller = m.attach(&drive).await;
            let c = m.open("Nn1");
            for _ in 0..20 {
                let all: Vec<_> = (0..32).map(|n| c.io(Io::new(Op::Read, n, 1))).collect();
                for io in all {
                    assert!(io.await.status().is_ok());
                }
            }
            out.store(drive.doorbells(), std::sync::atomic::Ordering::Relaxed);
            drop(c);
            detach(&controller, Duration::from_secs(1)).await.unwrap();
        });
        count.load(std::sync::atomic::Ordering::Relaxed)
    };
    let (without, with) = (doorbells(false), doorbells(true));
    assert!(with < without, "{with} writes of doorbells with shadows, {without} without");
}

#[test]
fn health_and_events() {
    machine(6, 1, |m| async move {
        let (drive, controller) = m.usual().await;
        let health = controller.health().await.unwrap();
        assert_eq!(health["temperature_celsius"], 37);
        assert_eq!(health["critical_warning"], 0);
        assert_eq!(health["serial_number"], "SIM0001");
        assert_eq!(health["firmware_slots"][0], "1");
        assert_eq!(drive.events_wanted(), 0x1ff);
        for _ in 0..10 {
            drive.warn(1);
        }
        cryptfold_reactor::sleep(Duration::from_millis(200)).await;
        assert!(
            controller.events().iter().any(|e| e.contains("critical warning 0x01")),
            "{:?}",
            controller.events()
        );
        assert_eq!(controller.counters.events.load(std::sync::atomic::Ordering::Relaxed), 10);
        assert_eq!(controller.health().await.unwrap()["available_spare_percentage"], 3);
        detach(&controller, Duration::from_secs(1)).await.unwrap();
    });
}

#[test]
fn names_that_are_taken_and_devices_in_use() {
    machine(7, 1, |m| async move {
        let (_, controller) = m.usual().await;
        ram(&m.registry, "other", 512, 64);
        let second = m.controller(SimOptions { serial: "S2".into(), ..SimOptions::new("other") });
        let taken = m.try_attach(&second, quick()).await;
        // The namespace's name is taken; the controller comes up without it.
        let second_controller = taken.unwrap();
        assert!(second_controller.devices().is_empty());
        detach(&second_controller, Duration::from_secs(1)).await.unwrap();
        let held = m.open("Nn1");
        let busy = detach(&controller, Duration::from_millis(50)).await;
        assert!(busy.unwrap_err().to_string().contains("not closed"));
        drop(held);
        detach(&controller, Duration::from_secs(1)).await.unwrap();
    });
}
