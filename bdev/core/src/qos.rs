//! Rate limits of a device, shared by all its channels: token buckets refilled once per millisecond.
//!
//! A bucket may go into debt by one I/O, so that an I/O larger than a slice's share still passes; the debt is paid by
//! the following slices. What is held back waits in its channel, in order.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use cryptfold_reactor::Nanos;

/// SPDK's four limits (`bdev_set_qos_limit`); 0 = none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QosLimits {
    /// Reads and writes per second.
    pub rw_ios_per_sec: u64,
    /// MiB read and written per second.
    pub rw_mbytes_per_sec: u64,
    /// MiB read per second.
    pub r_mbytes_per_sec: u64,
    /// MiB written per second.
    pub w_mbytes_per_sec: u64,
}

/// Length of a time slice.
pub(crate) const SLICE_NS: u64 = 1_000_000;
const BUCKETS: usize = 4;

#[derive(Default)]
pub(crate) struct Qos {
    /// Tokens added per slice, in thousandths (so that 1 I/O per second is possible); 0 = no limit.
    rate_milli: [AtomicU64; BUCKETS],
    tokens_milli: [AtomicI64; BUCKETS],
    limits: [AtomicU64; BUCKETS],
    slice: AtomicU64,
}

impl Qos {
    /// Returns whether anything is limited.
    pub fn set(&self, l: QosLimits) -> bool {
        let values = [l.rw_ios_per_sec, l.rw_mbytes_per_sec, l.r_mbytes_per_sec, l.w_mbytes_per_sec];
        for (i, v) in values.into_iter().enumerate() {
            let per_sec = if i == 0 { v } else { v.saturating_mul(1 << 20) };
            self.limits[i].store(v, Ordering::Relaxed);
            self.rate_milli[i].store(per_sec, Ordering::Relaxed);
            self.tokens_milli[i].store(0, Ordering::Relaxed);
        }
        values.iter().any(|v| *v != 0)
    }

    pub fn limits(&self) -> QosLimits {
        let l = |i: usize| self.limits[i].load(Ordering::Relaxed);
        QosLimits {
            rw_ios_per_sec: l(0),
            rw_mbytes_per_sec: l(1),
            r_mbytes_per_sec: l(2),
            w_mbytes_per_sec: l(3),
        }
    }

    /// Takes the tokens for one I/O; false = hold it back until the next slice.
    pub fn admit(&self, bytes: u64, write: bool, now: Nanos) -> bool {
        self.refill(now.0 / SLICE_NS);
        let used = [true, true, !write, write];
        let limited = |i: usize| used[i] && self.rate_milli[i].load(Ordering::Relaxed) != 0;
        if (0..BUCKETS).any(|i| limited(i) && self.tokens_milli[i].load(Ordering::Relaxed) <= 0) {
            return false;
        }
        for i in (0..BUCKETS).filter(|i| limited(*i)) {
            let cost = if i == 0 { 1000 } else { bytes.saturating_mul(1000) };
            self.tokens_milli[i].fetch_sub(i64::try_from(cost).unwrap_or(i64::MAX / 2), Ordering::Relaxed);
        }
        true
    }

    fn refill(&self, slice: u64) {
        let last = self.slice.load(Ordering::Relaxed);
        if slice <= last
            || self.slice.compare_exchange(last, slice, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return;
        }
        // After idle time only one slice's worth is there: a limit is no savings account.
        for i in 0..BUCKETS {
            // `rate` is per second; a slice is a thousandth of it, and tokens count thousandths: same number.
            let rate = i64::try_from(self.rate_milli[i].load(Ordering::Relaxed)).unwrap_or(i64::MAX / 4);
            let gain = rate.saturating_mul((slice - last).min(1000) as i64);
            let t = &self.tokens_milli[i];
            let before = t.load(Ordering::Relaxed);
            t.fetch_add(before.saturating_add(gain).min(rate.max(1000)) - before, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(limits: QosLimits, bytes: u64, write: bool, millis: u64) -> u64 {
        let q = Qos::default();
        assert!(q.set(limits));
        let mut n = 0;
        for ms in 1..=millis {
            while q.admit(bytes, write, Nanos(ms * SLICE_NS)) {
                n += 1;
            }
        }
        n
    }

    #[test]
    fn rates_hold_over_a_second() {
        let ios = QosLimits { rw_ios_per_sec: 5000, ..Default::default() };
        assert!((4990..=5010).contains(&admitted(ios, 4096, false, 1000)));
        let slow = QosLimits { rw_ios_per_sec: 10, ..Default::default() };
        assert!((9..=11).contains(&admitted(slow, 4096, true, 1000)));
        let mb = QosLimits { w_mbytes_per_sec: 8, ..Default::default() };
        let n = admitted(mb, 1 << 20, true, 1000);
        assert!((7..=9).contains(&n), "{n} MiB in a second of 8");
    }

    #[test]
    fn read_limit_leaves_writes_alone() {
        let q = Qos::default();
        q.set(QosLimits { r_mbytes_per_sec: 1, ..Default::default() });
        for _ in 0..10_000 {
            assert!(q.admit(1 << 20, true, Nanos(SLICE_NS)));
        }
    }
}
