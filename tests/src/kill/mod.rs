//! SIGKILL of the real program under load, again and again on one pool; each restart is judged block by block.
//!
//! One round: load over NVMe/TCP (`load`), SIGKILL at a random moment, in some rounds another one or more while the
//! program starts and recovers, restart, every block of every volume read and judged by
//! [`cryptfold_bdev_sim::History`], then the pool's own audit with all data. The next round goes on with the same pool.
//!
//! This proves that the process may die at any moment: the page cache and the device's own cache survive a SIGKILL. Loss
//! of power is proven on the simulated disk (`cryptfold-reduce`, `tests/simulation.rs`).
//!
//! The seed decides what is written where and when to kill; what has completed by then is the machine's affair, so a seed
//! repeats the circumstances, not the run.

mod keys;
mod load;
mod program;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cryptfold_bdev_sim::{History, Rng, VolumeId};
use cryptfold_reactor::{IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};
use serde_json::json;

pub use program::{NQN, Place, Program, find_or_build};

/// Name, MiB, bytes in a block, domain: two that share data, one with another key and another block.
const VOLUMES: [(&str, u64, u64, &str); 3] =
    [("a", 48, 4096, "shared"), ("b", 48, 4096, "shared"), ("c", 8, 512, ALONE)];
const ALONE: &str = "alone";
const POOL_BYTES: u64 = 1 << 30;
/// How often the domain that is alone is erased.
const ERASURES: u64 = 4;
/// For what comes by itself.
const PATIENCE: Duration = Duration::from_secs(120);

/// Asks again and again.
fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<bool, String>) -> Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so()? {
        if Instant::now() > deadline {
            return Err(format!("waited for {PATIENCE:?} until {what}"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program, `cryptfold`.
    pub program: PathBuf,
    /// Kills under load.
    pub kills: u64,
    /// See the module's head.
    pub seed: u64,
    /// Negative control: the pool is put back to what it was before the load, as if nothing had been flushed.
    pub forget: bool,
    /// Keys change under the load: see [`keys`].
    pub keys: bool,
    /// Tells every round on standard error.
    pub verbose: bool,
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Kills under load, each followed by a restart that was verified.
    pub kills: u64,
    /// Further ones during start-up and recovery.
    pub startup_kills: u64,
    /// Operations that completed.
    pub done: load::Counts,
    /// Operations under way when the program was killed.
    pub cut: u64,
    /// Blocks read back and judged.
    pub judged: u64,
    /// Fragments whose data audits verified.
    pub audited: u64,
    /// All of it.
    pub time: Duration,
    /// Slowest start of those that recovered.
    pub slowest_start: Duration,
    /// Changes of keys that came to their end.
    pub changes: u64,
    /// Kills while keys were being changed.
    pub changes_cut: u64,
    /// Erasures that were cut off: done, and not done.
    pub erasures: [u64; 2],
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let d = &self.done;
        write!(
            f,
            "{} kills under load and {} during start-up survived: {} writes ({} MiB), {} unmaps and write-zeroes, {} flushes, \
             {} reads, {} operations cut off; {} blocks read back and right, audits clean ({} fragments verified); slowest \
             start {} ms; {:.0} s",
            self.kills,
            self.startup_kills,
            d.writes,
            d.written_bytes >> 20,
            d.clears,
            d.flushes,
            d.reads,
            self.cut,
            self.judged,
            self.audited,
            self.slowest_start.as_millis(),
            self.time.as_secs_f64()
        )?;
        if self.changes > 0 {
            let [done, not] = self.erasures;
            let (changes, cut) = (self.changes, self.changes_cut);
            write!(
                f,
                "; {changes} changes of keys, killed {cut} times on their way; {done} of {} erasures done",
                done + not
            )?;
        }
        Ok(())
    }
}

/// Runs in a directory of its own below `TMPDIR` (else /var/tmp), which is left behind when something was wrong.
///
/// # Errors
/// What was wrong, with the seed and the directory.
pub fn run(options: &Options) -> Result<Summary, String> {
    let base = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let dir =
        tempfile::Builder::new().prefix("cryptfold-kill.").tempdir_in(base).map_err(|e| e.to_string())?;
    match campaign(options, dir.path()) {
        Ok(summary) => Ok(summary),
        Err(what) => {
            if options.forget {
                return Err(what);
            }
            let dir = dir.keep();
            Err(format!(
                "seed {}: {what}\nthe pool, its key and the program's log are in {}",
                options.seed,
                dir.display()
            ))
        }
    }
}

fn campaign(options: &Options, dir: &Path) -> Result<Summary, String> {
    let memory = MemoryConfig { fixed_buffers: false, hugepages: false, ..MemoryConfig::default() };
    let config = RuntimeConfig { policy: IdlePolicy::Interrupt, pin: false, memory, ..Default::default() };
    let runtime = Runtime::start(config).map_err(|e| e.to_string())?;
    let mut history = History::new();
    let volumes = VOLUMES.map(|(name, _, block, _)| history.add_volume(name, block as usize)).to_vec();
    let mut run = Campaign {
        options,
        place: Place::prepare(&options.program, dir, POOL_BYTES, configuration)?,
        runtime,
        rng: Rng::new(options.seed),
        history,
        volumes,
        generation: 0,
        usual_start: Duration::ZERO,
        changes: keys::Changes::default(),
        summary: Summary::default(),
    };
    let started = Instant::now();
    let mut program = run.place.start()?;
    run.usual_start = program.start_time;
    for round in 1..=options.kills {
        program = run.round(program).map_err(|e| format!("round {round} of {}: {e}", options.kills))?;
        if options.verbose {
            let s = &run.summary;
            eprintln!(
                "round {round}: started in {} ms; so far {} writes, {} flushes, {} operations cut off, {} start-up kills, {:.0} s",
                program.start_time.as_millis(),
                s.done.writes,
                s.done.flushes,
                s.cut,
                s.startup_kills,
                started.elapsed().as_secs_f64()
            );
        }
    }
    if options.keys {
        program = run.change_and_erase(program, &dir.join("disk"))?;
    }
    run.end(program).map_err(|e| format!("at the orderly end: {e}"))?;
    run.summary.time = started.elapsed();
    Ok(run.summary)
}

struct Campaign<'a> {
    options: &'a Options,
    place: Place,
    runtime: Runtime,
    rng: Rng,
    history: History,
    volumes: Vec<VolumeId>,
    generation: u64,
    usual_start: Duration,
    changes: keys::Changes,
    summary: Summary,
}

impl Campaign<'_> {
    fn round(&mut self, program: Program) -> Result<Program, String> {
        if self.options.forget {
            self.place.save_pool()?;
        }
        // The first round brings data, whose keys the others change.
        let changes = self.options.keys && self.summary.kills > 0;
        let change = if changes { self.changes.next(&program, &mut self.rng)? } else { None };
        let mut call = change.as_ref().map(|c| (c.method, c.params.clone()));
        // Every other call is answered before the load begins, the others race with the kill.
        let first = if self.summary.kills % 2 == 1 { call.take() } else { None };
        if let Some((method, params)) = &first {
            program.rpc(method, params)?;
        }
        let delay = 5 + if self.rng.one_in(3) { self.rng.magnitude(795) } else { self.rng.below(796) };
        let answered = self.load(program, delay, self.volumes.clone(), call)? || first.is_some();
        self.summary.kills += 1;
        if self.options.forget {
            self.place.restore_pool()?;
        }
        // Once in three rounds; in some of those the next start dies too.
        let mut again = self.rng.one_in(3);
        while again {
            let moment = self.startup_moment();
            self.place.start_and_kill(moment)?;
            self.summary.startup_kills += 1;
            again = self.rng.one_in(3);
        }
        let program = self.place.start()?;
        self.usual_start = program.start_time;
        self.summary.slowest_start = self.summary.slowest_start.max(program.start_time);
        if self.options.keys {
            self.changes.judge(&program, change.map(|c| (c, answered)))?;
        }
        self.verify(&program)?;
        Ok(program)
    }

    /// Lets the last change of keys end and sees that nothing is left of what was in clear; then the domain that is alone is erased
    /// again and again, each time cut off.
    fn change_and_erase(&mut self, program: Program, disk: &Path) -> Result<Program, String> {
        self.changes.end(&program, disk)?;
        self.verify(&program)?;
        let mut program = program;
        for n in 1..=ERASURES {
            program = self.erase(program).map_err(|e| format!("erasure {n} of {ERASURES}: {e}"))?;
        }
        (self.summary.changes, self.summary.changes_cut) = (self.changes.ended, self.changes.cut);
        Ok(program)
    }

    fn erase(&mut self, program: Program) -> Result<Program, String> {
        let before = keys::identity(&program, ALONE)?;
        let (method, params) = keys::erase(ALONE);
        // Every other one is answered before the load begins, the others race with the kill.
        let first = self.summary.erasures.iter().sum::<u64>() % 2 == 1;
        if first {
            program.rpc(method, &params)?;
        }
        let delay = self.rng.below(400);
        // Its own volume goes; the load is on those of the other domain.
        let others = self.volumes[..2].to_vec();
        let answered = self.load(program, delay, others, (!first).then_some((method, params)))? || first;
        let program = self.place.start()?;
        let erased = keys::identity(&program, ALONE)? != before;
        if answered && !erased {
            return Err("it was answered, and has not happened".into());
        }
        self.summary.erasures[usize::from(!erased)] += 1;
        if erased {
            // The configuration has made it anew: empty.
            let (name, _, block, _) = VOLUMES[2];
            self.volumes[2] = self.history.add_volume(name, block as usize);
        }
        self.verify(&program)?;
        Ok(program)
    }

    /// When a start is cut off. Most of one is the wait for a sign of life of the pool's last owner; half of the kills go to
    /// what comes then: recovery, volumes, subsystems.
    fn startup_moment(&mut self) -> Duration {
        let usual = self.usual_start.as_micros() as u64;
        let end = usual + 20_000;
        let begin = if self.rng.one_in(2) { 0 } else { usual.saturating_sub(120_000) };
        Duration::from_micros(self.rng.range(begin, end))
    }

    /// Load until the program is dead, which is killed after `delay` ms; somewhere in between it gets a call. Whether that was
    /// answered before.
    fn load(
        &mut self,
        program: Program,
        delay: u64,
        volumes: Vec<VolumeId>,
        call: Option<(&'static str, serde_json::Value)>,
    ) -> Result<bool, String> {
        let before = self.rng.below(delay + 1);
        let load = load::Load {
            options: self.place.connect_options(),
            volumes,
            rng: self.rng.fork(),
            generation: self.generation,
            phase: Arc::default(),
            flushed: Arc::new(AtomicU64::new(0)),
        };
        let (phase, flushed) = (load.phase.clone(), load.flushed.clone());
        // The negative control needs something to forget, a change of keys something to carry over.
        let wanted = match self.options {
            Options { forget: true, .. } => 20,
            Options { keys: true, .. } if self.summary.kills == 0 => 60,
            _ => 0,
        };
        let killer = std::thread::spawn(move || {
            let running = phase.wait_until_running();
            std::thread::sleep(Duration::from_millis(before));
            let call = call.map(|(method, params)| program.begin_rpc(method, &params)).transpose()?;
            std::thread::sleep(Duration::from_millis(delay - before));
            let deadline = Instant::now() + Duration::from_secs(20);
            while running && flushed.load(Ordering::Relaxed) < wanted && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            phase.killed();
            program.kill()?;
            call.map_or(Ok(false), program::Pending::answered)
        });
        let history = std::mem::take(&mut self.history);
        let outcome = self.runtime.handles()[0].block_on(move || load::run(load, history));
        let killed = killer.join().map_err(|_| "the killing thread panicked")?;
        let outcome = outcome.map_err(|e| e.to_string())?;
        self.history = outcome.history;
        self.generation = outcome.generation;
        self.summary.done += outcome.done;
        self.summary.cut += outcome.cut;
        // A program that had ended by itself explains everything else.
        let answered = killed?;
        outcome.verdict.map_err(|e| format!("under load, killed after {delay} ms: {e}"))?;
        Ok(answered)
    }

    /// Reads and judges every block, then asks for the audit.
    fn verify(&mut self, program: &Program) -> Result<(), String> {
        let history = std::mem::take(&mut self.history);
        let (options, volumes) = (self.place.connect_options(), self.volumes.clone());
        let verified = self.runtime.handles()[0].block_on(move || load::verify(options, volumes, history));
        let (history, verdict) = verified.map_err(|e| e.to_string())?;
        self.history = history;
        self.summary.judged += verdict?;
        let report = program.rpc("cryptfold_pool_check", &json!({"lvs_name": "pool", "data": true}))?;
        if report["clean"] != true {
            return Err(format!("the pool's audit: {report:#}"));
        }
        self.summary.audited +=
            report["verified"].as_u64().ok_or("the audit does not say what it verified")?;
        Ok(())
    }

    fn end(&mut self, program: Program) -> Result<(), String> {
        program.stop()?;
        self.history.closed();
        let program = self.place.start()?;
        self.verify(&program)?;
        program.stop()
    }
}

/// The program's configuration, the same for every start.
fn configuration(dir: &Path, port: u16) -> serde_json::Value {
    let call = |method: &str, params: serde_json::Value| json!({"method": method, "params": params});
    let mut bdev = vec![
        call("bdev_uring_create", json!({"name": "disk", "filename": dir.join("disk"), "block_size": 4096})),
        call(
            "bdev_lvol_create_lvstore",
            json!({"bdev_name": "disk", "lvs_name": "pool", "key_file": dir.join("pool.key"), "create_key": true,
                "exist_ok": true}),
        ),
    ];
    let nqn = program::NQN;
    let mut nvmf = vec![
        call("nvmf_create_transport", json!({"trtype": "TCP"})),
        call("nvmf_create_subsystem", json!({"nqn": nqn, "allow_any_host": true, "serial_number": "KILL"})),
    ];
    for (nsid, (name, mib, block, domain)) in (1..).zip(VOLUMES) {
        bdev.push(call(
            "bdev_lvol_create",
            json!({"lvs_name": "pool", "lvol_name": name, "size_in_mib": mib, "block_size": block, "domain": domain,
                "thin_provision": true, "exist_ok": true}),
        ));
        let namespace = json!({"nsid": nsid, "bdev_name": format!("pool/{name}")});
        nvmf.push(call("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": namespace})));
    }
    let address =
        json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()});
    nvmf.push(call("nvmf_subsystem_add_listener", json!({"nqn": nqn, "listen_address": address})));
    json!({"subsystems": [{"subsystem": "bdev", "config": bdev}, {"subsystem": "nvmf", "config": nvmf}]})
}
