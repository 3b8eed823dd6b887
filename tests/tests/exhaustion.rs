//! What runs out: connections, descriptors, memory, hosts that are stopped. The real program, with a host that verifies its
//! data all the while.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cryptfold_nvmf_spec::fabrics::{Connect, PropertyCommand};
use cryptfold_nvmf_spec::opcode::Io;
use cryptfold_nvmf_spec::pdu::build::DataPart;
use cryptfold_nvmf_spec::property::Property;
use cryptfold_nvmf_spec::sqe::RwControl;
use cryptfold_nvmf_spec::{Cid, Cntlid, Nsid, Qid, Sgl, Sqe, Ttag};
use cryptfold_tests::fuzz::commands::{self, Geometry, Identity};
use cryptfold_tests::fuzz::good::{Good, Model};
use cryptfold_tests::fuzz::host::{End, Host, PATIENCE, Pdu};
use cryptfold_tests::kill::{NQN, Place, Program, find_or_build};
use serde_json::{Value, json};

const GOOD_NQN: &str = "nqn.2026-01.io.cryptfold:good";
const GOOD: Geometry = Geometry { blocks: 4096, block_bytes: 512 };

fn configuration(_: &Path, port: u16) -> Value {
    limited(port, 4096, 2048)
}

/// What hosts can make it hold, in MiB.
const CEILING_MIB: u64 = 32;

fn tight(_: &Path, port: u16) -> Value {
    limited(port, CEILING_MIB, CEILING_MIB)
}

fn limited(port: u16, all_mib: u64, host_mib: u64) -> Value {
    let call = |method: &str, params: Value| json!({"method": method, "params": params});
    let address =
        json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()});
    let mut bdev = Vec::new();
    // Nobody is let in because somebody else's time is over.
    let transport = json!({"trtype": "TCP", "max_connections_per_host": 4096, "min_kato": 1000, "kas": 1, "connect_timeout_ms": 3_600_000,
        "max_buffer_mib": all_mib, "max_buffer_mib_per_host": host_mib, "r2t_timeout_ms": 600_000});
    let mut nvmf = vec![call("nvmf_create_transport", transport)];
    for (name, nqn) in [("ram", NQN), ("good", GOOD_NQN)] {
        bdev.push(call("bdev_malloc_create", json!({"name": name, "num_blocks": 4096, "block_size": 512})));
        nvmf.push(call("nvmf_create_subsystem", json!({"nqn": nqn, "allow_any_host": true})));
        nvmf.push(call("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": {"bdev_name": name}})));
        nvmf.push(call("nvmf_subsystem_add_listener", json!({"nqn": nqn, "listen_address": address})));
    }
    json!({"subsystems": [{"subsystem": "bdev", "config": bdev}, {"subsystem": "nvmf", "config": nvmf}]})
}

/// Runs `abuse` against a target of its own while a host verifies its data; both must be content.
fn beside_a_good_host(abuse: impl FnOnce(&Program, SocketAddr, &AtomicU64)) {
    beside(configuration, abuse);
}

fn beside(configuration: fn(&Path, u16) -> Value, abuse: impl FnOnce(&Program, SocketAddr, &AtomicU64)) {
    let path = find_or_build().unwrap_or_else(|e| panic!("{e}"));
    let dir = tempfile::tempdir().expect("a directory");
    let place = Place::prepare(&path, dir.path(), 4096, configuration).unwrap_or_else(|e| panic!("{e}"));
    let program = place.start().unwrap_or_else(|e| panic!("{e}"));
    let addr = SocketAddr::from(([127, 0, 0, 1], place.port()));
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|s| {
        let good = s.spawn(|| -> Result<(), String> {
            let mut model = Model::new(GOOD, 1);
            let mut good = Good::connect(addr, GOOD_NQN)?;
            while !stop.load(Ordering::Relaxed) {
                good.round(&mut model)?;
                rounds.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
            good.all(&model)
        });
        wait(|| rounds.load(Ordering::Relaxed) > 0 || good.is_finished());
        let result =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| abuse(&program, addr, &rounds)));
        stop.store(true, Ordering::Relaxed);
        let good = good.join().expect("it does not panic");
        result.unwrap_or_else(|p| std::panic::resume_unwind(p));
        good.unwrap_or_else(|e| panic!("the host that behaves: {e}"));
    });
    program.stop().unwrap_or_else(|e| panic!("{e}"));
}

fn wait(done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(120), "not within two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn ask(host: &mut Host, sqe: Sqe, capsule: &[u8]) -> Option<u32> {
    let bytes = host.capsule(&sqe, capsule);
    host.send(&bytes).ok()?;
    match host.recv(PATIENCE) {
        Ok(Pdu::Response(cqe)) if cqe.status().is_success() => Some(cqe.dw0.get()),
        _ => None,
    }
}

/// An admin and an I/O queue. `None`: the target has no room.
fn connect(addr: SocketAddr, n: u16) -> Option<(Host, Host)> {
    let who = Identity { nqn: format!("nqn.2026-01.io.cryptfold:crowd{n}"), id: [(n as u8).max(1); 16] };
    let open = |qid, cntlid| {
        let mut host = Host::dial(addr).ok()?;
        host.greet(false, false, 0).ok()?;
        let c = commands::connect(NQN, &who, qid, 128, cntlid)?;
        let dw0 = ask(&mut host, c.sqe, &c.capsule)?;
        Some((host, Cntlid(dw0 as u16)))
    };
    let (mut admin, cntlid) = open(0, Cntlid::DYNAMIC)?;
    ask(&mut admin, Sqe::from_view(&PropertyCommand::set(Cid(1), Property::Cc, 0x0046_0001)), &[])?;
    Some((admin, open(1, cntlid)?.0))
}

fn write(n: u16, blocks: u32) -> Sqe {
    let mut sqe = Sqe::io(Io::Write, Cid(n), Nsid(1));
    sqe.set_rw(u64::from(n) % 2048, blocks, RwControl(0));
    sqe.sgl = Sgl::transport(blocks * 512);
    sqe
}

fn controllers(program: &Program) -> usize {
    let list = program.rpc("nvmf_subsystem_get_controllers", &json!({"nqn": NQN}));
    list.unwrap_or_else(|e| panic!("{e}")).as_array().map_or(0, Vec::len)
}

/// Row 19: a thousand connections at once, each of them used; then descriptors and memory are what they were.
#[test]
fn a_thousand_connections() {
    beside_a_good_host(|program, addr, rounds| {
        let crowd = |size: u16| {
            let mut all: Vec<_> = (0..size)
                .map(|n| connect(addr, n).unwrap_or_else(|| panic!("no room for host {n}")))
                .collect();
            for (n, (_, io)) in (0..).zip(&mut all) {
                let sqe = Sqe { sgl: Sgl::in_capsule(0, 512), ..write(n, 1) };
                assert!(ask(io, sqe, &[n as u8; 512]).is_some(), "host {n}");
            }
            assert_eq!(controllers(program), usize::from(size));
        };
        // What is made once and kept is there after the first crowd.
        crowd(500);
        wait(|| controllers(program) == 0);
        let kept = program.usage().expect("it runs").1;
        let seen = rounds.load(Ordering::Relaxed);
        let descriptors = 200.min(program.descriptors().expect("it runs"));
        crowd(500);
        wait(|| controllers(program) == 0);
        program.returns_to(descriptors).unwrap_or_else(|e| panic!("{e}"));
        let now = program.usage().expect("it runs").1;
        println!("{kept} bytes resident after the first crowd, {now} after the second");
        assert!(now < kept + (16 << 20), "{kept} bytes became {now}");
        wait(|| rounds.load(Ordering::Relaxed) > seen);
    });
}

/// Row 19: no descriptor is left for more connections. Those that are there go on, the program waits for better times
/// without using a core, and takes a host that connects in place of those that are silent.
#[test]
fn descriptors_run_out() {
    beside_a_good_host(|program, addr, rounds| {
        let before = program.descriptors().expect("it runs");
        program.limit("nofile", &format!("{}:20000", before + 20)).unwrap_or_else(|e| panic!("{e}"));
        let mut hosts: Vec<_> = (0..4).filter_map(|n| connect(addr, n)).collect();
        assert_eq!(hosts.len(), 4);
        let crowd: Vec<TcpStream> = (0..200)
            .map_while(|_| TcpStream::connect_timeout(&addr, Duration::from_millis(500)).ok())
            .collect();
        assert!(crowd.len() > 20, "the kernel takes connections that the program does not");
        std::thread::sleep(Duration::from_millis(200));
        let (seen, (used, _)) = (rounds.load(Ordering::Relaxed), program.usage().expect("it runs"));
        std::thread::sleep(Duration::from_secs(2));
        let spent = program.usage().expect("it runs").0 - used;
        assert!(spent < Duration::from_millis(600), "{spent:?} of 2 s spent on connections it can not take");
        // The other host goes on.
        wait(|| rounds.load(Ordering::Relaxed) > seen + 50);
        for (n, (_, io)) in (0..).zip(&mut hosts) {
            let sqe = Sqe { sgl: Sgl::in_capsule(0, 512), ..write(n, 1) };
            assert!(ask(io, sqe, &[n as u8; 512]).is_some(), "who is there goes on");
        }
        // A host gets in, though the crowd stays: who has the descriptors and says nothing makes room.
        wait(|| connect(addr, 8).is_some());
        drop(crowd);
        wait(|| connect(addr, 9).is_some());
        program.limit("nofile", "20000:20000").unwrap_or_else(|e| panic!("{e}"));
        wait(|| connect(addr, 10).is_some());
    });
}

/// A write of 128 KiB that the target asked the data of.
struct Asked {
    part: DataPart,
    ttag: Ttag,
}

/// One of many hosts that promise more data than the target may hold.
struct Promising {
    _admin: Host,
    io: Host,
    asked: Vec<Asked>,
    done: usize,
}

impl Promising {
    const WRITES: u16 = 64;

    fn new(addr: SocketAddr, n: u16) -> Promising {
        let (admin, mut io) = connect(addr, n).unwrap_or_else(|| panic!("no room for host {n}"));
        for cid in 0..Self::WRITES {
            let capsule = io.capsule(&write(cid, 256), &[]);
            io.send(&capsule).expect("the target takes commands");
        }
        Promising { _admin: admin, io, asked: Vec::new(), done: 0 }
    }

    /// Takes what has come; sends all data that was asked for but its last block, or, at the end, that too. The bytes that
    /// were asked for meanwhile.
    fn go_on(&mut self, finish: bool) -> u64 {
        let mut bytes = 0;
        loop {
            match self.io.recv(Duration::from_millis(20)) {
                Ok(Pdu::R2t { cid, ttag, offset, len }) => {
                    bytes += u64::from(len);
                    let part = DataPart { cid, offset, len: len - 512, last: false };
                    let pdu = self.io.h2c_data(part, ttag, &vec![7; part.len as usize]);
                    self.io.send(&pdu).expect("the target takes what it asked for");
                    self.asked.push(Asked { part, ttag });
                }
                Ok(Pdu::Response(cqe)) if cqe.status().is_success() => self.done += 1,
                Err(End::Silent) => break,
                other => panic!("{other:?}"),
            }
        }
        for Asked { part, ttag } in self.asked.drain(if finish { 0.. } else { self.asked.len().. }) {
            let rest = DataPart { offset: part.offset + part.len, len: 512, last: true, ..part };
            let pdu = self.io.h2c_data(rest, ttag, &[7; 512]);
            self.io.send(&pdu).expect("the target takes what it asked for");
        }
        bytes
    }
}

/// Row 19: hosts promise four times what the target may hold, and deliver all but the end of what it asks for. It asks for no
/// more than it may hold, and the process does not grow by more; then everybody delivers, and everything is written.
#[test]
fn what_hosts_owe_has_a_ceiling() {
    const MIB: u64 = 1 << 20;
    beside(tight, |program, addr, rounds| {
        let mut hosts: Vec<Promising> = (0..16).map(|n| Promising::new(addr, n)).collect();
        // A connection that holds nothing may always have one command's data.
        let ceiling = CEILING_MIB * MIB + hosts.len() as u64 * 131_072;
        let before = program.usage().expect("it runs").1;
        let (mut held, begin) = (0, Instant::now());
        while held < CEILING_MIB * MIB * 3 / 4 {
            held += hosts.iter_mut().map(|h| h.go_on(false)).sum::<u64>();
            assert!(held <= ceiling, "{held} bytes were asked for, {ceiling} may be held");
            assert!(begin.elapsed() < Duration::from_secs(120), "only {held} bytes were asked for");
        }
        held += hosts.iter_mut().map(|h| h.go_on(false)).sum::<u64>();
        assert!(held <= ceiling, "{held} bytes were asked for, {ceiling} may be held");
        let grown = program.peak_bytes().expect("it runs").saturating_sub(before);
        println!("{held} bytes held, {grown} more resident at most");
        assert!(grown < ceiling + 16 * MIB, "{grown} bytes more are resident, {ceiling} may be held");
        let seen = rounds.load(Ordering::Relaxed);
        wait(|| rounds.load(Ordering::Relaxed) > seen);
        let begin = Instant::now();
        while hosts.iter().any(|h| h.done < usize::from(Promising::WRITES)) {
            for host in &mut hosts {
                host.go_on(true);
            }
            assert!(begin.elapsed() < Duration::from_secs(120), "what was delivered is not written");
        }
    });
}

/// Row 16: a host is stopped (SIGSTOP) in the midst of I/O. Its controller goes when Keep Alive has expired; when it goes on
/// it finds its connections ended.
#[test]
fn a_host_that_is_stopped() {
    struct Stopped(Child);
    impl Drop for Stopped {
        fn drop(&mut self) {
            // It may have ended by itself.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    beside_a_good_host(|program, addr, rounds| {
        let own = std::env::current_exe().expect("this program");
        let spawned = Command::new(own)
            .args(["a_host_for_another_test", "--exact", "--ignored", "--nocapture"])
            .env("CRYPTFOLD_TEST_TARGET", addr.to_string())
            .spawn();
        let mut child = Stopped(spawned.expect("another process"));
        let written = || {
            let list = program.rpc("nvmf_subsystem_get_controllers", &json!({"nqn": NQN}));
            list.unwrap_or_else(|e| panic!("{e}"))[0]["writes"].as_u64().unwrap_or(0)
        };
        wait(|| written() > 10);
        let signal = |name: &str| {
            let status = Command::new("kill").args([name, &child.0.id().to_string()]).status();
            assert!(status.expect("kill(1)").success());
        };
        signal("-STOP");
        let seen = rounds.load(Ordering::Relaxed);
        wait(|| controllers(program) == 0);
        wait(|| rounds.load(Ordering::Relaxed) > seen);
        signal("-CONT");
        let status = child.0.wait().expect("it ends");
        assert!(status.success(), "the stopped host: {status}");
    });
}

/// The other process of [`a_host_that_is_stopped`]: writes until its connection ends, which has to happen.
#[test]
#[ignore = "only together with another test"]
fn a_host_for_another_test() {
    let addr: SocketAddr =
        std::env::var("CRYPTFOLD_TEST_TARGET").expect("an address").parse().expect("an address");
    let who = Identity { nqn: "nqn.2026-01.io.cryptfold:stopped".into(), id: [3; 16] };
    let open = |qid, cntlid, kato_ms| {
        let mut host = Host::dial(addr).expect("the target listens");
        host.greet(false, false, 0).expect("a greeting");
        let c = commands::connect(NQN, &who, qid, 32, cntlid).expect("names");
        let connect = Sqe::from_view(&Connect::new(Cid(0), Qid(qid), 31, kato_ms));
        let dw0 = ask(&mut host, connect, &c.capsule).expect("connected");
        (host, Cntlid(dw0 as u16))
    };
    // Long enough for a slow machine to keep it until it is stopped.
    let (mut admin, cntlid) = open(0, Cntlid::DYNAMIC, 5000);
    ask(&mut admin, Sqe::from_view(&PropertyCommand::set(Cid(1), Property::Cc, 0x0046_0001)), &[])
        .expect("enabled");
    let (mut io, _) = open(1, cntlid, 0);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(300) {
        let sqe = Sqe { sgl: Sgl::in_capsule(0, 512), ..write(1, 1) };
        let alive = Sqe::admin(cryptfold_nvmf_spec::opcode::Admin::KeepAlive, Cid(2), Nsid(0));
        if ask(&mut io, sqe, &[1; 512]).is_none() || ask(&mut admin, alive, &[]).is_none() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("the connection never ended");
}
