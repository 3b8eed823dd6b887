//! A network between a host and the target: it passes real traffic on in pieces of any size, late, or not at all.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What happens to bytes of both directions.
#[derive(Default)]
pub struct Network {
    /// Bytes that go on at once at most; 0: as they come. Others: pieces of 1 to so many bytes.
    pub pieces: AtomicUsize,
    /// Every piece has exactly that size (as far as there are bytes).
    pub exact: AtomicBool,
    /// Milliseconds between receiving and passing on: what comes meanwhile goes on together.
    pub delay_ms: AtomicUsize,
    /// Nothing goes on: bytes are kept until it is over.
    pub stalled: AtomicBool,
    closed: AtomicBool,
    streams: Mutex<Vec<TcpStream>>,
}

/// Listens on a port of its own in front of a target's.
pub struct Proxy {
    pub addr: SocketAddr,
    pub network: Arc<Network>,
}

impl Proxy {
    pub fn to(target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
        let network = Arc::new(Network::default());
        let shared = network.clone();
        std::thread::spawn(move || {
            for host in listener.incoming().map_while(Result::ok) {
                if shared.closed.load(Ordering::Relaxed) {
                    return;
                }
                let target = TcpStream::connect(target).expect("the target listens");
                for stream in [&host, &target] {
                    stream.set_nodelay(true).expect("nodelay");
                    let copy = stream.try_clone().expect("a descriptor");
                    shared.streams.lock().unwrap_or_else(PoisonError::into_inner).push(copy);
                }
                let clone = |s: &TcpStream| s.try_clone().expect("a descriptor");
                let (h, t) = (clone(&host), clone(&target));
                let (a, b) = (shared.clone(), shared.clone());
                std::thread::spawn(move || a.pass(host, target, 1));
                std::thread::spawn(move || b.pass(t, h, 2));
            }
        });
        Proxy { addr, network }
    }

    /// Both ends of every connection see it end.
    pub fn cut(&self) {
        for stream in self.network.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.network.closed.store(true, Ordering::Relaxed);
        self.cut();
        // Wakes the listener, which then ends.
        let _ = TcpStream::connect(self.addr);
    }
}

impl Network {
    fn pass(&self, mut from: TcpStream, mut to: TcpStream, seed: u64) {
        let mut buf = vec![0; 65_536];
        let mut random = seed;
        while let Ok(n) = from.read(&mut buf) {
            if n == 0 || self.pass_bytes(&buf[..n], &mut to, &mut random).is_err() {
                break;
            }
        }
        // The other end may be gone already.
        let _ = to.shutdown(Shutdown::Write);
    }

    fn pass_bytes(&self, mut bytes: &[u8], to: &mut TcpStream, random: &mut u64) -> std::io::Result<()> {
        let delay = self.delay_ms.load(Ordering::Relaxed);
        if delay > 0 {
            std::thread::sleep(Duration::from_millis(delay as u64));
        }
        while !bytes.is_empty() {
            while self.stalled.load(Ordering::Relaxed) && !self.closed.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let n = match self.pieces.load(Ordering::Relaxed) {
                0 => bytes.len(),
                most if self.exact.load(Ordering::Relaxed) => most,
                most => 1 + (*random >> 33) as usize % most,
            };
            let (now, rest) = bytes.split_at(n.min(bytes.len()));
            to.write_all(now)?;
            bytes = rest;
        }
        Ok(())
    }
}
