//! Waiting tasks in order. Slots are reused: waiting allocates nothing in steady state.
//!
//! Invariant: `order` lists exactly the slots that are `Waiting`, oldest first.

use std::collections::VecDeque;
use std::task::Waker;

enum Slot {
    Free,
    Waiting(Waker, usize),
    Granted(usize),
}

#[derive(Default)]
pub(super) struct WaitList {
    slots: Vec<Slot>,
    free: Vec<u32>,
    order: VecDeque<u32>,
}

/// What became of a waiter that left.
pub(super) enum Left {
    /// It still waited; its waker, to drop outside of borrows.
    Waiting { _waker: Waker },
    /// It had been granted this much and never took it.
    Granted(usize),
}

impl WaitList {
    /// Queues a waiter that wants `amount`.
    pub(super) fn join(&mut self, waker: Waker, amount: usize) -> u32 {
        let slot = Slot::Waiting(waker, amount);
        let key = match self.free.pop() {
            Some(key) => {
                self.slots[key as usize] = slot;
                key
            }
            None => {
                self.slots.push(slot);
                self.slots.len() as u32 - 1
            }
        };
        self.order.push_back(key);
        key
    }

    /// True, and the place is free again, when the waiter was granted; otherwise remembers `waker`.
    pub(super) fn poll(&mut self, key: u32, waker: &Waker) -> bool {
        match &mut self.slots[key as usize] {
            Slot::Waiting(old, _) => {
                if !old.will_wake(waker) {
                    *old = waker.clone();
                }
                false
            }
            _ => {
                self.vacate(key);
                true
            }
        }
    }

    /// What the oldest waiter wants.
    pub(super) fn wanted(&self) -> Option<usize> {
        match self.slots[*self.order.front()? as usize] {
            Slot::Waiting(_, amount) => Some(amount),
            _ => None,
        }
    }

    /// Grants the oldest waiter what it wants; wake it outside of borrows.
    pub(super) fn grant(&mut self) -> Option<Waker> {
        let key = self.order.pop_front()?;
        let slot = &mut self.slots[key as usize];
        let amount = if let Slot::Waiting(_, amount) = slot { *amount } else { 0 };
        match std::mem::replace(slot, Slot::Granted(amount)) {
            Slot::Waiting(waker, _) => Some(waker),
            _ => None,
        }
    }

    /// A waiter is dropped.
    pub(super) fn leave(&mut self, key: u32) -> Left {
        match self.vacate(key) {
            Slot::Waiting(waker, _) => {
                self.order.retain(|&other| other != key);
                Left::Waiting { _waker: waker }
            }
            Slot::Granted(amount) => Left::Granted(amount),
            Slot::Free => Left::Granted(0),
        }
    }

    fn vacate(&mut self, key: u32) -> Slot {
        self.free.push(key);
        std::mem::replace(&mut self.slots[key as usize], Slot::Free)
    }
}
