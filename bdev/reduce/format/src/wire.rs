//! Strict little-endian reading and writing of variable-length structures.

use thiserror::Error;

/// Why bytes are not the structure that they should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum WireError {
    /// The bytes end too early.
    #[error("truncated: {need} more bytes wanted, {have} left")]
    Truncated {
        /// Bytes wanted.
        need: usize,
        /// Bytes left.
        have: usize,
    },
    /// Bytes are left over.
    #[error("{left} bytes too many")]
    Trailing {
        /// Bytes left.
        left: usize,
    },
    /// A field out of range.
    #[error("{field} out of range: {value}")]
    Range {
        /// Field.
        field: &'static str,
        /// Value.
        value: u64,
    },
    /// A record or field of a kind that this version must understand and does not.
    #[error("unknown {what} {kind}")]
    Unknown {
        /// Record or field.
        what: &'static str,
        /// Its number.
        kind: u16,
    },
    /// A field is missing.
    #[error("{field} is missing")]
    Missing {
        /// Field.
        field: &'static str,
    },
}

pub(crate) fn range(field: &'static str, value: impl Into<u64>) -> WireError {
    WireError::Range { field, value: value.into() }
}

/// Reads from the front of a slice.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        match self.0.split_at_checked(len) {
            Some((taken, rest)) => {
                self.0 = rest;
                Ok(taken)
            }
            None => Err(WireError::Truncated { need: len, have: self.0.len() }),
        }
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// LEB128, at most 64 bits, shortest form only.
    pub fn varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 || shift > 0 && byte == 0 {
                return Err(range("varint", byte));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(range("varint", value))
    }

    pub fn end(&self) -> Result<(), WireError> {
        if self.0.is_empty() { Ok(()) } else { Err(WireError::Trailing { left: self.0.len() }) }
    }
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Small magnitudes of either sign to small numbers.
pub(crate) fn zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63) as u64
}

pub(crate) fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}
