//! [`Watched`]: a value that ordinary threads set, and that queues on reactors look at with one atomic load per I/O; it wakes
//! those that are idle.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

struct State<T> {
    value: T,
    wakers: BTreeMap<u64, Waker>,
    next_waker: u64,
}

/// See the module.
pub(crate) struct Watched<T> {
    /// Counts the changes. Written under the lock.
    epoch: AtomicU64,
    state: Mutex<State<T>>,
}

impl<T: Clone> Watched<T> {
    pub fn new(value: T) -> Watched<T> {
        let state = State { value, wakers: BTreeMap::new(), next_waker: 0 };
        Watched { epoch: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// What it is now.
    pub fn get(&self) -> T {
        self.lock().value.clone()
    }

    /// What it is from now on.
    pub fn set(&self, value: T) {
        self.change(|now| *now = value);
    }

    /// Changes it in one step.
    pub fn change(&self, f: impl FnOnce(&mut T)) {
        let mut state = self.lock();
        f(&mut state.value);
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        wakers.into_values().for_each(Waker::wake);
    }

    /// Changes with each change.
    #[inline]
    pub fn epoch(&self) -> u64 {
        // In one order with what the looker has published before: who changes the value may wait for those that have
        // not seen it.
        self.epoch.load(Ordering::SeqCst)
    }

    /// What it is, and the epoch that it belongs to.
    pub fn look(&self) -> (u64, T) {
        let state = self.lock();
        (self.epoch.load(Ordering::SeqCst), state.value.clone())
    }

    /// Ends when the epoch is another one than `seen`.
    pub fn changed(&self, seen: u64) -> Changed<'_, T> {
        Changed { of: self, seen, waker: None }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Watched::changed`].
pub(crate) struct Changed<'a, T: Clone> {
    of: &'a Watched<T>,
    seen: u64,
    waker: Option<u64>,
}

impl<T: Clone> Future for Changed<'_, T> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let of = self.of;
        let mut state = of.lock();
        if of.epoch.load(Ordering::SeqCst) != self.seen {
            return Poll::Ready(());
        }
        let key = *self.waker.get_or_insert(state.next_waker);
        state.next_waker = state.next_waker.max(key + 1);
        state.wakers.insert(key, cx.waker().clone());
        Poll::Pending
    }
}

impl<T: Clone> Drop for Changed<'_, T> {
    fn drop(&mut self) {
        if let Some(key) = self.waker {
            let waker = self.of.lock().wakers.remove(&key);
            drop(waker);
        }
    }
}
