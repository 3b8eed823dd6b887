//! Files and block devices through io_uring; and, with the generic character device of an NVMe namespace (`/dev/ng0n1`), the
//! namespace itself: [`nvme`].
//!
//! Opened with O_DIRECT where the file system allows it. Reads land in buffers of the reactor's pools, which are
//! registered with the ring where possible; writes go from where the data lies (a vector of pieces), except pieces
//! that O_DIRECT can not take (address or length not aligned): those are gathered into one aligned buffer first.
//! FUA is RWF_DSYNC, flush is fdatasync, unmap punches a hole, write-zeroes zeroes the range in place.

mod file;
mod nvme;
mod queue;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{Bdev, BdevError, Device, DeviceInfo, Op, OpSet, Queue, Registry};
use serde_json::{Value, json};
use uuid::Uuid;

use file::Backing;

/// What `bdev_uring_create` and `bdev_aio_create` take.
#[derive(Clone, Debug)]
pub struct UringOptions {
    /// Name in the registry.
    pub name: String,
    /// File, block device, or (of `bdev_uring_create`) character device of an NVMe namespace.
    pub filename: PathBuf,
    /// Bytes in a block; the device's own (512 for files) when not given.
    pub block_size_bytes: Option<u32>,
    /// Identity; random when not given.
    pub uuid: Option<Uuid>,
    /// Open for reading only.
    pub read_only: bool,
    /// Whether unmap punches holes (files), discards (block devices) or deallocates (namespaces).
    pub unmap: bool,
    /// The RPC that made it, for the saved configuration: `bdev_uring_create` or `bdev_aio_create`.
    pub method: &'static str,
}

struct Uring {
    info: DeviceInfo,
    backing: Arc<Backing>,
    filename: PathBuf,
    unmap: bool,
    method: &'static str,
}

/// Opens a file, a block device or a namespace's character device.
///
/// # Errors
/// No such file, no permission, in use by somebody else, an impossible block size or format, an empty file, name taken.
pub fn create(registry: &Arc<Registry>, options: UringOptions) -> Result<Arc<Bdev>, BdevError> {
    if registry.get(&options.name).is_ok() {
        return Err(BdevError::Exists(options.name));
    }
    if options.method == "bdev_uring_create" && nvme::is_character_device(&options.filename) {
        return nvme::create(registry, options);
    }
    let backing = Backing::open(&options.filename, options.read_only)?;
    let bs = options.block_size_bytes.unwrap_or(backing.logical_block_bytes);
    if !matches!(bs, 512 | 1024 | 2048 | 4096) || bs < backing.logical_block_bytes {
        return Err(BdevError::Invalid(format!(
            "block_size {bs} of {}: a power of two from {} to 4096 is possible",
            options.filename.display(),
            backing.logical_block_bytes
        )));
    }
    let blocks = backing.size_bytes / u64::from(bs);
    if blocks == 0 {
        return Err(BdevError::Invalid(format!(
            "{} has {} bytes, less than one block; make it larger (truncate -s 10G FILE)",
            options.filename.display(),
            backing.size_bytes
        )));
    }
    let product = if options.method == "bdev_aio_create" { "AIO disk" } else { "URING bdev" };
    let mut info = DeviceInfo::new(options.name, product, bs, blocks);
    info.uuid = options.uuid.unwrap_or(info.uuid);
    info.ops = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::WriteZeroes, Op::Reset]);
    if options.unmap {
        info.ops = info.ops.with(Op::Unmap);
    }
    info.write_cache = true;
    info.buffer_align_bytes = backing.align_bytes as u32;
    info.read_only = options.read_only;
    let UringOptions { filename, unmap, method, .. } = options;
    let device = Uring { info, backing: Arc::new(backing), filename, unmap, method };
    registry.register(Arc::new(device))
}

/// Looks at the file again and follows its size (`bdev_uring_rescan`, `bdev_aio_rescan`).
///
/// # Errors
/// Unknown, or no file behind it; the file can not be examined.
pub fn rescan(registry: &Registry, name: &str) -> Result<(), BdevError> {
    let bdev = registry.get(name)?;
    let device = bdev.device().as_ref().as_any();
    let blocks = if let Some(file) = device.downcast_ref::<Uring>() {
        file.backing.current_size_bytes()? / u64::from(bdev.block_size_bytes())
    } else if let Some(namespace) = device.downcast_ref::<nvme::Passthrough>() {
        namespace.blocks()?
    } else {
        return Err(BdevError::Invalid(format!("{name} is no uring or aio bdev")));
    };
    bdev.set_blocks(blocks);
    Ok(())
}

impl Device for Uring {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        queue::UringQueue::open(self.backing.clone(), self.info.block_size_bytes)
    }

    fn driver_specific(&self) -> Value {
        let key = if self.method == "bdev_aio_create" { "aio" } else { "uring" };
        let mut all = json!({});
        all[key] = json!({
            "filename": path_text(&self.filename),
            "kind": if self.backing.block_device { "block_device" } else { "file" },
            "block_size_override": true,
            "readonly": self.info.read_only,
            "direct": self.backing.direct,
        });
        all
    }

    fn config(&self) -> Vec<(String, Value)> {
        saved(self.method, &self.info, &self.filename, self.unmap)
    }
}

/// The call that makes a device again.
fn saved(method: &str, info: &DeviceInfo, filename: &Path, unmap: bool) -> Vec<(String, Value)> {
    let mut params = json!({
        "name": info.name,
        "filename": path_text(filename),
        "block_size": info.block_size_bytes,
        "uuid": info.uuid.to_string(),
    });
    if info.read_only {
        params["readonly"] = true.into();
    }
    // Each where it is not what the call takes by itself.
    match (method, unmap) {
        ("bdev_aio_create", true) => params["fallocate"] = true.into(),
        ("bdev_uring_create", false) => params["unmap"] = false.into(),
        _ => {}
    }
    vec![(method.into(), params)]
}

fn path_text(p: &Path) -> String {
    p.display().to_string()
}
