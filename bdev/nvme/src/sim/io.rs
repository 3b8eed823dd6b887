//! I/O commands of the simulated controller (NVM 1.0 section 3.2) and the way to the host's memory (NVMe Base 2.0 sections
//! 4.1.1 and 4.1.2).

use std::collections::BTreeMap;

use cryptfold_bdev::{Io, Op};
use cryptfold_nvmf_spec::opcode::Io as Opcode;
use cryptfold_nvmf_spec::sgl::{ID_DATA_BLOCK, ID_LAST_SEGMENT, ID_SEGMENT};
use cryptfold_nvmf_spec::sqe::Psdt;
use cryptfold_nvmf_spec::status::Sct;
use cryptfold_nvmf_spec::{Sgl, Sqe, Status, dsm};
use cryptfold_reactor::Buf;
use zerocopy::{FromZeros, IntoBytes};

use super::device::{Job, Open, SimController};
use crate::dma::Seen;

const PAGE: u64 = 4096;

impl SimController {
    /// The parts of the host's memory that a command's `len` bytes lie in.
    fn pieces(&self, sqe: &Sqe, len: u64) -> Result<Vec<(u64, usize)>, Status> {
        let memory = self.memory();
        match sqe.psdt() {
            Psdt::Prp => prps(&memory, sqe.sgl.as_prps(), len),
            Psdt::Sgl if self.state().options.sgl => sgls(&memory, &sqe.sgl, len),
            _ => Err(Status::INVALID_FIELD.with_dnr()),
        }
    }

    pub(super) fn to_host(&self, sqe: &Sqe, data: &[u8]) -> Result<(), Status> {
        let memory = self.memory();
        let mut rest = data;
        for (address, len) in self.pieces(sqe, data.len() as u64)? {
            let (part, after) = rest.split_at(len.min(rest.len()));
            if !memory.write(address, part) {
                return Err(Status::DATA_TRANSFER_ERROR);
            }
            rest = after;
        }
        Ok(())
    }

    fn gather(&self, sqe: &Sqe, len: usize) -> Result<Buf, Status> {
        let memory = self.memory();
        let mut all = Buf::alloc(len);
        let mut rest = all.make_mut();
        for (address, len) in self.pieces(sqe, len as u64)? {
            let n = len.min(rest.len());
            let (part, after) = rest.split_at_mut(n);
            if !memory.read(address, part) {
                return Err(Status::DATA_TRANSFER_ERROR);
            }
            rest = after;
        }
        Ok(all)
    }

    /// Executes an I/O command.
    pub(super) async fn io(&self, job: &Job, open: &BTreeMap<u32, Open>) -> Status {
        self.try_io(job, open).await.err().unwrap_or(Status::SUCCESS)
    }

    async fn try_io(&self, job: &Job, open: &BTreeMap<u32, Open>) -> Result<(), Status> {
        let sqe = &job.sqe;
        let active = self.state().options.namespaces.iter().any(|n| n.nsid == sqe.nsid().0);
        let channel = match open.get(&sqe.nsid().0) {
            Some(open) if active => &open.channel,
            _ => return Err(Status::INVALID_NAMESPACE.with_dnr()),
        };
        let block = u64::from(channel.bdev().block_size_bytes());
        let (lba, blocks) = (sqe.slba(), u64::from(sqe.block_count()));
        let bytes = (blocks * block) as usize;
        let opcode = Opcode::from_u8(sqe.opcode).ok_or(Status::INVALID_OPCODE.with_dnr())?;
        if matches!(opcode, Opcode::Read | Opcode::Write | Opcode::Compare) {
            let mdts = self.state().options.mdts;
            if mdts != 0 && bytes as u64 > PAGE << mdts {
                self.state().offences.push(format!("a transfer of {bytes} bytes"));
                return Err(Status::INVALID_FIELD.with_dnr());
            }
        }
        let mut io = match opcode {
            Opcode::Flush => Io::new(Op::Flush, 0, 0),
            Opcode::Read => Io::new(Op::Read, lba, blocks),
            Opcode::Write => Io::new(Op::Write, lba, blocks),
            Opcode::Compare => Io::new(Op::Compare, lba, blocks),
            Opcode::WriteZeroes => Io::new(Op::WriteZeroes, lba, blocks),
            Opcode::WriteUncorrectable => Io::new(Op::WriteUncorrectable, lba, blocks),
            // Reads what is there and tells nobody.
            Opcode::Verify => Io::new(Op::Read, lba, blocks),
            Opcode::DatasetManagement => {
                let data = self.gather(sqe, dsm::range_count(sqe) * 16)?;
                let ranges = dsm::ranges(sqe, &data)?;
                let [range] = ranges else { return Err(Status::INVALID_FIELD.with_dnr()) };
                let (lba, blocks) = range.within(channel.bdev().blocks())?;
                Io::new(Op::Unmap, lba, blocks.into())
            }
            _ => return Err(Status::INVALID_OPCODE.with_dnr()),
        };
        io.fua = sqe.rw().fua() == 1 && matches!(io.op, Op::Write | Op::WriteZeroes);
        if matches!(io.op, Op::Write | Op::Compare) {
            io.data = self.gather(sqe, bytes)?.into();
        }
        self.state().count(true);
        let mut io = channel.io(io).await;
        self.state().count(false);
        let status = io.status();
        let data = std::mem::take(&mut io.data);
        let read = opcode == Opcode::Read;
        io.recycle();
        if !status.is_ok() {
            let wire = Status::new(Sct::Generic, 0).0 | u16::from(status.sct()) << 8 | u16::from(status.sc());
            let wire = Status(wire);
            return Err(if status.dnr() { wire.with_dnr() } else { wire });
        }
        // A controller that was reset meanwhile must not touch memory.
        if read && self.state().epoch == job.epoch {
            self.to_host(sqe, &data.to_contiguous())?;
        }
        Ok(())
    }
}

/// PRP entries (NVMe Base 2.0 section 4.1.1).
fn prps(memory: &Seen, [first, second]: [u64; 2], len: u64) -> Result<Vec<(u64, usize)>, Status> {
    if !first.is_multiple_of(4) {
        return Err(Status::PRP_OFFSET_INVALID.with_dnr());
    }
    let n = (PAGE - first % PAGE).min(len);
    let mut pieces = vec![(first, n as usize)];
    let mut left = len - n;
    if left > 0 && left <= PAGE {
        page_aligned(second)?;
        pieces.push((second, left as usize));
        return Ok(pieces);
    }
    let mut list = second;
    if left > 0 && !list.is_multiple_of(8) {
        return Err(Status::PRP_OFFSET_INVALID.with_dnr());
    }
    while left > 0 {
        let last_of_page = list % PAGE == PAGE - 8;
        let mut entry = [0; 8];
        if !memory.read(list, &mut entry) {
            return Err(Status::DATA_TRANSFER_ERROR);
        }
        let entry = u64::from_le_bytes(entry);
        page_aligned(entry)?;
        if last_of_page && left > PAGE {
            list = entry;
            continue;
        }
        let n = PAGE.min(left);
        pieces.push((entry, n as usize));
        left -= n;
        list += 8;
    }
    Ok(pieces)
}

fn page_aligned(entry: u64) -> Result<(), Status> {
    if entry.is_multiple_of(PAGE) { Ok(()) } else { Err(Status::PRP_OFFSET_INVALID.with_dnr()) }
}

/// A data block, or one segment of them.
fn sgls(memory: &Seen, sgl: &Sgl, len: u64) -> Result<Vec<(u64, usize)>, Status> {
    let descriptors = match sgl.id {
        ID_DATA_BLOCK => vec![*sgl],
        ID_LAST_SEGMENT => {
            let bytes = sgl.length.get();
            if bytes == 0 || !bytes.is_multiple_of(16) || bytes > PAGE as u32 {
                return Err(Status::INVALID_SGL_SEGMENT.with_dnr());
            }
            let mut all = vec![Sgl::new_zeroed(); bytes as usize / 16];
            if !memory.read(sgl.address.get(), all.as_mut_slice().as_mut_bytes()) {
                return Err(Status::DATA_TRANSFER_ERROR);
            }
            all
        }
        ID_SEGMENT => return Err(Status::INVALID_SGL_SEGMENT.with_dnr()),
        _ => return Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.with_dnr()),
    };
    if descriptors.iter().any(|d| d.id != ID_DATA_BLOCK) {
        return Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.with_dnr());
    }
    let pieces: Vec<_> = descriptors.iter().map(|d| (d.address.get(), d.length.get() as usize)).collect();
    let total: u64 = pieces.iter().map(|(_, n)| *n as u64).sum();
    if total < len {
        return Err(Status::DATA_SGL_LENGTH_INVALID.with_dnr());
    }
    Ok(pieces)
}
