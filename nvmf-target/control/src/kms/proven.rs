//! Keys that a device has found in its host's header: fetched once, proven, and then watched like all others.

use std::sync::Arc;

use cryptfold_bdev_crypto::gate::KeyGate;
use cryptfold_kmip::{Filter, ObjectType};
use thiserror::Error;

use super::Kms;
use super::key::{FetchError, Key, KeyOptions, Look, OnEnd, fetch, look};

/// Why a key is not a device's.
#[derive(Debug, Error)]
pub enum Unproven {
    /// No answer, or the key is not active yet: it may come.
    #[error("{0}")]
    NotYet(String),
    /// It is not active any more.
    #[error("{0}")]
    Ended(String),
    /// It is another one, or none.
    #[error("{0}")]
    Refused(String),
}

/// A key that was fetched and proven, and that nobody watches yet.
pub struct Proven(Key);

impl Kms {
    /// Whether a key may be used now, as far as its state at the server goes.
    ///
    /// # Errors
    /// Unknown server, no answer, a state in which keys are not used.
    pub fn usable(&self, options: &KeyOptions) -> Result<(), Unproven> {
        let server = self.server(&options.server).map_err(|e| Unproven::NotYet(e.message))?;
        match look(server.client(), options) {
            Look::Active | Look::Ended(OnEnd::Keep, _) => Ok(()),
            Look::NotYet(state) => Err(Unproven::NotYet(format!("the key is {state}"))),
            Look::Ended(OnEnd::Fence, state) => Err(Unproven::Ended(format!("the key is {state}"))),
            Look::NoAnswer(e) => Err(Unproven::NotYet(e.to_string())),
        }
    }

    /// Fetches a key and asks `prove` about it.
    ///
    /// # Errors
    /// As [`Kms::usable`]; it is no XTS key, or not the one.
    pub fn prove(
        &self,
        options: KeyOptions,
        prove: impl FnOnce(&[u8]) -> Result<(), String>,
    ) -> Result<Proven, Unproven> {
        self.usable(&options)?;
        let server = self.server(&options.server).map_err(|e| Unproven::NotYet(e.message))?;
        let whole = fetch(server.client(), &options.objects).map_err(|e| match e {
            FetchError::NoAnswer(e) => Unproven::NotYet(e.to_string()),
            FetchError::NotUsable(why) | FetchError::Fence(why) => Unproven::Refused(why),
        })?;
        prove(&whole).map_err(Unproven::Refused)?;
        Key::fetched(options, &whole).map(Proven).map_err(|e| Unproven::Refused(e.message))
    }

    /// Watches a proven key from now on, in place of what was watched under its name. Its gate is open.
    ///
    /// # Errors
    /// The server is gone, or the name is that of another key.
    pub fn watch_proven(&self, Proven(key): Proven) -> Result<Arc<KeyGate>, Unproven> {
        let server = self.server(&key.options.server).map_err(|e| Unproven::NotYet(e.message))?;
        let name = &key.options.name;
        match self.key(name) {
            // Left by a device of this name that is just ending, or by an earlier look.
            Ok((server, old)) if old.options.device.is_some() => server.remove_key(name),
            Ok(_) => return Err(Unproven::NotYet(format!("another key has the name \"{name}\""))),
            Err(_) => {}
        }
        let gate = key.bind(key.options.device.as_deref().unwrap_or_default());
        server.add_key(key);
        Ok(gate)
    }

    /// Does not watch the key with this gate any more.
    pub fn forget_proven(&self, name: &str, gate: &Arc<KeyGate>) {
        if let Ok((server, key)) = self.key(name)
            && key.has_gate(gate)
        {
            server.remove_key(name);
        }
    }

    /// The symmetric keys at a server that have this name.
    ///
    /// # Errors
    /// Unknown server, no answer, refusal.
    pub fn named(&self, server: &str, name: &str) -> Result<Vec<String>, String> {
        let server = self.server(server).map_err(|e| e.message)?;
        let filter = Filter {
            name: Some(name.into()),
            object_type: Some(ObjectType::SymmetricKey),
            ..Filter::default()
        };
        server.client().locate(&filter).map_err(|e| e.to_string())
    }

    /// How often a server's keys are looked at; none: there is no such server.
    pub fn poll_interval(&self, server: &str) -> Option<std::time::Duration> {
        self.server(server).ok().map(|s| s.options.poll_interval)
    }
}
