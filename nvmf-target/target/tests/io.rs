//! Hosts that behave: Connect, admin commands, I/O of every kind, over real sockets.

mod common;

use common::*;
use cryptfold_nvmf_spec::fabrics::ConnectReject;
use cryptfold_nvmf_spec::features::Fid;
use cryptfold_nvmf_spec::identify::{
    Cns, DescriptorList, IdentifyController, NamespaceIdentify, NamespaceList,
};
use cryptfold_nvmf_spec::log::{DiscoveryEntry, DiscoveryHeader, GetLogPage, Health, Lid};
use cryptfold_nvmf_spec::opcode::{Admin, Io};
use cryptfold_nvmf_spec::property::Property;
use cryptfold_nvmf_spec::sqe::{AbortCdw10, Fuse, RwControl};
use cryptfold_nvmf_spec::{Cid, Cntlid, Nsid, Sgl, Sqe, Status};
use cryptfold_nvmf_target::{
    AnaState, HostAccess, ListenAddr, NsOptions, Referral, SubsystemOptions, TargetError, TransportOptions,
};
use cryptfold_reactor::IdlePolicy;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

#[test]
fn identify_tells_the_truth() {
    let rig = Rig::new();
    let mut admin = rig.admin();
    let (cqe, data) = admin.admin_in(Admin::Identify, 0, Cns::Controller as u32, 4096);
    assert_eq!(cqe.status(), Status::SUCCESS);
    let id = IdentifyController::read_from_bytes(&data).expect("4096 bytes");
    assert_eq!(id.cntlid.get(), admin.cntlid.0);
    assert_eq!((id.mdts, id.capsule_data_bytes(), id.kas.get()), (5, 4096, 100));
    assert_eq!((id.nn.get(), id.aerl, id.acl, id.maxcmd.get()), (32, 3, 3, 128));
    assert_eq!(id.fuses.get(), 1);
    let (_, data) = admin.admin_in(Admin::Identify, 1, Cns::Namespace as u32, 4096);
    let ns = NamespaceIdentify::read_from_bytes(&data).expect("4096 bytes");
    assert_eq!((ns.nsze.get(), ns.block_bytes()), (BLOCKS, Some(512)));
    // Aligned pages are atomic.
    assert_eq!([ns.nawun, ns.nawupf, ns.nacwu, ns.nabsn, ns.nabspf].map(|n| n.get()), [7; 5]);
    assert_eq!(ns.nabo.get(), 0);
    let (_, data) = admin.admin_in(Admin::Identify, 0, Cns::ActiveNamespaces as u32, 4096);
    let list = NamespaceList::read_from_bytes(&data).expect("4096 bytes");
    assert_eq!(list.iter().collect::<Vec<_>>(), [Nsid(1)]);
    let (_, data) = admin.admin_in(Admin::Identify, 1, Cns::NamespaceDescriptors as u32, 4096);
    let list = DescriptorList::read_from_bytes(&data).expect("4096 bytes");
    let uuid = rig.registry.get("disk").expect("it exists").info().uuid;
    assert_eq!(list.iter().count(), 3, "NGUID, UUID, CSI");
    assert!(data.windows(16).any(|w| w == uuid.as_bytes()));
    for cns in [
        Cns::CsController,
        Cns::CsNamespace,
        Cns::IndependentNamespace,
        Cns::CommandSets,
        Cns::SubsystemControllers,
    ] {
        assert_eq!(
            admin.admin_in(Admin::Identify, 1, cns as u32, 4096).0.status(),
            Status::SUCCESS,
            "{cns:?}"
        );
    }
    for (cns, nsid, status) in [
        (0x77, 1, Status::INVALID_FIELD),
        (Cns::Namespace as u32, 33, Status::INVALID_NAMESPACE),
        (Cns::Namespace as u32, 0, Status::INVALID_NAMESPACE),
        (Cns::NamespaceDescriptors as u32, 2, Status::INVALID_NAMESPACE),
    ] {
        assert_eq!(admin.admin_in(Admin::Identify, nsid, cns, 4096).0.status().code(), status);
    }
    let (cqe, data) = admin.admin_in(Admin::Identify, 2, Cns::Namespace as u32, 4096);
    assert!(
        cqe.status().is_success() && data.iter().all(|b| *b == 0),
        "a legal identifier without a namespace"
    );
}

#[test]
fn data_comes_back_by_every_way() {
    for (hdgst, ddgst) in [(false, false), (true, false), (false, true), (true, true)] {
        let rig = Rig::new();
        let admin = rig.admin();
        let mut io = rig.io(&admin, 1, hdgst, ddgst);
        for (lba, blocks) in [(0, 1), (5, 8), (17, 9), (64, 64), (256, 256), (BLOCKS - 3, 3)] {
            let data = pattern(lba, blocks, 3);
            assert_eq!(io.write(lba, &data), Status::SUCCESS);
            let (status, read) = io.read(lba, blocks);
            assert!(status.is_success() && read == data, "{lba}+{blocks} digests {hdgst} {ddgst}");
        }
        // The same in many small H2CData PDUs.
        io.data_limit = 4096;
        let data = pattern(1000, 256, 9);
        assert_eq!(io.write(1000, &data), Status::SUCCESS);
        assert!(io.read(1000, 256).1 == data);
        drop((io, admin));
        rig.wait_empty();
    }
}

#[test]
fn data_without_a_response_where_the_host_allows_it() {
    let rig = Rig::with(1, IdlePolicy::default(), TransportOptions::default());
    let admin = rig.admin();
    let mut io = Client::open(rig.addr, false, false);
    io.no_flow_control = true;
    let cqe = io.connect(NQN, 1, 128, admin.cntlid);
    assert_eq!((cqe.status(), cqe.sqhd.get()), (Status::SUCCESS, 0xffff));
    io.submit(&Sqe { cid: 77.into(), ..read_sqe(0, 8) }, &[]);
    let data = io.recv();
    assert!(matches!(data, Pdu::Data { cid: Cid(77), last: true, success: true, .. }), "{data:?}");
    // Nothing else comes for that command.
    assert_eq!(io.write(0, &pattern(0, 1, 1)), Status::SUCCESS);
}

#[test]
fn other_io_commands() {
    let rig = Rig::new();
    let admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, false);
    let data = pattern(0, 64, 1);
    assert_eq!(io.write(0, &data), Status::SUCCESS);
    assert_eq!(io.run(Sqe::io(Io::Flush, Cid(0), Nsid(1)), &[], &[]).0.status(), Status::SUCCESS);
    let compare = |io: &mut Client, lba, data: &[u8]| {
        let sqe = rw_sqe(Io::Compare, lba, (data.len() / 512) as u32, Sgl::transport(data.len() as u32));
        io.run(sqe, &[], data).0.status().code()
    };
    assert_eq!(compare(&mut io, 0, &data), Status::SUCCESS);
    assert_eq!(compare(&mut io, 1, &data), Status::COMPARE_FAILURE);
    let mut zero = rw_sqe(Io::WriteZeroes, 8, 8, Sgl::transport(0));
    assert_eq!(io.run(zero, &[], &[]).0.status(), Status::SUCCESS);
    zero.set_rw(24, 8, RwControl(0).with_deac(1));
    assert_eq!(io.run(zero, &[], &[]).0.status(), Status::SUCCESS);
    let mut want = data.clone();
    want[8 * 512..16 * 512].fill(0);
    want[24 * 512..32 * 512].fill(0);
    assert!(io.read(0, 64).1 == want);
    // Deallocate two ranges; the RAM disk zeroes them.
    let mut ranges = Vec::new();
    for (lba, blocks) in [(40u64, 2u32), (50, 3)] {
        ranges.extend(0u32.to_le_bytes());
        ranges.extend(blocks.to_le_bytes());
        ranges.extend(lba.to_le_bytes());
    }
    let mut dsm = Sqe::io(Io::DatasetManagement, Cid(0), Nsid(1));
    dsm.cdw10 = 1.into();
    dsm.cdw11 = 4.into();
    dsm.sgl = Sgl::in_capsule(0, ranges.len() as u32);
    assert_eq!(io.run(dsm, &ranges, &[]).0.status(), Status::SUCCESS);
    want[40 * 512..42 * 512].fill(0);
    want[50 * 512..53 * 512].fill(0);
    assert!(io.read(0, 64).1 == want);
}

#[test]
fn wrong_io_commands_fail_alone() {
    let rig = Rig::new();
    let admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, true);
    let mut fails = |sqe: Sqe, data: &[u8], status: Status| {
        assert_eq!(io.run(sqe, data, &[]).0.status().code(), status);
    };
    fails(read_sqe(BLOCKS, 1), &[], Status::LBA_OUT_OF_RANGE);
    fails(read_sqe(u64::MAX, 8), &[], Status::LBA_OUT_OF_RANGE);
    fails(rw_sqe(Io::Read, 0, 8, Sgl::transport(4095)), &[], Status::DATA_SGL_LENGTH_INVALID);
    fails(rw_sqe(Io::Read, 0, 8, Sgl::data_block(0, 4096)), &[], Status::SGL_DESCRIPTOR_TYPE_INVALID);
    fails(rw_sqe(Io::Read, 0, 512, Sgl::transport(262_144)), &[], Status::INVALID_FIELD);
    fails(rw_sqe(Io::Write, 0, 1, Sgl::transport(u32::MAX)), &[], Status::INVALID_FIELD);
    let data = [1; 1024];
    fails(rw_sqe(Io::Write, 0, 4, Sgl::in_capsule(0, 2048)), &data, Status::DATA_SGL_LENGTH_INVALID);
    fails(rw_sqe(Io::Write, 0, 1, Sgl::in_capsule(2000, 512)), &data, Status::SGL_OFFSET_INVALID);
    fails(rw_sqe(Io::Write, BLOCKS, 1, Sgl::in_capsule(0, 512)), &data, Status::LBA_OUT_OF_RANGE);
    fails(Sqe { nsid: 2.into(), ..read_sqe(0, 1) }, &[], Status::INVALID_NAMESPACE);
    fails(Sqe { nsid: u32::MAX.into(), ..read_sqe(0, 1) }, &[], Status::INVALID_NAMESPACE);
    fails(Sqe { opcode: 0x99, ..read_sqe(0, 1) }, &data, Status::INVALID_OPCODE);
    // An offset into the capsule is legal.
    let part = pattern(3, 1, 5);
    let capsule = [vec![9; 512], part.clone()].concat();
    let write = rw_sqe(Io::Write, 3, 1, Sgl::in_capsule(512, 512));
    assert_eq!(io.run(write, &capsule, &[]).0.status(), Status::SUCCESS);
    assert!(io.read(3, 1).1 == part);
}

#[test]
fn fused_compare_and_write() {
    let rig = Rig::new();
    let admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, false);
    let (old, new) = (pattern(0, 1, 1), pattern(0, 1, 2));
    assert_eq!(io.write(10, &old), Status::SUCCESS);
    let capsule = |op| rw_sqe(op, 10, 1, Sgl::in_capsule(0, 512));
    let halves = |io: &mut Client, a: Sqe, b: Sqe, expect: &[u8]| {
        let (x, y) = (io.cid(), io.cid());
        io.submit(&fused(a, x, Fuse::First), expect);
        io.submit(&fused(b, y, Fuse::Second), &new);
        let mut status = [Status::SUCCESS; 2];
        for _ in 0..2 {
            match io.recv() {
                Pdu::Response(c) => status[usize::from(c.cid() == y)] = c.status().code(),
                other => panic!("{other:?}"),
            }
        }
        status
    };
    let (compare, write) = (capsule(Io::Compare), capsule(Io::Write));
    let failed = [Status::COMPARE_FAILURE, Status::ABORTED_FAILED_FUSED];
    assert_eq!(halves(&mut io, compare, write, &new), failed);
    assert!(io.read(10, 1).1 == old);
    assert_eq!(halves(&mut io, compare, write, &old), [Status::SUCCESS; 2]);
    assert!(io.read(10, 1).1 == new);
    // Ranges that differ.
    let mut elsewhere = write;
    elsewhere.set_slba(11);
    let status = halves(&mut io, compare, elsewhere, &new);
    assert_eq!(status, [Status::ABORTED_FAILED_FUSED, Status::INVALID_FIELD]);
    // A first half that is wrong takes the second with it.
    let mut outside = compare;
    outside.set_slba(BLOCKS);
    let status = halves(&mut io, outside, write, &new);
    assert_eq!(status, [Status::LBA_OUT_OF_RANGE, Status::ABORTED_FAILED_FUSED]);
    // Halves without each other.
    let cid = io.cid();
    io.submit(&fused(write, cid, Fuse::Second), &new);
    assert_eq!(io.finish(cid, &[]).0.status().code(), Status::ABORTED_MISSING_FUSED);
    let (x, y) = (io.cid(), io.cid());
    io.submit(&fused(compare, x, Fuse::First), &new);
    io.submit(&Sqe { cid: y.0.into(), ..read_sqe(0, 1) }, &[]);
    assert_eq!(io.finish(x, &[]).0.status().code(), Status::ABORTED_MISSING_FUSED);
    assert_eq!(io.finish(y, &[]).0.status(), Status::SUCCESS);
    // Data by R2T, the second half's first.
    let (x, y) = (io.cid(), io.cid());
    let by_r2t = |op| rw_sqe(op, 20, 16, Sgl::transport(8192));
    let zeros = vec![0; 8192];
    io.submit(&fused(by_r2t(Io::Compare), x, Fuse::First), &[]);
    io.submit(&fused(by_r2t(Io::Write), y, Fuse::Second), &[]);
    let (Pdu::R2t { ttag: tx, .. }, Pdu::R2t { ttag: ty, .. }) = (io.recv(), io.recv()) else {
        panic!("two R2Ts");
    };
    for (cid, ttag, data) in [(y, ty, &pattern(20, 16, 4)), (x, tx, &zeros)] {
        let part = cryptfold_nvmf_spec::pdu::build::DataPart { cid, offset: 0, len: 8192, last: true };
        let bytes = io.h2c_data(part, ttag, data);
        io.send(&bytes);
    }
    assert_eq!(io.finish(x, &[]).0.status(), Status::SUCCESS);
    assert_eq!(io.finish(y, &[]).0.status(), Status::SUCCESS);
    assert!(io.read(20, 16).1 == pattern(20, 16, 4));
}

#[test]
fn two_queues_on_two_reactors() {
    let rig = Rig::new();
    let mut admin = rig.admin();
    assert_eq!(
        admin.feature(Admin::SetFeatures, Fid::NumberOfQueues as u32, 0x0001_0001).dw0.get(),
        0x0001_0001
    );
    let (mut a, mut b) = (rig.io(&admin, 1, false, false), rig.io(&admin, 2, false, false));
    let mut third = Client::open(rig.addr, false, false);
    let cqe = third.connect(NQN, 3, 128, admin.cntlid);
    assert_eq!(
        (cqe.status(), cqe.dw0.get()),
        (ConnectReject::Command(42).completion().0, 42),
        "two were granted"
    );
    let reactors: Vec<_> =
        rig.target.qpairs(NQN).expect("it exists").iter().map(|q| (q.qid, q.reactor)).collect();
    assert_eq!(reactors.iter().map(|r| r.0).collect::<Vec<_>>(), [0, 1, 2]);
    assert_ne!(reactors[1].1, reactors[2].1, "I/O queues are spread: {reactors:?}");
    // Deep queues on both, interleaved.
    for round in 0..20u64 {
        for (q, base) in [(&mut a, 0), (&mut b, 2048)] {
            for i in 0..64u16 {
                let lba = base + u64::from(i) * 8;
                let data = pattern(lba, 8, round as u8);
                let sqe = rw_sqe(Io::Write, lba, 8, Sgl::in_capsule(0, 4096));
                q.submit(&Sqe { cid: (1000 + i).into(), ..sqe }, &data);
            }
        }
        for q in [&mut a, &mut b] {
            let mut seen = [false; 64];
            for _ in 0..64 {
                let Pdu::Response(cqe) = q.recv() else { panic!("a response") };
                assert!(cqe.status().is_success());
                assert!(
                    !std::mem::replace(&mut seen[usize::from(cqe.cid().0 - 1000)], true),
                    "answered twice"
                );
            }
        }
        for i in 0..64 {
            let lba = 2048 + i * 8;
            assert!(
                a.read(lba, 8).1 == pattern(lba, 8, round as u8),
                "what one queue wrote, the other reads"
            );
        }
    }
    let stats = rig.target.stats();
    assert_eq!(stats.iter().map(|s| s.current_io_qpairs).sum::<u64>(), 2);
    assert_eq!(a.disconnect().status(), Status::SUCCESS);
    assert_eq!(a.recv(), Pdu::Closed);
    assert!(b.read(0, 1).0.is_success(), "the other queue lives");
    drop(admin);
    assert_eq!(b.recv(), Pdu::Closed, "without its admin queue the controller ends");
    rig.wait_empty();
}

#[test]
fn connect_is_checked() {
    let rig = Rig::new();
    let admin = rig.admin();
    let rejects = |subnqn: &str, qid, entries, cntlid, want: ConnectReject| {
        let mut c = Client::open(rig.addr, false, false);
        let cqe = c.connect(subnqn, qid, entries, cntlid);
        assert_eq!((cqe.status(), cqe.dw0.get()), want.completion(), "{subnqn} {qid} {entries} {cntlid}");
        // A second try on the same connection is welcome.
        assert_eq!(c.connect(NQN, 0, 32, Cntlid::DYNAMIC).status(), Status::SUCCESS);
    };
    let dynamic = Cntlid::DYNAMIC;
    rejects("nqn.2024-01.io.cryptfold:other", 0, 32, dynamic, ConnectReject::Data(256));
    rejects(NQN, 0, 129, dynamic, ConnectReject::Command(44));
    rejects(NQN, 0, 1, dynamic, ConnectReject::Command(44));
    rejects(NQN, 0, 32, Cntlid(5), ConnectReject::Data(16));
    rejects(NQN, 1, 32, Cntlid(999), ConnectReject::Data(16));
    rejects(NQN, 128, 32, admin.cntlid, ConnectReject::Command(42));
    rejects(NQN, 1, 129, admin.cntlid, ConnectReject::Command(44));
    rejects(DISCOVERY, 1, 32, dynamic, ConnectReject::Data(16));
    // Hosts.
    rig.target.allow_any_host(NQN, false).expect("it exists");
    let mut c = Client::open(rig.addr, false, false);
    let reject = ConnectReject::Host.completion().0;
    assert_eq!(c.connect(NQN, 0, 32, dynamic).status(), reject);
    rig.target.add_host(NQN, HOST, HostAccess::default()).expect("a new host");
    assert_eq!(c.connect(NQN, 0, 32, dynamic).status(), Status::SUCCESS);
    rig.target.remove_host(NQN, HOST).expect("an old host");
    assert_eq!(c.recv(), Pdu::Closed);
}

#[test]
fn commands_wait_for_their_time() {
    let rig = Rig::new();
    let mut c = Client::open(rig.addr, false, false);
    let early = c.admin_in(Admin::Identify, 0, 1, 4096).0;
    assert_eq!(early.status(), Status::COMMAND_SEQUENCE_ERROR, "before Connect");
    assert_eq!(c.connect(NQN, 0, 32, Cntlid::DYNAMIC).status(), Status::SUCCESS);
    let early = c.admin_in(Admin::Identify, 0, 1, 4096).0;
    assert_eq!(early.status(), Status::COMMAND_SEQUENCE_ERROR, "before CC.EN");
    c.enable();
    assert!(c.connect(NQN, 0, 32, Cntlid::DYNAMIC).status().code() == Status::COMMAND_SEQUENCE_ERROR);
    assert_eq!(c.admin_in(Admin::Identify, 0, 1, 4096).0.status(), Status::SUCCESS);
}

#[test]
fn reset_and_shutdown_end_the_io_queues() {
    let rig = Rig::new();
    let mut admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, false);
    assert!(io.read(0, 1).0.is_success());
    assert_eq!(admin.set(Property::Cc, 0x0046_4001).status(), Status::SUCCESS);
    assert_eq!(io.recv(), Pdu::Closed);
    let end = std::time::Instant::now() + PATIENCE;
    while admin.get(Property::Csts) != 9 {
        assert!(std::time::Instant::now() < end, "ready, shutdown complete");
    }
    assert_eq!(admin.set(Property::Cc, 0x0046_0000).status(), Status::SUCCESS);
    assert_eq!(admin.get(Property::Csts), 0);
    admin.enable();
    let mut io = rig.io(&admin, 1, false, false);
    assert!(io.read(0, 1).0.is_success());
}

#[test]
fn events_and_namespaces_that_come_and_go() {
    let rig = Rig::new();
    let mut admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, false);
    assert!(io.read(0, 1).0.is_success());
    admin.feature(Admin::SetFeatures, Fid::AsyncEventConfig as u32, 1 << 8);
    let mut aer = Sqe::admin(Admin::AsyncEventRequest, Cid(900), Nsid(0));
    admin.submit(&aer, &[]);
    rig.target.remove_ns(NQN, 1).expect("it was there");
    let (cqe, _) = admin.finish(Cid(900), &[]);
    assert_eq!((cqe.status(), cqe.dw0.get()), (Status::SUCCESS, 0x0004_0002));
    assert_eq!(io.read(0, 1).0.code(), Status::INVALID_NAMESPACE);
    aer.cid = 901.into();
    admin.submit(&aer, &[]);
    let log = GetLogPage::new(Lid::ChangedNamespaces, 0, 4096).expect("legal");
    let mut sqe = log.to_sqe(Cid(0), Nsid(0));
    sqe.sgl = Sgl::transport(4096);
    let (_, page) = admin.run(sqe, &[], &[]);
    assert_eq!(page[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
    let ns = NsOptions { bdev_name: "disk".into(), nsid: Some(3), ..Default::default() };
    assert_eq!(rig.target.add_ns(NQN, &ns), Ok(3));
    assert_eq!(admin.finish(Cid(901), &[]).0.dw0.get(), 0x0004_0002);
    assert!(io.run(Sqe { nsid: 3.into(), ..read_sqe(0, 1) }, &[], &[]).0.status().is_success());
    // The device goes away under it.
    let removal = rig.registry.unregister("disk").expect("it exists");
    assert!(removal.wait(Duration::from_secs(5)), "nobody holds the device");
    let late = io.run(Sqe { nsid: 3.into(), ..read_sqe(0, 1) }, &[], &[]).0;
    assert_eq!(late.status().code(), Status::INVALID_NAMESPACE);
    assert!(rig.target.subsystems()[1].namespaces.is_empty());
    // Abort of a waiting request.
    aer.cid = 902.into();
    admin.submit(&aer, &[]);
    let mut abort = Sqe::admin(Admin::Abort, Cid(903), Nsid(0));
    abort.cdw10 = AbortCdw10(0).with_cid(902).0.into();
    admin.submit(&abort, &[]);
    assert_eq!(admin.finish(Cid(902), &[]).0.status().code(), Status::ABORT_REQUESTED);
    assert_eq!(admin.finish(Cid(903), &[]).0.dw0.get(), 0);
    // Abort of something that is not there, on the I/O queue's reactor.
    let mut abort = Sqe::admin(Admin::Abort, Cid(0), Nsid(0));
    abort.cdw10 = AbortCdw10(0).with_sqid(1).with_cid(4242).0.into();
    assert_eq!(admin.run(abort, &[], &[]).0.dw0.get(), 1);
}

#[test]
fn discovery_names_what_the_host_may_use() {
    let rig = Rig::new();
    let mut c = Client::open(rig.addr, false, false);
    assert_eq!(c.connect(DISCOVERY, 0, 32, Cntlid::DYNAMIC).status(), Status::SUCCESS);
    c.enable();
    let page = |c: &mut Client| {
        let mut sqe = GetLogPage::new(Lid::Discovery, 0, 4096).expect("legal").to_sqe(Cid(0), Nsid(0));
        sqe.sgl = Sgl::transport(4096);
        let (cqe, page) = c.run(sqe, &[], &[]);
        assert_eq!(cqe.status(), Status::SUCCESS);
        let header = DiscoveryHeader::read_from_bytes(&page[..1024]).expect("1024 bytes");
        let entry = DiscoveryEntry::read_from_bytes(&page[1024..2048]).expect("1024 bytes");
        (header.genctr.get(), header.numrec.get(), entry)
    };
    let (generation, count, entry) = page(&mut c);
    assert_eq!(count, 1);
    let elsewhere = Referral {
        addr: ListenAddr::parse("TCP", None, "192.0.2.7", "8009").expect("an address"),
        subnqn: DISCOVERY.into(),
        secure_channel: false,
    };
    rig.target.add_referral(elsewhere.clone()).expect("new");
    assert_eq!(page(&mut c).1, 2, "the subsystem and the referral");
    rig.target.remove_referral(&elsewhere.addr, DISCOVERY).expect("it was there");
    let (generation, count, _) = {
        let (later, count, entry) = page(&mut c);
        assert!(later > generation);
        (later, count, entry)
    };
    assert_eq!(count, 1);
    assert_eq!(entry.traddr(), Some("127.0.0.1"));
    assert_eq!(entry.trsvcid(), Some(rig.addr.port().to_string().as_str()));
    assert!(entry.as_bytes()[256..].starts_with(NQN.as_bytes()));
    c.feature(Admin::SetFeatures, Fid::AsyncEventConfig as u32, 1 << 31);
    c.submit(&Sqe::admin(Admin::AsyncEventRequest, Cid(500), Nsid(0)), &[]);
    rig.target.allow_any_host(NQN, false).expect("it exists");
    assert_eq!(c.finish(Cid(500), &[]).0.dw0.get(), 0x0070_f002);
    let (later, count, _) = page(&mut c);
    assert!(later > generation && count == 0);
    let id = c.admin_in(Admin::Identify, 0, Cns::Controller as u32, 4096).1;
    assert_eq!(IdentifyController::read_from_bytes(&id).expect("4096 bytes").cntrltype, 2);
}

#[test]
fn features_and_logs() {
    let rig = Rig::new();
    let mut admin = rig.admin();
    for fid in
        [Fid::Arbitration, Fid::PowerManagement, Fid::ErrorRecovery, Fid::WriteAtomicity, Fid::KeepAliveTimer]
    {
        let cqe = admin.feature(Admin::GetFeatures, fid as u32, 0);
        assert_eq!((cqe.status(), cqe.dw0.get()), (Status::SUCCESS, 0), "{fid:?}");
    }
    assert_eq!(admin.feature(Admin::GetFeatures, Fid::VolatileWriteCache as u32, 0).dw0.get(), 1);
    admin.feature(Admin::SetFeatures, Fid::VolatileWriteCache as u32, 0);
    assert_eq!(admin.feature(Admin::GetFeatures, Fid::VolatileWriteCache as u32, 0).dw0.get(), 0);
    admin.feature(Admin::SetFeatures, Fid::KeepAliveTimer as u32, 15_000);
    assert_eq!(
        admin.feature(Admin::GetFeatures, Fid::KeepAliveTimer as u32, 0).dw0.get(),
        20_000,
        "KAS is 10 s"
    );
    for bad in [0u32, 0x08, 0xc0, 0xff] {
        assert_eq!(admin.feature(Admin::GetFeatures, bad, 0).status().code(), Status::INVALID_FIELD);
    }
    let mut io = rig.io(&admin, 1, false, false);
    for lba in 0..10 {
        assert_eq!(io.write(lba * 8, &pattern(lba, 8, 0)), Status::SUCCESS);
        assert!(io.read(lba * 8, 8).0.is_success());
    }
    for lid in [Lid::SupportedLogPages, Lid::Error, Lid::Health, Lid::FirmwareSlots, Lid::CommandEffects] {
        let mut sqe = GetLogPage::new(lid, 0, 512).expect("legal").to_sqe(Cid(0), Nsid(0));
        sqe.sgl = Sgl::transport(512);
        let (cqe, page) = admin.run(sqe, &[], &[]);
        assert_eq!((cqe.status(), page.len()), (Status::SUCCESS, 512), "{lid:?}");
        if lid == Lid::Health {
            let health = Health::read_from_bytes(&page).expect("512 bytes");
            assert_eq!((health.host_reads.get(), health.host_writes.get()), (10, 10));
        }
    }
    let mut sqe = GetLogPage::new(Lid::Ana, 0, 512).expect("legal").to_sqe(Cid(0), Nsid(0));
    sqe.sgl = Sgl::transport(512);
    assert_eq!(admin.run(sqe, &[], &[]).0.status().code(), Status::LOG_PAGE_INVALID, "ANA is off");
}

#[test]
fn ana_states_and_resizing() {
    let rig = Rig::new();
    let t = &rig.target;
    assert!(t.set_ana_state(NQN, &rig.listen, AnaState::Inaccessible, None).is_err(), "no ANA reporting");
    let nqn = "nqn.2024-01.io.cryptfold:ana";
    let options =
        SubsystemOptions { allow_any_host: true, ana_reporting: true, ..SubsystemOptions::new(nqn) };
    t.create_subsystem(options).expect("a new name");
    t.remove_ns(NQN, 1).expect("it is there");
    let ns = NsOptions { bdev_name: "disk".into(), anagrpid: Some(7), ..Default::default() };
    t.add_ns(nqn, &ns).expect("a free device");
    assert_eq!(t.add_listener(nqn, &rig.listen).as_ref(), Ok(&rig.listen), "the port is shared");
    let mut admin = Client::open(rig.addr, false, false);
    let cqe = admin.connect(nqn, 0, 32, Cntlid::DYNAMIC);
    admin.enable();
    let mut io = Client::open(rig.addr, false, false);
    assert!(io.connect(nqn, 1, 128, Cntlid(cqe.dw0.get() as u16)).status().is_success());
    assert!(io.read(0, 1).0.is_success());
    admin.feature(Admin::SetFeatures, Fid::AsyncEventConfig as u32, 1 << 11 | 1 << 8);
    admin.submit(&Sqe::admin(Admin::AsyncEventRequest, Cid(900), Nsid(0)), &[]);
    t.set_ana_state(nqn, &rig.listen, AnaState::Inaccessible, Some(7)).expect("a group");
    assert_eq!(admin.finish(Cid(900), &[]).0.dw0.get(), 0x000c_0302);
    assert_eq!(io.read(0, 1).0, Status::ANA_INACCESSIBLE);
    let mut sqe = GetLogPage::new(Lid::Ana, 0, 52).expect("legal").to_sqe(Cid(0), Nsid(0));
    sqe.sgl = Sgl::transport(52);
    let (_, page) = admin.run(sqe, &[], &[]);
    assert_eq!(
        (page[8], page[16], page[20], page[32], page[48]),
        (1, 7, 1, 3, 1),
        "one group, one namespace"
    );
    t.set_ana_state(nqn, &rig.listen, AnaState::NonOptimized, None).expect("all groups");
    assert!(io.read(0, 1).0.is_success());
    // A device that grows is an event, and the new blocks are there.
    admin.submit(&Sqe::admin(Admin::AsyncEventRequest, Cid(901), Nsid(0)), &[]);
    rig.registry.get("disk").expect("it exists").set_blocks(BLOCKS / 2);
    let mut event = admin.finish(Cid(901), &[]).0.dw0.get();
    if event == 0x000c_0302 {
        // The change of all groups above is an event too, and may come first.
        admin.submit(&Sqe::admin(Admin::AsyncEventRequest, Cid(902), Nsid(0)), &[]);
        event = admin.finish(Cid(902), &[]).0.dw0.get();
    }
    assert_eq!(event, 0x0004_0002);
    assert_eq!(io.read(BLOCKS / 2, 1).0.code(), Status::LBA_OUT_OF_RANGE);
    let (_, data) = admin.admin_in(Admin::Identify, 1, Cns::Namespace as u32, 4096);
    let id = NamespaceIdentify::read_from_bytes(&data).expect("4096 bytes");
    assert_eq!((id.nsze.get(), id.anagrpid.get()), (BLOCKS / 2, 7));
}

/// An idle target, connections and all, sleeps, and answers when it is needed.
#[test]
fn idle_costs_nothing() {
    let rig = Rig::with(2, IdlePolicy::default(), TransportOptions::default());
    let admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, false);
    assert!(io.read(0, 1).0.is_success());
    std::thread::sleep(Duration::from_millis(100));
    // Sleeps, and looks of the poller that serves connections: what a core does between two sleeps.
    let counts = |rig: &Rig| {
        let stats: Vec<_> = rig.runtime.handles().iter().map(|h| h.stats()).collect();
        let polls: u64 = stats.iter().flat_map(|s| &s.pollers).map(|p| p.run_count).sum();
        (stats.iter().map(|s| s.sleeps).sum::<u64>(), polls)
    };
    let (begin, before) = (std::time::Instant::now(), counts(&rig));
    std::thread::sleep(Duration::from_secs(1));
    let after = counts(&rig);
    let (sleeps, polls) = (after.0 - before.0, after.1 - before.1);
    // Deadlines are looked at four times a second on each of two cores; a slow machine's second may be longer.
    let seconds = begin.elapsed().as_secs() + 1;
    assert!(sleeps <= 20 * seconds, "woken {sleeps} times in {seconds} idle seconds");
    assert!(polls <= 40 * seconds, "looked {polls} times in {seconds} idle seconds");
    assert!(io.read(0, 1).0.is_success());
}

#[test]
fn keep_alive_expires() {
    let options = TransportOptions { kas: 1, min_kato: 1500, ..Default::default() };
    let rig = Rig::with(2, IdlePolicy::Interrupt, options);
    let mut admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, false);
    assert!(io.read(0, 1).0.is_success());
    // That Keep Alive in time keeps it is a matter of times, and of the simulator (`simulated.rs`).
    admin.feature(Admin::SetFeatures, Fid::KeepAliveTimer as u32, 1500);
    assert_eq!(admin.recv(), Pdu::Closed);
    assert_eq!(io.recv(), Pdu::Closed);
    rig.wait_empty();
}

#[test]
fn control_requests_name_what_is_wrong() {
    let rig = Rig::new();
    let t = &rig.target;
    let text = |e: Result<(), TargetError>| {
        let e = e.expect_err("refused");
        (e.code(), e.to_string())
    };
    let (code, why) = text(t.create_transport("TCP", TransportOptions::default()));
    assert_eq!((code, why.as_str()), (-32603, "Transport type 'TCP' already exists"));
    let (code, why) = text(t.delete_subsystem("nqn.2024-01.io.none:x"));
    assert!(code == -32602 && why.contains("not found"), "{why}");
    let ns = |name: &str, nsid| NsOptions { bdev_name: name.into(), nsid, ..Default::default() };
    assert_eq!(text(t.add_ns(NQN, &ns("none", None)).map(drop)).0, -19);
    assert!(text(t.add_ns(NQN, &ns("disk", None)).map(drop)).1.contains("claimed by NVMe-oF Target"));
    assert!(text(t.add_ns(NQN, &ns("disk", Some(1))).map(drop)).1.contains("already exists"));
    assert!(text(t.add_ns(NQN, &ns("disk", Some(33))).map(drop)).1.contains("nsid"));
    assert!(text(t.add_listener(NQN, &rig.listen).map(drop)).1.contains("already exists"));
    let other = Rig::new();
    let (_, why) = text(other.target.add_listener(NQN, &rig.listen).map(drop));
    assert!(why.contains(&rig.listen.to_string()) && why.contains("in use"), "{why}");
    let mut io = rig.admin();
    t.remove_listener(NQN, &rig.listen).expect("it listens");
    assert_eq!(io.recv(), Pdu::Closed);
    wait(|| std::net::TcpStream::connect(rig.addr).is_err());
    t.delete_subsystem(NQN).expect("nobody uses it");
    assert!(rig.registry.get("disk").expect("it lives").claimed_by().is_none());
}
