//! XTS-AES (IEEE Std 1619-2018, NIST SP 800-38E) over data units, and the keys it takes.
//!
//! Owns: the key type, the two engines (AWS-LC where it can, `aes` + `xts-mode` everywhere), and the walk of a run of
//! data units over scattered memory.
//!
//! Invariants:
//! - Key material lives in locked, zeroed memory ([`XtsKey`]) and is never printed. Key schedules live in the engines'
//!   contexts and are wiped when those are dropped.
//! - Keys whose halves are equal are refused: with them the tweak cancels out for chosen blocks.
//! - A data unit goes from source to destination in one pass; only units that straddle a seam between two pieces of
//!   memory pass through a scratch buffer.
//! - No ciphertext stealing: a data unit is a multiple of 16 bytes, which every block size is.
//!
//! Units: lengths in bytes; a tweak is a data unit number, encoded little-endian for the cipher.

pub mod awslc;
pub mod portable;
mod run;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use cryptfold_reactor::memory::SecretBytes;
use thiserror::Error;
use zeroize::Zeroizing;

pub use run::UnitRun;

/// AES blocks are 16 bytes; data units are multiples of it.
pub const AES_BLOCK_BYTES: usize = 16;

/// Largest data unit in bytes. The standard allows 2^20 AES blocks; no block device comes near.
pub const MAX_UNIT_BYTES: usize = 64 * 1024;

/// Which AES the mode runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum XtsCipher {
    /// XTS-AES-128: two keys of 16 bytes.
    Aes128,
    /// XTS-AES-256: two keys of 32 bytes.
    Aes256,
}

impl XtsCipher {
    /// Bytes in the whole key, both halves.
    pub const fn key_bytes(self) -> usize {
        match self {
            XtsCipher::Aes128 => 32,
            XtsCipher::Aes256 => 64,
        }
    }

    /// The cipher whose whole key is this long.
    pub const fn with_key_bytes(len: usize) -> Option<XtsCipher> {
        match len {
            32 => Some(XtsCipher::Aes128),
            64 => Some(XtsCipher::Aes256),
            _ => None,
        }
    }
}

impl fmt::Display for XtsCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            XtsCipher::Aes128 => "AES-128-XTS",
            XtsCipher::Aes256 => "AES-256-XTS",
        })
    }
}

/// A key that can not be used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum KeyError {
    /// No XTS cipher has a key of this length.
    #[error("an XTS key has 32 bytes (AES-128) or 64 bytes (AES-256), this one has {got_bytes}")]
    Length {
        /// What was given.
        got_bytes: usize,
    },
    /// The cipher needs another length.
    #[error("{cipher} needs a key of {} bytes (two halves), this one has {got_bytes}", cipher.key_bytes())]
    LengthForCipher {
        /// What was asked for.
        cipher: XtsCipher,
        /// What was given.
        got_bytes: usize,
    },
    /// The halves have different lengths.
    #[error(
        "the two halves of an XTS key must be equally long, these have {key_bytes} and {key2_bytes} bytes"
    )]
    Halves {
        /// Length of the first half.
        key_bytes: usize,
        /// Length of the second half.
        key2_bytes: usize,
    },
    /// Both halves are the same.
    #[error("the two halves of an XTS key must differ")]
    EqualHalves,
    /// Only [`EngineKind::Portable`] has the cipher, and it may not be used ([`require_module`]).
    #[error(
        "{cipher} is not in the validated module (--fips-mode validated); AES-256-XTS is: a key of 64 bytes"
    )]
    NotInModule {
        /// The cipher.
        cipher: XtsCipher,
    },
}

static MODULE_ONLY: AtomicBool = AtomicBool::new(false);

/// From now on, keys are taken only for ciphers that AWS-LC executes, in the whole process.
pub fn require_module() {
    MODULE_ONLY.store(true, Ordering::Relaxed);
}

/// A whole XTS key: the data key, then the tweak key.
pub struct XtsKey {
    cipher: XtsCipher,
    bytes: SecretBytes,
}

impl XtsKey {
    /// The key in `bytes` (data key first, tweak key second); its length chooses the cipher.
    ///
    /// # Errors
    /// Wrong length, or equal halves.
    pub fn new(bytes: &[u8]) -> Result<XtsKey, KeyError> {
        let cipher =
            XtsCipher::with_key_bytes(bytes.len()).ok_or(KeyError::Length { got_bytes: bytes.len() })?;
        XtsKey::for_cipher(cipher, bytes)
    }

    /// The key in `bytes`, which must be one for `cipher`.
    ///
    /// # Errors
    /// Wrong length, or equal halves.
    pub fn for_cipher(cipher: XtsCipher, bytes: &[u8]) -> Result<XtsKey, KeyError> {
        if bytes.len() != cipher.key_bytes() {
            return Err(KeyError::LengthForCipher { cipher, got_bytes: bytes.len() });
        }
        if MODULE_ONLY.load(Ordering::Relaxed) && !EngineKind::AwsLc.supports(cipher) {
            return Err(KeyError::NotInModule { cipher });
        }
        let (data, tweak) = bytes.split_at(bytes.len() / 2);
        // No early exit: where the halves differ is nobody's business.
        if data.iter().zip(tweak).fold(0, |diff, (a, b)| diff | (a ^ b)) == 0 {
            return Err(KeyError::EqualHalves);
        }
        Ok(XtsKey { cipher, bytes: SecretBytes::from_slice(bytes) })
    }

    /// The key from its two halves, as SPDK's `accel_crypto_key_create` takes them (`key`, `key2`).
    ///
    /// # Errors
    /// Halves of different or wrong lengths, or equal halves.
    pub fn from_halves(key: &[u8], key2: &[u8]) -> Result<XtsKey, KeyError> {
        if key.len() != key2.len() {
            return Err(KeyError::Halves { key_bytes: key.len(), key2_bytes: key2.len() });
        }
        let whole = Zeroizing::new([key, key2].concat());
        XtsKey::new(&whole)
    }

    /// The cipher that the key is for.
    pub fn cipher(&self) -> XtsCipher {
        self.cipher
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.expose()
    }
}

impl fmt::Debug for XtsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "XtsKey({}, [redacted])", self.cipher)
    }
}

/// One direction of the cipher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Plaintext to ciphertext.
    Encrypt,
    /// Ciphertext to plaintext.
    Decrypt,
}

/// Which implementation runs the cipher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EngineKind {
    /// AWS-LC: AES-256-XTS only, vectorised.
    AwsLc,
    /// The `aes` and `xts-mode` crates: both ciphers.
    Portable,
}

impl EngineKind {
    /// The name that reports and RPCs use.
    pub const fn name(self) -> &'static str {
        match self {
            EngineKind::AwsLc => "aws-lc",
            EngineKind::Portable => "portable",
        }
    }

    /// Whether the engine has the cipher.
    pub const fn supports(self, cipher: XtsCipher) -> bool {
        matches!((self, cipher), (EngineKind::Portable, _) | (EngineKind::AwsLc, XtsCipher::Aes256))
    }

    /// The fastest engine that has the cipher.
    pub const fn fastest(cipher: XtsCipher) -> EngineKind {
        match cipher {
            XtsCipher::Aes256 => EngineKind::AwsLc,
            XtsCipher::Aes128 => EngineKind::Portable,
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An engine that can not be set up.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum EngineError {
    /// The engine does not have the cipher.
    #[error("the {engine} engine has no {cipher}")]
    Unsupported {
        /// The engine.
        engine: EngineKind,
        /// What it lacks.
        cipher: XtsCipher,
    },
    /// The library refused to make a context or to take the key.
    #[error("the {engine} engine could not be set up for {cipher}: {reason}")]
    Setup {
        /// The engine.
        engine: EngineKind,
        /// The cipher.
        cipher: XtsCipher,
        /// The library's words.
        reason: String,
    },
}

/// XTS on one data unit. `tweak` is the data unit number.
///
/// `&self`, but not for sharing: an engine holds working state and belongs to one thread (it is [`Send`], not [`Sync`]).
///
/// # Panics
/// All methods: when source and destination differ in length, or the length is not a multiple of 16 in
/// 16..=[`MAX_UNIT_BYTES`]: our own bug, never a host's.
pub trait XtsEngine: Send {
    /// Encrypts `src` into `dst`.
    fn encrypt(&self, tweak: u128, src: &[u8], dst: &mut [u8]);
    /// Decrypts `src` into `dst`.
    fn decrypt(&self, tweak: u128, src: &[u8], dst: &mut [u8]);
    /// Encrypts `unit` where it lies.
    fn encrypt_in_place(&self, tweak: u128, unit: &mut [u8]);
    /// Decrypts `unit` where it lies.
    fn decrypt_in_place(&self, tweak: u128, unit: &mut [u8]);
}

pub(crate) fn check_unit(bytes: usize) {
    assert!(
        bytes.is_multiple_of(AES_BLOCK_BYTES) && (AES_BLOCK_BYTES..=MAX_UNIT_BYTES).contains(&bytes),
        "a data unit of {bytes} bytes"
    );
}

enum Engine {
    AwsLc(awslc::AwsLc),
    Portable(portable::Portable),
}

/// A key set up for use on one thread: what a device keeps per queue.
pub struct XtsContext {
    engine: Engine,
    kind: EngineKind,
    scratch: run::Scratch,
}

impl XtsContext {
    /// Sets up `key` on the fastest engine that has its cipher.
    ///
    /// # Errors
    /// When the library can not make a context (memory).
    pub fn new(key: &XtsKey) -> Result<XtsContext, EngineError> {
        XtsContext::with_engine(EngineKind::fastest(key.cipher()), key)
    }

    /// Sets up `key` on a chosen engine.
    ///
    /// # Errors
    /// When the engine does not have the key's cipher, or the library can not make a context.
    pub fn with_engine(kind: EngineKind, key: &XtsKey) -> Result<XtsContext, EngineError> {
        let engine = match kind {
            EngineKind::AwsLc => Engine::AwsLc(awslc::AwsLc::new(key)?),
            EngineKind::Portable => Engine::Portable(portable::Portable::new(key)),
        };
        Ok(XtsContext { engine, kind, scratch: run::Scratch::default() })
    }

    /// The engine at work.
    pub fn kind(&self) -> EngineKind {
        self.kind
    }

    /// `src` to `dst`, one data unit.
    #[inline]
    pub fn unit(&self, direction: Direction, tweak: u128, src: &[u8], dst: &mut [u8]) {
        match direction {
            Direction::Encrypt => self.encrypt(tweak, src, dst),
            Direction::Decrypt => self.decrypt(tweak, src, dst),
        }
    }

    /// One data unit where it lies.
    #[inline]
    pub fn unit_in_place(&self, direction: Direction, tweak: u128, unit: &mut [u8]) {
        match direction {
            Direction::Encrypt => self.encrypt_in_place(tweak, unit),
            Direction::Decrypt => self.decrypt_in_place(tweak, unit),
        }
    }
}

impl fmt::Debug for XtsContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "XtsContext({}, [redacted])", self.kind)
    }
}

macro_rules! dispatch {
    ($self:ident . $method:ident ( $($arg:ident),* )) => {
        match &$self.engine {
            Engine::AwsLc(e) => e.$method($($arg),*),
            Engine::Portable(e) => e.$method($($arg),*),
        }
    };
}

impl XtsEngine for XtsContext {
    #[inline]
    fn encrypt(&self, tweak: u128, src: &[u8], dst: &mut [u8]) {
        dispatch!(self.encrypt(tweak, src, dst));
    }
    #[inline]
    fn decrypt(&self, tweak: u128, src: &[u8], dst: &mut [u8]) {
        dispatch!(self.decrypt(tweak, src, dst));
    }
    #[inline]
    fn encrypt_in_place(&self, tweak: u128, unit: &mut [u8]) {
        dispatch!(self.encrypt_in_place(tweak, unit));
    }
    #[inline]
    fn decrypt_in_place(&self, tweak: u128, unit: &mut [u8]) {
        dispatch!(self.decrypt_in_place(tweak, unit));
    }
}
