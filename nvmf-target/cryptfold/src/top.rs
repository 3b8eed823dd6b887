//! `cryptfold top`: what a running target does, now, in a terminal.
//!
//! Asks the socket once per interval for what the web page shows, too. `--once` prints one screen as text.

use std::collections::VecDeque;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use clap::Args;
use cryptfold_control::client::Client;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Style, Stylize as _};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Block, Paragraph, Sparkline};
use ratatui::{Frame, Terminal};
use serde_json::Value;

use crate::rpc::{call, connect};
use crate::status::{self, Table, list};
use crate::{Failure, SocketArgs, size};

#[derive(Args)]
pub struct TopArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// Seconds between two looks.
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Print one screen as text, and end.
    #[arg(long)]
    once: bool,
}

/// Looks that the history shows at most.
const HISTORY: usize = 512;
/// Size of the screen that `--once` prints.
const TEXT_SCREEN: (u16, u16) = (120, 40);

/// Hosts and events that are shown at most: the rest of the screen is for devices.
const HOSTS: usize = 6;
const EVENTS: usize = 6;

/// What the target says of itself: the same that its web page shows.
fn overview(client: &mut Client) -> Result<Value, Failure> {
    call(client, "cryptfold_get_overview", None)
}

/// Everything a screen shows.
struct Screen {
    now: Value,
    /// Bytes per second that hosts read and wrote, the newest last.
    read: VecDeque<u64>,
    write: VecDeque<u64>,
    paused: bool,
    by_name: bool,
}

fn figure(v: &Value) -> f64 {
    v.as_f64().unwrap_or(0.0)
}

fn per_second(v: &Value) -> String {
    v.as_f64().map_or_else(|| "-".into(), |n| format!("{n:.0}"))
}

fn throughput(v: &Value) -> String {
    v.as_f64().map_or_else(|| "-".into(), |n| format!("{}/s", size::show(n as u64)))
}

/// Seconds, with three digits or so.
fn latency(v: &Value) -> String {
    match v.as_f64() {
        None => "-".into(),
        Some(s) if s < 9.995e-3 => format!("{:.0} us", s * 1e6),
        Some(s) if s < 0.9995 => format!("{:.0} ms", s * 1e3),
        Some(s) => format!("{s:.1} s"),
    }
}

impl Screen {
    fn new(now: Value) -> Screen {
        let (read, write) = (VecDeque::new(), VecDeque::new());
        Screen { now, read, write, paused: false, by_name: false }
    }

    fn advance(&mut self, next: Value) {
        // The target may give the look out again that it gave before.
        if next["time"] == self.now["time"] {
            return;
        }
        let bytes = |what: &str| figure(&next["totals"][what]["bytes_per_second"]) as u64;
        for (history, value) in [(&mut self.read, bytes("read")), (&mut self.write, bytes("write"))] {
            history.push_back(value);
            while history.len() > HISTORY {
                history.pop_front();
            }
        }
        self.now = next;
    }

    fn head(&self) -> Line<'static> {
        let hosts = list(&self.now["hosts"]);
        let queues: u64 = hosts.iter().filter_map(|h| h["queues"].as_u64()).sum();
        let (version, state) = (status::text(&self.now["version"]), status::text(&self.now["state"]));
        let paused = if self.paused { "   PAUSED" } else { "" };
        let (hosts, paused) = (hosts.len(), format!("{queues} I/O queues{paused}"));
        Line::from(format!("cryptfold {version}   {state}   {hosts} controllers, {paused}")).bold()
    }

    /// What hosts see: operations, and how long they took.
    fn latencies(&self) -> Vec<Line<'static>> {
        let one = |what: &str| {
            let t = &self.now["totals"][what];
            let [p50, p99, p999] = ["p50", "p99", "p999"].map(|p| latency(&t[p]));
            let iops = per_second(&t["iops"]);
            Line::from(format!("hosts {what:<5} {iops:>9}/s   p50 {p50:>7}   p99 {p99:>7}   p99.9 {p999:>7}"))
        };
        vec![one("read"), one("write")]
    }

    /// Volumes and other devices, the busiest first.
    fn devices(&self) -> Table {
        let heads = [
            "DEVICE",
            "READ/S",
            "WRITE/S",
            "READ",
            "WRITE",
            "READ P50",
            "P99",
            "WRITE P50",
            "P99",
            "ERRORS",
            "HOSTS",
        ];
        let right = &[false, true, true, true, true, true, true, true, true, true, false];
        let mut t = Table::new(&heads, right);
        let volume = |v: &Value| format!("{}/{}", status::text(&v["pool"]), status::text(&v["name"]));
        let volumes = list(&self.now["volumes"]).iter().map(|v| (volume(v), v));
        let devices = list(&self.now["devices"]).iter().map(|d| (status::text(&d["name"]), d));
        let mut all: Vec<(String, &Value)> = volumes.chain(devices).collect();
        let load =
            |d: &Value| figure(&d["read"]["bytes_per_second"]) + figure(&d["write"]["bytes_per_second"]);
        all.sort_by(|a, b| a.0.cmp(&b.0));
        if !self.by_name {
            all.sort_by(|a, b| load(b.1).total_cmp(&load(a.1)));
        }
        for (name, d) in all {
            let (read, write) = (&d["read"], &d["write"]);
            t.row(vec![
                name,
                per_second(&read["iops"]),
                per_second(&write["iops"]),
                throughput(&read["bytes_per_second"]),
                throughput(&write["bytes_per_second"]),
                latency(&read["p50"]),
                latency(&read["p99"]),
                latency(&write["p50"]),
                latency(&write["p99"]),
                d["errors"].as_u64().filter(|n| *n > 0).map_or_else(String::new, |n| n.to_string()),
                if list(&d["exported"]).is_empty() { String::new() } else { "yes".into() },
            ]);
        }
        t
    }

    /// The busiest hosts.
    fn hosts(&self) -> Table {
        let heads = ["ADDRESS", "QUEUES", "READ/S", "WRITE/S", "READ", "WRITE", "PROVEN", "TLS", "HOST"];
        let mut t = Table::new(&heads, &[false, true, true, true, true, true, false, false, false]);
        let mut all: Vec<&Value> = list(&self.now["hosts"]).iter().collect();
        let load = |h: &Value| figure(&h["read"]["iops"]) + figure(&h["write"]["iops"]);
        all.sort_by(|a, b| load(b).total_cmp(&load(a)));
        let word = |v: &Value| if *v == true { "yes".to_owned() } else { "no".to_owned() };
        for h in all.into_iter().take(HOSTS) {
            t.row(vec![
                status::text(&h["address"]),
                status::text(&h["queues"]),
                per_second(&h["read"]["iops"]),
                per_second(&h["write"]["iops"]),
                throughput(&h["read"]["bytes_per_second"]),
                throughput(&h["write"]["bytes_per_second"]),
                word(&h["authenticated"]),
                word(&h["tls"]),
                // The longest one, where nothing is behind it.
                status::text(&h["nqn"]),
            ]);
        }
        t
    }

    /// What runs in the background, what is wrong, and how keys are.
    fn notes(&self) -> Vec<Line<'static>> {
        let problems = list(&self.now["problems"]).iter();
        let mut lines: Vec<Line> =
            problems.map(|p| Line::from(format!("PROBLEM: {}", status::text(p))).red()).collect();
        for w in list(&self.now["work"]).iter().filter(|w| w["state"] != "done") {
            let mut line = format!("{}: {}", status::text(&w["on"]), status::text(&w["what"]));
            if w["state"] != "running" {
                line.push_str(&format!(" {}", status::text(&w["state"])));
            }
            if let Some(done) = w["done"].as_f64() {
                line.push_str(&format!(" {:.0} %", done * 100.0));
            }
            if w["rate_bytes_per_second"].is_number() {
                line.push_str(&format!(", {}", throughput(&w["rate_bytes_per_second"])));
            }
            if let Some(eta) = w["eta_seconds"].as_f64() {
                line.push_str(&format!(", {:.0} min left", (eta / 60.0).ceil()));
            }
            if let Some(why) = w["why"].as_str() {
                line.push_str(&format!(": {why}"));
            }
            lines.push(Line::from(line));
        }
        for k in list(&self.now["keys"]) {
            let why = k["why"].as_str().map_or_else(String::new, |why| format!(": {why}"));
            let (name, access) = (status::text(&k["name"]), status::text(&k["access"]));
            lines.push(Line::from(format!("key {name}: {access}, {}{why}", status::text(&k["state"]))));
        }
        for s in list(&self.now["key_servers"]).iter().filter(|s| s["state"] == "unreachable") {
            let (name, why) = (status::text(&s["name"]), status::text(&s["why"]));
            lines.push(Line::from(format!("key server {name} does not answer: {why}")).yellow());
        }
        lines
    }

    fn events(&self) -> Vec<Line<'static>> {
        let now = figure(&self.now["time"]);
        let one = |e: &Value| {
            let ago = (now - figure(&e["time"])).max(0.0);
            let line = Line::from(format!("{:>8}  {}", since(ago), status::text(&e["text"])));
            match e["severity"].as_str() {
                Some("error") => line.red(),
                Some("warning") => line.yellow(),
                _ => line.dim(),
            }
        };
        list(&self.now["events"]).iter().take(EVENTS).map(one).collect()
    }

    fn draw(&self, frame: &mut Frame) {
        let pools = status::pools(&self.now["pools"]);
        let (latencies, notes, hosts, events) = (self.latencies(), self.notes(), self.hosts(), self.events());
        let bars: Vec<Line> = list(&self.now["reactors"])
            .iter()
            .map(|r| bar(&status::text(&r["name"]), figure(&r["busy"])))
            .collect();
        let rows = |n: usize| Constraint::Length(u16::try_from(n).unwrap_or(u16::MAX));
        let table_rows = |t: &Table| rows(if t.is_empty() { 0 } else { t.len() + 2 });
        let parts = Layout::vertical([
            rows(1),
            rows(6),
            rows(latencies.len()),
            rows(bars.len() + 1),
            table_rows(&pools),
            rows(notes.len()),
            Constraint::Min(3),
            table_rows(&hosts),
            rows(events.len()),
            rows(1),
        ]);
        let [
            head,
            history,
            latency_area,
            reactors,
            pool_area,
            note_area,
            devices,
            host_area,
            event_area,
            foot,
        ] = parts.areas(frame.area());
        frame.render_widget(self.head(), head);
        let [read, write] = Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).areas(history);
        sparkline(frame, read, "hosts read", &self.read, Style::new().cyan());
        sparkline(frame, write, "hosts write", &self.write, Style::new().magenta());
        for (t, area) in [(&pools, pool_area), (&hosts, host_area)] {
            if !t.is_empty() {
                frame.render_widget(Paragraph::new(table(t)), area);
            }
        }
        for (lines, area) in
            [(latencies, latency_area), (bars, reactors), (notes, note_area), (events, event_area)]
        {
            frame.render_widget(Paragraph::new(lines), area);
        }
        frame.render_widget(Paragraph::new(table(&self.devices())), devices);
        let order = if self.by_name { "name" } else { "activity" };
        frame.render_widget(Line::from(format!("q quit   p pause   s order: {order}")).dim(), foot);
    }
}

/// How long ago, in few characters.
fn since(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s if s < 360_000.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} d", s / 86400.0),
    }
}

/// A table whose heads stand out.
fn table(t: &Table) -> Text<'static> {
    let mut lines = t.render().lines().map(|l| Line::from(l.to_owned())).collect::<Vec<_>>();
    if let Some(heads) = lines.first_mut() {
        *heads = heads.clone().bold().reversed();
    }
    Text::from(lines)
}

/// Twenty cells of a reactor's busy time.
fn bar(name: &str, share: f64) -> Line<'static> {
    const CELLS: usize = 20;
    let full = ((share * CELLS as f64).round() as usize).min(CELLS);
    let style = if share > 0.9 { Style::new().yellow() } else { Style::new().green() };
    Line::from(vec![
        format!("{name:<12} ").into(),
        ratatui::text::Span::styled("|".repeat(full), style),
        format!("{} {:5.1} % busy", ".".repeat(CELLS - full), share * 100.0).into(),
    ])
}

fn sparkline(frame: &mut Frame, area: Rect, name: &str, history: &VecDeque<u64>, style: Style) {
    // The newest that fit between the borders.
    let width = usize::from(area.width.saturating_sub(2));
    let data: Vec<u64> = history.iter().skip(history.len().saturating_sub(width)).copied().collect();
    let (last, most) = (data.last().copied().unwrap_or(0), data.iter().copied().max().unwrap_or(0));
    let title = format!("{name} {}/s (most {}/s)", size::show(last), size::show(most));
    let block = Block::bordered().title(title);
    frame.render_widget(Sparkline::default().block(block).data(&data).style(style), area);
}

/// One screen as lines without trailing blanks.
fn as_text(screen: &Screen) -> Result<String, Failure> {
    let (width, height) = TEXT_SCREEN;
    let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height));
    let Ok(_) = terminal.draw(|frame| screen.draw(frame));
    let cells = terminal.backend().buffer().content();
    let lines: Vec<String> = cells
        .chunks(usize::from(width))
        .map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>().trim_end().to_owned())
        .collect();
    Ok(lines.join("\n"))
}

pub fn run(args: TopArgs) -> Result<(), Failure> {
    let mut client = connect(&args.socket)?;
    let interval = Duration::from_secs(args.interval);
    let mut screen = Screen::new(overview(&mut client)?);
    if args.once {
        std::thread::sleep(interval);
        screen.advance(overview(&mut client)?);
        println!("{}", as_text(&screen)?.trim_end());
        return Ok(());
    }
    if !std::io::stdout().is_terminal() {
        let what =
            "standard output is no terminal; top --once prints one screen, status --json is for scripts";
        return Err(Failure::Usage(what.into()));
    }
    let mut terminal = ratatui::init();
    let ended = watch(&mut terminal, &mut client, &mut screen, interval);
    ratatui::restore();
    ended
}

fn watch(
    terminal: &mut ratatui::DefaultTerminal,
    client: &mut Client,
    screen: &mut Screen,
    interval: Duration,
) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::Failed(format!("terminal: {e}"));
    let mut next = Instant::now() + interval;
    loop {
        terminal.draw(|frame| screen.draw(frame)).map_err(failed)?;
        while event::poll(next.saturating_duration_since(Instant::now())).map_err(failed)? {
            match event::read().map_err(failed)? {
                Event::Key(key) if key.kind == KeyEventKind::Press => match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                    KeyCode::Char('p') => screen.paused = !screen.paused,
                    KeyCode::Char('s') => screen.by_name = !screen.by_name,
                    _ => continue,
                },
                Event::Resize(..) => {}
                _ => continue,
            }
            terminal.draw(|frame| screen.draw(frame)).map_err(failed)?;
        }
        next = Instant::now() + interval;
        if !screen.paused {
            screen.advance(overview(client)?);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn overview(reads: f64) -> Value {
        let done = json!({"iops": reads, "bytes_per_second": reads * 4096.0, "p50": 0.00005, "p99": 0.012, "p999": 1.5});
        let idle = json!({"iops": 0.0, "bytes_per_second": 0.0, "p50": null, "p99": null, "p999": null});
        json!({
            "time": 1000.0, "version": "1.2.3", "state": "running", "problems": ["pool q: no key"],
            "totals": {"read": done, "write": idle},
            "pools": [{"name": "p", "base_bdev": "disk", "size_bytes": 1 << 30, "ratio": 4.0}],
            "volumes": [{"name": "v", "pool": "p", "exported": ["nqn/1"], "read": done, "write": idle}],
            "devices": [{"name": "disk", "read": idle, "write": idle, "errors": 2}],
            "hosts": [{"nqn": "nqn.h", "address": "192.0.2.1:5", "queues": 3, "read": done, "write": idle,
                       "authenticated": true, "tls": false}],
            "reactors": [{"name": "reactor_0", "core": 0, "busy": 0.75}],
            "work": [{"what": "scrub", "on": "p", "state": "running", "done": 0.12, "rate_bytes_per_second": 1048576.0,
                      "eta_seconds": 61.0, "why": null},
                     {"what": "late deduplication", "on": "p", "state": "done", "done": 1.0}],
            "keys": [{"name": "k", "state": "active", "access": "open", "why": null}],
            "key_servers": [{"name": "s", "state": "unreachable", "why": "refused"}],
            "events": [{"time": 995.0, "severity": "warning", "text": "access refused"}],
        })
    }

    #[test]
    fn a_screen_shows_what_the_target_says() {
        let mut before = overview(0.0);
        before["time"] = json!(999.0);
        let mut screen = Screen::new(before);
        // A look that is given out again is no second one.
        screen.advance(overview(100.0));
        screen.advance(overview(100.0));
        assert_eq!(screen.read.len(), 1);
        assert_eq!((screen.read.back(), screen.write.back()), (Some(&409_600), Some(&0)));
        let text = as_text(&screen).ok().unwrap();
        for words in [
            "1.2.3   running   1 controllers, 3 I/O queues",
            "hosts read        100/s   p50   50 us   p99   12 ms   p99.9   1.5 s",
            "75.0 % busy",
            "4.00:1",
            "PROBLEM: pool q: no key",
            "p: scrub 12 %, 1.00 MiB/s, 2 min left",
            "key k: open, active",
            "key server s does not answer: refused",
            "yes     no   nqn.h",
            "400 KiB/s",
            "5 s  access refused",
        ] {
            assert!(text.contains(words), "no \"{words}\" in\n{text}");
        }
        assert!(!text.contains("late deduplication"), "that is over:\n{text}");
        let at = |word: &str| text.find(word).unwrap();
        assert!(at("\np/v") < at("\ndisk"), "the busiest first:\n{text}");
        screen.by_name = true;
        let text = as_text(&screen).ok().unwrap();
        assert!(text.find("\ndisk").unwrap() < text.find("\np/v").unwrap(), "{text}");
    }

    #[test]
    fn hostile_names_do_not_reach_the_terminal() {
        let mut said = overview(1.0);
        said["hosts"][0]["nqn"] = json!("\u{1b}[2Jnqn\u{7}\r\n");
        said["events"][0]["text"] = json!("\u{1b}]0;title\u{7}");
        let text = as_text(&Screen::new(said)).ok().unwrap();
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
    }

    #[test]
    fn every_size_of_a_terminal_is_drawn() {
        for said in [overview(1.0), json!({}), Value::Null] {
            let mut screen = Screen::new(json!({"time": 0.0}));
            screen.advance(said);
            for (width, height) in [(1, 1), (20, 5), (80, 24), (300, 100)] {
                let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height));
                let Ok(_) = terminal.draw(|frame| screen.draw(frame));
            }
        }
    }
}
