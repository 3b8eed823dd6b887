//! `nvme-fuzz [--seed S] [--sessions N] [--seconds T] [--only SESSION]`: see [`cryptfold_tests::fuzz`].

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use cryptfold_tests::announce_seed;
use cryptfold_tests::fuzz::{Options, run};
use cryptfold_tests::kill::find_or_build;

/// Random NVMe commands in every state of a controller against a target of its own.
#[derive(Parser)]
struct Args {
    /// Decides what is sent; from the clock when not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Sessions in all.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    sessions: u64,
    /// Begin no session after so many seconds.
    #[arg(long)]
    seconds: Option<u64>,
    /// Runs only the session of this seed, `--sessions` times.
    #[arg(long)]
    only: Option<u64>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let seed = announce_seed(args.seed);
    let done = find_or_build().and_then(|program| {
        let time = args.seconds.map(Duration::from_secs);
        run(&Options { program, seed, sessions: args.sessions, time, only: args.only })
    });
    match done {
        Ok(summary) => {
            println!("{summary}");
            ExitCode::SUCCESS
        }
        Err(what) => {
            eprintln!("nvme-fuzz: error: {what}");
            ExitCode::FAILURE
        }
    }
}
