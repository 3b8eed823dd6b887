//! Headers and ciphertext of the real `cryptsetup`, in user space, on files: read, proven and decrypted by ours.

use std::path::Path;

use cryptfold_bdev_crypto::engine::{Direction, XtsContext, XtsKey};
use cryptfold_keys_tests::cryptsetup::Host;
use cryptfold_luks2::{DEFAULT_MAX_ITERATIONS, Header, MAX_AREA_BYTES, Payload, Place, ProofError, Refusal};

const MIB: u64 = 1 << 20;

fn header_of(host: &Host, name: &str) -> Header {
    Header::parse(&start_of(&host.path(name))).unwrap().expect("a header")
}

fn size(host: &Host, name: &str) -> u64 {
    std::fs::metadata(host.path(name)).unwrap().len()
}

fn start_of(path: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(path).unwrap();
    bytes.truncate(Header::area_bytes(&bytes).unwrap_or(MAX_AREA_BYTES));
    bytes
}

/// The payload of `device` decrypted.
fn decrypted(device: &[u8], payload: &Payload, key: &[u8]) -> Vec<u8> {
    payload.digest.prove(key, DEFAULT_MAX_ITERATIONS).expect("the key is the header's");
    let context = XtsContext::new(&XtsKey::new(key).unwrap()).unwrap();
    let segment = &payload.segment;
    let unit = segment.sector_bytes as usize;
    let mut data = device[segment.offset_bytes as usize..].to_vec();
    for (i, sector) in data.chunks_exact_mut(unit).enumerate() {
        let tweak = segment.iv_tweak + (i * unit / 512) as u64;
        context.unit_in_place(Direction::Decrypt, tweak.into(), sector);
    }
    data
}

#[test]
fn formatted_volumes() {
    for (sector, bytes, digest) in [(512, 64, "sha256"), (4096, 64, "sha512"), (512, 32, "sha1")] {
        let host = Host::new(bytes);
        host.file("disk", 32 * MIB);
        let common = host.common();
        host.cryptsetup(&format!(
            "luksFormat {common} --cipher aes-xts-plain64 --sector-size {sector} --hash {digest} --label vol disk"
        ));
        let header = header_of(&host, "disk");
        let payload = header.payload(Place::Attached, 32 * MIB).unwrap();
        assert_eq!((payload.segment.sector_bytes, payload.segment.offset_bytes), (sector, 16 * MIB));
        assert_eq!((payload.key_bytes, header.label.as_str()), (Some(bytes as u32), "vol"));
        payload.digest.prove(&host.key, DEFAULT_MAX_ITERATIONS).unwrap();
        let mut wrong = host.key.clone();
        wrong[0] ^= 1;
        assert_eq!(payload.digest.prove(&wrong, DEFAULT_MAX_ITERATIONS), Err(ProofError::WrongKey));

        // The host changes its passphrase and imports a token: another header of the same volume.
        std::fs::write(host.path("token"), br#"{"type":"cryptfold-kmip","keyslots":[],"objects":["77"]}"#)
            .unwrap();
        host.cryptsetup("token import --json-file token disk");
        host.cryptsetup("config disk --label other");
        let later = header_of(&host, "disk");
        assert!(later.sequence > header.sequence && later.label == "other");
        assert_eq!(later.payload(Place::Attached, 32 * MIB).unwrap(), payload);
        assert_eq!(later.kmip_token().unwrap().unwrap().objects, ["77"]);

        // Another volume key: another payload.
        host.cryptsetup(&format!(
            "luksFormat {common} --volume-key-file /dev/urandom --cipher aes-xts-plain64 disk"
        ));
        let other = header_of(&host, "disk").payload(Place::Attached, 32 * MIB).unwrap();
        assert_ne!(other, payload);
        assert_eq!(other.digest.prove(&host.key, DEFAULT_MAX_ITERATIONS), Err(ProofError::WrongKey));
    }
}

#[test]
fn encrypted_files_with_the_header_in_front() {
    for sector in [512, 4096] {
        let host = Host::new(64);
        let plain = host.file("disk", 24 * MIB);
        // Room for the header.
        std::fs::OpenOptions::new().write(true).open(host.path("disk")).unwrap().set_len(56 * MIB).unwrap();
        let common = host.common();
        host.cryptsetup(&format!(
            "reencrypt --encrypt {common} --cipher aes-xts-plain64 --sector-size {sector} --reduce-device-size 32M disk"
        ));
        let device = std::fs::read(host.path("disk")).unwrap();
        let payload = header_of(&host, "disk").payload(Place::Attached, device.len() as u64).unwrap();
        assert_eq!(payload.segment.sector_bytes, sector);
        let data = decrypted(&device, &payload, &host.key);
        assert!(data[..plain.len()] == plain[..], "sector size {sector}");
    }
}

#[test]
fn encrypted_files_with_a_detached_header() {
    for sector in [512, 4096] {
        let host = Host::new(64);
        let plain = host.file("disk", 24 * MIB);
        let common = host.common();
        host.cryptsetup(&format!(
            "reencrypt --encrypt {common} --cipher aes-xts-plain64 --sector-size {sector} --header header disk"
        ));
        let device = std::fs::read(host.path("disk")).unwrap();
        assert!(device != plain);
        assert_eq!(Header::parse(&start_of(&host.path("disk"))), Ok(None), "the device has no header");
        let header = header_of(&host, "header");
        assert!(header.payload(Place::Attached, size(&host, "disk")).is_err());
        let payload = header.payload(Place::Detached, size(&host, "disk")).unwrap();
        assert_eq!((payload.segment.offset_bytes, payload.segment.sector_bytes), (0, sector));
        assert!(decrypted(&device, &payload, &host.key) == plain, "sector size {sector}");
    }
}

#[test]
fn what_the_tool_makes_and_we_refuse() {
    let host = Host::new(64);
    let common = host.common();
    let payload = |name: &str| header_of(&host, name).payload(Place::Attached, size(&host, name));
    host.file("begun", 56 * MIB);
    host.cryptsetup(&format!(
        "reencrypt --encrypt --init-only {common} --cipher aes-xts-plain64 --reduce-device-size 32M begun"
    ));
    assert_eq!(payload("begun"), Err(Refusal::Reencryption));
    host.file("disk", 32 * MIB);
    host.cryptsetup(&format!("luksFormat {common} --cipher aes-xts-plain64 --sector-size 2048 disk"));
    assert_eq!(payload("disk"), Err(Refusal::SectorSize(2048)));
    for cipher in ["aes-cbc-essiv:sha256", "aes-xts-plain"] {
        host.cryptsetup(&format!(
            "luksFormat -q --type luks2 --key-size 256 --key-file key --pbkdf pbkdf2 --pbkdf-force-iterations 1000 \
             --cipher {cipher} --keyslot-cipher aes-xts-plain64 --keyslot-key-size 512 disk"
        ));
        assert_eq!(payload("disk"), Err(Refusal::Cipher(cipher.into())));
    }
    host.cryptsetup("luksFormat -q --type luks1 --key-file key --pbkdf-force-iterations 1000 disk");
    let e = Header::parse(&start_of(&host.path("disk"))).unwrap_err();
    assert!(e.to_string().contains("LUKS version 1"), "{e}");
}
