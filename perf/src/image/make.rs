//! Laying files into an image, in an order that depends on their names only.

use std::collections::HashSet;
use std::fs::{self, File, Metadata};
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::load::Bytes;

/// Where files begin.
const ALIGN: u64 = 4096;

/// How to make an image.
#[derive(clap::Args, Clone, Debug)]
pub struct MakeArgs {
    /// The image
    #[arg(long)]
    pub out: PathBuf,
    /// Stop at this size; the last file is cut
    #[arg(long, default_value = "2G")]
    pub max: Bytes,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
    /// Files and directories; links are not followed, a file with several names is taken once
    #[arg(required = true)]
    pub paths: Vec<PathBuf>,
}

/// What an image holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Made {
    /// Size of the image: a multiple of 4096.
    pub bytes: u64,
    /// Files in it.
    pub files: u64,
    /// Files and directories that could not be read.
    pub skipped: u64,
}

struct Maker {
    out: BufWriter<File>,
    max: u64,
    made: Made,
    /// (device, inode) of what is in the image, and of the image itself.
    seen: HashSet<(u64, u64)>,
    buf: Vec<u8>,
}

fn id(m: &Metadata) -> (u64, u64) {
    (m.dev(), m.ino())
}

/// Makes the image.
///
/// # Errors
/// When a path does not exist, nothing could be read, or the image can not be written.
pub fn make(args: &MakeArgs) -> Result<Made, String> {
    let out_error = |e: std::io::Error| format!("{}: {e}", args.out.display());
    for path in &args.paths {
        fs::symlink_metadata(path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let max = args.max.0 / ALIGN * ALIGN;
    if max == 0 {
        return Err(format!("--max {}: an image has at least {ALIGN} bytes", args.max.0));
    }
    let out = File::create(&args.out).map_err(out_error)?;
    let seen = HashSet::from([id(&out.metadata().map_err(out_error)?)]);
    let mut maker = Maker {
        out: BufWriter::with_capacity(1 << 20, out),
        max,
        made: Made::default(),
        seen,
        buf: vec![0; 1 << 20],
    };
    for path in &args.paths {
        // What is named may be a link; what lies below is not followed.
        let path = fs::canonicalize(path).map_err(|e| format!("{}: {e}", path.display()))?;
        maker.walk(&path).map_err(out_error)?;
    }
    maker.out.flush().map_err(out_error)?;
    if maker.made.bytes == 0 {
        return Err("no file with content was found".into());
    }
    Ok(maker.made)
}

impl Maker {
    fn full(&self) -> bool {
        self.made.bytes >= self.max
    }

    /// Errors are those of the image; what can not be read is counted.
    fn walk(&mut self, path: &Path) -> std::io::Result<()> {
        if self.full() {
            return Ok(());
        }
        let Ok(meta) = fs::symlink_metadata(path) else {
            self.made.skipped += 1;
            return Ok(());
        };
        if meta.is_dir() {
            let Ok(entries) = fs::read_dir(path) else {
                self.made.skipped += 1;
                return Ok(());
            };
            let mut names: Vec<_> = entries.filter_map(|e| Some(e.ok()?.file_name())).collect();
            names.sort();
            return names.iter().try_for_each(|name| self.walk(&path.join(name)));
        }
        if meta.is_file() && self.seen.insert(id(&meta)) {
            self.add(path)?;
        }
        Ok(())
    }

    fn add(&mut self, path: &Path) -> std::io::Result<()> {
        let Ok(file) = File::open(path) else {
            self.made.skipped += 1;
            return Ok(());
        };
        let start = self.made.bytes;
        let mut file = file.take(self.max - start);
        loop {
            match file.read(&mut self.buf) {
                Ok(0) => break,
                Ok(n) => {
                    self.out.write_all(&self.buf[..n])?;
                    self.made.bytes += n as u64;
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.made.skipped += 1;
                    break;
                }
            }
        }
        if self.made.bytes > start {
            self.made.files += 1;
        }
        let padding = self.made.bytes.next_multiple_of(ALIGN) - self.made.bytes;
        self.made.bytes += padding;
        self.out.write_all(&vec![0; padding as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_lie_at_4_kib_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().expect("a directory");
        let put = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("has one")).expect("made");
            fs::write(path, bytes).expect("written");
        };
        put("in/b", &[2; 5000]);
        put("in/a/z", &[1; 10]);
        put("in/c", &[]);
        put("in/d", &[4; 4096]);
        fs::hard_link(dir.path().join("in/b"), dir.path().join("in/e")).expect("linked");
        std::os::unix::fs::symlink("b", dir.path().join("in/f")).expect("linked");
        let out = dir.path().join("in/image");
        let mut args = MakeArgs {
            out: out.clone(),
            max: Bytes(1 << 20),
            json: false,
            paths: vec![dir.path().join("in")],
        };
        let made = make(&args).expect("makes");
        assert_eq!(made, Made { bytes: 4 * 4096, files: 3, skipped: 0 });
        let mut want = vec![0; 4 * 4096];
        want[..10].fill(1);
        want[4096..9096].fill(2);
        want[12_288..].fill(4);
        assert_eq!(fs::read(&out).expect("there"), want);
        args.max = Bytes(9000);
        assert_eq!(make(&args).expect("makes").bytes, 8192);
        assert_eq!(fs::read(&out).expect("there"), want[..8192]);
        args.paths = vec![dir.path().join("none")];
        assert!(make(&args).expect_err("is not there").contains("none"));
    }
}
