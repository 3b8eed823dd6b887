//! A one-value channel between two threads, without locks: the answer of [`crate::Handle::call`].
//!
//! Invariants: the sender writes `value` before the state becomes SENT; the receiver touches `waker` only in the states
//! EMPTY and (after taking it back to EMPTY) WAITING, the sender only after it has replaced WAITING.

use std::cell::UnsafeCell;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Waker};

const EMPTY: u8 = 0;
const WAITING: u8 = 1;
const SENT: u8 = 2;
const GONE: u8 = 3;
const TAKEN: u8 = 4;

struct Inner<T> {
    state: AtomicU8,
    value: UnsafeCell<Option<T>>,
    waker: UnsafeCell<Option<Waker>>,
}

// SAFETY: the state machine gives each cell to one side at a time; values cross threads, hence T: Send.
unsafe impl<T: Send> Send for Inner<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Inner<T> {}

pub(crate) struct ReplySender<T>(Arc<Inner<T>>);
pub(crate) struct ReplyReceiver<T>(Arc<Inner<T>>);

pub(crate) fn reply<T: Send>() -> (ReplySender<T>, ReplyReceiver<T>) {
    let inner = Arc::new(Inner {
        state: AtomicU8::new(EMPTY),
        value: UnsafeCell::new(None),
        waker: UnsafeCell::new(None),
    });
    (ReplySender(inner.clone()), ReplyReceiver(inner))
}

impl<T> ReplySender<T> {
    pub(crate) fn send(self, value: T) {
        // SAFETY: before SENT only the sender touches the value, and there is one sender.
        unsafe { *self.0.value.get() = Some(value) };
        self.finish(SENT);
    }

    fn finish(&self, state: u8) {
        if self.0.state.load(Ordering::Relaxed) >= SENT {
            return;
        }
        if self.0.state.swap(state, Ordering::AcqRel) == WAITING {
            // SAFETY: WAITING was replaced, so the receiver no longer touches the waker.
            if let Some(waker) = unsafe { (*self.0.waker.get()).take() } {
                waker.wake();
            }
        }
    }
}

impl<T> Drop for ReplySender<T> {
    fn drop(&mut self) {
        self.finish(GONE);
    }
}

impl<T> Future for ReplyReceiver<T> {
    /// None: the sender was dropped without an answer.
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let inner = &*self.0;
        // Take the waker back if the sender has not; on failure the answer is there.
        let _ = inner.state.compare_exchange(WAITING, EMPTY, Ordering::AcqRel, Ordering::Acquire);
        if inner.state.load(Ordering::Acquire) == EMPTY {
            // SAFETY: in EMPTY the waker is the receiver's.
            let slot = unsafe { &mut *inner.waker.get() };
            if !slot.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                *slot = Some(cx.waker().clone());
            }
            if inner.state.compare_exchange(EMPTY, WAITING, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return Poll::Pending;
            }
        }
        match inner.state.swap(TAKEN, Ordering::AcqRel) {
            // SAFETY: after SENT only the receiver touches the value.
            SENT => Poll::Ready(unsafe { (*inner.value.get()).take() }),
            _ => Poll::Ready(None),
        }
    }
}
