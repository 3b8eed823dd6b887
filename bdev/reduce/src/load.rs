//! Brings nodes and segment handles to RAM.
//!
//! Owns the table of loads under way: whoever needs a node that is being loaded waits for it instead of reading it again.
//! A node that does not verify fails those who need it and nobody else, and is reported once per place.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reactor::sync::Event;
use cryptfold_reduce_format::container::{Container, Fingerprints};
use cryptfold_reduce_format::ids::{DomainId, POOL_DOMAIN};
use cryptfold_reduce_format::node::{self, Expected, Interior, NodePtr};
use cryptfold_reduce_format::sealed::SegmentKey;
use cryptfold_reduce_format::segment::SegmentHeader;
use smallvec::SmallVec;

use crate::pool::Pool;
use crate::segments::Segment;
use crate::shard::{Domain, Need, Needs};
use crate::tree::{AnyTree, Leaf, Missing, Tree};

/// What is being loaded.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum LoadKey {
    Node(u8, u32, u8, u64),
    Segment(u32),
}

/// A leaf: tree, owner, index.
pub(crate) type LeafAt = (node::Tree, u32, u64);

/// Leaves that are loaded at once by [`Pool::load_together`].
const TOGETHER: usize = 64;

/// What a container has.
pub(crate) type Lists = (Rc<Container>, Rc<Fingerprints>);

/// Why a node is not usable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    /// The device did not give it.
    #[error("{0}")]
    Io(Status),
    /// It does not verify or makes no sense.
    #[error("{0}")]
    Damaged(String),
}

/// Leaves kept in RAM while somebody collects what they need; gives them free when dropped.
pub(crate) struct Pins<'p> {
    pool: &'p Pool,
    list: SmallVec<[LeafAt; 8]>,
}

impl Drop for Pins<'_> {
    fn drop(&mut self) {
        for &(tree, owner, index) in &self.list {
            self.pool.with_tree(tree, owner, |tree| tree.unpin(index));
        }
    }
}

impl Pool {
    /// Runs `f` on a tree of the shard, if there is one of that kind and owner.
    pub(crate) fn with_tree<R>(
        &self,
        tree: node::Tree,
        owner: u32,
        f: impl FnOnce(&mut dyn AnyTree) -> R,
    ) -> Option<R> {
        let mut shard = self.shard.borrow_mut();
        let shard = &mut *shard;
        let found: &mut dyn AnyTree = match tree {
            node::Tree::Map => match shard.volumes.get_mut(&owner) {
                Some(volume) => &mut volume.tree,
                None => &mut shard.gone.get_mut(&owner)?.tree,
            },
            node::Tree::Containers => &mut shard.domains.get_mut(&owner)?.containers,
            node::Tree::Fingerprints => &mut shard.domains.get_mut(&owner)?.fingerprints,
            _ => return None,
        };
        Some(f(found))
    }

    /// A place to keep leaves pinned while loading more.
    pub(crate) fn pins(&self) -> Pins<'_> {
        Pins { pool: self, list: SmallVec::new() }
    }

    /// Loads everything that `needs` names, and pins the leaves among it.
    pub(crate) async fn load_all(&self, needs: Needs, pins: &mut Pins<'_>) -> Result<(), Status> {
        for need in needs {
            match need {
                Need::Segment(number) => drop(self.segment(number).await?),
                Need::Node { tree, owner, missing } if missing.level == 0 => {
                    self.load_leaf(tree, owner, missing.index, pins).await?;
                }
                Need::Node { tree, owner, missing } => {
                    self.load_node(tree, owner, missing.level, missing.index).await?;
                }
            }
        }
        Ok(())
    }

    /// Brings a leaf to RAM, with the interior nodes on the way, and keeps it there as long as `pins` lives. Absent leaves
    /// are fine.
    pub(crate) async fn load_leaf(
        &self,
        tree: node::Tree,
        owner: u32,
        index: u64,
        pins: &mut Pins<'_>,
    ) -> Result<(), Status> {
        loop {
            let ready = self.with_tree(tree, owner, |tree| {
                let ready = tree.is_ready(index);
                if ready {
                    tree.pin(index);
                }
                ready
            });
            match ready {
                Some(true) => {
                    pins.list.push((tree, owner, index));
                    return Ok(());
                }
                Some(false) => self.load_node(tree, owner, 0, index).await?,
                None => return Ok(()),
            }
        }
    }

    /// Brings leaves to RAM, many at once, as a hint: errors are left for whoever needs the leaf, and nothing keeps them there.
    pub(crate) async fn load_together(self: &Rc<Self>, leaves: impl IntoIterator<Item = LeafAt>) {
        let away = |&(tree, owner, index): &LeafAt| {
            self.with_tree(tree, owner, |tree| !tree.is_ready(index)).unwrap_or(false)
        };
        let wanted: Rc<RefCell<Vec<LeafAt>>> =
            Rc::new(RefCell::new(leaves.into_iter().filter(away).collect()));
        // In the order of the device, about: what was written together is read together.
        wanted.borrow_mut().sort_unstable_by_key(|&(tree, owner, index)| (tree as u8, owner, Reverse(index)));
        let count = TOGETHER.min(wanted.borrow().len());
        let workers: Vec<_> = (0..count)
            .map(|_| {
                let (pool, wanted) = (self.clone(), wanted.clone());
                reactor::spawn_local(async move {
                    loop {
                        let Some((tree, owner, index)) = wanted.borrow_mut().pop() else { return };
                        // Dropped at once: a pin would keep the leaf only.
                        let mut pins = pool.pins();
                        let _ = pool.load_leaf(tree, owner, index, &mut pins).await;
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.await;
        }
    }

    /// Brings node (`level`, `index`) nearer: loads it, or the interior node on the way that is missing.
    async fn load_node(&self, tree: node::Tree, owner: u32, level: u8, index: u64) -> Result<(), Status> {
        // The pointer is looked up now, not taken from whoever found the node missing: a checkpoint may have moved it.
        let Some(Some(missing)) = self.with_tree(tree, owner, |t| t.missing(level, index)) else {
            return Ok(());
        };
        let key = LoadKey::Node(tree as u8, owner, missing.level, missing.index);
        let waiting = self.loading.borrow().get(&key).cloned();
        if let Some(event) = waiting {
            event.wait().await;
            return Ok(());
        }
        let event = Rc::new(Event::new());
        self.loading.borrow_mut().insert(key, event.clone());
        let result = self.read_node(tree, owner.into(), missing).await;
        self.loading.borrow_mut().remove(&key);
        event.set();
        let now = self.with_tree(tree, owner, |t| t.missing(missing.level, missing.index));
        if !matches!(now, Some(Some(now)) if now.ptr == missing.ptr) {
            // It moved, or came by another way: the caller looks again.
            return Ok(());
        }
        let content = result.map_err(|error| self.report(tree, owner.into(), &missing, error))?;
        // Before it goes in, so that it does not go at once.
        self.keep_budget();
        let put = self.with_tree(tree, owner, |tree| {
            if missing.level == 0 {
                tree.insert_content(missing.index, &content)
            } else {
                let node = Interior::decode(&content).map_err(|error| error.to_string())?;
                tree.insert_inner(missing.level, missing.index, Rc::new(node));
                Ok(())
            }
        });
        if let Some(Err(error)) = put {
            return Err(self.report(tree, owner.into(), &missing, NodeError::Damaged(error)));
        }
        Ok(())
    }

    /// Reads and verifies a node; gives its content.
    pub(crate) async fn read_node(
        &self,
        tree: node::Tree,
        owner: u64,
        missing: Missing,
    ) -> Result<Vec<u8>, NodeError> {
        let ptr = missing.ptr;
        let segment = self.segment(ptr.place.segment.segment.0).await.map_err(NodeError::Io)?;
        let at = segment.start_bytes + u64::from(ptr.place.offset);
        let unit = self.base.read(at, ptr.unit_bytes as usize).await.map_err(NodeError::Io)?;
        let expected = Expected { tree, owner: Some(owner), level: missing.level, index: missing.index };
        let mut plain = Vec::new();
        let mut decoder = self.core.decoder.borrow_mut();
        node::open_node(&segment.key, &ptr, &expected, &unit, None, &mut decoder.codec, &mut plain)
            .map_err(|error| NodeError::Damaged(error.to_string()))?;
        Ok(plain)
    }

    /// As [`Pool::read_node`] for nodes of the pool's own domain, before the segment table is known.
    pub(crate) async fn read_catalogue_node(
        &self,
        tree: node::Tree,
        missing: Missing,
    ) -> Result<Vec<u8>, NodeError> {
        let number = missing.ptr.place.segment.segment.0;
        if self.shard.borrow().segments.handle(number).is_none() {
            let (start, addr) = {
                let shard = self.shard.borrow();
                if number >= shard.segments.len() {
                    return Err(NodeError::Damaged(format!("there is no segment {number}")));
                }
                (shard.segments.start_bytes(number), shard.segments.addr(number))
            };
            let block = self.base.read_block(start).await.map_err(NodeError::Io)?;
            let header = SegmentHeader::open(&block, addr, start, self.keys.block())
                .map_err(|error| NodeError::Damaged(format!("header of segment {number}: {error}")))?;
            let key = SegmentKey::derive(self.keys.data(), &header);
            self.shard.borrow_mut().segments.set_handle(Segment::sealed(key, start));
        }
        self.read_node(tree, 0, missing).await
    }

    /// A container and its fingerprints as they are now, without a place in the caches; `None`: it has none.
    pub(crate) async fn lists(&self, domain: DomainId, number: u64) -> Result<Option<Lists>, Status> {
        loop {
            let containers = node::Tree::Containers;
            let (at, container) = self.copy_of(containers, domain, number, |d| &d.containers).await?;
            let prints = node::Tree::Fingerprints;
            let (there, prints) = self.copy_of(prints, domain, number, |d| &d.fingerprints).await?;
            let shard = self.shard.borrow();
            let Some(d) = shard.domains.get(&domain.0) else { return Ok(None) };
            // One that changed meanwhile is in RAM, or was written elsewhere: then once more.
            let container = d
                .containers
                .share(number)
                .map(Some)
                .or_else(|| d.containers.is_copy(number, at).then_some(container));
            let prints = d
                .fingerprints
                .share(number)
                .map(Some)
                .or_else(|| d.fingerprints.is_copy(number, there).then_some(prints));
            if let (Some(container), Some(prints)) = (container, prints) {
                return Ok(container.zip(prints));
            }
        }
    }

    /// A leaf, and where on the device it was read from (`None`: it was in RAM, or is nowhere).
    async fn copy_of<L: Leaf>(
        &self,
        tree: node::Tree,
        domain: DomainId,
        number: u64,
        of: impl Fn(&Domain) -> &Tree<L>,
    ) -> Result<(Option<NodePtr>, Option<Rc<L>>), Status> {
        loop {
            let cached = self.shard.borrow().domains.get(&domain.0).and_then(|d| of(d).share(number));
            if cached.is_some() {
                return Ok((None, cached));
            }
            let Some(ptr) = self.stored(tree, domain.0, 0, number).await? else { return Ok((None, None)) };
            let missing = Missing { level: 0, index: number, ptr };
            let read = self.read_node(tree, domain.0.into(), missing).await;
            let is_copy = |d: &Domain| of(d).is_copy(number, Some(ptr));
            if !self.shard.borrow().domains.get(&domain.0).is_some_and(is_copy) {
                // It moved while it was read.
                continue;
            }
            let decoded = read.and_then(|bytes| L::decode(&bytes).map_err(NodeError::Damaged));
            let leaf = decoded.map_err(|error| self.report(tree, domain.0.into(), &missing, error))?;
            return Ok((Some(ptr), Some(Rc::new(leaf))));
        }
    }

    fn report(&self, tree: node::Tree, owner: u64, missing: &Missing, error: NodeError) -> Status {
        self.damaged.set(self.damaged.get() + 1);
        tracing::error!(
            pool = %self.name(), ?tree, owner, level = missing.level, index = missing.index,
            place = ?missing.ptr.place, %error, "a metadata node can not be used: what it covers can not be read"
        );
        Status::UNRECOVERED_READ
    }

    /// The handle of a segment in use, made from its header if need be.
    pub(crate) async fn segment(&self, number: u32) -> Result<Arc<Segment>, Status> {
        loop {
            if let Some(handle) = self.shard.borrow().segments.handle(number) {
                return Ok(handle);
            }
            let key = LoadKey::Segment(number);
            let waiting = self.loading.borrow().get(&key).cloned();
            if let Some(event) = waiting {
                event.wait().await;
                continue;
            }
            let event = Rc::new(Event::new());
            self.loading.borrow_mut().insert(key, event.clone());
            let result = self.read_segment_header(number).await;
            self.loading.borrow_mut().remove(&key);
            event.set();
            let handle = result?;
            let mut shard = self.shard.borrow_mut();
            if shard.segments.handle(number).is_none() {
                shard.segments.set_handle(handle);
            }
        }
    }

    async fn read_segment_header(&self, number: u32) -> Result<Arc<Segment>, Status> {
        let (start, addr, entry) = {
            let shard = self.shard.borrow();
            let entry = shard.segments.entry(number).copied().ok_or(Status::UNRECOVERED_READ)?;
            (shard.segments.start_bytes(number), shard.segments.addr(number), entry)
        };
        let block = self.base.read_block(start).await?;
        let bad = |error: String| {
            if self.shard.borrow_mut().segments.is_new_damage(number) {
                self.damaged.set(self.damaged.get() + 1);
                tracing::error!(pool = %self.name(), segment = number, error, "a segment header is damaged");
            }
            Status::UNRECOVERED_READ
        };
        let header =
            SegmentHeader::open(&block, addr, start, self.keys.block()).map_err(|e| bad(e.to_string()))?;
        if header.incarnation != entry.incarnation || header.domain != entry.domain {
            return Err(bad(format!(
                "incarnation {} of domain {} where {} of domain {} belongs",
                header.incarnation, header.domain, entry.incarnation, entry.domain
            )));
        }
        let key = self.segment_key(&header).ok_or_else(|| bad("its domain's key is not there".into()))?;
        Ok(Segment::sealed(key, start))
    }

    /// Derives a segment's key.
    pub(crate) fn segment_key(&self, header: &SegmentHeader) -> Option<SegmentKey> {
        if header.domain == POOL_DOMAIN {
            return Some(SegmentKey::derive(self.keys.data(), header));
        }
        let shard = self.shard.borrow();
        let domain = shard.domains.get(&DomainId(header.domain.0).0)?;
        Some(SegmentKey::derive(domain.data.get(&header.generation)?, header))
    }

    /// Evicts clean nodes while the trees take more than their share of the budget.
    pub(crate) fn keep_budget(&self) {
        let mut shard = self.shard.borrow_mut();
        let shard = &mut *shard;
        let over = shard.meter.bytes.get().saturating_sub(self.cache_bytes);
        if over == 0 {
            return;
        }
        // When nearly everything is changed or in use, looking again at once would find nothing again.
        let patience = self.eviction_pause.get();
        if patience > 0 {
            return self.eviction_pause.set(patience - 1);
        }
        // A little more than needed, so that this is not done for every node.
        let mut goal = over + self.cache_bytes / 32;
        let domains = shard
            .domains
            .values_mut()
            .flat_map(|d| [&mut d.fingerprints as &mut dyn AnyTree, &mut d.containers]);
        let volumes = shard.volumes.values_mut().map(|v| &mut v.tree as &mut dyn AnyTree);
        for tree in domains.chain(volumes) {
            let freed = tree.evict(goal);
            goal = goal.saturating_sub(freed);
            if goal == 0 {
                return;
            }
        }
        self.eviction_pause.set(64);
    }

    /// The last checkpoint's pointer to a node, loading interior nodes on the way.
    pub(crate) async fn stored(
        &self,
        tree: node::Tree,
        owner: u32,
        level: u8,
        index: u64,
    ) -> Result<Option<NodePtr>, Status> {
        loop {
            match self.with_tree(tree, owner, |t| t.pointer(level, index)) {
                None => return Ok(None),
                Some(Ok(ptr)) => return Ok(ptr),
                Some(Err(missing)) => self.load_node(tree, owner, missing.level, missing.index).await?,
            }
        }
    }

    /// Blocks until the interior node is in RAM or known to be absent.
    pub(crate) async fn load_inner(
        &self,
        tree: node::Tree,
        owner: u32,
        level: u8,
        index: u64,
    ) -> Result<Option<Rc<Interior>>, Status> {
        loop {
            let found =
                self.with_tree(tree, owner, |t| (t.inner(level, index), t.missing(level, index).is_some()));
            match found {
                Some((None, true)) => self.load_node(tree, owner, level, index).await?,
                Some((node, _)) => return Ok(node),
                None => return Ok(None),
            }
        }
    }
}
