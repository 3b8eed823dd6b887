//! Passwords for pools: from a password to a key-encryption key, slots of a pool's key block that passwords open, and the
//! encrypted back-up of all slots and the superblock. No I/O; salts and the time come from the caller.
//!
//! ```text
//!   password --Argon2id or PBKDF2, as the slot says--> key-encryption key --AES key wrap--> pool key
//! ```
//!
//! Invariants:
//! - A pool key stays reachable: the last slot can not be removed, and a password is changed by putting the new slot in the
//!   old one's place in one step.
//! - What a slot asks for (memory, time) is checked against the caller's [`Limits`] first: slots come from a device.
//! - Passwords and keys are zeroed when dropped, Argon2's memory too, and are in no error and no debug output.

mod export;
mod password;

use cryptfold_reduce_format::block::BlockError;
use cryptfold_reduce_format::keys::{Kek, KeyError, PoolKey};
use cryptfold_reduce_format::slots::{Kdf, KeyBlock, KeySlot, SlotKind};
use thiserror::Error;

pub use export::{Backup, ExportError, export, import, parse_content};
pub use password::{Cost, Limits, MIN_APPROVED_BYTES, MIN_PASSWORD_CHARS, Password, PasswordError, derive};

/// Why slots were not opened or not changed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum StoreError {
    /// The password can not be used, or deriving its key failed.
    #[error(transparent)]
    Password(#[from] PasswordError),
    /// No slot takes a password.
    #[error("no key slot of this pool takes a password")]
    NoPasswordSlot,
    /// None of them takes this one.
    #[error("the password opens no key slot of this pool")]
    WrongPassword,
    /// All slots are in use.
    #[error("all {0} key slots are in use; remove one first")]
    Full(usize),
    /// There is nothing in the slot.
    #[error("key slot {0} is empty")]
    Empty(usize),
    /// Nothing else could open the pool.
    #[error("key slot {0} is the last one: without it nothing opens the pool")]
    Last(usize),
    /// The label is too long.
    #[error("the slot can not be stored: {0}")]
    Slot(#[from] BlockError),
    /// Key wrap failed.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// What a new slot is made with.
#[derive(Clone, Debug)]
pub struct NewSlot<'a> {
    /// Cost of trying a password.
    pub cost: Cost,
    /// 32 fresh random bytes.
    pub salt: [u8; 32],
    /// Now, in ms since 1970.
    pub created_ms: u64,
    /// For people, at most 48 bytes.
    pub label: &'a str,
}

fn seal(
    key: &PoolKey,
    password: &Password,
    new: &NewSlot<'_>,
    limits: &Limits,
) -> Result<KeySlot, StoreError> {
    let kdf = new.cost.with_salt(new.salt);
    let kek = derive(password, &kdf, limits)?;
    let mut slot = KeySlot::seal(SlotKind::Password, kdf, &kek, key, new.created_ms)?;
    slot.label = new.label.into();
    // What could not be stored is refused before anything is changed.
    slot.encode()?;
    Ok(slot)
}

/// The pool key, from the first slot that the password opens; and that slot's number. Takes as long as all password slots
/// before it ask for: for ordinary threads.
///
/// # Errors
/// [`StoreError::WrongPassword`], no slot for passwords, or slots that ask for more than the limits.
pub fn unlock(
    block: &KeyBlock,
    password: &Password,
    limits: &Limits,
) -> Result<(usize, PoolKey), StoreError> {
    find(block, password, limits).map(|(at, _, key)| (at, key))
}

/// As [`unlock`], with the key-encryption key of that slot, for whoever opens the pool.
///
/// # Errors
/// As [`unlock`].
pub fn find(
    block: &KeyBlock,
    password: &Password,
    limits: &Limits,
) -> Result<(usize, Kek, PoolKey), StoreError> {
    let slots = block.slots.iter().enumerate().filter_map(|(at, slot)| Some((at, slot.as_ref()?)));
    let mut refused = StoreError::NoPasswordSlot;
    for (at, slot) in slots.filter(|(_, s)| s.kind == SlotKind::Password) {
        match derive(password, &slot.kdf, limits) {
            Ok(kek) => match slot.open(&kek) {
                Ok(key) => return Ok((at, kek, key)),
                Err(_) if refused == StoreError::NoPasswordSlot => refused = StoreError::WrongPassword,
                Err(_) => {}
            },
            // One slot that can not be tried must not hide another that opens.
            Err(e) => refused = e.into(),
        }
    }
    Err(refused)
}

/// What a new pool's first slot needs when a password is to open it.
///
/// # Errors
/// A cost that is impossible.
pub fn fresh(
    password: &Password,
    cost: Cost,
    salt: [u8; 32],
    limits: &Limits,
) -> Result<(Kek, Kdf), StoreError> {
    let kdf = cost.with_salt(salt);
    Ok((derive(password, &kdf, limits)?, kdf))
}

/// Adds a slot that `password` opens; its number. The block's generation grows.
///
/// # Errors
/// No free slot, a password or label that can not be used.
pub fn add_password(
    block: &mut KeyBlock,
    key: &PoolKey,
    password: &Password,
    new: &NewSlot<'_>,
    limits: &Limits,
) -> Result<usize, StoreError> {
    let at = block.slots.iter().position(Option::is_none).ok_or(StoreError::Full(block.slots.len()))?;
    block.slots[at] = Some(seal(key, password, new, limits)?);
    block.generation += 1;
    Ok(at)
}

/// Puts a slot that `new_password` opens in the place of the one that `old` opens; its number. The old slot's label stays
/// unless a new one is given. The block's generation grows. `old_limits` are for trying what is there, `limits` for the new slot.
///
/// # Errors
/// As [`unlock`] and [`add_password`]; nothing is changed then.
pub fn change_password(
    block: &mut KeyBlock,
    (old, old_limits): (&Password, &Limits),
    new_password: &Password,
    new: &NewSlot<'_>,
    limits: &Limits,
) -> Result<usize, StoreError> {
    let (at, key) = unlock(block, old, old_limits)?;
    let label = match (new.label, &block.slots[at]) {
        ("", Some(slot)) => slot.label.clone(),
        (label, _) => label.into(),
    };
    block.slots[at] = Some(seal(&key, new_password, &NewSlot { label: &label, ..new.clone() }, limits)?);
    block.generation += 1;
    Ok(at)
}

/// Empties a slot. Its wrapped key may survive on flash: that is no erasure. The block's generation grows.
///
/// # Errors
/// An empty slot, or the last one.
pub fn remove(block: &mut KeyBlock, at: usize) -> Result<(), StoreError> {
    if block.slots.get(at).is_none_or(Option::is_none) {
        return Err(StoreError::Empty(at));
    }
    if block.slots.iter().flatten().count() == 1 {
        return Err(StoreError::Last(at));
    }
    block.slots[at] = None;
    block.generation += 1;
    Ok(())
}
