//! `cryptfold-perf steady`: a pool that is nearly full and overwritten at random, for long.
//!
//! Fills a pool, overwrites it until every place of it has changed (so that garbage collection is in its steady state), measures how
//! much hosts can overwrite then, and then how long writes take that come at random moments at a share of that rate. The same load
//! on the same device, but in a pool with so much room that nothing is collected, is what it is compared with. At the end
//! everything is read back and the pool is audited. On a RAM disk or a file, or in virtual time on a modelled device ([`model`]).

mod load;
mod model;

use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Class, Registry};
use cryptfold_bdev_uring::UringOptions;
use cryptfold_reactor::{self as reactor, Sim};
use cryptfold_reduce::{Compression, CreateOptions, KeySource, LocalPool, PoolInfo, VolumeOptions};
use serde::Serialize;

use crate::figures::{ram_disk, runtime};
use crate::load::{Bytes, Latency};
use crate::report::table;
use load::{LARGEST, Pace, Seen, Volume, mean_blocks};
use model::Model;

const DISK: &str = "disk";
const RAM: &str = "ram";
const POOL: &str = "steady";
/// How full the pool is in which nothing is collected, percent.
const ROOMY_PCT: u64 = 40;
/// Of the room that it has then the paced load may take a half.
const ROOMY_LEFT_PCT: u64 = 30;
/// Free space below which a pool may collect, percent.
const COLLECTING_PCT: u64 = 8;
/// How often free space and memory are looked at.
const LOOK: Duration = Duration::from_millis(10);
/// Blocks written between two looks at how full the pool is.
const FILL_STEP: u64 = 64 * LARGEST;

/// Overwrites a nearly full pool at random, for long: throughput, latencies with and without garbage collection, write amplification.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// On a device with the latency and bandwidth of a model, in virtual time
    #[arg(long)]
    modelled: bool,
    /// Minutes of the paced load on the nearly full pool (of virtual time, with --modelled)
    #[arg(long, default_value_t = 20.0, value_name = "M")]
    minutes: f64,
    /// Size of the device
    #[arg(long, default_value = "2G", value_name = "SIZE")]
    size: Bytes,
    /// File to use as the device, which is overwritten; otherwise a RAM disk
    #[arg(long, value_name = "PATH", conflicts_with = "modelled")]
    file: Option<PathBuf>,
    /// Memory budget of the pool
    #[arg(long, default_value = "64M", value_name = "SIZE")]
    memory: Bytes,
    /// How full the pool is, percent of what hosts can have
    #[arg(long, default_value_t = 90, value_name = "P", value_parser = clap::value_parser!(u64).range(10..=97))]
    fill: u64,
    /// The paced load, percent of the rate at which a nearly full pool can be overwritten
    #[arg(long, default_value_t = 50, value_name = "P", value_parser = clap::value_parser!(u64).range(1..=95))]
    load: u64,
    /// Writes under way at most
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    iodepth: u32,
    /// Compression of the volume (off, lz4, zstd:N, adaptive)
    #[arg(long, default_value = "off", value_name = "HOW")]
    compression: String,
    /// Seed of the load, and of the modelled run; drawn if not given
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Latency of the modelled device's reads, µs
    #[arg(long, default_value_t = 90, value_name = "US", requires = "modelled")]
    read_us: u64,
    /// Latency of its writes, µs
    #[arg(long, default_value_t = 30, value_name = "US", requires = "modelled")]
    write_us: u64,
    /// Latency of its flushes, µs
    #[arg(long, default_value_t = 200, value_name = "US", requires = "modelled")]
    flush_us: u64,
    /// Bandwidth of its reads, 10^6 bytes a second
    #[arg(long, default_value_t = 1000, value_name = "MB", requires = "modelled", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    read_mb_s: u64,
    /// Bandwidth of its writes, 10^6 bytes a second
    #[arg(long, default_value_t = 500, value_name = "MB", requires = "modelled", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    write_mb_s: u64,
    /// JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// One part of the run.
#[derive(Clone, Debug, Serialize)]
struct Phase {
    name: &'static str,
    seconds: f64,
    /// Writes a second.
    writes_per_s: f64,
    /// 10^6 bytes a second.
    mb_s: f64,
    p50_us: f64,
    p99_us: f64,
    p99_9_us: f64,
    max_us: f64,
    /// Bytes of fragments that hosts' writes have made.
    stored_bytes: u64,
    /// Bytes of fragments that collection has moved.
    moved_bytes: u64,
    /// Bytes written to the device, of metadata and the journal too.
    device_bytes: u64,
    /// Device bytes over stored bytes.
    write_amplification: f64,
    /// Of what hosts can have, what data and metadata took at the end, percent.
    full_pct: f64,
    /// The fewest free segments there were, those that hosts can not have included.
    free_low: u64,
    /// The most memory that the pool took, bytes.
    memory_bytes: u64,
}

#[derive(Clone, Debug, Serialize)]
struct Report {
    seed: u64,
    device_bytes: u64,
    capacity_bytes: u64,
    segment_bytes: u32,
    segments: u64,
    model: Option<Model>,
    phases: Vec<Phase>,
    /// p99.9 of the paced load with collection over that without.
    p99_9_ratio: f64,
    /// The same of the load that comes as fast as it can.
    p99_9_ratio_saturated: f64,
    /// Blocks that were read back and compared.
    verified_blocks: u64,
}

/// Runs and reports.
///
/// # Errors
/// What went wrong, in one line; also when a block was wrong or the pool's audit found something.
pub fn run(args: &Args) -> Result<(), String> {
    if !(args.minutes > 0.0 && args.minutes <= 100_000.0) {
        return Err(format!("--minutes {}: more than 0 and at most 100000", args.minutes));
    }
    let args = args.clone();
    let seed = args.seed.unwrap_or_else(|| std::process::id().into());
    eprintln!("seed {seed}");
    let json = args.json;
    let report = if args.modelled {
        Sim::new(seed).run(move || async move { measure(&args, seed).await })?
    } else {
        let runtime = runtime(&[0])?;
        let measured = runtime.handles()[0].block_on(move || async move { measure(&args, seed).await });
        measured.map_err(|e| e.to_string())??
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(|e| e.to_string())?);
    } else {
        print!("{}", report.text());
    }
    Ok(())
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

/// The device of the run.
fn make_device(args: &Args, registry: &Arc<Registry>) -> Result<Option<Model>, String> {
    let Args { read_us, write_us, flush_us, read_mb_s, write_mb_s, .. } = *args;
    if args.modelled {
        ram_disk(registry, RAM, args.size.0)?;
        let model = Model { read_us, write_us, flush_us, read_mb_s, write_mb_s };
        model::create(registry, DISK, RAM, model).map_err(text)?;
        return Ok(Some(model));
    }
    let Some(path) = &args.file else { return ram_disk(registry, DISK, args.size.0).map(|()| None) };
    let file = std::fs::File::options().write(true).create(true).truncate(false).open(path);
    file.and_then(|file| file.set_len(args.size.0)).map_err(|e| format!("{}: {e}", path.display()))?;
    let options = UringOptions {
        name: DISK.into(),
        filename: path.clone(),
        block_size_bytes: Some(4096),
        uuid: None,
        read_only: false,
        unmap: true,
        method: "bdev_uring_create",
    };
    cryptfold_bdev_uring::create(registry, options).map_err(text)?;
    Ok(None)
}

async fn measure(args: &Args, seed: u64) -> Result<Report, String> {
    let registry = Registry::new();
    let model = make_device(args, &registry)?;
    let time = Duration::from_secs_f64(args.minutes * 60.0);
    let depth = args.iodepth;
    let all = |blocks: u64| Pace { per_second: None, depth, time, blocks };

    let full = Filled::new(args, &registry, args.fill, seed).await?;
    let info = full.pool.info();
    let blocks = full.volume.blocks();
    // Random overwrites leave a third of the places as they were the first time round.
    full.phase("settling", all(2 * blocks), |_| false).await?;
    let saturated = full.phase("as fast as it can", all(blocks), |_| false).await?;
    let rate = saturated.writes_per_s * args.load as f64 / 100.0;
    let paced = |time| Pace { per_second: Some(rate), depth, time, blocks: u64::MAX };
    let steady = full.phase("paced", paced(time), |_| false).await?;
    let verified_blocks = full.verify().await?;

    let roomy = Filled::new(args, &registry, ROOMY_PCT, seed).await?;
    let left = |pct: u64| move |info: &PoolInfo| info.free_bytes * 100 < info.capacity_bytes * pct;
    let alone = roomy.phase("paced, no collection", paced(time), left(ROOMY_LEFT_PCT)).await?;
    let fast = roomy.phase("as fast as it can, no collection", all(u64::MAX), left(COLLECTING_PCT)).await?;
    if roomy.pool.info().moved_bytes > 0 {
        return Err("the pool that was to be compared with has collected garbage".into());
    }
    roomy.verify().await?;
    Ok(Report {
        seed,
        model,
        device_bytes: info.device_bytes,
        capacity_bytes: info.capacity_bytes,
        segment_bytes: info.segment_bytes,
        segments: info.segments,
        p99_9_ratio: steady.p99_9_us / alone.p99_9_us,
        p99_9_ratio_saturated: saturated.p99_9_us / fast.p99_9_us,
        verified_blocks,
        phases: vec![steady, alone, saturated, fast],
    })
}

impl Phase {
    const HEAD: [&str; 12] = [
        "load",
        "s",
        "writes/s",
        "MB/s",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "max us",
        "amplification",
        "full",
        "free",
        "MiB",
    ];

    fn row(&self) -> Vec<String> {
        vec![
            self.name.to_owned(),
            format!("{:.0}", self.seconds),
            format!("{:.0}", self.writes_per_s),
            format!("{:.1}", self.mb_s),
            format!("{:.1}", self.p50_us),
            format!("{:.1}", self.p99_us),
            format!("{:.1}", self.p99_9_us),
            format!("{:.0}", self.max_us),
            format!("{:.2}", self.write_amplification),
            format!("{:.1}%", self.full_pct),
            self.free_low.to_string(),
            (self.memory_bytes >> 20).to_string(),
        ]
    }
}

impl Report {
    fn text(&self) -> String {
        let head = Phase::HEAD.map(str::to_owned).to_vec();
        let rows: Vec<Vec<String>> =
            std::iter::once(head).chain(self.phases.iter().map(Phase::row)).collect();
        let device = match &self.model {
            Some(m) => format!(
                "modelled: {}/{}/{} us, {}/{} MB/s",
                m.read_us, m.write_us, m.flush_us, m.read_mb_s, m.write_mb_s
            ),
            None => "real".into(),
        };
        format!(
            "device of {} MiB ({device}), {} segments of {} MiB; writes of {:.1} KiB on average; seed {}\n\n{}\n\
             p99.9 with collection over that without: {:.2} paced, {:.2} as fast as it can\n\
             {} blocks read back and compared; the audit found nothing\n",
            self.device_bytes >> 20,
            self.segments,
            self.segment_bytes >> 20,
            mean_blocks() * 4.0,
            self.seed,
            table(&rows, 1),
            self.p99_9_ratio,
            self.p99_9_ratio_saturated,
            self.verified_blocks,
        )
    }
}

/// A pool that was filled, and its volume.
struct Filled {
    registry: Arc<Registry>,
    pool: LocalPool,
    volume: Rc<Volume>,
}

fn full_pct(info: &PoolInfo) -> f64 {
    let taken = info.space.stored_bytes + info.space.metadata_bytes;
    // To a tenth: the catalogue has a few bytes that depend on the date.
    (taken as f64 * 1000.0 / info.capacity_bytes.max(1) as f64).round() / 10.0
}

impl Filled {
    /// A new pool in place of whatever is on the device, filled to so many percent of what hosts can have, metadata included.
    async fn new(args: &Args, registry: &Arc<Registry>, pct: u64, seed: u64) -> Result<Filled, String> {
        let key = KeySource::Bytes((1..=32).collect());
        let options =
            CreateOptions { force: true, memory_budget: Some(args.memory.0), ..CreateOptions::new(key) };
        let pool = LocalPool::create(registry, DISK, POOL, &options).await.map_err(text)?;
        let compression: Compression = args.compression.parse().map_err(text)?;
        let options = VolumeOptions {
            name: "volume".into(),
            // Thin: as large as it may have to be.
            size_bytes: 16 * args.size.0,
            compression: Some(compression),
            ..VolumeOptions::default()
        };
        let volume = pool.create_volume(&options).await.map_err(text)?;
        let descriptor = registry.open(&volume.uuid.to_string(), Access::ReadWrite, |_| {}).map_err(text)?;
        let volume = Volume::new(descriptor.channel().map_err(text)?, seed);
        while full_pct(&pool.info()) < pct as f64 {
            volume.extend(FILL_STEP).await?;
        }
        Ok(Filled { registry: registry.clone(), pool, volume })
    }

    /// Overwrites the volume at random until the pace's end, or `enough`.
    async fn phase(
        &self,
        name: &'static str,
        pace: Pace,
        enough: impl Fn(&PoolInfo) -> bool + 'static,
    ) -> Result<Phase, String> {
        let disk = self.registry.get(DISK).map_err(text)?;
        let written = || disk.stats().totals(Class::Write).bytes;
        let (before, device_before) = (self.pool.info(), written());
        let looks = Rc::new(Looks::default());
        looks.free_low.set(before.free_segments);
        let watch = reactor::spawn_local({
            let (pool, looks) = (self.pool.clone(), looks.clone());
            async move {
                while !looks.over.get() {
                    let info = pool.info();
                    looks.free_low.set(looks.free_low.get().min(info.free_segments));
                    looks.memory_bytes.set(looks.memory_bytes.get().max(info.memory_bytes));
                    looks.enough.set(enough(&info));
                    reactor::sleep(LOOK).await;
                }
            }
        });
        let stop = {
            let looks = looks.clone();
            move || looks.enough.get()
        };
        let seen = self.volume.overwrite(pace, stop).await;
        looks.over.set(true);
        watch.await;
        let Seen { seconds, writes, bytes, latency } = seen?;
        let (info, device_bytes) = (self.pool.info(), written() - device_before);
        let latency = Latency::of(&latency);
        let stored_bytes = info.written_bytes - before.written_bytes;
        let phase = Phase {
            name,
            seconds,
            writes_per_s: writes as f64 / seconds.max(1e-9),
            mb_s: bytes as f64 / 1e6 / seconds.max(1e-9),
            p50_us: latency.p50,
            p99_us: latency.p99,
            p99_9_us: latency.p99_9,
            max_us: latency.max,
            stored_bytes,
            moved_bytes: info.moved_bytes - before.moved_bytes,
            device_bytes,
            write_amplification: device_bytes as f64 / stored_bytes.max(1) as f64,
            full_pct: full_pct(&info),
            free_low: looks.free_low.get(),
            memory_bytes: looks.memory_bytes.get(),
        };
        eprintln!("{}", phase.row().join("  "));
        Ok(phase)
    }

    /// Reads everything back and has the pool audited, and closes it: the number of blocks.
    async fn verify(self) -> Result<u64, String> {
        let blocks = self.volume.check().await?;
        let audit = self.pool.check(false).await.map_err(text)?;
        if let Some(problem) = audit.problems.first() {
            return Err(format!("the audit found {} problems; the first: {problem}", audit.problem_count));
        }
        drop(self.volume);
        self.pool.close().await.map_err(text)?;
        Ok(blocks)
    }
}

/// What is seen of a pool during a phase.
#[derive(Default)]
struct Looks {
    free_low: Cell<u64>,
    memory_bytes: Cell<u64>,
    enough: Cell<bool>,
    over: Cell<bool>,
}
