//! What other cores than the home fill by themselves: open segments and containers that the home lends them.
//!
//! Owns, at the home, who has been lent what ([`Loan`]); on another core, what it fills ([`LentLane`]). Such a core compresses
//! and seals new chunks into its own log, under slots of its own container, and only then tells the home, which journals and
//! applies what it is told as it does with its own.
//!
//! Why that is safe:
//! - a record of a fragment reaches the home after the fragment is in its core's log, and a commit has each core that has
//!   recorded something write its log out ([`Pool::cut_loans`]) before it flushes the device and writes the records;
//! - a place is sealed once: a segment is lent to one core, and ends with it;
//! - a segment is not opened again while a sealed fragment is on its way to the home: the message holds its handle;
//! - what was sealed and never told the home of is as if it had not been written.
//!
//! Slots come in the order in which messages come: behind each other's back, or never.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::block::Block;
use cryptfold_reduce_format::ids::{ContainerId, DomainId, SLOTS, VolumeId};
use reactor::memory::Buf;
use reactor::sync::Mutex;
use reactor::{Handle, Task};
use smallvec::SmallVec;

use crate::core::Core;
use crate::log::{BUFFER_BYTES, DataLog, NotAppended};
use crate::pool::Pool;
use crate::segments::{Filler, Purpose, Segment};

/// What the home knows of a core that fills something.
pub(crate) struct Loan {
    core: Handle,
    domain: DomainId,
    /// Lent, and not known to be full.
    containers: SmallVec<[ContainerId; 4]>,
    /// Fragments in its log have been recorded since the last cut.
    recorded: bool,
}

/// Names a [`Loan`] as long as the pool is open.
#[derive(Clone, Copy)]
pub(crate) struct LoanId(usize);

/// What a core gives back.
#[derive(Default)]
pub(crate) struct Returned {
    /// Number of the segment that it has ended.
    segment: Option<u32>,
    /// Containers that get no more fragments, but for those that are on their way.
    containers: Vec<ContainerId>,
}

/// What a core asks for.
pub(crate) struct Ask {
    pub domain: DomainId,
    pub segment: bool,
    pub container: bool,
    pub returned: Returned,
}

/// What it gets.
pub(crate) struct Lent {
    loan: LoanId,
    /// With the block to begin it with.
    segment: Option<(Arc<Segment>, Box<Block>)>,
    container: Option<ContainerId>,
}

impl Pool {
    /// Lends `core` a segment or a container. `Ok(None)`: there is no free segment at the moment, so the home has to store what
    /// is to be stored. The caller is counted in.
    pub(crate) async fn lend(self: &Rc<Self>, core: Handle, ask: Ask) -> Result<Option<Lent>, Status> {
        let Ask { domain, segment, container, returned } = ask;
        let id = self.loan(core, domain);
        self.take_back(id, returned);
        self.throttle().await?;
        let mut lent = Lent { loan: id, segment: None, container: None };
        if segment {
            let durable = self.journal.borrow().durable();
            let number = self.shard.borrow_mut().segments.take_free(Purpose::Host, durable);
            let Some(number) = number else {
                self.collect.notify_one();
                return Ok(None);
            };
            let core = self.loans.borrow()[id.0].core.clone();
            let filler = Filler { core, pool: self.handle.id, domain };
            lent.segment = Some(self.begin_segment(number, domain, Some(filler))?);
        }
        if container {
            let number = self.draw_container(domain).ok_or(Status::INVALID_NAMESPACE)?;
            self.loans.borrow_mut()[id.0].containers.push(number);
            lent.container = Some(number);
        }
        Ok(Some(lent))
    }

    fn loan(&self, core: Handle, domain: DomainId) -> LoanId {
        let mut loans = self.loans.borrow_mut();
        let at = loans.iter().position(|loan| loan.core == core && loan.domain == domain);
        LoanId(at.unwrap_or_else(|| {
            loans.push(Loan { core, domain, containers: SmallVec::new(), recorded: false });
            loans.len() - 1
        }))
    }

    /// Remembers a core that uses the device for a volume, to have it let go of it at the end.
    pub(crate) fn lends_to(&self, core: Handle, volume: VolumeId) {
        let domain = self.shard.borrow().volumes.get(&volume.0).map(|v| v.record.domain);
        if let Some(domain) = domain {
            self.loan(core, domain);
        }
    }

    fn take_back(&self, id: LoanId, returned: Returned) {
        let mut loans = self.loans.borrow_mut();
        let loan = &mut loans[id.0];
        let now = self.now();
        let mut shard = self.shard.borrow_mut();
        if let Some(number) = returned.segment {
            shard.segments.close(number, now);
        }
        let Some(d) = shard.domains.get_mut(&loan.domain.0) else { return };
        for container in returned.containers {
            loan.containers.retain(|lent| *lent != container);
            d.containers.unpin(container.get());
            d.fingerprints.unpin(container.get());
        }
    }

    /// Fragments of a loan have been recorded.
    pub(crate) fn recorded(&self, id: LoanId) {
        self.loans.borrow_mut()[id.0].recorded = true;
    }

    /// Has all cores write out what has been recorded of theirs; what to wait for.
    pub(crate) fn cut_loans(&self) -> Vec<Task<Result<(), Status>>> {
        let mut loans = self.loans.borrow_mut();
        let pool = self.handle.id;
        let cuts = loans.iter_mut().filter(|loan| loan.recorded).map(|loan| {
            loan.recorded = false;
            let (core, domain) = (loan.core.clone(), loan.domain);
            reactor::spawn_local(async move {
                core.call(move || write_out(pool, domain)).await.unwrap_or(Err(Status::INTERNAL_ERROR))
            })
        });
        cuts.collect()
    }

    /// Takes everything back that has been lent. True: there was a segment among it.
    pub(crate) async fn recall(&self) -> Result<bool, Status> {
        let all: Vec<(LoanId, Handle, DomainId)> = {
            let loans = self.loans.borrow();
            let each = loans.iter().enumerate();
            each.map(|(at, loan)| (LoanId(at), loan.core.clone(), loan.domain)).collect()
        };
        let (mut any, mut result) = (false, Ok(()));
        for (id, core, domain) in all {
            let pool = self.handle.id;
            let returned = core.call(move || give_back(pool, domain)).await;
            match returned.unwrap_or(Err(Status::INTERNAL_ERROR)) {
                Ok(returned) => {
                    any |= returned.segment.is_some();
                    self.take_back(id, returned);
                }
                Err(status) => result = Err(status),
            }
        }
        result.map(|()| any)
    }

    /// Has all cores forget what they filled and let go of the device. What is not written is lost, and a cut finds nothing to
    /// write out any more: only when nothing is committed any more.
    pub(crate) async fn end_loans(&self) {
        let mut cores: Vec<Handle> = Vec::new();
        for loan in self.loans.borrow().iter() {
            if !cores.contains(&loan.core) {
                cores.push(loan.core.clone());
            }
        }
        let pool = self.handle.id;
        for core in cores {
            // A core that has ended has let go.
            let _ = core.call(move || forget(pool)).await;
        }
    }

    /// Containers of a domain that other cores fill.
    pub(crate) fn lent_containers(&self, domain: DomainId) -> SmallVec<[ContainerId; 4]> {
        let loans = self.loans.borrow();
        loans
            .iter()
            .filter(|loan| loan.domain == domain)
            .flat_map(|loan| loan.containers.iter().copied())
            .collect()
    }

    /// Loans that have something.
    pub(crate) fn lent(&self) -> usize {
        self.loans.borrow().iter().filter(|loan| !loan.containers.is_empty()).count()
    }

    /// Bytes of RAM in other cores' logs, about.
    pub(crate) fn lent_bytes(&self) -> usize {
        self.loans.borrow().len() * 2 * BUFFER_BYTES
    }
}

/// What a core other than the home fills in a domain.
pub(crate) struct LentLane {
    pub log: Rc<DataLog>,
    loan: Cell<Option<LoanId>>,
    /// The container that is being filled, and its next free slot.
    container: Cell<Option<(ContainerId, u16)>>,
    /// The next one.
    spare: Cell<Option<ContainerId>>,
    /// Full ones, to be told the home.
    full: RefCell<Vec<ContainerId>>,
    asking: Mutex<()>,
}

impl LentLane {
    /// What is missing before `chunks` chunks of at most `bytes` sealed bytes can be stored without a wait; `Err`: room in the
    /// log, which is waited for first.
    fn missing(&self, chunks: usize, bytes: usize) -> Result<(bool, bool), ()> {
        let segment = match self.log.room_for(bytes) {
            Ok(()) => false,
            Err(NotAppended::NoBuffer) => return Err(()),
            Err(_) => true,
        };
        let left = self.container.get().map_or(0, |(_, next)| SLOTS - usize::from(next));
        Ok((segment, left < chunks && self.spare.get().is_none()))
    }

    /// The container to go on in, and its next free slot. There is one: see [`LentLane::missing`].
    pub fn container(&self) -> Option<(ContainerId, u16)> {
        match self.container.get() {
            Some((container, next)) if usize::from(next) < SLOTS => Some((container, next)),
            full => {
                self.full.borrow_mut().extend(full.map(|full| full.0));
                self.container.set(self.spare.take().map(|container| (container, 0)));
                self.container.get()
            }
        }
    }

    /// The slots of the open container below `next` are given out.
    pub fn filled(&self, container: ContainerId, next: u16) {
        self.container.set(Some((container, next)));
    }

    /// The segment that is being filled, and whose it is.
    pub fn open(&self) -> Option<(LoanId, Arc<Segment>)> {
        Some((self.loan.get()?, self.log.segment()?))
    }

    fn end_segment(&self) -> Option<u32> {
        self.log.finish().map(|segment| segment.number())
    }
}

impl Core {
    fn lane(&self, domain: DomainId, segment_bytes: u32) -> Rc<LentLane> {
        let mut lanes = self.lanes.borrow_mut();
        let lane = lanes.entry(domain).or_insert_with(|| {
            Rc::new(LentLane {
                log: DataLog::new(self.base.clone(), segment_bytes),
                loan: Cell::new(None),
                container: Cell::new(None),
                spare: Cell::new(None),
                full: RefCell::default(),
                asking: Mutex::new(()),
            })
        });
        lane.clone()
    }

    /// Whether the device has refused what this core wrote.
    pub(crate) fn has_failed(&self) -> bool {
        self.lanes.borrow().values().any(|lane| lane.log.has_failed())
    }

    /// This core's lane of a domain, with room for `chunks` chunks of at most `bytes` sealed bytes; `ask` asks the home. `None`: it
    /// has nothing to lend.
    pub(crate) async fn ready<F>(
        self: &Rc<Self>,
        (domain, segment_bytes): (DomainId, u32),
        chunks: usize,
        bytes: usize,
        ask: impl Fn(Ask) -> F,
    ) -> Result<Option<Rc<LentLane>>, Status>
    where
        F: Future<Output = Result<Option<Lent>, Status>>,
    {
        let lane = self.lane(domain, segment_bytes);
        loop {
            match lane.missing(chunks, bytes) {
                Ok((false, false)) => return Ok(Some(lane)),
                Ok(_) => {}
                Err(()) => {
                    lane.log.make_room().await?;
                    continue;
                }
            }
            let _one = lane.asking.lock().await;
            // Somebody else may have asked meanwhile.
            let Ok((segment, container)) = lane.missing(chunks, bytes) else { continue };
            if !segment && !container {
                continue;
            }
            let ended = if segment { lane.end_segment() } else { None };
            let returned = Returned { segment: ended, containers: lane.full.take() };
            let Some(lent) = ask(Ask { domain, segment, container, returned }).await? else {
                return Ok(None);
            };
            self.keep();
            lane.loan.set(Some(lent.loan));
            if let Some((segment, header)) = lent.segment {
                lane.log.begin(segment, &header);
            }
            if lent.container.is_some() {
                lane.spare.set(lent.container);
            }
        }
    }
}

/// Writes out what this core has sealed so far.
async fn write_out(pool: u64, domain: DomainId) -> Result<(), Status> {
    let lane = Core::find(pool).and_then(|core| core.lanes.borrow().get(&domain).cloned());
    // Nothing has been lent to it. A lane goes only after the last commit: see `Pool::end_loans`.
    let Some(lane) = lane else { return Ok(()) };
    let number = lane.log.cut();
    lane.log.written(number).await
}

/// Ends what this core fills. The lane stays: when the device has refused something, that is known to whoever asks again.
async fn give_back(pool: u64, domain: DomainId) -> Result<Returned, Status> {
    let Some(core) = Core::find(pool) else { return Ok(Returned::default()) };
    let lane = core.lanes.borrow().get(&domain).cloned();
    let mut returned = Returned::default();
    let mut written = Ok(());
    if let Some(lane) = lane {
        let number = lane.log.cut();
        returned.segment = lane.end_segment();
        let open = lane.container.take().map(|open| open.0);
        returned.containers = lane.full.take().into_iter().chain(open).chain(lane.spare.take()).collect();
        written = lane.log.written(number).await;
    }
    written.map(|()| returned)
}

/// Drops all lanes of this core, also those that have never been lent anything.
async fn forget(pool: u64) {
    if let Some(core) = Core::find(pool) {
        core.lanes.borrow_mut().clear();
        core.ahead.ended().await;
        core.let_go().await;
    }
}

/// Sealed bytes that the core which fills the segment has and the device has not. `None`: the device has them, or it is the home
/// that fills it.
pub(crate) async fn from_filler(
    segment: &Arc<Segment>,
    offset: u32,
    bytes: u32,
) -> Result<Option<Buf>, Status> {
    let Some(filler) = segment.filler.as_ref().filter(|_| !segment.is_written(offset + bytes)) else {
        return Ok(None);
    };
    let (pool, domain) = (filler.pool, filler.domain);
    let look = {
        let segment = segment.clone();
        move || {
            let lane = Core::find(pool)?.lanes.borrow().get(&domain).cloned()?;
            lane.log.unwritten(&segment, offset, bytes)
        }
    };
    let found = if filler.core.is_current() {
        look()
    } else {
        let asked = filler.core.call(move || async move { look() }).await;
        asked.map_err(|_| Status::INTERNAL_ERROR)?
    };
    match found {
        None if !segment.is_written(offset + bytes) => Err(Status::INTERNAL_ERROR),
        found => Ok(found),
    }
}
