//! Growing: the base device has become larger, and the pool takes what is new.
//!
//! Order: a superblock that says how large the device is, durable; then the new segments exist and may be opened. A
//! recovery in between finds a segment table that is shorter than the device: what it does not have is free.

use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_reduce_format::block::BLOCK_BYTES;
use cryptfold_reduce_format::ids::DeviceIx;
use cryptfold_reduce_format::superblock::Geometry;

use crate::error::PoolError;
use crate::pool::Pool;

impl Pool {
    /// Takes the rest of the device. Gives the bytes of the device in use before and after.
    pub(crate) async fn grow(self: &Rc<Self>) -> Result<(u64, u64), PoolError> {
        let stopped = |status: Status| PoolError::Stopped { pool: self.name(), status };
        self.check_writable().map_err(stopped)?;
        let bytes = self.descriptor.bdev().size_bytes();
        let blocks = bytes / BLOCK_BYTES as u64;
        let meta = self.meta.lock().await;
        let before = self.superblock.borrow().devices[0].blocks;
        if blocks < before {
            return Err(PoolError::Invalid(format!(
                "{} has {bytes} bytes, fewer than the {} of the pool on it; pools do not shrink",
                self.handle.base_name,
                before * BLOCK_BYTES as u64
            )));
        }
        if blocks > before {
            let mut next = self.superblock.borrow().clone();
            next.devices[0].blocks = blocks;
            let geometry = Geometry::of(&next, DeviceIx(0));
            let geometry =
                geometry.ok_or_else(|| PoolError::Invalid(format!("{bytes} bytes are too many")))?;
            *self.superblock.borrow_mut() = next;
            self.write_superblock(None, None).await.map_err(stopped)?;
            self.shard.borrow_mut().segments.grow(geometry);
        }
        drop(meta);
        // Who waits for space may go on.
        self.wake_waiters();
        Ok((before * BLOCK_BYTES as u64, blocks * BLOCK_BYTES as u64))
    }
}
