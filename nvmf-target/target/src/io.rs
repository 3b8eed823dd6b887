//! I/O commands of the NVM command set: checked against the namespace and turned into what a block device does. No I/O.

use cryptfold_bdev::{self as bdev, Op};
use cryptfold_nvmf_spec::opcode::{Direction, Io};
use cryptfold_nvmf_spec::status::Sct;
use cryptfold_nvmf_spec::{Sqe, Status, dsm};

/// What a namespace looks like to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes in a block.
    pub block_bytes: u32,
    /// Size in blocks, now.
    pub blocks: u64,
    /// Deallocated blocks read as zeros for sure, so Write Zeroes with DEAC may deallocate.
    pub deallocate_zeroes: bool,
    /// The device deallocates at all.
    pub can_deallocate: bool,
}

/// A checked I/O command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// One operation on one range. `bytes`: data that moves between host and controller.
    Block {
        /// For the device.
        op: Op,
        /// First block.
        lba: u64,
        /// Blocks; 0 for flush.
        blocks: u64,
        /// Force unit access.
        fua: bool,
        /// Bytes of data.
        bytes: u32,
    },
    /// Dataset Management with so many ranges (1..=256) in its data. `deallocate`: otherwise it is only advice.
    Ranges {
        /// Entries in the data.
        count: u32,
        /// AD is set and the device can.
        deallocate: bool,
    },
}

/// Checks a command. Its data is checked by [`Plan::check_transfer`].
///
/// # Errors
/// The status to complete it with.
pub fn plan(sqe: &Sqe, ns: &Geometry) -> Result<Plan, Status> {
    let opcode = Io::from_u8(sqe.opcode).ok_or(Status::INVALID_OPCODE.with_dnr())?;
    let op = match opcode {
        Io::Flush => {
            return Ok(Plan::Block { op: Op::Flush, lba: 0, blocks: 0, fua: false, bytes: 0 });
        }
        Io::DatasetManagement => {
            let deallocate = dsm::attributes(sqe).ad() != 0 && ns.can_deallocate;
            return Ok(Plan::Ranges { count: dsm::range_count(sqe) as u32, deallocate });
        }
        Io::Read => Op::Read,
        Io::Write => Op::Write,
        Io::Compare => Op::Compare,
        Io::WriteZeroes if sqe.rw().deac() != 0 && ns.deallocate_zeroes => Op::Unmap,
        Io::WriteZeroes => Op::WriteZeroes,
        _ => return Err(Status::INVALID_OPCODE.with_dnr()),
    };
    let (lba, blocks) = (sqe.slba(), u64::from(sqe.block_count()));
    if lba.checked_add(blocks).is_none_or(|end| end > ns.blocks) {
        return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
    }
    let bytes = match op {
        Op::Unmap | Op::WriteZeroes => 0,
        // At most 65,536 blocks of 4,096 bytes: below 4 GiB.
        _ => sqe.block_count() * ns.block_bytes,
    };
    Ok(Plan::Block { op, lba, blocks, fua: sqe.rw().fua() != 0, bytes })
}

impl Plan {
    /// Which way the data goes.
    pub const fn direction(&self) -> Direction {
        match self {
            Plan::Ranges { .. } => Direction::HostToController,
            Plan::Block { bytes: 0, .. } => Direction::None,
            Plan::Block { op: Op::Read, .. } => Direction::ControllerToHost,
            Plan::Block { .. } => Direction::HostToController,
        }
    }

    /// Bytes of data the command has.
    pub const fn bytes(&self) -> u32 {
        match self {
            Plan::Ranges { count, .. } => *count * DSM_RANGE_BYTES,
            Plan::Block { bytes, .. } => *bytes,
        }
    }

    /// Checks the length that the SGL describes: exact for blocks; a host may send more ranges than it names.
    ///
    /// # Errors
    /// The status to complete the command with.
    pub fn check_transfer(&self, sgl_bytes: u32, max_io_bytes: u32) -> Result<(), Status> {
        if self.bytes() > max_io_bytes {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let fits = match self {
            Plan::Ranges { .. } => sgl_bytes >= self.bytes() && sgl_bytes <= 256 * DSM_RANGE_BYTES,
            Plan::Block { .. } => sgl_bytes == self.bytes(),
        };
        if fits { Ok(()) } else { Err(Status::DATA_SGL_LENGTH_INVALID.with_dnr()) }
    }
}

/// Bytes of a Dataset Management range.
pub const DSM_RANGE_BYTES: u32 = 16;

/// The ranges (LBA, blocks) of a Dataset Management command, empty ones left out.
///
/// # Errors
/// LBA Out of Range when one leaves the namespace.
pub fn dsm_ranges(sqe: &Sqe, data: &[u8], ns: &Geometry) -> Result<Vec<(u64, u64)>, Status> {
    let ranges = dsm::ranges(sqe, data)?.iter().map(|r| r.within(ns.blocks));
    let ranges = ranges.map(|r| r.map(|(lba, blocks)| (lba, u64::from(blocks))));
    ranges.filter(|r| !matches!(r, Ok((_, 0)))).collect()
}

/// A device's verdict as the host sees it: the same numbers.
pub const fn status(s: bdev::Status) -> Status {
    let sct = match s.sct() {
        0 => Sct::Generic,
        1 => Sct::CommandSpecific,
        2 => Sct::Media,
        3 => Sct::Path,
        7 => Sct::VendorSpecific,
        _ => Sct::Reserved,
    };
    let status = Status::new(sct, s.sc());
    if s.dnr() { status.with_dnr() } else { status }
}

/// What the two halves of a fused Compare and Write report for the outcome of the whole (NVMe Base 2.0 section 3.4.2).
pub fn fused(outcome: Status) -> (Status, Status) {
    let write_half = [
        Status::WRITE_FAULT,
        Status::CAPACITY_EXCEEDED,
        Status::NAMESPACE_WRITE_PROTECTED,
        Status::WRITE_TO_READ_ONLY_RANGE,
    ];
    if outcome.is_success() {
        (Status::SUCCESS, Status::SUCCESS)
    } else if write_half.contains(&outcome.code()) {
        (Status::SUCCESS, outcome)
    } else {
        (outcome, Status::ABORTED_FAILED_FUSED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cryptfold_nvmf_spec::sqe::RwControl;
    use cryptfold_nvmf_spec::{Cid, Nsid};

    const NS: Geometry =
        Geometry { block_bytes: 512, blocks: 1000, deallocate_zeroes: true, can_deallocate: true };

    fn rw(op: Io, lba: u64, blocks: u32, control: RwControl) -> Sqe {
        let mut sqe = Sqe::io(op, Cid(0), Nsid(1));
        sqe.set_rw(lba, blocks, control);
        sqe
    }

    #[test]
    fn commands_become_operations() {
        let fua = RwControl(0).with_fua(1);
        let p = plan(&rw(Io::Write, 8, 4, fua), &NS);
        assert_eq!(p, Ok(Plan::Block { op: Op::Write, lba: 8, blocks: 4, fua: true, bytes: 2048 }));
        let p = plan(&rw(Io::WriteZeroes, 0, 1000, RwControl(0).with_deac(1)), &NS);
        assert_eq!(p, Ok(Plan::Block { op: Op::Unmap, lba: 0, blocks: 1000, fua: false, bytes: 0 }));
        let solid = Geometry { deallocate_zeroes: false, ..NS };
        let p = plan(&rw(Io::WriteZeroes, 0, 1, RwControl(0).with_deac(1)), &solid);
        assert!(matches!(p, Ok(Plan::Block { op: Op::WriteZeroes, .. })));
        assert_eq!(
            plan(&rw(Io::Read, 0, 1, fua), &NS).map(|p| p.direction()),
            Ok(Direction::ControllerToHost)
        );
    }

    #[test]
    fn ranges_of_commands() {
        let out = Err(Status::LBA_OUT_OF_RANGE);
        for (lba, blocks) in [(1000, 1), (999, 2), (u64::MAX, 1), (u64::MAX - 10, 65_536)] {
            let p = plan(&rw(Io::Read, lba, blocks, RwControl(0)), &NS).map_err(Status::code);
            assert_eq!(p, out, "{lba}+{blocks}");
        }
        assert!(plan(&rw(Io::Read, 0, 1000, RwControl(0)), &NS).is_ok());
        let p = plan(&rw(Io::Write, 0, 2, RwControl(0)), &NS).expect("in range");
        assert_eq!(p.check_transfer(1024, 4096), Ok(()));
        for len in [0, 1023, 1025, u32::MAX] {
            let status = p.check_transfer(len, 4096).map_err(Status::code);
            assert_eq!(status, Err(Status::DATA_SGL_LENGTH_INVALID));
        }
        assert_eq!(p.check_transfer(1024, 512).map_err(Status::code), Err(Status::INVALID_FIELD));
    }

    #[test]
    fn unknown_opcodes_are_refused() {
        let known = [Io::Flush, Io::Read, Io::Write, Io::Compare, Io::WriteZeroes, Io::DatasetManagement];
        for opcode in 0..=255u8 {
            let mut sqe = rw(Io::Read, 0, 1, RwControl(0));
            sqe.opcode = opcode;
            let ok = known.iter().any(|k| *k as u8 == opcode);
            assert_eq!(plan(&sqe, &NS).is_ok(), ok, "opcode {opcode:#x}");
        }
    }

    #[test]
    fn dsm() {
        let mut sqe = Sqe::io(Io::DatasetManagement, Cid(0), Nsid(1));
        sqe.cdw10 = 1.into();
        sqe.cdw11 = 4.into();
        let p = plan(&sqe, &NS).expect("legal");
        assert_eq!(p, Plan::Ranges { count: 2, deallocate: true });
        // The Linux kernel always sends 4,096 bytes.
        assert_eq!((p.check_transfer(4096, 131_072), p.check_transfer(32, 131_072)), (Ok(()), Ok(())));
        assert!(p.check_transfer(31, 131_072).is_err());
        let range = |lba: u64, blocks: u32| {
            let mut raw = vec![0; 4];
            raw.extend(blocks.to_le_bytes());
            raw.extend(lba.to_le_bytes());
            raw
        };
        let data = [range(10, 5), range(20, 0), range(990, 10), range(999, 9)].concat();
        let with = |count: u32| {
            let mut sqe = sqe;
            sqe.cdw10 = (count - 1).into();
            dsm_ranges(&sqe, &data, &NS).map_err(Status::code)
        };
        assert_eq!(with(3), Ok(vec![(10, 5), (990, 10)]));
        assert_eq!(with(4), Err(Status::LBA_OUT_OF_RANGE));
        assert_eq!(with(5), Err(Status::DATA_SGL_LENGTH_INVALID));
    }

    #[test]
    fn fused_outcomes() {
        assert_eq!(fused(Status::SUCCESS), (Status::SUCCESS, Status::SUCCESS));
        assert_eq!(fused(Status::COMPARE_FAILURE), (Status::COMPARE_FAILURE, Status::ABORTED_FAILED_FUSED));
        assert_eq!(fused(Status::CAPACITY_EXCEEDED), (Status::SUCCESS, Status::CAPACITY_EXCEEDED));
        assert_eq!(status(bdev::Status::COMPARE_FAILURE.do_not_retry()), Status::COMPARE_FAILURE.with_dnr());
    }
}
