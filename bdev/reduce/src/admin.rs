//! Management of a pool's volumes and domains, on its home reactor.
//!
//! Every change is a journal record and durable before it is reported done. What goes on from other volumes, and
//! deleting, is in [`crate::snapshots`].

mod binding;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::codec::Compression;
use cryptfold_reduce_format::entry::Record;
use cryptfold_reduce_format::fingerprint::Fingerprint;
use cryptfold_reduce_format::ids::{ChunkAddr, ContainerId, DomainId, HostKeyId, VolumeId};
use cryptfold_reduce_format::journal::Scope;
use cryptfold_reduce_format::map::Target;
use cryptfold_reduce_format::record::{VolumeRecord, pool_flags, volume_flags};
use cryptfold_reduce_format::segment::Class;
use uuid::Uuid;

use crate::error::PoolError;
use crate::index::Key;
use crate::info::{DeletionInfo, DomainInfo, PoolInfo, ScrubState, Space, VolumeInfo, VolumeOptions};
use crate::load::Lists;
use crate::open::now_ms;
use crate::pool::{Life, Pool};
use crate::shard::{Domain, Shard, Volume};
use crate::volume::{VolumeDevice, VolumeFacts};

pub(crate) fn check_name(what: &str, name: &str) -> Result<(), PoolError> {
    if name.is_empty() || name.len() > 255 || name.contains('/') || name.chars().any(char::is_control) {
        return Err(PoolError::Invalid(format!(
            "a {what}'s name has 1 to 255 bytes without '/' and control characters, not {name:?}"
        )));
    }
    Ok(())
}

/// A fresh identity.
pub(crate) fn draw_uuid() -> Uuid {
    let mut bytes = [0; 16];
    reactor::fill_random(&mut bytes);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

impl Pool {
    pub(crate) fn stopped(&self, status: Status) -> PoolError {
        if status == Status::CAPACITY_EXCEEDED {
            return PoolError::NoSpace(self.name());
        }
        PoolError::Stopped { pool: self.name(), status }
    }

    /// An error when a volume has this name.
    pub(crate) fn check_name_free(&self, name: &str) -> Result<(), PoolError> {
        if self.shard.borrow().volumes.values().any(|v| !v.is_deleting() && v.record.name == name) {
            return Err(PoolError::VolumeExists { pool: self.name(), volume: name.to_owned() });
        }
        Ok(())
    }

    pub(crate) fn no_volume(&self, volume: &str) -> PoolError {
        PoolError::NoVolume { pool: self.name(), volume: volume.to_owned() }
    }

    /// The volume with this name or UUID.
    pub(crate) fn find_volume(&self, name: &str) -> Result<VolumeId, PoolError> {
        let uuid = Uuid::parse_str(name).ok();
        let shard = self.shard.borrow();
        let mut live = shard.volumes.values().filter(|v| !v.is_deleting());
        live.find(|v| v.record.name == name || uuid == Some(v.record.uuid))
            .map(|v| v.record.id)
            .ok_or_else(|| self.no_volume(name))
    }

    /// Makes a volume; its device is for the caller to register.
    pub(crate) async fn create_volume(
        self: &Rc<Self>,
        options: &VolumeOptions,
    ) -> Result<(VolumeInfo, Arc<VolumeDevice>), PoolError> {
        check_name("volume", &options.name)?;
        if options.size_bytes == 0 || options.size_bytes > 1 << 52 {
            return Err(PoolError::Invalid(format!(
                "volume size {} is not from 1 to 2^52 bytes",
                options.size_bytes
            )));
        }
        let block_bytes = options.block_size.unwrap_or(4096);
        if ![512, 4096].contains(&block_bytes) {
            return Err(PoolError::Invalid(format!("volume block size is 512 or 4096, not {block_bytes}")));
        }
        let _busy = self.enter();
        self.throttle().await.map_err(|status| self.stopped(status))?;
        let id = {
            self.check_name_free(&options.name)?;
            let shard = self.shard.borrow();
            let domain = match &options.domain {
                None => shard.pool.default_domain,
                Some(name) => shard
                    .domains
                    .values()
                    .find(|d| d.record.name == *name)
                    .map(|d| d.record.id)
                    .ok_or_else(|| PoolError::NoDomain { pool: self.name(), domain: name.clone() })?,
            };
            let uuid = options.uuid.unwrap_or_else(draw_uuid);
            let id = shard.pool.next_volume;
            let mut record =
                VolumeRecord::new(id, uuid, &options.name, domain, options.size_bytes.div_ceil(4096));
            record.created_ms = now_ms();
            record.block_bytes = block_bytes;
            record.compression = options.compression;
            record.birth = shard.epoch();
            drop(shard);
            let bytes = record.encode().map_err(|error| PoolError::Invalid(error.to_string()))?;
            self.record(Scope::Pool, &Record::VolumeCreate { record: &bytes })
                .map_err(|s| self.stopped(s))?;
            id
        };
        self.flush().await.map_err(|status| self.stopped(status))?;
        let device = self.device(id).ok_or_else(|| self.no_volume(&options.name))?;
        let info = self.volume_info(id).ok_or_else(|| self.no_volume(&options.name))?;
        Ok((info, device))
    }

    /// The device of a volume, for the registry.
    pub(crate) fn device(&self, id: VolumeId) -> Option<Arc<VolumeDevice>> {
        self.publish_space();
        let shard = self.shard.borrow();
        let v = shard.volumes.get(&id.0)?;
        let domain = shard.domains.get(&v.record.domain.0)?;
        Some(VolumeDevice::new(
            self.handle.clone(),
            &VolumeFacts {
                id,
                uuid: v.record.uuid,
                pool_name: &self.name(),
                name: &v.record.name,
                domain: &domain.record.name,
                block_bytes: v.record.block_bytes,
                blocks: v.record.blocks,
                flags: v.record.flags,
                durable: shard.pool.flags & pool_flags::DURABLE != 0,
                hasher: domain.shared.clone(),
            },
        ))
    }

    /// Ids of the volumes that hosts may see.
    pub(crate) fn live_volumes(&self) -> Vec<VolumeId> {
        self.shard.borrow().volumes.values().filter(|v| !v.is_deleting()).map(|v| v.record.id).collect()
    }

    /// Changes a volume's size. What lies beyond a smaller size is given up; the caller keeps hosts away from it.
    pub(crate) async fn resize_volume(
        self: &Rc<Self>,
        id: VolumeId,
        size_bytes: u64,
    ) -> Result<u64, PoolError> {
        if size_bytes == 0 || size_bytes > 1 << 52 {
            return Err(PoolError::Invalid(format!("volume size {size_bytes} is not from 1 to 2^52 bytes")));
        }
        let blocks = size_bytes.div_ceil(4096);
        let target = self.target(id).map_err(|_| self.no_volume(&id.to_string()))?;
        let _busy = self.enter();
        let fence = |end| {
            if let Some(v) = self.shard.borrow_mut().volumes.get_mut(&id.0) {
                v.fence = end;
            }
        };
        let unwritable = self.shard.borrow().volume(id).is_ok_and(|v| v.is_read_only());
        if unwritable && blocks != target.blocks {
            return Err(PoolError::Invalid(format!(
                "{target_name} is read-only: its size stays",
                target_name = self.name_of(id)
            )));
        }
        if blocks < target.blocks {
            // Nothing comes back behind the new end while it is given up.
            fence(blocks);
            let gap = target.blocks - blocks;
            let filled = self.fill_blocks(&target, blocks, gap, Target::Unmapped, HostKeyId(0)).await;
            if let Err(status) = filled {
                fence(u64::MAX);
                return Err(self.stopped(status));
            }
        }
        let resized = self.record(Scope::Pool, &Record::VolumeResize { volume: id, blocks });
        fence(u64::MAX);
        resized.map_err(|s| self.stopped(s))?;
        self.flush().await.map_err(|status| self.stopped(status))?;
        Ok(blocks)
    }

    /// Changes a volume's name.
    pub(crate) async fn rename_volume(&self, id: VolumeId, name: &str) -> Result<(), PoolError> {
        check_name("volume", name)?;
        self.check_writable().map_err(|status| self.stopped(status))?;
        self.check_name_free(name)?;
        self.record(Scope::Pool, &Record::VolumeRename { volume: id, name }).map_err(|s| self.stopped(s))?;
        self.flush().await.map_err(|status| self.stopped(status))
    }

    /// Sets flags of a volume ([`cryptfold_reduce_format::record::volume_flags`]).
    pub(crate) async fn flag_volume(&self, id: VolumeId, set: u32, clear: u32) -> Result<(), PoolError> {
        self.check_writable().map_err(|status| self.stopped(status))?;
        let fixed = {
            let shard = self.shard.borrow();
            let v = shard.volume(id).map_err(|_| self.no_volume(&id.to_string()))?;
            v.is_snapshot() || shard.based(id) > 0
        };
        if fixed && clear & volume_flags::READ_ONLY != 0 {
            return Err(PoolError::Invalid(format!(
                "{} is a snapshot or has clones: it stays read-only",
                self.name_of(id)
            )));
        }
        self.record(Scope::Pool, &Record::VolumeFlags { volume: id, set, clear })
            .map_err(|s| self.stopped(s))?;
        self.flush().await.map_err(|status| self.stopped(status))
    }

    /// Makes a domain.
    pub(crate) async fn create_domain(&self, name: &str) -> Result<DomainInfo, PoolError> {
        check_name("domain", name)?;
        self.check_writable().map_err(|status| self.stopped(status))?;
        if self.shard.borrow().domains.values().any(|d| d.record.name == name) {
            return Err(PoolError::DomainExists { pool: self.name(), domain: name.to_owned() });
        }
        let id = self.add_domain(name)?;
        self.flush().await.map_err(|status| self.stopped(status))?;
        let made = self.domain_infos().into_iter().find(|d| d.id == id);
        made.ok_or_else(|| PoolError::Invalid(format!("no domain {id}")))
    }

    /// The pool's name, in the superblock.
    pub(crate) async fn rename(&self, name: &str) -> Result<(), PoolError> {
        self.check_writable().map_err(|status| self.stopped(status))?;
        let _no_checkpoint = self.meta.lock().await;
        self.superblock.borrow_mut().name = name.to_owned();
        self.write_superblock(None, None).await.map_err(|status| self.stopped(status))
    }

    /// Sets the compression of volumes that have no setting of their own.
    pub(crate) async fn set_compression(&self, compression: Compression) -> Result<(), PoolError> {
        self.check_writable().map_err(|status| self.stopped(status))?;
        let mut record = self.shard.borrow().pool.clone();
        record.compression = compression;
        let bytes = record.encode().map_err(|error| PoolError::Invalid(error.to_string()))?;
        self.record(Scope::Pool, &Record::PoolUpdate { record: &bytes }).map_err(|s| self.stopped(s))?;
        self.flush().await.map_err(|status| self.stopped(status))
    }

    /// Makes every completion durable, of volumes that are made or opened from now on.
    pub(crate) async fn set_durable(&self) -> Result<(), PoolError> {
        self.check_writable().map_err(|status| self.stopped(status))?;
        let mut record = self.shard.borrow().pool.clone();
        record.flags |= pool_flags::DURABLE;
        let bytes = record.encode().map_err(|error| PoolError::Invalid(error.to_string()))?;
        self.record(Scope::Pool, &Record::PoolUpdate { record: &bytes }).map_err(|s| self.stopped(s))?;
        self.flush().await.map_err(|status| self.stopped(status))
    }

    // ---- what there is

    pub(crate) fn volume_info(&self, id: VolumeId) -> Option<VolumeInfo> {
        let shard = self.shard.borrow();
        let v = shard.volumes.get(&id.0)?;
        Some(volume_info(&self.name(), &shard, v))
    }

    pub(crate) fn volume_infos(&self) -> Vec<VolumeInfo> {
        let (shard, name) = (self.shard.borrow(), self.name());
        shard.volumes.values().filter(|v| !v.is_deleting()).map(|v| volume_info(&name, &shard, v)).collect()
    }

    pub(crate) fn domain_infos(&self) -> Vec<DomainInfo> {
        domain_infos(&self.shard.borrow())
    }

    pub(crate) fn info(&self) -> PoolInfo {
        let shard = self.shard.borrow();
        let superblock = self.superblock.borrow();
        let for_hosts = self.host_space();
        let mut space = Space {
            metadata_bytes: shard.segments.live_meta_bytes,
            stored_bytes: shard.segments.live_data_bytes,
            unique_bytes: shard.domains.values().map(|d| d.unique * 4096).sum(),
            ..Space::default()
        };
        for v in shard.volumes.values() {
            space.logical_bytes += (v.chunks + v.special) * 4096;
            space.zero_bytes += v.special * 4096;
        }
        PoolInfo {
            name: self.name(),
            uuid: self.uuid,
            approved: superblock.is_approved(),
            base_bdev: self.handle.base_name.clone(),
            device_bytes: superblock.devices[0].blocks * 4096,
            segment_bytes: self.segment_bytes,
            segments: shard.segments.usable() as u64,
            free_segments: shard.segments.free_count() as u64,
            capacity_bytes: for_hosts.total_bytes,
            free_bytes: for_hosts.free_bytes,
            dead_bytes: shard.segments.dead_bytes(),
            space,
            volumes: shard.volumes.values().filter(|v| !v.is_deleting()).count() as u64,
            domains: shard.domains.len() as u64,
            compression: shard.pool.compression.to_string(),
            memory_budget_bytes: self.memory_budget,
            durable: shard.pool.flags & pool_flags::DURABLE != 0,
            written_bytes: self.host_bytes.get(),
            moved_bytes: self.moved_bytes.get(),
            memory_bytes: (shard.meter.bytes.get() + shard.index.memory_bytes()) as u64
                + shard.domains.values().map(|d| d.recent.borrow().memory_bytes() as u64).sum::<u64>()
                + self.logs.borrow().iter().map(|log| log.memory_bytes() as u64).sum::<u64>()
                + self.lent_bytes() as u64,
            index_entries: shard.index.len() as u64,
            index_sampling: 1 << shard.index.hook_bits(),
            checkpoints: superblock.generation,
            damaged: self.damaged.get(),
            healed: self.healed.get(),
            scrub: self.scrub.borrow().clone(),
            late: self.late.borrow().clone(),
            renewal: self.renewal.borrow().clone(),
            deletion: DeletionInfo {
                volumes: shard.volumes.values().filter(|v| v.is_deleting()).count() as u64,
                state: match shard.volumes.values().any(|v| v.is_deleting()) {
                    true if self.deletion_failed.get() && !self.deleting.get() => ScrubState::Stopped,
                    true => ScrubState::Running,
                    false => ScrubState::Never,
                },
            },
            failed: self.failure.get().map(|status| status.to_string()),
            created_ms: superblock.created_ms,
        }
    }

    /// Fills the index from the fingerprint lists. I/O goes on meanwhile and finds fewer duplicates.
    pub(crate) async fn rebuild_index(self: Rc<Self>) {
        let ends: Vec<(DomainId, u64)> =
            self.shard.borrow().domains.values().map(|d| (d.record.id, d.next_container)).collect();
        for (domain, end) in ends {
            // A list that is damaged costs duplicates, nothing else; the loader has reported it.
            let open = |pool: &Pool| pool.life.get() == Life::Open;
            self.each_list(domain, 1..end, open, move |pool, number, lists| {
                pool.shard.borrow_mut().index_container(domain, number, lists);
            })
            .await;
        }
    }
}

impl Shard {
    /// Puts what a container has into the index.
    pub(crate) fn index_container(&mut self, domain: DomainId, number: u64, (container, prints): &Lists) {
        let Shard { domains, index, emptied, .. } = self;
        let Some(d) = domains.get(&domain.0) else { return };
        let Some(id) = ContainerId::new(number) else { return };
        if container.live() == 0 && container.used() > 0 {
            emptied.push((domain, id));
            return;
        }
        if prints.generation != d.generation {
            return;
        }
        for (slot, fingerprint) in prints.slots.iter().enumerate() {
            if *fingerprint != Fingerprint::NONE
                && container.refs(slot as u16) > 0
                && let Some(addr) = ChunkAddr::new(id, slot as u16)
            {
                index.insert(Key::new(domain, fingerprint), addr);
            }
        }
    }
}

fn volume_info(pool: &str, shard: &Shard, v: &Volume) -> VolumeInfo {
    let domain = shard.domains.get(&v.record.domain.0);
    let exclusive = shard.exclusive(v);
    VolumeInfo {
        id: v.record.id,
        uuid: v.record.uuid,
        name: v.record.name.clone(),
        pool: pool.to_owned(),
        domain: domain.map_or_else(String::new, |d| d.record.name.clone()),
        size_bytes: v.record.blocks * 4096,
        block_size: v.record.block_bytes,
        read_only: v.is_read_only(),
        snapshot: v.is_snapshot(),
        parent: shard.parent(v).map(|parent| parent.record.name.clone()),
        clones: shard.children(v).iter().map(|child| child.record.name.clone()).collect(),
        compression: v.record.compression.map(|c| c.to_string()),
        host_key: v.host_key().map(<[u8]>::to_vec),
        logical_bytes: 4096 * v.shown_blocks(),
        zero_bytes: v.special * 4096,
        exclusive_bytes: exclusive * 4096,
        reclaimable_bytes: domain.map_or(0, |d| reclaimable(d, exclusive)),
        written_bytes: v.written_bytes,
        created_ms: v.record.created_ms,
    }
}

/// Stored bytes that so many mapped blocks stand for, at the domain's reduction.
fn reclaimable(d: &Domain, blocks: u64) -> u64 {
    (u128::from(d.stored_bytes) * u128::from(blocks) / u128::from(d.mapped.max(1))) as u64
}

/// All domains. Volumes and segments, of which there may be very many, are walked once, not once for each domain.
fn domain_infos(shard: &Shard) -> Vec<DomainInfo> {
    let one = |d: &Domain| DomainInfo {
        id: d.record.id,
        uuid: d.record.uuid,
        name: d.record.name.clone(),
        volumes: 0,
        generation: d.generation.0,
        encrypted: !d.is_plain(),
        changing: d.is_changing(),
        old_bytes: 0,
        space: Space { unique_bytes: d.unique * 4096, stored_bytes: d.stored_bytes, ..Space::default() },
    };
    let mut infos: BTreeMap<u32, DomainInfo> = shard.domains.iter().map(|(id, d)| (*id, one(d))).collect();
    for v in shard.volumes.values() {
        let Some(d) = infos.get_mut(&v.record.domain.0) else { continue };
        d.volumes += u64::from(!v.is_deleting());
        d.space.logical_bytes += (v.chunks + v.special) * 4096;
        d.space.zero_bytes += v.special * 4096;
    }
    for e in shard.segments.entries().filter(|e| e.live_bytes > 0) {
        let Some((class, d)) = e.class.zip(infos.get_mut(&e.domain.0)) else { continue };
        let live = u64::from(e.live_bytes);
        if class == Class::Metadata {
            d.space.metadata_bytes += live;
        }
        if e.generation.0 != d.generation {
            d.old_bytes += live;
        }
    }
    infos.into_values().collect()
}
