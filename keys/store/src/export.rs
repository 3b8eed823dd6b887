//! The back-up of a pool's key slots and superblock: a JSON file that a password of its own protects.
//!
//! `{"format": "cryptfold key slots 2", "pool": UUID, "created_ms": N, "kdf": {...}, "slots": BASE64, "superblock": BASE64}`. The
//! superblock is the block of 4096 bytes as it was read, `slots` is what follows; both are under AES key wrap
//! with padding (RFC 5649), which also proves them whole:
//!
//! ```text
//! 0      pool UUID [16]
//! 16     generation of the key block u64
//! 24     12 slots of 320 bytes, as in the key block
//! 3864   two erasure secrets of 40 bytes, as in the key block
//! ```

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cryptfold_reduce_format::block::{BLOCK_BYTES, Block};
use cryptfold_reduce_format::keys::{WRAPPED_BYTES, unwrap_padded, wrap_padded};
use cryptfold_reduce_format::slots::{Kdf, KeyBlock, KeySlot, MAX_KEY_SLOTS, SLOT_BYTES};
use serde_json::{Value, json};
use thiserror::Error;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::password::{Cost, Limits, Password, PasswordError, derive};

const FORMAT: &str = "cryptfold key slots 2";
const SLOTS_END: usize = 24 + MAX_KEY_SLOTS * SLOT_BYTES;
const CONTENT_BYTES: usize = SLOTS_END + 2 * WRAPPED_BYTES;
/// No back-up is longer.
const MAX_TEXT_BYTES: usize = 32 << 10;

/// What is backed up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backup {
    /// The key block.
    pub keys: KeyBlock,
    /// A copy of the superblock, as read from the device; not verified.
    pub superblock: Box<Block>,
}

/// Why a back-up was not written or not read.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ExportError {
    /// No back-up of this version.
    #[error("no back-up of key slots: {0}")]
    Format(&'static str),
    /// The password can not be used.
    #[error(transparent)]
    Password(#[from] PasswordError),
    /// Another password, or a damaged file.
    #[error("the back-up does not open: another password, or the file is damaged")]
    DoesNotOpen,
    /// A slot can not be stored.
    #[error("key slot {at}: {why}")]
    Slot {
        /// Its number.
        at: usize,
        /// What is wrong.
        why: String,
    },
}

/// The back-up's text. `salt`: 32 fresh random bytes; `created_ms`: since 1970.
///
/// # Errors
/// Slots that can not be stored, a cost that is impossible.
pub fn export(
    backup: &Backup,
    password: &Password,
    cost: Cost,
    salt: [u8; 32],
    created_ms: u64,
) -> Result<String, ExportError> {
    let block = &backup.keys;
    let mut content = Zeroizing::new(Vec::with_capacity(CONTENT_BYTES));
    content.extend_from_slice(block.pool.as_bytes());
    content.extend_from_slice(&block.generation.to_le_bytes());
    for (at, slot) in block.slots.iter().enumerate() {
        let encoded = match slot {
            Some(slot) => slot.encode().map_err(|e| ExportError::Slot { at, why: e.to_string() })?,
            None => [0; SLOT_BYTES],
        };
        content.extend_from_slice(&encoded);
    }
    for secret in &block.erasure {
        content.extend_from_slice(&secret.unwrap_or([0; WRAPPED_BYTES]));
    }
    let limits = Limits { approved: matches!(cost, Cost::Pbkdf2 { .. }), ..Limits::default() };
    let kek = derive(password, &cost.with_salt(salt), &limits)?;
    let wrap = |plain: &[u8]| wrap_padded(&kek.0, plain).map_err(|_| ExportError::Format("it is too long"));
    let wrapped = wrap(&content)?;
    let salt = STANDARD.encode(salt);
    let kdf = match cost {
        Cost::Argon2id { memory_kib, passes, lanes } => {
            json!({"name": "argon2id", "memory_kib": memory_kib, "passes": passes, "lanes": lanes, "salt": salt})
        }
        Cost::Pbkdf2 { iterations } => {
            json!({"name": "pbkdf2-sha256", "iterations": iterations, "salt": salt})
        }
    };
    let file = json!({
        "format": FORMAT, "pool": block.pool.to_string(), "created_ms": created_ms, "kdf": kdf,
        "slots": STANDARD.encode(wrapped), "superblock": STANDARD.encode(wrap(backup.superblock.as_slice())?),
    });
    Ok(format!("{file:#}\n"))
}

fn kdf(file: &Value) -> Option<Kdf> {
    let kdf = &file["kdf"];
    let number = |name: &str| kdf[name].as_u64().and_then(|n| u32::try_from(n).ok());
    let salt = <[u8; 32]>::try_from(STANDARD.decode(kdf["salt"].as_str()?).ok()?).ok()?;
    Some(match kdf["name"].as_str()? {
        "argon2id" => Kdf::Argon2id {
            memory_kib: number("memory_kib")?,
            passes: number("passes")?,
            lanes: number("lanes")?,
            salt,
        },
        "pbkdf2-sha256" => Kdf::Pbkdf2 { iterations: number("iterations")?, salt },
        _ => return None,
    })
}

/// What a back-up has. Its keys are still wrapped, each by its own slot's key.
///
/// # Errors
/// See [`ExportError`].
pub fn import(text: &str, password: &Password, limits: &Limits) -> Result<Backup, ExportError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(ExportError::Format("it is too long"));
    }
    let file: Value = serde_json::from_str(text).map_err(|_| ExportError::Format("it is no JSON"))?;
    if file["format"] != FORMAT {
        return Err(ExportError::Format("\"format\" is another one"));
    }
    let kdf = kdf(&file).ok_or(ExportError::Format("\"kdf\" is none that is known"))?;
    let slots = file["slots"].as_str().and_then(|s| STANDARD.decode(s).ok());
    let wrapped = slots.ok_or(ExportError::Format("\"slots\" is no base64"))?;
    let kek = derive(password, &kdf, limits)?;
    let content = unwrap_padded(&kek.0, &wrapped).map_err(|_| ExportError::DoesNotOpen)?;
    let block = parse_content(&content)?;
    let wrapped = file["superblock"].as_str().and_then(|s| STANDARD.decode(s).ok());
    let wrapped = wrapped.ok_or(ExportError::Format("\"superblock\" is no base64"))?;
    let plain = unwrap_padded(&kek.0, &wrapped).map_err(|_| ExportError::DoesNotOpen)?;
    let plain = <[u8; BLOCK_BYTES]>::try_from(plain.as_slice());
    let superblock = Box::new(plain.map_err(|_| ExportError::Format("\"superblock\" has another length"))?);
    Ok(Backup { keys: block, superblock })
}

/// The key block in a back-up's envelope, [`CONTENT_BYTES`] bytes; see the module's head. Public to be fuzzed.
#[doc(hidden)]
pub fn parse_content(content: &[u8]) -> Result<KeyBlock, ExportError> {
    let (Some((pool, rest)), CONTENT_BYTES) = (content.split_first_chunk::<16>(), content.len()) else {
        return Err(ExportError::Format("\"slots\" has another length"));
    };
    let Some((generation, rest)) = rest.split_first_chunk::<8>() else {
        return Err(ExportError::Format("\"slots\" has another length"));
    };
    let mut block = KeyBlock {
        pool: Uuid::from_bytes(*pool),
        generation: u64::from_le_bytes(*generation),
        slots: [const { None }; MAX_KEY_SLOTS],
        erasure: [None, None],
    };
    let (slots, secrets) = rest.split_at(SLOTS_END - 24);
    for (secret, bytes) in block.erasure.iter_mut().zip(secrets.as_chunks::<WRAPPED_BYTES>().0) {
        *secret = (*bytes != [0; WRAPPED_BYTES]).then_some(*bytes);
    }
    for (at, bytes) in slots.chunks_exact(SLOT_BYTES).enumerate() {
        block.slots[at] = KeySlot::decode(bytes).map_err(|e| ExportError::Slot { at, why: e.to_string() })?;
    }
    Ok(block)
}
