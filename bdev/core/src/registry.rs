//! Names, openings, claims and removal of devices. Used by control threads and at set-up; no I/O passes here.
//!
//! Life of a device: registered -> opened by any number of descriptors (one of which may claim it for itself) ->
//! removal asked for (its openers are told, new ones refused) -> last descriptor closed -> destructed, gone.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::locks::RangeLocks;
use crate::qos::Qos;
use crate::stats::BdevStats;
use crate::{BdevError, Channel, Device, DeviceInfo};

/// What an opener of a device is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BdevEvent {
    /// The device goes away: stop submitting, drop channels and the descriptor.
    Removed,
    /// The device has a new size.
    Resized {
        /// Blocks from now on.
        blocks: u64,
    },
}

/// How a device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads only; possible while somebody else has a claim.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

type EventFn = dyn Fn(BdevEvent) + Send + Sync;

/// Takes a lock whose holder panicked as it is: the registry's tables are changed in single steps.
pub(crate) fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A registered device.
pub struct Bdev {
    device: Arc<dyn Device>,
    info: DeviceInfo,
    aliases: Mutex<Vec<String>>,
    read_only: AtomicBool,
    blocks: AtomicU64,
    /// Bits of [`gate`]; zero on the fast path.
    pub(crate) gate: AtomicU32,
    pub(crate) stats: BdevStats,
    pub(crate) qos: Qos,
    pub(crate) locks: RangeLocks,
    openings: Mutex<Openings>,
    registry: Weak<Registry>,
}

/// Conditions under which an I/O leaves the fast path.
pub(crate) mod gate {
    pub const REMOVING: u32 = 1;
    pub const QOS: u32 = 2;
    pub const HISTOGRAM: u32 = 4;
}

#[derive(Default)]
struct Openings {
    next_id: u64,
    open: Vec<(u64, Access, Arc<EventFn>)>,
    claim: Option<(u64, String)>,
    removing: Option<Arc<Removed>>,
}

#[derive(Default)]
struct Removed {
    done: Mutex<bool>,
    wake: Condvar,
}

/// A removal under way; see [`Registry::unregister`].
#[must_use]
pub struct Removal(Arc<Removed>);

impl Removal {
    /// Waits (blocking; not on a reactor) until the device is destructed. False when `limit` passed first.
    pub fn wait(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut done = locked(&self.0.done);
        while !*done {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            done = self.0.wake.wait_timeout(done, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Whether the device is gone.
    pub fn is_done(&self) -> bool {
        *locked(&self.0.done)
    }
}

impl Bdev {
    /// Name in the registry.
    pub fn name(&self) -> &str {
        &self.info.name
    }
    /// What it said of itself when it was registered; [`Bdev::blocks`], [`Bdev::aliases`] and [`Bdev::is_read_only`] are what
    /// it is now.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }
    /// Other names, now.
    pub fn aliases(&self) -> Vec<String> {
        locked(&self.aliases).clone()
    }
    /// Whether it takes no writes, now.
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }
    /// Takes no writes from now on, or takes them again. Those under way are the device's.
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Ordering::Relaxed);
    }
    /// Size in blocks, now.
    pub fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }
    /// Bytes in a block.
    pub fn block_size_bytes(&self) -> u32 {
        self.info.block_size_bytes
    }
    /// Size in bytes, now.
    pub fn size_bytes(&self) -> u64 {
        self.blocks() * u64::from(self.info.block_size_bytes)
    }
    /// The device itself.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }
    /// Counters and latencies.
    pub fn stats(&self) -> &BdevStats {
        &self.stats
    }
    /// Who claims it, if anybody.
    pub fn claimed_by(&self) -> Option<String> {
        locked(&self.openings).claim.as_ref().map(|(_, by)| by.clone())
    }
    /// Whether it is being removed.
    pub fn is_removing(&self) -> bool {
        self.gate.load(Ordering::Relaxed) & gate::REMOVING != 0
    }
    /// The removal that is under way, to wait for it as well.
    pub fn removal(&self) -> Option<Removal> {
        locked(&self.openings).removing.clone().map(Removal)
    }
    /// Rate limits, now.
    pub fn qos(&self) -> crate::QosLimits {
        self.qos.limits()
    }
    /// Sets the rate limits (0 = none).
    pub fn set_qos(&self, limits: crate::QosLimits) {
        if self.qos.set(limits) {
            self.gate.fetch_or(gate::QOS, Ordering::Relaxed);
        } else {
            self.gate.fetch_and(!gate::QOS, Ordering::Relaxed);
        }
    }
    /// Starts or stops latency histograms; starting clears them.
    pub fn enable_histogram(&self, on: bool) {
        if on {
            self.stats.clear_histograms();
            self.gate.fetch_or(gate::HISTOGRAM, Ordering::Relaxed);
        } else {
            self.gate.fetch_and(!gate::HISTOGRAM, Ordering::Relaxed);
        }
    }
    /// Whether latency histograms are kept.
    pub fn histogram_enabled(&self) -> bool {
        self.gate.load(Ordering::Relaxed) & gate::HISTOGRAM != 0
    }
    /// Tells the world a new size in blocks.
    pub fn set_blocks(&self, blocks: u64) {
        if self.blocks.swap(blocks, Ordering::Relaxed) == blocks {
            return;
        }
        let told: Vec<_> = locked(&self.openings).open.iter().map(|o| o.2.clone()).collect();
        for f in told {
            f(BdevEvent::Resized { blocks });
        }
    }

    fn close(self: &Arc<Self>, id: u64) {
        let removed = {
            let mut o = locked(&self.openings);
            o.open.retain(|x| x.0 != id);
            if o.claim.as_ref().is_some_and(|c| c.0 == id) {
                o.claim = None;
            }
            if o.open.is_empty() { o.removing.clone() } else { None }
        };
        if let Some(r) = removed {
            self.finish_removal(&r);
        }
    }

    fn finish_removal(&self, removed: &Removed) {
        let mut done = locked(&removed.done);
        if *done {
            return;
        }
        if let Some(registry) = self.registry.upgrade() {
            registry.forget(self);
        }
        self.device.destruct();
        *done = true;
        removed.wake.notify_all();
    }
}

/// An opening of a device. Dropping the last reference (channels hold one each) closes it.
pub struct Descriptor {
    bdev: Arc<Bdev>,
    id: u64,
    access: Access,
    closing: AtomicBool,
}

impl Descriptor {
    /// The device.
    pub fn bdev(&self) -> &Arc<Bdev> {
        &self.bdev
    }
    /// How it was opened.
    pub fn access(&self) -> Access {
        self.access
    }
    /// A channel for the current reactor.
    ///
    /// # Errors
    /// When the device is going away or can not open another queue.
    pub fn channel(self: &Arc<Self>) -> Result<Channel, BdevError> {
        if self.bdev.is_removing() {
            return Err(BdevError::Removing(self.bdev.name().into()));
        }
        Channel::open(self.clone())
    }
    /// Makes this the only writer, by name (shown to whoever is refused).
    ///
    /// # Errors
    /// [`BdevError::Claimed`] when somebody else claims it or has it open for writing.
    pub fn claim(&self, by: &str) -> Result<(), BdevError> {
        let mut o = locked(&self.bdev.openings);
        if let Some((id, owner)) = &o.claim
            && *id != self.id
        {
            return Err(BdevError::Claimed { name: self.bdev.name().into(), by: owner.clone() });
        }
        if o.open.iter().any(|x| x.0 != self.id && x.1 == Access::ReadWrite) {
            return Err(BdevError::Claimed { name: self.bdev.name().into(), by: "another writer".into() });
        }
        o.claim = Some((self.id, by.into()));
        Ok(())
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if !self.closing.swap(true, Ordering::Relaxed) {
            self.bdev.close(self.id);
        }
    }
}

/// All devices of a process.
#[derive(Default)]
pub struct Registry {
    tables: Mutex<Tables>,
}

#[derive(Default)]
struct Tables {
    /// In order of registration.
    bdevs: Vec<Arc<Bdev>>,
    /// Names, aliases and UUIDs.
    names: HashMap<String, Arc<Bdev>>,
}

fn all_names(info: &DeviceInfo, aliases: &[String]) -> Vec<String> {
    let mut names = vec![info.name.clone()];
    let uuid = info.uuid.to_string();
    for n in aliases.iter().chain([&uuid]) {
        if !names.contains(n) {
            names.push(n.clone());
        }
    }
    names
}

impl Registry {
    /// An empty one.
    pub fn new() -> Arc<Registry> {
        Arc::new(Registry::default())
    }

    /// Makes a device known under its name, aliases and UUID.
    ///
    /// # Errors
    /// [`BdevError::Exists`] when one of them is taken, [`BdevError::Invalid`] when the description makes no sense.
    pub fn register(self: &Arc<Self>, device: Arc<dyn Device>) -> Result<Arc<Bdev>, BdevError> {
        let info = device.info().clone();
        if info.name.is_empty() || info.name.len() > 255 {
            return Err(BdevError::Invalid("name must have 1 to 255 bytes".into()));
        }
        if !matches!(info.block_size_bytes, 512 | 1024 | 2048 | 4096) {
            return Err(BdevError::Invalid(format!(
                "block size of {} is {} bytes; 512 to 4096 (a power of two) are possible",
                info.name, info.block_size_bytes
            )));
        }
        if info.blocks.checked_mul(u64::from(info.block_size_bytes)).is_none_or(|b| b > i64::MAX as u64) {
            return Err(BdevError::Invalid(format!("{} blocks of {} are too many", info.blocks, info.name)));
        }
        let mut t = locked(&self.tables);
        let names = all_names(&info, &info.aliases);
        if let Some(n) = names.iter().find(|n| t.names.contains_key(*n)) {
            return Err(BdevError::Exists(n.clone()));
        }
        let bdev = Arc::new(Bdev {
            device,
            blocks: AtomicU64::new(info.blocks),
            aliases: Mutex::new(info.aliases.clone()),
            read_only: AtomicBool::new(info.read_only),
            info,
            gate: AtomicU32::new(0),
            stats: BdevStats::default(),
            qos: Qos::default(),
            locks: RangeLocks::default(),
            openings: Mutex::new(Openings::default()),
            registry: Arc::downgrade(self),
        });
        for n in names {
            t.names.insert(n, bdev.clone());
        }
        t.bdevs.push(bdev.clone());
        Ok(bdev)
    }

    /// The device with this name, alias or UUID.
    ///
    /// # Errors
    /// [`BdevError::NotFound`].
    pub fn get(&self, name: &str) -> Result<Arc<Bdev>, BdevError> {
        let t = locked(&self.tables);
        let found = t.names.get(name).or_else(|| {
            // UUIDs may come in any case and with or without hyphens.
            Uuid::parse_str(name).ok().and_then(|u| t.names.get(&u.to_string()))
        });
        found.cloned().ok_or_else(|| BdevError::NotFound(name.into()))
    }

    /// All devices, in order of registration.
    pub fn list(&self) -> Vec<Arc<Bdev>> {
        locked(&self.tables).bdevs.clone()
    }

    /// Opens a device. `on_event` is called on any thread and must not block.
    ///
    /// # Errors
    /// Unknown, being removed, or (for writing) claimed by somebody else.
    pub fn open(
        &self,
        name: &str,
        access: Access,
        on_event: impl Fn(BdevEvent) + Send + Sync + 'static,
    ) -> Result<Arc<Descriptor>, BdevError> {
        let bdev = self.get(name)?;
        let id = {
            let mut o = locked(&bdev.openings);
            if o.removing.is_some() {
                return Err(BdevError::Removing(bdev.name().into()));
            }
            if let Some((_, by)) = &o.claim
                && access == Access::ReadWrite
            {
                return Err(BdevError::Claimed { name: bdev.name().into(), by: by.clone() });
            }
            o.next_id += 1;
            let id = o.next_id;
            o.open.push((id, access, Arc::new(on_event)));
            id
        };
        Ok(Arc::new(Descriptor { bdev, id, access, closing: AtomicBool::new(false) }))
    }

    /// Asks for the removal of a device: openers are told, nobody new is let in, and when the last descriptor is
    /// closed the device is destructed. Outstanding I/O ends first, because channels hold their descriptor.
    ///
    /// # Errors
    /// Unknown or already being removed.
    pub fn unregister(&self, name: &str) -> Result<Removal, BdevError> {
        let bdev = self.get(name)?;
        let removed = Arc::new(Removed::default());
        let told: Vec<_> = {
            let mut o = locked(&bdev.openings);
            if o.removing.is_some() {
                return Err(BdevError::Removing(bdev.name().into()));
            }
            o.removing = Some(removed.clone());
            bdev.gate.fetch_or(gate::REMOVING, Ordering::Relaxed);
            o.open.iter().map(|x| x.2.clone()).collect()
        };
        for f in &told {
            f(BdevEvent::Removed);
        }
        if told.is_empty() {
            bdev.finish_removal(&removed);
        }
        Ok(Removal(removed))
    }

    /// Gives a device other aliases; whoever has it open keeps it.
    ///
    /// # Errors
    /// [`BdevError::NotFound`], or [`BdevError::Exists`] when another device has one of them; nothing changes then.
    pub fn set_aliases(&self, name: &str, aliases: Vec<String>) -> Result<(), BdevError> {
        let bdev = self.get(name)?;
        let mut t = locked(&self.tables);
        let taken = |n: &&String| t.names.get(*n).is_some_and(|other| !Arc::ptr_eq(other, &bdev));
        if let Some(n) = aliases.iter().find(taken) {
            return Err(BdevError::Exists(n.clone()));
        }
        let mut present = locked(&bdev.aliases);
        let old = all_names(&bdev.info, &present);
        let new = all_names(&bdev.info, &aliases);
        for n in old.iter().filter(|n| !new.contains(n)) {
            t.names.remove(n);
        }
        for n in new {
            t.names.insert(n, bdev.clone());
        }
        *present = aliases;
        Ok(())
    }

    fn forget(&self, bdev: &Bdev) {
        let mut t = locked(&self.tables);
        for n in all_names(&bdev.info, &bdev.aliases()) {
            t.names.remove(&n);
        }
        t.bdevs.retain(|b| b.name() != bdev.name());
    }
}
