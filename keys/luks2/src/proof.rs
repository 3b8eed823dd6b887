//! The proof that a volume key is a header's: PBKDF2 of the key must equal the header's digest (specification, section 3.6).

use std::fmt;
use std::num::NonZeroU32;

use aws_lc_rs::pbkdf2;
use thiserror::Error;

/// Hashes of digests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hash {
    /// SHA-1: headers that once were LUKS1.
    Sha1 = 1,
    /// SHA-256.
    Sha256 = 2,
    /// SHA-384.
    Sha384 = 3,
    /// SHA-512.
    Sha512 = 4,
}

impl Hash {
    pub(crate) fn from_name(name: &str) -> Option<Hash> {
        Some(match name {
            "sha1" => Hash::Sha1,
            "sha256" => Hash::Sha256,
            "sha384" => Hash::Sha384,
            "sha512" => Hash::Sha512,
            _ => return None,
        })
    }

    pub(crate) fn bytes(self) -> usize {
        match self {
            Hash::Sha1 => 20,
            Hash::Sha256 => 32,
            Hash::Sha384 => 48,
            Hash::Sha512 => 64,
        }
    }

    fn algorithm(self) -> pbkdf2::Algorithm {
        match self {
            Hash::Sha1 => pbkdf2::PBKDF2_HMAC_SHA1,
            Hash::Sha256 => pbkdf2::PBKDF2_HMAC_SHA256,
            Hash::Sha384 => pbkdf2::PBKDF2_HMAC_SHA384,
            Hash::Sha512 => pbkdf2::PBKDF2_HMAC_SHA512,
        }
    }
}

/// A digest of a volume key.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyDigest {
    pub(crate) hash: Hash,
    pub(crate) iterations: u32,
    pub(crate) salt: Vec<u8>,
    pub(crate) value: Vec<u8>,
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyDigest({:?}, {} iterations)", self.hash, self.iterations)
    }
}

/// Why a key is not proven.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum ProofError {
    /// It is another header's.
    #[error("the key is not this header's")]
    WrongKey,
    /// The proof would take too long.
    #[error("the header asks for {asked} iterations to prove its key; at most {limit} are done")]
    TooManyIterations {
        /// The header's number.
        asked: u32,
        /// The caller's.
        limit: u32,
    },
}

impl KeyDigest {
    /// Iterations that a proof takes.
    pub fn iterations(&self) -> u32 {
        self.iterations
    }

    /// Whether `key` is the volume key. Takes as long as the iterations do, at most `max_iterations`: for ordinary threads.
    ///
    /// # Errors
    /// See [`ProofError`].
    pub fn prove(&self, key: &[u8], max_iterations: u32) -> Result<(), ProofError> {
        let too_many = ProofError::TooManyIterations { asked: self.iterations, limit: max_iterations };
        let iterations =
            NonZeroU32::new(self.iterations).filter(|n| n.get() <= max_iterations).ok_or(too_many)?;
        pbkdf2::verify(self.hash.algorithm(), iterations, &self.salt, key, &self.value)
            .map_err(|_| ProofError::WrongKey)
    }
}
