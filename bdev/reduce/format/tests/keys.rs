//! Key wrapping against the RFCs, key files, derivations, redaction.

mod common;

use aws_lc_rs::cipher::{AES_256, EncryptingKey, UnboundCipherKey};
use common::*;
use cryptfold_reduce_format::keys::*;
use cryptfold_reduce_format::slots::{KeySlot, SlotKind};

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn secret_of(text: &str) -> Secret {
    Secret::take(&mut hex(text).try_into().unwrap())
}

const KEK: &str = "000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F";

/// RFC 3394 section 4.6: 256 bits of key data with a 256-bit key.
#[test]
fn rfc_3394_vector() {
    let kek = secret_of(KEK);
    let key = secret_of("00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F");
    let wrapped = wrap(&kek, &key).unwrap();
    let expected = "28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21";
    assert_eq!(wrapped.to_vec(), hex(expected));
    assert!(unwrap(&kek, &wrapped).unwrap() == key);
}

#[test]
fn a_wrapped_key_with_any_bit_flipped_does_not_fit() {
    let (kek, wrapped) = (kek(), kek().wrap(&pool_key()).unwrap());
    for bit in 0..wrapped.len() * 8 {
        let mut bad = wrapped;
        bad[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(kek.unwrap(&bad).unwrap_err(), KeyError::DoesNotFit, "bit {bit}");
    }
    assert_eq!(Kek(secret(1)).unwrap(&wrapped).unwrap_err(), KeyError::DoesNotFit);
}

fn aes(key: &Secret, block: [u8; 16]) -> [u8; 16] {
    let key = EncryptingKey::ecb(UnboundCipherKey::new(&AES_256, key.expose()).unwrap()).unwrap();
    let mut block = block;
    key.encrypt(&mut block).unwrap();
    block
}

/// RFC 5649 section 4.1, written down from its text. Its own vectors use a 192-bit key, which is not offered here.
fn rfc_5649_wrap(key: &Secret, plain: &[u8]) -> Vec<u8> {
    let mut a = [0xa6, 0x59, 0x59, 0xa6, 0, 0, 0, 0];
    a[4..].copy_from_slice(&(plain.len() as u32).to_be_bytes());
    let mut padded = plain.to_vec();
    padded.resize(plain.len().next_multiple_of(8), 0);
    let mut r: Vec<[u8; 8]> = padded.chunks_exact(8).map(|part| part.try_into().unwrap()).collect();
    let join = |a: [u8; 8], r: [u8; 8]| <[u8; 16]>::try_from([a, r].concat()).unwrap();
    if let [only] = r[..] {
        return aes(key, join(a, only)).to_vec();
    }
    // RFC 3394 section 2.2.1, index based.
    let n = r.len();
    for j in 0..6 {
        for (i, r) in r.iter_mut().enumerate() {
            let b = aes(key, join(a, *r));
            let t = (n * j + i + 1) as u64;
            a = (u64::from_be_bytes(b[..8].try_into().unwrap()) ^ t).to_be_bytes();
            r.copy_from_slice(&b[8..]);
        }
    }
    [&a[..], r.as_flattened()].concat()
}

#[test]
fn padded_wrapping_is_rfc_5649() {
    let kek = secret_of(KEK);
    for len in [1, 7, 8, 9, 20, 32, 64, 100, 4096] {
        let plain = noise(len);
        let wrapped = wrap_padded(&kek, &plain).unwrap();
        assert_eq!(wrapped, rfc_5649_wrap(&kek, &plain), "{len} bytes");
        assert_eq!(*unwrap_padded(&kek, &wrapped).unwrap(), plain);
        let mut bad = wrapped;
        bad[len / 2] ^= 4;
        assert_eq!(unwrap_padded(&kek, &bad).unwrap_err(), KeyError::DoesNotFit);
    }
    for len in [0, 4097] {
        assert_eq!(wrap_padded(&kek, &noise(len)).unwrap_err(), KeyError::WrapLength { len });
    }
    for len in [0, 8, 15, 17, 4112] {
        assert_eq!(unwrap_padded(&kek, &noise(len)).unwrap_err(), KeyError::WrapLength { len });
    }
}

#[test]
fn key_files_are_raw_or_hexadecimal() {
    let raw = hex(KEK);
    let from_raw = Kek::from_file(&raw).unwrap();
    assert_eq!(from_raw.0.expose().to_vec(), raw);
    for text in [KEK.to_owned(), format!("{}\n", KEK.to_lowercase()), format!("{KEK} \r\n")] {
        assert_eq!(Kek::from_file(text.as_bytes()).unwrap(), from_raw);
    }
    assert_eq!(Kek::from_file(b""), Err(KeyError::FileLength { len: 0 }));
    assert_eq!(Kek::from_file(&raw[..31]), Err(KeyError::FileLength { len: 31 }));
    assert_eq!(Kek::from_file(KEK.replace('A', "G").as_bytes()), Err(KeyError::FileDigit { at: 21 }));
    assert_eq!(Kek::from_file(&[0; 32]), Err(KeyError::FileWeak));
    assert_eq!(Kek::from_file(&[b'0'; 64]), Err(KeyError::FileWeak));
}

#[test]
fn slots_open_with_their_key_only() {
    let keys = key_block();
    assert_eq!(keys.unlock(&kek()).map(|(at, key)| (at, key == pool_key())), Ok((0, true)));
    assert_eq!(keys.unlock(&Kek(secret(0xa0))).map(|(at, _)| at), Ok(11));
    assert_eq!(keys.unlock(&Kek(secret(0xa1))).unwrap_err(), KeyError::DoesNotFit);
    let open = KeySlot::seal(SlotKind::Open, common_kdf(), &Kek::open(), &pool_key(), 0).unwrap();
    assert!(open.open(&Kek::open()).unwrap() == pool_key());
}

fn common_kdf() -> cryptfold_reduce_format::slots::Kdf {
    cryptfold_reduce_format::slots::Kdf::None
}

#[test]
fn secrets_are_never_printed() {
    let printed = format!("{:?} {:?} {:?} {:?}", pool_key(), kek(), pool_keys(), data_key());
    assert!(printed.contains("Secret(..)"), "{printed}");
    for shown in ["16, 17", "10111213", "[128", "0x80"] {
        assert!(!printed.contains(shown), "{printed}");
    }
}

#[test]
fn taking_a_secret_zeroes_the_source() {
    let mut bytes = [7; 32];
    let secret = Secret::take(&mut bytes);
    assert_eq!((bytes, *secret.expose()), ([0; 32], [7; 32]));
}
