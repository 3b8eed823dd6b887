//! Queues of reactors without a queue pair of their own: I/O travels to the reactor that has one, and back, by message. No
//! locks; each message carries what the other side needs, the I/O itself stays here.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cryptfold_bdev::{Complete, Frame, Io, Op, Queue, Status};
use cryptfold_reactor::{self as reactor, Handle, SgList};

use crate::controller::Controller;
use crate::identity::Target;

struct RemoteQueue {
    id: u64,
    controller: Arc<Controller>,
    index: usize,
    owner: Handle,
    target: Target,
    here: Handle,
    outstanding: RefCell<HashMap<u64, Box<Io>>>,
    next: Cell<u64>,
}

thread_local! {
    static QUEUES: RefCell<HashMap<u64, Weak<RemoteQueue>>> = RefCell::default();
}

/// What crosses to the owner.
struct Order {
    op: Op,
    lba: u64,
    blocks: u64,
    fua: bool,
    data: SgList,
    queue: u64,
    token: u64,
    from: Handle,
}

pub(crate) fn open(
    controller: &Arc<Controller>,
    index: usize,
    owner: Handle,
    target: Target,
) -> Rc<dyn Queue> {
    static IDS: AtomicU64 = AtomicU64::new(1);
    let queue = Rc::new(RemoteQueue {
        id: IDS.fetch_add(1, Ordering::Relaxed),
        controller: controller.clone(),
        index,
        owner,
        target,
        here: reactor::current(),
        outstanding: RefCell::default(),
        next: Cell::new(0),
    });
    QUEUES.with_borrow_mut(|all| {
        all.retain(|_, q| q.strong_count() > 0);
        all.insert(queue.id, Rc::downgrade(&queue))
    });
    queue
}

impl Queue for RemoteQueue {
    fn submit(self: Rc<Self>, mut io: Box<Io>) {
        if self.owner.is_gone() {
            return io.finish(Status::INVALID_NAMESPACE.do_not_retry());
        }
        let token = self.next.get();
        self.next.set(token + 1);
        let order = Order {
            op: io.op,
            lba: io.lba,
            blocks: io.blocks,
            fua: io.fua,
            data: std::mem::take(&mut io.data),
            queue: self.id,
            token,
            from: self.here.clone(),
        };
        self.outstanding.borrow_mut().insert(token, io);
        let (controller, index, target) = (self.controller.clone(), self.index, self.target);
        self.owner.send(move || execute(&controller, index, &target, order));
    }

    fn abort(&self, tag: u64) -> bool {
        let found = self.outstanding.borrow().iter().find(|(_, io)| io.tag == tag).map(|(token, _)| *token);
        let Some(token) = found else { return false };
        let (controller, index, queue) = (self.controller.clone(), self.index, self.id);
        self.owner.send(move || {
            if let Some(pair) = controller.pair(index) {
                pair.abort(tag_of(queue, token));
            }
        });
        true
    }
}

/// The tag under which the owner knows an I/O of a queue.
fn tag_of(queue: u64, token: u64) -> u64 {
    queue << 40 ^ token
}

/// On the owner.
fn execute(controller: &Arc<Controller>, index: usize, target: &Target, order: Order) {
    let mut io = Io::new(order.op, order.lba, order.blocks);
    (io.fua, io.data, io.tag) = (order.fua, order.data, tag_of(order.queue, order.token));
    io.push(Rc::new(Answer { to: order.from, queue: order.queue }), 0, order.token);
    match controller.pair(index) {
        Some(pair) => pair.submit_io(target, io),
        None => io.finish(Status::INVALID_NAMESPACE.do_not_retry()),
    }
}

struct Answer {
    to: Handle,
    queue: u64,
}

impl Complete for Answer {
    fn complete(self: Rc<Self>, mut io: Box<Io>, frame: Frame) {
        let (status, data) = (io.status(), std::mem::take(&mut io.data));
        let (queue, token) = (self.queue, frame.word);
        io.recycle();
        self.to.send(move || {
            let queue = QUEUES.with_borrow(|all| all.get(&queue).and_then(Weak::upgrade));
            let Some(queue) = queue else { return };
            let io = queue.outstanding.borrow_mut().remove(&token);
            if let Some(mut io) = io {
                io.data = data;
                io.up(status);
            }
        });
    }
}
