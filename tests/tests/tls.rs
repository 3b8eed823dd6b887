//! TLS 1.3 with pre-shared keys: our target against our initiator, OpenSSL, plain hosts and garbage, over loopback.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use cryptfold_bdev::{Complete, Frame, Io, Op, Queue, Registry};
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_nvmf_auth::Names;
use cryptfold_nvmf_initiator::{
    ConnectOptions, Controller, Credentials, DhGroup, Error, HashId, Layer, NamespaceQueue, Offer, Psk,
    Secret, TcpDial, TlsKey, Version, discover,
};
use cryptfold_nvmf_spec::pdu::build;
use cryptfold_nvmf_spec::{Nsid, nqn};
use cryptfold_nvmf_target::{
    HostAccess, ListenAddr, Named, NsOptions, PortSecurity, SubsystemOptions, Target, TransportOptions,
};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::sync::oneshot;
use cryptfold_reactor::{Handle, IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};

const NQN: &str = "nqn.2024-01.io.cryptfold:test";
const BLOCK: usize = 512;

struct Rig {
    target: Arc<Target>,
    /// With TLS, by key 1.
    tls: ConnectOptions,
    /// Of the same host, at the port without TLS.
    plain: ConnectOptions,
    secure: ListenAddr,
    host: Handle,
    _runtime: Runtime,
}

fn psk(byte: u8, hash: HashId) -> Psk {
    Psk::new(&vec![byte; hash.len_bytes()], Some(hash)).expect("legal")
}

fn tls_key(byte: u8, hash: HashId, version: Version) -> Option<TlsKey> {
    Some(TlsKey { psk: psk(byte, hash), version })
}

fn access(byte: u8, hash: HashId) -> HostAccess {
    HostAccess { psk: Some(Named { name: "k".into(), key: psk(byte, hash) }), ..Default::default() }
}

/// No deadline that a starved machine could miss.
fn patient() -> TransportOptions {
    TransportOptions { connect_timeout_ms: 300_000, auth_timeout_ms: 300_000, ..Default::default() }
}

/// One subsystem with a port for TLS and one without; its host has key 1 (SHA-256).
fn rig(options: TransportOptions) -> Rig {
    let memory = MemoryConfig { fixed_buffers: false, arena_bytes: 4 << 20, ..Default::default() };
    let policy = IdlePolicy::Interrupt;
    let config = RuntimeConfig { cores: vec![0, 1], policy, pin: false, memory, ..Default::default() };
    let runtime = Runtime::start(config).expect("reactors start");
    let registry = Registry::new();
    let disk = MallocOptions {
        name: "disk".into(),
        num_blocks: 16_384,
        block_size_bytes: BLOCK as u32,
        uuid: None,
        optimal_io_boundary: 0,
    };
    cryptfold_bdev_malloc::create(&registry, disk).expect("a RAM disk");
    let target = Arc::new(Target::new(registry, &runtime.handles()[1..]));
    target.create_transport("TCP", options).expect("transport");
    target.create_subsystem(SubsystemOptions::new(NQN)).expect("subsystem");
    target.add_ns(NQN, &NsOptions { bdev_name: "disk".into(), ..Default::default() }).expect("namespace");
    let any = ListenAddr::parse("TCP", Some("IPv4"), "127.0.0.1", "0").expect("an address");
    let secure = target.add_secure_listener(NQN, &any, PortSecurity::Tls).expect("a free port");
    let plain = target.add_listener(NQN, &any).expect("a free port");
    let mut tls = ConnectOptions::new("127.0.0.1", secure.port.to_string(), NQN);
    // No deadline that a starved machine could miss.
    (tls.connect_timeout, tls.io_timeout) = (Duration::from_secs(300), Duration::from_secs(300));
    tls.tls = tls_key(1, HashId::Sha256, Version::V1);
    let plain = ConnectOptions { trsvcid: plain.port.to_string(), tls: None, ..tls.clone() };
    target.add_host(NQN, &tls.hostnqn, access(1, HashId::Sha256)).expect("a new host");
    Rig { target, tls, plain, secure, host: runtime.handles()[0].clone(), _runtime: runtime }
}

/// Waits for one I/O.
struct One(Mutex<Option<oneshot::Sender<Box<Io>>>>);

impl Complete for One {
    fn complete(self: Rc<Self>, io: Box<Io>, _: Frame) {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner).take().expect("completes once");
        assert!(sender.send(io).is_ok(), "the test waits");
    }
}

async fn run(queue: &Rc<NamespaceQueue>, op: Op, lba: u64, data: Vec<u8>) -> Vec<u8> {
    let mut io = Io::new(op, lba, (data.len() / BLOCK) as u64);
    io.data = Buf::from_slice(&data).into();
    let (sender, receiver) = oneshot::channel();
    io.push(Rc::new(One(Mutex::new(Some(sender)))), 0, 0);
    queue.clone().submit(io);
    let io = receiver.await.expect("every I/O comes back");
    assert!(io.status().is_ok(), "{op:?} at {lba}: {:?}", io.status());
    io.data.to_contiguous().to_vec()
}

/// Writes and reads back, small and large, in the capsule and by R2T.
async fn use_it(options: ConnectOptions) -> Result<(), Error> {
    let c = Controller::connect(&options).await?;
    let info = c.namespace(Nsid(1)).await?;
    let queue = c.io_queue(8).await?;
    let ns = queue.namespace(&info);
    for blocks in [1, 8, 64, 999, 3000] {
        let data: Vec<u8> = (0..blocks * BLOCK).map(|i| (i * 7 + i / 509 + blocks) as u8).collect();
        run(&ns, Op::Write, 100, data.clone()).await;
        assert_eq!(run(&ns, Op::Read, 100, vec![0; data.len()]).await, data, "{blocks} blocks");
    }
    drop((ns, queue));
    c.shutdown().await;
    Ok(())
}

impl Rig {
    fn connect(&self, options: &ConnectOptions) -> Result<(), Error> {
        let options = options.clone();
        self.host.block_on(move || use_it(options)).expect("the reactor runs")
    }

    fn refused(&self, options: &ConnectOptions, what: &str) {
        let e = self.connect(options).expect_err("refused").to_string();
        assert!(e.contains(what), "{e}");
    }

    fn identity(&self, version: Version) -> (String, String) {
        let names = Names { host: self.tls.hostnqn.clone(), subsystem: NQN.into() };
        let tls = psk(1, HashId::Sha256).tls(&names, version).expect("fits");
        (tls.identity, tls.key.expose().iter().map(|b| format!("{b:02x}")).collect())
    }
}

/// The audit log of this process from now on.
fn audit() -> impl Fn(&str) -> Vec<String> {
    static LOG: OnceLock<Arc<Mutex<Vec<u8>>>> = OnceLock::new();
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(buf);
            Ok(buf.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = LOG.get_or_init(|| {
        let log = Arc::<Mutex<Vec<u8>>>::default();
        let sink = log.clone();
        tracing_subscriber::fmt()
            .with_env_filter("cryptfold_audit=info")
            .with_ansi(false)
            .with_writer(move || Sink(sink.clone()))
            .init();
        log
    });
    let log = log.clone();
    move |about: &str| {
        let text =
            String::from_utf8(log.lock().unwrap_or_else(PoisonError::into_inner).clone()).expect("text");
        text.lines().filter(|l| l.contains(about)).map(str::to_owned).collect()
    }
}

fn soon(what: &str, done: impl Fn() -> bool) {
    for _ in 0..60_000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("not within a minute: {what}");
}

fn icreq() -> Vec<u8> {
    let mut bytes = vec![0; 128];
    let n = build::ic_req(&mut bytes, 0, false, false, 0).expect("it fits");
    assert_eq!(n, 128);
    bytes
}

#[test]
fn every_version_hash_and_digest() {
    let rig = rig(patient());
    for hash in [HashId::Sha256, HashId::Sha384] {
        rig.target.remove_host(NQN, &rig.tls.hostnqn).expect("it is there");
        rig.target.add_host(NQN, &rig.tls.hostnqn, access(1, hash)).expect("a new host");
        for version in [Version::V0, Version::V1, Version::V1Old] {
            for digests in [false, true] {
                let mut options = ConnectOptions { tls: tls_key(1, hash, version), ..rig.tls.clone() };
                (options.hdgst, options.ddgst) = (digests, digests);
                assert_eq!(rig.connect(&options), Ok(()), "{hash:?} {version:?} {digests}");
            }
        }
    }
    let (target, options) = (rig.target.clone(), rig.tls.clone());
    let options = ConnectOptions { tls: tls_key(1, HashId::Sha384, Version::V1), ..options };
    rig.host
        .block_on(move || async move {
            let c = Controller::connect(&options).await.expect("connects");
            let queue = c.io_queue(4).await.expect("opens");
            let ciphers: Vec<_> = target
                .qpairs(NQN)
                .expect("it exists")
                .into_iter()
                .map(|q| q.tls.expect("TLS").cipher)
                .collect();
            assert_eq!(ciphers, ["TLS_AES_256_GCM_SHA384"; 2]);
            // Without its host, the controller is gone.
            target.remove_host(NQN, &options.hostnqn).expect("it is there");
            drop(queue);
            assert!(c.namespaces().await.is_err());
        })
        .expect("the reactor runs");
}

/// Both ends ask the kernel for its record layer: where it has none, or where that is switched off, the library does it all.
#[test]
fn records_are_left_to_the_kernel_where_it_takes_them() {
    let rig = rig(patient());
    // Has the kernel look for its module.
    assert_eq!(rig.connect(&rig.tls), Ok(()));
    let has = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp")
        .is_ok_and(|list| list.split_whitespace().any(|name| name == "tls"));
    for (target_may, host_may) in [(true, true), (true, false), (false, true), (false, false)] {
        rig.target.set_kernel_tls(target_may);
        let options = ConnectOptions { kernel_tls: host_may, ..rig.tls.clone() };
        assert_eq!(rig.connect(&options), Ok(()));
        let target = rig.target.clone();
        rig.host
            .block_on(move || async move {
                let c = Controller::connect(&options).await.expect("connects");
                let layer = |may| if may && has { Layer::Kernel } else { Layer::Library };
                assert_eq!(c.tls_layers(), Some((layer(host_may), layer(host_may))));
                let queues = target.qpairs(NQN).expect("it exists");
                let mine = queues.iter().filter(|q| q.cntlid == c.cntlid().0);
                let layers: Vec<_> = mine.map(|q| q.tls.as_ref().map(|t| (t.send, t.receive))).collect();
                assert_eq!(layers, [Some((layer(target_may), layer(target_may)))]);
                c.shutdown().await;
            })
            .expect("the reactor runs");
    }
}

#[test]
fn whoever_has_not_the_key_stays_out_and_is_written_down() {
    let log = audit();
    let rig = rig(patient());
    let mine = |about: &str| log(&rig.tls.hostnqn).iter().filter(|l| l.contains(about)).count();
    let with = |tls| ConnectOptions { tls, ..rig.tls.clone() };
    rig.refused(&with(tls_key(2, HashId::Sha256, Version::V1)), "another key");
    soon("the audit log", || mine("no key belongs to the identity") == 1);
    rig.refused(&with(tls_key(2, HashId::Sha256, Version::V0)), "another key");
    soon("the audit log", || mine("TLS handshake failed") == 1);
    rig.refused(&with(tls_key(1, HashId::Sha384, Version::V0)), "another key");
    // No TLS at the port for it, and a key at the port without.
    rig.refused(&with(None), "closed by the target");
    soon("the audit log", || !log("does not speak TLS").is_empty());
    rig.refused(
        &ConnectOptions { trsvcid: rig.plain.trsvcid.clone(), ..rig.tls.clone() },
        "does not speak TLS",
    );
    // A host with a key does not get in without TLS: its name would be a mere claim.
    rig.refused(&rig.plain, "Connect Invalid Host");
    soon("the audit log", || mine("came without TLS") == 1);
    // The right key, and another host's name in Connect, or another subsystem's.
    // Another name, whatever this one was drawn to be.
    let (start, end) = rig.tls.hostnqn.split_at(rig.tls.hostnqn.len() - 1);
    let mallory = format!("{start}{}", if end == "0" { "1" } else { "0" });
    let second = "nqn.2024-01.io.cryptfold:second";
    rig.target
        .create_subsystem(SubsystemOptions { allow_any_host: true, ..SubsystemOptions::new(second) })
        .expect("new");
    rig.target.add_secure_listener(second, &rig.secure, PortSecurity::Tls).expect("the port is shared");
    rig.target.add_host(NQN, &mallory, HostAccess::default()).expect("a new host");
    for (hostnqn, subnqn) in [(&mallory, NQN), (&rig.tls.hostnqn, second)] {
        let dial = Arc::new(TcpDial::new(&rig.tls));
        let claim =
            ConnectOptions { hostnqn: hostnqn.clone(), subnqn: subnqn.into(), tls: None, ..rig.tls.clone() };
        let done =
            rig.host.block_on(move || async move { Controller::connect_via(dial, &claim).await.map(drop) });
        let e = done.expect("the reactor runs").expect_err("refused").to_string();
        assert!(e.contains("Connect Invalid Host"), "{e}");
        soon("the audit log", || {
            log("another host or subsystem")
                .iter()
                .any(|l| l.contains(hostnqn.as_str()) && l.contains(subnqn))
        });
    }
    let (identity, key) = rig.identity(Version::V1);
    let digest = identity.rsplit(' ').next().expect("it has parts").to_owned();
    assert!(log(&digest).is_empty() && log(&key).is_empty(), "nothing of keys is written down");
    assert_eq!(rig.connect(&rig.tls), Ok(()), "the right one gets in");
}

#[test]
fn with_dh_hmac_chap_on_the_same_connection() {
    let rig = rig(patient());
    let secret = |b: u8| Secret::new(&[b; 32], Some(HashId::Sha256)).expect("32 bytes");
    let offer = Offer { hashes: vec![HashId::Sha384], groups: vec![DhGroup::Ffdhe2048] };
    let named = |b| Some(Named { name: format!("c{b}"), key: secret(b) });
    rig.target.set_keys(NQN, &rig.tls.hostnqn, named(3), named(4)).expect("known");
    rig.refused(&rig.tls, "requires authentication");
    let credentials =
        |own| Some(Credentials { secret: secret(own), controller: Some(secret(4)), offer: offer.clone() });
    rig.refused(&ConnectOptions { credentials: credentials(5), ..rig.tls.clone() }, "authentication failed");
    let both = ConnectOptions { credentials: credentials(3), ..rig.tls.clone() };
    assert_eq!(rig.connect(&both), Ok(()));
    assert!(rig.connect(&ConnectOptions { trsvcid: rig.plain.trsvcid.clone(), tls: None, ..both }).is_err());
}

#[test]
fn the_discovery_log_says_where_tls_is_needed() {
    let rig = rig(patient());
    let any = ListenAddr { port: 0, ..rig.secure.clone() };
    let open = rig.target.add_listener(nqn::DISCOVERY, &any).expect("a free port");
    let found = |options: &ConnectOptions| {
        let options = options.clone();
        rig.host.block_on(move || async move { discover(&options).await }).expect("the reactor runs")
    };
    let ask = ConnectOptions { trsvcid: open.port.to_string(), ..rig.plain.clone() };
    let concat = rig.target.add_secure_listener(NQN, &any, PortSecurity::Concatenation).expect("a free port");
    let list = found(&ask).expect("a log");
    let secure: Vec<_> = list.iter().map(|d| (d.trsvcid.clone(), d.secure, d.concat)).collect();
    let ports = [(rig.tls.trsvcid.clone(), true, false), (rig.plain.trsvcid.clone(), false, false)];
    assert_eq!(secure[..2], ports);
    assert_eq!(secure[2..], [(concat.port.to_string(), false, true)]);
    rig.target.remove_listener(NQN, &concat).expect("it listens");
    // Discovery through TLS needs a key for the discovery subsystem.
    assert!(found(&rig.tls).is_err());
    rig.target.add_host(nqn::DISCOVERY, &rig.tls.hostnqn, access(1, HashId::Sha256)).expect("a new host");
    assert_eq!(found(&rig.tls).expect("a log").len(), 2);
    assert!(
        rig.target.add_listener(NQN, &rig.secure).expect_err("for TLS").to_string().contains("for TLS only")
    );
    let open = rig.target.add_secure_listener(NQN, &open, PortSecurity::Tls).expect_err("without");
    assert!(open.to_string().contains("without TLS"), "{open}");
}

/// Secure channel concatenation with our initiator: authenticates without TLS, works with it, gets another key.
#[test]
fn concatenation_from_start_to_end() {
    let log = audit();
    let rig = rig(patient());
    let any = ListenAddr { port: 0, ..rig.secure.clone() };
    let port = rig.target.add_secure_listener(NQN, &any, PortSecurity::Concatenation).expect("a free port");
    let host = "nqn.2024-01.io.cryptfold:concatenating";
    let secret = |b: u8| Secret::new(&[b; 32], Some(HashId::Sha256)).expect("32 bytes");
    let named = |b| Some(Named { name: format!("c{b}"), key: secret(b) });
    let access = HostAccess { dhchap: named(3), dhchap_ctrlr: named(4), psk: None };
    rig.target.add_host(NQN, host, access).expect("a new host");
    let options = |own, controller: Option<u8>, hash, group| {
        let offer = Offer { hashes: vec![hash], groups: vec![group] };
        let credentials = Credentials { secret: secret(own), controller: controller.map(secret), offer };
        let mut options = ConnectOptions::new("127.0.0.1", port.port.to_string(), NQN);
        (options.hostnqn, options.io_queues) = (host.into(), 2);
        (options.connect_timeout, options.io_timeout) = (rig.tls.connect_timeout, rig.tls.io_timeout);
        (options.credentials, options.concat) = (Some(credentials), true);
        options
    };
    let group = DhGroup::Ffdhe2048;
    for hash in [HashId::Sha256, HashId::Sha384] {
        for controller in [None, Some(4)] {
            let mut options = options(3, controller, hash, group);
            (options.hdgst, options.ddgst) = (controller.is_some(), controller.is_some());
            assert_eq!(rig.connect(&options), Ok(()), "{hash:?} {controller:?}");
        }
    }
    soon("wiped keys", || rig.target.generated_keys() == 0);
    // Wrong secrets, on both sides; what can not generate a key; who does not concatenate; no TLS at all.
    rig.refused(&options(5, None, HashId::Sha256, group), "authentication failed");
    soon("the audit log", || log(host).iter().any(|l| l.contains("authentication failed")));
    rig.refused(&options(3, Some(5), HashId::Sha256, group), "authentication failed");
    rig.refused(&options(3, None, HashId::Sha256, DhGroup::Null), "concat");
    rig.refused(&options(3, None, HashId::Sha512, group), "concat");
    let good = options(3, Some(4), HashId::Sha256, group);
    rig.refused(&ConnectOptions { concat: false, ..good.clone() }, "requires secure channel concatenation");
    rig.refused(
        &ConnectOptions { trsvcid: rig.plain.trsvcid.clone(), ..good.clone() },
        "concatenation mismatch",
    );
    rig.refused(&ConnectOptions { trsvcid: rig.tls.trsvcid.clone(), ..good.clone() }, "closed by the target");
    soon("wiped keys", || rig.target.generated_keys() == 0);
    // A host with a key of its own gets in there, too, and only so.
    let own = ConnectOptions { trsvcid: port.port.to_string(), ..rig.tls.clone() };
    assert_eq!(rig.connect(&own), Ok(()));
    rig.refused(&ConnectOptions { tls: None, ..own }, "Connect Invalid Host");
    let target = rig.target.clone();
    rig.host
        .block_on(move || async move {
            let c = Controller::connect(&good).await.expect("connects");
            let info = c.namespace(Nsid(1)).await.expect("there");
            let first = c.io_queue(4).await.expect("opens").namespace(&info);
            let credentials = good.credentials.as_ref().expect("it has some");
            c.reauthenticate(credentials).await.expect("another key");
            let second = c.io_queue(4).await.expect("opens with the other key").namespace(&info);
            for (n, queue) in [first, second].iter().enumerate() {
                let data = vec![n as u8 + 1; 8 * BLOCK];
                run(queue, Op::Write, 0, data.clone()).await;
                assert_eq!(run(queue, Op::Read, 0, vec![0; data.len()]).await, data);
            }
            assert_eq!(target.generated_keys(), 1);
            let ciphers = target.qpairs(NQN).expect("it exists");
            assert!(ciphers.iter().filter(|q| q.cntlid == c.cntlid().0).all(|q| q.tls.is_some()));
            c.shutdown().await;
        })
        .expect("the reactor runs");
    soon("wiped keys", || rig.target.generated_keys() == 0);
}

#[test]
fn openssl_gets_in_with_the_key_and_not_without() {
    let rig = rig(patient());
    let openssl = |identity: &str, key: &str, more: &[&str]| {
        let address = format!("127.0.0.1:{}", rig.secure.port);
        let mut child = Command::new("openssl")
            .args(["s_client", "-quiet", "-connect", &address, "-psk_identity", identity, "-psk", key])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("openssl is installed");
        let mut stdin = child.stdin.take().expect("a pipe");
        // Gone already if the handshake failed.
        let _ = stdin.write_all(&icreq());
        let mut answer = [0; 128];
        let got = child.stdout.take().expect("a pipe").read_exact(&mut answer);
        drop(stdin);
        // It may wait for more from us.
        let _ = child.kill();
        let said = child.wait_with_output().expect("it ends").stderr;
        got.map(|()| answer).map_err(|_| String::from_utf8_lossy(&said).into_owned())
    };
    for version in [Version::V0, Version::V1] {
        let (identity, key) = rig.identity(version);
        let answer = openssl(&identity, &key, &["-tls1_3"]).expect("ICResp");
        assert_eq!((answer[0], answer[2], answer[4]), (1, 128, 128), "ICResp of 128 bytes");
        // Keys are derived of a name drawn at random: any byte may be there already.
        let byte = if key.starts_with("00") { "01" } else { "00" };
        let other = openssl(&identity, &format!("{byte}{}", &key[2..]), &["-tls1_3"]);
        assert!(other.is_err(), "{other:?}");
        let old = openssl(&identity, &key, &["-tls1_2"]).expect_err("no downgrade");
        assert!(!old.is_empty(), "openssl says why");
        assert!(openssl("NVMe0R01 nobody nothing", &key, &["-tls1_3"]).is_err());
        // A suite that does not go with the key's hash.
        let suite = ["-tls1_3", "-ciphersuites", "TLS_AES_256_GCM_SHA384"];
        assert!(openssl(&identity, &key, &suite).is_err());
    }
    assert_eq!(rig.connect(&rig.tls), Ok(()));
}

/// Our initiator against OpenSSL's server: the greeting arrives there in the clear.
#[test]
fn our_host_speaks_with_openssl() {
    let rig = rig(patient());
    for version in [Version::V0, Version::V1] {
        let (identity, key) = rig.identity(version);
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = free.local_addr().expect("bound");
        drop(free);
        let mut server = Command::new("openssl")
            .args([
                "s_server",
                "-quiet",
                "-nocert",
                "-tls1_3",
                "-naccept",
                "1",
                "-accept",
                &address.to_string(),
            ])
            .args(["-psk_identity", &identity, "-psk", &key])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("openssl is installed");
        // It is ended when it has seen the greeting.
        let server = std::thread::spawn(move || {
            let mut got = [0; 128];
            let read = server.stdout.take().expect("a pipe").read_exact(&mut got);
            server.kill().expect("it still runs, or has not been waited for");
            server.wait().expect("it ends");
            read.map(|()| got)
        });
        let mut options = rig.tls.clone();
        (options.trsvcid, options.connect_timeout) = (address.port().to_string(), Duration::from_secs(60));
        options.tls = tls_key(1, HashId::Sha256, version);
        let mut tries = 0;
        loop {
            match rig.connect(&options).expect_err("it is no target") {
                // It does not listen yet.
                Error::Connect { why, .. } if why.contains("refused") && tries < 6000 => tries += 1,
                _ => break,
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let got = server.join().expect("it does not panic").expect("ICReq");
        assert_eq!((got[0], got[2], got[4]), (0, 128, 128), "ICReq of 128 bytes");
    }
}

#[test]
fn garbage_and_silence_harm_nobody() {
    let log = audit();
    // Long enough for who behaves on a slow machine.
    let rig = rig(TransportOptions { connect_timeout_ms: 10_000, ..Default::default() });
    let port = rig.secure.port;
    let attacker = std::thread::spawn(move || {
        let open = || {
            let s = TcpStream::connect(("127.0.0.1", port)).expect("connects");
            s.set_read_timeout(Some(Duration::from_secs(60))).expect("a limit");
            s
        };
        // Half a hello, nothing at all: both end by the deadline.
        let mut silent = [open(), open()];
        silent[1].write_all(&[0x16, 3, 1, 1, 0, 1, 0, 0, 0xfc, 3, 3]).expect("connected");
        let mut seed = 1u32;
        for round in 0..200 {
            let mut s = open();
            let mut bytes: Vec<u8> = (0..(round * 37) % 3000)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (seed >> 24) as u8
                })
                .collect();
            // Every other one looks like a record of a handshake.
            if round % 2 == 0 {
                bytes.splice(
                    0..0,
                    [0x16, 3, (round % 5) as u8, (round % 70) as u8, round as u8, (round % 3) as u8],
                );
            }
            // The target may have closed before all is written.
            let _ = s.write_all(&bytes);
            let _ = s.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let end = s.read_to_end(&mut answer);
            let reset = |e: &std::io::Error| e.kind() == std::io::ErrorKind::ConnectionReset;
            assert!(end.as_ref().is_ok() || end.as_ref().is_err_and(reset), "round {round}: {end:?}");
            assert!(answer.len() < 100, "an alert at most");
        }
        for mut s in silent {
            let mut answer = Vec::new();
            s.read_to_end(&mut answer).expect("closed by the deadline");
        }
    });
    while !attacker.is_finished() {
        assert_eq!(rig.connect(&rig.tls), Ok(()), "the well-behaved host goes on");
    }
    attacker.join().expect("what it expected");
    soon("the audit log", || !log("not finished in time").is_empty());
    soon("an empty target", || rig.target.controllers(NQN).is_ok_and(|c| c.is_empty()));
}
