//! The stream parser: bytes in, typed PDU headers and data positions out. No I/O, no allocation.
//!
//! The first 8 bytes of a PDU make an [`Unverified`] header. [`Unverified::verify`] checks type, flags, HLEN,
//! PDO and PLEN, in that order, against the role, the negotiated digests and alignment and the limits; only a
//! [`Layout`] that passed says how many bytes to expect. Then header, header digest and the type's own fields
//! are checked. Data is never held here: the parser says where it lies in the input, or the caller receives
//! it directly into its destination (`Parser::data_wanted`, `Parser::data_received`).
//!
//! Events of one PDU: `Header`, then, if it has data, `Data` (any number) and `End`. How the input is cut
//! changes only the number of `Data` events. After an error the parser repeats that error for ever.

use zerocopy::FromBytes;

use super::build::pda_bytes;
use super::*;
use crate::ids::{Cid, Ttag};

/// What a connection agreed on and accepts, as the receiver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Header digests are on.
    pub hdgst: bool,
    /// Data digests are on.
    pub ddgst: bool,
    /// Alignment this end asked for (controller: CPDA, host: HPDA), bytes: 4..=128.
    pub align_bytes: u32,
    /// In-capsule data accepted, bytes. Controller only.
    pub max_capsule_data_bytes: u32,
    /// Data accepted in one H2CData (controller: MAXH2CDATA) or C2HData (host) PDU, bytes.
    pub max_data_bytes: u32,
}

impl Default for Limits {
    /// No digests, dword alignment, 8 KiB in capsule, 128 KiB per data PDU.
    fn default() -> Self {
        Self {
            hdgst: false,
            ddgst: false,
            align_bytes: pda_bytes(0),
            max_capsule_data_bytes: ADMIN_CAPSULE_DATA_BYTES,
            max_data_bytes: 128 << 10,
        }
    }
}

/// Where a connection is in its initialization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing received: ICReq or ICResp must come first.
    Initial,
    /// ICReq or ICResp received, `establish` not called yet: nothing but a termination may follow.
    Negotiating,
    /// Commands and data flow.
    Established(Limits),
}

/// A common header as received: nothing in it may be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unverified(CommonHdr);

/// The verified extent of a PDU. All offsets from the PDU's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The PDU's type.
    pub pdu: PduType,
    /// Bytes of the whole PDU.
    pub plen: u32,
    /// A 4-byte header digest follows the header.
    pub hdgst: bool,
    /// Offset of the data; without data, the end of the PDU.
    pub data_offset: u32,
    /// Bytes of data; may be 0.
    pub data_len: u32,
    /// Offset of the 4-byte data digest, if there is one.
    pub ddgst_offset: Option<u32>,
}

impl Layout {
    /// Bytes of the header and its digest.
    pub const fn header_bytes(&self) -> usize {
        self.pdu.hlen() as usize + if self.hdgst { DIGEST_BYTES } else { 0 }
    }
}

impl Unverified {
    /// The first 8 bytes of a PDU.
    pub fn new(bytes: [u8; COMMON_HDR_BYTES]) -> Self {
        Self(zerocopy::transmute!(bytes))
    }

    /// Checks the header for an established connection.
    pub fn verify(&self, role: Role, limits: &Limits) -> Result<Layout, PduError> {
        self.verify_in(role, Phase::Established(*limits))
    }

    fn verify_in(&self, role: Role, phase: Phase) -> Result<Layout, PduError> {
        let ch = &self.0;
        let pdu = PduType::from_u8(ch.pdu_type)
            .filter(|pdu| pdu.receiver() == role)
            .ok_or(PduError::Type(ch.pdu_type))?;
        let plen = ch.plen.get();
        if pdu.is_term() {
            return Self::verify_term(pdu, ch.hlen, plen);
        }
        match phase {
            Phase::Initial if pdu.is_ic() => {
                Self::check_hlen(pdu, ch.hlen)?;
                let layout = Self::without_data(pdu, false);
                Self::check_plen(pdu, plen, layout.plen, layout.plen)?;
                Ok(layout)
            }
            Phase::Established(limits) if !pdu.is_ic() => self.verify_command(pdu, plen, &limits),
            _ => Err(PduError::Sequence(pdu)),
        }
    }

    fn verify_term(pdu: PduType, hlen: u8, plen: u32) -> Result<Layout, PduError> {
        if hlen != pdu.hlen() {
            return Err(PduError::TermHlen(hlen));
        }
        let head = u32::from(hlen);
        if !(head..=MAX_TERM_BYTES as u32).contains(&plen) {
            return Err(PduError::TermLength(plen));
        }
        Ok(Layout { pdu, plen, hdgst: false, data_offset: head, data_len: plen - head, ddgst_offset: None })
    }

    fn verify_command(&self, pdu: PduType, plen: u32, limits: &Limits) -> Result<Layout, PduError> {
        let ch = &self.0;
        let bad_flags = PduError::Flags { pdu, flags: ch.flags };
        let full = u32::from(pdu.hlen()) + if limits.hdgst { 4 } else { 0 };
        let carries_data = pdu.has_data() && (plen != full || pdu != PduType::CapsuleCmd);

        // DDGST says nothing about a capsule without data.
        if (ch.flags & FLAG_HDGST != 0) != limits.hdgst
            || (carries_data && (ch.flags & FLAG_DDGST != 0) != limits.ddgst)
            || (pdu == PduType::C2hData && ch.flags & (FLAG_LAST | FLAG_SUCCESS) == FLAG_SUCCESS)
        {
            return Err(bad_flags);
        }
        Self::check_hlen(pdu, ch.hlen)?;
        if !carries_data {
            Self::check_plen(pdu, plen, full, full)?;
            return Ok(Self::without_data(pdu, limits.hdgst));
        }

        let pdo = u32::from(ch.pdo);
        if pdo < full || !pdo.is_multiple_of(limits.align_bytes.max(1)) {
            return Err(PduError::Pdo { pdu, got: ch.pdo, min: full, align: limits.align_bytes });
        }
        let ddgst = if limits.ddgst { DIGEST_BYTES as u32 } else { 0 };
        let max_data = match pdu {
            PduType::CapsuleCmd => limits.max_capsule_data_bytes,
            _ => limits.max_data_bytes,
        };
        let min = u64::from(pdo + ddgst) + 1;
        let max = u64::from(pdo + ddgst) + u64::from(max_data);
        if u64::from(plen) < min || (pdu == PduType::CapsuleCmd && u64::from(plen) > max) {
            return Err(PduError::Plen { pdu, got: plen, min, max });
        }
        let data_len = plen - pdo - ddgst;
        if data_len > max_data {
            return Err(PduError::DataLimit { pdu, got: data_len, max: max_data });
        }
        Ok(Layout {
            pdu,
            plen,
            hdgst: limits.hdgst,
            data_offset: pdo,
            data_len,
            ddgst_offset: limits.ddgst.then_some(pdo + data_len),
        })
    }

    fn check_hlen(pdu: PduType, got: u8) -> Result<(), PduError> {
        let want = pdu.hlen();
        if got == want { Ok(()) } else { Err(PduError::Hlen { pdu, got, want }) }
    }

    fn check_plen(pdu: PduType, got: u32, min: u32, max: u32) -> Result<(), PduError> {
        if (min..=max).contains(&got) {
            Ok(())
        } else {
            Err(PduError::Plen { pdu, got, min: min.into(), max: max.into() })
        }
    }

    fn without_data(pdu: PduType, hdgst: bool) -> Layout {
        let plen = u32::from(pdu.hlen()) + if hdgst { 4 } else { 0 };
        Layout { pdu, plen, hdgst, data_offset: plen, data_len: 0, ddgst_offset: None }
    }
}

/// A verified, typed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// ICReq.
    IcReq {
        /// Alignment the host wants, bytes: 4..=128.
        align_bytes: u32,
        /// The host asks for header digests.
        hdgst: bool,
        /// The host asks for data digests.
        ddgst: bool,
        /// Outstanding R2Ts per command: 1..=2^32.
        max_r2t: u64,
    },
    /// ICResp.
    IcResp {
        /// Alignment the controller wants, bytes: 4..=128.
        align_bytes: u32,
        /// Header digests are on; the host checks that it asked for them.
        hdgst: bool,
        /// Data digests are on; the host checks that it asked for them.
        ddgst: bool,
        /// MAXH2CDATA, bytes: 4,096 or more.
        max_h2c_data_bytes: u32,
    },
    /// H2CTermReq or C2HTermReq; the data that follows is the header the other end rejected.
    TermReq {
        /// FES as received; see [`Fes::from_u16`].
        fes: u16,
        /// FEI as received.
        fei: u32,
    },
    /// CapsuleCmd.
    CapsuleCmd(Sqe),
    /// CapsuleResp.
    CapsuleResp(Cqe),
    /// H2CData.
    H2cData {
        /// The command.
        cid: Cid,
        /// The R2T's tag.
        ttag: Ttag,
        /// Bytes from the start of the command's data; `offset + data_len` does not overflow.
        offset: u32,
        /// LAST is set.
        last: bool,
    },
    /// C2HData.
    C2hData {
        /// The command.
        cid: Cid,
        /// Bytes from the start of the command's data; `offset + data_len` does not overflow.
        offset: u32,
        /// LAST is set.
        last: bool,
        /// SUCCESS is set: no CapsuleResp follows. Implies `last`.
        success: bool,
    },
    /// R2T.
    R2t {
        /// The command.
        cid: Cid,
        /// The tag to answer with.
        ttag: Ttag,
        /// Bytes from the start of the command's data; `offset + len` does not overflow.
        offset: u32,
        /// Bytes to send, 1 or more.
        len: u32,
    },
}

impl Header {
    /// Decodes and checks the fields behind a verified common header. `bytes` holds at least HLEN bytes.
    fn decode(layout: &Layout, bytes: &[u8; MAX_HDR_BYTES]) -> Result<Self, PduError> {
        Ok(match layout.pdu {
            PduType::IcReq => {
                let hdr: IcReqHdr = take(bytes);
                check_ic(hdr.pfv.get(), hdr.hpda)?;
                Self::IcReq {
                    align_bytes: pda_bytes(hdr.hpda),
                    hdgst: hdr.dgst & DGST_HEADER != 0,
                    ddgst: hdr.dgst & DGST_DATA != 0,
                    max_r2t: u64::from(hdr.maxr2t.get()) + 1,
                }
            }
            PduType::IcResp => {
                let hdr: IcRespHdr = take(bytes);
                check_ic(hdr.pfv.get(), hdr.cpda)?;
                let max = hdr.maxh2cdata.get();
                if max < MIN_MAXH2CDATA_BYTES || !max.is_multiple_of(4) {
                    return Err(PduError::MaxH2cData(max));
                }
                Self::IcResp {
                    align_bytes: pda_bytes(hdr.cpda),
                    hdgst: hdr.dgst & DGST_HEADER != 0,
                    ddgst: hdr.dgst & DGST_DATA != 0,
                    max_h2c_data_bytes: max,
                }
            }
            PduType::H2cTermReq | PduType::C2hTermReq => {
                let hdr: TermReqHdr = take(bytes);
                Self::TermReq { fes: hdr.fes.get(), fei: hdr.fei.get() }
            }
            PduType::CapsuleCmd => Self::CapsuleCmd(take::<CapsuleCmdHdr>(bytes).sqe),
            PduType::CapsuleResp => Self::CapsuleResp(take::<CapsuleRespHdr>(bytes).cqe),
            PduType::H2cData | PduType::C2hData => {
                let hdr: DataHdr = take(bytes);
                let (offset, len) = (hdr.datao.get(), hdr.datal.get());
                check_range(offset, len, len == layout.data_len, layout.data_len)?;
                let cid = Cid(hdr.cccid.get());
                let last = hdr.ch.flags & FLAG_LAST != 0;
                if layout.pdu == PduType::H2cData {
                    Self::H2cData { cid, ttag: Ttag(hdr.ttag.get()), offset, last }
                } else {
                    Self::C2hData { cid, offset, last, success: hdr.ch.flags & FLAG_SUCCESS != 0 }
                }
            }
            PduType::R2t => {
                let hdr: R2tHdr = take(bytes);
                let (offset, len) = (hdr.r2to.get(), hdr.r2tl.get());
                check_range(offset, len, len != 0, 0)?;
                Self::R2t { cid: Cid(hdr.cccid.get()), ttag: Ttag(hdr.ttag.get()), offset, len }
            }
        })
    }
}

fn take<T: FromBytes>(bytes: &[u8; MAX_HDR_BYTES]) -> T {
    const { assert!(size_of::<T>() <= MAX_HDR_BYTES) };
    T::read_from_prefix(bytes).expect("no header is longer than MAX_HDR_BYTES").0
}

fn check_ic(pfv: u16, pda: u8) -> Result<(), PduError> {
    if pfv != PFV {
        return Err(PduError::Pfv(pfv));
    }
    if pda > MAX_PDA {
        return Err(PduError::Pda(pda));
    }
    Ok(())
}

fn check_range(offset: u32, len: u32, len_ok: bool, want: u32) -> Result<(), PduError> {
    if !offset.is_multiple_of(4) {
        return Err(PduError::DataOffset(offset));
    }
    if !len_ok {
        return Err(PduError::DataLength { got: len, want });
    }
    if offset.checked_add(len).is_none() {
        return Err(PduError::DataRange { offset, len });
    }
    Ok(())
}

/// A PDU whose header has arrived and been verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pdu {
    /// Its typed header.
    pub header: Header,
    /// Where data and digests lie.
    pub layout: Layout,
}

/// What the parser found.
// The header is taken apart at once and never stored: boxing it would allocate per PDU.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// All input is consumed and nothing is complete.
    NeedMore,
    /// A header is complete and legal. If `layout.data_len` is not 0, `Data` and `End` follow.
    Header(Pdu),
    /// The next data bytes are `input[start..start + len]`.
    Data {
        /// Index into the input of this call.
        start: usize,
        /// Bytes, 1 or more.
        len: usize,
    },
    /// The PDU's data is complete.
    End {
        /// The data digest as received, for the caller to compare with its own.
        ddgst: Option<u32>,
    },
}

/// Result of one [`Parser::feed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the input that are done with.
    pub consumed: usize,
    /// What they amounted to.
    pub event: Event,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Collecting the common header.
    Common,
    /// Collecting the rest of the header and its digest.
    Header(Layout),
    /// Skipping 1 or more bytes of padding in front of the data.
    Pad { left: u32, data: u32, ddgst: bool },
    /// Passing 1 or more bytes of data on.
    Data { left: u32, ddgst: bool },
    /// Collecting the data digest.
    DataDigest { bytes: [u8; DIGEST_BYTES], have: usize },
    /// All data passed on, `End` not reported yet.
    End,
    /// A violation was found.
    Failed(PduError),
}

const BUF_BYTES: usize = MAX_HDR_BYTES + DIGEST_BYTES;

/// Incremental parser of one direction of one connection. See the module's head.
#[derive(Clone, Debug)]
pub struct Parser {
    role: Role,
    phase: Phase,
    stage: Stage,
    /// Header bytes of the current PDU, its digest included.
    buf: [u8; BUF_BYTES],
    have: usize,
}

impl Parser {
    /// A parser for a new connection; `role` is the end that receives.
    pub fn new(role: Role) -> Self {
        Self { role, phase: Phase::Initial, stage: Stage::Common, buf: [0; BUF_BYTES], have: 0 }
    }

    /// Tells what ICReq and ICResp agreed on. To be called between the event of the one that was received and
    /// the next `feed`; later calls change the limits (in-capsule data after Connect on an I/O queue).
    pub fn establish(&mut self, limits: Limits) {
        self.phase = Phase::Established(limits);
    }

    /// The limits in force, `None` before `establish`.
    pub fn limits(&self) -> Option<Limits> {
        match self.phase {
            Phase::Established(limits) => Some(limits),
            _ => None,
        }
    }

    /// Takes a step. Call until `NeedMore`, each time with what the last call did not consume: an event may
    /// follow without further input.
    pub fn feed(&mut self, input: &[u8]) -> Result<Progress, PduError> {
        let mut used = 0;
        loop {
            match self.step(&input[used..]) {
                Ok((n, Some(event))) => {
                    let event = match event {
                        Event::Data { start, len } => Event::Data { start: start + used, len },
                        other => other,
                    };
                    return Ok(Progress { consumed: used + n, event });
                }
                Ok((0, None)) => return Ok(Progress { consumed: used, event: Event::NeedMore }),
                Ok((n, None)) => used += n,
                Err(error) => {
                    self.stage = Stage::Failed(error);
                    return Err(error);
                }
            }
        }
    }

    /// Bytes of data that come next, 0 unless the parser is amid a PDU's data. They may be received directly
    /// into their destination and reported with [`Parser::data_received`] instead of being fed.
    pub fn data_wanted(&self) -> u32 {
        match self.stage {
            Stage::Data { left, .. } => left,
            _ => 0,
        }
    }

    /// Reports that `bytes` of data went past the parser. `End` comes from the next `feed`.
    ///
    /// # Panics
    /// If `bytes` exceeds [`Parser::data_wanted`]: a bug of the caller, never of the peer.
    pub fn data_received(&mut self, bytes: u32) {
        let wanted = self.data_wanted();
        assert!(bytes <= wanted, "{bytes} data bytes received, {wanted} wanted");
        self.take_data(bytes);
    }

    /// Bytes until the parser's next step: the rest of the header, padding, data or digest it is in. 0: an
    /// event is due already.
    pub fn bytes_wanted(&self) -> usize {
        match self.stage {
            Stage::Common => COMMON_HDR_BYTES - self.have,
            Stage::Header(layout) => layout.header_bytes() - self.have,
            Stage::Pad { left, .. } | Stage::Data { left, .. } => left as usize,
            Stage::DataDigest { have, .. } => DIGEST_BYTES - have,
            Stage::End | Stage::Failed(_) => 0,
        }
    }

    /// Whether the stream is between two PDUs: the only place where it may end cleanly.
    pub fn at_boundary(&self) -> bool {
        self.stage == Stage::Common && self.have == 0
    }

    /// Header bytes of the current or failed PDU received so far, for a termination request.
    pub fn header_bytes(&self) -> &[u8] {
        &self.buf[..self.have.min(MAX_HDR_BYTES)]
    }

    /// Consumes some of `input`; `(0, None)` means that more is needed.
    fn step(&mut self, input: &[u8]) -> Result<(usize, Option<Event>), PduError> {
        match self.stage {
            Stage::Common => {
                let n = self.collect(input, COMMON_HDR_BYTES);
                if let Some(&common) = self.buf.first_chunk().filter(|_| self.have == COMMON_HDR_BYTES) {
                    let layout = Unverified::new(common).verify_in(self.role, self.phase)?;
                    self.stage = Stage::Header(layout);
                }
                Ok((n, None))
            }
            Stage::Header(layout) => {
                let n = self.collect(input, layout.header_bytes());
                if self.have < layout.header_bytes() {
                    return Ok((n, None));
                }
                let pdu = self.header_complete(layout)?;
                Ok((n, Some(Event::Header(pdu))))
            }
            Stage::Pad { left, data, ddgst } => {
                let n = left.min(u32::try_from(input.len()).unwrap_or(u32::MAX));
                self.stage = if n == left {
                    Stage::Data { left: data, ddgst }
                } else {
                    Stage::Pad { left: left - n, data, ddgst }
                };
                Ok((n as usize, None))
            }
            Stage::Data { left, .. } => {
                let len = left.min(u32::try_from(input.len()).unwrap_or(u32::MAX));
                if len == 0 {
                    return Ok((0, None));
                }
                self.take_data(len);
                let len = len as usize;
                Ok((len, Some(Event::Data { start: 0, len })))
            }
            Stage::DataDigest { mut bytes, have } => {
                let n = input.len().min(DIGEST_BYTES - have);
                bytes[have..have + n].copy_from_slice(&input[..n]);
                if have + n < DIGEST_BYTES {
                    self.stage = Stage::DataDigest { bytes, have: have + n };
                    return Ok((n, None));
                }
                self.next_pdu();
                Ok((n, Some(Event::End { ddgst: Some(u32::from_le_bytes(bytes)) })))
            }
            Stage::End => {
                self.next_pdu();
                Ok((0, Some(Event::End { ddgst: None })))
            }
            Stage::Failed(error) => Err(error),
        }
    }

    fn collect(&mut self, input: &[u8], upto: usize) -> usize {
        let n = input.len().min(upto - self.have);
        self.buf[self.have..self.have + n].copy_from_slice(&input[..n]);
        self.have += n;
        n
    }

    fn header_complete(&mut self, layout: Layout) -> Result<Pdu, PduError> {
        let hlen = usize::from(layout.pdu.hlen());
        if layout.hdgst {
            let mut received = [0; DIGEST_BYTES];
            received.copy_from_slice(&self.buf[hlen..hlen + DIGEST_BYTES]);
            let received = u32::from_le_bytes(received);
            let computed = digest::crc32c(&self.buf[..hlen]);
            if received != computed {
                // The request reports the header; the digest goes into FEI.
                self.have = hlen;
                return Err(PduError::HeaderDigest { received, computed });
            }
        }
        let bytes = self.buf.first_chunk().expect("the buffer holds the longest header");
        let decoded = Header::decode(&layout, bytes);
        let header = decoded.inspect_err(|_| self.have = hlen)?;
        if layout.pdu.is_ic() {
            self.phase = Phase::Negotiating;
        }
        if layout.data_len == 0 {
            self.next_pdu();
        } else {
            let (data, ddgst) = (layout.data_len, layout.ddgst_offset.is_some());
            // `verify` made sure that the data does not begin inside the header.
            self.stage = match layout.data_offset - layout.header_bytes() as u32 {
                0 => Stage::Data { left: data, ddgst },
                left => Stage::Pad { left, data, ddgst },
            };
        }
        Ok(Pdu { header, layout })
    }

    fn take_data(&mut self, bytes: u32) {
        if let Stage::Data { left, ddgst } = self.stage {
            self.stage = match (left - bytes, ddgst) {
                (0, true) => Stage::DataDigest { bytes: [0; DIGEST_BYTES], have: 0 },
                (0, false) => Stage::End,
                (left, _) => Stage::Data { left, ddgst },
            };
        }
    }

    fn next_pdu(&mut self) {
        self.stage = Stage::Common;
        self.have = 0;
    }
}
