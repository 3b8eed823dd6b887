//! Pools and their keys: what opens which pool, which pools are locked, and the search for pools on devices that appear.
//!
//! A pool's key-encryption key is a file (mode 0600; 32 bytes, raw or hexadecimal), comes from a password, or from a key server,
//! as the pool's key slots say. Unless the request names one, a file is made in the key directory. A device that appears is tried
//! with the keys of that directory and of systemd's credentials, with those that were named before, and with the key servers that
//! are known. A pool that none of them opens is listed as locked, until it is unlocked or its device is gone.
//!
//! A pool that the security role has locked has a file in the key directory (`locked/UUID`) that says so: until that role unlocks
//! it, nothing else opens it, whatever key it names, after a restart either.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use cryptfold_bdev::{Bdev, Registry};
use cryptfold_keystore::{Password, StoreError};
use cryptfold_nvmf_target::audit::TARGET as AUDIT;
use cryptfold_reduce::keys::Kek;
use cryptfold_reduce::slots::{Kdf, SlotKind};
use cryptfold_reduce::{
    CheckReport, CreateOptions, KeySource, PoolError, PoolInfo, PoolManager, SealedPool, SlotKey,
};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::control::lock;
use crate::fips::FipsMode;
use crate::jsonrpc::RpcError;
use crate::keys::{
    credentials, files_in, free_name, hex_line, random_key, read_key, read_password, write_key_file,
};
use crate::kms::{KekError, Kms};

/// Bytes in a key-encryption key.
const KEK_BYTES: usize = 32;
/// In the key directory: a file for each pool that the security role has locked.
const LOCKED_DIRECTORY: &str = "locked";
/// Why such a pool is not opened.
const HELD: &str = "it was locked by request (cryptfold_encryption_lock)";
/// Key files of the directory that are tried on a device.
const MAX_TRIED: usize = 256;

impl From<PoolError> for RpcError {
    fn from(e: PoolError) -> RpcError {
        RpcError::new(e.code().into(), e.to_string())
    }
}

/// What opens a pool, and opens it again at the next start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolKey {
    /// A key file.
    File(PathBuf),
    /// A file with a password.
    PasswordFile(PathBuf),
    /// A key server, with the key that a slot of the pool names.
    Kms,
    /// Nothing that is at hand: a password was given. It starts locked.
    Given,
    /// Nothing: the pool is not encrypted.
    None,
}

impl PoolKey {
    /// For the log.
    fn word(&self) -> &'static str {
        match self {
            PoolKey::File(_) => "key_file",
            PoolKey::PasswordFile(_) => "password_file",
            PoolKey::Kms => "kms",
            PoolKey::Given => "given",
            PoolKey::None => "none",
        }
    }

    fn file(&self) -> Option<String> {
        match self {
            PoolKey::File(path) | PoolKey::PasswordFile(path) => Some(path.display().to_string()),
            PoolKey::Kms | PoolKey::Given | PoolKey::None => None,
        }
    }
}

/// What is tried on a pool.
pub enum Try<'a> {
    /// Everything at hand: no key, key servers, key files, credentials.
    All,
    /// This.
    Key(PoolKey),
    /// This password.
    Password(&'a Password),
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
    /// This password; and the file that it came from, if it did.
    Password(Password, Option<PathBuf>),
    /// A key of a key server: this one, or a new one.
    Kms {
        /// Name of the server.
        server: String,
        /// Identifier of the key.
        object: Option<String>,
    },
    /// None: the pool is not encrypted.
    None,
}

/// A pool that is known and not open for want of a key.
#[derive(Clone, Debug)]
pub struct Locked {
    /// What its device shows.
    pub pool: SealedPool,
    /// Why.
    pub reason: String,
    /// Its key server did not answer: it is tried again.
    pub waiting: bool,
    /// For its opening.
    pub memory_budget: Option<u64>,
}

/// A pool that the security role has locked now.
pub struct Shut {
    /// What of that was not done.
    pub warning: Option<String>,
    /// Its device failed when it was closed, perhaps.
    pub closed: Result<(), PoolError>,
}

/// For whom a pool is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
enum For {
    /// Not what the security role has locked.
    Anybody,
    /// The security role, which unlocks it.
    Security,
    /// Whoever has its key and the device to themselves; it stays as it is.
    Owner,
}

/// Why a pool was not opened.
struct Refusal {
    error: RpcError,
    /// It may go better later.
    waiting: bool,
}

/// See the module.
pub struct Pools {
    manager: Arc<PoolManager>,
    registry: Arc<Registry>,
    kms: Arc<Kms>,
    key_dir: PathBuf,
    fips: FipsMode,
    keys: Mutex<HashMap<Uuid, PoolKey>>,
    locked: Mutex<Vec<Locked>>,
    /// Those that the security role has locked, whatever the key directory can take.
    held: Mutex<HashSet<Uuid>>,
    /// How often each pool was locked by request: an unlocking that began before ends without effect.
    locks: Mutex<HashMap<Uuid, u64>>,
    /// One search at a time: two of them would find each other's owner mark.
    searching: Mutex<()>,
    /// One that opens, or locks for the security role, at a time. Taken after `searching`, and not while keys are fetched: a lock waits
    /// for no key server.
    opening: Mutex<()>,
}

fn kek_of_file(path: &Path) -> Result<Kek, RpcError> {
    let key = read_key(path, &[KEK_BYTES])?;
    Kek::from_file(&key).map_err(|e| RpcError::params(format!("key_file: {}: {e}", path.display())))
}

fn slot_key(kek: Kek, kind: SlotKind, label: &str) -> SlotKey {
    SlotKey { kek, kind, kdf: Kdf::None, label: short(label), reference: String::new() }
}

/// As much of a label as a slot holds.
pub fn short(label: &str) -> String {
    let mut label = label.to_string();
    while label.len() > 48 {
        label.pop();
    }
    label
}

fn file_label(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned())
}

impl Pools {
    /// No pools yet.
    pub fn new(
        manager: Arc<PoolManager>,
        registry: Arc<Registry>,
        kms: Arc<Kms>,
        key_dir: PathBuf,
        fips: FipsMode,
    ) -> Pools {
        let (keys, locked, held, locks) = Default::default();
        let (searching, opening) = Default::default();
        Pools { manager, registry, kms, key_dir, fips, keys, locked, held, locks, searching, opening }
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
        found.ok_or_else(|| match self.find_locked(name) {
            Some(l) => RpcError::new(
                -126,
                format!(
                    "pool \"{}\" is locked ({}); cryptfold_encryption_unlock opens it",
                    l.pool.name, l.reason
                ),
            ),
            None => PoolError::NoPool(name.into()).into(),
        })
    }

    /// A locked pool by name, UUID or device.
    pub fn find_locked(&self, name: &str) -> Option<Locked> {
        let uuid = Uuid::parse_str(name).ok();
        let is = |l: &Locked| l.pool.name == name || Some(l.pool.uuid) == uuid || l.pool.base_bdev == name;
        self.locked().into_iter().find(is)
    }

    /// The pools that are locked. One whose device is gone is forgotten.
    pub fn locked(&self) -> Vec<Locked> {
        let mut locked = lock(&self.locked);
        locked.retain(|l| self.registry.get(&l.pool.base_bdev).is_ok());
        locked.clone()
    }

    /// Keeps a pool that is not open in the list of locked ones.
    pub fn set_locked(&self, new: Locked) {
        tracing::warn!(target: AUDIT, event = "pool locked", pool = new.pool.name, bdev = new.pool.base_bdev, reason = new.reason);
        let mut locked = lock(&self.locked);
        locked.retain(|l| l.pool.base_bdev != new.pool.base_bdev);
        locked.push(new);
    }

    fn mark(&self, uuid: Uuid) -> PathBuf {
        self.key_dir.join(LOCKED_DIRECTORY).join(uuid.to_string())
    }

    /// Why only the security role opens the pool, if that is so: it has locked it and has not unlocked it since.
    pub fn held(&self, uuid: Uuid) -> Option<String> {
        if lock(&self.held).contains(&uuid) {
            return Some(HELD.into());
        }
        let path = self.mark(uuid);
        match path.try_exists() {
            Ok(false) => None,
            Ok(true) => Some(HELD.into()),
            Err(e) => {
                Some(format!("whether it was locked by request can not be seen: {}: {e}", path.display()))
            }
        }
    }

    /// From now on only the security role opens the pool. What of that was not done.
    fn hold(&self, uuid: Uuid) -> Option<String> {
        *lock(&self.locks).entry(uuid).or_default() += 1;
        lock(&self.held).insert(uuid);
        let path = self.mark(uuid);
        if matches!(path.try_exists(), Ok(true)) {
            return None;
        }
        // The directory of the marks may be new.
        let key_dir = || File::open(&self.key_dir).and_then(|dir| dir.sync_all()).map_err(|e| e.to_string());
        let written = write_key_file(&path, b"locked\n").map_err(|e| e.to_string()).and_then(|()| key_dir());
        let error = written.err()?;
        let what = format!(
            "the pool is locked until the target ends, and may open at its next start, because that can not be written down: {error}"
        );
        tracing::warn!(target: AUDIT, event = "lock does not last", pool = %uuid, reason = what);
        Some(what)
    }

    /// The security role has unlocked it. What can not be taken away locks it again at its next opening: that is told, and
    /// keeps nobody from it now.
    fn release(&self, uuid: Uuid) {
        lock(&self.held).remove(&uuid);
        let path = self.mark(uuid);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                let reason = format!("{}: {e}", path.display());
                tracing::warn!(target: AUDIT, event = "unlocking does not last", pool = %uuid, reason);
            }
            _ => {}
        }
    }

    /// A locked pool is not tried again by itself; why.
    fn stop_waiting(&self, bdev: &str, reason: &str) {
        for l in lock(&self.locked).iter_mut().filter(|l| l.pool.base_bdev == bdev) {
            tracing::warn!(target: AUDIT, event = "pool not opened", pool = l.pool.name, bdev, reason);
            l.waiting = false;
            l.reason = reason.into();
        }
    }

    /// Lists the pool on a device as locked without trying anything, unless it is open; its UUID. `None`: there is no pool.
    ///
    /// # Errors
    /// No such device, or a pool that can not be read.
    pub fn list_locked(&self, bdev: &str, memory_budget: Option<u64>) -> Result<Option<Uuid>, RpcError> {
        let _one = lock(&self.searching);
        let base = self.registry.get(bdev)?;
        if let Some(open) = self.manager.list().into_iter().find(|p| p.base_bdev == base.name()) {
            return Ok(Some(open.uuid));
        }
        let Some(pool) = self.manager.peek(base.name())? else { return Ok(None) };
        let uuid = pool.uuid;
        let reason = self.held(uuid).unwrap_or_else(|| "it starts locked".into());
        self.set_locked(Locked { pool, reason, waiting: false, memory_budget });
        Ok(Some(uuid))
    }

    /// What opened a pool.
    pub fn key_of(&self, uuid: Uuid) -> Option<PoolKey> {
        lock(&self.keys).get(&uuid).cloned()
    }

    /// Remembers what opens an open pool from now on.
    pub fn set_key(&self, uuid: Uuid, key: PoolKey) {
        lock(&self.keys).insert(uuid, key);
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
        let (key, made, source) = self.new_source(name, key)?;
        let created = self.manager.create(bdev, name, &options(source));
        match created {
            Ok(info) => {
                lock(&self.keys).insert(info.uuid, key);
                lock(&self.locked).retain(|l| l.pool.base_bdev != info.base_bdev);
                Ok(info)
            }
            Err(e) => {
                if let Some(path) = made {
                    let _ = std::fs::remove_file(path);
                }
                Err(e.into())
            }
        }
    }

    /// A new pool's key: what opens it later, the file that was made for it, and the key itself.
    fn new_source(&self, name: &str, key: NewKey) -> Result<(PoolKey, Option<PathBuf>, KeySource), RpcError> {
        let source = |key: SlotKey| KeySource::Kek(Box::new(key));
        let from_file = |path: PathBuf, made: bool| {
            let kek = kek_of_file(&path)?;
            let key = slot_key(kek, SlotKind::KeyFile, &file_label(&path));
            Ok((PoolKey::File(path.clone()), made.then_some(path), source(key)))
        };
        match key {
            NewKey::None => Ok((PoolKey::None, None, KeySource::Open)),
            NewKey::File { path, create } => {
                let made = create && make_key(&path)?;
                from_file(path, made)
            }
            NewKey::Own => {
                let path = free_name(&self.key_dir, name, "key");
                make_key(&path)?;
                from_file(path, true)
            }
            NewKey::Password(password, file) => {
                let (cost, limits) = self.fips.costs(self.fips.is_on());
                let (kek, kdf) = cryptfold_keystore::fresh(&password, cost, salt(), &limits)?;
                let key = SlotKey { kdf, ..slot_key(kek, SlotKind::Password, "password") };
                Ok((file.map_or(PoolKey::Given, PoolKey::PasswordFile), None, source(key)))
            }
            NewKey::Kms { server, object } => {
                let (reference, kek) = self.kms.new_kek(&server, object.as_deref())?;
                let key = SlotKey { reference, ..slot_key(kek, SlotKind::Kms, &server) };
                Ok((PoolKey::Kms, None, source(key)))
            }
        }
    }

    /// Opens the pool on a device. `None`: there is no pool. A pool that is there and that nothing of it
    /// opens becomes a locked one.
    ///
    /// # Errors
    /// A pool that can not be opened, or that the security role has locked; of several keys, none fits.
    pub fn open(
        &self,
        bdev: &str,
        key: Try<'_>,
        memory_budget: Option<u64>,
    ) -> Result<Option<PoolInfo>, RpcError> {
        self.open_as(bdev, key, memory_budget, For::Anybody)
    }

    /// As [`Pools::open`], for the security role: also what that has locked, which is locked no more then.
    ///
    /// # Errors
    /// As [`Pools::open`].
    pub fn unlock(
        &self,
        bdev: &str,
        key: Try<'_>,
        memory_budget: Option<u64>,
    ) -> Result<Option<PoolInfo>, RpcError> {
        self.open_as(bdev, key, memory_budget, For::Security)
    }

    /// As [`Pools::open`], without a target that serves: also what the security role has locked, which stays so.
    ///
    /// # Errors
    /// As [`Pools::open`].
    pub fn open_held(&self, bdev: &str, key: Try<'_>) -> Result<Option<PoolInfo>, RpcError> {
        self.open_as(bdev, key, None, For::Owner)
    }

    /// Locks an open pool for the security role: closes it, forgets its keys, lists it as locked.
    ///
    /// # Errors
    /// It is open still, and not locked.
    pub fn shut(&self, info: &PoolInfo) -> Result<Shut, RpcError> {
        // Not while somebody opens it: either that is closed here, or it is refused.
        let _one = lock(&self.opening);
        // Before anything is taken apart: nothing after that may fail. A device that can not be read keeps no pool open.
        let peek = || self.manager.peek(&info.base_bdev).ok().flatten();
        let sealed = match peek() {
            Some(sealed) => sealed,
            None => SealedPool {
                base_bdev: info.base_bdev.clone(),
                name: info.name.clone(),
                uuid: info.uuid,
                created_ms: 0,
                approved: info.approved,
                keys: self.manager.key_block(&info.name)?,
            },
        };
        let held = self.held(info.uuid).is_some();
        let warning = self.hold(info.uuid);
        let closed = self.manager.close(&info.name);
        if let Err(e) = &closed
            && self.manager.list().iter().any(|i| i.uuid == info.uuid)
        {
            if !held {
                self.release(info.uuid);
            }
            return Err(e.clone().into());
        }
        // Its slots may have been changed in between.
        let pool = peek().filter(|pool| pool.uuid == info.uuid).unwrap_or(sealed);
        // Forgotten, so that a saved configuration starts it locked.
        self.forget(info.uuid);
        let memory_budget = Some(info.memory_budget_bytes);
        self.set_locked(Locked { pool, reason: HELD.into(), waiting: false, memory_budget });
        Ok(Shut { warning, closed })
    }

    /// As [`Pools::shut`], a pool that is not open: nothing but the security role opens it from now on. `None`: no such pool is known.
    pub fn shut_closed(&self, name: &str) -> Option<Shut> {
        let _one = lock(&self.opening);
        let uuid = match self.find_locked(name) {
            Some(locked) => {
                let uuid = locked.pool.uuid;
                self.set_locked(Locked { reason: HELD.into(), waiting: false, ..locked });
                uuid
            }
            // One whose device is gone.
            None => {
                let uuid = Uuid::parse_str(name).ok();
                let lost = self.manager.lost();
                lost.into_iter().find(|l| l.name == name || Some(l.uuid) == uuid)?.uuid
            }
        };
        self.forget(uuid);
        Some(Shut { warning: self.hold(uuid), closed: Ok(()) })
    }

    /// Whether what was opened is what was looked at, and may be open; else it is closed.
    fn keep(&self, seen: &SealedPool, opened: &PoolInfo, whom: For) -> Result<(), RpcError> {
        let (name, base) = (&opened.name, &opened.base_bdev);
        let why = if opened.uuid != seen.uuid {
            format!("{base} had the pool {} at one look and {} at the next", seen.uuid, opened.uuid)
        } else if whom == For::Anybody && self.held(opened.uuid).is_some() {
            format!("pool \"{name}\" was locked while it was opened")
        } else {
            return Ok(());
        };
        tracing::warn!(target: AUDIT, event = "pool closed again", pool = name, bdev = base, reason = why);
        self.manager.close(name)?;
        Err(RpcError::busy(why))
    }

    /// Lists a pool as locked that only the security role opens; why.
    fn refuse_held(&self, pool: &SealedPool, why: String, memory_budget: Option<u64>) -> RpcError {
        let (name, base) = (&pool.name, &pool.base_bdev);
        if self.find_locked(base).is_none_or(|l| l.reason != why || l.pool.uuid != pool.uuid) {
            let reason = why.clone();
            self.set_locked(Locked { pool: pool.clone(), reason, waiting: false, memory_budget });
        }
        RpcError::new(
            -126,
            format!(
                "pool \"{name}\" on {base}: {why}; the role security unlocks it (cryptfold_encryption_unlock)"
            ),
        )
    }

    fn open_as(
        &self,
        bdev: &str,
        key: Try<'_>,
        memory_budget: Option<u64>,
        whom: For,
    ) -> Result<Option<PoolInfo>, RpcError> {
        let _one = lock(&self.searching);
        let base = self.registry.get(bdev)?;
        if let Some(open) = self.manager.list().into_iter().find(|p| p.base_bdev == base.name()) {
            return Ok(Some(open));
        }
        let Some(sealed) = self.manager.peek(base.name())? else { return Ok(None) };
        self.check_mode(&sealed)?;
        let memory_budget =
            memory_budget.or_else(|| self.find_locked(base.name()).and_then(|l| l.memory_budget));
        let held = || self.held(sealed.uuid).filter(|_| whom == For::Anybody);
        if let Some(why) = held() {
            return Err(self.refuse_held(&sealed, why, memory_budget));
        }
        let locks = || lock(&self.locks).get(&sealed.uuid).copied();
        let before = locks();
        let found = self.find_key(&sealed, key);
        let _opening = lock(&self.opening);
        // That may have taken long.
        if locks() != before && self.held(sealed.uuid).is_some() {
            return Err(RpcError::busy(format!(
                "pool \"{}\" was locked while its key was looked for",
                sealed.name
            )));
        }
        if let Some(why) = held() {
            return Err(self.refuse_held(&sealed, why, memory_budget));
        }
        let (key, kek) = match found {
            Ok(found) => found,
            Err(refusal) => {
                self.set_locked(Locked {
                    pool: sealed,
                    reason: refusal.error.message.clone(),
                    waiting: refusal.waiting,
                    memory_budget,
                });
                return Err(refusal.error);
            }
        };
        let source = KeySource::Kek(Box::new(kek));
        let opened = self.manager.open(base.name(), &source, memory_budget);
        if !matches!(opened, Ok(Some(_))) {
            // The key is there and is not what it waits for: fetching it again and again would help nobody.
            let reason =
                opened.as_ref().err().map_or_else(|| "it is not there any more".into(), ToString::to_string);
            self.stop_waiting(base.name(), &reason);
        }
        let Some(info) = opened? else { return Ok(None) };
        self.keep(&sealed, &info, whom)?;
        tracing::info!(target: AUDIT, event = "pool unlocked", pool = info.name, bdev = info.base_bdev, key = key.word(), file = key.file());
        lock(&self.keys).insert(info.uuid, key);
        lock(&self.locked).retain(|l| l.pool.base_bdev != info.base_bdev);
        if whom == For::Security {
            self.release(info.uuid);
        }
        Ok(Some(info))
    }

    /// Audits the pool on a device that nobody has open; nothing is written. Without a key, all keys at hand are tried.
    ///
    /// # Errors
    /// As [`Pools::open`].
    pub fn audit(
        &self,
        bdev: &str,
        key: Try<'_>,
        data: bool,
    ) -> Result<Option<(PoolInfo, CheckReport)>, RpcError> {
        let Some(sealed) = self.manager.peek(bdev)? else { return Ok(None) };
        self.check_mode(&sealed)?;
        let (_, kek) = self.find_key(&sealed, key).map_err(|refusal| refusal.error)?;
        Ok(self.manager.audit(bdev, &KeySource::Kek(Box::new(kek)), data)?)
    }

    /// The key among those to be tried that opens a slot.
    fn find_key(&self, sealed: &SealedPool, key: Try<'_>) -> Result<(PoolKey, SlotKey), Refusal> {
        let keys = match key {
            Try::Key(key) => vec![key],
            Try::All => self.at_hand(),
            Try::Password(password) => {
                return match self.password_key(sealed, password) {
                    Ok(kek) => Ok((PoolKey::Given, kek)),
                    Err(error) => Err(Refusal { error, waiting: false }),
                };
            }
        };
        let all = keys.len() > 1;
        let mut refused: Option<Refusal> = None;
        for key in keys {
            match self.try_key(sealed, &key) {
                Ok(Some(kek)) => return Ok((key, kek)),
                Ok(None) => {}
                // A key server's silence says more than a file that does not fit.
                Err(r) if r.waiting || refused.is_none() => refused = Some(r),
                Err(_) => {}
            }
        }
        let none = || {
            let device = sealed.base_bdev.clone();
            let error = match all {
                true => RpcError::new(-126, format!("no key at hand opens the pool on {device}")),
                false => PoolError::WrongKey { device }.into(),
            };
            Refusal { error, waiting: false }
        };
        Err(refused.unwrap_or_else(none))
    }

    /// The key-encryption key of the slot that a password opens.
    fn password_key(&self, sealed: &SealedPool, password: &Password) -> Result<SlotKey, RpcError> {
        let limits = self.fips.limits();
        let (_, kek, _) = cryptfold_keystore::find(&sealed.keys, password, &limits)?;
        Ok(slot_key(kek, SlotKind::Password, "password"))
    }

    /// Before keys are tried: in a FIPS mode, whether the pool is one of those that it opens.
    fn check_mode(&self, sealed: &SealedPool) -> Result<(), RpcError> {
        if self.fips.is_on() && !sealed.approved {
            let device = sealed.base_bdev.clone();
            let refused = PoolError::NotApproved { device };
            tracing::warn!(target: AUDIT, event = "pool not opened", pool = sealed.name, bdev = sealed.base_bdev, reason = %refused);
            return Err(refused.into());
        }
        Ok(())
    }

    /// The key-encryption key of one of the ways, if it opens a slot.
    fn try_key(&self, sealed: &SealedPool, key: &PoolKey) -> Result<Option<SlotKey>, Refusal> {
        let now = |error: RpcError| Refusal { error, waiting: false };
        let fits = |key: SlotKey| sealed.keys.unlock(&key.kek).is_ok().then_some(key);
        match key {
            PoolKey::Given => Ok(None),
            PoolKey::None => Ok(fits(slot_key(Kek::open(), SlotKind::Open, ""))),
            PoolKey::File(path) => {
                Ok(fits(slot_key(kek_of_file(path).map_err(now)?, SlotKind::KeyFile, &file_label(path))))
            }
            PoolKey::PasswordFile(path) => {
                let password = read_password(path).map_err(|e| now(e.into()))?;
                self.password_key(sealed, &password).map(Some).map_err(now)
            }
            PoolKey::Kms => {
                let mut refused = None;
                for slot in sealed.keys.slots.iter().flatten().filter(|s| s.kind == SlotKind::Kms) {
                    match self.kms.kek(&slot.reference) {
                        Ok((server, kek)) => {
                            let key = slot_key(kek, SlotKind::Kms, &server);
                            if let Some(key) = fits(key) {
                                return Ok(Some(key));
                            }
                            let what = format!(
                                "key \"{}\" of key server \"{server}\" is another one than before",
                                slot.reference
                            );
                            refused = Some(now(KekError::Refused(what).into()));
                        }
                        Err(e) => {
                            let waiting = matches!(e, KekError::NoAnswer(_));
                            refused = Some(Refusal { error: e.into(), waiting });
                        }
                    }
                }
                refused.map_or(Ok(None), Err)
            }
        }
    }

    /// What a device may be tried with.
    fn at_hand(&self) -> Vec<PoolKey> {
        let mut keys = vec![PoolKey::None];
        keys.extend(lock(&self.keys).values().filter(|k| matches!(k, PoolKey::File(_))).cloned());
        keys.extend(files_in(Some(&self.key_dir), "key").into_iter().map(PoolKey::File));
        keys.extend(credentials("key").into_iter().map(PoolKey::File));
        // These take time.
        keys.push(PoolKey::Kms);
        keys.extend(credentials("password").into_iter().map(PoolKey::PasswordFile));
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

    /// A key file has another name now, for all pools but one.
    pub fn key_file_moved(&self, from: &Path, to: &Path, but: Uuid) {
        for (_, key) in lock(&self.keys).iter_mut().filter(|(uuid, _)| **uuid != but) {
            if matches!(key, PoolKey::File(path) if path.canonicalize().is_ok_and(|p| p == from)) {
                *key = PoolKey::File(to.into());
            }
        }
    }

    /// Forgets the key of a pool that is gone.
    pub fn forget(&self, uuid: Uuid) {
        lock(&self.keys).remove(&uuid);
    }

    /// The call that opens the pool on a device again, or lists it as locked.
    pub fn config(&self, base: &str) -> Option<(String, Value)> {
        let mut params = json!({"base_bdev_name": base});
        let budget = match self.manager.list().into_iter().find(|p| p.base_bdev == base) {
            Some(info) => {
                match lock(&self.keys).get(&info.uuid) {
                    Some(PoolKey::File(path)) => params["key_file"] = json!(path),
                    Some(PoolKey::PasswordFile(path)) => params["password_file"] = json!(path),
                    Some(PoolKey::None) => params["encrypt"] = false.into(),
                    Some(PoolKey::Given) => params["startup"] = "locked".into(),
                    Some(PoolKey::Kms) | None => {}
                }
                Some(info.memory_budget_bytes)
            }
            None => {
                let locked = self.find_locked(base).filter(|l| l.pool.base_bdev == base)?;
                if !locked.waiting {
                    params["startup"] = "locked".into();
                }
                locked.memory_budget
            }
        };
        if let Some(bytes) = budget {
            params["memory_budget_mib"] = (bytes >> 20).into();
        }
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

/// 32 random bytes.
pub fn salt() -> [u8; 32] {
    let mut salt = [0; 32];
    cryptfold_reactor::fill_random(&mut salt);
    salt
}

impl From<StoreError> for RpcError {
    fn from(e: StoreError) -> RpcError {
        let code = match &e {
            StoreError::Password(_) | StoreError::Slot(_) | StoreError::Last(_) => {
                return RpcError::params(e);
            }
            StoreError::NoPasswordSlot | StoreError::WrongPassword | StoreError::Key(_) => -126,
            StoreError::Full(_) => RpcError::ENOSPC,
            StoreError::Empty(_) => RpcError::ENOENT,
        };
        RpcError::new(code, e.to_string())
    }
}

/// Makes a key file unless it exists; true when it was made.
pub fn make_key(path: &Path) -> Result<bool, RpcError> {
    if path.exists() {
        return Ok(false);
    }
    write_key_file(path, hex_line(&random_key(KEK_BYTES)).as_bytes())?;
    Ok(true)
}

#[cfg(test)]
mod tests;
