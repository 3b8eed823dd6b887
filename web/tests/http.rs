//! The listener over real sockets, with a control plane that tells what the test wants.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cryptfold_view::{Device, Hub, Look, State};
use cryptfold_web::{Source, Web, WebConfig, WebError, page};
use serde_json::{Value, json};

/// For states that come when a core is free.
const PATIENCE: Duration = Duration::from_secs(120);

/// A target with one device.
struct Fake {
    hub: Hub,
    state: State,
    taken: AtomicU32,
    /// Bytes that its version has.
    long: usize,
}

impl cryptfold_view::Source for Fake {
    fn get(&self, method: &str, _: Option<&Value>) -> Result<Value, String> {
        match method {
            "spdk_get_version" => Ok(json!({"cryptfold": format!("1.2.3{}", "x".repeat(self.long))})),
            _ => Err("unknown".into()),
        }
    }
    fn state(&self) -> (State, Duration) {
        self.taken.fetch_add(1, Ordering::Relaxed);
        (self.state, Duration::from_secs(5))
    }
    fn devices(&self) -> Vec<Device> {
        let mut d = Device { name: "m0".into(), ..Device::default() };
        d.totals[0].ops = 3;
        vec![d]
    }
    fn events(&self) -> Vec<Value> {
        vec![json!({"time": 1.0, "severity": "warning", "text": "</script><b>\n"})]
    }
}

impl Source for Fake {
    fn look(&self) -> Option<Arc<Look>> {
        Some(self.hub.look(self))
    }
    fn history(&self) -> Value {
        self.hub.history()
    }
}

fn fake() -> Fake {
    Fake { hub: Hub::default(), state: State::Running, taken: AtomicU32::new(0), long: 0 }
}

fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn serve(source: Arc<Fake>, token: Option<&str>) -> Web {
    let token = token.map(|t| t.to_owned().into());
    Web::start(WebConfig { listen: loopback(), token }, source).expect("listens")
}

fn start(token: Option<&str>) -> Web {
    serve(Arc::new(fake()), token)
}

fn connect(web: &Web) -> TcpStream {
    let stream = TcpStream::connect(web.address()).expect("connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream
}

/// Everything that comes back for these bytes until the server closes.
fn raw(web: &Web, bytes: &[u8]) -> String {
    let mut stream = connect(web);
    // The server may close before it has all of it.
    let _ = stream.write_all(bytes);
    let mut out = Vec::new();
    let _ = stream.read_to_end(&mut out);
    String::from_utf8_lossy(&out).into_owned()
}

fn ask(web: &Web, method: &str, path: &str, headers: &str) -> String {
    let host = if headers.contains("Host:") { "" } else { "Host: 127.0.0.1\r\n" };
    raw(web, format!("{method} {path} HTTP/1.1\r\n{host}Connection: close\r\n{headers}\r\n").as_bytes())
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

fn json(answer: &str) -> Value {
    serde_json::from_str(body(answer)).unwrap_or_else(|e| panic!("{e}: {answer}"))
}

#[test]
fn metrics_health_and_the_interface_are_served_and_nothing_else() {
    let web = start(None);
    let metrics = ask(&web, "GET", "/metrics", "");
    assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
    assert!(metrics.contains("cryptfold_bdev_ops_total{bdev=\"m0\",alias=\"\",op=\"read\"} 3"), "{metrics}");
    let health = ask(&web, "GET", "/healthz", "");
    assert!(health.starts_with("HTTP/1.1 200") && health.contains("\"ok\""), "{health}");
    let snapshot = json(&ask(&web, "GET", "/api/v1/snapshot?x=1", ""));
    assert_eq!((&snapshot["version"], &snapshot["state"]), (&json!("1.2.3"), &json!("running")));
    assert_eq!(snapshot["events"][0]["text"], "</script><b>\n", "hostile text arrives as it is, in JSON");
    let history = json(&ask(&web, "GET", "/api/v1/history", ""));
    assert_eq!(history["rings"].as_array().map(Vec::len), Some(3));
    for path in ["/../etc/passwd", "/api/v1", "/api/v1/snapshot/", "/style.css/", "/%2e%2e/x", "*"] {
        let answer = ask(&web, "GET", path, "");
        assert!(answer.starts_with("HTTP/1.1 404") || answer.starts_with("HTTP/1.1 400"), "{path}: {answer}");
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "X"] {
        for path in ["/", "/metrics", "/api/v1/snapshot", "/api/v1/stream", "/none"] {
            let answer = ask(&web, method, path, "Content-Length: 0\r\n");
            assert!(
                answer.starts_with("HTTP/1.1 405") && answer.contains("allow: GET, HEAD"),
                "{method} {path}: {answer}"
            );
        }
    }
}

#[test]
fn head_is_get_without_a_body() {
    let web = start(None);
    for path in ["/", "/metrics", "/healthz", "/api/v1/snapshot", "/api/v1/history", "/api/v1/stream"] {
        let head = ask(&web, "HEAD", path, "");
        assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{path}: {head}");
    }
}

#[test]
fn every_answer_has_the_headers_that_confine_it() {
    let web = start(Some("t"));
    let token = "Authorization: Bearer t\r\n";
    let asked = [
        ("GET", "/", ""),
        ("GET", "/metrics", token),
        ("GET", "/metrics", ""),
        ("GET", "/none", token),
        ("POST", "/", token),
    ];
    for (method, path, headers) in asked {
        let answer = ask(&web, method, path, headers);
        for wanted in [
            "content-security-policy: default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
            "cache-control: no-store",
        ] {
            assert!(
                answer.contains(&format!("\r\n{wanted}\r\n")),
                "{method} {path}: no {wanted} in {answer}"
            );
        }
    }
}

#[test]
fn the_page_is_served_as_it_is_and_needs_nothing_from_elsewhere() {
    let web = start(Some("t"));
    for file in page::FILES {
        let answer = ask(&web, "GET", file.path, "");
        assert!(answer.starts_with("HTTP/1.1 200"), "{}: {answer}", file.path);
        assert!(
            answer.contains(&format!("content-type: {}\r\n", file.content_type)),
            "{}: {answer}",
            file.path
        );
        let text = std::str::from_utf8(file.body).expect("is text");
        assert!(body(&answer) == text && !text.is_empty(), "{} is another file", file.path);
        for outside in ["src=\"http", "href=\"http", "src=\"//", "href=\"//", "url(http", "@import"] {
            assert!(!text.contains(outside), "{}: {outside}", file.path);
        }
    }
}

#[test]
fn a_target_that_does_not_answer_is_not_healthy() {
    let web = serve(Arc::new(Fake { state: State::Starting, ..fake() }), None);
    assert!(ask(&web, "GET", "/healthz", "").starts_with("HTTP/1.1 503"));
    assert!(ask(&web, "GET", "/metrics", "").contains("cryptfold_up 0"));
    assert_eq!(json(&ask(&web, "GET", "/api/v1/snapshot", ""))["state"], "starting");
}

#[test]
fn a_token_is_asked_for_and_compared() {
    let web = start(Some("open sesame"));
    for path in ["/metrics", "/healthz", "/api/v1/snapshot", "/api/v1/history", "/api/v1/stream", "/none"] {
        for headers in [
            "",
            "Authorization: Bearer open\r\n",
            "Authorization: Basic open sesame\r\n",
            "Authorization: Bearer \r\n",
        ] {
            let answer = ask(&web, "GET", path, headers);
            assert!(answer.starts_with("HTTP/1.1 401"), "{path} {headers}");
            assert!(answer.contains("www-authenticate: Bearer\r\n") && !answer.contains("1.2.3"), "{answer}");
        }
    }
    let token = "Authorization: Bearer open sesame\r\n";
    for path in ["/metrics", "/api/v1/snapshot"] {
        assert!(ask(&web, "GET", path, token).starts_with("HTTP/1.1 200"));
    }
    // Whoever has the token may come by any name.
    assert!(
        ask(&web, "GET", "/metrics", &format!("{token}Host: storage.example\r\n"))
            .starts_with("HTTP/1.1 200")
    );
}

#[test]
fn an_address_that_others_reach_needs_a_token() {
    let listen = ([0, 0, 0, 0], 0).into();
    let refused = Web::start(WebConfig { listen, token: None }, Arc::new(fake()));
    assert!(matches!(refused, Err(WebError::NoToken(_))));
    assert!(Web::start(WebConfig { listen, token: Some("t".to_owned().into()) }, Arc::new(fake())).is_ok());
}

#[test]
fn without_a_token_a_foreign_name_that_leads_here_gets_nothing() {
    let web = start(None);
    for host in
        ["evil.example", "evil.example:9420", "127.0.0.1.evil.example", "localhost.evil.example", "", "a b"]
    {
        let answer = ask(&web, "GET", "/api/v1/snapshot", &format!("Host: {host}\r\n"));
        assert!(!answer.starts_with("HTTP/1.1 200") && !answer.contains("1.2.3"), "{host}: {answer}");
    }
    for host in ["127.0.0.1", "127.0.0.1:9420", "localhost:1", "LocalHost", "[::1]:9420", "192.0.2.7"] {
        let answer = ask(&web, "GET", "/api/v1/snapshot", &format!("Host: {host}\r\n"));
        assert!(answer.starts_with("HTTP/1.1 200"), "{host}: {answer}");
    }
}

#[test]
fn samples_are_taken_once_a_second_at_most() {
    let source = Arc::new(fake());
    let web = serve(source.clone(), None);
    let began = Instant::now();
    let listener = listen(&web);
    for _ in 0..20 {
        assert!(ask(&web, "GET", "/metrics", "").starts_with("HTTP/1.1 200"));
        assert!(ask(&web, "GET", "/api/v1/snapshot", "").starts_with("HTTP/1.1 200"));
    }
    // The first one may have begun before.
    let allowed = 2 + began.elapsed().as_secs() as u32;
    let taken = source.taken.load(Ordering::Relaxed);
    assert!(taken <= allowed, "{taken} samples, {allowed} allowed");
    drop(listener);
}

/// A listener whose answer has begun.
fn listen(web: &Web) -> TcpStream {
    let mut stream = connect(web);
    stream.write_all(b"GET /api/v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("sends");
    let mut head = [0; 12];
    stream.read_exact(&mut head).expect("answers");
    assert_eq!(&head, b"HTTP/1.1 200");
    stream
}

/// Reads until this has come so often.
fn read_until(stream: &mut TcpStream, wanted: &str, times: usize) -> String {
    let (mut all, mut piece, mut seen, mut from) = (Vec::new(), vec![0; 1 << 16], 0, 0);
    while seen < times {
        let n = stream.read(&mut piece).expect("goes on");
        assert!(n > 0, "ended after {}", String::from_utf8_lossy(&all));
        all.extend_from_slice(&piece[..n]);
        while let Some(at) = all[from..].windows(wanted.len()).position(|w| w == wanted.as_bytes()) {
            (seen, from) = (seen + 1, from + at + wanted.len());
        }
        from = from.max(all.len().saturating_sub(wanted.len() - 1));
    }
    String::from_utf8(all).expect("is text")
}

#[test]
fn listeners_get_a_snapshot_at_once_and_then_each_second() {
    let source = Arc::new(fake());
    let web = serve(source.clone(), None);
    let mut listeners = [listen(&web), listen(&web), listen(&web)];
    let idle = source.taken.load(Ordering::Relaxed);
    for listener in &mut listeners {
        let came = read_until(listener, "\n\n", 3);
        assert!(came.contains("content-type: text/event-stream"), "{came}");
        let data: Vec<&str> = came.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
        assert_eq!(came.matches("event: snapshot\n").count(), data.len(), "{came}");
        let times: Vec<f64> = data
            .iter()
            .map(|d| {
                serde_json::from_str::<Value>(d).expect("is JSON in one line")["time"]
                    .as_f64()
                    .expect("is there")
            })
            .collect();
        assert!(times.windows(2).all(|w| w[1] > w[0]), "no look comes twice: {times:?}");
    }
    assert!(source.taken.load(Ordering::Relaxed) >= idle + 2);
}

#[test]
fn there_is_a_bound_on_listeners_and_places_become_free() {
    let web = start(None);
    let mut listeners: Vec<TcpStream> = (0..16).map(|_| listen(&web)).collect();
    let mut refused = connect(&web);
    let request = b"GET /api/v1/stream HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    refused.write_all(request).expect("sends");
    let mut head = [0; 12];
    refused.read_exact(&mut head).expect("answers");
    assert_eq!(&head, b"HTTP/1.1 503");
    let mut rest = String::new();
    refused.read_to_string(&mut rest).expect("ends");
    assert!(rest.contains("16 listen already") && rest.contains("retry-after: "), "{rest}");
    // Others are served all the same.
    assert!(ask(&web, "GET", "/healthz", "").starts_with("HTTP/1.1 200"));
    drop(listeners.pop());
    let limit = Instant::now() + PATIENCE;
    loop {
        let mut stream = connect(&web);
        stream.write_all(b"GET /api/v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("sends");
        let mut head = [0; 12];
        stream.read_exact(&mut head).expect("answers");
        if &head == b"HTTP/1.1 200" {
            break;
        }
        assert!(Instant::now() < limit, "nobody's place became free");
        std::thread::sleep(Duration::from_millis(100));
    }
    for listener in &mut listeners {
        read_until(listener, "\n\n", 2);
    }
}

#[test]
fn who_does_not_keep_up_is_dropped_and_the_others_go_on() {
    // Some of them are more than the sockets hold.
    let web = serve(Arc::new(Fake { long: 2 << 20, ..fake() }), None);
    let slow = listen(&web);
    let mut quick = listen(&web);
    let events = Arc::new(AtomicUsize::new(0));
    let count = events.clone();
    // Does nothing else, so that it keeps up on a busy machine, too. Ends with the server.
    let reader = std::thread::spawn(move || {
        let mut piece = vec![0; 1 << 20];
        while let Ok(n @ 1..) = quick.read(&mut piece) {
            // An event ends with an empty line; a chunk's head lies behind it.
            count.fetch_add(piece[..n].windows(2).filter(|w| w == b"\n\n").count(), Ordering::Relaxed);
        }
    });
    // Its queue is full after some seconds; then the server ends it.
    let ended = |s: &TcpStream| s.take_error().is_ok_and(|e| e.is_some()) || is_reset(s);
    let limit = Instant::now() + PATIENCE;
    while !ended(&slow) {
        assert!(Instant::now() < limit, "it is still served");
        std::thread::sleep(Duration::from_millis(50));
    }
    let before = events.load(Ordering::Relaxed);
    while events.load(Ordering::Relaxed) < before + 2 {
        assert!(Instant::now() < limit, "the other one is not served any more");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(web);
    reader.join().expect("reads");
}

/// Whether the other side has ended, with data left to read: by what sending to it gives.
fn is_reset(mut stream: &TcpStream) -> bool {
    stream
        .write_all(b"x")
        .is_err_and(|e| matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe))
}

#[test]
fn garbage_huge_heads_and_dawdlers_harm_nobody() {
    let web = start(None);
    assert!(!raw(&web, b"\x00\xff\r\n\r\n").contains("200 OK"));
    let huge = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(1 << 20));
    assert!(!raw(&web, huge.as_bytes()).starts_with("HTTP/1.1 200"));
    let dawdler = connect(&web);
    (&dawdler).write_all(b"GET /me").expect("sends");
    assert!(ask(&web, "GET", "/healthz", "").starts_with("HTTP/1.1 200"));
    // Its head does not arrive in time: closed by the server.
    let mut rest = Vec::new();
    let ended = (&dawdler).read_to_end(&mut rest);
    assert!(ended.is_ok() || ended.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset));
}

#[test]
fn the_end_does_not_wait_for_listeners() {
    let web = start(None);
    let mut listener = listen(&web);
    drop(web);
    let mut rest = Vec::new();
    let ended = listener.read_to_end(&mut rest);
    assert!(ended.is_ok() || ended.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset));
}
