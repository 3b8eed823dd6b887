//! Takes samples, one at a time and one a second at most, whoever asks.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::history::History;
use crate::interval::Interval;
use crate::sample::{Sample, Source};
use crate::snapshot;

/// How old a look may be that is given out again.
pub const FRESH: Duration = Duration::from_secs(1);

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
        if let Some(last) = state.last.as_ref().filter(|last| Instant::now() < last.next) {
            return last.clone();
        }
        let sample = Sample::take(source);
        let before = state.last.as_ref().map(|l| &l.sample);
        let did = Interval::between(before, &sample);
        let snapshot = snapshot::of(before, &sample, &did);
        state.history.add(&did);
        let look = Arc::new(Look { sample, snapshot, next: Instant::now() + FRESH });
        state.last = Some(look.clone());
        look
    }

    /// What looks so far have seen: see [`History::json`].
    pub fn history(&self) -> Value {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).history.json()
    }
}
