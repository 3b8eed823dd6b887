//! Queues of the simulated controller: where they are, how far they are.

use std::collections::VecDeque;

use cryptfold_nvmf_spec::{Cqe, Sqe};
use zerocopy::little_endian::U16;
use zerocopy::{FromZeros, IntoBytes};

use crate::dma::Seen;

/// A submission queue.
#[derive(Clone, Debug)]
pub(super) struct SubmissionQueue {
    pub address: u64,
    pub depth: u16,
    pub cqid: u16,
    pub head: u16,
    pub tail: u16,
}

impl SubmissionQueue {
    /// The next command, if the tail is ahead. `Err`: it can not be read.
    pub fn fetch(&mut self, memory: &Seen) -> Option<Result<Sqe, ()>> {
        if self.head == self.tail {
            return None;
        }
        let mut sqe = Sqe::new_zeroed();
        let read = memory.read(self.address + u64::from(self.head) * 64, sqe.as_mut_bytes());
        self.head = (self.head + 1) % self.depth;
        Some(if read { Ok(sqe) } else { Err(()) })
    }
}

/// A completion queue, and what waits for room in it.
#[derive(Debug)]
pub(super) struct CompletionQueue {
    pub address: u64,
    pub depth: u16,
    pub tail: u16,
    pub head: u16,
    pub phase: bool,
    pub waiting: VecDeque<Cqe>,
}

impl CompletionQueue {
    pub fn new(address: u64, depth: u16) -> CompletionQueue {
        CompletionQueue { address, depth, tail: 0, head: 0, phase: true, waiting: VecDeque::new() }
    }

    /// Posts what fits. False: the queue's memory is not there.
    pub fn post(&mut self, memory: &Seen) -> bool {
        while (self.tail + 1) % self.depth != self.head {
            let Some(mut cqe) = self.waiting.pop_front() else { break };
            cqe.status = U16::new(cqe.status.get() & !1 | u16::from(self.phase));
            if !memory.write(self.address + u64::from(self.tail) * 16, cqe.as_bytes()) {
                return false;
            }
            self.tail = (self.tail + 1) % self.depth;
            if self.tail == 0 {
                self.phase = !self.phase;
            }
        }
        true
    }
}
