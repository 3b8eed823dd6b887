//! Fingerprints: what makes two chunks the same.
//!
//! Keyed BLAKE3 (or HMAC-SHA-256 in pools of the FIPS modes) of the chunk's 4096 bytes under the domain's fingerprint
//! secret, its first 16 bytes. Equal fingerprints count as equal chunks: among 2^40 chunks (4 PiB) of a domain two
//! different ones collide with probability 2^-49, and nobody without the secret can look for a collision.
//!
//! One 4 KiB block is four BLAKE3 chunks, which fill only four of a machine's 8 or 16 lanes. [`Hasher::hash_chunks`]
//! therefore hashes seven to sixteen blocks side by side: BLAKE3 chunk `i` of every block in one call, then the parents
//! of every block in one call, then the roots. The results are those of [`blake3::keyed_hash`], which takes the rest.

use aws_lc_rs::hmac;
use blake3::IncrementCounter;
use blake3::platform::{Platform, words_from_le_bytes_32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};
use zeroize::Zeroize;

use crate::fragment::CHUNK_BYTES;
use crate::keys::{FingerprintSecret, Secret};

/// Bytes of a fingerprint.
pub const FINGERPRINT_BYTES: usize = 16;

/// A chunk's content.
pub type Chunk = [u8; CHUNK_BYTES];

/// What makes the fingerprints.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum HashId {
    /// Keyed BLAKE3.
    Blake3 = 1,
    /// HMAC-SHA-256.
    HmacSha256 = 2,
}

impl HashId {
    /// From its number.
    pub fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            1 => Some(Self::Blake3),
            2 => Some(Self::HmacSha256),
            _ => None,
        }
    }
}

/// A chunk's fingerprint. All zero marks a slot without one.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
)]
#[repr(transparent)]
pub struct Fingerprint(pub [u8; FINGERPRINT_BYTES]);

impl std::fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}..", u64::from_be_bytes(self.0[..8].try_into().unwrap_or_default()))
    }
}

impl Fingerprint {
    /// The mark of a slot without a fingerprint.
    pub const NONE: Self = Self([0; FINGERPRINT_BYTES]);

    /// First eight bytes as a number: sampling, sharding and index buckets use its bits.
    pub fn prefix(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[..8]);
        u64::from_le_bytes(bytes)
    }
}

/// Makes the fingerprints of one domain and generation.
pub struct Hasher {
    kind: Kind,
    bits: u32,
}

enum Kind {
    Blake3 { secret: Secret, key: [u32; 8], platform: Platform },
    HmacSha256(Box<hmac::Key>),
}

impl Drop for Hasher {
    fn drop(&mut self) {
        if let Kind::Blake3 { key, .. } = &mut self.kind {
            key.zeroize();
        }
    }
}

impl std::fmt::Debug for Hasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hasher(..)")
    }
}

/// Blocks hashed side by side, at most.
const LANES: usize = 16;
/// Fewer blocks are faster one by one.
const FEWEST: usize = 7;
// BLAKE3 specification, section 2.1 (sizes) and table 3 (flags).
const BLAKE3_CHUNK: usize = 1024;
const CV: usize = 32;
const CHUNK_START: u8 = 1 << 0;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const KEYED_HASH: u8 = 1 << 4;

impl Hasher {
    /// A hasher with full fingerprints.
    pub fn new(id: HashId, secret: &FingerprintSecret) -> Self {
        Self::with_bits(id, secret, 8 * FINGERPRINT_BYTES as u32)
    }

    /// What it makes fingerprints with.
    pub fn id(&self) -> HashId {
        match self.kind {
            Kind::Blake3 { .. } => HashId::Blake3,
            Kind::HmacSha256(_) => HashId::HmacSha256,
        }
    }

    /// A hasher whose fingerprints keep only `bits` bits (1 ..= 128): to provoke collisions in tests.
    pub fn with_bits(id: HashId, secret: &FingerprintSecret, bits: u32) -> Self {
        let bytes = secret.0.expose();
        let kind = match id {
            HashId::Blake3 => Kind::Blake3 {
                secret: secret.0.clone(),
                key: words_from_le_bytes_32(bytes),
                platform: Platform::detect(),
            },
            HashId::HmacSha256 => Kind::HmacSha256(Box::new(hmac::Key::new(hmac::HMAC_SHA256, bytes))),
        };
        Self { kind, bits: bits.clamp(1, 8 * FINGERPRINT_BYTES as u32) }
    }

    /// The fingerprint of one chunk.
    pub fn hash_one(&self, chunk: &Chunk) -> Fingerprint {
        let mut out = [Fingerprint::NONE];
        self.hash_chunks(&[chunk], &mut out);
        out[0]
    }

    /// The fingerprints of `chunks`, in order, into `out` of the same length. Sixteen at a time are the fastest.
    ///
    /// Panics if the lengths differ.
    pub fn hash_chunks(&self, chunks: &[&Chunk], out: &mut [Fingerprint]) {
        assert_eq!(chunks.len(), out.len(), "one fingerprint per chunk");
        for (chunks, out) in chunks.chunks(LANES).zip(out.chunks_mut(LANES)) {
            match &self.kind {
                Kind::Blake3 { key, platform, .. } if chunks.len() >= FEWEST => {
                    blake3_lanes(key, platform, chunks, out);
                }
                Kind::Blake3 { secret, .. } => {
                    for (chunk, out) in chunks.iter().zip(&mut *out) {
                        let hash = blake3::keyed_hash(secret.expose(), *chunk);
                        out.0.copy_from_slice(&hash.as_bytes()[..FINGERPRINT_BYTES]);
                    }
                }
                Kind::HmacSha256(key) => {
                    for (chunk, out) in chunks.iter().zip(&mut *out) {
                        out.0.copy_from_slice(&hmac::sign(key, *chunk).as_ref()[..FINGERPRINT_BYTES]);
                    }
                }
            }
            for fingerprint in out {
                let mut value = u128::from_le_bytes(fingerprint.0);
                value &= u128::MAX >> (128 - self.bits);
                // Zero means "none": one value in 2^128 is moved.
                fingerprint.0 = value.max(1).to_le_bytes();
            }
        }
    }
}

/// BLAKE3 of up to [`LANES`] blocks of four BLAKE3 chunks each.
fn blake3_lanes(key: &[u32; 8], platform: &Platform, blocks: &[&Chunk], out: &mut [Fingerprint]) {
    let n = blocks.len();
    // Chaining values: [chunk index][block].
    let mut leaves = [[0u8; CV * LANES]; 4];
    for (index, leaves) in leaves.iter_mut().enumerate() {
        let mut inputs: [&[u8; BLAKE3_CHUNK]; LANES] = [&[0; BLAKE3_CHUNK]; LANES];
        for (input, block) in inputs.iter_mut().zip(blocks) {
            *input = quarter(block, index);
        }
        platform.hash_many(
            &inputs[..n],
            key,
            index as u64,
            IncrementCounter::No,
            KEYED_HASH,
            CHUNK_START,
            CHUNK_END,
            leaves,
        );
    }
    let [a, b, c, d] = &leaves;
    let left = parents(key, platform, n, a, b, 0);
    let right = parents(key, platform, n, c, d, 0);
    let roots = parents(key, platform, n, &left, &right, ROOT);
    for (out, root) in out.iter_mut().zip(roots.chunks_exact(CV)) {
        out.0.copy_from_slice(&root[..FINGERPRINT_BYTES]);
    }
}

fn quarter(block: &Chunk, index: usize) -> &[u8; BLAKE3_CHUNK] {
    let (quarters, _) = block.as_chunks::<BLAKE3_CHUNK>();
    &quarters[index]
}

fn parents(
    key: &[u32; 8],
    platform: &Platform,
    n: usize,
    left: &[u8; CV * LANES],
    right: &[u8; CV * LANES],
    flags: u8,
) -> [u8; CV * LANES] {
    let mut blocks = [[0u8; 2 * CV]; LANES];
    for ((block, left), right) in blocks.iter_mut().zip(left.chunks_exact(CV)).zip(right.chunks_exact(CV)) {
        block[..CV].copy_from_slice(left);
        block[CV..].copy_from_slice(right);
    }
    let inputs: [&[u8; 2 * CV]; LANES] = std::array::from_fn(|lane| &blocks[lane]);
    let mut out = [0; CV * LANES];
    platform.hash_many(
        &inputs[..n],
        key,
        0,
        IncrementCounter::No,
        KEYED_HASH | PARENT | flags,
        0,
        0,
        &mut out,
    );
    out
}
