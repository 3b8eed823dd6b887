//! Devices on one core: the null device (the cost of a layer), and encryption over a RAM disk.

use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Descriptor, Registry};
use cryptfold_bdev_crypto::KeyRef;
use cryptfold_bdev_crypto::crypto::{self, CryptoOptions};
use cryptfold_bdev_crypto::engine::{Direction, XtsKey};
use cryptfold_bdev_malloc::{self as malloc, MallocOptions};
use cryptfold_bdev_null::{self as null_device, NullOptions};
use cryptfold_reactor::{Handle, Runtime, RuntimeConfig};

use super::machine::Watch;
use super::{Rounds, Row, Sample, Subject, Unit, bare};
use crate::load::{DataSource, Latency, Plan, Sink, run_worker};

/// Span of the RAM disk and of the bare loops. Bytes.
pub const SPAN: u64 = 512 << 20;
const BLOCK: u32 = 4096;
const RAMP: Duration = Duration::from_millis(100);

pub fn runtime(cores: &[usize]) -> Result<Runtime, String> {
    Runtime::start(RuntimeConfig { cores: cores.to_vec(), ..RuntimeConfig::default() })
        .map_err(|e| e.to_string())
}

/// A load over the first `bytes` of a device with blocks of 4 KiB.
pub fn plan(
    bytes: u64,
    bytes_per_io: usize,
    read_pct: u8,
    random: bool,
    iodepth: u32,
    time: Duration,
) -> Plan {
    Plan {
        random,
        read_pct,
        blocks_per_io: bytes_per_io as u64 / u64::from(BLOCK),
        bytes_per_io,
        first_slot: 0,
        slots: bytes / bytes_per_io as u64,
        iodepth,
        ramp: RAMP.min(time / 4),
        runtime: time,
        io_limit: None,
        shared: None,
        verify: false,
        fua: false,
        data: DataSource::Repeat,
        run_seed: 1,
        seed: cryptfold_reactor::random_u64(),
    }
}

/// Runs a load on this reactor.
pub async fn run_load(sink: impl Sink, plan: Plan) -> Result<Sample, String> {
    let watch = Watch::start();
    let report = run_worker(sink, plan).await?;
    if let Some(e) = report.first_error {
        return Err(e);
    }
    let seconds = (report.measured_ns as f64 / 1e9).max(1e-9);
    let p99_9_us = Some(Latency::of(&report.latency).p99_9);
    Ok(Sample { p99_9_us, ..Sample::new(report.ios as f64 / seconds, watch.waited_pct()) })
}

fn device_load(handle: &Handle, device: &Arc<Descriptor>, plan: Plan) -> Result<Sample, String> {
    let device = device.clone();
    let run = move || async move { run_load(device.channel().map_err(|e| e.to_string())?, plan).await };
    handle.block_on(run).map_err(|e| e.to_string())?
}

pub fn open(registry: &Arc<Registry>, name: &str) -> Result<Arc<Descriptor>, String> {
    registry.open(name, Access::ReadWrite, |_| {}).map_err(|e| e.to_string())
}

/// A RAM disk.
pub fn ram_disk(registry: &Arc<Registry>, name: &str, bytes: u64) -> Result<(), String> {
    let options = MallocOptions {
        name: name.into(),
        num_blocks: bytes / u64::from(BLOCK),
        block_size_bytes: BLOCK,
        uuid: None,
        optimal_io_boundary: 0,
    };
    malloc::create(registry, options).map(drop).map_err(|e| e.to_string())
}

/// 4 KiB random reads of the null device.
pub fn null(rounds: Rounds<'_>) -> Result<Vec<Row>, String> {
    let (runtime, registry) = (runtime(&[0])?, Registry::new());
    let options = NullOptions {
        name: "null".into(),
        num_blocks: SPAN / u64::from(BLOCK),
        block_size_bytes: BLOCK,
        uuid: None,
    };
    null_device::create(&registry, options).map_err(|e| e.to_string())?;
    let device = open(&registry, "null")?;
    let handle = &runtime.handles()[0];
    let randread = Subject {
        name: "null-randread-4k",
        unit: Unit::Ops,
        bytes_per_op: 4096,
        of: None,
        scales: None,
        goal: Some(8e6),
        measure: Box::new(|time| device_load(handle, &device, plan(SPAN, 4096, 100, true, 128, time))),
    };
    rounds("null", vec![randread])
}

/// 4 KiB random reads and writes of the crypto device over a RAM disk, beside the bare cipher.
pub fn crypto(rounds: Rounds<'_>) -> Result<Vec<Row>, String> {
    let (runtime, registry) = (runtime(&[0])?, Registry::new());
    let bytes: Vec<u8> = (1..=64).collect();
    let key = Arc::new(XtsKey::new(&bytes).map_err(|e| e.to_string())?);
    ram_disk(&registry, "ram", SPAN)?;
    let options = CryptoOptions {
        name: "crypto".into(),
        base_bdev_name: "ram".into(),
        key: key.clone(),
        key_ref: KeyRef::Name("figures".into()),
        uuid: None,
    };
    crypto::create(&registry, options).map_err(|e| e.to_string())?;
    let device = open(&registry, "crypto")?;
    let handle = &runtime.handles()[0];
    let span = Arc::new(std::sync::Mutex::new(bare::Span::new(SPAN as usize, 4096)));
    let bare = |direction| {
        let (key, span) = (key.clone(), span.clone());
        Box::new(move |time| {
            let (key, span) = (key.clone(), span.clone());
            // On the same core.
            let run = move || async move {
                let mut span = span.lock().map_err(|e| e.to_string())?;
                bare::xts(&key, direction, &mut span, time)
            };
            handle.block_on(run).map_err(|e| e.to_string())?
        })
    };
    let load = |read_pct| {
        let device = &device;
        Box::new(move |time| device_load(handle, device, plan(SPAN, 4096, read_pct, true, 128, time)))
    };
    let subject = |name, of: Option<&'static str>, measure| Subject {
        name,
        unit: Unit::Ops,
        bytes_per_op: 4096,
        of,
        scales: None,
        goal: of.map(|_| 0.8),
        measure,
    };
    let subjects = vec![
        subject("crypto-bare-decrypt-4k", None, bare(Direction::Decrypt)),
        subject("crypto-randread-4k", Some("crypto-bare-decrypt-4k"), load(100)),
        subject("crypto-bare-encrypt-4k", None, bare(Direction::Encrypt)),
        subject("crypto-randwrite-4k", Some("crypto-bare-encrypt-4k"), load(0)),
    ];
    rounds("crypto", subjects)
}
