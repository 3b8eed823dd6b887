//! Hosts that do not behave. For each: the right termination request or status, only that connection ends, and nothing is
//! left behind.

mod common;

use common::witness::Witness;
use common::*;
use cryptfold_nvmf_spec::fabrics::{Connect, ConnectReject};
use cryptfold_nvmf_spec::opcode::{Admin, Io};
use cryptfold_nvmf_spec::pdu::build::{self, DataPart};
use cryptfold_nvmf_spec::pdu::{Fes, field};
use cryptfold_nvmf_spec::sqe::Fuse;
use cryptfold_nvmf_spec::{Cid, Cntlid, Nsid, Qid, Sgl, Sqe, Status, Ttag};
use cryptfold_nvmf_target::TransportOptions;
use cryptfold_reactor::{IdlePolicy, memory};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use zerocopy::IntoBytes;

fn ic_req() -> [u8; 128] {
    let mut buf = [0; 128];
    build::ic_req(&mut buf, 0, false, false, 0).expect("it fits");
    buf
}

/// Expects a termination request, then the end.
fn terminated(c: &mut Client, fes: Fes, fei: u32) {
    match c.recv() {
        Pdu::Term { fes: f, fei: i, .. } => assert_eq!((f, i), (fes as u16, fei)),
        other => panic!("instead of {fes:?} {fei}: {other:?}"),
    }
    assert_eq!(c.recv(), Pdu::Closed);
}

#[test]
fn bad_initialization() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let with = |change: fn(&mut [u8; 128])| {
        let mut c = Client::raw(rig.addr);
        let mut req = ic_req();
        change(&mut req);
        c.send(&req);
        c
    };
    terminated(&mut with(|r| r[8] = 1), Fes::UnsupportedParameter, field::PFV);
    terminated(&mut with(|r| r[10] = 32), Fes::InvalidHeaderField, field::PDA);
    terminated(&mut with(|r| r[4] = 127), Fes::InvalidHeaderField, field::PLEN);
    terminated(&mut with(|r| r[4] = 129), Fes::InvalidHeaderField, field::PLEN);
    terminated(&mut with(|r| r[7] = 0x80), Fes::InvalidHeaderField, field::PLEN);
    terminated(&mut with(|r| r[2] = 64), Fes::InvalidHeaderField, field::HLEN);
    terminated(&mut with(|r| r[0] = 1), Fes::InvalidHeaderField, field::TYPE);
    terminated(&mut with(|r| r[0] = 0xff), Fes::InvalidHeaderField, field::TYPE);
    terminated(&mut with(|r| (r[0], r[2], r[4]) = (4, 72, 72)), Fes::SequenceError, 0);
    // A termination request from the host earns none.
    let mut c = with(|r| (r[0], r[2], r[4]) = (2, 24, 24));
    assert_eq!(c.recv(), Pdu::Closed);
    // A second and a late one.
    let mut c = Client::open(rig.addr, false, false);
    c.send(&ic_req());
    terminated(&mut c, Fes::SequenceError, 0);
    let mut c = rig.admin();
    c.send(&ic_req());
    terminated(&mut c, Fes::SequenceError, 0);
    drop(c);
    rig.wait_empty();
}

#[test]
fn silence_has_a_deadline() {
    let options = TransportOptions { connect_timeout_ms: 300, ..Default::default() };
    let rig = Rig::with(1, IdlePolicy::Interrupt, options);
    assert_eq!(Client::raw(rig.addr).recv(), Pdu::Closed, "no ICReq");
    let mut half = Client::raw(rig.addr);
    half.send(&ic_req()[..100]);
    assert_eq!(half.recv(), Pdu::Closed, "half an ICReq");
    let mut no_connect = Client::raw(rig.addr);
    no_connect.send(&ic_req());
    // The greeting may come too late on a slow machine.
    while no_connect.recv() != Pdu::Closed {}
    // Another target: who connects to this one has all the time.
    let options = TransportOptions { r2t_timeout_ms: 300, ..Default::default() };
    let rig = Rig::with(1, IdlePolicy::Interrupt, options);
    let admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, false);
    io.submit(&rw_sqe(Io::Write, 0, 16, Sgl::transport(8192)), &[]);
    assert!(matches!(io.recv(), Pdu::R2t { .. }));
    assert_eq!(io.recv(), Pdu::Closed, "R2T without an answer");
    let mut io = rig.io(&admin, 1, false, false);
    let half = io.capsule(&rw_sqe(Io::Write, 0, 8, Sgl::in_capsule(0, 4096)), &[0; 4096]);
    io.send(&half[..2000]);
    assert_eq!(io.recv(), Pdu::Closed, "half a capsule");
    // Half of a fused operation: the command fails, the queue goes on.
    let mut io = rig.io(&admin, 1, false, false);
    let half = rw_sqe(Io::Compare, 0, 1, Sgl::in_capsule(0, 512));
    io.submit(&fused(half, Cid(60), Fuse::First), &[0; 512]);
    assert_eq!(io.finish(Cid(60), &[]).0.status().code(), Status::ABORTED_MISSING_FUSED);
    let late = Sqe { opcode: Io::Write as u8, ..half };
    io.submit(&fused(late, Cid(61), Fuse::Second), &[1; 512]);
    assert_eq!(io.finish(Cid(61), &[]).0.status().code(), Status::ABORTED_FAILED_FUSED);
    assert_eq!(io.write(0, &[0; 512]), Status::SUCCESS);
    drop(io);
    wait(|| rig.target.qpairs(NQN).is_ok_and(|q| q.len() == 1));
    // 16 MiB of answers that nobody takes, more than the sockets hold.
    let mut io = rig.io(&admin, 1, false, false);
    let all = (0..128u16).flat_map(|cid| io.capsule(&Sqe { cid: cid.into(), ..read_sqe(0, 256) }, &[]));
    let all: Vec<u8> = all.collect();
    io.send(&all);
    wait(|| rig.target.qpairs(NQN).is_ok_and(|q| q.len() == 1));
    let mut io = rig.io(&admin, 1, false, false);
    assert!(io.read(0, 1).0.is_success(), "the controller lives on");
}

/// Commands that wait for their host do not keep a device.
#[test]
fn a_namespace_goes_whatever_hosts_owe_it() {
    let rig = Rig::new();
    let admin = rig.admin();
    let (mut half, mut write) = (rig.io(&admin, 1, false, false), rig.io(&admin, 2, false, false));
    let compare = rw_sqe(Io::Compare, 0, 1, Sgl::in_capsule(0, 512));
    half.submit(&fused(compare, Cid(60), Fuse::First), &[0; 512]);
    wait(|| rig.target.buffer_bytes() > 0);
    write.submit(&Sqe { cid: 61.into(), ..rw_sqe(Io::Write, 0, 16, Sgl::transport(8192)) }, &[]);
    let Pdu::R2t { ttag, .. } = write.recv() else { panic!("an R2T") };
    assert_eq!(rig.target.remove_ns(NQN, 1), Ok(()));
    assert_eq!(half.finish(Cid(60), &[]).0.status().code(), Status::INVALID_NAMESPACE);
    let part = DataPart { cid: Cid(61), offset: 0, len: 8192, last: true };
    let data = write.h2c_data(part, ttag, &[0; 8192]);
    write.send(&data);
    assert_eq!(write.finish(Cid(61), &[]).0.status().code(), Status::INVALID_NAMESPACE);
}

/// Where commands of an I/O queue have no data in their capsules, nobody brings any.
#[test]
fn no_more_in_a_capsule_than_the_queue_takes() {
    let options = TransportOptions { in_capsule_data_size: 0, ..Default::default() };
    let rig = Rig::with(1, IdlePolicy::Interrupt, options);
    let admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, false);
    let zeros = [0; 512];
    let (cqe, _) = io.run(rw_sqe(Io::Write, 0, 1, Sgl::transport(512)), &[], &zeros);
    assert_eq!(cqe.status(), Status::SUCCESS);
    io.submit(&rw_sqe(Io::Write, 0, 1, Sgl::in_capsule(0, 512)), &zeros);
    terminated(&mut io, Fes::InvalidHeaderField, field::PLEN);
}

#[test]
fn lengths_and_offsets_that_lie() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let admin = rig.admin();
    let lie = |change: &dyn Fn(&mut Vec<u8>), fes, fei| {
        let mut io = rig.io(&admin, 1, false, false);
        let sqe = rw_sqe(Io::Write, 0, 1, Sgl::in_capsule(0, 512));
        let mut pdu = io.capsule(&sqe, &[0; 512]);
        change(&mut pdu);
        io.send(&pdu);
        terminated(&mut io, fes, fei);
        drop(io);
        wait(|| rig.target.qpairs(NQN).is_ok_and(|q| q.len() == 1));
    };
    let field_error = Fes::InvalidHeaderField;
    lie(&|p| p[4..8].copy_from_slice(&u32::MAX.to_le_bytes()), field_error, field::PLEN);
    lie(&|p| p[4..8].copy_from_slice(&(72u32 + 4097).to_le_bytes()), field_error, field::PLEN);
    lie(&|p| p[4..8].copy_from_slice(&8u32.to_le_bytes()), field_error, field::PLEN);
    lie(&|p| p[4..8].copy_from_slice(&0u32.to_le_bytes()), field_error, field::PLEN);
    lie(&|p| p[2] = 71, field_error, field::HLEN);
    lie(&|p| p[3] = 64, field_error, field::PDO);
    lie(&|p| p[3] = 73, field_error, field::PDO);
    lie(&|p| p[1] = 1, field_error, field::FLAGS);
    lie(&|p| p[1] = 2, field_error, field::FLAGS);
    lie(&|p| p[0] = 8, field_error, field::TYPE);
    let mut io = rig.io(&admin, 1, false, false);
    assert!(io.read(0, 1).0.is_success());
}

#[test]
fn data_nobody_asked_for() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let admin = rig.admin();
    let attempt = |part: &dyn Fn(Cid, Ttag) -> (DataPart, Ttag), fes, fei| {
        let mut io = rig.io(&admin, 1, false, false);
        let cid = io.cid();
        let sqe = Sqe { cid: cid.0.into(), ..rw_sqe(Io::Write, 0, 32, Sgl::transport(16_384)) };
        io.submit(&sqe, &[]);
        let Pdu::R2t { ttag, len: 16_384, .. } = io.recv() else { panic!("an R2T") };
        let (part, ttag) = part(cid, ttag);
        let bytes = io.h2c_data(part, ttag, &vec![0; part.len as usize]);
        // The target may close before it has read all of it.
        let _ = io.stream.write_all(&bytes);
        terminated(&mut io, fes, fei);
        drop(io);
        wait(|| rig.target.qpairs(NQN).is_ok_and(|q| q.len() == 1));
    };
    let part = |cid, offset, len, last| DataPart { cid, offset, len, last };
    let bad = Fes::InvalidHeaderField;
    attempt(&|c, t| (part(c, 0, 16_384, true), Ttag(t.0 ^ 1)), bad, field::TTAG);
    attempt(&|c, _| (part(c, 0, 16_384, true), Ttag(u16::MAX)), bad, field::TTAG);
    attempt(&|c, t| (part(Cid(c.0 + 1), 0, 16_384, true), t), bad, field::CCCID);
    attempt(&|c, t| (part(c, 4096, 4096, false), t), bad, field::DATAO);
    attempt(&|c, t| (part(c, 0, 4096, true), t), bad, field::FLAGS);
    attempt(&|c, t| (part(c, 0, 16_384, false), t), bad, field::FLAGS);
    attempt(&|c, t| (part(c, 0, 16_388, true), t), Fes::OutOfRange, 0);
    attempt(&|c, t| (part(c, 16_384, 4, true), t), Fes::OutOfRange, 0);
    // Before any R2T, and again after the end: a stale tag.
    let mut io = rig.io(&admin, 1, false, false);
    let bytes = io.h2c_data(part(Cid(1), 0, 512, true), Ttag(0), &[0; 512]);
    io.send(&bytes);
    terminated(&mut io, bad, field::TTAG);
    drop(io);
    wait(|| rig.target.qpairs(NQN).is_ok_and(|q| q.len() == 1));
    let mut io = rig.io(&admin, 1, false, false);
    let cid = io.cid();
    io.submit(&Sqe { cid: cid.0.into(), ..rw_sqe(Io::Write, 0, 1, Sgl::transport(512)) }, &[]);
    let Pdu::R2t { ttag, .. } = io.recv() else { panic!("an R2T") };
    let bytes = io.h2c_data(part(cid, 0, 512, true), ttag, &[1; 512]);
    io.send(&bytes);
    assert_eq!(io.finish(cid, &[]).0.status(), Status::SUCCESS);
    io.send(&bytes);
    terminated(&mut io, bad, field::TTAG);
}

#[test]
fn digests() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let admin = rig.admin();
    // Data digests: the command fails, nothing else.
    let mut io = rig.io(&admin, 1, true, true);
    let data = pattern(0, 8, 1);
    assert_eq!(io.write(0, &data), Status::SUCCESS);
    let sqe = Sqe { cid: 70.into(), ..rw_sqe(Io::Write, 0, 8, Sgl::in_capsule(0, 4096)) };
    let mut pdu = io.capsule(&sqe, &pattern(0, 8, 2));
    *pdu.last_mut().expect("a digest") ^= 1;
    io.send(&pdu);
    assert_eq!(io.finish(Cid(70), &[]).0.status().code(), Status::TRANSIENT_TRANSPORT_ERROR);
    let sqe = Sqe { cid: 71.into(), ..rw_sqe(Io::Write, 0, 64, Sgl::transport(32_768)) };
    io.submit(&sqe, &[]);
    let Pdu::R2t { ttag, .. } = io.recv() else { panic!("an R2T") };
    for (offset, bad) in [(0, 1), (16_384, 0)] {
        let part = DataPart { cid: Cid(71), offset, len: 16_384, last: offset != 0 };
        let mut pdu = io.h2c_data(part, ttag, &[3; 16_384]);
        *pdu.last_mut().expect("a digest") ^= bad;
        io.send(&pdu);
    }
    assert_eq!(io.finish(Cid(71), &[]).0.status().code(), Status::TRANSIENT_TRANSPORT_ERROR);
    assert!(io.read(0, 8).1 == data, "neither was written");
    // Header digests: the end.
    for at in [8, 40, 71, 72] {
        let mut io = rig.io(&admin, 2, true, false);
        let mut pdu = io.capsule(&read_sqe(0, 1), &[]);
        pdu[at] ^= 0x10;
        let received = u32::from_le_bytes([pdu[72], pdu[73], pdu[74], pdu[75]]);
        io.send(&pdu);
        terminated(&mut io, Fes::HeaderDigest, received);
        drop(io);
        wait(|| rig.target.qpairs(NQN).is_ok_and(|q| q.len() == 2));
    }
    assert!(io.read(0, 8).1 == data, "the other queue lives");
}

#[test]
fn identifiers_twice_and_too_many_commands() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, false);
    // Two with the same identifier: the first waits for its data.
    let write = Sqe { cid: 5.into(), ..rw_sqe(Io::Write, 0, 16, Sgl::transport(8192)) };
    io.submit(&write, &[]);
    let Pdu::R2t { ttag, .. } = io.recv() else { panic!("an R2T") };
    io.submit(&Sqe { cid: 5.into(), ..read_sqe(0, 1) }, &[]);
    let Pdu::Response(cqe) = io.recv() else { panic!("a response") };
    assert_eq!(cqe.status().code(), Status::COMMAND_ID_CONFLICT);
    let part = DataPart { cid: Cid(5), offset: 0, len: 8192, last: true };
    let bytes = io.h2c_data(part, ttag, &pattern(0, 16, 1));
    io.send(&bytes);
    assert_eq!(io.finish(Cid(5), &[]).0.status(), Status::SUCCESS);
    assert!(io.read(0, 16).1 == pattern(0, 16, 1));
    // One more than the queue has entries.
    for i in 0..129u16 {
        io.submit(&Sqe { cid: (200 + i).into(), ..rw_sqe(Io::Write, 0, 16, Sgl::transport(8192)) }, &[]);
    }
    let mut asked = 0;
    loop {
        match io.recv() {
            Pdu::R2t { .. } => asked += 1,
            Pdu::Term { fes, .. } => break assert_eq!(fes, Fes::SequenceError as u16),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(asked, 128, "the queue's entries");
}

#[test]
fn connect_with_lies_in_its_data() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let attempt = |change: &dyn Fn(&mut [u8]), want: ConnectReject| {
        let mut c = Client::open(rig.addr, false, false);
        let mut data = connect_data(NQN, Cntlid::DYNAMIC);
        change(data.as_mut_bytes());
        let cid = c.cid();
        c.submit(&Sqe::from_view(&Connect::new(cid, Qid(0), 31, 0)), data.as_bytes());
        let cqe = c.finish(cid, &[]).0;
        assert_eq!((cqe.status(), cqe.dw0.get()), want.completion());
    };
    attempt(&|d| d[256..512].fill(b'x'), ConnectReject::Data(256));
    attempt(&|d| d[512..768].fill(b'x'), ConnectReject::Data(512));
    attempt(&|d| d[256] = 0, ConnectReject::Data(256));
    attempt(&|d| d[260] = 0xff, ConnectReject::Data(256));
    attempt(&|d| d[..16].fill(0), ConnectReject::Data(0));
    let mut c = Client::open(rig.addr, false, false);
    let mut short = Connect::new(Cid(1), Qid(0), 31, 0);
    short.sgl = Sgl::in_capsule(0, 512);
    c.submit(&Sqe::from_view(&short), &[0; 512]);
    assert_eq!(c.finish(Cid(1), &[]).0.status().code(), Status::DATA_SGL_LENGTH_INVALID);
    short.recfmt = 1.into();
    short.cid = 2.into();
    short.sgl = Sgl::in_capsule(0, 1024);
    c.submit(&Sqe::from_view(&short), connect_data(NQN, Cntlid::DYNAMIC).as_bytes());
    assert_eq!(c.finish(Cid(2), &[]).0.status(), ConnectReject::Format.completion().0);
}

#[test]
fn streams_cut_anywhere() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let admin = rig.admin();
    let mut io = rig.io(&admin, 1, true, true);
    let mut stream = Vec::new();
    for i in 0..6u16 {
        let sqe = rw_sqe(Io::Write, u64::from(i) * 2, 2, Sgl::in_capsule(0, 1024));
        stream.extend(io.capsule(&Sqe { cid: (50 + i).into(), ..sqe }, &pattern(u64::from(i) * 2, 2, 8)));
    }
    for step in [1, 7, 100, stream.len()] {
        for piece in stream.chunks(step) {
            io.send(piece);
        }
        for _ in 0..6 {
            let Pdu::Response(cqe) = io.recv() else { panic!("a response") };
            assert!(cqe.status().is_success());
        }
        assert!(io.read(0, 12).1 == pattern(0, 12, 8), "in pieces of {step}");
        assert_eq!(io.write(0, &vec![0; 512 * 12]), Status::SUCCESS);
    }
}

/// Regression class of CVE-2023-5178: a connection that ends just when something of it is in the making.
#[test]
fn connections_cut_at_every_moment() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let watch = AtomicBool::new(true);
    std::thread::scope(|s| {
        let good = s.spawn(|| {
            let admin = rig.admin();
            let mut io = rig.io(&admin, 1, false, false);
            let mut rounds = 0u64;
            while watch.load(Ordering::Relaxed) {
                let lba = rounds % 64 * 8;
                let data = pattern(lba, 8, rounds as u8);
                assert_eq!(io.write(lba, &data), Status::SUCCESS);
                assert!(io.read(lba, 8).1 == data);
                rounds += 1;
            }
            rounds
        });
        for round in 0..60 {
            drop(Client::raw(rig.addr));
            // Closing with bytes unread resets the connection.
            let mut c = Client::raw(rig.addr);
            c.send(&ic_req()[..round % 128]);
            drop(c);
            let mut c = Client::raw(rig.addr);
            c.send(&ic_req());
            drop(c);
            let mut c = Client::open(rig.addr, false, false);
            let connect = Sqe::from_view(&Connect::new(Cid(1), Qid(0), 31, 0));
            c.submit(&connect, connect_data(NQN, Cntlid::DYNAMIC).as_bytes());
            drop(c);
            let admin = rig.admin();
            let mut io = rig.io(&admin, 1, false, round % 2 == 0);
            for i in 0..64u16 {
                let lba = 2048 + u64::from(i) * 16;
                io.submit(&Sqe { cid: i.into(), ..read_sqe(lba, 128) }, &[]);
                io.submit(
                    &Sqe { cid: (100 + i).into(), ..rw_sqe(Io::Write, lba, 16, Sgl::transport(8192)) },
                    &[],
                );
            }
            match round % 3 {
                0 => drop(admin),
                1 => drop(io.recv()),
                _ => {}
            }
        }
        wait(|| rig.target.controllers(NQN).is_ok_and(|c| c.len() <= 1));
        watch.store(false, Ordering::Relaxed);
        assert!(good.join().expect("the good host saw no error") > 0);
    });
    rig.wait_empty();
    // What they left goes back: sockets, and buffers beyond the RAM disk's own.
    let fds = || std::fs::read_dir("/proc/self/fd").expect("proc").count();
    let before = fds();
    let in_use = memory::stats().in_use_bytes;
    for _ in 0..20 {
        let admin = rig.admin();
        let mut io = rig.io(&admin, 1, false, false);
        io.submit(&rw_sqe(Io::Write, 0, 256, Sgl::transport(131_072)), &[]);
        assert!(matches!(io.recv(), Pdu::R2t { .. }));
    }
    rig.wait_empty();
    // The kernel gives a watched socket back a moment after the connection's end. Other tests have sockets too.
    wait(|| memory::stats().in_use_bytes <= in_use + (8 << 20));
    assert!(fds() < before + 500, "{before} descriptors became {}", fds());
}

/// A regression: the end of the stream, seen together with the last bytes in front of it, was not looked for once those had
/// been read, and a half-done write kept its queue until its deadline a minute later.
#[test]
fn an_end_right_behind_the_bytes() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let admin = rig.admin();
    for round in 0..50 {
        let mut io = rig.io(&admin, 1, false, false);
        let cid = io.cid();
        io.submit(&Sqe { cid: cid.0.into(), ..rw_sqe(Io::Write, 0, 32, Sgl::transport(16_384)) }, &[]);
        let Pdu::R2t { ttag, .. } = io.recv() else { panic!("an R2T") };
        let part = DataPart { cid, offset: 0, len: 16_384, last: true };
        let bytes = io.h2c_data(part, ttag, &[1; 16_384]);
        io.send(&bytes[..9000 + round]);
        io.stream.shutdown(std::net::Shutdown::Write).expect("it is open");
        wait(|| rig.target.qpairs(NQN).is_ok_and(|q| q.len() == 1));
    }
}

/// Every opcode in every state of a controller, with whatever in the other fields: an answer, never a lost connection.
#[test]
fn every_opcode_in_every_state() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as u32
    };
    let mut spray = |c: &mut Client, skip: &[u8], expect: Option<Status>| {
        for opcode in (0..=255u8).filter(|o| !skip.contains(o)) {
            let mut sqe = Sqe::admin(Admin::Identify, Cid(0), Nsid(random() % 3));
            sqe.opcode = opcode;
            sqe.sgl = match random() % 3 {
                0 => Sgl::transport(4096),
                1 => Sgl::transport(0),
                _ => Sgl::in_capsule(0, 0),
            };
            sqe.cdw10 = (random() & 0xff).into();
            sqe.cdw11 = (random() & 0xf).into();
            sqe.cdw12 = (random() & 0x0200_0007).into();
            sqe.cdw13 = random().into();
            sqe.cdw14 = random().into();
            sqe.cdw15 = random().into();
            let cid = c.cid();
            sqe.cid = cid.0.into();
            c.submit(&sqe, &[]);
            let status = c.finish(cid, &[0; 4096]).0.status();
            if let Some(want) = expect {
                assert_eq!(status, want, "opcode {opcode:#x}");
            }
        }
    };
    let mut c = Client::open(rig.addr, false, false);
    spray(&mut c, &[], Some(Status::COMMAND_SEQUENCE_ERROR));
    assert_eq!(c.connect(NQN, 0, 32, Cntlid::DYNAMIC).status(), Status::SUCCESS);
    spray(&mut c, &[0x7f], None);
    c.enable();
    let cntlid = rig.target.controllers(NQN).expect("it exists")[0].cntlid;
    c.cntlid = Cntlid(cntlid);
    // Event requests wait: they are tested elsewhere.
    spray(&mut c, &[Admin::AsyncEventRequest as u8], None);
    let mut io = rig.io(&c, 1, false, false);
    for _ in 0..8 {
        spray(&mut io, &[], None);
    }
    assert_eq!(c.admin_in(Admin::Identify, 0, 1, 4096).0.status(), Status::SUCCESS);
}

/// A host that does not read its answers holds up nobody but itself, and finds them all when it does.
#[test]
fn a_reader_that_sleeps() {
    let rig = Rig::with(1, IdlePolicy::Interrupt, TransportOptions::default());
    let admin = rig.admin();
    let (mut slow, mut good) = (rig.io(&admin, 1, false, true), rig.io(&admin, 2, false, false));
    for i in 0..16 {
        assert_eq!(good.write(i * 256, &pattern(i * 256, 256, 7)), Status::SUCCESS);
    }
    // 16 MiB of answers, more than the sockets hold.
    for i in 0..128u16 {
        slow.submit(&Sqe { cid: i.into(), ..read_sqe(u64::from(i % 16) * 256, 256) }, &[]);
    }
    for _ in 0..200 {
        assert!(good.read(0, 8).0.is_success());
    }
    let mut seen = [false; 128];
    for _ in 0..128 {
        let Pdu::Data { cid, bytes, .. } = slow.recv() else { panic!("data") };
        assert!(bytes == pattern(u64::from(cid.0 % 16) * 256, 256, 7));
        assert!(matches!(slow.recv(), Pdu::Response(c) if c.cid() == cid && c.status().is_success()));
        assert!(!std::mem::replace(&mut seen[usize::from(cid.0)], true), "answered twice");
    }
    // One that never reads, and sends more than it may: it is ended.
    let flood: Vec<u8> =
        (0..2000u16).flat_map(|i| slow.capsule(&Sqe { cid: i.into(), ..read_sqe(0, 256) }, &[])).collect();
    slow.stream.set_write_timeout(Some(Duration::from_millis(100))).expect("time-out");
    let _ = slow.stream.write_all(&flood);
    assert!(good.read(0, 8).0.is_success());
    drop(slow);
    wait(|| rig.target.qpairs(NQN).is_ok_and(|q| q.len() == 2));
}
