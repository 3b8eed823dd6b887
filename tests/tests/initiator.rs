//! Our initiator against our target, over loopback: every operation by every way, and ends that nobody ordered.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Complete, Frame, Io, Op, Queue, Registry, Status};
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_nvmf_initiator::{
    CloseReason, ConnectOptions, Controller, Error, IoQueue, NamespaceQueue, discover,
};
use cryptfold_nvmf_spec::Nsid;
use cryptfold_nvmf_target::{ListenAddr, NsOptions, SubsystemOptions, Target, TransportOptions};
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reactor::sync::{Event, oneshot};
use cryptfold_reactor::{self as reactor, Handle, IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};

const NQN: &str = "nqn.2024-01.io.cryptfold:test";
const BLOCKS: u64 = 16_384;
const BLOCK: usize = 512;

struct Rig {
    target: Arc<Target>,
    options: ConnectOptions,
    /// Runs the initiator; the target has the other one.
    host: Handle,
    _runtime: Runtime,
}

fn rig(options: TransportOptions) -> Rig {
    let memory = MemoryConfig { fixed_buffers: false, arena_bytes: 4 << 20, ..Default::default() };
    let policy = IdlePolicy::Interrupt;
    let config = RuntimeConfig { cores: vec![0, 1], policy, pin: false, memory, ..Default::default() };
    let runtime = Runtime::start(config).expect("reactors start");
    let registry = Registry::new();
    let disk = MallocOptions {
        name: "disk".into(),
        num_blocks: BLOCKS,
        block_size_bytes: BLOCK as u32,
        uuid: None,
        optimal_io_boundary: 0,
    };
    cryptfold_bdev_malloc::create(&registry, disk).expect("a RAM disk");
    let target = Arc::new(Target::new(registry, &runtime.handles()[1..]));
    target.create_transport("TCP", options).expect("transport");
    let subsystem = SubsystemOptions { allow_any_host: true, ..SubsystemOptions::new(NQN) };
    target.create_subsystem(subsystem).expect("subsystem");
    target.add_ns(NQN, &NsOptions { bdev_name: "disk".into(), ..Default::default() }).expect("namespace");
    let any = ListenAddr::parse("TCP", Some("IPv4"), "127.0.0.1", "0").expect("an address");
    let port = target.add_listener(NQN, &any).expect("a free port").port;
    let options = ConnectOptions::new("127.0.0.1", port.to_string(), NQN);
    Rig { target, options, host: runtime.handles()[0].clone(), _runtime: runtime }
}

impl Rig {
    fn run<F: Future<Output = ()> + 'static>(&self, f: impl FnOnce(ConnectOptions) -> F + Send + 'static) {
        let options = self.options.clone();
        self.host.block_on(move || f(options)).expect("the reactor runs");
    }

    fn wait_empty(&self) {
        for _ in 0..60_000 {
            if self.target.controllers(NQN).is_ok_and(|c| c.is_empty()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("the controllers are still there after a minute");
    }
}

/// Waits for one I/O.
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

async fn status(queue: &Rc<NamespaceQueue>, op: Op, lba: u64, blocks: u64, data: SgList) -> Status {
    let mut io = Io::new(op, lba, blocks);
    io.data = data;
    run(queue, io).await.status()
}

fn pattern(seed: u64, blocks: u64) -> Vec<u8> {
    (0..blocks * BLOCK as u64)
        .map(|i| (i.wrapping_mul(31) ^ (i >> 9) ^ seed.wrapping_mul(97)) as u8)
        .collect()
}

/// The bytes in segments of `piece`.
fn cut(bytes: &[u8], piece: usize) -> SgList {
    bytes.chunks(piece).map(Buf::from_slice).collect()
}

async fn open(options: &ConnectOptions, depth: u16) -> (Controller, IoQueue, Rc<NamespaceQueue>) {
    let controller = Controller::connect(options).await.expect("connects");
    let info = controller.namespace(Nsid(1)).await.expect("there is one");
    assert_eq!((info.block_bytes as usize, info.blocks), (BLOCK, BLOCKS));
    let queue = controller.io_queue(depth).await.expect("opens");
    let ns = queue.namespace(&info);
    (controller, queue, ns)
}

async fn every_operation(options: ConnectOptions) {
    let (controller, _queue, ns) = open(&options, 32).await;
    assert_eq!(controller.namespaces().await.expect("a list"), [Nsid(1)]);
    // In the capsule, by R2T, cut into several commands; in one piece and in many.
    for (lba, blocks) in [(0, 1), (5, 8), (17, 16), (64, 100), (256, 256), (1000, 3000), (BLOCKS - 3, 3)] {
        for piece in [BLOCK * 4096, 4096, 1000] {
            let data = pattern(lba + piece as u64, blocks);
            assert_eq!(status(&ns, Op::Write, lba, blocks, cut(&data, piece)).await, Status::SUCCESS);
            let lent = run(&ns, Io::new(Op::Read, lba, blocks)).await;
            assert_eq!(lent.status(), Status::SUCCESS);
            assert!(lent.data.eq_bytes(&cut(&data, 4096)), "{blocks} blocks at {lba}, buffers lent");
            let mut own = Io::new(Op::Read, lba, blocks);
            own.data = cut(&vec![0xEE; data.len()], piece);
            let own = run(&ns, own).await;
            assert_eq!(own.status(), Status::SUCCESS);
            assert!(own.data.eq_bytes(&cut(&data, 4096)), "{blocks} blocks at {lba}, own buffers");
            assert_eq!(status(&ns, Op::Compare, lba, blocks, cut(&data, piece)).await, Status::SUCCESS);
            let mut other = data.clone();
            *other.last_mut().expect("not empty") ^= 1;
            let compared = status(&ns, Op::Compare, lba, blocks, cut(&other, 4096)).await;
            assert_eq!((compared.sct(), compared.sc()), (2, 0x85));
        }
    }
    assert_eq!(status(&ns, Op::Flush, 0, 0, SgList::new()).await, Status::SUCCESS);
    for op in [Op::WriteZeroes, Op::Unmap] {
        let data = pattern(9, 4000);
        assert_eq!(status(&ns, Op::Write, 100, 4000, cut(&data, 65536)).await, Status::SUCCESS);
        assert_eq!(status(&ns, op, 104, 3992, SgList::new()).await, Status::SUCCESS, "{op:?}");
        let mut want = data;
        want[4 * BLOCK..3996 * BLOCK].fill(0);
        let read = run(&ns, Io::new(Op::Read, 100, 4000)).await;
        assert!(read.data.eq_bytes(&cut(&want, 4096)), "{op:?}");
    }
    fused_pairs(&ns).await;
    let past = status(&ns, Op::Write, BLOCKS - 1, 2, cut(&pattern(1, 2), 4096)).await;
    assert_eq!((past.sct(), past.sc()), (0, 0x80));
    assert_eq!(status(&ns, Op::Reset, 0, 0, SgList::new()).await, Status::INVALID_OPCODE);
    controller.shutdown().await;
}

async fn fused_pairs(ns: &Rc<NamespaceQueue>) {
    for blocks in [1, 8, 16] {
        let (old, new) = (pattern(3, blocks), pattern(4, blocks));
        assert_eq!(status(ns, Op::Write, 40, blocks, cut(&old, 4096)).await, Status::SUCCESS);
        let attempt = |expected: &[u8], data: &[u8]| {
            let mut io = Io::new(Op::CompareAndWrite, 40, blocks);
            io.compare = cut(expected, 4096);
            io.data = cut(data, 4096);
            io
        };
        let refused = run(ns, attempt(&new, &new)).await.status();
        if blocks > 8 {
            // More than the atomic unit of the target's device.
            assert!(!refused.is_ok());
            continue;
        }
        assert_eq!((refused.sct(), refused.sc()), (2, 0x85), "the compare's verdict, not the write's");
        assert!(run(ns, Io::new(Op::Read, 40, blocks)).await.data.eq_bytes(&cut(&old, 4096)));
        assert_eq!(run(ns, attempt(&old, &new)).await.status(), Status::SUCCESS);
        assert!(run(ns, Io::new(Op::Read, 40, blocks)).await.data.eq_bytes(&cut(&new, 4096)));
    }
}

#[test]
fn every_operation_by_every_way() {
    for (hdgst, ddgst) in [(false, false), (true, false), (false, true), (true, true)] {
        for capsule in [4096, 16_384] {
            let rig = rig(TransportOptions { in_capsule_data_size: capsule, ..Default::default() });
            rig.run(move |mut options| {
                (options.hdgst, options.ddgst) = (hdgst, ddgst);
                every_operation(options)
            });
            rig.wait_empty();
        }
    }
}

/// Counts I/Os back in, checking reads.
struct Many {
    left: Cell<u32>,
    done: Event,
}

impl Complete for Many {
    fn complete(self: Rc<Self>, io: Box<Io>, frame: Frame) {
        assert_eq!(io.status(), Status::SUCCESS);
        if io.op == Op::Read {
            assert!(io.data.eq_bytes(&cut(&pattern(frame.lba, io.blocks), 4096)), "the blocks at {}", io.lba);
        }
        io.recycle();
        self.left.set(self.left.get() - 1);
        if self.left.get() == 0 {
            self.done.set();
        }
    }
}

#[test]
fn more_than_the_queue_holds_waits_inside() {
    let rig = rig(TransportOptions::default());
    rig.run(|options| async move {
        for depth in [1, 4, 127] {
            let (controller, queue, ns) = open(&options, depth).await;
            assert_eq!(queue.depth(), depth);
            for op in [Op::Write, Op::Read] {
                let many = Rc::new(Many { left: Cell::new(1000), done: Event::new() });
                for i in 0..1000u64 {
                    let blocks = [1, 8, 16][i as usize % 3];
                    let mut io = Io::new(op, i * 16, blocks);
                    if op == Op::Write {
                        io.data = cut(&pattern(i, blocks), 4096);
                    }
                    io.push(many.clone(), i, 0);
                    ns.clone().submit(io);
                }
                assert_eq!(queue.outstanding(), 1000);
                many.done.wait().await;
            }
            drop((controller, queue, ns));
        }
    });
    rig.wait_empty();
}

#[test]
fn queues_on_other_reactors() {
    let rig = rig(TransportOptions::default());
    let other = rig._runtime.handles()[1].clone();
    rig.run(move |mut options| async move {
        options.io_queues = 2;
        let (controller, _queue, ns) = open(&options, 8).await;
        let info = controller.namespace(Nsid(1)).await.expect("there is one");
        let connector = controller.connector().clone();
        let there = move || async move {
            let queue = connector.io_queue(8).await.expect("opens");
            let ns = queue.namespace(&info);
            status(&ns, Op::Write, 7, 1, cut(&pattern(7, 1), 4096)).await
        };
        assert_eq!(other.call(there).await, Ok(Status::SUCCESS));
        let read = run(&ns, Io::new(Op::Read, 7, 1)).await;
        assert!(read.data.eq_bytes(&cut(&pattern(7, 1), 4096)));
        let refused = controller.io_queue(8).await.err().expect("two were granted").to_string();
        assert!(refused.contains("grants 2"), "{refused}");
    });
    rig.wait_empty();
}

#[test]
fn discovery_tells_where_to_go() {
    let rig = rig(TransportOptions::default());
    let any = ListenAddr::parse("TCP", Some("IPv4"), "127.0.0.1", &rig.options.trsvcid).expect("an address");
    rig.target.add_listener(cryptfold_nvmf_spec::nqn::DISCOVERY, &any).expect("the port is ours");
    rig.run(|options| async move {
        let found = discover(&options).await.expect("an answer");
        assert_eq!(found.len(), 1);
        let f = &found[0];
        assert_eq!((f.subnqn.as_str(), f.traddr.as_str()), (NQN, "127.0.0.1"));
        assert_eq!((&f.trsvcid, f.referral), (&options.trsvcid, false));
    });
}

#[test]
fn refusals_name_the_reason() {
    let rig = rig(TransportOptions::default());
    rig.run(|options| async move {
        let says = |changed: ConnectOptions, text: &'static str| async move {
            let e = Controller::connect(&changed).await.err().expect("is refused").to_string();
            assert!(e.contains(text) && !e.contains('\n'), "{e:?} should say {text:?}");
        };
        let with = |change: fn(&mut ConnectOptions)| {
            let mut o = options.clone();
            change(&mut o);
            o
        };
        says(with(|o| o.subnqn = format!("{NQN}2")), "Connect").await;
        says(with(|o| o.subnqn = "test".into()), "subnqn").await;
        says(with(|o| o.hostid = [0; 16]), "hostid").await;
        says(with(|o| o.queue_size = 1), "queue_size").await;
        says(with(|o| o.trsvcid = "x".into()), "trsvcid").await;
        says(with(|o| o.trsvcid = "1".into()), "refused").await;
        says(with(|o| o.traddr = "no-such-host.invalid".into()), "can not be resolved").await;
        let (controller, ..) = open(&options, 4).await;
        let e = controller.namespace(Nsid(2)).await.expect_err("there is one namespace").to_string();
        assert!(e.contains("2 is not active"), "{e}");
    });
}

#[test]
fn a_target_that_goes_away_fails_what_is_under_way() {
    let rig = rig(TransportOptions::default());
    let target = rig.target.clone();
    rig.run(move |options| async move {
        let (controller, queue, ns) = open(&options, 16).await;
        let deleter = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            target.delete_subsystem(NQN).expect("nothing holds it");
        });
        let mut last = Status::SUCCESS;
        for i in 0.. {
            assert!(i < 1_000_000, "the end was noticed");
            last = status(&ns, Op::Read, i % BLOCKS, 1, SgList::new()).await;
            if !last.is_ok() && queue.closed().is_some() {
                break;
            }
        }
        assert!(!last.is_ok());
        assert!(matches!(queue.check(), Err(Error::Closed { .. })));
        // Later ones fail too, at once.
        assert_eq!(status(&ns, Op::Read, 0, 1, SgList::new()).await, Status::TRANSIENT_TRANSPORT_ERROR);
        while controller.closed().is_none() {
            reactor::sleep(Duration::from_millis(1)).await;
        }
        assert!(controller.next_event().await.is_none());
        assert!(controller.io_queue(4).await.is_err());
        deleter.join().expect("deletes");
    });
}

#[test]
fn closing_ends_what_waits() {
    let rig = rig(TransportOptions::default());
    rig.run(|options| async move {
        let (_controller, queue, ns) = open(&options, 2).await;
        let reads: Vec<_> = (0..20)
            .map(|i| {
                let ns = ns.clone();
                reactor::spawn_local(async move { status(&ns, Op::Read, i, 1, SgList::new()).await })
            })
            .collect();
        reactor::yield_now().await;
        queue.close();
        for read in reads {
            assert_eq!(read.await, Status::ABORTED_SQ_DELETION);
        }
        assert_eq!(queue.closed(), Some(CloseReason::Local));
    });
    rig.wait_empty();
}

#[test]
fn an_idle_controller_is_kept_alive() {
    // The target waits for longer than the host was told to say that it is alive: what counts here is that it does say so.
    let rig = rig(TransportOptions { min_kato: 60_000, ..Default::default() });
    let target = rig.target.clone();
    rig.run(move |mut options| async move {
        options.kato_ms = 1000;
        let commands = || target.controllers(NQN).expect("it exists").last().map(|c| c.totals.other);
        let end = std::time::Instant::now() + Duration::from_secs(60);
        // A host that gets no core in half a second takes its target for dead, and begins again.
        let (_controller, _queue, ns) = loop {
            let (controller, queue, ns) = open(&options, 4).await;
            let before = commands().unwrap_or(0);
            while controller.closed().is_none() && commands().is_none_or(|now| now < before + 4) {
                assert!(std::time::Instant::now() < end, "it does not say that it is alive");
                reactor::sleep(Duration::from_millis(10)).await;
            }
            if controller.closed().is_none() {
                break (controller, queue, ns);
            }
        };
        assert_eq!(status(&ns, Op::Read, 0, 1, SgList::new()).await, Status::SUCCESS);
    });
}

#[test]
fn a_new_namespace_is_announced() {
    let rig = rig(TransportOptions::default());
    let target = rig.target.clone();
    rig.run(move |options| async move {
        let (controller, ..) = open(&options, 4).await;
        let remover = std::thread::spawn(move || target.remove_ns(NQN, 1).expect("it is there"));
        let event = reactor::timeout(Duration::from_secs(60), controller.next_event()).await;
        assert_eq!(event, Ok(Some(cryptfold_nvmf_initiator::AsyncEvent::NAMESPACE_CHANGED)));
        remover.join().expect("removes");
        assert_eq!(controller.namespaces().await.expect("a list"), []);
    });
}
