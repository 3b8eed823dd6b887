//! What a controller remembers for its host until it is read: failed commands, and what happened to reservations.
//!
//! Both are bounded: of more than fits, the oldest are forgotten.

use std::collections::VecDeque;

use cryptfold_nvmf_spec::log::{ErrorEntry, ReservationNotification};
use cryptfold_nvmf_spec::status::Sct;
use cryptfold_nvmf_spec::{Nsid, Qid, Sqe, Status};
use zerocopy::IntoBytes;

use crate::reservation::Notice;

/// Entries of the error log; ELPE is one less.
pub(crate) const ERRORS: usize = 64;
/// Reservation notifications that wait to be read.
const NOTICES: usize = 256;
/// TRTYPE of NVMe/TCP.
const TRTYPE_TCP: u8 = 3;
/// No place in the command is at fault in particular.
const NO_LOCATION: u16 = 0xffff;

/// Failed commands, newest first.
#[derive(Default)]
pub(crate) struct ErrorLog {
    entries: VecDeque<ErrorEntry>,
    /// Failed commands so far.
    pub count: u64,
    /// Those of them that say that the medium failed.
    pub media: u64,
}

/// Whether the data itself could not be stored, read or verified.
fn is_media_error(status: Status) -> bool {
    status.sct() == Sct::Media
        && !matches!(
            status.code(),
            Status::COMPARE_FAILURE | Status::ACCESS_DENIED | Status::DEALLOCATED_BLOCK
        )
}

impl ErrorLog {
    /// A command has failed.
    pub fn add(&mut self, qid: Qid, sqe: &Sqe, status: Status) {
        self.count += 1;
        self.media += u64::from(is_media_error(status));
        self.entries.truncate(ERRORS - 1);
        let mut entry = ErrorEntry::default();
        entry.error_count = self.count.into();
        entry.sqid = qid.0.into();
        entry.cid = sqe.cid().0.into();
        entry.status = status.to_wire().into();
        entry.parameter_location = NO_LOCATION.into();
        entry.lba = if qid.is_admin() { 0 } else { sqe.slba() }.into();
        entry.nsid = sqe.nsid().0.into();
        entry.trtype = TRTYPE_TCP;
        self.entries.push_front(entry);
    }

    /// The log page: [`ERRORS`] entries, unused ones zero.
    pub fn page(&self) -> Vec<u8> {
        let mut page = vec![0; ERRORS * size_of::<ErrorEntry>()];
        for (slot, entry) in page.chunks_exact_mut(size_of::<ErrorEntry>()).zip(&self.entries) {
            slot.copy_from_slice(entry.as_bytes());
        }
        page
    }
}

/// Reservation notifications, oldest first.
#[derive(Default)]
pub(crate) struct NoticeLog {
    waiting: VecDeque<(u64, Nsid, Notice)>,
    count: u64,
}

impl NoticeLog {
    /// Something happened.
    pub fn add(&mut self, nsid: Nsid, notice: Notice) {
        // Wraps to 1: 0 says that there is nothing.
        self.count = self.count.checked_add(1).unwrap_or(1);
        if self.waiting.len() >= NOTICES {
            self.waiting.pop_front();
        }
        self.waiting.push_back((self.count, nsid, notice));
    }

    /// The log page: the oldest notification, which is forgotten unless `retain`; empty if there is none.
    pub fn page(&mut self, retain: bool) -> ReservationNotification {
        let Some((count, nsid, notice)) = self.waiting.front().copied() else { return Default::default() };
        let more = self.waiting.len() - 1;
        if !retain {
            self.waiting.pop_front();
        }
        let mut page = ReservationNotification::default();
        page.count = count.into();
        page.kind = notice as u8;
        page.available = u8::try_from(more).unwrap_or(u8::MAX);
        page.nsid = nsid.0.into();
        page
    }

    /// Whether some wait to be read.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cryptfold_nvmf_spec::Cid;
    use cryptfold_nvmf_spec::opcode::Io;
    use zerocopy::FromBytes;

    #[test]
    fn the_newest_errors_are_kept() {
        let mut log = ErrorLog::default();
        for n in 0..100u16 {
            let mut sqe = Sqe::io(Io::Read, Cid(n), Nsid(3));
            sqe.set_slba(u64::from(n) << 33);
            log.add(Qid(2), &sqe, if n % 2 == 0 { Status::WRITE_FAULT } else { Status::COMPARE_FAILURE });
        }
        assert_eq!((log.count, log.media), (100, 50));
        let page = log.page();
        let entries = <[ErrorEntry]>::ref_from_bytes(&page).expect("whole entries");
        assert_eq!(
            (entries.len(), entries[0].error_count.get(), entries[63].error_count.get()),
            (64, 100, 37)
        );
        let first = entries[0];
        assert_eq!((first.cid.get(), first.lba.get(), first.nsid.get()), (99, 99 << 33, 3));
        assert_eq!(Status::from_wire(first.status.get()), Status::COMPARE_FAILURE);
        assert!(ErrorLog::default().page().iter().all(|b| *b == 0));
    }

    #[test]
    fn notices_are_read_one_by_one() {
        let mut log = NoticeLog::default();
        assert_eq!(log.page(false).count.get(), 0);
        for n in 1..=300 {
            log.add(Nsid(n), Notice::ReservationReleased);
        }
        let page = log.page(true);
        assert_eq!((page.count.get(), page.nsid.get(), page.available, page.kind), (45, 45, 255, 2));
        assert_eq!(log.page(false), page);
        assert_eq!((log.page(false).count.get(), log.is_empty()), (46, false));
        log.count = u64::MAX;
        log.waiting.clear();
        log.add(Nsid(1), Notice::RegistrationPreempted);
        assert_eq!((log.page(false).count.get(), log.page(false).count.get()), (1, 0));
    }
}
