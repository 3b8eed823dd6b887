//! A target over loopback, and a small blocking host that can speak every PDU, right and wrong.

#![allow(dead_code, missing_docs)]

pub mod proxy;
pub mod witness;

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::Registry;
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_nvmf_auth::TlsPsk;
use cryptfold_nvmf_spec::fabrics::{
    Authentication, Cattr, Connect, ConnectData, Disconnect, PropertyCommand,
};
use cryptfold_nvmf_spec::log::{GetLogPage, Lid};
use cryptfold_nvmf_spec::opcode::{Admin, Io};
use cryptfold_nvmf_spec::pdu::build::{self, DataPart, Format};
use cryptfold_nvmf_spec::pdu::{Digest, Event, Header, Limits, Parser, Role};
use cryptfold_nvmf_spec::property::{Cc, Property};
use cryptfold_nvmf_spec::sqe::{Fuse, RwControl};
use cryptfold_nvmf_spec::{Cid, Cntlid, Cqe, Nqn, Nsid, Qid, Sgl, Sqe, Status, Ttag, nqn};
use cryptfold_nvmf_target::{ListenAddr, NsOptions, SubsystemOptions, Target, TransportOptions};
use cryptfold_nvmf_tls::{Raw, Session};
use cryptfold_reactor::{IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};

pub const NQN: &str = "nqn.2024-01.io.cryptfold:test";
pub const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555";
pub const BLOCKS: u64 = 4096;

/// A target with one subsystem and a RAM disk of 4,096 blocks of 512 bytes as namespace 1.
pub struct Rig {
    pub target: Target,
    pub registry: Arc<Registry>,
    pub addr: SocketAddr,
    pub listen: ListenAddr,
    pub runtime: Runtime,
}

pub fn runtime(cores: usize, policy: IdlePolicy) -> Runtime {
    let memory = MemoryConfig { fixed_buffers: false, arena_bytes: 4 << 20, ..Default::default() };
    let config =
        RuntimeConfig { cores: (0..cores).collect(), policy, pin: false, memory, ..Default::default() };
    Runtime::start(config).expect("reactors start")
}

impl Rig {
    pub fn new() -> Rig {
        Rig::with(2, IdlePolicy::Interrupt, TransportOptions::default())
    }

    /// Whose RAM disk has this identity.
    pub fn with_disk_uuid(uuid: uuid::Uuid) -> Rig {
        Rig::build(2, IdlePolicy::Interrupt, TransportOptions::default(), Some(uuid))
    }

    pub fn with(cores: usize, policy: IdlePolicy, options: TransportOptions) -> Rig {
        Rig::build(cores, policy, options, None)
    }

    fn build(cores: usize, policy: IdlePolicy, options: TransportOptions, uuid: Option<uuid::Uuid>) -> Rig {
        let runtime = runtime(cores, policy);
        let registry = Registry::new();
        let disk = MallocOptions {
            name: "disk".into(),
            num_blocks: BLOCKS,
            block_size_bytes: 512,
            uuid,
            optimal_io_boundary: 0,
        };
        cryptfold_bdev_malloc::create(&registry, disk).expect("a RAM disk");
        let target = Target::new(registry.clone(), runtime.handles());
        target.create_transport("TCP", options).expect("transport");
        let subsystem = SubsystemOptions { allow_any_host: true, ..SubsystemOptions::new(NQN) };
        target.create_subsystem(subsystem).expect("subsystem");
        let ns = NsOptions { bdev_name: "disk".into(), ..Default::default() };
        assert_eq!(target.add_ns(NQN, &ns), Ok(1));
        let any = ListenAddr::parse("TCP", Some("IPv4"), "127.0.0.1", "0").expect("an address");
        let listen = target.add_listener(NQN, &any).expect("a free port");
        Rig { target, registry, addr: listen.socket_addr(), listen, runtime }
    }

    /// An enabled controller's admin queue.
    pub fn admin(&self) -> Client {
        let mut c = Client::open(self.addr, false, false);
        let cqe = c.connect(NQN, 0, 32, Cntlid::DYNAMIC);
        assert_eq!(cqe.status(), Status::SUCCESS);
        c.cntlid = Cntlid(cqe.dw0.get() as u16);
        c.enable();
        c
    }

    /// An enabled controller and its I/O queue 1, of a host with this identifier.
    pub fn host(&self, hostid: u8) -> (Client, Client) {
        let mut admin = Client::open(self.addr, false, false);
        (admin.hostid, admin.hostnqn) = ([hostid; 16], format!("nqn.2024-01.io.cryptfold:host{hostid}"));
        let cqe = admin.connect(NQN, 0, 32, Cntlid::DYNAMIC);
        assert_eq!(cqe.status(), Status::SUCCESS);
        admin.cntlid = Cntlid(cqe.dw0.get() as u16);
        admin.enable();
        let mut io = Client::open(self.addr, false, false);
        (io.hostid, io.hostnqn) = (admin.hostid, admin.hostnqn.clone());
        assert_eq!(io.connect(NQN, 1, 128, admin.cntlid).status(), Status::SUCCESS);
        (admin, io)
    }

    /// An I/O queue of the same controller.
    pub fn io(&self, admin: &Client, qid: u16, hdgst: bool, ddgst: bool) -> Client {
        let mut c = Client::open(self.addr, hdgst, ddgst);
        let cqe = c.connect(NQN, qid, 128, admin.cntlid);
        assert_eq!(cqe.status(), Status::SUCCESS, "queue {qid}");
        c
    }

    /// Puts a slow disk in place of the RAM disk, so that commands are under way for `latency`.
    pub fn slow(&self, latency: Duration) {
        self.target.remove_ns(NQN, 1).expect("it is there");
        let us = latency.as_micros() as u64;
        let options = cryptfold_bdev_delay::DelayOptions {
            name: "slow".into(),
            base_bdev_name: "disk".into(),
            uuid: None,
            latencies_us: [us; 4],
        };
        cryptfold_bdev_delay::create(&self.registry, options).expect("a layer");
        let ns = NsOptions { bdev_name: "slow".into(), ..Default::default() };
        assert_eq!(self.target.add_ns(NQN, &ns), Ok(1));
    }

    /// Waits until the subsystem has no controllers.
    pub fn wait_empty(&self) {
        wait(|| self.target.controllers(NQN).is_ok_and(|c| c.is_empty()));
    }
}

/// Latency of a device whose I/O does not come back by itself while a test runs.
pub const FOR_EVER: Duration = Duration::from_secs(3600);
/// What has not happened by then will not happen, however slow the machine is.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn wait(done: impl Fn() -> bool) {
    let end = std::time::Instant::now() + PATIENCE;
    while !done() {
        assert!(std::time::Instant::now() < end, "not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What comes from the target.
#[derive(Debug, PartialEq)]
pub enum Pdu {
    IcResp { hdgst: bool, ddgst: bool, max_data: u32 },
    Response(Cqe),
    Data { cid: Cid, offset: u32, bytes: Vec<u8>, last: bool, success: bool },
    R2t { cid: Cid, ttag: Ttag, offset: u32, len: u32 },
    Term { fes: u16, fei: u32, header: Vec<u8> },
    Closed,
}

/// A blocking socket under TLS.
struct Blocking<'a>(&'a TcpStream);

impl Raw for Blocking<'_> {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> std::io::Result<usize> {
        (&mut &*self.0).read_vectored(bufs)
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> std::io::Result<usize> {
        (&mut &*self.0).write_vectored(bufs)
    }
}

pub struct Client {
    pub stream: TcpStream,
    tls: Option<Session>,
    parser: Parser,
    pub format: Format,
    input: Vec<u8>,
    pub cntlid: Cntlid,
    pub next_cid: u16,
    /// Ask to do without flow control, so that C2HData may stand for the response.
    pub no_flow_control: bool,
    pub data_limit: usize,
    /// This host's name.
    pub hostnqn: String,
    pub hostid: [u8; 16],
}

impl Client {
    /// A socket on which nothing was sent.
    pub fn raw(addr: SocketAddr) -> Client {
        let stream = TcpStream::connect(addr).expect("the target listens");
        stream.set_nodelay(true).expect("nodelay");
        stream.set_read_timeout(Some(PATIENCE)).expect("time-out");
        stream.set_write_timeout(Some(PATIENCE)).expect("time-out");
        Client {
            stream,
            tls: None,
            parser: Parser::new(Role::Host),
            format: Format::default(),
            input: Vec::new(),
            cntlid: Cntlid::DYNAMIC,
            next_cid: 0,
            no_flow_control: false,
            data_limit: 131_072,
            hostnqn: HOST.into(),
            hostid: [7; 16],
        }
    }

    /// With TLS by this key, after the handshake. The error is that of the handshake.
    pub fn secure(addr: SocketAddr, key: &TlsPsk) -> std::io::Result<Client> {
        let mut c = Client::raw(addr);
        let mut session = Session::client(key).expect("a key that can be used");
        while !session.handshake(&Blocking(&c.stream))? {}
        c.tls = Some(session);
        Ok(c.greet(false, false))
    }

    /// After ICReq and ICResp.
    pub fn open(addr: SocketAddr, hdgst: bool, ddgst: bool) -> Client {
        Client::raw(addr).greet(hdgst, ddgst)
    }

    fn greet(self, hdgst: bool, ddgst: bool) -> Client {
        let mut c = self;
        let mut buf = [0; 128];
        let n = build::ic_req(&mut buf, 0, hdgst, ddgst, 0).expect("it fits");
        c.send(&buf[..n]);
        let answer = c.recv();
        assert!(
            matches!(answer, Pdu::IcResp { hdgst: h, ddgst: d, .. } if (h, d) == (hdgst, ddgst)),
            "{answer:?}"
        );
        c
    }

    pub fn send(&mut self, bytes: &[u8]) {
        let raw = Blocking(&self.stream);
        match &mut self.tls {
            None => self.stream.write_all(bytes).expect("the target takes it"),
            Some(session) => {
                let sent = session.send(&raw, &[IoSlice::new(bytes)]);
                assert_eq!(sent.expect("the target takes it"), bytes.len());
            }
        }
    }

    fn fill(&mut self) -> bool {
        let mut buf = [0; 65_536];
        let got = match &mut self.tls {
            None => self.stream.read(&mut buf),
            Some(session) => session.recv(&Blocking(&self.stream), &mut [IoSliceMut::new(&mut buf)]),
        };
        match got {
            Ok(0) => false,
            Ok(n) => {
                self.input.extend_from_slice(&buf[..n]);
                true
            }
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => false,
            // The machine or the process was stopped and goes on.
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => true,
            Err(e) => panic!("nothing from the target: {e}"),
        }
    }

    /// The next PDU.
    pub fn recv(&mut self) -> Pdu {
        let mut header = None;
        let mut data = Vec::new();
        loop {
            let p = self.parser.feed(&self.input).expect("the target speaks the protocol");
            let rest = self.input.split_off(p.consumed);
            let taken = std::mem::replace(&mut self.input, rest);
            match p.event {
                Event::NeedMore => {
                    if !self.fill() {
                        assert!(header.is_none(), "closed within a PDU");
                        return Pdu::Closed;
                    }
                }
                Event::Header(pdu) => {
                    if let Header::IcResp { align_bytes, hdgst, ddgst, .. } = pdu.header {
                        self.format = Format { hdgst, ddgst, align_bytes };
                        self.parser.establish(Limits { hdgst, ddgst, ..Default::default() });
                    }
                    if pdu.layout.data_len == 0 {
                        return Self::pdu(pdu.header, Vec::new());
                    }
                    header = Some(pdu.header);
                }
                Event::Data { start, len } => data.extend_from_slice(&taken[start..start + len]),
                Event::End { ddgst } => {
                    let mut digest = Digest::new();
                    digest.update(&data);
                    assert!(ddgst.is_none_or(|d| d == digest.value()), "data digest from the target");
                    return Self::pdu(header.take().expect("data follows a header"), data);
                }
            }
        }
    }

    fn pdu(header: Header, bytes: Vec<u8>) -> Pdu {
        match header {
            Header::IcResp { hdgst, ddgst, max_h2c_data_bytes, .. } => {
                Pdu::IcResp { hdgst, ddgst, max_data: max_h2c_data_bytes }
            }
            Header::CapsuleResp(cqe) => Pdu::Response(cqe),
            Header::C2hData { cid, offset, last, success } => Pdu::Data { cid, offset, bytes, last, success },
            Header::R2t { cid, ttag, offset, len } => Pdu::R2t { cid, ttag, offset, len },
            Header::TermReq { fes, fei } => Pdu::Term { fes, fei, header: bytes },
            other => panic!("from a target: {other:?}"),
        }
    }

    pub fn cid(&mut self) -> Cid {
        self.next_cid = self.next_cid.wrapping_add(1);
        Cid(self.next_cid)
    }

    /// A command capsule as bytes.
    pub fn capsule(&self, sqe: &Sqe, data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 256];
        let n = build::capsule_cmd(&mut bytes, sqe, data.len() as u32, self.format).expect("it fits");
        bytes.truncate(n);
        self.with_data(bytes, data)
    }

    pub fn h2c_data(&self, part: DataPart, ttag: Ttag, data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 256];
        let n = build::h2c_data(&mut bytes, part, ttag, self.format).expect("it fits");
        bytes.truncate(n);
        self.with_data(bytes, data)
    }

    fn with_data(&self, mut bytes: Vec<u8>, data: &[u8]) -> Vec<u8> {
        bytes.extend_from_slice(data);
        if self.format.ddgst && !data.is_empty() {
            let mut digest = Digest::new();
            digest.update(data);
            bytes.extend(digest.value().to_le_bytes());
        }
        bytes
    }

    /// Sends a command with its data in the capsule, if any.
    pub fn submit(&mut self, sqe: &Sqe, data: &[u8]) {
        let bytes = self.capsule(sqe, data);
        self.send(&bytes);
    }

    /// Answers R2Ts from `data`, collects C2HData, until the command is complete.
    pub fn finish(&mut self, cid: Cid, data: &[u8]) -> (Cqe, Vec<u8>) {
        let mut read = Vec::new();
        loop {
            match self.recv() {
                Pdu::R2t { cid: c, ttag, offset, len } => {
                    assert_eq!(c, cid);
                    let (mut at, end) = (offset, offset + len);
                    while at < end {
                        let len = (end - at).min(self.data_limit as u32);
                        let part = DataPart { cid, offset: at, len, last: at + len == end };
                        let bytes = self.h2c_data(part, ttag, &data[at as usize..(at + len) as usize]);
                        self.send(&bytes);
                        at += len;
                    }
                }
                Pdu::Data { cid: c, offset, bytes, success, .. } => {
                    assert_eq!((c, offset as usize), (cid, read.len()));
                    read.extend(bytes);
                    if success {
                        return (Cqe::new(cid, 0, Status::SUCCESS), read);
                    }
                }
                Pdu::Response(cqe) => {
                    assert_eq!(cqe.cid(), cid);
                    return (cqe, read);
                }
                other => panic!("instead of an answer: {other:?}"),
            }
        }
    }

    /// A command from start to end.
    pub fn run(&mut self, mut sqe: Sqe, in_capsule: &[u8], on_request: &[u8]) -> (Cqe, Vec<u8>) {
        let cid = self.cid();
        sqe.cid = cid.0.into();
        self.submit(&sqe, in_capsule);
        self.finish(cid, on_request)
    }

    pub fn connect(&mut self, subnqn: &str, qid: u16, entries: u16, cntlid: Cntlid) -> Cqe {
        let cid = self.cid();
        let mut data = connect_data_as(&self.hostnqn, subnqn, cntlid);
        data.hostid = self.hostid;
        let mut c = Connect::new(cid, Qid(qid), entries - 1, 0);
        c.cattr = Cattr::default().with_no_sq_flow_control(self.no_flow_control.into()).0;
        self.submit(&Sqe::from_view(&c), zerocopy::IntoBytes::as_bytes(&data));
        self.finish(cid, &[]).0
    }

    pub fn set(&mut self, property: Property, value: u64) -> Cqe {
        let cid = self.cid();
        self.submit(&Sqe::from_view(&PropertyCommand::set(cid, property, value)), &[]);
        self.finish(cid, &[]).0
    }

    pub fn get(&mut self, property: Property) -> u64 {
        let cid = self.cid();
        self.submit(&Sqe::from_view(&PropertyCommand::get(cid, property)), &[]);
        let cqe = self.finish(cid, &[]).0;
        assert_eq!(cqe.status(), Status::SUCCESS);
        cqe.result().get()
    }

    pub fn enable(&mut self) {
        let cc = Cc(0).with_en(1).with_iosqes(6).with_iocqes(4);
        assert_eq!(self.set(Property::Cc, cc.0.into()).status(), Status::SUCCESS);
        assert_eq!(self.get(Property::Csts) & 1, 1);
    }

    pub fn disconnect(&mut self) -> Cqe {
        let cid = self.cid();
        self.submit(&Sqe::from_view(&Disconnect::new(cid)), &[]);
        self.finish(cid, &[]).0
    }

    pub fn admin_in(&mut self, opcode: Admin, nsid: u32, cdw10: u32, len: u32) -> (Cqe, Vec<u8>) {
        let mut sqe = Sqe::admin(opcode, Cid(0), Nsid(nsid));
        sqe.cdw10 = cdw10.into();
        sqe.sgl = Sgl::transport(len);
        self.run(sqe, &[], &[])
    }

    pub fn feature(&mut self, opcode: Admin, fid: u32, value: u32) -> Cqe {
        let mut sqe = Sqe::admin(opcode, Cid(0), Nsid(0));
        sqe.cdw10 = fid.into();
        sqe.cdw11 = value.into();
        self.run(sqe, &[], &[]).0
    }

    /// The start of a log page.
    pub fn log(&mut self, lid: Lid, bytes: u32) -> Vec<u8> {
        let mut sqe = GetLogPage::new(lid, 0, bytes.into()).expect("legal").to_sqe(Cid(0), Nsid(0));
        sqe.sgl = Sgl::transport(bytes);
        let (cqe, page) = self.run(sqe, &[], &[]);
        assert_eq!(cqe.status(), Status::SUCCESS, "{lid:?}");
        page
    }

    /// Asks to be told of the next event; [`Client::finish`] waits for it.
    pub fn await_event(&mut self, cid: u16) {
        self.submit(&Sqe::admin(Admin::AsyncEventRequest, Cid(cid), Nsid(0)), &[]);
    }

    pub fn read(&mut self, lba: u64, blocks: u32) -> (Status, Vec<u8>) {
        let (cqe, data) = self.run(read_sqe(lba, blocks), &[], &[]);
        (cqe.status(), data)
    }

    /// Writes, in the capsule when it fits.
    pub fn write(&mut self, lba: u64, data: &[u8]) -> Status {
        let blocks = (data.len() / 512) as u32;
        if data.len() <= 4096 {
            self.run(rw_sqe(Io::Write, lba, blocks, Sgl::in_capsule(0, data.len() as u32)), data, &[])
                .0
                .status()
        } else {
            self.run(rw_sqe(Io::Write, lba, blocks, Sgl::transport(data.len() as u32)), &[], data).0.status()
        }
    }
}

pub fn connect_data(subnqn: &str, cntlid: Cntlid) -> ConnectData {
    connect_data_as(HOST, subnqn, cntlid)
}

pub fn connect_data_as(hostnqn: &str, subnqn: &str, cntlid: Cntlid) -> ConnectData {
    let name = |n| Nqn::parse(n).expect("a name");
    ConnectData::new([7; 16], cntlid, name(subnqn), name(hostnqn))
}

pub fn rw_sqe(op: Io, lba: u64, blocks: u32, sgl: Sgl) -> Sqe {
    let mut sqe = Sqe::io(op, Cid(0), Nsid(1));
    sqe.set_rw(lba, blocks, RwControl(0));
    sqe.sgl = sgl;
    sqe
}

pub fn read_sqe(lba: u64, blocks: u32) -> Sqe {
    rw_sqe(Io::Read, lba, blocks, Sgl::transport(blocks * 512))
}

pub fn fused(mut sqe: Sqe, cid: Cid, fuse: Fuse) -> Sqe {
    sqe.cid = cid.0.into();
    sqe.set_fuse(fuse);
    sqe
}

/// Bytes that name where they belong.
pub fn pattern(lba: u64, blocks: u32, seed: u8) -> Vec<u8> {
    let byte = |i: usize| (i as u64 / 512 + lba) as u8 ^ (i as u8).wrapping_mul(31) ^ seed;
    (0..blocks as usize * 512).map(byte).collect()
}

/// Sends a message of authentication in the capsule.
pub fn auth_send(c: &mut Client, message: &[u8]) -> Status {
    let sqe = Sqe::from_view(&Authentication::send(Cid(0), message.len() as u32));
    c.run(sqe, message, &[]).0.status().code()
}

/// Fetches one, of so many bytes at most.
pub fn auth_receive(c: &mut Client, len: u32) -> (Status, Vec<u8>) {
    let (cqe, data) = c.run(Sqe::from_view(&Authentication::receive(Cid(0), len)), &[], &[]);
    (cqe.status().code(), data)
}

pub const DISCOVERY: &str = nqn::DISCOVERY;
