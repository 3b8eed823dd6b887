//! A RAM disk as simple as it gets, for tests and measurements on real reactors.

#![allow(dead_code)]

use std::rc::Rc;
use std::sync::{Arc, Mutex};

use cryptfold_bdev::{BdevError, Device, DeviceInfo, Io, Op, OpSet, Queue, Registry, Status};
use cryptfold_reactor::memory::{Buf, SgList};

/// Bytes in RAM behind a lock; completes at once.
pub struct RamDisk {
    info: DeviceInfo,
    bytes: Mutex<Vec<u8>>,
}

impl RamDisk {
    /// Registers a disk of `bytes` bytes with 4 KiB blocks and a (pretended) write cache.
    pub fn create(registry: &Arc<Registry>, name: &str, bytes: u64) -> Arc<RamDisk> {
        let mut info = DeviceInfo::new(name, "RAM disk", 4096, bytes / 4096);
        info.ops = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Reset]);
        info.write_cache = true;
        // Not zero: so the pages are there before anybody measures.
        let disk = Arc::new(RamDisk { info, bytes: Mutex::new(vec![0xa5; bytes as usize]) });
        registry.register(disk.clone()).unwrap();
        disk
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
        io.finish(Status::SUCCESS);
    }
}
