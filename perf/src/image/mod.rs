//! `cryptfold-perf image`: real data for volumes. Lays files into an image as a file system would, writes an image to a
//! namespace, plain or as a host's dm-crypt would have encrypted it, and compares a namespace with it.

mod make;
mod transfer;

pub use make::{Made, MakeArgs, make};
pub use transfer::{TransferArgs, Transferred};

/// What to do.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum Command {
    /// Lay regular files one after the other into an image, each from a 4 KiB boundary on, as a file system stores them
    Make(MakeArgs),
    /// Write an image to a namespace, from its first block on
    Write(TransferArgs),
    /// Compare a namespace with an image
    Compare(TransferArgs),
}

/// Runs and reports.
///
/// # Errors
/// What went wrong, in one line; also when the namespace differs from the image.
pub fn run(command: &Command) -> Result<(), String> {
    match command {
        Command::Make(args) => {
            let made = make(args)?;
            if args.json {
                println!(
                    "{}",
                    serde_json::json!({"bytes": made.bytes, "files": made.files, "skipped": made.skipped})
                );
            } else {
                println!(
                    "{}: {} bytes of {} files ({} could not be read)",
                    args.out.display(),
                    made.bytes,
                    made.files,
                    made.skipped
                );
            }
            Ok(())
        }
        Command::Write(args) => transfer::write(args)?.report(args),
        Command::Compare(args) => transfer::compare(args)?.report(args),
    }
}
