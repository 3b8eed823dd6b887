//! The io_uring of a reactor thread, owned by the reactor; and, from the first client on that needs it, a second one with wide
//! entries (128 and 32 bytes), for commands that do not fit the usual ones.
//!
//! Entries are queued by [`ClientGuard::submit`] and handed to the kernel once per turn of the loop. Completions come back
//! through [`RingClient::complete`] on the same core. A reactor sleeps in its first ring; the second one wakes it through its
//! eventfd, which is switched on for that time only.
//!
//! Invariants:
//! - A ring is used only by the thread that made it (it asks for SINGLE_ISSUER).
//! - A client with entries in flight is kept alive by the ring until the last one has completed; without, it is not, so a
//!   client may own its guard.
//! - The high half of `user_data` is the client's slot, the low half its token. Slot 0 is the ring's own.

use crate::core;
use crate::memory::{self, Buf, SLAB_BYTES};
use io_uring::types::{CancelBuilder, Fd, SubmitArgs, Timespec};
use io_uring::{Builder, IoUring, cqueue, opcode, squeue};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::rc::{Rc, Weak};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

/// Completions taken from the ring at once.
const REAP_BATCH: usize = 128;
/// How long the end of a reactor waits for the kernel to give back what is in flight.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
const OWN_SLOT: u32 = 0;
const WAKE: u64 = 0;
const IGNORE: u64 = 1;

/// Receives the completions of its entries.
pub trait RingClient {
    /// Entry `token` has completed (or, with `IORING_CQE_F_MORE` in `flags`, has produced one of several completions).
    /// `result`: as the operation defines it; negative: -errno.
    fn complete(&self, token: u32, result: i32, flags: u32);
}

/// There is no ring here: an ordinary thread or the simulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no io_uring on this core (simulated, or not a reactor thread)")]
pub struct RingUnavailable;

struct Slot {
    client: Weak<dyn RingClient>,
    /// Keeps the client alive while entries are in flight.
    busy: RefCell<Option<Rc<dyn RingClient>>>,
    in_flight: Cell<u32>,
}

/// The second ring can not be had.
#[derive(Debug, thiserror::Error)]
pub enum WideRingError {
    /// There is no ring at all.
    #[error(transparent)]
    Unavailable(#[from] RingUnavailable),
    /// The kernel refuses entries of 128 and 32 bytes.
    #[error("an io_uring with wide entries: {0} (Linux 6.1 or later is wanted)")]
    Refused(#[from] io::Error),
}

/// A client's right to submit. Completions of what is in flight are still delivered after it is dropped.
pub struct ClientGuard<S = squeue::Entry, C = cqueue::Entry>
where
    S: squeue::EntryMarker,
    C: cqueue::EntryMarker,
{
    ring: Rc<Ring<S, C>>,
    slot: Rc<Slot>,
    id: u32,
}

/// A right to submit entries of 128 bytes.
pub type WideGuard = ClientGuard<squeue::Entry128, cqueue::Entry32>;
pub(crate) type WideRing = Ring<squeue::Entry128, cqueue::Entry32>;

pub(crate) struct Ring<S = squeue::Entry, C = cqueue::Entry>
where
    S: squeue::EntryMarker,
    C: cqueue::EntryMarker,
{
    io: IoUring<S, C>,
    /// Entries that found the submission queue full while the kernel took none.
    overflow: RefCell<VecDeque<S>>,
    /// Index 0 is the ring's own and stays None.
    slots: RefCell<Vec<Option<Rc<Slot>>>>,
    wake_fd: RawFd,
    /// Slabs registered as fixed buffers, whether more may be tried, and whether anybody has asked for one: pinning takes long,
    /// and a core without files needs none.
    fixed_slabs: Cell<usize>,
    registering: Cell<bool>,
    fixed_wanted: Cell<bool>,
}

/// Registers a client with the ring of this core. The ring keeps `client` alive only while entries are in flight.
pub fn register(client: Rc<dyn RingClient>) -> Result<ClientGuard, RingUnavailable> {
    let ring = core::try_with(|core| core.ring.clone()).flatten().ok_or(RingUnavailable)?;
    Ok(ring.admit(&client))
}

/// Registers a client with the ring of wide entries of this core, which is made for the first.
///
/// # Errors
/// No ring here, or the kernel has none with such entries.
pub fn register_wide(client: Rc<dyn RingClient>) -> Result<WideGuard, WideRingError> {
    let ring = core::try_with(|core| core.wide_ring()).ok_or(RingUnavailable)??;
    Ok(ring.admit(&client))
}

/// Hands everything queued on this core to the kernel now, rather than at the end of the turn.
pub fn flush_submissions() {
    core::try_with(|core| {
        core.ring.iter().for_each(|ring| ring.flush());
        core.wide.get().iter().for_each(|ring| ring.flush());
    });
}

/// The index under which the memory of `buf` is registered with this core's ring, for READ_FIXED, WRITE_FIXED and
/// SEND_ZC. None: use the plain operation. The memory is registered after the first call on a core, a slab a turn.
#[inline]
pub fn fixed_buffer_index(buf: &Buf) -> Option<u16> {
    core::try_with(|core| core.ring.as_ref().and_then(|ring| ring.fixed_buffer_index(buf)))?
}

impl<S: squeue::EntryMarker, C: cqueue::EntryMarker> ClientGuard<S, C> {
    /// Queues an entry; its `user_data` is replaced. No allocation unless the kernel refuses entries.
    ///
    /// # Safety
    /// Memory and file descriptors named by the entry stay valid until [`RingClient::complete`] reports it finished, also
    /// if this guard or the task that submits is dropped before: the client must own them.
    ///
    /// # Panics
    /// If the client no longer exists.
    pub unsafe fn submit(&self, token: u32, mut entry: S) {
        if self.slot.in_flight.get() == 0 {
            let client = self.slot.client.upgrade().expect("the ring client was dropped before its guard");
            *self.slot.busy.borrow_mut() = Some(client);
        }
        self.slot.in_flight.set(self.slot.in_flight.get() + 1);
        entry.set_user_data(self.user_data(token));
        // SAFETY: by this function's contract.
        unsafe { self.ring.push(entry) };
    }

    /// The `user_data` of entry `token`, for operations that name another entry.
    pub fn user_data(&self, token: u32) -> u64 {
        u64::from(self.id) << 32 | u64::from(token)
    }

    /// Asks the kernel to cancel entry `token`. It completes in any case, with `-ECANCELED` if the request came in time.
    pub fn cancel(&self, token: u32) {
        let entry = opcode::AsyncCancel::new(self.user_data(token)).build().user_data(IGNORE);
        // SAFETY: a cancel names no memory and no descriptor.
        unsafe { self.ring.push(entry.into()) };
    }

    /// As [`fixed_buffer_index`], with the ring of this guard.
    #[inline]
    pub fn fixed_buffer_index(&self, buf: &Buf) -> Option<u16> {
        self.ring.fixed_buffer_index(buf)
    }

    /// Entries submitted and not finished.
    pub fn in_flight(&self) -> u32 {
        self.slot.in_flight.get()
    }
}

impl<S: squeue::EntryMarker, C: cqueue::EntryMarker> Drop for ClientGuard<S, C> {
    fn drop(&mut self) {
        if self.slot.in_flight.get() == 0 {
            self.ring.slots.borrow_mut()[self.id as usize] = None;
        }
    }
}

impl Ring {
    /// `entries`: size of the submission queue; the completion queue has four times as many.
    pub(crate) fn new(entries: u32, wake_fd: RawFd, fixed_buffers: bool) -> io::Result<Ring> {
        let ring = Ring::with(entries, wake_fd, fixed_buffers)?;
        ring.arm_wake();
        ring.flush();
        Ok(ring)
    }

    /// A ring of wide entries beside this one, which wakes the reactor through this one's eventfd.
    pub(crate) fn widened(&self) -> io::Result<WideRing> {
        let ring = Ring::with(self.io.params().sq_entries(), self.wake_fd, self.registering.get())?;
        ring.io.submitter().register_eventfd(self.wake_fd)?;
        ring.stay_awake();
        Ok(ring)
    }
}

impl<S: squeue::EntryMarker, C: cqueue::EntryMarker> Ring<S, C> {
    fn with(entries: u32, wake_fd: RawFd, fixed_buffers: bool) -> io::Result<Ring<S, C>> {
        let ring = Ring {
            io: build(entries)?,
            overflow: RefCell::default(),
            slots: RefCell::new(vec![None]),
            wake_fd,
            fixed_slabs: Cell::new(0),
            registering: Cell::new(false),
            fixed_wanted: Cell::new(false),
        };
        if !ring.io.params().is_feature_ext_arg() || !ring.io.params().is_feature_nodrop() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel's io_uring is older than 5.13",
            ));
        }
        if fixed_buffers
            && ring.io.submitter().register_buffers_sparse(memory::MAX_INDEXED_SLABS as u32).is_ok()
        {
            ring.registering.set(true);
        }
        Ok(ring)
    }

    fn admit(self: Rc<Self>, client: &Rc<dyn RingClient>) -> ClientGuard<S, C> {
        let client = Rc::downgrade(client);
        let slot = Rc::new(Slot { client, busy: RefCell::new(None), in_flight: Cell::new(0) });
        let mut slots = self.slots.borrow_mut();
        let free = slots.iter().skip(1).position(Option::is_none).map(|index| index + 1);
        let id = free.unwrap_or_else(|| {
            slots.push(None);
            slots.len() - 1
        });
        slots[id] = Some(slot.clone());
        drop(slots);
        ClientGuard { ring: self, slot, id: id as u32 }
    }

    #[inline]
    fn fixed_buffer_index(&self, buf: &Buf) -> Option<u16> {
        self.fixed_wanted.set(true);
        buf.slab_index().filter(|slab| usize::from(*slab) < self.fixed_slabs.get())
    }

    /// From now on completions wake the reactor, if this is the second ring. True: some are there already.
    pub(crate) fn may_wake(&self) -> bool {
        self.flush();
        // SAFETY: the only view of the completion queue at this time.
        unsafe { self.io.completion_shared() }.enable_eventfd();
        // Whatever the kernel adds before it sees that is seen here.
        fence(Ordering::SeqCst);
        self.has_completions()
    }

    /// Completions no longer wake the reactor, which looks for them itself.
    pub(crate) fn stay_awake(&self) {
        // SAFETY: the only view of the completion queue at this time.
        unsafe { self.io.completion_shared() }.disable_eventfd();
    }

    /// One poll for all wake-ups: each write to the eventfd posts a completion, so its counter is never read.
    fn arm_wake(&self) {
        let poll = opcode::PollAdd::new(Fd(self.wake_fd), libc::POLLIN as u32).multi(true).build();
        // SAFETY: names no memory; the eventfd belongs to `Shared`, which the core keeps longer than the ring.
        unsafe { self.push(poll.user_data(WAKE).into()) };
    }

    /// SAFETY: as [`ClientGuard::submit`].
    unsafe fn push(&self, entry: S) {
        if !self.overflow.borrow().is_empty() || !self.try_push(&entry) {
            self.flush();
            if !self.overflow.borrow().is_empty() || !self.try_push(&entry) {
                self.overflow.borrow_mut().push_back(entry);
            }
        }
    }

    fn try_push(&self, entry: &S) -> bool {
        // SAFETY: single-threaded and no other view of the submission queue exists; the entry's memory is guaranteed by
        // the contract of `submit`.
        unsafe { self.io.submission_shared().push(entry).is_ok() }
    }

    /// Submits what is queued, and lets the kernel run pending task work. No system call when there is nothing.
    pub(crate) fn flush(&self) {
        loop {
            self.requeue();
            let (queued, pending) = {
                // SAFETY: the only view of the submission queue at this time.
                let queue = unsafe { self.io.submission_shared() };
                (queue.len(), queue.taskrun() || queue.cq_overflow())
            };
            if queued == 0 && !pending {
                return;
            }
            match self.io.submit() {
                Ok(0) => return,
                Ok(_) if self.overflow.borrow().is_empty() => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Completions must be reaped first, or the kernel is short of memory: the next turn tries again.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => return,
                Err(error) => panic!("io_uring_enter: {error}"),
            }
        }
    }

    /// Moves entries that once found the queue full into it, oldest first.
    fn requeue(&self) {
        loop {
            let Some(entry) = self.overflow.borrow_mut().pop_front() else { return };
            if !self.try_push(&entry) {
                self.overflow.borrow_mut().push_front(entry);
                return;
            }
        }
    }

    /// Submits, then delivers completions that are there. Returns (all completions, of which clients').
    pub(crate) fn turn(&self) -> (usize, usize) {
        self.flush();
        self.register_slab();
        let mut buffer = [const { MaybeUninit::<C>::uninit() }; REAP_BATCH];
        // SAFETY: the only view of the completion queue; it ends, and frees the entries, before clients run.
        let batch = unsafe { self.io.completion_shared() }.fill(&mut buffer);
        let own = batch.iter().filter(|entry| entry.user_data() >> 32 == u64::from(OWN_SLOT)).count();
        for entry in batch.iter() {
            self.deliver(&entry.clone().into());
        }
        (batch.len(), batch.len() - own)
    }

    fn deliver(&self, entry: &cqueue::Entry) {
        let (id, token) = ((entry.user_data() >> 32) as u32, entry.user_data() as u32);
        let more = cqueue::more(entry.flags());
        if id == OWN_SLOT {
            if entry.user_data() == WAKE && !more && entry.result() != -libc::ECANCELED {
                assert!(entry.result() >= 0, "the poll of the wake-up eventfd failed: {}", entry.result());
                self.arm_wake();
            }
            return;
        }
        let Some(slot) = self.slots.borrow()[id as usize].clone() else { return };
        let client = slot.busy.borrow().clone();
        // Counted before the call, so that a client that submits from `complete` keeps itself alive.
        if !more {
            slot.in_flight.set(slot.in_flight.get() - 1);
        }
        if let Some(client) = &client {
            client.complete(token, entry.result(), entry.flags());
        }
        if slot.in_flight.get() == 0 {
            let busy = slot.busy.borrow_mut().take();
            drop((busy, client));
            // The slot and this function are the last owners when the guard is gone (it did not free the slot then).
            if Rc::strong_count(&slot) == 2 {
                self.slots.borrow_mut()[id as usize] = None;
            }
        }
    }

    /// Whether completions wait.
    pub(crate) fn has_completions(&self) -> bool {
        // SAFETY: the only views of both queues at this time.
        let (completions, submissions) =
            unsafe { (self.io.completion_shared(), self.io.submission_shared()) };
        !completions.is_empty() || submissions.taskrun() || submissions.cq_overflow()
    }

    /// Submits and sleeps until a completion comes or `limit` is over.
    pub(crate) fn sleep(&self, limit: Option<Duration>) {
        let time = limit.map(Timespec::from);
        let args = SubmitArgs::new();
        let args = match &time {
            Some(time) => args.timespec(time),
            None => args,
        };
        match self.io.submitter().submit_with_args(1, &args) {
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) => {}
            Err(error) => panic!("io_uring_enter: {error}"),
        }
    }

    /// Registers the next slab the arena has handed out, if any: one per turn, because pinning takes long.
    #[inline]
    fn register_slab(&self) {
        if self.fixed_wanted.get() && self.registering.get() && self.fixed_slabs.get() < memory::slab_count()
        {
            self.register_slab_at(self.fixed_slabs.get());
        }
    }

    #[cold]
    fn register_slab_at(&self, slab: usize) {
        let range = libc::iovec { iov_base: memory::slab_at(slab).cast(), iov_len: SLAB_BYTES };
        // SAFETY: slabs are never unmapped.
        let result = unsafe { self.io.submitter().register_buffers_update(slab as u32, &[range], None) };
        match result {
            Ok(()) => self.fixed_slabs.set(slab + 1),
            Err(error) => {
                static SAID: std::sync::Once = std::sync::Once::new();
                SAID.call_once(|| {
                    tracing::info!(
                        "the arena cannot be registered with io_uring (raise RLIMIT_MEMLOCK): {error}; going on without"
                    );
                });
                // What is registered stays usable.
                self.registering.set(false);
            }
        }
    }

    /// Cancels and waits until nothing is in flight. False: the kernel still owns something.
    pub(crate) fn drain(&self) -> bool {
        let idle = || self.slots.borrow().iter().flatten().all(|slot| slot.in_flight.get() == 0);
        let start = Instant::now();
        while !idle() {
            if start.elapsed() > DRAIN_LIMIT {
                return false;
            }
            let cancel = opcode::AsyncCancel2::new(CancelBuilder::any()).build().user_data(IGNORE);
            // SAFETY: a cancel names no memory and no descriptor.
            unsafe { self.push(cancel.into()) };
            self.sleep(Some(Duration::from_millis(10)));
            while self.turn().0 > 0 {}
        }
        true
    }
}

type Setup<S, C> = fn(&mut Builder<S, C>) -> &mut Builder<S, C>;

/// The best ring the kernel offers: task work only when this thread enters the kernel, no inter-processor interrupts.
fn build<S: squeue::EntryMarker, C: cqueue::EntryMarker>(entries: u32) -> io::Result<IoUring<S, C>> {
    let attempts: [Setup<S, C>; 3] = [
        |b| b.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all(),
        |b| b.setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag().setup_submit_all(),
        |b| b,
    ];
    let mut result = Err(io::Error::from_raw_os_error(libc::EINVAL));
    for options in attempts {
        let mut builder = IoUring::<S, C>::builder();
        options(builder.setup_cqsize(entries.saturating_mul(4)).setup_clamp().dontfork());
        result = builder.build(entries);
        match &result {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            _ => break,
        }
    }
    result
}
