//! What the kernel says about how undisturbed a measurement was.

use std::fs;
use std::time::Instant;

/// The load average over the last minute; 0 when the kernel does not say.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0.0)
}

/// Memory of this process in huge pages of either kind, MiB.
pub fn huge_mib() -> u64 {
    let text = fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
    let kib = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name));
        line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0)
    };
    (kib("AnonHugePages:") + kib("Private_Hugetlb:")) / 1024
}

/// Watches how long the current thread waits for its core while others have it.
pub struct Watch {
    start: Instant,
    waited_ns: u64,
}

/// ns that this thread was runnable and did not run (`/proc/thread-self/schedstat`, second field).
fn waited_ns() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
}

impl Watch {
    /// From now on.
    pub fn start() -> Watch {
        Watch { start: Instant::now(), waited_ns: waited_ns() }
    }

    /// Percent of the time since the start, on the same thread.
    pub fn waited_pct(&self) -> f64 {
        let waited = waited_ns().saturating_sub(self.waited_ns) as f64;
        100.0 * waited / (self.start.elapsed().as_nanos() as f64).max(1.0)
    }
}
