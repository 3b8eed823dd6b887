//! Key servers: their clients, the keys that devices take from them, and what becomes of a device when its key changes its
//! state there.
//!
//! ```text
//!   hostcrypt device --KeyGate-- Key: waiting -> open <-> fenced
//!                                 ^ one thread per server asks for the state, every poll interval and on binding
//! ```
//!
//! Invariants:
//! - A key is fetched only while a device uses it, and forgotten with the last one.
//! - A server that does not answer changes nothing: open stays open, waiting stays waiting, fenced stays fenced.
//! - A key that comes back (active again) must be the one that it was: a digest of it is kept, the key is not.
//! - Everything that happens to a key is in the audit log. No key material is in a reply, a message or a configuration.

mod kek;
mod key;
mod proven;
mod server;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use cryptfold_bdev_crypto::gate::KeyGate;

use crate::control::lock;
use crate::jsonrpc::RpcError;

pub use kek::KekError;
pub use key::{KeyOptions, KeyView, OnEnd, Policy};
pub use proven::{Proven, Unproven};
pub use server::{ServerOptions, ServerView};

use key::Key;
use server::Server;

/// How long binding waits for the first answer of a server that is not known to be down.
const BIND_WAIT: Duration = Duration::from_secs(10);

/// All key servers and their keys.
#[derive(Default)]
pub struct Kms {
    servers: Mutex<Vec<Arc<Server>>>,
}

impl Kms {
    fn server(&self, name: &str) -> Result<Arc<Server>, RpcError> {
        let found = lock(&self.servers).iter().find(|s| s.options.name == name).cloned();
        found.ok_or_else(|| {
            RpcError::not_found(format!("key server \"{name}\" (add it with keyring_kmip_add_server)"))
        })
    }

    fn key(&self, name: &str) -> Result<(Arc<Server>, Arc<Key>), RpcError> {
        let servers = lock(&self.servers).clone();
        let found = servers.into_iter().find_map(|s| s.key(name).map(|k| (s, k)));
        found.ok_or_else(|| RpcError::not_found(format!("key \"{name}\" (add it with keyring_kmip_add_key)")))
    }

    /// Adds a server; nothing is asked yet.
    ///
    /// # Errors
    /// Taken name, addresses or files that can not be used.
    pub fn add_server(&self, options: ServerOptions) -> Result<(), RpcError> {
        let mut servers = lock(&self.servers);
        if servers.iter().any(|s| s.options.name == options.name) {
            return Err(RpcError::exists(format!("key server \"{}\"", options.name)));
        }
        servers.push(Server::start(options)?);
        Ok(())
    }

    /// Forgets a server without keys.
    ///
    /// # Errors
    /// -2 when there is none, -16 when there are keys.
    pub fn remove_server(&self, name: &str) -> Result<(), RpcError> {
        let server = self.server(name)?;
        if let Some(key) = server.keys().first() {
            return Err(RpcError::busy(format!("key server \"{name}\" holds key \"{}\"", key.options.name)));
        }
        server.end();
        lock(&self.servers).retain(|s| s.options.name != name);
        Ok(())
    }

    /// Names a key of a server; it is fetched when a device uses it.
    ///
    /// # Errors
    /// Unknown server, taken name, identifiers that can not be used.
    pub fn add_key(&self, options: KeyOptions) -> Result<(), RpcError> {
        let server = self.server(&options.server)?;
        if self.key(&options.name).is_ok() {
            return Err(RpcError::exists(format!("key \"{}\"", options.name)));
        }
        server.add_key(Key::new(options)?);
        Ok(())
    }

    /// Forgets a key that no device uses.
    ///
    /// # Errors
    /// -2 when there is none, -16 when it is used.
    pub fn remove_key(&self, name: &str) -> Result<(), RpcError> {
        let (server, key) = self.key(name)?;
        if key.is_used() {
            return Err(RpcError::busy(format!("key \"{name}\" is used")));
        }
        server.remove_key(name);
        Ok(())
    }

    /// The gate of a key for the device `user`, and the look at the server that opens it. A server that is down delays
    /// only the opening.
    ///
    /// # Errors
    /// -2 when there is no such key.
    pub fn bind(&self, name: &str, user: &str) -> Result<Arc<KeyGate>, RpcError> {
        let (server, key) = self.key(name)?;
        if let Some(device) = &key.options.device {
            return Err(RpcError::busy(format!("key \"{name}\" is that of the header on {device}")));
        }
        let gate = key.bind(user);
        server.look_now(BIND_WAIT);
        Ok(gate)
    }

    /// The servers, in order of addition.
    pub fn servers(&self) -> Vec<ServerView> {
        lock(&self.servers).iter().map(|s| s.view()).collect()
    }

    /// Options of servers and of keys, for the configuration.
    pub fn options(&self) -> (Vec<ServerOptions>, Vec<KeyOptions>) {
        let servers = lock(&self.servers).clone();
        let keys = servers.iter().flat_map(|s| s.keys()).map(|k| k.options.clone());
        let keys = keys.filter(|k| k.device.is_none()).collect();
        (servers.iter().map(|s| s.options.clone()).collect(), keys)
    }

    /// The keys, by server and in order of addition.
    pub fn keys(&self) -> Vec<KeyView> {
        lock(&self.servers).iter().flat_map(|s| s.keys()).map(|k| k.view()).collect()
    }

    /// Ends the threads. They may be waiting for an answer; nobody waits for them.
    pub fn end(&self) {
        lock(&self.servers).iter().for_each(|s| s.end());
    }
}
