//! What a pool has on every core that uses it: a channel to the device, codecs, and fragments decoded lately.
//!
//! Owns nothing of the pool's state. The expensive part of an I/O (hash, codec, cipher of reads) runs on the core that
//! the I/O came to; only small messages about it go to the pool's home.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use cryptfold_bdev::{BdevError, Descriptor};
use cryptfold_reduce_format::codec::{Compressor, Decompressor};

use crate::base::Base;
use crate::read::FragmentCache;

/// See the module's head.
pub(crate) struct Core {
    pub base: Base,
    pub compressor: RefCell<Compressor>,
    pub decompressor: RefCell<Decompressor>,
    pub fragments: RefCell<FragmentCache>,
}

thread_local! {
    /// By pool; shared by the queues of this core.
    static CORES: RefCell<HashMap<u64, Weak<Core>>> = RefCell::default();
}

impl Core {
    pub fn new(base: Base) -> Rc<Core> {
        Rc::new(Core {
            base,
            compressor: RefCell::new(Compressor::new()),
            decompressor: RefCell::new(Decompressor::new()),
            fragments: RefCell::default(),
        })
    }

    /// This core's part of a pool.
    pub fn of(pool: u64, descriptor: &Arc<Descriptor>) -> Result<Rc<Core>, BdevError> {
        if let Some(core) = CORES.with_borrow(|cores| cores.get(&pool).and_then(Weak::upgrade)) {
            return Ok(core);
        }
        let core = Core::new(Base::open(descriptor)?);
        CORES.with_borrow_mut(|cores| {
            cores.retain(|_, core| core.strong_count() > 0);
            cores.insert(pool, Rc::downgrade(&core));
        });
        Ok(core)
    }
}
