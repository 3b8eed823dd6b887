//! `cryptfold status`: one table that a person can read, or JSON.

use std::time::Duration;

use clap::Args;
use cryptfold_control::client::Client;
use serde_json::{Value, json};

use crate::rpc::{call, connect, print};
use crate::{Failure, SocketArgs, size};

#[derive(Args)]
pub struct StatusArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// How long reactors are watched for their load.
const SAMPLE: Duration = Duration::from_millis(250);

/// Left-aligned text columns, right-aligned others.
pub struct Table {
    rows: Vec<Vec<String>>,
    right: &'static [bool],
}

impl Table {
    pub fn new(heads: &[&str], right: &'static [bool]) -> Table {
        Table { rows: vec![heads.iter().map(|h| h.to_string()).collect()], right }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub fn render(&self) -> String {
        let columns = self.rows[0].len();
        let width = |c: usize| self.rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for row in &self.rows {
            let cell = |(c, text): (usize, &String)| {
                let w = widths[c];
                if self.right[c] { format!("{text:>w$}") } else { format!("{text:<w$}") }
            };
            let line: Vec<String> = row.iter().enumerate().map(cell).collect();
            out.push_str(line.join("  ").trim_end());
            out.push('\n');
        }
        out
    }

    /// Rows below the heads.
    pub fn len(&self) -> usize {
        self.rows.len() - 1
    }

    /// Nothing but heads.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Prints it; a table without rows says so.
    pub fn print(&self) {
        if self.is_empty() {
            println!("none");
        } else {
            print!("{}", self.render());
        }
    }
}

pub fn text(v: &Value) -> String {
    match v {
        Value::String(s) => s.clone(),
        Value::Null => "-".into(),
        v => v.to_string(),
    }
}

pub fn bytes(v: &Value) -> String {
    v.as_u64().map_or_else(|| "-".into(), size::show)
}

fn ratio(v: &Value) -> String {
    v.as_f64().map_or_else(|| "-".into(), |r| format!("{r:.2}:1"))
}

pub fn list(v: &Value) -> &[Value] {
    v.as_array().map_or(&[], Vec::as_slice)
}

pub fn pools(v: &Value) -> Table {
    let heads = ["POOL", "DEVICE", "SIZE", "LOGICAL", "STORED", "METADATA", "FREE", "RATIO", "WITHOUT ZEROS"];
    let mut t = Table::new(&heads, &[false, false, true, true, true, true, true, true, true]);
    for p in list(v) {
        t.row(vec![
            text(&p["name"]),
            text(&p["base_bdev"]),
            bytes(&p["size_bytes"]),
            bytes(&p["logical_bytes"]),
            bytes(&p["stored_bytes"]),
            bytes(&p["metadata_bytes"]),
            bytes(&p["free_bytes"]),
            ratio(&p["ratio"]),
            ratio(&p["ratio_without_zeroes"]),
        ]);
    }
    t
}

pub fn volumes(v: &Value) -> Table {
    let heads = ["VOLUME", "UUID", "SIZE", "LOGICAL", "GIVES BACK", "GOES ON FROM", "DOMAIN"];
    let mut t = Table::new(&heads, &[false, false, true, true, true, false, false]);
    for l in list(v) {
        t.row(vec![
            text(&l["alias"]),
            text(&l["uuid"]),
            bytes(&l["size_bytes"]),
            bytes(&l["logical_bytes"]),
            bytes(&l["reclaimable_bytes"]),
            l["base_snapshot"].as_str().unwrap_or("-").to_owned(),
            text(&l["domain"]),
        ]);
    }
    t
}

fn subsystems(v: &Value, volumes: &Value) -> Table {
    let heads = ["SUBSYSTEM", "NAMESPACES", "LISTENS ON", "CONTROLLERS", "HOSTS"];
    let mut t = Table::new(&heads, &[false, false, false, true, false]);
    let join = |v: &Value, f: &dyn Fn(&Value) -> String| -> String {
        let all: Vec<String> = list(v).iter().map(f).collect();
        if all.is_empty() { "-".into() } else { all.join(", ") }
    };
    // A volume's device is named by its UUID; people know it by its alias.
    let device = |name: &Value| {
        let volume = list(volumes).iter().find(|l| l["uuid"] == *name);
        text(volume.map_or(name, |l| &l["alias"]))
    };
    for s in list(v).iter().filter(|s| s["subtype"] != "Discovery") {
        let hosts =
            if s["allow_any_host"] == true { "any".into() } else { join(&s["hosts"], &|h| text(&h["nqn"])) };
        t.row(vec![
            text(&s["nqn"]),
            join(&s["namespaces"], &|n| format!("{}={}", n["nsid"], device(&n["bdev_name"]))),
            join(&s["listen_addresses"], &|a| format!("{}:{}", text(&a["traddr"]), text(&a["trsvcid"]))),
            list(&s["controllers"]).len().to_string(),
            hosts,
        ]);
    }
    t
}

fn reactors(v: &Value) -> Table {
    let mut t = Table::new(&["REACTOR", "CPU", "BUSY"], &[false, true, true]);
    for r in list(v) {
        t.row(vec![
            text(&r["name"]),
            text(&r["lcore"]),
            format!("{:.1} %", r["busy_pct"].as_f64().unwrap_or(0.0)),
        ]);
    }
    t
}

/// Load of each reactor over a short while.
fn load(client: &mut Client) -> Result<Value, Failure> {
    let before = call(client, "framework_get_reactors", None)?;
    std::thread::sleep(SAMPLE);
    let after = call(client, "framework_get_reactors", None)?;
    let pairs = list(&before["reactors"]).iter().zip(list(&after["reactors"]));
    Ok(pairs
        .map(|(b, a)| {
            let grown = |k: &str| a[k].as_u64().unwrap_or(0).saturating_sub(b[k].as_u64().unwrap_or(0)) as f64;
            let (busy, idle) = (grown("busy"), grown("idle"));
            let pct = if busy + idle > 0.0 { 100.0 * busy / (busy + idle) } else { 0.0 };
            json!({"name": a["lw_threads"][0]["name"], "lcore": a["lcore"], "busy_pct": (pct * 10.0).round() / 10.0})
        })
        .collect())
}

pub fn run(args: StatusArgs) -> Result<(), Failure> {
    let mut client = connect(&args.socket)?;
    let mut subs = call(&mut client, "nvmf_get_subsystems", None)?;
    for s in subs.as_array_mut().into_iter().flatten() {
        let nqn = json!({"nqn": s["nqn"]});
        s["controllers"] = call(&mut client, "nvmf_subsystem_get_controllers", Some(nqn))?;
    }
    let version = call(&mut client, "spdk_get_version", None)?;
    let all = json!({
        "version": version["cryptfold"],
        "pools": call(&mut client, "bdev_lvol_get_lvstores", None)?,
        "volumes": call(&mut client, "bdev_lvol_get_lvols", None)?,
        "subsystems": subs,
        "reactors": load(&mut client)?,
    });
    if args.json {
        print(&all);
        return Ok(());
    }
    let sections = [
        pools(&all["pools"]),
        volumes(&all["volumes"]),
        subsystems(&all["subsystems"], &all["volumes"]),
        reactors(&all["reactors"]),
    ];
    let mut first = true;
    for t in sections.iter().filter(|t| !t.is_empty()) {
        if !std::mem::take(&mut first) {
            println!();
        }
        t.print();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let t = pools(
            &json!([{"name": "p0", "base_bdev": "disk", "size_bytes": 1073741824, "logical_bytes": 4096,
            "stored_bytes": 1024, "ratio": 4.0, "free_bytes": 1000}]),
        );
        let lines: Vec<String> = t.render().lines().map(str::to_string).collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[1].contains("1.00 GiB") && lines[1].contains("4.00:1"), "{}", lines[1]);
        let at = lines[0].find("RATIO").unwrap() + 5;
        assert!(lines[1][..at].ends_with("4.00:1"), "{lines:?}");
    }
}
