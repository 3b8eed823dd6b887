//! Operations that a device does not do itself, made of those it does: write-zeroes, compare, compare-and-write and
//! copy from reads and writes. Unmap and write-uncorrectable of a device that can not are refused: nothing would be given up,
//! and nothing would remember.

use std::rc::Rc;

use cryptfold_reactor as reactor;
use reactor::memory::SgList;

use crate::channel::{ChannelInner, IoFuture};
use crate::io::{BlockRanges, Io, Op};
use crate::locks::{Range, RangeLocks};
use crate::{Queue, Status};

/// Most bytes that one step of a long operation holds in buffers.
const STEP_BYTES: u64 = 1 << 20;

/// Runs `io` (counted in by the channel) as a task and ends it.
#[cold]
pub(crate) fn run(c: Rc<ChannelInner>, mut io: Box<Io>) {
    if matches!(io.op, Op::Read | Op::Write | Op::Unmap | Op::WriteUncorrectable | Op::Reset) {
        return io.finish(Status::INVALID_OPCODE.do_not_retry());
    }
    reactor::spawn_local(async move {
        let result = match io.op {
            Op::WriteZeroes => write_zeroes(&c, &io).await,
            Op::Compare => compare(&c, io.lba, io.blocks, &io.data).await,
            Op::CompareAndWrite => compare_and_write(&c, &mut io).await,
            Op::Copy => copy(&c, &io).await,
            // A device without a cache has nothing to flush.
            _ => Ok(()),
        };
        io.up(result.err().unwrap_or(Status::SUCCESS));
    })
    .detach();
}

/// See [`crate::Channel::rewrite`].
pub(crate) async fn rewrite(
    c: &ChannelInner,
    lba: u64,
    blocks: u64,
    which: impl FnOnce(&Io) -> BlockRanges,
) -> Result<u64, Status> {
    let block_bytes = c.desc.bdev().block_size_bytes() as usize;
    let _guard = RangeLocks::lock(c.desc.bdev(), Range { lba, blocks }).await;
    let queue: Rc<dyn Queue> = c.queue.clone();
    let read = IoFuture::start(Io::new(Op::Read, lba, blocks), |io| queue.submit(io)).await;
    let status = read.status();
    let parts = if status.is_ok() { which(&read) } else { BlockRanges::new() };
    let mut written = 0;
    let mut result = status.ok();
    for part in parts {
        let (from, bytes) = (part.start as usize * block_bytes, part.blocks as usize * block_bytes);
        if result.is_ok() {
            let data = read.data.slice(from..from + bytes);
            result = write(c, lba + u64::from(part.start), part.blocks.into(), data, false).await;
            written += u64::from(part.blocks);
        }
    }
    read.recycle();
    result.map(|()| written)
}

fn step_blocks(c: &ChannelInner) -> u64 {
    STEP_BYTES / u64::from(c.desc.bdev().block_size_bytes())
}

/// Submits below the channel: the range is already ours.
async fn direct(c: &ChannelInner, io: Box<Io>) -> Result<SgList, Status> {
    let queue: Rc<dyn Queue> = c.queue.clone();
    let mut io = IoFuture::start(io, |io| queue.submit(io)).await;
    let data = std::mem::take(&mut io.data);
    let status = io.status();
    io.recycle();
    status.ok().map(|()| data)
}

async fn write(c: &ChannelInner, lba: u64, blocks: u64, data: SgList, fua: bool) -> Result<(), Status> {
    let mut io = Io::new(Op::Write, lba, blocks);
    io.data = data;
    io.fua = fua;
    direct(c, io).await.map(drop)
}

async fn write_zeroes(c: &ChannelInner, io: &Io) -> Result<(), Status> {
    let bs = u64::from(c.desc.bdev().block_size_bytes());
    let mut done = 0;
    while done < io.blocks {
        let n = step_blocks(c).min(io.blocks - done);
        write(c, io.lba + done, n, SgList::zeroes((n * bs) as usize), io.fua).await?;
        done += n;
    }
    Ok(())
}

async fn compare(c: &ChannelInner, lba: u64, blocks: u64, expected: &SgList) -> Result<(), Status> {
    let found = direct(c, Io::new(Op::Read, lba, blocks)).await?;
    if found.eq_bytes(expected) { Ok(()) } else { Err(Status::COMPARE_FAILURE) }
}

async fn compare_and_write(c: &ChannelInner, io: &mut Io) -> Result<(), Status> {
    let range = Range { lba: io.lba, blocks: io.blocks };
    let _guard = RangeLocks::lock(c.desc.bdev(), range).await;
    compare(c, io.lba, io.blocks, &io.compare).await?;
    write(c, io.lba, io.blocks, std::mem::take(&mut io.data), io.fua).await
}

async fn copy(c: &ChannelInner, io: &Io) -> Result<(), Status> {
    let overlap = io.src_lba < io.lba + io.blocks && io.lba < io.src_lba + io.blocks;
    if overlap && io.src_lba != io.lba {
        return Err(Status::INVALID_FIELD.do_not_retry());
    }
    let mut done = 0;
    while done < io.blocks {
        let n = step_blocks(c).min(io.blocks - done);
        let data = direct(c, Io::new(Op::Read, io.src_lba + done, n)).await?;
        write(c, io.lba + done, n, data, io.fua).await?;
        done += n;
    }
    Ok(())
}
