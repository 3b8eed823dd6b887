//! The command fuzzer: sessions of random commands in every state of a controller, against the real program with RAM disks
//! and a pool; at the same time a host that behaves verifies its own namespace, and an operator asks the target about
//! everything and takes namespaces away and back.
//!
//! Afterwards the target must be as if nothing had been: no controllers, no descriptors, data right, the pool's audit clean,
//! an orderly end without a panic in the log; and a start with what reservations left in their files.
//!
//! A seed decides what every session sends; how sessions interleave is the machine's affair. A finding names the seed of
//! its session, which can be run alone.

pub mod commands;
pub mod good;
pub mod host;
mod operator;
pub mod session;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cryptfold_bdev_sim::Rng;
use serde_json::{Value, json};

use crate::kill::{Place, Program};
use commands::Geometry;
use good::{Good, Model};
use session::{Counts, Subject};

/// The subsystem that is fuzzed, and the one that must not notice.
const NQN: &str = "nqn.2026-01.io.cryptfold:fuzzed";
const GOOD_NQN: &str = "nqn.2026-01.io.cryptfold:good";
const KEYED_HOST: &str = "nqn.2026-01.io.cryptfold:keyed";
/// Namespaces of the first: two RAM disks and a volume of the pool.
const NAMESPACES: [Geometry; 3] = [
    Geometry { blocks: 8192, block_bytes: 512 },
    Geometry { blocks: 1024, block_bytes: 4096 },
    Geometry { blocks: 8192, block_bytes: 4096 },
];
const GOOD: Geometry = Geometry { blocks: 2048, block_bytes: 4096 };
const POOL_BYTES: u64 = 1 << 30;
/// Hosts that misbehave at once.
const HOSTS: u64 = 3;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program, `cryptfold`.
    pub program: PathBuf,
    /// See the module's head.
    pub seed: u64,
    /// Sessions in all.
    pub sessions: u64,
    /// Stops beginning new ones after this.
    pub time: Option<Duration>,
    /// Only the session of this seed.
    pub only: Option<u64>,
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Sessions.
    pub sessions: u64,
    /// What they did.
    pub counts: Counts,
    /// Writes and reads of the host that behaves, each verified.
    pub verified: u64,
    /// Calls that the operator had answered, and the slowest answer.
    pub calls: u64,
    /// See `calls`.
    pub slowest_call: Duration,
    /// All of it.
    pub time: Duration,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = &self.counts;
        write!(
            f,
            "{} sessions, {} commands, {} succeeded ({} kinds), {} connections ended for a reason; {} writes and reads of \
             the other host verified; {} calls answered, slowest {} ms; {:.0} s; stages {:?}",
            self.sessions,
            c.commands,
            c.succeeded,
            c.opcodes.len(),
            c.ended,
            self.verified,
            self.calls,
            self.slowest_call.as_millis(),
            self.time.as_secs_f64(),
            c.stages
        )
    }
}

/// Runs in a directory of its own below `TMPDIR` (else /var/tmp), which is left behind when something was wrong.
///
/// # Errors
/// What was found, with the seed and the directory.
pub fn run(options: &Options) -> Result<Summary, String> {
    let base = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let dir =
        tempfile::Builder::new().prefix("cryptfold-fuzz.").tempdir_in(base).map_err(|e| e.to_string())?;
    campaign(options, dir.path()).map_err(|what| {
        let dir = dir.keep();
        format!("seed {}: {what}\nthe program's log and the pool are in {}", options.seed, dir.display())
    })
}

fn campaign(options: &Options, dir: &Path) -> Result<Summary, String> {
    let started = Instant::now();
    write_key(dir)?;
    let place = Place::prepare(&options.program, dir, POOL_BYTES, configuration)?;
    let program = place.start()?;
    let addr = SocketAddr::from(([127, 0, 0, 1], place.port()));
    let mut model = Model::new(GOOD, options.seed);
    let mut good = Good::connect(addr, GOOD_NQN)?;
    // What is made once and kept is there before the descriptors are counted.
    good.round(&mut model)?;
    drop(good);
    let nobody = || quiet(&program);
    nobody()?;
    let descriptors = program.descriptors()?;

    let subject =
        Subject { addr, nqn: NQN.into(), namespaces: NAMESPACES.to_vec(), keyed_host: KEYED_HOST.into() };
    let mut summary = storm(options, &subject, &program, (&mut model, addr))?;
    nobody()?;
    program.returns_to(descriptors)?;
    let report = program.rpc("cryptfold_pool_check", &json!({"lvs_name": "pool", "data": true}))?;
    if report["clean"] != true {
        return Err(format!("the pool's audit: {report:#}"));
    }
    program.stop()?;
    no_panic(dir)?;
    // What the reservations left in their files is no hindrance, and the data is what it was.
    let program = place.start()?;
    Good::connect(addr, GOOD_NQN)
        .and_then(|mut good| good.all(&model))
        .map_err(|e| format!("after a restart: {e}"))?;
    program.stop()?;
    summary.time = started.elapsed();
    Ok(summary)
}

/// All sessions, with the good host and the operator beside them.
fn storm(
    options: &Options,
    subject: &Subject,
    program: &Program,
    (model, addr): (&mut Model, SocketAddr),
) -> Result<Summary, String> {
    let (stop, verified) = (AtomicBool::new(false), AtomicU64::new(0));
    let begin = Instant::now();
    let next = AtomicU64::new(0);
    let mut summary = Summary::default();
    std::thread::scope(|s| {
        let good = s.spawn(|| -> Result<(), String> {
            let mut good = Good::connect(addr, GOOD_NQN)?;
            while !stop.load(Ordering::Relaxed) {
                good.round(model)?;
                verified.fetch_add(1, Ordering::Relaxed);
            }
            good.all(model)
        });
        let operator = s.spawn(|| operator::run(program, NQN, &stop));
        let hosts: Vec<_> = (0..if options.only.is_some() { 1 } else { HOSTS })
            .map(|_| {
                s.spawn(|| -> Result<(u64, Counts), String> {
                    let (mut done, mut counts) = (0, Counts::default());
                    loop {
                        let n = next.fetch_add(1, Ordering::Relaxed);
                        let late = options.time.is_some_and(|t| begin.elapsed() > t);
                        if n >= options.sessions || late || stop.load(Ordering::Relaxed) {
                            return Ok((done, counts));
                        }
                        let seed = options.only.unwrap_or_else(|| session_seed(options.seed, n));
                        let did = session::run(subject, seed);
                        // The others need not go on.
                        did.as_ref().err().inspect(|_| stop.store(true, Ordering::Relaxed));
                        counts.add(&did?);
                        done += 1;
                    }
                })
            })
            .collect();
        let mut verdict = Ok(());
        for host in hosts {
            match host.join().unwrap_or_else(|_| Err("a session panicked".into())) {
                Ok((sessions, counts)) => {
                    summary.sessions += sessions;
                    summary.counts.add(&counts);
                }
                Err(what) => verdict = verdict.and(Err(what)),
            }
        }
        stop.store(true, Ordering::Relaxed);
        let good = good.join().unwrap_or_else(|_| Err("it panicked".into()));
        let operator = operator.join().unwrap_or_else(|_| Err("it panicked".into()));
        verdict?;
        good.map_err(|e| format!("the host that behaves: {e}"))?;
        (summary.calls, summary.slowest_call) = operator.map_err(|e| format!("management: {e}"))?;
        summary.verified = verified.load(Ordering::Relaxed);
        Ok(())
    })
    .map(|()| summary)
}

/// The seed of a run's nth session.
fn session_seed(seed: u64, n: u64) -> u64 {
    Rng::new(seed.wrapping_mul(1 << 20).wrapping_add(n)).next()
}

/// Waits until nobody is connected.
fn quiet(program: &Program) -> Result<(), String> {
    let begin = Instant::now();
    loop {
        let mut left = 0;
        for nqn in [NQN, GOOD_NQN] {
            let list = program.rpc("nvmf_subsystem_get_controllers", &json!({"nqn": nqn}))?;
            left += list.as_array().map_or(0, Vec::len);
        }
        if left == 0 {
            return Ok(());
        }
        if begin.elapsed() > Duration::from_secs(120) {
            return Err(format!("{left} controllers remain two minutes after their connections"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn no_panic(dir: &Path) -> Result<(), String> {
    let log = std::fs::read(dir.join("log")).map_err(|e| format!("the program's log: {e}"))?;
    let log = String::from_utf8_lossy(&log);
    match log.lines().find(|l| l.contains("panicked")) {
        Some(line) => Err(format!("a panic in the log: {line}")),
        None => Ok(()),
    }
}

/// The secret of the host that has to authenticate; nobody here uses it.
fn write_key(dir: &Path) -> Result<(), String> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut key = [0; 32];
    cryptfold_reactor::fill_random(&mut key);
    let text = cryptfold_nvmf_initiator::Secret::new(&key, None).map_err(|e| e.to_string())?.to_text();
    let file = std::fs::File::options().create_new(true).write(true).mode(0o600).open(dir.join("host.key"));
    file.and_then(|mut f| f.write_all(text.as_bytes())).map_err(|e| format!("the host's key: {e}"))
}

fn configuration(dir: &Path, port: u16) -> Value {
    let call = |method: &str, params: Value| json!({"method": method, "params": params});
    let volume = |name: &str, blocks: u64| {
        let params = json!({"lvs_name": "pool", "lvol_name": name, "size_in_mib": (blocks * 4096) >> 20, "domain": "shared",
            "exist_ok": true});
        call("bdev_lvol_create", params)
    };
    // What a reservation's file belongs to has the same identity after a restart.
    let ram = |name: &str, uuid: &str, g: Geometry| {
        let params = json!({"name": name, "uuid": uuid, "num_blocks": g.blocks, "block_size": g.block_bytes});
        call("bdev_malloc_create", params)
    };
    let key_file = dir.join("pool.key");
    let bdev = [
        ram("ram1", "5a3a7c84-0000-4000-8000-000000000001", NAMESPACES[0]),
        ram("ram2", "5a3a7c84-0000-4000-8000-000000000002", NAMESPACES[1]),
        call("bdev_uring_create", json!({"name": "disk", "filename": dir.join("disk"), "block_size": 4096})),
        call(
            "bdev_lvol_create_lvstore",
            json!({"bdev_name": "disk", "lvs_name": "pool", "key_file": key_file, "create_key": true, "exist_ok": true}),
        ),
        volume("fuzzed", NAMESPACES[2].blocks),
        volume("good", GOOD.blocks),
    ];
    let keyring = [call("keyring_file_add_key", json!({"name": "host", "path": dir.join("host.key")}))];
    let address =
        json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()});
    let mut nvmf = vec![call("nvmf_create_transport", json!({"trtype": "TCP"}))];
    for (nqn, names) in [(NQN, &["ram1", "ram2", "pool/fuzzed"][..]), (GOOD_NQN, &["pool/good"])] {
        nvmf.push(call("nvmf_create_subsystem", json!({"nqn": nqn, "allow_any_host": true})));
        for (nsid, name) in (1..).zip(names) {
            nvmf.push(call(
                "nvmf_subsystem_add_ns",
                json!({"nqn": nqn, "namespace": namespace(dir, nsid, name)}),
            ));
        }
        nvmf.push(call("nvmf_subsystem_add_listener", json!({"nqn": nqn, "listen_address": address})));
    }
    nvmf.push(call("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": KEYED_HOST, "dhchap_key": "host"})));
    json!({"subsystems": [{"subsystem": "keyring", "config": keyring}, {"subsystem": "bdev", "config": bdev},
        {"subsystem": "nvmf", "config": nvmf}]})
}

/// Namespaces 1 and 3 keep their reservations over a power loss.
fn namespace(dir: &Path, nsid: u32, name: &str) -> Value {
    let mut ns = json!({"nsid": nsid, "bdev_name": name});
    if name == "ram1" || name == "pool/fuzzed" {
        ns["ptpl_file"] = json!(dir.join(format!("ptpl{nsid}")));
    }
    ns
}
