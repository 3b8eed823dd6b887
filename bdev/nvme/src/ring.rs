//! A submission queue and its completion queue in memory (NVMe Base 2.0 section 3.3, PCIe Transport 1.0 section 3.1.2):
//! entries, phase tag, doorbells, shadow doorbells. No commands, no states.
//!
//! Invariant: at most `depth - 1` commands are outstanding; the caller has no more slots than that, so the submission queue is
//! never full and a completion always finds room.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use cryptfold_nvmf_spec::{Cqe, Sqe};

use crate::bus::{Bus, BusError, doorbell};
use crate::dma::DmaBuf;

const SQE_BYTES: usize = 64;
const CQE_BYTES: usize = 16;

/// Most entries of a queue whose memory is one piece of the arena.
const MAX_DEPTH: u16 = 4096;

/// Memory of a queue pair that the controller does not use yet.
pub(crate) struct RingMemory {
    sq: DmaBuf,
    cq: DmaBuf,
    depth: u16,
}

impl RingMemory {
    /// Queues of `depth` entries (2 to 4096).
    pub fn new(bus: &dyn Bus, depth: u16) -> Result<RingMemory, BusError> {
        let depth = depth.clamp(2, MAX_DEPTH);
        let sq = DmaBuf::zeroed(bus, usize::from(depth) * SQE_BYTES)?;
        let cq = DmaBuf::zeroed(bus, usize::from(depth) * CQE_BYTES)?;
        Ok(RingMemory { sq, cq, depth })
    }

    pub fn depth(&self) -> u16 {
        self.depth
    }

    /// Bus addresses of the submission and the completion queue.
    pub fn addresses(&self) -> [u64; 2] {
        [self.sq.iova(), self.cq.iova()]
    }
}

/// The two pages of the shadow doorbell protocol (NVMe Base 2.0 section 5.8 and annex B.5).
pub(crate) struct Shadow {
    /// Doorbell values, where the controller may read them.
    pub values: DmaBuf,
    /// From the controller: up to which value it need not be told.
    pub event_indices: DmaBuf,
}

impl Shadow {
    pub fn share(&self) -> Shadow {
        Shadow { values: self.values.share(), event_indices: self.event_indices.share() }
    }
}

/// A queue pair in use.
pub(crate) struct Ring {
    bus: Arc<dyn Bus>,
    memory: RingMemory,
    qid: u16,
    /// CAP.DSTRD.
    dstrd: u32,
    shadow: Option<Shadow>,
    tail: u16,
    /// Tail that the controller was last told.
    rung: u16,
    head: u16,
    /// Head that the controller was last told.
    head_rung: u16,
    /// Phase tag of new completions.
    phase: bool,
}

impl Ring {
    pub fn new(bus: Arc<dyn Bus>, memory: RingMemory, qid: u16, dstrd: u32, shadow: Option<Shadow>) -> Ring {
        Ring { bus, memory, qid, dstrd, shadow, tail: 0, rung: 0, head: 0, head_rung: 0, phase: true }
    }

    #[inline]
    fn next(&self, index: u16) -> u16 {
        if index + 1 == self.memory.depth { 0 } else { index + 1 }
    }

    /// Puts a command into the submission queue; [`Ring::ring`] tells the controller.
    #[inline]
    pub fn push(&mut self, sqe: &Sqe) {
        self.memory.sq.write(usize::from(self.tail) * SQE_BYTES, sqe);
        self.tail = self.next(self.tail);
    }

    /// Whether there are commands that the controller does not know of.
    #[inline]
    pub fn has_news(&self) -> bool {
        self.tail != self.rung
    }

    /// Tells the controller about new commands.
    #[inline]
    pub fn ring(&mut self) {
        if self.tail != self.rung {
            self.tell(false, self.rung, self.tail);
            self.rung = self.tail;
        }
    }

    /// Tells the controller about entries of the completion queue that are free again.
    #[inline]
    pub fn release(&mut self) {
        if self.head != self.head_rung {
            self.tell(true, self.head_rung, self.head);
            self.head_rung = self.head;
        }
    }

    #[inline]
    fn tell(&self, completion: bool, old: u16, new: u16) {
        // Entries before the doorbell.
        fence(Ordering::Release);
        if let Some(shadow) = &self.shadow {
            let at = (2 * usize::from(self.qid) + usize::from(completion)) * (4 << self.dstrd);
            shadow.values.store(at, u32::from(new));
            // The value must be visible before the event index is looked at, or both sides may miss each other.
            fence(Ordering::SeqCst);
            let event = shadow.event_indices.load::<u32>(at) as u16;
            // Annex B.5: only when the value passes the index.
            if new.wrapping_sub(event).wrapping_sub(1) >= new.wrapping_sub(old) {
                return;
            }
        }
        self.bus.write32(doorbell(self.qid, completion, self.dstrd), new.into());
    }

    /// Whether a completion is there.
    #[inline]
    pub fn is_ready(&self) -> bool {
        let word = self.memory.cq.load::<u32>(usize::from(self.head) * CQE_BYTES + 12);
        (u32::from_le(word) >> 16 & 1 != 0) == self.phase
    }

    /// Takes the next completion.
    #[inline]
    pub fn pop(&mut self) -> Option<Cqe> {
        if !self.is_ready() {
            return None;
        }
        // The phase tag before the rest of the entry.
        fence(Ordering::Acquire);
        let cqe = self.memory.cq.read(usize::from(self.head) * CQE_BYTES);
        self.head = self.next(self.head);
        if self.head == 0 {
            self.phase = !self.phase;
        }
        Some(cqe)
    }
}
