//! A device with the latency and bandwidth of a model, over a RAM disk: in virtual time a run of hours takes minutes and is the
//! same on any machine.
//!
//! One I/O after the other passes the device's bus, at the bandwidth of its kind; then it takes its latency, beside others. So
//! whoever sends much at once makes others wait, as on a drive. A flush waits for what was sent before it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cryptfold_bdev::{
    Base, BdevError, Channel, Complete, Device, DeviceInfo, Frame, Io, OnResize, Op, Queue, Registry,
};
use cryptfold_reactor as reactor;

/// One I/O in so many takes [`SLOW`] times the latency.
const SLOW_ONE_IN: u64 = 100;
const SLOW: u64 = 4;

/// What the device is like.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Model {
    /// Latency of a read, µs.
    pub read_us: u64,
    /// Latency of a write, µs.
    pub write_us: u64,
    /// Latency of a flush, µs.
    pub flush_us: u64,
    /// Bandwidth of reads, 10^6 bytes a second.
    pub read_mb_s: u64,
    /// Bandwidth of writes, 10^6 bytes a second.
    pub write_mb_s: u64,
}

struct Modelled {
    info: DeviceInfo,
    base: Base,
    model: Model,
    /// When the bus is free again, ns.
    free_at: AtomicU64,
}

/// Puts the device `name` on `base`.
pub fn create(registry: &Arc<Registry>, name: &str, base: &str, model: Model) -> Result<(), BdevError> {
    let base = Base::open(registry, base, vec![name.to_owned()], "modelled", OnResize::Follow)?;
    let below = base.bdev().clone();
    let mut info = DeviceInfo::stacked_on(below.info(), name, "modelled");
    info.write_cache = true;
    let device = Modelled { info, base, model, free_at: AtomicU64::new(0) };
    Base::register(registry, Arc::new(device), &below).map(drop)
}

impl Modelled {
    /// When an I/O that is submitted now is done, ns.
    fn due(&self, io: &Io, now: u64) -> u64 {
        let bytes = io.blocks * u64::from(self.info.block_size_bytes);
        let (mb_s, latency_us) = match io.op {
            Op::Read => (self.model.read_mb_s, self.model.read_us),
            Op::Write => (self.model.write_mb_s, self.model.write_us),
            Op::Flush => (u64::MAX, self.model.flush_us),
            // Nothing is transferred.
            _ => (u64::MAX, self.model.write_us),
        };
        let passed = self.free_at.load(Ordering::Relaxed).max(now) + bytes * 1000 / mb_s;
        self.free_at.store(passed, Ordering::Relaxed);
        let slow = reactor::random_u64().is_multiple_of(SLOW_ONE_IN);
        passed + latency_us * 1000 * if slow { SLOW } else { 1 }
    }
}

impl Device for Modelled {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        let base = self.base.channel()?;
        Ok(Rc::new(ModelQueue { device: self, base, waiting: RefCell::default(), next: Cell::new(0) }))
    }

    fn destruct(&self) {
        self.base.close();
    }
}

struct ModelQueue {
    device: Arc<Modelled>,
    base: Channel,
    /// Back from the base, before their time.
    waiting: RefCell<BTreeMap<u64, Box<Io>>>,
    next: Cell<u64>,
}

impl Queue for ModelQueue {
    fn submit(self: Rc<Self>, mut io: Box<Io>) {
        let due = self.device.due(&io, reactor::now().0);
        let key = self.next.replace(self.next.get() + 1);
        let base = self.base.clone();
        io.push(self, due, key);
        base.submit(io);
    }

    fn abort(&self, _tag: u64) -> bool {
        false
    }
}

impl Complete for ModelQueue {
    fn complete(self: Rc<Self>, io: Box<Io>, frame: Frame) {
        self.waiting.borrow_mut().insert(frame.word, io);
        reactor::spawn_local(async move {
            reactor::sleep_until(reactor::Nanos(frame.lba)).await;
            let io = self.waiting.borrow_mut().remove(&frame.word);
            if let Some(io) = io {
                let status = io.status();
                io.up(status);
            }
        })
        .detach();
    }
}

#[cfg(test)]
mod tests {
    use cryptfold_bdev::{Access, Registry};
    use cryptfold_reactor::{SgList, Sim, now};

    use super::*;
    use crate::figures::ram_disk;

    const MODEL: Model = Model { read_us: 100, write_us: 20, flush_us: 50, read_mb_s: 1000, write_mb_s: 100 };

    #[test]
    fn what_is_sent_first_is_waited_for() {
        Sim::new(1).run(|| async {
            let registry = Registry::new();
            ram_disk(&registry, "ram", 16 << 20).unwrap();
            create(&registry, "disk", "ram", MODEL).unwrap();
            let disk = registry.open("disk", Access::ReadWrite, |_| ()).unwrap();
            let channel = disk.channel().unwrap();
            // A megabyte takes the bus 10 ms, and the read behind it that and its own latency.
            let begun = now();
            let (mut write, mut read) = (Io::new(Op::Write, 0, 256), Io::new(Op::Read, 1024, 1));
            write.data = SgList::zeroes(1 << 20);
            read.tag = 1;
            let (write, read) = (channel.io(write), channel.io(read));
            read.await.status().ok().unwrap();
            let took = (now() - begun).as_micros();
            assert!((10_400..11_200).contains(&took), "a read behind 1 MiB took {took} us");
            write.await.status().ok().unwrap();
            let begun = now();
            channel.read(0, 1).await.unwrap();
            let took = (now() - begun).as_micros();
            assert!((100..500).contains(&took), "a read alone took {took} us");
        });
    }
}
