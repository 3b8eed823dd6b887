//! NVMe/TCP protocol data units (NVM Express TCP Transport Specification 1.0, section 3.6).
//!
//! Owns the layout of every PDU header, the flags, the error codes of termination requests, the builders
//! ([`build`]) and the I/O-free stream parser ([`parse`]). Lengths and offsets are bytes; offsets count from
//! the first byte of the PDU.
//!
//! A PDU on the wire is `header (HLEN) | HDGST? | PAD | DATA | DDGST?`. Its length PLEN covers all of that; PDO is
//! the offset of DATA. Digests and alignment are agreed once per connection by ICReq and ICResp.
//!
//! What we do with reserved bits: they are written zero and not looked at on receipt, as section 1.4 of the
//! Base specification allows; a later revision may give them a meaning.

pub mod build;
pub mod digest;
mod error;
pub mod parse;

use zerocopy::little_endian::{U16, U32};

use crate::cqe::Cqe;
use crate::sqe::Sqe;
use crate::wire::wire;
pub use digest::{DIGEST_BYTES, Digest};
pub use error::{Fes, PduError, Term};
pub use parse::{Event, Header, Layout, Limits, Parser, Pdu, Progress, Unverified};

/// Bytes of the common header.
pub const COMMON_HDR_BYTES: usize = 8;
/// The longest PDU header (ICReq, ICResp).
pub const MAX_HDR_BYTES: usize = 128;
/// The longest termination request: its header and 128 bytes of the offending one.
pub const MAX_TERM_BYTES: usize = 152;
/// Smallest legal MAXH2CDATA (section 3.6.2.3), bytes.
pub const MIN_MAXH2CDATA_BYTES: u32 = 4096;
/// Largest HPDA or CPDA value: 32 dwords (sections 3.6.2.2, 3.6.2.3), 0's based.
pub const MAX_PDA: u8 = 31;
/// Capsule data that every controller accepts on the Admin Queue and for Connect, bytes
/// (section 3.6.2.6: 8,192 until IOCCSZ applies).
pub const ADMIN_CAPSULE_DATA_BYTES: u32 = 8192;
/// PFV of NVMe/TCP 1.0 and 1.1: protocol format version 0.
pub const PFV: u16 = 0;
/// IANA port of I/O controllers, and of discovery controllers reached over TCP.
pub const IO_PORT: u16 = 4420;
/// IANA port registered for NVMe-oF discovery (NVMe/TCP 1.0 section 3.1).
pub const DISCOVERY_PORT: u16 = 8009;

/// FLAGS bit: the header digest is present (types 04h and up).
pub const FLAG_HDGST: u8 = 1 << 0;
/// FLAGS bit: the data digest is present (CapsuleCmd, H2CData, C2HData).
pub const FLAG_DDGST: u8 = 1 << 1;
/// FLAGS bit: last data PDU of the R2T (H2CData) or of the command (C2HData).
pub const FLAG_LAST: u8 = 1 << 2;
/// FLAGS bit of C2HData: the command succeeded and no CapsuleResp follows; only together with LAST.
pub const FLAG_SUCCESS: u8 = 1 << 3;

/// DGST bit of ICReq and ICResp: header digest.
pub const DGST_HEADER: u8 = 1 << 0;
/// DGST bit of ICReq and ICResp: data digest.
pub const DGST_DATA: u8 = 1 << 1;

/// Byte offsets of header fields, as FEI reports them.
pub mod field {
    /// PDU-Type, common header.
    pub const TYPE: u32 = 0;
    /// FLAGS, common header.
    pub const FLAGS: u32 = 1;
    /// HLEN, common header.
    pub const HLEN: u32 = 2;
    /// PDO, common header.
    pub const PDO: u32 = 3;
    /// PLEN, common header.
    pub const PLEN: u32 = 4;
    /// PFV of ICReq and ICResp.
    pub const PFV: u32 = 8;
    /// HPDA of ICReq, CPDA of ICResp.
    pub const PDA: u32 = 10;
    /// DGST of ICReq and ICResp.
    pub const DGST: u32 = 11;
    /// MAXH2CDATA of ICResp.
    pub const MAXH2CDATA: u32 = 12;
    /// CCCID of H2CData, C2HData, R2T.
    pub const CCCID: u32 = 8;
    /// TTAG of H2CData and R2T.
    pub const TTAG: u32 = 10;
    /// DATAO of H2CData and C2HData, R2TO of R2T.
    pub const DATAO: u32 = 12;
    /// DATAL of H2CData and C2HData, R2TL of R2T.
    pub const DATAL: u32 = 16;
}

/// Which end receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The target: receives ICReq, H2CTermReq, CapsuleCmd, H2CData.
    Controller,
    /// The initiator: receives ICResp, C2HTermReq, CapsuleResp, C2HData, R2T.
    Host,
}

/// PDU types (section 3.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PduType {
    /// Initialize Connection Request.
    IcReq = 0x00,
    /// Initialize Connection Response.
    IcResp = 0x01,
    /// Host to Controller Terminate Connection Request.
    H2cTermReq = 0x02,
    /// Controller to Host Terminate Connection Request.
    C2hTermReq = 0x03,
    /// Command Capsule.
    CapsuleCmd = 0x04,
    /// Response Capsule.
    CapsuleResp = 0x05,
    /// Host to Controller Data Transfer.
    H2cData = 0x06,
    /// Controller to Host Data Transfer.
    C2hData = 0x07,
    /// Ready to Transfer.
    R2t = 0x09,
}

impl PduType {
    /// All types.
    pub const ALL: [Self; 9] = [
        Self::IcReq,
        Self::IcResp,
        Self::H2cTermReq,
        Self::C2hTermReq,
        Self::CapsuleCmd,
        Self::CapsuleResp,
        Self::H2cData,
        Self::C2hData,
        Self::R2t,
    ];

    /// The type of this code, `None` if unknown (08h and 0Ah upwards).
    pub const fn from_u8(code: u8) -> Option<Self> {
        Some(match code {
            0x00 => Self::IcReq,
            0x01 => Self::IcResp,
            0x02 => Self::H2cTermReq,
            0x03 => Self::C2hTermReq,
            0x04 => Self::CapsuleCmd,
            0x05 => Self::CapsuleResp,
            0x06 => Self::H2cData,
            0x07 => Self::C2hData,
            0x09 => Self::R2t,
            _ => return None,
        })
    }

    /// The HLEN this type must have, bytes.
    pub const fn hlen(self) -> u8 {
        match self {
            Self::IcReq | Self::IcResp => 128,
            Self::CapsuleCmd => 72,
            _ => 24,
        }
    }

    /// The end that receives this type.
    pub const fn receiver(self) -> Role {
        if (self as u8).is_multiple_of(2) { Role::Controller } else { Role::Host }
    }

    /// ICReq or ICResp.
    pub const fn is_ic(self) -> bool {
        matches!(self, Self::IcReq | Self::IcResp)
    }

    /// H2CTermReq or C2HTermReq.
    pub const fn is_term(self) -> bool {
        matches!(self, Self::H2cTermReq | Self::C2hTermReq)
    }

    /// Whether an agreed header digest applies to this type.
    pub const fn has_hdgst(self) -> bool {
        !self.is_ic() && !self.is_term()
    }

    /// Whether this type may carry data, and therefore a data digest and a PDO.
    pub const fn has_data(self) -> bool {
        matches!(self, Self::CapsuleCmd | Self::H2cData | Self::C2hData)
    }
}

wire! {
    /// Common header, first in every PDU (section 3.6.1).
    pub struct CommonHdr: 8 {
        /// PDU-Type, a [`PduType`] code.
        0 => pub pdu_type: u8,
        /// FLAGS, the `FLAG_*` bits.
        1 => pub flags: u8,
        /// HLEN, bytes of the header without digest; fixed per type.
        2 => pub hlen: u8,
        /// PDO, bytes from the PDU's start to its data; 0 or ignored where there is none.
        3 => pub pdo: u8,
        /// PLEN, bytes of the whole PDU.
        4 => pub plen: U32,
    }
}

wire! {
    /// Initialize Connection Request (section 3.6.2.2).
    pub struct IcReqHdr: 128 {
        /// HLEN = PLEN = 128, FLAGS and PDO reserved.
        0 => pub ch: CommonHdr,
        /// PFV, protocol format version; 0.
        8 => pub pfv: U16,
        /// HPDA, alignment the host wants for data it receives: (HPDA + 1) dwords; 0..=31.
        10 => pub hpda: u8,
        /// DGST, digests the host asks for, the `DGST_*` bits.
        11 => pub dgst: u8,
        /// MAXR2T, outstanding R2Ts per command that the host supports; 0's based.
        12 => pub maxr2t: U32,
        16 => _rsvd: [u8; 112],
    }
}

wire! {
    /// Initialize Connection Response (section 3.6.2.3).
    pub struct IcRespHdr: 128 {
        /// HLEN = PLEN = 128, FLAGS and PDO reserved.
        0 => pub ch: CommonHdr,
        /// PFV, protocol format version; 0.
        8 => pub pfv: U16,
        /// CPDA, alignment the controller wants for data it receives: (CPDA + 1) dwords; 0..=31.
        10 => pub cpda: u8,
        /// DGST, digests in use from now on, the `DGST_*` bits; only what the host asked for.
        11 => pub dgst: u8,
        /// MAXH2CDATA, bytes of data in one H2CData PDU at most; a multiple of 4, at least 4,096.
        12 => pub maxh2cdata: U32,
        16 => _rsvd: [u8; 112],
    }
}

wire! {
    /// Terminate Connection Request, either direction (sections 3.6.2.4, 3.6.2.5). Followed by at most 128
    /// bytes of the header in error.
    pub struct TermReqHdr: 24 {
        /// HLEN = 24, PLEN = 24..=152, FLAGS and PDO reserved.
        0 => pub ch: CommonHdr,
        /// FES, fatal error status, a [`Fes`] code.
        8 => pub fes: U16,
        /// FEI, fatal error information; see [`Term`].
        10 => pub fei: U32,
        14 => _rsvd: [u8; 10],
    }
}

wire! {
    /// Command Capsule (section 3.6.2.6). Followed by the in-capsule data, if any.
    pub struct CapsuleCmdHdr: 72 {
        /// HLEN = 72; FLAGS: HDGST, DDGST.
        0 => pub ch: CommonHdr,
        /// CCSQE, the submission queue entry.
        8 => pub sqe: Sqe,
    }
}

wire! {
    /// Response Capsule (section 3.6.2.7).
    pub struct CapsuleRespHdr: 24 {
        /// HLEN = 24; FLAGS: HDGST; PDO reserved.
        0 => pub ch: CommonHdr,
        /// RCCQE, the completion queue entry.
        8 => pub cqe: Cqe,
    }
}

wire! {
    /// H2CData (section 3.6.2.8) and C2HData (section 3.6.2.9), which has no TTAG.
    pub struct DataHdr: 24 {
        /// HLEN = 24; FLAGS: HDGST, DDGST, LAST, and for C2HData SUCCESS.
        0 => pub ch: CommonHdr,
        /// CCCID, the command's identifier.
        8 => pub cccid: U16,
        /// TTAG, H2CData: the tag of the R2T this answers. C2HData: reserved.
        10 => pub ttag: U16,
        /// DATAO, bytes from the start of the command's data; a multiple of 4.
        12 => pub datao: U32,
        /// DATAL, bytes of data in this PDU; 1 or more.
        16 => pub datal: U32,
        20 => _rsvd: [u8; 4],
    }
}

wire! {
    /// Ready to Transfer (section 3.6.2.10).
    pub struct R2tHdr: 24 {
        /// HLEN = 24; FLAGS: HDGST; PDO reserved.
        0 => pub ch: CommonHdr,
        /// CCCID, the command's identifier.
        8 => pub cccid: U16,
        /// TTAG, the tag that the host's H2CData shall carry.
        10 => pub ttag: U16,
        /// R2TO, bytes from the start of the command's data; a multiple of 4.
        12 => pub r2to: U32,
        /// R2TL, bytes to send; 1 or more.
        16 => pub r2tl: U32,
        20 => _rsvd: [u8; 4],
    }
}
