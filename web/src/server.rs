//! The listener: a thread and its connections.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::MissedTickBehavior;
use zeroize::Zeroizing;

use crate::Source;
use crate::answer::{Shared, answer};
use crate::stream::{Guard, Stream};

/// Connections at a time; more wait to be accepted.
pub const MAX_CONNECTIONS: usize = 64;
/// Bytes of a request's head.
const MAX_HEAD: usize = 16 << 10;
/// For a request's head to arrive.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// Of a connection that does not listen; scrapers connect again.
const LIFE: Duration = Duration::from_secs(120);
/// Between two looks while nobody asks: charts have a past when somebody comes.
const SLOW: Duration = Duration::from_secs(10);

/// Why nothing is served.
#[derive(Debug, Error)]
pub enum WebError {
    /// Others could read names and sizes.
    #[error("{0} can be reached from elsewhere: a token is needed (or a loopback address, as 127.0.0.1)")]
    NoToken(SocketAddr),
    /// The system's error.
    #[error("{0}: {1}")]
    Listen(SocketAddr, std::io::Error),
    /// The system's error.
    #[error("the thread for HTTP: {0}")]
    Thread(std::io::Error),
}

/// How it listens.
pub struct WebConfig {
    /// Port 0: any.
    pub listen: SocketAddr,
    /// What `Authorization: Bearer` has to carry; for loopback addresses it may be missing.
    pub token: Option<Zeroizing<String>>,
}

/// A listener at work; ends when dropped.
pub struct Web {
    address: SocketAddr,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Web {
    /// Listens, on a thread of its own.
    ///
    /// # Errors
    /// See [`WebError`].
    pub fn start(config: WebConfig, source: Arc<dyn Source>) -> Result<Web, WebError> {
        let WebConfig { listen, token } = config;
        if token.is_none() && !listen.ip().is_loopback() {
            return Err(WebError::NoToken(listen));
        }
        let socket = TcpListener::bind(listen).map_err(|e| WebError::Listen(listen, e))?;
        let prepared = socket.set_nonblocking(true).and_then(|()| socket.local_addr());
        let address = prepared.map_err(|e| WebError::Listen(listen, e))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(2)
            .build();
        let runtime = runtime.map_err(WebError::Thread)?;
        let (end, ended) = oneshot::channel();
        let shared = Arc::new(Shared { source, token, stream: Stream::default() });
        let thread = std::thread::Builder::new().name("http".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = accept(socket, &shared) => {}
                    () = shared.stream.run(async || shared.look().await) => {}
                    () = watch(&shared) => {}
                    _ = ended => {}
                }
            });
            // A look that is being taken does not hold up the end.
            runtime.shutdown_background();
        });
        Ok(Web { address, end: Some(end), thread: Some(thread.map_err(WebError::Thread)?) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Looks now and then for the charts' sake.
async fn watch(shared: &Arc<Shared>) {
    let mut turns = tokio::time::interval(SLOW);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        drop(shared.look().await);
    }
}

async fn accept(socket: TcpListener, shared: &Arc<Shared>) {
    let listener = match tokio::net::TcpListener::from_std(socket) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "HTTP is not served"),
    };
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, say: it would be ready again at once.
                tracing::warn!(%error, "HTTP connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            let guard = Arc::new(Guard::default());
            let serve = service_fn(|request| answer(&shared, &guard, request));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIME)
                .max_buf_size(MAX_HEAD)
                .serve_connection(TokioIo::new(stream), serve);
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "HTTP connection");
                },
                () = guard.ended(LIFE) => {}
            }
            drop(place);
        });
    }
}
