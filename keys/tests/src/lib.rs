//! A key server for tests: PyKMIP, as `scripts/setup-deps kmip` installs it, with certificates made by `openssl`.
//!
//! It is real: without it these tests fail, they are not passed over.

pub mod cryptsetup;

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cryptfold_kmip::{Client, ClientConfig, Identity, ServerAddress, State};
use tempfile::TempDir;

/// Name of the policy under which everybody may read keys, and their owner alone may end them.
pub const SHARED_POLICY: &str = "shared";

const POLICY: &str = r#"{"shared": {"preset": {"SYMMETRIC_KEY": {
  "LOCATE": "ALLOW_ALL", "GET": "ALLOW_ALL", "GET_ATTRIBUTES": "ALLOW_ALL", "GET_ATTRIBUTE_LIST": "ALLOW_ALL",
  "ACTIVATE": "ALLOW_OWNER", "REVOKE": "ALLOW_OWNER", "DESTROY": "ALLOW_OWNER"}}}}"#;

/// Certificates: an authority, a server, and clients by name.
pub struct Authority {
    dir: PathBuf,
}

fn run(dir: &Path, program: &str, args: &[&str]) {
    let done = Command::new(program).args(args).current_dir(dir).stdin(Stdio::null()).output();
    let done = done.unwrap_or_else(|e| panic!("{program}: {e} (scripts/setup-deps kmip)"));
    assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

impl Authority {
    /// A new one; its files go to `dir`.
    pub fn new(dir: &Path, name: &str) -> Authority {
        let dir = dir.join(name);
        std::fs::create_dir(&dir).expect("a directory for certificates");
        let subject = format!("/CN={name}");
        let mut args = vec!["req", "-x509", "-days", "2", "-nodes", "-subj", &subject, "-out", "ca.crt"];
        args.extend(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", "ca.key"]);
        run(&dir, "openssl", &args);
        Authority { dir }
    }

    /// Certificate and key of `name`, with these lines of X.509 extensions; gives their paths.
    pub fn issue(&self, name: &str, extensions: &str) -> (PathBuf, PathBuf) {
        let file = |extension: &str| format!("{name}.{extension}");
        let (csr, key, crt, ext) = (file("csr"), file("key"), file("crt"), file("ext"));
        std::fs::write(self.dir.join(&ext), extensions).expect("a file of extensions");
        let subject = format!("/CN={name}");
        let mut args = vec!["req", "-nodes", "-subj", &subject, "-out", &csr, "-keyout", &key];
        args.extend(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
        run(&self.dir, "openssl", &args);
        let mut args = vec!["x509", "-req", "-days", "2", "-in", &csr, "-CA", "ca.crt", "-CAkey", "ca.key"];
        args.extend(["-CAcreateserial", "-extfile", &ext, "-out", &crt]);
        run(&self.dir, "openssl", &args);
        (self.dir.join(crt), self.dir.join(key))
    }

    /// A client's: certificate and key.
    pub fn client(&self, name: &str) -> (PathBuf, PathBuf) {
        self.issue(name, "extendedKeyUsage=clientAuth\n")
    }

    /// Its own certificate.
    pub fn certificate(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// A client's identity for our client.
    pub fn identity(&self, name: &str) -> Identity {
        let (crt, key) = self.client(name);
        let read = |p: &Path| std::fs::read(p).expect("a file that openssl made");
        Identity::from_pem(&read(&self.certificate()), &read(&crt), &read(&key)).expect("an identity")
    }
}

/// A running key server; ended when dropped.
pub struct KeyServer {
    /// Where everything of it lies.
    pub dir: TempDir,
    /// Who signs.
    pub authority: Authority,
    /// Where it listens.
    pub address: ServerAddress,
    process: Option<Child>,
}

/// Where `scripts/setup-deps kmip` puts PyKMIP.
fn python() -> PathBuf {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/venv/bin/python");
    assert!(python.exists(), "no PyKMIP: run scripts/setup-deps kmip ({})", python.display());
    python
}

fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    socket.local_addr().expect("its address").port()
}

impl KeyServer {
    /// Starts one with an empty database.
    pub fn start() -> KeyServer {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let authority = Authority::new(dir.path(), "ca");
        let extensions = "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n";
        let (crt, key) = authority.issue("server", extensions);
        let policy = dir.path().join("policy");
        std::fs::create_dir(&policy).expect("a directory for policies");
        std::fs::write(policy.join("shared.json"), POLICY).expect("a policy");
        let port = free_port();
        let conf = format!(
            "[server]\nhostname=127.0.0.1\nport={port}\ncertificate_path={}\nkey_path={}\nca_path={}\n\
             auth_suite=TLS1.2\npolicy_path={}\nenable_tls_client_auth=True\ndatabase_path={}\n",
            crt.display(),
            key.display(),
            authority.certificate().display(),
            policy.display(),
            dir.path().join("kmip.db").display()
        );
        std::fs::write(dir.path().join("server.conf"), conf).expect("the server's configuration");
        let address = ServerAddress { host: "127.0.0.1".into(), port };
        let mut server = KeyServer { dir, authority, address, process: None };
        server.resume();
        server
    }

    /// Starts it again after [`KeyServer::stop`], with the same address and database.
    pub fn resume(&mut self) {
        assert!(self.process.is_none(), "it runs");
        // One at a time: a loaded machine needs long enough to start one Python.
        static STARTING: Mutex<()> = Mutex::new(());
        let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let program = "import sys\nfrom kmip.services.server.server import main\n\
                       sys.argv = ['pykmip-server'] + sys.argv[1:]\nmain()";
        let log = self.dir.path().join("server.log");
        let _ = std::fs::remove_file(&log);
        let out = std::fs::File::create(self.dir.path().join("server.out")).expect("a file for its output");
        let child = Command::new(python())
            .args(["-W", "ignore", "-c", program, "-f"])
            .arg(self.dir.path().join("server.conf"))
            .arg("-l")
            .arg(&log)
            // It starts processes of its own, which a killed server would leave behind.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("one more handle"))
            .stderr(out)
            .spawn()
            .expect("PyKMIP");
        self.process = Some(child);
        let deadline = Instant::now() + Duration::from_secs(90);
        // Policies are read a second after the start.
        let ready = || {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            said.contains("Loading policy: shared")
                && std::net::TcpStream::connect(("127.0.0.1", self.address.port)).is_ok()
        };
        while !ready() {
            let ended = self.process.as_mut().is_some_and(|p| !matches!(p.try_wait(), Ok(None)));
            if ended || Instant::now() > deadline {
                let text = |name| std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
                panic!("PyKMIP does not listen:\n{}{}", text("server.log"), text("server.out"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends it, as a crash would.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.process.take() {
            let group = format!("-{}", child.id());
            let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
            let _ = child.wait();
        }
    }

    /// Has it stop where it is: connections to it are taken, and nothing is answered, until [`KeyServer::go_on`].
    pub fn pause(&self) {
        self.signal("-STOP");
    }

    /// Goes on after [`KeyServer::pause`].
    pub fn go_on(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let child = self.process.as_ref().expect("it runs");
        let sent = Command::new("kill").args([signal, "--", &format!("-{}", child.id())]).status();
        assert!(sent.expect("kill").success(), "{signal} to PyKMIP");
    }

    /// Puts a key into a state that no client could ask for (a deactivated key is never active again), as an administrator
    /// of the server's database can.
    pub fn force_state(&self, id: &str, state: State) {
        let program = "import sqlite3, sys\n\
                       with sqlite3.connect(sys.argv[1], timeout=10) as db:\n\
                       \x20   n = db.execute('UPDATE crypto_objects SET state = ? WHERE uid = ?',\n\
                       \x20       (int(sys.argv[3]), int(sys.argv[2]))).rowcount\n\
                       assert n == 1, 'no such object'";
        let database = self.dir.path().join("kmip.db");
        let done = Command::new(python())
            .args(["-c", program])
            .arg(database)
            .arg(id)
            .arg(state.code().to_string())
            .output();
        let done = done.expect("python");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    /// Our client, as `name`.
    pub fn client(&self, name: &str) -> Client {
        Client::new(self.client_config(), &self.authority.identity(name))
    }

    /// For one server, with little patience.
    pub fn client_config(&self) -> ClientConfig {
        ClientConfig { rounds: 1, ..ClientConfig::new(vec![self.address.clone()]) }
    }
}

impl Drop for KeyServer {
    fn drop(&mut self) {
        self.stop();
    }
}
