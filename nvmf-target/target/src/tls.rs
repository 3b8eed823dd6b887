//! TLS over a wire: the session of `nvmf-tls` between a connection and its stream, and where it finds keys; and wires whose hosts
//! begin with TLS or without it.
//!
//! The handshake happens inside of receiving: until it is done a wire gives nothing and takes nothing, and the connection is
//! where a plain one waits for ICReq, under the same deadline.

use std::cell::{Cell, OnceCell, RefCell};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use cryptfold_nvmf_auth::{Identity, Names, TlsPsk};
use cryptfold_nvmf_tls::{Keys, Layer, Offload, Raw, Session};

use crate::target::Shared;
use crate::wire::{Wake, Wire};

/// What TLS says about the other side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsPeer {
    /// The handshake is done: the names are proven. Before, they are what the host claims.
    pub proven: bool,
    /// The host's NQN; empty if it has not been said, or not in a form that is known.
    pub host: String,
    /// The subsystem's NQN, likewise.
    pub subsystem: String,
    /// Cipher suite, when proven.
    pub cipher: String,
    /// Who makes the records that are sent, and who opens those that are received.
    pub layers: (Layer, Layer),
    /// The identity of a key that DH-HMAC-CHAP has generated, if it is one.
    pub generated: Option<String>,
}

impl TlsPeer {
    /// Why a host with these names may not connect here, where this is what TLS says (`None`: there is no TLS).
    pub(crate) fn refuses(
        tls: Option<&TlsPeer>,
        host: &str,
        subsystem: &str,
        has_key: bool,
    ) -> Option<&'static str> {
        match tls {
            None if has_key => Some("the host has a TLS key, and came without TLS"),
            Some(t) if !t.proven || t.host != host || t.subsystem != subsystem => {
                Some("the TLS key is that of another host or subsystem")
            }
            _ => None,
        }
    }
}

/// The keys of a target's hosts, as they are at the moment of a handshake.
pub(crate) struct TargetKeys {
    pub target: Weak<Shared>,
    /// Generated ones as well.
    pub generated: bool,
}

impl Keys for TargetKeys {
    fn find(&self, identity: &str) -> Option<TlsPsk> {
        let claimed = Identity::parse(identity)?;
        let target = self.target.upgrade()?;
        if claimed.generated {
            let may = self.generated && target.authenticates(claimed.subsystem, claimed.host);
            return target.generated.find(identity).filter(|_| may);
        }
        let psk = target.psk(claimed.subsystem, claimed.host)?;
        let names = Names { host: claimed.host.into(), subsystem: claimed.subsystem.into() };
        psk.find(&names, identity)
    }
}

struct RawWire<'a> {
    wire: &'a dyn Wire,
    /// The kernel's record layer may be used.
    kernel: bool,
}

impl Raw for RawWire<'_> {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.wire.recv(bufs)
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.wire.send(bufs)
    }
    fn offload(&self) -> Option<&dyn Offload> {
        self.wire.offload().filter(|_| self.kernel)
    }
}

/// How TLS is done at a port.
#[derive(Clone)]
pub(crate) struct Terms {
    pub keys: Arc<dyn Keys>,
    /// Records are left to the kernel, where it takes them.
    pub kernel: bool,
}

/// A wire with TLS on it, the server's end.
pub(crate) struct TlsWire {
    session: RefCell<Session>,
    below: Box<dyn Wire>,
    kernel: bool,
}

impl TlsWire {
    /// # Errors
    /// No memory for a session.
    pub fn new(below: Box<dyn Wire>, terms: Terms) -> io::Result<TlsWire> {
        Ok(TlsWire { session: RefCell::new(Session::server(terms.keys)?), below, kernel: terms.kernel })
    }

    fn raw(&self) -> RawWire<'_> {
        RawWire { wire: &*self.below, kernel: self.kernel }
    }
}

/// A wire whose first byte was looked at, and is given out again.
struct Peeked {
    first: Cell<Option<u8>>,
    below: Box<dyn Wire>,
}

impl Wire for Peeked {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let Some(first) = self.first.get() else { return self.below.recv(bufs) };
        // A first receive has one buffer. What follows comes with the byte: less than there is room for means that there is no more.
        let Some(buf) = bufs.first_mut().filter(|b| !b.is_empty()) else { return Ok(0) };
        let (head, rest) = buf.split_at_mut(1);
        let more = match self.below.recv(&mut [IoSliceMut::new(rest)]) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            other => other?,
        };
        head[0] = first;
        self.first.set(None);
        Ok(1 + more)
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.below.send(bufs)
    }
    fn shutdown(&self, how: Shutdown) {
        self.below.shutdown(how);
    }
    fn descriptor(&self) -> Option<Rc<dyn AsFd>> {
        self.below.descriptor()
    }
    fn offload(&self) -> Option<&dyn Offload> {
        self.below.offload().filter(|_| self.first.get().is_none())
    }
    fn on_ready(&self, wake: Wake) {
        self.below.on_ready(wake);
    }
}

/// Whether a stream that begins so is TLS: a handshake record, or the alert of somebody who gives up.
fn is_tls(first: u8) -> bool {
    // Types of records (RFC 8446 section 5.1); ICReq begins with 0 (NVMe/TCP 1.0 section 3.6.2.2).
    matches!(first, 21 | 22)
}

/// A wire with TLS or without it, as its host begins.
pub(crate) struct EitherWire {
    /// Until the first byte has come.
    below: RefCell<Option<Box<dyn Wire>>>,
    terms: Terms,
    known: OnceCell<Box<dyn Wire>>,
}

impl EitherWire {
    pub fn new(below: Box<dyn Wire>, terms: Terms) -> EitherWire {
        EitherWire { below: RefCell::new(Some(below)), terms, known: OnceCell::new() }
    }

    /// The wire as the host began. `None`: the stream has ended before.
    fn known(&self) -> io::Result<Option<&dyn Wire>> {
        if let Some(wire) = self.known.get() {
            return Ok(Some(&**wire));
        }
        let mut waiting = self.below.borrow_mut();
        let Some(below) = waiting.take() else { return Ok(None) };
        let mut first = [0];
        match below.recv(&mut [IoSliceMut::new(&mut first)]) {
            Ok(1) => {}
            other => {
                *waiting = Some(below);
                return other.map(|_| None);
            }
        }
        let peeked = Box::new(Peeked { first: Cell::new(Some(first[0])), below });
        let wire: Box<dyn Wire> =
            if is_tls(first[0]) { Box::new(TlsWire::new(peeked, self.terms.clone())?) } else { peeked };
        Ok(Some(&**self.known.get_or_init(|| wire)))
    }

    /// The wire, or what is below as long as the host has not begun.
    fn any<T>(&self, f: impl FnOnce(&dyn Wire) -> T) -> Option<T> {
        match self.known.get() {
            Some(wire) => Some(f(&**wire)),
            None => self.below.borrow().as_deref().map(f),
        }
    }
}

impl Wire for EitherWire {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.known()?.map_or(Ok(0), |wire| wire.recv(bufs))
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.known.get().map_or(Err(io::ErrorKind::WouldBlock.into()), |wire| wire.send(bufs))
    }
    fn shutdown(&self, how: Shutdown) {
        self.any(|wire| wire.shutdown(how));
    }
    fn descriptor(&self) -> Option<Rc<dyn AsFd>> {
        self.any(|wire| wire.descriptor())?
    }
    fn on_ready(&self, wake: Wake) {
        self.any(|wire| wire.on_ready(wake));
    }
    fn tls(&self) -> Option<TlsPeer> {
        self.known.get()?.tls()
    }
}

impl Wire for TlsWire {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.session.borrow_mut().recv(&self.raw(), bufs)
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.session.borrow_mut().send(&self.raw(), bufs)
    }
    fn shutdown(&self, how: Shutdown) {
        self.session.borrow_mut().close(&self.raw());
        self.below.shutdown(how);
    }
    fn descriptor(&self) -> Option<Rc<dyn AsFd>> {
        self.below.descriptor()
    }
    fn on_ready(&self, wake: Wake) {
        self.below.on_ready(wake);
    }
    fn tls(&self) -> Option<TlsPeer> {
        let session = self.session.borrow();
        let text = session.identity().or(session.claimed());
        let names = text.and_then(Identity::parse);
        Some(TlsPeer {
            proven: session.is_established() && names.is_some(),
            host: names.map(|n| n.host.to_owned()).unwrap_or_default(),
            subsystem: names.map(|n| n.subsystem.to_owned()).unwrap_or_default(),
            cipher: session.cipher().unwrap_or_default().to_owned(),
            layers: session.layers(),
            generated: text.filter(|_| names.is_some_and(|n| n.generated)).map(str::to_owned),
        })
    }
}
