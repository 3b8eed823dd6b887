//! `cryptfold-perf management`: how long the control plane takes to answer while hosts load a volume of a pool on the same
//! reactors. The target is in this process, called through its socket; calls that change something and calls that read go in
//! turn, each timed from its first byte to the last one of its reply.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cryptfold_control::client::Client;
use cryptfold_control::server::Server;
use cryptfold_control::{Control, ControlConfig};
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::load::{Bytes, Cores, Latency, LoadArgs, LoadResult};
use crate::nvmf;
use crate::session::Namespace;

/// What the documentation promises, ms (p99).
const PROMISED_MS: f64 = 100.0;
const NQN: &str = "nqn.2026-01.io.cryptfold:loaded";
const OTHER: &str = "nqn.2026-01.io.cryptfold:managed";
/// A reply that takes longer is a hang.
const CALL_LIMIT: Duration = Duration::from_secs(600);
const READING: [&str; 7] = [
    "nvmf_get_subsystems",
    "bdev_get_bdevs",
    "bdev_get_iostat",
    "nvmf_get_stats",
    "framework_get_reactors",
    "bdev_lvol_get_lvols",
    "save_config",
];

/// Times the control plane's answers while a volume of a pool is loaded over NVMe/TCP
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// CPUs of the target's reactors
    #[arg(long, default_value = "0")]
    target_cores: Cores,
    /// File or block device for the pool, which is overwritten [default: a RAM disk]
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Size of the RAM disk
    #[arg(long, default_value = "2G")]
    disk_size: Bytes,
    /// Size of the volume
    #[arg(long, default_value = "1G")]
    volume_size: Bytes,
    /// Milliseconds between two calls
    #[arg(long, default_value_t = 5)]
    pause_ms: u64,
    #[command(flatten)]
    load: LoadArgs,
}

/// A directory that goes with its owner.
struct Place(PathBuf);

impl Place {
    fn new() -> Result<Place, String> {
        let name = format!("cryptfold-perf-{}-{:x}", std::process::id(), cryptfold_reactor::random_u64());
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok(Place(dir))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // A directory that is left in /tmp does no harm.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A target with its socket; ends in order.
struct Served {
    control: Arc<Control>,
    server: Server,
    socket: PathBuf,
    _place: Place,
}

impl Served {
    fn start(cores: &Cores) -> Result<Served, String> {
        let place = Place::new()?;
        let control = Control::new(ControlConfig {
            cores: cores.0.clone(),
            key_dir: place.0.join("keys"),
            ..ControlConfig::default()
        });
        control.initialize().map_err(|e| e.message)?;
        let socket = place.0.join("rpc.sock");
        let server = Server::start(&socket, control.clone()).map_err(|e| e.to_string())?;
        Ok(Served { control, server, socket, _place: place })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.control.end_waits();
        self.server.stop();
        if let Err(e) = self.control.shutdown() {
            tracing::error!(error = e.message, "the target did not end in order");
        }
    }
}

fn connect(socket: &Path) -> Result<Client, String> {
    Client::connect(socket, CALL_LIMIT).map_err(|e| e.to_string())
}

fn call(client: &mut Client, method: &str, params: Value) -> Result<Value, String> {
    client.call(method, Some(params).filter(|p| !p.is_null())).map_err(|e| e.to_string())
}

/// The pool, its volume and where hosts find it: the port.
fn prepare(client: &mut Client, args: &Args) -> Result<String, String> {
    let mut run = |method: &str, params: Value| call(client, method, params);
    match &args.disk {
        Some(file) => {
            run("bdev_uring_create", json!({"name": "disk", "filename": file, "block_size": 4096}))?
        }
        None => {
            let blocks = args.disk_size.0 / 4096;
            run("bdev_malloc_create", json!({"name": "disk", "num_blocks": blocks, "block_size": 4096}))?
        }
    };
    run("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "pool", "force": true}))?;
    let mib = args.volume_size.0 >> 20;
    run("bdev_lvol_create", json!({"lvs_name": "pool", "lvol_name": "load", "size_in_mib": mib}))?;
    run("nvmf_create_transport", json!({"trtype": "TCP"}))?;
    run("nvmf_create_subsystem", json!({"nqn": NQN, "allow_any_host": true}))?;
    run("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "pool/load"}}))?;
    run("nvmf_subsystem_add_listener", listener(NQN, "0"))?;
    let all = run("nvmf_subsystem_get_listeners", json!({"nqn": NQN}))?;
    let port = all[0]["address"]["trsvcid"].as_str().ok_or("the listener has no port")?;
    Ok(port.to_owned())
}

fn listener(nqn: &str, port: &str) -> Value {
    json!({"nqn": nqn, "listen_address":
        {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port}})
}

/// The calls of one round. What a round makes it takes away again.
fn round(n: u64, port: &str) -> Vec<(&'static str, Value)> {
    let (lvol, snapshot) = (format!("new{n}"), format!("snap{n}"));
    let (volume, kept) = (format!("pool/{lvol}"), format!("pool/{snapshot}"));
    let mut calls = vec![
        ("bdev_malloc_create", json!({"name": "ram", "num_blocks": 2048, "block_size": 4096})),
        ("nvmf_create_subsystem", json!({"nqn": OTHER, "allow_any_host": true})),
        ("nvmf_subsystem_add_ns", json!({"nqn": OTHER, "namespace": {"bdev_name": "ram", "nsid": 1}})),
        ("nvmf_subsystem_add_listener", listener(OTHER, port)),
        ("bdev_lvol_create", json!({"lvs_name": "pool", "lvol_name": lvol, "size_in_mib": 64})),
        // Of the volume that is being written.
        ("bdev_lvol_snapshot", json!({"lvol_name": "pool/load", "snapshot_name": snapshot})),
        // To the subsystem that the load goes to.
        ("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": volume, "nsid": 2}})),
        ("bdev_set_qos_limit", json!({"name": volume, "rw_ios_per_sec": 10_000})),
        ("sock_impl_set_options", json!({"impl_name": "posix", "enable_quickack": n.is_multiple_of(2)})),
        ("bdev_nvme_set_options", json!({"bdev_retry_count": n % 4})),
    ];
    calls.extend(READING.map(|method| (method, Value::Null)));
    calls.extend([
        ("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 2})),
        ("bdev_lvol_delete", json!({"name": volume})),
        ("bdev_lvol_delete", json!({"name": kept})),
        ("nvmf_subsystem_remove_listener", listener(OTHER, port)),
        ("nvmf_subsystem_remove_ns", json!({"nqn": OTHER, "nsid": 1})),
        ("nvmf_delete_subsystem", json!({"nqn": OTHER})),
        ("bdev_malloc_delete", json!({"name": "ram"})),
    ]);
    calls
}

/// Nanoseconds, to an hour.
struct Times(Histogram<u64>);

impl Times {
    fn new() -> Result<Times, String> {
        Histogram::new_with_bounds(1, 3_600_000_000_000, 3).map(Times).map_err(|e| e.to_string())
    }
    fn add(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1));
    }
    fn json(&self) -> Value {
        let l = Latency::of(&self.0);
        json!({"calls": self.0.len(), "p50_ms": l.p50 / 1000.0, "p99_ms": l.p99 / 1000.0, "max_ms": l.max / 1000.0})
    }
}

/// What was timed.
struct Timed {
    rounds: u64,
    by_method: BTreeMap<&'static str, Times>,
    all: Times,
    /// A byte to another thread and back, after each call: what the machine makes of two threads that wake each other.
    echo: Times,
}

/// Rounds of calls until `stop`, one whole round at least.
fn calls(client: &mut Client, port: &str, pause: Duration, stop: &AtomicBool) -> Result<Timed, String> {
    let mut timed = Timed { rounds: 0, by_method: BTreeMap::new(), all: Times::new()?, echo: Times::new()? };
    let mut echo = echo().map_err(|e| format!("an echo between two threads: {e}"))?;
    while timed.rounds == 0 || !stop.load(Ordering::Relaxed) {
        for (method, params) in round(timed.rounds, port) {
            std::thread::sleep(pause);
            let begin = Instant::now();
            call(client, method, params)?;
            let time = begin.elapsed();
            timed.all.add(time);
            match timed.by_method.get_mut(method) {
                Some(times) => times.add(time),
                None => {
                    let mut times = Times::new()?;
                    times.add(time);
                    timed.by_method.insert(method, times);
                }
            }
            let begin = Instant::now();
            let answered = echo.write_all(&[1]).and_then(|()| echo.read_exact(&mut [0]));
            answered.map_err(|e| format!("an echo between two threads: {e}"))?;
            timed.echo.add(begin.elapsed());
        }
        timed.rounds += 1;
    }
    Ok(timed)
}

/// A thread that sends back what it gets, until this end is dropped.
fn echo() -> std::io::Result<UnixStream> {
    let (mine, mut its) = UnixStream::pair()?;
    std::thread::Builder::new().name("echo".into()).spawn(move || {
        let mut byte = [0];
        while its.read_exact(&mut byte).and_then(|()| its.write_all(&byte)).is_ok() {}
    })?;
    Ok(mine)
}

/// Runs and reports.
///
/// # Errors
/// What went wrong, in one line: a call that was refused, an I/O that failed. Slow answers are a figure, no error.
pub fn run(args: &Args) -> Result<(), String> {
    args.load.check()?;
    let served = Served::start(&args.target_cores)?;
    let mut client = connect(&served.socket)?;
    let port = prepare(&mut client, args)?;
    let stop = AtomicBool::new(false);
    let (load, timed) = std::thread::scope(|s| {
        let calling = s.spawn(|| calls(&mut client, &port, Duration::from_millis(args.pause_ms), &stop));
        let load = nvmf::load(&Namespace::at("127.0.0.1", &port, NQN), &args.load);
        stop.store(true, Ordering::Relaxed);
        (load, calling.join().unwrap_or_else(|_| Err("the calling thread panicked".into())))
    });
    let (load, timed) = (load?, timed?);
    if args.load.json {
        println!("{}", json(&load, &timed));
    } else {
        print(&load, &timed);
    }
    match load.is_clean() {
        true => Ok(()),
        false => Err(format!("I/O failed: {}", load.first_error.as_deref().unwrap_or("a block is wrong"))),
    }
}

fn json(load: &LoadResult, timed: &Timed) -> Value {
    let methods: serde_json::Map<_, _> =
        timed.by_method.iter().map(|(m, t)| ((*m).to_owned(), t.json())).collect();
    json!({"load": load.json(), "rounds": timed.rounds, "all": timed.all.json(), "echo": timed.echo.json(), "methods": methods})
}

fn print(load: &LoadResult, timed: &Timed) {
    println!("{}\n", load.text());
    println!("{:<34} {:>7} {:>10} {:>10} {:>10}", "method", "calls", "p50 ms", "p99 ms", "max ms");
    let row = |name: &str, times: &Times| {
        let l = Latency::of(&times.0);
        let [p50, p99, max] = [l.p50, l.p99, l.max].map(|us| us / 1000.0);
        println!("{name:<34} {:>7} {p50:>10.3} {p99:>10.3} {max:>10.3}", times.0.len());
    };
    timed.by_method.iter().for_each(|(method, times)| row(method, times));
    row("all", &timed.all);
    row("(an echo between two threads)", &timed.echo);
    let p99 = Latency::of(&timed.all.0).p99 / 1000.0;
    let kept = if p99 <= PROMISED_MS { "kept" } else { "NOT kept" };
    println!("\np99 of all calls {p99:.3} ms; promised are {PROMISED_MS:.0} ms: {kept}");
}
