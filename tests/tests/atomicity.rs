//! Compare-and-write and writes of parts of a pool's 4 KiB block, from several queues of two hosts at once: on namespaces
//! with 512-byte and with 4,096-byte blocks nothing is lost and nothing is torn. And Write Uncorrectable on both.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use cryptfold_bdev::{Complete, Frame, Io, Op, Queue, Status};
use cryptfold_nvmf_initiator::{ConnectOptions, Controller, NamespaceQueue};
use cryptfold_nvmf_spec::Nsid;
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reactor::sync::oneshot;
use cryptfold_reactor::{self as reactor, IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};
use cryptfold_tests::kill::{NQN, Place, find_or_build};
use serde_json::{Value, json};

/// Counters, each in a block of its own; those of 512 bytes share a block of the pool.
const COUNTERS: u64 = 8;
/// Tasks per queue; each counts up each counter so often.
const TASKS: u64 = 3;
const ROUNDS: u64 = 6;
const QUEUES: u64 = 2;
const HOSTS: u64 = 2;
/// Where the counters are. Right behind them every task writes blocks of its own.
const FIRST: u64 = 16;

fn configuration(dir: &Path, port: u16) -> Value {
    let call = |method: &str, params: Value| json!({"method": method, "params": params});
    let address =
        json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()});
    let mut bdev = vec![
        call("bdev_uring_create", json!({"name": "disk", "filename": dir.join("disk"), "block_size": 4096})),
        call(
            "bdev_lvol_create_lvstore",
            json!({"bdev_name": "disk", "lvs_name": "pool", "key_file": dir.join("pool.key"), "create_key": true}),
        ),
    ];
    let mut nvmf = vec![
        call("nvmf_create_transport", json!({"trtype": "TCP"})),
        call("nvmf_create_subsystem", json!({"nqn": NQN, "allow_any_host": true})),
    ];
    for (nsid, block) in [(1, 512), (2, 4096)] {
        let name = format!("v{block}");
        let volume = json!({"lvs_name": "pool", "lvol_name": name, "size_in_mib": 8, "block_size": block,
            "thin_provision": true});
        bdev.push(call("bdev_lvol_create", volume));
        let namespace = json!({"nsid": nsid, "bdev_name": format!("pool/{name}")});
        nvmf.push(call("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": namespace})));
    }
    nvmf.push(call("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": address})));
    json!({"subsystems": [{"subsystem": "bdev", "config": bdev}, {"subsystem": "nvmf", "config": nvmf}]})
}

struct One(RefCell<Option<oneshot::Sender<Box<Io>>>>);

impl Complete for One {
    fn complete(self: Rc<Self>, io: Box<Io>, _: Frame) {
        let sender = self.0.borrow_mut().take();
        assert!(sender.is_some_and(|s| s.send(io).is_ok()), "the task waits");
    }
}

async fn run(queue: &Rc<NamespaceQueue>, mut io: Box<Io>) -> Box<Io> {
    let (sender, receiver) = oneshot::channel();
    io.push(Rc::new(One(RefCell::new(Some(sender)))), 0, 0);
    queue.clone().submit(io);
    receiver.await.expect("every I/O comes back")
}

async fn read(queue: &Rc<NamespaceQueue>, lba: u64) -> Vec<u8> {
    let io = run(queue, Io::new(Op::Read, lba, 1)).await;
    assert_eq!(io.status(), Status::SUCCESS);
    io.data.to_contiguous().to_vec()
}

/// A block that says the same in all its words: a torn one would not.
fn block(value: u64, bytes: usize) -> Vec<u8> {
    value.to_le_bytes().repeat(bytes / 8)
}

fn value(bytes: &[u8]) -> u64 {
    let words: Vec<u64> =
        bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().expect("eight bytes"))).collect();
    assert!(words.iter().all(|w| *w == words[0]), "torn: {words:?}");
    words[0]
}

/// Counts every counter up by compare-and-write, and writes a block of its own beside them in between.
async fn task(queue: Rc<NamespaceQueue>, own: u64, bytes: usize) {
    for round in 0..ROUNDS {
        for counter in 0..COUNTERS {
            loop {
                let old = read(&queue, FIRST + counter).await;
                let mut io = Io::new(Op::CompareAndWrite, FIRST + counter, 1);
                io.data = SgList::from(Buf::from_slice(&block(value(&old) + 1, bytes)));
                io.compare = SgList::from(Buf::from_slice(&old));
                let status = run(&queue, io).await.status();
                if status.is_ok() {
                    break;
                }
                assert_eq!((status.sct(), status.sc()), (2, 0x85), "{status}");
            }
            let mut io = Io::new(Op::Write, own, 1);
            io.data = SgList::from(Buf::from_slice(&block(own << 32 | round << 8 | counter, bytes)));
            assert_eq!(run(&queue, io).await.status(), Status::SUCCESS);
        }
    }
    assert_eq!(value(&read(&queue, own).await), own << 32 | (ROUNDS - 1) << 8 | (COUNTERS - 1));
}

async fn host(mut options: ConnectOptions, number: u64, nsid: u32) {
    options.io_queues = QUEUES as u16;
    let controller = Controller::connect(&options).await.expect("connects");
    let info = controller.namespace(Nsid(nsid)).await.expect("there is one");
    let bytes = info.block_bytes as usize;
    let mut tasks = Vec::new();
    let mut queues = Vec::new();
    for q in 0..QUEUES {
        let queue = controller.io_queue(32).await.expect("opens");
        let ns = queue.namespace(&info);
        for t in 0..TASKS {
            let own = FIRST + COUNTERS + (number * QUEUES + q) * TASKS + t;
            tasks.push(reactor::spawn_local(task(ns.clone(), own, bytes)));
        }
        queues.push(queue);
    }
    for task in tasks {
        task.await;
    }
}

async fn counters(options: ConnectOptions, nsid: u32) -> Vec<u64> {
    let controller = Controller::connect(&options).await.expect("connects");
    let info = controller.namespace(Nsid(nsid)).await.expect("there is one");
    let queue = controller.io_queue(8).await.expect("opens");
    let ns = queue.namespace(&info);
    let mut all = Vec::new();
    for counter in 0..COUNTERS {
        all.push(value(&read(&ns, FIRST + counter).await));
    }
    all
}

/// Write Uncorrectable: only where the pool's map can say it, and only for those blocks.
async fn uncorrectable(options: ConnectOptions, nsid: u32) {
    let controller = Controller::connect(&options).await.expect("connects");
    let info = controller.namespace(Nsid(nsid)).await.expect("there is one");
    let queue = controller.io_queue(8).await.expect("opens");
    let ns = queue.namespace(&info);
    let marked = run(&ns, Io::new(Op::WriteUncorrectable, FIRST + 1, 2)).await.status();
    if info.block_bytes != 4096 {
        assert!(!marked.is_ok(), "half a block of the pool can not be marked");
        value(&read(&ns, FIRST + 1).await);
        return;
    }
    assert_eq!(marked, Status::SUCCESS);
    for lba in [FIRST + 1, FIRST + 2] {
        let status = run(&ns, Io::new(Op::Read, lba, 1)).await.status();
        assert_eq!((status.sct(), status.sc()), (2, 0x81), "{status}");
    }
    for lba in [FIRST, FIRST + 3] {
        value(&read(&ns, lba).await);
    }
    let mut io = Io::new(Op::Write, FIRST + 1, 1);
    io.data = SgList::from(Buf::from_slice(&block(7, 4096)));
    assert_eq!(run(&ns, io).await.status(), Status::SUCCESS);
    assert_eq!(value(&read(&ns, FIRST + 1).await), 7);
}

#[test]
fn nothing_is_lost_and_nothing_is_torn() {
    let program = find_or_build().unwrap_or_else(|e| panic!("{e}"));
    let dir = tempfile::tempdir().expect("a directory");
    let place =
        Place::prepare(&program, dir.path(), 1 << 30, configuration).unwrap_or_else(|e| panic!("{e}"));
    let target = place.start().unwrap_or_else(|e| panic!("{e}"));
    let memory = MemoryConfig { fixed_buffers: false, arena_bytes: 4 << 20, ..Default::default() };
    let config = RuntimeConfig {
        cores: vec![0; HOSTS as usize],
        policy: IdlePolicy::Interrupt,
        pin: false,
        memory,
        ..Default::default()
    };
    let runtime = Runtime::start(config).expect("reactors");
    for nsid in [1, 2] {
        let hosts: Vec<_> = (0..HOSTS)
            .map(|n| {
                let (handle, options) = (runtime.handles()[n as usize].clone(), place.connect_options());
                std::thread::spawn(move || {
                    handle.block_on(move || host(options, n, nsid)).expect("the reactor runs");
                })
            })
            .collect();
        hosts.into_iter().for_each(|h| h.join().expect("the host ends in order"));
        let options = place.connect_options();
        let all = runtime.handles()[0].block_on(move || counters(options, nsid)).expect("the reactor runs");
        assert_eq!(all, vec![HOSTS * QUEUES * TASKS * ROUNDS; COUNTERS as usize], "namespace {nsid}");
        let options = place.connect_options();
        runtime.handles()[0].block_on(move || uncorrectable(options, nsid)).expect("the reactor runs");
    }
    target.stop().unwrap_or_else(|e| panic!("{e}"));
}
