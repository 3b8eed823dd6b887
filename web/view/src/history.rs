//! What the charts show of the past: rings of points, fine for a while and coarse for a day. Bounded, and independent of how often
//! somebody looks.

use std::collections::VecDeque;

use cryptfold_bdev::{BORDERS, LatencyCounts, borders_s};
use serde_json::{Map, Value, json};

use crate::interval::{Both, Interval, Space};
use crate::number;

/// Seconds of a point, seconds that are kept: finest first.
pub const RINGS: [(u32, u32); 3] = [(1, 300), (10, 3600), (60, 86400)];

/// One moment, or several that follow each other.
#[derive(Clone, Debug, Default)]
struct Span {
    time: f64,
    seconds: f64,
    did: Both,
    space: Space,
    controllers: u64,
    /// Busy time of the mean reactor, and the time of which it is known.
    busy_s: f64,
    busy_of_s: f64,
}

impl Span {
    fn of(i: &Interval, seconds: f64) -> Span {
        let busy = i.busy();
        Span {
            time: i.time,
            seconds,
            did: i.hosts.clone(),
            space: i.space,
            controllers: i.controllers,
            busy_s: busy.unwrap_or(0.0) * seconds,
            busy_of_s: if busy.is_some() { seconds } else { 0.0 },
        }
    }

    /// What follows.
    fn extend(&mut self, next: &Span) {
        self.seconds += next.seconds;
        self.busy_s += next.busy_s;
        self.busy_of_s += next.busy_of_s;
        self.did.read.add(&next.did.read);
        self.did.write.add(&next.did.write);
        (self.time, self.space, self.controllers) = (next.time, next.space, next.controllers);
    }
}

/// A span without what only adding up needs.
#[derive(Clone, Debug)]
struct Point {
    time: f64,
    seconds: f64,
    ops: [u64; 2],
    bytes: [u64; 2],
    /// 50, 99 and 99.9% of each.
    quantiles: [[Option<f32>; 3]; 2],
    heat: [[u32; BORDERS + 1]; 2],
    space: Space,
    controllers: u64,
    busy: Option<f32>,
}

impl From<&Span> for Point {
    fn from(s: &Span) -> Point {
        let both = [&s.did.read, &s.did.write];
        let quantiles = |l: &LatencyCounts| [0.5, 0.99, 0.999].map(|q| l.quantile_s(q).map(|s| s as f32));
        let heat = |l: &LatencyCounts| l.between_borders().map(|n| n.min(u64::from(u32::MAX)) as u32);
        Point {
            time: s.time,
            seconds: s.seconds,
            ops: both.map(|a| a.ops),
            bytes: both.map(|a| a.bytes),
            quantiles: both.map(|a| quantiles(&a.latencies)),
            heat: both.map(|a| heat(&a.latencies)),
            space: s.space,
            controllers: s.controllers,
            busy: (s.busy_of_s > 0.0).then(|| (s.busy_s / s.busy_of_s) as f32),
        }
    }
}

struct Ring {
    step_s: f64,
    keep_s: f64,
    most: usize,
    points: VecDeque<Point>,
    open: Option<Span>,
}

/// See the module.
pub struct History(Vec<Ring>);

impl Default for History {
    fn default() -> History {
        let ring = |(step, keep): (u32, u32)| Ring {
            step_s: step.into(),
            keep_s: keep.into(),
            most: (keep / step) as usize,
            points: VecDeque::new(),
            open: None,
        };
        History(RINGS.into_iter().map(ring).collect())
    }
}

impl History {
    /// Adds what happened; nothing of an interval without a beginning.
    pub(crate) fn add(&mut self, i: &Interval) {
        let Some(seconds) = i.seconds else { return };
        let span = Span::of(i, seconds);
        for ring in &mut self.0 {
            match &mut ring.open {
                Some(open) => open.extend(&span),
                None => ring.open = Some(span.clone()),
            }
            // A timer's inaccuracy is no reason to wait for another one.
            let Some(full) = ring.open.take_if(|open| open.seconds >= 0.95 * ring.step_s) else { continue };
            ring.points.push_back(Point::from(&full));
            let oldest = i.time - ring.keep_s;
            while ring.points.len() > ring.most || ring.points.front().is_some_and(|p| p.time < oldest) {
                ring.points.pop_front();
            }
        }
    }

    /// All rings; the members of `points` are lists of the same length, the oldest first.
    pub fn json(&self) -> Value {
        let ring = |r: &Ring| json!({"step_seconds": r.step_s, "keep_seconds": r.keep_s, "points": columns(&r.points)});
        json!({"edges": borders_s(), "rings": self.0.iter().map(ring).collect::<Vec<_>>()})
    }
}

fn columns(points: &VecDeque<Point>) -> Value {
    let mut all = Map::new();
    let mut column = |name: &str, of: &dyn Fn(&Point) -> Value| {
        all.insert(name.to_owned(), points.iter().map(of).collect());
    };
    // What a person can tell apart, in few characters.
    let rate = |n: u64, seconds: f64| number(Some((n as f64 / seconds * 10.0).round() / 10.0));
    column("time", &|p| number(Some((p.time * 1000.0).round() / 1000.0)));
    column("seconds", &|p| number(Some((p.seconds * 1000.0).round() / 1000.0)));
    for (i, what) in ["read", "write"].into_iter().enumerate() {
        column(&format!("{what}_iops"), &|p| rate(p.ops[i], p.seconds));
        column(&format!("{what}_bytes_per_second"), &|p| rate(p.bytes[i], p.seconds));
        for (at, name) in ["p50", "p99", "p999"].into_iter().enumerate() {
            let nanoseconds = |s: f32| (f64::from(s) * 1e9).round() / 1e9;
            column(&format!("{what}_{name}"), &|p| number(p.quantiles[i][at].map(nanoseconds)));
        }
    }
    column("logical_bytes", &|p| p.space.logical_bytes.into());
    column("unique_bytes", &|p| p.space.unique_bytes.into());
    column("stored_bytes", &|p| p.space.stored_bytes.into());
    column("metadata_bytes", &|p| p.space.metadata_bytes.into());
    column("size_bytes", &|p| p.space.size_bytes.into());
    column("free_bytes", &|p| p.space.free_bytes.into());
    column("ratio", &|p| number(p.space.ratio()));
    column("busy", &|p| number(p.busy.map(|b| (f64::from(b) * 1e4).round() / 1e4)));
    column("hosts", &|p| p.controllers.into());
    for (i, what) in ["heat_read", "heat_write"].into_iter().enumerate() {
        column(what, &|p| json!(p.heat[i]));
    }
    Value::Object(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interval(time: f64, seconds: f64, latency_ns: u64) -> Interval {
        let mut i =
            Interval { time, seconds: Some(seconds), reactors: vec![Some(0.5), None], ..Interval::default() };
        (i.hosts.read.ops, i.hosts.read.bytes) = (100, 409_600);
        (0..100).for_each(|_| i.hosts.read.latencies.record(latency_ns));
        i.space.logical_bytes = time as u64;
        i
    }

    fn points(h: &History, ring: usize) -> Value {
        h.json()["rings"][ring]["points"].clone()
    }

    #[test]
    fn rates_are_of_the_whole_span_and_percentiles_of_all_its_operations() {
        let mut h = History::default();
        h.add(&Interval { seconds: None, ..interval(0.0, 1.0, 1) });
        (1..=10).for_each(|t| h.add(&interval(f64::from(t), 1.0, if t > 5 { 9_000_000 } else { 9_000 })));
        let (fine, coarse) = (points(&h, 0), points(&h, 1));
        assert_eq!(
            (fine["time"].as_array().unwrap().len(), coarse["time"].as_array().unwrap().len()),
            (10, 1)
        );
        assert_eq!((&fine["read_iops"][9], &coarse["read_iops"][0]), (&json!(100.0), &json!(100.0)));
        assert_eq!((&coarse["seconds"][0], &coarse["logical_bytes"][0]), (&json!(10.0), &json!(10)));
        assert_eq!(
            (&coarse["busy"][0], &coarse["write_p99"][0], &coarse["ratio"][0]),
            (&json!(0.5), &json!(null), &json!(null))
        );
        let (p50, p99) = (coarse["read_p50"][0].as_f64().unwrap(), coarse["read_p99"][0].as_f64().unwrap());
        assert!((8e-6..1.1e-5).contains(&p50) && (8e-3..1.1e-2).contains(&p99), "{p50} {p99}");
        // 8 us <= 9 us < 16 us.
        assert_eq!((&coarse["heat_read"][0][4], &fine["heat_read"][0][4]), (&json!(500), &json!(100)));
        assert_eq!(points(&h, 2)["time"], json!([]), "a minute is not over");
    }

    #[test]
    fn nothing_is_kept_beyond_its_time_and_number() {
        let mut h = History::default();
        // Two days, as often as the target looks by itself, then somebody looks for an hour.
        (0..17_280).for_each(|n| h.add(&interval(f64::from(n) * 10.0, 10.0, 1_000)));
        let slow: Vec<usize> = (0..3).map(|r| points(&h, r)["time"].as_array().unwrap().len()).collect();
        assert!(
            (30..=31).contains(&slow[0]) && (360..=361).contains(&slow[1]) && slow[2] == 1440,
            "{slow:?}"
        );
        (0..3600).for_each(|n| h.add(&interval(172_800.0 + f64::from(n), 1.0, 1_000)));
        for (ring, (step, keep)) in RINGS.into_iter().enumerate() {
            let times = points(&h, ring)["time"].clone();
            let times: Vec<f64> = times.as_array().unwrap().iter().filter_map(Value::as_f64).collect();
            assert!(times.len() <= (keep / step) as usize, "ring {ring}: {} points", times.len());
            assert!(times.windows(2).all(|w| w[0] < w[1]));
            assert!(times[0] >= times[times.len() - 1] - f64::from(keep) - f64::from(step));
        }
    }
}
