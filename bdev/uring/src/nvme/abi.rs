//! Numbers and structures of linux/nvme_ioctl.h, and NVMe commands in them.

use cryptfold_nvmf_spec::Sqe;
use zerocopy::{Immutable, IntoBytes};

/// `_IO('N', 0x40)`: replies the namespace's NSID.
pub const IOCTL_ID: libc::c_ulong = 0x4e40;
/// `_IOWR('N', 0x41, struct nvme_passthru_cmd)`.
pub const IOCTL_ADMIN_CMD: libc::c_ulong = 0xc048_4e41;
/// `_IOWR('N', 0x80, struct nvme_uring_cmd)`.
pub const URING_CMD_IO: u32 = 0xc048_4e80;
/// `_IOWR('N', 0x81, struct nvme_uring_cmd)`: its data is a vector of pieces, whose number is `data_len`.
pub const URING_CMD_IO_VEC: u32 = 0xc048_4e81;

/// `struct nvme_passthru_cmd`; `struct nvme_uring_cmd` differs in its last word, which is reserved there. Native byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, Immutable)]
pub struct Command {
    pub opcode: u8,
    pub flags: u8,
    pub rsvd1: u16,
    pub nsid: u32,
    pub cdw2: u32,
    pub cdw3: u32,
    pub metadata: u64,
    pub addr: u64,
    pub metadata_len: u32,
    /// Bytes, or pieces of a vector.
    pub data_len: u32,
    pub cdw10: u32,
    pub cdw11: u32,
    pub cdw12: u32,
    pub cdw13: u32,
    pub cdw14: u32,
    pub cdw15: u32,
    /// 0: what the kernel takes by default.
    pub timeout_ms: u32,
    /// Dword 0 of an admin command's completion.
    pub result: u32,
}

const _: () = assert!(size_of::<Command>() == 72);

impl Command {
    /// A command and where its data is. The kernel makes the data pointer itself and wants PSDT and FUSE zero.
    pub fn new(sqe: &Sqe, addr: u64, data_len: u32) -> Command {
        Command {
            opcode: sqe.opcode,
            nsid: sqe.nsid.get(),
            cdw2: sqe.cdw2.get(),
            cdw3: sqe.cdw3.get(),
            addr,
            data_len,
            cdw10: sqe.cdw10.get(),
            cdw11: sqe.cdw11.get(),
            cdw12: sqe.cdw12.get(),
            cdw13: sqe.cdw13.get(),
            cdw14: sqe.cdw14.get(),
            cdw15: sqe.cdw15.get(),
            ..Default::default()
        }
    }

    /// The bytes that an entry of the ring carries: 72 of its 80.
    pub fn to_entry(self) -> [u8; 80] {
        let mut bytes = [0; 80];
        bytes[..72].copy_from_slice(self.as_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cryptfold_bdev::{Io, Op};
    use cryptfold_bdev_nvme::identity::{Target, command};
    use cryptfold_nvmf_spec::Nsid;

    const TARGET: Target = Target { nsid: Nsid(7), block_shift: 12, max_blocks: 32, max_zeroes: 16 };

    /// The command of an I/O: (opcode, dwords 10 to 15), as the header's offsets have them.
    fn entry(op: Op, fua: bool) -> [u8; 80] {
        let mut io = Io::new(op, 0x1_0000_0002, 3);
        io.fua = fua;
        let (sqe, range) = command(&TARGET, &io, io.lba, io.blocks);
        assert_eq!(range, (op == Op::Unmap).then_some((0x1_0000_0002, 3)));
        Command::new(&sqe, 0x1122_3344_5566_7788, 12288).to_entry()
    }

    fn u32_at(entry: &[u8; 80], at: usize) -> u32 {
        u32::from_ne_bytes(entry[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn numbers_of_the_header() {
        let iowr = |n: u64| 3 << 30 | (size_of::<Command>() as u64) << 16 | u64::from(b'N') << 8 | n;
        assert_eq!(IOCTL_ID, u64::from(b'N') << 8 | 0x40);
        assert_eq!(IOCTL_ADMIN_CMD, iowr(0x41));
        assert_eq!((u64::from(URING_CMD_IO), u64::from(URING_CMD_IO_VEC)), (iowr(0x80), iowr(0x81)));
    }

    #[test]
    fn commands_as_the_kernel_reads_them() {
        for (op, fua, opcode, dwords) in [
            (Op::Read, true, 0x02, [2, 1, 2]),
            (Op::Write, false, 0x01, [2, 1, 2]),
            (Op::Write, true, 0x01, [2, 1, 1 << 30 | 2]),
            (Op::Compare, false, 0x05, [2, 1, 2]),
            (Op::WriteZeroes, true, 0x08, [2, 1, 1 << 30 | 2]),
            (Op::WriteUncorrectable, false, 0x04, [2, 1, 2]),
            (Op::Unmap, false, 0x09, [0, 4, 0]),
            (Op::Flush, false, 0x00, [0, 0, 0]),
        ] {
            let e = entry(op, fua);
            // nvme_uring_cmd: opcode 0, flags 1, nsid 4, cdw2 8, metadata 16, addr 24, metadata_len 32, data_len 36, cdw10 40,
            // ..., cdw15 60, timeout_ms 64, rsvd2 68; then nothing.
            assert_eq!((e[0], u32_at(&e, 0) >> 8, u32_at(&e, 4)), (opcode, 0, 7), "{op:?}");
            assert!(e[8..24].iter().chain(&e[32..36]).chain(&e[52..]).all(|b| *b == 0), "{op:?}");
            assert_eq!(u64::from_ne_bytes(e[24..32].try_into().unwrap()), 0x1122_3344_5566_7788);
            assert_eq!(u32_at(&e, 36), 12288);
            assert_eq!([40, 44, 48].map(|at| u32_at(&e, at)), dwords, "{op:?}");
        }
    }
}
