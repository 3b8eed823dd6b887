//! The first version of the format, pinned: images in `golden_v1` must be written and read for ever.
//!
//! An image is text: offset and 32 bytes a line, lines of zeros left out, the length at the end. `write_missing_images`
//! (ignored) makes those that do not exist; none is ever overwritten.

mod common;

use std::fmt::Write;
use std::path::PathBuf;

use common::*;
use cryptfold_reduce_format::codec::{Codec, Compressor, Decompressor};
use cryptfold_reduce_format::container::{Container, Fingerprints};
use cryptfold_reduce_format::entry::{OwnFrom, Record, RecordReader, RefChange, Retarget, runs};
use cryptfold_reduce_format::fingerprint::Fingerprint;
use cryptfold_reduce_format::fragment::*;
use cryptfold_reduce_format::ids::*;
use cryptfold_reduce_format::journal::*;
use cryptfold_reduce_format::map::*;
use cryptfold_reduce_format::node::*;
use cryptfold_reduce_format::owner::OwnerBlock;
use cryptfold_reduce_format::record::*;
use cryptfold_reduce_format::segment::*;
use cryptfold_reduce_format::segtable::*;
use cryptfold_reduce_format::slots::KeyBlock;
use cryptfold_reduce_format::superblock::*;

fn dump(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (index, line) in bytes.chunks(32).enumerate().filter(|(_, line)| line.iter().any(|&byte| byte != 0)) {
        let hex: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
        writeln!(out, "{:06x} {hex}", index * 32).unwrap();
    }
    writeln!(out, "{:06x}", bytes.len()).unwrap();
    out
}

fn undump(text: &str) -> Vec<u8> {
    let number = |text: &str| usize::from_str_radix(text, 16).unwrap();
    let mut out = vec![0; number(text.lines().last().unwrap())];
    for (offset, hex) in text.lines().filter_map(|line| line.split_once(' ')) {
        for at in 0..hex.len() / 2 {
            out[number(offset) + at] = number(&hex[2 * at..2 * at + 2]) as u8;
        }
    }
    out
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden_v1").join(name)
}

/// What the image of this name is today.
fn images() -> Vec<(&'static str, Vec<u8>)> {
    let keys = pool_keys();
    let block = |block: Box<[u8; 4096]>| block.to_vec();
    let mut images = vec![
        ("superblock", block(superblock().encode(keys.block(), 1, 1 << 20).unwrap())),
        ("superblock_approved", block(superblock_approved().encode(keys.block(), 1, 1 << 20).unwrap())),
        ("key_block", block(key_block().encode(keys.block(), DeviceIx(1), 1, (1 << 20) + KEYS_AT).unwrap())),
        ("owner_block", block(owner_block().encode(keys.block(), DeviceIx(1), 1, (1 << 20) + OWNER_AT))),
        ("segment_header", block(segment_header(Class::Data, Cipher::Gcm).encode(keys.block()))),
        ("fragment_gcm", fragment(Cipher::Gcm)),
        ("fragment_stored_nonce", fragment(Cipher::GcmStoredNonce)),
        ("fragment_gmac", fragment(Cipher::Gmac)),
        ("node", node(None).0),
        ("node_host_sealed", node(Some(&host())).0),
        ("map_leaf", map_leaf().encode()),
        ("interior", interior().encode().to_vec()),
        ("container", container().encode()),
        ("fingerprints", fingerprints().encode()),
        ("segment_table", encode_leaf(&segment_entries())),
        ("pool_record", pool_record().encode().unwrap()),
        ("domain_record", domain_record().encode().unwrap()),
        ("volume_record", volume_record().encode().unwrap()),
        ("records", encoded_records()),
        ("snapshot_record", snapshot_record().encode().unwrap()),
        ("snapshot_records", encoded_snapshot_records()),
        ("retarget_record", encoded_retarget()),
        ("fingerprints_record", encoded_fingerprints()),
        ("journal_batch", batch(journal_epoch(), Batch::new())),
    ];
    images.sort();
    images
}

/// Of a pool of the FIPS modes.
fn superblock_approved() -> Superblock {
    let features = Features { incompatible: FEATURE_APPROVED, ..superblock().features };
    Superblock { features, ..superblock() }
}

fn host() -> HostSeal {
    use cryptfold_reduce_format::keys::HostMapKey;
    HostSeal::new(&HostMapKey::derive(b"the host's volume key", POOL, uuid::Uuid::from_u128(5)))
}

fn fragment(cipher: Cipher) -> Vec<u8> {
    let key = segment_key(Class::Data, cipher);
    let plain = text(80);
    let header = FragmentHeader { first: chunk(77, 5), chunks: 2, codec: Codec::Lz4, body_bytes: 80 };
    let mut out = vec![0; header.unit_bytes(&key)];
    seal_fragment(&key, 4096, &header, &[&plain], nonce(cipher), &mut out).unwrap();
    out
}

/// Not compressed: what zstd makes of it may change with its version.
fn node(host: Option<&HostSeal>) -> (Vec<u8>, NodePtr) {
    let key = segment_key(Class::Metadata, Cipher::Gcm);
    let mut out = Vec::new();
    let options = NodeOptions { host: host.map(|host| (host, [3; 12])), ..NodeOptions::default() };
    let ptr = seal_node(&key, 8192, node_id(), Epoch(4), &text(200), options, &mut out).unwrap();
    (out, ptr)
}

fn map_leaf() -> MapLeaf {
    let mut leaf = MapLeaf::default();
    let targets = [
        Target::Chunk(chunk(77, 5)),
        Target::Chunk(chunk(77, 6)),
        Target::Zero,
        Target::Pattern(0x1122_3344_5566_7788),
        Target::Chunk(chunk(77, 7)),
        Target::Uncorrectable,
        Target::Chunk(chunk(MAX_CONTAINER, 511)),
    ];
    for (at, target) in targets.into_iter().enumerate() {
        leaf.set(at * 73, MapEntry { target, birth: Epoch(at as u32), host_key: HostKeyId(at as u16 % 2) });
    }
    leaf
}

fn interior() -> Interior {
    let mut node = Interior::default();
    node.set(0, Some(&ptr(1)));
    node.set(7, Some(&ptr(2)));
    node
}

fn segment_entries() -> Vec<SegmentEntry> {
    let open = SegmentEntry {
        state: SegmentState::Sealed,
        class: Some(Class::Metadata),
        domain: DomainId(3),
        generation: Generation(2),
        incarnation: Incarnation(7),
        used_bytes: 4 << 20,
        live_bytes: 1 << 20,
        shard: ShardIx(1),
    };
    let reserved = SegmentEntry { state: SegmentState::Reserved, ..SegmentEntry::default() };
    vec![reserved, SegmentEntry::default(), open]
}

fn encoded_records() -> Vec<u8> {
    let mut out = Vec::new();
    with_records(|record| record.encode(&mut out).unwrap());
    out
}

/// One record of each kind.
fn with_records(mut each: impl FnMut(&Record<'_>)) {
    let (addr, incarnation) = (SEGMENT, Incarnation(7));
    let (volume, domain) = (VolumeId(5), DomainId(3));
    let container = chunk(77, 5).container();
    let fragment = entry(5, 2, 9, 4096, 5000);
    let moved = [(&entry(5, 1, 10, 4096, 3000)).into(), (&entry(6, 1, 10, 7096, 3000)).into()];
    let chunks =
        (0..4).map(|at| MapEntry { target: Target::Chunk(chunk(77, 5 + at)), ..MapEntry::default() });
    let zeros = [MapEntry { target: Target::Zero, birth: Epoch(3), host_key: HostKeyId(1) }; 3];
    let mut map = Vec::new();
    runs(chunks.chain(zeros), &mut map);
    let (pool_bytes, domain_bytes, volume_bytes) = (
        pool_record().encode().unwrap(),
        domain_record().encode().unwrap(),
        volume_record().encode().unwrap(),
    );
    let (generation, shard, class) = (Generation(2), ShardIx(1), Class::Data);
    for record in [
        Record::SegmentOpen { addr, incarnation, class, domain, generation, shard },
        Record::SegmentSeal { addr, incarnation, used_bytes: 4 << 20 },
        Record::SegmentEmpty { addr, incarnation },
        Record::SegmentFree { addr, incarnation },
        Record::SegmentBad { addr },
        Record::ContainerOpen { container },
        Record::ContainerClose { container },
        Record::ContainerDrop { container },
        Record::FragmentAdd {
            container,
            fragment,
            fingerprints: &[Fingerprint([1; 16]), Fingerprint([2; 16])],
        },
        Record::FragmentMove { first: chunk(77, 5), fragments: &moved },
        Record::Refs { container, changes: &[RefChange::new(5, 3), RefChange::new(6, -1)] },
        Record::MapSet { volume, lba: Lba(1000), runs: &map },
        Record::MapFill { volume, lba: Lba(0), count: 1 << 30, entry: MapEntry::default() },
        Record::VolumeCreate { record: &volume_bytes },
        Record::VolumeResize { volume, blocks: 1 << 21 },
        Record::VolumeRename { volume, name: "näme" },
        Record::VolumeFlags { volume, set: 1, clear: 2 },
        Record::VolumeUpdate { record: &volume_bytes },
        Record::VolumeDelete { volume },
        Record::VolumeGone { volume },
        Record::Snapshot { volume, epoch: Epoch(5), record: &volume_bytes },
        Record::Clone { snapshot: volume, record: &volume_bytes },
        Record::DomainCreate { record: &domain_bytes },
        Record::DomainUpdate { record: &domain_bytes },
        Record::DomainErase { domain },
        Record::EpochAdvance { epoch: Epoch(9) },
        Record::PoolUpdate { record: &pool_bytes },
    ] {
        each(&record);
    }
}

/// What snapshots added: they came with the first version's blocks and units.
fn with_snapshot_records(mut each: impl FnMut(&Record<'_>)) {
    let (volume, bytes) = (VolumeId(5), snapshot_record().encode().unwrap());
    for record in [
        Record::Snapshot { volume, epoch: Epoch(10), record: &bytes },
        Record::MapMerge { volume, leaf: 7, count: 3 },
        Record::MapOwn { volume, leaf: (1 << 31) - 1, count: 1, from: OwnFrom::Snapshots },
        Record::MapOwn { volume, leaf: 0, count: 1, from: OwnFrom::Base },
        Record::MapOwn { volume, leaf: 0, count: 1, from: OwnFrom::Bases },
    ] {
        each(&record);
    }
}

/// What late deduplication added.
const RETARGETS: fn() -> [Retarget; 2] =
    || [Retarget::new(0, chunk(77, 5)), Retarget::new(511, chunk(1, 511))];

fn encoded_retarget() -> Vec<u8> {
    let mut out = Vec::new();
    let changes = RETARGETS();
    Record::MapRetarget { volume: VolumeId(5), leaf: 9, changes: &changes }.encode(&mut out).unwrap();
    out
}

#[test]
fn retargets_are_read_and_checked() {
    let bytes = image("retarget_record");
    let read: Vec<_> = RecordReader::new(&bytes).collect::<Result<_, _>>().unwrap();
    let changes = RETARGETS();
    assert_eq!(read, [Record::MapRetarget { volume: VolumeId(5), leaf: 9, changes: &changes }]);
    assert_eq!((changes[1].slot(), changes[1].addr()), (511, Some(chunk(1, 511))));
    let mut out = Vec::new();
    let beyond = [Retarget::new(512, chunk(77, 5))];
    assert!(Record::MapRetarget { volume: VolumeId(5), leaf: 9, changes: &beyond }.encode(&mut out).is_err());
}

/// What changing a domain's keys added.
#[test]
fn fingerprints_made_anew_are_read_and_checked() {
    let container = ContainerId::new(77).unwrap();
    let bytes = image("fingerprints_record");
    let read: Vec<_> = RecordReader::new(&bytes).collect::<Result<_, _>>().unwrap();
    let fingerprints = [Fingerprint([1; 16]), Fingerprint::NONE, Fingerprint([3; 16])];
    assert_eq!(read, [Record::Fingerprints { container, fingerprints: &fingerprints }]);
    let mut out = Vec::new();
    let beyond = [Fingerprint([1; 16]); 513];
    assert!(Record::Fingerprints { container, fingerprints: &beyond }.encode(&mut out).is_err());
    // A mark of how far a change of keys has come is kept; a program without it keeps it as an unknown field.
    let record = DomainRecord { renewed: 9, ..domain_record() };
    assert_eq!(DomainRecord::decode(&record.encode().unwrap()).unwrap(), record);
}

fn encoded_fingerprints() -> Vec<u8> {
    let mut out = Vec::new();
    let fingerprints = [Fingerprint([1; 16]), Fingerprint::NONE, Fingerprint([3; 16])];
    let container = ContainerId::new(77).unwrap();
    Record::Fingerprints { container, fingerprints: &fingerprints }.encode(&mut out).unwrap();
    out
}

fn encoded_snapshot_records() -> Vec<u8> {
    let mut out = Vec::new();
    with_snapshot_records(|record| record.encode(&mut out).unwrap());
    out
}

fn scope() -> Scope {
    Scope::Domain { domain: DomainId(3), generation: Generation(2) }
}

fn domain_journal_key(epoch: JournalEpoch) -> JournalKey {
    JournalKey::derive(&data_key().journal_root(POOL), epoch)
}

fn batch(epoch: JournalEpoch, mut batch: Batch) -> Vec<u8> {
    with_records(|record| {
        let in_domain = matches!(
            record,
            Record::ContainerOpen { .. }
                | Record::ContainerClose { .. }
                | Record::ContainerDrop { .. }
                | Record::FragmentAdd { .. }
                | Record::FragmentMove { .. }
                | Record::Refs { .. }
                | Record::MapSet { .. }
                | Record::MapFill { .. }
        );
        assert!(batch.push(if in_domain { scope() } else { Scope::Pool }, record).unwrap());
    });
    let cursor =
        Cursor { pool: POOL, shard: ShardIx(1), sequence: Sequence(100), position: 5000, chain: [8; 16] };
    let mut sealer = BatchSealer::new(pool_keys().journal(), epoch, cursor);
    let (key, mut out) = (domain_journal_key(epoch), Vec::new());
    sealer.seal(&batch, Sequence(98), |asked| (asked == scope()).then_some(&key), &mut out).unwrap();
    out
}

#[test]
fn what_is_written_is_the_first_version() {
    for (name, bytes) in images() {
        let pinned = std::fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(dump(&bytes), pinned, "{name}");
    }
}

#[test]
#[ignore = "writes images that do not exist yet"]
fn write_missing_images() {
    for (name, bytes) in images() {
        if !path(name).exists() {
            std::fs::write(path(name), dump(&bytes)).unwrap();
        }
    }
    // Its nonces are random: it is read, and not written again.
    if !path(STORED_NONCES).exists() {
        std::fs::write(path(STORED_NONCES), dump(&batch(stored_epoch(), Batch::with_stored_nonces())))
            .unwrap();
    }
    if !path("zstd_frame").exists() {
        let (codec, frame) = Compressor::new().compress_node(&text(4096));
        assert_eq!(codec, Codec::Zstd);
        std::fs::write(path("zstd_frame"), dump(&frame)).unwrap();
    }
}

const STORED_NONCES: &str = "journal_batch_stored_nonces";

fn image(name: &str) -> Vec<u8> {
    undump(&std::fs::read_to_string(path(name)).unwrap())
}

fn image_block(name: &str) -> [u8; 4096] {
    image(name).try_into().unwrap()
}

#[test]
fn blocks_of_the_first_version_are_read() {
    let keys = pool_keys();
    let read = Superblock::parse(&image_block("superblock"), 1 << 20).unwrap();
    assert_eq!(read.verify(keys.block()).unwrap(), superblock());
    let read = Superblock::parse(&image_block("superblock_approved"), 1 << 20).unwrap();
    let read = read.verify(keys.block()).unwrap();
    assert!(read == superblock_approved() && read.is_approved());
    let read = KeyBlock::parse(&image_block("key_block"), (1 << 20) + KEYS_AT).unwrap();
    assert_eq!(read.verify(keys.block()).unwrap(), key_block());
    let read = OwnerBlock::parse(&image_block("owner_block"), (1 << 20) + OWNER_AT).unwrap();
    assert_eq!(read.verify(keys.block()).unwrap(), owner_block());
    let read =
        SegmentHeader::open(&image_block("segment_header"), SEGMENT, SEGMENT_AT, keys.block()).unwrap();
    assert_eq!(read, segment_header(Class::Data, Cipher::Gcm));
}

#[test]
fn units_of_the_first_version_are_read() {
    for (name, cipher) in [
        ("fragment_gcm", Cipher::Gcm),
        ("fragment_stored_nonce", Cipher::GcmStoredNonce),
        ("fragment_gmac", Cipher::Gmac),
    ] {
        let (key, mut out) = (segment_key(Class::Data, cipher), vec![0; 80]);
        let header = open_fragment(&key, 4096, &image(name), &mut out).unwrap();
        assert_eq!((header.first, header.chunks, out), (chunk(77, 5), 2, text(80)), "{name}");
    }
    let key = segment_key(Class::Metadata, Cipher::Gcm);
    let expected = Expected { tree: Tree::Map, owner: Some(5), level: 0, index: 1234 };
    for (name, host) in [("node", None), ("node_host_sealed", Some(host()))] {
        let (_, ptr) = node(host.as_ref());
        let mut out = Vec::new();
        let codec = &mut Decompressor::new();
        open_node(&key, &ptr, &expected, &image(name), host.as_ref(), codec, &mut out).unwrap();
        assert_eq!(out, text(200), "{name}");
    }
}

#[test]
fn metadata_of_the_first_version_is_read() {
    assert_eq!(MapLeaf::decode(&image("map_leaf")).unwrap(), map_leaf());
    assert_eq!(Interior::decode(&image("interior")).unwrap(), interior());
    assert_eq!(Container::decode(&image("container")).unwrap(), container());
    assert_eq!(Fingerprints::decode(&image("fingerprints")).unwrap(), fingerprints());
    assert_eq!(decode_leaf(&image("segment_table")).unwrap(), segment_entries());
    assert_eq!(PoolRecord::decode(&image("pool_record")).unwrap(), pool_record());
    assert_eq!(DomainRecord::decode(&image("domain_record")).unwrap(), domain_record());
    assert_eq!(VolumeRecord::decode(&image("volume_record")).unwrap(), volume_record());
    assert_eq!(VolumeRecord::decode(&image("snapshot_record")).unwrap(), snapshot_record());
}

#[test]
fn journals_of_the_first_version_are_read() {
    let records = image("records");
    let mut read = RecordReader::new(&records);
    with_records(|record| assert_eq!(read.next().unwrap().unwrap(), *record));
    assert!(read.next().is_none());
    let records_of_snapshots = image("snapshot_records");
    let mut read = RecordReader::new(&records_of_snapshots);
    with_snapshot_records(|record| assert_eq!(read.next().unwrap().unwrap(), *record));
    assert!(read.next().is_none());

    for name in ["journal_batch", STORED_NONCES] {
        assert_eq!(records_of(&image(name)), records, "{name}: grouping keeps the order");
    }
}

/// The records of a batch in their order.
fn records_of(bytes: &[u8]) -> Vec<u8> {
    let header = BatchHeader::parse(bytes).unwrap();
    let key = JournalKey::derive(pool_keys().journal(), JournalEpoch::of(&header));
    let mut batch = OpenBatch::open(bytes, &key).unwrap();
    let domain_key = domain_journal_key(JournalEpoch::of(&header));
    let mut read = Vec::new();
    for (at, found) in batch.scopes().enumerate().collect::<Vec<_>>() {
        let key = (found != Scope::Pool).then_some(&domain_key);
        for record in batch.records(at, key).unwrap() {
            record.unwrap().encode(&mut read).unwrap();
        }
    }
    read
}

#[test]
fn zstd_frames_of_the_first_version_are_read() {
    // 4096 bytes of `text`, level 1, by zstd 1.5.7.
    let (plain, mut out) = (text(4096), vec![0; 4096]);
    Decompressor::new().decompress(Codec::Zstd, &image("zstd_frame"), &mut out).unwrap();
    assert_eq!(out, plain);
}
