//! Log pages (NVMe Base 2.0 section 5.16): the command's arithmetic and the pages a target serves.

mod ana;
mod discovery;
mod pages;

pub use ana::{AnaGroup, AnaHeader, AnaState, AnaWriter, LogFull};
pub use discovery::{
    AddressFamily, DiscoveryEntry, DiscoveryHeader, SubsystemType, TransportType, eflags, sectype, treq,
};
pub use pages::{
    ChangedNamespaces, CommandEffects, ErrorEntry, FirmwareSlots, Health, LidSupport,
    ReservationNotification, SupportedLogPages, effects, health_warning,
};

use core::ops::Range;

use zerocopy::little_endian::U32;

use crate::ids::{Cid, Nsid};
use crate::opcode::{Admin, opcodes};
use crate::sqe::Sqe;
use crate::status::Status;
use crate::wire::bits;

opcodes! {
    /// LID: log page identifiers (NVMe Base 2.0 section 5.16).
    Lid {
        /// Supported Log Pages.
        SupportedLogPages = 0x00,
        /// Error Information.
        Error = 0x01,
        /// SMART / Health Information.
        Health = 0x02,
        /// Firmware Slot Information.
        FirmwareSlots = 0x03,
        /// Changed Namespace List.
        ChangedNamespaces = 0x04,
        /// Commands Supported and Effects.
        CommandEffects = 0x05,
        /// Device Self-test.
        SelfTest = 0x06,
        /// Telemetry Host-Initiated.
        TelemetryHost = 0x07,
        /// Telemetry Controller-Initiated.
        TelemetryController = 0x08,
        /// Endurance Group Information.
        EnduranceGroup = 0x09,
        /// Asymmetric Namespace Access.
        Ana = 0x0c,
        /// Persistent Event Log.
        PersistentEvent = 0x0d,
        /// LBA Status Information.
        LbaStatus = 0x0e,
        /// Feature Identifiers Supported and Effects.
        FeatureEffects = 0x12,
        /// Discovery.
        Discovery = 0x70,
        /// Reservation Notification.
        Reservation = 0x80,
        /// Sanitize Status.
        Sanitize = 0x81,
    }
}

bits! {
    /// CDW10 of Get Log Page (NVMe Base 2.0 section 5.16).
    pub struct LogCdw10(u32) {
        /// LID.
        lid, with_lid: 0, 8;
        /// LSP: log specific.
        lsp, with_lsp: 8, 7;
        /// RAE: retain the asynchronous event that announced this page.
        rae, with_rae: 15, 1;
        /// NUMDL: dwords, low half, of a 0's based count.
        numdl, with_numdl: 16, 16;
    }
}

bits! {
    /// CDW11 of Get Log Page (NVMe Base 2.0 section 5.16).
    pub struct LogCdw11(u32) {
        /// NUMDU: dwords, high half, of a 0's based count.
        numdu, with_numdu: 0, 16;
        /// LSI: log specific identifier.
        lsi, with_lsi: 16, 16;
    }
}

bits! {
    /// CDW14 of Get Log Page (NVMe Base 2.0 section 5.16).
    pub struct LogCdw14(u32) {
        /// UUID index.
        uuid_index, with_uuid_index: 0, 7;
        /// OT: LPOL and LPOU are an index instead of an offset.
        ot, with_ot: 23, 1;
        /// CSI: command set.
        csi, with_csi: 24, 8;
    }
}

/// LSP of the ANA page: RGO, groups without their NSIDs (NVMe Base 2.0 section 5.16.1.13).
pub const ANA_RGO: u8 = 1;

/// A Get Log Page command, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetLogPage {
    /// LID as sent; see [`Lid::from_u8`].
    pub lid: u8,
    /// Log specific field, 7 bits.
    pub lsp: u8,
    /// Log specific identifier.
    pub lsi: u16,
    /// Retain the asynchronous event.
    pub rae: bool,
    /// Bytes wanted: 4..=2^34, a multiple of 4.
    pub len_bytes: u64,
    /// Where to start: bytes, or an index if `by_index`.
    pub offset: u64,
    /// OT: `offset` is an index.
    pub by_index: bool,
    /// Command set, where the page depends on it.
    pub csi: u8,
}

impl GetLogPage {
    /// A request for `len_bytes` from `offset`, both multiples of 4 and `len_bytes` within 4..=2^34;
    /// `None` otherwise.
    pub fn new(lid: Lid, offset: u64, len_bytes: u64) -> Option<Self> {
        let ok =
            offset.is_multiple_of(4) && len_bytes.is_multiple_of(4) && (4..=1 << 34).contains(&len_bytes);
        let lid = lid as u8;
        let request = Self { lid, lsp: 0, lsi: 0, rae: false, len_bytes, offset, by_index: false, csi: 0 };
        ok.then_some(request)
    }

    /// Decodes the command's dwords.
    pub fn from_sqe(sqe: &Sqe) -> Self {
        let (d10, d11) = (LogCdw10(sqe.cdw10.get()), LogCdw11(sqe.cdw11.get()));
        let d14 = LogCdw14(sqe.cdw14.get());
        let numd = u64::from(d11.numdu() << 16 | d10.numdl());
        Self {
            lid: d10.lid() as u8,
            lsp: d10.lsp() as u8,
            lsi: d11.lsi() as u16,
            rae: d10.rae() == 1,
            len_bytes: (numd + 1) * 4,
            offset: u64::from(sqe.cdw12.get()) | u64::from(sqe.cdw13.get()) << 32,
            by_index: d14.ot() == 1,
            csi: d14.csi() as u8,
        }
    }

    /// Encodes the command; the caller sets the SGL.
    pub fn to_sqe(&self, cid: Cid, nsid: Nsid) -> Sqe {
        let numd = (self.len_bytes / 4).wrapping_sub(1) as u32;
        let mut sqe = Sqe::admin(Admin::GetLogPage, cid, nsid);
        let d10 = LogCdw10::default().with_lid(self.lid.into()).with_lsp(self.lsp.into());
        sqe.cdw10 = U32::new(d10.with_rae(self.rae.into()).with_numdl(numd).0);
        sqe.cdw11 = U32::new(LogCdw11::default().with_numdu(numd >> 16).with_lsi(self.lsi.into()).0);
        sqe.cdw12 = U32::new(self.offset as u32);
        sqe.cdw13 = U32::new((self.offset >> 32) as u32);
        sqe.cdw14 = U32::new(LogCdw14::default().with_ot(self.by_index.into()).with_csi(self.csi.into()).0);
        sqe
    }

    /// The part of a page of `page_bytes` that is wanted and exists; what the host asked for beyond it is
    /// undefined (we send zeros). An index, an unaligned offset or one beyond the page is an Invalid Field.
    pub fn window(&self, page_bytes: u64) -> Result<Range<u64>, Status> {
        if self.by_index || !self.offset.is_multiple_of(4) || self.offset > page_bytes {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        // Cannot overflow: the offset is within the page, the length within 2^34.
        let end = page_bytes.min(self.offset.saturating_add(self.len_bytes));
        Ok(self.offset..end)
    }

    /// Copies the wanted part of `page` to `out` and fills the rest of `out` with zeros.
    pub fn copy_window(&self, page: &[u8], out: &mut [u8]) -> Result<(), Status> {
        let window = self.window(page.len() as u64)?;
        // Both ends are within a slice's length.
        let part = &page[window.start as usize..window.end as usize];
        let n = part.len().min(out.len());
        out[..n].copy_from_slice(&part[..n]);
        out[n..].fill(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_command() {
        let request = GetLogPage {
            lsp: 1,
            rae: true,
            ..GetLogPage::new(Lid::Discovery, 0x1_0000_0400, 0x4_0004).expect("legal")
        };
        let sqe = request.to_sqe(Cid(7), Nsid::NONE);
        // NUMD = 0x10001 - 1 = 0x10000.
        assert_eq!(sqe.cdw10.get(), 0x0000_8170);
        assert_eq!(sqe.cdw11.get(), 1);
        assert_eq!((sqe.cdw12.get(), sqe.cdw13.get()), (0x400, 1));
        assert_eq!(GetLogPage::from_sqe(&sqe), request);
        for (offset, len) in [(2, 4), (0, 0), (0, 3), (0, (1 << 34) + 4)] {
            assert_eq!(GetLogPage::new(Lid::Health, offset, len), None);
        }
    }

    #[test]
    fn largest_count() {
        let mut sqe = Sqe::new(2);
        (sqe.cdw10, sqe.cdw11) = (U32::new(u32::MAX), U32::new(u32::MAX));
        let request = GetLogPage::from_sqe(&sqe);
        assert_eq!(request.len_bytes, 1 << 34);
        assert_eq!(request.window(512), Ok(0..512));
    }

    #[test]
    fn windows() {
        let at = |offset, len_bytes| GetLogPage {
            offset,
            len_bytes,
            ..GetLogPage::new(Lid::Error, 0, 4).expect("legal")
        };
        let refused = Err(Status::INVALID_FIELD.with_dnr());
        for (offset, len, want) in [
            (0, 512, Ok(0..512)),
            (0, 1024, Ok(0..512)),
            (508, 4, Ok(508..512)),
            (512, 4, Ok(512..512)),
            (516, 4, refused.clone()),
            (510, 4, refused.clone()),
            (u64::MAX - 3, 1 << 34, refused.clone()),
        ] {
            assert_eq!(at(offset, len).window(512), want, "{offset}+{len}");
        }
        assert_eq!(GetLogPage { by_index: true, ..at(0, 4) }.window(512), refused);
        let (page, mut out) = ([1, 2, 3, 4, 5, 6, 7, 8], [9; 8]);
        assert_eq!(at(4, 8).copy_window(&page, &mut out), Ok(()));
        assert_eq!(out, [5, 6, 7, 8, 0, 0, 0, 0]);
        assert!(at(12, 8).copy_window(&page, &mut out).is_err());
        // An output smaller than the request is filled, not overrun.
        assert_eq!(at(0, 8).copy_window(&page, &mut out[..4]), Ok(()));
        assert_eq!(out[..4], [1, 2, 3, 4]);
    }
}
