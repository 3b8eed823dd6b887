//! `bdev_nvme_*` over NVMe/TCP: two control planes in this process, one with the disks, one with a pool and a cipher over them.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cryptfold_bdev::Access;
use cryptfold_control::jsonrpc::Handler;
use cryptfold_control::{Control, ControlConfig};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{IdlePolicy, MemoryConfig};
use serde_json::{Value, json};

const NQN: &str = "nqn.2026-01.io.cryptfold:far";
const SECRET: &str = "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";
const PSK: &str = "NVMeTLSkey-1:01:VRLbtnN9AQb2WXW3c9+wEf/DRLz0QuLdbYvEhwtdWwNf9LrZ:";
const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0a12";

/// Ends in order when dropped.
struct Plane(Arc<Control>);

impl Drop for Plane {
    fn drop(&mut self) {
        let ended = self.0.shutdown();
        if !std::thread::panicking() {
            ended.expect("ends in order");
        }
    }
}

impl Plane {
    fn new(dir: &Path) -> Plane {
        let control = Control::new(ControlConfig {
            idle: IdlePolicy::Interrupt,
            pin: false,
            memory: MemoryConfig { hugepages: false, arena_bytes: 8 << 20, fixed_buffers: false },
            key_dir: dir.join("keys"),
            ..ControlConfig::default()
        });
        control.initialize().expect("reactors start");
        Plane(control)
    }

    fn call(&self, method: &str, params: Value) -> Value {
        self.0.call(method, Some(&params)).unwrap_or_else(|e| panic!("{method}: {e}"))
    }

    fn plain(&self, method: &str) -> Value {
        self.0.call(method, None).unwrap_or_else(|e| panic!("{method}: {e}"))
    }

    fn refused(&self, method: &str, params: Value) -> (i64, String) {
        let e = self.0.call(method, Some(&params)).expect_err(method);
        (e.code, e.message)
    }

    fn state(&self, path: usize) -> Value {
        self.plain("bdev_nvme_get_controllers")[0]["ctrlrs"][path]["state"].take()
    }
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "not within 60 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn key(plane: &Plane, dir: &Path, name: &str, text: &str) {
    let path = dir.join(name);
    std::fs::write(&path, text).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("owned");
    plane.call("keyring_file_add_key", json!({"name": name, "path": path}));
}

/// Two RAM disks behind two ports with TLS, for one host with keys; the listeners.
fn far(dir: &Path) -> (Plane, Vec<Value>) {
    let far = Plane::new(dir);
    key(&far, dir, "secret", SECRET);
    key(&far, dir, "psk", PSK);
    far.call("nvmf_create_transport", json!({"trtype": "TCP"}));
    far.call("nvmf_create_subsystem", json!({"nqn": NQN}));
    far.call(
        "nvmf_subsystem_add_host",
        json!({"nqn": NQN, "host": HOST, "dhchap_key": "secret", "dhchap_ctrlr_key": "secret", "psk": "psk"}),
    );
    for name in ["a", "b"] {
        far.call("bdev_malloc_create", json!({"name": name, "num_blocks": 24576, "block_size": 4096}));
        far.call("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": name}}));
    }
    for _ in 0..2 {
        far.call("nvmf_subsystem_add_listener", listener(&json!("0")));
    }
    let all = far.call("nvmf_subsystem_get_listeners", json!({"nqn": NQN}));
    let ports = all.as_array().expect("a list").iter().map(|l| l["address"]["trsvcid"].clone()).collect();
    (far, ports)
}

fn listener(port: &Value) -> Value {
    json!({"nqn": NQN, "secure_channel": true, "listen_address":
        {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port}})
}

fn attachment(port: &Value) -> Value {
    json!({"name": "Far", "trtype": "tcp", "adrfam": "ipv4", "traddr": "127.0.0.1", "trsvcid": port, "subnqn": NQN,
        "hostnqn": HOST, "hdgst": true, "ddgst": true, "dhchap_key": "secret", "dhchap_ctrlr_key": "secret", "psk": "psk",
        "multipath": "multipath", "ctrlr_loss_timeout_sec": -1, "reconnect_delay_sec": 1,
        "prchk_reftag": false, "prchk_guard": false})
}

fn without(mut v: Value, name: &str) -> Value {
    v.as_object_mut().expect("an object").remove(name);
    v
}

fn with(mut v: Value, name: &str, value: Value) -> Value {
    v[name] = value;
    v
}

/// Writes 4 KiB blocks of a device and reads them back, with a flush now and then, until told to end.
struct Load {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<Result<(), String>>,
}

const BLOCKS: u64 = 512;

fn block(lba: u64, n: u64) -> Vec<u8> {
    (0..512u64).flat_map(|i| (lba << 40 ^ n << 10 ^ i.wrapping_mul(n | 1)).to_le_bytes()).collect()
}

impl Load {
    fn on(plane: &Plane, name: &str) -> Load {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let desc = plane.0.registry().open(name, Access::ReadWrite, |_| {}).expect("it is there");
        let handle = plane.0.handles()[0].clone();
        let thread = std::thread::spawn({
            let (stop, rounds) = (stop.clone(), rounds.clone());
            move || {
                let work = move || async move {
                    let channel = desc.channel().map_err(|e| e.to_string())?;
                    drop(desc);
                    let mut model = vec![0; BLOCKS as usize];
                    while !stop.load(Ordering::Relaxed) {
                        let n = rounds.fetch_add(1, Ordering::Relaxed) + 1;
                        let (lba, back) = (n * 37 % BLOCKS, n * 101 % BLOCKS);
                        let data = Buf::from_slice(&block(lba, n));
                        channel.write(lba, data, false).await.map_err(|e| format!("write: {e}"))?;
                        model[lba as usize] = n;
                        let got = channel.read(back, 1).await.map_err(|e| format!("read: {e}"))?;
                        let was = model[back as usize];
                        if was > 0 && *got.to_contiguous() != block(back, was)[..] {
                            return Err(format!("block {back} is not what write {was} left there"));
                        }
                        if n % 64 == 0 {
                            channel.flush().await.map_err(|e| format!("flush: {e}"))?;
                        }
                    }
                    Ok(())
                };
                handle.block_on(work).map_err(|e| e.to_string())?
            }
        });
        let load = Load { stop, rounds, thread };
        load.goes_on();
        load
    }

    fn goes_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        wait("I/O", || self.rounds.load(Ordering::Relaxed) > before + 200 || self.thread.is_finished());
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic").expect("no error, no wrong byte");
    }
}

/// A pool on one remote namespace and a cipher on another; both paths go and come back; everything is saved and comes back
/// in another process's place.
#[test]
fn a_pool_and_a_cipher_over_remote_namespaces() {
    let dir = tempfile::tempdir().expect("a directory");
    let (far, ports) = far(dir.path());
    let near = Plane::new(dir.path());
    key(&near, dir.path(), "secret", SECRET);
    key(&near, dir.path(), "psk", PSK);
    near.call("bdev_nvme_set_options", json!({"keep_alive_timeout_ms": 10000, "action_on_timeout": "none"}));
    assert_eq!(near.call("bdev_nvme_attach_controller", attachment(&ports[0])), json!(["Farn1", "Farn2"]));
    let second = without(attachment(&ports[1]), "hostnqn");
    near.call("bdev_nvme_attach_controller", second.clone());
    let (code, what) = near.refused("bdev_nvme_attach_controller", second);
    assert!(
        code == -114 && what == "A controller named Far already exists with the specified network path",
        "{what}"
    );
    assert_eq!(near.refused("bdev_nvme_set_options", json!({"bdev_retry_count": 1})).0, -1);
    let shown = near.call("bdev_nvme_get_controllers", json!({"name": "Far"}));
    let paths = shown[0]["ctrlrs"].as_array().expect("a list");
    assert_eq!(paths.len(), 2);
    assert!(paths.iter().all(|p| p["state"] == "enabled" && p["host"]["nqn"] == HOST));
    assert_eq!(paths[1]["trid"]["trsvcid"], ports[1]);

    near.call(
        "bdev_lvol_create_lvstore",
        json!({"bdev_name": "Farn1", "lvs_name": "p", "memory_budget_mib": 32}),
    );
    near.call("bdev_lvol_create", json!({"lvs_name": "p", "lvol_name": "v", "size_in_mib": 32}));
    let (k, k2) = ("00".repeat(31) + "01", "02".repeat(32));
    near.call("accel_crypto_key_create", json!({"cipher": "AES_XTS", "name": "k", "key": k, "key2": k2}));
    near.call("bdev_crypto_create", json!({"base_bdev_name": "Farn2", "name": "C", "key_name": "k"}));
    let loads = [Load::on(&near, "p/v"), Load::on(&near, "C")];
    // What people at the other target see of it; figures are those between two looks.
    let seen = || far.plain("cryptfold_get_overview");
    drop(seen());
    wait("a host at work in the overview", || {
        let seen = seen();
        let hosts = seen["hosts"].as_array().expect("a list");
        let known = |h: &Value| h["nqn"] == HOST && h["authenticated"] == true && h["tls"] == true;
        let alive =
            |h: &Value| h["keep_alive_age_seconds"].as_f64().is_some_and(|s| (0.0..60.0).contains(&s));
        let busy = |h: &Value| h["write"]["iops"].as_f64() > Some(0.0);
        hosts.len() == 2
            && hosts.iter().all(|h| known(h) && alive(h))
            && hosts.iter().any(busy)
            && seen["totals"]["write"]["iops"].as_f64() > Some(0.0)
            && seen["totals"]["write"]["p99"].as_f64() > Some(0.0)
    });
    for (i, port) in ports.iter().enumerate() {
        far.call("nvmf_subsystem_remove_listener", without(listener(port), "secure_channel"));
        loads.iter().for_each(Load::goes_on);
        wait("path lost", || near.state(i) != "enabled");
        far.call("nvmf_subsystem_add_listener", listener(port));
        wait("path back", || near.state(i) == "enabled");
        loads.iter().for_each(Load::goes_on);
    }
    near.call("bdev_nvme_reset_controller", json!({"name": "Far"}));
    loads.iter().for_each(Load::goes_on);
    loads.into_iter().for_each(Load::end);
    let report = near.call("cryptfold_pool_check", json!({"lvs_name": "p", "data": true}));
    assert_eq!((&report["clean"], &report["problems"]), (&json!(true), &json!([])));
    let volume = near.call("bdev_get_bdevs", json!({"name": "p/v"}))[0]["uuid"].clone();

    let saved = near.plain("save_config");
    assert!(!saved.to_string().contains("AAECAw") && !saved.to_string().contains("VRLb"), "references only");
    drop(near);
    let near = Plane::new(dir.path());
    near.call("load_config", json!({"config": saved}));
    assert_eq!(near.plain("save_config"), saved);
    assert_eq!(near.call("bdev_get_bdevs", json!({"name": "p/v"}))[0]["uuid"], volume);
    Load::on(&near, "C").end();
    // One path away, then everything.
    near.call("bdev_nvme_detach_controller", json!({"name": "Far", "trtype": "TCP", "trsvcid": ports[0]}));
    assert_eq!(near.plain("bdev_nvme_get_controllers")[0]["ctrlrs"].as_array().map(Vec::len), Some(1));
    Load::on(&near, "p/v").end();
    near.call("cryptfold_pool_close", json!({"lvs_name": "p"}));
    near.call("bdev_nvme_detach_controller", json!({"name": "Far"}));
    assert_eq!(near.plain("bdev_get_bdevs"), json!([]));
    assert_eq!(near.plain("bdev_nvme_get_controllers"), json!([]));
    drop(far);
}

/// Secure channel concatenation between two targets: each path generates its key anew whenever it comes back.
#[test]
fn a_path_with_concatenation_comes_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let (far, ports) = far(dir.path());
    let host = "nqn.2026-01.io.cryptfold:concatenating";
    far.call(
        "nvmf_subsystem_add_host",
        json!({"nqn": NQN, "host": host, "dhchap_key": "secret", "dhchap_ctrlr_key": "secret"}),
    );
    let listener =
        |port: &Value| with(without(listener(port), "secure_channel"), "secure_concatenation", json!(true));
    far.call("nvmf_subsystem_add_listener", listener(&json!("0")));
    let all = far.call("nvmf_subsystem_get_listeners", json!({"nqn": NQN}));
    let shown = all.as_array().expect("a list").iter().map(|l| &l["secure_concatenation"]);
    assert_eq!(shown.collect::<Vec<_>>(), [false, false, true]);
    let port = &all[2]["address"]["trsvcid"];
    assert!(!ports.contains(port));
    let near = Plane::new(dir.path());
    key(&near, dir.path(), "secret", SECRET);
    let attachment = with(without(attachment(port), "psk"), "hostnqn", json!(host));
    // Without it the target lets nobody go on.
    let (code, _) = near.refused("bdev_nvme_attach_controller", attachment.clone());
    assert_eq!(code, -5);
    let attachment = with(attachment, "secure_concatenation", json!(true));
    let keyless = without(without(attachment.clone(), "dhchap_key"), "dhchap_ctrlr_key");
    assert!(near.refused("bdev_nvme_attach_controller", keyless).1.contains("needs dhchap_key"));
    assert_eq!(near.call("bdev_nvme_attach_controller", attachment), json!(["Farn1", "Farn2"]));
    let ciphers = || {
        let queues = far.call("nvmf_subsystem_get_qpairs", json!({"nqn": NQN}));
        let queues = queues.as_array().expect("a list").clone();
        queues.iter().map(|q| q["tls"]["cipher"].clone()).collect::<Vec<_>>()
    };
    let load = Load::on(&near, "Farn1");
    load.goes_on();
    // The queue that only authenticated goes in its own time.
    wait("nothing but TLS", || ciphers().iter().all(|c| c == "TLS_AES_128_GCM_SHA256"));
    far.call("nvmf_subsystem_remove_listener", without(listener(port), "secure_concatenation"));
    wait("path lost", || near.state(0) != "enabled");
    far.call("nvmf_subsystem_add_listener", listener(port));
    wait("path back", || near.state(0) == "enabled");
    load.goes_on();
    load.end();
    let saved = near.plain("save_config");
    assert!(saved.to_string().contains("\"secure_concatenation\":true"));
    drop(near);
    let near = Plane::new(dir.path());
    near.call("load_config", json!({"config": saved}));
    assert_eq!(near.plain("save_config"), saved);
    Load::on(&near, "Farn2").end();
}

#[test]
fn what_can_not_be_attached() {
    let dir = tempfile::tempdir().expect("a directory");
    let (_far, ports) = far(dir.path());
    let near = Plane::new(dir.path());
    let a = attachment(&ports[0]);
    let (code, what) = near.refused("bdev_nvme_attach_controller", a.clone());
    assert!(code == -2 && what.contains("\"secret\""), "{code} {what}");
    key(&near, dir.path(), "secret", SECRET);
    key(&near, dir.path(), "psk", PSK);
    for (name, value, code, word) in [
        ("trtype", json!("RDMA"), -32602, "trtype"),
        ("trsvcid", json!("x"), -32602, "trsvcid"),
        ("trsvcid", Value::Null, -32602, "trsvcid: missing"),
        ("subnqn", Value::Null, -32602, "subnqn: missing"),
        ("subnqn", json!("x"), -32602, "subnqn"),
        ("dhchap_key", Value::Null, -32602, "dhchap_key"),
        ("psk", Value::Null, -5, "Input/output error"),
        ("psk", json!("secret"), -32602, "NVMeTLSkey"),
        ("psk_version", json!(2), -32602, "psk_version"),
        ("hostaddr", json!("here"), -32602, "is no IP address"),
        ("hostsvcid", json!("4421"), -32602, "hostsvcid"),
        ("prchk_guard", json!(true), -32602, "prchk_guard"),
        ("reconnect_delay_sec", json!(0), -32602, "reconnect_delay_sec"),
        ("num_io_queues", json!(0), -32602, "num_io_queues"),
        ("secure_concatenation", json!(true), -32602, "no psk"),
        ("name", json!(""), -32602, "name"),
        ("hostnqn", json!("nqn.2026-01.io.cryptfold:other"), -5, "Input/output error"),
    ] {
        let (got, what) = near.refused("bdev_nvme_attach_controller", with(a.clone(), name, value));
        assert!(got == code && what.contains(word), "{name}: {got} {what}");
    }
    assert_eq!(near.refused("bdev_nvme_detach_controller", json!({"name": "Far"})).0, -19);
    assert_eq!(near.refused("bdev_nvme_reset_controller", json!({"name": "Far"})).0, -19);
    assert_eq!(near.refused("bdev_nvme_get_controllers", json!({"name": "Far"})).0, -19);
    let lonely = json!({"ctrlr_loss_timeout_sec": 5});
    assert!(near.refused("bdev_nvme_set_options", lonely).1.contains("reconnect_delay_sec"));
    assert_eq!(near.refused("bdev_nvme_set_options", json!({"dhchap_digests": ["md5"]})).0, -32602);
    // The name is free again after each refusal; a name of a device is not.
    near.call("bdev_null_create", json!({"name": "Farn2", "num_blocks": 8, "block_size": 512}));
    assert_eq!(
        near.call("bdev_nvme_attach_controller", with(a.clone(), "multipath", json!("disable"))),
        json!(["Farn1"])
    );
    let (code, what) = near.refused("bdev_nvme_attach_controller", with(a, "trsvcid", ports[1].clone()));
    assert!(
        code == -114 && what == "A controller named Far already exists and multipath is disabled",
        "{what}"
    );
}
