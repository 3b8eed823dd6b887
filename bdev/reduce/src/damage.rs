//! For tests of the audit and the repair: where things lie, so that a device can be made to lie about them, and state that
//! no sequence of I/O makes.

use cryptfold_bdev::Status;
use cryptfold_reduce_format::container::FragmentEntry;
use cryptfold_reduce_format::ids::{ChunkAddr, DomainId, VolumeId};
use cryptfold_reduce_format::map::Target;
use cryptfold_reduce_format::node;

use crate::pool::Pool;

/// What of the pool a block of a volume depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// Its leaf of the map.
    Map,
    /// The node above that.
    MapParent,
    /// The leaf of its chunk's container.
    Container,
    /// The leaf with its chunk's fingerprint.
    Fingerprints,
    /// Its data.
    Fragment,
}

/// What is made wrong about a block's chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Falsify {
    /// It has more references than there are.
    References(u16),
    /// Its segment has more live bytes than there are.
    LiveBytes(u16),
    /// Its segment has no live bytes.
    NoLiveBytes,
    /// Its container has forgotten its fragment.
    FragmentGone,
    /// Its fingerprint is another one's.
    Fingerprint,
    /// Its volume counts wrongly.
    Counters,
}

impl Pool {
    async fn chunk_of(
        &self,
        volume: VolumeId,
        lba: u64,
    ) -> Result<(DomainId, ChunkAddr, FragmentEntry), Status> {
        let mut pins = self.pins();
        self.load_leaf(node::Tree::Map, volume.0, lba / 512, &mut pins).await?;
        let (domain, entry) = {
            let shard = self.shard.borrow();
            let v = shard.volumes.get(&volume.0).ok_or(Status::INVALID_NAMESPACE)?;
            let leaf = v.tree.peek(lba / 512).ok_or(Status::INVALID_FIELD)?;
            (v.record.domain, leaf.get((lba % 512) as usize))
        };
        let Target::Chunk(addr) = entry.target else { return Err(Status::INVALID_FIELD) };
        for tree in [node::Tree::Containers, node::Tree::Fingerprints] {
            self.load_leaf(tree, domain.0, addr.container().get(), &mut pins).await?;
        }
        let shard = self.shard.borrow();
        let container = shard.domains.get(&domain.0).and_then(|d| d.containers.peek(addr.container().get()));
        let fragment = container.and_then(|container| container.fragment_of(addr.slot()));
        Ok((domain, addr, fragment.ok_or(Status::INVALID_FIELD)?))
    }

    /// Byte offset and length on the device, as of the last checkpoint.
    pub(crate) async fn place_of(
        &self,
        volume: VolumeId,
        lba: u64,
        part: Part,
    ) -> Result<(u64, u32), Status> {
        let (domain, addr, fragment) = self.chunk_of(volume, lba).await?;
        let number = addr.container().get();
        let node = match part {
            Part::Map => self.stored(node::Tree::Map, volume.0, 0, lba / 512).await?,
            Part::MapParent => self.stored(node::Tree::Map, volume.0, 1, lba / 512 / 256).await?,
            Part::Container => self.stored(node::Tree::Containers, domain.0, 0, number).await?,
            Part::Fingerprints => self.stored(node::Tree::Fingerprints, domain.0, 0, number).await?,
            Part::Fragment => None,
        };
        let (place, bytes) = match node {
            Some(ptr) => (ptr.place, ptr.unit_bytes),
            None if part == Part::Fragment => (fragment.place, fragment.unit_bytes),
            None => return Err(Status::INVALID_FIELD),
        };
        let start = self.shard.borrow().segments.start_bytes(place.segment.segment.0);
        Ok((start + u64::from(place.offset), bytes))
    }

    /// Makes something wrong, durably with the next checkpoint.
    pub(crate) async fn falsify(&self, volume: VolumeId, lba: u64, what: Falsify) -> Result<(), Status> {
        let (domain, addr, fragment) = self.chunk_of(volume, lba).await?;
        let number = addr.container().get();
        let segment = fragment.place.segment.segment.0;
        let now = self.now();
        let mut shard = self.shard.borrow_mut();
        let shard = &mut *shard;
        let d = shard.domains.get_mut(&domain.0).ok_or(Status::INVALID_FIELD)?;
        let live = shard.segments.entry(segment).map_or(0, |entry| entry.live_bytes);
        match what {
            Falsify::References(more) => {
                let container = d.containers.get_mut(number);
                container.change_refs(addr.slot(), more.into()).map_err(|_| Status::INTERNAL_ERROR)?;
            }
            Falsify::LiveBytes(more) => shard.segments.correct(segment, live + u32::from(more), now),
            Falsify::NoLiveBytes => shard.segments.correct(segment, 0, now),
            Falsify::FragmentGone => {
                let container = d.containers.get_mut(number);
                for slot in fragment.first_slot..fragment.end_slot() {
                    let refs = container.refs(slot) as i32;
                    container.change_refs(slot, -refs).map_err(|_| Status::INTERNAL_ERROR)?;
                }
                container.replace(fragment.first_slot, &[]).map_err(|_| Status::INTERNAL_ERROR)?;
            }
            Falsify::Fingerprint => {
                let leaf = d.fingerprints.get_mut(number);
                let slot = usize::from(addr.slot());
                let other = (slot + 1) % leaf.slots.len();
                leaf.slots[slot] = leaf.slots[other];
            }
            Falsify::Counters => {
                if let Some(v) = shard.volumes.get_mut(&volume.0) {
                    v.chunks += 7;
                }
                d.unique += 3;
            }
        }
        Ok(())
    }
}
