//! Who is in, and who has to leave when the target is full.
//!
//! A connection enters when it is accepted. It is a *stranger* until its host has connected a queue and, where it has to, has
//! authenticated; then a *caller* if the queue is of the discovery subsystem and nobody has proven anything, or else a *guest*. For one
//! connection too many the oldest stranger leaves, or if there is none the oldest caller; guests never do. So whoever only holds places
//! holds them against nobody: a host gets in if it connects in less time than others take to come for all places that no guest has.
//!
//! Nothing is kept per address: many good hosts may come from one.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use cryptfold_reactor::Nanos;

use crate::group::ConnRef;
use crate::info::DoorInfo;
use crate::subsystem::locked;

/// Connections that have made room and have not ended yet, at most: one may have to wait for slow work that was begun for it.
const LEAVING_MAX: u32 = 8192;
/// The log is told at most this often.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// What is known of who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Standing {
    /// Nothing.
    Stranger,
    /// A name, which nobody has proven and which is let in to nothing but discovery.
    Caller,
    /// It is in service.
    Guest,
}

#[derive(Default)]
struct Inside {
    /// Connections that have a place.
    places: u32,
    /// Those of them that make room, in this order. Numbers of connections grow.
    movable: BTreeMap<(Standing, u64), ConnRef>,
    /// Connections that have made room and have not ended yet.
    leaving: u32,
    displaced: u64,
    refused: u64,
    /// When the log was told last, and what it knows of the last two.
    told: Option<(Nanos, u64, u64)>,
}

/// See the module's head. Shared by all reactors; touched when connections come, get further and end.
#[derive(Default)]
pub(crate) struct Door(Mutex<Inside>);

impl Door {
    /// A place for a new connection, where `limit` have one at most: whether it gets one. Somebody else may have to go for it.
    pub fn enter(&self, conn: &ConnRef, limit: u32, now: Nanos) -> bool {
        let mut inside = locked(&self.0);
        let full = inside.places >= limit;
        let victim = if full && inside.leaving < LEAVING_MAX { inside.displace() } else { None };
        let enters = !full || victim.is_some();
        if enters {
            inside.places += 1;
            inside.movable.insert((Standing::Stranger, conn.id), conn.clone());
        } else {
            inside.refused += 1;
        }
        let news = inside.news(now);
        drop(inside);
        if let Some(victim) = victim {
            victim.send(|conn| conn.delete());
        }
        tell(news);
        enters
    }

    /// Descriptors or memory are short: a quarter of the strangers leave, the oldest first. So who has just come has some time left.
    pub fn thin_out(&self, now: Nanos) {
        let mut inside = locked(&self.0);
        let strangers = inside.movable.keys().take_while(|k| k.0 == Standing::Stranger).count();
        let victims: Vec<_> = (0..strangers.div_ceil(4)).map_while(|_| inside.displace()).collect();
        let news = inside.news(now);
        drop(inside);
        tell(news);
        for victim in victims {
            victim.send(|conn| conn.delete());
        }
    }

    /// More is known of a stranger. `false`: it has been told to leave.
    pub fn rise(&self, id: u64, to: Standing) -> bool {
        let mut inside = locked(&self.0);
        let Some(conn) = inside.movable.remove(&(Standing::Stranger, id)) else { return false };
        if to != Standing::Guest {
            inside.movable.insert((to, id), conn);
        }
        true
    }

    /// A connection of this standing has ended.
    pub fn leave(&self, id: u64, standing: Standing) {
        let mut inside = locked(&self.0);
        if standing == Standing::Guest || inside.movable.remove(&(standing, id)).is_some() {
            inside.places -= 1;
        } else {
            inside.leaving -= 1;
        }
    }

    pub fn info(&self) -> DoorInfo {
        let inside = locked(&self.0);
        DoorInfo {
            connections: inside.places,
            unauthenticated: inside.movable.len() as u32,
            displaced: inside.displaced,
            refused: inside.refused,
        }
    }
}

fn tell(news: Option<(u64, u64)>) {
    if let Some((displaced, refused)) = news {
        tracing::warn!(
            "too many connections (max_connections, or descriptors): {displaced} of unknown hosts made room, {refused} were refused"
        );
    }
}

impl Inside {
    fn displace(&mut self) -> Option<ConnRef> {
        let (_, victim) = self.movable.pop_first()?;
        self.places -= 1;
        self.leaving += 1;
        self.displaced += 1;
        Some(victim)
    }

    /// What the log is to be told now: how many have made room, and how many were refused, since it was told last.
    fn news(&mut self, now: Nanos) -> Option<(u64, u64)> {
        let (last, displaced, refused) = self.told.map_or((None, 0, 0), |(t, d, r)| (Some(t), d, r));
        let news = (self.displaced - displaced, self.refused - refused);
        if news == (0, 0) || last.is_some_and(|t| now.since(t) < TELL_EVERY) {
            return None;
        }
        self.told = Some((now, self.displaced, self.refused));
        Some(news)
    }
}

#[cfg(test)]
mod tests {
    use cryptfold_reactor::Sim;

    use super::*;

    fn now(ms: u64) -> Nanos {
        Nanos(ms * 1_000_000)
    }

    #[test]
    fn strangers_leave_before_callers_and_guests_stay() {
        let sim = Sim::new(1).cores(1);
        let conn = |id| ConnRef { handle: sim.handles()[0].clone(), target: 1, id };
        let door = Door::default();
        assert!((1..=4).all(|id| door.enter(&conn(id), 4, now(0))));
        assert!(door.rise(1, Standing::Guest) && door.rise(2, Standing::Caller));
        let places =
            |door: &Door| (door.info().connections, door.info().unauthenticated, door.info().displaced);
        assert_eq!(places(&door), (4, 3, 0));
        // 3 goes for 5, and is a stranger to the end, even if it gets further meanwhile.
        assert!(door.enter(&conn(5), 4, now(0)));
        assert!(!door.rise(3, Standing::Guest));
        door.leave(3, Standing::Stranger);
        assert_eq!(places(&door), (4, 3, 1));
        assert!(door.rise(4, Standing::Guest) && door.rise(5, Standing::Guest));
        // 2, of whom a name is known, goes for 6, and 6 for nobody once it is in service.
        assert!(door.enter(&conn(6), 4, now(0)));
        door.leave(2, Standing::Caller);
        assert!(door.rise(6, Standing::Guest));
        assert!(!door.enter(&conn(7), 4, now(0)));
        assert_eq!((places(&door), door.info().refused), ((4, 0, 2), 1));
        for id in [1, 4, 5, 6] {
            door.leave(id, Standing::Guest);
        }
        assert_eq!(places(&door), (0, 0, 2));
    }

    #[test]
    fn who_leaves_slowly_has_a_bound() {
        let sim = Sim::new(1).cores(1);
        let conn = |id| ConnRef { handle: sim.handles()[0].clone(), target: 1, id };
        let door = Door::default();
        let most = u64::from(LEAVING_MAX);
        assert!((1..=2 + most).all(|id| door.enter(&conn(id), 2, now(0))), "all but the last two made room");
        assert!(!door.enter(&conn(3 + most), 2, now(0)), "and none has ended");
        door.leave(1, Standing::Stranger);
        assert!(door.enter(&conn(4 + most), 2, now(0)));
    }

    #[test]
    fn the_log_is_told_once_a_second() {
        let mut inside = Inside { displaced: 1, ..Inside::default() };
        assert_eq!(inside.news(now(5)), Some((1, 0)));
        (inside.displaced, inside.refused) = (9, 2);
        assert_eq!(inside.news(now(1004)), None);
        assert_eq!(inside.news(now(1005)), Some((8, 2)));
        assert_eq!(inside.news(now(9000)), None);
    }

    #[test]
    fn a_quarter_of_the_strangers_is_thinned_out() {
        let sim = Sim::new(1).cores(1);
        let conn = |id| ConnRef { handle: sim.handles()[0].clone(), target: 1, id };
        let door = Door::default();
        assert!((1..=6).all(|id| door.enter(&conn(id), 8, now(0))));
        assert!(door.rise(1, Standing::Caller));
        door.thin_out(now(0));
        assert!(!door.rise(2, Standing::Guest) && !door.rise(3, Standing::Guest));
        assert!(
            door.rise(4, Standing::Guest) && door.rise(5, Standing::Guest) && door.rise(6, Standing::Guest)
        );
        door.thin_out(now(0));
        assert_eq!(door.info().unauthenticated, 1, "nobody goes who is no stranger");
    }
}
