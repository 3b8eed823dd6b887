//! Calls that were refused, for the audit log: the first [`TOLD`] of a user and a method in each minute are told one by one, the others
//! are counted, and the count is told when the minute ends. So nobody fills the log with what costs nothing, and nothing is lost.
//!
//! Bounded: [`KINDS`] kinds (user and method) are kept apart, what comes beyond is one kind more.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cryptfold_nvmf_target::audit::TARGET as AUDIT;

use crate::access::Peer;
use crate::control::lock;

/// Told one by one, of one kind.
const TOLD: u64 = 10;
/// Within this time.
const WINDOW: Duration = Duration::from_secs(60);
/// Kinds that are kept apart.
const KINDS: usize = 256;

/// A user and a method; none: those for which there was no room.
type Kind = Option<(u32, &'static str)>;

struct Window {
    since: Instant,
    calls: u64,
    /// Of the last one.
    by: String,
    reason: String,
}

/// So many that were not told one by one.
#[derive(Debug, PartialEq, Eq)]
struct Rest {
    kind: Kind,
    calls: u64,
    by: String,
    reason: String,
}

#[derive(Default)]
struct Windows(HashMap<Kind, Window>);

impl Windows {
    /// One more; whether it is told by itself.
    fn add(&mut self, now: Instant, (peer, method): (Peer, &'static str), reason: &str) -> bool {
        let kind = Some((peer.uid, method));
        let full = self.0.len() >= KINDS && !self.0.contains_key(&kind);
        let new = || Window { since: now, calls: 0, by: String::new(), reason: String::new() };
        let window = self.0.entry(kind.filter(|_| !full)).or_insert_with(new);
        window.calls += 1;
        let told = window.calls <= TOLD;
        if !told {
            (window.by, window.reason) = (peer.to_string(), reason.to_owned());
        }
        told
    }

    /// Those that have ended, or all; what was not told of them.
    fn end(&mut self, now: Option<Instant>) -> Vec<Rest> {
        let ended = |w: &mut Window| now.is_none_or(|now| now.saturating_duration_since(w.since) >= WINDOW);
        let mut ended: Vec<_> = self.0.extract_if(|_, w| ended(w)).filter(|(_, w)| w.calls > TOLD).collect();
        ended.sort_by_key(|(_, w)| w.since);
        let rest =
            |(kind, w): (Kind, Window)| Rest { kind, calls: w.calls - TOLD, by: w.by, reason: w.reason };
        ended.into_iter().map(rest).collect()
    }

    /// When the first one ends of which something is to be told.
    fn next(&self) -> Option<Instant> {
        self.0.values().filter(|w| w.calls > TOLD).map(|w| w.since + WINDOW).min()
    }
}

#[derive(Default)]
struct State {
    windows: Windows,
    /// A thread waits for the end of a window.
    waiting: bool,
    ended: bool,
}

/// See the module. Cheap to clone.
#[derive(Clone, Default)]
pub struct Refusals(Arc<(Mutex<State>, Condvar)>);

impl Refusals {
    /// A call was refused.
    pub fn add(&self, peer: Peer, method: &'static str, reason: &str) {
        let mut state = lock(&self.0.0);
        let now = Instant::now();
        let rest = state.windows.end(Some(now));
        let alone = state.windows.add(now, (peer, method), reason);
        if !alone && !state.waiting && !state.ended {
            let me = self.clone();
            state.waiting = true;
            let spawned = std::thread::Builder::new().name("refused".into()).spawn(move || me.wait());
            if let Err(error) = spawned {
                // The next refusal tells, or the end.
                state.waiting = false;
                tracing::error!(%error, "no thread to tell of refused calls");
            }
        }
        drop(state);
        tell(rest);
        if alone {
            tracing::warn!(target: AUDIT, event = "call refused", method, by = %peer, reason);
        }
    }

    /// Tells what has not been told yet.
    pub fn tell_all(&self) {
        let rest = lock(&self.0.0).windows.end(None);
        tell(rest);
    }

    /// The program ends: tells what has not been told yet, and waits no more.
    pub fn end(&self) {
        lock(&self.0.0).ended = true;
        self.0.1.notify_all();
        self.tell_all();
    }

    /// As long as there is something to be told.
    fn wait(&self) {
        let mut state = lock(&self.0.0);
        while !state.ended
            && let Some(next) = state.windows.next()
        {
            let now = Instant::now();
            let left = next.saturating_duration_since(now);
            if left.is_zero() {
                let rest = state.windows.end(Some(now));
                drop(state);
                tell(rest);
                state = lock(&self.0.0);
            } else {
                state = self.0.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        state.waiting = false;
    }
}

fn tell(rest: Vec<Rest>) {
    for Rest { kind, calls, by, reason } in rest {
        let method = kind.map_or("(several)", |kind| kind.1);
        tracing::warn!(target: AUDIT, event = "more calls refused", calls, method, by, reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peer(uid: u32) -> Peer {
        Peer { pid: 1, uid, gid: 5 }
    }

    proptest! {
        /// Whatever comes when: all are told, one by one or counted, and few of them one by one.
        #[test]
        fn nothing_is_lost_and_nothing_floods(calls in proptest::collection::vec((0..3u32, 0..2usize, 0..20_000u64), 0..300)) {
            let (mut w, start, mut at) = (Windows::default(), Instant::now(), 0);
            let (mut alone, mut counted) = (0, 0);
            for (uid, method, later) in &calls {
                at += later;
                let now = start + Duration::from_millis(at);
                counted += w.end(Some(now)).iter().map(|r| r.calls).sum::<u64>();
                alone += u64::from(w.add(now, (peer(*uid), ["a", "b"][*method]), "why"));
            }
            counted += w.end(None).iter().map(|r| r.calls).sum::<u64>();
            prop_assert_eq!(alone + counted, calls.len() as u64);
            prop_assert!(alone <= 6 * TOLD * (1 + at / 60_000));
            prop_assert!(w.0.is_empty() && w.next().is_none());
        }
    }

    #[test]
    fn a_minute_of_one_kind() {
        let (mut w, start) = (Windows::default(), Instant::now());
        for n in 0..25 {
            assert_eq!(w.add(start, (peer(7), "m"), "why"), n < TOLD);
        }
        assert!(
            w.add(start, (peer(8), "m"), "why") && w.add(start, (peer(7), "n"), "why"),
            "kinds of their own"
        );
        assert_eq!(w.next(), Some(start + WINDOW));
        assert!(w.end(Some(start + WINDOW - Duration::from_millis(1))).is_empty());
        let by = "uid 7 gid 5 pid 1".to_owned();
        let rest = Rest { kind: Some((7, "m")), calls: 25 - TOLD, by, reason: "why".into() };
        assert_eq!(w.end(Some(start + WINDOW)), [rest]);
        assert!(w.add(start + WINDOW, (peer(7), "m"), "why"), "the next minute");
    }

    #[test]
    fn many_users_take_bounded_memory_and_are_counted() {
        let (mut w, start) = (Windows::default(), Instant::now());
        let alone = (0..10_000).filter(|uid| w.add(start, (peer(*uid), "m"), "why")).count();
        assert_eq!((w.0.len(), alone), (KINDS + 1, KINDS + TOLD as usize));
        let rest = w.end(None);
        assert_eq!((rest.len(), rest[0].kind, rest[0].calls), (1, None, 10_000 - alone as u64));
    }
}
