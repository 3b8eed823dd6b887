//! Controller properties (NVMe Base 2.0 section 3.1.3), as Property Get and Set reach them.

use crate::wire::bits;

bits! {
    /// CAP, Controller Capabilities, offset 0h (NVMe Base 2.0 section 3.1.3).
    pub struct Cap(u64) {
        /// MQES: entries of an I/O queue at most, 0's based; 1 or more.
        mqes, with_mqes: 0, 16;
        /// CQR: queues must be physically contiguous; 1 on fabrics.
        cqr, with_cqr: 16, 1;
        /// AMS: arbitration mechanisms beside round robin.
        ams, with_ams: 17, 2;
        /// TO: longest wait for CSTS.RDY, units of 500 ms.
        to, with_to: 24, 8;
        /// DSTRD: doorbell stride; 0 on fabrics.
        dstrd, with_dstrd: 32, 4;
        /// NSSRS: NVM subsystem reset supported.
        nssrs, with_nssrs: 36, 1;
        /// CSS: command sets; bit 0 NVM, bit 6 one or more (CC.CSS = 110b), bit 7 admin only.
        css, with_css: 37, 8;
        /// BPS: boot partitions supported.
        bps, with_bps: 45, 1;
        /// CPS: controller power scope.
        cps, with_cps: 46, 2;
        /// MPSMIN: smallest memory page, 2^(12 + MPSMIN) bytes.
        mpsmin, with_mpsmin: 48, 4;
        /// MPSMAX: largest memory page, 2^(12 + MPSMAX) bytes.
        mpsmax, with_mpsmax: 52, 4;
        /// PMRS: persistent memory region supported.
        pmrs, with_pmrs: 56, 1;
        /// CMBS: controller memory buffer supported.
        cmbs, with_cmbs: 57, 1;
        /// NSSS: NVM subsystem shutdown supported.
        nsss, with_nsss: 58, 1;
        /// CRMS: controller ready modes; bit 0 with media, bit 1 independent of media.
        crms, with_crms: 59, 2;
    }
}

bits! {
    /// VS, Version, offset 8h (NVMe Base 2.0 section 3.1.3).
    pub struct Vs(u32) {
        /// TER: tertiary version.
        ter, with_ter: 0, 8;
        /// MNR: minor version.
        mnr, with_mnr: 8, 8;
        /// MJR: major version.
        mjr, with_mjr: 16, 16;
    }
}

impl Vs {
    /// NVMe 1.3.0.
    pub const V1_3: Self = Self(0x0001_0300);
    /// NVMe 1.4.0.
    pub const V1_4: Self = Self(0x0001_0400);
    /// NVMe 2.0.0.
    pub const V2_0: Self = Self(0x0002_0000);
}

bits! {
    /// CC, Controller Configuration, offset 14h (NVMe Base 2.0 section 3.1.3).
    pub struct Cc(u32) {
        /// EN: enable.
        en, with_en: 0, 1;
        /// CSS: command set selected; 000b NVM, 110b all supported, 111b admin only.
        css, with_css: 4, 3;
        /// MPS: memory page size, 2^(12 + MPS) bytes.
        mps, with_mps: 7, 4;
        /// AMS: arbitration mechanism; 0 round robin.
        ams, with_ams: 11, 3;
        /// SHN: shutdown notification; 00b none, 01b normal, 10b abrupt, 11b reserved.
        shn, with_shn: 14, 2;
        /// IOSQES: I/O submission queue entry size, 2^n bytes; 6 for the NVM command set.
        iosqes, with_iosqes: 16, 4;
        /// IOCQES: I/O completion queue entry size, 2^n bytes; 4 for the NVM command set.
        iocqes, with_iocqes: 20, 4;
        /// CRIME: ready independent of media.
        crime, with_crime: 24, 1;
    }
}

bits! {
    /// CSTS, Controller Status, offset 1Ch (NVMe Base 2.0 section 3.1.3).
    pub struct Csts(u32) {
        /// RDY: ready.
        rdy, with_rdy: 0, 1;
        /// CFS: controller fatal status.
        cfs, with_cfs: 1, 1;
        /// SHST: shutdown status; 00b normal operation, 01b in progress, 10b complete.
        shst, with_shst: 2, 2;
        /// NSSRO: a subsystem reset occurred; cleared by writing 1.
        nssro, with_nssro: 4, 1;
        /// PP: processing paused.
        pp, with_pp: 5, 1;
        /// ST: shutdown type; 1 = NVM subsystem.
        st, with_st: 6, 1;
    }
}

bits! {
    /// CRTO, Controller Ready Timeouts, offset 68h (NVMe Base 2.0 section 3.1.3).
    pub struct Crto(u32) {
        /// CRWMT: ready with media, units of 500 ms.
        crwmt, with_crwmt: 0, 16;
        /// CRIMT: ready independent of media, units of 500 ms.
        crimt, with_crimt: 16, 16;
    }
}

/// NSSR: the value that resets the NVM subsystem, "NVMe" (NVMe Base 2.0 section 3.1.3).
pub const NSSR_RESET: u32 = 0x4e56_4d65;

/// Properties that exist on fabrics (NVMe Base 2.0 section 3.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Property {
    /// Controller Capabilities, 8 bytes, read only.
    Cap = 0x00,
    /// Version, 4 bytes, read only.
    Vs = 0x08,
    /// Controller Configuration, 4 bytes.
    Cc = 0x14,
    /// Controller Status, 4 bytes; only NSSRO can be written.
    Csts = 0x1c,
    /// NVM Subsystem Reset, 4 bytes.
    Nssr = 0x20,
    /// Controller Ready Timeouts, 4 bytes, read only.
    Crto = 0x68,
}

impl Property {
    /// The property at this offset, `None` if there is none on fabrics.
    pub const fn from_offset(offset_bytes: u32) -> Option<Self> {
        Some(match offset_bytes {
            0x00 => Self::Cap,
            0x08 => Self::Vs,
            0x14 => Self::Cc,
            0x1c => Self::Csts,
            0x20 => Self::Nssr,
            0x68 => Self::Crto,
            _ => return None,
        })
    }

    /// Its size, bytes.
    pub const fn size_bytes(self) -> u32 {
        match self {
            Self::Cap => 8,
            _ => 4,
        }
    }

    /// Whether Property Set may name it.
    pub const fn is_writable(self) -> bool {
        matches!(self, Self::Cc | Self::Csts | Self::Nssr)
    }
}

/// Why a controller does not become ready with this configuration; it reports CSTS.CFS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CcError {
    /// CC.MPS outside CAP.MPSMIN..=CAP.MPSMAX.
    #[error("CC.MPS {0} is outside what CAP allows")]
    Mps(u32),
    /// CC.CSS that CAP.CSS does not announce.
    #[error("CC.CSS {0} is not supported")]
    Css(u32),
    /// CC.AMS that CAP.AMS does not announce.
    #[error("CC.AMS {0} is not supported")]
    Ams(u32),
    /// CC.IOSQES or CC.IOCQES is not 6 or 4.
    #[error("I/O queue entries of 2^{sqes} and 2^{cqes} bytes; 2^6 and 2^4 are required")]
    EntrySize {
        /// CC.IOSQES.
        sqes: u32,
        /// CC.IOCQES.
        cqes: u32,
    },
}

impl Cc {
    /// Checks an enabling configuration against CAP. Controllers without I/O queues (discovery,
    /// administrative) pass `io` = false: entry sizes mean nothing to them.
    pub fn check(self, cap: Cap, io: bool) -> Result<(), CcError> {
        let mps = self.mps();
        if !(cap.mpsmin()..=cap.mpsmax()).contains(&u64::from(mps)) {
            return Err(CcError::Mps(mps));
        }
        let announced = match self.css() {
            0b000 => cap.css() & 1 << 0,
            0b110 => cap.css() & 1 << 6,
            0b111 => cap.css() & 1 << 7,
            _ => 0,
        };
        if announced == 0 {
            return Err(CcError::Css(self.css()));
        }
        let announced = match self.ams() {
            0b000 => true,
            0b001 => cap.ams() & 1 != 0,
            0b111 => cap.ams() & 2 != 0,
            _ => false,
        };
        if !announced {
            return Err(CcError::Ams(self.ams()));
        }
        let (sqes, cqes) = (self.iosqes(), self.iocqes());
        if io && (sqes, cqes) != (6, 4) {
            return Err(CcError::EntrySize { sqes, cqes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Encoded by hand from the figures.
    #[test]
    fn golden_values() {
        let cap = Cap::default().with_mqes(127).with_cqr(1).with_to(15).with_css(1);
        assert_eq!(cap.0, 0x0000_0020_0f01_007f);
        let cc = Cc::default().with_en(1).with_iosqes(6).with_iocqes(4);
        assert_eq!(cc.0, 0x0046_0001);
        assert_eq!(cc.check(cap, true), Ok(()));
        assert_eq!((Vs::V1_4.mjr(), Vs::V1_4.mnr(), Vs::V1_4.ter()), (1, 4, 0));
        assert_eq!(Csts::default().with_shst(2).with_rdy(1).0, 9);
        assert_eq!(NSSR_RESET.to_be_bytes(), *b"NVMe");
    }

    #[test]
    fn setters_touch_their_field_only() {
        let all = Cc(u32::MAX);
        assert_eq!(all.with_shn(0).0, !(3 << 14));
        assert_eq!(Cc(0).with_mps(0xfff).0, 0xf << 7);
        assert_eq!(Cap(u64::MAX).with_css(0).0, !(0xff << 37));
    }

    #[test]
    fn configurations_refused() {
        let cap = Cap::default().with_css(0x41).with_mpsmax(1);
        let cc = Cc(0x0046_0001);
        assert_eq!(cc.with_mps(1).check(cap, true), Ok(()));
        assert_eq!(cc.with_mps(2).check(cap, true), Err(CcError::Mps(2)));
        assert_eq!(cc.with_css(6).check(cap, true), Ok(()));
        assert_eq!(cc.with_css(7).check(cap, true), Err(CcError::Css(7)));
        assert_eq!(cc.with_css(1).check(cap, true), Err(CcError::Css(1)));
        assert_eq!(cc.with_ams(1).check(cap, true), Err(CcError::Ams(1)));
        let e = CcError::EntrySize { sqes: 5, cqes: 4 };
        assert_eq!(cc.with_iosqes(5).check(cap, true), Err(e));
        assert_eq!(cc.with_iosqes(0).check(cap, false), Ok(()));
    }

    #[test]
    fn property_offsets() {
        for offset in 0..0x1000 {
            if let Some(p) = Property::from_offset(offset) {
                assert_eq!(p as u32, offset);
            }
        }
        assert_eq!(Property::from_offset(0x0c), None, "INTMS is PCIe only");
        assert_eq!(Property::from_offset(4), None, "the middle of CAP");
    }
}
