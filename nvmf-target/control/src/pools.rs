//! Pools and their keys: which key file opens which pool, and the search for pools on devices that appear.
//!
//! A pool's key-encryption key is a file (mode 0600; 32 bytes, raw or hexadecimal). Unless the request names one, it is
//! made in the key directory. A device that appears is tried with the keys of that directory and with those that were
//! named before.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use cryptfold_bdev::{Bdev, Registry};
use cryptfold_reduce::{CheckReport, CreateOptions, KeySource, PoolError, PoolInfo, PoolManager};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::control::lock;
use crate::jsonrpc::RpcError;
use crate::keys::{free_name, hex_line, random_key, read_key, write_key_file};

/// Bytes in a key-encryption key.
const KEK_BYTES: usize = 32;
/// Key files of the directory that are tried on a device.
const MAX_TRIED: usize = 256;

impl From<PoolError> for RpcError {
    fn from(e: PoolError) -> RpcError {
        RpcError::new(e.code().into(), e.to_string())
    }
}

/// What opens a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolKey {
    /// A key file.
    File(PathBuf),
    /// Nothing: the pool is not encrypted.
    None,
}

/// Which key a new pool gets.
pub enum NewKey {
    /// One of its own, made in the key directory.
    Own,
    /// This file.
    File {
        /// Path.
        path: PathBuf,
        /// Make it, with a random key.
        create: bool,
    },
    /// None: the pool is not encrypted.
    None,
}

/// See the module.
pub struct Pools {
    manager: Arc<PoolManager>,
    registry: Arc<Registry>,
    key_dir: PathBuf,
    keys: Mutex<HashMap<Uuid, PoolKey>>,
    /// One search at a time: two of them would find each other's owner mark.
    searching: Mutex<()>,
}

impl PoolKey {
    /// For the pool's engine, after a look at the file's mode and size.
    fn source(&self) -> Result<KeySource, RpcError> {
        match self {
            PoolKey::None => Ok(KeySource::Open),
            PoolKey::File(path) => {
                read_key(path, &[KEK_BYTES])?;
                Ok(KeySource::File(path.clone()))
            }
        }
    }
}

impl Pools {
    /// No pools yet.
    pub fn new(manager: Arc<PoolManager>, registry: Arc<Registry>, key_dir: PathBuf) -> Pools {
        Pools { manager, registry, key_dir, keys: Mutex::default(), searching: Mutex::default() }
    }

    /// The engine.
    pub fn manager(&self) -> &PoolManager {
        &self.manager
    }

    /// A pool by name, or by UUID.
    ///
    /// # Errors
    /// -19.
    pub fn find(&self, name: &str) -> Result<PoolInfo, RpcError> {
        let uuid = Uuid::parse_str(name).ok();
        let all = self.manager.list();
        let found = all.into_iter().find(|p| p.name == name || Some(p.uuid) == uuid);
        found.ok_or_else(|| PoolError::NoPool(name.into()).into())
    }

    /// Creates a pool; a key file that is made for it is removed again when that fails.
    ///
    /// # Errors
    /// Key file or pool refused; nothing is written then.
    pub fn create(
        &self,
        bdev: &str,
        name: &str,
        key: NewKey,
        options: impl FnOnce(KeySource) -> CreateOptions,
    ) -> Result<PoolInfo, RpcError> {
        // Before a key file is made for nothing.
        self.registry.get(bdev)?;
        if self.find(name).is_ok() {
            return Err(PoolError::PoolExists(name.into()).into());
        }
        let (key, made) = match key {
            NewKey::None => (PoolKey::None, None),
            NewKey::File { path, create: false } => (PoolKey::File(path), None),
            NewKey::File { path, create: true } => {
                let made = make_key(&path)?;
                (PoolKey::File(path.clone()), made.then_some(path))
            }
            NewKey::Own => {
                let path = free_name(&self.key_dir, name, "key")?;
                make_key(&path)?;
                (PoolKey::File(path.clone()), Some(path))
            }
        };
        let created = key.source().and_then(|s| Ok(self.manager.create(bdev, name, &options(s))?));
        match created {
            Ok(info) => {
                lock(&self.keys).insert(info.uuid, key);
                Ok(info)
            }
            Err(e) => {
                if let Some(path) = made {
                    let _ = std::fs::remove_file(path);
                }
                Err(e)
            }
        }
    }

    /// Opens the pool on a device. Without a key, all keys at hand are tried. `None`: there is no pool.
    ///
    /// # Errors
    /// A pool that can not be opened; of several keys, none fits.
    pub fn open(
        &self,
        bdev: &str,
        key: Option<PoolKey>,
        memory_budget: Option<u64>,
    ) -> Result<Option<PoolInfo>, RpcError> {
        let _one = lock(&self.searching);
        let base = self.registry.get(bdev)?;
        if let Some(open) = self.manager.list().into_iter().find(|p| p.base_bdev == base.name()) {
            return Ok(Some(open));
        }
        let opened = self.with_key(key, |source| self.manager.open(base.name(), source, memory_budget))?;
        Ok(opened.map(|(info, key)| {
            lock(&self.keys).insert(info.uuid, key);
            info
        }))
    }

    /// Audits the pool on a device that nobody has open; nothing is written. Without a key, all keys at hand are tried.
    ///
    /// # Errors
    /// As [`Pools::open`].
    pub fn audit(
        &self,
        bdev: &str,
        key: Option<PoolKey>,
        data: bool,
    ) -> Result<Option<(PoolInfo, CheckReport)>, RpcError> {
        let audited = self.with_key(key, |source| self.manager.audit(bdev, source, data))?;
        Ok(audited.map(|(found, _)| found))
    }

    /// Tries `f` with this key, or with all that are at hand, until one fits.
    fn with_key<T>(
        &self,
        key: Option<PoolKey>,
        f: impl Fn(&KeySource) -> Result<Option<T>, PoolError>,
    ) -> Result<Option<(T, PoolKey)>, RpcError> {
        let keys = match key {
            Some(k) => vec![k],
            None => self.at_hand(),
        };
        let mut refused = None;
        for key in keys {
            let source = match key.source() {
                Ok(s) => s,
                Err(e) => {
                    refused = refused.or(Some(e));
                    continue;
                }
            };
            match f(&source) {
                Ok(found) => return Ok(found.map(|found| (found, key))),
                Err(e @ PoolError::WrongKey { .. }) => refused = refused.or(Some(e.into())),
                Err(e) => return Err(e.into()),
            }
        }
        match refused {
            Some(e) => Err(e),
            None => Ok(None),
        }
    }

    /// Keys that a device may be tried with.
    fn at_hand(&self) -> Vec<PoolKey> {
        let mut keys = vec![PoolKey::None];
        keys.extend(lock(&self.keys).values().filter(|k| **k != PoolKey::None).cloned());
        let dir = std::fs::read_dir(&self.key_dir).into_iter().flatten().flatten().map(|e| e.path());
        let mut files: Vec<PathBuf> = dir.filter(|p| p.extension().is_some_and(|e| e == "key")).collect();
        files.sort();
        keys.extend(files.into_iter().map(PoolKey::File));
        let mut seen = Vec::new();
        keys.retain(|k| {
            !seen.contains(k) && {
                seen.push(k.clone());
                true
            }
        });
        keys.truncate(MAX_TRIED);
        keys
    }

    /// Whether a device that has appeared may hold a pool that nobody else uses.
    pub fn is_candidate(&self, b: &Bdev) -> bool {
        b.claimed_by().is_none() && !b.is_read_only() && b.info().product_name != VOLUME_PRODUCT
    }

    /// Forgets the key of a pool that is gone.
    pub fn forget(&self, uuid: Uuid) {
        lock(&self.keys).remove(&uuid);
    }

    /// The call that opens the pool on a device again.
    pub fn config(&self, base: &str) -> Option<(String, Value)> {
        let info = self.manager.list().into_iter().find(|p| p.base_bdev == base)?;
        let mut params = json!({"base_bdev_name": base});
        match lock(&self.keys).get(&info.uuid) {
            Some(PoolKey::File(path)) => params["key_file"] = json!(path),
            Some(PoolKey::None) => params["encrypt"] = false.into(),
            None => {}
        }
        params["memory_budget_mib"] = (info.memory_budget_bytes >> 20).into();
        Some(("cryptfold_pool_open".into(), params))
    }

    /// Where a pool's key lies.
    pub fn key_file(&self, uuid: Uuid) -> Option<PathBuf> {
        match lock(&self.keys).get(&uuid) {
            Some(PoolKey::File(path)) => Some(path.clone()),
            _ => None,
        }
    }
}

/// Product name of the pools' volumes.
pub const VOLUME_PRODUCT: &str = "Cryptfold volume";

/// Makes a key file unless it exists; true when it was made.
fn make_key(path: &Path) -> Result<bool, RpcError> {
    if path.exists() {
        return Ok(false);
    }
    write_key_file(path, hex_line(&random_key(KEK_BYTES)?).as_bytes())?;
    Ok(true)
}
