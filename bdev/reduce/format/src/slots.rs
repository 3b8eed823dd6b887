//! The key block: up to twelve slots, each with the pool key wrapped by another key-encryption key.
//!
//! It lies in every anchor next to the superblock and changes only when keys do, so that checkpoints never rewrite keys.
//! After a change all copies are written, two at a time with a flush between, as with the superblock.
//!
//! ```text
//! 0      block head, generation = change number
//! 56     slot count u16 (12), reserved u16, u32
//! 64     12 slots of 320 bytes
//! 3904   two erasure secrets of 40 bytes, wrapped (zeros: none); see [`KeyBlock::erasure`]
//! 3984   reserved, zero
//! ```
//!
//! Slot:
//!
//! ```text
//! 0      kind u8 (0 = empty), wrap u8, kdf u8, reference bytes u8
//! 4      kdf: memory KiB u32, passes or iterations u32, lanes u32
//! 16     created, ms since 1970, u64
//! 24     id of the key-encryption key [16]
//! 40     wrapped pool key [40]
//! 80     kdf salt [32]
//! 112    label [48], UTF-8
//! 160    reference [160]: the key's name at the KMS (KMIP unique identifier), UTF-8
//! ```

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::{
    self, Block, BlockError, BlockHead, BlockKey, BlockKind, BlockPlace, Unverified, malformed, zero,
};
use crate::ids::DeviceIx;
use crate::keys::{self, Kek, KeyError, PoolKey, PoolKeys, Secret, WRAPPED_BYTES};

/// Slots of a key block.
pub const MAX_KEY_SLOTS: usize = 12;
/// Bytes of a slot.
pub const SLOT_BYTES: usize = 320;
const LABEL_BYTES: usize = 48;
const REFERENCE_BYTES: usize = 160;

/// Where a slot's key-encryption key comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum SlotKind {
    /// A key file.
    KeyFile = 1,
    /// A password and a [`Kdf`].
    Password = 2,
    /// A key server; the slot's reference names the key.
    Kms = 3,
    /// Encryption is off: wrapped with [`Kek::open`], which everybody knows.
    Open = 4,
}

/// How a password becomes a key-encryption key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kdf {
    /// Not from a password.
    None,
    /// Argon2id (RFC 9106), version 0x13, 32 bytes.
    Argon2id {
        /// Memory in KiB.
        memory_kib: u32,
        /// Passes.
        passes: u32,
        /// Lanes.
        lanes: u32,
        /// Salt.
        salt: [u8; 32],
    },
    /// PBKDF2-HMAC-SHA-256 (RFC 8018), 32 bytes: the FIPS modes.
    Pbkdf2 {
        /// Iterations.
        iterations: u32,
        /// Salt.
        salt: [u8; 32],
    },
}

/// Most memory that an Argon2id slot may ask for: 4 GiB.
pub const MAX_KDF_MEMORY_KIB: u32 = 4 << 20;
/// Most passes that an Argon2id slot may ask for.
pub const MAX_KDF_PASSES: u32 = 1000;
/// Most iterations that a PBKDF2 slot may ask for.
pub const MAX_KDF_ITERATIONS: u32 = 100_000_000;

/// A key slot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeySlot {
    /// Where its key-encryption key comes from.
    pub kind: SlotKind,
    /// How a password becomes that key.
    pub kdf: Kdf,
    /// [`Kek::id`].
    pub kek_id: [u8; 16],
    /// The pool key under it (RFC 3394).
    pub wrapped: [u8; WRAPPED_BYTES],
    /// When it was made, in ms since 1970.
    pub created_ms: u64,
    /// For people, at most 48 bytes.
    pub label: String,
    /// The key's name at the KMS, at most 160 bytes.
    pub reference: String,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SlotRaw {
    kind: u8,
    wrap: u8,
    kdf: u8,
    reference_len: u8,
    memory_kib: U32,
    passes: U32,
    lanes: U32,
    created_ms: U64,
    kek_id: [u8; 16],
    wrapped: [u8; WRAPPED_BYTES],
    salt: [u8; 32],
    label: [u8; LABEL_BYTES],
    reference: [u8; REFERENCE_BYTES],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct KeyBlockRaw {
    head: BlockHead,
    slot_count: U16,
    reserved0: U16,
    reserved1: U32,
    slots: [SlotRaw; MAX_KEY_SLOTS],
    erasure: [[u8; WRAPPED_BYTES]; 2],
    reserved: [u8; 64],
}

const _: () = assert!(size_of::<SlotRaw>() == SLOT_BYTES && size_of::<KeyBlockRaw>() == 4048);

/// AES key wrap, RFC 3394.
const WRAP_RFC3394: u8 = 1;

impl Kek {
    /// The public key-encryption key of pools without encryption: hides nothing, keeps one format for both.
    pub fn open() -> Self {
        let mut public = *b"cryptfold: no encryption. public";
        Self(Secret::take(&mut public))
    }
}

impl KeySlot {
    /// A slot with `key` wrapped by `kek`.
    pub fn seal(
        kind: SlotKind,
        kdf: Kdf,
        kek: &Kek,
        key: &PoolKey,
        created_ms: u64,
    ) -> Result<Self, KeyError> {
        let wrapped = kek.wrap(key)?;
        let (label, reference) = (String::new(), String::new());
        Ok(Self { kind, kdf, kek_id: kek.id(), wrapped, created_ms, label, reference })
    }

    /// Unwraps the pool key.
    pub fn open(&self, kek: &Kek) -> Result<PoolKey, KeyError> {
        kek.unwrap(&self.wrapped)
    }

    /// The slot's 320 bytes; also how a domain's own slots are recorded.
    pub fn encode(&self) -> Result<[u8; SLOT_BYTES], BlockError> {
        if self.label.len() > LABEL_BYTES {
            return Err(malformed("slot label's length", self.label.len() as u64));
        }
        if self.reference.len() > REFERENCE_BYTES {
            return Err(malformed("slot reference's length", self.reference.len() as u64));
        }
        let (kdf, memory_kib, passes, lanes, salt) = match self.kdf {
            Kdf::None => (0, 0, 0, 0, [0; 32]),
            Kdf::Argon2id { memory_kib, passes, lanes, salt } => (1, memory_kib, passes, lanes, salt),
            Kdf::Pbkdf2 { iterations, salt } => (2, 0, iterations, 0, salt),
        };
        let raw = SlotRaw {
            kind: self.kind as u8,
            wrap: WRAP_RFC3394,
            kdf,
            reference_len: self.reference.len() as u8,
            memory_kib: memory_kib.into(),
            passes: passes.into(),
            lanes: lanes.into(),
            created_ms: self.created_ms.into(),
            kek_id: self.kek_id,
            wrapped: self.wrapped,
            salt,
            label: block::put_text(&self.label),
            reference: block::put_text(&self.reference),
        };
        Self::from_raw(&raw)?;
        Ok(zerocopy::transmute!(raw))
    }

    /// Parses [`SLOT_BYTES`] bytes; `None` if the slot is empty.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, BlockError> {
        let raw = SlotRaw::ref_from_bytes(bytes).map_err(|_| malformed("slot bytes", bytes.len() as u64))?;
        if raw.kind == 0 {
            zero("empty slot", bytes)?;
            return Ok(None);
        }
        Self::from_raw(raw).map(Some)
    }

    fn from_raw(raw: &SlotRaw) -> Result<Self, BlockError> {
        let kind = match raw.kind {
            1 => SlotKind::KeyFile,
            2 => SlotKind::Password,
            3 => SlotKind::Kms,
            4 => SlotKind::Open,
            other => return Err(malformed("slot kind", other)),
        };
        if raw.wrap != WRAP_RFC3394 {
            return Err(malformed("slot wrap algorithm", raw.wrap));
        }
        let (memory_kib, passes, lanes, salt) =
            (raw.memory_kib.get(), raw.passes.get(), raw.lanes.get(), raw.salt);
        let kdf = match raw.kdf {
            0 if memory_kib | passes | lanes == 0 && salt == [0; 32] => Kdf::None,
            1 if (8..=MAX_KDF_MEMORY_KIB).contains(&memory_kib)
                && (1..=MAX_KDF_PASSES).contains(&passes)
                && (1..=memory_kib / 8).contains(&lanes) =>
            {
                Kdf::Argon2id { memory_kib, passes, lanes, salt }
            }
            2 if memory_kib | lanes == 0 && (1..=MAX_KDF_ITERATIONS).contains(&passes) => {
                Kdf::Pbkdf2 { iterations: passes, salt }
            }
            other => return Err(malformed("slot key derivation", other)),
        };
        if (kind == SlotKind::Password) != (kdf != Kdf::None) {
            return Err(malformed("slot key derivation", raw.kdf));
        }
        let reference = block::text("slot reference", &raw.reference)?;
        if reference.len() != usize::from(raw.reference_len) {
            return Err(malformed("slot reference's length", raw.reference_len));
        }
        Ok(Self {
            kind,
            kdf,
            kek_id: raw.kek_id,
            wrapped: raw.wrapped,
            created_ms: raw.created_ms.get(),
            label: block::text("slot label", &raw.label)?,
            reference,
        })
    }
}

/// The key block of a pool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyBlock {
    /// The pool.
    pub pool: Uuid,
    /// Counts the changes.
    pub generation: u64,
    /// The slots.
    pub slots: [Option<KeySlot>; MAX_KEY_SLOTS],
    /// The erasure secret, wrapped with the pool's wrap key, and the one before it while it is being replaced: the domains' keys
    /// are wrapped with it (see [`crate::keys::DomainWraps`]), so once it is overwritten, here and only here, no old copy of a
    /// wrapped key opens. `None`: a pool made before there was one.
    pub erasure: [Option<[u8; WRAPPED_BYTES]>; 2],
}

impl KeyBlock {
    /// The block for copy `copy` at byte `offset_bytes` of `device`.
    pub fn encode(
        &self,
        key: &BlockKey,
        device: DeviceIx,
        copy: u16,
        offset_bytes: u64,
    ) -> Result<Box<Block>, BlockError> {
        let place = BlockPlace { device, copy, segment: Default::default(), offset_bytes };
        let mut raw = KeyBlockRaw {
            head: BlockHead::new(BlockKind::Keys, self.pool, place, self.generation),
            slot_count: (MAX_KEY_SLOTS as u16).into(),
            reserved0: 0.into(),
            reserved1: 0.into(),
            slots: zerocopy::FromZeros::new_zeroed(),
            erasure: self.erasure.map(|secret| secret.unwrap_or([0; WRAPPED_BYTES])),
            reserved: [0; 64],
        };
        for (raw, slot) in raw.slots.iter_mut().zip(&self.slots) {
            if let Some(slot) = slot {
                *raw = zerocopy::transmute!(slot.encode()?);
            }
        }
        Ok(block::stamp(&raw, key))
    }

    /// Parses the block read at byte `offset_bytes` of a device. Its slots are needed before the MAC can be checked: unwrap
    /// the pool key from a slot of [`Unverified::peek`], then verify.
    pub fn parse(block: &Block, offset_bytes: u64) -> Result<Unverified<Self>, BlockError> {
        let raw = block::open::<KeyBlockRaw>(block, BlockKind::Keys, offset_bytes)?;
        if raw.slot_count != MAX_KEY_SLOTS as u16 {
            return Err(malformed("slot count", raw.slot_count.get()));
        }
        zero("reserved", raw.reserved0.as_bytes())?;
        zero("reserved", raw.reserved1.as_bytes())?;
        zero("reserved", &raw.reserved)?;
        let mut slots = [const { None }; MAX_KEY_SLOTS];
        for (slot, raw) in slots.iter_mut().zip(&raw.slots) {
            *slot = KeySlot::decode(raw.as_bytes())?;
        }
        let erasure = raw.erasure.map(|secret| (secret != [0; WRAPPED_BYTES]).then_some(secret));
        if erasure[0].is_none() && erasure[1].is_some() {
            return Err(malformed("former erasure secret", 1u8));
        }
        let keys = Self { pool: raw.head.pool(), generation: raw.head.generation.get(), slots, erasure };
        Ok(block::unverified(keys, block))
    }

    /// A block with `slots` and a fresh erasure secret.
    ///
    /// # Errors
    /// [`KeyError`] when wrapping fails.
    pub fn new(
        keys: &PoolKeys,
        generation: u64,
        slots: [Option<KeySlot>; MAX_KEY_SLOTS],
        secret: &Secret,
    ) -> Result<Self, KeyError> {
        let erasure = [Some(keys::wrap(keys.wrap_key(), secret)?), None];
        Ok(Self { pool: keys.pool(), generation, slots, erasure })
    }

    /// The pool key from the first slot that `kek` fits, trying slots with its id first.
    pub fn unlock(&self, kek: &Kek) -> Result<(usize, PoolKey), KeyError> {
        let id = kek.id();
        let slots = || self.slots.iter().enumerate().filter_map(|(at, slot)| Some((at, slot.as_ref()?)));
        slots()
            .filter(|(_, slot)| slot.kek_id == id)
            .chain(slots().filter(|(_, slot)| slot.kek_id != id))
            .find_map(|(at, slot)| Some((at, slot.open(kek).ok()?)))
            .ok_or(KeyError::DoesNotFit)
    }
}

#[cfg(test)]
pub(crate) fn layouts() -> Vec<crate::layout::Layout> {
    use crate::layout::layout;
    vec![
        layout!("key block", KeyBlockRaw { head slot_count reserved0 reserved1 slots erasure reserved }),
        layout!("key slot", SlotRaw { kind wrap kdf reference_len memory_kib passes lanes created_ms kek_id wrapped salt label reference }),
    ]
}
