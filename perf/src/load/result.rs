//! What came out, for people and for scripts.

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// Latencies in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Latency {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p99_9: f64,
    /// Longest.
    pub max: f64,
}

/// The outcome of a run over all workers.
#[derive(Clone, Debug)]
pub struct LoadResult {
    /// Seconds measured.
    pub seconds: f64,
    /// Completed I/Os, reads among them.
    pub ios: u64,
    /// Reads among them.
    pub reads: u64,
    /// Bytes per I/O.
    pub bs: u64,
    /// Failed I/Os.
    pub errors: u64,
    /// What the first failed one said.
    pub first_error: Option<String>,
    /// Latencies.
    pub lat_us: Latency,
    /// Mean busy time of the reactors, percent.
    pub busy_pct: f64,
    /// Blocks that `--verify` found right, wrong; the first wrong one.
    pub verified: Option<(u64, u64, Option<String>)>,
    /// I/Os of `--verify-only` that found no stamp of the run.
    pub unstamped: u64,
    /// Seed of the run.
    pub seed: u64,
}

impl Latency {
    /// From nanoseconds.
    pub fn of(h: &Histogram<u64>) -> Latency {
        if h.is_empty() {
            return Latency::default();
        }
        let us = |ns: u64| (ns as f64 / 10.0).round() / 100.0;
        Latency {
            mean: (h.mean() / 10.0).round() / 100.0,
            p50: us(h.value_at_quantile(0.5)),
            p99: us(h.value_at_quantile(0.99)),
            p99_9: us(h.value_at_quantile(0.999)),
            max: us(h.max()),
        }
    }
}

impl LoadResult {
    /// I/Os per second.
    pub fn iops(&self) -> f64 {
        self.ios as f64 / self.seconds.max(1e-9)
    }
    /// MiB per second.
    pub fn bw_mib_s(&self) -> f64 {
        self.iops() * self.bs as f64 / (1 << 20) as f64
    }
    /// Whether everything went right.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.verified.as_ref().is_none_or(|v| v.1 == 0)
    }
    /// Prints it, as JSON or for people.
    ///
    /// # Errors
    /// When not everything went right: what, in one line.
    pub fn report(&self, json: bool) -> Result<(), String> {
        if json {
            println!("{}", self.json());
        } else {
            println!("{}", self.text());
        }
        match &self.verified {
            _ if self.errors > 0 => Err(format!(
                "{} I/Os failed; the first: {}",
                self.errors,
                self.first_error.as_deref().unwrap_or("unknown")
            )),
            Some((_, bad, first)) if *bad > 0 => {
                Err(format!("{bad} blocks are wrong; the first: {}", first.as_deref().unwrap_or("unknown")))
            }
            _ => Ok(()),
        }
    }
    /// The object that scripts read.
    pub fn json(&self) -> Value {
        let l = &self.lat_us;
        let mut out = json!({
            "iops": self.iops().round(),
            "bw_mib_s": (self.bw_mib_s() * 10.0).round() / 10.0,
            "lat_us": {"mean": l.mean, "p50": l.p50, "p99": l.p99, "p99_9": l.p99_9, "max": l.max},
            "errors": self.errors,
            "cpu": {"busy_pct": (self.busy_pct * 10.0).round() / 10.0},
            "ios": self.ios,
            "reads": self.reads,
            "seconds": (self.seconds * 1000.0).round() / 1000.0,
            "seed": self.seed,
        });
        if let Some(e) = &self.first_error {
            out["first_error"] = e.as_str().into();
        }
        if let Some((good, bad, first)) = &self.verified {
            out["verify"] = json!({"checked": good + bad, "mismatches": bad, "first": first,
                "unstamped": self.unstamped});
        }
        out
    }
    /// The lines that people read.
    pub fn text(&self) -> String {
        let l = &self.lat_us;
        let mut out = format!(
            "{:>12.0} IOPS  {:>9.1} MiB/s   latency us: mean {:.1}  p50 {:.1}  p99 {:.1}  p99.9 {:.1}  max {:.1}   \
             busy {:.1}%   errors {}",
            self.iops(),
            self.bw_mib_s(),
            l.mean,
            l.p50,
            l.p99,
            l.p99_9,
            l.max,
            self.busy_pct,
            self.errors
        );
        if let Some(e) = &self.first_error {
            out += &format!("\n  first error: {e}");
        }
        if let Some((good, bad, first)) = &self.verified {
            out += &format!("\n  verify: {} blocks checked, {bad} wrong (seed {:#x})", good + bad, self.seed);
            if self.unstamped > 0 {
                out += &format!("\n  {} I/Os found nothing of this run", self.unstamped);
            }
            if let Some(first) = first {
                out += &format!("\n  first wrong: {first}");
            }
        }
        out
    }
}
