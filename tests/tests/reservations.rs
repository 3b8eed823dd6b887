//! Reservations that persist through power loss, with the real program: killed (SIGKILL) right after the last command was
//! answered, and started again.

use std::net::SocketAddr;
use std::path::Path;

use cryptfold_nvmf_spec::fabrics::PropertyCommand;
use cryptfold_nvmf_spec::opcode::Io;
use cryptfold_nvmf_spec::property::Property;
use cryptfold_nvmf_spec::reservation::{
    AcquireCdw10, RegisterCdw10, RegisteredControllerExt, ReleaseCdw10, ReservationStatusExt, ReservationType,
};
use cryptfold_nvmf_spec::sqe::RwControl;
use cryptfold_nvmf_spec::{Cid, Cntlid, Nsid, Sgl, Sqe, Status};
use cryptfold_tests::fuzz::commands::{self, Identity};
use cryptfold_tests::fuzz::host::{Host, PATIENCE, Pdu};
use cryptfold_tests::kill::{NQN, Place, find_or_build};
use serde_json::{Value, json};
use zerocopy::FromBytes;

const KIND: ReservationType = ReservationType::WriteExclusive;

fn configuration(dir: &Path, port: u16) -> Value {
    let call = |method: &str, params: Value| json!({"method": method, "params": params});
    let address =
        json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()});
    // What the file belongs to has the same identity after a restart.
    let ram = json!({"name": "ram", "uuid": "5a3a7c84-0000-4000-8000-000000000007", "num_blocks": 4096, "block_size": 512});
    let namespace = json!({"bdev_name": "ram", "ptpl_file": dir.join("state").join("ns1")});
    let nvmf = [
        call("nvmf_create_transport", json!({"trtype": "TCP"})),
        call("nvmf_create_subsystem", json!({"nqn": NQN, "allow_any_host": true})),
        call("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": namespace})),
        call("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": address})),
    ];
    json!({"subsystems": [{"subsystem": "bdev", "config": [call("bdev_malloc_create", ram)]},
        {"subsystem": "nvmf", "config": nvmf}]})
}

/// A host's Admin Queue and I/O queue.
struct Initiator {
    _admin: Host,
    io: Host,
}

fn ask(host: &mut Host, sqe: Sqe, capsule: &[u8]) -> (Status, u32, Vec<u8>) {
    let bytes = host.capsule(&sqe, capsule);
    host.send(&bytes).expect("the target takes it");
    let mut read = Vec::new();
    loop {
        match host.recv(PATIENCE).expect("an answer") {
            Pdu::Response(cqe) => return (cqe.status().code(), cqe.dw0.get(), read),
            Pdu::Data { bytes, success, .. } => {
                read.extend(bytes);
                if success {
                    return (Status::SUCCESS, 0, read);
                }
            }
            other => panic!("{other:?}"),
        }
    }
}

impl Initiator {
    fn connect(addr: SocketAddr, n: u8) -> Initiator {
        let who = Identity { nqn: format!("nqn.2026-01.io.cryptfold:host{n}"), id: [n; 16] };
        let open = |qid, cntlid| {
            let mut host = Host::dial(addr).expect("the target listens");
            host.greet(false, false, 0).expect("a greeting");
            let c = commands::connect(NQN, &who, qid, 32, cntlid).expect("names");
            let (status, dw0, _) = ask(&mut host, c.sqe, &c.capsule);
            assert_eq!(status, Status::SUCCESS);
            (host, Cntlid(dw0 as u16))
        };
        let (mut admin, cntlid) = open(0, Cntlid::DYNAMIC);
        let enable = PropertyCommand::set(Cid(1), Property::Cc, 0x0046_0001);
        assert_eq!(ask(&mut admin, Sqe::from_view(&enable), &[]).0, Status::SUCCESS);
        Initiator { _admin: admin, io: open(1, cntlid).0 }
    }

    fn reserve(&mut self, opcode: Io, cdw10: u32, words: &[u64]) -> Status {
        let data: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut sqe = Sqe::io(opcode, Cid(2), Nsid(1));
        (sqe.cdw10, sqe.sgl) = (cdw10.into(), Sgl::in_capsule(0, data.len() as u32));
        ask(&mut self.io, sqe, &data).0
    }

    /// To persist through power loss (CPTPL 3).
    fn register(&mut self, key: u64) -> Status {
        self.reserve(Io::ReservationRegister, RegisterCdw10(0).with_cptpl(3).0, &[0, key])
    }

    fn acquire(&mut self, key: u64) -> Status {
        self.reserve(Io::ReservationAcquire, AcquireCdw10(0).with_rtype(KIND as u32).0, &[key, 0])
    }

    fn release(&mut self, key: u64) -> Status {
        self.reserve(Io::ReservationRelease, ReleaseCdw10(0).with_rtype(KIND as u32).0, &[key])
    }

    /// PTPLS, the type, and (host, key, whether it holds the reservation) of the registrants.
    fn report(&mut self) -> (u8, u8, Vec<(u8, u64, u8)>) {
        let mut sqe = Sqe::io(Io::ReservationReport, Cid(3), Nsid(1));
        (sqe.cdw10, sqe.cdw11, sqe.sgl) = (127.into(), 1.into(), Sgl::transport(512));
        let (status, _, data) = ask(&mut self.io, sqe, &[]);
        assert_eq!(status, Status::SUCCESS);
        let (head, rest) = ReservationStatusExt::read_from_prefix(&data).expect("64 bytes");
        let all = rest.chunks_exact(64).take(head.status.regctl.get().into()).map(|e| {
            let e = RegisteredControllerExt::read_from_bytes(e).expect("64 bytes");
            (e.hostid[0], e.rkey.get(), e.rcsts)
        });
        (head.status.ptpls, head.status.rtype, all.collect())
    }

    fn write(&mut self) -> Status {
        let mut sqe = Sqe::io(Io::Write, Cid(4), Nsid(1));
        sqe.set_rw(0, 1, RwControl(0));
        sqe.sgl = Sgl::in_capsule(0, 512);
        ask(&mut self.io, sqe, &[1; 512]).0
    }
}

#[test]
fn registrations_and_the_reservation_survive_a_kill() {
    let path = find_or_build().unwrap_or_else(|e| panic!("{e}"));
    let dir = tempfile::tempdir().expect("a directory");
    let (state, away) = (dir.path().join("state"), dir.path().join("away"));
    std::fs::create_dir(&state).expect("a directory");
    let place = Place::prepare(&path, dir.path(), 4096, configuration).unwrap_or_else(|e| panic!("{e}"));
    let addr = SocketAddr::from(([127, 0, 0, 1], place.port()));
    let start = || place.start().unwrap_or_else(|e| panic!("{e}"));

    let program = start();
    let (mut first, mut second) = (Initiator::connect(addr, 1), Initiator::connect(addr, 2));
    assert_eq!(first.register(11), Status::SUCCESS);
    assert_eq!(second.register(22), Status::SUCCESS);
    assert_eq!(first.acquire(11), Status::SUCCESS);
    program.kill().unwrap_or_else(|e| panic!("{e}"));

    let program = start();
    let mut stranger = Initiator::connect(addr, 3);
    let held = (1, KIND as u8, vec![(1, 11, 1), (2, 22, 0)]);
    assert_eq!(stranger.report(), held);
    assert_eq!(stranger.write(), Status::RESERVATION_CONFLICT);
    let (mut first, mut second) = (Initiator::connect(addr, 1), Initiator::connect(addr, 2));
    assert_eq!((first.write(), second.write()), (Status::SUCCESS, Status::RESERVATION_CONFLICT));
    // The file can not be written: the host is told, nothing changes, now and after the next kill.
    std::fs::rename(&state, &away).expect("moved");
    assert_eq!(stranger.register(33), Status::INTERNAL_ERROR);
    assert_eq!(first.release(11), Status::INTERNAL_ERROR);
    assert_eq!(stranger.report(), held);
    assert_eq!(second.write(), Status::RESERVATION_CONFLICT);
    std::fs::rename(&away, &state).expect("moved");
    program.kill().unwrap_or_else(|e| panic!("{e}"));

    let program = start();
    let mut first = Initiator::connect(addr, 1);
    assert_eq!(first.report(), held);
    assert_eq!(first.release(11), Status::SUCCESS);
    program.kill().unwrap_or_else(|e| panic!("{e}"));

    let program = start();
    let mut second = Initiator::connect(addr, 2);
    assert_eq!(second.report(), (1, 0, vec![(1, 11, 0), (2, 22, 0)]));
    assert_eq!(second.write(), Status::SUCCESS);
    program.stop().unwrap_or_else(|e| panic!("{e}"));
}
