//! Tests of the whole: what needs more than one room, or the real program.

pub mod fuzz;
pub mod kill;
pub mod search;

use std::time::{SystemTime, UNIX_EPOCH};

/// The seed that was asked for, else one from the clock; printed, so that the run can be repeated.
pub fn announce_seed(asked: Option<u64>) -> u64 {
    let clock =
        || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64 % 1_000_000_000);
    let seed = asked.unwrap_or_else(clock);
    println!("seed {seed}");
    seed
}
