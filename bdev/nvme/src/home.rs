//! The part of a controller that lives on its home reactor: bringing it up, resetting it, letting it go.
//!
//! Owns the admin queue and every change of state. Invariant: memory that a controller was given is reused only after it was
//! disabled (CSTS.RDY = 0), kept from memory by its bus, or is gone.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cryptfold_bdev::{Removal, Status};
use cryptfold_nvmf_spec::Sqe;
use cryptfold_nvmf_spec::features::{AsyncEventConfig, Fid, NumberOfQueues};
use cryptfold_nvmf_spec::identify::{Cns, IdentifyController};
use cryptfold_nvmf_spec::opcode::Admin as Opcode;
use cryptfold_nvmf_spec::property::{Cap, Cc, Crto, Csts};
use cryptfold_nvmf_spec::sqe::AbortCdw10;
use cryptfold_reactor as reactor;
use reactor::sync::{Event as Flag, Notify};
use zerocopy::little_endian::U32;

use crate::admin::{self, AdminError, AdminQueue};
use crate::bus::{ALL_ONES, Bus, reg};
use crate::controller::{Controller, Notice, NvmeError, lock};
use crate::lifecycle::{Event, State};
use crate::pair::Pair;
use crate::ring::{Ring, RingMemory, Shadow};

/// OACS: Doorbell Buffer Config (NVMe Base 2.0 section 5.17.2.1).
const OACS_DBBUF: u16 = 1 << 8;
/// How often a register is read while it is waited for.
const STEP: Duration = Duration::from_millis(1);
/// Asynchronous Event Requests outstanding, at most.
const EVENTS: u8 = 4;

pub(crate) struct Home {
    pub controller: Arc<Controller>,
    pub admin: Rc<AdminQueue>,
    bus: Arc<dyn Bus>,
    cap: Cell<Cap>,
    /// Says that a reset is over.
    settled: Notify,
    closed: Flag,
    /// Removals of devices that were asked for.
    leaving: RefCell<Vec<Removal>>,
    /// Abort commands that may be outstanding (ACL + 1), and how many are.
    aborts: Cell<(u8, u8)>,
    shadow: RefCell<Option<Shadow>>,
    /// Vectors are on: queues may name theirs.
    interrupts: Cell<bool>,
}

impl Home {
    /// On the home reactor. Lives until [`Home::close`].
    pub fn start(controller: Arc<Controller>) -> Rc<Home> {
        let bus = controller.bus.clone();
        let home = Rc::new(Home {
            admin: AdminQueue::new(bus.clone(), controller.options.interrupts),
            cap: Cell::default(),
            settled: Notify::new(),
            closed: Flag::new(),
            leaving: RefCell::default(),
            aborts: Cell::new((1, 0)),
            shadow: RefCell::default(),
            interrupts: Cell::new(false),
            controller,
            bus,
        });
        home.controller.add_home(&home);
        let guard =
            reactor::register_poller(&format!("nvme_{}_admin", home.controller.name), home.admin.clone());
        let keep = home.clone();
        reactor::spawn_local(async move {
            keep.closed.wait().await;
            drop(guard);
        })
        .detach();
        home
    }

    /// Leaves the reactor.
    pub fn close(&self) {
        self.admin.end();
        self.closed.set();
    }

    fn csts(&self) -> Result<Csts, NvmeError> {
        match self.bus.read32(reg::CSTS) {
            ALL_ONES => Err(NvmeError::Vanished),
            other => Ok(Csts(other)),
        }
    }

    /// Time-out for CSTS.RDY to follow CC.EN: CAP.TO, or CRTO.CRWMT of a controller that has it (NVMe Base 2.0 sections
    /// 3.1.3.1 and 3.1.3.19).
    fn ready_limit(&self) -> Duration {
        let cap = self.cap.get();
        let mut units = cap.to();
        if cap.crms() & 1 != 0 {
            let crto = Crto(self.bus.read32(reg::CRTO));
            units = units.max(crto.crwmt().into());
        }
        Duration::from_millis(500) * units.max(1) as u32
    }

    async fn wait_ready(&self, ready: bool) -> Result<(), NvmeError> {
        let limit = self.ready_limit();
        let end = reactor::now() + limit;
        loop {
            let csts = self.csts()?;
            if (csts.rdy() == 1) == ready {
                return Ok(());
            }
            if ready && csts.cfs() == 1 {
                return Err(NvmeError::Fatal);
            }
            if reactor::now() >= end {
                let what = if ready { "ready" } else { "disabled" };
                return Err(NvmeError::Never { what, seconds: limit.as_secs_f32() });
            }
            reactor::sleep(STEP).await;
        }
    }

    /// Takes the controller's queues away from it (NVMe Base 2.0 section 3.7.2, controller reset). It no longer uses memory
    /// afterwards, even if this fails.
    async fn disable(&self) -> Result<(), NvmeError> {
        let cc = self.bus.read32(reg::CC);
        if cc == ALL_ONES {
            self.bus.stop_dma();
            return Err(NvmeError::Vanished);
        }
        // A controller that is coming up must be waited for before it is told to go down (section 3.1.3.6), unless it failed.
        if Cc(cc).en() == 1 && self.csts()?.cfs() == 0 {
            // What this finds is found again below.
            let _ = self.wait_ready(true).await;
        }
        if Cc(cc).en() == 1 {
            self.bus.write32(reg::CC, Cc(cc).with_en(0).with_shn(0).0);
        }
        let mut result = self.wait_ready(false).await;
        if result.is_err() {
            // The function's reset is the last means.
            if self.bus.clone().reset().await.is_ok() {
                result = self.wait_ready(false).await;
            }
        }
        if result.is_err() {
            self.bus.stop_dma();
        }
        result
    }

    /// From reset to queues (NVMe Base 2.0 section 3.5.1, memory-based controller initialization).
    pub async fn bring_up(&self) -> Result<(), NvmeError> {
        let cap = Cap(self.bus.read64(reg::CAP));
        if cap.0 as u32 == ALL_ONES {
            return Err(NvmeError::Vanished);
        }
        self.cap.set(cap);
        if cap.mpsmin() != 0 {
            return Err(NvmeError::Unsupported(format!(
                "memory pages of {} KiB at least (CAP.MPSMIN); 4 KiB are needed",
                4 << cap.mpsmin()
            )));
        }
        if cap.css() & 1 == 0 && cap.css() & 1 << 6 == 0 {
            return Err(NvmeError::Unsupported("no NVM command set (CAP.CSS)".into()));
        }
        self.disable().await?;
        self.admin.close();
        *self.shadow.borrow_mut() = None;
        self.bus.allow_dma();
        let depth = admin::DEPTH;
        let memory = RingMemory::new(&*self.bus, depth)?;
        let [asq, acq] = memory.addresses();
        let size = u32::from(depth - 1);
        self.bus.write32(reg::AQA, size << 16 | size);
        self.bus.write64(reg::ASQ, asq);
        self.bus.write64(reg::ACQ, acq);
        let dstrd = cap.dstrd() as u32;
        self.admin.open(Ring::new(self.bus.clone(), memory, 0, dstrd, None));
        let css = if cap.css() & 1 != 0 { 0 } else { 0b110 };
        self.bus.write32(reg::CC, Cc::default().with_en(1).with_css(css).with_iosqes(6).with_iocqes(4).0);
        self.wait_ready(true).await?;
        self.identify().await?;
        let pairs = self.queues(cap).await?;
        self.interrupts.set(self.controller.options.interrupts && self.enable_interrupts());
        self.events(pairs, cap).await;
        self.make_pairs(pairs, cap).await?;
        match self.admin.stuck.take() {
            Some(what) => Err(NvmeError::Silent(what)),
            None => Ok(()),
        }
    }

    /// Before queues are made: one that names a vector other than 0 wants MSI-X to be on (NVMe Base 2.0 section 5.4).
    fn enable_interrupts(&self) -> bool {
        match self.bus.enable_interrupts() {
            Ok(()) => true,
            Err(e) => {
                tracing::warn!("{}: no interrupts, its reactors keep polling: {e}", self.controller.name);
                false
            }
        }
    }

    async fn identify(&self) -> Result<(), NvmeError> {
        let limit = self.controller.options.admin_timeout;
        let id: Box<IdentifyController> =
            self.admin.identify("Identify Controller", Cns::Controller, 0, limit).await?;
        let before = self.controller.identity();
        if before.sn != [0; 20] && before.sn != id.sn {
            return Err(NvmeError::Another(crate::identity::text(&id.sn)));
        }
        self.aborts.set((id.acl.saturating_add(1), 0));
        self.controller.set_identity(&id);
        Ok(())
    }

    /// How many I/O queue pairs there will be: what is wanted, granted (Number of Queues, NVMe Base 2.0 section 5.27.1.5) and
    /// reachable. After a reset as many as before.
    async fn queues(&self, cap: Cap) -> Result<u16, NvmeError> {
        let before = self.controller.pairs() as u16;
        let options = &self.controller.options;
        let wanted = match before {
            0 => (self.controller.cores.len().min(usize::from(options.max_pairs.max(1)))) as u32,
            n => n.into(),
        };
        let mut sqe = Sqe::new(Opcode::SetFeatures as u8);
        sqe.cdw10 = U32::new(Fid::NumberOfQueues as u32);
        sqe.cdw11 = U32::new(NumberOfQueues::default().with_nsq(wanted - 1).with_ncq(wanted - 1).0);
        let limit = Some(options.admin_timeout);
        let (cqe, _) = self.admin.run("Set Features (number of queues)", sqe, None, limit).await?;
        let granted = NumberOfQueues(cqe.dw0.get()).pairs();
        let reachable = self.bus.registers_bytes().saturating_sub(reg::DOORBELLS) / (8 << cap.dstrd());
        let count = wanted.min(granted).min(reachable.saturating_sub(1)) as u16;
        if count == 0 || count < before {
            return Err(NvmeError::Unsupported(format!("{count} I/O queue pairs; {} needed", before.max(1))));
        }
        Ok(count)
    }

    /// Asks for events and for shadow doorbells; what the controller does not have is done without.
    async fn events(&self, pairs: u16, cap: Cap) {
        let (id, limit) = (self.controller.identity(), Some(self.controller.options.admin_timeout));
        let wanted = AsyncEventConfig(0xff).with_namespace_attributes(1).with_firmware_activation(1).0;
        let mut sqe = Sqe::new(Opcode::SetFeatures as u8);
        sqe.cdw10 = U32::new(Fid::AsyncEventConfig as u32);
        // SMART warnings are mandatory, notices as OAES says.
        sqe.cdw11 = U32::new(wanted & (id.oaes.get() | 0xff));
        if let Err(e) = self.admin.run("Set Features (asynchronous events)", sqe, None, limit).await {
            tracing::info!("{}: {e}", self.controller.name);
        }
        // Two doorbells a queue pair, the administrator's too, have to lie within a page.
        let doorbells = (2 * usize::from(pairs) + 2) * (4 << cap.dstrd());
        if id.oacs.get() & OACS_DBBUF == 0 || doorbells > 4096 {
            return;
        }
        let shadow = (|| {
            Ok::<_, AdminError>(Shadow {
                values: self.admin.buffer(4096)?,
                event_indices: self.admin.buffer(4096)?,
            })
        })();
        let Ok(shadow) = shadow else { return };
        let mut sqe = Sqe::new(Opcode::DoorbellBufferConfig as u8);
        sqe.sgl = cryptfold_nvmf_spec::Sgl::from_prps(shadow.values.iova(), shadow.event_indices.iova());
        match self.admin.run("Doorbell Buffer Config", sqe, None, limit).await {
            Ok(_) => *self.shadow.borrow_mut() = Some(shadow),
            Err(e) => tracing::info!("{}: {e}", self.controller.name),
        }
    }

    /// Creates I/O queues (PCIe Transport 1.0 section 3.1.1, NVMe Base 2.0 sections 5.4 and 5.5) and hands them to their owners.
    async fn make_pairs(&self, count: u16, cap: Cap) -> Result<(), NvmeError> {
        let c = &self.controller;
        let depth = u32::from(c.options.queue_depth).min(cap.mqes() as u32 + 1).max(2) as u16;
        for index in 0..usize::from(count) {
            let memory = RingMemory::new(&*self.bus, depth)?;
            let depth = memory.depth();
            let qid = index as u16 + 1;
            self.create_queues(qid, &memory).await?;
            let owner = c.cores[index].clone();
            let shadow = self.shadow.borrow().as_ref().map(Shadow::share);
            let (controller, bus, dstrd) = (c.clone(), self.bus.clone(), cap.dstrd() as u32);
            let (known, interrupts) = (index < c.pairs(), self.interrupts.get());
            owner
                .call(move || async move {
                    let pair = match controller.pair(index) {
                        // It has as many slots as the queue had: one that is smaller now would be overrun.
                        Some(pair) if usize::from(depth) <= pair.slots() => {
                            return Err(NvmeError::Unsupported(format!(
                                "a queue of {depth} entries where it had more before the reset"
                            )));
                        }
                        Some(pair) => pair,
                        None => {
                            let pair = Pair::start(controller.clone(), index, depth, interrupts)?;
                            controller.add_pair(&pair);
                            pair
                        }
                    };
                    pair.revive();
                    pair.resume(Ring::new(bus, memory, qid, dstrd, shadow));
                    Ok::<_, NvmeError>(())
                })
                .await??;
            if !known {
                lock(&c.owners).push(owner);
            }
        }
        Ok(())
    }

    async fn create_queues(&self, qid: u16, memory: &RingMemory) -> Result<(), NvmeError> {
        let limit = Some(self.controller.options.admin_timeout);
        let [sq, cq] = memory.addresses();
        let ids = u32::from(qid) | u32::from(memory.depth() - 1) << 16;
        let mut sqe = Sqe::new(Opcode::CreateCq as u8);
        sqe.sgl = cryptfold_nvmf_spec::Sgl::from_prps(cq, 0);
        sqe.cdw10 = U32::new(ids);
        // PC: contiguous; IEN and IV: its own vector, if there is one.
        let has_own = self.interrupts.get() && qid < self.bus.vectors();
        let vector = if has_own { u32::from(qid) << 16 | 2 } else { 0 };
        sqe.cdw11 = U32::new(vector | 1);
        self.admin.run("Create I/O Completion Queue", sqe, None, limit).await?;
        let mut sqe = Sqe::new(Opcode::CreateSq as u8);
        sqe.sgl = cryptfold_nvmf_spec::Sgl::from_prps(sq, 0);
        sqe.cdw10 = U32::new(ids);
        sqe.cdw11 = U32::new(u32::from(qid) << 16 | 1);
        self.admin.run("Create I/O Submission Queue", sqe, None, limit).await?;
        Ok(())
    }

    /// After [`Home::bring_up`]: takes events, and looks at the controller now and then.
    pub fn attend(self: &Rc<Self>) {
        self.take_events();
        let weak = Rc::downgrade(self);
        let period = self.controller.options.look_period;
        reactor::spawn_local(async move {
            loop {
                reactor::sleep(period).await;
                let Some(home) = weak.upgrade() else { return };
                if !home.look() {
                    return;
                }
            }
        })
        .detach();
    }

    fn take_events(self: &Rc<Self>) {
        let count = self.controller.identity().aerl.saturating_add(1).min(EVENTS);
        for _ in 0..count {
            let weak = Rc::downgrade(self);
            reactor::spawn_local(async move {
                while let Some(home) = weak.upgrade() {
                    let admin = home.admin.clone();
                    drop(home);
                    let sqe = Sqe::new(Opcode::AsyncEventRequest as u8);
                    let Ok((cqe, _)) = admin.run("Asynchronous Event Request", sqe, None, None).await else {
                        return;
                    };
                    let Some(home) = weak.upgrade() else { return };
                    home.event(cqe.dw0.get()).await;
                }
            })
            .detach();
        }
    }

    /// False: it is no longer looked after.
    fn look(self: &Rc<Self>) -> bool {
        match self.controller.state() {
            State::Ready | State::Failed => {
                if self.bus.wants_removal() {
                    self.notice(Notice::Vanished);
                } else if self.controller.state() == State::Ready {
                    if self.admin.bogus.replace(0) > 0 {
                        self.notice(Notice::ResetNeeded(
                            "completion of an admin command that nobody sent".into(),
                        ));
                    }
                    if let Some(what) = self.admin.stuck.take() {
                        self.notice(Notice::ResetNeeded(format!("no answer to the admin command {what}")));
                    }
                    self.controller.look_at_status(self.bus.read32(reg::CSTS));
                } else if self.bus.read32(reg::CSTS) == ALL_ONES {
                    self.notice(Notice::Vanished);
                }
                true
            }
            State::Resetting | State::Attaching => true,
            State::Removed | State::Detaching | State::Gone => false,
        }
    }

    /// What another reactor, or this one, found.
    pub fn notice(self: &Rc<Self>, notice: Notice) {
        let home = self.clone();
        match notice {
            Notice::Expired { qid, cid } => {
                home.controller
                    .note(format!("command {cid:#06x} of queue {qid} takes longer than the limit"));
                reactor::spawn_local(async move { home.abort(qid, cid).await }).detach();
            }
            Notice::Abort { qid, cid } => {
                reactor::spawn_local(async move { home.abort(qid, cid).await }).detach();
            }
            Notice::ResetNeeded(why) => {
                if self.controller.state() == State::Ready {
                    reactor::spawn_local(async move { drop(home.reset(why).await) }).detach();
                }
            }
            Notice::Vanished => {
                if self.controller.on(Event::Vanished) {
                    reactor::spawn_local(async move { home.vanish().await }).detach();
                }
            }
        }
    }

    /// Abort (NVMe Base 2.0 section 5.1). That it did not help shows when the command's time is over for the second time.
    async fn abort(self: Rc<Self>, qid: u16, cid: u16) {
        let (limit, out) = self.aborts.get();
        if self.controller.state() != State::Ready || out >= limit {
            return;
        }
        self.aborts.set((limit, out + 1));
        self.controller.counters.aborts.fetch_add(1, Ordering::Relaxed);
        let mut sqe = Sqe::new(Opcode::Abort as u8);
        sqe.cdw10 = U32::new(AbortCdw10::default().with_sqid(qid.into()).with_cid(cid.into()).0);
        let result = self.admin.run("Abort", sqe, None, Some(self.controller.options.admin_timeout)).await;
        let (limit, out) = self.aborts.get();
        self.aborts.set((limit, out.saturating_sub(1)));
        if let Err(AdminError::Timeout { .. }) = result {
            self.notice(Notice::ResetNeeded("no answer to an Abort command".into()));
        }
    }

    async fn each_pair(&self, f: impl Fn(&Pair) + Send + Copy + 'static) {
        let owners = lock(&self.controller.owners).clone();
        for (index, owner) in owners.into_iter().enumerate() {
            let controller = self.controller.clone();
            let done = owner.call(move || async move { controller.pair(index).map(|p| f(&p)) }).await;
            if done.is_err() {
                tracing::debug!("{}: the reactor of pair {index} has stopped", self.controller.name);
            }
        }
    }

    /// Resets the controller; I/O waits and is sent again, or ends with an error if that fails. A reset that is under way is
    /// waited for instead.
    pub async fn reset(self: &Rc<Self>, why: String) -> Result<(), NvmeError> {
        if !self.controller.on(Event::ResetNeeded) {
            self.settle().await;
            return match self.controller.state() {
                State::Ready => Ok(()),
                other => Err(NvmeError::State(other.name())),
            };
        }
        self.controller.note(format!("reset: {why}"));
        self.controller.counters.resets.fetch_add(1, Ordering::Relaxed);
        self.each_pair(Pair::pause).await;
        let result = match self.disable().await {
            Ok(()) => {
                self.each_pair(Pair::reclaim).await;
                self.bring_up().await
            }
            Err(e) => Err(e),
        };
        let result = match result {
            // It may have vanished meanwhile; that has been dealt with, then.
            Ok(()) if self.controller.on(Event::Up) => {
                self.take_events();
                Ok(())
            }
            Ok(()) => Err(NvmeError::Vanished),
            Err(e) => {
                self.fail(&e).await;
                Err(e)
            }
        };
        self.settled.notify_waiters();
        result
    }

    async fn fail(self: &Rc<Self>, e: &NvmeError) {
        // One that goes while it is brought up may show in a command without an answer.
        let gone = matches!(e, NvmeError::Vanished) || self.bus.read32(reg::CSTS) == ALL_ONES;
        if gone || self.bus.wants_removal() {
            self.notice(Notice::Vanished);
            return;
        }
        self.controller.note(format!("reset failed: {e}"));
        self.controller.counters.failed_resets.fetch_add(1, Ordering::Relaxed);
        self.bus.stop_dma();
        self.admin.close();
        self.each_pair(|pair| pair.kill(Status::INTERNAL_ERROR)).await;
        self.controller.on(Event::BringUpFailed);
    }

    /// The drive is gone: nothing touches it any more, I/O ends, its devices go.
    async fn vanish(self: Rc<Self>) {
        self.controller.note("the drive is gone".into());
        self.bus.stop_dma();
        self.admin.close();
        self.each_pair(|pair| pair.kill(Status::INVALID_NAMESPACE.do_not_retry())).await;
        self.settled.notify_waiters();
        // The kernel waits for this before it takes a drive away that is asked back.
        self.bus.clone().release().await;
        self.remove_devices();
        self.wait_removed(None).await;
        self.controller.on(Event::Detach);
        self.leave().await;
    }

    /// Asks for the removal of all devices; [`Home::wait_removed`] waits for it.
    pub fn remove_devices(&self) {
        self.leaving.borrow_mut().extend(self.controller.remove_devices());
    }

    /// False: somebody still has one of them open after the limit.
    async fn wait_removed(&self, limit: Option<Duration>) -> bool {
        let begin = reactor::now();
        loop {
            self.leaving.borrow_mut().retain(|removal| !removal.is_done());
            if self.leaving.borrow().is_empty() {
                return true;
            }
            if limit.is_some_and(|limit| reactor::now() - begin > limit) {
                return false;
            }
            reactor::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits for the end of a reset that is under way.
    async fn settle(&self) {
        while self.controller.state() == State::Resetting {
            self.settled.notified().await;
        }
    }

    /// Removes the devices and shuts the controller down (NVMe Base 2.0 section 3.6.1).
    pub async fn detach(self: Rc<Self>, limit: Duration) -> Result<(), NvmeError> {
        self.settle().await;
        if !matches!(self.controller.state(), State::Ready | State::Failed) {
            return Err(NvmeError::State(self.controller.state().name()));
        }
        self.remove_devices();
        if !self.wait_removed(Some(limit)).await {
            return Err(NvmeError::Busy(limit.as_secs()));
        }
        self.settle().await;
        let healthy = self.controller.state() == State::Ready;
        if !self.controller.on(Event::Detach) {
            // It vanished while its devices were closed.
            return Ok(());
        }
        if healthy {
            self.each_pair(Pair::pause).await;
            self.shut_down().await;
        }
        self.put_away().await;
        Ok(())
    }

    /// Tells the controller to get ready for the end; it may take as long as it says (RTD3E), within reason.
    async fn shut_down(&self) {
        let cc = self.bus.read32(reg::CC);
        if cc == ALL_ONES {
            return;
        }
        self.bus.write32(reg::CC, Cc(cc).with_shn(1).0);
        let promised = Duration::from_micros(self.controller.identity().rtd3e_us.get().into());
        let limit = promised.clamp(Duration::from_secs(2), Duration::from_secs(30));
        let end = reactor::now() + limit;
        while self.csts().is_ok_and(|s| s.shst() != 2) {
            if reactor::now() >= end {
                self.controller.note(format!("did not finish its shutdown within {} s", limit.as_secs()));
                return;
            }
            reactor::sleep(STEP).await;
        }
    }

    /// Disables the controller and gives it back.
    pub async fn put_away(&self) {
        if let Err(e) = self.disable().await {
            tracing::warn!("{}: {e}", self.controller.name);
        }
        self.bus.stop_dma();
        self.admin.close();
        self.each_pair(|pair| pair.kill(Status::INVALID_NAMESPACE.do_not_retry())).await;
        self.bus.clone().release().await;
        self.leave().await;
    }

    async fn leave(&self) {
        self.each_pair(Pair::close).await;
        self.controller.on(Event::Released);
        self.close();
    }
}
