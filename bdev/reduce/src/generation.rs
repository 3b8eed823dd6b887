//! Generations of a domain's keys: the present one, what is read with the ones before, and the change from one to the next.
//!
//! A change of keys has three parts:
//!
//! 1. *the switch*, while changes are held back: all that is being filled under the old keys is closed, on all cores, and one
//!    record names the new generation (`DomainUpdate`). From then on everything is written with it; data key and fingerprint
//!    secret change together;
//! 2. *the renewal* ([`crate::renew`]), in the background: what lies under the old keys is sealed anew, fingerprint lists are made
//!    anew. How far it is follows from what segments and lists say of themselves, so it goes on after any interruption;
//! 3. *the end*, while changes are held back: when no segment with anything in it names an old generation, a record takes the old
//!    keys out of the domain, and the erasure secret through which they were wrapped is replaced and overwritten as in
//!    [`crate::erase`]. Copies of the wrapped keys may lie anywhere; nothing opens them any more.
//!
//! | power fails | what is found |
//! |---|---|
//! | before the switch's record is durable | the old generation; what was written with the new one was not durable either |
//! | after it | both; the opening goes on with the renewal |
//! | at the end, with two secrets | the opening retires the older secret; the renewal finds nothing to do and comes to the end again, or the old keys are gone already |
//!
//! A domain whose encryption is off has a generation like any other, whose segments are authenticated and not encrypted
//! ([`Cipher::Gmac`]). So switching encryption on and off are changes of keys as well.
//!
//! [`Cipher::Gmac`]: cryptfold_reduce_format::segment::Cipher::Gmac

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, PoisonError, RwLock};

use cryptfold_bdev::Status;
use cryptfold_reduce_format::entry::Record;
use cryptfold_reduce_format::fingerprint::{Fingerprint, HashId, Hasher};
use cryptfold_reduce_format::ids::{ContainerId, DomainId, Generation};
use cryptfold_reduce_format::journal::Scope;
use cryptfold_reduce_format::keys::{DataKey, DomainWraps, FingerprintSecret, Secret};
use cryptfold_reduce_format::record::{DomainRecord, GenerationState, KeyGeneration, domain_flags};
use cryptfold_reduce_format::superblock::FEATURE_ROTATION;

use crate::check::Paused;
use crate::error::PoolError;
use crate::info::{DomainInfo, KeyChange};
use crate::open::random_secret;
use crate::pool::{Busy, Parked, Pool};
use crate::shard::{ApplyError, Domain, Shard};

/// A domain's keys, unwrapped.
pub(crate) struct Keys {
    /// Data keys of the present generation and those that are retiring.
    pub data: BTreeMap<Generation, DataKey>,
    /// The present one.
    pub generation: Generation,
    pub hasher: Arc<Hasher>,
}

impl Keys {
    /// Unwraps the keys of a domain, whose fingerprints `hash` makes; the error is for people.
    pub fn open(record: &DomainRecord, wraps: &DomainWraps, hash: HashId) -> Result<Keys, String> {
        let unwrap = |wrapped| match wraps.unwrap(wrapped) {
            Ok((secret, _)) => Ok(secret),
            Err(error) => Err(format!("domain {}: {error}", record.name)),
        };
        let mut data = BTreeMap::new();
        let mut current = None;
        for entry in record.keys.iter().filter(|entry| entry.state != GenerationState::Erased) {
            data.insert(entry.generation, DataKey(unwrap(&entry.data)?));
            if entry.state == GenerationState::Current {
                current = Some((entry.generation, FingerprintSecret(unwrap(&entry.fingerprint)?)));
            }
        }
        let (generation, secret) =
            current.ok_or_else(|| format!("domain {} has no current key", record.name))?;
        Ok(Keys { data, generation, hasher: Arc::new(Hasher::new(hash, &secret)) })
    }
}

/// What a domain's chunks are fingerprinted with now, for cores that do so by themselves.
pub(crate) struct SharedHasher(RwLock<(Generation, Arc<Hasher>)>);

impl SharedHasher {
    pub fn new(generation: Generation, hasher: Arc<Hasher>) -> Arc<SharedHasher> {
        Arc::new(SharedHasher(RwLock::new((generation, hasher))))
    }

    /// The generation, and its hasher.
    pub fn now(&self) -> (Generation, Arc<Hasher>) {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, generation: Generation, hasher: Arc<Hasher>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = (generation, hasher);
    }
}

impl Domain {
    /// Whether what is written now is not encrypted.
    pub fn is_plain(&self) -> bool {
        self.record.flags & domain_flags::PLAIN != 0
    }

    /// Whether something may lie under keys of an older generation.
    pub fn is_changing(&self) -> bool {
        self.record.keys.iter().any(|keys| keys.state == GenerationState::Retiring)
    }
}

impl Shard {
    /// Name, flags and keys of a domain change.
    pub(crate) fn update_domain(
        &mut self,
        record: DomainRecord,
        wraps: &DomainWraps,
    ) -> Result<(), ApplyError> {
        let d = self.domains.get_mut(&record.id.0).ok_or(ApplyError::NoDomain(record.id))?;
        let keys = Keys::open(&record, wraps, self.hash).map_err(ApplyError::Record)?;
        if keys.generation != d.generation {
            d.recent = Default::default();
        }
        d.shared.set(keys.generation, keys.hasher.clone());
        d.journals.retain(|generation, _| keys.data.contains_key(generation));
        (d.data, d.generation, d.hasher) = (keys.data, keys.generation, keys.hasher);
        let DomainRecord { name, flags, keys, compared, renewed, .. } = record;
        d.record = DomainRecord { name, flags, keys, compared, renewed, ..d.record.clone() };
        Ok(())
    }

    /// A container's fingerprints are of this generation now.
    pub(crate) fn renew_fingerprints(
        &mut self,
        domain: DomainId,
        generation: Generation,
        container: ContainerId,
        fingerprints: &[Fingerprint],
    ) -> Result<(), ApplyError> {
        let d = self.domains.get_mut(&domain.0).ok_or(ApplyError::NoDomain(domain))?;
        let leaf = d.fingerprints.get_mut(container.get());
        (leaf.generation, leaf.hash) = (generation, d.hasher.id());
        leaf.slots.clear();
        leaf.slots.extend_from_slice(fingerprints);
        Ok(())
    }
}

impl Pool {
    fn no_domain(&self, id: DomainId) -> PoolError {
        PoolError::NoDomain { pool: self.name(), domain: id.to_string() }
    }

    /// The record of a domain with a new generation of keys; an error when it can not be changed so.
    fn changed(&self, id: DomainId, change: KeyChange) -> Result<DomainRecord, PoolError> {
        let mut record = {
            let shard = self.shard.borrow();
            let d = shard.domain(id).map_err(|_| self.no_domain(id))?;
            let name = &d.record.name;
            if d.is_changing() {
                return Err(PoolError::Busy(format!(
                    "the keys of domain {name} are being changed; wait until `encryption status` shows that this has ended"
                )));
            }
            match (change, d.is_plain()) {
                (KeyChange::Rotate, true) => {
                    return Err(PoolError::Invalid(format!(
                        "domain {name} is not encrypted: enable encryption"
                    )));
                }
                (KeyChange::Enable, false) => {
                    return Err(PoolError::Invalid(format!(
                        "domain {name} is encrypted already: rotate gives it new keys"
                    )));
                }
                (KeyChange::Disable, true) => {
                    return Err(PoolError::Invalid(format!("domain {name} is not encrypted already")));
                }
                _ => {}
            }
            d.record.clone()
        };
        if change == KeyChange::Disable && self.superblock.borrow().is_approved() {
            return Err(PoolError::Invalid(format!(
                "pool {} was made for the FIPS modes: its data is always encrypted",
                self.name()
            )));
        }
        let wrap = |secret: &Secret| self.wraps.borrow().wrap(secret).map_err(|e| self.key_error(e));
        let last = record.keys.iter().map(|keys| keys.generation.0).max().unwrap_or(0);
        for keys in &mut record.keys {
            keys.state = GenerationState::Retiring;
        }
        record.keys.push(KeyGeneration {
            generation: Generation(last + 1),
            state: GenerationState::Current,
            data: wrap(&random_secret())?,
            fingerprint: wrap(&random_secret())?,
        });
        match change {
            KeyChange::Rotate => {}
            KeyChange::Disable => record.flags |= domain_flags::PLAIN,
            KeyChange::Enable => record.flags = record.flags & !domain_flags::PLAIN | domain_flags::WIPE,
        }
        (record.compared, record.renewed) = (0, 0);
        Ok(record)
    }

    /// Gives a domain new keys: what is written from now on is written with them. What is there follows in the background.
    pub(crate) async fn change_keys(
        self: &Rc<Self>,
        id: DomainId,
        change: KeyChange,
    ) -> Result<(), PoolError> {
        self.check_erasable()?;
        self.changed(id, change)?;
        let paused = self.pause_counted().await.map_err(|status| self.stopped(status))?;
        let switched = self.switch_paused(id, change).await;
        drop(paused);
        switched
    }

    /// Holds changes back, as [`Pool::pause`], and is itself counted as one: the pool is not closed meanwhile.
    pub(crate) async fn pause_counted(self: &Rc<Self>) -> Result<(Paused<'_>, Busy), Status> {
        let busy = self.enter();
        let parked = Parked::new(self);
        let paused = self.pause().await?;
        drop(parked);
        Ok((paused, busy))
    }

    /// As [`Pool::change_keys`], of one domain or all to which this can be done: which have new keys.
    pub(crate) async fn change_all_keys(
        self: &Rc<Self>,
        domain: Option<&str>,
        change: KeyChange,
    ) -> Result<Vec<DomainInfo>, PoolError> {
        let ids: Vec<DomainId> = match domain {
            Some(name) => vec![self.find_domain(name)?],
            None => {
                let shard = self.shard.borrow();
                let wanted = |d: &&Domain| (change == KeyChange::Enable) == d.is_plain();
                let some: Vec<DomainId> =
                    shard.domains.values().filter(wanted).map(|d| d.record.id).collect();
                // None: the first one's error says why.
                if some.is_empty() {
                    shard.domains.values().take(1).map(|d| d.record.id).collect()
                } else {
                    some
                }
            }
        };
        for id in &ids {
            self.change_keys(*id, change).await?;
        }
        Ok(self.domain_infos().into_iter().filter(|d| ids.contains(&d.id)).collect())
    }

    async fn switch_paused(&self, id: DomainId, change: KeyChange) -> Result<(), PoolError> {
        let stopped = |status: Status| self.stopped(status);
        self.check_writable().map_err(stopped)?;
        // Looked at again: somebody else may have been first.
        let record = self.changed(id, change)?;
        if self.superblock.borrow().features.incompatible & FEATURE_ROTATION == 0 {
            let _no_checkpoint = self.meta.lock().await;
            self.superblock.borrow_mut().features.incompatible |= FEATURE_ROTATION;
            self.write_superblock(None, None).await.map_err(stopped)?;
        }
        self.close_all(id).await.map_err(stopped)?;
        self.update_keys(&record)?;
        self.flush().await.map_err(stopped)?;
        let generation = record.keys.last().map_or(0, |keys| keys.generation.0);
        tracing::info!(pool = %self.name(), domain = record.name, generation, ?change, "new keys");
        Ok(())
    }

    /// Closes all segments and containers of a domain that are being filled. Changes are held back.
    pub(crate) async fn close_all(&self, id: DomainId) -> Result<(), Status> {
        self.recall().await?;
        let lanes: Vec<_> = self.lanes.borrow().values().filter(|lane| lane.domain == id).cloned().collect();
        for lane in lanes {
            let (segment, container) = (lane.log.finish(), lane.end_container());
            let now = self.now();
            let mut shard = self.shard.borrow_mut();
            if let Some(segment) = segment {
                shard.segments.close(segment.number(), now);
            }
            if let (Some(container), Some(d)) = (container, shard.domains.get_mut(&id.0)) {
                d.containers.unpin(container.get());
                d.fingerprints.unpin(container.get());
            }
        }
        let metadata = self.meta.lock().await.end(id);
        if let Some(number) = metadata {
            self.shard.borrow_mut().segments.release(number);
        }
        // What has been cut is on the device after this.
        self.flush().await
    }

    /// Journals and applies a domain's record with other keys.
    fn update_keys(&self, record: &DomainRecord) -> Result<(), PoolError> {
        let bytes = record.encode().map_err(|error| PoolError::Invalid(error.to_string()))?;
        self.record(Scope::Pool, &Record::DomainUpdate { record: &bytes })
            .map_err(|status| self.stopped(status))?;
        if let Some(d) = self.shard.borrow_mut().domains.get_mut(&record.id.0) {
            d.derive_journal(self.uuid, self.epoch.get());
        }
        Ok(())
    }

    /// Takes the keys away that nothing needs any more. False: something still needs them, or what lay in clear has become free
    /// after free space was `wiped`.
    pub(crate) async fn end_change(self: &Rc<Self>, id: DomainId, wiped: bool) -> Result<bool, PoolError> {
        let stopped = |status: Status| self.stopped(status);
        let paused = self.pause_counted().await.map_err(stopped)?;
        self.check_writable().map_err(stopped)?;
        let (generation, in_clear) = {
            let shard = self.shard.borrow();
            let Ok(d) = shard.domain(id) else { return Ok(true) };
            (d.generation, d.record.flags & domain_flags::WIPE != 0)
        };
        if self.shard.borrow().segments.is_old_open(id, generation) {
            // Lent just when the keys changed.
            self.close_all(id).await.map_err(stopped)?;
        }
        if self.shard.borrow().segments.old_bytes(id, generation) > 0 || in_clear && !wiped {
            return Ok(false);
        }
        self.retire_secret().await?;
        self.renew_secret().await?;
        let record = {
            let shard = self.shard.borrow();
            let Ok(d) = shard.domain(id) else { return Ok(true) };
            let mut record = d.record.clone();
            record.keys.retain(|keys| keys.generation == generation);
            record.flags &= !domain_flags::WIPE;
            // What was written since the switch has not been compared with what has been renewed since.
            (record.compared, record.renewed) = (0, 0);
            record
        };
        self.update_keys(&record)?;
        self.shard.borrow_mut().segments.forget_old(id, generation);
        self.flush().await.map_err(stopped)?;
        let overwritten = self.retire_secret().await?;
        drop(paused);
        tracing::info!(
            pool = %self.name(), domain = record.name, generation = generation.0, ?overwritten,
            "the keys before these are destroyed"
        );
        Ok(true)
    }
}
