//! One job: `iodepth` I/Os that go round until the time is up.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cryptfold_bdev::{Channel, Complete, Frame, Io, Op, Queue};
use cryptfold_reactor as reactor;
use hdrhistogram::Histogram;
use reactor::sync::oneshot;

use super::data::{DataSource, Generator};
use super::pattern::Pattern;
use super::stamp::Stamper;

/// What takes the I/O, on the current reactor.
pub trait Sink: 'static {
    /// Takes an I/O that comes back through its frame.
    fn submit(&self, io: Box<Io>);
    /// The time, when one has just come back.
    #[inline]
    fn came_back(&self) -> u64 {
        reactor::now().0
    }
}

impl Sink for Channel {
    #[inline]
    fn submit(&self, io: Box<Io>) {
        Channel::submit(self, io);
    }
    /// A channel has looked for its own statistics.
    #[inline]
    fn came_back(&self) -> u64 {
        reactor::recent().0
    }
}

impl Sink for Rc<dyn Queue> {
    #[inline]
    fn submit(&self, io: Box<Io>) {
        self.clone().submit(io);
    }
}

/// What one job does. Places ("slots") are one I/O large.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Random order.
    pub random: bool,
    /// Share of reads, percent.
    pub read_pct: u8,
    /// Blocks of the device per I/O.
    pub blocks_per_io: u64,
    /// Bytes per I/O.
    pub bytes_per_io: usize,
    /// The job's first slot.
    pub first_slot: u64,
    /// The job's number of slots, at least 1.
    pub slots: u64,
    /// I/Os under way.
    pub iodepth: u32,
    /// Not measured, first.
    pub ramp: Duration,
    /// Measured.
    pub runtime: Duration,
    /// Ends after this many I/Os instead, when given.
    pub io_limit: Option<u64>,
    /// The next slot, when given: all jobs that share it do all slots once, each as many as it gets to, within its time or limit.
    pub shared: Option<Arc<AtomicU64>>,
    /// Stamp and check.
    pub verify: bool,
    /// FUA on writes.
    pub fua: bool,
    /// What is written.
    pub data: DataSource,
    /// The run's seed; stamps carry it.
    pub run_seed: u64,
    /// This job's own seed.
    pub seed: u64,
}

/// What one job saw.
#[derive(Debug)]
pub struct WorkerReport {
    /// Latencies in ns of what completed while measuring.
    pub latency: Histogram<u64>,
    /// I/Os that completed while measuring.
    pub ios: u64,
    /// Reads among them.
    pub reads: u64,
    /// Failed, at any time.
    pub errors: u64,
    /// The first failure.
    pub first_error: Option<String>,
    /// Blocks checked and right.
    pub good: u64,
    /// Blocks that carry no stamp; only counted by `--verify-only`.
    pub unstamped: u64,
    /// Blocks checked and wrong.
    pub bad: u64,
    /// The first wrong one.
    pub first_bad: Option<String>,
    /// Time measured, ns.
    pub measured_ns: u64,
}

impl WorkerReport {
    pub(super) fn new(latency: Histogram<u64>) -> WorkerReport {
        WorkerReport {
            latency,
            ios: 0,
            reads: 0,
            errors: 0,
            first_error: None,
            good: 0,
            unstamped: 0,
            bad: 0,
            first_bad: None,
            measured_ns: 0,
        }
    }

    #[cold]
    pub(super) fn fail(&mut self, io: &Io) {
        self.errors += 1;
        self.first_error.get_or_insert_with(|| {
            format!("{:?} of {} blocks at {}: {}", io.op, io.blocks, io.lba, io.status())
        });
    }
}

struct State {
    pattern: Pattern,
    data: Option<Generator>,
    report: WorkerReport,
    /// Per slot: generation written last (0 = none or unknown) and whether an I/O is under way. Empty unless verifying.
    places: Vec<(u32, bool)>,
    start_ns: u64,
    end_ns: u64,
    issued: u64,
    outstanding: u32,
    /// Read everything that was written, in order; the next slot to look at.
    sweep: Option<u64>,
    done: Option<oneshot::Sender<()>>,
}

struct Worker<S> {
    sink: S,
    plan: Plan,
    stamper: Stamper,
    state: RefCell<State>,
}

/// Runs one job on this reactor.
///
/// # Errors
/// When the data can not be made.
pub async fn run_worker<S: Sink>(sink: S, plan: Plan) -> Result<WorkerReport, String> {
    let writes = plan.read_pct < 100;
    let data = match plan.verify {
        false if writes => Some(Generator::new(plan.data.clone(), plan.bytes_per_io, plan.seed)?),
        _ => None,
    };
    let places = if plan.verify { vec![(0, false); plan.slots as usize] } else { Vec::new() };
    let latency = Histogram::new_with_bounds(1, 100_000_000_000, 3).map_err(|e| e.to_string())?;
    let now = reactor::now().0;
    let start_ns = now + plan.ramp.as_nanos() as u64;
    let counted = plan.io_limit.is_some();
    let end_ns = if counted { u64::MAX } else { start_ns + plan.runtime.as_nanos() as u64 };
    let state = State {
        pattern: Pattern::new(plan.seed, plan.random, plan.read_pct, 0, plan.slots),
        data,
        report: WorkerReport::new(latency),
        places,
        start_ns: if counted { now } else { start_ns },
        end_ns,
        issued: 0,
        outstanding: 0,
        sweep: None,
        done: None,
    };
    let stamper = Stamper::new(plan.run_seed);
    let worker = Rc::new(Worker { sink, plan, stamper, state: RefCell::new(state) });
    worker.run().await;
    {
        let mut s = worker.state.borrow_mut();
        let end = s.end_ns.min(reactor::now().0);
        s.report.measured_ns = end.saturating_sub(s.start_ns);
    }
    if worker.plan.verify {
        worker.state.borrow_mut().sweep = Some(0);
        worker.run().await;
    }
    let worker = Rc::into_inner(worker).ok_or("an I/O is still held somewhere")?;
    Ok(worker.state.into_inner().report)
}

impl<S: Sink> Worker<S> {
    /// Starts the I/Os and waits until the last one is back.
    async fn run(self: &Rc<Self>) {
        let (tx, rx) = oneshot::channel();
        let depth = {
            let mut s = self.state.borrow_mut();
            s.done = Some(tx);
            let most = if self.plan.verify { self.plan.slots } else { u64::MAX };
            let depth = u64::from(self.plan.iodepth).min(most) as u32;
            s.outstanding = depth;
            depth
        };
        for _ in 0..depth {
            self.clone().next(Io::new(Op::Read, 0, 0), reactor::now().0);
        }
        // The sender is taken when the last I/O is back; it is not dropped before.
        let _ = rx.await;
    }

    /// Sends the I/O on its next round, or retires it.
    #[inline]
    fn next(self: Rc<Self>, mut io: Box<Io>, now: u64) {
        let mut s = self.state.borrow_mut();
        let Some((slot, read)) = self.pick(&mut s, now) else {
            s.outstanding -= 1;
            io.recycle();
            if s.outstanding == 0
                && let Some(done) = s.done.take()
            {
                let _ = done.send(());
            }
            return;
        };
        let place = self.plan.first_slot + slot;
        let op = if read { Op::Read } else { Op::Write };
        io.reset(op, place * self.plan.blocks_per_io, self.plan.blocks_per_io);
        io.tag = slot;
        if !read {
            io.fua = self.plan.fua;
            match s.data.as_mut() {
                Some(g) => io.data.push(g.produce(slot)),
                None => {
                    let generation = u64::from(s.places[slot as usize].0) + 1;
                    let bytes = self.plan.bytes_per_io;
                    io.data = self.stamper.make(place * bytes as u64, generation, bytes);
                }
            }
        }
        drop(s);
        io.push(self.clone(), now, slot << 1 | u64::from(read));
        self.sink.submit(io);
    }

    #[inline]
    fn pick(&self, s: &mut State, now: u64) -> Option<(u64, bool)> {
        if let Some(next) = s.sweep {
            let slot = (next..self.plan.slots).find(|i| s.places[*i as usize].0 != 0);
            s.sweep = Some(slot.map_or(self.plan.slots, |i| i + 1));
            return slot.map(|i| (i, true));
        }
        if now >= s.end_ns || self.plan.io_limit.is_some_and(|limit| s.issued >= limit) {
            return None;
        }
        s.issued += 1;
        let (mut slot, read) = s.pattern.step();
        if let Some(next) = &self.plan.shared {
            slot = next.fetch_add(1, Ordering::Relaxed);
            return (slot < self.plan.slots).then_some((slot, read));
        }
        if self.plan.verify {
            // One I/O per place at a time: then it is known what a read must find.
            while s.places[slot as usize].1 {
                slot = if slot + 1 == self.plan.slots { 0 } else { slot + 1 };
            }
            s.places[slot as usize].1 = true;
        }
        Some((slot, read))
    }

    #[cold]
    fn check(&self, s: &mut State, io: &Io, slot: u64, read: bool) {
        let place = &mut s.places[slot as usize];
        place.1 = false;
        if !read {
            // After a failed write the place may hold either; it is not checked until it is written again.
            place.0 = if io.status().is_ok() { place.0 + 1 } else { 0 };
            return;
        }
        if !io.status().is_ok() || place.0 == 0 {
            return;
        }
        let at = (self.plan.first_slot + slot) * self.plan.bytes_per_io as u64;
        match self.stamper.check(at, u64::from(place.0), &io.data) {
            Ok(()) => s.report.good += 1,
            Err(e) => {
                s.report.bad += 1;
                s.report.first_bad.get_or_insert_with(|| e.to_string());
            }
        }
    }

    #[cold]
    fn failed(&self, s: &mut State, io: &Io) {
        s.report.fail(io);
        // A device that is gone fails everything at once; there is no point in going on for the rest of the time.
        if s.report.errors >= 10_000 {
            s.end_ns = 0;
        }
    }
}

impl<S: Sink> Complete for Worker<S> {
    #[inline]
    fn complete(self: Rc<Self>, io: Box<Io>, frame: Frame) {
        let now = self.sink.came_back();
        let read = frame.word & 1 != 0;
        {
            let s = &mut *self.state.borrow_mut();
            if now >= s.start_ns && now < s.end_ns && s.sweep.is_none() {
                s.report.ios += 1;
                s.report.reads += u64::from(read);
                s.report.latency.saturating_record(now - frame.lba);
            }
            if !io.status().is_ok() {
                self.failed(s, &io);
            }
            if self.plan.verify {
                self.check(s, &io, frame.word >> 1, read);
            }
        }
        self.next(io, now);
    }
}
