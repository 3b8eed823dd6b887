//! The SGL of a command: which way its data goes, how, and how much. No I/O.

use cryptfold_nvmf_spec::opcode::Direction;
use cryptfold_nvmf_spec::sgl::SglKind;
use cryptfold_nvmf_spec::sqe::Psdt;
use cryptfold_nvmf_spec::{Sqe, Status};

/// How a command's data moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// Not at all.
    None,
    /// It came in the capsule: where in the capsule's data, and how much. Bytes.
    Capsule {
        /// Bytes in front of it.
        offset: u32,
        /// Bytes of it.
        len: u32,
    },
    /// The host sends it when it is asked to (R2T). Bytes.
    FromHost(u32),
    /// The host takes up to so many bytes (C2HData).
    ToHost(u32),
}

/// What a queue takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferLimits {
    /// Largest transfer of a command, bytes (MDTS).
    pub max_io_bytes: u32,
}

/// Decodes the SGL for data that flows in `direction`. `capsule_bytes`: data in this command's capsule.
///
/// # Errors
/// The status to complete the command with.
pub fn decode(
    sqe: &Sqe,
    direction: Direction,
    capsule_bytes: u32,
    limits: TransferLimits,
) -> Result<Transfer, Status> {
    if direction == Direction::None {
        return Ok(Transfer::None);
    }
    // Fabrics has no PRPs (NVMe Base 2.0 section 3.3.3.1, PSDT).
    if sqe.psdt() != Psdt::Sgl {
        return Err(Status::INVALID_FIELD.with_dnr());
    }
    let from_host = direction == Direction::HostToController;
    let transfer = match sqe.sgl.kind().map_err(|e| e.status().with_dnr())? {
        SglKind::InCapsule { offset, len } if from_host => {
            let offset = u32::try_from(offset).ok().filter(|o| *o <= capsule_bytes);
            let offset = offset.ok_or(Status::SGL_OFFSET_INVALID.with_dnr())?;
            if len > capsule_bytes - offset {
                return Err(Status::DATA_SGL_LENGTH_INVALID.with_dnr());
            }
            (Transfer::Capsule { offset, len }, len)
        }
        SglKind::Transport { len } if from_host => (Transfer::FromHost(len), len),
        SglKind::Transport { len } => (Transfer::ToHost(len), len),
        SglKind::InCapsule { .. } | SglKind::DataBlock { .. } => {
            return Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.with_dnr());
        }
    };
    if transfer.1 > limits.max_io_bytes {
        return Err(Status::INVALID_FIELD.with_dnr());
    }
    Ok(transfer.0)
}

impl Transfer {
    /// Bytes that the SGL describes.
    pub const fn bytes(self) -> u32 {
        match self {
            Transfer::None => 0,
            Transfer::Capsule { len, .. } => len,
            Transfer::FromHost(n) | Transfer::ToHost(n) => n,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cryptfold_nvmf_spec::opcode::Io;
    use cryptfold_nvmf_spec::{Cid, Nsid, Sgl};
    use zerocopy::FromBytes;

    const L: TransferLimits = TransferLimits { max_io_bytes: 131_072 };

    fn with(sgl: Sgl) -> Sqe {
        Sqe { sgl, ..Sqe::io(Io::Write, Cid(1), Nsid(1)) }
    }

    #[test]
    fn legal_descriptors() {
        use Direction::*;
        let d = |sgl, dir, capsule| decode(&with(sgl), dir, capsule, L);
        let capsule = |offset, len| Ok(Transfer::Capsule { offset, len });
        assert_eq!(d(Sgl::in_capsule(0, 4096), HostToController, 4096), capsule(0, 4096));
        assert_eq!(d(Sgl::in_capsule(512, 512), HostToController, 1024), capsule(512, 512));
        assert_eq!(d(Sgl::transport(131_072), HostToController, 0), Ok(Transfer::FromHost(131_072)));
        assert_eq!(d(Sgl::transport(4096), ControllerToHost, 0), Ok(Transfer::ToHost(4096)));
        assert_eq!(d(Sgl::data_block(1, 2), None, 0), Ok(Transfer::None), "not looked at");
    }

    #[test]
    fn abuse() {
        use Direction::*;
        let d = |sgl, dir, capsule| decode(&with(sgl), dir, capsule, L).map_err(Status::code);
        let over = Err(Status::DATA_SGL_LENGTH_INVALID);
        assert_eq!(d(Sgl::in_capsule(0, 4097), HostToController, 4096), over);
        assert_eq!(d(Sgl::in_capsule(0, u32::MAX), HostToController, 4096), over);
        assert_eq!(d(Sgl::in_capsule(5, 4), HostToController, 8), over);
        assert_eq!(d(Sgl::in_capsule(9, 0), HostToController, 8), Err(Status::SGL_OFFSET_INVALID));
        assert_eq!(d(Sgl::in_capsule(u64::MAX, 4), HostToController, 8), Err(Status::SGL_OFFSET_INVALID));
        assert_eq!(d(Sgl::transport(131_073), HostToController, 0), Err(Status::INVALID_FIELD));
        assert_eq!(d(Sgl::transport(u32::MAX), ControllerToHost, 0), Err(Status::INVALID_FIELD));
        let bad_type = Err(Status::SGL_DESCRIPTOR_TYPE_INVALID);
        assert_eq!(d(Sgl::in_capsule(0, 512), ControllerToHost, 512), bad_type);
        for id in 0..=255u8 {
            if !matches!(id, 0x01 | 0x5a) {
                let mut raw = [0u8; 16];
                raw[15] = id;
                let sgl = Sgl::read_from_bytes(&raw).expect("16 bytes");
                assert_eq!(d(sgl, HostToController, 0), bad_type, "identifier {id:#x}");
            }
        }
        let mut prp = with(Sgl::transport(512));
        prp.set_psdt(Psdt::Prp);
        assert_eq!(decode(&prp, HostToController, 0, L).map_err(Status::code), Err(Status::INVALID_FIELD));
    }
}
