//! What shells and people around the program want: completion scripts, manual pages, a question before something is destroyed.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;

use clap::Args;

use crate::{Failure, commands};

#[derive(Args)]
pub struct CompletionArgs {
    /// Whose completion script is printed.
    shell: clap_complete::Shell,
}

pub fn completion(args: CompletionArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut commands(), "cryptfold", &mut script);
    std::io::stdout().write_all(&script).map_err(|e| Failure::Failed(format!("standard output: {e}")))
}

#[derive(Args)]
pub struct ManArgs {
    /// Directory for the pages (section 1), a page for each command; it is made if it is missing.
    dir: PathBuf,
}

pub fn man(args: ManArgs) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::Failed(format!("{}: {e}", args.dir.display()));
    std::fs::create_dir_all(&args.dir).map_err(failed)?;
    clap_mangen::generate_to(commands(), &args.dir).map_err(failed)
}

/// Asks on the terminal before `what` ("delete volume p/v with all its data") is done; without one, `--yes` has to say it.
pub fn confirm(what: &str, yes: bool) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Failure::Usage(format!("to {what} needs --yes where nobody can be asked")));
    }
    eprint!("cryptfold: {what}? [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).map_err(|e| Failure::Failed(format!("terminal: {e}")))?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Failure::Failed("nothing was done".into())),
    }
}
