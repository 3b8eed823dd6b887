//! Overwriting what may have data in clear, when encryption is switched on again: destroying keys does not hide what was stored
//! without encryption.
//!
//! When this begins nothing lives in a segment without encryption any more. What is left of such data is in free segments, and
//! behind the end of segments that have been opened since. So each segment of the device is *cleared* once: a free one is taken,
//! overwritten with zeros and given back; a closed one is overwritten behind what is used of it; one that is being filled is closed
//! first. Segments that are opened meanwhile come from cleared ones, or have to wait for their turn.
//!
//! Why that destroys nothing: a segment is overwritten only while it is taken, or while this holds its handle and nobody else does,
//! so it is neither filled nor opened, and no fragment that is sealed but not recorded lies in it.
//!
//! Where the catalogue ends in a segment of an earlier opening is not known: it is written anew first.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reactor::memory::Buf;
use cryptfold_reduce_format::block::BLOCK_BYTES;
use cryptfold_reduce_format::ids::{DomainId, POOL_DOMAIN};
use cryptfold_reduce_format::segtable::SEGMENTS_PER_LEAF;

use crate::pool::Pool;
use crate::renew::{Halt, Paid};

/// Bytes that are overwritten at once.
const WIPE_BYTES: u32 = 256 << 10;
/// How long to wait for readers of a segment.
const READERS: Duration = Duration::from_millis(5);

/// What one look at all segments has left.
#[derive(Default)]
struct Left {
    /// Being filled.
    open: bool,
    /// Holds the catalogue, and was opened by an earlier owner.
    catalogue: bool,
    /// In use by somebody, or not free for good yet.
    busy: bool,
}

impl Pool {
    /// Clears the device. Nothing lives in a segment without encryption that is to go.
    pub(crate) async fn wipe_free(self: &Rc<Self>, paid: &mut Paid) -> Result<(), Halt> {
        let mut cleared = vec![false; self.shard.borrow().segments.len() as usize];
        loop {
            self.clear_free(&mut cleared, paid).await?;
            let left = self.clear_tails(&mut cleared, paid).await?;
            if left.open || left.catalogue {
                self.end_segments(left.catalogue).await?;
            } else if left.busy {
                // Freed for good by a commit.
                self.flush().await?;
                reactor::sleep(READERS).await;
            } else if cleared.iter().all(|cleared| *cleared) {
                return Ok(());
            }
        }
    }

    async fn clear_free(self: &Rc<Self>, cleared: &mut [bool], paid: &mut Paid) -> Result<(), Halt> {
        loop {
            self.goes_on()?;
            let durable = self.journal.borrow().durable();
            let taken = self.shard.borrow_mut().segments.take_if(durable, |number| !is(cleared, number));
            let Some(number) = taken else { return Ok(()) };
            let start = self.shard.borrow().segments.start_bytes(number);
            let done = self.overwrite(start, 0, paid).await;
            let now = self.now();
            self.shard.borrow_mut().segments.put_back(number, now);
            done?;
            cleared[number as usize] = true;
        }
    }

    async fn clear_tails(self: &Rc<Self>, cleared: &mut [bool], paid: &mut Paid) -> Result<Left, Halt> {
        let mut left = Left::default();
        for number in 0..cleared.len() as u32 {
            self.goes_on()?;
            let (open, entry) = {
                let shard = self.shard.borrow();
                let Some((open, entry)) = shard.segments.filling(number) else { continue };
                (open, *entry)
            };
            cleared[number as usize] |= !self.shard.borrow().segments.is_usable(number);
            if cleared[number as usize] {
                continue;
            }
            if open {
                left.open = true;
                continue;
            }
            if entry.live_bytes == 0 {
                left.busy = true;
                continue;
            }
            if entry.domain == POOL_DOMAIN && entry.incarnation.0 >> 32 != self.epoch.get().owner_epoch.0 {
                left.catalogue = true;
                continue;
            }
            let segment = match self.segment(number).await {
                Err(Status::UNRECOVERED_READ) => {
                    return Err(Halt::Stuck(format!(
                        "the header of segment {number} can not be read, so what is behind its end can not be overwritten: repair the pool, then enable encryption again"
                    )));
                }
                segment => segment?,
            };
            let same = {
                let shard = self.shard.borrow();
                let now = shard.segments.filling(number);
                now.is_some_and(|(open, now)| !open && now.incarnation == entry.incarnation)
            };
            // The table's and this one.
            if !same || Arc::strong_count(&segment) > 2 {
                left.busy = true;
                continue;
            }
            let used = self.shard.borrow().segments.entry(number).map_or(0, |entry| entry.used_bytes);
            self.overwrite(segment.start_bytes, used, paid).await?;
            cleared[number as usize] = true;
        }
        Ok(left)
    }

    /// Closes everything that is being filled; with `catalogue` all of it is written anew.
    async fn end_segments(self: &Rc<Self>, catalogue: bool) -> Result<(), Halt> {
        let paused = self.pause_counted().await?;
        self.goes_on()?;
        let domains: Vec<DomainId> = self.shard.borrow().domains.values().map(|d| d.record.id).collect();
        for domain in domains {
            self.close_all(domain).await?;
        }
        let metadata = self.meta.lock().await.abandon();
        {
            let mut shard = self.shard.borrow_mut();
            for number in metadata {
                shard.segments.release(number);
            }
            if catalogue {
                for page in 0..(shard.segments.len() as usize).div_ceil(SEGMENTS_PER_LEAF) {
                    shard.segments.touch_page(page);
                }
            }
        }
        drop(paused);
        Ok(self.checkpoint().await?)
    }

    /// Overwrites a segment behind its first `used` bytes.
    async fn overwrite(self: &Rc<Self>, start: u64, used: u32, paid: &mut Paid) -> Result<(), Halt> {
        let zeroes = Buf::zeroes(WIPE_BYTES as usize);
        let mut at = used.next_multiple_of(BLOCK_BYTES as u32);
        while at < self.segment_bytes {
            self.goes_on()?;
            let bytes = WIPE_BYTES.min(self.segment_bytes - at);
            {
                // The device is not let go of before it is written.
                let _busy = self.enter();
                let data = zeroes.slice(0..bytes as usize);
                self.base.write(start + u64::from(at), data, false).await?;
            }
            at += bytes;
            paid.pay(self, bytes.into()).await;
        }
        Ok(())
    }
}

fn is(cleared: &[bool], number: u32) -> bool {
    // What a device that has grown meanwhile has more never held anything.
    cleared.get(number as usize).copied().unwrap_or(true)
}
