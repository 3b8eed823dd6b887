//! Seeds of the fuzz target `fragment_decode`: bodies as the codecs make them (of two chunks, as the target expects, and of
//! others), whole, cut and doubled; and headers of nodes.
//! `CRYPTFOLD_WRITE_SEEDS=1 cargo test -p cryptfold-reduce-format --test seeds` writes those that are not there. They are
//! never made anew: another version of a codec may make other bytes of the same data.

use std::path::PathBuf;

use cryptfold_reduce_format::codec::{Codec, Compression, Compressor, Decompressor};
use cryptfold_reduce_format::fragment::*;
use cryptfold_reduce_format::node::NodeHeader;

/// Two chunks (or so many) of each kind of data.
fn plains(chunks: usize) -> Vec<(&'static str, Vec<u8>)> {
    let len = chunks * CHUNK_BYTES;
    let mut state = 7u64;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    let half: Vec<u8> = (0..len).map(|i| if i % 512 < 256 { noise() } else { b' ' }).collect();
    let words: Vec<u8> =
        (0..).flat_map(|i: u32| format!("line {i}: {:x}\n", i * i).into_bytes()).take(len).collect();
    let counted: Vec<u8> = (0..len / 8).flat_map(|i| (i as u64 * 3).to_le_bytes()).collect();
    vec![("zeros", vec![0; len]), ("words", words), ("counted", counted), ("half-noise", half)]
}

fn settings() -> [(&'static str, Compression); 4] {
    let zstd = |level| Compression::Zstd(level);
    [("lz4", Compression::Lz4), ("zstd-fast", zstd(-5)), ("zstd-1", zstd(1)), ("zstd-19", zstd(19))]
}

/// Name, bytes, and for a body its codec and what it decodes to.
type Seed = (String, Vec<u8>, Option<(Codec, Vec<u8>)>);

fn seeds() -> Vec<Seed> {
    let mut all: Vec<Seed> = Vec::new();
    for chunks in [1, 2, 3] {
        for (kind, plain) in plains(chunks) {
            for (word, setting) in settings() {
                let mut out = vec![0; plain.len()];
                let (codec, len) =
                    Compressor::new().compress(setting, &[&plain], &mut out).expect("it compresses");
                out.truncate(len);
                if chunks == 2 {
                    all.push((format!("{kind}-{word}-cut"), out[..len / 2].to_vec(), None));
                    all.push((format!("{kind}-{word}-more"), [&out[..], &out[..]].concat(), None));
                }
                all.push((format!("{kind}-{word}-{chunks}"), out, Some((codec, plain.clone()))));
            }
        }
    }
    for (name, codec, flags, body, plain) in [
        ("node-raw", 1u8, 0u8, 4096u32, 4096u32),
        ("node-zstd", 3, 0, 1000, 65_536),
        ("node-host", 3, 1, 1028, 4096),
        ("node-bomb", 3, 0, 1, 65_537),
    ] {
        let mut bytes = vec![1, 0, codec, flags];
        [body, plain, 5].iter().for_each(|n| bytes.extend(n.to_le_bytes()));
        bytes.extend([0; 16]);
        assert_eq!(NodeHeader::parse(&bytes).is_ok(), name != "node-bomb", "{name}");
        all.push((name.into(), bytes, None));
    }
    // Longer ones the fuzzer (scripts/fuzz) does not take.
    all.retain(|(_, bytes, _)| bytes.len() <= 4096);
    assert!(all.len() > 50, "{} seeds", all.len());
    all
}

#[test]
fn seeds_are_there_and_decode() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/fragment_decode");
    let write = std::env::var_os("CRYPTFOLD_WRITE_SEEDS").is_some();
    let mut decompressor = Decompressor::new();
    for (name, bytes, decodes) in seeds() {
        let path = dir.join(&name);
        if write && !path.exists() {
            std::fs::create_dir_all(&dir).expect("a directory");
            std::fs::write(&path, &bytes).expect("written");
        }
        let kept = std::fs::read(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut out = vec![0; 2 * CHUNK_BYTES];
        match decodes {
            Some((codec, plain)) => {
                out.resize(plain.len(), 0);
                decompressor.decompress(codec, &kept, &mut out).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert!(out == plain, "{name}");
            }
            None => {
                for codec in [Codec::Lz4, Codec::Zstd] {
                    assert!(decompressor.decompress(codec, &kept, &mut out).is_err(), "{name} {codec:?}");
                }
            }
        }
    }
}
