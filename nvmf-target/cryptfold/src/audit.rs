//! `cryptfold audit`: what is in an audit log, and whether it is whole.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use cryptfold_control::audit::{Hash, MAX_RECORD_BYTES, Record, Verifier};
use serde_json::{Value, json};

use crate::Failure;

/// Audit logs that `cryptfold target --audit-log` wrote.
#[derive(Subcommand)]
pub enum AuditCommand {
    /// Check that no record was changed, removed, inserted or put in another order. What was cut off at the end shows only
    /// against a hash noted elsewhere (--head): the target's own log has some.
    Verify(VerifyArgs),
    /// Print the records; broken lines are marked, and make it fail at the end.
    Show(ShowArgs),
}

#[derive(Args)]
pub struct VerifyArgs {
    /// The log, or its parts, oldest first; - is standard input (zcat LOG.2.gz | cryptfold audit verify - LOG.1 LOG).
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Hash that was noted elsewhere; a record with it has to be there.
    #[arg(long, value_name = "HASH")]
    head: Option<Hash>,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct ShowArgs {
    /// The log; - is standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The records as they are, one JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(command: AuditCommand) -> Result<(), Failure> {
    match command {
        AuditCommand::Verify(args) => verify(&args),
        AuditCommand::Show(args) => show(&args),
    }
}

/// A line of a file.
enum Line {
    Whole(Vec<u8>),
    /// The last one, without its end.
    Torn(usize),
}

struct Lines {
    name: String,
    from: Box<dyn BufRead>,
    number: u64,
}

impl Lines {
    fn open(path: &Path) -> Result<Lines, String> {
        let name = path.display().to_string();
        let from: Box<dyn BufRead> = match name.as_str() {
            "-" => Box::new(BufReader::new(std::io::stdin())),
            _ => Box::new(BufReader::new(File::open(path).map_err(|e| format!("{name}: {e}"))?)),
        };
        Ok(Lines { name, from, number: 0 })
    }

    fn next(&mut self) -> Result<Option<Line>, String> {
        let mut line = Vec::new();
        let mut limited = self.from.by_ref().take(MAX_RECORD_BYTES as u64);
        limited.read_until(b'\n', &mut line).map_err(|e| format!("{}: {e}", self.name))?;
        self.number += 1;
        match line.last() {
            None => Ok(None),
            Some(b'\n') => {
                line.pop();
                Ok(Some(Line::Whole(line)))
            }
            Some(_) if line.len() == MAX_RECORD_BYTES => {
                // Too long for a record: the rest of it is no line of its own.
                self.skip_line()?;
                Ok(Some(Line::Whole(line)))
            }
            Some(_) => Ok(Some(Line::Torn(line.len()))),
        }
    }

    fn skip_line(&mut self) -> Result<(), String> {
        loop {
            let piece = self.from.fill_buf().map_err(|e| format!("{}: {e}", self.name))?;
            let (used, end) = match piece.iter().position(|b| *b == b'\n') {
                Some(n) => (n + 1, true),
                None => (piece.len(), piece.is_empty()),
            };
            self.from.consume(used);
            if end {
                return Ok(());
            }
        }
    }
}

fn verify(args: &VerifyArgs) -> Result<(), Failure> {
    let mut chain = Verifier::default();
    let (mut found, mut begun) = (args.head.is_none(), false);
    let mut parts = Vec::new();
    for path in &args.files {
        let mut lines = Lines::open(path)?;
        let mut ends: Option<(Record, Record)> = None;
        let mut torn = 0;
        while let Some(line) = lines.next()? {
            match line {
                Line::Torn(bytes) => torn = bytes,
                Line::Whole(bytes) => {
                    let checked = chain.next(&bytes);
                    let record =
                        checked.map_err(|flaw| format!("{}, line {}: {flaw}", lines.name, lines.number))?;
                    found |= args.head == Some(record.hash);
                    let cut = !std::mem::replace(&mut begun, true) && record.seq != 1;
                    if cut && !args.json {
                        println!(
                            "{}: begins with record {}; what was before is not here",
                            lines.name, record.seq
                        );
                    }
                    let first = ends.take().map_or_else(|| record.clone(), |(first, _)| first);
                    ends = Some((first, record));
                }
            }
        }
        parts.push(part(&lines.name, ends.as_ref(), torn));
        if !args.json {
            report(&lines.name, ends.as_ref(), torn);
        }
    }
    if args.json {
        println!("{:#}", Value::from(parts));
    }
    if !begun {
        return Err("there is no record".to_owned().into());
    }
    if !found {
        let head = args.head.unwrap_or_default();
        return Err(
            format!("no record has the hash {head}: the end of the log was cut off or replaced").into()
        );
    }
    Ok(())
}

/// A file of the log: its first and its last record, and bytes of one that was not finished.
fn part(file: &str, ends: Option<&(Record, Record)>, torn_bytes: usize) -> Value {
    let record = |r: &Record| json!({"seq": r.seq, "time": r.time, "hash": r.hash.to_string()});
    let (first, last) = (ends.map(|(first, _)| record(first)), ends.map(|(_, last)| record(last)));
    json!({"file": file, "first": first, "last": last, "torn_bytes": torn_bytes})
}

fn report(file: &str, ends: Option<&(Record, Record)>, torn_bytes: usize) {
    match ends {
        None => println!("{file}: no record"),
        Some((first, last)) => println!(
            "{file}: records {} to {}, {} to {}, last hash {}",
            first.seq, last.seq, first.time, last.time, last.hash
        ),
    }
    if torn_bytes > 0 {
        println!("{file}: {torn_bytes} bytes of a record that was not finished");
    }
}

fn show(args: &ShowArgs) -> Result<(), Failure> {
    let mut lines = Lines::open(&args.file)?;
    let (mut chain, mut flaws) = (Verifier::default(), 0);
    let mut out = std::io::stdout().lock();
    while let Some(line) = lines.next()? {
        let printed = match line {
            Line::Torn(bytes) => {
                writeln!(std::io::stderr(), "{}: {bytes} bytes of a record that was not finished", lines.name)
            }
            Line::Whole(bytes) => match chain.next(&bytes) {
                Ok(record) if args.json => writeln!(out, "{}", Value::Object(record.members)),
                Ok(record) => writeln!(out, "{}", text(&record)),
                Err(flaw) => {
                    flaws += 1;
                    writeln!(std::io::stderr(), "{}, line {}: {flaw}", lines.name, lines.number)
                }
            },
        };
        printed.map_err(|e| format!("output: {e}"))?;
    }
    match flaws {
        0 => Ok(()),
        n => Err(format!("{}: {n} lines are broken", lines.name).into()),
    }
}

/// For people: nothing in it can move a terminal's cursor.
fn text(record: &Record) -> String {
    let mut line = format!("{} {:>6} {}", escaped(&record.time), record.seq, escaped(&record.event));
    for (name, value) in &record.members {
        if matches!(name.as_str(), "seq" | "time" | "event" | "prev" | "hash") {
            continue;
        }
        // What hosts say of themselves may look like fields: in quotes it does not.
        let value = match value.as_str() {
            Some(s) if !s.is_empty() && s.chars().all(|c| c.is_ascii_graphic()) => s.to_owned(),
            Some(s) => format!("{s:?}"),
            None => value.to_string(),
        };
        line.push_str(&format!("  {}={}", escaped(name), escaped(&value)));
    }
    line
}

fn escaped(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}
