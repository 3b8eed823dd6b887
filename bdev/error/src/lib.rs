//! A device that fails on request: the next N operations of a kind fail, hang, or have their data corrupted.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cryptfold_bdev::{
    Base, Bdev, BdevError, Channel, Complete, Device, DeviceInfo, Frame, Io, OnResize, Op, Queue, Registry,
    Status,
};
use cryptfold_reactor::memory::SgList;
use serde_json::{Value, json};
use uuid::Uuid;

/// What `bdev_error_create` takes; the new device is called `EE_<base>`.
#[derive(Clone, Debug)]
pub struct ErrorOptions {
    /// The device below.
    pub base_name: String,
    /// Identity; random when not given.
    pub uuid: Option<Uuid>,
}

/// What an injection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ends with a status; the base does not see the I/O.
    Failure,
    /// Ends with this status; the base does not see the I/O.
    Status(Status),
    /// Never comes back, until it is aborted or the device is reset.
    Pending,
    /// The byte at an offset is replaced (writes: before they reach the base; reads: after).
    CorruptData,
    /// Ends as if a resource had run out (`COMMAND_INTERRUPTED`: hosts retry).
    NoMemory,
}

impl Kind {
    /// From `bdev_error_inject_error`'s word.
    pub fn parse(word: &str) -> Option<Kind> {
        Some(match word {
            "failure" => Kind::Failure,
            "pending" => Kind::Pending,
            "corrupt_data" => Kind::CorruptData,
            "nomem" => Kind::NoMemory,
            _ => return None,
        })
    }
}

/// What `bdev_error_inject_error` takes.
#[derive(Clone, Copy, Debug)]
pub struct Injection {
    /// Operations that are hit; `None` = all.
    pub op: Option<Op>,
    /// What happens to them.
    pub kind: Kind,
    /// How many of them; 0 clears what was injected for `op`.
    pub num: u64,
    /// Byte in the I/O that `CorruptData` replaces.
    pub corrupt_offset_bytes: u64,
    /// What with; must not be 0 (0 XORs nothing).
    pub corrupt_value: u8,
}

struct ErrorDevice {
    info: DeviceInfo,
    base: Base,
    armed: AtomicBool,
    injections: Mutex<Vec<Injection>>,
}

/// Creates an error device; claims its base.
///
/// # Errors
/// Unknown or claimed base, name taken.
pub fn create(registry: &Arc<Registry>, options: ErrorOptions) -> Result<Arc<Bdev>, BdevError> {
    let name = format!("EE_{}", registry.get(&options.base_name)?.name());
    let base = Base::open(
        registry,
        &options.base_name,
        vec![name.clone()],
        "Error Injection Disk",
        OnResize::Follow,
    )?;
    let below = base.bdev().clone();
    let mut info = DeviceInfo::stacked_on(below.info(), name, "Error Injection Disk");
    info.blocks = below.blocks();
    info.uuid = options.uuid.unwrap_or(info.uuid);
    let device = ErrorDevice { info, base, armed: AtomicBool::new(false), injections: Mutex::default() };
    Base::register(registry, Arc::new(device), &below)
}

/// Injects errors into the error device `name`.
///
/// # Errors
/// Unknown, or no error device; a corruption without a value.
pub fn inject(registry: &Registry, name: &str, injection: Injection) -> Result<(), BdevError> {
    let bdev = registry.get(name)?;
    let device = bdev.device().as_ref().as_any();
    let Some(device) = device.downcast_ref::<ErrorDevice>() else {
        return Err(BdevError::Invalid(format!("{name} is no error injection bdev")));
    };
    if injection.kind == Kind::CorruptData && injection.corrupt_value == 0 {
        return Err(BdevError::Invalid("corrupt_value must not be 0".into()));
    }
    let mut all = device.injections.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|i| i.op != injection.op || (injection.num != 0 && i.kind != injection.kind));
    if injection.num > 0 {
        all.push(injection);
    }
    device.armed.store(!all.is_empty(), Ordering::Relaxed);
    Ok(())
}

impl ErrorDevice {
    /// Takes one hit off the injection that `op` runs into.
    fn hit(&self, op: Op) -> Option<Injection> {
        if !self.armed.load(Ordering::Relaxed) || op == Op::Reset {
            return None;
        }
        let mut all = self.injections.lock().unwrap_or_else(PoisonError::into_inner);
        let i = all.iter().position(|i| i.op.is_none_or(|o| o == op))?;
        all[i].num -= 1;
        let found = all[i];
        if found.num == 0 {
            all.remove(i);
            self.armed.store(!all.is_empty(), Ordering::Relaxed);
        }
        Some(found)
    }
}

impl Device for ErrorDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        let base = self.base.channel()?;
        Ok(Rc::new(ErrorQueue { device: self, base, pending: RefCell::default() }))
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
        json!({"error": {"base_bdev": self.base.name()}})
    }

    fn config(&self) -> Vec<(String, Value)> {
        let params = json!({"base_name": self.base.name(), "uuid": self.info.uuid.to_string()});
        vec![("bdev_error_create".into(), params)]
    }
}

struct ErrorQueue {
    device: Arc<ErrorDevice>,
    base: Channel,
    pending: RefCell<Vec<Box<Io>>>,
}

fn corrupt(data: &mut SgList, offset: u64, value: u8) {
    let mut at = offset as usize;
    for segment in data.segments_mut() {
        if at < segment.len() {
            segment.make_mut()[at] ^= value;
            return;
        }
        at -= segment.len();
    }
}

impl Queue for ErrorQueue {
    fn submit(self: Rc<Self>, mut io: Box<Io>) {
        let base = self.base.clone();
        if io.op == Op::Reset {
            for held in self.pending.borrow_mut().drain(..) {
                held.finish(Status::ABORTED_BY_REQUEST);
            }
            return base.submit(io);
        }
        let Some(hit) = self.device.hit(io.op) else { return base.submit(io) };
        match hit.kind {
            Kind::Failure => io.finish(Status::INTERNAL_ERROR),
            Kind::Status(status) => io.finish(status),
            Kind::NoMemory => io.finish(Status::COMMAND_INTERRUPTED),
            Kind::Pending => self.pending.borrow_mut().push(io),
            Kind::CorruptData => {
                if io.op == Op::Read {
                    io.push(self, hit.corrupt_offset_bytes, u64::from(hit.corrupt_value));
                } else {
                    corrupt(&mut io.data, hit.corrupt_offset_bytes, hit.corrupt_value);
                }
                base.submit(io);
            }
        }
    }

    fn abort(&self, tag: u64) -> bool {
        let mut pending = self.pending.borrow_mut();
        let Some(i) = pending.iter().position(|io| io.tag == tag) else {
            drop(pending);
            return self.base.abort(tag);
        };
        pending.swap_remove(i).finish(Status::ABORTED_BY_REQUEST);
        true
    }
}

impl Complete for ErrorQueue {
    fn complete(self: Rc<Self>, mut io: Box<Io>, frame: Frame) {
        corrupt(&mut io.data, frame.lba, frame.word as u8);
        let status = io.status();
        io.up(status);
    }
}
