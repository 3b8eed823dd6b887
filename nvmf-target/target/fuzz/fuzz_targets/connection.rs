//! The target's state machine without I/O: bytes into one or two connections of a simulated reactor, PDUs out. Whatever
//! comes in: no panic, what comes out is legal PDUs with right digests and answers to what was asked, and once the
//! connections have ended nothing is left of them.
//!
//! The first bytes choose digests and how far the connections have come; then come steps: what to send on which queue, from
//! bytes as they are to commands that make sense with some fields from the input.
#![no_main]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::sync::Arc;

use cryptfold_bdev::Registry;
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_nvmf_spec::fabrics::{Connect, ConnectData, PropertyCommand};
use cryptfold_nvmf_spec::opcode::{Admin, Io};
use cryptfold_nvmf_spec::pdu::build::{self, DataPart, Format};
use cryptfold_nvmf_spec::pdu::{Digest, Event, Header, Limits, Parser, Role};
use cryptfold_nvmf_spec::property::Property;
use cryptfold_nvmf_spec::sqe::RwControl;
use cryptfold_nvmf_spec::{Cid, Cntlid, Cqe, Nqn, Nsid, Qid, Sgl, Sqe, Ttag};
use cryptfold_nvmf_target::wire::{MemWire, Wire, mem_pair};
use cryptfold_nvmf_target::{ListenAddr, NsOptions, SubsystemOptions, Target, TransportOptions};
use cryptfold_reactor::{self as reactor, Sim};
use libfuzzer_sys::fuzz_target;
use zerocopy::{FromBytes, IntoBytes};

const NQN: &str = "nqn.2024-01.io.cryptfold:fuzz";
const HOST: &str = "nqn.2024-01.io.cryptfold:host";
const BLOCKS: u64 = 64;

/// Bytes of the input, in order; zeros when it is over.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (now, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        now
    }
}

/// The host's end of a connection.
struct End {
    wire: MemWire,
    parser: Parser,
    format: Format,
    input: Vec<u8>,
    /// Commands sent in whole and not answered, by identifier; `None` once raw bytes were sent, which may be anything.
    waiting: Option<BTreeMap<u16, u32>>,
    header: Option<Header>,
    data: Vec<u8>,
    /// The last request for data.
    asked: (Cid, Ttag, u32, u32),
    last: Option<Cqe>,
    greeted: bool,
    closed: bool,
}

impl End {
    fn new(target: &Target, addr: &ListenAddr) -> End {
        let (mine, theirs) = mem_pair(1 << 16);
        target.attach(addr, Box::new(theirs)).expect("the address listens");
        End {
            wire: mine,
            parser: Parser::new(Role::Host),
            format: Format::default(),
            input: Vec::new(),
            waiting: Some(BTreeMap::new()),
            header: None,
            data: Vec::new(),
            asked: (Cid(0), Ttag(0), 0, 0),
            last: None,
            greeted: false,
            closed: false,
        }
    }

    /// Sends as much as the pipe holds, and lets the target work.
    async fn send(&mut self, mut bytes: &[u8]) {
        for _ in 0..200 {
            if bytes.is_empty() {
                break;
            }
            match self.wire.send(&[IoSlice::new(bytes)]) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
            self.settle().await;
        }
        self.settle().await;
    }

    /// A few turns of the target, then what came from it.
    async fn settle(&mut self) {
        for _ in 0..4 {
            reactor::yield_now().await;
        }
        let mut buf = [0; 8192];
        loop {
            match self.wire.recv(&mut [IoSliceMut::new(&mut buf)]) {
                Ok(0) => {
                    self.closed = true;
                    break;
                }
                Ok(n) => self.input.extend_from_slice(&buf[..n]),
                Err(_) => break,
            }
        }
        self.parse();
    }

    fn parse(&mut self) {
        loop {
            let p = self.parser.feed(&self.input).expect("the target speaks the protocol");
            let rest = self.input.split_off(p.consumed);
            let taken = std::mem::replace(&mut self.input, rest);
            match p.event {
                Event::NeedMore => return,
                Event::Header(pdu) => {
                    if let Header::IcResp { align_bytes, hdgst, ddgst, .. } = pdu.header {
                        self.format = Format { hdgst, ddgst, align_bytes };
                        self.greeted = true;
                        self.parser.establish(Limits { hdgst, ddgst, ..Default::default() });
                    }
                    self.data.clear();
                    if pdu.layout.data_len == 0 {
                        self.pdu(pdu.header);
                    } else {
                        self.header = Some(pdu.header);
                    }
                }
                Event::Data { start, len } => self.data.extend_from_slice(&taken[start..start + len]),
                Event::End { ddgst } => {
                    let mut digest = Digest::new();
                    digest.update(&self.data);
                    assert!(ddgst.is_none_or(|d| d == digest.value()), "a wrong data digest");
                    let header = self.header.take().expect("data follows a header");
                    self.pdu(header);
                }
            }
        }
    }

    fn pdu(&mut self, header: Header) {
        match header {
            Header::CapsuleResp(cqe) => {
                self.last = Some(cqe);
                self.answered(cqe.cid());
            }
            Header::C2hData { cid, success, .. } => {
                if let Some(waiting) = &self.waiting {
                    assert!(waiting.contains_key(&cid.0), "data for nobody");
                }
                if success {
                    self.answered(cid);
                }
            }
            Header::R2t { cid, ttag, offset, len } => {
                if let Some(waiting) = &self.waiting {
                    assert!(waiting.contains_key(&cid.0), "a request to nobody");
                }
                assert!(len > 0 && u64::from(offset) + u64::from(len) <= 131_072);
                self.asked = (cid, ttag, offset, len);
            }
            Header::IcResp { .. } | Header::TermReq { .. } => {}
            other => panic!("from a target: {other:?}"),
        }
    }

    fn answered(&mut self, cid: Cid) {
        let Some(waiting) = &mut self.waiting else { return };
        let count = waiting.get_mut(&cid.0).expect("an answer to nobody");
        *count -= 1;
        if *count == 0 {
            waiting.remove(&cid.0);
        }
    }

    async fn command(&mut self, sqe: &Sqe, data: &[u8]) {
        let mut bytes = vec![0; 256];
        let Ok(n) = build::capsule_cmd(&mut bytes, sqe, data.len() as u32, self.format) else { return };
        bytes.truncate(n);
        if let Some(waiting) = &mut self.waiting {
            *waiting.entry(sqe.cid().0).or_default() += 1;
        }
        self.send_with_data(bytes, data).await;
    }

    async fn send_with_data(&mut self, mut bytes: Vec<u8>, data: &[u8]) {
        bytes.extend_from_slice(data);
        if self.format.ddgst && !data.is_empty() {
            let mut digest = Digest::new();
            digest.update(data);
            bytes.extend(digest.value().to_le_bytes());
        }
        self.send(&bytes).await;
    }

    /// A command of the way to the stage that was chosen: dword 0 of its completion, which is a success.
    async fn ask(&mut self, sqe: &Sqe, data: &[u8]) -> u32 {
        self.last = None;
        self.command(sqe, data).await;
        while self.last.is_none() {
            assert!(!self.closed, "the target hung up");
            self.settle().await;
        }
        let cqe = self.last.expect("it was waited for");
        assert!(cqe.status().is_success(), "{}", cqe.status());
        cqe.dw0.get()
    }

    async fn greet(&mut self, hdgst: bool, ddgst: bool) {
        let mut buf = [0; 128];
        let n = build::ic_req(&mut buf, 0, hdgst, ddgst, 1).expect("it fits");
        self.send(&buf[..n]).await;
        // Digests from here on.
        while !self.greeted && !self.closed {
            self.settle().await;
        }
    }

    /// The controller's identifier.
    async fn connect(&mut self, qid: u16, cntlid: Cntlid) -> Cntlid {
        let name = |n| Nqn::parse(n).expect("a name");
        let data = ConnectData::new([9; 16], cntlid, name(NQN), name(HOST));
        let connect = Sqe::from_view(&Connect::new(Cid(0), Qid(qid), 15, 0));
        Cntlid(self.ask(&connect, data.as_bytes()).await as u16)
    }
}

/// A command that makes sense, with some of its fields from the input.
fn sensible(step: u8, input: &mut Input<'_>) -> Sqe {
    let cid = Cid(u16::from(input.byte() % 24));
    let mut sqe = Sqe::io(Io::ALL[usize::from(step) % Io::ALL.len()], cid, Nsid(u32::from(input.byte() % 3)));
    sqe.set_rw(u64::from(input.byte()), 1 + u32::from(input.byte() % 80), RwControl(0));
    let len = match input.byte() % 4 {
        0 => u32::from(input.u16()),
        _ => sqe.block_count() * 512,
    };
    sqe.sgl = Sgl::transport(len);
    if input.byte() % 8 == 0 {
        sqe.flags ^= input.byte() & 3;
    }
    sqe
}

async fn step(end: &mut End, kind: u8, input: &mut Input<'_>) {
    match kind % 8 {
        // Bytes as they are: from here on answers may be to anything.
        0 => {
            end.waiting = None;
            let n = usize::from(input.byte());
            end.send(input.bytes(n)).await;
        }
        1 => {
            let mut raw = [0; 64];
            let bytes = input.bytes(64);
            raw[..bytes.len()].copy_from_slice(bytes);
            let sqe = Sqe::read_from_bytes(&raw).expect("64 bytes");
            let n = usize::from(input.u16() % 9000);
            end.command(&sqe, &vec![kind; n]).await;
        }
        2 | 3 => {
            let sqe = sensible(kind / 8, input);
            end.command(&sqe, &[]).await;
        }
        4 => {
            let mut sqe = sensible(kind / 8, input);
            let n = sqe.sgl.length.get().min(4096);
            sqe.sgl = Sgl::in_capsule(0, n);
            end.command(&sqe, &vec![kind; n as usize]).await;
        }
        // Data: what was asked for, or not quite.
        5 => {
            let (cid, ttag, offset, len) = end.asked;
            let mut part = DataPart { cid, offset, len, last: true };
            let mut tag = ttag;
            match input.byte() % 8 {
                0 => tag = Ttag(input.u16()),
                1 => part.cid = Cid(input.u16()),
                2 => part.offset = part.offset.wrapping_add(u32::from(input.u16())),
                3 => part.len = u32::from(input.u16()),
                4 => part.last = false,
                5 => (part.len, part.last) = (len / 2, false),
                _ => {}
            }
            let part = DataPart { len: part.len.min(131_072), ..part };
            let mut bytes = vec![0; 64];
            if let Ok(n) = build::h2c_data(&mut bytes, part, tag, end.format) {
                bytes.truncate(n);
                end.send_with_data(bytes, &vec![kind; part.len as usize]).await;
            }
        }
        6 => {
            let mut sqe = Sqe::admin(Admin::ALL[usize::from(kind / 8) % Admin::ALL.len()], Cid(30), Nsid(1));
            (sqe.cdw10, sqe.cdw11) = (u32::from(input.u16()).into(), u32::from(input.u16()).into());
            sqe.sgl = Sgl::transport(u32::from(input.u16() % 8193));
            end.command(&sqe, &[]).await;
        }
        _ => {
            let value = [0x0046_0001, 0, 0x0046_4001, u64::from(input.u16())][usize::from(kind / 8) % 4];
            let property = [Property::Cc, Property::Csts, Property::Nssr, Property::Cap];
            let which = property[usize::from(input.byte() / 64)];
            end.command(&Sqe::from_view(&PropertyCommand::set(Cid(31), which, value)), &[]).await;
        }
    }
}

async fn drive(target: Arc<Target>, addr: ListenAddr, bytes: Vec<u8>) {
    let mut input = Input(&bytes);
    let knobs = input.byte();
    let (hdgst, ddgst, stage) = (knobs & 1 != 0, knobs & 2 != 0, knobs >> 2 & 7);
    let mut ends = vec![End::new(&target, &addr)];
    if stage > 0 {
        ends[0].greet(hdgst, ddgst).await;
    }
    if stage > 1 {
        let cntlid = ends[0].connect(0, Cntlid::DYNAMIC).await;
        if stage > 2 {
            let enable = PropertyCommand::set(Cid(1), Property::Cc, 0x0046_0001);
            ends[0].ask(&Sqe::from_view(&enable), &[]).await;
        }
        if stage > 3 {
            let mut io = End::new(&target, &addr);
            io.greet(ddgst, hdgst).await;
            io.connect(1, cntlid).await;
            ends.push(io);
        }
    }
    // Bounded, so that an input is quick.
    for _ in 0..60 {
        if input.0.is_empty() || ends.iter().all(|e| e.closed) {
            break;
        }
        let kind = input.byte();
        let n = if kind & 0x80 == 0 { ends.len() - 1 } else { 0 };
        step(&mut ends[n], kind & 0x7f, &mut input).await;
    }
    for end in &mut ends {
        end.wire.shutdown(Shutdown::Both);
        end.settle().await;
    }
}

/// A simulated reactor with a target. It serves some inputs and is then made anew, so that little of one input is seen by
/// another, and an input is quick.
struct Rig {
    sim: Sim,
    target: Arc<Target>,
    addr: ListenAddr,
    inputs: u32,
}

const INPUTS_OF_A_RIG: u32 = 200;

impl Rig {
    fn new() -> Rig {
        let mut sim = Sim::new(7);
        let registry = Registry::new();
        let disk = MallocOptions {
            name: "disk".into(),
            num_blocks: BLOCKS,
            block_size_bytes: 512,
            uuid: None,
            optimal_io_boundary: 0,
        };
        cryptfold_bdev_malloc::create(&registry, disk).expect("a RAM disk");
        let target = Arc::new(Target::new(registry, sim.handles()));
        target.create_transport("TCP", TransportOptions::default()).expect("transport");
        let subsystem = SubsystemOptions { allow_any_host: true, ..SubsystemOptions::new(NQN) };
        target.create_subsystem(subsystem).expect("subsystem");
        target.add_ns(NQN, &NsOptions { bdev_name: "disk".into(), ..Default::default() }).expect("namespace");
        let addr = ListenAddr::parse("TCP", None, "192.0.2.1", "4420").expect("an address");
        target.add_listener_unbound(NQN, &addr).expect("a new address");
        sim.run_for(10);
        Rig { sim, target, addr, inputs: 0 }
    }

    fn run(&mut self, bytes: &[u8]) {
        self.inputs += 1;
        let (t, addr, bytes) = (self.target.clone(), self.addr.clone(), bytes.to_vec());
        let task = self.sim.spawn(0, move || drive(t, addr, bytes));
        let target = &self.target;
        assert!(self.sim.run_until(|| task.is_finished()), "stalled");
        assert!(
            self.sim.run_until(|| target.controllers(NQN).is_ok_and(|c| c.is_empty())),
            "a controller outlives its connections"
        );
        assert!(
            self.sim.run_until(|| target.buffer_bytes() == 0),
            "memory of connections that have ended: {}",
            target.buffer_bytes()
        );
    }
}

thread_local!(static RIG: RefCell<Option<Rig>> = const { RefCell::new(None) });

fuzz_target!(|bytes: &[u8]| {
    RIG.with_borrow_mut(|rig| {
        if rig.as_ref().is_none_or(|r| r.inputs == INPUTS_OF_A_RIG) {
            *rig = Some(Rig::new());
        }
        rig.as_mut().expect("it was just made").run(bytes);
    });
});
