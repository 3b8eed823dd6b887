//! What hosts may use of the target together and each: connections, and memory for the data of their commands.
//!
//! A connection takes memory in steps of [`STEP_BYTES`] and gives back what it does not need, so the counters, which all
//! reactors share, are rarely touched. A connection that holds nothing may always carry out one command: whatever the
//! others do, everybody gets on.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use crate::subsystem::locked;

/// Memory is taken in multiples of this, bytes.
pub(crate) const STEP_BYTES: u64 = 256 << 10;

/// Memory that may be used, bytes.
#[derive(Default)]
pub(crate) struct Memory {
    used: AtomicU64,
}

impl Memory {
    fn take(&self, bytes: u64, limit: u64) -> bool {
        let room = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).is_ok()
    }

    fn give(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// In use now, bytes.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

/// What one host uses.
#[derive(Default)]
pub(crate) struct Share {
    memory: Memory,
    connections: AtomicU32,
}

/// A connection's place in its host's share, until dropped.
pub(crate) struct Place {
    share: Arc<Share>,
    all: Arc<Memory>,
    limits: Limits,
    /// Taken of both, bytes.
    granted: u64,
}

/// The limits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections of one host.
    pub host_connections: u32,
    /// Memory of one host, bytes.
    pub host_bytes: u64,
    /// Memory of all, bytes.
    pub bytes: u64,
}

/// All hosts.
#[derive(Default)]
pub(crate) struct Hosts {
    memory: Arc<Memory>,
    shares: Mutex<HashMap<String, Weak<Share>>>,
}

impl Hosts {
    /// A place for one more connection of this host; `None` if it has as many as it may.
    pub fn place(&self, hostnqn: &str, limits: Limits) -> Option<Place> {
        let mut shares = locked(&self.shares);
        let known = shares.get(hostnqn).and_then(Weak::upgrade);
        let share = known.unwrap_or_else(|| {
            shares.retain(|_, s| s.strong_count() > 0);
            let share = Arc::<Share>::default();
            shares.insert(hostnqn.into(), Arc::downgrade(&share));
            share
        });
        drop(shares);
        if share.connections.fetch_add(1, Ordering::Relaxed) >= limits.host_connections {
            share.connections.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Place { share, all: self.memory.clone(), limits, granted: 0 })
    }

    /// Memory in use by all, bytes.
    pub fn used(&self) -> u64 {
        self.memory.used()
    }
}

impl Place {
    /// Makes sure that `bytes` in all are granted; `false` if there is not so much.
    #[inline]
    pub fn cover(&mut self, bytes: u64) -> bool {
        bytes <= self.granted || self.grow(bytes)
    }

    #[cold]
    fn grow(&mut self, bytes: u64) -> bool {
        let more = (bytes - self.granted).next_multiple_of(STEP_BYTES);
        if !self.share.memory.take(more, self.limits.host_bytes) {
            return false;
        }
        if !self.all.take(more, self.limits.bytes) {
            self.share.memory.give(more);
            return false;
        }
        self.granted += more;
        true
    }

    /// Gives back what exceeds `bytes`, and something on top that is likely to be wanted again.
    #[inline]
    pub fn trim(&mut self, bytes: u64, spare: u64) {
        let keep = (bytes + spare).next_multiple_of(STEP_BYTES);
        if self.granted > keep {
            self.give(self.granted - keep);
        }
    }

    #[cold]
    fn give(&mut self, bytes: u64) {
        self.granted -= bytes;
        self.share.memory.give(bytes);
        self.all.give(bytes);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.give(self.granted);
        self.share.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { host_connections: 2, host_bytes: 4 * STEP_BYTES, bytes: 6 * STEP_BYTES };

    #[test]
    fn one_host_and_all_are_limited() {
        let hosts = Hosts::default();
        let place = |name| hosts.place(name, LIMITS);
        let (mut a, mut a2, mut b) =
            (place("a").expect("free"), place("a").expect("free"), place("b").expect("free"));
        assert!(place("a").is_none(), "two are enough");
        assert!(a.cover(3 * STEP_BYTES - 5) && a.cover(STEP_BYTES) && a2.cover(1));
        assert_eq!(hosts.used(), 4 * STEP_BYTES);
        assert!(!a2.cover(STEP_BYTES + 1), "the host has its share");
        assert!(b.cover(2 * STEP_BYTES) && !b.cover(2 * STEP_BYTES + 1), "all have theirs");
        drop(a2);
        assert!(place("a").is_some() && b.cover(3 * STEP_BYTES));
        a.trim(10, 0);
        assert_eq!(hosts.used(), 4 * STEP_BYTES);
        drop((a, b));
        assert_eq!(hosts.used(), 0);
        assert!(
            place("c").is_some() && locked(&hosts.shares).len() == 1,
            "hosts that are gone are forgotten"
        );
    }
}
