//! The report as one page: no script, nothing from elsewhere, light and dark, on paper too.

use super::compare::{Verdict, apart, paired};
use super::record::{Measured, Record, Spread, Summary};
use super::svg::{Bar, Group, Points, bars, escape, latencies, short};
use super::warnings::warnings;

const STYLE: &str = include_str!("page.css");
/// Colours of parts, by primitive.
const PARTS: [(&str, &str); 6] =
    [("memcpy", "c5"), ("blake3", "c2"), ("zstd", "c4"), ("gcm", "c3"), ("xts", "c1"), ("", "c0")];

/// The page. `old`: an earlier run to compare with.
pub fn page(record: &Record, old: Option<&Record>) -> String {
    let subject = match (&record.other, record.machine.target.as_str()) {
        (Some(other), "unknown") => other.clone(),
        (_, target) => target.to_owned(),
    };
    let mut out = format!(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>\n\
         <title>cryptfold-perf suite</title><style>\n{STYLE}</style></head><body>\n<header><h1>cryptfold-perf suite</h1>\n\
         <p class='dim'>{}; {} UTC; {} of {} rounds of {} s, medians; ranges are the lowest and the highest round</p></header>\n",
        escape(&subject),
        date(record.started_s),
        record.rounds_done,
        record.matrix.effort.rounds,
        record.matrix.effort.seconds,
    );
    let warning = |w: &String| format!("<p class='warning'>{}</p>\n", escape(w));
    out.extend(warnings(record, old).iter().map(warning));
    for path in paths(record) {
        let of = |c: &&Measured| c.case.path.name() == path;
        let cases: Vec<&Measured> = record.cases.iter().filter(of).collect();
        out += &format!("<section><h2>{path}</h2>\n");
        out += &throughput(&cases, record, old);
        out += &latency(&cases);
        out += &parts(&cases);
        out += "</section>\n";
    }
    out += &figures(record);
    out += &stages(record);
    out += &comparison(record, old);
    out += &facts(record);
    out += &commands(record);
    out + "</body></html>\n"
}

fn paths(record: &Record) -> Vec<&'static str> {
    let mut all: Vec<&str> = Vec::new();
    for case in &record.cases {
        if !all.contains(&case.case.path.name()) {
            all.push(case.case.path.name());
        }
    }
    all
}

/// A case without its path, which stands above.
fn label(case: &Measured) -> String {
    case.name
        .strip_prefix(case.case.path.name())
        .unwrap_or(&case.name)
        .trim_start_matches('-')
        .replace('-', " ")
}

fn key(entries: &[(&str, &str)]) -> String {
    let one = |(class, text): &(&str, &str)| {
        format!(
            "<span class='key'><svg viewBox='0 0 12 12' aria-hidden='true'><rect class='{class}' width='12' height='12'/></svg>{text}</span>"
        )
    };
    entries.iter().map(one).collect()
}

fn earlier(record: &Record, old: Option<&Record>, case: &Measured) -> Option<Summary> {
    Some(Summary::of(&record.before(old?, case)?.ours))
}

fn throughput(cases: &[&Measured], record: &Record, old: Option<&Record>) -> String {
    let group = |large: bool| -> Vec<Group> {
        let of = cases.iter().filter(|c| (c.case.bs.0 >= 65_536) == large);
        of.map(|case| {
            let scale = if large { case.case.bs.0 as f64 } else { 1.0 };
            let unit = if large { "B/s" } else { "/s" };
            let bar = |class, spread: Spread| Bar {
                class,
                values: vec![("", spread.median * scale)],
                range: Some((spread.min * scale, spread.max * scale)),
                mark: None,
                text: format!("{}{unit}", short(spread.median * scale)),
            };
            let mut bars = vec![bar("ours", case.summary.iops)];
            bars[0].mark = case.roofline_iops().filter(|_| case.case.path.pool()).map(|r| r * scale);
            if !case.other.is_empty() {
                bars.push(bar("other", Spread::of(case.other.iter().map(|s| s.iops))));
            }
            bars.extend(earlier(record, old, case).map(|s| bar("old", s.iops)));
            Group { label: label(case), bars }
        })
        .collect()
    };
    let mut entries = vec![("ours", "this run")];
    if record.other.is_some() {
        entries.push(("other", "the other target"));
    }
    if old.is_some() {
        entries.push(("old", "the earlier run"));
    }
    if cases.iter().any(|c| c.case.path.pool() && !c.parts.is_empty()) {
        entries.push(("p999", "line: what hash, codec and ciphers alone allow"));
    }
    let mut out = String::new();
    for (large, title) in [(false, "I/Os a second, small blocks"), (true, "Bytes a second, large blocks")] {
        let groups = group(large);
        if !groups.is_empty() {
            out += &format!(
                "<figure><figcaption>{title}. {}</figcaption>{}</figure>\n",
                key(&entries),
                bars(title, &groups)
            );
        }
    }
    out
}

fn latency(cases: &[&Measured]) -> String {
    let point = |s: Spread| (s.min, s.median, s.max);
    let rows: Vec<Points> = cases
        .iter()
        .map(|c| Points {
            label: label(c),
            points: vec![
                ("p50", point(c.summary.p50_us)),
                ("p99", point(c.summary.p99_us)),
                ("p999", point(c.summary.p99_9_us)),
            ],
        })
        .collect();
    let key = key(&[("p50", "median"), ("p99", "99%"), ("p999", "99.9%")]);
    format!(
        "<figure><figcaption>Latency at that load, logarithmic. {key}</figcaption>{}</figure>\n",
        latencies("Latency percentiles", &rows)
    )
}

/// Time of the parts per gigabyte, and what the target really spends.
fn parts(cases: &[&Measured]) -> String {
    let known = cases.iter().filter(|c| !c.parts.is_empty() && c.summary.core_s_per_gb.rounds > 0);
    let class = |name: &str| PARTS.iter().find(|p| name.starts_with(p.0)).map_or("c0", |p| p.1);
    let groups: Vec<Group> = known
        .map(|c| {
            let cost = c.summary.core_s_per_gb;
            let stack: Vec<(&'static str, f64)> =
                c.parts.iter().map(|p| (class(&p.name), p.core_s_per_gb)).collect();
            let sum: f64 = stack.iter().map(|s| s.1).sum();
            let bar = |class, values, range, text| Bar { class, values, range, mark: None, text };
            Group {
                label: label(c),
                bars: vec![
                    bar("c4", stack, None, format!("{} s/GB", short(sum))),
                    bar(
                        "ours",
                        vec![("", cost.median)],
                        Some((cost.min, cost.max)),
                        format!("{} s/GB", short(cost.median)),
                    ),
                ],
            }
        })
        .collect();
    if groups.is_empty() {
        return String::new();
    }
    let key = key(&[
        ("c4", "zstd"),
        ("c2", "BLAKE3"),
        ("c3", "AES-GCM"),
        ("c1", "AES-XTS"),
        ("c5", "copy"),
        ("ours", "the target, all of it"),
    ]);
    format!(
        "<figure><figcaption>Core-seconds per 10<sup>9</sup> bytes: the bare parts (<code>primitives</code> of this run), and what the \
         target's reactors spent. {key}</figcaption>{}</figure>\n",
        bars("Core-seconds per gigabyte", &groups)
    )
}

fn spread(s: Spread, digits: usize) -> String {
    if s.rounds == 0 {
        return "-".into();
    }
    format!("{:.digits$} <span class='dim'>({:.digits$} to {:.digits$})</span>", s.median, s.min, s.max)
}

fn rows(head: &[&str], body: impl Iterator<Item = Vec<String>>) -> String {
    let cells = |row: Vec<String>| {
        format!("<tr>{}</tr>\n", row.iter().map(|c| format!("<td>{c}</td>")).collect::<String>())
    };
    let head: String = head.iter().map(|h| format!("<th scope='col'>{h}</th>")).collect();
    let body: String = body.map(cells).collect();
    format!(
        "<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )
}

fn figures(record: &Record) -> String {
    let head = [
        "case",
        "IOPS",
        "MB/s",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "core us per I/O",
        "core s per GB",
        "of the parts",
    ];
    let body = record.cases.iter().map(|c| {
        let s = &c.summary;
        let roof = c.roofline_iops().map_or("-".to_owned(), |r| format!("{:.0}%", 100.0 * s.iops.median / r));
        vec![
            escape(&c.name),
            spread(s.iops, 0),
            format!("{:.0}", c.bytes_s(s.iops.median) / 1e6),
            spread(s.p50_us, 1),
            spread(s.p99_us, 1),
            spread(s.p99_9_us, 1),
            spread(s.core_us_per_io, 2),
            spread(s.core_s_per_gb, 3),
            roof,
        ]
    });
    format!(
        "<section><h2>Figures</h2>\n{}<p class='dim'>Core time is the busy time of the target's reactors \
         (<code>framework_get_reactors</code>) through the I/Os that its device counted, warm-up included. \"Of the parts\" is \
         the rate through that of the bare parts on as many cores, without network.</p></section>\n",
        rows(&head, body)
    )
}

/// Where the target's I/O spends its time.
fn stages(record: &Record) -> String {
    let us = |ns: u64| format!("{:.1}", ns as f64 / 1000.0);
    let mut out = String::new();
    for case in record.cases.iter().filter(|c| !c.stages.is_empty()) {
        let commands = case.stages.iter().find(|s| s.name == "device").map_or(0, |s| s.count) as f64;
        let body = case.stages.iter().map(|s| {
            let each = s.count as f64 * s.mean_ns as f64 / 1000.0 / commands.max(1.0);
            let name = format!("{} <span class='dim'>{}</span>", escape(&s.name), escape(&s.what));
            vec![
                name,
                s.count.to_string(),
                us(s.mean_ns),
                us(s.p50_ns),
                us(s.p99_ns),
                us(s.max_ns),
                format!("{each:.1}"),
            ]
        });
        let head = ["stage", "times", "mean us", "p50 us", "p99 us", "longest us", "us per command"];
        out += &format!("<h3>{}</h3>\n{}", escape(&case.name), rows(&head, body));
    }
    if out.is_empty() {
        return out;
    }
    format!(
        "<section><h2>Stages</h2>\n<p class='dim'>Of one more pass with <code>cryptfold_trace</code> on. Stages lie inside each \
         other: <code>device</code> holds all below the target, waiting included.</p>\n{out}</section>\n"
    )
}

fn verdict(v: Option<Verdict>, more_is_better: bool) -> String {
    let Some(v) = v else { return "-".into() };
    let class = match (v.significant, (v.ratio > 1.0) == more_is_better) {
        (true, true) => "good",
        (true, false) => "bad",
        (false, _) => "dim",
    };
    format!("<span class='{class}'>{}</span>", escape(&v.text()))
}

fn comparison(record: &Record, old: Option<&Record>) -> String {
    let mut out = String::new();
    if record.cases.iter().any(|c| !c.other.is_empty()) {
        let body = record.cases.iter().filter(|c| !c.other.is_empty()).map(|c| {
            let theirs = Summary::of(&c.other);
            vec![
                escape(&c.name),
                spread(c.summary.iops, 0),
                spread(theirs.iops, 0),
                verdict(paired(&c.ours, &c.other, |s| s.iops), true),
                verdict(paired(&c.ours, &c.other, |s| s.p99_us), false),
                spread(theirs.core_us_per_io, 2),
            ]
        });
        let head =
            ["case", "IOPS", "the other's", "rate through its", "p99 through its", "its core us per I/O"];
        out += &format!(
            "<section><h2>Beside {}</h2>\n{}<p class='dim'>Measured by turns; the ratios are medians of those within a round. \
             Beyond the spread: in every round on the same side.</p></section>\n",
            escape(record.other.as_deref().unwrap_or("the other target")),
            rows(&head, body)
        );
    }
    if let Some(old) = old {
        let body = record.cases.iter().filter_map(|c| {
            let before = earlier(record, Some(old), c)?;
            let s = &c.summary;
            Some(vec![
                escape(&c.name),
                spread(before.iops, 0),
                spread(s.iops, 0),
                verdict(apart(&s.iops, &before.iops), true),
                verdict(apart(&s.p99_us, &before.p99_us), false),
                verdict(apart(&s.core_us_per_io, &before.core_us_per_io), false),
            ])
        });
        let head = ["case", "IOPS then", "IOPS now", "rate", "p99", "core time per I/O"];
        out += &format!(
            "<section><h2>Since {} UTC ({} at {})</h2>\n{}<p class='dim'>Beyond the spread: the ranges of the rounds do not \
             overlap. By noise: how often they would not if nothing but the rounds' noise differed; what differs between two runs \
             for all of their rounds (neighbours on the host, temperature) is not in it.</p></section>\n",
            date(old.started_s),
            escape(&old.machine.target),
            escape(&old.machine.commit),
            rows(&head, body)
        );
    }
    out
}

fn facts(record: &Record) -> String {
    let m = &record.machine;
    let guest = if m.virtual_machine { ", a virtual machine" } else { "" };
    let facts = [
        ("processor", format!("{}, {} CPUs{guest}", m.cpu, m.cpus)),
        ("CPUs of this run", record.cpus.text()),
        ("instruction sets", m.features.join(" ")),
        ("memory", format!("{}B", short(m.memory_bytes as f64))),
        ("kernel", format!("Linux {}", m.kernel)),
        ("frequency governor", m.governor.clone()),
        ("network", if m.nics.is_empty() { "loopback only".into() } else { m.nics.join(", ") }),
        ("target", m.target.clone()),
        ("cryptfold-perf", format!("{}, commit {}", m.version, m.commit)),
        ("load average", format!("{:.2} before, {:.2} after", m.load_before, m.load_after)),
        ("time", format!("{:.0} s", record.took_s)),
    ];
    let body: String =
        facts.iter().map(|(k, v)| format!("<tr><td>{k}</td><td>{}</td></tr>\n", escape(v))).collect();
    let left: String = record
        .left_out
        .iter()
        .map(|l| format!("<tr><td>{}</td><td>left out: {}</td></tr>\n", escape(&l.name), escape(&l.why)))
        .collect();
    format!("<section><h2>Machine</h2>\n<table class='facts'><tbody>{body}{left}</tbody></table></section>\n")
}

fn commands(record: &Record) -> String {
    let mut out = format!("<section><h2>Commands</h2>\n<pre>{}</pre>\n", escape(&record.command));
    let mut shown: &[String] = &[];
    for case in &record.cases {
        // Cases that one target served share its set-up.
        if case.setup != shown {
            out += &format!(
                "<p>{}</p><pre>{}</pre>\n",
                escape(&format!("{} and those that follow:", case.name)),
                escape(&case.setup.join("\n"))
            );
            shown = &case.setup;
        }
        out += &format!("<pre>{}</pre>\n", escape(&case.command));
    }
    out + "</section>\n"
}

/// `2026-11-23 05:30`, of seconds since 1970.
fn date(seconds: u64) -> String {
    let at = i64::try_from(seconds).ok().and_then(|s| time::OffsetDateTime::from_unix_timestamp(s).ok());
    at.map_or_else(
        || "an unknown time".into(),
        |t| {
            format!(
                "{}-{:02}-{:02} {:02}:{:02}",
                t.year(),
                u8::from(t.month()),
                t.day(),
                t.hour(),
                t.minute()
            )
        },
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00"),
            (951_782_400, "2000-02-29 00:00"),
            (1_795_411_800, "2026-11-23 05:30"),
            (u64::MAX, "an unknown time"),
        ] {
            assert_eq!(super::date(seconds), text);
        }
    }
}
