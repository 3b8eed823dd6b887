//! Who is turned away is written down: the real program, attempts over the wire, and its audit log.

use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cryptfold_nvmf_initiator::{
    ConnectOptions, Controller, Credentials, HashId, Offer, Psk, Secret, TlsKey, Version,
};
use cryptfold_reactor::{Handle, IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};
use cryptfold_tests::kill::{NQN, Place, Program, find_or_build};
use serde_json::{Value, json};

/// On the list, with a secret; on the list, with a key for TLS; on no list.
const CHAP: &str = "nqn.2026-01.io.cryptfold:chap";
const TLS: &str = "nqn.2026-01.io.cryptfold:tls";
const STRANGER: &str = "nqn.2026-01.io.cryptfold:stranger";

fn secret(byte: u8) -> Secret {
    Secret::new(&[byte; 32], None).expect("32 bytes")
}

fn psk(byte: u8) -> Psk {
    Psk::new(&[byte; 32], Some(HashId::Sha256)).expect("32 bytes")
}

fn configuration(dir: &Path, port: u16) -> Value {
    let key = |name: &str, text: &str| -> PathBuf {
        let path = dir.join(name);
        let mut options = std::fs::File::options();
        options.write(true).create(true).truncate(true).mode(0o600).open(&path).expect("a new file");
        std::fs::write(&path, text).expect("written");
        path
    };
    let call = |method: &str, params: Value| json!({"method": method, "params": params});
    let listen = |port: u16, more: Value| {
        let address =
            json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()});
        let mut params = json!({"nqn": NQN, "listen_address": address});
        params.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
        call("nvmf_subsystem_add_listener", params)
    };
    let ring = [
        call("keyring_file_add_key", json!({"name": "s", "path": key("s", &secret(0x11).to_text())})),
        call("keyring_file_add_key", json!({"name": "k", "path": key("k", &psk(0x22).to_text())})),
    ];
    let bdev = [call("bdev_malloc_create", json!({"name": "ram", "num_blocks": 256, "block_size": 4096}))];
    // No deadline that a starved machine could miss.
    let transport = json!({"trtype": "TCP", "connect_timeout_ms": 300_000, "auth_timeout_ms": 300_000});
    let nvmf = [
        call("nvmf_create_transport", transport),
        call("nvmf_create_subsystem", json!({"nqn": NQN})),
        call("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "ram"}})),
        call("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": CHAP, "dhchap_key": "s"})),
        call("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": TLS, "psk": "k"})),
        listen(port, json!({})),
        listen(0, json!({"secure_channel": true})),
    ];
    json!({"subsystems": [{"subsystem": "keyring", "config": ring}, {"subsystem": "bdev", "config": bdev},
        {"subsystem": "nvmf", "config": nvmf}]})
}

struct Rig {
    program: Program,
    binary: PathBuf,
    log: PathBuf,
    plain: ConnectOptions,
    secure: ConnectOptions,
    host: Handle,
    _runtime: Runtime,
    dir: tempfile::TempDir,
}

impl Rig {
    fn start() -> Rig {
        let binary = find_or_build().unwrap_or_else(|e| panic!("{e}"));
        let dir = tempfile::tempdir().expect("a directory");
        let place =
            Place::prepare(&binary, dir.path(), 4096, configuration).unwrap_or_else(|e| panic!("{e}"));
        let program = place.start().unwrap_or_else(|e| panic!("{e}"));
        let memory = MemoryConfig { fixed_buffers: false, arena_bytes: 4 << 20, ..Default::default() };
        let config =
            RuntimeConfig { policy: IdlePolicy::Interrupt, pin: false, memory, ..Default::default() };
        let runtime = Runtime::start(config).expect("a reactor");
        let mut plain = place.connect_options();
        (plain.connect_timeout, plain.io_timeout) = (Duration::from_secs(300), Duration::from_secs(300));
        let all = program.rpc("nvmf_subsystem_get_listeners", &json!({"nqn": NQN}));
        let all = all.unwrap_or_else(|e| panic!("{e}"));
        let mut ports =
            all.as_array().expect("a list").iter().filter_map(|l| l["address"]["trsvcid"].as_str());
        let port = ports.find(|p| *p != plain.trsvcid).expect("two listeners").to_owned();
        let secure = ConnectOptions { trsvcid: port, ..plain.clone() };
        let (host, log) = (runtime.handles()[0].clone(), dir.path().join("audit.log"));
        Rig { program, binary, log, plain, secure, host, _runtime: runtime, dir }
    }

    fn connect(&self, options: ConnectOptions) -> Result<(), String> {
        let connect = move || async move {
            let controller = Controller::connect(&options).await.map_err(|e| e.to_string())?;
            controller.shutdown().await;
            Ok(())
        };
        self.host.block_on(connect).expect("the reactor runs")
    }

    fn records(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.log).expect("the log");
        let whole = text.lines().map(serde_json::from_str);
        whole.map_while(Result::ok).collect()
    }

    /// The next refusal in the log after the ones seen so far.
    fn refusal(&self, seen: &mut usize) -> Value {
        let begin = Instant::now();
        loop {
            let mut all = self.records().into_iter().filter(|r| r["event"] == "access refused");
            if let Some(record) = all.nth(*seen) {
                *seen += 1;
                return record;
            }
            assert!(
                begin.elapsed() < Duration::from_secs(120),
                "it is not written down: {:?}",
                self.records()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn with_secret(own: u8) -> Option<Credentials> {
    Some(Credentials { secret: secret(own), controller: None, offer: Offer::default() })
}

#[test]
fn who_is_turned_away_is_in_the_audit_log() {
    let rig = Rig::start();
    let plain =
        |host: &str, credentials| ConnectOptions { hostnqn: host.into(), credentials, ..rig.plain.clone() };
    let secure = |host: &str, byte| {
        let tls = Some(TlsKey { psk: psk(byte), version: Version::V1 });
        ConnectOptions { hostnqn: host.into(), tls, ..rig.secure.clone() }
    };
    // Those who have what it takes get in, and are no refusal.
    assert_eq!(rig.connect(plain(CHAP, with_secret(0x11))), Ok(()));
    assert_eq!(rig.connect(secure(TLS, 0x22)), Ok(()));
    let mut seen = 0;
    for (options, host, method, reason) in [
        (plain(STRANGER, None), STRANGER, "host list", "not in it"),
        (plain(CHAP, with_secret(0x33)), CHAP, "dh-hmac-chap", "authentication failed"),
        // A key that the target does not know, of a host that it knows and of one that it does not.
        (secure(TLS, 0x44), TLS, "tls", "no key belongs to the identity"),
        (secure(STRANGER, 0x55), STRANGER, "tls", "no key belongs to the identity"),
        // A host with a key, without TLS.
        (plain(TLS, None), TLS, "tls", "without TLS"),
    ] {
        rig.connect(options).expect_err("turned away");
        let record = rig.refusal(&mut seen);
        let text =
            |name: &str| record[name].as_str().unwrap_or_else(|| panic!("{name}: {record}")).to_owned();
        assert_eq!(
            (text("hostnqn"), text("subnqn"), text("method")),
            (host.into(), NQN.into(), method.into())
        );
        assert!(text("reason").contains(reason), "{record}");
        let peer: SocketAddr = text("peer").parse().unwrap_or_else(|e| panic!("{e}: {record}"));
        assert!(peer.ip().is_loopback() && peer.port() != 0, "{record}");
    }
    rig.program.stop().unwrap_or_else(|e| panic!("{e}"));
    // Neither log has anything of a key: not as it is handed around, not its bytes, nor what goes over the wire of it.
    let logs =
        ["audit.log", "log"].map(|name| std::fs::read_to_string(rig.dir.path().join(name)).expect("a log"));
    let log = logs.concat();
    for byte in [0x11u8, 0x22, 0x33, 0x44, 0x55] {
        let (secret, psk) = (secret(byte).to_text(), psk(byte).to_text());
        let parts = [&secret[10..40], &psk[16..40]];
        let hex = format!("{byte:02x}").repeat(8);
        for text in parts.into_iter().chain([hex.as_str()]) {
            assert!(!log.contains(text), "something of key {byte:#x}: {text}");
        }
    }
    let verified =
        Command::new(&rig.binary).args(["audit", "verify"]).arg(&rig.log).output().expect("it runs");
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
}
