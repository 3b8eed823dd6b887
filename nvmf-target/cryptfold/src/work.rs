//! What takes its time: on a terminal a line says so from the first second on; `--wait` follows work in the background to its
//! end; reports of such work for people.

use std::io::IsTerminal as _;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use cryptfold_control::client::Client;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::rpc::{call, print};
use crate::status::list;
use crate::{Failure, size};

/// A command that answers sooner shows nothing but its answer.
const SOON: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(125);
/// How often work in the background is asked how it stands.
const POLL: Duration = Duration::from_millis(250);

/// Does `work`, and shows on a terminal that it goes on.
pub fn patiently<T>(what: &str, work: impl FnOnce() -> T) -> T {
    if !std::io::stderr().is_terminal() {
        return work();
    }
    let (done, waits) = channel::<()>();
    std::thread::scope(|s| {
        s.spawn(move || {
            if waits.recv_timeout(SOON) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            let bar = ProgressBar::new_spinner().with_message(what.to_owned());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}: {elapsed}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(TICK);
            // Ends when the sender goes.
            let _ = waits.recv();
            bar.finish_and_clear();
        });
        let out = work();
        drop(done);
        out
    })
}

/// How far work is, in bytes or other units.
pub struct Step {
    pub done: u64,
    pub total: u64,
    pub running: bool,
}

/// Asks until the work is not running any more, and shows a bar on a terminal. The last answer.
fn follow(
    bytes: bool,
    mut ask: impl FnMut() -> Result<Value, Failure>,
    step: impl Fn(&Value) -> Step,
) -> Result<Value, Failure> {
    let bar = ProgressBar::new(0);
    let template = if bytes {
        "{bar:30} {bytes} of {total_bytes}, {eta} left (Ctrl-C ends the waiting, not the work)"
    } else {
        "{bar:30} {pos} of {len}, {eta} left (Ctrl-C ends the waiting, not the work)"
    };
    bar.set_style(ProgressStyle::with_template(template).map_err(|e| e.to_string())?);
    loop {
        let answer = ask()?;
        let step = step(&answer);
        if !step.running {
            bar.finish_and_clear();
            return Ok(answer);
        }
        bar.set_length(step.total);
        bar.set_position(step.done);
        std::thread::sleep(POLL);
    }
}

/// Work of a pool that goes on in the background.
#[derive(Clone, Copy)]
pub enum Background {
    Scrub,
    Dedupe,
}

impl Background {
    fn method(self) -> &'static str {
        match self {
            Background::Scrub => "cryptfold_pool_scrub",
            Background::Dedupe => "cryptfold_pool_dedupe",
        }
    }

    fn step(self, v: &Value) -> Step {
        let of = |name: &str| v[name].as_u64().unwrap_or(0);
        let (done, total) = match self {
            Background::Scrub => (of("bytes"), of("total_bytes")),
            Background::Dedupe => (of("containers"), of("total_containers")),
        };
        Step { done, total, running: v["state"] == "running" }
    }

    /// A sentence.
    fn text(self, pool: &str, v: &Value) -> String {
        let state = v["state"].as_str().unwrap_or("unknown");
        let of = |name: &str| v[name].as_u64().unwrap_or(0);
        if state == "never" {
            return format!("{pool}: never since the pool was opened");
        }
        match self {
            Background::Scrub => format!(
                "{pool}: {state}, {} of {} verified, {} damaged, at most {:.1} MB/s",
                size::show(of("bytes")),
                size::show(of("total_bytes")),
                of("damaged"),
                of("bytes_per_s") as f64 / 1e6,
            ),
            Background::Dedupe => format!(
                "{pool}: {state}, {} of {} containers compared, {} duplicate chunks found, {} blocks share now",
                of("containers"),
                of("total_containers"),
                of("found"),
                of("blocks"),
            ),
        }
    }
}

/// Starts, stops or asks for `work`, waits for its end if it should, and says how it stands.
pub fn background(
    client: &mut Client,
    work: Background,
    pool: &str,
    params: Value,
    wait: bool,
    as_json: bool,
) -> Result<(), Failure> {
    let mut now = call(client, work.method(), Some(params))?;
    if wait {
        let status = json!({"lvs_name": pool, "action": "status"});
        now = follow(
            matches!(work, Background::Scrub),
            || call(client, work.method(), Some(status.clone())),
            |v| work.step(v),
        )?;
    }
    if as_json {
        print(&now);
    } else {
        println!("{}", work.text(pool, &now));
    }
    if wait && now["state"] == "stopped" {
        return Err(format!("pool {pool}: it was stopped before its end").into());
    }
    match now["damaged"].as_u64() {
        Some(damaged) if wait && damaged > 0 => Err(format!(
            "pool {pool}: {damaged} damaged fragments; exactly their blocks are read errors, and \
             `cryptfold pool check {pool} --data` lists them"
        )
        .into()),
        _ => Ok(()),
    }
}

/// The pool's part of `cryptfold_encryption_status`.
fn encryption(client: &mut Client, pool: &str) -> Result<Value, Failure> {
    let mut status = call(client, "cryptfold_encryption_status", Some(json!({"name": pool})))?;
    Ok(status["pools"][0].take())
}

/// Waits until nothing of a pool lies under older keys.
pub fn wait_for_keys(client: &mut Client, pool: &str) -> Result<(), Failure> {
    let old = |v: &Value| list(&v["domains"]).iter().filter_map(|d| d["old_bytes"].as_u64()).sum::<u64>();
    let total = old(&encryption(client, pool)?);
    let end = follow(
        true,
        || encryption(client, pool),
        |v| {
            let changing = list(&v["domains"]).iter().any(|d| d["changing"] == true);
            let stopped = v["renewal"]["state"] == "stopped";
            Step { done: total.saturating_sub(old(v)), total, running: changing && !stopped }
        },
    )?;
    let Some(domains) = end["domains"].as_array().filter(|_| end["state"] == "unlocked") else {
        return Err(
            format!("pool {pool}: it is not open any more; `cryptfold encryption status` says why").into()
        );
    };
    if domains.iter().any(|d| d["changing"] == true) {
        let reason = end["renewal"]["reason"].as_str().unwrap_or("it was stopped");
        return Err(format!("pool {pool}: {reason}; `cryptfold encryption renew {pool}` goes on").into());
    }
    Ok(())
}

/// What an audit found, for people.
pub fn check_text(v: &Value) -> String {
    let of = |name: &str| v[name].as_u64().unwrap_or(0);
    let mut out = String::new();
    let lines = |out: &mut String, head: &str, all: &Value, count: u64| {
        list(all)
            .iter()
            .for_each(|line| out.push_str(&format!("{head}: {}\n", line.as_str().unwrap_or("?"))));
        let more = count.saturating_sub(list(all).len() as u64);
        if more > 0 {
            out.push_str(&format!("{head}: {more} more\n"));
        }
    };
    lines(&mut out, "repaired", &v["repairs"], of("repair_count"));
    lines(&mut out, "problem", &v["problems"], of("problem_count"));
    let verdict = if v["clean"] == true { "clean" } else { "NOT clean" };
    out.push_str(&format!(
        "{}: {verdict}; {} problems in {} volumes, {} mapped blocks, {} containers, {} fragments ({} of them read and \
         verified), {} metadata nodes; {:.1} s\n",
        v["pool"].as_str().unwrap_or("?"),
        of("problem_count"),
        of("volumes"),
        of("blocks"),
        of("containers"),
        of("fragments"),
        of("verified"),
        of("nodes"),
        v["seconds"].as_f64().unwrap_or(0.0),
    ));
    if of("uncorrectable_blocks") > 0 {
        let lost = of("uncorrectable_blocks");
        out.push_str(&format!("{lost} blocks were lost and are read errors until they are written again\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports() {
        let scrub = json!({"state": "running", "total_bytes": 4096, "bytes": 1024, "damaged": 2, "bytes_per_s": 2500000});
        let text = Background::Scrub.text("p", &scrub);
        assert_eq!(text, "p: running, 1.00 KiB of 4.00 KiB verified, 2 damaged, at most 2.5 MB/s");
        let never = json!({"state": "never"});
        assert!(Background::Dedupe.text("p", &never).contains("never"));
        let step = Background::Scrub.step(&scrub);
        assert!(step.running && step.done == 1024 && step.total == 4096);
        let check = json!({"pool": "p", "clean": false, "problem_count": 3, "problems": ["a", "b"], "repairs": [],
            "uncorrectable_blocks": 7, "seconds": 0.5});
        let text = check_text(&check);
        for part in ["problem: a\n", "problem: 1 more\n", "p: NOT clean; 3 problems", "7 blocks were lost"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("repaired"));
    }

    #[test]
    fn following_ends_with_the_work() {
        let mut answers =
            vec![json!({"state": "done"}), json!({"state": "running"}), json!({"state": "running"})];
        let end = follow(true, || Ok(answers.pop().unwrap_or_default()), |v| Background::Scrub.step(v));
        assert!(end.is_ok_and(|v| v["state"] == "done"));
    }
}
