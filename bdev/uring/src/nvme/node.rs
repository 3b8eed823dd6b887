//! A namespace's character device (`/dev/ng0n1`): who it is, what it can, and that nobody else has it. One of the crate's
//! modules with unsafe code: ioctls.
//!
//! Nothing but the block device of the same namespace knows whether it is mounted or claimed, so that is held open exclusively
//! as long as the node is used.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use cryptfold_bdev::{BdevError, DeviceInfo};
use cryptfold_bdev_nvme::identity::{Common, Target, status_of, text};
use cryptfold_nvmf_spec::features::{Fid, VolatileWriteCache};
use cryptfold_nvmf_spec::identify::{
    Cns, DescriptorList, IdentifyController, NamespaceIdentify, NvmController,
};
use cryptfold_nvmf_spec::opcode::Admin;
use cryptfold_nvmf_spec::property::Vs;
use cryptfold_nvmf_spec::{Nsid, Sqe, status::Status as Wire};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use super::abi;
use crate::file::lock;

/// Memory page of the kernel, bytes: what one segment of a transfer may be as little as.
const PAGE_BYTES: u64 = 4096;
/// Largest transfer of one command where the kernel does not say, bytes.
const DEFAULT_TRANSFER_BYTES: u64 = 128 << 10;
/// Largest that is used, bytes.
const MAX_TRANSFER_BYTES: u64 = 1 << 20;

/// An open node.
pub(crate) struct Node {
    file: File,
    path: PathBuf,
    /// The block device of the namespace.
    _claim: Option<File>,
    nsid: Nsid,
    transfer_bytes: u64,
    /// Model and serial number, for people.
    pub controller: (String, String),
}

/// What /sys knows about a namespace's block device.
#[derive(Debug, PartialEq, Eq)]
struct Sibling {
    /// `nvme0n1`.
    name: String,
    /// `259:0`.
    dev: String,
    /// What the kernel lets one command move, bytes.
    transfer_bytes: u64,
}

/// Whether `path` is a character device.
pub(crate) fn is_character_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_char_device())
}

fn os(what: &str, path: &Path, e: &std::io::Error) -> BdevError {
    BdevError::os(format!("{what} {}", path.display()), e)
}

impl Node {
    /// Opens a node below `sys` (`/sys`). May block.
    ///
    /// # Errors
    /// No NVMe namespace, no permission, mounted or used by somebody else.
    pub fn open(sys: &Path, path: &Path, read_only: bool) -> Result<Node, BdevError> {
        let number = std::fs::metadata(path).map_err(|e| os("cannot open", path, &e))?.rdev();
        let (major, minor) = (libc::major(number), libc::minor(number));
        let known = generic(sys, &format!("{major}:{minor}")).ok_or_else(|| {
            BdevError::Invalid(format!(
                "{} is a character device, but no NVMe namespace: a file, a block device or /dev/ng0n1 is possible",
                path.display()
            ))
        })?;
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)
            .map_err(|e| os("cannot open", path, &e))?;
        lock(&file, path, read_only)?;
        let sibling = sibling(&known);
        let claim = match &sibling {
            Some(sibling) if !read_only => Some(claim(path, sibling)?),
            _ => None,
        };
        // SAFETY: no memory is named.
        let nsid = unsafe { libc::ioctl(file.as_raw_fd(), abi::IOCTL_ID) };
        let nsid = u32::try_from(nsid)
            .map_err(|_| os("no namespace identifier from", path, &std::io::Error::last_os_error()))?;
        let transfer_bytes = sibling.map_or(DEFAULT_TRANSFER_BYTES, |s| s.transfer_bytes);
        Ok(Node {
            file,
            path: path.into(),
            _claim: claim,
            nsid: Nsid(nsid),
            transfer_bytes: transfer_bytes.min(MAX_TRANSFER_BYTES),
            controller: Default::default(),
        })
    }

    /// The namespace as a device.
    ///
    /// # Errors
    /// It does not answer, or has a format that can not be used.
    pub fn device(&mut self, name: String, product: &'static str) -> Result<(DeviceInfo, Target), BdevError> {
        let id: Box<IdentifyController> = self.identify("Identify Controller", Cns::Controller, Nsid(0))?;
        self.controller = (text(&id.mn), text(&id.sn));
        let mut write_cache = id.vwc & 1 != 0;
        if write_cache {
            let mut sqe = Sqe::new(Admin::GetFeatures as u8);
            sqe.cdw10 = U32::new(Fid::VolatileWriteCache as u32);
            // Who may not ask, or gets no answer, has it on as far as we know.
            if let Ok(value) = self.admin("Get Features (write cache)", &sqe, &mut []) {
                write_cache = VolatileWriteCache(value).0 & 1 != 0;
            }
        }
        // Not everybody of that version has them, and the kernel asks for privileges.
        let version = id.ver.get();
        let nvm: Option<Box<NvmController>> = (version >= Vs::V1_4.0)
            .then(|| self.identify("Identify NVM Controller", Cns::CsController, Nsid(0)).ok())
            .flatten();
        let ids: Option<Box<DescriptorList>> = (version >= Vs::V1_3.0)
            .then(|| self.identify("namespace descriptors", Cns::NamespaceDescriptors, self.nsid).ok())
            .flatten();
        let common = Common::new(id, write_cache, nvm.as_deref());
        let id = self.namespace()?;
        let (info, target) = common
            .device((name, product), self.nsid, &id, ids.as_deref(), self.transfer_bytes)
            .map_err(|why| self.invalid(&why))?;
        if !matches!(info.block_size_bytes, 512 | 4096) {
            return Err(self
                .invalid(&format!("blocks of {} bytes; 512 and 4096 are possible", info.block_size_bytes)));
        }
        Ok((info, target))
    }

    /// Blocks, now.
    ///
    /// # Errors
    /// It does not answer.
    pub fn blocks(&self) -> Result<u64, BdevError> {
        Ok(self.namespace()?.nsze.get())
    }

    fn namespace(&self) -> Result<Box<NamespaceIdentify>, BdevError> {
        self.identify("Identify Namespace", Cns::Namespace, self.nsid)
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub fn nsid(&self) -> Nsid {
        self.nsid
    }

    fn invalid(&self, why: &str) -> BdevError {
        BdevError::Invalid(format!("{}: {why}", self.path.display()))
    }

    fn identify<T: FromBytes + IntoBytes>(
        &self,
        what: &str,
        cns: Cns,
        nsid: Nsid,
    ) -> Result<Box<T>, BdevError> {
        const { assert!(size_of::<T>() == 4096) };
        let mut sqe = Sqe::new(Admin::Identify as u8);
        sqe.nsid = U32::new(nsid.0);
        sqe.cdw10 = U32::new(cns as u32);
        let mut data = Box::new(T::new_zeroed());
        self.admin(what, &sqe, data.as_mut_bytes())?;
        Ok(data)
    }

    /// An admin command that reads. Replies dword 0 of its completion.
    fn admin(&self, what: &str, sqe: &Sqe, data: &mut [u8]) -> Result<u32, BdevError> {
        let mut command = abi::Command::new(sqe, data.as_mut_ptr() as u64, data.len() as u32);
        if data.is_empty() {
            command.addr = 0;
        }
        // SAFETY: a structure of the kernel's layout, which names `data` with its length; both live until the call returns.
        let result = unsafe { libc::ioctl(self.fd(), abi::IOCTL_ADMIN_CMD, &raw mut command) };
        match result {
            0 => Ok(command.result),
            error if error < 0 => Err(os(&format!("{what}:"), &self.path, &std::io::Error::last_os_error())),
            wire => Err(BdevError::Io {
                what: format!("{what}: {}", self.path.display()),
                status: status_of(Wire(wire as u16)),
            }),
        }
    }
}

/// Where /sys keeps a character device, if that is a namespace.
fn generic(sys: &Path, number: &str) -> Option<PathBuf> {
    let dir = sys.join("dev/char").join(number).canonicalize().ok()?;
    let class = dir.join("subsystem").canonicalize().ok()?;
    (class.file_name()? == "nvme-generic").then_some(dir)
}

/// The block device beside `ng0n1`; a namespace that the block layer can not use has none.
fn sibling(generic: &Path) -> Option<Sibling> {
    let name = format!("nvme{}", generic.file_name()?.to_str()?.strip_prefix("ng")?);
    let dir = generic.parent()?.join(&name);
    let text = |file: &str| Some(std::fs::read_to_string(dir.join(file)).ok()?.trim().to_string());
    let number = |file: &str| text(file)?.parse::<u64>().ok();
    let by_size = number("queue/max_hw_sectors_kb").map(|kib| kib << 10);
    // Each page may be a segment, and data that begins inside of a page has one more.
    let by_segments = number("queue/max_segments").map(|n| n.saturating_sub(1).max(1) * PAGE_BYTES);
    let transfer_bytes = [by_size, by_segments].into_iter().flatten().min().unwrap_or(DEFAULT_TRANSFER_BYTES);
    Some(Sibling { dev: text("dev")?, name, transfer_bytes })
}

/// Opens the block device exclusively.
fn claim(node: &Path, sibling: &Sibling) -> Result<File, BdevError> {
    let real = node.canonicalize().unwrap_or_else(|_| node.into());
    let path = real.with_file_name(&sibling.name);
    let hint = |e: &std::io::Error| match e.raw_os_error() {
        Some(libc::EBUSY) => BdevError::Claimed {
            name: node.display().to_string(),
            by: format!("somebody else: {} is mounted, or otherwise in use", path.display()),
        },
        _ => os("to keep others from using the same namespace: cannot open", &path, e),
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_CLOEXEC)
        .open(&path)
        .map_err(|e| hint(&e))?;
    let meta = file.metadata().map_err(|e| hint(&e))?;
    let number = format!("{}:{}", libc::major(meta.rdev()), libc::minor(meta.rdev()));
    if !meta.file_type().is_block_device() || number != sibling.dev {
        return Err(BdevError::Invalid(format!(
            "{} is not the block device of {} ({} would be)",
            path.display(),
            node.display(),
            sibling.dev
        )));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn nodes_and_their_block_devices_in_sys() {
        let sys = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = sys.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let link = |to: &str, at: &str| {
            let at = sys.path().join(at);
            fs::create_dir_all(at.parent().unwrap()).unwrap();
            symlink(sys.path().join(to), at).unwrap();
        };
        put("class/nvme-generic/x", "");
        put("class/tty/x", "");
        put("devices/nvme0/ng0n1/dev", "240:0\n");
        put("devices/tty/dev", "4:0\n");
        link("class/nvme-generic", "devices/nvme0/ng0n1/subsystem");
        link("class/tty", "devices/tty/subsystem");
        link("devices/nvme0/ng0n1", "dev/char/240:0");
        link("devices/tty", "dev/char/4:0");
        let known = generic(sys.path(), "240:0").unwrap();
        assert!(generic(sys.path(), "4:0").is_none() && generic(sys.path(), "4:1").is_none());
        // A namespace of a kind that the block layer does not know.
        assert_eq!(sibling(&known), None);
        put("devices/nvme0/nvme0n1/dev", "259:3\n");
        let mut want =
            Sibling { name: "nvme0n1".into(), dev: "259:3".into(), transfer_bytes: DEFAULT_TRANSFER_BYTES };
        assert_eq!(sibling(&known).as_ref(), Some(&want));
        put("devices/nvme0/nvme0n1/queue/max_segments", "127\n");
        want.transfer_bytes = 126 * 4096;
        assert_eq!(sibling(&known).as_ref(), Some(&want));
        put("devices/nvme0/nvme0n1/queue/max_hw_sectors_kb", "256\n");
        want.transfer_bytes = 256 << 10;
        assert_eq!(sibling(&known).as_ref(), Some(&want));
    }

    #[test]
    fn what_is_no_namespace_is_refused() {
        let refused = |path: &str| Node::open(Path::new("/sys"), Path::new(path), false).err().unwrap();
        assert!(is_character_device(Path::new("/dev/null")) && !is_character_device(Path::new("/dev/none")));
        let why = refused("/dev/null").to_string();
        assert!(why.contains("/dev/null is a character device, but no NVMe namespace"), "{why}");
        assert_eq!(refused("/dev/none").code(), -libc::ENOENT);
    }
}
