use super::*;

fn args() -> Args {
    Args { json: false, span: 2 << 20, seconds_per_test: 0.0005, data: None, only: None, block: None }
}

#[test]
fn every_primitive_reports_every_size_in_both_places() {
    let report = measure(&args()).unwrap();
    let names = [
        "xts-256-encrypt",
        "xts-256-decrypt",
        "xts-128-encrypt",
        "xts-128-decrypt",
        "gcm-256-seal",
        "gcm-256-open",
        "blake3",
        "zstd-1-compress",
        "zstd-1-decompress",
        "zstd-3-compress",
        "zstd-3-decompress",
        "lz4-compress",
        "lz4-decompress",
        "crc32c",
        "memcpy",
    ];
    for name in names {
        for block in BLOCKS {
            for place in [Where::Cache, Where::Span] {
                let found: Vec<_> = report
                    .results
                    .iter()
                    .filter(|o| o.name == name && o.block == block && o.r#where == place)
                    .collect();
                assert!(!found.is_empty(), "{name} {block} {place:?}");
                assert!(found.iter().all(|o| o.gb_s > 0.0 && o.ops_s > 0.0), "{found:?}");
            }
        }
    }
    // 4 KiB units do not fit a 512-byte block; 256 bits have two engines, 128 bits one.
    let units = |block, name: &str| {
        report
            .results
            .iter()
            .filter(|o| o.name == name && o.block == block && o.r#where == Where::Cache)
            .count()
    };
    assert_eq!((units(512, "xts-256-encrypt"), units(4096, "xts-256-encrypt")), (2, 4));
    assert_eq!((units(512, "blake3-batch"), units(4096, "blake3-batch")), (0, 1));
    assert_eq!((units(512, "xts-128-encrypt"), units(4096, "xts-128-encrypt")), (1, 2));
}

#[test]
fn the_json_has_its_fields() {
    let report = measure(&Args { only: Some("crc32c".into()), block: Some(4096), ..args() }).unwrap();
    let v = serde_json::to_value(&report).unwrap();
    let r = &v["results"][0];
    assert_eq!((r["name"].as_str(), r["engine"].as_str()), (Some("crc32c"), Some("crc-fast")));
    assert_eq!((r["unit"].as_u64(), r["block"].as_u64()), (Some(4096), Some(4096)));
    assert_eq!((r["where"].as_str(), v["results"][1]["where"].as_str()), (Some("cache"), Some("span")));
    assert!(r["gb_s"].is_f64() && r["ops_s"].is_f64() && v["machine"]["cpu"].is_string());
    let text = text(&report);
    assert!(text.lines().any(|l| l.starts_with("crc32c") && l.contains("cache")), "{text}");
}

#[test]
fn parameters_out_of_range_are_refused() {
    let refused = |a: Args| measure(&a).unwrap_err().to_string();
    assert!(refused(Args { span: 4096, ..args() }).starts_with("--span 4 KiB"));
    assert!(refused(Args { seconds_per_test: f64::NAN, ..args() }).starts_with("--seconds-per-test"));
    assert!(refused(Args { block: Some(1000), ..args() }).starts_with("--block 1000 B"));
    assert!(refused(Args { only: Some("rot13".into()), ..args() }).starts_with("--only rot13"));
    assert!(refused(Args { data: Some("/nowhere/x".into()), ..args() }).starts_with("/nowhere/x: "));
}

#[test]
fn a_file_that_does_not_compress_has_no_decompression_figures() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut rng = data::SplitMix(5);
    let noise: Vec<u8> = (0..100_000).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
    std::fs::write(file.path(), noise).unwrap();
    let report = measure(&Args {
        data: Some(file.path().into()),
        only: Some("lz4".into()),
        block: Some(4096),
        ..args()
    })
    .unwrap();
    let names: Vec<_> = report.results.iter().map(|o| o.name.as_str()).collect();
    assert_eq!(names, ["lz4-compress", "lz4-compress"]);
}
