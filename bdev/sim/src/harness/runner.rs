//! Many seeds at once, and how a failing one is reported.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::Summary;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let parsed = text.trim().parse().ok();
    assert!(parsed.is_some(), "{name} is no number: {text}");
    parsed
}

/// Runs `run` for `CRYPTFOLD_SEEDS` seeds (otherwise `default` of them) from `CRYPTFOLD_FIRST_SEED` (otherwise 0), or for
/// `CRYPTFOLD_SEED` alone, on all cores. `again` is the command that runs this test.
///
/// # Panics
/// When a seed fails; each is printed with the command that runs it again.
pub fn seeds(again: &str, default: u64, run: impl Fn(u64) -> Result<Summary, String> + Sync) {
    let (first, count) = match number("CRYPTFOLD_SEED") {
        Some(seed) => (seed, 1),
        None => (number("CRYPTFOLD_FIRST_SEED").unwrap_or(0), number("CRYPTFOLD_SEEDS").unwrap_or(default)),
    };
    let next = AtomicU64::new(first);
    let failed: Mutex<Vec<u64>> = Mutex::default();
    let total: Mutex<Summary> = Mutex::default();
    let start = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(count as usize);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    match isolated(&run, seed) {
                        Ok(s) => {
                            let mut t = total.lock().unwrap_or_else(PoisonError::into_inner);
                            t.cuts += s.cuts;
                            t.nested += s.nested;
                            t.recoveries += s.recoveries;
                            t.deeds += s.deeds;
                            t.time += s.time;
                        }
                        Err(what) => {
                            eprintln!("seed {seed} failed: {what}\n  again: CRYPTFOLD_SEED={seed} {again}");
                            failed.lock().unwrap_or_else(PoisonError::into_inner).push(seed);
                        }
                    }
                }
            });
        }
    });
    let Summary { cuts, nested, recoveries, deeds, time } =
        *total.lock().unwrap_or_else(PoisonError::into_inner);
    println!(
        "{count} seeds: {cuts} power cuts ({nested} while creating, recovering or closing), {recoveries} recoveries \
         verified, {deeds} changes of volumes, {:.0} s of virtual time in {:.1} s",
        time.as_secs_f64(),
        start.elapsed().as_secs_f64()
    );
    let mut failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.sort_unstable();
    assert!(failed.is_empty(), "{} of {count} seeds failed: {failed:?}", failed.len());
}

/// A thread for each seed: what a power cut leaves in thread-local tables goes with it. Panics become failures.
pub(super) fn isolated<T: Send>(
    run: &(impl Fn(u64) -> Result<T, String> + Sync),
    seed: u64,
) -> Result<T, String> {
    let caught = std::thread::scope(|scope| {
        let body = || catch_unwind(AssertUnwindSafe(|| run(seed)));
        std::thread::Builder::new().name(format!("seed {seed}")).spawn_scoped(scope, body).map(|t| t.join())
    });
    match caught {
        Ok(Ok(Ok(result))) => result,
        Ok(Ok(Err(panic)) | Err(panic)) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("of an unknown kind");
            Err(format!("panic: {text}"))
        }
        Err(error) => Err(format!("no thread for the seed: {error}")),
    }
}
