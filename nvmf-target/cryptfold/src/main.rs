//! `cryptfold`: an NVMe/TCP target that encrypts and reduces, and the commands to look after it.
//!
//! Exit codes: 0, 1 for what went wrong (one line on standard error), 2 for wrong usage, 3 for a key or
//! password that does not fit.

mod audit;
mod cores;
mod encryption;
mod estimate;
mod export;
mod host;
mod reference;
mod rpc;
mod shell;
mod signals;
mod size;
mod status;
mod target;
mod top;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use cryptfold_control::server::DEFAULT_SOCKET;

#[derive(Parser)]
#[command(
    name = "cryptfold",
    version,
    about = "NVMe/TCP target that encrypts and reduces",
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a target until it gets SIGTERM or SIGINT.
    Target(target::TargetArgs),
    /// Call a method of a running target and print its result.
    Rpc(rpc::RpcArgs),
    /// Show pools, volumes, subsystems and reactors of a running target.
    Status(status::StatusArgs),
    /// Show what a running target does, now, until q is pressed.
    Top(top::TopArgs),
    /// Print what hosts type to connect.
    Connect(export::ConnectArgs),
    /// Pools of a running target.
    #[command(subcommand)]
    Pool(rpc::PoolCommand),
    /// Read files or devices and tell what a pool would make of them.
    Estimate(estimate::EstimateArgs),
    /// Volumes of a running target.
    #[command(subcommand)]
    Volume(rpc::VolumeCommand),
    /// What opens the pools of a running target. Passwords come from a file, the terminal or standard input.
    #[command(subcommand)]
    Encryption(encryption::EncryptionCommand),
    /// LUKS2 volumes whose keys are at a key server: a host's commands, and what a target makes of them.
    #[command(subcommand)]
    Host(host::HostCommand),
    /// What is in an audit log, and whether it is whole.
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Print a completion script for a shell.
    Completion(shell::CompletionArgs),
    /// Write manual pages.
    Man(shell::ManArgs),
}

/// How a running target is reached.
#[derive(Args, Clone)]
struct SocketArgs {
    /// RPC socket of the target.
    #[arg(short = 'r', long = "rpc-socket", value_name = "SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

/// One line that names the thing and the way out.
enum Failure {
    /// Something went wrong: exit code 1.
    Failed(String),
    /// Called wrongly: exit code 2.
    Usage(String),
    /// The key or password does not fit, or is not there: exit code 3.
    Key(String),
}

impl From<String> for Failure {
    fn from(what: String) -> Failure {
        Failure::Failed(what)
    }
}

/// At the end of every help and manual page.
const EXIT_CODES: &str = "Exit codes: 0 done; 1 it went wrong, and a line on standard error says what; 2 called wrongly; \
    3 the key or password does not fit or is not there.";

/// The whole command line.
fn commands() -> clap::Command {
    fn with_codes(command: clap::Command) -> clap::Command {
        command.after_help(EXIT_CODES).mut_subcommands(with_codes)
    }
    with_codes(Cli::command())
}

fn main() -> ExitCode {
    let parsed = Cli::from_arg_matches(&commands().get_matches());
    let command = parsed.unwrap_or_else(|e| e.exit()).command;
    if !matches!(command, Command::Target(_)) {
        signals::end_with_pipes();
    }
    let done = match command {
        Command::Target(a) => target::run(a),
        Command::Rpc(a) => rpc::run(a),
        Command::Status(a) => status::run(a),
        Command::Top(a) => top::run(a),
        Command::Connect(a) => export::connect(a),
        Command::Completion(a) => shell::completion(a),
        Command::Man(a) => shell::man(a),
        Command::Estimate(a) => estimate::run(a),
        Command::Pool(c) => rpc::pool(c),
        Command::Volume(c) => rpc::volume(c),
        Command::Encryption(c) => encryption::run(c),
        Command::Host(c) => host::run(c),
        Command::Audit(c) => audit::run(c),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let (what, code) = match failure {
                Failure::Failed(what) => (what, 1),
                Failure::Usage(what) => (what, 2),
                Failure::Key(what) => (what, 3),
            };
            eprintln!("cryptfold: {}", what.replace('\n', " "));
            ExitCode::from(code)
        }
    }
}
