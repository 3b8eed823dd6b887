//! The device that a host's LUKS comes to: what is noticed, what is held back until somebody has looked, and what passes under
//! which layer. Who looks is the test.

use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cryptfold_bdev::{Access, BdevError, Channel, Op, Registry, Status};
use cryptfold_bdev_crypto::gate::{Access as KeyAccess, KeyGate};
use cryptfold_bdev_crypto::hostcrypt::Shape;
use cryptfold_bdev_crypto::late::reduce_late;
use cryptfold_bdev_crypto::luks::{Bound, Layer, LuksOptions, Shut, Switch, WATCHED_BYTES, Wake, create};
use cryptfold_reactor as reactor;
use cryptfold_reactor::memory::Buf;
use serde_json::json;

use crate::common::*;

const PAYLOAD: u64 = WATCHED_BYTES / 4096 + 16;
const AT_ONCE: Option<Duration> = Some(Duration::ZERO);

fn options() -> LuksOptions {
    LuksOptions {
        name: "l0".into(),
        base_bdev_name: "t0".into(),
        uuid: None,
        params: json!({"kms_server": "k"}),
    }
}

/// A thin volume, the device on it, looked at once.
fn device(r: &Arc<Registry>, layer: Layer) -> (Arc<Mutex<State>>, Arc<Switch>, Channel) {
    let below = Thin::create(r, "t0", 4096, PAYLOAD + 64);
    let (_, switch) = create(r, options()).unwrap();
    let channel = open(r, "l0", Access::ReadWrite);
    assert_eq!(switch.wait(AT_ONCE), Wake::Look(1));
    switch.found_magic(false, 1);
    switch.set(layer);
    assert!(switch.settle(1));
    (below, switch, channel)
}

fn bound(gate: &Arc<KeyGate>) -> Layer {
    let shape = Shape {
        payload_offset_bytes: PAYLOAD * 4096,
        iv_offset: 0,
        iv_large_sectors: false,
        sector_size_bytes: 512,
        key_id: 1,
        by_block: true,
    };
    Layer::Bound(Arc::new(Bound { shape, gate: gate.clone() }))
}

fn block(byte: u8) -> Buf {
    Buf::from_slice(&[byte; 4096])
}

fn magic() -> Buf {
    let mut block = [7; 4096];
    block[..6].copy_from_slice(b"LUKS\xba\xbe");
    Buf::from_slice(&block)
}

/// Whether a look has been asked for since number `seen`.
fn asked(switch: &Switch, seen: u64) -> bool {
    switch.wait(AT_ONCE) != Wake::Look(seen)
}

/// A write of one block in a task of its own, and what became of it.
fn begin_write(channel: &Channel, lba: u64) -> Rc<std::cell::Cell<Option<Result<(), Status>>>> {
    let done = Rc::new(std::cell::Cell::new(None));
    let (channel, told) = (channel.clone(), done.clone());
    reactor::spawn_local(async move { told.set(Some(channel.write(lba, block(3), false).await)) }).detach();
    done
}

#[test]
fn a_write_behind_a_changed_header_waits_for_the_look() {
    sim(|r| async move {
        let (below, switch, channel) = device(&r, Layer::Raw);
        // Somebody else's file system: nobody looks.
        channel.write(0, block(1), false).await.unwrap();
        channel.write(5, magic(), false).await.unwrap();
        channel.unmap(6, 1).await.unwrap();
        channel.flush().await.unwrap();
        channel.write(PAYLOAD, block(1), false).await.unwrap();
        assert!(!asked(&switch, 1));
        channel.unmap(PAYLOAD, 1).await.unwrap();

        channel.write(0, magic(), true).await.unwrap();
        let write = begin_write(&channel, PAYLOAD + 1);
        let other = begin_write(&open(&r, "t0", Access::ReadOnly), PAYLOAD);
        reactor::sleep(Duration::from_secs(1)).await;
        assert_eq!((write.get(), other.get()), (None, Some(Err(Status::ACCESS_DENIED))));
        // The header itself can be written meanwhile, and is looked at again.
        channel.write(1, block(9), false).await.unwrap();
        assert!(bytes(&channel.read(PAYLOAD, 1).await.unwrap()) == [0; 4096]);
        assert!(switch.drain(Duration::ZERO), "held back is not under way");
        switch.set(bound(&KeyGate::fixed(key(64))));
        assert!(!switch.settle(2), "looked at too early");
        let Wake::Look(now) = switch.wait(AT_ONCE) else { panic!("gone") };
        assert_eq!((now, write.get()), (3, None));
        assert!(switch.settle(now));
        reactor::sleep(Duration::from_millis(1)).await;
        assert_eq!(write.get(), Some(Ok(())));
        // What waited was written under the new layer.
        assert!(bytes(&channel.read(PAYLOAD + 1, 1).await.unwrap()) == [3; 4096]);
        let expected = dm_decrypt(&key(64), 512, 0, 4096, &[3; 4096]);
        assert!(below.lock().unwrap().blocks[&(PAYLOAD + 1)] == (expected, 1));
        assert!(below.lock().unwrap().blocks[&1] == (vec![9; 4096], 0), "the header is raw");
    });
}

#[test]
fn nobody_waits_for_ever() {
    sim(|r| async move {
        let (_, switch, channel) = device(&r, Layer::Raw);
        channel.write(0, magic(), false).await.unwrap();
        let first = begin_write(&channel, PAYLOAD);
        reactor::sleep(Duration::from_secs(15)).await;
        let second = begin_write(&channel, PAYLOAD + 1);
        assert_eq!(first.get(), None);
        reactor::sleep(Duration::from_secs(10)).await;
        assert_eq!((first.get(), second.get()), (Some(Err(Status::NAMESPACE_NOT_READY)), None));
        reactor::sleep(Duration::from_secs(11)).await;
        assert_eq!(second.get(), Some(Err(Status::NAMESPACE_NOT_READY)));
        // And not after the end of who looks.
        let third = begin_write(&channel, PAYLOAD);
        reactor::sleep(Duration::from_secs(1)).await;
        switch.end();
        reactor::sleep(Duration::from_millis(1)).await;
        assert_eq!(third.get(), Some(Err(Status::NAMESPACE_NOT_READY)));
    });
}

#[test]
fn a_change_under_way_is_waited_for() {
    sim(|r| async move {
        let (_, switch, channel) = device(&r, Layer::Raw);
        let mut io = cryptfold_bdev::Io::new(Op::Write, PAYLOAD, 1);
        io.data = block(1).into();
        let under_way = channel.io(io);
        assert!(!switch.drain(Duration::ZERO), "one is under way");
        under_way.await.recycle();
        assert!(switch.drain(Duration::ZERO));
        let held = begin_write(&channel, PAYLOAD);
        reactor::sleep(Duration::from_millis(1)).await;
        assert!(held.get().is_none() && switch.drain(Duration::ZERO));
        assert!(switch.settle(1));
        reactor::sleep(Duration::from_millis(1)).await;
        assert_eq!(held.get(), Some(Ok(())));
    });
}

#[test]
fn pieces_of_a_header_in_any_order_are_looked_at_with_the_flush() {
    sim(|r| async move {
        let (_, switch, channel) = device(&r, Layer::Raw);
        channel.write(2, block(9), false).await.unwrap();
        channel.flush().await.unwrap();
        assert!(!asked(&switch, 1));
        channel.write(0, magic(), false).await.unwrap();
        switch.found_magic(true, 2);
        assert!(asked(&switch, 1) && switch.settle(2));
        channel.flush().await.unwrap();
        assert!(asked(&switch, 2), "something was written that had seemed to be no header");
        assert!(switch.settle(3));
        channel.flush().await.unwrap();
        assert!(!asked(&switch, 3));
        // Each change of a header that is there.
        channel.write(2, block(8), false).await.unwrap();
        assert!(asked(&switch, 3) && switch.settle(4));
        channel.unmap(0, 1).await.unwrap();
        assert!(asked(&switch, 4));
        switch.found_magic(false, 5);
        assert!(switch.settle(5));
        channel.write(2, block(7), false).await.unwrap();
        assert!(!asked(&switch, 5), "there is none any more");
    });
}

#[test]
fn what_is_shut_can_be_given_up_where_that_is_said_and_is_looked_at() {
    sim(|r| async move {
        let status = Status::ACCESS_DENIED.do_not_retry();
        let shut = |discards| Layer::Shut(Shut { from_bytes: PAYLOAD * 4096, status, discards });
        let (below, switch, channel) = device(&r, shut(false));
        let refused = |result: Result<(), Status>| assert_eq!(result, Err(status));
        refused(channel.write(PAYLOAD, block(1), false).await);
        refused(channel.read(PAYLOAD - 1, 2).await.map(drop));
        refused(channel.unmap(PAYLOAD, 1).await);
        channel.write(PAYLOAD - 1, block(1), false).await.unwrap();
        channel.read(0, 8).await.unwrap();
        assert!(!asked(&switch, 1));
        switch.set(shut(true));
        refused(channel.write(PAYLOAD, block(1), false).await);
        refused(channel.read(PAYLOAD, 1).await.map(drop));
        assert!(!asked(&switch, 1));
        channel.unmap(PAYLOAD - 1, 2).await.unwrap();
        assert!(asked(&switch, 1) && switch.settle(2));
        channel.write_zeroes(PAYLOAD, 4).await.unwrap();
        assert!(asked(&switch, 2));
        assert!(below.lock().unwrap().blocks.is_empty());
    });
}

#[test]
fn the_gate_of_a_bound_payload_is_the_keys() {
    sim(|r| async move {
        let gate = KeyGate::waiting();
        let (_, switch, channel) = device(&r, bound(&gate));
        assert_eq!(channel.write(PAYLOAD, block(1), false).await, Err(Status::NAMESPACE_NOT_READY));
        gate.set(KeyAccess::Open(key(64)));
        channel.write(PAYLOAD, block(1), false).await.unwrap();
        gate.set(KeyAccess::Fenced);
        let denied = Status::ACCESS_DENIED.do_not_retry();
        assert_eq!(channel.read(PAYLOAD, 1).await.map(drop), Err(denied));
        // Settling again does not put the layer on anew.
        gate.set(KeyAccess::Open(key(64)));
        assert!(switch.drain(Duration::ZERO) && switch.settle(1));
        assert!(bytes(&channel.read(PAYLOAD, 1).await.unwrap()) == [1; 4096]);
        switch.set(Layer::Raw);
        assert!(bytes(&channel.read(PAYLOAD, 1).await.unwrap()) != [1; 4096]);
    });
}

/// Written raw, then bound: read as it was, block by block, and reduced late.
#[test]
fn blocks_of_before_are_told_from_those_of_after() {
    sim(|r| async move {
        let (below, switch, channel) = device(&r, Layer::Raw);
        let mut rng = Rng(7);
        let cipher: Vec<Vec<u8>> = (0..4).map(|_| rng.bytes(4096)).collect();
        for (lba, data) in [(0, &cipher[0]), (1, &cipher[1]), (3, &vec![5; 4096]), (4, &cipher[2])] {
            channel.write(PAYLOAD + lba, Buf::from_slice(data), false).await.unwrap();
        }
        assert!(switch.drain(Duration::ZERO));
        switch.set(bound(&KeyGate::fixed(key(64))));
        assert!(switch.settle(1));
        channel.write(PAYLOAD + 1, Buf::from_slice(&cipher[3]), false).await.unwrap();
        let all = [&cipher[0][..], &cipher[3], &[0; 4096], &[5; 4096], &cipher[2]].concat();
        let stored = |n: u64| below.lock().unwrap().blocks[&(PAYLOAD + n)].clone();
        for _ in 0..2 {
            assert!(bytes(&channel.read(PAYLOAD, 5).await.unwrap()) == all);
            // With the header, and the part of it that is wanted.
            assert!(bytes(&channel.read(PAYLOAD - 1, 3).await.unwrap())[4096..] == all[..8192]);
            assert!(bytes(&channel.read(PAYLOAD + 3, 2).await.unwrap()) == all[3 * 4096..]);
            assert_eq!((stored(1).1, stored(3)), (1, (vec![5; 4096], 0)));
            // What looks like ciphertext; the second time there is nothing left.
            let left = u64::from(stored(0).1 == 0) * 2;
            assert_eq!(reduce_late(&channel, PAYLOAD, 5).await, Ok(left));
        }
        let plain = |at: u64, data: &[u8]| dm_decrypt(&key(64), 512, 0, at * 4096, data);
        assert_eq!(stored(0), (plain(0, &cipher[0]), 1));
        assert_eq!(stored(1), (plain(1, &cipher[3]), 1));
        assert_eq!(stored(4), (plain(4, &cipher[2]), 1));
    });
}

#[test]
fn other_devices_are_refused() {
    sim(|r| async move {
        Thin::create(&r, "t0", 512, 1 << 20);
        assert!(
            matches!(create(&r, options()).map(drop), Err(BdevError::Invalid(what)) if what.contains("4096"))
        );
        malloc(&r, "m0", 4096, 4096);
        let fat = LuksOptions { base_bdev_name: "m0".into(), ..options() };
        assert!(matches!(create(&r, fat).map(drop), Err(BdevError::Invalid(what)) if what.contains("thin")));
    });
}
