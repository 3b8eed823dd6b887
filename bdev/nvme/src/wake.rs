//! Sleeping reactors: a vector's eventfd in the reactor's ring. One of the crate's three modules with unsafe code.

use std::cell::{Cell, OnceCell};
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_reactor::{SleepVerdict, ring};
use io_uring::{opcode, types};

use crate::bus::{Bus, Interrupt};

/// Arms a vector before its reactor sleeps.
pub(crate) struct Doze {
    bus: Arc<dyn Bus>,
    vector: Interrupt,
    enabled: OnceCell<bool>,
    alarm: OnceCell<Rc<Alarm>>,
}

struct Alarm {
    armed: Cell<bool>,
    guard: OnceCell<ring::ClientGuard>,
    /// Keeps the eventfd open while the kernel polls it.
    _bus: Arc<dyn Bus>,
}

impl ring::RingClient for Alarm {
    fn complete(&self, _token: u32, _result: i32, _flags: u32) {
        self.armed.set(false);
    }
}

impl Doze {
    /// `wanted`: whether queues were made with interrupts.
    pub fn new(bus: Arc<dyn Bus>, vector: u16, wanted: bool) -> Doze {
        let vector = match bus.interrupt(vector) {
            Interrupt::Eventfd(_) if !wanted => Interrupt::None,
            other => other,
        };
        Doze { bus, vector, enabled: OnceCell::new(), alarm: OnceCell::new() }
    }

    /// Takes part in the reactor's ring, if there is something to wait for.
    pub fn register(&self) {
        if !matches!(self.vector, Interrupt::Eventfd(_)) {
            return;
        }
        let alarm =
            Rc::new(Alarm { armed: Cell::new(false), guard: OnceCell::new(), _bus: self.bus.clone() });
        if let Ok(guard) = ring::register(alarm.clone()) {
            let _ = alarm.guard.set(guard);
            let _ = self.alarm.set(alarm);
        }
    }

    /// Nobody waits for the vector any more.
    pub fn stop(&self) {
        if let Some(alarm) = self.alarm.get()
            && alarm.armed.get()
            && let Some(guard) = alarm.guard.get()
        {
            guard.cancel(0);
        }
    }

    /// Whether the reactor may sleep; `work` looks whether there is some.
    pub fn prepare(&self, work: impl Fn() -> bool) -> SleepVerdict {
        let (fd, alarm) = match (self.vector, self.alarm.get()) {
            (Interrupt::Simulated, _) if !work() => return SleepVerdict::MaySleep,
            (Interrupt::Eventfd(fd), Some(alarm)) => (fd, alarm),
            _ => return SleepVerdict::KeepPolling,
        };
        // On since the queues were made, unless the system refused.
        if !*self.enabled.get_or_init(|| self.bus.enable_interrupts().is_ok()) {
            return SleepVerdict::KeepPolling;
        }
        if !alarm.armed.get() {
            // What was signalled so far is seen by the look that follows.
            drain(fd);
        }
        if work() {
            return SleepVerdict::KeepPolling;
        }
        if !alarm.armed.replace(true)
            && let Some(guard) = alarm.guard.get()
        {
            let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).build();
            // SAFETY: names no memory; the descriptor is the bus's, which the client keeps.
            unsafe { guard.submit(0, poll) };
        }
        SleepVerdict::MaySleep
    }
}

fn drain(fd: RawFd) {
    let mut count = [0u8; 8];
    // SAFETY: reads at most eight bytes into a live buffer; the descriptor does not block.
    unsafe { libc::read(fd, count.as_mut_ptr().cast(), count.len()) };
}
