//! Families: a volume with its snapshots, and what is based on them.
//!
//! A volume's map is whole, whatever its snapshots: reads and writes of a volume cost the same with a thousand of them. A
//! snapshot begins with an empty map; what the volume loses that the newest snapshot shows goes there (and keeps its
//! reference), so a snapshot's map is its dead list, by block. The members of a family stand in order of their births, the
//! volume last:
//!
//! ```text
//! block  snapshot@3  snapshot@7  volume     entries: what@birth
//!   0                            a@2        never changed: all three show it
//!   1    b@1                     c@5        changed once, between 3 and 7
//!   2                d@7         e@9        written in epoch 7 (so snapshot@3 shows nothing), again in 9
//! ```
//!
//! A member shows the first entry at or after it in the row, if it was born not later than the member; else nothing. A clone
//! is a family of its own whose nothing is what a snapshot of another family (its base) shows; there a discarded block is an
//! unmapped entry with a birth.
//!
//! Owns the order of the members, and the changes of several maps at once. Invariants:
//! - each entry of each map holds exactly one reference: sharing is one entry, seen from several members;
//! - entries of a row are born in order, each after the member before it;
//! - a member that is being deleted stays in its row until its map is empty: what the snapshot before it shows moves
//!   there, the rest is dropped. So a deletion can stop and go on anywhere, and nobody else reads anything new.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_reduce_format::entry::OwnFrom;
use cryptfold_reduce_format::ids::{ChunkAddr, Epoch, Sequence, VolumeId};
use cryptfold_reduce_format::map::{MAP_ENTRIES, MAP_LEAF_BYTES, MapEntry, MapLeaf, Target};
use cryptfold_reduce_format::record::{MAX_BIRTHS, VolumeRecord, volume_flags};

use crate::hash::FastMap;
use crate::shard::{ApplyError, Needs, Shard, Volume, drop_reference, take_reference};
use crate::tree::{Found, Meter};

/// Leaves of snapshots that are kept put together.
const VIEWS: usize = 256;

/// Chunks of a map by birth: those that the same snapshots share are a group, named by the oldest of these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Births {
    older: Vec<(u32, u64)>,
    /// Younger than all snapshots.
    fresh: u64,
}

/// A group of [`Births`]; `None` = what no snapshot shares.
pub(crate) type Group = Option<u32>;

impl Births {
    pub fn from_record(groups: &[(Epoch, u64)], chunks: u64) -> Births {
        let older: Vec<(u32, u64)> = groups.iter().map(|(epoch, chunks)| (epoch.0, *chunks)).collect();
        let sum: u64 = older.iter().map(|group| group.1).sum();
        Births { older, fresh: chunks.saturating_sub(sum) }
    }

    /// The groups for the volume's record. Of too many, the oldest become one.
    pub fn to_record(&self) -> Vec<(Epoch, u64)> {
        let (oldest, rest) = self.older.split_at(self.older.len().saturating_sub(MAX_BIRTHS - 1));
        let lump = oldest.last().map(|last| (last.0, oldest.iter().map(|group| group.1).sum()));
        lump.into_iter().chain(rest.iter().copied()).map(|(epoch, chunks)| (Epoch(epoch), chunks)).collect()
    }

    /// A chunk goes; what group it was in.
    #[inline]
    pub fn remove(&mut self, birth: Epoch) -> Group {
        if self.older.last().is_none_or(|last| last.0 < birth.0) {
            self.fresh = self.fresh.saturating_sub(1);
            return None;
        }
        let at = self.older.partition_point(|group| group.0 < birth.0);
        let group = self.older[at].0;
        self.older[at].1 -= 1;
        if self.older[at].1 == 0 {
            self.older.remove(at);
        }
        Some(group)
    }

    /// A chunk comes.
    #[inline]
    pub fn add(&mut self, group: Group) {
        self.add_many(group, 1);
    }

    fn add_many(&mut self, group: Group, chunks: u64) {
        match group {
            _ if chunks == 0 => {}
            None => self.fresh += chunks,
            Some(group) => match self.older.binary_search_by_key(&group, |g| g.0) {
                Ok(at) => self.older[at].1 += chunks,
                Err(at) => self.older.insert(at, (group, chunks)),
            },
        }
    }

    /// Chunks of a group.
    pub fn count(&self, group: Group) -> u64 {
        match group {
            None => self.fresh,
            Some(group) => self.older.binary_search_by_key(&group, |g| g.0).map_or(0, |at| self.older[at].1),
        }
    }

    #[cfg(test)]
    fn total(&self) -> u64 {
        self.fresh + self.older.iter().map(|group| group.1).sum::<u64>()
    }

    /// The snapshots are those of `marks` now (ascending).
    fn regroup(&mut self, marks: &[u32]) {
        for (group, chunks) in std::mem::take(&mut self.older) {
            self.add_many(group_of(marks, Epoch(group)), chunks);
        }
    }

    /// A snapshot was taken that shares everything.
    fn snapshot(&mut self, mark: u32) {
        let fresh = std::mem::take(&mut self.fresh);
        self.add_many(Some(mark), fresh);
    }
}

fn group_of(marks: &[u32], birth: Epoch) -> Group {
    marks.get(marks.partition_point(|mark| *mark < birth.0)).copied()
}

/// Who belongs together.
#[derive(Default)]
pub(crate) struct Families {
    /// Members by family, in order.
    members: BTreeMap<u32, Vec<u32>>,
    /// How many records name this one as their base.
    based: BTreeMap<u32, u32>,
}

/// Leaves of snapshots, put together. They change only when late deduplication finds another chunk with the same content.
#[derive(Default)]
pub(crate) struct Views {
    leaves: FastMap<(u32, u64), Option<Rc<MapLeaf>>>,
    order: VecDeque<(u32, u64)>,
}

impl Views {
    /// Lets go of all views of a leaf: what they refer to has changed.
    pub fn forget(&mut self, index: u64, meter: &Meter) {
        self.order.retain(|key| key.1 != index);
        self.leaves.retain(|key, leaf| {
            if key.1 == index && leaf.is_some() {
                meter.bytes.set(meter.bytes.get().saturating_sub(MAP_LEAF_BYTES));
            }
            key.1 != index
        });
    }

    fn put(&mut self, key: (u32, u64), leaf: Option<Rc<MapLeaf>>, meter: &Meter) {
        let bytes = |leaf: &Option<Rc<MapLeaf>>| if leaf.is_some() { MAP_LEAF_BYTES } else { 0 };
        if self.order.len() >= VIEWS
            && let Some(old) = self.order.pop_front()
            && let Some(gone) = self.leaves.remove(&old)
        {
            meter.bytes.set(meter.bytes.get().saturating_sub(bytes(&gone)));
        }
        meter.bytes.set(meter.bytes.get() + bytes(&leaf));
        if self.leaves.insert(key, leaf).is_none() {
            self.order.push_back(key);
        }
    }
}

/// A set of a leaf's slots.
#[derive(Clone, Copy, Default)]
struct Slots([u64; MAP_ENTRIES / 64]);

impl Slots {
    /// The slots below `end`.
    fn below(end: u64) -> Slots {
        Slots(std::array::from_fn(|word| match end.saturating_sub(64 * word as u64) {
            0 => 0,
            bits @ 1..64 => (1 << bits) - 1,
            _ => u64::MAX,
        }))
    }
    fn is_empty(&self) -> bool {
        self.0 == [0; MAP_ENTRIES / 64]
    }
    fn add(&mut self, slot: usize) {
        self.0[slot / 64] |= 1 << (slot % 64);
    }
    fn remove(&mut self, slot: usize) {
        self.0[slot / 64] &= !(1 << (slot % 64));
    }
    fn and(&self, other: &Slots) -> Slots {
        Slots(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }
    fn or(&self, other: &Slots) -> Slots {
        Slots(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }
    fn iter(self) -> impl Iterator<Item = usize> {
        (0..MAP_ENTRIES).filter(move |slot| self.0[slot / 64] >> (slot % 64) & 1 == 1)
    }
}

/// A leaf as a member shows it: what its family has, and what comes from bases.
struct Shown {
    own: MapLeaf,
    inherited: MapLeaf,
}

impl Volume {
    /// 4 KiB blocks that it shows, but for those that a clone has from its snapshot.
    pub fn shown_blocks(&self) -> u64 {
        if self.is_snapshot() { self.record.counters[2] } else { self.chunks + self.special }
    }

    /// Whether it is a snapshot.
    pub fn is_snapshot(&self) -> bool {
        self.record.flags & volume_flags::SNAPSHOT != 0
    }

    /// Whether writes are refused.
    #[inline]
    pub fn is_read_only(&self) -> bool {
        self.record.flags & (volume_flags::READ_ONLY | volume_flags::SNAPSHOT) != 0
    }

    /// Whether blocks below `end` may change now.
    pub fn check_change(&self, end: u64) -> Result<(), Status> {
        if self.is_read_only() {
            return Err(Status::NAMESPACE_WRITE_PROTECTED);
        }
        if end > self.record.blocks.min(self.fence) { Err(Status::LBA_OUT_OF_RANGE) } else { Ok(()) }
    }

    /// The newest birth that it shows.
    fn limit(&self) -> Epoch {
        if self.is_snapshot() { self.record.birth } else { Epoch(u32::MAX) }
    }

    /// An entry leaves its map's counters.
    fn count_out(&mut self, entry: &MapEntry) -> Group {
        match entry.target {
            Target::Chunk(_) => {
                self.chunks = self.chunks.saturating_sub(1);
                return self.births.remove(entry.birth);
            }
            Target::Zero | Target::Pattern(_) => self.special = self.special.saturating_sub(1),
            Target::Unmapped | Target::Uncorrectable => {}
        }
        None
    }

    /// An entry comes to its map's counters.
    fn count_in(&mut self, entry: &MapEntry, group: Group) {
        match entry.target {
            Target::Chunk(_) => {
                self.chunks += 1;
                self.births.add(group);
            }
            Target::Zero | Target::Pattern(_) => self.special += 1,
            Target::Unmapped | Target::Uncorrectable => {}
        }
    }
}

/// What a write takes from a volume and a snapshot shows: leaf, slot, entry, group.
pub(crate) type Kept = (u64, u16, MapEntry, Group);

impl Shard {
    // ---- who belongs together

    fn rank(&self, id: u32) -> u64 {
        self.volumes
            .get(&id)
            .map_or(u64::MAX, |v| if v.is_snapshot() { v.record.birth.0.into() } else { u64::MAX })
    }

    /// A volume has come: it takes its place.
    fn link(&mut self, id: u32) {
        let Some(v) = self.volumes.get(&id) else { return };
        let (family, base) = (v.record.family_id().0, v.record.base);
        let mut members = self.families.members.remove(&family).unwrap_or_default();
        members.push(id);
        members.sort_by_key(|id| self.rank(*id));
        self.families.members.insert(family, members);
        if let Some((base, _)) = base {
            *self.families.based.entry(base.0).or_default() += 1;
        }
    }

    /// A volume goes, or takes another place.
    fn unlink(&mut self, record: &VolumeRecord) {
        let family = record.family_id().0;
        if let Some(members) = self.families.members.get_mut(&family) {
            members.retain(|id| *id != record.id.0);
            if members.is_empty() {
                self.families.members.remove(&family);
            }
        }
        if let Some((base, _)) = record.base
            && let Some(count) = self.families.based.get_mut(&base.0)
        {
            *count -= 1;
            if *count == 0 {
                self.families.based.remove(&base.0);
                if let Some(v) = self.volumes.get(&base.0) {
                    self.refresh(v.record.family_id().0);
                }
            }
        }
    }

    /// Everybody takes their places: after the catalogue was loaded.
    pub fn link_all(&mut self) {
        let ids: Vec<u32> = self.volumes.keys().copied().collect();
        for id in ids {
            self.link(id);
        }
        let families: Vec<u32> = self.families.members.keys().copied().collect();
        for family in families {
            self.refresh(family);
        }
    }

    /// Members of a family, in order.
    fn members(&self, family: VolumeId) -> &[u32] {
        self.families.members.get(&family.0).map_or(&[], Vec::as_slice)
    }

    /// A member and those after it.
    fn row<'a>(&'a self, v: &'a Volume) -> impl Iterator<Item = &'a Volume> {
        let members = self.members(v.record.family_id());
        let at = members.iter().rposition(|id| *id == v.record.id.0).unwrap_or(members.len());
        members[at..].iter().filter_map(|id| self.volumes.get(id))
    }

    /// How many name this one as their base.
    pub fn based(&self, id: VolumeId) -> u32 {
        self.families.based.get(&id.0).copied().unwrap_or(0)
    }

    /// Whether what others lose may have to go to this one.
    fn is_mark(&self, v: &Volume) -> bool {
        v.is_snapshot() && (!v.is_deleting() || self.based(v.record.id) > 0)
    }

    /// The snapshot before a member that gets what the member loses.
    fn taker(&self, v: &Volume) -> Option<&Volume> {
        let members = self.members(v.record.family_id());
        let at = members.iter().rposition(|id| *id == v.record.id.0)?;
        members[..at].iter().rev().filter_map(|id| self.volumes.get(id)).find(|v| self.is_mark(v))
    }

    /// Births of the snapshots of a family.
    fn marks(&self, family: VolumeId) -> Vec<u32> {
        let volumes = self.members(family).iter().filter_map(|id| self.volumes.get(id));
        volumes.filter(|v| self.is_mark(v)).map(|v| v.record.birth.0).collect()
    }

    /// The snapshots of a family are other ones than before.
    fn refresh(&mut self, family: u32) {
        let marks = self.marks(VolumeId(family));
        for id in self.members(VolumeId(family)).to_vec() {
            let keeper = self.volumes.get(&id).and_then(|v| self.taker(v));
            let keeper = keeper.map(|v| (v.record.id, v.record.birth));
            if let Some(v) = self.volumes.get_mut(&id) {
                v.births.regroup(&marks);
                if !v.is_snapshot() {
                    (v.keeper, v.shared) = keeper.map_or((None, Epoch(0)), |(id, birth)| (Some(id), birth));
                }
            }
        }
    }

    // ---- the catalogue's part of the fold

    /// A volume or clone is made.
    pub fn add_volume(&mut self, record: VolumeRecord) -> Result<(), ApplyError> {
        self.domain(record.domain)?;
        if let Some((base, _)) = record.base {
            self.volume(base)?;
        }
        self.pool.next_volume = VolumeId(self.pool.next_volume.0.max(record.id.0 + 1));
        let id = record.id.0;
        self.volumes.insert(id, Volume::open(record, &self.meter));
        self.link(id);
        Ok(())
    }

    /// A snapshot is made. Takes the same time whatever the volume has.
    pub fn add_snapshot(
        &mut self,
        volume: VolumeId,
        epoch: Epoch,
        record: VolumeRecord,
    ) -> Result<(), ApplyError> {
        let family = self.volume(volume)?.record.family_id();
        let fits = record.family_id() == family && record.birth == self.pool.epoch && epoch > self.pool.epoch;
        if !fits || record.flags & volume_flags::SNAPSHOT == 0 {
            return Err(ApplyError::Record(format!("snapshot {} does not fit volume {volume}", record.id)));
        }
        let (id, birth) = (record.id, record.birth);
        self.pool.epoch = epoch;
        self.add_volume(record)?;
        if let Some(v) = self.volumes.get_mut(&volume.0) {
            (v.keeper, v.shared) = (Some(id), birth);
            v.births.snapshot(birth.0);
        }
        Ok(())
    }

    /// A volume's record becomes another one, but for what the fold keeps.
    pub fn update_volume(&mut self, record: VolumeRecord) -> Result<(), ApplyError> {
        let old = self.volume(record.id)?.record.clone();
        let (id, family) = (record.id.0, record.family_id());
        self.pool.next_volume = VolumeId(self.pool.next_volume.0.max(family.0 + 1));
        self.unlink(&old);
        if let Some(v) = self.volumes.get_mut(&id) {
            v.record = record;
        }
        self.link(id);
        self.refresh(old.family_id().0);
        self.refresh(family.0);
        Ok(())
    }

    /// A volume is to be deleted.
    pub fn delete_volume(&mut self, id: VolumeId) -> Result<(), ApplyError> {
        let v = self.volumes.get_mut(&id.0).ok_or(ApplyError::NoVolume(id))?;
        v.record.flags |= volume_flags::DELETING;
        let family = v.record.family_id().0;
        self.refresh(family);
        Ok(())
    }

    /// A deleted volume has nothing any more.
    pub fn remove_volume(&mut self, id: VolumeId) -> Result<(), ApplyError> {
        let gone = self.volumes.remove(&id.0).ok_or(ApplyError::NoVolume(id))?;
        self.unlink(&gone.record);
        self.refresh(gone.record.family_id().0);
        self.gone.insert(id.0, gone);
        Ok(())
    }

    // ---- what a member shows

    /// What a member shows in a leaf, looking into bases `depth` deep. `None`: something is missing.
    fn show(
        &self,
        start: &Volume,
        index: u64,
        depth: usize,
        needs: &mut Needs,
    ) -> Result<Option<Shown>, ApplyError> {
        let first = index * MAP_ENTRIES as u64;
        let mut shown = Shown { own: MapLeaf::default(), inherited: MapLeaf::default() };
        let mut open = Slots::below(start.record.blocks.saturating_sub(first));
        let mut at = start;
        for generation in 0.. {
            let limit = at.limit();
            let mut nothing = Slots::default();
            let mut complete = true;
            for member in self.row(at) {
                if open.is_empty() {
                    break;
                }
                let leaf = match member.tree.find(index) {
                    Found::Here(leaf) => leaf,
                    Found::Absent => continue,
                    Found::Away(_) => {
                        complete = Shard::need(&member.tree, member.record.id.0, index, needs) && complete;
                        continue;
                    }
                };
                for slot in open.iter() {
                    let entry = leaf.get(slot);
                    if entry.is_none() {
                        continue;
                    }
                    open.remove(slot);
                    match (entry.birth <= limit, generation) {
                        (false, _) => nothing.add(slot),
                        (true, 0) => shown.own.set(slot, entry),
                        (true, _) => shown.inherited.set(slot, entry),
                    }
                }
            }
            if !complete {
                return Ok(None);
            }
            let Some((base, blocks)) = at.record.base.filter(|_| generation < depth) else { break };
            open = open.or(&nothing).and(&Slots::below(blocks.saturating_sub(first)));
            if open.is_empty() {
                break;
            }
            at = self.volume(base)?;
        }
        Ok(Some(shown))
    }

    /// A leaf of a volume that does not change (a snapshot, or a base); the inner `None` is one without entries. The outer
    /// one: something is missing.
    #[allow(clippy::option_option)]
    pub fn view(
        &self,
        id: VolumeId,
        index: u64,
        needs: &mut Needs,
    ) -> Result<Option<Option<Rc<MapLeaf>>>, ApplyError> {
        let key = (id.0, index);
        if let Some(leaf) = self.views.borrow().leaves.get(&key) {
            return Ok(Some(leaf.clone()));
        }
        let Some(shown) = self.show(self.volume(id)?, index, usize::MAX, needs)? else { return Ok(None) };
        let mut leaf = shown.own;
        for (slot, entry) in shown.inherited.iter().enumerate().filter(|(_, entry)| !entry.is_none()) {
            leaf.set(slot, entry);
        }
        let leaf = (!leaf.is_empty()).then(|| Rc::new(leaf));
        self.views.borrow_mut().put(key, leaf.clone(), &self.meter);
        Ok(Some(leaf))
    }

    /// Whether a leaf of a base shows nothing for sure.
    pub fn shows_nothing(&self, base: VolumeId, index: u64) -> bool {
        let mut at = self.volumes.get(&base.0);
        while let Some(v) = at {
            if !self.row(v).all(|member| matches!(member.tree.find(index), Found::Absent)) {
                return false;
            }
            at = v.record.base.and_then(|(base, _)| self.volumes.get(&base.0));
        }
        true
    }

    // ---- changes of several maps

    /// A write has taken these from a volume; its newest snapshot shows them.
    pub fn keep(&mut self, keeper: VolumeId, kept: &[Kept]) -> Result<(), ApplyError> {
        let s = self.volumes.get_mut(&keeper.0).ok_or(ApplyError::NoVolume(keeper))?;
        for (index, slot, entry, group) in kept {
            put_new(s, *index, (*slot).into(), entry, *group)?;
        }
        Ok(())
    }

    /// What is missing before [`Shard::map_merge`].
    pub fn needs_of_merge(&self, id: VolumeId, index: u64, needs: &mut Needs) -> Result<(), ApplyError> {
        let v = self.volume(id)?;
        let leaf = match v.tree.find(index) {
            Found::Here(leaf) => leaf,
            Found::Absent => return Ok(()),
            Found::Away(_) => {
                Shard::need(&v.tree, id.0, index, needs);
                return Ok(());
            }
        };
        let taker = self.taker(v);
        if let Some(taker) = taker
            && !Shard::need(&taker.tree, taker.record.id.0, index, needs)
        {
            return Ok(());
        }
        let domain = self.domain(v.record.domain)?;
        let held = taker.and_then(|taker| taker.tree.peek(index));
        let mut last = None;
        for (slot, entry) in leaf.iter().enumerate() {
            let Some(addr) = entry.chunk() else { continue };
            if !moves(taker, held, slot, &entry) && last != Some(addr.container()) {
                last = Some(addr.container());
                Shard::need(&domain.containers, domain.record.id.0, addr.container().get(), needs);
            }
        }
        Ok(())
    }

    /// A leaf of a deleted member is given up: what the snapshot before it shows goes there.
    pub fn map_merge(&mut self, id: VolumeId, index: u64, now: Sequence) -> Result<(), ApplyError> {
        let v = self.volume(id)?;
        let Found::Here(leaf) = v.tree.find(index) else { return Ok(()) };
        let leaf = leaf.clone();
        let taker = self.taker(v);
        let held = taker.and_then(|taker| taker.tree.peek(index));
        let stays: Vec<bool> =
            leaf.iter().enumerate().map(|(slot, entry)| moves(taker, held, slot, &entry)).collect();
        let taker = taker.map(|taker| taker.record.id);
        let domain = v.record.domain;
        let has_base = v.record.base.is_some();
        let mut dropped: Vec<ChunkAddr> = Vec::new();
        let mut kept: Vec<Kept> = Vec::new();
        let v = self.volumes.get_mut(&id.0).ok_or(ApplyError::NoVolume(id))?;
        v.tree.clear(index);
        for (slot, entry) in leaf.iter().enumerate().filter(|(_, entry)| !entry.is_none()) {
            let group = v.count_out(&entry);
            if !stays[slot] {
                dropped.extend(entry.chunk());
            } else if has_base || entry.target != Target::Unmapped {
                kept.push((index, slot as u16, entry, group));
            }
        }
        if let Some(taker) = taker {
            self.keep(taker, &kept)?;
        }
        let Shard { domains, segments, index: hooks, emptied, .. } = self;
        let d = domains.get_mut(&domain.0).ok_or(ApplyError::NoDomain(domain))?;
        d.mapped = d.mapped.saturating_sub(dropped.len() as u64);
        for addr in dropped {
            drop_reference(d, segments, hooks, emptied, addr, now)?;
        }
        Ok(())
    }

    /// The entries that [`Shard::map_own`] copies from a leaf. `None`: something is missing.
    fn own_entries(
        &self,
        v: &Volume,
        index: u64,
        from: OwnFrom,
        needs: &mut Needs,
    ) -> Result<Option<Vec<(usize, MapEntry)>>, ApplyError> {
        let (leaf, holes) = match from {
            OwnFrom::Snapshots => {
                let keeper = v.keeper.and_then(|id| self.volumes.get(&id.0));
                let Some(keeper) = keeper else { return Ok(Some(Vec::new())) };
                let there = Shard::need(&v.tree, v.record.id.0, index, needs);
                if !Shard::need(&keeper.tree, keeper.record.id.0, index, needs) || !there {
                    return Ok(None);
                }
                let Some(leaf) = v.tree.peek(index) else { return Ok(Some(Vec::new())) };
                let shared = leaf.iter().enumerate().filter(|(_, e)| !e.is_none() && e.birth <= v.shared);
                return Ok(Some(shared.collect()));
            }
            OwnFrom::Base => {
                let above = v.record.base.map(|(base, _)| self.volume(base)).transpose()?;
                (self.show(v, index, 1, needs)?, above.is_some_and(|base| base.record.base.is_some()))
            }
            OwnFrom::Bases => (self.show(v, index, usize::MAX, needs)?, false),
        };
        let wanted = |e: &MapEntry| !e.is_none() && (holes || e.target != Target::Unmapped);
        Ok(leaf.map(|shown| shown.inherited.iter().enumerate().filter(|(_, e)| wanted(e)).collect()))
    }

    /// What is missing before [`Shard::map_own`].
    pub fn needs_of_own(
        &self,
        id: VolumeId,
        index: u64,
        from: OwnFrom,
        needs: &mut Needs,
    ) -> Result<(), ApplyError> {
        let v = self.volume(id)?;
        if let Some(entries) = self.own_entries(v, index, from, needs)? {
            let entries: Vec<MapEntry> = entries.iter().map(|(_, entry)| *entry).collect();
            self.needs_of_set(v.record.domain, &entries, needs)?;
        }
        Ok(())
    }

    /// A leaf of a volume gets entries of its own for what it shares with snapshots or has from a base.
    pub fn map_own(
        &mut self,
        id: VolumeId,
        index: u64,
        from: OwnFrom,
        now: Sequence,
    ) -> Result<(), ApplyError> {
        let v = self.volume(id)?;
        let domain = v.record.domain;
        let entries = self.own_entries(v, index, from, &mut Needs::new())?;
        let entries = entries.ok_or(ApplyError::Record("a leaf that is not there".into()))?;
        let keeper = v.keeper;
        let (marks, epoch) = (self.marks(v.record.family_id()), self.pool.epoch);
        let mut kept: Vec<Kept> = Vec::new();
        let v = self.volumes.get_mut(&id.0).ok_or(ApplyError::NoVolume(id))?;
        for (slot, entry) in &entries {
            if from == OwnFrom::Snapshots {
                let group = v.count_out(entry);
                kept.push((index, *slot as u16, *entry, group));
                let own = MapEntry { birth: epoch, ..*entry };
                v.tree.get_mut(index).set(*slot, own);
                v.count_in(&own, None);
            } else {
                put_new(v, index, *slot, entry, group_of(&marks, entry.birth))?;
            }
        }
        if let Some(keeper) = keeper.filter(|_| from == OwnFrom::Snapshots) {
            self.keep(keeper, &kept)?;
        }
        let d = self.domains.get_mut(&domain.0).ok_or(ApplyError::NoDomain(domain))?;
        for addr in entries.iter().filter_map(|(_, entry)| entry.chunk()) {
            d.mapped += 1;
            take_reference(d, &mut self.segments, addr, now)?;
        }
        Ok(())
    }

    // ---- relations, as people see them

    /// The snapshot that this one goes on from: the one before it in its family, or its base.
    pub fn parent(&self, v: &Volume) -> Option<&Volume> {
        let members = self.members(v.record.family_id());
        let at = members.iter().rposition(|id| *id == v.record.id.0)?;
        let before = members[..at].iter().rev().filter_map(|id| self.volumes.get(id));
        let base = v.record.base.and_then(|(base, _)| self.volumes.get(&base.0));
        before.chain(base).find(|v| !v.is_deleting())
    }

    /// Who goes on from this one.
    pub fn children<'a>(&'a self, v: &'a Volume) -> Vec<&'a Volume> {
        let id = v.record.id;
        let next = self.row(v).skip(1).find(|v| !v.is_deleting());
        let based = self.volumes.values().filter(move |c| {
            self.based(id) > 0
                && !c.is_deleting()
                && c.record.base.is_some_and(|(base, _)| base == id)
                && self.parent(c).is_some_and(|parent| parent.record.id == id)
        });
        next.into_iter().chain(based).collect()
    }

    /// The member before one, whatever becomes of it.
    pub fn before(&self, v: &Volume) -> Option<&Volume> {
        let members = self.members(v.record.family_id());
        let at = members.iter().rposition(|id| *id == v.record.id.0)?;
        members[..at].last().and_then(|id| self.volumes.get(id))
    }

    /// What is wrong with an entry of a member's map (`before`: the same slot of the member before it).
    pub fn misplaced(&self, v: &Volume, entry: &MapEntry, before: &MapEntry) -> Option<String> {
        if entry.birth > v.limit() {
            return Some(format!("was born in {}, after the snapshot in {}", entry.birth, v.limit()));
        }
        // What a repair has given up is as old as can be.
        let given_up = entry.target == Target::Uncorrectable;
        let earlier = self.before(v).filter(|_| !before.is_none() && !entry.is_none() && !given_up);
        let earlier = earlier.map(|m| m.record.birth).filter(|taken| entry.birth <= *taken);
        earlier.map(|taken| format!("was born in {}, but the snapshot of {taken} has another", entry.birth))
    }

    fn births_of(&self, v: &Volume, found: &BTreeMap<u32, u64>) -> Births {
        let marks = self.marks(v.record.family_id());
        let mut births = Births::default();
        for (birth, chunks) in found {
            births.add_many(group_of(&marks, Epoch(*birth)), *chunks);
        }
        births
    }

    /// Corrects a map's births; whether that changed them.
    pub fn recount_births(&mut self, id: u32, found: &BTreeMap<u32, u64>) -> bool {
        let births = self.volumes.get(&id).map(|v| self.births_of(v, found));
        let (Some(births), Some(v)) = (births, self.volumes.get_mut(&id)) else { return false };
        let changed = births != v.births;
        v.births = births;
        changed
    }

    /// What is wrong with a map's births; `found` = chunks by birth.
    pub fn miscounted(&self, v: &Volume, found: &BTreeMap<u32, u64>) -> Option<String> {
        let births = self.births_of(v, found);
        let lumped = v.births.older.len().max(births.older.len()) >= MAX_BIRTHS;
        (births != v.births && !lumped).then(|| format!("counts {:?}, its map has {births:?}", v.births))
    }

    /// Chunks of its map that nobody else shows.
    pub fn exclusive(&self, v: &Volume) -> u64 {
        if self.based(v.record.id) > 0 {
            return 0;
        }
        v.births.count(v.is_snapshot().then_some(v.record.birth.0))
    }
}

/// Whether an entry goes to `taker` (with leaf `held`) when its member goes.
fn moves(taker: Option<&Volume>, held: Option<&MapLeaf>, slot: usize, entry: &MapEntry) -> bool {
    taker
        .is_some_and(|taker| entry.birth <= taker.limit() && held.is_none_or(|leaf| leaf.get(slot).is_none()))
}

/// Sets an entry where there was none. Its reference comes with it.
fn put_new(
    v: &mut Volume,
    index: u64,
    slot: usize,
    entry: &MapEntry,
    group: Group,
) -> Result<(), ApplyError> {
    let leaf = v.tree.get_mut(index);
    if !leaf.get(slot).is_none() {
        return Err(ApplyError::Record(format!(
            "block {} of volume {} is there already",
            index * MAP_ENTRIES as u64 + slot as u64,
            v.record.id
        )));
    }
    leaf.set(slot, *entry);
    v.count_in(entry, group);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn births_are_grouped_by_the_snapshots_that_share_them() {
        let mut births = Births::from_record(&[], 5);
        assert_eq!(births.remove(Epoch(1)), None);
        births.snapshot(3);
        assert_eq!((births.count(Some(3)), births.count(None)), (4, 0));
        births.add(None);
        births.add(None);
        births.snapshot(7);
        births.add(None);
        // Born in 2, 5 and 9: of the first snapshot, the second, of none.
        assert_eq!(births.remove(Epoch(2)), Some(3));
        assert_eq!(births.remove(Epoch(5)), Some(7));
        assert_eq!(births.remove(Epoch(9)), None);
        assert_eq!(births.total(), 4);
        assert_eq!(Births::from_record(&births.to_record(), 4), births);
        // The first snapshot goes: what it had is the second's alone.
        births.regroup(&[7]);
        assert_eq!((births.count(Some(3)), births.count(Some(7))), (0, 4));
        births.regroup(&[]);
        assert_eq!(births.count(None), 4);
    }

    #[test]
    fn a_record_holds_the_births_of_many_snapshots() {
        let mut births = Births::default();
        for mark in 1..=1000 {
            births.add(None);
            births.snapshot(mark);
        }
        let record = births.to_record();
        assert_eq!(record.len(), MAX_BIRTHS);
        assert_eq!(record[0], (Epoch(601), 601));
        let mut again = Births::from_record(&record, 1000);
        for mark in 1..=1000 {
            again.remove(Epoch(mark));
        }
        assert_eq!(again.total(), 0);
    }

    #[test]
    fn sets_of_slots() {
        let slots = |end| Slots::below(end).iter().collect::<Vec<_>>();
        assert_eq!(slots(0), Vec::<usize>::new());
        assert_eq!(slots(65), (0..65).collect::<Vec<_>>());
        assert_eq!(slots(1 << 40), (0..512).collect::<Vec<_>>());
        let mut some = Slots::below(3);
        some.remove(1);
        some.add(511);
        assert_eq!(some.iter().collect::<Vec<_>>(), [0, 2, 511]);
    }
}
