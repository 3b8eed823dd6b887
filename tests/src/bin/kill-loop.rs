//! `kill-loop [N] [--seed S]`: kills the real program N times under load; see [`cryptfold_tests::kill`].

use std::process::ExitCode;

use clap::Parser;
use cryptfold_tests::announce_seed;
use cryptfold_tests::kill::{Options, find_or_build, run};

/// Kills a target under write load and verifies every restart.
#[derive(Parser)]
struct Args {
    /// Kills under load.
    #[arg(default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    kills: u64,
    /// Decides what is written and when to kill; from the clock when not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Change keys under the load.
    #[arg(long)]
    keys: bool,
    /// Tell every round.
    #[arg(short, long)]
    verbose: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let seed = announce_seed(args.seed);
    let done = find_or_build().and_then(|program| {
        run(&Options {
            program,
            kills: args.kills,
            seed,
            forget: false,
            keys: args.keys,
            verbose: args.verbose,
        })
    });
    match done {
        Ok(summary) => {
            println!("{summary}");
            ExitCode::SUCCESS
        }
        Err(what) => {
            eprintln!("kill-loop: error: {what}");
            ExitCode::FAILURE
        }
    }
}
