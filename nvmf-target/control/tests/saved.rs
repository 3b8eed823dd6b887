//! Everything that can be configured, saved and loaded by another target: the same again, keys as references.

use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use cryptfold_control::jsonrpc::Handler;
use cryptfold_control::{Control, ControlConfig};
use cryptfold_reactor::{IdlePolicy, MemoryConfig};
use serde_json::{Value, json};

struct Target(Arc<Control>);

impl Target {
    fn new(dir: &Path) -> Target {
        Target(Control::new(ControlConfig {
            idle: IdlePolicy::Interrupt,
            pin: false,
            memory: MemoryConfig { hugepages: false, arena_bytes: 4 << 20, fixed_buffers: false },
            key_dir: dir.join("keys"),
            ..ControlConfig::default()
        }))
    }

    fn call(&self, method: &str, params: Value) -> Value {
        let params = Some(params).filter(|p| !p.is_null());
        self.0.call(method, params.as_ref()).unwrap_or_else(|e| panic!("{method}: {}", e.message))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.0.shutdown().unwrap();
    }
}

fn secret(path: &Path, text: &str) {
    use std::io::Write;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600).open(path).unwrap().write_all(text.as_bytes()).unwrap();
}

/// Calls before initialisation, and after it; each leaves something to be saved.
fn configure(t: &Target, dir: &Path, address: &str) {
    t.call("bdev_set_options", json!({"bdev_auto_examine": false}));
    t.call("sock_impl_set_options", json!({"impl_name": "posix", "recv_buf_size": 4096}));
    t.call("iobuf_set_options", json!({"small_pool_count": 8192}));
    t.call("nvmf_set_max_subsystems", json!({"max_subsystems": 64}));
    t.call(
        "nvmf_set_config",
        json!({"dhchap_digests": ["sha384"], "dhchap_dhgroups": ["null", "ffdhe3072"]}),
    );
    t.call("framework_start_init", Value::Null);

    for (name, text) in [
        ("chap", "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:"),
        ("psk", "NVMeTLSkey-1:01:VRLbtnN9AQb2WXW3c9+wEf/DRLz0QuLdbYvEhwtdWwNf9LrZ:"),
    ] {
        secret(&dir.join(name), text);
        t.call("keyring_file_add_key", json!({"name": name, "path": dir.join(name)}));
    }
    t.call("bdev_nvme_set_options", json!({"action_on_timeout": "none", "dhchap_digests": ["sha256"]}));
    for name in ["m0", "m1", "m2"] {
        t.call("bdev_malloc_create", json!({"name": name, "num_blocks": 2048, "block_size": 4096}));
    }
    let disk = dir.join("disk");
    std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&disk)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let disk = |unmap| json!({"name": "u0", "filename": disk, "block_size": 4096, "unmap": unmap});
    t.call("bdev_uring_create", disk(false));
    // Nothing is at that address; what was asked for stays.
    let hotplug = json!({"enable": true, "period_us": 1_000_000, "allowed": ["ffff:fe:1f.7"]});
    t.call("bdev_nvme_set_hotplug", hotplug);
    t.call("bdev_null_create", json!({"name": "n0", "num_blocks": 100, "block_size": 512}));
    t.call("bdev_error_create", json!({"base_name": "m1"}));
    let latency = json!({"name": "d0", "base_bdev_name": "EE_m1", "avg_read_latency": 1, "p99_read_latency": 2,
        "avg_write_latency": 3, "p99_write_latency": 4});
    t.call("bdev_delay_create", latency);
    t.call(
        "bdev_delay_update_latency",
        json!({"delay_bdev_name": "d0", "latency_type": "avg_read", "latency_us": 7}),
    );
    let key = json!({"cipher": "AES_XTS", "name": "k", "key": "00112233445566778899aabbccddeeff",
        "key2": "ffeeddccbbaa99887766554433221100"});
    t.call("accel_crypto_key_create", key);
    t.call("bdev_crypto_create", json!({"base_bdev_name": "m2", "name": "c0", "key_name": "k"}));
    t.call("bdev_set_qos_limit", json!({"name": "n0", "rw_ios_per_sec": 1000}));

    let transport = json!({"trtype": "TCP", "max_queue_depth": 64, "in_capsule_data_size": 8192, "kas": 7, "min_kato": 2000,
        "abort_timeout_sec": 3, "connect_timeout_ms": 4000, "auth_timeout_ms": 5000, "r2t_timeout_ms": 6000, "max_connections": 100,
        "max_connections_per_host": 50, "max_buffer_mib": 256, "max_buffer_mib_per_host": 128});
    t.call("nvmf_create_transport", transport);
    t.call("nvmf_set_crdt", json!({"crdt1": 1, "crdt2": 2, "crdt3": 3}));
    let listener =
        |port: &str| json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": address, "trsvcid": port});
    t.call(
        "nvmf_discovery_add_referral",
        json!({"address": listener("5000"), "subnqn": "nqn.2014-08.org.nvmexpress.discovery"}),
    );
    let (nqn, host) = ("nqn.2026-01.io.cryptfold:saved", "nqn.2026-01.io.cryptfold:host");
    let subsystem = json!({"nqn": nqn, "serial_number": "S1", "model_number": "M1", "ana_reporting": true, "max_namespaces": 9,
        "min_cntlid": 3, "max_cntlid": 300});
    t.call("nvmf_create_subsystem", subsystem);
    let access =
        json!({"nqn": nqn, "host": host, "dhchap_key": "chap", "dhchap_ctrlr_key": "chap", "psk": "psk"});
    t.call("nvmf_subsystem_add_host", access);
    let ns = json!({"bdev_name": "d0", "nsid": 4, "eui64": "0123456789ABCDEF", "nguid": "0123456789ABCDEF0123456789ABCDEF",
        "anagrpid": 2, "ptpl_file": dir.join("ptpl")});
    t.call("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": ns}));
    t.call(
        "nvmf_subsystem_add_ns",
        json!({"nqn": nqn, "namespace": {"bdev_name": "c0", "nsid": 7, "no_auto_visible": true}}),
    );
    t.call("nvmf_ns_add_host", json!({"nqn": nqn, "nsid": 7, "host": host}));
    t.call("nvmf_subsystem_set_ns_ana_group", json!({"nqn": nqn, "nsid": 7, "anagrpid": 3}));
    t.call("nvmf_subsystem_add_listener", json!({"nqn": nqn, "listen_address": listener("4420")}));
    t.call(
        "nvmf_subsystem_add_listener",
        json!({"nqn": nqn, "listen_address": listener("4421"), "secure_channel": true}),
    );
    t.call(
        "nvmf_subsystem_add_listener",
        json!({"nqn": nqn, "listen_address": listener("4422"), "secure_concatenation": true}),
    );
    for (group, state) in [(2, "non_optimized"), (3, "inaccessible")] {
        let p =
            json!({"nqn": nqn, "listen_address": listener("4420"), "ana_state": state, "anagrpid": group});
        t.call("nvmf_subsystem_listener_set_ana_state", p);
    }
    t.call("nvmf_create_subsystem", json!({"nqn": "nqn.2026-01.io.cryptfold:open", "allow_any_host": true}));
}

#[test]
fn a_saved_target_makes_the_same_again() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // A loopback address of this process's own, so that nobody else has its ports.
    let [.., a, b] = std::process::id().to_be_bytes();
    let address = format!("127.{}.{a}.{b}", 100 + std::process::id() / 65_536 % 100);
    let shown = |t: &Target| {
        [
            "nvmf_get_subsystems",
            "nvmf_get_transports",
            "nvmf_discovery_get_referrals",
            "keyring_get_keys",
            "accel_crypto_keys_get",
        ]
        .map(|m| t.call(m, Value::Null))
    };
    let (saved, before) = {
        let t = Target::new(dir);
        configure(&t, dir, &address);
        (t.call("save_config", Value::Null), shown(&t))
    };
    let text = saved.to_string();
    for secret in ["00112233445566778899aabbccddeeff", "AAECAwQFBgcICQ", "VRLbtnN9AQb2"] {
        assert!(!text.contains(secret), "a key in the clear");
    }
    // What does not stand in the configuration can not come back.
    for word in [
        "\"avg_read_latency\":7",
        "\"rw_ios_per_sec\":1000",
        "\"crdt2\":2",
        "\"recv_buf_size\":4096",
        "\"max_subsystems\":64",
        "\"ffdhe3072\"",
        "\"bdev_auto_examine\":false",
        "\"small_pool_count\":8192",
        "\"abort_timeout_sec\":3",
        "\"ana_state\":\"inaccessible\"",
        "\"no_auto_visible\":true",
        "nvmf_ns_add_host",
        "ptpl_file",
        "\"eui64\"",
        "\"secure_channel\":true",
        "\"secure_concatenation\":true",
        "nvmf_discovery_add_referral",
        "\"max_cntlid\":300",
        "bdev_nvme_set_options",
    ] {
        assert!(text.contains(word), "{word} is not saved: {text}");
    }
    let t = Target::new(dir);
    t.call("load_config", json!({"config": saved}));
    assert_eq!(t.call("save_config", Value::Null), saved);
    assert_eq!(shown(&t), before);
}
