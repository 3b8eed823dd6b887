//! Passwords, and how they become key-encryption keys.

use std::fmt;
use std::num::NonZeroU32;

use argon2::{Algorithm, Argon2, Block, Params, Version};
use aws_lc_rs::pbkdf2;
use cryptfold_reduce_format::keys::{Kek, SECRET_BYTES, Secret};
use cryptfold_reduce_format::slots::Kdf;
use thiserror::Error;
use zeroize::{Zeroize as _, Zeroizing};

/// Fewest characters of a new or given password.
pub const MIN_PASSWORD_CHARS: usize = 8;
const MAX_PASSWORD_BYTES: usize = 1024;
/// Fewest bytes of a password in a FIPS mode: 112 bits (FIPS 140-3 IG D.N; AWS-LC's module counts no shorter one as approved).
pub const MIN_APPROVED_BYTES: usize = 14;

/// A password; zeroed when dropped, never printed.
pub struct Password(Zeroizing<String>);

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

/// Why a password can not be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum PasswordError {
    /// Too few characters.
    #[error("the password has {chars} characters; at least {MIN_PASSWORD_CHARS} are needed")]
    Short {
        /// What it has.
        chars: usize,
    },
    /// Too many bytes.
    #[error("the password has {bytes} bytes; at most {MAX_PASSWORD_BYTES} are possible")]
    Long {
        /// What it has.
        bytes: usize,
    },
    /// The slot asks for more memory than is allowed.
    #[error("the key slot asks for {asked} KiB of memory to try a password; at most {limit} are given")]
    Memory {
        /// What it asks for.
        asked: u32,
        /// The caller's limit.
        limit: u32,
    },
    /// The slot asks for more time than is allowed.
    #[error("the key slot asks for {asked} {unit} to try a password; at most {limit} are done")]
    Time {
        /// What it asks for.
        asked: u32,
        /// Of what.
        unit: &'static str,
        /// The caller's limit.
        limit: u32,
    },
    /// The derivation is none that FIPS 140-3 approves.
    #[error(
        "the key slot's password goes through Argon2id, which FIPS 140-3 does not approve; with --fips-mode off, changing the password \
         of a pool that was made for the FIPS modes gives it PBKDF2"
    )]
    NotApproved,
    /// Too short for PBKDF2 where only what FIPS 140-3 approves may be used.
    #[error(
        "the password has {bytes} bytes; in the FIPS modes, and for pools that were made there, at least {MIN_APPROVED_BYTES} are needed"
    )]
    ShortApproved {
        /// What it has.
        bytes: usize,
    },
    /// The parameters are impossible, or the slot takes no password.
    #[error("the key slot's parameters are no derivation from a password")]
    Parameters,
    /// The machine has not enough memory.
    #[error("no {kib} KiB of memory to try a password with")]
    OutOfMemory {
        /// What was asked for.
        kib: u32,
    },
}

impl Password {
    /// Takes a password over.
    ///
    /// # Errors
    /// Too short or too long; the text is zeroed then, too.
    pub fn new(text: String) -> Result<Password, PasswordError> {
        let text = Zeroizing::new(text);
        let (chars, bytes) = (text.chars().count(), text.len());
        if chars < MIN_PASSWORD_CHARS {
            return Err(PasswordError::Short { chars });
        }
        if bytes > MAX_PASSWORD_BYTES {
            return Err(PasswordError::Long { bytes });
        }
        Ok(Password(text))
    }
}

/// What trying one password costs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cost {
    /// Argon2id (RFC 9106).
    Argon2id {
        /// Memory, in KiB.
        memory_kib: u32,
        /// Passes over it.
        passes: u32,
        /// Lanes.
        lanes: u32,
    },
    /// PBKDF2-HMAC-SHA-256 (RFC 8018, SP 800-132): the one of the two that FIPS 140-3 approves.
    Pbkdf2 {
        /// Iterations.
        iterations: u32,
    },
}

impl Cost {
    /// RFC 9106, section 4, second recommended option: 64 MiB, 3 passes, 4 lanes.
    pub const DEFAULT: Cost = Cost::Argon2id { memory_kib: 64 << 10, passes: 3, lanes: 4 };
    /// In the FIPS modes.
    pub const APPROVED: Cost = Cost::Pbkdf2 { iterations: 1_000_000 };

    pub(crate) fn with_salt(self, salt: [u8; 32]) -> Kdf {
        match self {
            Cost::Argon2id { memory_kib, passes, lanes } => Kdf::Argon2id { memory_kib, passes, lanes, salt },
            Cost::Pbkdf2 { iterations } => Kdf::Pbkdf2 { iterations, salt },
        }
    }
}

/// What a slot may ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Argon2id's memory, in KiB.
    pub memory_kib: u32,
    /// Argon2id's passes.
    pub passes: u32,
    /// PBKDF2's iterations.
    pub iterations: u32,
    /// Only what FIPS 140-3 approves: PBKDF2, and no short password.
    pub approved: bool,
}

impl Default for Limits {
    /// 1 GiB, 64 passes, 20 million iterations.
    fn default() -> Self {
        Limits { memory_kib: 1 << 20, passes: 64, iterations: 20_000_000, approved: false }
    }
}

/// The key-encryption key of a password.
///
/// # Errors
/// See [`PasswordError`]; a wrong password is none here, its key opens nothing.
pub fn derive(password: &Password, kdf: &Kdf, limits: &Limits) -> Result<Kek, PasswordError> {
    let mut key = Zeroizing::new([0; SECRET_BYTES]);
    if limits.approved {
        let bytes = password.0.len();
        match kdf {
            Kdf::Argon2id { .. } => return Err(PasswordError::NotApproved),
            _ if bytes < MIN_APPROVED_BYTES => return Err(PasswordError::ShortApproved { bytes }),
            _ => {}
        }
    }
    match *kdf {
        Kdf::None => return Err(PasswordError::Parameters),
        Kdf::Pbkdf2 { iterations, salt } => {
            if iterations > limits.iterations {
                let (asked, limit) = (iterations, limits.iterations);
                return Err(PasswordError::Time { asked, unit: "iterations", limit });
            }
            let iterations = NonZeroU32::new(iterations).ok_or(PasswordError::Parameters)?;
            let secret = password.0.as_bytes();
            pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, &salt, secret, key.as_mut_slice());
        }
        Kdf::Argon2id { memory_kib, passes, lanes, salt } => {
            if memory_kib > limits.memory_kib {
                return Err(PasswordError::Memory { asked: memory_kib, limit: limits.memory_kib });
            }
            if passes > limits.passes {
                return Err(PasswordError::Time { asked: passes, unit: "passes", limit: limits.passes });
            }
            let params = Params::new(memory_kib, passes, lanes, Some(SECRET_BYTES));
            let params = params.map_err(|_| PasswordError::Parameters)?;
            argon2id(password, &salt, params, key.as_mut_slice())?;
        }
    }
    Ok(Kek(Secret::take(&mut key)))
}

fn argon2id(password: &Password, salt: &[u8], params: Params, key: &mut [u8]) -> Result<(), PasswordError> {
    let no_memory = PasswordError::OutOfMemory { kib: params.m_cost() };
    // Allocated here, so that it can fail, and be wiped: it tells the password's key.
    let mut memory: Vec<Block> = Vec::new();
    memory.try_reserve_exact(params.block_count()).map_err(|_| no_memory)?;
    memory.resize(params.block_count(), Block::default());
    let argon = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let done = argon.hash_password_into_with_memory(password.0.as_bytes(), salt, key, &mut memory);
    memory.iter_mut().for_each(|block| block.as_mut().zeroize());
    done.map_err(|_| PasswordError::Parameters)
}
