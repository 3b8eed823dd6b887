//! Timers of one core: a binary heap that knows where each timer is, so cancelling is exact and frees its entry at once.
//!
//! Invariants: `slots[heap[i].slot].position == i`; timers of equal deadline fire in the order of insertion.

use crate::clock::Nanos;
use std::task::Waker;

/// Names a timer until it fires or is removed; afterwards it names nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TimerKey {
    slot: u32,
    generation: u32,
}

struct Entry {
    at: Nanos,
    sequence: u64,
    slot: u32,
}

struct Slot {
    position: u32,
    generation: u32,
    waker: Option<Waker>,
}

#[derive(Default)]
pub(crate) struct Timers {
    heap: Vec<Entry>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    sequence: u64,
}

impl Timers {
    pub(crate) fn insert(&mut self, at: Nanos, waker: Waker) -> TimerKey {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { position: 0, generation: 0, waker: None });
            self.slots.len() as u32 - 1
        });
        self.slots[slot as usize].waker = Some(waker);
        self.sequence += 1;
        self.heap.push(Entry { at, sequence: self.sequence, slot });
        self.up(self.heap.len() - 1);
        TimerKey { slot, generation: self.slots[slot as usize].generation }
    }

    /// The waker to update, when the timer has not fired.
    pub(crate) fn waker(&mut self, key: TimerKey) -> Option<&mut Waker> {
        let slot = self.slots.get_mut(key.slot as usize)?;
        if slot.generation == key.generation { slot.waker.as_mut() } else { None }
    }

    /// The removed timer's waker, for the caller to drop outside of any borrow.
    pub(crate) fn remove(&mut self, key: TimerKey) -> Option<Waker> {
        self.waker(key)?;
        self.take(self.slots[key.slot as usize].position as usize)
    }

    pub(crate) fn next(&self) -> Option<Nanos> {
        self.heap.first().map(|entry| entry.at)
    }

    pub(crate) fn pop_due(&mut self, now: Nanos) -> Option<Waker> {
        if self.next()? <= now { self.take(0) } else { None }
    }

    fn take(&mut self, position: usize) -> Option<Waker> {
        let entry = self.heap.swap_remove(position);
        if position < self.heap.len() {
            self.up(position);
            self.down(self.slots[self.heap[position].slot as usize].position as usize);
        }
        let slot = &mut self.slots[entry.slot as usize];
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(entry.slot);
        slot.waker.take()
    }

    fn before(&self, a: usize, b: usize) -> bool {
        let (a, b) = (&self.heap[a], &self.heap[b]);
        (a.at, a.sequence) < (b.at, b.sequence)
    }

    fn place(&mut self, position: usize) {
        self.slots[self.heap[position].slot as usize].position = position as u32;
    }

    fn up(&mut self, mut position: usize) {
        while position > 0 && self.before(position, (position - 1) / 2) {
            self.heap.swap(position, (position - 1) / 2);
            self.place(position);
            position = (position - 1) / 2;
        }
        self.place(position);
    }

    fn down(&mut self, mut position: usize) {
        loop {
            let left = 2 * position + 1;
            if left >= self.heap.len() {
                break;
            }
            let right = left + 1;
            let child = if right < self.heap.len() && self.before(right, left) { right } else { left };
            if !self.before(child, position) {
                break;
            }
            self.heap.swap(position, child);
            self.place(position);
            position = child;
        }
        self.place(position);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Rng;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::task::Wake;

    struct Mark(u64, AtomicU64);

    impl Wake for Mark {
        fn wake(self: Arc<Self>) {
            self.1.store(1, Ordering::Relaxed);
        }
    }

    fn fire(waker: Waker, marks: &[Arc<Mark>]) -> u64 {
        waker.wake();
        let mark = marks.iter().find(|mark| mark.1.swap(0, Ordering::Relaxed) == 1);
        mark.expect("the waker marks").0
    }

    /// Against a sorted list, with removals, ties and reused slots.
    #[test]
    fn behaves_like_a_sorted_list() {
        let mut rng = Rng::new(11);
        let mut timers = Timers::default();
        let mut marks = Vec::new();
        let mut model: Vec<(Nanos, u64, TimerKey)> = Vec::new();
        let mut stale = Vec::new();
        for n in 0..5_000 {
            match rng.below(4) {
                0 | 1 => {
                    let mark = Arc::new(Mark(n, AtomicU64::new(0)));
                    let at = Nanos(rng.below(300));
                    let key = timers.insert(at, Waker::from(mark.clone()));
                    marks.push(mark);
                    model.push((at, n, key));
                    model.sort_by_key(|&(at, n, _)| (at, n));
                }
                2 if !model.is_empty() => {
                    let (_, n, key) = model.remove(rng.below(model.len() as u64) as usize);
                    assert_eq!(fire(timers.remove(key).expect("present"), &marks), n);
                    stale.push(key);
                }
                _ => {
                    let now = Nanos(rng.below(300));
                    let due = model.first().filter(|&&(at, ..)| at <= now).map(|&(_, n, key)| (n, key));
                    assert_eq!(timers.pop_due(now).map(|waker| fire(waker, &marks)), due.map(|(n, _)| n));
                    if let Some((_, key)) = due {
                        model.remove(0);
                        stale.push(key);
                    }
                }
            }
            assert_eq!(timers.next(), model.first().map(|&(at, ..)| at));
        }
        assert!(stale.len() > 1_000);
        for key in stale {
            assert!(timers.remove(key).is_none(), "a key names its timer only once");
        }
        assert!(timers.slots.len() < 3_000, "slots are reused");
    }
}
