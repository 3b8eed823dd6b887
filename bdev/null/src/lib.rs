//! The null device: takes every write and forgets it, reads zeros. What is left is the cost of the layers above it.

use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{Bdev, BdevError, Device, DeviceInfo, Io, Op, OpSet, Queue, Registry, Status};
use cryptfold_reactor::memory::SgList;
use serde_json::{Value, json};
use uuid::Uuid;

/// What `bdev_null_create` takes.
#[derive(Clone, Debug)]
pub struct NullOptions {
    /// Name in the registry.
    pub name: String,
    /// Size in blocks.
    pub num_blocks: u64,
    /// Bytes in a block.
    pub block_size_bytes: u32,
    /// Identity; random when not given.
    pub uuid: Option<Uuid>,
}

struct Null {
    info: DeviceInfo,
    registry: std::sync::Weak<Registry>,
}

/// Creates a null device.
///
/// # Errors
/// Name taken, or a geometry that the registry refuses.
pub fn create(registry: &Arc<Registry>, options: NullOptions) -> Result<Arc<Bdev>, BdevError> {
    if options.num_blocks == 0 {
        return Err(BdevError::Invalid("num_blocks must be greater than 0".into()));
    }
    let mut info = DeviceInfo::new(options.name, "Null disk", options.block_size_bytes, options.num_blocks);
    info.uuid = options.uuid.unwrap_or(info.uuid);
    info.ops = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes, Op::Reset]);
    registry.register(Arc::new(Null { info, registry: Arc::downgrade(registry) }))
}

impl Device for Null {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        Ok(Rc::new(NullQueue { block_size_bytes: self.info.block_size_bytes as usize }))
    }

    fn config(&self) -> Vec<(String, Value)> {
        let blocks = self
            .registry
            .upgrade()
            .and_then(|r| r.get(&self.info.name).ok())
            .map_or(self.info.blocks, |b| b.blocks());
        let params = json!({
            "name": self.info.name,
            "num_blocks": blocks,
            "block_size": self.info.block_size_bytes,
            "uuid": self.info.uuid.to_string(),
        });
        vec![("bdev_null_create".into(), params)]
    }
}

struct NullQueue {
    block_size_bytes: usize,
}

impl Queue for NullQueue {
    #[inline]
    fn submit(self: Rc<Self>, mut io: Box<Io>) {
        match io.op {
            Op::Read => {
                let bytes = io.blocks as usize * self.block_size_bytes;
                if io.data.is_empty() {
                    io.data.push_zeroes(bytes);
                } else {
                    let mut out = std::mem::take(&mut io.data);
                    for segment in out.segments_mut() {
                        segment.make_mut().fill(0);
                    }
                    io.data = out;
                }
            }
            // Lets go of the buffers now, so that a writer below its buffer limit can go on.
            Op::Write => io.data = SgList::new(),
            _ => {}
        }
        io.finish(Status::SUCCESS);
    }
}
