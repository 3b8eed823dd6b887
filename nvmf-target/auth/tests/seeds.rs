//! Seeds of the fuzz target `psk`: real keys and identities, and each of them with one thing wrong.
//! `CRYPTFOLD_WRITE_SEEDS=1 cargo test -p cryptfold-nvmf-auth --test seeds` writes those that are not there.

use std::path::PathBuf;

use cryptfold_nvmf_auth::Names;
use cryptfold_nvmf_auth::psk::{Identity, Psk, Version};
use cryptfold_nvmf_spec::auth::HashId;

const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:0b5f7f6e-4f63-4a53-9b64-0a5f2e1d9c77";
const SUBSYSTEM: &str = "nqn.2026-01.io.cryptfold:data";

/// What the parsers have to make of a seed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Is {
    Key,
    Identity,
    Nothing,
}

type Seed = (String, String, Is);

fn keys() -> Vec<(&'static str, Psk)> {
    let bytes = |n: u8| (0..n).map(|i| i.wrapping_mul(37) ^ 0x5a).collect::<Vec<u8>>();
    [
        ("plain-32", 32, None),
        ("plain-48", 48, None),
        ("sha256", 32, Some(HashId::Sha256)),
        ("sha384", 48, Some(HashId::Sha384)),
    ]
    .map(|(name, len, hash)| (name, Psk::new(&bytes(len), hash).expect("legal")))
    .into()
}

/// A key's text, and that with one thing wrong.
fn of_key(name: &str, text: &str) -> Vec<Seed> {
    let (head, rest) = text.split_at("NVMeTLSkey-1:01:".len());
    let digit = if rest.starts_with('A') { 'B' } else { 'A' };
    [
        ("", text.into(), Is::Key),
        ("-space", format!(" {text}\n"), Is::Key),
        ("-crc", format!("{head}{digit}{}", &rest[1..]), Is::Nothing),
        ("-cut", text[..text.len() - 1].into(), Is::Nothing),
        ("-short", format!("{head}{}", &rest[4..]), Is::Nothing),
        ("-hash", format!("NVMeTLSkey-1:03:{rest}"), Is::Nothing),
        ("-prefix", text.replace("key-1", "key-2"), Is::Nothing),
        ("-base64", format!("{head}%%%%{}", &rest[4..]), Is::Nothing),
    ]
    .map(|(what, text, is)| (format!("key-{name}{what}"), text, is))
    .into()
}

fn seeds() -> Vec<Seed> {
    let names = Names { host: HOST.into(), subsystem: SUBSYSTEM.into() };
    let mut all = Vec::new();
    for (name, psk) in keys() {
        all.extend(of_key(name, &psk.to_text()));
        for (version, word) in [(Version::V0, "v0"), (Version::V1, "v1"), (Version::V1Old, "v1-old")] {
            let Some(tls) = psk.tls(&names, version) else { continue };
            let name = format!("identity-{name}-{word}");
            all.push((format!("{name}-more"), format!("{} more", tls.identity), Is::Nothing));
            all.push((format!("{name}-spaces"), tls.identity.replacen(' ', "  ", 1), Is::Nothing));
            all.push((name, tls.identity, Is::Identity));
        }
    }
    let digest = "A".repeat(43) + "=";
    for (name, text, is) in [
        ("generated-256", format!("NVMe1G01 {HOST} {SUBSYSTEM} {digest}"), Is::Identity),
        ("generated-384", format!("NVMe1G02 {HOST} {SUBSYSTEM} {digest}"), Is::Identity),
        ("no-version", format!("NVMe2R01 {HOST} {SUBSYSTEM} {digest}"), Is::Nothing),
        ("no-digest", format!("NVMe1R01 {HOST} {SUBSYSTEM}"), Is::Nothing),
        ("no-subsystem", format!("NVMe0R01 {HOST} "), Is::Nothing),
        ("long", format!("NVMe0R01 {} {SUBSYSTEM}", "x".repeat(400)), Is::Identity),
    ] {
        all.push((format!("identity-{name}"), text, is));
    }
    all
}

#[test]
fn seeds_are_there_and_are_what_their_names_say() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/psk");
    let write = std::env::var_os("CRYPTFOLD_WRITE_SEEDS").is_some();
    for (name, text, is) in seeds() {
        let found = match (Psk::parse(&text), Identity::parse(&text)) {
            (Ok(_), None) => Is::Key,
            (Err(_), Some(_)) => Is::Identity,
            (Err(_), None) => Is::Nothing,
            both => panic!("{name}: {both:?}"),
        };
        assert_eq!(found, is, "{name}: {text:?}");
        let path = dir.join(&name);
        if write && !path.exists() {
            std::fs::create_dir_all(&dir).expect("a directory");
            std::fs::write(&path, &text).expect("written");
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(kept, text, "{name}");
    }
}
