//! How a controller is attached.

use std::time::Duration;

use cryptfold_nvmf_initiator::ConnectOptions;
use serde_json::Value;

/// What a second attachment under the same name means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Multipath {
    /// It is refused.
    Disable,
    /// Another address for the same association: connected to when the first is lost.
    Failover,
    /// Another association, kept beside the first; I/O takes the best path (ANA).
    Multipath,
}

impl Multipath {
    /// SPDK's word.
    pub fn word(self) -> &'static str {
        match self {
            Multipath::Disable => "disable",
            Multipath::Failover => "failover",
            Multipath::Multipath => "multipath",
        }
    }
}

/// What happens when a connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// When to give the path up: never, or after so long. With no time at all, one attempt is made, and the path stays as
    /// failed until it is reset.
    pub loss: Option<Duration>,
    /// Between two attempts.
    pub delay: Duration,
    /// I/O waits so long for a path; without it, as long as there is hope.
    pub fast_io_fail: Option<Duration>,
}

impl Recovery {
    /// From SPDK's three numbers (seconds; -1 = for ever, 0 = not at all), which depend on each other.
    ///
    /// # Errors
    /// Which of them does not fit, and what would.
    pub fn new(loss_s: i32, delay_s: u32, fast_io_fail_s: u32) -> Result<Recovery, String> {
        let long = i64::from(loss_s);
        let (delay, fast) = (i64::from(delay_s), i64::from(fast_io_fail_s));
        if long < -1 {
            return Err(format!("ctrlr_loss_timeout_sec: {long} was given; -1 (for ever) or more is needed"));
        }
        if (long == 0) != (delay == 0) {
            return Err(format!(
                "reconnect_delay_sec: {delay} does not go with ctrlr_loss_timeout_sec {long}; both are 0 or neither is"
            ));
        }
        if long > 0 && delay > long {
            return Err(format!("reconnect_delay_sec: {delay} is more than ctrlr_loss_timeout_sec {long}"));
        }
        if fast > 0 && (long == 0 || fast < delay || (long > 0 && fast > long)) {
            let upper = if long > 0 { long.to_string() } else { "any".into() };
            return Err(format!(
                "fast_io_fail_timeout_sec: {fast} was given; with ctrlr_loss_timeout_sec {long} it is 0, or {delay} (reconnect_delay_sec) \
                 to {upper}"
            ));
        }
        let seconds = |n: i64| Duration::from_secs(n.unsigned_abs());
        Ok(Recovery {
            loss: (long >= 0).then(|| seconds(long)),
            delay: seconds(delay),
            fast_io_fail: (fast > 0).then(|| seconds(fast)),
        })
    }
}

/// One attachment.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// The controller; its devices are called this, "n" and the namespace's identifier.
    pub name: String,
    /// What a further attachment means.
    pub multipath: Multipath,
    /// The path.
    pub connect: ConnectOptions,
    /// What happens when it is lost.
    pub recovery: Recovery,
    /// Devices at most.
    pub max_bdevs: usize,
    /// How often an I/O is tried again that a target ended for a passing reason.
    pub retries: u32,
    /// The parameters that attach this again.
    pub saved: Value,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_times_fit_each_other() {
        let s = Duration::from_secs;
        let none = Recovery { loss: Some(s(0)), delay: s(0), fast_io_fail: None };
        assert_eq!(Recovery::new(0, 0, 0), Ok(none));
        let all = Recovery { loss: Some(s(30)), delay: s(2), fast_io_fail: Some(s(5)) };
        assert_eq!(Recovery::new(30, 2, 5), Ok(all));
        let ever = Recovery { loss: None, delay: s(1), fast_io_fail: None };
        assert_eq!(Recovery::new(-1, 1, 0), Ok(ever));
        for (l, d, f, word) in [
            (-2, 1, 0, "ctrlr_loss"),
            (0, 1, 0, "reconnect_delay"),
            (-1, 0, 0, "reconnect_delay"),
            (5, 6, 0, "reconnect_delay"),
            (0, 0, 1, "fast_io_fail"),
            (9, 3, 2, "fast_io_fail"),
            (9, 3, 10, "fast_io_fail"),
        ] {
            assert!(Recovery::new(l, d, f).is_err_and(|e| e.starts_with(word)), "{l} {d} {f}");
        }
    }
}
