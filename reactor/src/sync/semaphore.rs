//! A counting semaphore, first come, first served: a large request is not overtaken by small ones.

use super::wait_list::{Left, WaitList};
use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::task::{Context, Poll};

/// Permits to hand out.
pub struct Semaphore {
    permits: Cell<usize>,
    waiters: RefCell<WaitList>,
}

/// Permits held; dropping gives them back.
#[must_use = "dropping the permit gives it back"]
pub struct Permit<'a> {
    semaphore: &'a Semaphore,
    amount: usize,
}

struct Acquire<'a> {
    semaphore: &'a Semaphore,
    amount: usize,
    key: Option<u32>,
}

impl Semaphore {
    /// A semaphore with `permits` to hand out.
    pub fn new(permits: usize) -> Semaphore {
        Semaphore { permits: Cell::new(permits), waiters: RefCell::default() }
    }

    /// Permits that are free.
    pub fn available(&self) -> usize {
        self.permits.get()
    }

    /// Waits for `amount` permits at once.
    pub async fn acquire(&self, amount: usize) -> Permit<'_> {
        Acquire { semaphore: self, amount, key: None }.await;
        Permit { semaphore: self, amount }
    }

    /// `amount` permits, if they are free and nobody waits.
    pub fn try_acquire(&self, amount: usize) -> Option<Permit<'_>> {
        self.take(amount).then(|| Permit { semaphore: self, amount })
    }

    /// Adds permits: more than before, or those of a [`Permit::forget`].
    pub fn add_permits(&self, amount: usize) {
        self.permits.set(self.permits.get().saturating_add(amount));
        loop {
            let mut waiters = self.waiters.borrow_mut();
            let Some(rest) = waiters.wanted().and_then(|wanted| self.permits.get().checked_sub(wanted))
            else {
                break;
            };
            self.permits.set(rest);
            let waker = waiters.grant();
            drop(waiters);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    fn take(&self, amount: usize) -> bool {
        let rest =
            self.permits.get().checked_sub(amount).filter(|_| self.waiters.borrow().wanted().is_none());
        if let Some(rest) = rest {
            self.permits.set(rest);
        }
        rest.is_some()
    }
}

impl Permit<'_> {
    /// Number of permits held.
    pub fn amount(&self) -> usize {
        self.amount
    }

    /// Keeps the permits out of the semaphore until [`Semaphore::add_permits`].
    pub fn forget(mut self) {
        self.amount = 0;
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if self.amount > 0 {
            self.semaphore.add_permits(self.amount);
        }
    }
}

impl Future for Acquire<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match self.key {
            None if self.semaphore.take(self.amount) => Poll::Ready(()),
            None => {
                let key = self.semaphore.waiters.borrow_mut().join(cx.waker().clone(), self.amount);
                self.key = Some(key);
                Poll::Pending
            }
            Some(key) => {
                if self.semaphore.waiters.borrow_mut().poll(key, cx.waker()) {
                    self.key = None;
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            }
        }
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let left = self.semaphore.waiters.borrow_mut().leave(key);
        // Also when it only waited: the next in line may want less.
        self.semaphore.add_permits(if let Left::Granted(amount) = left { amount } else { 0 });
    }
}
