//! Making, opening and closing a pool.
//!
//! Opening reads (anchors, catalogue, journal) and changes nothing on the device until everything is understood; then, in
//! this order: a superblock with the next owner epoch, the owner block, the first journal batch of the new epoch. Segments
//! that were open stay closed for ever; what the last owner had not made durable does not exist.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use cryptfold_bdev::{Access, BdevEvent, Descriptor, Registry, Status};
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::block::{BLOCK_BYTES, BlockError};
use cryptfold_reduce_format::codec::Compression;
use cryptfold_reduce_format::entry::Record;
use cryptfold_reduce_format::fingerprint::HashId;
use cryptfold_reduce_format::ids::{
    DeviceIx, DomainId, Epoch, Generation, OwnerEpoch, Sequence, ShardIx, VolumeId,
};
use cryptfold_reduce_format::journal::{BatchSealer, Cursor, JournalEpoch, Scope};
use cryptfold_reduce_format::keys::{Kek, PoolKey, PoolKeys, Secret};
use cryptfold_reduce_format::node::{self, Interior, NodePtr};
use cryptfold_reduce_format::probe::{PROBE_HEAD_BYTES, PROBE_TAIL_BYTES, probe_foreign};
use cryptfold_reduce_format::record::{
    DomainRecord, GenerationState, KeyGeneration, PoolRecord, TreeRoot, VolumeRecord, decode_page,
};
use cryptfold_reduce_format::segtable;
use cryptfold_reduce_format::slots::{KeyBlock, KeySlot, MAX_KEY_SLOTS, SlotKind};
use cryptfold_reduce_format::superblock::{
    ANCHOR_BYTES, DeviceEntry, DeviceState, FEATURE_APPROVED, FEATURE_ERASURE, Features, Geometry, KEYS_AT,
    MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES, OWNER_AT, Redundancy, ShardEntry, Superblock, anchor_offsets,
};
use reactor::memory::Buf;
use reactor::sync::{Mutex, Notify};
use uuid::Uuid;

use crate::anchors::{self, Anchors, io_error};
use crate::base::Base;
use crate::commit::Commits;
use crate::core::Core;
use crate::error::PoolError;
use crate::index::Index;
use crate::info::SlotKey;
use crate::journal::Journal;
use crate::meta::Meta;
use crate::owner;
use crate::pool::{Life, Pool, PoolRef};
use crate::segments::Segments;
use crate::shard::{Domain, Shard, Volume};
use crate::tree::{Meter, Missing, Page, Tree};

/// Smallest device of a pool.
pub const MIN_POOL_BYTES: u64 = 32 << 20;
/// Name of the domain of volumes that name none.
pub const DEFAULT_DOMAIN: &str = "default";
/// Smallest memory budget.
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;
/// Where the journal ring begins.
const JOURNAL_AT: u64 = 2 << 20;

/// How a pool is made. Zero or `None`: the default.
#[derive(Clone, Debug, Default)]
pub(crate) struct Making {
    pub name: String,
    pub force: bool,
    pub segment_bytes: Option<u32>,
    pub first_format: bool,
    /// With the algorithms of the FIPS modes.
    pub approved: bool,
}

/// How a pool is opened.
#[derive(Clone, Debug, Default)]
pub(crate) struct Opening {
    pub memory_bytes: Option<u64>,
    /// Write nothing, not even the owner block: for an audit.
    pub read_only: bool,
    /// Only a pool that was made with the algorithms of the FIPS modes.
    pub approved: bool,
}

/// A claimed base device, and whom to tell when it goes away.
pub(crate) struct Claim {
    pub descriptor: Arc<Descriptor>,
    owner: Arc<OnceLock<PoolRef>>,
}

/// Opens and claims a base device.
pub(crate) fn claim(registry: &Registry, base: &str) -> Result<Claim, PoolError> {
    claim_for(registry, base, Access::ReadWrite, || ())
}

/// As [`claim`], with this access; `on_removed` is called, on any thread, when the device is to go away. It must not block.
pub(crate) fn claim_for(
    registry: &Registry,
    base: &str,
    access: Access,
    on_removed: impl Fn() + Send + Sync + 'static,
) -> Result<Claim, PoolError> {
    let owner: Arc<OnceLock<PoolRef>> = Arc::default();
    let told = owner.clone();
    let descriptor = registry.open(base, access, move |event| {
        if event != BdevEvent::Removed {
            return;
        }
        if let Some(pool) = told.get().cloned() {
            pool.home.clone().send(move || {
                if let Some(pool) = pool.get() {
                    pool.fail(Status::INVALID_NAMESPACE);
                }
            });
        }
        on_removed();
    })?;
    descriptor.claim("a cryptfold pool")?;
    Ok(Claim { descriptor, owner })
}

pub(crate) fn random_secret() -> Secret {
    let mut bytes = [0; 32];
    reactor::fill_random(&mut bytes);
    Secret::take(&mut bytes)
}

fn random_uuid() -> Uuid {
    let mut bytes = [0; 16];
    reactor::fill_random(&mut bytes);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |t| t.as_millis() as u64)
}

/// Segment size for a device: about 256 segments, within what the format and the buffers want.
fn default_segment_bytes(bytes: u64) -> u32 {
    let wanted = (bytes / 256).next_power_of_two();
    wanted.clamp(1 << 20, 64 << 20) as u32
}

/// Blocks of the journal ring for a device of `bytes`.
fn journal_blocks(bytes: u64) -> u32 {
    ((bytes / 32).clamp(1 << 20, 128 << 20) / BLOCK_BYTES as u64) as u32
}

/// Writes a new, empty pool to a device.
pub(crate) async fn create(claim: &Claim, making: &Making, key: &SlotKey) -> Result<Uuid, PoolError> {
    let descriptor = &claim.descriptor;
    let bdev = descriptor.bdev();
    let (device, bytes) = (bdev.name().to_owned(), bdev.size_bytes());
    if bytes < MIN_POOL_BYTES {
        return Err(PoolError::TooSmall { device, bytes, need_bytes: MIN_POOL_BYTES });
    }
    if making.name.is_empty()
        || making.name.len() > 64
        || making.name.chars().any(|c| c.is_control() || c == '/')
    {
        return Err(PoolError::Invalid(format!(
            "a pool's name has 1 to 64 bytes without '/' and control characters, not {:?}",
            making.name
        )));
    }
    if making.approved && key.kind == SlotKind::Open {
        return Err(PoolError::Invalid("in the FIPS modes a pool is encrypted: it needs a key".into()));
    }
    let segment_bytes = making.segment_bytes.unwrap_or_else(|| default_segment_bytes(bytes));
    if !segment_bytes.is_power_of_two() || !(MIN_SEGMENT_BYTES..=MAX_SEGMENT_BYTES).contains(&segment_bytes) {
        return Err(PoolError::Invalid(format!(
            "segment size {segment_bytes} is not a power of two from {MIN_SEGMENT_BYTES} to {MAX_SEGMENT_BYTES}"
        )));
    }
    let base = Base::open(descriptor)?;
    if !making.force {
        let head = base.read(0, PROBE_HEAD_BYTES).await.map_err(io_error(&device, "read"))?;
        let whole = bytes / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
        let tail = base.read(whole - PROBE_TAIL_BYTES as u64, PROBE_TAIL_BYTES).await;
        let tail = tail.map_err(io_error(&device, "read"))?;
        if let Some(found) = probe_foreign(&head, &tail) {
            return Err(PoolError::Foreign { device, found });
        }
    }
    let blocks = bytes / BLOCK_BYTES as u64;
    let superblock = Superblock {
        pool: random_uuid(),
        name: making.name.clone(),
        generation: 1,
        features: Features {
            incompatible: if making.first_format { 0 } else { FEATURE_ERASURE }
                | if making.approved { FEATURE_APPROVED } else { 0 },
            ..Features::default()
        },
        device: DeviceIx(0),
        segment_bytes,
        owner_epoch: OwnerEpoch(0),
        created_ms: now_ms(),
        root: None,
        devices: vec![DeviceEntry {
            device: DeviceIx(0),
            id: random_uuid(),
            state: DeviceState::Active,
            blocks,
            anchor_blocks: blocks,
            redundancy: Redundancy::default(),
        }],
        shards: vec![ShardEntry {
            device: DeviceIx(0),
            blocks: journal_blocks(bytes),
            start_block: JOURNAL_AT / BLOCK_BYTES as u64,
            tail_position: 0,
            tail_sequence: Sequence(1),
            tail_chain: [0; 16],
        }],
    };
    let usable = Geometry::of(&superblock, DeviceIx(0)).map_or(0, |g| {
        (0..g.segments).filter(|&n| !g.is_reserved(cryptfold_reduce_format::ids::SegmentNo(n))).count()
    });
    if usable < MIN_SEGMENTS {
        let need_bytes = u64::from(segment_bytes) * (MIN_SEGMENTS as u64 + 8);
        return Err(PoolError::TooSmall { device, bytes, need_bytes });
    }
    write_anchors(&base, &device, superblock, key).await
}

/// Segments that a pool needs to work at all.
const MIN_SEGMENTS: usize = 20;

async fn write_anchors(
    base: &Base,
    device: &str,
    mut superblock: Superblock,
    key: &SlotKey,
) -> Result<Uuid, PoolError> {
    let pool_key = PoolKey(random_secret());
    let keys = PoolKeys::derive(&pool_key, superblock.pool);
    let bytes = superblock.devices[0].blocks * BLOCK_BYTES as u64;
    let at = anchor_offsets(bytes).map_err(|_| PoolError::TooSmall {
        device: device.to_owned(),
        bytes,
        need_bytes: MIN_POOL_BYTES,
    })?;
    let bad_key = |reason| PoolError::Key { device: device.to_owned(), reason };
    let mut slot =
        KeySlot::seal(key.kind, key.kdf, &key.kek, &pool_key, superblock.created_ms).map_err(bad_key)?;
    slot.label.clone_from(&key.label);
    slot.reference.clone_from(&key.reference);
    let mut slots = [const { None }; MAX_KEY_SLOTS];
    slots[0] = Some(slot);
    let mut key_block = KeyBlock::new(&keys, 1, slots, &random_secret()).map_err(bad_key)?;
    if superblock.features.incompatible & FEATURE_ERASURE == 0 {
        key_block.erasure = [None, None];
    }
    let bad = |reason: BlockError| PoolError::Block { device: device.to_owned(), reason };
    let failed = || io_error(device, "write of an anchor");
    // Superblocks first away, last back: a pool that is half made is none, also where another was before.
    let blank = Buf::zeroes(BLOCK_BYTES);
    for anchor in at {
        base.write(anchor, blank.clone(), false).await.map_err(failed())?;
    }
    base.flush().await.map_err(failed())?;
    for (copy, anchor) in at.iter().enumerate() {
        let offset = anchor + KEYS_AT;
        let block = key_block.encode(keys.block(), DeviceIx(0), copy as u16, offset).map_err(bad)?;
        base.write_block(offset, &block, false).await.map_err(failed())?;
        base.write(anchor + OWNER_AT, blank.clone(), false).await.map_err(failed())?;
    }
    base.flush().await.map_err(failed())?;
    for generation in [1, 2] {
        superblock.generation = generation;
        for copy in cryptfold_reduce_format::superblock::copies_of(generation) {
            let block = superblock.encode(keys.block(), copy as u16, at[copy]).map_err(bad)?;
            base.write_block(at[copy], &block, false).await.map_err(failed())?;
        }
        base.flush().await.map_err(failed())?;
    }
    Ok(superblock.pool)
}

/// The catalogue as a checkpoint has it.
struct Catalogue {
    record: PoolRecord,
    domains: Tree<Page>,
    volumes: Tree<Page>,
    segments: Tree<Page>,
    pool_ptr: Option<NodePtr>,
    /// Nodes of the catalogue: segment and bytes, to be counted as live.
    nodes: Vec<(u32, u32)>,
}

/// Gives a pool that has just been made what its maker wants; closes it again if that fails.
pub(crate) async fn furnish(
    pool: &Rc<Pool>,
    compression: Option<Compression>,
    durable: bool,
) -> Result<(), PoolError> {
    let given = async {
        if let Some(compression) = compression {
            pool.set_compression(compression).await?;
        }
        if durable { pool.set_durable().await } else { Ok(()) }
    };
    let given = given.await;
    if given.is_err() {
        // Its device would be held by a pool that nobody has; the first error is what says why.
        let _ = pool.close().await;
    }
    given
}

/// Opens the pool on a claimed device: everything but the announcement of its volumes. `Ok(None)`: no pool there.
pub(crate) async fn open(claim: &Claim, kek: &Kek, opening: &Opening) -> Result<Option<Rc<Pool>>, PoolError> {
    let descriptor = &claim.descriptor;
    let bdev = descriptor.bdev();
    let (device, bytes) = (bdev.name().to_owned(), bdev.size_bytes());
    let base = Base::open(descriptor)?;
    let Some(found) = anchors::read(&base, &device, bytes, kek).await? else { return Ok(None) };
    if opening.approved && !found.superblock.is_approved() {
        return Err(PoolError::NotApproved { device });
    }
    let damaged = |what: String| PoolError::Damaged { device: device.clone(), what };
    let entry = &found.superblock.devices[0];
    if found.superblock.devices.len() != 1 || found.superblock.shards.len() != 1 {
        return Err(damaged("it has several devices or shards, which this version does not open".into()));
    }
    if entry.blocks * BLOCK_BYTES as u64 > bytes {
        return Err(damaged(format!(
            "the device has {bytes} bytes, the pool was made on {}",
            entry.blocks * BLOCK_BYTES as u64
        )));
    }
    if !found.superblock.is_writable() && !opening.read_only {
        return Err(damaged("it has features that only allow this version to read it".into()));
    }
    let mut me = [0; 16];
    reactor::fill_random(&mut me);
    owner::wait_for_ownership(&base, &device, &found, &me).await?;
    // Whoever owned it may have gone on until just now.
    let Some(found) = anchors::read(&base, &device, bytes, kek).await? else { return Ok(None) };
    let pool = assemble(descriptor, base, found, me, opening)?;
    pool.load_catalogue().await?;
    pool.replay().await?;
    pool.shard.borrow_mut().segments.recount();
    if opening.read_only {
        return Ok(Some(pool));
    }
    pool.start().await?;
    // From here on the pool is told when its device goes away. A claim is used once.
    let _ = claim.owner.set(pool.handle.clone());
    Ok(Some(pool))
}

fn assemble(
    descriptor: &Arc<Descriptor>,
    base: Base,
    found: Anchors,
    me: [u8; 16],
    opening: &Opening,
) -> Result<Rc<Pool>, PoolError> {
    let device = descriptor.bdev().name().to_owned();
    let superblock = found.superblock;
    let geometry = Geometry::of(&superblock, DeviceIx(0))
        .ok_or_else(|| PoolError::Damaged { device: device.clone(), what: "impossible geometry".into() })?;
    let last_owner = found.owner.as_ref().map_or(OwnerEpoch(0), |owner| owner.epoch);
    let owner_epoch = OwnerEpoch(superblock.owner_epoch.max(last_owner).0 + 1);
    let mut salt = [0; 16];
    reactor::fill_random(&mut salt);
    let stored_nonces = superblock.is_approved();
    let epoch = JournalEpoch { owner_epoch, salt, shard: ShardIx(0), stored_nonces };
    let stored = superblock.devices[0].blocks * BLOCK_BYTES as u64;
    let budget = opening.memory_bytes.unwrap_or(512_000_000 + stored / 4000);
    if budget < MIN_MEMORY_BYTES {
        return Err(PoolError::Invalid(format!("memory budget {budget} is below {MIN_MEMORY_BYTES} bytes")));
    }
    // Nine sixteenths for the index, whose size is a power of two (with the default, one in 16 fingerprints of 1 TB fits), five
    // for the trees, the rest for buffers.
    let index_bytes = (budget / 16 * 9) as usize;
    let cache_bytes = (budget / 16 * 5) as usize;
    let meter = Meter::default();
    let entry = &superblock.shards[0];
    let cursor = Cursor {
        pool: superblock.pool,
        shard: ShardIx(0),
        sequence: entry.tail_sequence,
        position: entry.tail_position,
        chain: entry.tail_chain,
    };
    let sealer = BatchSealer::new(found.keys.journal(), epoch, cursor);
    let journal = Journal::new(sealer, entry, entry.tail_position, stored_nonces);
    let shard = Shard {
        pool: PoolRecord {
            epoch: Epoch(1),
            next_domain: DomainId(1),
            next_volume: VolumeId(1),
            default_domain: DomainId(1),
            ..PoolRecord::default()
        },
        domains: BTreeMap::new(),
        volumes: BTreeMap::new(),
        gone: BTreeMap::new(),
        families: Default::default(),
        views: Default::default(),
        segments: Segments::new(geometry, owner_epoch),
        index: Index::new(index_bytes),
        meter: meter.clone(),
        hash: if superblock.is_approved() { HashId::HmacSha256 } else { HashId::Blake3 },
        emptied: Vec::new(),
        damaged: Default::default(),
        wanted: RefCell::default(),
    };
    let empty = || Tree::new(TreeRoot::default(), Meter::default());
    let name = superblock.name.clone();
    Ok(Rc::new(Pool {
        handle: PoolRef::new(superblock.pool, reactor::current(), &name, descriptor),
        uuid: superblock.pool,
        descriptor: descriptor.clone(),
        keys: found.keys,
        wraps: RefCell::new(found.wraps),
        pool_key: found.key,
        key_block: RefCell::new(found.key_block),
        stale_keys: Cell::new(found.stale_keys),
        epoch: Cell::new(epoch),
        owner: me,
        anchors: found.at,
        segment_bytes: superblock.segment_bytes,
        superblock: RefCell::new(superblock),
        shard: RefCell::new(shard),
        journal: RefCell::new(journal),
        commits: Commits::default(),
        meta: Mutex::new(Meta::new(empty(), empty(), empty(), None)),
        loading: RefCell::default(),
        core: Core::new(base.clone()),
        base,
        lanes: RefCell::default(),
        logs: RefCell::default(),
        loans: RefCell::default(),
        scratch: RefCell::default(),
        gathered: Default::default(),
        expects_new: Cell::new(false),
        emptying_metadata: Cell::new(false),
        metadata_urgent: Cell::new(false),
        metadata_after: Cell::new(0),
        locks: Default::default(),
        cache_bytes,
        eviction_pause: Cell::new(0),
        memory_budget: budget,
        life: Cell::new(Life::Open),
        failure: Cell::new(None),
        damaged: Cell::new(0),
        healed: Cell::new(0),
        scrub: RefCell::default(),
        late: RefCell::default(),
        renewal: RefCell::default(),
        changing_keys: Mutex::new(()),
        collect: Notify::new(),
        host_bytes: Cell::new(0),
        moved_bytes: Cell::new(0),
        collections: Cell::new(0),
        demand: crate::pace::Demand::new(),
        emptied: Cell::new(0),
        busy: Cell::new(0),
        idle: Notify::new(),
        parked: Cell::new(0),
        jobs: RefCell::default(),
        deleting: Cell::new(false),
        deletion_failed: Cell::new(false),
        recovered: Cell::new(false),
        auditing: Cell::new(false),
        audits: Mutex::new(()),
        audit_bytes: Cell::new(cache_bytes / 8),
        read_only: opening.read_only,
        heart_stopped: Cell::new(false),
        room: Cell::default(),
    }))
}

impl Pool {
    fn damage(&self, what: impl Into<String>) -> PoolError {
        PoolError::Damaged { device: self.descriptor.bdev().name().to_owned(), what: what.into() }
    }

    /// Reads the whole catalogue that the superblock points to.
    async fn load_catalogue(&self) -> Result<(), PoolError> {
        let Some(root) = self.superblock.borrow().root else { return Ok(()) };
        let catalogue = self.read_catalogue(root).await?;
        let geometry = Geometry::of(&self.superblock.borrow(), DeviceIx(0))
            .ok_or_else(|| self.damage("impossible geometry"))?;
        let mut entries = Vec::new();
        for page in self.pages(&catalogue.segments) {
            entries.extend(
                segtable::decode_leaf(&page).map_err(|e| self.damage(format!("segment table: {e}")))?,
            );
        }
        // Fewer: it grew, and no checkpoint was made since.
        if entries.len() > geometry.segments as usize {
            return Err(self.damage(format!(
                "the segment table has {} entries, the device {} segments",
                entries.len(),
                geometry.segments
            )));
        }
        let mut segments = Segments::from_entries(geometry, entries, self.epoch.get().owner_epoch);
        for &(number, bytes) in &catalogue.nodes {
            segments.add_catalogue(number, bytes);
        }
        let mut shard = self.shard.borrow_mut();
        let shard = &mut *shard;
        shard.segments = segments;
        let bad = |e: cryptfold_reduce_format::wire::WireError| self.damage(format!("catalogue: {e}"));
        for page in self.pages(&catalogue.domains) {
            for (_, record) in decode_page(&page).map_err(bad)? {
                let record = DomainRecord::decode(record).map_err(bad)?;
                let id = record.id.0;
                let domain = Domain::open(record, &self.wraps.borrow(), shard.hash, &shard.meter);
                shard.domains.insert(id, domain.map_err(|e| self.damage(e))?);
            }
        }
        shard.segments.set_domains(shard.domains.len());
        for page in self.pages(&catalogue.volumes) {
            for (_, record) in decode_page(&page).map_err(bad)? {
                let record = VolumeRecord::decode(record).map_err(bad)?;
                shard.volumes.insert(record.id.0, Volume::open(record, &shard.meter));
            }
        }
        shard.link_all();
        shard.pool = catalogue.record;
        let mut meta = self.meta.try_lock().ok_or_else(|| self.damage("busy while opening"))?;
        *meta = Meta::new(catalogue.domains, catalogue.volumes, catalogue.segments, catalogue.pool_ptr);
        Ok(())
    }

    fn pages(&self, tree: &Tree<Page>) -> Vec<Vec<u8>> {
        let mut indices = tree.leaf_indices();
        indices.sort_unstable();
        indices.into_iter().filter_map(|index| tree.peek(index)).map(|page| page.0.clone()).collect()
    }

    async fn read_catalogue(&self, root: NodePtr) -> Result<Catalogue, PoolError> {
        let mut nodes = Vec::new();
        let missing = Missing { level: 0, index: 0, ptr: root };
        let content = self.catalogue_node(node::Tree::Pool, missing, &mut nodes).await?;
        let record = PoolRecord::decode(&content).map_err(|e| self.damage(format!("pool record: {e}")))?;
        let [(DeviceIx(0), segments)] = record.segments[..] else {
            return Err(self.damage("the pool record has no segment table for its one device"));
        };
        let domains = self.catalogue_tree(node::Tree::Domains, record.domains, &mut nodes).await?;
        let volumes = self.catalogue_tree(node::Tree::Volumes, record.volumes, &mut nodes).await?;
        let segments = self.catalogue_tree(node::Tree::Segments, segments, &mut nodes).await?;
        Ok(Catalogue { record, domains, volumes, segments, pool_ptr: Some(root), nodes })
    }

    async fn catalogue_node(
        &self,
        tree: node::Tree,
        missing: Missing,
        nodes: &mut Vec<(u32, u32)>,
    ) -> Result<Vec<u8>, PoolError> {
        nodes.push((missing.ptr.place.segment.segment.0, missing.ptr.unit_bytes));
        self.read_catalogue_node(tree, missing).await.map_err(|error| {
            self.damage(format!(
                "node {} of level {} of the {tree:?} tree at {:?}: {error}",
                missing.index, missing.level, missing.ptr.place
            ))
        })
    }

    async fn catalogue_tree(
        &self,
        kind: node::Tree,
        root: TreeRoot,
        nodes: &mut Vec<(u32, u32)>,
    ) -> Result<Tree<Page>, PoolError> {
        let mut tree = Tree::new(root, Meter::default());
        let Some(ptr) = root.ptr else { return Ok(tree) };
        let mut level = root.level;
        let mut at = vec![(0u64, ptr)];
        while level > 0 {
            let mut below = Vec::new();
            for (index, ptr) in at {
                let content = self.catalogue_node(kind, Missing { level, index, ptr }, nodes).await?;
                let inner =
                    Interior::decode(&content).map_err(|e| self.damage(format!("{kind:?} tree: {e}")))?;
                below.extend(
                    inner.iter().map(|(child, ptr)| (index * node::FANOUT as u64 + child as u64, ptr)),
                );
                tree.insert_inner(level, index, Rc::new(inner));
            }
            at = below;
            level -= 1;
        }
        for (index, ptr) in at {
            let content = self.catalogue_node(kind, Missing { level: 0, index, ptr }, nodes).await?;
            tree.insert(index, Page(content));
        }
        Ok(tree)
    }

    /// Takes the pool over: owner epoch, owner block, first domain, tasks.
    async fn start(self: &Rc<Self>) -> Result<(), PoolError> {
        let device = self.descriptor.bdev().name().to_owned();
        self.write_superblock(None, None).await.map_err(io_error(&device, "write of the superblock"))?;
        self.take_ownership().await?;
        self.mend_keys().await?;
        for domain in self.shard.borrow_mut().domains.values_mut() {
            domain.derive_journal(self.uuid, self.epoch.get());
        }
        self.publish();
        self.background(self.clone().run_committer());
        self.background(self.clone().run_heartbeat());
        self.background(self.clone().run_collector());
        let completed = self.complete(&device).await;
        if completed.is_err() {
            // The device is let go of: it can be opened again.
            self.stop_tasks().await;
            self.unpublish();
            self.lanes.borrow_mut().clear();
            self.logs.borrow_mut().clear();
        }
        completed
    }

    /// What an opening does with the tasks running: the first domain, the end of an erasure, the first checkpoint.
    async fn complete(self: &Rc<Self>, device: &str) -> Result<(), PoolError> {
        let replayed = self.journal.borrow().usage().0;
        if self.shard.borrow().domains.is_empty() && self.superblock.borrow().root.is_none() {
            self.add_domain(DEFAULT_DOMAIN)?;
        }
        let default = self.shard.borrow().pool.default_domain;
        // A power cut in between left the record that erased it without the one that names another.
        if self.shard.borrow().domain(default).is_err() {
            self.replace_default(DEFAULT_DOMAIN)?;
        }
        if self.key_block.borrow().erasure[1].is_some() {
            tracing::info!(pool = %self.name(), "an erasure that was cut short is brought to its end");
            self.flush().await.map_err(io_error(device, "flush"))?;
            self.retire_secret().await?;
        }
        if self.superblock.borrow().root.is_none() {
            self.checkpoint().await.map_err(io_error(device, "first checkpoint"))?;
        } else if replayed > 0 {
            // Hosts need not wait for it.
            self.recovered.set(true);
            self.want_checkpoint();
        }
        self.background(self.clone().rebuild_index());
        self.resume_renewal();
        self.background(self.clone().finish_deletions());
        Ok(())
    }

    /// Makes a domain with fresh keys. Durable when the next commit is.
    pub(crate) fn add_domain(&self, name: &str) -> Result<DomainId, PoolError> {
        let id = self.shard.borrow().pool.next_domain;
        let (data, fingerprint) = (random_secret(), random_secret());
        let wrap = |secret: &Secret| {
            self.wraps
                .borrow()
                .wrap(secret)
                .map_err(|reason| PoolError::Key { device: self.handle.base_name.clone(), reason })
        };
        let mut record = DomainRecord::new(id, random_uuid(), name);
        record.keys.push(KeyGeneration {
            generation: Generation(1),
            state: GenerationState::Current,
            data: wrap(&data)?,
            fingerprint: wrap(&fingerprint)?,
        });
        let bytes = record.encode().map_err(|error| PoolError::Invalid(error.to_string()))?;
        self.record(Scope::Pool, &Record::DomainCreate { record: &bytes })
            .map_err(|status| PoolError::Stopped { pool: self.name(), status })?;
        if let Some(domain) = self.shard.borrow_mut().domains.get_mut(&id.0) {
            domain.derive_journal(self.uuid, self.epoch.get());
        }
        Ok(id)
    }

    /// Makes the device of a closed pool forget it.
    pub(crate) async fn wipe(&self) -> Result<(), PoolError> {
        let device = self.handle.base_name.clone();
        for anchor in self.anchors {
            let blank = Buf::zeroes(ANCHOR_BYTES as usize);
            self.base.write(anchor, blank, false).await.map_err(io_error(&device, "write of an anchor"))?;
        }
        self.base.flush().await.map_err(io_error(&device, "flush"))
    }

    /// Makes everything durable and lets go of the device. Volumes are gone from the registry already.
    pub(crate) async fn close(self: &Rc<Self>) -> Result<(), PoolError> {
        let pool = self.name();
        if self.life.get() == Life::Open {
            self.life.set(Life::Closing);
        }
        self.wait_idle().await;
        // An audit ends at its next step.
        drop(self.audits.lock().await);
        self.core.ahead.ended().await;
        let mut result = Ok(());
        if self.life.get() == Life::Closing {
            result = async {
                if let Err(status) = self.recall().await {
                    // Some of what has been recorded is not on the device, and must not be committed.
                    self.fail(status);
                    return Err(status);
                }
                self.flush().await?;
                self.checkpoint().await
            }
            .await;
        }
        let clean = self.life.get() == Life::Closing && result.is_ok();
        if !clean {
            // What other cores have can not become durable any more, but it is not left on its way to the device.
            let _ = self.recall().await;
        }
        self.stop_tasks().await;
        // Not before: a commit that was under way must not find that there is nothing to write out.
        self.end_loans().await;
        if clean {
            result = self.give_up_ownership().await;
        }
        self.unpublish();
        self.lanes.borrow_mut().clear();
        self.logs.borrow_mut().clear();
        result.map_err(|status| PoolError::Stopped { pool, status })
    }

    /// Marks the pool closed, and waits until its committer and its heartbeat have seen it.
    async fn stop_tasks(&self) {
        self.life.set(Life::Closed);
        self.collect.notify_one();
        self.stop_committer().await;
        while !self.heart_stopped.get() {
            // It sleeps for at most half a second.
            reactor::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}
