//! The small devices, one by one.

use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, BdevError, Channel, Io, Op, Registry, Status};
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_bdev_sim::Rng;
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reactor::{Sim, now, spawn_local, yield_now};

fn ram(registry: &Arc<Registry>, name: &str, block: u32, blocks: u64) {
    let options = MallocOptions {
        name: name.into(),
        num_blocks: blocks,
        block_size_bytes: block,
        uuid: None,
        optimal_io_boundary: 0,
    };
    cryptfold_bdev_malloc::create(registry, options).unwrap();
}

fn open(registry: &Registry, name: &str) -> Channel {
    registry.open(name, Access::ReadWrite, |_| ()).unwrap().channel().unwrap()
}

fn run<Fut: Future<Output = ()> + 'static>(test: impl FnOnce(Arc<Registry>) -> Fut + 'static) {
    Sim::new(21).cores(2).run(move || test(Registry::new()));
}

#[test]
fn a_lent_page_never_changes_under_its_reader() {
    // Parts of pages, and many whole ones at once.
    lent_pages(512, 64, 20);
    lent_pages(4096, 48, 40);
}

fn lent_pages(block: usize, count: u64, most: u64) {
    run(move |registry| async move {
        ram(&registry, "m", block as u32, count);
        let c = open(&registry, "m");
        let mut rng = Rng::new(4);
        let mut model = vec![0u8; count as usize * block];
        let mut lent: Vec<(SgList, Vec<u8>)> = Vec::new();
        for _ in 0..2000 {
            let blocks = 1 + rng.below(most);
            let lba = rng.below(count - blocks + 1);
            let range = lba as usize * block..(lba + blocks) as usize * block;
            match rng.below(4) {
                0 => {
                    let data = c.read(lba, blocks).await.unwrap();
                    lent.push((data, model[range].to_vec()));
                    if lent.len() > 30 {
                        lent.swap_remove(rng.below(30) as usize);
                    }
                }
                1 => {
                    c.write_zeroes(lba, blocks).await.unwrap();
                    model[range].fill(0);
                }
                _ => {
                    // Whole buffers, and slices that somebody else holds too.
                    let mut buf = Buf::alloc(range.len() + block);
                    rng.fill(buf.make_mut());
                    let kept = rng.one_in(2).then(|| buf.clone());
                    let piece = buf.slice(block..range.len() + block);
                    drop(buf);
                    model[range].copy_from_slice(&piece);
                    c.write(lba, piece, false).await.unwrap();
                    drop(kept);
                }
            }
            for (data, expected) in &lent {
                assert_eq!(&data.clone().to_contiguous()[..], &expected[..]);
            }
        }
        let mut all = vec![0; model.len()];
        c.read(0, count).await.unwrap().copy_to_slice(&mut all);
        assert!(all == model);
    });
}

#[test]
fn a_written_buffer_that_the_writer_keeps_stays_the_writers() {
    run(|registry| async move {
        ram(&registry, "m", 4096, 4);
        let c = open(&registry, "m");
        let mut mine = Buf::from_slice(&[1; 4096]);
        c.write(0, mine.clone(), false).await.unwrap();
        mine.make_mut().fill(2);
        assert_eq!(c.read(0, 1).await.unwrap().to_contiguous()[..], [1; 4096]);
        // Handed over for good: taken as it is.
        let given = Buf::from_slice(&[3; 4096]);
        let address = given.as_ptr();
        c.write(1, given, false).await.unwrap();
        assert_eq!(c.read(1, 1).await.unwrap().to_contiguous().as_ptr(), address);
    });
}

#[test]
fn malloc_compares_and_refuses_what_does_not_fit() {
    run(|registry| async move {
        ram(&registry, "m", 512, 64);
        let c = open(&registry, "m");
        c.write(3, Buf::from_slice(&[5; 1024]), false).await.unwrap();
        let mut io = Io::new(Op::Compare, 3, 2);
        io.data = Buf::from_slice(&[5; 1024]).into();
        assert!(c.io(io).await.status().is_ok());
        let mut io = Io::new(Op::Compare, 2, 2);
        io.data = Buf::from_slice(&[5; 1024]).into();
        assert_eq!(c.io(io).await.status(), Status::COMPARE_FAILURE);
        for (num_blocks, block) in [(0, 512), (u64::MAX, 4096), (1 << 50, 512), (8, 100)] {
            let options = MallocOptions {
                name: "x".into(),
                num_blocks,
                block_size_bytes: block,
                uuid: None,
                optimal_io_boundary: 0,
            };
            assert!(cryptfold_bdev_malloc::create(&registry, options).is_err(), "{num_blocks} x {block}");
        }
    });
}

#[test]
fn null_takes_everything_and_gives_zeros() {
    run(|registry| async move {
        let options = cryptfold_bdev_null::NullOptions {
            name: "n".into(),
            num_blocks: 1 << 30,
            block_size_bytes: 512,
            uuid: None,
        };
        cryptfold_bdev_null::create(&registry, options).unwrap();
        let c = open(&registry, "n");
        c.write(1 << 29, Buf::from_slice(&[1; 4096]), true).await.unwrap();
        let data = c.read(1 << 29, 8).await.unwrap();
        assert!(data.len_bytes() == 4096 && data.is_zero());
        let mut io = Io::new(Op::Read, 0, 2);
        io.data = Buf::from_slice(&[9; 1024]).into();
        let io = c.io(io).await;
        assert!(io.status().is_ok() && io.data.len_bytes() == 1024);
        c.flush().await.unwrap();
    });
}

#[test]
fn split_parts_do_not_overlap() {
    run(|registry| async move {
        ram(&registry, "m", 512, 100);
        let parts = cryptfold_bdev_split::create(
            &registry,
            cryptfold_bdev_split::SplitOptions { base_bdev: "m".into(), split_count: 3, split_size_mb: None },
        );
        let parts = parts.unwrap();
        assert_eq!(parts.len(), 3);
        let channels: Vec<_> = parts.iter().map(|p| open(&registry, p.name())).collect();
        let blocks = parts[0].blocks();
        assert_eq!(blocks, 33);
        for (n, c) in channels.iter().enumerate() {
            let data = vec![n as u8 + 1; blocks as usize * 512];
            c.write(0, Buf::from_slice(&data), false).await.unwrap();
            assert_eq!(c.read(blocks, 1).await.err(), Some(Status::LBA_OUT_OF_RANGE));
        }
        for (n, c) in channels.iter().enumerate() {
            let data = c.read(0, blocks).await.unwrap().to_contiguous();
            assert!(data.iter().all(|b| *b == n as u8 + 1));
        }
        assert!(matches!(
            registry.open("m", Access::ReadWrite, |_| ()).map(drop),
            Err(BdevError::Claimed { .. })
        ));
    });
}

#[test]
fn delay_delays() {
    run(|registry| async move {
        ram(&registry, "m", 4096, 16);
        let options = cryptfold_bdev_delay::DelayOptions {
            name: "d".into(),
            base_bdev_name: "m".into(),
            uuid: None,
            latencies_us: [100, 5_000, 300, 9_000],
        };
        cryptfold_bdev_delay::create(&registry, options).unwrap();
        let c = open(&registry, "d");
        let (mut rare, mut total) = (0, Duration::ZERO);
        for _ in 0..2000 {
            let start = now();
            c.read(0, 1).await.unwrap();
            let took = now() - start;
            assert!(took >= Duration::from_micros(100));
            rare += u32::from(took >= Duration::from_micros(5_000));
            total += took;
        }
        assert!((5..60).contains(&rare), "{rare} of 2000 are as slow as one in a hundred");
        assert!(total < Duration::from_millis(700));
        let start = now();
        c.write(0, Buf::from_slice(&[1; 4096]), false).await.unwrap();
        assert!(now() - start >= Duration::from_micros(300));

        for which in [cryptfold_bdev_delay::Latency::AvgRead, cryptfold_bdev_delay::Latency::P99Read] {
            cryptfold_bdev_delay::update_latency(&registry, "d", which, 3_000_000).unwrap();
        }
        for with_base in [false, true] {
            let slow = spawn_local({
                let c = c.clone();
                let mut io = Io::new(Op::Read, 0, 1);
                io.tag = 9;
                async move { c.io(io).await.status() }
            });
            while c.outstanding() == 0 {
                yield_now().await;
            }
            if !with_base {
                cryptfold_reactor::sleep(Duration::from_millis(20)).await;
            }
            let start = now();
            assert!(c.abort(9), "held I/O can be aborted, at its base too: {with_base}");
            assert_eq!(slow.await, Status::ABORTED_BY_REQUEST);
            assert!(now() - start < Duration::from_millis(1));
            assert!(!c.abort(9));
        }
        let bad =
            cryptfold_bdev_delay::update_latency(&registry, "m", cryptfold_bdev_delay::Latency::AvgRead, 1);
        assert!(matches!(bad, Err(BdevError::Invalid(_))));
    });
}

#[test]
fn errors_are_injected() {
    use cryptfold_bdev_error::{ErrorOptions, Injection, Kind, inject};
    run(|registry| async move {
        ram(&registry, "m", 4096, 16);
        cryptfold_bdev_error::create(&registry, ErrorOptions { base_name: "m".into(), uuid: None }).unwrap();
        let c = open(&registry, "EE_m");
        let arm = |op, kind, num| {
            let injection = Injection { op, kind, num, corrupt_offset_bytes: 5000, corrupt_value: 0x0f };
            inject(&registry, "EE_m", injection).unwrap();
        };
        c.write(0, Buf::from_slice(&[1; 8192]), false).await.unwrap();
        arm(Some(Op::Read), Kind::Failure, 2);
        assert_eq!(c.read(0, 1).await.err(), Some(Status::INTERNAL_ERROR));
        assert!(c.write(4, Buf::from_slice(&[1; 4096]), false).await.is_ok());
        assert_eq!(c.read(0, 1).await.err(), Some(Status::INTERNAL_ERROR));
        assert!(c.read(0, 1).await.is_ok());

        arm(Some(Op::Read), Kind::CorruptData, 1);
        let data = c.read(0, 2).await.unwrap().to_contiguous();
        assert_eq!((data[4999], data[5000], data[5001]), (1, 0x0e, 1));
        let data = c.read(0, 2).await.unwrap().to_contiguous();
        assert_eq!(data[5000], 1, "the base's own data is as it was");
        arm(Some(Op::Write), Kind::CorruptData, 1);
        let mine = Buf::from_slice(&[2; 8192]);
        c.write(0, mine.clone(), false).await.unwrap();
        assert_eq!(mine[5000], 2, "nor is the writer's");
        assert_eq!(c.read(0, 2).await.unwrap().to_contiguous()[5000], 0x0d);

        arm(None, Kind::Status(Status::CAPACITY_EXCEEDED), 1);
        assert_eq!(c.flush().await, Err(Status::CAPACITY_EXCEEDED));
        arm(Some(Op::Write), Kind::NoMemory, 100);
        assert_eq!(c.write(0, mine.clone(), false).await, Err(Status::COMMAND_INTERRUPTED));
        arm(Some(Op::Write), Kind::NoMemory, 0);
        assert!(c.write(0, mine, false).await.is_ok());

        arm(Some(Op::Read), Kind::Pending, 1);
        let pending = spawn_local({
            let c = c.clone();
            async move { c.read(0, 1).await.err() }
        });
        cryptfold_reactor::sleep(Duration::from_secs(10)).await;
        assert!(!pending.is_finished());
        assert!(c.io(Io::new(Op::Reset, 0, 0)).await.status().is_ok());
        assert_eq!(pending.await, Some(Status::ABORTED_BY_REQUEST));
    });
}

#[test]
fn aliases_and_write_protection_change_while_a_device_is_open() {
    run(|registry| async move {
        ram(&registry, "m", 512, 8);
        ram(&registry, "n", 512, 8);
        registry.set_aliases("m", vec!["pool/old".into()]).unwrap();
        let c = open(&registry, "pool/old");
        let taken = registry.set_aliases("n", vec!["free".into(), "pool/old".into()]);
        assert!(matches!(taken, Err(BdevError::Exists(name)) if name == "pool/old"));
        assert!(registry.get("free").is_err(), "nothing changes then");
        registry.set_aliases("pool/old", vec!["pool/new".into()]).unwrap();
        assert!(registry.get("pool/old").is_err());
        let bdev = registry.get("pool/new").unwrap();
        assert_eq!((bdev.name(), bdev.aliases()), ("m", vec!["pool/new".to_owned()]));
        c.write(0, Buf::from_slice(&[1; 512]), false).await.unwrap();
        bdev.set_read_only(true);
        let refused = c.write(0, Buf::from_slice(&[2; 512]), false).await;
        assert_eq!(refused.unwrap_err(), Status::NAMESPACE_WRITE_PROTECTED);
        assert_eq!(c.read(0, 1).await.unwrap().to_contiguous()[0], 1);
        drop((c, bdev));
        let _gone = registry.unregister("m").unwrap();
        assert!(registry.get("pool/new").is_err());
    });
}
