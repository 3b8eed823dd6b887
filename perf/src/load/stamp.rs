//! Data that knows its address and age, for `--verify`.
//!
//! Every 512-byte sector holds a header (what, where, which generation of this place, which run) and a filling derived
//! from it, so a block from elsewhere, an older one, a mixture and a flipped bit can all be told apart.

use std::fmt;

use cryptfold_reactor::memory::{Buf, SgList};

use super::pattern::Rng;

const SECTOR: usize = 512;
/// What is never torn by a power cut, bytes.
const UNIT: usize = 4096;
const MAGIC: u64 = 0x6466_7470_7972_6363;

/// A block that is not what was written last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Byte address of the sector on the device.
    pub offset_bytes: u64,
    /// Generation that was written last.
    pub expected_generation: u64,
    /// What is there.
    pub found: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "byte {}: expected generation {}, found {}",
            self.offset_bytes, self.expected_generation, self.found
        )
    }
}

/// The `i`-th 8 bytes.
fn word(sector: &[u8], i: usize) -> u64 {
    u64::from_le_bytes(sector.get(i * 8..i * 8 + 8).and_then(|b| b.try_into().ok()).unwrap_or([0; 8]))
}

/// Writes and checks stamps of one run.
#[derive(Clone, Copy, Debug)]
pub struct Stamper {
    run: u64,
}

impl Stamper {
    /// For the run with this seed.
    pub fn new(seed: u64) -> Stamper {
        Stamper { run: seed }
    }

    /// `len` bytes for the place at `offset_bytes`, written for the `generation`-th time.
    pub fn make(&self, offset_bytes: u64, generation: u64, len: usize) -> SgList {
        let mut out = Buf::alloc(len);
        for (i, sector) in out.make_mut().chunks_mut(SECTOR).enumerate() {
            self.fill(sector, offset_bytes + (i * SECTOR) as u64, generation);
        }
        out.into()
    }

    fn fill(&self, sector: &mut [u8], at: u64, generation: u64) {
        let header = [MAGIC, at, generation, self.run];
        for (piece, word) in sector.chunks_mut(8).zip(header) {
            piece.copy_from_slice(&word.to_le_bytes());
        }
        let mut rng = Rng::new(self.run ^ at.rotate_left(20) ^ generation.rotate_left(44));
        // Half random, half constant: a reducing device has something to reduce.
        let (random, rest) = sector[32..].split_at_mut(224);
        for piece in random.chunks_mut(8) {
            piece.copy_from_slice(&rng.next().to_le_bytes()[..piece.len()]);
        }
        rest.fill(generation as u8);
    }

    /// Checks what was read at `offset_bytes`; generation 0 = never written in this run, anything goes.
    ///
    /// # Errors
    /// The first sector that is wrong.
    pub fn check(&self, offset_bytes: u64, generation: u64, data: &SgList) -> Result<(), Mismatch> {
        if generation == 0 {
            return Ok(());
        }
        let data = data.clone().to_contiguous();
        let mut want = [0u8; SECTOR];
        for (i, sector) in data.chunks(SECTOR).enumerate() {
            let at = offset_bytes + (i * SECTOR) as u64;
            self.fill(&mut want, at, generation);
            if sector != &want[..sector.len()] {
                let found = self.describe(sector, at);
                return Err(Mismatch { offset_bytes: at, expected_generation: generation, found });
            }
        }
        Ok(())
    }

    /// Checks what was read at `offset_bytes` without knowing the generation: false if nothing there carries a stamp of
    /// this run. Units of 4 KiB may differ in age, as after a power cut; within one everything is of the same age.
    ///
    /// # Errors
    /// The first sector that is wrong.
    pub fn check_any(&self, offset_bytes: u64, data: &SgList) -> Result<bool, Mismatch> {
        let data = data.clone().to_contiguous();
        let mut stamped = false;
        for (i, unit) in data.chunks(UNIT).enumerate() {
            let at = offset_bytes + (i * UNIT) as u64;
            let ours = |s: &[u8]| word(s, 0) == MAGIC && word(s, 3) == self.run;
            let Some(sector) = unit.chunks(SECTOR).find(|s| ours(s)) else { continue };
            stamped = true;
            self.check(at, word(sector, 2).max(1), &Buf::from_slice(unit).into())?;
        }
        Ok(stamped)
    }

    fn describe(&self, sector: &[u8], at: u64) -> String {
        let word = |i| word(sector, i);
        if word(0) != MAGIC {
            let kind = if sector.iter().all(|b| *b == 0) { "zeros" } else { "bytes that are no stamp" };
            return format!("{kind} ({:02x?} ...)", &sector[..sector.len().min(8)]);
        }
        let (place, generation, run) = (word(1), word(2), word(3));
        if run != self.run {
            return format!(
                "the stamp of another run (byte {place}, generation {generation}, seed {run:#x})"
            );
        }
        let mut whole = [0u8; SECTOR];
        self.fill(&mut whole, place, generation);
        let damage = if sector == &whole[..sector.len()] { "" } else { ", damaged" };
        if place == at {
            format!("generation {generation}{damage}")
        } else {
            format!("the block of byte {place}, generation {generation}{damage}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_wrong_block_is_found_and_named() {
        let s = Stamper::new(42);
        let good = s.make(8192, 3, 4096);
        assert_eq!(s.check(8192, 3, &good), Ok(()));
        assert_eq!(s.check(8192, 0, &SgList::zeroes(4096)), Ok(()));
        let says = |generation, data: SgList, text: &str| {
            let e = s.check(8192, generation, &data).expect_err("is wrong").to_string();
            assert!(e.contains(text), "{e:?} should say {text:?}");
        };
        says(4, good.clone(), "generation 3");
        says(3, s.make(4096, 3, 4096), "the block of byte 4096");
        says(3, SgList::zeroes(4096), "zeros");
        says(3, Stamper::new(43).make(8192, 3, 4096), "another run");
        for bit in [0usize, 300 * 8, 4095 * 8 + 7] {
            let mut bad = good.clone().to_contiguous();
            bad.make_mut()[bit / 8] ^= 1 << (bit % 8);
            let e = s.check(8192, 3, &bad.into()).expect_err("a flipped bit");
            assert_eq!(e.offset_bytes, 8192 + (bit as u64 / 8 / 512) * 512);
        }
    }

    #[test]
    fn without_the_generation_ages_may_differ_between_units_but_not_within() {
        let s = Stamper::new(42);
        let mix = |parts: &[SgList]| parts.iter().flat_map(|p| p.iter().cloned()).collect::<SgList>();
        let (old, new) = (s.make(8192, 3, 4096), s.make(12_288, 4, 4096));
        assert_eq!(s.check_any(8192, &mix(&[old.clone(), new])), Ok(true));
        assert_eq!(s.check_any(8192, &SgList::zeroes(8192)), Ok(false));
        assert_eq!(s.check_any(8192, &Stamper::new(1).make(8192, 1, 4096)), Ok(false));
        let torn = mix(&[old.slice(0..2048), s.make(8192, 4, 4096).slice(2048..4096)]);
        assert_eq!(s.check_any(8192, &torn).expect_err("torn").offset_bytes, 8192 + 2048);
        let half = mix(&[SgList::zeroes(2048), old.slice(2048..4096)]);
        assert!(s.check_any(8192, &half).expect_err("half").to_string().contains("zeros"));
        assert!(s.check_any(4096, &old).expect_err("elsewhere").to_string().contains("byte 8192"));
    }
}
