//! The listener over real sockets, with a control plane that tells what the test wants.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cryptfold_web::{Web, WebConfig, WebError};
use serde_json::{Value, json};

fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn source(method: &str, _: Option<&Value>) -> Result<Value, String> {
    match method {
        "bdev_get_iostat" => Ok(json!({"tick_rate": 1000, "bdevs": [{"name": "m0", "num_read_ops": 3}]})),
        _ => Err("unknown".into()),
    }
}

fn start(token: Option<&str>) -> Web {
    let token = token.map(|t| t.to_owned().into());
    Web::start(WebConfig { listen: loopback(), token }, Arc::new(source)).expect("listens")
}

/// Everything that comes back for these bytes until the server closes.
fn raw(web: &Web, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(web.address()).expect("connects");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set");
    stream.write_all(bytes).expect("sends");
    let mut out = Vec::new();
    let _ = stream.read_to_end(&mut out);
    String::from_utf8_lossy(&out).into_owned()
}

fn ask(web: &Web, method: &str, path: &str, headers: &str) -> String {
    raw(web, format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n").as_bytes())
}

#[test]
fn metrics_and_health_are_served_and_nothing_else() {
    let web = start(None);
    let metrics = ask(&web, "GET", "/metrics", "");
    assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
    assert!(metrics.contains("cryptfold_bdev_ops_total{bdev=\"m0\",alias=\"\",op=\"read\"} 3"), "{metrics}");
    let health = ask(&web, "GET", "/healthz", "");
    assert!(health.starts_with("HTTP/1.1 200") && health.contains("\"ok\""), "{health}");
    assert!(ask(&web, "GET", "/../etc/passwd", "").starts_with("HTTP/1.1 404"));
    assert!(ask(&web, "POST", "/metrics", "Content-Length: 0\r\n").starts_with("HTTP/1.1 405"));
    let head = ask(&web, "HEAD", "/healthz", "");
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
}

#[test]
fn a_target_that_does_not_answer_is_not_healthy() {
    let silent = |_: &str, _: Option<&Value>| Err("not now".to_owned());
    let web = Web::start(WebConfig { listen: loopback(), token: None }, Arc::new(silent)).expect("listens");
    assert!(ask(&web, "GET", "/healthz", "").starts_with("HTTP/1.1 503"));
    assert!(ask(&web, "GET", "/metrics", "").contains("cryptfold_up 0"));
}

#[test]
fn a_token_is_asked_for_and_compared() {
    let web = start(Some("open sesame"));
    for headers in ["", "Authorization: Bearer open\r\n", "Authorization: Basic open sesame\r\n"] {
        assert!(ask(&web, "GET", "/metrics", headers).starts_with("HTTP/1.1 401"), "{headers}");
    }
    assert!(
        ask(&web, "GET", "/metrics", "Authorization: Bearer open sesame\r\n").starts_with("HTTP/1.1 200")
    );
}

#[test]
fn an_address_that_others_reach_needs_a_token() {
    let listen = ([0, 0, 0, 0], 0).into();
    let refused = Web::start(WebConfig { listen, token: None }, Arc::new(source));
    assert!(matches!(refused, Err(WebError::NoToken(_))));
    assert!(Web::start(WebConfig { listen, token: Some("t".to_owned().into()) }, Arc::new(source)).is_ok());
}

#[test]
fn samples_are_taken_once_a_second_at_most() {
    let taken = Arc::new(AtomicU32::new(0));
    let count = taken.clone();
    let source = move |method: &str, _: Option<&Value>| {
        count.fetch_add(u32::from(method == "bdev_get_iostat"), Ordering::Relaxed);
        Ok(json!({}))
    };
    let web = Web::start(WebConfig { listen: loopback(), token: None }, Arc::new(source)).expect("listens");
    let began = Instant::now();
    for _ in 0..20 {
        assert!(ask(&web, "GET", "/metrics", "").starts_with("HTTP/1.1 200"));
    }
    let allowed = 1 + began.elapsed().as_secs() as u32;
    assert!(
        taken.load(Ordering::Relaxed) <= allowed,
        "{} samples, {allowed} allowed",
        taken.load(Ordering::Relaxed)
    );
}

#[test]
fn garbage_huge_heads_and_dawdlers_harm_nobody() {
    let web = start(None);
    assert!(!raw(&web, b"\x00\xff\r\n\r\n").contains("200 OK"));
    let huge = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(1 << 20));
    let mut stream = TcpStream::connect(web.address()).expect("connects");
    // The server may close before it has all of it.
    let _ = stream.write_all(huge.as_bytes());
    let dawdler = TcpStream::connect(web.address()).expect("connects");
    (&dawdler).write_all(b"GET /me").expect("sends");
    assert!(ask(&web, "GET", "/healthz", "").starts_with("HTTP/1.1 200"));
    // Its head does not arrive in time: closed by the server.
    dawdler.set_read_timeout(Some(Duration::from_secs(20))).expect("set");
    let mut rest = Vec::new();
    let ended = (&dawdler).read_to_end(&mut rest);
    assert!(ended.is_ok() || ended.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
}
