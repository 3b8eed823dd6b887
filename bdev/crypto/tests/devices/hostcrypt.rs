//! The hostcrypt device against dm-crypt's numbering, written slowly: above it lies a RAM disk that knows nothing of
//! ciphers, below it plaintext.

use std::sync::{Arc, Mutex};

use cryptfold_bdev::{Access, Bdev, BdevError, Io, Op, Registry, Status};
use cryptfold_bdev_crypto::KeyRef;
use cryptfold_bdev_crypto::gate::{Access as KeyAccess, KeyGate};
use cryptfold_bdev_crypto::hostcrypt::{HostcryptOptions, create};
use cryptfold_reactor::memory::{Buf, SgList};

use crate::common::*;

fn options(base: &str) -> HostcryptOptions {
    HostcryptOptions {
        name: "h0".into(),
        base_bdev_name: base.into(),
        key: KeyGate::fixed(key(64)),
        key_ref: KeyRef::File("/keys/h0".into()),
        key_id: 3,
        sector_size_bytes: 4096,
        payload_offset_bytes: 0,
        iv_offset: 0,
        iv_large_sectors: false,
        uuid: None,
    }
}

/// Figures of an independent implementation (OpenSSL): sectors of 4096 bytes, iv_offset 16, the fourth unit (tweak 40).
#[test]
fn a_unit_of_4096_bytes_counts_eight_sectors() {
    sim(|r| async move {
        Thin::create(&r, "t0", 4096, 64);
        create(&r, HostcryptOptions { payload_offset_bytes: 8192, iv_offset: 16, ..options("t0") }).unwrap();
        // The base holds plaintext; the host sees the ciphertext of the figures.
        let t = r.get("t0").unwrap();
        let h = open(&r, "h0", Access::ReadWrite);
        h.write(5, Buf::from_slice(&host_figures()), false).await.unwrap();
        let below = open(&r, t.name(), Access::ReadOnly).read(5, 1).await.unwrap();
        assert_eq!(bytes(&below), [0x5a; 4096]);
        let seen = bytes(&h.read(5, 1).await.unwrap());
        assert_eq!(seen[..4], [0x5e, 0xf5, 0x08, 0x65]);
        assert_eq!(seen[4092..], [0x96, 0xb8, 0xd2, 0x5a]);
    });
}

/// dm-crypt's `iv_large_sectors` counts units, as the crypto device counts its blocks: a host that has that one in place of
/// dm-crypt is understood.
#[test]
fn large_sectors_are_numbered_as_the_crypto_device_numbers_blocks() {
    sim(|r| async move {
        Thin::create(&r, "t0", 4096, 64);
        create(
            &r,
            HostcryptOptions {
                payload_offset_bytes: 8192,
                iv_offset: 16,
                iv_large_sectors: true,
                ..options("t0")
            },
        )
        .unwrap();
        let plain: Vec<u8> = (0..3 * 4096).map(|i| (i / 7) as u8).collect();
        let h = open(&r, "h0", Access::ReadWrite);
        // The payload begins at block 2 with the tweak 16 / 8: block 5 has the tweak 5.
        h.write(5, Buf::from_slice(&spdk_encrypt(&key(64), 4096, 5, &plain)), false).await.unwrap();
        let below = open(&r, "t0", Access::ReadOnly).read(5, 3).await.unwrap();
        assert!(bytes(&below) == plain);
    });
}

fn host_figures() -> Vec<u8> {
    use cryptfold_bdev_crypto::engine::{EngineKind, XtsContext, XtsEngine};
    let mut unit = vec![0x5a; 4096];
    XtsContext::with_engine(EngineKind::Portable, &key(64)).unwrap().encrypt_in_place(40, &mut unit);
    unit
}

/// One step of a host; the model is what a plain disk would hold.
async fn step(rng: &mut Rng, h: &cryptfold_bdev::Channel, model: &mut [u8], zeroing: bool) {
    let bs = h.bdev().block_size_bytes() as usize;
    let blocks = h.bdev().blocks();
    let lba = rng.below(blocks);
    let n = 1 + rng.below((blocks - lba).min(12));
    let at = lba as usize * bs..(lba + n) as usize * bs;
    match rng.below(6) {
        0 | 1 => {
            let data = rng.bytes(at.len());
            let (list, held) = rng.pieces(&data);
            h.write(lba, list, rng.below(2) == 0).await.unwrap();
            assert!(held.is_none_or(|x| bytes(&x) == data), "a buffer that somebody else holds was changed");
            model[at].copy_from_slice(&data);
        }
        2 => {
            h.write_zeroes(lba, n).await.unwrap();
            model[at].fill(0);
        }
        3 if zeroing => {
            h.unmap(lba, n).await.unwrap();
            model[at].fill(0);
        }
        4 => {
            let mut io = Io::new(Op::Read, lba, n);
            io.data = rng.pieces(&vec![0xee; at.len()]).0;
            let io = h.io(io).await;
            assert_eq!(io.status(), Status::SUCCESS);
            assert_eq!((io.lba, io.blocks), (lba, n), "the address comes back as it was");
            assert!(bytes(&io.data) == model[at]);
            io.recycle();
        }
        _ => assert!(bytes(&h.read(lba, n).await.unwrap()) == model[at], "{lba} {n}"),
    }
}

/// Blocks of the base: (block size, data unit, payload offset, iv_offset, key bytes).
const SHAPES: [(u32, u32, u64, u64, usize); 7] = [
    (512, 512, 0, 0, 64),
    (512, 512, 5 * 512, 77, 64),
    (4096, 512, 3 * 4096, 1 << 40, 64),
    (4096, 4096, 0, 0, 32),
    (4096, 4096, 5 * 4096, 8, 64),
    (512, 4096, 2 * 4096, 16, 64),
    (512, 4096, 0, 0, 32),
];

#[test]
fn a_host_sees_the_disk_that_it_wrote_and_a_thin_base_holds_its_plaintext() {
    for (i, (block, unit, offset, iv_offset, key_bytes)) in SHAPES.into_iter().enumerate() {
        sim(move |r| async move {
            let blocks = 40 * 4096 / u64::from(block);
            let thin = Thin::create(&r, "t0", block, blocks);
            let bdev = create(
                &r,
                HostcryptOptions {
                    key: KeyGate::fixed(key(key_bytes)),
                    sector_size_bytes: unit,
                    payload_offset_bytes: offset,
                    iv_offset,
                    ..options("t0")
                },
            )
            .unwrap();
            assert_eq!(bdev.block_size_bytes(), block.max(unit));
            assert!(bdev.info().ops.has(Op::WriteZeroes) && bdev.info().reports_unmapped);
            let h = open(&r, "h0", Access::ReadWrite);
            let mut rng = Rng(99 + i as u64);
            let mut model = vec![0; 40 * 4096];
            let mut checked = 0;
            for i in 0..300 {
                step(&mut rng, &h, &mut model, true).await;
                if i % 10 == 0 {
                    checked += check_below(
                        &thin,
                        &model,
                        block as usize,
                        unit as usize,
                        offset,
                        iv_offset,
                        key_bytes,
                    );
                }
            }
            assert!(checked > 100, "{checked} blocks of {block}");
        });
    }
}

/// Every stored block is the host's plaintext, or raw in front of the payload, under the right key id. Returns how many.
fn check_below(
    thin: &Mutex<State>,
    model: &[u8],
    block: usize,
    unit: usize,
    offset: u64,
    iv_offset: u64,
    key_bytes: usize,
) -> usize {
    let (raw, payload) = model.split_at(offset as usize);
    let mut want = raw.to_vec();
    want.extend(dm_decrypt(&key(key_bytes), unit, iv_offset, 0, payload));
    let state = thin.lock().unwrap();
    for (lba, (data, host_key)) in &state.blocks {
        let at = *lba as usize * block;
        assert!(data == &want[at..at + block], "block {lba}");
        assert_eq!(*host_key, if (at as u64) < offset { 0 } else { 3 }, "block {lba}");
    }
    state.blocks.len()
}

/// A base that does not tell what is unmapped: for zeros that the host asks for, it stores what encrypts to zeros.
#[test]
fn over_a_plain_base_zeros_are_stored_as_their_plaintext() {
    for (block, unit) in [(512, 512), (4096, 4096), (512, 4096)] {
        sim(move |r| async move {
            malloc(&r, "m0", block, 40 * 4096 / u64::from(block));
            let o = HostcryptOptions { sector_size_bytes: unit, payload_offset_bytes: 4096, ..options("m0") };
            let bdev = create(&r, o).unwrap();
            assert!(!bdev.info().ops.has(Op::WriteZeroes) && !bdev.info().reports_unmapped);
            let h = open(&r, "h0", Access::ReadWrite);
            let mut rng = Rng(5);
            let mut model = rng.bytes(40 * 4096);
            h.write(0, Buf::from_slice(&model), false).await.unwrap();
            for _ in 0..200 {
                step(&mut rng, &h, &mut model, false).await;
            }
            let m = open(&r, "m0", Access::ReadOnly);
            let below = bytes(&m.read(0, m.bdev().blocks()).await.unwrap());
            assert!(below[..4096] == model[..4096]);
            assert!(below[4096..] == dm_decrypt(&key(64), unit as usize, 0, 0, &model[4096..]));
        });
    }
}

#[test]
fn a_zero_that_the_host_encrypted_is_not_a_zero_that_it_discarded() {
    sim(|r| async move {
        let thin = Thin::create(&r, "t0", 4096, 64);
        create(&r, options("t0")).unwrap();
        let h = open(&r, "h0", Access::ReadWrite);
        // The host's file system writes zeros through its dm-crypt: the base gets plain zeros, mapped.
        let cipher = {
            let mut zeros = vec![0; 8192];
            use cryptfold_bdev_crypto::engine::XtsEngine;
            let x = cryptfold_bdev_crypto::engine::XtsContext::new(&key(64)).unwrap();
            zeros.chunks_mut(4096).zip([8, 16]).for_each(|(u, tweak)| x.encrypt_in_place(tweak, u));
            zeros
        };
        h.write(1, Buf::from_slice(&cipher), false).await.unwrap();
        assert!(thin.lock().unwrap().blocks[&1].0.iter().all(|b| *b == 0));
        assert!(bytes(&h.read(1, 2).await.unwrap()) == cipher);
        h.unmap(1, 1).await.unwrap();
        let io = h.io(Io::new(Op::Read, 0, 3)).await;
        let got = bytes(&io.data);
        assert!(got[..8192].iter().all(|b| *b == 0) && got[8192..] == cipher[4096..]);
        assert_eq!(io.unmapped.iter().map(|u| u.blocks).sum::<u32>(), 2);
        io.recycle();
    });
}

#[test]
fn a_half_unmapped_unit_is_mapped() {
    sim(|r| async move {
        let thin = Thin::create(&r, "t0", 512, 64);
        create(&r, options("t0")).unwrap();
        let h = open(&r, "h0", Access::ReadWrite);
        let data = vec![0x77; 3 * 4096];
        h.write(0, Buf::from_slice(&data), false).await.unwrap();
        // Unit 1 loses its second half and unit 2 all of it, by other means.
        thin.lock().unwrap().blocks.retain(|lba, _| *lba < 12 || *lba >= 24);
        let io = h.io(Io::new(Op::Read, 0, 3)).await;
        let unmapped: Vec<_> = io.unmapped.iter().map(|u| (u.start, u.blocks)).collect();
        assert_eq!(unmapped, [(2, 1)]);
        let got = bytes(&io.data);
        io.recycle();
        assert!(got[..4096] == data[..4096] && got[8192..].iter().all(|b| *b == 0));
        let plain = dm_decrypt(&key(64), 4096, 0, 4096, &got[4096..8192]);
        assert!(
            plain[2048..].iter().all(|b| *b == 0)
                && plain[..2048] == dm_decrypt(&key(64), 4096, 0, 4096, &data[..4096])[..2048]
        );
    });
}

#[test]
fn failures_of_the_base_go_up_also_from_half_of_a_straddling_write() {
    sim(|r| async move {
        let thin = Thin::create(&r, "t0", 4096, 8);
        create(&r, HostcryptOptions { payload_offset_bytes: 4096, ..options("t0") }).unwrap();
        let h = open(&r, "h0", Access::ReadWrite);
        h.write(0, SgList::zeroes(3 * 4096), true).await.unwrap();
        assert_eq!(thin.lock().unwrap().ops, [(Op::Write, 0, 1, true), (Op::Write, 1, 2, true)]);
        thin.lock().unwrap().fail = Some(Status::CAPACITY_EXCEEDED);
        assert_eq!(h.write(0, SgList::zeroes(8192), false).await.unwrap_err(), Status::CAPACITY_EXCEEDED);
        assert_eq!(h.write(2, SgList::zeroes(4096), false).await.unwrap_err(), Status::CAPACITY_EXCEEDED);
        assert_eq!(h.read(2, 1).await.unwrap_err(), Status::CAPACITY_EXCEEDED);
        thin.lock().unwrap().fail = None;
        thin.lock().unwrap().short_reads = true;
        assert_eq!(h.read(2, 2).await.unwrap_err(), Status::INTERNAL_ERROR);
    });
}

fn refused(r: &Arc<Registry>, o: HostcryptOptions) -> String {
    match create(r, o) {
        Err(e @ BdevError::Invalid(_)) => e.to_string(),
        Err(e) => panic!("{e}"),
        Ok(b) => panic!("{} was created", b.name()),
    }
}

#[test]
fn configurations_that_do_not_fit_are_refused_and_leave_the_base_free() {
    sim(|r| async move {
        Thin::create(&r, "t0", 512, 64);
        malloc(&r, "m0", 4096, 16);
        let o = || options("t0");
        assert!(
            refused(&r, HostcryptOptions { sector_size_bytes: 1024, ..o() }).contains("sector_size 1024")
        );
        assert!(
            refused(&r, HostcryptOptions { payload_offset_bytes: 512, ..o() }).contains("block size of 4096")
        );
        assert!(
            refused(&r, HostcryptOptions { payload_offset_bytes: 64 * 512, ..o() })
                .contains("leaves nothing")
        );
        assert!(refused(&r, HostcryptOptions { iv_offset: 4, ..o() }).contains("not a multiple of 8"));
        assert!(refused(&r, HostcryptOptions { iv_offset: u64::MAX - 7, ..o() }).contains("too large"));
        assert!(refused(&r, HostcryptOptions { key_id: 0, ..o() }).contains("key_id"));
        assert!(matches!(create(&r, options("no")), Err(BdevError::NotFound(_))));
        let b: Arc<Bdev> = create(&r, o()).unwrap();
        let config = b.device().config();
        assert_eq!(
            (config[0].0.as_str(), &config[0].1["key_file"]),
            ("bdev_hostcrypt_create", &"/keys/h0".into())
        );
        r.get("t0").unwrap().set_blocks(130);
        assert_eq!((b.blocks(), b.block_size_bytes()), (16, 4096), "a rest that is no block is left out");
    });
}

#[test]
fn a_shut_gate_lets_nothing_through_and_an_open_one_everything() {
    sim(|r| async move {
        let below = Thin::create(&r, "t0", 4096, 64);
        let gate = KeyGate::waiting();
        create(&r, HostcryptOptions { key: gate.clone(), payload_offset_bytes: 4096, ..options("t0") })
            .unwrap();
        let h = open(&r, "h0", Access::ReadWrite);
        let data = vec![7; 8192];
        let shut = |status: Status| {
            let (h, data, below) = (h.clone(), data.clone(), below.clone());
            async move {
                let before = below.lock().unwrap().ops.len();
                // The raw part, the seam, the payload.
                for lba in 0..2 {
                    assert_eq!(h.read(lba, 2).await.unwrap_err(), status);
                    assert_eq!(h.write(lba, Buf::from_slice(&data), true).await.unwrap_err(), status);
                }
                assert_eq!(h.flush().await.unwrap_err(), status);
                assert_eq!(h.unmap(2, 2).await.unwrap_err(), status);
                assert_eq!(h.write_zeroes(2, 2).await.unwrap_err(), status);
                assert_eq!(below.lock().unwrap().ops.len(), before, "nothing went down");
            }
        };
        assert!(!Status::NAMESPACE_NOT_READY.dnr());
        shut(Status::NAMESPACE_NOT_READY).await;
        gate.set(KeyAccess::Open(key(64)));
        h.write(3, Buf::from_slice(&data), false).await.unwrap();
        assert_eq!(bytes(&h.read(3, 2).await.unwrap()), data);
        gate.set(KeyAccess::Fenced);
        assert_eq!(h.bdev().device().driver_specific()["hostcrypt"]["access"], "fenced");
        shut(Status::ACCESS_DENIED.do_not_retry()).await;
        gate.set(KeyAccess::Waiting);
        shut(Status::NAMESPACE_NOT_READY).await;
        gate.set(KeyAccess::Open(key(64)));
        assert_eq!(bytes(&h.read(3, 2).await.unwrap()), data);
        // A read that is below when the gate shuts.
        below.lock().unwrap().shut = Some(gate.clone());
        let before = below.lock().unwrap().ops.len();
        assert_eq!(h.read(3, 2).await.unwrap_err(), Status::ACCESS_DENIED.do_not_retry());
        assert_eq!(below.lock().unwrap().ops.len(), before + 1);
    });
}
