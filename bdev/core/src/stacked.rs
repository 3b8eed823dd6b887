//! What every device on top of another one needs: the base opened, claimed, followed when it is removed or resized,
//! and given back at the end.

use std::sync::{Arc, Mutex};

use crate::registry::locked;
use crate::{Access, Bdev, BdevError, BdevEvent, Channel, Descriptor, Device, Registry};

/// A claimed base device.
pub struct Base {
    name: String,
    bdev: Arc<Bdev>,
    descriptor: Mutex<Option<Arc<Descriptor>>>,
}

/// What happens to the layers when their base changes size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnResize {
    /// The upper device follows.
    Follow,
    /// The upper device follows; each of its blocks is so many of the base's (not 0).
    FollowInUnitsOf(u64),
    /// The upper device keeps its size (or handles it in its own way).
    Keep,
}

impl Base {
    /// Opens and claims `base` for the devices `uppers`, which are unregistered when the base goes away.
    ///
    /// # Errors
    /// Unknown or claimed base.
    pub fn open(
        registry: &Arc<Registry>,
        base: &str,
        uppers: Vec<String>,
        module: &str,
        on_resize: OnResize,
    ) -> Result<Base, BdevError> {
        let weak = Arc::downgrade(registry);
        let descriptor = registry.open(base, Access::ReadWrite, move |event| {
            let Some(registry) = weak.upgrade() else { return };
            for upper in &uppers {
                match event {
                    // One that is unknown or being removed already needs nothing.
                    BdevEvent::Removed => drop(registry.unregister(upper)),
                    BdevEvent::Resized { blocks } => {
                        let follows = match on_resize {
                            OnResize::Follow => Some(blocks),
                            OnResize::FollowInUnitsOf(n) => blocks.checked_div(n),
                            OnResize::Keep => None,
                        };
                        if let (Some(blocks), Ok(b)) = (follows, registry.get(upper)) {
                            b.set_blocks(blocks);
                        }
                    }
                }
            }
        })?;
        descriptor.claim(module)?;
        let bdev = descriptor.bdev().clone();
        Ok(Base { name: bdev.name().to_string(), bdev, descriptor: Mutex::new(Some(descriptor)) })
    }

    /// Registers a device on top; a base that was removed meanwhile takes it along.
    ///
    /// # Errors
    /// As [`Registry::register`], and when the base is gone.
    pub fn register(
        registry: &Arc<Registry>,
        device: Arc<dyn Device>,
        base: &Arc<Bdev>,
    ) -> Result<Arc<Bdev>, BdevError> {
        let upper = registry.register(device)?;
        if base.is_removing() {
            drop(registry.unregister(upper.name()));
            return Err(BdevError::Removing(base.name().into()));
        }
        Ok(upper)
    }

    /// The base's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The base.
    pub fn bdev(&self) -> &Arc<Bdev> {
        &self.bdev
    }

    /// A channel of the base for the current reactor.
    ///
    /// # Errors
    /// When the base is gone or has no more queues.
    pub fn channel(&self) -> Result<Channel, BdevError> {
        let d = locked(&self.descriptor).clone();
        d.ok_or_else(|| BdevError::Removing(self.name.clone()))?.channel()
    }

    /// Gives the base back. Called from [`Device::destruct`].
    pub fn close(&self) {
        drop(locked(&self.descriptor).take());
    }
}
