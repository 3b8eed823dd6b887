//! Who may connect, and who sees what.

mod common;

use common::{Client, HOST, NQN, Rig, read_sqe, wait};
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_nvmf_spec::identify::Cns;
use cryptfold_nvmf_spec::log::{GetLogPage, Lid};
use cryptfold_nvmf_spec::opcode::Admin;
use cryptfold_nvmf_spec::{Cid, Cntlid, Nsid, Sgl, Sqe, Status};
use cryptfold_nvmf_target::{NsOptions, TargetError};

const OTHER: &str = "nqn.2024-01.io.cryptfold:other-host";

/// An enabled admin queue of this host, and one I/O queue.
fn host(rig: &Rig, hostnqn: &str) -> (Client, Client) {
    let mut admin = Client::open(rig.addr, false, false);
    admin.hostnqn = hostnqn.into();
    let cqe = admin.connect(NQN, 0, 32, Cntlid::DYNAMIC);
    assert_eq!(cqe.status(), Status::SUCCESS);
    admin.cntlid = Cntlid(cqe.dw0.get() as u16);
    admin.enable();
    let mut io = Client::open(rig.addr, false, false);
    io.hostnqn = hostnqn.into();
    assert_eq!(io.connect(NQN, 1, 32, admin.cntlid).status(), Status::SUCCESS);
    (admin, io)
}

fn active(c: &mut Client) -> Vec<u32> {
    let (cqe, list) = c.admin_in(Admin::Identify, 0, Cns::ActiveNamespaces as u32, 4096);
    assert_eq!(cqe.status(), Status::SUCCESS);
    let ids = list.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    ids.take_while(|n| *n != 0).collect()
}

fn read(io: &mut Client, nsid: u32) -> Status {
    io.run(Sqe { nsid: nsid.into(), ..read_sqe(0, 1) }, &[], &[]).0.status().code()
}

#[test]
fn a_list_of_hosts_is_enforced_also_on_those_who_are_there() {
    let rig = Rig::new();
    rig.target.allow_any_host(NQN, false).expect("it exists");
    let refused = |hostnqn: &str| {
        let mut c = Client::open(rig.addr, false, false);
        c.hostnqn = hostnqn.into();
        let cqe = c.connect(NQN, 0, 32, Cntlid::DYNAMIC);
        assert_eq!(cqe.status().code(), Status::CONNECT_INVALID_HOST, "{hostnqn}");
        assert!(cqe.status().dnr());
    };
    refused(HOST);
    rig.target.add_host(NQN, HOST).expect("a name");
    refused(OTHER);
    rig.target.add_host(NQN, OTHER).expect("a name");
    let (_admin, mut io) = host(&rig, HOST);
    let (_other_admin, mut other_io) = host(&rig, OTHER);
    assert_eq!(read(&mut io, 1), Status::SUCCESS);
    rig.target.remove_host(NQN, HOST).expect("it was there");
    assert_eq!(io.recv(), common::Pdu::Closed);
    assert_eq!(rig.target.controllers(NQN).expect("it exists").len(), 1);
    refused(HOST);
    assert_eq!(read(&mut other_io, 1), Status::SUCCESS, "the other host goes on");
    let gone = rig.target.remove_host(NQN, HOST);
    assert_eq!(gone, Err(TargetError::NoHost { nqn: NQN.into(), host: HOST.into() }));
}

#[test]
fn a_namespace_exists_only_for_the_hosts_it_is_shown_to() {
    let rig = Rig::new();
    let disk = |name: &str| MallocOptions {
        name: name.into(),
        num_blocks: 64,
        block_size_bytes: 512,
        uuid: None,
        optimal_io_boundary: 0,
    };
    cryptfold_bdev_malloc::create(&rig.registry, disk("hidden")).expect("a RAM disk");
    let (mut admin, mut io) = host(&rig, HOST);
    let (mut other_admin, mut other_io) = host(&rig, OTHER);
    for c in [&mut admin, &mut other_admin] {
        c.feature(Admin::SetFeatures, 0x0b, 1 << 8);
        c.submit(&Sqe::admin(Admin::AsyncEventRequest, Cid(900), Nsid(0)), &[]);
    }
    let ns = NsOptions { bdev_name: "hidden".into(), no_auto_visible: true, ..Default::default() };
    assert_eq!(rig.target.add_ns(NQN, &ns), Ok(2));
    assert_eq!((active(&mut admin), active(&mut other_admin)), (vec![1], vec![1]), "nobody sees it");
    assert_eq!(read(&mut io, 2), Status::INVALID_NAMESPACE);

    rig.target.set_ns_visible(NQN, 2, HOST, true).expect("it exists");
    assert_eq!(admin.finish(Cid(900), &[]).0.dw0.get(), 0x0004_0002, "the host is told");
    let log = GetLogPage::new(Lid::ChangedNamespaces, 0, 4096).expect("legal");
    let mut sqe = log.to_sqe(Cid(0), Nsid(0));
    sqe.sgl = Sgl::transport(4096);
    assert_eq!(admin.run(sqe, &[], &[]).1[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!((active(&mut admin), active(&mut other_admin)), (vec![1, 2], vec![1]));
    assert_eq!((read(&mut io, 2), read(&mut other_io, 2)), (Status::SUCCESS, Status::INVALID_NAMESPACE));
    for cns in [Cns::NamespaceDescriptors, Cns::AttachedControllers] {
        let seen = |c: &mut Client| c.admin_in(Admin::Identify, 2, cns as u32, 4096).0.status().code();
        assert_eq!((seen(&mut admin), seen(&mut other_admin)), (Status::SUCCESS, Status::INVALID_NAMESPACE));
    }
    let (_, zeros) = other_admin.admin_in(Admin::Identify, 2, Cns::Namespace as u32, 4096);
    assert!(zeros.iter().all(|b| *b == 0), "an inactive namespace");

    rig.target.set_ns_visible(NQN, 2, HOST, false).expect("it exists");
    wait(|| rig.target.controllers(NQN).is_ok());
    assert_eq!(read(&mut io, 2), Status::INVALID_NAMESPACE, "hidden again");
    assert_eq!(active(&mut admin), vec![1]);
    let auto = rig.target.set_ns_visible(NQN, 1, HOST, false);
    assert_eq!(auto, Err(TargetError::AutoVisible { nqn: NQN.into(), nsid: 1 }));
    assert!(rig.target.set_ns_visible(NQN, 3, HOST, true).is_err());
    assert!(rig.target.set_ns_visible(NQN, 2, "no name", true).is_err());
    // The other host heard nothing of all this: its event request still waits.
    let before = rig.target.remove_ns(NQN, 1);
    assert_eq!(before, Ok(()));
    assert_eq!(other_admin.finish(Cid(900), &[]).0.dw0.get(), 0x0004_0002);
    let mut sqe = log.to_sqe(Cid(0), Nsid(0));
    sqe.sgl = Sgl::transport(4096);
    assert_eq!(
        other_admin.run(sqe, &[], &[]).1[..8],
        [1, 0, 0, 0, 0, 0, 0, 0],
        "only namespace 1 changed for it"
    );
}
