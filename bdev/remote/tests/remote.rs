//! Remote namespaces against a target of the same process: what they are, what changes reach them, paths that go and come
//! back under I/O that is verified.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cryptfold_bdev::{
    Access, BdevError, Descriptor, Device, DeviceInfo, Io, Op, OpSet, Queue, Registry, Status,
};
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_bdev_remote::{AttachOptions, Multipath, PathFilter, Recovery, RemoteError, Remotes};
use cryptfold_nvmf_auth::{DhGroup, HashId, Offer, Psk, Secret, Version};
use cryptfold_nvmf_initiator::{ConnectOptions, Credentials, TlsKey};
use cryptfold_nvmf_spec::log::AnaState;
use cryptfold_nvmf_target::{
    HostAccess, ListenAddr, Named, NsOptions, PortSecurity, SubsystemOptions, Target, TransportOptions,
};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{Handle, IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};
use serde_json::json;

const NQN: &str = "nqn.2026-01.io.cryptfold:far";
const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:0b5f7f6e-4f63-4a53-9b64-0a5f2e1d9c77";
const BLOCKS: u64 = 4096;
const BLOCK: usize = 512;

fn runtime() -> Runtime {
    let memory = MemoryConfig { fixed_buffers: false, arena_bytes: 8 << 20, ..Default::default() };
    let (policy, cores) = (IdlePolicy::Interrupt, vec![0, 1]);
    Runtime::start(RuntimeConfig { cores, policy, pin: false, memory, ..Default::default() })
        .expect("reactors")
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(180), "not within 180 s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The far side: a target with RAM disks.
struct Far {
    target: Target,
    registry: Arc<Registry>,
    /// Dropped last.
    _runtime: Runtime,
}

impl Far {
    fn new() -> Far {
        let runtime = runtime();
        let registry = Registry::new();
        let target = Target::new(registry.clone(), runtime.handles());
        target.create_transport("TCP", TransportOptions::default()).expect("transport");
        let subsystem =
            SubsystemOptions { allow_any_host: true, ana_reporting: true, ..SubsystemOptions::new(NQN) };
        target.create_subsystem(subsystem).expect("subsystem");
        let far = Far { target, registry, _runtime: runtime };
        far.disk("a", 1);
        far
    }

    fn disk(&self, name: &str, nsid: u32) {
        let disk = MallocOptions {
            name: name.into(),
            num_blocks: BLOCKS,
            block_size_bytes: BLOCK as u32,
            uuid: None,
            optimal_io_boundary: 0,
        };
        cryptfold_bdev_malloc::create(&self.registry, disk).expect("a RAM disk");
        let ns = NsOptions { bdev_name: name.into(), nsid: Some(nsid), ..Default::default() };
        assert_eq!(self.target.add_ns(NQN, &ns), Ok(nsid));
    }

    fn listen(&self) -> ListenAddr {
        self.listen_at("0")
    }

    fn listen_at(&self, port: &str) -> ListenAddr {
        let any = ListenAddr::parse("TCP", Some("IPv4"), "127.0.0.1", port).expect("an address");
        self.target.add_listener(NQN, &any).expect("a free port")
    }
}

/// The near side: remote controllers and a registry for their devices.
struct Near {
    remotes: Remotes,
    registry: Arc<Registry>,
    runtime: Option<Runtime>,
}

impl Near {
    fn new() -> Near {
        let registry = Registry::new();
        Near { remotes: Remotes::new(registry.clone()), registry, runtime: Some(runtime()) }
    }

    fn handles(&self) -> &[Handle] {
        self.runtime.as_ref().expect("it runs").handles()
    }

    fn attach(&self, o: AttachOptions) -> Result<Vec<String>, RemoteError> {
        self.remotes.attach(self.handles(), o)
    }

    fn state(&self, link: usize) -> &'static str {
        self.remotes.list()[0].links[link].state
    }
}

impl Drop for Near {
    fn drop(&mut self) {
        self.remotes.stop();
        if let Some(r) = self.runtime.take() {
            r.stop();
        }
    }
}

fn options(at: &ListenAddr) -> AttachOptions {
    let mut connect = ConnectOptions::new("127.0.0.1", at.socket_addr().port().to_string(), NQN);
    (connect.hostnqn, connect.hostid) = (HOST.into(), [7; 16]);
    connect.io_queues = 16;
    connect.connect_timeout = Duration::from_secs(5);
    AttachOptions {
        name: "Far".into(),
        multipath: Multipath::Multipath,
        connect,
        recovery: Recovery::new(-1, 1, 0).expect("they fit"),
        max_bdevs: 128,
        retries: 3,
        saved: json!({"trsvcid": at.socket_addr().port()}),
    }
}

/// What block `lba` holds after its `n`th write by `core`.
fn content(core: u64, lba: u64, n: u64) -> Vec<u8> {
    let word = (core << 56 | lba << 32 | n).to_le_bytes();
    word.iter().copied().cycle().take(BLOCK).collect()
}

/// Writes and verifies on both cores until told to end; each has half of the disk.
struct Load {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<Result<(), String>>>,
}

impl Load {
    fn on(near: &Near, name: &str) -> Load {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let desc = near.registry.open(name, Access::ReadWrite, |_| {}).expect("it is there");
        let threads = near.handles().iter().cloned().enumerate().map(|(core, handle)| {
            let (desc, stop, rounds) = (desc.clone(), stop.clone(), rounds.clone());
            std::thread::spawn(move || {
                let work = move || work(core as u64, desc, stop, rounds);
                handle.block_on(work).map_err(|e| e.to_string())?
            })
        });
        let threads = threads.collect();
        let load = Load { stop, rounds, threads };
        load.goes_on();
        load
    }

    fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// I/O completes, on both cores.
    fn goes_on(&self) {
        let before = self.rounds();
        wait("I/O", || self.rounds() > before + 20 || self.threads.iter().any(|t| t.is_finished()));
    }

    fn end(mut self) -> Result<(), String> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).try_for_each(|t| t.join().map_err(|_| "panic".to_string())?)
    }
}

async fn work(
    core: u64,
    desc: Arc<Descriptor>,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
) -> Result<(), String> {
    let channel = desc.channel().map_err(|e| e.to_string())?;
    drop(desc);
    let half = BLOCKS / 2;
    let mut model = vec![0; half as usize];
    let mut seed = core + 1;
    let check = |lba: u64, n: u64, got: Vec<u8>| {
        let want = if n == 0 { vec![0; BLOCK] } else { content(core, lba, n) };
        if got == want {
            Ok(())
        } else {
            Err(format!("core {core} block {lba}: not what write {n} left there"))
        }
    };
    while !stop.load(Ordering::Relaxed) {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // Mostly one block; now and then more than one command takes.
        let count = if seed >> 60 == 0 { 600 } else { 1 + (seed >> 40) % 8 };
        let at = (seed >> 33) % (half - count);
        let n = rounds.fetch_add(1, Ordering::Relaxed) + 1;
        let data: Vec<u8> = (at..at + count).flat_map(|b| content(core, b, n)).collect();
        channel
            .write(core * half + at, Buf::from_slice(&data), false)
            .await
            .map_err(|e| format!("write: {e}"))?;
        model[at as usize..(at + count) as usize].fill(n);
        let back = (seed >> 20) % (half - 8);
        let got =
            channel.read(core * half + back, 8).await.map_err(|e| format!("read: {e}"))?.to_contiguous();
        for (i, block) in got.chunks(BLOCK).enumerate() {
            check(back + i as u64, model[back as usize + i], block.to_vec())?;
        }
        if seed >> 58 == 0 {
            channel.flush().await.map_err(|e| format!("flush: {e}"))?;
        }
    }
    for at in (0..half).step_by(64) {
        let got = channel.read(core * half + at, 64).await.map_err(|e| format!("read: {e}"))?.to_contiguous();
        for (i, block) in got.chunks(BLOCK).enumerate() {
            check(at + i as u64, model[at as usize + i], block.to_vec())?;
        }
    }
    Ok(())
}

#[test]
fn a_namespace_is_a_device() {
    let (far, near) = (Far::new(), Near::new());
    far.disk("b", 5);
    let at = far.listen();
    assert_eq!(near.attach(options(&at)).expect("attached"), ["Farn1", "Farn5"]);
    let device = near.registry.get("Farn1").expect("registered");
    let behind = far.registry.get("a").expect("registered");
    assert_eq!((device.blocks(), device.block_size_bytes()), (BLOCKS, BLOCK as u32));
    assert_eq!(device.info().uuid, behind.info().uuid);
    Load::on(&near, "Farn1").end().expect("no error");
    assert!(behind.stats().totals(cryptfold_bdev::Class::Write).ops > 0);
    assert_eq!(near.remotes.list()[0].links[0].state, "enabled");
    assert_eq!(near.remotes.saved().len(), 1);
    near.remotes.detach("Far", &PathFilter::default()).expect("nobody uses it");
    assert!(near.registry.list().is_empty() && near.remotes.is_empty());
    wait("no controller left", || far.target.controllers(NQN).is_ok_and(|c| c.is_empty()));
}

#[test]
fn what_changes_there_changes_here() {
    let (far, near) = (Far::new(), Near::new());
    let at = far.listen();
    near.attach(options(&at)).expect("attached");
    far.disk("b", 2);
    wait("added", || near.registry.get("Farn2").is_ok());
    far.registry.get("b").expect("there").set_blocks(BLOCKS * 2);
    wait("resized", || near.registry.get("Farn2").is_ok_and(|b| b.blocks() == BLOCKS * 2));
    far.target.remove_ns(NQN, 2).expect("there");
    wait("removed", || near.registry.get("Farn2").is_err());
    // Another disk under the number of one that is in use: another device, once its user lets go.
    let told = Arc::new(AtomicBool::new(false));
    let tell = told.clone();
    let desc = near.registry.open("Farn1", Access::ReadWrite, move |_| tell.store(true, Ordering::Relaxed));
    let desc = desc.expect("there");
    let old = desc.bdev().info().uuid;
    far.target.remove_ns(NQN, 1).expect("there");
    far.disk("c", 1);
    wait("told", || told.load(Ordering::Relaxed));
    drop(desc);
    wait("another one", || near.registry.get("Farn1").is_ok_and(|b| b.info().uuid != old));
}

#[test]
fn a_path_goes_and_comes_back_under_load() {
    let (far, near) = (Far::new(), Near::new());
    let (first, second) = (far.listen(), far.listen());
    let mut o = options(&first);
    (o.connect.hdgst, o.connect.ddgst) = (true, true);
    near.attach(o.clone()).expect("attached");
    o.connect.trsvcid = second.socket_addr().port().to_string();
    near.attach(o.clone()).expect("a second path");
    assert!(matches!(near.attach(o), Err(RemoteError::Already(_))));
    let load = Load::on(&near, "Farn1");
    for gone in [&first, &second] {
        let link = usize::from(std::ptr::eq(gone, &second));
        far.target.remove_listener(NQN, gone).expect("it listens");
        load.goes_on();
        wait("path lost", || near.state(link) != "enabled");
        load.goes_on();
        far.listen_at(&gone.socket_addr().port().to_string());
        wait("path back", || near.state(link) == "enabled");
        load.goes_on();
    }
    // Both at once: I/O waits.
    for l in [&first, &second] {
        far.target.remove_listener(NQN, l).expect("it listens");
    }
    wait("paths lost", || near.state(0) != "enabled" && near.state(1) != "enabled");
    std::thread::sleep(Duration::from_millis(500));
    let before = load.rounds();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(load.rounds(), before, "no path, no I/O");
    far.listen_at(&second.socket_addr().port().to_string());
    load.goes_on();
    load.end().expect("no error, no wrong byte");
}

#[test]
fn one_association_fails_over() {
    let (far, near) = (Far::new(), Near::new());
    let (first, second) = (far.listen(), far.listen());
    let mut o = options(&first);
    o.multipath = Multipath::Failover;
    near.attach(o.clone()).expect("attached");
    o.connect.trsvcid = second.socket_addr().port().to_string();
    near.attach(o).expect("another address");
    wait("one association", || far.target.controllers(NQN).is_ok_and(|c| c.len() == 1));
    assert_eq!(near.remotes.list()[0].links[0].alternates.len(), 1);
    let load = Load::on(&near, "Farn1");
    far.target.remove_listener(NQN, &first).expect("it listens");
    load.goes_on();
    let port = second.socket_addr().port().to_string();
    wait("failed over", || near.remotes.list()[0].links[0].trid["trsvcid"] == port.as_str());
    near.remotes.reset("Far", None).expect("the second listens");
    load.goes_on();
    load.end().expect("no error");
    let filter = PathFilter { trsvcid: Some("1".into()), ..Default::default() };
    assert!(matches!(near.remotes.detach("Far", &filter), Err(RemoteError::NoPath(_))));
}

#[test]
fn access_states_choose_the_path() {
    let (far, near) = (Far::new(), Near::new());
    let (first, second) = (far.listen(), far.listen());
    let mut o = options(&first);
    near.attach(o.clone()).expect("attached");
    o.connect.trsvcid = second.socket_addr().port().to_string();
    near.attach(o).expect("a second path");
    let load = Load::on(&near, "Farn1");
    for (inaccessible, other) in [(&first, &second), (&second, &first), (&first, &second)] {
        far.target.set_ana_state(NQN, other, AnaState::Optimized, None).expect("it listens");
        far.target.set_ana_state(NQN, inaccessible, AnaState::Inaccessible, None).expect("it listens");
        load.goes_on();
    }
    load.end().expect("no error");
}

#[test]
fn io_fails_in_time_and_controllers_are_given_up() {
    let (far, near) = (Far::new(), Near::new());
    let at = far.listen();
    let mut o = options(&at);
    o.recovery = Recovery::new(60, 1, 1).expect("they fit");
    near.attach(o).expect("attached");
    let load = Load::on(&near, "Farn1");
    far.target.remove_listener(NQN, &at).expect("it listens");
    // Long before the controller is given up, which takes its device away.
    load.threads.iter().for_each(|t| wait("fast fail", || t.is_finished()));
    assert!(load.end().is_err_and(|e| e.contains(&Status::TRANSIENT_TRANSPORT_ERROR.to_string())));
    assert!(near.registry.get("Farn1").is_ok());
    wait("given up", || near.remotes.is_empty() && near.registry.get("Farn1").is_err());
}

/// A device that says of each write that its path has failed.
struct Pathless {
    info: DeviceInfo,
    writes: AtomicU64,
}

struct PathlessQueue(Arc<Pathless>);

impl Device for Pathless {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        Ok(Rc::new(PathlessQueue(self)))
    }
}

impl Queue for PathlessQueue {
    fn submit(self: Rc<Self>, io: Box<Io>) {
        self.0.writes.fetch_add(u64::from(io.op == Op::Write), Ordering::Relaxed);
        // Path related, Internal Path Error (NVMe Base 2.0 section 3.3.3.2.4).
        io.finish(Status::new(3, 0));
    }
}

/// A path error beside a path that is said to be good was sent again for ever.
#[test]
fn path_errors_are_retried_so_often_and_no_more() {
    let (far, near) = (Far::new(), Near::new());
    let mut info = DeviceInfo::new("pathless", "test", BLOCK as u32, BLOCKS);
    info.ops = OpSet::of(&[Op::Read, Op::Write, Op::Flush]);
    let device = Arc::new(Pathless { info, writes: AtomicU64::new(0) });
    far.registry.register(device.clone()).expect("a new name");
    let ns = NsOptions { bdev_name: "pathless".into(), nsid: Some(2), ..Default::default() };
    assert_eq!(far.target.add_ns(NQN, &ns), Ok(2));
    let at = far.listen();
    near.attach(options(&at)).expect("attached");
    let descriptor = near.registry.open("Farn2", Access::ReadWrite, |_| {}).expect("it is there");
    let write = move || async move {
        let channel = descriptor.channel().expect("a channel");
        channel.write(0, Buf::from_slice(&[1; BLOCK]), false).await
    };
    let status = near.handles()[0].block_on(write).expect("it runs").expect_err("there is no path");
    assert_eq!(status.sct(), 3, "{status}");
    assert_eq!(device.writes.load(Ordering::Relaxed), 1 + 3);
}

/// A process ends while a path is lost that would be waited for for ever.
#[test]
fn nobody_waits_for_a_lost_path_at_the_end() {
    let (far, near) = (Far::new(), Near::new());
    let at = far.listen();
    near.attach(options(&at)).expect("attached");
    let load = Load::on(&near, "Farn1");
    near.remotes.hurry();
    load.goes_on();
    far.target.remove_listener(NQN, &at).expect("it listens");
    wait("I/O fails", || load.threads.iter().all(|t| t.is_finished()));
    assert!(load.end().is_err_and(|e| e.contains(&Status::TRANSIENT_TRANSPORT_ERROR.to_string())));
}

#[test]
fn without_time_outs_there_is_one_attempt() {
    let (far, near) = (Far::new(), Near::new());
    let at = far.listen();
    let mut o = options(&at);
    o.recovery = Recovery::new(0, 0, 0).expect("they fit");
    near.attach(o).expect("attached");
    near.remotes.reset("Far", None).expect("it listens");
    far.target.remove_listener(NQN, &at).expect("it listens");
    wait("failed", || near.state(0) == "failed");
    far.listen_at(&at.socket_addr().port().to_string());
    near.remotes.reset("Far", None).expect("it listens again");
    Load::on(&near, "Farn1").end().expect("no error");
    near.remotes.detach("Far", &PathFilter::default()).expect("nobody uses it");
}

#[test]
fn nobody_there_and_nobody_let_in() {
    let (far, near) = (Far::new(), Near::new());
    let at = far.listen();
    far.target.allow_any_host(NQN, false).expect("there");
    assert!(matches!(near.attach(options(&at)), Err(RemoteError::Connect(_))));
    far.target.remove_listener(NQN, &at).expect("it listens");
    assert!(matches!(near.attach(options(&at)), Err(RemoteError::Connect(_))));
    let mut o = options(&at);
    o.connect.io_queues = 1;
    assert!(near.attach(o).is_err_and(|e| e.to_string().contains("num_io_queues")));
    assert!(near.remotes.is_empty() && near.registry.list().is_empty());
}

#[test]
fn keys_for_tls_and_authentication_count_at_every_connection() {
    let (far, near) = (Far::new(), Near::new());
    far.target.allow_any_host(NQN, false).expect("there");
    let secret = |b| Secret::new(&[b; 48], Some(HashId::Sha384)).expect("legal");
    let psk = Psk::new(&[9; 32], Some(HashId::Sha256)).expect("legal");
    let named = |key| Some(Named { name: "k".into(), key });
    let access = HostAccess {
        dhchap: named(secret(1)),
        dhchap_ctrlr: named(secret(2)),
        psk: Some(Named { name: "p".into(), key: psk.clone() }),
    };
    far.target.add_host(NQN, HOST, access).expect("added");
    let any = ListenAddr::parse("TCP", Some("IPv4"), "127.0.0.1", "0").expect("an address");
    let tls: Vec<ListenAddr> = (0..2)
        .map(|_| far.target.add_secure_listener(NQN, &any, PortSecurity::Tls).expect("a free port"))
        .collect();
    let mut o = options(&tls[0]);
    assert!(matches!(near.attach(o.clone()), Err(RemoteError::Connect(_))));
    o.connect.tls = Some(TlsKey { psk, version: Version::V1 });
    assert!(matches!(near.attach(o.clone()), Err(RemoteError::Connect(_))));
    o.connect.credentials = Some(Credentials {
        secret: secret(1),
        controller: Some(secret(2)),
        offer: Offer { hashes: vec![HashId::Sha384], groups: vec![DhGroup::Ffdhe2048] },
    });
    near.attach(o.clone()).expect("attached");
    o.connect.trsvcid = tls[1].socket_addr().port().to_string();
    near.attach(o).expect("a second path");
    let load = Load::on(&near, "Farn1");
    far.target.remove_listener(NQN, &tls[0]).expect("it listens");
    load.goes_on();
    wait("path lost", || near.state(0) != "enabled");
    far.target.add_secure_listener(NQN, &tls[0], PortSecurity::Tls).expect("a free port");
    wait("path back", || near.state(0) == "enabled");
    load.goes_on();
    load.end().expect("no error, no wrong byte");
}

/// Connections come from the address that is asked for; from two of them there are two paths. A reset of the device makes both
/// associations anew, under I/O.
#[test]
fn paths_from_addresses_of_this_host_and_the_reset_operation() {
    let far = Far::new();
    let at = far.listen();
    let near = Near::new();
    let from = |last: u8| {
        let mut o = options(&at);
        o.connect.hostaddr = Some(std::net::IpAddr::from([127, 0, 0, last]));
        o
    };
    near.attach(from(5)).expect("attaches");
    near.attach(from(6)).expect("another path");
    assert!(near.attach(from(6)).expect_err("the same again").to_string().contains("already exists"));
    let mut six = from(5);
    (six.name, six.connect.hostaddr) = ("Six".into(), Some("::1".parse().expect("an address")));
    let why = near.attach(six).expect_err("no IPv6 there").to_string();
    assert!(why.contains("no address that can be reached from ::1"), "{why}");
    let peers = || {
        let qpairs = far.target.qpairs(NQN).expect("the subsystem is there");
        let address = |peer: &str| peer.rsplit_once(':').map(|(a, _)| a.to_string());
        let mut all: Vec<String> = qpairs.iter().filter_map(|q| address(&q.peer_address)).collect();
        all.sort();
        all.dedup();
        all
    };
    assert_eq!(peers(), ["127.0.0.5", "127.0.0.6"]);

    let load = Load::on(&near, "Farn1");
    let before: Vec<_> = near.remotes.list()[0].links.iter().map(|l| l.cntlid).collect();
    let desc = near.registry.open("Farn1", Access::ReadWrite, |_| {}).expect("it is there");
    let status = near.handles()[0]
        .block_on(move || async move {
            let channel = desc.channel().expect("a channel");
            channel.io(Io::new(Op::Reset, 0, 0)).await.status()
        })
        .expect("the reactor lives");
    assert_eq!(status, Status::SUCCESS);
    wait("both paths are back", || (0..2).all(|n| near.state(n) == "enabled"));
    let after: Vec<_> = near.remotes.list()[0].links.iter().map(|l| l.cntlid).collect();
    assert!(before.iter().all(|id| !after.contains(id)), "{before:?} {after:?}");
    load.goes_on();
    load.end().expect("verified");
    let filter =
        PathFilter { hostaddr: Some("127.0.0.5".parse().expect("an address")), ..Default::default() };
    near.remotes.detach("Far", &filter).expect("one path goes");
    let left = &near.remotes.list()[0].links;
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].hostaddr, Some("127.0.0.6".parse().expect("an address")));
}
