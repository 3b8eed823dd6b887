//! A sample in Prometheus's text form: base units (seconds, bytes), `_total` for what only grows.

use std::collections::BTreeMap;

use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder, TextEncoder};
use serde_json::Value;

use crate::sample::{Sample, list};

/// Content type of [`text`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// All metrics of a sample.
pub fn text(s: &Sample) -> Result<Vec<u8>, prometheus::Error> {
    let mut m = Metrics::default();
    m.gauge(
        "cryptfold_up",
        "Whether the target is initialised and answers",
        &[],
        Some(f64::from(u8::from(s.is_running()))),
    );
    let version = s.version["cryptfold"].as_str().or(s.version["version"].as_str()).unwrap_or("");
    m.gauge("cryptfold_build_info", "The program's version, as a label", &[("version", version)], Some(1.0));
    reactors(&mut m, s);
    devices(&mut m, s);
    pools(&mut m, s);
    volumes(&mut m, s);
    domains(&mut m, s);
    target(&mut m, s);
    keys(&mut m, s);
    let mut out = Vec::new();
    TextEncoder::new().encode(&m.0.into_values().collect::<Vec<_>>(), &mut out)?;
    Ok(out)
}

/// Families by name: their order does not hang on the sample's.
#[derive(Default)]
struct Metrics(BTreeMap<&'static str, MetricFamily>);

impl Metrics {
    fn add(&mut self, name: &'static str, help: &str, kind: MetricType, labels: &[(&str, &str)], value: f64) {
        let mut metric = Metric::default();
        let pairs = labels.iter().map(|(name, value)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).into());
            pair.set_value((*value).into());
            pair
        });
        metric.set_label(pairs.collect());
        if kind == MetricType::COUNTER {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
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
            self.add(name, help, MetricType::GAUGE, labels, value);
        }
    }

    /// Left out where the sample has no figure.
    fn counter(&mut self, name: &'static str, help: &str, labels: &[(&str, &str)], value: Option<f64>) {
        if let Some(value) = value {
            self.add(name, help, MetricType::COUNTER, labels, value);
        }
    }
}

fn text_of(v: &Value) -> &str {
    v.as_str().unwrap_or("")
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

/// Operation, and what the control plane calls its numbers: operations, bytes, ticks.
const OPERATIONS: [(&str, &str, &str, &str); 5] = [
    ("read", "num_read_ops", "bytes_read", "read_latency_ticks"),
    ("write", "num_write_ops", "bytes_written", "write_latency_ticks"),
    ("unmap", "num_unmap_ops", "bytes_unmapped", "unmap_latency_ticks"),
    ("copy", "num_copy_ops", "bytes_copied", "copy_latency_ticks"),
    ("flush", "num_flush_ops", "", ""),
];

fn devices(m: &mut Metrics, s: &Sample) {
    let rate = s.iostat["tick_rate"].as_f64().unwrap_or(1e9);
    for d in list(&s.iostat["bdevs"]) {
        let name = text_of(&d["name"]);
        let known = list(&s.bdevs).iter().find(|b| b["name"] == d["name"]);
        let alias = known.and_then(|b| b["aliases"][0].as_str()).unwrap_or("");
        let device = [("bdev", name), ("alias", alias)];
        if let Some(b) = known {
            let bytes = b["num_blocks"].as_f64().zip(b["block_size"].as_f64()).map(|(n, size)| n * size);
            m.gauge("cryptfold_bdev_size_bytes", "Size of a device", &device, bytes);
        }
        for (op, operations, bytes, ticks) in OPERATIONS {
            let labels = [device[0], device[1], ("op", op)];
            m.counter(
                "cryptfold_bdev_ops_total",
                "Operations of a device that have ended",
                &labels,
                d[operations].as_f64(),
            );
            m.counter(
                "cryptfold_bdev_bytes_total",
                "Bytes of a device's operations",
                &labels,
                d[bytes].as_f64(),
            );
            let seconds = d[ticks].as_f64().map(|t| t / rate);
            m.counter(
                "cryptfold_bdev_op_seconds_total",
                "Time of a device's operations, added up",
                &labels,
                seconds,
            );
        }
        for (error, count) in d["io_error"].as_object().into_iter().flatten() {
            let labels = [device[0], device[1], ("error", error.as_str())];
            m.counter(
                "cryptfold_bdev_errors_total",
                "Operations of a device that failed",
                &labels,
                count.as_f64(),
            );
        }
    }
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
    for p in list(&s.pools) {
        let pool = [("pool", text_of(&p["name"]))];
        for (name, key, help) in SPACE.into_iter().chain(STATE) {
            m.gauge(name, help, &pool, p[key].as_f64());
        }
        m.counter(
            "cryptfold_pool_healed_total",
            "Fragments that a later write healed",
            &pool,
            p["healed"].as_f64(),
        );
        let failed = Some(f64::from(u8::from(!p["failed"].is_null())));
        m.gauge("cryptfold_pool_failed", "Whether a pool has stopped", &pool, failed);
        for (work, done, total) in
            [("scrub", "bytes", "total_bytes"), ("late_dedupe", "containers", "total_containers")]
        {
            let w = &p[work];
            let labels = [pool[0], ("work", work)];
            let running = Some(f64::from(u8::from(w["state"] == "running")));
            m.gauge("cryptfold_pool_work_running", "Whether background work runs", &labels, running);
            let share =
                w[done].as_f64().zip(w[total].as_f64()).filter(|(_, all)| *all > 0.0).map(|(n, all)| n / all);
            m.gauge(
                "cryptfold_pool_work_done_ratio",
                "Share of background work that is done, 0 to 1",
                &labels,
                share,
            );
        }
    }
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

fn keys(m: &mut Metrics, s: &Sample) {
    for k in list(&s.keys) {
        let labels = [("key", text_of(&k["name"])), ("state", text_of(&k["state"]))];
        m.gauge("cryptfold_key_info", "A key from a key server, its state as a label", &labels, Some(1.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn lines(s: &Sample) -> Vec<String> {
        let text = String::from_utf8(text(s).expect("encodes")).expect("is text");
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn figures_come_in_base_units_with_their_labels() {
        let s = Sample {
            reactors: json!({"tick_rate": 1000, "reactors": [{"lcore": 3, "busy": 1500, "idle": 500}]}),
            iostat: json!({"tick_rate": 1000, "bdevs": [
                {"name": "u1", "num_read_ops": 7, "bytes_read": 28672, "read_latency_ticks": 250, "io_error": {"a\"b": 2}}]}),
            bdevs: json!([{"name": "u1", "aliases": ["p/v"], "num_blocks": 10, "block_size": 512}]),
            pools: json!([{"name": "p", "size_bytes": 100, "failed": null, "ratio_without_zeroes": null,
                           "scrub": {"state": "running", "bytes": 1, "total_bytes": 4}}]),
            ..Sample::default()
        };
        let lines = lines(&s);
        for wanted in [
            "cryptfold_up 1",
            "cryptfold_reactor_seconds_total{cpu=\"3\",state=\"busy\"} 1.5",
            "cryptfold_bdev_ops_total{bdev=\"u1\",alias=\"p/v\",op=\"read\"} 7",
            "cryptfold_bdev_op_seconds_total{bdev=\"u1\",alias=\"p/v\",op=\"read\"} 0.25",
            "cryptfold_bdev_errors_total{bdev=\"u1\",alias=\"p/v\",error=\"a\\\"b\"} 2",
            "cryptfold_bdev_size_bytes{bdev=\"u1\",alias=\"p/v\"} 5120",
            "cryptfold_pool_size_bytes{pool=\"p\"} 100",
            "cryptfold_pool_failed{pool=\"p\"} 0",
            "cryptfold_pool_work_done_ratio{pool=\"p\",work=\"scrub\"} 0.25",
        ] {
            assert!(lines.iter().any(|l| l == wanted), "{wanted} is missing in {lines:#?}");
        }
        assert!(!lines.iter().any(|l| l.contains("reduction_ratio")), "no ratio is known, and none told");
    }

    #[test]
    fn a_target_that_says_nothing_is_down() {
        assert!(lines(&Sample::default()).contains(&"cryptfold_up 0".to_owned()));
    }
}
