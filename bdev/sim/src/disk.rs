//! The simulated disk as a block device.
//!
//! Owns its content, its write cache's record and its own seeded numbers. Invariants: an I/O ends after its drawn latency
//! (so in any order); a write takes effect when it completes, a read shows one moment between its submission and its
//! completion; once the power is off nothing completes any more.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cryptfold_bdev::{Bdev, BdevError, Device, DeviceInfo, Io, Op, OpSet, Queue, Registry, Status};
use cryptfold_reactor as reactor;
use reactor::memory::{Buf, SgList};

use crate::crash::{Flush, Payload, Write};
use crate::fault::{self, Effect, Fault};
use crate::{Image, Record, Rng, Survivors, Tear};

/// What a disk is like.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Name in the registry.
    pub name: String,
    /// Size; whole blocks.
    pub bytes: u64,
    /// 512 or 4096.
    pub block_bytes: u32,
    /// Whether completed writes are volatile until flushed. Without, each is durable when it completes.
    pub write_cache: bool,
    /// Whether unmap is offered (reads back as zeros).
    pub unmap: bool,
    /// Shortest and longest usual latency; one I/O in 64 takes up to 50 times as long.
    pub latency: Range<Duration>,
    /// Keeps all events, so that every crash point can be looked at later. Without, only the present one.
    pub record: bool,
}

impl DiskOptions {
    /// A 4 KiB-block disk with write cache and unmap, 5 to 100 us of latency, without record.
    pub fn new(name: &str, bytes: u64) -> DiskOptions {
        DiskOptions {
            name: name.into(),
            bytes,
            block_bytes: 4096,
            write_cache: true,
            unmap: true,
            latency: Duration::from_micros(5)..Duration::from_micros(100),
            record: false,
        }
    }
}

/// A simulated disk. See the module's head.
pub struct SimDisk {
    info: DeviceInfo,
    options: DiskOptions,
    state: Mutex<State>,
}

struct State {
    rng: Rng,
    /// What reads show.
    content: Image,
    /// Content of written ranges before their last write, by page (for stale reads).
    before: Image,
    record: Record,
    next: u64,
    faults: Vec<Fault>,
    ignore_flush: bool,
    ignore_fua: bool,
    cut_after: Option<u64>,
    off: bool,
    reads: u64,
}

/// What was decided about an I/O when it was submitted.
struct Plan {
    id: u64,
    latency: Duration,
    effect: Option<Effect>,
    /// A read that shows the moment of its submission.
    early: Option<Buf>,
}

impl SimDisk {
    /// Registers a disk with `image` on it, whose numbers come from `seed`.
    ///
    /// # Errors
    /// As [`Registry::register`].
    pub fn create(
        registry: &Arc<Registry>,
        options: DiskOptions,
        image: Image,
        seed: u64,
    ) -> Result<(Arc<SimDisk>, Arc<Bdev>), BdevError> {
        let blocks = options.bytes / u64::from(options.block_bytes.max(1));
        let mut info = DeviceInfo::new(&options.name, "Simulated disk", options.block_bytes, blocks);
        info.write_cache = options.write_cache;
        let mut ops = OpSet::of(&[Op::Read, Op::Write, Op::WriteZeroes, Op::Flush, Op::Reset]);
        if options.unmap {
            ops = ops.with(Op::Unmap);
        }
        info.ops = ops;
        let state = State {
            rng: Rng::new(seed),
            content: image.clone(),
            before: image.clone(),
            record: Record { base: image, ..Record::default() },
            next: 0,
            faults: Vec::new(),
            ignore_flush: false,
            ignore_fua: false,
            cut_after: None,
            off: false,
            reads: 0,
        };
        let disk = Arc::new(SimDisk { info, options, state: Mutex::new(state) });
        let bdev = registry.register(disk.clone())?;
        Ok((disk, bdev))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Events so far (see [`Record`]).
    pub fn events(&self) -> u64 {
        self.state().record.events
    }

    /// Reads so far.
    pub fn reads(&self) -> u64 {
        self.state().reads
    }

    /// Cuts the power right after the `n`th event from now (1 = the next).
    pub fn cut_power_after(&self, n: u64) {
        let mut s = self.state();
        s.cut_after = Some(s.record.events + n.max(1));
    }

    /// Cuts the power now.
    pub fn cut_power(&self) {
        self.state().off = true;
    }

    /// Whether the power is off: nothing completes any more.
    pub fn is_off(&self) -> bool {
        self.state().off
    }

    /// The surface after a power cut now.
    pub fn crash(&self, survivors: Survivors, tear: Tear, rng: &mut Rng) -> Image {
        let s = self.state();
        s.record.image(s.record.events, survivors, tear, rng)
    }

    /// Number of writes that a power cut now may lose.
    pub fn volatile(&self) -> usize {
        let s = self.state();
        s.record.volatile(s.record.events)
    }

    /// The record so far; complete with [`DiskOptions::record`] only.
    pub fn record(&self) -> Record {
        self.state().record.clone()
    }

    /// What reads show now.
    pub fn content(&self) -> Image {
        self.state().content.clone()
    }

    /// Adds a fault.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// Forgets all faults that have not hit yet; returns how many those were.
    pub fn clear_faults(&self) -> usize {
        std::mem::take(&mut self.state().faults).len()
    }

    /// Changes bits of the byte at `at`, at once and for good, in the cache and on the surface.
    pub fn rot(&self, at: u64, mask: u8) {
        let mut s = self.state();
        s.content.flip(at, mask);
        // The surface gets it as a write of its own that nothing can lose.
        let mut sector = [0; crate::SECTOR_BYTES];
        let start = at / sector.len() as u64 * sector.len() as u64;
        s.content.read(start, &mut sector);
        let (submitted, completed) = (s.record.event(), s.record.event());
        let payload = Payload::Bytes(sector.as_slice().into());
        let write = Write { at: start, payload, through: true, submitted, completed: Some(completed) };
        let id = s.next_id();
        s.record.writes.insert(id, write);
    }

    /// A liar, for negative controls: acknowledges flushes without making anything durable.
    pub fn ignore_flush(&self, on: bool) {
        self.state().ignore_flush = on;
    }

    /// A liar, for negative controls: treats FUA writes as any other.
    pub fn ignore_fua(&self, on: bool) {
        self.state().ignore_fua = on;
    }

    fn bytes_of(&self, io: &Io) -> Range<u64> {
        let bs = u64::from(self.options.block_bytes);
        io.lba * bs..(io.lba + io.blocks) * bs
    }

    /// Takes an I/O in. None: the power is off.
    fn begin(&self, io: &Io) -> Option<Plan> {
        let mut guard = self.state();
        let s = &mut *guard;
        if s.off {
            return None;
        }
        let bytes = self.bytes_of(io);
        let effect = fault::hit(&mut s.faults, io, &bytes);
        let mut latency = s.latency(&self.options.latency);
        if let Some(Effect::Slow(more)) = effect {
            latency += more;
        }
        let id = s.next_id();
        let mut early = None;
        match io.op {
            Op::Read => {
                s.reads += 1;
                if s.rng.one_in(2) {
                    early = Some(s.read(&bytes, &effect));
                }
            }
            Op::Write | Op::WriteZeroes | Op::Unmap => {
                if let Some((at, payload)) = self.payload(io, &bytes, &effect) {
                    let through = !self.options.write_cache || (io.fua && !s.ignore_fua);
                    let submitted = s.event();
                    s.record.writes.insert(id, Write { at, payload, through, submitted, completed: None });
                }
            }
            Op::Flush if !matches!(effect, Some(Effect::Fail(_) | Effect::Lost)) => {
                let submitted = s.event();
                s.record.flushes.insert(id, Flush { submitted, completed: None });
            }
            _ => {}
        }
        Some(Plan { id, latency, effect, early })
    }

    /// What a write puts where; None when it puts nothing anywhere.
    fn payload(&self, io: &Io, bytes: &Range<u64>, effect: &Option<Effect>) -> Option<(u64, Payload)> {
        let mut at = bytes.start;
        let mut len = bytes.end - bytes.start;
        match effect {
            Some(Effect::Fail(_) | Effect::Lost) => return None,
            Some(Effect::Misdirected(to)) => {
                at = *to;
                len = len.min(self.options.bytes.saturating_sub(at));
            }
            _ => {}
        }
        if len == 0 {
            return None;
        }
        if io.op != Op::Write {
            return Some((at, Payload::Zeroes(len)));
        }
        let mut data = vec![0; io.data.len_bytes()];
        io.data.copy_to_slice(&mut data);
        if let Some(Effect::Flip { offset, mask }) = effect
            && let Some(byte) = data.get_mut(*offset as usize)
        {
            *byte ^= mask;
        }
        data.truncate(len as usize);
        Some((at, Payload::Bytes(data.into())))
    }

    /// Ends an I/O. None: the power went off.
    fn end(&self, io: &mut Io, plan: &mut Plan) -> Option<Status> {
        let mut guard = self.state();
        let s = &mut *guard;
        if s.off {
            return None;
        }
        match io.op {
            Op::Read => {
                if let Some(Effect::Fail(status) | Effect::FailAfter(status)) = plan.effect {
                    return Some(status);
                }
                let bytes = self.bytes_of(io);
                let data = plan.early.take().unwrap_or_else(|| s.read(&bytes, &plan.effect));
                return Some(deliver(io, data));
            }
            Op::Write | Op::WriteZeroes | Op::Unmap => {
                if let Some(mut write) = s.record.writes.remove(&plan.id) {
                    write.completed = Some(s.event());
                    let mut old = vec![0; write.payload.len() as usize];
                    s.content.read(write.at, &mut old);
                    s.before.write(write.at, &old);
                    write.payload.put_all(&mut s.content, write.at);
                    s.record.writes.insert(plan.id, write);
                    if !self.options.write_cache && !self.options.record {
                        s.record.fold(u64::MAX);
                    }
                }
            }
            Op::Flush => {
                let completed = s.record.flushes.contains_key(&plan.id).then(|| s.event());
                if s.ignore_flush {
                    s.record.flushes.remove(&plan.id);
                } else if let Some(flush) = s.record.flushes.get_mut(&plan.id) {
                    flush.completed = completed;
                    if !self.options.record {
                        let horizon = s.record.horizon(s.record.events);
                        s.record.fold(horizon);
                    }
                }
            }
            _ => {}
        }
        match plan.effect {
            Some(Effect::Fail(status) | Effect::FailAfter(status)) => Some(status),
            _ => Some(Status::SUCCESS),
        }
    }
}

fn deliver(io: &mut Io, data: Buf) -> Status {
    if io.data.is_empty() {
        io.data = SgList::from(data);
    } else if !io.data.copy_from_slice(&data) {
        return Status::DATA_TRANSFER_ERROR;
    }
    Status::SUCCESS
}

impl State {
    fn next_id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn event(&mut self) -> u64 {
        let event = self.record.event();
        if self.cut_after == Some(event) {
            self.off = true;
        }
        event
    }

    fn latency(&mut self, usual: &Range<Duration>) -> Duration {
        let (low, high) = (usual.start.as_nanos() as u64, usual.end.as_nanos() as u64);
        let ns = self.rng.range(low, high.max(low));
        let ns = if self.rng.one_in(64) { ns * self.rng.range(2, 50) } else { ns };
        Duration::from_nanos(ns)
    }

    fn read(&self, bytes: &Range<u64>, effect: &Option<Effect>) -> Buf {
        let mut data = Buf::alloc((bytes.end - bytes.start) as usize);
        let target = data.make_mut();
        match effect {
            Some(Effect::Stale) => self.before.read(bytes.start, target),
            _ => self.content.read(bytes.start, target),
        }
        if let Some(Effect::Flip { offset, mask }) = effect
            && let Some(byte) = target.get_mut(*offset as usize)
        {
            *byte ^= mask;
        }
        data
    }
}

impl Device for SimDisk {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        Ok(Rc::new(SimQueue { disk: self, stalled: RefCell::default() }))
    }
}

struct SimQueue {
    disk: Arc<SimDisk>,
    stalled: RefCell<BTreeMap<u64, Box<Io>>>,
}

impl Queue for SimQueue {
    fn submit(self: Rc<Self>, mut io: Box<Io>) {
        if io.op == Op::Reset {
            for (_, held) in std::mem::take(&mut *self.stalled.borrow_mut()) {
                held.finish(Status::ABORTED_BY_REQUEST);
            }
        }
        let plan = self.disk.begin(&io);
        reactor::spawn_local(async move {
            // Without power the I/O stays here, and goes with the reactor.
            let Some(mut plan) = plan else { return std::future::pending().await };
            if plan.effect == Some(Effect::Stall) {
                self.stalled.borrow_mut().insert(plan.id, io);
                return;
            }
            reactor::sleep(plan.latency).await;
            match self.disk.end(&mut io, &mut plan) {
                Some(status) => io.up(status),
                None => std::future::pending().await,
            }
        })
        .detach();
    }

    fn abort(&self, tag: u64) -> bool {
        let mut stalled = self.stalled.borrow_mut();
        let Some(id) = stalled.iter().find(|(_, io)| io.tag == tag).map(|(id, _)| *id) else { return false };
        if let Some(io) = stalled.remove(&id) {
            io.finish(Status::ABORTED_BY_REQUEST);
        }
        true
    }
}
