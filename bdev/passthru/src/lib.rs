//! The pass-through device: another name for its base. It shows the smallest possible layer: no frame, no copy.

use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{Base, Bdev, BdevError, Channel, Device, DeviceInfo, Io, OnResize, Queue, Registry};
use serde_json::{Value, json};
use uuid::Uuid;

/// What `bdev_passthru_create` takes.
#[derive(Clone, Debug)]
pub struct PassthruOptions {
    /// Name in the registry.
    pub name: String,
    /// The device below.
    pub base_bdev_name: String,
    /// Identity; random when not given.
    pub uuid: Option<Uuid>,
}

struct Passthru {
    info: DeviceInfo,
    base: Base,
}

/// Creates a pass-through device; claims its base.
///
/// # Errors
/// Unknown or claimed base, name taken.
pub fn create(registry: &Arc<Registry>, options: PassthruOptions) -> Result<Arc<Bdev>, BdevError> {
    let uppers = vec![options.name.clone()];
    let base = Base::open(registry, &options.base_bdev_name, uppers, "Passthru", OnResize::Follow)?;
    let below = base.bdev().clone();
    let mut info = DeviceInfo::stacked_on(below.info(), options.name, "passthru");
    info.blocks = below.blocks();
    info.uuid = options.uuid.unwrap_or(info.uuid);
    Base::register(registry, Arc::new(Passthru { info, base }), &below)
}

impl Device for Passthru {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        Ok(Rc::new(PassthruQueue { base: self.base.channel()? }))
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
        json!({"passthru": {"name": self.info.name, "base_bdev_name": self.base.name()}})
    }

    fn config(&self) -> Vec<(String, Value)> {
        let params = json!({"base_bdev_name": self.base.name(), "name": self.info.name, "uuid": self.info.uuid.to_string()});
        vec![("bdev_passthru_create".into(), params)]
    }
}

struct PassthruQueue {
    base: Channel,
}

impl Queue for PassthruQueue {
    #[inline]
    fn submit(self: Rc<Self>, io: Box<Io>) {
        self.base.submit(io);
    }

    fn abort(&self, tag: u64) -> bool {
        self.base.abort(tag)
    }
}
