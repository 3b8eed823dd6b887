//! Opening the streams of connections.

use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use cryptfold_nvmf_auth::TlsPsk;
use cryptfold_nvmf_tls::{Offload, Raw, Session, load_kernel_tls};
use socket2::{Domain, Socket, Type};

use crate::{ConnectOptions, Error, TcpWire, TlsWire, Wire};

/// A stream that is being opened.
pub type Dialing<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn Wire>, Error>> + 'a>>;

/// Opens streams to one target, on any reactor.
pub trait Dial: Send + Sync {
    /// A new stream, for the current reactor.
    fn dial(&self) -> Dialing<'_>;
}

/// TCP to an address, with TLS if the options have a key.
pub struct TcpDial {
    traddr: String,
    trsvcid: String,
    from: Option<IpAddr>,
    address: String,
    limit: Duration,
    tls: Mutex<Option<TlsPsk>>,
    kernel_tls: bool,
}

impl TcpDial {
    /// To the address of these options.
    pub fn new(options: &ConnectOptions) -> TcpDial {
        TcpDial {
            traddr: options.traddr.clone(),
            trsvcid: options.trsvcid.clone(),
            from: options.hostaddr,
            address: options.address(),
            limit: options.connect_timeout,
            tls: Mutex::new(options.tls_psk()),
            kernel_tls: options.kernel_tls,
        }
    }

    /// From now on with TLS by this key.
    pub(crate) fn secure(&self, key: TlsPsk) {
        *self.tls.lock().unwrap_or_else(PoisonError::into_inner) = Some(key);
    }
}

impl Dial for TcpDial {
    fn dial(&self) -> Dialing<'_> {
        let (host, port) = (self.traddr.clone(), self.trsvcid.clone());
        let (address, limit, from) = (self.address.clone(), self.limit, self.from);
        let kernel = self.kernel_tls;
        let tls = self.tls.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Box::pin(async move {
            let opened = off_reactor(move || {
                let stream = connect((&host, &port), from, &address, limit)?;
                let session = tls.map(|key| secure(&stream, &key, kernel, limit)).transpose();
                let session = session.map_err(|e| Error::Connect { address, why: e.to_string() })?;
                Ok((stream, session))
            });
            let address = || self.address.clone();
            let opened = opened.await.unwrap_or_else(|why| Err(Error::Connect { address: address(), why }));
            let (stream, session) = opened?;
            let wire = TcpWire::new(stream);
            let wire = wire.map_err(|e| Error::Connect { address: address(), why: e.to_string() })?;
            Ok(match session {
                Some(session) => Box::new(TlsWire::new(session, Box::new(wire))) as Box<dyn Wire>,
                None => Box::new(wire),
            })
        })
    }
}

/// A connection to a host and port, from an address of ours if one is given.
fn connect(
    (host, port): (&str, &str),
    from: Option<IpAddr>,
    address: &str,
    limit: Duration,
) -> Result<TcpStream, Error> {
    let resolve = |why: String| Error::Resolve { address: address.to_owned(), why };
    let port: u16 = port.parse().map_err(|_| resolve(format!("\"{port}\" is no port")))?;
    let found: Vec<SocketAddr> =
        (host, port).to_socket_addrs().map_err(|e| resolve(e.to_string()))?.collect();
    let mut why = match from {
        Some(from) => format!("it has no address that can be reached from {from}"),
        None => "the name has no address".to_owned(),
    };
    for target in found.into_iter().filter(|to| from.is_none_or(|from| from.is_ipv4() == to.is_ipv4())) {
        match connect_from(from, target, limit) {
            Ok(stream) => return Ok(stream),
            Err(e) => why = e,
        }
    }
    Err(Error::Connect { address: address.to_owned(), why })
}

fn connect_from(from: Option<IpAddr>, to: SocketAddr, limit: Duration) -> Result<TcpStream, String> {
    let Some(from) = from else {
        return TcpStream::connect_timeout(&to, limit).map_err(|e| e.to_string());
    };
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).map_err(|e| e.to_string())?;
    socket
        .bind(&SocketAddr::new(from, 0).into())
        .map_err(|e| format!("{from} as this host's address: {e}"))?;
    socket.connect_timeout(&to.into(), limit).map_err(|e| format!("from {from}: {e}"))?;
    Ok(socket.into())
}

/// A stream that still blocks, for as long as its time-out lets it.
struct Blocking<'a> {
    stream: &'a TcpStream,
    /// The kernel's record layer may be used.
    kernel: bool,
}

impl Raw for Blocking<'_> {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&mut &*self.stream).read_vectored(bufs)
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        (&mut &*self.stream).write_vectored(bufs)
    }
    fn offload(&self) -> Option<&dyn Offload> {
        self.kernel.then_some(self.stream as &dyn Offload)
    }
}

/// The handshake: done here, where waiting is possible.
fn secure(stream: &TcpStream, key: &TlsPsk, kernel: bool, limit: Duration) -> io::Result<Session> {
    if kernel {
        load_kernel_tls();
    }
    let start = Instant::now();
    let mut session = Session::client(key)?;
    loop {
        let left = limit.checked_sub(start.elapsed()).filter(|d| !d.is_zero());
        let left = left.ok_or_else(|| io::Error::new(io::ErrorKind::TimedOut, "TLS: no answer in time"))?;
        stream.set_read_timeout(Some(left))?;
        stream.set_write_timeout(Some(left))?;
        if session.handshake(&Blocking { stream, kernel })? {
            return Ok(session);
        }
    }
}

struct Slot<T> {
    value: Option<Result<T, String>>,
    waker: Option<Waker>,
}

/// Waits for something that blocks, on a thread of its own. The error is that of making the thread.
struct OffReactor<T>(Arc<Mutex<Slot<T>>>);

fn off_reactor<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> OffReactor<T> {
    let slot = Arc::new(Mutex::new(Slot { value: None, waker: None }));
    let theirs = slot.clone();
    let thread = std::thread::Builder::new().name("nvmf_dial".into()).spawn(move || {
        let value = f();
        let waker = {
            let mut slot = theirs.lock().unwrap_or_else(PoisonError::into_inner);
            slot.value = Some(Ok(value));
            slot.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    });
    if let Err(e) = thread {
        slot.lock().unwrap_or_else(PoisonError::into_inner).value = Some(Err(e.to_string()));
    }
    OffReactor(slot)
}

impl<T> Future for OffReactor<T> {
    type Output = Result<T, String>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match slot.value.take() {
            Some(value) => Poll::Ready(value),
            None => {
                slot.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}
