//! What happened between two samples. Counters that have fallen are new ones, which began at zero.

use std::collections::{HashMap, HashSet};

use cryptfold_bdev::{Class, LatencyCounts};
use serde_json::{Value, json};

use crate::number;
use crate::sample::{Device, Sample, list, text};

/// What was done in an interval.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Activity {
    pub ops: u64,
    pub bytes: u64,
    pub latencies: LatencyCounts,
}

impl Activity {
    pub fn add(&mut self, other: &Activity) {
        self.ops += other.ops;
        self.bytes += other.bytes;
        self.latencies.add(&other.latencies);
    }

    /// For an interval of so many seconds; null for none.
    pub fn json(&self, seconds: Option<f64>) -> Value {
        let per_second = |n: u64| number(seconds.map(|s| n as f64 / s));
        let quantile = |q: f64| number(seconds.and_then(|_| self.latencies.quantile_s(q)));
        json!({
            "iops": per_second(self.ops), "bytes_per_second": per_second(self.bytes),
            "p50": quantile(0.5), "p99": quantile(0.99), "p999": quantile(0.999),
        })
    }
}

/// Growth of a counter.
pub fn grown(was: u64, now: u64) -> u64 {
    if now >= was { now - was } else { now }
}

/// Growth of a member; none where there is none.
pub fn grown_member(was: Option<&Value>, now: &Value, key: &str) -> Option<u64> {
    Some(grown(was?[key].as_u64().unwrap_or(0), now[key].as_u64()?))
}

/// Reads and writes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Both {
    pub read: Activity,
    pub write: Activity,
}

/// What pools have, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Space {
    pub logical_bytes: u64,
    pub zero_bytes: u64,
    pub unique_bytes: u64,
    pub stored_bytes: u64,
    pub metadata_bytes: u64,
    pub size_bytes: u64,
    pub free_bytes: u64,
    pub reclaimable_bytes: u64,
}

impl Space {
    pub fn of(pools: &Value) -> Space {
        let sum = |key: &str| list(pools).iter().filter_map(|p| p[key].as_u64()).sum();
        Space {
            logical_bytes: sum("logical_bytes"),
            zero_bytes: sum("zero_bytes"),
            unique_bytes: sum("unique_bytes"),
            stored_bytes: sum("stored_bytes"),
            metadata_bytes: sum("metadata_bytes"),
            size_bytes: sum("size_bytes"),
            free_bytes: sum("free_bytes"),
            reclaimable_bytes: sum("reclaimable_bytes"),
        }
    }

    /// As a pool's: zeros counted as data.
    pub fn ratio(&self) -> Option<f64> {
        let stored = self.stored_bytes + self.metadata_bytes;
        let ratio = self.logical_bytes as f64 / stored as f64;
        (stored > 0 && self.logical_bytes > 0).then_some((ratio * 1000.0).round() / 1000.0)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Interval {
    /// When it ended, seconds since 1970.
    pub time: f64,
    /// None: there was no sample before.
    pub seconds: Option<f64>,
    /// By device, in the sample's order.
    pub devices: Vec<Both>,
    /// Of the devices that are namespaces.
    pub hosts: Both,
    /// Controllers.
    pub controllers: u64,
    pub space: Space,
    /// Share of its time that each reactor was busy, in the sample's order.
    pub reactors: Vec<Option<f64>>,
}

impl Interval {
    pub fn between(before: Option<&Sample>, now: &Sample) -> Interval {
        let seconds = before.map(|b| now.at.saturating_duration_since(b.at).as_secs_f64());
        let was: HashMap<(&str, &str), &Device> =
            before.iter().flat_map(|b| &b.devices).map(|d| ((d.name.as_str(), d.uuid.as_str()), d)).collect();
        let none = Device::default();
        // A device that was not there has begun since; without a sample before nothing is known.
        let one = |d: &Device| {
            let was = was.get(&(d.name.as_str(), d.uuid.as_str())).copied().unwrap_or(&none);
            match before {
                Some(_) => Both { read: of(was, d, Class::Read), write: of(was, d, Class::Write) },
                None => Both::default(),
            }
        };
        let devices: Vec<Both> = now.devices.iter().map(one).collect();
        let exported: HashSet<&str> = now.exports().into_iter().map(|(name, _)| name).collect();
        let mut hosts = Both::default();
        for (d, did) in now.devices.iter().zip(&devices) {
            if exported.contains(d.name.as_str()) {
                hosts.read.add(&did.read);
                hosts.write.add(&did.write);
            }
        }
        let controllers = now.controllers.iter().map(|(_, c)| list(c).len() as u64).sum();
        let space = Space::of(&now.pools);
        let time = now.time;
        let seconds = seconds.filter(|s| *s > 0.0);
        Interval { time, seconds, devices, hosts, controllers, space, reactors: reactors(before, now) }
    }

    /// Mean over the reactors.
    pub fn busy(&self) -> Option<f64> {
        let known: Vec<f64> = self.reactors.iter().copied().flatten().collect();
        (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
    }
}

fn of(was: &Device, now: &Device, class: Class) -> Activity {
    let i = class as usize;
    Activity {
        ops: grown(was.totals[i].ops, now.totals[i].ops),
        bytes: grown(was.totals[i].bytes, now.totals[i].bytes),
        latencies: now.latencies[i].since(&was.latencies[i]),
    }
}

fn reactors(before: Option<&Sample>, now: &Sample) -> Vec<Option<f64>> {
    let one = |r: &Value| {
        let was = list(&before?.reactors["reactors"]).iter().find(|b| b["lcore"] == r["lcore"]);
        // Reactors stay as long as the program: here nothing begins anew.
        let more = |key: &str| Some(r[key].as_u64()?.saturating_sub(was?[key].as_u64()?) as f64);
        let (busy, idle) = (more("busy")?, more("idle")?);
        (busy + idle > 0.0).then(|| busy / (busy + idle))
    };
    list(&now.reactors["reactors"]).iter().map(one).collect()
}

/// The entry of a list of which these members are the same.
pub fn same<'a>(all: Option<&'a Value>, one: &Value, keys: &[&str]) -> Option<&'a Value> {
    list(all?).iter().find(|v| keys.iter().all(|key| v[*key] == one[*key]))
}

/// The entry under a name.
pub fn named<'a>(all: &'a [(String, Value)], name: &Value) -> Option<&'a Value> {
    all.iter().find(|(n, _)| n == text(name)).map(|(_, v)| v)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reactor_that_told_less_idle_time_than_before_was_busy() {
        let sample = |busy: u64, idle: u64| Sample {
            reactors: json!({"reactors": [{"lcore": 1, "busy": busy, "idle": idle}]}),
            ..Sample::default()
        };
        let share = |now: Sample| reactors(Some(&sample(1000, 5000)), &now);
        assert_eq!(share(sample(1100, 5300)), [Some(0.25)]);
        assert_eq!(share(sample(2000, 4900)), [Some(1.0)]);
        assert_eq!(share(sample(1000, 5000)), [None], "nothing has passed that is known");
        assert_eq!(reactors(None, &sample(1, 1)), [None]);
    }
}
