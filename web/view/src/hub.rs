//! Takes samples, one at a time and one a second at most, whoever asks.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::history::History;
use crate::interval::Interval;
use crate::sample::{Sample, Source};
use crate::snapshot;

/// From the start of a look to that of the next, unless it takes long.
pub const FRESH: Duration = Duration::from_secs(1);
/// Who asks once a second asks now a little early and now a little late, and still gets a new look.
const SLACK: Duration = Duration::from_millis(100);

/// The target at one moment, and what it did since the look before.
#[derive(Debug)]
pub struct Look {
    /// What it said.
    pub sample: Sample,
    /// The same for people: see [`snapshot::of`].
    pub snapshot: Value,
    /// When another one can be had.
    pub next: Instant,
}

#[derive(Default)]
struct State {
    last: Option<Arc<Look>>,
    history: History,
}

/// When a look comes after one that took from `began` to `ended`: half of the time at least the target is left alone.
fn next(began: Instant, ended: Instant) -> Instant {
    (began + FRESH).max(ended + (ended - began))
}

fn is_fresh(next: Instant, now: Instant) -> bool {
    now + SLACK < next
}

/// See the module.
#[derive(Default)]
pub struct Hub(Mutex<State>);

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hub")
    }
}

impl Hub {
    /// The last look while it is fresh, else a new one. Blocks as long as the source takes.
    pub fn look(&self, source: &dyn Source) -> Arc<Look> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = state.last.as_ref().filter(|last| is_fresh(last.next, Instant::now())) {
            return last.clone();
        }
        let began = Instant::now();
        let sample = Sample::take(source);
        let before = state.last.as_ref().map(|l| &l.sample);
        let did = Interval::between(before, &sample);
        let snapshot = snapshot::of(before, &sample, &did);
        state.history.add(&did);
        let look = Arc::new(Look { sample, snapshot, next: next(began, Instant::now()) });
        state.last = Some(look.clone());
        look
    }

    /// What looks so far have seen: see [`History::json`].
    pub fn history(&self) -> Value {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).history.json()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_once_a_second_gets_a_new_look_each_time() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let next = next(began, at(300));
        assert_eq!(next, at(1000), "from its start, however long it took");
        assert!(is_fresh(next, at(300)) && is_fresh(next, at(899)), "once a second at most");
        assert!(!is_fresh(next, at(950)) && !is_fresh(next, at(1000)));
    }

    #[test]
    fn looks_that_take_long_leave_the_target_alone_in_between() {
        let began = Instant::now();
        let ended = began + Duration::from_secs(3);
        assert_eq!(next(began, ended), began + Duration::from_secs(6));
    }
}
