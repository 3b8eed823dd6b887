//! Memory that small writes will touch, asked for before they do. A pool's tables are larger than a cache and are used at random
//! places, so the writes of a turn are looked at together: each step asks for all of them at once, and the next one uses it.

use cryptfold_reactor::memory::{Prefetch, prefetch};
use cryptfold_reduce_format::fingerprint::Fingerprint;
use cryptfold_reduce_format::ids::{DomainId, VolumeId};
use cryptfold_reduce_format::map::MapLeaf;
use smallvec::SmallVec;

use crate::index::Key;
use crate::shard::{Shard, Volume, leaf_of};

/// A chunk that will be overwritten: its domain and where its fingerprint lies.
pub(crate) type Touched<'a> = (DomainId, &'a Fingerprint);

impl Shard {
    /// Asks for what a look-up of new data will touch.
    pub(crate) fn hint(&self, domain: DomainId, fingerprints: &[Fingerprint]) {
        fingerprints.iter().for_each(|fingerprint| self.index.prefetch(Key::new(domain, fingerprint)));
    }

    /// Asks for what overwriting blocks at random places will touch, which no cache holds: step by step for all of them, so
    /// that memory is waited for together. Gives what [`Shard::touch_prints`] goes on with, after some other work.
    pub(crate) fn touch_old(
        &self,
        blocks: impl Iterator<Item = (VolumeId, u64)>,
    ) -> SmallVec<[Touched<'_>; 16]> {
        let mut maps: SmallVec<[(&Volume, &MapLeaf, usize); 16]> = SmallVec::new();
        maps.extend(blocks.filter_map(|(volume, lba)| {
            let v = self.volumes.get(&volume.0)?;
            let (index, slot) = leaf_of(lba);
            let leaf = v.tree.peek(index)?;
            prefetch(leaf, Prefetch::Read);
            Some((v, leaf, slot))
        }));
        maps.iter().for_each(|(_, leaf, slot)| prefetch(leaf.raw(*slot), Prefetch::Write));
        let mut old: SmallVec<[_; 16]> = SmallVec::new();
        old.extend(maps.into_iter().filter_map(|(v, leaf, slot)| {
            let addr = leaf.get(slot).chunk()?;
            let d = self.domains.get(&v.record.domain.0)?;
            let container = d.containers.peek(addr.container().get())?;
            prefetch(container, Prefetch::Write);
            let prints = d.fingerprints.peek(addr.container().get());
            prints.inspect(|leaf| prefetch(*leaf, Prefetch::Read));
            Some((v.record.domain, container, prints, addr.slot()))
        }));
        let touched = old.into_iter().filter_map(|(domain, container, prints, slot)| {
            container.touched_by(slot, |line| prefetch(line, Prefetch::Write));
            let print = prints?.slots.get(usize::from(slot))?;
            prefetch(print, Prefetch::Read);
            Some((domain, print))
        });
        touched.collect()
    }

    /// Asks for where the index has overwritten blocks.
    pub(crate) fn touch_prints(&self, touched: &[Touched<'_>]) {
        touched.iter().for_each(|(domain, print)| self.index.prefetch(Key::new(*domain, print)));
    }
}
