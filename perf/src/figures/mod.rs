//! `cryptfold-perf figures`: the figures that `perf/README.md` shows, each with what it is compared with.
//!
//! A *group* sets its devices up once; its *subjects* are then measured one after the other in every round, so that a
//! subject and its baseline see the same machine. A value is the median over the rounds, a ratio the median of the
//! ratios within a round.
//!
//! Units: rates are operations or 10^6 bytes a second; times in seconds.

mod bare;
mod chain;
mod machine;
mod pool;
mod tcp;

use std::io::Write;
use std::time::Duration;

use serde::Serialize;

pub(crate) use chain::{ram_disk, runtime};

use crate::report::{self, Machine};

/// Measures the project's figures, one core for the thing measured: in one process, in alternating rounds, medians, and
/// ratios to bare loops of the same run.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Only figures whose name contains this, and what they are compared with (null, crypto, tcp, pool, modes for whole groups;
    /// "modes,write-128k": of that group, those with this in their names).
    #[arg(long, value_name = "NAME")]
    pub only: Option<String>,
    /// Seconds per subject and round.
    #[arg(long, default_value_t = 1.0, value_name = "S")]
    pub seconds: f64,
    /// Rounds.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

impl Args {
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only.split(',').all(|word| name.contains(word)))
    }
}

/// One subject in one round.
struct Sample {
    /// Operations a second.
    per_second: f64,
    /// Share of the time in which the core was given to somebody else, percent.
    waited_pct: f64,
    /// 99.9th percentile of the latencies, µs, where there are any.
    p99_9_us: Option<f64>,
}

impl Sample {
    fn new(per_second: f64, waited_pct: f64) -> Sample {
        Sample { per_second, waited_pct, p99_9_us: None }
    }
}

/// How a rate is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Unit {
    /// Operations a second.
    #[serde(rename = "ops/s")]
    Ops,
    /// 10^6 bytes a second.
    #[serde(rename = "MB/s")]
    Megabytes,
}

type Measure<'a> = Box<dyn FnMut(Duration) -> Result<Sample, String> + 'a>;

/// Something that is measured.
struct Subject<'a> {
    name: &'static str,
    unit: Unit,
    bytes_per_op: usize,
    /// What it is compared with: a subject of the same group.
    of: Option<&'static str>,
    /// The same on one core: the share is then divided by that one's share.
    scales: Option<&'static str>,
    /// What is wanted: a rate, or with `of` a share of that.
    goal: Option<f64>,
    measure: Measure<'a>,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
struct Row {
    group: &'static str,
    name: &'static str,
    unit: Unit,
    bytes_per_op: usize,
    value: f64,
    rounds: Vec<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    of: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scales: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    goal: Option<f64>,
    /// 99.9th percentile of the latencies, median over the rounds, µs.
    #[serde(skip_serializing_if = "Option::is_none")]
    p99_9_us: Option<f64>,
    /// Share of the time in which others had the core, percent, worst round.
    waited_pct: f64,
}

#[derive(Clone, Debug, Serialize)]
struct Report {
    machine: Machine,
    /// Runnable processes over the last minute, before and after.
    load: [f64; 2],
    /// Memory of this process in 2 MiB pages at the end of each group, MiB.
    huge_mib: u64,
    results: Vec<Row>,
}

type Rounds<'r> = &'r dyn Fn(&'static str, Vec<Subject<'_>>) -> Result<Vec<Row>, String>;
type Group = fn(Rounds<'_>) -> Result<Vec<Row>, String>;

const GROUPS: [(&str, Group); 5] = [
    ("null", chain::null),
    ("crypto", chain::crypto),
    ("tcp", tcp::tcp),
    ("pool", pool::pool),
    ("modes", pool::modes),
];

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    match n {
        0 => 0.0,
        _ if n.is_multiple_of(2) => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
        _ => sorted[n / 2],
    }
}

fn round_to(x: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (x * scale).round() / scale
}

/// Measures all subjects in turns.
fn alternate(args: &Args, group: &'static str, mut subjects: Vec<Subject<'_>>) -> Result<Vec<Row>, String> {
    let time = Duration::from_secs_f64(args.seconds);
    let mut wanted: Vec<_> = subjects.iter().map(|s| s.name).filter(|name| args.wants(name)).collect();
    for _ in 0..2 {
        let of = subjects.iter().filter(|s| wanted.contains(&s.name)).flat_map(|s| [s.of, s.scales]);
        wanted.extend(of.flatten().collect::<Vec<_>>());
    }
    subjects.retain(|s| args.wants(group) || wanted.contains(&s.name));
    let mut values = vec![Vec::new(); subjects.len()];
    let mut latencies = vec![Vec::new(); subjects.len()];
    let mut waited = vec![0f64; subjects.len()];
    for _ in 0..args.rounds {
        for (i, s) in subjects.iter_mut().enumerate() {
            let sample = (s.measure)(time).map_err(|e| format!("{}: {e}", s.name))?;
            let scale = if s.unit == Unit::Ops { 1.0 } else { s.bytes_per_op as f64 / 1e6 };
            values[i].push(round_to(sample.per_second * scale, if s.unit == Unit::Ops { 0 } else { 1 }));
            latencies[i].extend(sample.p99_9_us);
            waited[i] = waited[i].max(sample.waited_pct);
        }
    }
    let place = |name| subjects.iter().position(|s| s.name == name);
    let shares = |i: usize, of| -> Vec<f64> {
        let base = place(of).map(|b| &values[b]);
        values[i].iter().zip(base.into_iter().flatten()).map(|(v, base)| v / base.max(1e-9)).collect()
    };
    let row = |(i, s): (usize, &Subject<'_>)| {
        let ratios = s.of.map(|of| {
            let mut ratios = shares(i, of);
            if let Some(one) = s.scales.and_then(&place) {
                let ones = subjects[one].of.map(|of| shares(one, of)).unwrap_or_default();
                ratios.iter_mut().zip(ones).for_each(|(ratio, one)| *ratio /= one.max(1e-9));
            }
            round_to(median(&ratios), 4)
        });
        Row {
            group,
            name: s.name,
            unit: s.unit,
            bytes_per_op: s.bytes_per_op,
            value: median(&values[i]),
            rounds: values[i].clone(),
            of: s.of,
            scales: s.scales,
            ratio: ratios,
            goal: s.goal,
            p99_9_us: (!latencies[i].is_empty()).then(|| median(&latencies[i])),
            waited_pct: round_to(waited[i], 1),
        }
    };
    Ok(subjects.iter().enumerate().map(row).collect())
}

fn measure(args: &Args) -> Result<Report, String> {
    if !(args.seconds > 0.0 && args.seconds <= 600.0) {
        return Err(format!("--seconds {}: above 0, at most 600", args.seconds));
    }
    let before = machine::load();
    let mut results = Vec::new();
    // A figure's name begins with its group's.
    let concerns =
        |g: &(&str, Group)| args.wants(g.0) || args.only.as_ref().is_some_and(|o| o.starts_with(g.0));
    for (_, group) in GROUPS.into_iter().filter(concerns) {
        results.extend(group(&|name, subjects| alternate(args, name, subjects))?);
    }
    if results.is_empty() {
        let groups: Vec<&str> = GROUPS.iter().map(|g| g.0).collect();
        return Err(format!(
            "--only {}: no figure's name has this in it; groups are {}",
            args.only.as_deref().unwrap_or(""),
            groups.join(", ")
        ));
    }
    Ok(Report {
        machine: Machine::this(),
        load: [before, machine::load()],
        huge_mib: machine::huge_mib(),
        results,
    })
}

/// The subcommand: measures and prints.
///
/// # Errors
/// A parameter out of range, a device or connection that can not be set up, an I/O that failed.
pub fn run(args: &Args) -> Result<(), String> {
    let report = measure(args)?;
    let text = if args.json {
        serde_json::to_string(&report).map_err(|e| e.to_string())? + "\n"
    } else {
        text(&report)
    };
    std::io::stdout().write_all(text.as_bytes()).map_err(|e| format!("writing the report: {e}"))
}

fn text(report: &Report) -> String {
    let mut rows = vec![
        ["figure", "rate", "unit", "of", "share", "goal", "p99.9", "core lost"].map(str::to_owned).to_vec(),
    ];
    for r in &report.results {
        let percent = |x: f64| format!("{:.1}%", 100.0 * x);
        let goal = match (r.goal, r.of) {
            (Some(g), Some(_)) => percent(g),
            (Some(g), None) => format!("{g:.0}"),
            (None, _) => String::new(),
        };
        rows.push(vec![
            r.name.to_owned(),
            format!("{:.0}", r.value),
            if r.unit == Unit::Ops { "ops/s".into() } else { "MB/s".into() },
            match r.scales {
                Some(one) => format!("{one}'s share"),
                None => r.of.unwrap_or_default().to_owned(),
            },
            r.ratio.map(percent).unwrap_or_default(),
            goal,
            r.p99_9_us.map(|us| format!("{us:.0} us")).unwrap_or_default(),
            format!("{:.1}%", r.waited_pct),
        ]);
    }
    format!(
        "{}\nload {:.2} before, {:.2} after; {} MiB in 2 MiB pages\n\n{}",
        report.machine.line(),
        report.load[0],
        report.load[1],
        report.huge_mib,
        report::table(&rows, 1)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> Args {
        Args { only: None, seconds: 0.01, rounds: 3, json: false }
    }

    #[test]
    fn medians_and_ratios_are_taken_within_rounds() {
        let mut turn = 0.0;
        let machine = std::cell::Cell::new(0.0);
        let base = Subject {
            name: "base",
            unit: Unit::Ops,
            bytes_per_op: 4096,
            of: None,
            scales: None,
            goal: None,
            // The machine is twice as slow in the second round.
            measure: Box::new(|_| {
                turn += 1.0;
                machine.set(if turn == 2.0 { 500.0 } else { 1000.0 });
                Ok(Sample::new(machine.get(), turn))
            }),
        };
        let half = Subject {
            name: "half",
            unit: Unit::Megabytes,
            bytes_per_op: 1_000_000,
            of: Some("base"),
            scales: None,
            goal: Some(0.8),
            measure: Box::new(|_| Ok(Sample::new(machine.get() / 2.0, 0.0))),
        };
        let rows = alternate(&args(), "g", vec![base, half]).expect("measures");
        assert_eq!((rows[0].value, rows[0].waited_pct, rows[0].ratio), (1000.0, 3.0, None));
        assert_eq!((rows[1].value, rows[1].ratio), (500.0, Some(0.5)));
    }

    #[test]
    fn wrong_parameters_are_refused() {
        let e = measure(&Args { only: Some("nothing".into()), ..args() }).expect_err("unknown group");
        assert!(e.contains("null, crypto, tcp, pool, modes"), "{e}");
        let e = measure(&Args { seconds: 0.0, ..args() }).expect_err("no time");
        assert!(e.contains("--seconds"), "{e}");
    }
}
