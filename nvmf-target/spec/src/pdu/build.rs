//! Builders: write a header, with its digest where agreed, into the caller's buffer.
//!
//! Each returns the bytes written: header, header digest and padding, so that the data follows directly. PLEN
//! already covers the data and its digest, which the caller sends. Errors name a buffer that is too small or
//! a length that no PDU can express; reserved bytes are written zero.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::*;
use crate::ids::{Cid, Ttag};

/// Why a header was not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// The caller's buffer cannot hold the header, digest and padding.
    #[error("a {0}-byte buffer cannot hold the PDU header of {1} bytes")]
    Buffer(usize, usize),
    /// PLEN would exceed 32 bits.
    #[error("{0} data bytes do not fit one PDU")]
    DataLength(u32),
    /// Alignment is not a multiple of 4 within 4..=128.
    #[error("data alignment {0} is not 4..=128 in steps of 4")]
    Alignment(u32),
}

/// What both ends agreed on, as the sender needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Header digests are on.
    pub hdgst: bool,
    /// Data digests are on.
    pub ddgst: bool,
    /// Alignment that the receiver asked for, bytes: (xPDA + 1) * 4.
    pub align_bytes: u32,
}

impl Default for Format {
    fn default() -> Self {
        Self { hdgst: false, ddgst: false, align_bytes: 4 }
    }
}

/// Bytes of an alignment field: (HPDA or CPDA + 1) dwords.
pub const fn pda_bytes(pda: u8) -> u32 {
    (pda as u32 + 1) * 4
}

fn put<T: IntoBytes + Immutable>(buf: &mut [u8], hdr: &T) -> Result<usize, BuildError> {
    let len = size_of::<T>();
    let room = buf.len();
    buf.get_mut(..len).ok_or(BuildError::Buffer(room, len))?.copy_from_slice(hdr.as_bytes());
    Ok(len)
}

/// Completes the common header, then writes header, digest and padding. `hdr` starts with a `CommonHdr`.
fn finish<T>(
    buf: &mut [u8],
    mut hdr: T,
    pdu: PduType,
    flags: u8,
    data_len: u32,
    fmt: Format,
) -> Result<usize, BuildError>
where
    T: IntoBytes + FromBytes + KnownLayout + Immutable,
{
    if !fmt.align_bytes.is_multiple_of(4) || !(4..=128).contains(&fmt.align_bytes) {
        return Err(BuildError::Alignment(fmt.align_bytes));
    }
    let hlen = pdu.hlen();
    let hdgst = fmt.hdgst && pdu.has_hdgst();
    let ddgst = fmt.ddgst && data_len != 0;
    let full = u32::from(hlen) + if hdgst { 4 } else { 0 };
    let start = if data_len == 0 { full } else { full.next_multiple_of(fmt.align_bytes) };
    let plen = start
        .checked_add(data_len)
        .and_then(|n| n.checked_add(if ddgst { 4 } else { 0 }))
        .ok_or(BuildError::DataLength(data_len))?;
    let ch = CommonHdr {
        pdu_type: pdu as u8,
        flags: flags | if hdgst { FLAG_HDGST } else { 0 } | if ddgst { FLAG_DDGST } else { 0 },
        hlen,
        // At most 76 rounded up to a multiple of <= 128: 128.
        pdo: if data_len == 0 { 0 } else { start as u8 },
        plen: U32::new(plen),
    };
    hdr.as_mut_bytes()[..COMMON_HDR_BYTES].copy_from_slice(ch.as_bytes());
    let (room, start) = (buf.len(), start as usize);
    let out = buf.get_mut(..start).ok_or(BuildError::Buffer(room, start))?;
    let len = put(out, &hdr)?;
    if hdgst {
        let sum = digest::crc32c(&out[..len]);
        out[len..len + DIGEST_BYTES].copy_from_slice(&sum.to_le_bytes());
    }
    out[full as usize..].fill(0);
    Ok(start)
}

/// ICReq. `hpda` is 0..=31, `maxr2t` 0's based.
pub fn ic_req(buf: &mut [u8], hpda: u8, hdgst: bool, ddgst: bool, maxr2t: u32) -> Result<usize, BuildError> {
    let hdr = IcReqHdr {
        pfv: U16::new(PFV),
        hpda,
        dgst: dgst(hdgst, ddgst),
        maxr2t: U32::new(maxr2t),
        ..Default::default()
    };
    finish(buf, hdr, PduType::IcReq, 0, 0, Format::default())
}

/// ICResp. `cpda` is 0..=31, `maxh2cdata` bytes.
pub fn ic_resp(
    buf: &mut [u8],
    cpda: u8,
    hdgst: bool,
    ddgst: bool,
    maxh2cdata: u32,
) -> Result<usize, BuildError> {
    let hdr = IcRespHdr {
        pfv: U16::new(PFV),
        cpda,
        dgst: dgst(hdgst, ddgst),
        maxh2cdata: U32::new(maxh2cdata),
        ..Default::default()
    };
    finish(buf, hdr, PduType::IcResp, 0, 0, Format::default())
}

const fn dgst(hdgst: bool, ddgst: bool) -> u8 {
    (if hdgst { DGST_HEADER } else { 0 }) | (if ddgst { DGST_DATA } else { 0 })
}

/// H2CTermReq or C2HTermReq, `sender` being the end that sends it, with up to 128 bytes of the header in
/// error. Returns the length of the whole PDU.
pub fn term_req(
    buf: &mut [u8],
    sender: Role,
    term: Term,
    offending_header: &[u8],
) -> Result<usize, BuildError> {
    let pdu = match sender {
        Role::Controller => PduType::C2hTermReq,
        Role::Host => PduType::H2cTermReq,
    };
    let data = &offending_header[..offending_header.len().min(MAX_HDR_BYTES)];
    let total = size_of::<TermReqHdr>() + data.len();
    let hdr = TermReqHdr {
        ch: CommonHdr {
            pdu_type: pdu as u8,
            flags: 0,
            hlen: pdu.hlen(),
            pdo: 0,
            plen: U32::new(total as u32),
        },
        fes: U16::new(term.fes as u16),
        fei: U32::new(term.fei),
        ..Default::default()
    };
    let room = buf.len();
    let out = buf.get_mut(..total).ok_or(BuildError::Buffer(room, total))?;
    let len = put(out, &hdr)?;
    out[len..].copy_from_slice(data);
    Ok(total)
}

/// CapsuleCmd with `data_len` bytes of in-capsule data to follow.
pub fn capsule_cmd(buf: &mut [u8], sqe: &Sqe, data_len: u32, fmt: Format) -> Result<usize, BuildError> {
    let hdr = CapsuleCmdHdr { sqe: *sqe, ..Default::default() };
    finish(buf, hdr, PduType::CapsuleCmd, 0, data_len, fmt)
}

/// CapsuleResp.
pub fn capsule_resp(buf: &mut [u8], cqe: &Cqe, fmt: Format) -> Result<usize, BuildError> {
    let hdr = CapsuleRespHdr { cqe: *cqe, ..Default::default() };
    finish(buf, hdr, PduType::CapsuleResp, 0, 0, fmt)
}

/// A piece of a command's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataPart {
    /// The command.
    pub cid: Cid,
    /// Bytes from the start of the command's data.
    pub offset: u32,
    /// Bytes in this PDU.
    pub len: u32,
    /// No more data PDUs follow for this R2T or command.
    pub last: bool,
}

/// H2CData, answering the R2T with this tag.
pub fn h2c_data(buf: &mut [u8], part: DataPart, ttag: Ttag, fmt: Format) -> Result<usize, BuildError> {
    let flags = if part.last { FLAG_LAST } else { 0 };
    finish(buf, data_hdr(part, ttag), PduType::H2cData, flags, part.len, fmt)
}

/// C2HData; `success` replaces the CapsuleResp and is only set on the last part.
pub fn c2h_data(buf: &mut [u8], part: DataPart, success: bool, fmt: Format) -> Result<usize, BuildError> {
    let flags = match (part.last, success) {
        (true, true) => FLAG_LAST | FLAG_SUCCESS,
        (true, false) => FLAG_LAST,
        (false, _) => 0,
    };
    finish(buf, data_hdr(part, Ttag(0)), PduType::C2hData, flags, part.len, fmt)
}

fn data_hdr(part: DataPart, ttag: Ttag) -> DataHdr {
    DataHdr {
        cccid: U16::new(part.cid.0),
        ttag: U16::new(ttag.0),
        datao: U32::new(part.offset),
        datal: U32::new(part.len),
        ..Default::default()
    }
}

/// R2T: asks for `len` bytes from `offset` of the command's data.
pub fn r2t(
    buf: &mut [u8],
    cid: Cid,
    ttag: Ttag,
    offset: u32,
    len: u32,
    fmt: Format,
) -> Result<usize, BuildError> {
    let hdr = R2tHdr {
        cccid: U16::new(cid.0),
        ttag: U16::new(ttag.0),
        r2to: U32::new(offset),
        r2tl: U32::new(len),
        ..Default::default()
    };
    finish(buf, hdr, PduType::R2t, 0, 0, fmt)
}
