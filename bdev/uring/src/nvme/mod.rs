//! NVMe namespaces through their generic character devices (`/dev/ng0n1`): the kernel keeps the drive and passes commands through
//! as they are (`IORING_OP_URING_CMD`), past its block layer. The middle way between that and the userspace driver.

mod abi;
mod node;
mod queue;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{Bdev, BdevError, Device, DeviceInfo, Op, Queue, Registry};
use cryptfold_bdev_nvme::identity::Target;
use serde_json::{Value, json};

use crate::{UringOptions, path_text, saved};
use node::Node;
pub(crate) use node::is_character_device;

/// A namespace that the kernel passes commands through to.
pub(crate) struct Passthrough {
    info: DeviceInfo,
    target: Target,
    node: Arc<Node>,
    filename: PathBuf,
    unmap: bool,
}

/// Opens the namespace behind a character device.
///
/// # Errors
/// As [`crate::create`].
pub(crate) fn create(registry: &Arc<Registry>, options: UringOptions) -> Result<Arc<Bdev>, BdevError> {
    let mut node = Node::open(Path::new("/sys"), &options.filename, options.read_only)?;
    let (mut info, target) = node.device(options.name, "URING bdev")?;
    if let Some(bs) = options.block_size_bytes
        && bs != info.block_size_bytes
    {
        return Err(BdevError::Invalid(format!(
            "block_size {bs} of {}: the namespace is formatted with {}, and commands pass through as they are",
            options.filename.display(),
            info.block_size_bytes
        )));
    }
    info.uuid = options.uuid.unwrap_or(info.uuid);
    info.read_only |= options.read_only;
    if !options.unmap {
        info.ops = info.ops.without(Op::Unmap);
    }
    let (filename, unmap) = (options.filename, options.unmap);
    registry.register(Arc::new(Passthrough { info, target, node: Arc::new(node), filename, unmap }))
}

impl Passthrough {
    /// Blocks, now.
    pub fn blocks(&self) -> Result<u64, BdevError> {
        self.node.blocks()
    }
}

impl Device for Passthrough {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        queue::PassQueue::open(self.node.clone(), self.target)
    }

    fn driver_specific(&self) -> Value {
        let (model, serial) = &self.node.controller;
        json!({"uring": {
            "filename": path_text(&self.filename),
            "kind": "nvme_passthrough",
            "nsid": self.node.nsid().0,
            "model_number": model,
            "serial_number": serial,
            "max_transfer_bytes": u64::from(self.target.max_blocks) << self.target.block_shift,
            "readonly": self.info.read_only,
        }})
    }

    fn config(&self) -> Vec<(String, Value)> {
        saved("bdev_uring_create", &self.info, &self.filename, self.unmap)
    }
}
