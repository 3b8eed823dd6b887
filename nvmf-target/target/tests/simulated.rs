//! The target in the simulator: admin queue on one core, I/O queue on another, streams in memory that hold little, and an
//! end at a random moment. Every seed must finish, verify its data and give the device back.

use std::cell::Cell;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::Duration;

use cryptfold_bdev::Registry;
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_nvmf_spec::fabrics::{Connect, ConnectData, PropertyCommand};
use cryptfold_nvmf_spec::features::Fid;
use cryptfold_nvmf_spec::log::{GetLogPage, Health, Lid};
use cryptfold_nvmf_spec::opcode::{Admin, Io};
use cryptfold_nvmf_spec::pdu::build::{self, DataPart, Format};
use cryptfold_nvmf_spec::pdu::{Event, Header, Limits, Parser, Role};
use cryptfold_nvmf_spec::property::Property;
use cryptfold_nvmf_spec::sqe::RwControl;
use cryptfold_nvmf_spec::{Cid, Cntlid, Cqe, Nqn, Nsid, Qid, Sgl, Sqe};
use cryptfold_nvmf_target::wire::{MemWire, Wake, Wire, mem_pair};
use cryptfold_nvmf_target::{ListenAddr, NsOptions, SubsystemOptions, Target, TransportOptions};
use cryptfold_reactor::sync::Notify;
use cryptfold_reactor::{self as reactor, Sim};
use zerocopy::{FromBytes, IntoBytes};

const NQN: &str = "nqn.2024-01.io.cryptfold:sim";
const HOST: &str = "nqn.2024-01.io.cryptfold:host";

/// The connection was cut.
#[derive(Debug)]
struct Cut;

struct Host {
    wire: MemWire,
    notify: Rc<Notify>,
    parser: Parser,
    input: Vec<u8>,
    /// System calls left until this end hangs up.
    fuel: Cell<u64>,
    nqn: &'static str,
}

/// The target's end of a stream, which tells when it is served.
struct Watched {
    wire: MemWire,
    served: Rc<dyn Fn()>,
}

impl Wire for Watched {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (self.served)();
        self.wire.recv(bufs)
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        (self.served)();
        self.wire.send(bufs)
    }
    fn shutdown(&self, how: Shutdown) {
        self.wire.shutdown(how);
    }
    fn on_ready(&self, wake: Wake) {
        self.wire.on_ready(wake);
    }
}

impl Host {
    fn new(target: &Target, addr: &ListenAddr, fuel: u64) -> Host {
        Host::with_capacity(target, addr, fuel, 200 + (reactor::random_u64() % 9000) as usize)
    }

    fn with_capacity(target: &Target, addr: &ListenAddr, fuel: u64, capacity: usize) -> Host {
        Host::watched(target, addr, fuel, capacity, HOST, Rc::new(|| ()))
    }

    /// `served` is called whenever the target receives or sends on this connection.
    fn watched(
        target: &Target,
        addr: &ListenAddr,
        fuel: u64,
        capacity: usize,
        nqn: &'static str,
        served: Rc<dyn Fn()>,
    ) -> Host {
        let (wire, theirs) = mem_pair(capacity);
        let notify = Rc::new(Notify::new());
        let n = notify.clone();
        wire.on_ready(Rc::new(move || n.notify_one()));
        target.attach(addr, Box::new(Watched { wire: theirs, served })).expect("the address listens");
        let (parser, input, fuel) = (Parser::new(Role::Host), Vec::new(), Cell::new(fuel));
        Host { wire, notify, parser, input, fuel, nqn }
    }

    fn burn(&self) -> Result<(), Cut> {
        self.fuel.set(self.fuel.get().checked_sub(1).ok_or(Cut)?);
        Ok(())
    }

    async fn send(&self, mut bytes: &[u8]) -> Result<(), Cut> {
        while !bytes.is_empty() {
            self.burn()?;
            match self.wire.send(&[IoSlice::new(bytes)]) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.notify.notified().await,
                Err(_) => return Err(Cut),
            }
        }
        Ok(())
    }

    async fn recv(&mut self) -> Result<(Header, Vec<u8>), Cut> {
        let (mut header, mut data) = (None, Vec::new());
        loop {
            let p = self.parser.feed(&self.input).expect("the target speaks the protocol");
            let rest = self.input.split_off(p.consumed);
            let taken = std::mem::replace(&mut self.input, rest);
            match p.event {
                Event::NeedMore => self.fill().await?,
                Event::Header(pdu) => {
                    if let Header::IcResp { .. } = pdu.header {
                        self.parser.establish(Limits::default());
                    }
                    if pdu.layout.data_len == 0 {
                        return Ok((pdu.header, data));
                    }
                    header = Some(pdu.header);
                }
                Event::Data { start, len } => data.extend_from_slice(&taken[start..start + len]),
                Event::End { .. } => return Ok((header.expect("a header"), data)),
            }
        }
    }

    async fn fill(&mut self) -> Result<(), Cut> {
        loop {
            self.burn()?;
            let mut buf = [0; 3000];
            match self.wire.recv(&mut [IoSliceMut::new(&mut buf)]) {
                Ok(0) => return Err(Cut),
                Ok(n) => {
                    return {
                        self.input.extend_from_slice(&buf[..n]);
                        Ok(())
                    };
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.notify.notified().await,
                Err(_) => return Err(Cut),
            }
        }
    }

    async fn command(&mut self, sqe: Sqe, capsule: &[u8], data: &[u8]) -> Result<(Cqe, Vec<u8>), Cut> {
        let mut bytes = vec![0; 128];
        let format = Format::default();
        let n = build::capsule_cmd(&mut bytes, &sqe, capsule.len() as u32, format).expect("it fits");
        bytes.truncate(n);
        bytes.extend_from_slice(capsule);
        self.send(&bytes).await?;
        let mut read = Vec::new();
        loop {
            match self.recv().await? {
                (Header::CapsuleResp(cqe), _) => return Ok((cqe, read)),
                (Header::C2hData { .. }, bytes) => read.extend(bytes),
                (Header::R2t { cid, ttag, offset, len }, _) => {
                    let part = DataPart { cid, offset, len, last: true };
                    let mut bytes = vec![0; 128];
                    let n = build::h2c_data(&mut bytes, part, ttag, format).expect("it fits");
                    bytes.truncate(n);
                    bytes.extend_from_slice(&data[offset as usize..(offset + len) as usize]);
                    self.send(&bytes).await?;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    async fn connect(&mut self, qid: u16, cntlid: Cntlid) -> Result<Cqe, Cut> {
        let mut buf = [0; 128];
        let n = build::ic_req(&mut buf, 0, false, false, 0).expect("it fits");
        self.send(&buf[..n]).await?;
        self.recv().await?;
        let name = |n| Nqn::parse(n).expect("a name");
        let data = ConnectData::new([9; 16], cntlid, name(NQN), name(self.nqn));
        let connect = Sqe::from_view(&Connect::new(Cid(0), Qid(qid), 31, 0));
        Ok(self.command(connect, data.as_bytes(), &[]).await?.0)
    }
}

fn fill(lba: u64, blocks: u32, round: u64) -> Vec<u8> {
    (0..blocks as usize * 512).map(|i| (i as u64 * 7 + lba * 13 + round * 101) as u8).collect()
}

/// One host's whole life; ends early when its stream is cut.
async fn admin_queue(t: Arc<Target>, addr: ListenAddr, fuel: u64, cntlid: Arc<AtomicU16>) -> Result<(), Cut> {
    let mut h = Host::new(&t, &addr, fuel);
    let cqe = h.connect(0, Cntlid::DYNAMIC).await?;
    assert!(cqe.status().is_success());
    let enable = PropertyCommand::set(Cid(1), Property::Cc, 0x0046_0001);
    assert!(h.command(Sqe::from_view(&enable), &[], &[]).await?.0.status().is_success());
    cntlid.store(cqe.dw0.get() as u16, Ordering::Relaxed);
    // Keeps asking until the fuel is gone.
    loop {
        let get = PropertyCommand::get(Cid(2), Property::Csts);
        h.command(Sqe::from_view(&get), &[], &[]).await?;
        reactor::sleep(Duration::from_micros(50)).await;
    }
}

async fn io_queue(
    t: Arc<Target>,
    addr: ListenAddr,
    fuel: u64,
    cntlid: Arc<AtomicU16>,
    verified: Arc<AtomicU64>,
) -> Result<(), Cut> {
    let mut h = Host::new(&t, &addr, fuel);
    for _ in 0..1000 {
        if cntlid.load(Ordering::Relaxed) != 0 {
            break;
        }
        reactor::sleep(Duration::from_micros(10)).await;
    }
    let cqe = h.connect(1, Cntlid(cntlid.load(Ordering::Relaxed))).await?;
    if !cqe.status().is_success() {
        // The admin queue was cut first.
        return Ok(());
    }
    for round in 0..40u64 {
        let (lba, blocks) = (reactor::random_u64() % 900, 1 + (reactor::random_u64() % 40) as u32);
        let data = fill(lba, blocks, round);
        let mut sqe = Sqe::io(Io::Write, Cid(round as u16), Nsid(1));
        sqe.set_rw(lba, blocks, RwControl(0));
        let in_capsule = data.len() <= 4096;
        let len = data.len() as u32;
        sqe.sgl = if in_capsule { Sgl::in_capsule(0, len) } else { Sgl::transport(len) };
        let (cqe, _) = h.command(sqe, if in_capsule { &data } else { &[] }, &data).await?;
        if !cqe.status().is_success() {
            return Ok(());
        }
        sqe.opcode = Io::Read as u8;
        sqe.sgl = Sgl::transport(len);
        let (cqe, read) = h.command(sqe, &[], &[]).await?;
        if !cqe.status().is_success() {
            return Ok(());
        }
        assert!(read == data, "round {round}");
        verified.fetch_add(1, Ordering::Relaxed);
    }
    h.wire.shutdown(Shutdown::Write);
    Ok(())
}

/// A target with a RAM disk of 1,000 blocks, in the simulator.
fn simulate(seed: u64, cores: usize) -> (Sim, Arc<Registry>, Arc<Target>, ListenAddr) {
    let mut sim = Sim::new(seed).cores(cores);
    let registry = Registry::new();
    let disk = MallocOptions {
        name: "disk".into(),
        num_blocks: 1000,
        block_size_bytes: 512,
        uuid: None,
        optimal_io_boundary: 0,
    };
    cryptfold_bdev_malloc::create(&registry, disk).expect("a RAM disk");
    let target = Arc::new(Target::new(registry.clone(), sim.handles()));
    target.create_transport("TCP", TransportOptions::default()).expect("transport");
    target
        .create_subsystem(SubsystemOptions { allow_any_host: true, ..SubsystemOptions::new(NQN) })
        .expect("subsystem");
    target.add_ns(NQN, &NsOptions { bdev_name: "disk".into(), ..Default::default() }).expect("namespace");
    let addr = ListenAddr::parse("TCP", None, "192.0.2.1", "4420").expect("an address");
    target.add_listener_unbound(NQN, &addr).expect("a new address");

    // The reactors take the target in.
    sim.run_for(10);
    (sim, registry, target, addr)
}

fn run(seed: u64) -> u64 {
    let (mut sim, registry, target, addr) = simulate(seed, 2);
    let cntlid = Arc::new(AtomicU16::new(0));
    let verified = Arc::new(AtomicU64::new(0));
    // Cut one or the other at a random moment, or neither.
    let (a, b) = match seed % 4 {
        0 => (u64::MAX, u64::MAX),
        1 => (seed.wrapping_mul(0x9e37_79b9) % 400, u64::MAX),
        2 => (u64::MAX, seed.wrapping_mul(0x9e37_79b9) % 600),
        _ => (seed % 97, seed % 89),
    };
    let admin = sim.spawn(0, {
        let (t, addr, cntlid) = (target.clone(), addr.clone(), cntlid.clone());
        move || async move { admin_queue(t, addr, a, cntlid).await.is_err() }
    });
    let io = sim.spawn(1, {
        let (t, v) = (target.clone(), verified.clone());
        move || async move { io_queue(t, addr, b, cntlid, v).await.is_ok() }
    });
    assert!(sim.run_until(|| io.is_finished()), "seed {seed}: stalled");
    // In mid-life the device is taken away and the subsystem deleted; nothing may hang.
    let removal = registry.unregister("disk").expect("it exists");
    assert!(sim.run_until(|| removal.is_done()), "seed {seed}: the device is still held");
    for c in target.controllers(NQN).expect("it exists") {
        assert!(c.num_io_qpairs <= 1);
    }
    drop(admin);
    assert!(
        sim.run_until(|| target.controllers(NQN).is_ok_and(|c| c.is_empty())),
        "seed {seed}: a controller outlives its connections"
    );
    let done = verified.load(Ordering::Relaxed);
    if seed.is_multiple_of(4) {
        assert_eq!(done, 40, "seed {seed}: nothing was cut");
    }
    done
}

#[test]
fn every_seed_ends_clean() {
    let verified: u64 = (0..1000).map(run).sum();
    assert!(verified > 10_000, "only {verified} blocks were verified");
}

#[test]
fn a_seed_repeats_itself() {
    assert_eq!((run(4), run(7)), (run(4), run(7)));
}

/// Bytes that a pipe holds, where service is measured.
const PIPE_BYTES: usize = 64 << 10;
/// Commands of a greedy host, each of the largest transfer.
const GREEDY_DEPTH: u16 = 30;
const GREEDY_BLOCKS: u32 = 256;

/// An enabled controller's admin and I/O queue.
async fn queues(t: &Target, addr: &ListenAddr, nqn: &'static str, served: Rc<dyn Fn()>) -> (Host, Host) {
    let open = |served| Host::watched(t, addr, u64::MAX, PIPE_BYTES, nqn, served);
    let (mut admin, mut io) = (open(served.clone()), open(served));
    let cqe = admin.connect(0, Cntlid::DYNAMIC).await.expect("connected");
    let enable = Sqe::from_view(&PropertyCommand::set(Cid(1), Property::Cc, 0x0046_0001));
    assert!(admin.command(enable, &[], &[]).await.expect("enabled").0.status().is_success());
    assert!(io.connect(1, Cntlid(cqe.dw0.get() as u16)).await.expect("connected").status().is_success());
    (admin, io)
}

fn rw(opcode: Io, cid: u16, blocks: u32) -> Sqe {
    let mut sqe = Sqe::io(opcode, Cid(cid), Nsid(1));
    sqe.set_rw(0, blocks, RwControl(0));
    sqe.sgl = Sgl::transport(blocks * 512);
    sqe
}

fn read(cid: u16, blocks: u32) -> Sqe {
    rw(Io::Read, cid, blocks)
}

/// Reads or writes with as many and as large commands as there may be, until told to stop; counts the bytes that came or went.
async fn greedy_as(
    nqn: &'static str,
    opcode: Io,
    (t, addr): (Arc<Target>, ListenAddr),
    served: Rc<dyn Fn()>,
    bytes: Arc<AtomicU64>,
    stop: Arc<AtomicU64>,
) {
    let (_admin, mut io) = queues(&t, &addr, nqn, served).await;
    let submit = async |io: &mut Host, cid| {
        let mut capsule = vec![0; 128];
        let n = build::capsule_cmd(&mut capsule, &rw(opcode, cid, GREEDY_BLOCKS), 0, Format::default())
            .expect("it fits");
        io.send(&capsule[..n]).await.expect("the target takes it");
    };
    for cid in 0..GREEDY_DEPTH {
        submit(&mut io, cid).await;
    }
    while stop.load(Ordering::Relaxed) == 0 {
        match io.recv().await.expect("the target goes on") {
            (Header::CapsuleResp(cqe), _) => submit(&mut io, cqe.cid().0).await,
            (Header::R2t { cid, ttag, offset, len }, _) => {
                let mut pdu = vec![0; 24 + len as usize];
                let part = DataPart { cid, offset, len, last: true };
                let head = build::h2c_data(&mut pdu, part, ttag, Format::default()).expect("it fits");
                assert_eq!(head, 24);
                io.send(&pdu).await.expect("the target takes it");
                bytes.fetch_add(u64::from(len), Ordering::Relaxed);
            }
            (_, data) => drop(bytes.fetch_add(data.len() as u64, Ordering::Relaxed)),
        }
    }
}

/// A connection of the usual host that only reads.
async fn greedy(t: Arc<Target>, addr: ListenAddr, bytes: Arc<AtomicU64>, stop: Arc<AtomicU64>) {
    greedy_as(HOST, Io::Read, (t, addr), Rc::new(|| ()), bytes, stop).await;
}

/// The greedy ones stop, and their connections end.
fn end(sim: &mut Sim, target: &Target, stop: &AtomicU64) {
    stop.store(1, Ordering::Relaxed);
    assert!(sim.run_until(|| target.controllers(NQN).is_ok_and(|c| c.is_empty())), "a controller is left");
}

/// Small reads beside greedy connections.
const READS: u16 = 60;

/// How many bytes of others came between each small read and its answer: the most, and all together.
async fn polite(t: Arc<Target>, addr: ListenAddr, bytes: Arc<AtomicU64>) -> (u64, u64) {
    let (_admin, mut io) = queues(&t, &addr, HOST, Rc::new(|| ())).await;
    while bytes.load(Ordering::Relaxed) < 1 << 20 {
        reactor::yield_now().await;
    }
    let (mut worst, mut sum) = (0, 0);
    for cid in 0..READS {
        let before = bytes.load(Ordering::Relaxed);
        let (cqe, _) = io.command(read(cid, 8), &[], &[]).await.expect("the target goes on");
        assert!(cqe.status().is_success());
        let meanwhile = bytes.load(Ordering::Relaxed) - before;
        (worst, sum) = (worst.max(meanwhile), sum + meanwhile);
    }
    (worst, sum)
}

/// Fair service, counted instead of timed: between a small read and its answer a greedy connection is served a few pipes
/// full, not its queue; and it does not matter how greedy it is.
#[test]
fn a_greedy_connection_is_served_in_turn() {
    const SEEDS: u64 = 30;
    let (mut worst, mut sum) = (0, 0);
    for seed in 0..SEEDS {
        let (mut sim, _registry, target, addr) = simulate(seed, 1);
        let (stop, bytes) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let hogs = 1 + seed % 3;
        for _ in 0..hogs {
            let (t, addr, bytes, stop) = (target.clone(), addr.clone(), bytes.clone(), stop.clone());
            sim.spawn(0, move || greedy(t, addr, bytes, stop)).detach();
        }
        let (t, b) = (target.clone(), bytes.clone());
        let (most, all) = sim.run(move || polite(t, addr, b));
        worst = worst.max(most / hogs);
        sum += all / hogs;
        end(&mut sim, &target, &stop);
    }
    let queued = u64::from(GREEDY_DEPTH) * u64::from(GREEDY_BLOCKS) * 512;
    let mean = sum / (SEEDS * u64::from(READS));
    println!(
        "beside a small read a greedy connection gets {mean} bytes, {worst} at most; it has {queued} queued"
    );
    // A pipe full per turn; request, device and response take a turn each, and the simulator's random order adds its share.
    // In order of arrival it would be all that is queued, each time.
    assert!(mean <= queued / 8 && worst <= queued / 2, "{mean} on average, {worst} at most, of {queued}");
}

const GREEDY: &str = "nqn.2024-01.io.cryptfold:greedy";
/// Connections of the greedy host.
const GREEDY_CONNECTIONS: u64 = 32;
/// Connections of one host that a turn serves where there are several hosts (`group.rs`).
const SERVED_PER_HOST: u64 = 4;

/// Who has been served how often.
#[derive(Default)]
struct Services {
    /// The connection that was served last.
    last: AtomicU64,
    /// Services of the greedy host's connections so far: a receive and a send one after the other are one.
    greedy: AtomicU64,
    /// How many of these there had been when the polite host's bytes came, plus one; 0: it waits for nothing.
    since: AtomicU64,
    /// The most of them that it has waited for, and all that it has waited for.
    worst: AtomicU64,
    sum: AtomicU64,
}

impl Services {
    fn greedy(&self, connection: u64) {
        if self.last.swap(connection, Ordering::Relaxed) != connection {
            self.greedy.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn polite(&self) {
        self.last.store(0, Ordering::Relaxed);
        let since = self.since.swap(0, Ordering::Relaxed);
        if since > 0 {
            let waited = self.greedy.load(Ordering::Relaxed) + 1 - since;
            self.worst.fetch_max(waited, Ordering::Relaxed);
            self.sum.fetch_add(waited, Ordering::Relaxed);
        }
    }

    /// The polite host is about to send something.
    fn waits(&self) {
        self.since.store(self.greedy.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

/// One command at a time, small reads and writes in turn.
async fn polite_one((t, addr): (Arc<Target>, ListenAddr), services: Arc<Services>, bytes: Arc<AtomicU64>) {
    let s = services.clone();
    let (_admin, mut io) = queues(&t, &addr, HOST, Rc::new(move || s.polite())).await;
    while bytes.load(Ordering::Relaxed) < GREEDY_CONNECTIONS << 17 {
        reactor::yield_now().await;
    }
    for cid in 0..READS {
        let mut write = rw(Io::Write, cid, 8);
        write.sgl = Sgl::in_capsule(0, 4096);
        let (sqe, data) = if cid % 2 == 0 { (read(cid, 8), &[][..]) } else { (write, &[7; 4096][..]) };
        services.waits();
        let (cqe, _) = io.command(sqe, data, &[]).await.expect("the target goes on");
        assert!(cqe.status().is_success());
    }
}

/// Hosts are served in turn, not connections: beside one with 32 connections, each with a queue full of reads or writes of the largest
/// size, a host with one connection and one command waits for four services of the other until it is served, and no more.
#[test]
fn a_host_with_many_connections_is_served_as_one() {
    for seed in 0..10 {
        let (mut sim, _registry, target, addr) = simulate(seed, 1);
        let (stop, bytes) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let services = Arc::<Services>::default();
        for n in 1..=GREEDY_CONNECTIONS {
            let (at, bytes, stop) = ((target.clone(), addr.clone()), bytes.clone(), stop.clone());
            let (opcode, s) = (if n % 2 == 0 { Io::Read } else { Io::Write }, services.clone());
            sim.spawn(0, move || greedy_as(GREEDY, opcode, at, Rc::new(move || s.greedy(n)), bytes, stop))
                .detach();
        }
        let (at, s, b) = ((target.clone(), addr.clone()), services.clone(), bytes.clone());
        sim.run(move || polite_one(at, s, b));
        let (worst, sum) = (services.worst.load(Ordering::Relaxed), services.sum.load(Ordering::Relaxed));
        println!(
            "seed {seed}: of {READS} commands each waited for {worst} services of the greedy host at most, all for {sum}"
        );
        end(&mut sim, &target, &stop);
        assert!(sum > 0 && worst <= SERVED_PER_HOST, "seed {seed}: {worst} services before one");
    }
}

/// Connections that all want everything get the same.
#[test]
fn equal_connections_get_equal_service() {
    for seed in 0..3 {
        let (mut sim, _registry, target, addr) = simulate(seed, 1);
        let stop = Arc::new(AtomicU64::new(0));
        let counts: Vec<_> = (0..4).map(|_| Arc::new(AtomicU64::new(0))).collect();
        for bytes in &counts {
            let (t, addr, bytes, stop) = (target.clone(), addr.clone(), bytes.clone(), stop.clone());
            sim.spawn(0, move || greedy(t, addr, bytes, stop)).detach();
        }
        let served = || counts.iter().map(|c| c.load(Ordering::Relaxed));
        assert!(sim.run_until(|| served().sum::<u64>() > 128 << 20), "seed {seed}: stalled");
        let (least, most) = served().fold((u64::MAX, 0), |(a, b), n| (a.min(n), b.max(n)));
        println!(
            "seed {seed}: of four equal connections the least served got {least} bytes, the most {most}"
        );
        assert!(most - least <= most / 5, "seed {seed}: between {least} and {most} bytes");
        end(&mut sim, &target, &stop);
    }
}

/// Keep Alive every so often until told to stop, from a host whose timer is 10 s; then it only listens. Counts what was answered.
async fn heart(
    t: Arc<Target>,
    addr: ListenAddr,
    every: Duration,
    beats: Arc<AtomicU64>,
    stop: Arc<AtomicU64>,
) {
    let mut admin = Host::with_capacity(&t, &addr, u64::MAX, PIPE_BYTES);
    admin.connect(0, Cntlid::DYNAMIC).await.expect("connected");
    let enable = Sqe::from_view(&PropertyCommand::set(Cid(1), Property::Cc, 0x0046_0001));
    assert!(admin.command(enable, &[], &[]).await.expect("enabled").0.status().is_success());
    let mut set = Sqe::admin(Admin::SetFeatures, Cid(2), Nsid(0));
    (set.cdw10, set.cdw11) = ((Fid::KeepAliveTimer as u32).into(), 10_000.into());
    assert!(admin.command(set, &[], &[]).await.expect("set").0.status().is_success());
    while stop.load(Ordering::Relaxed) == 0 {
        reactor::sleep(every).await;
        let alive = Sqe::admin(Admin::KeepAlive, Cid(3), Nsid(0));
        assert!(admin.command(alive, &[], &[]).await.expect("it lives").0.status().is_success());
        beats.fetch_add(1, Ordering::Relaxed);
    }
    assert!(admin.recv().await.is_err(), "nothing is answered that was not asked");
}

/// Keep Alive in time keeps a controller; the timer's time after the last one it ends.
#[test]
fn keep_alive_keeps_and_its_end_ends() {
    for seed in 0..20 {
        let (mut sim, _registry, target, addr) = simulate(seed, 1);
        let (beats, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (t, b, s) = (target.clone(), beats.clone(), stop.clone());
        let host = sim.spawn(0, move || heart(t, addr, Duration::from_millis(9_900), b, s));
        assert!(sim.run_until(|| host.is_finished() || beats.load(Ordering::Relaxed) == 20), "seed {seed}");
        stop.store(1, Ordering::Relaxed);
        assert!(sim.run_until(|| host.is_finished() || beats.load(Ordering::Relaxed) == 21), "seed {seed}");
        let last = sim.now();
        assert!(sim.run_until(|| host.is_finished()), "seed {seed}: the end was noticed");
        let lived = sim.now().since(last);
        let due = Duration::from_secs(10)..Duration::from_millis(10_600);
        assert!(due.contains(&lived), "seed {seed}: {lived:?}");
        assert!(sim.run_until(|| target.controllers(NQN).is_ok_and(|c| c.is_empty())), "seed {seed}");
    }
}

/// The machine stood still (a paused guest, a stopped process): deadlines that passed meanwhile are not the hosts' fault, and what
/// they had sent has not been read yet. An association under I/O once ended so, in a re-authentication.
#[test]
fn nobody_is_charged_for_time_in_which_the_target_stood_still() {
    for seed in 0..40 {
        let (mut sim, _registry, target, addr) = simulate(seed, 1);
        let (beats, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (t, a, b, s) = (target.clone(), addr.clone(), beats.clone(), stop.clone());
        let host = sim.spawn(0, move || heart(t, a, Duration::from_secs(4), b, s));
        assert!(sim.run_until(|| beats.load(Ordering::Relaxed) == 1), "seed {seed}");
        // Somebody who has ten seconds for a greeting.
        let (silent, theirs) = mem_pair(PIPE_BYTES);
        let t = target.clone();
        sim.spawn(0, move || async move { t.attach(&addr, Box::new(theirs)).expect("the address listens") })
            .detach();
        let open = || {
            silent
                .recv(&mut [IoSliceMut::new(&mut [0])])
                .is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
        };
        assert!(sim.run_until(|| beats.load(Ordering::Relaxed) == 2), "seed {seed}");
        for round in 3..6 {
            sim.stand_still(Duration::from_secs(60));
            assert!(
                sim.run_until(|| host.is_finished() || beats.load(Ordering::Relaxed) == round),
                "seed {seed}"
            );
            assert!(round > 3 || open(), "seed {seed}: four of its ten seconds have gone by");
        }
        assert!(
            !host.is_finished() && beats.load(Ordering::Relaxed) == 5,
            "seed {seed}: the host was cut off"
        );
        assert!(sim.run_until(|| beats.load(Ordering::Relaxed) == 7), "seed {seed}");
        assert!(!open(), "seed {seed}: it has had more than its ten seconds");
        stop.store(1, Ordering::Relaxed);
        assert!(sim.run_until(|| host.is_finished()), "seed {seed}: silence ends it still");
    }
}

/// SMART's busy time, minutes.
async fn busy_minutes(admin: &mut Host) -> u128 {
    let mut sqe = GetLogPage::new(Lid::Health, 0, 512).expect("legal").to_sqe(Cid(7), Nsid(0));
    sqe.sgl = Sgl::transport(512);
    let (cqe, page) = admin.command(sqe, &[], &[]).await.expect("it lives");
    assert!(cqe.status().is_success());
    Health::read_from_bytes(&page).expect("512 bytes").busy_min.get()
}

/// Busy is the time in which I/O commands were under way, and no other.
#[test]
fn busy_time_rises_with_work() {
    const COMMAND: Duration = Duration::from_secs(340);
    let (mut sim, registry, target, addr) = simulate(1, 1);
    let base = MallocOptions {
        name: "base".into(),
        num_blocks: 64,
        block_size_bytes: 512,
        uuid: None,
        optimal_io_boundary: 0,
    };
    cryptfold_bdev_malloc::create(&registry, base).expect("a RAM disk");
    let slow = cryptfold_bdev_delay::DelayOptions {
        name: "slow".into(),
        base_bdev_name: "base".into(),
        uuid: None,
        latencies_us: [COMMAND.as_micros() as u64; 4],
    };
    cryptfold_bdev_delay::create(&registry, slow).expect("a layer");
    let ns = NsOptions { bdev_name: "slow".into(), ..Default::default() };
    assert_eq!(target.add_ns(NQN, &ns), Ok(2));
    let t = target.clone();
    let seen = sim.run(move || async move {
        let (mut admin, mut io) = queues(&t, &addr, HOST, Rc::new(|| ())).await;
        let mut seen = Vec::new();
        for commands in [0, 1, 0, 1] {
            for cid in 0..commands {
                let slow = Sqe { nsid: 2.into(), ..read(cid, 1) };
                assert!(io.command(slow, &[], &[]).await.expect("it lives").0.status().is_success());
            }
            if commands == 0 {
                reactor::sleep(COMMAND).await;
            }
            seen.push(busy_minutes(&mut admin).await);
        }
        seen
    });
    assert!(sim.run_until(|| target.controllers(NQN).is_ok_and(|c| c.is_empty())), "the host is gone");
    // 5 min 40 s each.
    assert_eq!(seen, [0, 5, 5, 11]);
}
