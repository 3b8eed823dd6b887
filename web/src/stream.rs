//! `/api/v1/stream`: Server-Sent Events (WHATWG HTML, section 9.2) to whoever listens. `event: snapshot`, its data the snapshot's JSON
//! in one line.
//!
//! One task looks for all, only while somebody listens. A listener has a short queue; when that is full its connection is ended:
//! what it would get is old.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use cryptfold_view::Look;
use cryptfold_view::hub::FRESH;
use hyper::body::{Body, Bytes, Frame};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

/// Listeners at a time.
pub const MAX_LISTENERS: usize = 16;
/// Snapshots that wait for a listener.
const QUEUE: usize = 4;

/// What ends a connection besides itself.
#[derive(Default)]
pub struct Guard {
    listens: AtomicBool,
    dropped: Notify,
}

impl Guard {
    /// Returns when the connection has to end: after `life` unless it listens, or when it does not keep up.
    pub async fn ended(&self, life: Duration) {
        tokio::select! {
            () = self.dropped.notified() => return,
            () = tokio::time::sleep(life) => {}
        }
        if self.listens.load(Ordering::Relaxed) {
            self.dropped.notified().await;
        }
    }
}

struct Entry {
    to: mpsc::Sender<Bytes>,
    guard: Arc<Guard>,
    /// What it was given last: nobody gets a look twice.
    given: Arc<Look>,
}

/// Who listens.
#[derive(Default)]
pub struct Stream {
    listeners: Mutex<Vec<Entry>>,
    came: Notify,
}

/// As it travels.
fn event(look: &Look) -> Bytes {
    // JSON in its short form has no line ends.
    format!("event: snapshot\ndata: {}\n\n", look.snapshot).into()
}

impl Stream {
    fn listeners(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more, who gets `now` at once; none when there are as many as there may be.
    pub fn join(&self, guard: &Arc<Guard>, now: &Arc<Look>) -> Option<Listener> {
        let mut listeners = self.listeners();
        listeners.retain(|l| !l.to.is_closed());
        if listeners.len() >= MAX_LISTENERS {
            return None;
        }
        let (to, from) = mpsc::channel(QUEUE);
        to.try_send(event(now)).ok()?;
        guard.listens.store(true, Ordering::Relaxed);
        listeners.push(Entry { to, guard: guard.clone(), given: now.clone() });
        self.came.notify_one();
        Some(Listener(from))
    }

    /// Tells all; those that do not keep up are dropped.
    fn tell(&self, look: &Arc<Look>) {
        let message = event(look);
        self.listeners().retain_mut(|l| {
            if Arc::ptr_eq(&l.given, look) {
                return true;
            }
            l.given = look.clone();
            match l.to.try_send(message.clone()) {
                Ok(()) => true,
                Err(mpsc::error::TrySendError::Closed(_)) => false,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    l.guard.dropped.notify_one();
                    false
                }
            }
        });
    }

    /// Never ends.
    pub async fn run(&self, look: impl AsyncFn() -> Option<Arc<Look>>) {
        loop {
            if self.listeners().is_empty() {
                self.came.notified().await;
            }
            let mut next = Instant::now() + FRESH;
            while !self.listeners().is_empty() {
                tokio::time::sleep_until(next).await;
                next = Instant::now() + FRESH;
                if let Some(look) = look().await {
                    self.tell(&look);
                    next = look.next.into();
                }
            }
        }
    }
}

/// A listener's end of its queue, as a response's body.
pub struct Listener(mpsc::Receiver<Bytes>);

impl Body for Listener {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|message| message.map(|m| Ok(Frame::data(m))))
    }
}
