//! Key-encryption keys of pools at key servers: 32 bytes, used while a pool is opened and not kept.

use cryptfold_kmip::message::USAGE_WRAP_UNWRAP;
use cryptfold_kmip::{Client, KmipError, NewObject, Reason, RevocationReason, State};
use cryptfold_nvmf_target::audit::TARGET as AUDIT;
use cryptfold_reduce::keys::{Kek, SECRET_BYTES, Secret};
use thiserror::Error;
use zeroize::Zeroizing;

use super::Kms;
use crate::control::lock;
use crate::jsonrpc::RpcError;

/// Why a pool's key could not be had.
#[derive(Debug, Error)]
pub enum KekError {
    /// It may come later.
    #[error("{0}")]
    NoAnswer(String),
    /// The server knows it and it may not be used, or none knows it.
    #[error("{0}")]
    Refused(String),
}

impl From<KekError> for RpcError {
    fn from(e: KekError) -> RpcError {
        match e {
            KekError::NoAnswer(what) => RpcError::new(-110, format!("{what}: Connection timed out")),
            KekError::Refused(what) => RpcError::new(-126, format!("{what}: Required key not available")),
        }
    }
}

fn refused(server: &str, id: &str, why: impl std::fmt::Display) -> KekError {
    KekError::Refused(format!("key \"{id}\" of key server \"{server}\": {why}"))
}

fn failed(server: &str, id: &str, e: KmipError) -> KekError {
    match e.is_unavailable() {
        true => KekError::NoAnswer(format!("key server \"{server}\": {e}")),
        false => refused(server, id, e),
    }
}

/// The key, if it is active. `Ok(None)`: the server knows no such key, or does not show it to us.
fn fetch(client: &Client, server: &str, id: &str) -> Result<Option<Kek>, KekError> {
    let attributes = match client.get_attributes(id) {
        Ok(found) => found,
        Err(e) => match e.refusal().map(|r| r.reason) {
            Some(Reason::ITEM_NOT_FOUND | Reason::PERMISSION_DENIED) => return Ok(None),
            _ => return Err(failed(server, id, e)),
        },
    };
    match attributes.state {
        Some(State::Active) => {}
        Some(state) => return Err(refused(server, id, format!("it is {state}, not active"))),
        None => return Err(refused(server, id, "it has no state")),
    }
    let object = client.get(id).map_err(|e| failed(server, id, e))?;
    let bytes = object.key.expose();
    let Ok(key) = <[u8; SECRET_BYTES]>::try_from(bytes) else {
        return Err(refused(server, id, format!("it has {} bytes, not {SECRET_BYTES}", bytes.len())));
    };
    Ok(Some(Kek(Secret::take(&mut Zeroizing::new(key)))))
}

impl Kms {
    /// The key-encryption key with this identifier, from the first server that knows it; and that server's name.
    ///
    /// # Errors
    /// None knows it, it is not active, or a server that might know it does not answer.
    pub fn kek(&self, id: &str) -> Result<(String, Kek), KekError> {
        let servers = lock(&self.servers).clone();
        let mut silent = None;
        for server in &servers {
            let name = &server.options.name;
            match fetch(server.client(), name, id) {
                Ok(Some(kek)) => {
                    tracing::info!(target: AUDIT, event = "pool key fetched", server = name, object = id);
                    return Ok((name.clone(), kek));
                }
                Ok(None) => {}
                Err(e @ KekError::NoAnswer(_)) => silent = silent.or(Some(e)),
                Err(e) => return Err(e),
            }
        }
        let none = || {
            KekError::Refused(match servers.is_empty() {
                true => format!("key \"{id}\": no key server is known (keyring_kmip_add_server)"),
                false => format!("key \"{id}\": no key server knows it, or shows it to us"),
            })
        };
        Err(silent.unwrap_or_else(none))
    }

    /// The key-encryption key `id` of a server, or a new one when no identifier is given; and its identifier.
    ///
    /// # Errors
    /// -2 for an unknown server; the server's refusal or silence.
    pub fn new_kek(&self, server: &str, id: Option<&str>) -> Result<(String, Kek), RpcError> {
        let client = self.server(server)?;
        let client = client.client();
        let id = match id {
            Some(id) => id.to_string(),
            None => {
                let new = NewObject { name: None, length_bits: 256, usage: USAGE_WRAP_UNWRAP, policy: None };
                let id = client.create(&new).map_err(|e| failed(server, "(new)", e))?;
                client.activate(&id).map_err(|e| failed(server, &id, e))?;
                tracing::info!(target: AUDIT, event = "pool key created", server, object = id);
                id
            }
        };
        let kek = fetch(client, server, &id)?;
        let kek =
            kek.ok_or_else(|| refused(server, &id, "the server knows no such key, or does not show it"))?;
        Ok((id, kek))
    }

    /// Revokes and destroys a key-encryption key, at the first server that knows it; that server's name.
    ///
    /// # Errors
    /// None knows it, refusal, or silence: then it may have been destroyed.
    pub fn destroy_kek(&self, id: &str) -> Result<String, KekError> {
        let servers = lock(&self.servers).clone();
        let mut last = KekError::Refused(format!("key \"{id}\": no key server knows it, or shows it to us"));
        for server in &servers {
            let (name, client) = (&server.options.name, server.client());
            let state = match client.get_attributes(id) {
                Ok(found) => found.state,
                Err(e) => {
                    last = failed(name, id, e);
                    continue;
                }
            };
            if !matches!(state, Some(State::Destroyed | State::DestroyedCompromised)) {
                if state == Some(State::Active) {
                    let why = RevocationReason::CessationOfOperation;
                    client.revoke(id, why, "erased").map_err(|e| failed(name, id, e))?;
                }
                client.destroy(id).map_err(|e| failed(name, id, e))?;
            }
            tracing::info!(target: AUDIT, event = "pool key destroyed", server = name, object = id);
            return Ok(name.clone());
        }
        Err(last)
    }
}
