//! [`KeyGate`]: a key that comes later, and that can be taken away and given back while hosts are connected.
//!
//! Whoever watches the key sets the gate, from any thread; each queue of the device looks at it with one atomic load per
//! I/O, and is woken when it changes, so that an idle queue wipes its copy of the key as well.

use std::fmt;
use std::sync::Arc;

use cryptfold_bdev::Status;

use crate::engine::XtsKey;
use crate::watched::{Changed, Watched};

/// What a host may do now.
#[derive(Clone, Debug)]
pub enum Access {
    /// Nothing yet: the key is not there. I/O ends with Namespace Not Ready; hosts try again.
    Waiting,
    /// Everything.
    Open(Arc<XtsKey>),
    /// Nothing any more, reads included. I/O ends with Access Denied and Do Not Retry.
    Fenced,
}

impl Access {
    /// For people: `waiting`, `open` or `fenced`.
    pub fn word(&self) -> &'static str {
        match self {
            Access::Waiting => "waiting",
            Access::Open(_) => "open",
            Access::Fenced => "fenced",
        }
    }

    /// The key, or the status that I/O ends with.
    pub(crate) fn key(&self) -> Result<&Arc<XtsKey>, Status> {
        match self {
            Access::Waiting => Err(Status::NAMESPACE_NOT_READY),
            Access::Open(key) => Ok(key),
            Access::Fenced => Err(Status::ACCESS_DENIED.do_not_retry()),
        }
    }
}

/// See the module.
pub struct KeyGate {
    access: Watched<Access>,
    /// Never changes: nobody has to be woken.
    fixed: bool,
}

impl fmt::Debug for KeyGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyGate({})", self.access().word())
    }
}

impl KeyGate {
    /// A key that stays.
    pub fn fixed(key: Arc<XtsKey>) -> Arc<KeyGate> {
        Arc::new(KeyGate { access: Watched::new(Access::Open(key)), fixed: true })
    }

    /// A key that is not there yet.
    pub fn waiting() -> Arc<KeyGate> {
        Arc::new(KeyGate { access: Watched::new(Access::Waiting), fixed: false })
    }

    /// What holds now.
    pub fn access(&self) -> Access {
        self.access.get()
    }

    /// Sets what holds from now on. I/O that is under way below ends as the new state says when it comes back.
    ///
    /// # Panics
    /// For a fixed key.
    pub fn set(&self, access: Access) {
        assert!(!self.fixed, "the gate of a fixed key was set");
        self.access.set(access);
    }

    pub(crate) fn is_fixed(&self) -> bool {
        self.fixed
    }

    #[inline]
    pub(crate) fn epoch(&self) -> u64 {
        self.access.epoch()
    }

    /// What holds, and the epoch that it belongs to.
    pub(crate) fn look(&self) -> (u64, Access) {
        self.access.look()
    }

    /// Ends when the epoch is another one than `seen`.
    pub(crate) fn changed(&self, seen: u64) -> Changed<'_, Access> {
        self.access.changed(seen)
    }
}
