//! A key server and the thread that watches its keys.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cryptfold_kmip::{Client, ClientConfig, Identity, KmipError, ServerAddress};
use cryptfold_nvmf_target::audit::TARGET as AUDIT;

use super::key::{DOUBT, Key};
use crate::control::lock;
use crate::jsonrpc::RpcError;
use crate::keys::read_key_file;

/// Certificates are no larger, chains included.
const MAX_CERTIFICATES_BYTES: u64 = 256 * 1024;

/// What `keyring_kmip_add_server` takes.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Its name here.
    pub name: String,
    /// Addresses of servers that hold the same keys, the preferred one first.
    pub addresses: Vec<ServerAddress>,
    /// Certificates (PEM) of who signs the servers' certificates.
    pub ca_file: PathBuf,
    /// Our certificate (PEM).
    pub cert_file: PathBuf,
    /// Our private key (PEM), mode 0600.
    pub key_file: PathBuf,
    /// For connecting.
    pub connect_timeout: Duration,
    /// For an answer.
    pub timeout: Duration,
    /// Rounds over all addresses before an operation fails.
    pub rounds: u32,
    /// Between two looks at the keys' states.
    pub poll_interval: Duration,
}

/// A server for people.
#[derive(Clone, Debug)]
pub struct ServerView {
    /// How it was added.
    pub options: ServerOptions,
    /// Whether it answered when it was last asked; none: not asked yet.
    pub reachable: Option<bool>,
    /// Why not.
    pub error: Option<String>,
    /// Since its last answer.
    pub answer_age: Option<Duration>,
}

#[derive(Default)]
struct Health {
    reachable: Option<bool>,
    error: Option<String>,
    answered: Option<Instant>,
}

#[derive(Default)]
struct Rounds {
    ended: bool,
    /// Looks that were asked for, and the newest one that is done.
    asked: u64,
    done: u64,
}

/// See the module.
pub struct Server {
    pub options: ServerOptions,
    client: Client,
    keys: Mutex<Vec<Arc<Key>>>,
    health: Mutex<Health>,
    rounds: Mutex<Rounds>,
    turn: Condvar,
}

fn certificates(what: &str, path: &Path) -> Result<Vec<u8>, RpcError> {
    let refused = |why: String| RpcError::params(format!("{what}: {}: {why}", path.display()));
    let len = std::fs::metadata(path).map_err(|e| refused(e.to_string()))?.len();
    if len > MAX_CERTIFICATES_BYTES {
        return Err(refused(format!("{len} bytes; at most {MAX_CERTIFICATES_BYTES} are read")));
    }
    std::fs::read(path).map_err(|e| refused(e.to_string()))
}

impl Server {
    /// Makes the client and starts the thread.
    pub fn start(options: ServerOptions) -> Result<Arc<Server>, RpcError> {
        let identity = Identity::from_pem(
            &certificates("ca_file", &options.ca_file)?,
            &certificates("cert_file", &options.cert_file)?,
            &read_key_file(&options.key_file)?,
        )
        .map_err(|e| RpcError::params(format!("key server \"{}\": {e}", options.name)))?;
        let config = ClientConfig {
            servers: options.addresses.clone(),
            connect_limit: options.connect_timeout,
            request_limit: options.timeout,
            rounds: options.rounds,
            pause: Duration::from_millis(500),
        };
        let server = Arc::new(Server {
            client: Client::new(config, &identity),
            options,
            keys: Mutex::default(),
            health: Mutex::default(),
            rounds: Mutex::default(),
            turn: Condvar::new(),
        });
        let thread = server.clone();
        std::thread::Builder::new()
            .name("kms".into())
            .spawn(move || thread.watch())
            .map_err(|e| RpcError::internal(format!("a thread for the key server: {e}")))?;
        Ok(server)
    }

    fn watch(&self) {
        let mut rounds = lock(&self.rounds);
        while !rounds.ended {
            let asked = rounds.asked;
            drop(rounds);
            for key in self.keys() {
                if lock(&self.rounds).ended {
                    return;
                }
                match key.check(&self.client) {
                    Some(Err(e)) => self.unreachable(&e),
                    Some(Ok(())) => self.reached(),
                    None => {}
                }
            }
            rounds = lock(&self.rounds);
            rounds.done = asked;
            self.turn.notify_all();
            let idle = |r: &mut Rounds| !r.ended && r.asked == r.done;
            let pause = match self.keys().iter().any(|key| key.is_doubted()) {
                true => self.options.poll_interval.min(DOUBT),
                false => self.options.poll_interval,
            };
            let waited = self.turn.wait_timeout_while(rounds, pause, idle);
            rounds = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has the keys looked at now, and waits for it unless the server is known to be down.
    pub fn look_now(&self, limit: Duration) {
        let mut rounds = lock(&self.rounds);
        rounds.asked += 1;
        let mine = rounds.asked;
        self.turn.notify_all();
        if lock(&self.health).reachable == Some(false) {
            return;
        }
        let waiting = |r: &mut Rounds| !r.ended && r.done < mine;
        drop(self.turn.wait_timeout_while(rounds, limit, waiting));
    }

    /// To ask the server for something else than the keys of devices.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Ends the thread after what it is doing.
    pub fn end(&self) {
        lock(&self.rounds).ended = true;
        self.turn.notify_all();
    }

    fn reached(&self) {
        let mut health = lock(&self.health);
        if health.reachable == Some(false) {
            tracing::warn!(target: AUDIT, event = "key server answers again", server = self.options.name);
        }
        *health = Health { reachable: Some(true), error: None, answered: Some(Instant::now()) };
    }

    fn unreachable(&self, e: &KmipError) {
        let mut health = lock(&self.health);
        if health.reachable != Some(false) {
            let reason = e.to_string();
            tracing::warn!(target: AUDIT, event = "key server does not answer", server = self.options.name, reason);
        }
        (health.reachable, health.error) = (Some(false), Some(e.to_string()));
    }

    pub fn keys(&self) -> Vec<Arc<Key>> {
        lock(&self.keys).clone()
    }

    pub fn key(&self, name: &str) -> Option<Arc<Key>> {
        lock(&self.keys).iter().find(|k| k.options.name == name).cloned()
    }

    pub fn add_key(&self, key: Key) {
        lock(&self.keys).push(Arc::new(key));
    }

    pub fn remove_key(&self, name: &str) {
        lock(&self.keys).retain(|k| k.options.name != name);
    }

    pub fn view(&self) -> ServerView {
        let health = lock(&self.health);
        ServerView {
            options: self.options.clone(),
            reachable: health.reachable,
            error: health.error.clone(),
            answer_age: health.answered.map(|at| at.elapsed()),
        }
    }
}
