//! `--verify-only`: reads everything and checks what `--verify` wrote with the same seed, in this process or an earlier one.
//!
//! Which generation a place must hold is not known any more; that it is one generation, of this place, undamaged, is.

use std::cell::RefCell;
use std::rc::Rc;

use cryptfold_bdev::{Complete, Frame, Io, Op};
use cryptfold_reactor as reactor;
use hdrhistogram::Histogram;
use reactor::sync::oneshot;

use super::stamp::Stamper;
use super::worker::{Plan, Sink, WorkerReport};

struct State {
    next: u64,
    outstanding: u32,
    report: WorkerReport,
    done: Option<oneshot::Sender<()>>,
}

struct Reader<S> {
    sink: S,
    plan: Plan,
    stamper: Stamper,
    state: RefCell<State>,
}

/// Reads all of the job's places once, in order.
///
/// # Errors
/// When the reactor's memory does not suffice.
pub async fn read_back<S: Sink>(sink: S, plan: Plan) -> Result<WorkerReport, String> {
    let (tx, rx) = oneshot::channel();
    let depth = u64::from(plan.iodepth).min(plan.slots) as u32;
    let latency = Histogram::new_with_bounds(1, 100_000_000_000, 3).map_err(|e| e.to_string())?;
    let state = State { next: 0, outstanding: depth, report: WorkerReport::new(latency), done: Some(tx) };
    let stamper = Stamper::new(plan.run_seed);
    let start = reactor::now();
    let reader = Rc::new(Reader { sink, plan, stamper, state: RefCell::new(state) });
    for _ in 0..depth {
        reader.clone().next(Io::new(Op::Read, 0, 0), reactor::now().0);
    }
    // The sender is taken when the last I/O is back; it is not dropped before.
    let _ = rx.await;
    let reader = Rc::into_inner(reader).ok_or("an I/O is still held somewhere")?;
    let mut report = reader.state.into_inner().report;
    report.measured_ns = reactor::now().since(start).as_nanos() as u64;
    Ok(report)
}

impl<S: Sink> Reader<S> {
    fn next(self: Rc<Self>, mut io: Box<Io>, now: u64) {
        let slot = {
            let mut s = self.state.borrow_mut();
            if s.next == self.plan.slots {
                s.outstanding -= 1;
                io.recycle();
                if s.outstanding == 0
                    && let Some(done) = s.done.take()
                {
                    let _ = done.send(());
                }
                return;
            }
            s.next += 1;
            s.next - 1
        };
        let place = self.plan.first_slot + slot;
        io.reset(Op::Read, place * self.plan.blocks_per_io, self.plan.blocks_per_io);
        io.push(self.clone(), now, place);
        self.sink.submit(io);
    }
}

impl<S: Sink> Complete for Reader<S> {
    fn complete(self: Rc<Self>, io: Box<Io>, frame: Frame) {
        let now = reactor::now().0;
        {
            let r = &mut self.state.borrow_mut().report;
            r.ios += 1;
            r.reads += 1;
            r.latency.saturating_record(now - frame.lba);
            if io.status().is_ok() {
                match self.stamper.check_any(frame.word * self.plan.bytes_per_io as u64, &io.data) {
                    Ok(true) => r.good += 1,
                    Ok(false) => r.unstamped += 1,
                    Err(e) => {
                        r.bad += 1;
                        r.first_bad.get_or_insert_with(|| e.to_string());
                    }
                }
            } else {
                r.fail(&io);
            }
        }
        self.next(io, now);
    }
}
