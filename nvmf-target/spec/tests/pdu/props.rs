//! Properties: what is built is parsed back; arbitrary bytes never panic; cutting changes nothing.

use cryptfold_nvmf_spec::pdu::build::{self, DataPart, Format};
use cryptfold_nvmf_spec::pdu::digest::crc32c;
use cryptfold_nvmf_spec::pdu::{Fes, Header, Limits, PduType, Role, Term, Unverified};
use cryptfold_nvmf_spec::{Cid, Cqe, Sqe, Ttag};
use proptest::prelude::*;
use zerocopy::FromBytes;

use super::{opening, run};

#[derive(Debug, Clone)]
enum Msg {
    Cmd([u8; 32], Vec<u8>),
    Resp([u8; 16]),
    Data { cid: u16, ttag: u16, offset: u32, last: bool, success: bool, data: Vec<u8> },
    R2t(u16, u16, u32, u32),
    Term(u16, u32, Vec<u8>),
}

fn messages() -> impl Strategy<Value = Vec<Msg>> {
    let data = |min| prop::collection::vec(any::<u8>(), min..300);
    let msg =
        prop_oneof![
            (any::<[u8; 32]>(), data(0)).prop_map(|(s, d)| Msg::Cmd(s, d)),
            any::<[u8; 16]>().prop_map(Msg::Resp),
            (any::<u16>(), any::<u16>(), 0..0x1000_0000u32, any::<bool>(), any::<bool>(), data(1)).prop_map(
                |(cid, ttag, o, last, s, data)| Msg::Data {
                    cid,
                    ttag,
                    offset: o * 4,
                    last,
                    success: s && last,
                    data
                }
            ),
            (any::<u16>(), any::<u16>(), 0..0x1000_0000u32, 1..0x8000_0000u32)
                .prop_map(|(c, t, o, l)| Msg::R2t(c, t, o * 4, l)),
            (1..=6u16, any::<u32>(), data(0)).prop_map(|(s, i, d)| Msg::Term(s, i, d)),
        ];
    prop::collection::vec(msg, 1..8)
}

/// Writes `msg` as the peer of `role` would; what the parser should report. `None`: not for this role.
fn encode(role: Role, msg: &Msg, fmt: Format, out: &mut Vec<u8>) -> Option<(Header, Vec<u8>)> {
    let mut buf = [0xa5; 256];
    let (len, header, data) = match msg {
        Msg::Cmd(sqe, data) if role == Role::Controller => {
            let sqe = Sqe::read_from_bytes(&[*sqe, *sqe].concat()).expect("64 bytes");
            (
                build::capsule_cmd(&mut buf, &sqe, data.len() as u32, fmt),
                Header::CapsuleCmd(sqe),
                data.clone(),
            )
        }
        Msg::Resp(cqe) if role == Role::Host => {
            let cqe = Cqe::read_from_bytes(cqe).expect("16 bytes");
            (build::capsule_resp(&mut buf, &cqe, fmt), Header::CapsuleResp(cqe), vec![])
        }
        Msg::Data { cid, ttag, offset, last, success, data } => {
            let (cid, ttag, offset, last, success) = (Cid(*cid), Ttag(*ttag), *offset, *last, *success);
            let part = DataPart { cid, offset, len: data.len() as u32, last };
            match role {
                Role::Controller => (
                    build::h2c_data(&mut buf, part, ttag, fmt),
                    Header::H2cData { cid, ttag, offset, last },
                    data.clone(),
                ),
                Role::Host => (
                    build::c2h_data(&mut buf, part, success, fmt),
                    Header::C2hData { cid, offset, last, success },
                    data.clone(),
                ),
            }
        }
        Msg::R2t(cid, ttag, offset, len) if role == Role::Host => {
            let (cid, ttag, offset, len) = (Cid(*cid), Ttag(*ttag), *offset, *len);
            (
                build::r2t(&mut buf, cid, ttag, offset, len, fmt),
                Header::R2t { cid, ttag, offset, len },
                vec![],
            )
        }
        Msg::Term(fes, fei, header) => {
            let sender = if role == Role::Host { Role::Controller } else { Role::Host };
            let fes = Fes::from_u16(*fes).expect("1..=6");
            let n = build::term_req(&mut buf, sender, Term { fes, fei: *fei }, header).expect("it fits");
            out.extend(&buf[..n]);
            let data = header[..header.len().min(128)].to_vec();
            return Some((Header::TermReq { fes: fes as u16, fei: *fei }, data));
        }
        _ => return None,
    };
    out.extend(&buf[..len.expect("it fits")]);
    out.extend(&data);
    if fmt.ddgst && !data.is_empty() {
        out.extend(crc32c(&data).to_le_bytes());
    }
    Some((header, data))
}

fn role() -> impl Strategy<Value = Role> {
    prop_oneof![Just(Role::Controller), Just(Role::Host)]
}

fn limits() -> impl Strategy<Value = Limits> {
    (any::<bool>(), any::<bool>(), 0..32u8, 0..400u32, 1..400u32).prop_map(
        |(hdgst, ddgst, pda, cap, data)| Limits {
            hdgst,
            ddgst,
            align_bytes: build::pda_bytes(pda),
            max_capsule_data_bytes: cap,
            max_data_bytes: data,
        },
    )
}

fn pieces() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1..200usize, 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn built_streams_parse_back(role in role(), l in limits(), msgs in messages(), cuts in pieces()) {
        let limits = Limits { max_capsule_data_bytes: 300, max_data_bytes: 300, ..l };
        let fmt = Format { hdgst: l.hdgst, ddgst: l.ddgst, align_bytes: l.align_bytes };
        let mut stream = opening(role);
        let want: Vec<_> = msgs.iter().filter_map(|m| encode(role, m, fmt, &mut stream)).collect();
        for cuts in [&cuts[..], &[1], &[usize::MAX]] {
            let seen = run(role, limits, &stream, cuts);
            prop_assert_eq!(seen.error, None);
            prop_assert_eq!(seen.pdus.len(), want.len() + 1);
            for ((pdu, data, end), (header, sent)) in seen.pdus[1..].iter().zip(&want) {
                prop_assert_eq!(&pdu.header, header);
                prop_assert_eq!(data, sent);
                if !sent.is_empty() {
                    let digest = (fmt.ddgst && !pdu.layout.pdu.is_term()).then(|| crc32c(sent));
                    prop_assert_eq!(*end, Some(digest));
                }
            }
        }
    }

    #[test]
    fn arbitrary_bytes(role in role(), l in limits(), open: bool, cuts in pieces(),
                       junk in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut stream = if open { opening(role) } else { vec![] };
        stream.extend(junk);
        let whole = run(role, l, &stream, &[usize::MAX]);
        prop_assert_eq!(&run(role, l, &stream, &[1]), &whole);
        prop_assert_eq!(&run(role, l, &stream, &cuts), &whole);
    }

    /// Legal streams with a few bytes changed get past the first checks far more often than junk.
    #[test]
    fn damaged_streams(role in role(), l in limits(), msgs in messages(), cuts in pieces(),
                       hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let fmt = Format { hdgst: l.hdgst, ddgst: l.ddgst, align_bytes: l.align_bytes };
        let mut stream = opening(role);
        for m in &msgs {
            encode(role, m, fmt, &mut stream);
        }
        for (at, value) in hits {
            let at = at.index(stream.len());
            stream[at] = value;
        }
        let whole = run(role, l, &stream, &[usize::MAX]);
        prop_assert_eq!(&run(role, l, &stream, &[1]), &whole);
        prop_assert_eq!(&run(role, l, &stream, &cuts), &whole);
    }

    /// Whatever passes verification is consistent and within the limits.
    #[test]
    fn verified_layouts_are_bounded(role in role(), l in limits(), mut head: [u8; 8], small: bool) {
        if small {
            // Plausible lengths.
            head[0] %= 10;
            head[2] = PduType::from_u8(head[0]).map_or(24, PduType::hlen);
            head[5..8].fill(0);
        }
        if let Ok(layout) = Unverified::new(head).verify(role, &l) {
            prop_assert_eq!(layout.pdu.receiver(), role);
            let digest = if layout.ddgst_offset.is_some() { 4 } else { 0 };
            prop_assert_eq!(layout.data_offset + layout.data_len + digest, layout.plen);
            prop_assert!(layout.header_bytes() as u32 <= layout.data_offset);
            let max = match layout.pdu {
                PduType::CapsuleCmd => l.max_capsule_data_bytes,
                PduType::H2cData | PduType::C2hData => l.max_data_bytes,
                pdu if pdu.is_term() => 128,
                _ => 0,
            };
            prop_assert!(layout.data_len <= max);
            prop_assert!(layout.data_len == 0 || !layout.pdu.has_data() || layout.data_offset.is_multiple_of(l.align_bytes));
        }
    }
}
