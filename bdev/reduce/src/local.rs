//! A pool for callers that are on its reactor themselves: the simulator, and programs of one thread.
//!
//! The same operations as [`crate::PoolManager`]'s, awaited instead of blocking.

use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{Access, BdevError, Registry, Removal, Status};

use cryptfold_reduce_format::block::Block;
use cryptfold_reduce_format::keys::{Kek, PoolKey, WRAPPED_BYTES};
use cryptfold_reduce_format::slots::{KeyBlock, KeySlot, MAX_KEY_SLOTS};

use crate::aged::{Backlog, HeldCheckpoints};
use crate::anchors;
use crate::base::Base;
use crate::damage::{Falsify, Part};
use crate::error::PoolError;
use crate::info::{
    AsSent, CheckReport, CreateOptions, DomainInfo, ErasedDomain, ErasedPool, KeyChange, KeySource, LateInfo,
    PoolInfo, RenewalInfo, ScrubInfo, SealedPool, VolumeInfo, VolumeOptions,
};
use crate::keyslots;
use crate::manager::slot_key;
use crate::open::{self, Making, Opening};
use crate::pool::Pool;
use crate::shard::Volume;

/// An open pool whose home is the current reactor.
#[derive(Clone)]
pub struct LocalPool {
    pool: Rc<Pool>,
    registry: Arc<Registry>,
}

impl LocalPool {
    /// Makes a pool and opens it.
    ///
    /// # Errors
    /// As [`crate::PoolManager::create`].
    pub async fn create(
        registry: &Arc<Registry>,
        base_bdev: &str,
        name: &str,
        options: &CreateOptions,
    ) -> Result<LocalPool, PoolError> {
        let key = slot_key(&options.key, base_bdev)?;
        let claim = open::claim(registry, base_bdev)?;
        let making = Making {
            name: name.to_owned(),
            force: options.force,
            segment_bytes: options.segment_bytes,
            first_format: options.first_format,
            approved: options.approved,
        };
        open::create(&claim, &making, &key).await?;
        let opening = Opening { memory_bytes: options.memory_budget, ..Opening::default() };
        let pool = open::open(&claim, &key.kek, &opening).await?;
        let Some(pool) = pool else { return Err(PoolError::NoPool(making.name)) };
        open::furnish(&pool, options.compression, options.durable).await?;
        Ok(LocalPool { pool, registry: registry.clone() })
    }

    /// Opens the pool on a bdev and registers its volumes. `Ok(None)`: there is no pool on it.
    ///
    /// # Errors
    /// As [`crate::PoolManager::open`].
    pub async fn open(
        registry: &Arc<Registry>,
        base_bdev: &str,
        key: &KeySource,
        memory_budget: Option<u64>,
    ) -> Result<Option<LocalPool>, PoolError> {
        let kek = slot_key(key, base_bdev)?.kek;
        let claim = open::claim(registry, base_bdev)?;
        let opening = Opening { memory_bytes: memory_budget, ..Opening::default() };
        let Some(pool) = open::open(&claim, &kek, &opening).await? else { return Ok(None) };
        let pool = LocalPool { pool, registry: registry.clone() };
        for id in pool.pool.live_volumes() {
            if let Some(device) = pool.pool.device(id) {
                pool.registry.register(device)?;
            }
        }
        Ok(Some(pool))
    }

    /// What a device shows of the pool on it without a key; see [`crate::PoolManager::peek`].
    ///
    /// # Errors
    /// The pool was erased, is damaged or of another version.
    pub async fn peek(registry: &Arc<Registry>, base_bdev: &str) -> Result<Option<SealedPool>, PoolError> {
        let descriptor = registry.open(base_bdev, Access::ReadOnly, |_| {})?;
        let (base, bdev) = (Base::open(&descriptor)?, descriptor.bdev());
        let sealed = anchors::peek(&base, bdev.name(), bdev.size_bytes()).await?;
        Ok(sealed.map(|sealed| SealedPool {
            base_bdev: bdev.name().to_owned(),
            approved: sealed.superblock.is_approved(),
            name: sealed.superblock.name,
            uuid: sealed.superblock.pool,
            created_ms: sealed.superblock.created_ms,
            keys: sealed.keys,
        }))
    }

    /// The key slots.
    pub fn key_block(&self) -> KeyBlock {
        self.pool.key_block.borrow().clone()
    }

    /// The pool key, for changing slots.
    pub fn pool_key(&self) -> PoolKey {
        self.pool.pool_key.clone()
    }

    /// Changes the key slots; see [`crate::PoolManager::change_keys`].
    ///
    /// # Errors
    /// The device failed: the change may have been made.
    pub async fn change_slots(&self, slots: [Option<KeySlot>; MAX_KEY_SLOTS]) -> Result<(), PoolError> {
        self.pool.change_slots(slots).await
    }

    /// Key block and superblock, for a back-up.
    ///
    /// # Errors
    /// They can not be encoded.
    pub fn backup(&self) -> Result<(KeyBlock, Box<Block>), PoolError> {
        self.pool.backup()
    }

    /// Brings a back-up's key slots to a device; see [`crate::PoolManager::restore`].
    ///
    /// # Errors
    /// As there.
    pub async fn restore(
        registry: &Arc<Registry>,
        base_bdev: &str,
        backup: &KeyBlock,
        superblock: &Block,
        kek: &Kek,
        force: bool,
    ) -> Result<bool, PoolError> {
        let claim = open::claim(registry, base_bdev)?;
        keyslots::restore(&claim, backup, superblock, kek, force).await
    }

    /// Makes a volume and registers its bdev.
    ///
    /// # Errors
    /// As [`crate::PoolManager::create_volume`].
    pub async fn create_volume(&self, options: &VolumeOptions) -> Result<VolumeInfo, PoolError> {
        let (info, device) = self.pool.create_volume(options).await?;
        self.registry.register(device)?;
        Ok(info)
    }

    /// Deletes a volume, which nobody may have open.
    ///
    /// # Errors
    /// There is none, or it is in use.
    pub async fn delete_volume(&self, volume: &str) -> Result<(), PoolError> {
        let id = self.pool.find_volume(volume)?;
        let Some(info) = self.pool.volume_info(id) else { return Ok(()) };
        self.pool.check_deletable(id)?;
        self.unregister(&info)?;
        self.pool.delete_volume(id).await
    }

    /// Takes a snapshot of a volume and registers its bdev.
    ///
    /// # Errors
    /// As [`crate::PoolManager::snapshot_volume`].
    pub async fn snapshot_volume(&self, volume: &str, name: &str) -> Result<VolumeInfo, PoolError> {
        let id = self.pool.find_volume(volume)?;
        let (info, device) = self.pool.snapshot_volume(id, name).await?;
        self.registry.register(device)?;
        Ok(info)
    }

    /// Makes a clone of a snapshot and registers its bdev.
    ///
    /// # Errors
    /// As [`crate::PoolManager::clone_volume`].
    pub async fn clone_volume(&self, snapshot: &str, name: &str) -> Result<VolumeInfo, PoolError> {
        let id = self.pool.find_volume(snapshot)?;
        let (info, device) = self.pool.clone_volume(id, name).await?;
        self.registry.register(device)?;
        Ok(info)
    }

    /// Gives a volume a map of its own.
    ///
    /// # Errors
    /// As [`crate::PoolManager::own_volume`].
    pub async fn own_volume(&self, volume: &str, parent_only: bool) -> Result<(), PoolError> {
        let id = self.pool.find_volume(volume)?;
        self.pool.own_volume(id, parent_only).await
    }

    /// As [`crate::PoolManager::set_host_key`].
    ///
    /// # Errors
    /// As there.
    pub async fn set_host_key(
        &self,
        volume: &str,
        from: u64,
        record: Option<Vec<u8>>,
    ) -> Result<bool, PoolError> {
        self.pool.set_host_key(self.pool.find_volume(volume)?, from, record).await
    }

    /// As [`crate::PoolManager::as_sent`].
    ///
    /// # Errors
    /// As there.
    pub async fn as_sent(&self, volume: &str, from: u64) -> Result<AsSent, PoolError> {
        self.pool.as_sent(self.pool.find_volume(volume)?, from).await
    }

    /// Whether deleted volumes are still giving back what they had.
    pub fn is_deleting(&self) -> bool {
        self.pool.shard.borrow().volumes.values().any(Volume::is_deleting)
    }

    fn unregister(&self, info: &VolumeInfo) -> Result<(), PoolError> {
        let removal: Removal = match self.registry.unregister(&info.uuid.to_string()) {
            Ok(removal) => removal,
            Err(BdevError::NotFound(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if removal.is_done() {
            Ok(())
        } else {
            Err(PoolError::Busy(format!("volume {}/{} is open", info.pool, info.name)))
        }
    }

    /// Changes a volume's size.
    ///
    /// # Errors
    /// As [`crate::PoolManager::resize_volume`].
    pub async fn resize_volume(&self, volume: &str, size_bytes: u64) -> Result<VolumeInfo, PoolError> {
        let id = self.pool.find_volume(volume)?;
        self.pool.resize_volume(id, size_bytes).await?;
        let info = self.pool.volume_info(id);
        let info =
            info.ok_or_else(|| PoolError::NoVolume { pool: self.pool.name(), volume: volume.into() })?;
        let bdev = self.registry.get(&info.uuid.to_string())?;
        bdev.set_blocks(info.size_bytes / u64::from(info.block_size));
        Ok(info)
    }

    /// Erases a domain, whose volumes nobody may have open; see [`crate::PoolManager::erase_domain`].
    ///
    /// # Errors
    /// As there.
    pub async fn erase_domain(&self, domain: &str) -> Result<ErasedDomain, PoolError> {
        let id = self.pool.find_domain(domain)?;
        self.pool.check_erasable()?;
        self.pool.check_encrypted(Some(id))?;
        for info in self.pool.volume_infos().into_iter().filter(|v| v.domain == domain) {
            self.unregister(&info)?;
        }
        self.pool.erase_domain(id).await
    }

    /// Closes the pool and erases it; see [`crate::PoolManager::erase`].
    ///
    /// # Errors
    /// As there.
    pub async fn erase(self) -> Result<ErasedPool, PoolError> {
        let pool = self.pool.clone();
        pool.check_encrypted(None)?;
        self.close().await?;
        pool.erase_pool().await
    }

    /// Gives a domain new keys; see [`crate::PoolManager::change_domain_keys`].
    ///
    /// # Errors
    /// As there.
    pub async fn change_domain_keys(
        &self,
        domain: &str,
        change: KeyChange,
        bytes_per_s: u64,
    ) -> Result<(), PoolError> {
        let id = self.pool.find_domain(domain)?;
        self.pool.change_keys(id, change).await?;
        let started = self.pool.start_renewal(bytes_per_s);
        started.map(drop).map_err(|status| self.pool.stopped(status))
    }

    /// Goes on with rewriting data under new keys, or changes its rate.
    ///
    /// # Errors
    /// The pool takes no changes.
    pub fn start_renewal(&self, bytes_per_s: u64) -> Result<RenewalInfo, Status> {
        self.pool.start_renewal(bytes_per_s)
    }

    /// Makes a deduplication domain.
    ///
    /// # Errors
    /// As [`crate::PoolManager::create_domain`].
    pub async fn create_domain(&self, name: &str) -> Result<DomainInfo, PoolError> {
        self.pool.create_domain(name).await
    }

    /// The pool as it is now.
    pub fn info(&self) -> PoolInfo {
        self.pool.info()
    }

    /// Its volumes.
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        self.pool.volume_infos()
    }

    /// Its domains.
    pub fn domains(&self) -> Vec<DomainInfo> {
        self.pool.domain_infos()
    }

    /// Audits the pool; see [`crate::PoolManager::check`].
    ///
    /// # Errors
    /// The device failed.
    pub async fn check(&self, data: bool) -> Result<CheckReport, Status> {
        self.pool.check(data).await
    }

    /// Audits and repairs; see [`crate::PoolManager::repair`].
    ///
    /// # Errors
    /// The device failed.
    pub async fn repair(&self, data: bool) -> Result<CheckReport, Status> {
        self.pool.repair(data).await
    }

    /// Audits the pool on a bdev that nobody has open, without writing to it: its journal is replayed in RAM. `Ok(None)`:
    /// there is no pool on it.
    ///
    /// # Errors
    /// As [`crate::PoolManager::open`].
    pub async fn audit(
        registry: &Arc<Registry>,
        base_bdev: &str,
        key: &KeySource,
        data: bool,
    ) -> Result<Option<(PoolInfo, CheckReport)>, PoolError> {
        let kek = slot_key(key, base_bdev)?.kek;
        let claim = open::claim_for(registry, base_bdev, Access::ReadOnly, || ())?;
        let opening = Opening { read_only: true, ..Opening::default() };
        let Some(pool) = open::open(&claim, &kek, &opening).await? else { return Ok(None) };
        let report = pool.check(data).await;
        let report = report.map_err(|status| PoolError::Stopped { pool: pool.name(), status })?;
        Ok(Some((pool.info(), report)))
    }

    /// Starts a scrub; see [`crate::PoolManager::start_scrub`].
    ///
    /// # Errors
    /// The pool takes no changes.
    pub fn start_scrub(&self, bytes_per_s: u64) -> Result<ScrubInfo, Status> {
        self.pool.start_scrub(bytes_per_s)
    }

    /// Ends a scrub.
    pub fn stop_scrub(&self) -> ScrubInfo {
        self.pool.stop_scrub()
    }

    /// Starts late deduplication; see [`crate::PoolManager::start_late`]. `batch`: containers that are compared with all before
    /// them at a time; `None` = as many as the memory budget allows.
    ///
    /// # Errors
    /// The pool takes no changes.
    pub fn start_late(&self, batch: Option<u64>) -> Result<LateInfo, Status> {
        self.pool.start_late(batch)
    }

    /// Ends late deduplication.
    pub fn stop_late(&self) -> LateInfo {
        self.pool.stop_late()
    }

    /// Takes the rest of a base device that has become larger; see [`crate::PoolManager::grow`].
    ///
    /// # Errors
    /// The device is smaller than it was, or failed.
    pub async fn grow(&self) -> Result<PoolInfo, PoolError> {
        self.pool.grow().await?;
        Ok(self.pool.info())
    }

    /// Writes a checkpoint.
    ///
    /// # Errors
    /// The device failed.
    pub async fn checkpoint(&self) -> Result<(), Status> {
        self.pool.checkpoint().await
    }

    /// For measurements: maps at most 32 blocks to new chunks that are not written.
    #[doc(hidden)]
    pub async fn pretend(&self, volume: &str, lba: u64, count: usize, seed: u64) -> Result<(), Status> {
        let id = self.pool.find_volume(volume).map_err(|_| Status::INVALID_NAMESPACE)?;
        self.pool.pretend(id, lba, count, seed).await
    }

    /// For measurements: what a recovery would find to do.
    #[doc(hidden)]
    pub fn backlog(&self) -> Backlog {
        self.pool.backlog()
    }

    /// For measurements: no checkpoint is written while the guard lives.
    #[doc(hidden)]
    pub async fn hold_checkpoints(&self) -> HeldCheckpoints<'_> {
        self.pool.hold_checkpoints().await
    }

    /// For measurements: from now on the index keeps at most one fingerprint in `2^bits`.
    #[doc(hidden)]
    pub fn sample_index(&self, bits: u32) {
        self.pool.shard.borrow_mut().index.sample(bits);
    }

    /// For tests: how many cores fill something, counted by domain.
    #[doc(hidden)]
    pub fn lent(&self) -> usize {
        self.pool.lent()
    }

    /// For tests: the journal's keys are changed after so many seals (pools of the FIPS modes).
    #[doc(hidden)]
    pub fn limit_journal_keys(&self, seals: u64) {
        self.pool.journal.borrow_mut().limit_seals(seals);
    }

    /// For tests: from now on only the lists of so many containers are remembered to find neighbours in.
    #[doc(hidden)]
    pub fn limit_neighbours(&self, containers: usize) {
        for domain in self.pool.shard.borrow_mut().domains.values_mut() {
            domain.recent.get_mut().limit(containers);
        }
    }

    /// For tests: audits have so much RAM.
    #[doc(hidden)]
    pub fn limit_audits(&self, bytes: usize) {
        self.pool.audit_bytes.set(bytes);
    }

    /// For tests: the wrapped keys of a domain.
    #[doc(hidden)]
    pub fn wrapped_keys(&self, domain: &str) -> Vec<[u8; WRAPPED_BYTES]> {
        let shard = self.pool.shard.borrow();
        let found = shard.domains.values().filter(|d| d.record.name == domain);
        found.flat_map(|d| d.record.keys.iter().flat_map(|k| [k.data, k.fingerprint])).collect()
    }

    /// For tests: byte offset of each segment in which something lives.
    #[doc(hidden)]
    pub fn live_segments(&self) -> Vec<u64> {
        let shard = self.pool.shard.borrow();
        let live = (0..).zip(shard.segments.entries()).filter(|(_, entry)| entry.live_bytes > 0);
        live.map(|(number, _)| shard.segments.start_bytes(number)).collect()
    }

    /// For tests: byte offset and length of what a block depends on.
    #[doc(hidden)]
    pub async fn place_of(&self, volume: &str, lba: u64, part: Part) -> Result<(u64, u32), Status> {
        let id = self.pool.find_volume(volume).map_err(|_| Status::INVALID_NAMESPACE)?;
        self.pool.place_of(id, lba, part).await
    }

    /// For tests: makes something wrong about a block.
    #[doc(hidden)]
    pub async fn falsify(&self, volume: &str, lba: u64, what: Falsify) -> Result<(), Status> {
        let id = self.pool.find_volume(volume).map_err(|_| Status::INVALID_NAMESPACE)?;
        self.pool.falsify(id, lba, what).await
    }

    /// Takes the volumes (which nobody may have open) out of the registry and closes the pool.
    ///
    /// # Errors
    /// A volume is in use, or the device failed.
    pub async fn close(self) -> Result<(), PoolError> {
        for info in self.pool.volume_infos() {
            self.unregister(&info)?;
        }
        self.pool.close().await
    }
}
