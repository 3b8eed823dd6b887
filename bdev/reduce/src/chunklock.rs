//! Locks on blocks of volumes, for changes that read, modify and write a block.
//!
//! A change takes all its blocks at once, as one range; who overlaps with an earlier one waits. First come, first served
//! among those that overlap, so nobody starves.

use std::cell::RefCell;
use std::collections::VecDeque;

use cryptfold_reactor::sync::Notify;
use cryptfold_reduce_format::ids::VolumeId;

#[derive(Clone, Copy)]
struct Range {
    ticket: u64,
    volume: VolumeId,
    first: u64,
    end: u64,
}

#[derive(Default)]
struct Inner {
    next: u64,
    /// In order of arrival; holders are those that overlap with nobody before them.
    ranges: VecDeque<Range>,
}

/// See the module's head.
#[derive(Default)]
pub(crate) struct ChunkLocks {
    inner: RefCell<Inner>,
    released: Notify,
}

/// A locked range of blocks; unlocks when dropped.
pub(crate) struct ChunkGuard<'a> {
    locks: &'a ChunkLocks,
    ticket: u64,
}

impl ChunkLocks {
    /// Locks blocks `first .. end` of a volume.
    pub async fn lock(&self, volume: VolumeId, first: u64, end: u64) -> ChunkGuard<'_> {
        let guard = {
            let mut inner = self.inner.borrow_mut();
            inner.next += 1;
            let ticket = inner.next;
            inner.ranges.push_back(Range { ticket, volume, first, end });
            ChunkGuard { locks: self, ticket }
        };
        while self.is_blocked(guard.ticket) {
            self.released.notified().await;
        }
        guard
    }

    fn is_blocked(&self, ticket: u64) -> bool {
        let inner = self.inner.borrow();
        let Some(me) = inner.ranges.iter().find(|range| range.ticket == ticket) else { return false };
        inner
            .ranges
            .iter()
            .take_while(|range| range.ticket != ticket)
            .any(|range| range.volume == me.volume && range.first < me.end && me.first < range.end)
    }
}

impl Drop for ChunkGuard<'_> {
    fn drop(&mut self) {
        self.locks.inner.borrow_mut().ranges.retain(|range| range.ticket != self.ticket);
        self.locks.released.notify_waiters();
    }
}
