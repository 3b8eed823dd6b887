//! The key block of an open pool: slots, and the erasure secrets.
//!
//! A change is written to copies 0 and 2, flushed, to copies 1 and 3, flushed; then all are read back. So at every moment two
//! copies are whole. The newest that verifies counts (see [`crate::anchors`]); an opening that finds older or damaged copies
//! writes them anew, so that nothing lingers in a copy that nobody reads.

use cryptfold_bdev::Status;
use cryptfold_reduce_format::block::Block;
use cryptfold_reduce_format::ids::DeviceIx;
use cryptfold_reduce_format::slots::{KeyBlock, KeySlot, MAX_KEY_SLOTS};
use cryptfold_reduce_format::superblock::{ANCHORS, KEYS_AT};

use crate::error::PoolError;
use crate::pool::Pool;

impl Pool {
    fn slots_failed(&self, status: Status) -> PoolError {
        PoolError::Slots { pool: self.name(), status }
    }

    fn encode_keys(&self, block: &KeyBlock, copy: usize) -> Result<(u64, Box<Block>), PoolError> {
        let at = self.anchors[copy] + KEYS_AT;
        let encoded = block.encode(self.keys.block(), DeviceIx(0), copy as u16, at);
        let encoded =
            encoded.map_err(|reason| PoolError::Block { device: self.handle.base_name.clone(), reason })?;
        Ok((at, encoded))
    }

    /// Writes all copies of the key block and reads them back. On failure the old block stays in force in RAM, under a number
    /// that the next change goes beyond.
    pub(crate) async fn write_keys(&self, block: KeyBlock) -> Result<(), PoolError> {
        self.check_writable().map_err(|status| self.slots_failed(status))?;
        let copies = (0..ANCHORS).map(|copy| self.encode_keys(&block, copy));
        let copies: Vec<(u64, Box<Block>)> = copies.collect::<Result<_, _>>()?;
        let written = self.write_copies(&copies).await;
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

    async fn write_copies(&self, copies: &[(u64, Box<Block>)]) -> Result<(), Status> {
        for pair in [[0, 2], [1, 3]] {
            for copy in pair {
                let (at, block) = &copies[copy];
                self.base.write_block(*at, block, false).await?;
            }
            self.base.flush().await?;
        }
        for (at, block) in copies {
            if self.base.read_block(*at).await? != *block {
                return Err(Status::UNRECOVERED_READ);
            }
        }
        Ok(())
    }

    /// Replaces the slots.
    pub(crate) async fn change_slots(
        &self,
        slots: [Option<KeySlot>; MAX_KEY_SLOTS],
    ) -> Result<(), PoolError> {
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
