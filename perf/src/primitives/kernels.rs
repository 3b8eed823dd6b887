//! The loops themselves.

use std::hint::black_box;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use cryptfold_bdev_crypto::engine::{Direction, EngineKind, UnitRun, XtsCipher, XtsContext, XtsKey};

use cryptfold_reduce_format::fingerprint::{Chunk, Fingerprint, HashId, Hasher};
use cryptfold_reduce_format::fragment::CHUNK_BYTES;
use cryptfold_reduce_format::keys::{FingerprintSecret, Secret};

use super::{Bench, PrimitivesError, Spec};

/// Runs every primitive that is asked for, at the bench's block size and place.
pub fn all(bench: &mut Bench) -> Result<(), PrimitivesError> {
    xts(bench)?;
    gcm(bench)?;
    blake3_single(bench);
    blake3_batched(bench);
    codec(bench, "zstd-1", "libzstd", &mut Zstd::new(1)?)?;
    codec(bench, "zstd-3", "libzstd", &mut Zstd::new(3)?)?;
    codec(bench, "lz4", "liblz4", &mut Lz4)?;
    crc32c(bench);
    memcpy(bench);
    Ok(())
}

/// Where a primitive stands in the table.
pub fn rank(name: &str) -> usize {
    ["xts-256", "xts-128", "gcm", "blake3", "zstd-1", "zstd-3", "lz4", "crc32c", "memcpy"]
        .iter()
        .position(|p| name.contains(p))
        .unwrap_or(usize::MAX)
}

fn setup(e: impl std::fmt::Display) -> PrimitivesError {
    PrimitivesError::Setup(e.to_string())
}

impl Bench {
    /// Reads blocks of the area into a hot buffer of the block's size.
    fn time_reads(&self, mut step: impl FnMut(usize, &[u8], &mut [u8])) -> f64 {
        let mut hot = vec![0; self.block];
        let mut blocks = self.area.read();
        self.timing.seconds_per_step(|| {
            let (n, src) = blocks.next();
            step(n, src, &mut hot);
            black_box(&mut hot);
        })
    }

    /// Writes blocks of the area from a hot buffer of the block's size.
    fn time_writes(&mut self, mut step: impl FnMut(usize, &[u8], &mut [u8])) -> f64 {
        let hot: Vec<u8> = self.sample[..self.block].to_vec();
        let mut blocks = self.area.write();
        self.timing.seconds_per_step(|| {
            let (n, dst) = blocks.next();
            step(n, &hot, dst);
            black_box(dst);
        })
    }

    fn prepare(&mut self) {
        self.area.prepare(&self.sample, self.block);
    }
}

fn xts(bench: &mut Bench) -> Result<(), PrimitivesError> {
    let block = bench.block;
    for (cipher, bits) in [(XtsCipher::Aes256, 256), (XtsCipher::Aes128, 128)] {
        let bytes: Vec<u8> = (1..=cipher.key_bytes() as u8).collect();
        let key = XtsKey::for_cipher(cipher, &bytes).map_err(setup)?;
        for kind in [EngineKind::AwsLc, EngineKind::Portable].into_iter().filter(|k| k.supports(cipher)) {
            let context = XtsContext::with_engine(kind, &key).map_err(setup)?;
            for unit in [512, 4096].into_iter().filter(|u| *u <= block) {
                for (direction, word) in [(Direction::Encrypt, "encrypt"), (Direction::Decrypt, "decrypt")] {
                    let name = format!("xts-{bits}-{word}");
                    if !bench.wants(&name) {
                        continue;
                    }
                    bench.prepare();
                    let units = block / unit;
                    let step = |n: usize, src: &[u8], dst: &mut [u8]| {
                        let run =
                            UnitRun { first_tweak: (n * units) as u128, tweak_step: 1, unit_bytes: unit };
                        context.run(direction, run, [src], [dst]);
                    };
                    let s = match direction {
                        Direction::Encrypt => bench.time_writes(step),
                        Direction::Decrypt => bench.time_reads(step),
                    };
                    bench.record(Spec { name, engine: kind.name(), unit }, None, s);
                }
            }
        }
    }
    Ok(())
}

fn gcm(bench: &mut Bench) -> Result<(), PrimitivesError> {
    let unbound = UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(setup)?;
    let key = LessSafeKey::new(unbound);
    // One nonce for everything: nothing here is secret.
    let nonce = || Nonce::assume_unique_for_key([1; 12]);
    let unit = bench.block;
    let mut failed = false;
    #[cfg(not(feature = "fips"))]
    let seal = |src: &[u8], dst: &mut [u8], tag: &mut [u8; 16]| {
        key.seal_out_of_place_scatter(nonce(), Aad::empty(), src, dst, &[], tag).is_ok()
    };
    // The aws-lc-rs that has the module can only do it in place.
    #[cfg(feature = "fips")]
    let seal = |src: &[u8], dst: &mut [u8], tag: &mut [u8; 16]| {
        dst.copy_from_slice(src);
        let sealed = key.seal_in_place_separate_tag(nonce(), Aad::empty(), dst);
        sealed.map(|made| tag.copy_from_slice(made.as_ref())).is_ok()
    };
    if bench.wants("gcm-256-seal") {
        bench.prepare();
        let mut tag = [0; 16];
        let s = bench.time_writes(|_, src, dst| failed |= !seal(src, dst, &mut tag));
        bench.record(Spec { name: "gcm-256-seal".into(), engine: "aws-lc", unit }, None, s);
    }
    if bench.wants("gcm-256-open") {
        bench.prepare();
        // Every block becomes a ciphertext; repetitions of the sample share theirs, and so the tags.
        let mut tags = Vec::new();
        let sample = std::mem::take(&mut bench.sample);
        bench.area.pack(&sample, |src, dst| {
            let mut tag = [0; 16];
            let sealed = seal(src, dst, &mut tag);
            tags.push(tag);
            sealed.then_some(src.len())
        });
        bench.sample = sample;
        let s = bench.time_reads(|n, src, dst| {
            failed |=
                key.open_separate_gather(nonce(), Aad::empty(), src, &tags[n % tags.len()], dst).is_err();
        });
        bench.record(Spec { name: "gcm-256-open".into(), engine: "aws-lc", unit }, None, s);
    }
    if failed { Err(PrimitivesError::Setup("AES-256-GCM failed".into())) } else { Ok(()) }
}

fn blake3_single(bench: &mut Bench) {
    let unit = bench.block;
    let key = [3; 32];
    if bench.wants("blake3") {
        bench.prepare();
        let s = bench.time_reads(|_, src, _| {
            black_box(blake3::keyed_hash(&key, src));
        });
        bench.record(Spec { name: "blake3".into(), engine: "blake3", unit }, None, s);
    }
}

/// The pool's fingerprints: a block of several 4 KiB chunks, hashed side by side.
fn blake3_batched(bench: &mut Bench) {
    let block = bench.block;
    if !bench.wants("blake3-batch") || block < CHUNK_BYTES {
        return;
    }
    bench.prepare();
    let hasher = Hasher::new(HashId::Blake3, &FingerprintSecret(Secret::take(&mut [3; 32])));
    let mut out = vec![Fingerprint::NONE; block / CHUNK_BYTES];
    let mut blocks = bench.area.read();
    let mut chunks: Vec<&Chunk> = Vec::with_capacity(out.len());
    let s = bench.timing.seconds_per_step(|| {
        chunks.clear();
        // Every block of the area is a multiple of a chunk, so nothing is left over.
        chunks.extend(blocks.next().1.as_chunks().0);
        hasher.hash_chunks(&chunks, &mut out);
        black_box(&mut out);
    });
    let name = "blake3-batch".into();
    bench.record(Spec { name, engine: "blake3", unit: CHUNK_BYTES }, None, s);
}

fn crc32c(bench: &mut Bench) {
    let unit = bench.block;
    if bench.wants("crc32c") {
        bench.prepare();
        let s = bench.time_reads(|_, src, _| {
            black_box(crc_fast::crc32_iscsi(src));
        });
        bench.record(Spec { name: "crc32c".into(), engine: "crc-fast", unit }, None, s);
    }
}

fn memcpy(bench: &mut Bench) {
    let unit = bench.block;
    if bench.wants("memcpy") {
        bench.prepare();
        let s = bench.time_writes(|_, src, dst| dst.copy_from_slice(src));
        bench.record(Spec { name: "memcpy".into(), engine: "libc", unit }, None, s);
    }
}

/// A codec over single blocks; `None` when the output does not fit.
trait Codec {
    fn compress(&mut self, src: &[u8], dst: &mut [u8]) -> Option<usize>;
    fn decompress(&mut self, src: &[u8], dst: &mut [u8]) -> Option<usize>;
}

struct Zstd {
    compressor: zstd::bulk::Compressor<'static>,
    decompressor: zstd::bulk::Decompressor<'static>,
}

impl Zstd {
    fn new(level: i32) -> Result<Zstd, PrimitivesError> {
        Ok(Zstd {
            compressor: zstd::bulk::Compressor::new(level).map_err(setup)?,
            decompressor: zstd::bulk::Decompressor::new().map_err(setup)?,
        })
    }
}

impl Codec for Zstd {
    fn compress(&mut self, src: &[u8], dst: &mut [u8]) -> Option<usize> {
        self.compressor.compress_to_buffer(src, dst).ok()
    }
    fn decompress(&mut self, src: &[u8], dst: &mut [u8]) -> Option<usize> {
        self.decompressor.decompress_to_buffer(src, dst).ok()
    }
}

struct Lz4;

impl Codec for Lz4 {
    fn compress(&mut self, src: &[u8], dst: &mut [u8]) -> Option<usize> {
        lzzzz::lz4::compress(src, dst, lzzzz::lz4::ACC_LEVEL_DEFAULT).ok().filter(|n| *n > 0)
    }
    fn decompress(&mut self, src: &[u8], dst: &mut [u8]) -> Option<usize> {
        lzzzz::lz4::decompress(src, dst).ok()
    }
}

/// Compresses and decompresses. Blocks that do not shrink are left out of decompression, as a pool stores them raw.
fn codec(
    bench: &mut Bench,
    name: &str,
    engine: &'static str,
    codec: &mut dyn Codec,
) -> Result<(), PrimitivesError> {
    let (unit, block) = (bench.block, bench.block);
    let (compress, decompress) = (format!("{name}-compress"), format!("{name}-decompress"));
    if !bench.wants(&compress) && !bench.wants(&decompress) {
        return Ok(());
    }
    bench.prepare();
    if bench.wants(&compress) {
        let mut out = vec![0; 2 * block + 1024];
        let s = bench.time_reads(|_, src, _| {
            black_box(codec.compress(src, &mut out));
        });
        bench.record(Spec { name: compress, engine, unit }, None, s);
    }
    let sample = std::mem::take(&mut bench.sample);
    let packed = bench.area.pack(&sample, |src, dst| codec.compress(src, dst).filter(|n| *n < src.len()));
    bench.sample = sample;
    // Nothing shrinks (a compressed file as --data): there is nothing to decompress.
    let Some(packed) = packed else { return Ok(()) };
    if bench.wants(&decompress) {
        let mut failed = false;
        let s = bench.time_reads(|_, src, dst| failed |= codec.decompress(src, dst) != Some(block));
        bench.record(Spec { name: decompress, engine, unit }, Some(1.0 / packed), s);
        if failed {
            return Err(PrimitivesError::Setup(format!("{name} did not give its input back")));
        }
    }
    Ok(())
}
