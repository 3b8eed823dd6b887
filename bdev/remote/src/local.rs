//! A remote controller on one reactor: an I/O connection per link, and I/O that waits for a path. Found by the remote's
//! number in a table of this thread, because news arrive as messages; stays until the remote ends, so that connections are
//! opened once per association and core.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Complete, Frame, Io, Op, Queue, Status};
use cryptfold_nvmf_initiator::{AnaState, IoQueue, NamespaceQueue};
use cryptfold_nvmf_spec::Nsid;
use cryptfold_reactor::memory::SgList;
use cryptfold_reactor::{self as reactor, Nanos};

use crate::link::{Link, Renewal, Up};
use crate::remote::{Namespace, Remote};
use crate::signal::{CHANGED, LOST};

/// How often waiting I/O is looked at.
const TICK: Duration = Duration::from_millis(20);
/// An I/O that ended for a passing reason waits so long.
const AGAIN: Duration = Duration::from_millis(100);
/// Longest wait of a reset for an association.
const RESET_LIMIT: Duration = Duration::from_secs(30);
/// Status code type of path related errors (NVMe Base 2.0 section 3.3.3.2.4).
const SCT_PATH: u8 = 3;

/// In [`Frame::word`]: the read came without buffers.
const BARE_READ: u64 = 1;
/// In [`Frame::word`]: one retry.
const RETRY: u64 = 1 << 8;

thread_local! {
    static LOCALS: RefCell<HashMap<u64, Rc<Local>>> = RefCell::default();
}

/// Links or namespaces of a remote have changed.
pub(crate) fn refresh(id: u64) {
    let local = LOCALS.with_borrow(|l| l.get(&id).cloned());
    if let Some(local) = local {
        local.refresh();
    }
}

/// A remote has ended.
pub(crate) fn forget(id: u64) {
    let local = LOCALS.with_borrow_mut(|l| l.remove(&id));
    if let Some(local) = local {
        let links = std::mem::take(&mut *local.links.borrow_mut());
        for link in links {
            link.close();
        }
        local.changed();
        local.kick();
    }
}

/// A link, as this reactor has it.
struct LocalLink {
    link: Arc<Link>,
    up: RefCell<Option<Arc<Up>>>,
    queue: RefCell<Option<IoQueue>>,
    /// Namespaces that were refused here since the link was last looked at.
    refused: RefCell<Vec<Nsid>>,
}

impl LocalLink {
    /// The way to a namespace and how good it is; less is better.
    fn way(&self, nsid: Nsid) -> Option<(u8, Rc<NamespaceQueue>)> {
        let (up, queue) = (self.up.borrow(), self.queue.borrow());
        let path = up.as_ref()?.namespaces.get(&nsid)?;
        let rank = match path.ana {
            AnaState::Optimized => 0,
            AnaState::NonOptimized => 1,
            _ => return None,
        };
        if self.refused.borrow().contains(&nsid) {
            return None;
        }
        Some((rank, queue.as_ref()?.namespace(&path.info)))
    }

    /// Ends the I/O connection; what is under way comes back.
    fn close(&self) {
        let queue = self.queue.borrow_mut().take();
        if let Some(queue) = queue {
            queue.close();
        }
    }

    /// Whether the I/O connection has just been found ended: the association is over then.
    fn drop_if_closed(&self) -> bool {
        let closed = self.queue.borrow().as_ref().is_some_and(|q| q.closed().is_some());
        if closed {
            self.queue.borrow_mut().take();
            self.link.signal.raise(LOST);
        }
        closed
    }
}

/// An I/O without a path, or one that is tried again later.
struct Waiting {
    queue: Rc<RemoteQueue>,
    io: Box<Io>,
    word: u64,
    since: Nanos,
    not_before: Nanos,
    status: Status,
}

/// See the module.
pub(crate) struct Local {
    remote: Arc<Remote>,
    links: RefCell<Vec<Rc<LocalLink>>>,
    /// Moves when a way may have changed.
    generation: Cell<u64>,
    waiting: RefCell<VecDeque<Waiting>>,
    ticking: Cell<bool>,
}

impl Local {
    /// This reactor's.
    pub fn here(remote: &Arc<Remote>) -> Rc<Local> {
        if let Some(local) = LOCALS.with_borrow(|l| l.get(&remote.id).cloned()) {
            return local;
        }
        let local = Rc::new(Local {
            remote: remote.clone(),
            links: RefCell::default(),
            generation: Cell::new(1),
            waiting: RefCell::default(),
            ticking: Cell::new(false),
        });
        LOCALS.with_borrow_mut(|l| l.insert(remote.id, local.clone()));
        // First told, then looked: nothing is missed between.
        remote.tell(reactor::current());
        local.refresh();
        local
    }

    pub fn queue(self: Rc<Self>, ns: Arc<Namespace>) -> Rc<dyn Queue> {
        Rc::new(RemoteQueue { local: self, ns, way: RefCell::default(), generation: Cell::new(0) })
    }

    fn changed(&self) {
        self.generation.set(self.generation.get() + 1);
    }

    fn refresh(self: &Rc<Self>) {
        let present = self.remote.links();
        let mut links = self.links.borrow_mut();
        links.retain(|l| {
            let stays = present.iter().any(|p| Arc::ptr_eq(p, &l.link));
            if !stays {
                l.close();
            }
            stays
        });
        for link in present {
            let known = links.iter().find(|l| Arc::ptr_eq(&l.link, &link)).cloned();
            let here = known.unwrap_or_else(|| {
                let fresh = Rc::new(LocalLink {
                    link: link.clone(),
                    up: RefCell::default(),
                    queue: RefCell::default(),
                    refused: RefCell::default(),
                });
                links.push(fresh.clone());
                fresh
            });
            let up = link.up();
            let same = match (&*here.up.borrow(), &up) {
                (Some(a), Some(b)) => Arc::ptr_eq(&a.connector, &b.connector),
                (None, None) => true,
                _ => false,
            };
            here.refused.borrow_mut().clear();
            *here.up.borrow_mut() = up;
            if !same {
                here.close();
                self.clone().open(here);
            }
        }
        drop(links);
        self.changed();
        self.kick();
    }

    /// Opens the link's I/O connection on this reactor.
    fn open(self: Rc<Self>, here: Rc<LocalLink>) {
        let Some(up) = here.up.borrow().clone() else { return };
        reactor::spawn_local(async move {
            let depth = up.connector.queue_entries() - 1;
            let opened = up.connector.clone().io_queue(depth).await;
            let still = here.up.borrow().as_ref().is_some_and(|u| Arc::ptr_eq(&u.connector, &up.connector));
            match opened {
                Ok(queue) if still => {
                    *here.queue.borrow_mut() = Some(queue);
                    self.changed();
                    self.kick();
                }
                Err(e) if still => {
                    tracing::warn!(controller = self.remote.name, error = %e, "no I/O connection");
                    here.link.signal.raise(LOST);
                }
                _ => {}
            }
        })
        .detach();
    }

    /// The best way to a namespace: by access state, then in the order of attachment.
    fn best(&self, nsid: Nsid) -> Option<(Rc<LocalLink>, Rc<NamespaceQueue>)> {
        let links = self.links.borrow();
        let ways = links.iter().filter_map(|l| l.way(nsid).map(|(rank, q)| (rank, l, q)));
        ways.min_by_key(|(rank, ..)| *rank).map(|(_, l, q)| (l.clone(), q))
    }

    /// An I/O waits for a path, or for its time.
    fn wait(
        self: &Rc<Self>,
        queue: Rc<RemoteQueue>,
        io: Box<Io>,
        word: u64,
        delay: Duration,
        status: Status,
    ) {
        let since = reactor::now();
        let waiting = Waiting { queue, io, word, since, not_before: since + delay, status };
        self.waiting.borrow_mut().push_back(waiting);
        if self.ticking.replace(true) {
            return;
        }
        let me = self.clone();
        reactor::spawn_local(async move {
            while !me.waiting.borrow().is_empty() {
                reactor::sleep(TICK).await;
                me.kick();
            }
            me.ticking.set(false);
        })
        .detach();
    }

    /// Sends out what can go, and ends what has no hope.
    fn kick(&self) {
        let now = reactor::now();
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        for w in waiting {
            if w.queue.ns.is_gone() {
                w.io.finish(Status::INVALID_NAMESPACE);
            } else if now < w.not_before {
                self.waiting.borrow_mut().push_back(w);
            } else if w.queue.has_way() {
                w.queue.send(w.io, w.word);
            } else if self.remote.may_wait(w.queue.ns.nsid, w.since) {
                self.waiting.borrow_mut().push_back(w);
            } else {
                w.io.finish(w.status);
            }
        }
    }
}

/// A namespace on this reactor.
struct RemoteQueue {
    local: Rc<Local>,
    ns: Arc<Namespace>,
    /// Valid for this generation of the local's.
    way: RefCell<Option<(Rc<LocalLink>, Rc<NamespaceQueue>)>>,
    generation: Cell<u64>,
}

impl RemoteQueue {
    fn has_way(&self) -> bool {
        if self.generation.replace(self.local.generation.get()) != self.local.generation.get() {
            *self.way.borrow_mut() = self.local.best(self.ns.nsid);
        }
        self.way.borrow().is_some()
    }

    fn send(self: Rc<Self>, mut io: Box<Io>, word: u64) {
        if !self.has_way() {
            let local = self.local.clone();
            return local.wait(self, io, word, Duration::ZERO, Status::TRANSIENT_TRANSPORT_ERROR);
        }
        let way = self.way.borrow().as_ref().map(|(_, q)| q.clone());
        let Some(queue) = way else { return io.finish(Status::TRANSIENT_TRANSPORT_ERROR) };
        let generation = self.generation.get();
        io.push(self, generation, word);
        queue.submit(io);
    }

    /// What a failed I/O means for its path. True: another path is needed.
    fn path_failed(&self, generation: u64, status: Status) -> bool {
        let links = self.local.links.borrow().clone();
        let mut lost = generation != self.local.generation.get();
        for link in &links {
            lost |= link.drop_if_closed();
        }
        if status.sct() == SCT_PATH && !lost {
            // This way is not asked again before the link has been looked at.
            if let Some((link, _)) = &*self.way.borrow() {
                link.refused.borrow_mut().push(self.ns.nsid);
                link.link.signal.raise(CHANGED);
            }
            lost = true;
        }
        if lost {
            self.local.changed();
        }
        lost
    }
}

impl Queue for RemoteQueue {
    #[inline]
    fn submit(self: Rc<Self>, io: Box<Io>) {
        if io.op == Op::Reset {
            return self.reset(io);
        }
        let bare = io.op == Op::Read && io.data.is_empty();
        self.send(io, if bare { BARE_READ } else { 0 });
    }

    fn abort(&self, tag: u64) -> bool {
        let mut waiting = self.local.waiting.borrow_mut();
        let at = waiting.iter().position(|w| std::ptr::eq(&*w.queue, self) && w.io.tag == tag);
        let found = at.and_then(|i| waiting.remove(i));
        drop(waiting);
        found.map(|w| w.io.finish(Status::ABORTED_BY_REQUEST)).is_some()
    }
}

/// Whether an I/O that ended so may succeed when it is sent again.
fn is_passing(status: Status) -> bool {
    const CODES: [Status; 4] = [
        Status::TRANSIENT_TRANSPORT_ERROR,
        Status::ABORTED_SQ_DELETION,
        Status::COMMAND_INTERRUPTED,
        Status::NAMESPACE_NOT_READY,
    ];
    !status.dnr() && (status.sct() == SCT_PATH || CODES.contains(&status))
}

impl Complete for RemoteQueue {
    #[inline]
    fn complete(self: Rc<Self>, io: Box<Io>, frame: Frame) {
        let status = io.status();
        if status.is_ok() || !is_passing(status) {
            return io.pass(status);
        }
        self.failed(io, frame, status);
    }
}

impl RemoteQueue {
    /// Makes all associations anew. I/O that is under way comes back with its connection and goes out again; one path that has come
    /// back is enough.
    #[cold]
    fn reset(self: Rc<Self>, io: Box<Io>) {
        let remote = self.local.remote.clone();
        let renewals: Vec<Renewal> = remote.links().into_iter().map(Renewal::begin).collect();
        reactor::spawn_local(async move {
            let begin = reactor::now();
            let status = loop {
                if renewals.iter().all(Renewal::is_past) && renewals.iter().any(Renewal::is_done) {
                    break Status::SUCCESS;
                }
                let too_long = Duration::from_nanos(reactor::now().0 - begin.0) >= RESET_LIMIT;
                if too_long || self.ns.is_gone() || !remote.may_wait(self.ns.nsid, begin) {
                    break Status::TRANSIENT_TRANSPORT_ERROR;
                }
                reactor::sleep(TICK).await;
            };
            io.finish(status);
        })
        .detach();
    }

    #[cold]
    fn failed(self: Rc<Self>, mut io: Box<Io>, frame: Frame, status: Status) {
        let lost = self.path_failed(frame.lba, status);
        if self.ns.is_gone() {
            return io.pass(Status::INVALID_NAMESPACE);
        }
        // Whether a compare-and-write has happened is not known, and done twice it fails.
        if io.op == Op::CompareAndWrite && status.sct() != SCT_PATH {
            return io.pass(status);
        }
        if frame.word & BARE_READ != 0 {
            io.data = SgList::new();
        }
        // A connection that ended is bounded by the time-outs of the attachment.
        if lost && status.sct() != SCT_PATH {
            return self.send(io, frame.word);
        }
        if frame.word / RETRY >= u64::from(self.local.remote.retries) {
            return io.pass(status);
        }
        if lost {
            return self.send(io, frame.word + RETRY);
        }
        let local = self.local.clone();
        local.wait(self, io, frame.word + RETRY, AGAIN, status);
    }
}
