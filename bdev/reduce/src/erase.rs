//! Crypto-erase: of a domain, and of a whole pool. What it takes does not depend on how much is stored.
//!
//! A domain's keys are wrapped through the erasure secret of the key block, which lies in four places only; wrapped keys
//! themselves are copied by every checkpoint and by the journal, and nobody knows where all their copies are. So a domain is erased
//! by taking away what opens its copies:
//!
//! 1. a new erasure secret is added to the key block, beside the one in use;
//! 2. one record removes the domain with its volumes, and all segments of it are free; the keys of the other domains are wrapped
//!    through the new secret; a checkpoint makes that durable;
//! 3. the superblock is written once more, so that none of its four copies leads to an older checkpoint;
//! 4. the old secret is overwritten in all four places, and they are read back.
//!
//! | power fails | what is found | |
//! |---|---|---|
//! | in 1 | one secret or two, the domain whole | intact: erase again |
//! | after 1, before the record is durable | two secrets, the domain whole | intact; the opening goes on with 2 to 4 for what there is |
//! | after the record, or in 2, 3 | the domain gone, its keys still openable | the opening goes on with 2 to 4 |
//! | in 4 | copies with one secret and with two | the newest counts; the opening overwrites the others |
//!
//! An erasure that fails while the pool stays open (no space for a checkpoint) leaves two secrets as well; the next erasure goes on
//! with 2 to 4 for what there is before it begins with 1, as else it would not take away the secret that is in use.
//!
//! A pool is erased by overwriting its key blocks (the only places of the wrapped pool key and of the erasure secret) and then its
//! superblocks. As long as one copy of the key block is left the pool opens, and is whole.

use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::block::BLOCK_BYTES;
use cryptfold_reduce_format::entry::Record;
use cryptfold_reduce_format::ids::DomainId;
use cryptfold_reduce_format::journal::Scope;
use cryptfold_reduce_format::keys::{self, DomainWraps, KeyError};
use cryptfold_reduce_format::record::{GenerationState, PoolRecord, domain_flags};
use cryptfold_reduce_format::slots::KeyBlock;
use cryptfold_reduce_format::superblock::{ANCHOR_BYTES, ANCHORS, KEYS_AT};
use reactor::memory::Buf;
use uuid::Uuid;

use crate::anchors::io_error;
use crate::error::PoolError;
use crate::info::{ErasedDomain, ErasedPool};
use crate::open::random_secret;
use crate::pool::{Life, Pool};
use crate::shard::{Domain, Shard};

impl Pool {
    pub(crate) fn key_error(&self, reason: KeyError) -> PoolError {
        PoolError::Key { device: self.handle.base_name.clone(), reason }
    }

    /// A domain by name or UUID.
    pub(crate) fn find_domain(&self, name: &str) -> Result<DomainId, PoolError> {
        let uuid = Uuid::parse_str(name).ok();
        let shard = self.shard.borrow();
        let found = shard.domains.values().find(|d| d.record.name == name || Some(d.record.uuid) == uuid);
        found
            .map(|d| d.record.id)
            .ok_or_else(|| PoolError::NoDomain { pool: self.name(), domain: name.to_owned() })
    }

    /// An error when no single domain of the pool can be erased.
    pub(crate) fn check_erasable(&self) -> Result<(), PoolError> {
        match self.key_block.borrow().erasure[0] {
            Some(_) => Ok(()),
            None => Err(PoolError::NotErasable(self.name())),
        }
    }

    /// An error when a domain, or one of all of them, has or may have data in clear on the device, which no key hides.
    pub(crate) fn check_encrypted(&self, id: Option<DomainId>) -> Result<(), PoolError> {
        let shard = self.shard.borrow();
        let clear = |d: &&Domain| d.is_plain() || d.record.flags & domain_flags::WIPE != 0;
        let mut asked = shard.domains.values().filter(|d| id.is_none_or(|id| id == d.record.id));
        match asked.find(clear) {
            None => Ok(()),
            Some(d) => Err(PoolError::Invalid(format!(
                "domain {} is or was stored without encryption, so destroying keys would not erase it: enable encryption and wait until `encryption status` shows that this has ended",
                d.record.name
            ))),
        }
    }

    /// Erases a domain, whose volumes nobody has open. The default domain gets a successor of its name.
    pub(crate) async fn erase_domain(self: &Rc<Self>, id: DomainId) -> Result<ErasedDomain, PoolError> {
        self.check_erasable()?;
        self.check_encrypted(Some(id))?;
        let stopped = |status: Status| self.stopped(status);
        let paused = self.pause().await.map_err(stopped)?;
        let erased = self.erase_paused(id).await;
        drop(paused);
        self.collect.notify_one();
        erased
    }

    async fn erase_paused(&self, id: DomainId) -> Result<ErasedDomain, PoolError> {
        let stopped = |status: Status| self.stopped(status);
        self.check_writable().map_err(stopped)?;
        // Looked at again: encryption may have been switched off while this waited.
        self.check_encrypted(Some(id))?;
        // Other cores let go of the domain's segments; nobody writes to it any more.
        self.recall().await.map_err(stopped)?;
        self.flush().await.map_err(stopped)?;
        let (name, uuid, volumes, key_ids, is_default) = {
            let shard = self.shard.borrow();
            let domain = shard.domain(id);
            let domain =
                domain.map_err(|_| PoolError::NoDomain { pool: self.name(), domain: id.to_string() })?;
            let volumes = shard.volumes.values().filter(|v| v.record.domain == id);
            let volumes = volumes.map(|v| (v.record.uuid, v.record.name.clone())).collect();
            let key_ids = domain.record.keys.iter().map(|k| k.generation.0).collect();
            let is_default = shard.pool.default_domain == id;
            (domain.record.name.clone(), domain.record.uuid, volumes, key_ids, is_default)
        };
        // Keys wrapped through either of two secrets may lie anywhere: an erasure that failed is brought to its end first, so that
        // this one takes away the secret that all copies of this domain's keys need.
        self.retire_secret().await?;
        self.renew_secret().await?;
        {
            // The log of its metadata must not be appended to again.
            let mut meta = self.meta.lock().await;
            self.record(Scope::Pool, &Record::DomainErase { domain: id }).map_err(stopped)?;
            meta.forget(id);
        }
        self.lanes.borrow_mut().retain(|(domain, _), lane| {
            if *domain == id {
                self.logs.borrow_mut().retain(|log| !Rc::ptr_eq(log, &lane.log));
            }
            *domain != id
        });
        if is_default {
            self.replace_default(&name)?;
        }
        self.flush().await.map_err(stopped)?;
        let overwritten = self.retire_secret().await?;
        Ok(ErasedDomain { name, uuid, volumes, generations: key_ids, overwritten })
    }

    /// A new default domain.
    pub(crate) fn replace_default(&self, name: &str) -> Result<(), PoolError> {
        let default_domain = self.add_domain(name)?;
        let record = PoolRecord { default_domain, ..self.shard.borrow().pool.clone() };
        let bytes = record.encode().map_err(|error| PoolError::Invalid(error.to_string()))?;
        self.record(Scope::Pool, &Record::PoolUpdate { record: &bytes })
            .map_err(|status| self.stopped(status))
    }

    /// Adds a new erasure secret beside the one in use. There is one: see [`Pool::retire_secret`].
    pub(crate) async fn renew_secret(&self) -> Result<(), PoolError> {
        let _one = self.changing_keys.lock().await;
        let before = self.key_block.borrow().clone();
        debug_assert!(before.erasure[1].is_none(), "a third secret beside two");
        let new = keys::wrap(self.keys.wrap_key(), &random_secret()).map_err(|e| self.key_error(e))?;
        let erasure = [Some(new), before.erasure[0]];
        let wraps = DomainWraps::open(&self.keys, &erasure).map_err(|e| self.key_error(e))?;
        self.write_keys(KeyBlock { generation: before.generation + 1, erasure, ..before }).await?;
        *self.wraps.borrow_mut() = wraps;
        Ok(())
    }

    /// Wraps all domains' keys through the newer secret, makes that durable, and overwrites the older one, if there are two: the
    /// places.
    pub(crate) async fn retire_secret(&self) -> Result<Vec<u64>, PoolError> {
        let stopped = |status: Status| self.stopped(status);
        let places = self.anchors.iter().map(|at| at + KEYS_AT).collect();
        if self.key_block.borrow().erasure[1].is_none() {
            return Ok(places);
        }
        self.rewrap(&mut self.shard.borrow_mut()).map_err(|e| self.key_error(e))?;
        self.checkpoint().await.map_err(stopped)?;
        // The two older copies lead to the checkpoint before, whose keys will not open.
        {
            let _no_checkpoint = self.meta.lock().await;
            self.write_superblock(None, None).await.map_err(stopped)?;
        }
        let _one = self.changing_keys.lock().await;
        let before = self.key_block.borrow().clone();
        let erasure = [before.erasure[0], None];
        let wraps = DomainWraps::open(&self.keys, &erasure).map_err(|e| self.key_error(e))?;
        self.write_keys(KeyBlock { generation: before.generation + 1, erasure, ..before }).await?;
        *self.wraps.borrow_mut() = wraps;
        Ok(places)
    }

    /// Every domain's keys, wrapped through the current secret. Durable with the next checkpoint; until then the old ones open.
    fn rewrap(&self, shard: &mut Shard) -> Result<(), KeyError> {
        let wraps = self.wraps.borrow();
        for domain in shard.domains.values_mut() {
            for entry in &mut domain.record.keys {
                if entry.state == GenerationState::Erased {
                    continue;
                }
                for wrapped in [&mut entry.data, &mut entry.fingerprint] {
                    let (secret, current) = wraps.unwrap(wrapped)?;
                    if !current {
                        *wrapped = wraps.wrap(&secret)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Overwrites what opens a closed pool, in an order in which it is whole or gone: the places.
    pub(crate) async fn erase_pool(&self) -> Result<ErasedPool, PoolError> {
        let device = self.handle.base_name.clone();
        if self.life.get() != Life::Closed {
            return Err(PoolError::Busy(format!("pool {} is open", self.name())));
        }
        let failed = || io_error(&device, "overwriting an anchor");
        let mut overwritten = Vec::new();
        // Key blocks first: a superblock without them is a pool that says that it was erased.
        for copy in 0..ANCHORS {
            let at = self.anchors[copy] + KEYS_AT;
            let mut noise = vec![0; BLOCK_BYTES];
            reactor::fill_random(&mut noise);
            for pattern in [noise, vec![0; BLOCK_BYTES]] {
                self.base.write(at, Buf::from_slice(&pattern), false).await.map_err(failed())?;
                self.base.flush().await.map_err(failed())?;
                let back = self.base.read(at, BLOCK_BYTES).await.map_err(failed())?;
                if back.as_slice() != pattern {
                    return Err(failed()(Status::UNRECOVERED_READ));
                }
            }
            overwritten.push(at);
        }
        for anchor in self.anchors {
            let blank = Buf::zeroes(ANCHOR_BYTES as usize);
            self.base.write(anchor, blank, false).await.map_err(failed())?;
        }
        self.base.flush().await.map_err(failed())?;
        let slots = self.key_block.borrow().slots.iter().flatten().cloned().collect();
        Ok(ErasedPool { name: self.name(), uuid: self.uuid, slots, overwritten })
    }
}
