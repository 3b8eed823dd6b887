//! What was stored raw before the volume's key was there: gone through in the background, and reduced
//! ([`cryptfold_bdev_crypto::late`]).
//!
//! One ordinary thread while a volume is converting. It ends when the volume is no longer bound, and begins anew with the next
//! binding; where it had got to is not kept, as the pool's map says what is left. When it has been through, the volume's own thread
//! writes that into the record. What stays raw (no ciphertext, or unreadable) is read as it is for ever after.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use cryptfold_bdev::{Access, Status};
use cryptfold_bdev_crypto::hostcrypt::Shape;
use cryptfold_bdev_crypto::late::reduce_late;
use cryptfold_bdev_crypto::luks::Switch;

use super::record::Stored;
use super::{BLOCK_BYTES, PAUSE, Volume};
use crate::control::{Control, lock};

/// Blocks that are held back from hosts while they are written again: what a host's larger writes have, so that as much is
/// compressed together.
const STEP_BLOCKS: u64 = 32;
/// What a look at the map counts as against the rate: the leaves that it reads at most.
const LOOK_BLOCKS: u64 = 128;
/// Steps between two looks at whether to go on.
const BATCH: usize = 8;

/// A volume's way through what was stored before.
#[derive(Default)]
pub(super) struct Pass {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    stopped: bool,
    done: bool,
    /// Its thread has ended without being told to: another one may take its place.
    lost: bool,
    /// Blocks that were not looked at yet; those that hosts have written meanwhile are among them until their turn comes. None: not
    /// counted yet.
    left_blocks: Option<u64>,
    trouble: Option<String>,
}

impl Pass {
    /// Bytes left, about, and what is in the way.
    pub(super) fn progress(&self) -> (Option<u64>, Option<String>) {
        let s = lock(&self.state);
        (s.left_blocks.map(|n| n * BLOCK_BYTES), s.trouble.clone())
    }

    fn is_stopped(&self) -> bool {
        lock(&self.state).stopped
    }

    /// Waits for so long, or until it is stopped.
    fn pause(&self, time: Duration) {
        drop(self.wake.wait_timeout_while(lock(&self.state), time, |s| !s.stopped));
    }
}

/// Says that the thread has ended, also in a panic.
struct Ends<'a> {
    pass: &'a Pass,
    switch: &'a Switch,
}

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.pass.state);
        if !state.stopped && !state.done {
            state.lost = true;
            drop(state);
            if std::thread::panicking() {
                std::thread::sleep(PAUSE);
            }
            self.switch.ask();
        }
    }
}

/// Where the pass is.
struct Walk {
    /// Counts first.
    counted: Option<u64>,
    start: u64,
    /// The block to ask from; none: the end.
    next: Option<u64>,
    runs: VecDeque<(u64, u64)>,
}

impl Walk {
    /// The next steps, each within one piece of [`STEP_BLOCKS`] of the volume.
    fn steps(&mut self) -> Vec<(u64, u64)> {
        let mut steps = Vec::new();
        while steps.len() < BATCH
            && let Some((at, blocks)) = self.runs.pop_front()
        {
            let now = blocks.min(STEP_BLOCKS - at % STEP_BLOCKS);
            steps.push((at, now));
            if now < blocks {
                self.runs.push_front((at + now, blocks - now));
            }
        }
        steps
    }
}

impl Volume {
    /// Starts the pass unless it is under way. Whether it is now.
    pub(super) fn begin_pass(self: &Arc<Self>, c: &Control, shape: &Shape) -> bool {
        let mut current = lock(&self.pass);
        if current.as_ref().is_some_and(|pass| !lock(&pass.state).lost) {
            return true;
        }
        let pass = Arc::new(Pass::default());
        let (me, mine, control) = (self.clone(), pass.clone(), c.weak());
        let start = shape.payload_offset_bytes / BLOCK_BYTES;
        let spawned = std::thread::Builder::new().name("luks late".into()).spawn(move || {
            let end = Ends { pass: &mine, switch: &me.switch };
            me.go_through(&control, &mine, start);
            drop(end);
        });
        if let Err(error) = &spawned {
            tracing::error!(%error, device = self.options.name, "no thread to reduce what was stored before");
        }
        *current = spawned.is_ok().then_some(pass);
        current.is_some()
    }

    pub(super) fn end_pass(&self) {
        if let Some(pass) = lock(&self.pass).take() {
            lock(&pass.state).stopped = true;
            pass.wake.notify_all();
        }
    }

    /// The record; when the pass is done, that is written into it first, or why it can not be.
    pub(super) fn converted(&self, c: &Control, stored: &Stored) -> (Stored, Option<String>) {
        let done = lock(&self.pass).as_ref().is_some_and(|pass| lock(&pass.state).done);
        if !done || !stored.converting {
            return (stored.clone(), None);
        }
        let now = Stored { converting: false, ..stored.clone() };
        match self.store(c, &now) {
            Ok(()) => (now, None),
            Err(why) => (stored.clone(), Some(why)),
        }
    }

    fn go_through(&self, control: &Weak<Control>, pass: &Pass, start: u64) {
        let rate = u64::from(self.options.late_mb_s) * 1_000_000;
        let mut walk = Walk { counted: Some(0), start, next: Some(start), runs: VecDeque::new() };
        while !pass.is_stopped() {
            let Some(c) = control.upgrade().filter(|c| !c.is_ending()) else { return };
            let begun = Instant::now();
            let went = self.go_on(&c, pass, &mut walk);
            drop(c);
            match went {
                Ok(Some(blocks)) => {
                    let due = Duration::from_nanos(blocks * BLOCK_BYTES * 1_000_000_000 / rate.max(1));
                    lock(&pass.state).trouble = None;
                    pass.pause(due.saturating_sub(begun.elapsed()));
                }
                Ok(None) => {
                    lock(&pass.state).done = true;
                    return self.switch.ask();
                }
                Err(why) => {
                    lock(&pass.state).trouble = Some(format!("what was stored before the key waits: {why}"));
                    pass.pause(PAUSE);
                }
            }
        }
    }

    /// Counts on, or looks where to go, or goes on. How many blocks it has looked at; none when there are no more.
    fn go_on(&self, c: &Control, pass: &Pass, walk: &mut Walk) -> Result<Option<u64>, String> {
        if !walk.runs.is_empty() {
            self.check_room(c)?;
            return self.reduce(c, pass, walk).map(Some);
        }
        let Some(next) = walk.next else {
            let Some(blocks) = walk.counted.take() else { return Ok(None) };
            lock(&pass.state).left_blocks = Some(blocks);
            walk.next = Some(walk.start);
            return Ok(Some(0));
        };
        let manager = c.pools().map_err(|e| e.message)?.manager();
        let found = manager.as_sent(&self.pool, &self.volume, next).map_err(|e| e.to_string())?;
        walk.next = found.next;
        match &mut walk.counted {
            Some(blocks) => *blocks += found.runs.iter().map(|run| run.1).sum::<u64>(),
            None => walk.runs.extend(found.runs),
        }
        Ok(Some(LOOK_BLOCKS))
    }

    /// What snapshots keep takes room beside what it is written as again: hosts' writes are not to wait for that.
    fn check_room(&self, c: &Control) -> Result<(), String> {
        let manager = c.pools().map_err(|e| e.message)?.manager();
        if manager.volume(&self.pool, &self.volume).map_err(|e| e.to_string())?.read_only {
            return Err("the volume is read-only".into());
        }
        if manager.is_short(&self.pool).map_err(|e| e.to_string())? {
            return Err("the pool is short of space".into());
        }
        Ok(())
    }

    fn reduce(&self, c: &Control, pass: &Pass, walk: &mut Walk) -> Result<u64, String> {
        let steps = walk.steps();
        let (registry, name) = (c.registry.clone(), self.options.name.clone());
        let reactor = c.handles().last().ok_or("no reactor runs")?;
        let todo = steps.clone();
        let done = reactor.block_on(move || async move {
            let open = registry.open(&name, Access::ReadOnly, |_| ()).and_then(|d| d.channel());
            let channel = open.map_err(|e| (0, e.to_string()))?;
            for (nth, (at, blocks)) in todo.into_iter().enumerate() {
                let mut result = reduce_late(&channel, at, blocks).await;
                if result == Err(Status::UNRECOVERED_READ) && blocks > 1 {
                    // Those of them that can be read.
                    for block in at..at + blocks {
                        result = reduce_late(&channel, block, 1).await;
                        if result.is_err_and(|status| status != Status::UNRECOVERED_READ) {
                            break;
                        }
                    }
                }
                match result {
                    // It has become smaller.
                    Ok(_) | Err(Status::UNRECOVERED_READ | Status::LBA_OUT_OF_RANGE) => {}
                    Err(status) => return Err((nth, status.to_string())),
                }
            }
            Ok(())
        });
        let (gone, result) = match done.map_err(|_| "no reactor runs")? {
            Ok(()) => (steps.len(), Ok(())),
            Err((nth, why)) => (nth, Err(why)),
        };
        steps[gone..].iter().rev().for_each(|step| walk.runs.push_front(*step));
        let blocks = steps[..gone].iter().map(|step| step.1).sum();
        let mut state = lock(&pass.state);
        state.left_blocks = state.left_blocks.map(|left| left.saturating_sub(blocks));
        result.map(|()| blocks)
    }
}
