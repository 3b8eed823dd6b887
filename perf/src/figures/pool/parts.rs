//! The bare loops: what the data requires by itself (fingerprints, codec, cipher), fragment by fragment as the pool forms
//! them, over spans of memory as large as the data.

use std::hint::black_box;
use std::time::{Duration, Instant};

use cryptfold_reactor::memory::Buf;
use cryptfold_reduce_format::codec::{Codec, Compression, Compressor, Decompressor};
use cryptfold_reduce_format::fingerprint::{Chunk, Fingerprint, HashId, Hasher};
use cryptfold_reduce_format::fragment::{self, CHUNK_BYTES, FragmentHeader};
use cryptfold_reduce_format::ids::{
    ChunkAddr, ContainerId, DomainId, Generation, Incarnation, OwnerEpoch, SegmentAddr, ShardIx,
};
use cryptfold_reduce_format::keys::{DataKey, FingerprintSecret, Secret};
use cryptfold_reduce_format::sealed::SegmentKey;
use cryptfold_reduce_format::segment::{Cipher, Class, SegmentHeader};

use super::{Kind, text};
use crate::figures::machine::Watch;
use crate::figures::{Sample, bare};
use crate::load::Rng;

/// What the pool compresses and seals as one. Bytes.
pub const FRAGMENT_BYTES: usize = 64 << 10;
/// What it seals as one when no codec helps. Bytes.
pub const RAW_BYTES: usize = 16 << 10;
/// Memory of a span is taken in buffers of this size. Bytes.
const BUF_BYTES: usize = 1 << 20;
/// Chunks hashed together.
const LANES: usize = 16;

/// What fingerprints and seals.
#[derive(Clone, Copy)]
pub struct Algorithms {
    pub cipher: Cipher,
    pub hash: HashId,
}

impl Algorithms {
    /// Those of pools that nobody asked anything of.
    pub const DEFAULT: Algorithms = Algorithms { cipher: Cipher::Gcm, hash: HashId::Blake3 };
}

/// Hash, codec and cipher, for one core.
pub struct Parts {
    hasher: Hasher,
    compressor: Compressor,
    decompressor: Decompressor,
    key: SegmentKey,
    body: Vec<u8>,
}

/// Where a fragment lies in a span.
#[derive(Clone, Copy)]
pub struct Sealed {
    codec: Codec,
    chunks: usize,
    buf: usize,
    at: usize,
    bytes: usize,
}

/// Memory that fragments are sealed into one behind the other, from the start again at the end.
pub struct Span {
    bufs: Vec<Buf>,
    buf: usize,
    at: usize,
}

impl Span {
    /// `bytes` of memory, touched once.
    pub fn new(bytes: usize) -> Span {
        let bufs = (0..bytes.div_ceil(BUF_BYTES)).map(|_| Buf::alloc_zeroed(BUF_BYTES));
        Span { bufs: bufs.collect(), buf: 0, at: 0 }
    }

    /// Back to the start.
    fn rewind(&mut self) {
        (self.buf, self.at) = (0, 0);
    }
}

fn segment_key(algorithms: Algorithms) -> SegmentKey {
    let header = SegmentHeader {
        pool: uuid::Uuid::nil(),
        addr: SegmentAddr::default(),
        segment_bytes: 32 << 20,
        incarnation: Incarnation(1),
        salt: [1; 32],
        class: Class::Data,
        domain: DomainId(1),
        generation: Generation(1),
        cipher: algorithms.cipher,
        hash: algorithms.hash,
        codec: Codec::Zstd,
        shard: ShardIx(0),
        owner_epoch: OwnerEpoch(1),
    };
    SegmentKey::derive(&DataKey(Secret::take(&mut [7; 32])), &header)
}

impl Parts {
    pub fn of(algorithms: Algorithms) -> Parts {
        Parts {
            hasher: Hasher::new(algorithms.hash, &FingerprintSecret(Secret::take(&mut [9; 32]))),
            compressor: Compressor::new(),
            decompressor: Decompressor::new(),
            key: segment_key(algorithms),
            body: vec![0; FRAGMENT_BYTES],
        }
    }

    /// Fingerprints of all chunks of these bytes.
    fn hash(&self, data: &[u8]) {
        for group in data.as_chunks::<CHUNK_BYTES>().0.chunks(LANES) {
            let mut chunks: [&Chunk; LANES] = [&group[0]; LANES];
            chunks.iter_mut().zip(group).for_each(|(to, from)| *to = from);
            self.hash_group(&chunks[..group.len()]);
        }
    }

    fn hash_group(&self, chunks: &[&Chunk]) {
        let mut out = [Fingerprint::NONE; LANES];
        self.hasher.hash_chunks(chunks, &mut out[..chunks.len()]);
        black_box(&out);
    }

    /// Compresses (unless raw) and seals one fragment straight into the span.
    fn seal(&mut self, plain: &[u8], raw: bool, span: &mut Span) -> Result<Sealed, String> {
        let first = ContainerId::new(1).and_then(|c| ChunkAddr::new(c, 0)).ok_or("no first chunk")?;
        let chunks = (plain.len() / CHUNK_BYTES) as u8;
        if span.at + plain.len() + 64 > BUF_BYTES {
            (span.buf, span.at) = ((span.buf + 1) % span.bufs.len(), 0);
        }
        let out = span.bufs[span.buf].get_mut().ok_or("the span is shared")?;
        let out = &mut out[span.at..];
        let body_at = fragment::body_at(&self.key);
        let packed = match raw {
            true => None,
            false => {
                let room = &mut out[body_at..body_at + plain.len()];
                self.compressor.compress(Compression::Adaptive, &[plain], room)
            }
        };
        let (codec, body_bytes) = packed.unwrap_or((Codec::Raw, plain.len()));
        let header = FragmentHeader { first, chunks, codec, body_bytes: body_bytes as u32 };
        let bytes = header.unit_bytes(&self.key);
        let unit = &mut out[..bytes];
        if packed.is_some() {
            fragment::seal_in_place(&self.key, 4096, &header, None, unit).map_err(text)?;
        } else {
            fragment::seal_fragment(&self.key, 4096, &header, &[plain], None, unit).map_err(text)?;
        }
        let sealed = Sealed { codec, chunks: chunks.into(), buf: span.buf, at: span.at, bytes };
        span.at += bytes;
        Ok(sealed)
    }

    /// Verifies, decrypts and decodes one fragment, to the last of `wanted` bytes.
    fn open(&mut self, span: &Span, sealed: &Sealed, out: &mut [u8], wanted: usize) -> Result<(), String> {
        let unit = &span.bufs[sealed.buf][sealed.at..sealed.at + sealed.bytes];
        if sealed.codec == Codec::Raw {
            return fragment::open_fragment(&self.key, 4096, unit, out).map(drop).map_err(text);
        }
        let header = fragment::open_fragment(&self.key, 4096, unit, &mut self.body).map_err(text)?;
        let body = &self.body[..header.body_bytes as usize];
        self.decompressor.decompress_front(sealed.codec, body, out, wanted).map(drop).map_err(text)
    }

    /// Seals everything in fragments of `bytes`, as the pool would.
    pub fn seal_all(&mut self, data: &[Buf], bytes: usize, span: &mut Span) -> Result<Vec<Sealed>, String> {
        let fragments = data.iter().flat_map(|buf| buf.chunks(bytes));
        fragments.map(|fragment| self.seal(fragment, false, span)).collect()
    }
}

/// One pass over the data as it comes in large writes.
pub fn write(data: &[Buf], algorithms: Algorithms, kind: Kind, span: &mut Span) -> Result<Sample, String> {
    let mut parts = Parts::of(algorithms);
    span.rewind();
    let (watch, start) = (Watch::start(), Instant::now());
    for buf in data {
        parts.hash(buf);
        let (raw, bytes) = match kind {
            Kind::Duplicate => continue,
            Kind::Unique => (false, FRAGMENT_BYTES),
            Kind::Incompressible => (true, RAW_BYTES),
        };
        for fragment in buf.chunks(bytes) {
            parts.seal(fragment, raw, span)?;
        }
    }
    let per_second = data.len() as f64 / start.elapsed().as_secs_f64();
    Ok(Sample::new(per_second, watch.waited_pct()))
}

/// The chunks of the data as single writes, for `time`: each is a fragment of its own.
pub fn overwrite(
    data: &[Buf],
    algorithms: Algorithms,
    kind: Kind,
    span: &mut Span,
    time: Duration,
) -> Result<Sample, String> {
    let mut parts = Parts::of(algorithms);
    let all: Vec<&Chunk> = data.iter().flat_map(|buf| buf.as_chunks::<CHUNK_BYTES>().0).collect();
    let (mut next, mut result) = (0, Ok(()));
    let sample = bare::repeat(time, || {
        let group = &all[next..(next + LANES).min(all.len())];
        next = if next + 2 * LANES > all.len() { 0 } else { next + LANES };
        parts.hash_group(group);
        for chunk in group {
            if let Err(e) = parts.seal(*chunk, kind == Kind::Incompressible, span) {
                result = Err(e);
            }
        }
    });
    result.map(|()| Sample { per_second: sample.per_second * LANES as f64, ..sample })
}

/// Opens fragments for `time`: in order from `from` on, or at random; `per_op` of them are one operation.
pub fn read(
    (span, sealed): &(Span, Vec<Sealed>),
    algorithms: Algorithms,
    (random, per_op): (bool, usize),
    from: usize,
    time: Duration,
) -> Result<Sample, String> {
    let (mut parts, mut rng, mut next) = (Parts::of(algorithms), Rng::new(3 + from as u64), from);
    let mut out = vec![0; FRAGMENT_BYTES];
    let mut result = Ok(());
    let sample = bare::repeat(time, || {
        for _ in 0..per_op {
            next = if random { rng.below(sealed.len() as u64) as usize } else { (next + 1) % sealed.len() };
            let all = sealed[next].chunks;
            // Of a random chunk.
            let chunks = if random { 1 + rng.below(all as u64) as usize } else { all };
            if let Err(e) = parts.open(span, &sealed[next], &mut out, chunks * CHUNK_BYTES) {
                result = Err(e);
            }
            black_box(&mut out);
        }
    });
    result.map(|()| sample)
}
