//! The pools that are measured, and how loads run on their cores.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use cryptfold_bdev::{Descriptor, Registry};
use cryptfold_reactor::Runtime;
use cryptfold_reduce::{CreateOptions, KeyChange, KeySource, PoolManager, VolumeOptions};
use cryptfold_reduce_format::fragment::CHUNK_BYTES;

use super::{DATA_BYTES, Data, IO_BYTES, Kind, sum, text};
use crate::figures::Sample;
use crate::figures::chain::{open, plan, ram_disk, run_load, runtime};
use crate::load::{DataSource, Plan};

/// The RAM disk below the pool of large I/O. Bytes.
const DISK_BYTES: u64 = 2 << 30;
/// The RAM disks below the pools that are overwritten. Bytes.
const FULL_DISK_BYTES: u64 = 1 << 30;
/// How full these are, percent.
const FULL_PCT: u64 = 60;
const DEPTH: u32 = 8;
const RANDOM_DEPTH: u32 = 32;
const OVERWRITE_DEPTH: u32 = 64;
const POOL: &str = "figures";

/// Runs `f` for each of the first `cores` cores at once.
pub fn both<T: Send>(cores: usize, f: impl Fn(usize) -> Result<T, String> + Sync) -> Result<Vec<T>, String> {
    if cores == 1 {
        return Ok(vec![f(0)?]);
    }
    std::thread::scope(|scope| {
        let f = &f;
        let threads: Vec<_> = (0..cores).map(|core| scope.spawn(move || f(core))).collect();
        threads.into_iter().map(|t| t.join().map_err(|_| "a load panicked".to_owned())?).collect()
    })
}

/// How a pool is protected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protection {
    /// Encryption is off.
    None,
    /// As by default.
    Default,
    /// With the algorithms of the FIPS modes.
    Approved,
}

/// Reactors on two cores; pools live on the first.
pub struct Rig {
    runtime: Runtime,
    registry: Arc<Registry>,
    manager: Arc<PoolManager>,
}

impl Rig {
    fn new() -> Result<Rig, String> {
        let (runtime, registry) = (runtime(&[0, 1])?, Registry::new());
        let manager = PoolManager::new(registry.clone(), runtime.handles()[..1].to_vec());
        Ok(Rig { runtime, registry, manager })
    }

    /// Runs `f` on a core's reactor and waits for it.
    pub fn on_core<F, Fut, T>(&self, core: usize, f: F) -> Result<T, String>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, String>> + 'static,
        T: Send + 'static,
    {
        self.runtime.handles()[core].block_on(f).map_err(text)?
    }

    /// A RAM disk that has all of its memory: the kernel's part in getting it is none of the pool's, and the bare loops' spans have theirs.
    fn ram_disk(&self, name: &str, bytes: u64) -> Result<(), String> {
        ram_disk(&self.registry, name, bytes)?;
        let device = open(&self.registry, name)?;
        let all = large_writes((bytes / IO_BYTES as u64) as usize, DataSource::Repeat);
        self.write_all(0, device, all).map(drop)
    }

    fn create(&self, disk: &str, pool: &str, protection: Protection) -> Result<(), String> {
        let key = KeySource::Bytes((1..=32).collect());
        let approved = protection == Protection::Approved;
        let options = CreateOptions { force: true, approved, ..CreateOptions::new(key) };
        self.manager.create(disk, pool, &options).map_err(text)?;
        if protection != Protection::None {
            return Ok(());
        }
        self.manager.change_domain_keys(pool, None, KeyChange::Disable, u64::MAX).map_err(text)?;
        // Nothing lies under the first keys, and the change ends before anything is measured.
        let limit = Instant::now() + Duration::from_secs(60);
        while self.manager.domains(pool).map_err(text)?.iter().any(|domain| domain.changing) {
            if Instant::now() > limit {
                return Err("switching encryption off does not end".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn volume(&self, pool: &str, name: &str, size_bytes: u64) -> Result<(), String> {
        let volume = VolumeOptions { name: name.into(), size_bytes, ..VolumeOptions::default() };
        self.manager.create_volume(pool, &volume).map_err(text).map(drop)
    }

    fn open(&self, pool: &str, name: &str) -> Result<Arc<Descriptor>, String> {
        open(&self.registry, &format!("{pool}/{name}"))
    }

    /// Writes as planned, and flushes; gives the share of the core that was lost.
    fn write_all(&self, core: usize, device: Arc<Descriptor>, plan: Plan) -> Result<f64, String> {
        self.on_core(core, move || async move {
            let channel = device.channel().map_err(text)?;
            let sample = run_load(channel.clone(), plan).await?;
            channel.flush().await.map_err(text)?;
            Ok(sample.waited_pct)
        })
    }
}

/// So many large writes of `data`, in order.
fn large_writes(ios: usize, data: DataSource) -> Plan {
    let base = plan((ios * IO_BYTES) as u64, IO_BYTES, 0, false, DEPTH, Duration::ZERO);
    Plan { io_limit: Some(base.slots), data, ..base }
}

/// The pool of large I/O, made anew whenever something is to be written that is there already.
pub struct Fresh {
    pub rig: Rig,
    protection: Protection,
    /// Volumes of the present pool that have been written.
    written: RefCell<Vec<Kind>>,
}

impl Fresh {
    pub fn new(protection: Protection) -> Result<Fresh, String> {
        let rig = Rig::new()?;
        rig.ram_disk("ram", DISK_BYTES)?;
        let fresh = Fresh { rig, protection, written: RefCell::default() };
        fresh.renew()?;
        Ok(fresh)
    }

    /// An empty pool with empty volumes in place of the last one.
    fn renew(&self) -> Result<(), String> {
        if self.rig.manager.list().iter().any(|pool| pool.name == POOL) {
            self.rig.manager.close(POOL).map_err(text)?;
        }
        self.rig.create("ram", POOL, self.protection)?;
        self.written.borrow_mut().clear();
        for kind in [Kind::Unique, Kind::Duplicate, Kind::Incompressible] {
            self.rig.volume(POOL, kind.volume(), DATA_BYTES as u64)?;
        }
        Ok(())
    }

    /// Makes sure that a volume's data is there.
    fn need(&self, data: &Data, kind: Kind) -> Result<(), String> {
        if self.written.borrow().contains(&kind) { Ok(()) } else { self.write(data, kind, 1).map(drop) }
    }

    /// Writes all of its data to a volume that has none, and flushes.
    pub fn write(&self, data: &Data, kind: Kind, cores: usize) -> Result<Sample, String> {
        if self.written.borrow().contains(&kind) {
            self.renew()?;
        }
        if kind == Kind::Duplicate {
            self.need(data, Kind::Unique)?;
        }
        self.written.borrow_mut().push(kind);
        let device = self.rig.open(POOL, kind.volume())?;
        let all = data.of(kind);
        // Each core writes what is next, as many as it gets to: the pool's home has more to do than the other.
        let shared = Some(Arc::new(AtomicU64::new(0)));
        let plan = Plan { shared, ..large_writes(all.len(), DataSource::Buffers(all.clone())) };
        let (start, rig) = (Instant::now(), &self.rig);
        let waited = both(cores, |core| rig.write_all(core, device.clone(), plan.clone()))?;
        let per_second = all.len() as f64 / start.elapsed().as_secs_f64();
        Ok(Sample::new(per_second, waited.into_iter().fold(0.0, f64::max)))
    }

    /// Overwrites 4 KiB blocks of a volume at random; what is read or written next finds an empty pool.
    pub fn overwrite(&self, data: &Data, kind: Kind, time: Duration) -> Result<Sample, String> {
        self.need(data, kind)?;
        let device = self.rig.open(POOL, kind.volume())?;
        let base = plan(DATA_BYTES as u64, CHUNK_BYTES, 0, true, OVERWRITE_DEPTH, time);
        let plan = Plan { data: DataSource::Stamped(data.chunks(kind)), ..base };
        let sample = self
            .rig
            .on_core(0, move || async move { run_load(device.channel().map_err(text)?, plan).await })?;
        self.renew()?;
        Ok(sample)
    }

    /// Reads data back, large and in order or small and at random.
    pub fn read(
        &self,
        data: &Data,
        kind: Kind,
        random: bool,
        cores: usize,
        time: Duration,
    ) -> Result<Sample, String> {
        self.need(data, kind)?;
        let device = self.rig.open(POOL, kind.volume())?;
        let (bytes, depth) = if random { (CHUNK_BYTES, RANDOM_DEPTH) } else { (IO_BYTES, DEPTH) };
        let rig = &self.rig;
        let samples = both(cores, |core| {
            let part = DATA_BYTES / cores;
            let plan = Plan {
                first_slot: (core * part / bytes) as u64,
                ..plan(part as u64, bytes, 100, random, depth, time)
            };
            let device = device.clone();
            rig.on_core(core, move || async move { run_load(device.channel().map_err(text)?, plan).await })
        })?;
        Ok(sum(samples))
    }
}

/// Pools that are nearly full and overwritten, one for each kind; made when first asked for.
pub struct Full<'a> {
    rig: &'a Rig,
    data: &'a Data,
    /// Kind, and bytes of its volume.
    made: RefCell<Vec<(Kind, u64)>>,
}

impl<'a> Full<'a> {
    pub fn new(rig: &'a Rig, data: &'a Data) -> Full<'a> {
        Full { rig, data, made: RefCell::default() }
    }

    /// Overwrites 4 KiB blocks at random, with data that never repeats.
    pub fn overwrite(&self, kind: Kind, time: Duration) -> Result<Sample, String> {
        let made = self.made.borrow().iter().find(|made| made.0 == kind).map(|made| made.1);
        let bytes = match made {
            Some(bytes) => bytes,
            None => self.fill(kind)?,
        };
        let device = self.rig.open(kind.volume(), "volume")?;
        let base = plan(bytes, CHUNK_BYTES, 0, true, OVERWRITE_DEPTH, time);
        let plan = Plan { data: DataSource::Stamped(self.data.chunks(kind)), ..base };
        self.rig.on_core(0, move || async move { run_load(device.channel().map_err(text)?, plan).await })
    }

    /// Makes the pool and fills it; the size of its volume in bytes.
    fn fill(&self, kind: Kind) -> Result<u64, String> {
        let pool = kind.volume();
        self.rig.ram_disk(&format!("ram-{pool}"), FULL_DISK_BYTES)?;
        self.rig.create(&format!("ram-{pool}"), pool, Protection::Default)?;
        // Thin: as large as it may have to be.
        self.rig.volume(pool, "volume", 16 * FULL_DISK_BYTES)?;
        let device = self.rig.open(pool, "volume")?;
        let step = self.data.of(kind).len() as u64 / 8;
        let mut ios = 0;
        loop {
            let info = self.rig.manager.info(pool).map_err(text)?;
            if info.space.stored_bytes * 100 >= info.capacity_bytes * FULL_PCT {
                break;
            }
            let data = DataSource::Stamped(self.data.of(kind).clone());
            let plan = large_writes(step as usize, data);
            let plan = Plan { first_slot: ios, ..plan };
            self.rig.write_all(0, device.clone(), plan)?;
            ios += step;
        }
        let bytes = ios * IO_BYTES as u64;
        self.made.borrow_mut().push((kind, bytes));
        Ok(bytes)
    }
}
