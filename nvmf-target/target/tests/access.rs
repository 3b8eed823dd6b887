//! Who may connect, and who sees what.

mod common;

use std::sync::{Arc, Mutex};

use common::{Client, HOST, NQN, Rig, auth_receive, auth_send, read_sqe, wait};
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_nvmf_auth::{Concat, DhGroup, Entropy, HashId, Host, HostNext, Names, Offer, Secret};
use cryptfold_nvmf_spec::auth::{self, Failure};
use cryptfold_nvmf_spec::fabrics::{Authentication, ConnectResult, PropertyCommand};
use cryptfold_nvmf_spec::identify::Cns;
use cryptfold_nvmf_spec::log::{GetLogPage, Lid};
use cryptfold_nvmf_spec::opcode::{Admin, Io};
use cryptfold_nvmf_spec::pdu::build::DataPart;
use cryptfold_nvmf_spec::property::Property;
use cryptfold_nvmf_spec::{Cid, Cntlid, Nsid, Sgl, Sqe, Status};
use cryptfold_nvmf_target::{HostAccess, Named, NsOptions, TargetError, TransportOptions};
use cryptfold_reactor::IdlePolicy;

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
    rig.target.add_host(NQN, HOST, HostAccess::default()).expect("a name");
    refused(OTHER);
    rig.target.add_host(NQN, OTHER, HostAccess::default()).expect("a name");
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

/// A rig where HOST has to authenticate and OTHER need not.
fn secured(options: TransportOptions) -> Rig {
    let rig = Rig::with(2, IdlePolicy::Interrupt, options);
    let key = Secret::new(&[7; 32], None).expect("32 bytes");
    let access = HostAccess { dhchap: Some(Named { name: "k".into(), key }), ..Default::default() };
    rig.target.add_host(NQN, HOST, access).expect("a name");
    rig
}

/// An admin queue that has to authenticate.
fn challenged(rig: &Rig) -> Client {
    let mut c = Client::open(rig.addr, false, false);
    let cqe = c.connect(NQN, 0, 32, Cntlid::DYNAMIC);
    assert_eq!((cqe.status(), ConnectResult(cqe.dw0.get()).atr()), (Status::SUCCESS, 1));
    c
}

fn closed(c: &mut Client) {
    assert_eq!(c.recv(), common::Pdu::Closed);
}

const NULL: &[DhGroup] = &[DhGroup::Null];

#[test]
fn nothing_goes_before_authentication() {
    let rig = secured(TransportOptions::default());
    let (_other_admin, mut other_io) = host(&rig, OTHER);
    let mut c = challenged(&rig);
    for opcode in 0..=255u8 {
        let mut sqe = Sqe::new(opcode);
        sqe.sgl = Sgl::transport(0);
        // Connect, Authentication and Disconnect are Fabrics commands; this one is Property Set.
        let status = c.run(sqe, &[], &[]).0.status().code();
        assert_eq!(status, Status::AUTHENTICATION_REQUIRED, "opcode {opcode:#x}");
    }
    assert_eq!(c.set(Property::Cc, 0x0046_0001).status().code(), Status::AUTHENTICATION_REQUIRED);
    let get = Sqe::from_view(&PropertyCommand::get(Cid(0), Property::Cap));
    assert_eq!(c.run(get, &[], &[]).0.status().code(), Status::AUTHENTICATION_REQUIRED);
    // Nor on an I/O queue of this controller: the admin queue was never enabled.
    let mut io = Client::open(rig.addr, false, false);
    let cntlid =
        rig.target.controllers(NQN).expect("known").iter().find(|k| k.hostnqn == HOST).expect("one").cntlid;
    assert_ne!(io.connect(NQN, 1, 32, Cntlid(cntlid)).status(), Status::SUCCESS);
    assert_eq!(read(&mut other_io, 1), Status::SUCCESS, "a host without a key is not concerned");
}

#[test]
fn lies_in_messages_end_the_connection() {
    let rig = secured(TransportOptions::default());
    let (_other_admin, mut other_io) = host(&rig, OTHER);
    let negotiate = auth::negotiate(3, Concat::None, HashId::ALL, NULL);
    let failure = |why| auth::failure(false, 3, why);
    let starts = |data: &[u8], message: &[u8]| data.starts_with(message);

    // Lengths that do not fit the SGL, are 0 or too long; a security protocol that does not exist: nothing is taken.
    let mut c = challenged(&rig);
    for (len, sgl) in [(8, 72), (0, 0), (5000, 5000), (u32::MAX, u32::MAX)] {
        let mut command = Authentication::send(Cid(0), len);
        command.sgl = Sgl::transport(sgl);
        let (cqe, _) = c.run(Sqe::from_view(&command), &[], &[]);
        assert_eq!(cqe.status().code(), Status::INVALID_FIELD, "{len} of {sgl}");
    }
    let mut command = Authentication::receive(Cid(0), 4096);
    command.secp = 0;
    assert_eq!(c.run(Sqe::from_view(&command), &[], &[]).0.status().code(), Status::INVALID_FIELD);
    assert_eq!(auth_receive(&mut c, 4096).0, Status::COMMAND_SEQUENCE_ERROR, "nothing to fetch yet");

    // Every message cut at every place: Failure1 or a refusal, then the end.
    for cut in 1..negotiate.len() {
        let mut c = challenged(&rig);
        assert_eq!(auth_send(&mut c, &negotiate[..cut]), Status::SUCCESS);
        let (status, message) = auth_receive(&mut c, 4096);
        assert_eq!(status, Status::SUCCESS);
        assert_eq!(message[..2], [0, 0xf1], "{cut} bytes");
        closed(&mut c);
    }
    // A step is skipped; a message is sent where one was to be fetched; a wrong response; room for nothing.
    let mut c = challenged(&rig);
    assert_eq!(auth_send(&mut c, &auth::success2(3)), Status::SUCCESS);
    assert!(starts(&auth_receive(&mut c, 64).1, &auth::failure(false, 0, Failure::Message)));
    closed(&mut c);
    let mut c = challenged(&rig);
    assert_eq!(auth_send(&mut c, &negotiate), Status::SUCCESS);
    assert_eq!(auth_send(&mut c, &negotiate), Status::COMMAND_SEQUENCE_ERROR);
    closed(&mut c);
    let mut c = challenged(&rig);
    assert_eq!(auth_send(&mut c, &negotiate), Status::SUCCESS);
    assert_eq!(auth_receive(&mut c, 16).0, Status::INVALID_FIELD);
    closed(&mut c);
    let mut c = challenged(&rig);
    assert_eq!(auth_send(&mut c, &negotiate), Status::SUCCESS);
    let (_, challenge) = auth_receive(&mut c, 4096);
    assert_eq!((challenge.len(), &challenge[..2]), (4096, &[1, 1][..]), "as many bytes as were asked for");
    let r = auth::Reply { t_id: 3, seqnum: 0, response: &[0; 32], challenge: None, public: &[] };
    assert_eq!(auth_send(&mut c, &r.build()), Status::SUCCESS);
    assert!(starts(&auth_receive(&mut c, 4096).1, &failure(Failure::Failed)));
    closed(&mut c);
    assert_eq!(read(&mut other_io, 1), Status::SUCCESS, "the other host goes on");
    // A host sees the end of its stream a moment before its controller is gone.
    wait(|| rig.target.controllers(NQN).is_ok_and(|c| c.iter().filter(|c| c.hostnqn == HOST).count() == 1));
}

/// All of one transaction, as a host that has the key.
fn prove(c: &mut Client) {
    let names = Names { host: HOST.into(), subsystem: NQN.into() };
    let key = Secret::new(&[7; 32], None).expect("32 bytes");
    let entropy = Entropy::draw(|bytes| bytes.fill(5));
    let (mut host, mut message) = Host::start(names, key, None, Offer::default(), Concat::None, 3);
    loop {
        assert_eq!(auth_send(c, &message), Status::SUCCESS);
        match host.receive(&auth_receive(c, 4096).1, &entropy) {
            HostNext::Send(next) => message = next,
            HostNext::Done => return,
            other => panic!("{other:?}"),
        }
    }
}

/// Who wants to know of hosts hears of each queue before it can be used, and not of hosts that have yet to prove who they are.
#[test]
fn arrivals_are_told_before_the_queue_is_used() {
    let rig = secured(TransportOptions::default());
    let told = Arc::new(Mutex::new(Vec::new()));
    let here = told.clone();
    rig.target.on_arrival(move |a| {
        here.lock().unwrap().push((a.subsystem.clone(), a.host.clone(), a.proven, a.bdevs.clone()));
    });
    let said = || told.lock().unwrap().clone();
    let arrival = |host: &str, proven| (NQN.to_owned(), host.to_owned(), proven, vec!["disk".to_owned()]);
    let mut admin = challenged(&rig);
    assert_eq!(said(), [], "not before it has authenticated");
    prove(&mut admin);
    assert_eq!(said(), [arrival(HOST, true)]);
    let (_other_admin, _other_io) = host(&rig, OTHER);
    assert_eq!(said(), [arrival(HOST, true), arrival(OTHER, false), arrival(OTHER, false)]);
    // Another proof on a queue in use is none, nor does discovery count.
    prove(&mut admin);
    let mut discovery = Client::open(rig.addr, false, false);
    assert_eq!(
        discovery.connect(cryptfold_nvmf_spec::nqn::DISCOVERY, 0, 32, Cntlid::DYNAMIC).status(),
        Status::SUCCESS
    );
    assert_eq!(said().len(), 3);
    // What it does not see is not named.
    rig.target.remove_ns(NQN, 1).expect("it is there");
    let hidden = NsOptions { bdev_name: "disk".into(), no_auto_visible: true, ..Default::default() };
    assert_eq!(rig.target.add_ns(NQN, &hidden), Ok(1));
    let _other = host(&rig, OTHER);
    assert_eq!(said().last().map(|a| a.3.len()), Some(0));
}

/// A host proves again who it is, on a queue in use: its messages come in capsules, also where data of commands does not. Commands
/// go on meanwhile.
#[test]
fn queues_in_use_authenticate_again() {
    let rig = secured(TransportOptions { in_capsule_data_size: 0, ..Default::default() });
    let mut admin = challenged(&rig);
    admin.cntlid = Cntlid(rig.target.controllers(NQN).expect("known")[0].cntlid);
    prove(&mut admin);
    admin.enable();
    let mut io = Client::open(rig.addr, false, false);
    assert_eq!(io.connect(NQN, 1, 32, admin.cntlid).status(), Status::SUCCESS);
    prove(&mut io);
    for _ in 0..3 {
        // One command waits for its data all the while.
        let write = common::rw_sqe(Io::Write, 8, 16, Sgl::transport(8192));
        io.submit(&Sqe { cid: 900.into(), ..write }, &[]);
        let common::Pdu::R2t { ttag, .. } = io.recv() else { panic!("an R2T") };
        prove(&mut io);
        assert_eq!(read(&mut io, 1), Status::SUCCESS);
        prove(&mut admin);
        let part = DataPart { cid: Cid(900), offset: 0, len: 8192, last: true };
        let data = io.h2c_data(part, ttag, &[1; 8192]);
        io.send(&data);
        assert_eq!(io.finish(Cid(900), &[]).0.status(), Status::SUCCESS);
    }
    assert_eq!(active(&mut admin), [1]);
}

#[test]
fn silence_and_sudden_ends_while_authenticating() {
    let rig = secured(TransportOptions { auth_timeout_ms: 600, ..Default::default() });
    let mut silent = challenged(&rig);
    let mut half = challenged(&rig);
    let message = auth::negotiate(3, Concat::None, HashId::ALL, DhGroup::ALL);
    half.submit(&Sqe::from_view(&Authentication::send(Cid(9), message.len() as u32)), &message);
    closed(&mut silent);
    // Its message may have come too late on a slow machine.
    while half.recv() != common::Pdu::Closed {}
    drop(rig);
    let rig = secured(TransportOptions::default());
    // Gone while the exponentiation is under way elsewhere.
    for _ in 0..50 {
        let mut c = challenged(&rig);
        let message = auth::negotiate(3, Concat::None, HashId::ALL, &[DhGroup::Ffdhe4096]);
        let sqe = Sqe::from_view(&Authentication::send(Cid(9), message.len() as u32));
        c.submit(&sqe, &message);
    }
    rig.wait_empty();
    let mut c = challenged(&rig);
    assert_eq!(auth_send(&mut c, &auth::negotiate(3, Concat::None, HashId::ALL, NULL)), Status::SUCCESS);
    assert_eq!(auth_receive(&mut c, 4096).1[..2], [1, 1], "still there");
}
