//! A server in this process, driven over its socket with raw bytes: every row of the table of errors, and the devices.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use cryptfold_control::fips::FipsMode;
use cryptfold_control::server::Server;
use cryptfold_control::{Control, ControlConfig, Signal};
use cryptfold_reactor::{IdlePolicy, MemoryConfig};
use serde_json::{Value, json};

struct Target {
    control: Arc<Control>,
    server: Server,
    signals: Arc<Mutex<Vec<Signal>>>,
    dir: tempfile::TempDir,
}

fn uninitialised() -> Target {
    in_mode(FipsMode::Off)
}

fn in_mode(fips: FipsMode) -> Target {
    let dir = tempfile::tempdir().unwrap();
    let signals: Arc<Mutex<Vec<Signal>>> = Arc::default();
    let s = signals.clone();
    let control = Control::new(ControlConfig {
        idle: IdlePolicy::Interrupt,
        pin: false,
        memory: MemoryConfig { hugepages: false, arena_bytes: 4 << 20, fixed_buffers: false },
        key_dir: dir.path().join("keys"),
        on_signal: Box::new(move |sig| s.lock().unwrap().push(sig)),
        fips,
        ..ControlConfig::default()
    });
    let server = Server::start(&dir.path().join("rpc.sock"), control.clone()).unwrap();
    Target { control, server, signals, dir }
}

fn start() -> Target {
    let t = uninitialised();
    t.control.initialize().unwrap();
    t
}

impl Drop for Target {
    fn drop(&mut self) {
        self.server.stop();
        self.control.shutdown().unwrap();
    }
}

impl Target {
    fn raw(&self, bytes: &[u8]) -> Vec<Value> {
        let mut s = UnixStream::connect(self.server.path()).unwrap();
        s.write_all(bytes).unwrap();
        s.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        s.read_to_string(&mut text).unwrap();
        serde_json::Deserializer::from_str(&text).into_iter::<Value>().map(Result::unwrap).collect()
    }

    fn reply(&self, method: &str, params: Value) -> Value {
        let request = json!({"jsonrpc": "2.0", "id": 7, "method": method, "params": params});
        let mut replies = self.raw(request.to_string().as_bytes());
        assert_eq!((replies.len(), &replies[0]["id"]), (1, &json!(7)));
        replies.remove(0)
    }

    fn call(&self, method: &str, params: Value) -> Value {
        let mut r = self.reply(method, params);
        assert!(r.get("error").is_none(), "{method}: {r}");
        r["result"].take()
    }

    fn refused(&self, method: &str, params: Value) -> (i64, String) {
        let r = self.reply(method, params);
        assert!(r.get("error").is_some(), "{method}: {r}");
        (r["error"]["code"].as_i64().unwrap(), r["error"]["message"].as_str().unwrap().to_string())
    }

    fn malloc(&self, name: &str) {
        assert_eq!(
            self.call("bdev_malloc_create", json!({"name": name, "num_blocks": 2048, "block_size": 4096})),
            name
        );
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

#[test]
fn the_table_of_errors() {
    let t = start();
    t.malloc("M0");
    // unknown method
    let (code, what) = t.refused("bdev_get_bdev", Value::Null);
    assert_eq!(code, -32601);
    assert!(what.contains("did you mean bdev_get_bdevs"), "{what}");
    // bad, missing, unknown parameter
    for (params, word) in [
        (json!({"num_blocks": "x", "block_size": 512}), "num_blocks"),
        (json!({"block_size": 512}), "num_blocks"),
        (json!({"num_blocks": 1, "block_size": 512, "blocksize": 1}), "blocksize"),
        (json!({"num_blocks": 1, "block_size": 513}), "block size"),
        (json!([1, 2]), "named parameters"),
    ] {
        let (code, what) = t.refused("bdev_malloc_create", params);
        assert_eq!(code, -32602);
        assert!(what.starts_with("Invalid parameters: ") && what.contains(word), "{what}");
    }
    // unknown and duplicate device
    let (code, what) = t.refused("bdev_get_bdevs", json!({"name": "none"}));
    assert!(code == -19 && what.contains("No such device"), "{code} {what}");
    let (code, what) =
        t.refused("bdev_malloc_create", json!({"name": "M0", "num_blocks": 1, "block_size": 512}));
    assert!(code == -17 && what.contains("File exists"), "{code} {what}");
    // busy
    t.call("bdev_passthru_create", json!({"base_bdev_name": "M0", "name": "P0"}));
    assert_eq!(t.refused("bdev_passthru_create", json!({"base_bdev_name": "M0", "name": "P1"})).0, -16);
    // wrong state
    assert_eq!(t.refused("framework_start_init", Value::Null).0, -1);
    assert_eq!(t.refused("bdev_set_options", json!({"bdev_auto_examine": true})).0, -1);
    // {} and [] to a method without parameters
    for p in [json!({}), json!([])] {
        assert_eq!(t.refused("framework_get_reactors", p).0, -32602);
    }
    assert!(t.call("framework_get_reactors", Value::Null)["reactors"].is_array());
    assert_eq!(t.raw(br#"{"jsonrpc":"1.0","id":1,"method":"spdk_get_version"}"#)[0]["error"]["code"], -32600);
    assert!(t.raw(br#"{"method":"spdk_get_version"}{"id":null,"method":"spdk_get_version"}"#).is_empty());
}

#[test]
fn booleans_that_spdk_rpc_sends_unasked_are_accepted() {
    let t = start();
    let p = json!({"num_blocks": 8, "block_size": 512, "md_interleave": false, "dif_is_head_of_md": false});
    assert_eq!(t.call("bdev_malloc_create", p), "Malloc0");
    assert_eq!(t.call("bdev_malloc_create", json!({"num_blocks": 8, "block_size": 512})), "Malloc1");
    let stat = t.call("bdev_get_iostat", json!({"per_channel": false}));
    assert_eq!(stat["bdevs"].as_array().unwrap().len(), 2);
    assert_eq!(stat["tick_rate"], 1_000_000_000);
    for key in ["bytes_read", "num_write_ops", "unmap_latency_ticks", "max_read_latency_ticks"] {
        assert_eq!(stat["bdevs"][0][key], 0, "{key}");
    }
    let (code, what) =
        t.refused("bdev_malloc_create", json!({"num_blocks": 8, "block_size": 512, "md_size": 8}));
    assert!(code == -32602 && what.contains("md_size"), "{what}");
}

#[test]
fn every_small_device_comes_and_goes() {
    let t = start();
    t.malloc("M0");
    t.malloc("M1");
    let file = t.path("disk");
    std::fs::write(&file, vec![0; 1 << 20]).unwrap();
    assert_eq!(t.call("bdev_uring_create", json!({"name": "U0", "filename": file})), "U0");
    assert_eq!(t.refused("bdev_uring_create", json!({"name": "U1", "filename": t.path("none")})).0, -2);
    t.call("bdev_uring_delete", json!({"name": "U0"}));
    assert_eq!(t.call("bdev_aio_create", json!({"name": "A0", "filename": file, "block_size": 4096})), "A0");
    assert_eq!(
        t.call("bdev_null_create", json!({"name": "N0", "num_blocks": 100, "block_size": 4096})),
        "N0"
    );
    t.call("bdev_null_resize", json!({"name": "N0", "new_size": 2}));
    assert_eq!(t.call("bdev_get_bdevs", json!({"name": "N0"}))[0]["num_blocks"], 512);
    let d = json!({"base_bdev_name": "M0", "name": "D0", "avg_read_latency": 1, "p99_read_latency": 2,
        "avg_write_latency": 3, "p99_write_latency": 4});
    assert_eq!(t.call("bdev_delay_create", d), "D0");
    t.call(
        "bdev_delay_update_latency",
        json!({"delay_bdev_name": "D0", "latency_type": "avg_read", "latency_us": 9}),
    );
    assert_eq!(t.call("bdev_error_create", json!({"base_name": "D0"})), "EE_D0");
    for kind in ["failure", "pending", "nomem"] {
        t.call(
            "bdev_error_inject_error",
            json!({"name": "EE_D0", "io_type": "read", "error_type": kind, "num": 3}),
        );
    }
    let nvme = json!({"name": "EE_D0", "io_type": "all", "error_type": "nvme_failure", "nvme_sct": 2, "nvme_sc": 0x81});
    t.call("bdev_error_inject_error", nvme);
    t.call("bdev_error_inject_error", json!({"name": "EE_D0", "io_type": "clear", "error_type": "failure"}));
    let c = json!({"name": "EE_D0", "io_type": "read", "error_type": "corrupt_data"});
    assert_eq!(t.refused("bdev_error_inject_error", c).0, -32602, "no value to corrupt with");
    assert_eq!(t.call("bdev_passthru_create", json!({"base_bdev_name": "EE_D0", "name": "P0"})), "P0");
    assert_eq!(
        t.call("bdev_split_create", json!({"base_bdev": "M1", "split_count": 2})),
        json!(["M1p0", "M1p1"])
    );
    assert_eq!(t.call("bdev_get_bdevs", json!({"name": "M1"}))[0]["claimed"], true);

    let (code, what) = t.refused("bdev_null_delete", json!({"name": "M0"}));
    assert!(code == -19 && what.contains("No such device"), "of its own kind only: {what}");
    t.call("bdev_split_delete", json!({"base_bdev": "M1"}));
    // Removing the base takes the whole stack along.
    t.call("bdev_malloc_delete", json!({"name": "M0"}));
    let names: Vec<Value> =
        t.call("bdev_get_bdevs", Value::Null).as_array().unwrap().iter().map(|b| b["name"].clone()).collect();
    assert_eq!(names, ["M1", "A0", "N0"]);
    for (m, n) in [("bdev_malloc_delete", "M1"), ("bdev_aio_delete", "A0"), ("bdev_null_delete", "N0")] {
        t.call(m, json!({"name": n}));
    }
    assert_eq!(t.call("bdev_get_bdevs", Value::Null), json!([]));
    let events = t.call("notify_get_notifications", Value::Null);
    assert_eq!(events[0], json!({"type": "bdev_register", "ctx": "M0", "id": 0}));
    let count = |k: &str| events.as_array().unwrap().iter().filter(|e| e["type"] == k).count();
    assert_eq!(count("bdev_register"), count("bdev_unregister"));
}

#[test]
fn before_and_after_initialisation() {
    let t = uninitialised();
    assert_eq!(t.refused("bdev_get_bdevs", Value::Null).0, -1);
    let current = t.call("rpc_get_methods", json!({"current": true}));
    let has = |v: &Value, m: &str| v.as_array().unwrap().contains(&json!(m));
    assert!(has(&current, "framework_start_init") && !has(&current, "bdev_get_bdevs"));
    t.call("bdev_set_options", json!({"bdev_auto_examine": false, "bdev_io_pool_size": 65535}));
    std::thread::scope(|s| {
        let waiting = s.spawn(|| t.call("framework_wait_init", Value::Null));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!waiting.is_finished());
        assert_eq!(t.call("framework_start_init", Value::Null), true);
        assert_eq!(waiting.join().unwrap(), true);
    });
    let current = t.call("rpc_get_methods", json!({"current": true}));
    assert!(!has(&current, "framework_start_init") && has(&current, "bdev_get_bdevs"));
    assert_eq!(t.call("framework_get_reactors", Value::Null)["reactors"][0]["lcore"], 0);
    assert_eq!(t.call("thread_get_stats", Value::Null)["threads"][0]["name"], "app_thread");
    t.call("spdk_kill_instance", json!({"sig_name": "SIGTERM"}));
    assert_eq!(*t.signals.lock().unwrap(), [Signal::Term]);
}

#[test]
fn statistics_histograms_and_limits() {
    let t = start();
    t.malloc("M0");
    assert_eq!(t.refused("bdev_get_histogram", json!({"name": "M0"})).0, -14);
    t.call("bdev_enable_histogram", json!({"name": "M0", "enable": true}));
    let h = t.call("bdev_get_histogram", json!({"name": "M0"}));
    // 32 ranges of 128 counts of 8 bytes, in base64.
    assert_eq!(h["histogram"].as_str().unwrap().len(), (32 * 128 * 8_usize).div_ceil(3) * 4);
    assert_eq!(
        t.call("bdev_get_histogram_borders", json!({"name": "M0", "borders": [1, 10]})),
        json!([0, 0, 0])
    );
    assert_eq!(t.refused("bdev_set_qos_limit", json!({"name": "M0"})).0, -32602);
    t.call("bdev_set_qos_limit", json!({"name": "M0", "rw_ios_per_sec": 2000}));
    t.call("bdev_set_qos_limit", json!({"name": "M0", "w_mbytes_per_sec": 5}));
    let b = t.call("bdev_get_bdevs", json!({"name": "M0"}));
    let want =
        json!({"rw_ios_per_sec": 2000, "rw_mbytes_per_sec": 0, "r_mbytes_per_sec": 0, "w_mbytes_per_sec": 5});
    assert_eq!(b[0]["assigned_rate_limits"], want);
    for mode in ["all", "maxmin", "error", "none"] {
        t.call("bdev_reset_iostat", json!({"mode": mode}));
    }
    assert_eq!(t.refused("bdev_reset_iostat", json!({"name": "none"})).0, -19);
}

#[test]
fn keys_never_come_back_in_the_clear() {
    let t = start();
    let (k, k2) = ("00112233445566778899aabbccddeeff", "ffeeddccbbaa99887766554433221100");
    let p = json!({"cipher": "AES_XTS", "name": "k1", "key": k, "key2": k2});
    assert_eq!(t.call("accel_crypto_key_create", p.clone()), true);
    assert_eq!(t.refused("accel_crypto_key_create", p).0, -17);
    let equal = json!({"cipher": "AES_XTS", "name": "k2", "key": k, "key2": k});
    assert_eq!(t.refused("accel_crypto_key_create", equal).0, -32602);
    let (code, what) =
        t.refused("accel_crypto_key_create", json!({"cipher": "AES_XTS", "name": "k2", "key": "zz"}));
    assert!(code == -32602 && !what.contains("zz"), "{what}");
    let shown = t.call("accel_crypto_keys_get", Value::Null);
    assert_eq!((&shown[0]["name"], &shown[0]["cipher"]), (&json!("k1"), &json!("AES_XTS")));
    let saved = t.call("framework_get_config", json!({"name": "accel"}));
    let file = saved[0]["params"]["key_file"].as_str().unwrap().to_string();
    for text in [shown.to_string(), saved.to_string(), t.call("save_config", Value::Null).to_string()] {
        assert!(!text.contains(k) && !text.contains(k2), "{text}");
    }
    t.call("accel_crypto_key_destroy", json!({"key_name": "k1"}));
    assert_eq!(t.refused("accel_crypto_key_destroy", json!({"key_name": "k1"})).0, -2);
    let again = json!({"subsystems": [{"subsystem": "accel", "config": saved}]});
    t.call("load_config", json!({"config": again}));
    assert_eq!(t.call("accel_crypto_keys_get", json!({"key_name": "k1"}))[0]["key_file"], file);
}

#[test]
fn a_saved_configuration_makes_the_same_again() {
    let saved = {
        let t = start();
        t.malloc("M0");
        t.call("bdev_null_create", json!({"name": "N0", "num_blocks": 100, "block_size": 512}));
        t.call("bdev_passthru_create", json!({"base_bdev_name": "M0", "name": "P0"}));
        t.call("bdev_split_create", json!({"base_bdev": "P0", "split_count": 2}));
        t.call("bdev_set_qos_limit", json!({"name": "N0", "rw_ios_per_sec": 1000}));
        t.call("sock_impl_set_options", json!({"impl_name": "posix", "recv_buf_size": 4096}));
        t.call("save_config", Value::Null)
    };
    let order: Vec<&str> =
        saved["subsystems"].as_array().unwrap().iter().map(|s| s["subsystem"].as_str().unwrap()).collect();
    assert_eq!(order, ["scheduler", "sock", "iobuf", "keyring", "vmd", "accel", "bdev", "nvmf", "nbd"]);
    let t = uninitialised();
    t.call("load_config", json!({"config": saved}));
    assert_eq!(t.call("save_config", Value::Null), saved);
    assert_eq!(t.call("bdev_get_bdevs", Value::Null).as_array().unwrap().len(), 5);
    let file = t.path("saved.json");
    t.call("save_config", json!({"filename": file}));
    let text = std::fs::read_to_string(file).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), saved);
}

#[test]
fn a_wrong_configuration_changes_nothing() {
    let t = start();
    let config = |second: Value| {
        json!({"subsystems": [{"subsystem": "bdev", "config": [
            {"method": "bdev_malloc_create", "params": {"name": "M0", "num_blocks": 8, "block_size": 512}},
            [{"method": "bdev_null_create", "params": second}]
        ]}]})
    };
    let wrong = config(json!({"name": "N0", "num_blocks": 8, "blocksize": 512}));
    let (code, what) = t.refused("load_config", json!({"config": wrong}));
    assert_eq!(code, -32602);
    let place = "subsystem \"bdev\", config[1][0] (bdev_null_create): Invalid parameters: unknown parameter \"blocksize\"";
    assert!(what.contains(place), "{what}");
    assert_eq!(t.call("bdev_get_bdevs", Value::Null), json!([]));
    t.call(
        "load_config",
        json!({"config": config(json!({"name": "N0", "num_blocks": 8, "block_size": 512}))}),
    );
    assert_eq!(t.call("bdev_get_bdevs", Value::Null).as_array().unwrap().len(), 2);
}

#[test]
fn log_levels_and_flags() {
    let t = start();
    t.call("log_set_level", json!({"level": "DEBUG"}));
    assert_eq!(t.call("log_get_level", Value::Null), "DEBUG");
    t.call("log_set_flag", json!({"flag": "nvmf"}));
    assert_eq!(t.call("log_get_flags", Value::Null)["nvmf"], true);
    t.call("log_clear_flag", json!({"flag": "all"}));
    assert_eq!(t.call("log_get_flags", Value::Null)["nvmf"], false);
    assert_eq!(t.refused("log_set_flag", json!({"flag": "nothing"})).0, -32602);
    assert_eq!(t.refused("log_set_level", json!({"level": "LOUD"})).0, -32602);
}

#[test]
fn subsystems_namespaces_listeners_and_hosts() {
    let t = start();
    t.malloc("M0");
    t.malloc("M1");
    let nqn = "nqn.2026-01.io.cryptfold:t";
    assert_eq!(t.call("nvmf_get_subsystems", Value::Null)[0]["nqn"], "nqn.2014-08.org.nvmexpress.discovery");
    // What spdk-rpc sends for `nvmf_create_transport -t TCP`.
    let p = json!({"trtype": "TCP", "zcopy": false, "no_srq": false, "c2h_success": true, "dif_insert_or_strip": false,
        "no_wr_batching": false, "disable_mappable_bar0": false, "disable_adaptive_irq": false,
        "disable_shadow_doorbells": false, "disable_command_passthru": false});
    t.call("nvmf_create_transport", p.clone());
    let (code, what) = t.refused("nvmf_create_transport", p);
    assert_eq!((code, what.as_str()), (-32603, "Transport type 'TCP' already exists"));
    assert_eq!(
        t.refused("nvmf_create_transport", json!({"trtype": "TCP", "masked_oncs": ["reservs"]})).0,
        -32602
    );
    let transport = &t.call("nvmf_get_transports", json!({"trtype": "tcp"}))[0];
    for (key, value) in [
        ("max_queue_depth", 128),
        ("max_io_qpairs_per_ctrlr", 127),
        ("in_capsule_data_size", 4096),
        ("max_io_size", 131_072),
        ("max_aq_depth", 128),
    ] {
        assert_eq!(transport[key], value, "{key}");
    }
    let p = json!({"nqn": nqn, "serial_number": "S1", "allow_any_host": false, "ana_reporting": true,
        "passthrough": false, "enable_nssr": false});
    t.call("nvmf_create_subsystem", p);
    let (code, what) = t.refused("nvmf_create_subsystem", json!({"nqn": nqn}));
    assert!(code == -32602 && what.contains("already exists"), "{what}");
    let ns = |bdev: &str| json!({"nqn": nqn, "namespace": {"bdev_name": bdev, "no_auto_visible": false}});
    assert_eq!(t.call("nvmf_subsystem_add_ns", ns("M0")), 1);
    let guid = json!({"nqn": nqn, "namespace": {"bdev_name": "M1", "nsid": 7, "eui64": "0102030405060708",
        "nguid": "00112233445566778899AABBCCDDEEFF", "uuid": "a0a1a2a3-a4a5-a6a7-a8a9-aaabacadaeaf"}});
    assert_eq!(t.call("nvmf_subsystem_add_ns", guid), 7);
    t.malloc("M2");
    let hidden = json!({"nqn": nqn, "namespace": {"bdev_name": "M2", "nsid": 9, "no_auto_visible": true}});
    assert_eq!(t.call("nvmf_subsystem_add_ns", hidden), 9);
    let seen = |nsid: u32| json!({"nqn": nqn, "nsid": nsid, "host": "nqn.2026-01.io.cryptfold:host"});
    t.call("nvmf_ns_add_host", seen(9));
    assert_eq!(t.refused("nvmf_ns_add_host", seen(7)).0, -32602, "visible to all");
    assert!(t.refused("nvmf_ns_remove_host", seen(8)).1.contains("not found"));
    let (code, what) = t.refused(
        "nvmf_subsystem_add_ns",
        json!({"nqn": "nqn.2026-01.io.cryptfold:no",
        "namespace": {"bdev_name": "M0"}}),
    );
    assert!(code == -32602 && what.contains("not found"), "{code} {what}");
    assert_eq!(t.refused("nvmf_subsystem_add_ns", ns("M0")).0, -16, "claimed");
    assert_eq!(t.refused("nvmf_subsystem_add_ns", ns("none")).0, -19);
    assert_eq!(t.refused("bdev_passthru_create", json!({"base_bdev_name": "M0", "name": "P"})).0, -16);
    let addr = json!({"trtype": "TCP", "adrfam": "ipv4", "traddr": "127.0.0.1", "trsvcid": "0"});
    t.call(
        "nvmf_subsystem_add_listener",
        json!({"nqn": nqn, "listen_address": addr, "secure_channel": false}),
    );
    let addr = t.call("nvmf_subsystem_get_listeners", json!({"nqn": nqn}))[0]["address"].clone();
    assert_ne!(addr["trsvcid"], "0");
    let listener = json!({"nqn": nqn, "listen_address": addr});
    assert!(t.refused("nvmf_subsystem_add_listener", listener.clone()).1.contains("already exists"));
    t.call(
        "nvmf_subsystem_listener_set_ana_state",
        json!({"nqn": nqn, "listen_address": addr, "ana_state": "inaccessible", "anagrpid": 1}),
    );
    t.call("nvmf_subsystem_set_ns_ana_group", json!({"nqn": nqn, "nsid": 7, "anagrpid": 2}));
    let wrong = json!({"nqn": nqn, "nsid": 7, "anagrpid": 99});
    assert!(t.refused("nvmf_subsystem_set_ns_ana_group", wrong).1.contains("anagrpid"));
    let host = json!({"nqn": nqn, "host": "nqn.2026-01.io.cryptfold:host"});
    t.call("nvmf_subsystem_add_host", host.clone());
    t.call("nvmf_set_crdt", json!({"crdt1": 3}));
    let there = json!({"trtype": "tcp", "adrfam": "ipv4", "traddr": "192.0.2.7", "trsvcid": "8009"});
    let referral = json!({"address": there, "secure_channel": false});
    t.call("nvmf_discovery_add_referral", referral.clone());
    assert!(t.refused("nvmf_discovery_add_referral", referral.clone()).1.contains("already exists"));
    t.call(
        "nvmf_discovery_add_referral",
        json!({"address": there, "subnqn": "nqn.2026-01.io.cryptfold:cdc"}),
    );
    let named = t.call("nvmf_discovery_get_referrals", Value::Null);
    assert_eq!(named[0]["subnqn"], "nqn.2014-08.org.nvmexpress.discovery");
    assert_eq!(
        (&named[0]["address"]["traddr"], &named[1]["subnqn"]),
        (&json!("192.0.2.7"), &json!("nqn.2026-01.io.cryptfold:cdc"))
    );

    let all = t.call("nvmf_get_subsystems", json!({"tgt_name": "nvmf_tgt"}));
    let s = &all[1];
    assert_eq!((&s["subtype"], &s["serial_number"]), (&json!("NVMe"), &json!("S1")));
    assert_eq!(s["listen_addresses"][0], addr);
    assert_eq!(s["hosts"], json!([{"nqn": "nqn.2026-01.io.cryptfold:host"}]));
    assert_eq!(s["namespaces"][1]["nguid"], "00112233445566778899AABBCCDDEEFF");
    assert_eq!(t.refused("nvmf_get_subsystems", json!({"tgt_name": "other"})).0, -32602);
    assert_eq!(t.call("nvmf_get_stats", Value::Null)["poll_groups"][0]["current_io_qpairs"], 0);
    assert_eq!(t.call("nvmf_subsystem_get_controllers", json!({"nqn": nqn})), json!([]));
    assert_eq!(t.call("nvmf_subsystem_get_qpairs", json!({"nqn": nqn})), json!([]));

    // The same again from what was saved.
    let saved = t.call("save_config", Value::Null);
    drop(t);
    let t = uninitialised();
    t.call("load_config", json!({"config": saved}));
    assert_eq!(t.call("save_config", Value::Null), saved);
    assert_eq!(&t.call("nvmf_get_subsystems", Value::Null), &all);

    t.call("nvmf_discovery_remove_referral", referral.clone());
    assert!(t.refused("nvmf_discovery_remove_referral", referral).1.contains("not found"));
    assert_eq!(t.call("nvmf_discovery_get_referrals", Value::Null).as_array().map(Vec::len), Some(1));
    t.call("nvmf_subsystem_remove_host", host);
    t.call("nvmf_subsystem_remove_listener", listener);
    t.call("nvmf_subsystem_remove_ns", json!({"nqn": nqn, "nsid": 7}));
    t.call("nvmf_ns_remove_host", seen(9));
    assert_eq!(t.call("nvmf_get_subsystems", json!({"nqn": nqn}))[0]["namespaces"][1]["hosts"], json!([]));
    t.call("nvmf_subsystem_remove_ns", json!({"nqn": nqn, "nsid": 9}));
    t.call("bdev_malloc_delete", json!({"name": "M0"}));
    assert_eq!(t.call("nvmf_get_subsystems", json!({"nqn": nqn}))[0]["namespaces"], json!([]), "hot-removed");
    t.call("nvmf_delete_subsystem", json!({"nqn": nqn}));
    assert!(t.refused("nvmf_delete_subsystem", json!({"nqn": nqn})).1.contains("not found"));
}

/// Keys by name: files of the right mode, references in what is shown and saved, never what is in them.
#[test]
fn hosts_with_keys() {
    let t = uninitialised();
    let nqn = "nqn.2026-01.io.cryptfold:s1";
    let key = |name: &str, text: &str, mode: u32| {
        let path = t.path(name);
        std::fs::write(&path, format!("{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        json!({"name": name, "path": path})
    };
    let text = "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";
    t.call("keyring_file_add_key", key("k1", text, 0o600));
    t.call("keyring_file_add_key", key("k2", text, 0o400));
    t.call("keyring_file_add_key", key("bad", &text.replace("iaR", "iaQ"), 0o600));
    assert_eq!(t.refused("keyring_file_add_key", key("open", text, 0o640)).0, -13);
    assert_eq!(t.refused("keyring_file_add_key", json!({"name": "k1", "path": t.path("k1")})).0, -17);
    assert_eq!(t.refused("keyring_file_add_key", json!({"name": "r", "path": "k1"})).0, -32602);
    assert_eq!(t.refused("keyring_file_add_key", json!({"name": "none", "path": t.path("none")})).0, -2);
    t.call(
        "nvmf_set_config",
        json!({"dhchap_digests": ["sha384"], "dhchap_dhgroups": ["null", "ffdhe3072"]}),
    );
    assert_eq!(t.refused("nvmf_set_config", json!({"dhchap_digests": ["md5"]})).0, -32602);
    t.call("framework_start_init", Value::Null);
    t.call("nvmf_create_subsystem", json!({"nqn": nqn}));
    let host = |name: &str, key: &str, ctrlr: Value| {
        json!({"nqn": nqn, "host": format!("nqn.2026-01.io.cryptfold:{name}"), "dhchap_key": key,
            "dhchap_ctrlr_key": ctrlr})
    };
    t.call("nvmf_subsystem_add_host", host("h1", "k1", json!("k2")));
    t.call("nvmf_subsystem_add_host", host("h2", "k1", Value::Null));
    assert_eq!(t.refused("nvmf_subsystem_add_host", host("h3", "none", Value::Null)).0, -2);
    let (code, what) = t.refused("nvmf_subsystem_add_host", host("h3", "bad", Value::Null));
    assert!(code == -32602 && what.contains("CRC") && !what.contains("AAEC"), "{what}");
    let alone = json!({"nqn": nqn, "host": "nqn.2026-01.io.cryptfold:h3", "dhchap_ctrlr_key": "k2"});
    assert!(t.refused("nvmf_subsystem_add_host", alone).1.contains("dhchap_key"));
    t.call("nvmf_subsystem_set_keys", host("h2", "k2", Value::Null));
    assert_eq!(t.refused("nvmf_subsystem_set_keys", host("h3", "k2", Value::Null)).0, -32602);
    let shown = t.call("nvmf_get_subsystems", json!({"nqn": nqn}));
    let hosts = json!([
        {"nqn": "nqn.2026-01.io.cryptfold:h1", "dhchap_key": "k1", "dhchap_ctrlr_key": "k2"},
        {"nqn": "nqn.2026-01.io.cryptfold:h2", "dhchap_key": "k2"}]);
    assert_eq!(shown[0]["hosts"], hosts);
    let keys = t.call("keyring_get_keys", Value::Null);
    assert_eq!((&keys[1]["name"], &keys[1]["refcnt"]), (&json!("k2"), &json!(3)));
    t.call("keyring_file_remove_key", json!({"name": "bad"}));
    assert_eq!(t.refused("keyring_file_remove_key", json!({"name": "bad"})).0, -2);
    let saved = t.call("save_config", Value::Null);
    assert!(!saved.to_string().contains("AAECAw"), "references only");
    assert!(!keys.to_string().contains("AAECAw"));
    let again = uninitialised();
    again.call("load_config", json!({"config": saved}));
    assert_eq!(again.call("save_config", Value::Null), saved);
    assert_eq!(again.call("nvmf_get_subsystems", json!({"nqn": nqn}))[0]["hosts"], hosts);
}

#[test]
fn hosts_with_tls_keys() {
    let t = start();
    let (nqn, h1) = ("nqn.2026-01.io.cryptfold:s1", "nqn.2026-01.io.cryptfold:h1");
    let text = "NVMeTLSkey-1:01:VRLbtnN9AQb2WXW3c9+wEf/DRLz0QuLdbYvEhwtdWwNf9LrZ:";
    for (name, text) in [("k", text.to_owned()), ("bad", text.replace(":01:", ":02:"))] {
        let path = t.path(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        t.call("keyring_file_add_key", json!({"name": name, "path": path}));
    }
    t.call("nvmf_create_transport", json!({"trtype": "TCP"}));
    t.call("nvmf_create_subsystem", json!({"nqn": nqn}));
    let bad = json!({"nqn": nqn, "host": h1, "psk": "bad"});
    let (code, what) = t.refused("nvmf_subsystem_add_host", bad);
    assert!(code == -32602 && what.contains("32 bytes") && !what.contains("VRLb"), "{what}");
    assert_eq!(t.refused("nvmf_subsystem_add_host", json!({"nqn": nqn, "host": h1, "psk": "none"})).0, -2);
    t.call("nvmf_subsystem_add_host", json!({"nqn": nqn, "host": h1, "psk": "k"}));
    t.call("nvmf_subsystem_add_host", json!({"nqn": "discovery", "host": h1, "psk": "k"}));
    let addr =
        |port: &str| json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port});
    t.call(
        "nvmf_subsystem_add_listener",
        json!({"nqn": nqn, "listen_address": addr("0"), "secure_channel": true}),
    );
    let listener = &t.call("nvmf_subsystem_get_listeners", json!({"nqn": nqn}))[0];
    assert_eq!(listener["secure_channel"], true);
    let both = json!({"nqn": nqn, "listen_address": addr("0"), "secure_channel": true, "secure_concatenation": true});
    assert!(t.refused("nvmf_subsystem_add_listener", both).1.contains("choose one"));
    let same = json!({"nqn": "discovery", "listen_address": listener["address"]});
    assert!(t.refused("nvmf_subsystem_add_listener", same).1.contains("secure_channel"));
    let hosts = json!([{"nqn": h1, "psk": "k"}]);
    assert_eq!(t.call("nvmf_get_subsystems", json!({"nqn": nqn}))[0]["hosts"], hosts);
    assert_eq!(t.call("keyring_get_keys", Value::Null)[0]["refcnt"], 3);
    let saved = t.call("save_config", Value::Null);
    assert!(!saved.to_string().contains("VRLb"), "references only");
    t.call("nvmf_subsystem_remove_listener", json!({"nqn": nqn, "listen_address": listener["address"]}));
    let again = uninitialised();
    again.call("load_config", json!({"config": saved}));
    assert_eq!(again.call("save_config", Value::Null), saved);
    again.call("nvmf_subsystem_remove_host", json!({"nqn": "discovery", "host": h1}));
}

#[test]
fn crypto_devices() {
    let t = start();
    t.malloc("M0");
    t.malloc("M1");
    let (k, k2) = ("00".repeat(31) + "01", "02".repeat(32));
    t.call("accel_crypto_key_create", json!({"cipher": "AES_XTS", "name": "k", "key": k, "key2": k2}));
    let crypto = json!({"base_bdev_name": "M0", "name": "C0", "key_name": "k"});
    assert_eq!(t.call("bdev_crypto_create", crypto), "C0");
    assert_eq!(t.refused("accel_crypto_key_destroy", json!({"key_name": "k"})).0, -16);
    let (code, what) =
        t.refused("bdev_crypto_create", json!({"base_bdev_name": "M1", "name": "C1", "key": "c0ffee"}));
    assert!(code == -32602 && what.contains("accel_crypto_key_create") && !what.contains("c0ffee"), "{what}");
    assert_eq!(
        t.refused("bdev_crypto_create", json!({"base_bdev_name": "M1", "name": "C1", "key_name": "no"})).0,
        -2
    );
    let file = t.path("host.key");
    std::fs::write(&file, [[1u8; 32], [2u8; 32]].concat()).unwrap();
    let host = json!({"base_bdev_name": "M1", "name": "H1", "key_file": file, "sector_size": 4096});
    assert_eq!(t.refused("bdev_hostcrypt_create", host.clone()).0, -13, "mode 0644");
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(t.call("bdev_hostcrypt_create", host), "H1");
    let saved = t.call("framework_get_config", json!({"name": "bdev"}));
    let at = |m: &str| saved.as_array().unwrap().iter().find(|c| c["method"] == m).unwrap()["params"].clone();
    assert_eq!(at("bdev_crypto_create")["key_name"], "k");
    assert_eq!(at("bdev_hostcrypt_create")["key_file"], json!(file));
    t.call("bdev_crypto_delete", json!({"name": "C0"}));
    t.call("bdev_hostcrypt_delete", json!({"name": "H1"}));
    t.call("accel_crypto_key_destroy", json!({"key_name": "k"}));
}

/// What SPDK's own saved configurations contain loads, also where there is nothing to set here.
#[test]
fn a_configuration_that_spdk_saved() {
    let text = r#"{"subsystems": [
      {"subsystem": "scheduler", "config": [{"method": "framework_set_scheduler", "params": {"name": "static"}}]},
      {"subsystem": "sock", "config": [
        {"method": "sock_set_default_impl", "params": {"impl_name": "posix"}},
        {"method": "sock_impl_set_options", "params": {"impl_name": "ssl", "recv_buf_size": 4096, "send_buf_size": 4096,
          "enable_recv_pipe": true, "enable_quickack": false, "enable_placement_id": 0, "zerocopy_threshold": 0,
          "enable_zerocopy_send_server": true, "enable_zerocopy_send_client": false, "tls_version": 0,
          "enable_ktls": false}}]},
      {"subsystem": "iobuf", "config": [{"method": "iobuf_set_options", "params": {"small_pool_count": 256,
          "large_pool_count": 16, "small_bufsize": 8192, "large_bufsize": 135168, "enable_numa": false}}]},
      {"subsystem": "keyring", "config": []}, {"subsystem": "vmd", "config": []},
      {"subsystem": "accel", "config": [{"method": "accel_set_options", "params": {"small_cache_size": 128}}]},
      {"subsystem": "bdev", "config": [
        {"method": "bdev_set_options", "params": {"bdev_io_pool_size": 65535, "bdev_io_cache_size": 256,
          "bdev_auto_examine": true, "iobuf_small_cache_size": 128, "iobuf_large_cache_size": 16}},
        {"method": "bdev_nvme_set_options", "params": {"action_on_timeout": "none", "dhchap_digests": ["sha256"]}},
        {"method": "bdev_nvme_set_hotplug", "params": {"period_us": 100000, "enable": false}},
        {"method": "bdev_wait_for_examine"}]},
      {"subsystem": "nvmf", "config": [
        {"method": "nvmf_set_config", "params": {"discovery_filter": "match_any",
          "admin_cmd_passthru": {"identify_ctrlr": false}, "dhchap_digests": ["sha256"], "dhchap_dhgroups": ["null"]}},
        {"method": "nvmf_set_max_subsystems", "params": {"max_subsystems": 1024}},
        {"method": "nvmf_set_crdt", "params": {"crdt1": 0, "crdt2": 0, "crdt3": 0}}]},
      {"subsystem": "nbd", "config": []}]}"#;
    let t = uninitialised();
    t.call("load_config", json!({"config": serde_json::from_str::<Value>(text).unwrap()}));
    assert_eq!(t.call("sock_impl_get_options", json!({"impl_name": "ssl"}))["recv_buf_size"], 4096);
    // The kernel's record layer for TLS: only where somebody says so, as with SPDK.
    let ktls = |name| t.call("sock_impl_get_options", json!({"impl_name": name}))["enable_ktls"].clone();
    assert_eq!((ktls("ssl"), ktls("posix")), (json!(false), json!(false)));
    t.call("sock_impl_set_options", json!({"impl_name": "ssl", "enable_ktls": true}));
    assert_eq!(ktls("ssl"), true);
    assert_eq!(t.call("sock_get_default_impl", Value::Null)["impl_name"], "posix");
}

/// `cryptfold rpc --doc` writes the file that this test compares.
#[test]
fn the_documentation_is_up_to_date() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/rpc.md");
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    let now = Control::new(ControlConfig::default()).table().markdown();
    assert!(there == now, "docs/rpc.md is old; run: cargo run -p cryptfold -- rpc --doc > docs/rpc.md");
}

fn disk(t: &Target, name: &str, mib: u64) -> PathBuf {
    let path = t.path(name);
    std::fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    path
}

#[test]
fn pools_and_volumes() {
    let t = start();
    let file = disk(&t, "disk", 128);
    t.call("bdev_uring_create", json!({"name": "u0", "filename": file, "block_size": 4096}));
    let budget = json!({"bdev_name": "u0", "lvs_name": "p", "memory_budget_mib": 32});
    let pool = t.call("bdev_lvol_create_lvstore", budget);
    let (code, what) = t.refused("bdev_lvol_create_lvstore", json!({"bdev_name": "u0", "lvs_name": "p"}));
    assert!(code == -17 && what.contains("File exists"), "{what}");
    let again = json!({"bdev_name": "u0", "lvs_name": "p", "exist_ok": true});
    assert_eq!(t.call("bdev_lvol_create_lvstore", again), pool);
    assert_eq!(t.refused("bdev_lvol_create_lvstore", json!({"bdev_name": "none", "lvs_name": "q"})).0, -19);

    let one = t.call("bdev_lvol_create", json!({"lvs_name": "p", "lvol_name": "one", "size_in_mib": 64}));
    // Older clients send bytes and the store's UUID.
    let old = json!({"uuid": pool, "lvol_name": "two", "size": 32 << 20, "domain": "tenant", "thin_provision": true});
    let two = t.call("bdev_lvol_create", old);
    let (code, what) = t.refused("bdev_lvol_create", json!({"lvs_name": "p", "lvol_name": "x"}));
    assert!(code == -32602 && what.contains("size_in_mib"), "{what}");
    assert_eq!(
        t.refused("bdev_lvol_create", json!({"lvs_name": "q", "lvol_name": "x", "size_in_mib": 1})).0,
        -19
    );
    assert_eq!(
        t.refused("bdev_lvol_create", json!({"lvs_name": "p", "lvol_name": "one", "size_in_mib": 1})).0,
        -17
    );
    let by_alias = t.call("bdev_get_bdevs", json!({"name": "p/one"}));
    assert_eq!((&by_alias[0]["name"], &by_alias[0]["uuid"]), (&one, &one));
    assert_eq!(by_alias[0]["aliases"], json!(["p/one"]));
    assert_eq!(by_alias[0]["product_name"], "Logical Volume");
    let volumes = t.call("bdev_lvol_get_lvols", json!({"lvs_name": "p"}));
    assert_eq!(volumes[1]["uuid"], two);
    assert_eq!((&volumes[1]["domain"], &volumes[1]["size_bytes"]), (&json!("tenant"), &json!(32 << 20)));
    assert_eq!(volumes[1]["lvs"], json!({"name": "p", "uuid": pool}));
    let domains = t.call("cryptfold_pool_get_domains", json!({"lvs_name": "p"}));
    assert_eq!(domains.as_array().unwrap().len(), 2);
    t.call("bdev_lvol_resize", json!({"name": "p/two", "size_in_mib": 48}));
    t.call("bdev_lvol_rename", json!({"old_name": two, "new_name": "deux"}));
    assert_eq!(t.call("bdev_get_bdevs", json!({"name": "p/deux"}))[0]["num_blocks"], 48 * 256);
    let report = t.call("cryptfold_pool_check", json!({"lvs_name": "p", "data": true}));
    assert_eq!((&report["clean"], &report["problems"]), (&json!(true), &json!([])));

    let store = &t.call("bdev_lvol_get_lvstores", json!({"uuid": pool}))[0];
    let key = store["key_file"].as_str().unwrap().to_string();
    assert!(key.ends_with("/keys/p.key"), "{key}");
    for k in ["free_clusters", "cluster_size", "total_data_clusters", "free_bytes"] {
        assert!(store[k].as_u64().unwrap() > 0, "{k}");
    }
    assert_eq!(t.refused("bdev_lvol_get_lvstores", json!({"lvs_name": "q"})).0, -19);
    let saved = t.call("save_config", Value::Null);

    // The same process again: closed, found by examining, closed, refused with another key.
    t.call("cryptfold_pool_close", json!({"lvs_name": "p"}));
    assert_eq!(t.refused("bdev_get_bdevs", json!({"name": "p/one"})).0, -19);
    t.call("bdev_examine", json!({"name": "u0"}));
    assert_eq!(t.call("bdev_get_bdevs", json!({"name": "p/one"}))[0]["uuid"], one);
    t.call("cryptfold_pool_close", json!({"lvs_name": "p"}));
    let other = t.path("other.key");
    std::fs::write(&other, [7, 8].repeat(16)).unwrap();
    std::fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let (code, what) = t.refused("cryptfold_pool_open", json!({"base_bdev_name": "u0", "key_file": other}));
    assert!(code == -126 && what.contains("does not fit"), "{code} {what}");
    assert_eq!(
        t.refused("cryptfold_pool_open", json!({"base_bdev_name": "u0", "key_file": t.path("no")})).0,
        -2
    );
    // Another pool may not take the device unless it is told to.
    let (code, what) = t.refused("bdev_lvol_create_lvstore", json!({"bdev_name": "u0", "lvs_name": "q"}));
    assert!(code == -17 && what.contains("force"), "{what}");
    assert!(!t.path("keys/q.key").exists(), "no key is left behind");

    // A new process with the saved configuration.
    t.control.shutdown().unwrap();
    let t2 = uninitialised();
    t2.call("load_config", json!({"config": saved}));
    assert_eq!(t2.call("save_config", Value::Null), saved);
    assert_eq!(t2.call("bdev_lvol_get_lvstores", Value::Null)[0]["memory_budget_bytes"], 32 << 20);
    assert_eq!(t2.call("bdev_get_bdevs", json!({"name": "p/one"}))[0]["uuid"], one);
    t2.call("bdev_lvol_delete", json!({"name": "p/one"}));
    assert_eq!(t2.refused("bdev_lvol_delete", json!({"name": "p/one"})).0, -19);
    t2.call("bdev_lvol_delete_lvstore", json!({"lvs_name": "p"}));
    assert_eq!(t2.call("bdev_lvol_get_lvstores", Value::Null), json!([]));
    t2.call("bdev_lvol_create_lvstore", json!({"bdev_name": "u0", "lvs_name": "q", "encrypt": false}));
}

#[test]
fn what_people_see_is_what_the_methods_say() {
    let early = uninitialised();
    let starting = early.call("cryptfold_get_overview", Value::Null);
    assert_eq!(
        (&starting["state"], &starting["problems"]),
        (&json!("starting"), &json!(["not initialised"]))
    );
    drop(early);

    let t = start();
    let file = disk(&t, "disk", 128);
    t.call("bdev_uring_create", json!({"name": "u0", "filename": file, "block_size": 4096}));
    t.call("bdev_lvol_create_lvstore", json!({"bdev_name": "u0", "lvs_name": "p", "memory_budget_mib": 32}));
    let v = t.call(
        "bdev_lvol_create",
        json!({"lvs_name": "p", "lvol_name": "v", "size_in_mib": 16, "domain": "d"}),
    );
    t.call("bdev_passthru_create", json!({"base_bdev_name": "p/v", "name": "top"}));
    t.call("nvmf_create_transport", json!({"trtype": "TCP"}));
    let nqn = "nqn.2026-01.io.cryptfold:s";
    t.call("nvmf_create_subsystem", json!({"nqn": nqn, "allow_any_host": true}));
    t.call("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": {"bdev_name": "top", "nsid": 5}}));

    let seen = t.call("cryptfold_get_overview", Value::Null);
    assert_eq!((&seen["state"], &seen["problems"]), (&json!("running"), &json!([])));
    let store = &t.call("bdev_lvol_get_lvstores", Value::Null)[0];
    let pool = &seen["pools"][0];
    for member in
        ["name", "uuid", "base_bdev", "size_bytes", "free_bytes", "logical_bytes", "memory_budget_bytes"]
    {
        assert_eq!(pool[member], store[member], "{member}");
    }
    assert_eq!((&seen["space"]["size_bytes"], &pool["state"]), (&store["size_bytes"], &json!("online")));
    let encryption = &t.call("cryptfold_encryption_status", Value::Null)["pools"][0];
    assert_eq!(
        (&pool["encryption"]["state"], &encryption["state"]),
        (&json!("unlocked"), &json!("unlocked"))
    );
    assert_eq!(pool["encryption"]["slots"][0]["kind"], encryption["slots"][0]["kind"]);
    let states: Vec<&Value> = pool["domains"].as_array().unwrap().iter().map(|d| &d["state"]).collect();
    assert_eq!(states, [&json!("encrypted"); 2]);
    let volume = &seen["volumes"][0];
    assert_eq!((&volume["name"], &volume["uuid"], &volume["domain"]), (&json!("v"), &v, &json!("d")));
    assert_eq!((&volume["bdev"], &volume["exported"]), (&json!("top"), &json!([format!("{nqn}/5")])));
    let names: Vec<&Value> = seen["devices"].as_array().unwrap().iter().map(|d| &d["name"]).collect();
    assert_eq!(names, ["u0", "top"]);
    assert_eq!((&seen["devices"][1]["base"], &seen["devices"][0]["size_bytes"]), (&v, &json!(128 << 20)));
    // The pool has written to its device since it was made: that is known without switching anything on.
    let disk = t.control.look().sample.devices.iter().find(|d| d.name == "u0").cloned().unwrap();
    let write = cryptfold_bdev::Class::Write as usize;
    assert!(disk.totals[write].ops > 0 && disk.latencies[write].count() > 0, "{disk:?}");
    let history = t.call("cryptfold_get_history", Value::Null);
    assert_eq!(history["rings"].as_array().unwrap().len(), 3);
    // Nor where keys and disks lie.
    let text = seen.to_string();
    assert!(!text.contains(t.dir.path().to_str().unwrap()), "{text}");
}

#[test]
fn devices_that_are_no_good_for_pools() {
    let t = start();
    t.call("bdev_malloc_create", json!({"name": "small", "num_blocks": 256, "block_size": 4096}));
    let (code, what) = t.refused("bdev_lvol_create_lvstore", json!({"bdev_name": "small", "lvs_name": "p"}));
    assert!(code == -28 && what.contains("small") && what.contains("at least"), "{code} {what}");
    assert!(what.contains("No space left on device"), "clients look for these words: {what}");
    assert!(!t.path("keys").join("p.key").exists());
    let file = disk(&t, "ext4", 64);
    let mut superblock = vec![0; 1080];
    // ext4's magic number, at 1024 + 56.
    superblock.extend([0x53, 0xef]);
    superblock.resize(4096, 0);
    let f = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    std::os::unix::fs::FileExt::write_at(&f, &superblock, 0).unwrap();
    t.call("bdev_uring_create", json!({"name": "u0", "filename": file, "block_size": 4096}));
    let (code, what) = t.refused("bdev_lvol_create_lvstore", json!({"bdev_name": "u0", "lvs_name": "p"}));
    assert!(code == -17 && what.contains("ext") && what.contains("force"), "{what}");
    let mut now = vec![0; 4096];
    std::os::unix::fs::FileExt::read_at(&std::fs::File::open(&file).unwrap(), &mut now, 0).unwrap();
    assert_eq!(now, superblock, "nothing was written");
    t.call("bdev_lvol_create_lvstore", json!({"bdev_name": "u0", "lvs_name": "p", "force": true}));
    let (code, what) = t.refused("cryptfold_pool_open", json!({"base_bdev_name": "small"}));
    assert!(code == -19 && what.contains("no pool"), "{what}");
}

/// What the mode refuses before anything is asked of the module.
#[test]
fn validated_refuses_what_the_module_can_not_do() {
    let t = in_mode(FipsMode::Validated);
    let kernel = |on: bool| json!({"impl_name": "ssl", "enable_ktls": on});
    let (code, why) = t.refused("sock_impl_set_options", kernel(true));
    assert!(code == -32602 && why.contains("enable_ktls") && why.contains("outside of the module"), "{why}");
    t.call("sock_impl_set_options", kernel(false));
    t.control.initialize().unwrap();
    t.refused("sock_impl_set_options", kernel(true));
    let nqn = "nqn.2026-01.io.example:s1";
    t.call("nvmf_create_transport", json!({"trtype": "TCP"}));
    t.call("nvmf_create_subsystem", json!({"nqn": nqn}));
    let address = json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": "0"});
    let listener = json!({"nqn": nqn, "listen_address": address, "secure_concatenation": true});
    let attachment = json!({"name": "n", "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": "1",
        "subnqn": nqn, "secure_concatenation": true});
    for (method, params) in
        [("nvmf_subsystem_add_listener", listener), ("bdev_nvme_attach_controller", attachment)]
    {
        let (code, why) = t.refused(method, params);
        assert!(code == -32602 && why.contains("secure_concatenation") && why.contains("validated"), "{why}");
    }
    let shown = t.call("nvmf_get_subsystems", json!({"nqn": nqn}));
    assert_eq!(shown[0]["listen_addresses"], json!([]));
}
