//! Fused Compare and Write: two commands, next to each other in the queue, executed as one (NVMe Base 2.0 section 3.4.2).

use std::time::Duration;

use cryptfold_nvmf_spec::opcode::Io;
use cryptfold_nvmf_spec::sqe::Fuse;
use cryptfold_nvmf_spec::{Sqe, Status};
use cryptfold_reactor::Nanos;

use super::slot::Phase;
use super::transfer::Transfer;
use super::{Conn, Inner};

/// What the last command leaves to the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fused {
    /// It was no first half.
    None,
    /// A first half, in this slot.
    First(u16),
    /// A first half that has failed already.
    Failed,
}

/// Whether both halves work on the same blocks of the same namespace.
fn same_range(a: &Sqe, b: &Sqe) -> bool {
    (a.nsid(), a.slba(), a.block_count()) == (b.nsid(), b.slba(), b.block_count())
}

impl Conn {
    /// Puts the halves of a fused operation together as they arrive; a first half without its second fails. Returns what
    /// becomes of the new command.
    pub(super) fn pair_up(
        &self,
        inner: &mut Inner,
        index: u16,
        admitted: Result<Transfer, Status>,
    ) -> Result<Transfer, Status> {
        let before = std::mem::replace(&mut inner.fused, Fused::None);
        let sqe = inner.slots[index].sqe;
        if sqe.fuse() == Fuse::Second {
            return self.second_half(inner, index, before, admitted);
        }
        if let Fused::First(first) = before {
            self.fail(inner, first, Status::ABORTED_MISSING_FUSED);
        }
        match sqe.fuse() {
            Fuse::None => admitted,
            Fuse::First if inner.slots[index].plan.is_some() && sqe.opcode == Io::Compare as u8 => {
                inner.fused = if admitted.is_ok() { Fused::First(index) } else { Fused::Failed };
                admitted
            }
            // Only Compare and Write can be fused, and only on I/O queues.
            _ => {
                inner.fused = Fused::Failed;
                admitted.and(Err(Status::INVALID_FIELD.with_dnr()))
            }
        }
    }

    fn second_half(
        &self,
        inner: &mut Inner,
        index: u16,
        before: Fused,
        admitted: Result<Transfer, Status>,
    ) -> Result<Transfer, Status> {
        let first = match before {
            Fused::None => return admitted.and(Err(Status::ABORTED_MISSING_FUSED)),
            Fused::Failed => return Err(Status::ABORTED_FAILED_FUSED),
            Fused::First(first) => first,
        };
        let (a, b) = (&inner.slots[first].sqe, &inner.slots[index].sqe);
        let legal = b.opcode == Io::Write as u8 && same_range(a, b);
        let admitted = if legal { admitted } else { admitted.and(Err(Status::INVALID_FIELD.with_dnr())) };
        if admitted.is_ok() {
            inner.slots[first].partner = Some(index);
            inner.slots[index].partner = Some(first);
        } else {
            self.fail(inner, first, Status::ABORTED_FAILED_FUSED);
        }
        admitted
    }

    /// A first half whose second one does not come fails: it holds its namespace.
    pub(super) fn fused_overdue(&self, inner: &mut Inner, now: Nanos, limit: Duration) {
        if let Fused::First(first) = inner.fused {
            let slot = &inner.slots[first];
            if slot.phase == Phase::Fused && now.since(slot.asked) > limit {
                self.unpair(inner, first);
                self.fail(inner, first, Status::ABORTED_MISSING_FUSED);
            }
        }
    }

    /// Ends a command that is not executed yet; if the host still sends its data, after that.
    pub(super) fn fail(&self, inner: &mut Inner, index: u16, status: Status) {
        match inner.slots[index].phase {
            Phase::Waiting => {
                inner.waiting.retain(|s| *s != index);
                self.complete(inner, index, status, 0);
            }
            Phase::Fused => self.complete(inner, index, status, 0),
            Phase::Capsule | Phase::HostData => inner.slots[index].failed = Some(status),
            Phase::Free | Phase::Executing | Phase::Event => {}
        }
    }

    /// A half has failed before it was executed: the other one fails with it.
    pub(super) fn unpair(&self, inner: &mut Inner, index: u16) {
        if inner.fused == Fused::First(index) {
            inner.fused = Fused::Failed;
        }
        if let Some(other) = inner.slots[index].partner.take() {
            inner.slots[other].partner = None;
            self.fail(inner, other, Status::ABORTED_FAILED_FUSED);
        }
    }
}
