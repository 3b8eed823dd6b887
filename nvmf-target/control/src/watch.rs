//! What has appeared and gone: compares the registry with what was there at the last look, keeps the events for
//! `notify_get_notifications`, and says which new devices are to be examined for pools.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Condvar, Mutex, PoisonError};

use cryptfold_bdev::{LOW_PERCENT, Registry, Room};
use cryptfold_reduce::PoolEvent;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::control::lock;

/// Events kept for clients that come late.
const KEPT: usize = 1024;
/// All kinds of events.
pub const KINDS: [&str; 9] = [
    "bdev_register",
    "bdev_unregister",
    "pool_open",
    "pool_close",
    "pool_space_low",
    "pool_space_critical",
    "pool_space_enough",
    "pool_capacity",
    "pool_failed",
];

#[derive(Default)]
struct Seen {
    /// UUID by name: a device that was replaced under its name is a new one.
    bdevs: HashMap<String, Uuid>,
    events: VecDeque<(u64, &'static str, String)>,
    next_id: u64,
    /// Names to be examined as soon as they appear (`bdev_examine`).
    wanted: BTreeSet<String>,
    /// Names that are left to a later call of the configuration being loaded.
    spared: BTreeSet<String>,
    examining: u32,
}

/// See the module.
#[derive(Default)]
pub struct Watch {
    seen: Mutex<Seen>,
    idle: Condvar,
}

impl Watch {
    /// Looks at the registry; returns the names of new devices, which the caller examines and then reports by
    /// [`Watch::examined`].
    pub fn look(&self, registry: &Registry) -> Vec<String> {
        let now: Vec<(String, Uuid)> = registry
            .list()
            .iter()
            .filter(|b| !b.is_removing())
            .map(|b| (b.name().into(), b.info().uuid))
            .collect();
        let mut s = lock(&self.seen);
        let current: HashMap<String, Uuid> = now.iter().cloned().collect();
        let mut gone: Vec<String> =
            s.bdevs.iter().filter(|(n, u)| current.get(*n) != Some(u)).map(|(n, _)| n.clone()).collect();
        gone.sort();
        for name in gone {
            s.note("bdev_unregister", &name);
        }
        let new: Vec<String> =
            now.into_iter().filter(|(n, u)| s.bdevs.get(n) != Some(u)).map(|(n, _)| n).collect();
        for name in &new {
            s.note("bdev_register", name);
        }
        s.bdevs = current;
        s.examining += new.len() as u32;
        new
    }

    /// `count` devices of [`Watch::look`] are done with.
    pub fn examined(&self, count: usize) {
        let mut s = lock(&self.seen);
        s.examining -= (count as u32).min(s.examining);
        if s.examining == 0 {
            self.idle.notify_all();
        }
    }

    /// Waits until all examinations have ended.
    pub fn wait_examined(&self) {
        let mut s = lock(&self.seen);
        while s.examining > 0 {
            s = self.idle.wait(s).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Asks for a device to be examined when it appears.
    pub fn want(&self, name: &str) {
        lock(&self.seen).wanted.insert(name.into());
    }

    /// Leaves these devices to later calls, which open their pools as the configuration says.
    pub fn spare(&self, names: BTreeSet<String>) {
        lock(&self.seen).spared = names;
    }

    /// Whether a device is left to a later call.
    pub fn is_spared(&self, name: &str) -> bool {
        lock(&self.seen).spared.contains(name)
    }

    /// Whether that was asked for; forgets it.
    pub fn take_wanted(&self, name: &str) -> bool {
        lock(&self.seen).wanted.remove(name)
    }

    /// Adds an event of another kind.
    pub fn note(&self, kind: &'static str, context: &str) {
        lock(&self.seen).note(kind, context);
    }

    /// Adds what has happened to a pool.
    pub fn pool_event(&self, pool: &str, event: PoolEvent) {
        let kind = match event {
            PoolEvent::Room(Room::Low) => {
                tracing::warn!(pool, "less than {LOW_PERCENT}% of the space is left");
                "pool_space_low"
            }
            PoolEvent::Room(Room::Critical) => {
                tracing::error!(pool, "almost no space is left; writes will fail soon");
                "pool_space_critical"
            }
            PoolEvent::Room(Room::Enough) => {
                tracing::info!(pool, "there is enough space again");
                "pool_space_enough"
            }
            PoolEvent::Capacity => {
                tracing::info!(pool, "another capacity");
                "pool_capacity"
            }
            // The pool has said why.
            PoolEvent::Failed => "pool_failed",
            PoolEvent::Closed => {
                tracing::info!(pool, "pool closed");
                "pool_close"
            }
        };
        self.note(kind, pool);
    }

    /// At most `max` events from number `from` on.
    pub fn events(&self, from: u64, max: u64) -> Vec<Value> {
        lock(&self.seen)
            .events
            .iter()
            .filter(|e| e.0 >= from)
            .take(usize::try_from(max).unwrap_or(usize::MAX))
            .map(|(id, kind, context)| json!({"type": kind, "ctx": context, "id": id}))
            .collect()
    }
}

impl Seen {
    fn note(&mut self, kind: &'static str, context: &str) {
        debug_assert!(KINDS.contains(&kind), "{kind} is listed");
        if self.events.len() == KEPT {
            self.events.pop_front();
        }
        self.events.push_back((self.next_id, kind, context.into()));
        self.next_id += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cryptfold_bdev_null::{NullOptions, create};

    fn null(r: &std::sync::Arc<Registry>, name: &str) {
        create(r, NullOptions { name: name.into(), num_blocks: 8, block_size_bytes: 512, uuid: None })
            .unwrap();
    }

    #[test]
    fn events_follow_the_registry() {
        let (w, r) = (Watch::default(), Registry::new());
        null(&r, "a");
        null(&r, "b");
        assert_eq!(w.look(&r), ["a", "b"]);
        assert!(w.look(&r).is_empty());
        assert!(r.unregister("a").unwrap().is_done());
        null(&r, "a");
        assert_eq!(w.look(&r), ["a"], "same name, another device");
        w.examined(3);
        w.wait_examined();
        let kinds: Vec<String> =
            w.events(0, u64::MAX).iter().map(|e| format!("{} {}", e["type"], e["ctx"])).collect();
        assert_eq!(
            kinds,
            [
                r#""bdev_register" "a""#,
                r#""bdev_register" "b""#,
                r#""bdev_unregister" "a""#,
                r#""bdev_register" "a""#
            ]
        );
        assert_eq!(w.events(2, 1)[0]["id"], 2);
        assert!(w.events(4, 10).is_empty());
    }
}
