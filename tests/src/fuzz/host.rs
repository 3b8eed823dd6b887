//! A host's end of one connection that says whatever it is told to, and believes nothing that comes back: what the target
//! sends is parsed and checked, and what is wrong with it is told.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use cryptfold_nvmf_spec::pdu::build::{self, DataPart, Format};
use cryptfold_nvmf_spec::pdu::{Digest, Event, Header, Limits, Parser, Role};
use cryptfold_nvmf_spec::{Cid, Cqe, Sqe, Ttag};

/// How long the target may take for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What comes from the target.
#[derive(Debug)]
pub enum Pdu {
    /// Its answer to the greeting.
    IcResp,
    /// A completion.
    Response(Cqe),
    /// Data of a command; `success`: it stands for the completion.
    Data {
        /// Of which command.
        cid: Cid,
        /// Where it belongs, bytes.
        offset: u32,
        /// The data.
        bytes: Vec<u8>,
        /// It stands for the completion.
        success: bool,
    },
    /// A request for data.
    R2t {
        /// Of which command.
        cid: Cid,
        /// Its tag.
        ttag: Ttag,
        /// From where, bytes.
        offset: u32,
        /// How much, bytes.
        len: u32,
    },
}

/// Why nothing more comes.
#[derive(Debug)]
pub enum End {
    /// The connection has ended.
    Closed,
    /// A termination request: FES and FEI.
    Terminated(u16, u32),
    /// Nothing came in time.
    Silent,
    /// The target broke the protocol.
    Broken(String),
}

/// One connection.
pub struct Host {
    stream: TcpStream,
    parser: Parser,
    format: Format,
    input: Vec<u8>,
}

impl Host {
    /// A connected socket.
    ///
    /// # Errors
    /// [`End::Closed`] when nobody listens.
    pub fn dial(addr: SocketAddr) -> Result<Host, End> {
        let stream = TcpStream::connect_timeout(&addr, PATIENCE).map_err(|_| End::Closed)?;
        let set = stream.set_nodelay(true).and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
        set.map_err(|e| End::Broken(format!("a socket option: {e}")))?;
        Ok(Host { stream, parser: Parser::new(Role::Host), format: Format::default(), input: Vec::new() })
    }

    /// The greeting, with or without digests.
    ///
    /// # Errors
    /// The end of the connection.
    pub fn greet(&mut self, hdgst: bool, ddgst: bool, more_r2ts: u32) -> Result<(), End> {
        let mut buf = [0; 128];
        let n =
            build::ic_req(&mut buf, 0, hdgst, ddgst, more_r2ts).map_err(|e| End::Broken(format!("{e:?}")))?;
        self.send(&buf[..n])?;
        match self.recv(PATIENCE)? {
            Pdu::IcResp => Ok(()),
            other => Err(End::Broken(format!("instead of ICResp: {other:?}"))),
        }
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The connection has ended, or the target takes nothing.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.stream.write_all(bytes).map_err(|e| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => End::Silent,
            _ => self.last_word(),
        })
    }

    /// The stream takes no more: what the target said before that.
    fn last_word(&mut self) -> End {
        loop {
            match self.recv(Duration::from_millis(200)) {
                Ok(_) => {}
                Err(End::Silent) => return End::Closed,
                Err(end) => return end,
            }
        }
    }

    /// The next PDU, or why there is none within `patience`.
    ///
    /// # Errors
    /// See [`End`].
    pub fn recv(&mut self, patience: Duration) -> Result<Pdu, End> {
        let deadline = Instant::now() + patience;
        let (mut header, mut data) = (None, Vec::new());
        loop {
            let progress = self.parser.feed(&self.input).map_err(|e| End::Broken(e.to_string()))?;
            let rest = self.input.split_off(progress.consumed);
            let taken = std::mem::replace(&mut self.input, rest);
            match progress.event {
                Event::NeedMore => self.fill(deadline)?,
                Event::Header(pdu) => {
                    if let Header::IcResp { align_bytes, hdgst, ddgst, .. } = pdu.header {
                        self.format = Format { hdgst, ddgst, align_bytes };
                        let limits = Limits { hdgst, ddgst, max_data_bytes: 1 << 20, ..Default::default() };
                        self.parser.establish(limits);
                    }
                    if pdu.layout.data_len == 0 {
                        return value(pdu.header, data);
                    }
                    header = Some(pdu.header);
                }
                Event::Data { start, len } => data.extend_from_slice(&taken[start..start + len]),
                Event::End { ddgst } => {
                    let mut digest = Digest::new();
                    digest.update(&data);
                    if ddgst.is_some_and(|d| d != digest.value()) {
                        return Err(End::Broken("a wrong data digest".into()));
                    }
                    let header = header.take().ok_or_else(|| End::Broken("data without a header".into()))?;
                    return value(header, data);
                }
            }
        }
    }

    fn fill(&mut self, deadline: Instant) -> Result<(), End> {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(left)).map_err(|_| End::Closed)?;
        let mut buf = [0; 65_536];
        match self.stream.read(&mut buf) {
            Ok(0) => Err(End::Closed),
            Ok(n) => {
                self.input.extend_from_slice(&buf[..n]);
                Ok(())
            }
            // The machine or the process was stopped and goes on.
            Err(e) if e.kind() == ErrorKind::Interrupted => Ok(()),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Err(End::Silent),
            Err(_) => Err(End::Closed),
        }
    }

    /// A command capsule as bytes; a length that the builder refuses is an empty one.
    pub fn capsule(&self, sqe: &Sqe, data: &[u8]) -> Vec<u8> {
        self.pdu(|buf, format| build::capsule_cmd(buf, sqe, data.len() as u32, format).unwrap_or(0), data)
    }

    /// An H2CData PDU as bytes.
    pub fn h2c_data(&self, part: DataPart, ttag: Ttag, data: &[u8]) -> Vec<u8> {
        self.pdu(|buf, format| build::h2c_data(buf, part, ttag, format).unwrap_or(0), data)
    }

    fn pdu(&self, head: impl Fn(&mut [u8], Format) -> usize, data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 256];
        let n = head(&mut bytes, self.format);
        bytes.truncate(n);
        bytes.extend_from_slice(data);
        if self.format.ddgst && !data.is_empty() {
            let mut digest = Digest::new();
            digest.update(data);
            bytes.extend(digest.value().to_le_bytes());
        }
        bytes
    }
}

fn value(header: Header, bytes: Vec<u8>) -> Result<Pdu, End> {
    Ok(match header {
        Header::IcResp { .. } => Pdu::IcResp,
        Header::CapsuleResp(cqe) => Pdu::Response(cqe),
        Header::C2hData { cid, offset, success, .. } => Pdu::Data { cid, offset, bytes, success },
        Header::R2t { cid, ttag, offset, len } => Pdu::R2t { cid, ttag, offset, len },
        Header::TermReq { fes, fei } => return Err(End::Terminated(fes, fei)),
        other => return Err(End::Broken(format!("from a target: {other:?}"))),
    })
}
