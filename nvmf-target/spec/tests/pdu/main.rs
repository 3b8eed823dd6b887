//! NVMe/TCP PDUs: golden bytes, the parser's boundary matrix, and properties.

mod golden;
mod matrix;
mod props;

use cryptfold_nvmf_spec::pdu::{Event, Limits, Parser, Pdu, PduError, Role};

/// What a stream amounted to, however it was cut.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// Header, data and received data digest of each complete PDU, and of a last one amid its data.
    pub pdus: Vec<(Pdu, Vec<u8>, Option<Option<u32>>)>,
    /// The violation that ended the stream.
    pub error: Option<PduError>,
    /// What a termination request would quote.
    pub header_bytes: Vec<u8>,
}

/// Feeds `stream` in pieces of the given sizes (repeated), establishing `limits` after the initialization.
pub fn run(role: Role, limits: Limits, stream: &[u8], pieces: &[usize]) -> Seen {
    let mut parser = Parser::new(role);
    let mut seen = Seen { pdus: vec![], error: None, header_bytes: vec![] };
    let mut rest = stream;
    'stream: for piece in pieces.iter().cycle() {
        let (mut input, tail) = rest.split_at(rest.len().min(*piece));
        rest = tail;
        loop {
            let progress = match parser.feed(input) {
                Ok(progress) => progress,
                Err(error) => {
                    seen.error = Some(error);
                    assert_eq!(parser.feed(input), Err(error), "errors are sticky");
                    break 'stream;
                }
            };
            match progress.event {
                Event::NeedMore => {
                    assert_eq!(progress.consumed, input.len());
                    break;
                }
                Event::Header(pdu) => {
                    if pdu.layout.pdu.is_ic() {
                        parser.establish(limits);
                    }
                    seen.pdus.push((pdu, vec![], None));
                }
                Event::Data { start, len } => {
                    let last = seen.pdus.last_mut().expect("data follows a header");
                    last.1.extend_from_slice(&input[start..start + len]);
                }
                Event::End { ddgst } => {
                    let last = seen.pdus.last_mut().expect("an end follows a header");
                    assert_eq!(last.1.len() as u32, last.0.layout.data_len);
                    last.2 = Some(ddgst);
                }
            }
            input = &input[progress.consumed..];
        }
        if rest.is_empty() {
            break;
        }
    }
    seen.header_bytes = parser.header_bytes().to_vec();
    seen
}

/// An ICReq or ICResp that opens a stream for `role`.
pub fn opening(role: Role) -> Vec<u8> {
    let mut buf = vec![0; 128];
    let n = match role {
        Role::Controller => cryptfold_nvmf_spec::pdu::build::ic_req(&mut buf, 0, true, true, 0),
        Role::Host => cryptfold_nvmf_spec::pdu::build::ic_resp(&mut buf, 0, true, true, 4096),
    };
    assert_eq!(n, Ok(128));
    buf
}
