//! The anchors of a pool's device: finding, checking and writing superblocks, key blocks and owner blocks.
//!
//! Every copy is read on every opening. Damage of some copies is no error as long as one verifies; whether there is no
//! pool, a damaged one, one of another version, or the key does not fit, is told apart in this order.

use cryptfold_bdev::Status;
use cryptfold_reduce_format::block::{BLOCK_BYTES, Block, BlockError, Unverified};
use cryptfold_reduce_format::ids::DeviceIx;
use cryptfold_reduce_format::keys::{Kek, PoolKeys};
use cryptfold_reduce_format::owner::OwnerBlock;
use cryptfold_reduce_format::slots::KeyBlock;
use cryptfold_reduce_format::superblock::{ANCHORS, KEYS_AT, OWNER_AT, Superblock, anchor_offsets};

use crate::base::Base;
use crate::error::PoolError;

/// What the anchors of a device say.
pub(crate) struct Anchors {
    /// Byte offsets.
    pub at: [u64; ANCHORS],
    pub superblock: Superblock,
    pub keys: PoolKeys,
    /// The newest owner block, if one verifies.
    pub owner: Option<OwnerBlock>,
}

pub(crate) fn io_error(device: &str, what: &'static str) -> impl FnOnce(Status) -> PoolError + use<> {
    let device = device.to_owned();
    move |status| PoolError::Io { device, what, status }
}

async fn read_block(base: &Base, device: &str, at: u64) -> Result<Box<Block>, PoolError> {
    base.read_block(at).await.map_err(io_error(device, "read of an anchor"))
}

/// Reads the superblock copies at `at`; parsed, not verified.
async fn superblocks(
    base: &Base,
    device: &str,
    at: &[u64],
) -> Result<(Vec<Unverified<Superblock>>, Vec<BlockError>), PoolError> {
    let (mut found, mut errors) = (Vec::new(), Vec::new());
    for &offset in at {
        let block = read_block(base, device, offset).await?;
        match Superblock::parse(&block, offset) {
            Ok(superblock) => found.push(superblock),
            Err(error) => errors.push(error),
        }
    }
    Ok((found, errors))
}

/// Finds a pool on a device of `bytes` bytes. `Ok(None)`: there is none.
pub(crate) async fn read(
    base: &Base,
    device: &str,
    bytes: u64,
    kek: &Kek,
) -> Result<Option<Anchors>, PoolError> {
    let Ok(mut at) = anchor_offsets(bytes) else { return Ok(None) };
    let (mut found, mut errors) = superblocks(base, device, &at).await?;
    // A device that has grown has its later anchors where they were when it joined.
    let joined = found.first().and_then(|s| {
        let s = s.peek();
        s.devices.iter().find(|d| d.device == s.device).map(|d| d.anchor_blocks * BLOCK_BYTES as u64)
    });
    if let Some(joined) = joined
        && joined <= bytes
        && let Ok(real) = anchor_offsets(joined)
        && real != at
    {
        at = real;
        (found, errors) = superblocks(base, device, &at).await?;
    }
    let error = |reason: BlockError| PoolError::Block { device: device.to_owned(), reason };
    if found.is_empty() {
        let foreign = |e: &BlockError| matches!(e, BlockError::Blank | BlockError::NotOurs { .. });
        return match errors.into_iter().find(|e| !foreign(e)) {
            Some(reason) => Err(error(reason)),
            None => Ok(None),
        };
    }
    let keys = unlock(base, device, &at, kek).await?;
    let mut newest: Option<Superblock> = None;
    let mut refused = None;
    for superblock in found {
        match superblock.verify(keys.block()) {
            Ok(superblock) if superblock.pool != keys.pool() => {
                refused = Some(BlockError::OtherPool { found: superblock.pool, expected: keys.pool() });
            }
            Ok(superblock) => {
                if newest.as_ref().is_none_or(|n| n.generation < superblock.generation) {
                    newest = Some(superblock);
                }
            }
            Err(reason) => refused = Some(reason),
        }
    }
    let Some(superblock) = newest else { return Err(error(refused.unwrap_or(BlockError::Checksum))) };
    let owner = read_owner(base, device, &at, &keys).await?;
    Ok(Some(Anchors { at, superblock, keys, owner }))
}

/// The pool's keys, from the key block and the key given.
async fn unlock(base: &Base, device: &str, at: &[u64], kek: &Kek) -> Result<PoolKeys, PoolError> {
    let error = |reason: BlockError| PoolError::Block { device: device.to_owned(), reason };
    let mut best: Option<(KeyBlock, PoolKeys)> = None;
    let mut refused = None;
    let mut wrong = false;
    for anchor in at {
        let offset = anchor + KEYS_AT;
        let block = read_block(base, device, offset).await?;
        let parsed = match KeyBlock::parse(&block, offset) {
            Ok(parsed) => parsed,
            Err(reason) => {
                refused = Some(reason);
                continue;
            }
        };
        let Ok((_, key)) = parsed.peek().unlock(kek) else {
            wrong = true;
            continue;
        };
        let keys = PoolKeys::derive(&key, parsed.peek().pool);
        match parsed.verify(keys.block()) {
            Ok(block) => {
                if best.as_ref().is_none_or(|(b, _)| b.generation < block.generation) {
                    best = Some((block, keys));
                }
            }
            Err(reason) => refused = Some(reason),
        }
    }
    match best {
        Some((_, keys)) => Ok(keys),
        None if wrong => Err(PoolError::WrongKey { device: device.to_owned() }),
        None => Err(error(refused.unwrap_or(BlockError::Checksum))),
    }
}

/// The newest owner block that verifies.
pub(crate) async fn read_owner(
    base: &Base,
    device: &str,
    at: &[u64],
    keys: &PoolKeys,
) -> Result<Option<OwnerBlock>, PoolError> {
    let mut newest: Option<OwnerBlock> = None;
    for anchor in at {
        let offset = anchor + OWNER_AT;
        let block = read_block(base, device, offset).await?;
        let owner = OwnerBlock::parse(&block, offset).and_then(|owner| owner.verify(keys.block()));
        if let Ok(owner) = owner
            && owner.pool == keys.pool()
            && newest.as_ref().is_none_or(|n| owner.is_newer_than(n))
        {
            newest = Some(owner);
        }
    }
    Ok(newest)
}

/// Writes the owner block to anchor `copy`.
pub(crate) async fn write_owner(
    base: &Base,
    keys: &PoolKeys,
    at: &[u64; ANCHORS],
    copy: usize,
    owner: &OwnerBlock,
) -> Result<(), Status> {
    let offset = at[copy] + OWNER_AT;
    base.write_block(offset, &owner.encode(keys.block(), DeviceIx(0), copy as u16, offset), true).await
}
