//! A host that behaves, beside those that do not: it writes and reads a namespace of its own all the time and knows what
//! has to be there. Whatever a test does to the target, this host sees no error and no wrong byte.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_nvmf_spec::{Cntlid, Status};
use cryptfold_nvmf_target::{NsOptions, SubsystemOptions};

use super::{Client, Rig, pattern, wait};

pub const WITNESS_NQN: &str = "nqn.2024-01.io.cryptfold:witness";
const BLOCKS: u64 = 2048;
/// Blocks of one command at most: more than fits a capsule.
const LONGEST: u64 = 96;

/// Works until dropped; dropping it fails the test if it saw anything wrong, or nothing at all.
pub struct Witness {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// Gives the rig a second subsystem behind the same port, with a RAM disk of its own.
pub fn prepare(rig: &Rig) {
    let disk = MallocOptions {
        name: "witness".into(),
        num_blocks: BLOCKS,
        block_size_bytes: 512,
        uuid: None,
        optimal_io_boundary: 0,
    };
    cryptfold_bdev_malloc::create(&rig.registry, disk).expect("a RAM disk");
    let subsystem = SubsystemOptions { allow_any_host: true, ..SubsystemOptions::new(WITNESS_NQN) };
    rig.target.create_subsystem(subsystem).expect("subsystem");
    let ns = NsOptions { bdev_name: "witness".into(), ..Default::default() };
    assert_eq!(rig.target.add_ns(WITNESS_NQN, &ns), Ok(1));
    rig.target.add_listener(WITNESS_NQN, &rig.listen).expect("the port is the target's");
}

impl Witness {
    /// Beside the hosts of this rig.
    pub fn beside(rig: &Rig) -> Witness {
        prepare(rig);
        Witness::at(rig.addr)
    }

    /// Behind this address.
    pub fn at(addr: SocketAddr) -> Witness {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = std::thread::spawn({
            let (stop, rounds) = (stop.clone(), rounds.clone());
            move || {
                let mut model = Model::connect(addr);
                while !stop.load(Ordering::Relaxed) {
                    model.round();
                    rounds.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_micros(500));
                }
                model.all();
            }
        });
        Witness { stop, rounds, thread: Some(thread) }
    }

    /// Writes and reads so far, each verified.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        // It may have just begun.
        if !std::thread::panicking() {
            wait(|| self.rounds() > 0 || self.thread.as_ref().is_none_or(|t| t.is_finished()));
        }
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(|t| t.join());
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the host that behaves saw an error");
            assert!(self.rounds() > 0, "the host that behaves did nothing");
        }
    }
}

/// A host and what has to be on its disk.
pub struct Model {
    _admin: Client,
    io: Client,
    disk: Vec<u8>,
    seed: u64,
}

impl Model {
    /// A host with both digests.
    pub fn connect(addr: SocketAddr) -> Model {
        let open = |qid, cntlid| {
            let mut c = Client::open(addr, true, true);
            c.hostnqn = "nqn.2024-01.io.cryptfold:good-host".into();
            let cqe = c.connect(WITNESS_NQN, qid, 32, cntlid);
            assert_eq!(cqe.status(), Status::SUCCESS);
            c.cntlid = Cntlid(cqe.dw0.get() as u16);
            c
        };
        let mut admin = open(0, Cntlid::DYNAMIC);
        admin.enable();
        let io = open(1, admin.cntlid);
        Model { _admin: admin, io, disk: vec![0; BLOCKS as usize * 512], seed: 1 }
    }

    /// Takes the disk as it is.
    pub fn forget(&mut self) {
        for lba in (0..BLOCKS).step_by(128) {
            let (status, data) = self.io.read(lba, 128);
            assert_eq!(status, Status::SUCCESS);
            self.disk[lba as usize * 512..][..data.len()].copy_from_slice(&data);
        }
    }

    fn place(&mut self) -> (u64, u32) {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let blocks = 1 + (self.seed >> 33) % LONGEST;
        ((self.seed >> 45) % (BLOCKS - blocks), blocks as u32)
    }

    fn read(&mut self, (lba, blocks): (u64, u32)) {
        let (status, data) = self.io.read(lba, blocks);
        assert_eq!(status, Status::SUCCESS, "a read of a host that behaves");
        let from = lba as usize * 512;
        assert!(data == self.disk[from..from + data.len()], "wrong data at {lba}+{blocks}");
    }

    /// One write and one read elsewhere.
    pub fn round(&mut self) {
        let (lba, blocks) = self.place();
        let data = pattern(lba, blocks, self.seed as u8);
        assert_eq!(self.io.write(lba, &data), Status::SUCCESS, "a write of a host that behaves");
        self.disk[lba as usize * 512..][..data.len()].copy_from_slice(&data);
        let place = self.place();
        self.read(place);
    }

    /// Reads the whole disk.
    pub fn all(&mut self) {
        for lba in (0..BLOCKS).step_by(128) {
            self.read((lba, 128));
        }
    }
}
