//! Random I/O over NVMe/TCP until the target dies, and the reading back of everything. Runs on one reactor.

use std::cell::RefCell;
use std::ops::AddAssign;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use cryptfold_bdev::{Complete, Frame, Io, Op, Queue, Status};
use cryptfold_bdev_sim::content::{self, Kind, Tag};
use cryptfold_bdev_sim::{History, Rng, VolumeId};
use cryptfold_nvmf_initiator::{ConnectOptions, Controller, IoQueue, NamespaceQueue};
use cryptfold_nvmf_spec::Nsid;
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::spawn_local;
use cryptfold_reactor::sync::oneshot;

/// Connections for I/O.
pub const QUEUES: u16 = 2;
/// I/Os under way, all volumes together; each worker waits for its own.
const WORKERS: usize = 24;
const MAX_IO_BYTES: u64 = 128 << 10;
/// Half of the I/O goes to the first so many bytes of a volume.
const HOT_BYTES: u64 = 2 << 20;
/// Different contents among the duplicates.
pub const SETS: u64 = 400;
const VERIFY_BYTES: u64 = 1 << 20;

/// Operations that completed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Writes, a twelfth of them FUA.
    pub writes: u64,
    /// Their data.
    pub written_bytes: u64,
    /// Unmaps and write-zeroes.
    pub clears: u64,
    /// Flushes.
    pub flushes: u64,
    /// Reads, each judged.
    pub reads: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.writes += other.writes;
        self.written_bytes += other.written_bytes;
        self.clears += other.clears;
        self.flushes += other.flushes;
        self.reads += other.reads;
    }
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Step {
    #[default]
    Connecting,
    Running,
    Failed,
    Killed,
}

/// Where the load is, for the thread that kills.
#[derive(Default)]
pub struct Phase(Mutex<Step>, Condvar);

impl Phase {
    fn set(&self, step: Step) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = step;
        self.1.notify_all();
    }

    /// Blocks until I/O has begun (true), or never will.
    pub fn wait_until_running(&self) -> bool {
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.1.wait_while(guard, |step| *step == Step::Connecting);
        *waited.unwrap_or_else(PoisonError::into_inner) == Step::Running
    }

    /// The target is about to die: connections may end from now on.
    pub fn killed(&self) {
        self.set(Step::Killed);
    }

    fn is_killed(&self) -> bool {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) == Step::Killed
    }
}

/// What a round's load needs.
pub struct Load {
    pub options: ConnectOptions,
    /// Namespaces 1, 2, ...
    pub volumes: Vec<VolumeId>,
    pub rng: Rng,
    /// Number of the last write.
    pub generation: u64,
    pub phase: Arc<Phase>,
    /// Flushes that completed.
    pub flushed: Arc<AtomicU64>,
}

/// What came of it.
pub struct Outcome {
    pub history: History,
    pub generation: u64,
    pub done: Counts,
    /// Operations that the kill cut off.
    pub cut: u64,
    pub verdict: Result<(), String>,
}

struct Volume {
    id: VolumeId,
    queue: Rc<NamespaceQueue>,
    block_bytes: u64,
    blocks: u64,
}

struct Shared {
    history: RefCell<History>,
    state: RefCell<(u64, Counts, u64)>,
    phase: Arc<Phase>,
    flushed: Arc<AtomicU64>,
}

/// Connects and works until the connections end.
pub async fn run(load: Load, history: History) -> Outcome {
    let shared = Rc::new(Shared {
        history: RefCell::new(history),
        state: RefCell::new((load.generation, Counts::default(), 0)),
        phase: load.phase.clone(),
        flushed: load.flushed.clone(),
    });
    let mut verdict = work(load, &shared).await;
    if verdict.is_err() {
        shared.phase.set(Step::Failed);
    }
    let (generation, done, cut) = *shared.state.borrow();
    let history = shared.history.take();
    if verdict.is_ok() && !shared.phase.is_killed() {
        verdict = Err("the load ended before the kill".into());
    }
    Outcome { history, generation, done, cut, verdict }
}

async fn work(mut load: Load, shared: &Rc<Shared>) -> Result<(), String> {
    let (controller, queues) = connect(&load.options).await?;
    let mut connections = Vec::new();
    for queue in &queues {
        connections.push(Rc::new(open_volumes(&controller, queue, &load.volumes).await?));
    }
    load.phase.set(Step::Running);
    let mut tasks = Vec::new();
    for n in 0..WORKERS {
        let worker = Worker {
            volumes: connections[n % connections.len()].clone(),
            shared: shared.clone(),
            rng: load.rng.fork(),
        };
        tasks.push(spawn_local(worker.run()));
    }
    let mut verdict = Ok(());
    for task in tasks {
        let ended = task.await;
        if verdict.is_ok() && ended.is_err() {
            verdict = ended;
            // The others would go on until the kill; there is nothing more to learn.
            queues.iter().for_each(IoQueue::close);
        }
    }
    verdict
}

async fn connect(options: &ConnectOptions) -> Result<(Controller, Vec<IoQueue>), String> {
    let controller = Controller::connect(options).await.map_err(|e| e.to_string())?;
    let mut queues = Vec::new();
    for _ in 0..QUEUES {
        queues.push(controller.io_queue(127).await.map_err(|e| e.to_string())?);
    }
    Ok((controller, queues))
}

async fn open_volumes(
    controller: &Controller,
    queue: &IoQueue,
    volumes: &[VolumeId],
) -> Result<Vec<Volume>, String> {
    let mut list = Vec::new();
    for (nsid, id) in (1..).zip(volumes) {
        let info = controller.namespace(Nsid(nsid)).await.map_err(|e| e.to_string())?;
        let queue = queue.namespace(&info);
        list.push(Volume { id: *id, queue, block_bytes: info.block_bytes.into(), blocks: info.blocks });
    }
    Ok(list)
}

/// Gets one I/O back.
struct Waiter(RefCell<Option<oneshot::Sender<Box<Io>>>>);

impl Complete for Waiter {
    fn complete(self: Rc<Self>, io: Box<Io>, _: Frame) {
        if let Some(sender) = self.0.borrow_mut().take() {
            // Nobody waits any more: the worker is gone.
            let _ = sender.send(io);
        }
    }
}

async fn submit(queue: &Rc<NamespaceQueue>, mut io: Box<Io>) -> Result<(Status, Buf), String> {
    let (sender, receiver) = oneshot::channel();
    io.push(Rc::new(Waiter(RefCell::new(Some(sender)))), 0, 0);
    queue.clone().submit(io);
    let mut io = receiver.await.map_err(|_| "an I/O was lost inside the initiator")?;
    let (status, data) = (io.status(), std::mem::take(&mut io.data).to_contiguous());
    io.recycle();
    Ok((status, data))
}

struct Worker {
    volumes: Rc<Vec<Volume>>,
    shared: Rc<Shared>,
    rng: Rng,
}

impl Worker {
    /// Until its connection ends.
    async fn run(mut self) -> Result<(), String> {
        let volumes = self.volumes.clone();
        loop {
            let volume = &volumes[self.rng.below(volumes.len() as u64) as usize];
            let (lba, blocks) = self.place(volume);
            let fua = self.rng.one_in(12);
            let (what, status) = match self.rng.below(100) {
                0..60 => ("write", self.write(volume, lba, blocks, fua).await?),
                60..75 => ("read", self.read(volume, lba, blocks).await?),
                75..85 => ("flush", self.flush(volume).await?),
                85..93 => ("unmap", self.clear(volume, Op::Unmap, lba, blocks, false).await?),
                _ => ("write-zeroes", self.clear(volume, Op::WriteZeroes, lba, blocks, fua).await?),
            };
            if status.is_ok() {
                continue;
            }
            self.shared.state.borrow_mut().2 += 1;
            if self.shared.phase.is_killed() && status == Status::TRANSIENT_TRANSPORT_ERROR {
                return Ok(());
            }
            return Err(format!("{what} of {:?}, block {lba}+{blocks}: {status}", volume.id));
        }
    }

    fn place(&mut self, v: &Volume) -> (u64, u64) {
        let longest = (MAX_IO_BYTES / v.block_bytes).clamp(1, v.blocks);
        let blocks = (self.rng.magnitude(longest - 1) + 1).min(longest);
        let hot = (HOT_BYTES / v.block_bytes).min(v.blocks);
        let span = if self.rng.one_in(2) { hot } else { v.blocks };
        (self.rng.below(span).min(v.blocks - blocks), blocks)
    }

    /// A write's content: one kind for all of it, or block by block.
    fn content(&mut self, v: &Volume, lba: u64, blocks: u64) -> Buf {
        let generation = {
            let mut state = self.shared.state.borrow_mut();
            state.0 += 1;
            state.0
        };
        let mixed = self.rng.one_in(2);
        let mut kind = Kind::draw(&mut self.rng, SETS);
        let mut tags = Vec::new();
        for lba in lba..lba + blocks {
            tags.push(Tag { volume: v.id.0 as u64, lba, generation, kind });
            kind = match kind {
                _ if mixed => Kind::draw(&mut self.rng, SETS),
                // A run of duplicates, as copied files are.
                Kind::Duplicate(set) => Kind::Duplicate((set + 1) % SETS),
                other => other,
            };
        }
        content::blocks(&tags, v.block_bytes as usize)
    }

    async fn write(&mut self, v: &Volume, lba: u64, blocks: u64, fua: bool) -> Result<Status, String> {
        let data = self.content(v, lba, blocks);
        let id = self.shared.history.borrow_mut().write_started(v.id, lba, &data, fua);
        let mut io = Io::new(Op::Write, lba, blocks);
        io.fua = fua;
        io.data = data.into();
        let (status, _) = submit(&v.queue, io).await?;
        self.shared.history.borrow_mut().write_ended(id, status.is_ok());
        if status.is_ok() {
            let done = &mut self.shared.state.borrow_mut().1;
            done.writes += 1;
            done.written_bytes += blocks * v.block_bytes;
        }
        Ok(status)
    }

    async fn clear(&self, v: &Volume, op: Op, lba: u64, blocks: u64, fua: bool) -> Result<Status, String> {
        let id = self.shared.history.borrow_mut().zeroes_started(v.id, lba, blocks, fua);
        let mut io = Io::new(op, lba, blocks);
        io.fua = fua;
        let (status, _) = submit(&v.queue, io).await?;
        self.shared.history.borrow_mut().write_ended(id, status.is_ok());
        self.shared.state.borrow_mut().1.clears += u64::from(status.is_ok());
        Ok(status)
    }

    async fn flush(&self, v: &Volume) -> Result<Status, String> {
        let id = self.shared.history.borrow_mut().flush_started(v.id);
        let (status, _) = submit(&v.queue, Io::new(Op::Flush, 0, 0)).await?;
        self.shared.history.borrow_mut().flush_ended(id, status.is_ok());
        self.shared.state.borrow_mut().1.flushes += u64::from(status.is_ok());
        self.shared.flushed.fetch_add(u64::from(status.is_ok()), Ordering::Relaxed);
        Ok(status)
    }

    async fn read(&self, v: &Volume, lba: u64, blocks: u64) -> Result<Status, String> {
        let id = self.shared.history.borrow_mut().read_started();
        let (status, data) = submit(&v.queue, Io::new(Op::Read, lba, blocks)).await?;
        if status.is_ok() {
            expect_length(&data, v, lba, blocks)?;
            self.shared.history.borrow_mut().read_ended(id, v.id, lba, &data).map_err(|e| e.to_string())?;
            self.shared.state.borrow_mut().1.reads += 1;
        }
        Ok(status)
    }
}

fn expect_length(data: &Buf, v: &Volume, lba: u64, blocks: u64) -> Result<(), String> {
    if data.len() as u64 == blocks * v.block_bytes {
        return Ok(());
    }
    Err(format!("read of {:?}, block {lba}+{blocks}: {} bytes", v.id, data.len()))
}

/// Reads every block of every volume and has it judged. How many blocks.
pub async fn verify(
    options: ConnectOptions,
    volumes: Vec<VolumeId>,
    mut history: History,
) -> (History, Result<u64, String>) {
    let verdict = judge(&options, &volumes, &mut history).await;
    (history, verdict)
}

async fn judge(options: &ConnectOptions, volumes: &[VolumeId], history: &mut History) -> Result<u64, String> {
    let mut options = options.clone();
    options.io_timeout = Duration::from_secs(60);
    let (controller, queues) = connect(&options).await?;
    let mut judged = 0;
    for v in open_volumes(&controller, &queues[0], volumes).await? {
        let mut lba = 0;
        while lba < v.blocks {
            let blocks = (VERIFY_BYTES / v.block_bytes).min(v.blocks - lba);
            let (status, data) = submit(&v.queue, Io::new(Op::Read, lba, blocks)).await?;
            if !status.is_ok() {
                return Err(format!("read of {:?} after the restart, block {lba}+{blocks}: {status}", v.id));
            }
            expect_length(&data, &v, lba, blocks)?;
            history.recovered(v.id, lba, &data).map_err(|e| e.to_string())?;
            lba += blocks;
            judged += blocks;
        }
    }
    controller.shutdown().await;
    Ok(judged)
}
