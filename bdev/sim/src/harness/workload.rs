//! What the workers of a simulated machine do to the volumes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Io, Op, Registry, Status};
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reactor::{self as reactor};

use super::Stack;
use super::operator::Table;
use crate::content::{self, Kind, Tag};
use crate::{History, Rng, SimDisk, VolumeId};

/// Shares of the operations, and their sizes.
#[derive(Clone, Debug)]
pub struct Mix {
    /// Share of writes.
    pub write: u64,
    /// Share of reads.
    pub read: u64,
    /// Share of flushes.
    pub flush: u64,
    /// Share of unmaps.
    pub unmap: u64,
    /// Share of write-zeroes.
    pub zero: u64,
    /// Share of pauses (up to a few seconds, so that timers get their turn).
    pub pause: u64,
    /// One write in so many is FUA.
    pub fua_one_in: u64,
    /// Longest write or read, in bytes.
    pub max_bytes: u64,
    /// Number of different duplicate contents.
    pub sets: u64,
    /// Half of the operations go to the first so many blocks.
    pub hot_blocks: u64,
}

impl Default for Mix {
    fn default() -> Mix {
        Mix {
            write: 50,
            read: 20,
            flush: 8,
            unmap: 6,
            zero: 4,
            pause: 4,
            fua_one_in: 12,
            max_bytes: 128 << 10,
            sets: 40,
            hot_blocks: 64,
        }
    }
}

pub(super) struct Worker {
    pub stack: Rc<dyn Stack>,
    pub registry: Arc<Registry>,
    pub table: Table,
    pub disk: Arc<SimDisk>,
    pub history: Rc<RefCell<History>>,
    pub generation: Rc<RefCell<u64>>,
    pub rng: Rng,
    pub ops: u64,
    pub mix: Mix,
    pub allowed: fn(Status) -> bool,
}

struct Target {
    id: VolumeId,
    name: String,
    channel: Channel,
    block_bytes: u64,
    blocks: u64,
    writable: bool,
}

pub(super) async fn run(mut worker: Worker) -> Result<(), String> {
    let mut channels: HashMap<VolumeId, Channel> = HashMap::new();
    for _ in 0..worker.ops {
        let now = worker.history.borrow().now();
        let hold = worker.table.hold(&mut worker.rng, now);
        let entry = &hold.entry;
        let channel = match channels.get(&entry.id) {
            Some(channel) => channel.clone(),
            None => {
                let access = if entry.writable { Access::ReadWrite } else { Access::ReadOnly };
                let opened = worker.registry.open(&entry.name, access, |_| ());
                let channel = opened.and_then(|descriptor| descriptor.channel());
                let channel = channel.map_err(|e| format!("{}: {e}", entry.name))?;
                // What may be deleted is not kept open.
                if !entry.extra {
                    channels.insert(entry.id, channel.clone());
                }
                channel
            }
        };
        let bdev = channel.bdev();
        let (block_bytes, blocks) = (u64::from(bdev.block_size_bytes()), bdev.blocks());
        let (id, name, writable) = (entry.id, entry.name.clone(), entry.writable);
        let target = Target { id, name, channel, block_bytes, blocks, writable };
        worker.one(&target).await?;
        drop(target);
    }
    Ok(())
}

impl Worker {
    async fn one(&mut self, target: &Target) -> Result<(), String> {
        let m = &self.mix;
        let shares = [m.write, m.read, m.flush, m.unmap, m.zero, m.pause];
        let mut draw = self.rng.below(shares.iter().sum());
        let mut which = 0;
        while draw >= shares[which] {
            draw -= shares[which];
            which += 1;
        }
        let (lba, blocks) = self.place(target);
        let fua = self.rng.one_in(self.mix.fua_one_in.max(1));
        match which {
            0 | 3 | 4 if !target.writable => self.read(target, lba, blocks).await,
            0 => self.write(target, lba, blocks, fua).await,
            1 => self.read(target, lba, blocks).await,
            2 => self.flush(target).await,
            3 => self.clear(target, Op::Unmap, lba, blocks, false).await,
            4 => self.clear(target, Op::WriteZeroes, lba, blocks, fua).await,
            _ => {
                reactor::sleep(Duration::from_micros(self.rng.magnitude(4_000_000))).await;
                Ok(())
            }
        }
    }

    fn place(&mut self, t: &Target) -> (u64, u64) {
        let longest = (self.mix.max_bytes / t.block_bytes).clamp(1, t.blocks);
        let blocks = (self.rng.magnitude(longest - 1) + 1).min(longest);
        let span = if self.rng.one_in(2) { self.mix.hot_blocks.min(t.blocks) } else { t.blocks };
        let lba = self.rng.below(span).min(t.blocks - blocks);
        (lba, blocks)
    }

    fn history(&self) -> std::cell::RefMut<'_, History> {
        let mut history = self.history.borrow_mut();
        history.stamp(self.disk.events());
        history
    }

    fn verdict(&self, status: Status, what: impl Fn() -> String) -> Result<(), String> {
        if status.is_ok() || (self.allowed)(status) { Ok(()) } else { Err(format!("{}: {status}", what())) }
    }

    /// A write's content: one kind for all of it, or block by block.
    fn content(&mut self, t: &Target, lba: u64, blocks: u64) -> Buf {
        let mut generation = self.generation.borrow_mut();
        *generation += 1;
        let mixed = self.rng.one_in(2);
        let mut kind = Kind::draw(&mut self.rng, self.mix.sets);
        let mut tags = Vec::new();
        for lba in lba..lba + blocks {
            tags.push(Tag { volume: t.id.0 as u64, lba, generation: *generation, kind });
            kind = match kind {
                _ if mixed => Kind::draw(&mut self.rng, self.mix.sets),
                // A run of duplicates, as copied files are.
                Kind::Duplicate(set) => Kind::Duplicate((set + 1) % self.mix.sets.max(1)),
                other => other,
            };
        }
        content::blocks(&tags, t.block_bytes as usize)
    }

    async fn write(&mut self, t: &Target, lba: u64, blocks: u64, fua: bool) -> Result<(), String> {
        let data = self.content(t, lba, blocks);
        let id = self.history().write_started(t.id, lba, &data, fua);
        let mut io = Io::new(Op::Write, lba, blocks);
        io.fua = fua;
        io.data = cut(data, &mut self.rng);
        let io = t.channel.io(io).await;
        let status = io.status();
        io.recycle();
        self.history().write_ended(id, status.is_ok());
        self.verdict(status, || format!("write of {}, block {lba}+{blocks}", t.name))
    }

    async fn clear(&mut self, t: &Target, op: Op, lba: u64, blocks: u64, fua: bool) -> Result<(), String> {
        let id = self.history().zeroes_started(t.id, lba, blocks, fua);
        let mut io = Io::new(op, lba, blocks);
        io.fua = fua;
        let io = t.channel.io(io).await;
        let status = io.status();
        io.recycle();
        self.history().write_ended(id, status.is_ok());
        self.verdict(status, || format!("{} of {}, block {lba}+{blocks}", op.spdk_name(), t.name))
    }

    async fn flush(&mut self, t: &Target) -> Result<(), String> {
        let id = self.history().flush_started(t.id);
        let status = t.channel.flush().await.err().unwrap_or(Status::SUCCESS);
        self.history().flush_ended(id, status.is_ok());
        self.verdict(status, || format!("flush of {}", t.name))
    }

    async fn read(&mut self, t: &Target, lba: u64, blocks: u64) -> Result<(), String> {
        let id = self.history().read_started();
        let interruptions = self.stack.interruptions(&t.name);
        let mut io = Io::new(Op::Read, lba, blocks);
        if self.rng.one_in(2) {
            // Into buffers of its own, two at a random border.
            let bytes = (blocks * t.block_bytes) as usize;
            let first = self.rng.below(bytes as u64 + 1) as usize;
            io.data = [first, bytes - first].map(Buf::alloc).into_iter().collect();
        }
        let mut io = t.channel.io(io).await;
        let (status, data) = (io.status(), std::mem::take(&mut io.data));
        io.recycle();
        if status.is_ok() {
            let data = data.to_contiguous();
            if data.len() as u64 != blocks * t.block_bytes {
                return Err(format!("read of {}, block {lba}+{blocks}: {} bytes", t.name, data.len()));
            }
            self.history().read_ended(id, t.id, lba, &data).map_err(|e| e.to_string())?;
        }
        if status == Status::NAMESPACE_NOT_READY && self.stack.interruptions(&t.name) != interruptions {
            return Ok(());
        }
        self.verdict(status, || format!("read of {}, block {lba}+{blocks}", t.name))
    }
}

/// Cuts a buffer into up to three segments at random places.
fn cut(data: Buf, rng: &mut Rng) -> SgList {
    let mut list = SgList::new();
    let mut rest = data;
    for _ in 0..rng.below(3) {
        let n = rng.below(rest.len() as u64 + 1) as usize;
        list.push(rest.split_to(n));
    }
    list.push(rest);
    list
}
