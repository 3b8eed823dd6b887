//! What each path answers.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use cryptfold_view::{Look, problems};
use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderName,
    HeaderValue, REFERRER_POLICY, RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::http::uri::Authority;
use hyper::{Method, Request, Response, StatusCode};
use serde_json::json;
use zeroize::Zeroizing;

use crate::stream::{Guard, Listener, MAX_LISTENERS, Stream};
use crate::{Source, metrics, page};

/// Of all answers.
const HEADERS: [(HeaderName, &str); 4] = [
    (CACHE_CONTROL, "no-store"),
    // The page has what it needs beside it, and is nobody's part.
    (
        CONTENT_SECURITY_POLICY,
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (REFERRER_POLICY, "no-referrer"),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
];
const JSON: &str = "application/json";

/// An answer's body.
pub type Body = Either<Full<Bytes>, Listener>;
type Answer = Response<Body>;

/// What all connections share.
pub struct Shared {
    pub source: Arc<dyn Source>,
    pub token: Option<Zeroizing<String>>,
    pub stream: Stream,
}

impl Shared {
    /// The target now; none when it is at its end.
    pub async fn look(&self) -> Option<Arc<Look>> {
        self.of_look(Arc::clone).await
    }

    /// What `make` makes of the target now, on another thread than the one that serves; none when the target is at its end.
    async fn of_look<T: Send + 'static>(&self, make: fn(&Arc<Look>) -> T) -> Option<T> {
        let source = self.source.clone();
        tokio::task::spawn_blocking(move || source.look().map(|look| make(&look))).await.ok().flatten()
    }

    async fn history(&self) -> Option<String> {
        let source = self.source.clone();
        tokio::task::spawn_blocking(move || source.history().to_string()).await.ok()
    }
}

/// Answers one request.
pub async fn answer(
    shared: &Arc<Shared>,
    guard: &Arc<Guard>,
    request: Request<Incoming>,
) -> Result<Answer, Infallible> {
    let mut answer = choose(shared, guard, &request).await;
    for (name, value) in HEADERS {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    Ok(answer)
}

async fn choose(shared: &Arc<Shared>, guard: &Arc<Guard>, request: &Request<Incoming>) -> Answer {
    let path = request.uri().path();
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if let Some(file) = page::find(path).filter(|_| reads) {
        return respond(StatusCode::OK, file.content_type, Bytes::from_static(file.body));
    }
    match &shared.token {
        Some(token) if !has_token(request, token) => {
            let text = "a token is needed: Authorization: Bearer TOKEN\n";
            return with(plain(StatusCode::UNAUTHORIZED, text), WWW_AUTHENTICATE, "Bearer");
        }
        None if !is_local(request) => {
            let text = "without a token only an address or localhost is served, not another name\n";
            return plain(StatusCode::MISDIRECTED_REQUEST, text);
        }
        _ => {}
    }
    if !reads {
        let text = "nothing can be changed here: GET or HEAD\n";
        return with(plain(StatusCode::METHOD_NOT_ALLOWED, text), ALLOW, "GET, HEAD");
    }
    match path {
        "/metrics" => metrics_of(shared.of_look(|look| metrics::text(&look.sample)).await),
        "/healthz" => health_of(shared.look().await),
        "/api/v1/snapshot" => json_of(shared.of_look(|look| look.snapshot.to_string()).await),
        "/api/v1/history" => json_of(shared.history().await),
        "/api/v1/stream" if request.method() == Method::HEAD => {
            respond(StatusCode::OK, "text/event-stream", Bytes::new())
        }
        "/api/v1/stream" => listen(shared, guard).await,
        _ => plain(
            StatusCode::NOT_FOUND,
            "here are /, /metrics, /healthz, /api/v1/snapshot, /api/v1/history, /api/v1/stream\n",
        ),
    }
}

/// Compares in constant time.
fn has_token(request: &Request<Incoming>, token: &str) -> bool {
    let given = request.headers().get(AUTHORIZATION).map_or(&b""[..], HeaderValue::as_bytes);
    given
        .strip_prefix(b"Bearer ")
        .is_some_and(|given| verify_slices_are_equal(given, token.as_bytes()).is_ok())
}

/// Names an address or localhost. Of a foreign name that resolves to this machine a browser would give the answer to that name's
/// page (DNS rebinding).
fn is_local(request: &Request<Incoming>) -> bool {
    let Some(host) = request.headers().get(HOST) else { return true };
    let host = host.to_str().ok().and_then(|h| h.parse::<Authority>().ok());
    host.is_some_and(|authority| {
        let name = authority.host().trim_start_matches('[').trim_end_matches(']');
        name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
    })
}

async fn listen(shared: &Arc<Shared>, guard: &Arc<Guard>) -> Answer {
    let Some(look) = shared.look().await else { return unavailable() };
    let Some(listener) = shared.stream.join(guard, &look) else {
        let text = format!("{MAX_LISTENERS} listen already\n");
        return with(plain(StatusCode::SERVICE_UNAVAILABLE, &text), RETRY_AFTER, "10");
    };
    let mut answer = respond(StatusCode::OK, "text/event-stream", Bytes::new());
    *answer.body_mut() = Either::Right(listener);
    answer
}

fn unavailable() -> Answer {
    plain(StatusCode::SERVICE_UNAVAILABLE, "the target is ending\n")
}

fn json_of(text: Option<String>) -> Answer {
    text.map_or_else(unavailable, |text| respond(StatusCode::OK, JSON, text.into()))
}

fn metrics_of(text: Option<Result<Vec<u8>, prometheus::Error>>) -> Answer {
    match text {
        Some(Ok(text)) => respond(StatusCode::OK, metrics::CONTENT_TYPE, text.into()),
        Some(Err(error)) => plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
        None => unavailable(),
    }
}

fn health_of(look: Option<Arc<Look>>) -> Answer {
    let problems = look.map_or_else(|| vec!["the target is ending".into()], |l| problems(&l.sample));
    let (status, word) = match problems.is_empty() {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "failing"),
    };
    respond(status, JSON, format!("{}\n", json!({"status": word, "problems": problems})).into())
}

fn plain(status: StatusCode, text: &str) -> Answer {
    respond(status, "text/plain; charset=utf-8", text.to_owned().into())
}

fn with(mut answer: Answer, name: HeaderName, value: &'static str) -> Answer {
    answer.headers_mut().insert(name, HeaderValue::from_static(value));
    answer
}

fn respond(status: StatusCode, content_type: &'static str, body: Bytes) -> Answer {
    let mut answer = Response::new(Either::Left(Full::new(body)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}
