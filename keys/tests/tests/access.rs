//! Which hosts may get at a volume while it is bound to a host's key.

mod common;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt as _;

use common::remote::Remote;
use common::*;
use cryptfold_bdev::Status;
use cryptfold_control::jsonrpc::Handler as _;
use cryptfold_keys_tests::KeyServer;
use cryptfold_keys_tests::cryptsetup::Host;
use cryptfold_nvmf_initiator::Secret;
use cryptfold_nvmf_target::HostAccess;
use serde_json::{Value, json};

const NQN: &str = "nqn.2026-01.io.cryptfold:volumes";
const A: &str = "nqn.2026-01.io.cryptfold:a";
const B: &str = "nqn.2026-01.io.cryptfold:b";
const STRANGER: &str = "nqn.2026-01.io.cryptfold:stranger";
const PAYLOAD: usize = 16 * MIB;

/// The volume `luks-v` with a header whose key is at the server, and a subsystem that does not have it yet.
struct Rig {
    target: Target,
    port: u16,
    _kms: KeyServer,
}

fn secret(n: u8) -> Secret {
    Secret::new(&[n; 32], None).expect("32 bytes")
}

impl Rig {
    fn new(volume: Value) -> Rig {
        let kms = KeyServer::start();
        let target = Target::new(kms.dir.path(), &kms, &kms.authority.client("target"));
        let host = Host::new(64);
        let id = registered(&kms.client("owner"), &host, None);
        target.volume("v", volume);
        target.write("v", 0, &formatted(&host, Some(&id)));
        for (name, n) in [("a", 1), ("b", 2)] {
            let path = kms.dir.path().join(name);
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
            file.write_all(secret(n).to_text().as_bytes()).unwrap();
            target.ok("keyring_file_add_key", json!({"name": name, "path": path}));
        }
        let limit = PATIENCE.as_millis() as u64;
        target.ok(
            "nvmf_create_transport",
            json!({"trtype": "TCP", "connect_timeout_ms": limit, "auth_timeout_ms": limit}),
        );
        target.ok("nvmf_create_subsystem", json!({"nqn": NQN}));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address =
            json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()});
        target.ok("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": address}));
        Rig { target, port, _kms: kms }
    }

    fn add_host(&self, host: &str, key: &str) {
        self.target.ok("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": host, "dhchap_key": key}));
    }

    fn remove_host(&self, host: &str) {
        self.target.ok("nvmf_subsystem_remove_host", json!({"nqn": NQN, "host": host}));
    }

    fn export(&self, hidden: bool) {
        let namespace = json!({"bdev_name": "luks-v", "nsid": 1, "no_auto_visible": hidden});
        self.target.ok("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": namespace}));
    }

    fn connect(&self, host: &str, key: Option<u8>) -> Remote {
        Remote::connect(self.port, NQN, host, key.map(secret))
    }
}

fn shut(result: Result<Vec<u8>, Status>) -> bool {
    result == Err(denied()) || result == Err(Status::NAMESPACE_NOT_READY)
}

#[test]
fn a_host_that_has_not_said_who_it_is_finds_nothing_bound() {
    let rig = Rig::new(json!({"allow_unauthenticated": false}));
    let t = &rig.target;
    // Connected before anything was asked of hosts: what is asked now, it never had to answer.
    t.ok("nvmf_subsystem_allow_any_host", json!({"nqn": NQN, "allow_any_host": true}));
    let stranger = rig.connect(STRANGER, None);
    t.ok("nvmf_subsystem_allow_any_host", json!({"nqn": NQN, "allow_any_host": false}));
    rig.add_host(A, "a");
    rig.export(false);
    t.raw_because("v", "is connected and has not authenticated");
    drop(stranger);
    t.becomes("v", "bound");
    let a = rig.connect(A, Some(1));
    let data = [0x5A; 4096];
    a.write(PAYLOAD, &data).unwrap();
    assert!(a.read(PAYLOAD).unwrap() == data);
    assert_ne!(t.below("v", PAYLOAD, 4096), data, "it is decrypted");

    // The list lets it in and nobody has looked at that yet: the host itself finds the volume shut, with its first command.
    t.control.target().unwrap().add_host(NQN, STRANGER, HostAccess::default()).unwrap();
    assert!(a.read(PAYLOAD).unwrap() == data, "nobody is there yet");
    let stranger = rig.connect(STRANGER, None);
    assert!(shut(stranger.read(PAYLOAD)), "{}", t.status("v"));
    assert!(shut(a.read(PAYLOAD)));
    t.is_because("v", "fenced", "does not have to authenticate");
    rig.remove_host(STRANGER);
    t.becomes("v", "bound");
    assert!(a.read(PAYLOAD).unwrap() == data);
    drop(stranger);

    // A call that lets it in has fenced when it is answered.
    t.ok("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": STRANGER}));
    assert_eq!(t.status("v")["state"], "fenced");
    assert_eq!(a.read(PAYLOAD), Err(denied()));
}

/// A volume that is bound stays so while no subsystem has it. Who was connected before gets nothing of it when one has it again,
/// by whichever of its names.
#[test]
fn a_bound_volume_is_shut_when_a_subsystem_gets_it_by_its_uuid() {
    let rig = Rig::new(json!({"allow_unauthenticated": false}));
    let t = &rig.target;
    rig.add_host(A, "a");
    rig.export(false);
    t.becomes("v", "bound");
    let a = rig.connect(A, Some(1));
    a.write(PAYLOAD, &[0x5A; 4096]).unwrap();
    t.ok("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 1}));
    t.ok("nvmf_subsystem_allow_any_host", json!({"nqn": NQN, "allow_any_host": true}));
    let stranger = rig.connect(STRANGER, None);
    t.ok("nvmf_subsystem_allow_any_host", json!({"nqn": NQN, "allow_any_host": false}));
    assert_eq!(t.status("v")["state"], "bound", "{}", t.status("v"));
    let uuid = t.ok("bdev_get_bdevs", json!({"name": "luks-v"}))[0]["uuid"].clone();
    t.ok("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": uuid, "nsid": 1}}));
    assert!(shut(a.read(PAYLOAD)), "{}", t.status("v"));
    t.is_because("v", "waiting", "is connected and has not authenticated");
    assert!(shut(a.read(PAYLOAD)));
    drop(stranger);
    t.becomes("v", "bound");
    assert!(a.read(PAYLOAD).unwrap() == [0x5A; 4096]);
}

#[test]
fn a_host_that_the_volume_does_not_name_finds_nothing_bound() {
    let rig = Rig::new(json!({"allow_unauthenticated": false, "allowed_hosts": [A]}));
    let t = &rig.target;
    rig.add_host(A, "a");
    rig.add_host(B, "b");
    // B proves who it is, and is connected when the volume would be bound.
    let b = rig.connect(B, Some(2));
    rig.export(false);
    t.raw_because("v", &format!("{B} of subsystem {NQN} is not in allowed_hosts"));
    rig.remove_host(B);
    drop(b);
    t.becomes("v", "bound");
    let a = rig.connect(A, Some(1));
    let data = [0x5A; 4096];
    a.write(PAYLOAD, &data).unwrap();
    assert_ne!(t.below("v", PAYLOAD, 4096), data, "it is decrypted");

    // Let in later: fenced when the call is answered.
    rig.add_host(B, "b");
    let fenced = t.status("v");
    assert_eq!(fenced["state"], "fenced");
    assert!(fenced["reason"].as_str().unwrap().contains("not in allowed_hosts"), "{fenced}");
    assert_eq!(a.read(PAYLOAD), Err(denied()));
    rig.remove_host(B);
    t.becomes("v", "bound");
    assert!(a.read(PAYLOAD).unwrap() == data);
    drop(a);

    // A host of the list that does not see the namespace is nobody; when it is to see it, the volume is shut before.
    t.ok("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 1}));
    rig.export(true);
    t.ok("nvmf_ns_add_host", json!({"nqn": NQN, "nsid": 1, "host": A}));
    rig.add_host(B, "b");
    t.becomes("v", "bound");
    let (a, _b) = (rig.connect(A, Some(1)), rig.connect(B, Some(2)));
    assert!(a.read(PAYLOAD).unwrap() == data);
    assert_eq!(t.status("v")["state"], "bound");
    t.ok("nvmf_ns_add_host", json!({"nqn": NQN, "nsid": 1, "host": B}));
    assert!(shut(a.read(PAYLOAD)));
    t.is_because("v", "fenced", "not in allowed_hosts");
    t.ok("nvmf_ns_remove_host", json!({"nqn": NQN, "nsid": 1, "host": B}));
    t.becomes("v", "bound");
    assert!(a.read(PAYLOAD).unwrap() == data);

    // A configuration brings it back; names that are none are refused.
    let saved = t.control.call("save_config", None).unwrap().to_string();
    assert!(saved.contains(&format!("\"allowed_hosts\":[\"{A}\"]")), "{saved}");
    let wrong =
        json!({"base_bdev_name": "p/v", "name": "x", "kms_server": "kms", "allowed_hosts": [A, "somebody"]});
    let e = t.call("bdev_luks_create", wrong).unwrap_err().1;
    assert!(e.contains("allowed_hosts: \"somebody\""), "{e}");
}

/// Names alone, where nobody has to authenticate.
#[test]
fn names_count_also_where_nobody_has_to_authenticate() {
    let rig = Rig::new(json!({"allow_unauthenticated": true, "allowed_hosts": [A]}));
    let t = &rig.target;
    t.ok("nvmf_subsystem_allow_any_host", json!({"nqn": NQN, "allow_any_host": true}));
    rig.export(false);
    t.raw_because("v", "lets any host in, not those in allowed_hosts alone");
    let stranger = rig.connect(STRANGER, None);
    t.ok("nvmf_subsystem_allow_any_host", json!({"nqn": NQN, "allow_any_host": false}));
    t.ok("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": A}));
    t.raw_because("v", "is connected and is not in allowed_hosts");
    drop(stranger);
    t.becomes("v", "bound");
    let a = rig.connect(A, None);
    a.write(PAYLOAD, &[1; 4096]).unwrap();
    assert_eq!(t.status("v")["state"], "bound");
}
