//! What a pool has on every core that uses it: a channel to the device, codecs, fragments decoded lately, and, on other cores
//! than the home, segments and containers that it fills by itself (see [`crate::lend`]).
//!
//! Owns nothing of the pool's state. The expensive part of an I/O (hash, codec, cipher) runs on the core that the I/O came to;
//! only small messages about it go to the pool's home.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use cryptfold_bdev::{BdevError, Descriptor};
use cryptfold_reactor::{self as reactor, ReactorId, Task};
use cryptfold_reduce_format::codec::Compressor;
use cryptfold_reduce_format::ids::{DomainId, VolumeId};

use crate::ahead::Ahead;
use crate::base::Base;
use crate::hash::FastMap;
use crate::ingest::SealAs;
use crate::lend::LentLane;
use crate::read::{Decoder, FragmentCache};

/// Pieces without any duplicate, one after the other, after which the next is sealed before the home is asked: that saves a
/// message and a look-up. When it was wrong, what has been sealed of the piece is lost room in a segment.
const NEW_RUN: u32 = 8;
/// Pieces on their way that were sealed so, at most; one after a run that has just been long enough.
const MOST_GUESSES: u32 = 8;

/// See the module's head.
pub(crate) struct Core {
    pub base: Base,
    pub compressor: RefCell<Compressor>,
    pub decoder: RefCell<Decoder>,
    pub fragments: RefCell<FragmentCache>,
    pub ahead: Ahead,
    pub lanes: RefCell<FastMap<DomainId, Rc<LentLane>>>,
    /// The volume that was written last from here: how its chunks are sealed, and how many pieces were all new by now.
    new_run: Cell<Option<(VolumeId, SealAs, u32)>>,
    /// Pieces on their way that were taken for new.
    guesses: Cell<u32>,
    /// Keeps all this while there is something in `lanes`, whether or not a queue is open.
    keeper: RefCell<Option<Task<()>>>,
}

/// A piece that was taken for new.
pub(crate) struct Guess(Rc<Core>);

impl Drop for Guess {
    fn drop(&mut self) {
        self.0.guesses.set(self.0.guesses.get() - 1);
    }
}

thread_local! {
    /// By pool and (in the simulator there are several on a thread) core; shared by the queues.
    static CORES: RefCell<HashMap<(u64, ReactorId), Weak<Core>>> = RefCell::default();
}

impl Core {
    pub fn new(base: Base) -> Rc<Core> {
        Rc::new(Core {
            base,
            compressor: RefCell::new(Compressor::new()),
            decoder: RefCell::default(),
            fragments: RefCell::default(),
            ahead: Ahead::default(),
            lanes: RefCell::default(),
            new_run: Cell::default(),
            guesses: Cell::default(),
            keeper: RefCell::default(),
        })
    }

    /// This core's part of a pool, if there is one. Never the home's.
    pub fn find(pool: u64) -> Option<Rc<Core>> {
        let key = (pool, reactor::current().id());
        CORES.with_borrow(|cores| cores.get(&key).and_then(Weak::upgrade))
    }

    /// How to seal the next piece of a volume, if it is to be taken for new; with a guard for as long as it is on its way, because
    /// few may be wrong at once.
    pub fn guess_new(self: &Rc<Self>, volume: VolumeId) -> Option<(SealAs, Guess)> {
        let (_, seal, run) = self.new_run.get().filter(|run| run.0 == volume && run.2 >= NEW_RUN)?;
        let under_way = self.guesses.get();
        (under_way < MOST_GUESSES.min(run - NEW_RUN + 1)).then(|| {
            self.guesses.set(under_way + 1);
            (seal, Guess(self.clone()))
        })
    }

    /// A piece of a volume has been written.
    pub fn was_new(&self, volume: VolumeId, seal: SealAs, all_new: bool) {
        let before = self.new_run.get().filter(|run| run.0 == volume).map_or(0, |run| run.2);
        self.new_run.set(all_new.then(|| (volume, seal, before.saturating_add(1))));
    }

    /// A piece was refused.
    pub fn end_run(&self) {
        self.new_run.set(None);
    }

    /// Has this core's part outlive its queues, until [`Core::let_go`].
    pub fn keep(self: &Rc<Self>) {
        let mut keeper = self.keeper.borrow_mut();
        if keeper.is_none() {
            let core = self.clone();
            *keeper = Some(reactor::spawn_local(async move {
                std::future::pending::<()>().await;
                drop(core);
            }));
        }
    }

    /// Ends what [`Core::keep`] began.
    pub async fn let_go(&self) {
        let keeper = self.keeper.take();
        if let Some(keeper) = keeper {
            keeper.cancel().await;
        }
    }

    /// This core's part of a pool.
    pub fn of(pool: u64, descriptor: &Arc<Descriptor>) -> Result<Rc<Core>, BdevError> {
        if let Some(core) = Core::find(pool) {
            return Ok(core);
        }
        let core = Core::new(Base::open(descriptor)?);
        CORES.with_borrow_mut(|cores| {
            cores.retain(|_, core| core.strong_count() > 0);
            cores.insert((pool, reactor::current().id()), Rc::downgrade(&core));
        });
        Ok(core)
    }
}
