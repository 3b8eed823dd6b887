//! Any stream, to either role, under any limits: no panic, and the same events however it is cut.
//!
//! The first 8 bytes choose role, limits, whether a legal initialization precedes, and the size of the pieces.
#![no_main]

use cryptfold_nvmf_spec::pdu::{Event, Limits, Parser, Pdu, PduError, Role, build};
use libfuzzer_sys::fuzz_target;

#[derive(PartialEq, Debug, Default)]
struct Seen {
    headers: Vec<Pdu>,
    data: Vec<u8>,
    ends: Vec<(usize, Option<u32>)>,
    error: Option<PduError>,
}

fn run(role: Role, limits: Limits, open: bool, stream: &[u8], piece: usize) -> Seen {
    let mut parser = Parser::new(role);
    let mut seen = Seen::default();
    if open {
        let mut buf = [0; 128];
        let n = match role {
            Role::Controller => build::ic_req(&mut buf, 0, true, true, 0),
            Role::Host => build::ic_resp(&mut buf, 0, true, true, 4096),
        };
        assert_eq!(n, Ok(128));
        parser.feed(&buf).expect("the initialization is legal");
        parser.establish(limits);
    }
    for mut input in stream.chunks(piece) {
        loop {
            let progress = match parser.feed(input) {
                Ok(progress) => progress,
                Err(error) => {
                    seen.error = Some(error);
                    assert!(!parser.header_bytes().is_empty());
                    return seen;
                }
            };
            match progress.event {
                Event::NeedMore => break,
                Event::Header(pdu) => {
                    if pdu.layout.pdu.is_ic() {
                        parser.establish(limits);
                    }
                    seen.headers.push(pdu);
                }
                Event::Data { start, len } => seen.data.extend(&input[start..start + len]),
                Event::End { ddgst } => seen.ends.push((seen.data.len(), ddgst)),
            }
            input = &input[progress.consumed..];
        }
    }
    seen
}

fuzz_target!(|bytes: &[u8]| {
    let Some((knobs, stream)) = bytes.split_first_chunk::<8>() else { return };
    let role = if knobs[0] & 1 == 0 { Role::Controller } else { Role::Host };
    let limits = Limits {
        hdgst: knobs[0] & 2 != 0,
        ddgst: knobs[0] & 4 != 0,
        align_bytes: build::pda_bytes(knobs[1] & 31),
        max_capsule_data_bytes: u32::from(u16::from_le_bytes([knobs[2], knobs[3]])),
        max_data_bytes: u32::from(u16::from_le_bytes([knobs[4], knobs[5]])),
    };
    let open = knobs[0] & 8 == 0;
    let whole = run(role, limits, open, stream, usize::MAX);
    assert_eq!(run(role, limits, open, stream, 1), whole);
    assert_eq!(run(role, limits, open, stream, 1 + usize::from(knobs[6])), whole);
});
