//! Range locks across the channels of a device: what makes compare-and-write atomic against writes of other queues.
//!
//! To lock, every channel is told (by message to its core) to hold back new changes to the range and to report when
//! those that it had let through before are done. A channel does not track ranges for that: it counts changes in two
//! epochs, and the old one has to run empty while new changes elsewhere go on in the other. Reads are never held.

use std::collections::{HashMap, VecDeque};
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cryptfold_reactor as reactor;
use reactor::Handle;
use reactor::sync::oneshot;

use crate::channel::ChannelInner;
use crate::registry::locked;

/// A range in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub lba: u64,
    pub blocks: u64,
}

impl Range {
    pub fn overlaps(&self, other: &Range) -> bool {
        self.lba < other.lba.saturating_add(other.blocks) && other.lba < self.lba.saturating_add(self.blocks)
    }
}

pub(crate) type LockId = u64;

#[derive(Default)]
pub(crate) struct RangeLocks {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    held: Vec<(LockId, Range)>,
    waiting: VecDeque<(LockId, Range, Handle, WakeId)>,
    channels: Vec<(ChannelId, Handle)>,
}

pub(crate) type ChannelId = u64;
type WakeId = u64;

thread_local! {
    /// Channels of this thread, so that a message can name one. Ids are unique in the process.
    static CHANNELS: std::cell::RefCell<HashMap<ChannelId, Weak<ChannelInner>>> = Default::default();
    /// Tasks of this thread that wait for a lock or for its acknowledgements.
    static WAKES: std::cell::RefCell<HashMap<WakeId, oneshot::Sender<()>>> = Default::default();
}

static NEXT_ID: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);

pub(crate) fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

fn wake(id: WakeId) {
    if let Some(tx) = WAKES.with_borrow_mut(|w| w.remove(&id)) {
        // The waiter may have been dropped with its task; then nobody needs to know.
        let _ = tx.send(());
    }
}

fn channel(id: ChannelId) -> Option<Rc<ChannelInner>> {
    CHANNELS.with_borrow(|c| c.get(&id).and_then(Weak::upgrade))
}

/// Counts the acknowledgements of one lock request; the last one wakes the requester.
pub(crate) struct Acks {
    left: AtomicUsize,
    requester: Handle,
    wake: WakeId,
}

impl Drop for Ack {
    fn drop(&mut self) {
        if self.0.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let id = self.0.wake;
            self.0.requester.send(move || wake(id));
        }
    }
}

/// One channel's pending acknowledgement: given by dropping it, so that a channel that closes gives it too.
pub(crate) struct Ack(Arc<Acks>);

/// A locked range; unlocks when dropped.
pub(crate) struct RangeGuard {
    bdev: Arc<crate::Bdev>,
    id: LockId,
}

impl RangeLocks {
    /// A new channel: gets the ranges that are locked now.
    pub fn attach(&self, id: ChannelId, c: &Rc<ChannelInner>) {
        CHANNELS.with_borrow_mut(|m| m.insert(id, Rc::downgrade(c)));
        let mut s = locked(&self.state);
        s.channels.push((id, reactor::current()));
        for (lock, range) in &s.held {
            c.hold(*lock, *range, None);
        }
    }

    pub fn detach(&self, id: ChannelId) {
        CHANNELS.with_borrow_mut(|m| m.remove(&id));
        locked(&self.state).channels.retain(|c| c.0 != id);
    }

    /// Waits until no change to `range` is under way and none can start except the holder's own.
    pub async fn lock(bdev: &Arc<crate::Bdev>, range: Range) -> RangeGuard {
        let me = reactor::current();
        let (id, queued) = {
            let mut s = locked(&bdev.locks.state);
            s.next += 1;
            let id = s.next;
            let busy =
                s.held.iter().map(|h| &h.1).chain(s.waiting.iter().map(|w| &w.1)).any(|r| r.overlaps(&range));
            let queued = busy.then(|| {
                let (tx, rx) = oneshot::channel();
                let wake_id = next_id();
                WAKES.with_borrow_mut(|w| w.insert(wake_id, tx));
                s.waiting.push_back((id, range, me.clone(), wake_id));
                rx
            });
            if !busy {
                s.held.push((id, range));
            }
            (id, queued)
        };
        let guard = RangeGuard { bdev: bdev.clone(), id };
        if let Some(rx) = queued {
            // Woken by `unlock`, which has moved the request to `held`.
            let _ = rx.await;
        }
        let (tx, rx) = oneshot::channel();
        let wake_id = next_id();
        WAKES.with_borrow_mut(|w| w.insert(wake_id, tx));
        let channels = locked(&bdev.locks.state).channels.clone();
        let acks =
            Arc::new(Acks { left: AtomicUsize::new(channels.len() + 1), requester: me, wake: wake_id });
        let mine = Ack(acks.clone());
        for (cid, handle) in channels {
            let ack = Ack(acks.clone());
            handle.send(move || {
                if let Some(c) = channel(cid) {
                    c.hold(id, range, Some(ack));
                }
            });
        }
        drop((mine, acks));
        let _ = rx.await;
        guard
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let id = self.id;
        let mut s = locked(&self.bdev.locks.state);
        s.held.retain(|h| h.0 != id);
        s.waiting.retain(|w| w.0 != id);
        for (cid, handle) in s.channels.clone() {
            handle.send(move || {
                if let Some(c) = channel(cid) {
                    c.release(id);
                }
            });
        }
        // Whoever waits and no longer overlaps with a holder or an earlier waiter goes on.
        let mut still = VecDeque::new();
        while let Some(w) = s.waiting.pop_front() {
            let busy = s
                .held
                .iter()
                .map(|h| &h.1)
                .chain(still.iter().map(|x: &(_, Range, _, _)| &x.1))
                .any(|r| r.overlaps(&w.1));
            if busy {
                still.push_back(w);
            } else {
                s.held.push((w.0, w.1));
                let wake_id = w.3;
                w.2.send(move || wake(wake_id));
            }
        }
        s.waiting = still;
    }
}
