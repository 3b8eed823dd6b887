//! Readiness of a descriptor through the reactor's io_uring. The only module with `unsafe` code.
//!
//! One multishot poll per watch tells about edges: new bytes, new room, the end. A watch owns its descriptor until the
//! kernel has finished with the poll, so that the number is not reused under it.

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::{Rc, Weak};

use cryptfold_reactor::ring::{self, ClientGuard, RingClient};
use io_uring::{cqueue, opcode, types};

/// What became true of a descriptor. Edges that come close together are told as one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ready {
    /// Bytes, the end or an error wait.
    pub readable: bool,
    /// There is room to send.
    pub writable: bool,
    /// The end or an error waits, perhaps behind bytes.
    pub ending: bool,
}

/// Gets told, inside the reactor's turn.
pub(crate) trait OnReady {
    /// What became true.
    fn ready(&self, ready: Ready);
}

struct Client {
    fd: Rc<dyn AsFd>,
    to: Weak<dyn OnReady>,
    /// None before the first arming and after the end.
    guard: RefCell<Option<ClientGuard>>,
}

/// A descriptor being watched, until this is dropped.
pub(crate) struct Watch(Rc<Client>);

const TOKEN: u32 = 0;
const MASK: i32 = libc::POLLIN as i32 | libc::POLLOUT as i32 | libc::POLLRDHUP as i32;
const READABLE: i32 = (libc::POLLIN | libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) as i32;
const ENDING: i32 = (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) as i32;
const WRITABLE: i32 = (libc::POLLOUT | libc::POLLHUP | libc::POLLERR) as i32;

impl Watch {
    /// Starts watching. `None`: there is no ring here (simulator).
    pub fn new(fd: Rc<dyn AsFd>, to: Weak<dyn OnReady>) -> Option<Watch> {
        let client = Rc::new(Client { fd, to, guard: RefCell::new(None) });
        let guard = ring::register(client.clone()).ok()?;
        *client.guard.borrow_mut() = Some(guard);
        client.arm();
        Some(Watch(client))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(guard) = self.0.guard.borrow_mut().take() {
            guard.cancel(TOKEN);
        }
    }
}

impl Client {
    fn arm(&self) {
        if let Some(guard) = &*self.guard.borrow() {
            let fd = types::Fd(self.fd.as_fd().as_raw_fd());
            let poll = opcode::PollAdd::new(fd, MASK as u32).multi(true).build();
            // SAFETY: the entry names no memory, and a descriptor that this client owns; the ring keeps the client alive
            // until the poll has finished, also if the guard is dropped before.
            unsafe { guard.submit(TOKEN, poll) };
        }
    }
}

impl RingClient for Client {
    fn complete(&self, _token: u32, result: i32, flags: u32) {
        let Some(to) = self.to.upgrade() else { return };
        if !cqueue::more(flags) {
            // The kernel ends a multishot poll when its queue of completions is full, or on a failure.
            self.arm();
        }
        match result {
            r if r < 0 => to.ready(Ready { readable: true, writable: true, ending: true }),
            r => to.ready(Ready {
                readable: r & READABLE != 0,
                writable: r & WRITABLE != 0,
                ending: r & ENDING != 0,
            }),
        }
    }
}
