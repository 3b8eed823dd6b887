//! A volume as a block device.
//!
//! Owns the translation of host I/O (blocks of 512 or 4096 bytes) to whole 4 KiB blocks of the pool. I/O that comes on
//! another core than the pool's home is hashed and compressed, read and decoded there; what concerns the pool's state goes to
//! the home by message, with its buffers, without a copy.
//!
//! On a volume with 512-byte blocks every change locks the 4 KiB blocks that it touches: a change of part of a block reads
//! it, changes it and writes it, and must not undo a change of the rest that came in between.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{
    BdevError, BlockRange, BlockRanges, Device, DeviceInfo, Io, Op, OpSet, Queue, Space, Status,
};
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::fragment::CHUNK_BYTES;
use cryptfold_reduce_format::ids::{HostKeyId, VolumeId};
use cryptfold_reduce_format::map::Target;
use cryptfold_reduce_format::record::volume_flags;
use reactor::memory::{Buf, SgList};

use crate::core::Core;
use crate::generation::SharedHasher;
use crate::info::VolumeInfo;
use crate::ingest::{HASHED, PIECE, Prepared, SealAs, Small, whole_chunks};
use crate::pool::{Parked, Pool, PoolRef};
use crate::read::{Runs, steps};

/// Largest write that is gathered with others, in 4 KiB blocks: larger ones fill the hash's lanes by themselves.
const SMALL_BLOCKS: u64 = 2;

/// A volume's end in the registry.
pub(crate) struct VolumeDevice {
    pool: PoolRef,
    id: VolumeId,
    info: DeviceInfo,
    domain: String,
    hasher: Arc<SharedHasher>,
}

/// What a volume's device says of itself.
pub(crate) struct VolumeFacts<'a> {
    pub id: VolumeId,
    pub uuid: uuid::Uuid,
    pub pool_name: &'a str,
    pub name: &'a str,
    pub domain: &'a str,
    pub block_bytes: u32,
    pub blocks: u64,
    pub flags: u32,
    /// Every completion is durable.
    pub durable: bool,
    pub hasher: Arc<SharedHasher>,
}

impl VolumeDevice {
    /// The device of a volume of `pool`.
    pub fn new(pool: PoolRef, facts: &VolumeFacts<'_>) -> Arc<VolumeDevice> {
        let per_chunk = CHUNK_BYTES as u64 / u64::from(facts.block_bytes);
        let mut info = DeviceInfo::new(
            facts.uuid.to_string(),
            "Cryptfold volume",
            facts.block_bytes,
            facts.blocks * per_chunk,
        );
        info.uuid = facts.uuid;
        info.aliases = vec![format!("{}/{}", facts.pool_name, facts.name)];
        info.ops = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes, Op::Reset]);
        if per_chunk == 1 {
            // The map knows whole 4 KiB blocks: a part of one can not be uncorrectable while the rest is not.
            info.ops = info.ops.with(Op::WriteUncorrectable);
        }
        info.write_cache = !facts.durable;
        info.atomic_blocks = per_chunk as u32;
        info.optimal_io_blocks = (128 << 10) / facts.block_bytes;
        info.reports_unmapped = true;
        info.unmapped_blocks = per_chunk as u32;
        info.thin = true;
        info.read_only = facts.flags & volume_flags::READ_ONLY != 0;
        Arc::new(VolumeDevice {
            pool,
            id: facts.id,
            info,
            domain: facts.domain.to_owned(),
            hasher: facts.hasher.clone(),
        })
    }
}

impl Device for VolumeDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        let gone = || BdevError::Removing(self.info.name.clone());
        let side = if self.pool.home.is_current() {
            Side::Home(self.pool.get().ok_or_else(gone)?)
        } else {
            let descriptor = self.pool.descriptor.upgrade().ok_or_else(gone)?;
            Side::Away(Core::of(self.pool.id, &descriptor)?)
        };
        Ok(Rc::new(VolumeQueue { side, device: self }))
    }

    fn space(&self) -> Option<Space> {
        self.pool.space()
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.pool.allocated_bytes(self.id)
    }

    fn driver_specific(&self) -> serde_json::Value {
        let mut lvol = serde_json::json!({
            "lvol_store_uuid": self.pool.uuid.to_string(),
            "base_bdev": self.pool.base_name,
            "thin_provision": true,
            "esnap_clone": false,
            "domain": self.domain,
        });
        // Not from other reactors, which must not wait.
        if let Some((info, segment_bytes)) = self.now() {
            lvol["num_allocated_clusters"] = info.logical_bytes.div_ceil(u64::from(segment_bytes)).into();
            lvol["snapshot"] = info.snapshot.into();
            lvol["clone"] = info.parent.is_some().into();
            if let Some(parent) = info.parent {
                lvol["base_snapshot"] = parent.into();
            }
            if info.snapshot {
                lvol["clones"] = info.clones.into();
            }
        }
        serde_json::json!({ "lvol": lvol })
    }
}

pub(crate) struct VolumeQueue {
    device: Arc<VolumeDevice>,
    side: Side,
}

/// Which core this is.
#[derive(Clone)]
enum Side {
    /// The pool's home.
    Home(Rc<Pool>),
    /// Another one, with what the pool has there.
    Away(Rc<Core>),
}

/// An I/O without its way back, so that it can cross cores.
struct Request {
    op: Op,
    fua: bool,
    host_key: u16,
    lba: u64,
    blocks: u64,
    data: SgList,
}

struct Answer {
    status: Status,
    data: SgList,
    runs: Runs,
}

impl Queue for VolumeQueue {
    fn submit(self: Rc<Self>, io: Box<Io>) {
        match &self.side {
            Side::Home(pool) if self.is_small(&io) => {
                let pool = pool.clone();
                let mut gathered = pool.gathered.0.borrow_mut();
                gathered.push((self, io));
                if gathered.len() == 1 {
                    drop(gathered);
                    reactor::defer(Box::new(Flush(pool)));
                }
            }
            _ => self.start(io),
        }
    }
}

/// Small writes that came in one turn of the reactor.
#[derive(Default)]
pub(crate) struct Gathered(RefCell<Vec<(Rc<VolumeQueue>, Box<Io>)>>);

/// Runs what has been gathered, at the end of the turn.
struct Flush(Rc<Pool>);

impl reactor::Deferred for Flush {
    fn run(self: Box<Self>) {
        let mut ios = std::mem::take(&mut *self.0.gathered.0.borrow_mut());
        for batch in ios.chunks_mut(HASHED) {
            let mut results: [Option<Result<(), Status>>; HASHED] = [None; HASHED];
            let writes = batch.iter().map(|(queue, io)| Small {
                volume: queue.device.id,
                lba: io.lba,
                data: &io.data,
                host_key: HostKeyId(io.host_key),
            });
            self.0.try_writes(writes, |nth, result| results[nth] = result);
            for ((queue, io), result) in batch.iter_mut().zip(results) {
                let io = std::mem::replace(io, Io::new(Op::Flush, 0, 0));
                match result {
                    Some(result) => io.finish(result.err().unwrap_or(Status::SUCCESS)),
                    None => queue.clone().start(io),
                }
            }
        }
        for (_, spare) in ios.drain(..) {
            spare.recycle();
        }
        // The list's memory is used again.
        let mut gathered = self.0.gathered.0.borrow_mut();
        if gathered.is_empty() {
            *gathered = ios;
        }
    }
}

impl VolumeQueue {
    /// Whether a write can be gathered with others: small, and nothing to be read or made durable for it.
    fn is_small(&self, io: &Io) -> bool {
        io.op == Op::Write
            && !self.must_be_durable(io)
            && (1..=SMALL_BLOCKS).contains(&io.blocks)
            && self.device.info.block_size_bytes as usize == CHUNK_BYTES
            && io.data.iter().all(|buf| buf.len().is_multiple_of(CHUNK_BYTES))
    }

    /// Whether a change has to be durable when it completes: what comes meanwhile shares its commit.
    fn must_be_durable(&self, io: &Io) -> bool {
        io.fua || !self.device.info.write_cache
    }

    fn core(&self) -> &Rc<Core> {
        match &self.side {
            Side::Home(pool) => &pool.core,
            Side::Away(core) => core,
        }
    }

    /// Has what comes behind a read brought, if it is one of several in order.
    fn read_ahead(self: &Rc<Self>, per_chunk: u64, lba: u64, blocks: u64) {
        let id = self.device.id;
        let Some(wanted) = self.core().ahead.follow(id, lba..lba + blocks, per_chunk) else { return };
        let queue = self.clone();
        reactor::spawn_local(async move {
            let (first, count) = (wanted.start, (wanted.end - wanted.start) as usize);
            let resolved = match &queue.side {
                Side::Home(pool) => pool.resolve_blocks(id, first, count).await,
                Side::Away(_) => {
                    let reader = reactor::current();
                    let resolve = move |pool: Rc<Pool>| async move {
                        // A pool that is closed waits for this.
                        pool.lends_to(reader, id);
                        pool.resolve_blocks(id, first, count).await
                    };
                    queue.device.on_home(resolve).await
                }
            };
            if let Ok(mut resolved) = resolved {
                // Who wants it asks again, and is told what is wrong.
                let _ = queue.core().bring(&mut resolved).await;
            }
            queue.core().ahead.arrived(id, &wanted);
        })
        .detach();
    }

    /// Does an I/O in a task of its own.
    fn start(self: Rc<Self>, mut io: Box<Io>) {
        let (id, block_bytes) = (self.device.id, self.device.info.block_size_bytes);
        let per_chunk = CHUNK_BYTES as u64 / u64::from(block_bytes);
        if io.op == Op::Read {
            // By itself, because a read's future is much smaller than a write's. Its own buffers stay on the I/O.
            self.read_ahead(per_chunk, io.lba, io.blocks);
            return reactor::spawn_local(async move {
                self.core().ahead.wait(id, io.lba / per_chunk).await;
                let answer = match &self.side {
                    Side::Home(pool) => read(Reader::Home(pool), id, per_chunk, io.lba, io.blocks).await,
                    Side::Away(core) => {
                        read(Reader::Away(&self.device, core), id, per_chunk, io.lba, io.blocks).await
                    }
                };
                finish(io, answer.unwrap_or_else(Answer::failed));
            })
            .detach();
        }
        let request = Request {
            op: io.op,
            fua: self.must_be_durable(&io),
            host_key: io.host_key,
            lba: io.lba,
            blocks: io.blocks,
            data: std::mem::take(&mut io.data),
        };
        reactor::spawn_local(async move {
            let answer = match &self.side {
                Side::Home(pool) => execute(pool.clone(), id, block_bytes, request).await,
                Side::Away(core) => self.device.execute_away(core, request).await,
            };
            finish(io, answer);
        })
        .detach();
    }
}

impl VolumeDevice {
    /// What the volume is now, and the bytes of a segment: from its home reactor and ordinary threads.
    fn now(&self) -> Option<(VolumeInfo, u32)> {
        let look = {
            let (reference, id) = (self.pool.clone(), self.id);
            move || {
                let pool = reference.get()?;
                Some((pool.volume_info(id)?, pool.segment_bytes))
            }
        };
        if self.pool.home.is_current() {
            return look();
        }
        self.pool.home.block_on(move || async move { look() }).ok().flatten()
    }

    /// Runs `f` with the pool on its home.
    async fn on_home<F, Fut, T>(&self, f: F) -> Result<T, Status>
    where
        F: FnOnce(Rc<Pool>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, Status>> + 'static,
        T: Send + 'static,
    {
        let pool = self.pool.clone();
        let gone = Status::INVALID_NAMESPACE.do_not_retry();
        let call = self.pool.home.call(move || async move {
            match pool.get() {
                Some(pool) => f(pool).await,
                None => Err(gone),
            }
        });
        call.await.unwrap_or(Err(gone))
    }

    /// Does what is no read from another core than the home: hashes, compresses and seals larger writes here, and leaves the
    /// rest to the home.
    async fn execute_away(&self, core: &Rc<Core>, request: Request) -> Answer {
        let (id, block_bytes) = (self.id, self.info.block_size_bytes);
        let whole = block_bytes as usize == CHUNK_BYTES;
        if request.op == Op::Write && whole && request.blocks > SMALL_BLOCKS {
            return self.write_away(core, request).await.into();
        }
        let done = self.on_home(move |pool| async move { Ok(execute(pool, id, block_bytes, request).await) });
        done.await.unwrap_or_else(Answer::failed)
    }

    async fn write_away(&self, core: &Rc<Core>, request: Request) -> Result<(), Status> {
        let Request { fua, host_key, mut lba, mut data, .. } = request;
        let (id, key) = (self.id, HostKeyId(host_key));
        while !data.is_empty() {
            let count = PIECE.min(data.len_bytes() / CHUNK_BYTES);
            let piece = whole_chunks(data.split_to(count * CHUNK_BYTES));
            let force = fua && data.is_empty();
            let (generation, hasher) = self.hasher.now();
            let mut prepared = Prepared::new(piece, key, &hasher);
            drop(hasher);
            let mut guess = None;
            if prepared.assume_new()
                && let Some((seal, guessed)) = core.guess_new(id)
            {
                guess = Some(guessed);
                prepared = self.seal_away(core, prepared, seal).await?;
            }
            let mut next = Some(prepared);
            while let Some(prepared) = next {
                let back = self.on_home(move |pool| async move {
                    let _busy = pool.enter();
                    let back = pool.write_prepared(id, generation, lba, prepared).await?;
                    if force && back.unsealed.is_none() {
                        pool.flush().await?;
                    }
                    Ok(back)
                });
                let back = back.await.inspect_err(|_| core.end_run())?;
                next = match back.unsealed {
                    Some(unsealed) => Some(self.seal_away(core, unsealed, back.seal).await?),
                    None => {
                        core.was_new(id, back.seal, back.all_new);
                        None
                    }
                };
            }
            drop(guess);
            lba += count as u64;
        }
        Ok(())
    }

    /// Seals what is new of a piece on this core, if the home lends what that takes.
    async fn seal_away(
        &self,
        core: &Rc<Core>,
        mut prepared: Prepared,
        seal: SealAs,
    ) -> Result<Prepared, Status> {
        let SealAs { domain, compression, segment_bytes } = seal;
        let (chunks, bytes) = prepared.new_chunks();
        let ask = |ask| {
            let here = reactor::current();
            self.on_home(move |pool| async move {
                let _busy = pool.enter();
                pool.lend(here, ask).await
            })
        };
        match Box::pin(core.ready((domain, segment_bytes), chunks, bytes, ask)).await {
            Ok(Some(lane)) => prepared.seal(&lane, compression, &mut core.compressor.borrow_mut())?,
            Ok(None) => prepared.leave(),
            Err(status) => {
                if core.has_failed() {
                    let fail = move |pool: Rc<Pool>| async move {
                        pool.fail(status);
                        Ok(())
                    };
                    self.on_home(fail).await?;
                }
                return Err(status);
            }
        }
        Ok(prepared)
    }

    async fn read_away(&self, core: &Core, lba: u64, count: u64) -> Result<(SgList, Runs), Status> {
        let id = self.id;
        let mut data = SgList::new();
        let mut runs = Runs::default();
        for (done, blocks) in steps(count) {
            let resolving =
                self.on_home(move |pool| async move { pool.resolve_blocks(id, lba + done, blocks).await });
            let resolved = resolving.await?;
            resolved.add_runs(done, &mut runs);
            match core.read(&resolved, blocks).await {
                Ok(part) => data.append(part),
                Err(error) => {
                    let status = self.on_home(move |pool| async move { Ok(pool.read_failed(error)) }).await?;
                    return Err(status);
                }
            }
        }
        Ok((data, runs))
    }
}

/// Where a read's blocks come from.
enum Reader<'a> {
    Home(&'a Pool),
    Away(&'a VolumeDevice, &'a Core),
}

impl Answer {
    fn failed(status: Status) -> Answer {
        Answer { status, data: SgList::new(), runs: Runs::default() }
    }
}

impl From<Result<(), Status>> for Answer {
    fn from(result: Result<(), Status>) -> Answer {
        Answer::failed(result.err().unwrap_or(Status::SUCCESS))
    }
}

fn finish(mut io: Box<Io>, answer: Answer) {
    let mut status = answer.status;
    if io.op == Op::Read && status.is_ok() {
        io.unmapped = answer.runs.unmapped;
        if io.host_key != 0 {
            io.as_sent = answer.runs.as_sent;
        }
        if io.data.is_empty() {
            io.data = answer.data;
        } else if !copy_into(&mut io.data, &answer.data) {
            status = Status::INTERNAL_ERROR;
        }
    }
    io.up(status);
}

/// Copies all bytes of `from` to the buffers of `to`. False: they are shared, or of another length.
fn copy_into(to: &mut SgList, from: &SgList) -> bool {
    if to.len_bytes() != from.len_bytes() {
        return false;
    }
    let Some(targets) = to.get_mut_segments() else { return false };
    let mut rest = from.clone();
    for target in targets {
        rest.split_to(target.len()).copy_to_slice(target);
    }
    true
}

async fn execute(pool: Rc<Pool>, id: VolumeId, block_bytes: u32, request: Request) -> Answer {
    let per_chunk = CHUNK_BYTES as u64 / u64::from(block_bytes);
    match request.op {
        Op::Flush | Op::Reset => pool.flush().await.into(),
        _ => {
            let _busy = pool.enter();
            let fua = request.fua;
            let mut result = change(&pool, id, per_chunk, request).await;
            if fua && result.is_ok() {
                result = pool.flush().await;
            }
            result.into()
        }
    }
}

async fn read(
    reader: Reader<'_>,
    id: VolumeId,
    per_chunk: u64,
    lba: u64,
    blocks: u64,
) -> Result<Answer, Status> {
    if blocks == 0 {
        return Ok(Answer::failed(Status::SUCCESS));
    }
    let (first, end) = (lba / per_chunk, (lba + blocks).div_ceil(per_chunk));
    let (mut data, mut runs) = match reader {
        Reader::Home(pool) => pool.read_blocks(id, first, end - first).await?,
        Reader::Away(device, core) => device.read_away(core, first, end - first).await?,
    };
    if per_chunk == 1 {
        return Ok(Answer { status: Status::SUCCESS, data, runs });
    }
    let block_bytes = CHUNK_BYTES as u64 / per_chunk;
    let skip = (lba - first * per_chunk) * block_bytes;
    data = data.slice(skip as usize..(skip + blocks * block_bytes) as usize);
    // From chunks counted from `first` to blocks counted from `lba`, cut to the I/O.
    let cut = |chunks: BlockRanges| -> BlockRanges {
        let cut = chunks.iter().filter_map(|range| {
            let start = ((first + u64::from(range.start)) * per_chunk).max(lba);
            let stop = ((first + u64::from(range.start + range.blocks)) * per_chunk).min(lba + blocks);
            (start < stop).then(|| BlockRange { start: (start - lba) as u32, blocks: (stop - start) as u32 })
        });
        cut.collect()
    };
    runs = Runs { unmapped: cut(runs.unmapped), as_sent: cut(runs.as_sent) };
    Ok(Answer { status: Status::SUCCESS, data, runs })
}

async fn change(pool: &Rc<Pool>, id: VolumeId, per_chunk: u64, request: Request) -> Result<(), Status> {
    let target = pool.target(id)?;
    let Request { op, host_key, lba, blocks, data, .. } = request;
    if blocks == 0 {
        return Ok(());
    }
    let key = HostKeyId(host_key);
    if per_chunk == 1 {
        return match op {
            Op::Write => pool.write_blocks(&target, lba, data, key).await,
            Op::Unmap | Op::WriteZeroes => {
                pool.fill_blocks(&target, lba, blocks, Target::Unmapped, HostKeyId(0)).await
            }
            Op::WriteUncorrectable => {
                pool.fill_blocks(&target, lba, blocks, Target::Uncorrectable, HostKeyId(0)).await
            }
            _ => Err(Status::INVALID_OPCODE.do_not_retry()),
        };
    }
    let (first, end) = (lba / per_chunk, (lba + blocks).div_ceil(per_chunk));
    let _guard = {
        // Who has them may wait for an audit's end. Nothing is changed before `throttle`, which then waits as well.
        let _parked = Parked::new(pool);
        pool.locks.lock(id, first, end).await
    };
    let block_bytes = CHUNK_BYTES as u64 / per_chunk;
    match op {
        Op::Write => {
            let head = (lba - first * per_chunk) * block_bytes;
            let tail = (end * per_chunk - lba - blocks) * block_bytes;
            let whole = widen(pool, id, first, end, head as usize, tail as usize, data).await?;
            pool.write_blocks(&target, first, whole, key).await
        }
        Op::Unmap | Op::WriteZeroes => {
            // Whole blocks are given up, parts of blocks become zeros.
            let (inner, inner_end) = (lba.div_ceil(per_chunk), (lba + blocks) / per_chunk);
            let part = |from: u64, to: u64| zero_part(pool, &target, per_chunk, from, to);
            if inner >= inner_end {
                if first + 1 == end {
                    return part(lba, lba + blocks).await;
                }
                part(lba, inner * per_chunk).await?;
                return part(inner * per_chunk, lba + blocks).await;
            }
            part(lba, inner * per_chunk).await?;
            part(inner_end * per_chunk, lba + blocks).await?;
            pool.fill_blocks(&target, inner, inner_end - inner, Target::Unmapped, HostKeyId(0)).await
        }
        _ => Err(Status::INVALID_OPCODE.do_not_retry()),
    }
}

/// Completes a write to whole 4 KiB blocks `first .. end` by what is there: `head` bytes before it and `tail` after it.
async fn widen(
    pool: &Rc<Pool>,
    id: VolumeId,
    first: u64,
    end: u64,
    head: usize,
    tail: usize,
    data: SgList,
) -> Result<SgList, Status> {
    let mut whole = SgList::new();
    if head > 0 {
        let (before, _) = pool.read_blocks(id, first, 1).await?;
        whole.append(before.slice(0..head));
    }
    whole.append(data);
    if tail > 0 {
        let (after, _) = pool.read_blocks(id, end - 1, 1).await?;
        whole.append(after.slice(CHUNK_BYTES - tail..CHUNK_BYTES));
    }
    Ok(whole)
}

/// Zeroes blocks `from .. to`, which lie in one 4 KiB block.
async fn zero_part(
    pool: &Rc<Pool>,
    target: &crate::ingest::Target4k,
    per_chunk: u64,
    from: u64,
    to: u64,
) -> Result<(), Status> {
    if from >= to {
        return Ok(());
    }
    let (chunk, size) = (from / per_chunk, CHUNK_BYTES as u64 / per_chunk);
    let (data, runs) = pool.read_blocks(target.volume, chunk, 1).await?;
    if !runs.unmapped.is_empty() {
        return Ok(());
    }
    let mut whole = vec![0; CHUNK_BYTES];
    data.copy_to_slice(&mut whole);
    let start = (from - chunk * per_chunk) * size;
    whole[start as usize..(start + (to - from) * size) as usize].fill(0);
    pool.write_blocks(target, chunk, Buf::from_slice(&whole).into(), HostKeyId(0)).await
}
