//! An I/O queue pair and its reactor: slots, submission, completion, time-outs. The data path.
//!
//! Owned by one reactor; queues of devices there share it. Invariants: a request in a slot is the controller's, with its data,
//! until it completes or the controller is disabled or gone; a command identifier is (generation, slot), so that a completion
//! that comes twice or for another command is not taken for the next one; nothing touches registers unless the pair runs.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cryptfold_bdev::{Op, Status};
use cryptfold_nvmf_spec::opcode::Direction;
use cryptfold_nvmf_spec::{Cqe, status::Status as Wire};
use cryptfold_reactor as reactor;
use reactor::memory::slab_count;
use reactor::sync::Event;
use reactor::{Nanos, Poller, SleepVerdict};
use zerocopy::little_endian::U16;

use crate::bus::{ALL_ONES, Bus, reg};
use crate::controller::{Controller, Notice};
use crate::dma::DmaBuf;
use crate::identity::{Target, status_of};
use crate::request::{self, PAGE_BYTES, Request};
use crate::ring::Ring;
use crate::wake::Doze;

/// Bits of a command identifier that name the slot; the others are its generation.
const SLOT_BITS: u32 = 12;
/// Completions taken in one turn.
const REAP: usize = 64;
/// How often commands that take long are looked at, at most.
const TICK: Duration = Duration::from_millis(250);
/// Pages of lists in one piece of memory.
const PAGES_PER_PIECE: usize = 256;

/// What a pair does with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Sends them.
    Running,
    /// Keeps them: the controller is being reset.
    Paused,
    /// Ends them.
    Dead(Status),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Sent,
    /// Took too long; the controller was asked to abort it.
    Expired,
}

struct Slot {
    request: Option<Request>,
    cid: u16,
    stage: Stage,
    sent: Nanos,
}

struct Inner {
    ring: Option<Ring>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    waiting: VecDeque<Request>,
    /// Their data is in memory that the controller is about to be shown.
    unseen: Vec<Request>,
}

/// Why a request was not sent.
enum NotSent {
    Failed(Status),
    /// The controller does not see its data yet.
    Unseen,
}

/// See the module's head.
pub(crate) struct Pair {
    controller: Arc<Controller>,
    bus: Arc<dyn Bus>,
    pub index: usize,
    mode: Cell<Mode>,
    inner: RefCell<Inner>,
    /// A page per slot for PRP entries, SGL descriptors or ranges.
    lists: Vec<DmaBuf>,
    window: u64,
    sgl: bool,
    /// Slabs that the controller sees.
    mapped: Cell<usize>,
    watching: Cell<bool>,
    this: Weak<Pair>,
    doze: Doze,
    closed: Event,
}

impl Pair {
    /// A pair with room for `depth - 1` commands, paused, polled on this reactor until [`Pair::close`]; the reactor may sleep
    /// when its queue has `interrupts`.
    pub fn start(
        controller: Arc<Controller>,
        index: usize,
        depth: u16,
        interrupts: bool,
    ) -> Result<Rc<Pair>, crate::bus::BusError> {
        let bus = controller.bus.clone();
        let slots = usize::from(depth) - 1;
        let pieces = slots.div_ceil(PAGES_PER_PIECE);
        let page = PAGE_BYTES as usize;
        let lists = (0..pieces)
            .map(|_| DmaBuf::zeroed(&*bus, PAGES_PER_PIECE.min(slots) * page))
            .collect::<Result<_, _>>()?;
        let empty = |_| Slot { request: None, cid: 0, stage: Stage::Sent, sent: Nanos(0) };
        let inner = Inner {
            ring: None,
            slots: (0..slots).map(empty).collect(),
            free: (0..slots as u16).rev().collect(),
            waiting: VecDeque::new(),
            unseen: Vec::new(),
        };
        let pair = Rc::new_cyclic(|this| Pair {
            window: bus.window(),
            sgl: controller.offers_sgl(),
            doze: Doze::new(bus.clone(), index as u16 + 1, interrupts),
            controller,
            index,
            mode: Cell::new(Mode::Paused),
            inner: RefCell::new(inner),
            lists,
            mapped: Cell::new(0),
            watching: Cell::new(false),
            this: this.clone(),
            closed: Event::new(),
            bus,
        });
        pair.doze.register();
        let name = format!("nvme_{}_q{}", pair.controller.name, index + 1);
        let (guard, keep) = (reactor::register_poller(&name, pair.clone()), pair.clone());
        reactor::spawn_local(async move {
            keep.closed.wait().await;
            drop(guard);
        })
        .detach();
        Ok(pair)
    }

    /// Commands that may be under way at a time.
    pub fn slots(&self) -> usize {
        self.inner.borrow().slots.len()
    }

    /// Sends a request, or keeps it until that is possible.
    #[inline]
    pub fn submit(&self, request: Request) {
        match self.mode.get() {
            Mode::Running => {
                let mut inner = self.inner.borrow_mut();
                match inner.free.pop() {
                    Some(slot) if inner.waiting.is_empty() => self.send(&mut inner, slot, request),
                    slot => {
                        inner.free.extend(slot);
                        inner.waiting.push_back(request);
                    }
                }
            }
            Mode::Paused => self.inner.borrow_mut().waiting.push_back(request),
            Mode::Dead(status) => request.end(status),
        }
    }

    /// Takes an I/O of a namespace apart and submits it.
    #[inline]
    pub fn submit_io(&self, target: &Target, io: Box<cryptfold_bdev::Io>) {
        if io.op == Op::Reset {
            return self.controller.clone().reset_for(io);
        }
        request::requests(target, io, |data| request::fits(data, self.sgl), |r| self.submit(r));
    }

    #[inline]
    fn send(&self, inner: &mut Inner, index: u16, mut request: Request) {
        if let Err(why) = self.describe(index, &mut request) {
            inner.free.push(index);
            return match why {
                NotSent::Failed(status) => request.end(status),
                NotSent::Unseen => self.show(inner, request),
            };
        }
        let slot = &mut inner.slots[usize::from(index)];
        let generation = (slot.cid >> SLOT_BITS).wrapping_add(1);
        slot.cid = generation << SLOT_BITS | index;
        slot.stage = Stage::Sent;
        slot.sent = reactor::recent();
        request.sqe.cid = U16::new(slot.cid);
        request.attempts += 1;
        if let Some(ring) = &mut inner.ring {
            ring.push(&request.sqe);
        }
        slot.request = Some(request);
        if !self.watching.get() {
            self.watch();
        }
    }

    /// Says in the command where its data is.
    #[inline]
    fn describe(&self, index: u16, request: &mut Request) -> Result<(), NotSent> {
        let index = usize::from(index);
        let (list, at) =
            (&self.lists[index / PAGES_PER_PIECE], index % PAGES_PER_PIECE * PAGE_BYTES as usize);
        if let Some(range) = request.range {
            request::describe_range(&mut request.sqe, range, list, at);
            return Ok(());
        }
        if request.data.is_empty() {
            return Ok(());
        }
        let described = request::describe(&mut request.sqe, &request.data, list, at, self.window, self.sgl);
        if described.is_err() {
            let read = Direction::of(request.sqe.opcode) == Direction::ControllerToHost;
            request.bounce(read);
            self.controller.counters.bounced.fetch_add(1, Ordering::Relaxed);
            request::describe(&mut request.sqe, &request.data, list, at, self.window, self.sgl)
                .map_err(|_| NotSent::Failed(Status::DATA_TRANSFER_ERROR))?;
        }
        let mapped = self.mapped.get();
        let seen = request.data.iter().all(|b| b.place().is_some_and(|p| usize::from(p.slab) < mapped));
        if seen { Ok(()) } else { Err(NotSent::Unseen) }
    }

    /// Has the controller shown all memory that there is now, and sends the request then. The arena has grown: it is rare, pins
    /// memory and takes long, so it happens elsewhere.
    #[cold]
    fn show(&self, inner: &mut Inner, request: Request) {
        inner.unseen.push(request);
        if inner.unseen.len() > 1 {
            return;
        }
        let (this, bus) = (self.this.clone(), self.bus.clone());
        reactor::spawn_local(async move {
            let slabs = slab_count();
            let shown = bus.map_more(slabs).await;
            let Some(pair) = this.upgrade() else { return };
            let unseen = std::mem::take(&mut pair.inner.borrow_mut().unseen);
            match shown {
                Ok(()) => {
                    pair.mapped.set(slabs.max(pair.mapped.get()));
                    unseen.into_iter().for_each(|request| pair.submit(request));
                }
                Err(e) => {
                    tracing::error!("{}: I/O memory can not be mapped: {e}", pair.controller.name);
                    unseen.into_iter().for_each(|request| request.end(Status::INTERNAL_ERROR));
                }
            }
        })
        .detach();
    }

    fn reap(&self, limit: usize) -> usize {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let Some(ring) = &mut inner.ring else { return 0 };
        let mut count = 0;
        while count < limit
            && let Some(cqe) = ring.pop()
        {
            count += 1;
            let index = cqe.cid().0 & ((1 << SLOT_BITS) - 1);
            match inner.slots.get_mut(usize::from(index)) {
                Some(slot) if slot.request.is_some() && slot.cid == cqe.cid().0 => {
                    let Some(request) = slot.request.take() else { continue };
                    inner.free.push(index);
                    // Only what was retried waits, and rarely.
                    if let Some(again) = self.completed(slot.stage, request, &cqe) {
                        inner.waiting.push_front(again);
                    }
                }
                _ => self.nobodys(&cqe),
            }
        }
        if count > 0 {
            ring.release();
            self.send_waiting(inner);
        }
        count
    }

    #[inline]
    fn completed(&self, stage: Stage, request: Request, cqe: &Cqe) -> Option<Request> {
        let wire = cqe.status();
        if wire.is_success() {
            request.end(Status::SUCCESS);
            return None;
        }
        self.controller.counters.errors.fetch_add(1, Ordering::Relaxed);
        let ours = stage == Stage::Expired && wire.code() == Wire::ABORT_REQUESTED;
        if ours && request.attempts <= self.controller.options.retries {
            return Some(request);
        }
        request.end(status_of(wire));
        None
    }

    #[cold]
    fn nobodys(&self, cqe: &Cqe) {
        self.controller.counters.bogus.fetch_add(1, Ordering::Relaxed);
        let why = format!(
            "completion of command {:#06x} of queue {}, which nobody sent",
            cqe.cid().0,
            self.index + 1
        );
        self.controller.tell(Notice::ResetNeeded(why));
    }

    fn send_waiting(&self, inner: &mut Inner) {
        while !inner.waiting.is_empty() {
            let Some(slot) = inner.free.pop() else { return };
            match inner.waiting.pop_front() {
                Some(request) => self.send(inner, slot, request),
                None => inner.free.push(slot),
            }
        }
    }

    /// Starts to look at the clock, until nothing is outstanding.
    #[cold]
    fn watch(&self) {
        self.watching.set(true);
        let this = self.this.clone();
        let tick = TICK.min(self.controller.options.io_timeout / 4);
        reactor::spawn_local(async move {
            loop {
                reactor::sleep(tick).await;
                let Some(pair) = this.upgrade() else { return };
                if !pair.look_at_times(tick) {
                    return pair.watching.set(false);
                }
            }
        })
        .detach();
    }

    /// False: nothing is outstanding.
    fn look_at_times(&self, tick: Duration) -> bool {
        if self.mode.get() != Mode::Running {
            return false;
        }
        let now = reactor::now();
        let limit = self.controller.options.io_timeout;
        let (mut any, mut old) = (false, false);
        let mut inner = self.inner.borrow_mut();
        for slot in inner.slots.iter_mut().filter(|s| s.request.is_some()) {
            any = true;
            let age = now - slot.sent;
            old |= age >= tick;
            if slot.stage == Stage::Sent && age >= limit {
                slot.stage = Stage::Expired;
                self.controller.counters.timeouts.fetch_add(1, Ordering::Relaxed);
                self.controller.tell(Notice::Expired { qid: self.index as u16 + 1, cid: slot.cid });
            } else if slot.stage == Stage::Expired && age >= limit * 2 {
                let why = format!("command {:#06x} of queue {} can not be aborted", slot.cid, self.index + 1);
                self.controller.tell(Notice::ResetNeeded(why));
                break;
            }
        }
        drop(inner);
        if old {
            self.controller.look_at_status(self.bus.read32(reg::CSTS));
        }
        any
    }

    /// Stops sending. What has completed is taken first.
    pub fn pause(&self) {
        if self.mode.get() == Mode::Running {
            if self.bus.read32(reg::CSTS) != ALL_ONES {
                // No more than there can be, whatever the controller does.
                for _ in 0..=self.slots() / REAP {
                    self.reap(REAP);
                }
            }
            self.mode.set(Mode::Paused);
        }
    }

    /// The controller is disabled: what it had is ours again, to be sent once more or ended.
    pub fn reclaim(&self) {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        inner.ring = None;
        let mut back: Vec<(Nanos, Request)> = Vec::new();
        for (index, slot) in inner.slots.iter_mut().enumerate() {
            if let Some(request) = slot.request.take() {
                inner.free.push(index as u16);
                if request.attempts > self.controller.options.retries {
                    request.end(Status::INTERNAL_ERROR);
                } else {
                    back.push((slot.sent, request));
                }
            }
        }
        back.sort_by_key(|(sent, _)| std::cmp::Reverse(*sent));
        back.into_iter().for_each(|(_, request)| inner.waiting.push_front(request));
    }

    /// Queues exist again: sends what waits.
    pub fn resume(&self, ring: Ring) {
        let mut inner = self.inner.borrow_mut();
        inner.ring = Some(ring);
        // What is sent below is sent now.
        reactor::now();
        self.mode.set(Mode::Running);
        self.send_waiting(&mut inner);
    }

    /// Ends everything, now and from now on. The controller must be disabled, gone, or kept from memory.
    pub fn kill(&self, status: Status) {
        self.mode.set(Mode::Dead(status));
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        inner.ring = None;
        for (index, slot) in inner.slots.iter_mut().enumerate() {
            if let Some(request) = slot.request.take() {
                inner.free.push(index as u16);
                request.end(status);
            }
        }
        let unsent = std::mem::take(&mut inner.waiting).into_iter().chain(std::mem::take(&mut inner.unseen));
        unsent.for_each(|r| r.end(status));
    }

    /// After [`Pair::kill`] of a controller that is to be tried again: requests wait for that.
    pub fn revive(&self) {
        if matches!(self.mode.get(), Mode::Dead(_)) {
            self.mode.set(Mode::Paused);
        }
    }

    /// Leaves the reactor; queues that still hold the pair see it as it is.
    pub fn close(&self) {
        self.doze.stop();
        self.closed.set();
    }

    /// Ends an I/O early, if it is here.
    pub fn abort(&self, tag: u64) -> bool {
        let mut inner = self.inner.borrow_mut();
        let found = inner.waiting.iter().position(|r| r.tag() == Some(tag));
        if let Some(request) = found.and_then(|i| inner.waiting.remove(i)) {
            request.end(Status::ABORTED_BY_REQUEST);
            return true;
        }
        if let Some(found) = inner.unseen.iter().position(|r| r.tag() == Some(tag)) {
            inner.unseen.remove(found).end(Status::ABORTED_BY_REQUEST);
            return true;
        }
        let sent = |s: &&Slot| s.request.as_ref().is_some_and(|r| r.tag() == Some(tag));
        let Some(slot) = inner.slots.iter().find(sent) else { return false };
        self.controller.tell(Notice::Abort { qid: self.index as u16 + 1, cid: slot.cid });
        true
    }
}

impl Poller for Pair {
    #[inline]
    fn poll(&self) -> bool {
        if self.mode.get() != Mode::Running {
            return false;
        }
        let worked = self.reap(REAP) > 0;
        // Doorbells once per turn: for everything that the turn has sent.
        match &mut self.inner.borrow_mut().ring {
            Some(ring) if ring.has_news() => {
                ring.ring();
                true
            }
            _ => worked,
        }
    }

    fn prepare_sleep(&self) -> SleepVerdict {
        if self.mode.get() != Mode::Running {
            return SleepVerdict::MaySleep;
        }
        self.doze.prepare(|| self.inner.borrow().ring.as_ref().is_some_and(|r| r.is_ready() || r.has_news()))
    }
}
