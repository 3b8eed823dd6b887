//! Fixed examples of every structure, shared by the tests.
#![allow(dead_code)]

use cryptfold_reduce_format::codec::Codec;
use cryptfold_reduce_format::container::{Container, Fingerprints, FragmentEntry};
use cryptfold_reduce_format::fingerprint::{Fingerprint, HashId};
use cryptfold_reduce_format::ids::*;
use cryptfold_reduce_format::journal::JournalEpoch;
use cryptfold_reduce_format::keys::{DataKey, Kek, PoolKey, PoolKeys, Secret};
use cryptfold_reduce_format::node::{NodeId, NodePtr, Tree};
use cryptfold_reduce_format::owner::{OwnerBlock, OwnerState};
use cryptfold_reduce_format::record::*;
use cryptfold_reduce_format::sealed::SegmentKey;
use cryptfold_reduce_format::segment::{Cipher, Class, SegmentHeader};
use cryptfold_reduce_format::slots::{Kdf, KeyBlock, KeySlot, SlotKind};
use cryptfold_reduce_format::superblock::*;
use uuid::Uuid;

pub const POOL: Uuid = Uuid::from_u128(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
pub const SEGMENT: SegmentAddr = SegmentAddr { device: DeviceIx(1), segment: SegmentNo(9) };
pub const SEGMENT_BYTES: u32 = 4 << 20;
pub const SEGMENT_AT: u64 = 9 * SEGMENT_BYTES as u64;

pub fn secret(byte: u8) -> Secret {
    Secret::take(&mut std::array::from_fn(|at| byte.wrapping_add(at as u8)))
}

pub fn pool_key() -> PoolKey {
    PoolKey(secret(0x10))
}

pub fn pool_keys() -> PoolKeys {
    PoolKeys::derive(&pool_key(), POOL)
}

pub fn kek() -> Kek {
    Kek(secret(0x80))
}

pub fn data_key() -> DataKey {
    DataKey(secret(0x30))
}

pub fn chunk(container: u64, slot: u16) -> ChunkAddr {
    ChunkAddr::new(ContainerId::new(container).unwrap(), slot).unwrap()
}

pub fn segment_header(class: Class, cipher: Cipher) -> SegmentHeader {
    SegmentHeader {
        pool: POOL,
        addr: SEGMENT,
        segment_bytes: SEGMENT_BYTES,
        incarnation: Incarnation(7),
        salt: std::array::from_fn(|at| at as u8 ^ 0x5a),
        class,
        domain: DomainId(3),
        generation: Generation(2),
        cipher,
        hash: HashId::Blake3,
        codec: Codec::Zstd,
        shard: ShardIx(1),
        owner_epoch: OwnerEpoch(11),
    }
}

pub fn segment_key(class: Class, cipher: Cipher) -> SegmentKey {
    SegmentKey::derive(&data_key(), &segment_header(class, cipher))
}

/// The nonce that `cipher` wants from the caller.
pub fn nonce(cipher: Cipher) -> Option<[u8; 12]> {
    (cipher == Cipher::GcmStoredNonce).then_some(*b"nonce nonce!")
}

pub const CIPHERS: [Cipher; 3] = [Cipher::Gcm, Cipher::GcmStoredNonce, Cipher::Gmac];

pub fn ptr(seed: u32) -> NodePtr {
    NodePtr {
        place: Place {
            segment: SegmentAddr { device: DeviceIx(0), segment: SegmentNo(seed) },
            offset: 4096 + seed,
        },
        unit_bytes: 300 + seed,
        birth: Epoch(seed),
        tag: [seed as u8; 16],
    }
}

pub fn root(seed: u32, level: u8) -> TreeRoot {
    TreeRoot { ptr: Some(ptr(seed)), level }
}

pub fn superblock() -> Superblock {
    let device = |index: u16| DeviceEntry {
        device: DeviceIx(index),
        id: Uuid::from_u128(u128::from(index) + 77),
        state: DeviceState::Active,
        blocks: 1 << 18,
        anchor_blocks: 1 << 17,
        redundancy: Redundancy::default(),
    };
    let shard = |index: u64| ShardEntry {
        device: DeviceIx(0),
        blocks: 1024,
        start_block: 4096 + index * 1024,
        tail_position: 5000 + index,
        tail_sequence: Sequence(100 + index),
        tail_chain: [index as u8; 16],
    };
    Superblock {
        pool: POOL,
        name: "pööl".to_owned(),
        generation: 42,
        features: Features { compatible: 6, ..Features::default() },
        device: DeviceIx(1),
        segment_bytes: SEGMENT_BYTES,
        owner_epoch: OwnerEpoch(11),
        created_ms: 1_700_000_000_000,
        root: Some(ptr(5)),
        devices: vec![device(0), device(1)],
        shards: vec![shard(0), shard(1)],
    }
}

pub fn key_block() -> KeyBlock {
    let mut slots = [const { None }; 12];
    let file = KeySlot::seal(SlotKind::KeyFile, Kdf::None, &kek(), &pool_key(), 1_700_000_000_000).unwrap();
    let kdf = Kdf::Argon2id { memory_kib: 65536, passes: 3, lanes: 4, salt: [9; 32] };
    let mut password =
        KeySlot::seal(SlotKind::Password, kdf, &Kek(secret(0x90)), &pool_key(), 1_700_000_000_001).unwrap();
    password.label = "päßword".to_owned();
    let mut kms = KeySlot::seal(SlotKind::Kms, Kdf::None, &Kek(secret(0xa0)), &pool_key(), 1).unwrap();
    kms.reference = "kmip:5f0e".to_owned();
    slots[0] = Some(file);
    slots[2] = Some(password);
    slots[11] = Some(kms);
    KeyBlock { pool: POOL, generation: 4, slots, erasure: [None, None] }
}

pub fn owner_block() -> OwnerBlock {
    OwnerBlock {
        pool: POOL,
        epoch: OwnerEpoch(11),
        owner: [0xee; 16],
        state: OwnerState::Open,
        beat: 17,
        beat_ms: 1_700_000_000_500,
        interval_ms: 1000,
        host: "storage-1".to_owned(),
    }
}

pub fn entry(first_slot: u16, chunks: u8, segment: u32, offset: u32, unit_bytes: u32) -> FragmentEntry {
    let segment = SegmentAddr { device: DeviceIx(0), segment: SegmentNo(segment) };
    FragmentEntry { first_slot, chunks, codec: Codec::Zstd, place: Place { segment, offset }, unit_bytes }
}

pub fn container() -> Container {
    let mut container = Container::default();
    container.add(&entry(0, 4, 9, 4096, 5000)).unwrap();
    container.add(&entry(4, 1, 9, 9096, 2000)).unwrap();
    container.add(&entry(8, 64, 10, 4096, 100_000)).unwrap();
    for slot in [0, 1, 2, 3, 4, 8, 9, 71] {
        container.change_refs(slot, 1).unwrap();
    }
    container.change_refs(2, 299).unwrap();
    container
}

pub fn fingerprints() -> Fingerprints {
    let slots = (0..5).map(|at| Fingerprint([at; 16])).collect();
    Fingerprints { generation: Generation(2), hash: HashId::Blake3, slots }
}

pub fn node_id() -> NodeId {
    NodeId { tree: Tree::Map, owner: 5, level: 0, index: 1234 }
}

pub fn pool_record() -> PoolRecord {
    PoolRecord {
        domains: root(1, 0),
        volumes: root(2, 1),
        segments: vec![(DeviceIx(0), root(3, 1)), (DeviceIx(1), root(4, 0))],
        epoch: Epoch(6),
        next_domain: DomainId(4),
        next_volume: VolumeId(8),
        default_domain: DomainId(1),
        flags: pool_flags::DURABLE,
        counters: PoolCounters { logical_bytes: 1, unique_bytes: 2, stored_bytes: 3, metadata_bytes: 4 },
        unknown: vec![UnknownField { tag: 0x7001, value: b"later".to_vec() }],
        ..PoolRecord::default()
    }
}

pub fn domain_record() -> DomainRecord {
    let keys = |generation, state| KeyGeneration {
        generation: Generation(generation),
        state,
        data: [generation as u8; 40],
        fingerprint: [generation as u8 + 100; 40],
    };
    let mut record = DomainRecord::new(DomainId(3), Uuid::from_u128(3), "tenant-3");
    record.keys = vec![keys(1, GenerationState::Retiring), keys(2, GenerationState::Current)];
    record.slots = key_block().slots.into_iter().flatten().take(1).collect();
    record.shards = vec![DomainShard {
        shard: ShardIx(1),
        containers: root(7, 2),
        fingerprints: root(8, 2),
        next_container: ContainerId::new(513).unwrap(),
    }];
    record.counters = [10, 11, 12];
    record
}

pub fn volume_record() -> VolumeRecord {
    let mut record = VolumeRecord::new(VolumeId(5), Uuid::from_u128(5), "volume-5", DomainId(3), 1 << 20);
    record.flags = volume_flags::HOST_SEALED;
    record.birth = Epoch(4);
    record.origin = Some(VolumeId(2));
    record.map = root(9, 3);
    record.compression = Some("zstd:-3".parse().unwrap());
    record.host_keys = vec![b"first".to_vec(), b"second".to_vec()];
    record
}

pub fn snapshot_record() -> VolumeRecord {
    let mut record = VolumeRecord { id: VolumeId(6), name: "then".into(), ..volume_record() };
    record.flags = volume_flags::SNAPSHOT | volume_flags::READ_ONLY;
    record.birth = Epoch(9);
    record.counters = [7, 0, 1 << 18];
    record.special = 2;
    record.births = vec![(Epoch(4), 3), (Epoch(9), 2)];
    record.family = Some(VolumeId(5));
    record.base = Some((VolumeId(2), 1 << 19));
    record
}

pub fn journal_epoch() -> JournalEpoch {
    JournalEpoch { owner_epoch: OwnerEpoch(11), salt: [0x77; 16], shard: ShardIx(1), stored_nonces: false }
}

/// The epoch of [`cryptfold_reduce_format::journal::Batch::with_stored_nonces`].
pub fn stored_epoch() -> JournalEpoch {
    JournalEpoch { stored_nonces: true, ..journal_epoch() }
}

/// Bytes that no codec shortens, the same every time.
pub fn noise(len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for byte in &mut out {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = (state >> 32) as u8;
    }
    out
}

/// Bytes that every codec shortens.
pub fn text(len: usize) -> Vec<u8> {
    (0..)
        .flat_map(|line: u32| format!("line {line} of a text that repeats itself\n").into_bytes())
        .take(len)
        .collect()
}
