//! What one host can take from the others: nothing. Several R2Ts, memory, connections, fairness.

mod common;

use std::time::{Duration, Instant};

use common::*;
use cryptfold_nvmf_auth::Secret;
use cryptfold_nvmf_spec::opcode::Io;
use cryptfold_nvmf_spec::pdu::build::{self, DataPart};
use cryptfold_nvmf_spec::pdu::{Fes, field};
use cryptfold_nvmf_spec::{Cid, Cntlid, Sgl, Sqe, Status};
use cryptfold_nvmf_target::{HostAccess, Named, TransportOptions};
use cryptfold_reactor::IdlePolicy;

/// An I/O queue whose host takes so many R2Ts of a command at once.
fn with_r2ts(rig: &Rig, admin: &Client, qid: u16, r2ts: u32) -> Client {
    let mut c = Client::raw(rig.addr);
    let mut buf = [0; 128];
    let n = build::ic_req(&mut buf, 0, false, false, r2ts - 1).expect("it fits");
    c.send(&buf[..n]);
    assert!(matches!(c.recv(), Pdu::IcResp { .. }));
    assert_eq!(c.connect(NQN, qid, 128, admin.cntlid).status(), Status::SUCCESS);
    c
}

fn large() -> TransportOptions {
    TransportOptions { max_io_size: 1 << 20, ..Default::default() }
}

#[test]
fn large_writes_have_several_requests_as_many_as_the_host_takes() {
    let rig = Rig::with(1, IdlePolicy::Interrupt, large());
    let admin = rig.admin();
    const R2T: u32 = 128 << 10;
    for (qid, r2ts) in [(1, 1), (2, 3), (3, 1000)] {
        let mut io = with_r2ts(&rig, &admin, qid, r2ts);
        let bytes = 9 * 65_536 + 512;
        let data = pattern(0, bytes / 512, qid as u8);
        let sqe = Sqe { cid: 60.into(), ..rw_sqe(Io::Write, 0, bytes / 512, Sgl::transport(bytes)) };
        io.submit(&sqe, &[]);
        let (mut asked, mut sent) = (std::collections::VecDeque::new(), 0);
        let mut most = 0;
        loop {
            while asked.len() < r2ts.min(5) as usize
                && sent + asked.iter().map(|r: &(_, u32)| r.1).sum::<u32>() < bytes
            {
                let Pdu::R2t { cid: Cid(60), ttag, offset, len } = io.recv() else { panic!("an R2T") };
                assert_eq!(offset, sent + asked.iter().map(|r: &(_, u32)| r.1).sum::<u32>());
                assert!(len == R2T || offset + len == bytes);
                asked.push_back((ttag, len));
            }
            most = most.max(asked.len());
            let Some((ttag, len)) = asked.pop_front() else { break };
            // In two parts each.
            for (at, n) in [(sent, len / 2), (sent + len / 2, len - len / 2)] {
                let part = DataPart { cid: Cid(60), offset: at, len: n, last: at + n == sent + len };
                let pdu = io.h2c_data(part, ttag, &data[at as usize..(at + n) as usize]);
                io.send(&pdu);
            }
            sent += len;
        }
        assert_eq!(io.finish(Cid(60), &[]).0.status(), Status::SUCCESS);
        assert_eq!(most, (r2ts.min(5)) as usize);
        for (n, want) in data.chunks(131_072).enumerate() {
            assert!(io.read(n as u64 * 256, want.len() as u32 / 512).1 == want, "{r2ts} R2Ts, piece {n}");
        }
    }
}

#[test]
fn data_over_the_end_of_a_request() {
    let rig = Rig::with(1, IdlePolicy::Interrupt, large());
    let admin = rig.admin();
    let attempt = |r2ts, offset, len, last, fes, fei| {
        let mut io = with_r2ts(&rig, &admin, 1, r2ts);
        io.submit(&Sqe { cid: 60.into(), ..rw_sqe(Io::Write, 0, 1024, Sgl::transport(524_288)) }, &[]);
        let Pdu::R2t { ttag, .. } = io.recv() else { panic!("an R2T") };
        for _ in 1..r2ts {
            assert!(matches!(io.recv(), Pdu::R2t { .. }));
        }
        let part = DataPart { cid: Cid(60), offset, len, last };
        let pdu = io.h2c_data(part, ttag, &vec![0; len as usize]);
        let _ = std::io::Write::write_all(&mut io.stream, &pdu);
        let Pdu::Term { fes: got, fei: at, .. } = io.recv() else { panic!("a termination request") };
        assert_eq!((got, at), (fes as u16, fei));
        drop(io);
        wait(|| rig.target.qpairs(NQN).is_ok_and(|q| q.len() == 1));
    };
    attempt(1, 0, 131_076, true, Fes::OutOfRange, 0);
    attempt(2, 0, 131_076, true, Fes::InvalidHeaderField, u32::from(field::FLAGS as u16));
    attempt(2, 0, 131_072, false, Fes::InvalidHeaderField, u32::from(field::FLAGS as u16));
    attempt(2, 131_072, 4, false, Fes::InvalidHeaderField, u32::from(field::DATAO as u16));
}

/// A host that asks for much and takes nothing holds no more than its share; others go on, and so does it.
#[test]
fn memory_has_limits() {
    let options = TransportOptions { max_buffer_mib: 8, max_buffer_mib_per_host: 4, ..Default::default() };
    let rig = Rig::with(2, IdlePolicy::Interrupt, options);
    let (greedy_admin, _) = rig.host(1);
    let mut greedy: Vec<Client> = (2..6)
        .map(|qid| {
            let mut io = Client::open(rig.addr, false, false);
            (io.hostid, io.hostnqn) = (greedy_admin.hostid, greedy_admin.hostnqn.clone());
            assert_eq!(io.connect(NQN, qid, 128, greedy_admin.cntlid).status(), Status::SUCCESS);
            io
        })
        .collect();
    // 4 queues x 100 commands x 128 KiB = 51 MB, half of them reads whose data nobody takes, half unanswered requests.
    for io in &mut greedy {
        for cid in 0..100u16 {
            let sqe = if cid % 2 == 0 {
                read_sqe(0, 256)
            } else {
                rw_sqe(Io::Write, 0, 256, Sgl::transport(131_072))
            };
            io.submit(&Sqe { cid: cid.into(), ..sqe }, &[]);
        }
    }
    let (end, mut most, mut rounds) = (Instant::now() + PATIENCE, 0, 0);
    let (_admin, mut io) = rig.host(2);
    while rounds < 200 || most < 3 << 20 {
        assert_eq!(io.write(0, &pattern(0, 256, 1)), Status::SUCCESS);
        assert!(io.read(0, 256).0.is_success());
        most = most.max(rig.target.buffer_bytes());
        rounds += 1;
        assert!(most <= 8 << 20, "{most} bytes");
        assert!(Instant::now() < end, "the limit was never near: {most} bytes, {rounds} rounds");
    }
    // The greedy one gets everything it asked for once it takes it.
    for io in &mut greedy {
        let mut done = 0;
        while done < 100 {
            match io.recv() {
                Pdu::R2t { cid, ttag, len, .. } => {
                    let pdu = io.h2c_data(
                        DataPart { cid, offset: 0, len, last: true },
                        ttag,
                        &vec![1; len as usize],
                    );
                    io.send(&pdu);
                }
                Pdu::Response(cqe) => {
                    assert_eq!(cqe.status(), Status::SUCCESS);
                    done += 1;
                }
                Pdu::Data { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
    drop((greedy, greedy_admin, io, _admin));
    rig.wait_empty();
    wait(|| rig.target.buffer_bytes() == 0);
}

#[test]
fn connections_have_limits() {
    let options = TransportOptions { max_connections: 8, max_connections_per_host: 4, ..Default::default() };
    let rig = Rig::with(1, IdlePolicy::Interrupt, options);
    let (admin, _first) = rig.host(1);
    let mut more = Vec::new();
    for qid in 2..=4 {
        let mut io = Client::open(rig.addr, false, false);
        (io.hostid, io.hostnqn) = (admin.hostid, admin.hostnqn.clone());
        let status = io.connect(NQN, qid, 128, admin.cntlid).status().code();
        let want = if qid < 4 { Status::SUCCESS } else { Status::CONNECT_CONTROLLER_BUSY };
        assert_eq!(status, want, "queue {qid}");
        more.push(io);
    }
    drop(more.pop());
    // Others still find room, until there is none for anybody: whoever is in service stays.
    let (_second_admin, _second) = rig.host(2);
    let (_third_admin, _third) = rig.host(3);
    let mut refused = Client::raw(rig.addr);
    assert_eq!(refused.recv(), Pdu::Closed);
    assert_eq!((rig.target.door().connections, rig.target.door().refused), (8, 1));
    drop(more);
    wait(|| rig.target.qpairs(NQN).is_ok_and(|q| q.len() == 6));
    rig.host(4);
}

/// What holds a place and does nothing: a socket, a greeting, a host that has to authenticate, one that only asks what there is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Idler {
    Silent,
    Greeted,
    Unproven,
    Discovery,
}

/// Whoever reaches the port can take all places; it once kept everybody else out until the deadlines passed. Now a host that connects
/// takes the oldest of them, in whatever state it is, and nothing happens to hosts in service.
#[test]
fn idle_connections_make_room_for_hosts() {
    const HOUR: u32 = 3_600_000;
    const PLACES: u32 = 16;
    for idler in [Idler::Silent, Idler::Greeted, Idler::Unproven, Idler::Discovery] {
        let options = TransportOptions {
            max_connections: PLACES,
            connect_timeout_ms: HOUR,
            auth_timeout_ms: HOUR,
            ..Default::default()
        };
        let rig = Rig::with(2, IdlePolicy::Interrupt, options);
        let secret = Secret::new(&[5; 32], None).expect("32 bytes");
        let key = Named { name: "key".into(), key: secret };
        let access = HostAccess { dhchap: Some(key), ..Default::default() };
        rig.target.add_host(NQN, HOST, access).expect("a new host");
        let (_admin, mut io) = rig.host(1);
        let idle = || {
            let mut c = match idler {
                Idler::Silent => return Client::raw(rig.addr),
                _ => Client::open(rig.addr, false, false),
            };
            let subsystem = if idler == Idler::Discovery { DISCOVERY } else { NQN };
            if idler != Idler::Greeted {
                assert_eq!(c.connect(subsystem, 0, 32, Cntlid::DYNAMIC).status(), Status::SUCCESS);
            }
            c
        };
        // Three times as many as there are places.
        let mut crowd: Vec<Client> = (0..3 * PLACES).map(|_| idle()).collect();
        let (_second_admin, mut second) = rig.host(2);
        // The oldest went, and two more for the queues of the second host; the youngest are there.
        let stay = PLACES as usize - 4;
        let gone = crowd.len() - stay;
        for c in &mut crowd[..gone] {
            assert_eq!(c.recv(), Pdu::Closed, "{idler:?}");
        }
        wait(|| rig.target.door().connections == PLACES);
        let door = rig.target.door();
        assert_eq!(
            (door.unauthenticated as usize, door.displaced as usize, door.refused),
            (stay, gone, 0),
            "{idler:?}"
        );
        for c in &mut crowd[gone..] {
            c.stream.set_nonblocking(true).expect("set");
            let open = c.stream.peek(&mut [0]).expect_err("nothing is sent and nothing closed");
            assert_eq!(open.kind(), std::io::ErrorKind::WouldBlock, "{idler:?}");
        }
        for io in [&mut io, &mut second] {
            assert_eq!(io.write(0, &pattern(0, 8, 1)), Status::SUCCESS, "{idler:?}");
        }
        drop(crowd);
        wait(|| rig.target.door().connections == 4);
    }
}

/// One reactor, two hosts with queues full of large commands: another one's small reads are served all the while. How often is
/// counted in the simulator (`simulated.rs`); the times here are for people.
#[test]
fn a_greedy_host_does_not_starve_another() {
    let rig = Rig::with(1, IdlePolicy::Interrupt, TransportOptions::default());
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (_admin, mut io) = rig.host(1);
    let latencies = |io: &mut Client, n: usize| {
        let mut all: Vec<Duration> = (0..n)
            .map(|_| {
                let start = Instant::now();
                assert!(io.read(0, 8).0.is_success());
                start.elapsed()
            })
            .collect();
        all.sort_unstable();
        (all[n / 2], all[n * 99 / 100])
    };
    let alone = latencies(&mut io, 500);
    let served = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = || served.load(std::sync::atomic::Ordering::Relaxed);
    let greedy: Vec<_> = (0..2u16)
        .map(|n| {
            let (admin, mut io) = rig.host(10 + n as u8);
            let (stop, served) = (stop.clone(), served.clone());
            std::thread::spawn(move || {
                for cid in 0..120u16 {
                    io.submit(&Sqe { cid: cid.into(), ..read_sqe(0, 256) }, &[]);
                }
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    if let Pdu::Response(cqe) = io.recv() {
                        served.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        io.submit(&Sqe { cid: cqe.cid().0.into(), ..read_sqe(0, 256) }, &[]);
                    }
                }
                drop(admin);
            })
        })
        .collect();
    wait(|| count() > 240);
    let before = count();
    let crowded = latencies(&mut io, 500);
    wait(|| count() > before + 240);
    let commands = count() - before;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    greedy.into_iter().for_each(|g| g.join().expect("it ends"));
    println!("4 KiB reads, p50 and p99: alone {alone:?}, beside {commands} reads of 128 KiB {crowded:?}");
}
