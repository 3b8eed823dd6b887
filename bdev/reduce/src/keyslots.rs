//! The key block of an open pool: slots, and the erasure secrets.
//!
//! A change is written to copies 0 and 2, flushed, to copies 1 and 3, flushed; then all are read back. So at every moment two
//! copies are whole. The newest that verifies counts (see [`crate::anchors`]); an opening that finds older or damaged copies
//! writes them anew, so that nothing lingers in a copy that nobody reads.

use cryptfold_bdev::Status;
use cryptfold_reduce_format::block::{BLOCK_BYTES, Block, BlockError};
use cryptfold_reduce_format::ids::DeviceIx;
use cryptfold_reduce_format::keys::{Kek, PoolKeys};
use cryptfold_reduce_format::slots::{KeyBlock, KeySlot, MAX_KEY_SLOTS};
use cryptfold_reduce_format::superblock::{ANCHORS, KEYS_AT, Superblock, anchor_offsets};

use crate::base::Base;
use crate::error::PoolError;
use crate::open::Claim;
use crate::pool::Pool;
use crate::{anchors, owner};

/// Blocks and where they go.
type Copies = Vec<(u64, Box<Block>)>;

fn bad_block(device: &str, reason: BlockError) -> PoolError {
    PoolError::Block { device: device.to_owned(), reason }
}

fn copies(keys: &PoolKeys, anchors: &[u64; ANCHORS], block: &KeyBlock) -> Result<Copies, BlockError> {
    let copy = |(copy, anchor): (usize, &u64)| {
        let at = anchor + KEYS_AT;
        Ok((at, block.encode(keys.block(), DeviceIx(0), copy as u16, at)?))
    };
    anchors.iter().enumerate().map(copy).collect()
}

/// Writes all copies in the order of the module's head and reads them back.
async fn write_copies(base: &Base, copies: &Copies) -> Result<(), Status> {
    for pair in [[0, 2], [1, 3]] {
        for copy in pair {
            let (at, block) = &copies[copy];
            base.write_block(*at, block, false).await?;
        }
        base.flush().await?;
    }
    for (at, block) in copies {
        if base.read_block(*at).await? != *block {
            return Err(Status::UNRECOVERED_READ);
        }
    }
    Ok(())
}

/// Brings the key slots of a back-up to the device of a pool that nobody has open, and the superblock if no copy of it is left.
/// Slots that are there already are replaced only with `force`; their erasure secrets stay, because the back-up's may have been
/// overwritten on purpose. Whether the superblock was brought back: the pool is as it was then, if what it consists of is still
/// there.
pub(crate) async fn restore(
    claim: &Claim,
    backup: &KeyBlock,
    superblock: &Block,
    kek: &Kek,
    force: bool,
) -> Result<bool, PoolError> {
    let bdev = claim.descriptor.bdev();
    let (device, bytes) = (bdev.name().to_owned(), bdev.size_bytes());
    let bad = |reason| bad_block(&device, reason);
    let base = Base::open(&claim.descriptor)?;
    let (_, key) = backup.unlock(kek).map_err(|_| PoolError::WrongKey { device: device.clone() })?;
    let keys = PoolKeys::derive(&key, backup.pool);
    let saved = Superblock::parse(superblock, 0).and_then(|s| s.verify(keys.block())).map_err(bad)?;
    if saved.pool != backup.pool {
        return Err(bad(BlockError::OtherPool { found: saved.pool, expected: backup.pool }));
    }
    let made_for = saved.devices[0].anchor_blocks * BLOCK_BYTES as u64;
    let at = anchor_offsets(made_for).ok().filter(|_| made_for <= bytes);
    let at = at.ok_or(PoolError::TooSmall { device: device.clone(), bytes, need_bytes: made_for })?;
    let there = anchors::copies(&base, &device, &at, &keys).await?;
    if let Some(other) = there.other {
        return Err(bad(BlockError::OtherPool { found: other, expected: backup.pool }));
    }
    if there.keys.is_some() && !force {
        return Err(PoolError::Invalid(format!(
            "{device} has its key slots; force replaces them by the back-up's"
        )));
    }
    let lost = there.superblock.is_none();
    let superblock = there.superblock.unwrap_or(saved);
    let owner = anchors::read_owner(&base, &device, &at, &keys).await?;
    owner::wait_until_free(&base, &device, &at, &keys, owner).await?;
    let erasure = there.keys.as_ref().map_or(backup.erasure, |k| k.erasure);
    let generation = backup.generation.max(there.keys.as_ref().map_or(0, |k| k.generation)) + 1;
    let block = KeyBlock { generation, erasure, ..backup.clone() };
    let failed = |status| PoolError::Io { device: device.clone(), what: "write of an anchor", status };
    write_copies(&base, &copies(&keys, &at, &block).map_err(bad)?).await.map_err(failed)?;
    if lost {
        for (copy, at) in at.iter().enumerate() {
            let block = superblock.encode(keys.block(), copy as u16, *at).map_err(bad)?;
            base.write_block(*at, &block, false).await.map_err(failed)?;
        }
        base.flush().await.map_err(failed)?;
    }
    Ok(lost)
}

impl Pool {
    fn slots_failed(&self, status: Status) -> PoolError {
        PoolError::Slots { pool: self.name(), status }
    }

    /// What a back-up needs: the key block, and the superblock as it would be at the device's beginning.
    pub(crate) fn backup(&self) -> Result<(KeyBlock, Box<Block>), PoolError> {
        let superblock = self.superblock.borrow().encode(self.keys.block(), 0, 0);
        let superblock = superblock.map_err(|reason| bad_block(&self.handle.base_name, reason))?;
        Ok((self.key_block.borrow().clone(), superblock))
    }

    /// Writes all copies of the key block and reads them back. On failure the old block stays in force in RAM, under a number
    /// that the next change goes beyond.
    pub(crate) async fn write_keys(&self, block: KeyBlock) -> Result<(), PoolError> {
        self.check_writable().map_err(|status| self.slots_failed(status))?;
        let copies = copies(&self.keys, &self.anchors, &block)
            .map_err(|reason| bad_block(&self.handle.base_name, reason))?;
        let written = write_copies(&self.base, &copies).await;
        self.stale_keys.set(written.is_err());
        match written {
            Ok(()) => *self.key_block.borrow_mut() = block,
            Err(status) => {
                self.key_block.borrow_mut().generation = block.generation;
                return Err(self.slots_failed(status));
            }
        }
        Ok(())
    }

    /// Replaces the slots.
    pub(crate) async fn change_slots(
        &self,
        slots: [Option<KeySlot>; MAX_KEY_SLOTS],
    ) -> Result<(), PoolError> {
        let _one = self.changing_keys.lock().await;
        let before = self.key_block.borrow().clone();
        self.write_keys(KeyBlock { generation: before.generation + 1, slots, ..before }).await
    }

    /// After an opening: all copies become the one that counts.
    pub(crate) async fn mend_keys(&self) -> Result<(), PoolError> {
        if !self.stale_keys.get() {
            return Ok(());
        }
        let block = self.key_block.borrow().clone();
        tracing::info!(pool = %self.name(), "copies of the key slots are written anew");
        // The same number: whoever has lost power in between finds the same slots in all of them.
        self.write_keys(block).await
    }
}
