//! What is behind a device: an open file or block device, its size and its alignment.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cryptfold_bdev::BdevError;

/// Longest wait for a lock.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

pub(crate) struct Backing {
    file: File,
    path: PathBuf,
    pub size_bytes: u64,
    /// Smallest unit that can be written: 512 for files.
    pub logical_block_bytes: u32,
    /// What O_DIRECT wants of addresses, offsets and lengths; 1 without O_DIRECT.
    pub align_bytes: usize,
    pub direct: bool,
    pub block_device: bool,
}

impl Backing {
    pub fn open(path: &Path, read_only: bool) -> Result<Backing, BdevError> {
        let os = |what: &str, e: &std::io::Error| BdevError::os(format!("{what} {}", path.display()), e);
        let kind = std::fs::metadata(path).map_err(|e| os("cannot open", &e))?.file_type();
        let block_device = kind.is_block_device();
        if !block_device && !kind.is_file() {
            return Err(BdevError::Invalid(format!(
                "{} is neither a file nor a block device",
                path.display()
            )));
        }
        let open = |direct: bool| {
            let mut flags = libc::O_CLOEXEC;
            if direct {
                flags |= libc::O_DIRECT;
            }
            if block_device && !read_only {
                // A mounted or otherwise claimed device answers "busy" instead of being overwritten.
                flags |= libc::O_EXCL;
            }
            OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)
        };
        let (file, direct) = match open(true) {
            Ok(f) => (f, true),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                tracing::warn!(
                    "{}: its file system has no O_DIRECT, the page cache stays in between",
                    path.display()
                );
                (open(false).map_err(|e| os("cannot open", &e))?, false)
            }
            Err(e) => return Err(os("cannot open", &e)),
        };
        lock(&file, path, read_only)?;
        let size_bytes = end_of(&file).map_err(|e| os("cannot find the size of", &e))?;
        let logical_block_bytes = if block_device { logical_block(path) } else { 512 };
        // File systems answer 512 or the page size here (statx DIOALIGN); 4096 suits all of them.
        let align_bytes =
            if direct { if block_device { logical_block_bytes as usize } else { 512 } } else { 1 };
        Ok(Backing {
            file,
            path: path.into(),
            size_bytes,
            logical_block_bytes,
            align_bytes,
            direct,
            block_device,
        })
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub fn current_size_bytes(&self) -> Result<u64, BdevError> {
        end_of(&self.file)
            .map_err(|e| BdevError::os(format!("cannot find the size of {}", self.path.display()), &e))
    }
}

fn end_of(file: &File) -> std::io::Result<u64> {
    let mut f = file;
    f.seek(SeekFrom::End(0))
}

/// Two targets on one file would destroy it: an advisory lock for the life of the descriptor. The kernel takes down the
/// ring of a process that was killed, with its last I/O, after the process is gone: the lock is awaited for that time.
pub(crate) fn lock(file: &File, path: &Path, shared: bool) -> Result<(), BdevError> {
    let attempt = || if shared { file.try_lock_shared() } else { file.try_lock() };
    let begin = Instant::now();
    let mut result = attempt();
    while matches!(result, Err(std::fs::TryLockError::WouldBlock)) && begin.elapsed() < LOCK_PATIENCE {
        std::thread::sleep(LOCK_PATIENCE / 100);
        result = attempt();
    }
    match result {
        Ok(()) => Ok(()),
        Err(std::fs::TryLockError::WouldBlock) => Err(BdevError::Claimed {
            name: path.display().to_string(),
            by: "another process (it holds the file's lock)".into(),
        }),
        Err(std::fs::TryLockError::Error(e)) => {
            Err(BdevError::os(format!("cannot lock {}", path.display()), &e))
        }
    }
}

/// `/sys/class/block/<name>/queue/logical_block_size`, of the whole disk for a partition.
fn logical_block(path: &Path) -> u32 {
    let name = path.canonicalize().ok().and_then(|p| p.file_name().map(|n| n.to_owned()));
    let Some(name) = name else { return 512 };
    let sys = Path::new("/sys/class/block").join(name);
    ["queue/logical_block_size", "../queue/logical_block_size"]
        .iter()
        .filter_map(|f| std::fs::read_to_string(sys.canonicalize().ok()?.join(f)).ok())
        .find_map(|t| t.trim().parse().ok())
        .unwrap_or(512)
}
