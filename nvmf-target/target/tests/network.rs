//! What a network does to connections: pieces of any size, delays, stalls, black holes, hosts that fall silent. Real
//! traffic of a host that verifies its data goes through a proxy.

mod common;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::proxy::Proxy;
use common::witness::{Model, Witness, prepare};
use common::*;
use cryptfold_nvmf_spec::features::Fid;
use cryptfold_nvmf_spec::opcode::{Admin, Io};
use cryptfold_nvmf_spec::pdu::build::DataPart;
use cryptfold_nvmf_spec::{Cntlid, Sgl, Sqe, Status};
use cryptfold_nvmf_target::TransportOptions;
use cryptfold_reactor::IdlePolicy;

/// Row 9: the same traffic a byte at a time, in pieces of any size, and run together.
#[test]
fn pieces_of_any_size() {
    let rig = Rig::new();
    prepare(&rig);
    for (pieces, exact, delay_ms, rounds) in
        [(1, true, 0, 3), (7, true, 0, 8), (64, false, 0, 20), (3000, false, 0, 40), (0, false, 3, 20)]
    {
        let proxy = Proxy::to(rig.addr);
        let mut model = Model::connect(proxy.addr);
        // What an earlier host left stays.
        model.forget();
        proxy.network.pieces.store(pieces, Ordering::Relaxed);
        proxy.network.exact.store(exact, Ordering::Relaxed);
        proxy.network.delay_ms.store(delay_ms, Ordering::Relaxed);
        (0..rounds).for_each(|_| model.round());
        proxy.network.pieces.store(0, Ordering::Relaxed);
        proxy.network.delay_ms.store(0, Ordering::Relaxed);
        model.all();
    }
}

/// Row 10: bytes are held up and come late: nothing is lost. They never come: the controller ends at its deadline, and nobody
/// else notices. (The deadline for data that was asked for: `silence_has_a_deadline`.)
#[test]
fn stalls_and_black_holes() {
    let options = TransportOptions { kas: 1, min_kato: 1500, ..Default::default() };
    let rig = Rig::with(2, IdlePolicy::Interrupt, options);
    let good = Witness::beside(&rig);
    let proxy = Proxy::to(rig.addr);
    let open = |qid, cntlid| {
        let mut c = Client::open(proxy.addr, false, true);
        let cqe = c.connect(NQN, qid, 32, cntlid);
        assert_eq!(cqe.status(), Status::SUCCESS);
        c.cntlid = Cntlid(cqe.dw0.get() as u16);
        c
    };
    let mut admin = open(0, Cntlid::DYNAMIC);
    admin.enable();
    let mut io = open(1, admin.cntlid);
    let data = pattern(0, 200, 1);
    for held_ms in [1, 50, 400] {
        // The stall falls into the middle of the write's data.
        proxy.network.pieces.store(5000, Ordering::Relaxed);
        let network = proxy.network.clone();
        let stall = std::thread::spawn(move || {
            for _ in 0..3 {
                network.stalled.store(true, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(held_ms));
                network.stalled.store(false, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        assert_eq!(io.write(0, &data), Status::SUCCESS);
        assert!(io.read(0, 200).1 == data, "after a stall of {held_ms} ms");
        stall.join().expect("it ends");
    }
    // A black hole in the middle of an answer to an R2T.
    let cid = io.cid();
    io.submit(&Sqe { cid: cid.0.into(), ..rw_sqe(Io::Write, 0, 32, Sgl::transport(16_384)) }, &[]);
    let Pdu::R2t { ttag, .. } = io.recv() else { panic!("an R2T") };
    let pdu = io.h2c_data(DataPart { cid, offset: 0, len: 16_384, last: true }, ttag, &[9; 16_384]);
    io.send(&pdu[..9000]);
    let seen = good.rounds();
    admin.feature(Admin::SetFeatures, Fid::KeepAliveTimer as u32, 1500);
    proxy.network.stalled.store(true, Ordering::Relaxed);
    rig.wait_empty();
    wait(|| good.rounds() > seen);
    drop(proxy);
    let (mut admin, mut io) = rig.host(9);
    assert!(io.read(0, 200).1 == data, "half a write wrote nothing");
    assert_eq!(admin.admin_in(Admin::Identify, 0, 1, 4096).0.status(), Status::SUCCESS);
}

/// Row 16: a host falls silent while its commands are with a slow device and others wait for its data. Its controller
/// goes, at its time; what the device still holds comes back to nobody.
#[test]
fn a_host_that_falls_silent_during_io() {
    let options = TransportOptions { kas: 1, min_kato: 300, ..Default::default() };
    let rig = Rig::with(2, IdlePolicy::Interrupt, options);
    let good = Witness::beside(&rig);
    rig.slow(FOR_EVER);
    let mut admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, false);
    for n in 0..8u16 {
        io.submit(&Sqe { cid: (100 + n).into(), ..read_sqe(u64::from(n) * 8, 8) }, &[]);
        let write = rw_sqe(Io::Write, 512 + u64::from(n) * 32, 32, Sgl::transport(16_384));
        io.submit(&Sqe { cid: (200 + n).into(), ..write }, &[]);
        assert!(matches!(io.recv(), Pdu::R2t { .. }));
    }
    let (seen, begin) = (good.rounds(), Instant::now());
    admin.feature(Admin::SetFeatures, Fid::KeepAliveTimer as u32, 300);
    assert_eq!(admin.recv(), Pdu::Closed);
    assert_eq!(io.recv(), Pdu::Closed);
    let ended = begin.elapsed();
    assert!(ended >= Duration::from_millis(290), "too early: {ended:?}");
    rig.wait_empty();
    wait(|| rig.target.buffer_bytes() < 1 << 20);
    rig.target.remove_ns(NQN, 1).expect("nobody uses it");
    wait(|| good.rounds() > seen);
    let mut again = rig.admin();
    assert_eq!(again.admin_in(Admin::Identify, 0, 1, 4096).0.status(), Status::SUCCESS);
}
