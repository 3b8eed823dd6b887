//! Every single flipped bit, every truncation and every wrong place is an error: never a panic, never wrong data.

mod common;

use common::*;
use cryptfold_reduce_format::block::{BlockError, BlockKey, refresh_checksum};
use cryptfold_reduce_format::codec::{Codec, Compression, Compressor, Decompressor};
use cryptfold_reduce_format::container::Container;
use cryptfold_reduce_format::entry::{Record, RefChange};
use cryptfold_reduce_format::fragment::*;
use cryptfold_reduce_format::ids::*;
use cryptfold_reduce_format::journal::*;
use cryptfold_reduce_format::keys::{DataKey, HostMapKey, PoolKey, PoolKeys};
use cryptfold_reduce_format::node::*;
use cryptfold_reduce_format::owner::OwnerBlock;
use cryptfold_reduce_format::sealed::{OpenError, SegmentKey};
use cryptfold_reduce_format::segment::*;
use cryptfold_reduce_format::slots::KeyBlock;
use cryptfold_reduce_format::superblock::*;

fn each_flip(bytes: &[u8], mut check: impl FnMut(usize, &[u8])) {
    let mut bad = bytes.to_vec();
    for bit in 0..bytes.len() * 8 {
        bad[bit / 8] ^= 1 << (bit % 8);
        check(bit, &bad);
        bad[bit / 8] ^= 1 << (bit % 8);
    }
}

fn as_block(bytes: &[u8]) -> &[u8; 4096] {
    bytes.try_into().unwrap()
}

#[test]
fn flipped_bits_in_stand_alone_blocks() {
    let keys = pool_keys();
    let key = keys.block();
    type Open = fn(&[u8], &BlockKey) -> Result<(), BlockError>;
    let superblock_opens: Open = |bytes, key| Superblock::parse(as_block(bytes), 0)?.verify(key).map(|_| ());
    let keys_open: Open = |bytes, key| KeyBlock::parse(as_block(bytes), KEYS_AT)?.verify(key).map(|_| ());
    let owner_opens: Open =
        |bytes, key| OwnerBlock::parse(as_block(bytes), OWNER_AT)?.verify(key).map(|_| ());
    let segment_opens: Open =
        |bytes, key| SegmentHeader::open(as_block(bytes), SEGMENT, SEGMENT_AT, key).map(|_| ());
    let parse = [
        (superblock().encode(key, 0, 0).unwrap(), 0, superblock_opens),
        (key_block().encode(key, DeviceIx(0), 0, KEYS_AT).unwrap(), 1, keys_open),
        (owner_block().encode(key, DeviceIx(0), 0, OWNER_AT), 2, owner_opens),
        (segment_header(Class::Data, Cipher::Gcm).encode(key), 3, segment_opens),
    ];
    for (block, kind, open) in parse {
        assert_eq!(open(&*block, key), Ok(()), "kind {kind}");
        each_flip(&*block, |bit, bad| {
            let expected = match bit / 8 {
                0..8 => "no pool here",
                8..4064 => "checksum",
                _ => "key does not fit",
            };
            let error = open(bad, key).unwrap_err().to_string();
            assert!(error.contains(expected), "kind {kind} bit {bit}: {error}");
        });
    }
}

#[test]
fn the_ways_a_superblock_can_be_wrong_are_told_apart() {
    let keys = pool_keys();
    let block = superblock().encode(keys.block(), 1, 1 << 20).unwrap();
    let parse = |block: &[u8; 4096]| Superblock::parse(block, 1 << 20).map(|_| ());
    assert_eq!(parse(&[0; 4096]), Err(BlockError::Blank));
    let mut other = *block;
    other[..8].copy_from_slice(b"LUKS\xba\xbe\x00\x02");
    assert_eq!(parse(&other), Err(BlockError::NotOurs { found: *b"LUKS\xba\xbe\x00\x02" }));
    // Versions and features of a later program, whose checksum fits.
    let changed = |at: usize, byte: u8| {
        let mut block = *block;
        block[at] = byte;
        refresh_checksum(&mut block);
        parse(&block)
    };
    assert_eq!(changed(8, 2), Err(BlockError::Version { found_major: 2, found_minor: 0 }));
    assert_eq!(changed(10, 9), Ok(()), "a minor version does not matter");
    assert_eq!(changed(72, 8), Err(BlockError::Features { unknown: 8 }));
    assert_eq!(changed(12, 2), Err(BlockError::Kind { found: 2, expected: 1 }));
    assert_eq!(changed(300, 1), Err(BlockError::Malformed { field: "reserved", value: 1 }));
    assert_eq!(changed(148, 1), Err(BlockError::Malformed { field: "segment size", value: (4 << 20) | 1 }));
    let misplaced = Superblock::parse(&block, 0).map(|_| ());
    assert_eq!(misplaced, Err(BlockError::Misplaced { what: "offset", found: 1 << 20, expected: 0 }));
    let stranger = PoolKeys::derive(&PoolKey(secret(1)), POOL);
    let read = Superblock::parse(&block, 1 << 20).unwrap();
    assert_eq!(read.peek().name, "pööl");
    assert_eq!(read.verify(stranger.block()), Err(BlockError::WrongKey));
    let future = Features { read_only_compatible: 1, ..Features::default() };
    assert!(!Superblock { features: future, ..superblock() }.is_writable());
}

#[test]
fn a_segment_header_opens_at_its_own_segment_only() {
    let keys = pool_keys();
    let block = segment_header(Class::Data, Cipher::Gcm).encode(keys.block());
    let elsewhere = SegmentAddr { device: DeviceIx(0), ..SEGMENT };
    let error = SegmentHeader::open(&block, elsewhere, SEGMENT_AT, keys.block()).unwrap_err();
    assert_eq!(error, BlockError::Misplaced { what: "device", found: 1, expected: 0 });
    assert!(SegmentHeader::open(&block, SEGMENT, SEGMENT_AT + 4096, keys.block()).is_err());
}

fn sealed_fragment(key: &SegmentKey, offset: u32) -> (Vec<u8>, FragmentHeader) {
    fragment_with(key, offset, nonce(key.cipher()))
}

fn fragment_with(key: &SegmentKey, offset: u32, nonce: Option<[u8; 12]>) -> (Vec<u8>, FragmentHeader) {
    let plain = text(4096);
    let mut body = vec![0; 4096];
    let (codec, len) = Compressor::new().compress(Compression::Zstd(1), &[&plain], &mut body).unwrap();
    let header = FragmentHeader { first: chunk(77, 5), chunks: 1, codec, body_bytes: len as u32 };
    let mut unit = vec![0; header.unit_bytes(key)];
    seal_fragment(key, offset, &header, &[&body[..len]], nonce, &mut unit).unwrap();
    (unit, header)
}

fn read(key: &SegmentKey, offset: u32, unit: &[u8]) -> Result<Vec<u8>, OpenError> {
    let mut out = vec![0xaa; 4096];
    let expected = (chunk(77, 5), 1);
    read_fragment(key, offset, expected, &mut unit.to_vec(), &mut Decompressor::new(), &mut out).map(|_| out)
}

#[test]
fn flipped_bits_and_truncations_of_fragments() {
    for (cipher, nonce) in CIPHERS.into_iter().flat_map(|cipher| [(cipher, nonce(cipher)), (cipher, None)]) {
        let key = segment_key(Class::Data, cipher);
        let (unit, _) = fragment_with(&key, 4096, nonce);
        assert_eq!(read(&key, 4096, &unit).unwrap(), text(4096));
        each_flip(&unit, |bit, bad| {
            assert!(read(&key, 4096, bad).is_err(), "{cipher:?} bit {bit}");
        });
        for len in 0..unit.len() {
            let error = read(&key, 4096, &unit[..len]).unwrap_err();
            assert!(matches!(error, OpenError::Truncated { .. }), "{cipher:?} {len}: {error}");
        }
    }
}

#[test]
fn a_fragment_opens_at_its_place_and_in_its_incarnation_only() {
    for (cipher, nonce) in CIPHERS.into_iter().flat_map(|cipher| [(cipher, nonce(cipher)), (cipher, None)]) {
        let key = segment_key(Class::Data, cipher);
        let (unit, _) = fragment_with(&key, 4096, nonce);
        assert_eq!(read(&key, 4097, &unit), Err(OpenError::Tag { place: key.place(4097) }));
        let base = segment_header(Class::Data, cipher);
        for (what, header) in [
            ("incarnation", SegmentHeader { incarnation: Incarnation(8), ..base.clone() }),
            (
                "segment",
                SegmentHeader { addr: SegmentAddr { segment: SegmentNo(8), ..SEGMENT }, ..base.clone() },
            ),
            (
                "device",
                SegmentHeader { addr: SegmentAddr { device: DeviceIx(0), ..SEGMENT }, ..base.clone() },
            ),
            ("salt", SegmentHeader { salt: [0; 32], ..base.clone() }),
            ("class", SegmentHeader { class: Class::Metadata, ..base.clone() }),
            ("domain", SegmentHeader { domain: DomainId(4), ..base.clone() }),
            ("generation", SegmentHeader { generation: Generation(3), ..base.clone() }),
            ("pool", SegmentHeader { pool: uuid::Uuid::nil(), ..base.clone() }),
        ] {
            assert!(
                read(&SegmentKey::derive(&data_key(), &header), 4096, &unit).is_err(),
                "{cipher:?} {what}"
            );
        }
        let stranger = SegmentKey::derive(&DataKey(secret(1)), &base);
        assert!(read(&stranger, 4096, &unit).is_err());
    }
}

#[test]
fn nonces_that_are_made_are_never_the_same() {
    let key = segment_key(Class::Data, Cipher::GcmStoredNonce);
    let units = [0, 1].map(|_| fragment_with(&key, 4096, None).0);
    let header = FRAGMENT_HEADER_BYTES;
    let parts =
        units.each_ref().map(|unit| (&unit[header..header + 12], &unit[header + 12..unit.len() - 16]));
    assert_ne!(parts[0].0, parts[1].0, "the nonce");
    assert_ne!(parts[0].1, parts[1].1, "the same plaintext");
}

#[test]
fn an_authentic_fragment_in_the_wrong_table_entry_is_refused() {
    let key = segment_key(Class::Data, Cipher::Gcm);
    let (unit, _) = sealed_fragment(&key, 4096);
    let header = FragmentHeader { first: chunk(77, 5), chunks: 1, codec: Codec::Raw, body_bytes: 4096 };
    let mut raw = vec![0; header.unit_bytes(&key)];
    seal_fragment(&key, 4096, &header, &[&text(4096)], None, &mut raw).unwrap();
    let mut out = vec![0; 8192];
    for expected in [(chunk(77, 6), 1), (chunk(78, 5), 1), (chunk(77, 5), 2)] {
        for mut unit in [unit.clone(), raw.clone()] {
            let found = read_fragment(&key, 4096, expected, &mut unit, &mut Decompressor::new(), &mut out);
            assert!(matches!(found, Err(OpenError::WrongUnit { .. })), "{found:?}");
            assert_eq!(out, [0; 8192], "no plaintext of another chunk");
        }
    }
}

#[test]
fn moving_a_fragment_keeps_it_and_unbinds_the_old_place() {
    let (old, new) = (segment_key(Class::Data, Cipher::Gcm), segment_key(Class::Data, Cipher::Gmac));
    let (mut unit, header) = sealed_fragment(&old, 4096);
    let mut out = vec![0; header.unit_bytes(&new)];
    move_fragment((&old, 4096), &mut unit, (&new, 9000), None, &mut out).unwrap();
    assert_eq!(read(&new, 9000, &out).unwrap(), text(4096));
    assert!(read(&new, 4096, &out).is_err());
}

fn host(byte: u8) -> HostSeal {
    HostSeal::new(&HostMapKey::derive(&[byte; 64], POOL, POOL))
}

const EXPECTED: Expected = Expected { tree: Tree::Map, owner: Some(5), level: 0, index: 1234 };

fn open(
    key: &SegmentKey,
    ptr: &NodePtr,
    unit: &[u8],
    host: Option<&HostSeal>,
    expected: &Expected,
) -> Result<Vec<u8>, OpenError> {
    let mut out = vec![1, 2, 3];
    open_node(key, ptr, expected, unit, host, &mut Decompressor::new(), &mut out).map(|_| out)
}

#[test]
fn flipped_bits_swaps_and_moves_of_nodes() {
    let plain = text(900);
    for (cipher, sealed) in CIPHERS.into_iter().flat_map(|cipher| [(cipher, false), (cipher, true)]) {
        let key = segment_key(Class::Metadata, cipher);
        let seal = sealed.then(|| host(1));
        let options = || NodeOptions {
            host: seal.as_ref().map(|seal| (seal, [4; 12])),
            nonce: nonce(cipher),
            ..NodeOptions::default()
        };
        let mut compressor = Compressor::new();
        let mut out = vec![9; 10];
        let compressed = NodeOptions { compressor: Some(&mut compressor), ..options() };
        let ptr = seal_node(&key, 4096, node_id(), Epoch(4), &plain, compressed, &mut out).unwrap();
        let unit = out.split_off(10);
        assert_eq!(unit.len(), ptr.unit_bytes as usize);
        let host = seal.as_ref();
        assert_eq!(open(&key, &ptr, &unit, host, &EXPECTED).unwrap(), plain);
        each_flip(&unit, |bit, bad| {
            assert!(open(&key, &ptr, bad, host, &EXPECTED).is_err(), "{cipher:?} bit {bit}");
        });
        if sealed {
            assert!(open(&key, &ptr, &unit, None, &EXPECTED).is_err(), "needs the host's key");
            assert!(
                open(&key, &ptr, &unit, Some(&self::host(2)), &EXPECTED).is_err(),
                "needs that host's key"
            );
        }
        for expected in [
            Expected { tree: Tree::Containers, ..EXPECTED },
            Expected { owner: Some(6), ..EXPECTED },
            Expected { level: 1, ..EXPECTED },
            Expected { index: 1235, ..EXPECTED },
        ] {
            let found = open(&key, &ptr, &unit, host, &expected);
            assert!(matches!(found, Err(OpenError::WrongUnit { .. })), "{found:?}");
        }
        // A newer version of the same node is not what this parent vouched for.
        let mut newer = Vec::new();
        let newer_ptr =
            seal_node(&key, 4096, node_id(), Epoch(4), &text(899), options(), &mut newer).unwrap();
        assert!(open(&key, &ptr, &newer, host, &EXPECTED).is_err());
        assert!(open(&key, &NodePtr { tag: newer_ptr.tag, ..ptr }, &unit, host, &EXPECTED).is_err());
        // Garbage collection needs no host's key.
        let mut moved = Vec::new();
        let to = move_node(&key, &ptr, &unit, (&key, 50_000), nonce(cipher), &mut moved).unwrap();
        assert_eq!(open(&key, &to, &moved, host, &EXPECTED).unwrap(), plain);
    }
}

#[test]
fn flipped_bits_in_containers_change_the_container_or_fail() {
    let container = container();
    let bytes = container.encode();
    each_flip(&bytes, |bit, bad| {
        if let Ok(found) = Container::decode(bad) {
            assert_ne!(found, container, "bit {bit}");
            assert_eq!(found.encode(), bad, "bit {bit}: one encoding for each container");
        }
    });
    for len in 0..bytes.len() {
        assert!(Container::decode(&bytes[..len]).is_err());
    }
}

fn batch(sealer: &mut BatchSealer, domain: &JournalKey, mut batch: Batch) -> Vec<u8> {
    let scope = Scope::Domain { domain: DomainId(3), generation: Generation(2) };
    let container = ContainerId::new(9).unwrap();
    assert!(batch.push(Scope::Pool, &Record::EpochAdvance { epoch: Epoch(9) }).unwrap());
    let refs = Record::Refs { container, changes: &[RefChange::new(5, 3)] };
    assert!(batch.push(scope, &refs).unwrap());
    let mut out = Vec::new();
    sealer.seal(&batch, Sequence(0), |_| Some(domain), &mut out).unwrap();
    out
}

fn sealer(epoch: JournalEpoch) -> BatchSealer {
    let cursor = Cursor { pool: POOL, shard: ShardIx(1), sequence: Sequence(1), position: 0, chain: [0; 16] };
    BatchSealer::new(pool_keys().journal(), epoch, cursor)
}

#[test]
fn flipped_bits_and_broken_chains_of_journals() {
    flips_and_chains(journal_epoch(), Batch::new);
}

#[test]
fn flipped_bits_and_broken_chains_of_journals_with_stored_nonces() {
    flips_and_chains(stored_epoch(), Batch::with_stored_nonces);
}

fn flips_and_chains(epoch: JournalEpoch, empty: fn() -> Batch) {
    let keys = pool_keys();
    let key = JournalKey::derive(keys.journal(), epoch);
    let domain = JournalKey::derive(&data_key().journal_root(POOL), epoch);
    let mut sealer = sealer(epoch);
    let mut cursor = sealer.cursor().clone();
    let (first, second) = (batch(&mut sealer, &domain, empty()), batch(&mut sealer, &domain, empty()));
    each_flip(&first, |bit, bad| {
        let opened = BatchHeader::parse(bad).and_then(|header| {
            OpenBatch::open(bad, &JournalKey::derive(keys.journal(), JournalEpoch::of(&header)))
        });
        assert!(opened.is_err(), "bit {bit}");
    });
    for bytes in [&first, &second] {
        let header = BatchHeader::parse(bytes).unwrap();
        header.follows(&cursor).unwrap();
        assert!(header.follows(&sealer.cursor().clone()).is_err());
        let mut open = OpenBatch::open(bytes, &key).unwrap();
        assert_eq!(open.scopes().len(), 2);
        assert_eq!(open.records(0, None).unwrap().count(), 1);
        assert!(
            matches!(open.records(1, None), Err(BatchError::GroupTag { group: 1, .. })),
            "needs the domain's key"
        );
        cursor = Cursor::after(&header);
    }
    assert_eq!(cursor, *sealer.cursor());
    // The wrong domain key: the batch opens, that group does not.
    let stranger = JournalKey::derive(&DataKey(secret(1)).journal_root(POOL), epoch);
    let mut open = OpenBatch::open(&first, &key).unwrap();
    assert!(matches!(open.records(1, Some(&stranger)), Err(BatchError::GroupTag { .. })));
    assert!(OpenBatch::open(&first[..4095], &key).is_err());
}

#[test]
fn a_fragment_body_that_lies_about_its_size_is_refused() {
    let key = segment_key(Class::Data, Cipher::Gcm);
    let bomb = Compressor::new().compress_node(&vec![0; 60_000]);
    assert_eq!(bomb.0, Codec::Zstd);
    let header = FragmentHeader {
        first: chunk(77, 5),
        chunks: 1,
        codec: Codec::Zstd,
        body_bytes: bomb.1.len() as u32,
    };
    let mut unit = vec![0; header.unit_bytes(&key)];
    seal_fragment(&key, 4096, &header, &[&bomb.1], None, &mut unit).unwrap();
    assert!(matches!(read(&key, 4096, &unit), Err(OpenError::Decode(_))));
}
