//! The catalogue's records: pool, domains, volumes.
//!
//! The superblock points to the pool record (tree [`Pool`](crate::node::Tree::Pool), one node), which points to the trees
//! of domain and volume records and of the segment tables. Leaf `i` of the domain and volume trees is a page with the
//! records of ids `i * 8 .. i * 8 + 8`.
//!
//! A record is a sequence of fields: tag u16, length u16, value. How it may grow: a program that meets an unknown tag
//! keeps the field as it is and writes it back; if the tag's top bit ([`MUST_KNOW`]) is set it refuses the record. A
//! repeated tag is a list, in order. Numbers are little-endian; a shorter or longer one is refused.
//!
//! Page: count u8, then per record id u32, length u16, record; ids ascend.

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::codec::Compression;
use crate::ids::{ContainerId, DeviceIx, DomainId, Epoch, Generation, ShardIx, VolumeId};
use crate::keys::WRAPPED_BYTES;
use crate::node::{MAX_LEVEL, NodePtr, NodePtrRaw, PTR_BYTES};
use crate::slots::{KeySlot, SLOT_BYTES};
use crate::wire::{Reader, WireError, range};

/// Bit of the tags that a reader must know.
pub const MUST_KNOW: u16 = 0x8000;
/// Records of a page.
pub const RECORDS_PER_PAGE: u32 = 8;
/// Bytes of a record, at most (a full page fits a node).
pub const MAX_RECORD_BYTES: usize = 8000;
/// Bytes of a name.
pub const MAX_NAME_BYTES: usize = 255;

/// Root of a tree: its top node and that node's level.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TreeRoot {
    /// The top node; `None` = an empty tree.
    pub ptr: Option<NodePtr>,
    /// Its level: `FANOUT^level` leaves fit.
    pub level: u8,
}

/// A field that this version does not know, kept as it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownField {
    /// Tag.
    pub tag: u16,
    /// Value.
    pub value: Vec<u8>,
}

struct Writer(Vec<u8>);

impl Writer {
    fn field(&mut self, tag: u16, value: &[u8]) -> Result<(), WireError> {
        let len = u16::try_from(value.len()).map_err(|_| range("field's length", value.len() as u64))?;
        self.0.extend_from_slice(&tag.to_le_bytes());
        self.0.extend_from_slice(&len.to_le_bytes());
        self.0.extend_from_slice(value);
        Ok(())
    }

    fn name(&mut self, tag: u16, name: &str) -> Result<(), WireError> {
        check_name(name)?;
        self.field(tag, name.as_bytes())
    }

    fn root(&mut self, tag: u16, root: &TreeRoot) -> Result<(), WireError> {
        self.field(tag, &root_bytes(root))
    }

    fn end(mut self, unknown: &[UnknownField]) -> Result<Vec<u8>, WireError> {
        for field in unknown {
            self.field(field.tag, &field.value)?;
        }
        Ok(self.0)
    }
}

pub(crate) fn check_name(name: &str) -> Result<(), WireError> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
        return Err(range("name", name.len() as u64));
    }
    Ok(())
}

fn root_bytes(root: &TreeRoot) -> [u8; PTR_BYTES + 1] {
    let mut bytes = [0; PTR_BYTES + 1];
    bytes[..PTR_BYTES].copy_from_slice(NodePtr::to_raw(root.ptr.as_ref()).as_bytes());
    bytes[PTR_BYTES] = root.level;
    bytes
}

/// One field's value, read strictly.
struct Value<'a>(&'static str, Reader<'a>);

impl<'a> Value<'a> {
    fn done<T>(self, value: Result<T, WireError>) -> Result<T, WireError> {
        let value = value?;
        self.1.end()?;
        Ok(value)
    }

    fn u32(mut self) -> Result<u32, WireError> {
        let value = self.1.u32();
        self.done(value)
    }

    fn u64(mut self) -> Result<u64, WireError> {
        let value = self.1.u64();
        self.done(value)
    }

    fn uuid(mut self) -> Result<Uuid, WireError> {
        let value = self.1.array().map(Uuid::from_bytes);
        self.done(value)
    }

    fn name(self) -> Result<String, WireError> {
        let bytes = self.1.0;
        let name = std::str::from_utf8(bytes).map_err(|_| range(self.0, bytes.len() as u64))?;
        check_name(name)?;
        Ok(name.to_owned())
    }

    fn root(mut self) -> Result<TreeRoot, WireError> {
        let root = read_root(self.0, &mut self.1);
        self.done(root)
    }
}

fn read_root(field: &'static str, reader: &mut Reader<'_>) -> Result<TreeRoot, WireError> {
    let bytes = reader.take(PTR_BYTES)?;
    let level = reader.u8()?;
    let raw = NodePtrRaw::ref_from_bytes(bytes).map_err(|_| range(field, PTR_BYTES as u64))?;
    let ptr = NodePtr::from_raw(raw).map_err(|_| range(field, raw.stored_len.get()))?;
    if level > MAX_LEVEL || (ptr.is_none() && level != 0) {
        return Err(range(field, level));
    }
    Ok(TreeRoot { ptr, level })
}

/// Calls `known` with each field; it gives `false` for a tag that it does not know. Known tags ascend (so each list is
/// together and each single field comes once, which `known` need not check); unknown ones come last.
fn read_fields<'a>(
    what: &'static str,
    bytes: &'a [u8],
    lists: &[u16],
    mut known: impl FnMut(u16, Value<'a>) -> Result<bool, WireError>,
) -> Result<Vec<UnknownField>, WireError> {
    if bytes.len() > MAX_RECORD_BYTES {
        return Err(range(what, bytes.len() as u64));
    }
    let mut reader = Reader(bytes);
    let mut unknown = Vec::new();
    let mut last = 0;
    while !reader.0.is_empty() {
        let tag = reader.u16()?;
        let len = reader.u16()?;
        let value = reader.take(len.into())?;
        if known(tag, Value(what, Reader(value)))? {
            if tag < last || (tag == last && !lists.contains(&tag)) || !unknown.is_empty() {
                return Err(range("order of fields, tag", tag));
            }
            last = tag;
        } else if tag & MUST_KNOW != 0 {
            return Err(WireError::Unknown { what, kind: tag });
        } else {
            unknown.push(UnknownField { tag, value: value.to_vec() });
        }
    }
    Ok(unknown)
}

/// The pool record.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PoolRecord {
    /// Pages of [`DomainRecord`].
    pub domains: TreeRoot,
    /// Pages of [`VolumeRecord`].
    pub volumes: TreeRoot,
    /// Segment tables by device.
    pub segments: Vec<(DeviceIx, TreeRoot)>,
    /// Progress of background work.
    pub jobs: TreeRoot,
    /// Current epoch.
    pub epoch: Epoch,
    /// Next id of a domain.
    pub next_domain: DomainId,
    /// Next id of a volume.
    pub next_volume: VolumeId,
    /// Domain of volumes that name none.
    pub default_domain: DomainId,
    /// Compression of volumes that have no setting.
    pub compression: Compression,
    /// [`pool_flags`].
    pub flags: u32,
    /// Counters, as at the checkpoint.
    pub counters: PoolCounters,
    /// Fields of later versions.
    pub unknown: Vec<UnknownField>,
}

/// Flags of a pool.
pub mod pool_flags {
    /// Every completion is durable.
    pub const DURABLE: u32 = 1;
    /// Encryption is being switched on or off, or keys rotate.
    pub const CONVERTING: u32 = 2;
}

/// Counters of a pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PoolCounters {
    /// Chunks that hosts have written and that are mapped, times 4096.
    pub logical_bytes: u64,
    /// Chunks stored once, times 4096.
    pub unique_bytes: u64,
    /// Bytes of fragments that live.
    pub stored_bytes: u64,
    /// Bytes of metadata that live.
    pub metadata_bytes: u64,
}

impl PoolRecord {
    /// The record's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut out = Writer(Vec::new());
        out.root(1, &self.domains)?;
        out.root(2, &self.volumes)?;
        for (device, root) in &self.segments {
            let mut value = device.0.to_le_bytes().to_vec();
            value.extend_from_slice(&root_bytes(root));
            out.field(3, &value)?;
        }
        out.root(4, &self.jobs)?;
        out.field(5, &self.epoch.0.to_le_bytes())?;
        out.field(6, &self.next_domain.0.to_le_bytes())?;
        out.field(7, &self.next_volume.0.to_le_bytes())?;
        out.field(8, &self.default_domain.0.to_le_bytes())?;
        out.field(9, &self.compression.to_raw())?;
        out.field(10, &self.flags.to_le_bytes())?;
        let counters = &self.counters;
        let counters =
            [counters.logical_bytes, counters.unique_bytes, counters.stored_bytes, counters.metadata_bytes];
        out.field(11, counters.map(u64::to_le_bytes).as_bytes())?;
        out.end(&self.unknown)
    }

    /// Parses a record.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut record = Self::default();
        record.unknown = read_fields("pool record", bytes, &[3], |tag, mut value| {
            match tag {
                1 => record.domains = value.root()?,
                2 => record.volumes = value.root()?,
                3 => {
                    let device = DeviceIx(value.1.u16()?);
                    record.segments.push((device, value.root()?));
                }
                4 => record.jobs = value.root()?,
                5 => record.epoch = Epoch(value.u32()?),
                6 => record.next_domain = DomainId(value.u32()?),
                7 => record.next_volume = VolumeId(value.u32()?),
                8 => record.default_domain = DomainId(value.u32()?),
                9 => record.compression = compression(value)?,
                10 => record.flags = value.u32()?,
                11 => {
                    let counters = &mut record.counters;
                    counters.logical_bytes = value.1.u64()?;
                    counters.unique_bytes = value.1.u64()?;
                    counters.stored_bytes = value.1.u64()?;
                    counters.metadata_bytes = value.u64()?;
                }
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(record)
    }
}

fn compression(mut value: Value<'_>) -> Result<Compression, WireError> {
    let raw: [u8; 2] = value.1.array()?;
    value.1.end()?;
    Compression::from_raw(raw).ok_or(range("compression", u16::from_le_bytes(raw)))
}

/// State of a generation of a domain's keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum GenerationState {
    /// New data is written with it.
    Current = 1,
    /// Its data is being rewritten.
    Retiring = 2,
    /// Erased: the wrapped keys are zeros.
    Erased = 3,
}

/// One generation of a domain's data key and fingerprint secret, wrapped under the pool's wrap key, or under the
/// domain's own key-encryption key if the domain has slots.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyGeneration {
    /// Its number.
    pub generation: Generation,
    /// State.
    pub state: GenerationState,
    /// Data key (RFC 3394).
    pub data: [u8; WRAPPED_BYTES],
    /// Fingerprint secret (RFC 3394).
    pub fingerprint: [u8; WRAPPED_BYTES],
}

/// Flags of a domain.
pub mod domain_flags {
    /// Segments of its current generation are sealed with [`crate::segment::Cipher::Gmac`]: encryption is off.
    pub const PLAIN: u32 = 1;
    /// Erased; its segments are being freed.
    pub const ERASED: u32 = 2;
    /// It was plain: what may have its data in clear is overwritten before the retiring generations go.
    pub const WIPE: u32 = 4;
}

/// One shard's containers of a domain. Container `c` belongs to shard `c % shards` and is leaf `c / shards` of its trees
/// ([`ContainerId::shard`], [`ContainerId::leaf`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DomainShard {
    /// The shard.
    pub shard: ShardIx,
    /// Container table.
    pub containers: TreeRoot,
    /// Fingerprint lists.
    pub fingerprints: TreeRoot,
    /// Next container of this shard.
    pub next_container: ContainerId,
}

/// A domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DomainRecord {
    /// Its id.
    pub id: DomainId,
    /// Its identity outside of the pool.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// [`domain_flags`].
    pub flags: u32,
    /// Its key generations, ascending.
    pub keys: Vec<KeyGeneration>,
    /// Slots of its own key-encryption key, if it is erasable by that key.
    pub slots: Vec<KeySlot>,
    /// Per shard: its containers. Shards ascend.
    pub shards: Vec<DomainShard>,
    /// Saved index.
    pub index: TreeRoot,
    /// Mapped, unique and stored bytes, as in [`PoolCounters`].
    pub counters: [u64; 3],
    /// All containers below this one have been compared with each other (0: none).
    pub compared: u64,
    /// While a generation is retiring: all containers below this one are of the current one (0: none).
    pub renewed: u64,
    /// Fields of later versions.
    pub unknown: Vec<UnknownField>,
}

impl DomainRecord {
    /// An empty domain.
    pub fn new(id: DomainId, uuid: Uuid, name: &str) -> Self {
        Self {
            id,
            uuid,
            name: name.to_owned(),
            flags: 0,
            keys: Vec::new(),
            slots: Vec::new(),
            shards: Vec::new(),
            index: TreeRoot::default(),
            counters: [0; 3],
            compared: 0,
            renewed: 0,
            unknown: Vec::new(),
        }
    }

    /// The record's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut out = Writer(Vec::new());
        out.field(1, &self.id.0.to_le_bytes())?;
        out.field(2, self.uuid.as_bytes())?;
        out.name(3, &self.name)?;
        out.field(4, &self.flags.to_le_bytes())?;
        for keys in &self.keys {
            let mut value = keys.generation.0.to_le_bytes().to_vec();
            value.push(keys.state as u8);
            value.extend_from_slice(&keys.data);
            value.extend_from_slice(&keys.fingerprint);
            out.field(5, &value)?;
        }
        for slot in &self.slots {
            out.field(6, &slot.encode().map_err(|_| range("key slot", 0u8))?)?;
        }
        for shard in &self.shards {
            let mut value = shard.shard.0.to_le_bytes().to_vec();
            value.extend_from_slice(&root_bytes(&shard.containers));
            value.extend_from_slice(&root_bytes(&shard.fingerprints));
            value.extend_from_slice(&shard.next_container.get().to_le_bytes());
            out.field(7, &value)?;
        }
        out.root(8, &self.index)?;
        out.field(9, self.counters.map(u64::to_le_bytes).as_bytes())?;
        if self.compared > 0 {
            out.field(10, &self.compared.to_le_bytes())?;
        }
        if self.renewed > 0 {
            out.field(11, &self.renewed.to_le_bytes())?;
        }
        out.end(&self.unknown)
    }

    /// Parses a record.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut record = Self::new(DomainId(0), Uuid::nil(), "");
        record.unknown = read_fields("domain record", bytes, &[5, 6, 7], |tag, mut value| {
            match tag {
                1 => record.id = DomainId(value.u32()?),
                2 => record.uuid = value.uuid()?,
                3 => record.name = value.name()?,
                4 => record.flags = value.u32()?,
                5 => record.keys.push(key_generation(value)?),
                6 => {
                    let slot =
                        KeySlot::decode(value.1.take(SLOT_BYTES)?).map_err(|_| range("key slot", 0u8))?;
                    value.1.end()?;
                    record.slots.push(slot.ok_or(range("key slot", 0u8))?);
                }
                7 => record.shards.push(domain_shard(value)?),
                8 => record.index = value.root()?,
                9 => {
                    for counter in &mut record.counters {
                        *counter = value.1.u64()?;
                    }
                    value.1.end()?;
                }
                10 => {
                    record.compared = value.1.u64()?;
                    value.1.end()?;
                }
                11 => {
                    record.renewed = value.1.u64()?;
                    value.1.end()?;
                }
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        if record.id.0 == 0 {
            return Err(WireError::Missing { field: "domain's id" });
        }
        if record.name.is_empty() {
            return Err(WireError::Missing { field: "domain's name" });
        }
        if !record.shards.is_sorted_by(|a, b| a.shard < b.shard) {
            return Err(range("order of shards", record.shards.len() as u64));
        }
        if !record.keys.is_sorted_by(|a, b| a.generation < b.generation) {
            return Err(range("order of key generations", record.keys.len() as u64));
        }
        Ok(record)
    }
}

fn key_generation(mut value: Value<'_>) -> Result<KeyGeneration, WireError> {
    let generation = Generation(value.1.u32()?);
    let state = match value.1.u8()? {
        1 => GenerationState::Current,
        2 => GenerationState::Retiring,
        3 => GenerationState::Erased,
        other => return Err(range("key generation's state", other)),
    };
    let keys = KeyGeneration { generation, state, data: value.1.array()?, fingerprint: value.1.array()? };
    value.1.end()?;
    Ok(keys)
}

fn domain_shard(mut value: Value<'_>) -> Result<DomainShard, WireError> {
    let shard = ShardIx(value.1.u16()?);
    let containers = read_root("containers' root", &mut value.1)?;
    let fingerprints = read_root("fingerprints' root", &mut value.1)?;
    let number = value.u64()?;
    let next_container = ContainerId::new(number).ok_or(range("next container", number))?;
    Ok(DomainShard { shard, containers, fingerprints, next_container })
}

/// Flags of a volume.
pub mod volume_flags {
    /// Writes are refused.
    pub const READ_ONLY: u32 = 1;
    /// It is a snapshot.
    pub const SNAPSHOT: u32 = 2;
    /// It is being deleted.
    pub const DELETING: u32 = 4;
    /// Fully provisioned: its space is reserved.
    pub const THICK: u32 = 8;
    /// Its map is sealed with its host's key.
    pub const HOST_SEALED: u32 = 16;
}

/// A volume, snapshot or clone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeRecord {
    /// Its id.
    pub id: VolumeId,
    /// Its identity outside of the pool.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Its domain.
    pub domain: DomainId,
    /// [`volume_flags`].
    pub flags: u32,
    /// Size in 4 KiB blocks.
    pub blocks: u64,
    /// Block size that hosts see: 512 or 4096.
    pub block_bytes: u32,
    /// Epoch in which it was made. A snapshot has what was written in this epoch or before.
    pub birth: Epoch,
    /// Not used: `base` says it.
    pub origin: Option<VolumeId>,
    /// Not used: the order of births in a family says it.
    pub newest_snapshot: Option<VolumeId>,
    /// Not used: the order of births in a family says it.
    pub previous_snapshot: Option<VolumeId>,
    /// Its map. A snapshot's: what the next one of its family does not have any more, see `family`.
    pub map: TreeRoot,
    /// Not used: a snapshot's map is its dead list.
    pub dead_list: TreeRoot,
    /// Own compression setting.
    pub compression: Option<Compression>,
    /// Mapped blocks in its map; bytes written since creation; for a snapshot: mapped blocks when it was taken.
    pub counters: [u64; 3],
    /// Records of the host's keys, by [`crate::ids::HostKeyId`] - 1; their content is `hostcrypt`'s.
    pub host_keys: Vec<Vec<u8>>,
    /// Created, ms since 1970.
    pub created_ms: u64,
    /// Mapped blocks in its map that are zeros or patterns.
    pub special: u64,
    /// Chunks in its map by birth: (newest birth of the group, chunks), ascending. What is not counted here is younger
    /// than all snapshots of its family.
    pub births: Vec<(Epoch, u64)>,
    /// The family that it belongs to: a volume and its snapshots, in order of their births, the volume last. What a
    /// snapshot's map does not have is looked up in the next one's, and counts if it was born not later than the snapshot.
    /// `None` = the family that has its own id.
    pub family: Option<VolumeId>,
    /// A clone (and each snapshot of one): what its family does not have is looked up in this snapshot, below this block.
    pub base: Option<(VolumeId, u64)>,
    /// Fields of later versions.
    pub unknown: Vec<UnknownField>,
}

/// Tags of a volume's fields that a program without snapshots must refuse.
const FAMILY: u16 = MUST_KNOW | 20;
const BASE: u16 = MUST_KNOW | 21;
/// Groups of [`VolumeRecord::births`] that a record has, at most.
pub const MAX_BIRTHS: usize = 400;

impl VolumeRecord {
    /// The id of its family.
    pub fn family_id(&self) -> VolumeId {
        self.family.unwrap_or(self.id)
    }

    /// An empty thin volume of `blocks` 4 KiB blocks.
    pub fn new(id: VolumeId, uuid: Uuid, name: &str, domain: DomainId, blocks: u64) -> Self {
        Self {
            id,
            uuid,
            name: name.to_owned(),
            domain,
            flags: 0,
            blocks,
            block_bytes: 4096,
            birth: Epoch(0),
            origin: None,
            newest_snapshot: None,
            previous_snapshot: None,
            map: TreeRoot::default(),
            dead_list: TreeRoot::default(),
            compression: None,
            counters: [0; 3],
            host_keys: Vec::new(),
            created_ms: 0,
            special: 0,
            births: Vec::new(),
            family: None,
            base: None,
            unknown: Vec::new(),
        }
    }

    /// The record's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut out = Writer(Vec::new());
        out.field(1, &self.id.0.to_le_bytes())?;
        out.field(2, self.uuid.as_bytes())?;
        out.name(3, &self.name)?;
        out.field(4, &self.domain.0.to_le_bytes())?;
        out.field(5, &self.flags.to_le_bytes())?;
        out.field(6, &self.blocks.to_le_bytes())?;
        out.field(7, &self.block_bytes.to_le_bytes())?;
        out.field(8, &self.birth.0.to_le_bytes())?;
        for (tag, volume) in [(9, self.origin), (10, self.newest_snapshot), (11, self.previous_snapshot)] {
            if let Some(volume) = volume {
                out.field(tag, &volume.0.to_le_bytes())?;
            }
        }
        out.root(12, &self.map)?;
        out.root(13, &self.dead_list)?;
        if let Some(compression) = self.compression {
            out.field(14, &compression.to_raw())?;
        }
        out.field(15, self.counters.map(u64::to_le_bytes).as_bytes())?;
        for key in &self.host_keys {
            out.field(16, key)?;
        }
        out.field(17, &self.created_ms.to_le_bytes())?;
        if self.special > 0 {
            out.field(18, &self.special.to_le_bytes())?;
        }
        if !self.births.is_empty() {
            let mut value = Vec::with_capacity(self.births.len() * 12);
            for (birth, chunks) in &self.births {
                value.extend_from_slice(&birth.0.to_le_bytes());
                value.extend_from_slice(&chunks.to_le_bytes());
            }
            out.field(19, &value)?;
        }
        if let Some(family) = self.family {
            out.field(FAMILY, &family.0.to_le_bytes())?;
        }
        if let Some((base, blocks)) = self.base {
            let mut value = base.0.to_le_bytes().to_vec();
            value.extend_from_slice(&blocks.to_le_bytes());
            out.field(BASE, &value)?;
        }
        out.end(&self.unknown)
    }

    /// Parses a record.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut record = Self::new(VolumeId(0), Uuid::nil(), "", DomainId(0), 0);
        record.unknown = read_fields("volume record", bytes, &[16], |tag, mut value| {
            match tag {
                1 => record.id = VolumeId(value.u32()?),
                2 => record.uuid = value.uuid()?,
                3 => record.name = value.name()?,
                4 => record.domain = DomainId(value.u32()?),
                5 => record.flags = value.u32()?,
                6 => record.blocks = value.u64()?,
                7 => record.block_bytes = value.u32()?,
                8 => record.birth = Epoch(value.u32()?),
                9 => record.origin = Some(VolumeId(value.u32()?)),
                10 => record.newest_snapshot = Some(VolumeId(value.u32()?)),
                11 => record.previous_snapshot = Some(VolumeId(value.u32()?)),
                12 => record.map = value.root()?,
                13 => record.dead_list = value.root()?,
                14 => record.compression = Some(compression(value)?),
                15 => {
                    for counter in &mut record.counters {
                        *counter = value.1.u64()?;
                    }
                    value.1.end()?;
                }
                16 => record.host_keys.push(value.1.0.to_vec()),
                17 => record.created_ms = value.u64()?,
                18 => record.special = value.u64()?,
                19 => record.births = births(value)?,
                FAMILY => record.family = Some(VolumeId(value.u32()?)),
                BASE => {
                    record.base = Some((VolumeId(value.1.u32()?), value.1.u64()?));
                    value.1.end()?;
                }
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        if record.id.0 == 0 {
            return Err(WireError::Missing { field: "volume's id" });
        }
        if record.name.is_empty() {
            return Err(WireError::Missing { field: "volume's name" });
        }
        if record.domain.0 == 0 {
            return Err(WireError::Missing { field: "volume's domain" });
        }
        if ![512, 4096].contains(&record.block_bytes) {
            return Err(range("volume's block size", record.block_bytes));
        }
        if record.blocks > 1 << 40 {
            return Err(range("volume's blocks", record.blocks));
        }
        if record.family == Some(VolumeId(0)) || record.base.is_some_and(|base| base.0 == VolumeId(0)) {
            return Err(range("volume's family or base", 0u8));
        }
        Ok(record)
    }
}

fn births(mut value: Value<'_>) -> Result<Vec<(Epoch, u64)>, WireError> {
    let mut births = Vec::new();
    while !value.1.0.is_empty() {
        births.push((Epoch(value.1.u32()?), value.1.u64()?));
    }
    if births.len() > MAX_BIRTHS || !births.is_sorted_by(|a, b| a.0 < b.0) {
        return Err(range("births", births.len() as u64));
    }
    Ok(births)
}

/// A page of records, from (id, record) pairs in ascending order of ids.
pub fn encode_page(records: &[(u32, Vec<u8>)]) -> Result<Vec<u8>, WireError> {
    let mut out = vec![records.len() as u8];
    for (id, record) in records {
        if record.len() > MAX_RECORD_BYTES {
            return Err(range("record's bytes", record.len() as u64));
        }
        out.extend_from_slice(&id.to_le_bytes());
        out.extend_from_slice(&(record.len() as u16).to_le_bytes());
        out.extend_from_slice(record);
    }
    decode_page(&out)?;
    Ok(out)
}

/// Parses a page into (id, record) pairs.
pub fn decode_page(bytes: &[u8]) -> Result<Vec<(u32, &[u8])>, WireError> {
    let mut reader = Reader(bytes);
    let count = reader.u8()?;
    if count == 0 || u32::from(count) > RECORDS_PER_PAGE {
        return Err(range("records of a page", count));
    }
    let mut records: Vec<(u32, &[u8])> = Vec::with_capacity(count.into());
    for _ in 0..count {
        let id = reader.u32()?;
        let len = reader.u16()?;
        let record = reader.take(len.into())?;
        let misplaced = |last: u32| id <= last || id / RECORDS_PER_PAGE != last / RECORDS_PER_PAGE;
        if records.last().is_some_and(|&(last, _)| misplaced(last)) {
            return Err(range("order of records, id", id));
        }
        records.push((id, record));
    }
    reader.end()?;
    Ok(records)
}
