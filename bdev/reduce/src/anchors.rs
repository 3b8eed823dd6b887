//! The anchors of a pool's device: finding, checking and writing superblocks, key blocks and owner blocks.
//!
//! Every copy is read on every opening. The key block is read first: without the pool key nothing else can be verified. Damage of some copies is no error as long as one verifies; whether there is no
//! pool, a damaged one, one of another version, or the key does not fit, is told apart in this order.

use cryptfold_bdev::Status;
use cryptfold_reduce_format::block::{BLOCK_BYTES, Block, BlockError, Unverified};
use cryptfold_reduce_format::ids::DeviceIx;
use cryptfold_reduce_format::keys::{DomainWraps, Kek, PoolKey, PoolKeys};
use cryptfold_reduce_format::owner::OwnerBlock;
use cryptfold_reduce_format::slots::KeyBlock;
use cryptfold_reduce_format::superblock::{ANCHORS, KEYS_AT, OWNER_AT, Superblock, anchor_offsets};

use uuid::Uuid;

use crate::base::Base;
use crate::error::PoolError;

/// What the anchors of a device say.
pub(crate) struct Anchors {
    /// Byte offsets.
    pub at: [u64; ANCHORS],
    pub superblock: Superblock,
    pub keys: PoolKeys,
    pub wraps: DomainWraps,
    pub key: PoolKey,
    pub key_block: KeyBlock,
    /// Copies of the key block differ or are damaged.
    pub stale_keys: bool,
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

/// Where the anchors of a pool lie.
type At = [u64; ANCHORS];

/// The superblocks of a device of `bytes` bytes that can be parsed, unverified, and where its anchors lie. `Ok(None)`: there is no
/// pool.
async fn find(
    base: &Base,
    device: &str,
    bytes: u64,
) -> Result<Option<(At, Vec<Unverified<Superblock>>)>, PoolError> {
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
    if !found.is_empty() {
        return Ok(Some((at, found)));
    }
    let foreign = |e: &BlockError| matches!(e, BlockError::Blank | BlockError::NotOurs { .. });
    match errors.into_iter().find(|e| !foreign(e)) {
        Some(reason) => Err(PoolError::Block { device: device.to_owned(), reason }),
        None => Ok(None),
    }
}

/// Finds a pool on a device of `bytes` bytes and unlocks it. `Ok(None)`: there is none.
pub(crate) async fn read(
    base: &Base,
    device: &str,
    bytes: u64,
    kek: &Kek,
) -> Result<Option<Anchors>, PoolError> {
    let error = |reason: BlockError| PoolError::Block { device: device.to_owned(), reason };
    let Some((at, found)) = find(base, device, bytes).await? else { return Ok(None) };
    let Unlocked { keys, key, block, stale } = unlock(base, device, &at, kek).await?;
    let wraps = DomainWraps::open(&keys, &block.erasure)
        .map_err(|reason| PoolError::Key { device: device.to_owned(), reason })?;
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
    Ok(Some(Anchors { at, superblock, keys, wraps, key, key_block: block, stale_keys: stale, owner }))
}

/// What the key blocks say.
struct Unlocked {
    keys: PoolKeys,
    key: PoolKey,
    block: KeyBlock,
    /// Some copy is damaged or older.
    stale: bool,
}

/// The key blocks at `at` that can be parsed, unverified, with their copy numbers.
async fn key_blocks(
    base: &Base,
    device: &str,
    at: &[u64],
) -> Result<(Vec<Unverified<KeyBlock>>, Option<BlockError>), PoolError> {
    let (mut found, mut refused) = (Vec::new(), None);
    for anchor in at {
        let offset = anchor + KEYS_AT;
        let block = read_block(base, device, offset).await?;
        match KeyBlock::parse(&block, offset) {
            Ok(parsed) => found.push(parsed),
            Err(reason) => refused = Some(reason),
        }
    }
    Ok((found, refused))
}

/// The pool's keys, from the key blocks and the key given. Any copy that the key fits gives the pool key; then the newest copy
/// that verifies counts, and the key has to fit that one: a slot that was removed does not come back with an old copy.
async fn unlock(base: &Base, device: &str, at: &[u64], kek: &Kek) -> Result<Unlocked, PoolError> {
    let error = |reason: BlockError| PoolError::Block { device: device.to_owned(), reason };
    let wrong = || PoolError::WrongKey { device: device.to_owned() };
    let (found, refused) = key_blocks(base, device, at).await?;
    if found.is_empty() {
        return match refused {
            Some(BlockError::Blank | BlockError::NotOurs { .. }) => {
                Err(PoolError::Erased { device: device.to_owned() })
            }
            reason => Err(error(reason.unwrap_or(BlockError::Checksum))),
        };
    }
    let Some((pool, key)) = found.iter().find_map(|b| Some((b.peek().pool, b.peek().unlock(kek).ok()?.1)))
    else {
        return Err(wrong());
    };
    let keys = PoolKeys::derive(&key, pool);
    let mut newest: Option<KeyBlock> = None;
    let (mut verified, mut forged, mut stale) = (0, None, false);
    for block in found {
        match block.verify(keys.block()) {
            Ok(block) => {
                verified += 1;
                stale |= newest.as_ref().is_some_and(|n| *n != block);
                if newest.as_ref().is_none_or(|n| n.generation < block.generation) {
                    newest = Some(block);
                }
            }
            Err(reason) => forged = Some(reason),
        }
    }
    let Some(block) = newest else { return Err(error(forged.unwrap_or(BlockError::WrongKey))) };
    if block.unlock(kek).is_err() {
        return Err(wrong());
    }
    stale |= verified < at.len();
    Ok(Unlocked { keys, key, block, stale })
}

/// A pool as it shows itself without its key. Nothing of it is verified.
pub(crate) struct Sealed {
    pub superblock: Superblock,
    pub keys: KeyBlock,
}

/// What can be known about the pool on a device of `bytes` bytes without its key. `Ok(None)`: there is none.
pub(crate) async fn peek(base: &Base, device: &str, bytes: u64) -> Result<Option<Sealed>, PoolError> {
    let Some((at, found)) = find(base, device, bytes).await? else { return Ok(None) };
    let newest = found.into_iter().map(|s| s.peek().clone()).max_by_key(|s| s.generation);
    let (blocks, refused) = key_blocks(base, device, &at).await?;
    let keys = blocks.into_iter().map(|b| b.peek().clone()).max_by_key(|b| b.generation);
    match (newest, keys) {
        (Some(superblock), Some(keys)) => Ok(Some(Sealed { superblock, keys })),
        (None, _) => Ok(None),
        (_, None) => Err(match refused {
            Some(BlockError::Blank | BlockError::NotOurs { .. }) | None => {
                PoolError::Erased { device: device.to_owned() }
            }
            Some(reason) => PoolError::Block { device: device.to_owned(), reason },
        }),
    }
}

/// What of a pool whose key is known is left in the anchors of a device.
pub(crate) struct Left {
    /// The newest superblock that verifies.
    pub superblock: Option<Superblock>,
    /// The newest key block that verifies.
    pub keys: Option<KeyBlock>,
    /// Another pool that is there.
    pub other: Option<Uuid>,
}

/// Looks at all copies of superblock and key block.
pub(crate) async fn copies(base: &Base, device: &str, at: &At, keys: &PoolKeys) -> Result<Left, PoolError> {
    let mut left = Left { superblock: None, keys: None, other: None };
    let (found, _) = superblocks(base, device, at).await?;
    for superblock in found {
        if superblock.peek().pool != keys.pool() {
            left.other = Some(superblock.peek().pool);
        } else if let Ok(superblock) = superblock.verify(keys.block())
            && left.superblock.as_ref().is_none_or(|n| n.generation < superblock.generation)
        {
            left.superblock = Some(superblock);
        }
    }
    let (found, _) = key_blocks(base, device, at).await?;
    for block in found {
        if let Ok(block) = block.verify(keys.block())
            && left.keys.as_ref().is_none_or(|n| n.generation < block.generation)
        {
            left.keys = Some(block);
        }
    }
    Ok(left)
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
