//! The JSON-RPC server: a Unix socket (mode 0600 unless others have roles) and an ordinary thread per connection, so a slow method holds up
//! nobody but the client that called it, and never a reactor.
//!
//! The socket's file is replaced when nobody answers on it, and refused when somebody does.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use thiserror::Error;
use zeroize::Zeroize as _;

use crate::access::Peer;
use crate::jsonrpc::{self, Framer, Handler, RpcError};
use crate::peer;

/// Where SPDK's clients look when they are not told otherwise.
pub const DEFAULT_SOCKET: &str = "/var/tmp/spdk.sock";
/// Largest request or batch.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Connections served at a time.
pub const MAX_CONNECTIONS: usize = 64;
/// Of these, for root and the target's own user alone.
const KEPT: usize = 16;
/// A client that does not take its reply for this long is dropped.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the server does not start.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Somebody answers on the socket.
    #[error(
        "RPC socket {0} is already in use by a running target; stop that one or choose another path with -r"
    )]
    InUse(PathBuf),
    /// The path is something else.
    #[error("{0} exists and is not a socket; choose another path with -r")]
    NotASocket(PathBuf),
    /// The operating system refused.
    #[error("RPC socket {path}: {error}; choose a writable path with -r")]
    Os {
        /// The socket.
        path: PathBuf,
        /// What it said.
        error: io::Error,
    },
}

/// Makes the handler of a connection, or says why there is none.
type Admit = Box<dyn Fn(Peer) -> Result<Arc<dyn Handler>, RpcError> + Send + Sync>;

struct Shared {
    admit: Admit,
    stopping: AtomicBool,
    open: Mutex<HashMap<u64, Connection>>,
}

struct Connection {
    stream: UnixStream,
    thread: Option<JoinHandle<()>>,
}

/// A running server; dropping it stops it.
pub struct Server {
    shared: Arc<Shared>,
    path: PathBuf,
    /// The listener, for its end. Linux ends its accept when it is shut down; a stream is std's only way to do that.
    waker: UnixStream,
    acceptor: Option<JoinHandle<()>>,
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Binds with this mode from the first moment: the file is made under a private name and renamed into place.
fn bind(path: &Path, mode: u32) -> Result<UnixListener, ServeError> {
    let os = |error| ServeError::Os { path: path.into(), error };
    match std::fs::symlink_metadata(path) {
        Ok(m) if !m.file_type().is_socket() => return Err(ServeError::NotASocket(path.into())),
        Ok(_) if UnixStream::connect(path).is_ok() => return Err(ServeError::InUse(path.into())),
        _ => {}
    }
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(os)?;
    let ready = std::fs::set_permissions(&fresh, PermissionsExt::from_mode(mode))
        .and_then(|()| std::fs::rename(&fresh, path));
    if let Err(e) = ready {
        let _ = std::fs::remove_file(&fresh);
        return Err(os(e));
    }
    Ok(listener)
}

impl Server {
    /// Listens on `path` (mode 0600) and answers with `handler`.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub fn start(path: &Path, handler: Arc<dyn Handler>) -> Result<Server, ServeError> {
        Server::start_for_peers(path, 0o600, Box::new(move |_| Ok(handler.clone())))
    }

    /// Listens on `path`, with this mode, and answers each connection with the handler that `admit` gives for its other end;
    /// a connection that gets none is told why and closed.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub fn start_for_peers(path: &Path, mode: u32, admit: Admit) -> Result<Server, ServeError> {
        let listener = bind(path, mode)?;
        let os = |error| ServeError::Os { path: path.into(), error };
        let waker = UnixStream::from(OwnedFd::from(listener.try_clone().map_err(os)?));
        let shared = Arc::new(Shared { admit, stopping: AtomicBool::new(false), open: Mutex::default() });
        let s = shared.clone();
        let acceptor = std::thread::Builder::new()
            .name("rpc-accept".into())
            .spawn(move || accept(&s, &listener))
            .map_err(os)?;
        Ok(Server { shared, path: path.into(), waker, acceptor: Some(acceptor) })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stops accepting, ends the connections (a method that runs is waited for), removes the socket.
    pub fn stop(&mut self) {
        if self.shared.stopping.swap(true, Ordering::SeqCst) {
            return;
        }
        // Not by a connection: somebody may have removed the path, or listen there now.
        let _ = self.waker.shutdown(Shutdown::Both);
        let _ = std::fs::remove_file(&self.path);
        if let Some(t) = self.acceptor.take() {
            let _ = t.join();
        }
        let connections: Vec<_> = lock(&self.shared.open).drain().map(|(_, c)| c).collect();
        for c in &connections {
            // Only the reading side: a reply under way still goes out.
            let _ = c.stream.shutdown(Shutdown::Read);
        }
        let me = std::thread::current().id();
        for t in connections.into_iter().filter_map(|c| c.thread) {
            if t.thread().id() != me {
                let _ = t.join();
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    for (id, stream) in (0u64..).zip(listener.incoming()) {
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        match stream {
            Ok(s) => admit(shared, id, s),
            Err(e) => {
                // Out of descriptors, most likely: let connections end instead of spinning.
                tracing::warn!(error = %e, "RPC accept failed");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

fn admit(shared: &Arc<Shared>, id: u64, mut stream: UnixStream) {
    let _ = stream.set_write_timeout(Some(WRITE_TIMEOUT));
    let peer = peer::credentials(&stream);
    let owner = peer.as_ref().is_ok_and(|peer| peer.may_everything(peer::own_uid()));
    let handler = match peer {
        Ok(peer) => (shared.admit)(peer),
        Err(e) => Err(RpcError::internal(format!("the other end of the socket is unknown: {e}"))),
    };
    let handler = match handler {
        Ok(handler) => handler,
        Err(e) => {
            let _ = writeln!(stream, "{}", jsonrpc::refusal(e));
            return;
        }
    };
    let mut open = lock(&shared.open);
    // The last places are for those who can do everything.
    let most = if owner { MAX_CONNECTIONS } else { MAX_CONNECTIONS - KEPT };
    if open.len() >= most {
        drop(open);
        let busy = RpcError::busy(format!("{most} RPC connections are open"));
        let _ = writeln!(stream, "{}", jsonrpc::refusal(busy));
        return;
    }
    let Ok(kept) = stream.try_clone() else { return };
    let s = shared.clone();
    let spawned = std::thread::Builder::new().name(format!("rpc-{id}")).spawn(move || {
        if let Err(e) = serve(handler.as_ref(), stream) {
            tracing::debug!(error = %e, "RPC connection ended");
        }
        lock(&s.open).remove(&id);
    });
    match spawned {
        Ok(t) => drop(open.insert(id, Connection { stream: kept, thread: Some(t) })),
        Err(e) => tracing::warn!(error = %e, "no thread for an RPC connection"),
    }
}

/// Answers in order until the client closes its sending side or sends something that is not JSON.
fn serve(handler: &dyn Handler, mut stream: UnixStream) -> io::Result<()> {
    let mut framer = Framer::new(MAX_MESSAGE_BYTES);
    let mut piece = vec![0; 16 << 10];
    loop {
        loop {
            match framer.next_message() {
                Ok(None) => break,
                Ok(Some(mut message)) => {
                    let reply = jsonrpc::answer(handler, &message);
                    jsonrpc::wipe(&mut message);
                    if let Some(reply) = reply {
                        let mut text = reply.to_string();
                        text.push('\n');
                        stream.write_all(text.as_bytes())?;
                    }
                }
                Err(e) => {
                    tracing::info!(error = %e, "RPC connection closed");
                    return writeln!(stream, "{}", jsonrpc::malformed(&e));
                }
            }
        }
        match stream.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                framer.push(&piece[..n]);
                piece[..n].zeroize();
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jsonrpc::RpcResult;
    use serde_json::{Value, json};

    /// Says when "slow" has begun.
    #[derive(Default)]
    struct Echo(Arc<AtomicBool>);
    impl Handler for Echo {
        fn call(&self, method: &str, params: Option<&Value>) -> RpcResult {
            match method {
                "echo" => Ok(params.cloned().unwrap_or(json!("none"))),
                "slow" => {
                    self.0.store(true, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(300));
                    Ok(json!("slow"))
                }
                _ => Err(RpcError::new(RpcError::METHOD_NOT_FOUND, "Method not found")),
            }
        }
    }

    fn start() -> (tempfile::TempDir, Server) {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(&dir.path().join("rpc.sock"), Arc::<Echo>::default()).unwrap();
        (dir, server)
    }

    #[test]
    fn it_ends_also_when_somebody_has_removed_its_socket() {
        let (dir, mut server) = start();
        dir.close().unwrap();
        let (ended, end) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            server.stop();
            ended.send(()).unwrap();
        });
        end.recv_timeout(Duration::from_secs(60)).expect("it waits for a connection that can not come");
    }

    fn exchange(server: &Server, bytes: &[u8]) -> Vec<Value> {
        let mut s = UnixStream::connect(server.path()).unwrap();
        // The server may close before everything is written.
        let _ = s.write_all(bytes);
        s.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        s.read_to_string(&mut text).unwrap();
        serde_json::Deserializer::from_str(&text).into_iter::<Value>().map(Result::unwrap).collect()
    }

    #[test]
    fn pipelined_then_half_closed() {
        let (_d, server) = start();
        let r = exchange(
            &server,
            br#"{"id":1,"method":"slow"}{"id":"b","method":"echo"}[{"id":3,"method":"x"}]"#,
        );
        assert_eq!(r.len(), 3);
        assert_eq!(r[0]["result"], "slow");
        assert_eq!((r[1]["id"].clone(), r[1]["result"].clone()), (json!("b"), json!("none")));
        assert_eq!(r[2][0]["error"]["code"], -32601);
    }

    #[test]
    fn malformed_closes_after_answering_what_came_before() {
        let (_d, server) = start();
        let r = exchange(&server, br#"{"id":1,"method":"echo"} nonsense {"id":2,"method":"echo"}"#);
        assert_eq!(r.len(), 2);
        assert_eq!((r[1]["id"].clone(), r[1]["error"]["code"].clone()), (Value::Null, json!(-32700)));
        let r = exchange(
            &server,
            br#"// comment
            {"id":1,"method":"echo"}"#,
        );
        assert_eq!(r[0]["error"]["code"], -32700, "comments are for files");
    }

    #[test]
    fn oversized_closes() {
        let (_d, server) = start();
        let mut big = br#"{"id":1,"method":"echo","params":[""#.to_vec();
        big.resize(MAX_MESSAGE_BYTES + 10, b'a');
        let mut s = UnixStream::connect(server.path()).unwrap();
        let _ = s.write_all(&big);
        let mut text = String::new();
        let _ = s.read_to_string(&mut text);
        let v: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(v["error"]["code"], -32600);
        assert_eq!(
            exchange(&server, br#"{"id":1,"method":"echo"}"#)[0]["result"],
            "none",
            "others are served"
        );
    }

    #[test]
    fn the_socket_is_private_replaced_when_stale_and_refused_when_live() {
        let (dir, server) = start();
        let path = server.path().to_path_buf();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        match Server::start(&path, Arc::<Echo>::default()) {
            Err(e @ ServeError::InUse(_)) => assert!(e.to_string().contains("already in use")),
            other => panic!("{:?}", other.map(|s| s.path.clone())),
        }
        drop(server);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a stale socket");
        let server = Server::start(&path, Arc::<Echo>::default()).unwrap();
        assert_eq!(exchange(&server, br#"{"id":1,"method":"echo"}"#).len(), 1);
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(matches!(Server::start(&file, Arc::<Echo>::default()), Err(ServeError::NotASocket(_))));
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
    }

    #[test]
    fn connections_are_bounded_and_come_back() {
        let (_d, server) = start();
        let held: Vec<_> =
            (0..MAX_CONNECTIONS).map(|_| UnixStream::connect(server.path()).unwrap()).collect();
        let mut one_more = UnixStream::connect(server.path()).unwrap();
        let mut text = String::new();
        one_more.read_to_string(&mut text).unwrap();
        assert!(text.contains("-16"), "{text}");
        drop(held);
        for _ in 0..6000 {
            let s = UnixStream::connect(server.path()).unwrap();
            s.shutdown(Shutdown::Write).unwrap();
            let mut text = String::new();
            (&s).read_to_string(&mut text).unwrap();
            if text.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("closed connections are still counted");
    }

    #[test]
    fn stop_waits_for_the_method_that_runs() {
        let (dir, begun) = (tempfile::tempdir().unwrap(), Arc::new(AtomicBool::new(false)));
        let mut server = Server::start(&dir.path().join("rpc.sock"), Arc::new(Echo(begun.clone()))).unwrap();
        let mut s = UnixStream::connect(server.path()).unwrap();
        s.write_all(br#"{"id":1,"method":"slow"}"#).unwrap();
        while !begun.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        server.stop();
        let mut text = String::new();
        s.read_to_string(&mut text).unwrap();
        assert!(text.contains("slow"), "{text}");
    }
}
