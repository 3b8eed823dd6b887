//! The pool on one core over a RAM disk: writes of new, duplicate and incompressible data, reads; beside what hash,
//! codec and cipher need for the same data by themselves.
//!
//! Every round has a fresh pool. Writes go once through prepared data, in order, and end with a flush, which counts.

use std::cell::RefCell;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptfold_bdev::{Descriptor, Registry};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{Handle, Runtime};
use cryptfold_reduce::{CreateOptions, KeySource, PoolManager, VolumeOptions};
use cryptfold_reduce_format::codec::{Codec, Compression, Compressor, Decompressor};
use cryptfold_reduce_format::fingerprint::{Chunk, Fingerprint, HashId, Hasher};
use cryptfold_reduce_format::fragment::{CHUNK_BYTES, FragmentHeader, open_fragment, seal_fragment};
use cryptfold_reduce_format::ids::{
    ChunkAddr, ContainerId, DomainId, Generation, Incarnation, OwnerEpoch, SegmentAddr, ShardIx,
};
use cryptfold_reduce_format::keys::{DataKey, FingerprintSecret, Secret};
use cryptfold_reduce_format::sealed::SegmentKey;
use cryptfold_reduce_format::segment::{Cipher, Class, SegmentHeader};

use super::chain::{open, plan, ram_disk, run_load, runtime};
use super::machine::Watch;
use super::{Measure, Rounds, Row, Sample, Subject, Unit, bare};
use crate::load::{DataSource, Plan, Rng};
use crate::primitives::data;

/// Data of each kind. Bytes.
const DATA_BYTES: usize = 256 << 20;
/// The RAM disk below the pool. Bytes.
const DISK_BYTES: u64 = 1 << 30;
const IO_BYTES: usize = 128 << 10;
/// What the pool compresses and seals as one at most. Bytes.
const FRAGMENT_BYTES: usize = 64 << 10;
const DEPTH: u32 = 8;
const RANDOM_DEPTH: u32 = 32;
const POOL: &str = "figures";

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// What the pool is made of, for one core.
struct Parts {
    hasher: Hasher,
    compressor: Compressor,
    decompressor: Decompressor,
    key: SegmentKey,
    body: Vec<u8>,
    unit: Vec<u8>,
}

/// A sealed fragment.
struct Sealed {
    codec: Codec,
    unit: Vec<u8>,
}

fn segment_key() -> SegmentKey {
    let header = SegmentHeader {
        pool: uuid::Uuid::nil(),
        addr: SegmentAddr::default(),
        segment_bytes: 32 << 20,
        incarnation: Incarnation(1),
        salt: [1; 32],
        class: Class::Data,
        domain: DomainId(1),
        generation: Generation(1),
        cipher: Cipher::Gcm,
        hash: HashId::Blake3,
        codec: Codec::Zstd,
        shard: ShardIx(0),
        owner_epoch: OwnerEpoch(1),
    };
    SegmentKey::derive(&DataKey(Secret::take(&mut [7; 32])), &header)
}

impl Parts {
    fn new() -> Parts {
        Parts {
            hasher: Hasher::new(HashId::Blake3, &FingerprintSecret(Secret::take(&mut [9; 32]))),
            compressor: Compressor::new(),
            decompressor: Decompressor::new(),
            key: segment_key(),
            body: vec![0; FRAGMENT_BYTES],
            unit: Vec::new(),
        }
    }

    /// Fingerprints of all chunks.
    fn hash(&self, data: &[u8]) {
        for group in data.as_chunks::<CHUNK_BYTES>().0.chunks(16) {
            let mut chunks: [&Chunk; 16] = [&group[0]; 16];
            chunks.iter_mut().zip(group).for_each(|(to, from)| *to = from);
            let mut out = [Fingerprint::NONE; 16];
            self.hasher.hash_chunks(&chunks[..group.len()], &mut out[..group.len()]);
            black_box(&out);
        }
    }

    /// Compresses (if it pays) and seals one fragment into `self.unit`.
    fn seal(&mut self, plain: &[u8]) -> Result<Codec, String> {
        let packed = self.compressor.compress(Compression::Adaptive, &[plain], &mut self.body);
        let (codec, body) = match packed {
            Some((codec, len)) => (codec, &self.body[..len]),
            None => (Codec::Raw, plain),
        };
        let first = ContainerId::new(1).and_then(|c| ChunkAddr::new(c, 0)).ok_or("no first chunk")?;
        let chunks = (plain.len() / CHUNK_BYTES) as u8;
        let header = FragmentHeader { first, chunks, codec, body_bytes: body.len() as u32 };
        self.unit.resize(header.unit_bytes(&self.key), 0);
        seal_fragment(&self.key, 4096, &header, &[body], None, &mut self.unit).map_err(text)?;
        black_box(&self.unit);
        Ok(codec)
    }

    /// Verifies, decrypts and decodes one fragment.
    fn open(&mut self, sealed: &Sealed, out: &mut [u8]) -> Result<(), String> {
        if sealed.codec == Codec::Raw {
            return open_fragment(&self.key, 4096, &sealed.unit, out).map(drop).map_err(text);
        }
        let header = open_fragment(&self.key, 4096, &sealed.unit, &mut self.body).map_err(text)?;
        let body = &self.body[..header.body_bytes as usize];
        self.decompressor.decompress(sealed.codec, body, out).map_err(text)
    }
}

/// One pass over the data: hash, and unless it is known already compress and seal.
fn bare_write(data: &[Buf], known: bool) -> Result<Sample, String> {
    let mut parts = Parts::new();
    let (watch, start) = (Watch::start(), Instant::now());
    for buf in data {
        parts.hash(buf);
        if !known {
            for fragment in buf.chunks(FRAGMENT_BYTES) {
                parts.seal(fragment)?;
            }
        }
    }
    let per_second = data.len() as f64 / start.elapsed().as_secs_f64();
    Ok(Sample { per_second, waited_pct: watch.waited_pct() })
}

/// Opens fragments for `time`: in order, or at random; `per_op` of them are one operation.
fn bare_read(sealed: &[Sealed], random: bool, per_op: usize, time: Duration) -> Result<Sample, String> {
    let (mut parts, mut rng, mut next) = (Parts::new(), Rng::new(3), 0);
    let mut out = vec![0; FRAGMENT_BYTES];
    let mut result = Ok(());
    let sample = bare::repeat(time, || {
        for _ in 0..per_op {
            next = if random { rng.below(sealed.len() as u64) as usize } else { (next + 1) % sealed.len() };
            if let Err(e) = parts.open(&sealed[next], &mut out) {
                result = Err(e);
            }
            black_box(&mut out);
        }
    });
    result.map(|()| sample)
}

/// Buffers that compress like a system disk's content, and buffers that do not compress.
fn prepare() -> (Arc<[Buf]>, Arc<[Buf]>) {
    let count = DATA_BYTES / IO_BYTES;
    let plain = data::generate(11, DATA_BYTES);
    let packs = plain.chunks_exact(IO_BYTES).map(Buf::from_slice).collect();
    let mut rng = Rng::new(12);
    let noise = (0..count).map(|_| {
        let mut buf = Buf::alloc(IO_BYTES);
        buf.make_mut().as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = rng.next().to_le_bytes());
        buf
    });
    (packs, noise.collect())
}

/// The volumes, by what is written to them.
const UNIQUE: &str = "unique";
const DUPLICATE: &str = "duplicate";
const INCOMPRESSIBLE: &str = "incompressible";

/// A pool and its volumes.
struct Rig {
    packs: Arc<[Buf]>,
    noise: Arc<[Buf]>,
    /// Volumes of the present pool that have been written.
    written: RefCell<Vec<&'static str>>,
    runtime: Runtime,
    registry: Arc<Registry>,
    manager: Arc<PoolManager>,
}

impl Rig {
    fn new() -> Result<Rig, String> {
        let (runtime, registry) = (runtime(&[0])?, Registry::new());
        ram_disk(&registry, "ram", DISK_BYTES)?;
        let manager = PoolManager::new(registry.clone(), runtime.handles().to_vec());
        let (packs, noise) = prepare();
        let rig = Rig { packs, noise, written: RefCell::default(), runtime, registry, manager };
        rig.fresh()?;
        Ok(rig)
    }

    fn core(&self) -> &Handle {
        &self.runtime.handles()[0]
    }

    /// An empty pool with empty volumes in place of the last one.
    fn fresh(&self) -> Result<(), String> {
        if !self.manager.list().is_empty() {
            self.manager.close(POOL).map_err(text)?;
        }
        let options =
            CreateOptions { force: true, ..CreateOptions::new(KeySource::Bytes((1..=32).collect())) };
        self.manager.create("ram", POOL, &options).map_err(text)?;
        self.written.borrow_mut().clear();
        for name in [UNIQUE, DUPLICATE, INCOMPRESSIBLE] {
            let volume = VolumeOptions {
                name: name.into(),
                size_bytes: DATA_BYTES as u64,
                ..VolumeOptions::default()
            };
            self.manager.create_volume(POOL, &volume).map_err(text)?;
        }
        Ok(())
    }

    fn volume(&self, name: &str) -> Result<Arc<Descriptor>, String> {
        open(&self.registry, &format!("{POOL}/{name}"))
    }

    /// Makes sure that a volume's data is there.
    fn need(&self, name: &'static str) -> Result<(), String> {
        if self.written.borrow().contains(&name) { Ok(()) } else { self.write(name).map(drop) }
    }

    /// Writes all of its data to a volume that has none, and flushes.
    fn write(&self, name: &'static str) -> Result<Sample, String> {
        if self.written.borrow().contains(&name) {
            self.fresh()?;
        }
        if name == DUPLICATE {
            self.need(UNIQUE)?;
        }
        self.written.borrow_mut().push(name);
        let data = if name == INCOMPRESSIBLE { &self.noise } else { &self.packs };
        let device = self.volume(name)?;
        let ios = data.len() as u64;
        let base = plan(DATA_BYTES as u64, IO_BYTES, 0, false, DEPTH, Duration::ZERO);
        let plan = Plan { io_limit: Some(ios), data: DataSource::Buffers(data.clone()), ..base };
        let run = move || async move {
            let channel = device.channel().map_err(text)?;
            let start = Instant::now();
            let sample = run_load(channel.clone(), plan).await?;
            channel.flush().await.map_err(text)?;
            Ok(Sample { per_second: ios as f64 / start.elapsed().as_secs_f64(), ..sample })
        };
        self.core().block_on(run).map_err(text)?
    }

    fn read(&self, plan: Plan) -> Result<Sample, String> {
        self.need(UNIQUE)?;
        let device = self.volume(UNIQUE)?;
        let run = move || async move { run_load(device.channel().map_err(text)?, plan).await };
        self.core().block_on(run).map_err(text)?
    }

    /// Runs a bare loop on the pool's core.
    fn bare(&self, f: impl FnOnce() -> Result<Sample, String> + Send + 'static) -> Result<Sample, String> {
        self.core().block_on(move || async move { f() }).map_err(text)?
    }
}

fn seal_all(data: &[Buf]) -> Result<Arc<[Sealed]>, String> {
    let mut parts = Parts::new();
    let fragments = data.iter().flat_map(|buf| buf.chunks(FRAGMENT_BYTES));
    fragments.map(|f| parts.seal(f).map(|codec| Sealed { codec, unit: parts.unit.clone() })).collect()
}

/// The pool's figures.
pub fn pool(rounds: Rounds<'_>) -> Result<Vec<Row>, String> {
    let rig = &Rig::new()?;
    let sealed = seal_all(&rig.packs)?;
    let subject = |name, of, bytes_per_op: usize, measure| Subject {
        name,
        unit: if bytes_per_op == IO_BYTES { Unit::Megabytes } else { Unit::Ops },
        bytes_per_op,
        of,
        goal: None,
        measure,
    };
    let bare_pass = |name, data: &Arc<[Buf]>, known| {
        let data = data.clone();
        let measure: Measure<'_> = Box::new(move |_| {
            let data = data.clone();
            rig.bare(move || bare_write(&data, known))
        });
        subject(name, None, IO_BYTES, measure)
    };
    let bare_opens = |name, bytes, random, per_op| {
        let sealed = sealed.clone();
        let measure: Measure<'_> = Box::new(move |time| {
            let sealed = sealed.clone();
            rig.bare(move || bare_read(&sealed, random, per_op, time))
        });
        subject(name, None, bytes, measure)
    };
    let writes = |name, of, volume| subject(name, Some(of), IO_BYTES, Box::new(move |_| rig.write(volume)));
    let reads = |name, of, bytes, random, depth| {
        let measure: Measure<'_> =
            Box::new(move |time| rig.read(plan(DATA_BYTES as u64, bytes, 100, random, depth, time)));
        subject(name, Some(of), bytes, measure)
    };
    let subjects = vec![
        bare_pass("pool-bare-write-unique", &rig.packs, false),
        writes("pool-write-unique", "pool-bare-write-unique", UNIQUE),
        bare_pass("pool-bare-write-duplicate", &rig.packs, true),
        writes("pool-write-duplicate", "pool-bare-write-duplicate", DUPLICATE),
        bare_pass("pool-bare-write-incompressible", &rig.noise, false),
        writes("pool-write-incompressible", "pool-bare-write-incompressible", INCOMPRESSIBLE),
        bare_opens("pool-bare-read", IO_BYTES, false, IO_BYTES / FRAGMENT_BYTES),
        reads("pool-read", "pool-bare-read", IO_BYTES, false, DEPTH),
        bare_opens("pool-bare-randread-4k", CHUNK_BYTES, true, 1),
        reads("pool-randread-4k", "pool-bare-randread-4k", CHUNK_BYTES, true, RANDOM_DEPTH),
    ];
    rounds("pool", subjects)
}
