//! The command fuzzer with a few seeds, and by name the seeds that have found something once.

use cryptfold_tests::fuzz::{Options, Summary, run};
use cryptfold_tests::kill::find_or_build;

fn fuzz(seed: u64, sessions: u64, only: Option<u64>) -> Summary {
    let program = find_or_build().unwrap_or_else(|e| panic!("{e}"));
    let options = Options { program, seed, sessions, time: None, only };
    let summary = run(&options).unwrap_or_else(|what| panic!("{what}"));
    println!("seed {seed}: {summary}");
    assert_eq!(summary.sessions, sessions);
    summary
}

#[test]
fn random_commands_in_every_state() {
    for seed in 1..=4 {
        let s = fuzz(seed, 800, None);
        // Or it proves nothing.
        assert!(s.counts.commands > 20_000 && s.counts.succeeded > 3000 && s.counts.ended > 50, "{s}");
        assert!(s.counts.stages.len() == 8 && s.counts.opcodes.len() >= 18 && s.verified > 100, "{s}");
    }
}
