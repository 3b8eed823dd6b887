//! Identify Namespace (CNS 00h), its command set specific (05h) and independent (08h) parts.

use zerocopy::little_endian::{U16, U32, U64, U128};

use crate::wire::wire;

/// NSFEAT bits (byte 24 of CNS 00h, byte 0 of CNS 08h where noted).
pub mod nsfeat {
    /// Thin provisioning: NCAP may be less than NSZE.
    pub const THIN: u8 = 1 << 0;
    /// NAWUN, NAWUPF, NACWU are this namespace's.
    pub const ATOMICS: u8 = 1 << 1;
    /// Deallocated or Unwritten Logical Block error supported.
    pub const DAE: u8 = 1 << 2;
    /// NGUID and EUI64 are never reused (also in CNS 08h).
    pub const UID_REUSE: u8 = 1 << 3;
    /// NPWG, NPWA, NPDG, NPDA, NOWS are valid.
    pub const OPTIMAL_IO: u8 = 1 << 4;
}

wire! {
    /// LBA Format (NVM 1.0 section 4.1.5).
    pub struct LbaFormat: 4 {
        /// MS: metadata, bytes per block.
        0 => pub ms: U16,
        /// LBADS: data, 2^n bytes per block; at least 9.
        2 => pub lbads: u8,
        /// RP in bits 1:0: relative performance, 0 best.
        3 => pub rp: u8,
    }
}

wire! {
    /// Identify Namespace of the NVM command set (NVM 1.0 section 4.1.5).
    pub struct NamespaceIdentify: 4096 {
        /// NSZE: size, blocks. 0: the namespace is not active.
        0 => pub nsze: U64,
        /// NCAP: capacity, blocks.
        8 => pub ncap: U64,
        /// NUSE: blocks allocated.
        16 => pub nuse: U64,
        /// NSFEAT, see [`nsfeat`].
        24 => pub nsfeat: u8,
        /// NLBAF: LBA formats, 0's based.
        25 => pub nlbaf: u8,
        /// FLBAS: format in use, bits 3:0 (and 6:5); bit 4 extended metadata.
        26 => pub flbas: u8,
        /// MC: metadata capabilities.
        27 => pub mc: u8,
        /// DPC: protection capabilities.
        28 => pub dpc: u8,
        /// DPS: protection settings.
        29 => pub dps: u8,
        /// NMIC: bit 0, may be attached to several controllers.
        30 => pub nmic: u8,
        /// RESCAP: reservation capabilities, one bit per type; bit 0 persist through power loss.
        31 => pub rescap: u8,
        /// FPI: format progress.
        32 => pub fpi: u8,
        /// DLFEAT: bits 2:0 deallocated blocks read as 001b zeros, 010b FFh; bit 3 Write Zeroes deallocates.
        33 => pub dlfeat: u8,
        /// NAWUN: atomic write unit, blocks, 0's based.
        34 => pub nawun: U16,
        /// NAWUPF: atomic write unit over a power failure, blocks, 0's based.
        36 => pub nawupf: U16,
        /// NACWU: atomic compare and write unit, blocks, 0's based.
        38 => pub nacwu: U16,
        /// NABSN: atomic boundary, blocks, 0's based.
        40 => pub nabsn: U16,
        /// NABO: atomic boundary offset, blocks.
        42 => pub nabo: U16,
        /// NABSPF: atomic boundary over a power failure, blocks, 0's based.
        44 => pub nabspf: U16,
        /// NOIOB: optimal I/O boundary, blocks; 0 = none.
        46 => pub noiob: U16,
        /// NVMCAP: capacity, bytes.
        48 => pub nvmcap: U128,
        /// NPWG: preferred write granularity, blocks, 0's based.
        64 => pub npwg: U16,
        /// NPWA: preferred write alignment, blocks, 0's based.
        66 => pub npwa: U16,
        /// NPDG: preferred deallocate granularity, blocks, 0's based.
        68 => pub npdg: U16,
        /// NPDA: preferred deallocate alignment, blocks, 0's based.
        70 => pub npda: U16,
        /// NOWS: optimal write size, blocks, 0's based.
        72 => pub nows: U16,
        /// MSSRL: blocks in one source range of Copy.
        74 => pub mssrl: U16,
        /// MCL: blocks in one Copy.
        76 => pub mcl: U32,
        /// MSRC: source ranges in one Copy, 0's based.
        80 => pub msrc: u8,
        81 => _rsvd81: u8,
        /// NULBAF: formats with unique attributes.
        82 => pub nulbaf: u8,
        83 => _rsvd83: [u8; 9],
        /// ANAGRPID: ANA group; 0 = none.
        92 => pub anagrpid: U32,
        96 => _rsvd96: [u8; 3],
        /// NSATTR: bit 0, write protected.
        99 => pub nsattr: u8,
        /// NVMSETID: NVM set.
        100 => pub nvmsetid: U16,
        /// ENDGID: endurance group.
        102 => pub endgid: U16,
        /// NGUID, big-endian; zeros = none.
        104 => pub nguid: [u8; 16],
        /// EUI64, big-endian; zeros = none.
        120 => pub eui64: [u8; 8],
        /// LBA formats 0 to 63.
        128 => pub lbaf: [LbaFormat; 64],
        /// Vendor specific.
        384 => pub vs: [u8; 3712],
    }
}

impl NamespaceIdentify {
    /// Of `atomic` blocks that a power failure never tears, the largest power of two that is not torn wherever it is aligned to
    /// itself: what crosses a boundary (NABSPF, NABO) may be torn there (NVM 1.0 section 2.1.4).
    pub fn aligned_atomic_blocks(&self, atomic: u32) -> u32 {
        let mut blocks = 1 << atomic.max(1).ilog2();
        if self.nabspf.get() != 0 {
            let boundary = u32::from(self.nabspf.get()) + 1;
            blocks = blocks.min(1 << boundary.trailing_zeros());
            if self.nabo.get() != 0 {
                blocks = blocks.min(1 << self.nabo.get().trailing_zeros());
            }
        }
        blocks
    }

    /// A namespace with one LBA format: `blocks` of 2^`lbads` bytes, all allocated.
    pub fn new(blocks: u64, lbads: u8) -> Self {
        let mut id = Self {
            nsze: U64::new(blocks),
            ncap: U64::new(blocks),
            nuse: U64::new(blocks),
            ..Default::default()
        };
        id.lbaf[0].lbads = lbads;
        id
    }

    /// The LBA format in use: FLBAS bits 3:0, and 6:5 as its upper bits.
    pub fn format(&self) -> &LbaFormat {
        let index = self.flbas & 0xf | (self.flbas >> 5 & 3) << 4;
        &self.lbaf[usize::from(index)]
    }

    /// Bytes of a block in the format in use; `None` if it is less than 512 or more than 2^31.
    pub fn block_bytes(&self) -> Option<u32> {
        let lbads = self.format().lbads;
        (9..=31).contains(&lbads).then(|| 1 << lbads)
    }
}

wire! {
    /// NVM command set specific Identify Namespace (CNS 05h, CSI 00h; NVM 1.0 section 4.1.5).
    pub struct NvmNamespace: 4096 {
        /// LBSTM: storage tag mask.
        0 => pub lbstm: U64,
        /// PIC: protection information capabilities.
        8 => pub pic: u8,
        9 => _rsvd9: [u8; 3],
        /// ELBAF: extended LBA formats 0 to 63.
        12 => pub elbaf: [U32; 64],
        268 => _rsvd268: [u8; 3828],
    }
}

wire! {
    /// Command set independent Identify Namespace (CNS 08h; NVMe Base 2.0 section 5.17.2).
    pub struct IndependentNamespace: 4096 {
        /// NSFEAT: bit 3 identifiers are not reused, bit 4 rotational medium.
        0 => pub nsfeat: u8,
        /// NMIC: bit 0, may be attached to several controllers.
        1 => pub nmic: u8,
        /// RESCAP: reservation capabilities.
        2 => pub rescap: u8,
        /// FPI: format progress.
        3 => pub fpi: u8,
        /// ANAGRPID: ANA group; 0 = none.
        4 => pub anagrpid: U32,
        /// NSATTR: bit 0, write protected.
        8 => pub nsattr: u8,
        9 => _rsvd9: u8,
        /// NVMSETID: NVM set.
        10 => pub nvmsetid: U16,
        /// ENDGID: endurance group.
        12 => pub endgid: U16,
        /// NSTAT: bit 0, ready.
        14 => pub nstat: u8,
        15 => _rsvd15: [u8; 4081],
    }
}
