//! The matrix: a TOML file that says what to measure, and the cases that it comes to.
//!
//! Every `[[run]]` is the product of its lists. Whatever is wrong is said with its line.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::load::{Bytes, Rw};

/// Cases of a matrix at most: a slip of the pen makes millions.
const MAX_CASES: usize = 10_000;

/// What lies between the host and the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Layers {
    /// A RAM disk over NVMe/TCP.
    #[serde(rename = "plain")]
    Plain,
    /// The same, encrypted at rest.
    #[serde(rename = "crypto")]
    Crypto,
    /// A volume of a pool on a RAM disk: deduplicated, compressed, encrypted at rest.
    #[serde(rename = "pool")]
    Pool,
    /// The same, and the host encrypts as dm-crypt does.
    #[serde(rename = "pool+e2")]
    PoolE2,
    /// A RAM disk over TLS 1.3.
    #[serde(rename = "tls")]
    Tls,
}

impl Layers {
    /// As in the matrix.
    pub const fn name(self) -> &'static str {
        match self {
            Layers::Plain => "plain",
            Layers::Crypto => "crypto",
            Layers::Pool => "pool",
            Layers::PoolE2 => "pool+e2",
            Layers::Tls => "tls",
        }
    }
    /// Whether a pool is among them.
    pub const fn pool(self) -> bool {
        matches!(self, Layers::Pool | Layers::PoolE2)
    }
}

/// What is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// zstd's ratio of a block; 1 = incompressible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compress_ratio: Option<f64>,
    /// Share of 4 KiB blocks that repeat, percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dedupe_pct: Option<u8>,
    /// Real files below this directory, instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<PathBuf>,
    /// Bytes of them at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<Size>,
}

impl Data {
    /// zstd's ratio; of files it is not known before it was measured.
    pub fn ratio(&self) -> f64 {
        self.compress_ratio.unwrap_or(1.0)
    }
    /// Share of blocks that are there already, 0 to 1.
    pub fn duplicates(&self) -> f64 {
        f64::from(self.dedupe_pct.unwrap_or(0)) / 100.0
    }
}

/// A number of bytes, written as `4k` or `512M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Size(pub u64);

impl TryFrom<String> for Size {
    type Error = String;
    fn try_from(text: String) -> Result<Size, String> {
        text.parse::<Bytes>().map(|b| Size(b.0))
    }
}

impl From<Size> for String {
    fn from(size: Size) -> String {
        size.to_string()
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut n, mut unit) = (self.0, 0);
        while n >= 1024 && n.is_multiple_of(1024) && unit < 4 {
            n /= 1024;
            unit += 1;
        }
        write!(f, "{n}{}", ["", "k", "M", "G", "T"][unit])
    }
}

/// How long, how often, over how much.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Effort {
    /// Seconds that are measured, of each case in each round.
    pub seconds: f64,
    /// Seconds before that.
    pub warmup: f64,
    /// Rounds.
    pub rounds: u32,
    /// Span of the namespace.
    pub size: Size,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    path: Spanned<Vec<Layers>>,
    op: Spanned<Vec<Rw>>,
    bs: Spanned<Vec<Size>>,
    depth: Spanned<Vec<u32>>,
    #[serde(default = "one_core")]
    cores: Spanned<Vec<u32>>,
    data: Spanned<Vec<String>>,
    read_pct: Option<Spanned<u8>>,
}

fn one_core() -> Spanned<Vec<u32>> {
    Spanned::new(0..0, vec![1])
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    seconds: Spanned<f64>,
    warmup: Spanned<f64>,
    rounds: Spanned<u32>,
    size: Spanned<Size>,
    #[serde(default)]
    data: BTreeMap<String, Spanned<Data>>,
    #[serde(default)]
    run: Vec<Run>,
}

/// One thing to measure.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Case {
    /// Layers.
    pub path: Layers,
    /// Cores of the target, and of the host.
    pub cores: u32,
    /// Name of the data.
    pub data: String,
    /// Operation.
    pub op: Rw,
    /// Bytes per I/O.
    pub bs: Size,
    /// I/Os under way per core.
    pub depth: u32,
    /// Share of reads of mixed operations, percent.
    pub read_pct: u8,
}

impl Case {
    /// What names it in reports, file names and `--only`: `plain-randread-4k-qd128-c1-incompressible`.
    pub fn name(&self) -> String {
        let op = match self.op.mixed() {
            true => format!("{}{}", self.op.name(), self.read_pct),
            false => self.op.name().to_owned(),
        };
        let Case { path, cores, data, bs, depth, .. } = self;
        format!("{}-{op}-{bs}-qd{depth}-c{cores}-{data}", path.name())
    }
}

/// A checked matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Matrix {
    /// How long and how often.
    pub effort: Effort,
    /// Data by name.
    pub data: BTreeMap<String, Data>,
    /// All cases, each once; those that one target can serve lie together.
    pub cases: Vec<Case>,
}

/// What is wrong with a matrix: `FILE:LINE: what`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {what}")]
pub struct MatrixError {
    /// Its file, or `built-in`.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// What is wrong, and what would be right.
    pub what: String,
}

impl Matrix {
    /// Reads and checks a matrix.
    ///
    /// # Errors
    /// What is wrong, with its line.
    pub fn parse(file: &str, text: &str) -> Result<Matrix, MatrixError> {
        let line =
            |at: usize| text.as_bytes()[..at.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1;
        let error = |at: usize, what: String| MatrixError { file: file.into(), line: line(at), what };
        let parsed: File = toml::from_str(text)
            .map_err(|e| error(e.span().map_or(0, |s| s.start), e.message().to_owned()))?;
        let bad = |at: &std::ops::Range<usize>, what: String| Err(error(at.start, what));
        let (seconds, warmup) = (*parsed.seconds.get_ref(), *parsed.warmup.get_ref());
        if !(seconds > 0.0 && seconds <= 3600.0) {
            return bad(&parsed.seconds.span(), format!("seconds = {seconds}: above 0, at most 3600"));
        }
        if !(0.0..=3600.0).contains(&warmup) {
            return bad(&parsed.warmup.span(), format!("warmup = {warmup}: 0 to 3600"));
        }
        let rounds = *parsed.rounds.get_ref();
        if !(1..=1000).contains(&rounds) {
            return bad(&parsed.rounds.span(), format!("rounds = {rounds}: 1 to 1000"));
        }
        let size = *parsed.size.get_ref();
        if !size.0.is_multiple_of(1 << 20) || !(16 << 20..=1 << 40).contains(&size.0) {
            return bad(&parsed.size.span(), format!("size = \"{size}\": whole MiB from 16M to 1T"));
        }
        for (name, data) in &parsed.data {
            if let Err(what) = check_data(name, data.get_ref()) {
                return bad(&data.span(), what);
            }
        }
        let mut cases = Vec::new();
        for run in &parsed.run {
            expand(run, &parsed.data, size, &mut cases).map_err(|(at, what)| error(at, what))?;
        }
        cases.sort_by(|a: &Case, b| (a.path, a.cores, &a.data).cmp(&(b.path, b.cores, &b.data)));
        let mut seen = std::collections::HashSet::new();
        cases.retain(|case| seen.insert(case.clone()));
        if cases.is_empty() {
            return Err(error(text.len(), "there is no [[run]], so nothing would be measured".into()));
        }
        let data = parsed.data.into_iter().map(|(name, data)| (name, data.into_inner())).collect();
        Ok(Matrix { effort: Effort { seconds, warmup, rounds, size }, data, cases })
    }

    /// The matrix in a file.
    ///
    /// # Errors
    /// When it can not be read, or what is wrong with it.
    pub fn read(file: &Path) -> Result<(String, Matrix), String> {
        let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
        let matrix = Matrix::parse(&file.display().to_string(), &text).map_err(|e| e.to_string())?;
        Ok((text, matrix))
    }
}

fn check_data(name: &str, data: &Data) -> Result<(), String> {
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(format!("data.{name}: letters, digits and _ make a name"));
    }
    match (&data.tree, data.compress_ratio, data.dedupe_pct, data.max) {
        (Some(_), Some(_), ..) | (Some(_), _, Some(_), _) => {
            Err(format!("data.{name}: tree goes without compress_ratio and dedupe_pct"))
        }
        (None, _, _, Some(_)) => Err(format!("data.{name}: max is for tree only")),
        (_, Some(r), ..) if !(1.0..=100.0).contains(&r) => {
            Err(format!("data.{name}: compress_ratio = {r}: 1 to 100"))
        }
        (_, _, Some(p), _) if p > 100 => Err(format!("data.{name}: dedupe_pct = {p}: 0 to 100")),
        _ => Ok(()),
    }
}

/// All combinations of a run. Errors with the offset in the text.
fn expand(
    run: &Run,
    data: &BTreeMap<String, Spanned<Data>>,
    size: Size,
    cases: &mut Vec<Case>,
) -> Result<(), (usize, String)> {
    let lists = [
        ("path", run.path.get_ref().len(), run.path.span()),
        ("op", run.op.get_ref().len(), run.op.span()),
        ("bs", run.bs.get_ref().len(), run.bs.span()),
        ("depth", run.depth.get_ref().len(), run.depth.span()),
        ("cores", run.cores.get_ref().len(), run.cores.span()),
        ("data", run.data.get_ref().len(), run.data.span()),
    ];
    for (name, len, span) in &lists {
        if *len == 0 {
            return Err((span.start, format!("{name} is empty, so this run would measure nothing")));
        }
    }
    let count = lists.iter().fold(cases.len(), |n, (_, len, _)| n.max(1).saturating_mul(*len));
    if count > MAX_CASES {
        return Err((run.path.span().start, format!("more than {MAX_CASES} cases")));
    }
    for bs in run.bs.get_ref() {
        // Namespaces have blocks of 4 KiB.
        if bs.0 == 0 || !bs.0.is_multiple_of(4096) || bs.0 > 4 << 20 || bs.0 > size.0 {
            return Err((run.bs.span().start, format!("bs = \"{bs}\": multiples of 4k up to 4M")));
        }
    }
    for depth in run.depth.get_ref() {
        if !(1..=1024).contains(depth) {
            return Err((run.depth.span().start, format!("depth = {depth}: 1 to 1024")));
        }
    }
    for cores in run.cores.get_ref() {
        if !(1..=256).contains(cores) {
            return Err((run.cores.span().start, format!("cores = {cores}: 1 to 256")));
        }
    }
    if let Some(name) = run.data.get_ref().iter().find(|name| !data.contains_key(*name)) {
        let known: Vec<&str> = data.keys().map(String::as_str).collect();
        return Err((
            run.data.span().start,
            format!("data \"{name}\" is not declared ([data.{name}]); there are {}", known.join(", ")),
        ));
    }
    let read_pct = run.read_pct.as_ref().map_or(70, |p| *p.get_ref());
    if read_pct > 100 {
        let at = run.read_pct.as_ref().map_or(0, |p| p.span().start);
        return Err((at, format!("read_pct = {read_pct}: 0 to 100")));
    }
    for &path in run.path.get_ref() {
        for &cores in run.cores.get_ref() {
            for data in run.data.get_ref() {
                for &op in run.op.get_ref() {
                    for &bs in run.bs.get_ref() {
                        cases.extend(run.depth.get_ref().iter().map(|&depth| Case {
                            path,
                            cores,
                            data: data.clone(),
                            op,
                            bs,
                            depth,
                            read_pct: if op.mixed() { read_pct } else { 0 },
                        }));
                    }
                }
            }
        }
    }
    Ok(())
}

/// The built-in matrices.
pub const DEFAULT: &str = include_str!("default.toml");
/// Of `--quick`.
pub const QUICK: &str = include_str!("quick.toml");

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "seconds = 1.0\nwarmup = 0.0\nrounds = 3\nsize = \"64M\"\n[data.d]\n";

    fn refused(text: &str) -> MatrixError {
        Matrix::parse("m.toml", text).expect_err("refused")
    }

    #[test]
    fn the_built_in_ones_are_right() {
        let matrix = Matrix::parse("default", DEFAULT).expect("right");
        assert!(matrix.cases.len() > 30 && matrix.effort.rounds == 5);
        assert!(matrix.cases.iter().any(|c| c.name() == "pool+e2-randrw70-4k-qd64-c1-unique"));
        let quick = Matrix::parse("quick", QUICK).expect("right");
        assert!(quick.cases.len() < 12);
        // What one target serves lies together.
        let stages: Vec<_> = matrix.cases.iter().map(|c| (c.path, c.cores, c.data.clone())).collect();
        let mut once = stages.clone();
        once.dedup();
        let all: std::collections::HashSet<_> = stages.into_iter().collect();
        assert_eq!(once.len(), all.len());
    }

    #[test]
    fn a_run_is_a_product_and_no_case_is_there_twice() {
        let run = "[[run]]\npath=[\"plain\",\"pool\"]\nop=[\"randread\"]\nbs=[\"4k\",\"64k\"]\ndepth=[1,8,64]\ndata=[\"d\"]\n";
        let once = Matrix::parse("m", &format!("{HEAD}{run}")).expect("right");
        assert_eq!(once.cases.len(), 12);
        let twice = Matrix::parse("m", &format!("{HEAD}{run}{run}")).expect("right");
        assert_eq!(once.cases, twice.cases);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        let run = |line: &str| {
            let all = ["path=[\"plain\"]", "op=[\"read\"]", "bs=[\"4k\"]", "depth=[1]", "data=[\"d\"]"];
            let name = line.split('=').next().unwrap_or_default();
            let rest = all.iter().filter(|l| !l.starts_with(name)).map(|l| format!("{l}\n"));
            format!("{HEAD}[[run]]\n{line}\n{}", rest.collect::<String>())
        };
        for (text, line, what) in [
            (run("depth=[0]"), 7, "depth = 0"),
            (run("bs=[\"5000\"]"), 7, "multiples of 4k"),
            (run("bs=[\"4q\"]"), 7, "no size"),
            (run("cores=[0]"), 7, "cores = 0"),
            (run("data=[\"other\"]"), 7, "there are d"),
            (run("path=[\"raid\"]"), 7, "raid"),
            (run("op=[]"), 7, "op is empty"),
            (run("read_pct=101"), 7, "0 to 100"),
            (run("colour=\"red\""), 7, "colour"),
            (HEAD.replace("rounds = 3", "rounds = 0"), 3, "rounds = 0"),
            (HEAD.replace("64M", "5k"), 4, "whole MiB"),
            (format!("{HEAD}dedupe_pct = 101\n{}", run("depth=[1]").replace(HEAD, "")), 5, "0 to 100"),
            (format!("{HEAD}tree = \"/\"\ncompress_ratio = 2.0\n"), 5, "goes without"),
            ("seconds = \n".into(), 1, ""),
        ] {
            let e = refused(&text);
            assert!(e.what.contains(what), "{e}");
            assert_eq!(e.line, line, "{e}");
            assert!(e.to_string().starts_with(&format!("m.toml:{line}: ")), "{e}");
        }
        assert!(refused(&format!("{HEAD}run = []\n")).what.contains("run"), "an empty list");
    }
}
