//! The listener: a thread, its connections, what each path answers.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::sync::{Semaphore, oneshot};
use zeroize::Zeroizing;

use crate::sample::{Sample, Sampler};
use crate::{Source, health, metrics};

/// Connections at a time; more wait to be accepted.
pub const MAX_CONNECTIONS: usize = 64;
/// Bytes of a request's head.
const MAX_HEAD: usize = 16 << 10;
/// For a request's head to arrive.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// Of a connection; scrapers connect again.
const LIFE: Duration = Duration::from_secs(120);

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

struct State {
    sampler: Sampler,
    token: Option<Zeroizing<String>>,
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
        let state = Arc::new(State { sampler: Sampler::new(source), token });
        let thread = std::thread::Builder::new().name("http".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = accept(socket, state) => {}
                    _ = ended => {}
                }
            });
            // A sample that is being taken does not hold up the end.
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

async fn accept(socket: TcpListener, state: Arc<State>) {
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
        let state = state.clone();
        tokio::spawn(async move {
            let serve = service_fn(|request| answer(&state, request));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIME)
                .max_buf_size(MAX_HEAD)
                .serve_connection(TokioIo::new(stream), serve);
            if let Ok(Err(error)) = tokio::time::timeout(LIFE, connection).await {
                tracing::debug!(%error, "HTTP connection");
            }
            drop(place);
        });
    }
}

async fn answer(state: &Arc<State>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut response = if !is_allowed(state, &request) {
        let mut r = plain(StatusCode::UNAUTHORIZED, "a token is needed: Authorization: Bearer TOKEN\n");
        r.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        r
    } else if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut r = plain(StatusCode::METHOD_NOT_ALLOWED, "nothing can be changed here: GET or HEAD\n");
        r.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        r
    } else {
        match request.uri().path() {
            "/metrics" => metrics_of(sample(state).await),
            "/healthz" => health_of(sample(state).await),
            _ => plain(StatusCode::NOT_FOUND, "here are /metrics and /healthz\n"),
        }
    };
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// Compares in constant time.
fn is_allowed(state: &State, request: &Request<Incoming>) -> bool {
    let Some(token) = &state.token else { return true };
    let given = request.headers().get(AUTHORIZATION).map_or(&b""[..], HeaderValue::as_bytes);
    given
        .strip_prefix(b"Bearer ")
        .is_some_and(|given| verify_slices_are_equal(given, token.as_bytes()).is_ok())
}

async fn sample(state: &Arc<State>) -> Option<Arc<Sample>> {
    let state = state.clone();
    tokio::task::spawn_blocking(move || state.sampler.get()).await.ok()
}

fn metrics_of(sample: Option<Arc<Sample>>) -> Response<Full<Bytes>> {
    match sample.map(|sample| metrics::text(&sample)) {
        Some(Ok(text)) => respond(StatusCode::OK, metrics::CONTENT_TYPE, text.into()),
        Some(Err(error)) => plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
        None => plain(StatusCode::SERVICE_UNAVAILABLE, "no sample could be taken\n"),
    }
}

fn health_of(sample: Option<Arc<Sample>>) -> Response<Full<Bytes>> {
    let problems = sample.map_or_else(|| vec!["no sample could be taken".into()], |s| health::problems(&s));
    let status = if problems.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    respond(status, "application/json", health::body(&problems).into())
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", text.to_owned().into())
}

fn respond(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
