//! How fast the collector works, and what hosts may write while it falls behind.
//!
//! *Shortage* is how far free segments have fallen from where collection begins (0) to where hosts have to wait for one (1).
//!
//! - Between two looks at what hosts want, the collector moves as much as their writes since the last look need to be replaced by
//!   free space, and more the shorter space is. Where processors are the limit that is enough: hosts meet neither a long pause nor
//!   a full pool.
//! - Where the device is the limit hosts can still overtake it. So from a shortage of [`HOLD`] on they write what the collector makes
//!   room for: each write waits for its turn, a little, instead of all of them for the next whole segment.
//!
//! Nobody relies on this: a write that has waited for [`LONGEST_WAIT`] goes on, and what hosts may take is decided where segments
//! are taken. Hosts do not wait for a collector that finds nothing to do. Units: bytes of fragments as stored.

use std::cell::Cell;
use std::time::Duration;

use cryptfold_reactor as reactor;
use reactor::sync::{Mutex, Notify};

use crate::ingest::GROUP;
use crate::log::bound;
use crate::pool::{Life, Pool};

/// The collector works when fewer segments are free, beyond those that hosts can not take: one in so many.
const BEGIN_SHARE: usize = 32;
const BEGIN_LEAST: usize = 4;
/// The shortage from which on hosts wait for the collector.
const HOLD: f64 = 0.5;
/// What is moved in one go when hosts want nothing.
const QUANTUM_BYTES: f64 = 64e3;
/// And at most.
const MOST_BYTES: f64 = 1e6;
/// What hosts may have in advance.
const ALLOWANCE_BYTES: f64 = 256e3;
/// What they are credited with at once.
const CREDIT_BYTES: f64 = 8e3;
/// A write waits for room to be made no longer than this.
const LONGEST_WAIT: Duration = Duration::from_millis(50);
/// So many segments that hosts can take are kept durably free, if so many are free.
const READY: usize = 1;
/// Of a segment at least one byte in so many is dead when it is collected, ...
const WORTH: u32 = 8;
/// ... and from a shortage of [`NEED`] on, so that hosts come to wait as late as possible.
const WORTH_IN_NEED: u32 = 16;
const NEED: f64 = 0.25;

/// What hosts and the collector know of each other.
pub(crate) struct Demand {
    /// Bytes that hosts may write before the collector must have moved more.
    allowance: Cell<f64>,
    /// First come, first served.
    turn: Mutex<()>,
    credited: Notify,
    /// The collector has found nothing to do.
    resting: Cell<bool>,
    /// Hosts' writes wait for the collector.
    holding: Cell<bool>,
}

impl Demand {
    pub fn new() -> Demand {
        Demand {
            allowance: Cell::new(ALLOWANCE_BYTES),
            turn: Mutex::new(()),
            credited: Notify::new(),
            resting: Cell::new(true),
            holding: Cell::new(false),
        }
    }

    fn credit(&self, bytes: f64) {
        self.allowance.set((self.allowance.get() + bytes).min(ALLOWANCE_BYTES));
        self.credited.notify_waiters();
    }
}

impl Pool {
    /// Free segments that hosts can take, and where the collector begins.
    fn room_left(&self) -> (usize, usize) {
        let shard = self.shard.borrow();
        let begin = (shard.segments.usable() / BEGIN_SHARE).max(BEGIN_LEAST);
        (shard.segments.free_count().saturating_sub(shard.segments.reserve().0), begin)
    }

    /// Whether the collector should work.
    pub(crate) fn is_short(&self) -> bool {
        let (left, begin) = self.room_left();
        left < begin
    }

    /// See the module's head.
    pub(crate) fn shortage(&self) -> f64 {
        let (left, begin) = self.room_left();
        (1.0 - left as f64 / begin as f64).max(0.0)
    }

    /// Bytes that have to be dead in a segment for it to be collected. The longer it waits, the more are; so few are worth it only
    /// when hosts would have to wait.
    pub(crate) fn worthwhile(&self) -> u32 {
        let most = self.segment_bytes / WORTH;
        if self.shortage() < NEED {
            return most;
        }
        // More than what a segment may waste that has just been filled, or collection would never end.
        (self.segment_bytes / WORTH_IN_NEED).max(2 * bound(GROUP) as u32).min(most)
    }

    /// Has what was freed made durable, if hardly a segment could be opened at once: who needs the next one does not wait for a commit.
    pub(crate) fn ready_segments(&self) {
        let ready = {
            let durable = self.journal.borrow().durable();
            let shard = self.shard.borrow();
            shard.segments.ready_count(durable).saturating_sub(shard.segments.reserve().0)
        };
        if ready < READY {
            self.want_commit();
        }
    }

    /// The collector has found nothing to do, or has again.
    pub(crate) fn rest(&self, resting: bool) {
        self.demand.resting.set(resting);
        self.see_shortage();
    }

    /// Free segments have become fewer, or more.
    pub(crate) fn see_shortage(&self) {
        let holding = !self.demand.resting.get() && self.shortage() >= HOLD;
        if self.demand.holding.replace(holding) && !holding {
            self.demand.allowance.set(ALLOWANCE_BYTES);
            self.demand.credited.notify_waiters();
        }
    }

    /// Whether hosts' writes wait for the collector.
    fn holds_back(&self) -> bool {
        self.demand.holding.get() && self.life.get() == Life::Open && !self.auditing.get()
    }

    /// Lets a host's write in, if it need not wait.
    pub(crate) fn try_admit(&self) -> bool {
        !self.holds_back() || (self.demand.turn.try_lock().is_some() && self.demand.allowance.get() > 0.0)
    }

    /// Lets a host's write in when it is its turn.
    pub(crate) async fn admit(&self) {
        if !self.holds_back() {
            return;
        }
        let limit = reactor::now() + LONGEST_WAIT;
        let _turn = self.demand.turn.lock().await;
        while self.holds_back() && self.demand.allowance.get() <= 0.0 {
            let now = reactor::now();
            if now >= limit {
                break;
            }
            self.collect.notify_one();
            // Over in time or not: what counts is looked at again.
            let _ = reactor::timeout(limit - now, self.demand.credited.notified()).await;
        }
    }

    /// Hosts have stored `bytes`.
    pub(crate) fn charge(&self, bytes: u32) {
        self.host_bytes.set(self.host_bytes.get() + u64::from(bytes));
        if self.demand.holding.get() {
            let left = self.demand.allowance.get() - f64::from(bytes);
            self.demand.allowance.set(left.max(-ALLOWANCE_BYTES));
        }
    }
}

/// How much the collector may move before it lets hosts go on. See the module's head.
pub(crate) struct Pace {
    /// Bytes; negative when more was moved.
    left: f64,
    /// Bytes that have become free and hosts have not been credited with.
    won: f64,
    /// [`Pool::host_bytes`] at the last look.
    seen: u64,
    /// Bytes to be moved for each byte that becomes free.
    cost: f64,
}

impl Pace {
    /// For a segment in which `live` bytes live.
    pub fn new(pool: &Pool, live: u32) -> Pace {
        let dead = pool.segment_bytes.saturating_sub(live).max(pool.segment_bytes / 16);
        let cost = f64::from(live.max(1)) / f64::from(dead);
        Pace { left: QUANTUM_BYTES, won: 0.0, seen: pool.host_bytes.get(), cost }
    }

    /// So many bytes have been moved; true: others are to go on now.
    pub fn moved(&mut self, pool: &Pool, bytes: usize) -> bool {
        self.won += bytes as f64 / self.cost;
        if self.won >= CREDIT_BYTES {
            // Less than what has become free near the end, more before: metadata takes a part of it.
            let share = 0.5 + 2.0 * (1.0 - pool.shortage());
            pool.demand.credit(std::mem::take(&mut self.won) * share);
        }
        self.passed(bytes)
    }

    /// Work on so many bytes has made no room.
    pub fn passed(&mut self, bytes: usize) -> bool {
        self.left -= bytes as f64;
        self.left < 0.0
    }

    /// Others have gone on.
    pub fn renew(&mut self, pool: &Pool) {
        pool.see_shortage();
        let written = pool.host_bytes.get() - self.seen;
        self.seen += written;
        let due = written as f64 * self.cost * (1.0 + 3.0 * pool.shortage());
        self.left = due.clamp(QUANTUM_BYTES, MOST_BYTES);
    }
}
