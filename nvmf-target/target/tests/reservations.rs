//! Reservations over the wire: who may do what, who is told, what a preemption ends, what a restart keeps.

mod common;

use common::*;
use cryptfold_nvmf_spec::features::Fid;
use cryptfold_nvmf_spec::identify::{Cns, NamespaceIdentify};
use cryptfold_nvmf_spec::log::{Lid, ReservationNotification};
use cryptfold_nvmf_spec::opcode::{Admin, Io};
use cryptfold_nvmf_spec::reservation::{
    AcquireCdw10, RegisterCdw10, RegisteredControllerExt, ReleaseCdw10, ReservationStatusExt, ReservationType,
};
use cryptfold_nvmf_spec::sqe::Fuse;
use cryptfold_nvmf_spec::{Cid, Nsid, Sgl, Sqe, Status};
use cryptfold_nvmf_target::NsOptions;
use zerocopy::FromBytes;

const REGISTER: u32 = 0;
const UNREGISTER: u32 = 1;
const ACQUIRE: u32 = 0;
const PREEMPT: u32 = 1;
const PREEMPT_AND_ABORT: u32 = 2;

fn command(io: &mut Client, opcode: Io, cdw10: u32, words: &[u64]) -> Status {
    let data: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut sqe = Sqe::io(opcode, Cid(0), Nsid(1));
    sqe.cdw10 = cdw10.into();
    sqe.sgl = Sgl::in_capsule(0, data.len() as u32);
    io.run(sqe, &data, &[]).0.status().code()
}

/// `persist`: CPTPL.
fn register(io: &mut Client, action: u32, (current, new): (u64, u64), persist: u32) -> Status {
    let d10 = RegisterCdw10(0).with_rrega(action).with_cptpl(persist).0;
    command(io, Io::ReservationRegister, d10, &[current, new])
}

fn acquire(io: &mut Client, action: u32, kind: ReservationType, key: u64, victim: u64) -> Status {
    let d10 = AcquireCdw10(0).with_racqa(action).with_rtype(kind as u32).0;
    command(io, Io::ReservationAcquire, d10, &[key, victim])
}

fn release(io: &mut Client, clear: bool, kind: ReservationType, key: u64) -> Status {
    let d10 = ReleaseCdw10(0).with_rrela(clear.into()).with_rtype(kind as u32).0;
    command(io, Io::ReservationRelease, d10, &[key])
}

fn report(io: &mut Client, bytes: u32) -> (ReservationStatusExt, Vec<RegisteredControllerExt>) {
    let mut sqe = Sqe::io(Io::ReservationReport, Cid(0), Nsid(1));
    sqe.cdw10 = (bytes / 4 - 1).into();
    sqe.cdw11 = 1.into();
    sqe.sgl = Sgl::transport(bytes);
    let (cqe, data) = io.run(sqe, &[], &[]);
    assert_eq!((cqe.status(), data.len()), (Status::SUCCESS, bytes as usize));
    let (head, rest) = ReservationStatusExt::read_from_prefix(&data).expect("64 bytes");
    let entries =
        rest.chunks_exact(64).map(|e| RegisteredControllerExt::read_from_bytes(e).expect("64 bytes"));
    (head, entries.take(head.status.regctl.get().into()).collect())
}

/// Every command of the NVM command set that reservations know about: (read, status).
fn try_everything(io: &mut Client) -> Vec<(bool, Io, Status)> {
    let block = vec![0; 512];
    let mut all = Vec::new();
    for (read, opcode) in [
        (true, Io::Read),
        (true, Io::Compare),
        (true, Io::Verify),
        (false, Io::Flush),
        (false, Io::Write),
        (false, Io::WriteZeroes),
        (false, Io::DatasetManagement),
        (false, Io::Copy),
    ] {
        let mut sqe = rw_sqe(opcode, 0, 1, Sgl::transport(0));
        let data: Vec<u8> = match opcode {
            Io::Read => {
                sqe.sgl = Sgl::transport(512);
                Vec::new()
            }
            Io::Write | Io::Compare => block.clone(),
            Io::DatasetManagement => {
                (sqe.cdw10, sqe.cdw11, sqe.cdw12) = (0.into(), 4.into(), 0.into());
                [0u32.to_le_bytes(), 1u32.to_le_bytes(), [0; 4], [0; 4]].concat()
            }
            Io::Copy => vec![0; 32],
            _ => Vec::new(),
        };
        if !data.is_empty() {
            sqe.sgl = Sgl::in_capsule(0, data.len() as u32);
        }
        all.push((read, opcode, io.run(sqe, &data, &[]).0.status().code()));
    }
    // Fused: the halves share the fate of a write.
    let (a, b) = (io.cid(), io.cid());
    let sgl = Sgl::in_capsule(0, 512);
    io.submit(&fused(rw_sqe(Io::Compare, 0, 1, sgl), a, Fuse::First), &block);
    io.submit(&fused(rw_sqe(Io::Write, 0, 1, sgl), b, Fuse::Second), &block);
    let (first, second) = (io.finish(a, &[]).0.status().code(), io.finish(b, &[]).0.status().code());
    assert_eq!(second == Status::SUCCESS, first == Status::SUCCESS);
    all.push((false, Io::Compare, first));
    all
}

/// The table of NVMe Base 2.0 section 8.19, command by command: six types, holder, registrant and other.
#[test]
fn every_command_by_type_and_standing() {
    let rig = Rig::new();
    let mut hosts: Vec<_> = (1..=3).map(|n| rig.host(n)).collect();
    // Zeros everywhere, so that compares succeed and stay so.
    for kind in ReservationType::ALL {
        for (n, (_, io)) in hosts.iter_mut().enumerate().take(2) {
            assert_eq!(register(io, REGISTER, (0, n as u64 + 1), 0), Status::SUCCESS);
        }
        assert_eq!(acquire(&mut hosts[0].1, ACQUIRE, *kind, 1, 0), Status::SUCCESS);
        let expected = match *kind as u8 {
            1 => ["rw", "r-", "r-"],
            2 => ["rw", "--", "--"],
            3 | 5 => ["rw", "rw", "r-"],
            _ => ["rw", "rw", "--"],
        };
        for ((_, io), want) in hosts.iter_mut().zip(expected) {
            for (read, opcode, status) in try_everything(io) {
                let allowed = want.contains(if read { 'r' } else { 'w' });
                let want = if allowed { Status::SUCCESS } else { Status::RESERVATION_CONFLICT };
                assert_eq!(status, want, "{kind:?}, {opcode:?} of a host that may {expected:?}");
            }
        }
        assert_eq!(release(&mut hosts[2].1, true, *kind, 9), Status::RESERVATION_CONFLICT);
        assert_eq!(release(&mut hosts[0].1, true, *kind, 1), Status::SUCCESS, "clear");
        assert!(try_everything(&mut hosts[2].1).iter().all(|c| c.2 == Status::SUCCESS));
    }
}

/// A write whose data is still to come when the reservation is taken is checked when it is executed.
#[test]
fn a_write_that_waits_for_its_data_meets_the_new_reservation() {
    let rig = Rig::new();
    let (_admin, mut io) = rig.host(1);
    let (_other_admin, mut other) = rig.host(2);
    let data = vec![5; 8192];
    other.submit(&Sqe { cid: 70.into(), ..rw_sqe(Io::Write, 0, 16, Sgl::transport(8192)) }, &[]);
    let Pdu::R2t { ttag, .. } = other.recv() else { panic!("no R2T") };
    assert_eq!(register(&mut io, REGISTER, (0, 1), 0), Status::SUCCESS);
    assert_eq!(acquire(&mut io, ACQUIRE, ReservationType::WriteExclusive, 1, 0), Status::SUCCESS);
    let part = cryptfold_nvmf_spec::pdu::build::DataPart { cid: Cid(70), offset: 0, len: 8192, last: true };
    let bytes = other.h2c_data(part, ttag, &data);
    other.send(&bytes);
    assert_eq!(other.finish(Cid(70), &[]).0.status().code(), Status::RESERVATION_CONFLICT);
    assert!(io.read(0, 16).1.iter().all(|b| *b == 0));
}

#[test]
fn forty_registrants_and_their_report() {
    let rig = Rig::new();
    let mut hosts: Vec<_> = (1..=40).map(|n| rig.host(n)).collect();
    for (n, (_, io)) in hosts.iter_mut().enumerate() {
        assert_eq!(register(io, REGISTER, (0, 100 + n as u64), 0), Status::SUCCESS);
    }
    let kind = ReservationType::ExclusiveAccessAll;
    assert_eq!(acquire(&mut hosts[3].1, ACQUIRE, kind, 103, 0), Status::SUCCESS);
    // One of them has two controllers, one has none left.
    let (_second_admin, _second) = rig.host(5);
    drop(hosts.remove(39));
    wait(|| rig.target.controllers(NQN).is_ok_and(|c| c.len() == 40));
    let (head, entries) = report(&mut hosts[0].1, 64 + 64 * 64);
    assert_eq!((head.status.rtype, head.status.regctl.get(), head.status.generation.get()), (6, 41, 40));
    assert_eq!(head.status.ptpls, 0);
    for n in 1..=40u8 {
        let of: Vec<_> = entries.iter().filter(|e| e.hostid == [n; 16]).collect();
        assert_eq!(of.len(), if n == 5 { 2 } else { 1 }, "host {n}");
        assert!(of.iter().all(|e| e.rkey.get() == 99 + u64::from(n) && e.rcsts == 1));
        assert_eq!(of[0].cntlid.get() == 0xffff, n == 40);
    }
    // A short buffer gets the beginning; the short format can not name these hosts.
    assert_eq!(report(&mut hosts[0].1, 64).1.len(), 0);
    let mut sqe = Sqe::io(Io::ReservationReport, Cid(0), Nsid(1));
    sqe.cdw10 = 15.into();
    sqe.sgl = Sgl::transport(64);
    let status = hosts[0].1.run(sqe, &[], &[]).0.status().code();
    assert_eq!(status, Status::HOST_ID_INCONSISTENT_FORMAT);
    // Whoever comes back is still registered.
    let (_admin, mut io) = rig.host(40);
    assert!(io.read(0, 1).0.is_success());
}

fn notice(admin: &mut Client) -> (u64, u8, u32, u8) {
    let page = admin.log(Lid::Reservation, 64);
    let n = ReservationNotification::read_from_bytes(&page).expect("64 bytes");
    (n.count.get(), n.kind, n.nsid.get(), n.available)
}

#[test]
fn others_are_told_unless_they_do_not_care() {
    let rig = Rig::new();
    let (_admin, mut io) = rig.host(1);
    let (mut other, mut other_io) = rig.host(2);
    let (mut deaf, mut deaf_io) = rig.host(3);
    let kind = ReservationType::WriteExclusiveRegistrants;
    let mut mask = Sqe::admin(Admin::SetFeatures, Cid(0), Nsid(1));
    (mask.cdw10, mask.cdw11) = ((Fid::ReservationMask as u32).into(), 0b1110.into());
    assert_eq!(deaf.run(mask, &[], &[]).0.status(), Status::SUCCESS);
    mask.opcode = Admin::GetFeatures as u8;
    assert_eq!(deaf.run(mask, &[], &[]).0.dw0.get(), 0b1110);
    assert_eq!(other.run(mask, &[], &[]).0.dw0.get(), 0);
    mask.nsid = 9.into();
    assert_eq!(other.run(mask, &[], &[]).0.status().code(), Status::INVALID_NAMESPACE);
    for (n, io) in [(1, &mut io), (2, &mut other_io), (3, &mut deaf_io)] {
        assert_eq!(register(io, REGISTER, (0, n), 0), Status::SUCCESS);
    }
    assert_eq!(acquire(&mut io, ACQUIRE, kind, 1, 0), Status::SUCCESS);
    other.await_event(900);
    assert_eq!(release(&mut io, false, kind, 1), Status::SUCCESS);
    assert_eq!(other.finish(Cid(900), &[]).0.dw0.get(), 0x0080_0006);
    // More happens before the log is read: one event, several pages.
    assert_eq!(acquire(&mut io, ACQUIRE, kind, 1, 0), Status::SUCCESS);
    assert_eq!(release(&mut io, false, kind, 1), Status::SUCCESS);
    assert_eq!(notice(&mut other), (1, 2, 1, 1));
    other.await_event(901);
    assert_eq!(other.finish(Cid(901), &[]).0.dw0.get(), 0x0080_0006, "the rest is announced again");
    assert_eq!(notice(&mut other), (2, 2, 1, 0));
    other.await_event(902);
    assert_eq!(acquire(&mut io, PREEMPT, kind, 1, 2), Status::SUCCESS);
    assert_eq!(other.finish(Cid(902), &[]).0.dw0.get(), 0x0080_0006);
    assert_eq!(notice(&mut other), (3, 1, 1, 0), "its registration was preempted");
    assert_eq!(register(&mut other_io, REGISTER, (0, 2), 0), Status::SUCCESS);
    assert_eq!(release(&mut io, true, kind, 1), Status::SUCCESS, "clear");
    assert_eq!(notice(&mut other), (4, 3, 1, 0));
    assert_eq!(notice(&mut other), (0, 0, 0, 0));
    assert_eq!(notice(&mut deaf), (0, 0, 0, 0));
    assert_eq!(notice(&mut rig.host(9).0), (0, 0, 0, 0), "a host that was never registered");
}

/// Preempt and Abort ends what the preempted host has under way, and completes after that.
#[test]
fn preempt_and_abort() {
    let rig = Rig::new();
    rig.slow(FOR_EVER);
    let (_admin, mut io) = rig.host(1);
    let (_other_admin, mut other) = rig.host(2);
    let kind = ReservationType::WriteExclusive;
    assert_eq!(register(&mut io, REGISTER, (0, 1), 0), Status::SUCCESS);
    assert_eq!(register(&mut other, REGISTER, (0, 2), 0), Status::SUCCESS);
    assert_eq!(acquire(&mut other, ACQUIRE, kind, 2, 0), Status::SUCCESS);
    for cid in 60..64 {
        other.submit(&Sqe { cid: cid.into(), ..rw_sqe(Io::Write, 0, 1, Sgl::in_capsule(0, 512)) }, &[1; 512]);
    }
    other.submit(&Sqe { cid: 64.into(), ..read_sqe(0, 1) }, &[]);
    // One whose data is still to come.
    other.submit(&Sqe { cid: 65.into(), ..rw_sqe(Io::Write, 0, 16, Sgl::transport(8192)) }, &[]);
    let Pdu::R2t { ttag, .. } = other.recv() else { panic!("no R2T") };
    assert_eq!(
        acquire(&mut io, PREEMPT_AND_ABORT, kind, 1, 2),
        Status::SUCCESS,
        "it does not wait for the device"
    );
    let part = cryptfold_nvmf_spec::pdu::build::DataPart { cid: Cid(65), offset: 0, len: 8192, last: true };
    let bytes = other.h2c_data(part, ttag, &[1; 8192]);
    other.send(&bytes);
    let mut ended: Vec<u16> = Vec::new();
    for _ in 60..66 {
        let Pdu::Response(cqe) = other.recv() else { panic!("no response") };
        assert_eq!(cqe.status().code(), Status::ABORTED_PREEMPT);
        ended.push(cqe.cid().0);
    }
    ended.sort_unstable();
    assert_eq!(ended, (60..66).collect::<Vec<_>>());
    assert_eq!(other.write(0, &[3; 512]), Status::RESERVATION_CONFLICT);
    assert_eq!(register(&mut other, UNREGISTER, (2, 0), 0), Status::RESERVATION_CONFLICT, "not registered");
}

#[test]
fn power_loss() {
    let dir = std::env::temp_dir().join(format!("cryptfold-reservations-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let file = dir.join("ns1.json");
    let with_file = |rig: &Rig| {
        rig.target.remove_ns(NQN, 1).expect("it is there");
        let ptpl_file = Some(file.to_str().expect("UTF-8").to_owned());
        rig.target.add_ns(NQN, &NsOptions { bdev_name: "disk".into(), ptpl_file, ..Default::default() })
    };
    let uuid = {
        let rig = Rig::new();
        let (_admin, mut io) = rig.host(1);
        assert_eq!(
            register(&mut io, REGISTER, (0, 1), 3),
            Status::INVALID_FIELD,
            "there is no file to persist in"
        );
        drop((_admin, io));
        assert_eq!(with_file(&rig), Ok(1));
        let (mut admin, mut io) = rig.host(1);
        let id = admin.admin_in(Admin::Identify, 1, Cns::Namespace as u32, 4096).1;
        assert_eq!(NamespaceIdentify::read_from_bytes(&id).expect("4096 bytes").rescap, 0xff);
        let (_other_admin, mut other) = rig.host(2);
        assert_eq!(register(&mut io, REGISTER, (0, 1), 3), Status::SUCCESS);
        assert_eq!(register(&mut other, REGISTER, (0, 2), 0), Status::SUCCESS);
        let kind = ReservationType::ExclusiveAccessRegistrants;
        assert_eq!(acquire(&mut io, ACQUIRE, kind, 1, 0), Status::SUCCESS);
        rig.registry.get("disk").expect("it exists").info().uuid
        // The target ends without any goodbye of its hosts.
    };
    let rig = Rig::with_disk_uuid(uuid);
    assert_eq!(with_file(&rig), Ok(1));
    let (mut admin, mut stranger) = rig.host(3);
    assert_eq!(stranger.read(0, 1).0.code(), Status::RESERVATION_CONFLICT);
    let (head, entries) = report(&mut stranger, 64 * 8);
    assert_eq!((head.status.rtype, head.status.ptpls, entries.len()), (4, 1, 2));
    assert!(entries.iter().all(|e| e.cntlid.get() == 0xffff));
    let (_admin, mut io) = rig.host(1);
    assert!(io.read(0, 1).0.is_success());
    // Reservation Persistence off: the next start knows of nothing.
    let mut off = Sqe::admin(Admin::SetFeatures, Cid(0), Nsid(1));
    off.cdw10 = (Fid::ReservationPersistence as u32).into();
    assert_eq!(admin.run(off, &[], &[]).0.status(), Status::SUCCESS);
    off.opcode = Admin::GetFeatures as u8;
    assert_eq!(admin.run(off, &[], &[]).0.dw0.get(), 0);
    drop((admin, stranger, _admin, io, rig));
    let rig = Rig::with_disk_uuid(uuid);
    assert_eq!(with_file(&rig), Ok(1));
    let (_admin, mut stranger) = rig.host(3);
    assert!(stranger.read(0, 1).0.is_success());
    assert_eq!(report(&mut stranger, 64 * 8).1.len(), 0);
    // Another device's file, and one that is damaged.
    drop((_admin, stranger, rig));
    let rig = Rig::new();
    let why = with_file(&rig).expect_err("another device").to_string();
    assert!(why.contains("ptpl_file") && why.contains("belongs to the device"), "{why}");
    std::fs::write(&file, "{\"ptpl\": tru").expect("written");
    let ptpl_file = Some(file.to_str().expect("UTF-8").to_owned());
    let why =
        rig.target.add_ns(NQN, &NsOptions { bdev_name: "disk".into(), ptpl_file, ..Default::default() });
    assert!(why.expect_err("damaged").to_string().contains("no state of a namespace"));
    std::fs::remove_dir_all(&dir).expect("removed");
}

#[test]
fn malformed_reservation_commands() {
    let rig = Rig::new();
    let (_admin, mut io) = rig.host(1);
    let invalid = Status::INVALID_FIELD;
    assert_eq!(register(&mut io, REGISTER, (0, 1), 1), invalid, "CPTPL 01b is reserved");
    assert_eq!(register(&mut io, 5, (0, 1), 0), invalid);
    assert_eq!(register(&mut io, REGISTER, (0, 0), 0), invalid);
    assert_eq!(register(&mut io, REGISTER, (0, 1), 0), Status::SUCCESS);
    assert_eq!(command(&mut io, Io::ReservationAcquire, 7 << 8, &[1, 0]), invalid, "type 7");
    assert_eq!(command(&mut io, Io::ReservationAcquire, 1 << 8 | 1 << 3, &[1, 0]), invalid, "IEKEY");
    assert_eq!(command(&mut io, Io::ReservationAcquire, 1 << 8, &[1]), Status::DATA_SGL_LENGTH_INVALID);
    assert_eq!(command(&mut io, Io::ReservationRelease, 1 << 8 | 3, &[1]), invalid);
    let mut huge = Sqe::io(Io::ReservationReport, Cid(0), Nsid(1));
    (huge.cdw10, huge.cdw11) = (u32::MAX.into(), 1.into());
    huge.sgl = Sgl::transport(64);
    assert_eq!(io.run(huge, &[], &[]).0.status().code(), invalid);
    assert!(io.read(0, 1).0.is_success());
}

/// The file's directory goes away while hosts use it. A command whose change would have to be there after a power loss fails, and
/// nothing of it has happened; those before it count, and when the directory is back everything goes on.
#[test]
fn what_can_not_be_written_has_not_happened() {
    let base = std::env::temp_dir().join(format!("cryptfold-unwritable-{}", std::process::id()));
    let (dir, away) = (base.join("here"), base.join("away"));
    std::fs::create_dir_all(&dir).expect("a directory");
    let rig = Rig::new();
    rig.target.remove_ns(NQN, 1).expect("it is there");
    let ptpl_file = Some(dir.join("ns1").to_str().expect("UTF-8").to_owned());
    let ns = NsOptions { bdev_name: "disk".into(), ptpl_file, ..Default::default() };
    rig.target.add_ns(NQN, &ns).expect("a writable directory");
    let (mut admin, mut io) = rig.host(1);
    let (_other_admin, mut other) = rig.host(2);
    let seen = |io: &mut Client| {
        let (head, entries) = report(io, 64 * 8);
        let keys: Vec<_> = entries.iter().map(|e| (e.hostid[0], e.rkey.get(), e.rcsts)).collect();
        (head.status.ptpls, head.status.rtype, keys)
    };
    let failed = Status::INTERNAL_ERROR;
    let kind = ReservationType::WriteExclusive;
    // A host that wants no persistence is served without the file, and stays when another's wish fails.
    assert_eq!(register(&mut other, REGISTER, (0, 2), 0), Status::SUCCESS);
    std::fs::rename(&dir, &away).expect("moved");
    assert_eq!(register(&mut io, REGISTER, (0, 1), 3), failed);
    assert_eq!(seen(&mut io), (0, 0, vec![(2, 2, 0)]));
    std::fs::rename(&away, &dir).expect("moved");
    assert_eq!(register(&mut io, REGISTER, (0, 1), 3), Status::SUCCESS);
    assert_eq!(acquire(&mut io, ACQUIRE, kind, 1, 0), Status::SUCCESS);
    let before = seen(&mut io);
    assert_eq!(before, (1, 1, vec![(1, 1, 1), (2, 2, 0)]));

    std::fs::rename(&dir, &away).expect("moved");
    assert_eq!(register(&mut other, UNREGISTER, (2, 0), 0), failed);
    assert_eq!(acquire(&mut other, PREEMPT, kind, 2, 1), failed);
    assert_eq!(release(&mut io, false, kind, 1), failed);
    assert_eq!(release(&mut io, true, kind, 1), failed);
    assert_eq!(protect(&mut admin), failed);
    assert_eq!(seen(&mut io), before);
    assert_eq!(other.write(0, &[1; 512]).code(), Status::RESERVATION_CONFLICT);
    assert_eq!(io.write(0, &[1; 512]), Status::SUCCESS, "it holds the reservation, and nothing is protected");
    std::fs::rename(&away, &dir).expect("moved");
    assert_eq!(release(&mut io, false, kind, 1), Status::SUCCESS);
    assert_eq!(other.write(0, &[1; 512]), Status::SUCCESS);
    assert_eq!(protect(&mut admin), Status::SUCCESS);
    assert_eq!(io.write(0, &[1; 512]).code(), Status::NAMESPACE_WRITE_PROTECTED);
    drop((admin, io, _other_admin, other, rig));
    std::fs::remove_dir_all(&base).expect("removed");
}

/// Write protection that survives a power loss.
fn protect(admin: &mut Client) -> Status {
    let mut sqe = Sqe::admin(Admin::SetFeatures, Cid(0), Nsid(1));
    (sqe.cdw10, sqe.cdw11) = ((Fid::WriteProtection as u32).into(), 1.into());
    admin.run(sqe, &[], &[]).0.status().code()
}
