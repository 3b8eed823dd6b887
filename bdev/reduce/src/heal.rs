//! Healing: a damaged fragment whose data is written again is made readable from it, for everybody who refers to it.
//!
//! A chunk that is known to be damaged is no duplicate of anything, so a write of the same data stores it anew; the look-up
//! notes that it met a damaged one. This task then reads the damaged fragment once more (it may have been the device's
//! mood), and seals the chunks that are at hand elsewhere under the damaged chunks' own addresses: one `FragmentMove`, no map
//! changes. Chunks that nobody has written again stay damaged: they share what is left of the old fragment's place.

use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_reduce_format::codec::Compression;
use cryptfold_reduce_format::container::FragmentEntry;
use cryptfold_reduce_format::entry::{FragmentRaw, Record};
use cryptfold_reduce_format::fragment::CHUNK_BYTES;
use cryptfold_reduce_format::ids::{ChunkAddr, DomainId};
use cryptfold_reduce_format::node;

use crate::check::FragmentError;
use crate::log::bound;
use crate::pool::Pool;
use crate::segments::Purpose;
use crate::shard::Needs;

/// Least bytes of the old place that each part which stays damaged gets: more than header and tag, so that the entry is in
/// range. Nothing is ever read from them successfully.
const PART_BYTES: u32 = 64;

/// Slots `from .. from + count` of a damaged fragment.
struct Part {
    from: u16,
    count: u16,
    healed: bool,
}

impl Pool {
    /// Starts healing what look-ups have met.
    pub(crate) fn heal_soon(self: &Rc<Self>) {
        let wanted = self.shard.borrow().wanted.take();
        if wanted.is_empty() {
            return;
        }
        tracing::debug!(pool = %self.name(), ?wanted, "data of damaged fragments was written");
        let pool = self.clone();
        self.background(async move {
            for (domain, first) in wanted {
                let _busy = pool.enter();
                pool.wait_for_audit().await;
                if pool.check_writable().is_err() {
                    return;
                }
                if let Err(status) = pool.heal(domain, first).await {
                    tracing::warn!(pool = %pool.name(), chunk = ?first, %status, "a fragment could not be healed");
                }
            }
        });
    }

    /// The damaged fragment that begins at `first`, if it is (still) there.
    fn damaged_fragment(&self, domain: DomainId, first: ChunkAddr) -> Option<FragmentEntry> {
        let shard = self.shard.borrow();
        let container = shard.domains.get(&domain.0)?.containers.peek(first.container().get())?;
        let entry = container.fragment_of(first.slot())?;
        (entry.first_slot == first.slot() && shard.damaged.contains(&(domain, first))).then_some(entry)
    }

    async fn heal(self: &Rc<Self>, domain: DomainId, first: ChunkAddr) -> Result<(), Status> {
        let number = first.container().get();
        let mut pins = self.pins();
        self.load_leaf(node::Tree::Containers, domain.0, number, &mut pins).await?;
        self.load_leaf(node::Tree::Fingerprints, domain.0, number, &mut pins).await?;
        let Some(entry) = self.damaged_fragment(domain, first) else {
            self.shard.borrow_mut().damaged.remove(&(domain, first));
            return Ok(());
        };
        match self.read_fragment(&entry, first).await {
            Ok(_) => {
                self.shard.borrow_mut().damaged.remove(&(domain, first));
                tracing::info!(pool = %self.name(), chunk = ?first, "a fragment that was damaged can be read again");
                return Ok(());
            }
            Err(FragmentError::Damaged(_)) => {}
            Err(FragmentError::Io(status)) => return Err(status),
        }
        let mut data: Vec<Option<Vec<u8>>> = Vec::with_capacity(entry.chunks.into());
        for slot in entry.first_slot..entry.end_slot() {
            data.push(self.same_data(domain, number, slot).await?);
        }
        let bytes = usize::from(entry.chunks) * bound(1);
        let lane = self.lane(domain, Purpose::Collector);
        self.make_ready(&lane, bytes).await?;
        self.check_writable()?;
        // ---- no wait from here on: what was looked up above is looked at again.
        if self.damaged_fragment(domain, first) != Some(entry) {
            tracing::debug!(pool = %self.name(), chunk = ?first, "a damaged fragment changed");
            return Ok(());
        }
        let generation = self.shard.borrow().domains.get(&domain.0).map(|d| d.generation);
        let Some(generation) = generation else { return Ok(()) };
        let parts = self.parts(domain, number, &entry, &data);
        if !parts.iter().any(|part| part.healed) {
            tracing::debug!(pool = %self.name(), chunk = ?first, "the data of a damaged fragment is not at hand");
            return Ok(());
        }
        let mut fragments = Vec::with_capacity(parts.len());
        let damaged = parts.iter().filter(|part| !part.healed).count() as u32;
        let share = entry.unit_bytes / damaged.max(1);
        let mut at = entry.place;
        let mut still = Vec::new();
        for part in &parts {
            let Some(addr) = ChunkAddr::new(first.container(), part.from) else { continue };
            let chunks = part.count as u8;
            if !part.healed {
                fragments.push(FragmentEntry {
                    first_slot: part.from,
                    chunks,
                    place: at,
                    unit_bytes: share,
                    ..entry
                });
                at.offset += share;
                still.push((domain, addr));
                continue;
            }
            let begin = usize::from(part.from - entry.first_slot);
            let pieces: Vec<&[u8]> =
                data[begin..begin + usize::from(part.count)].iter().flatten().map(Vec::as_slice).collect();
            let appended = {
                let mut compressor = self.core.compressor.borrow_mut();
                lane.log.append(addr, chunks, &pieces, &mut compressor, Compression::Adaptive)
            };
            let appended = appended.map_err(|_| Status::INTERNAL_ERROR)?;
            fragments.push(FragmentEntry {
                first_slot: part.from,
                chunks,
                codec: appended.codec,
                place: appended.place,
                unit_bytes: appended.unit_bytes,
            });
        }
        let raw: Vec<FragmentRaw> = fragments.iter().map(FragmentRaw::from).collect();
        let scope = cryptfold_reduce_format::journal::Scope::Domain { domain, generation };
        self.record(scope, &Record::FragmentMove { first, fragments: &raw })?;
        let mut shard = self.shard.borrow_mut();
        shard.damaged.remove(&(domain, first));
        shard.damaged.extend(still);
        drop(shard);
        let chunks: u16 = parts.iter().filter(|part| part.healed).map(|part| part.count).sum();
        self.healed.set(self.healed.get() + u64::from(chunks));
        tracing::info!(pool = %self.name(), chunk = ?first, chunks, "damaged chunks were healed by a later write of their data");
        Ok(())
    }

    /// The data of a slot, from another chunk with its fingerprint.
    async fn same_data(&self, domain: DomainId, number: u64, slot: u16) -> Result<Option<Vec<u8>>, Status> {
        let mut pins = self.pins();
        let print = {
            let shard = self.shard.borrow();
            let Some(d) = shard.domains.get(&domain.0) else { return Ok(None) };
            if d.containers.peek(number).is_none_or(|container| container.refs(slot) == 0) {
                return Ok(None);
            }
            let leaf = d.fingerprints.peek(number).filter(|leaf| leaf.generation == d.generation);
            let Some(print) = leaf.and_then(|leaf| leaf.slots.get(usize::from(slot))).copied() else {
                return Ok(None);
            };
            print
        };
        let mut found = Vec::new();
        loop {
            let mut needs = Needs::new();
            {
                let shard = self.shard.borrow();
                // Only hosts' look-ups ask for healing.
                let wanted = shard.wanted.borrow().clone();
                let looked = shard.lookup(domain, &[print], &mut found, &mut needs);
                *shard.wanted.borrow_mut() = wanted;
                looked.map_err(|_| Status::INVALID_NAMESPACE)?;
            }
            if needs.is_empty() {
                break;
            }
            self.load_all(needs, &mut pins).await?;
        }
        let Some(Some(addr)) = found.first().copied() else { return Ok(None) };
        let entry = {
            let shard = self.shard.borrow();
            let container =
                shard.domains.get(&domain.0).and_then(|d| d.containers.peek(addr.container().get()));
            container.and_then(|container| container.fragment_of(addr.slot()))
        };
        let Some(entry) = entry else { return Ok(None) };
        let Some(first) = ChunkAddr::new(addr.container(), entry.first_slot) else { return Ok(None) };
        match self.read_fragment(&entry, first).await {
            Ok(plain) => {
                let from = usize::from(addr.slot() - entry.first_slot) * CHUNK_BYTES;
                let chunk = plain[from..from + CHUNK_BYTES].to_vec();
                // The list may be wrong about what it stands for.
                Ok((self.fingerprints_of(domain, &chunk) == [print]).then_some(chunk))
            }
            Err(FragmentError::Damaged(_)) => Ok(None),
            Err(FragmentError::Io(status)) => Err(status),
        }
    }

    /// Runs of slots that are healed, and of those that can not be and have references. So few of the latter that each
    /// has its part of the old place.
    fn parts(
        &self,
        domain: DomainId,
        number: u64,
        entry: &FragmentEntry,
        data: &[Option<Vec<u8>>],
    ) -> Vec<Part> {
        let shard = self.shard.borrow();
        let Some(container) = shard.domains.get(&domain.0).and_then(|d| d.containers.peek(number)) else {
            return Vec::new();
        };
        let most = (entry.unit_bytes / PART_BYTES).max(1) as usize;
        let mut parts: Vec<Part> = Vec::new();
        for (slot, chunk) in (entry.first_slot..entry.end_slot()).zip(data) {
            let refs = container.refs(slot) > 0;
            let healed = chunk.is_some() && refs;
            match parts.last_mut() {
                Some(last) if last.healed == healed => last.count += 1,
                _ => parts.push(Part { from: slot, count: 1, healed }),
            }
        }
        let wanted =
            |part: &Part| part.healed || (part.from..part.from + part.count).any(|s| container.refs(s) > 0);
        parts.retain(wanted);
        while parts.iter().filter(|part| !part.healed).count() > most {
            // Too many for the old place: one healed run between two damaged ones waits for its neighbours.
            let Some(at) = (1..parts.len().saturating_sub(1)).find(|&at| parts[at].healed) else {
                return Vec::new();
            };
            let end = parts[at + 1].from + parts[at + 1].count;
            parts[at - 1].count = end - parts[at - 1].from;
            parts.drain(at..at + 2);
        }
        parts
    }
}
