//! Metadata logs: where checkpoints append nodes. One open segment per domain, only used while a checkpoint is written.
//!
//! Owns the open metadata segments and the bytes that are sealed but not written. A node's place is sealed once: after a
//! failed checkpoint the log goes on behind what it had sealed.

use std::collections::{BTreeMap, btree_map};
use std::sync::Arc;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::block::BLOCK_BYTES;
use cryptfold_reduce_format::codec::Codec;
use cryptfold_reduce_format::ids::{DomainId, Epoch, Generation, POOL_DOMAIN, Sequence, ShardIx};
use cryptfold_reduce_format::node::{self, MAX_NODE_UNIT_BYTES, NodeId, NodeOptions, NodePtr};
use cryptfold_reduce_format::segment::{Cipher, Class, SegmentHeader};
use cryptfold_reduce_format::segtable::{SegmentEntry, SegmentState};
use reactor::memory::Buf;

use crate::pool::Pool;
use crate::segments::{Purpose, Segment};
use crate::shard::Domain;
use crate::tree::{Page, Tree};

/// Sealed bytes that are written at once.
const WRITE_BYTES: usize = 512 << 10;

struct Open {
    segment: Arc<Segment>,
    /// Offset in the segment of `buf`'s first byte; whole blocks.
    start: u32,
    buf: Vec<u8>,
}

/// What checkpoints keep between each other. Locked by the one that is being written.
pub(crate) struct Meta {
    open: BTreeMap<u32, Open>,
    /// The catalogue's trees as of the last checkpoint.
    pub domains: Tree<Page>,
    pub volumes: Tree<Page>,
    pub segments: Tree<Page>,
    /// The pool record's node.
    pub pool_ptr: Option<NodePtr>,
    /// Opened by this checkpoint or the ones before, and still open.
    spare: Vec<u32>,
}

/// What one checkpoint does to metadata segments.
pub(crate) struct Work {
    /// The batch that it is the state of.
    pub as_of: Sequence,
    /// New entries of the metadata segments that it touches.
    pub entries: BTreeMap<u32, SegmentEntry>,
    /// Segments that it opened.
    pub opened: Vec<u32>,
    pub nodes: u64,
    pub bytes: u64,
}

impl Work {
    pub fn new(as_of: Sequence) -> Work {
        Work { as_of, entries: BTreeMap::new(), opened: Vec::new(), nodes: 0, bytes: 0 }
    }

    fn entry(&mut self, pool: &Pool, number: u32) -> Option<&mut SegmentEntry> {
        match self.entries.entry(number) {
            btree_map::Entry::Occupied(entry) => Some(entry.into_mut()),
            btree_map::Entry::Vacant(vacant) => {
                Some(vacant.insert(*pool.shard.borrow().segments.entry(number)?))
            }
        }
    }

    /// A node is not part of the tree any more.
    pub fn replaced(&mut self, pool: &Pool, ptr: &NodePtr) {
        if let Some(entry) = self.entry(pool, ptr.place.segment.segment.0) {
            entry.live_bytes = entry.live_bytes.saturating_sub(ptr.unit_bytes);
        }
    }
}

impl Meta {
    pub fn new(
        domains: Tree<Page>,
        volumes: Tree<Page>,
        segments: Tree<Page>,
        pool_ptr: Option<NodePtr>,
    ) -> Meta {
        Meta { open: BTreeMap::new(), domains, volumes, segments, pool_ptr, spare: Vec::new() }
    }

    /// Pointers to all nodes of the catalogue, as of the last checkpoint.
    pub fn catalogue_pointers(&self) -> Vec<NodePtr> {
        let trees = [&self.domains, &self.volumes, &self.segments];
        trees.iter().flat_map(|tree| tree.resident_pointers()).chain(self.pool_ptr).collect()
    }

    /// Segments that stay open for the next checkpoint.
    pub fn still_open(&self) -> Vec<u32> {
        self.open.values().map(|open| open.segment.number()).chain(self.spare.iter().copied()).collect()
    }

    /// Seals a node into the log of `domain`.
    pub async fn append(
        &mut self,
        pool: &Pool,
        work: &mut Work,
        domain: DomainId,
        id: NodeId,
        birth: Epoch,
        plain: &[u8],
    ) -> Result<NodePtr, Status> {
        let segment_bytes = pool.segment_bytes;
        let full = self.open.get(&domain.0).is_none_or(|open| {
            open.start as usize + open.buf.len() + bound(plain.len()) > segment_bytes as usize
        });
        if full {
            self.finish_segment(pool, work, domain).await?;
            self.open_segment(pool, work, domain)?;
        }
        let Some(open) = self.open.get_mut(&domain.0) else { return Err(Status::INTERNAL_ERROR) };
        let offset = open.start + open.buf.len() as u32;
        let ptr = {
            let mut compressor = pool.core.compressor.borrow_mut();
            let options = NodeOptions { compressor: Some(&mut compressor), ..NodeOptions::default() };
            node::seal_node(&open.segment.key, offset, id, birth, plain, options, &mut open.buf)
        };
        let ptr = ptr.map_err(|error| {
            tracing::error!(pool = %pool.name(), ?id, %error, "a metadata node can not be sealed");
            Status::INTERNAL_ERROR
        })?;
        work.nodes += 1;
        work.bytes += u64::from(ptr.unit_bytes);
        if let Some(entry) = work.entry(pool, ptr.place.segment.segment.0) {
            entry.used_bytes = entry.used_bytes.max(offset + ptr.unit_bytes);
            entry.live_bytes += ptr.unit_bytes;
        }
        if open.buf.len() >= WRITE_BYTES {
            self.write_out(pool, domain, false).await?;
        }
        Ok(ptr)
    }

    /// Makes sure that `bytes` more fit the open segment of the pool's own domain, so that writing them opens no segment.
    pub async fn reserve(&mut self, pool: &Pool, work: &mut Work, bytes: usize) -> Result<(), Status> {
        let room = self
            .open
            .get(&POOL_DOMAIN.0)
            .map_or(0, |open| (pool.segment_bytes - open.start) as usize - open.buf.len());
        if room >= bytes {
            // Its row is in the table already.
            return Ok(());
        }
        self.finish_segment(pool, work, POOL_DOMAIN).await?;
        self.open_segment(pool, work, POOL_DOMAIN)?;
        let mut room = (pool.segment_bytes as usize).saturating_sub(BLOCK_BYTES);
        while room < bytes {
            // What does not fit goes on in segments that are taken (and in the table) already.
            let Some(number) = pool.shard.borrow_mut().segments.take_free(Purpose::Checkpoint, work.as_of)
            else {
                return Err(Status::CAPACITY_EXCEEDED);
            };
            work.opened.push(number);
            self.spare.push(number);
            let incarnation = pool.shard.borrow_mut().segments.draw_incarnation();
            work.entries.insert(number, fresh_entry(POOL_DOMAIN, Generation(0), incarnation));
            room += (pool.segment_bytes as usize).saturating_sub(BLOCK_BYTES + MAX_NODE_UNIT_BYTES);
        }
        Ok(())
    }

    fn open_segment(&mut self, pool: &Pool, work: &mut Work, domain: DomainId) -> Result<(), Status> {
        let spare = if domain == POOL_DOMAIN { self.spare.pop() } else { None };
        let mut shard = pool.shard.borrow_mut();
        let number = match spare {
            Some(number) => number,
            None => {
                let Some(number) = shard.segments.take_free(Purpose::Checkpoint, work.as_of) else {
                    return Err(Status::CAPACITY_EXCEEDED);
                };
                work.opened.push(number);
                number
            }
        };
        let generation = shard.domains.get(&domain.0).map_or(Generation(0), |d| d.generation);
        let incarnation = match work.entries.get(&number).filter(|_| spare.is_some()) {
            Some(entry) => entry.incarnation,
            None => match spare.and_then(|number| shard.segments.entry(number)) {
                Some(entry) => entry.incarnation,
                None => shard.segments.draw_incarnation(),
            },
        };
        let (start_bytes, addr) = (shard.segments.start_bytes(number), shard.segments.addr(number));
        drop(shard);
        let header = pool.segment_header(addr, incarnation, Class::Metadata, domain, generation);
        let Some(key) = pool.segment_key(&header) else { return Err(Status::INTERNAL_ERROR) };
        let segment = Segment::sealed(key, start_bytes);
        pool.shard.borrow_mut().segments.set_handle(segment.clone());
        work.entries.insert(number, fresh_entry(domain, generation, incarnation));
        let buf = header.encode(pool.keys.block()).to_vec();
        self.open.insert(domain.0, Open { segment, start: 0, buf });
        Ok(())
    }

    async fn finish_segment(&mut self, pool: &Pool, work: &mut Work, domain: DomainId) -> Result<(), Status> {
        self.write_out(pool, domain, true).await?;
        if let Some(open) = self.open.remove(&domain.0)
            && let Some(entry) = work.entry(pool, open.segment.number())
        {
            entry.state = SegmentState::Sealed;
        }
        Ok(())
    }

    /// Writes whole blocks of a log; with `pad` all of it.
    async fn write_out(&mut self, pool: &Pool, domain: DomainId, pad: bool) -> Result<(), Status> {
        let Some(open) = self.open.get_mut(&domain.0) else { return Ok(()) };
        if pad {
            open.buf.resize(open.buf.len().next_multiple_of(BLOCK_BYTES), 0);
        }
        let whole = open.buf.len() / BLOCK_BYTES * BLOCK_BYTES;
        if whole == 0 {
            return Ok(());
        }
        let data = Buf::from_slice(&open.buf[..whole]);
        let at = open.segment.start_bytes + u64::from(open.start);
        open.buf.drain(..whole);
        open.start += whole as u32;
        pool.base.write(at, data, false).await
    }

    /// Writes everything that is sealed.
    pub async fn write_all(&mut self, pool: &Pool) -> Result<(), Status> {
        let domains: Vec<u32> = self.open.keys().copied().collect();
        for domain in domains {
            self.write_out(pool, DomainId(domain), true).await?;
        }
        Ok(())
    }

    /// A domain is gone, and its open segment with it.
    pub fn forget(&mut self, domain: DomainId) {
        self.open.remove(&domain.0);
    }

    /// Ends the open segment of a domain, which is written: its number.
    pub fn end(&mut self, domain: DomainId) -> Option<u32> {
        self.open.remove(&domain.0).map(|open| open.segment.number())
    }

    /// Gives up the open segments after a failed checkpoint: their numbers.
    pub fn abandon(&mut self) -> Vec<u32> {
        let open = std::mem::take(&mut self.open);
        open.values().map(|open| open.segment.number()).chain(std::mem::take(&mut self.spare)).collect()
    }
}

/// Most bytes that a node with `plain` bytes takes.
fn bound(plain: usize) -> usize {
    node::NODE_HEADER_BYTES + plain + 64
}

fn fresh_entry(
    domain: DomainId,
    generation: Generation,
    incarnation: cryptfold_reduce_format::ids::Incarnation,
) -> SegmentEntry {
    SegmentEntry {
        state: SegmentState::Open,
        class: Some(Class::Metadata),
        domain,
        generation,
        incarnation,
        used_bytes: BLOCK_BYTES as u32,
        live_bytes: 0,
        shard: ShardIx(0),
    }
}

impl Pool {
    /// A header for a segment that is being opened, with a fresh salt.
    pub(crate) fn segment_header(
        &self,
        addr: cryptfold_reduce_format::ids::SegmentAddr,
        incarnation: cryptfold_reduce_format::ids::Incarnation,
        class: Class,
        domain: DomainId,
        generation: Generation,
    ) -> SegmentHeader {
        let mut salt = [0; 32];
        reactor::fill_random(&mut salt);
        let approved = self.superblock.borrow().is_approved();
        let shard = self.shard.borrow();
        let plain = shard.domains.get(&domain.0).is_some_and(Domain::is_plain);
        SegmentHeader {
            pool: self.uuid,
            addr,
            segment_bytes: self.segment_bytes,
            incarnation,
            salt,
            class,
            domain,
            generation,
            cipher: match (plain, approved) {
                (true, _) => Cipher::Gmac,
                (false, true) => Cipher::GcmStoredNonce,
                (false, false) => Cipher::Gcm,
            },
            hash: shard.hash,
            codec: Codec::Zstd,
            shard: ShardIx(0),
            owner_epoch: self.epoch.get().owner_epoch,
        }
    }
}
