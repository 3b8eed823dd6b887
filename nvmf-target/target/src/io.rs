//! I/O commands of the NVM command set: checked against the namespace and turned into what a block device does. No I/O.

use cryptfold_bdev::{self as bdev, Op};
use cryptfold_nvmf_spec::opcode::{Direction, Io};
use cryptfold_nvmf_spec::status::Sct;
use cryptfold_nvmf_spec::{Sqe, Status, copy, dsm};

use crate::reservation::{self, Access};

/// Bytes that one Copy copies at most: they are read before anything is written, so that ranges may overlap.
pub const COPY_MAX_BYTES: u32 = 1 << 20;
/// Source ranges of one Copy.
pub const COPY_MAX_RANGES: u32 = 128;
/// Bytes that a task reads at once.
pub const STEP_BYTES: u64 = 1 << 20;

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
    /// The device remembers uncorrectable blocks.
    pub can_uncorrectable: bool,
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
    /// Verify: the range is read, and nothing is transferred.
    Verify {
        /// First block.
        lba: u64,
        /// Blocks.
        blocks: u64,
    },
    /// Copy with so many source ranges (1..=128) in its data.
    Copy {
        /// Entries in the data.
        count: u32,
    },
    /// Reservation Register, Acquire or Release with so many bytes of data.
    Reservation {
        /// Bytes of data.
        bytes: u32,
    },
    /// Reservation Report of at most so many bytes.
    ReservationReport {
        /// Bytes that the host asks for.
        bytes: u32,
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
        Io::Copy => return plan_copy(sqe),
        Io::ReservationRegister | Io::ReservationAcquire | Io::ReservationRelease => {
            return Ok(Plan::Reservation { bytes: reservation::data_bytes(sqe, opcode) as u32 });
        }
        Io::ReservationReport => {
            let bytes = u32::try_from(reservation::data_bytes(sqe, opcode));
            return Ok(Plan::ReservationReport {
                bytes: bytes.map_err(|_| Status::INVALID_FIELD.with_dnr())?,
            });
        }
        Io::Read => Op::Read,
        Io::Write => Op::Write,
        Io::Compare => Op::Compare,
        Io::WriteZeroes if sqe.rw().deac() != 0 && ns.deallocate_zeroes => Op::Unmap,
        Io::WriteZeroes => Op::WriteZeroes,
        Io::WriteUncorrectable if ns.can_uncorrectable => Op::WriteUncorrectable,
        // Checked below, and then read.
        Io::Verify => Op::Read,
        _ => return Err(Status::INVALID_OPCODE.with_dnr()),
    };
    let (lba, blocks) = (sqe.slba(), u64::from(sqe.block_count()));
    if lba.checked_add(blocks).is_none_or(|end| end > ns.blocks) {
        return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
    }
    if opcode == Io::Verify {
        return Ok(Plan::Verify { lba, blocks });
    }
    let bytes = match op {
        Op::Unmap | Op::WriteZeroes | Op::WriteUncorrectable => 0,
        // At most 65,536 blocks of 4,096 bytes: below 4 GiB.
        _ => sqe.block_count() * ns.block_bytes,
    };
    Ok(Plan::Block { op, lba, blocks, fua: sqe.rw().fua() != 0, bytes })
}

fn plan_copy(sqe: &Sqe) -> Result<Plan, Status> {
    let control = copy::control(sqe);
    if control.desfmt() != 0 {
        return Err(Status::INVALID_FIELD.with_dnr());
    }
    let count = control.nr() + 1;
    if count > COPY_MAX_RANGES {
        return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED.with_dnr());
    }
    Ok(Plan::Copy { count })
}

impl Plan {
    /// What it does to the namespace.
    pub const fn access(&self) -> Access {
        match self {
            Plan::Block { op: Op::Read | Op::Compare, .. } | Plan::Verify { .. } => Access::Read,
            Plan::Block { op: Op::Flush, .. } => Access::Flush,
            Plan::Block { .. } | Plan::Ranges { .. } | Plan::Copy { .. } => Access::Write,
            Plan::Reservation { .. } | Plan::ReservationReport { .. } => Access::Free,
        }
    }

    /// Whether it is carried out in steps that can be stopped between.
    pub const fn is_task(&self) -> bool {
        matches!(self, Plan::Ranges { .. } | Plan::Copy { .. } | Plan::Verify { .. })
    }

    /// Which way the data goes.
    pub const fn direction(&self) -> Direction {
        match self {
            Plan::Ranges { .. } | Plan::Copy { .. } | Plan::Reservation { .. } => Direction::HostToController,
            Plan::ReservationReport { .. } => Direction::ControllerToHost,
            Plan::Verify { .. } | Plan::Block { bytes: 0, .. } => Direction::None,
            Plan::Block { op: Op::Read, .. } => Direction::ControllerToHost,
            Plan::Block { .. } => Direction::HostToController,
        }
    }

    /// Bytes of data the command has.
    pub const fn bytes(&self) -> u32 {
        match self {
            Plan::Ranges { count, .. } => *count * DSM_RANGE_BYTES,
            Plan::Copy { count } => *count * COPY_RANGE_BYTES,
            Plan::Verify { .. } => 0,
            Plan::Block { bytes, .. } | Plan::Reservation { bytes } | Plan::ReservationReport { bytes } => {
                *bytes
            }
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
            Plan::Copy { .. } => sgl_bytes >= self.bytes() && sgl_bytes <= COPY_MAX_RANGES * COPY_RANGE_BYTES,
            Plan::Reservation { .. } => sgl_bytes >= self.bytes() && sgl_bytes <= 4096,
            Plan::ReservationReport { .. } => sgl_bytes >= self.bytes(),
            Plan::Block { .. } | Plan::Verify { .. } => sgl_bytes == self.bytes(),
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

/// Bytes of a Copy source range.
const COPY_RANGE_BYTES: u32 = 32;

/// The source ranges (LBA, blocks) of a Copy, and how many blocks they are together.
///
/// # Errors
/// LBA Out of Range when one, or the destination, leaves the namespace; Command Size Limit Exceeded when one or all of
/// them are longer than Identify says.
pub fn copy_ranges(sqe: &Sqe, data: &[u8], ns: &Geometry) -> Result<(Vec<(u64, u64)>, u64), Status> {
    let most = copy_max_blocks(ns.block_bytes);
    let mut total = 0;
    let mut ranges = Vec::new();
    for range in copy::ranges(sqe, data)? {
        let (lba, blocks) = range.within(ns.blocks)?;
        total += blocks;
        if total > most {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED.with_dnr());
        }
        ranges.push((lba, u64::from(blocks)));
    }
    if sqe.slba().checked_add(total.into()).is_none_or(|end| end > ns.blocks) {
        return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
    }
    Ok((ranges, total.into()))
}

/// Blocks of one Copy (MCL), and of each of its ranges (MSSRL).
pub const fn copy_max_blocks(block_bytes: u32) -> u32 {
    COPY_MAX_BYTES / block_bytes
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

    const NS: Geometry = Geometry {
        block_bytes: 512,
        blocks: 1000,
        deallocate_zeroes: true,
        can_deallocate: true,
        can_uncorrectable: true,
    };

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
        let known: Vec<Io> = Io::ALL.iter().copied().filter(|o| *o != Io::Fabrics).collect();
        for opcode in 0..=255u8 {
            let mut sqe = rw(Io::Read, 0, 1, RwControl(0));
            sqe.opcode = opcode;
            let ok = known.iter().any(|k| *k as u8 == opcode);
            assert_eq!(plan(&sqe, &NS).is_ok(), ok, "opcode {opcode:#x}");
            let simple = Geometry { can_uncorrectable: false, ..NS };
            let ok = ok && opcode != Io::WriteUncorrectable as u8;
            assert_eq!(plan(&sqe, &simple).is_ok(), ok, "opcode {opcode:#x}");
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
    fn copy() {
        let mut sqe = Sqe::io(Io::Copy, Cid(0), Nsid(1));
        sqe.set_slba(100);
        sqe.cdw12 = 1.into();
        assert_eq!(plan(&sqe, &NS), Ok(Plan::Copy { count: 2 }));
        let range = |lba: u64, blocks: u16| {
            let mut raw = [0u8; 32];
            raw[8..16].copy_from_slice(&lba.to_le_bytes());
            raw[16..18].copy_from_slice(&(blocks - 1).to_le_bytes());
            raw.to_vec()
        };
        let ranges = |sqe: &Sqe, a: Vec<u8>, b: Vec<u8>, ns: &Geometry| {
            copy_ranges(sqe, &[a, b].concat(), ns).map_err(Status::code)
        };
        let both = Ok((vec![(0, 3), (990, 10)], 13));
        assert_eq!(ranges(&sqe, range(0, 3), range(990, 10), &NS), both);
        assert_eq!(ranges(&sqe, range(0, 3), range(990, 11), &NS), Err(Status::LBA_OUT_OF_RANGE));
        let large = Geometry { blocks: 1 << 20, ..NS };
        assert!(ranges(&sqe, range(0, 1024), range(0, 1024), &large).is_ok());
        let limit = Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
        assert_eq!(ranges(&sqe, range(0, 1024), range(0, 1025), &large), limit);
        sqe.set_slba(988);
        assert_eq!(ranges(&sqe, range(0, 3), range(0, 10), &NS), Err(Status::LBA_OUT_OF_RANGE));
        sqe.cdw12 = 128.into();
        assert_eq!(plan(&sqe, &NS).map_err(Status::code), Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED));
        sqe.cdw12 = 0x100.into();
        assert_eq!(plan(&sqe, &NS).map_err(Status::code), Err(Status::INVALID_FIELD));
    }

    #[test]
    fn fused_outcomes() {
        assert_eq!(fused(Status::SUCCESS), (Status::SUCCESS, Status::SUCCESS));
        assert_eq!(fused(Status::COMPARE_FAILURE), (Status::COMPARE_FAILURE, Status::ABORTED_FAILED_FUSED));
        assert_eq!(fused(Status::CAPACITY_EXCEEDED), (Status::SUCCESS, Status::CAPACITY_EXCEEDED));
        assert_eq!(status(bdev::Status::COMPARE_FAILURE.do_not_retry()), Status::COMPARE_FAILURE.with_dnr());
    }
}
