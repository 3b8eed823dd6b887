//! Any bytes from a key server: refused, or TTLV that encodes to the same bytes; no panic as an answer to any operation.
#![no_main]

use cryptfold_kmip::message::understand;
use cryptfold_kmip::ttlv::{HEAD_BYTES, Item, MAX_MESSAGE_BYTES, message_len};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(head) = bytes.first_chunk::<HEAD_BYTES>()
        && let Ok(len) = message_len(head)
    {
        assert!(len <= MAX_MESSAGE_BYTES);
    }
    if let Ok(item) = Item::decode(bytes) {
        assert_eq!(&item.encode().expect("it was as long before")[..], bytes);
    }
    understand(bytes);
});
