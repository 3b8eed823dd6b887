//! What several tests need: a key, a fast simulated disk, and a RAM disk as simple as it gets for real reactors.

#![allow(dead_code)]

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cryptfold_bdev::{BdevError, Device, DeviceInfo, Io, Op, OpSet, Queue, Registry, Status};
use cryptfold_bdev_sim::{DiskOptions, Image, SimDisk};
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reduce::KeySource;

/// The key of a test's pool.
pub fn key() -> KeySource {
    KeySource::Bytes((0..32).collect())
}

/// A simulated disk that answers within 4 us.
pub fn fast(name: &str, bytes: u64) -> DiskOptions {
    let mut options = DiskOptions::new(name, bytes);
    options.latency = Duration::from_micros(1)..Duration::from_micros(4);
    options
}

/// A registry with a fast disk of `bytes` bytes named "disk"; what is traced goes to stderr.
pub fn disk(bytes: u64, image: Image) -> (Arc<Registry>, Arc<SimDisk>) {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
    let registry = Registry::new();
    let (disk, _) = SimDisk::create(&registry, fast("disk", bytes), image, 1).unwrap();
    (registry, disk)
}

/// How often these bytes are on the device.
pub fn count(image: &Image, bytes: &[u8]) -> usize {
    let mut found = 0;
    // A window of two pages, so that nothing hides across a border.
    for page in image.written_pages() {
        let mut window = vec![0; 8192];
        image.read(page, &mut window);
        let ends = 4096 + bytes.len() - 1;
        found += window[..ends].windows(bytes.len()).filter(|w| *w == bytes).count();
    }
    found
}

type Fuse = (u64, Box<dyn FnOnce() + Send>);

/// Bytes in RAM behind a lock; completes at once.
pub struct RamDisk {
    info: DeviceInfo,
    bytes: Mutex<Vec<u8>>,
    /// I/Os until something happens, and what.
    fuse: Mutex<Option<Fuse>>,
    fused: AtomicBool,
}

impl RamDisk {
    /// Registers a disk of `bytes` bytes with 4 KiB blocks and a (pretended) write cache.
    pub fn create(registry: &Arc<Registry>, name: &str, bytes: u64) -> Arc<RamDisk> {
        let mut info = DeviceInfo::new(name, "RAM disk", 4096, bytes / 4096);
        info.ops = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Reset]);
        info.write_cache = true;
        // Not zero: so the pages are there before anybody measures.
        let disk = Arc::new(RamDisk {
            info,
            bytes: Mutex::new(vec![0xa5; bytes as usize]),
            fuse: Mutex::default(),
            fused: AtomicBool::new(false),
        });
        registry.register(disk.clone()).unwrap();
        disk
    }

    /// Calls `f` when the `nth` I/O from now on has been done, before it completes.
    pub fn after(&self, nth: u64, f: impl FnOnce() + Send + 'static) {
        *self.fuse.lock().unwrap() = Some((nth, Box::new(f)));
        self.fused.store(true, Ordering::SeqCst);
    }

    /// I/Os until what was to happen, which it will not any more; `None` when it has happened.
    pub fn disarm(&self) -> Option<u64> {
        self.fused.store(false, Ordering::SeqCst);
        self.fuse.lock().unwrap().take().map(|(left, _)| left)
    }

    fn burn(&self) {
        let mut fuse = self.fuse.lock().unwrap();
        match &mut *fuse {
            Some((left, _)) if *left > 1 => *left -= 1,
            _ => {
                let burnt = fuse.take();
                drop(fuse);
                if let Some((_, f)) = burnt {
                    f();
                }
            }
        }
    }
}

impl Device for RamDisk {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        Ok(Rc::new(RamQueue(self)))
    }
}

struct RamQueue(Arc<RamDisk>);

impl Queue for RamQueue {
    fn submit(self: Rc<Self>, mut io: Box<Io>) {
        let mut bytes = self.0.bytes.lock().unwrap();
        let mut at = io.lba as usize * 4096;
        match io.op {
            Op::Read => {
                let len = io.blocks as usize * 4096;
                io.data = SgList::from(Buf::from_slice(&bytes[at..at + len]));
            }
            Op::Write => {
                for buf in &io.data {
                    bytes[at..at + buf.len()].copy_from_slice(buf);
                    at += buf.len();
                }
            }
            _ => {}
        }
        drop(bytes);
        if self.0.fused.load(Ordering::Relaxed) {
            self.0.burn();
        }
        io.finish(Status::SUCCESS);
    }
}
