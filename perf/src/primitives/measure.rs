//! Timing: a step is repeated in rounds of a fixed length, the median round counts.

use std::time::{Duration, Instant};

/// Rounds per measurement. Odd, so that the median is one of them.
const ROUNDS: u32 = 5;

/// How long a measurement takes.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Time for all rounds together.
    pub total: Duration,
}

impl Timing {
    /// Seconds that one `step` takes.
    pub fn seconds_per_step(self, mut step: impl FnMut()) -> f64 {
        let round = self.total / ROUNDS;
        let mut time = |steps: u64| {
            let start = Instant::now();
            for _ in 0..steps {
                step();
            }
            start.elapsed().as_secs_f64()
        };
        // Doubles until a run is long enough to predict a round; warms up on the way.
        let mut steps = 1;
        let mut took = time(steps);
        while took < round.as_secs_f64() / 4.0 && steps < 1 << 40 {
            steps *= 2;
            took = time(steps);
        }
        let steps = ((steps as f64 * round.as_secs_f64() / took.max(1e-9)) as u64).max(1);
        let mut rounds: Vec<f64> = (0..ROUNDS).map(|_| time(steps) / steps as f64).collect();
        rounds.sort_by(f64::total_cmp);
        rounds[ROUNDS as usize / 2]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleep_takes_as_long_as_it_says() {
        let timing = Timing { total: Duration::from_millis(50) };
        let s = timing.seconds_per_step(|| std::thread::sleep(Duration::from_millis(2)));
        assert!((0.002..0.02).contains(&s), "{s}");
    }
}
