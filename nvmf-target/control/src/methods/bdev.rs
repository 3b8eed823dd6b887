//! Block devices as such: listing, examining, statistics, limits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptfold_bdev::{Bdev, Class, ClassTotals, Op, QosLimits, trace};
use serde_json::{Map, Value, json};

use super::framework::TICK_RATE;
use super::histogram;
use crate::control::{Control, lock};
use crate::jsonrpc::{RpcError, RpcResult};
use crate::params::{choices, params};
use crate::pools::VOLUME_PRODUCT;
use crate::table::{Method, When};

choices! {
    /// What a reset of statistics clears.
    pub enum ResetMode {
        /// Everything.
        All = "all",
        /// Shortest and longest latency.
        MaxMin = "maxmin",
        /// Error counts.
        Error = "error",
        /// Nothing.
        None = "none",
    }
}

params! {
    /// `bdev_set_options`.
    pub struct SetOptions {
        /// No effect: I/O is allocated per core.
        bdev_io_pool_size: Option<u32>,
        /// No effect: I/O is allocated per core.
        bdev_io_cache_size: Option<u32>,
        /// Whether new devices are searched for pools; true when never set.
        bdev_auto_examine: Option<bool>,
        /// No effect: buffers grow with use.
        iobuf_small_cache_size: Option<u32>,
        /// No effect: buffers grow with use.
        iobuf_large_cache_size: Option<u32>,
    }
    /// `bdev_get_bdevs`.
    pub struct GetBdevs {
        /// Name, alias or UUID; all devices when not given.
        name: Option<String>,
        /// Milliseconds to wait for a device of this name.
        timeout: u64 = 0,
    }
    /// A device's name.
    pub struct Named {
        /// Name, alias or UUID.
        name: String,
    }
    /// `bdev_get_iostat`.
    pub struct GetIostat {
        /// Devices; all when not given.
        names: Option<Vec<String>>,
        /// The same as `names` with one entry.
        name: Option<String>,
        /// Only false is possible.
        per_channel: bool = false,
        /// What to clear after reading.
        reset_mode: ResetMode = ResetMode::None,
    }
    /// `bdev_reset_iostat`.
    pub struct ResetIostat {
        /// Device; all when not given.
        name: Option<String>,
        /// What to clear.
        mode: ResetMode = ResetMode::All,
    }
    /// `bdev_enable_histogram`.
    pub struct EnableHistogram {
        /// Name, alias or UUID.
        name: String,
        /// On (which clears) or off.
        enable: bool,
        /// Kind of I/O to count ("read", "write", "unmap", "flush", "copy"); all kinds are counted in any case, and this
        /// only chooses what bdev_get_histogram shows.
        opc: Option<String>,
        /// Only 7 is possible.
        granularity: Option<u8>,
        /// No effect: everything from 1 ns is counted.
        min_nsec: Option<u64>,
        /// No effect: everything to 274 s is told apart.
        max_nsec: Option<u64>,
    }
    /// `cryptfold_trace`.
    pub struct Trace {
        /// On or off; as it is when not given.
        enable: Option<bool>,
    }
    /// `bdev_get_histogram`.
    pub struct GetHistogram {
        /// Name, alias or UUID.
        name: String,
        /// Kind of I/O to show ("read", "write", "unmap", "flush", "copy"); all together when not given. Ours.
        opc: Option<String>,
    }
    /// `bdev_get_histogram_borders`.
    pub struct HistogramBorders {
        /// Name, alias or UUID.
        name: String,
        /// Borders in microseconds, ascending.
        borders: Vec<u64>,
    }
    /// `bdev_set_qos_limit`.
    pub struct SetQos {
        /// Name, alias or UUID.
        name: String,
        /// Reads and writes per second; 0 = no limit.
        rw_ios_per_sec: Option<u64>,
        /// MiB read and written per second; 0 = no limit.
        rw_mbytes_per_sec: Option<u64>,
        /// MiB read per second; 0 = no limit.
        r_mbytes_per_sec: Option<u64>,
        /// MiB written per second; 0 = no limit.
        w_mbytes_per_sec: Option<u64>,
    }
}

pub fn methods() -> Vec<Method> {
    vec![
        Method::new("bdev_set_options", "Options of the device layer.", set_options).when(When::Startup),
        Method::new("bdev_get_bdevs", "Block devices. `driver_specific` depends on the kind.", get_bdevs),
        Method::new(
            "bdev_examine",
            "Searches a device for a pool, now or as soon as it appears, also when bdev_auto_examine is off.",
            examine,
        ),
        Method::plain("bdev_wait_for_examine", "Replies when no device is being searched any more.", |c| {
            c.watch.wait_examined();
            Ok(json!(true))
        }),
        Method::new(
            "bdev_get_iostat",
            "Counters since creation or the last reset. Latencies in ticks (nanoseconds).",
            get_iostat,
        ),
        Method::new("bdev_reset_iostat", "Counts from zero again.", reset_iostat),
        Method::new("bdev_enable_histogram", "Starts or stops counting latencies.", enable_histogram),
        Method::new(
            "cryptfold_trace",
            "Stages of I/O from socket to device and back: switches their recording on (from nothing) or off, and replies what was \
            recorded until then, with histograms' percentiles in nanoseconds. Stages may lie inside each other. Ours.",
            trace_stages,
        ),
        Method::new(
            "bdev_get_histogram",
            "Latencies, in SPDK's buckets (scripts/histogram.py).",
            get_histogram,
        ),
        Method::new(
            "bdev_get_histogram_borders",
            "For each border the number of I/Os that took less time; the last entry counts all.",
            histogram_borders,
        ),
        Method::new("bdev_set_qos_limit", "Rate limits; one that is not given stays as it is.", set_qos),
        Method::accepted("bdev_set_qd_sampling_period", "No effect: queue depths are not sampled."),
    ]
}

fn set_options(c: &Control, p: SetOptions) -> RpcResult {
    let mut o = lock(&c.options);
    if let Some(on) = p.bdev_auto_examine {
        o.auto_examine = Some(on);
    }
    let given = json!({
        "bdev_io_pool_size": p.bdev_io_pool_size, "bdev_io_cache_size": p.bdev_io_cache_size,
        "bdev_auto_examine": p.bdev_auto_examine, "iobuf_small_cache_size": p.iobuf_small_cache_size,
        "iobuf_large_cache_size": p.iobuf_large_cache_size,
    });
    o.remember("bdev", "bdev_set_options", given.as_object().cloned().unwrap_or_default());
    Ok(json!(true))
}

fn get_bdevs(c: &Control, p: GetBdevs) -> RpcResult {
    let Some(name) = p.name else {
        return Ok(c.registry.list().iter().map(|b| describe(b)).collect());
    };
    let end = Instant::now() + Duration::from_millis(p.timeout.min(24 * 3_600_000));
    loop {
        match c.registry.get(&name) {
            Ok(b) => return Ok(json!([describe(&b)])),
            Err(e) if Instant::now() >= end || c.is_ending() => return Err(e.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// What kind of device it is. Clients of SPDK's tell volumes by this name.
pub fn product(b: &Bdev) -> &'static str {
    let name = b.info().product_name;
    if name == VOLUME_PRODUCT { "Logical Volume" } else { name }
}

/// An entry of `bdev_get_bdevs`.
fn describe(b: &Bdev) -> Value {
    let i = b.info();
    let has = |op| i.ops.has(op);
    // What the device does not do itself, the core does on top of reads and writes.
    let emulated = has(Op::Read) && has(Op::Write);
    let limits = b.qos();
    json!({
        "name": i.name,
        "aliases": b.aliases(),
        "product_name": product(b),
        "block_size": i.block_size_bytes,
        "num_blocks": b.blocks(),
        "uuid": i.uuid.to_string(),
        "numa_id": -1,
        "assigned_rate_limits": {
            "rw_ios_per_sec": limits.rw_ios_per_sec,
            "rw_mbytes_per_sec": limits.rw_mbytes_per_sec,
            "r_mbytes_per_sec": limits.r_mbytes_per_sec,
            "w_mbytes_per_sec": limits.w_mbytes_per_sec,
        },
        "claimed": b.claimed_by().is_some(),
        "claimed_by": b.claimed_by(),
        "zoned": false,
        "read_only": b.is_read_only(),
        "write_cache": i.write_cache,
        "optimal_io_blocks": i.optimal_io_blocks,
        "atomic_blocks": i.atomic_blocks,
        "supported_io_types": {
            "read": has(Op::Read),
            "write": has(Op::Write),
            "unmap": has(Op::Unmap),
            "flush": has(Op::Flush),
            "reset": has(Op::Reset),
            "nvme_admin": false,
            "nvme_io": false,
            "nvme_io_md": false,
            "write_zeroes": emulated || has(Op::WriteZeroes),
            "zcopy": false,
            "get_zone_info": false,
            "zone_management": false,
            "zone_append": false,
            "compare": emulated || has(Op::Compare),
            "compare_and_write": emulated || has(Op::CompareAndWrite),
            "abort": true,
            "seek_hole": false,
            "seek_data": false,
            "copy": emulated || has(Op::Copy),
            "write_uncorrectable": has(Op::WriteUncorrectable),
            "nvme_iov_md": false,
        },
        "driver_specific": b.device().driver_specific(),
    })
}

fn examine(c: &Control, p: Named) -> RpcResult {
    match c.registry.get(&p.name) {
        Ok(b) => c.examine(b.name())?,
        Err(_) => c.watch.want(&p.name),
    }
    Ok(json!(true))
}

fn chosen(c: &Control, names: Option<Vec<String>>) -> Result<Vec<Arc<Bdev>>, RpcError> {
    match names {
        None => Ok(c.registry.list()),
        Some(names) => names.iter().map(|n| c.registry.get(n).map_err(RpcError::from)).collect(),
    }
}

fn reset(b: &Bdev, mode: ResetMode) {
    match mode {
        ResetMode::All => b.stats().reset(),
        ResetMode::MaxMin => b.stats().reset_extremes(),
        ResetMode::Error => b.stats().reset_errors(),
        ResetMode::None => {}
    }
}

fn get_iostat(c: &Control, p: GetIostat) -> RpcResult {
    if p.per_channel {
        return Err(RpcError::params("per_channel: true was given; only totals over all channels are kept"));
    }
    let names = p.names.or(p.name.map(|n| vec![n]));
    let bdevs = chosen(c, names)?;
    let list: Vec<Value> = bdevs
        .iter()
        .map(|b| {
            let v = iostat(b);
            reset(b, p.reset_mode);
            v
        })
        .collect();
    Ok(json!({"tick_rate": TICK_RATE, "ticks": c.uptime().as_nanos() as u64, "bdevs": list}))
}

fn iostat(b: &Bdev) -> Value {
    let mut o = Map::new();
    o.insert("name".into(), b.name().into());
    // (class, past participle of the bytes, noun of the operations)
    let classes = [
        (Class::Read, "read", "read"),
        (Class::Write, "written", "write"),
        (Class::Unmap, "unmapped", "unmap"),
        (Class::Copy, "copied", "copy"),
    ];
    let totals: Vec<ClassTotals> = classes.iter().map(|(c, ..)| b.stats().totals(*c)).collect();
    for ((_, done, noun), t) in classes.iter().zip(&totals) {
        o.insert(format!("bytes_{done}"), t.bytes.into());
        o.insert(format!("num_{noun}_ops"), t.ops.into());
    }
    o.insert("num_flush_ops".into(), b.stats().totals(Class::Other).ops.into());
    for ((_, _, noun), t) in classes.iter().zip(&totals) {
        o.insert(format!("{noun}_latency_ticks"), t.latency_ns.into());
        o.insert(format!("max_{noun}_latency_ticks"), t.max_latency_ns.into());
        o.insert(format!("min_{noun}_latency_ticks"), t.min_latency_ns.into());
    }
    let errors: Map<String, Value> = b
        .stats()
        .errors()
        .into_iter()
        .map(|((sct, sc), n)| (cryptfold_bdev::Status::new(sct, sc).to_string(), n.into()))
        .collect();
    o.insert("io_error".into(), Value::Object(errors));
    Value::Object(o)
}

fn reset_iostat(c: &Control, p: ResetIostat) -> RpcResult {
    for b in chosen(c, p.name.map(|n| vec![n]))? {
        reset(&b, p.mode);
    }
    Ok(json!(true))
}

const OPCS: &[(&str, Class)] = &[
    ("read", Class::Read),
    ("write", Class::Write),
    ("unmap", Class::Unmap),
    ("copy", Class::Copy),
    ("flush", Class::Other),
];

fn classes(opc: Option<&str>) -> Result<Vec<Class>, RpcError> {
    let Some(word) = opc else { return Ok(Class::ALL.to_vec()) };
    match OPCS.iter().find(|(w, _)| *w == word) {
        Some((_, c)) => Ok(vec![*c]),
        None => {
            let known: Vec<&str> = OPCS.iter().map(|(w, _)| *w).collect();
            Err(RpcError::params(format!("opc: \"{word}\" was given; one of {} is needed", known.join(", "))))
        }
    }
}

fn enable_histogram(c: &Control, p: EnableHistogram) -> RpcResult {
    let b = c.registry.get(&p.name)?;
    classes(p.opc.as_deref())?;
    if p.granularity.is_some_and(|g| u32::from(g) != histogram::GRANULARITY) {
        return Err(RpcError::params(format!("granularity: only {} is possible", histogram::GRANULARITY)));
    }
    let mut shown = lock(&c.histogram_opc);
    match (p.enable, p.opc) {
        (true, Some(opc)) => drop(shown.insert(b.name().into(), opc)),
        _ => drop(shown.remove(b.name())),
    }
    b.enable_histogram(p.enable);
    Ok(json!(true))
}

fn trace_stages(_: &Control, p: Trace) -> RpcResult {
    let recorded = trace::recorded().into_iter().map(|(stage, h)| {
        let at = |q: f64| h.value_at_quantile(q);
        json!({"name": stage.name(), "what": stage.what(), "count": h.len(), "mean_ns": h.mean().round() as u64,
            "p50_ns": at(0.5), "p90_ns": at(0.9), "p99_ns": at(0.99), "p99_9_ns": at(0.999), "max_ns": h.max()})
    });
    let stages: Vec<Value> = recorded.collect();
    if let Some(on) = p.enable {
        trace::switch(on);
    }
    Ok(json!({"enabled": trace::is_on(), "stages": stages}))
}

fn kept(c: &Control, name: &str, opc: Option<String>) -> Result<Vec<u64>, RpcError> {
    let b = c.registry.get(name)?;
    let opc = opc.or_else(|| lock(&c.histogram_opc).get(b.name()).cloned());
    let classes = classes(opc.as_deref())?;
    if !b.histogram_enabled() {
        // SPDK's answer to a device without a histogram.
        let what = format!("no histogram is kept of \"{name}\" (bdev_enable_histogram): Bad address");
        return Err(RpcError::new(-14, what));
    }
    let all: Vec<_> = classes.into_iter().filter_map(|k| b.stats().histogram(k)).collect();
    Ok(histogram::buckets(&all))
}

fn get_histogram(c: &Control, p: GetHistogram) -> RpcResult {
    let counts = kept(c, &p.name, p.opc)?;
    Ok(json!({
        "histogram": histogram::encode(&counts),
        "granularity": histogram::GRANULARITY,
        "min_range": histogram::MIN_RANGE,
        "max_range": histogram::MAX_RANGE,
        "tsc_rate": TICK_RATE,
    }))
}

fn histogram_borders(c: &Control, p: HistogramBorders) -> RpcResult {
    if p.borders.is_empty() || p.borders.windows(2).any(|w| w[0] >= w[1]) {
        return Err(RpcError::params("borders: at least one is needed, in ascending order"));
    }
    let counts = kept(c, &p.name, None)?;
    let below = |us: u64| -> u64 { counts[..histogram::bucket(us.saturating_mul(1000))].iter().sum() };
    let mut list: Vec<u64> = p.borders.iter().map(|us| below(*us)).collect();
    list.push(counts.iter().sum());
    Ok(json!(list))
}

fn set_qos(c: &Control, p: SetQos) -> RpcResult {
    let b = c.registry.get(&p.name)?;
    let given = [p.rw_ios_per_sec, p.rw_mbytes_per_sec, p.r_mbytes_per_sec, p.w_mbytes_per_sec];
    if given.iter().all(Option::is_none) {
        return Err(RpcError::params(
            "no limit was given; one of rw_ios_per_sec, rw_mbytes_per_sec, r_mbytes_per_sec, \
            w_mbytes_per_sec is needed",
        ));
    }
    let now = b.qos();
    b.set_qos(QosLimits {
        rw_ios_per_sec: p.rw_ios_per_sec.unwrap_or(now.rw_ios_per_sec),
        rw_mbytes_per_sec: p.rw_mbytes_per_sec.unwrap_or(now.rw_mbytes_per_sec),
        r_mbytes_per_sec: p.r_mbytes_per_sec.unwrap_or(now.r_mbytes_per_sec),
        w_mbytes_per_sec: p.w_mbytes_per_sec.unwrap_or(now.w_mbytes_per_sec),
    });
    Ok(json!(true))
}

/// The call that sets a device's limits again.
pub fn qos_config(b: &Bdev) -> Option<(String, Value)> {
    let q = b.qos();
    (q != QosLimits::default()).then(|| {
        let params = json!({
            "name": b.name(),
            "rw_ios_per_sec": q.rw_ios_per_sec,
            "rw_mbytes_per_sec": q.rw_mbytes_per_sec,
            "r_mbytes_per_sec": q.r_mbytes_per_sec,
            "w_mbytes_per_sec": q.w_mbytes_per_sec,
        });
        ("bdev_set_qos_limit".into(), params)
    })
}
