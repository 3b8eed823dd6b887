//! Codecs: zstd, LZ4, raw; and what is recognised before a codec runs (zeros, patterns, incompressible data).
//!
//! Contexts are made once and reused; nothing here allocates per call.

use std::fmt;
use std::str::FromStr;

use lzzzz::lz4;
use thiserror::Error;
use zstd::zstd_safe::{CCtx, CParameter, DCtx, DParameter, FrameFormat, InBuffer, OutBuffer, ResetDirective};

use crate::fragment::{CHUNK_BYTES, MAX_CHUNKS};

/// How a body is encoded.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Raw = 1,
    /// One LZ4 block (lz4_Block_format.md), without frame.
    Lz4 = 2,
    /// One zstd frame (RFC 8878) without its magic number, checksum and content size.
    Zstd = 3,
}

impl Codec {
    /// From its number.
    pub fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            1 => Some(Self::Raw),
            2 => Some(Self::Lz4),
            3 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// A pool's or volume's compression setting: `off`, `lz4`, `zstd:N` (N from -7 to 19), `adaptive`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Compression {
    /// Store raw.
    Off,
    /// LZ4.
    Lz4,
    /// zstd with this level.
    Zstd(i8),
    /// zstd level 1, and LZ4 or none where the engine finds that the codec holds it up.
    #[default]
    Adaptive,
}

/// Plain bytes of a zstd block, at most: a read of one chunk decodes up to the end of the block that has it. Half a fragment costs
/// writes 4% of zstd's time, a quarter 12%, and system disks get no bigger by either (`examples/parts`).
const ZSTD_BLOCK_BYTES: u32 = 32 << 10;

/// Lowest zstd level that may be set.
pub const MIN_LEVEL: i8 = -7;
/// Highest zstd level that may be set.
pub const MAX_LEVEL: i8 = 19;

/// A setting that is none.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error(
    "compression is 'off', 'lz4', 'zstd:N' with N from {MIN_LEVEL} to {MAX_LEVEL}, or 'adaptive', not '{0}'"
)]
pub struct UnknownCompression(pub String);

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || UnknownCompression(text.to_owned());
        match text {
            "off" => Ok(Self::Off),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd(1)),
            "adaptive" => Ok(Self::Adaptive),
            _ => {
                let level = text.strip_prefix("zstd:").ok_or_else(unknown)?;
                let level = level.parse().map_err(|_| unknown())?;
                Self::zstd(level).ok_or_else(unknown)
            }
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
            Self::Adaptive => f.write_str("adaptive"),
        }
    }
}

impl Compression {
    fn zstd(level: i8) -> Option<Self> {
        (MIN_LEVEL..=MAX_LEVEL).contains(&level).then_some(Self::Zstd(level))
    }

    /// Two bytes: kind and level.
    pub fn to_raw(self) -> [u8; 2] {
        match self {
            Self::Off => [1, 0],
            Self::Lz4 => [2, 0],
            Self::Zstd(level) => [3, level as u8],
            Self::Adaptive => [4, 0],
        }
    }

    /// The reverse of [`Compression::to_raw`].
    pub fn from_raw(raw: [u8; 2]) -> Option<Self> {
        match raw {
            [1, 0] => Some(Self::Off),
            [2, 0] => Some(Self::Lz4),
            [3, level] => Self::zstd(level as i8),
            [4, 0] => Some(Self::Adaptive),
            _ => None,
        }
    }
}

/// Why a body does not decode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum DecodeError {
    /// The codec finds it malformed, or it would give more than the output holds.
    #[error("{codec:?} data is malformed or longer than its {expected} bytes")]
    Malformed {
        /// Codec.
        codec: Codec,
        /// Bytes expected.
        expected: usize,
    },
    /// It gives fewer bytes than expected.
    #[error("{codec:?} data gives {found} bytes, expected {expected}")]
    Length {
        /// Codec.
        codec: Codec,
        /// Bytes found.
        found: usize,
        /// Bytes expected.
        expected: usize,
    },
}

/// Compresses; one per core.
pub struct Compressor {
    zstd: CCtx<'static>,
    level: i8,
    gather: Vec<u8>,
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Compressor(zstd:{})", self.level)
    }
}

impl Default for Compressor {
    fn default() -> Self {
        Self::new()
    }
}

impl Compressor {
    /// A compressor with its contexts.
    pub fn new() -> Self {
        let mut zstd = CCtx::create();
        for parameter in [
            CParameter::Format(FrameFormat::Magicless),
            CParameter::ContentSizeFlag(false),
            CParameter::ChecksumFlag(false),
            CParameter::DictIdFlag(false),
            CParameter::MaxBlockSize(ZSTD_BLOCK_BYTES),
            CParameter::CompressionLevel(1),
        ] {
            zstd.set_parameter(parameter).expect("constant parameters within zstd's bounds");
        }
        Self { zstd, level: 1, gather: Vec::new() }
    }

    /// Compresses the pieces of a fragment (together at most [`MAX_CHUNKS`] chunks) into the front of `out`.
    ///
    /// `Some((codec, bytes))` if the result fits in `out` and saves at least [`worth`] bytes; `None` if the data should be
    /// stored raw. Several pieces are gathered first.
    pub fn compress(
        &mut self,
        setting: Compression,
        pieces: &[&[u8]],
        out: &mut [u8],
    ) -> Option<(Codec, usize)> {
        let total: usize = pieces.iter().map(|piece| piece.len()).sum();
        if setting == Compression::Off || total == 0 || total > MAX_CHUNKS * CHUNK_BYTES {
            return None;
        }
        if looks_incompressible(pieces) {
            return None;
        }
        let mut gather = std::mem::take(&mut self.gather);
        let input = if let [piece] = pieces {
            piece
        } else {
            gather.clear();
            pieces.iter().for_each(|piece| gather.extend_from_slice(piece));
            gather.as_slice()
        };
        let limit = (total - worth(total)).min(out.len());
        let found = self.encode(setting, input, &mut out[..limit]);
        self.gather = gather;
        found
    }

    fn encode(&mut self, setting: Compression, input: &[u8], out: &mut [u8]) -> Option<(Codec, usize)> {
        match setting {
            Compression::Off => None,
            Compression::Lz4 => {
                let len = lz4::compress(input, out, lz4::ACC_LEVEL_DEFAULT).ok()?;
                (len > 0).then_some((Codec::Lz4, len))
            }
            Compression::Zstd(level) => self.zstd(level, input, out),
            Compression::Adaptive => self.zstd(1, input, out),
        }
    }

    fn zstd(&mut self, level: i8, input: &[u8], out: &mut [u8]) -> Option<(Codec, usize)> {
        if level != self.level {
            self.zstd.set_parameter(CParameter::CompressionLevel(level.into())).ok()?;
            self.level = level;
        }
        // An output that is too small is zstd's way to say that it does not pay.
        let len = self.zstd.compress2(out, input).ok()?;
        (len > 0).then_some((Codec::Zstd, len))
    }

    /// Compresses a metadata node with zstd level 1 if it gets smaller.
    pub fn compress_node(&mut self, plain: &[u8]) -> (Codec, Vec<u8>) {
        if looks_incompressible(&[plain]) {
            // Fingerprints.
            return (Codec::Raw, plain.to_vec());
        }
        let mut out = vec![0; plain.len().saturating_sub(1)];
        match self.zstd(1, plain, &mut out) {
            Some((codec, len)) => {
                out.truncate(len);
                (codec, out)
            }
            None => (Codec::Raw, plain.to_vec()),
        }
    }
}

/// Bytes that a codec must save to be used on `plain` bytes: a 32nd.
pub fn worth(plain: usize) -> usize {
    (plain / 32).max(1)
}

/// Decompresses; one per core.
pub struct Decompressor(DCtx<'static>);

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decompressor")
    }
}

impl Default for Decompressor {
    fn default() -> Self {
        Self::new()
    }
}

impl Decompressor {
    /// A decompressor with its context.
    pub fn new() -> Self {
        let mut zstd = DCtx::create();
        // A stable output buffer: `decompress_front` decodes to its place, without a copy.
        for parameter in [DParameter::Format(FrameFormat::Magicless), DParameter::StableOutBuffer(true)] {
            zstd.set_parameter(parameter).expect("constant parameters within zstd's bounds");
        }
        Self(zstd)
    }

    /// Decodes `body` to exactly `out.len()` bytes. Never writes beyond `out`, needs no memory besides.
    pub fn decompress(&mut self, codec: Codec, body: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        let expected = out.len();
        let malformed = DecodeError::Malformed { codec, expected };
        let found = match codec {
            Codec::Raw if body.len() == expected => {
                out.copy_from_slice(body);
                expected
            }
            Codec::Raw => body.len(),
            Codec::Lz4 => lz4::decompress(body, out).map_err(|_| malformed)?,
            Codec::Zstd => self.0.decompress(out, body).map_err(|_| malformed)?,
        };
        if found == expected { Ok(()) } else { Err(DecodeError::Length { codec, found, expected }) }
    }

    /// Decodes at least the first `wanted` bytes of a `body` that decodes to `out.len()`, and says how many are there; what
    /// `out` holds behind them is undefined. zstd stops at the block that has the last of them; the other codecs decode all.
    pub fn decompress_front(
        &mut self,
        codec: Codec,
        body: &[u8],
        out: &mut [u8],
        wanted: usize,
    ) -> Result<usize, DecodeError> {
        let expected = out.len();
        if codec != Codec::Zstd || wanted >= expected {
            return self.decompress(codec, body, out).map(|()| expected);
        }
        let malformed = DecodeError::Malformed { codec, expected };
        self.0.reset(ResetDirective::SessionOnly).map_err(|_| malformed)?;
        let mut plain = OutBuffer::around(out);
        let (mut fed, mut next) = (0, 1);
        while plain.pos() < wanted {
            // zstd says what it needs next: up to the end of a block and of the header behind it.
            let end = (fed + next).min(body.len());
            let mut input = InBuffer::around(&body[..end]);
            input.set_pos(fed);
            next = self.0.decompress_stream(&mut plain, &mut input).map_err(|_| malformed)?;
            if next == 0 || input.pos() == fed {
                break;
            }
            fed = input.pos();
        }
        let found = plain.pos();
        if found >= wanted { Ok(found) } else { Err(DecodeError::Length { codec, found, expected }) }
    }
}

/// If `chunk` repeats one 8-byte word (little-endian), that word; 0 = all zero.
pub fn pattern(chunk: &[u8; CHUNK_BYTES]) -> Option<u64> {
    let (lines, _) = chunk.as_chunks::<64>();
    let first = lines[0];
    let (words, _) = first.as_chunks::<8>();
    if words[0] != words[1] {
        return None;
    }
    let line: [u8; 64] = std::array::from_fn(|at| words[0][at % 8]);
    lines.iter().all(|found| *found == line).then(|| u64::from_le_bytes(words[0]))
}

/// Whether a codec would hardly save anything on this data (already compressed or encrypted), by a sample of 192 bytes
/// for up to 8 KiB, a 64th of larger data, 1024 bytes at most.
///
/// Counts how often two sampled bytes are equal. Of `n` random bytes, `n (n - 1) / 512` pairs are, with a variance of
/// nearly that; data that a codec can shorten by a 32nd has a third more or far more. What lies less than four standard
/// deviations above random passes for random. Runs of sixteen bytes are taken at even distances, so that no period
/// of the data hides from them.
pub fn looks_incompressible(pieces: &[&[u8]]) -> bool {
    let total: usize = pieces.iter().map(|piece| piece.len()).sum();
    let mut counts = [0u16; 256];
    let mut squares = 0u32;
    let mut sampled = 0u32;
    let wanted = if total <= 8192 { 192 } else { (total / 64).clamp(256, 1024) };
    for piece in pieces {
        let runs = (wanted / RUN * piece.len()).div_ceil(total.max(1));
        let (units, _) = piece.as_chunks::<RUN>();
        let step = (units.len() / runs.max(1)).max(1);
        if wanted == 192 && pieces.len() == 1 {
            // One table of bytes: half the time of the general one.
            let mut counts = [0u8; 256];
            for unit in units.iter().step_by(step).take(runs) {
                unit.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
                sampled += RUN as u32;
            }
            squares = counts.iter().map(|&count| u32::from(u16::from(count) * u16::from(count))).sum();
        } else {
            for unit in units.iter().step_by(step).take(runs) {
                unit.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
                sampled += RUN as u32;
            }
        }
    }
    if squares == 0 {
        squares = counts.iter().map(|&count| u32::from(count) * u32::from(count)).sum();
    }
    let pairs = u64::from(squares - sampled) / 2;
    let expected = u64::from(sampled) * u64::from(sampled.saturating_sub(1)) / 512;
    let excess = pairs.saturating_sub(expected);
    sampled >= 128 && excess * excess <= 16 * expected
}

const RUN: usize = 16;
