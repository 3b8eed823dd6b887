//! Sealed units: what segments are made of.
//!
//! ```text
//! header (16 or 32 bytes, plain) | stored nonce (0 or 12) | body (encrypted) | tag (16)
//! ```
//!
//! The nonce is the unit's byte offset in the segment; where the nonce is stored, the offset is associated data. Key and associated data
//! carry the segment's address, incarnation, class, domain and key generation. So a unit opens only at the place, in the incarnation and under the
//! header that it was sealed with, and (key, nonce) never repeats, provided that each place of an incarnation is sealed once.
//! A stored nonce is random and made by the cipher library while it seals (NIST SP 800-38D section 8.2.2): the only way that a FIPS 140-3
//! module counts as approved. One key makes as many units as fit into a segment, far fewer than the 2^32 that random nonces allow.
//! With [`Cipher::Gmac`] the body is plain, and header and body are associated data (the address is in the key).

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, RandomizedNonceKey, UnboundKey};
use aws_lc_rs::error::Unspecified;
use thiserror::Error;

use crate::codec::DecodeError;
use crate::ids::{Incarnation, Place, SegmentAddr};
use crate::keys::{DataKey, Secret, derive};
use crate::segment::{Cipher, Class, SegmentHeader};

/// Bytes of a GCM tag.
pub const TAG_BYTES: usize = 16;
const LONGEST_HEADER: usize = 32;
const CONTEXT_BYTES: usize = 32;
const OFFSET_BYTES: usize = 4;
const LONGEST_ASSOCIATED: usize = LONGEST_HEADER + CONTEXT_BYTES + OFFSET_BYTES;

/// Why a sealed unit did not open.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum OpenError {
    /// Fewer bytes than the unit has.
    #[error("unit truncated: {have} of {need} bytes")]
    Truncated {
        /// Bytes given.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// The output buffer is too small.
    #[error("output holds {have} bytes, the unit has {need}")]
    OutputTooSmall {
        /// Bytes given.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// A header field out of range.
    #[error("malformed header: {field} is {value}")]
    Malformed {
        /// Field.
        field: &'static str,
        /// Value.
        value: u64,
    },
    /// Not what was sealed here with this key: damaged, stale, moved, forged, or another key.
    #[error("authentication failed at {place:?}")]
    Tag {
        /// Where it was read.
        place: Place,
    },
    /// An authentic unit, but not the one that the reference meant.
    #[error("wrong unit: {what} is {found}, expected {expected}")]
    WrongUnit {
        /// What differs.
        what: &'static str,
        /// Value in the unit.
        found: u64,
        /// Value expected.
        expected: u64,
    },
    /// An authentic unit whose body does not decode.
    #[error("body does not decode: {0}")]
    Decode(#[from] DecodeError),
}

/// Why a unit could not be sealed: the caller's mistake.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum SealError {
    /// Output length differs from the unit's.
    #[error("output holds {have} bytes, the unit has {need}")]
    OutputLength {
        /// Bytes given.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// The unit reaches beyond 4 GiB, or its fields beyond their width.
    #[error("{field} out of range: {value}")]
    Range {
        /// Field.
        field: &'static str,
        /// Value.
        value: u64,
    },
    /// Only [`Cipher::GcmStoredNonce`] takes a nonce.
    #[error("this segment's cipher takes no nonce from the caller")]
    Nonce,
    /// The cipher refused.
    #[error("the cipher failed")]
    Cipher,
}

/// The key of one segment in one incarnation, and the address that it is bound to. Derived once, kept while in use.
pub struct SegmentKey {
    gcm: LessSafeKey,
    /// The same key, where the library makes the nonces.
    making: Option<RandomizedNonceKey>,
    context: [u8; CONTEXT_BYTES],
    addr: SegmentAddr,
    incarnation: Incarnation,
    class: Class,
    cipher: Cipher,
}

impl std::fmt::Debug for SegmentKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SegmentKey({:?} {:?})", self.addr, self.incarnation)
    }
}

/// An AES-256-GCM key from a derived secret.
pub(crate) fn gcm(secret: &Secret) -> LessSafeKey {
    // The length is the algorithm's by type.
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, secret.expose()).expect("AES-256 takes 32 bytes"))
}

/// The same for sealing with nonces that the library makes.
pub(crate) fn making(secret: &Secret) -> RandomizedNonceKey {
    RandomizedNonceKey::new(&AES_256_GCM, secret.expose()).expect("AES-256 takes 32 bytes")
}

/// Seals `body` into `out`, and its tag beside that. The AWS-LC that has a validated module seals in place only.
fn seal_across(
    key: &LessSafeKey,
    nonce: Nonce,
    aad: Aad<&[u8]>,
    body: &[u8],
    (out, tag_out): (&mut [u8], &mut [u8]),
) -> Result<(), Unspecified> {
    #[cfg(not(feature = "fips"))]
    key.seal_out_of_place_scatter(nonce, aad, body, out, &[], tag_out)?;
    #[cfg(feature = "fips")]
    {
        out.copy_from_slice(body);
        tag_out.copy_from_slice(key.seal_in_place_separate_tag(nonce, aad, out)?.as_ref());
    }
    Ok(())
}

/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 12;

/// A nonce that was stored.
pub(crate) fn stored_nonce(nonce: [u8; NONCE_BYTES]) -> Nonce {
    Nonce::assume_unique_for_key(nonce)
}

/// Seals `body` in place with a nonce that the library makes: nonce and tag.
pub(crate) fn seal_making(
    key: &RandomizedNonceKey,
    aad: &[u8],
    body: &mut [u8],
) -> Result<([u8; NONCE_BYTES], [u8; TAG_BYTES]), SealError> {
    let (nonce, made) =
        key.seal_in_place_separate_tag(Aad::from(aad), body).map_err(|_| SealError::Cipher)?;
    let mut tag = [0; TAG_BYTES];
    tag.copy_from_slice(made.as_ref());
    Ok((*nonce.as_ref(), tag))
}

impl SegmentKey {
    /// Derives the key of the segment that `header` opens, from its domain's data key of the header's generation.
    pub fn derive(data: &DataKey, header: &SegmentHeader) -> Self {
        let mut context = [0; CONTEXT_BYTES];
        context[..16].copy_from_slice(header.pool.as_bytes());
        context[16..18].copy_from_slice(&header.addr.device.0.to_le_bytes());
        context[18..22].copy_from_slice(&header.addr.segment.0.to_le_bytes());
        context[22..30].copy_from_slice(&header.incarnation.0.to_le_bytes());
        let secret = derive(
            &data.0,
            &header.salt,
            "segment",
            &[
                &context[..30],
                &header.domain.0.to_le_bytes(),
                &header.generation.0.to_le_bytes(),
                &[header.class as u8, header.cipher as u8],
            ],
        );
        context[30] = header.class as u8;
        context[31] = header.cipher as u8;
        Self {
            gcm: gcm(&secret),
            making: (header.cipher == Cipher::GcmStoredNonce).then(|| making(&secret)),
            context,
            addr: header.addr,
            incarnation: header.incarnation,
            class: header.class,
            cipher: header.cipher,
        }
    }

    /// The segment.
    pub fn addr(&self) -> SegmentAddr {
        self.addr
    }

    /// The incarnation.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// What the segment holds.
    pub fn class(&self) -> Class {
        self.class
    }

    /// How its units are sealed.
    pub fn cipher(&self) -> Cipher {
        self.cipher
    }

    /// The place `offset` bytes into this segment.
    pub fn place(&self, offset: u32) -> Place {
        Place { segment: self.addr, offset }
    }

    fn place_nonce(&self, offset: u32) -> [u8; 12] {
        let mut nonce = [0; 12];
        nonce[0] = self.class as u8;
        nonce[4..8].copy_from_slice(&offset.to_le_bytes());
        nonce
    }

    /// Header and context, and the offset where the nonce does not say it.
    fn associated(&self, offset: u32, header: &[u8]) -> ([u8; LONGEST_ASSOCIATED], usize) {
        let mut aad = [0; LONGEST_ASSOCIATED];
        let len = header.len() + CONTEXT_BYTES;
        aad[..header.len()].copy_from_slice(header);
        aad[header.len()..len].copy_from_slice(&self.context);
        if self.cipher != Cipher::GcmStoredNonce {
            return (aad, len);
        }
        aad[len..len + OFFSET_BYTES].copy_from_slice(&offset.to_le_bytes());
        (aad, len + OFFSET_BYTES)
    }

    /// Bytes of a unit with a header of `header` bytes and a body of `body` bytes.
    pub(crate) fn unit_bytes(&self, header: usize, body: usize) -> usize {
        header + self.cipher.nonce_bytes() + body + TAG_BYTES
    }

    /// Seals the unit in `out` (exactly the unit): header is in place; the body is in place too if `body` is `None`,
    /// else taken from there. `nonce` is for tests; without it a stored one is made. Returns the tag.
    pub(crate) fn seal(
        &self,
        offset: u32,
        header_bytes: usize,
        body: Option<&[u8]>,
        nonce: Option<[u8; 12]>,
        out: &mut [u8],
    ) -> Result<[u8; TAG_BYTES], SealError> {
        let stored = self.cipher.nonce_bytes();
        let need = self.unit_bytes(header_bytes, body.map_or(0, <[u8]>::len));
        if out.len() < need || (body.is_some() && out.len() != need) {
            return Err(SealError::OutputLength { have: out.len(), need });
        }
        if u64::from(offset) + out.len() as u64 > u64::from(u32::MAX) {
            return Err(SealError::Range { field: "offset", value: offset.into() });
        }
        let nonce = match (&self.making, nonce) {
            (None, None) => self.place_nonce(offset),
            (None, Some(_)) => return Err(SealError::Nonce),
            (Some(making), None) => return self.seal_made(making, offset, header_bytes, body, out),
            (Some(_), Some(nonce)) => {
                out[header_bytes..header_bytes + stored].copy_from_slice(&nonce);
                nonce
            }
        };
        let nonce = Nonce::assume_unique_for_key(nonce);
        let (front, tag_out) = out.split_at_mut(out.len() - TAG_BYTES);
        let failed = |_| SealError::Cipher;
        if self.cipher == Cipher::Gmac {
            if let Some(body) = body {
                front[header_bytes..].copy_from_slice(body);
            }
            let tag =
                self.gcm.seal_in_place_separate_tag(nonce, Aad::from(&*front), &mut []).map_err(failed)?;
            tag_out.copy_from_slice(tag.as_ref());
        } else {
            let (header, body_out) = front.split_at_mut(header_bytes + stored);
            let (aad, len) = self.associated(offset, &header[..header_bytes]);
            let aad = Aad::from(&aad[..len]);
            match body {
                Some(body) => {
                    seal_across(&self.gcm, nonce, aad, body, (body_out, tag_out)).map_err(failed)?;
                }
                None => {
                    let tag = self.gcm.seal_in_place_separate_tag(nonce, aad, body_out).map_err(failed)?;
                    tag_out.copy_from_slice(tag.as_ref());
                }
            }
        }
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(tag_out);
        Ok(tag)
    }

    /// [`SegmentKey::seal`] with a nonce that the library makes; `out` has the unit's length.
    fn seal_made(
        &self,
        key: &RandomizedNonceKey,
        offset: u32,
        header_bytes: usize,
        body: Option<&[u8]>,
        out: &mut [u8],
    ) -> Result<[u8; TAG_BYTES], SealError> {
        let (front, tag_out) = out.split_at_mut(out.len() - TAG_BYTES);
        let (header, rest) = front.split_at_mut(header_bytes);
        let (nonce_out, body_out) = rest.split_at_mut(NONCE_BYTES);
        if let Some(body) = body {
            body_out.copy_from_slice(body);
        }
        let (aad, len) = self.associated(offset, header);
        let (nonce, tag) = seal_making(key, &aad[..len], body_out)?;
        nonce_out.copy_from_slice(&nonce);
        tag_out.copy_from_slice(&tag);
        Ok(tag)
    }

    fn split<'a>(
        &self,
        header_bytes: usize,
        body_bytes: usize,
        unit: &'a [u8],
    ) -> Result<Parts<'a>, OpenError> {
        let need = self.unit_bytes(header_bytes, body_bytes);
        let Some(unit) = unit.get(..need) else {
            return Err(OpenError::Truncated { have: unit.len(), need });
        };
        let (signed, tag) = unit.split_at(need - TAG_BYTES);
        let (front, body) = signed.split_at(header_bytes + self.cipher.nonce_bytes());
        let (header, nonce) = front.split_at(header_bytes);
        Ok(Parts { signed, header, nonce, body, tag })
    }

    fn nonce(&self, offset: u32, stored: &[u8]) -> Nonce {
        let nonce = <[u8; 12]>::try_from(stored).unwrap_or_else(|_| self.place_nonce(offset));
        Nonce::assume_unique_for_key(nonce)
    }

    /// Opens a unit into `out`, whose first `body_bytes` bytes become the body. On failure `out` holds no plaintext.
    pub(crate) fn open(
        &self,
        offset: u32,
        header_bytes: usize,
        body_bytes: usize,
        unit: &[u8],
        out: &mut [u8],
    ) -> Result<(), OpenError> {
        let parts = self.split(header_bytes, body_bytes, unit)?;
        let have = out.len();
        let out = out.get_mut(..body_bytes).ok_or(OpenError::OutputTooSmall { have, need: body_bytes })?;
        let failed = |_| OpenError::Tag { place: self.place(offset) };
        let nonce = self.nonce(offset, parts.nonce);
        if self.cipher == Cipher::Gmac {
            self.gcm
                .open_separate_gather(nonce, Aad::from(parts.signed), &[], parts.tag, &mut [])
                .map_err(failed)?;
            out.copy_from_slice(parts.body);
            return Ok(());
        }
        let (aad, len) = self.associated(offset, parts.header);
        let opened = self.gcm.open_separate_gather(nonce, Aad::from(&aad[..len]), parts.body, parts.tag, out);
        if opened.is_err() {
            out.fill(0);
        }
        opened.map_err(failed)
    }

    /// Opens a unit in place; the body is then at `header_bytes + cipher.nonce_bytes()`.
    pub(crate) fn open_in_place<'a>(
        &self,
        offset: u32,
        header_bytes: usize,
        body_bytes: usize,
        unit: &'a mut [u8],
    ) -> Result<&'a [u8], OpenError> {
        let parts = self.split(header_bytes, body_bytes, unit)?;
        let failed = |_| OpenError::Tag { place: self.place(offset) };
        let nonce = self.nonce(offset, parts.nonce);
        let at = header_bytes + self.cipher.nonce_bytes();
        if self.cipher == Cipher::Gmac {
            self.gcm
                .open_separate_gather(nonce, Aad::from(parts.signed), &[], parts.tag, &mut [])
                .map_err(failed)?;
            return Ok(&unit[at..at + body_bytes]);
        }
        let (aad, len) = self.associated(offset, parts.header);
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(parts.tag);
        let body = &mut unit[at..at + body_bytes];
        let opened =
            self.gcm.open_in_place_separate_tag(nonce, Aad::from(&aad[..len]), &tag, body).map(|_| ());
        match opened {
            Ok(()) => Ok(body),
            Err(error) => {
                body.fill(0);
                Err(failed(error))
            }
        }
    }
}

struct Parts<'a> {
    /// Everything before the tag.
    signed: &'a [u8],
    header: &'a [u8],
    nonce: &'a [u8],
    body: &'a [u8],
    tag: &'a [u8],
}
