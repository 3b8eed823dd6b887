//! Fragments: one or several neighbouring chunks, compressed together (or raw), sealed.
//!
//! Header, 16 bytes, followed by nonce, body and tag as in [`crate::sealed`]:
//!
//! ```text
//! 0    first chunk: container u48 << 16 | slot u16
//! 8    body bytes u24, flags u8 (zero)
//! 12   chunks u8 (1 ..= 64), codec u8, reserved u16
//! ```
//!
//! A fragment holds the chunks of slots `slot .. slot + chunks`. Its identity within the domain is its first chunk's
//! address; container and domain tell nothing about user data and let a scan rebuild the container tables.
//! A header of zeros is padding up to the next device block.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::BLOCK_BYTES;
use crate::codec::{Codec, Decompressor};
use crate::ids::{ChunkAddr, SLOTS};
use crate::sealed::{OpenError, SealError, SegmentKey};

/// Bytes of a fragment's header.
pub const FRAGMENT_HEADER_BYTES: usize = 16;
/// Chunks of a fragment, at most.
pub const MAX_CHUNKS: usize = 64;
/// Bytes of a chunk.
pub const CHUNK_BYTES: usize = BLOCK_BYTES;
/// Bytes of a fragment on the device, at most (header, stored nonce, raw body, tag).
pub const MAX_FRAGMENT_BYTES: usize = FRAGMENT_HEADER_BYTES + 12 + MAX_CHUNKS * CHUNK_BYTES + 16;

/// What a fragment's header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FragmentHeader {
    /// Address of the first chunk.
    pub first: ChunkAddr,
    /// Chunks, 1 ..= [`MAX_CHUNKS`], all in the same container.
    pub chunks: u8,
    /// How the body is encoded.
    pub codec: Codec,
    /// Bytes of the body, at most `chunks * CHUNK_BYTES`; equal if raw.
    pub body_bytes: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    first: U64,
    body_bytes: [u8; 3],
    flags: u8,
    chunks: u8,
    codec: u8,
    reserved: U16,
}

const _: () = assert!(size_of::<Raw>() == FRAGMENT_HEADER_BYTES);

impl FragmentHeader {
    /// Bytes of the plaintext.
    pub fn plain_bytes(&self) -> usize {
        usize::from(self.chunks) * CHUNK_BYTES
    }

    /// Bytes of the whole fragment in a segment of this key.
    pub fn unit_bytes(&self, key: &SegmentKey) -> usize {
        key.unit_bytes(FRAGMENT_HEADER_BYTES, self.body_bytes as usize)
    }

    /// Parses a header; the plain, unauthenticated first bytes of a fragment.
    pub fn parse(bytes: &[u8]) -> Result<Self, OpenError> {
        let Ok((raw, _)) = Raw::ref_from_prefix(bytes) else {
            return Err(OpenError::Truncated { have: bytes.len(), need: FRAGMENT_HEADER_BYTES });
        };
        let bad = |field, value| Err(OpenError::Malformed { field, value });
        let Some(first) = ChunkAddr::from_raw(raw.first.get()) else {
            return bad("first chunk", raw.first.get());
        };
        let Some(codec) = Codec::from_raw(raw.codec) else { return bad("codec", raw.codec.into()) };
        if raw.flags != 0 {
            return bad("flags", raw.flags.into());
        }
        if raw.reserved != 0 {
            return bad("reserved", raw.reserved.get().into());
        }
        let [low, middle, high] = raw.body_bytes;
        let body_bytes = u32::from_le_bytes([low, middle, high, 0]);
        let header = Self { first, chunks: raw.chunks, codec, body_bytes };
        match header.check() {
            Ok(()) => Ok(header),
            Err((field, value)) => bad(field, value),
        }
    }

    fn check(&self) -> Result<(), (&'static str, u64)> {
        let chunks = usize::from(self.chunks);
        if !(1..=MAX_CHUNKS).contains(&chunks) || usize::from(self.first.slot()) + chunks > SLOTS {
            return Err(("chunks", chunks as u64));
        }
        let (body, plain) = (self.body_bytes as usize, self.plain_bytes());
        if body == 0 || body > plain || (self.codec == Codec::Raw) != (body == plain) {
            return Err(("body bytes", body as u64));
        }
        Ok(())
    }

    fn raw(&self) -> Raw {
        let [low, middle, high, _] = self.body_bytes.to_le_bytes();
        Raw {
            first: self.first.raw().into(),
            body_bytes: [low, middle, high],
            flags: 0,
            chunks: self.chunks,
            codec: self.codec as u8,
            reserved: 0.into(),
        }
    }

    fn prepare(&self, key: &SegmentKey, out: &mut [u8]) -> Result<(), SealError> {
        self.check().map_err(|(field, value)| SealError::Range { field, value })?;
        let need = self.unit_bytes(key);
        if out.len() != need {
            return Err(SealError::OutputLength { have: out.len(), need });
        }
        out[..FRAGMENT_HEADER_BYTES].copy_from_slice(self.raw().as_bytes());
        Ok(())
    }
}

/// Where the body goes in a fragment's buffer: compress straight to `out[body_at(key)..]`, then [`seal_in_place`].
pub fn body_at(key: &SegmentKey) -> usize {
    FRAGMENT_HEADER_BYTES + key.cipher().nonce_bytes()
}

/// Seals a fragment at byte `offset` of the segment from the pieces of its body (their lengths add up to
/// `header.body_bytes`) into `out`, of exactly `header.unit_bytes(key)` bytes. One piece is enciphered without a copy, unless the cipher library
/// makes the nonce: it does so in place only.
///
/// `nonce` is for tests: without it [`crate::segment::Cipher::GcmStoredNonce`] makes one.
pub fn seal_fragment(
    key: &SegmentKey,
    offset: u32,
    header: &FragmentHeader,
    pieces: &[&[u8]],
    nonce: Option<[u8; 12]>,
    out: &mut [u8],
) -> Result<(), SealError> {
    header.prepare(key, out)?;
    let total: usize = pieces.iter().map(|piece| piece.len()).sum();
    if total != header.body_bytes as usize {
        return Err(SealError::Range { field: "body bytes", value: total as u64 });
    }
    if let [body] = pieces {
        return key.seal(offset, FRAGMENT_HEADER_BYTES, Some(body), nonce, out).map(|_| ());
    }
    let mut at = body_at(key);
    for piece in pieces {
        out[at..at + piece.len()].copy_from_slice(piece);
        at += piece.len();
    }
    key.seal(offset, FRAGMENT_HEADER_BYTES, None, nonce, out).map(|_| ())
}

/// Seals a fragment whose body is already in `out` at [`body_at`].
pub fn seal_in_place(
    key: &SegmentKey,
    offset: u32,
    header: &FragmentHeader,
    nonce: Option<[u8; 12]>,
    out: &mut [u8],
) -> Result<(), SealError> {
    header.prepare(key, out)?;
    key.seal(offset, FRAGMENT_HEADER_BYTES, None, nonce, out).map(|_| ())
}

/// Opens the fragment at the front of `unit`, read from byte `offset` of the segment: its body, still encoded, goes to
/// `out`. A raw fragment needs no more than this.
pub fn open_fragment(
    key: &SegmentKey,
    offset: u32,
    unit: &[u8],
    out: &mut [u8],
) -> Result<FragmentHeader, OpenError> {
    let header = FragmentHeader::parse(unit)?;
    key.open(offset, FRAGMENT_HEADER_BYTES, header.body_bytes as usize, unit, out)?;
    Ok(header)
}

/// As [`open_fragment`], decrypting in place; gives the header and the body.
pub fn open_fragment_in_place<'a>(
    key: &SegmentKey,
    offset: u32,
    unit: &'a mut [u8],
) -> Result<(FragmentHeader, &'a [u8]), OpenError> {
    let header = FragmentHeader::parse(unit)?;
    let body = key.open_in_place(offset, FRAGMENT_HEADER_BYTES, header.body_bytes as usize, unit)?;
    Ok((header, body))
}

/// Reads the chunks of a fragment: opens it, checks that it is the one expected, and decodes it to the front of `out`
/// (`header.plain_bytes()` bytes). A compressed fragment is decrypted in place in `unit`; a raw one goes straight to `out`.
pub fn read_fragment(
    key: &SegmentKey,
    offset: u32,
    expected: (ChunkAddr, u8),
    unit: &mut [u8],
    codec: &mut Decompressor,
    out: &mut [u8],
) -> Result<FragmentHeader, OpenError> {
    let header = FragmentHeader::parse(unit)?;
    let plain = header.plain_bytes();
    let have = out.len();
    let out = out.get_mut(..plain).ok_or(OpenError::OutputTooSmall { have, need: plain })?;
    if header.codec == Codec::Raw {
        open_fragment(key, offset, unit, out)?;
    }
    let body =
        if header.codec == Codec::Raw { None } else { Some(open_fragment_in_place(key, offset, unit)?.1) };
    let differs = |what, found, expected| Err(OpenError::WrongUnit { what, found, expected });
    if (header.first, header.chunks) != expected {
        out.fill(0);
        return if header.first != expected.0 {
            differs("first chunk", header.first.raw(), expected.0.raw())
        } else {
            differs("chunks", header.chunks.into(), expected.1.into())
        };
    }
    if let Some(body) = body {
        let decoded = codec.decompress(header.codec, body, out);
        decoded.inspect_err(|_| out.fill(0))?;
    }
    Ok(header)
}

/// Moves a fragment unchanged (garbage collection): opens `unit` at `from` under `old`, seals its still encoded body at
/// `to` under `new`, into `out`, which must be `header.unit_bytes(new)` long ([`FragmentHeader::parse`] tells beforehand).
pub fn move_fragment(
    (old, from): (&SegmentKey, u32),
    unit: &mut [u8],
    (new, to): (&SegmentKey, u32),
    nonce: Option<[u8; 12]>,
    out: &mut [u8],
) -> Result<FragmentHeader, MoveError> {
    let (header, body) = open_fragment_in_place(old, from, unit)?;
    seal_fragment(new, to, &header, &[body], nonce, out)?;
    Ok(header)
}

/// Why a unit could not be moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MoveError {
    /// The old one did not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The new one could not be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
}

#[cfg(test)]
pub(crate) fn layouts() -> Vec<crate::layout::Layout> {
    use crate::layout::layout;
    vec![layout!("fragment header", Raw { first body_bytes flags chunks codec reserved })]
}
