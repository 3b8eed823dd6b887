//! From events of the tracing target to records.

use std::fmt;

use cryptfold_nvmf_target::audit::TARGET;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::Context;

use super::log::{Event, Sender};

/// Now, UTC, to the microsecond: "2026-11-23T01:02:03.456789Z".
pub(super) fn now() -> String {
    let mut text = String::new();
    // A string takes everything.
    let _ = SystemTime.format_time(&mut Writer::new(&mut text));
    text
}

/// Sends events of the target `cryptfold_audit` to the log. Never waits.
pub struct AuditLayer(pub(super) Sender);

impl<S: tracing::Subscriber> Layer<S> for AuditLayer {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() != TARGET {
            return;
        }
        let mut members = Map::new();
        members.insert("level".into(), event.metadata().level().as_str().to_ascii_lowercase().into());
        event.record(&mut Members(&mut members));
        self.0.send(Event { time: now(), members });
    }
}

struct Members<'a>(&'a mut Map<String, Value>);

impl Members<'_> {
    fn put(&mut self, field: &Field, value: Value) {
        self.0.insert(field.name().into(), value);
    }
}

impl Visit for Members<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        // The only one that is JSON itself.
        let parsed = (field.name() == "params").then(|| serde_json::from_str(value).ok()).flatten();
        self.put(field, parsed.unwrap_or_else(|| value.into()));
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }
}
