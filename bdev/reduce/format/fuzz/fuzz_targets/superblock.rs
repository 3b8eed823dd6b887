//! Stand-alone blocks: any bytes behind a fitting checksum (so that the fuzzer gets past it).
#![no_main]

use cryptfold_reduce_format::block::{BLOCK_BYTES, refresh_checksum};
use cryptfold_reduce_format::ids::SegmentNo;
use cryptfold_reduce_format::owner::OwnerBlock;
use cryptfold_reduce_format::probe::probe_foreign;
use cryptfold_reduce_format::segment::SegmentHeader;
use cryptfold_reduce_format::slots::KeyBlock;
use cryptfold_reduce_format::superblock::{Geometry, Superblock};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = probe_foreign(data, data);
    let mut block = [0; BLOCK_BYTES];
    let len = data.len().min(4048);
    block[..len].copy_from_slice(&data[..len]);
    let offset = u64::from_le_bytes(block[40..48].try_into().unwrap());
    refresh_checksum(&mut block);
    if let Ok(found) = Superblock::parse(&block, offset) {
        for entry in &found.peek().devices {
            if let Some(geometry) = Geometry::of(found.peek(), entry.device) {
                (0..geometry.segments.min(64)).for_each(|at| {
                    geometry.is_reserved(SegmentNo(at));
                });
            }
        }
    }
    let _ = KeyBlock::parse(&block, offset);
    let _ = OwnerBlock::parse(&block, offset);
    let _ = SegmentHeader::parse(&block, offset);
});
