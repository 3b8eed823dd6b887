//! A thin RAM disk that tells its unmapped ranges, breaks on request and remembers what it was given; a way to run
//! tests on one simulated core; dm-crypt and SPDK's crypto bdev, written slowly.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use cryptfold_bdev::{
    Access, Bdev, BdevError, BlockRange, Channel, Device, DeviceInfo, Io, Op, OpSet, Queue, Registry, Status,
};
use cryptfold_bdev_crypto::engine::{EngineKind, XtsContext, XtsEngine, XtsKey};
use cryptfold_bdev_crypto::gate::{Access as KeyAccess, KeyGate};
use cryptfold_reactor::Sim;
use cryptfold_reactor::memory::{Buf, SgList};

/// What a [`Thin`] holds and was asked.
#[derive(Default)]
pub struct State {
    pub blocks: HashMap<u64, (Vec<u8>, u16)>,
    pub ops: Vec<(Op, u64, u64, bool)>,
    /// Reads return one block too few.
    pub short_reads: bool,
    pub fail: Option<Status>,
    /// Shut when the next I/O arrives.
    pub shut: Option<Arc<KeyGate>>,
}

pub struct Thin {
    info: DeviceInfo,
    pub state: Arc<Mutex<State>>,
}

impl Thin {
    pub fn create(registry: &Arc<Registry>, name: &str, block: u32, blocks: u64) -> Arc<Mutex<State>> {
        let state = Arc::new(Mutex::new(State::default()));
        let mut info = DeviceInfo::new(name, "thin", block, blocks);
        info.ops = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes, Op::Reset]);
        info.reports_unmapped = true;
        info.atomic_blocks = 4096 / block;
        registry.register(Arc::new(Thin { info, state: state.clone() })).unwrap();
        state
    }
}

impl Device for Thin {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        Ok(Rc::new(ThinQueue(self)))
    }
}

struct ThinQueue(Arc<Thin>);

impl Queue for ThinQueue {
    fn submit(self: Rc<Self>, mut io: Box<Io>) {
        let bs = self.0.info.block_size_bytes as usize;
        let mut s = self.0.state.lock().unwrap();
        s.ops.push((io.op, io.lba, io.blocks, io.fua));
        if let Some(gate) = s.shut.take() {
            gate.set(KeyAccess::Fenced);
        }
        if let Some(status) = s.fail {
            return io.finish(status);
        }
        let range = io.lba..io.lba + io.blocks;
        match io.op {
            Op::Read => {
                let mut out = Vec::new();
                for (i, lba) in range.enumerate() {
                    match s.blocks.get(&lba) {
                        Some((data, key)) => {
                            out.extend(data);
                            if io.host_key != 0 && *key == 0 {
                                io.as_sent.push(BlockRange { start: i as u32, blocks: 1 });
                            }
                        }
                        None => {
                            out.extend(vec![0; bs]);
                            io.unmapped.push(BlockRange { start: i as u32, blocks: 1 });
                        }
                    }
                }
                if s.short_reads {
                    out.truncate(out.len() - bs);
                }
                // Two pieces that are cut anywhere.
                let cut = out.len() / 3;
                io.data = [Buf::from_slice(&out[..cut]), Buf::from_slice(&out[cut..])].into_iter().collect();
            }
            Op::Write => {
                let data = bytes(&io.data);
                for (lba, b) in range.zip(data.chunks(bs)) {
                    s.blocks.insert(lba, (b.to_vec(), io.host_key));
                }
            }
            Op::Unmap | Op::WriteZeroes => range.for_each(|lba| drop(s.blocks.remove(&lba))),
            _ => {}
        }
        io.finish(Status::SUCCESS);
    }
}

pub fn bytes(list: &SgList) -> Vec<u8> {
    list.iter().flat_map(|b| b.as_slice().to_vec()).collect()
}

pub fn sim<F: Future<Output = ()> + 'static>(f: impl FnOnce(Arc<Registry>) -> F + 'static) {
    Sim::new(1).run(move || f(Registry::new()));
}

pub fn malloc(registry: &Arc<Registry>, name: &str, block: u32, blocks: u64) -> Arc<Bdev> {
    let options = cryptfold_bdev_malloc::MallocOptions {
        name: name.into(),
        num_blocks: blocks,
        block_size_bytes: block,
        uuid: None,
        optimal_io_boundary: 0,
    };
    cryptfold_bdev_malloc::create(registry, options).unwrap()
}

/// Opens for reading (beside a claim) or writing.
pub fn open(registry: &Arc<Registry>, name: &str, access: Access) -> Channel {
    registry.open(name, access, |_| ()).unwrap().channel().unwrap()
}

pub fn key(bytes: usize) -> Arc<XtsKey> {
    Arc::new(XtsKey::new(&(0..bytes as u8).collect::<Vec<_>>()).unwrap())
}

/// SPDK's crypto bdev: block `lba` under the tweak `lba`.
pub fn spdk_encrypt(key: &XtsKey, block: usize, lba: u64, plain: &[u8]) -> Vec<u8> {
    let x = XtsContext::with_engine(EngineKind::Portable, key).unwrap();
    let mut out = plain.to_vec();
    for (i, b) in out.chunks_mut(block).enumerate() {
        x.encrypt_in_place(u128::from(lba) + i as u128, b);
    }
    out
}

/// dm-crypt's `plain64`: what the host's `cipher` text of the payload from byte `at` on says.
pub fn dm_decrypt(key: &XtsKey, unit: usize, iv_offset: u64, at: u64, cipher: &[u8]) -> Vec<u8> {
    let x = XtsContext::with_engine(EngineKind::Portable, key).unwrap();
    let mut out = cipher.to_vec();
    for (i, u) in out.chunks_mut(unit).enumerate() {
        let sector = iv_offset + (at + (i * unit) as u64) / 512;
        x.decrypt_in_place(u128::from(sector), u);
    }
    out
}

/// Numbers for the tests' choices (xorshift).
pub struct Rng(pub u64);

impl Rng {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.below(256) as u8).collect()
    }
    /// `data` in up to three buffers cut anywhere; sometimes with a second holder, which is kept alive.
    pub fn pieces(&mut self, data: &[u8]) -> (SgList, Option<SgList>) {
        let (a, b) = (self.below(data.len() as u64 + 1) as usize, self.below(data.len() as u64 + 1) as usize);
        let (a, b) = (a.min(b), a.max(b));
        let list: SgList = [&data[..a], &data[a..b], &data[b..]].map(Buf::from_slice).into_iter().collect();
        let held = (self.below(2) == 0).then(|| list.clone());
        (list, held)
    }
}
