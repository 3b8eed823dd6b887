//! All pools of a process, for ordinary threads.
//!
//! Owns the list of open pools. Calls block until the pool's home reactor has done the work; never call them on a
//! reactor. A pool's volumes are in the registry while it is open. A pool whose device is to go away is closed by a thread of its
//! own, because a device goes only when nobody has it open.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use cryptfold_bdev::{Access, BdevError, Registry, Removal};
use cryptfold_reactor::Handle;
use cryptfold_reduce_format::block::Block;
use cryptfold_reduce_format::codec::Compression;
use cryptfold_reduce_format::keys::{Kek, PoolKey};
use cryptfold_reduce_format::record::volume_flags;
use cryptfold_reduce_format::slots::{Kdf, KeyBlock, SlotKind};
use uuid::Uuid;

use crate::error::PoolError;
use crate::info::{
    AsSent, CheckReport, CreateOptions, DomainInfo, ErasedDomain, ErasedPool, KeyChange, KeySource, LateInfo,
    LostPool, PoolEvent, PoolInfo, RenewalInfo, ScrubInfo, SealedPool, SlotKey, VolumeInfo, VolumeOptions,
};
use crate::local::LocalPool;
use crate::open::{self, Claim, Making, Opening};
use crate::pool::{Listener, Pool, PoolRef};
use crate::volume::VolumeDevice;

/// How long a device may take to drain before a removal is given up.
const DRAIN: Duration = Duration::from_secs(30);

/// All pools of a process. See the module's head.
pub struct PoolManager {
    me: Weak<PoolManager>,
    registry: Arc<Registry>,
    homes: Vec<Handle>,
    next_home: AtomicUsize,
    pools: Mutex<Vec<PoolRef>>,
    lost: Mutex<Vec<LostPool>>,
    /// Opening and closing go one after the other.
    serial: Mutex<()>,
    /// So do changes of key slots.
    slots: Mutex<()>,
    /// Who wants to know what happens to pools.
    listener: OnceLock<Listener>,
    /// Pools are those of the FIPS modes, and no others.
    approved: AtomicBool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn drained(uuid: &Uuid, removal: &Removal) -> Result<(), PoolError> {
    if removal.wait(DRAIN) {
        return Ok(());
    }
    Err(PoolError::Busy(format!("volume {uuid} is still in use after {} s", DRAIN.as_secs())))
}

/// As much of a label as a slot holds.
fn short(label: &str) -> String {
    let mut label = label.to_owned();
    while label.len() > 48 {
        label.pop();
    }
    label
}

/// The key-encryption key of a source, for the pool on `device`, and what its slot says.
pub(crate) fn slot_key(source: &KeySource, device: &str) -> Result<SlotKey, PoolError> {
    let bad = |reason| PoolError::Key { device: device.to_owned(), reason };
    let plain = |kek, kind, label: &str| SlotKey {
        kek,
        kind,
        kdf: Kdf::None,
        label: short(label),
        reference: String::new(),
    };
    match source {
        KeySource::Open => Ok(plain(Kek::open(), SlotKind::Open, "no encryption")),
        KeySource::Bytes(bytes) => Ok(plain(Kek::from_file(bytes).map_err(bad)?, SlotKind::KeyFile, "")),
        KeySource::File(path) => {
            let mut content = std::fs::read(path)
                .map_err(|error| PoolError::KeyFile { path: path.clone(), reason: error.to_string() })?;
            let kek = Kek::from_file(&content).map_err(bad);
            content.fill(0);
            let label = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            Ok(plain(kek?, SlotKind::KeyFile, &label))
        }
        KeySource::Kek(key) => Ok(SlotKey::clone(key)),
    }
}

impl PoolManager {
    /// A manager without pools. Pools are spread over `homes` (at least one).
    pub fn new(registry: Arc<Registry>, homes: Vec<Handle>) -> Arc<PoolManager> {
        Arc::new_cyclic(|me| PoolManager {
            me: me.clone(),
            registry,
            homes,
            next_home: AtomicUsize::new(0),
            pools: Mutex::default(),
            lost: Mutex::default(),
            serial: Mutex::default(),
            slots: Mutex::default(),
            listener: OnceLock::new(),
            approved: AtomicBool::new(false),
        })
    }

    /// From now on tells of what happens to pools that are opened later: the pool's name and what. `listener` is called on reactors,
    /// and must not wait. Once; later ones are ignored.
    pub fn listen(&self, listener: impl Fn(&str, PoolEvent) + Send + Sync + 'static) {
        let ignored = self.listener.set(Arc::new(listener));
        debug_assert!(ignored.is_ok(), "there is one listener");
    }

    /// The pools that were closed because their devices went away, and have not come back since.
    pub fn lost(&self) -> Vec<LostPool> {
        locked(&self.lost).clone()
    }

    /// Takes a lost pool (by name or UUID) off that list; false if it is not there.
    pub fn forget_lost(&self, name: &str) -> bool {
        let uuid = Uuid::parse_str(name).ok();
        let mut lost = locked(&self.lost);
        let before = lost.len();
        lost.retain(|pool| pool.name != name && Some(pool.uuid) != uuid);
        lost.len() < before
    }

    fn add(&self, pool: PoolRef) {
        if let Some(listener) = self.listener.get() {
            pool.listener.get_or_init(|| listener.clone());
        }
        locked(&self.pools).push(pool);
    }

    fn home(&self) -> Result<Handle, PoolError> {
        let n = self.next_home.fetch_add(1, Ordering::Relaxed);
        self.homes.get(n % self.homes.len().max(1)).cloned().ok_or(PoolError::NoReactor)
    }

    fn find(&self, name: &str) -> Result<PoolRef, PoolError> {
        let uuid = Uuid::parse_str(name).ok();
        let pools = locked(&self.pools);
        let found = pools.iter().find(|p| p.name() == name || uuid == Some(p.uuid));
        found.cloned().ok_or_else(|| PoolError::NoPool(name.to_owned()))
    }

    /// From now on pools are made with the algorithms that FIPS 140-3 approves, and others are not opened.
    pub fn require_approved(&self) {
        self.approved.store(true, Ordering::Relaxed);
    }

    fn is_approved(&self) -> bool {
        self.approved.load(Ordering::Relaxed)
    }

    /// Opens and claims a base device for a pool of this manager.
    fn claim(&self, base_bdev: &str) -> Result<Claim, PoolError> {
        let me = self.me.clone();
        open::claim_for(&self.registry, base_bdev, Access::ReadWrite, move || {
            let me = me.clone();
            let closing = move || {
                if let Some(manager) = me.upgrade() {
                    manager.close_removed();
                }
            };
            if let Err(error) = std::thread::Builder::new().name("pool_close".into()).spawn(closing) {
                tracing::error!(%error, "no thread to close a pool whose device goes away: close it");
            }
        })
    }

    /// Closes the pools whose devices are to go away, also one that is just being opened. Waits for the users of their volumes.
    fn close_removed(&self) {
        let losing: Vec<PoolRef> = {
            let _one = locked(&self.serial);
            locked(&self.pools).iter().filter(|pool| pool.loses_device()).cloned().collect()
        };
        for pool in losing {
            // Other pools are not held up while this one's volumes drain.
            while let Err(error @ PoolError::Busy(_)) = self.unregister_volumes(&pool) {
                tracing::warn!(pool = %pool.name(), %error, "its device is gone");
            }
            {
                let _one = locked(&self.serial);
                let mut pools = locked(&self.pools);
                let Some(at) = pools.iter().position(|other| other.id == pool.id) else { continue };
                pools.remove(at);
                let (name, uuid, base_bdev) = (pool.name(), pool.uuid, pool.base_name.clone());
                locked(&self.lost).push(LostPool { name, uuid, base_bdev });
            }
            // Its device may never answer: nobody else waits for that, and it stays claimed until then.
            if let Err(error) = self.on_home(&pool, |pool| async move { pool.close().await }) {
                tracing::error!(pool = %pool.name(), %error, "not closed in order: its device is gone");
            }
            pool.tell(PoolEvent::Closed);
        }
    }

    /// Runs `f` with the pool on its home reactor.
    fn on_home<F, Fut, T>(&self, pool: &PoolRef, f: F) -> Result<T, PoolError>
    where
        F: FnOnce(std::rc::Rc<Pool>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, PoolError>> + 'static,
        T: Send + 'static,
    {
        let reference = pool.clone();
        let result = pool.home.block_on(move || async move {
            match reference.get() {
                Some(pool) => f(pool).await,
                None => Err(PoolError::NoPool(reference.name())),
            }
        });
        result.map_err(|_| PoolError::NoReactor)?
    }

    /// Makes a pool on a bdev and opens it.
    ///
    /// # Errors
    /// The device is too small, in use, or carries something else and `force` is not set; the name is taken; the key can
    /// not be used. Nothing is written then.
    pub fn create(
        &self,
        base_bdev: &str,
        name: &str,
        options: &CreateOptions,
    ) -> Result<PoolInfo, PoolError> {
        let _one = locked(&self.serial);
        if locked(&self.pools).iter().any(|pool| pool.name() == name) {
            return Err(PoolError::PoolExists(name.to_owned()));
        }
        let key = slot_key(&options.key, base_bdev)?;
        if options.memory_budget.is_some_and(|budget| budget < open::MIN_MEMORY_BYTES) {
            return Err(PoolError::Invalid(format!(
                "memory_budget is at least {} bytes",
                open::MIN_MEMORY_BYTES
            )));
        }
        let claim = self.claim(base_bdev)?;
        let approved = options.approved || self.is_approved();
        let making = Making {
            name: name.to_owned(),
            force: options.force,
            segment_bytes: options.segment_bytes,
            first_format: options.first_format,
            approved,
        };
        let opening = Opening { memory_bytes: options.memory_budget, approved, ..Opening::default() };
        let (compression, durable) = (options.compression, options.durable);
        let opened = self.home()?.block_on(move || async move {
            open::create(&claim, &making, &key).await?;
            let Some(pool) = open::open(&claim, &key.kek, &opening).await? else {
                return Err(PoolError::NoPool(making.name));
            };
            open::furnish(&pool, compression, durable).await?;
            Ok((pool.handle.clone(), pool.info()))
        });
        let (reference, info) = opened.map_err(|_| PoolError::NoReactor)??;
        self.add(reference);
        Ok(info)
    }

    /// Opens the pool on a bdev and registers its volumes. `Ok(None)`: there is no pool on it.
    ///
    /// # Errors
    /// The pool is open elsewhere, the key does not fit, it is damaged or of another version; nothing is written then.
    pub fn open(
        &self,
        base_bdev: &str,
        key: &KeySource,
        memory_budget: Option<u64>,
    ) -> Result<Option<PoolInfo>, PoolError> {
        let _one = locked(&self.serial);
        let kek = slot_key(key, base_bdev)?.kek;
        let claim = self.claim(base_bdev)?;
        let opening =
            Opening { memory_bytes: memory_budget, approved: self.is_approved(), ..Opening::default() };
        let taken: Vec<String> = locked(&self.pools).iter().map(PoolRef::name).collect();
        let opened = self.home()?.block_on(move || async move {
            let Some(pool) = open::open(&claim, &kek, &opening).await? else { return Ok(None) };
            let name = pool.name();
            if taken.contains(&name) {
                pool.close().await?;
                return Err(PoolError::PoolExists(name));
            }
            let volumes = pool.live_volumes();
            let mut devices = Vec::new();
            devices.extend(volumes.into_iter().filter_map(|id| pool.device(id)));
            Ok(Some((pool.handle.clone(), pool.info(), devices)))
        });
        let Some((reference, info, devices)) = opened.map_err(|_| PoolError::NoReactor)?? else {
            return Ok(None);
        };
        locked(&self.lost).retain(|lost| lost.uuid != info.uuid);
        self.add(reference.clone());
        for device in devices {
            if let Err(error) = self.registry.register(device) {
                // The others are served; this one answers to whoever has taken its name.
                tracing::error!(pool = %reference.name(), %error, "a volume can not be registered");
            }
        }
        Ok(Some(info))
    }

    /// What a device shows of the pool on it without a key. `Ok(None)`: there is no pool on it.
    ///
    /// # Errors
    /// The pool was erased, is damaged or of another version.
    pub fn peek(&self, base_bdev: &str) -> Result<Option<SealedPool>, PoolError> {
        let (registry, name) = (self.registry.clone(), base_bdev.to_owned());
        let peeked = self.home()?.block_on(move || async move { LocalPool::peek(&registry, &name).await });
        peeked.map_err(|_| PoolError::NoReactor)?
    }

    /// The key slots of an open pool.
    ///
    /// # Errors
    /// There is no such pool.
    pub fn key_block(&self, pool: &str) -> Result<KeyBlock, PoolError> {
        self.on_home(&self.find(pool)?, |pool| async move { Ok(pool.key_block.borrow().clone()) })
    }

    /// Changes the key slots of an open pool: `change` gets them and the pool key on this thread (it may take long), then all
    /// copies are written, flushed and read back.
    ///
    /// # Errors
    /// What `change` says, and nothing is changed then; there is no such pool; its device fails, and then the change may have
    /// been made.
    pub fn change_keys<T, E: From<PoolError>>(
        &self,
        pool: &str,
        change: impl FnOnce(&mut KeyBlock, &PoolKey) -> Result<T, E>,
    ) -> Result<T, E> {
        let _one = locked(&self.slots);
        let reference = self.find(pool)?;
        let (mut block, key) = self.on_home(&reference, |pool| async move {
            Ok((pool.key_block.borrow().clone(), pool.pool_key.clone()))
        })?;
        let done = change(&mut block, &key)?;
        self.on_home(&reference, move |pool| async move { pool.change_slots(block.slots).await })?;
        Ok(done)
    }

    /// Key block and superblock of an open pool, for a back-up.
    ///
    /// # Errors
    /// There is no such pool.
    pub fn backup(&self, pool: &str) -> Result<(KeyBlock, Box<Block>), PoolError> {
        self.on_home(&self.find(pool)?, |pool| async move { pool.backup() })
    }

    /// Brings the key slots of a back-up to the device of a pool that nobody has open; `kek` opens one of them. The superblock
    /// (encoded for the device's beginning) comes back only if no copy of it is left; whether it did. Slots that are there are
    /// replaced only with `force`, and their erasure secrets never.
    ///
    /// # Errors
    /// The key does not fit, the device carries another pool or slots that are in order, the pool is open elsewhere.
    pub fn restore(
        &self,
        base_bdev: &str,
        backup: &KeyBlock,
        superblock: &Block,
        kek: &Kek,
        force: bool,
    ) -> Result<bool, PoolError> {
        let _one = locked(&self.serial);
        let (registry, name) = (self.registry.clone(), base_bdev.to_owned());
        let (backup, superblock, kek) = (backup.clone(), Box::new(*superblock), kek.clone());
        let restored = self.home()?.block_on(move || async move {
            LocalPool::restore(&registry, &name, &backup, &superblock, &kek, force).await
        });
        restored.map_err(|_| PoolError::NoReactor)?
    }

    /// Audits the pool on a bdev that nobody has open, without writing to it: its journal is replayed in RAM. `Ok(None)`:
    /// there is no pool on it.
    ///
    /// # Errors
    /// As [`PoolManager::open`]; nothing is written in any case.
    pub fn audit(
        &self,
        base_bdev: &str,
        key: &KeySource,
        data: bool,
    ) -> Result<Option<(PoolInfo, CheckReport)>, PoolError> {
        let (registry, base, key) = (self.registry.clone(), base_bdev.to_owned(), key.clone());
        let audited = self
            .home()?
            .block_on(move || async move { LocalPool::audit(&registry, &base, &key, data).await });
        audited.map_err(|_| PoolError::NoReactor)?
    }

    /// Takes the pool's volumes out of the registry; they are drained. Those that are being removed already are waited for.
    fn unregister_volumes(&self, pool: &PoolRef) -> Result<(), PoolError> {
        let volumes = self.on_home(pool, |pool| async move { Ok(pool.volume_infos()) })?;
        for VolumeInfo { uuid, .. } in volumes {
            match self.unregister(&uuid) {
                Err(PoolError::Bdev(BdevError::Removing(_))) => {
                    let bdev = self.registry.get(&uuid.to_string()).ok();
                    bdev.and_then(|bdev| bdev.removal())
                        .map_or(Ok(()), |removal| drained(&uuid, &removal))?;
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn unregister(&self, uuid: &Uuid) -> Result<(), PoolError> {
        match self.registry.unregister(&uuid.to_string()) {
            Ok(removal) => drained(uuid, &removal),
            Err(BdevError::NotFound(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Drains and unregisters the pool's volumes, makes everything durable and lets go of the device.
    ///
    /// # Errors
    /// A volume stays in use; the device fails.
    pub fn close(&self, name: &str) -> Result<(), PoolError> {
        let _one = locked(&self.serial);
        let pool = self.find(name)?;
        self.close_ref(&pool)
    }

    fn close_ref(&self, pool: &PoolRef) -> Result<(), PoolError> {
        self.retire(pool, |pool| async move { pool.close().await })
    }

    /// Drains the pool's volumes, takes it off the list and lets `end` close it on its home.
    fn retire<F, Fut, T>(&self, pool: &PoolRef, end: F) -> Result<T, PoolError>
    where
        F: FnOnce(std::rc::Rc<Pool>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, PoolError>> + 'static,
        T: Send + 'static,
    {
        self.unregister_volumes(pool)?;
        locked(&self.pools).retain(|other| other.id != pool.id);
        self.on_home(pool, end)
    }

    /// Closes the pool and makes its device forget it.
    ///
    /// # Errors
    /// As [`PoolManager::close`].
    pub fn destroy(&self, name: &str) -> Result<(), PoolError> {
        let _one = locked(&self.serial);
        self.retire(&self.find(name)?, |pool| async move {
            pool.close().await?;
            pool.wipe().await
        })
    }

    /// Closes the pool and overwrites what opens it: its key slots and the superblocks. Nothing on its device can be read afterwards.
    ///
    /// # Errors
    /// As [`PoolManager::close`]; a domain is or was stored without encryption; the device fails or does not show what was written: then the pool is whole, or gone, and may be
    /// erased again while it opens.
    pub fn erase(&self, name: &str) -> Result<ErasedPool, PoolError> {
        let _one = locked(&self.serial);
        let pool = self.find(name)?;
        self.on_home(&pool, |pool| async move { pool.check_encrypted(None) })?;
        self.retire(&pool, |pool| async move {
            pool.close().await?;
            pool.erase_pool().await
        })
    }

    /// Erases a domain with all its volumes and snapshots, whatever they hold: the secret through which its keys are wrapped is
    /// replaced and overwritten; see the head of `erase`. The default domain gets an empty successor.
    ///
    /// # Errors
    /// There is no such domain, or it is or was stored without encryption; a volume of it stays in use; the pool's first format has no such secret; the device fails: then the
    /// domain is whole or gone, and the next opening finishes what was begun.
    pub fn erase_domain(&self, pool: &str, domain: &str) -> Result<ErasedDomain, PoolError> {
        let _one = locked(&self.serial);
        let _slots = locked(&self.slots);
        let reference = self.find(pool)?;
        let wanted = domain.to_owned();
        let (id, volumes) = self.on_home(&reference, move |pool| async move {
            let id = pool.find_domain(&wanted)?;
            pool.check_erasable()?;
            pool.check_encrypted(Some(id))?;
            let infos = pool.volume_infos();
            let name = pool.shard.borrow().domain(id).map(|d| d.record.name.clone()).unwrap_or_default();
            Ok((id, infos.into_iter().filter(|v| v.domain == name).collect::<Vec<_>>()))
        })?;
        let unused = volumes.iter().try_for_each(|volume| self.unregister(&volume.uuid));
        let erased = unused
            .and_then(|()| self.on_home(&reference, move |pool| async move { pool.erase_domain(id).await }));
        if erased.is_err() {
            for volume in volumes {
                // Those that are still there are served again.
                let _ = self.reregister(&reference, volume.id);
            }
        }
        erased
    }

    /// Changes the pool's name, and the aliases of its volumes with it; whoever has them open keeps them.
    ///
    /// # Errors
    /// The new name is taken or not possible.
    pub fn rename(&self, name: &str, new_name: &str) -> Result<(), PoolError> {
        let _one = locked(&self.serial);
        let pool = self.find(name)?;
        if new_name.is_empty() || new_name.len() > 64 || new_name.chars().any(|c| c.is_control() || c == '/')
        {
            return Err(PoolError::Invalid(format!(
                "a pool's name has 1 to 64 bytes without '/' and control characters, not {new_name:?}"
            )));
        }
        if locked(&self.pools).iter().any(|other| other.name() == new_name) {
            return Err(PoolError::PoolExists(new_name.to_owned()));
        }
        let renamed = new_name.to_owned();
        self.on_home(&pool, move |pool| async move { pool.rename(&renamed).await })?;
        new_name.clone_into(&mut locked(&pool.name));
        for volume in self.volumes(new_name)? {
            let aliases = vec![format!("{new_name}/{}", volume.name)];
            if let Err(error) = self.registry.set_aliases(&volume.uuid.to_string(), aliases) {
                // It keeps its old alias until the pool is opened again.
                tracing::error!(pool = new_name, volume = volume.name, %error, "a volume's alias can not be changed");
            }
        }
        Ok(())
    }

    fn check_unused(&self, volumes: &[VolumeInfo]) -> Result<(), PoolError> {
        for volume in volumes {
            if let Ok(bdev) = self.registry.get(&volume.uuid.to_string())
                && let Some(by) = bdev.claimed_by()
            {
                return Err(PoolError::Busy(format!(
                    "volume {}/{} is claimed by {by}",
                    volume.pool, volume.name
                )));
            }
        }
        Ok(())
    }

    /// All open pools.
    pub fn list(&self) -> Vec<PoolInfo> {
        let pools = locked(&self.pools).clone();
        pools
            .iter()
            .filter_map(|pool| self.on_home(pool, |pool| async move { Ok(pool.info()) }).ok())
            .collect()
    }

    /// One open pool, by name or UUID.
    ///
    /// # Errors
    /// There is none.
    pub fn info(&self, name: &str) -> Result<PoolInfo, PoolError> {
        self.on_home(&self.find(name)?, |pool| async move { Ok(pool.info()) })
    }

    /// Makes a volume and registers its bdev: named by its UUID, alias `POOL/NAME`.
    ///
    /// # Errors
    /// The name is taken, a parameter is not possible, the domain does not exist.
    pub fn create_volume(&self, pool: &str, options: &VolumeOptions) -> Result<VolumeInfo, PoolError> {
        let reference = self.find(pool)?;
        let options = options.clone();
        let (info, device) =
            self.on_home(&reference, move |pool| async move { pool.create_volume(&options).await })?;
        if let Err(error) = self.registry.register(device) {
            let id = info.id;
            self.on_home(&reference, move |pool| async move { pool.delete_volume(id).await })?;
            return Err(error.into());
        }
        Ok(info)
    }

    /// Deletes a volume (by name or UUID). Its space comes back in the background.
    ///
    /// # Errors
    /// There is none, or it is in use.
    pub fn delete_volume(&self, pool: &str, volume: &str) -> Result<(), PoolError> {
        let reference = self.find(pool)?;
        let info = self.volume(pool, volume)?;
        let id = info.id;
        self.on_home(&reference, move |pool| async move { pool.check_deletable(id) })?;
        self.check_unused(std::slice::from_ref(&info))?;
        self.unregister(&info.uuid)?;
        let deleted = self.on_home(&reference, move |pool| async move { pool.delete_volume(id).await });
        if deleted.is_err() {
            // A clone may have come in between.
            self.reregister(&reference, id)?;
        }
        deleted
    }

    /// Takes a snapshot of a volume and registers its bdev (read-only). Takes the same time whatever the volume has.
    ///
    /// # Errors
    /// There is none, or it is read-only; the name is taken or not possible.
    pub fn snapshot_volume(&self, pool: &str, volume: &str, name: &str) -> Result<VolumeInfo, PoolError> {
        let (id, name) = (self.volume(pool, volume)?.id, name.to_owned());
        self.derive(pool, move |pool| async move { pool.snapshot_volume(id, &name).await })
    }

    /// Makes a volume with what a snapshot (or read-only volume) has, and registers its bdev.
    ///
    /// # Errors
    /// There is none, or it is writable; the name is taken or not possible.
    pub fn clone_volume(&self, pool: &str, snapshot: &str, name: &str) -> Result<VolumeInfo, PoolError> {
        let (id, name) = (self.volume(pool, snapshot)?.id, name.to_owned());
        self.derive(pool, move |pool| async move { pool.clone_volume(id, &name).await })
    }

    fn derive<F, Fut>(&self, pool: &str, make: F) -> Result<VolumeInfo, PoolError>
    where
        F: FnOnce(std::rc::Rc<Pool>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<(VolumeInfo, Arc<VolumeDevice>), PoolError>> + 'static,
    {
        let reference = self.find(pool)?;
        let (info, device) = self.on_home(&reference, make)?;
        if let Err(error) = self.registry.register(device) {
            let id = info.id;
            self.on_home(&reference, move |pool| async move { pool.delete_volume(id).await })?;
            return Err(error.into());
        }
        Ok(info)
    }

    /// Gives a volume a map of its own: it shares nothing with its snapshots and depends on no other volume any more. Returns
    /// when that is so. With `parent_only` only what ties it to the snapshot that it goes on from.
    ///
    /// # Errors
    /// There is none, or it is read-only; with `parent_only`: it goes on from none. What is done stays when it stops half-way.
    pub fn own_volume(&self, pool: &str, volume: &str, parent_only: bool) -> Result<VolumeInfo, PoolError> {
        let info = self.volume(pool, volume)?;
        let id = info.id;
        let owned = self
            .on_home(&self.find(pool)?, move |pool| async move { pool.own_volume(id, parent_only).await });
        owned?;
        self.volume(pool, &info.uuid.to_string())
    }

    /// Changes a volume's size (rounded up to 4 KiB). What lies beyond a smaller size is lost.
    ///
    /// # Errors
    /// There is none, or the size is not possible.
    pub fn resize_volume(&self, pool: &str, volume: &str, size_bytes: u64) -> Result<VolumeInfo, PoolError> {
        let reference = self.find(pool)?;
        let before = self.volume(pool, volume)?;
        let bdev = self.registry.get(&before.uuid.to_string())?;
        let per_chunk = u64::from(4096 / before.block_size);
        let blocks = size_bytes.div_ceil(4096) * per_chunk;
        if blocks > 0 && size_bytes < before.size_bytes {
            // Hosts first: nothing may be written behind the new end while it is given up.
            bdev.set_blocks(blocks);
        }
        let id = before.id;
        let done =
            self.on_home(&reference, move |pool| async move { pool.resize_volume(id, size_bytes).await });
        match done {
            Ok(chunks) => bdev.set_blocks(chunks * per_chunk),
            Err(_) => bdev.set_blocks(before.size_bytes / u64::from(before.block_size)),
        }
        done?;
        self.volume(pool, &before.uuid.to_string())
    }

    /// Changes a volume's name, and its alias with it; whoever has it open keeps it.
    ///
    /// # Errors
    /// The name is taken or not possible.
    pub fn rename_volume(&self, pool: &str, volume: &str, new_name: &str) -> Result<VolumeInfo, PoolError> {
        let reference = self.find(pool)?;
        let info = self.volume(pool, volume)?;
        if info.name == new_name {
            return Ok(info);
        }
        let uuid = info.uuid.to_string();
        let rename = |name: &str| {
            let (id, name) = (info.id, name.to_owned());
            self.on_home(&reference, move |pool| async move { pool.rename_volume(id, &name).await })
        };
        rename(new_name)?;
        if let Err(error) = self.registry.set_aliases(&uuid, vec![format!("{}/{new_name}", info.pool)]) {
            // Another kind of device has it.
            rename(&info.name)?;
            return Err(error.into());
        }
        self.volume(pool, &uuid)
    }

    /// Makes a volume read-only or writable again, also while it is open. Writes under way are done or refused.
    ///
    /// # Errors
    /// There is none; it is a snapshot or has clones and has to stay read-only.
    pub fn set_read_only(&self, pool: &str, volume: &str, read_only: bool) -> Result<VolumeInfo, PoolError> {
        let reference = self.find(pool)?;
        let info = self.volume(pool, volume)?;
        let bdev = self.registry.get(&info.uuid.to_string())?;
        let id = info.id;
        let (set, clear) =
            if read_only { (volume_flags::READ_ONLY, 0) } else { (0, volume_flags::READ_ONLY) };
        self.on_home(&reference, move |pool| async move { pool.flag_volume(id, set, clear).await })?;
        bdev.set_read_only(read_only);
        self.volume(pool, &info.uuid.to_string())
    }

    /// Records which key the host has encrypted a volume with (none: it is stored as it comes), durably, if nothing is stored in
    /// it from byte `from` on. Whether it was. Snapshots and clones inherit the record; theirs does not change. Nobody may
    /// write there meanwhile.
    ///
    /// # Errors
    /// There is no such volume; the record is empty or too long; the pool takes no writes.
    pub fn set_host_key(
        &self,
        pool: &str,
        volume: &str,
        from: u64,
        record: Option<Vec<u8>>,
    ) -> Result<bool, PoolError> {
        let id = self.volume(pool, volume)?.id;
        self.on_home(&self.find(pool)?, move |pool| async move { pool.set_host_key(id, from, record).await })
    }

    /// Whether nothing is stored in a volume from byte `from` on. Snapshots and clones are never empty.
    ///
    /// # Errors
    /// There is no such volume; the pool's device fails.
    pub fn is_empty_behind(&self, pool: &str, volume: &str, from: u64) -> Result<bool, PoolError> {
        let id = self.volume(pool, volume)?.id;
        self.on_home(&self.find(pool)?, move |pool| async move { pool.is_empty_behind(id, from).await })
    }

    /// Whether so little space is free that the collector works, which is before hosts have to wait: nobody else should take any.
    ///
    /// # Errors
    /// There is no such pool.
    pub fn is_short(&self, pool: &str) -> Result<bool, PoolError> {
        self.on_home(&self.find(pool)?, move |pool| async move { Ok(pool.is_short()) })
    }

    /// Where data lies in a volume that was stored as the host had sent it, in some blocks from block `from` (of 4 KiB) on.
    ///
    /// # Errors
    /// There is no such volume; the pool's device fails.
    pub fn as_sent(&self, pool: &str, volume: &str, from: u64) -> Result<AsSent, PoolError> {
        let id = self.volume(pool, volume)?.id;
        self.on_home(&self.find(pool)?, move |pool| async move { pool.as_sent(id, from).await })
    }

    fn reregister(
        &self,
        pool: &PoolRef,
        id: cryptfold_reduce_format::ids::VolumeId,
    ) -> Result<(), PoolError> {
        let device = self.on_home(pool, move |pool| async move { Ok(pool.device(id)) })?;
        if let Some(device) = device {
            self.registry.register(device)?;
        }
        Ok(())
    }

    /// The volumes of a pool.
    ///
    /// # Errors
    /// There is no such pool.
    pub fn volumes(&self, pool: &str) -> Result<Vec<VolumeInfo>, PoolError> {
        self.on_home(&self.find(pool)?, |pool| async move { Ok(pool.volume_infos()) })
    }

    /// A volume, by name or UUID.
    ///
    /// # Errors
    /// There is none.
    pub fn volume(&self, pool: &str, volume: &str) -> Result<VolumeInfo, PoolError> {
        let volume = volume.to_owned();
        self.on_home(&self.find(pool)?, move |pool| async move {
            let id = pool.find_volume(&volume)?;
            pool.volume_info(id).ok_or_else(|| PoolError::NoVolume { pool: pool.name(), volume })
        })
    }

    /// Changes the keys of a domain, or of all domains of a pool that this can be done to: what is written from now on is written
    /// with the new ones, what is there is rewritten in the background, at most `bytes_per_s` stored bytes a second, also after
    /// another opening; when nothing is left under the old ones they are destroyed. The domains. [`PoolInfo::renewal`] and
    /// [`DomainInfo::changing`] show how it stands.
    ///
    /// # Errors
    /// There is no such pool or domain; it (or each domain) is being changed already, or is what is asked for; the pool's first
    /// format has no erasure secret; the device fails. Domains before the one that failed have new keys.
    pub fn change_domain_keys(
        &self,
        pool: &str,
        domain: Option<&str>,
        change: KeyChange,
        bytes_per_s: u64,
    ) -> Result<Vec<DomainInfo>, PoolError> {
        // Not while it is erased or closed.
        let _one = locked(&self.serial);
        let domain = domain.map(str::to_owned);
        self.on_home(&self.find(pool)?, move |pool| async move {
            let changed = pool.change_all_keys(domain.as_deref(), change).await;
            // Also when a later domain was refused.
            pool.start_renewal(bytes_per_s).map_err(|status| pool.stopped(status))?;
            changed
        })
    }

    /// Goes on with rewriting data under new keys where that was stopped, or changes its rate.
    ///
    /// # Errors
    /// There is no such pool, or it takes no changes.
    pub fn start_renewal(&self, pool: &str, bytes_per_s: u64) -> Result<RenewalInfo, PoolError> {
        self.on_home(&self.find(pool)?, move |pool| async move {
            pool.start_renewal(bytes_per_s).map_err(|status| PoolError::Stopped { pool: pool.name(), status })
        })
    }

    /// Makes a deduplication domain with keys of its own.
    ///
    /// # Errors
    /// The name is taken or not possible.
    pub fn create_domain(&self, pool: &str, name: &str) -> Result<DomainInfo, PoolError> {
        let name = name.to_owned();
        self.on_home(&self.find(pool)?, move |pool| async move { pool.create_domain(&name).await })
    }

    /// The domains of a pool.
    ///
    /// # Errors
    /// There is no such pool.
    pub fn domains(&self, pool: &str) -> Result<Vec<DomainInfo>, PoolError> {
        self.on_home(&self.find(pool)?, |pool| async move { Ok(pool.domain_infos()) })
    }

    /// Sets the compression of volumes without a setting of their own.
    ///
    /// # Errors
    /// There is no such pool.
    pub fn set_compression(&self, pool: &str, compression: Compression) -> Result<(), PoolError> {
        self.on_home(&self.find(pool)?, move |pool| async move { pool.set_compression(compression).await })
    }

    /// Audits a pool: map, references, segments, counters; with `data` also every fragment and its fingerprints. Changes wait
    /// meanwhile.
    ///
    /// # Errors
    /// There is no such pool, or its device fails.
    pub fn check(&self, pool: &str, data: bool) -> Result<CheckReport, PoolError> {
        self.on_home(&self.find(pool)?, move |pool| async move {
            pool.check(data).await.map_err(|status| PoolError::Stopped { pool: pool.name(), status })
        })
    }

    /// Audits a pool, puts right what can be put right without guessing, and audits again. References, live bytes, counters
    /// and fingerprint lists are made again from what they derive from; blocks whose data is gone become errors; nothing
    /// that can be read is lost. Changes wait meanwhile.
    ///
    /// # Errors
    /// There is no such pool, its device fails, or an upper node of a map is lost.
    pub fn repair(&self, pool: &str, data: bool) -> Result<CheckReport, PoolError> {
        self.on_home(&self.find(pool)?, move |pool| async move {
            pool.repair(data).await.map_err(|status| PoolError::Stopped { pool: pool.name(), status })
        })
    }

    /// Starts to read and verify all stored data in the background, at most `bytes_per_s` stored bytes a second; a scrub that
    /// runs gets this rate. [`PoolInfo::scrub`] shows how it stands.
    ///
    /// # Errors
    /// There is no such pool, or it takes no changes.
    pub fn start_scrub(&self, pool: &str, bytes_per_s: u64) -> Result<ScrubInfo, PoolError> {
        self.on_home(&self.find(pool)?, move |pool| async move {
            pool.start_scrub(bytes_per_s).map_err(|status| PoolError::Stopped { pool: pool.name(), status })
        })
    }

    /// Ends a scrub, if one runs.
    ///
    /// # Errors
    /// There is no such pool.
    pub fn stop_scrub(&self, pool: &str) -> Result<ScrubInfo, PoolError> {
        self.on_home(&self.find(pool)?, |pool| async move { Ok(pool.stop_scrub()) })
    }

    /// Starts to look for duplicates that a sampled index has missed, in the background; starts by itself when enough new data has
    /// been written while the index is sampled. [`PoolInfo::late`] shows how it stands.
    ///
    /// # Errors
    /// There is no such pool, or it takes no changes.
    pub fn start_late(&self, pool: &str) -> Result<LateInfo, PoolError> {
        self.on_home(&self.find(pool)?, move |pool| async move {
            pool.start_late(None).map_err(|status| PoolError::Stopped { pool: pool.name(), status })
        })
    }

    /// Ends late deduplication, if it runs. It goes on where it was when it is started again.
    ///
    /// # Errors
    /// There is no such pool.
    pub fn stop_late(&self, pool: &str) -> Result<LateInfo, PoolError> {
        self.on_home(&self.find(pool)?, |pool| async move { Ok(pool.stop_late()) })
    }

    /// Takes the rest of a base device that has become larger, while hosts go on.
    ///
    /// # Errors
    /// There is no such pool; the device is smaller than it was, or failed.
    pub fn grow(&self, pool: &str) -> Result<PoolInfo, PoolError> {
        self.on_home(&self.find(pool)?, |pool| async move {
            pool.grow().await?;
            Ok(pool.info())
        })
    }

    /// Makes everything durable and writes a checkpoint.
    ///
    /// # Errors
    /// There is no such pool, or its device fails.
    pub fn checkpoint(&self, pool: &str) -> Result<(), PoolError> {
        self.on_home(&self.find(pool)?, move |pool| async move {
            pool.checkpoint().await.map_err(|status| PoolError::Stopped { pool: pool.name(), status })
        })
    }

    /// Closes all pools. Errors are logged: a shutdown goes on.
    pub fn shutdown(&self) {
        let _one = locked(&self.serial);
        let pools = locked(&self.pools).clone();
        for pool in pools {
            if let Err(error) = self.close_ref(&pool) {
                tracing::error!(pool = %pool.name(), %error, "a pool was not closed in order");
            }
        }
    }
}
