//! The fingerprints of containers that writes have met lately, for when the index keeps only a sample.
//!
//! Owns one table over all of them, of hints only: whoever uses one compares it with the container's list. A hook that the
//! index knows leads to a container, and the neighbours of the hook are found here, before and after it, also by the
//! writes that follow. Bounded: [`KEPT`] containers, about 24 KiB each.

use std::collections::VecDeque;

use cryptfold_reduce_format::fingerprint::Fingerprint;
use cryptfold_reduce_format::ids::{ChunkAddr, ContainerId};

use crate::hash::FastMap;

/// Containers kept: a few for each of several streams.
const KEPT: usize = 48;

/// See the module's head.
pub(crate) struct Recent {
    /// Containers kept.
    most: usize,
    /// Oldest first: a container and the fingerprints (their first 64 bits) that are in the table for it.
    containers: VecDeque<(u64, Vec<u64>)>,
    table: FastMap<u64, ChunkAddr>,
}

impl Default for Recent {
    fn default() -> Self {
        Recent { most: KEPT, containers: VecDeque::new(), table: FastMap::default() }
    }
}

impl Recent {
    /// For tests: keeps so many containers.
    pub fn limit(&mut self, most: usize) {
        *self = Recent { most, ..Recent::default() };
    }

    /// Makes a container the newest; false: it is not here yet.
    pub fn touch(&mut self, number: u64) -> bool {
        match self.containers.iter().rposition(|kept| kept.0 == number) {
            Some(at) if at + 1 == self.containers.len() => true,
            Some(at) => {
                let kept = self.containers.remove(at);
                self.containers.extend(kept);
                true
            }
            None => false,
        }
    }

    /// Adds fingerprints of a container, from this slot on.
    pub fn add(&mut self, number: u64, from: u16, fingerprints: &[Fingerprint]) {
        if self.most == 0 {
            return;
        }
        if !self.touch(number) {
            if self.containers.len() >= self.most
                && let Some((old, prints)) = self.containers.pop_front()
            {
                for print in prints {
                    if self.table.get(&print).is_some_and(|addr| addr.container().get() == old) {
                        self.table.remove(&print);
                    }
                }
            }
            self.containers.push_back((number, Vec::new()));
        }
        let (Some(id), Some((_, prints))) = (ContainerId::new(number), self.containers.back_mut()) else {
            return;
        };
        for (slot, fingerprint) in (from..).zip(fingerprints) {
            if *fingerprint != Fingerprint::NONE
                && let Some(addr) = ChunkAddr::new(id, slot)
            {
                self.table.insert(fingerprint.prefix(), addr);
                prints.push(fingerprint.prefix());
            }
        }
    }

    /// Where a chunk with this fingerprint may be.
    pub fn find(&self, fingerprint: &Fingerprint) -> Option<ChunkAddr> {
        self.table.get(&fingerprint.prefix()).copied()
    }

    /// Bytes of RAM, about.
    pub fn memory_bytes(&self) -> usize {
        self.table.capacity() * 17 + self.containers.iter().map(|kept| kept.1.capacity() * 8).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(n: u64) -> Fingerprint {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        bytes[8..].copy_from_slice(&(n + 1).to_le_bytes());
        Fingerprint(bytes)
    }

    #[test]
    fn finds_what_was_met_lately_and_forgets_the_rest() {
        let mut recent = Recent::default();
        let list = |number: u64| (0..512).map(|slot| print(number * 512 + slot)).collect::<Vec<_>>();
        for number in 1..=200 {
            recent.add(number, 0, &list(number));
            // The first one is met again and again.
            assert!(recent.touch(1));
        }
        let there = |recent: &Recent, number: u64| {
            (0..512).filter(|slot| recent.find(&print(number * 512 + slot)).is_some()).count()
        };
        assert_eq!((there(&recent, 1), there(&recent, 200), there(&recent, 2)), (512, 512, 0));
        assert_eq!(recent.table.len(), KEPT * 512);
        let addr = recent.find(&print(200 * 512 + 7)).unwrap();
        assert_eq!((addr.container().get(), addr.slot()), (200, 7));
        assert!(recent.memory_bytes() < (KEPT * 64) << 10);
    }
}
