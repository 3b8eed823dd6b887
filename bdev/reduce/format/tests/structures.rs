//! Round trips of arbitrary values, a container against its model, codecs, fingerprints, geometry.

mod common;

use std::collections::BTreeMap;

use common::*;
use cryptfold_reduce_format::codec::*;
use cryptfold_reduce_format::container::*;
use cryptfold_reduce_format::entry::*;
use cryptfold_reduce_format::fingerprint::*;
use cryptfold_reduce_format::fragment::MAX_CHUNKS;
use cryptfold_reduce_format::ids::*;
use cryptfold_reduce_format::journal::*;
use cryptfold_reduce_format::keys::FingerprintSecret;
use cryptfold_reduce_format::map::*;
use cryptfold_reduce_format::owner::*;
use cryptfold_reduce_format::record::*;
use cryptfold_reduce_format::segtable::SegmentState;
use cryptfold_reduce_format::superblock::*;
use cryptfold_reduce_format::wire::WireError;
use proptest::prelude::*;

fn map_entry() -> impl Strategy<Value = MapEntry> {
    let target = prop_oneof![
        Just(Target::Unmapped),
        Just(Target::Zero),
        any::<u64>().prop_map(Target::Pattern),
        (1..=MAX_CONTAINER, 0..512u16).prop_map(|(container, slot)| Target::Chunk(chunk(container, slot))),
        Just(Target::Uncorrectable),
    ];
    (target, any::<u32>(), any::<u16>()).prop_map(|(target, birth, host_key)| MapEntry {
        target,
        birth: Epoch(birth),
        host_key: HostKeyId(host_key),
    })
}

#[derive(Clone, Debug)]
enum Change {
    /// At the next slot or behind it; `back`: before it.
    Add {
        gap: u16,
        back: bool,
        chunks: u8,
    },
    Refs {
        slot: u16,
        delta: i32,
    },
    /// A reference to each of these slots.
    Run {
        slot: u16,
        count: u16,
    },
    /// A reference less.
    Drop {
        slot: u16,
    },
    Split {
        pick: usize,
    },
    Close,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (0..40u16, any::<bool>(), 1..=MAX_CHUNKS as u8)
            .prop_map(|(gap, back, chunks)| Change::Add { gap, back, chunks }),
        5 => (0..520u16, -3..400i32).prop_map(|(slot, delta)| Change::Refs { slot, delta }),
        3 => (0..512u16, 1..40u16).prop_map(|(slot, count)| Change::Run { slot, count }),
        4 => (0..520u16).prop_map(|slot| Change::Drop { slot }),
        2 => any::<usize>().prop_map(|pick| Change::Split { pick }),
        1 => Just(Change::Close),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn map_leaves_round_trip(entries in prop::collection::vec((0..512usize, map_entry()), 0..600)) {
        let mut leaf = MapLeaf::default();
        let mut model = vec![MapEntry::default(); 512];
        for (at, entry) in entries {
            leaf.set(at, entry);
            model[at] = entry;
        }
        prop_assert_eq!(leaf.iter().collect::<Vec<_>>(), model);
        prop_assert_eq!(MapLeaf::decode(&leaf.encode()).unwrap(), leaf);
    }

    #[test]
    fn runs_say_what_the_entries_say(entries in prop::collection::vec(map_entry(), 0..40), repeat in 1..700usize) {
        let entries: Vec<_> = entries.iter().flat_map(|entry| {
            (0..repeat).map_while(|at| match entry.target {
                Target::Chunk(addr) => Some(MapEntry { target: Target::Chunk(addr.plus(at as u16)?), ..*entry }),
                _ => Some(*entry),
            })
        }).collect();
        let mut found = Vec::new();
        runs(entries.iter().copied(), &mut found);
        prop_assert_eq!(found.iter().flat_map(MapRun::entries).collect::<Vec<_>>(), entries);
    }

    #[test]
    fn containers_follow_their_model(changes in prop::collection::vec(change(), 0..60)) {
        let mut container = Container::default();
        let mut refs = BTreeMap::new();
        let mut fragments: Vec<FragmentEntry> = Vec::new();
        for (step, change) in changes.into_iter().enumerate() {
            match change {
                Change::Add { gap, back, chunks } => {
                    let used = container.used();
                    let first = if back { used.saturating_sub(gap) } else { used + gap };
                    let new = entry(first, chunks, step as u32, 4096 * step as u32, 100 + step as u32);
                    let free = (first..new.end_slot()).all(|slot| !fragments.iter().any(|f| f.holds(slot)));
                    let fits = free && !container.is_closed() && usize::from(new.end_slot()) <= SLOTS;
                    prop_assert_eq!(container.add(&new).is_ok(), fits);
                    if fits {
                        fragments.push(new);
                        fragments.sort_by_key(|entry| entry.first_slot);
                        prop_assert_eq!(container.used(), used.max(new.end_slot()));
                    }
                }
                Change::Refs { slot, delta } => {
                    let old = *refs.get(&slot).unwrap_or(&0i64);
                    let held = fragments.iter().any(|entry| entry.holds(slot));
                    let new = old + i64::from(delta);
                    let fits = slot < 512 && new >= 0 && (held || delta <= 0);
                    prop_assert_eq!(container.change_refs(slot, delta).is_ok(), fits, "{} {}", slot, delta);
                    if fits {
                        refs.insert(slot, new);
                    }
                }
                Change::Run { slot, count } => {
                    let fits = slot + count <= 512
                        && (slot..slot + count).all(|slot| fragments.iter().any(|entry| entry.holds(slot)));
                    if !fits {
                        continue;
                    }
                    let (before, mut woken) = (container.live(), 0);
                    let each = |entry: &FragmentEntry, old: usize, now: usize| {
                        let lived = |slot: &u16| refs.get(slot).is_some_and(|&refs| refs > 0);
                        assert_eq!((entry.first_slot..entry.end_slot()).filter(lived).count(), old);
                        woken += now - old;
                    };
                    prop_assert_eq!(container.take_refs(slot, count, each), Ok(()));
                    prop_assert_eq!(usize::from(container.live() - before), woken);
                    (slot..slot + count).for_each(|slot| *refs.entry(slot).or_insert(0) += 1);
                }
                Change::Drop { slot } => {
                    let dropped = container.drop_ref(slot);
                    let Some(left) = refs.get(&slot).filter(|&&refs| refs > 0).map(|refs| refs - 1) else {
                        prop_assert!(dropped.is_err());
                        continue;
                    };
                    refs.insert(slot, left);
                    let at = fragments.iter().position(|entry| entry.holds(slot)).unwrap();
                    let lives = |slot: &u16| refs.get(slot).is_some_and(|&refs| refs > 0);
                    let live = (fragments[at].first_slot..fragments[at].end_slot()).filter(lives).count();
                    let last = (left == 0).then_some((fragments[at], live));
                    prop_assert_eq!(dropped, Ok((left as u32, last)));
                    if left == 0 && live == 0 {
                        fragments.remove(at);
                    }
                }
                Change::Split { pick } if !fragments.is_empty() => {
                    // As garbage collection does: one fragment per run of live slots.
                    let old = fragments.remove(pick % fragments.len());
                    let mut new: Vec<FragmentEntry> = Vec::new();
                    for slot in old.first_slot..old.end_slot() {
                        if refs.get(&slot).is_none_or(|&refs| refs == 0) {
                            continue;
                        }
                        match new.last_mut() {
                            Some(last) if last.end_slot() == slot => last.chunks += 1,
                            _ => new.push(entry(slot, 1, 1000 + step as u32, 8192, 77)),
                        }
                    }
                    prop_assert_eq!(container.replace(old.first_slot, &new).unwrap(), old);
                    fragments.extend(new);
                    fragments.sort_by_key(|entry| entry.first_slot);
                }
                Change::Split { .. } => {}
                Change::Close => container.close(),
            }
            prop_assert_eq!(container.fragments().collect::<Vec<_>>(), fragments.clone());
            for slot in 0..512 {
                prop_assert_eq!(i64::from(container.refs(slot)), *refs.get(&slot).unwrap_or(&0));
                let held = fragments.iter().find(|entry| entry.holds(slot)).copied();
                prop_assert_eq!(container.fragment_of(slot), held);
            }
            let live = refs.values().filter(|&&refs| refs > 0).count();
            prop_assert_eq!(usize::from(container.live()), live);
            let mut back = Container::decode(&container.encode()).unwrap();
            prop_assert_eq!(back.encode(), container.encode());
            prop_assert_eq!(back.live(), container.live());
            prop_assert!(container.encode().len() <= container.encoded_bound());
            if container.used() > 0 {
                back.close();
                prop_assert!(back.is_closed());
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Container::decode(&bytes);
        let _ = Fingerprints::decode(&bytes);
        let _ = PoolRecord::decode(&bytes);
        let _ = DomainRecord::decode(&bytes);
        let _ = VolumeRecord::decode(&bytes);
        let _ = decode_page(&bytes).map(|records| records.len());
        let _ = RecordReader::new(&bytes).count();
        let _ = BatchHeader::parse(&bytes);
        let mut out = vec![0; 512];
        for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
            let _ = Decompressor::new().decompress(codec, &bytes, &mut out);
            if let Ok(found) = Decompressor::new().decompress_front(codec, &bytes, &mut out, 100) {
                prop_assert!((100..=512).contains(&found));
            }
        }
    }

    #[test]
    fn the_front_of_a_fragment_decodes_by_itself(seed in any::<u64>(), chunks in 1..17usize, words in 1..6000usize) {
        let plain: Vec<u8> = (0..chunks * 4096)
            .map(|at| ((at % words + at / 9000) as u64).wrapping_mul(seed | 1).to_le_bytes()[3])
            .collect();
        let mut decompressor = Decompressor::new();
        for setting in ["lz4", "zstd:-7", "zstd:1", "zstd:19"] {
            let mut out = vec![0; plain.len()];
            let packed = Compressor::new().compress(setting.parse().unwrap(), &[&plain], &mut out);
            let Some((codec, len)) = packed else { continue };
            for wanted in (1..=chunks).map(|chunks| chunks * 4096) {
                let mut front = vec![0; plain.len()];
                let found = decompressor.decompress_front(codec, &out[..len], &mut front, wanted).unwrap();
                prop_assert!(found >= wanted);
                prop_assert!(front[..found] == plain[..found], "{} of {} bytes, {}", wanted, plain.len(), setting);
                if codec == Codec::Zstd {
                    // Up to the end of the block that has the last wanted byte, not all.
                    prop_assert_eq!(found, wanted.next_multiple_of(32768).min(plain.len()));
                }
            }
            // What ends before the wanted is an error, and the decoder goes on.
            let mut back = vec![0; plain.len() + 4096];
            let cut = decompressor.decompress_front(codec, &out[..len / 2], &mut back[..plain.len()], plain.len() - 1);
            prop_assert!(cut.is_err());
            let short = decompressor.decompress_front(codec, &out[..len], &mut back, plain.len() + 1);
            prop_assert!(short.is_err(), "{}", setting);
            decompressor.decompress(codec, &out[..len], &mut back[..plain.len()]).unwrap();
            prop_assert_eq!(&back[..plain.len()], &plain);
        }
    }

    #[test]
    fn codecs_round_trip(seed in any::<u64>(), len in 1..8usize, words in 1..2000usize) {
        let plain: Vec<u8> = (0..len * 4096)
            .map(|at| ((at % words) as u64).wrapping_mul(seed | 1).to_le_bytes()[3])
            .collect();
        let mut compressor = Compressor::new();
        let mut decompressor = Decompressor::new();
        for setting in ["lz4", "zstd:-7", "zstd:1", "zstd:19", "adaptive"] {
            let mut out = vec![0; plain.len()];
            let pieces: Vec<_> = plain.chunks(4096).collect();
            let Some((codec, len)) = compressor.compress(setting.parse().unwrap(), &pieces, &mut out) else {
                continue;
            };
            prop_assert!(len <= plain.len() - worth(plain.len()));
            let mut back = vec![0; plain.len()];
            decompressor.decompress(codec, &out[..len], &mut back).unwrap();
            prop_assert_eq!(&back, &plain, "{}", setting);
            // A wrong expectation of the size is an error, shorter or longer.
            prop_assert!(decompressor.decompress(codec, &out[..len], &mut vec![0; plain.len() - 1]).is_err());
            prop_assert!(decompressor.decompress(codec, &out[..len], &mut vec![0; plain.len() + 1]).is_err());
        }
    }
}

#[test]
fn references_do_not_saturate() {
    let mut container = container();
    assert_eq!(container.change_refs(0, i32::MAX), Ok(1 + i32::MAX as u32));
    assert_eq!(container.change_refs(0, i32::MAX), Ok(u32::MAX));
    assert_eq!(container.change_refs(0, 1), Err(ContainerError::TooManyReferences { slot: 0 }));
    assert_eq!(Container::decode(&container.encode()).unwrap().refs(0), u32::MAX);
    assert_eq!(container.refs(1), 1);
    let bad = ContainerError::BadReference { slot: 1, refs: 1, delta: -2 };
    assert_eq!(container.change_refs(1, -2), Err(bad));
}

#[test]
fn replacing_a_fragment_may_not_lose_a_live_slot() {
    let mut container = container();
    let lost = container.replace(0, &[entry(0, 2, 1, 4096, 50)]);
    assert_eq!(lost, Err(ContainerError::Misfit { first_slot: 0, slot: 2 }));
    let outside = container.replace(0, &[entry(0, 5, 1, 4096, 50)]);
    assert_eq!(outside, Err(ContainerError::Misfit { first_slot: 0, slot: 0 }));
    assert_eq!(container.replace(1, &[]), Err(ContainerError::NoFragment { first_slot: 1 }));
    assert_eq!(container, common::container(), "a refused change changes nothing");
}

#[test]
fn a_full_container_is_small_in_memory() {
    let mut container = Container::default();
    for at in 0..128 {
        container.add(&entry(at * 4, 4, 9, 4096 + u32::from(at) * 6000, 6000)).unwrap();
        (at * 4..at * 4 + 4).for_each(|slot| assert_eq!(container.change_refs(slot, 1), Ok(1)));
    }
    assert!(container.memory_bytes() <= 3 << 10, "{}", container.memory_bytes());
    assert!(container.encode().len() <= 128 * 9 + 16, "{}", container.encode().len());
}

fn hasher(id: HashId, bits: u32) -> Hasher {
    Hasher::with_bits(id, &FingerprintSecret(secret(0x40)), bits)
}

#[test]
fn batched_fingerprints_are_keyed_blake3() {
    let data = noise(40 * 4096);
    let (chunks, _) = data.as_chunks::<4096>();
    for n in 0..=40 {
        let refs: Vec<_> = chunks[..n].iter().collect();
        let mut out = vec![Fingerprint::NONE; n];
        hasher(HashId::Blake3, 128).hash_chunks(&refs, &mut out);
        for (chunk, found) in refs.iter().zip(&out) {
            let hash = blake3::keyed_hash(secret(0x40).expose(), *chunk);
            assert_eq!(found.0, hash.as_bytes()[..16], "{n} at once");
            assert_eq!(hasher(HashId::Blake3, 128).hash_one(chunk), *found);
        }
    }
}

#[test]
fn fingerprints_depend_on_secret_and_hash_and_can_be_shortened() {
    let data = noise(4096);
    let chunk: &Chunk = data.as_slice().try_into().unwrap();
    let full = hasher(HashId::Blake3, 128).hash_one(chunk);
    assert_ne!(full, hasher(HashId::HmacSha256, 128).hash_one(chunk));
    assert_ne!(full, Hasher::new(HashId::Blake3, &FingerprintSecret(secret(1))).hash_one(chunk));
    let short = hasher(HashId::Blake3, 12).hash_one(chunk);
    assert_eq!(short.prefix(), full.prefix() & 0xfff);
    assert_eq!(&short.0[2..], &[0; 14]);
    assert_ne!(hasher(HashId::Blake3, 1).hash_one(chunk), Fingerprint::NONE);
}

#[test]
fn patterns() {
    let mut chunk = [0; 4096];
    assert_eq!(pattern(&chunk), Some(0));
    for word in chunk.chunks_exact_mut(8) {
        word.copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes());
    }
    assert_eq!(pattern(&chunk), Some(0x1122_3344_5566_7788));
    for at in [0, 7, 8, 63, 64, 2048, 4095] {
        let mut chunk = chunk;
        chunk[at] ^= 1;
        assert_eq!(pattern(&chunk), None, "byte {at}");
    }
}

#[test]
fn the_probe_skips_what_does_not_compress_and_nothing_else() {
    let random = noise(1 << 20);
    // A real program is real compressible data; compressed, it is real incompressible data.
    let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let program = &program[..program.len().min(16 << 20)];
    let mut compressor = Compressor::new();
    let mut squeezed = Vec::new();
    for piece in program.chunks(65536) {
        let mut out = vec![0; 65536];
        if let Some((_, len)) = compressor.compress(Compression::Zstd(9), &[piece], &mut out) {
            squeezed.extend_from_slice(&out[..len]);
        }
    }
    for size in [4096, 16384, 131_072] {
        let skipped = |data: &[u8]| {
            let (mut skipped, mut all) = (0, 0);
            data.chunks_exact(size).for_each(|piece| {
                skipped += usize::from(looks_incompressible(&[piece]));
                all += 1;
            });
            f64::from(skipped as u32) / f64::from(all.max(1) as u32)
        };
        assert!(skipped(&random) > 0.98, "random, {size}: {}", skipped(&random));
        assert!(skipped(&squeezed) > 0.9, "compressed, {size}: {}", skipped(&squeezed));
        let (mut plain, mut lost) = (0, 0);
        for piece in program.chunks_exact(size) {
            plain += size;
            if looks_incompressible(&[piece]) {
                lost += size - compressor.compress_node(piece).1.len();
            }
        }
        assert!(lost * 500 < plain, "{size}: {lost} of {plain} bytes of savings missed");
    }
    assert!(!looks_incompressible(&[&text(4096)]));
    let mixed: Vec<_> = [noise(3 * 4096), text(4096)].concat();
    assert!(!looks_incompressible(&mixed.chunks(4096).collect::<Vec<_>>()), "a quarter compresses");
}

#[test]
fn compression_settings() {
    for text in ["off", "lz4", "zstd:-7", "zstd:1", "zstd:19", "adaptive"] {
        let setting: Compression = text.parse().unwrap();
        assert_eq!(setting.to_string(), text);
        assert_eq!(Compression::from_raw(setting.to_raw()), Some(setting));
    }
    for text in ["", "on", "zstd:", "zstd:20", "zstd:-8", "zstd:1000", "LZ4", "zstd:1 "] {
        assert!(text.parse::<Compression>().is_err(), "{text}");
    }
}

#[test]
fn records_keep_what_they_do_not_know() {
    let record = pool_record();
    assert_eq!(PoolRecord::decode(&record.encode().unwrap()).unwrap().unknown, record.unknown);
    let mut bytes = record.encode().unwrap();
    bytes.extend_from_slice(&[0x01, 0xf0, 0, 0]);
    let error = PoolRecord::decode(&bytes).unwrap_err();
    assert_eq!(error, WireError::Unknown { what: "pool record", kind: 0xf001 });
    let twice = [record.encode().unwrap(), record.encode().unwrap()].concat();
    assert!(PoolRecord::decode(&twice).is_err());
    let nameless = VolumeRecord { name: String::new(), ..volume_record() };
    assert!(nameless.encode().is_err());
    assert!(VolumeRecord { name: "a\nb".to_owned(), ..volume_record() }.encode().is_err());
}

#[test]
fn pages_hold_ascending_records_of_one_page() {
    let record = volume_record().encode().unwrap();
    let page = encode_page(&[(8, record.clone()), (15, record.clone())]).unwrap();
    let found: Vec<_> = decode_page(&page).unwrap().iter().map(|(id, _)| *id).collect();
    assert_eq!(found, [8, 15]);
    for ids in [[15, 8], [8, 8], [7, 8]] {
        assert!(encode_page(&ids.map(|id| (id, record.clone()))).is_err(), "{ids:?}");
    }
}

#[test]
fn a_full_batch_says_so_and_stays_as_it_was() {
    fills_up(journal_epoch(), Batch::new());
    fills_up(stored_epoch(), Batch::with_stored_nonces());
}

fn fills_up(epoch: JournalEpoch, mut batch: Batch) {
    let name = "n".repeat(255);
    let record = Record::VolumeRename { volume: VolumeId(1), name: &name };
    let mut pushed = 0;
    while batch.push(Scope::Pool, &record).unwrap() {
        pushed += 1;
    }
    assert_eq!(batch.blocks(), MAX_BATCH_BLOCKS);
    let cursor = Cursor { pool: POOL, shard: ShardIx(1), sequence: Sequence(1), position: 0, chain: [0; 16] };
    let mut sealer = BatchSealer::new(pool_keys().journal(), epoch, cursor);
    let mut out = Vec::new();
    let header = sealer.seal(&batch, Sequence(0), |_| None, &mut out).unwrap();
    let key = JournalKey::derive(pool_keys().journal(), JournalEpoch::of(&header));
    let mut open = OpenBatch::open(&out, &key).unwrap();
    assert_eq!(open.records(0, None).unwrap().filter(|found| *found == Ok(record)).count(), pushed);
    let zero = Record::VolumeDelete { volume: VolumeId(0) };
    let before = batch.clone();
    assert!(batch.push(Scope::Pool, &zero).is_err());
    assert_eq!(format!("{before:?}"), format!("{batch:?}"), "a refused record leaves nothing behind");
}

#[test]
fn a_sealer_refuses_keys_of_another_epoch() {
    let cursor = Cursor { pool: POOL, shard: ShardIx(1), sequence: Sequence(5), position: 0, chain: [0; 16] };
    let mut sealer = BatchSealer::new(pool_keys().journal(), journal_epoch(), cursor.clone());
    let scope = Scope::Domain { domain: DomainId(1), generation: Generation(1) };
    let mut batch = Batch::new();
    let container = ContainerId::new(1).unwrap();
    assert!(batch.push(scope, &Record::ContainerOpen { container }).unwrap());
    let other = JournalEpoch { owner_epoch: OwnerEpoch(12), ..journal_epoch() };
    let other = JournalKey::derive(&data_key().journal_root(POOL), other);
    let mut out = Vec::new();
    let error = sealer.seal(&batch, Sequence(4), |_| Some(&other), &mut out).unwrap_err();
    assert_eq!(error, SealBatchError::Key { scope });
    let (durable, sequence) = (Sequence(5), Sequence(5));
    let error = sealer.seal(&batch, durable, |_| None, &mut out).unwrap_err();
    assert_eq!(error, SealBatchError::Durable { durable, sequence });
    let error = sealer.seal(&Batch::with_stored_nonces(), Sequence(4), |_| None, &mut out).unwrap_err();
    assert_eq!(error, SealBatchError::Nonces);
    assert_eq!(*sealer.cursor(), cursor, "nothing was counted");
}

#[test]
fn geometry_keeps_anchors_and_journals_out_of_the_segments() {
    assert_eq!(anchor_offsets(1 << 30).unwrap(), [0, 1 << 20, 1 << 29, (1 << 30) - (16 << 10)]);
    assert_eq!(anchor_offsets((1 << 30) + 5000).unwrap()[3], (1 << 30) - (16 << 10));
    assert!(anchor_offsets(1 << 20).is_err());
    let mut superblock = superblock();
    superblock.devices[0].blocks = 1 << 18;
    superblock.devices[0].anchor_blocks = 1 << 18;
    let geometry = Geometry::of(&superblock, DeviceIx(0)).unwrap();
    assert_eq!(geometry.segments, 256);
    let reserved: Vec<_> = (0..260).filter(|&at| geometry.is_reserved(SegmentNo(at))).collect();
    // Anchors at 0, 1 MiB, 512 MiB and the end; journals of 8 MiB at 16 MiB; beyond the end.
    assert_eq!(reserved, [0, 4, 5, 128, 255, 256, 257, 258, 259]);
    assert_eq!(Geometry::of(&superblock, DeviceIx(7)), None);
    let pairs = [copies_of(4), copies_of(5)].concat();
    assert_eq!(pairs, [0, 2, 1, 3], "two generations share no copy");
}

#[test]
fn the_life_of_a_segment() {
    use SegmentState::*;
    let all = [Free, Open, Sealed, PendingFree, Bad, Reserved];
    let steps: Vec<_> = all
        .into_iter()
        .flat_map(|from| all.into_iter().filter(move |&to| from.may_become(to)).map(move |to| (from, to)))
        .collect();
    let expected = [
        (Free, Open),
        (Free, Bad),
        (Open, Sealed),
        (Open, Bad),
        (Sealed, PendingFree),
        (Sealed, Bad),
        (PendingFree, Free),
        (PendingFree, Bad),
    ];
    assert_eq!(steps, expected);
}

#[test]
fn ownership() {
    let me = [1; 16];
    let block = owner_block();
    let later = OwnerBlock { beat: 18, ..block.clone() };
    let closed = OwnerBlock { state: OwnerState::Closed, ..block.clone() };
    assert_eq!(OwnerBlock::judge(&me, &block, &block), Ownership::Dead(block.clone()));
    assert_eq!(OwnerBlock::judge(&me, &block, &later), Ownership::Alive(later.clone()));
    assert_eq!(OwnerBlock::judge(&me, &block, &closed), Ownership::Free);
    assert_eq!(OwnerBlock::judge(&block.owner, &block, &block), Ownership::Mine);
    assert!(later.is_newer_than(&block) && !block.is_newer_than(&later));
}
