//! Calls that were refused, for the audit log: in a minute the first [`TOLD`] of a user and a method are told one by one, of a user
//! [`OF_USER`] at most, of all users [`OF_ALL`]. The others are counted, and a user's counts are one record when its minute ends. So nobody
//! fills the log with what costs nothing, nobody hides what another one does, and nothing is lost.
//!
//! Bounded: [`USERS`] users are kept apart, what comes beyond is one user more; the methods are those that there are.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cryptfold_nvmf_target::audit::TARGET as AUDIT;

use crate::access::Peer;
use crate::control::lock;

/// Told one by one, of a user and a method.
const TOLD: u64 = 10;
/// Of a user.
const OF_USER: u64 = 60;
/// Of all.
const OF_ALL: u64 = 240;
/// Within this time.
const WINDOW: Duration = Duration::from_secs(60);
/// Users that are kept apart.
const USERS: usize = 256;
/// Methods that a record names.
const NAMED: usize = 16;
/// Lines of the program's log in a minute, see [`Lines`].
const LINES: u64 = 60;

/// By its number; none: those for whom there was no room.
type User = Option<u32>;

struct Window {
    since: Instant,
    told: u64,
    /// By method: calls, and those that were not told one by one.
    methods: BTreeMap<&'static str, (u64, u64)>,
    /// Of the last one that was not.
    by: String,
    reason: String,
}

impl Window {
    fn rest(&self) -> u64 {
        self.methods.values().map(|(_, rest)| rest).sum()
    }
}

/// A user's calls that were not told one by one.
#[derive(Debug, PartialEq, Eq)]
struct Rest {
    user: User,
    calls: u64,
    /// Which, and how many of each.
    methods: String,
    by: String,
    reason: String,
}

impl Rest {
    fn of(user: User, w: Window) -> Rest {
        let mut methods: Vec<_> = w.methods.iter().map(|(name, (_, rest))| (*name, *rest)).collect();
        methods.retain(|(_, rest)| *rest > 0);
        methods.sort_by_key(|(_, rest)| std::cmp::Reverse(*rest));
        let more = methods.len().saturating_sub(NAMED);
        let mut words: Vec<_> =
            methods.iter().take(NAMED).map(|(name, rest)| format!("{name}: {rest}")).collect();
        words.extend((more > 0).then(|| format!("{more} more")));
        Rest { user, calls: w.rest(), methods: words.join(", "), by: w.by, reason: w.reason }
    }
}

#[derive(Default)]
struct Windows {
    users: HashMap<User, Window>,
    /// Of all users: since when, and how many were told one by one.
    all: Option<(Instant, u64)>,
}

impl Windows {
    /// One more; whether it is told by itself.
    fn add(&mut self, now: Instant, (peer, method): (Peer, &'static str), reason: &str) -> bool {
        let ended = |since: Instant| now.saturating_duration_since(since) >= WINDOW;
        let all = self.all.filter(|(since, _)| !ended(*since)).unwrap_or((now, 0));
        let user = Some(peer.uid);
        let full = self.users.len() >= USERS && !self.users.contains_key(&user);
        let new = || Window {
            since: now,
            told: 0,
            methods: BTreeMap::new(),
            by: String::new(),
            reason: String::new(),
        };
        let window = self.users.entry(user.filter(|_| !full)).or_insert_with(new);
        let (calls, rest) = window.methods.entry(method).or_default();
        *calls += 1;
        let told = *calls <= TOLD && window.told < OF_USER && all.1 < OF_ALL;
        if told {
            window.told += 1;
        } else {
            *rest += 1;
            (window.by, window.reason) = (peer.to_string(), reason.to_owned());
        }
        self.all = Some((all.0, all.1 + u64::from(told)));
        told
    }

    /// Those that have ended, or all; what was not told of them.
    fn end(&mut self, now: Option<Instant>) -> Vec<Rest> {
        let ended = |w: &mut Window| now.is_none_or(|now| now.saturating_duration_since(w.since) >= WINDOW);
        let ended = self.users.extract_if(|_, w| ended(w));
        let mut ended: Vec<_> = ended.filter(|(_, w)| w.rest() > 0).collect();
        ended.sort_by_key(|(_, w)| w.since);
        ended.into_iter().map(|(user, w)| Rest::of(user, w)).collect()
    }

    /// When the first one ends of which something is to be told.
    fn next(&self) -> Option<Instant> {
        self.users.values().filter(|w| w.rest() > 0).map(|w| w.since + WINDOW).min()
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
        // Under the lock, here and below: who ends the program then waits until it is told.
        tell(state.windows.end(Some(now)));
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
        if alone {
            tracing::warn!(target: AUDIT, event = "call refused", method, by = %peer, reason);
        }
    }

    /// Tells what has not been told yet.
    pub fn tell_all(&self) {
        tell(lock(&self.0.0).windows.end(None));
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
                tell(state.windows.end(Some(now)));
            } else {
                state = self.0.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        state.waiting = false;
    }
}

fn tell(rest: Vec<Rest>) {
    for Rest { user, calls, methods, by, reason } in rest {
        let others = user.is_none().then_some("several users");
        tracing::warn!(target: AUDIT, event = "more calls refused", calls, methods, of = others, by, reason);
    }
}

/// Lines of the program's log that anybody on the socket can cause: so many a minute, and then how many there were besides.
#[derive(Default)]
pub struct Lines(Mutex<Counted>);

#[derive(Default)]
struct Counted {
    since: Option<Instant>,
    calls: u64,
    passed_over: u64,
}

impl Lines {
    /// Whether one more is written; if so, how many were passed over before it.
    pub fn next(&self, now: Instant) -> Option<u64> {
        let mut c = lock(&self.0);
        if c.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            (c.since, c.calls) = (Some(now), 0);
        }
        c.calls += 1;
        if c.calls <= LINES {
            return Some(std::mem::take(&mut c.passed_over));
        }
        c.passed_over += 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peer(uid: u32) -> Peer {
        Peer { pid: 1, uid, gid: 5 }
    }

    const METHODS: [&str; 20] =
        ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s", "t"];

    proptest! {
        /// Whatever comes when: all are told, one by one or counted, and few of them one by one.
        #[test]
        fn nothing_is_lost_and_nothing_floods(
            calls in proptest::collection::vec((0..6u32, 0..20usize, 0..400u64), 0..1500),
        ) {
            let (mut w, start, mut at) = (Windows::default(), Instant::now(), 0);
            let (mut alone, mut counted) = ([0; 6], [0; 6]);
            let mut count = |rest: Vec<Rest>| {
                rest.iter().for_each(|r| counted[r.user.unwrap() as usize] += r.calls);
            };
            for (uid, method, later) in &calls {
                at += later;
                let now = start + Duration::from_millis(at);
                count(w.end(Some(now)));
                alone[*uid as usize] += u64::from(w.add(now, (peer(*uid), METHODS[*method]), "why"));
            }
            count(w.end(None));
            let minutes = 1 + at / 60_000;
            for uid in 0..6 {
                let made = calls.iter().filter(|c| c.0 == uid).count() as u64;
                prop_assert_eq!(alone[uid as usize] + counted[uid as usize], made);
                prop_assert!(alone[uid as usize] <= OF_USER * minutes);
            }
            prop_assert!(alone.iter().sum::<u64>() <= OF_ALL * minutes);
            prop_assert!(w.users.is_empty() && w.next().is_none());
        }
    }

    #[test]
    fn a_minute_of_one_user() {
        let (mut w, start) = (Windows::default(), Instant::now());
        for n in 0..25 {
            assert_eq!(w.add(start, (peer(7), "a"), "why"), n < TOLD);
        }
        let told = METHODS[1..].iter().flat_map(|m| [m; 3]).filter(|m| w.add(start, (peer(7), **m), "last"));
        assert_eq!(told.count() as u64, OF_USER - TOLD, "methods are many");
        assert!(w.add(start, (peer(8), "a"), "why"), "a user of its own");
        assert_eq!(w.next(), Some(start + WINDOW));
        assert!(w.end(Some(start + WINDOW - Duration::from_millis(1))).is_empty());
        let (by, methods) = ("uid 7 gid 5 pid 1".to_owned(), "a: 15, s: 3, t: 3, r: 1".into());
        let rest = Rest { user: Some(7), calls: 22, methods, by, reason: "last".into() };
        assert_eq!(w.end(Some(start + WINDOW)), [rest]);
        assert!(w.add(start + WINDOW, (peer(7), "a"), "why"), "the next minute");
    }

    #[test]
    fn many_users_take_bounded_memory_and_are_counted() {
        let (mut w, start) = (Windows::default(), Instant::now());
        let alone = (0..10_000).filter(|uid| w.add(start, (peer(*uid), "m"), "why")).count() as u64;
        assert_eq!((w.users.len(), alone), (USERS + 1, OF_ALL));
        let rest = w.end(None);
        let of = |user: User| rest.iter().find(|r| r.user == user).map(|r| r.calls);
        // Who came after the others were told has a record all the same.
        assert_eq!((of(Some(0)), of(Some(255)), of(None)), (None, Some(1), Some(10_000 - USERS as u64)));
        assert_eq!(rest.iter().map(|r| r.calls).sum::<u64>() + alone, 10_000);
    }

    #[test]
    fn a_record_names_the_methods_with_most_calls() {
        let (mut w, start) = (Windows::default(), Instant::now());
        for (n, method) in METHODS.iter().enumerate() {
            let calls = std::iter::repeat_n("filler", n + 1).chain(std::iter::repeat_n(*method, 100 + n));
            calls.for_each(|m| _ = w.add(start, (peer(7), m), "why"));
        }
        let methods = &w.end(None)[0].methods;
        assert!(methods.starts_with("filler: 200, t: 119, s: 118, "), "{methods}");
        assert!(methods.ends_with(", 5 more") && methods.matches(", ").count() == NAMED, "{methods}");
    }

    /// Whoever syncs the log and ends the program asks here first: what another thread is about to tell is told then.
    #[test]
    fn what_is_being_told_is_waited_for() {
        use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

        struct Looks(Refusals, Arc<Mutex<Vec<bool>>>);
        impl<S: tracing::Subscriber> Layer<S> for Looks {
            fn on_event(&self, _: &tracing::Event<'_>, _: Context<'_, S>) {
                lock(&self.1).push(self.0.0.0.try_lock().is_err());
            }
        }
        let (refusals, held) = (Refusals::default(), Arc::default());
        let add_all = |since: Instant| {
            let mut state = lock(&refusals.0.0);
            (0..2 * TOLD).for_each(|_| _ = state.windows.add(since, (peer(7), "m"), "why"));
        };
        let past = Instant::now().checked_sub(WINDOW).unwrap();
        let subscriber = tracing_subscriber::registry().with(Looks(refusals.clone(), Arc::clone(&held)));
        tracing::subscriber::with_default(subscriber, || {
            add_all(past);
            refusals.wait();
            add_all(past);
            refusals.add(peer(8), "m", "why");
            add_all(Instant::now());
            refusals.tell_all();
        });
        // The rest of 7 at the minute's end, again at the call of 8, that one call, and the rest at the end.
        assert_eq!(*lock(&held), [true; 4]);
    }

    #[test]
    fn lines_of_the_log_are_few_and_what_is_passed_over_is_counted() {
        let (lines, start) = (Lines::default(), Instant::now());
        let written = (0..1000).filter(|_| lines.next(start).is_some()).count() as u64;
        assert_eq!(written, LINES);
        assert_eq!(lines.next(start + WINDOW), Some(1000 - LINES));
        assert_eq!(lines.next(start + WINDOW), Some(0));
    }
}
