//! The journal: per shard a ring of 4 KiB blocks, written in batches.
//!
//! A batch is what becomes durable together. Batches of a shard are numbered without a gap and chained: each names its
//! predecessor's tag. Replay begins where the superblock says and ends at the first batch that is not the next one.
//! [`BatchHeader::durable`] tells a torn end from damage: if a later batch opens and calls a missing one durable, the
//! journal is damaged, not cut off.
//!
//! ```text
//! 0      magic "CFJRNL01", pool UUID [16]
//! 24     shard u16, flags u16 (1: stored nonces), blocks u32
//! 32     owner epoch u64, sequence u64, position u64 (in blocks since the pool was made), durable sequence u64
//! 64     payload bytes u32, groups u32
//! 72     tag of the previous batch [16]
//! 88     epoch salt [16]: with owner epoch and shard it makes the batch's key
//! 104    reserved [8]
//! 112    tag of this batch [16]: AES-256-GCM, nonce = sequence, associated data = bytes 0..112
//! 128    payload, encrypted, filled up with zeros to whole blocks
//! ```
//!
//! Sealing anything twice under one sequence would break the cipher, so a [`BatchSealer`] counts for itself; each opening
//! of the pool draws a new salt and a new owner epoch, so a sequence used by two owners has two keys.
//!
//! The payload is a list of groups, in the order of their records. A group of a domain is sealed once more under the
//! domain's own key, so that nothing that derives from users' data outlives that key; replay skips groups of domains that
//! are erased, and the pool's own records stay readable.
//!
//! Group: scope u8 (0 pool, 1 domain, 2 domain and host), reserved u8, u16; domain u32, key generation u32, volume u32,
//! bytes u32, records; for scope 1 and 2 the bytes are encrypted and a tag [16] follows
//! (key by domain, owner epoch, shard and salt; nonce = sequence, index of the group).
//!
//! With stored nonces (pools of the FIPS modes) each nonce is random, made by the cipher library and stored: the batch's as the first 12
//! bytes of the payload, in clear, a sealed group's between its header and its records. A key seals at most 2^32 times so
//! (NIST SP 800-38D section 8.3): long before, the owner goes on with a new salt ([`BatchSealer::renew`]).
//!
//! Record: kind u8, reserved u8, body bytes u16, body. Bodies are the fixed structures of this file, unaligned.

use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce, RandomizedNonceKey};
use thiserror::Error;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::BLOCK_BYTES;
use crate::entry::{Record, RecordReader};
use crate::ids::{DomainId, Generation, OwnerEpoch, Sequence, ShardIx, VolumeId};
use crate::keys::{JournalRoot, derive};
use crate::sealed::{NONCE_BYTES, TAG_BYTES, gcm, making, seal_making, stored_nonce};
use crate::wire::{WireError, range};

/// First bytes of a batch.
pub const BATCH_MAGIC: [u8; 8] = *b"CFJRNL01";
/// Bytes of a batch's header.
pub const BATCH_HEADER_BYTES: usize = 128;
/// Bytes of a group's header.
pub const GROUP_HEADER_BYTES: usize = 20;
/// Blocks of a batch, at most: 1 MiB.
pub const MAX_BATCH_BLOCKS: u32 = 256;
/// Groups of a batch, at most.
pub const MAX_GROUPS: usize = 1024;
const FLAG_STORED_NONCES: u16 = 1;
const SIGNED_BYTES: usize = BATCH_HEADER_BYTES - TAG_BYTES;

/// Why a batch does not open.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum BatchError {
    /// No batch begins here: the end of the journal, or damage.
    #[error("no batch begins here")]
    NoBatch,
    /// Another pool's or shard's.
    #[error("batch of pool {pool}, shard {shard}")]
    Foreign {
        /// Pool.
        pool: Uuid,
        /// Shard.
        shard: ShardIx,
    },
    /// A whole batch, but not the next one: an old one, or the chain is broken.
    #[error("batch {found} at position {position}, expected {expected}")]
    NotNext {
        /// Its sequence.
        found: Sequence,
        /// Its position.
        position: u64,
        /// The sequence expected.
        expected: Sequence,
    },
    /// Its header is out of range.
    #[error("malformed batch: {0}")]
    Malformed(#[from] WireError),
    /// Torn, damaged, forged, or of another key.
    #[error("authentication of batch {sequence} failed")]
    Tag {
        /// Its sequence.
        sequence: Sequence,
    },
    /// A group of the batch does not open with its domain's key.
    #[error("authentication of group {group} in batch {sequence} failed")]
    GroupTag {
        /// The batch.
        sequence: Sequence,
        /// The group.
        group: u32,
    },
}

/// What a batch's header says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BatchHeader {
    /// Pool.
    pub pool: Uuid,
    /// Shard.
    pub shard: ShardIx,
    /// Blocks that the batch takes in the ring.
    pub blocks: u32,
    /// Owner that wrote it.
    pub owner_epoch: OwnerEpoch,
    /// Its number.
    pub sequence: Sequence,
    /// Blocks before it since the pool was made; its ring index is this modulo the ring's blocks.
    pub position: u64,
    /// Newest batch of this shard known to be durable when this one was sealed.
    pub durable: Sequence,
    /// Groups in the payload.
    pub groups: u32,
    /// Tag of the batch before.
    pub chain: [u8; TAG_BYTES],
    /// The owner's salt.
    pub salt: [u8; 16],
    /// Its own tag.
    pub tag: [u8; TAG_BYTES],
    stored_nonces: bool,
    payload_bytes: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct HeaderRaw {
    magic: [u8; 8],
    pool: [u8; 16],
    shard: U16,
    flags: U16,
    blocks: U32,
    owner_epoch: U64,
    sequence: U64,
    position: U64,
    durable: U64,
    payload_bytes: U32,
    groups: U32,
    chain: [u8; TAG_BYTES],
    salt: [u8; 16],
    reserved: [u8; 8],
    tag: [u8; TAG_BYTES],
}

const _: () = assert!(size_of::<HeaderRaw>() == BATCH_HEADER_BYTES);

impl BatchHeader {
    /// Parses the header at the front of a block; not authenticated.
    pub fn parse(bytes: &[u8]) -> Result<Self, BatchError> {
        let (raw, _) = HeaderRaw::ref_from_prefix(bytes).map_err(|_| BatchError::NoBatch)?;
        if raw.magic != BATCH_MAGIC {
            return Err(BatchError::NoBatch);
        }
        if raw.flags.get() & !FLAG_STORED_NONCES != 0 || raw.reserved != [0; 8] {
            return Err(range("batch flags", raw.flags.get()).into());
        }
        let (blocks, payload_bytes) = (raw.blocks.get(), raw.payload_bytes.get());
        if !(1..=MAX_BATCH_BLOCKS).contains(&blocks) {
            return Err(range("batch blocks", blocks).into());
        }
        let stored_nonces = raw.flags.get() & FLAG_STORED_NONCES != 0;
        let least = if stored_nonces { NONCE_BYTES } else { 0 };
        if (payload_bytes as usize) < least
            || (BATCH_HEADER_BYTES + payload_bytes as usize).div_ceil(BLOCK_BYTES) != blocks as usize
        {
            return Err(range("payload bytes", payload_bytes).into());
        }
        if raw.sequence == 0 || raw.durable.get() >= raw.sequence.get() {
            return Err(range("batch sequence", raw.sequence.get()).into());
        }
        if raw.groups.get() as usize > MAX_GROUPS {
            return Err(range("groups", raw.groups.get()).into());
        }
        Ok(Self {
            pool: Uuid::from_bytes(raw.pool),
            shard: ShardIx(raw.shard.get()),
            blocks,
            owner_epoch: OwnerEpoch(raw.owner_epoch.get()),
            sequence: Sequence(raw.sequence.get()),
            position: raw.position.get(),
            durable: Sequence(raw.durable.get()),
            groups: raw.groups.get(),
            chain: raw.chain,
            salt: raw.salt,
            tag: raw.tag,
            stored_nonces,
            payload_bytes,
        })
    }

    /// Bytes of each stored nonce.
    fn nonce_bytes(&self) -> usize {
        if self.stored_nonces { NONCE_BYTES } else { 0 }
    }

    /// The nonce that is stored, or the one of a group (the batch itself: `u32::MAX`).
    fn nonce(&self, stored: &[u8], group: u32) -> Nonce {
        <[u8; NONCE_BYTES]>::try_from(stored).map_or_else(|_| batch_nonce(self.sequence, group), stored_nonce)
    }

    /// Whether this is the batch that comes after `cursor`.
    pub fn follows(&self, cursor: &Cursor) -> Result<(), BatchError> {
        if self.pool != cursor.pool || self.shard != cursor.shard {
            return Err(BatchError::Foreign { pool: self.pool, shard: self.shard });
        }
        if (self.sequence, self.position, self.chain) != (cursor.sequence, cursor.position, cursor.chain) {
            let (found, position, expected) = (self.sequence, self.position, cursor.sequence);
            return Err(BatchError::NotNext { found, position, expected });
        }
        Ok(())
    }
}

/// Where a shard's journal goes on: the next batch's number and place, and the tag of the one before.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cursor {
    /// Pool.
    pub pool: Uuid,
    /// Shard.
    pub shard: ShardIx,
    /// Number of the next batch.
    pub sequence: Sequence,
    /// Position of the next batch in blocks.
    pub position: u64,
    /// Tag of the batch before it.
    pub chain: [u8; TAG_BYTES],
}

impl Cursor {
    /// The cursor after `header`.
    pub fn after(header: &BatchHeader) -> Self {
        Self {
            pool: header.pool,
            shard: header.shard,
            sequence: Sequence(header.sequence.0 + 1),
            position: header.position + u64::from(header.blocks),
            chain: header.tag,
        }
    }
}

/// What a journal key is bound to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct JournalEpoch {
    /// Opening of the pool.
    pub owner_epoch: OwnerEpoch,
    /// Its salt, drawn at random.
    pub salt: [u8; 16],
    /// Shard.
    pub shard: ShardIx,
    /// Whether nonces are made by the cipher library and stored.
    pub stored_nonces: bool,
}

impl JournalEpoch {
    /// The epoch that a batch was sealed in.
    pub fn of(header: &BatchHeader) -> Self {
        Self {
            owner_epoch: header.owner_epoch,
            salt: header.salt,
            shard: header.shard,
            stored_nonces: header.stored_nonces,
        }
    }
}

/// A key of one shard's journal in one epoch: of the batches (from the pool's root), or of a domain's groups.
pub struct JournalKey {
    gcm: LessSafeKey,
    /// The same key, where the library makes the nonces.
    making: Option<RandomizedNonceKey>,
    epoch: JournalEpoch,
}

impl std::fmt::Debug for JournalKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JournalKey({:?})", self.epoch)
    }
}

impl JournalKey {
    /// Derives the key.
    pub fn derive(root: &JournalRoot, epoch: JournalEpoch) -> Self {
        let context = [&epoch.owner_epoch.0.to_le_bytes()[..], &epoch.shard.0.to_le_bytes()];
        let secret = derive(&root.0, &epoch.salt, "journal epoch", &context);
        Self { gcm: gcm(&secret), making: epoch.stored_nonces.then(|| making(&secret)), epoch }
    }

    /// Seals in place with the nonce of that batch and group, or with one that is made: that one, and the tag.
    fn seal(
        &self,
        place: (Sequence, u32),
        aad: &[u8],
        body: &mut [u8],
    ) -> Result<(Option<[u8; NONCE_BYTES]>, [u8; TAG_BYTES]), SealBatchError> {
        if let Some(making) = &self.making {
            let (nonce, tag) = seal_making(making, aad, body).map_err(|_| SealBatchError::Cipher)?;
            return Ok((Some(nonce), tag));
        }
        let mut tag = [0; TAG_BYTES];
        let made = self.gcm.seal_in_place_separate_tag(batch_nonce(place.0, place.1), Aad::from(aad), body);
        tag.copy_from_slice(made.map_err(|_| SealBatchError::Cipher)?.as_ref());
        Ok((None, tag))
    }
}

fn batch_nonce(sequence: Sequence, group: u32) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&sequence.0.to_le_bytes());
    nonce[8..].copy_from_slice(&group.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// Whose records a group holds, and so which key seals them inside.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Scope {
    /// The pool's: readable with the pool key.
    Pool,
    /// A domain's, under its data key of this generation.
    Domain {
        /// Domain.
        domain: DomainId,
        /// Generation of its data key.
        generation: Generation,
    },
    /// Map records of a volume whose map is sealed with its host's key ([`crate::keys::HostMapKey::journal_root`]).
    Host {
        /// Domain.
        domain: DomainId,
        /// Generation of its data key.
        generation: Generation,
        /// Volume.
        volume: VolumeId,
    },
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct GroupRaw {
    scope: u8,
    reserved0: u8,
    reserved1: U16,
    domain: U32,
    generation: U32,
    volume: U32,
    bytes: U32,
}

const _: () = assert!(size_of::<GroupRaw>() == GROUP_HEADER_BYTES);

impl Scope {
    fn raw(self, bytes: u32) -> GroupRaw {
        let (scope, domain, generation, volume) = match self {
            Self::Pool => (0, DomainId(0), Generation(0), VolumeId(0)),
            Self::Domain { domain, generation } => (1, domain, generation, VolumeId(0)),
            Self::Host { domain, generation, volume } => (2, domain, generation, volume),
        };
        GroupRaw {
            scope,
            reserved0: 0,
            reserved1: 0.into(),
            domain: domain.0.into(),
            generation: generation.0.into(),
            volume: volume.0.into(),
            bytes: bytes.into(),
        }
    }

    fn from_raw(raw: &GroupRaw) -> Result<Self, WireError> {
        let (domain, generation) = (DomainId(raw.domain.get()), Generation(raw.generation.get()));
        let volume = VolumeId(raw.volume.get());
        let scope = match raw.scope {
            0 => Self::Pool,
            1 => Self::Domain { domain, generation },
            2 => Self::Host { domain, generation, volume },
            other => return Err(range("group scope", other)),
        };
        if scope.raw(raw.bytes.get()).as_bytes() != raw.as_bytes() {
            return Err(range("group header", raw.domain.get()));
        }
        Ok(scope)
    }
}

/// Collects the records of a batch. Reused: [`Batch::clear`] keeps its memory.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Groups as in the payload, not sealed, without room for tags.
    groups: Vec<(Scope, usize)>,
    records: Vec<u8>,
    stored_nonces: bool,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty batch whose nonces are made by the cipher library and stored.
    pub fn with_stored_nonces() -> Self {
        Self { stored_nonces: true, ..Self::default() }
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.groups.clear();
        self.records.clear();
    }

    /// Whether it has no records.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Scopes in it; [`BatchSealer::seal`] asks for their keys.
    pub fn scopes(&self) -> impl Iterator<Item = Scope> + '_ {
        self.groups.iter().map(|&(scope, _)| scope)
    }

    /// Blocks that it takes when sealed.
    pub fn blocks(&self) -> u32 {
        (BATCH_HEADER_BYTES + self.payload_bytes()).div_ceil(BLOCK_BYTES) as u32
    }

    fn payload_bytes(&self) -> usize {
        let tags = self.groups.iter().filter(|(scope, _)| *scope != Scope::Pool).count();
        let nonces = if self.stored_nonces { (1 + tags) * NONCE_BYTES } else { 0 };
        self.records.len() + self.groups.len() * GROUP_HEADER_BYTES + tags * TAG_BYTES + nonces
    }

    /// Appends a record. `Ok(false)` if the batch is full: seal it and push again to an empty one.
    pub fn push(&mut self, scope: Scope, record: &Record<'_>) -> Result<bool, WireError> {
        let start = self.records.len();
        let new_group = self.groups.last().is_none_or(|&(last, _)| last != scope);
        record.encode(&mut self.records).inspect_err(|_| self.records.truncate(start))?;
        let added = self.records.len() - start;
        if new_group {
            self.groups.push((scope, 0));
        }
        if let Some((_, bytes)) = self.groups.last_mut() {
            *bytes += added;
        }
        let full = self.blocks() > MAX_BATCH_BLOCKS || self.groups.len() > MAX_GROUPS;
        if full {
            self.records.truncate(start);
            if new_group {
                self.groups.pop();
            } else if let Some((_, bytes)) = self.groups.last_mut() {
                *bytes -= added;
            }
        }
        Ok(!full)
    }
}

/// Seals a shard's batches, each once: it alone knows the next sequence.
#[derive(Debug)]
pub struct BatchSealer {
    key: JournalKey,
    cursor: Cursor,
    seals: u64,
}

impl BatchSealer {
    /// A sealer that goes on at `cursor`, in an epoch that has sealed nothing yet (a fresh owner epoch and salt).
    pub fn new(root: &JournalRoot, epoch: JournalEpoch, cursor: Cursor) -> Self {
        Self { key: JournalKey::derive(root, epoch), cursor, seals: 0 }
    }

    /// Goes on in another epoch, which has sealed nothing yet (a fresh salt); the domains' keys have to be of it, too.
    pub fn renew(&mut self, root: &JournalRoot, epoch: JournalEpoch) {
        self.key = JournalKey::derive(root, epoch);
        self.seals = 0;
    }

    /// How often something was sealed in this epoch with all keys together. Random nonces allow 2^32 a key (NIST SP 800-38D section 8.3).
    pub fn seals(&self) -> u64 {
        self.seals
    }

    /// Where the next batch goes.
    pub fn cursor(&self) -> &Cursor {
        &self.cursor
    }

    /// Seals `batch` into `out` (replaced; whole blocks), to be written at `position % ring blocks`.
    ///
    /// `durable` is the newest durable batch; `key` gives the journal key of a domain's scope in this epoch.
    /// Nothing is counted if it fails.
    pub fn seal<'k>(
        &mut self,
        batch: &Batch,
        durable: Sequence,
        mut key: impl FnMut(Scope) -> Option<&'k JournalKey>,
        out: &mut Vec<u8>,
    ) -> Result<BatchHeader, SealBatchError> {
        let (cursor, epoch) = (&self.cursor, &self.key.epoch);
        if durable >= cursor.sequence {
            return Err(SealBatchError::Durable { durable, sequence: cursor.sequence });
        }
        let stored = batch.stored_nonces;
        if stored != epoch.stored_nonces {
            return Err(SealBatchError::Nonces);
        }
        let blocks = batch.blocks();
        out.clear();
        out.reserve(blocks as usize * BLOCK_BYTES);
        let nonce_bytes = if stored { NONCE_BYTES } else { 0 };
        out.resize(BATCH_HEADER_BYTES + nonce_bytes, 0);
        let mut records = batch.records.as_slice();
        for (index, &(scope, bytes)) in batch.groups.iter().enumerate() {
            let (group, rest) = records.split_at(bytes);
            records = rest;
            let head = scope.raw(bytes as u32);
            out.extend_from_slice(head.as_bytes());
            if scope == Scope::Pool {
                out.extend_from_slice(group);
                continue;
            }
            let start = out.len() + nonce_bytes;
            out.resize(start, 0);
            out.extend_from_slice(group);
            let key = key(scope).filter(|key| key.epoch == *epoch).ok_or(SealBatchError::Key { scope })?;
            let place = (cursor.sequence, index as u32);
            let (nonce, tag) = key.seal(place, head.as_bytes(), &mut out[start..])?;
            if let Some(nonce) = nonce {
                out[start - nonce_bytes..start].copy_from_slice(&nonce);
            }
            out.extend_from_slice(&tag);
        }
        let payload_bytes = out.len() - BATCH_HEADER_BYTES;
        out.resize(blocks as usize * BLOCK_BYTES, 0);
        let mut raw = HeaderRaw {
            magic: BATCH_MAGIC,
            pool: cursor.pool.into_bytes(),
            shard: cursor.shard.0.into(),
            flags: if stored { FLAG_STORED_NONCES } else { 0 }.into(),
            blocks: blocks.into(),
            owner_epoch: epoch.owner_epoch.0.into(),
            sequence: cursor.sequence.0.into(),
            position: cursor.position.into(),
            durable: durable.0.into(),
            payload_bytes: (payload_bytes as u32).into(),
            groups: (batch.groups.len() as u32).into(),
            chain: cursor.chain,
            salt: epoch.salt,
            reserved: [0; 8],
            tag: [0; TAG_BYTES],
        };
        let (head, payload) = out.split_at_mut(BATCH_HEADER_BYTES);
        let (nonce_out, payload) = payload.split_at_mut(nonce_bytes);
        let place = (cursor.sequence, u32::MAX);
        let (nonce, tag) = self.key.seal(place, &raw.as_bytes()[..SIGNED_BYTES], payload)?;
        if let Some(nonce) = nonce {
            nonce_out.copy_from_slice(&nonce);
        }
        raw.tag = tag;
        head.copy_from_slice(raw.as_bytes());
        let header = BatchHeader::parse(head).map_err(|_| SealBatchError::Cipher)?;
        self.seals += 1 + batch.groups.len() as u64;
        self.cursor = Cursor::after(&header);
        Ok(header)
    }
}

/// Why a batch could not be sealed: the caller's mistake.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum SealBatchError {
    /// A batch that was not sealed yet cannot be durable.
    #[error("batch {durable} called durable while sealing batch {sequence}")]
    Durable {
        /// Called durable.
        durable: Sequence,
        /// Being sealed.
        sequence: Sequence,
    },
    /// No journal key for a scope, or one of another epoch.
    #[error("no key for {scope:?} in this epoch")]
    Key {
        /// Scope.
        scope: Scope,
    },
    /// The batch has room for stored nonces and the epoch has none, or the reverse.
    #[error("batch and epoch differ in whether nonces are stored")]
    Nonces,
    /// The cipher refused.
    #[error("the cipher failed")]
    Cipher,
}

/// An opened batch.
#[derive(Debug)]
pub struct OpenBatch {
    /// Its header.
    pub header: BatchHeader,
    payload: Vec<u8>,
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    scope: Scope,
    /// Header (and nonce) and records in the payload; the same place when it is open.
    head: usize,
    records: std::ops::Range<usize>,
}

impl OpenBatch {
    /// Opens the batch at the front of `bytes` (its `header.blocks` blocks, ring order). `key` is of the batch's epoch
    /// ([`JournalEpoch::of`] its parsed header). Whether it is the next one is [`BatchHeader::follows`]'s question.
    pub fn open(bytes: &[u8], key: &JournalKey) -> Result<Self, BatchError> {
        let header = BatchHeader::parse(bytes)?;
        let sequence = header.sequence;
        let need = header.blocks as usize * BLOCK_BYTES;
        let bytes = bytes.get(..need).ok_or(WireError::Truncated { need, have: bytes.len() })?;
        let (head, sealed) = bytes.split_at(BATCH_HEADER_BYTES);
        let (nonce, sealed) = sealed.split_at(header.nonce_bytes());
        let mut payload = sealed.to_vec();
        key.gcm
            .open_in_place_separate_tag(
                header.nonce(nonce, u32::MAX),
                Aad::from(&head[..SIGNED_BYTES]),
                &header.tag,
                &mut payload,
            )
            .map_err(|_| BatchError::Tag { sequence })?;
        let (used, rest) = payload.split_at(header.payload_bytes as usize - header.nonce_bytes());
        if rest.iter().any(|&byte| byte != 0) {
            return Err(range("padding", rest.len() as u64).into());
        }
        let groups = parse_groups(used, header.groups, header.nonce_bytes())?;
        Ok(Self { header, payload, groups })
    }

    /// Scopes of the groups, in order.
    pub fn scopes(&self) -> impl ExactSizeIterator<Item = Scope> + '_ {
        self.groups.iter().map(|group| group.scope)
    }

    /// The records of group `at` (below `scopes().len()`). `key` is `None` for [`Scope::Pool`], else the scope's key in the
    /// batch's epoch. Opens a group once; each later call gives the same records.
    pub fn records(&mut self, at: usize, key: Option<&JournalKey>) -> Result<RecordReader<'_>, BatchError> {
        let sequence = self.header.sequence;
        let missing = BatchError::GroupTag { sequence, group: at as u32 };
        let group = self.groups.get_mut(at).ok_or(missing.clone())?;
        if group.head != group.records.start {
            if let Some(key) = key {
                let mut head = [0; GROUP_HEADER_BYTES];
                let (found, nonce) =
                    self.payload[group.head..group.records.start].split_at(GROUP_HEADER_BYTES);
                head.copy_from_slice(found);
                let nonce = self.header.nonce(nonce, at as u32);
                let mut tag = [0; TAG_BYTES];
                tag.copy_from_slice(&self.payload[group.records.end..group.records.end + TAG_BYTES]);
                key.gcm
                    .open_in_place_separate_tag(
                        nonce,
                        Aad::from(head),
                        &tag,
                        &mut self.payload[group.records.clone()],
                    )
                    .map_err(|_| missing)?;
                group.head = group.records.start;
            } else {
                return Err(missing);
            }
        }
        Ok(RecordReader::new(&self.payload[group.records.clone()]))
    }
}

fn parse_groups(payload: &[u8], count: u32, nonce_bytes: usize) -> Result<Vec<Group>, WireError> {
    let mut groups = Vec::with_capacity(count as usize);
    let mut at = 0;
    for _ in 0..count {
        let (raw, _) = GroupRaw::ref_from_prefix(&payload[at..])
            .map_err(|_| WireError::Truncated { need: GROUP_HEADER_BYTES, have: payload.len() - at })?;
        let scope = Scope::from_raw(raw)?;
        let start = at + GROUP_HEADER_BYTES + if scope == Scope::Pool { 0 } else { nonce_bytes };
        let end = start + raw.bytes.get() as usize;
        let next = if scope == Scope::Pool { end } else { end + TAG_BYTES };
        if next > payload.len() {
            return Err(WireError::Truncated { need: next - at, have: payload.len() - at });
        }
        // A group that needs no key counts as opened.
        let head = if scope == Scope::Pool { start } else { at };
        groups.push(Group { scope, head, records: start..end });
        at = next;
    }
    match payload.len() - at {
        0 => Ok(groups),
        left => Err(WireError::Trailing { left }),
    }
}

#[cfg(test)]
pub(crate) fn layouts() -> Vec<crate::layout::Layout> {
    use crate::layout::layout;
    vec![
        layout!("batch header", HeaderRaw { magic pool shard flags blocks owner_epoch sequence position durable payload_bytes groups chain salt reserved tag }),
        layout!("group header", GroupRaw { scope reserved0 reserved1 domain generation volume bytes }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ContainerId, Epoch};
    use crate::keys::Secret;

    #[test]
    fn nonces_that_are_made_are_never_the_same() {
        let root = |byte| JournalRoot(Secret::take(&mut [byte; 32]));
        let epoch = JournalEpoch {
            owner_epoch: OwnerEpoch(1),
            salt: [2; 16],
            shard: ShardIx(0),
            stored_nonces: true,
        };
        let (key, domain) = (JournalKey::derive(&root(3), epoch), JournalKey::derive(&root(4), epoch));
        let scope = Scope::Domain { domain: DomainId(1), generation: Generation(1) };
        let mut batch = Batch::with_stored_nonces();
        assert!(batch.push(Scope::Pool, &Record::EpochAdvance { epoch: Epoch(9) }).unwrap());
        let container = ContainerId::new(9).unwrap();
        assert!(batch.push(scope, &Record::ContainerOpen { container }).unwrap());
        // The same batch under the same number, by two sealers of one epoch.
        let [one, other] = [0, 1].map(|_| {
            let (pool, shard, sequence) = (Uuid::nil(), ShardIx(0), Sequence(1));
            let cursor = Cursor { pool, shard, sequence, position: 0, chain: [0; 16] };
            let mut bytes = Vec::new();
            let mut sealer = BatchSealer::new(&root(3), epoch, cursor);
            sealer.seal(&batch, Sequence(0), |_| Some(&domain), &mut bytes).unwrap();
            assert_eq!(sealer.seals(), 3);
            let body = BATCH_HEADER_BYTES + NONCE_BYTES;
            let open = OpenBatch::open(&bytes, &key).unwrap();
            let group = &open.groups[1];
            let nonce = open.payload[group.head + GROUP_HEADER_BYTES..group.records.start].to_vec();
            let records = open.payload[group.records.clone()].to_vec();
            assert_eq!((nonce.len(), records.is_empty()), (NONCE_BYTES, false));
            [bytes[BATCH_HEADER_BYTES..body].to_vec(), bytes[body..].to_vec(), nonce, records]
        });
        for (at, what) in ["nonce", "ciphertext", "a group's nonce", "its ciphertext"].into_iter().enumerate()
        {
            assert_ne!(one[at], other[at], "{what}");
        }
    }
}
