//! Measures the pool's parts alone, on one core: hash, incompressibility probe, codecs, cipher.
//!
//! Arguments: files whose content is compressed; for each it prints what the probe says per fragment size and what it
//! misses.

use std::hint::black_box;
use std::time::{Duration, Instant};

use cryptfold_reduce_format::codec::{Codec, Compression, Compressor, Decompressor, looks_incompressible};
use cryptfold_reduce_format::fingerprint::{Fingerprint, HashId, Hasher};
use cryptfold_reduce_format::fragment::{FragmentHeader, open_fragment, seal_fragment};
use cryptfold_reduce_format::ids::*;
use cryptfold_reduce_format::keys::{DataKey, FingerprintSecret, Secret};
use cryptfold_reduce_format::sealed::SegmentKey;
use cryptfold_reduce_format::segment::{Cipher, Class, SegmentHeader};

const CHUNK: usize = 4096;

fn rate(name: &str, bytes: usize, mut work: impl FnMut()) -> f64 {
    let (mut done, start) = (0usize, Instant::now());
    while start.elapsed() < Duration::from_millis(300) {
        work();
        done += bytes;
    }
    let rate = done as f64 / start.elapsed().as_secs_f64() / 1e9;
    println!("{name:40} {rate:8.2} GB/s {:9.0} ns each", bytes as f64 / rate);
    rate
}

fn noise(len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut reader = blake3::Hasher::new().finalize_xof();
    reader.fill(&mut out);
    out
}

fn segment_key(cipher: Cipher) -> SegmentKey {
    let header = SegmentHeader {
        pool: uuid::Uuid::nil(),
        addr: SegmentAddr::default(),
        segment_bytes: 32 << 20,
        incarnation: Incarnation(1),
        salt: [1; 32],
        class: Class::Data,
        domain: DomainId(1),
        generation: Generation(1),
        cipher,
        hash: HashId::Blake3,
        codec: Codec::Zstd,
        shard: ShardIx(0),
        owner_epoch: OwnerEpoch(1),
    };
    SegmentKey::derive(&DataKey(Secret::take(&mut [7; 32])), &header)
}

fn parts(data: &[u8]) {
    let (chunks, _) = data.as_chunks::<CHUNK>();
    let chunks: Vec<_> = chunks.iter().collect();
    let secret = FingerprintSecret(Secret::take(&mut [9; 32]));
    let hasher = Hasher::new(HashId::Blake3, &secret);
    let mut out = vec![Fingerprint::NONE; chunks.len()];
    rate("blake3 one by one (plain API)", data.len(), || {
        for chunk in &chunks {
            black_box(blake3::keyed_hash(secret.0.expose(), *chunk));
        }
    });
    rate("hash_one", data.len(), || {
        chunks.iter().for_each(|chunk| {
            black_box(hasher.hash_one(chunk));
        })
    });
    rate("hash_chunks", data.len(), || hasher.hash_chunks(black_box(&chunks), &mut out));
    for n in [1, 2, 3, 4, 6, 8, 12, 16] {
        let chunks = &chunks[..n];
        rate(&format!("hash_chunks, {n} at a time"), n * CHUNK, || {
            hasher.hash_chunks(black_box(chunks), &mut out[..n])
        });
    }
    for size in [4096, 16384, 131072] {
        rate(&format!("probe, incompressible, {size}"), size, || {
            black_box(looks_incompressible(black_box(&[&data[..size]])));
        });
    }
    let key = segment_key(Cipher::Gcm);
    for chunks in [1u8, 4, 32] {
        let first = ContainerId::new(1).and_then(|container| ChunkAddr::new(container, 0)).unwrap();
        let len = usize::from(chunks) * CHUNK;
        let header = FragmentHeader { first, chunks, codec: Codec::Raw, body_bytes: len as u32 };
        let mut unit = vec![0; header.unit_bytes(&key)];
        rate(&format!("seal, raw, {len}"), len, || {
            seal_fragment(&key, 4096, &header, &[&data[..len]], None, &mut unit).unwrap()
        });
        let mut plain = vec![0; len];
        rate(&format!("open, raw, {len}"), len, || {
            open_fragment(&key, 4096, &unit, &mut plain).unwrap();
        });
    }
}

fn file(name: &str) {
    let data = match std::fs::read(name) {
        Ok(data) => data,
        Err(error) => return println!("{name}: {error}"),
    };
    let mut compressor = Compressor::new();
    let mut decompressor = Decompressor::new();
    for size in [4096usize, 16384, 131072] {
        let (mut skipped, mut missed, mut wasted, mut total, mut stored) = (0, 0, 0, 0usize, 0usize);
        let mut out = vec![0; size];
        let mut back = vec![0; size];
        for piece in data.chunks_exact(size) {
            total += size;
            let skip = looks_incompressible(&[piece]);
            let (codec, encoded) = compressor.compress_node(piece);
            let pays = encoded.len() <= size - size / 32;
            skipped += usize::from(skip);
            missed += if skip && pays { size - encoded.len() } else { 0 };
            wasted += usize::from(!skip && !pays);
            decompressor.decompress(codec, &encoded, &mut back).unwrap();
            assert_eq!(back, piece);
            stored +=
                compressor.compress(Compression::Zstd(1), &[piece], &mut out).map_or(size, |(_, len)| len);
        }
        let pieces = (total / size).max(1);
        println!(
            "{name} {size}: ratio {:.2}, skipped {:.1}%, tried in vain {:.1}%, savings missed {:.3}%",
            total as f64 / stored.max(1) as f64,
            100.0 * skipped as f64 / pieces as f64,
            100.0 * f64::from(wasted as u32) / pieces as f64,
            100.0 * missed as f64 / total.max(1) as f64,
        );
    }
}

/// What smaller zstd blocks cost fragments of 64 KiB: the least time of several passes over each MiB, by turns.
fn blocks(name: &str) {
    use zstd::zstd_safe::{CCtx, CParameter};
    const FRAGMENT: usize = 64 << 10;
    let Ok(data) = std::fs::read(name) else { return };
    let data = &data[..data.len().min(32 << 20) / FRAGMENT * FRAGMENT];
    let sizes = [128u32, 32, 16, 8].map(|kib| kib << 10);
    let mut contexts = sizes.map(|size| {
        let mut zstd = CCtx::create();
        for parameter in [CParameter::CompressionLevel(1), CParameter::MaxBlockSize(size)] {
            zstd.set_parameter(parameter).unwrap();
        }
        zstd
    });
    let (mut out, mut stored, mut time) = (vec![0; 2 * FRAGMENT], [0u32; 4], [Duration::ZERO; 4]);
    for part in data.chunks(1 << 20) {
        let mut least = [Duration::MAX; 4];
        for pass in 0..9 {
            for (at, zstd) in contexts.iter_mut().enumerate() {
                let start = Instant::now();
                let bytes: u32 = part
                    .chunks(FRAGMENT)
                    .map(|plain| zstd.compress2(&mut out[..], plain).unwrap() as u32)
                    .sum();
                least[at] = least[at].min(start.elapsed());
                stored[at] += if pass == 0 { bytes } else { 0 };
            }
        }
        time.iter_mut().zip(least).for_each(|(sum, least)| *sum += least);
    }
    for (at, size) in sizes.iter().enumerate().skip(1) {
        let times = time[at].as_secs_f64() / time[0].as_secs_f64();
        let bytes = f64::from(stored[at]) / f64::from(stored[0]);
        println!("{name} zstd blocks of {} KiB: {times:.3} of the time, {bytes:.4} of the bytes", size >> 10);
    }
}

fn main() {
    let names: Vec<_> = std::env::args().skip(1).collect();
    if names.is_empty() {
        parts(&noise(128 << 10));
    }
    names.iter().for_each(|name| file(name));
    names.iter().for_each(|name| blocks(name));
}
