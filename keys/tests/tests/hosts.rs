//! Volumes whose host's key lies at a key server (PyKMIP), served over NVMe/TCP to our initiator: what the key's life there
//! does to the host's I/O.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use cryptfold_bdev::{Access, Complete, Frame, Io, Op, Queue, Status};
use cryptfold_bdev_crypto::engine::{Direction, XtsContext, XtsKey};
use cryptfold_control::audit::AuditLog;
use cryptfold_control::jsonrpc::Handler as _;
use cryptfold_control::logging::{Level, LogControl};
use cryptfold_control::{Control, ControlConfig};
use cryptfold_keys_tests::{KeyServer, SHARED_POLICY};
use cryptfold_kmip::{Client, NewObject, ObjectType, RevocationReason, Secret, State};
use cryptfold_nvmf_initiator::{ConnectOptions, Controller, NamespaceQueue};
use cryptfold_nvmf_spec::Nsid;
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::sync::oneshot;
use cryptfold_reactor::{self as reactor, IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};
use serde_json::{Value, json};

const NQN: &str = "nqn.2024-01.io.cryptfold:keys";
const BLOCK: usize = 4096;
const POLL_MS: u64 = 200;
/// A state that changes at the server is at the hosts within this time.
const PATIENCE: Duration = Duration::from_secs(10);

fn memory() -> MemoryConfig {
    MemoryConfig { hugepages: false, fixed_buffers: false, arena_bytes: 4 << 20 }
}

/// A target of this process.
struct Target {
    control: Arc<Control>,
    port: u16,
}

impl Target {
    fn new(dir: &Path) -> Target {
        let control = Control::new(ControlConfig {
            idle: IdlePolicy::Interrupt,
            pin: false,
            memory: memory(),
            key_dir: dir.join("keys"),
            ..ControlConfig::default()
        });
        control.initialize().expect("a target");
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        Target { control, port: socket.local_addr().expect("its address").port() }
    }

    fn call(&self, method: &str, params: Value) -> Value {
        self.control.call(method, Some(&params)).unwrap_or_else(|e| panic!("{method}: {}", e.message))
    }

    fn get(&self, method: &str) -> Value {
        self.control.call(method, None).unwrap_or_else(|e| panic!("{method}: {}", e.message))
    }

    fn refused(&self, method: &str, params: Value) -> String {
        self.control.call(method, Some(&params)).expect_err("refused").message
    }

    fn add_server(&self, kms: &KeyServer) {
        let (crt, key) = kms.authority.client("target");
        self.call(
            "keyring_kmip_add_server",
            json!({"name": "kms", "servers": [kms.address.to_string()], "ca_file": kms.authority.certificate(),
                "cert_file": crt, "key_file": key, "poll_interval_ms": POLL_MS, "rounds": 1, "timeout_ms": 3000}),
        );
    }

    fn add_key(&self, name: &str, objects: &[&str], more: Value) {
        let mut params = json!({"name": name, "server": "kms", "objects": objects});
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.call("keyring_kmip_add_key", params);
    }

    /// A RAM disk, its host's layer in reverse on top.
    fn add_volume(&self, base: &str, name: &str, key: &str) {
        self.call("bdev_malloc_create", json!({"name": base, "num_blocks": 256, "block_size": BLOCK}));
        self.call(
            "bdev_hostcrypt_create",
            json!({"base_bdev_name": base, "name": name, "kms_key_name": key, "sector_size": 4096}),
        );
    }

    fn export(&self, names: &[&str]) {
        self.call("nvmf_create_transport", json!({"trtype": "TCP"}));
        self.call("nvmf_create_subsystem", json!({"nqn": NQN, "allow_any_host": true}));
        for name in names {
            self.call("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": name}}));
        }
        let address = json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": self.port.to_string()});
        self.call("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": address}));
    }

    fn key(&self, name: &str) -> Value {
        let all = self.get("keyring_kmip_get_keys");
        all.as_array().unwrap().iter().find(|k| k["name"] == name).cloned().expect("the key")
    }

    fn wait_for(&self, key: &str, access: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.key(key);
            if found["access"] == access {
                return found;
            }
            assert!(Instant::now() < deadline, "not {access}: {found}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What a device holds, read without a host.
    fn raw(&self, bdev: &'static str, lba: u64, blocks: u64) -> Vec<u8> {
        let registry = self.control.registry().clone();
        self.control.handles()[0]
            .block_on(move || async move {
                let channel = registry.open(bdev, Access::ReadOnly, |_| ()).unwrap().channel().unwrap();
                let data = channel.read(lba, blocks).await.unwrap();
                let mut bytes = vec![0; data.len_bytes()];
                data.copy_to_slice(&mut bytes);
                bytes
            })
            .unwrap()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.control.shutdown();
    }
}

struct One(RefCell<Option<oneshot::Sender<Box<Io>>>>);

impl Complete for One {
    fn complete(self: Rc<Self>, io: Box<Io>, _: Frame) {
        let sender = self.0.borrow_mut().take().expect("completes once");
        assert!(sender.send(io).is_ok(), "the test waits");
    }
}

async fn run(queue: &Rc<NamespaceQueue>, mut io: Box<Io>) -> Box<Io> {
    let (sender, receiver) = oneshot::channel();
    io.push(Rc::new(One(RefCell::new(Some(sender)))), 0, 0);
    queue.clone().submit(io);
    receiver.await.expect("every I/O comes back")
}

/// A host with one connection that stays, whatever happens to keys.
struct Host {
    jobs: mpsc::Sender<Job>,
    _runtime: Runtime,
}

struct Job {
    nsid: u32,
    op: Op,
    lba: u64,
    blocks: u64,
    data: Vec<u8>,
    reply: mpsc::Sender<(Status, Vec<u8>)>,
}

impl Job {
    async fn run(self, spaces: &[(Nsid, Rc<NamespaceQueue>)]) {
        let (_, queue) = spaces.iter().find(|(n, _)| *n == Nsid(self.nsid)).expect("it is there");
        let mut io = Io::new(self.op, self.lba, self.blocks);
        if self.op == Op::Write {
            io.data = self.data.chunks(BLOCK).map(Buf::from_slice).collect();
        }
        let io = run(queue, io).await;
        let mut data = Vec::new();
        if self.op == Op::Read && io.status().is_ok() {
            data.resize(io.data.len_bytes(), 0);
            io.data.copy_to_slice(&mut data);
        }
        let _ = self.reply.send((io.status(), data));
    }
}

impl Host {
    fn connect(port: u16) -> Host {
        let config = RuntimeConfig {
            cores: vec![1],
            policy: IdlePolicy::Interrupt,
            pin: false,
            memory: memory(),
            ..Default::default()
        };
        let runtime = Runtime::start(config).expect("a reactor");
        let (jobs, work) = mpsc::channel::<Job>();
        let options = ConnectOptions::new("127.0.0.1", port.to_string(), NQN);
        runtime.handles()[0]
            .block_on(move || async move {
                let controller = Controller::connect(&options).await.expect("connects");
                let queue = controller.io_queue(16).await.expect("opens");
                let mut spaces = Vec::new();
                for nsid in controller.namespaces().await.expect("namespaces") {
                    let info = controller.namespace(nsid).await.expect("a namespace");
                    spaces.push((nsid, queue.namespace(&info)));
                }
                reactor::spawn_local(async move {
                    let _kept = (controller, queue);
                    loop {
                        match work.try_recv() {
                            Ok(job) => job.run(&spaces).await,
                            Err(mpsc::TryRecvError::Empty) => reactor::sleep(Duration::from_millis(2)).await,
                            Err(mpsc::TryRecvError::Disconnected) => return,
                        }
                    }
                })
                .detach();
            })
            .expect("the reactor runs");
        Host { jobs, _runtime: runtime }
    }

    fn io(&self, nsid: u32, op: Op, lba: u64, blocks: u64, data: &[u8]) -> (Status, Vec<u8>) {
        let (reply, answer) = mpsc::channel();
        let job = Job { nsid, op, lba, blocks, data: data.to_vec(), reply };
        assert!(self.jobs.send(job).is_ok(), "the host runs");
        answer.recv_timeout(Duration::from_secs(30)).expect("an answer")
    }

    fn read(&self, nsid: u32, lba: u64, blocks: u64) -> Result<Vec<u8>, Status> {
        let (status, data) = self.io(nsid, Op::Read, lba, blocks, &[]);
        status.ok().map(|()| data)
    }

    fn write(&self, nsid: u32, lba: u64, data: &[u8]) -> Result<(), Status> {
        self.io(nsid, Op::Write, lba, (data.len() / BLOCK) as u64, data).0.ok()
    }
}

fn new_key(name: &str) -> NewObject {
    NewObject { name: Some(name.into()), length_bits: 512, usage: 0x0C, policy: Some(SHARED_POLICY.into()) }
}

/// A key at the server that is active; its identifier.
fn active_key(owner: &Client, name: &str) -> String {
    let id = owner.create(&new_key(name)).unwrap();
    owner.activate(&id).unwrap();
    id
}

/// What a host with this key writes for `plain` at block `lba` (dm-crypt with sectors of 4096 bytes).
fn ciphertext(key: &Secret, lba: u64, plain: &[u8]) -> Vec<u8> {
    let context = XtsContext::new(&XtsKey::new(key.expose()).unwrap()).unwrap();
    let mut data = plain.to_vec();
    for (i, unit) in data.chunks_exact_mut(BLOCK).enumerate() {
        context.unit_in_place(Direction::Encrypt, u128::from((lba + i as u64) * 8), unit);
    }
    data
}

fn denied() -> Status {
    Status::ACCESS_DENIED.do_not_retry()
}

#[test]
fn the_life_of_a_key_and_its_host() {
    let kms = KeyServer::start();
    let owner = kms.client("owner");
    let id = active_key(&owner, "volume");
    let key = owner.get(&id).unwrap().key;
    let target = Target::new(kms.dir.path());
    let audit_path = kms.dir.path().join("audit.log");
    let log = AuditLog::open(&audit_path).unwrap();
    LogControl::install(Level::Error, Some(&log));
    target.add_server(&kms);
    target.add_key("k", &[&id], json!({}));
    assert_eq!(target.key("k")["access"], "unused", "not fetched before it is needed");
    target.add_volume("m0", "h0", "k");
    let bound = target.key("k");
    assert_eq!(
        (&bound["access"], &bound["state"], &bound["devices"]),
        (&json!("open"), &json!("active"), &json!(["h0"]))
    );
    target.export(&["h0"]);

    // The host's ciphertext goes in and out; below it lies plaintext.
    let host = Host::connect(target.port);
    let plain = include_bytes!("hosts.rs")[..3 * BLOCK].to_vec();
    let sent = ciphertext(&key, 5, &plain);
    host.write(1, 5, &sent).unwrap();
    assert!(host.read(1, 5, 3).unwrap() == sent);
    assert!(target.raw("m0", 5, 3) == plain);

    // Revoked: fenced, reads too, and the host is told not to try again. Everything else goes on.
    owner.revoke(&id, RevocationReason::PrivilegeWithdrawn, "").unwrap();
    let fenced = target.wait_for("k", "fenced");
    assert_eq!(
        (&fenced["state"], &fenced["reason"]),
        (&json!("deactivated"), &json!("the key is deactivated"))
    );
    assert_eq!(host.read(1, 5, 3), Err(denied()));
    assert_eq!(host.write(1, 5, &sent), Err(denied()));
    assert_eq!(host.io(1, Op::Flush, 0, 0, &[]).0, denied());

    // Active again: the same connection goes on, with what was there.
    kms.force_state(&id, State::Active);
    target.wait_for("k", "open");
    assert!(host.read(1, 5, 3).unwrap() == sent);
    host.write(1, 5, &ciphertext(&key, 5, &plain)).unwrap();

    // Compromised, active, gone: a server that does not know a key any more is as good as a destroyed key.
    owner.revoke(&id, RevocationReason::KeyCompromise, "").unwrap();
    assert_eq!(target.wait_for("k", "fenced")["state"], "compromised");
    kms.force_state(&id, State::Active);
    target.wait_for("k", "open");
    kms.force_state(&id, State::Deactivated);
    owner.destroy(&id).unwrap();
    target.wait_for("k", "fenced");
    assert_eq!(host.read(1, 5, 1), Err(denied()));
    let deadline = Instant::now() + PATIENCE;
    while target.key("k")["state"] != "not found" {
        assert!(Instant::now() < deadline, "{}", target.key("k"));
        std::thread::sleep(Duration::from_millis(20));
    }

    // What was said about it, and what was not.
    drop(log);
    let audit = std::fs::read_to_string(&audit_path).unwrap();
    for words in ["key bound", "\"access\":\"open\"", "\"access\":\"fenced\"", "\"state\":\"compromised\""] {
        assert!(audit.contains(words), "no {words} in:\n{audit}");
    }
    let hex: String = key.expose().iter().map(|b| format!("{b:02x}")).collect();
    let said = format!("{audit}{}{}", target.get("save_config"), target.get("keyring_kmip_get_keys"));
    assert!(!said.contains(&hex[..32]) && !said.contains(&hex[64..96]), "key material was written");

    assert!(target.refused("keyring_kmip_remove_key", json!({"name": "k"})).contains("used"));
    assert!(target.refused("keyring_kmip_remove_server", json!({"name": "kms"})).contains("holds key"));
}

#[test]
fn a_server_that_is_down_changes_nothing_for_who_has_a_key() {
    let mut kms = KeyServer::start();
    let owner = kms.client("owner");
    let (first, second) = (active_key(&owner, "first"), active_key(&owner, "second"));
    let target = Target::new(kms.dir.path());
    target.add_server(&kms);
    target.add_key("k1", &[&first], json!({}));
    target.add_key("k2", &[&second], json!({}));
    target.add_volume("m1", "h1", "k1");
    assert_eq!(target.get("keyring_kmip_get_servers")[0]["reachable"], true);
    kms.stop();
    let begun = Instant::now();
    target.add_volume("m2", "h2", "k2");
    assert!(begun.elapsed() < Duration::from_secs(8), "a volume can be made without waiting for the server");
    target.export(&["h1", "h2"]);
    let host = Host::connect(target.port);
    let data = vec![0x77; 2 * BLOCK];
    host.write(1, 0, &data).unwrap();
    assert_eq!(host.read(2, 0, 1), Err(Status::NAMESPACE_NOT_READY), "to be tried again");
    assert_eq!(host.write(2, 0, &data), Err(Status::NAMESPACE_NOT_READY));
    let deadline = Instant::now() + PATIENCE;
    while target.get("keyring_kmip_get_servers")[0]["reachable"] != false {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(3 * POLL_MS));
    assert!(host.read(1, 0, 2).unwrap() == data, "several looks at a server that is down later");
    let waiting = target.key("k2");
    assert_eq!(waiting["access"], "waiting");
    assert!(waiting["reason"].as_str().unwrap().contains("no key server answers"), "{waiting}");

    kms.resume();
    target.wait_for("k2", "open");
    host.write(2, 0, &data).unwrap();
    for nsid in [1, 2] {
        let found = host.read(nsid, 0, 2);
        assert!(found.as_ref() == Ok(&data), "{found:?}: {}, {}", target.key("k1"), target.key("k2"));
    }
}

#[test]
fn what_is_not_a_usable_key_waits_with_a_reason() {
    let kms = KeyServer::start();
    let owner = kms.client("owner");
    let target = Target::new(kms.dir.path());
    target.add_server(&kms);
    let register = |name: &str, bytes: Vec<u8>| {
        let new = NewObject { length_bits: 0, ..new_key(name) };
        let id = owner.register(&new, ObjectType::SymmetricKey, &Secret::new(bytes)).unwrap();
        owner.activate(&id).unwrap();
        id
    };
    let halves = (register("half-1", (1..33).collect()), register("half-2", (101..133).collect()));
    let equal = register("equal", vec![9; 64]);
    let short = register("short", vec![3; 16]);
    let sleeping = owner.create(&new_key("sleeping")).unwrap();
    let hidden = {
        let id = owner.create(&NewObject { policy: None, ..new_key("hidden") }).unwrap();
        owner.activate(&id).unwrap();
        id
    };
    target.add_key("halves", &[&halves.0, &halves.1], json!({}));
    target.add_key("equal", &[&equal], json!({}));
    target.add_key("short", &[&short], json!({}));
    target.add_key("sleeping", &[&sleeping], json!({}));
    target.add_key("hidden", &[&hidden], json!({}));
    target.add_key("kept", &[&halves.0, &halves.1], json!({"on_deactivated": "keep"}));
    for (i, name) in ["halves", "equal", "short", "sleeping", "hidden", "kept"].iter().enumerate() {
        target.add_volume(&format!("m{i}"), &format!("h{i}"), name);
    }
    for (name, access, reason) in [
        ("equal", "waiting", "must differ"),
        ("short", "waiting", "this one has 16"),
        ("sleeping", "waiting", "pre-active"),
        ("hidden", "fenced", "not found"),
    ] {
        let k = target.key(name);
        assert_eq!(k["access"], access, "{k}");
        assert!(k["reason"].as_str().unwrap().contains(reason), "{k}");
    }
    // Pre-active becomes active: the volume starts.
    owner.activate(&sleeping).unwrap();
    target.wait_for("sleeping", "open");
    // Two halves are one key, and one half that ends is the end of it; unless the policy says otherwise.
    assert_eq!(
        (target.key("halves")["access"].as_str(), target.key("kept")["access"].as_str()),
        (Some("open"), Some("open"))
    );
    owner.revoke(&halves.1, RevocationReason::Superseded, "").unwrap();
    target.wait_for("halves", "fenced");
    std::thread::sleep(Duration::from_millis(3 * POLL_MS));
    let kept = target.key("kept");
    assert_eq!((kept["access"].as_str(), kept["state"].as_str()), (Some("open"), Some("deactivated")));

    // The last device of a key takes it along.
    target.call("bdev_hostcrypt_delete", json!({"name": "h5"}));
    target.wait_for("kept", "unused");
    target.call("keyring_kmip_remove_key", json!({"name": "kept"}));
}

#[test]
fn a_saved_configuration_brings_everything_back() {
    let kms = KeyServer::start();
    let owner = kms.client("owner");
    let id = active_key(&owner, "volume");
    let saved = {
        let target = Target::new(kms.dir.path());
        target.add_server(&kms);
        target.add_key("k", &[&id], json!({"on_not_found": "keep"}));
        target.add_volume("m0", "h0", "k");
        let names: Vec<Value> = target
            .get("keyring_get_keys")
            .as_array()
            .unwrap()
            .iter()
            .map(|k| json!([k["name"], k["module"]]))
            .collect();
        assert_eq!(names, [json!(["k", "keyring_kmip"])]);
        target.get("save_config")
    };
    let target = Target::new(kms.dir.path());
    target.call("load_config", json!({"config": saved}));
    let k = target.key("k");
    assert_eq!(
        (&k["access"], &k["on_not_found"], &k["devices"]),
        (&json!("open"), &json!("keep"), &json!(["h0"]))
    );
}

#[test]
fn refusals_say_what_is_wrong() {
    let kms = KeyServer::start();
    let target = Target::new(kms.dir.path());
    target.add_server(&kms);
    let (crt, key) = kms.authority.client("other");
    let server = |change: &dyn Fn(&mut Value)| {
        let mut params = json!({"name": "x", "servers": ["127.0.0.1"], "ca_file": kms.authority.certificate(),
            "cert_file": crt, "key_file": key});
        change(&mut params);
        target.refused("keyring_kmip_add_server", params)
    };
    assert!(server(&|p| p["name"] = json!("kms")).contains("exists"));
    assert!(server(&|p| p["servers"] = json!([])).contains("servers: 0"));
    assert!(server(&|p| p["servers"] = json!(["kms:0"])).contains("is no server"));
    assert!(server(&|p| p["ca_file"] = json!("/nonexistent")).contains("ca_file: /nonexistent"));
    assert!(server(&|p| p["cert_file"] = json!(key)).contains("client certificate: no certificate"));
    assert!(server(&|p| p["key_file"] = json!(crt)).contains("may be read by others"));
    assert!(server(&|p| p["poll_interval_ms"] = json!(10)).contains("at least 100"));
    let key = |name: &str, server: &str, objects: Value| {
        target.refused("keyring_kmip_add_key", json!({"name": name, "server": server, "objects": objects}))
    };
    assert!(key("k", "nobody", json!(["1"])).contains("keyring_kmip_add_server"));
    assert!(key("k", "kms", json!([])).contains("objects"));
    assert!(key("k", "kms", json!(["1", "2", "3"])).contains("objects"));
    target.add_key("k", &["1"], json!({}));
    assert!(key("k", "kms", json!(["2"])).contains("exists"));
    let volume = json!({"base_bdev_name": "m", "name": "h", "kms_key_name": "none"});
    assert!(target.refused("bdev_hostcrypt_create", volume).contains("keyring_kmip_add_key"));
    let both = json!({"base_bdev_name": "m", "name": "h", "kms_key_name": "k", "key_file": "/k"});
    assert!(target.refused("bdev_hostcrypt_create", both).contains("not together"));
}
