//! Readiness of descriptors through the reactor's io_uring. With [`crate::sys`] the only place of `unsafe` code.
//!
//! Each descriptor has one multishot poll that tells about edges: new bytes, new room, the end. A watch owns its
//! descriptor until the kernel has finished with the poll, so that the number is not reused under it. Without a ring
//! (simulator) nothing is watched.

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::{Rc, Weak};

use cryptfold_reactor::ring::{self, ClientGuard, RingClient};
use io_uring::{cqueue, opcode, types};

/// What became true of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ready {
    /// Bytes, connections, the end or an error wait to be taken.
    pub readable: bool,
    /// There is room to send.
    pub writable: bool,
    /// The end or an error waits behind the bytes, and will not be told again.
    pub hangup: bool,
}

impl Ready {
    /// Everything may be the case.
    pub const MAYBE: Ready = Ready { readable: true, writable: true, hangup: false };
}

/// Gets told.
pub(crate) trait Watcher {
    /// The descriptor watched under `key` is ready. Inside the reactor's turn, not inside `watch`.
    fn ready(&self, key: u64, ready: Ready);
}

struct Watch {
    key: u64,
    fd: Rc<dyn AsFd>,
    /// Nobody wants to know any more; the entry only waits for the kernel.
    ended: bool,
}

struct Client {
    watcher: Weak<dyn Watcher>,
    guard: RefCell<Option<ClientGuard>>,
    watches: RefCell<Vec<Option<Watch>>>,
}

/// The watches of one reactor.
pub(crate) struct Watches(Rc<Client>);

/// Names a watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WatchId(u32);

const MASK: i32 = libc::POLLIN as i32 | libc::POLLOUT as i32 | libc::POLLRDHUP as i32;
const READABLE: i32 = (libc::POLLIN | libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) as i32;
const HANGUP: i32 = (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) as i32;
const WRITABLE: i32 = (libc::POLLOUT | libc::POLLHUP | libc::POLLERR) as i32;

impl Watches {
    pub fn new(watcher: Weak<dyn Watcher>) -> Watches {
        let client = Rc::new(Client { watcher, guard: RefCell::new(None), watches: RefCell::default() });
        *client.guard.borrow_mut() = ring::register(client.clone()).ok();
        Watches(client)
    }

    /// Watches `fd` until [`Watches::end`]. `None`: there is no ring here.
    pub fn watch(&self, key: u64, fd: Rc<dyn AsFd>) -> Option<WatchId> {
        self.0.guard.borrow().as_ref()?;
        let mut watches = self.0.watches.borrow_mut();
        let free = watches.iter().position(Option::is_none).unwrap_or(watches.len());
        if free == watches.len() {
            watches.push(None);
        }
        watches[free] = Some(Watch { key, fd, ended: false });
        drop(watches);
        self.0.arm(free as u32);
        Some(WatchId(free as u32))
    }

    /// Ends a watch. Its descriptor is closed when the kernel has let go of it, if nobody else holds it.
    pub fn end(&self, id: WatchId) {
        if let Some(Some(w)) = self.0.watches.borrow_mut().get_mut(id.0 as usize) {
            w.ended = true;
        }
        if let Some(guard) = &*self.0.guard.borrow() {
            guard.cancel(id.0);
        }
    }
}

impl Client {
    fn arm(&self, token: u32) {
        let watches = self.watches.borrow();
        let guard = self.guard.borrow();
        let (Some(Some(watch)), Some(guard)) = (watches.get(token as usize), &*guard) else { return };
        let fd = types::Fd(watch.fd.as_fd().as_raw_fd());
        let poll = opcode::PollAdd::new(fd, MASK as u32).multi(true).build();
        // SAFETY: the entry names no memory, and a descriptor that `watches[token]` owns. That entry is only emptied by
        // `complete` when the poll has finished, and the ring keeps this client alive until then.
        unsafe { guard.submit(token, poll) };
    }
}

impl RingClient for Client {
    fn complete(&self, token: u32, result: i32, flags: u32) {
        let more = cqueue::more(flags);
        let (key, ended) = match self.watches.borrow().get(token as usize) {
            Some(Some(w)) => (w.key, w.ended),
            _ => return,
        };
        // Also when the reactor ends, which cancels everything.
        if !more && (ended || result == -libc::ECANCELED || self.watcher.strong_count() == 0) {
            let watch = self.watches.borrow_mut()[token as usize].take();
            drop(watch);
            return;
        }
        if !more {
            // The kernel ends a multishot poll when its queue of completions is full, or on a failure.
            self.arm(token);
        }
        let ready = match result {
            r if r < 0 => Ready { hangup: true, ..Ready::MAYBE },
            r => Ready { readable: r & READABLE != 0, writable: r & WRITABLE != 0, hangup: r & HANGUP != 0 },
        };
        if !ended && let Some(watcher) = self.watcher.upgrade() {
            watcher.ready(key, ready);
        }
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        for (token, w) in self.0.watches.borrow_mut().iter_mut().enumerate() {
            if let (Some(w), Some(guard)) = (w, &*self.0.guard.borrow()) {
                w.ended = true;
                guard.cancel(token as u32);
            }
        }
    }
}
