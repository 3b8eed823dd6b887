//! Keys stay where they belong: nothing that a core dump of a running target would hold, and nothing that it writes, has a byte string
//! of a password, a volume key, a secret of DH-HMAC-CHAP or a TLS key in it, in the clear, as hexadecimal digits or as base64.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use cryptfold_bdev::{Complete, Frame, Io, Op, Queue};
use cryptfold_nvmf_auth::{HashId, Names};
use cryptfold_nvmf_initiator::{
    ConnectOptions, Controller, Credentials, NamespaceQueue, Offer, Psk, Secret, TlsKey, Version,
};
use cryptfold_nvmf_spec::Nsid;
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::sync::oneshot;
use cryptfold_reactor::{IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};
use cryptfold_tests::kill::find_or_build;
use cryptfold_tests::search::Patterns;
use serde_json::{Value, json};

/// In every image and file that has anything of the target's configuration.
const NQN: &str = "nqn.2026-01.io.cryptfold:marker-that-has-to-be-found";
const A: &str = "nqn.2026-01.io.cryptfold:secrets-a";
const B: &str = "nqn.2026-01.io.cryptfold:secrets-b";
const PATIENCE: Duration = Duration::from_secs(120);

fn random(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn base64(bytes: &[u8]) -> String {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let three = |c: &[u8]| (u32::from(c[0]) << 16) | (u32::from(c[1]) << 8) | u32::from(c[2]);
    let four = |n: u32| [18, 12, 6, 0].map(|s| digits[(n >> s) as usize & 63] as char);
    bytes.chunks_exact(3).flat_map(|c| four(three(c))).collect()
}

/// What must not be found, with what it is.
#[derive(Default)]
struct Wanted(Vec<(String, Vec<u8>)>);

impl Wanted {
    /// Every 16 bytes of a key that begin at a multiple of 16: parts of schedules begin like that. And its first bytes in base64.
    fn key(&mut self, name: &str, key: &[u8]) {
        for (i, part) in key.chunks_exact(16).enumerate() {
            self.add(format!("{name}, part {i}"), part.to_vec());
            self.add(format!("{name}, part {i}, hexadecimal"), hex(part).into_bytes());
            self.add(format!("{name}, part {i}, HEXADECIMAL"), hex(part).to_uppercase().into_bytes());
        }
        self.add(format!("{name}, base64"), base64(&key[..18]).into_bytes());
    }

    fn add(&mut self, name: String, bytes: Vec<u8>) {
        self.0.push((name, bytes));
    }

    /// As [`Wanted::found`], with where it is and what is around it: from that it is told whose memory it was.
    fn around(&self, bytes: &[u8]) -> Vec<String> {
        let patterns = Patterns::new(self.0.iter().map(|w| w.1.clone()));
        let tell = |(n, at): (usize, usize)| {
            let (from, to) = (at.saturating_sub(256), (at + 256).min(bytes.len()));
            let lines = bytes[from..to].chunks(32).map(|line| format!("\n    {}", hex(line)));
            format!("{} at {at:#x}, here from {from:#x} on:{}", self.0[n].0, lines.collect::<String>())
        };
        patterns.places(bytes).into_iter().map(tell).collect()
    }

    fn found(&self, bytes: &[u8]) -> Vec<&str> {
        let patterns = Patterns::new(self.0.iter().map(|w| w.1.clone()));
        patterns.found(bytes).into_iter().map(|n| self.0[n].0.as_str()).collect()
    }
}

/// A running target; killed when dropped.
struct Target {
    child: Child,
    dir: PathBuf,
}

impl Target {
    fn start(dir: &Path) -> Target {
        let log = |name: &str| File::create(dir.join(name)).unwrap();
        let child = Command::new(find_or_build().unwrap())
            .args(["target", "--core-dumps", "--no-huge", "--cores", "0", "-r", "rpc.sock"])
            .args(["--audit-log", "audit.log", "--keys", "keys", "--log", "debug"])
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(log("out"))
            .stderr(log("log"))
            .spawn()
            .unwrap();
        let mut target = Target { child, dir: dir.into() };
        let deadline = Instant::now() + PATIENCE;
        while !std::fs::read_to_string(dir.join("out")).unwrap().contains("cryptfold: ready") {
            assert!(target.child.try_wait().unwrap().is_none(), "{}", target.log());
            assert!(Instant::now() < deadline, "{}", target.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        target
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    fn call(&self, method: &str, params: Value) -> Value {
        let mut socket = UnixStream::connect(self.dir.join("rpc.sock")).unwrap();
        writeln!(socket, "{}", json!({"id": 1, "method": method, "params": params})).unwrap();
        let mut line = String::new();
        BufReader::new(socket).read_line(&mut line).unwrap();
        let reply: Value = serde_json::from_str(&line).unwrap();
        assert!(reply.get("error").is_none(), "{method}: {reply}");
        reply["result"].clone()
    }

    fn signal(&self, signal: &str) {
        let done = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(done.unwrap().success());
    }

    /// All memory that is not kept out of core dumps (`dd`), each mapping by itself.
    fn image(&self) -> Vec<(String, Vec<u8>)> {
        self.signal("-STOP");
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let maps = std::fs::read_to_string(proc.join("smaps")).unwrap();
        let mut memory = File::open(proc.join("mem")).unwrap();
        let mut image = Vec::new();
        let mut mapping = ("", 0, 0);
        for line in maps.lines() {
            let first = line.split(' ').next().unwrap();
            if let Some((from, to)) = first.split_once('-') {
                let at = |text| u64::from_str_radix(text, 16).unwrap();
                mapping = (line, at(from), at(to));
            } else if let Some(flags) = line.strip_prefix("VmFlags:")
                && !flags.split(' ').any(|f| f == "dd")
                && flags.split(' ').any(|f| f == "rd")
            {
                let mut bytes = vec![0; (mapping.2 - mapping.1) as usize];
                memory.seek(SeekFrom::Start(mapping.1)).unwrap();
                // Some of the kernel's own can not be read.
                if memory.read_exact(&mut bytes).is_ok() {
                    image.push((mapping.0.to_owned(), bytes));
                }
            }
        }
        self.signal("-CONT");
        image
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct One(RefCell<Option<oneshot::Sender<Box<Io>>>>);

impl Complete for One {
    fn complete(self: Rc<Self>, io: Box<Io>, _: Frame) {
        let sender = self.0.borrow_mut().take().expect("completes once");
        assert!(sender.send(io).is_ok(), "the test waits");
    }
}

async fn run(queue: &Rc<NamespaceQueue>, op: Op, data: &[u8]) -> Vec<u8> {
    let mut io = Io::new(op, 8, (data.len() / 4096) as u64);
    io.data = Buf::from_slice(data).into();
    let (sender, receiver) = oneshot::channel();
    io.push(Rc::new(One(RefCell::new(Some(sender)))), 0, 0);
    queue.clone().submit(io);
    let io = receiver.await.expect("every I/O comes back");
    assert!(io.status().is_ok(), "{op:?}: {:?}", io.status());
    io.data.to_contiguous().to_vec()
}

/// Connects, writes and reads each namespace, and stays until the runtime goes.
fn use_it(host: &Runtime, options: ConnectOptions) {
    let done = host.handles()[0].block_on(move || async move {
        let controller = Controller::connect(&options).await.expect("connects");
        let queue = controller.io_queue(8).await.expect("opens");
        for nsid in [1, 2] {
            let space = queue.namespace(&controller.namespace(Nsid(nsid)).await.expect("a namespace"));
            let data: Vec<u8> = (0..64 << 10).map(|i| (i / 7) as u8).collect();
            run(&space, Op::Write, &data).await;
            assert_eq!(run(&space, Op::Read, &vec![0; data.len()]).await, data);
        }
        cryptfold_reactor::spawn_local(async move {
            let _kept = (controller, queue);
            std::future::pending::<()>().await;
        })
        .detach();
    });
    done.expect("the reactor runs");
}

fn key_file(dir: &Path, name: &str, content: &[u8]) -> PathBuf {
    std::fs::create_dir_all(dir.join("given")).unwrap();
    let path = dir.join("given").join(name);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    file.unwrap().write_all(content).unwrap();
    path
}

/// What the target has written, by file, without the keys that it keeps in files of their own.
fn written(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.filter(|e| e.file_type().unwrap().is_file()).map(|e| e.path()).collect()
}

#[test]
fn no_key_is_in_a_core_image_or_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let password = hex(&random(20));
    let (first, second) = (random(64), random(64));
    let (secret, psk) = (random(32), random(32));
    let mut wanted = Wanted::default();
    wanted.add("password".into(), password.clone().into_bytes());
    wanted.add("password, hexadecimal".into(), hex(password.as_bytes()).into_bytes());
    wanted.add("password, base64".into(), base64(&password.as_bytes()[..39]).into_bytes());
    wanted.key("volume key from a file", &first);
    wanted.key("volume key of a request", &second);
    wanted.key("DH-HMAC-CHAP secret", &secret);
    wanted.key("TLS key", &psk);
    let secret = Secret::new(&secret, None).unwrap();
    let psk = Psk::new(&psk, Some(HashId::Sha256)).unwrap();
    let names = Names { host: B.into(), subsystem: NQN.into() };
    wanted.key("TLS key, derived", psk.tls(&names, Version::V1).unwrap().key.expose());

    File::create(dir.join("disk")).unwrap().set_len(256 << 20).unwrap();
    let target = Target::start(dir);
    let call = |method, params| target.call(method, params);
    call("bdev_uring_create", json!({"name": "disk", "filename": dir.join("disk"), "block_size": 4096}));
    call("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "pool", "password": password}));
    call(
        "accel_crypto_key_create",
        json!({"name": "x", "cipher": "AES_XTS", "key": hex(&second[..32]), "key2": hex(&second[32..])}),
    );
    call("nvmf_create_transport", json!({"trtype": "TCP", "connect_timeout_ms": 120_000}));
    call("nvmf_create_subsystem", json!({"nqn": NQN}));
    let first = key_file(dir, "volume", &first);
    for (nsid, key) in [(1, json!({"key_file": first})), (2, json!({"key_name": "x"}))] {
        call(
            "bdev_lvol_create",
            json!({"lvs_name": "pool", "lvol_name": format!("v{nsid}"), "size_in_mib": 16}),
        );
        let mut params = json!({"base_bdev_name": format!("pool/v{nsid}"), "name": format!("h{nsid}")});
        params.as_object_mut().unwrap().extend(key.as_object().unwrap().clone());
        call("bdev_hostcrypt_create", params);
        let namespace = json!({"bdev_name": format!("h{nsid}"), "nsid": nsid});
        call("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": namespace}));
    }
    let ring = [("dhchap", secret.to_text()), ("psk", psk.to_text())];
    for (name, text) in ring {
        let path = key_file(dir, name, text.as_bytes());
        call("keyring_file_add_key", json!({"name": name, "path": path}));
    }
    call("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": A, "dhchap_key": "dhchap"}));
    call("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": B, "psk": "psk"}));
    let ports = [false, true].map(|secure| {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
        let address = json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port});
        call(
            "nvmf_subsystem_add_listener",
            json!({"nqn": NQN, "listen_address": address, "secure_channel": secure}),
        );
        port
    });

    let host = Runtime::start(RuntimeConfig {
        cores: vec![1],
        policy: IdlePolicy::Interrupt,
        pin: false,
        memory: MemoryConfig { hugepages: false, fixed_buffers: false, arena_bytes: 4 << 20 },
        ..Default::default()
    })
    .unwrap();
    let options = |host: &str, port: &str| {
        let mut o = ConnectOptions::new("127.0.0.1", port, NQN);
        (o.hostnqn, o.kato_ms) = (host.into(), 0);
        (o.connect_timeout, o.io_timeout) = (PATIENCE, PATIENCE);
        o
    };
    let credentials = Some(Credentials { secret, controller: None, offer: Offer::default() });
    use_it(&host, ConnectOptions { credentials, ..options(A, &ports[0]) });
    let tls = Some(TlsKey { psk, version: Version::V1 });
    use_it(&host, ConnectOptions { tls, ..options(B, &ports[1]) });
    let saved = target.call("save_config", Value::Null).to_string();
    std::fs::write(dir.join("saved.json"), saved).unwrap();

    let marker = Wanted(vec![("marker".into(), NQN.into())]);
    let image = target.image();
    let mut leaks = Vec::new();
    for (mapping, bytes) in &image {
        leaks.extend(wanted.around(bytes).into_iter().map(|what| format!("{mapping}: {what}")));
    }
    let bytes: usize = image.iter().map(|m| m.1.len()).sum();
    assert!(image.iter().any(|m| !marker.found(&m.1).is_empty()), "nothing to be found in {bytes} bytes");
    for path in written(dir) {
        let bytes = std::fs::read(&path).unwrap();
        leaks.extend(wanted.found(&bytes).into_iter().map(|what| format!("{what}: {}", path.display())));
    }
    assert!(!marker.found(&std::fs::read(dir.join("saved.json")).unwrap()).is_empty());
    assert!(target.log().contains("nvmf_create_subsystem"), "the log is one that says much");
    assert!(leaks.is_empty(), "{} of them:\n{}", leaks.len(), leaks.join("\n"));

    // What is looked for is found where it is.
    let given = std::fs::read(first).unwrap();
    assert_eq!(wanted.found(&given).len(), 4);
    let given = std::fs::read(dir.join("given/psk")).unwrap();
    assert_eq!(wanted.found(&given), ["TLS key, base64"]);
}
