//! The program itself: methods, versions, phases, reactors and threads.

use cryptfold_nvmf_target::audit::TARGET as AUDIT;
use serde_json::{Value, json};

use crate::caller::Caller;
use crate::control::{Control, Signal};
use crate::jsonrpc::{RpcError, RpcResult};
use crate::params::{choices, params};
use crate::table::{Method, When};

choices! {
    /// Signals.
    pub enum SignalName {
        /// SIGINT.
        Int = "SIGINT",
        /// SIGTERM.
        Term = "SIGTERM",
        /// SIGQUIT.
        Quit = "SIGQUIT",
        /// SIGHUP.
        Hup = "SIGHUP",
        /// SIGKILL.
        Kill = "SIGKILL",
        /// SIGUSR1.
        Usr1 = "SIGUSR1",
    }
}

params! {
    /// `rpc_get_methods`.
    pub struct GetMethods {
        /// Only those that may be called now.
        current: bool = false,
        /// Older names too.
        include_aliases: bool = false,
    }
    /// `spdk_kill_instance`.
    pub struct Kill {
        /// Signal to send.
        sig_name: SignalName,
    }
    /// `framework_monitor_context_switch`.
    pub struct Monitor {
        /// Only false is possible.
        enabled: Option<bool>,
    }
    /// `framework_set_scheduler`.
    pub struct Scheduler {
        /// Scheduler; reactors here are pinned and work stays where its connection is, so "static" is the only one.
        name: String,
        /// No effect.
        period: Option<u64>,
        /// No effect.
        load_limit: Option<u8>,
        /// No effect.
        core_limit: Option<u8>,
        /// No effect.
        core_busy: Option<u8>,
        /// No effect.
        mappings: Option<String>,
    }
}

pub fn methods() -> Vec<Method> {
    vec![
        Method::new("rpc_get_methods", "Names of the methods, sorted.", get_methods).when(When::Any),
        Method::plain(
            "spdk_get_version",
            "Version of SPDK's interface that is spoken, and of this program.",
            version,
        )
        .when(When::Any),
        Method::plain(
            "cryptfold_get_fips_mode",
            "The FIPS mode (--fips-mode), the cipher library, and the version of its FIPS module; in `validated` also the certificate of the module's \
             branch, with the version that it was given for and whether that is this one, and which services the module counts as approved. Ours.",
            |c| Ok(c.config.fips.describe()),
        )
        .when(When::Any),
        Method::new(
            "spdk_kill_instance",
            "Sends this process a signal. SIGTERM, SIGINT and SIGQUIT end it in order.",
            kill,
        )
        .when(When::Any),
        Method::plain("framework_start_init", "Starts the reactors and ends the start-up phase.", start_init)
            .when(When::Startup),
        Method::plain("framework_wait_init", "Replies when initialisation is done.", |c| {
            c.wait_initialized();
            if c.is_ending() {
                return Err(RpcError::internal("the target is ending"));
            }
            Ok(json!(true))
        })
        .when(When::Any),
        Method::plain(
            "framework_get_reactors",
            "Reactors with their busy and idle time in ticks (nanoseconds).",
            reactors,
        )
        .when(When::Any),
        Method::plain(
            "thread_get_stats",
            "One thread per reactor, with its busy and idle time in ticks.",
            thread_stats,
        )
        .when(When::Any),
        Method::plain("thread_get_pollers", "Pollers of each thread.", pollers).when(When::Any),
        Method::plain(
            "thread_get_io_channels",
            "I/O channels of each thread: one entry per kind, with the number open there.",
            io_channels,
        )
        .when(When::Any),
        Method::new(
            "framework_monitor_context_switch",
            "Replies {\"enabled\": false}; the monitor does not exist here.",
            |_, p: Monitor| match p.enabled {
                Some(true) => {
                    Err(RpcError::params("enabled: true was given; context switches are not monitored"))
                }
                _ => Ok(json!({"enabled": false})),
            },
        )
        .when(When::Any),
        Method::new("framework_set_scheduler", "Accepts \"static\".", |_, p: Scheduler| {
            if p.name == "static" {
                return Ok(json!(true));
            }
            Err(RpcError::params(format!("name: \"{}\" was given; \"static\" is the only scheduler", p.name)))
        })
        .when(When::Any),
        Method::plain("framework_get_scheduler", "The scheduler.", |_| {
            Ok(json!({"scheduler_name": "static", "scheduler_period": 0, "isolated_core_mask": "0x0"}))
        })
        .when(When::Any),
        Method::plain("framework_get_governor", "There is none.", |_| Ok(json!({}))).when(When::Any),
    ]
}

fn get_methods(c: &Control, p: GetMethods) -> RpcResult {
    let running = c.is_initialized();
    let callable = |m: &&Method| match m.when {
        When::Any => true,
        When::Startup => !running,
        When::Runtime => running,
    };
    let mut names: Vec<&str> = Vec::new();
    for m in c.table().methods().iter().filter(|m| !p.current || callable(m)) {
        names.push(m.name);
        if p.include_aliases {
            names.extend(m.aliases);
        }
    }
    names.sort_unstable();
    Ok(json!(names))
}

fn version(_: &Control) -> RpcResult {
    Ok(json!({
        "version": format!("cryptfold {} (SPDK v26.09-pre interface)", env!("CARGO_PKG_VERSION")),
        "fields": {"major": 26, "minor": 9, "patch": 0, "suffix": "-pre"},
        "cryptfold": env!("CARGO_PKG_VERSION"),
    }))
}

fn kill(c: &Control, p: Kill) -> RpcResult {
    let signal = match p.sig_name {
        SignalName::Int => Signal::Int,
        SignalName::Term => Signal::Term,
        SignalName::Quit => Signal::Quit,
        SignalName::Hup => Signal::Hup,
        SignalName::Kill => Signal::Kill,
        SignalName::Usr1 => Signal::Usr1,
    };
    if signal == Signal::Kill {
        // Nothing is recorded after it.
        c.refusals.tell_all();
        let caller = Caller::current();
        tracing::warn!(target: AUDIT, event = "killed by request", by = caller.by, roles = caller.roles);
    }
    (c.config.on_signal)(signal);
    Ok(json!(true))
}

fn start_init(c: &Control) -> RpcResult {
    c.initialize()?;
    Ok(json!(true))
}

/// Nanoseconds are the ticks of everything here.
pub const TICK_RATE: u64 = 1_000_000_000;

/// Hexadecimal, as SPDK prints its masks.
fn cpumask(core: usize) -> String {
    if core < 128 { format!("{:x}", 1u128 << core) } else { format!("1{}", "0".repeat(core / 4)) }
}

/// Kernel thread ids by thread name.
fn thread_ids() -> Vec<(String, u64)> {
    let Ok(dir) = std::fs::read_dir("/proc/self/task") else { return Vec::new() };
    let id = |e: std::fs::DirEntry| {
        let tid = e.file_name().to_str()?.parse().ok()?;
        Some((std::fs::read_to_string(e.path().join("comm")).ok()?.trim().to_string(), tid))
    };
    dir.flatten().filter_map(id).collect()
}

pub fn thread_name(n: u32) -> String {
    if n == 0 { "app_thread".into() } else { format!("reactor_{n}") }
}

fn reactors(c: &Control) -> RpcResult {
    let ids = thread_ids();
    let interrupt = c.config.idle != cryptfold_reactor::IdlePolicy::Poll;
    let list: Vec<Value> = c
        .handles()
        .iter()
        .map(|h| {
            let s = h.stats();
            let kernel_name = format!("reactor_{}", h.id());
            json!({
                "lcore": h.core(),
                "tid": ids.iter().find(|(n, _)| *n == kernel_name).map_or(0, |(_, id)| *id),
                "busy": s.busy_ns,
                "idle": s.idle_ns,
                "in_interrupt": interrupt,
                "lw_threads": [{
                    "name": thread_name(h.id().0),
                    "id": h.id().0 + 1,
                    "cpumask": cpumask(h.core()),
                    "elapsed": s.busy_ns + s.idle_ns,
                }],
            })
        })
        .collect();
    Ok(json!({"tick_rate": TICK_RATE, "pid": std::process::id(), "reactors": list}))
}

fn thread_stats(c: &Control) -> RpcResult {
    let interrupt = c.config.idle != cryptfold_reactor::IdlePolicy::Poll;
    let threads: Vec<Value> = c
        .handles()
        .iter()
        .map(|h| {
            let s = h.stats();
            json!({
                "name": thread_name(h.id().0),
                "id": h.id().0 + 1,
                "cpumask": cpumask(h.core()),
                "busy": s.busy_ns,
                "idle": s.idle_ns,
                "in_interrupt": interrupt,
                "active_pollers_count": s.pollers.len(),
                "timed_pollers_count": 0,
                "paused_pollers_count": 0,
            })
        })
        .collect();
    Ok(json!({"tick_rate": TICK_RATE, "threads": threads}))
}

fn pollers(c: &Control) -> RpcResult {
    let threads: Vec<Value> = c
        .handles()
        .iter()
        .map(|h| {
            let active: Vec<Value> = (1u64..)
                .zip(h.stats().pollers)
                .map(|(id, p)| {
                    json!({"name": p.name, "id": id, "state": "waiting", "run_count": p.run_count,
                        "busy_count": p.busy_count})
                })
                .collect();
            json!({"name": thread_name(h.id().0), "id": h.id().0 + 1, "active_pollers": active,
                "timed_pollers": [], "paused_pollers": []})
        })
        .collect();
    Ok(json!({"tick_rate": TICK_RATE, "threads": threads}))
}

fn io_channels(c: &Control) -> RpcResult {
    let threads: Vec<Value> = c
        .handles()
        .iter()
        .map(|h| json!({"name": thread_name(h.id().0), "io_channels": c.channels_on(h)}))
        .collect();
    Ok(json!({"tick_rate": TICK_RATE, "threads": threads}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks() {
        assert_eq!(
            (cpumask(0), cpumask(5), cpumask(64)),
            ("1".into(), "20".into(), format!("1{}", "0".repeat(16)))
        );
    }
}
