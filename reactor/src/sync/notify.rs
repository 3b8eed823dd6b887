//! Wake-ups: [`Notify`] for "look again", [`Event`] for "it has happened".

use super::wait_list::{Left, WaitList};
use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::task::{Context, Poll};

/// Wakes waiting tasks. A notification that finds nobody waiting is kept, at most one.
#[derive(Default)]
pub struct Notify {
    kept: Cell<bool>,
    waiters: RefCell<WaitList>,
}

struct Notified<'a> {
    notify: &'a Notify,
    key: Option<u32>,
}

impl Notify {
    /// Nobody waits, nothing is kept.
    pub fn new() -> Notify {
        Notify::default()
    }

    /// Wakes the oldest waiter, or lets the next one pass.
    pub fn notify_one(&self) {
        if !self.wake_oldest() {
            self.kept.set(true);
        }
    }

    /// Wakes all that wait now; keeps nothing.
    pub fn notify_waiters(&self) {
        // Woken tasks run later, so those that wait again are not met here.
        while self.wake_oldest() {}
    }

    /// Waits for a notification.
    pub async fn notified(&self) {
        Notified { notify: self, key: None }.await;
    }

    fn wake_oldest(&self) -> bool {
        let waker = self.waiters.borrow_mut().grant();
        waker.map(|waker| waker.wake()).is_some()
    }
}

impl Future for Notified<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match self.key {
            None if self.notify.kept.replace(false) => Poll::Ready(()),
            None => {
                let key = self.notify.waiters.borrow_mut().join(cx.waker().clone(), 1);
                self.key = Some(key);
                Poll::Pending
            }
            Some(key) => {
                if self.notify.waiters.borrow_mut().poll(key, cx.waker()) {
                    self.key = None;
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            }
        }
    }
}

impl Drop for Notified<'_> {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let left = self.notify.waiters.borrow_mut().leave(key);
        if let Left::Granted(_) = left {
            self.notify.notify_one();
        }
    }
}

/// A flag to wait for. Stays set until it is reset.
#[derive(Default)]
pub struct Event {
    set: Cell<bool>,
    notify: Notify,
}

impl Event {
    /// Not set.
    pub fn new() -> Event {
        Event::default()
    }

    /// Sets the flag and wakes all waiters.
    pub fn set(&self) {
        self.set.set(true);
        self.notify.notify_waiters();
    }

    /// Clears the flag. Tasks already woken by [`Event::set`] go on waiting if they have not run yet.
    pub fn reset(&self) {
        self.set.set(false);
    }

    /// Whether the flag is set.
    pub fn is_set(&self) -> bool {
        self.set.get()
    }

    /// Waits until the flag is set.
    pub async fn wait(&self) {
        while !self.set.get() {
            self.notify.notified().await;
        }
    }
}
