//! TLS over a wire: the session of `nvmf-tls` between a connection and its stream, and where it finds keys.
//!
//! The handshake happens inside of receiving: until it is done a wire gives nothing and takes nothing, and the connection is
//! where a plain one waits for ICReq, under the same deadline.

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use cryptfold_nvmf_auth::{Identity, Names, TlsPsk};
use cryptfold_nvmf_tls::{Keys, Raw, Session};

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
pub(crate) struct TargetKeys(pub Weak<Shared>);

impl Keys for TargetKeys {
    fn find(&self, identity: &str) -> Option<TlsPsk> {
        let claimed = Identity::parse(identity)?;
        let psk = self.0.upgrade()?.psk(claimed.subsystem, claimed.host)?;
        let names = Names { host: claimed.host.into(), subsystem: claimed.subsystem.into() };
        psk.find(&names, identity)
    }
}

struct RawWire<'a>(&'a dyn Wire);

impl Raw for RawWire<'_> {
    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.recv(&mut [IoSliceMut::new(buf)])
    }
    fn write(&self, buf: &[u8]) -> io::Result<usize> {
        self.0.send(&[IoSlice::new(buf)])
    }
}

/// A wire with TLS on it, the server's end.
pub(crate) struct TlsWire {
    session: RefCell<Session>,
    below: Box<dyn Wire>,
}

impl TlsWire {
    /// # Errors
    /// No memory for a session.
    pub fn new(below: Box<dyn Wire>, keys: Arc<dyn Keys>) -> io::Result<TlsWire> {
        Ok(TlsWire { session: RefCell::new(Session::server(keys)?), below })
    }
}

impl Wire for TlsWire {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.session.borrow_mut().recv(&RawWire(&*self.below), bufs)
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.session.borrow_mut().send(&RawWire(&*self.below), bufs)
    }
    fn shutdown(&self, how: Shutdown) {
        self.session.borrow_mut().close(&RawWire(&*self.below));
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
        let identity = session.identity();
        let text = identity.as_deref().or(session.claimed());
        let names = text.and_then(Identity::parse);
        Some(TlsPeer {
            proven: session.is_established() && names.is_some(),
            host: names.map(|n| n.host.to_owned()).unwrap_or_default(),
            subsystem: names.map(|n| n.subsystem.to_owned()).unwrap_or_default(),
            cipher: session.cipher().unwrap_or_default().to_owned(),
        })
    }
}
