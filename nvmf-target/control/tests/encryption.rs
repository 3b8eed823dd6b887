//! Who opens pools, through the methods: passwords, key files, locking, and what comes back when a pool is unlocked.

use std::path::Path;
use std::sync::Arc;

use cryptfold_control::access::Peer;
use cryptfold_control::config::Config;
use cryptfold_control::jsonrpc::{Handler as _, RpcError};
use cryptfold_control::{Control, ControlConfig};
use cryptfold_reactor::{IdlePolicy, MemoryConfig};
use serde_json::{Value, json};

const NQN: &str = "nqn.2024-01.io.cryptfold:locked";

struct Target {
    control: Arc<Control>,
}

impl Target {
    fn new(dir: &Path) -> Target {
        let control = Control::new(ControlConfig {
            idle: IdlePolicy::Interrupt,
            pin: false,
            memory: MemoryConfig { hugepages: false, fixed_buffers: false, arena_bytes: 4 << 20 },
            key_dir: dir.join("keys"),
            grants: vec!["operator=uid:61002".parse().unwrap()],
            ..ControlConfig::default()
        });
        control.initialize().unwrap();
        Target { control }
    }

    /// With a disk that is a file.
    fn with_disk(dir: &Path) -> Target {
        let target = Target::new(dir);
        let file = dir.join("disk");
        if !file.exists() {
            std::fs::File::create(&file).unwrap().set_len(64 << 20).unwrap();
        }
        target.ok("bdev_uring_create", json!({"name": "disk", "filename": file, "block_size": 4096}));
        target
    }

    fn call(&self, method: &str, params: Value) -> Result<Value, RpcError> {
        self.control.call(method, if params.is_null() { None } else { Some(&params) })
    }

    fn ok(&self, method: &str, params: Value) -> Value {
        self.call(method, params).unwrap_or_else(|e| panic!("{method}: {}", e.message))
    }

    fn refused(&self, method: &str, params: Value, code: i64, words: &str) {
        let e = self.call(method, params).unwrap_err();
        assert_eq!(e.code, code, "{}", e.message);
        assert!(e.message.contains(words), "{}", e.message);
    }

    /// An operator does not open the pool.
    fn keeps_out(&self, open: &Value, words: &str) {
        let operator = self.control.session(Peer { pid: 1, uid: 61_002, gid: 61_002 }).unwrap();
        let e = operator.call("cryptfold_pool_open", Some(open)).unwrap_err();
        assert_eq!(e.code, -126, "{}", e.message);
        assert!(e.message.contains(words), "{}", e.message);
    }

    fn pool(&self) -> Value {
        self.ok("cryptfold_encryption_status", Value::Null)["pools"][0].clone()
    }

    /// Kinds of the slots in use, by number.
    fn slots(&self) -> Vec<(u64, String)> {
        let pool = self.pool();
        let slots = pool["slots"].as_array().unwrap().iter();
        slots.map(|s| (s["slot"].as_u64().unwrap(), s["kind"].as_str().unwrap().to_owned())).collect()
    }

    fn namespaces(&self) -> usize {
        let all = self.ok("nvmf_get_subsystems", Value::Null);
        let ours = all.as_array().unwrap().iter().find(|s| s["nqn"] == NQN).unwrap().clone();
        ours["namespaces"].as_array().unwrap().len()
    }

    fn serve(&self) {
        self.ok("bdev_lvol_create", json!({"lvs_name": "p", "lvol_name": "v", "size_in_mib": 8}));
        self.ok("nvmf_create_transport", json!({"trtype": "TCP"}));
        self.ok("nvmf_create_subsystem", json!({"nqn": NQN, "allow_any_host": true}));
        self.ok("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"nsid": 3, "bdev_name": "p/v"}}));
        assert_eq!(self.namespaces(), 1);
    }

    fn end(self) {
        self.control.shutdown().unwrap();
    }
}

fn unlock(password: &str) -> Value {
    json!({"name": "p", "password": password})
}

const UNLOCK: &str = "cryptfold_encryption_unlock";

#[test]
fn a_pool_with_a_password_is_locked_and_unlocked_with_what_stands_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    let create = |password: &str| json!({"bdev_name": "disk", "lvs_name": "p", "password": password});
    target.refused("bdev_lvol_create_lvstore", create("short"), -32602, "at least 8");
    target.ok("bdev_lvol_create_lvstore", create("the first password"));
    target.serve();
    let before = target.ok("bdev_lvol_get_lvols", Value::Null);
    assert_eq!(
        (target.pool()["state"].clone(), target.pool()["encrypted"].clone()),
        (json!("unlocked"), json!(true))
    );

    target.ok("cryptfold_encryption_lock", json!({"name": "p"}));
    assert_eq!((target.pool()["state"].clone(), target.namespaces()), (json!("locked"), 0));
    assert_eq!(target.ok("bdev_lvol_get_lvols", Value::Null), json!([]));
    let stores = target.ok("bdev_lvol_get_lvstores", Value::Null);
    assert_eq!((stores[0]["name"].clone(), stores[0]["total_data_clusters"].clone()), (json!("p"), json!(0)));
    assert!(stores[0]["locked"].as_str().unwrap().contains("request"));
    let volume = json!({"lvs_name": "p", "lvol_name": "w", "size_in_mib": 8});
    target.refused("bdev_lvol_create", volume, -126, "locked");
    let waiting = target.ok("cryptfold_encryption_status", Value::Null)["waiting_calls"].clone();
    assert_eq!(waiting, json!(["nvmf_subsystem_add_ns"]));
    let saved = target.ok("save_config", Value::Null).to_string();
    assert!(
        saved.contains("\"startup\":\"locked\"") && saved.contains("p/v") | saved.contains("nsid"),
        "{saved}"
    );
    assert!(!saved.contains("the first password"));

    target.refused(UNLOCK, unlock("another password"), -126, "opens no key slot");
    target.refused(UNLOCK, json!({"name": "p"}), -126, "no key at hand");
    target.refused(UNLOCK, json!({"name": "q"}), -19, "No such device");
    target.ok(UNLOCK, unlock("the first password"));
    target.refused(UNLOCK, unlock("the first password"), -17, "not locked");
    assert_eq!(target.namespaces(), 1);
    let after = target.ok("bdev_lvol_get_lvols", Value::Null);
    assert_eq!((&after[0]["uuid"], &after[0]["name"]), (&before[0]["uuid"], &before[0]["name"]));
    let waiting = target.ok("cryptfold_encryption_status", Value::Null)["waiting_calls"].clone();
    assert_eq!(waiting, json!([]));
    let config = target.ok("save_config", Value::Null);
    target.end();

    // The next start: everything is there but what needs the password.
    let target = Target::new(dir.path());
    Config::from_value("saved", &config).unwrap().load(&target.control).unwrap();
    assert_eq!((target.pool()["state"].clone(), target.namespaces()), (json!("locked"), 0));
    target.ok(UNLOCK, unlock("the first password"));
    assert_eq!(target.namespaces(), 1);
    target.end();
}

/// No key file that an operator or the configuration names, and no return of its device, opens what the security role has locked; not
/// after a restart either. The rest of the configuration loads.
#[test]
fn what_the_security_role_has_locked_it_alone_unlocks() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    let create = json!({"bdev_name": "disk", "lvs_name": "p", "exist_ok": true});
    target.ok("bdev_lvol_create_lvstore", create.clone());
    target.serve();
    let open = json!({"base_bdev_name": "disk", "key_file": target.pool()["opened_by"]["key_file"]});
    let config = target.ok("save_config", Value::Null);
    let is_refused = |target: &Target| {
        let peer = Peer { pid: 1, uid: 61_002, gid: 61_002 };
        let operator = target.control.session(peer).unwrap();
        for (method, params) in [("cryptfold_pool_open", &open), ("bdev_lvol_create_lvstore", &create)] {
            let e = operator.call(method, Some(params)).unwrap_err();
            assert_eq!(e.code, -126, "{}", e.message);
            assert!(e.message.contains("the role security unlocks it"), "{}", e.message);
        }
        let _ = operator.call("bdev_examine", Some(&json!({"name": "disk"})));
        assert_eq!((target.pool()["state"].clone(), target.namespaces()), (json!("locked"), 0));
        assert!(target.pool()["reason"].as_str().unwrap().contains("by request"));
    };
    target.ok("cryptfold_encryption_lock", json!({"name": "p"}));
    is_refused(&target);
    // The device comes again.
    target.ok("bdev_uring_delete", json!({"name": "disk"}));
    let file = dir.path().join("disk");
    target.ok("bdev_uring_create", json!({"name": "disk", "filename": file, "block_size": 4096}));
    is_refused(&target);
    target.end();

    let target = Target::new(dir.path());
    Config::from_value("saved", &config).unwrap().load(&target.control).unwrap();
    is_refused(&target);
    // A key that does not fit changes nothing; the one that does, does.
    target.refused(UNLOCK, unlock("another password"), -126, "no key slot");
    is_refused(&target);
    target.ok(UNLOCK, json!({"name": "p", "key_file": open["key_file"]}));
    assert_eq!(target.namespaces(), 1);
    target.end();

    let target = Target::new(dir.path());
    Config::from_value("saved", &config).unwrap().load(&target.control).unwrap();
    assert_eq!((target.pool()["state"].clone(), target.namespaces()), (json!("unlocked"), 1));
    target.end();
}

/// A configuration that makes volumes starts with its pool locked: what stands on the pool waits, what can not wait is passed over, and
/// all the rest is there. A pool that nobody has locked is refused as before.
#[test]
fn a_pool_that_the_security_role_has_locked_stops_no_start() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/single-disk.json");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let text = std::fs::read_to_string(example)
        .unwrap()
        .replace("/dev/nvme1n1", disk.to_str().unwrap())
        .replace("192.0.2.10", "127.0.0.1")
        .replace("\"4420\"", &format!("\"{port}\""));
    let start = || {
        let target = Target::new(dir.path());
        Config::parse("single-disk.json", &text).unwrap().load(&target.control).unwrap();
        target
    };
    let state = |target: &Target| {
        let all = target.ok("nvmf_get_subsystems", Value::Null);
        let count = |s: &Value| s["namespaces"].as_array().map_or(0, Vec::len);
        let namespaces: usize = all.as_array().unwrap().iter().map(count).sum();
        (target.pool()["state"].as_str().unwrap().to_owned(), namespaces)
    };
    let target = start();
    assert_eq!(state(&target), ("unlocked".into(), 2));
    target.ok("cryptfold_encryption_lock", json!({"name": "pool"}));
    target.end();

    let target = start();
    assert_eq!(state(&target), ("locked".into(), 0));
    let create = "bdev_lvol_create";
    let waiting = target.ok("cryptfold_encryption_status", Value::Null)["waiting_calls"].clone();
    assert_eq!(waiting, json!([create, create, "nvmf_subsystem_add_ns", "nvmf_subsystem_add_ns"]));
    let load = |method: &str, params: Value| {
        let calls = json!([{"method": method, "params": params}]);
        json!({"config": {"subsystems": [{"subsystem": "bdev", "config": calls}]}})
    };
    for (method, params) in [
        ("bdev_examine", json!({"name": "disk"})),
        ("cryptfold_pool_scrub", json!({"lvs_name": "pool", "action": "start"})),
        ("bdev_lvol_snapshot", json!({"lvol_name": "pool/data", "snapshot_name": "s"})),
    ] {
        target.ok("load_config", load(method, params));
    }
    target.ok("bdev_examine", json!({"name": "disk"}));
    let elsewhere = json!({"lvs_name": "none", "lvol_name": "v", "size_in_mib": 8});
    target.refused("load_config", load(create, elsewhere), -19, "No such device");
    let snapshot = json!({"lvol_name": "none/v", "snapshot_name": "s"});
    target.refused("load_config", load("bdev_lvol_snapshot", snapshot), -19, "No such device");
    target.ok(UNLOCK, json!({"name": "pool"}));
    assert_eq!(state(&target), ("unlocked".into(), 2));
    target.end();

    let target = start();
    assert_eq!(state(&target), ("unlocked".into(), 2));
    target.end();
}

/// A namespace that only named hosts see comes back with them; it, and its ANA group, wait with its volume. A namespace that nobody
/// makes is refused as before.
#[test]
fn a_masked_namespace_waits_for_its_pool() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    let (host, other) = ("nqn.2024-01.io.cryptfold:host", "nqn.2024-01.io.cryptfold:other");
    let create = json!({"bdev_name": "disk", "lvs_name": "p", "password": "the first password"});
    target.ok("bdev_lvol_create_lvstore", create);
    target.ok("nvmf_create_transport", json!({"trtype": "TCP"}));
    target.ok("nvmf_create_subsystem", json!({"nqn": NQN, "allow_any_host": true, "ana_reporting": true}));
    target.ok("bdev_lvol_create", json!({"lvs_name": "p", "lvol_name": "w", "size_in_mib": 8}));
    let masked = json!({"nsid": 5, "bdev_name": "p/w", "no_auto_visible": true});
    target.ok("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": masked}));
    let show = |nsid: u32, host: &str| json!({"nqn": NQN, "nsid": nsid, "host": host});
    target.ok("nvmf_ns_add_host", show(5, host));
    let mut config = target.ok("save_config", Value::Null);
    target.end();
    // As people write it.
    let subsystems = config["subsystems"].as_array_mut().unwrap();
    let nvmf = subsystems.iter_mut().find(|s| s["subsystem"] == "nvmf").unwrap();
    let group = json!({"nqn": NQN, "nsid": 5, "anagrpid": 3});
    nvmf["config"].as_array_mut().unwrap().extend([
        json!({"method": "nvmf_ns_add_host", "params": show(5, other)}),
        json!({"method": "nvmf_subsystem_set_ns_ana_group", "params": group}),
    ]);

    let target = Target::new(dir.path());
    Config::from_value("saved", &config).unwrap().load(&target.control).unwrap();
    assert_eq!((target.pool()["state"].clone(), target.namespaces()), (json!("locked"), 0));
    let load = |params: Value| {
        let calls = json!([{"method": "nvmf_ns_add_host", "params": params}]);
        json!({"config": {"subsystems": [{"subsystem": "nvmf", "config": calls}]}})
    };
    target.refused("load_config", load(show(6, host)), -32602, "6");
    target.refused("nvmf_ns_add_host", show(5, host), -32602, "5");
    target.ok(UNLOCK, unlock("the first password"));
    let back = |target: &Target| {
        assert_eq!(target.namespaces(), 1);
        let saved = target.ok("save_config", Value::Null);
        let nvmf = saved["subsystems"].as_array().unwrap().iter().find(|s| s["subsystem"] == "nvmf").unwrap();
        let calls = nvmf["config"].as_array().unwrap().clone();
        for host in [host, other] {
            let call = json!({"method": "nvmf_ns_add_host", "params": show(5, host)});
            assert!(calls.contains(&call), "{calls:?}");
        }
        let add = calls.iter().find(|c| c["params"]["namespace"]["nsid"] == 5).unwrap();
        assert_eq!(add["params"]["namespace"]["anagrpid"], 3, "{calls:?}");
    };
    back(&target);
    target.ok("cryptfold_encryption_lock", json!({"name": "p"}));
    target.ok(UNLOCK, unlock("the first password"));
    back(&target);
    target.end();
}

/// A key directory that takes no file keeps no pool open: it is locked as long as the target runs, and whoever locks it is told that it
/// lasts no longer.
#[test]
fn a_lock_that_can_not_be_written_down_locks_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    target.ok("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p"}));
    let config = target.ok("save_config", Value::Null);
    let open = json!({"base_bdev_name": "disk", "key_file": target.pool()["opened_by"]["key_file"]});
    // It leads nowhere: there is no such file, and none can be made.
    let marks = dir.path().join("keys/locked");
    std::os::unix::fs::symlink("/nonexistent/locked", &marks).unwrap();
    let reply = target.ok("cryptfold_encryption_lock", json!({"name": "p"}));
    let warning = reply["warning"].as_str().unwrap();
    assert!(warning.contains("next start") && warning.contains(marks.to_str().unwrap()), "{warning}");
    assert_eq!(target.pool()["state"], "locked");
    target.keeps_out(&open, "by request");
    target.ok(UNLOCK, json!({"name": "p"}));
    target.ok("cryptfold_encryption_lock", json!({"name": "p"}));
    target.end();

    let target = Target::new(dir.path());
    Config::from_value("saved", &config).unwrap().load(&target.control).unwrap();
    assert_eq!(target.pool()["state"], "unlocked");
    std::fs::remove_file(&marks).unwrap();
    assert_eq!(target.ok("cryptfold_encryption_lock", json!({"name": "p"})), true);
    target.end();

    let target = Target::new(dir.path());
    Config::from_value("saved", &config).unwrap().load(&target.control).unwrap();
    target.keeps_out(&open, "by request");
    target.end();
}

/// Where it can not be seen whether a pool is locked, it is, with that as the reason; and unlocking it works.
#[test]
fn marks_that_can_not_be_looked_at_lock_and_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    target.ok("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p"}));
    let config = target.ok("save_config", Value::Null);
    target.end();
    let marks = dir.path().join("keys/locked");
    std::fs::write(&marks, "no directory").unwrap();

    let target = Target::new(dir.path());
    Config::from_value("saved", &config).unwrap().load(&target.control).unwrap();
    let reason = target.pool()["reason"].as_str().unwrap().to_owned();
    let path = marks.join(target.pool()["uuid"].as_str().unwrap());
    assert!(reason.contains("can not be seen") && reason.contains(path.to_str().unwrap()), "{reason}");
    target.keeps_out(&json!({"base_bdev_name": "disk"}), path.to_str().unwrap());
    let uuid = target.pool()["uuid"].clone();
    assert_eq!(target.ok(UNLOCK, json!({"name": "p"})), uuid);
    assert_eq!(target.pool()["state"], "unlocked");
    target.end();
}

/// Also a pool that nothing has opened yet, and one whose device is away.
#[test]
fn a_pool_that_is_not_open_is_locked() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    target.ok("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p"}));
    let open = json!({"base_bdev_name": "disk", "key_file": target.pool()["opened_by"]["key_file"]});
    let disk = json!({"name": "disk", "filename": dir.path().join("disk"), "block_size": 4096});
    target.end();

    let target = Target::new(dir.path());
    let calls = json!([{"method": "bdev_uring_create", "params": disk},
        {"method": "cryptfold_pool_open", "params": {"base_bdev_name": "disk", "startup": "locked"}}]);
    target.ok("load_config", json!({"config": {"subsystems": [{"subsystem": "bdev", "config": calls}]}}));
    assert_eq!(target.pool()["reason"], "it starts locked");
    assert_eq!(target.ok("cryptfold_encryption_lock", json!({"name": "p"})), true);
    assert!(target.pool()["reason"].as_str().unwrap().contains("by request"));
    target.keeps_out(&open, "by request");
    target.ok(UNLOCK, json!({"name": "p", "key_file": open["key_file"]}));

    target.ok("bdev_uring_delete", json!({"name": "disk"}));
    assert_eq!(target.ok("cryptfold_encryption_status", Value::Null)["pools"], json!([]));
    target.ok("cryptfold_encryption_lock", json!({"name": "p"}));
    target.refused("cryptfold_encryption_lock", json!({"name": "q"}), -19, "No such device");
    target.ok("bdev_uring_create", disk);
    target.keeps_out(&open, "by request");
    target.end();
}

#[test]
fn slots_come_and_go_and_are_backed_up() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    let file = |name: &str| dir.path().join(name);
    let secret = |name: &str, text: &str| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::write(file(name), text).unwrap();
        std::fs::set_permissions(file(name), PermissionsExt::from_mode(0o600)).unwrap();
    };
    target.ok("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p"}));
    target.serve();
    let key_file = dir.path().join("keys/p.key");
    let old_key = std::fs::read(&key_file).unwrap();
    assert_eq!(target.slots(), [(0, "key_file".to_owned())]);
    target.refused("cryptfold_encryption_remove_slot", json!({"name": "p", "slot": 0}), -32602, "last one");
    secret("first", "the first password\n");
    let add = json!({"name": "p", "kind": "password", "password_file": file("first")});
    assert_eq!(target.ok("cryptfold_encryption_add_slot", add), 1);
    let add = json!({"name": "p", "kind": "key_file", "key_file": file("second.key"), "label": "spare"});
    assert_eq!(target.ok("cryptfold_encryption_add_slot", add), 2);
    let passwd = |old: &str, new: &str| json!({"name": "p", "password": old, "new_password": new});
    let method = "cryptfold_encryption_passwd";
    target.refused(method, passwd("not the password", "the other password"), -126, "opens no key slot");
    assert_eq!(target.ok(method, passwd("the first password", "the other password")), 1);

    // A password's slot gets another salt: the slot that is named, and no other.
    let third = json!({"name": "p", "kind": "password", "password": "the third password"});
    assert_eq!(target.ok("cryptfold_encryption_add_slot", third), 3);
    let rotate = |password: &str| json!({"name": "p", "slot": 3, "password": password});
    let before = target.pool()["slots"].clone();
    let method = "cryptfold_encryption_rotate_kek";
    target.refused(method, rotate("the other password"), -32602, "opens key slot 1, not 3");
    assert_eq!(target.pool()["slots"], before, "nothing was changed");
    assert_eq!(target.ok(method, rotate("the third password"))["slot"], 3);
    assert_ne!(target.pool()["slots"][3]["key_id"], before[3]["key_id"]);
    target.ok("cryptfold_encryption_remove_slot", json!({"name": "p", "slot": 3}));

    // The key file gets another key; the old one opens nothing.
    assert_eq!(target.ok("cryptfold_encryption_rotate_kek", json!({"name": "p", "slot": 0}))["slot"], 0);
    assert_ne!(std::fs::read(&key_file).unwrap(), old_key);
    assert_eq!(target.slots().iter().map(|s| s.0).collect::<Vec<_>>(), [0, 1, 2]);
    let backup = json!({"name": "p", "password": "of the back-up", "filename": file("backup")});
    target.ok("cryptfold_encryption_backup", backup.clone());
    target.refused("cryptfold_encryption_backup", backup, -17, "exists");
    target.ok("cryptfold_encryption_remove_slot", json!({"name": "p", "slot": 2}));
    target.ok("cryptfold_encryption_lock", json!({"name": "p"}));

    secret("old.key", std::str::from_utf8(&old_key).unwrap());
    for gone in ["old.key", "second.key"] {
        target.refused(UNLOCK, json!({"name": "p", "key_file": file(gone)}), -126, "does not fit");
    }
    target.refused(UNLOCK, unlock("the first password"), -126, "opens no key slot");
    target.ok(UNLOCK, unlock("the other password"));
    target.ok("cryptfold_encryption_lock", json!({"name": "p"}));

    // The back-up brings the removed slot back, if that is wanted.
    let restore = |password: &str, force: bool| {
        json!({"base_bdev_name": "disk", "filename": file("backup"), "password": password, "force": force,
            "pool_key_file": file("second.key")})
    };
    let method = "cryptfold_encryption_restore";
    target.refused(method, restore("not that one", true), -32602, "does not open");
    target.refused(method, restore("of the back-up", false), -32602, "force");
    assert_eq!(target.ok(method, restore("of the back-up", true))["superblock"], false);
    target.ok(UNLOCK, json!({"name": "p", "key_file": file("second.key")}));
    assert_eq!((target.namespaces(), target.slots().len()), (1, 3));
    target.end();
}

#[test]
fn a_pool_without_encryption_is_not_locked() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    target.ok("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p", "encrypt": false}));
    assert_eq!(target.pool()["encrypted"], false);
    target.refused("cryptfold_encryption_lock", json!({"name": "p"}), -32602, "not encrypted");
    let add = json!({"name": "p", "kind": "password", "password": "long enough"});
    target.refused("cryptfold_encryption_add_slot", add, -32602, "not encrypted");
    let both = json!({"bdev_name": "disk", "lvs_name": "q", "password": "long enough", "key_file": "/k"});
    target.refused("bdev_lvol_create_lvstore", both, -32602, "only one");
    target.end();
}

impl Target {
    /// Waits until no keys are changed any more: the domains by name.
    fn renewed(&self) -> Value {
        // Long enough for any machine; what fails says so before.
        for _ in 0..6000 {
            let pool = self.pool();
            if pool["renewal"]["state"] == "done" {
                return pool["domains"].clone();
            }
            assert_eq!(pool["renewal"]["state"], "running", "{pool}");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        panic!("{}", self.pool());
    }
}

#[test]
fn domains_get_new_keys_and_encryption_goes_off_and_on() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    target.ok("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p"}));
    let tenant = json!({"lvs_name": "p", "lvol_name": "t", "size_in_mib": 8, "domain": "tenant"});
    target.ok("bdev_lvol_create", tenant);
    let (rotate, disable, enable) =
        ("cryptfold_encryption_rotate", "cryptfold_encryption_disable", "cryptfold_encryption_enable");
    let whole = json!({"name": "p"});
    let one = json!({"name": "p", "domain": "tenant", "rate_mb_s": 1000});
    target.refused(rotate, json!({"name": "p", "rate_mb_s": 0}), -32602, "rate_mb_s");
    target.refused(rotate, json!({"name": "p", "domain": "nobody"}), -19, "No such device");
    target.refused(enable, whole.clone(), -32602, "encrypted already");
    let changed = target.ok(rotate, one.clone());
    assert_eq!((&changed[0]["name"], &changed[0]["generation"]), (&json!("tenant"), &json!(2)));
    assert_eq!(changed.as_array().unwrap().len(), 1);
    target.renewed();
    assert_eq!(target.ok(rotate, whole.clone()).as_array().unwrap().len(), 2);
    let domains = target.renewed();
    assert_eq!((&domains[0]["generation"], &domains[1]["generation"]), (&json!(2), &json!(3)));
    assert!(domains.as_array().unwrap().iter().all(|d| d["changing"] == false && d["old_bytes"] == 0));
    target.ok(disable, one.clone());
    let domains = target.renewed();
    assert_eq!((&domains[0]["encrypted"], &domains[1]["encrypted"]), (&json!(true), &json!(false)));
    target.refused(rotate, one.clone(), -32602, "not encrypted");
    target.refused(enable, json!({"name": "p", "kind": "kms"}), -32602, "has key slots");
    target.ok(enable, whole);
    assert_eq!(target.renewed()[1]["encrypted"], true);
    assert_eq!(
        target.ok("cryptfold_encryption_renew", json!({"name": "p", "rate_mb_s": 5}))["bytes_per_s"],
        5_000_000
    );
    target.end();
}

#[test]
fn a_pool_that_everybody_can_open_is_encrypted_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    target.ok("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p", "encrypt": false}));
    target.ok("bdev_lvol_create", json!({"lvs_name": "p", "lvol_name": "v", "size_in_mib": 8}));
    let enable = "cryptfold_encryption_enable";
    target.refused(enable, json!({"name": "p"}), -32602, "opens for everybody");
    let file = dir.path().join("new.key");
    target.refused(enable, json!({"name": "p", "kind": "key_file"}), -32602, "key_file");
    let one = json!({"name": "p", "kind": "key_file", "key_file": file, "domain": "default"});
    target.refused(enable, one, -32602, "as a whole");
    let changed = target.ok(enable, json!({"name": "p", "kind": "key_file", "key_file": file}));
    assert_eq!(changed[0]["generation"], 2);
    let pool = target.pool();
    assert_eq!((&pool["encrypted"], pool["slots"].as_array().unwrap().len()), (&json!(true), 1));
    assert_eq!(pool["opened_by"]["key_file"], json!(file));
    target.renewed();
    target.ok("cryptfold_encryption_lock", json!({"name": "p"}));
    target.ok("cryptfold_encryption_unlock", json!({"name": "p", "key_file": file}));
    assert_eq!(target.pool()["domains"][0]["generation"], 2);
    target.end();
}

#[test]
fn domains_and_pools_are_erased_with_a_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    target.ok("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p"}));
    target.serve();
    let tenant = json!({"lvs_name": "p", "lvol_name": "t", "size_in_mib": 8, "domain": "tenant"});
    target.ok("bdev_lvol_create", tenant.clone());
    target.ok("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "p/t"}}));
    assert_eq!(target.namespaces(), 2);
    let method = "cryptfold_encryption_erase";
    let erase =
        |domain: Option<&str>, confirm: &str| json!({"name": "p", "domain": domain, "confirm": confirm});
    target.refused(method, erase(Some("tenant"), "p"), -32602, "confirm");
    target.refused(method, erase(Some("nobody"), "nobody"), -19, "No such device");
    let signed = target.ok(method, erase(Some("tenant"), "tenant"));
    cryptfold_control::certificate::verify(&signed).unwrap();
    let certificate = &signed["certificate"];
    assert_eq!(
        (&certificate["what"], &certificate["domain"]["volumes"][0]["name"]),
        (&json!("domain"), &json!("t"))
    );
    assert_eq!(certificate["overwritten"]["byte_offsets"].as_array().unwrap().len(), 4);
    assert_eq!(target.namespaces(), 1);
    target.ok("bdev_lvol_create", tenant);

    let file = dir.path().join("certificate");
    let signed = target.ok(method, json!({"name": "p", "confirm": "p", "filename": file}));
    let written: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!((written, &signed["certificate"]["slots"][0]["kind"]), (signed.clone(), &json!("key_file")));
    assert_eq!(target.namespaces(), 0);
    let open = json!({"base_bdev_name": "disk"});
    target.refused("cryptfold_pool_open", open, -19, "carries no pool");
    target.end();
}

#[test]
fn calls_with_secrets_do_not_wait_for_locked_pools() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    let create = json!({"bdev_name": "disk", "lvs_name": "p", "password": "the first password"});
    target.ok("bdev_lvol_create_lvstore", create);
    target.ok("cryptfold_encryption_lock", json!({"name": "p"}));
    let load = |method: &str, params: Value| {
        let calls = json!([{"method": method, "params": params}]);
        json!({"config": {"subsystems": [{"subsystem": "bdev", "config": calls}]}})
    };
    let other = json!({"bdev_name": "missing", "lvs_name": "q", "password": "another password"});
    for (method, params) in [
        ("bdev_lvol_create_lvstore", other),
        ("cryptfold_encryption_unlock", json!({"name": "q", "password": "another password"})),
    ] {
        target.refused("load_config", load(method, params), -19, "No such device");
    }
    target.ok("load_config", load("bdev_passthru_create", json!({"name": "pt", "base_bdev_name": "p/v"})));
    let waiting = target.ok("cryptfold_encryption_status", Value::Null)["waiting_calls"].clone();
    assert_eq!(waiting, json!(["bdev_passthru_create"]));
    let saved = target.ok("save_config", Value::Null).to_string();
    assert!(saved.contains("bdev_passthru_create") && !saved.contains("another password"), "{saved}");
    target.end();
}

#[test]
fn a_key_file_that_opens_another_pool_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::with_disk(dir.path());
    let other = dir.path().join("other");
    std::fs::File::create(&other).unwrap().set_len(64 << 20).unwrap();
    target.ok("bdev_uring_create", json!({"name": "other", "filename": other, "block_size": 4096}));
    let shared = dir.path().join("shared.key");
    let create = |disk: &str, name: &str| json!({"bdev_name": disk, "lvs_name": name, "key_file": shared, "create_key": true});
    target.ok("bdev_lvol_create_lvstore", create("disk", "p"));
    target.ok("bdev_lvol_create_lvstore", create("other", "q"));
    let old_key = std::fs::read(&shared).unwrap();
    let rotate = |name: &str| target.ok("cryptfold_encryption_rotate_kek", json!({"name": name}));

    // The other pool is opened by the kept file from now on.
    let rotated = rotate("p");
    let kept = dir.path().join("shared.old-1.key");
    assert_eq!(
        (&rotated["old_kept"], &rotated["old_key_file"]),
        (&json!("kept: it also opens q"), &json!(kept))
    );
    assert_eq!(std::fs::read(&kept).unwrap(), old_key);
    assert_ne!(std::fs::read(&shared).unwrap(), old_key);
    let saved = target.ok("save_config", Value::Null).to_string();
    assert!(saved.contains("shared.old-1.key") && saved.contains("shared.key"), "{saved}");
    for (pool, file) in [("q", &kept), ("p", &shared)] {
        target.ok("cryptfold_encryption_lock", json!({"name": pool}));
        target.ok(UNLOCK, json!({"name": pool, "key_file": file}));
    }

    // Nobody else needs these.
    assert_eq!(
        (rotate("p")["old_kept"].clone(), rotate("q")["old_kept"].clone()),
        (Value::Null, Value::Null)
    );
    let mut names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    names.retain(|n| n.to_string_lossy().ends_with(".key"));
    names.sort();
    assert_eq!(names, ["shared.key", "shared.old-1.key"]);

    // A locked pool counts, too; and another slot of the same pool.
    let add = |name: &str| json!({"name": name, "kind": "key_file", "key_file": shared});
    target.ok("cryptfold_encryption_add_slot", add("q"));
    target.ok("cryptfold_encryption_lock", json!({"name": "q"}));
    assert_eq!(rotate("p")["old_kept"], "kept: it also opens q");
    target.ok("cryptfold_encryption_add_slot", add("p"));
    let rotated = target.ok("cryptfold_encryption_rotate_kek", json!({"name": "p", "slot": 0}));
    assert_eq!(rotated["old_kept"], "kept: it also opens p");
    target.end();
}
