//! One power-up of the simulated machine.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use cryptfold_bdev::{Access, Registry};
use cryptfold_reactor::{Sim, Task};

use super::operator::{self, Entry, Existence, Operator, Table};
use super::workload::{self, Worker};
use super::{LocalFuture, Machine, MakeStack, Options, Stack};
use crate::{History, Image, Rng, SimDisk, VolumeId};

/// Blocks per read when everything is read.
const VERIFY_BLOCKS: u64 = 32;

pub(super) struct Session {
    // First: what runs goes before what it runs on.
    pub sim: Sim,
    pub disk: Arc<SimDisk>,
    pub machine: Machine,
    pub stack: Rc<dyn Stack>,
    options: Options,
}

impl Session {
    pub fn new(
        make: MakeStack<'_>,
        options: &Options,
        image: Image,
        rng: &mut Rng,
    ) -> Result<Session, String> {
        let sim = Sim::new(rng.next()).cores(options.cores);
        let registry = Registry::new();
        let (disk, _) =
            SimDisk::create(&registry, options.disk.clone(), image, rng.next()).map_err(|e| e.to_string())?;
        disk.ignore_flush(options.ignore_flush);
        disk.ignore_fua(options.ignore_fua);
        let machine = Machine { registry, disk: options.disk.name.clone(), cores: sim.handles().to_vec() };
        Ok(Session { sim, disk, machine, stack: make(), options: options.clone() })
    }

    /// Steps until all tasks are finished. False: the power went off first.
    fn run<T>(&mut self, what: &str, tasks: &[Task<T>]) -> Result<bool, String> {
        let limit = self.options.step_limit;
        let mut steps = 0;
        let disk = self.disk.clone();
        let finished = || tasks.iter().all(Task::is_finished);
        let went_on = self.sim.run_until(|| {
            steps += 1;
            steps > limit || disk.is_off() || finished()
        });
        match (self.disk.is_off(), finished()) {
            (true, _) => Ok(false),
            (_, true) => Ok(true),
            _ => {
                let how = if went_on { format!("not done after {limit} steps") } else { "stalled".into() };
                Err(format!("{what}: {how}, at {:?}", self.sim.now()))
            }
        }
    }

    /// Runs one of the stack's calls. None: the power went off.
    pub fn step<T: 'static>(
        &mut self,
        what: &str,
        call: impl FnOnce(&dyn Stack, Machine) -> LocalFuture<Result<T, String>> + 'static,
    ) -> Result<Option<T>, String> {
        let (stack, machine) = (self.stack.clone(), self.machine.clone());
        let task = self.sim.spawn(0, move || async move { call(&*stack, machine).await });
        self.finish(what, task)
    }

    fn finish<T>(&mut self, what: &str, task: Task<Result<T, String>>) -> Result<Option<T>, String> {
        let mut task = [task];
        if !self.run(what, &task)? {
            return Ok(None);
        }
        taken(&mut task[0]).map(Some).map_err(|e| format!("{what}: {e}"))
    }

    /// Opens the stack, checks every block against the history, runs the stack's audit. False: the power went off.
    pub fn recover(
        &mut self,
        mut history: History,
        volumes: &mut Vec<Entry>,
    ) -> (History, Result<bool, String>) {
        // The moment of the power cut: what follows are moments of its own.
        let now = history.now();
        // What was being made when the power failed may be there.
        for entry in &*volumes {
            history.copy_ended(entry.id);
        }
        match self.step("open", |stack, machine| stack.open(machine)) {
            Ok(Some(())) => {}
            Ok(None) => return (history, Ok(false)),
            Err(e) => return (history, Err(e)),
        }
        if let Err(e) = self.present(now, volumes) {
            return (history, Err(e));
        }
        let shared = Rc::new(RefCell::new(history));
        let registry = self.machine.registry.clone();
        let all: Vec<_> = volumes.iter().map(|entry| (entry.id, entry.name.clone())).collect();
        let theirs = shared.clone();
        let task = self.sim.spawn(0, move || async move {
            for (volume, name) in all {
                verify(&registry, &name, volume, &theirs).await?;
            }
            Ok(())
        });
        let verdict = self.finish("verification", task).and_then(|done| match done {
            Some(()) => self.step("check", |stack, machine| stack.check(machine)),
            None => Ok(None),
        });
        (shared.take(), verdict.map(|done| done.is_some()))
    }

    /// Finds out which volumes are there, as of moment `now` of the history, and forgets the others.
    fn present(&self, now: u64, volumes: &mut Vec<Entry>) -> Result<(), String> {
        let mut wrong = Ok(());
        volumes.retain_mut(|entry| {
            let there = self.machine.registry.get(&entry.name).is_ok();
            match (entry.existence(now), there) {
                (Existence::Sure, false) => wrong = Err(format!("{} is gone", entry.name)),
                (Existence::Gone, true) => wrong = Err(format!("{} is there again", entry.name)),
                (_, true) => entry.found(now),
                (_, false) => {}
            }
            there
        });
        wrong
    }

    /// Runs the workload. False: the power went off.
    pub fn work(
        &mut self,
        history: History,
        volumes: &mut Vec<Entry>,
        (made, deeds): (&mut u64, &mut u64),
        generation: &mut u64,
        rng: &mut Rng,
    ) -> (History, Result<bool, String>) {
        let history = Rc::new(RefCell::new(history));
        let counter = Rc::new(RefCell::new(*generation));
        let table = Table::new(std::mem::take(volumes));
        let names = Rc::new(RefCell::new(*made));
        let done = Rc::new(Cell::new(0));
        let mut tasks = Vec::new();
        if self.options.deeds > 0 {
            let operator = Operator {
                stack: self.stack.clone(),
                machine: self.machine.clone(),
                disk: self.disk.clone(),
                table: table.clone(),
                history: history.clone(),
                rng: rng.fork(),
                deeds: rng.below(self.options.deeds + 1),
                made: names.clone(),
                done: done.clone(),
                resize: self.options.resize,
            };
            tasks.push(self.sim.spawn(0, move || operator::run(operator)));
        }
        for n in 0..self.options.workers {
            let worker = Worker {
                stack: self.stack.clone(),
                registry: self.machine.registry.clone(),
                table: table.clone(),
                disk: self.disk.clone(),
                history: history.clone(),
                generation: counter.clone(),
                rng: rng.fork(),
                ops: self.options.ops,
                mix: self.options.mix.clone(),
                allowed: self.options.allowed,
            };
            tasks.push(self.sim.spawn(n % self.options.cores, move || workload::run(worker)));
        }
        let mut verdict = self.run("workload", &tasks);
        for task in tasks.iter_mut().filter(|task| task.is_finished()) {
            if let Err(e) = taken(task)
                && verdict.is_ok()
            {
                verdict = Err(e);
            }
        }
        drop(tasks);
        (*generation, *made) = (*counter.borrow(), *names.borrow());
        *deeds += done.get();
        *volumes = table.entries();
        (history.take(), verdict)
    }
}

fn taken<T>(task: &mut Task<Result<T, String>>) -> Result<T, String> {
    match std::pin::Pin::new(task).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => Err("a finished task has no value".into()),
    }
}

async fn verify(
    registry: &Registry,
    name: &str,
    volume: VolumeId,
    history: &RefCell<History>,
) -> Result<(), String> {
    let descriptor = registry.open(name, Access::ReadOnly, |_| ()).map_err(|e| e.to_string())?;
    let channel = descriptor.channel().map_err(|e| e.to_string())?;
    let blocks = descriptor.bdev().blocks();
    let mut lba = 0;
    while lba < blocks {
        let n = VERIFY_BLOCKS.min(blocks - lba);
        let data = channel.read(lba, n).await.map_err(|e| format!("read of {name}, block {lba}: {e}"))?;
        let data = data.to_contiguous();
        history.borrow_mut().recovered(volume, lba, &data).map_err(|e| e.to_string())?;
        lba += n;
    }
    Ok(())
}
