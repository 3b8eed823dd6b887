//! What can be wrong with a received PDU, and which termination request it earns.

use super::{PduType, field};

/// Fatal Error Status of a termination request (NVMe/TCP 1.0 sections 3.6.2.4 and 3.6.2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Fes {
    /// Invalid PDU Header Field; FEI: byte offset of the field in the header.
    InvalidHeaderField = 0x01,
    /// PDU Sequence Error; FEI reserved.
    SequenceError = 0x02,
    /// Header Digest Error; FEI: the digest that was received.
    HeaderDigest = 0x03,
    /// Data Transfer Out of Range; FEI reserved.
    OutOfRange = 0x04,
    /// From a controller: Data Transfer Limit Exceeded; from a host: R2T Limit Exceeded. FEI reserved.
    LimitExceeded = 0x05,
    /// Unsupported Parameter; FEI: byte offset of the field in the header.
    UnsupportedParameter = 0x06,
}

impl Fes {
    /// The status of this code, `None` if reserved.
    pub const fn from_u16(code: u16) -> Option<Self> {
        Some(match code {
            0x01 => Self::InvalidHeaderField,
            0x02 => Self::SequenceError,
            0x03 => Self::HeaderDigest,
            0x04 => Self::OutOfRange,
            0x05 => Self::LimitExceeded,
            0x06 => Self::UnsupportedParameter,
            _ => return None,
        })
    }
}

/// FES and FEI of the termination request that answers a fatal error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Term {
    /// Fatal Error Status.
    pub fes: Fes,
    /// Fatal Error Information: an offset, a digest, or 0, depending on `fes`.
    pub fei: u32,
}

impl Term {
    /// Invalid PDU Header Field at this byte offset (see [`field`]).
    pub const fn invalid_field(offset_bytes: u32) -> Self {
        Self { fes: Fes::InvalidHeaderField, fei: offset_bytes }
    }

    /// Unsupported Parameter at this byte offset.
    pub const fn unsupported(offset_bytes: u32) -> Self {
        Self { fes: Fes::UnsupportedParameter, fei: offset_bytes }
    }

    /// An error whose FEI is reserved: sequence, out of range, limit exceeded.
    pub const fn plain(fes: Fes) -> Self {
        Self { fes, fei: 0 }
    }
}

/// Why a received PDU ends its connection. The lowest wrong byte is reported first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PduError {
    /// No such type, or one that flows the other way.
    #[error("PDU type {0:#04x} is unknown or flows the other way")]
    Type(u8),
    /// A legal type at the wrong time: before or after the connection's initialization.
    #[error("{0:?} PDU is out of sequence")]
    Sequence(PduType),
    /// HDGST or DDGST disagrees with what was negotiated, or SUCCESS without LAST.
    #[error("{pdu:?} PDU: FLAGS {flags:#04x} contradict the negotiated digests or each other")]
    Flags {
        /// The PDU's type.
        pdu: PduType,
        /// FLAGS as received.
        flags: u8,
    },
    /// HLEN is not the one of the type.
    #[error("{pdu:?} PDU: HLEN {got}, must be {want}")]
    Hlen {
        /// The PDU's type.
        pdu: PduType,
        /// HLEN as received.
        got: u8,
        /// HLEN of the type.
        want: u8,
    },
    /// PDO points into the header or is not aligned.
    #[error("{pdu:?} PDU: PDO {got}, must be at least {min} and a multiple of {align}")]
    Pdo {
        /// The PDU's type.
        pdu: PduType,
        /// PDO as received.
        got: u8,
        /// Header and header digest, bytes.
        min: u32,
        /// Negotiated alignment, bytes.
        align: u32,
    },
    /// PLEN does not fit the type, the offsets or the limits.
    #[error("{pdu:?} PDU: PLEN {got}, must be within {min}..={max}")]
    Plen {
        /// The PDU's type.
        pdu: PduType,
        /// PLEN as received.
        got: u32,
        /// Smallest PLEN, bytes.
        min: u64,
        /// Largest PLEN, bytes.
        max: u64,
    },
    /// A termination request of an impossible length: closed without an answer (section 3.5).
    #[error("termination request with PLEN {0}, must be within 24..=152")]
    TermLength(u32),
    /// A termination request with a wrong HLEN: closed without an answer.
    #[error("termination request with HLEN {0}, must be 24")]
    TermHlen(u8),
    /// More data in one PDU than the receiver allows.
    #[error("{pdu:?} PDU carries {got} data bytes, limit {max}")]
    DataLimit {
        /// The PDU's type.
        pdu: PduType,
        /// Data bytes by PLEN.
        got: u32,
        /// MAXH2CDATA, or the host's own limit.
        max: u32,
    },
    /// The header does not match its digest.
    #[error("header digest {received:#010x}, computed {computed:#010x}")]
    HeaderDigest {
        /// Digest as received.
        received: u32,
        /// Digest of the received header.
        computed: u32,
    },
    /// A protocol format version other than 0.
    #[error("PFV {0} is not supported")]
    Pfv(u16),
    /// HPDA or CPDA above 31.
    #[error("data alignment {0}, must be 0..=31")]
    Pda(u8),
    /// MAXH2CDATA below 4,096 or not a multiple of 4.
    #[error("MAXH2CDATA {0}, must be a multiple of 4 and at least 4096")]
    MaxH2cData(u32),
    /// DATAO or R2TO is not a multiple of 4.
    #[error("data offset {0} is not dword aligned")]
    DataOffset(u32),
    /// DATAL disagrees with PLEN, or R2TL is zero.
    #[error("data length {got}, PDU has {want}")]
    DataLength {
        /// DATAL or R2TL as received.
        got: u32,
        /// Data bytes by PLEN; 0 for R2T.
        want: u32,
    },
    /// Offset plus length exceed 32 bits.
    #[error("data at {offset} of {len} bytes exceeds 4 GiB")]
    DataRange {
        /// DATAO or R2TO.
        offset: u32,
        /// DATAL or R2TL.
        len: u32,
    },
}

impl PduError {
    /// FES and FEI to report. `None`: close without an answer, as termination requests never earn one.
    pub const fn term(&self) -> Option<Term> {
        Some(match *self {
            Self::Type(_) => Term::invalid_field(field::TYPE),
            Self::Sequence(_) => Term::plain(Fes::SequenceError),
            Self::Flags { .. } => Term::invalid_field(field::FLAGS),
            Self::Hlen { .. } => Term::invalid_field(field::HLEN),
            Self::Pdo { .. } => Term::invalid_field(field::PDO),
            Self::Plen { .. } => Term::invalid_field(field::PLEN),
            Self::TermLength(_) | Self::TermHlen(_) => return None,
            Self::DataLimit { pdu: PduType::H2cData, .. } => Term::plain(Fes::LimitExceeded),
            Self::DataLimit { .. } | Self::DataRange { .. } => Term::plain(Fes::OutOfRange),
            Self::HeaderDigest { received, .. } => Term { fes: Fes::HeaderDigest, fei: received },
            Self::Pfv(_) => Term::unsupported(field::PFV),
            Self::Pda(_) => Term::invalid_field(field::PDA),
            Self::MaxH2cData(_) => Term::invalid_field(field::MAXH2CDATA),
            Self::DataOffset(_) => Term::invalid_field(field::DATAO),
            Self::DataLength { .. } => Term::invalid_field(field::DATAL),
        })
    }
}
