//! Each PDU byte by byte, as the figures of NVMe/TCP 1.0 section 3.6.2 lay it out.

use cryptfold_nvmf_spec::opcode::Io;
use cryptfold_nvmf_spec::pdu::build::{self, BuildError, DataPart, Format};
use cryptfold_nvmf_spec::pdu::{Fes, Header, Limits, Parser, Pdu, Role, Term};
use cryptfold_nvmf_spec::{Cid, Cqe, Nsid, Sgl, Sqe, Status, Ttag};

use super::{opening, run};

const PLAIN: Format = Format { hdgst: false, ddgst: false, align_bytes: 4 };
const DIGESTS: Format = Format { hdgst: true, ddgst: true, align_bytes: 32 };

fn built(f: impl Fn(&mut [u8]) -> Result<usize, BuildError>) -> Vec<u8> {
    // Dirty, so that every reserved byte is seen to be written.
    let mut buf = vec![0xa5; 256];
    let n = f(&mut buf).expect("the buffer is large enough");
    assert_eq!(f(&mut vec![0; n - 1]), Err(BuildError::Buffer(n - 1, n)));
    buf.truncate(n);
    buf
}

fn padded(head: &[u8], len: usize) -> Vec<u8> {
    let mut v = head.to_vec();
    v.resize(len, 0);
    v
}

/// The single PDU of `bytes` after the opening.
fn parsed(role: Role, limits: Limits, bytes: &[u8], data: &[u8]) -> Pdu {
    let stream = [&opening(role)[..], bytes, data].concat();
    let seen = run(role, limits, &stream, &[usize::MAX]);
    assert_eq!(seen.error, None);
    assert_eq!(seen.pdus.len(), 2);
    seen.pdus[1].0
}

#[test]
fn ic_req() {
    let bytes = built(|b| build::ic_req(b, 3, true, false, 15));
    let head = [
        0x00, 0, 0x80, 0, 0x80, 0, 0, 0, /* PFV */ 0, 0, /* HPDA */ 3, /* DGST */ 1, 15, 0, 0,
        0,
    ];
    assert_eq!(bytes, padded(&head, 128));
    let seen = run(Role::Controller, Limits::default(), &bytes, &[128]);
    let want = Header::IcReq { align_bytes: 16, hdgst: true, ddgst: false, max_r2t: 16 };
    assert_eq!(seen.pdus[0].0.header, want);
}

#[test]
fn ic_resp() {
    let bytes = built(|b| build::ic_resp(b, 0, true, true, 0x2_0000));
    let head = [0x01, 0, 0x80, 0, 0x80, 0, 0, 0, 0, 0, 0, 3, 0, 0, 2, 0];
    assert_eq!(bytes, padded(&head, 128));
    let seen = run(Role::Host, Limits::default(), &bytes, &[128]);
    let want = Header::IcResp { align_bytes: 4, hdgst: true, ddgst: true, max_h2c_data_bytes: 0x2_0000 };
    assert_eq!(seen.pdus[0].0.header, want);
}

#[test]
fn term_req() {
    let bad = [0x04, 0, 72, 3, 80, 0, 0, 0];
    let bytes = built(|b| build::term_req(b, Role::Controller, Term::invalid_field(3), &bad));
    // FEI is at byte 10, not aligned.
    let head = [0x03, 0, 24, 0, 32, 0, 0, 0, /* FES */ 1, 0, /* FEI */ 3, 0, 0, 0];
    assert_eq!(bytes, [&padded(&head, 24)[..], &bad].concat());
    let pdu = parsed(Role::Host, Limits::default(), &bytes, &[]);
    assert_eq!(pdu.header, Header::TermReq { fes: Fes::InvalidHeaderField as u16, fei: 3 });
    assert_eq!((pdu.layout.data_offset, pdu.layout.data_len), (24, 8));

    let term = Term { fes: Fes::HeaderDigest, fei: 0x1122_3344 };
    let bytes = built(|b| build::term_req(b, Role::Host, term, &[7; 200]));
    assert_eq!(bytes.len(), 152);
    assert_eq!(&bytes[..14], [0x02, 0, 24, 0, 152, 0, 0, 0, 3, 0, 0x44, 0x33, 0x22, 0x11]);
    assert_eq!(&bytes[24..], [7; 128]);
}

fn write_sqe() -> Sqe {
    let mut sqe = Sqe::io(Io::Write, Cid(0x1234), Nsid(1));
    sqe.sgl = Sgl::in_capsule(0, 4096);
    sqe.set_rw(0x1_0000_0002, 8, Default::default());
    sqe
}

#[rustfmt::skip]
const WRITE_SQE: [u8; 64] = [
    0x01, 0x40, 0x34, 0x12, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, /* SGL */ 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0x10, 0, 0, 0, 0, 0, 0x01, /* SLBA */ 2, 0, 0, 0, 1, 0, 0, 0,
    /* NLB */ 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

#[test]
fn capsule_cmd() {
    let sqe = write_sqe();
    let bytes = built(|b| build::capsule_cmd(b, &sqe, 4096, PLAIN));
    assert_eq!(&bytes[..8], [0x04, 0, 72, 72, 0x48, 0x10, 0, 0]);
    assert_eq!(&bytes[8..], WRITE_SQE);
    let pdu = parsed(Role::Controller, Limits::default(), &bytes, &[9; 4096]);
    assert_eq!(pdu.header, Header::CapsuleCmd(sqe));

    // With digests and 32-byte alignment: 72 + 4 = 76, padded to 96; 96 + 4096 + 4 = 4196.
    let bytes = built(|b| build::capsule_cmd(b, &sqe, 4096, DIGESTS));
    assert_eq!(&bytes[..8], [0x04, 0x03, 72, 96, 0x64, 0x10, 0, 0]);
    assert_eq!((bytes.len(), &bytes[76..]), (96, &[0; 20][..]));

    // Without data: no PDO, no DDGST.
    let bytes = built(|b| build::capsule_cmd(b, &sqe, 0, DIGESTS));
    assert_eq!(&bytes[..8], [0x04, 0x01, 72, 0, 76, 0, 0, 0]);
}

#[test]
fn capsule_resp() {
    let cqe = Cqe::new(Cid(0x1234), 5, Status::LBA_OUT_OF_RANGE.with_dnr()).with_dw0(0x0403_0201);
    let bytes = built(|b| build::capsule_resp(b, &cqe, PLAIN));
    let want = [
        0x05, 0, 24, 0, 24, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 5, 0, 0, 0, 0x34, 0x12,
        /* 80h, DNR */ 0x00, 0x81,
    ];
    assert_eq!(bytes, want);
    let pdu = parsed(Role::Host, Limits::default(), &bytes, &[]);
    assert_eq!(pdu.header, Header::CapsuleResp(cqe));
}

#[test]
fn h2c_data() {
    let part = DataPart { cid: Cid(0x1234), offset: 0x1000, len: 8, last: true };
    let bytes = built(|b| build::h2c_data(b, part, Ttag(0x5678), PLAIN));
    let want = [0x06, 4, 24, 24, 32, 0, 0, 0, 0x34, 0x12, 0x78, 0x56, 0, 0x10, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(bytes, want);
    let pdu = parsed(Role::Controller, Limits::default(), &bytes, &[1; 8]);
    let want = Header::H2cData { cid: Cid(0x1234), ttag: Ttag(0x5678), offset: 0x1000, last: true };
    assert_eq!(pdu.header, want);
}

#[test]
fn c2h_data_with_digests() {
    let part = DataPart { cid: Cid(0x1234), offset: 0x1000, len: 8, last: true };
    let bytes = built(|b| build::c2h_data(b, part, true, DIGESTS));
    // 24 + 4 = 28, padded to 32; 32 + 8 + 4 = 44. Digest from an independent bitwise CRC32C.
    let head = [0x07, 0x0f, 24, 32, 44, 0, 0, 0, 0x34, 0x12, 0, 0, 0, 0x10, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(bytes, [&head[..], &C2H_DIGEST.to_le_bytes(), &[0; 4]].concat());
    let limits = Limits { hdgst: true, ddgst: true, align_bytes: 32, ..Default::default() };
    let pdu = parsed(Role::Host, limits, &bytes, &[1; 12]);
    let want = Header::C2hData { cid: Cid(0x1234), offset: 0x1000, last: true, success: true };
    assert_eq!(pdu.header, want);
    assert_eq!((pdu.layout.data_offset, pdu.layout.data_len, pdu.layout.ddgst_offset), (32, 8, Some(40)));

    // SUCCESS is dropped where LAST is not set.
    let part = DataPart { last: false, ..part };
    assert_eq!(built(|b| build::c2h_data(b, part, true, PLAIN))[1], 0);
}

#[test]
fn r2t_with_digest() {
    let bytes = built(|b| build::r2t(b, Cid(0x1234), Ttag(0x5678), 0x1000, 0x2000, DIGESTS));
    let head = [9, 1, 24, 0, 28, 0, 0, 0, 0x34, 0x12, 0x78, 0x56, 0, 0x10, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0];
    assert_eq!(bytes, [&head[..], &R2T_DIGEST.to_le_bytes()].concat());
    let limits = Limits { hdgst: true, ddgst: true, ..Default::default() };
    let pdu = parsed(Role::Host, limits, &bytes, &[]);
    let want = Header::R2t { cid: Cid(0x1234), ttag: Ttag(0x5678), offset: 0x1000, len: 0x2000 };
    assert_eq!(pdu.header, want);
}

#[test]
fn lengths_that_no_pdu_expresses() {
    let mut buf = [0; 256];
    let sqe = Sqe::default();
    let e = build::capsule_cmd(&mut buf, &sqe, u32::MAX - 71, PLAIN);
    assert_eq!(e, Err(BuildError::DataLength(u32::MAX - 71)));
    assert!(build::capsule_cmd(&mut buf, &sqe, u32::MAX - 72, PLAIN).is_ok());
    for align_bytes in [0, 2, 6, 132] {
        let fmt = Format { align_bytes, ..PLAIN };
        assert_eq!(build::capsule_cmd(&mut buf, &sqe, 4, fmt), Err(BuildError::Alignment(align_bytes)));
    }
    // 128 is the largest alignment, and the largest PDO.
    let fmt = Format { align_bytes: 128, ..DIGESTS };
    assert_eq!(build::capsule_cmd(&mut buf, &sqe, 4, fmt), Ok(128));
    assert_eq!(buf[3], 128);
}

#[test]
fn direct_receive_replaces_feeding() {
    let bytes = built(|b| build::capsule_cmd(b, &write_sqe(), 4096, DIGESTS));
    let limits = Limits { hdgst: true, ddgst: true, align_bytes: 32, ..Default::default() };
    let mut parser = Parser::new(Role::Controller);
    assert_eq!(parser.bytes_wanted(), 8);
    parser.feed(&opening(Role::Controller)).expect("legal");
    parser.establish(limits);
    assert!(parser.at_boundary());
    let progress = parser.feed(&bytes).expect("legal");
    assert_eq!(progress.consumed, 76);
    assert_eq!((parser.data_wanted(), parser.bytes_wanted()), (0, 20));
    parser.feed(&bytes[76..]).expect("padding");
    assert_eq!(parser.data_wanted(), 4096);
    parser.data_received(4000);
    parser.data_received(96);
    assert_eq!((parser.data_wanted(), parser.bytes_wanted()), (0, 4));
    let end = parser.feed(&[1, 2, 3, 4, 5]).expect("digest");
    assert_eq!(end.consumed, 4);
    assert_eq!(end.event, cryptfold_nvmf_spec::pdu::Event::End { ddgst: Some(0x0403_0201) });
    assert!(parser.at_boundary());
}

const R2T_DIGEST: u32 = 0x218a_9d57;
const C2H_DIGEST: u32 = 0x033e_377d;
