//! Keys by name for the transport: files that hold one textual key each (`DHHC-1:...`, `NVMeTLSkey-1:...`). A file is read
//! when its key is put to use; what is kept, shown and saved is the name and the path.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use cryptfold_nvmf_auth::is_key_text;
use zeroize::Zeroizing;

use crate::control::lock;
use crate::jsonrpc::RpcError;
use crate::keys::read_key_file;

/// A key of the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingKey {
    /// Its name.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
}

/// The ring.
#[derive(Default)]
pub struct Keyring(Mutex<Vec<RingKey>>);

impl Keyring {
    /// Adds a key file (absolute path, readable by its owner only).
    ///
    /// # Errors
    /// Taken name, relative path, or a file that can not be used.
    pub fn add(&self, name: &str, path: &Path) -> Result<(), RpcError> {
        if !path.is_absolute() {
            return Err(RpcError::params(format!("path: {} is not absolute", path.display())));
        }
        text(path)?;
        let mut keys = lock(&self.0);
        if keys.iter().any(|k| k.name == name) {
            return Err(RpcError::exists(format!("key \"{name}\"")));
        }
        keys.push(RingKey { name: name.into(), path: path.into() });
        Ok(())
    }

    /// Forgets a key; who uses it keeps what was read.
    ///
    /// # Errors
    /// -2 when there is none.
    pub fn remove(&self, name: &str) -> Result<(), RpcError> {
        self.find(name)?;
        lock(&self.0).retain(|k| k.name != name);
        Ok(())
    }

    /// All, in order of addition.
    pub fn list(&self) -> Vec<RingKey> {
        lock(&self.0).clone()
    }

    /// The text of a key, read now.
    ///
    /// # Errors
    /// -2 when there is none; a file that can not be used.
    pub fn read(&self, name: &str) -> Result<Zeroizing<String>, RpcError> {
        text(&self.find(name)?.path)
    }

    fn find(&self, name: &str) -> Result<RingKey, RpcError> {
        let found = lock(&self.0).iter().find(|k| k.name == name).cloned();
        // Perhaps the key itself was given: it is not said again.
        let name = if is_key_text(name) { "(a key; its name is wanted)" } else { name };
        found.ok_or_else(|| RpcError::not_found(format!("key \"{name}\" (add it with keyring_file_add_key)")))
    }
}

fn text(path: &Path) -> Result<Zeroizing<String>, RpcError> {
    let bytes = read_key_file(path)?;
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(Zeroizing::new(text.trim().to_owned())),
        Err(_) => Err(RpcError::params(format!("key file {}: is no text", path.display()))),
    }
}
