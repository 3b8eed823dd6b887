//! A command that completes when several things are done, on whatever threads.

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use cryptfold_nvmf_spec::Status;

use crate::group::ConnRef;

/// Completes its command when the last reference to it is dropped.
pub(crate) struct Later {
    back: ConnRef,
    slot: u16,
    generation: u32,
    status: AtomicU16,
    dw0: AtomicU32,
}

impl Later {
    /// For the command in a slot of `back`, which counts it as executing until then.
    pub fn new(back: ConnRef, slot: u16, generation: u32) -> Later {
        let status = AtomicU16::new(Status::SUCCESS.0);
        Later { back, slot, generation, status, dw0: AtomicU32::new(0) }
    }

    /// It will end with this in dword 0.
    pub fn set_dw0(&self, dw0: u32) {
        self.dw0.store(dw0, Ordering::Relaxed);
    }

    /// It will end with this status.
    pub fn set(&self, status: Status) {
        self.status.store(status.0, Ordering::Relaxed);
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        let (slot, generation) = (self.slot, self.generation);
        let status = Status(*self.status.get_mut());
        let dw0 = *self.dw0.get_mut();
        self.back.send(move |conn| conn.later_done(slot, generation, status, dw0));
    }
}
