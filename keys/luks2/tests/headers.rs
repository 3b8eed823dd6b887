//! Headers made by hand: what is refused, which copy counts, what a damaged one does. Those of the real tool are in
//! `keys/tests`.

use cryptfold_luks2::{Copy, Header, HeaderError, Place, ProofError, Refusal, testing};
use proptest::prelude::*;
use serde_json::{Value, json};

const COPY: usize = 16 << 10;
const DEVICE: u64 = 64 << 20;
const KEY: [u8; 64] = [0x5A; 64];

/// PBKDF2-HMAC-SHA-256 of KEY, salt "saltsaltsaltsaltsaltsaltsaltsalt", 1000 iterations; made with Python's hashlib.
const DIGEST: &str = "po7Dyin8yWDVmfh8FOjtJrcJM0ddq9KiOFJQ5X21Q0A=";

fn good() -> Value {
    json!({
        "keyslots": {"0": {"type": "luks2", "key_size": 64, "kdf": {}, "af": {}, "area": {}}},
        "tokens": {},
        "segments": {"0": {"type": "crypt", "offset": "16777216", "size": "dynamic", "iv_tweak": "0",
            "encryption": "aes-xts-plain64", "sector_size": 512}},
        "digests": {"0": {"type": "pbkdf2", "keyslots": ["0"], "segments": ["0"], "hash": "sha256", "iterations": 1000,
            "salt": "c2FsdHNhbHRzYWx0c2FsdHNhbHRzYWx0c2FsdHNhbHQ=", "digest": DIGEST}},
        "config": {"json_size": "12288", "keyslots_size": "16744448"}
    })
}

fn put_copy(area: &mut [u8], at: usize, sequence: u64, json: &Value) {
    let copy = &mut area[at..at + COPY];
    copy.fill(0);
    copy[..8].copy_from_slice(if at == 0 { b"LUKS\xba\xbe\0\x02" } else { b"SKUL\xba\xbe\0\x02" });
    copy[8..16].copy_from_slice(&(COPY as u64).to_be_bytes());
    copy[16..24].copy_from_slice(&sequence.to_be_bytes());
    copy[24..28].copy_from_slice(b"data");
    copy[168..204].copy_from_slice(b"aee8f3f8-4de0-4d78-99c2-0b076776073d");
    copy[256..264].copy_from_slice(&(at as u64).to_be_bytes());
    let text = json.to_string();
    copy[4096..4096 + text.len()].copy_from_slice(text.as_bytes());
    testing::stamp(area, at);
}

fn area(json: &Value) -> Vec<u8> {
    let mut area = vec![0; 2 * COPY];
    put_copy(&mut area, 0, 5, json);
    put_copy(&mut area, COPY, 5, json);
    area
}

fn header(json: &Value) -> Header {
    Header::parse(&area(json)).unwrap().unwrap()
}

fn refusal(change: impl FnOnce(&mut Value)) -> Refusal {
    let mut json = good();
    change(&mut json);
    header(&json).payload(Place::Attached, DEVICE).unwrap_err()
}

#[test]
fn a_good_header() {
    let h = header(&good());
    assert_eq!((h.label.as_str(), h.sequence, h.copy), ("data", 5, Copy::First));
    assert_eq!(h.uuid.to_string(), "aee8f3f8-4de0-4d78-99c2-0b076776073d");
    let p = h.payload(Place::Attached, DEVICE).unwrap();
    assert_eq!((p.segment.offset_bytes, p.segment.size_bytes, p.segment.iv_tweak), (16 << 20, None, 0));
    assert_eq!((p.segment.sector_bytes, p.key_bytes), (512, Some(64)));
    p.digest.prove(&KEY, 1000).unwrap();
    assert_eq!(p.digest.prove(&[0x5B; 64], 1000), Err(ProofError::WrongKey));
    assert_eq!(p.digest.prove(&KEY[..32], 1000), Err(ProofError::WrongKey));
    assert_eq!(p.digest.prove(&KEY, 999), Err(ProofError::TooManyIterations { asked: 1000, limit: 999 }));
    assert_eq!(Header::area_bytes(&area(&good())), Some(2 * COPY));
}

#[test]
fn a_payload_is_another_one_when_its_place_its_numbering_or_its_digest_is() {
    let of = |change: &dyn Fn(&mut Value)| {
        let mut json = good();
        change(&mut json);
        header(&json).payload(Place::Attached, DEVICE).unwrap().identity()
    };
    let same = of(&|_| {});
    assert_eq!(of(&|j| j["keyslots"]["1"] = j["keyslots"]["0"].clone()), same);
    assert_eq!(of(&|j| j["tokens"]["0"] = json!({"type": "t", "keyslots": []})), same);
    let mut seen = vec![same];
    for (path, value) in [
        ("/segments/0/offset", json!("20971520")),
        ("/segments/0/size", json!("8388608")),
        ("/segments/0/iv_tweak", json!("8")),
        ("/segments/0/sector_size", json!(4096)),
        ("/digests/0/iterations", json!(1001)),
        ("/digests/0/salt", json!("c2FsdA==")),
        ("/digests/0/digest", json!("qo7Dyin8yWDVmfh8FOjtJrcJM0ddq9KiOFJQ5X21Q0A=")),
    ] {
        let other = of(&|j| *j.pointer_mut(path).unwrap() = value.clone());
        assert!(!seen.contains(&other), "{path}");
        seen.push(other);
    }
}

#[test]
fn what_is_refused_and_why() {
    let with = |path: &'static str, v: Value| refusal(|j| *j.pointer_mut(path).unwrap() = v);
    let add = |path: &'static str, name: &'static str, v: Value| {
        refusal(|j| j.pointer_mut(path).unwrap()[name] = v)
    };
    let requires = |name: &'static str| add("/config", "requirements", json!({"mandatory": [name]}));
    assert_eq!(requires("online-reencrypt-v2"), Refusal::Reencryption);
    assert_eq!(requires("offline-reencrypt"), Refusal::Reencryption);
    assert_eq!(requires("opal"), Refusal::Opal);
    assert_eq!(requires("inline-hw-tags"), Refusal::Integrity);
    assert_eq!(requires("later\n"), Refusal::Requirement("later\\n".into()));
    assert_eq!(add("/config", "requirements", json!({"other": []})), Refusal::Requirement("other".into()));
    assert_eq!(add("/segments/0", "flags", json!(["in-reencryption"])), Refusal::Reencryption);
    assert_eq!(add("/segments", "1", json!({"type": "linear"})), Refusal::Segments(2));
    assert_eq!(with("/segments", json!({})), Refusal::Segments(0));
    assert_eq!(with("/segments/0/type", json!("hw-opal-crypt")), Refusal::Opal);
    assert_eq!(with("/segments/0/type", json!("linear")), Refusal::SegmentType("linear".into()));
    assert_eq!(add("/segments/0", "integrity", json!({"type": "hmac(sha256)"})), Refusal::Integrity);
    assert_eq!(
        with("/segments/0/encryption", json!("aes-cbc-essiv:sha256")),
        Refusal::Cipher("aes-cbc-essiv:sha256".into())
    );
    assert_eq!(with("/segments/0/sector_size", json!(2048)), Refusal::SectorSize(2048));
    assert_eq!(with("/keyslots/0/key_size", json!(48)), Refusal::KeyBytes(48));
    for (path, value) in [
        ("/segments/0/offset", "16777215"),
        ("/segments/0/offset", "0"),
        ("/segments/0/offset", "67108864"),
        ("/segments/0/size", "50331649"),
        ("/segments/0/size", "0"),
        ("/segments/0/size", "67108864"),
        ("/segments/0/iv_tweak", "18446744073709551615"),
    ] {
        assert!(matches!(with(path, json!(value)), Refusal::Geometry { .. }), "{path} {value}");
    }
    for (path, value) in [
        ("/segments/0/offset", json!(16_777_216)),
        ("/segments/0/offset", json!("+16777216")),
        ("/segments/0/offset", json!("99999999999999999999")),
        ("/segments/0/sector_size", json!("512")),
        ("/config", json!([])),
        ("/digests/0/salt", json!("*")),
    ] {
        assert!(matches!(with(path, value.clone()), Refusal::Json(_)), "{path} {value}");
    }
    for (path, value) in [
        ("/digests/0/type", json!("argon2id")),
        ("/digests/0/hash", json!("whirlpool")),
        ("/digests/0/hash", json!("sha512")),
        ("/digests/0/iterations", json!(0)),
        ("/digests/0/iterations", json!(1u64 << 32)),
        ("/digests/0/segments", json!(["1"])),
        ("/digests/0/salt", json!("")),
    ] {
        assert!(matches!(with(path, value.clone()), Refusal::Digest(_)), "{path} {value}");
    }
    let mut two = good();
    two["digests"]["1"] = two["digests"]["0"].clone();
    assert!(matches!(header(&two).payload(Place::Attached, DEVICE), Err(Refusal::Digest(_))));
    let mut odd = good();
    odd["segments"]["0"]["sector_size"] = json!(4096);
    odd["segments"]["0"]["iv_tweak"] = json!("7");
    assert!(matches!(
        header(&odd).payload(Place::Attached, DEVICE),
        Err(Refusal::Geometry { what: "iv_tweak", .. })
    ));
}

#[test]
fn a_detached_header_is_one_only_where_it_is_said() {
    let mut json = good();
    json["segments"]["0"]["offset"] = json!("0");
    let h = header(&json);
    assert!(h.payload(Place::Attached, DEVICE).unwrap_err().to_string().contains("detached"));
    assert_eq!(h.payload(Place::Detached, DEVICE).unwrap().segment.offset_bytes, 0);
}

#[test]
fn the_newer_valid_copy_counts() {
    let sequence = |area: &[u8]| Header::parse(area).map(|h| h.map(|h| (h.copy, h.sequence)));
    let mut both = area(&good());
    put_copy(&mut both, COPY, 6, &good());
    assert_eq!(sequence(&both), Ok(Some((Copy::Second, 6))));
    // A power cut while the second one was written.
    both[COPY + 5000] ^= 1;
    assert_eq!(sequence(&both), Ok(Some((Copy::First, 5))));
    // While the first one was.
    let mut torn = area(&good());
    torn[4200] ^= 1;
    assert_eq!(sequence(&torn), Ok(Some((Copy::Second, 5))));
    // Its size can not be trusted either.
    torn[8..16].fill(0xFF);
    assert_eq!(sequence(&torn), Ok(Some((Copy::Second, 5))));
    assert_eq!(Header::area_bytes(&torn), Some(8 << 20));
    torn[COPY + 9000] ^= 1;
    let e = sequence(&torn).unwrap_err().to_string();
    assert!(e.contains("first copy: size") && e.contains("second copy: the checksum is wrong"), "{e}");
    // A second copy alone: the host has put something else on the device.
    let mut other = area(&good());
    other[..4096].fill(0);
    assert_eq!(sequence(&other), Ok(None));
    assert_eq!(Header::area_bytes(&other), None);
    // A copy that was moved.
    let mut moved = vec![0; 4 * COPY];
    moved[..COPY].copy_from_slice(&area(&good())[..COPY]);
    moved[0] = b'X';
    moved.copy_within(..COPY, COPY);
    assert_eq!(sequence(&moved), Ok(None));
    let mut luks1 = area(&good());
    luks1[7] = 1;
    assert_eq!(Header::parse(&luks1), Err(HeaderError::Version(1)));
    assert!(Header::parse(&both[..5000]).is_err(), "too little was read");
}

#[test]
fn tokens() {
    let mut json = good();
    json["tokens"] = json!({
        "3": {"type": "cryptfold-kmip", "keyslots": [], "objects": ["1f-a", "1f-b"]},
        "1": {"type": "systemd-tpm2", "keyslots": ["0"]}, "x": {"type": "odd"}, "2": 5});
    let h = header(&json);
    assert_eq!(h.tokens().iter().map(|t| t.id).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(h.kmip_token().unwrap().unwrap().objects, ["1f-a", "1f-b"]);
    json["tokens"]["4"] = json["tokens"]["3"].clone();
    assert!(header(&json).kmip_token().is_err(), "two of them");
    assert_eq!(header(&good()).kmip_token(), Ok(None));
    for objects in [json!([]), json!(["a", "b", "c"]), json!([""]), json!(["a\n"]), json!("a"), json!([5])] {
        json["tokens"] = json!({"0": {"type": "cryptfold-kmip", "keyslots": [], "objects": objects}});
        assert!(header(&json).kmip_token().is_err());
    }
}

proptest! {
    #[test]
    fn any_damage_is_found_or_harmless(flips in prop::collection::vec((0..2 * COPY, 1u8..), 1..5)) {
        let mut bytes = area(&good());
        for (at, bits) in &flips {
            bytes[*at] ^= bits;
        }
        // Whatever copy counts, it is the one that was written.
        if let Ok(Some(h)) = Header::parse(&bytes) {
            prop_assert_eq!(h.payload(Place::Attached, DEVICE), header(&good()).payload(Place::Attached, DEVICE));
        }
    }

    #[test]
    fn any_json_is_refused_or_fits(text in r#"[{}\[\]":,0-9a-z]{0,200}"#, at in 0usize..600, cut in 0usize..80) {
        let mut json = good().to_string();
        let at = at.min(json.len());
        json.replace_range(at..(at + cut).min(json.len()), &text);
        let mut bytes = area(&good());
        for copy in [0, COPY] {
            bytes[copy + 4096..copy + COPY].fill(0);
            bytes[copy + 4096..copy + 4096 + json.len()].copy_from_slice(json.as_bytes());
            testing::stamp(&mut bytes, copy);
        }
        if let Ok(Some(h)) = Header::parse(&bytes) {
            let _ = (h.kmip_token(), h.tokens());
            if let Ok(p) = h.payload(Place::Attached, DEVICE) {
                prop_assert!(p.segment.offset_bytes < DEVICE);
            }
        }
    }
}
