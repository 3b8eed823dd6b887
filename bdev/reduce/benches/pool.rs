//! The pool's speed on one core (in its CPU time), against the bare loops of hash, codec and cipher over the same data in the same run.
//!
//! `cargo bench -p cryptfold-reduce --bench pool [-- MIB] [random]`: data set of so many MiB (default 256); `random`: only
//! 4 KiB overwrites at random.

#[path = "../tests/support/mod.rs"]
mod support;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Registry};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, IdlePolicy, Runtime, RuntimeConfig};
use cryptfold_reduce::{CreateOptions, KeySource, LocalPool, VolumeOptions};
use cryptfold_reduce_format::block::Block;
use cryptfold_reduce_format::codec::{Codec, Compression, Compressor, Decompressor};
use cryptfold_reduce_format::fingerprint::{Chunk, Fingerprint, HashId, Hasher};
use cryptfold_reduce_format::fragment::{self, FragmentHeader};
use cryptfold_reduce_format::ids::*;
use cryptfold_reduce_format::keys::{DataKey, FingerprintSecret, Secret};
use cryptfold_reduce_format::sealed::SegmentKey;
use cryptfold_reduce_format::segment::{Cipher, Class, SegmentHeader};

const IO: usize = 128 << 10;
const GROUP: usize = 16;

/// CPU time of this thread: what others do on the machine does not count.
#[derive(Clone, Copy)]
struct Instant(Duration);

impl Instant {
    fn now() -> Instant {
        let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Instant(Duration::from_nanos(stat.split_whitespace().next().unwrap().parse().unwrap()))
    }
    fn elapsed(self) -> Duration {
        Instant::now().0 - self.0
    }
}

struct Rng(u64);
impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

fn noise(bytes: usize, seed: u64) -> Vec<Buf> {
    let mut rng = Rng(seed);
    (0..bytes / IO)
        .map(|_| {
            let mut buf = Buf::alloc(IO);
            buf.make_mut().chunks_mut(8).for_each(|w| w.copy_from_slice(&rng.next().to_le_bytes()));
            buf
        })
        .collect()
}

/// About 2:1 for zstd level 1: words of a vocabulary.
fn text(bytes: usize, seed: u64) -> Vec<Buf> {
    let mut rng = Rng(seed);
    let words: Vec<Vec<u8>> = (0..4096)
        .map(|_| (0..3 + rng.next() % 9).map(|_| b'a' + (rng.next() % 26) as u8).collect())
        .collect();
    (0..bytes / IO)
        .map(|_| {
            let mut line = Vec::with_capacity(IO + 16);
            while line.len() < IO {
                line.extend_from_slice(&words[(rng.next() % 4096) as usize]);
                line.push(b' ');
            }
            Buf::from_slice(&line[..IO])
        })
        .collect()
}

fn mb_s(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}

fn segment_key() -> SegmentKey {
    let header = SegmentHeader {
        pool: uuid::Uuid::nil(),
        addr: SegmentAddr { device: DeviceIx(0), segment: SegmentNo(9) },
        segment_bytes: 64 << 20,
        incarnation: Incarnation(1),
        salt: [7; 32],
        class: Class::Data,
        domain: DomainId(1),
        generation: Generation(1),
        cipher: Cipher::Gcm,
        hash: HashId::Blake3,
        codec: Codec::Zstd,
        shard: ShardIx(0),
        owner_epoch: OwnerEpoch(1),
    };
    let _: fn(&Block) = |_| {};
    SegmentKey::derive(&DataKey(Secret::take(&mut [9; 32])), &header)
}

/// Bare loops over `data`: hash; hash and cipher; hash, codec and cipher; and back: cipher and codec. Seconds each.
fn bare(data: &[Buf]) -> (Duration, Duration, Duration) {
    let hasher = Hasher::new(HashId::Blake3, &FingerprintSecret(Secret::take(&mut [5; 32])));
    let mut prints = vec![Fingerprint::NONE; IO / 4096];
    let start = Instant::now();
    for buf in data {
        let (chunks, _) = buf.as_chunks::<4096>();
        let chunks: Vec<&Chunk> = chunks.iter().collect();
        hasher.hash_chunks(&chunks, &mut prints);
        std::hint::black_box(&prints);
    }
    let hash = start.elapsed();
    let key = segment_key();
    let mut codec = Compressor::new();
    let mut out = vec![0; GROUP * 4096 + 64];
    let mut sealed = Vec::new();
    let start = Instant::now();
    let mut offset = 4096;
    for buf in data {
        for group in buf.chunks(GROUP * 4096) {
            let at = fragment::body_at(&key);
            let first = ChunkAddr::new(ContainerId::new(1).unwrap(), 0).unwrap();
            let mut header = FragmentHeader {
                first,
                chunks: GROUP as u8,
                codec: Codec::Raw,
                body_bytes: group.len() as u32,
            };
            let found = codec.compress(Compression::Adaptive, &[group], &mut out[at..at + group.len()]);
            let unit = match found {
                Some((codec, bytes)) => {
                    header.codec = codec;
                    header.body_bytes = bytes as u32;
                    let unit = header.unit_bytes(&key);
                    fragment::seal_in_place(&key, offset, &header, None, &mut out[..unit]).unwrap();
                    unit
                }
                None => {
                    let unit = header.unit_bytes(&key);
                    fragment::seal_fragment(&key, offset, &header, &[group], None, &mut out[..unit]).unwrap();
                    unit
                }
            };
            // Kept for the way back, a few of them: this is not a measure of memory.
            if sealed.len() < 64 {
                sealed.push((offset, out[..unit].to_vec()));
            }
            offset = (offset + 65600) % (1 << 31);
        }
    }
    let work = start.elapsed();
    let mut decoder = Decompressor::new();
    let mut plain = vec![0; GROUP * 4096];
    let mut scratch = vec![0; GROUP * 4096 + 64];
    let start = Instant::now();
    for (offset, unit) in sealed.iter().cycle().take(data.len() * IO / GROUP / 4096) {
        let header = fragment::open_fragment(&key, *offset, unit, &mut scratch).unwrap();
        if header.codec != Codec::Raw {
            decoder.decompress(header.codec, &scratch[..header.body_bytes as usize], &mut plain).unwrap();
        }
    }
    (hash, work, start.elapsed())
}

async fn volume(pool: &LocalPool, registry: &std::sync::Arc<Registry>, name: &str, bytes: u64) -> Channel {
    let options = VolumeOptions { name: name.into(), size_bytes: bytes, ..VolumeOptions::default() };
    pool.create_volume(&options).await.unwrap();
    registry.open(&format!("p/{name}"), Access::ReadWrite, |_| ()).unwrap().channel().unwrap()
}

/// Runs `depth` tasks that take operations from a counter until `count` are done.
async fn parallel<F, Fut>(depth: usize, count: usize, op: F) -> Duration
where
    F: Fn(usize) -> Fut + 'static,
    Fut: Future<Output = ()> + 'static,
{
    let (next, op) = (Rc::new(Cell::new(0)), Rc::new(op));
    let start = Instant::now();
    let tasks: Vec<_> = (0..depth)
        .map(|_| {
            let (next, op) = (next.clone(), op.clone());
            reactor::spawn_local(async move {
                loop {
                    let n = next.get();
                    if n >= count {
                        return;
                    }
                    next.set(n + 1);
                    op(n).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await;
    }
    start.elapsed()
}

async fn write_all(channel: &Channel, data: &Rc<Vec<Buf>>, at: u64) -> Duration {
    let (channel, data) = (channel.clone(), data.clone());
    parallel(4, data.len(), move |n| {
        let (channel, buf) = (channel.clone(), data[n].clone());
        async move { channel.write(at + n as u64 * 32, buf, false).await.unwrap() }
    })
    .await
}

async fn read_all(channel: &Channel, count: usize) -> Duration {
    let channel = channel.clone();
    parallel(4, count, move |n| {
        let channel = channel.clone();
        async move { drop(channel.read(n as u64 * 32, 32).await.unwrap()) }
    })
    .await
}

async fn measure(mib: usize, only_random: bool) {
    let bytes = mib << 20;
    let registry = Registry::new();
    support::RamDisk::create(&registry, "ram", 3 * bytes as u64 + (512 << 20));
    let mut options = CreateOptions::new(KeySource::Bytes((0..32).collect()));
    options.memory_budget = Some(1 << 30);
    let pool = LocalPool::create(&registry, "ram", "p", &options).await.unwrap();
    let words = Rc::new(text(bytes, 1));
    let random = Rc::new(noise(bytes, 2));
    let (hash, work, back) = bare(&words);
    println!(
        "bare, compressible: hash {:.0}, codec+cipher {:.0}, back {:.0} MB/s",
        mb_s(bytes, hash),
        mb_s(bytes, work),
        mb_s(bytes, back)
    );
    let line = |what: &str, time: Duration, bare: Duration| {
        println!(
            "{what:34} {:8.0} MB/s   {:3.0} % of its parts",
            mb_s(bytes, time),
            100.0 * bare.as_secs_f64() / time.as_secs_f64()
        );
    };
    let a = volume(&pool, &registry, "a", 4 * bytes as u64).await;
    if !only_random {
        line("unique, compressible, 128 KiB write", write_all(&a, &words, 0).await, hash + work);
        println!("  {:?}", pool.info().space);
        line("duplicate, 128 KiB write", write_all(&a, &words, bytes as u64 / 4096).await, hash);
        line("128 KiB read", read_all(&a, words.len()).await, back);
    }
    let (hash, work, back) = bare(&random);
    println!(
        "bare, incompressible: hash {:.0}, codec+cipher {:.0}, back {:.0} MB/s",
        mb_s(bytes, hash),
        mb_s(bytes, work),
        mb_s(bytes, back)
    );
    let b = volume(&pool, &registry, "b", bytes as u64).await;
    line("incompressible, 128 KiB write", write_all(&b, &random, 0).await, hash + work);
    line("128 KiB read", read_all(&b, random.len()).await, back);
    a.unmap(0, a.bdev().blocks()).await.unwrap();
    // 4 KiB, at random, over the incompressible volume.
    let count = if only_random { 1_000_000 } else { 200_000 };
    let blocks = bytes as u64 / 4096;
    let (channel, data) = (b.clone(), random.clone());
    let rng = Rc::new(Cell::new(3u64));
    let time = parallel(64, count, move |n| {
        let (channel, data, rng) = (channel.clone(), data.clone(), rng.clone());
        async move {
            let mut r = Rng(rng.get());
            let lba = r.next() % blocks;
            let source = &data[(r.next() as usize) % data.len()];
            rng.set(r.0);
            // Content that was never written before: a chunk that begins elsewhere, stamped.
            let mut buf = Buf::from_slice(&source[..4096]);
            buf.make_mut()[..8].copy_from_slice(&(n as u64 | 1 << 63).to_le_bytes());
            channel.write(lba, buf, false).await.unwrap();
        }
    })
    .await;
    println!("4 KiB random overwrite, depth 64    {:8.0} IOPS", count as f64 / time.as_secs_f64());
    if only_random {
        return;
    }
    let channel = b.clone();
    let rng = Rc::new(Cell::new(5u64));
    let time = parallel(64, count, move |_| {
        let (channel, rng) = (channel.clone(), rng.clone());
        async move {
            let mut r = Rng(rng.get());
            let lba = r.next() % blocks;
            rng.set(r.0);
            drop(channel.read(lba, 1).await.unwrap());
        }
    })
    .await;
    println!("4 KiB random read, depth 64         {:8.0} IOPS", count as f64 / time.as_secs_f64());
    let report = pool.check(false).await.unwrap();
    assert!(report.is_clean(), "{:?}", report.problems);
    println!("{:#?}", pool.info());
}

fn main() {
    let mib = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(256);
    let only_random = std::env::args().any(|arg| arg == "random");
    let config = RuntimeConfig {
        cores: vec![0],
        policy: IdlePolicy::default(),
        pin: false,
        ..RuntimeConfig::default()
    };
    let runtime = Runtime::start(config).unwrap();
    runtime.handles()[0].block_on(move || measure(mib, only_random)).unwrap();
    runtime.stop();
}
