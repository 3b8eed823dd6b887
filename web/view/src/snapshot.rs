//! An interval and the sample at its end as one JSON object: what the page, `cryptfold top` and the RPC show.

use std::cmp::Reverse;
use std::collections::HashMap;

use cryptfold_bdev::borders_s;
use serde_json::{Map, Value, json};

use crate::interval::{Activity, Both, Interval, Space, grown_member, named, same};
use crate::sample::{Device, Sample, list, text};
use crate::{number, problems};

/// Most volumes, devices and hosts that are shown, each: the busiest. `left_out` says how many are not.
pub const MOST: usize = 500;

/// The product's name of volumes.
const VOLUME: &str = "Logical Volume";
const SPACE: [&str; 9] = [
    "logical_bytes",
    "zero_bytes",
    "unique_bytes",
    "stored_bytes",
    "metadata_bytes",
    "size_bytes",
    "free_bytes",
    "reclaimable_bytes",
    "ratio",
];

/// The snapshot.
pub fn of(before: Option<&Sample>, now: &Sample, did: &Interval) -> Value {
    let seconds = did.seconds;
    let (volumes, no_volumes) = busiest(volumes(now, did));
    let (devices, no_devices) = busiest(devices(now, did));
    let (hosts, no_hosts) = busiest(hosts(before, now, seconds));
    let version = now.version["cryptfold"].as_str().unwrap_or("");
    json!({
        "time": now.time,
        "uptime_seconds": now.uptime.as_secs_f64(),
        "interval_seconds": seconds,
        "version": version,
        "state": now.state.word(),
        "problems": problems(now),
        "space": space(&did.space),
        "totals": {"read": did.hosts.read.json(seconds), "write": did.hosts.write.json(seconds)},
        "heat": {
            "edges": borders_s(),
            "read": did.hosts.read.latencies.between_borders(),
            "write": did.hosts.write.latencies.between_borders(),
        },
        "pools": list(&now.pools).iter().map(|p| pool(now, p)).collect::<Vec<_>>(),
        "volumes": volumes,
        "devices": devices,
        "hosts": hosts,
        "reactors": reactors(now, did),
        "work": list(&now.pools).iter().flat_map(|p| work(before, p, seconds)).collect::<Vec<_>>(),
        "keys": list(&now.keys).iter().map(key).collect::<Vec<_>>(),
        "key_servers": list(&now.key_servers).iter().map(key_server).collect::<Vec<_>>(),
        "events": now.events,
        "left_out": {"volumes": no_volumes, "devices": no_devices, "hosts": no_hosts},
    })
}

/// The busiest first to be shown, in the order that they had; and how many are not.
fn busiest(all: Vec<(u64, Value)>) -> (Vec<Value>, usize) {
    let left_out = all.len().saturating_sub(MOST);
    let mut chosen: Vec<(usize, (u64, Value))> = all.into_iter().enumerate().collect();
    if left_out > 0 {
        chosen.sort_by_key(|(_, (ops, _))| Reverse(*ops));
        chosen.truncate(MOST);
        chosen.sort_by_key(|(at, _)| *at);
    }
    (chosen.into_iter().map(|(_, (_, v))| v).collect(), left_out)
}

fn space(s: &Space) -> Value {
    json!({
        "logical_bytes": s.logical_bytes, "zero_bytes": s.zero_bytes, "unique_bytes": s.unique_bytes,
        "stored_bytes": s.stored_bytes, "metadata_bytes": s.metadata_bytes, "size_bytes": s.size_bytes,
        "free_bytes": s.free_bytes, "reclaimable_bytes": s.reclaimable_bytes, "ratio": s.ratio(),
    })
}

/// These members, null where there are none.
fn members(from: &Value, keys: &[&str]) -> Map<String, Value> {
    keys.iter().map(|key| ((*key).to_owned(), from[*key].clone())).collect()
}

fn pool(s: &Sample, p: &Value) -> Value {
    let (state, why) = match (&p["failed"], &p["locked"]) {
        (Value::Null, Value::Null) => ("online", &Value::Null),
        (Value::Null, why) => ("locked", why),
        (why, _) => ("failed", why),
    };
    let encryption = same(Some(&s.encryption["pools"]), p, &["uuid"]).unwrap_or(&Value::Null);
    let keys = list(&encryption["domains"]);
    let domain = |d: &Value| {
        let of = keys.iter().find(|k| k["uuid"] == d["uuid"]).unwrap_or(&Value::Null);
        let state = match (of["changing"].as_bool(), of["encrypted"].as_bool()) {
            (Some(true), _) => json!("changing"),
            (_, Some(true)) => json!("encrypted"),
            (_, Some(false)) => json!("open"),
            _ => Value::Null,
        };
        let known =
            ["name", "volumes", "logical_bytes", "zero_bytes", "unique_bytes", "stored_bytes", "ratio"];
        let mut v = members(d, &known);
        v.insert("state".into(), state);
        Value::Object(v)
    };
    let slots = list(&encryption["slots"]).iter();
    let slots: Vec<_> = slots.map(|k| members(k, &["slot", "kind", "label", "created_ms"])).collect();
    let domains = named(&s.domains, &p["name"]).map_or(&[][..], list);
    let mut v = members(p, &["name", "uuid"]);
    v.insert("state".into(), state.into());
    v.insert("why".into(), why.clone());
    v.insert("base_bdev".into(), p["base_bdev"].clone());
    v.extend(members(p, &SPACE));
    v.extend(members(
        p,
        &[
            "memory_bytes",
            "memory_budget_bytes",
            "compression",
            "volumes",
            "damaged",
            "healed",
            "ratio_without_zeroes",
        ],
    ));
    v.insert(
        "encryption".into(),
        json!({
            "state": encryption["state"], "why": encryption["reason"], "encrypted": encryption["encrypted"],
            "erasable": encryption["erasable"], "slots": slots,
        }),
    );
    v.insert("domains".into(), domains.iter().map(domain).collect());
    Value::Object(v)
}

fn both(did: &Both, seconds: Option<f64>) -> [(String, Value); 2] {
    [("read".into(), did.read.json(seconds)), ("write".into(), did.write.json(seconds))]
}

/// Whether a device decrypts what a host has encrypted.
fn has_key(d: &Device) -> bool {
    matches!(d.product.as_str(), "hostcrypt" | "luks")
}

fn volumes(s: &Sample, did: &Interval) -> Vec<(u64, Value)> {
    // From the device that hosts see down to the volume.
    let exports = s.exports();
    let names = s.names();
    // By the device below: what it is exported as, and the device with a host's key on it.
    let mut exported_of: HashMap<&str, Vec<(&str, &str)>> = HashMap::new();
    for (device, place) in &exports {
        for below in names.stack(device) {
            exported_of.entry(&below.name).or_default().push((*device, place.as_str()));
        }
    }
    let mut key_of: HashMap<&str, &Device> = HashMap::new();
    for d in s.devices.iter().filter(|d| d.base.is_some() && has_key(d)) {
        for below in names.stack(&d.name) {
            key_of.entry(&below.name).or_insert(d);
        }
    }
    let at: HashMap<&str, &Both> =
        s.devices.iter().map(|d| d.name.as_str()).zip(&did.devices).rev().collect();
    let idle = Both::default();
    let one = |v: &Value| {
        let name = text(&v["uuid"]);
        let exported = exported_of.get(name).map_or(&[][..], Vec::as_slice);
        let device = exported.first().map_or(name, |e| e.0);
        let done = at.get(device).copied().unwrap_or(&idle);
        let mut shown = members(v, &["name"]);
        shown.insert("pool".into(), v["lvs"]["name"].clone());
        shown.insert("uuid".into(), v["uuid"].clone());
        shown.insert("bdev".into(), device.into());
        let known = [
            "domain",
            "size_bytes",
            "logical_bytes",
            "zero_bytes",
            "reclaimable_bytes",
            "base_snapshot",
            "read_only",
        ];
        shown.extend(members(v, &known));
        let kind = if v["is_snapshot"] == true { "snapshot" } else { "volume" };
        shown.insert("kind".into(), kind.into());
        shown.insert("exported".into(), exported.iter().map(|(_, place)| *place).collect());
        shown.extend(both(done, did.seconds));
        shown.insert("host_key".into(), key_of.get(name).map_or(Value::Null, |d| host_key(s, d)));
        (done.read.ops + done.write.ops, Value::Object(shown))
    };
    list(&s.volumes).iter().map(one).collect()
}

fn host_key(s: &Sample, device: &Device) -> Value {
    let luks = list(&s.luks).iter().find(|l| l["name"] == device.name.as_str());
    let (state, why) = match luks {
        Some(l) => (l["state"].clone(), l["reason"].clone()),
        None => (json!(device.key_access), Value::Null),
    };
    json!({"kind": device.product, "device": device.name, "state": state, "why": why})
}

fn devices(s: &Sample, did: &Interval) -> Vec<(u64, Value)> {
    let all = s.devices.iter().zip(&did.devices).filter(|(d, _)| d.product != VOLUME);
    let one = |(d, done): (&Device, &Both)| {
        let errors: u64 = d.errors.iter().map(|(_, n)| n).sum();
        let mut v = Map::new();
        v.insert("name".into(), d.name.as_str().into());
        v.insert("product".into(), d.product.as_str().into());
        v.insert("base".into(), json!(d.base));
        v.insert("size_bytes".into(), d.size_bytes.into());
        v.extend(both(done, did.seconds));
        v.insert("errors".into(), errors.into());
        (done.read.ops + done.write.ops, Value::Object(v))
    };
    all.map(one).collect()
}

/// "192.0.2.1:4420" of an address as the methods give it.
fn address(v: &Value) -> String {
    let (ip, port) = (text(&v["traddr"]), text(&v["trsvcid"]));
    match v.as_str() {
        Some(whole) => whole.to_owned(),
        None if ip.contains(':') => format!("[{ip}]:{port}"),
        None => format!("{ip}:{port}"),
    }
}

/// What is the same of a controller as long as it lives.
fn controller_id(c: &Value) -> (Option<u64>, &str, &str) {
    (c["cntlid"].as_u64(), text(&c["hostnqn"]), text(&c["hostid"]))
}

/// A host's controllers: one entry each.
fn hosts(before: Option<&Sample>, s: &Sample, seconds: Option<f64>) -> Vec<(u64, Value)> {
    let mut all = Vec::new();
    for (nqn, controllers) in &s.controllers {
        let nqn = json!(nqn);
        let mut queues: HashMap<Option<u64>, Vec<&Value>> = HashMap::new();
        for q in named(&s.queues, &nqn).map_or(&[][..], list) {
            queues.entry(q["cntlid"].as_u64()).or_default().push(q);
        }
        let was: Option<HashMap<_, &Value>> = before.and_then(|b| {
            // Of a subsystem that is new all controllers are; what gave no list is not known.
            match named(&b.controllers, &nqn) {
                None => b.subsystems.is_array().then(HashMap::new),
                Some(all) => Some(all.as_array()?.iter().map(|c| (controller_id(c), c)).collect()),
            }
        });
        for c in list(controllers) {
            let mine = queues.get(&c["cntlid"].as_u64()).map_or(&[][..], Vec::as_slice);
            let first = mine.iter().min_by_key(|q| q["qid"].as_u64());
            let was = was.as_ref().map(|was| was.get(&controller_id(c)).copied().unwrap_or(&Value::Null));
            let did = |ops: &str, bytes: &str| Activity {
                ops: grown_member(was, c, ops).unwrap_or(0),
                bytes: grown_member(was, c, bytes).unwrap_or(0),
                ..Activity::default()
            };
            let (read, write) = (did("reads", "read_bytes"), did("writes", "write_bytes"));
            let rates = |a: &Activity| {
                let all = a.json(was.and(seconds));
                json!({"iops": all["iops"], "bytes_per_second": all["bytes_per_second"]})
            };
            let age = c["keep_alive_age_ms"].as_f64().map(|ms| ms / 1000.0);
            let timeout = c["kato_ms"].as_f64().filter(|ms| *ms > 0.0).map(|ms| ms / 1000.0);
            let shown = json!({
                "nqn": c["hostnqn"], "subsystem": nqn, "controller": c["cntlid"],
                "address": first.map(|q| address(&q["peer_address"])), "queues": c["num_io_qpairs"],
                "authenticated": mine.iter().any(|q| !q["auth"].is_null()), "tls": mine.iter().any(|q| !q["tls"].is_null()),
                "read": rates(&read), "write": rates(&write), "errors": c["errors"],
                "keep_alive_age_seconds": age, "keep_alive_timeout_seconds": timeout,
            });
            all.push((read.ops + write.ops, shown));
        }
    }
    all
}

fn reactors(s: &Sample, did: &Interval) -> Vec<Value> {
    let all = list(&s.reactors["reactors"]).iter().zip(&did.reactors);
    all.map(|(r, busy)| json!({"name": r["lw_threads"][0]["name"], "core": r["lcore"], "busy": busy}))
        .collect()
}

/// What goes on, or has gone on, in the background of a pool.
fn work(before: Option<&Sample>, p: &Value, seconds: Option<f64>) -> Vec<Value> {
    let was = before.and_then(|b| same(Some(&b.pools), p, &["uuid"]));
    // Per second, of work that was there at both times.
    let rate = |work: &str, key: &str| {
        let (was, now) = (was?.get(work)?[key].as_f64()?, p[work][key].as_f64()?);
        (now >= was).then_some((now - was) / seconds?)
    };
    let row = |what: &str,
               state: &Value,
               done: Option<f64>,
               rate: Option<f64>,
               eta: Option<f64>,
               why: &Value| {
        let eta = eta.filter(|_| *state == "running");
        json!({
            "what": what, "on": p["name"], "state": state, "done": number(done.map(|d| d.clamp(0.0, 1.0))),
            "rate_bytes_per_second": number(rate.filter(|_| *state == "running")), "eta_seconds": number(eta), "why": why,
        })
    };
    let mut all = Vec::new();
    for (what, key, unit) in
        [("scrub", "scrub", "bytes"), ("late deduplication", "late_dedupe", "containers")]
    {
        let w = &p[key];
        if let (Some(done), Some(total)) = (w[unit].as_f64(), w[&format!("total_{unit}")].as_f64())
            && w["state"] != "never"
        {
            let share = if total > 0.0 { done / total } else { 1.0 };
            let per_second = rate(key, unit);
            let eta = per_second.filter(|r| *r > 0.0).map(|r| (total - done).max(0.0) / r);
            all.push(row(
                what,
                &w["state"],
                Some(share),
                per_second.filter(|_| unit == "bytes"),
                eta,
                &Value::Null,
            ));
        }
    }
    let renewal = &p["renewal"];
    if renewal["state"].is_string() && renewal["state"] != "never" {
        let rate = rate("renewal", "bytes");
        all.push(row("re-encryption", &renewal["state"], None, rate, None, &renewal["reason"]));
    }
    let deletion = &p["deletion"];
    if deletion["volumes"].as_u64().is_some_and(|n| n > 0) {
        let why = match &deletion["state"] {
            state if state == "stopped" => {
                json!("the device failed; it goes on when the pool is opened again")
            }
            _ => Value::Null,
        };
        all.push(row("deletion", &deletion["state"], None, None, None, &why));
    }
    if let (Some(moved), Some(seconds)) = (grown_member(was, p, "moved_bytes").filter(|n| *n > 0), seconds) {
        let rate = Some(moved as f64 / seconds);
        all.push(row("collection", &json!("running"), None, rate, None, &Value::Null));
    }
    all
}

fn key(k: &Value) -> Value {
    let mut v = members(k, &["name", "server", "objects", "state", "access"]);
    v.insert("why".into(), k["reason"].clone());
    v.insert("devices".into(), k["devices"].clone());
    Value::Object(v)
}

fn key_server(s: &Value) -> Value {
    let state = match s["reachable"].as_bool() {
        Some(true) => "reachable",
        Some(false) => "unreachable",
        None => "unknown",
    };
    json!({
        "name": s["name"], "state": state, "why": s["error"], "addresses": s["servers"],
        "last_answer_age_seconds": s["last_answer_age_seconds"],
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cryptfold_bdev::Class;

    use super::*;
    use crate::sample::State;

    fn device(name: &str, product: &str, base: Option<&str>, reads: u64, latency_ns: u64) -> Device {
        let mut d = Device {
            name: name.into(),
            uuid: format!("uuid of {name}"),
            product: product.into(),
            base: base.map(str::to_owned),
            key_access: (product == "hostcrypt").then(|| "open".into()),
            errors: vec![("a".into(), 1), ("b".into(), 2)],
            ..Device::default()
        };
        let read = Class::Read as usize;
        (d.totals[read].ops, d.totals[read].bytes) = (reads, reads * 4096);
        (0..reads).for_each(|_| d.latencies[read].record(latency_ns));
        d
    }

    /// A volume `v` under a host's key, exported; a volume `w` that is not; a disk.
    fn sample(devices: Vec<Device>) -> Sample {
        Sample {
            state: State::Running,
            devices,
            pools: json!([{"name": "p", "uuid": "P", "size_bytes": 100, "free_bytes": 60, "logical_bytes": 80, "stored_bytes": 18,
                           "metadata_bytes": 2, "failed": null}]),
            volumes: json!([{"name": "v", "uuid": "V", "lvs": {"name": "p"}, "is_snapshot": false},
                            {"name": "w", "uuid": "W", "lvs": {"name": "p"}, "is_snapshot": true}]),
            subsystems: json!([{"nqn": "nqn.x:a", "namespaces": [{"nsid": 3, "bdev_name": "h"}]}]),
            ..Sample::default()
        }
    }

    fn devices(reads: u64) -> Vec<Device> {
        vec![
            device("disk", "URING bdev", None, reads / 2, 50_000),
            device("V", VOLUME, None, reads, 100_000),
            device("W", VOLUME, None, 0, 1),
            device("h", "hostcrypt", Some("V"), reads, 200_000),
        ]
    }

    fn look(before: Option<&Sample>, mut now: Sample, seconds: u64) -> (Sample, Value) {
        if let Some(before) = before {
            now.at = before.at + Duration::from_secs(seconds);
        }
        let shown = of(before, &now, &Interval::between(before, &now));
        (now, shown)
    }

    #[test]
    fn figures_are_differences_over_the_time_between() {
        let (first, shown) = look(None, sample(devices(7)), 0);
        assert_eq!(
            (&shown["interval_seconds"], &shown["totals"]["read"]["iops"]),
            (&json!(null), &json!(null))
        );
        assert_eq!((&shown["space"]["ratio"], &shown["space"]["free_bytes"]), (&json!(4.0), &json!(60)));
        let (_, shown) = look(Some(&first), sample(devices(7 + 2000)), 2);
        let totals = &shown["totals"];
        assert_eq!(
            (&totals["read"]["iops"], &totals["read"]["bytes_per_second"]),
            (&json!(1000.0), &json!(4_096_000.0))
        );
        assert_eq!((&totals["write"]["iops"], &totals["write"]["p50"]), (&json!(0.0), &json!(null)));
        // 128 us <= 200 us < 256 us.
        assert_eq!((&shown["heat"]["read"][8], &shown["heat"]["edges"][8]), (&json!(2000), &json!(0.000256)));
        let p99 = totals["read"]["p99"].as_f64().unwrap();
        assert!((1.9e-4..2.2e-4).contains(&p99), "{p99}");
        // What hosts see of v is the device on top of it.
        let v = &shown["volumes"][0];
        assert_eq!(
            (&v["bdev"], &v["exported"], &v["kind"]),
            (&json!("h"), &json!(["nqn.x:a/3"]), &json!("volume"))
        );
        assert_eq!(v["host_key"], json!({"kind": "hostcrypt", "device": "h", "state": "open", "why": null}));
        assert_eq!(v["read"]["iops"], json!(1000.0));
        let w = &shown["volumes"][1];
        assert_eq!(
            (&w["bdev"], &w["exported"], &w["kind"], &w["host_key"]),
            (&json!("W"), &json!([]), &json!("snapshot"), &json!(null))
        );
        let names: Vec<&Value> = list(&shown["devices"]).iter().map(|d| &d["name"]).collect();
        assert_eq!(names, [&json!("disk"), &json!("h")]);
        assert_eq!(
            (&shown["devices"][0]["errors"], &shown["devices"][0]["read"]["iops"]),
            (&json!(3), &json!(500.0))
        );
    }

    #[test]
    fn devices_that_come_go_and_are_reset_give_no_nonsense() {
        let (first, _) = look(None, sample(devices(1_000_000)), 0);
        // Counters that began again (bdev_reset_iostat).
        let (second, shown) = look(Some(&first), sample(devices(50)), 1);
        assert_eq!(shown["totals"]["read"]["iops"], json!(50.0));
        // Another device of this name, with more behind it than the old one.
        let mut replaced = devices(50);
        replaced[3] = Device { uuid: "another".into(), ..device("h", "hostcrypt", Some("V"), 80, 1_000_000) };
        let (third, shown) = look(Some(&second), sample(replaced), 1);
        assert_eq!(shown["totals"]["read"]["iops"], json!(80.0), "all of it is new");
        let (_, shown) = look(Some(&third), sample(Vec::new()), 1);
        assert_eq!((&shown["totals"]["read"]["iops"], &shown["devices"]), (&json!(0.0), &json!([])));
        // Names in a circle.
        let circle = vec![device("h", "x", Some("i"), 1, 1), device("i", "x", Some("h"), 1, 1)];
        let (_, shown) = look(None, sample(circle), 1);
        assert_eq!(list(&shown["volumes"]).len(), 2);
    }

    #[test]
    fn hosts_are_their_controllers_with_addresses_and_rates() {
        let hosts = |reads: u64, hostid: &str| Sample {
            controllers: vec![(
                "nqn.x:a".into(),
                json!([{"cntlid": 1, "hostnqn": "<script>", "hostid": hostid, "num_io_qpairs": 2, "kato_ms": 10000,
                        "keep_alive_age_ms": 1500, "reads": reads, "read_bytes": reads * 512, "writes": 0, "write_bytes": 0, "errors": 4}]),
            )],
            queues: vec![(
                "nqn.x:a".into(),
                json!([{"cntlid": 1, "qid": 1, "peer_address": {"traddr": "192.0.2.1", "trsvcid": "2"}},
                       {"cntlid": 1, "qid": 0, "peer_address": {"traddr": "fe80::1", "trsvcid": "1"}, "tls": {}},
                       {"cntlid": 2, "qid": 0, "peer_address": {"traddr": "192.0.2.9", "trsvcid": "1"}, "auth": {}}]),
            )],
            ..sample(Vec::new())
        };
        let (first, _) = look(None, hosts(100, "a"), 0);
        let (second, shown) = look(Some(&first), hosts(300, "a"), 2);
        let wanted = json!({
            "nqn": "<script>", "subsystem": "nqn.x:a", "controller": 1, "address": "[fe80::1]:1", "queues": 2,
            "authenticated": false, "tls": true, "read": {"iops": 100.0, "bytes_per_second": 51200.0},
            "write": {"iops": 0.0, "bytes_per_second": 0.0}, "errors": 4, "keep_alive_age_seconds": 1.5,
            "keep_alive_timeout_seconds": 10.0,
        });
        assert_eq!(shown["hosts"], json!([wanted]));
        let (_, shown) = look(Some(&second), hosts(500, "b"), 1);
        assert_eq!(shown["hosts"][0]["read"]["iops"], json!(500.0), "a new controller under the old number");
        let (unknown, _) =
            look(None, Sample { controllers: vec![("nqn.x:a".into(), Value::Null)], ..hosts(0, "a") }, 0);
        let (_, shown) = look(Some(&unknown), hosts(500, "a"), 1);
        assert_eq!(shown["hosts"][0]["read"]["iops"], json!(null), "not what it did in all its life");
    }

    #[test]
    fn background_work_has_progress_rate_and_end() {
        let at = |bytes: u64, moved: u64, state: &str| Sample {
            pools: json!([{"name": "p", "uuid": "P", "moved_bytes": moved,
                "scrub": {"state": state, "bytes": bytes, "total_bytes": 1000},
                "late_dedupe": {"state": "never", "containers": 0, "total_containers": 0},
                "renewal": {"state": "stopped", "bytes": 5, "reason": "a key server is gone"},
                "deletion": {"state": "running", "volumes": 1}}]),
            ..sample(Vec::new())
        };
        let (first, _) = look(None, at(100, 50, "running"), 0);
        let (second, shown) = look(Some(&first), at(300, 90, "running"), 2);
        let row =
            |what: &str| list(&shown["work"]).iter().find(|w| w["what"] == what).cloned().unwrap_or_default();
        assert_eq!(
            row("scrub"),
            json!({"what": "scrub", "on": "p", "state": "running", "done": 0.3, "rate_bytes_per_second": 100.0, "eta_seconds": 7.0, "why": null})
        );
        assert_eq!(
            (&row("re-encryption")["state"], &row("re-encryption")["why"]),
            (&json!("stopped"), &json!("a key server is gone"))
        );
        assert_eq!(
            (&row("deletion")["done"], &row("collection")["rate_bytes_per_second"]),
            (&json!(null), &json!(20.0))
        );
        assert_eq!(row("late deduplication"), Value::Null);
        let (_, shown) = look(Some(&second), at(1000, 90, "done"), 1);
        assert!(!list(&shown["work"]).iter().any(|w| w["what"] == "collection"), "nothing was moved");
        assert_eq!(
            (&shown["work"][0]["eta_seconds"], &shown["work"][0]["done"]),
            (&json!(null), &json!(1.0))
        );
    }

    #[test]
    fn pools_say_how_they_are_and_what_opens_them() {
        let mut s = sample(Vec::new());
        s.pools = json!([{"name": "p", "uuid": "P", "failed": null, "size_bytes": 9}, {"name": "q", "uuid": "Q", "locked": "no key"},
                         {"name": "r", "uuid": "R", "failed": "its device is gone"}]);
        s.domains =
            vec![("p".into(), json!([{"name": "d", "uuid": "D", "ratio": 2.0}, {"name": "e", "uuid": "E"}]))];
        s.encryption = json!({"pools": [{"uuid": "P", "state": "unlocked", "encrypted": true,
            "slots": [{"slot": 0, "kind": "kms", "label": null, "created_ms": 5, "kms_object": "4711"}],
            "domains": [{"uuid": "D", "encrypted": true, "changing": true}, {"uuid": "E", "encrypted": false, "changing": false}]}]});
        let shown = look(None, s, 0).1;
        let (p, q, r) = (&shown["pools"][0], &shown["pools"][1], &shown["pools"][2]);
        assert_eq!(
            (&p["state"], &q["state"], &r["state"]),
            (&json!("online"), &json!("locked"), &json!("failed"))
        );
        assert_eq!(
            (&q["why"], &q["size_bytes"], &p["size_bytes"]),
            (&json!("no key"), &json!(null), &json!(9))
        );
        assert_eq!(
            (&p["domains"][0]["state"], &p["domains"][1]["state"]),
            (&json!("changing"), &json!("open"))
        );
        assert_eq!(
            p["encryption"]["slots"],
            json!([{"slot": 0, "kind": "kms", "label": null, "created_ms": 5}])
        );
        assert_eq!(shown["problems"], json!(["pool r: its device is gone"]));
        let starting = look(None, Sample::default(), 0).1;
        assert_eq!(
            (&starting["state"], &starting["problems"]),
            (&json!("starting"), &json!(["not initialised"]))
        );
        assert_eq!(starting["space"]["ratio"], json!(null));
    }

    #[test]
    fn long_lists_show_the_busiest_and_say_so() {
        let all = (0..MOST as u64 + 3).map(|n| device(&format!("d{n}"), "x", None, n, 1_000)).collect();
        let (first, _) = look(None, sample(Vec::new()), 0);
        let (_, shown) = look(Some(&first), sample(all), 1);
        let names = list(&shown["devices"]);
        assert_eq!((names.len(), &shown["left_out"]["devices"]), (MOST, &json!(3)));
        assert_eq!(
            (&names[0]["name"], &names[MOST - 1]["name"]),
            (&json!("d3"), &json!(format!("d{}", MOST + 2)))
        );
    }
}
