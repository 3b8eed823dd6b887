//! One TLS session over one non-blocking stream.
//!
//! ```text
//!   shaking --(Finished on both sides)--> established --(alert, end, error)--> over
//! ```
//!
//! s2n-tls never sees the stream: it reads and writes the buffers of a [`Pipe`], so that many records travel with one system
//! call. Before the handshake is done not a byte more is taken from the stream than it asks for.
//!
//! Where the stream has a record layer of its own (Linux's kernel TLS), it gets the keys as soon as the handshake is done, and what is
//! left to do is in [`kernel`].
//!
//! Sending keeps the rule of sockets: what is reported as sent is with the stream. Data whose records the stream has not
//! taken yet is not reported; the next [`Session::send`] has to begin with the same bytes.

mod kernel;
mod pipe;

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Poll, Waker};

use cryptfold_nvmf_auth::{HashId, TlsPsk};
use s2n_tls::callbacks::{ClientHelloCallback, ConnectionFuture};
use s2n_tls::config::Config;
use s2n_tls::connection::Connection;
use s2n_tls::enums::{self, Blinding, Mode, PskHmac, SerializationVersion};
use s2n_tls::error::{Error, ErrorType};
use s2n_tls::psk::Psk;
use s2n_tls::security::Policy;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::hello::identities;
pub use kernel::{Direction, Layer, Offload, RecordKeys};
use kernel::{Receiving, Sending, secrets};
use pipe::Pipe;

/// TLS 1.3 only; AES-128-GCM, AES-256-GCM, ChaCha20; X25519, P-256, P-384 (s2n-tls, numbered policies never change).
const POLICY: &str = "AWS-CRT-SDK-TLSv1.3";
/// Of TLS 1.3: AES-128-GCM, AES-256-GCM; P-256, P-384, P-521. It also has TLS 1.2 and CBC suites there, as no policy for TLS 1.3 alone has
/// AES-128-GCM; those can not be agreed on, since nobody has a certificate and s2n-tls takes keys like ours in TLS 1.3 only, and [`Session`] looks.
const APPROVED_POLICY: &str = "20230317";
/// Data in a full record, bytes (RFC 8446 section 5.1).
const RECORD_BYTES: usize = 16 << 10;
/// Data that is encrypted before the stream is asked to take it, bytes.
const SEND_BYTES: usize = 8 * RECORD_BYTES;
/// First and largest size of a receive, bytes.
const RECEIVE_BYTES: (usize, usize) = (32 << 10, 256 << 10);
/// Types of records that a stream can begin with (RFC 8446 section 5.1).
const HANDSHAKE: u8 = 22;
const ALERT: u8 = 21;
/// Identities of one hello that are looked up.
const IDENTITIES_MAX: usize = 8;

/// The stream below.
pub trait Raw {
    /// As a non-blocking socket's `readv`.
    ///
    /// # Errors
    /// As a non-blocking socket's.
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize>;
    /// As a non-blocking socket's `writev`.
    ///
    /// # Errors
    /// As a non-blocking socket's.
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize>;
    /// The kernel's record layer on it, if that may be used: always the same one.
    fn offload(&self) -> Option<&dyn Offload> {
        None
    }
}

/// Where a server finds keys.
pub trait Keys: Send + Sync {
    /// The key of an identity that somebody claims.
    fn find(&self, identity: &str) -> Option<TlsPsk>;
}

/// Why a session is over. Travels inside of [`io::Error`].
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum TlsError {
    /// The hello is one, but offers no identity that has a key here.
    #[error("TLS: no key belongs to the identity that the host offers")]
    Identity,
    /// The handshake failed.
    #[error("TLS handshake failed: {0}")]
    Handshake(String),
    /// It was established.
    #[error("TLS: {0}")]
    Session(String),
    /// The stream ended without a good-bye: it may have been cut by somebody else.
    #[error("TLS: the stream was cut (no close_notify)")]
    Cut,
}

impl TlsError {
    fn io(self) -> io::Error {
        let kind = match self {
            TlsError::Cut => io::ErrorKind::UnexpectedEof,
            _ => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, self)
    }
}

/// What a server's connection carries for the callback.
struct Peer {
    keys: Arc<dyn Keys>,
    /// The first identity that the host offered, and whether any had a key.
    claimed: Option<String>,
    known: bool,
}

struct OnHello;

impl ClientHelloCallback for OnHello {
    fn on_client_hello(
        &self,
        connection: &mut Connection,
    ) -> Result<Option<std::pin::Pin<Box<dyn ConnectionFuture>>>, Error> {
        let hello = connection.client_hello()?.raw_message()?;
        let Some(peer) = connection.application_context_mut::<Peer>() else { return Ok(None) };
        let offered = identities(&hello);
        peer.claimed = offered.first().map(|i| (*i).to_owned());
        let mut offered: Vec<_> = offered.into_iter().take(IDENTITIES_MAX).collect();
        offered.sort_unstable();
        offered.dedup();
        let found: Vec<TlsPsk> = offered.into_iter().filter_map(|i| peer.keys.find(i)).collect();
        peer.known = !found.is_empty();
        for key in &found {
            connection.append_psk(&psk(key)?)?;
        }
        // Without a key the handshake fails: there is no certificate either.
        Ok(None)
    }
}

fn psk(key: &TlsPsk) -> Result<Psk, Error> {
    let mut psk = Psk::builder()?;
    psk.set_identity(key.identity.as_bytes())?;
    psk.set_secret(key.key.expose())?;
    psk.set_hmac(if key.hash == HashId::Sha256 { PskHmac::SHA256 } else { PskHmac::SHA384 })?;
    psk.build()
}

static APPROVED: AtomicBool = AtomicBool::new(false);

/// From now on sessions use only what FIPS 140-3 approves, in the whole process. Before the first one.
pub fn require_approved() {
    APPROVED.store(true, Ordering::Relaxed);
}

fn config() -> Result<Config, Error> {
    static CONFIG: OnceLock<Config> = OnceLock::new();
    if let Some(config) = CONFIG.get() {
        return Ok(config.clone());
    }
    let mut builder = Config::builder();
    let approved = APPROVED.load(Ordering::Relaxed);
    builder.set_security_policy(&Policy::from_version(if approved { APPROVED_POLICY } else { POLICY })?)?;
    // Keys are all that proves somebody; no certificate does.
    builder.wipe_trust_store()?;
    builder.set_client_hello_callback(OnHello)?;
    // The delay before an error is shown guards CBC ciphers; none can be agreed on here (see the policies), and a failed connection just ends.
    builder.set_max_blinding_delay(0)?;
    builder.set_serialization_version(SerializationVersion::V1)?;
    let config = builder.build()?;
    Ok(CONFIG.get_or_init(|| config).clone())
}

/// See the module's head. Dropping it says nothing to the peer; [`Session::close`] does.
pub struct Session {
    /// Dropped before the pipe it uses.
    connection: Connection,
    pipe: Box<RefCell<Pipe>>,
    /// The first byte has come.
    begun: bool,
    established: bool,
    client: bool,
    /// What the handshake was done with, when established: identity, cipher suite.
    proven: (Option<String>, Option<String>),
    /// Directions that are the kernel's.
    sending: Option<Sending>,
    receiving: Option<Receiving>,
    /// Nothing more will come or go.
    over: Option<TlsError>,
    /// Bytes of the caller's data whose records wait in the pipe.
    pending: usize,
    /// Bytes that the next receive asks for.
    receive_bytes: usize,
}

impl Session {
    /// The side that accepts connections; any key of `keys` opens it.
    ///
    /// # Errors
    /// No memory, or a library that does not work.
    pub fn server(keys: Arc<dyn Keys>) -> io::Result<Session> {
        let mut s = Session::new(Mode::Server).map_err(failed)?;
        s.connection.set_application_context(Peer { keys, claimed: None, known: false });
        // Callbacks may be asynchronous; ours never are.
        s.connection.set_waker(Some(Waker::noop())).map_err(failed)?;
        Ok(s)
    }

    /// The side that connects, with its key.
    ///
    /// # Errors
    /// No memory, or a key that can not be used.
    pub fn client(key: &TlsPsk) -> io::Result<Session> {
        let mut s = Session::new(Mode::Client).map_err(failed)?;
        psk(key).and_then(|k| s.connection.append_psk(&k)).map_err(failed)?;
        Ok(s)
    }

    fn new(mode: Mode) -> Result<Session, Error> {
        let pipe = Box::new(RefCell::new(Pipe::default()));
        let connection = connection(mode, &pipe)?;
        let receive_bytes = RECEIVE_BYTES.0;
        Ok(Session {
            connection,
            pipe,
            begun: false,
            established: false,
            client: matches!(mode, Mode::Client),
            proven: (None, None),
            sending: None,
            receiving: None,
            over: None,
            pending: 0,
            receive_bytes,
        })
    }

    /// Whether the handshake is done: only then something is proven.
    pub fn is_established(&self) -> bool {
        self.established
    }

    /// The identity that the handshake was done with.
    pub fn identity(&self) -> Option<&str> {
        self.proven.0.as_deref()
    }

    /// What the host says that it is (server), until everything is the kernel's: proven only when established.
    pub fn claimed(&self) -> Option<&str> {
        self.connection.application_context::<Peer>()?.claimed.as_deref()
    }

    /// Name of the cipher suite, when established.
    pub fn cipher(&self) -> Option<&str> {
        self.proven.1.as_deref()
    }

    /// Who makes the records that are sent, and who opens those that are received.
    pub fn layers(&self) -> (Layer, Layer) {
        let layer = |kernel| if kernel { Layer::Kernel } else { Layer::Library };
        (layer(self.sending.is_some()), layer(self.receiving.is_some()))
    }

    /// Goes on with the handshake; `false`: it waits for the stream.
    ///
    /// # Errors
    /// The stream's; a handshake that failed ([`TlsError`] inside), after which the peer has been told.
    pub fn handshake(&mut self, raw: &dyn Raw) -> io::Result<bool> {
        self.check()?;
        while !self.established {
            let step = match self.connection.poll_negotiate() {
                Poll::Ready(Ok(_)) => Poll::Ready(None),
                Poll::Ready(Err(e)) => Poll::Ready(Some(e)),
                Poll::Pending => Poll::Pending,
            };
            match step {
                Poll::Ready(None) => {
                    if !self.flush(raw)? {
                        return Ok(false);
                    }
                    self.establish(raw)?;
                }
                Poll::Ready(Some(e)) => return Err(self.handshake_failed(raw, &e)),
                Poll::Pending => {
                    self.flush(raw)?;
                    if self.fill(raw)?.is_none() {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    /// The handshake is done, and the stream has all of ours.
    fn establish(&mut self, raw: &dyn Raw) -> io::Result<()> {
        if !matches!(self.connection.actual_protocol_version(), Ok(enums::Version::TLS13)) {
            return Err(self.end(raw, TlsError::Session("the other side has no TLS 1.3".into())));
        }
        let len = self.connection.negotiated_psk_identity_length().unwrap_or(0);
        let mut identity = vec![0; len];
        let named = self.connection.negotiated_psk_identity(&mut identity).is_ok();
        let identity = String::from_utf8(identity).ok().filter(|_| named && len > 0);
        self.proven = (identity, self.connection.cipher_suite().ok().map(str::to_owned));
        self.established = true;
        match raw.offload() {
            Some(kernel) => self.hand_over(kernel).map_err(|why| self.end(raw, TlsError::Session(why))),
            None => Ok(()),
        }
    }

    /// Gives the directions to the kernel that it takes. The error is the library's, which then has nothing left to go on with.
    fn hand_over(&mut self, kernel: &dyn Offload) -> Result<(), String> {
        let suite = self.cipher().is_some_and(|c| c.starts_with("TLS_AES_") && c.contains("_GCM_"));
        if !suite || self.pipe.borrow().buffered() > 0 || kernel.attach().is_err() {
            return Ok(());
        }
        let text = |e: Error| format!("its state can not be handed over: {e}");
        let len = self.connection.serialization_length().map_err(text)?;
        let mut state = Zeroizing::new(vec![0; len]);
        self.connection.serialize(&mut state).map_err(text)?;
        if let Some([client, server]) = secrets(&state) {
            let (ours, theirs) = if self.client { (client, server) } else { (server, client) };
            if ours.install(kernel, Direction::Send).is_ok() {
                self.sending = Some(Sending::new(ours.sequence));
                if theirs.install(kernel, Direction::Receive).is_ok() {
                    self.receiving = Some(Receiving::new(self.client));
                    // The library has work no more, and secrets in memory still.
                    let wiped = self.connection.wipe();
                    return wiped.map(drop).map_err(|e| format!("its secrets can not be wiped: {e}"));
                }
            }
        }
        // The library has forgotten its keys.
        let mode = if self.client { Mode::Client } else { Mode::Server };
        self.connection = connection(mode, &self.pipe).map_err(text)?;
        self.connection.deserialize(&state).map_err(text)
    }

    fn handshake_failed(&mut self, raw: &dyn Raw, e: &Error) -> io::Error {
        let peer = self.connection.application_context::<Peer>();
        let error = match peer {
            Some(p) if p.claimed.is_some() && !p.known => TlsError::Identity,
            _ if self.was_cut(e) => TlsError::Cut,
            _ => TlsError::Handshake(self.explain(e)),
        };
        self.end(raw, error)
    }

    fn was_cut(&self, e: &Error) -> bool {
        e.kind() == ErrorType::ConnectionClosed && self.pipe.borrow().ended
    }

    fn explain(&self, e: &Error) -> String {
        match (e.kind(), self.connection.alert()) {
            (ErrorType::Alert, Some(alert)) => format!("the other side says: {}", alert_text(alert)),
            (ErrorType::ConnectionClosed, _) if !self.established => {
                "the other side ended it; it may have another key, or none for this identity".into()
            }
            (ErrorType::ConnectionClosed, _) => "the other side has closed the session".into(),
            _ => e.message().to_owned(),
        }
    }

    /// Receives into the buffers in order. `Ok(0)`: the peer has said good-bye. Less than there is room for: the stream had
    /// no more when it was looked at.
    ///
    /// # Errors
    /// `WouldBlock` (also while the handshake waits), the stream's, and [`TlsError`]s.
    pub fn recv(&mut self, raw: &dyn Raw, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        if !self.established && !self.handshake(raw)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.check()?;
        if let Some(kernel) = &mut self.receiving {
            return kernel.recv(raw, bufs).map_err(|e| self.keep(e));
        }
        let mut total = 0;
        // A receive was shorter than asked for: what follows makes an edge.
        let mut dry = false;
        for buf in bufs {
            let mut at = 0;
            while at < buf.len() {
                match self.connection.poll_recv(&mut buf[at..]) {
                    Poll::Ready(Ok(0)) if total == 0 => return Ok(0),
                    Poll::Ready(Ok(0)) => return Ok(total),
                    Poll::Ready(Ok(n)) => (at, total) = (at + n, total + n),
                    Poll::Ready(Err(e)) => {
                        let e = self.broken(raw, &e);
                        // What came before the end is the caller's; the end is told the next time.
                        let late = total > 0 && e.kind() == io::ErrorKind::UnexpectedEof;
                        return if late { Ok(total) } else { Err(e) };
                    }
                    Poll::Pending if dry && total > 0 => return Ok(total),
                    Poll::Pending => match self.fill(raw)? {
                        Some(short) => dry = short,
                        None if total > 0 => return Ok(total),
                        None => return Err(io::ErrorKind::WouldBlock.into()),
                    },
                }
            }
        }
        Ok(total)
    }

    /// Sends a prefix of the buffers: all, or what the stream takes. See the module's head.
    ///
    /// # Errors
    /// `WouldBlock` (also while the handshake waits), the stream's, and [`TlsError`]s.
    pub fn send(&mut self, raw: &dyn Raw, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        if !self.established && !self.handshake(raw)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.check()?;
        if let Some(kernel) = &mut self.sending {
            return kernel.send(raw, bufs).map_err(|e| self.keep(e));
        }
        let mut total = 0;
        loop {
            if !self.flush(raw)? {
                return if total > 0 { Ok(total) } else { Err(io::ErrorKind::WouldBlock.into()) };
            }
            total += std::mem::take(&mut self.pending);
            self.pending = self.encrypt(raw, bufs, total)?;
            if self.pending == 0 {
                return Ok(total);
            }
        }
    }

    /// Turns up to [`SEND_BYTES`] of the data behind the first `skip` bytes into records; returns how much.
    fn encrypt(&mut self, raw: &dyn Raw, bufs: &[IoSlice<'_>], skip: usize) -> io::Result<usize> {
        thread_local! {
            /// Where the data of a record is put together from small pieces.
            static RECORD: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        RECORD.with_borrow_mut(|record| {
            record.clear();
            let (mut skip, mut taken) = (skip, 0);
            for buf in bufs {
                let mut piece = &buf[skip.min(buf.len())..];
                skip -= buf.len() - piece.len();
                while !piece.is_empty() && taken < SEND_BYTES {
                    let room = RECORD_BYTES - record.len();
                    let n = piece.len().min(room).min(SEND_BYTES - taken);
                    if record.is_empty() && n == RECORD_BYTES {
                        self.record(raw, &piece[..n])?;
                    } else {
                        record.extend_from_slice(&piece[..n]);
                        if n == room {
                            self.record(raw, record)?;
                            record.clear();
                        }
                    }
                    (piece, taken) = (&piece[n..], taken + n);
                }
            }
            if !record.is_empty() {
                self.record(raw, record)?;
            }
            Ok(taken)
        })
    }

    /// One record (or more, if s2n-tls wants smaller ones) with this data.
    fn record(&mut self, raw: &dyn Raw, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            match self.connection.poll_send(data) {
                Poll::Ready(Ok(n)) => data = &data[n..],
                Poll::Ready(Err(e)) => return Err(self.broken(raw, &e)),
                // The pipe takes everything.
                Poll::Pending => {
                    return Err(self.end(raw, TlsError::Session("the library waits for itself".into())));
                }
            }
        }
        Ok(())
    }

    /// Says good-bye as far as the stream takes it at once.
    pub fn close(&mut self, raw: &dyn Raw) {
        if self.over.is_some() {
            return;
        }
        if let Some(kernel) = &self.sending {
            kernel.close(raw);
        } else if self.pending == 0 {
            let _ = self.connection.poll_shutdown_send();
            let _ = self.flush(raw);
        }
    }

    fn check(&self) -> io::Result<()> {
        match &self.over {
            Some(e) => Err(e.clone().io()),
            None => Ok(()),
        }
    }

    /// Remembers that the session is over, if that is what an error says.
    fn keep(&mut self, e: io::Error) -> io::Error {
        if let Some(over) = e.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()) {
            self.over = Some(over.clone());
        }
        e
    }

    /// Takes records from the stream: whether they were fewer than there was room for. `None`: there are none now.
    fn fill(&mut self, raw: &dyn Raw) -> io::Result<Option<bool>> {
        let mut pipe = self.pipe.borrow_mut();
        let n = if self.established { self.receive_bytes } else { pipe.wanted.clamp(1, RECORD_BYTES) };
        let got = loop {
            match raw.recv(&mut [IoSliceMut::new(pipe.room(n))]) {
                Ok(got) => break got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        };
        pipe.filled(got);
        // The end is given to s2n-tls once; after that it is an error.
        pipe.ended = got == 0;
        if !self.begun && got > 0 {
            self.begun = true;
            // The library would wait for the whole of what it takes for a record.
            if !pipe.begins_with(&[HANDSHAKE, ALERT]) {
                drop(pipe);
                let error = TlsError::Handshake("the other side does not speak TLS".into());
                self.over = Some(error.clone());
                return Err(error.io());
            }
        }
        if self.established && got == n {
            self.receive_bytes = (2 * n).min(RECEIVE_BYTES.1);
        } else if self.established && got < n / 8 {
            self.receive_bytes = (n / 2).max(RECEIVE_BYTES.0);
        }
        Ok(Some(got < n && got > 0))
    }

    /// Has the stream take the records that wait; `false`: not all of them.
    fn flush(&mut self, raw: &dyn Raw) -> io::Result<bool> {
        let mut pipe = self.pipe.borrow_mut();
        while !pipe.unsent().is_empty() {
            match raw.send(&[IoSlice::new(pipe.unsent())]) {
                Ok(n) => pipe.sent(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    fn broken(&mut self, raw: &dyn Raw, e: &Error) -> io::Error {
        let error = if self.was_cut(e) { TlsError::Cut } else { TlsError::Session(self.explain(e)) };
        self.end(raw, error)
    }

    /// The session is over. A failed handshake is told to the peer, if it can hear it; later there is nothing to say that
    /// would not look like a good-bye.
    fn end(&mut self, raw: &dyn Raw, error: TlsError) -> io::Error {
        if !self.established {
            let _ = self.connection.poll_shutdown_send();
            let _ = self.flush(raw);
        }
        self.over = Some(error.clone());
        error.io()
    }
}

fn connection(mode: Mode, pipe: &RefCell<Pipe>) -> Result<Connection, Error> {
    let mut connection = Connection::new(mode);
    connection.set_config(config()?)?;
    connection.set_blinding(Blinding::SelfService)?;
    connection.prefer_throughput()?;
    pipe::attach(&mut connection, pipe)?;
    Ok(connection)
}

fn failed(e: Error) -> io::Error {
    io::Error::other(format!("TLS can not be set up: {e}"))
}

/// Alerts that occur with pre-shared keys (RFC 8446 section 6).
fn alert_text(alert: u8) -> String {
    let name = match alert {
        10 => "unexpected message",
        20 => "bad record MAC",
        40 => "handshake failure",
        47 => "illegal parameter",
        50 => "decode error",
        51 => "decrypt error (another key)",
        70 => "protocol version",
        71 => "insufficient security",
        80 => "internal error",
        109 => "missing extension",
        115 => "unknown PSK identity",
        116 => "certificate required",
        _ => return format!("alert {alert}"),
    };
    format!("{name} (alert {alert})")
}

#[cfg(test)]
mod kernel_tests;
#[cfg(test)]
mod tests;
