//! The rounds: which target runs when, what loads it, and what that gave.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::Command;

use indicatif::{ProgressBar, ProgressStyle};
use tempfile::TempDir;

use super::cpus::Cpus;
use super::host::{self, Host, Kind, Place};
use super::matrix::{Case, Layers, Matrix};
use super::process::{Failed, Stop, line, output};
use super::record::{Cost, LeftOut, Measured, Record, Sample};
use super::roofline::Parts;
use super::target::{self, Own, Probe};
use super::{Args, OtherAt};
use crate::load::Rw;

/// Bytes of real files where the matrix does not say.
const FILES_MAX: &str = "64M";

/// The other target.
struct Other {
    place: Place,
    overwrite: bool,
}

impl Other {
    fn new(args: &Args, at: &OtherAt) -> Other {
        let place = Place {
            traddr: at.traddr.clone(),
            trsvcid: at.trsvcid.clone(),
            subnqn: at.subnqn.clone(),
            nsid: args.target_nsid,
            hostnqn: args.target_hostnqn.clone(),
            psk: args.target_psk.clone(),
        };
        Other { place, overwrite: args.overwrite }
    }

    /// Why a case is not measured there.
    fn refuses(&self, case: &Case) -> Option<&'static str> {
        match () {
            () if !self.overwrite && !matches!(case.op, Rw::Read | Rw::RandRead) => {
                Some("it writes, and --overwrite was not given")
            }
            () if case.path == Layers::Tls && self.place.psk.is_none() => Some("there is no --target-psk"),
            () => None,
        }
    }
}

/// A target of ours with what it serves.
struct Running {
    /// Ends before its folder goes.
    own: Option<Own>,
    place: Option<Place>,
    /// What was run for it.
    setup: Vec<String>,
    dir: TempDir,
}

/// What is needed to go round.
pub struct Rounds<'a> {
    matrix: &'a Matrix,
    program: Option<&'a Path>,
    perf: PathBuf,
    dir: TempDir,
    cpus: Cpus,
    other: Option<Other>,
    /// The other target's socket.
    probe: RefCell<Option<Probe>>,
    trace: bool,
    stop: &'a Stop,
    bar: ProgressBar,
    files: BTreeMap<String, PathBuf>,
    parts: Parts,
    /// Cases that failed: they are not tried again.
    failed: BTreeSet<String>,
}

fn list(cores: &[usize]) -> String {
    cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

fn progress() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {elapsed}, about {eta} more  {wide_msg}");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

impl<'a> Rounds<'a> {
    /// Prepares them; nothing runs yet.
    ///
    /// # Errors
    /// What went wrong, in one line.
    pub fn new(
        args: &Args,
        matrix: &'a Matrix,
        program: Option<&'a Path>,
        cpus: Cpus,
        stop: &'a Stop,
    ) -> Result<Rounds<'a>, String> {
        let dir = tempfile::Builder::new().prefix("cryptfold-suite-").tempdir();
        let probe = match (&args.target_rpc, &args.target) {
            (Some(socket), Some(at)) => Some(Probe::new(socket, &at.subnqn, args.target_nsid)?),
            _ => None,
        };
        Ok(Rounds {
            matrix,
            program,
            perf: std::env::current_exe().map_err(|e| e.to_string())?,
            dir: dir.map_err(|e| format!("a temporary folder: {e}"))?,
            cpus,
            other: args.target.as_ref().map(|at| Other::new(args, at)),
            probe: RefCell::new(probe),
            trace: args.trace,
            stop,
            bar: progress(),
            files: BTreeMap::new(),
            parts: Parts::default(),
            failed: BTreeSet::new(),
        })
    }

    /// Measures all rounds into the record; `saved` gets it after each.
    ///
    /// # Errors
    /// What ended it early; what was measured until then is in the record.
    pub fn run(
        &mut self,
        record: &mut Record,
        mut saved: impl FnMut(&mut Record) -> Result<(), String>,
    ) -> Result<(), Failed> {
        let cases = self.possible(record);
        let rounds = self.matrix.effort.rounds;
        self.bar.set_length(u64::from(rounds + u32::from(self.trace)) * cases.len() as u64);
        self.images(&cases)?;
        if self.program.is_some() {
            let (perf, dir, bar) = (&self.perf, self.dir.path(), &self.bar);
            let tick = |name: &str| bar.set_message(format!("the parts alone: {name}"));
            self.parts = Parts::measure(perf, dir, self.matrix, &cases, &self.files, self.stop, tick)?;
        }
        let mut stages: Vec<Vec<Case>> = Vec::new();
        for case in cases {
            match stages.last_mut().filter(|s| same_stage(&s[0], &case)) {
                Some(stage) => stage.push(case),
                None => stages.push(vec![case]),
            }
        }
        let passes = (1..=rounds).chain(self.trace.then_some(0));
        for round in passes {
            if !std::io::stderr().is_terminal() {
                eprintln!(
                    "{}",
                    if round == 0 { "traced".into() } else { format!("round {round} of {rounds}") }
                );
            }
            for stage in &stages {
                match self.stage(record, stage, round) {
                    Err(Failed::Step(why)) => stage.iter().for_each(|case| self.fail(record, case, &why)),
                    other => other?,
                }
            }
            record.rounds_done = record.rounds_done.max(round);
            saved(record)?;
            stages.reverse();
            stages.iter_mut().for_each(|s| s.reverse());
        }
        self.bar.finish_and_clear();
        Ok(())
    }

    /// The cases that this machine can measure; the others are left out, with the reason.
    fn possible(&self, record: &mut Record) -> Vec<Case> {
        let mut cases = Vec::new();
        for case in &self.matrix.cases {
            let wanted = case.cores as usize;
            let target = if self.program.is_some() { self.cpus.target.len() } else { wanted };
            let alone = self.other.as_ref().filter(|_| self.program.is_none());
            let why = match alone.and_then(|o| o.refuses(case)) {
                Some(why) => Some(why.to_owned()),
                None if wanted > target || wanted > self.cpus.host.len() => Some(format!(
                    "it wants {wanted} CPUs for each of target and host; there are {target} and {}",
                    self.cpus.host.len()
                )),
                None => None,
            };
            match why {
                Some(why) => record.left_out.push(LeftOut { name: case.name(), why, failed: false }),
                None => cases.push(case.clone()),
            }
        }
        cases
    }

    /// Images of the real files that cases write.
    fn images(&mut self, cases: &[Case]) -> Result<(), Failed> {
        let wanted: BTreeSet<&str> = cases.iter().map(|c| c.data.as_str()).collect();
        for name in wanted {
            let data = &self.matrix.data[name];
            let Some(tree) = &data.tree else { continue };
            self.bar.set_message(format!("files of {}", tree.display()));
            let image = self.dir.path().join(format!("image-{name}"));
            let max = data.max.map_or_else(|| FILES_MAX.to_owned(), |m| m.0.to_string());
            let mut command = Command::new(&self.perf);
            command.args(["image", "make", "--max", &max, "--out"]).arg(&image).arg(tree);
            output(&mut command, self.stop)?;
            self.files.insert(name.to_owned(), image);
        }
        Ok(())
    }

    fn fail(&mut self, record: &mut Record, case: &Case, why: &str) {
        let name = case.name();
        if self.failed.insert(name.clone()) {
            self.bar.suspend(|| eprintln!("{name}: {why}"));
            record.left_out.push(LeftOut { name, why: why.into(), failed: true });
        }
    }

    /// Starts our target, if there is one, and fills what the cases read.
    fn bring_up(&self, cases: &[Case]) -> Result<Running, Failed> {
        let (first, dir) = (&cases[0], tempfile::Builder::new().prefix("stage-").tempdir_in(self.dir.path()));
        let dir = dir.map_err(|e| format!("a temporary folder: {e}"))?;
        let mut running = Running { own: None, place: None, setup: Vec::new(), dir };
        if let Some(program) = self.program {
            self.bar.set_message(format!("{}: start", first.path.name()));
            let plan = target::Plan {
                program,
                dir: running.dir.path(),
                cores: list(&self.cpus.target[..first.cores as usize]),
                path: first.path,
                size: self.matrix.effort.size,
                queue_entries: cases.iter().map(|c| c.depth + 1).max().unwrap_or(0).max(128),
            };
            let own = Own::start(&plan, self.stop)?;
            running.place = Some(Place {
                traddr: "127.0.0.1".into(),
                trsvcid: own.port.clone(),
                subnqn: target::NQN.into(),
                nsid: 1,
                hostnqn: target::HOST.into(),
                psk: Some(running.dir.path().join("psk")),
            });
            running.setup.clone_from(&own.commands);
            running.own = Some(own);
        }
        self.bar.set_message(format!("{}, {}: fill", first.path.name(), first.data));
        let (host, data) = (self.host(running.dir.path(), first), &self.matrix.data[&first.data]);
        let kind = Kind::of(first.path);
        let ours = running.place.as_ref();
        let theirs =
            self.other.as_ref().filter(|o| o.overwrite && cases.iter().any(|c| o.refuses(c).is_none()));
        for place in [ours, theirs.map(|o| &o.place)].into_iter().flatten() {
            let mut fill = host.fill_command(place, kind, first, data)?;
            if ours.is_some_and(|ours| std::ptr::eq(ours, place)) {
                running.setup.push(line(&fill));
            }
            output(&mut fill, self.stop)?;
        }
        Ok(running)
    }

    fn host<'h>(&'h self, dir: &'h Path, case: &Case) -> Host<'h> {
        Host {
            perf: &self.perf,
            cores: list(&self.cpus.host[..case.cores as usize]),
            dir,
            effort: &self.matrix.effort,
            files: self.files.get(&case.data).map(PathBuf::as_path),
        }
    }

    /// One target of ours (if any), and all of its cases once. Round 0 only traces.
    fn stage(&mut self, record: &mut Record, stage: &[Case], round: u32) -> Result<(), Failed> {
        let cases: Vec<Case> = stage.iter().filter(|c| !self.failed.contains(&c.name())).cloned().collect();
        if cases.is_empty() {
            return Ok(());
        }
        let mut running = self.bring_up(&cases)?;
        for case in &cases {
            self.bar.set_message(case.name());
            self.bar.inc(1);
            let ended = match round {
                0 => self.traced(record, &mut running, case),
                _ => self.case(record, &mut running, case, round),
            };
            match ended {
                Err(Failed::Step(why)) => self.fail(record, case, &why),
                other => other?,
            }
        }
        Ok(())
    }

    /// A case at our target and at the other one, the one or the other first by turns.
    fn case(
        &mut self,
        record: &mut Record,
        running: &mut Running,
        case: &Case,
        round: u32,
    ) -> Result<(), Failed> {
        let Running { own, place, setup, dir } = running;
        let host = self.host(dir.path(), case);
        let (kind, data) = (Kind::of(case.path), &self.matrix.data[&case.data]);
        let (mut ours, mut theirs, mut command) = (None, None, String::new());
        for is_ours in if round.is_multiple_of(2) { [false, true] } else { [true, false] } {
            let at = match is_ours {
                true => place.as_ref(),
                false => self.other.as_ref().filter(|o| o.refuses(case).is_none()).map(|o| &o.place),
            };
            let Some(at) = at else { continue };
            let mut load = host.case_command(at, kind, case, data)?;
            if command.is_empty() || is_ours {
                command = line(&load);
            }
            let mut other = self.probe.borrow_mut();
            let probe = if is_ours { own.as_mut().map(|o| &mut o.probe) } else { other.as_mut() };
            let sample = measured(&mut load, probe, self.stop, round)?;
            *(if is_ours { &mut ours } else { &mut theirs }) = Some(sample);
        }
        self.keep(record, case, [ours, theirs], setup, command);
        Ok(())
    }

    /// A case once more, with its stages.
    fn traced(&mut self, record: &mut Record, running: &mut Running, case: &Case) -> Result<(), Failed> {
        let Running { own: Some(own), place: Some(place), dir, .. } = running else { return Ok(()) };
        let host = self.host(dir.path(), case);
        let mut load = host.case_command(place, Kind::of(case.path), case, &self.matrix.data[&case.data])?;
        own.probe.trace()?;
        let ran = host::run(&mut load, self.stop, 0);
        // Off whatever the load said: cases that follow have this target too.
        let stages = own.probe.traced();
        ran?;
        let stages = stages?;
        if let Some(known) = record.cases.iter_mut().find(|c| c.name == case.name()) {
            known.stages = stages;
        }
        Ok(())
    }

    fn keep(
        &self,
        record: &mut Record,
        case: &Case,
        found: [Option<Sample>; 2],
        setup: &[String],
        command: String,
    ) {
        let [ours, other] = found;
        // Of a target that is measured alone, its figures are the report's.
        let (ours, other) = if self.program.is_some() { (ours, other) } else { (other, None) };
        if ours.is_none() {
            return;
        }
        let name = case.name();
        let at = record.cases.iter().position(|c| c.name == name).unwrap_or_else(|| {
            let parts = self.parts.of(case, &self.matrix.data[&case.data]);
            record.cases.push(Measured::new(case, parts));
            record.cases.len() - 1
        });
        let known = &mut record.cases[at];
        (known.setup, known.command) = (setup.to_vec(), command);
        known.ours.extend(ours);
        known.other.extend(other);
    }
}

fn same_stage(a: &Case, b: &Case) -> bool {
    (a.path, a.cores, &a.data) == (b.path, b.cores, &b.data)
}

/// Runs a load; what the target spent on it, if its socket is known.
fn measured(
    load: &mut Command,
    probe: Option<&mut Probe>,
    stop: &Stop,
    round: u32,
) -> Result<Sample, Failed> {
    let Some(probe) = probe else { return host::run(load, stop, round) };
    let before = probe.done()?;
    let mut sample = host::run(load, stop, round)?;
    let after = probe.done()?;
    sample.cost = Some(Cost {
        busy_s: after.busy_s - before.busy_s,
        ios: after.ios.saturating_sub(before.ios),
        bytes: after.bytes.saturating_sub(before.bytes),
    });
    Ok(sample)
}
