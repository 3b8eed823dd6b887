//! Large pools measured: how fast they open after a crash, what RAM they take, what a sampled index finds.
//!
//! ```text
//! cargo run --release -p cryptfold-reduce --example aged -- build FILE CHUNKS      a pool of so many chunks, left as a crash does
//! cargo run --release -p cryptfold-reduce --example aged -- crash FILE             opens it, leaves it so again
//! cargo run --release -p cryptfold-reduce --example aged -- open FILE              opens it: first read, first write, RAM
//! cargo run --release -p cryptfold-reduce --example aged -- dedupe FILE IMAGE BITS seq|streams|random
//! ```
//!
//! `build` makes all metadata and journal records as if hosts had written random data, which itself is not written (but for a
//! few blocks): FILE is sparse and takes about 25 bytes per chunk. It ends while the longest journal that there may be waits
//! for a checkpoint. `dedupe` writes IMAGE to a new pool whose index keeps one fingerprint in 2^BITS, in writes of 128 KiB in
//! sequence, as four streams by turns, or of 4 KiB in random order, and tells how many bytes are unique to it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptfold_bdev::{Access, Channel, Registry};
use cryptfold_bdev_uring::UringOptions;
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, IdlePolicy, Runtime, RuntimeConfig};
use cryptfold_reduce::{Compression, CreateOptions, KeySource, LocalPool, ScrubState, VolumeOptions};

type Fallible<T> = Result<T, String>;

const BLOCK: u64 = 4096;
const KEY: [u8; 32] = *b"a key that only measurements use";
/// Every so many blocks, 32 are really written.
const REAL_EVERY: u64 = 1 << 20;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn key() -> KeySource {
    KeySource::Bytes(KEY.to_vec())
}

fn device(path: &Path) -> Fallible<Arc<Registry>> {
    let registry = Registry::new();
    let options = UringOptions {
        name: "disk".into(),
        filename: path.into(),
        block_size_bytes: Some(4096),
        uuid: None,
        read_only: false,
        unmap: true,
        method: "bdev_uring_create",
    };
    cryptfold_bdev_uring::create(&registry, options).map_err(text)?;
    Ok(registry)
}

fn fresh(path: &Path, bytes: u64) -> Fallible<()> {
    let file = File::create(path).map_err(text)?;
    file.set_len(bytes).map_err(text)
}

fn volume(blocks: u64) -> VolumeOptions {
    VolumeOptions { name: "v".into(), size_bytes: blocks * BLOCK, ..VolumeOptions::default() }
}

fn channel(registry: &Arc<Registry>) -> Fallible<Channel> {
    registry.open("p/v", Access::ReadWrite, |_| ()).map_err(text)?.channel().map_err(text)
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What is really written at `lba`.
fn real(lba: u64) -> Buf {
    let mut state = lba;
    Buf::from_slice(&(0..32 * 512).flat_map(|_| random(&mut state).to_le_bytes()).collect::<Vec<u8>>())
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
}

fn show(pool: &LocalPool, what: &str) {
    let info = pool.info();
    let backlog = pool.backlog();
    println!(
        "{what}: {} chunks, {:.2} TB stored, metadata {:.2} GB; budget {:.0} MB, pool counts {:.0} MB, resident {:.0} MB; \
         index: {} entries, one in {}; journal {} of {} blocks, {} bytes of changed leaves (limit {})",
        info.space.unique_bytes / BLOCK,
        info.space.stored_bytes as f64 / 1e12,
        info.space.metadata_bytes as f64 / 1e9,
        info.memory_budget_bytes as f64 / 1e6,
        info.memory_bytes as f64 / 1e6,
        resident() as f64 / 1e6,
        info.index_entries,
        info.index_sampling,
        backlog.journal_blocks,
        backlog.ring_blocks,
        backlog.dirty_bytes,
        backlog.dirty_limit,
    );
}

async fn build(path: std::path::PathBuf, chunks: u64) -> Fallible<()> {
    // Data, headers, reserve and a little to spare.
    fresh(&path, chunks * 4130 / 20 * 23 + (24 << 30))?;
    let registry = device(&path)?;
    let pool = LocalPool::create(&registry, "disk", "p", &CreateOptions::new(key())).await.map_err(text)?;
    let blocks = chunks.next_multiple_of(32);
    pool.create_volume(&volume(blocks)).await.map_err(text)?;
    let host = channel(&registry)?;
    let started = Instant::now();
    for lba in (0..blocks).step_by(32) {
        if lba % REAL_EVERY == 0 {
            host.write(lba, real(lba), false).await.map_err(text)?;
        } else {
            pool.pretend("v", lba, 32, 1).await.map_err(text)?;
        }
        if lba % (1 << 25) == 0 {
            show(&pool, &format!("{:.0} s", started.elapsed().as_secs_f64()));
        }
    }
    host.flush().await.map_err(text)?;
    pool.checkpoint().await.map_err(text)?;
    show(&pool, "built");
    crash_of(&pool, &host, blocks).await
}

/// Opens a pool that was built before and leaves it as a crash does once more.
async fn crash(path: std::path::PathBuf) -> Fallible<()> {
    let registry = device(&path)?;
    let pool = LocalPool::open(&registry, "disk", &key(), None).await.map_err(text)?.ok_or("no pool")?;
    let host = channel(&registry)?;
    pool.checkpoint().await.map_err(text)?;
    let blocks = pool.volumes()[0].size_bytes / BLOCK;
    crash_of(&pool, &host, blocks).await
}

async fn crash_of(pool: &LocalPool, host: &Channel, blocks: u64) -> Fallible<()> {
    let held = pool.hold_checkpoints().await;
    let mut state = 5;
    let mut written = Vec::new();
    for n in 0.. {
        // First one block in eight MiB: each changes a leaf of the map and a container. Before these are so many that changes
        // wait, the same blocks again, until the ring is so full that they do.
        let backlog = pool.backlog();
        let again = written.len() > 1000 && (backlog.dirty_bytes > backlog.dirty_limit * 5 / 4 || n > 60_000);
        let mut lba = random(&mut state) % blocks;
        if again {
            lba = written[lba as usize % written.len()];
        } else if lba % REAL_EVERY < 32 {
            lba = (lba + 32) % blocks;
        }
        if !again {
            written.push(lba);
        }
        let one = pool.pretend("v", lba, 1, 2 + n);
        if reactor::timeout(Duration::from_secs(5), one).await.is_err() {
            break;
        }
        if n % 4096 == 0 {
            // Later the committer would be behind, not the ring full.
            host.flush().await.map_err(text)?;
        }
    }
    host.flush().await.map_err(text)?;
    show(pool, "crashes now");
    let _ = held;
    // As a crash: nothing is closed.
    std::process::exit(0)
}

async fn open(path: std::path::PathBuf) -> Fallible<()> {
    drop_caches();
    let registry = device(&path)?;
    let started = Instant::now();
    let pool = LocalPool::open(&registry, "disk", &key(), None).await.map_err(text)?.ok_or("no pool")?;
    let opened = started.elapsed();
    let host = channel(&registry)?;
    let lba = 3 * REAL_EVERY;
    let data = host.read(lba, 32).await.map_err(text)?.to_contiguous();
    let read = started.elapsed();
    if data[..] != real(lba)[..] {
        return Err("the first read is wrong".into());
    }
    host.write(lba + 77, real(1).slice(0..4096), false).await.map_err(text)?;
    host.flush().await.map_err(text)?;
    let written = started.elapsed();
    println!(
        "open {:.2} s, first read done {:.2} s, first write durable {:.2} s",
        opened.as_secs_f64(),
        read.as_secs_f64(),
        written.as_secs_f64()
    );
    let mut most = 0;
    let mut before = u64::MAX;
    for second in 0..600 {
        reactor::sleep(Duration::from_secs(1)).await;
        most = most.max(resident());
        let entries = pool.info().index_entries;
        if second % 20 == 0 {
            show(&pool, &format!("{second} s after"));
        }
        if entries == before {
            break;
        }
        before = entries;
    }
    show(&pool, &format!("index loaded after {:.0} s", started.elapsed().as_secs_f64()));
    // Overwrites and reads at random, and new data.
    let blocks = pool.volumes()[0].size_bytes / BLOCK;
    let mut state = 9;
    for n in 0..100_000 {
        pool.pretend("v", random(&mut state) % (blocks - 32), 1 + (n % 32) as usize, 77 + n)
            .await
            .map_err(text)?;
        if n % 1000 == 0 {
            most = most.max(resident());
        }
    }
    show(&pool, "after 100,000 random overwrites");
    println!(
        "most resident {:.0} MB of a budget of {:.0} MB",
        most as f64 / 1e6,
        pool.info().memory_budget_bytes as f64 / 1e6
    );
    std::process::exit(0)
}

fn drop_caches() {
    if std::fs::write("/proc/sys/vm/drop_caches", "3").is_err() {
        println!(
            "caches are not dropped (root only); the file is read with O_DIRECT where its file system can"
        );
    }
}

async fn dedupe(
    path: std::path::PathBuf,
    image: std::path::PathBuf,
    bits: u32,
    order: String,
) -> Fallible<()> {
    let image = File::open(image).map_err(text)?;
    let bytes = image.metadata().map_err(text)?.len();
    let blocks = bytes / BLOCK;
    fresh(&path, bytes + (1 << 30))?;
    let registry = device(&path)?;
    let mut options = CreateOptions::new(key());
    options.compression = Some(Compression::Off);
    let pool = LocalPool::create(&registry, "disk", "p", &options).await.map_err(text)?;
    pool.create_volume(&volume(blocks)).await.map_err(text)?;
    pool.sample_index(bits);
    let host = channel(&registry)?;
    let unit = if order == "random" { 1 } else { 32 };
    let count = blocks / unit;
    let mut places: Vec<u64> = (0..count).collect();
    match order.as_str() {
        "seq" => {}
        "streams" => {
            places = (0..count.div_ceil(4))
                .flat_map(|n| (0..4).map(move |s| s * count.div_ceil(4) + n))
                .filter(|&n| n < count)
                .collect()
        }
        "random" => {
            let mut state = 3;
            for n in (1..places.len()).rev() {
                places.swap(n, (random(&mut state) % (n as u64 + 1)) as usize);
            }
        }
        _ => return Err("seq, streams or random".into()),
    }
    let started = Instant::now();
    for group in places.chunks(8) {
        let mut writes = Vec::new();
        for place in group {
            let mut buf = Buf::alloc((unit * BLOCK) as usize);
            image.read_exact_at(buf.make_mut(), place * unit * BLOCK).map_err(text)?;
            writes.push(host.write(place * unit, buf, false));
        }
        for write in writes {
            write.await.map_err(text)?;
        }
    }
    host.flush().await.map_err(text)?;
    let info = pool.info();
    let seconds = started.elapsed().as_secs_f64();
    let late = Instant::now();
    pool.start_late(None).map_err(text)?;
    while pool.info().late.state == ScrubState::Running {
        reactor::sleep(Duration::from_millis(50)).await;
    }
    println!(
        "{}",
        serde_json::json!({
            "order": order, "one_in": 1u64 << bits, "data_blocks": (info.space.logical_bytes - info.space.zero_bytes) / BLOCK,
            "unique_blocks": info.space.unique_bytes / BLOCK, "seconds": seconds,
            "unique_blocks_after_late_dedupe": pool.info().space.unique_bytes / BLOCK, "late_seconds": late.elapsed().as_secs_f64(),
        })
    );
    std::process::exit(0)
}

fn main() -> Result<(), String> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| args.get(at).and_then(|n| n.parse::<u64>().ok()).ok_or("a number is needed");
    let path = std::path::PathBuf::from(args.get(1).ok_or("build|crash|open|dedupe FILE ...")?);
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let config = RuntimeConfig {
        cores: vec![0],
        policy: IdlePolicy::Interrupt,
        pin: false,
        ..RuntimeConfig::default()
    };
    let runtime = Runtime::start(config).map_err(text)?;
    let home = &runtime.handles()[0];
    let done = match args[0].as_str() {
        "build" => {
            let chunks = number(2)?;
            home.block_on(move || build(path, chunks))
        }
        "crash" => home.block_on(move || crash(path)),
        "open" => home.block_on(move || open(path)),
        "dedupe" => {
            let image = std::path::PathBuf::from(args.get(2).ok_or("an image is needed")?);
            let (bits, order) = (number(3)? as u32, args.get(4).cloned().unwrap_or_else(|| "seq".into()));
            home.block_on(move || dedupe(path, image, bits, order))
        }
        other => return Err(format!("{other}: build, crash, open or dedupe")),
    };
    done.map_err(text)?
}
