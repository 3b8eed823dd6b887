//! What can go wrong with single operations, and when.

use std::ops::Range;
use std::time::Duration;

use cryptfold_bdev::{Io, Op, Status};

/// Which operations a fault hits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct When {
    /// Kind of operation; `None` = any.
    pub op: Option<Op>,
    /// Only those that touch these bytes of the disk; `None` = any.
    pub bytes: Option<Range<u64>>,
    /// So many matching operations pass first.
    pub skip: u64,
    /// So many are hit then.
    pub hits: u64,
}

impl When {
    /// The `n`th operation (from 0) of a kind, once.
    pub fn nth(op: Op, n: u64) -> When {
        When { op: Some(op), bytes: None, skip: n, hits: 1 }
    }

    /// Every operation of a kind on these bytes.
    pub fn always(op: Op, bytes: Range<u64>) -> When {
        When { op: Some(op), bytes: Some(bytes), skip: 0, hits: u64::MAX }
    }

    fn matches(&self, io: &Io, bytes: &Range<u64>) -> bool {
        self.op.is_none_or(|op| op == io.op)
            && self.bytes.as_ref().is_none_or(|b| b.start < bytes.end && bytes.start < b.end)
    }
}

/// What a fault does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Ends with a status and does nothing (`WRITE_FAULT`, `UNRECOVERED_READ`, `CAPACITY_EXCEEDED`).
    Fail(Status),
    /// A write takes effect, but ends with a status.
    FailAfter(Status),
    /// Never comes back, until it is aborted or the device is reset.
    Stall,
    /// Takes longer by this.
    Slow(Duration),
    /// The write is acknowledged and never made.
    Lost,
    /// The write goes to this byte address instead of its own (cut at the end of the disk).
    Misdirected(u64),
    /// The read returns what was there before the last write.
    Stale,
    /// The data is changed on its way: these bits of the byte at this offset.
    Flip {
        /// Offset into the I/O in bytes.
        offset: u64,
        /// Bits to flip.
        mask: u8,
    },
}

/// A fault waiting for its operations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which operations.
    pub when: When,
    /// What happens to them.
    pub effect: Effect,
}

/// The effect on this operation, if a fault hits it; spent faults leave the list.
pub(crate) fn hit(faults: &mut Vec<Fault>, io: &Io, bytes: &Range<u64>) -> Option<Effect> {
    let mut found = None;
    for fault in faults.iter_mut().filter(|f| f.when.matches(io, bytes)) {
        if fault.when.skip > 0 {
            fault.when.skip -= 1;
        } else if found.is_none() {
            fault.when.hits -= 1;
            found = Some(fault.effect.clone());
        }
    }
    faults.retain(|f| f.when.hits > 0);
    found
}
