//! More of what hosts can do wrong, at random and against models of what is right; a host that behaves verifies its data
//! all the while. Seeds are printed when a test fails.

mod common;

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::witness::Witness;
use common::*;
use cryptfold_nvmf_spec::opcode::{Admin, Io};
use cryptfold_nvmf_spec::pdu::build::{self, DataPart};
use cryptfold_nvmf_spec::pdu::{Fes, field};
use cryptfold_nvmf_spec::property::Property;
use cryptfold_nvmf_spec::{Cid, Cntlid, Nsid, Sgl, Sqe, Status, Ttag};
use cryptfold_nvmf_target::{NsOptions, TransportOptions};
use cryptfold_reactor::{IdlePolicy, memory};

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

fn queues(rig: &Rig, n: usize) {
    wait(|| rig.target.qpairs(NQN).is_ok_and(|q| q.len() == n));
}

/// Row 4: tags of other commands, of commands that are done, and 0.
#[test]
fn tags_of_other_commands() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let admin = rig.admin();
    let part = |cid| DataPart { cid: Cid(cid), offset: 0, len: 16_384, last: true };
    // The tag of the one with the name of the other, both ways.
    for swap in [false, true] {
        let mut io = rig.io(&admin, 1, false, false);
        let mut tags = [Ttag(0); 2];
        for cid in 0..2u16 {
            let sqe = rw_sqe(Io::Write, u64::from(cid) * 32, 32, Sgl::transport(16_384));
            io.submit(&Sqe { cid: cid.into(), ..sqe }, &[]);
            let Pdu::R2t { ttag, .. } = io.recv() else { panic!("an R2T") };
            tags[usize::from(cid)] = ttag;
        }
        assert_ne!(tags[0], tags[1]);
        let pdu = io.h2c_data(part(u16::from(swap)), tags[usize::from(!swap)], &[1; 16_384]);
        // The target may close before it has read all of it.
        let _ = io.stream.write_all(&pdu);
        let Pdu::Term { fes, fei, .. } = io.recv() else { panic!("a termination request") };
        assert_eq!((fes, fei), (Fes::InvalidHeaderField as u16, field::CCCID));
        drop(io);
        queues(&rig, 1);
    }
    // Every tag there may be, while a read (no tag) is under way.
    rig.slow(FOR_EVER);
    for tag in [0, 1, 2, 127, 128, 0x7fff, 0x8000, u16::MAX] {
        let mut io = rig.io(&admin, 1, false, false);
        io.submit(&Sqe { cid: 0.into(), ..read_sqe(0, 32) }, &[]);
        let pdu = io.h2c_data(part(0), Ttag(tag), &[1; 16_384]);
        let _ = io.stream.write_all(&pdu);
        let Pdu::Term { fes, fei, .. } = io.recv() else { panic!("a termination request") };
        assert_eq!((fes, fei), (Fes::InvalidHeaderField as u16, field::TTAG), "tag {tag}");
        drop(io);
        queues(&rig, 1);
    }
}

/// What a host may send next for one command, as the specification has it: the model of the legal sequence.
struct Asked {
    cid: Cid,
    ttag: Ttag,
    next: u32,
    end: u32,
}

impl Asked {
    fn legal(&self, part: DataPart, ttag: Ttag) -> bool {
        let end = u64::from(part.offset) + u64::from(part.len);
        part.cid == self.cid
            && ttag == self.ttag
            && part.offset == self.next
            && part.len > 0
            && end <= u64::from(self.end)
            && part.last == (end == u64::from(self.end))
    }
}

/// One write in random parts, one of them perhaps wrong. Whether it was.
fn one_sequence(rig: &Rig, io: &mut Client, rng: &mut Rng, lba: u64) -> bool {
    let blocks = 1 + rng.below(256) as u32;
    let data = pattern(lba, blocks, rng.below(256) as u8);
    let before = rig_read(rig, lba, blocks);
    let cid = io.cid();
    let total = data.len() as u32;
    io.submit(&Sqe { cid: cid.0.into(), ..rw_sqe(Io::Write, lba, blocks, Sgl::transport(total)) }, &[]);
    let Pdu::R2t { ttag, offset: 0, len, .. } = io.recv() else { panic!("an R2T") };
    assert_eq!(len, total);
    let mut asked = Asked { cid, ttag, next: 0, end: total };
    while asked.next < total {
        // Parts are whole dwords, as padding and digests like them.
        let len = (4 + 4 * rng.below(u64::from(total - asked.next) / 4) as u32).min(total - asked.next);
        let mut part = DataPart { cid, offset: asked.next, len, last: asked.next + len == total };
        let mut tag = ttag;
        match rng.below(250) {
            0 => part.offset = part.offset.wrapping_add(4),
            1 => part.offset = part.offset.wrapping_sub(4),
            2 => part.offset = 4 * rng.below(1 << 30) as u32,
            3 => part.last = !part.last,
            4 => part.len = total - asked.next + 4 + 4 * rng.below(64) as u32,
            5 => tag = Ttag(rng.below(1 << 16) as u16),
            6 => part.cid = Cid(rng.below(1 << 16) as u16),
            7 => part.offset = total,
            _ => {}
        }
        let from = (part.offset as usize).min(data.len());
        let mut bytes = data[from..(from + part.len as usize).min(data.len())].to_vec();
        bytes.resize(part.len as usize, 0xee);
        let pdu = io.h2c_data(part, tag, &bytes);
        let legal = asked.legal(part, tag);
        // A target that has seen enough may close before it has read all of it.
        let sent = io.stream.write_all(&pdu);
        if !legal {
            let answer = io.recv();
            assert!(matches!(answer, Pdu::Term { .. } | Pdu::Closed), "{part:?} {tag:?}: {answer:?}");
            assert!(rig_read(rig, lba, blocks) == before, "half a write was written");
            return true;
        }
        sent.expect("the target takes what is legal");
        asked.next += len;
    }
    assert_eq!(io.finish(cid, &[]).0.status(), Status::SUCCESS);
    assert!(io.read(lba, blocks).1 == data);
    false
}

/// What is on the disk, asked on a connection of its own.
fn rig_read(rig: &Rig, lba: u64, blocks: u32) -> Vec<u8> {
    let (_admin, mut io) = rig.host(77);
    let (status, data) = io.read(lba, blocks);
    assert_eq!(status, Status::SUCCESS);
    data
}

/// Row 5: sequences of H2CData, right and wrong, against the model. A wrong one ends its connection and writes nothing.
#[test]
fn data_sequences_against_a_model() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let (mut right, mut wrong) = (0, 0);
    for seed in 0..40u64 {
        let mut rng = Rng(seed);
        let (_admin, mut io) = rig.host(1);
        for n in 0..12 {
            if one_sequence(&rig, &mut io, &mut rng, n * 256) {
                wrong += 1;
                break;
            }
            right += 1;
        }
        print!("seed {seed} ");
    }
    assert!(right > 40 && wrong > 15, "{right} right, {wrong} wrong");
}

/// Row 6: the header digest of every PDU that a host sends after the initialization, each bit of it and of what it covers.
#[test]
fn header_digests_of_data() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let admin = rig.admin();
    for at in [8, 10, 12, 16, 20, 23, 24, 27] {
        let mut io = rig.io(&admin, 1, true, true);
        let cid = io.cid();
        io.submit(&Sqe { cid: cid.0.into(), ..rw_sqe(Io::Write, 0, 16, Sgl::transport(8192)) }, &[]);
        let Pdu::R2t { ttag, .. } = io.recv() else { panic!("an R2T") };
        let mut pdu = io.h2c_data(DataPart { cid, offset: 0, len: 8192, last: true }, ttag, &[1; 8192]);
        pdu[at] ^= 4;
        let received = u32::from_le_bytes([pdu[24], pdu[25], pdu[26], pdu[27]]);
        let _ = io.stream.write_all(&pdu);
        let Pdu::Term { fes, fei, .. } = io.recv() else { panic!("a termination request") };
        assert_eq!((fes, fei), (Fes::HeaderDigest as u16, received), "byte {at}");
        drop(io);
        queues(&rig, 1);
    }
}

/// Row 7: every descriptor type with every length: only the right ones succeed, and no length makes the target allocate
/// before it has been checked.
#[test]
fn every_descriptor_with_every_length() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let mut admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, false);
    let lengths = [0, 1, 511, 512, 513, 4095, 4096, 4097, 131_072, 131_073, 1 << 31, u32::MAX - 3, u32::MAX];
    let mut most = 0;
    for id in 0..=255u8 {
        for len in lengths {
            let mut sgl = Sgl::transport(len);
            sgl.id = id;
            let may = |want| id == 0x5a && len == want;
            for (sqe, ok) in [
                (rw_sqe(Io::Read, 0, 1, sgl), may(512)),
                (rw_sqe(Io::Write, 0, 1, sgl), may(512)),
                (rw_sqe(Io::Compare, 9, 1, sgl), may(512)),
                (Sqe { sgl, cdw10: 1.into(), ..Sqe::io(Io::DatasetManagement, Cid(0), Nsid(1)) }, false),
            ] {
                // Two ranges of nothing are legal advice, in up to 256 ranges of room.
                let advice =
                    sqe.opcode == Io::DatasetManagement as u8 && id == 0x5a && (32..=4096).contains(&len);
                let data = vec![0; if ok || advice { len as usize } else { 0 }];
                let status = io.run(sqe, &[], &data).0.status();
                assert_eq!(
                    status.is_success(),
                    ok || advice,
                    "{:#x} with {id:#x} and {len}: {status}",
                    sqe.opcode
                );
            }
            let mut identify = Sqe::admin(Admin::Identify, Cid(0), Nsid(0));
            (identify.cdw10, identify.sgl) = (1.into(), sgl);
            let status = admin.run(identify, &[], &[]).0.status();
            assert!(id == 0x5a || !status.is_success(), "Identify with {id:#x} and {len}: {status}");
            most = most.max(rig.target.buffer_bytes());
        }
    }
    assert!(most <= 16 << 20, "{most} bytes for commands of 512");
    assert!(memory::stats().in_use_bytes < 512 << 20, "{:?}", memory::stats());
}

/// Row 17: queues full of slow commands, and at the same time aborts of any of them, resets, namespaces that go and come,
/// hosts that disconnect. Everything ends; nothing is answered twice.
#[test]
fn aborts_resets_and_removals_race() {
    let rig = Rig::with(2, IdlePolicy::Interrupt, TransportOptions::default());
    let good = Witness::beside(&rig);
    rig.slow(Duration::from_millis(3));
    let stop = AtomicBool::new(false);
    let lives = [const { std::sync::atomic::AtomicU64::new(0) }; 3];
    std::thread::scope(|s| {
        let hosts: Vec<_> = (20u8..)
            .zip(&lives)
            .map(|(host, lives)| {
                let (rig, stop) = (&rig, &stop);
                s.spawn(move || {
                    let mut rng = Rng(u64::from(host) - 19);
                    while !stop.load(Ordering::Relaxed) {
                        one_life(rig, &mut rng, host);
                        lives.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let lived = || lives.iter().all(|n| n.load(Ordering::Relaxed) > 2) && good.rounds() > 10;
        let mut round = 0;
        while (round < 25 || !lived()) && !hosts.iter().any(|h| h.is_finished()) {
            round += 1;
            std::thread::sleep(Duration::from_millis(20));
            rig.target.remove_ns(NQN, 1).expect("it is there");
            if round % 3 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
            let ns = NsOptions { bdev_name: "slow".into(), ..Default::default() };
            assert_eq!(rig.target.add_ns(NQN, &ns), Ok(1), "the device came back from the removal");
        }
        stop.store(true, Ordering::Relaxed);
    });
    rig.wait_empty();
    wait(|| rig.target.buffer_bytes() < 1 << 20);
}

/// A host that fills its queue, aborts at random, and ends in one of four ways.
fn one_life(rig: &Rig, rng: &mut Rng, host: u8) {
    let mut admin = Client::open(rig.addr, false, false);
    (admin.hostid, admin.hostnqn) = ([host; 16], format!("nqn.2024-01.io.cryptfold:racer{host}"));
    assert_eq!(admin.connect(NQN, 0, 32, Cntlid::DYNAMIC).status(), Status::SUCCESS);
    admin.enable();
    let info = rig.target.controllers(NQN).expect("the subsystem is there");
    let own = info.iter().filter(|c| c.hostnqn == admin.hostnqn).map(|c| c.cntlid).max();
    admin.cntlid = Cntlid(own.expect("this one"));
    let mut io = Client::open(rig.addr, false, false);
    (io.hostid, io.hostnqn) = (admin.hostid, admin.hostnqn.clone());
    assert_eq!(io.connect(NQN, 1, 128, admin.cntlid).status(), Status::SUCCESS);
    const COMMANDS: u16 = 40;
    for n in 0..COMMANDS {
        let lba = rng.below(2000);
        let sqe = if rng.below(2) == 0 {
            read_sqe(lba, 8)
        } else {
            rw_sqe(Io::WriteZeroes, lba, 8, Sgl::transport(0))
        };
        io.submit(&Sqe { cid: (500 + n).into(), ..sqe }, &[]);
    }
    for _ in 0..4 {
        let mut abort = Sqe::admin(Admin::Abort, Cid(0), Nsid(0));
        abort.cdw10 = (1 | (500 + rng.below(COMMANDS.into()) as u32) << 16).into();
        assert!(admin.run(abort, &[], &[]).0.status().is_success());
    }
    match rng.below(4) {
        0 => drop(admin),
        1 => assert!(admin.set(Property::Cc, 0).status().is_success()),
        2 => assert!(admin.set(Property::Cc, 0x0046_4001).status().is_success()),
        _ => {
            let mut answered = [false; COMMANDS as usize];
            for _ in 0..COMMANDS {
                let cid = loop {
                    match io.recv() {
                        Pdu::Data { .. } => {}
                        Pdu::Response(cqe) => break cqe.cid().0,
                        other => panic!("{other:?}"),
                    }
                };
                assert!(!std::mem::replace(&mut answered[usize::from(cid - 500)], true), "answered twice");
            }
        }
    }
}

/// Row 2: the greeting and Connect cut at every place, by FIN and by RST.
#[test]
fn connections_reset_within_greeting_and_connect() {
    let rig = Rig::new();
    let _good = Witness::beside(&rig);
    let mut ic = [0; 128];
    let n = build::ic_req(&mut ic, 0, false, false, 0).expect("it fits");
    assert_eq!(n, 128);
    let mut script = ic.to_vec();
    let c = Client::raw(rig.addr);
    let connect = cryptfold_nvmf_spec::fabrics::Connect::new(Cid(1), cryptfold_nvmf_spec::Qid(0), 31, 0);
    let data = connect_data(NQN, Cntlid::DYNAMIC);
    script.extend(c.capsule(&Sqe::from_view(&connect), zerocopy::IntoBytes::as_bytes(&data)));
    drop(c);
    for cut in (0..script.len()).step_by(31).chain([127, 128, 129, script.len() - 1, script.len()]) {
        for unread in [false, true] {
            let mut c = Client::raw(rig.addr);
            c.send(&script[..cut]);
            // Closing with an answer unread makes it a reset.
            if unread && cut >= 128 {
                assert_eq!(c.stream.peek(&mut [0]).expect("an answer"), 1);
            }
            drop(c);
        }
    }
    rig.wait_empty();
}
