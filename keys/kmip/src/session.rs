//! One connection to one server: TLS, time limits, the version both speak.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig as TlsConfig, ClientConnection, StreamOwned};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::client::ServerAddress;
use crate::message::{Answer, MessageError, Reason, Refusal, Request, Version, parse_response};
use crate::ttlv::{HEAD_BYTES, TtlvError, message_len};

/// Why a server could not be asked.
#[derive(Debug, Error)]
pub enum SessionError {
    /// Its name does not resolve, or to nothing.
    #[error("address not found: {0}")]
    Address(io::Error),
    /// No connection.
    #[error("no connection: {0}")]
    Connect(io::Error),
    /// TLS: certificates that do not fit, or no TLS at all.
    #[error("TLS: {0}")]
    Tls(String),
    /// Not done in time.
    #[error("no answer within {ms} ms")]
    TimedOut {
        /// The limit.
        ms: u64,
    },
    /// The connection broke.
    #[error("connection lost: {0}")]
    Lost(io::Error),
    /// What came is no KMIP.
    #[error("{0}")]
    Message(#[from] MessageError),
    /// Server and client have no version of the protocol in common.
    #[error("no common KMIP version: {0}")]
    Version(Refusal),
}

impl From<TtlvError> for SessionError {
    fn from(e: TtlvError) -> SessionError {
        SessionError::Message(e.into())
    }
}

/// A connection that can be given a point in time by which everything must be done.
pub trait Stream: Read + Write + Send {
    /// Reads and writes fail with [`io::ErrorKind::TimedOut`] from then on.
    fn set_deadline(&mut self, deadline: Instant);
}

/// Makes connections; tests bring their own.
pub trait Connect: Send + Sync {
    /// Connects, and proves who the server is.
    ///
    /// # Errors
    /// See [`SessionError`].
    fn connect(&self, server: &ServerAddress, deadline: Instant) -> Result<Box<dyn Stream>, SessionError>;
}

/// TCP whose calls end at the deadline, however slowly the other side sends.
struct Timed {
    tcp: TcpStream,
    deadline: Instant,
}

impl Timed {
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

/// What the kernel says when a socket's time is over.
fn timed_out(e: io::Error) -> io::Error {
    if e.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { e }
}

impl Read for Timed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.tcp.set_read_timeout(Some(self.left()?))?;
        self.tcp.read(buf).map_err(timed_out)
    }
}

impl Write for Timed {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.tcp.set_write_timeout(Some(self.left()?))?;
        self.tcp.write(buf).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.tcp.flush()
    }
}

impl Stream for StreamOwned<ClientConnection, Timed> {
    fn set_deadline(&mut self, deadline: Instant) {
        self.sock.deadline = deadline;
    }
}

/// TLS over TCP.
pub(crate) struct TlsConnect(pub Arc<TlsConfig>);

impl Connect for TlsConnect {
    fn connect(&self, server: &ServerAddress, deadline: Instant) -> Result<Box<dyn Stream>, SessionError> {
        let tcp = connect_tcp(server, deadline)?;
        // A request is one write; waiting for more would only cost time.
        tcp.set_nodelay(true).map_err(SessionError::Connect)?;
        let name = ServerName::try_from(server.host.clone()).map_err(|e| {
            SessionError::Tls(format!("\"{}\" is no name for a certificate: {e}", server.host))
        })?;
        let tls =
            ClientConnection::new(self.0.clone(), name).map_err(|e| SessionError::Tls(e.to_string()))?;
        let mut stream = StreamOwned::new(tls, Timed { tcp, deadline });
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).map_err(|e| match e.kind() {
                io::ErrorKind::TimedOut => SessionError::Tls("the handshake was not done in time".into()),
                _ => SessionError::Tls(e.to_string()),
            })?;
        }
        Ok(Box::new(stream))
    }
}

fn connect_tcp(server: &ServerAddress, deadline: Instant) -> Result<TcpStream, SessionError> {
    let addresses = (server.host.as_str(), server.port).to_socket_addrs().map_err(SessionError::Address)?;
    let mut last = SessionError::Address(io::Error::new(io::ErrorKind::NotFound, "no address for this name"));
    for address in addresses {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(SessionError::Connect(io::ErrorKind::TimedOut.into()));
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(tcp) => return Ok(tcp),
            Err(e) => last = SessionError::Connect(e),
        }
    }
    Err(last)
}

/// A connection with its version.
pub(crate) struct Session {
    stream: Box<dyn Stream>,
    version: Version,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session(KMIP {})", self.version)
    }
}

impl Session {
    /// Connects and agrees on a version (Discover Versions; a server that refuses one version is asked in the next).
    pub fn open(
        connect: &dyn Connect,
        server: &ServerAddress,
        connect_limit: Duration,
        request_limit: Duration,
    ) -> Result<Session, SessionError> {
        let stream = connect.connect(server, Instant::now() + connect_limit)?;
        let mut session = Session { stream, version: Version::OURS[0] };
        let discover = Request::discover_versions(&Version::OURS);
        let mut refused = None;
        for version in Version::OURS {
            session.version = version;
            match session.ask(&discover, request_limit)? {
                Ok(answer) => {
                    session.version = answer.version()?;
                    return Ok(session);
                }
                // It understood the version, but does not have the operation.
                Err(r) if r.reason == Reason::OPERATION_NOT_SUPPORTED => return Ok(session),
                Err(r) => refused = Some(r),
            }
        }
        let nothing = || Refusal { reason: Reason::INVALID_MESSAGE, message: String::new() };
        Err(SessionError::Version(refused.unwrap_or_else(nothing)))
    }

    /// The version that both speak.
    pub fn version(&self) -> Version {
        self.version
    }

    /// One request and its answer.
    pub fn ask(
        &mut self,
        request: &Request,
        limit: Duration,
    ) -> Result<Result<Answer, Refusal>, SessionError> {
        let lost = |e: io::Error| match e.kind() {
            io::ErrorKind::TimedOut => SessionError::TimedOut { ms: limit.as_millis() as u64 },
            // What rustls calls a failure of the protocol, such as an alert that says that our certificate is refused.
            io::ErrorKind::InvalidData => SessionError::Tls(e.to_string()),
            _ => SessionError::Lost(e),
        };
        let bytes = request.encode(self.version)?;
        self.stream.set_deadline(Instant::now() + limit);
        self.stream.write_all(&bytes).and_then(|()| self.stream.flush()).map_err(lost)?;
        let mut head = [0; HEAD_BYTES];
        self.stream.read_exact(&mut head).map_err(lost)?;
        let len = message_len(&head)?;
        let mut message = Zeroizing::new(vec![0; len]);
        message[..HEAD_BYTES].copy_from_slice(&head);
        self.stream.read_exact(&mut message[HEAD_BYTES..]).map_err(lost)?;
        Ok(parse_response(&message, request.operation)?)
    }
}
