//! Which operation comes next, and where.

/// A fast generator of random numbers (SplitMix64); reproducible from its seed.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// From a seed.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }
    /// The next 64 bits.
    #[inline]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// Uniform below `n`.
    #[inline]
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }
}

/// The slots (places of one I/O each) that a worker uses, and the order.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    rng: Rng,
    random: bool,
    read_pct: u64,
    first: u64,
    slots: u64,
    next: u64,
}

impl Pattern {
    pub fn new(seed: u64, random: bool, read_pct: u8, first: u64, slots: u64) -> Pattern {
        Pattern { rng: Rng::new(seed), random, read_pct: u64::from(read_pct), first, slots, next: 0 }
    }

    /// (slot, whether to read it).
    #[inline]
    pub fn step(&mut self) -> (u64, bool) {
        let read = match self.read_pct {
            100 => true,
            0 => false,
            p => self.rng.below(100) < p,
        };
        let slot = if self.random {
            self.rng.below(self.slots)
        } else {
            let n = self.next;
            self.next = if n + 1 == self.slots { 0 } else { n + 1 };
            n
        };
        (self.first + slot, read)
    }
}
