//! The newest events, for people: what the log says at the level of notices (and the audit log at that level), in a bounded ring.
//!
//! What one line of the program says again and again (hosts that are refused, say) takes [`OF_ONE_SITE`] places at most, so it
//! hides nothing else. Texts are bounded, and carry no control characters: names are what hosts sent. Fields `file`, where keys
//! lie, are for the log alone: whoever may look at the target sees events.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

use crate::control::lock;

/// Events kept.
pub const KEPT: usize = 100;
/// Of these, from one place in the program.
const OF_ONE_SITE: usize = 12;
/// Characters of a text.
const TEXT_CHARS: usize = 400;
/// What methods say of single calls is no event.
const CALLS: &str = concat!(env!("CARGO_CRATE_NAME"), "::control");

struct Event {
    time: SystemTime,
    severity: &'static str,
    text: String,
    site: Identifier,
}

/// See the module. Cheap to clone.
#[derive(Clone, Default)]
pub struct Events(Arc<Mutex<VecDeque<Event>>>);

fn is_event(m: &Metadata<'_>) -> bool {
    *m.level() <= Level::WARN || (*m.level() == Level::INFO && m.target() != CALLS)
}

impl Events {
    /// Takes what the program says.
    pub fn layer<S: tracing::Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> + use<S> {
        Sink(self.clone()).with_filter(filter_fn(is_event).with_max_level_hint(LevelFilter::INFO))
    }

    /// All, the newest first: `time` (seconds since 1970), `severity` (info, warning, error), `text`.
    pub fn newest(&self) -> Vec<Value> {
        let seconds = |t: SystemTime| t.duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let shown = |e: &Event| json!({"time": seconds(e.time), "severity": e.severity, "text": e.text});
        lock(&self.0).iter().rev().map(shown).collect()
    }

    fn push(&self, event: Event) {
        let mut all = lock(&self.0);
        let same = |e: &Event| e.site == event.site;
        if all.iter().filter(|e| same(e)).count() >= OF_ONE_SITE {
            let oldest = all.iter().position(same);
            oldest.map(|at| all.remove(at));
        } else if all.len() >= KEPT {
            all.pop_front();
        }
        all.push_back(event);
    }
}

struct Sink(Events);

impl<S: tracing::Subscriber> Layer<S> for Sink {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let severity = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            _ => "info",
        };
        let mut parts = Parts::default();
        event.record(&mut parts);
        let (text, site) = (parts.text(), event.metadata().callsite());
        self.0.push(Event { time: SystemTime::now(), severity, text, site });
    }
}

/// "message: name value, name value".
#[derive(Default)]
struct Parts {
    head: String,
    rest: String,
}

impl Parts {
    fn put(&mut self, field: &Field, value: &dyn fmt::Display) {
        // Strings take everything.
        let _ = match field.name() {
            "message" | "event" => write!(self.head, "{value}"),
            "file" => Ok(()),
            name => {
                let comma = if self.rest.is_empty() { "" } else { ", " };
                write!(self.rest, "{comma}{name} {value}")
            }
        };
    }

    fn text(self) -> String {
        let colon = if self.head.is_empty() || self.rest.is_empty() { "" } else { ": " };
        let all = [self.head.as_str(), colon, &self.rest].concat();
        let mut text: String =
            all.chars().take(TEXT_CHARS).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        if all.chars().nth(TEXT_CHARS).is_some() {
            text.push_str("...");
        }
        text
    }
}

impl Visit for Parts {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, &value);
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, &format_args!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::layer::SubscriberExt as _;

    fn texts(events: &Events) -> Vec<String> {
        events.newest().iter().map(|e| format!("{} {}", e["severity"], e["text"]).replace('"', "")).collect()
    }

    #[test]
    fn events_are_told_in_words_the_newest_first() {
        let events = Events::default();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(events.layer()), || {
            tracing::info!(pool = "p", damaged = 3, "scrub ended");
            tracing::warn!(target: "cryptfold_audit", event = "access refused", peer = "192.0.2.1:5", hostnqn = "a\u{1b}[2J\n<b>");
            tracing::error!("the pool stops");
            tracing::info!(key = "k", file = %"/etc/k", "key written");
            tracing::info!(target: "cryptfold_audit", event = "backed up", pool = "p", file = Some("/etc/b"));
            tracing::debug!("nothing for people");
            tracing::info!(target: CALLS, "rpc refused");
        });
        let wanted = [
            "info backed up: pool p",
            "info key written: key k",
            "error the pool stops",
            "warning access refused: peer 192.0.2.1:5, hostnqn a\u{fffd}[2J\u{fffd}<b>",
            "info scrub ended: pool p, damaged 3",
        ];
        assert_eq!(texts(&events), wanted);
        assert!(events.newest()[0]["time"].as_f64().unwrap() > 1.7e9);
    }

    #[test]
    fn a_flood_hides_nothing_else_and_texts_have_an_end() {
        let events = Events::default();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(events.layer()), || {
            tracing::info!("begin");
            for n in 0..10_000 {
                tracing::warn!(n, "{}", "x".repeat(5_000));
            }
        });
        let texts = texts(&events);
        assert_eq!((texts.len(), texts.last().unwrap().as_str()), (OF_ONE_SITE + 1, "info begin"));
        assert!(texts[0].ends_with("x...") && texts[0].len() < TEXT_CHARS + 20, "{}", texts[0]);
    }

    #[test]
    fn the_oldest_go() {
        let events = Events::default();
        let site = |n: usize| {
            macro_rules! sites { ($($i:literal)*) => { match n % 10 { $($i => tracing::info!("{n} {}", $i),)* _ => {} } } }
            sites!(0 1 2 3 4 5 6 7 8 9);
        };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(events.layer()), || {
            (0..KEPT + 15).for_each(site);
        });
        let texts = texts(&events);
        assert_eq!(texts.len(), KEPT);
        assert!(
            texts[0].starts_with(&format!("info {} ", KEPT + 14)) && texts[KEPT - 1].starts_with("info 15 "),
            "{texts:?}"
        );
    }
}
