//! The host that behaves: one write and one read after the other on a namespace that nobody else may touch, with both
//! digests, compared with what has to be there.

use std::net::SocketAddr;

use cryptfold_bdev_sim::Rng;
use cryptfold_nvmf_spec::fabrics::PropertyCommand;
use cryptfold_nvmf_spec::opcode::Io;
use cryptfold_nvmf_spec::pdu::build::DataPart;
use cryptfold_nvmf_spec::property::Property;
use cryptfold_nvmf_spec::sqe::RwControl;
use cryptfold_nvmf_spec::{Cid, Cntlid, Nsid, Sgl, Sqe};

use super::commands::{self, Geometry, Identity};
use super::host::{Host, PATIENCE, Pdu};

/// Blocks of a command at most.
const LONGEST: u64 = 24;

/// What has to be on the namespace. It outlives connections.
pub struct Model {
    geometry: Geometry,
    disk: Vec<u8>,
    rng: Rng,
}

impl Model {
    /// Of a namespace that was never written.
    pub fn new(geometry: Geometry, seed: u64) -> Model {
        let disk = vec![0; (geometry.blocks * u64::from(geometry.block_bytes)) as usize];
        Model { geometry, disk, rng: Rng::new(seed) }
    }

    fn place(&mut self) -> (u64, u32) {
        let blocks = self.rng.range(1, LONGEST);
        (self.rng.below(self.geometry.blocks - blocks), blocks as u32)
    }

    fn bytes(&self, lba: u64, blocks: u32) -> std::ops::Range<usize> {
        let block = u64::from(self.geometry.block_bytes);
        (lba * block) as usize..((lba + u64::from(blocks)) * block) as usize
    }
}

/// A connected host with one I/O queue.
pub struct Good {
    _admin: Host,
    io: Host,
    cid: u16,
}

impl Good {
    /// Connects and enables a controller.
    ///
    /// # Errors
    /// What did not work.
    pub fn connect(addr: SocketAddr, subnqn: &str) -> Result<Good, String> {
        let who = Identity { nqn: "nqn.2024-01.io.cryptfold:good".into(), id: [200; 16] };
        let open = |qid, cntlid| -> Result<(Host, Cntlid), String> {
            let mut host = Host::dial(addr).map_err(|e| format!("{e:?}"))?;
            host.greet(true, true, 0).map_err(|e| format!("{e:?}"))?;
            let connect = commands::connect(subnqn, &who, qid, 32, cntlid).ok_or("a name that is none")?;
            let (dw0, _) = run(&mut host, connect.sqe, &connect.capsule, &[])?;
            Ok((host, Cntlid(dw0 as u16)))
        };
        let (mut admin, cntlid) = open(0, Cntlid::DYNAMIC)?;
        run(&mut admin, Sqe::from_view(&PropertyCommand::set(Cid(0), Property::Cc, 0x0046_0001)), &[], &[])?;
        let (io, _) = open(1, cntlid)?;
        Ok(Good { _admin: admin, io, cid: 0 })
    }

    fn rw(&mut self, op: Io, lba: u64, blocks: u32, data: &[u8], bytes: usize) -> Result<Vec<u8>, String> {
        self.cid = self.cid.wrapping_add(1);
        let mut sqe = Sqe::io(op, Cid(self.cid), Nsid(1));
        sqe.set_rw(lba, blocks, RwControl(0));
        sqe.sgl = Sgl::transport(bytes as u32);
        let (_, read) =
            run(&mut self.io, sqe, &[], data).map_err(|e| format!("{op:?} {lba}+{blocks}: {e}"))?;
        Ok(read)
    }

    /// One write, and one read elsewhere.
    ///
    /// # Errors
    /// Whatever is wrong.
    pub fn round(&mut self, model: &mut Model) -> Result<(), String> {
        let (lba, blocks) = model.place();
        let range = model.bytes(lba, blocks);
        // Some of it as the fuzzer writes it: chunks are shared between volumes.
        let mut data = vec![model.rng.below(7) as u8; range.len()];
        if model.rng.one_in(2) {
            model.rng.fill(&mut data);
        }
        self.rw(Io::Write, lba, blocks, &data, data.len())?;
        model.disk[range].copy_from_slice(&data);
        let (lba, blocks) = model.place();
        self.compare(model, lba, blocks)
    }

    fn compare(&mut self, model: &Model, lba: u64, blocks: u32) -> Result<(), String> {
        let range = model.bytes(lba, blocks);
        let read = self.rw(Io::Read, lba, blocks, &[], range.len())?;
        if read == model.disk[range] { Ok(()) } else { Err(format!("wrong data in {lba}+{blocks}")) }
    }

    /// All of the namespace.
    ///
    /// # Errors
    /// The first difference.
    pub fn all(&mut self, model: &Model) -> Result<(), String> {
        let step = 65_536 / model.geometry.block_bytes;
        (0..model.geometry.blocks).step_by(step as usize).try_for_each(|lba| {
            let left = model.geometry.blocks - lba;
            self.compare(model, lba, (u64::from(step).min(left)) as u32)
        })
    }
}

/// A command from start to end: dword 0 of its completion, and what was read.
fn run(host: &mut Host, sqe: Sqe, capsule: &[u8], data: &[u8]) -> Result<(u32, Vec<u8>), String> {
    let bytes = host.capsule(&sqe, capsule);
    host.send(&bytes).map_err(|e| format!("{e:?}"))?;
    let mut read = Vec::new();
    loop {
        match host.recv(PATIENCE).map_err(|e| format!("{e:?}"))? {
            Pdu::R2t { cid, ttag, offset, len } => {
                let part = DataPart { cid, offset, len, last: true };
                let piece =
                    data.get(offset as usize..(offset + len) as usize).ok_or("an R2T beyond the data")?;
                let pdu = host.h2c_data(part, ttag, piece);
                host.send(&pdu).map_err(|e| format!("{e:?}"))?;
            }
            Pdu::Data { bytes, success, .. } => {
                read.extend(bytes);
                if success {
                    return Ok((0, read));
                }
            }
            Pdu::Response(cqe) if cqe.status().is_success() => return Ok((cqe.dw0.get(), read)),
            Pdu::Response(cqe) => return Err(cqe.status().to_string()),
            Pdu::IcResp => return Err("a second ICResp".into()),
        }
    }
}
