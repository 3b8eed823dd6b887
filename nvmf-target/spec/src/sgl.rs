//! SGL descriptors (NVMe Base 2.0 section 4.1.2) as NVMe over TCP uses them.

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use crate::wire::wire;

/// SGL Identifier byte: Data Block descriptor (type 0h), subtype address (0h).
pub const ID_DATA_BLOCK: u8 = 0x00;
/// SGL Identifier byte: Data Block descriptor (type 0h), subtype offset (1h): data in the capsule.
pub const ID_IN_CAPSULE: u8 = 0x01;
/// SGL Identifier byte: Segment descriptor (type 2h).
pub const ID_SEGMENT: u8 = 0x20;
/// SGL Identifier byte: Last Segment descriptor (type 3h).
pub const ID_LAST_SEGMENT: u8 = 0x30;
/// SGL Identifier byte: Keyed Data Block descriptor (type 4h): RDMA only.
pub const ID_KEYED: u8 = 0x40;
/// SGL Identifier byte: Transport Data Block descriptor (type 5h), subtype transport specific (Ah).
pub const ID_TRANSPORT: u8 = 0x5a;

wire! {
    /// SGL descriptor with a 4-byte length: Data Block, Segment, Transport Data Block
    /// (NVMe Base 2.0 section 4.1.2).
    pub struct Sgl: 16 {
        /// Address (data block), offset in the capsule's data (in-capsule), 0 (transport).
        0 => pub address: U64,
        /// Bytes.
        8 => pub length: U32,
        12 => _rsvd: [u8; 3],
        /// SGL Identifier: type in bits 7:4, subtype in bits 3:0.
        15 => pub id: u8,
    }
}

/// The meaning of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SglKind {
    /// Memory of the host at this address (PCIe), with its length in bytes.
    DataBlock {
        /// Bus address.
        address: u64,
        /// Bytes.
        len: u32,
    },
    /// Data within the command capsule. The caller checks `offset + len` against what the capsule carries.
    InCapsule {
        /// Bytes from the start of the in-capsule data (plus ICDOFF, which is 0 for TCP).
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Data that the transport moves: H2CData or C2HData.
    Transport {
        /// Bytes.
        len: u32,
    },
}

/// Why a descriptor was refused; both map to a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum SglError {
    /// A type or subtype that this transport does not have (status SGL Descriptor Type Invalid).
    #[error("SGL descriptor type {0:#04x} is not supported")]
    Type(u8),
}

impl SglError {
    /// The status that reports it.
    pub const fn status(&self) -> crate::Status {
        crate::Status::SGL_DESCRIPTOR_TYPE_INVALID
    }
}

impl Sgl {
    fn new(address: u64, length: u32, id: u8) -> Self {
        Self { address: U64::new(address), length: U32::new(length), id, ..Default::default() }
    }

    /// `len` bytes of host memory.
    pub fn data_block(address: u64, len: u32) -> Self {
        Self::new(address, len, ID_DATA_BLOCK)
    }

    /// `len` bytes in the capsule, from `offset`.
    pub fn in_capsule(offset: u64, len: u32) -> Self {
        Self::new(offset, len, ID_IN_CAPSULE)
    }

    /// `len` bytes that the transport moves in data PDUs.
    pub fn transport(len: u32) -> Self {
        Self::new(0, len, ID_TRANSPORT)
    }

    /// Descriptor type, bits 7:4 of the identifier.
    pub const fn descriptor_type(&self) -> u8 {
        self.id >> 4
    }

    /// Descriptor subtype, bits 3:0 of the identifier.
    pub const fn subtype(&self) -> u8 {
        self.id & 0xf
    }

    /// Decodes the descriptor of a fabrics command.
    pub fn kind(&self) -> Result<SglKind, SglError> {
        let len = self.length.get();
        match self.id {
            ID_DATA_BLOCK => Ok(SglKind::DataBlock { address: self.address.get(), len }),
            ID_IN_CAPSULE => Ok(SglKind::InCapsule { offset: self.address.get(), len }),
            ID_TRANSPORT => Ok(SglKind::Transport { len }),
            other => Err(SglError::Type(other)),
        }
    }

    /// The 16 bytes as two PRP entries, for a command with PSDT 0.
    pub fn as_prps(&self) -> [u64; 2] {
        let mut prps = [U64::ZERO; 2];
        prps.as_mut_bytes().copy_from_slice(self.as_bytes());
        [prps[0].get(), prps[1].get()]
    }

    /// Two PRP entries in the place of a descriptor (PCIe).
    pub fn from_prps(prp1: u64, prp2: u64) -> Self {
        let mut sgl = Self::default();
        sgl.as_mut_bytes().copy_from_slice([U64::new(prp1), U64::new(prp2)].as_bytes());
        sgl
    }
}
