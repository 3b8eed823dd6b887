//! Dataset Management (NVM 1.0 section 3.2.3).

use zerocopy::FromBytes;
use zerocopy::little_endian::{U32, U64};

use crate::sqe::Sqe;
use crate::status::Status;
use crate::wire::{bits, wire};

/// Ranges in one command at most.
pub const MAX_RANGES: usize = 256;

bits! {
    /// CDW11 of Dataset Management (NVM 1.0 section 3.2.3).
    pub struct DsmCdw11(u32) {
        /// IDR: integral dataset for read.
        idr, with_idr: 0, 1;
        /// IDW: integral dataset for write.
        idw, with_idw: 1, 1;
        /// AD: deallocate.
        ad, with_ad: 2, 1;
    }
}

wire! {
    /// Range (NVM 1.0 section 3.2.3).
    pub struct DsmRange: 16 {
        /// Context attributes: hints.
        0 => pub cattr: U32,
        /// Length, blocks; not 0's based, 0 = nothing.
        4 => pub blocks: U32,
        /// Starting LBA.
        8 => pub slba: U64,
    }
}

/// Ranges of a command: NR of CDW10 bits 7:0, 0's based, plus one: 1..=256.
pub const fn range_count(sqe: &Sqe) -> usize {
    (sqe.cdw10.get() & 0xff) as usize + 1
}

/// CDW11.
pub const fn attributes(sqe: &Sqe) -> DsmCdw11 {
    DsmCdw11(sqe.cdw11.get())
}

/// The ranges of a command in its data, which must hold all of them.
pub fn ranges<'a>(sqe: &Sqe, data: &'a [u8]) -> Result<&'a [DsmRange], Status> {
    let bytes = data.get(..range_count(sqe) * size_of::<DsmRange>());
    bytes.and_then(|b| <[DsmRange]>::ref_from_bytes(b).ok()).ok_or(Status::DATA_SGL_LENGTH_INVALID.with_dnr())
}

impl DsmRange {
    /// First block and count, if the range lies within a namespace of `namespace_blocks`.
    pub fn within(&self, namespace_blocks: u64) -> Result<(u64, u32), Status> {
        let (slba, blocks) = (self.slba.get(), self.blocks.get());
        match slba.checked_add(blocks.into()) {
            Some(end) if end <= namespace_blocks => Ok((slba, blocks)),
            _ => Err(Status::LBA_OUT_OF_RANGE.with_dnr()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_bounds() {
        let mut data = [0; 48];
        data[..16].copy_from_slice(&[0, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        let mut sqe = Sqe::new(9);
        (sqe.cdw10, sqe.cdw11) = (U32::new(0xffff_ff02), U32::new(4));
        assert_eq!((range_count(&sqe), attributes(&sqe).ad()), (3, 1));
        let list = ranges(&sqe, &data).expect("three fit");
        assert_eq!((list.len(), list[0].slba.get(), list[0].blocks.get()), (3, 2, 8));
        assert_eq!(ranges(&sqe, &data[..47]), Err(Status::DATA_SGL_LENGTH_INVALID.with_dnr()));
        assert_eq!(list[0].within(10), Ok((2, 8)));
        assert!(list[0].within(9).is_err());
        let far = DsmRange { slba: U64::new(u64::MAX), blocks: U32::new(1), ..Default::default() };
        assert!(far.within(u64::MAX).is_err());
    }
}
