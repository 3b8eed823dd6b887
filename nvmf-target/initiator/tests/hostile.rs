//! Targets that do not behave. For each: the right error, the right termination request, every I/O back, no panic.

use std::cell::RefCell;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cryptfold_bdev::{Complete, Frame, Io, Op, Queue, Status as IoStatus};
use cryptfold_nvmf_initiator::{CloseReason, ConnectOptions, Controller, NamespaceQueue};
use cryptfold_nvmf_spec::identify::{ControllerType, IdentifyController, NamespaceIdentify};
use cryptfold_nvmf_spec::pdu::build::{self, DataPart, Format};
use cryptfold_nvmf_spec::pdu::{Digest, Event, Fes, Header, Limits, Parser, Role, Term};
use cryptfold_nvmf_spec::property::{Cap, Vs};
use cryptfold_nvmf_spec::{Cid, Cntlid, Cqe, Nqn, Nsid, Sqe, Status, Ttag, fabrics};
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reactor::sync::oneshot;
use cryptfold_reactor::{IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};
use zerocopy::IntoBytes;

const NQN: &str = "nqn.2024-01.io.cryptfold:hostile";

/// One connection of the false target.
struct Fake {
    stream: TcpStream,
    parser: Parser,
    input: Vec<u8>,
    format: Format,
}

/// What the host sent.
enum Got {
    Command(Sqe),
    Data { ttag: Ttag, offset: u32, bytes: Vec<u8>, last: bool },
    Term { fes: u16 },
    Closed,
}

impl Fake {
    /// What comes next; digests of the host are checked.
    fn next(&mut self) -> Got {
        let (mut header, mut data) = (None, Vec::new());
        loop {
            let step = self.parser.feed(&self.input).expect("our host speaks correctly");
            match step.event {
                Event::NeedMore => {
                    self.input.drain(..step.consumed);
                    let mut buf = [0; 65_536];
                    match self.stream.read(&mut buf) {
                        Ok(0) => return Got::Closed,
                        Ok(n) => self.input.extend_from_slice(&buf[..n]),
                        Err(e) if e.kind() == ErrorKind::Interrupted => {}
                        Err(_) => return Got::Closed,
                    }
                    continue;
                }
                Event::Header(pdu) => {
                    header = Some(pdu.header);
                    if pdu.layout.data_len > 0 {
                        self.input.drain(..step.consumed);
                        continue;
                    }
                }
                Event::Data { start, len } => {
                    data.extend_from_slice(&self.input[start..start + len]);
                    self.input.drain(..step.consumed);
                    continue;
                }
                Event::End { ddgst } => {
                    let mut sum = Digest::new();
                    sum.update(&data);
                    assert!(ddgst.is_none_or(|d| d == sum.value()), "the host's data digest");
                }
            }
            self.input.drain(..step.consumed);
            return match header.expect("a header comes first") {
                Header::CapsuleCmd(sqe) => Got::Command(sqe),
                Header::H2cData { ttag, offset, last, .. } => Got::Data { ttag, offset, bytes: data, last },
                Header::TermReq { fes, .. } => Got::Term { fes },
                other => panic!("a host sends no {other:?}"),
            };
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        // The host may have closed already.
        let _ = self.stream.write_all(bytes);
    }

    fn respond(&mut self, cqe: &Cqe) {
        let mut buf = [0; 64];
        let n = build::capsule_resp(&mut buf, cqe, self.format).expect("it fits");
        self.send(&buf[..n]);
    }

    fn c2h(&self, part: DataPart, success: bool, bytes: &[u8]) -> Vec<u8> {
        let mut buf = [0; 256];
        let n = build::c2h_data(&mut buf, part, success, self.format).expect("it fits");
        let mut pdu = [&buf[..n], bytes].concat();
        if self.format.ddgst {
            let mut sum = Digest::new();
            sum.update(bytes);
            pdu.extend(sum.value().to_le_bytes());
        }
        pdu
    }

    fn data(&mut self, cid: Cid, offset: u32, bytes: &[u8], last: bool, success: bool) {
        let pdu = self.c2h(DataPart { cid, offset, len: bytes.len() as u32, last }, success, bytes);
        self.send(&pdu);
    }

    fn r2t(&mut self, cid: Cid, ttag: u16, offset: u32, len: u32) {
        let mut buf = [0; 64];
        let n = build::r2t(&mut buf, cid, Ttag(ttag), offset, len, self.format).expect("it fits");
        self.send(&buf[..n]);
    }

    fn ok(&mut self, cid: Cid) {
        self.respond(&Cqe::new(cid, 0, Status::SUCCESS));
    }

    /// Admin commands as a well-behaved controller answers them.
    fn admin(&mut self, sqe: &Sqe, namespace: &NamespaceIdentify) {
        let cid = sqe.cid();
        match sqe.opcode {
            0x7f => match sqe.fabrics().expect("a legal command") {
                fabrics::Command::PropertyGet(p) => {
                    let value = match p.offset.get() {
                        0 => Cap::default().with_mqes(127).with_to(2).with_css(1).0,
                        0x1c => 1,
                        _ => 0,
                    };
                    self.respond(&Cqe::new(cid, 0, Status::SUCCESS).with_result(value));
                }
                fabrics::Command::Connect(_) => {
                    self.respond(&Cqe::new(cid, 0, Status::SUCCESS).with_dw0(1));
                }
                _ => self.ok(cid),
            },
            0x06 => {
                let nqn = Nqn::parse(NQN).expect("legal");
                let mut id = IdentifyController::fabrics(ControllerType::Io, Cntlid(1), nqn, Vs::V1_4);
                id.set_capsule_data(4096);
                id.oncs = 0x0d.into();
                let page = if sqe.cdw10.get() == 0 { namespace.as_bytes() } else { id.as_bytes() };
                self.data(cid, 0, page, true, false);
                self.ok(cid);
            }
            // Asynchronous Event Requests wait.
            0x0c => {}
            _ => self.ok(cid),
        }
    }
}

type Script = dyn Fn(&mut Fake, &Sqe) + Send + Sync;

/// A false target: `script` is what it does on each command of an I/O queue. Returns its port and what termination
/// requests it got.
fn target(
    dgst: (bool, bool),
    namespace: NamespaceIdentify,
    script: impl Fn(&mut Fake, &Sqe) + Send + Sync + 'static,
) -> (u16, Arc<Mutex<Vec<u16>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let script: Arc<Script> = Arc::new(script);
    let terms = Arc::new(Mutex::new(Vec::new()));
    let seen = terms.clone();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let (script, seen) = (script.clone(), seen.clone());
            std::thread::spawn(move || serve(stream, dgst, &namespace, &*script, &seen));
        }
    });
    (port, terms)
}

fn serve(
    mut stream: TcpStream,
    dgst: (bool, bool),
    namespace: &NamespaceIdentify,
    script: &Script,
    seen: &Mutex<Vec<u16>>,
) {
    stream.set_nodelay(true).expect("nodelay");
    let mut parser = Parser::new(Role::Controller);
    let mut ic = [0; 128];
    stream.read_exact(&mut ic).expect("ICReq");
    parser.feed(&ic).expect("legal");
    let (hdgst, ddgst) = dgst;
    parser.establish(Limits { hdgst, ddgst, ..Limits::default() });
    let n = build::ic_resp(&mut ic, 0, hdgst, ddgst, 8192).expect("it fits");
    stream.write_all(&ic[..n]).expect("sent");
    let format = Format { hdgst, ddgst, align_bytes: 4 };
    let mut fake = Fake { stream, parser, input: Vec::new(), format };
    let mut io = false;
    loop {
        match fake.next() {
            Got::Command(sqe) if io => script(&mut fake, &sqe),
            Got::Command(sqe) => {
                if let Ok(fabrics::Command::Connect(c)) = sqe.fabrics() {
                    io = !c.qid().is_admin();
                }
                fake.admin(&sqe, namespace);
            }
            Got::Term { fes } => seen.lock().expect("whole").push(fes),
            Got::Data { .. } => {}
            Got::Closed => return,
        }
    }
}

struct One(RefCell<Option<oneshot::Sender<Box<Io>>>>);

impl Complete for One {
    fn complete(self: Rc<Self>, io: Box<Io>, _: Frame) {
        let sender = self.0.borrow_mut().take().expect("completes once");
        assert!(sender.send(io).is_ok(), "the test waits");
    }
}

async fn run(queue: &Rc<NamespaceQueue>, mut io: Box<Io>) -> Box<Io> {
    let (sender, receiver) = oneshot::channel();
    io.push(Rc::new(One(RefCell::new(Some(sender)))), 0, 0);
    queue.clone().submit(io);
    receiver.await.expect("every I/O comes back")
}

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| ((i * 7) ^ (i >> 8)) as u8).collect()
}

fn read() -> Box<Io> {
    Io::new(Op::Read, 0, 8)
}

fn write(blocks: u64) -> Box<Io> {
    let mut io = Io::new(Op::Write, 0, blocks);
    io.data = Buf::from_slice(&bytes(blocks as usize * 512)).into();
    io
}

fn reactor() -> Runtime {
    let memory = MemoryConfig { fixed_buffers: false, arena_bytes: 4 << 20, ..Default::default() };
    let policy = IdlePolicy::Interrupt;
    let config = RuntimeConfig { cores: vec![0], policy, pin: false, memory, ..Default::default() };
    Runtime::start(config).expect("a reactor starts")
}

fn options(port: u16, (hdgst, ddgst): (bool, bool)) -> ConnectOptions {
    let mut options = ConnectOptions::new("127.0.0.1", port.to_string(), NQN);
    (options.hdgst, options.ddgst) = (hdgst, ddgst);
    options.io_timeout = Duration::from_secs(1);
    options.connect_timeout = Duration::from_secs(5);
    options
}

/// Runs one I/O against a target that follows `script`: its status, its data, why the connection ended (if it did within
/// the I/O), and the termination request that the target got.
fn attempt(
    dgst: (bool, bool),
    make: impl FnOnce() -> Box<Io> + Send + 'static,
    script: impl Fn(&mut Fake, &Sqe) + Send + Sync + 'static,
) -> (IoStatus, Vec<u8>, Option<CloseReason>, Option<u16>) {
    let (port, terms) = target(dgst, NamespaceIdentify::new(1 << 20, 9), script);
    let runtime = reactor();
    let outcome = runtime.handles()[0].block_on(move || async move {
        let controller = Controller::connect(&options(port, dgst)).await.expect("connects");
        let info = controller.namespace(Nsid(1)).await.expect("one");
        let queue = controller.io_queue(8).await.expect("opens");
        let ns = queue.namespace(&info);
        let io = run(&ns, make()).await;
        (io.status(), io.data.clone().to_contiguous().to_vec(), queue.closed())
    });
    let (status, data, closed) = outcome.expect("the reactor lives");
    if closed.is_some() {
        for _ in 0..200 {
            if !terms.lock().expect("whole").is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let term = terms.lock().expect("whole").first().copied();
    (status, data, closed, term)
}

const PLAIN: (bool, bool) = (false, false);

/// The connection must end with a termination request of this kind.
fn violates(fes: Fes, make: fn() -> Box<Io>, script: impl Fn(&mut Fake, &Sqe) + Send + Sync + 'static) {
    let (status, _, closed, term) = attempt(PLAIN, make, script);
    assert_eq!(status, IoStatus::TRANSIENT_TRANSPORT_ERROR);
    assert!(matches!(closed, Some(CloseReason::Answer(_) | CloseReason::Protocol(_))), "{closed:?}");
    assert_eq!(term, Some(fes as u16), "{closed:?}");
}

#[test]
fn data_that_was_not_asked_for() {
    let page = |n| bytes(n);
    violates(Fes::OutOfRange, read, move |f, c| f.data(c.cid(), 0, &page(8192), true, true));
    violates(Fes::OutOfRange, read, move |f, c| f.data(c.cid(), 2048, &page(2048), true, true));
    violates(Fes::OutOfRange, read, move |f, c| {
        f.data(c.cid(), 0, &page(2048), false, false);
        f.data(c.cid(), 0, &page(2048), true, true);
    });
    violates(Fes::OutOfRange, read, move |f, c| f.data(c.cid(), 0, &page(2048), true, true));
    violates(Fes::OutOfRange, read, move |f, c| f.data(c.cid(), !3, &[1, 2, 3], true, false));
    violates(Fes::OutOfRange, || write(8), move |f, c| f.data(c.cid(), 0, &page(512), true, true));
}

#[test]
fn answers_to_nobody() {
    violates(Fes::InvalidHeaderField, read, |f, _| f.ok(Cid(5)));
    violates(Fes::InvalidHeaderField, read, |f, c| f.ok(Cid(c.cid().0 ^ 0x1000)));
    violates(Fes::InvalidHeaderField, read, |f, _| f.data(Cid(0xffff), 0, &[0; 512], true, true));
    violates(Fes::InvalidHeaderField, read, |f, _| f.r2t(Cid(7), 1, 0, 512));
    // The second completion of a command is one of no command.
    let (status, _, _, term) = attempt(
        PLAIN,
        || write(1),
        |f, c| {
            f.ok(c.cid());
            f.ok(c.cid());
        },
    );
    assert!(status.is_ok() && matches!(term, None | Some(0x01)));
}

#[test]
fn ready_to_transfer_what_there_is_not() {
    violates(Fes::OutOfRange, read, |f, c| f.r2t(c.cid(), 1, 0, 512));
    violates(Fes::OutOfRange, || write(8), |f, c| f.r2t(c.cid(), 1, 0, 512));
    violates(Fes::OutOfRange, || write(64), |f, c| f.r2t(c.cid(), 1, 0, 32_772));
    violates(Fes::OutOfRange, || write(64), |f, c| f.r2t(c.cid(), 1, 512, 512));
    violates(
        Fes::OutOfRange,
        || write(64),
        |f, c| {
            for _ in 0..3 {
                f.r2t(c.cid(), 1, 0, 32_768);
            }
        },
    );
}

#[test]
fn what_is_no_pdu() {
    violates(Fes::InvalidHeaderField, read, |f, _| f.send(&[0xff; 64]));
    violates(Fes::InvalidHeaderField, read, |f, _| f.send(&[5, 0, 24, 0, 0xff, 0xff, 0xff, 0xff]));
    violates(Fes::SequenceError, read, |f, _| {
        f.send(&[&[1, 0, 128, 0, 128, 0, 0, 0][..], &[0; 120]].concat())
    });
}

#[test]
fn a_termination_request_is_explained() {
    let (status, _, closed, term) = attempt(PLAIN, read, |f, _| {
        let mut buf = [0; 64];
        let n = build::term_req(&mut buf, Role::Controller, Term::plain(Fes::LimitExceeded), &[])
            .expect("it fits");
        f.send(&buf[..n]);
    });
    assert_eq!((status, term), (IoStatus::TRANSIENT_TRANSPORT_ERROR, None));
    let text = closed.expect("closed").to_string();
    assert!(text.contains("data transfer limit exceeded"), "{text}");
}

#[test]
fn silence_and_sudden_ends() {
    let (status, _, closed, _) = attempt(PLAIN, read, |_, _| {});
    assert_eq!((status, closed), (IoStatus::TRANSIENT_TRANSPORT_ERROR, Some(CloseReason::Timeout(1))));
    let hang_up = |f: &mut Fake| drop(f.stream.shutdown(std::net::Shutdown::Both));
    let (_, _, closed, _) = attempt(PLAIN, read, move |f, _| hang_up(f));
    assert_eq!(closed, Some(CloseReason::Eof));
    let (_, _, closed, _) = attempt(PLAIN, read, move |f, _| {
        f.send(&[7, 0, 24]);
        hang_up(f);
    });
    assert_eq!(closed, Some(CloseReason::Truncated));
}

#[test]
fn lost_and_damaged_data_is_an_error_of_that_io_only() {
    let (status, _, closed, _) = attempt(PLAIN, read, |f, c| f.ok(c.cid()));
    assert_eq!((status, closed), (IoStatus::DATA_TRANSFER_ERROR, None));
    let (status, _, closed, _) = attempt((true, true), read, |f, c| {
        let part = DataPart { cid: c.cid(), offset: 0, len: 4096, last: true };
        let mut pdu = f.c2h(part, true, &bytes(4096));
        *pdu.last_mut().expect("a digest") ^= 1;
        f.send(&pdu);
    });
    assert_eq!((status, closed), (IoStatus::TRANSIENT_TRANSPORT_ERROR, None));
    // A wrong header digest leaves nothing to believe.
    let (_, _, closed, term) = attempt((true, true), read, |f, c| {
        let part = DataPart { cid: c.cid(), offset: 0, len: 4096, last: true };
        let mut pdu = f.c2h(part, true, &bytes(4096));
        pdu[20] ^= 1;
        f.send(&pdu);
    });
    assert_eq!((closed.is_some(), term), (true, Some(Fes::HeaderDigest as u16)));
}

#[test]
fn data_may_come_in_any_pieces() {
    for (dgst, step) in [(PLAIN, 4), ((true, true), 4), (PLAIN, 1000), ((false, true), 2048)] {
        let (status, data, closed, _) = attempt(dgst, read, move |f, c| {
            let all = bytes(4096);
            let pieces: Vec<_> = all.chunks(step).collect();
            for (i, piece) in pieces.iter().enumerate() {
                let last = i + 1 == pieces.len();
                f.data(c.cid(), (i * step) as u32, piece, last, false);
            }
            f.ok(c.cid());
        });
        assert_eq!((status, closed), (IoStatus::SUCCESS, None));
        assert_eq!(data, bytes(4096));
    }
    // A byte at a time.
    let (status, data, ..) = attempt(
        (true, true),
        || Io::new(Op::Read, 0, 1),
        |f, c| {
            let part = DataPart { cid: c.cid(), offset: 0, len: 512, last: true };
            for byte in f.c2h(part, true, &bytes(512)) {
                f.send(&[byte]);
            }
        },
    );
    assert_eq!((status, data), (IoStatus::SUCCESS, bytes(512)));
}

#[test]
fn data_is_sent_as_it_is_asked_for() {
    for dgst in [PLAIN, (true, true)] {
        // Two R2Ts at once, then a third; MAXH2CDATA is 8,192.
        let (status, _, closed, _) = attempt(
            dgst,
            || write(64),
            |f, c| {
                f.r2t(c.cid(), 1, 0, 20_000);
                f.r2t(c.cid(), 2, 20_000, 4);
                let (mut got, mut tags, mut asked) = (Vec::new(), Vec::new(), false);
                while got.len() < 32_768 {
                    let Got::Data { ttag, offset, bytes, last } = f.next() else { panic!("data is due") };
                    assert!(offset as usize == got.len() && bytes.len() <= 8192);
                    got.extend(bytes);
                    if last {
                        tags.push((ttag.0, got.len()));
                    }
                    if got.len() == 20_004 && !asked {
                        f.r2t(c.cid(), 3, 20_004, 12_764);
                        asked = true;
                    }
                }
                assert_eq!(tags, [(1, 20_000), (2, 20_004), (3, 32_768)]);
                assert_eq!(got, bytes(32_768));
                f.ok(c.cid());
            },
        );
        assert_eq!((status, closed), (IoStatus::SUCCESS, None));
    }
}

#[test]
fn namespaces_that_can_not_be() {
    let runtime = reactor();
    let mut huge = NamespaceIdentify::new(u64::MAX, 12);
    let odd = NamespaceIdentify::new(8, 3);
    let giant = NamespaceIdentify::new(8, 31);
    let mut metadata = NamespaceIdentify::new(8, 9);
    metadata.lbaf[0].ms = 8.into();
    huge.nuse = 0.into();
    for (ns, text) in [
        (huge, "blocks"),
        (odd, "2^3"),
        (giant, "2^31"),
        (metadata, "metadata"),
        (NamespaceIdentify::new(0, 9), "active"),
    ] {
        let (port, _) = target(PLAIN, ns, |_, _| {});
        let e = runtime.handles()[0].block_on(move || async move {
            let controller = Controller::connect(&options(port, PLAIN)).await.expect("connects");
            controller.namespace(Nsid(1)).await.map(drop).map_err(|e| e.to_string())
        });
        let e = e.expect("the reactor lives").expect_err("is refused");
        assert!(e.contains(text), "{e:?} should say {text:?}");
    }
}

#[test]
fn a_greeting_that_never_comes() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let runtime = reactor();
    let e = runtime.handles()[0].block_on(move || async move {
        let options = ConnectOptions { connect_timeout: Duration::from_secs(1), ..options(port, PLAIN) };
        Controller::connect(&options).await.map(drop).map_err(|e| e.to_string())
    });
    let e = e.expect("the reactor lives").expect_err("nobody answers");
    assert!(e.contains("ICReq") && e.contains("1 s"), "{e}");
}

/// Damaged answers of every kind: whatever happens, every I/O comes back and the reactor lives.
#[test]
fn damaged_answers_never_harm() {
    for seed in 0..150u64 {
        let make = move || if seed.is_multiple_of(2) { read() } else { write(64) };
        let (status, ..) = attempt((seed % 3 == 1, seed % 3 == 2), make, move |f, c| {
            let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut random = move || {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x
            };
            let part = DataPart { cid: c.cid(), offset: 0, len: 4096, last: true };
            let mut pdu = if seed.is_multiple_of(2) {
                f.c2h(part, true, &bytes(4096))
            } else {
                let mut buf = [0; 64];
                let n = build::r2t(&mut buf, c.cid(), Ttag(1), 0, 4096, f.format).expect("it fits");
                buf[..n].to_vec()
            };
            for _ in 0..1 + random() % 3 {
                let at = (random() % 24) as usize;
                pdu[at] = random() as u8;
            }
            f.send(&pdu);
            let _ = f.stream.shutdown(std::net::Shutdown::Write);
        });
        // Either the damage did not matter or the I/O failed.
        assert!(status.is_ok() || !status.to_string().is_empty(), "seed {seed}");
    }
}

#[test]
fn reads_into_shared_buffers_are_refused() {
    let shared = || {
        let mut io = read();
        let buf = Buf::alloc(4096);
        io.data = [buf.slice(0..2048), buf.slice(2048..4096)].into_iter().collect::<SgList>();
        io
    };
    let (status, _, closed, _) = attempt(PLAIN, shared, |f, c| f.ok(c.cid()));
    assert_eq!((status, closed), (IoStatus::INVALID_FIELD, None));
}
