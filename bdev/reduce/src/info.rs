//! What callers ask for and get: options and descriptions of pools, volumes and domains, and the space they take.

use std::path::PathBuf;

use cryptfold_reduce_format::codec::Compression;
use cryptfold_reduce_format::ids::{DomainId, VolumeId};
use cryptfold_reduce_format::keys::Kek;
use cryptfold_reduce_format::slots::{Kdf, KeyBlock, KeySlot, SlotKind};
use uuid::Uuid;

/// Where the key-encryption key of a pool comes from.
#[derive(Clone)]
pub enum KeySource {
    /// A file with 32 raw bytes or 64 hexadecimal digits.
    File(PathBuf),
    /// The content of such a file.
    Bytes(Vec<u8>),
    /// The public key of pools without encryption: same format, no secrecy.
    Open,
    /// The key itself, from a password or a key server, and what a new pool's slot says about where it came from.
    Kek(Box<SlotKey>),
}

/// A key-encryption key and where it comes from.
#[derive(Clone)]
pub struct SlotKey {
    /// The key.
    pub kek: Kek,
    /// Where it comes from.
    pub kind: SlotKind,
    /// From which password, how.
    pub kdf: Kdf,
    /// For people, at most 48 bytes.
    pub label: String,
    /// Its name at the key server, at most 160 bytes.
    pub reference: String,
}

/// What happens to an open pool without anybody's call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolEvent {
    /// Its free space for hosts has crossed a threshold.
    Room(cryptfold_bdev::Room),
    /// It has got more (or less) space for hosts.
    Capacity,
    /// It takes no more changes, because its device can not be relied on or its state makes no sense.
    Failed,
    /// It was closed, because its device goes away.
    Closed,
}

/// A pool that was closed because its device went away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostPool {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Name that its device had.
    pub base_bdev: String,
}

/// A domain that was erased.
#[derive(Clone, Debug, PartialEq)]
pub struct ErasedDomain {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Volumes and snapshots that were in it: UUID and name.
    pub volumes: Vec<(Uuid, String)>,
    /// Generations of its keys.
    pub generations: Vec<u32>,
    /// Byte offsets on the device of the copies of the secret through which its keys were wrapped: overwritten and read back.
    pub overwritten: Vec<u64>,
}

/// A pool that was erased.
#[derive(Clone, Debug, PartialEq)]
pub struct ErasedPool {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// The slots that it had.
    pub slots: Vec<KeySlot>,
    /// Byte offsets on the device of the copies of its wrapped keys: overwritten twice and read back.
    pub overwritten: Vec<u64>,
}

/// What a device shows of a pool without its key; nothing of it is verified.
#[derive(Clone, Debug)]
pub struct SealedPool {
    /// Base device.
    pub base_bdev: String,
    /// Name.
    pub name: String,
    /// Identity.
    pub uuid: Uuid,
    /// When it was made, in ms since 1970.
    pub created_ms: u64,
    /// Made with the algorithms of the FIPS modes.
    pub approved: bool,
    /// Its key slots.
    pub keys: KeyBlock,
}

/// The key is not shown.
impl std::fmt::Debug for KeySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            KeySource::File(path) => write!(f, "File({})", path.display()),
            KeySource::Bytes(_) => f.write_str("Bytes(..)"),
            KeySource::Open => f.write_str("Open"),
            KeySource::Kek(key) => write!(f, "Kek({:?})", key.kind),
        }
    }
}

/// How a pool is made.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Overwrite whatever the device carries.
    pub force: bool,
    /// Its key-encryption key.
    pub key: KeySource,
    /// Bytes of a segment: a power of two from 1 MiB to 1 GiB; `None` = by the device's size.
    pub segment_bytes: Option<u32>,
    /// RAM for index, caches and buffers, at least 16 MiB; `None` = 512 MB and 250 MB per TB of the device.
    pub memory_budget: Option<u64>,
    /// Compression of volumes without a setting of their own; `None` = adaptive.
    pub compression: Option<Compression>,
    /// Every completion is durable (by group commit), and volumes report no volatile cache.
    pub durable: bool,
    /// With the algorithms that FIPS 140-3 approves: HMAC-SHA-256 fingerprints, nonces that the cipher library makes.
    pub approved: bool,
    /// For tests: as before there were erasure secrets.
    #[doc(hidden)]
    pub first_format: bool,
}

impl CreateOptions {
    /// The defaults, with this key.
    pub fn new(key: KeySource) -> CreateOptions {
        CreateOptions {
            force: false,
            key,
            segment_bytes: None,
            memory_budget: None,
            compression: None,
            durable: false,
            approved: false,
            first_format: false,
        }
    }
}

/// How a volume is made. Volumes are thin.
#[derive(Clone, Debug, Default)]
pub struct VolumeOptions {
    /// Its name within the pool.
    pub name: String,
    /// Its size; rounded up to 4 KiB.
    pub size_bytes: u64,
    /// 512 or 4096 (default) bytes.
    pub block_size: Option<u32>,
    /// Name of its deduplication domain; `None` = the pool's default domain.
    pub domain: Option<String>,
    /// Its compression; `None` = the pool's.
    pub compression: Option<Compression>,
    /// Its identity; `None` = drawn.
    pub uuid: Option<Uuid>,
}

/// Bytes of data at each step of reduction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Space {
    /// Mapped blocks of volumes, zero and pattern blocks included.
    pub logical_bytes: u64,
    /// Of these, zero and pattern blocks: they take no space but their map entry.
    pub zero_bytes: u64,
    /// Distinct blocks that are stored, before compression.
    pub unique_bytes: u64,
    /// Bytes of the stored fragments: compressed, with headers and tags.
    pub stored_bytes: u64,
    /// Bytes of maps, reference tables, fingerprints and catalogue, as of the last checkpoint.
    pub metadata_bytes: u64,
}

impl Space {
    /// Logical to stored bytes, metadata counted, zero blocks counted as data. 0 when nothing is stored.
    pub fn ratio(&self) -> f64 {
        ratio(self.logical_bytes, self.stored_bytes + self.metadata_bytes)
    }
    /// The same with zero and pattern blocks left out.
    pub fn ratio_without_zeroes(&self) -> f64 {
        ratio(self.logical_bytes.saturating_sub(self.zero_bytes), self.stored_bytes + self.metadata_bytes)
    }
}

fn ratio(logical: u64, stored: u64) -> f64 {
    if stored == 0 { 0.0 } else { logical as f64 / stored as f64 }
}

/// A pool, as it is now.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct PoolInfo {
    /// Name.
    pub name: String,
    /// Identity.
    pub uuid: Uuid,
    /// Made with the algorithms of the FIPS modes.
    pub approved: bool,
    /// Base device.
    pub base_bdev: String,
    /// Bytes of the base device in use.
    pub device_bytes: u64,
    /// Bytes of a segment (SPDK's clients see it as the cluster size).
    pub segment_bytes: u32,
    /// Segments that can hold data or metadata.
    pub segments: u64,
    /// Segments in which nothing lives.
    pub free_segments: u64,
    /// Bytes that hosts' data can take, stored.
    pub capacity_bytes: u64,
    /// Of these, bytes free now; what garbage collection can win comes on top.
    pub free_bytes: u64,
    /// Bytes that garbage collection can win.
    pub dead_bytes: u64,
    /// Bytes of fragments that hosts' writes have appended since the pool was opened.
    pub written_bytes: u64,
    /// Bytes of fragments that garbage collection has moved since then.
    pub moved_bytes: u64,
    /// Data and its reduction.
    pub space: Space,
    /// Volumes.
    pub volumes: u64,
    /// Deduplication domains.
    pub domains: u64,
    /// Compression of volumes without a setting.
    pub compression: String,
    /// Whether every completion is durable.
    pub durable: bool,
    /// RAM that the pool may take.
    pub memory_budget_bytes: u64,
    /// RAM that its caches, index and buffers take.
    pub memory_bytes: u64,
    /// Fingerprints in the index.
    pub index_entries: u64,
    /// One in so many fingerprints is indexed.
    pub index_sampling: u64,
    /// Superblock generation: counts checkpoints and openings.
    pub checkpoints: u64,
    /// Damaged nodes and fragments met since the pool was opened.
    pub damaged: u64,
    /// Damaged chunks that later writes of the same data have healed since the pool was opened.
    pub healed: u64,
    /// The scrub.
    pub scrub: ScrubInfo,
    /// Late deduplication.
    pub late: LateInfo,
    /// The rewriting of data under new keys.
    pub renewal: RenewalInfo,
    /// The end of volumes and snapshots that were deleted.
    pub deletion: DeletionInfo,
    /// Why the pool stopped, if it did.
    pub failed: Option<String>,
    /// When it was made, ms since 1970.
    pub created_ms: u64,
}

/// A volume, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Number within the pool.
    pub id: VolumeId,
    /// Identity; also the name of its bdev.
    pub uuid: Uuid,
    /// Name; the bdev's alias is `POOL/NAME`.
    pub name: String,
    /// Pool.
    pub pool: String,
    /// Deduplication domain.
    pub domain: String,
    /// Size.
    pub size_bytes: u64,
    /// Bytes of a block.
    pub block_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// It is a snapshot.
    pub snapshot: bool,
    /// Name of the snapshot that it goes on from: its newest one, the one before it, or the one that it is a clone of.
    pub parent: Option<String>,
    /// Names of those that go on from it.
    pub clones: Vec<String>,
    /// Its own compression setting.
    pub compression: Option<String>,
    /// Record of the key that its host had encrypted it with, if what is stored is decrypted. Its content is who wrote it's.
    pub host_key: Option<Vec<u8>>,
    /// Mapped bytes, zero and pattern blocks included. Of a clone: without what it has from its snapshot. Of a snapshot: when
    /// it was taken.
    pub logical_bytes: u64,
    /// Zero and pattern blocks in its own map.
    pub zero_bytes: u64,
    /// Blocks with data that nothing else shows: what deleting it takes out of the pool, before reduction. 0 while it has
    /// clones, which keep it.
    pub exclusive_bytes: u64,
    /// About what deleting it gives back: the exclusive blocks at the average of their domain.
    pub reclaimable_bytes: u64,
    /// Bytes written since it was made.
    pub written_bytes: u64,
    /// When it was made, ms since 1970.
    pub created_ms: u64,
}

/// Where data lies in a part of a volume that was stored as the host had sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AsSent {
    /// First block of 4 KiB and number of blocks, ascending. Zeros and patterns are not among them.
    pub runs: Vec<(u64, u64)>,
    /// Something in this part was stored under a host's key, or may have been: what can not be told counts.
    pub keyed: bool,
    /// The block to go on from; none: this was the end.
    pub next: Option<u64>,
}

/// A deduplication domain, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// Number within the pool.
    pub id: DomainId,
    /// Identity.
    pub uuid: Uuid,
    /// Name.
    pub name: String,
    /// Its volumes.
    pub volumes: u64,
    /// Data of its volumes.
    pub space: Space,
    /// Generation of its keys, from 1.
    pub generation: u32,
    /// Whether what is written now is encrypted.
    pub encrypted: bool,
    /// Whether something may lie under older keys; they are destroyed when nothing does.
    pub changing: bool,
    /// Stored bytes, of data and metadata, that lie under older keys.
    pub old_bytes: u64,
}

/// How a scrub or a pass of late deduplication stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ScrubState {
    /// None since the pool was opened.
    #[default]
    Never,
    /// It goes on.
    Running,
    /// Everything was looked at.
    Done,
    /// It was ended before its time.
    Stopped,
}

/// The scrub of this opening of the pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ScrubInfo {
    /// How it stands.
    pub state: ScrubState,
    /// Stored bytes to verify, as of its start.
    pub total_bytes: u64,
    /// Stored bytes verified.
    pub bytes: u64,
    /// Fragments verified.
    pub fragments: u64,
    /// Of these, damaged ones; and tables that could not be read.
    pub damaged: u64,
    /// Bytes per second at most.
    pub bytes_per_s: u64,
}

/// Late deduplication of this opening of the pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct LateInfo {
    /// How it stands.
    pub state: ScrubState,
    /// Containers (2 MiB of chunks each) to compare with all before them, as of its start.
    pub total_containers: u64,
    /// Of these, compared.
    pub containers: u64,
    /// Chunks found that were stored before.
    pub found: u64,
    /// Blocks of volumes that refer to the earlier chunk now.
    pub blocks: u64,
}

/// How what was deleted comes to its end.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct DeletionInfo {
    /// How it stands: never while nothing waits, stopped when the device failed (it goes on when the pool is opened again).
    pub state: ScrubState,
    /// Volumes and snapshots whose space is not back yet.
    pub volumes: u64,
}

/// What is done to a domain's keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyChange {
    /// New ones.
    Rotate,
    /// New ones, and what is stored is encrypted from now on.
    Enable,
    /// New ones, with which what is stored is authenticated only.
    Disable,
}

/// The rewriting of data under new keys, in this opening of the pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RenewalInfo {
    /// How it stands.
    pub state: ScrubState,
    /// Stored bytes read so far, to be fingerprinted or sealed anew.
    pub bytes: u64,
    /// Fragments that could not be read.
    pub damaged: u64,
    /// Bytes per second at most.
    pub bytes_per_s: u64,
    /// Why it was stopped, if a person has to do something.
    pub reason: Option<String>,
}

/// What an audit found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CheckReport {
    /// Volumes audited.
    pub volumes: u64,
    /// Mapped blocks.
    pub blocks: u64,
    /// Containers.
    pub containers: u64,
    /// Fragments.
    pub fragments: u64,
    /// Fragments whose data was read and verified against their chunks' fingerprints.
    pub verified: u64,
    /// Metadata nodes.
    pub nodes: u64,
    /// Fragments that nothing refers to (their writer died); harmless.
    pub orphans: u64,
    /// Blocks that were lost and read as errors until they are written again.
    pub uncorrectable: u64,
    /// Damaged fragments among the problems: their blocks read as errors until the same data, or other data there, is
    /// written.
    pub damaged: u64,
    /// Every inconsistency, the first thousand in words.
    pub problems: Vec<String>,
    /// Number of inconsistencies.
    pub problem_count: u64,
    /// After a repair: inconsistencies before it.
    pub found: u64,
    /// After a repair: what it did, the first thousand steps in words.
    pub repairs: Vec<String>,
    /// After a repair: what it did.
    pub repair_count: u64,
}

impl CheckReport {
    /// Nothing wrong.
    pub fn is_clean(&self) -> bool {
        self.problem_count == 0
    }

    pub(crate) fn repair(&mut self, text: String) {
        self.repair_count += 1;
        if self.repairs.len() < 1000 {
            self.repairs.push(text);
        }
    }

    pub(crate) fn problem(&mut self, text: String) {
        self.problem_count += 1;
        if self.problems.len() < 1000 {
            self.problems.push(text);
        }
    }
}
