//! The log's level, its flags (parts of the program that log everything) and time stamps, changeable at run time. Sinks:
//! standard error, the audit log if there is one, and the newest events for people. Key material never reaches them: no type that holds keys prints them.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use cryptfold_nvmf_target::audit::TARGET as AUDIT;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{Targets, filter_fn};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::{Registry, reload};

use crate::audit::AuditLog;
use crate::control::lock;
use crate::events::Events;
use crate::params::choices;

choices! {
    /// SPDK's levels.
    pub enum Level {
        /// Errors.
        Error = "ERROR",
        /// And warnings.
        Warning = "WARNING",
        /// And what an operator wants to see.
        Notice = "NOTICE",
        /// The same as NOTICE.
        Info = "INFO",
        /// Everything of use to a developer.
        Debug = "DEBUG",
    }
}

impl Level {
    fn filter(self) -> LevelFilter {
        match self {
            Level::Error => LevelFilter::ERROR,
            Level::Warning => LevelFilter::WARN,
            Level::Notice | Level::Info => LevelFilter::INFO,
            Level::Debug => LevelFilter::DEBUG,
        }
    }

    /// From the command line: any case, and the short words too.
    pub fn parse(word: &str) -> Option<Level> {
        Some(match word.to_ascii_lowercase().as_str() {
            "error" => Level::Error,
            "warn" | "warning" => Level::Warning,
            "notice" => Level::Notice,
            "info" => Level::Info,
            "debug" => Level::Debug,
            _ => return None,
        })
    }
}

/// The flags, each with the prefix of the modules that it turns up.
pub const FLAGS: &[(&str, &str)] = &[
    ("bdev", "cryptfold_bdev"),
    ("crypto", "cryptfold_bdev_crypto"),
    ("nvmf", "cryptfold_nvmf"),
    ("reactor", "cryptfold_reactor"),
    ("reduce", "cryptfold_reduce"),
    ("rpc", "cryptfold_control"),
    ("uring", "cryptfold_bdev_uring"),
];

struct Inner {
    level: Level,
    flags: BTreeSet<&'static str>,
    reload: Option<reload::Handle<Targets, Registry>>,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct LogControl {
    inner: Arc<Mutex<Inner>>,
    timestamps: Arc<AtomicBool>,
    events: Events,
}

impl fmt::Debug for LogControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LogControl({})", self.level().word())
    }
}

struct Stamp(Arc<AtomicBool>);

impl FormatTime for Stamp {
    fn format_time(&self, w: &mut Writer<'_>) -> fmt::Result {
        if self.0.load(Ordering::Relaxed) { SystemTime.format_time(w) } else { Ok(()) }
    }
}

/// Everything of the level, and all of the audit log.
fn targets(level: Level) -> Targets {
    // What the audit log's end is held against is there at every level.
    let anchors = concat!(env!("CARGO_CRATE_NAME"), "::audit");
    Targets::new()
        .with_default(level.filter())
        .with_target(AUDIT, LevelFilter::TRACE)
        .with_target(anchors, LevelFilter::INFO)
}

impl LogControl {
    /// Without a sink: remembers the settings only.
    pub fn detached() -> LogControl {
        LogControl {
            inner: Arc::new(Mutex::new(Inner { level: Level::Notice, flags: BTreeSet::new(), reload: None })),
            timestamps: Arc::new(AtomicBool::new(true)),
            events: Events::default(),
        }
    }

    /// Makes standard error the process's log, and sends what belongs there to the audit log. Only the first call of a process
    /// has a sink.
    pub fn install(level: Level, audit: Option<&AuditLog>) -> LogControl {
        let log = LogControl::detached();
        let (layer, handle) = reload::Layer::new(targets(level));
        let out = tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_timer(Stamp(log.timestamps.clone()))
            .with_ansi(false)
            // Changes of the configuration are in the audit log only.
            .with_filter(filter_fn(|m| m.target() != AUDIT || *m.level() <= tracing::Level::INFO));
        let subscriber = Registry::default()
            .with(layer)
            .with(out)
            .with(audit.map(AuditLog::layer))
            .with(log.events.layer());
        let installed = tracing::subscriber::set_global_default(subscriber).is_ok();
        if let Some(audit) = audit {
            tracing::warn!("{}", audit.begun());
        }
        let mut inner = lock(&log.inner);
        inner.level = level;
        inner.reload = installed.then_some(handle);
        drop(inner);
        log
    }

    /// What it has said last.
    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    /// The level now.
    pub fn level(&self) -> Level {
        lock(&self.inner).level
    }

    /// Sets the level.
    pub fn set_level(&self, level: Level) {
        let mut inner = lock(&self.inner);
        inner.level = level;
        inner.apply();
    }

    /// Sets or clears a flag, or "all". False for an unknown one.
    pub fn set_flag(&self, flag: &str, on: bool) -> bool {
        let mut inner = lock(&self.inner);
        let mut known = false;
        for (name, _) in FLAGS.iter().filter(|(name, _)| flag == "all" || flag == *name) {
            known = true;
            if on {
                inner.flags.insert(name);
            } else {
                inner.flags.remove(name);
            }
        }
        inner.apply();
        known
    }

    /// All flags with their state.
    pub fn flags(&self) -> Vec<(&'static str, bool)> {
        let inner = lock(&self.inner);
        FLAGS.iter().map(|(n, _)| (*n, inner.flags.contains(n))).collect()
    }

    /// Time stamps on or off.
    pub fn set_timestamps(&self, on: bool) {
        self.timestamps.store(on, Ordering::Relaxed);
    }
}

impl Inner {
    fn apply(&self) {
        let Some(handle) = &self.reload else { return };
        let mut targets = targets(self.level);
        for (_, prefix) in FLAGS.iter().filter(|(n, _)| self.flags.contains(n)) {
            targets = targets.with_target(*prefix, LevelFilter::TRACE);
        }
        // Fails only when the subscriber is gone, at the end of the process.
        let _ = handle.reload(targets);
    }
}
