//! Checkpoints: the state as of a journal batch, written copy-on-write beside the last one, and switched to by the
//! superblock.
//!
//! Order: nodes of volumes and domains (leaves, then interior nodes up to the roots), catalogue pages, segment table
//! pages, the pool record; a flush; two copies of the superblock; a flush. Only then do the replaced nodes become dead,
//! their segments free, and the journal's tail moves. A power cut before leaves the last checkpoint and its journal intact.
//!
//! Live bytes of the pool's own metadata segments are not stored (they would change while the table is written): whoever
//! opens the pool reads all nodes of the catalogue anyway and adds them up.

use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::container::{Container, Fingerprints};
use cryptfold_reduce_format::ids::{DeviceIx, DomainId, Epoch, POOL_DOMAIN, Sequence, VolumeId};
use cryptfold_reduce_format::journal::Cursor;
use cryptfold_reduce_format::map::MapLeaf;
use cryptfold_reduce_format::node::{self, FANOUT, Interior, NodeId, NodePtr};
use cryptfold_reduce_format::record::{
    DomainRecord, PoolCounters, PoolRecord, RECORDS_PER_PAGE, TreeRoot, VolumeRecord, encode_page,
};
use cryptfold_reduce_format::segtable::{self, SEGMENTS_PER_LEAF, SegmentEntry};
use cryptfold_reduce_format::superblock::copies_of;

use crate::meta::{Meta, Work};
use crate::pool::Pool;
use crate::tree::{self, Frozen as FrozenTree, Installed, Leaf, Page, Tree};

/// Nodes written before others may run.
const YIELD_EVERY: usize = 8;

/// The state as of a batch.
pub(crate) struct Frozen {
    cursor: Cursor,
    as_of: Sequence,
    pool: PoolRecord,
    volumes: Vec<(VolumeRecord, FrozenTree<MapLeaf>)>,
    domains: Vec<(DomainRecord, FrozenTree<Container>, FrozenTree<Fingerprints>)>,
    gone: Vec<(VolumeId, DomainId, TreeRoot)>,
    segments: Vec<SegmentEntry>,
    pages: Vec<usize>,
}

/// What to install once the checkpoint is durable.
#[derive(Default)]
struct Done {
    maps: Vec<(VolumeId, Installed)>,
    containers: Vec<(DomainId, Installed)>,
    fingerprints: Vec<(DomainId, Installed)>,
    catalogue: Vec<(node::Tree, Installed)>,
    /// Catalogue pages that were frozen.
    frozen: Vec<(node::Tree, Vec<u64>)>,
}

impl Pool {
    /// Takes the state as it is. Between a commit's cut and this nothing may run.
    pub(crate) fn freeze(&self) -> Frozen {
        let mut shard = self.shard.borrow_mut();
        let shard = &mut *shard;
        let cursor = self.journal.borrow().cursor().clone();
        let as_of = Sequence(cursor.sequence.0 - 1);
        shard.segments.set_aside(shard.meter.dirty_bytes.get());
        let volumes = shard.volumes.values_mut().map(|v| (v.to_record(), v.tree.freeze())).collect();
        let domains = shard
            .domains
            .values_mut()
            .map(|d| (d.to_record(), d.containers.freeze(), d.fingerprints.freeze()))
            .collect();
        // What an audit has not seen yet stays for the next one.
        let gone = shard.gone.values().filter(|v| !v.tree.has_changed());
        let gone = gone.map(|v| (v.record.id, v.record.domain, v.tree.root())).collect();
        let mut pool = shard.pool.clone();
        pool.counters = PoolCounters {
            logical_bytes: shard.volumes.values().map(|v| (v.chunks + v.special) * 4096).sum(),
            unique_bytes: shard.domains.values().map(|d| d.unique * 4096).sum(),
            stored_bytes: shard.domains.values().map(|d| d.stored_bytes).sum(),
            metadata_bytes: shard.segments.live_meta_bytes,
        };
        let segments = shard.segments.entries().copied().collect();
        Frozen {
            cursor,
            as_of,
            pool,
            volumes,
            domains,
            gone,
            segments,
            pages: shard.segments.take_dirty_pages(),
        }
    }

    /// Writes a frozen state and switches to it.
    pub(crate) async fn write_checkpoint(&self, frozen: Frozen) -> Result<(), Status> {
        let mut meta = self.meta.lock().await;
        let mut work = Work::new(frozen.as_of);
        let started = reactor::now();
        let mut done = Done::default();
        let written = self.write_state(&mut meta, &mut work, &mut done, &frozen).await;
        self.shard.borrow_mut().segments.give_back();
        match written {
            Ok(root) => {
                self.install(&mut meta, &work, &frozen, done, root);
                tracing::debug!(
                    pool = %self.name(), batch = frozen.as_of.0, nodes = work.nodes, bytes = work.bytes,
                    free_segments = self.shard.borrow().segments.free_count(), dirty_bytes = self.dirty_bytes(),
                    ms = (reactor::now() - started).as_millis() as u64, "checkpoint"
                );
                Ok(())
            }
            Err(status) => {
                self.thaw(&mut meta, &work, &done, &frozen);
                Err(status)
            }
        }
    }

    async fn write_state(
        &self,
        meta: &mut Meta,
        work: &mut Work,
        done: &mut Done,
        frozen: &Frozen,
    ) -> Result<NodePtr, Status> {
        let mut record = frozen.pool.clone();
        let birth = record.epoch;
        let mut volumes = Vec::with_capacity(frozen.volumes.len());
        for (volume, tree) in &frozen.volumes {
            let log = if frozen.domains.iter().any(|d| d.0.id == volume.domain) {
                volume.domain
            } else {
                POOL_DOMAIN
            };
            let installed =
                self.write_tree(meta, work, node::Tree::Map, volume.id.0, log, birth, tree).await?;
            let record = VolumeRecord { map: installed.root, ..volume.clone() };
            volumes.push((volume.id.0, encoded(record.encode())?));
            done.maps.push((volume.id, installed));
        }
        let mut domains = Vec::with_capacity(frozen.domains.len());
        for (domain, containers, fingerprints) in &frozen.domains {
            let (id, owner) = (domain.id, domain.id.0);
            let c = self.write_tree(meta, work, node::Tree::Containers, owner, id, birth, containers).await?;
            let f =
                self.write_tree(meta, work, node::Tree::Fingerprints, owner, id, birth, fingerprints).await?;
            let mut record = domain.clone();
            for shard in &mut record.shards {
                (shard.containers, shard.fingerprints) = (c.root, f.root);
            }
            domains.push((owner, encoded(record.encode())?));
            done.containers.push((id, c));
            done.fingerprints.push((id, f));
        }
        for &(volume, _, root) in &frozen.gone {
            self.give_back_tree(work, volume.0, root).await?;
        }
        record.domains = self.write_catalogue(meta, work, done, node::Tree::Domains, birth, &domains).await?;
        record.volumes = self.write_catalogue(meta, work, done, node::Tree::Volumes, birth, &volumes).await?;
        let segments = self.write_segments(meta, work, done, birth, frozen).await?;
        record.segments = vec![(DeviceIx(0), segments)];
        if let Some(old) = meta.pool_ptr {
            work.replaced(self, &old);
        }
        let id = NodeId { tree: node::Tree::Pool, owner: 0, level: 0, index: 0 };
        let root = meta.append(self, work, POOL_DOMAIN, id, birth, &encoded(record.encode())?).await?;
        meta.write_all(self).await?;
        self.base.flush().await?;
        self.write_superblock(Some(root), Some(&frozen.cursor)).await?;
        Ok(root)
    }

    /// Pages of domain or volume records: all of them, they are few.
    async fn write_catalogue(
        &self,
        meta: &mut Meta,
        work: &mut Work,
        done: &mut Done,
        kind: node::Tree,
        birth: Epoch,
        records: &[(u32, Vec<u8>)],
    ) -> Result<TreeRoot, Status> {
        let tree = if kind == node::Tree::Domains { &mut meta.domains } else { &mut meta.volumes };
        let before = tree.leaf_indices();
        let mut pages: Vec<(u64, Page)> = Vec::new();
        for group in records.chunk_by(|a, b| a.0 / RECORDS_PER_PAGE == b.0 / RECORDS_PER_PAGE) {
            pages.push((u64::from(group[0].0 / RECORDS_PER_PAGE), Page(encoded(encode_page(group))?)));
        }
        for index in before {
            tree.clear(index);
        }
        for (index, page) in pages {
            *tree.get_mut(index) = page;
        }
        let frozen = tree.freeze();
        done.frozen.push((kind, frozen.indices()));
        let installed = self.write_tree(meta, work, kind, 0, POOL_DOMAIN, birth, &frozen).await?;
        let root = installed.root;
        done.catalogue.push((kind, installed));
        Ok(root)
    }

    /// Pages of the segment table: those that changed, with this checkpoint's own metadata segments in them.
    async fn write_segments(
        &self,
        meta: &mut Meta,
        work: &mut Work,
        done: &mut Done,
        birth: Epoch,
        frozen: &Frozen,
    ) -> Result<TreeRoot, Status> {
        // From here on only the pool's own segments are appended to, and those that it may need are open already.
        let most = frozen.segments.len().div_ceil(SEGMENTS_PER_LEAF) + 2;
        let interior = 4 * FANOUT * node::PTR_BYTES;
        meta.reserve(self, work, most * (SEGMENTS_PER_LEAF * 32 + 128) + interior + 16384).await?;
        let touched = work.entries.keys().map(|&number| number as usize / SEGMENTS_PER_LEAF);
        let mut pages: Vec<usize> = frozen.pages.iter().copied().chain(touched).collect();
        pages.sort_unstable();
        pages.dedup();
        for page in pages {
            let first = page * SEGMENTS_PER_LEAF;
            let last = (first + SEGMENTS_PER_LEAF).min(frozen.segments.len());
            let entries: Vec<SegmentEntry> = (first..last)
                .map(|number| {
                    let mut entry =
                        work.entries.get(&(number as u32)).copied().unwrap_or(frozen.segments[number]);
                    if entry.class.is_some() && entry.domain == POOL_DOMAIN {
                        entry.live_bytes = 0;
                    }
                    entry
                })
                .collect();
            *meta.segments.get_mut(page as u64) = Page(segtable::encode_leaf(&entries));
        }
        let tree = meta.segments.freeze();
        done.frozen.push((node::Tree::Segments, tree.indices()));
        let installed =
            self.write_tree(meta, work, node::Tree::Segments, 0, POOL_DOMAIN, birth, &tree).await?;
        let root = installed.root;
        done.catalogue.push((node::Tree::Segments, installed));
        Ok(root)
    }

    /// Writes the changed leaves of a tree and the interior nodes above them.
    #[allow(clippy::too_many_arguments)]
    async fn write_tree<L: Leaf>(
        &self,
        meta: &mut Meta,
        work: &mut Work,
        kind: node::Tree,
        owner: u32,
        log: DomainId,
        birth: Epoch,
        frozen: &FrozenTree<L>,
    ) -> Result<Installed, Status> {
        let mut installed = Installed { root: frozen.root, ..Installed::default() };
        installed.leaves = frozen.indices();
        let Some(&(last, _)) = frozen.leaves.last() else { return Ok(installed) };
        let id = |level, index| NodeId { tree: kind, owner: owner.into(), level, index };
        let old = frozen.root;
        let mut changes: Vec<(u64, Option<NodePtr>)> = Vec::with_capacity(frozen.leaves.len());
        for (n, (index, leaf)) in frozen.leaves.iter().enumerate() {
            if let Some(before) = self.stored_pointer(meta, kind, owner, old, 0, *index).await? {
                work.replaced(self, &before);
            }
            let ptr = match leaf {
                Some(leaf) => Some(meta.append(self, work, log, id(0, *index), birth, &leaf.encode()).await?),
                None => None,
            };
            changes.push((*index, ptr));
            if n % YIELD_EVERY == YIELD_EVERY - 1 {
                reactor::yield_now().await;
            }
        }
        let top = tree::level_for(last).max(if old.ptr.is_some() { old.level } else { 0 });
        for level in 0..top {
            if level == old.level
                && let Some(root) = old.ptr
                && changes.first().is_none_or(|change| change.0 != 0)
            {
                // The old root becomes the first child of a new one.
                changes.insert(0, (0, Some(root)));
            }
            let mut above = Vec::new();
            for group in changes.chunk_by(|a, b| a.0 / FANOUT as u64 == b.0 / FANOUT as u64) {
                let parent = group[0].0 / FANOUT as u64;
                let before = self.stored_inner(meta, kind, owner, old, level + 1, parent).await?;
                if let Some(ptr) = self.stored_pointer(meta, kind, owner, old, level + 1, parent).await? {
                    work.replaced(self, &ptr);
                }
                let mut node = before.map_or_else(Interior::default, |node| (*node).clone());
                for (index, ptr) in group {
                    node.set((index % FANOUT as u64) as usize, ptr.as_ref());
                }
                let empty = node.iter().next().is_none();
                let ptr = match empty {
                    true => None,
                    false => {
                        Some(meta.append(self, work, log, id(level + 1, parent), birth, node.encode()).await?)
                    }
                };
                installed.inner.push(((level + 1, parent), (!empty).then(|| Rc::new(node))));
                above.push((parent, ptr));
            }
            changes = above;
        }
        installed.root = match changes.first() {
            Some(&(_, Some(ptr))) => TreeRoot { ptr: Some(ptr), level: top },
            _ => TreeRoot::default(),
        };
        Ok(installed)
    }

    /// The last checkpoint's pointer to a node, loading interior nodes on the way.
    async fn stored_pointer(
        &self,
        meta: &Meta,
        kind: node::Tree,
        owner: u32,
        old: TreeRoot,
        level: u8,
        index: u64,
    ) -> Result<Option<NodePtr>, Status> {
        let Some(root) = old.ptr else { return Ok(None) };
        if level > old.level || index >> (8 * u32::from(old.level - level)) != 0 {
            return Ok(None);
        }
        if level == old.level {
            return Ok(Some(root));
        }
        let parent = self.stored_inner(meta, kind, owner, old, level + 1, index / FANOUT as u64).await?;
        Ok(parent.and_then(|node| node.get((index % FANOUT as u64) as usize)))
    }

    async fn stored_inner(
        &self,
        meta: &Meta,
        kind: node::Tree,
        owner: u32,
        old: TreeRoot,
        level: u8,
        index: u64,
    ) -> Result<Option<Rc<Interior>>, Status> {
        if old.ptr.is_none() || level > old.level {
            return Ok(None);
        }
        match kind {
            node::Tree::Domains => Ok(meta.domains.inner(level, index)),
            node::Tree::Volumes => Ok(meta.volumes.inner(level, index)),
            node::Tree::Segments => Ok(meta.segments.inner(level, index)),
            _ => self.load_inner(kind, owner, level, index).await,
        }
    }

    /// All nodes of a tree that is gone become dead. Leaves are not read, only the pointers to them.
    async fn give_back_tree(&self, work: &mut Work, owner: u32, root: TreeRoot) -> Result<(), Status> {
        let Some(ptr) = root.ptr else { return Ok(()) };
        work.replaced(self, &ptr);
        let mut level = root.level;
        let mut nodes = vec![0u64];
        while level > 0 {
            let mut below = Vec::new();
            for index in nodes {
                let Some(node) = self.load_inner(node::Tree::Map, owner, level, index).await? else {
                    continue;
                };
                for (child, ptr) in node.iter() {
                    work.replaced(self, &ptr);
                    below.push(index * FANOUT as u64 + child as u64);
                }
            }
            nodes = below;
            level -= 1;
        }
        Ok(())
    }

    /// Writes the next superblock generation to its two copies, and makes it durable.
    pub(crate) async fn write_superblock(
        &self,
        root: Option<NodePtr>,
        cursor: Option<&Cursor>,
    ) -> Result<(), Status> {
        let mut next = self.superblock.borrow().clone();
        next.generation += 1;
        next.owner_epoch = self.epoch.get().owner_epoch;
        if let Some(root) = root {
            next.root = Some(root);
        }
        if let (Some(cursor), Some(shard)) = (cursor, next.shards.first_mut()) {
            shard.tail_position = cursor.position;
            shard.tail_sequence = cursor.sequence;
            shard.tail_chain = cursor.chain;
        }
        for copy in copies_of(next.generation) {
            let at = self.anchors[copy];
            let block = next.encode(self.keys.block(), copy as u16, at).map_err(|error| {
                tracing::error!(pool = %self.name(), %error, "the superblock can not be encoded");
                Status::INTERNAL_ERROR
            })?;
            // Which generation counts is not known when this fails half-way, so nothing may go on then.
            self.base.write_block(at, &block, false).await.inspect_err(|status| self.fail(*status))?;
        }
        self.base.flush().await.inspect_err(|status| self.fail(*status))?;
        *self.superblock.borrow_mut() = next;
        Ok(())
    }

    fn install(&self, meta: &mut Meta, work: &Work, frozen: &Frozen, done: Done, root: NodePtr) {
        meta.pool_ptr = Some(root);
        for (kind, installed) in done.catalogue {
            catalogue_tree(meta, kind).install(installed);
        }
        let mut shard = self.shard.borrow_mut();
        let shard = &mut *shard;
        for (id, installed) in done.maps {
            let volume = match shard.volumes.get_mut(&id.0) {
                Some(volume) => Some(volume),
                None => shard.gone.get_mut(&id.0),
            };
            if let Some(volume) = volume {
                volume.tree.install(installed);
            }
        }
        for (id, installed) in done.containers {
            if let Some(domain) = shard.domains.get_mut(&id.0) {
                domain.containers.install(installed);
            }
        }
        for (id, installed) in done.fingerprints {
            if let Some(domain) = shard.domains.get_mut(&id.0) {
                domain.fingerprints.install(installed);
            }
        }
        for (id, _, _) in &frozen.gone {
            shard.gone.remove(&id.0);
        }
        let entries: Vec<(u32, SegmentEntry)> = work.entries.iter().map(|(n, entry)| (*n, *entry)).collect();
        shard.segments.install(&entries, &meta.still_open());
        self.journal.borrow_mut().set_tail(frozen.cursor.position);
    }

    fn thaw(&self, meta: &mut Meta, work: &Work, done: &Done, frozen: &Frozen) {
        for (kind, indices) in &done.frozen {
            catalogue_tree(meta, *kind).thaw(indices);
        }
        let mut shard = self.shard.borrow_mut();
        let shard = &mut *shard;
        for (record, tree) in &frozen.volumes {
            if let Some(volume) = shard.volumes.get_mut(&record.id.0) {
                volume.tree.thaw(&tree.indices());
            }
        }
        for (record, containers, fingerprints) in &frozen.domains {
            if let Some(domain) = shard.domains.get_mut(&record.id.0) {
                domain.containers.thaw(&containers.indices());
                domain.fingerprints.thaw(&fingerprints.indices());
            }
        }
        shard.segments.redirty(&frozen.pages);
        // Segments of earlier checkpoints stay what they were; those that this one opened hold nothing.
        let abandoned = meta.abandon();
        for number in abandoned.into_iter().chain(work.opened.iter().copied()) {
            shard.segments.release(number);
        }
    }
}

fn catalogue_tree(meta: &mut Meta, kind: node::Tree) -> &mut Tree<Page> {
    match kind {
        node::Tree::Domains => &mut meta.domains,
        node::Tree::Volumes => &mut meta.volumes,
        _ => &mut meta.segments,
    }
}

fn encoded<T>(result: Result<T, cryptfold_reduce_format::wire::WireError>) -> Result<T, Status> {
    result.map_err(|error| {
        tracing::error!(%error, "a catalogue record can not be encoded");
        Status::INTERNAL_ERROR
    })
}
