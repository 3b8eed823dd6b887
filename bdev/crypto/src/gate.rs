//! [`KeyGate`]: a key that comes later, and that can be taken away and given back while hosts are connected.
//!
//! Whoever watches the key sets the gate, from any thread; each queue of the device looks at it with one atomic load per
//! I/O, and is woken when it changes, so that an idle queue wipes its copy of the key as well.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use cryptfold_bdev::Status;

use crate::engine::XtsKey;

/// What a host may do now.
#[derive(Clone, Debug)]
pub enum Access {
    /// Nothing yet: the key is not there. I/O ends with Namespace Not Ready; hosts try again.
    Waiting,
    /// Everything.
    Open(Arc<XtsKey>),
    /// Nothing any more, reads included. I/O ends with Access Denied and Do Not Retry.
    Fenced,
}

impl Access {
    /// For people: `waiting`, `open` or `fenced`.
    pub fn word(&self) -> &'static str {
        match self {
            Access::Waiting => "waiting",
            Access::Open(_) => "open",
            Access::Fenced => "fenced",
        }
    }

    /// The key, or the status that I/O ends with.
    pub(crate) fn key(&self) -> Result<&Arc<XtsKey>, Status> {
        match self {
            Access::Waiting => Err(Status::NAMESPACE_NOT_READY),
            Access::Open(key) => Ok(key),
            Access::Fenced => Err(Status::ACCESS_DENIED.do_not_retry()),
        }
    }
}

struct State {
    access: Access,
    wakers: BTreeMap<u64, Waker>,
    next_waker: u64,
}

/// See the module.
pub struct KeyGate {
    /// Counts the changes. Written under the lock.
    epoch: AtomicU64,
    /// Never changes: nobody has to be woken.
    fixed: bool,
    state: Mutex<State>,
}

impl fmt::Debug for KeyGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyGate({})", self.access().word())
    }
}

impl KeyGate {
    fn new(access: Access, fixed: bool) -> Arc<KeyGate> {
        let state = State { access, wakers: BTreeMap::new(), next_waker: 0 };
        Arc::new(KeyGate { epoch: AtomicU64::new(0), fixed, state: Mutex::new(state) })
    }

    /// A key that stays.
    pub fn fixed(key: Arc<XtsKey>) -> Arc<KeyGate> {
        KeyGate::new(Access::Open(key), true)
    }

    /// A key that is not there yet.
    pub fn waiting() -> Arc<KeyGate> {
        KeyGate::new(Access::Waiting, false)
    }

    /// What holds now.
    pub fn access(&self) -> Access {
        self.lock().access.clone()
    }

    /// Sets what holds from now on. I/O that is under way below ends as the new state says when it comes back.
    ///
    /// # Panics
    /// For a fixed key.
    pub fn set(&self, access: Access) {
        assert!(!self.fixed, "the gate of a fixed key was set");
        let mut state = self.lock();
        state.access = access;
        self.epoch.fetch_add(1, Ordering::Release);
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        wakers.into_values().for_each(Waker::wake);
    }

    pub(crate) fn is_fixed(&self) -> bool {
        self.fixed
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// What holds, and the epoch that it belongs to.
    pub(crate) fn look(&self) -> (u64, Access) {
        let state = self.lock();
        (self.epoch.load(Ordering::Relaxed), state.access.clone())
    }

    /// Ends when the epoch is another one than `seen`.
    pub(crate) fn changed(&self, seen: u64) -> Changed<'_> {
        Changed { gate: self, seen, waker: None }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`KeyGate::changed`].
pub(crate) struct Changed<'a> {
    gate: &'a KeyGate,
    seen: u64,
    waker: Option<u64>,
}

impl Future for Changed<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let gate = self.gate;
        let mut state = gate.lock();
        if gate.epoch.load(Ordering::Relaxed) != self.seen {
            return Poll::Ready(());
        }
        let key = *self.waker.get_or_insert(state.next_waker);
        state.next_waker = state.next_waker.max(key + 1);
        state.wakers.insert(key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.waker {
            let waker = self.gate.lock().wakers.remove(&key);
            drop(waker);
        }
    }
}
