//! Copy (NVM 1.0 section 3.2.2), source range descriptor formats 0h and 1h.

use zerocopy::FromBytes;
use zerocopy::little_endian::{U16, U32, U64};

use crate::sqe::Sqe;
use crate::status::Status;
use crate::wire::{bits, wire};

bits! {
    /// CDW12 of Copy (NVM 1.0 section 3.2.2); CDW10 and CDW11 are the destination, `Sqe::slba`.
    pub struct CopyCdw12(u32) {
        /// NR: source ranges, 0's based.
        nr, with_nr: 0, 8;
        /// DESFMT: descriptor format.
        desfmt, with_desfmt: 8, 4;
        /// PRINFOR: protection information for the reads.
        prinfor, with_prinfor: 12, 4;
        /// STCW: storage tag check for the writes.
        stcw, with_stcw: 24, 1;
        /// STCR: storage tag check for the reads.
        stcr, with_stcr: 25, 1;
        /// PRINFOW: protection information for the writes.
        prinfow, with_prinfow: 26, 4;
        /// FUA: force unit access.
        fua, with_fua: 30, 1;
        /// LR: limited retry.
        lr, with_lr: 31, 1;
    }
}

wire! {
    /// Source range descriptor, format 0h (NVM 1.0 section 3.2.2).
    pub struct CopyRange: 32 {
        0 => _rsvd0: [u8; 8],
        /// Starting LBA.
        8 => pub slba: U64,
        /// NLB: blocks, 0's based.
        16 => pub nlb: U16,
        18 => _rsvd18: [u8; 6],
        /// EILBRT: expected initial reference tag.
        24 => pub eilbrt: U32,
        /// ELBAT: expected application tag.
        28 => pub elbat: U16,
        /// ELBATM: mask of the application tag.
        30 => pub elbatm: U16,
    }
}

wire! {
    /// Source range descriptor, format 1h: extended protection information (NVM 1.0 section 3.2.2).
    pub struct CopyRangeExt: 40 {
        0 => _rsvd0: [u8; 8],
        /// Starting LBA.
        8 => pub slba: U64,
        /// NLB: blocks, 0's based.
        16 => pub nlb: U16,
        18 => _rsvd18: [u8; 8],
        /// Expected storage and reference tags.
        26 => pub tags: [u8; 10],
        /// ELBAT: expected application tag.
        36 => pub elbat: U16,
        /// ELBATM: mask of the application tag.
        38 => pub elbatm: U16,
    }
}

impl CopyRange {
    /// First block and count (1..=65,536), if the range lies within a namespace of `namespace_blocks`.
    pub fn within(&self, namespace_blocks: u64) -> Result<(u64, u32), Status> {
        let (slba, blocks) = (self.slba.get(), u32::from(self.nlb.get()) + 1);
        match slba.checked_add(blocks.into()) {
            Some(end) if end <= namespace_blocks => Ok((slba, blocks)),
            _ => Err(Status::LBA_OUT_OF_RANGE.with_dnr()),
        }
    }
}

/// CDW12.
pub const fn control(sqe: &Sqe) -> CopyCdw12 {
    CopyCdw12(sqe.cdw12.get())
}

/// The source ranges of a format 0h command in its data, which must hold all of them.
pub fn ranges<'a>(sqe: &Sqe, data: &'a [u8]) -> Result<&'a [CopyRange], Status> {
    if control(sqe).desfmt() != 0 {
        return Err(Status::INVALID_FIELD.with_dnr());
    }
    let count = control(sqe).nr() as usize + 1;
    data.get(..count * size_of::<CopyRange>())
        .and_then(|b| <[CopyRange]>::ref_from_bytes(b).ok())
        .ok_or(Status::DATA_SGL_LENGTH_INVALID.with_dnr())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_bounds() {
        let mut data = [0; 64];
        (data[8], data[16], data[40]) = (5, 7, 0xff);
        let mut sqe = Sqe::new(0x19);
        sqe.cdw12 = U32::new(1);
        let list = ranges(&sqe, &data).expect("two fit");
        assert_eq!((list[0].within(13), list[1].slba.get()), (Ok((5, 8)), 0xff));
        assert!(list[0].within(12).is_err());
        assert!(ranges(&sqe, &data[..63]).is_err());
        sqe.cdw12 = U32::new(0x101);
        assert_eq!(ranges(&sqe, &data), Err(Status::INVALID_FIELD.with_dnr()));
    }
}
