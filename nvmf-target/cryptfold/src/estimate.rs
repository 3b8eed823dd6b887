//! `cryptfold estimate`: what a pool would make of files and devices. Reads only.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use clap::Args;
use cryptfold_reduce::estimate::{Estimate, Estimated, PIECE_BYTES};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::{Failure, size};

#[derive(Args)]
pub struct EstimateArgs {
    /// Files, block devices and directories (all files below; links are not followed, a file with several names counts once).
    #[arg(required = true, value_name = "PATH|DEVICE")]
    paths: Vec<PathBuf>,
    /// The pool's compression: off, lz4, zstd:N, adaptive.
    #[arg(long, default_value = "adaptive")]
    compression: String,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

/// What is to be read.
#[derive(Default)]
struct Found {
    files: Vec<(PathBuf, u64)>,
    bytes: u64,
    skipped: u64,
    seen: HashSet<(u64, u64)>,
}

impl Found {
    /// What was named has to be readable; what lies below is counted if it is not.
    fn add(&mut self, path: &Path, named: bool) -> Result<(), String> {
        let meta = if named { fs::metadata(path) } else { fs::symlink_metadata(path) };
        let meta = match meta {
            Ok(meta) => meta,
            Err(error) if named => return Err(format!("{}: {error}", path.display())),
            Err(_) => {
                self.skipped += 1;
                return Ok(());
            }
        };
        let kind = meta.file_type();
        if kind.is_dir() {
            match fs::read_dir(path) {
                Ok(entries) => {
                    let mut below: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
                    below.sort();
                    below.iter().try_for_each(|path| self.add(path, false))?;
                }
                Err(error) if named => return Err(format!("{}: {error}", path.display())),
                Err(_) => self.skipped += 1,
            }
            return Ok(());
        }
        let device = kind.is_block_device();
        if !(kind.is_file() || named && device) {
            if named {
                return Err(format!("{}: a file, a directory or a block device is needed", path.display()));
            }
            return Ok(());
        }
        if self.seen.insert((meta.dev(), meta.ino())) {
            let bytes = if device { device_bytes(path)? } else { meta.len() };
            self.bytes += bytes;
            self.files.push((path.to_owned(), bytes));
        }
        Ok(())
    }
}

fn device_bytes(path: &Path) -> Result<u64, String> {
    let end = File::open(path).and_then(|mut file| file.seek(SeekFrom::End(0)));
    end.map_err(|error| format!("{}: {error}", path.display()))
}

fn read(path: &Path, estimate: &mut Estimate, bar: &ProgressBar) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let mut len = 0;
        while len < piece.len() {
            match file.read(&mut piece[len..]) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if len == 0 {
            return Ok(());
        }
        estimate.add(&piece[..len]);
        bar.inc(len as u64);
        if len < piece.len() {
            return Ok(());
        }
    }
}

pub fn run(args: EstimateArgs) -> Result<(), Failure> {
    let compression = args.compression.parse().map_err(|error| Failure::Usage(format!("{error}")))?;
    let mut found = Found::default();
    for path in &args.paths {
        found.add(path, true)?;
    }
    let bar = if args.json { ProgressBar::hidden() } else { ProgressBar::new(found.bytes) };
    let style = "{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).map_err(|error| error.to_string())?);
    let mut estimate = Estimate::new(compression);
    let named = |path: &Path| args.paths.iter().any(|named| named == path);
    for (path, _) in &found.files {
        if let Err(error) = read(path, &mut estimate, &bar) {
            if named(path) {
                return Err(format!("{}: {error}", path.display()).into());
            }
            found.skipped += 1;
        }
    }
    bar.finish_and_clear();
    show(&estimate.finish(), &found, args.json);
    Ok(())
}

fn show(e: &Estimated, found: &Found, as_json: bool) {
    let (pool, ideal) = (e.pool_ratio(), e.ideal_ratio());
    let round = |ratio: Option<f64>| ratio.map(|ratio| (ratio * 1000.0).round() / 1000.0);
    if as_json {
        let mut out = json!(e);
        out["files"] = found.files.len().into();
        out["skipped"] = found.skipped.into();
        out["pool_ratio"] = json!(round(pool));
        out["ideal_ratio"] = json!(round(ideal));
        println!("{out:#}");
        return;
    }
    let ratio = |ratio: Option<f64>| ratio.map_or("nothing to store".into(), |ratio| format!("{ratio:.2}:1"));
    let row = |what: &str, bytes: u64, more: String| println!("{what:<38} {:>10}  {more}", size::show(bytes));
    let skipped =
        if found.skipped > 0 { format!(", {} could not be read", found.skipped) } else { String::new() };
    row("read", e.bytes, format!("{} files{skipped}", found.files.len()));
    row("zeros, which take nothing", e.zero_bytes, String::new());
    row("other repeated words, which take nothing", e.pattern_bytes, String::new());
    row("different 4 KiB blocks", e.unique_bytes, String::new());
    let pool_bytes = e.stored_bytes + e.metadata_bytes;
    let metadata = format!("{} without zeros; {} of it metadata", ratio(pool), size::show(e.metadata_bytes));
    row("in a pool", pool_bytes, metadata);
    row("ideal: 4 KiB blocks, zstd-1 per 16 KiB", e.ideal_bytes, format!("{} without zeros", ratio(ideal)));
}
