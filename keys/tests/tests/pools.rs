//! Pools whose key lies at a key server (PyKMIP): they start with it, wait for it, get another key, and die with it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptfold_control::jsonrpc::Handler as _;
use cryptfold_control::{Control, ControlConfig};
use cryptfold_keys_tests::KeyServer;
use cryptfold_kmip::State;
use cryptfold_reactor::{IdlePolicy, MemoryConfig};
use serde_json::{Value, json};

struct Target(Arc<Control>);

impl Target {
    fn new(dir: &Path, kms: &KeyServer, certificate: &(std::path::PathBuf, std::path::PathBuf)) -> Target {
        let control = Control::new(ControlConfig {
            idle: IdlePolicy::Interrupt,
            pin: false,
            memory: MemoryConfig { hugepages: false, fixed_buffers: false, arena_bytes: 4 << 20 },
            key_dir: dir.join("keys"),
            ..ControlConfig::default()
        });
        control.initialize().expect("a target");
        let target = Target(control);
        let file = dir.join("disk");
        if !file.exists() {
            std::fs::File::create(&file).unwrap().set_len(64 << 20).unwrap();
        }
        target.ok(
            "keyring_kmip_add_server",
            json!({"name": "kms", "servers": [kms.address.to_string()], "ca_file": kms.authority.certificate(),
                "cert_file": certificate.0, "key_file": certificate.1, "rounds": 1, "timeout_ms": 3000}),
        );
        target.ok("bdev_uring_create", json!({"name": "disk", "filename": file, "block_size": 4096}));
        target
    }

    fn call(&self, method: &str, params: Value) -> Result<Value, (i64, String)> {
        self.0.call(method, Some(&params)).map_err(|e| (e.code, e.message))
    }

    fn ok(&self, method: &str, params: Value) -> Value {
        self.call(method, params).unwrap_or_else(|e| panic!("{method}: {e:?}"))
    }

    fn pool(&self) -> Value {
        self.ok("cryptfold_encryption_status", json!({}))["pools"][0].clone()
    }

    fn volumes(&self) -> usize {
        self.ok("bdev_lvol_get_lvols", json!({})).as_array().unwrap().len()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.0.shutdown();
    }
}

#[test]
fn a_pool_lives_and_dies_with_its_key_at_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let mut kms = KeyServer::start();
    let certificate = kms.authority.client("target");
    let target = Target::new(dir.path(), &kms, &certificate);
    target.ok("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p", "kms_server": "kms"}));
    target.ok("bdev_lvol_create", json!({"lvs_name": "p", "lvol_name": "v", "size_in_mib": 8}));
    let slot = target.pool()["slots"][0].clone();
    assert_eq!((&slot["kind"], &slot["label"]), (&json!("kms"), &json!("kms")));
    let first = slot["kms_object"].as_str().unwrap().to_owned();

    // Another key: the old one is destroyed there.
    let rotated = target.ok("cryptfold_encryption_rotate_kek", json!({"name": "p"}));
    assert_eq!((&rotated["old_kms_object"], &rotated["old_destroyed"]), (&json!(first), &json!(true)));
    let second = rotated["kms_object"].as_str().unwrap().to_owned();
    assert_ne!(first, second);
    target.ok("cryptfold_encryption_lock", json!({"name": "p"}));
    assert_eq!((target.pool()["state"].clone(), target.volumes()), (json!("locked"), 0));
    target.ok("cryptfold_encryption_unlock", json!({"name": "p"}));
    assert_eq!(target.volumes(), 1);
    drop(target);

    // A server that is down delays the start, and no more.
    kms.stop();
    let target = Target::new(dir.path(), &kms, &certificate);
    target.ok("cryptfold_pool_open", json!({"base_bdev_name": "disk"}));
    let pool = target.pool();
    assert_eq!((&pool["state"], &pool["waits_for_key_server"]), (&json!("locked"), &json!(true)), "{pool}");
    kms.resume();
    let deadline = Instant::now() + Duration::from_secs(60);
    while target.pool()["state"] != "unlocked" {
        assert!(Instant::now() < deadline, "{}", target.pool());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(target.volumes(), 1);

    // A key that is not active opens nothing.
    target.ok("cryptfold_encryption_lock", json!({"name": "p"}));
    kms.force_state(&second, State::Deactivated);
    let (code, message) = target.call("cryptfold_encryption_unlock", json!({"name": "p"})).unwrap_err();
    assert!(code == -126 && message.contains("deactivated"), "{message}");
    kms.force_state(&second, State::Active);
    target.ok("cryptfold_encryption_unlock", json!({"name": "p"}));

    // Erased: the key is gone there, too.
    let signed = target.ok("cryptfold_encryption_erase", json!({"name": "p", "confirm": "p"}));
    cryptfold_control::certificate::verify(&signed).unwrap();
    let servers = &signed["certificate"]["key_servers"];
    assert_eq!(
        (&servers[0]["object"], &servers[0]["destroyed"]),
        (&json!(second), &json!(true)),
        "{servers}"
    );
    let (code, _) = target.call("cryptfold_pool_open", json!({"base_bdev_name": "disk"})).unwrap_err();
    assert_eq!(code, -19);
}
