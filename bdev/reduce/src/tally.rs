//! What an audit has added up of maps and containers, while hosts go on.
//!
//! Each walk has a place that it has passed: what lies before it counts, and is counted anew when it changes
//! ([`Maps::changed`], [`Tables::changed`]; trees keep what a leaf was before, [`crate::tree::Tree::take_changed`]). What lies behind it
//! is counted as it is when the walk gets there. So at any moment, once the changes until then are taken in, the sums are those of the
//! pool as it is, and can be compared with what the pool itself counts.

use std::collections::BTreeMap;
use std::ops::Range;

use cryptfold_reduce_format::container::Container;
use cryptfold_reduce_format::ids::{ChunkAddr, DomainId, SLOTS};
use cryptfold_reduce_format::map::{MAP_ENTRIES, MapEntry, MapLeaf, Target};

use crate::hash::FastMap;
use crate::shard::live_bytes;

/// Bytes of RAM that the counted references of a container take, about.
pub(crate) const COUNTED_BYTES: usize = SLOTS + 64;
/// Bytes of RAM that the place of a fragment takes.
pub(crate) const SPAN_BYTES: usize = 8;

fn step(n: &mut u64, add: bool) {
    *n = if add { n.wrapping_add(1) } else { n.wrapping_sub(1) };
}

/// References to chunks: a byte each, and what does not fit aside.
#[derive(Default)]
struct Counts {
    low: FastMap<u64, Box<[u8; SLOTS]>>,
    /// In units of 256.
    high: FastMap<(u64, u16), i64>,
}

impl Counts {
    fn change(&mut self, addr: ChunkAddr, add: bool) {
        let (container, slot) = (addr.container().get(), addr.slot());
        let low = self.low.entry(container).or_insert_with(|| Box::new([0; SLOTS]));
        let low = &mut low[usize::from(slot)];
        let (next, carry) = if add { low.overflowing_add(1) } else { low.overflowing_sub(1) };
        *low = next;
        if carry {
            *self.high.entry((container, slot)).or_default() += if add { 1 } else { -1 };
        }
    }

    fn of(&self, container: u64, slot: u16) -> i64 {
        let low = self.low.get(&container).map_or(0, |slots| slots[usize::from(slot)]);
        i64::from(low) + 256 * self.high.get(&(container, slot)).copied().unwrap_or(0)
    }
}

/// What a volume's own map has.
#[derive(Default)]
pub(crate) struct Blocks {
    pub chunks: u64,
    /// Zeros and patterns.
    pub special: u64,
    /// Chunks by birth.
    pub births: BTreeMap<u32, u64>,
}

/// Of one domain: what its maps have, and the references to a range of its containers.
pub(crate) struct Maps {
    domain: DomainId,
    containers: Range<u64>,
    /// The first leaf that does not count: volume and index.
    passed: (u32, u64),
    counts: Counts,
    volumes: BTreeMap<u32, Blocks>,
}

impl Maps {
    pub fn new(domain: DomainId, containers: Range<u64>) -> Maps {
        Maps { domain, containers, passed: (0, 0), counts: Counts::default(), volumes: BTreeMap::new() }
    }

    pub fn domain(&self) -> DomainId {
        self.domain
    }

    /// The walk comes to this leaf: all before it count.
    pub fn pass(&mut self, volume: u32, index: u64) {
        self.passed = (volume, index);
    }

    /// The leaf that the walk is at counts from now on.
    pub fn count(&mut self, volume: u32, index: u64, leaf: &MapLeaf) {
        leaf.iter().for_each(|entry| self.entry(volume, &entry, true));
        self.passed = (volume, index + 1);
    }

    /// A leaf was another one before; `None` = it is gone.
    pub fn changed(&mut self, volume: u32, index: u64, before: &MapLeaf, now: Option<&MapLeaf>) {
        if (volume, index) >= self.passed {
            return;
        }
        for at in 0..MAP_ENTRIES {
            let (old, new) = (before.get(at), now.map_or_else(MapEntry::default, |leaf| leaf.get(at)));
            if old != new {
                self.entry(volume, &old, false);
                self.entry(volume, &new, true);
            }
        }
    }

    fn entry(&mut self, volume: u32, entry: &MapEntry, add: bool) {
        if matches!(entry.target, Target::Unmapped | Target::Uncorrectable) {
            return;
        }
        let blocks = self.volumes.entry(volume).or_default();
        let Target::Chunk(addr) = entry.target else { return step(&mut blocks.special, add) };
        step(&mut blocks.chunks, add);
        step(blocks.births.entry(entry.birth.0).or_default(), add);
        if self.containers.contains(&addr.container().get()) {
            self.counts.change(addr, add);
        }
    }

    /// What a volume's map has.
    pub fn blocks(&self, volume: u32) -> Option<&Blocks> {
        self.volumes.get(&volume)
    }

    /// References to a chunk of the range.
    pub fn references(&self, container: u64, slot: u16) -> i64 {
        self.counts.of(container, slot)
    }
}

/// Of all domains: what the containers count, and what lives in a range of segments.
pub(crate) struct Tables {
    segments: Range<u32>,
    /// The first container that does not count: domain and number.
    passed: (u32, u64),
    /// Live bytes per segment and domain.
    live: BTreeMap<(u32, u32), u64>,
    /// Live fragments per segment: offset and end.
    spans: FastMap<u32, Vec<(u32, u32)>>,
    /// Chunks with references, and stored bytes, per domain.
    domains: BTreeMap<u32, (u64, u64)>,
}

impl Tables {
    pub fn new(segments: Range<u32>) -> Tables {
        Tables {
            segments,
            passed: (0, 0),
            live: BTreeMap::new(),
            spans: FastMap::default(),
            domains: BTreeMap::new(),
        }
    }

    /// The walk comes to this container: all before it count.
    pub fn pass(&mut self, domain: u32, number: u64) {
        self.passed = (domain, number);
    }

    /// The container that the walk is at counts from now on.
    pub fn count(&mut self, domain: u32, number: u64, container: &Container) {
        self.container(domain, container, true);
        self.passed = (domain, number + 1);
    }

    /// A container was another one before; `None` = it is gone.
    pub fn changed(&mut self, domain: u32, number: u64, before: &Container, now: Option<&Container>) {
        if (domain, number) < self.passed {
            self.container(domain, before, false);
            if let Some(now) = now {
                self.container(domain, now, true);
            }
        }
    }

    fn container(&mut self, domain: u32, container: &Container, add: bool) {
        let change = |n: &mut u64, by: u64| *n = if add { n.wrapping_add(by) } else { n.wrapping_sub(by) };
        let (unique, stored) = self.domains.entry(domain).or_default();
        change(unique, container.live().into());
        for fragment in container.fragments() {
            let live = u64::from(live_bytes(container, &fragment));
            if live == 0 {
                continue;
            }
            change(stored, live);
            let segment = fragment.place.segment.segment.0;
            if !self.segments.contains(&segment) {
                continue;
            }
            change(self.live.entry((segment, domain)).or_default(), live);
            let span = (fragment.place.offset, fragment.place.offset + fragment.unit_bytes);
            let spans = self.spans.entry(segment).or_default();
            if add {
                spans.push(span);
            } else if let Some(at) = spans.iter().rposition(|other| *other == span) {
                spans.swap_remove(at);
            }
        }
    }

    /// Chunks with references, and stored bytes.
    pub fn of_domain(&self, domain: u32) -> (u64, u64) {
        self.domains.get(&domain).copied().unwrap_or_default()
    }

    /// Live bytes of a domain in a segment.
    pub fn live(&self, segment: u32, domain: u32) -> u64 {
        self.live.get(&(segment, domain)).copied().unwrap_or(0)
    }

    /// Segments from this one on in which something lives.
    pub fn live_from(&self, first: u32) -> impl Iterator<Item = u32> {
        self.live.range((first, 0)..).filter(|(_, live)| **live > 0).map(|(at, _)| at.0)
    }

    /// Segments in which live fragments overlap, and how often.
    pub fn overlaps(&mut self) -> BTreeMap<u32, usize> {
        let found = self.spans.iter_mut().map(|(segment, spans)| (*segment, overlaps(spans)));
        found.filter(|(_, overlaps)| *overlaps > 0).collect()
    }
}

/// How many of these (offset and end) begin before the one before them has ended. Sorts them.
pub(crate) fn overlaps(spans: &mut [(u32, u32)]) -> usize {
    spans.sort_unstable();
    spans.windows(2).filter(|pair| pair[0].1 > pair[1].0).count()
}

#[cfg(test)]
mod tests {
    use cryptfold_reduce_format::ids::{ContainerId, Epoch};

    use super::*;

    #[test]
    fn references_beyond_a_byte_are_counted_both_ways() {
        let addr = ChunkAddr::new(ContainerId::new(3).unwrap(), 7).unwrap();
        let mut counts = Counts::default();
        for n in 1..=1000 {
            counts.change(addr, true);
            assert_eq!(counts.of(3, 7), n);
        }
        for n in (-300..1000).rev() {
            counts.change(addr, false);
            assert_eq!(counts.of(3, 7), n);
        }
        assert_eq!((counts.of(3, 6), counts.of(4, 7)), (0, 0));
    }

    #[test]
    fn a_leaf_counts_once_whenever_it_changes() {
        let addr = |slot| ChunkAddr::new(ContainerId::new(1).unwrap(), slot).unwrap();
        let entry =
            |slot| MapEntry { target: Target::Chunk(addr(slot)), birth: Epoch(2), ..MapEntry::default() };
        let (mut first, mut second) = (MapLeaf::default(), MapLeaf::default());
        first.set(0, entry(0));
        second.set(0, entry(1));
        second.set(1, entry(1));
        let mut maps = Maps::new(DomainId(1), 1..u64::MAX);
        maps.pass(5, 9);
        // Not passed yet: nothing to take back.
        maps.changed(5, 9, &MapLeaf::default(), Some(&first));
        assert!(maps.blocks(5).is_none());
        maps.count(5, 9, &first);
        assert_eq!((maps.references(1, 0), maps.references(1, 1)), (1, 0));
        maps.changed(5, 9, &first, Some(&second));
        assert_eq!((maps.references(1, 0), maps.references(1, 1)), (0, 2));
        assert_eq!(maps.blocks(5).map(|blocks| (blocks.chunks, blocks.births[&2])), Some((2, 2)));
        maps.changed(5, 9, &second, None);
        assert_eq!((maps.references(1, 1), maps.blocks(5).unwrap().chunks), (0, 0));
    }
}
