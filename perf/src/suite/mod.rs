//! `cryptfold-perf suite`: a declared matrix, measured in interleaved rounds, as JSON and as one HTML page.
//!
//! A *case* is one combination of operation, block size, depth, cores, data and path; a *stage* is a target that serves several
//! of them. Every round starts each stage's target afresh, fills it, measures its cases and ends it, in the other order in
//! every second round. Targets and loads are processes of their own. What the cases of a stage share, in one round, is the
//! target: its caches, and what earlier ones wrote.

mod compare;
mod cpus;
mod fio;
mod host;
mod html;
mod machine;
mod matrix;
mod process;
mod record;
mod roofline;
mod rounds;
mod svg;
mod target;
mod warnings;

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::load::Cores;
use crate::report::table;
use cpus::Cpus;
use host::Kind;
use machine::Description;
use matrix::Matrix;
use process::{Failed, Stop};
use record::{FORMAT, LeftOut, Measured, Record};
use rounds::Rounds;

/// Measures a matrix of loads, and writes OUT.json and OUT.html (self-contained)
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The matrix (TOML) [default: a built-in one; --print-matrix shows it]
    #[arg(long, value_name = "FILE")]
    matrix: Option<PathBuf>,
    /// A small built-in matrix, about a minute
    #[arg(long, conflicts_with = "matrix")]
    quick: bool,
    /// Print the matrix and end
    #[arg(long)]
    print_matrix: bool,
    /// Print the cases' names and end
    #[arg(long)]
    list: bool,
    /// Write a fio job for each case into this directory and end
    #[arg(long, value_name = "DIR")]
    fio_jobs: Option<PathBuf>,
    /// Only cases with this in their name
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Rounds, instead of the matrix's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Seconds measured of each case in each round, instead of the matrix's
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Where the report goes, without its ending
    #[arg(long, default_value = "cryptfold-suite", value_name = "OUT")]
    out: PathBuf,
    /// An earlier run's JSON: what has changed, and whether that is beyond the spread
    #[arg(long, value_name = "OLD.json")]
    compare: Option<PathBuf>,
    /// Another target, measured in alternation with ours: 192.0.2.1:4420/nqn.2024-01.io.example:disk
    #[arg(long, value_name = "ADDRESS/NQN", value_parser = OtherAt::parse)]
    target: Option<OtherAt>,
    /// Its namespace
    #[arg(long, default_value_t = 1, requires = "target")]
    target_nsid: u32,
    /// Its key for the TLS cases (NVMeTLSkey-1:...)
    #[arg(long, requires = "target", value_name = "FILE")]
    target_psk: Option<PathBuf>,
    /// The host name to use there
    #[arg(long, requires = "target", default_value = target::HOST, value_name = "NQN")]
    target_hostnqn: String,
    /// Its JSON-RPC socket (SPDK's has the same methods), for what it spends
    #[arg(long, requires = "target", value_name = "SOCKET")]
    target_rpc: Option<PathBuf>,
    /// Its data may be overwritten; without this only reads are measured there
    #[arg(long, requires = "target")]
    overwrite: bool,
    /// Measure only that target, none of ours
    #[arg(long, requires = "target")]
    no_own: bool,
    /// Record the stages of our target's I/O, in one more pass after the rounds
    #[arg(long, conflicts_with = "no_own")]
    trace: bool,
    /// The target's program [default: `cryptfold` beside this program, or in PATH]
    #[arg(long, value_name = "PROGRAM")]
    cryptfold: Option<PathBuf>,
    /// CPUs of our target; a case takes as many as it wants from the front [default: the first half of the physical cores]
    #[arg(long, value_name = "LIST")]
    target_cores: Option<Cores>,
    /// CPUs of the load [default: the other physical cores]
    #[arg(long, value_name = "LIST")]
    host_cores: Option<Cores>,
}

/// Where another target is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct OtherAt {
    traddr: String,
    trsvcid: String,
    subnqn: String,
}

impl OtherAt {
    fn parse(text: &str) -> Result<OtherAt, String> {
        let bad = || {
            format!("\"{text}\" is no ADDRESS/NQN; an example: 192.0.2.1:4420/nqn.2024-01.io.example:disk")
        };
        let (address, subnqn) = text.split_once('/').ok_or_else(bad)?;
        let (traddr, trsvcid) = match address.strip_prefix('[') {
            Some(rest) => {
                let (ip, port) = rest.split_once(']').ok_or_else(bad)?;
                (ip, port.strip_prefix(':').unwrap_or("4420"))
            }
            None => address.split_once(':').unwrap_or((address, "4420")),
        };
        if traddr.is_empty() || subnqn.is_empty() || trsvcid.parse::<u16>().is_err() {
            return Err(bad());
        }
        Ok(OtherAt { traddr: traddr.into(), trsvcid: trsvcid.into(), subnqn: subnqn.into() })
    }

    fn text(&self) -> String {
        format!("{}:{}/{}", self.traddr, self.trsvcid, self.subnqn)
    }
}

/// The matrix as the options want it.
fn matrix(args: &Args) -> Result<(String, Matrix), String> {
    let (text, mut matrix) = match &args.matrix {
        Some(file) => Matrix::read(file)?,
        None => {
            let text = if args.quick { matrix::QUICK } else { matrix::DEFAULT };
            (text.to_owned(), Matrix::parse("built-in", text).map_err(|e| e.to_string())?)
        }
    };
    if let Some(rounds) = args.rounds {
        matrix.effort.rounds = rounds;
    }
    if let Some(seconds) = args.seconds {
        if !(seconds > 0.0 && seconds <= 3600.0) {
            return Err(format!("--seconds {seconds}: above 0, at most 3600"));
        }
        matrix.effort.seconds = seconds;
    }
    if let Some(only) = &args.only {
        matrix.cases.retain(|case| case.name().contains(only.as_str()));
        if matrix.cases.is_empty() {
            return Err(format!("--only {only}: no case has this in its name; --list shows all"));
        }
    }
    if args.no_own {
        // What differs on our side only is the same at another target.
        let mut seen = std::collections::HashSet::new();
        let load =
            |c: &matrix::Case| (Kind::of(c.path), c.cores, c.data.clone(), c.op, c.bs, c.depth, c.read_pct);
        matrix.cases.retain(|c| seen.insert(load(c)));
    }
    Ok((text, matrix))
}

/// `cryptfold`, which this program starts.
fn program(args: &Args) -> Result<PathBuf, String> {
    if let Some(program) = &args.cryptfold {
        return Ok(program.clone());
    }
    let beside = std::env::current_exe().map_err(|e| e.to_string())?.with_file_name("cryptfold");
    if beside.exists() {
        return Ok(beside);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|d| d.join("cryptfold")).find(|p| p.is_file()).ok_or_else(|| {
        format!(
            "{} is missing, and PATH has no cryptfold: build it, or name it with --cryptfold",
            beside.display()
        )
    })
}

fn new_record(args: &Args, matrix: &Matrix, program: Option<&Path>, stop: &Stop) -> Record {
    let mut cpus = Cpus::choose(args.target_cores.as_ref(), args.host_cores.as_ref());
    if args.no_own {
        cpus = Cpus { host: cpus.host, ..Cpus::default() };
    }
    let command = std::env::args().map(|a| process::quoted(&a)).collect::<Vec<_>>().join(" ");
    Record {
        format: FORMAT,
        complete: false,
        rounds_done: 0,
        started_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        took_s: 0.0,
        command,
        machine: Description::this(program, stop),
        matrix: matrix.clone(),
        other: args.target.as_ref().map(OtherAt::text),
        overwrite: args.overwrite,
        cpus,
        cases: Vec::new(),
        left_out: Vec::new(),
    }
}

/// Writes both files.
fn save(
    out: &Path,
    record: &mut Record,
    old: Option<&Record>,
    begin: Instant,
) -> Result<[PathBuf; 2], String> {
    record.took_s = begin.elapsed().as_secs_f64();
    record.machine.load_after = machine::load();
    record.cases.iter_mut().for_each(|c| c.summary = record::Summary::of(&c.ours));
    let named = |ending: &str| {
        let mut name = out.as_os_str().to_owned();
        name.push(ending);
        PathBuf::from(name)
    };
    let files = [named(".json"), named(".html")];
    let json = serde_json::to_string_pretty(record).map_err(|e| e.to_string())? + "\n";
    for (file, text) in files.iter().zip([json, html::page(record, old)]) {
        // Never half a file: the last round's stays until this one is whole.
        let new = file.with_extension("new");
        let put = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, file));
        put.map_err(|e| format!("{}: {e}", file.display()))?;
    }
    Ok(files)
}

/// Measures and reports.
///
/// # Errors
/// What went wrong, in one line: a matrix that makes no sense, a file that can not be written, cases that failed, Ctrl-C.
pub fn run(args: &Args) -> Result<(), String> {
    let (text, matrix) = matrix(args)?;
    if args.print_matrix {
        print!("{text}");
        return Ok(());
    }
    if args.list {
        matrix.cases.iter().for_each(|case| println!("{}", case.name()));
        return Ok(());
    }
    if let Some(dir) = &args.fio_jobs {
        let jobs = fio::write(dir, &matrix)?;
        println!("{jobs} jobs in {}; engine.fio there says how fio reaches the namespace", dir.display());
        return Ok(());
    }
    let old = args.compare.as_deref().map(Record::read).transpose()?;
    let program = if args.no_own { None } else { Some(program(args)?) };
    let stop = Stop::on_signals()?;
    let begin = Instant::now();
    let mut record = new_record(args, &matrix, program.as_deref(), &stop);
    // Before anything is measured: that the files can be written at all.
    save(&args.out, &mut record, old.as_ref(), begin)?;
    let mut rounds = Rounds::new(args, &matrix, program.as_deref(), record.cpus.clone(), &stop)?;
    let ended = rounds.run(&mut record, |record| save(&args.out, record, old.as_ref(), begin).map(drop));
    drop(rounds);
    record.complete = ended.is_ok();
    let files = save(&args.out, &mut record, old.as_ref(), begin)?;
    print!("{}", summary(&record, old.as_ref()));
    println!("\n{} and {}", files[0].display(), files[1].display());
    match ended {
        Err(Failed::Interrupted) => {
            let (done, all) = (record.rounds_done, matrix.effort.rounds);
            Err(format!(
                "interrupted after {done} of {all} whole rounds; the report has what was measured, and says so"
            ))
        }
        Err(Failed::Step(what)) => Err(what),
        Ok(()) => match record.left_out.iter().find(|l| l.failed) {
            Some(LeftOut { name, why, .. }) => Err(format!("{name} failed: {why}")),
            None => Ok(()),
        },
    }
}

/// The table for the terminal.
fn summary(record: &Record, old: Option<&Record>) -> String {
    let mut head = ["case", "IOPS", "+-%", "MB/s", "p50 us", "p99 us", "core us/IO", "of parts"]
        .map(str::to_owned)
        .to_vec();
    head.extend(record.other.iter().map(|_| "to the other".to_owned()));
    head.extend(old.iter().map(|_| "since then".to_owned()));
    let mut rows = vec![head];
    for case in &record.cases {
        let Measured { name, summary: s, .. } = case;
        let cost = s.core_us_per_io;
        let share = case.roofline_iops().map(|roof| format!("{:.0}%", 100.0 * s.iops.median / roof));
        let mut row = vec![
            name.clone(),
            format!("{:.0}", s.iops.median),
            format!("{:.0}", 50.0 * (s.iops.max - s.iops.min) / s.iops.median.max(1e-9)),
            format!("{:.0}", case.bytes_s(s.iops.median) / 1e6),
            format!("{:.0}", s.p50_us.median),
            format!("{:.0}", s.p99_us.median),
            if cost.rounds > 0 { format!("{:.2}", cost.median) } else { String::new() },
            share.unwrap_or_default(),
        ];
        if record.other.is_some() {
            let verdict = compare::paired(&case.ours, &case.other, |s| s.iops);
            row.push(verdict.map_or_else(String::new, |v| v.text()));
        }
        if let Some(old) = old {
            let before = record.before(old, case).map(|c| record::Summary::of(&c.ours).iops);
            let verdict = before.and_then(|b| compare::apart(&s.iops, &b));
            row.push(verdict.map_or_else(String::new, |v| v.text()));
        }
        rows.push(row);
    }
    let mut out = table(&rows, 1);
    out.extend(warnings::warnings(record, old).iter().map(|w| format!("{w}\n")));
    for LeftOut { name, why, .. } in record.left_out.iter().filter(|l| !l.failed) {
        out += &format!("{name}: left out: {why}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_targets_address() {
        let at =
            |a: &str, p: &str, n: &str| OtherAt { traddr: a.into(), trsvcid: p.into(), subnqn: n.into() };
        for (text, other) in [
            ("192.0.2.1:4421/nqn.a:b", at("192.0.2.1", "4421", "nqn.a:b")),
            ("host/nqn.a:b/c", at("host", "4420", "nqn.a:b/c")),
            ("[2001:db8::1]:4420/nqn.a", at("2001:db8::1", "4420", "nqn.a")),
            ("[::1]/nqn.a", at("::1", "4420", "nqn.a")),
        ] {
            assert_eq!(OtherAt::parse(text), Ok(other), "{text}");
        }
        for bad in ["", "host", "host/", "/nqn", "host:x/nqn", "host:70000/nqn", "[::1/nqn"] {
            assert!(OtherAt::parse(bad).is_err_and(|e| e.contains("ADDRESS/NQN")), "{bad}");
        }
    }
}
