//! Blocks of data that tell where they belong, in the kinds that a reducing stack tells apart.

use cryptfold_reactor::memory::Buf;

use crate::Rng;

/// What a block's content is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only this block and generation has it; compresses to about a quarter.
    Compressible,
    /// Only this block and generation has it; does not compress.
    Incompressible,
    /// Every block of the set has it, whatever its place.
    Duplicate(u64),
    /// Zeros.
    Zero,
    /// One 8-byte word over and over, this block's and generation's own.
    Pattern,
}

impl Kind {
    /// A random one; duplicates come from `sets` sets.
    pub fn draw(rng: &mut Rng, sets: u64) -> Kind {
        match rng.below(16) {
            0..5 => Kind::Compressible,
            5..8 => Kind::Incompressible,
            8..13 => Kind::Duplicate(rng.below(sets)),
            13..15 => Kind::Zero,
            _ => Kind::Pattern,
        }
    }
}

/// Names a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Number of the volume.
    pub volume: u64,
    /// Block within it.
    pub lba: u64,
    /// Number of the write.
    pub generation: u64,
    /// See [`Kind`].
    pub kind: Kind,
}

/// Fills one block with the content that `tag` names.
pub fn fill(tag: Tag, block: &mut [u8]) {
    let own = [tag.volume, tag.lba, tag.generation]
        .iter()
        .fold(0x5eed, |h: u64, v| (h ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31));
    match tag.kind {
        Kind::Zero => block.fill(0),
        Kind::Pattern => {
            let word = (own | 1).to_le_bytes();
            block.chunks_mut(8).for_each(|part| part.copy_from_slice(&word[..part.len()]));
        }
        Kind::Incompressible => Rng::new(own).fill(block),
        Kind::Compressible => words(Rng::new(own), block),
        Kind::Duplicate(set) => words(Rng::new(!set), block),
    }
}

/// A quarter noise, the rest its repetition: every 512-byte sector differs from those of other contents.
fn words(mut rng: Rng, block: &mut [u8]) {
    for sector in block.chunks_mut(512) {
        let quarter = sector.len() / 4;
        let (noise, rest) = sector.split_at_mut(quarter);
        rng.fill(noise);
        rest.chunks_mut(quarter.max(1)).for_each(|part| part.copy_from_slice(&noise[..part.len()]));
    }
}

/// A buffer of consecutive blocks, one per tag.
pub fn blocks(tags: &[Tag], block_bytes: usize) -> Buf {
    let mut buf = Buf::alloc(tags.len() * block_bytes);
    for (block, tag) in buf.make_mut().chunks_mut(block_bytes.max(1)).zip(tags) {
        fill(*tag, block);
    }
    buf
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn block(volume: u64, lba: u64, generation: u64, kind: Kind) -> Vec<u8> {
        blocks(&[Tag { volume, lba, generation, kind }], 4096).to_vec()
    }

    #[test]
    fn each_sector_belongs_to_one_content() {
        let mut seen = HashSet::new();
        let mut sectors = 0;
        for n in 0..50 {
            for kind in [Kind::Compressible, Kind::Incompressible, Kind::Duplicate(n)] {
                for sector in block(n % 3, n / 3, n, kind).chunks(512) {
                    seen.insert(sector.to_vec());
                    sectors += 1;
                }
            }
            seen.insert(block(n % 3, n / 3, n, Kind::Pattern)[..512].to_vec());
            sectors += 1;
        }
        assert_eq!(seen.len(), sectors);
    }

    #[test]
    fn duplicates_are_equal_and_zeros_zero() {
        assert_eq!(block(0, 1, 2, Kind::Duplicate(9)), block(4, 5, 6, Kind::Duplicate(9)));
        assert_ne!(block(0, 1, 2, Kind::Duplicate(9)), block(0, 1, 2, Kind::Duplicate(8)));
        assert_eq!(block(1, 1, 1, Kind::Zero), vec![0; 4096]);
    }
}
