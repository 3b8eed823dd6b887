//! The command slots of a queue: one per command that the host may have outstanding, found by identifier or tag.
//!
//! Invariants: a slot is on the free list exactly when its phase is `Free`; a command identifier is marked as used
//! exactly while a tracked slot carries it. A slot's index is its transfer tag.

use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::trace;
use cryptfold_nvmf_spec::pdu::Digest;
use cryptfold_nvmf_spec::{Cid, Sqe, Status};
use cryptfold_reactor::Nanos;
use cryptfold_reactor::memory::Buf;

use crate::io::Plan;
use crate::later::Later;
use crate::subsystem::NsChannel;

/// What a slot's command is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing: no command.
    Free,
    /// The rest of its in-capsule data.
    Capsule,
    /// Its turn: memory for its data.
    Waiting,
    /// Data that was asked for.
    HostData,
    /// The other half of its fused operation.
    Fused,
    /// A device, a task or another core.
    Executing,
    /// An event (Asynchronous Event Request).
    Event,
}

/// A command and what it needs while it is here.
pub struct Slot {
    /// Where it is.
    pub phase: Phase,
    /// Counts the commands of this slot, so that a late answer does not reach the next one.
    pub generation: u32,
    /// The entry as received.
    pub sqe: Sqe,
    /// Whether its identifier is marked as used (a duplicate's is not).
    pub tracked: bool,
    /// Set when the command has failed already but its data has still to be taken.
    pub failed: Option<Status>,
    /// Data from the host.
    pub data: Buf,
    /// Bytes of `data` that have arrived.
    pub received: u32,
    /// Digest of the current PDU's data.
    pub digest: Digest,
    /// Bytes of `data` that were asked for.
    pub asked_bytes: u32,
    /// R2Ts that are not answered.
    pub r2ts: u32,
    /// Memory that the command counts for, bytes.
    pub charged: u32,
    /// When the host was asked for data, or left a half of a fused operation to wait for the other.
    pub asked: Nanos,
    /// For tracing: when the stage began that the command is in.
    pub begun: trace::Begun,
    /// What an I/O command amounts to.
    pub plan: Option<Plan>,
    /// The namespace it works on.
    pub channel: Option<Rc<NsChannel>>,
    /// First half of a fused operation: the slot of the second, and the other way round.
    pub partner: Option<u16>,
    /// Its task is to end as soon as it can.
    pub cancelled: bool,
    /// Another host has preempted this one's reservation, and its commands with it.
    pub preempted: bool,
    /// Commands that complete when this one is gone.
    pub waited_for: Vec<Arc<Later>>,
}

impl Slot {
    fn new() -> Slot {
        Slot {
            phase: Phase::Free,
            generation: 0,
            sqe: Sqe::default(),
            tracked: false,
            failed: None,
            data: Buf::empty(),
            received: 0,
            asked_bytes: 0,
            r2ts: 0,
            charged: 0,
            digest: Digest::new(),
            asked: Nanos(0),
            begun: trace::Begun::default(),
            plan: None,
            channel: None,
            partner: None,
            cancelled: false,
            preempted: false,
            waited_for: Vec::new(),
        }
    }
}

/// All slots of a queue.
pub struct Slots {
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Memory that all commands count for, bytes.
    held_bytes: u64,
    /// One bit per command identifier.
    cids: Box<[u64; 1024]>,
}

impl Slots {
    /// `count` free slots (1..=65,535).
    pub fn new(count: u16) -> Slots {
        let mut slots =
            Slots { slots: Vec::new(), free: Vec::new(), held_bytes: 0, cids: Box::new([0; 1024]) };
        slots.grow(count);
        slots
    }

    /// Makes it `count` slots; never fewer than before.
    pub fn grow(&mut self, count: u16) {
        let old = self.slots.len() as u16;
        self.slots.resize_with(usize::from(count.max(old)), Slot::new);
        self.free.extend((old..count).rev());
    }

    /// A slot for this command. `None`: the host has sent more commands than the queue has entries.
    pub fn take(&mut self, sqe: &Sqe, phase: Phase) -> Option<u16> {
        let index = self.free.pop()?;
        let tracked = self.mark(sqe.cid());
        let slot = &mut self.slots[usize::from(index)];
        slot.phase = phase;
        slot.generation = slot.generation.wrapping_add(1);
        slot.sqe = *sqe;
        slot.digest = Digest::new();
        slot.begun = trace::begin();
        slot.tracked = tracked;
        Some(index)
    }

    /// The command holds so much memory until its slot is released.
    pub fn charge(&mut self, index: u16, bytes: u32) {
        let slot = &mut self.slots[usize::from(index)];
        self.held_bytes -= u64::from(std::mem::replace(&mut slot.charged, bytes));
        self.held_bytes += u64::from(bytes);
    }

    /// Memory that all commands hold, bytes.
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Frees a slot and everything it holds.
    pub fn release(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        assert!(slot.phase != Phase::Free, "slot {index} is released twice");
        slot.phase = Phase::Free;
        slot.failed = None;
        slot.received = 0;
        slot.asked_bytes = 0;
        slot.r2ts = 0;
        self.held_bytes -= u64::from(std::mem::take(&mut slot.charged));
        slot.plan = None;
        slot.channel = None;
        slot.partner = None;
        slot.cancelled = false;
        slot.preempted = false;
        slot.waited_for.clear();
        if !slot.data.is_empty() {
            slot.data = Buf::empty();
        }
        if std::mem::take(&mut slot.tracked) {
            let cid = usize::from(slot.sqe.cid().0);
            self.cids[cid / 64] &= !(1 << (cid % 64));
        }
        self.free.push(index);
    }

    fn mark(&mut self, cid: Cid) -> bool {
        let (word, bit) = (usize::from(cid.0) / 64, 1 << (cid.0 % 64));
        let fresh = self.cids[word] & bit == 0;
        self.cids[word] |= bit;
        fresh
    }

    /// The slot with this index, if there is one (a tag from the wire may be anything).
    pub fn get_mut(&mut self, index: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(index))
    }

    /// The slot of a tracked command with this identifier.
    pub fn find(&self, cid: Cid) -> Option<u16> {
        let found = |s: &Slot| s.phase != Phase::Free && s.tracked && s.sqe.cid() == cid;
        self.slots.iter().position(found).map(|i| i as u16)
    }

    /// Indices of all slots with a command.
    pub fn busy(&self) -> Vec<u16> {
        (0..self.slots.len() as u16).filter(|i| self.slots[usize::from(*i)].phase != Phase::Free).collect()
    }
}

impl std::ops::Index<u16> for Slots {
    type Output = Slot;
    fn index(&self, index: u16) -> &Slot {
        &self.slots[usize::from(index)]
    }
}

impl std::ops::IndexMut<u16> for Slots {
    fn index_mut(&mut self, index: u16) -> &mut Slot {
        &mut self.slots[usize::from(index)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cryptfold_nvmf_spec::Nsid;
    use cryptfold_nvmf_spec::opcode::Io;

    #[test]
    fn duplicates_are_seen_and_identifiers_come_back() {
        let read = |cid| Sqe::io(Io::Read, Cid(cid), Nsid(1));
        let mut s = Slots::new(2);
        s.grow(3);
        let a = s.take(&read(65535), Phase::Executing).expect("three are free");
        let b = s.take(&read(65535), Phase::Executing).expect("two are free");
        assert!(s[a].tracked && !s[b].tracked);
        s.release(b);
        assert_eq!(s.find(Cid(65535)), Some(a), "releasing the duplicate leaves the first");
        let before = s[a].generation;
        s.release(a);
        assert_eq!((s.find(Cid(65535)), s.busy().len()), (None, 0));
        let all: Vec<_> = (0..3).map(|i| s.take(&read(i), Phase::Executing)).collect();
        assert!(all.iter().all(Option::is_some) && s.take(&read(9), Phase::Executing).is_none());
        assert!(s.busy().iter().all(|i| s[*i].tracked) && s[a].generation != before);
    }
}
