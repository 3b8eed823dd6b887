//! Everything that can be configured, saved and loaded by another target: the same again, keys as references.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use cryptfold_control::jsonrpc::Handler;
use cryptfold_control::table::Role;
use cryptfold_control::{Control, ControlConfig};
use cryptfold_reactor::{IdlePolicy, MemoryConfig};
use serde_json::{Value, json};

const HOST_KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\
    202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f";

/// Remembers what it was asked.
struct Target(Arc<Control>, RefCell<BTreeSet<String>>);

impl Target {
    fn new(dir: &Path) -> Target {
        let control = Control::new(ControlConfig {
            idle: IdlePolicy::Interrupt,
            pin: false,
            memory: MemoryConfig { hugepages: false, arena_bytes: 4 << 20, fixed_buffers: false },
            key_dir: dir.join("keys"),
            ..ControlConfig::default()
        });
        Target(control, RefCell::default())
    }

    fn call(&self, method: &str, params: Value) -> Value {
        let params = Some(params).filter(|p| !p.is_null());
        self.1.borrow_mut().insert(method.to_owned());
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

/// What each method leaves in a saved configuration. Compared after loading it, too.
const SAVED: &[(&str, &str)] = &[
    ("accel_crypto_key_create", "\"key_file\""),
    ("bdev_aio_create", "\"method\":\"bdev_aio_create\""),
    ("bdev_crypto_create", "\"method\":\"bdev_crypto_create\""),
    ("bdev_delay_create", "\"avg_write_latency\":3"),
    ("bdev_delay_update_latency", "\"avg_read_latency\":7"),
    ("bdev_error_create", "\"method\":\"bdev_error_create\""),
    ("bdev_hostcrypt_create", "\"method\":\"bdev_hostcrypt_create\""),
    ("bdev_lvol_create_lvstore", "\"method\":\"cryptfold_pool_open\""),
    ("bdev_malloc_create", "\"method\":\"bdev_malloc_create\""),
    ("bdev_null_create", "\"method\":\"bdev_null_create\""),
    ("bdev_null_resize", "\"num_blocks\":4096"),
    ("bdev_nvme_set_hotplug", "\"ffff:fe:1f.7\""),
    ("bdev_nvme_set_options", "\"dhchap_digests\":[\"sha256\"]"),
    ("bdev_passthru_create", "\"method\":\"bdev_passthru_create\""),
    ("bdev_set_options", "\"bdev_auto_examine\":false"),
    ("bdev_set_qos_limit", "\"rw_ios_per_sec\":1000"),
    ("bdev_split_create", "\"split_count\":2"),
    ("bdev_uring_create", "\"method\":\"bdev_uring_create\""),
    ("iobuf_set_options", "\"small_pool_count\":8192"),
    ("keyring_file_add_key", "\"method\":\"keyring_file_add_key\""),
    ("nvmf_create_subsystem", "\"max_cntlid\":300"),
    ("nvmf_create_transport", "\"abort_timeout_sec\":3"),
    ("nvmf_discovery_add_referral", "\"method\":\"nvmf_discovery_add_referral\""),
    ("nvmf_ns_add_host", "\"method\":\"nvmf_ns_add_host\""),
    ("nvmf_set_config", "\"ffdhe3072\""),
    ("nvmf_set_crdt", "\"crdt2\":2"),
    ("nvmf_set_max_subsystems", "\"max_subsystems\":64"),
    ("nvmf_subsystem_add_host", "\"psk\":\"psk\""),
    ("nvmf_subsystem_add_listener", "\"secure_concatenation\":true"),
    ("nvmf_subsystem_add_ns", "\"eui64\""),
    ("nvmf_subsystem_allow_any_host", "\"allow_any_host\":true"),
    ("nvmf_subsystem_listener_set_ana_state", "\"ana_state\":\"inaccessible\""),
    ("nvmf_subsystem_set_keys", "\"dhchap_ctrlr_key\":\"chap2\""),
    ("nvmf_subsystem_set_ns_ana_group", "\"anagrpid\":3"),
    ("sock_impl_set_options", "\"recv_buf_size\":4096"),
];

/// What another test, which has what it takes, saves and (but for bdev_luks_create) loads: method, file, test.
const ELSEWHERE: &[(&str, &str, &str)] = &[
    ("bdev_luks_create", "keys/tests/tests/volumes.rs", "the_life_of_a_volume_its_header_and_its_key"),
    ("keyring_kmip_add_server", "keys/tests/tests/hosts.rs", "a_saved_configuration_brings_everything_back"),
    ("keyring_kmip_add_key", "keys/tests/tests/hosts.rs", "a_saved_configuration_brings_everything_back"),
    (
        "bdev_nvme_attach_controller",
        "nvmf-target/control/tests/remote.rs",
        "a_pool_and_a_cipher_over_remote_namespaces",
    ),
    (
        "cryptfold_encryption_lock",
        "nvmf-target/control/tests/encryption.rs",
        "a_pool_with_a_password_is_locked_and_unlocked_with_what_stands_on_it",
    ),
    (
        "cryptfold_encryption_unlock",
        "nvmf-target/control/tests/encryption.rs",
        "a_pool_with_a_password_is_locked_and_unlocked_with_what_stands_on_it",
    ),
];

/// What leaves nothing in a configuration, and why.
const NOT_SAVED: &[(&str, &[&str])] = &[
    (
        "the pool keeps it on its device",
        &[
            "bdev_lvol_clone",
            "bdev_lvol_create",
            "bdev_lvol_decouple_parent",
            "bdev_lvol_delete",
            "bdev_lvol_grow_lvstore",
            "bdev_lvol_inflate",
            "bdev_lvol_rename",
            "bdev_lvol_rename_lvstore",
            "bdev_lvol_resize",
            "bdev_lvol_set_read_only",
            "bdev_lvol_snapshot",
            "cryptfold_pool_create_domain",
            "cryptfold_encryption_add_slot",
            "cryptfold_encryption_disable",
            "cryptfold_encryption_enable",
            "cryptfold_encryption_erase",
            "cryptfold_encryption_passwd",
            "cryptfold_encryption_remove_slot",
            "cryptfold_encryption_renew",
            "cryptfold_encryption_restore",
            "cryptfold_encryption_rotate",
            "cryptfold_encryption_rotate_kek",
        ],
    ),
    (
        "it takes away what another call made",
        &[
            "accel_crypto_key_destroy",
            "bdev_aio_delete",
            "bdev_crypto_delete",
            "bdev_delay_delete",
            "bdev_error_delete",
            "bdev_hostcrypt_delete",
            "bdev_luks_delete",
            "bdev_lvol_delete_lvstore",
            "bdev_malloc_delete",
            "bdev_null_delete",
            "bdev_nvme_detach_controller",
            "bdev_passthru_delete",
            "bdev_split_delete",
            "bdev_uring_delete",
            "cryptfold_pool_close",
            "keyring_file_remove_key",
            "keyring_kmip_remove_key",
            "keyring_kmip_remove_server",
            "nvmf_delete_subsystem",
            "nvmf_discovery_remove_referral",
            "nvmf_ns_remove_host",
            "nvmf_subsystem_remove_host",
            "nvmf_subsystem_remove_listener",
            "nvmf_subsystem_remove_ns",
        ],
    ),
    (
        "it is done once",
        &[
            "bdev_aio_rescan",
            "bdev_examine",
            "bdev_nvme_reset_controller",
            "bdev_reset_iostat",
            "bdev_uring_rescan",
            "cryptfold_encryption_backup",
            "cryptfold_pool_check",
            "cryptfold_pool_dedupe",
            "cryptfold_pool_scrub",
            "framework_start_init",
            "load_config",
            "save_config",
            "framework_get_config",
            "spdk_kill_instance",
        ],
    ),
    ("it is what configurations are loaded by", &["cryptfold_pool_open"]),
    (
        "SPDK does not save it either: looking for an error",
        &[
            "bdev_enable_histogram",
            "cryptfold_trace",
            "bdev_error_inject_error",
            "log_clear_flag",
            "log_enable_timestamps",
            "log_set_flag",
            "log_set_level",
            "log_set_print_level",
        ],
    ),
    (
        "only the value that it has anyway is possible",
        &["framework_monitor_context_switch", "framework_set_scheduler", "sock_set_default_impl"],
    ),
];

/// Every method that changes something is saved, or stands above with a reason.
#[test]
fn no_method_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::new(dir.path());
    let saved = SAVED.iter().map(|(m, _)| *m);
    let elsewhere = ELSEWHERE.iter().map(|(m, ..)| *m);
    let listed: Vec<&str> =
        saved.chain(elsewhere).chain(NOT_SAVED.iter().flat_map(|(_, all)| all.iter().copied())).collect();
    let table = target.0.table();
    for method in &listed {
        assert_eq!(listed.iter().filter(|m| *m == method).count(), 1, "{method} is listed twice");
        assert_eq!(table.get(method).map(|m| m.name), Some(*method), "there is no method {method}");
    }
    // What takes any parameters has no effect.
    for m in table.methods().iter().filter(|m| m.role != Role::Viewer && !m.any_params) {
        assert!(listed.contains(&m.name), "{}: neither saved nor listed with a reason", m.name);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (method, file, test) in ELSEWHERE {
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        let body = text
            .split_once(&format!("#[test]\nfn {test}("))
            .unwrap_or_else(|| panic!("{file}: no test {test}"))
            .1;
        assert!(body.split("\n}\n").next().unwrap().contains("save_config"), "{test} saves nothing");
        assert!(text.contains(method), "{file} does not call {method}");
    }
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
        ("chap2", "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:"),
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
    t.call("bdev_null_resize", json!({"name": "n0", "new_size": 2}));
    t.call("bdev_passthru_create", json!({"base_bdev_name": "n0", "name": "pt0"}));
    t.call("bdev_malloc_create", json!({"name": "m3", "num_blocks": 2048, "block_size": 4096}));
    t.call("bdev_split_create", json!({"base_bdev": "m3", "split_count": 2}));
    let file = |name: &str, bytes| {
        let path = dir.join(name);
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    };
    t.call("bdev_aio_create", json!({"name": "a0", "filename": file("aio", 1 << 20), "block_size": 512}));
    let pool = json!({"name": "u1", "filename": file("pool", 64 << 20), "block_size": 4096});
    t.call("bdev_uring_create", pool);
    t.call("bdev_lvol_create_lvstore", json!({"bdev_name": "u1", "lvs_name": "p"}));
    t.call("bdev_lvol_create", json!({"lvs_name": "p", "lvol_name": "v", "size_in_mib": 16}));
    secret(&dir.join("host.key"), HOST_KEY);
    let host =
        json!({"base_bdev_name": "p/v", "name": "h0", "key_file": dir.join("host.key"), "sector_size": 4096});
    t.call("bdev_hostcrypt_create", host);
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
    t.call(
        "nvmf_subsystem_set_keys",
        json!({"nqn": nqn, "host": host, "dhchap_key": "chap", "dhchap_ctrlr_key": "chap2"}),
    );
    let open = "nqn.2026-01.io.cryptfold:open";
    t.call("nvmf_create_subsystem", json!({"nqn": open}));
    t.call("nvmf_subsystem_allow_any_host", json!({"nqn": open, "allow_any_host": true}));
    t.call("nvmf_subsystem_add_ns", json!({"nqn": open, "namespace": {"bdev_name": "h0"}}));
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
            "bdev_get_bdevs",
            "bdev_lvol_get_lvols",
            "cryptfold_encryption_status",
        ]
        .map(|m| t.call(m, Value::Null))
    };
    let (saved, before, called) = {
        let t = Target::new(dir);
        configure(&t, dir, &address);
        let called = t.1.take();
        (t.call("save_config", Value::Null), shown(&t), called)
    };
    let text = saved.to_string();
    for secret in ["00112233445566778899aabbccddeeff", "AAECAwQFBgcICQ", "VRLbtnN9AQb2", HOST_KEY] {
        assert!(!text.contains(secret), "a key in the clear");
    }
    // What does not stand in the configuration can not come back.
    for (method, word) in SAVED {
        assert!(called.contains(*method), "{method} was not called");
        assert!(text.contains(word), "{method}: {word} is not saved: {text}");
    }
    for word in ["\"no_auto_visible\":true", "ptpl_file", "\"secure_channel\":true"] {
        assert!(text.contains(word), "{word} is not saved: {text}");
    }
    let t = Target::new(dir);
    t.call("load_config", json!({"config": saved}));
    assert_eq!(t.call("save_config", Value::Null), saved);
    assert_eq!(shown(&t), before);
}
