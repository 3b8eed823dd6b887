//! Reservations (NVMe Base 2.0 sections 7.2 to 7.5 and 8.19).

use zerocopy::little_endian::{U16, U32, U64};

use crate::opcode::opcodes;
use crate::wire::{bits, wire};

opcodes! {
    /// RTYPE: reservation types (NVMe Base 2.0 sections 7.2 to 7.5).
    ReservationType {
        /// Write Exclusive.
        WriteExclusive = 1,
        /// Exclusive Access.
        ExclusiveAccess = 2,
        /// Write Exclusive, registrants only.
        WriteExclusiveRegistrants = 3,
        /// Exclusive Access, registrants only.
        ExclusiveAccessRegistrants = 4,
        /// Write Exclusive, all registrants.
        WriteExclusiveAll = 5,
        /// Exclusive Access, all registrants.
        ExclusiveAccessAll = 6,
    }
}

opcodes! {
    /// RREGA: register actions.
    RegisterAction {
        /// Register the key.
        Register = 0,
        /// Unregister the key.
        Unregister = 1,
        /// Replace the key.
        Replace = 2,
    }
}

opcodes! {
    /// RACQA: acquire actions.
    AcquireAction {
        /// Acquire.
        Acquire = 0,
        /// Preempt.
        Preempt = 1,
        /// Preempt and abort.
        PreemptAndAbort = 2,
    }
}

opcodes! {
    /// RRELA: release actions.
    ReleaseAction {
        /// Release.
        Release = 0,
        /// Clear.
        Clear = 1,
    }
}

bits! {
    /// CDW10 of Reservation Register (NVMe Base 2.0 sections 7.2 to 7.5).
    pub struct RegisterCdw10(u32) {
        /// RREGA, a [`RegisterAction`].
        rrega, with_rrega: 0, 3;
        /// IEKEY: ignore the existing key.
        iekey, with_iekey: 3, 1;
        /// CPTPL: change persistence; 00b no, 10b off, 11b on.
        cptpl, with_cptpl: 30, 2;
    }
}

bits! {
    /// CDW10 of Reservation Acquire (NVMe Base 2.0 sections 7.2 to 7.5).
    pub struct AcquireCdw10(u32) {
        /// RACQA, an [`AcquireAction`].
        racqa, with_racqa: 0, 3;
        /// IEKEY: shall be 0.
        iekey, with_iekey: 3, 1;
        /// RTYPE, a [`ReservationType`].
        rtype, with_rtype: 8, 8;
    }
}

bits! {
    /// CDW10 of Reservation Release (NVMe Base 2.0 sections 7.2 to 7.5).
    pub struct ReleaseCdw10(u32) {
        /// RRELA, a [`ReleaseAction`].
        rrela, with_rrela: 0, 3;
        /// IEKEY: shall be 0.
        iekey, with_iekey: 3, 1;
        /// RTYPE, a [`ReservationType`].
        rtype, with_rtype: 8, 8;
    }
}

bits! {
    /// CDW11 of Reservation Report; CDW10 is NUMD, dwords, 0's based (NVMe Base 2.0 sections 7.2 to 7.5).
    pub struct ReportCdw11(u32) {
        /// EDS: extended data structure, 128-bit host identifiers; required of hosts that have one.
        eds, with_eds: 0, 1;
    }
}

wire! {
    /// Data of Reservation Register.
    pub struct RegisterData: 16 {
        /// CRKEY: current key.
        0 => pub crkey: U64,
        /// NRKEY: new key.
        8 => pub nrkey: U64,
    }
}

wire! {
    /// Data of Reservation Acquire.
    pub struct AcquireData: 16 {
        /// CRKEY: current key.
        0 => pub crkey: U64,
        /// PRKEY: key to preempt.
        8 => pub prkey: U64,
    }
}

wire! {
    /// Data of Reservation Release.
    pub struct ReleaseData: 8 {
        /// CRKEY: current key.
        0 => pub crkey: U64,
    }
}

wire! {
    /// Header of Reservation Report (NVMe Base 2.0 sections 7.2 to 7.5); [`RegisteredController`]s follow.
    pub struct ReservationStatus: 24 {
        /// GEN: generation, counts changes of registrations.
        0 => pub generation: U32,
        /// RTYPE; 0 = no reservation.
        4 => pub rtype: u8,
        /// REGCTL: registered controllers.
        5 => pub regctl: U16,
        7 => _rsvd7: [u8; 2],
        /// PTPLS: persistence through power loss.
        9 => pub ptpls: u8,
        10 => _rsvd10: [u8; 14],
    }
}

wire! {
    /// Registered controller (NVMe Base 2.0 sections 7.2 to 7.5).
    pub struct RegisteredController: 24 {
        /// CNTLID; FFFFh = not associated at present.
        0 => pub cntlid: U16,
        /// RCSTS: bit 0, holds the reservation.
        2 => pub rcsts: u8,
        3 => _rsvd3: [u8; 5],
        /// HOSTID, 64 bits.
        8 => pub hostid: U64,
        /// RKEY.
        16 => pub rkey: U64,
    }
}

wire! {
    /// Header of the extended Reservation Report (NVMe Base 2.0 sections 7.2 to 7.5);
    /// [`RegisteredControllerExt`]s follow.
    pub struct ReservationStatusExt: 64 {
        /// As in the plain report.
        0 => pub status: ReservationStatus,
        24 => _rsvd24: [u8; 40],
    }
}

wire! {
    /// Registered controller, extended (NVMe Base 2.0 sections 7.2 to 7.5).
    pub struct RegisteredControllerExt: 64 {
        /// CNTLID; FFFFh = not associated at present.
        0 => pub cntlid: U16,
        /// RCSTS: bit 0, holds the reservation.
        2 => pub rcsts: u8,
        3 => _rsvd3: [u8; 5],
        /// RKEY.
        8 => pub rkey: U64,
        /// HOSTID, 128 bits.
        16 => pub hostid: [u8; 16],
        32 => _rsvd32: [u8; 32],
    }
}

/// What a reservation lets a host do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// Holds the reservation.
    Holder,
    /// Registered, but not the holder.
    Registrant,
    /// Neither.
    Other,
}

impl ReservationType {
    /// Whether every registrant is a holder.
    pub const fn all_registrants_hold(self) -> bool {
        matches!(self, Self::WriteExclusiveAll | Self::ExclusiveAccessAll)
    }

    /// Whether a host of this standing may read (`write` = false) or write (NVMe Base 2.0 sections 7.2 to 7.5).
    pub const fn permits(self, standing: Standing, write: bool) -> bool {
        match (self, standing) {
            (_, Standing::Holder) => true,
            (Self::WriteExclusive, _) => !write,
            (Self::ExclusiveAccess, _) => false,
            (_, Standing::Registrant) => true,
            (Self::WriteExclusiveRegistrants | Self::WriteExclusiveAll, Standing::Other) => !write,
            (Self::ExclusiveAccessRegistrants | Self::ExclusiveAccessAll, Standing::Other) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows: types 1 to 6; columns: read and write of holder, registrant, other.
    #[test]
    fn who_may_do_what() {
        let want = ["rw r- r-", "rw -- --", "rw rw r-", "rw rw --", "rw rw r-", "rw rw --"];
        for (kind, want) in ReservationType::ALL.iter().zip(want) {
            let cells = [Standing::Holder, Standing::Registrant, Standing::Other].map(|s| {
                let r = if kind.permits(s, false) { 'r' } else { '-' };
                let w = if kind.permits(s, true) { 'w' } else { '-' };
                format!("{r}{w}")
            });
            assert_eq!(cells.join(" "), want, "{kind:?}");
        }
    }
}
