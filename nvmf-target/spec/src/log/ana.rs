//! Asymmetric Namespace Access log page (NVMe Base 2.0 section 5.16.1.13).

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use crate::ids::Nsid;
use crate::opcode::opcodes;
use crate::status::Status;
use crate::wire::wire;

opcodes! {
    /// States of a group, bits 3:0 of its state byte.
    AnaState {
        /// Optimized.
        Optimized = 0x01,
        /// Non-optimized.
        NonOptimized = 0x02,
        /// Inaccessible.
        Inaccessible = 0x03,
        /// Persistent loss.
        PersistentLoss = 0x04,
        /// Change.
        Change = 0x0f,
    }
}

impl AnaState {
    /// The status of a command that this state keeps from executing; `None` where commands execute.
    pub const fn status(self) -> Option<Status> {
        match self {
            Self::Optimized | Self::NonOptimized => None,
            Self::Inaccessible => Some(Status::ANA_INACCESSIBLE),
            Self::PersistentLoss => Some(Status::ANA_PERSISTENT_LOSS),
            Self::Change => Some(Status::ANA_TRANSITION),
        }
    }
}

wire! {
    /// Header of the page.
    pub struct AnaHeader: 16 {
        /// Change count; FFFFFFFFFFFFFFFFh wraps to 0.
        0 => pub chgcnt: U64,
        /// Group descriptors that follow.
        8 => pub ngrps: U16,
        10 => _rsvd10: [u8; 6],
    }
}

wire! {
    /// Group descriptor; `nnsids` NSIDs of 4 bytes follow, ascending.
    pub struct AnaGroup: 32 {
        /// Group identifier, 1 or more.
        0 => pub grpid: U32,
        /// NSIDs that follow; 0 with RGO.
        4 => pub nnsids: U32,
        /// Change count of the group.
        8 => pub chgcnt: U64,
        /// Bits 3:0, an [`AnaState`].
        16 => pub state: u8,
        17 => _rsvd17: [u8; 15],
    }
}

/// The buffer is too small for the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ANA log page does not fit its buffer")]
pub struct LogFull;

/// Writes the page into a caller's buffer.
#[derive(Debug)]
pub struct AnaWriter<'a> {
    buf: &'a mut [u8],
    at: usize,
    groups: u16,
    chgcnt: u64,
}

impl<'a> AnaWriter<'a> {
    /// Starts a page with this change count.
    pub fn new(buf: &'a mut [u8], chgcnt: u64) -> Result<Self, LogFull> {
        let at = size_of::<AnaHeader>();
        if buf.len() < at { Err(LogFull) } else { Ok(Self { buf, at, groups: 0, chgcnt }) }
    }

    /// Adds a group. NSIDs ascend; none are passed for RGO. After an error the page is unusable.
    pub fn group(
        &mut self,
        grpid: u32,
        chgcnt: u64,
        state: AnaState,
        nsids: impl IntoIterator<Item = Nsid>,
    ) -> Result<(), LogFull> {
        let head = self.at;
        self.at = head + size_of::<AnaGroup>();
        let mut nnsids = 0;
        for nsid in nsids {
            let slot = self.buf.get_mut(self.at..self.at + 4).ok_or(LogFull)?;
            slot.copy_from_slice(&nsid.0.to_le_bytes());
            self.at += 4;
            nnsids += 1;
        }
        let group = AnaGroup {
            grpid: U32::new(grpid),
            nnsids: U32::new(nnsids),
            chgcnt: U64::new(chgcnt),
            state: state as u8,
            ..Default::default()
        };
        let slot = self.buf.get_mut(head..head + size_of::<AnaGroup>()).ok_or(LogFull)?;
        slot.copy_from_slice(group.as_bytes());
        self.groups = self.groups.checked_add(1).ok_or(LogFull)?;
        Ok(())
    }

    /// Completes the header; the page's length in bytes.
    pub fn finish(self) -> usize {
        let header =
            AnaHeader { chgcnt: U64::new(self.chgcnt), ngrps: U16::new(self.groups), ..Default::default() };
        self.buf[..size_of::<AnaHeader>()].copy_from_slice(header.as_bytes());
        self.at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_page() {
        let mut buf = [0xa5; 92];
        let mut page = AnaWriter::new(&mut buf, 5).expect("it fits");
        page.group(1, 6, AnaState::Optimized, [Nsid(1), Nsid(3)]).expect("it fits");
        page.group(2, 7, AnaState::Change, [Nsid(9)]).expect("it fits");
        assert_eq!(page.finish(), 92);
        assert_eq!(buf[..16], [5, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(buf[16..33], [1, 0, 0, 0, 2, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(buf[33..56], [[0; 15].as_slice(), &[1, 0, 0, 0, 3, 0, 0, 0]].concat());
        assert_eq!(buf[72], 0x0f);
        assert_eq!(buf[88..], [9, 0, 0, 0]);
    }

    #[test]
    fn small_buffers() {
        assert!(AnaWriter::new(&mut [0; 15], 0).is_err());
        for len in 16..52 {
            let mut buf = vec![0; len];
            let mut page = AnaWriter::new(&mut buf, 0).expect("header fits");
            assert_eq!(page.group(1, 0, AnaState::Optimized, [Nsid(1)]), Err(LogFull), "{len}");
        }
        assert_eq!(AnaState::Optimized.status(), None);
        assert_eq!(AnaState::Inaccessible.status(), Some(Status::ANA_INACCESSIBLE));
    }
}
