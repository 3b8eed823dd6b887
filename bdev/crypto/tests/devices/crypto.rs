//! The crypto device against SPDK's numbering, written slowly.

use std::sync::Arc;

use cryptfold_bdev::{Access, Bdev, BdevError, BlockRange, Io, Op, Registry, Status};
use cryptfold_bdev_crypto::KeyRef;
use cryptfold_bdev_crypto::crypto::{CryptoOptions, create};
use cryptfold_reactor::memory::{Buf, SgList};

use crate::common::*;

fn crypto(registry: &Arc<Registry>, base: &str, key_bytes: usize) -> Result<Arc<Bdev>, BdevError> {
    let options = CryptoOptions {
        name: "c0".into(),
        base_bdev_name: base.into(),
        key: key(key_bytes),
        key_ref: KeyRef::Name("k0".into()),
        uuid: None,
    };
    create(registry, options)
}

/// Figures of an independent implementation (OpenSSL): block size 512, LBA 5, key 00..3f.
#[test]
fn a_block_is_a_unit_and_its_lba_the_tweak() {
    sim(|r| async move {
        malloc(&r, "m0", 512, 64);
        crypto(&r, "m0", 64).unwrap();
        let c = open(&r, "c0", Access::ReadWrite);
        c.write(5, Buf::from_slice(&[0x5a; 512]), false).await.unwrap();
        let below = bytes(&open(&r, "m0", Access::ReadOnly).read(5, 1).await.unwrap());
        assert_eq!(below[..4], [0xf1, 0x5b, 0xa2, 0x25]);
        assert_eq!(below[508..], [0x02, 0x45, 0x27, 0x2f]);
    });
}

#[test]
fn what_was_written_comes_back_and_the_base_holds_ciphertext() {
    for (key_bytes, block) in [(64, 512), (64, 4096), (32, 512), (32, 4096)] {
        sim(move |r| async move {
            let blocks = 64u64;
            malloc(&r, "m0", block, blocks);
            crypto(&r, "m0", key_bytes).unwrap();
            let (c, m) = (open(&r, "c0", Access::ReadWrite), open(&r, "m0", Access::ReadOnly));
            let bs = block as usize;
            let mut rng = Rng(7);
            let mut model = rng.bytes(blocks as usize * bs);
            c.write(0, Buf::from_slice(&model), false).await.unwrap();
            for _ in 0..60 {
                let lba = rng.below(blocks);
                let n = 1 + rng.below(blocks - lba);
                let at = lba as usize * bs..(lba + n) as usize * bs;
                if rng.below(2) == 0 {
                    let data = rng.bytes(at.len());
                    let (list, held) = rng.pieces(&data);
                    c.write(lba, list, false).await.unwrap();
                    if let Some(h) = held {
                        assert!(bytes(&h) == data, "a buffer that somebody else holds was changed");
                    }
                    model[at].copy_from_slice(&data);
                } else if rng.below(2) == 0 {
                    assert!(bytes(&c.read(lba, n).await.unwrap()) == model[at]);
                } else {
                    // Into the caller's own buffers.
                    let mut io = Io::new(Op::Read, lba, n);
                    io.data = rng.pieces(&vec![0xee; at.len()]).0;
                    let places: Vec<_> = io.data.iter().map(|b| b.as_ptr()).collect();
                    let io = c.io(io).await;
                    assert_eq!(io.status(), Status::SUCCESS);
                    assert_eq!(places, io.data.iter().map(|b| b.as_ptr()).collect::<Vec<_>>());
                    assert!(bytes(&io.data) == model[at]);
                    io.recycle();
                }
            }
            let below = bytes(&m.read(0, blocks).await.unwrap());
            assert!(below == spdk_encrypt(&key(key_bytes), bs, 0, &model));
        });
    }
}

/// A page that a RAM disk keeps takes the way past the caches when the writer holds on to it, and its place otherwise; what is
/// at an odd place or of another length takes neither.
#[test]
fn pages_that_the_base_keeps_are_encrypted_like_all_others() {
    for block in [512, 4096] {
        sim(move |r| async move {
            malloc(&r, "m0", block, 32768 / u64::from(block));
            crypto(&r, "m0", 64).unwrap();
            let (c, m) = (open(&r, "c0", Access::ReadWrite), open(&r, "m0", Access::ReadOnly));
            let bs = block as usize;
            let mut rng = Rng(11);
            for (lba, n) in [(0, 4096 / bs), (8192 / bs, 4096 / bs), (1, 4096 / bs), (2, 1), (1, 8192 / bs)] {
                for is_held in [true, false] {
                    let data = Buf::from_slice(&rng.bytes(n * bs));
                    let (plain, held) = (data.to_vec(), is_held.then(|| data.clone()));
                    c.write(lba as u64, data, false).await.unwrap();
                    let below = bytes(&m.read(lba as u64, n as u64).await.unwrap());
                    assert!(below == spdk_encrypt(&key(64), bs, lba as u64, &plain), "{n} blocks at {lba}");
                    assert!(held.is_none_or(|held| held.as_slice() == plain), "a held buffer was changed");
                }
            }
        });
    }
}

#[test]
fn zeros_are_encrypted_and_comparisons_see_plaintext() {
    sim(|r| async move {
        malloc(&r, "m0", 4096, 1024);
        crypto(&r, "m0", 64).unwrap();
        let (c, m) = (open(&r, "c0", Access::ReadWrite), open(&r, "m0", Access::ReadOnly));
        assert!(!c.bdev().info().ops.has(Op::WriteZeroes) && !c.bdev().info().ops.has(Op::Compare));
        c.write_zeroes(3, 700).await.unwrap();
        assert!(c.read(3, 700).await.unwrap().is_zero());
        let below = bytes(&m.read(3, 700).await.unwrap());
        assert!(below == spdk_encrypt(&key(64), 4096, 3, &vec![0; 700 * 4096]));

        let mut io = Io::new(Op::Compare, 3, 2);
        io.data = SgList::zeroes(8192);
        let io = c.io(io).await;
        assert_eq!(io.status(), Status::SUCCESS);
        io.recycle();
        let mut io = Io::new(Op::Compare, 3, 2);
        io.data = Buf::from_slice(&below[..8192]).into();
        let io = c.io(io).await;
        assert_eq!(io.status(), Status::COMPARE_FAILURE);
        io.recycle();

        let mut io = Io::new(Op::Copy, 0, 2);
        io.src_lba = 3;
        let io = c.io(io).await;
        assert_eq!(io.status(), Status::SUCCESS);
        io.recycle();
        assert!(c.read(0, 2).await.unwrap().is_zero(), "a copy is decrypted and encrypted again");
    });
}

#[test]
fn unmapped_blocks_read_as_zeros_and_are_reported() {
    sim(|r| async move {
        let thin = Thin::create(&r, "t0", 512, 64);
        crypto(&r, "t0", 64).unwrap();
        let c = open(&r, "c0", Access::ReadWrite);
        c.write(0, Buf::from_slice(&[9; 8 * 512]), false).await.unwrap();
        c.unmap(2, 3).await.unwrap();
        let io = c.io(Io::new(Op::Read, 1, 9)).await;
        let mut want = vec![9; 9 * 512];
        want[512..4 * 512].fill(0);
        want[7 * 512..].fill(0);
        assert!(bytes(&io.data) == want);
        let hole = |start| BlockRange { start, blocks: 1 };
        assert_eq!(io.unmapped[..], [hole(1), hole(2), hole(3), hole(7), hole(8)]);
        io.recycle();
        // All of it unmapped, into the caller's buffer.
        let mut io = Io::new(Op::Read, 10, 2);
        io.data = Buf::from_slice(&[1; 1024]).into();
        let io = c.io(io).await;
        assert!(io.data.is_zero() && io.status().is_ok());
        io.recycle();
        assert!(thin.lock().unwrap().ops.contains(&(Op::Unmap, 2, 3, false)));
    });
}

#[test]
fn failures_of_the_base_go_up_unchanged() {
    sim(|r| async move {
        let thin = Thin::create(&r, "t0", 4096, 8);
        crypto(&r, "t0", 64).unwrap();
        let c = open(&r, "c0", Access::ReadWrite);
        thin.lock().unwrap().fail = Some(Status::UNRECOVERED_READ);
        assert_eq!(c.read(0, 1).await.unwrap_err(), Status::UNRECOVERED_READ);
        let mut io = Io::new(Op::Read, 0, 1);
        io.data = Buf::from_slice(&[1; 4096]).into();
        let io = c.io(io).await;
        assert_eq!(
            (io.status(), io.data.len_bytes()),
            (Status::UNRECOVERED_READ, 4096),
            "the buffer comes back"
        );
        io.recycle();
        thin.lock().unwrap().fail = Some(Status::CAPACITY_EXCEEDED);
        assert_eq!(
            c.write(0, Buf::from_slice(&[1; 4096]), false).await.unwrap_err(),
            Status::CAPACITY_EXCEEDED
        );
        thin.lock().unwrap().fail = None;
        thin.lock().unwrap().short_reads = true;
        assert_eq!(c.read(0, 2).await.unwrap_err(), Status::INTERNAL_ERROR);
    });
}

#[test]
fn flags_and_flush_go_down_and_removal_of_the_base_takes_the_device_along() {
    sim(|r| async move {
        let thin = Thin::create(&r, "t0", 4096, 8);
        let b = crypto(&r, "t0", 64).unwrap();
        assert_eq!(b.device().config()[0].1["key_name"], "k0");
        assert!(b.device().driver_specific()["crypto"]["base_bdev_name"] == "t0");
        {
            let c = open(&r, "c0", Access::ReadWrite);
            c.write(1, Buf::from_slice(&[1; 4096]), true).await.unwrap();
            c.flush().await.unwrap();
            let ops = std::mem::take(&mut thin.lock().unwrap().ops);
            assert_eq!(ops, [(Op::Write, 1, 1, true), (Op::Flush, 0, 0, false)]);
            assert!(matches!(crypto(&r, "t0", 64), Err(BdevError::Claimed { .. })));
        }
        r.get("t0").unwrap().set_blocks(16);
        assert_eq!(b.blocks(), 16);
        let removal = r.unregister("t0").unwrap();
        assert!(removal.is_done() && r.get("c0").is_err());
        assert!(matches!(crypto(&r, "t0", 64), Err(BdevError::NotFound(_))));
    });
}
