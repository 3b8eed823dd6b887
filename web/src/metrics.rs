//! A sample in Prometheus's text form: base units (seconds, bytes), `_total` for what only grows. States are gauges of 0 and 1.

use std::collections::{BTreeMap, HashMap, HashSet};

use cryptfold_bdev::{Class, ClassTotals, LatencyCounts, borders_s};
use cryptfold_view::snapshot::MOST;
use cryptfold_view::{Sample, State, list, text as text_of};
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder, TextEncoder};
use serde_json::Value;

/// Content type of [`text`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// All metrics of a sample.
pub fn text(s: &Sample) -> Result<Vec<u8>, prometheus::Error> {
    let mut m = Metrics::default();
    m.gauge(
        "cryptfold_up",
        "Whether the target is initialised and answers",
        &[],
        truth(s.state == State::Running),
    );
    m.gauge("cryptfold_uptime_seconds", "Since the program's start", &[], Some(s.uptime.as_secs_f64()));
    let version = s.version["cryptfold"].as_str().or(s.version["version"].as_str()).unwrap_or("");
    m.gauge("cryptfold_build_info", "The program's version, as a label", &[("version", version)], Some(1.0));
    reactors(&mut m, s);
    devices(&mut m, s);
    pools(&mut m, s);
    volumes(&mut m, s);
    domains(&mut m, s);
    encryption(&mut m, s);
    target(&mut m, s);
    hosts(&mut m, s);
    keys(&mut m, s);
    let mut out = Vec::new();
    TextEncoder::new().encode(&m.0.into_values().collect::<Vec<_>>(), &mut out)?;
    Ok(out)
}

/// Families by name: their order does not hang on the sample's.
#[derive(Default)]
struct Metrics(BTreeMap<&'static str, MetricFamily>);

impl Metrics {
    fn add(
        &mut self,
        name: &'static str,
        help: &str,
        kind: MetricType,
        labels: &[(&str, &str)],
        mut metric: Metric,
    ) {
        let pairs = labels.iter().map(|(name, value)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).into());
            pair.set_value((*value).into());
            pair
        });
        metric.set_label(pairs.collect());
        let family = self.0.entry(name).or_insert_with(|| {
            let mut family = MetricFamily::default();
            family.set_name(name.into());
            family.set_help(help.into());
            family.set_field_type(kind);
            family
        });
        family.mut_metric().push(metric);
    }

    /// Left out where the sample has no figure.
    fn gauge(&mut self, name: &'static str, help: &str, labels: &[(&str, &str)], value: Option<f64>) {
        if let Some(value) = value {
            let (mut metric, mut gauge) = (Metric::default(), Gauge::default());
            gauge.set_value(value);
            metric.set_gauge(gauge);
            self.add(name, help, MetricType::GAUGE, labels, metric);
        }
    }

    /// Left out where the sample has no figure.
    fn counter(&mut self, name: &'static str, help: &str, labels: &[(&str, &str)], value: Option<f64>) {
        if let Some(value) = value {
            let (mut metric, mut counter) = (Metric::default(), Counter::default());
            counter.set_value(value);
            metric.set_counter(counter);
            self.add(name, help, MetricType::COUNTER, labels, metric);
        }
    }

    /// Seconds, with the borders of [`borders_s`].
    fn histogram(&mut self, name: &'static str, help: &str, labels: &[(&str, &str)], counts: &LatencyCounts) {
        let mut below = 0;
        let bucket = |(le, n): (f64, u64)| {
            below += n;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(le);
            bucket.set_cumulative_count(below);
            bucket
        };
        let (mut metric, mut histogram) = (Metric::default(), Histogram::default());
        histogram.set_bucket(borders_s().into_iter().zip(counts.between_borders()).map(bucket).collect());
        histogram.set_sample_count(counts.count());
        histogram.set_sample_sum(counts.sum_ns as f64 / 1e9);
        metric.set_histogram(histogram);
        self.add(name, help, MetricType::HISTOGRAM, labels, metric);
    }
}

fn truth(is: bool) -> Option<f64> {
    Some(f64::from(u8::from(is)))
}

fn reactors(m: &mut Metrics, s: &Sample) {
    let rate = s.reactors["tick_rate"].as_f64().unwrap_or(1e9);
    for r in list(&s.reactors["reactors"]) {
        let cpu = r["lcore"].to_string();
        for (state, key) in [("busy", "busy"), ("idle", "idle")] {
            let seconds = r[key].as_f64().map(|ticks| ticks / rate);
            let labels = [("cpu", cpu.as_str()), ("state", state)];
            m.counter(
                "cryptfold_reactor_seconds_total",
                "Time of a reactor, by what it did",
                &labels,
                seconds,
            );
        }
    }
}

const OPERATIONS: [(&str, Class); 5] = [
    ("read", Class::Read),
    ("write", Class::Write),
    ("unmap", Class::Unmap),
    ("copy", Class::Copy),
    ("flush", Class::Other),
];

fn devices(m: &mut Metrics, s: &Sample) {
    for d in &s.devices {
        let device = [("bdev", d.name.as_str()), ("alias", d.alias.as_str())];
        m.gauge("cryptfold_bdev_size_bytes", "Size of a device", &device, Some(d.size_bytes as f64));
        for (op, class) in OPERATIONS {
            let labels = [device[0], device[1], ("op", op)];
            let ClassTotals { ops, bytes, latency_ns, .. } = d.totals[class as usize];
            let latencies = &d.latencies[class as usize];
            let count = |n: u64| Some(n as f64);
            m.counter(
                "cryptfold_bdev_ops_total",
                "Operations of a device that have ended",
                &labels,
                count(ops),
            );
            if class != Class::Other {
                m.counter(
                    "cryptfold_bdev_bytes_total",
                    "Bytes of a device's operations",
                    &labels,
                    count(bytes),
                );
            }
            m.counter(
                "cryptfold_bdev_op_seconds_total",
                "Time of a device's operations, added up",
                &labels,
                Some(latency_ns as f64 / 1e9),
            );
            // What every device does has its series from the beginning: the first operations count, too.
            if matches!(class, Class::Read | Class::Write) || latencies.count() > 0 {
                let help = "Latencies of a device's operations since it was made";
                m.histogram("cryptfold_bdev_latency_seconds", help, &labels, latencies);
            }
        }
        for (error, count) in &d.errors {
            let labels = [device[0], device[1], ("error", error.as_str())];
            m.counter(
                "cryptfold_bdev_errors_total",
                "Operations of a device that failed",
                &labels,
                Some(*count as f64),
            );
        }
    }
}

/// By UUID, the names of pools, each once: a second one of a name (one of them is locked) has its UUID behind it. Two series with the
/// same labels would make the whole answer invalid.
fn pool_names(s: &Sample) -> HashMap<&str, String> {
    let mut taken = HashSet::new();
    let mut one = |p: &'_ Value| {
        let (name, uuid) = (text_of(&p["name"]), text_of(&p["uuid"]));
        if taken.insert(name.to_owned()) { name.to_owned() } else { format!("{name} ({uuid})") }
    };
    list(&s.pools).iter().map(|p| (text_of(&p["uuid"]), one(p))).collect()
}

fn name_of<'a>(names: &'a HashMap<&str, String>, pool: &'a Value) -> &'a str {
    names.get(text_of(&pool["uuid"])).map_or(text_of(&pool["name"]), String::as_str)
}

fn pools(m: &mut Metrics, s: &Sample) {
    const SPACE: [(&str, &str, &str); 8] = [
        ("cryptfold_pool_size_bytes", "size_bytes", "Space for data of a pool"),
        ("cryptfold_pool_free_bytes", "free_bytes", "Space of a pool that is free now"),
        ("cryptfold_pool_reclaimable_bytes", "reclaimable_bytes", "Space of a pool that collection can free"),
        ("cryptfold_pool_logical_bytes", "logical_bytes", "What hosts have written and not discarded"),
        ("cryptfold_pool_zero_bytes", "zero_bytes", "Of the logical bytes, zeros"),
        ("cryptfold_pool_unique_bytes", "unique_bytes", "Logical bytes after deduplication"),
        ("cryptfold_pool_stored_bytes", "stored_bytes", "Unique bytes after compression"),
        ("cryptfold_pool_metadata_bytes", "metadata_bytes", "Metadata of a pool"),
    ];
    const STATE: [(&str, &str, &str); 7] = [
        ("cryptfold_pool_volumes", "volumes", "Volumes and snapshots of a pool"),
        ("cryptfold_pool_memory_bytes", "memory_bytes", "Memory that a pool uses"),
        ("cryptfold_pool_memory_budget_bytes", "memory_budget_bytes", "Memory that a pool may use"),
        ("cryptfold_pool_index_entries", "index_entries", "Entries of the deduplication index"),
        ("cryptfold_pool_index_sampling", "index_sampling", "One chunk in so many is in the index"),
        ("cryptfold_pool_damaged_fragments", "damaged", "Fragments that can not be read"),
        (
            "cryptfold_pool_reduction_ratio",
            "ratio_without_zeroes",
            "Logical bytes without zeros to stored bytes with metadata",
        ),
    ];
    const COUNTED: [(&str, &str, &str); 3] = [
        ("cryptfold_pool_healed_total", "healed", "Fragments that a later write healed"),
        (
            "cryptfold_pool_written_bytes_total",
            "written_bytes",
            "Reduced bytes that hosts' writes have appended",
        ),
        ("cryptfold_pool_moved_bytes_total", "moved_bytes", "Reduced bytes that collection has moved"),
    ];
    let names = pool_names(s);
    for p in list(&s.pools) {
        let name = name_of(&names, p);
        let pool = [("pool", name)];
        for (name, key, help) in SPACE.into_iter().chain(STATE) {
            m.gauge(name, help, &pool, p[key].as_f64());
        }
        for (name, key, help) in COUNTED {
            m.counter(name, help, &pool, p[key].as_f64());
        }
        m.gauge("cryptfold_pool_failed", "Whether a pool has stopped", &pool, truth(!p["failed"].is_null()));
        let help = "Whether a pool is not open for want of a key";
        m.gauge("cryptfold_pool_locked", help, &pool, truth(!p["locked"].is_null()));
        work(m, p, name);
    }
}

/// Background work: its name as a label, what it has done, and of how much (where that is known).
const WORK: [(&str, &str, Option<&str>); 4] = [
    ("scrub", "bytes", Some("total_bytes")),
    ("late_dedupe", "containers", Some("total_containers")),
    ("renewal", "bytes", None),
    ("deletion", "", None),
];

fn work(m: &mut Metrics, p: &Value, pool: &str) {
    for (work, done, total) in WORK {
        let (w, labels) = (&p[work], [("pool", pool), ("work", work)]);
        let help = "Whether background work runs";
        m.gauge("cryptfold_pool_work_running", help, &labels, truth(w["state"] == "running"));
        let help = "Whether background work was ended before its time, by a person or a failure";
        m.gauge("cryptfold_pool_work_stopped", help, &labels, truth(w["state"] == "stopped"));
        let of = total.and_then(|total| w[total].as_f64()).filter(|all| *all > 0.0);
        let share = w[done].as_f64().zip(of).map(|(n, all)| n / all);
        let help = "Share of background work that is done, 0 to 1";
        m.gauge("cryptfold_pool_work_done_ratio", help, &labels, share);
        if done == "bytes" {
            let help = "Stored bytes that background work has gone through since it began last";
            m.gauge("cryptfold_pool_work_bytes", help, &labels, w[done].as_f64());
        }
    }
    let waiting = p["deletion"]["volumes"].as_f64();
    let help = "Deleted volumes and snapshots whose space is not back yet";
    m.gauge("cryptfold_pool_deleting_volumes", help, &[("pool", pool)], waiting);
}

fn volumes(m: &mut Metrics, s: &Sample) {
    const BYTES: [(&str, &str, &str); 4] = [
        ("cryptfold_volume_size_bytes", "size_bytes", "Size of a volume"),
        (
            "cryptfold_volume_logical_bytes",
            "logical_bytes",
            "What hosts have written to a volume and not discarded",
        ),
        ("cryptfold_volume_zero_bytes", "zero_bytes", "Of the logical bytes, zeros"),
        (
            "cryptfold_volume_reclaimable_bytes",
            "reclaimable_bytes",
            "Space that deleting a volume would give back",
        ),
    ];
    for v in list(&s.volumes) {
        let labels = [
            ("pool", text_of(&v["lvs"]["name"])),
            ("volume", text_of(&v["name"])),
            ("bdev", text_of(&v["uuid"])),
            ("domain", text_of(&v["domain"])),
        ];
        for (name, key, help) in BYTES {
            m.gauge(name, help, &labels, v[key].as_f64());
        }
        m.counter(
            "cryptfold_volume_written_bytes_total",
            "Bytes written to a volume",
            &labels,
            v["written_bytes"].as_f64(),
        );
    }
}

fn domains(m: &mut Metrics, s: &Sample) {
    for (pool, d) in s.domains.iter().flat_map(|(pool, all)| list(all).iter().map(move |d| (pool, d))) {
        let labels = [("pool", pool.as_str()), ("domain", text_of(&d["name"]))];
        for (name, key, help) in [
            ("cryptfold_domain_unique_bytes", "unique_bytes", "Bytes of a domain after deduplication"),
            ("cryptfold_domain_stored_bytes", "stored_bytes", "Unique bytes of a domain after compression"),
        ] {
            m.gauge(name, help, &labels, d[key].as_f64());
        }
    }
}

fn encryption(m: &mut Metrics, s: &Sample) {
    let names = pool_names(s);
    for p in list(&s.encryption["pools"]) {
        let pool = [("pool", name_of(&names, p))];
        let known = p["encrypted"].as_bool().and_then(truth);
        m.gauge("cryptfold_pool_encrypted", "Whether a pool needs a key to be opened", &pool, known);
        for kind in ["password", "key_file", "kms", "open"] {
            let n = list(&p["slots"]).iter().filter(|slot| slot["kind"] == kind).count();
            let labels = [pool[0], ("kind", kind)];
            m.gauge("cryptfold_pool_key_slots", "Key slots of a pool", &labels, Some(n as f64));
        }
        for d in list(&p["domains"]) {
            let labels = [pool[0], ("domain", text_of(&d["name"]))];
            let known = d["encrypted"].as_bool().and_then(truth);
            let help = "Whether what is written to a domain is encrypted";
            m.gauge("cryptfold_domain_encrypted", help, &labels, known);
            let help = "Generation of a domain's keys";
            m.gauge("cryptfold_domain_key_generation", help, &labels, d["generation"].as_f64());
            let help = "Stored bytes of a domain that lie under older keys";
            m.gauge("cryptfold_domain_old_key_bytes", help, &labels, d["old_bytes"].as_f64());
        }
    }
}

fn target(m: &mut Metrics, s: &Sample) {
    for g in list(&s.nvmf["poll_groups"]) {
        let group = text_of(&g["name"]);
        for (kind, key) in [("admin", "current_admin_qpairs"), ("io", "current_io_qpairs")] {
            let labels = [("group", group), ("type", kind)];
            m.gauge("cryptfold_nvmf_qpairs", "Queue pairs that are connected", &labels, g[key].as_f64());
        }
        let labels = [("group", group)];
        m.counter(
            "cryptfold_nvmf_ios_total",
            "NVMe I/O commands that have ended",
            &labels,
            g["completed_nvme_io"].as_f64(),
        );
        m.gauge(
            "cryptfold_nvmf_pending_ios",
            "Operations that are under way below",
            &labels,
            g["pending_bdev_io"].as_f64(),
        );
    }
    let door = &s.nvmf["connections"];
    for (hosts, key) in [("all", "current"), ("unknown", "unauthenticated")] {
        let help = "Connections: all, and those whose host has not connected or authenticated";
        m.gauge("cryptfold_nvmf_connections", help, &[("hosts", hosts)], door[key].as_f64());
    }
    for (name, key, help) in [
        (
            "cryptfold_nvmf_connections_displaced_total",
            "displaced",
            "Connections of unknown hosts that made room for others",
        ),
        ("cryptfold_nvmf_connections_refused_total", "refused", "Connections for which there was no room"),
    ] {
        m.counter(name, help, &[], door[key].as_f64());
    }
    for sub in list(&s.subsystems).iter().filter(|sub| sub["subtype"] != "Discovery") {
        let labels = [("nqn", text_of(&sub["nqn"]))];
        let count = |v: &Value| Some(list(v).len() as f64);
        m.gauge("cryptfold_nvmf_namespaces", "Namespaces of a subsystem", &labels, count(&sub["namespaces"]));
        m.gauge(
            "cryptfold_nvmf_listeners",
            "Listeners of a subsystem",
            &labels,
            count(&sub["listen_addresses"]),
        );
        let controllers =
            s.controllers.iter().find(|(nqn, _)| sub["nqn"] == **nqn).and_then(|(_, c)| count(c));
        m.gauge("cryptfold_nvmf_controllers", "Controllers of a subsystem", &labels, controllers);
    }
}

/// Controllers, by subsystem and number; of very many only the first.
fn hosts(m: &mut Metrics, s: &Sample) {
    let all = s.controllers.iter().flat_map(|(nqn, all)| list(all).iter().map(move |c| (nqn, c)));
    let left_out = all.clone().count().saturating_sub(MOST);
    let help = "Controllers of hosts that have no series of their own";
    m.gauge("cryptfold_nvmf_hosts_left_out", help, &[], Some(left_out as f64));
    for (nqn, c) in all.take(MOST) {
        let cntlid = c["cntlid"].to_string();
        let host = [("nqn", nqn.as_str()), ("host", text_of(&c["hostnqn"])), ("cntlid", cntlid.as_str())];
        for (op, ops, bytes) in [("read", "reads", "read_bytes"), ("write", "writes", "write_bytes")] {
            let labels = [host[0], host[1], host[2], ("op", op)];
            let help = "Commands of a host's controller that have ended";
            m.counter("cryptfold_nvmf_host_ops_total", help, &labels, c[ops].as_f64());
            let help = "Bytes of a host's commands";
            m.counter("cryptfold_nvmf_host_bytes_total", help, &labels, c[bytes].as_f64());
        }
        let help = "Commands of a host's controller that failed";
        m.counter("cryptfold_nvmf_host_errors_total", help, &host, c["errors"].as_f64());
        let help = "I/O queues of a host's controller";
        m.gauge("cryptfold_nvmf_host_queues", help, &host, c["num_io_qpairs"].as_f64());
        let age = c["keep_alive_age_ms"].as_f64().map(|ms| ms / 1000.0);
        let help = "Since a host's last sign of life";
        m.gauge("cryptfold_nvmf_host_keep_alive_age_seconds", help, &host, age);
    }
}

fn keys(m: &mut Metrics, s: &Sample) {
    for k in list(&s.keys) {
        let labels = [("key", text_of(&k["name"])), ("state", text_of(&k["state"]))];
        m.gauge("cryptfold_key_info", "A key from a key server, its state as a label", &labels, Some(1.0));
        for access in ["unused", "waiting", "open", "fenced"] {
            let labels = [labels[0], ("server", text_of(&k["server"])), ("access", access)];
            let help = "What devices may do with a key: 1 for what is the case";
            m.gauge("cryptfold_key_access", help, &labels, truth(k["access"] == access));
        }
    }
    for server in list(&s.key_servers) {
        let labels = [("server", text_of(&server["name"]))];
        let up = server["reachable"].as_bool().and_then(truth);
        m.gauge(
            "cryptfold_key_server_up",
            "Whether a key server answered when it was last asked",
            &labels,
            up,
        );
        let age = server["last_answer_age_seconds"].as_f64();
        m.gauge("cryptfold_key_server_answer_age_seconds", "Since a key server's last answer", &labels, age);
    }
    for l in list(&s.luks) {
        for state in ["raw", "converting", "bound", "waiting", "fenced"] {
            let labels = [("bdev", text_of(&l["name"])), ("state", state)];
            let help = "What a volume for hosts' LUKS is: 1 for what is the case";
            m.gauge("cryptfold_luks_state", help, &labels, truth(l["state"] == state));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cryptfold_view::Device;
    use serde_json::json;

    fn lines(s: &Sample) -> Vec<String> {
        let text = String::from_utf8(text(s).expect("encodes")).expect("is text");
        text.lines().map(str::to_owned).collect()
    }

    fn device() -> Device {
        let mut d = Device { name: "u1".into(), alias: "p/v".into(), size_bytes: 5120, ..Device::default() };
        d.errors = vec![("a\"b".into(), 2)];
        d.totals[Class::Read as usize] =
            ClassTotals { ops: 7, bytes: 28672, latency_ns: 250_000_000, ..ClassTotals::default() };
        // In the first, the second and the last bucket.
        [900, 1_500, 1_500, 10_000_000_000]
            .iter()
            .for_each(|ns| d.latencies[Class::Read as usize].record(*ns));
        d
    }

    #[test]
    fn figures_come_in_base_units_with_their_labels() {
        let s = Sample {
            state: State::Running,
            reactors: json!({"tick_rate": 1000, "reactors": [{"lcore": 3, "busy": 1500, "idle": 500}]}),
            devices: vec![device()],
            pools: json!([{"name": "p", "size_bytes": 100, "failed": null, "ratio_without_zeroes": null, "moved_bytes": 8,
                           "scrub": {"state": "running", "bytes": 1, "total_bytes": 4}, "renewal": {"state": "stopped", "bytes": 3},
                           "deletion": {"state": "never", "volumes": 0}}]),
            encryption: json!({"pools": [{"name": "p", "encrypted": true, "slots": [{"kind": "kms"}, {"kind": "kms"}],
                                          "domains": [{"name": "d", "encrypted": false, "generation": 2, "old_bytes": 9}]}]}),
            controllers: vec![(
                "nqn.x:a".into(),
                json!([{"cntlid": 1, "hostnqn": "h\n\"", "reads": 5, "read_bytes": 512, "keep_alive_age_ms": 1500}]),
            )],
            keys: json!([{"name": "k", "server": "s", "state": "Active", "access": "open"}]),
            key_servers: json!([{"name": "s", "reachable": false, "last_answer_age_seconds": 3.5}, {"name": "t", "reachable": null}]),
            luks: json!([{"name": "l", "state": "bound"}]),
            ..Sample::default()
        };
        let lines = lines(&s);
        for wanted in [
            "cryptfold_up 1",
            "cryptfold_reactor_seconds_total{cpu=\"3\",state=\"busy\"} 1.5",
            "cryptfold_bdev_ops_total{bdev=\"u1\",alias=\"p/v\",op=\"read\"} 7",
            "cryptfold_bdev_op_seconds_total{bdev=\"u1\",alias=\"p/v\",op=\"read\"} 0.25",
            "cryptfold_bdev_latency_seconds_bucket{bdev=\"u1\",alias=\"p/v\",op=\"read\",le=\"0.000001\"} 1",
            "cryptfold_bdev_latency_seconds_bucket{bdev=\"u1\",alias=\"p/v\",op=\"read\",le=\"0.000002\"} 3",
            "cryptfold_bdev_latency_seconds_bucket{bdev=\"u1\",alias=\"p/v\",op=\"read\",le=\"8.388608\"} 3",
            "cryptfold_bdev_latency_seconds_bucket{bdev=\"u1\",alias=\"p/v\",op=\"read\",le=\"+Inf\"} 4",
            "cryptfold_bdev_latency_seconds_count{bdev=\"u1\",alias=\"p/v\",op=\"read\"} 4",
            "cryptfold_bdev_latency_seconds_sum{bdev=\"u1\",alias=\"p/v\",op=\"read\"} 10.0000039",
            "cryptfold_bdev_latency_seconds_count{bdev=\"u1\",alias=\"p/v\",op=\"write\"} 0",
            "cryptfold_bdev_errors_total{bdev=\"u1\",alias=\"p/v\",error=\"a\\\"b\"} 2",
            "cryptfold_bdev_size_bytes{bdev=\"u1\",alias=\"p/v\"} 5120",
            "cryptfold_pool_size_bytes{pool=\"p\"} 100",
            "cryptfold_pool_failed{pool=\"p\"} 0",
            "cryptfold_pool_locked{pool=\"p\"} 0",
            "cryptfold_pool_moved_bytes_total{pool=\"p\"} 8",
            "cryptfold_pool_work_done_ratio{pool=\"p\",work=\"scrub\"} 0.25",
            "cryptfold_pool_work_stopped{pool=\"p\",work=\"renewal\"} 1",
            "cryptfold_pool_work_running{pool=\"p\",work=\"late_dedupe\"} 0",
            "cryptfold_pool_encrypted{pool=\"p\"} 1",
            "cryptfold_pool_key_slots{pool=\"p\",kind=\"kms\"} 2",
            "cryptfold_domain_encrypted{pool=\"p\",domain=\"d\"} 0",
            "cryptfold_domain_old_key_bytes{pool=\"p\",domain=\"d\"} 9",
            "cryptfold_nvmf_host_ops_total{nqn=\"nqn.x:a\",host=\"h\\n\\\"\",cntlid=\"1\",op=\"read\"} 5",
            "cryptfold_nvmf_host_keep_alive_age_seconds{nqn=\"nqn.x:a\",host=\"h\\n\\\"\",cntlid=\"1\"} 1.5",
            "cryptfold_key_access{key=\"k\",server=\"s\",access=\"open\"} 1",
            "cryptfold_key_access{key=\"k\",server=\"s\",access=\"fenced\"} 0",
            "cryptfold_key_server_up{server=\"s\"} 0",
            "cryptfold_luks_state{bdev=\"l\",state=\"bound\"} 1",
        ] {
            assert!(lines.iter().any(|l| l == wanted), "{wanted} is missing in {lines:#?}");
        }
        for unknown in ["reduction_ratio", "key_server_up{server=\"t\"", "op=\"unmap\",le="] {
            assert!(!lines.iter().any(|l| l.contains(unknown)), "{unknown} is not known, and not told");
        }
    }

    #[test]
    fn no_two_series_have_the_same_labels() {
        let s = Sample {
            pools: json!([{"name": "p", "uuid": "A"}, {"name": "p", "uuid": "B", "locked": "no key"}]),
            encryption: json!({"pools": [{"name": "p", "uuid": "A"}, {"name": "p", "uuid": "B"}]}),
            ..Sample::default()
        };
        let lines = lines(&s);
        for wanted in ["cryptfold_pool_locked{pool=\"p\"} 0", "cryptfold_pool_locked{pool=\"p (B)\"} 1"] {
            assert!(lines.iter().any(|l| l == wanted), "{wanted} is missing in {lines:#?}");
        }
        let series = |l: &String| l.rsplit_once(' ').map(|(series, _)| series.to_owned());
        let mut seen = HashSet::new();
        assert!(lines.iter().filter(|l| !l.starts_with('#')).all(|l| seen.insert(series(l))), "{lines:#?}");
    }

    #[test]
    fn a_target_that_says_nothing_is_down() {
        assert!(lines(&Sample::default()).contains(&"cryptfold_up 0".to_owned()));
    }
}
