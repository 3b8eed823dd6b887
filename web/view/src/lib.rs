//! What people see of a running target: one view for the page, `cryptfold top`, the RPC and Prometheus.
//!
//! ```text
//!   Source (the control plane) -> Sample -(and the one before)-> Interval -> snapshot, JSON
//!                                                                   \-----> History, rings
//! ```
//!
//! No I/O of its own, and no clock but [`Hub`]'s. Units: bytes, seconds, operations per second; what is unknown is null. Bounds: a
//! sample a second ([`hub::FRESH`]), [`snapshot::MOST`] entries of each list, [`history::RINGS`] points.

pub mod history;
pub mod hub;
mod interval;
pub mod sample;
pub mod snapshot;

pub use hub::{Hub, Look};
pub use sample::{Device, Sample, Source, State, list, text};

use serde_json::{Value, json};

/// What is wrong, one line each; nothing: healthy. A pool that waits for its key is not wrong: nobody can help it by a restart.
pub fn problems(s: &Sample) -> Vec<String> {
    match s.state {
        State::Starting => return vec!["not initialised".into()],
        State::Ending => return vec!["the target is ending".into()],
        State::Running => {}
    }
    let failed = list(&s.pools).iter().filter(|p| !p["failed"].is_null());
    failed.map(|p| format!("pool {}: {}", text(&p["name"]), text(&p["failed"]))).collect()
}

fn number(n: Option<f64>) -> Value {
    json!(n.filter(|n| n.is_finite()))
}
