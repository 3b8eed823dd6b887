//! What a pool would make of data, without a pool: the same look at zeros and patterns, the same fingerprints, the same codec
//! over the same groups of chunks, and beside it the *ideal*: every duplicate 4 KiB chunk found, zstd level 1 over 16 KiB,
//! nothing else counted. A pool of the FIPS modes takes 12 bytes more for each fragment, its stored nonce, which are not counted here.
//!
//! Owns one fingerprint (64 bits) per distinct chunk: about 4 GB of RAM per TB of distinct data.

use cryptfold_reactor as reactor;
use cryptfold_reduce_format::codec::{self, Compression, Compressor};
use cryptfold_reduce_format::fingerprint::{Chunk, Fingerprint, HashId, Hasher};
use cryptfold_reduce_format::fragment::{CHUNK_BYTES, FRAGMENT_HEADER_BYTES};
use cryptfold_reduce_format::keys::{FingerprintSecret, Secret};
use cryptfold_reduce_format::sealed::TAG_BYTES;

use crate::hash::FastMap;
use crate::ingest::{GROUP, PIECE, RAW_GROUP};

/// Bytes that [`Estimate::add`] takes at once: a write of a piece.
pub const PIECE_BYTES: usize = PIECE * CHUNK_BYTES;
/// Bytes that the ideal compresses together.
const IDEAL_BYTES: usize = 16 << 10;
/// Metadata of a stored chunk (fingerprint, slot, its part of a fragment's entry), measured on pools after a checkpoint.
const CHUNK_META_BYTES: u64 = 18;
/// Metadata of a mapped block, compressed.
const BLOCK_META_BYTES: u64 = 3;

/// Figures so far; bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Estimated {
    /// Read.
    pub bytes: u64,
    /// Of these, zeros: they take nothing.
    pub zero_bytes: u64,
    /// Of these, chunks that repeat one 8-byte word: they take nothing.
    pub pattern_bytes: u64,
    /// Chunks that occur for the first time, but zeros and patterns.
    pub unique_bytes: u64,
    /// What the pool would store, with headers and tags.
    pub stored_bytes: u64,
    /// Its maps, tables and fingerprints, about.
    pub metadata_bytes: u64,
    /// What the ideal would store.
    pub ideal_bytes: u64,
}

impl Estimated {
    fn ratio(&self, stored: u64) -> Option<f64> {
        let data = self.bytes - self.zero_bytes;
        (stored > 0).then(|| data as f64 / stored as f64)
    }

    /// Data without zeros to what the pool would take, metadata counted. `None`: it would take nothing.
    pub fn pool_ratio(&self) -> Option<f64> {
        self.ratio(self.stored_bytes + self.metadata_bytes)
    }

    /// The same for the ideal.
    pub fn ideal_ratio(&self) -> Option<f64> {
        self.ratio(self.ideal_bytes)
    }
}

/// See the module's head.
pub struct Estimate {
    compression: Compression,
    hasher: Hasher,
    compressor: Compressor,
    seen: FastMap<u64, ()>,
    ideal: Vec<u8>,
    out: Vec<u8>,
    figures: Estimated,
}

impl Estimate {
    /// With a pool's compression setting.
    pub fn new(compression: Compression) -> Estimate {
        let mut secret = [0; 32];
        reactor::fill_random(&mut secret);
        Estimate {
            compression,
            hasher: Hasher::new(HashId::Blake3, &FingerprintSecret(Secret::take(&mut secret))),
            compressor: Compressor::new(),
            seen: FastMap::default(),
            ideal: Vec::with_capacity(IDEAL_BYTES),
            out: vec![0; GROUP * CHUNK_BYTES],
            figures: Estimated::default(),
        }
    }

    /// Adds the next data: up to [`PIECE_BYTES`] bytes of one file or device. A last chunk that is cut counts as if zeros
    /// followed, as a file system stores it.
    pub fn add(&mut self, data: &[u8]) {
        let mut tail = [0; CHUNK_BYTES];
        let (whole, rest) = data.as_chunks::<CHUNK_BYTES>();
        let mut chunks: Vec<&Chunk> = Vec::with_capacity(PIECE);
        tail[..rest.len()].copy_from_slice(rest);
        let all = whole.iter().chain((!rest.is_empty()).then_some(&tail));
        for chunk in all {
            self.figures.bytes += CHUNK_BYTES as u64;
            match codec::pattern(chunk) {
                Some(0) => {
                    self.figures.zero_bytes += CHUNK_BYTES as u64;
                    continue;
                }
                Some(word) => {
                    self.figures.pattern_bytes += CHUNK_BYTES as u64;
                    // The ideal knows no patterns.
                    if self.seen.insert(!word, ()).is_none() {
                        self.add_ideal(chunk);
                    }
                }
                None => chunks.push(chunk),
            }
            self.figures.metadata_bytes += BLOCK_META_BYTES;
        }
        let mut prints = vec![Fingerprint::NONE; chunks.len()];
        self.hasher.hash_chunks(&chunks, &mut prints);
        let mut new: Vec<&Chunk> = Vec::with_capacity(chunks.len());
        for (chunk, print) in chunks.into_iter().zip(&prints) {
            if self.seen.insert(print.prefix(), ()).is_none() {
                new.push(chunk);
                self.add_ideal(chunk);
            }
        }
        self.figures.unique_bytes += (new.len() * CHUNK_BYTES) as u64;
        self.figures.metadata_bytes += new.len() as u64 * CHUNK_META_BYTES;
        self.store(&new);
    }

    /// As a pool's ingestion does.
    fn store(&mut self, mut rest: &[&Chunk]) {
        while !rest.is_empty() {
            let most = rest.len().min(GROUP);
            let bytes = |chunks: &[&Chunk]| chunks.iter().flat_map(|chunk| chunk.iter().copied()).collect();
            let mut group: Vec<u8> = bytes(&rest[..most]);
            let mut setting = self.compression;
            if setting == Compression::Off || (most > RAW_GROUP && codec::looks_incompressible(&[&group])) {
                setting = Compression::Off;
                group.truncate(most.min(RAW_GROUP) * CHUNK_BYTES);
            }
            let body = self.compressor.compress(setting, &[&group], &mut self.out[..group.len()]);
            let body = body.map_or(group.len(), |(_, bytes)| bytes);
            self.figures.stored_bytes += (FRAGMENT_HEADER_BYTES + body + TAG_BYTES) as u64;
            rest = &rest[group.len() / CHUNK_BYTES..];
        }
    }

    fn add_ideal(&mut self, chunk: &Chunk) {
        self.ideal.extend_from_slice(chunk);
        if self.ideal.len() == IDEAL_BYTES {
            self.finish_ideal();
        }
    }

    fn finish_ideal(&mut self) {
        let plain = self.ideal.len();
        let packed = self.compressor.compress(Compression::Zstd(1), &[&self.ideal], &mut self.out[..plain]);
        self.figures.ideal_bytes += packed.map_or(plain, |(_, bytes)| bytes) as u64;
        self.ideal.clear();
    }

    /// The figures of everything that was added.
    pub fn finish(mut self) -> Estimated {
        if !self.ideal.is_empty() {
            self.finish_ideal();
        }
        self.figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64) -> Vec<u8> {
        let mut state = seed;
        (0..CHUNK_BYTES)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect()
    }

    #[test]
    fn counts_each_kind_of_chunk() {
        let mut estimate = Estimate::new(Compression::Adaptive);
        let mut data = vec![0; 2 * CHUNK_BYTES];
        data.extend_from_slice(&[7; 3 * CHUNK_BYTES]);
        for seed in [1, 2, 1, 3, 2] {
            data.extend(noise(seed));
        }
        data.extend_from_slice(&noise(9)[..100]);
        estimate.add(&data);
        estimate.add(&noise(3));
        let done = estimate.finish();
        let blocks = |n: u64| n * CHUNK_BYTES as u64;
        assert_eq!((done.bytes, done.zero_bytes, done.pattern_bytes), (blocks(12), blocks(2), blocks(3)));
        // 1, 2, 3 and the cut one.
        assert_eq!(done.unique_bytes, blocks(4));
        let header = (FRAGMENT_HEADER_BYTES + TAG_BYTES) as u64;
        assert!(done.stored_bytes > blocks(3) && done.stored_bytes < blocks(4) + 2 * header, "{done:?}");
        assert!(done.ideal_bytes > blocks(3) && done.ideal_bytes < blocks(4) + 1, "{done:?}");
        assert!(done.pool_ratio().unwrap() < done.ideal_ratio().unwrap());
    }

    #[test]
    fn text_is_compressed_and_nothing_takes_nothing() {
        let mut estimate = Estimate::new(Compression::Adaptive);
        let text: Vec<u8> =
            (0..PIECE_BYTES / 16).flat_map(|n| format!("line number {n:03}\n").into_bytes()).collect();
        estimate.add(&text[..PIECE_BYTES]);
        let done = estimate.finish();
        assert!(done.stored_bytes * 3 < done.bytes && done.ideal_bytes * 3 < done.bytes, "{done:?}");
        assert_eq!(Estimate::new(Compression::Off).finish().pool_ratio(), None);
    }
}
