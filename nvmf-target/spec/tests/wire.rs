//! Whole structures: golden bytes where a test beside the code has none, and properties over arbitrary bytes,
//! which is what a peer may send.

use cryptfold_nvmf_spec::fabrics::{Connect, ConnectData, PropertyCommand};
use cryptfold_nvmf_spec::features::{HostBehavior, NumberOfQueues, Timestamp};
use cryptfold_nvmf_spec::identify::{
    CommandSetCombinations, ControllerList, ControllerType, DescriptorList, IdentifyController,
    NamespaceIdentify, NamespaceList, set_text,
};
use cryptfold_nvmf_spec::log::{DiscoveryEntry, GetLogPage};
use cryptfold_nvmf_spec::opcode::{Admin, Direction, Fabrics, Io};
use cryptfold_nvmf_spec::property::Vs;
use cryptfold_nvmf_spec::sgl::SglKind;
use cryptfold_nvmf_spec::sqe::{Fuse, Psdt, RwControl};
use cryptfold_nvmf_spec::{Cid, Cntlid, Cqe, Nqn, Nsid, Sgl, Sqe, Status, copy, dsm, nqn};
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

#[test]
fn opcode_tables() {
    for code in 0..=255 {
        assert_eq!(Admin::from_u8(code).is_some(), Admin::ALL.iter().any(|o| *o as u8 == code));
        assert_eq!(Io::from_u8(code).is_some(), Io::ALL.iter().any(|o| *o as u8 == code));
    }
    assert!(Admin::ALL.is_sorted() && Io::ALL.is_sorted() && Fabrics::ALL.is_sorted());
    // The direction bits of the opcodes agree with what the commands do.
    let direction = |o: Io| Direction::of(o as u8);
    assert_eq!(direction(Io::Write), Direction::HostToController);
    assert_eq!(direction(Io::Read), Direction::ControllerToHost);
    assert_eq!(direction(Io::WriteZeroes), Direction::None);
    assert_eq!(direction(Io::Compare), Direction::HostToController);
    assert_eq!(direction(Io::DatasetManagement), Direction::HostToController);
    assert_eq!(direction(Io::Copy), Direction::HostToController);
    assert_eq!(direction(Io::Verify), Direction::None);
    assert_eq!(direction(Io::ReservationReport), Direction::ControllerToHost);
    assert_eq!(Direction::of(Fabrics::AuthenticationReceive as u8), Direction::ControllerToHost);
    assert_eq!(Direction::of(Fabrics::Connect as u8), Direction::HostToController);
    assert_eq!(Direction::of(Fabrics::PropertyGet as u8), Direction::None);
}

#[test]
fn sgl_golden() {
    assert_eq!(Sgl::transport(0x0102_0304).as_bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 0, 0, 0, 0x5a]);
    assert_eq!(Sgl::in_capsule(0, 512).as_bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0x01]);
    assert_eq!(Sgl::data_block(0x1122, 4).as_bytes()[..3], [0x22, 0x11, 0]);
    assert_eq!(Sgl::from_prps(5, 6).as_prps(), [5, 6]);
    for id in 0..=255u8 {
        let mut sgl = Sgl::transport(9);
        sgl.id = id;
        match sgl.kind() {
            Ok(SglKind::Transport { len }) => assert_eq!((id, len), (0x5a, 9)),
            Ok(SglKind::InCapsule { .. }) => assert_eq!(id, 0x01),
            Ok(SglKind::DataBlock { .. }) => assert_eq!(id, 0x00),
            Err(e) => assert_eq!(e.status(), Status::SGL_DESCRIPTOR_TYPE_INVALID),
        }
    }
}

#[test]
fn read_golden() {
    let mut sqe = Sqe::io(Io::Read, Cid(0xabcd), Nsid(0x0102_0304));
    sqe.set_fuse(Fuse::Second);
    sqe.sgl = Sgl::transport(65536 * 512);
    sqe.set_rw(0x1122_3344_5566_7788, 65536, RwControl::default().with_fua(1));
    let b = sqe.as_bytes();
    assert_eq!(b[..8], [0x02, 0x42, 0xcd, 0xab, 4, 3, 2, 1]);
    assert_eq!(b[40..52], [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xff, 0xff, 0, 0x40]);
    assert_eq!((sqe.block_count(), sqe.fuse(), sqe.psdt()), (65536, Fuse::Second, Psdt::Sgl));
}

#[test]
fn controller_golden() {
    let subnqn = Nqn::parse("nqn.2016-06.io.spdk:cnode1").expect("legal");
    let mut id = IdentifyController::fabrics(ControllerType::Io, Cntlid(0x0102), subnqn, Vs::V1_4);
    set_text(&mut id.sn, "SN\u{e9}1");
    set_text(&mut id.fr, "longer than eight");
    id.set_capsule_data(4096);
    let b = id.as_bytes();
    assert_eq!(&b[4..24], b"SN?1                ");
    assert_eq!(&b[64..72], b"longer t");
    assert_eq!((&b[78..84], b[111]), (&[2, 1, 0, 4, 1, 0][..], 1));
    assert_eq!(b[512..514], [0x66, 0x44]);
    assert_eq!(b[536..540], [1, 0, 0x30, 0]);
    assert_eq!(&b[768..795], b"nqn.2016-06.io.spdk:cnode1\0");
    // (64 + 4096) / 16 = 260.
    assert_eq!(b[1792..1800], [4, 1, 0, 0, 1, 0, 0, 0]);
    assert_eq!(id.capsule_data_bytes(), 4096);
    assert_eq!(id.max_transfer_bytes(0), None);
    id.mdts = 5;
    assert_eq!(id.max_transfer_bytes(0), Some(128 << 10));
    (id.mdts, id.ioccsz) = (255, u32::MAX.into());
    assert_eq!(id.max_transfer_bytes(15), Some(u64::MAX));
    assert_eq!(id.capsule_data_bytes(), u32::MAX);

    let discovery = IdentifyController::fabrics(ControllerType::Discovery, Cntlid(1), subnqn, Vs::V1_4);
    assert_eq!((discovery.sqes, discovery.cntrltype, discovery.ioccsz.get()), (0, 2, 4));
}

#[test]
fn namespace_golden() {
    let mut id = NamespaceIdentify::new(0x1000, 12);
    let b = id.as_bytes();
    assert_eq!(b[..10], [0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10]);
    assert_eq!(b[128..132], [0, 0, 12, 0]);
    assert_eq!(id.block_bytes(), Some(4096));
    // Format 17 = bits 3:0 of 1 and bits 6:5 of 1.
    id.flbas = 0x21;
    id.lbaf[17].lbads = 9;
    assert_eq!(id.block_bytes(), Some(512));
    for bad in [0, 8, 32, 255] {
        id.lbaf[17].lbads = bad;
        assert_eq!(id.block_bytes(), None);
    }
    assert_eq!(CommandSetCombinations::nvm().as_bytes()[..9], [1, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn structures_begin_as_zeros() {
    assert!(HostBehavior::default().as_bytes().iter().all(|b| *b == 0));
    assert!(DiscoveryEntry::default().as_bytes().iter().all(|b| *b == 0));
    assert!(ConnectData::default().as_bytes().iter().all(|b| *b == 0));
}

fn bytes<const N: usize>() -> impl Strategy<Value = [u8; N]> {
    prop::collection::vec(any::<u8>(), N).prop_map(|v| v.try_into().expect("N bytes"))
}

proptest! {
    /// Reading every typed view of arbitrary entries neither panics nor loses a bit.
    #[test]
    fn any_sqe(raw in bytes::<64>(), data in prop::collection::vec(any::<u8>(), 0..5000), blocks: u64) {
        let sqe = Sqe::read_from_bytes(&raw).expect("64 bytes");
        prop_assert_eq!(sqe.as_bytes(), raw);
        let (fuse, psdt) = (sqe.fuse(), sqe.psdt());
        let mut copy_of = sqe;
        copy_of.set_fuse(fuse);
        copy_of.set_psdt(psdt);
        prop_assert_eq!(copy_of, sqe);
        let (slba, count, control) = (sqe.slba(), sqe.block_count(), sqe.rw());
        copy_of.set_rw(slba, count, control);
        prop_assert_eq!(copy_of, sqe);
        prop_assert_eq!(Sqe::from_view(sqe.view::<Connect>()), sqe);
        let _ = sqe.fabrics();
        let _ = sqe.view::<PropertyCommand>().property();
        let _ = sqe.view::<Connect>().check(127);
        let _ = sqe.sgl.kind();
        prop_assert_eq!(GetLogPage::from_sqe(&sqe).window(512).is_ok_and(|w| w.end > 512), false);
        if let Ok(ranges) = dsm::ranges(&sqe, &data) {
            prop_assert_eq!(ranges.len(), dsm::range_count(&sqe));
            for r in ranges {
                if let Ok((slba, n)) = r.within(blocks) {
                    prop_assert!(slba + u64::from(n) <= blocks);
                }
            }
        }
        if let Ok(ranges) = copy::ranges(&sqe, &data) {
            for r in ranges {
                if let Ok((slba, n)) = r.within(blocks) {
                    prop_assert!(slba + u64::from(n) <= blocks && n != 0);
                }
            }
        }
        if let Ok(granted) = NumberOfQueues(sqe.cdw11.get()).grant(64) {
            prop_assert!((1..=64).contains(&granted.pairs()));
        }
    }

    #[test]
    fn any_cqe(cid: u16, sqhd: u16, status in 0..0x8000u16, result: u64) {
        let cqe = Cqe::new(Cid(cid), sqhd, Status(status)).with_result(result);
        let back = Cqe::read_from_bytes(cqe.as_bytes()).expect("16 bytes");
        prop_assert_eq!((back.cid(), back.status(), back.result().get()), (Cid(cid), Status(status), result));
        prop_assert!(!back.phase());
        let text = back.status().to_string();
        prop_assert!(text.contains("SCT"));
    }

    #[test]
    fn log_requests_roundtrip(lid: u8, lsp in 0..128u8, lsi: u16, rae: bool, dwords in 1..=1u64 << 32,
                              offset: u64, by_index: bool, csi: u8) {
        let request = GetLogPage { lid, lsp, lsi, rae, len_bytes: dwords * 4, offset, by_index, csi };
        prop_assert_eq!(GetLogPage::from_sqe(&request.to_sqe(Cid(1), Nsid(2))), request);
    }

    #[test]
    fn any_name(text in "\\PC{0,240}", field in bytes::<256>()) {
        if let Ok(name) = Nqn::parse(&text) {
            let field = name.to_field();
            prop_assert_eq!(nqn::field_text(&field), Ok(text.as_str()));
        }
        if let Ok(text) = nqn::field_text(&field) {
            let _ = Nqn::parse(text);
        }
    }

    /// Names that are nearly legal reach the later checks.
    #[test]
    fn nearly_legal_names(text in "nqn\\.20[0-9]{2}-[01][0-9]\\.[a-z.-]{0,20}(:[a-z\u{e9}]{0,9})?") {
        let month: u32 = text[9..11].parse().expect("two digits");
        match Nqn::parse(&text) {
            Ok(name) => {
                prop_assert!((1..=12).contains(&month) && !text.contains(".."));
                let field = name.to_field();
            prop_assert_eq!(nqn::field_text(&field), Ok(text.as_str()));
            }
            Err(e) => prop_assert_eq!(e == nqn::NqnError::Date, !(1..=12).contains(&month)),
        }
    }

    #[test]
    fn any_list(raw in bytes::<4096>(), small: bool, entry in bytes::<1024>()) {
        let mut raw = raw;
        if small {
            // Lengths that keep a descriptor list going.
            raw.iter_mut().for_each(|b| *b &= 0x13);
        }
        let _ = DescriptorList::read_from_bytes(&raw).expect("4096 bytes").iter().count();
        let list = ControllerList::read_from_bytes(&raw).expect("4096 bytes");
        prop_assert!(list.iter().count() <= 2047);
        let list = NamespaceList::read_from_bytes(&raw).expect("4096 bytes");
        prop_assert!(list.iter().all(|n| n != Nsid::NONE));
        let id = NamespaceIdentify::read_from_bytes(&raw).expect("4096 bytes");
        prop_assert!(id.block_bytes().is_none_or(|b| b >= 512 && b.is_power_of_two()));
        let id = IdentifyController::read_from_bytes(&raw).expect("4096 bytes");
        let _ = (id.max_transfer_bytes(15), id.capsule_data_bytes());
        let entry = DiscoveryEntry::read_from_bytes(&entry).expect("1024 bytes");
        let _ = (entry.traddr(), entry.trsvcid());
        let data = ConnectData::read_from_bytes(&raw[..1024]).expect("1024 bytes");
        let _ = data.names();
        let _ = Timestamp::read_from_bytes(&raw[..8]).expect("8 bytes").ms();
    }
}
