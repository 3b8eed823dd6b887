//! Which command identifiers are in use, and for what.
//!
//! A CID is a slot's index in its lower 12 bits and the slot's round in the upper 4, so that an answer to a command that
//! is over does not pass for one to its successor. The largest index is 4094: FFFFh is never a CID.

use cryptfold_bdev::Io;
use cryptfold_nvmf_spec as spec;
use cryptfold_reactor::memory::SgList;
use cryptfold_reactor::sync::oneshot;
use spec::{Cid, Cqe, Status};

use crate::CloseReason;

const INDEX_BITS: u16 = 12;
const INDEX_MASK: u16 = (1 << INDEX_BITS) - 1;
/// Slots of a connection at most.
pub(crate) const MAX_SLOTS: usize = INDEX_MASK as usize;

/// The end of a command that is no I/O.
pub(crate) struct Reply {
    pub cqe: Cqe,
    /// What was received; shorter than asked for if the target sent less.
    pub data: SgList,
}

pub(crate) type ReplySender = oneshot::Sender<Result<Reply, CloseReason>>;

/// Who gets the answer.
#[derive(Default)]
pub(crate) enum Owner {
    /// The slot is free.
    #[default]
    Nobody,
    Io(Box<Io>),
    Call(ReplySender),
    /// Second half of a fused pair, whose I/O is in this slot.
    Half(usize),
}

/// A command under way. Lengths and offsets in bytes of the command's data.
#[derive(Default)]
pub(crate) struct Slot {
    round: u16,
    pub owner: Owner,
    /// Answered, but kept for the other half.
    pub answered: bool,
    /// Commands of this slot's owner without answer.
    pub pending: u8,
    /// First failure of a fused pair.
    pub status: Status,
    /// To be received, and received so far.
    pub incoming: u32,
    pub received: u32,
    /// A data digest was wrong, or data could not be placed.
    pub damaged: bool,
    /// Where a call's data goes.
    pub buf: SgList,
    /// To be sent when asked for, and asked for so far.
    pub out: SgList,
    pub outgoing: u32,
    pub granted: u32,
    /// Tick of submission; commands that wait for events have none.
    pub born: Option<u32>,
}

impl Slot {
    /// Where received data goes.
    pub fn destination(&mut self) -> &mut SgList {
        match &mut self.owner {
            Owner::Io(io) => &mut io.data,
            _ => &mut self.buf,
        }
    }
}

/// The slots of one connection.
pub(crate) struct Slots {
    slots: Box<[Slot]>,
    free: Vec<u16>,
}

impl Slots {
    /// `count` is 1 to [`MAX_SLOTS`].
    pub fn new(count: usize) -> Slots {
        let count = count.clamp(1, MAX_SLOTS);
        Slots {
            slots: (0..count).map(|_| Slot::default()).collect(),
            free: (0..count as u16).rev().collect(),
        }
    }

    pub fn available(&self) -> usize {
        self.free.len()
    }

    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub fn get(&mut self, index: usize) -> &mut Slot {
        &mut self.slots[index]
    }

    /// A free slot for this owner, and its CID.
    pub fn take(&mut self, owner: Owner, born: Option<u32>) -> Option<(usize, Cid)> {
        let index = self.free.pop()?;
        let slot = &mut self.slots[usize::from(index)];
        slot.owner = owner;
        slot.born = born;
        slot.pending = 1;
        Some((usize::from(index), Cid(slot.round << INDEX_BITS | index)))
    }

    /// The slot of a command that waits for its answer.
    pub fn find(&self, cid: Cid) -> Option<usize> {
        let slot = self.slots.get(usize::from(cid.0 & INDEX_MASK))?;
        let live = slot.round == cid.0 >> INDEX_BITS && !matches!(slot.owner, Owner::Nobody);
        (live && !slot.answered).then_some(usize::from(cid.0 & INDEX_MASK))
    }

    /// Takes the owner out and frees the slot.
    pub fn release(&mut self, index: usize) -> Slot {
        let next =
            Slot { round: (self.slots[index].round + 1) & (u16::MAX >> INDEX_BITS), ..Slot::default() };
        self.free.push(index as u16);
        std::mem::replace(&mut self.slots[index], next)
    }

    /// Frees all slots and gives their contents back.
    pub fn release_all(&mut self) -> Vec<Slot> {
        let busy = |s: &Slot| !matches!(s.owner, Owner::Nobody);
        let all: Vec<usize> = (0..self.slots.len()).filter(|i| busy(&self.slots[*i])).collect();
        all.into_iter().map(|i| self.release(i)).collect()
    }

    /// Whether a command was submitted more than `limit` ticks ago.
    pub fn overdue(&self, now: u32, limit: u32) -> bool {
        self.slots
            .iter()
            .any(|s| !matches!(s.owner, Owner::Nobody) && s.born.is_some_and(|b| now.wrapping_sub(b) > limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_answer_finds_nobody() {
        let mut slots = Slots::new(2);
        let (a, first) = slots.take(Owner::Half(0), None).expect("free");
        assert_eq!(slots.find(first), Some(a));
        slots.release(a);
        assert_eq!(slots.find(first), None);
        let (_, second) = slots.take(Owner::Half(0), None).expect("free");
        assert_ne!(first, second);
        assert_eq!((slots.find(first), slots.find(second)), (None, Some(a)));
        assert_eq!(slots.find(Cid(0xfff)), None);
    }

    #[test]
    fn no_cid_is_ffff() {
        let mut slots = Slots::new(usize::MAX);
        for _ in 0..16 {
            while let Some((_, cid)) = slots.take(Owner::Half(0), None) {
                assert_ne!(cid.0, 0xffff);
            }
            assert_eq!(slots.release_all().len(), MAX_SLOTS);
        }
    }

    #[test]
    fn overdue_commands_are_found() {
        let mut slots = Slots::new(4);
        slots.take(Owner::Half(0), None);
        assert!(!slots.overdue(1000, 1));
        slots.take(Owner::Half(0), Some(u32::MAX));
        assert!(!slots.overdue(0, 1) && slots.overdue(1, 1));
    }
}
