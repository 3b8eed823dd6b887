//! `cryptfold top`: what a running target does, now, in a terminal.
//!
//! Asks the socket once per interval; rates are differences between two answers. `--once` prints one screen as text.

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
use serde_json::{Value, json};

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

/// What the target said at one time.
struct Sample {
    version: Value,
    iostat: Value,
    reactors: Value,
    pools: Value,
    volumes: Value,
    subsystems: Value,
    queues: Value,
}

impl Sample {
    fn take(client: &mut Client) -> Result<Sample, Failure> {
        Ok(Sample {
            version: call(client, "spdk_get_version", None)?["cryptfold"].take(),
            iostat: call(client, "bdev_get_iostat", None)?,
            reactors: call(client, "framework_get_reactors", None)?,
            pools: call(client, "bdev_lvol_get_lvstores", None)?,
            volumes: call(client, "bdev_lvol_get_lvols", None)?,
            subsystems: call(client, "nvmf_get_subsystems", None)?,
            queues: call(client, "nvmf_get_stats", None)?,
        })
    }

    fn device(&self, name: &Value) -> Option<&Value> {
        list(&self.iostat["bdevs"]).iter().find(|d| d["name"] == *name)
    }
}

/// What a device did in a second, between two samples.
#[derive(Clone, Default)]
struct Rate {
    name: String,
    read_ios: f64,
    write_ios: f64,
    read_bytes: f64,
    write_bytes: f64,
    /// Mean, microseconds; none without an I/O.
    read_us: Option<f64>,
    write_us: Option<f64>,
    exported: bool,
}

impl Rate {
    fn bytes(&self) -> f64 {
        self.read_bytes + self.write_bytes
    }
}

fn grown(before: &Value, after: &Value, key: &str) -> f64 {
    // A reset of the counters is no negative rate.
    after[key].as_u64().unwrap_or(0).saturating_sub(before[key].as_u64().unwrap_or(0)) as f64
}

/// Rates of all devices, the busiest first.
fn rates(before: &Sample, after: &Sample) -> Vec<Rate> {
    let tick_rate = after.iostat["tick_rate"].as_f64().unwrap_or(1.0);
    let seconds = grown(&before.iostat, &after.iostat, "ticks") / tick_rate;
    let exported: Vec<&Value> = list(&after.subsystems)
        .iter()
        .flat_map(|s| list(&s["namespaces"]))
        .map(|ns| &ns["bdev_name"])
        .collect();
    let none = json!({});
    let mut all: Vec<Rate> = list(&after.iostat["bdevs"])
        .iter()
        .map(|now| {
            let was = before.device(&now["name"]).unwrap_or(&none);
            let rate = |key: &str| if seconds > 0.0 { grown(was, now, key) / seconds } else { 0.0 };
            let mean = |ticks: &str, ops: &str| {
                let ops = grown(was, now, ops);
                (ops > 0.0).then(|| grown(was, now, ticks) / ops / tick_rate * 1e6)
            };
            let volume = list(&after.volumes).iter().find(|v| v["uuid"] == now["name"]);
            Rate {
                name: status::text(volume.map_or(&now["name"], |v| &v["alias"])),
                read_ios: rate("num_read_ops"),
                write_ios: rate("num_write_ops"),
                read_bytes: rate("bytes_read"),
                write_bytes: rate("bytes_written"),
                read_us: mean("read_latency_ticks", "num_read_ops"),
                write_us: mean("write_latency_ticks", "num_write_ops"),
                exported: exported.contains(&&now["name"]),
            }
        })
        .collect();
    all.sort_by(|a, b| b.bytes().total_cmp(&a.bytes()).then_with(|| a.name.cmp(&b.name)));
    all
}

/// Everything a screen shows.
struct Screen {
    now: Sample,
    rates: Vec<Rate>,
    reactors: Vec<(String, f64)>,
    /// Bytes per second that hosts read and wrote, the newest last.
    read: VecDeque<u64>,
    write: VecDeque<u64>,
    paused: bool,
    by_name: bool,
}

impl Screen {
    fn new(now: Sample) -> Screen {
        let empty = VecDeque::new();
        Screen {
            now,
            rates: Vec::new(),
            reactors: Vec::new(),
            read: empty.clone(),
            write: empty,
            paused: false,
            by_name: false,
        }
    }

    fn advance(&mut self, next: Sample) {
        self.rates = rates(&self.now, &next);
        let pairs = list(&self.now.reactors["reactors"]).iter().zip(list(&next.reactors["reactors"]));
        self.reactors = pairs
            .map(|(was, now)| {
                let (busy, idle) = (grown(was, now, "busy"), grown(was, now, "idle"));
                let share = if busy + idle > 0.0 { busy / (busy + idle) } else { 0.0 };
                (status::text(&now["lw_threads"][0]["name"]), share)
            })
            .collect();
        let hosts =
            |of: fn(&Rate) -> f64| self.rates.iter().filter(|r| r.exported).map(of).sum::<f64>() as u64;
        let (read, write) = (hosts(|r| r.read_bytes), hosts(|r| r.write_bytes));
        for (history, value) in [(&mut self.read, read), (&mut self.write, write)] {
            history.push_back(value);
            while history.len() > HISTORY {
                history.pop_front();
            }
        }
        self.now = next;
    }

    fn head(&self) -> Line<'static> {
        let sum = |key: &str| -> u64 {
            list(&self.now.queues["poll_groups"]).iter().filter_map(|g| g[key].as_u64()).sum()
        };
        let version = status::text(&self.now.version);
        let (controllers, queues) = (sum("current_admin_qpairs"), sum("current_io_qpairs"));
        let paused = if self.paused { "   PAUSED" } else { "" };
        Line::from(format!("cryptfold {version}   {controllers} controllers, {queues} I/O queues{paused}"))
            .bold()
    }

    fn devices(&self) -> Table {
        let heads =
            ["DEVICE", "READ/S", "WRITE/S", "READ", "WRITE", "READ LATENCY", "WRITE LATENCY", "HOSTS"];
        let mut t = Table::new(&heads, &[false, true, true, true, true, true, true, false]);
        let mut rates = self.rates.clone();
        if self.by_name {
            rates.sort_by(|a, b| a.name.cmp(&b.name));
        }
        let latency = |us: Option<f64>| us.map_or_else(|| "-".into(), |us| format!("{us:.0} us"));
        for r in rates {
            t.row(vec![
                r.name,
                format!("{:.0}", r.read_ios),
                format!("{:.0}", r.write_ios),
                format!("{}/s", size::show(r.read_bytes as u64)),
                format!("{}/s", size::show(r.write_bytes as u64)),
                latency(r.read_us),
                latency(r.write_us),
                if r.exported { "yes".into() } else { String::new() },
            ]);
        }
        t
    }

    /// What runs in the background of pools.
    fn background(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for pool in list(&self.now.pools) {
            let name = status::text(&pool["name"]);
            let work = [("scrub", "scrub", "bytes"), ("late_dedupe", "late deduplication", "containers")];
            for (key, what, unit) in work {
                let work = &pool[key];
                if work["state"] == "running" {
                    let count = |key: &str| work[key].as_f64().unwrap_or(0.0);
                    let done = 100.0 * count(unit) / count(&format!("total_{unit}")).max(1.0);
                    lines.push(format!("{name}: {what} {:.0} %", done.min(100.0)));
                }
            }
            if let Some(why) = pool["failed"].as_str() {
                lines.push(format!("{name}: FAILED: {why}"));
            }
        }
        lines
    }

    fn draw(&self, frame: &mut Frame) {
        let pools = status::pools(&self.now.pools);
        let background = self.background();
        let rows = |n: usize| Constraint::Length(u16::try_from(n).unwrap_or(u16::MAX));
        let [head, history, reactors, pool_area, background_area, devices, foot] = Layout::vertical([
            rows(1),
            rows(6),
            rows(self.reactors.len() + 1),
            rows(if pools.is_empty() { 0 } else { pools.len() + 2 }),
            rows(background.len()),
            Constraint::Min(3),
            rows(1),
        ])
        .areas(frame.area());
        frame.render_widget(self.head(), head);
        let [read, write] = Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).areas(history);
        sparkline(frame, read, "hosts read", &self.read, Style::new().cyan());
        sparkline(frame, write, "hosts write", &self.write, Style::new().magenta());
        let bars: Vec<Line> = self.reactors.iter().map(|(name, share)| bar(name, *share)).collect();
        frame.render_widget(Paragraph::new(bars), reactors);
        if !pools.is_empty() {
            frame.render_widget(Paragraph::new(table(&pools)), pool_area);
        }
        frame.render_widget(Paragraph::new(background.join("\n")), background_area);
        frame.render_widget(Paragraph::new(table(&self.devices())), devices);
        let order = if self.by_name { "name" } else { "activity" };
        frame.render_widget(Line::from(format!("q quit   p pause   s order: {order}")).dim(), foot);
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
    let mut screen = Screen::new(Sample::take(&mut client)?);
    if args.once {
        std::thread::sleep(interval);
        screen.advance(Sample::take(&mut client)?);
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
            screen.advance(Sample::take(client)?);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(ticks: u64, n: u64) -> Sample {
        Sample {
            version: json!("1.2.3"),
            iostat: json!({"tick_rate": 1_000_000_000u64, "ticks": ticks, "bdevs": [
                {"name": "disk", "num_read_ops": 0, "bytes_read": 0},
                {"name": "7e6b", "num_read_ops": 100 * n, "bytes_read": 409_600 * n, "read_latency_ticks": 5_000_000 * n,
                 "num_write_ops": 0, "bytes_written": 0, "write_latency_ticks": 0},
            ]}),
            reactors: json!({"reactors": [{"busy": 750 * n, "idle": 250 * n, "lw_threads": [{"name": "reactor_0"}]}]}),
            pools: json!([{"name": "p", "base_bdev": "disk", "size_bytes": 1 << 30, "ratio": 4.0,
                "scrub": {"state": "running", "bytes": 12, "total_bytes": 100}}]),
            volumes: json!([{"uuid": "7e6b", "alias": "p/v"}]),
            subsystems: json!([{"namespaces": [{"nsid": 1, "bdev_name": "7e6b"}]}]),
            queues: json!({"poll_groups": [{"current_admin_qpairs": 1, "current_io_qpairs": 3}]}),
        }
    }

    #[test]
    fn rates_are_differences_over_the_time_between() {
        let mut screen = Screen::new(sample(1_000_000_000, 1));
        screen.advance(sample(3_000_000_000, 3));
        let busiest = &screen.rates[0];
        assert_eq!((busiest.name.as_str(), busiest.read_ios, busiest.read_bytes), ("p/v", 100.0, 409_600.0));
        assert_eq!((busiest.read_us, busiest.write_us, busiest.exported), (Some(50.0), None, true));
        assert_eq!((screen.read.back(), screen.write.back()), (Some(&409_600), Some(&0)));
        let text = as_text(&screen).ok().unwrap();
        for word in [
            "1.2.3",
            "1 controllers, 3 I/O queues",
            "75.0 % busy",
            "p/v",
            "50 us",
            "400 KiB/s",
            "4.00:1",
            "scrub 12 %",
        ] {
            assert!(text.contains(word), "no \"{word}\" in\n{text}");
        }
        // Counters that were reset meanwhile are no huge rate.
        screen.advance(sample(4_000_000_000, 1));
        assert_eq!(screen.rates.iter().map(Rate::bytes).sum::<f64>(), 0.0);
    }

    #[test]
    fn every_size_of_a_terminal_is_drawn() {
        let mut screen = Screen::new(sample(0, 0));
        screen.advance(sample(1, 1));
        for (width, height) in [(1, 1), (20, 5), (80, 24), (300, 100)] {
            let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height));
            let Ok(_) = terminal.draw(|frame| screen.draw(frame));
        }
    }
}
