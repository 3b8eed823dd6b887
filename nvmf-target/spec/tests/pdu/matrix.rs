//! The boundary matrix: each header field just below, at and just above what is legal, and the FES and FEI that
//! a violation earns.

use cryptfold_nvmf_spec::pdu::digest::crc32c;
use cryptfold_nvmf_spec::pdu::{Fes, Limits, PduError, PduType, Role};

use super::{opening, run};

/// Expected outcome: legal, fatal with FES and FEI, or closed without an answer.
#[derive(Debug, PartialEq)]
enum Want {
    Ok,
    Fatal(Fes, u32),
    Silent,
}
use Want::*;

const FIELD: Fes = Fes::InvalidHeaderField;

const PLAIN: Limits = Limits {
    hdgst: false,
    ddgst: false,
    align_bytes: 4,
    max_capsule_data_bytes: 8192,
    max_data_bytes: 0x2_0000,
};
const HDGST: Limits = Limits { hdgst: true, ..PLAIN };
const DDGST: Limits = Limits { ddgst: true, ..PLAIN };
const BOTH: Limits = Limits { hdgst: true, ddgst: true, ..PLAIN };
const ALIGN64: Limits = Limits { align_bytes: 64, ..PLAIN };

/// A header of `pdu` with these common fields, DATAL to fit, and its digest where HDGSTF is set.
struct Hdr {
    pdu: u8,
    flags: u8,
    hlen: u8,
    pdo: u8,
    plen: u32,
    /// Bytes 8..24 of a data header or R2T.
    tail: [u8; 16],
    break_digest: bool,
}

fn hdr(pdu: PduType, flags: u8, pdo: u8, plen: u32, datal: u32) -> Hdr {
    let mut tail = [0; 16];
    tail[8..12].copy_from_slice(&datal.to_le_bytes());
    Hdr { pdu: pdu as u8, flags, hlen: pdu.hlen(), pdo, plen, tail, break_digest: false }
}

impl Hdr {
    fn with_offset(mut self, datao: u32) -> Self {
        self.tail[4..8].copy_from_slice(&datao.to_le_bytes());
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let real = PduType::from_u8(self.pdu).map_or(24, PduType::hlen);
        let mut v = vec![self.pdu, self.flags, self.hlen, self.pdo];
        v.extend(self.plen.to_le_bytes());
        v.extend(self.tail);
        v.resize(real.into(), 0);
        if self.flags & 1 != 0 {
            let sum = crc32c(&v) ^ u32::from(self.break_digest);
            v.extend(sum.to_le_bytes());
        }
        v
    }
}

fn outcome(error: Option<PduError>) -> Want {
    match error {
        None => Ok,
        Some(e) => e.term().map_or(Silent, |t| Fatal(t.fes, t.fei)),
    }
}

fn check(role: Role, limits: Limits, what: &str, h: &Hdr, want: Want) {
    let stream = [opening(role), h.bytes()].concat();
    for pieces in [&[usize::MAX][..], &[1], &[7, 1, 130]] {
        let seen = run(role, limits, &stream, pieces);
        assert_eq!(outcome(seen.error), want, "{what}: {:?}", seen.error);
        if seen.error.is_some() {
            let sent = h.bytes();
            assert!(seen.header_bytes.len() >= 8 && sent.starts_with(&seen.header_bytes), "{what}");
        } else {
            assert_eq!(seen.pdus.len(), 2, "{what}: the header is complete");
        }
    }
}

#[test]
fn pdu_type() {
    for code in 0..=255u8 {
        for role in [Role::Controller, Role::Host] {
            let h = match PduType::from_u8(code) {
                Some(pdu) => {
                    let data = if pdu.has_data() || pdu == PduType::R2t { 4 } else { 0 };
                    let plen = u32::from(pdu.hlen()) + if pdu.has_data() { 4 } else { 0 };
                    hdr(pdu, 0, if pdu.has_data() { pdu.hlen() } else { 0 }, plen, data)
                }
                None => Hdr { pdu: code, ..hdr(PduType::R2t, 0, 0, 24, 4) },
            };
            let want = match PduType::from_u8(code) {
                Some(pdu) if pdu.receiver() != role => Fatal(FIELD, 0),
                Some(pdu) if pdu.is_ic() => Fatal(Fes::SequenceError, 0),
                Some(_) => Ok,
                None => Fatal(FIELD, 0),
            };
            check(role, PLAIN, &format!("type {code:#x} to {role:?}"), &h, want);
        }
    }
}

#[test]
fn before_initialization() {
    for pdu in PduType::ALL {
        let h = hdr(pdu, 0, 0, pdu.hlen().into(), 4);
        let mut bytes = h.bytes();
        if pdu == PduType::IcResp {
            bytes[12..16].copy_from_slice(&4096u32.to_le_bytes());
        } else if pdu == PduType::IcReq {
            bytes[8..].fill(0);
        }
        let seen = run(pdu.receiver(), PLAIN, &bytes, &[3]);
        let want = if pdu.is_ic() || pdu.is_term() { Ok } else { Fatal(Fes::SequenceError, 0) };
        assert_eq!(outcome(seen.error), want, "{pdu:?}");
    }
}

#[test]
fn nothing_may_follow_icreq_until_established() {
    let mut parser = cryptfold_nvmf_spec::pdu::Parser::new(Role::Controller);
    let mut stream = opening(Role::Controller);
    stream.extend(hdr(PduType::CapsuleCmd, 0, 0, 72, 0).bytes());
    let progress = parser.feed(&stream).expect("ICReq is legal");
    let e = parser.feed(&stream[progress.consumed..]).expect_err("too early");
    assert_eq!(e, PduError::Sequence(PduType::CapsuleCmd));
}

#[test]
fn initialization_fields() {
    // Offset, bytes written there, outcome for ICReq, outcome for ICResp.
    let pda = |v| (10, vec![v]);
    let cases: Vec<((usize, Vec<u8>), Want, Want)> = vec![
        ((2, vec![127]), Fatal(FIELD, 2), Fatal(FIELD, 2)),
        ((2, vec![129]), Fatal(FIELD, 2), Fatal(FIELD, 2)),
        ((4, vec![127, 0, 0, 0]), Fatal(FIELD, 4), Fatal(FIELD, 4)),
        ((4, vec![129, 0, 0, 0]), Fatal(FIELD, 4), Fatal(FIELD, 4)),
        ((4, vec![128, 0, 0, 1]), Fatal(FIELD, 4), Fatal(FIELD, 4)),
        ((8, vec![1, 0]), Fatal(Fes::UnsupportedParameter, 8), Fatal(Fes::UnsupportedParameter, 8)),
        ((8, vec![0, 0xff]), Fatal(Fes::UnsupportedParameter, 8), Fatal(Fes::UnsupportedParameter, 8)),
        (pda(31), Ok, Ok),
        (pda(32), Fatal(FIELD, 10), Fatal(FIELD, 10)),
        (pda(255), Fatal(FIELD, 10), Fatal(FIELD, 10)),
        ((12, 4095u32.to_le_bytes().to_vec()), Ok, Fatal(FIELD, 12)),
        ((12, 4096u32.to_le_bytes().to_vec()), Ok, Ok),
        ((12, 4097u32.to_le_bytes().to_vec()), Ok, Fatal(FIELD, 12)),
        ((12, 4100u32.to_le_bytes().to_vec()), Ok, Ok),
        ((12, vec![0xfc, 0xff, 0xff, 0xff]), Ok, Ok),
        // Reserved: flags, PDO, DGST bits, the tail.
        ((1, vec![0xff]), Ok, Ok),
        ((3, vec![0xff]), Ok, Ok),
        ((11, vec![0xfc]), Ok, Ok),
        ((127, vec![0xff]), Ok, Ok),
        // The lowest wrong byte is reported.
        ((2, vec![0, 0, 0, 0, 0, 0, 9, 9, 99]), Fatal(FIELD, 2), Fatal(FIELD, 2)),
    ];
    for ((at, patch), req, resp) in cases {
        for (role, want) in [(Role::Controller, req), (Role::Host, resp)] {
            let mut bytes = opening(role);
            bytes[at..at + patch.len()].copy_from_slice(&patch);
            for piece in [1, 128] {
                let seen = run(role, PLAIN, &bytes, &[piece]);
                assert_eq!(outcome(seen.error), want, "{role:?} byte {at} = {patch:?}");
            }
        }
    }
}

#[test]
fn flags() {
    use PduType::*;
    let cases = [
        // HDGSTF must be what was negotiated.
        (CapsuleCmd, PLAIN, 1, 0, 76, 0, Fatal(FIELD, 1)),
        (CapsuleCmd, HDGST, 0, 0, 72, 0, Fatal(FIELD, 1)),
        (CapsuleCmd, HDGST, 1, 0, 76, 0, Ok),
        (CapsuleResp, PLAIN, 1, 0, 28, 0, Fatal(FIELD, 1)),
        (CapsuleResp, HDGST, 0, 0, 24, 0, Fatal(FIELD, 1)),
        (CapsuleResp, HDGST, 1, 0, 28, 0, Ok),
        (R2t, HDGST, 0, 0, 24, 4, Fatal(FIELD, 1)),
        (R2t, HDGST, 1, 0, 28, 4, Ok),
        // DDGSTF must be what was negotiated, where there is data.
        (CapsuleCmd, PLAIN, 2, 72, 80, 0, Fatal(FIELD, 1)),
        (CapsuleCmd, DDGST, 0, 72, 80, 0, Fatal(FIELD, 1)),
        (CapsuleCmd, DDGST, 2, 72, 80, 0, Ok),
        (CapsuleCmd, DDGST, 0, 0, 72, 0, Ok),
        (CapsuleCmd, DDGST, 2, 0, 72, 0, Ok),
        (H2cData, PLAIN, 2, 24, 32, 4, Fatal(FIELD, 1)),
        (H2cData, DDGST, 0, 24, 32, 8, Fatal(FIELD, 1)),
        (H2cData, DDGST, 2, 24, 32, 4, Ok),
        (C2hData, BOTH, 1, 28, 36, 4, Fatal(FIELD, 1)),
        (C2hData, BOTH, 2, 28, 36, 4, Fatal(FIELD, 1)),
        (C2hData, BOTH, 3, 28, 36, 4, Ok),
        // SUCCESS needs LAST; in H2CData the bit is reserved.
        (C2hData, PLAIN, 4, 24, 28, 4, Ok),
        (C2hData, PLAIN, 8, 24, 28, 4, Fatal(FIELD, 1)),
        (C2hData, PLAIN, 12, 24, 28, 4, Ok),
        (H2cData, PLAIN, 8, 24, 28, 4, Ok),
        // Reserved bits.
        (CapsuleCmd, PLAIN, 0xfc, 0, 72, 0, Ok),
        (H2cData, PLAIN, 0xf4, 24, 28, 4, Ok),
    ];
    for (pdu, limits, flags, pdo, plen, datal, want) in cases {
        let h = hdr(pdu, flags, pdo, plen, datal);
        check(pdu.receiver(), limits, &format!("{pdu:?} flags {flags:#x}"), &h, want);
    }
}

#[test]
fn hlen() {
    for pdu in PduType::ALL.into_iter().filter(|p| !p.is_ic()) {
        let right = pdu.hlen();
        for hlen in [0, 8, right - 1, right, right + 1, 255] {
            let (pdo, data) = if pdu.has_data() { (right, 4) } else { (0, 0) };
            let mut h = hdr(pdu, 0, pdo, u32::from(right) + data, 4);
            h.hlen = hlen;
            let want = match (hlen == right, pdu.is_term()) {
                (true, _) => Ok,
                (false, true) => Silent,
                (false, false) => Fatal(FIELD, 2),
            };
            check(pdu.receiver(), PLAIN, &format!("{pdu:?} HLEN {hlen}"), &h, want);
        }
    }
}

#[test]
fn pdo() {
    use PduType::*;
    // With a PLEN that always leaves room for 4 data bytes (and the digest) behind PDO.
    type Case = (PduType, Limits, u8, &'static [(u8, bool)]);
    let cases: [Case; 5] = [
        (
            CapsuleCmd,
            PLAIN,
            0,
            &[
                (0, false),
                (71, false),
                (72, true),
                (73, false),
                (74, false),
                (76, true),
                (252, true),
                (255, false),
            ],
        ),
        (CapsuleCmd, HDGST, 1, &[(72, false), (75, false), (76, true), (77, false), (80, true)]),
        (
            CapsuleCmd,
            ALIGN64,
            0,
            &[(72, false), (127, false), (128, true), (132, false), (192, true), (255, false)],
        ),
        (H2cData, ALIGN64, 0, &[(24, false), (63, false), (64, true), (65, false), (128, true)]),
        (C2hData, BOTH, 3, &[(0, false), (24, false), (27, false), (28, true), (29, false), (32, true)]),
    ];
    for (pdu, limits, flags, pdos) in cases {
        for &(pdo, ok) in pdos {
            let plen = 256 + 4 + if limits.ddgst { 4 } else { 0 };
            let data = plen - u32::from(pdo) - if limits.ddgst { 4 } else { 0 };
            let h = hdr(pdu, flags, pdo, plen, data);
            let want = if ok { Ok } else { Fatal(FIELD, 3) };
            check(pdu.receiver(), limits, &format!("{pdu:?} PDO {pdo} {limits:?}"), &h, want);
        }
    }
    // Reserved where there is no data.
    for (pdu, plen) in [(CapsuleCmd, 72), (CapsuleResp, 24), (R2t, 24)] {
        check(pdu.receiver(), PLAIN, "PDO without data", &hdr(pdu, 0, 0xff, plen, 4), Ok);
    }
}

#[test]
fn plen() {
    use PduType::*;
    let cases = [
        // No data: exactly header and digest.
        (CapsuleResp, PLAIN, 0, 0, 23, Fatal(FIELD, 4)),
        (CapsuleResp, PLAIN, 0, 0, 24, Ok),
        (CapsuleResp, PLAIN, 0, 0, 25, Fatal(FIELD, 4)),
        (CapsuleResp, HDGST, 1, 0, 24, Fatal(FIELD, 4)),
        (CapsuleResp, HDGST, 1, 0, 28, Ok),
        (R2t, PLAIN, 0, 0, 0, Fatal(FIELD, 4)),
        (R2t, PLAIN, 0, 0, 24, Ok),
        (R2t, PLAIN, 0, 0, u32::MAX, Fatal(FIELD, 4)),
        // Capsule: header only, or at least a byte behind PDO and digest, at most the capsule's size.
        (CapsuleCmd, PLAIN, 0, 72, 0, Fatal(FIELD, 4)),
        (CapsuleCmd, PLAIN, 0, 72, 71, Fatal(FIELD, 4)),
        (CapsuleCmd, PLAIN, 0, 72, 72, Ok),
        (CapsuleCmd, PLAIN, 0, 72, 73, Ok),
        (CapsuleCmd, PLAIN, 0, 76, 76, Fatal(FIELD, 4)),
        (CapsuleCmd, PLAIN, 0, 76, 77, Ok),
        (CapsuleCmd, PLAIN, 0, 72, 72 + 8191, Ok),
        (CapsuleCmd, PLAIN, 0, 72, 72 + 8192, Ok),
        (CapsuleCmd, PLAIN, 0, 72, 72 + 8193, Fatal(FIELD, 4)),
        (CapsuleCmd, PLAIN, 0, 72, u32::MAX, Fatal(FIELD, 4)),
        (CapsuleCmd, DDGST, 2, 72, 75, Fatal(FIELD, 4)),
        (CapsuleCmd, DDGST, 2, 72, 76, Fatal(FIELD, 4)),
        (CapsuleCmd, DDGST, 2, 72, 77, Ok),
        (CapsuleCmd, DDGST, 2, 72, 76 + 8192, Ok),
        (CapsuleCmd, DDGST, 2, 72, 77 + 8192, Fatal(FIELD, 4)),
        // Data PDUs carry data, at most MAXH2CDATA; more is a limit of its own from a controller.
        (H2cData, PLAIN, 0, 24, 23, Fatal(FIELD, 4)),
        (H2cData, PLAIN, 0, 24, 24, Fatal(FIELD, 4)),
        (H2cData, PLAIN, 0, 24, 25, Ok),
        (H2cData, PLAIN, 0, 24, 24 + 0x2_0000, Ok),
        (H2cData, PLAIN, 0, 24, 25 + 0x2_0000, Fatal(Fes::LimitExceeded, 0)),
        (H2cData, PLAIN, 0, 24, u32::MAX, Fatal(Fes::LimitExceeded, 0)),
        (C2hData, BOTH, 3, 28, 32, Fatal(FIELD, 4)),
        (C2hData, BOTH, 3, 28, 33, Ok),
        (C2hData, BOTH, 3, 28, 32 + 0x2_0000, Ok),
        (C2hData, BOTH, 3, 28, 33 + 0x2_0000, Fatal(Fes::OutOfRange, 0)),
        // Termination requests: 24..=152, and never answered.
        (H2cTermReq, PLAIN, 0, 0, 23, Silent),
        (H2cTermReq, PLAIN, 0, 0, 24, Ok),
        (H2cTermReq, PLAIN, 0, 0, 152, Ok),
        (C2hTermReq, PLAIN, 0, 0, 152, Ok),
        (C2hTermReq, PLAIN, 0, 0, 153, Silent),
        (C2hTermReq, PLAIN, 0, 0, u32::MAX, Silent),
    ];
    for (pdu, limits, flags, pdo, plen, want) in cases {
        let datal = match pdu {
            H2cData | C2hData => {
                plen.saturating_sub(u32::from(pdo)).saturating_sub(if limits.ddgst { 4 } else { 0 })
            }
            _ => 4,
        };
        let h = hdr(pdu, flags, pdo, plen, datal);
        check(pdu.receiver(), limits, &format!("{pdu:?} PLEN {plen}"), &h, want);
    }
}

#[test]
fn data_fields() {
    use PduType::*;
    let data = |pdu| hdr(pdu, 0, 24, 32, 8);
    let last_dword = u32::MAX - 3;
    for pdu in [H2cData, C2hData] {
        let role = pdu.receiver();
        check(role, PLAIN, "DATAO 0", &data(pdu), Ok);
        for (datao, want) in [
            (1, Fatal(FIELD, 12)),
            (2, Fatal(FIELD, 12)),
            (4, Ok),
            (last_dword - 8, Ok),
            (last_dword - 4, Fatal(Fes::OutOfRange, 0)),
            (last_dword, Fatal(Fes::OutOfRange, 0)),
            (u32::MAX, Fatal(FIELD, 12)),
        ] {
            check(role, PLAIN, &format!("DATAO {datao}"), &data(pdu).with_offset(datao), want);
        }
        for datal in [0, 7, 9, u32::MAX] {
            let h = hdr(pdu, 0, 24, 32, datal);
            check(role, PLAIN, &format!("DATAL {datal}"), &h, Fatal(FIELD, 16));
        }
    }
    for (offset, len, want) in [
        (0, 0, Fatal(FIELD, 16)),
        (0, 1, Ok),
        (0, u32::MAX, Ok),
        (2, 4, Fatal(FIELD, 12)),
        (4, u32::MAX - 4, Ok),
        (4, u32::MAX - 3, Fatal(Fes::OutOfRange, 0)),
    ] {
        let h = hdr(R2t, 0, 0, 24, len).with_offset(offset);
        check(Role::Host, PLAIN, &format!("R2T {offset}+{len}"), &h, want);
    }
}

#[test]
fn header_digest() {
    use PduType::*;
    for (pdu, flags, pdo, plen) in [
        (CapsuleCmd, 1, 0, 76),
        (CapsuleResp, 1, 0, 28),
        (H2cData, 1, 28, 32),
        (C2hData, 1, 28, 32),
        (R2t, 1, 0, 28),
    ] {
        let mut h = hdr(pdu, flags, pdo, plen, 4);
        check(pdu.receiver(), HDGST, "right digest", &h, Ok);
        h.break_digest = true;
        let bytes = h.bytes();
        let received = u32::from_le_bytes(bytes[bytes.len() - 4..].try_into().expect("4 bytes"));
        check(pdu.receiver(), HDGST, "wrong digest", &h, Fatal(Fes::HeaderDigest, received));
        // A wrong digest comes before the fields it covers.
        let h = h.with_offset(1);
        let bytes = h.bytes();
        let received = u32::from_le_bytes(bytes[bytes.len() - 4..].try_into().expect("4 bytes"));
        check(pdu.receiver(), HDGST, "wrong digest and field", &h, Fatal(Fes::HeaderDigest, received));
    }
}
