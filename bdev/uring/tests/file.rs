//! The uring device on a real file and a real ring.

use std::path::Path;
use std::sync::Arc;

use cryptfold_bdev::{Access, Bdev, BdevError, Io, Op, Registry, Status};
use cryptfold_bdev_uring::{UringOptions, create, rescan};
use cryptfold_reactor as reactor;
use reactor::memory::{Buf, SgList};
use reactor::{IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};

fn options(path: &Path) -> UringOptions {
    UringOptions {
        name: "u0".into(),
        filename: path.into(),
        block_size_bytes: Some(4096),
        uuid: None,
        read_only: false,
        unmap: true,
        method: "bdev_uring_create",
    }
}

fn runtime() -> Runtime {
    Runtime::start(RuntimeConfig {
        cores: vec![0],
        policy: IdlePolicy::Interrupt,
        pin: false,
        ring_entries: 64,
        memory: MemoryConfig::default(),
        ..RuntimeConfig::default()
    })
    .expect("a reactor")
}

fn with_file(mib: u64, test: impl AsyncFnOnce(Arc<Registry>, Arc<Bdev>) + Send + 'static) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let path = dir.path().join("disk");
    std::fs::File::create(&path).and_then(|f| f.set_len(mib << 20)).expect("a file");
    let registry = Registry::new();
    let bdev = create(&registry, options(&path)).expect("a device");
    let rt = runtime();
    let r = registry.clone();
    rt.handles()[0].block_on(move || async move { test(r, bdev).await }).expect("the reactor lives");
    rt.stop();
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(2654435761).wrapping_add(seed) >> 7) as u8).collect()
}

#[test]
fn what_is_written_is_read_back_in_any_piecing() {
    with_file(16, async |registry, _| {
        let d = registry.open("u0", Access::ReadWrite, |_| {}).expect("opens");
        let c = d.channel().expect("a channel");
        let all = pattern(1, 256 * 1024);
        // Aligned pieces, then pieces that O_DIRECT can not take.
        for cuts in [&[4096usize, 65536, 200_704][..], &[1, 513, 70_001, 200_000][..]] {
            let mut list = SgList::new();
            let mut from = 0;
            for to in cuts.iter().copied().chain([all.len()]) {
                list.push(Buf::from_slice(&all[from..to]));
                from = to;
            }
            c.write(3, list, true).await.expect("writes");
            let back = c.read(3, 64).await.expect("reads").to_contiguous();
            assert!(back.as_slice() == &all[..], "cut at {cuts:?}");
        }
        // Into buffers of the caller.
        let mut io = Io::new(Op::Read, 3, 64);
        io.data = [Buf::alloc(100_000), Buf::alloc(162_144)].into_iter().collect();
        let io = c.io(io).await;
        assert_eq!(io.status(), Status::SUCCESS);
        assert!(io.data.clone().to_contiguous().as_slice() == &all[..]);
        io.recycle();
    });
}

#[test]
fn zeroes_unmap_flush_and_emulated_operations() {
    with_file(4, async |registry, _| {
        let d = registry.open("u0", Access::ReadWrite, |_| {}).expect("opens");
        let c = d.channel().expect("a channel");
        let one = Buf::from_slice(&pattern(7, 8 * 4096));
        c.write(0, one.clone(), false).await.expect("writes");
        c.write_zeroes(1, 2).await.expect("zeroes");
        c.unmap(5, 1).await.expect("unmaps");
        c.flush().await.expect("flushes");
        let back = c.read(0, 8).await.expect("reads").to_contiguous();
        for block in 0..8 {
            let bytes = &back[block * 4096..][..4096];
            if matches!(block, 1 | 2 | 5) {
                assert!(bytes.iter().all(|b| *b == 0), "block {block}");
            } else {
                assert!(*bytes == one[block * 4096..][..4096], "block {block}");
            }
        }
        let mut io = Io::new(Op::CompareAndWrite, 0, 1);
        io.compare = one.slice(0..4096).into();
        io.data = one.slice(4096..8192).into();
        let io = c.io(io).await;
        assert_eq!(io.status(), Status::SUCCESS);
        io.recycle();
        let mut io = Io::new(Op::Compare, 0, 1);
        io.data = one.slice(0..4096).into();
        let io = c.io(io).await;
        assert_eq!(io.status(), Status::COMPARE_FAILURE);
        io.recycle();
        let mut io = Io::new(Op::Copy, 100, 1);
        io.src_lba = 7;
        let io = c.io(io).await;
        assert_eq!(io.status(), Status::SUCCESS);
        io.recycle();
        let copied = c.read(100, 1).await.expect("reads").to_contiguous();
        assert!(copied[..] == one[7 * 4096..]);
        assert_eq!(c.read(1023, 2).await.err(), Some(Status::LBA_OUT_OF_RANGE));
    });
}

#[test]
fn more_operations_than_slots_all_come_back() {
    with_file(16, async |registry, _| {
        let d = registry.open("u0", Access::ReadWrite, |_| {}).expect("opens");
        let c = d.channel().expect("a channel");
        let tasks: Vec<_> = (0..1000u64)
            .map(|i| {
                let c = c.clone();
                reactor::spawn_local(async move {
                    c.write(i, Buf::from_slice(&pattern(i, 4096)), false).await.expect("writes");
                })
            })
            .collect();
        for t in tasks {
            t.await;
        }
        for i in 0..1000 {
            let back = c.read(i, 1).await.expect("reads").to_contiguous();
            assert!(back[..] == pattern(i, 4096)[..], "block {i}");
        }
    });
}

#[test]
fn refusals_name_the_file_and_the_way_out() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    let registry = Registry::new();
    let e = create(&registry, options(&path)).err().expect("no file");
    assert_eq!(e.code(), -2);
    assert!(e.to_string().contains(path.to_str().expect("utf-8")), "{e}");
    std::fs::write(&path, [0; 100]).expect("a file");
    let e = create(&registry, options(&path)).err().expect("too small");
    assert!(e.to_string().contains("truncate -s"), "{e}");
    std::fs::File::options().write(true).open(&path).and_then(|f| f.set_len(1 << 20)).expect("grows");
    create(&registry, options(&path)).expect("opens");
    let other = Registry::new();
    assert!(
        matches!(create(&other, options(&path)), Err(BdevError::Claimed { .. })),
        "two users of one file"
    );
    std::fs::File::options().write(true).open(&path).and_then(|f| f.set_len(2 << 20)).expect("grows");
    rescan(&registry, "u0").expect("rescans");
    assert_eq!(registry.get("u0").expect("there").blocks(), 512);
    assert!(registry.unregister("u0").expect("goes").is_done());
    create(&other, options(&path)).expect("free again");
}

#[test]
fn a_lock_that_is_about_to_go_is_awaited() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let path = dir.path().join("disk");
    let holder = std::fs::File::create(&path).expect("a file");
    holder.set_len(1 << 20).and_then(|()| holder.lock()).expect("locked");
    let (begin, held) = (std::time::Instant::now(), std::time::Duration::from_millis(200));
    let later = std::thread::spawn(move || {
        std::thread::sleep(held);
        drop(holder);
    });
    create(&Registry::new(), options(&path)).expect("free after a while");
    assert!(begin.elapsed() >= held, "the lock was respected");
    later.join().expect("ends");
}
