//! A paged tree: leaves in a bounded cache over nodes on the device.
//!
//! Owns the cached leaves and interior nodes of one tree, and which of them changed. Does no I/O: [`Tree::locate`] says
//! which node is missing, the loader ([`crate::load`]) brings it, [`Tree::freeze`] and [`Tree::install`] bracket a
//! checkpoint.
//!
//! Invariants:
//! - Interior nodes and the root change only in [`Tree::install`]: between two checkpoints they say what is on the device.
//! - A leaf that is dirty, frozen or pinned is not evicted; so what the interior nodes point to may be older than a cached
//!   leaf, never newer.
//! - A frozen leaf is shared with the checkpoint that writes it; changing it clones it first.
//! - While an audit watches, a leaf that changes is kept as it was before ([`Tree::take_changed`]), and is not evicted until that was
//!   taken.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use cryptfold_reduce_format::container::{Container, Fingerprints};
use cryptfold_reduce_format::fingerprint::HashId;
use cryptfold_reduce_format::ids::{Generation, SLOTS};
use cryptfold_reduce_format::map::{MAP_LEAF_BYTES, MapLeaf};
use cryptfold_reduce_format::node::{self, FANOUT, Interior, MAX_LEVEL, NodePtr};
use cryptfold_reduce_format::record::TreeRoot;

use crate::hash::FastMap;

/// Bytes of a changed leaf on the device and in RAM, at most, with its share of interior nodes.
pub(crate) const LEAF_BYTES: usize = 9000;
/// Of these, what does not depend on the leaf.
const NODE_BYTES: usize = 600;
/// Bytes of RAM that an interior node takes.
const INTERIOR_BYTES: usize = FANOUT * node::PTR_BYTES + 64;

/// What a tree's leaves are.
pub(crate) trait Leaf: Clone + 'static {
    /// The tree on the device.
    const TREE: node::Tree;
    /// Whether an audit watches it.
    const WATCHED: bool = false;
    /// A leaf that is not there.
    fn empty() -> Self;
    /// Whether it need not be there.
    fn is_empty(&self) -> bool;
    /// The node's content.
    fn encode(&self) -> Vec<u8>;
    /// From the node's content; the error is for people.
    fn decode(bytes: &[u8]) -> Result<Self, String>;
    /// Bytes of RAM, about.
    fn memory_bytes(&self) -> usize;
    /// Bytes that the next checkpoint needs for it, at most, with its share of interior nodes.
    fn stored_bytes(&self) -> usize {
        LEAF_BYTES
    }
}

impl Leaf for MapLeaf {
    const TREE: node::Tree = node::Tree::Map;
    const WATCHED: bool = true;
    fn empty() -> Self {
        MapLeaf::default()
    }
    fn is_empty(&self) -> bool {
        MapLeaf::is_empty(self)
    }
    fn encode(&self) -> Vec<u8> {
        MapLeaf::encode(self)
    }
    fn decode(bytes: &[u8]) -> Result<Self, String> {
        MapLeaf::decode(bytes).map_err(|error| error.to_string())
    }
    fn memory_bytes(&self) -> usize {
        MAP_LEAF_BYTES + 64
    }
}

impl Leaf for Container {
    const TREE: node::Tree = node::Tree::Containers;
    const WATCHED: bool = true;
    fn empty() -> Self {
        Container::default()
    }
    /// A container without slots does not exist; one that was used is dropped by a record, not by being empty.
    fn is_empty(&self) -> bool {
        self.used() == 0
    }
    fn encode(&self) -> Vec<u8> {
        Container::encode(self)
    }
    fn decode(bytes: &[u8]) -> Result<Self, String> {
        Container::decode(bytes).map_err(|error| error.to_string())
    }
    fn memory_bytes(&self) -> usize {
        Container::memory_bytes(self) + 64
    }
    /// One that is full only loses: of old ones little is left.
    fn stored_bytes(&self) -> usize {
        if usize::from(self.used()) < SLOTS {
            return LEAF_BYTES;
        }
        (Container::encoded_bound(self) + NODE_BYTES).min(LEAF_BYTES)
    }
}

impl Leaf for Fingerprints {
    const TREE: node::Tree = node::Tree::Fingerprints;
    fn empty() -> Self {
        Fingerprints { generation: Generation(1), hash: HashId::Blake3, slots: Vec::new() }
    }
    fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
    fn encode(&self) -> Vec<u8> {
        Fingerprints::encode(self)
    }
    fn decode(bytes: &[u8]) -> Result<Self, String> {
        Fingerprints::decode(bytes).map_err(|error| error.to_string())
    }
    fn memory_bytes(&self) -> usize {
        self.slots.capacity() * 16 + 96
    }
}

struct Slot<L> {
    leaf: Rc<L>,
    bytes: usize,
    pins: u32,
    dirty: bool,
    /// What it counts for among the dirty ones. Bytes.
    weight: u32,
    frozen: bool,
    /// Used since the clock's hand last passed.
    hot: Cell<bool>,
}

impl<L: Leaf> Slot<L> {
    fn set_dirty(&mut self, meter: &Meter) {
        self.dirty = true;
        self.weight = self.leaf.stored_bytes() as u32;
        meter.dirty_bytes.set(meter.dirty_bytes.get() + self.weight as usize);
    }
}

impl<L> Slot<L> {
    fn set_clean(&mut self, meter: &Meter) {
        self.dirty = false;
        let weight = std::mem::take(&mut self.weight) as usize;
        meter.dirty_bytes.set(meter.dirty_bytes.get().saturating_sub(weight));
    }
}

struct Inner {
    node: Rc<Interior>,
    hot: Cell<bool>,
}

/// What all trees of a pool take together.
#[derive(Default)]
pub(crate) struct Meters {
    /// Bytes of RAM.
    pub bytes: Cell<usize>,
    /// What a checkpoint of the leaves that changed since the last freeze needs, at most.
    pub dirty_bytes: Cell<usize>,
    /// An audit watches what changes, ...
    pub watched: Cell<bool>,
    /// ... and something has changed.
    pub changed: Cell<bool>,
}

/// Shared by the trees of a pool.
pub(crate) type Meter = Rc<Meters>;

/// Where a leaf is.
#[derive(Debug)]
pub(crate) enum Found<'a, L> {
    /// In RAM.
    Here(&'a L),
    /// Nowhere: it is empty.
    Absent,
    /// On the device; this node has to be loaded to come nearer.
    Away(Missing),
}

/// A node to load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Missing {
    /// 0 = a leaf.
    pub level: u8,
    /// In its level.
    pub index: u64,
    /// Where it lies.
    pub ptr: NodePtr,
}

/// See the module's head.
pub(crate) struct Tree<L> {
    root: TreeRoot,
    leaves: FastMap<u64, Slot<L>>,
    inner: FastMap<(u8, u64), Inner>,
    /// The clock: (level, index) of everything cached.
    ring: VecDeque<(u8, u64)>,
    dirty: Vec<u64>,
    /// Leaves as they were when the audit last looked, and the bytes that they are counted as.
    before: FastMap<u64, (Rc<L>, usize)>,
    meter: Meter,
}

/// The changed leaves of a tree, as of a moment, and the tree that they belong to.
pub(crate) struct Frozen<L> {
    pub root: TreeRoot,
    /// Ascending; `None` = the leaf is gone.
    pub leaves: Vec<(u64, Option<Rc<L>>)>,
}

impl<L> Frozen<L> {
    /// Indices of the changed leaves.
    pub fn indices(&self) -> Vec<u64> {
        self.leaves.iter().map(|leaf| leaf.0).collect()
    }
}

/// Level and index of an interior node.
pub(crate) type InnerAt = (u8, u64);

/// What a checkpoint made of a [`Frozen`].
#[derive(Default)]
pub(crate) struct Installed {
    pub root: TreeRoot,
    /// Interior nodes written; `None` = gone.
    pub inner: Vec<(InnerAt, Option<Rc<Interior>>)>,
    /// The leaves that were frozen.
    pub leaves: Vec<u64>,
}

impl<L: Leaf> Tree<L> {
    pub fn new(root: TreeRoot, meter: Meter) -> Self {
        Tree {
            root,
            leaves: FastMap::default(),
            inner: FastMap::default(),
            ring: VecDeque::new(),
            dirty: Vec::new(),
            before: FastMap::default(),
            meter,
        }
    }

    /// Root as of the last checkpoint.
    pub fn root(&self) -> TreeRoot {
        self.root
    }

    fn meter(&self, add: usize, sub: usize) {
        self.meter.bytes.set((self.meter.bytes.get() + add).saturating_sub(sub));
    }

    /// Where leaf `index` is.
    #[inline]
    pub fn find(&self, index: u64) -> Found<'_, L> {
        if let Some(slot) = self.leaves.get(&index) {
            slot.hot.set(true);
            return Found::Here(&slot.leaf);
        }
        match self.pointer(0, index) {
            Ok(None) => Found::Absent,
            Ok(Some(ptr)) => Found::Away(Missing { level: 0, index, ptr }),
            Err(missing) => Found::Away(missing),
        }
    }

    /// The leaf, if it is in RAM.
    #[inline]
    pub fn peek(&self, index: u64) -> Option<&L> {
        self.leaves.get(&index).map(|slot| &*slot.leaf)
    }

    /// The leaf, if it is in RAM, to be kept while others change it.
    pub fn share(&self, index: u64) -> Option<Rc<L>> {
        self.leaves.get(&index).map(|slot| slot.leaf.clone())
    }

    /// Whether the leaf is not in RAM and the device has it there (or nowhere), as far as is known without a load.
    pub fn is_copy(&self, index: u64, ptr: Option<NodePtr>) -> bool {
        !self.leaves.contains_key(&index) && self.pointer(0, index).is_ok_and(|now| now == ptr)
    }

    /// The node to load before leaf `index` can be used; `None` if it is here or absent.
    #[inline]
    pub fn locate(&self, index: u64) -> Option<Missing> {
        match self.find(index) {
            Found::Away(missing) => Some(missing),
            _ => None,
        }
    }

    /// The device's pointer to a node, from cached interior nodes; `Err` names the interior node that is missing.
    pub fn pointer(&self, level: u8, index: u64) -> Result<Option<NodePtr>, Missing> {
        let Some(mut ptr) = self.root.ptr else { return Ok(None) };
        let mut at = self.root.level;
        if at < level || index >> (8 * u32::from(at - level)).min(63) != 0 {
            return Ok(None);
        }
        while at > level {
            let here = index >> (8 * u32::from(at - level));
            let Some(inner) = self.inner.get(&(at, here)) else {
                return Err(Missing { level: at, index: here, ptr });
            };
            inner.hot.set(true);
            let child = index >> (8 * u32::from(at - level - 1)) & (FANOUT as u64 - 1);
            match inner.node.get(child as usize) {
                Some(next) => ptr = next,
                None => return Ok(None),
            }
            at -= 1;
        }
        Ok(Some(ptr))
    }

    /// Leaves in RAM.
    pub fn leaf_indices(&self) -> Vec<u64> {
        self.leaves.keys().copied().collect()
    }

    /// Pointers to all nodes, where all interior nodes are in RAM.
    pub fn resident_pointers(&self) -> Vec<NodePtr> {
        let below = self.inner.values().flat_map(|inner| inner.node.iter().map(|(_, ptr)| ptr));
        self.root.ptr.into_iter().chain(below).collect()
    }

    /// Puts a loaded leaf in, unless it is there.
    pub fn insert(&mut self, index: u64, leaf: L) {
        if self.leaves.contains_key(&index) {
            return;
        }
        let bytes = leaf.memory_bytes();
        let slot = Slot {
            leaf: Rc::new(leaf),
            bytes,
            pins: 0,
            dirty: false,
            weight: 0,
            frozen: false,
            hot: Cell::new(true),
        };
        self.leaves.insert(index, slot);
        self.ring.push_back((0, index));
        self.meter(bytes, 0);
    }

    /// Puts a loaded interior node in.
    pub fn insert_inner(&mut self, level: u8, index: u64, node: Rc<Interior>) {
        if self.inner.insert((level, index), Inner { node, hot: Cell::new(true) }).is_none() {
            self.ring.push_back((level, index));
            self.meter(INTERIOR_BYTES, 0);
        }
    }

    /// An interior node, if it is in RAM.
    pub fn inner(&self, level: u8, index: u64) -> Option<Rc<Interior>> {
        self.inner.get(&(level, index)).map(|inner| inner.node.clone())
    }

    /// The leaf for changing; made if absent. The caller has seen that it is not away.
    #[inline]
    pub fn get_mut(&mut self, index: u64) -> &mut L {
        if !self.leaves.contains_key(&index) {
            debug_assert!(self.locate(index).is_none(), "changed a leaf that is on the device only");
            self.insert(index, L::empty());
        }
        if L::WATCHED && self.meter.watched.get() {
            self.remember(index);
        }
        let slot = self.leaves.get_mut(&index).expect("inserted above");
        if !slot.dirty {
            slot.set_dirty(&self.meter);
            self.dirty.push(index);
        }
        slot.hot.set(true);
        Rc::make_mut(&mut slot.leaf)
    }

    #[cold]
    fn remember(&mut self, index: u64) {
        let Some(slot) = self.leaves.get(&index).filter(|_| !self.before.contains_key(&index)) else {
            return;
        };
        let (leaf, bytes) = (slot.leaf.clone(), slot.leaf.memory_bytes());
        self.before.insert(index, (leaf, bytes));
        self.meter(bytes, 0);
        self.meter.changed.set(true);
    }

    /// Leaves that have changed since they were last taken, as they were then. They are in RAM now, or absent.
    pub fn take_changed(&mut self) -> Vec<(u64, Rc<L>)> {
        if self.before.is_empty() {
            return Vec::new();
        }
        let before = std::mem::take(&mut self.before);
        self.meter(0, before.values().map(|(_, bytes)| bytes).sum());
        before.into_iter().map(|(index, (leaf, _))| (index, leaf)).collect()
    }

    /// Whether [`Tree::take_changed`] would give something.
    pub fn has_changed(&self) -> bool {
        !self.before.is_empty()
    }

    /// Counts a changed leaf anew among the dirty ones: it may have become larger than was to be expected.
    pub fn weigh(&mut self, index: u64) {
        if let Some(slot) = self.leaves.get_mut(&index).filter(|slot| slot.dirty) {
            slot.set_clean(&self.meter);
            slot.set_dirty(&self.meter);
        }
    }

    /// Empties a leaf, wherever it is: the next checkpoint drops it.
    pub fn clear(&mut self, index: u64) {
        self.insert(index, L::empty());
        *self.get_mut(index) = L::empty();
    }

    /// Keeps a leaf in RAM (it must be there or absent) until [`Tree::unpin`]; pins count.
    pub fn pin(&mut self, index: u64) {
        if let Some(slot) = self.leaves.get_mut(&index) {
            slot.pins += 1;
        } else {
            self.insert(index, L::empty());
            self.pin(index);
        }
    }

    /// Takes one pin off.
    pub fn unpin(&mut self, index: u64) {
        if let Some(slot) = self.leaves.get_mut(&index) {
            slot.pins = slot.pins.saturating_sub(1);
        }
    }

    /// Makes the next checkpoint write the leaf again (so that it moves).
    pub fn touch(&mut self, index: u64) {
        self.get_mut(index);
    }

    /// As [`Tree::touch`] for those of `count` leaves from `first` on that are in RAM.
    pub fn touch_cached(&mut self, first: u64, count: u64) {
        let there: Vec<u64> = self
            .leaves
            .keys()
            .copied()
            .filter(|index| (first..first.saturating_add(count)).contains(index))
            .collect();
        there.into_iter().for_each(|index| self.touch(index));
    }

    /// Evicts clean nodes until `goal` bytes are free, or nothing more can go. Returns the bytes freed.
    pub fn evict(&mut self, goal: usize) -> usize {
        let mut freed = 0;
        let mut steps = 2 * self.ring.len();
        while freed < goal && steps > 0 {
            steps -= 1;
            let Some((level, index)) = self.ring.pop_front() else { break };
            let (keep, bytes) = if level == 0 {
                match self.leaves.get(&index) {
                    Some(s) => {
                        let needed = s.dirty || s.frozen || s.pins > 0 || self.before.contains_key(&index);
                        (needed || s.hot.replace(false), s.bytes)
                    }
                    None => continue,
                }
            } else {
                match self.inner.get(&(level, index)) {
                    Some(inner) => (inner.hot.replace(false), INTERIOR_BYTES),
                    None => continue,
                }
            };
            if keep {
                self.ring.push_back((level, index));
                continue;
            }
            if level == 0 {
                self.leaves.remove(&index);
            } else {
                self.inner.remove(&(level, index));
            }
            self.meter(0, bytes);
            freed += bytes;
        }
        freed
    }

    /// Hands out what has changed; from now on changes belong to the next checkpoint.
    pub fn freeze(&mut self) -> Frozen<L> {
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.sort_unstable();
        let mut leaves = Vec::with_capacity(dirty.len());
        for index in dirty {
            let Some(slot) = self.leaves.get_mut(&index) else { continue };
            slot.set_clean(&self.meter);
            slot.frozen = true;
            let bytes = slot.leaf.memory_bytes();
            let before = std::mem::replace(&mut slot.bytes, bytes);
            let leaf = (!slot.leaf.is_empty()).then(|| slot.leaf.clone());
            leaves.push((index, leaf));
            self.meter(bytes, before);
        }
        Frozen { root: self.root, leaves }
    }

    /// Takes back a freeze whose checkpoint failed: everything in it is dirty again.
    pub fn thaw(&mut self, frozen: &[u64]) {
        for &index in frozen {
            if let Some(slot) = self.leaves.get_mut(&index) {
                slot.frozen = false;
                if !slot.dirty {
                    slot.set_dirty(&self.meter);
                    self.dirty.push(index);
                }
            }
        }
    }

    /// The checkpoint is durable: what it wrote is what the device has.
    pub fn install(&mut self, installed: Installed) {
        self.root = installed.root;
        for ((level, index), node) in installed.inner {
            match node {
                Some(node) => {
                    self.insert_inner(level, index, node);
                }
                None => {
                    if self.inner.remove(&(level, index)).is_some() {
                        self.meter(0, INTERIOR_BYTES);
                    }
                }
            }
        }
        for index in installed.leaves {
            let Some(slot) = self.leaves.get_mut(&index) else { continue };
            slot.frozen = false;
            if !slot.dirty && slot.pins == 0 && slot.leaf.is_empty() {
                let bytes = slot.bytes;
                self.leaves.remove(&index);
                self.meter(0, bytes);
            }
        }
    }
}

impl<L> Drop for Tree<L> {
    fn drop(&mut self) {
        let leaves: usize = self.leaves.values().map(|slot| slot.bytes).sum();
        let before: usize = self.before.values().map(|(_, bytes)| bytes).sum();
        let bytes = &self.meter.bytes;
        bytes.set(bytes.get().saturating_sub(leaves + before + self.inner.len() * INTERIOR_BYTES));
        for index in &self.dirty {
            if let Some(slot) = self.leaves.get_mut(index) {
                slot.set_clean(&self.meter);
            }
        }
    }
}

/// A tree whatever its leaves are, for the loader and the checkpoint.
pub(crate) trait AnyTree {
    /// See [`Tree::pointer`].
    fn pointer(&self, level: u8, index: u64) -> Result<Option<NodePtr>, Missing>;
    /// See [`Tree::inner`].
    fn inner(&self, level: u8, index: u64) -> Option<Rc<Interior>>;
    /// See [`Tree::insert_inner`].
    fn insert_inner(&mut self, level: u8, index: u64, node: Rc<Interior>);
    /// Puts a leaf in from its content.
    fn insert_content(&mut self, index: u64, content: &[u8]) -> Result<(), String>;
    /// See [`Tree::evict`].
    fn evict(&mut self, goal: usize) -> usize;
    /// See [`Tree::touch`].
    fn touch(&mut self, index: u64);
    /// See [`Tree::touch_cached`].
    fn touch_cached(&mut self, first: u64, count: u64);
    /// See [`Tree::clear`].
    fn clear(&mut self, index: u64);
    /// The node to load so that node (`level`, `index`) comes nearer; `None` if it is in RAM or absent.
    fn missing(&self, level: u8, index: u64) -> Option<Missing>;
    /// Whether leaf `index` is in RAM or absent.
    fn is_ready(&self, index: u64) -> bool;
    /// See [`Tree::pin`].
    fn pin(&mut self, index: u64);
    /// See [`Tree::unpin`].
    fn unpin(&mut self, index: u64);
}

impl<L: Leaf> AnyTree for Tree<L> {
    fn pointer(&self, level: u8, index: u64) -> Result<Option<NodePtr>, Missing> {
        Tree::pointer(self, level, index)
    }
    fn inner(&self, level: u8, index: u64) -> Option<Rc<Interior>> {
        Tree::inner(self, level, index)
    }
    fn insert_inner(&mut self, level: u8, index: u64, node: Rc<Interior>) {
        Tree::insert_inner(self, level, index, node);
    }
    fn insert_content(&mut self, index: u64, content: &[u8]) -> Result<(), String> {
        self.insert(index, L::decode(content)?);
        Ok(())
    }
    fn evict(&mut self, goal: usize) -> usize {
        Tree::evict(self, goal)
    }
    fn touch(&mut self, index: u64) {
        Tree::touch(self, index);
    }
    fn touch_cached(&mut self, first: u64, count: u64) {
        Tree::touch_cached(self, first, count);
    }
    fn clear(&mut self, index: u64) {
        Tree::clear(self, index);
    }
    fn missing(&self, level: u8, index: u64) -> Option<Missing> {
        let here = if level == 0 {
            self.leaves.contains_key(&index)
        } else {
            self.inner.contains_key(&(level, index))
        };
        if here {
            return None;
        }
        match Tree::pointer(self, level, index) {
            Ok(ptr) => ptr.map(|ptr| Missing { level, index, ptr }),
            Err(missing) => Some(missing),
        }
    }
    fn is_ready(&self, index: u64) -> bool {
        self.locate(index).is_none()
    }
    fn pin(&mut self, index: u64) {
        Tree::pin(self, index);
    }
    fn unpin(&mut self, index: u64) {
        Tree::unpin(self, index);
    }
}

/// A leaf that is kept as its content: pages of the catalogue.
#[derive(Clone)]
pub(crate) struct Page(pub Vec<u8>);

impl Leaf for Page {
    /// Not used: the catalogue names its trees itself.
    const TREE: node::Tree = node::Tree::Pool;
    fn empty() -> Self {
        Page(Vec::new())
    }
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    fn encode(&self) -> Vec<u8> {
        self.0.clone()
    }
    fn decode(bytes: &[u8]) -> Result<Self, String> {
        Ok(Page(bytes.to_vec()))
    }
    fn memory_bytes(&self) -> usize {
        self.0.len() + 64
    }
}

/// Levels that a tree needs so that leaf `index` fits.
pub(crate) fn level_for(index: u64) -> u8 {
    (0..=MAX_LEVEL).find(|&level| index >> (8 * u32::from(level)) == 0).unwrap_or(MAX_LEVEL)
}
