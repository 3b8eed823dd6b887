//! One key of a key server: what the server says about it, and what devices may do with it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aws_lc_rs::{constant_time, digest};
use cryptfold_bdev_crypto::engine::XtsKey;
use cryptfold_bdev_crypto::gate::{Access, KeyGate};
use cryptfold_kmip::{Client, KmipError, Reason, State};
use cryptfold_nvmf_target::audit::TARGET as AUDIT;
use zeroize::Zeroizing;

use crate::control::lock;
use crate::jsonrpc::RpcError;
use crate::params::choices;

/// The longest XTS key.
const MAX_KEY_BYTES: usize = 64;
/// Longest identifier at a key server.
const MAX_ID_BYTES: usize = 160;

choices! {
    /// What the end of a key at its server does to the devices that use it.
    pub enum OnEnd {
        /// All I/O, reads too, ends with Access Denied and Do Not Retry.
        Fence = "fence",
        /// Nothing.
        Keep = "keep",
    }
}

/// What each end does.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Deactivated, or archived.
    pub deactivated: OnEnd,
    /// Compromised.
    pub compromised: OnEnd,
    /// Destroyed.
    pub destroyed: OnEnd,
    /// The server knows no such key, or does not show it to us.
    pub not_found: OnEnd,
}

/// What `keyring_kmip_add_key` takes.
#[derive(Clone, Debug)]
pub struct KeyOptions {
    /// Its name here.
    pub name: String,
    /// The server's name.
    pub server: String,
    /// Identifiers at the server: the whole key, or its two halves.
    pub objects: Vec<String>,
    /// What becomes of devices.
    pub policy: Policy,
    /// The device that found it in its host's header; such a key is in no configuration. None: added by name.
    pub device: Option<String>,
}

/// A key for people.
#[derive(Clone, Debug)]
pub struct KeyView {
    /// How it was added.
    pub options: KeyOptions,
    /// What the server said last.
    pub state: String,
    /// Why devices can not use it, if they can not.
    pub reason: Option<String>,
    /// `unused`, `waiting`, `open` or `fenced`.
    pub access: &'static str,
}

/// A key that devices have and the server does not find is asked for again after this.
pub const DOUBT: Duration = Duration::from_secs(1);
/// What is said of an object that the server does not find, or not for us.
const NOT_FOUND: &str = "not found";

/// What the server says.
pub enum Look {
    Active,
    /// Not in use yet.
    NotYet(String),
    /// In one of the states that have a policy.
    Ended(OnEnd, String),
    NoAnswer(KmipError),
}

/// How the key could not be had.
pub enum FetchError {
    NoAnswer(KmipError),
    /// It may come later.
    NotUsable(String),
    /// It must not be used.
    Fence(String),
}

/// The state of all objects: the worst one counts.
pub fn look(client: &Client, options: &KeyOptions) -> Look {
    let policy = &options.policy;
    let mut worst = Look::Active;
    for id in &options.objects {
        let look = match client.get_attributes(id) {
            Ok(found) => match found.state {
                Some(State::Active) => Look::Active,
                Some(s @ State::PreActive) => Look::NotYet(s.to_string()),
                Some(s @ State::Deactivated) => Look::Ended(policy.deactivated, s.to_string()),
                Some(s @ State::Compromised) => Look::Ended(policy.compromised, s.to_string()),
                Some(s @ (State::Destroyed | State::DestroyedCompromised)) => {
                    Look::Ended(policy.destroyed, s.to_string())
                }
                None => Look::NotYet("without a state".into()),
            },
            Err(e) => match e.refusal().map(|r| r.reason) {
                Some(Reason::ITEM_NOT_FOUND | Reason::PERMISSION_DENIED) => {
                    Look::Ended(policy.not_found, NOT_FOUND.into())
                }
                Some(Reason::OBJECT_ARCHIVED) => Look::Ended(policy.deactivated, "archived".into()),
                // Anything else says more about the server than about the key.
                _ => Look::NoAnswer(e),
            },
        };
        worst = match (worst, look) {
            (Look::Ended(OnEnd::Fence, state), _) if state != NOT_FOUND => Look::Ended(OnEnd::Fence, state),
            (_, ended @ Look::Ended(OnEnd::Fence, _)) | (ended @ Look::Ended(OnEnd::Fence, _), _) => ended,
            (Look::NoAnswer(e), _) | (_, Look::NoAnswer(e)) => Look::NoAnswer(e),
            (Look::NotYet(state), _) | (_, Look::NotYet(state)) => Look::NotYet(state),
            (Look::Active, other) | (other, Look::Active) => other,
            (ended, _) => ended,
        };
    }
    worst
}

/// The key, from its object or its two halves.
pub fn fetch(client: &Client, objects: &[String]) -> Result<Zeroizing<Vec<u8>>, FetchError> {
    // Sized ahead: growing would leave a copy behind.
    let mut whole = Zeroizing::new(Vec::with_capacity(MAX_KEY_BYTES));
    for id in objects {
        let object = client.get(id).map_err(|e| match e.is_unavailable() {
            true => FetchError::NoAnswer(e),
            false => FetchError::NotUsable(e.to_string()),
        })?;
        if whole.len() + object.key.len() > MAX_KEY_BYTES {
            let what = format!("{} bytes and more; an XTS key has 32 or 64", whole.len() + object.key.len());
            return Err(FetchError::NotUsable(what));
        }
        whole.extend_from_slice(object.key.expose());
    }
    Ok(whole)
}

#[derive(Default)]
struct Known {
    state: String,
    reason: Option<String>,
    /// SHA-256 of the key that devices have had.
    digest: Option<digest::Digest>,
    /// Since when the server does not find it, while devices have it still.
    doubted: Option<Instant>,
}

/// See the module.
pub struct Key {
    pub options: KeyOptions,
    gate: Arc<KeyGate>,
    known: Mutex<Known>,
}

impl Key {
    pub fn new(options: KeyOptions) -> Result<Key, RpcError> {
        let id = |o: &String| !o.is_empty() && o.len() <= MAX_ID_BYTES && !o.contains(char::is_control);
        if !matches!(options.objects.len(), 1 | 2) || !options.objects.iter().all(id) {
            return Err(RpcError::params(format!(
                "objects: one identifier, or two for a key in halves, of 1 to {MAX_ID_BYTES} bytes are needed"
            )));
        }
        Ok(Key { options, gate: KeyGate::waiting(), known: Mutex::default() })
    }

    /// A key that is active and has been fetched already.
    pub fn fetched(options: KeyOptions, whole: &[u8]) -> Result<Key, RpcError> {
        let xts = XtsKey::new(whole).map_err(|e| RpcError::params(e.to_string()))?;
        let key = Key::new(options)?;
        let state = State::Active.to_string();
        *lock(&key.known) =
            Known { state, digest: Some(digest::digest(&digest::SHA256, whole)), ..Known::default() };
        key.gate.set(Access::Open(Arc::new(xts)));
        Ok(key)
    }

    /// Whether this is its gate.
    pub fn has_gate(&self, gate: &Arc<KeyGate>) -> bool {
        Arc::ptr_eq(&self.gate, gate)
    }

    /// Devices hold the gate.
    pub fn is_used(&self) -> bool {
        Arc::strong_count(&self.gate) > 1
    }

    pub fn bind(&self, user: &str) -> Arc<KeyGate> {
        let o = &self.options;
        tracing::info!(target: AUDIT, event = "key bound", key = o.name, server = o.server, objects = ?o.objects, device = user);
        self.gate.clone()
    }

    pub fn view(&self) -> KeyView {
        let known = lock(&self.known);
        let access = if self.is_used() { self.gate.access().word() } else { "unused" };
        KeyView {
            options: self.options.clone(),
            state: known.state.clone(),
            reason: known.reason.clone(),
            access,
        }
    }

    /// Asks the server, and does what follows. None: nobody uses the key, so nothing was asked.
    pub fn check(&self, client: &Client) -> Option<Result<(), KmipError>> {
        if !self.is_used() {
            self.forget();
            return None;
        }
        let look = look(client, &self.options);
        if self.is_doubtful(&look) {
            return Some(Ok(()));
        }
        match look {
            Look::Active => self.use_it(client),
            Look::NotYet(state) => {
                self.say(&state, Some(format!("the key is {state}")));
                self.set(Access::Waiting);
                Some(Ok(()))
            }
            Look::Ended(OnEnd::Keep, state) => {
                lock(&self.known).state = state;
                self.use_it(client)
            }
            Look::Ended(OnEnd::Fence, state) => {
                self.say(&state, Some(format!("the key is {state}")));
                self.set(Access::Fenced);
                Some(Ok(()))
            }
            Look::NoAnswer(e) => self.no_answer(e),
        }
    }

    /// Whether to ask again before devices lose the key: a server that has just been started may not find yet what it has.
    fn is_doubtful(&self, look: &Look) -> bool {
        if matches!(look, Look::NoAnswer(_)) {
            return false;
        }
        let missing = matches!(look, Look::Ended(OnEnd::Fence, state) if state == NOT_FOUND);
        let open = matches!(self.gate.access(), Access::Open(_));
        let mut known = lock(&self.known);
        if !(missing && open) {
            known.doubted = None;
            return false;
        }
        known.doubted.get_or_insert_with(Instant::now).elapsed() < DOUBT
    }

    /// Whether the server is to be asked again soon.
    pub fn is_doubted(&self) -> bool {
        lock(&self.known).doubted.is_some()
    }

    fn no_answer(&self, e: KmipError) -> Option<Result<(), KmipError>> {
        if matches!(self.gate.access(), Access::Waiting) {
            lock(&self.known).reason = Some(e.to_string());
        }
        Some(Err(e))
    }

    /// Opens the gate, with the key fetched unless devices have it.
    fn use_it(&self, client: &Client) -> Option<Result<(), KmipError>> {
        if matches!(self.gate.access(), Access::Open(_)) {
            return Some(Ok(()));
        }
        match self.fetch(client) {
            Ok(key) => {
                self.say(&State::Active.to_string(), None);
                self.set(Access::Open(key));
            }
            Err(FetchError::NoAnswer(e)) => return self.no_answer(e),
            Err(FetchError::NotUsable(reason)) => {
                self.say("unusable", Some(reason));
                self.set(Access::Waiting);
            }
            Err(FetchError::Fence(reason)) => {
                self.say("changed", Some(reason));
                self.set(Access::Fenced);
            }
        }
        Some(Ok(()))
    }

    fn fetch(&self, client: &Client) -> Result<Arc<XtsKey>, FetchError> {
        let whole = fetch(client, &self.options.objects)?;
        let key = XtsKey::new(&whole).map_err(|e| FetchError::NotUsable(e.to_string()))?;
        let now = digest::digest(&digest::SHA256, &whole);
        let mut known = lock(&self.known);
        if let Some(before) = &known.digest
            && constant_time::verify_slices_are_equal(before.as_ref(), now.as_ref()).is_err()
        {
            return Err(FetchError::Fence(
                "the server has another key under this identifier than before".into(),
            ));
        }
        known.digest = Some(now);
        Ok(Arc::new(key))
    }

    fn say(&self, state: &str, reason: Option<String>) {
        let mut known = lock(&self.known);
        known.state = state.into();
        known.reason = reason;
    }

    /// Sets the gate if that changes anything, and writes it to the audit log.
    fn set(&self, access: Access) {
        if self.gate.access().word() == access.word() {
            return;
        }
        let word = access.word();
        self.gate.set(access);
        let known = lock(&self.known);
        let (o, state) = (&self.options, &known.state);
        let reason = known.reason.as_deref().unwrap_or("");
        if word == "open" {
            tracing::info!(target: AUDIT, event = "key access", key = o.name, server = o.server, state, access = word);
        } else {
            tracing::warn!(
                target: AUDIT,
                event = "key access",
                key = o.name,
                server = o.server,
                state,
                access = word,
                reason
            );
        }
    }

    /// The last device is gone: the key too.
    fn forget(&self) {
        let mut known = lock(&self.known);
        if known.digest.is_none() && known.state.is_empty() {
            return;
        }
        *known = Known::default();
        drop(known);
        self.gate.set(Access::Waiting);
        let o = &self.options;
        tracing::info!(target: AUDIT, event = "key released", key = o.name, server = o.server);
    }
}
