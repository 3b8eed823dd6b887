//! The renewal: brings what lies under a domain's old keys under its present ones, in the background, at a bounded rate.
//!
//! Containers are gone through in order. Each live fragment is read and verified; its chunks get fingerprints of the present
//! secret; if its segment is of an old generation it is sealed again elsewhere (a `FragmentMove`, as the collector makes). Then
//! one record replaces the container's fingerprint list. Metadata segments of old generations are emptied by marking their
//! nodes changed, as the collector does. Maps do not change, so volumes, snapshots and clones are all included. When space is
//! short, whole segments are emptied first: that needs one free segment and gives one.
//!
//! Invariants:
//! - containers that are filled after the switch have lists of the present generation from the start, and nothing is added to
//!   those before it;
//! - a fingerprint belongs to what a slot holds, which never changes: it stays right whoever moves the fragment meanwhile;
//! - the mark ([`DomainRecord::renewed`]) moves behind what is done, and is saved by checkpoints together with it;
//! - what can not be read stays where it is, and keeps the old keys from being destroyed: the renewal ends and says why.
//!
//! [`DomainRecord::renewed`]: cryptfold_reduce_format::record::DomainRecord::renewed

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::container::FragmentEntry;
use cryptfold_reduce_format::entry::Record;
use cryptfold_reduce_format::fingerprint::Fingerprint;
use cryptfold_reduce_format::fragment::{CHUNK_BYTES, FragmentHeader};
use cryptfold_reduce_format::ids::{ChunkAddr, ContainerId, DomainId};
use cryptfold_reduce_format::node;
use cryptfold_reduce_format::record::domain_flags;
use smallvec::SmallVec;

use crate::error::PoolError;
use crate::index::Key;
use crate::info::{RenewalInfo, ScrubState};
use crate::pool::{Life, Pool};
use crate::scrub::together;
use crate::segments::Segment;

/// Stored bytes per second when nothing else is asked for.
pub const DEFAULT_RENEWAL_BYTES_PER_S: u64 = 100_000_000;
/// How long a renewal waits after an error that may pass.
const AGAIN: Duration = Duration::from_secs(5);
/// How often all is gone through when something is left each time.
const ROUNDS: u32 = 3;

/// Why a renewal does not go on.
pub(crate) enum Halt {
    /// The pool is being closed or has failed.
    Closed,
    /// Something that may pass: a device error, no space at the moment.
    Passing(Status),
    /// Something that a person has to look at.
    Stuck(String),
}

impl From<Status> for Halt {
    fn from(status: Status) -> Halt {
        Halt::Passing(status)
    }
}

impl From<PoolError> for Halt {
    fn from(error: PoolError) -> Halt {
        match error {
            PoolError::Stopped { status, .. } => Halt::Passing(status),
            PoolError::NoSpace(_) => Halt::Passing(Status::CAPACITY_EXCEEDED),
            PoolError::Slots { status, .. } => Halt::Passing(status),
            other => Halt::Stuck(other.to_string()),
        }
    }
}

/// The time up to which the rate allows what has been done.
pub(crate) struct Paid(reactor::Nanos);

impl Paid {
    pub async fn pay(&mut self, pool: &Pool, bytes: u64) {
        pool.renewal.borrow_mut().bytes += bytes;
        let rate = pool.renewal.borrow().bytes_per_s.max(1);
        let now = reactor::now();
        // A pause is not made up for.
        self.0 = self.0.max(now) + Duration::from_secs_f64(bytes as f64 / rate as f64);
        reactor::sleep(self.0 - now).await;
    }
}

/// A container that is being renewed.
struct Work {
    domain: DomainId,
    number: u64,
    /// Its fingerprints are of an old secret: these become the new ones, by slot.
    prints: Option<Vec<Fingerprint>>,
    /// Slots below this one are done.
    next: u16,
}

/// Fragments next to each other in a segment, which is pinned.
type Group = (Arc<Segment>, SmallVec<[FragmentEntry; 8]>);

impl Pool {
    /// Starts the renewal of all domains that need it, or gives the one that runs another rate.
    pub(crate) fn start_renewal(self: &Rc<Self>, bytes_per_s: u64) -> Result<RenewalInfo, Status> {
        self.check_writable()?;
        let mut renewal = self.renewal.borrow_mut();
        renewal.bytes_per_s = bytes_per_s;
        if renewal.state == ScrubState::Running {
            return Ok(renewal.clone());
        }
        *renewal = RenewalInfo { state: ScrubState::Running, bytes_per_s, ..RenewalInfo::default() };
        tracing::info!(pool = %self.name(), "renewal under new keys begins");
        let pool = self.clone();
        self.background(async move {
            let (state, reason) = match pool.run_renewal().await {
                Ok(()) => (ScrubState::Done, None),
                Err(Halt::Stuck(reason)) => (ScrubState::Stopped, Some(reason)),
                Err(_) => (ScrubState::Stopped, None),
            };
            let mut renewal = pool.renewal.borrow_mut();
            (renewal.state, renewal.reason) = (state, reason);
            let RenewalInfo { bytes, damaged, reason, .. } = &*renewal;
            tracing::info!(pool = %pool.name(), ?state, bytes, damaged, ?reason, "renewal under new keys ended");
        });
        Ok(renewal.clone())
    }

    /// Goes on with changes of keys that an opening finds.
    pub(crate) fn resume_renewal(self: &Rc<Self>) {
        if self.shard.borrow().domains.values().any(|d| d.is_changing()) {
            // Refused only while the pool is closed.
            let _ = self.start_renewal(DEFAULT_RENEWAL_BYTES_PER_S);
        }
    }

    pub(crate) fn goes_on(&self) -> Result<(), Halt> {
        if self.life.get() == Life::Open { Ok(()) } else { Err(Halt::Closed) }
    }

    async fn run_renewal(self: &Rc<Self>) -> Result<(), Halt> {
        let mut stuck: Vec<(DomainId, String)> = Vec::new();
        loop {
            let next = {
                let shard = self.shard.borrow();
                let mut changing = shard.domains.values().filter(|d| d.is_changing()).map(|d| d.record.id);
                changing.find(|id| !stuck.iter().any(|(other, _)| other == id))
            };
            let done = match next {
                Some(domain) => self.renew_domain(domain).await,
                None => self.end_secret().await,
            };
            match (done, next) {
                (Ok(()), None) => break,
                (Ok(()), Some(_)) => {}
                (Err(Halt::Stuck(reason)), Some(domain)) => stuck.push((domain, reason)),
                (Err(Halt::Passing(status)), _) => {
                    self.goes_on()?;
                    tracing::warn!(pool = %self.name(), domain = ?next, %status, "the renewal under new keys waits");
                    reactor::sleep(AGAIN).await;
                    self.goes_on()?;
                }
                (Err(halt), _) => return Err(halt),
            }
        }
        match stuck.into_iter().next() {
            Some((_, reason)) => Err(Halt::Stuck(reason)),
            None => Ok(()),
        }
    }

    /// The secret through which destroyed keys are still wrapped goes too: the end of a change may have failed before that.
    async fn end_secret(self: &Rc<Self>) -> Result<(), Halt> {
        if self.key_block.borrow().erasure[1].is_some() {
            let _paused = self.pause_counted().await?;
            self.retire_secret().await?;
        }
        Ok(())
    }

    async fn renew_domain(self: &Rc<Self>, domain: DomainId) -> Result<(), Halt> {
        let mut paid = Paid(reactor::now());
        for round in 0..ROUNDS {
            let Some((from, end)) = self.left_of(domain, round > 0) else { return Ok(()) };
            self.renewal.borrow_mut().damaged = 0;
            for number in from..end {
                self.goes_on()?;
                self.empty_while_short(domain, &mut paid).await?;
                self.renew_container(domain, number, &mut paid).await?;
                if let Some(d) = self.shard.borrow_mut().domains.get_mut(&domain.0) {
                    d.record.renewed = number + 1;
                }
                if number % 64 == 0 {
                    reactor::yield_now().await;
                }
            }
            self.renew_metadata(domain).await?;
            self.goes_on()?;
            // Hosts may replace the last that lay in clear after it was looked at: then it is free, and wiped in another try.
            for _ in 0..ROUNDS {
                let wiped = self.must_wipe(domain);
                if wiped {
                    self.wipe_free(&mut paid).await?;
                }
                if self.end_change(domain, wiped).await? {
                    // What was written since the switch may be there twice.
                    let _ = self.start_late(None);
                    return Ok(());
                }
                if !self.must_wipe(domain) {
                    break;
                }
            }
        }
        let (left, name) = {
            let shard = self.shard.borrow();
            let Ok(d) = shard.domain(domain) else { return Ok(()) };
            (shard.segments.old_bytes(domain, d.generation), d.record.name.clone())
        };
        Err(Halt::Stuck(format!(
            "{left} bytes of domain {name} can not be read, so its old keys are kept: repair the pool (what is lost becomes an error), then rotate again"
        )))
    }

    /// The containers to go through.
    fn left_of(&self, domain: DomainId, all: bool) -> Option<(u64, u64)> {
        let mut shard = self.shard.borrow_mut();
        let d = shard.domains.get_mut(&domain.0).filter(|d| d.is_changing())?;
        if all {
            d.record.renewed = 0;
        }
        Some((d.record.renewed.max(1), d.next_container))
    }

    /// Whether a domain was stored without encryption before, and nothing of that lives any more.
    fn must_wipe(&self, domain: DomainId) -> bool {
        let shard = self.shard.borrow();
        shard.domain(domain).is_ok_and(|d| {
            d.record.flags & domain_flags::WIPE != 0
                && shard.segments.old_bytes(domain, d.generation) == 0
                && !shard.segments.is_old_open(domain, d.generation)
        })
    }

    async fn renew_container(
        self: &Rc<Self>,
        domain: DomainId,
        number: u64,
        paid: &mut Paid,
    ) -> Result<(), Halt> {
        let mut work = Work { domain, number, prints: None, next: 0 };
        let mut first = true;
        loop {
            let busy = self.enter();
            self.throttle().await?;
            let mut pins = self.pins();
            for tree in [node::Tree::Containers, node::Tree::Fingerprints] {
                match self.load_leaf(tree, domain.0, number, &mut pins).await {
                    // What it covers is lost; what is under old keys of it stays, and is told at the end.
                    Err(Status::UNRECOVERED_READ) => return Ok(()),
                    loaded => loaded?,
                }
            }
            if std::mem::take(&mut first) && !self.begin(&mut work) {
                return Ok(());
            }
            let Some(group) = self.next_group(&mut work).await? else {
                if let Some(prints) = work.prints.take() {
                    self.set_prints(domain, number, prints)?;
                }
                return Ok(());
            };
            let bytes = self.renew_group(&mut work, group).await?;
            drop((pins, busy));
            paid.pay(self, bytes).await;
            self.goes_on()?;
        }
    }

    /// Looks at a container, which is in RAM. False: there is nothing to do.
    fn begin(&self, work: &mut Work) -> bool {
        let shard = self.shard.borrow();
        let Some(d) = shard.domains.get(&work.domain.0) else { return false };
        let Some(container) = d.containers.peek(work.number).filter(|c| c.used() > 0) else { return false };
        let old = d.fingerprints.peek(work.number).is_none_or(|leaf| leaf.generation != d.generation);
        work.prints = old.then(|| vec![Fingerprint::NONE; container.used().into()]);
        let is_old = |f: FragmentEntry| shard.segments.is_old(f.place.segment.segment.0, d.generation);
        old || container.fragments().any(|f| is_old(f) && container.live_in(&f) > 0)
    }

    /// The next live fragments that are to be read, as they are now; their segment is pinned. The container is in RAM.
    async fn next_group(&self, work: &mut Work) -> Result<Option<Group>, Status> {
        let look = |work: &Work| {
            let shard = self.shard.borrow();
            let Some(d) = shard.domains.get(&work.domain.0) else { return SmallVec::new() };
            let Some(container) = d.containers.peek(work.number) else { return SmallVec::new() };
            let wanted = |f: &FragmentEntry| {
                f.first_slot >= work.next
                    && container.live_in(f) > 0
                    && (work.prints.is_some()
                        || shard.segments.is_old(f.place.segment.segment.0, d.generation))
            };
            let mut next: SmallVec<[FragmentEntry; 8]> =
                container.fragments().filter(wanted).take(SLOTS_AT_ONCE).collect();
            // The collector may have turned their order round.
            let ascending = |pair: &[FragmentEntry]| pair[0].place.offset < pair[1].place.offset;
            let run = next.windows(2).take_while(|pair| ascending(pair)).count() + 1;
            next.truncate(run);
            next.truncate(together(&next));
            next
        };
        loop {
            let group = look(work);
            let (Some(head), Some(last)) = (group.first(), group.last()) else { return Ok(None) };
            let segment = match self.segment(head.place.segment.segment.0).await {
                Err(Status::UNRECOVERED_READ) => {
                    // Its header is damaged, so nothing in it opens.
                    self.renewal.borrow_mut().damaged += group.len() as u64;
                    work.next = last.end_slot();
                    continue;
                }
                segment => segment?,
            };
            let end = group.iter().map(|f| f.place.offset + f.unit_bytes).max().unwrap_or(0);
            if !segment.is_written(end) {
                // Lent just when the keys changed.
                self.flush().await?;
            }
            // The handle keeps the segment from being used for something else from here on.
            if look(work) == group && segment.is_written(end) {
                return Ok(Some((segment, group)));
            }
        }
    }

    /// Fingerprints fragments, and seals those again that lie under old keys. Gives the bytes read.
    async fn renew_group(self: &Rc<Self>, work: &mut Work, (segment, group): Group) -> Result<u64, Status> {
        let (Some(head), Some(last)) = (group.first(), group.last()) else { return Ok(0) };
        let (start, end) = (head.place.offset, last.place.offset + last.unit_bytes);
        work.next = last.end_slot();
        let read = |at: u32, len: u32| self.base.read(segment.start_bytes + u64::from(at), len as usize);
        let data = match read(start, end - start).await {
            // One place of it: the others can be read by themselves.
            Err(Status::UNRECOVERED_READ) => None,
            data => Some(data?),
        };
        for entry in &group {
            let Some(first) = ContainerId::new(work.number).and_then(|c| ChunkAddr::new(c, entry.first_slot))
            else {
                continue;
            };
            let alone;
            let sealed = match &data {
                Some(data) => &data[(entry.place.offset - start) as usize..][..entry.unit_bytes as usize],
                None => {
                    alone = match read(entry.place.offset, entry.unit_bytes).await {
                        Err(Status::UNRECOVERED_READ) => {
                            self.renewal.borrow_mut().damaged += 1;
                            continue;
                        }
                        data => data?,
                    };
                    &alone[..]
                }
            };
            let mut plain = vec![0; usize::from(entry.chunks) * CHUNK_BYTES];
            let decoded = {
                let mut decoder = self.core.decoder.borrow_mut();
                decoder.decode(&segment, entry, first, sealed, &mut plain)
            };
            if let Err(error) = decoded {
                self.renewal.borrow_mut().damaged += 1;
                self.fragment_damaged(work.domain, entry, first, &error);
                continue;
            }
            if let Some(prints) = &mut work.prints {
                let slots = usize::from(entry.first_slot)..usize::from(entry.end_slot());
                if let Some(prints) = prints.get_mut(slots) {
                    prints.copy_from_slice(&self.fingerprints_of(work.domain, &plain));
                }
            }
            let is_old = {
                let shard = self.shard.borrow();
                let generation = shard.domains.get(&work.domain.0).map(|d| d.generation);
                generation.is_some_and(|generation| shard.segments.is_old(segment.number(), generation))
            };
            if is_old && let Ok(header) = FragmentHeader::parse(sealed) {
                let mut sealed = sealed.to_vec();
                self.move_fragment(work.domain, &segment, entry.place.offset, &header, &mut sealed).await?;
            }
            reactor::yield_now().await;
        }
        Ok(u64::from(end - start))
    }

    /// Replaces a container's fingerprints, in the index too. Its leaves are in RAM.
    fn set_prints(&self, domain: DomainId, number: u64, new: Vec<Fingerprint>) -> Result<(), Status> {
        let scope = {
            let mut shard = self.shard.borrow_mut();
            let shard = &mut *shard;
            let Some(d) = shard.domains.get(&domain.0) else { return Ok(()) };
            let Some(id) = ContainerId::new(number) else { return Ok(()) };
            let Some(container) = d.containers.peek(number).filter(|c| c.used() > 0) else { return Ok(()) };
            let old = d.fingerprints.peek(number).map_or(&[][..], |leaf| &leaf.slots);
            for (slot, print) in new.iter().enumerate() {
                let Some(addr) = ChunkAddr::new(id, slot as u16) else { continue };
                if let Some(old) = old.get(slot).filter(|old| **old != Fingerprint::NONE) {
                    shard.index.remove(Key::new(domain, old), addr);
                }
                if *print != Fingerprint::NONE && container.refs(slot as u16) > 0 {
                    shard.index.insert(Key::new(domain, print), addr);
                }
            }
            d.scope()
        };
        let Some(container) = ContainerId::new(number) else { return Ok(()) };
        self.record(scope, &Record::Fingerprints { container, fingerprints: &new })
    }

    /// While space is short: empties segments of old generations, one after the other.
    async fn empty_while_short(self: &Rc<Self>, domain: DomainId, paid: &mut Paid) -> Result<(), Halt> {
        while self.is_short() {
            self.goes_on()?;
            let bytes = {
                let _busy = self.enter();
                self.wait_for_audit().await;
                let victim = {
                    let shard = self.shard.borrow();
                    let Ok(d) = shard.domain(domain) else { return Ok(()) };
                    let old = shard.segments.emptiest_old(domain, d.generation);
                    old.and_then(|number| Some((number, *shard.segments.entry(number)?)))
                };
                let Some((number, entry)) = victim else { return Ok(()) };
                match self.segment(number).await {
                    // Nothing in it can be moved.
                    Err(Status::UNRECOVERED_READ) => {}
                    segment => self.collect_data(&segment?, &entry).await?,
                }
                let mut shard = self.shard.borrow_mut();
                if shard.segments.entry(number).is_some_and(|now| {
                    now.incarnation == entry.incarnation && now.live_bytes >= entry.live_bytes
                }) {
                    // Nothing in it can be moved.
                    shard.segments.spoil(number);
                }
                entry.live_bytes
            };
            // Emptied segments are free when that is durable.
            self.flush().await?;
            paid.pay(self, bytes.into()).await;
        }
        Ok(())
    }

    /// Has checkpoints write all of a domain's metadata under its present keys.
    async fn renew_metadata(self: &Rc<Self>, domain: DomainId) -> Result<(), Halt> {
        for _ in 0..ROUNDS {
            let old: Vec<u32> = {
                let shard = self.shard.borrow();
                let Ok(d) = shard.domain(domain) else { return Ok(()) };
                shard.segments.old_metadata(domain, d.generation)
            };
            if old.is_empty() {
                return Ok(());
            }
            for number in old {
                self.goes_on()?;
                let _busy = self.enter();
                self.throttle().await?;
                let Some(entry) = self.shard.borrow().segments.entry(number).copied() else { continue };
                match self.segment(number).await {
                    Ok(segment) => match self.collect_metadata(&segment, &entry).await {
                        // The damaged node is reported; what else is there is gone through the next time.
                        Err(Status::UNRECOVERED_READ) => {}
                        collected => collected?,
                    },
                    Err(Status::UNRECOVERED_READ) => {}
                    Err(status) => return Err(status.into()),
                }
            }
            self.checkpoint().await?;
        }
        Ok(())
    }
}

/// Fragments looked at together, at most.
const SLOTS_AT_ONCE: usize = 64;
