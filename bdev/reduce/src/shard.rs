//! The state of a pool: domains, volumes, their trees, the segment table, and the fold of journal records over them.
//!
//! Owns everything that a checkpoint makes durable. Changed by records only ([`Shard::apply`] and the typed functions
//! that it dispatches to), at run time and on recovery alike, so recovery cannot differ from what happened.
//!
//! Invariants:
//! - before a record is applied, every leaf that it touches is in RAM or absent ([`Shard::needs_of_fill`] and
//!   [`Shard::needs_of_set`] say what is missing);
//! - a slot has as many references as map entries point to it; of a fragment the share of the slots that have references
//!   counts as live bytes of its segment; it leaves its container when the last one loses them;
//! - a fragment that was never referenced (its writer died in between) stays in its container, dead, and counts nowhere.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use cryptfold_reduce_format::container;
use cryptfold_reduce_format::container::{ContainerError, FragmentEntry};
use cryptfold_reduce_format::entry::{FragmentRaw, MapRun, Record, Retarget};
use cryptfold_reduce_format::fingerprint::{Fingerprint, HashId, Hasher};
use cryptfold_reduce_format::ids::{
    ChunkAddr, ContainerId, DomainId, Epoch, Generation, Lba, SLOTS, SegmentAddr, Sequence, ShardIx, VolumeId,
};
use cryptfold_reduce_format::journal::{JournalEpoch, JournalKey, Scope};
use cryptfold_reduce_format::keys::{DataKey, DomainWraps};
use cryptfold_reduce_format::map::{MAP_ENTRIES, MapEntry, MapLeaf, Target};
use cryptfold_reduce_format::node;
use cryptfold_reduce_format::record::{
    DomainRecord, DomainShard, PoolRecord, TreeRoot, VolumeRecord, volume_flags,
};
use cryptfold_reduce_format::segment::Class;
use smallvec::SmallVec;
use thiserror::Error;
use uuid::Uuid;

use crate::family::{Births, Families, Group, Kept, Views};
use crate::generation::{Keys, SharedHasher};
use crate::index::{Index, Key};
use crate::recent::Recent;
use crate::segments::Segments;
use crate::tree::{Found, Leaf, Meter, Missing, Tree};

/// A duplicate of a chunk in such a slot may go on in the next container.
const NEAR_END: u16 = SLOTS as u16 - 64;
/// A slot with more references than this is not referenced again: another copy is stored.
pub(crate) const MAX_REFS: u32 = u32::MAX - (1 << 20);

/// Look-ups in the index that wait for memory together.
const PREFETCHED: usize = 16;

/// A record does not fit the state: the journal and the checkpoint do not belong together, or a bug.
#[derive(Debug, Error)]
pub(crate) enum ApplyError {
    #[error("no volume {0}")]
    NoVolume(VolumeId),
    #[error("no domain {0}")]
    NoDomain(DomainId),
    #[error("container {container} of domain {domain}: {error}")]
    Container { domain: DomainId, container: ContainerId, error: ContainerError },
    #[error("segment {0:?} does not fit its record")]
    Segment(SegmentAddr),
    #[error("block {lba} of volume {volume} is beyond its end")]
    Beyond { volume: VolumeId, lba: u64 },
    #[error("record: {0}")]
    Record(String),
    #[error("{0} is not supported by this version")]
    Unsupported(&'static str),
}

/// What has to be brought to RAM before something can go on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Need {
    /// A node of a tree.
    Node { tree: node::Tree, owner: u32, missing: Missing },
    /// The handle of a segment: its header has to be read.
    Segment(u32),
}

/// Needs found in one look; none, unless the cache is cold.
pub(crate) type Needs = Vec<Need>;

/// First container of a domain.
pub(crate) const FIRST_CONTAINER: ContainerId = ContainerId::new(1).expect("1 is in range");

const EMPTY_TABLES: DomainShard = DomainShard {
    shard: ShardIx(0),
    containers: TreeRoot { ptr: None, level: 0 },
    fingerprints: TreeRoot { ptr: None, level: 0 },
    next_container: FIRST_CONTAINER,
};

/// A deduplication domain.
pub(crate) struct Domain {
    pub record: DomainRecord,
    /// Plain data keys by generation.
    pub data: BTreeMap<Generation, DataKey>,
    /// Generation that new data is sealed with.
    pub generation: Generation,
    pub hasher: Arc<Hasher>,
    /// The same for other cores.
    pub shared: Arc<SharedHasher>,
    /// By generation, as `data`.
    pub journals: BTreeMap<Generation, JournalKey>,
    pub containers: Tree<container::Container>,
    pub fingerprints: Tree<container::Fingerprints>,
    /// Next container that no record has named.
    pub next_container: u64,
    /// Next container to hand out; ahead of `next_container`.
    pub draw_container: u64,
    /// Map entries that are chunks.
    pub mapped: u64,
    /// Slots with references.
    pub unique: u64,
    /// Bytes of live fragments.
    pub stored_bytes: u64,
    /// Containers met lately; used while the index is sampled.
    pub recent: RefCell<Recent>,
}

/// A volume.
pub(crate) struct Volume {
    pub record: VolumeRecord,
    pub tree: Tree<MapLeaf>,
    /// Blocks that are chunks.
    pub chunks: u64,
    /// Blocks that are zeros or patterns.
    pub special: u64,
    pub written_bytes: u64,
    /// Its chunks by birth.
    pub births: Births,
    /// A volume's newest snapshot, which gets what the volume loses; and its birth (0 = no snapshot).
    pub keeper: Option<VolumeId>,
    pub shared: Epoch,
    /// Nothing is written from this block on, while the volume shrinks.
    pub fence: u64,
}

/// See the module's head.
pub(crate) struct Shard {
    pub pool: PoolRecord,
    pub domains: BTreeMap<u32, Domain>,
    pub volumes: BTreeMap<u32, Volume>,
    /// Volumes that are gone, until a checkpoint has given back the nodes of their (empty) maps.
    pub gone: BTreeMap<u32, Volume>,
    pub families: Families,
    pub views: RefCell<Views>,
    pub segments: Segments,
    pub index: Index,
    pub meter: Meter,
    /// What makes fingerprints.
    pub hash: HashId,
    /// Containers that lost their last reference, to be dropped by a record.
    pub emptied: Vec<(DomainId, ContainerId)>,
    /// Fragments (by their first chunk) that were found damaged: nothing new refers to them, so that a later write of the
    /// same data stores it again.
    pub damaged: HashSet<(DomainId, ChunkAddr)>,
    /// Of these, those whose data look-ups have asked for: it is being written again.
    pub wanted: RefCell<BTreeSet<(DomainId, ChunkAddr)>>,
}

impl Domain {
    /// Opens a domain's keys and makes its (empty) caches.
    pub fn open(
        record: DomainRecord,
        wraps: &DomainWraps,
        hash: HashId,
        meter: &Meter,
    ) -> Result<Domain, String> {
        let Keys { data, generation, hasher } = Keys::open(&record, wraps, hash)?;
        // One shard: a container's number is its leaf.
        let tables = match record.shards[..] {
            [] => EMPTY_TABLES,
            [tables] if tables.shard == ShardIx(0) => tables,
            _ => return Err(format!("domain {} belongs to several shards", record.name)),
        };
        Ok(Domain {
            data,
            generation,
            shared: SharedHasher::new(generation, hasher.clone()),
            hasher,
            journals: BTreeMap::new(),
            containers: Tree::new(tables.containers, meter.clone()),
            fingerprints: Tree::new(tables.fingerprints, meter.clone()),
            next_container: tables.next_container.get(),
            draw_container: tables.next_container.get(),
            mapped: record.counters[0] / 4096,
            unique: record.counters[1] / 4096,
            stored_bytes: record.counters[2],
            recent: RefCell::default(),
            record,
        })
    }

    /// The scope of this domain's records.
    pub fn scope(&self) -> Scope {
        Scope::Domain { domain: self.record.id, generation: self.generation }
    }

    /// Derives the keys of this domain's journal groups in `epoch`.
    pub fn derive_journal(&mut self, pool: Uuid, epoch: JournalEpoch) {
        let derive = |key: &DataKey| JournalKey::derive(&key.journal_root(pool), epoch);
        self.journals = self.data.iter().map(|(generation, key)| (*generation, derive(key))).collect();
    }

    /// The record as a checkpoint writes it; roots are set by the checkpoint.
    pub fn to_record(&self) -> DomainRecord {
        let mut record = self.record.clone();
        record.shards = vec![DomainShard {
            shard: ShardIx(0),
            containers: self.containers.root(),
            fingerprints: self.fingerprints.root(),
            next_container: ContainerId::new(self.next_container).unwrap_or(FIRST_CONTAINER),
        }];
        record.counters = [self.mapped * 4096, self.unique * 4096, self.stored_bytes];
        record
    }

    fn error(&self, container: ContainerId) -> impl FnOnce(ContainerError) -> ApplyError + use<> {
        let domain = self.record.id;
        move |error| ApplyError::Container { domain, container, error }
    }
}

impl Volume {
    /// A volume with an empty cache.
    pub fn open(record: VolumeRecord, meter: &Meter) -> Volume {
        let chunks = record.counters[0].saturating_sub(record.special);
        Volume {
            tree: Tree::new(record.map, meter.clone()),
            chunks,
            special: record.special,
            written_bytes: record.counters[1],
            births: Births::from_record(&record.births, chunks),
            keeper: None,
            shared: Epoch(0),
            fence: u64::MAX,
            record,
        }
    }

    /// The record as a checkpoint writes it; the root is set by the checkpoint.
    pub fn to_record(&self) -> VolumeRecord {
        let mut record = self.record.clone();
        record.map = self.tree.root();
        record.counters = [self.chunks + self.special, self.written_bytes, record.counters[2]];
        record.special = self.special;
        record.births = self.births.to_record();
        record
    }

    /// Whether it is being deleted.
    pub fn is_deleting(&self) -> bool {
        self.record.flags & volume_flags::DELETING != 0
    }
}

/// Leaf and entry of a block.
#[inline]
pub(crate) fn leaf_of(lba: u64) -> (u64, usize) {
    (lba / MAP_ENTRIES as u64, (lba % MAP_ENTRIES as u64) as usize)
}

impl Shard {
    pub fn volume(&self, id: VolumeId) -> Result<&Volume, ApplyError> {
        self.volumes.get(&id.0).ok_or(ApplyError::NoVolume(id))
    }

    pub fn domain(&self, id: DomainId) -> Result<&Domain, ApplyError> {
        self.domains.get(&id.0).ok_or(ApplyError::NoDomain(id))
    }

    // ---- what has to be in RAM

    /// Whether a leaf is in RAM or absent; if not, adds what is missing.
    pub fn need<L: Leaf>(tree: &Tree<L>, owner: u32, index: u64, needs: &mut Needs) -> bool {
        match tree.locate(index) {
            None => true,
            Some(missing) => {
                let new = Need::Node { tree: L::TREE, owner, missing };
                let same = |need: &Need| match need {
                    Need::Node { tree, owner: o, missing: m } => {
                        *tree == L::TREE
                            && *o == owner
                            && (m.level, m.index) == (missing.level, missing.index)
                    }
                    Need::Segment(_) => false,
                };
                if needs.len() < 64 && !needs.iter().any(same) {
                    needs.push(new);
                }
                false
            }
        }
    }

    /// Adds what is missing before blocks `lba .. lba + count` of a volume can be changed to anything.
    pub fn needs_of_fill(
        &self,
        volume: VolumeId,
        lba: u64,
        count: u64,
        needs: &mut Needs,
    ) -> Result<(), ApplyError> {
        let v = self.volume(volume)?;
        let domain = self.domain(v.record.domain)?;
        let mut at = lba;
        let mut last = None;
        while at < lba + count {
            let (index, first) = leaf_of(at);
            let here = ((MAP_ENTRIES - first) as u64).min(lba + count - at);
            match v.tree.find(index) {
                Found::Here(leaf) => {
                    let mut kept = false;
                    for entry in first..first + here as usize {
                        let entry = leaf.get(entry);
                        if v.keeps(&entry) {
                            kept = true;
                            continue;
                        }
                        let Some(addr) = entry.chunk() else { continue };
                        if last != Some(addr.container()) {
                            last = Some(addr.container());
                            let number = addr.container().get();
                            Shard::need(&domain.containers, domain.record.id.0, number, needs);
                        }
                    }
                    if let Some(keeper) = v.keeper.filter(|_| kept) {
                        Shard::need(&self.volume(keeper)?.tree, keeper.0, index, needs);
                    }
                }
                Found::Absent => {}
                Found::Away(_) => {
                    Shard::need(&v.tree, volume.0, index, needs);
                }
            }
            at += here;
        }
        Ok(())
    }

    /// Adds what is missing before the chunks among `entries` can be referenced.
    pub fn needs_of_set(
        &self,
        domain: DomainId,
        entries: &[MapEntry],
        needs: &mut Needs,
    ) -> Result<(), ApplyError> {
        let domain = self.domain(domain)?;
        let mut last = None;
        for addr in entries.iter().filter_map(MapEntry::chunk) {
            if last != Some(addr.container()) {
                last = Some(addr.container());
                Shard::need(&domain.containers, domain.record.id.0, addr.container().get(), needs);
            }
        }
        Ok(())
    }

    /// Looks `fingerprints` up. What is found is really there, with references; `None` where nothing is, or not in RAM (then
    /// `needs` says what to load before asking again).
    pub fn lookup(
        &self,
        domain: DomainId,
        fingerprints: &[Fingerprint],
        found: &mut Vec<Option<ChunkAddr>>,
        needs: &mut Needs,
    ) -> Result<(), ApplyError> {
        let d = self.domain(domain)?;
        let bits = self.index.hook_bits();
        found.clear();
        let mut next: Option<ChunkAddr> = None;
        for (nth, fingerprint) in fingerprints.iter().enumerate() {
            // New data is looked for in a table that no cache holds.
            if next.is_none() && nth.is_multiple_of(PREFETCHED) {
                let ahead = &fingerprints[nth..(nth + PREFETCHED).min(fingerprints.len())];
                ahead.iter().for_each(|fingerprint| self.index.prefetch(Key::new(domain, fingerprint)));
            }
            // Duplicates mostly come in the order in which the originals came.
            if let Some(addr) = next.filter(|_| self.damaged.is_empty())
                && d.fingerprints
                    .peek(addr.container().get())
                    .is_some_and(|leaf| leaf.slots.get(usize::from(addr.slot())) == Some(fingerprint))
                && d.containers
                    .peek(addr.container().get())
                    .is_some_and(|c| (1..MAX_REFS).contains(&c.refs(addr.slot())))
            {
                found.push(Some(addr));
                next = addr.plus(1);
                continue;
            }
            let key = Key::new(domain, fingerprint);
            let mut hit = None;
            if key.is_hook(bits) {
                for addr in self.index.candidates(key) {
                    if self.is_chunk(d, addr, fingerprint, needs) {
                        hit = Some(addr);
                    }
                }
            }
            found.push(hit);
            next = hit.and_then(|addr| addr.plus(1));
        }
        if bits > 0 {
            self.lookup_near(d, fingerprints, found, needs);
        }
        Ok(())
    }

    /// Whether the chunk at `addr` is in order and has this fingerprint.
    fn is_chunk(&self, d: &Domain, addr: ChunkAddr, fingerprint: &Fingerprint, needs: &mut Needs) -> bool {
        let (domain, number) = (d.record.id, addr.container().get());
        let leaf = match d.fingerprints.find(number) {
            Found::Here(leaf) => leaf,
            Found::Absent => return false,
            Found::Away(_) => {
                Shard::need(&d.fingerprints, domain.0, number, needs);
                return false;
            }
        };
        if leaf.generation != d.generation || leaf.slots.get(usize::from(addr.slot())) != Some(fingerprint) {
            return false;
        }
        match d.containers.find(number) {
            Found::Here(c) if self.is_damaged(domain, c, addr) => false,
            Found::Here(c) => (1..MAX_REFS).contains(&c.refs(addr.slot())),
            Found::Absent => false,
            Found::Away(_) => {
                Shard::need(&d.containers, domain.0, number, needs);
                false
            }
        }
    }

    /// Looks for what the sampled index does not know in the containers that this write and those before it have met.
    fn lookup_near(
        &self,
        d: &Domain,
        fingerprints: &[Fingerprint],
        found: &mut [Option<ChunkAddr>],
        needs: &mut Needs,
    ) {
        let mut recent = d.recent.borrow_mut();
        // Twice: what the first round finds may lead into the next container.
        for _ in 0..2 {
            let mut last = 0;
            for addr in found.iter().flatten() {
                let number = addr.container().get();
                if number != last {
                    last = number;
                    Shard::meet(d, &mut recent, number, needs);
                }
                if addr.slot() >= NEAR_END {
                    Shard::meet(d, &mut recent, number + 1, needs);
                }
            }
            let mut more = false;
            for (found, fingerprint) in found.iter_mut().zip(fingerprints) {
                if found.is_none()
                    && let Some(addr) = recent.find(fingerprint)
                    && self.is_chunk(d, addr, fingerprint, needs)
                {
                    *found = Some(addr);
                    more = true;
                }
            }
            if !more {
                return;
            }
        }
    }

    fn meet(d: &Domain, recent: &mut Recent, number: u64, needs: &mut Needs) {
        if recent.touch(number) {
            return;
        }
        match d.fingerprints.find(number) {
            Found::Here(leaf) if leaf.generation == d.generation => recent.add(number, 0, &leaf.slots),
            Found::Here(_) | Found::Absent => {}
            Found::Away(_) => {
                Shard::need(&d.fingerprints, d.record.id.0, number, needs);
            }
        }
    }

    /// Whether the chunk is in a damaged fragment; remembers that its data was asked for.
    pub fn is_damaged(&self, domain: DomainId, container: &container::Container, addr: ChunkAddr) -> bool {
        if self.damaged.is_empty() {
            return false;
        }
        let fragment = container.fragment_of(addr.slot());
        let first = fragment.and_then(|fragment| ChunkAddr::new(addr.container(), fragment.first_slot));
        let Some(first) = first.filter(|first| self.damaged.contains(&(domain, *first))) else {
            return false;
        };
        self.wanted.borrow_mut().insert((domain, first));
        true
    }

    /// Whether a fragment's place is in a data segment of its domain.
    pub fn holds(&self, domain: DomainId, fragment: &FragmentEntry) -> bool {
        self.segments.entry(fragment.place.segment.segment.0).is_some_and(|entry| {
            entry.class == Some(Class::Data)
                && entry.domain == domain
                && fragment.place.offset + fragment.unit_bytes <= entry.used_bytes
        })
    }

    // ---- the fold

    /// Applies a record of scope `scope`; `now` is the journal batch that holds it.
    pub fn apply(
        &mut self,
        scope: Scope,
        record: &Record<'_>,
        wraps: &DomainWraps,
        now: Sequence,
    ) -> Result<(), ApplyError> {
        let in_domain = match scope {
            Scope::Domain { domain, generation } => Some((domain, generation)),
            Scope::Host { .. } => return Err(ApplyError::Unsupported("a map sealed with its host's key")),
            Scope::Pool => None,
        };
        let need_domain =
            || in_domain.ok_or(ApplyError::Record("container record outside of a domain".into()));
        match *record {
            Record::SegmentOpen { addr, incarnation, domain, generation, .. } => {
                let ok = self.segments.apply_open(addr.segment.0, incarnation, domain, generation);
                if ok { Ok(()) } else { Err(ApplyError::Segment(addr)) }
            }
            Record::FragmentAdd { container, ref fragment, fingerprints } => {
                let (domain, generation) = need_domain()?;
                self.fragment_add(domain, generation, container, fragment, fingerprints)
            }
            Record::FragmentMove { first, fragments } => {
                let (domain, _) = need_domain()?;
                self.fragment_move(domain, first, fragments, now)
            }
            Record::Fingerprints { container, fingerprints } => {
                let (domain, generation) = need_domain()?;
                self.renew_fingerprints(domain, generation, container, fingerprints)
            }
            Record::ContainerDrop { container } => {
                let (domain, _) = need_domain()?;
                self.container_drop(domain, container)
            }
            Record::MapSet { volume, lba, runs } => self.map_set(volume, lba, runs, now),
            Record::MapFill { volume, lba, count, entry } => self.map_fill(volume, lba, count, entry, now),
            Record::MapMerge { volume, leaf, count } => {
                (leaf..leaf + u64::from(count)).try_for_each(|leaf| self.map_merge(volume, leaf, now))
            }
            Record::MapOwn { volume, leaf, count, from } => {
                (leaf..leaf + u64::from(count)).try_for_each(|leaf| self.map_own(volume, leaf, from, now))
            }
            Record::MapRetarget { volume, leaf, changes } => self.map_retarget(volume, leaf, changes, now),
            _ => self.apply_catalogue(record, wraps, now),
        }
    }

    fn apply_catalogue(
        &mut self,
        record: &Record<'_>,
        wraps: &DomainWraps,
        now: Sequence,
    ) -> Result<(), ApplyError> {
        let bad = |error: cryptfold_reduce_format::wire::WireError| ApplyError::Record(error.to_string());
        match *record {
            Record::VolumeCreate { record } => {
                self.add_volume(VolumeRecord::decode(record).map_err(bad)?)?;
            }
            Record::Clone { snapshot, record } => {
                let record = VolumeRecord::decode(record).map_err(bad)?;
                if record.base.is_none_or(|(base, _)| base != snapshot) {
                    return Err(ApplyError::Record(format!(
                        "clone {} of {snapshot} has another base",
                        record.id
                    )));
                }
                self.add_volume(record)?;
            }
            Record::Snapshot { volume, epoch, record } => {
                self.add_snapshot(volume, epoch, VolumeRecord::decode(record).map_err(bad)?)?;
            }
            Record::VolumeResize { volume, blocks } => {
                let record = &mut self.volume_mut(volume)?.record;
                record.blocks = blocks;
                // What lay beyond does not come back when it grows again.
                record.base = record.base.map(|(base, below)| (base, below.min(blocks)));
            }
            Record::VolumeRename { volume, name } => self.volume_mut(volume)?.record.name = name.to_owned(),
            Record::VolumeFlags { volume, set, clear } => {
                let flags = &mut self.volume_mut(volume)?.record.flags;
                *flags = *flags & !clear | set;
            }
            Record::VolumeUpdate { record } => {
                self.update_volume(VolumeRecord::decode(record).map_err(bad)?)?;
            }
            Record::VolumeDelete { volume } => self.delete_volume(volume)?,
            Record::VolumeGone { volume } => self.remove_volume(volume)?,
            Record::DomainCreate { record } => {
                let record = DomainRecord::decode(record).map_err(bad)?;
                self.pool.next_domain = DomainId(self.pool.next_domain.0.max(record.id.0 + 1));
                let domain =
                    Domain::open(record, wraps, self.hash, &self.meter).map_err(ApplyError::Record)?;
                self.domains.insert(domain.record.id.0, domain);
                self.segments.set_domains(self.domains.len());
            }
            Record::DomainUpdate { record } => {
                self.update_domain(DomainRecord::decode(record).map_err(bad)?, wraps)?;
            }
            Record::DomainErase { domain } => self.erase_domain(domain, now)?,
            Record::PoolUpdate { record } => {
                let new = PoolRecord::decode(record).map_err(bad)?;
                self.pool.default_domain = new.default_domain;
                self.pool.compression = new.compression;
                self.pool.flags = new.flags;
            }
            Record::EpochAdvance { epoch } => self.pool.epoch = epoch,
            _ => return Err(ApplyError::Unsupported("a record of the journal")),
        }
        Ok(())
    }

    /// A domain goes with everything in it.
    fn erase_domain(&mut self, domain: DomainId, now: Sequence) -> Result<(), ApplyError> {
        self.domains.remove(&domain.0).ok_or(ApplyError::NoDomain(domain))?;
        self.volumes.retain(|_, v| v.record.domain != domain);
        self.gone.retain(|_, v| v.record.domain != domain);
        // Families are within domains; the others take the places that they had.
        self.families = Families::default();
        self.views = RefCell::default();
        self.link_all();
        self.emptied.retain(|(of, _)| *of != domain);
        self.damaged.retain(|(of, _)| *of != domain);
        self.wanted.borrow_mut().retain(|(of, _)| *of != domain);
        self.segments.erase(domain, now);
        self.segments.set_domains(self.domains.len());
        Ok(())
    }

    fn volume_mut(&mut self, id: VolumeId) -> Result<&mut Volume, ApplyError> {
        self.volumes.get_mut(&id.0).ok_or(ApplyError::NoVolume(id))
    }

    /// New chunks, without references.
    pub fn fragment_add(
        &mut self,
        domain: DomainId,
        generation: Generation,
        container: ContainerId,
        fragment: &FragmentEntry,
        fingerprints: &[Fingerprint],
    ) -> Result<(), ApplyError> {
        let d = self.domains.get_mut(&domain.0).ok_or(ApplyError::NoDomain(domain))?;
        let error = d.error(container);
        let c = d.containers.get_mut(container.get());
        let late = fragment.first_slot < c.used();
        c.add(fragment).map_err(error)?;
        if late {
            d.containers.weigh(container.get());
        }
        d.next_container = d.next_container.max(container.get() + 1);
        let leaf = d.fingerprints.get_mut(container.get());
        if leaf.slots.is_empty() {
            (leaf.generation, leaf.hash) = (generation, d.hasher.id());
            leaf.slots.reserve_exact(SLOTS);
        }
        // Other cores' fragments may come late: their slots have been passed over.
        let slots = usize::from(fragment.first_slot)..usize::from(fragment.first_slot) + fingerprints.len();
        if leaf.slots.len() < slots.end {
            leaf.slots.resize(slots.end, Fingerprint::NONE);
        }
        leaf.slots[slots].copy_from_slice(fingerprints);
        let number = fragment.place.segment.segment.0;
        if number >= self.segments.len() {
            return Err(ApplyError::Segment(fragment.place.segment));
        }
        self.segments.apply_used(number, fragment.place.offset + fragment.unit_bytes);
        Ok(())
    }

    /// A fragment lies elsewhere now.
    pub fn fragment_move(
        &mut self,
        domain: DomainId,
        first: ChunkAddr,
        fragments: &[FragmentRaw],
        now: Sequence,
    ) -> Result<(), ApplyError> {
        let d = self.domains.get_mut(&domain.0).ok_or(ApplyError::NoDomain(domain))?;
        let new: SmallVec<[FragmentEntry; 4]> = fragments
            .iter()
            .map(|raw| raw.entry().map_err(|error| ApplyError::Record(error.to_string())))
            .collect::<Result<_, _>>()?;
        let error = d.error(first.container());
        let c = d.containers.get_mut(first.container().get());
        let before = c.fragment_of(first.slot()).map_or(0, |old| live_bytes(c, &old));
        let old = c.replace(first.slot(), &new).map_err(error)?;
        if before > 0 {
            d.stored_bytes = d.stored_bytes.saturating_sub(before.into());
            if !self.segments.apply_live(old.place.segment.segment.0, before, false, now) {
                return Err(ApplyError::Segment(old.place.segment));
            }
        }
        for fragment in &new {
            let number = fragment.place.segment.segment.0;
            self.segments.apply_used(number, fragment.place.offset + fragment.unit_bytes);
            let live = live_bytes(c, fragment);
            d.stored_bytes += u64::from(live);
            if live > 0 && !self.segments.apply_live(number, live, true, now) {
                return Err(ApplyError::Segment(fragment.place.segment));
            }
        }
        Ok(())
    }

    /// A container without references goes.
    pub fn container_drop(&mut self, domain: DomainId, container: ContainerId) -> Result<(), ApplyError> {
        let d = self.domains.get_mut(&domain.0).ok_or(ApplyError::NoDomain(domain))?;
        d.containers.clear(container.get());
        d.fingerprints.clear(container.get());
        d.next_container = d.next_container.max(container.get() + 1);
        Ok(())
    }

    /// Blocks of a volume become what `runs` say.
    pub fn map_set(
        &mut self,
        volume: VolumeId,
        lba: Lba,
        runs: &[MapRun],
        now: Sequence,
    ) -> Result<(), ApplyError> {
        let v = self.volumes.get_mut(&volume.0).ok_or(ApplyError::NoVolume(volume))?;
        let id = v.record.domain;
        let d = self.domains.get_mut(&id.0).ok_or(ApplyError::NoDomain(id))?;
        let count: u64 = runs.iter().map(|run| u64::from(run.count())).sum();
        if lba.0 + count > v.record.blocks {
            return Err(ApplyError::Beyond { volume, lba: lba.0 + count });
        }
        let mut at = lba.0;
        let mut lost = Lost::default();
        for run in runs {
            let first = run.first();
            // References first: what replaces itself must not die in between.
            if let Some(addr) = first.chunk() {
                take_references(d, &mut self.segments, addr, run.count(), now)?;
            }
            for entry in run.entries() {
                let (index, slot) = leaf_of(at);
                set_entry(v, d, index, slot, entry, &mut lost);
                at += 1;
            }
        }
        for addr in lost.dropped {
            drop_reference(d, &mut self.segments, &mut self.index, &mut self.emptied, addr, now)?;
        }
        match v.keeper.filter(|_| !lost.kept.is_empty()) {
            Some(keeper) => self.keep(keeper, &lost.kept),
            None => Ok(()),
        }
    }

    /// Blocks of a volume all become `entry`, which is no chunk.
    pub fn map_fill(
        &mut self,
        volume: VolumeId,
        lba: Lba,
        count: u64,
        entry: MapEntry,
        now: Sequence,
    ) -> Result<(), ApplyError> {
        let v = self.volumes.get_mut(&volume.0).ok_or(ApplyError::NoVolume(volume))?;
        let id = v.record.domain;
        let d = self.domains.get_mut(&id.0).ok_or(ApplyError::NoDomain(id))?;
        let mut at = lba.0;
        let mut lost = Lost::default();
        while at < lba.0 + count {
            let (index, first) = leaf_of(at);
            let here = ((MAP_ENTRIES - first) as u64).min(lba.0 + count - at);
            // In a clone nothing is not unmapped.
            let skip = entry.target == Target::Unmapped
                && v.record.base.is_none()
                && matches!(v.tree.find(index), Found::Absent);
            if !skip {
                for slot in first..first + here as usize {
                    set_entry(v, d, index, slot, entry, &mut lost);
                }
            }
            at += here;
        }
        for addr in lost.dropped {
            drop_reference(d, &mut self.segments, &mut self.index, &mut self.emptied, addr, now)?;
        }
        match v.keeper.filter(|_| !lost.kept.is_empty()) {
            Some(keeper) => self.keep(keeper, &lost.kept),
            None => Ok(()),
        }
    }

    /// Adds what is missing before [`Shard::map_retarget`].
    pub fn needs_of_retarget(
        &self,
        volume: VolumeId,
        leaf: u64,
        changes: &[Retarget],
        needs: &mut Needs,
    ) -> Result<(), ApplyError> {
        let v = self.volume(volume)?;
        let d = self.domain(v.record.domain)?;
        let entries = match v.tree.find(leaf) {
            Found::Here(entries) => entries,
            Found::Absent => return Ok(()),
            Found::Away(_) => {
                Shard::need(&v.tree, volume.0, leaf, needs);
                return Ok(());
            }
        };
        for change in changes {
            let old = entries.get(change.slot().into()).chunk();
            for addr in old.into_iter().chain(change.addr()) {
                Shard::need(&d.containers, d.record.id.0, addr.container().get(), needs);
            }
        }
        Ok(())
    }

    /// Entries of a leaf are other chunks now, with the same content and everything else as it was. Who sees them and whose they
    /// are does not change, so snapshots and clones are not concerned.
    pub fn map_retarget(
        &mut self,
        volume: VolumeId,
        leaf: u64,
        changes: &[Retarget],
        now: Sequence,
    ) -> Result<(), ApplyError> {
        let v = self.volumes.get_mut(&volume.0).ok_or(ApplyError::NoVolume(volume))?;
        let id = v.record.domain;
        let d = self.domains.get_mut(&id.0).ok_or(ApplyError::NoDomain(id))?;
        for change in changes {
            let slot = usize::from(change.slot());
            let entries = v.tree.get_mut(leaf);
            let entry = entries.get(slot);
            let (Some(old), Some(new)) = (entry.chunk(), change.addr()) else {
                return Err(ApplyError::Record(format!("entry {slot} of leaf {leaf} is no chunk")));
            };
            entries.set(slot, MapEntry { target: Target::Chunk(new), ..entry });
            take_reference(d, &mut self.segments, new, now)?;
            drop_reference(d, &mut self.segments, &mut self.index, &mut self.emptied, old, now)?;
        }
        self.views.get_mut().forget(leaf, &self.meter);
        Ok(())
    }

    /// Remembers fingerprints that have references now.
    pub fn index_fragment(&mut self, domain: DomainId, first: ChunkAddr, fingerprints: &[Fingerprint]) {
        if self.index.hook_bits() > 0
            && let Some(d) = self.domains.get_mut(&domain.0)
        {
            d.recent.get_mut().add(first.container().get(), first.slot(), fingerprints);
        }
        for (n, fingerprint) in fingerprints.iter().enumerate() {
            if *fingerprint != Fingerprint::NONE
                && let Some(addr) = first.plus(n as u16)
            {
                self.index.insert(Key::new(domain, fingerprint), addr);
            }
        }
    }

    /// Epoch that new map entries are born in.
    pub fn epoch(&self) -> Epoch {
        self.pool.epoch
    }
}

/// What a change of a volume's map takes from it.
#[derive(Default)]
struct Lost {
    /// These lose a reference.
    dropped: SmallVec<[ChunkAddr; 32]>,
    /// These go to the newest snapshot.
    kept: SmallVec<[Kept; 2]>,
}

impl Volume {
    /// Whether an entry of its map goes to its newest snapshot when it is replaced.
    #[inline]
    fn keeps(&self, entry: &MapEntry) -> bool {
        entry.birth <= self.shared && !entry.is_none()
    }
}

#[inline]
fn set_entry(v: &mut Volume, d: &mut Domain, index: u64, slot: usize, entry: MapEntry, lost: &mut Lost) {
    let hole = entry.target == Target::Unmapped;
    let whole = v.record.base.is_none();
    let leaf = v.tree.get_mut(index);
    let before = leaf.get(slot);
    // An unmapped block keeps no birth, but in a clone: an empty leaf need not be stored.
    leaf.set(slot, if hole && whole { MapEntry::default() } else { entry });
    let kept = v.keeps(&before);
    let mut group: Group = None;
    match before.target {
        Target::Chunk(addr) => {
            group = v.births.remove(before.birth);
            v.chunks = v.chunks.saturating_sub(1);
            if !kept {
                lost.dropped.push(addr);
                d.mapped = d.mapped.saturating_sub(1);
            }
        }
        Target::Zero | Target::Pattern(_) => v.special = v.special.saturating_sub(1),
        Target::Unmapped | Target::Uncorrectable => {}
    }
    if kept {
        lost.kept.push((index, slot as u16, before, group));
    }
    match entry.target {
        Target::Chunk(_) => {
            v.chunks += 1;
            v.births.add(None);
            d.mapped += 1;
        }
        Target::Zero | Target::Pattern(_) => v.special += 1,
        Target::Unmapped | Target::Uncorrectable => {}
    }
    if !hole {
        v.written_bytes += 4096;
    }
}

/// Bytes of a fragment that count as living when `live` of its chunks do. The rest is what the collector wins by leaving the
/// dead ones behind.
fn share(fragment: &FragmentEntry, live: usize) -> u32 {
    (u64::from(fragment.unit_bytes) * live as u64).div_ceil(u64::from(fragment.chunks)) as u32
}

/// Living bytes of a fragment of this container.
pub(crate) fn live_bytes(container: &container::Container, fragment: &FragmentEntry) -> u32 {
    share(fragment, container.live_in(fragment))
}

#[inline]
pub(crate) fn take_reference(
    d: &mut Domain,
    segments: &mut Segments,
    addr: ChunkAddr,
    now: Sequence,
) -> Result<(), ApplyError> {
    take_references(d, segments, addr, 1, now)
}

/// Takes a reference to each of `count` slots from `first` on.
fn take_references(
    d: &mut Domain,
    segments: &mut Segments,
    first: ChunkAddr,
    count: u16,
    now: Sequence,
) -> Result<(), ApplyError> {
    let id = d.record.id;
    let c = d.containers.get_mut(first.container().get());
    let mut result = Ok(());
    let taken = c.take_refs(first.slot(), count, |fragment, before, live| {
        d.unique += (live - before) as u64;
        let more = share(fragment, live) - share(fragment, before);
        d.stored_bytes += u64::from(more);
        if !segments.apply_live(fragment.place.segment.segment.0, more, true, now) {
            result = Err(ApplyError::Segment(fragment.place.segment));
        }
    });
    taken.map_err(|error| ApplyError::Container { domain: id, container: first.container(), error })?;
    result
}

pub(crate) fn drop_reference(
    d: &mut Domain,
    segments: &mut Segments,
    index: &mut Index,
    emptied: &mut Vec<(DomainId, ContainerId)>,
    addr: ChunkAddr,
    now: Sequence,
) -> Result<(), ApplyError> {
    let id = d.record.id;
    let number = addr.container().get();
    let c = d.containers.get_mut(number);
    let wrap = |error| ApplyError::Container { domain: id, container: addr.container(), error };
    let (left, fragment) = c.drop_ref(addr.slot()).map_err(wrap)?;
    if left > 0 {
        return Ok(());
    }
    d.unique = d.unique.saturating_sub(1);
    if let Some((fragment, live)) = fragment {
        let less = share(&fragment, live + 1) - share(&fragment, live);
        d.stored_bytes = d.stored_bytes.saturating_sub(less.into());
        if !segments.apply_live(fragment.place.segment.segment.0, less, false, now) {
            return Err(ApplyError::Segment(fragment.place.segment));
        }
    }
    if c.live() == 0 {
        emptied.push((id, addr.container()));
    }
    if index.len() > 0
        && let Some(fingerprint) =
            d.fingerprints.peek(number).and_then(|leaf| leaf.slots.get(usize::from(addr.slot())))
    {
        index.remove(Key::new(id, fingerprint), addr);
    }
    Ok(())
}
