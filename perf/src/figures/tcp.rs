//! NVMe/TCP over loopback: the target on one core, our initiator on another one, a RAM disk behind. Plain, with digests, and
//! with TLS.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Queue, Registry};
use cryptfold_nvmf_initiator::{ConnectOptions, Controller, HashId, Psk, TlsKey, Version};
use cryptfold_nvmf_target::{
    HostAccess, ListenAddr, Named, NsOptions, PortSecurity, SubsystemOptions, Target, TransportOptions,
};
use cryptfold_reactor::Handle;

use super::chain::{SPAN, plan, ram_disk, run_load, runtime};
use super::{Rounds, Row, Sample, Subject, Unit};
use crate::load::Plan;

const NQN: &str = "nqn.2024-01.io.cryptfold:figures";
/// Entries of the I/O queue: more than any depth measured here.
const QUEUE_ENTRIES: u16 = 256;
/// Cores of target and initiator.
const CORES: [usize; 2] = [0, 1];

/// What is between the two.
#[derive(Clone, Copy)]
enum Way {
    Plain,
    /// Header and data digests.
    Digests,
    /// SHA-256: AES-128-GCM; SHA-384: AES-256-GCM.
    Tls(HashId),
}

/// The key of the host that comes with TLS, and its name: hosts with keys get in by TLS only.
fn key(hash: HashId) -> Result<(String, Psk), String> {
    let psk = Psk::new(&vec![0x5a; hash.len_bytes()], Some(hash)).map_err(|e| e.to_string())?;
    Ok((format!("nqn.2024-01.io.cryptfold:{}", hash.name()), psk))
}

/// Where the target listens.
struct Ports {
    plain: ListenAddr,
    tls: ListenAddr,
}

impl Ports {
    fn options(&self, way: Way) -> Result<ConnectOptions, String> {
        let address = if matches!(way, Way::Tls(_)) { &self.tls } else { &self.plain };
        let mut options = ConnectOptions::new(address.ip.to_string(), address.port.to_string(), NQN);
        options.queue_size = QUEUE_ENTRIES;
        match way {
            Way::Plain => {}
            Way::Digests => (options.hdgst, options.ddgst) = (true, true),
            Way::Tls(hash) => {
                let (name, psk) = key(hash)?;
                options.hostnqn = name;
                options.tls = Some(TlsKey { psk, version: Version::V1 });
            }
        }
        Ok(options)
    }
}

/// Connects, runs the load over one queue, disconnects; all on the initiator's reactor.
async fn load(options: ConnectOptions, plan: Plan) -> Result<Sample, String> {
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

fn remote_load(initiator: &Handle, ports: &Ports, way: Way, plan: Plan) -> Result<Sample, String> {
    let options = ports.options(way)?;
    initiator.block_on(move || load(options, plan)).map_err(|e| e.to_string())?
}

fn target(registry: &Arc<Registry>, reactor: &Handle) -> Result<(Target, Ports), String> {
    let text = |e: cryptfold_nvmf_target::TargetError| e.to_string();
    let target = Target::new(registry.clone(), std::slice::from_ref(reactor));
    let transport = TransportOptions { max_queue_depth: QUEUE_ENTRIES, ..TransportOptions::default() };
    target.create_transport("TCP", transport).map_err(text)?;
    target
        .create_subsystem(SubsystemOptions { allow_any_host: true, ..SubsystemOptions::new(NQN) })
        .map_err(text)?;
    target.add_ns(NQN, &NsOptions { bdev_name: "ram".into(), ..NsOptions::default() }).map_err(text)?;
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into();
    let ports = Ports {
        plain: target.add_listener(NQN, &any).map_err(text)?,
        tls: target.add_secure_listener(NQN, &any, PortSecurity::Tls).map_err(text)?,
    };
    for hash in [HashId::Sha256, HashId::Sha384] {
        let (host, key) = key(hash)?;
        let access = HostAccess { psk: Some(Named { name: host.clone(), key }), ..HostAccess::default() };
        target.add_host(NQN, &host, access).map_err(text)?;
    }
    Ok((target, ports))
}

/// One queue, one core for the target: 4 KiB random reads, 128 KiB sequential reads and writes; each plain, with digests and
/// with TLS.
pub fn tcp(rounds: Rounds<'_>) -> Result<Vec<Row>, String> {
    let (runtime, registry) = (runtime(&CORES)?, Registry::new());
    ram_disk(&registry, "ram", SPAN)?;
    let (target, ports) = target(&registry, &runtime.handles()[0])?;
    let initiator = &runtime.handles()[1];
    let subject = |name, of, way: Way, bytes: usize, read_pct, depth| Subject {
        name,
        unit: if bytes < 128 << 10 { Unit::Ops } else { Unit::Megabytes },
        bytes_per_op: bytes,
        of,
        scales: None,
        goal: None,
        measure: Box::new({
            let ports = &ports;
            move |time: Duration| {
                let plan = plan(SPAN, bytes, read_pct, bytes < 128 << 10, depth, time);
                remote_load(initiator, ports, way, plan)
            }
        }),
    };
    let mut subjects = Vec::new();
    for (names, bytes, read_pct, depth) in [
        (
            [
                "tcp-randread-4k",
                "tcp-randread-4k-digests",
                "tcp-randread-4k-tls-aes128",
                "tcp-randread-4k-tls-aes256",
            ],
            4 << 10,
            100,
            128,
        ),
        (
            [
                "tcp-read-128k",
                "tcp-read-128k-digests",
                "tcp-read-128k-tls-aes128",
                "tcp-read-128k-tls-aes256",
            ],
            128 << 10,
            100,
            32,
        ),
        (
            [
                "tcp-write-128k",
                "tcp-write-128k-digests",
                "tcp-write-128k-tls-aes128",
                "tcp-write-128k-tls-aes256",
            ],
            128 << 10,
            0,
            32,
        ),
    ] {
        let ways = [Way::Plain, Way::Digests, Way::Tls(HashId::Sha256), Way::Tls(HashId::Sha384)];
        for (name, way) in names.into_iter().zip(ways) {
            let of = (!matches!(way, Way::Plain)).then_some(names[0]);
            subjects.push(subject(name, of, way, bytes, read_pct, depth));
        }
    }
    let rows = rounds("tcp", subjects);
    target.stop().map_err(|e| e.to_string())?;
    rows
}
