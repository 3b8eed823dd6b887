//! Calls of the system that may take long, on threads of their own: a reactor does not wait for them.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use crate::controller::lock;

/// A call of the system that is waited for.
pub type Waiting<T> = Pin<Box<dyn Future<Output = T>>>;

struct Answer<T> {
    value: Option<T>,
    waker: Option<Waker>,
}

/// Starts `work` on a thread of its own, or does it here if there is none. It is done even if nobody waits for it.
pub(crate) fn elsewhere<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Waiting<T> {
    let answer = Arc::new(Mutex::new(Answer { value: None, waker: None }));
    let work = Arc::new(Mutex::new(Some(work)));
    let (theirs, given) = (answer.clone(), work.clone());
    let run = move || {
        // Taken before it runs: it may take long.
        let work = lock(&given).take();
        let Some(work) = work else { return };
        let value = work();
        let mut answer = lock(&theirs);
        answer.value = Some(value);
        if let Some(waker) = answer.waker.take() {
            waker.wake();
        }
    };
    if std::thread::Builder::new().name("nvme_system".into()).spawn(run).is_err() {
        let work = lock(&work).take();
        lock(&answer).value = work.map(|work| work());
    }
    Box::pin(std::future::poll_fn(move |cx| {
        let mut answer = lock(&answer);
        match answer.value.take() {
            Some(value) => Poll::Ready(value),
            None => {
                answer.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }))
}
