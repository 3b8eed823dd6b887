//! The byte stream under a connection: TCP, or whatever a simulation puts there.

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::rc::Rc;

use cryptfold_nvmf_tls::{Layer, Offload, Raw, Session};

/// A non-blocking, ordered byte stream. Errors other than `WouldBlock` and `Interrupted` end it.
pub trait Wire {
    /// Receives into the buffers in order; `Ok(0)` is the end of the stream.
    ///
    /// # Errors
    /// As a non-blocking socket's.
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize>;
    /// Sends a prefix of the buffers.
    ///
    /// # Errors
    /// As a non-blocking socket's.
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize>;
    /// No more sending (`Write`), or nothing any more (`Both`).
    fn shutdown(&self, how: Shutdown);
    /// What to watch for readiness. Without one, the wire calls what [`Wire::on_ready`] gave it.
    fn descriptor(&self) -> Option<Rc<dyn AsFd>> {
        None
    }
    /// The kernel's record layer for TLS on this stream.
    fn offload(&self) -> Option<&dyn Offload> {
        None
    }
    /// With TLS: who makes the records that are sent, and who opens those that are received.
    fn layers(&self) -> Option<(Layer, Layer)> {
        None
    }
    /// Called once: `wake` is to be called whenever bytes or room may have come.
    fn on_ready(&self, _wake: Rc<dyn Fn()>) {}
}

/// TCP.
pub struct TcpWire(Rc<TcpStream>);

impl TcpWire {
    /// Takes a connected stream; makes it non-blocking and sends small packets at once.
    ///
    /// # Errors
    /// When the socket's options can not be set.
    pub fn new(stream: TcpStream) -> io::Result<TcpWire> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(TcpWire(Rc::new(stream)))
    }
}

impl Wire for TcpWire {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&*self.0).read_vectored(bufs)
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self.0).write_vectored(bufs)
    }
    fn shutdown(&self, how: Shutdown) {
        // A peer that is gone already is no news.
        let _ = self.0.shutdown(how);
    }
    fn descriptor(&self) -> Option<Rc<dyn AsFd>> {
        Some(self.0.clone())
    }
    fn offload(&self) -> Option<&dyn Offload> {
        Some(&*self.0)
    }
}

struct RawWire<'a>(&'a dyn Wire);

impl Raw for RawWire<'_> {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.0.recv(bufs)
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.send(bufs)
    }
    fn offload(&self) -> Option<&dyn Offload> {
        self.0.offload()
    }
}

/// A wire with TLS on it.
pub struct TlsWire {
    session: RefCell<Session>,
    below: Box<dyn Wire>,
}

impl TlsWire {
    /// A session that is established over this wire.
    pub fn new(session: Session, below: Box<dyn Wire>) -> TlsWire {
        TlsWire { session: RefCell::new(session), below }
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
    fn layers(&self) -> Option<(Layer, Layer)> {
        Some(self.session.borrow().layers())
    }
    fn on_ready(&self, wake: Rc<dyn Fn()>) {
        self.below.on_ready(wake);
    }
}
