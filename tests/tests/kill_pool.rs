//! A few kills of the real program under load (`scripts/kill-loop` does a hundred), and that lost data would be noticed.

use cryptfold_tests::kill::{Options, find_or_build, run};

fn options(kills: u64) -> Options {
    let program = find_or_build().unwrap_or_else(|e| panic!("{e}"));
    Options { program, kills, seed: 1, forget: false, keys: false, verbose: false }
}

#[test]
fn kills_under_load_lose_nothing_flushed() {
    let summary = run(&options(5)).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(summary.kills, 5);
    assert!(summary.done.writes > 0 && summary.done.flushes > 0 && summary.audited > 0, "{summary}");
    assert!(summary.cut > 0, "something was under way at the kills: {summary}");
    println!("{summary}");
}

#[test]
fn kills_while_keys_change_lose_nothing_and_undo_nothing() {
    let summary = run(&Options { keys: true, ..options(8) }).unwrap_or_else(|e| panic!("{e}"));
    assert!(summary.changes >= 2 && summary.changes_cut > 0, "{summary}");
    let [done, not] = summary.erasures;
    assert!(done >= 2 && done + not == 4, "{summary}");
    println!("{summary}");
}

/// Negative control: a pool that has forgotten what was flushed must not pass.
#[test]
fn forgotten_flushes_are_noticed() {
    let what = run(&Options { forget: true, ..options(1) }).expect_err("it was forgotten");
    assert!(what.contains("recovery of") && what.contains("an older version"), "{what}");
}
