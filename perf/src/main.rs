//! The program `cryptfold-perf`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use cryptfold_perf::{bdev, figures, image, management, nvmf, primitives, steady, suite};

/// Measures cryptfold and what it is made of.
#[derive(Parser)]
#[command(name = "cryptfold-perf", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Figures(figures::Args),
    Primitives(primitives::Args),
    Bdev(bdev::Args),
    Nvmf(nvmf::Args),
    Management(management::Args),
    Steady(steady::Args),
    Suite(suite::Args),
    #[command(subcommand)]
    Image(image::Command),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "error".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let ended = match Cli::parse().command {
        Command::Figures(args) => figures::run(&args),
        Command::Primitives(args) => primitives::run(&args).map_err(|e| e.to_string()),
        Command::Bdev(args) => bdev::run(&args),
        Command::Nvmf(args) => nvmf::run(&args),
        Command::Management(args) => management::run(&args),
        Command::Steady(args) => steady::run(&args),
        Command::Suite(args) => suite::run(&args),
        Command::Image(command) => image::run(&command),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("cryptfold-perf: {e}");
            ExitCode::FAILURE
        }
    }
}
