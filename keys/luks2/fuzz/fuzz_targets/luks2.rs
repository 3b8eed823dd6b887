//! Any bytes as a LUKS2 header, with checksums that are made right so that what lies behind them is reached: no panic, and
//! a payload that is accepted lies inside the device and can be numbered.
//!
//! The input: the fixed fields of the first copy (512 bytes), then JSON for both copies. The second copy gets a higher
//! sequence if the last byte is odd.
#![no_main]

use cryptfold_luks2::{Header, Place, testing};
use libfuzzer_sys::fuzz_target;

const COPY: usize = 16 << 10;

fuzz_target!(|bytes: &[u8]| {
    let _ = Header::parse(bytes);
    let mut area = vec![0; 2 * COPY];
    let (fixed, json) = bytes.split_at(bytes.len().min(512));
    let json = &json[..json.len().min(COPY - 4096)];
    for at in [0, COPY] {
        area[at..at + fixed.len()].copy_from_slice(fixed);
        area[at + 4096..at + 4096 + json.len()].copy_from_slice(json);
    }
    area[COPY..COPY + 6].copy_from_slice(b"SKUL\xba\xbe");
    area[COPY + 256..COPY + 264].copy_from_slice(&(COPY as u64).to_be_bytes());
    area[COPY + 23] |= bytes.last().copied().unwrap_or(0) & 1;
    testing::stamp(&mut area, 0);
    testing::stamp(&mut area, COPY);
    let device = 1 << 30;
    if let Ok(Some(header)) = Header::parse(&area) {
        let _ = (header.tokens(), header.kmip_token());
        for place in [Place::Attached, Place::Detached] {
            if let Ok(payload) = header.payload(place, device) {
                let s = payload.segment;
                assert!(s.offset_bytes < device && s.offset_bytes % u64::from(s.sector_bytes) == 0);
                assert!(s.size_bytes.is_none_or(|n| s.offset_bytes + n <= device));
                let _ = payload.digest.prove(&[1; 64], 1000);
            }
        }
    }
});
