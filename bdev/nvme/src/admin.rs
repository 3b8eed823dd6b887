//! The admin queue, on the controller's home reactor: commands as futures.
//!
//! Invariant: memory that a command names stays here until the controller has completed it, has been disabled or is gone, also
//! when whoever waited has given up.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_nvmf_spec::opcode::Admin as Opcode;
use cryptfold_nvmf_spec::sqe::Psdt;
use cryptfold_nvmf_spec::{Cqe, Sgl, Sqe, Status};
use cryptfold_reactor as reactor;
use reactor::sync::{Notify, oneshot};
use reactor::{Poller, SleepVerdict};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros};

use crate::bus::{Bus, BusError};
use crate::dma::DmaBuf;
use crate::ring::Ring;
use crate::wake::Doze;

/// Entries of the admin queues.
pub(crate) const DEPTH: u16 = 32;
const SLOT_BITS: u32 = 8;

/// How an admin command can fail.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AdminError {
    /// The controller refused it.
    #[error("{what}: {status}")]
    Status {
        /// The command.
        what: &'static str,
        /// The verdict.
        status: Status,
    },
    /// No answer in time.
    #[error("{what}: no answer within {seconds} s")]
    Timeout {
        /// The command.
        what: &'static str,
        /// The limit.
        seconds: f32,
    },
    /// The controller is being reset or is gone.
    #[error("{what}: the controller is being reset or is gone")]
    Gone {
        /// The command.
        what: &'static str,
    },
    /// Memory for it can not be shared.
    #[error(transparent)]
    Memory(#[from] BusError),
}

struct Slot {
    cid: u16,
    busy: bool,
    waiter: Option<oneshot::Sender<(Cqe, Option<DmaBuf>)>>,
    data: Option<DmaBuf>,
}

struct Inner {
    ring: Option<Ring>,
    slots: Vec<Slot>,
}

pub(crate) struct AdminQueue {
    bus: Arc<dyn Bus>,
    inner: RefCell<Inner>,
    freed: Notify,
    doze: Doze,
    /// Completions that nobody waits for.
    pub bogus: Cell<u64>,
    /// A command that was not answered in time: it keeps its slot and its memory until the controller is reset.
    pub stuck: Cell<Option<&'static str>>,
}

impl AdminQueue {
    pub fn new(bus: Arc<dyn Bus>, interrupts: bool) -> Rc<AdminQueue> {
        let empty = |_| Slot { cid: 0, busy: false, waiter: None, data: None };
        let slots = (0..DEPTH - 1).map(empty).collect();
        let doze = Doze::new(bus.clone(), 0, interrupts);
        let inner = RefCell::new(Inner { ring: None, slots });
        let (freed, bogus, stuck) = (Notify::new(), Cell::new(0), Cell::new(None));
        let queue = Rc::new(AdminQueue { bus, inner, freed, doze, bogus, stuck });
        queue.doze.register();
        queue
    }

    /// The controller is enabled with these queues.
    pub fn open(&self, ring: Ring) {
        self.inner.borrow_mut().ring = Some(ring);
    }

    /// The controller is disabled or gone: whoever waits learns it, memory is ours again.
    pub fn close(&self) {
        let mut inner = self.inner.borrow_mut();
        inner.ring = None;
        for slot in &mut inner.slots {
            (slot.busy, slot.waiter, slot.data) = (false, None, None);
        }
        drop(inner);
        self.stuck.set(None);
        self.freed.notify_waiters();
    }

    /// The queue is used no more.
    pub fn end(&self) {
        self.close();
        self.doze.stop();
    }

    /// A buffer for a command's data.
    pub fn buffer(&self, bytes: usize) -> Result<DmaBuf, AdminError> {
        Ok(DmaBuf::zeroed(&*self.bus, bytes)?)
    }

    /// What did not end in time.
    fn timeout(&self, what: &'static str, limit: Duration) -> AdminError {
        self.stuck.set(Some(what));
        AdminError::Timeout { what, seconds: limit.as_secs_f32() }
    }

    /// Waits for a slot.
    async fn slot(&self, what: &'static str) -> Result<usize, AdminError> {
        loop {
            if let Some(index) = self.free_slot(what)? {
                return Ok(index);
            }
            self.freed.notified().await;
        }
    }

    /// A slot, if one is free.
    fn free_slot(&self, what: &'static str) -> Result<Option<usize>, AdminError> {
        let inner = self.inner.borrow();
        match inner.ring {
            Some(_) => Ok(inner.slots.iter().position(|s| !s.busy)),
            None => Err(AdminError::Gone { what }),
        }
    }

    /// Sends a command and waits for its completion. `limit`: none for what may take for ever.
    pub async fn run(
        &self,
        what: &'static str,
        mut sqe: Sqe,
        data: Option<DmaBuf>,
        limit: Option<Duration>,
    ) -> Result<(Cqe, Option<DmaBuf>), AdminError> {
        if let Some(data) = &data {
            sqe.set_psdt(Psdt::Prp);
            sqe.sgl = Sgl::from_prps(data.iova(), 0);
        }
        let (sender, receiver) = oneshot::channel();
        let index = match limit {
            Some(limit) => {
                reactor::timeout(limit, self.slot(what)).await.map_err(|_| self.timeout(what, limit))?
            }
            None => self.slot(what).await,
        }?;
        {
            let mut inner = self.inner.borrow_mut();
            let slot = &mut inner.slots[index];
            slot.cid = (slot.cid >> SLOT_BITS).wrapping_add(1) << SLOT_BITS | index as u16;
            (slot.busy, slot.waiter, slot.data) = (true, Some(sender), data);
            sqe.cid = U16::new(slot.cid);
            let Some(ring) = &mut inner.ring else { return Err(AdminError::Gone { what }) };
            ring.push(&sqe);
            ring.ring();
        }
        let answer = match limit {
            Some(limit) => match reactor::timeout(limit, receiver).await {
                Ok(answer) => answer,
                Err(_) => return Err(self.timeout(what, limit)),
            },
            None => receiver.await,
        };
        let (cqe, data) = answer.map_err(|_| AdminError::Gone { what })?;
        match cqe.status() {
            status if status.is_success() => Ok((cqe, data)),
            status => Err(AdminError::Status { what, status }),
        }
    }

    /// Runs an Identify (NVMe Base 2.0 section 5.17).
    pub async fn identify<T: FromBytes + FromZeros>(
        &self,
        what: &'static str,
        cns: cryptfold_nvmf_spec::identify::Cns,
        nsid: u32,
        limit: Duration,
    ) -> Result<Box<T>, AdminError> {
        let mut sqe = Sqe::new(Opcode::Identify as u8);
        sqe.nsid = U32::new(nsid);
        sqe.cdw10 = U32::new(cns as u32);
        let data = self.buffer(4096)?;
        let (_, data) = self.run(what, sqe, Some(data), Some(limit)).await?;
        let data = data.ok_or(AdminError::Gone { what })?;
        Ok(Box::new(data.read(0)))
    }
}

impl Poller for AdminQueue {
    fn poll(&self) -> bool {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let Some(ring) = &mut inner.ring else { return false };
        let mut worked = false;
        // No more in a turn than there can be, whatever the controller does.
        for _ in 0..DEPTH {
            let Some(cqe) = ring.pop() else { break };
            worked = true;
            let index = usize::from(cqe.cid().0 & ((1 << SLOT_BITS) - 1));
            match inner.slots.get_mut(index) {
                Some(slot) if slot.busy && slot.cid == cqe.cid().0 => {
                    slot.busy = false;
                    let data = slot.data.take();
                    if let Some(waiter) = slot.waiter.take() {
                        // One that has given up needs no answer.
                        let _ = waiter.send((cqe, data));
                    }
                    self.freed.notify_one();
                }
                _ => self.bogus.set(self.bogus.get() + 1),
            }
        }
        if worked {
            ring.release();
        }
        worked
    }

    fn prepare_sleep(&self) -> SleepVerdict {
        if self.inner.borrow().ring.is_none() {
            return SleepVerdict::MaySleep;
        }
        self.doze.prepare(|| self.inner.borrow().ring.as_ref().is_some_and(Ring::is_ready))
    }
}
