//! NVMe/TCP over loopback: the target on one core, our initiator on another one, a RAM disk behind.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Queue, Registry};
use cryptfold_nvmf_initiator::{ConnectOptions, Controller};
use cryptfold_nvmf_target::{ListenAddr, NsOptions, SubsystemOptions, Target, TransportOptions};
use cryptfold_reactor::Handle;

use super::chain::{SPAN, plan, ram_disk, run_load, runtime};
use super::{Rounds, Row, Sample, Subject, Unit};
use crate::load::Plan;

const NQN: &str = "nqn.2024-01.io.cryptfold:figures";
/// Entries of the I/O queue: more than any depth measured here.
const QUEUE_ENTRIES: u16 = 256;
/// Cores of target and initiator.
const CORES: [usize; 2] = [0, 1];

/// Connects, runs the load over one queue, disconnects; all on the initiator's reactor.
async fn load(address: ListenAddr, plan: Plan) -> Result<Sample, String> {
    let mut options = ConnectOptions::new(address.ip.to_string(), address.port.to_string(), NQN);
    options.queue_size = QUEUE_ENTRIES;
    let controller = Controller::connect(&options).await.map_err(|e| e.to_string())?;
    let first = *controller.namespaces().await.map_err(|e| e.to_string())?.first().ok_or("no namespace")?;
    let info = controller.namespace(first).await.map_err(|e| e.to_string())?;
    let queue = controller.io_queue(plan.iodepth as u16).await.map_err(|e| e.to_string())?;
    let sink: Rc<dyn Queue> = queue.namespace(&info);
    let sample = run_load(sink, plan).await;
    drop(queue);
    controller.shutdown().await;
    sample
}

fn remote_load(initiator: &Handle, address: &ListenAddr, plan: Plan) -> Result<Sample, String> {
    let address = address.clone();
    initiator.block_on(move || load(address, plan)).map_err(|e| e.to_string())?
}

fn target(registry: &Arc<Registry>, reactor: &Handle) -> Result<(Target, ListenAddr), String> {
    let text = |e: cryptfold_nvmf_target::TargetError| e.to_string();
    let target = Target::new(registry.clone(), std::slice::from_ref(reactor));
    let transport = TransportOptions { max_queue_depth: QUEUE_ENTRIES, ..TransportOptions::default() };
    target.create_transport("TCP", transport).map_err(text)?;
    target
        .create_subsystem(SubsystemOptions { allow_any_host: true, ..SubsystemOptions::new(NQN) })
        .map_err(text)?;
    target.add_ns(NQN, &NsOptions { bdev_name: "ram".into(), ..NsOptions::default() }).map_err(text)?;
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into();
    let address = target.add_listener(NQN, &any).map_err(text)?;
    Ok((target, address))
}

/// One queue, one core for the target: 4 KiB random reads, 128 KiB sequential reads and writes.
pub fn tcp(rounds: Rounds<'_>) -> Result<Vec<Row>, String> {
    let (runtime, registry) = (runtime(&CORES)?, Registry::new());
    ram_disk(&registry, "ram", SPAN)?;
    let (target, address) = target(&registry, &runtime.handles()[0])?;
    let initiator = &runtime.handles()[1];
    let subject = |name, bytes: usize, read_pct, random, depth| Subject {
        name,
        unit: if random { Unit::Ops } else { Unit::Megabytes },
        bytes_per_op: bytes,
        of: None,
        scales: None,
        goal: None,
        measure: Box::new({
            let address = &address;
            move |time: Duration| {
                remote_load(initiator, address, plan(SPAN, bytes, read_pct, random, depth, time))
            }
        }),
    };
    let subjects = vec![
        subject("tcp-randread-4k", 4 << 10, 100, true, 128),
        subject("tcp-read-128k", 128 << 10, 100, false, 32),
        subject("tcp-write-128k", 128 << 10, 0, false, 32),
    ];
    let rows = rounds("tcp", subjects);
    target.stop().map_err(|e| e.to_string())?;
    rows
}
