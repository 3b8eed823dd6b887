//! The client: which server is asked, how often, and what its users may ask.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{NamedGroup, RootCertStore};
use thiserror::Error;

use crate::message::{
    Answer, Attributes, Filter, KeyObject, MAX_TEXT_BYTES, MessageError, NewObject, ObjectType, Operation,
    Refusal, Request, RevocationReason, Version,
};
use crate::session::{Connect, Session, SessionError, TlsConnect};
use crate::ttlv::Secret;

/// KMIP's port.
pub const DEFAULT_PORT: u16 = 5696;

/// Where a server listens: `host`, `host:port`, `[v6]:port`. The host is also the name that its certificate must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerAddress {
    /// DNS name or IP address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl FromStr for ServerAddress {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let wrong =
            || format!("\"{}\" is no server; HOST, HOST:PORT or [IPV6]:PORT is needed", s.escape_default());
        let (host, port) = match s.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest.split_once(']').ok_or_else(wrong)?;
                (host, rest.strip_prefix(':').or(rest.is_empty().then_some("")).ok_or_else(wrong)?)
            }
            None if s.matches(':').count() > 1 => (s, ""),
            None => s
                .split_once(':')
                .map_or(Ok((s, "")), |(h, p)| if p.is_empty() { Err(wrong()) } else { Ok((h, p)) })?,
        };
        let port = if port.is_empty() { DEFAULT_PORT } else { port.parse().map_err(|_| wrong())? };
        if host.is_empty() || port == 0 || host.len() > 253 || host.contains(char::is_whitespace) {
            return Err(wrong());
        }
        Ok(ServerAddress { host: host.into(), port })
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// How servers are reached.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// The servers, the preferred one first. They must hold the same keys.
    pub servers: Vec<ServerAddress>,
    /// For connecting, TLS included.
    pub connect_limit: Duration,
    /// For one request and its answer.
    pub request_limit: Duration,
    /// How often all servers are tried before a call fails.
    pub rounds: u32,
    /// Between two rounds.
    pub pause: Duration,
}

impl ClientConfig {
    /// Two rounds, three seconds to connect, five for an answer.
    pub fn new(servers: Vec<ServerAddress>) -> ClientConfig {
        ClientConfig {
            servers,
            connect_limit: Duration::from_secs(3),
            request_limit: Duration::from_secs(5),
            rounds: 2,
            pause: Duration::from_millis(500),
        }
    }
}

/// A certificate or key that can not be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IdentityError {
    /// No certificate, or none that can be read.
    #[error("{what}: {why}; PEM with at least one certificate is needed")]
    Certificate {
        /// Which: the authority's or the client's.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
    /// No private key, or none that can be read.
    #[error("client key: no private key in PEM (PKCS#8, PKCS#1 or SEC1, not encrypted)")]
    Key,
    /// They do not go together.
    #[error("client certificate and key: {0}")]
    Mismatch(String),
}

/// Who the client is, and whose word it takes for who servers are.
pub struct Identity(Arc<rustls::ClientConfig>);

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity(..)")
    }
}

impl Identity {
    /// From PEM: the authorities that sign servers' certificates, the client's chain and its private key. TLS 1.2 and 1.3.
    ///
    /// # Errors
    /// See [`IdentityError`]; nothing of the key is in it.
    pub fn from_pem(authorities: &[u8], chain: &[u8], key: &[u8]) -> Result<Identity, IdentityError> {
        let certificates = |what, pem: &[u8]| {
            let why = |why: String| IdentityError::Certificate { what, why };
            let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
            let all = all.map_err(|e| why(e.to_string()))?;
            if all.is_empty() { Err(why("no certificate".into())) } else { Ok(all) }
        };
        let mut roots = RootCertStore::empty();
        for root in certificates("certificate authority", authorities)? {
            roots.add(root).map_err(|e| IdentityError::Certificate {
                what: "certificate authority",
                why: e.to_string(),
            })?;
        }
        let chain = certificates("client certificate", chain)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| IdentityError::Key)?;
        let approved = APPROVED.load(Ordering::Relaxed);
        let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(provider(approved)))
            .with_safe_default_protocol_versions()
            .map_err(|e| IdentityError::Mismatch(e.to_string()))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(|e| IdentityError::Mismatch(e.to_string()))?;
        require_ems(&mut tls, approved);
        Ok(Identity(Arc::new(tls)))
    }
}

static APPROVED: AtomicBool = AtomicBool::new(false);

/// From now on identities use only what FIPS 140-3 approves, in the whole process. Before the first one.
pub fn require_approved() {
    APPROVED.store(true, Ordering::Relaxed);
}

/// All that rustls has, or what FIPS 140-3 approves of that (no X25519, no ChaCha20).
fn provider(approved: bool) -> CryptoProvider {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    if !approved {
        return provider;
    }
    provider.kx_groups.retain(|group| matches!(group.name(), NamedGroup::secp256r1 | NamedGroup::secp384r1));
    provider.cipher_suites.retain(|suite| {
        let name = format!("{:?}", suite.suite());
        name.contains("_AES_") && name.contains("_GCM_")
    });
    provider
}

/// Of TLS 1.2's key derivations, only the one with the extended master secret (RFC 7627) is approved (FIPS 140-3 IG D.Q).
fn require_ems(tls: &mut rustls::ClientConfig, approved: bool) {
    tls.require_ems |= approved;
}

/// Why a call failed.
#[derive(Debug, Error)]
pub enum KmipError {
    /// No server could be asked; nothing was changed.
    #[error("{operation}: no key server answers: {}", list(tried))]
    Unavailable {
        /// What was asked for.
        operation: Operation,
        /// Each attempt: server and reason.
        tried: Vec<(ServerAddress, SessionError)>,
    },
    /// A server said no.
    #[error("{operation}: key server {server} refuses: {refusal}")]
    Refused {
        /// What was asked for.
        operation: Operation,
        /// Who said it.
        server: ServerAddress,
        /// What it said.
        refusal: Refusal,
    },
    /// The answer is not what was asked for.
    #[error("{operation}: answer of key server {server}: {error}")]
    Answer {
        /// What was asked for.
        operation: Operation,
        /// Whose answer.
        server: ServerAddress,
        /// What is wrong.
        error: MessageError,
    },
    /// Sent, but no answer came: it may have been done.
    #[error(
        "{operation}: sent to key server {server}, but no answer came ({error}); look there before trying again"
    )]
    OutcomeUnknown {
        /// What was asked for.
        operation: Operation,
        /// Where it was sent.
        server: ServerAddress,
        /// What happened.
        error: SessionError,
    },
    /// Not sent: an identifier or name that is empty or too long.
    #[error("{operation}: an identifier or name has {bytes} bytes; 1 to {MAX_TEXT_BYTES} are possible")]
    Text {
        /// What was asked for.
        operation: Operation,
        /// Its length.
        bytes: usize,
    },
}

fn list(tried: &[(ServerAddress, SessionError)]) -> String {
    let mut parts: Vec<String> = tried.iter().map(|(s, e)| format!("{s}: {e}")).collect();
    parts.dedup();
    if parts.is_empty() { "no server is configured".into() } else { parts.join("; ") }
}

impl KmipError {
    /// Whether asking again later may help: no server could be reached, or none gave an answer.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, KmipError::Unavailable { .. } | KmipError::OutcomeUnknown { .. })
    }

    /// The server's reason, if it said no.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            KmipError::Refused { refusal, .. } => Some(refusal),
            _ => None,
        }
    }
}

#[derive(Debug, Default)]
struct Current {
    /// The server that answered last.
    at: usize,
    session: Option<Session>,
}

enum Attempt {
    Answered(Result<Answer, Refusal>),
    /// It can not have arrived.
    NotSent(SessionError),
    Sent(SessionError),
}

/// A client of one or several servers that hold the same keys. One request at a time; may be shared by threads.
pub struct Client {
    config: ClientConfig,
    connect: Box<dyn Connect>,
    current: Mutex<Current>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Client {
    /// A client over TLS. Connects when it is first asked something.
    pub fn new(config: ClientConfig, identity: &Identity) -> Client {
        Client::with_connect(config, Box::new(TlsConnect(identity.0.clone())))
    }

    /// A client over connections of another kind.
    pub fn with_connect(config: ClientConfig, connect: Box<dyn Connect>) -> Client {
        Client { config, connect, current: Mutex::default() }
    }

    /// The configuration.
    pub fn config(&self) -> &ClientConfig {
        &self.config
    }

    /// Asks until a server answers, in rounds, beginning with the one that answered last.
    fn call(&self, request: &Request) -> Result<(ServerAddress, Answer), KmipError> {
        let operation = request.operation;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let first = current.at;
        let mut tried = Vec::new();
        for round in 0..self.config.rounds.max(1) {
            if round > 0 {
                std::thread::sleep(self.config.pause);
            }
            for i in 0..self.config.servers.len() {
                let at = (first + i) % self.config.servers.len();
                let server = self.config.servers[at].clone();
                match self.attempt(&mut current, at, request) {
                    Attempt::Answered(Ok(answer)) => return Ok((server, answer)),
                    Attempt::Answered(Err(refusal)) => {
                        return Err(KmipError::Refused { operation, server, refusal });
                    }
                    Attempt::Sent(error) if !operation.is_read_only() => {
                        return Err(KmipError::OutcomeUnknown { operation, server, error });
                    }
                    Attempt::Sent(error) | Attempt::NotSent(error) => {
                        tracing::debug!(%operation, %server, %error, "key server does not answer");
                        tried.push((server, error));
                    }
                }
            }
        }
        Err(KmipError::Unavailable { operation, tried })
    }

    /// One server. A connection that has been idle may have been closed by the server, so what only reads gets a second
    /// one at once, and what changes something goes over a new one.
    fn attempt(&self, current: &mut Current, at: usize, request: &Request) -> Attempt {
        let limit = self.config.request_limit;
        let kept = current.session.take().filter(|_| current.at == at && request.operation.is_read_only());
        current.at = at;
        if let Some(mut session) = kept
            && let Ok(answer) = session.ask(request, limit)
        {
            current.session = Some(session);
            return Attempt::Answered(answer);
        }
        let server = &self.config.servers[at];
        let mut session = match Session::open(&*self.connect, server, self.config.connect_limit, limit) {
            Ok(session) => session,
            Err(e) => return Attempt::NotSent(e),
        };
        match session.ask(request, limit) {
            Ok(answer) => {
                current.session = Some(session);
                Attempt::Answered(answer)
            }
            Err(e) => Attempt::Sent(e),
        }
    }

    /// Asks, and makes sense of the answer.
    fn ask<T>(
        &self,
        request: &Request,
        parse: impl Fn(&Answer) -> Result<T, MessageError>,
    ) -> Result<T, KmipError> {
        let operation = request.operation;
        let (server, answer) = self.call(request)?;
        parse(&answer).map_err(|error| KmipError::Answer { operation, server, error })
    }

    /// The version that the server that answers speaks.
    ///
    /// # Errors
    /// See [`KmipError`]; also for the other calls.
    pub fn version(&self) -> Result<Version, KmipError> {
        self.call(&Request::query())?;
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(current.session.as_ref().map_or(Version::OURS[0], Session::version))
    }

    /// Operations that the server has, by number, and the maker's name.
    #[allow(clippy::missing_errors_doc)]
    pub fn query(&self) -> Result<(Vec<u32>, String), KmipError> {
        self.ask(&Request::query(), Answer::capabilities)
    }

    /// Identifiers of the objects that fit.
    #[allow(clippy::missing_errors_doc)]
    pub fn locate(&self, filter: &Filter) -> Result<Vec<String>, KmipError> {
        if let Some(name) = &filter.name {
            check(Operation::Locate, name)?;
        }
        self.ask(&Request::locate(filter), Answer::ids)
    }

    /// State, kind, length and names.
    #[allow(clippy::missing_errors_doc)]
    pub fn get_attributes(&self, id: &str) -> Result<Attributes, KmipError> {
        check(Operation::GetAttributes, id)?;
        self.ask(&Request::get_attributes(id), Answer::attributes)
    }

    /// The key. Servers give it in any state, so look at the state too.
    #[allow(clippy::missing_errors_doc)]
    pub fn get(&self, id: &str) -> Result<KeyObject, KmipError> {
        check(Operation::Get, id)?;
        self.ask(&Request::get(id), |answer| answer.key(id))
    }

    /// Makes an AES key at the server (pre-active); its identifier.
    #[allow(clippy::missing_errors_doc)]
    pub fn create(&self, new: &NewObject) -> Result<String, KmipError> {
        check_new(Operation::Create, new)?;
        self.ask(&Request::create(new), Answer::id)
    }

    /// Hands a key to the server (pre-active); its identifier. The length in `new` is taken from the key.
    #[allow(clippy::missing_errors_doc)]
    pub fn register(&self, new: &NewObject, kind: ObjectType, key: &Secret) -> Result<String, KmipError> {
        check_new(Operation::Register, new)?;
        let new = NewObject { length_bits: key.len() as i32 * 8, ..new.clone() };
        self.ask(&Request::register(&new, kind, key), Answer::id)
    }

    /// Makes a key active.
    #[allow(clippy::missing_errors_doc)]
    pub fn activate(&self, id: &str) -> Result<(), KmipError> {
        check(Operation::Activate, id)?;
        self.call(&Request::activate(id)).map(drop)
    }

    /// Deactivates a key, or calls it compromised.
    #[allow(clippy::missing_errors_doc)]
    pub fn revoke(&self, id: &str, reason: RevocationReason, message: &str) -> Result<(), KmipError> {
        check(Operation::Revoke, id)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
        self.call(&Request::revoke(id, reason, message, now)).map(drop)
    }

    /// Destroys a key.
    #[allow(clippy::missing_errors_doc)]
    pub fn destroy(&self, id: &str) -> Result<(), KmipError> {
        check(Operation::Destroy, id)?;
        self.call(&Request::destroy(id)).map(drop)
    }
}

fn check(operation: Operation, text: &str) -> Result<(), KmipError> {
    if text.is_empty() || text.len() > MAX_TEXT_BYTES {
        return Err(KmipError::Text { operation, bytes: text.len() });
    }
    Ok(())
}

fn check_new(operation: Operation, new: &NewObject) -> Result<(), KmipError> {
    [&new.name, &new.policy].into_iter().flatten().try_for_each(|t| check(operation, t))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let parsed = |s: &str| s.parse::<ServerAddress>().map(|a| (a.host.clone(), a.port, a.to_string()));
        let good = |h: &str, p, s: &str| Ok((h.to_string(), p, s.to_string()));
        assert_eq!(parsed("kms.example"), good("kms.example", 5696, "kms.example:5696"));
        assert_eq!(parsed("10.0.0.1:15696"), good("10.0.0.1", 15696, "10.0.0.1:15696"));
        assert_eq!(parsed("[::1]:7"), good("::1", 7, "[::1]:7"));
        assert_eq!(parsed("fe80::1"), good("fe80::1", 5696, "[fe80::1]:5696"));
        for bad in ["", ":1", "a:", "a:0", "a:70000", "[::1", "[::1]x", "a b", "[]:5"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_what_is_approved_in_the_fips_modes() {
        let made = |approved| {
            let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(provider(approved)))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(RootCertStore::empty())
                .with_no_client_auth();
            require_ems(&mut tls, approved);
            let provider = tls.crypto_provider();
            let suites: Vec<_> = provider.cipher_suites.iter().map(|s| format!("{:?}", s.suite())).collect();
            let groups: Vec<_> = provider.kx_groups.iter().map(|group| group.name()).collect();
            (tls.require_ems, suites, groups)
        };
        let (ems, suites, groups) = made(true);
        assert!(
            ems && suites.len() >= 4 && suites.iter().all(|s| s.contains("_AES_") && s.contains("_GCM_"))
        );
        assert_eq!(groups, [NamedGroup::secp256r1, NamedGroup::secp384r1]);
        if cfg!(not(feature = "fips")) {
            let (ems, suites, groups) = made(false);
            assert!(!ems && suites.iter().any(|s| s.contains("CHACHA20")), "{suites:?}");
            assert!(groups.contains(&NamedGroup::X25519), "{groups:?}");
        }
    }

    #[test]
    fn identities_say_what_is_wrong_and_not_the_key() {
        let e = Identity::from_pem(b"", b"", b"").unwrap_err();
        assert!(e.to_string().starts_with("certificate authority: no certificate"), "{e}");
    }
}
