//! Randomness: the kernel's for keys and salts, a fast generator (xoshiro256++) for everything else and for the simulator.

use std::cell::RefCell;
use std::sync::OnceLock;

/// xoshiro256++ by Blackman and Vigna (public domain), seeded through SplitMix64. Not for secrets.
#[derive(Clone, Debug)]
pub(crate) struct Rng([u64; 4]);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        let mut state = seed;
        Rng(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }))
    }

    pub(crate) fn from_machine() -> Rng {
        let mut seed = [0; 8];
        machine_fill(&mut seed);
        Rng::new(u64::from_ne_bytes(seed))
    }

    #[inline]
    pub(crate) fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A number below `bound`, which is not 0. The bias is below `bound / 2^64`.
    #[inline]
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    pub(crate) fn fill(&mut self, target: &mut [u8]) {
        for part in target.chunks_mut(8) {
            part.copy_from_slice(&self.next().to_le_bytes()[..part.len()]);
        }
    }
}

static SOURCE: OnceLock<fn(&mut [u8])> = OnceLock::new();

/// Has [`crate::fill_random`] take `source` in place of the kernel's randomness from now on, in the whole process (not in the simulator).
/// The first call counts.
pub fn set_random_source(source: fn(&mut [u8])) {
    let _ = SOURCE.set(source);
}

/// Fills from the source that was set, or from getrandom(2).
///
/// # Panics
/// If the kernel has no random source: going on would make predictable keys.
pub(crate) fn machine_fill(target: &mut [u8]) {
    if let Some(source) = SOURCE.get() {
        return source(target);
    }
    let mut filled = 0;
    while filled < target.len() {
        let rest = &mut target[filled..];
        // SAFETY: `rest` is writable for its length.
        let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => filled += n,
            Err(_) => {
                let error = std::io::Error::last_os_error();
                assert!(error.kind() == std::io::ErrorKind::Interrupted, "getrandom: {error}");
            }
        }
    }
}

/// This thread's fast generator, seeded by the kernel.
pub(crate) fn machine_u64() -> u64 {
    thread_local! {
        static RNG: RefCell<Rng> = RefCell::new(Rng::from_machine());
    }
    RNG.with_borrow_mut(Rng::next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_numbers() {
        let (mut a, mut b, mut c) = (Rng::new(1), Rng::new(1), Rng::new(2));
        let first: Vec<u64> = (0..100).map(|_| a.next()).collect();
        assert_eq!(first, (0..100).map(|_| b.next()).collect::<Vec<_>>());
        assert_ne!(first, (0..100).map(|_| c.next()).collect::<Vec<_>>());
    }

    /// First outputs of the reference implementation for the state {1, 2, 3, 4}.
    #[test]
    fn matches_the_reference() {
        let mut rng = Rng([1, 2, 3, 4]);
        assert_eq!([rng.next(), rng.next(), rng.next()], [41943041, 58720359, 3588806011781223]);
    }

    #[test]
    fn below_covers_its_range() {
        let mut rng = Rng::new(3);
        let mut seen = [false; 7];
        (0..1000).for_each(|_| seen[rng.below(7) as usize] = true);
        assert_eq!(seen, [true; 7]);
    }

    #[test]
    fn machine_randomness_differs() {
        let (mut a, mut b) = ([0; 300], [0; 300]);
        machine_fill(&mut a);
        machine_fill(&mut b);
        assert_ne!(a, b);
        assert_ne!(machine_u64(), machine_u64());
    }
}
