//! A bounded queue from many tasks to one.
//!
//! Invariant: permits taken and forgotten == values in the queue.

use super::semaphore::Semaphore;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

struct Channel<T> {
    queue: RefCell<VecDeque<T>>,
    room: Semaphore,
    receiver_waker: RefCell<Option<Waker>>,
    senders: Cell<usize>,
    closed: Cell<bool>,
}

/// Puts values into the queue. Clone for more senders.
pub struct Sender<T>(Rc<Channel<T>>);

/// Takes values out of the queue.
pub struct Receiver<T>(Rc<Channel<T>>);

/// The value was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError<T> {
    /// The receiver is gone.
    #[error("the receiver is gone")]
    Closed(T),
    /// The queue is full (only [`Sender::try_send`]).
    #[error("the queue is full")]
    Full(T),
}

/// A queue of at most `capacity` values (at least 1).
pub fn channel<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let channel = Rc::new(Channel {
        queue: RefCell::default(),
        room: Semaphore::new(capacity.max(1)),
        receiver_waker: RefCell::default(),
        senders: Cell::new(1),
        closed: Cell::new(false),
    });
    (Sender(channel.clone()), Receiver(channel))
}

impl<T> Channel<T> {
    fn push(&self, value: T) {
        self.queue.borrow_mut().push_back(value);
        self.wake_receiver();
    }

    fn wake_receiver(&self) {
        let waker = self.receiver_waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Sender<T> {
    /// Waits for room, in order, then queues the value.
    pub async fn send(&self, value: T) -> Result<(), SendError<T>> {
        let permit = self.0.room.acquire(1).await;
        if self.0.closed.get() {
            return Err(SendError::Closed(value));
        }
        permit.forget();
        self.0.push(value);
        Ok(())
    }

    /// Queues the value if there is room and nobody waits for some.
    pub fn try_send(&self, value: T) -> Result<(), SendError<T>> {
        if self.0.closed.get() {
            return Err(SendError::Closed(value));
        }
        match self.0.room.try_acquire(1) {
            Some(permit) => permit.forget(),
            None => return Err(SendError::Full(value)),
        }
        self.0.push(value);
        Ok(())
    }

    /// Whether the receiver is gone.
    pub fn is_closed(&self) -> bool {
        self.0.closed.get()
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Sender<T> {
        self.0.senders.set(self.0.senders.get() + 1);
        Sender(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.senders.set(self.0.senders.get() - 1);
        if self.0.senders.get() == 0 {
            self.0.wake_receiver();
        }
    }
}

impl<T> Receiver<T> {
    /// The next value; None when the queue is empty and all senders are gone.
    pub async fn recv(&mut self) -> Option<T> {
        poll_fn(|cx| {
            if let Some(value) = self.try_recv() {
                return Poll::Ready(Some(value));
            }
            if self.0.senders.get() == 0 {
                return Poll::Ready(None);
            }
            let old = self.0.receiver_waker.borrow_mut().replace(cx.waker().clone());
            drop(old);
            Poll::Pending
        })
        .await
    }

    /// The next value, if there is one.
    pub fn try_recv(&mut self) -> Option<T> {
        let value = self.0.queue.borrow_mut().pop_front()?;
        self.0.room.add_permits(1);
        Some(value)
    }

    /// Values in the queue.
    pub fn len(&self) -> usize {
        self.0.queue.borrow().len()
    }

    /// Whether the queue is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.0.closed.set(true);
        let values = self.0.queue.take();
        drop(values);
        // Every waiting sender finds the channel closed.
        self.0.room.add_permits(usize::MAX / 2);
    }
}
