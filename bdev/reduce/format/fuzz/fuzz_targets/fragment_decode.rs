//! Fragments and nodes: any bytes as a unit, and any bytes as the body of a unit that is authentic.
#![no_main]

use cryptfold_reduce_format::codec::{Codec, Decompressor};
use cryptfold_reduce_format::fingerprint::HashId;
use cryptfold_reduce_format::fragment::*;
use cryptfold_reduce_format::ids::*;
use cryptfold_reduce_format::keys::{DataKey, Secret};
use cryptfold_reduce_format::node::NodeHeader;
use cryptfold_reduce_format::sealed::SegmentKey;
use cryptfold_reduce_format::segment::{Cipher, Class, SegmentHeader};
use libfuzzer_sys::fuzz_target;

fn key() -> SegmentKey {
    let header = SegmentHeader {
        pool: uuid::Uuid::nil(),
        addr: SegmentAddr::default(),
        segment_bytes: 1 << 20,
        incarnation: Incarnation(1),
        salt: [0; 32],
        class: Class::Data,
        domain: DomainId(1),
        generation: Generation(1),
        cipher: Cipher::Gcm,
        hash: HashId::Blake3,
        codec: Codec::Zstd,
        shard: ShardIx(0),
        owner_epoch: OwnerEpoch(1),
    };
    SegmentKey::derive(&DataKey(Secret::take(&mut [1; 32])), &header)
}

fuzz_target!(|data: &[u8]| {
    let key = key();
    let mut out = vec![0; 2 * CHUNK_BYTES];
    let _ = NodeHeader::parse(data);
    assert!(open_fragment(&key, 4096, data, &mut out).is_err());
    let first = ContainerId::new(1).and_then(|container| ChunkAddr::new(container, 0)).unwrap();
    for codec in [Codec::Lz4, Codec::Zstd] {
        let header = FragmentHeader { first, chunks: 2, codec, body_bytes: data.len() as u32 };
        let mut unit = vec![0; header.unit_bytes(&key)];
        if seal_fragment(&key, 4096, &header, &[data], None, &mut unit).is_ok() {
            let _ = read_fragment(&key, 4096, (first, 2), &mut unit, &mut Decompressor::new(), &mut out);
        }
    }
});
