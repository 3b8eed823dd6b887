//! The fingerprint index: a bounded table in RAM from fingerprints to chunk addresses.
//!
//! Owns nothing durable: every hit is a hint that the caller checks against the container's fingerprint leaf, so entries
//! may be stale, lost or (rarely) false. It is rebuilt from those leaves after an opening.
//!
//! Shape: buckets of eight entries of 12 bytes: a 32-bit tag, and 57 bits of address with 7 further tag bits. The low bits
//! of a 64-bit hash choose the bucket (or its neighbour, when it is full), bits 10..49 are the tag, so that the table can
//! double without the fingerprints. At its largest size the table is *sampled*: with `hook_bits` = n only fingerprints whose n highest tag
//! bits are zero are kept (hooks); the neighbours of a hook are found through its container.
//!
//! Invariants: `used` counts the entries that are not empty; address 0 marks an empty entry (containers count from 1).

use cryptfold_reactor::memory::{Prefetch, prefetch};
use cryptfold_reduce_format::fingerprint::Fingerprint;
use cryptfold_reduce_format::ids::{ChunkAddr, ContainerId, DomainId};
use smallvec::SmallVec;

const WAYS: usize = 8;
/// Lowest hash bit that the tag covers.
const TAG_AT: u32 = 10;
const SPARE_BITS: u32 = 7;
const TAG_BITS: u32 = 32 + SPARE_BITS;
const ADDR_BITS: u32 = 57;
const ADDR_MASK: u64 = (1 << ADDR_BITS) - 1;
/// Most bits of sampling: one in 256 fingerprints.
const MAX_HOOK_BITS: u32 = 8;
const MIN_BUCKETS: usize = 1 << TAG_AT;
/// Below this (768 KiB) a table rather grows early than it loses an entry.
const SMALL: usize = 1 << 13;

#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Bucket {
    tags: [u32; WAYS],
    /// Spare tag bits above [`ADDR_BITS`], container << 9 | slot below.
    addrs: [u64; WAYS],
}

impl Bucket {
    /// The ways with this tag. Looks at nothing else: for most look-ups there is none.
    #[inline]
    fn tagged(&self, tag: u32) -> impl Iterator<Item = usize> + use<> {
        let mut mask = 0u32;
        for (way, other) in self.tags.iter().enumerate() {
            mask |= u32::from(*other == tag) << way;
        }
        std::iter::from_fn(move || {
            let way = mask.trailing_zeros() as usize;
            mask &= mask.wrapping_sub(1);
            (way < WAYS).then_some(way)
        })
    }
}

const EMPTY: Bucket = Bucket { tags: [0; WAYS], addrs: [0; WAYS] };
const _: () = assert!(size_of::<Bucket>() == 96);

/// The table. See the module's head.
pub(crate) struct Index {
    buckets: Vec<Bucket>,
    max_buckets: usize,
    used: usize,
    hook_bits: u32,
}

/// Where a fingerprint of a domain goes in the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Key(u64);

impl Key {
    pub fn new(domain: DomainId, fingerprint: &Fingerprint) -> Key {
        // Fingerprints are uniform; domains only need to be told apart.
        Key(fingerprint.prefix() ^ u64::from(domain.0).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn tag(self) -> (u32, u64) {
        let tag = self.0 >> TAG_AT & ((1 << TAG_BITS) - 1);
        (tag as u32, tag >> 32)
    }

    /// Whether a table that is sampled with so many bits keeps it.
    pub fn is_hook(self, bits: u32) -> bool {
        bits == 0 || self.0 >> (TAG_AT + TAG_BITS - bits) & ((1 << bits) - 1) == 0
    }
}

fn pack(addr: ChunkAddr) -> Option<u64> {
    let packed = addr.container().get() << 9 | u64::from(addr.slot());
    (packed & !ADDR_MASK == 0).then_some(packed)
}

fn unpack(entry: u64) -> Option<ChunkAddr> {
    let packed = entry & ADDR_MASK;
    ChunkAddr::new(ContainerId::new(packed >> 9)?, (packed & 511) as u16)
}

impl Index {
    /// An empty table that grows up to `budget_bytes` (at least 96 KiB).
    pub fn new(budget_bytes: usize) -> Index {
        let most = budget_bytes / size_of::<Bucket>();
        let max_buckets =
            (most.max(1).next_power_of_two() / if most.is_power_of_two() { 1 } else { 2 }).max(MIN_BUCKETS);
        Index { buckets: vec![EMPTY; MIN_BUCKETS], max_buckets, used: 0, hook_bits: 0 }
    }

    /// Bytes of RAM in use.
    pub fn memory_bytes(&self) -> usize {
        self.buckets.len() * size_of::<Bucket>()
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.used
    }

    /// One fingerprint in `2^hook_bits` is kept.
    pub fn hook_bits(&self) -> u32 {
        self.hook_bits
    }

    /// The buckets where a key may be: its own and the neighbour that shares its pair.
    fn at(&self, key: Key) -> [usize; 2] {
        let at = key.0 as usize & (self.buckets.len() - 1);
        [at, at ^ 1]
    }

    /// Asks for what a look-up of `key` will touch.
    #[inline]
    pub fn prefetch(&self, key: Key) {
        for at in self.at(key) {
            prefetch(&self.buckets[at], Prefetch::Read);
        }
    }

    /// Addresses that may have this fingerprint; nearly always none or the one.
    pub fn candidates(&self, key: Key) -> SmallVec<[ChunkAddr; 2]> {
        let (tag, spare) = key.tag();
        let mut found = SmallVec::new();
        for at in self.at(key) {
            let bucket = &self.buckets[at];
            for way in bucket.tagged(tag) {
                let entry = bucket.addrs[way];
                if entry >> ADDR_BITS == spare && entry & ADDR_MASK != 0 {
                    found.extend(unpack(entry));
                }
            }
        }
        found
    }

    /// The place of an entry.
    fn find(&self, key: Key, tag: u32, entry: u64) -> Option<(usize, usize)> {
        self.at(key).into_iter().find_map(|at| {
            let bucket = &self.buckets[at];
            Some((at, bucket.tagged(tag).find(|&way| bucket.addrs[way] == entry)?))
        })
    }

    /// A place for a new entry.
    fn find_empty(&self, key: Key) -> Option<(usize, usize)> {
        self.at(key).into_iter().find_map(|at| {
            let bucket = &self.buckets[at];
            // What is empty has tag 0; so may an entry.
            Some((at, bucket.tagged(0).find(|&way| bucket.addrs[way] & ADDR_MASK == 0)?))
        })
    }

    /// Remembers `addr`, if the fingerprint is one of those kept. A full pair of buckets makes the table grow,
    /// or gives up one of its entries.
    pub fn insert(&mut self, key: Key, addr: ChunkAddr) {
        let Some(packed) = pack(addr) else { return };
        if !key.is_hook(self.hook_bits) {
            return;
        }
        if self.used * 100 > self.buckets.len() * WAYS * 80 {
            self.make_room();
            if !key.is_hook(self.hook_bits) {
                return;
            }
        }
        let (tag, spare) = key.tag();
        let entry = spare << ADDR_BITS | packed;
        if self.find(key, tag, entry).is_some() {
            return;
        }
        let mut free = self.find_empty(key);
        if free.is_none()
            && self.buckets.len() < self.max_buckets
            && self.used * if self.buckets.len() < SMALL { 8 } else { 3 } > self.buckets.len() * WAYS
        {
            self.double();
            free = self.find_empty(key);
        }
        self.used += usize::from(free.is_some());
        let (at, way) = free.unwrap_or((self.at(key)[0], (key.0 >> 56) as usize % WAYS));
        self.buckets[at].tags[way] = tag;
        self.buckets[at].addrs[way] = entry;
    }

    /// Forgets that `addr` has this fingerprint.
    pub fn remove(&mut self, key: Key, addr: ChunkAddr) {
        let Some(packed) = pack(addr) else { return };
        let (tag, spare) = key.tag();
        let entry = spare << ADDR_BITS | packed;
        if let Some((at, way)) = self.find(key, tag, entry) {
            self.buckets[at].tags[way] = 0;
            self.buckets[at].addrs[way] = 0;
            self.used -= 1;
        }
    }

    /// Keeps at most one fingerprint in `2^bits` (at most 256) from now on.
    pub fn sample(&mut self, bits: u32) {
        self.hook_bits = self.hook_bits.max(bits.min(MAX_HOOK_BITS));
        self.drop_others();
    }

    #[cold]
    fn make_room(&mut self) {
        if self.buckets.len() < self.max_buckets {
            self.double();
        } else if self.hook_bits < MAX_HOOK_BITS {
            self.hook_bits += 1;
            self.drop_others();
        }
    }

    /// Each bucket's entries stay in it or go to the one `len` further: the next bit of the hash decides, and the tag has it.
    fn double(&mut self) {
        let half = self.buckets.len();
        let bit = half.trailing_zeros() - TAG_AT;
        self.buckets.resize(2 * half, EMPTY);
        let (low, high) = self.buckets.split_at_mut(half);
        for (low, high) in low.iter_mut().zip(high) {
            for way in 0..WAYS {
                let spare = low.addrs[way] >> ADDR_BITS;
                let tag = u64::from(low.tags[way]) | spare << 32;
                if low.addrs[way] & ADDR_MASK != 0 && tag >> bit & 1 == 1 {
                    high.tags[way] = std::mem::take(&mut low.tags[way]);
                    high.addrs[way] = std::mem::take(&mut low.addrs[way]);
                }
            }
        }
    }

    /// Drops what is no hook at the present sampling rate.
    fn drop_others(&mut self) {
        for bucket in &mut self.buckets {
            for way in 0..WAYS {
                if bucket.addrs[way] & ADDR_MASK == 0 {
                    continue;
                }
                let tag = u64::from(bucket.tags[way]) | bucket.addrs[way] >> ADDR_BITS << 32;
                let hook = tag >> (TAG_BITS - self.hook_bits) == 0;
                if !hook {
                    bucket.tags[way] = 0;
                    bucket.addrs[way] = 0;
                    self.used -= 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn key(n: u64) -> Key {
        // SplitMix64: uniform, as fingerprints are.
        let mut z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Key(z ^ (z >> 31))
    }

    fn addr(n: u64) -> ChunkAddr {
        ChunkAddr::new(ContainerId::new(n / 512 + 1).unwrap(), (n % 512) as u16).unwrap()
    }

    #[test]
    fn finds_what_it_keeps_while_it_grows() {
        let mut index = Index::new(64 << 20);
        for n in 0..200_000 {
            index.insert(key(n), addr(n));
        }
        assert_eq!(index.hook_bits(), 0);
        let found = (0..200_000).filter(|&n| index.candidates(key(n)).contains(&addr(n))).count();
        // As long as it can grow, a full pair makes it grow (unless it has just grown).
        assert!(found > 199_990, "found {found}");
        let false_hits: usize = (200_000..300_000).map(|n| index.candidates(key(n)).len()).sum();
        assert!(false_hits < 10, "{false_hits} false hits");
    }

    /// Each time other pairs fill up first.
    #[test]
    fn loses_nothing_while_it_is_small() {
        for run in 0..50 {
            let keys = run * 1_000_000..run * 1_000_000 + 12_000;
            let mut index = Index::new(8 << 20);
            for n in keys.clone() {
                index.insert(key(n), addr(n));
                assert_eq!(index.len() as u64, n - keys.start + 1, "run {run}");
            }
            for n in keys {
                assert!(index.candidates(key(n)).contains(&addr(n)), "run {run}, {n}");
            }
        }
    }

    #[test]
    fn agrees_with_a_map_while_buckets_have_room() {
        let mut index = Index::new(1 << 20);
        let mut model = HashMap::new();
        for step in 0..2000u64 {
            let n = key(step).0 % 500;
            if key(step).0 >> 32 & 1 == 0 {
                index.insert(key(n), addr(n));
                model.insert(n, addr(n));
            } else {
                index.remove(key(n), addr(n));
                model.remove(&n);
            }
            assert_eq!(index.len(), model.len());
        }
        for n in 0..500 {
            assert_eq!(index.candidates(key(n)).first(), model.get(&n), "{n}");
        }
    }

    #[test]
    fn keeps_its_budget_by_sampling() {
        let mut index = Index::new(1 << 20);
        for n in 0..100_000 {
            index.insert(key(n), addr(n));
        }
        assert!(index.memory_bytes() <= 1 << 20);
        assert!(index.hook_bits() > 0);
        let hooks: Vec<u64> = (0..100_000).filter(|&n| key(n).is_hook(index.hook_bits())).collect();
        let found = hooks.iter().filter(|&&n| index.candidates(key(n)).contains(&addr(n))).count();
        assert!(found * 100 > hooks.len() * 90, "{found} of {}", hooks.len());
    }
}
