//! What the parts of a path allow by themselves: the bare loops of `cryptfold-perf primitives`, measured in the same run.
//!
//! The roofline of a case is one core that does nothing but these parts, one after the other, over the case's bytes.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::matrix::{Case, Data, Layers, Matrix};
use super::process::{Failed, Stop, output};
use super::record::Part;

/// Seconds per measurement of a primitive.
const SECONDS: &str = "0.1";
/// Blocks that codecs and ciphers see: small I/O alone, large I/O in groups.
const BLOCKS: [u64; 2] = [4096, 65_536];
/// Bytes of generated data that codecs are measured with.
const SAMPLE_BYTES: usize = 8 << 20;

/// 10^9 bytes a second by (primitive, block, data), and ratios of codecs.
#[derive(Default)]
pub struct Parts {
    gb_s: BTreeMap<(String, u64, String), f64>,
    ratio: BTreeMap<(u64, String), f64>,
}

/// Primitives that do not depend on the data, with the place of their data: those that end in a RAM disk go over memory.
const FIXED: [(&str, &str); 6] = [
    ("memcpy", "span"),
    ("xts-256-encrypt", "span"),
    ("xts-256-decrypt", "span"),
    ("blake3-batch", "cache"),
    ("gcm-256-seal", "cache"),
    ("gcm-256-open", "cache"),
];

fn block(case: &Case) -> u64 {
    if case.bs.0 < BLOCKS[1] { BLOCKS[0] } else { BLOCKS[1] }
}

impl Parts {
    /// Measures the parts of these cases.
    ///
    /// # Errors
    /// What went wrong, or that the suite was told to stop.
    pub fn measure(
        perf: &Path,
        dir: &Path,
        matrix: &Matrix,
        cases: &[Case],
        files: &BTreeMap<String, std::path::PathBuf>,
        stop: &Stop,
        mut tick: impl FnMut(&str),
    ) -> Result<Parts, Failed> {
        let mut parts = Parts::default();
        for bytes in BLOCKS {
            let of_size: Vec<&Case> = cases.iter().filter(|c| block(c) == bytes).collect();
            if of_size.is_empty() {
                continue;
            }
            for (name, place) in FIXED {
                tick(name);
                let rows = primitives(perf, name, bytes, None, stop)?;
                parts.take(&rows, place, bytes, "");
            }
            let mut kinds: Vec<&str> =
                of_size.iter().filter(|c| c.path.pool()).map(|c| c.data.as_str()).collect();
            kinds.sort_unstable();
            kinds.dedup();
            for kind in kinds {
                tick("zstd-1");
                let file = match files.get(kind) {
                    Some(file) => file.clone(),
                    None => sample(dir, kind, &matrix.data[kind])?,
                };
                let rows = primitives(perf, "zstd-1", bytes, Some(&file), stop)?;
                parts.take(&rows, "cache", bytes, kind);
            }
        }
        Ok(parts)
    }

    fn take(&mut self, rows: &[Value], place: &str, bytes: u64, kind: &str) {
        // Of XTS: the fastest engine at the namespace's data unit.
        let fits = |r: &&Value| {
            let unit = r["unit"].as_u64().unwrap_or(0);
            r["where"] == place && r["engine"] != "portable" && (unit == 4096 || unit == bytes)
        };
        for row in rows.iter().filter(fits) {
            let (Some(name), Some(rate)) = (row["name"].as_str(), row["gb_s"].as_f64()) else { continue };
            let best = self.gb_s.entry((name.into(), bytes, kind.into())).or_default();
            *best = best.max(rate);
            if let Some(ratio) = row["ratio"].as_f64() {
                self.ratio.insert((bytes, kind.into()), ratio);
            }
        }
    }

    /// The parts of a case. Empty when one of them is not known.
    pub fn of(&self, case: &Case, data: &Data) -> Vec<Part> {
        let (reads, size) = (f64::from(case.op.read_pct(case.read_pct)) / 100.0, block(case));
        let stored = 1.0 - data.duplicates();
        let packed =
            1.0 / self.ratio.get(&(size, case.data.clone())).copied().unwrap_or_else(|| data.ratio());
        let mut list: Vec<(&str, &str, f64)> = Vec::new();
        let writes = 1.0 - reads;
        match case.path {
            Layers::Plain => list.push(("memcpy", "", 1.0)),
            Layers::Tls => {
                list.extend([("memcpy", "", 1.0), ("gcm-256-seal", "", reads), ("gcm-256-open", "", writes)])
            }
            Layers::Crypto => list.extend([("xts-256-encrypt", "", writes), ("xts-256-decrypt", "", reads)]),
            Layers::Pool | Layers::PoolE2 => {
                list.extend([
                    ("blake3-batch", "", writes),
                    ("gcm-256-seal", "", writes * stored * packed),
                    ("gcm-256-open", "", reads * packed),
                ]);
                // What does not shrink is stored as it is, and a pool soon stops trying.
                if packed < 0.97 {
                    list.push(("zstd-1-compress", case.data.as_str(), writes * stored));
                    list.push(("zstd-1-decompress", case.data.as_str(), reads));
                }
                if case.path == Layers::PoolE2 {
                    list.extend([("xts-256-encrypt", "", reads), ("xts-256-decrypt", "", writes)]);
                }
            }
        }
        let part = |(name, kind, share): (&str, &str, f64)| {
            let rate = self.gb_s.get(&(name.into(), size, kind.into())).copied().filter(|r| *r > 0.0)?;
            Some(Part { name: name.into(), core_s_per_gb: share / rate })
        };
        let wanted = list.into_iter().filter(|(.., share)| *share > 0.0);
        wanted.map(part).collect::<Option<Vec<Part>>>().unwrap_or_default()
    }
}

/// What `--data` and the generator of this kind of data make, in a file.
fn sample(dir: &Path, kind: &str, data: &Data) -> Result<std::path::PathBuf, String> {
    let path = dir.join(format!("sample-{kind}"));
    if !path.exists() {
        let mut rng = crate::load::Rng::new(0x5a);
        let blocks = (0..SAMPLE_BYTES / 4096).map(|_| crate::load::sample_block(&mut rng, data.ratio()));
        let bytes: Vec<u8> = blocks.flatten().collect();
        std::fs::write(&path, bytes).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(path)
}

fn primitives(
    perf: &Path,
    only: &str,
    bytes: u64,
    data: Option<&Path>,
    stop: &Stop,
) -> Result<Vec<Value>, Failed> {
    let mut command = Command::new(perf);
    command.args([
        "primitives",
        "--json",
        "--seconds-per-test",
        SECONDS,
        "--only",
        only,
        "--block",
        &bytes.to_string(),
    ]);
    if let Some(file) = data {
        command.arg("--data").arg(file);
    }
    let text = output(&mut command, stop)?;
    let report: Value = serde_json::from_str(&text).map_err(|e| format!("primitives: {e}"))?;
    Ok(report["results"].as_array().cloned().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::matrix::Size;
    use super::*;
    use crate::load::Rw;

    fn case(path: Layers, op: Rw, bs: u64) -> Case {
        Case { path, cores: 1, data: "unique".into(), op, bs: Size(bs), depth: 1, read_pct: 0 }
    }

    #[test]
    fn parts_add_up_by_what_each_byte_goes_through() {
        let mut parts = Parts::default();
        for (name, kind, rate) in [
            ("blake3-batch", "", 4.0),
            ("zstd-1-compress", "unique", 0.5),
            ("zstd-1-decompress", "unique", 1.0),
            ("gcm-256-seal", "", 5.0),
            ("gcm-256-open", "", 5.0),
            ("xts-256-decrypt", "", 10.0),
            ("xts-256-encrypt", "", 10.0),
        ] {
            parts.gb_s.insert((name.into(), 65_536, kind.into()), rate);
        }
        parts.ratio.insert((65_536, "unique".into()), 2.0);
        let data = Data { compress_ratio: Some(2.0), dedupe_pct: Some(50), tree: None, max: None };
        let sum = |path, op| -> f64 {
            parts.of(&case(path, op, 131_072), &data).iter().map(|p| p.core_s_per_gb).sum()
        };
        // 1/4 hash, half of the data goes through the codec at 1/2, a quarter through the cipher.
        assert!((sum(Layers::Pool, Rw::Write) - (0.25 + 1.0 + 0.05)).abs() < 1e-9);
        assert!((sum(Layers::PoolE2, Rw::Write) - sum(Layers::Pool, Rw::Write) - 0.1).abs() < 1e-9);
        assert!((sum(Layers::Pool, Rw::Read) - (1.0 + 0.1)).abs() < 1e-9);
        // Small blocks were not measured: no roofline rather than a wrong one.
        assert!(parts.of(&case(Layers::Pool, Rw::Write, 4096), &data).is_empty());
    }
}
