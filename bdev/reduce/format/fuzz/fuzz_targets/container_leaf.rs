//! Leaves: what decodes encodes to the same bytes.
#![no_main]

use cryptfold_reduce_format::container::{Container, Fingerprints};
use cryptfold_reduce_format::map::MapLeaf;
use cryptfold_reduce_format::node::Interior;
use cryptfold_reduce_format::segtable::{decode_leaf, encode_leaf};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(container) = Container::decode(data) {
        assert_eq!(container.encode(), data);
    }
    if let Ok(leaf) = Fingerprints::decode(data) {
        assert_eq!(leaf.encode(), data);
    }
    if let Ok(leaf) = MapLeaf::decode(data) {
        assert_eq!(leaf.encode(), data);
    }
    if let Ok(entries) = decode_leaf(data) {
        assert_eq!(encode_leaf(&entries), data);
    }
    if let Ok(node) = Interior::decode(data) {
        assert!(data.starts_with(node.encode()) || node.iter().next().is_none());
    }
});
