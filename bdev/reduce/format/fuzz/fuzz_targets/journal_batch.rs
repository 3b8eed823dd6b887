//! Journal batches and records: any bytes as a batch, and any bytes as the records of a batch that opens.
#![no_main]

use cryptfold_reduce_format::entry::RecordReader;
use cryptfold_reduce_format::ids::{OwnerEpoch, ShardIx};
use cryptfold_reduce_format::journal::{BatchHeader, JournalEpoch, JournalKey, OpenBatch};
use cryptfold_reduce_format::keys::{PoolKey, PoolKeys, Secret};
use cryptfold_reduce_format::record::{DomainRecord, PoolRecord, VolumeRecord, decode_page};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = BatchHeader::parse(data) {
        let keys = PoolKeys::derive(&PoolKey(Secret::take(&mut [7; 32])), header.pool);
        let epoch = JournalEpoch { owner_epoch: OwnerEpoch(1), shard: ShardIx(0), ..JournalEpoch::of(&header) };
        assert!(OpenBatch::open(data, &JournalKey::derive(keys.journal(), epoch)).is_err());
    }
    let mut again = Vec::new();
    let mut read = 0;
    for record in RecordReader::new(data).map_while(Result::ok) {
        record.encode(&mut again).expect("what decodes encodes");
        read = again.len();
    }
    assert_eq!(again[..read], data[..read], "one encoding for each record");
    let _ = decode_page(data);
    for encoded in [
        PoolRecord::decode(data).map(|record| record.encode()),
        DomainRecord::decode(data).map(|record| record.encode()),
        VolumeRecord::decode(data).map(|record| record.encode()),
    ]
    .into_iter()
    .flatten()
    {
        encoded.expect("what decodes encodes");
    }
});
