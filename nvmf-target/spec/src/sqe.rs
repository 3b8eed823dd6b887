//! Submission queue entry (NVMe Base 2.0 section 3.3.3.1) and the typed view of each command's dwords.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::ids::{Cid, Nsid, Qid};
use crate::opcode::{Admin, Io};
use crate::sgl::Sgl;
use crate::wire::wire;

wire! {
    /// 64-byte submission queue entry, common format (NVMe Base 2.0 section 3.3.3.1). Fabrics commands reuse the bytes
    /// from 4 on, see [`crate::fabrics`].
    pub struct Sqe: 64 {
        /// OPC, opcode.
        0 => pub opcode: u8,
        /// FUSE in bits 1:0, PSDT in bits 7:6.
        1 => pub flags: u8,
        /// CID, command identifier.
        2 => pub cid: U16,
        /// NSID, namespace identifier.
        4 => pub nsid: U32,
        /// CDW2, command specific.
        8 => pub cdw2: U32,
        /// CDW3, command specific.
        12 => pub cdw3: U32,
        /// MPTR, metadata pointer; fabrics: reserved.
        16 => pub mptr: [U32; 2],
        /// DPTR, SGL entry 1 (or PRP entries 1 and 2).
        24 => pub sgl: Sgl,
        /// CDW10, command specific.
        40 => pub cdw10: U32,
        /// CDW11, command specific.
        44 => pub cdw11: U32,
        /// CDW12, command specific.
        48 => pub cdw12: U32,
        /// CDW13, command specific.
        52 => pub cdw13: U32,
        /// CDW14, command specific.
        56 => pub cdw14: U32,
        /// CDW15, command specific.
        60 => pub cdw15: U32,
    }
}

/// FUSE: position in a fused operation, bits 1:0 of byte 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Fuse {
    /// 00b: a command by itself.
    #[default]
    None,
    /// 01b: first command of a fused operation.
    First,
    /// 10b: second command of a fused operation.
    Second,
    /// 11b: reserved.
    Reserved,
}

/// PSDT: PRP or SGL for data transfer, bits 7:6 of byte 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Psdt {
    /// 00b: PRPs (PCIe only).
    #[default]
    Prp,
    /// 01b: SGLs; MPTR is the address of one contiguous buffer. What fabrics hosts send.
    Sgl,
    /// 10b: SGLs; MPTR is the address of an SGL segment.
    SglMetadataSegment,
    /// 11b: reserved.
    Reserved,
}

impl Sqe {
    /// An entry with this opcode, all else zero.
    pub fn new(opcode: u8) -> Self {
        Self { opcode, ..Default::default() }
    }

    /// An admin command with PSDT = SGL.
    pub fn admin(opcode: Admin, cid: Cid, nsid: Nsid) -> Self {
        Self::new(opcode as u8).with_ids(cid, nsid)
    }

    /// An I/O command with PSDT = SGL.
    pub fn io(opcode: Io, cid: Cid, nsid: Nsid) -> Self {
        Self::new(opcode as u8).with_ids(cid, nsid)
    }

    fn with_ids(mut self, cid: Cid, nsid: Nsid) -> Self {
        self.cid = U16::new(cid.0);
        self.nsid = U32::new(nsid.0);
        self.set_psdt(Psdt::Sgl);
        self
    }

    /// CID.
    pub const fn cid(&self) -> Cid {
        Cid(self.cid.get())
    }

    /// NSID.
    pub const fn nsid(&self) -> Nsid {
        Nsid(self.nsid.get())
    }

    /// FUSE.
    pub const fn fuse(&self) -> Fuse {
        match self.flags & 3 {
            0 => Fuse::None,
            1 => Fuse::First,
            2 => Fuse::Second,
            _ => Fuse::Reserved,
        }
    }

    /// Sets FUSE.
    pub const fn set_fuse(&mut self, fuse: Fuse) {
        self.flags = (self.flags & !3) | fuse as u8;
    }

    /// PSDT.
    pub const fn psdt(&self) -> Psdt {
        match self.flags >> 6 {
            0 => Psdt::Prp,
            1 => Psdt::Sgl,
            2 => Psdt::SglMetadataSegment,
            _ => Psdt::Reserved,
        }
    }

    /// Sets PSDT.
    pub const fn set_psdt(&mut self, psdt: Psdt) {
        self.flags = (self.flags & !0xc0) | ((psdt as u8) << 6);
    }

    /// The same 64 bytes as another 64-byte command format.
    pub fn view<T>(&self) -> &T
    where
        T: FromBytes + KnownLayout + Immutable + zerocopy::Unaligned,
    {
        const { assert!(size_of::<T>() == 64) };
        // Same size, no alignment, any bytes are valid: both checks hold at compile time.
        T::ref_from_bytes(self.as_bytes()).expect("sizes are equal and T is unaligned")
    }

    /// The other direction of [`Sqe::view`].
    pub fn from_view<T: IntoBytes + Immutable>(command: &T) -> Self {
        const { assert!(size_of::<T>() == 64) };
        Self::read_from_bytes(command.as_bytes()).expect("sizes are equal")
    }

    /// CDW10 and CDW11 as the starting LBA, SLBA (NVM 1.0 section 3.2), blocks.
    pub const fn slba(&self) -> u64 {
        self.cdw10.get() as u64 | (self.cdw11.get() as u64) << 32
    }

    /// Sets SLBA.
    pub const fn set_slba(&mut self, slba: u64) {
        self.cdw10 = U32::new(slba as u32);
        self.cdw11 = U32::new((slba >> 32) as u32);
    }

    /// Number of blocks: NLB of CDW12 bits 15:0, which is 0's based, plus one: 1..=65,536.
    pub const fn block_count(&self) -> u32 {
        (self.cdw12.get() & 0xffff) + 1
    }

    /// CDW12 of Read, Write, Compare, Verify, Write Zeroes and Write Uncorrectable.
    pub const fn rw(&self) -> RwControl {
        RwControl(self.cdw12.get())
    }

    /// Sets SLBA and NLB; `blocks` is 1..=65,536, `control` the other bits of CDW12.
    pub const fn set_rw(&mut self, slba: u64, blocks: u32, control: RwControl) {
        self.set_slba(slba);
        self.cdw12 = U32::new(control.with_nlb(blocks.wrapping_sub(1)).0);
    }
}

crate::wire::bits! {
    /// CDW12 of the NVM command set's block commands (NVM 1.0 section 3.2).
    pub struct RwControl(u32) {
        /// NLB: number of blocks, 0's based.
        nlb, with_nlb: 0, 16;
        /// STC: storage tag check.
        stc, with_stc: 24, 1;
        /// DEAC (Write Zeroes): deallocate.
        deac, with_deac: 25, 1;
        /// PRINFO: protection information; PRACT in bit 3, PRCHK in bits 2:0.
        prinfo, with_prinfo: 26, 4;
        /// FUA: force unit access.
        fua, with_fua: 30, 1;
        /// LR: limited retry.
        lr, with_lr: 31, 1;
    }
}

crate::wire::bits! {
    /// CDW10 of Identify (NVMe Base 2.0 section 5.17).
    pub struct IdentifyCdw10(u32) {
        /// CNS: which structure; see [`crate::identify::Cns`].
        cns, with_cns: 0, 8;
        /// CNTID: controller identifier, for the controller lists and the secondary controller list.
        cntid, with_cntid: 16, 16;
    }
}

crate::wire::bits! {
    /// CDW11 of Identify (NVMe Base 2.0 section 5.17).
    pub struct IdentifyCdw11(u32) {
        /// CNSSID: NVM set, endurance group or domain identifier.
        cnssid, with_cnssid: 0, 16;
        /// CSI: command set; see [`crate::identify::Csi`].
        csi, with_csi: 24, 8;
    }
}

crate::wire::bits! {
    /// CDW10 of Abort (NVMe Base 2.0 section 5.1).
    pub struct AbortCdw10(u32) {
        /// SQID: submission queue of the command to abort.
        sqid, with_sqid: 0, 16;
        /// CID: the command to abort.
        cid, with_cid: 16, 16;
    }
}

impl AbortCdw10 {
    /// The command to abort.
    pub const fn target(self) -> (Qid, Cid) {
        (Qid(self.sqid() as u16), Cid(self.cid() as u16))
    }
}

crate::wire::bits! {
    /// Dword 0 of Abort's completion (NVMe Base 2.0 section 5.1).
    pub struct AbortResult(u32) {
        /// 1: the command was not aborted.
        not_aborted, with_not_aborted: 0, 1;
    }
}

crate::wire::bits! {
    /// CDW10 of Get Features (NVMe Base 2.0 section 5.15).
    pub struct GetFeaturesCdw10(u32) {
        /// FID: feature identifier, see [`crate::features::Fid`].
        fid, with_fid: 0, 8;
        /// SEL: 0 current, 1 default, 2 saved, 3 supported capabilities.
        sel, with_sel: 8, 3;
    }
}

crate::wire::bits! {
    /// CDW10 of Set Features (NVMe Base 2.0 section 5.27).
    pub struct SetFeaturesCdw10(u32) {
        /// FID: feature identifier, see [`crate::features::Fid`].
        fid, with_fid: 0, 8;
        /// SV: save across power cycles and resets.
        sv, with_sv: 31, 1;
    }
}
