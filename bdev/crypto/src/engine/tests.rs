//! Engines against the standards' vectors and against each other.

use proptest::prelude::*;

use super::*;

fn unhex(s: &str) -> Vec<u8> {
    assert!(s.len().is_multiple_of(2), "odd hex");
    (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect()
}

fn engines(key: &XtsKey) -> Vec<XtsContext> {
    [EngineKind::AwsLc, EngineKind::Portable]
        .into_iter()
        .filter(|k| k.supports(key.cipher()))
        .map(|k| XtsContext::with_engine(k, key).unwrap())
        .collect()
}

fn key(cipher: XtsCipher, seed: u8) -> XtsKey {
    let bytes: Vec<u8> = (0..cipher.key_bytes()).map(|i| (i as u8).wrapping_mul(7) ^ seed).collect();
    XtsKey::for_cipher(cipher, &bytes).unwrap()
}

/// Runs every vector of a file through every engine that has the cipher, four ways; returns (vectors, refused keys).
fn run_vectors(file: &str) -> (usize, Vec<&str>) {
    let mut count = 0;
    let mut refused = Vec::new();
    for line in file.lines().filter(|l| !l.starts_with('#')) {
        let f: Vec<&str> = line.split(' ').collect();
        let [name, key, tweak, plain, cipher] = f[..] else { panic!("bad line {line}") };
        let tweak = u128::from_le_bytes(unhex(tweak).try_into().unwrap());
        let (plain, cipher) = (unhex(plain), unhex(cipher));
        let key = match XtsKey::new(&unhex(key)) {
            Ok(k) => k,
            Err(KeyError::EqualHalves) => {
                refused.push(name);
                continue;
            }
            Err(e) => panic!("{name}: {e}"),
        };
        for x in engines(&key) {
            let mut out = vec![0; plain.len()];
            x.encrypt(tweak, &plain, &mut out);
            assert_eq!(out, cipher, "{name} encrypt, {}", x.kind());
            x.decrypt_in_place(tweak, &mut out);
            assert_eq!(out, plain, "{name} decrypt in place, {}", x.kind());
            x.encrypt_in_place(tweak, &mut out);
            assert_eq!(out, cipher, "{name} encrypt in place, {}", x.kind());
            let mut back = vec![0; plain.len()];
            x.decrypt(tweak, &out, &mut back);
            assert_eq!(back, plain, "{name} decrypt, {}", x.kind());
        }
        count += 1;
    }
    (count, refused)
}

#[test]
fn ieee_1619_annex_b() {
    // B.1 has an all-zero key: equal halves, which the 2018 edition and FIPS 140 forbid.
    assert_eq!(run_vectors(include_str!("vectors/ieee1619.txt")), (13, vec!["B.1"]));
}

#[test]
fn nist_cavp() {
    let (count, refused) = run_vectors(include_str!("vectors/cavp.txt"));
    assert_eq!((count, refused.len()), (128, 0));
}

#[test]
fn keys_that_can_not_be_used_are_refused() {
    assert_eq!(XtsKey::new(&[1; 48]).unwrap_err(), KeyError::Length { got_bytes: 48 });
    assert_eq!(XtsKey::new(&[]).unwrap_err(), KeyError::Length { got_bytes: 0 });
    assert_eq!(XtsKey::new(&[7; 64]).unwrap_err(), KeyError::EqualHalves);
    assert_eq!(XtsKey::from_halves(&[7; 16], &[7; 16]).unwrap_err(), KeyError::EqualHalves);
    assert_eq!(
        XtsKey::from_halves(&[7; 16], &[8; 32]).unwrap_err(),
        KeyError::Halves { key_bytes: 16, key2_bytes: 32 }
    );
    let e = XtsKey::for_cipher(XtsCipher::Aes256, &[1; 32]).unwrap_err();
    assert_eq!(e.to_string(), "AES-256-XTS needs a key of 64 bytes (two halves), this one has 32");
    let mut nearly = [9; 32];
    nearly[31] = 8;
    assert_eq!(XtsKey::new(&nearly).unwrap().cipher(), XtsCipher::Aes128);
}

#[test]
fn aes_128_runs_on_the_portable_engine() {
    let key = key(XtsCipher::Aes128, 1);
    assert_eq!(
        XtsContext::with_engine(EngineKind::AwsLc, &key).unwrap_err(),
        EngineError::Unsupported { engine: EngineKind::AwsLc, cipher: XtsCipher::Aes128 }
    );
    assert_eq!(XtsContext::new(&key).unwrap().kind(), EngineKind::Portable);
    assert_eq!(XtsContext::new(&self::key(XtsCipher::Aes256, 1)).unwrap().kind(), EngineKind::AwsLc);
}

#[test]
fn nothing_of_a_key_is_printed() {
    let key = XtsKey::from_halves(&[0xab; 32], &[0xcd; 32]).unwrap();
    let x = XtsContext::new(&key).unwrap();
    let text = format!("{key:?} {x:?}");
    assert_eq!(text, "XtsKey(AES-256-XTS, [redacted]) XtsContext(aws-lc, [redacted])");
}

/// dm-crypt's `plain64` over 4096-byte sectors numbers the units in 512-byte sectors: the second unit of a device has
/// tweak 8, and each unit is one pass over 4096 bytes, not eight over 512.
#[test]
fn plain64_steps_in_512_byte_sectors() {
    let key = key(XtsCipher::Aes256, 2);
    let plain: Vec<u8> = (0..3 * 4096).map(|i| (i / 5) as u8).collect();
    for x in engines(&key) {
        let mut run = vec![0; plain.len()];
        let plain64 = UnitRun { first_tweak: 16, tweak_step: 8, unit_bytes: 4096 };
        x.run(Direction::Encrypt, plain64, [&plain[..]], [&mut run[..]]);
        for (i, (p, c)) in plain.chunks(4096).zip(run.chunks(4096)).enumerate() {
            let mut unit = vec![0; 4096];
            x.encrypt(16 + 8 * i as u128, p, &mut unit);
            assert_eq!(unit, c, "unit {i}");
        }
    }
}

#[test]
#[should_panic(expected = "a data unit of 24 bytes")]
fn a_unit_that_is_no_multiple_of_an_aes_block_is_our_bug() {
    XtsContext::new(&key(XtsCipher::Aes256, 3)).unwrap().encrypt_in_place(0, &mut [0; 24]);
}

#[test]
#[should_panic(expected = "destination longer than source")]
fn sides_of_different_length_are_our_bug() {
    let x = XtsContext::new(&key(XtsCipher::Aes256, 3)).unwrap();
    let run = UnitRun { first_tweak: 0, tweak_step: 1, unit_bytes: 512 };
    x.run(Direction::Encrypt, run, [&[0; 512][..]], [&mut [0; 512][..], &mut [0; 512][..]]);
}

/// Cuts `data` at `cuts` (taken modulo what is left), so that pieces are of any length, empty ones included.
fn cut<'a>(mut data: &'a mut [u8], cuts: &[usize]) -> Vec<&'a mut [u8]> {
    let mut out = Vec::new();
    for c in cuts {
        let (a, b) = data.split_at_mut(c % (data.len() + 1));
        out.push(a);
        data = b;
    }
    out.push(data);
    out
}

proptest! {
    #[test]
    fn engines_agree_on_any_cutting(
        (wide, seed, first, step) in (any::<bool>(), any::<u8>(), any::<u128>(), 0u64..20),
        unit_bytes in prop::sample::select(vec![16usize, 48, 512, 4096]),
        units in 0usize..6,
        cuts in prop::collection::vec(0usize..9000, 0..6),
        cuts_to in prop::collection::vec(0usize..9000, 0..6),
        data in prop::collection::vec(any::<u8>(), 64),
    ) {
        let key = key(if wide { XtsCipher::Aes256 } else { XtsCipher::Aes128 }, seed);
        let run = UnitRun { first_tweak: first, tweak_step: step, unit_bytes };
        let mut plain: Vec<u8> = data.iter().copied().cycle().take(units * unit_bytes).collect();
        // Oracle: one unit after the other on the portable engine.
        let oracle = XtsContext::with_engine(EngineKind::Portable, &key).unwrap();
        let mut want = plain.clone();
        for (i, u) in want.chunks_mut(unit_bytes).enumerate() {
            oracle.encrypt_in_place(first.wrapping_add(i as u128 * u128::from(step)), u);
        }
        let plain_was = plain.clone();
        for x in engines(&key) {
            let mut got = vec![0; plain.len()];
            x.run(Direction::Encrypt, run, cut(&mut plain, &cuts).iter().map(|p| &**p), cut(&mut got, &cuts_to));
            prop_assert_eq!(&got, &want, "{} out of place", x.kind());
            x.run_in_place(Direction::Decrypt, run, cut(&mut got, &cuts));
            prop_assert_eq!(&got, &plain_was, "{} back in place", x.kind());
            x.run_in_place(Direction::Encrypt, run, cut(&mut got, &cuts_to));
            prop_assert_eq!(&got, &want, "{} in place", x.kind());
            let mut back = vec![0; plain.len()];
            x.run(Direction::Decrypt, run, cut(&mut got, &cuts_to).iter().map(|p| &**p), cut(&mut back, &cuts));
            prop_assert_eq!(&back, &plain_was, "{} back out of place", x.kind());
        }
    }
}
