//! `cryptfold-perf primitives`: the bare loops of ciphers, hashes, codecs and copies on one core, that everything else
//! is compared with.
//!
//! Units: GB/s are 10^9 bytes of plain (uncompressed) data a second; ops are blocks.

mod area;
pub(crate) mod data;
mod kernels;
mod measure;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use cryptfold_reactor::memory::{self, MemoryConfig};
use serde::Serialize;
use thiserror::Error;

use crate::report::{self, Machine};
use area::{Area, BUF_BYTES};
use measure::Timing;

/// Measures this core's speed of XTS, AES-GCM, BLAKE3, zstd, LZ4, CRC-32C and memcpy, by block size, in the cache and
/// over a span of memory in random order.
///
/// Over the span, encryption and memcpy write to random blocks from a hot buffer (as writes to a RAM disk do); all
/// else reads random blocks into a hot buffer.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// JSON instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Memory to run over in random order; hugepages where the kernel has some. At least 1M.
    #[arg(long, value_parser = report::parse_size, default_value = "256M", value_name = "SIZE")]
    pub span: usize,
    /// Length of each measurement (median of five rounds).
    #[arg(long, default_value_t = 0.2, value_name = "S")]
    pub seconds_per_test: f64,
    /// Content to work on instead of generated data (its first 64 MiB).
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Only primitives whose name contains this (xts, gcm, blake3, zstd, lz4, crc32c, memcpy).
    #[arg(long, value_name = "NAME")]
    pub only: Option<String>,
    /// Only this block size.
    #[arg(long, value_parser = report::parse_size, value_name = "SIZE")]
    pub block: Option<usize>,
}

/// Why there is no report.
#[derive(Debug, Error)]
pub enum PrimitivesError {
    /// The data file is unusable.
    #[error("{path}: {error}", path = path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: std::io::Error,
    },
    /// A parameter is out of range.
    #[error("{0}")]
    Parameter(String),
    /// A primitive can not be set up.
    #[error("{0}")]
    Setup(String),
    /// The report can not be written.
    #[error("writing the report: {0}")]
    Output(#[from] std::io::Error),
}

/// Block sizes of the report.
pub const BLOCKS: [usize; 5] = [512, 4 << 10, 16 << 10, 64 << 10, 128 << 10];
/// Data that the areas repeat. Larger than the caches, so that a codec does not learn it.
const SAMPLE_BYTES: usize = 8 << 20;
const FILE_MAX_BYTES: usize = 64 << 20;
/// Working set "in the cache": fits the second level of every current server processor.
const CACHE_BYTES: usize = 256 << 10;
const MAX_SECONDS: f64 = 60.0;

/// Where the blocks lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Where {
    /// In the cache.
    Cache,
    /// Random places in the span.
    Span,
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The primitive, such as `xts-256-encrypt`.
    pub name: String,
    /// Its implementation.
    pub engine: &'static str,
    /// Bytes that the primitive sees as one (XTS data unit, hashed block).
    pub unit: usize,
    /// Bytes in one operation.
    pub block: usize,
    /// Where they lie.
    pub r#where: Where,
    /// 10^9 bytes a second.
    pub gb_s: f64,
    /// Operations a second.
    pub ops_s: f64,
    /// Codecs: uncompressed over compressed size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

/// The report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The machine.
    pub machine: Machine,
    /// Bytes in the span.
    pub span: usize,
    /// All measurements.
    pub results: Vec<Outcome>,
}

/// What the kernels work with.
struct Bench {
    timing: Timing,
    sample: Vec<u8>,
    place: Where,
    area: Area,
    block: usize,
    only: Option<String>,
    results: Vec<Outcome>,
    progress: indicatif::ProgressBar,
}

/// A primitive in one configuration.
struct Spec {
    name: String,
    engine: &'static str,
    unit: usize,
}

impl Bench {
    /// Whether the primitive is asked for.
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|o| name.contains(o.as_str()))
    }

    /// Times a step and keeps the outcome.
    fn record(&mut self, spec: Spec, ratio: Option<f64>, seconds_per_op: f64) {
        self.progress.set_message(format!("{} {}", spec.name, report::size_text(self.block)));
        self.progress.inc(1);
        self.results.push(Outcome {
            name: spec.name,
            engine: spec.engine,
            unit: spec.unit,
            block: self.block,
            r#where: self.place,
            gb_s: round(self.block as f64 / seconds_per_op / 1e9, 4),
            ops_s: round(1.0 / seconds_per_op, 0),
            ratio: ratio.map(|r| round(r, 3)),
        });
    }
}

fn round(x: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (x * scale).round() / scale
}

fn check(args: &Args) -> Result<(), PrimitivesError> {
    let bad = |what: String| Err(PrimitivesError::Parameter(what));
    if args.span < BUF_BYTES || args.span > 1 << 40 {
        return bad(format!("--span {}: must be 1M to 1T", report::size_text(args.span)));
    }
    if !(args.seconds_per_test > 0.0 && args.seconds_per_test <= MAX_SECONDS) {
        return bad(format!(
            "--seconds-per-test {}: must be above 0, at most {MAX_SECONDS}",
            args.seconds_per_test
        ));
    }
    match args.block {
        Some(b) if !BLOCKS.contains(&b) => {
            let all = BLOCKS.map(report::size_text).join(", ");
            bad(format!("--block {}: must be one of {all}", report::size_text(b)))
        }
        _ => Ok(()),
    }
}

fn sample(args: &Args) -> Result<Vec<u8>, PrimitivesError> {
    let Some(path) = &args.data else { return Ok(data::generate(1, SAMPLE_BYTES)) };
    let mut sample = data::from_file(path, FILE_MAX_BYTES)
        .map_err(|error| PrimitivesError::Data { path: path.clone(), error })?;
    // Whole buffers, so that repetitions of the sample line up with blocks.
    let whole = sample.len().next_multiple_of(BUF_BYTES);
    for i in 0..whole - sample.len() {
        sample.push(sample[i]);
    }
    Ok(sample)
}

/// Runs all measurements.
///
/// # Errors
/// A parameter out of range, an unreadable data file.
pub fn measure(args: &Args) -> Result<Report, PrimitivesError> {
    check(args)?;
    let sample = sample(args)?;
    let span = args.span.next_multiple_of(BUF_BYTES);
    memory::configure(&MemoryConfig { arena_bytes: span, ..MemoryConfig::default() });
    let progress = if std::io::stderr().is_terminal() {
        indicatif::ProgressBar::new_spinner().with_style(
            indicatif::ProgressStyle::with_template("{spinner} {pos} measured, {msg}")
                .unwrap_or_else(|_| indicatif::ProgressStyle::default_spinner()),
        )
    } else {
        indicatif::ProgressBar::hidden()
    };
    let mut bench = Bench {
        timing: Timing { total: Duration::from_secs_f64(args.seconds_per_test) },
        sample,
        place: Where::Cache,
        area: Area::new(CACHE_BYTES),
        block: 0,
        only: args.only.clone(),
        results: Vec::new(),
        progress,
    };
    for (place, bytes) in [(Where::Cache, CACHE_BYTES), (Where::Span, span)] {
        bench.place = place;
        bench.area = Area::new(bytes);
        for block in BLOCKS.into_iter().filter(|b| args.block.is_none_or(|only| only == *b)) {
            bench.block = block;
            kernels::all(&mut bench)?;
        }
    }
    bench.progress.finish_and_clear();
    if bench.results.is_empty() {
        return Err(PrimitivesError::Parameter(format!(
            "--only {}: no primitive has this in its name",
            args.only.as_deref().unwrap_or_default()
        )));
    }
    Ok(Report { machine: Machine::this(), span, results: bench.results })
}

/// The subcommand: measures and prints.
///
/// # Errors
/// Those of [`measure`], and when the report can not be written.
pub fn run(args: &Args) -> Result<(), PrimitivesError> {
    let report = measure(args)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &report).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        out.write_all(text(&report).as_bytes())?;
    }
    Ok(())
}

/// The report for people: a line per primitive, a column per block size.
fn text(report: &Report) -> String {
    let cell = |o: &Outcome| format!("{:.2} / {:.3}", o.gb_s, o.ops_s / 1e6);
    let blocks: Vec<usize> =
        BLOCKS.into_iter().filter(|b| report.results.iter().any(|o| o.block == *b)).collect();
    let mut head: Vec<String> = ["primitive", "engine", "unit", "where"].map(str::to_owned).to_vec();
    head.extend(blocks.iter().map(|b| report::size_text(*b)));
    let mut rows = vec![head];
    let mut done: Vec<(&str, &str, usize, Where)> = Vec::new();
    let unit = |o: &Outcome| if o.unit == o.block { 0 } else { o.unit };
    let mut lines: Vec<&Outcome> = report.results.iter().collect();
    lines.sort_by_key(|o| kernels::rank(&o.name));
    // XTS and the batched hash have a unit of their own; for the rest the unit is the block.
    let has_unit = |name: &str| report.results.iter().any(|o| o.name == name && o.unit != o.block);
    for o in lines {
        let key = |x: &Outcome| if has_unit(&x.name) { x.unit } else { unit(x) };
        let id = (o.name.as_str(), o.engine, key(o), o.r#where);
        if done.contains(&id) {
            continue;
        }
        done.push(id);
        let same = |x: &&Outcome| (x.name.as_str(), x.engine, key(x), x.r#where) == id;
        let mut row = vec![
            o.name.clone(),
            o.engine.to_owned(),
            if has_unit(&o.name) { report::size_text(o.unit) } else { String::new() },
            if o.r#where == Where::Cache { "cache".into() } else { "span".into() },
        ];
        row.extend(blocks.iter().map(|b| {
            report.results.iter().filter(same).find(|x| x.block == *b).map_or_else(|| "-".into(), cell)
        }));
        rows.push(row);
    }
    format!(
        "{}\nOne core, GB/s / million operations a second, by block size; span of {} in random order.\n\n{}",
        report.machine.line(),
        report::size_text(report.span),
        report::table(&rows, 4)
    )
}

#[cfg(test)]
mod tests;
