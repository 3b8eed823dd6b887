//! What the primitives work on: generated data that compresses like a system disk's, or a file's content.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Piece of generated data with one character (text, records, ...). Bytes.
const PIECE_BYTES: usize = 4096;

/// A small generator of random numbers (SplitMix64; Steele, Lea, Flood 2014): the same seed gives the same data.
pub struct SplitMix(pub u64);

impl SplitMix {
    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n` (which is small, so the bias does not matter here).
    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }
}

/// `len` bytes of generated data: text, tables of records, code-like bytes and noise, in turns of 4 KiB.
pub fn generate(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = SplitMix(seed);
    let words: Vec<Vec<u8>> = (0..2000)
        .map(|_| {
            let letters = 2 + rng.below(9);
            (0..letters).map(|_| b"etaoinshrdlucmfwypvbgkjqxz"[rng.below(26).min(rng.below(26))]).collect()
        })
        .collect();
    let mut out = Vec::with_capacity(len + PIECE_BYTES);
    while out.len() < len {
        let end = out.len() + PIECE_BYTES;
        match rng.below(10) {
            0..4 => text(&mut out, end, &words, &mut rng),
            4..6 => records(&mut out, end, &mut rng),
            6..9 => code(&mut out, end, &mut rng),
            _ => out.extend((0..PIECE_BYTES / 8).flat_map(|_| rng.next_u64().to_le_bytes())),
        }
        out.truncate(end);
    }
    out.truncate(len);
    out
}

/// Repeats a stretch of what was written within the last piece, as real content does.
fn echo(out: &mut Vec<u8>, rng: &mut SplitMix) {
    let len = 6 + rng.below(40);
    let back = len + rng.below(1500);
    if let Some(from) = out.len().checked_sub(back) {
        out.extend_from_within(from..from + len);
    }
}

/// Words by a Zipf-like choice, with punctuation and repetitions.
fn text(out: &mut Vec<u8>, end: usize, words: &[Vec<u8>], rng: &mut SplitMix) {
    while out.len() < end {
        if rng.below(8) == 0 {
            echo(out, rng);
        }
        let rank = rng.below(words.len()) * rng.below(words.len()) / words.len();
        out.extend(&words[rank * rng.below(words.len()) / words.len()]);
        out.extend(match rng.below(12) {
            0 => b". ".as_slice(),
            1 => b",\n",
            _ => b" ",
        });
    }
}

/// Rows of 32 bytes: a counter, a small type, a time that grows, a few zero bytes, one random field.
fn records(out: &mut Vec<u8>, end: usize, rng: &mut SplitMix) {
    let mut id = rng.next_u64() as u32;
    let mut time = rng.next_u64() >> 20;
    while out.len() < end {
        id = id.wrapping_add(1);
        time += rng.below(1000) as u64;
        out.extend(id.to_le_bytes());
        out.extend([rng.below(4) as u8, 0, 0, 0]);
        out.extend(time.to_le_bytes());
        out.extend([0; 12]);
        out.extend((rng.next_u64() as u32).to_le_bytes());
    }
}

/// Short byte sequences from a skewed set with operands between them, as machine code has.
fn code(out: &mut Vec<u8>, end: usize, rng: &mut SplitMix) {
    let mut codes = SplitMix(7);
    let ops: Vec<[u8; 4]> = (0..256).map(|_| (codes.next_u64() as u32).to_le_bytes()).collect();
    while out.len() < end {
        if rng.below(10) == 0 {
            echo(out, rng);
        }
        let op = ops[rng.below(256) * rng.below(256) / 256];
        out.extend(&op[..2 + rng.below(3)]);
        match rng.below(4) {
            0 => out.push(rng.next_u64() as u8),
            1 => out.extend((rng.below(4096) as u32).to_le_bytes()),
            _ => {}
        }
    }
}

/// The first `max` bytes of a file.
///
/// # Errors
/// When it can not be read, or is empty.
pub fn from_file(path: &Path, max: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    File::open(path)?.take(max as u64).read_to_end(&mut out)?;
    if out.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is empty"));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_data_that_compresses_like_a_disk() {
        let a = generate(1, 1 << 20);
        assert_eq!(a.len(), 1 << 20);
        assert!(a == generate(1, 1 << 20) && a != generate(2, 1 << 20));
        let packed: usize = a.chunks(4096).map(|c| zstd::bulk::compress(c, 1).unwrap().len()).sum();
        let ratio = a.len() as f64 / packed as f64;
        assert!((1.7..3.0).contains(&ratio), "zstd-1 over 4 KiB blocks: {ratio:.2}");
    }
}
