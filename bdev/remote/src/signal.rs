//! How any thread tells a link's task that something is to be done: a set of bits, and a waker.

use std::future::poll_fn;
use std::sync::{Mutex, PoisonError};
use std::task::{Poll, Waker};

/// The link ends for good.
pub(crate) const STOP: u8 = 1;
/// The association is to be made anew.
pub(crate) const RESET: u8 = 2;
/// A connection of the association has ended, or can not be opened.
pub(crate) const LOST: u8 = 4;
/// Namespaces or their access states may have changed.
pub(crate) const CHANGED: u8 = 8;

#[derive(Default)]
struct Inner {
    bits: u8,
    waker: Option<Waker>,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Signal(Mutex<Inner>);

impl Signal {
    /// Adds bits.
    pub fn raise(&self, bits: u8) {
        let waker = {
            let mut s = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            s.bits |= bits;
            s.waker.take()
        };
        if let Some(w) = waker {
            w.wake();
        }
    }

    /// Waits for bits of `mask` and takes them. One waiter at a time.
    pub async fn wait(&self, mask: u8) -> u8 {
        poll_fn(|cx| {
            let mut s = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let found = s.bits & mask;
            if found != 0 {
                s.bits &= !mask;
                return Poll::Ready(found);
            }
            s.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Forgets bits.
    pub fn clear(&self, mask: u8) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).bits &= !mask;
    }

    /// Whether one of the bits is set; it stays so.
    pub fn is_raised(&self, mask: u8) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).bits & mask != 0
    }
}
