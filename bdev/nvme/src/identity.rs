//! What Identify says about a namespace as a block device, and an I/O as a command: the same for who drives a controller
//! himself and for who has the kernel pass his commands through (the `uring` device).
//!
//! Units: `lba` and `blocks` are the namespace's.

use cryptfold_bdev::{DeviceInfo, Io, Op, Status};
use cryptfold_nvmf_spec::dsm::DsmCdw11;
use cryptfold_nvmf_spec::identify::{
    DescriptorList, IdentifyController, NamespaceId, NamespaceIdentify, NvmController, nsfeat, oncs,
};
use cryptfold_nvmf_spec::opcode::Io as Opcode;
use cryptfold_nvmf_spec::sqe::RwControl;
use cryptfold_nvmf_spec::status::Status as Wire;
use cryptfold_nvmf_spec::{Nsid, Sqe};
use uuid::Uuid;
use zerocopy::little_endian::U32;

/// Text of an Identify field, without the padding.
pub fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(field).trim_matches(['\0', ' ']).to_string()
}

/// What the namespaces of a controller have in common.
pub struct Common {
    /// Identify Controller.
    pub id: Box<IdentifyController>,
    /// There is a volatile write cache and it is on.
    pub write_cache: bool,
    /// Blocks are this many bytes' worth at most in one Write Zeroes; `None`: as many as the field holds.
    max_zeroes_bytes: Option<u64>,
}

/// A namespace, as commands need it.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its identifier.
    pub nsid: Nsid,
    /// Log2 of the bytes in a block.
    pub block_shift: u32,
    /// Blocks of one command that moves data.
    pub max_blocks: u32,
    /// Blocks of one Write Zeroes.
    pub max_zeroes: u32,
}

impl Common {
    /// `nvm`: what the NVM command set's Identify Controller says, of who has it.
    pub fn new(id: Box<IdentifyController>, write_cache: bool, nvm: Option<&NvmController>) -> Common {
        // Units of the smallest memory page, which is 4 KiB at least.
        let bytes = |n: u8| 4096u64.checked_shl(n.into()).unwrap_or(u64::MAX);
        let max_zeroes_bytes = nvm.filter(|n| n.wzsl != 0).map(|n| bytes(n.wzsl));
        Common { id, write_cache, max_zeroes_bytes }
    }

    /// A namespace as a device of commands that move up to `transfer_bytes` (or what the drive allows, if that is less).
    ///
    /// # Errors
    /// Its format is none that can be used, in words.
    pub fn device(
        &self,
        (name, product): (String, &'static str),
        nsid: Nsid,
        id: &NamespaceIdentify,
        ids: Option<&DescriptorList>,
        transfer_bytes: u64,
    ) -> Result<(DeviceInfo, Target), String> {
        let bytes = id
            .block_bytes()
            .filter(|b| (512..=4096).contains(b))
            .ok_or_else(|| format!("blocks of 2^{} bytes; 512 to 4096 are possible", id.format().lbads))?;
        if id.format().ms.get() != 0 {
            return Err(format!(
                "{} bytes of metadata in each block; format the namespace without",
                id.format().ms
            ));
        }
        let mut info = DeviceInfo::new(name, product, bytes, id.nsze.get());
        info.uuid = uuid_of(&self.id, nsid, id, ids);
        let features = self.id.oncs.get();
        for (bit, op) in [
            (oncs::COMPARE, Op::Compare),
            (oncs::DSM, Op::Unmap),
            (oncs::WRITE_ZEROES, Op::WriteZeroes),
            (oncs::WRITE_UNCORRECTABLE, Op::WriteUncorrectable),
        ] {
            if features & bit != 0 {
                info.ops = info.ops.with(op);
            }
        }
        info.write_cache = self.write_cache;
        info.atomic_blocks = atomic_blocks(&self.id, id);
        if id.nsfeat & nsfeat::OPTIMAL_IO != 0 {
            info.optimal_io_blocks = u32::from(id.npwg.get()) + 1;
        } else if id.noiob.get() != 0 {
            info.optimal_io_blocks = id.noiob.get().into();
        }
        // Who sends the commands goes round what a controller can not reach, so nothing more is required of buffers.
        info.buffer_align_bytes = 4;
        info.read_only = id.nsattr & 1 != 0;
        let shift = bytes.trailing_zeros();
        // MDTS 0: no limit. Its unit is the smallest memory page, which is 4 KiB at least.
        let transfer = self.id.max_transfer_bytes(0).unwrap_or(u64::MAX).min(transfer_bytes);
        let zeroes = self.max_zeroes_bytes.unwrap_or(u64::MAX) >> shift;
        let target = Target {
            nsid,
            block_shift: shift,
            max_blocks: (transfer >> shift).clamp(1, 1 << 16) as u32,
            max_zeroes: zeroes.clamp(1, 1 << 16) as u32,
        };
        Ok((info, target))
    }
}

impl Target {
    /// Blocks of one command for `op`, at most.
    #[inline]
    pub fn limit(&self, op: Op) -> u64 {
        u64::from(match op {
            Op::WriteZeroes => self.max_zeroes,
            Op::WriteUncorrectable => 1 << 16,
            Op::Unmap => u32::MAX,
            _ => self.max_blocks,
        })
    }
}

/// A completion's status as a device's.
#[inline]
pub fn status_of(wire: Wire) -> Status {
    let status = Status::new((wire.0 >> 8) as u8 & 7, wire.sc());
    if wire.dnr() { status.do_not_retry() } else { status }
}

/// The command for a part of an I/O (NVM 1.0 section 3.2) without its data, and the range if it is a Dataset Management.
#[inline]
pub fn command(target: &Target, io: &Io, lba: u64, blocks: u64) -> (Sqe, Option<(u64, u32)>) {
    let opcode = match io.op {
        Op::Read => Opcode::Read,
        Op::Write => Opcode::Write,
        Op::Compare => Opcode::Compare,
        Op::WriteZeroes => Opcode::WriteZeroes,
        Op::WriteUncorrectable => Opcode::WriteUncorrectable,
        Op::Unmap => Opcode::DatasetManagement,
        // What the device does not announce does not get here.
        _ => Opcode::Flush,
    };
    let mut sqe = Sqe::new(opcode as u8);
    sqe.nsid = U32::new(target.nsid.0);
    match io.op {
        Op::Flush => {}
        Op::Unmap => {
            sqe.cdw11 = U32::new(DsmCdw11::default().with_ad(1).0);
            return (sqe, Some((lba, blocks as u32)));
        }
        _ => {
            let fua = io.fua && matches!(io.op, Op::Write | Op::WriteZeroes);
            sqe.set_rw(lba, blocks as u32, RwControl::default().with_fua(fua.into()));
        }
    }
    (sqe, None)
}

/// The largest aligned power of two of blocks that is never torn by a power failure (NVM 1.0 section 2.1.4).
fn atomic_blocks(controller: &IdentifyController, id: &NamespaceIdentify) -> u32 {
    let own = id.nsfeat & nsfeat::ATOMICS != 0;
    let unit = if own && id.nawupf.get() != 0 { id.nawupf.get() } else { controller.awupf.get() };
    id.aligned_atomic_blocks(u32::from(unit) + 1)
}

/// A namespace's identity: its UUID, NGUID or EUI64, or one made of the serial number.
fn uuid_of(
    controller: &IdentifyController,
    nsid: Nsid,
    id: &NamespaceIdentify,
    ids: Option<&DescriptorList>,
) -> Uuid {
    let mut found = None;
    for entry in ids.into_iter().flat_map(DescriptorList::iter) {
        match entry {
            NamespaceId::Uuid(uuid) if uuid != [0; 16] => return Uuid::from_bytes(uuid),
            NamespaceId::Nguid(nguid) if nguid != [0; 16] => found = Some(nguid),
            _ => {}
        }
    }
    if let Some(nguid) = found.or((id.nguid != [0; 16]).then_some(id.nguid)) {
        return Uuid::from_bytes(nguid);
    }
    // FNV-1a, 128 bits: stable, and different for different drives.
    let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    let seed = [&controller.sn[..], &controller.mn, &id.eui64, &nsid.0.to_le_bytes()];
    for byte in seed.into_iter().flatten() {
        hash = (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    }
    uuid::Builder::from_custom_bytes(hash.to_be_bytes()).into_uuid()
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::little_endian::U16;

    #[test]
    fn atomic_units() {
        let (mut c, mut n) = (IdentifyController::default(), NamespaceIdentify::default());
        assert_eq!(atomic_blocks(&c, &n), 1);
        c.awupf = U16::new(7);
        assert_eq!(atomic_blocks(&c, &n), 8);
        // The namespace's own count, rounded down to a power of two.
        (n.nsfeat, n.nawupf) = (nsfeat::ATOMICS, U16::new(22));
        assert_eq!(atomic_blocks(&c, &n), 16);
        // A boundary every 12 blocks tears every aligned 8; an offset of 2 every aligned 4.
        n.nabspf = U16::new(11);
        assert_eq!(atomic_blocks(&c, &n), 4);
        n.nabo = U16::new(2);
        assert_eq!(atomic_blocks(&c, &n), 2);
    }

    #[test]
    fn identities() {
        let (mut c, mut n) = (IdentifyController::default(), NamespaceIdentify::default());
        c.sn = *b"S1                  ";
        let plain = uuid_of(&c, Nsid(1), &n, None);
        assert_eq!(plain, uuid_of(&c, Nsid(1), &n, None));
        assert_ne!(plain, uuid_of(&c, Nsid(2), &n, None));
        n.nguid = [7; 16];
        assert_eq!(uuid_of(&c, Nsid(1), &n, None), Uuid::from_bytes([7; 16]));
        let list = DescriptorList::new(&[NamespaceId::Nguid([8; 16]), NamespaceId::Uuid([9; 16])]);
        assert_eq!(uuid_of(&c, Nsid(1), &n, Some(&list)), Uuid::from_bytes([9; 16]));
    }
}
