//! Catalogue records and pages of them: what decodes encodes to something that decodes to the same.
#![no_main]

use cryptfold_reduce_format::record::{DomainRecord, PoolRecord, VolumeRecord, decode_page, encode_page};
use libfuzzer_sys::fuzz_target;

macro_rules! round {
    ($record:ty, $data:expr) => {
        if let Ok(record) = <$record>::decode($data) {
            let bytes = record.encode().expect("what was decoded has room");
            assert_eq!(<$record>::decode(&bytes).as_ref(), Ok(&record));
        }
    };
}

fuzz_target!(|data: &[u8]| {
    round!(PoolRecord, data);
    round!(DomainRecord, data);
    round!(VolumeRecord, data);
    if let Ok(page) = decode_page(data) {
        let owned: Vec<_> = page.iter().map(|(id, bytes)| (*id, bytes.to_vec())).collect();
        let bytes = encode_page(&owned).expect("what was decoded has room");
        assert_eq!(decode_page(&bytes), Ok(page));
    }
});
