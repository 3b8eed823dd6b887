//! A session whose records the kernel makes and opens: what is left to do here.
//!
//! ```text
//!   handshake done --> attach --> send keys installed --> receive keys installed
//!        |               |                |                       |
//!     library         library       library receives          both are the kernel's
//! ```
//! Who is refused stays where it is. Keys go over between the last byte of the handshake and the first of data: s2n-tls gives its
//! state away and forgets it, so no key is ever used by both; if the kernel does not want it, the library gets it back. When both
//! directions are the kernel's, this process has no secret of the session any more.
//!
//! Data then passes as on a plain socket. What is no data makes the kernel refuse a receive; it is taken separately, with its type.
//!
//! Keys are never changed here, whatever the kernel could: Linux's own initiator reads no KeyUpdate, and before 6.14 the record layer
//! takes no second key. A key that has made as many records as it may ends its connection with a good-bye, and a KeyUpdate of the other
//! side ends it with an error: hosts connect again, with fresh keys.

use std::io::{self, IoSlice, IoSliceMut};

use cryptfold_nvmf_auth::{HashId, expand_label};
use zeroize::Zeroizing;

use super::{ALERT, HANDSHAKE, RECORD_BYTES, Raw, TlsError, alert_text};

/// Records that one key may make, AES-GCM: 2^24.5 (RFC 8446 section 5.5).
pub(super) const RECORDS_MAX: u64 = 23_726_566;
/// Type of the serialised state of s2n-tls that is known here (`S2N_SERIALIZED_CONN_V1`).
const STATE_VERSION: u64 = 1;
/// Handshake messages that may come later (RFC 8446 section 4).
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
/// Longest NewSessionTicket that is taken, bytes.
const TICKET_BYTES_MAX: usize = 128 << 10;
/// Records without data that one receive takes, more than the longest ticket comes in.
const CONTROLS_MAX: u32 = 256;
/// Alerts (RFC 8446 section 6): a warning; the good-bye; nobody waits for an answer any more.
const WARNING: u8 = 1;
const CLOSE_NOTIFY: u8 = 0;
const USER_CANCELED: u8 = 90;

/// Who makes records, or opens them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layer {
    /// s2n-tls.
    #[default]
    Library,
    /// The kernel's `tls` module.
    Kernel,
}

impl Layer {
    /// For people and programs.
    pub const fn name(self) -> &'static str {
        match self {
            Layer::Library => "library",
            Layer::Kernel => "kernel",
        }
    }
}

/// Seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the peer.
    Send,
    /// From the peer.
    Receive,
}

/// What records of one direction are made with (RFC 8446 section 7.3).
pub struct RecordKeys {
    /// 16 bytes: AES-128-GCM; 32: AES-256-GCM.
    pub key: Zeroizing<Vec<u8>>,
    /// write_iv.
    pub iv: Zeroizing<[u8; 12]>,
    /// Number of the next record.
    pub sequence: u64,
}

/// The kernel's record layer on a stream.
pub trait Offload {
    /// Gets the stream ready for keys; bytes pass as before. Loads no module: see [`crate::load_kernel_tls`].
    ///
    /// # Errors
    /// There is no such layer here.
    fn attach(&self) -> io::Result<()>;
    /// From now on this direction carries data instead of records. Once.
    ///
    /// # Errors
    /// The kernel's. Nothing has changed then.
    fn install(&self, direction: Direction, keys: &RecordKeys) -> io::Result<()>;
    /// Sends one record of this type that is no data.
    ///
    /// # Errors
    /// As a non-blocking socket's.
    fn send_control(&self, kind: u8, data: &[u8]) -> io::Result<()>;
    /// Takes (a part of) the next record, whatever it is: its type, and how many bytes. [`Raw::recv`] fails with EIO before one
    /// that is no data.
    ///
    /// # Errors
    /// As a non-blocking socket's.
    fn recv_control(&self, buf: &mut [u8]) -> io::Result<(u8, usize)>;
}

/// The secret of one direction, from which keys are made.
pub(super) struct Traffic {
    hash: HashId,
    secret: Zeroizing<Vec<u8>>,
    pub sequence: u64,
}

impl Traffic {
    fn keys(&self) -> Option<RecordKeys> {
        let key_len = if self.hash == HashId::Sha256 { 16 } else { 32 };
        let mut iv = Zeroizing::new([0; 12]);
        iv.copy_from_slice(&expand_label(self.hash, &self.secret, "iv", &[], 12)?);
        let key = expand_label(self.hash, &self.secret, "key", &[], key_len)?;
        Some(RecordKeys { key, iv, sequence: self.sequence })
    }

    pub fn install(&self, kernel: &dyn Offload, direction: Direction) -> io::Result<()> {
        let keys = self.keys().ok_or_else(|| io::Error::other("no keys can be made of this secret"))?;
        kernel.install(direction, &keys)
    }
}

/// Takes `n` bytes off the front.
fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(n)?;
    *bytes = rest;
    Some(head)
}

fn number(bytes: &mut &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(take(bytes, 8)?.try_into().ok()?))
}

/// The client's and the server's secret in the serialised state of s2n-tls: version, protocol (3, 4), cipher suite, both sequence
/// numbers, fragment length, both secrets (and one that is not needed). `None`: something else, or no AES-GCM.
pub(super) fn secrets(mut state: &[u8]) -> Option<[Traffic; 2]> {
    let state = &mut state;
    if number(state)? != STATE_VERSION || take(state, 2)? != [3, 4] {
        return None;
    }
    let hash = match take(state, 2)? {
        [0x13, 1] => HashId::Sha256,
        [0x13, 2] => HashId::Sha384,
        _ => return None,
    };
    let sequences = [number(state)?, number(state)?];
    take(state, 2)?;
    let mut next = |sequence| {
        let secret = Zeroizing::new(take(state, hash.len_bytes())?.to_vec());
        Some(Traffic { hash, secret, sequence })
    };
    Some([next(sequences[0])?, next(sequences[1])?])
}

/// Sending through the kernel.
pub(super) struct Sending {
    /// Made, as far as can be told from here.
    records: u64,
    /// [`RECORDS_MAX`], or less in tests.
    pub records_max: u64,
}

impl Sending {
    /// `records`: so many have been made with this key.
    pub fn new(records: u64) -> Sending {
        Sending { records, records_max: RECORDS_MAX }
    }

    /// Sends a prefix of the buffers.
    ///
    /// # Errors
    /// The stream's; a key that is worn, after the good-bye.
    pub fn send(&mut self, raw: &dyn Raw, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let wanted = records(bufs.iter().map(|b| b.len()).sum());
        // The last one is for the good-bye.
        if self.records + wanted >= self.records_max {
            self.close(raw);
            let why =
                format!("the key has made {} records and may make no more: connect again", self.records);
            return Err(TlsError::Session(why).io());
        }
        let sent = raw.send(bufs)?;
        self.records += records(sent);
        Ok(sent)
    }

    pub fn close(&self, raw: &dyn Raw) {
        if let Some(kernel) = raw.offload() {
            let _ = kernel.send_control(ALERT, &[WARNING, CLOSE_NOTIFY]);
        }
    }
}

/// Of so many bytes that are sent at once. The kernel may make more and smaller ones, if memory is short; what wears a key off is
/// the data, and full records are what the limit is for.
fn records(bytes: usize) -> u64 {
    bytes.div_ceil(RECORD_BYTES) as u64
}

/// Receiving through the kernel.
pub(super) struct Receiving {
    /// Which end this is: only servers send tickets.
    pub client: bool,
    /// An alert, or handshake messages, of which more has to come.
    pub part: (u8, Vec<u8>),
    /// The peer has said good-bye.
    pub closed: bool,
}

impl Receiving {
    pub fn new(client: bool) -> Receiving {
        Receiving { client, part: (0, Vec::new()), closed: false }
    }

    /// As [`super::Session::recv`].
    ///
    /// # Errors
    /// The stream's, and [`TlsError`]s.
    pub fn recv(&mut self, raw: &dyn Raw, mut bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let (mut total, mut controls) = (0, 0);
        // A receive ends before a record of another type, so a short one does not mean that the stream is empty.
        while !self.closed && bufs.iter().any(|b| !b.is_empty()) {
            match raw.recv(bufs) {
                Ok(0) if total > 0 => break,
                Ok(0) => return Err(TlsError::Cut.io()),
                Ok(n) => {
                    total += n;
                    IoSliceMut::advance_slices(&mut bufs, n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && total > 0 => break,
                Err(e) if e.raw_os_error() == Some(libc::EIO) => {
                    // They fill no buffer: without a bound one host would keep the reactor here.
                    controls += 1;
                    if controls > CONTROLS_MAX {
                        let why = "the other side sends record after record without data";
                        return Err(TlsError::Session(why.into()).io());
                    }
                    self.control(raw)?;
                }
                Err(e) => return Err(broken(e)),
            }
        }
        Ok(total)
    }

    /// Takes a record that is no data.
    fn control(&mut self, raw: &dyn Raw) -> io::Result<()> {
        let kernel = raw.offload().ok_or(io::ErrorKind::NotConnected)?;
        let mut buf = Zeroizing::new([0; 1024]);
        match kernel.recv_control(&mut buf[..]) {
            Ok((_, 0)) => Err(TlsError::Cut.io()),
            Ok((kind, n)) => self.understand(kind, &buf[..n]).map_err(TlsError::io),
            // As "nothing more" it would lose what has been received before it.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                Err(TlsError::Session("a record can not be taken from the kernel".into()).io())
            }
            Err(e) => Err(broken(e)),
        }
    }

    /// Bytes of a record of this type.
    pub fn understand(&mut self, kind: u8, bytes: &[u8]) -> Result<(), TlsError> {
        let unexpected = |what: String| Err(TlsError::Session(format!("the other side sends {what}")));
        if !matches!(kind, ALERT | HANDSHAKE) {
            return unexpected(format!("a record of type {kind} where only data is expected"));
        }
        if !self.part.1.is_empty() && self.part.0 != kind {
            return unexpected("a message that stops in the middle".into());
        }
        self.part.0 = kind;
        self.part.1.extend_from_slice(bytes);
        while !self.closed {
            let part = &self.part.1;
            if kind == ALERT {
                let Some([_, alert]) = part.first_chunk() else { return Ok(()) };
                match *alert {
                    CLOSE_NOTIFY => self.closed = true,
                    USER_CANCELED => {}
                    other => {
                        let why = format!("the other side says: {}", alert_text(other));
                        return Err(TlsError::Session(why));
                    }
                }
                self.part.1.drain(..2);
                continue;
            }
            let Some([message, a, b, c]) = part.first_chunk() else { return Ok(()) };
            let (message, len) = (*message, u32::from_be_bytes([0, *a, *b, *c]) as usize);
            match message {
                NEW_SESSION_TICKET if self.client && len <= TICKET_BYTES_MAX => {}
                KEY_UPDATE if len == 1 => {
                    let why = "the other side changes its keys, which records of the kernel do not (enable_ktls): it has to connect again";
                    return Err(TlsError::Session(why.into()));
                }
                _ => {
                    return unexpected(format!("a handshake message (type {message}, {len} bytes) after it"));
                }
            }
            if part.len() < 4 + len {
                return Ok(());
            }
            // Tickets are for resuming, which is not done here.
            self.part.1.drain(..4 + len);
        }
        Ok(())
    }
}

/// What the kernel says of a record, in words.
fn broken(e: io::Error) -> io::Error {
    let why = match e.raw_os_error() {
        Some(libc::EBADMSG) => "a record is not what its sender made (bad record MAC)",
        Some(libc::EMSGSIZE) => "a record is longer than records are",
        Some(libc::EINVAL) => "there is something that is no record",
        Some(libc::EIO) => "a record can not be taken",
        _ => return e,
    };
    TlsError::Session(why.into()).io()
}
