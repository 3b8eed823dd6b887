//! Monotonic time in nanoseconds: the TSC where the kernel trusts it, `CLOCK_MONOTONIC` elsewhere.

use std::ops::{Add, Sub};
use std::sync::OnceLock;
use std::time::Duration;

/// A point in monotonic time, nanoseconds. On a real machine the origin is that of `CLOCK_MONOTONIC`; in the simulator
/// it is the start of the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nanos(pub u64);

impl Nanos {
    /// Time from `earlier` to `self`; zero when `earlier` is later.
    #[inline]
    pub fn since(self, earlier: Nanos) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Nanos {
    type Output = Nanos;

    /// Saturates: "never" for absurd durations.
    #[inline]
    fn add(self, duration: Duration) -> Nanos {
        Nanos(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub for Nanos {
    type Output = Duration;

    /// Saturates at zero.
    #[inline]
    fn sub(self, earlier: Nanos) -> Duration {
        self.since(earlier)
    }
}

/// The machine's clock now.
#[inline]
pub(crate) fn machine_now() -> Nanos {
    match tsc() {
        Some(tsc) => tsc.now(),
        None => monotonic(),
    }
}

fn monotonic() -> Nanos {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    Nanos(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// Line through a (ticks, nanoseconds) anchor; `scale` is nanoseconds per tick, 32.32 fixed point.
struct Tsc {
    ticks: u64,
    nanos: u64,
    scale: u64,
}

#[inline]
fn tsc() -> Option<&'static Tsc> {
    static TSC: OnceLock<Option<Tsc>> = OnceLock::new();
    TSC.get_or_init(Tsc::calibrate).as_ref()
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn ticks() -> u64 {
    // SAFETY: every x86-64 CPU has rdtsc; it touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn ticks() -> u64 {
    0
}

impl Tsc {
    #[inline]
    fn now(&self) -> Nanos {
        let ticks = ticks().saturating_sub(self.ticks);
        Nanos(self.nanos + ((u128::from(ticks) * u128::from(self.scale)) >> 32) as u64)
    }

    /// Measures the TSC against `CLOCK_MONOTONIC` for 10 ms, once per process.
    fn calibrate() -> Option<Tsc> {
        if !usable() {
            return None;
        }
        let (ticks0, nanos0) = sample();
        let (ticks1, nanos1) = loop {
            let (ticks, nanos) = sample();
            if nanos - nanos0 >= 10_000_000 {
                break (ticks, nanos);
            }
            std::hint::spin_loop();
        };
        let passed = ticks1.checked_sub(ticks0).filter(|&ticks| ticks > 0)?;
        let scale = (u128::from(nanos1 - nanos0) << 32) / u128::from(passed);
        Some(Tsc { ticks: ticks1, nanos: nanos1, scale: u64::try_from(scale).ok()? })
    }
}

/// The tightest of a few readings of both clocks, so that an interruption between them does not count.
fn sample() -> (u64, u64) {
    let readings = (0..8).map(|_| {
        let before = ticks();
        let nanos = monotonic().0;
        let after = ticks();
        (after.saturating_sub(before), before + after.saturating_sub(before) / 2, nanos)
    });
    let (_, ticks, nanos) = readings.min().unwrap_or_default();
    (ticks, nanos)
}

/// Whether the TSC ticks at a constant rate through all power states (CPUID 8000_0007h EDX bit 8) and the kernel has not
/// found it unstable, which it does by removing it from the clock sources.
#[cfg(target_arch = "x86_64")]
fn usable() -> bool {
    use std::arch::x86_64::__cpuid;
    let invariant = __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & (1 << 8) != 0;
    let sources =
        std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/available_clocksource");
    invariant && sources.is_ok_and(|list| list.split_whitespace().any(|name| name == "tsc"))
}

#[cfg(not(target_arch = "x86_64"))]
fn usable() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_kernels_clock() {
        machine_now();
        let error = |a: Nanos, b: Nanos| a.0.abs_diff(b.0);
        let before = error(machine_now(), monotonic());
        std::thread::sleep(Duration::from_millis(100));
        let after = error(machine_now(), monotonic());
        assert!(before < 2_000_000, "{before} ns off at once");
        assert!(after < 2_000_000, "{after} ns off after 100 ms");
    }

    #[test]
    fn does_not_run_backwards() {
        let mut last = machine_now();
        for _ in 0..100_000 {
            let now = machine_now();
            assert!(now >= last);
            last = now;
        }
    }

    #[test]
    fn saturates() {
        assert_eq!(Nanos(5) + Duration::MAX, Nanos(u64::MAX));
        assert_eq!(Nanos(5) - Nanos(9), Duration::ZERO);
        assert_eq!(Nanos(9).since(Nanos(5)), Duration::from_nanos(4));
    }
}
