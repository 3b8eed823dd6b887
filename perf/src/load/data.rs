//! What is written.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use cryptfold_reactor::memory::Buf;

use super::pattern::Rng;

/// Bytes that are prepared once and written from: what 32 I/Os of 128 KiB under way have. Tools with a buffer per I/O under
/// way write from no more, and a source that the caches do not hold would be measured with the device.
const POOL_BYTES: usize = 4 << 20;
/// 4 KiB blocks in the set that duplicates are drawn from.
const DUPLICATES: u64 = 512;
const BLOCK: usize = 4096;

/// Where written data comes from.
#[derive(Clone, Debug)]
pub enum DataSource {
    /// The same random buffers again and again.
    Repeat,
    /// These buffers of one I/O each, slot by slot, from the start again at the end. Not empty.
    Buffers(Arc<[Buf]>),
    /// These too, but each 4 KiB block with a number of its own in front, so that nothing repeats. A buffer that has come back
    /// is stamped where it is.
    Stamped(Arc<[Buf]>),
    /// A file's bytes, from the start again at its end.
    File(PathBuf),
    /// The same, stamped as above.
    StampedFile(PathBuf),
    /// Unique blocks.
    Unique {
        /// Share of 4 KiB blocks that repeat, percent.
        dedupe_pct: u8,
        /// How far a block compresses (zstd level 1).
        compress_ratio: f64,
    },
}

/// Makes the data of one worker's writes.
pub struct Generator {
    source: DataSource,
    /// Prepared buffers of one I/O each (all but `Unique`) or 4 KiB blocks to stamp (`Unique`).
    pool: Vec<Buf>,
    duplicates: Vec<Buf>,
    rng: Rng,
    next: usize,
    bytes: usize,
    stamp: u64,
}

/// One 4 KiB block that compresses by about `ratio`: random bytes, then a repeated one.
pub(crate) fn block(rng: &mut Rng, ratio: f64) -> [u8; BLOCK] {
    let mut out = [0u8; BLOCK];
    let random = ((BLOCK as f64 / ratio) as usize).clamp(16, BLOCK);
    // zstd adds some 20 bytes of headers to a block; small random parts must make up for them.
    let random = if ratio > 1.0 { random.saturating_sub(20).max(16) } else { BLOCK };
    for piece in out[..random].chunks_mut(8) {
        let bytes = rng.next().to_le_bytes();
        piece.copy_from_slice(&bytes[..piece.len()]);
    }
    let fill = rng.next() as u8;
    out[random..].fill(fill);
    out
}

impl Generator {
    /// For I/Os of `bytes` each.
    ///
    /// # Errors
    /// When the data file can not be read or is empty.
    pub fn new(source: DataSource, bytes: usize, seed: u64) -> Result<Generator, String> {
        let mut rng = Rng::new(seed ^ 0xDA7A);
        let ios = (POOL_BYTES / bytes).clamp(1, 256);
        let pool = match &source {
            DataSource::Repeat => {
                let all = random();
                if bytes > all.len() {
                    vec![random_buf(&mut rng, bytes)]
                } else {
                    (0..ios).map(|i| all.slice(i * bytes..(i + 1) * bytes)).collect()
                }
            }
            DataSource::Buffers(bufs) | DataSource::Stamped(bufs) => bufs.to_vec(),
            DataSource::File(path) | DataSource::StampedFile(path) => file_bufs(path, bytes)?,
            DataSource::Unique { compress_ratio, .. } => {
                (0..POOL_BYTES / BLOCK).map(|_| Buf::from_slice(&block(&mut rng, *compress_ratio))).collect()
            }
        };
        let duplicates = match &source {
            DataSource::Unique { compress_ratio, .. } => {
                // The same set in every worker and run: that is what makes them duplicates.
                let mut fixed = Rng::new(0xD0_D0);
                (0..DUPLICATES).map(|_| Buf::from_slice(&block(&mut fixed, *compress_ratio))).collect()
            }
            _ => Vec::new(),
        };
        Ok(Generator { source, pool, duplicates, next: 0, bytes, stamp: rng.next(), rng })
    }

    /// The data of the next write, which is to `slot`.
    #[inline]
    pub fn produce(&mut self, slot: u64) -> Buf {
        match self.source {
            DataSource::Buffers(_) => self.pool[(slot % self.pool.len() as u64) as usize].clone(),
            DataSource::Unique { dedupe_pct, .. } => self.unique(u64::from(dedupe_pct)),
            DataSource::Stamped(_) | DataSource::StampedFile(_) => {
                let buf = &mut self.pool[self.next];
                for block in buf.make_mut().chunks_exact_mut(BLOCK) {
                    self.stamp = self.stamp.wrapping_add(0x9E37_79B9_7F4A_7C15);
                    block[..8].copy_from_slice(&self.stamp.to_le_bytes());
                }
                let buf = buf.clone();
                self.advance();
                buf
            }
            _ => {
                let buf = self.pool[self.next].clone();
                self.advance();
                buf
            }
        }
    }

    #[inline]
    fn advance(&mut self) {
        self.next = if self.next + 1 == self.pool.len() { 0 } else { self.next + 1 };
    }

    fn unique(&mut self, dedupe_pct: u64) -> Buf {
        let mut out = Buf::alloc(self.bytes);
        let bytes = out.make_mut();
        for piece in bytes.chunks_mut(BLOCK) {
            if dedupe_pct > 0 && self.rng.below(100) < dedupe_pct {
                let i = self.rng.below(DUPLICATES) as usize;
                piece.copy_from_slice(&self.duplicates[i][..piece.len()]);
                continue;
            }
            let i = self.rng.below(self.pool.len() as u64) as usize;
            piece.copy_from_slice(&self.pool[i][..piece.len()]);
            self.stamp = self.stamp.wrapping_add(0x9E37_79B9_7F4A_7C15);
            piece[..8].copy_from_slice(&self.stamp.to_le_bytes());
        }
        out
    }
}

/// Incompressible bytes, [`POOL_BYTES`] of them, the same for all generators: made once, and handing them out counts
/// nothing, so that the generator's share of a write stays small.
fn random() -> &'static Buf {
    static ALL: OnceLock<Buf> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut rng = Rng::new(0xDA7A);
        Buf::immortal(POOL_BYTES, |bytes| {
            for piece in bytes.chunks_exact_mut(BLOCK) {
                piece.copy_from_slice(&block(&mut rng, 1.0));
            }
        })
    })
}

fn random_buf(rng: &mut Rng, bytes: usize) -> Buf {
    let mut out = Buf::alloc(bytes);
    for piece in out.make_mut().chunks_mut(BLOCK) {
        let len = piece.len();
        piece.copy_from_slice(&block(rng, 1.0)[..len]);
    }
    out
}

fn file_bufs(path: &Path, bytes: usize) -> Result<Vec<Buf>, String> {
    let all = std::fs::read(path).map_err(|e| format!("--data {}: {e}", path.display()))?;
    let whole: Vec<Buf> = all.chunks_exact(bytes).map(Buf::from_slice).collect();
    if whole.is_empty() {
        return Err(format!("--data {}: {} bytes, less than one I/O of {bytes}", path.display(), all.len()));
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_compress_as_asked() {
        for ratio in [1.0, 1.5, 2.0, 3.0, 4.0, 8.0] {
            let mut rng = Rng::new(7);
            let (mut raw, mut packed) = (0, 0);
            for _ in 0..64 {
                let b = block(&mut rng, ratio);
                raw += b.len();
                packed += zstd::bulk::compress(&b, 1).expect("compresses").len().min(BLOCK);
            }
            let got = raw as f64 / packed as f64;
            assert!((got / ratio - 1.0).abs() < 0.1, "asked for {ratio}, got {got}");
        }
    }

    #[test]
    fn lz4_finds_about_as_much() {
        for ratio in [1.5, 2.0, 4.0] {
            let mut rng = Rng::new(7);
            let (mut raw, mut packed) = (0, 0);
            for _ in 0..64 {
                let b = block(&mut rng, ratio);
                let mut out = Vec::new();
                raw += b.len();
                packed += lzzzz::lz4::compress_to_vec(&b, &mut out, 1).expect("compresses").min(BLOCK);
            }
            let got = raw as f64 / packed as f64;
            assert!((got / ratio - 1.0).abs() < 0.1, "asked for {ratio}, got {got}");
        }
    }

    #[test]
    fn stamped_buffers_never_repeat_nor_change_while_somebody_holds_them() {
        let source: Vec<Buf> = (0..3).map(|n| Buf::from_slice(&[n; 2 * BLOCK])).collect();
        let mut g = Generator::new(DataSource::Stamped(source.clone().into()), 2 * BLOCK, 1).expect("makes");
        let mut seen = std::collections::HashSet::new();
        let mut held: Vec<(Buf, Vec<u8>)> = Vec::new();
        for round in 0..30u8 {
            let buf = g.produce(0);
            assert!(buf.chunks(BLOCK).all(|piece| piece[8..] == source[usize::from(round % 3)][8..BLOCK]));
            assert!(buf.chunks(BLOCK).all(|piece| seen.insert(piece.to_vec())));
            if round % 4 == 0 {
                held.push((buf.clone(), buf.to_vec()));
            }
        }
        assert!(held.iter().all(|(buf, was)| buf[..] == was[..]));
        assert!(source.iter().enumerate().all(|(n, buf)| buf.iter().all(|&byte| usize::from(byte) == n)));
    }

    #[test]
    fn unique_blocks_are_unique_and_duplicates_repeat() {
        let share = |pct: u8| {
            let source = DataSource::Unique { dedupe_pct: pct, compress_ratio: 2.0 };
            let mut a = Generator::new(source.clone(), 64 * 1024, 1).expect("makes");
            let mut b = Generator::new(source, 64 * 1024, 2).expect("makes");
            let mut seen = std::collections::HashSet::new();
            let mut repeated = 0;
            for _ in 0..100 {
                for g in [&mut a, &mut b] {
                    for piece in g.produce(0).chunks(BLOCK) {
                        if !seen.insert(piece.to_vec()) {
                            repeated += 1;
                        }
                    }
                }
            }
            repeated as f64 / 3200.0
        };
        assert_eq!(share(0), 0.0);
        assert!((0.25..0.6).contains(&share(50)), "half of the blocks come from a set of {DUPLICATES}");
    }
}
