//! A volume on which a host may put LUKS2 whenever it likes: raw until somebody who understands headers says otherwise, then
//! its payload goes through the host's layer in reverse ([`crate::hostcrypt`]), while hosts are connected.
//!
//! ```text
//!   host --> LuksQueue --Layer::Raw-----------------------> base
//!               |  |      \--Layer::Bound--> HostcryptQueue -> base
//!               |  \--Layer::Shut: ends with a status
//!               \-- a header has changed --> Switch --> a thread that reads, decides, sets the layer
//! ```
//!
//! Owns: noticing that a header has changed, holding changes of the payload back until somebody has looked, and changing the
//! layer between two I/Os and not within one. Knows of LUKS no more than its magic number.
//!
//! Invariants:
//! - The first [`WATCHED_BYTES`] are raw under every layer: a header lies there, with both copies.
//! - Once a change of the header has completed, no change behind these bytes goes down before a look at it has ended. So what a
//!   host writes after its header is seen with the layer that the header asks for.
//! - [`Switch::drain`] returns true only when no change behind these bytes is under way, and none starts before
//!   [`Switch::settle`]. A change counts itself before it looks at the mode, and who closes closes before it looks at the
//!   counts: either sees the other.
//!
//! A device without the magic number at its start costs two atomic operations per write and no looks.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use cryptfold_bdev::{
    Base, Bdev, BdevError, Channel, Complete, Device, DeviceInfo, Frame, Io, OnResize, Op, OpSet, Queue,
    Registry, Status,
};
use cryptfold_reactor::memory::SgList;
use cryptfold_reactor::{self as reactor, Nanos};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::crypto::passed_through;
use crate::gate::KeyGate;
use crate::hostcrypt::{HostcryptQueue, Shape};
use crate::watched::Watched;

/// Where both copies of a header lie, at most.
pub const WATCHED_BYTES: u64 = 8 << 20;
/// Bytes in a block: a smaller one could be discarded or zeroed by parts of what the pool below keeps.
const BLOCK_BYTES: u32 = 4096;
const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
/// How long a change is held back before its host has to try again; hosts give up after 30 s.
const HOLD_LIMIT: Duration = Duration::from_secs(20);

/// What stands between host and base.
#[derive(Clone, Debug)]
pub enum Layer {
    /// Nothing: all passes as it is.
    Raw,
    /// The host's layer in reverse.
    Bound(Arc<Bound>),
    /// A wall.
    Shut(Shut),
}

/// The host's layer.
#[derive(Debug)]
pub struct Bound {
    /// Where and how; it begins at [`WATCHED_BYTES`] or later.
    pub shape: Shape,
    /// The key.
    pub gate: Arc<KeyGate>,
}

/// A payload that nobody gets at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shut {
    /// Where it begins. What lies before passes.
    pub from_bytes: u64,
    /// What I/O of it ends with.
    pub status: Status,
    /// Whether it may be given up: then its end is looked at.
    pub discards: bool,
}

#[derive(Clone)]
struct Mode {
    layer: Layer,
    /// Changes of the payload need not wait.
    settled: bool,
}

#[derive(Default)]
struct Looks {
    /// Looks that were asked for, and the newest one that is done.
    asked: u64,
    done: u64,
    /// The newest one that a change of the header has asked for.
    touched: u64,
    ended: bool,
    /// Changes of the header that are under way.
    header_changes: u64,
    /// Changes of the payload under way, by queue.
    payload_changes: Vec<Weak<AtomicU64>>,
    status: Value,
}

/// What a look begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Look; the number is for [`Switch::settle`].
    Look(u64),
    /// The device is gone.
    Ended,
}

/// The device's side towards who looks.
pub struct Switch {
    mode: Watched<Mode>,
    /// The device begins with the magic number, or is about to.
    magic: AtomicBool,
    /// Something was written to the watched bytes that seemed to be no header.
    written: AtomicBool,
    /// Somebody waits in [`Switch::drain`].
    draining: AtomicBool,
    looks: Mutex<Looks>,
    wake: Condvar,
}

impl Switch {
    fn new() -> Arc<Switch> {
        let shut = Shut { from_bytes: 0, status: Status::NAMESPACE_NOT_READY, discards: false };
        Arc::new(Switch {
            mode: Watched::new(Mode { layer: Layer::Shut(shut), settled: false }),
            magic: AtomicBool::new(true),
            written: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            looks: Mutex::new(Looks { asked: 1, ..Looks::default() }),
            wake: Condvar::new(),
        })
    }

    fn looks(&self) -> MutexGuard<'_, Looks> {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- for who looks: ordinary threads

    /// Waits until a look is asked for, the device is gone, or `limit` has passed (then a look is due as well).
    pub fn wait(&self, limit: Option<Duration>) -> Wake {
        let idle = |l: &mut Looks| !l.ended && l.asked == l.done;
        let looks = self.looks();
        let looks = match limit {
            Some(limit) => {
                self.wake.wait_timeout_while(looks, limit, idle).unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.wake.wait_while(looks, idle).unwrap_or_else(PoisonError::into_inner),
        };
        if looks.ended { Wake::Ended } else { Wake::Look(looks.asked) }
    }

    /// Whether the device is gone.
    pub fn is_ended(&self) -> bool {
        self.looks().ended
    }

    /// Asks for a look. Nothing is held back for it.
    pub fn ask(&self) {
        self.looks().asked += 1;
        self.wake.notify_all();
    }

    /// Waits until the first look is done, at most `limit`.
    pub fn wait_first(&self, limit: Duration) {
        let waiting = |l: &mut Looks| !l.ended && l.done == 0;
        drop(self.wake.wait_timeout_while(self.looks(), limit, waiting));
    }

    /// The layer now.
    pub fn layer(&self) -> Layer {
        self.mode.get().layer
    }

    /// Holds changes of the payload back, and waits until none is under way. False: some do not end within `limit`; they are
    /// held back all the same, until [`Switch::settle`].
    pub fn drain(&self, limit: Duration) -> bool {
        let mut looks = self.looks();
        self.mode.change(|m| m.settled = false);
        self.draining.store(true, Ordering::SeqCst);
        let end = Instant::now() + limit;
        let drained = loop {
            let under_way = |c: &Weak<AtomicU64>| c.upgrade().is_some_and(|c| c.load(Ordering::SeqCst) > 0);
            if !looks.payload_changes.iter().any(under_way) {
                break true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || looks.ended {
                break false;
            }
            looks = self.wake.wait_timeout(looks, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        self.draining.store(false, Ordering::SeqCst);
        drained
    }

    /// Sets the layer. What is held back stays so.
    pub fn set(&self, layer: Layer) {
        self.mode.change(|m| m.layer = layer);
    }

    /// Sets the layer unless the header has changed, or is being changed, since look number `look` was asked for. Whether it did.
    pub fn set_unless_touched(&self, layer: Layer, look: u64) -> bool {
        let looks = self.looks();
        let same = looks.touched <= look && looks.header_changes == 0 && !looks.ended;
        if same {
            self.mode.change(|m| m.layer = layer);
        }
        same
    }

    /// What the device began with in the look number `look`.
    pub fn found_magic(&self, found: bool, look: u64) {
        let looks = self.looks();
        if found || (looks.header_changes == 0 && looks.asked == look) {
            self.magic.store(found, Ordering::SeqCst);
        }
    }

    /// Ends look number `look`; held-back changes go on, unless another look was asked for meanwhile (false).
    pub fn settle(&self, look: u64) -> bool {
        let mut looks = self.looks();
        looks.done = look;
        let settled = looks.asked == look;
        if settled {
            self.mode.change(|m| m.settled = true);
        }
        self.wake.notify_all();
        settled
    }

    /// What people are told.
    pub fn say(&self, status: Value) {
        self.looks().status = status;
    }

    /// What people are told now.
    pub fn status(&self) -> Value {
        self.looks().status.clone()
    }

    // ---- for queues and the device

    /// The header has changed: a look is due, and changes of the payload wait for it.
    fn touch(&self) {
        let mut looks = self.looks();
        looks.asked += 1;
        looks.touched = looks.asked;
        self.mode.change(|m| m.settled = false);
        self.wake.notify_all();
    }

    fn header_change_begins(&self, begins_with_magic: bool) {
        let mut looks = self.looks();
        looks.header_changes += 1;
        if begins_with_magic {
            self.magic.store(true, Ordering::SeqCst);
        }
    }

    fn header_change_ends(&self) {
        self.looks().header_changes -= 1;
        self.touch();
    }

    fn join(&self) -> Arc<AtomicU64> {
        let count = Arc::new(AtomicU64::new(0));
        let mut looks = self.looks();
        looks.payload_changes.retain(|c| c.strong_count() > 0);
        looks.payload_changes.push(Arc::downgrade(&count));
        count
    }

    /// Ends everything: the payload is shut, and nothing is held back. Nobody looks any more.
    pub fn end(&self) {
        self.looks().ended = true;
        let shut = Shut { from_bytes: 0, status: Status::NAMESPACE_NOT_READY, discards: false };
        self.mode.set(Mode { layer: Layer::Shut(shut), settled: true });
        self.wake.notify_all();
    }
}

/// What a device of this kind is made with.
#[derive(Clone, Debug)]
pub struct LuksOptions {
    /// Name in the registry.
    pub name: String,
    /// The device below: thin, with blocks of 4096 bytes.
    pub base_bdev_name: String,
    /// Identity; random when not given.
    pub uuid: Option<Uuid>,
    /// Further parameters of the call that makes it again (an object).
    pub params: Value,
}

struct Luks {
    info: DeviceInfo,
    base: Base,
    params: Value,
    switch: Arc<Switch>,
}

/// Creates a device; claims its base. It is shut until the first look.
///
/// # Errors
/// Unknown or claimed base, name taken, a base of another kind.
pub fn create(registry: &Arc<Registry>, options: LuksOptions) -> Result<(Arc<Bdev>, Arc<Switch>), BdevError> {
    let found = registry.get(&options.base_bdev_name)?;
    let kind = found.info();
    if !kind.reports_unmapped || !kind.ops.has(Op::WriteZeroes) || !kind.ops.has(Op::Unmap) {
        return Err(BdevError::Invalid(format!("{} is no thin volume: one is needed", found.name())));
    }
    if kind.block_size_bytes != BLOCK_BYTES {
        let what = format!("{} has blocks of {} bytes", found.name(), kind.block_size_bytes);
        return Err(BdevError::Invalid(format!("{what}; a volume with blocks of {BLOCK_BYTES} is needed")));
    }
    let uppers = vec![options.name.clone()];
    let base = Base::open(registry, &options.base_bdev_name, uppers, "luks", OnResize::Follow)?;
    let below = base.bdev().clone();
    let mut info = DeviceInfo::stacked_on(below.info(), options.name, "luks");
    info.blocks = below.blocks();
    info.uuid = options.uuid.unwrap_or(info.uuid);
    let own = OpSet::of(&[Op::Read, Op::Write, Op::Flush]);
    let passed = [Op::Unmap, Op::WriteZeroes, Op::WriteUncorrectable, Op::Reset];
    info.ops = passed_through(own, below.info().ops, &passed);
    let switch = Switch::new();
    let device = Luks { info, base, params: options.params, switch: switch.clone() };
    Ok((Base::register(registry, Arc::new(device), &below)?, switch))
}

impl Luks {
    fn params(&self) -> Value {
        let mut params = self.params.clone();
        params["name"] = self.info.name.as_str().into();
        params["base_bdev_name"] = self.base.name().into();
        params
    }
}

impl Device for Luks {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        let queue = Rc::new(LuksQueue {
            changes: self.switch.join(),
            switch: self.switch.clone(),
            base: self.base.channel()?,
            epoch: Cell::new(u64::MAX),
            settled: Cell::new(false),
            layer: RefCell::new(Local::Raw),
            held: RefCell::default(),
            expiring: Cell::new(false),
            watch: RefCell::default(),
            device: self,
        });
        queue.refresh();
        *queue.watch.borrow_mut() = Some(watch(&queue));
        Ok(queue)
    }

    fn destruct(&self) {
        self.switch.end();
        self.base.close();
    }

    fn space(&self) -> Option<cryptfold_bdev::Space> {
        self.base.bdev().device().space()
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.base.bdev().device().allocated_bytes()
    }

    fn driver_specific(&self) -> Value {
        let mut params = self.params();
        params["status"] = self.switch.status();
        json!({"luks": params})
    }

    fn config(&self) -> Vec<(String, Value)> {
        let mut params = self.params();
        params["uuid"] = self.info.uuid.to_string().into();
        vec![("bdev_luks_create".into(), params)]
    }
}

/// A layer as a queue has it.
enum Local {
    Raw,
    Bound(Arc<Bound>, Rc<HostcryptQueue>),
    Shut(Shut),
}

struct LuksQueue {
    device: Arc<Luks>,
    switch: Arc<Switch>,
    base: Channel,
    /// The mode's epoch that `settled` and `layer` belong to.
    epoch: Cell<u64>,
    settled: Cell<bool>,
    layer: RefCell<Local>,
    /// Our changes of the payload under way.
    changes: Arc<AtomicU64>,
    /// Changes of the payload that wait for a look, until when.
    held: RefCell<VecDeque<(Nanos, Box<Io>)>>,
    /// A task looks after their limits.
    expiring: Cell<bool>,
    /// Looks at the mode when it changes; ends with the queue.
    watch: RefCell<Option<reactor::Task<()>>>,
}

/// What a change is, in its frame's word.
mod mark {
    /// Counted among the changes of the payload.
    pub const PAYLOAD: u64 = 1;
    /// A change of a header.
    pub const HEADER: u64 = 2;
    /// A change of the watched bytes that seemed to be none.
    pub const WATCHED: u64 = 4;
    /// Gives up a part of a payload that is shut.
    pub const GIVEN_UP: u64 = 8;
    /// A flush.
    pub const FLUSH: u64 = 16;
    /// A read of the payload while it is raw.
    pub const RAW_READ: u64 = 32;
}

fn watch(queue: &Rc<LuksQueue>) -> reactor::Task<()> {
    let (switch, queue) = (queue.switch.clone(), Rc::downgrade(queue));
    reactor::spawn_local(async move {
        let mut seen = queue.upgrade().map_or(0, |q| q.epoch.get());
        loop {
            switch.mode.changed(seen).await;
            let Some(queue) = queue.upgrade() else { return };
            queue.refresh();
            seen = queue.epoch.get();
            if queue.settled.get() {
                let held = std::mem::take(&mut *queue.held.borrow_mut());
                for (_, io) in held {
                    queue.clone().change(io);
                }
            }
        }
    })
}

fn begins_with_magic(io: &Io) -> bool {
    let start = io.data.iter().flat_map(|b| b.as_slice().iter().take(MAGIC.len())).take(MAGIC.len());
    io.op == Op::Write && io.lba == 0 && start.eq(MAGIC)
}

impl LuksQueue {
    /// Takes over the mode if it is another one.
    #[inline]
    fn refresh(&self) {
        if self.epoch.get() != self.switch.mode.epoch() {
            self.take_over();
        }
    }

    #[cold]
    fn take_over(&self) {
        let (epoch, mode) = self.switch.mode.look();
        self.epoch.set(epoch);
        self.settled.set(mode.settled);
        let mut local = self.layer.borrow_mut();
        *local = match (mode.layer, &*local) {
            (Layer::Raw, _) => Local::Raw,
            (Layer::Shut(shut), _) => Local::Shut(shut),
            (Layer::Bound(new), Local::Bound(old, _)) if Arc::ptr_eq(&new, old) => return,
            (Layer::Bound(new), _) => {
                let base = self.base.clone();
                match HostcryptQueue::open(base, &self.device.info, 1, new.shape, &new.gate) {
                    Ok(queue) => Local::Bound(new, queue),
                    Err(_) => {
                        let from_bytes = new.shape.payload_offset_bytes;
                        Local::Shut(Shut { from_bytes, status: Status::INTERNAL_ERROR, discards: false })
                    }
                }
            }
        };
    }

    /// A change of data.
    fn change(self: Rc<Self>, mut io: Box<Io>) {
        let block = u64::from(BLOCK_BYTES);
        let payload = (io.lba + io.blocks) * block > WATCHED_BYTES;
        if payload {
            self.changes.fetch_add(1, Ordering::SeqCst);
        }
        self.refresh();
        if payload && !self.settled.get() {
            self.uncount();
            return self.hold(io);
        }
        let mut marks = if payload { mark::PAYLOAD } else { 0 };
        if io.lba * block < WATCHED_BYTES {
            let magic = begins_with_magic(&io);
            if magic || self.switch.magic.load(Ordering::SeqCst) {
                self.switch.header_change_begins(magic);
                marks |= mark::HEADER;
            } else {
                marks |= mark::WATCHED;
            }
        }
        if let Local::Shut(shut) = &*self.layer.borrow()
            && shut.discards
            && matches!(io.op, Op::Unmap | Op::WriteZeroes)
        {
            marks |= mark::GIVEN_UP;
        }
        io.push(self.clone(), 0, marks);
        self.dispatch(io);
    }

    fn uncount(&self) {
        if self.changes.fetch_sub(1, Ordering::SeqCst) == 1 && self.switch.draining.load(Ordering::SeqCst) {
            // Who waits has the lock until it waits.
            drop(self.switch.looks());
            self.switch.wake.notify_all();
        }
    }

    /// To where the layer sends it.
    #[inline]
    fn dispatch(&self, io: Box<Io>) {
        let bound = match &*self.layer.borrow() {
            Local::Raw => None,
            Local::Bound(_, queue) => Some(queue.clone()),
            Local::Shut(shut) => {
                let end = (io.lba + io.blocks) * u64::from(BLOCK_BYTES);
                let given_up = shut.discards && matches!(io.op, Op::Unmap | Op::WriteZeroes);
                if end > shut.from_bytes && !given_up {
                    return io.finish(shut.status);
                }
                None
            }
        };
        match bound {
            Some(queue) => queue.submit(io),
            None => self.base.submit(io),
        }
    }

    fn hold(self: Rc<Self>, io: Box<Io>) {
        let until = Nanos(reactor::now().0 + HOLD_LIMIT.as_nanos() as u64);
        self.held.borrow_mut().push_back((until, io));
        if self.expiring.replace(true) {
            return;
        }
        let queue = Rc::downgrade(&self);
        reactor::spawn_local(async move {
            let next = || queue.upgrade().and_then(|q| q.held.borrow().front().map(|h| h.0));
            while let Some(next) = next() {
                reactor::sleep_until(next).await;
                let Some(queue) = queue.upgrade() else { return };
                while let Some(io) = queue.overdue() {
                    io.finish(Status::NAMESPACE_NOT_READY);
                }
            }
            if let Some(queue) = queue.upgrade() {
                queue.expiring.set(false);
            }
        })
        .detach();
    }

    /// One that has been held back for too long.
    fn overdue(&self) -> Option<Box<Io>> {
        let mut held = self.held.borrow_mut();
        let due = held.front().is_some_and(|h| h.0.0 <= reactor::now().0);
        if due { held.pop_front().map(|h| h.1) } else { None }
    }
}

impl Queue for LuksQueue {
    fn submit(self: Rc<Self>, mut io: Box<Io>) {
        if io.op.modifies() {
            return self.change(io);
        }
        self.refresh();
        if io.op == Op::Flush && self.switch.written.load(Ordering::Relaxed) {
            io.push(self.clone(), 0, mark::FLUSH);
        }
        let payload = (io.lba + io.blocks) * u64::from(BLOCK_BYTES) > WATCHED_BYTES;
        if io.op == Op::Read && payload && matches!(&*self.layer.borrow(), Local::Raw) {
            io.push(self.clone(), 0, mark::RAW_READ);
        }
        self.dispatch(io);
    }

    fn abort(&self, tag: u64) -> bool {
        let found = {
            let mut held = self.held.borrow_mut();
            held.iter().position(|h| h.1.tag == tag).and_then(|at| held.remove(at))
        };
        match found {
            Some((_, io)) => {
                io.finish(Status::ABORTED_BY_REQUEST);
                true
            }
            None => self.base.abort(tag),
        }
    }
}

impl Complete for LuksQueue {
    fn complete(self: Rc<Self>, mut io: Box<Io>, frame: Frame) {
        let (marks, switch) = (frame.word, &self.switch);
        if marks & mark::PAYLOAD != 0 {
            self.uncount();
        }
        // Also when it failed: a part may be there.
        if marks & mark::HEADER != 0 {
            switch.header_change_ends();
        } else if marks & mark::GIVEN_UP != 0 {
            switch.touch();
        }
        if marks & mark::WATCHED != 0 {
            switch.written.store(true, Ordering::Relaxed);
        }
        // Pieces of a header that came in another order: its magic number last.
        if marks & mark::FLUSH != 0
            && switch.magic.load(Ordering::SeqCst)
            && switch.written.swap(false, Ordering::Relaxed)
        {
            switch.touch();
        }
        let mut status = io.status();
        if marks & mark::RAW_READ != 0 {
            self.refresh();
            // What was bound meanwhile may be in it, as plaintext.
            if !matches!(&*self.layer.borrow(), Local::Raw) {
                io.data = SgList::new();
                status = Status::NAMESPACE_NOT_READY;
            }
        }
        io.pass(status);
    }
}
