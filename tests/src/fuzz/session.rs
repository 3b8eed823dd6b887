//! One session: a host that takes its connections to some state of a controller and then sends random commands. All of it
//! follows from the session's seed, except what other sessions do to the same namespaces meanwhile.
//!
//! What counts as a finding: a command without an answer, an answer that nobody waits for, success where the model says it
//! can not be, a PDU that breaks the protocol, and a connection that the target ends without a reason.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use cryptfold_bdev_sim::Rng;
use cryptfold_nvmf_spec::fabrics::PropertyCommand;
use cryptfold_nvmf_spec::features::Fid;
use cryptfold_nvmf_spec::opcode::{Admin, FABRICS, Fabrics, Io};
use cryptfold_nvmf_spec::pdu::build::{self, DataPart};
use cryptfold_nvmf_spec::property::Property;
use cryptfold_nvmf_spec::sqe::Fuse;
use cryptfold_nvmf_spec::{Cid, Cntlid, Cqe, Nsid, Sqe, Ttag};

use super::commands::{self, Command, Geometry, Identity};
use super::host::{End, Host, PATIENCE, Pdu};

/// Commands under way at once, Asynchronous Event Requests not counted.
const DEPTH: usize = 10;
/// Commands that a report shows.
const REMEMBERED: usize = 24;

/// What sessions run against.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The target's port.
    pub addr: SocketAddr,
    /// The subsystem.
    pub nqn: String,
    /// Its namespaces, from 1.
    pub namespaces: Vec<Geometry>,
    /// A host that has to authenticate.
    pub keyed_host: String,
}

/// In which state the commands come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Greetings that are none, and Connect with lies.
    Greeting,
    /// A greeting, no Connect.
    Greeted,
    /// An admin queue whose controller is not enabled.
    Connected,
    /// The host has to authenticate, and is somewhere in it.
    Authenticating,
    /// An enabled controller: its admin queue.
    Admin,
    /// Admin and I/O queue.
    Io,
    /// The controller is reset under commands.
    Resetting,
    /// The controller is shut down under commands.
    Shutdown,
}

/// All stages, those with more to find more often.
const STAGES: [Stage; 14] = [
    Stage::Greeting,
    Stage::Greeted,
    Stage::Connected,
    Stage::Authenticating,
    Stage::Admin,
    Stage::Admin,
    Stage::Io,
    Stage::Io,
    Stage::Io,
    Stage::Io,
    Stage::Io,
    Stage::Resetting,
    Stage::Resetting,
    Stage::Shutdown,
];

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Commands sent.
    pub commands: u64,
    /// Of them: completed with success.
    pub succeeded: u64,
    /// Connections that the target ended because of what was sent.
    pub ended: u64,
    /// Sessions by stage.
    pub stages: BTreeMap<Stage, u64>,
    /// Successful commands by queue (0 admin, 1 I/O) and opcode.
    pub opcodes: BTreeMap<(u8, u8), u64>,
}

impl Counts {
    /// Adds another session's.
    pub fn add(&mut self, other: &Counts) {
        self.commands += other.commands;
        self.succeeded += other.succeeded;
        self.ended += other.ended;
        for (stage, n) in &other.stages {
            *self.stages.entry(*stage).or_default() += n;
        }
        for (opcode, n) in &other.opcodes {
            *self.opcodes.entry(*opcode).or_default() += n;
        }
    }
}

/// A finding ends its session.
type Found<T> = Result<T, String>;

struct Waiting {
    command: Command,
    received: u64,
    /// Another one had the same identifier: whose answer an answer is can not be told.
    ambiguous: bool,
}

/// One queue and what it waits for.
struct Queue {
    host: Host,
    is_admin: bool,
    cid: u16,
    waiting: BTreeMap<u16, VecDeque<Waiting>>,
    events: usize,
    last_fused: bool,
    /// The target may end the connection: why.
    may_end: Option<&'static str>,
    ended: bool,
    recent: VecDeque<String>,
}

impl Queue {
    fn new(host: Host, is_admin: bool) -> Queue {
        Queue {
            host,
            is_admin,
            cid: 0,
            waiting: BTreeMap::new(),
            events: 0,
            last_fused: false,
            may_end: None,
            ended: false,
            recent: VecDeque::new(),
        }
    }

    fn under_way(&self) -> usize {
        self.waiting.values().map(VecDeque::len).sum()
    }

    fn remember(&mut self, what: String) {
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(what);
    }

    fn end(&mut self, end: End, counts: &mut Counts) -> Found<()> {
        self.ended = true;
        match (end, self.may_end) {
            (End::Broken(what), _) => Err(format!("the target broke the protocol: {what}")),
            (End::Silent, _) => {
                let cids: Vec<_> = self.waiting.keys().collect();
                Err(format!("no answer within {PATIENCE:?}; waiting: {cids:?}"))
            }
            (_, Some(_)) => {
                counts.ended += 1;
                Ok(())
            }
            (End::Closed, None) => Err("the target closed the connection without a reason".into()),
            (End::Terminated(fes, fei), None) => {
                Err(format!("the target ended the connection without a reason: FES {fes:#x}, FEI {fei:#x}"))
            }
        }
    }

    /// Sends a command and remembers what must become of it.
    fn fire(&mut self, rng: &mut Rng, mut command: Command, counts: &mut Counts) -> Found<()> {
        if self.ended {
            return Ok(());
        }
        self.cid = self.cid.wrapping_add(1);
        // Now and then an identifier that is in use.
        let taken = rng.one_in(60).then(|| self.waiting.keys().next().copied()).flatten();
        let cid = taken.unwrap_or(self.cid);
        command.sqe.cid = cid.into();
        self.remember(format!("{:02x?} + {} bytes", command.sqe, command.capsule.len()));
        self.expect_ends(&command);
        let event = self.is_admin && command.sqe.opcode == Admin::AsyncEventRequest as u8;
        self.last_fused = command.sqe.fuse() == Fuse::First && !self.is_admin;
        let mut bytes = self.host.capsule(&command.sqe, &command.capsule);
        counts.commands += 1;
        if rng.one_in(400) {
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << rng.below(8);
            self.remember(format!("  with byte {at} damaged"));
            return self.last_shot(&bytes, counts);
        }
        if event {
            self.events += 1;
        }
        let waiting = self.waiting.entry(cid).or_default();
        waiting.push_back(Waiting { command, received: 0, ambiguous: false });
        if waiting.len() > 1 {
            waiting.iter_mut().for_each(|w| w.ambiguous = true);
        }
        match self.host.send(&bytes) {
            Ok(()) => Ok(()),
            Err(end) => self.end(end, counts),
        }
    }

    /// Sends what is no capsule any more: anything may come, in the form of PDUs; then the connection is left.
    fn last_shot(&mut self, bytes: &[u8], counts: &mut Counts) -> Found<()> {
        self.ended = true;
        counts.ended += 1;
        let mut answer = self.host.send(bytes).map(|()| Pdu::IcResp);
        while answer.is_ok() {
            answer = self.host.recv(Duration::from_millis(20));
        }
        match answer {
            Err(End::Broken(what)) => Err(format!("the target broke the protocol: {what}")),
            _ => Ok(()),
        }
    }

    /// What gives the target the right to end this connection.
    fn expect_ends(&mut self, command: &Command) {
        let sqe = &command.sqe;
        let fctype = sqe.nsid.get() as u8;
        if sqe.opcode == FABRICS {
            self.may_end = match Fabrics::from_u8(fctype) {
                Some(Fabrics::Disconnect) => Some("Disconnect"),
                Some(Fabrics::PropertySet) => Some("a property was set"),
                Some(Fabrics::AuthenticationSend | Fabrics::AuthenticationReceive) => Some("authentication"),
                _ => self.may_end,
            };
        } else if self.is_admin
            && sqe.opcode == Admin::SetFeatures as u8
            && sqe.cdw10.get() as u8 == Fid::KeepAliveTimer as u8
        {
            self.may_end = Some("Keep Alive was set");
        }
    }

    /// Takes answers until no more than `left` commands are under way (events may wait for ever).
    fn drain(&mut self, rng: &mut Rng, left: usize, counts: &mut Counts) -> Found<()> {
        while !self.ended && self.under_way() > left + self.events {
            match self.host.recv(PATIENCE) {
                Ok(pdu) => self.take(rng, pdu, counts)?,
                Err(end) => self.end(end, counts)?,
            }
        }
        Ok(())
    }

    fn take(&mut self, rng: &mut Rng, pdu: Pdu, counts: &mut Counts) -> Found<()> {
        match pdu {
            Pdu::IcResp => Err("a second ICResp".into()),
            Pdu::Response(cqe) => self.completed(&cqe, counts),
            Pdu::Data { cid, offset, bytes, success } => {
                let waiting = self.waiting.get_mut(&cid.0).and_then(|w| w.front_mut());
                let waiting = waiting.ok_or_else(|| format!("data for nobody: command {cid}"))?;
                let asked = u64::from(waiting.command.sqe.sgl.length.get());
                if waiting.ambiguous {
                    waiting.received = offset.into();
                }
                let asked = if waiting.ambiguous { u64::MAX } else { asked };
                if u64::from(offset) != waiting.received || u64::from(offset) + bytes.len() as u64 > asked {
                    return Err(format!("data {offset}+{} of {asked} bytes asked for", bytes.len()));
                }
                waiting.received += bytes.len() as u64;
                if success {
                    let cqe = Cqe::new(cid, 0, cryptfold_nvmf_spec::Status::SUCCESS);
                    return self.completed(&cqe, counts);
                }
                Ok(())
            }
            Pdu::R2t { cid, ttag, offset, len } => self.requested(rng, cid, ttag, (offset, len), counts),
        }
    }

    fn completed(&mut self, cqe: &Cqe, counts: &mut Counts) -> Found<()> {
        let cid = cqe.cid().0;
        let queue =
            self.waiting.get_mut(&cid).ok_or_else(|| format!("an answer to nobody: command {cid}"))?;
        // Of two with one identifier the later one is refused at once.
        let conflict = cqe.status().code() == cryptfold_nvmf_spec::Status::COMMAND_ID_CONFLICT;
        let waiting = if conflict { queue.pop_back() } else { queue.pop_front() };
        let Waiting { command, ambiguous, .. } =
            waiting.ok_or_else(|| format!("an answer to nobody: command {cid}"))?;
        if queue.is_empty() {
            self.waiting.remove(&cid);
        }
        if self.is_admin && command.sqe.opcode == Admin::AsyncEventRequest as u8 {
            self.events = self.events.saturating_sub(1);
        }
        if !cqe.status().is_success() {
            return Ok(());
        }
        counts.succeeded += 1;
        *counts.opcodes.entry((u8::from(!self.is_admin), command.sqe.opcode)).or_default() += 1;
        match command.must_fail {
            Some(why) if !ambiguous => {
                Err(format!("success of a command that must fail ({why}): {:02x?}", command.sqe))
            }
            _ => Ok(()),
        }
    }

    /// Answers a request for data: right, in parts, wrong, or not at all.
    fn requested(
        &mut self,
        rng: &mut Rng,
        cid: Cid,
        ttag: Ttag,
        (offset, len): (u32, u32),
        counts: &mut Counts,
    ) -> Found<()> {
        let waiting = self.waiting.get(&cid.0).and_then(|w| w.front());
        let payload = waiting.map(|w| w.command.payload.clone());
        let mut payload = payload.ok_or_else(|| format!("a request for data of nobody: command {cid}"))?;
        let end = u64::from(offset) + u64::from(len);
        let announced = waiting.map_or(0, |w| w.command.sqe.sgl.length.get());
        let ambiguous = waiting.is_some_and(|w| w.ambiguous);
        if (end > u64::from(announced) && !ambiguous) || end > 1 << 20 || len == 0 {
            return Err(format!("a request for {offset}+{len} of {announced} bytes"));
        }
        payload.resize(end as usize, 0xc3);
        let mut at = offset;
        while u64::from(at) < end {
            let most = (end as u32) - at;
            let n = if rng.one_in(3) { (4 * rng.range(1, 4096) as u32).min(most) } else { most };
            let mut part = DataPart { cid, offset: at, len: n, last: at + n == end as u32 };
            let mut tag = ttag;
            if rng.one_in(150) {
                match rng.below(4) {
                    0 => tag = Ttag(rng.next() as u16),
                    1 => part.offset ^= 4 << rng.below(20),
                    2 => part.last = !part.last,
                    _ => part.cid = Cid(rng.next() as u16),
                }
                self.may_end = Some("wrong data");
                self.remember(format!("  {part:?} with {tag:?}"));
            }
            let pdu = self.host.h2c_data(part, tag, &payload[at as usize..(at + n) as usize]);
            if let Err(end) = self.host.send(&pdu) {
                return self.end(end, counts);
            }
            at += n;
        }
        Ok(())
    }
}

/// A session.
pub struct Session<'a> {
    subject: &'a Subject,
    rng: Rng,
    counts: Counts,
    /// What the session did last, for a report.
    recent: Vec<String>,
}

/// Runs the session of this seed. What it did, or what it found.
///
/// # Errors
/// The finding, with the commands before it.
pub fn run(subject: &Subject, seed: u64) -> Result<Counts, String> {
    let mut rng = Rng::new(seed);
    let stage = STAGES[rng.below(STAGES.len() as u64) as usize];
    let mut session = Session { subject, rng, counts: Counts::default(), recent: Vec::new() };
    *session.counts.stages.entry(stage).or_default() += 1;
    match session.play(stage) {
        Ok(()) => Ok(session.counts),
        Err(what) => Err(format!(
            "session {seed}, {stage:?}: {what}\nthe last commands:\n  {}",
            session.recent.join("\n  ")
        )),
    }
}

impl Session<'_> {
    fn identity(&mut self) -> Identity {
        let n = self.rng.below(4) as u8;
        Identity { nqn: format!("nqn.2024-01.io.cryptfold:fuzz{n}"), id: [n + 1; 16] }
    }

    fn play(&mut self, stage: Stage) -> Found<()> {
        if stage == Stage::Greeting {
            return self.greeting();
        }
        let who = match stage {
            Stage::Authenticating => Identity { nqn: self.subject.keyed_host.clone(), id: [99; 16] },
            _ => self.identity(),
        };
        let mut admin = match self.open(true)? {
            Some(q) => q,
            None => return Ok(()),
        };
        let result = self.with_admin(stage, &who, &mut admin);
        if result.is_err() {
            self.recent.push("admin queue:".into());
            self.recent.extend(admin.recent);
        }
        result
    }

    /// A connection after the greeting. `None`: the target has no room for another.
    fn open(&mut self, is_admin: bool) -> Found<Option<Queue>> {
        let mut host = match Host::dial(self.subject.addr) {
            Ok(host) => host,
            Err(_) => return Err("nobody listens any more".into()),
        };
        let (hdgst, ddgst) = (self.rng.one_in(4), self.rng.one_in(4));
        let r2ts = self.rng.below(4) as u32;
        match host.greet(hdgst, ddgst, r2ts) {
            Ok(()) => Ok(Some(Queue::new(host, is_admin))),
            Err(end) => Err(format!("a right greeting: {end:?}")),
        }
    }

    /// Connects a queue. `None`: refused, with the status.
    fn connect(&mut self, q: &mut Queue, who: &Identity, qid: u16, cntlid: Cntlid) -> Found<Option<Cqe>> {
        let command =
            commands::connect(&self.subject.nqn, who, qid, 64, cntlid).ok_or("a name that is none")?;
        q.cid += 1;
        let sqe = Sqe { cid: q.cid.into(), ..command.sqe };
        let bytes = q.host.capsule(&sqe, &command.capsule);
        self.counts.commands += 1;
        let answer = q.host.send(&bytes).and_then(|()| q.host.recv(PATIENCE));
        match answer {
            Ok(Pdu::Response(cqe)) => Ok(Some(cqe).filter(|c| c.status().is_success())),
            Ok(other) => Err(format!("Connect: {other:?}")),
            Err(end) => Err(format!("Connect: {end:?}")),
        }
    }

    fn with_admin(&mut self, stage: Stage, who: &Identity, admin: &mut Queue) -> Found<()> {
        if stage == Stage::Greeted {
            return self.before_connect(admin);
        }
        let Some(cqe) = self.connect(admin, who, 0, Cntlid::DYNAMIC)? else {
            return Err("Connect was refused".into());
        };
        let cntlid = Cntlid(cqe.dw0.get() as u16);
        match stage {
            Stage::Connected => return self.spray_admin(admin, 40, false),
            Stage::Authenticating => return self.authenticate(admin),
            _ => {}
        }
        self.property(admin, Property::Cc, 0x0046_0001)?;
        if admin.ended {
            return Ok(());
        }
        if stage == Stage::Admin {
            return self.spray_admin(admin, 80, true);
        }
        let Some(mut io) = self.open(false)? else { return Ok(()) };
        let result = self.with_io(stage, who, cntlid, (admin, &mut io));
        if result.is_err() {
            self.recent.push("I/O queue:".into());
            self.recent.extend(io.recent);
        }
        result
    }

    /// Sets a property and waits for it.
    fn property(&mut self, admin: &mut Queue, property: Property, value: u64) -> Found<()> {
        let sqe = Sqe::from_view(&PropertyCommand::set(Cid(0), property, value));
        let before = admin.may_end;
        let command = Command { sqe, capsule: Vec::new(), payload: Vec::new(), must_fail: None };
        admin.fire(&mut self.rng, command, &mut self.counts)?;
        admin.may_end = admin.may_end.filter(|_| before.is_some());
        admin.drain(&mut self.rng, 0, &mut self.counts)
    }

    fn with_io(
        &mut self,
        stage: Stage,
        who: &Identity,
        cntlid: Cntlid,
        (admin, io): (&mut Queue, &mut Queue),
    ) -> Found<()> {
        if self.connect(io, who, 1, cntlid)?.is_none() {
            return Err("Connect of an I/O queue was refused".into());
        }
        let rounds = self.rng.range(20, 120);
        for _ in 0..rounds {
            let c = commands::io(&mut self.rng, &self.subject.namespaces);
            io.fire(&mut self.rng, c, &mut self.counts)?;
            if self.rng.one_in(8) {
                let mut c = commands::admin(&mut self.rng, &self.subject.namespaces, true);
                if c.sqe.opcode == FABRICS {
                    // What that does to the controller is for the other stages.
                    c = self.keep_alive();
                }
                admin.fire(&mut self.rng, c, &mut self.counts)?;
                io.may_end = io.may_end.or(admin.may_end);
                admin.drain(&mut self.rng, 0, &mut self.counts)?;
            }
            let left = self.rng.below(DEPTH as u64) as usize;
            if io.under_way() >= DEPTH {
                self.settle(io)?;
                io.drain(&mut self.rng, left, &mut self.counts)?;
            }
        }
        match stage {
            Stage::Resetting => {
                let cc = [0, 0x0046_0000, 0x10_0000][self.rng.below(3) as usize];
                io.may_end = Some("the controller was reset");
                self.property(admin, Property::Cc, cc)?;
                self.spray_both(admin, io)?;
                self.property(admin, Property::Cc, 0x0046_0001)?;
                self.spray_both(admin, io)
            }
            Stage::Shutdown => {
                let cc = 0x0046_0001 | self.rng.range(1, 2) << 14;
                io.may_end = Some("the controller was shut down");
                self.property(admin, Property::Cc, cc)?;
                self.spray_both(admin, io)
            }
            _ => {
                if self.rng.one_in(3) {
                    // Gone with everything under way.
                    return Ok(());
                }
                self.settle(io)?;
                io.drain(&mut self.rng, 0, &mut self.counts)?;
                admin.drain(&mut self.rng, 0, &mut self.counts)
            }
        }
    }

    /// The first of two fused commands waits for the next command: here is one.
    fn settle(&mut self, io: &mut Queue) -> Found<()> {
        if !io.last_fused {
            return Ok(());
        }
        let flush = Sqe::io(Io::Flush, Cid(0), Nsid(1));
        let c = Command { sqe: flush, capsule: Vec::new(), payload: Vec::new(), must_fail: None };
        io.fire(&mut self.rng, c, &mut self.counts)
    }

    fn keep_alive(&self) -> Command {
        let sqe = Sqe::admin(Admin::KeepAlive, Cid(0), Nsid(0));
        Command { sqe, capsule: Vec::new(), payload: Vec::new(), must_fail: None }
    }

    /// A controller in between: whatever is answered, it is answered, or the connection ends.
    fn spray_both(&mut self, admin: &mut Queue, io: &mut Queue) -> Found<()> {
        for _ in 0..10 {
            let mut c = commands::io(&mut self.rng, &self.subject.namespaces);
            c.must_fail = None;
            io.fire(&mut self.rng, c, &mut self.counts)?;
            let mut c = commands::admin(&mut self.rng, &self.subject.namespaces, true);
            c.must_fail = c.must_fail.filter(|why| why.starts_with("reserved"));
            admin.fire(&mut self.rng, c, &mut self.counts)?;
            admin.drain(&mut self.rng, 0, &mut self.counts)?;
        }
        self.settle(io)?;
        io.drain(&mut self.rng, 0, &mut self.counts)
    }

    fn spray_admin(&mut self, admin: &mut Queue, rounds: u64, enabled: bool) -> Found<()> {
        // Once the host may have changed the controller's state, only answers count.
        let mut touched = false;
        for _ in 0..rounds {
            let mut c = commands::admin(&mut self.rng, &self.subject.namespaces, enabled);
            touched |= c.sqe.opcode == FABRICS && c.sqe.nsid.get() as u8 == Fabrics::PropertySet as u8;
            if touched && c.must_fail.is_some_and(|why| why.contains("enabled")) {
                c.must_fail = None;
            }
            admin.fire(&mut self.rng, c, &mut self.counts)?;
            if admin.under_way() >= DEPTH + admin.events || self.rng.one_in(4) {
                admin.drain(&mut self.rng, 0, &mut self.counts)?;
            }
        }
        admin.drain(&mut self.rng, 0, &mut self.counts)
    }

    fn before_connect(&mut self, q: &mut Queue) -> Found<()> {
        for _ in 0..10 {
            let namespaces = &self.subject.namespaces;
            let mut c = match self.rng.below(3) {
                0 => commands::io(&mut self.rng, namespaces),
                1 => commands::admin(&mut self.rng, namespaces, false),
                _ => commands::fabrics(&mut self.rng, true),
            };
            c.must_fail = Some("there is no queue");
            // Nobody is there to end: only what breaks the transport's rules, or a capsule larger than it may be.
            q.fire(&mut self.rng, c, &mut self.counts)?;
            q.may_end = q
                .may_end
                .filter(|why| !matches!(*why, "a property was set" | "Disconnect" | "authentication"));
            // An event request is a command like the others here: refused.
            q.events = 0;
            q.drain(&mut self.rng, 0, &mut self.counts)?;
        }
        Ok(())
    }

    fn authenticate(&mut self, q: &mut Queue) -> Found<()> {
        q.may_end = Some("authentication");
        for _ in 0..12 {
            let mut c = match self.rng.below(4) {
                0 => commands::admin(&mut self.rng, &self.subject.namespaces, false),
                _ => commands::auth_message(&mut self.rng),
            };
            let sqe = &c.sqe;
            let is_auth = sqe.opcode == FABRICS
                && matches!(
                    Fabrics::from_u8(sqe.nsid.get() as u8),
                    Some(Fabrics::AuthenticationSend | Fabrics::AuthenticationReceive)
                );
            c.must_fail = (!is_auth).then_some("the host has not authenticated");
            q.fire(&mut self.rng, c, &mut self.counts)?;
            q.events = 0;
            if self.rng.one_in(2) {
                q.drain(&mut self.rng, 0, &mut self.counts)?;
            }
        }
        q.drain(&mut self.rng, 0, &mut self.counts)
    }

    /// Bytes that are no greeting, a greeting with lies, or a Connect with lies.
    fn greeting(&mut self) -> Found<()> {
        let Ok(mut host) = Host::dial(self.subject.addr) else {
            return Err("nobody listens any more".into());
        };
        if self.rng.one_in(2) {
            let mut bytes = vec![0; self.rng.range(1, 600) as usize];
            if self.rng.one_in(2) {
                self.rng.fill(&mut bytes);
            } else {
                bytes.resize(128, 0);
                build::ic_req(&mut bytes, 0, false, false, 0).map_err(|e| format!("{e:?}"))?;
                let at = self.rng.below(128) as usize;
                bytes[at] ^= 1 << self.rng.below(8);
            }
            self.recent.push(format!("{bytes:02x?}"));
            // Whether there is an answer depends on the bytes; it is of the right form or it is none.
            return match host.send(&bytes).and_then(|()| host.recv(Duration::from_millis(50))) {
                Err(End::Broken(what)) => Err(what),
                Ok(Pdu::IcResp) | Err(_) => Ok(()),
                Ok(other) => Err(format!("instead of ICResp: {other:?}")),
            };
        }
        let who = self.identity();
        let Some(mut q) = self.open(true)? else { return Ok(()) };
        for _ in 0..6 {
            let qid = self.rng.below(4) as u16;
            let cntlid = if self.rng.one_in(2) { Cntlid::DYNAMIC } else { Cntlid(self.rng.next() as u16) };
            let Some(mut c) = commands::connect(&self.subject.nqn, &who, qid, 32, cntlid) else { continue };
            commands::damage_connect(&mut self.rng, &mut c);
            c.payload = vec![0; (c.sqe.sgl.length.get() as usize).min(8192)];
            let success = self.counts.succeeded;
            q.fire(&mut self.rng, c, &mut self.counts)?;
            q.events = 0;
            let drained = q.drain(&mut self.rng, 0, &mut self.counts);
            if drained.is_err() {
                self.recent.extend(q.recent.iter().cloned());
            }
            drained?;
            if self.counts.succeeded > success {
                // Not every lie is one: it is connected now.
                break;
            }
        }
        Ok(())
    }
}
