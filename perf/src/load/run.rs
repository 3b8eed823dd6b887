//! Runs jobs on all reactors, shows progress, and adds up what they saw.

use std::io::IsTerminal;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cryptfold_reactor::{Handle, ReactorStats};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};

use super::{DataSource, Latency, LoadArgs, LoadResult, Plan, Sink, WorkerReport, read_back, run_worker};

/// How large the device is.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Bytes in a block.
    pub block_size_bytes: u64,
    /// Size in blocks.
    pub blocks: u64,
}

/// Opens one sink per job. Called on the reactor that the job runs on, with the job's number.
pub trait Opener: Send + Sync + 'static {
    /// What it opens.
    type Sink: Sink;
    /// Opens a sink.
    fn open(&self, job: u32) -> impl Future<Output = Result<Self::Sink, String>>;
    /// Called on the same reactor when the job is done; says why the I/O failed, if it was the sink's end.
    fn close(&self, sink: Rc<Self::Sink>) -> impl Future<Output = Result<(), String>>;
}

struct Shared<S>(Rc<S>);

impl<S: Sink> Sink for Shared<S> {
    #[inline]
    fn submit(&self, io: Box<cryptfold_bdev::Io>) {
        self.0.submit(io);
    }
    #[inline]
    fn came_back(&self) -> u64 {
        self.0.came_back()
    }
}

fn data_source(args: &LoadArgs) -> DataSource {
    match (&args.data, args.dedupe_pct, args.compress_ratio) {
        (Some(path), ..) if args.stamp => DataSource::StampedFile(path.clone()),
        (Some(path), ..) => DataSource::File(path.clone()),
        (None, None, None) => DataSource::Repeat,
        (None, pct, ratio) => {
            DataSource::Unique { dedupe_pct: pct.unwrap_or(0), compress_ratio: ratio.unwrap_or(1.0) }
        }
    }
}

/// The plans of all jobs.
///
/// # Errors
/// When the I/O size or the span do not suit the device.
pub fn plans(args: &LoadArgs, geometry: Geometry, seed: u64) -> Result<Vec<Plan>, String> {
    let (bs, block) = (args.bs.0, geometry.block_size_bytes);
    if !bs.is_multiple_of(block) {
        return Err(format!("--bs {bs} is no multiple of the device's block size of {block} bytes"));
    }
    let device = geometry.blocks * block;
    let span = args.size.map_or(device, |s| s.0);
    if span > device {
        return Err(format!("--size {span} is more than the device's {device} bytes"));
    }
    let slots = span / bs;
    let jobs = args.jobs as u64 * args.cores.0.len() as u64;
    if slots < jobs {
        return Err(format!("{span} bytes have {slots} places of --bs {bs}, fewer than the {jobs} jobs"));
    }
    // Random jobs share the span; sequential and verifying ones get a part of their own.
    let divided = !args.rw.random() || args.verify || args.verify_only;
    let share = if divided { slots / jobs } else { slots };
    let plan = |job: u64| Plan {
        random: args.rw.random(),
        read_pct: args.rw.read_pct(args.rwmixread),
        blocks_per_io: bs / block,
        bytes_per_io: bs as usize,
        first_slot: if divided { job * share } else { 0 },
        slots: share,
        iodepth: args.iodepth,
        ramp: args.ramp(),
        runtime: args.runtime(),
        io_limit: args.io_size.map(|s| (s.0 / bs / jobs).max(1)),
        shared: None,
        verify: args.verify,
        fua: args.fua,
        data: data_source(args),
        run_seed: seed,
        seed: seed.wrapping_add(job.wrapping_mul(0x1234_5678_9ABC_DEF1)),
    };
    Ok((0..jobs).map(plan).collect())
}

/// Runs the load on these reactors.
///
/// # Errors
/// When a sink can not be opened or the options do not suit the device.
pub fn run<O: Opener>(
    handles: &[Handle],
    args: &LoadArgs,
    geometry: Geometry,
    opener: O,
) -> Result<LoadResult, String> {
    args.check()?;
    let seed = args.seed.unwrap_or_else(cryptfold_reactor::random_u64);
    let plans = plans(args, geometry, seed)?;
    let opener = Arc::new(opener);
    let (tx, rx) = mpsc::channel();
    let before: Vec<ReactorStats> = handles.iter().map(Handle::stats).collect();
    let (jobs, verify_only) = (plans.len(), args.verify_only);
    for (job, plan) in plans.into_iter().enumerate() {
        let (opener, tx) = (opener.clone(), tx.clone());
        handles[job % handles.len()].spawn(move || async move {
            let report = match opener.open(job as u32).await {
                Ok(sink) => {
                    let sink = Rc::new(sink);
                    let worker = Shared(sink.clone());
                    let report = match verify_only {
                        true => read_back(worker, plan).await,
                        false => run_worker(worker, plan).await,
                    };
                    opener.close(sink).await.and(report)
                }
                Err(e) => Err(e),
            };
            // The receiver waits for every job.
            let _ = tx.send(report);
        });
    }
    drop(tx);
    let reports = collect(&rx, jobs, args)?;
    let after: Vec<ReactorStats> = handles.iter().map(Handle::stats).collect();
    summary(args, seed, reports, busy_pct(&before, &after))
}

fn collect(
    rx: &mpsc::Receiver<Result<WorkerReport, String>>,
    jobs: usize,
    args: &LoadArgs,
) -> Result<Vec<WorkerReport>, String> {
    let bar = progress(args);
    let start = Instant::now();
    let mut reports = Vec::new();
    while reports.len() < jobs {
        match rx.recv_timeout(Duration::from_millis(100)) {
            Ok(report) => reports.push(report?),
            Err(mpsc::RecvTimeoutError::Timeout) => bar.set_position(start.elapsed().as_millis() as u64),
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err("a reactor has stopped".into()),
        }
    }
    bar.finish_and_clear();
    Ok(reports)
}

fn progress(args: &LoadArgs) -> ProgressBar {
    let total = (args.runtime() + args.ramp()).as_millis() as u64;
    if args.json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {percent:>3}%  {elapsed} of about {eta} more") {
        bar.set_style(style);
    }
    bar
}

fn busy_pct(before: &[ReactorStats], after: &[ReactorStats]) -> f64 {
    let mut pct = 0.0;
    for (b, a) in before.iter().zip(after) {
        let busy = a.busy_ns.saturating_sub(b.busy_ns) as f64;
        let all = busy + a.idle_ns.saturating_sub(b.idle_ns) as f64;
        pct += 100.0 * busy / all.max(1.0);
    }
    pct / after.len().max(1) as f64
}

fn summary(
    args: &LoadArgs,
    seed: u64,
    reports: Vec<WorkerReport>,
    busy_pct: f64,
) -> Result<LoadResult, String> {
    let mut latency = Histogram::<u64>::new_with_bounds(1, 100_000_000_000, 3).map_err(|e| e.to_string())?;
    let mut out = LoadResult {
        seconds: 0.0,
        ios: 0,
        reads: 0,
        bs: args.bs.0,
        errors: 0,
        first_error: None,
        lat_us: Latency::default(),
        busy_pct,
        verified: (args.verify || args.verify_only).then_some((0, 0, None)),
        unstamped: 0,
        seed,
    };
    for r in reports {
        latency.add(&r.latency).map_err(|e| e.to_string())?;
        out.seconds = out.seconds.max(r.measured_ns as f64 / 1e9);
        out.ios += r.ios;
        out.reads += r.reads;
        out.errors += r.errors;
        out.unstamped += r.unstamped;
        out.first_error = out.first_error.or(r.first_error);
        if let Some((good, bad, first)) = &mut out.verified {
            *good += r.good;
            *bad += r.bad;
            *first = first.take().or(r.first_bad);
        }
    }
    out.lat_us = Latency::of(&latency);
    Ok(out)
}
