//! Identify of a namespace whose host encrypts: what is promised is what the layers together do.

mod common;

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use common::*;
use cryptfold_bdev::{BdevError, BlockRange, Device, DeviceInfo, Op, OpSet, Queue};
use cryptfold_bdev_crypto::KeyRef;
use cryptfold_bdev_crypto::engine::XtsKey;
use cryptfold_bdev_crypto::gate::KeyGate;
use cryptfold_bdev_crypto::hostcrypt::HostcryptOptions;
use cryptfold_nvmf_spec::identify::{Cns, NamespaceIdentify, nsfeat};
use cryptfold_nvmf_spec::opcode::{Admin, Io};
use cryptfold_nvmf_spec::sqe::RwControl;
use cryptfold_nvmf_spec::{Cid, Nsid, Sgl, Sqe, Status};
use cryptfold_nvmf_target::NsOptions;
use cryptfold_reactor::memory::Buf;
use zerocopy::FromBytes;

/// A thin disk of 4,096 blocks of 512 bytes that knows what is unmapped, as a pool's volume does.
struct Sparse {
    info: DeviceInfo,
    blocks: Mutex<HashMap<u64, Vec<u8>>>,
}

struct SparseQueue(Arc<Sparse>);

impl Device for Sparse {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        Ok(Rc::new(SparseQueue(self)))
    }
}

impl Queue for SparseQueue {
    fn submit(self: Rc<Self>, mut io: Box<cryptfold_bdev::Io>) {
        let mut blocks = self.0.blocks.lock().expect("nobody panics with it");
        let range = io.lba..io.lba + io.blocks;
        match io.op {
            Op::Read => {
                let mut out = Vec::new();
                for (i, lba) in range.enumerate() {
                    match blocks.get(&lba) {
                        Some(data) => out.extend_from_slice(data),
                        None => {
                            out.resize(out.len() + 512, 0);
                            io.unmapped.push(BlockRange { start: i as u32, blocks: 1 });
                        }
                    }
                }
                io.data = Buf::from_slice(&out).into();
            }
            Op::Write => {
                let data: Vec<u8> = io.data.iter().flat_map(|b| b.as_slice().to_vec()).collect();
                for (lba, block) in range.zip(data.chunks(512)) {
                    blocks.insert(lba, block.to_vec());
                }
            }
            Op::Unmap | Op::WriteZeroes => range.for_each(|lba| drop(blocks.remove(&lba))),
            _ => {}
        }
        drop(blocks);
        io.finish(cryptfold_bdev::Status::SUCCESS);
    }
}

fn identify(admin: &mut Client, nsid: u32) -> NamespaceIdentify {
    let id = admin.admin_in(Admin::Identify, nsid, Cns::Namespace as u32, 4096).1;
    NamespaceIdentify::read_from_bytes(&id).expect("4096 bytes")
}

/// A page with content, and one that was deallocated by `opcode`: what is read of them.
fn content_and_nothing(io: &mut Client, nsid: u32, block: u32, opcode: Io) -> [Vec<u8>; 2] {
    let blocks = 4096 / block;
    let rw = |opcode, lba, sgl| {
        let mut sqe = Sqe::io(opcode, Cid(0), Nsid(nsid));
        sqe.set_rw(lba, blocks, RwControl(0));
        sqe.sgl = sgl;
        sqe
    };
    for lba in [0, blocks] {
        let write = rw(Io::Write, lba.into(), Sgl::in_capsule(0, 4096));
        assert_eq!(io.run(write, &[0x5a; 4096], &[]).0.status(), Status::SUCCESS);
    }
    let mut free = rw(opcode, blocks.into(), Sgl::transport(0));
    let mut range = vec![];
    if opcode == Io::DatasetManagement {
        // One range, to be deallocated.
        range = [[0; 4], blocks.to_le_bytes(), blocks.to_le_bytes(), [0; 4]].concat();
        free = Sqe { cdw11: 4.into(), sgl: Sgl::in_capsule(0, 16), ..Sqe::io(opcode, Cid(0), Nsid(nsid)) };
    }
    assert_eq!(io.run(free, &range, &[]).0.status(), Status::SUCCESS);
    [0, blocks].map(|lba| {
        let (cqe, data) = io.run(rw(Io::Read, lba.into(), Sgl::transport(4096)), &[], &[]);
        assert_eq!((cqe.status(), data.len()), (Status::SUCCESS, 4096));
        data
    })
}

/// Blocks of 512 bytes below, of 4096 above: units are told in the blocks of each, and deallocated blocks read as zeros to the host also
/// through a cipher under which no block of zeros is one.
#[test]
fn units_and_deallocated_blocks_under_host_encryption() {
    let rig = Rig::new();
    let info = DeviceInfo {
        ops: OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes]),
        reports_unmapped: true,
        thin: true,
        atomic_blocks: 8,
        optimal_io_blocks: 64,
        ..DeviceInfo::new("plain", "sparse", 512, 4096)
    };
    let sparse = Sparse { info, blocks: Mutex::default() };
    rig.registry.register(Arc::new(sparse)).expect("a new name");
    let key = XtsKey::new(&(0..64).collect::<Vec<u8>>()).expect("two halves");
    let host = HostcryptOptions {
        name: "host".into(),
        base_bdev_name: "plain".into(),
        key: KeyGate::fixed(Arc::new(key)),
        key_ref: KeyRef::File("/nowhere".into()),
        key_id: 1,
        sector_size_bytes: 4096,
        payload_offset_bytes: 0,
        iv_offset: 0,
        iv_large_sectors: false,
        uuid: None,
    };
    let (mut admin, mut io) = rig.host(1);
    // (device, block, blocks, atomic unit, best unit): both 0's based.
    for (nsid, name, block, blocks, atomic, best) in
        [(2, "plain", 512, 4096, 7, 63), (3, "host", 4096, 512, 0, 7)]
    {
        if nsid == 3 {
            // It takes the disk from the first one.
            rig.target.remove_ns(NQN, 2).expect("it is there");
            cryptfold_bdev_crypto::hostcrypt::create(&rig.registry, host.clone()).expect("a layer");
        }
        let ns = NsOptions { bdev_name: name.into(), nsid: Some(nsid), ..Default::default() };
        assert_eq!(rig.target.add_ns(NQN, &ns), Ok(nsid));
        let id = identify(&mut admin, nsid);
        assert_eq!((id.block_bytes(), id.nsze.get()), (Some(block), blocks), "{name}");
        let atomics = [id.nawun, id.nawupf, id.nacwu, id.nabsn, id.nabspf].map(|n| n.get());
        assert_eq!((atomics, id.nabo.get()), ([atomic; 5], 0), "{name}");
        let optimal = [id.npwg, id.npwa, id.npdg, id.npda, id.nows].map(|n| n.get());
        assert_eq!(optimal, [best; 5], "{name}");
        let told = nsfeat::ATOMICS | nsfeat::OPTIMAL_IO | nsfeat::THIN;
        assert_eq!(id.nsfeat & told, told, "{name}");
        // Zeros (001b), also after a Write Zeroes that may deallocate (bit 3).
        assert_eq!(id.dlfeat, 0b1001, "{name}");
        for opcode in [Io::DatasetManagement, Io::WriteZeroes] {
            let [content, nothing] = content_and_nothing(&mut io, nsid, block, opcode);
            assert!(content.iter().all(|b| *b == 0x5a), "{name}, {opcode:?}");
            assert!(nothing.iter().all(|b| *b == 0), "{name}, {opcode:?}");
        }
    }
    // What promises nothing: a RAM disk does not tell what is unmapped, so that a layer could not know.
    assert_eq!(identify(&mut admin, 1).dlfeat, 0);
}
