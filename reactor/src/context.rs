//! The functions that act on the current reactor.

use crate::clock::{Nanos, machine_now};
use crate::core::{self, Deferred, Poller, PollerGuard};
use crate::handle::Handle;
use crate::random;
use crate::timer::TimerKey;
use async_task::Task;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

/// Starts a task on this core. Dropping the [`Task`] cancels it; see also [`Task::detach`].
///
/// # Panics
/// Outside of a reactor, as all functions here that say "this core".
#[track_caller]
pub fn spawn_local<F: Future + 'static>(future: F) -> Task<F::Output> {
    core::with(|core| core.spawn(future))
}

/// The reactor that runs the caller.
///
/// # Panics
/// Outside of a reactor.
#[track_caller]
pub fn current() -> Handle {
    core::with(|core| Handle(core.shared.clone()))
}

/// The reactor that runs the caller, if one does.
pub fn try_current() -> Option<Handle> {
    core::try_with(|core| Handle(core.shared.clone()))
}

/// Monotonic time: virtual in the simulator, the machine's everywhere else, also outside of reactors.
#[inline]
pub fn now() -> Nanos {
    let now = core::try_with(|core| core.now()).unwrap_or_else(machine_now);
    RECENT.set(now.0);
    now
}

/// What this thread's last [`now`] was: for who is called by somebody that has just looked at the clock.
#[inline]
pub fn recent() -> Nanos {
    Nanos(RECENT.get())
}

thread_local! {
    static RECENT: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// A fast random number, not for secrets. Repeatable in the simulator.
pub fn random_u64() -> u64 {
    core::try_with(|core| core.random_u64()).unwrap_or_else(random::machine_u64)
}

/// Fills with the kernel's randomness, fit for keys, salts and nonces. Repeatable in the simulator.
pub fn fill_random(target: &mut [u8]) {
    let mut target = Some(target);
    core::try_with(|core| target.take().map(|target| core.fill_random(target)));
    target.map(random::machine_fill);
}

/// Runs `call` soon on this core, in order, never inside the caller's stack frame.
///
/// # Panics
/// Outside of a reactor.
#[inline]
#[track_caller]
pub fn defer(call: Box<dyn Deferred>) {
    core::with(|core| core.defer(call));
}

/// Has `poller` polled once per turn of this core, until the guard is dropped.
///
/// # Panics
/// Outside of a reactor.
#[track_caller]
pub fn register_poller(name: &str, poller: Rc<dyn Poller>) -> PollerGuard {
    core::with(|core| core.register_poller(name, poller))
}

/// Waits for `duration`.
pub fn sleep(duration: Duration) -> Sleep {
    sleep_until(now() + duration)
}

/// Waits until `deadline`.
pub fn sleep_until(deadline: Nanos) -> Sleep {
    Sleep { deadline, timer: None, _local: PhantomData }
}

/// See [`sleep`]. Must be polled on a reactor.
#[must_use = "futures do nothing unless awaited"]
pub struct Sleep {
    deadline: Nanos,
    /// The armed timer and the instance of the core it is on.
    timer: Option<(TimerKey, u64)>,
    _local: PhantomData<Rc<()>>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        core::with(|core| {
            if core.now() >= self.deadline {
                return Poll::Ready(());
            }
            let mut timers = core.timers().borrow_mut();
            let armed = self.timer.filter(|&(_, instance)| instance == core.shared.instance);
            let old = match armed.and_then(|(key, _)| timers.waker(key)) {
                Some(waker) if waker.will_wake(cx.waker()) => None,
                Some(waker) => Some(std::mem::replace(waker, cx.waker().clone())),
                None => {
                    let key = timers.insert(self.deadline, cx.waker().clone());
                    self.timer = Some((key, core.shared.instance));
                    None
                }
            };
            drop(timers);
            drop(old);
            Poll::Pending
        })
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let Some((key, instance)) = self.timer else { return };
        let waker = core::try_with(|core| {
            if core.shared.instance == instance { core.timers().borrow_mut().remove(key) } else { None }
        });
        drop(waker);
    }
}

/// The time of a [`timeout`] is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("timed out")]
pub struct Elapsed;

/// Runs `future` for at most `duration`; then it is dropped. A result that is there at the deadline wins.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Result<F::Output, Elapsed> {
    let mut future = pin!(future);
    let mut sleep = pin!(sleep(duration));
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Ok(value)),
        Poll::Pending => sleep.as_mut().poll(cx).map(|()| Err(Elapsed)),
    })
    .await
}

/// Lets everything else that is ready on this core run first.
pub fn yield_now() -> YieldNow {
    YieldNow(false)
}

/// See [`yield_now`].
#[must_use = "futures do nothing unless awaited"]
pub struct YieldNow(bool);

impl Future for YieldNow {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
