//! The scrub: reads and verifies all stored data in the background, at a bounded rate, in small steps between which hosts
//! run.
//!
//! Goes through the containers in order and reads neighbouring fragments together. A fragment that does not verify is read
//! once more by itself; if it is damaged, that is remembered as when a host had met it: its blocks are errors, and a later
//! write of the same data heals it. Progress is kept in RAM: after a restart a scrub begins anew.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::container::FragmentEntry;
use cryptfold_reduce_format::fragment::CHUNK_BYTES;
use cryptfold_reduce_format::ids::{ChunkAddr, ContainerId, DomainId};
use cryptfold_reduce_format::node;

use crate::check::FragmentError;
use crate::info::{ScrubInfo, ScrubState};
use crate::pool::{Life, Pool};
use crate::segments::Segment;

/// Stored bytes per second when nothing else is asked for.
pub const DEFAULT_SCRUB_BYTES_PER_S: u64 = 100_000_000;
/// Bytes read at once.
const READ_BYTES: u32 = 256 << 10;
/// Gap between fragments that are read together.
const GAP_BYTES: u32 = 8 << 10;

impl Pool {
    /// Starts a scrub, or gives the one that runs another rate.
    pub(crate) fn start_scrub(self: &Rc<Self>, bytes_per_s: u64) -> Result<ScrubInfo, Status> {
        self.check_writable()?;
        let mut scrub = self.scrub.borrow_mut();
        if scrub.state == ScrubState::Running {
            scrub.bytes_per_s = bytes_per_s;
            return Ok(scrub.clone());
        }
        let total_bytes = self.shard.borrow().segments.live_data_bytes;
        *scrub = ScrubInfo { state: ScrubState::Running, bytes_per_s, total_bytes, ..ScrubInfo::default() };
        tracing::info!(pool = %self.name(), total_bytes, "scrub begins");
        let pool = self.clone();
        self.background(async move {
            let state = match pool.run_scrub().await {
                Ok(state) => state,
                Err(status) => {
                    tracing::warn!(pool = %pool.name(), %status, "a scrub was interrupted");
                    ScrubState::Stopped
                }
            };
            let mut scrub = pool.scrub.borrow_mut();
            scrub.state = state;
            tracing::info!(
                pool = %pool.name(), ?state, fragments = scrub.fragments, bytes = scrub.bytes,
                damaged = scrub.damaged, "scrub ended"
            );
        });
        Ok(scrub.clone())
    }

    /// Ends a scrub; it stops before its next read.
    pub(crate) fn stop_scrub(&self) -> ScrubInfo {
        let mut scrub = self.scrub.borrow_mut();
        if scrub.state == ScrubState::Running {
            scrub.state = ScrubState::Stopped;
        }
        scrub.clone()
    }

    async fn run_scrub(self: &Rc<Self>) -> Result<ScrubState, Status> {
        let domains: Vec<(u32, u64)> =
            self.shard.borrow().domains.iter().map(|(id, d)| (*id, d.next_container)).collect();
        // Time up to which the rate allows what has been read.
        let mut paid = reactor::now();
        for (id, end) in domains {
            for number in 1..end {
                let mut fragments = match self.live_fragments(id, number).await {
                    Ok(fragments) => fragments,
                    // What can not be read is counted; the loader has reported it.
                    Err(_) => {
                        self.scrub.borrow_mut().damaged += 1;
                        continue;
                    }
                };
                fragments.sort_unstable_by_key(|f| (f.place.segment.segment.0, f.place.offset));
                let mut rest = fragments.as_slice();
                while !rest.is_empty() {
                    if self.scrub.borrow().state != ScrubState::Running {
                        return Ok(ScrubState::Stopped);
                    }
                    if self.life.get() != Life::Open {
                        return Ok(ScrubState::Stopped);
                    }
                    let (group, others) = rest.split_at(together(rest));
                    rest = others;
                    let bytes = self.scrub_group(DomainId(id), number, group).await?;
                    let rate = self.scrub.borrow().bytes_per_s.max(1);
                    let now = reactor::now();
                    // A pause is not made up for.
                    paid = paid.max(now) + Duration::from_secs_f64(bytes as f64 / rate as f64);
                    reactor::sleep(paid - now).await;
                }
                if number % 64 == 0 {
                    reactor::yield_now().await;
                }
            }
        }
        Ok(ScrubState::Done)
    }

    async fn live_fragments(&self, domain: u32, number: u64) -> Result<Vec<FragmentEntry>, Status> {
        let mut pins = self.pins();
        self.load_leaf(node::Tree::Containers, domain, number, &mut pins).await?;
        let shard = self.shard.borrow();
        let container = shard.domains.get(&domain).and_then(|d| d.containers.peek(number));
        let live = container.map(|c| c.fragments().filter(|f| c.live_in(f) > 0).collect());
        Ok(live.unwrap_or_default())
    }

    /// Verifies fragments of one segment that lie near each other. Gives the bytes read.
    async fn scrub_group(
        self: &Rc<Self>,
        domain: DomainId,
        number: u64,
        group: &[FragmentEntry],
    ) -> Result<u64, Status> {
        let (Some(head), Some(last)) = (group.first(), group.last()) else { return Ok(0) };
        let (start, end) = (head.place.offset, last.place.offset + last.unit_bytes);
        // The handle keeps the segment from being used for something else meanwhile.
        let segment = self.segment(head.place.segment.segment.0).await.ok();
        let data = match &segment {
            Some(segment) if segment.is_written(end) => {
                self.base.read(segment.start_bytes + u64::from(start), (end - start) as usize).await.ok()
            }
            _ => None,
        };
        for entry in group {
            let Some(first) = ContainerId::new(number).and_then(|c| ChunkAddr::new(c, entry.first_slot))
            else {
                continue;
            };
            let from = (entry.place.offset - start) as usize;
            let sealed = data.as_ref().map(|data| &data[from..from + entry.unit_bytes as usize]);
            let fine = sealed.is_some_and(|sealed| self.verifies(segment.as_ref(), entry, first, sealed));
            if !fine {
                self.scrub_again(domain, number, entry, first).await?;
            }
            {
                let mut scrub = self.scrub.borrow_mut();
                scrub.fragments += 1;
                scrub.bytes += u64::from(entry.unit_bytes);
            }
            reactor::yield_now().await;
        }
        Ok(u64::from(end - start))
    }

    fn verifies(
        &self,
        segment: Option<&Arc<Segment>>,
        entry: &FragmentEntry,
        first: ChunkAddr,
        sealed: &[u8],
    ) -> bool {
        let Some(segment) = segment else { return false };
        let mut plain = vec![0; usize::from(entry.chunks) * CHUNK_BYTES];
        let mut decoder = self.core.decoder.borrow_mut();
        decoder.decode(segment, entry, first, sealed, &mut plain).is_ok()
    }

    /// A second look, at one fragment.
    async fn scrub_again(
        self: &Rc<Self>,
        domain: DomainId,
        number: u64,
        entry: &FragmentEntry,
        first: ChunkAddr,
    ) -> Result<(), Status> {
        let error = match self.read_fragment(entry, first).await {
            Ok(_) => return Ok(()),
            Err(FragmentError::Io(status)) => return Err(status),
            Err(FragmentError::Damaged(error)) => error,
        };
        // It may have moved meanwhile; then it was read and verified by whoever moved it.
        let same = self.live_fragments(domain.0, number).await?.contains(entry);
        if same {
            self.scrub.borrow_mut().damaged += 1;
            self.fragment_damaged(domain, entry, first, &error);
        }
        Ok(())
    }
}

/// How many of these (ascending by place) are read at once: at least one.
pub(crate) fn together(fragments: &[FragmentEntry]) -> usize {
    let Some(head) = fragments.first() else { return 0 };
    let mut end = head.place.offset + head.unit_bytes;
    let mut count = 1;
    for next in &fragments[1..] {
        let after = next.place.offset + next.unit_bytes;
        let joins = next.place.segment == head.place.segment
            && next.place.offset <= end + GAP_BYTES
            && after - head.place.offset <= READ_BYTES;
        if !joins {
            break;
        }
        end = after;
        count += 1;
    }
    count
}
