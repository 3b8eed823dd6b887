//! The less usual commands, features and logs: Verify, Copy, Write Uncorrectable, write protection, Abort, errors, health.

mod common;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::*;
use cryptfold_bdev::{BdevError, Device, DeviceInfo, Op, OpSet, Queue, Space};
use cryptfold_bdev_error::{ErrorOptions, Injection, Kind};
use cryptfold_nvmf_spec::features::Fid;
use cryptfold_nvmf_spec::identify::{Cns, IdentifyController, NamespaceIdentify, oncs};
use cryptfold_nvmf_spec::log::{CommandEffects, ErrorEntry, Health, Lid, health_warning};
use cryptfold_nvmf_spec::opcode::{Admin, Io};
use cryptfold_nvmf_spec::property::Property;
use cryptfold_nvmf_spec::sqe::AbortCdw10;
use cryptfold_nvmf_spec::{Cid, Nsid, Sgl, Sqe, Status};
use cryptfold_nvmf_target::{AnaState, ListenAddr, NsOptions, SubsystemOptions};
use zerocopy::FromBytes;

fn none(io: &mut Client, opcode: Io, lba: u64, blocks: u32) -> Status {
    io.run(rw_sqe(opcode, lba, blocks, Sgl::transport(0)), &[], &[]).0.status().code()
}

fn copy(io: &mut Client, to: u64, ranges: &[(u64, u16)]) -> Status {
    let mut data = vec![0; 32 * ranges.len()];
    for (entry, (lba, blocks)) in data.chunks_mut(32).zip(ranges) {
        entry[8..16].copy_from_slice(&lba.to_le_bytes());
        entry[16..18].copy_from_slice(&(blocks - 1).to_le_bytes());
    }
    let mut sqe = Sqe::io(Io::Copy, Cid(0), Nsid(1));
    sqe.set_slba(to);
    sqe.cdw12 = (ranges.len() as u32 - 1).into();
    sqe.sgl = Sgl::in_capsule(0, data.len() as u32);
    io.run(sqe, &data, &[]).0.status().code()
}

#[test]
fn verify_and_copy() {
    let rig = Rig::new();
    let mut admin = rig.admin();
    let mut io = rig.io(&admin, 1, false, false);
    let data = pattern(0, 256, 1);
    assert_eq!(io.write(0, &data), Status::SUCCESS);
    assert_eq!(none(&mut io, Io::Verify, 0, BLOCKS as u32), Status::SUCCESS);
    assert_eq!(none(&mut io, Io::Verify, 1, BLOCKS as u32), Status::LBA_OUT_OF_RANGE);
    // From two places to one, and over itself in both directions.
    assert_eq!(copy(&mut io, 1000, &[(3, 5), (100, 7)]), Status::SUCCESS);
    let want = [&data[3 * 512..8 * 512], &data[100 * 512..107 * 512]].concat();
    assert!(io.read(1000, 12).1 == want);
    assert_eq!(copy(&mut io, 10, &[(0, 64)]), Status::SUCCESS);
    assert!(io.read(10, 64).1 == data[..64 * 512]);
    assert_eq!(io.write(0, &data), Status::SUCCESS);
    assert_eq!(copy(&mut io, 0, &[(10, 64)]), Status::SUCCESS);
    assert!(io.read(0, 64).1 == data[10 * 512..74 * 512]);
    assert_eq!(copy(&mut io, 0, &[(BLOCKS - 1, 2)]), Status::LBA_OUT_OF_RANGE);
    assert_eq!(copy(&mut io, BLOCKS - 1, &[(0, 2)]), Status::LBA_OUT_OF_RANGE);
    let id = admin.admin_in(Admin::Identify, 1, Cns::Namespace as u32, 4096).1;
    let id = NamespaceIdentify::read_from_bytes(&id).expect("4096 bytes");
    assert_eq!((id.mssrl.get(), id.mcl.get(), id.msrc), (2048, 2048, 127));
    assert_eq!(copy(&mut io, 0, &[(0, 2048)]), Status::SUCCESS);
    assert_eq!(copy(&mut io, 0, &[(0, 2049)]), Status::COMMAND_SIZE_LIMIT_EXCEEDED);
    assert_eq!(copy(&mut io, 0, &[(0, 2048), (0, 1)]), Status::COMMAND_SIZE_LIMIT_EXCEEDED);
    assert_eq!(copy(&mut io, 0, &[(0, 1); 128]), Status::SUCCESS);
    // A RAM disk can not remember that a block is not to be read, and nothing says that it could.
    assert_eq!(none(&mut io, Io::WriteUncorrectable, 0, 1), Status::INVALID_OPCODE);
    let id = admin.admin_in(Admin::Identify, 0, Cns::Controller as u32, 4096).1;
    let id = IdentifyController::read_from_bytes(&id).expect("4096 bytes");
    let wanted = oncs::VERIFY | oncs::COPY | oncs::RESERVATIONS;
    assert_eq!(id.oncs.get() & (wanted | oncs::WRITE_UNCORRECTABLE), wanted);
    let effects = CommandEffects::read_from_bytes(&admin.log(Lid::CommandEffects, 4096)).expect("4096 bytes");
    let effect = |o: Io| effects.io[o as usize].get() & 3;
    assert_eq!([Io::Copy, Io::Verify, Io::WriteUncorrectable].map(effect), [3, 1, 0]);
}

fn protect(admin: &mut Client, opcode: Admin, state: u32) -> (Status, u32) {
    let mut sqe = Sqe::admin(opcode, Cid(0), Nsid(1));
    (sqe.cdw10, sqe.cdw11) = ((Fid::WriteProtection as u32).into(), state.into());
    let cqe = admin.run(sqe, &[], &[]).0;
    (cqe.status().code(), cqe.dw0.get())
}

#[test]
fn write_protection() {
    let dir = std::env::temp_dir().join(format!("cryptfold-protection-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let rig = Rig::new();
    let (mut admin, mut io) = rig.host(1);
    let not_changeable = (Status::FEATURE_NOT_CHANGEABLE, 0);
    let done = (Status::SUCCESS, 0);
    assert_eq!(protect(&mut admin, Admin::SetFeatures, 1), not_changeable, "it would be forgotten");
    assert_eq!(
        protect(&mut admin, Admin::SetFeatures, 3).0,
        Status::INVALID_FIELD,
        "for ever is not offered"
    );
    rig.target.remove_ns(NQN, 1).expect("it is there");
    let ptpl_file = Some(dir.join("ns1").to_str().expect("UTF-8").to_owned());
    let ns = NsOptions { bdev_name: "disk".into(), ptpl_file, ..Default::default() };
    rig.target.add_ns(NQN, &ns).expect("a free device");
    admin.feature(Admin::SetFeatures, Fid::AsyncEventConfig as u32, 1 << 8);
    admin.await_event(900);
    let (mut other, mut other_io) = rig.host(2);
    assert_eq!(protect(&mut other, Admin::SetFeatures, 1), done);
    assert_eq!(admin.finish(Cid(900), &[]).0.dw0.get(), 0x0004_0002, "an attribute has changed");
    assert_eq!(protect(&mut admin, Admin::GetFeatures, 0), (Status::SUCCESS, 1));
    for io in [&mut io, &mut other_io] {
        for opcode in [Io::WriteZeroes, Io::Flush, Io::Verify] {
            let changes = opcode == Io::WriteZeroes;
            let want = if changes { Status::NAMESPACE_WRITE_PROTECTED } else { Status::SUCCESS };
            assert_eq!(none(io, opcode, 0, 1), want, "{opcode:?}");
        }
        assert_eq!(io.write(0, &[1; 512]).code(), Status::NAMESPACE_WRITE_PROTECTED);
        assert_eq!(copy(io, 0, &[(1, 1)]), Status::NAMESPACE_WRITE_PROTECTED);
        assert!(io.read(0, 1).0.is_success());
    }
    let id = admin.admin_in(Admin::Identify, 1, Cns::Namespace as u32, 4096).1;
    assert_eq!(NamespaceIdentify::read_from_bytes(&id).expect("4096 bytes").nsattr, 1);
    // It survives; what is "until power cycle" does not, and can not be taken back before.
    rig.target.remove_ns(NQN, 1).expect("it is there");
    rig.target.add_ns(NQN, &ns).expect("a free device");
    assert_eq!(protect(&mut admin, Admin::GetFeatures, 0), (Status::SUCCESS, 1));
    assert_eq!(protect(&mut admin, Admin::SetFeatures, 0), done);
    assert_eq!(io.write(0, &[1; 512]), Status::SUCCESS);
    assert_eq!(protect(&mut admin, Admin::SetFeatures, 2), done);
    assert_eq!(io.write(0, &[1; 512]).code(), Status::NAMESPACE_WRITE_PROTECTED);
    assert_eq!(protect(&mut admin, Admin::SetFeatures, 0), not_changeable);
    rig.target.remove_ns(NQN, 1).expect("it is there");
    rig.target.add_ns(NQN, &ns).expect("a free device");
    assert_eq!(io.write(0, &[1; 512]), Status::SUCCESS);
    std::fs::remove_dir_all(&dir).expect("removed");
}

fn abort(admin: &mut Client, cid: u16) -> u32 {
    let mut sqe = Sqe::admin(Admin::Abort, Cid(0), Nsid(0));
    sqe.cdw10 = AbortCdw10(0).with_sqid(1).with_cid(cid.into()).0.into();
    let cqe = admin.run(sqe, &[], &[]).0;
    assert_eq!(cqe.status(), Status::SUCCESS);
    cqe.dw0.get()
}

/// Abort ends what a device holds, what waits for its data and what goes step by step, and says so truthfully.
#[test]
fn abort_aborts() {
    let rig = Rig::new();
    rig.slow(FOR_EVER);
    let (mut admin, mut io) = rig.host(1);
    // Its two steps are far more than one I/O of the device.
    io.submit(&Sqe { cid: 59.into(), ..rw_sqe(Io::Verify, 0, 4096, Sgl::transport(0)) }, &[]);
    io.submit(&Sqe { cid: 60.into(), ..read_sqe(0, 1) }, &[]);
    io.submit(&Sqe { cid: 61.into(), ..rw_sqe(Io::Write, 0, 1, Sgl::in_capsule(0, 512)) }, &[1; 512]);
    io.submit(&Sqe { cid: 62.into(), ..rw_sqe(Io::Write, 0, 16, Sgl::transport(8192)) }, &[]);
    let Pdu::R2t { ttag, .. } = io.recv() else { panic!("no R2T") };
    // All of them have arrived then, and nothing can have ended: the device takes an hour.
    for cid in 59..62 {
        assert_eq!(abort(&mut admin, cid), 0, "aborted");
        assert_eq!(io.finish(Cid(cid), &[]).0.status().code(), Status::ABORT_REQUESTED);
        assert_eq!(abort(&mut admin, cid), 1, "it is gone");
    }
    assert_eq!(abort(&mut admin, 62), 0);
    let part = cryptfold_nvmf_spec::pdu::build::DataPart { cid: Cid(62), offset: 0, len: 8192, last: true };
    let bytes = io.h2c_data(part, ttag, &[1; 8192]);
    io.send(&bytes);
    assert_eq!(io.finish(Cid(62), &[]).0.status().code(), Status::ABORT_REQUESTED);
}

/// A device that keeps its reads. An Abort of one of block 0 it denies; one of block 1 it promises, and completes the read as if nothing
/// had been; one of block 2 it promises and forgets. Any I/O of block 3 ends all reads that it keeps.
struct Liar(DeviceInfo);

#[derive(Default)]
struct LiarQueue(RefCell<Vec<Box<cryptfold_bdev::Io>>>);

impl Device for Liar {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        Ok(Rc::<LiarQueue>::default())
    }
}

fn done(mut io: Box<cryptfold_bdev::Io>) {
    if io.op != Op::Read {
        return io.finish(cryptfold_bdev::Status::SUCCESS);
    }
    io.data = cryptfold_reactor::memory::Buf::from_slice(&vec![0; io.blocks as usize * 512]).into();
    io.finish(cryptfold_bdev::Status::SUCCESS);
}

impl Queue for LiarQueue {
    fn submit(self: Rc<Self>, io: Box<cryptfold_bdev::Io>) {
        if io.lba < 3 {
            return self.0.borrow_mut().push(io);
        }
        self.0.borrow_mut().drain(..).for_each(done);
        done(io);
    }

    fn abort(&self, tag: u64) -> bool {
        let mut kept = self.0.borrow_mut();
        let Some(at) = kept.iter().position(|io| io.tag == tag) else { return false };
        if kept[at].lba == 1 {
            done(kept.swap_remove(at));
            return true;
        }
        kept[at].lba == 2
    }
}

/// A thin device of 64 blocks: so many bytes of it have content, so much of the space behind it is free (percent). Whatever it is asked to
/// do it has done at once.
struct Thin(DeviceInfo, u64, AtomicU64);

impl Thin {
    fn create(rig: &Rig, name: &str, ops: OpSet, allocated_bytes: u64, free_percent: u64) -> Arc<Thin> {
        let info = DeviceInfo { thin: true, ops, ..DeviceInfo::new(name, "thin", 512, 64) };
        let device = Arc::new(Thin(info, allocated_bytes, AtomicU64::new(free_percent)));
        rig.registry.register(device.clone()).expect("a new name");
        device
    }
}

struct Prompt;

impl Queue for Prompt {
    fn submit(self: Rc<Self>, io: Box<cryptfold_bdev::Io>) {
        done(io);
    }
}

impl Device for Thin {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        Ok(Rc::new(Prompt))
    }

    fn allocated_bytes(&self) -> Option<u64> {
        Some(self.1)
    }

    fn space(&self) -> Option<Space> {
        Some(Space { free_bytes: self.2.load(Ordering::Relaxed), total_bytes: 100 })
    }
}

/// NSZE, NCAP and NUSE: what is allocated of a thin device, all of any other.
#[test]
fn identify_tells_what_is_allocated() {
    let rig = Rig::new();
    let mut admin = rig.admin();
    let sizes = |admin: &mut Client, nsid| {
        let id = admin.admin_in(Admin::Identify, nsid, Cns::Namespace as u32, 4096).1;
        let id = NamespaceIdentify::read_from_bytes(&id).expect("4096 bytes");
        (id.nsze.get(), id.ncap.get(), id.nuse.get(), id.nsfeat & 1)
    };
    assert_eq!(sizes(&mut admin, 1), (BLOCKS, BLOCKS, BLOCKS, 0), "a RAM disk");
    for (nsid, bytes, blocks) in [(2, 0, 0), (3, 512 * 7 + 1, 8), (4, 1 << 40, 64)] {
        let name = format!("thin{nsid}");
        Thin::create(&rig, &name, OpSet::of(&[Op::Read]), bytes, 100);
        assert_eq!(rig.target.add_ns(NQN, &NsOptions { bdev_name: name, ..Default::default() }), Ok(nsid));
        assert_eq!(sizes(&mut admin, nsid), (64, 64, blocks, 1));
    }
}

/// A pool that runs out of space: hosts that want to know are told, also those that come, come back or ask later.
#[test]
fn too_little_space_is_told() {
    let rig = Rig::new();
    let device = Thin::create(&rig, "filling", OpSet::of(&[Op::Read]), 0, 50);
    let ns = NsOptions { bdev_name: "filling".into(), ..Default::default() };
    assert_eq!(rig.target.add_ns(NQN, &ns), Ok(2));
    let wants = |admin: &mut Client| {
        let bits = u32::from(health_warning::SPARE);
        assert_eq!(
            admin.feature(Admin::SetFeatures, Fid::AsyncEventConfig as u32, bits).status(),
            Status::SUCCESS
        );
    };
    let health =
        |admin: &mut Client| Health::read_from_bytes(&admin.log(Lid::Health, 512)).expect("512 bytes");
    // SMART (1), spare below its threshold (2), log page 2.
    let told = |admin: &mut Client, cid| {
        let (cqe, _) = admin.finish(Cid(cid), &[]);
        assert_eq!((cqe.status(), cqe.dw0.get()), (Status::SUCCESS, 0x0002_0201));
        let page = health(admin);
        assert_eq!((page.available_spare_pct, page.critical_warning), (9, health_warning::SPARE));
    };
    let mut admin = rig.admin();
    wants(&mut admin);
    admin.await_event(900);
    let page = health(&mut admin);
    assert_eq!((page.available_spare_pct, page.critical_warning), (50, 0));
    device.2.store(9, Ordering::Relaxed);
    told(&mut admin, 900);
    // Reset, and on again.
    admin.set(Property::Cc, 0);
    admin.enable();
    wants(&mut admin);
    admin.await_event(901);
    told(&mut admin, 901);
    // Another host, which asks only when the controller has long seen it.
    let (mut late, _io) = rig.host(2);
    std::thread::sleep(Duration::from_millis(2500));
    wants(&mut late);
    late.await_event(902);
    told(&mut late, 902);
}

/// What Abort says is what became of the command, not what a device promised; and it does not wait for ever to know.
#[test]
fn abort_tells_the_truth_whatever_devices_promise() {
    let rig = Rig::new();
    let info = DeviceInfo { ops: OpSet::of(&[Op::Read]), ..DeviceInfo::new("liar", "liar", 512, 64) };
    rig.registry.register(Arc::new(Liar(info))).expect("a new name");
    let ns = NsOptions { bdev_name: "liar".into(), ..Default::default() };
    assert_eq!(rig.target.add_ns(NQN, &ns), Ok(2));
    let (mut admin, mut io) = rig.host(1);
    for lba in 0..3u16 {
        io.submit(&Sqe { cid: (70 + lba).into(), nsid: 2.into(), ..read_sqe(lba.into(), 1) }, &[]);
    }
    // They have arrived when what follows them is answered.
    assert!(io.read(0, 1).0.is_success());
    assert_eq!([70, 71, 72].map(|cid| abort(&mut admin, cid)), [1; 3], "none was aborted");
    io.submit(&Sqe { cid: 73.into(), nsid: 2.into(), ..read_sqe(3, 1) }, &[]);
    for cid in [71, 70, 72, 73] {
        assert_eq!(io.finish(Cid(cid), &[]).0.status(), Status::SUCCESS);
    }
}

#[test]
fn errors_and_health() {
    let rig = Rig::new();
    rig.target.remove_ns(NQN, 1).expect("it is there");
    let options = ErrorOptions { base_name: "disk".into(), uuid: None };
    let faulty = cryptfold_bdev_error::create(&rig.registry, options).expect("a layer").name().to_owned();
    rig.target.add_ns(NQN, &NsOptions { bdev_name: faulty.clone(), ..Default::default() }).expect("added");
    let (mut admin, mut io) = rig.host(1);
    let health =
        |admin: &mut Client| Health::read_from_bytes(&admin.log(Lid::Health, 512)).expect("512 bytes");
    let before = health(&mut admin);
    assert_eq!((before.error_log_entries.get(), before.media_errors.get()), (0, 0));
    assert_eq!(
        (before.critical_warning, before.available_spare_pct, before.spare_threshold_pct),
        (0, 100, 10)
    );
    let inject = |kind| {
        let i = Injection { op: Some(Op::Read), kind, num: 1, corrupt_offset_bytes: 0, corrupt_value: 0 };
        cryptfold_bdev_error::inject(&rig.registry, &faulty, i).expect("it exists");
    };
    inject(Kind::Failure);
    let failed = io.read(77, 1).0;
    assert!(!failed.is_success());
    assert_eq!(io.read(BLOCKS, 1).0.code(), Status::LBA_OUT_OF_RANGE);
    assert_eq!(none(&mut io, Io::WriteUncorrectable, 0, 1), Status::INVALID_OPCODE);
    for lba in 0..4 {
        assert_eq!(io.write(lba, &pattern(lba, 2048, 1)[..1000 * 512 / 8]), Status::SUCCESS);
    }
    let page = admin.log(Lid::Error, 64 * 64);
    let entries = <[ErrorEntry]>::ref_from_bytes(&page).expect("whole entries");
    let shown: Vec<_> = entries
        .iter()
        .map(|e| (e.error_count.get(), e.sqid.get(), e.lba.get()))
        .take_while(|e| e.0 != 0)
        .collect();
    assert_eq!(shown, [(3, 1, 0), (2, 1, BLOCKS), (1, 1, 77)]);
    assert_eq!(Status::from_wire(entries[2].status.get()), failed);
    let after = health(&mut admin);
    assert_eq!(after.error_log_entries.get(), 3);
    assert_eq!(after.media_errors.get(), 0, "{failed:?}: no word of the medium");
    assert_eq!((after.host_writes.get(), after.data_units_written.get()), (4, 1), "4 x 64,000 bytes");
    let id = admin.admin_in(Admin::Identify, 0, Cns::Controller as u32, 4096).1;
    assert_eq!(IdentifyController::read_from_bytes(&id).expect("4096 bytes").elpe, 63);
    // Data that is not there any more, whoever finds out: a host that reads it, or one that has it verified.
    for (n, opcode) in (1..).zip([Io::Read, Io::Verify]) {
        inject(Kind::Status(cryptfold_bdev::Status::UNRECOVERED_READ));
        let status = match opcode {
            Io::Read => io.read(9, 1).0.code(),
            _ => none(&mut io, opcode, 9, 1),
        };
        assert_eq!(status, Status::UNRECOVERED_READ_ERROR, "{opcode:?}");
        assert_eq!(health(&mut admin).media_errors.get(), n, "{opcode:?}");
    }
    assert_eq!(none(&mut io, Io::Verify, 0, BLOCKS as u32), Status::SUCCESS);
    assert_eq!((health(&mut admin).media_errors.get(), health(&mut admin).error_log_entries.get()), (2, 5));
}

/// Which opcodes the Commands Supported and Effects log page calls supported: admin, I/O.
fn supported(admin: &mut Client) -> [Vec<u8>; 2] {
    let page = CommandEffects::read_from_bytes(&admin.log(Lid::CommandEffects, 4096)).expect("4096 bytes");
    let codes = |all: &[zerocopy::little_endian::U32; 256]| {
        (0..=255).filter(|o| all[usize::from(*o)].get() & 1 == 1).collect()
    };
    [codes(&page.admin), codes(&page.io)]
}

/// Every opcode is tried on both kinds of queues: those that the log page calls supported are known, all others are not.
#[test]
fn the_effects_log_tells_what_is_accepted() {
    let rig = Rig::new();
    let known = |c: &mut Client, sqe: &Sqe, opcode: u8| {
        let status = c.run(Sqe { opcode, ..*sqe }, &[], &[]).0.status().code();
        status != Status::INVALID_OPCODE
    };
    // A RAM disk knows no Write Uncorrectable; the page tells of it as soon as a namespace is there that does.
    for nsid in [1, 2] {
        if nsid == 2 {
            let ops = [Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes, Op::WriteUncorrectable];
            Thin::create(&rig, "thin", OpSet::of(&ops), 0, 100);
            assert_eq!(
                rig.target.add_ns(NQN, &NsOptions { bdev_name: "thin".into(), ..Default::default() }),
                Ok(2)
            );
        }
        let (mut admin, mut io) = rig.host(1);
        let [admin_codes, io_codes] = supported(&mut admin);
        assert_eq!(io_codes.contains(&(Io::WriteUncorrectable as u8)), nsid == 2);
        // No data: what needs some says so. A Fabrics command has its type where others have the namespace: Property Get.
        let none = Sgl::transport(0);
        for opcode in 0..=255u8 {
            let sqe = match Admin::from_u8(opcode) {
                Some(Admin::Fabrics) => Sqe { nsid: 4.into(), ..Sqe::admin(Admin::Fabrics, Cid(0), Nsid(4)) },
                _ => Sqe { sgl: none, ..Sqe::admin(Admin::Identify, Cid(0), Nsid(0)) },
            };
            let accepted = if opcode == Admin::AsyncEventRequest as u8 {
                // Accepted is what is not answered: the next command is answered first.
                admin.await_event(900);
                let (cqe, _) = admin.admin_in(Admin::Identify, 0, Cns::Controller as u32, 4096);
                cqe.status() == Status::SUCCESS
            } else {
                known(&mut admin, &sqe, opcode)
            };
            assert_eq!(accepted, admin_codes.contains(&opcode), "admin command {opcode:#04x}");
        }
        for opcode in (0..=255u8).filter(|o| *o != Io::Fabrics as u8) {
            let sqe = Sqe { sgl: none, nsid: nsid.into(), ..rw_sqe(Io::Flush, 3, 1, none) };
            assert_eq!(
                known(&mut io, &sqe, opcode),
                io_codes.contains(&opcode),
                "I/O command {opcode:#04x} of namespace {nsid}"
            );
        }
        assert!(io_codes.contains(&(Io::Fabrics as u8)));
        assert_eq!(io.disconnect().status(), Status::SUCCESS);
    }
}

/// Host Identifier (81h): what Connect said, 128 bits of it on fabrics; nobody can change it afterwards.
#[test]
fn the_host_identifier_is_that_of_connect() {
    let rig = Rig::new();
    let (mut admin, _io) = rig.host(6);
    let fid = Fid::HostIdentifier as u32;
    let get = |admin: &mut Client, select: u32, extended: u32| {
        let mut sqe = Sqe::admin(Admin::GetFeatures, Cid(0), Nsid(0));
        (sqe.cdw10, sqe.cdw11) = ((fid | select << 8).into(), extended.into());
        sqe.sgl = Sgl::transport(16);
        let (cqe, data) = admin.run(sqe, &[], &[]);
        (cqe.status().code(), data)
    };
    assert_eq!(get(&mut admin, 0, 1), (Status::SUCCESS, vec![6; 16]));
    assert_eq!(get(&mut admin, 0, 0), (Status::INVALID_FIELD, vec![]), "64 bits are for other transports");
    for extended in [0, 1] {
        let mut sqe = Sqe::admin(Admin::SetFeatures, Cid(0), Nsid(0));
        (sqe.cdw10, sqe.cdw11) = (fid.into(), extended.into());
        sqe.sgl = Sgl::in_capsule(0, 16);
        let status = admin.run(sqe, &[9; 16], &[]).0.status();
        assert_eq!((status.code(), status.dnr()), (Status::COMMAND_SEQUENCE_ERROR, true));
    }
    assert_eq!(get(&mut admin, 0, 1), (Status::SUCCESS, vec![6; 16]), "unchanged");
    // Not changeable, not saveable, not of a namespace.
    let supported = admin.feature(Admin::GetFeatures, fid | 3 << 8, 0);
    assert_eq!((supported.status(), supported.dw0.get()), (Status::SUCCESS, 0));
}

/// Two ports of one subsystem: what is inaccessible through one works through the other, for each group by itself; a
/// namespace that moves to another group follows its state.
#[test]
fn two_ports_and_groups() {
    let rig = Rig::new();
    let nqn = "nqn.2024-01.io.cryptfold:ana";
    let t = &rig.target;
    t.remove_ns(NQN, 1).expect("it is there");
    t.create_subsystem(SubsystemOptions {
        allow_any_host: true,
        ana_reporting: true,
        ..SubsystemOptions::new(nqn)
    })
    .expect("a new name");
    let ns = NsOptions { bdev_name: "disk".into(), anagrpid: Some(1), ..Default::default() };
    assert_eq!(t.add_ns(nqn, &ns), Ok(1));
    let any = ListenAddr::parse("TCP", Some("IPv4"), "127.0.0.1", "0").expect("an address");
    let ports = [(); 2].map(|()| t.add_listener(nqn, &any).expect("a free port"));
    let mut paths = ports.each_ref().map(|p| {
        let mut admin = Client::open(p.socket_addr(), false, false);
        let cqe = admin.connect(nqn, 0, 32, cryptfold_nvmf_spec::Cntlid::DYNAMIC);
        admin.enable();
        let mut io = Client::open(p.socket_addr(), false, false);
        let cntlid = cryptfold_nvmf_spec::Cntlid(cqe.dw0.get() as u16);
        assert!(io.connect(nqn, 1, 128, cntlid).status().is_success());
        admin.feature(Admin::SetFeatures, Fid::AsyncEventConfig as u32, 1 << 11);
        (admin, io)
    });
    t.set_ana_state(nqn, &ports[0], AnaState::Inaccessible, Some(1)).expect("a group");
    t.set_ana_state(nqn, &ports[1], AnaState::NonOptimized, Some(1)).expect("a group");
    let states = |paths: &mut [(Client, Client); 2]| {
        paths.each_mut().map(|(admin, io)| (admin.log(Lid::Ana, 52)[32], io.read(0, 1).0.code()))
    };
    assert_eq!(states(&mut paths), [(3, Status::ANA_INACCESSIBLE), (2, Status::SUCCESS)]);
    paths[0].0.await_event(900);
    paths[1].0.await_event(900);
    t.set_ns_ana_group(nqn, 1, 2).expect("a group");
    for (admin, _) in &mut paths {
        assert_eq!(admin.finish(Cid(900), &[]).0.dw0.get(), 0x000c_0302);
    }
    assert_eq!(states(&mut paths), [(1, Status::SUCCESS), (1, Status::SUCCESS)]);
    let id = paths[0].0.admin_in(Admin::Identify, 1, Cns::Namespace as u32, 4096).1;
    assert_eq!(NamespaceIdentify::read_from_bytes(&id).expect("4096 bytes").anagrpid.get(), 2);
    t.set_ana_state(nqn, &ports[1], AnaState::Inaccessible, None).expect("all groups");
    assert_eq!(states(&mut paths), [(1, Status::SUCCESS), (3, Status::ANA_INACCESSIBLE)]);
    assert!(t.set_ns_ana_group(nqn, 1, 33).is_err() && t.set_ns_ana_group(nqn, 2, 1).is_err());
    assert!(t.set_ns_ana_group(NQN, 1, 1).is_err(), "no ANA reporting");
}
