//! Each row of the life-cycle table, and the races between them, driven by a simulated controller that fails as it is told.

mod common;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use common::{Machine, machine, quick, ram};
use cryptfold_bdev::{Access, Channel, Io, Op, Status};
use cryptfold_bdev_nvme::sim::{Fault, SimController, SimOptions};
use cryptfold_bdev_nvme::{Controller, NvmeError, Options, State, detach};
use cryptfold_bdev_sim::Rng;
use cryptfold_nvmf_spec::Status as Wire;
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{now, sleep};

const SEEDS: u64 = 12;

async fn write(c: &Channel, lba: u64, byte: u8) -> Result<(), Status> {
    c.write(lba, Buf::from_slice(&[byte; 4096]), false).await
}

async fn holds(c: &Channel, lba: u64, byte: u8) -> bool {
    c.read(lba, 1).await.unwrap().to_contiguous().iter().all(|b| *b == byte)
}

async fn until(what: &str, mut f: impl FnMut() -> bool) {
    let end = now() + Duration::from_secs(60);
    while !f() {
        assert!(now() < end, "{what}");
        sleep(Duration::from_millis(1)).await;
    }
}

async fn put_away(controller: &Arc<Controller>, drive: &SimController) {
    detach(controller, Duration::from_secs(5)).await.unwrap();
    assert_eq!(controller.state(), State::Gone);
    assert!(!drive.is_live());
    assert_eq!(drive.offences(), Vec::<String>::new());
}

/// Attaching -> Detaching -> Gone.
#[test]
fn a_controller_that_does_not_come_up() {
    type Check = fn(&NvmeError) -> bool;
    let rows: [(Fault, Check); 4] = [
        (Fault::NeverReady, |e| matches!(e, NvmeError::Never { what: "ready", .. })),
        (Fault::FatalWhenEnabled, |e| matches!(e, NvmeError::Fatal)),
        (Fault::Remove, |e| matches!(e, NvmeError::Vanished)),
        (Fault::Stuck, |e| matches!(e, NvmeError::Admin(_))),
    ];
    for (fault, check) in rows {
        for seed in 0..SEEDS {
            machine(seed, 2, move |m| async move {
                ram(&m.registry, "ram", 4096, 64);
                let drive = m.controller(SimOptions::new("ram"));
                drive.inject(fault, 1);
                let begin = now();
                let error = m.try_attach(&drive, quick()).await.err().unwrap();
                assert!(check(&error), "{fault:?}: {error}");
                // Bounded: CAP.TO is 2 s here, waited for to come up and to go down.
                assert!(now() - begin < Duration::from_secs(7), "{fault:?} took {:?}", now() - begin);
                assert!(!drive.is_live() && m.registry.list().len() == 1);
            });
        }
    }
}

/// Ready -> Resetting -> Ready: everything that needs a reset, under I/O, which goes on as if nothing had happened.
#[test]
fn what_a_reset_mends() {
    let faults = [
        Fault::Fatal,
        Fault::Stuck,
        Fault::Lose,
        Fault::WrongCid,
        Fault::Duplicate,
        Fault::Late(Duration::from_secs(5)),
    ];
    for fault in faults {
        for seed in 0..SEEDS {
            machine(seed, 2, move |m| async move {
                let (drive, controller) = m.usual().await;
                let c = m.open("Nn1");
                let load = load(&m, 60, seed);
                sleep(Duration::from_micros(100 + seed * 37)).await;
                drive.inject(fault, 3);
                assert_eq!(load.await, Vec::<String>::new(), "{fault:?}");
                until("a reset", || controller.counters.resets.load(Relaxed) > 0).await;
                until("ready", || controller.state() == State::Ready).await;
                write(&c, 1, 9).await.unwrap();
                assert!(holds(&c, 1, 9).await);
                drop(c);
                put_away(&controller, &drive).await;
            });
        }
    }
}

/// A task per core that writes and reads its own blocks; returns what went wrong.
fn load(m: &Rc<Machine>, rounds: u64, seed: u64) -> impl Future<Output = Vec<String>> + use<> {
    let tasks: Vec<_> = m
        .cores
        .iter()
        .enumerate()
        .map(|(n, core)| {
            let (registry, core) = (m.registry.clone(), core.clone());
            cryptfold_reactor::spawn_local(async move {
                core.call(move || async move {
                    let c = registry.open("Nn1", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
                    let (mut rng, mut wrong) = (Rng::new(seed * 10 + n as u64), Vec::new());
                    for round in 0..rounds {
                        let lba = 100 + n as u64 * 300 + rng.below(250);
                        let byte = (round % 251) as u8 + 1;
                        match write(&c, lba, byte).await {
                            Ok(()) => match c.read(lba, 1).await {
                                Ok(d) if d.clone().to_contiguous().iter().all(|b| *b == byte) => {}
                                Ok(_) => wrong.push(format!("block {lba} is not {byte}")),
                                Err(e) => wrong.push(format!("read {lba}: {e}")),
                            },
                            Err(e) => wrong.push(format!("write {lba}: {e}")),
                        }
                    }
                    wrong
                })
                .await
                .unwrap()
            })
        })
        .collect();
    async move {
        let mut wrong = Vec::new();
        for t in tasks {
            wrong.extend(t.await);
        }
        wrong
    }
}

/// Memory that a drive does not see yet: what lies there waits until it does, is refused when it can not, and ends with the drive.
#[test]
fn memory_that_is_being_shown() {
    for seed in 0..SEEDS {
        machine(seed, 1, |m| async move {
            ram(&m.registry, "ram", 4096, 1024);
            let mut options = SimOptions::new("ram");
            options.map_time = Duration::from_secs(2);
            let drive = m.controller(options);
            let controller = m.attach(&drive).await;
            drive.inject(Fault::Unmappable, 1);
            let c = m.open("Nn1");
            let begin = now();
            assert_eq!(write(&c, 1, 1).await, Err(Status::INTERNAL_ERROR));
            assert!(now() - begin >= Duration::from_secs(2) && drive.commands() == 0);
            drive.heal();
            // A reset in the meantime, which is no concern of it.
            let (a, b) = (c.clone(), c.clone());
            let first = cryptfold_reactor::spawn_local(async move { write(&a, 1, 2).await });
            let second = cryptfold_reactor::spawn_local(async move { write(&b, 2, 3).await });
            sleep(Duration::from_millis(10)).await;
            controller.reset().await.unwrap();
            assert_eq!((first.await, second.await), (Ok(()), Ok(())));
            assert!(holds(&c, 1, 2).await && holds(&c, 2, 3).await);
            drop(c);
            put_away(&controller, &drive).await;
        });
        machine(seed, 1, |m| async move {
            ram(&m.registry, "ram", 4096, 1024);
            let mut options = SimOptions::new("ram");
            options.map_time = Duration::from_secs(100);
            let drive = m.controller(options);
            let controller = m.attach(&drive).await;
            let (c, begin) = (m.open("Nn1"), now());
            let waits = cryptfold_reactor::spawn_local(async move { write(&c, 1, 1).await });
            sleep(Duration::from_millis(10)).await;
            drive.inject(Fault::Remove, 1);
            assert_eq!(waits.await, Err(Status::INVALID_NAMESPACE.do_not_retry()));
            assert!(now() - begin < Duration::from_secs(50), "with the drive, not with the memory");
            until("the drive is gone", || controller.state() == State::Gone).await;
        });
    }
}

/// A command that takes too long is aborted and sent again, without a reset.
#[test]
fn an_abort_that_helps() {
    for fault in [Fault::Drop, Fault::Slow(Duration::from_secs(9))] {
        for seed in 0..SEEDS {
            machine(seed, 2, move |m| async move {
                let (drive, controller) = m.usual().await;
                let c = m.open("Nn1");
                drive.inject(fault, 1);
                let begin = now();
                write(&c, 5, 3).await.unwrap();
                assert!(holds(&c, 5, 3).await);
                assert!(now() - begin < Duration::from_millis(400), "{:?}", now() - begin);
                let n = &controller.counters;
                assert_eq!(
                    (n.timeouts.load(Relaxed), n.aborts.load(Relaxed), n.resets.load(Relaxed)),
                    (1, 1, 0)
                );
                drop(c);
                put_away(&controller, &drive).await;
            });
        }
    }
}

/// The completion comes while the Abort is under way: no reset, once ended.
#[test]
fn a_completion_that_overtakes_its_abort() {
    for seed in 0..SEEDS {
        machine(seed, 1, move |m| async move {
            let (drive, controller) = m.usual().await;
            let c = m.open("Nn1");
            drive.inject(Fault::Late(Duration::from_millis(200 + seed * 10)), 1);
            write(&c, 5, 3).await.unwrap();
            assert!(holds(&c, 5, 3).await);
            assert_eq!(controller.counters.resets.load(Relaxed), 0);
            drop(c);
            put_away(&controller, &drive).await;
        });
    }
}

/// A command that always takes too long ends with an error after its retries.
#[test]
fn retries_are_bounded() {
    machine(1, 1, |m| async move {
        let (drive, controller) = m.usual().await;
        let c = m.open("Nn1");
        (0..4).for_each(|_| drive.inject(Fault::Drop, 1));
        let begin = now();
        assert_eq!(write(&c, 5, 3).await, Err(Status::ABORTED_BY_REQUEST));
        assert!(now() - begin < Duration::from_millis(4 * 350));
        (0..9).for_each(|_| drive.inject(Fault::Lose, 1));
        assert_eq!(write(&c, 5, 3).await, Err(Status::INTERNAL_ERROR));
        assert_eq!(controller.counters.resets.load(Relaxed), 4);
        drop(c);
        put_away(&controller, &drive).await;
    });
}

/// Errors are the I/O's own and reach it unchanged.
#[test]
fn errors_pass_through() {
    machine(1, 1, |m| async move {
        let (drive, controller) = m.usual().await;
        let c = m.open("Nn1");
        for wire in [Wire::INTERNAL_ERROR, Wire::NAMESPACE_WRITE_PROTECTED.with_dnr(), Wire::LBA_OUT_OF_RANGE]
        {
            drive.inject(Fault::Fails(wire), 1);
            let got = write(&c, 5, 3).await.unwrap_err();
            assert_eq!((got.sc(), got.dnr()), (wire.sc(), wire.dnr()));
        }
        // One part of a large I/O: the whole fails, once.
        drive.inject(Fault::Fails(Wire::INTERNAL_ERROR), 2);
        let mut io = Io::new(Op::Read, 0, 200);
        io.data = Buf::alloc(200 * 4096).into();
        let io = c.io(io).await;
        assert_eq!((io.status(), io.data.len_bytes()), (Status::INTERNAL_ERROR, 200 * 4096));
        assert_eq!(controller.counters.resets.load(Relaxed), 0);
        drop(c);
        put_away(&controller, &drive).await;
    });
}

/// Ready -> Resetting -> Failed -> Resetting -> Ready.
#[test]
fn a_reset_that_fails_and_one_that_mends_it() {
    for fault in [Fault::NeverReady, Fault::NeverDisabled, Fault::FatalWhenEnabled] {
        for seed in 0..SEEDS {
            machine(seed, 2, move |m| async move {
                let (drive, controller) = m.usual().await;
                let c = m.open("Nn1");
                write(&c, 7, 1).await.unwrap();
                drive.inject(fault, 1);
                drive.inject(Fault::Lose, 1);
                let begin = now();
                assert_eq!(write(&c, 7, 2).await, Err(Status::INTERNAL_ERROR));
                assert!(now() - begin < Duration::from_secs(8), "{fault:?}: {:?}", now() - begin);
                until("failed", || controller.state() == State::Failed).await;
                assert_eq!(controller.counters.failed_resets.load(Relaxed), 1);
                // At once from now on.
                let begin = now();
                assert_eq!(write(&c, 7, 2).await, Err(Status::INTERNAL_ERROR));
                assert!(now() - begin < Duration::from_millis(1));
                drive.heal();
                controller.reset().await.unwrap();
                assert_eq!(controller.state(), State::Ready);
                write(&c, 8, 4).await.unwrap();
                assert!(holds(&c, 8, 4).await);
                drop(c);
                put_away(&controller, &drive).await;
            });
        }
    }
}

/// Ready, Resetting, Failed -> Removed -> Detaching -> Gone: all outstanding I/O ends, nothing is touched any more.
#[test]
fn hot_remove() {
    for seed in 0..SEEDS * 3 {
        machine(seed, 3, move |m| async move {
            ram(&m.registry, "ram", 4096, 1024);
            let slow = Duration::from_micros(10)..Duration::from_millis(3);
            let drive = m.controller(SimOptions { pairs: 2, latency: slow, ..SimOptions::new("ram") });
            let controller = m.attach(&drive).await;
            let gone = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let opened = Arc::new(std::sync::atomic::AtomicU64::new(0));
            let mut tasks = Vec::new();
            for core in &m.cores {
                let (registry, gone, opened) = (m.registry.clone(), gone.clone(), opened.clone());
                let core = core.clone();
                let task = async move {
                    core.call(move || async move {
                        let c = registry.open("Nn1", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
                        let all: Vec<_> =
                            (0..40).map(|n| c.io(Io::new(Op::Read, n * 9, 1 + n % 9))).collect();
                        opened.fetch_add(1, Relaxed);
                        let mut ended = 0;
                        for io in all {
                            let status = io.await.status();
                            let expected = Status::INVALID_NAMESPACE.do_not_retry();
                            assert!(status.is_ok() || status == expected, "{status}");
                            ended += u32::from(!status.is_ok());
                        }
                        // A new one too.
                        while !gone.load(Relaxed) {
                            sleep(Duration::from_millis(5)).await;
                        }
                        assert!(c.read(0, 1).await.is_err());
                        ended
                    })
                    .await
                };
                tasks.push(cryptfold_reactor::spawn_local(task));
            }
            until("opened", || opened.load(Relaxed) == 3).await;
            let when = match seed % 3 {
                // While it is reset, too.
                0 => {
                    sleep(Duration::from_micros(seed * 70)).await;
                    let reset = controller.clone();
                    cryptfold_reactor::spawn_local(async move { drop(reset.reset().await) }).detach();
                    Duration::from_micros(seed * 200)
                }
                _ => Duration::from_micros(seed * 60),
            };
            sleep(when).await;
            drive.inject(Fault::Remove, 1);
            until("removed", || matches!(controller.state(), State::Removed | State::Gone)).await;
            until("device gone", || {
                m.registry.get("Nn1").is_err() || m.registry.get("Nn1").unwrap().is_removing()
            })
            .await;
            gone.store(true, Relaxed);
            for t in tasks {
                t.await.unwrap();
            }
            until("gone", || controller.state() == State::Gone).await;
            assert!(m.registry.get("Nn1").is_err());
            assert_eq!(drive.offences(), Vec::<String>::new());
        });
    }
}

/// Commands that were never answered kept their slots for ever: after 31 of them nothing could be asked any more, and whoever
/// asked waited without limit.
#[test]
fn admin_commands_without_answer() {
    machine(3, 2, |m| async move {
        let (drive, controller) = m.usual().await;
        drive.inject(Fault::Stuck, 1);
        let begin = now();
        let asked: Vec<_> = (0..40)
            .map(|_| {
                let controller = controller.clone();
                cryptfold_reactor::spawn_local(async move { controller.health().await.is_err() })
            })
            .collect();
        for one in asked {
            assert!(one.await);
        }
        assert!(now() - begin < quick().admin_timeout * 2, "{:?}", now() - begin);
        until("reset", || controller.counters.resets.load(Relaxed) == 1).await;
        until("ready", || controller.state() == State::Ready).await;
        assert!(controller.events().iter().any(|e| e.contains("no answer to the admin command")));
        controller.health().await.unwrap();
        put_away(&controller, &drive).await;
    });
}

/// A second detach tore the controller down under whoever still had its devices open.
#[test]
fn devices_that_stay_open_hold_a_detach_up_each_time() {
    machine(4, 2, |m| async move {
        let (drive, controller) = m.usual().await;
        let c = m.open("Nn1");
        for _ in 0..2 {
            let refused = detach(&controller, Duration::from_millis(50)).await;
            assert!(matches!(refused, Err(NvmeError::Busy(_))), "{refused:?}");
            assert_eq!(controller.state(), State::Ready);
        }
        let last = cryptfold_reactor::spawn_local({
            let controller = controller.clone();
            async move { detach(&controller, Duration::from_secs(5)).await }
        });
        // A reset meanwhile is waited for.
        controller.reset().await.unwrap();
        drop(c);
        last.await.unwrap();
        assert_eq!(controller.state(), State::Gone);
        assert!(!drive.is_live() && drive.offences().is_empty());
    });
}

/// Resets at random times, by several, under I/O, with and without shadow doorbells and shared pairs.
#[test]
fn resets_under_load() {
    for seed in 0..SEEDS {
        machine(seed, 3, move |m| async move {
            ram(&m.registry, "ram", 4096, 1024);
            let options =
                SimOptions { pairs: 1 + seed as u16 % 3, shadow: seed % 2 == 0, ..SimOptions::new("ram") };
            let drive = m.controller(options);
            let controller = m.attach(&drive).await;
            let load = load(&m, 80, seed);
            let mut rng = Rng::new(seed);
            for _ in 0..3 {
                sleep(Duration::from_micros(rng.below(3000))).await;
                let other = controller.clone();
                let both = cryptfold_reactor::spawn_local(async move { other.reset().await.is_ok() });
                controller.reset().await.unwrap();
                assert!(both.await);
            }
            assert_eq!(load.await, Vec::<String>::new());
            assert!(controller.counters.resets.load(Relaxed) >= 3);
            put_away(&controller, &drive).await;
        });
    }
}

/// One drive's trouble is not another's.
#[test]
fn other_drives_are_unaffected() {
    machine(3, 2, |m| async move {
        let (bad, controller) = m.usual().await;
        ram(&m.registry, "ram2", 4096, 64);
        let good = m.controller(SimOptions { serial: "S2".into(), ..SimOptions::new("ram2") });
        let second = cryptfold_bdev_nvme::attach(
            good.clone(),
            "G".into(),
            m.registry.clone(),
            m.cores.clone(),
            Options::default(),
        );
        let second = second.await.unwrap();
        let (b, g) = (m.open("Nn1"), m.open("Gn1"));
        bad.inject(Fault::Stuck, 1);
        let stuck = b.io(Io::new(Op::Read, 0, 1));
        for n in 0..50 {
            let begin = now();
            write(&g, n, 1).await.unwrap();
            assert!(now() - begin < Duration::from_millis(2));
        }
        assert!(stuck.await.status().is_ok());
        drop((b, g));
        put_away(&controller, &bad).await;
        put_away(&second, &good).await;
    });
}

/// An I/O that asks for a reset ends when it is over.
#[test]
fn the_reset_operation() {
    machine(3, 2, |m| async move {
        let (drive, controller) = m.usual().await;
        let c = m.open("Nn1");
        assert!(c.io(Io::new(Op::Reset, 0, 0)).await.status().is_ok());
        assert_eq!(controller.counters.resets.load(Relaxed), 1);
        write(&c, 0, 1).await.unwrap();
        drop(c);
        put_away(&controller, &drive).await;
    });
}
