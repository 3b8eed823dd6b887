//! Log levels and flags; notifications.

use serde_json::{Map, Value, json};

use crate::control::Control;
use crate::jsonrpc::{RpcError, RpcResult};
use crate::logging::{FLAGS, Level};
use crate::params::params;
use crate::table::{Method, When};
use crate::watch::KINDS;

params! {
    /// `log_set_level`, `log_set_print_level`.
    pub struct SetLevel {
        /// Level; NOTICE and INFO are the same here.
        level: Level,
    }
    /// `log_set_flag`, `log_clear_flag`.
    pub struct Flag {
        /// A flag of `log_get_flags`, or "all".
        flag: String,
    }
    /// `log_enable_timestamps`.
    pub struct Timestamps {
        /// Whether lines of the log begin with the time.
        enabled: bool,
    }
    /// `notify_get_notifications`.
    pub struct Notifications {
        /// First event wanted.
        id: u64 = 0,
        /// Most events wanted.
        max: u64 = u64::MAX,
    }
}

const ONE_SINK: &str = "There is one log (standard error) and one level: log_set_level and log_set_print_level are the same. \
     The newest events (cryptfold_get_overview) are of what it lets pass.";

const OVERVIEW: &str = "What the web page and `cryptfold top` show: space, load, pools, volumes, devices, hosts, reactors, background \
    work, keys, the newest events. A new look once a second at most; rates, percentiles and `heat` are over the time since the \
    one before (`interval_seconds`; null at the first). Bytes, seconds, operations per second, shares from 0 to 1; null is \
    unknown. `totals` and `heat` are those of devices that are namespaces, `heat` counts operations between the borders of \
    `edges` (below the first, ..., above the last); latencies are the device's, without the network. Lists of volumes, devices \
    and hosts have the 500 busiest, `left_out` counts the others. Ours.";

const HISTORY: &str = "What looks (cryptfold_get_overview) have seen: in `rings` of 1 s for 5 minutes, 10 s for an hour, a minute for \
    a day, each with columns of the same length, the oldest first; `seconds` is what a point is about. With the HTTP listener \
    the target looks by itself each 10 s. Ours.";

const KINDS_OF_EVENTS: &str = "Types of events. Of pools: opened, closed (also because the device goes away), less than 10% or 2% of the \
    space left or enough again, another capacity, failed (takes no more changes).";

pub fn methods() -> Vec<Method> {
    let set = |c: &Control, p: SetLevel| {
        c.log.set_level(p.level);
        Ok(json!(true))
    };
    let get = |c: &Control| Ok(json!(c.log.level().word()));
    vec![
        Method::new("log_set_level", ONE_SINK, set).when(When::Any),
        Method::plain("log_get_level", "The level.", get).when(When::Any),
        Method::new("log_set_print_level", ONE_SINK, set).when(When::Any),
        Method::plain("log_get_print_level", "The level.", get).when(When::Any),
        Method::new("log_set_flag", "Logs everything of one part of the program.", |c, p| flag(c, &p, true))
            .when(When::Any),
        Method::new("log_clear_flag", "Back to the level.", |c, p| flag(c, &p, false)).when(When::Any),
        Method::plain("log_get_flags", "All flags with their state.", |c| {
            let flags: Map<String, Value> =
                c.log.flags().into_iter().map(|(n, on)| (n.into(), on.into())).collect();
            Ok(Value::Object(flags))
        })
        .when(When::Any),
        Method::new("log_enable_timestamps", "Time stamps in the log.", |c, p: Timestamps| {
            c.log.set_timestamps(p.enabled);
            Ok(json!(true))
        })
        .when(When::Any),
        Method::plain("notify_get_types", KINDS_OF_EVENTS, |_| Ok(json!(KINDS))).when(When::Any),
        Method::new("notify_get_notifications", "Events; the last 1024 are kept.", notifications)
            .when(When::Any),
        Method::plain("cryptfold_get_overview", OVERVIEW, |c| Ok(c.look().snapshot.clone())).when(When::Any),
        Method::plain("cryptfold_get_history", HISTORY, |c| Ok(c.history())).when(When::Any),
    ]
}

fn flag(c: &Control, p: &Flag, on: bool) -> RpcResult {
    if c.log.set_flag(&p.flag, on) {
        return Ok(json!(true));
    }
    let known: Vec<&str> = FLAGS.iter().map(|(n, _)| *n).collect();
    Err(RpcError::params(format!(
        "flag: \"{}\" was given; \"all\" or one of {} is needed",
        p.flag,
        known.join(", ")
    )))
}

fn notifications(c: &Control, p: Notifications) -> RpcResult {
    Ok(json!(c.watch.events(p.id, p.max)))
}
