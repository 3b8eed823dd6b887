//! The simulated controller's registers, its tasks, its queues.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Poll, Waker};
use std::time::Duration;

use cryptfold_bdev::{Access, BdevError, Channel, Registry};
use cryptfold_nvmf_spec::identify::{IdentifyController, NamespaceIdentify, oncs, set_text, sgls};
use cryptfold_nvmf_spec::property::{Cap, Cc, Csts, Vs};
use cryptfold_nvmf_spec::{Cqe, Sqe, Status};
use cryptfold_reactor as reactor;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32};

use super::fault::Fault;
use super::queue::{CompletionQueue, SubmissionQueue};
use crate::bus::{ALL_ONES, Address, Bus, BusError, Interrupt, reg};
use crate::dma::Seen;
use crate::elsewhere::Waiting;

/// Where the controller sees slab 0.
const WINDOW: u64 = 4 << 30;
/// Bytes of the registers: doorbells for some dozens of queues.
const REGISTERS_BYTES: u32 = 0x1000 + 0x400;

/// A namespace.
#[derive(Clone, Debug)]
pub struct SimNamespace {
    /// Its number.
    pub nsid: u32,
    /// The block device that holds its data; its block size is the format.
    pub bdev: String,
}

/// What a controller is like.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Entries of an I/O queue at most.
    pub queue_depth: u16,
    /// I/O queue pairs.
    pub pairs: u16,
    /// CAP.TO, units of 500 ms.
    pub timeout_units: u8,
    /// MDTS: 2^n pages; 0 is no limit.
    pub mdts: u8,
    /// Whether it takes SGLs.
    pub sgl: bool,
    /// Whether it has shadow doorbells.
    pub shadow: bool,
    /// CAP.DSTRD.
    pub stride: u8,
    /// Time from CC.EN to CSTS.RDY.
    pub ready_after: Duration,
    /// Shortest and longest time of a command, beside what its device takes.
    pub latency: std::ops::Range<Duration>,
    /// Time that it takes to show it memory that the arena has grown by.
    pub map_time: Duration,
    /// ONCS.
    pub oncs: u16,
    /// Serial number.
    pub serial: String,
    /// Namespaces.
    pub namespaces: Vec<SimNamespace>,
}

impl SimOptions {
    /// Four pairs of 64 entries, 128 KiB transfers, everything offered, `bdev` as namespace 1.
    pub fn new(bdev: &str) -> SimOptions {
        SimOptions {
            queue_depth: 64,
            pairs: 4,
            timeout_units: 4,
            mdts: 5,
            sgl: true,
            shadow: false,
            stride: 0,
            ready_after: Duration::from_millis(3),
            latency: Duration::ZERO..Duration::from_micros(20),
            map_time: Duration::from_micros(20),
            oncs: oncs::COMPARE | oncs::WRITE_UNCORRECTABLE | oncs::DSM | oncs::WRITE_ZEROES | oncs::VERIFY,
            serial: "SIM0001".into(),
            namespaces: vec![SimNamespace { nsid: 1, bdev: bdev.into() }],
        }
    }
}

/// An opened namespace.
pub(super) struct Open {
    pub channel: Channel,
    pub identify: NamespaceIdentify,
}

/// What was written, in order.
#[derive(Clone, Copy, Debug)]
struct Written {
    offset: u32,
    value: u32,
}

pub(super) struct State {
    pub options: SimOptions,
    rng: u64,
    written: VecDeque<Written>,
    waker: Option<Waker>,
    cc: Cc,
    /// As the host reads it: what was written last.
    cc_read: u32,
    csts: Csts,
    aqa: u32,
    asq: u64,
    acq: u64,
    /// Grows with each reset: what belongs to an older one is forgotten.
    pub epoch: u64,
    pub submission: BTreeMap<u16, SubmissionQueue>,
    pub completion: BTreeMap<u16, CompletionQueue>,
    /// Shadow doorbells: values, event indices.
    pub shadow: Option<[u64; 2]>,
    pub granted: u16,
    pub events_wanted: u32,
    pub event_commands: VecDeque<u16>,
    pub events: VecDeque<u32>,
    pub changed: Vec<u32>,
    pub errors: u64,
    pub smart_warning: u8,
    /// I/O commands fetched so far.
    commands: u64,
    faults: Vec<(u64, Fault)>,
    /// Commands that an Abort can end: (queue, command).
    pub abortable: Vec<(u16, u16)>,
    never_ready: bool,
    never_disabled: bool,
    fatal_when_enabled: bool,
    unmappable: bool,
    pub stuck: bool,
    removed: bool,
    dma: bool,
    /// Commands that are with their devices.
    in_flight: u32,
    disabling: bool,
    /// What a host did wrong.
    pub offences: Vec<String>,
    /// Doorbell registers written.
    doorbells: u64,
}

/// See the module's head.
pub struct SimController {
    state: Mutex<State>,
    slabs: AtomicUsize,
}

impl SimController {
    /// A controller whose latencies come from `seed`. It lives after [`SimController::start`].
    pub fn new(options: SimOptions, seed: u64) -> Arc<SimController> {
        let state = State {
            options,
            rng: seed | 1,
            written: VecDeque::new(),
            waker: None,
            cc: Cc::default(),
            cc_read: 0,
            csts: Csts::default(),
            aqa: 0,
            asq: 0,
            acq: 0,
            epoch: 0,
            submission: BTreeMap::new(),
            completion: BTreeMap::new(),
            shadow: None,
            granted: 0,
            events_wanted: 0,
            event_commands: VecDeque::new(),
            events: VecDeque::new(),
            changed: Vec::new(),
            errors: 0,
            smart_warning: 0,
            commands: 0,
            faults: Vec::new(),
            abortable: Vec::new(),
            never_ready: false,
            never_disabled: false,
            fatal_when_enabled: false,
            unmappable: false,
            stuck: false,
            removed: false,
            dma: true,
            in_flight: 0,
            disabling: false,
            offences: Vec::new(),
            doorbells: 0,
        };
        Arc::new(SimController { state: Mutex::new(state), slabs: AtomicUsize::new(0) })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        crate::controller::lock(&self.state)
    }

    /// Opens its namespaces and lets it run on this reactor, for as long as that runs or until it is removed.
    ///
    /// # Errors
    /// A namespace's device can not be opened.
    pub fn start(self: &Arc<Self>, registry: &Registry) -> Result<(), BdevError> {
        let mut open = BTreeMap::new();
        let namespaces = self.state().options.namespaces.clone();
        for ns in &namespaces {
            open.insert(ns.nsid, open_namespace(registry, &ns.bdev)?);
        }
        let this = self.clone();
        reactor::spawn_local(async move { this.run(Rc::new(open)).await }).detach();
        Ok(())
    }

    /// Has a fault hit: at once, or (those of commands) the `nth` I/O command from now, 1 being the next.
    pub fn inject(&self, fault: Fault, nth: u64) {
        let mut s = self.state();
        if fault.is_of_command() {
            let at = s.commands + nth.max(1);
            s.faults.push((at, fault));
            return;
        }
        match fault {
            Fault::NeverReady => s.never_ready = true,
            Fault::NeverDisabled => s.never_disabled = true,
            Fault::FatalWhenEnabled => s.fatal_when_enabled = true,
            Fault::Fatal => {
                s.csts = s.csts.with_cfs(1);
                s.stuck = true;
            }
            Fault::Stuck => s.stuck = true,
            Fault::Unmappable => s.unmappable = true,
            _ => {
                s.removed = true;
                s.epoch += 1;
            }
        }
    }

    /// Takes back what was said about coming up and going down.
    pub fn heal(&self) {
        let mut s = self.state();
        (s.never_ready, s.never_disabled, s.fatal_when_enabled) = (false, false, false);
        s.unmappable = false;
    }

    /// I/O commands fetched so far.
    pub fn commands(&self) -> u64 {
        self.state().commands
    }

    /// Doorbell registers written so far.
    pub fn doorbells(&self) -> u64 {
        self.state().doorbells
    }

    /// Faults of commands that have not hit.
    pub fn pending_faults(&self) -> usize {
        self.state().faults.len()
    }

    /// What the host did against the specification. Empty for one that obeys it.
    pub fn offences(&self) -> Vec<String> {
        self.state().offences.clone()
    }

    /// Whether the controller is enabled or may touch memory.
    pub fn is_live(&self) -> bool {
        let s = self.state();
        !s.removed && s.dma && s.cc.en() == 1
    }

    /// Reports an asynchronous event (DW0 of its completion).
    pub fn report(&self, event: u32) {
        let mut s = self.state();
        s.events.push_back(event);
        s.wake();
    }

    /// Sets SMART's critical warning and reports it.
    pub fn warn(&self, warning: u8) {
        self.state().smart_warning = warning;
        self.report(cryptfold_nvmf_spec::features::AsyncEvent::SPARE_BELOW.0);
    }

    async fn run(self: Arc<Self>, open: Rc<BTreeMap<u32, Open>>) {
        loop {
            let next = std::future::poll_fn(|cx| {
                let mut s = self.state();
                if s.removed {
                    return Poll::Ready(None);
                }
                if let Some(w) = s.written.pop_front() {
                    return Poll::Ready(Some(Some(w)));
                }
                if self.has_work(&s) {
                    return Poll::Ready(Some(None));
                }
                s.waker = Some(cx.waker().clone());
                Poll::Pending
            })
            .await;
            match next {
                None => return,
                Some(Some(write)) => self.written(write),
                Some(None) => {}
            }
            self.work(&open);
        }
    }

    fn has_work(&self, s: &State) -> bool {
        !s.events.is_empty() && !s.event_commands.is_empty() && !s.stuck
    }

    pub(super) fn memory(&self) -> Seen {
        let visible = self.state().dma;
        Seen { window: WINDOW, slabs: if visible { self.slabs.load(Ordering::Acquire) } else { 0 } }
    }

    fn written(self: &Arc<Self>, Written { offset, value }: Written) {
        let memory = self.memory();
        let mut s = self.state();
        match offset {
            reg::CC => {
                let (old, new) = (s.cc, Cc(value));
                s.cc = new;
                if old.en() == 0 && new.en() == 1 {
                    drop(s);
                    return self.enable();
                }
                if old.en() == 1 && new.en() == 0 {
                    s.reset();
                }
                if new.shn() != 0 && old.shn() == 0 {
                    s.csts = s.csts.with_shst(2);
                }
            }
            reg::AQA => s.aqa = value,
            reg::ASQ => s.asq = s.asq & !0xffff_ffff | u64::from(value),
            n if n == reg::ASQ + 4 => s.asq = s.asq & 0xffff_ffff | u64::from(value) << 32,
            reg::ACQ => s.acq = s.acq & !0xffff_ffff | u64::from(value),
            n if n == reg::ACQ + 4 => s.acq = s.acq & 0xffff_ffff | u64::from(value) << 32,
            n if n >= reg::DOORBELLS => {
                let index = (n - reg::DOORBELLS) / (4 << s.options.stride);
                s.doorbells += 1;
                s.doorbell((index / 2) as u16, index % 2 == 1, value, &memory);
            }
            n => s.offences.push(format!("write of {value:#x} to register {n:#x}")),
        }
    }

    fn enable(self: &Arc<Self>) {
        let (after, epoch) = {
            let s = self.state();
            (s.options.ready_after, s.epoch)
        };
        let this = self.clone();
        reactor::spawn_local(async move {
            reactor::sleep(after).await;
            let mut s = this.state();
            if s.epoch != epoch || s.never_ready {
                return;
            }
            let cap = s.cap();
            if s.fatal_when_enabled || s.cc.check(cap, true).is_err() {
                s.csts = s.csts.with_cfs(1);
                return;
            }
            let (sqs, cqs) = (s.aqa & 0xfff, s.aqa >> 16 & 0xfff);
            let (asq, acq) = (s.asq, s.acq);
            let admin = SubmissionQueue { address: asq, depth: sqs as u16 + 1, cqid: 0, head: 0, tail: 0 };
            s.submission.insert(0, admin);
            s.completion.insert(0, CompletionQueue::new(acq, cqs as u16 + 1));
            s.csts = s.csts.with_rdy(1);
        })
        .detach();
    }

    /// Takes commands from all queues and starts them.
    fn work(self: &Arc<Self>, open: &Rc<BTreeMap<u32, Open>>) {
        let memory = self.memory();
        loop {
            let mut s = self.state();
            if s.stuck || s.removed || s.csts.rdy() == 0 {
                return;
            }
            s.report_events(&memory);
            s.read_shadow(&memory);
            let mut fetched = Vec::new();
            for (qid, queue) in &mut s.submission {
                while let Some(command) = queue.fetch(&memory) {
                    fetched.push((*qid, command));
                }
            }
            s.tell_event_indices(&memory);
            if fetched.is_empty() {
                return;
            }
            let epoch = s.epoch;
            for (qid, command) in fetched {
                let Ok(sqe) = command else {
                    s.offences.push(format!("queue {qid} is not in memory"));
                    s.csts = s.csts.with_cfs(1);
                    continue;
                };
                let (fault, latency) = if qid == 0 { (None, s.latency()) } else { s.plan() };
                let job = Job { qid, sqe, epoch, fault };
                let (this, open) = (self.clone(), open.clone());
                reactor::spawn_local(async move {
                    reactor::sleep(latency).await;
                    this.execute(job, &open).await;
                })
                .detach();
            }
        }
    }

    async fn execute(self: &Arc<Self>, job: Job, open: &BTreeMap<u32, Open>) {
        if self.state().epoch != job.epoch {
            return;
        }
        if job.qid == 0 {
            return self.admin(&job, open);
        }
        let cid = job.sqe.cid().0;
        let key = (job.qid, cid);
        match job.fault {
            Some(Fault::Drop) => return self.state().abortable.push(key),
            Some(Fault::Lose) => return,
            Some(Fault::Late(by)) => reactor::sleep(by).await,
            Some(Fault::Slow(by)) => {
                self.state().abortable.push(key);
                reactor::sleep(by).await;
                let mut s = self.state();
                let Some(at) = s.abortable.iter().position(|k| *k == key) else { return };
                s.abortable.swap_remove(at);
            }
            Some(Fault::Fails(status)) => return self.complete(&job, Cqe::new(job.sqe.cid(), 0, status)),
            _ => {}
        }
        if self.state().epoch != job.epoch {
            return;
        }
        let status = self.io(&job, open).await;
        let mut cqe = Cqe::new(job.sqe.cid(), 0, status);
        if job.fault == Some(Fault::WrongCid) {
            cqe.cid = U16::new(cid ^ 0x5555);
        }
        self.complete(&job, cqe);
        if job.fault == Some(Fault::Duplicate) {
            self.complete(&job, cqe);
        }
    }

    /// Posts a completion, if the queue is still the one that the command came from.
    pub(super) fn complete(&self, job: &Job, cqe: Cqe) {
        let memory = self.memory();
        self.state().complete(job.qid, job.epoch, cqe, &memory);
    }
}

/// A command being executed.
pub(super) struct Job {
    pub qid: u16,
    pub sqe: Sqe,
    pub epoch: u64,
    fault: Option<Fault>,
}

impl State {
    fn cap(&self) -> Cap {
        Cap::default()
            .with_mqes(u64::from(self.options.queue_depth) - 1)
            .with_cqr(1)
            .with_to(self.options.timeout_units.into())
            .with_dstrd(self.options.stride.into())
            .with_css(1)
    }

    pub(super) fn wake(&mut self) {
        if let Some(w) = self.waker.take() {
            w.wake();
        }
    }

    /// xorshift64*.
    fn random(&mut self) -> u64 {
        self.rng ^= self.rng >> 12;
        self.rng ^= self.rng << 25;
        self.rng ^= self.rng >> 27;
        self.rng.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn latency(&mut self) -> Duration {
        let (low, high) =
            (self.options.latency.start.as_nanos() as u64, self.options.latency.end.as_nanos() as u64);
        Duration::from_nanos(low + self.random() % (high.saturating_sub(low) + 1))
    }

    fn plan(&mut self) -> (Option<Fault>, Duration) {
        self.commands += 1;
        let hit = self.faults.iter().position(|(at, _)| *at <= self.commands);
        (hit.map(|i| self.faults.swap_remove(i).1), self.latency())
    }

    fn reset(&mut self) {
        self.epoch += 1;
        if self.never_disabled {
            return;
        }
        self.submission.clear();
        self.completion.clear();
        self.abortable.clear();
        self.event_commands.clear();
        self.shadow = None;
        self.stuck = false;
        // A controller is disabled only when nothing that it began can still take effect.
        self.disabling = true;
        self.settle();
    }

    fn settle(&mut self) {
        if self.disabling && self.in_flight == 0 {
            self.disabling = false;
            self.csts = Csts::default();
        }
    }

    /// A command goes to its device, or (`false`) has come back.
    pub(super) fn count(&mut self, begins: bool) {
        if begins {
            self.in_flight += 1;
        } else {
            self.in_flight -= 1;
            self.settle();
        }
    }

    fn doorbell(&mut self, qid: u16, completion: bool, value: u32, memory: &Seen) {
        let Ok(value) = u16::try_from(value) else {
            return self.offences.push(format!("doorbell of queue {qid}: {value:#x}"));
        };
        if completion {
            match self.completion.get_mut(&qid) {
                Some(queue) if value < queue.depth => {
                    queue.head = value;
                    queue.post(memory);
                }
                _ => self.offences.push(format!("head doorbell {value} of queue {qid}")),
            }
        } else {
            match self.submission.get_mut(&qid) {
                Some(queue) if value < queue.depth => queue.tail = value,
                // Invalid doorbell register or value (NVMe Base 2.0 section 5.2).
                _ => self.offences.push(format!("tail doorbell {value} of queue {qid}")),
            }
        }
    }

    fn shadow_word(&self, qid: u16, completion: bool) -> u64 {
        (2 * u64::from(qid) + u64::from(completion)) * (4 << self.options.stride)
    }

    /// The doorbells of I/O queues, from memory (NVMe Base 2.0 annex B.5).
    fn read_shadow(&mut self, memory: &Seen) {
        let Some([values, _]) = self.shadow else { return };
        let mut found = Vec::new();
        for qid in self.submission.keys().filter(|q| **q != 0) {
            for completion in [false, true] {
                let mut word = [0; 4];
                if memory.read(values + self.shadow_word(*qid, completion), &mut word) {
                    found.push((*qid, completion, u32::from_le_bytes(word)));
                }
            }
        }
        for (qid, completion, value) in found {
            self.doorbell(qid, completion, value, memory);
        }
    }

    /// Asks to be told about the next command of every queue: nobody looks in between.
    fn tell_event_indices(&mut self, memory: &Seen) {
        let Some([_, indices]) = self.shadow else { return };
        for (qid, queue) in self.submission.iter().filter(|(q, _)| **q != 0) {
            let word = u32::from(queue.head).to_le_bytes();
            let told = memory.write(indices + self.shadow_word(*qid, false), &word);
            let head = self.completion.get(qid).map_or(0, |c| c.head);
            let word = u32::from(head).to_le_bytes();
            if !(told && memory.write(indices + self.shadow_word(*qid, true), &word)) {
                self.csts = self.csts.with_cfs(1);
            }
        }
    }

    fn report_events(&mut self, memory: &Seen) {
        while !self.events.is_empty() {
            let Some(cid) = self.event_commands.pop_front() else { return };
            let Some(event) = self.events.pop_front() else { return };
            let cqe = Cqe::new(cryptfold_nvmf_spec::Cid(cid), 0, Status::SUCCESS).with_dw0(event);
            self.post(0, cqe, memory);
        }
    }

    fn post(&mut self, qid: u16, mut cqe: Cqe, memory: &Seen) {
        let Some(queue) = self.submission.get(&qid) else { return };
        cqe.sqhd = U16::new(queue.head);
        cqe.sqid = U16::new(qid);
        let Some(completion) = self.completion.get_mut(&queue.cqid) else { return };
        completion.waiting.push_back(cqe);
        if !completion.post(memory) {
            self.csts = self.csts.with_cfs(1);
        }
    }

    pub(super) fn complete(&mut self, qid: u16, epoch: u64, cqe: Cqe, memory: &Seen) {
        if self.epoch != epoch || self.removed || self.stuck {
            return;
        }
        if cqe.status().0 != 0 {
            self.errors += 1;
        }
        self.post(qid, cqe, memory);
    }

    pub(super) fn identify_controller(&self) -> IdentifyController {
        let mut id = IdentifyController::default();
        id.vid = U16::new(0x1b36);
        id.mdts = self.options.mdts;
        id.cntlid = U16::new(0);
        id.ver = U32::new(Vs::V1_4.0);
        id.rtd3e_us = U32::new(1_000_000);
        id.oaes = U32::new(1 << 8);
        id.oacs = U16::new(u16::from(self.options.shadow) << 8);
        id.acl = 3;
        id.aerl = 3;
        id.elpe = 15;
        id.lpa = 0;
        id.sqes = 0x66;
        id.cqes = 0x44;
        id.nn = U32::new(1024);
        id.oncs = U16::new(self.options.oncs);
        id.vwc = 1;
        id.sgls = U32::new(if self.options.sgl { sgls::SUPPORTED } else { 0 });
        set_text(&mut id.sn, &self.options.serial);
        set_text(&mut id.mn, "Simulated NVMe controller");
        set_text(&mut id.fr, "1");
        id
    }
}

fn open_namespace(registry: &Registry, bdev: &str) -> Result<Open, BdevError> {
    let channel = registry.open(bdev, Access::ReadWrite, |_| ())?.channel()?;
    let device = channel.bdev().clone();
    let shift = device.block_size_bytes().trailing_zeros() as u8;
    let mut identify = NamespaceIdentify::new(device.blocks(), shift);
    let atomic = device.info().atomic_blocks.clamp(1, 1 << 16) - 1;
    identify.nsfeat = cryptfold_nvmf_spec::identify::nsfeat::ATOMICS;
    identify.nawun = U16::new(atomic as u16);
    identify.nawupf = U16::new(atomic as u16);
    identify.nguid = *device.info().uuid.as_bytes();
    // Not the device's own identity, which is taken in the same registry.
    identify.nguid[0] ^= 0xff;
    Ok(Open { channel, identify })
}

impl Bus for SimController {
    fn read32(&self, offset: u32) -> u32 {
        let s = self.state();
        if s.removed {
            return ALL_ONES;
        }
        let half = |v: u64, high: bool| if high { (v >> 32) as u32 } else { v as u32 };
        match offset {
            0 => half(s.cap().0, false),
            4 => half(s.cap().0, true),
            reg::VS => Vs::V1_4.0,
            reg::CC => s.cc_read,
            reg::CSTS => s.csts.0,
            reg::AQA => s.aqa,
            _ => 0,
        }
    }

    fn write32(&self, offset: u32, value: u32) {
        let mut s = self.state();
        if s.removed {
            return;
        }
        s.written.push_back(Written { offset, value });
        if offset == reg::CC {
            s.cc_read = value;
        }
        s.wake();
    }

    fn registers_bytes(&self) -> u32 {
        REGISTERS_BYTES
    }

    fn window(&self) -> u64 {
        WINDOW
    }

    fn map(&self, slabs: usize) -> Result<(), BusError> {
        self.slabs.fetch_max(slabs, Ordering::AcqRel);
        Ok(())
    }

    fn map_more(self: Arc<Self>, slabs: usize) -> Waiting<Result<(), BusError>> {
        Box::pin(async move {
            let time = self.state().options.map_time;
            reactor::sleep(time).await;
            if self.state().unmappable {
                let (what, reason) = ("I/O memory".into(), "no more of it".into());
                return Err(BusError { what, reason, errno: libc::ENOMEM });
            }
            self.map(slabs)
        })
    }

    fn vectors(&self) -> u16 {
        64
    }

    fn enable_interrupts(&self) -> Result<(), BusError> {
        Ok(())
    }

    fn interrupt(&self, _vector: u16) -> Interrupt {
        Interrupt::Simulated
    }

    fn reset(self: Arc<Self>) -> Waiting<Result<(), BusError>> {
        let mut s = self.state();
        (s.cc, s.cc_read) = (Cc::default(), 0);
        s.written.clear();
        s.reset();
        Box::pin(std::future::ready(Ok(())))
    }

    fn stop_dma(&self) {
        self.state().dma = false;
    }

    fn allow_dma(&self) {
        self.state().dma = true;
    }

    fn wants_removal(&self) -> bool {
        false
    }

    fn release(self: Arc<Self>) -> Waiting<()> {
        let mut s = self.state();
        s.removed = true;
        s.epoch += 1;
        s.wake();
        Box::pin(std::future::ready(()))
    }

    fn address(&self) -> Address {
        Address { traddr: "sim".into(), ids: [0x1b36, 0x10, 0, 0] }
    }
}

/// A page of 4 KiB as bytes, for Identify and logs.
pub(super) fn bytes_of<T: IntoBytes + zerocopy::Immutable>(page: &T) -> Vec<u8> {
    page.as_bytes().to_vec()
}
