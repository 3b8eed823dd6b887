//! Seeded numbers for simulations: SplitMix64 (Steele, Lea, Flood 2014; public domain). Not for secrets.

/// A generator whose whole future is its seed.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// From a seed; neighbouring seeds give unrelated numbers.
    pub fn new(seed: u64) -> Rng {
        let mut rng = Rng(seed);
        rng.0 = rng.next() ^ seed.rotate_left(32);
        rng
    }

    /// The next number.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// A number from `low` to `high`, both included.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low).saturating_add(1))
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A number up to `limit` whose order of magnitude is uniform: small ones are as likely as large ones.
    pub fn magnitude(&mut self, limit: u64) -> u64 {
        let bits = self.below(u64::from(64 - limit.leading_zeros()) + 1);
        self.below(1u64.checked_shl(bits as u32).unwrap_or(u64::MAX).min(limit) + 1)
    }

    /// Fills with random bytes.
    pub fn fill(&mut self, target: &mut [u8]) {
        for part in target.chunks_mut(8) {
            part.copy_from_slice(&self.next().to_le_bytes()[..part.len()]);
        }
    }

    /// A generator of its own for a part of the run.
    pub fn fork(&mut self) -> Rng {
        Rng::new(self.next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_decide() {
        let draw = |seed| {
            let mut r = Rng::new(seed);
            (0..50).map(|_| r.next()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn bounds_hold_and_are_reached() {
        let mut r = Rng::new(1);
        let seen: std::collections::BTreeSet<_> = (0..1000).map(|_| r.range(3, 9)).collect();
        assert_eq!(seen, (3..=9).collect());
        assert_eq!(r.below(0), 0);
        let magnitudes: Vec<_> = (0..2000).map(|_| r.magnitude(100)).collect();
        assert!(magnitudes.iter().all(|m| *m <= 100));
        assert!(magnitudes.contains(&0) && magnitudes.iter().any(|m| *m > 90));
    }
}
