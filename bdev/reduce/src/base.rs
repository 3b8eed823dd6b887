//! The base device of a pool, in bytes: one per core, over that core's channel.
//!
//! Owns the channel. Units: bytes; everything but an odd-sized read of a unit is in whole 4 KiB blocks.

use cryptfold_bdev::trace::{self, Stage};
use cryptfold_bdev::{Bdev, BdevError, Channel, Descriptor, Io, IoFuture, Op, Status};
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reduce_format::block::{BLOCK_BYTES, Block};
use std::ops::Range;
use std::sync::Arc;

/// See the module's head.
#[derive(Clone)]
pub(crate) struct Base {
    channel: Channel,
    /// Device blocks per 4 KiB.
    factor: u64,
    write_cache: bool,
}

/// A read under way.
pub(crate) struct Reading {
    io: IoFuture,
    skip: usize,
    len: usize,
    whole: usize,
}

impl Base {
    /// Opens a channel on this core.
    pub fn open(descriptor: &Arc<Descriptor>) -> Result<Base, BdevError> {
        let channel = descriptor.channel()?;
        let bdev: &Arc<Bdev> = descriptor.bdev();
        let block = u64::from(bdev.block_size_bytes());
        if block == 0 || !(BLOCK_BYTES as u64).is_multiple_of(block) {
            return Err(BdevError::Invalid(format!(
                "{} has blocks of {block} bytes; a pool needs 512 to 4096 (a power of two)",
                bdev.name()
            )));
        }
        let write_cache = bdev.info().write_cache;
        Ok(Base { channel, factor: BLOCK_BYTES as u64 / block, write_cache })
    }

    fn lba(&self, offset_bytes: u64) -> u64 {
        debug_assert!(offset_bytes.is_multiple_of(BLOCK_BYTES as u64));
        offset_bytes / BLOCK_BYTES as u64 * self.factor
    }

    /// Reads `len` bytes from any offset, as one buffer. Whole blocks around them are read.
    pub async fn read(&self, offset_bytes: u64, len: usize) -> Result<Buf, Status> {
        Base::finish_read(self.start_read(offset_bytes, len)).await
    }

    /// Starts such a read at once; [`Base::finish_read`] waits for it.
    pub fn start_read(&self, offset_bytes: u64, len: usize) -> Reading {
        let block = BLOCK_BYTES as u64;
        let start = offset_bytes / block * block;
        let end = (offset_bytes + len as u64).next_multiple_of(block);
        let io = Io::new(Op::Read, self.lba(start), (end - start) / block * self.factor);
        let skip = (offset_bytes - start) as usize;
        Reading { io: self.channel.io(io), skip, len, whole: (end - start) as usize }
    }

    /// Waits for a read.
    pub async fn finish_read(reading: Reading) -> Result<Buf, Status> {
        let (data, wanted) = Base::finish_list(reading).await?;
        Ok(data.to_contiguous().slice(wanted))
    }

    /// Waits for a read: its whole blocks, in the buffers that the device gives, and where in them what was asked for is.
    pub async fn finish_list(reading: Reading) -> Result<(SgList, Range<usize>), Status> {
        let begun = trace::begin();
        let mut io = reading.io.await;
        begun.end(Stage::Fetch);
        let data = std::mem::take(&mut io.data);
        let status = io.status();
        io.recycle();
        // Some drives add to it that trying again is useless: it is the same damage.
        if Status::new(status.sct(), status.sc()) == Status::UNRECOVERED_READ {
            return Err(Status::UNRECOVERED_READ);
        }
        status.ok()?;
        if data.len_bytes() != reading.whole {
            return Err(Status::INTERNAL_ERROR);
        }
        Ok((data, reading.skip..reading.skip + reading.len))
    }

    /// Reads one block.
    pub async fn read_block(&self, offset_bytes: u64) -> Result<Box<Block>, Status> {
        let data = self.read(offset_bytes, BLOCK_BYTES).await?;
        let mut block = Box::new([0; BLOCK_BYTES]);
        block.copy_from_slice(&data);
        Ok(block)
    }

    /// Writes whole blocks.
    pub async fn write(&self, offset_bytes: u64, data: impl Into<SgList>, fua: bool) -> Result<(), Status> {
        let data = data.into();
        let blocks = data.len_bytes() as u64 / BLOCK_BYTES as u64 * self.factor;
        let mut io = Io::new(Op::Write, self.lba(offset_bytes), blocks);
        io.data = data;
        // A device without a cache has nothing to force.
        io.fua = fua && self.write_cache;
        let begun = trace::begin();
        let io = self.channel.io(io).await;
        begun.end(Stage::Store);
        let status = io.status();
        io.recycle();
        status.ok()
    }

    /// Writes one block.
    pub async fn write_block(&self, offset_bytes: u64, block: &Block, fua: bool) -> Result<(), Status> {
        self.write(offset_bytes, Buf::from_slice(block), fua).await
    }

    /// Makes all completed writes durable.
    pub async fn flush(&self) -> Result<(), Status> {
        if self.write_cache { self.channel.flush().await } else { Ok(()) }
    }
}
