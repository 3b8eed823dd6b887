//! What a run has found, as its JSON file holds it. Later runs read it again (`--compare`).
//!
//! Units: bytes, seconds, microseconds for latencies; rates per second; GB are 10^9 bytes.

use serde::{Deserialize, Serialize};

use super::cpus::Cpus;
use super::machine::Description;
use super::matrix::{Case, Matrix};

/// Of the file. A reader refuses others.
pub const FORMAT: u32 = 1;

/// One case in one round.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// From 1.
    pub round: u32,
    /// I/Os a second.
    pub iops: f64,
    /// Latencies.
    pub mean_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p99_9_us: f64,
    /// Longest.
    pub max_us: f64,
    /// The host's reactors were busy, percent.
    pub host_busy_pct: f64,
    /// The target's time, where its socket is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<Cost>,
}

/// What the target spent on a load, warm-up included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Busy seconds of its reactors.
    pub busy_s: f64,
    /// I/Os that it served.
    pub ios: u64,
    /// Bytes of them.
    pub bytes: u64,
}

impl Cost {
    /// Microseconds of a core per I/O.
    pub fn core_us_per_io(self) -> f64 {
        1e6 * self.busy_s / (self.ios as f64).max(1.0)
    }
    /// Seconds of a core per 10^9 bytes.
    pub fn core_s_per_gb(self) -> f64 {
        1e9 * self.busy_s / (self.bytes as f64).max(1.0)
    }
}

/// Median and range of the rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The middle one; between the two middle ones when their number is even.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// How many.
    pub rounds: usize,
}

impl Spread {
    /// Of these values; zeros of none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Spread {
        let mut all: Vec<f64> = values.into_iter().collect();
        all.sort_by(f64::total_cmp);
        let n = all.len();
        if n == 0 {
            return Spread::default();
        }
        let median = (all[(n - 1) / 2] + all[n / 2]) / 2.0;
        Spread { median, min: all[0], max: all[n - 1], rounds: n }
    }
}

/// The figures of a case over its rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// I/Os a second.
    pub iops: Spread,
    /// Median latency, µs.
    pub p50_us: Spread,
    /// 99th percentile, µs.
    pub p99_us: Spread,
    /// 99.9th percentile, µs.
    pub p99_9_us: Spread,
    /// The target's core-microseconds per I/O.
    pub core_us_per_io: Spread,
    /// The target's core-seconds per 10^9 bytes.
    pub core_s_per_gb: Spread,
}

impl Summary {
    /// Of these rounds.
    pub fn of(samples: &[Sample]) -> Summary {
        let all = |f: fn(&Sample) -> f64| Spread::of(samples.iter().map(f));
        let costs = |f: fn(Cost) -> f64| Spread::of(samples.iter().filter_map(|s| s.cost.map(f)));
        Summary {
            iops: all(|s| s.iops),
            p50_us: all(|s| s.p50_us),
            p99_us: all(|s| s.p99_us),
            p99_9_us: all(|s| s.p99_9_us),
            core_us_per_io: costs(Cost::core_us_per_io),
            core_s_per_gb: costs(Cost::core_s_per_gb),
        }
    }
}

/// What a part of the work needs by itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// The primitive.
    pub name: String,
    /// Core-seconds per 10^9 bytes of this case's data.
    pub core_s_per_gb: f64,
}

/// A stage of the target's I/O, of one traced run (`cryptfold_trace`). Nanoseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageTimes {
    /// Its name.
    pub name: String,
    /// What it is.
    pub what: String,
    /// How often.
    pub count: u64,
    /// Mean.
    pub mean_ns: u64,
    /// Median.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// Longest.
    pub max_ns: u64,
}

/// A case with all that is known of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Its name, as `--only` and the fio jobs know it.
    pub name: String,
    /// What it is.
    pub case: Case,
    /// What was started to make the namespace (of the last round).
    pub setup: Vec<String>,
    /// The load.
    pub command: String,
    /// Our rounds.
    pub ours: Vec<Sample>,
    /// The other target's rounds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other: Vec<Sample>,
    /// Median and range of ours; for readers, never read back.
    #[serde(skip_deserializing)]
    pub summary: Summary,
    /// What hash, codec, cipher and copies alone need.
    #[serde(default)]
    pub parts: Vec<Part>,
    /// With `--trace`: our target's stages, in a run of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<StageTimes>,
}

impl Measured {
    /// Nothing yet.
    pub fn new(case: &Case, parts: Vec<Part>) -> Measured {
        Measured {
            name: case.name(),
            case: case.clone(),
            setup: Vec::new(),
            command: String::new(),
            ours: Vec::new(),
            other: Vec::new(),
            summary: Summary::default(),
            parts,
            stages: Vec::new(),
        }
    }

    /// Bytes a second of these I/Os a second.
    pub fn bytes_s(&self, iops: f64) -> f64 {
        iops * self.case.bs.0 as f64
    }

    /// I/Os a second that the parts alone would allow on the cores of this case.
    pub fn roofline_iops(&self) -> Option<f64> {
        let s_per_gb: f64 = self.parts.iter().map(|p| p.core_s_per_gb).sum();
        (s_per_gb > 0.0).then(|| f64::from(self.case.cores) * 1e9 / s_per_gb / self.case.bs.0 as f64)
    }
}

/// A case that has no figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The case.
    pub name: String,
    /// Why.
    pub why: String,
    /// Whether something went wrong.
    pub failed: bool,
}

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`FORMAT`].
    pub format: u32,
    /// Whether all rounds were measured.
    pub complete: bool,
    /// Rounds that were begun and finished.
    pub rounds_done: u32,
    /// Begin, seconds since 1970.
    pub started_s: u64,
    /// Seconds that it took.
    pub took_s: f64,
    /// As it was called.
    pub command: String,
    /// Who measured where.
    pub machine: Description,
    /// What was to be measured.
    pub matrix: Matrix,
    /// How the other target is called, where there is one.
    #[serde(default)]
    pub other: Option<String>,
    /// Whether that one was filled as ours is.
    #[serde(default)]
    pub overwrite: bool,
    /// Where target and load ran; empty in files of versions that did not say.
    #[serde(default)]
    pub cpus: Cpus,
    /// Cases with figures.
    pub cases: Vec<Measured>,
    /// Those without.
    pub left_out: Vec<LeftOut>,
}

impl Record {
    /// Reads an earlier run.
    ///
    /// # Errors
    /// When it is none.
    pub fn read(path: &std::path::Path) -> Result<Record, String> {
        let said = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let text = std::fs::read_to_string(path).map_err(|e| said(&e))?;
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let head: Head = serde_json::from_str(&text)
            .map_err(|e| said(&format!("no report of `cryptfold-perf suite`: {e}")))?;
        if head.format != FORMAT {
            return Err(said(&format!("format {}; this program reads {FORMAT}", head.format)));
        }
        serde_json::from_str(&text).map_err(|e| said(&e))
    }

    /// The same case of an earlier run. `None`: there is none, or the data of that name was something else.
    pub fn before<'o>(&self, old: &'o Record, case: &Measured) -> Option<&'o Measured> {
        let found = old.cases.iter().find(|c| c.name == case.name)?;
        (self.matrix.data.get(&case.case.data) == old.matrix.data.get(&found.case.data)).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ranges() {
        let odd = Spread::of([5.0, 1.0, 3.0]);
        assert_eq!((odd.median, odd.min, odd.max, odd.rounds), (3.0, 1.0, 5.0, 3));
        assert_eq!(Spread::of([1.0, 2.0]).median, 1.5);
        assert_eq!(Spread::of([]), Spread::default());
    }

    #[test]
    fn cost_is_per_io_and_per_gigabyte() {
        let cost = Cost { busy_s: 2.0, ios: 1_000_000, bytes: 4_000_000_000 };
        assert_eq!((cost.core_us_per_io(), cost.core_s_per_gb()), (2.0, 0.5));
    }
}
