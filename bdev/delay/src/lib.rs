//! A device that is slower than its base: every I/O comes back no sooner than its operation's latency says, one in a
//! hundred (drawn at random) no sooner than the 99th-percentile latency.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cryptfold_bdev::{
    Base, Bdev, BdevError, Channel, Complete, Device, DeviceInfo, Frame, Io, OnResize, Queue, Registry,
    Status,
};
use cryptfold_reactor as reactor;
use serde_json::{Value, json};
use uuid::Uuid;

/// What `bdev_delay_create` takes.
#[derive(Clone, Debug)]
pub struct DelayOptions {
    /// Name in the registry.
    pub name: String,
    /// The device below.
    pub base_bdev_name: String,
    /// Identity; random when not given.
    pub uuid: Option<Uuid>,
    /// Latencies in microseconds, indexed by [`Latency`].
    pub latencies_us: [u64; 4],
}

/// Which latency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Latency {
    /// Most reads.
    AvgRead,
    /// One read in a hundred.
    P99Read,
    /// Most writes (and everything else).
    AvgWrite,
    /// One write in a hundred.
    P99Write,
}

impl Latency {
    /// From `bdev_delay_update_latency`'s word.
    pub fn parse(word: &str) -> Option<Latency> {
        Some(match word {
            "avg_read" => Latency::AvgRead,
            "p99_read" => Latency::P99Read,
            "avg_write" => Latency::AvgWrite,
            "p99_write" => Latency::P99Write,
            _ => return None,
        })
    }
}

struct Delay {
    info: DeviceInfo,
    base: Base,
    latencies_us: [AtomicU64; 4],
}

fn check_us(us: u64) -> Result<u64, BdevError> {
    const HOUR_US: u64 = 3_600_000_000;
    if us > HOUR_US {
        return Err(BdevError::Invalid(format!("a latency of {us} us is more than an hour ({HOUR_US} us)")));
    }
    Ok(us)
}

/// Creates a delay device; claims its base.
///
/// # Errors
/// Unknown or claimed base, name taken, a latency above one hour.
pub fn create(registry: &Arc<Registry>, options: DelayOptions) -> Result<Arc<Bdev>, BdevError> {
    for us in options.latencies_us {
        check_us(us)?;
    }
    let uppers = vec![options.name.clone()];
    let base = Base::open(registry, &options.base_bdev_name, uppers, "delay", OnResize::Follow)?;
    let below = base.bdev().clone();
    let mut info = DeviceInfo::stacked_on(below.info(), options.name, "delay");
    info.blocks = below.blocks();
    info.uuid = options.uuid.unwrap_or(info.uuid);
    let latencies_us = options.latencies_us.map(AtomicU64::new);
    Base::register(registry, Arc::new(Delay { info, base, latencies_us }), &below)
}

/// Changes a latency of the delay device `name`, for I/O that completes from now on.
///
/// # Errors
/// Unknown, or no delay device; a latency above one hour.
pub fn update_latency(registry: &Registry, name: &str, which: Latency, us: u64) -> Result<(), BdevError> {
    let bdev = registry.get(name)?;
    check_us(us)?;
    let device = bdev.device().as_ref().as_any();
    let Some(delay) = device.downcast_ref::<Delay>() else {
        return Err(BdevError::Invalid(format!("{name} is no delay bdev")));
    };
    delay.latencies_us[which as usize].store(us, Ordering::Relaxed);
    Ok(())
}

impl Device for Delay {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        let base = self.base.channel()?;
        Ok(Rc::new(DelayQueue { device: self, base, held: RefCell::default(), next: Cell::new(0) }))
    }

    fn destruct(&self) {
        self.base.close();
    }

    fn space(&self) -> Option<cryptfold_bdev::Space> {
        self.base.bdev().device().space()
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.base.bdev().device().allocated_bytes()
    }

    fn driver_specific(&self) -> Value {
        json!({"delay": self.config()[0].1})
    }

    fn config(&self) -> Vec<(String, Value)> {
        let us = |l: Latency| self.latencies_us[l as usize].load(Ordering::Relaxed);
        let params = json!({
            "name": self.info.name,
            "base_bdev_name": self.base.name(),
            "uuid": self.info.uuid.to_string(),
            "avg_read_latency": us(Latency::AvgRead),
            "p99_read_latency": us(Latency::P99Read),
            "avg_write_latency": us(Latency::AvgWrite),
            "p99_write_latency": us(Latency::P99Write),
        });
        vec![("bdev_delay_create".into(), params)]
    }
}

struct DelayQueue {
    device: Arc<Delay>,
    base: Channel,
    /// Everything outstanding, by its number here.
    held: RefCell<BTreeMap<u64, Held>>,
    next: Cell<u64>,
}

enum Held {
    /// Still with the base, which could not end it early when asked to.
    AtBase { tag: u64, aborted: bool },
    /// Back from the base, waiting for its time.
    Waiting(Box<Io>),
}

impl DelayQueue {
    fn latency(&self, io: &Io) -> Duration {
        let rare = reactor::random_u64().is_multiple_of(100);
        let which = match (matches!(io.op, cryptfold_bdev::Op::Read), rare) {
            (true, false) => Latency::AvgRead,
            (true, true) => Latency::P99Read,
            (false, false) => Latency::AvgWrite,
            (false, true) => Latency::P99Write,
        };
        Duration::from_micros(self.device.latencies_us[which as usize].load(Ordering::Relaxed))
    }
}

impl Queue for DelayQueue {
    fn submit(self: Rc<Self>, mut io: Box<Io>) {
        let due = reactor::now().0 + self.latency(&io).as_nanos() as u64;
        let base = self.base.clone();
        let key = self.next.replace(self.next.get() + 1);
        self.held.borrow_mut().insert(key, Held::AtBase { tag: io.tag, aborted: false });
        io.push(self, due, key);
        base.submit(io);
    }

    fn abort(&self, tag: u64) -> bool {
        let mut held = self.held.borrow_mut();
        let found = held.iter_mut().find(|(_, it)| match it {
            Held::AtBase { tag: its, .. } => *its == tag,
            Held::Waiting(io) => io.tag == tag,
        });
        match found {
            None => return false,
            // Whether the base ends it now or soon: its latency is not waited for.
            Some((_, Held::AtBase { aborted, .. })) => {
                *aborted = true;
                drop(held);
                self.base.abort(tag);
            }
            Some((&key, Held::Waiting(_))) => {
                if let Some(Held::Waiting(io)) = held.remove(&key) {
                    io.finish(Status::ABORTED_BY_REQUEST);
                }
            }
        }
        true
    }
}

impl Complete for DelayQueue {
    fn complete(self: Rc<Self>, io: Box<Io>, frame: Frame) {
        let key = frame.word;
        let before = self.held.borrow_mut().remove(&key);
        if matches!(before, Some(Held::AtBase { aborted: true, .. })) {
            let status = io.status();
            return io.up(if status.is_ok() { Status::ABORTED_BY_REQUEST } else { status });
        }
        self.held.borrow_mut().insert(key, Held::Waiting(io));
        reactor::spawn_local(async move {
            reactor::sleep_until(reactor::Nanos(frame.lba)).await;
            let io = self.held.borrow_mut().remove(&key);
            if let Some(Held::Waiting(io)) = io {
                let status = io.status();
                io.up(status);
            }
        })
        .detach();
    }
}
