//! Recovery: the journal's batches, applied in order to the state of the last checkpoint.
//!
//! What the records of the next batches change is loaded ahead, many nodes at once: the device's latency would be most of
//! the time otherwise.
//!
//! Ends at the first batch that is not the next one. That is the journal's end, or damage: if a later batch opens and calls
//! the missing one durable, something that was promised is lost, and the pool is refused instead of quietly forgetting it.

use std::collections::{HashMap, HashSet, VecDeque, hash_map};
use std::rc::Rc;

use cryptfold_reduce_format::block::BLOCK_BYTES;
use cryptfold_reduce_format::entry::{Record, RecordReader};
use cryptfold_reduce_format::ids::{DomainId, Generation, Sequence, ShardIx, VolumeId};
use cryptfold_reduce_format::journal::{
    BatchHeader, BatchSealer, Cursor, JournalEpoch, JournalKey, OpenBatch, Scope,
};
use cryptfold_reduce_format::map::{MAP_ENTRIES, MapEntry};
use cryptfold_reduce_format::node;

use crate::anchors::io_error;
use crate::error::PoolError;
use crate::journal::Journal;
use crate::load::LeafAt;
use crate::pool::Pool;
use crate::shard::{Need, Needs, leaf_of};
use crate::tree::{LEAF_BYTES, Leaf, Tree};

/// Blocks read at once.
const WINDOW_BLOCKS: u64 = 512;
/// Batches, and blocks of them, that are looked at together.
const MOST_BATCHES: usize = 256;
const MOST_BLOCKS: u64 = 256;

/// What the records of a window will change, in their order.
#[derive(Default)]
struct Ahead {
    /// Number of the record in the window, and a leaf that it needs.
    leaves: VecDeque<(usize, LeafAt)>,
    /// Number of the record, and blocks of a volume that it replaces: their chunks' containers are needed, too.
    blocks: VecDeque<(usize, VolumeId, u64, u64)>,
    /// Records that what they need has been loaded for.
    until: usize,
}

impl Ahead {
    fn note(&mut self, at: usize, domain: Option<DomainId>, record: &Record<'_>) {
        let domain = domain.map_or(0, |id| id.0);
        let container = |number| (node::Tree::Containers, domain, number);
        match record {
            Record::FragmentAdd { container: id, .. } => {
                self.leaves.push_back((at, container(id.get())));
                self.leaves.push_back((at, (node::Tree::Fingerprints, domain, id.get())));
            }
            Record::FragmentMove { first, .. } => {
                self.leaves.push_back((at, container(first.container().get())));
            }
            Record::Fingerprints { container: id, .. } => {
                self.leaves.push_back((at, (node::Tree::Fingerprints, domain, id.get())));
            }
            Record::MapSet { volume, lba, runs } => {
                for addr in runs.iter().filter_map(|run| run.first().chunk()) {
                    self.leaves.push_back((at, container(addr.container().get())));
                }
                let count = runs.iter().map(|run| u64::from(run.count())).sum();
                self.note_blocks(at, *volume, lba.0, count);
            }
            Record::MapFill { volume, lba, count, .. } => self.note_blocks(at, *volume, lba.0, *count),
            Record::MapRetarget { volume, leaf, changes } => {
                self.note_blocks(at, *volume, leaf * MAP_ENTRIES as u64, MAP_ENTRIES as u64);
                for addr in changes.iter().filter_map(|change| change.addr()) {
                    self.leaves.push_back((at, container(addr.container().get())));
                }
            }
            _ => {}
        }
    }

    fn note_blocks(&mut self, at: usize, volume: VolumeId, lba: u64, count: u64) {
        if count > 0 {
            for leaf in leaf_of(lba).0..=leaf_of(lba + count - 1).0 {
                self.leaves.push_back((at, (node::Tree::Map, volume.0, leaf)));
            }
            self.blocks.push_back((at, volume, lba, count));
        }
    }
}

type GroupKeys = HashMap<(JournalEpoch, DomainId, Generation), JournalKey>;

fn domain_of(scope: Scope) -> Option<DomainId> {
    match scope {
        Scope::Domain { domain, .. } => Some(domain),
        _ => None,
    }
}

/// The ring, read in windows.
struct Ring<'a> {
    pool: &'a Pool,
    start_bytes: u64,
    blocks: u64,
    /// Ring index and content of the window.
    at: u64,
    window: Vec<u8>,
}

impl Ring<'_> {
    /// The block at `position`.
    async fn block(&mut self, position: u64) -> Result<&[u8], PoolError> {
        let index = position % self.blocks;
        let have = self.window.len() as u64 / BLOCK_BYTES as u64;
        if self.window.is_empty() || index < self.at || index >= self.at + have {
            let count = WINDOW_BLOCKS.min(self.blocks - index);
            let from = self.start_bytes + index * BLOCK_BYTES as u64;
            let device = self.pool.descriptor.bdev().name();
            let data = self.pool.base.read(from, count as usize * BLOCK_BYTES).await;
            self.window = data.map_err(io_error(device, "read of the journal"))?.to_vec();
            self.at = index;
        }
        let from = (index - self.at) as usize * BLOCK_BYTES;
        Ok(&self.window[from..from + BLOCK_BYTES])
    }

    /// `count` blocks from `position` on.
    async fn blocks(&mut self, position: u64, count: u32) -> Result<Vec<u8>, PoolError> {
        let mut bytes = Vec::with_capacity(count as usize * BLOCK_BYTES);
        for n in 0..u64::from(count) {
            bytes.extend_from_slice(self.block(position + n).await?);
        }
        Ok(bytes)
    }
}

impl Pool {
    fn broken(&self, what: String) -> PoolError {
        PoolError::Damaged { device: self.descriptor.bdev().name().to_owned(), what }
    }

    /// Applies the journal, and readies it for this owner.
    pub(crate) async fn replay(self: &Rc<Self>) -> Result<(), PoolError> {
        let entry = self.superblock.borrow().shards[0].clone();
        let mut ring = Ring {
            pool: self,
            start_bytes: entry.start_block * BLOCK_BYTES as u64,
            blocks: entry.blocks.into(),
            at: 0,
            window: Vec::new(),
        };
        let mut cursor = Cursor {
            pool: self.uuid,
            shard: ShardIx(0),
            sequence: entry.tail_sequence,
            position: entry.tail_position,
            chain: entry.tail_chain,
        };
        let mut keys: HashMap<JournalEpoch, JournalKey> = HashMap::new();
        let mut group_keys = HashMap::new();
        let mut batches = 0;
        loop {
            let mut window = Vec::new();
            let from = cursor.position;
            while cursor.position - entry.tail_position < u64::from(entry.blocks)
                && window.len() < MOST_BATCHES
                && cursor.position - from < MOST_BLOCKS
            {
                let Some(batch) = self.next_batch(&mut ring, &cursor, &mut keys).await? else { break };
                cursor = Cursor::after(&batch.header);
                window.push(batch);
            }
            if window.is_empty() {
                break;
            }
            batches += window.len();
            self.apply_window(&mut window, &mut group_keys).await?;
        }
        self.check_tail(&mut ring, &cursor, &mut keys).await?;
        if batches > 0 {
            tracing::info!(pool = %self.name(), batches, blocks = cursor.position - entry.tail_position, "journal replayed");
        }
        let sealer = BatchSealer::new(self.keys.journal(), self.epoch.get(), cursor);
        let approved = self.superblock.borrow().is_approved();
        *self.journal.borrow_mut() = Journal::new(sealer, &entry, entry.tail_position, approved);
        Ok(())
    }

    /// The batch at `cursor`, if it is there and whole.
    async fn next_batch(
        &self,
        ring: &mut Ring<'_>,
        cursor: &Cursor,
        keys: &mut HashMap<JournalEpoch, JournalKey>,
    ) -> Result<Option<OpenBatch>, PoolError> {
        let Ok(header) = BatchHeader::parse(ring.block(cursor.position).await?) else { return Ok(None) };
        if header.follows(cursor).is_err() {
            return Ok(None);
        }
        self.open_batch(ring, &header, keys).await
    }

    async fn open_batch(
        &self,
        ring: &mut Ring<'_>,
        header: &BatchHeader,
        keys: &mut HashMap<JournalEpoch, JournalKey>,
    ) -> Result<Option<OpenBatch>, PoolError> {
        if u64::from(header.blocks) > ring.blocks {
            return Ok(None);
        }
        let bytes = ring.blocks(header.position, header.blocks).await?;
        let epoch = JournalEpoch::of(header);
        let key = keys.entry(epoch).or_insert_with(|| JournalKey::derive(self.keys.journal(), epoch));
        Ok(OpenBatch::open(&bytes, key).ok())
    }

    /// Looks for a later batch that calls the missing one durable.
    async fn check_tail(
        &self,
        ring: &mut Ring<'_>,
        cursor: &Cursor,
        keys: &mut HashMap<JournalEpoch, JournalKey>,
    ) -> Result<(), PoolError> {
        for distance in 0..ring.blocks {
            let position = cursor.position + distance;
            let Ok(header) = BatchHeader::parse(ring.block(position).await?) else { continue };
            let later = header.pool == cursor.pool
                && header.shard == cursor.shard
                && header.sequence >= cursor.sequence
                && header.position == position
                && header.durable >= cursor.sequence;
            if later && self.open_batch(ring, &header, keys).await?.is_some() {
                return Err(self.broken(format!(
                    "journal batch {} at block {} of the ring is missing or damaged, but batch {} says that it was durable",
                    cursor.sequence,
                    cursor.position % ring.blocks,
                    header.sequence
                )));
            }
        }
        Ok(())
    }

    /// Applies batches in order; what they need is loaded ahead.
    async fn apply_window(
        self: &Rc<Self>,
        window: &mut [OpenBatch],
        keys: &mut GroupKeys,
    ) -> Result<(), PoolError> {
        let mut ahead = Ahead::default();
        let mut records = 0;
        for batch in &mut *window {
            let scopes: Vec<Scope> = batch.scopes().collect();
            for (at, scope) in scopes.into_iter().enumerate() {
                let Some(group) = self.open_group(batch, at, scope, keys)? else { continue };
                // One that makes no sense ends the second look with an error.
                for record in group.flatten() {
                    ahead.note(records, domain_of(scope), &record);
                    records += 1;
                }
            }
        }
        let mut done = 0;
        for batch in window {
            let sequence = batch.header.sequence;
            let scopes: Vec<Scope> = batch.scopes().collect();
            for (at, scope) in scopes.into_iter().enumerate() {
                let Some(group) = self.open_group(batch, at, scope, keys)? else { continue };
                for record in group {
                    let record =
                        record.map_err(|error| self.broken(format!("journal batch {sequence}: {error}")))?;
                    if done == ahead.until {
                        self.load_ahead_of(&mut ahead).await;
                    }
                    self.replay_record(scope, &record, sequence).await?;
                    done += 1;
                }
            }
        }
        Ok(())
    }

    /// The records of a group; `None`: its domain is erased, and they are gone with it.
    fn open_group<'b>(
        &self,
        batch: &'b mut OpenBatch,
        at: usize,
        scope: Scope,
        keys: &mut GroupKeys,
    ) -> Result<Option<RecordReader<'b>>, PoolError> {
        let epoch = JournalEpoch::of(&batch.header);
        let key = match scope {
            Scope::Pool => None,
            Scope::Domain { domain, generation } | Scope::Host { domain, generation, .. } => {
                let id = (epoch, domain, generation);
                if let hash_map::Entry::Vacant(vacant) = keys.entry(id) {
                    let shard = self.shard.borrow();
                    let data = shard.domains.get(&domain.0).and_then(|d| d.data.get(&generation));
                    let Some(data) = data else { return Ok(None) };
                    vacant.insert(JournalKey::derive(&data.journal_root(self.uuid), epoch));
                }
                keys.get(&id)
            }
        };
        batch.records(at, key).map(Some).map_err(|error| self.broken(error.to_string()))
    }

    /// Loads what the next records of a window need, as much as a quarter of the cache holds. A hint: what goes wrong here
    /// comes again, and is reported, when the record itself is applied.
    async fn load_ahead_of(self: &Rc<Self>, ahead: &mut Ahead) {
        let most = (self.cache_bytes / 4 / LEAF_BYTES).max(16);
        let mut wanted = HashSet::new();
        let mut until = usize::MAX;
        // Half of them: the containers of what is replaced come on top.
        while let Some((at, leaf)) = ahead.leaves.front().copied() {
            if wanted.len() >= most / 2 && at > ahead.until {
                until = at;
                break;
            }
            wanted.insert(leaf);
            ahead.leaves.pop_front();
        }
        ahead.until = until;
        self.load_together(wanted.drain()).await;
        while let Some((at, volume, lba, count)) = ahead.blocks.front().copied() {
            if at >= until {
                break;
            }
            ahead.blocks.pop_front();
            let shard = self.shard.borrow();
            let Ok(v) = shard.volume(volume) else { continue };
            for leaf in leaf_of(lba).0..=leaf_of(lba + count - 1).0 {
                let Some(entries) = v.tree.peek(leaf) else { continue };
                let first = leaf * MAP_ENTRIES as u64;
                for block in lba.max(first)..(lba + count).min(first + MAP_ENTRIES as u64) {
                    if let Some(addr) = entries.get((block - first) as usize).chunk()
                        && wanted.len() < most
                    {
                        let number = addr.container().get();
                        wanted.insert((node::Tree::Containers, v.record.domain.0, number));
                    }
                }
            }
        }
        self.load_together(wanted.drain()).await;
    }

    async fn replay_record(
        &self,
        scope: Scope,
        record: &Record<'_>,
        sequence: Sequence,
    ) -> Result<(), PoolError> {
        let mut pins = self.pins();
        loop {
            let mut needs = Needs::new();
            self.needs_of_record(scope, record, &mut needs)
                .map_err(|error| self.broken(format!("journal batch {sequence}: {error}")))?;
            if needs.is_empty() {
                break;
            }
            self.load_all(needs, &mut pins).await.map_err(|status| {
                self.broken(format!("metadata that journal batch {sequence} changes: {status}"))
            })?;
        }
        self.shard
            .borrow_mut()
            .apply(scope, record, &self.wraps.borrow(), sequence)
            .map_err(|error| self.broken(format!("journal batch {sequence}: {error}")))
    }

    fn needs_of_record(
        &self,
        scope: Scope,
        record: &Record<'_>,
        needs: &mut Needs,
    ) -> Result<(), crate::shard::ApplyError> {
        let shard = self.shard.borrow();
        let domain = domain_of(scope);
        match record {
            Record::FragmentAdd { container, .. } => {
                if let Some(d) = domain.and_then(|id| shard.domains.get(&id.0)) {
                    need(&d.containers, d.record.id.0, container.get(), needs);
                    need(&d.fingerprints, d.record.id.0, container.get(), needs);
                }
            }
            Record::FragmentMove { first, .. } => {
                if let Some(d) = domain.and_then(|id| shard.domains.get(&id.0)) {
                    need(&d.containers, d.record.id.0, first.container().get(), needs);
                }
            }
            Record::Fingerprints { container, .. } => {
                if let Some(d) = domain.and_then(|id| shard.domains.get(&id.0)) {
                    need(&d.fingerprints, d.record.id.0, container.get(), needs);
                }
            }
            Record::MapSet { volume, lba, runs } => {
                let count = runs.iter().map(|run| u64::from(run.count())).sum();
                shard.needs_of_fill(*volume, lba.0, count, needs)?;
                let domain = shard.volume(*volume)?.record.domain;
                let entries: Vec<MapEntry> = runs.iter().flat_map(|run| run.entries()).collect();
                shard.needs_of_set(domain, &entries, needs)?;
            }
            Record::MapFill { volume, lba, count, .. } => {
                shard.needs_of_fill(*volume, lba.0, *count, needs)?
            }
            Record::MapMerge { volume, leaf, count } => {
                for leaf in *leaf..leaf + u64::from(*count) {
                    shard.needs_of_merge(*volume, leaf, needs)?;
                }
            }
            Record::MapRetarget { volume, leaf, changes } => {
                shard.needs_of_retarget(*volume, *leaf, changes, needs)?;
            }
            Record::MapOwn { volume, leaf, count, from } => {
                for leaf in *leaf..leaf + u64::from(*count) {
                    shard.needs_of_own(*volume, leaf, *from, needs)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

fn need<L: Leaf>(tree: &Tree<L>, owner: u32, index: u64, needs: &mut Needs) {
    if let Some(missing) = tree.locate(index) {
        needs.push(Need::Node { tree: L::TREE, owner, missing });
    }
}
