//! The engine against a target, without fio: what fio's job does, on a thread of its own.

use std::net::SocketAddr;
use std::time::Duration;

use cryptfold_bdev::{Op, Registry};
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_fio::engine::{Engine, Target};
use cryptfold_nvmf_target::{NsOptions, SubsystemOptions, Target as Served, TransportOptions};
use cryptfold_reactor::{Buf, MemoryConfig, Runtime, RuntimeConfig};

const NQN: &str = "nqn.2026-01.io.cryptfold:fio";
const BLOCKS: u64 = 1024;

/// A RAM disk, and where it is.
fn served() -> (Runtime, Served, Target) {
    let memory = MemoryConfig { fixed_buffers: false, arena_bytes: 16 << 20, ..Default::default() };
    let runtime =
        Runtime::start(RuntimeConfig { pin: false, memory, ..Default::default() }).expect("a reactor");
    let registry = Registry::new();
    let disk = MallocOptions {
        name: "ram".into(),
        num_blocks: BLOCKS,
        block_size_bytes: 4096,
        uuid: None,
        optimal_io_boundary: 0,
    };
    cryptfold_bdev_malloc::create(&registry, disk).expect("a RAM disk");
    let target = Served::new(registry, runtime.handles());
    target.create_transport("TCP", TransportOptions::default()).expect("a transport");
    let subsystem = SubsystemOptions { allow_any_host: true, ..SubsystemOptions::new(NQN) };
    target.create_subsystem(subsystem).expect("a subsystem");
    target.add_ns(NQN, &NsOptions { bdev_name: "ram".into(), ..NsOptions::default() }).expect("a namespace");
    let any = SocketAddr::from(([127, 0, 0, 1], 0)).into();
    let at = target.add_listener(NQN, &any).expect("a port");
    let place = Target {
        traddr: at.ip.to_string(),
        trsvcid: at.port.to_string(),
        subnqn: NQN.into(),
        nsid: 1,
        depth: 8,
        io_timeout_s: 60,
        ..Target::default()
    };
    (runtime, target, place)
}

/// Submits one and waits for it.
fn one(engine: &mut Engine, op: Op, offset: u64, bytes: u64, data: Option<Buf>) -> (bool, Vec<u8>) {
    engine.submit(op, offset, bytes, data, 42).expect("whole blocks");
    assert_eq!(engine.wait(1, None), 1);
    let done = engine.take().expect("done");
    assert_eq!(done.tag, 42);
    (done.status.is_ok(), done.data.to_contiguous().to_vec())
}

#[test]
fn what_was_written_is_read_and_trimmed_and_flushed() {
    let (_runtime, target, place) = served();
    let mut engine = Engine::open(&place).expect("connects");
    assert_eq!((engine.info().blocks, engine.info().block_bytes), (BLOCKS, 4096));
    let data: Vec<u8> = (0..131_072u32).map(|i| (i / 7) as u8).collect();
    assert!(one(&mut engine, Op::Write, 8192, 131_072, Some(Buf::from_slice(&data))).0);
    assert!(one(&mut engine, Op::Flush, 0, 0, None).0);
    assert_eq!(one(&mut engine, Op::Read, 8192, 131_072, None), (true, data));
    assert!(one(&mut engine, Op::Unmap, 8192, 131_072, None).0);
    assert_eq!(one(&mut engine, Op::Read, 12_288, 4096, None), (true, vec![0; 4096]));
    // Behind the end: an error, and the queue goes on.
    assert!(!one(&mut engine, Op::Read, BLOCKS * 4096, 4096, None).0);
    assert!(engine.submit(Op::Read, 100, 4096, None, 1).is_err_and(|e| e.contains("whole blocks")));
    assert!(engine.ended().is_none());
    drop(engine);
    target.stop().expect("stops");
}

#[test]
fn a_queue_keeps_its_depth_and_a_wait_its_time() {
    let (_runtime, target, place) = served();
    let mut engine = Engine::open(&place).expect("connects");
    assert_eq!(engine.wait(1, Some(Duration::from_millis(5))), 0, "nothing is under way");
    for tag in 0..100 {
        engine.submit(Op::Read, tag % BLOCKS * 4096, 4096, None, tag).expect("whole blocks");
    }
    assert_eq!(engine.wait(100, None), 100);
    let mut tags: Vec<u64> = std::iter::from_fn(|| engine.take()).map(|d| d.tag).collect();
    tags.sort_unstable();
    assert_eq!(tags, (0..100).collect::<Vec<_>>());
    drop(engine);
    target.stop().expect("stops");
}

#[test]
fn a_target_that_goes_fails_what_is_under_way() {
    let (runtime, target, place) = served();
    let mut engine = Engine::open(&place).expect("connects");
    target.stop().expect("stops");
    drop(runtime);
    engine.submit(Op::Read, 0, 4096, None, 9).expect("queued");
    assert_eq!(engine.wait(1, None), 1);
    let done = engine.take().expect("done");
    assert!(!done.status.is_ok());
    assert!(engine.ended().is_some_and(|e| !e.is_empty()));
}

#[test]
fn a_job_that_makes_no_sense_is_refused() {
    let ok =
        Target { traddr: "127.0.0.1".into(), subnqn: NQN.into(), depth: 1, nsid: 1, ..Target::default() };
    for (job, what) in [
        (Target { subnqn: String::new(), ..ok.clone() }, "subnqn="),
        (Target { traddr: String::new(), ..ok.clone() }, "traddr="),
        (Target { depth: 0, ..ok.clone() }, "iodepth=0"),
        (Target { depth: 5000, ..ok.clone() }, "iodepth=5000"),
        (Target { psk_version: 2, ..ok.clone() }, "psk_version=2"),
        (Target { psk: "/k".into(), ..ok.clone() }, "hostnqn="),
        (Target { psk: "/no/such".into(), hostnqn: NQN.into(), ..ok.clone() }, "/no/such"),
        (Target { trsvcid: "x".into(), ..ok }, "trsvcid"),
    ] {
        let e = Engine::open(&job).err().expect("refused");
        assert!(e.contains(what), "{e}");
    }
}

#[test]
fn a_write_is_done_when_its_data_is_nobody_else_s() {
    let (_runtime, target, place) = served();
    let mut engine = Engine::open(&place).expect("connects");
    let data = Buf::from_slice(&[7; 4096]);
    let other = data.clone();
    engine.submit(Op::Write, 0, 4096, Some(data), 1).expect("whole blocks");
    // A RAM disk answers in the order of arrival: when the flush is back, the write was answered.
    engine.submit(Op::Flush, 0, 0, None, 2).expect("a flush");
    assert_eq!(engine.wait(1, None), 1);
    assert_eq!(engine.take().expect("done").tag, 2);
    assert_eq!(engine.wait(1, Some(Duration::from_millis(50))), 0, "something still refers to the data");
    drop(other);
    assert_eq!(engine.wait(1, None), 1);
    assert_eq!(engine.take().expect("done").tag, 1);
    drop(engine);
    target.stop().expect("stops");
}
