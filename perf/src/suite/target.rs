//! A target of our own: a process of `cryptfold target`, set up through its socket for one kind of path.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cryptfold_control::client::Client;
use cryptfold_nvmf_initiator::{HashId, Psk};
use serde_json::{Value, json};

use super::matrix::{Layers, Size};
use super::process::{Failed, Owned, Stop, line, quoted, tail};
use super::record::StageTimes;

/// The subsystem that is measured.
pub const NQN: &str = "nqn.2026-01.io.cryptfold:suite";
/// The host.
pub const HOST: &str = "nqn.2026-01.io.cryptfold:suite-host";
/// The host's volume key; its data is made up.
pub const HOST_KEY: [&str; 2] = [
    "1111111111111111111111111111111111111111111111111111111111111111",
    "2222222222222222222222222222222222222222222222222222222222222222",
];
const START_LIMIT: Duration = Duration::from_secs(120);
const CALL_LIMIT: Duration = Duration::from_secs(600);
const BLOCK: u64 = 4096;
/// Room of a pool for each byte of its volume: what is overwritten is given back behind.
const POOL_ROOM: u64 = 3;
const POOL_EXTRA_BYTES: u64 = 512 << 20;

/// What a target has done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// Its reactors were busy, seconds.
    pub busy_s: f64,
    /// I/Os of the namespace.
    pub ios: u64,
    /// Bytes of them.
    pub bytes: u64,
}

/// The socket of a target, ours or another one's, and its namespace's device.
pub struct Probe {
    client: Client,
    bdev: String,
}

impl Probe {
    /// For the namespace of a subsystem.
    ///
    /// # Errors
    /// What went wrong, in one line.
    pub fn new(socket: &Path, nqn: &str, nsid: u32) -> Result<Probe, String> {
        let mut client = Client::connect(socket, CALL_LIMIT).map_err(|e| e.to_string())?;
        let all = client.call("nvmf_get_subsystems", None).map_err(|e| e.to_string())?;
        let lists = all.as_array().into_iter().flatten().filter(|s| s["nqn"] == nqn);
        let mut namespaces = lists.filter_map(|s| s["namespaces"].as_array()).flatten();
        let found = namespaces.find(|n| n["nsid"] == nsid).and_then(|n| n["bdev_name"].as_str());
        let bdev = found.ok_or_else(|| format!("{}: no namespace {nsid} of {nqn}", socket.display()))?;
        Ok(Probe { client, bdev: bdev.to_owned() })
    }

    /// Starts recording stages.
    ///
    /// # Errors
    /// What went wrong, in one line.
    pub fn trace(&mut self) -> Result<(), String> {
        self.client
            .call("cryptfold_trace", Some(json!({"enable": true})))
            .map_err(|e| e.to_string())
            .map(drop)
    }

    /// Stops, and takes what was recorded.
    ///
    /// # Errors
    /// What went wrong, in one line.
    pub fn traced(&mut self) -> Result<Vec<StageTimes>, String> {
        let off = Some(json!({"enable": false}));
        let mut reply = self.client.call("cryptfold_trace", off).map_err(|e| e.to_string())?;
        serde_json::from_value(reply["stages"].take()).map_err(|e| format!("cryptfold_trace: {e}"))
    }

    /// What it has done so far.
    ///
    /// # Errors
    /// What went wrong, in one line.
    pub fn done(&mut self) -> Result<Done, String> {
        let mut call = |method: &str, params| self.client.call(method, params).map_err(|e| e.to_string());
        let reactors = call("framework_get_reactors", None)?;
        let ticks = |r: &Value| r["busy"].as_f64().unwrap_or(0.0);
        let busy: f64 = reactors["reactors"].as_array().into_iter().flatten().map(ticks).sum();
        let rate = reactors["tick_rate"].as_f64().filter(|r| *r > 0.0).unwrap_or(1e9);
        let stat = call("bdev_get_iostat", Some(json!({"name": self.bdev})))?;
        let sum = |a: &str, b: &str| {
            let of = |name: &str| stat["bdevs"][0][name].as_u64().unwrap_or(0);
            of(a) + of(b)
        };
        Ok(Done {
            busy_s: busy / rate,
            ios: sum("num_read_ops", "num_write_ops"),
            bytes: sum("bytes_read", "bytes_written"),
        })
    }
}

/// A running target of our own.
pub struct Own {
    /// Before its process, so that the socket closes first.
    pub probe: Probe,
    _process: Owned,
    /// Where it listens.
    pub port: String,
    /// What was started and called, as for a shell.
    pub commands: Vec<String>,
}

/// How to start one.
pub struct Plan<'a> {
    /// The program.
    pub program: &'a Path,
    /// A directory that is ours.
    pub dir: &'a Path,
    /// CPUs of its reactors.
    pub cores: String,
    /// What the namespace is made of.
    pub path: Layers,
    /// Its size.
    pub size: Size,
    /// Entries of its I/O queues.
    pub queue_entries: u32,
}

/// The key of TLS in `dir`; made at the first call.
///
/// # Errors
/// What went wrong, in one line.
pub fn psk_file(dir: &Path) -> Result<PathBuf, String> {
    let path = dir.join("psk");
    if !path.exists() {
        let mut key = [0; 32];
        cryptfold_reactor::fill_random(&mut key);
        let psk = Psk::new(&key, Some(HashId::Sha256)).map_err(|e| e.to_string())?;
        secret_file(&path, psk.to_text().as_bytes())?;
    }
    Ok(path)
}

fn secret_file(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut f| f.write_all(bytes)).map_err(|e| format!("{}: {e}", path.display()))
}

/// The calls that make the namespace.
fn calls(plan: &Plan<'_>) -> Result<Vec<(&'static str, Value)>, String> {
    let disk_bytes = match plan.path.pool() {
        true => plan.size.0 * POOL_ROOM + POOL_EXTRA_BYTES,
        false => plan.size.0,
    };
    let blocks = disk_bytes / BLOCK;
    let mut calls =
        vec![("bdev_malloc_create", json!({"name": "ram", "num_blocks": blocks, "block_size": BLOCK}))];
    let key =
        |name: &str| json!({"name": name, "cipher": "AES_XTS", "key": HOST_KEY[0], "key2": HOST_KEY[1]});
    let bdev = match plan.path {
        Layers::Plain | Layers::Tls => "ram",
        Layers::Crypto => {
            calls.push(("accel_crypto_key_create", key("rest")));
            calls.push((
                "bdev_crypto_create",
                json!({"base_bdev_name": "ram", "name": "crypto", "key_name": "rest"}),
            ));
            "crypto"
        }
        Layers::Pool | Layers::PoolE2 => {
            let file = plan.dir.join("pool.key");
            calls.push((
                "bdev_lvol_create_lvstore",
                json!({"bdev_name": "ram", "lvs_name": "pool", "key_file": file, "create_key": true}),
            ));
            let mib = plan.size.0 >> 20;
            calls.push((
                "bdev_lvol_create",
                json!({"lvs_name": "pool", "lvol_name": "volume", "size_in_mib": mib}),
            ));
            "pool/volume"
        }
    };
    let bdev = match plan.path {
        Layers::PoolE2 => {
            calls.push(("accel_crypto_key_create", key("host")));
            calls.push((
                "bdev_hostcrypt_create",
                json!({"base_bdev_name": bdev, "name": "clear", "key_name": "host", "sector_size": BLOCK,
                    "iv_large_sectors": true}),
            ));
            "clear"
        }
        _ => bdev,
    };
    let tls = plan.path == Layers::Tls;
    calls.push(("nvmf_create_transport", json!({"trtype": "TCP", "max_queue_depth": plan.queue_entries})));
    calls.push(("nvmf_create_subsystem", json!({"nqn": NQN, "allow_any_host": !tls})));
    calls.push(("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": bdev, "nsid": 1}})));
    if tls {
        calls.push(("keyring_file_add_key", json!({"name": "psk", "path": psk_file(plan.dir)?})));
        calls.push(("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": HOST, "psk": "psk"})));
    }
    let address = json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": "0"});
    calls.push((
        "nvmf_subsystem_add_listener",
        json!({"nqn": NQN, "listen_address": address, "secure_channel": tls}),
    ));
    Ok(calls)
}

impl Own {
    /// Starts a target and makes its namespace.
    ///
    /// # Errors
    /// What went wrong, or that the suite was told to stop.
    pub fn start(plan: &Plan<'_>, stop: &Stop) -> Result<Own, Failed> {
        let (socket, log) = (plan.dir.join("rpc.sock"), plan.dir.join("target.log"));
        let said = |e: &dyn std::fmt::Display| format!("{}: {e}", log.display());
        let out = File::create(&log).map_err(|e| said(&e))?;
        let err = out.try_clone().map_err(|e| said(&e))?;
        let mut command = Command::new(plan.program);
        command.args(["target", "-m", &plan.cores, "--log", "warning", "-r"]).arg(&socket);
        command.arg("--keys").arg(plan.dir.join("keys")).stdout(out).stderr(err);
        let mut commands = vec![format!("{} &", line(&command))];
        let mut process = Owned::spawn(&mut command)?;
        let begin = Instant::now();
        let mut client = loop {
            stop.check()?;
            match Client::connect(&socket, CALL_LIMIT) {
                Ok(client) => break client,
                Err(e) => {
                    let status = process.ended()?;
                    if status.is_some() || begin.elapsed() > START_LIMIT {
                        let text = std::fs::read_to_string(&log).unwrap_or_default();
                        let end = status.map_or_else(|| e.to_string(), |s| s.to_string());
                        return Err(Failed::Step(format!(
                            "the target did not start: {end}: {}",
                            tail(&text)
                        )));
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let mut call =
            |method: &str, params: Option<Value>| client.call(method, params).map_err(|e| e.to_string());
        call("framework_wait_init", None)?;
        for (method, params) in calls(plan)? {
            stop.check()?;
            commands.push(format!(
                "cryptfold rpc -r {} {method} {}",
                socket.display(),
                quoted(&params.to_string())
            ));
            call(method, Some(params))?;
        }
        let all = call("nvmf_subsystem_get_listeners", Some(json!({"nqn": NQN})))?;
        let port = all[0]["address"]["trsvcid"]
            .as_str()
            .ok_or_else(|| "the listener has no port".to_owned())?
            .to_owned();
        Ok(Own { probe: Probe::new(&socket, NQN, 1)?, _process: process, port, commands })
    }
}
