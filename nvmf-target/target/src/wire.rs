//! The byte stream under a connection: TCP at the edge, memory in the simulator.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::rc::Rc;

use cryptfold_nvmf_tls::Offload;

pub use crate::tls::TlsPeer;

/// A non-blocking, ordered byte stream. Errors other than `WouldBlock` and `Interrupted` end it.
pub trait Wire {
    /// Receives into the buffers in order; `Ok(0)` is the end of the stream. With a descriptor, less than
    /// there is room for means that nothing more was there.
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
    /// What TLS says about the other side; `None` without TLS.
    fn tls(&self) -> Option<TlsPeer> {
        None
    }
    /// The kernel's record layer for TLS on this stream.
    fn offload(&self) -> Option<&dyn Offload> {
        None
    }
    /// Called once: `wake` is to be called whenever bytes or room may have come.
    fn on_ready(&self, _wake: Wake) {}
}

/// TCP.
pub(crate) struct TcpWire(pub Rc<TcpStream>);

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

/// What a wire calls when it may be ready.
pub type Wake = Rc<dyn Fn()>;

/// One direction of a [`MemWire`].
#[derive(Default)]
struct Pipe {
    bytes: RefCell<VecDeque<u8>>,
    closed: Cell<bool>,
    /// Wakes whoever receives, and whoever waits for room.
    wakes: RefCell<[Option<Wake>; 2]>,
}

impl Pipe {
    fn wake(&self) {
        let wakes = self.wakes.borrow().clone();
        wakes.into_iter().flatten().for_each(|w| w());
    }
}

/// One end of a stream in memory, for simulations: same core, bounded, bytes in order.
pub struct MemWire {
    incoming: Rc<Pipe>,
    outgoing: Rc<Pipe>,
    /// Bytes in flight in one direction at most.
    capacity: usize,
}

/// Two connected ends; each direction holds up to `capacity` bytes.
pub fn mem_pair(capacity: usize) -> (MemWire, MemWire) {
    let (a, b) = (Rc::<Pipe>::default(), Rc::<Pipe>::default());
    let one = MemWire { incoming: a.clone(), outgoing: b.clone(), capacity };
    (one, MemWire { incoming: b, outgoing: a, capacity })
}

impl Wire for MemWire {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let n = {
            let mut bytes = self.incoming.bytes.borrow_mut();
            if bytes.is_empty() {
                return if self.incoming.closed.get() {
                    Ok(0)
                } else {
                    Err(io::ErrorKind::WouldBlock.into())
                };
            }
            bytes.read_vectored(bufs)?
        };
        self.incoming.wake();
        Ok(n)
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.outgoing.closed.get() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut sent = 0;
        {
            let mut bytes = self.outgoing.bytes.borrow_mut();
            let mut room = self.capacity.saturating_sub(bytes.len());
            if room == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            for buf in bufs {
                let n = buf.len().min(room);
                bytes.extend(&buf[..n]);
                (sent, room) = (sent + n, room - n);
            }
        }
        self.outgoing.wake();
        Ok(sent)
    }
    fn shutdown(&self, how: Shutdown) {
        if how != Shutdown::Read {
            self.outgoing.closed.set(true);
            self.outgoing.wake();
        }
        if how != Shutdown::Write {
            self.incoming.closed.set(true);
            self.incoming.wake();
        }
    }
    fn on_ready(&self, wake: Wake) {
        self.incoming.wakes.borrow_mut()[0] = Some(wake.clone());
        self.outgoing.wakes.borrow_mut()[1] = Some(wake);
    }
}

impl Drop for MemWire {
    fn drop(&mut self) {
        self.incoming.wakes.borrow_mut()[0] = None;
        self.outgoing.wakes.borrow_mut()[1] = None;
        self.shutdown(Shutdown::Both);
    }
}
