//! The options that all load generators share.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// What the I/O does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Rw {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random reads.
    RandRead,
    /// Random writes.
    RandWrite,
    /// Sequential, mixed by `--rwmixread`.
    Rw,
    /// Random, mixed by `--rwmixread`.
    RandRw,
}

impl Rw {
    /// As `--rw` wants it.
    pub const fn name(self) -> &'static str {
        match self {
            Rw::Read => "read",
            Rw::Write => "write",
            Rw::RandRead => "randread",
            Rw::RandWrite => "randwrite",
            Rw::Rw => "rw",
            Rw::RandRw => "randrw",
        }
    }
    /// Whether there are reads and writes.
    pub const fn mixed(self) -> bool {
        matches!(self, Rw::Rw | Rw::RandRw)
    }
    /// Whether offsets are drawn at random.
    pub const fn random(self) -> bool {
        matches!(self, Rw::RandRead | Rw::RandWrite | Rw::RandRw)
    }
    /// Share of reads in percent.
    pub const fn read_pct(self, mix: u8) -> u8 {
        match self {
            Rw::Read | Rw::RandRead => 100,
            Rw::Write | Rw::RandWrite => 0,
            Rw::Rw | Rw::RandRw => mix,
        }
    }
}

/// A number of bytes: `4096`, `4k`, `128K`, `1M`, `2G`, `1T` (powers of 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;
    fn from_str(s: &str) -> Result<Bytes, String> {
        let lower = s.trim().to_ascii_lowercase();
        let lower = lower.strip_suffix("ib").unwrap_or(&lower);
        let (digits, shift) = match lower.char_indices().last() {
            Some((i, 'k')) => (&lower[..i], 10),
            Some((i, 'm')) => (&lower[..i], 20),
            Some((i, 'g')) => (&lower[..i], 30),
            Some((i, 't')) => (&lower[..i], 40),
            _ => (lower, 0),
        };
        let n: u64 =
            digits.parse().map_err(|_| format!("\"{s}\" is no size; examples: 4096, 4k, 128k, 1G"))?;
        n.checked_mul(1 << shift).map(Bytes).ok_or_else(|| format!("\"{s}\" is too large"))
    }
}

/// A list of CPUs: `0`, `0,2`, `0-3`, `[0,1]` or a mask `0x3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cores(pub Vec<usize>);

impl FromStr for Cores {
    type Err = String;
    fn from_str(s: &str) -> Result<Cores, String> {
        let bad = || format!("\"{s}\" is no list of CPUs; examples: 0, 0-3, 0,2, 0x3");
        let mut out = Vec::new();
        if let Some(mask) = s.strip_prefix("0x") {
            let mask = u64::from_str_radix(mask, 16).map_err(|_| bad())?;
            out.extend((0..64).filter(|b| mask & (1 << b) != 0));
        } else {
            for part in s.trim_matches(['[', ']']).split(',') {
                let mut ends =
                    part.trim().splitn(2, '-').map(|n| n.trim().parse::<usize>().map_err(|_| bad()));
                let first = ends.next().ok_or_else(bad)??;
                let last = ends.next().transpose()?.unwrap_or(first);
                if last < first || last > 4095 {
                    return Err(bad());
                }
                out.extend(first..=last);
            }
        }
        out.sort_unstable();
        out.dedup();
        if out.is_empty() { Err(bad()) } else { Ok(Cores(out)) }
    }
}

/// What to do, how much of it, with which data.
#[derive(Args, Clone, Debug)]
pub struct LoadArgs {
    /// Operation
    #[arg(long, value_enum, default_value = "randread")]
    pub rw: Rw,
    /// Bytes per I/O
    #[arg(long, default_value = "4k")]
    pub bs: Bytes,
    /// I/Os under way per job
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub iodepth: u32,
    /// Jobs per core; each has its own channel or queue
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub jobs: u32,
    /// CPUs to run on, one reactor each: 0, 0-3, 0,2, 0x3
    #[arg(long, default_value = "0")]
    pub cores: Cores,
    /// Seconds that are measured
    #[arg(long, default_value_t = 5.0)]
    pub runtime: f64,
    /// Seconds before that, not measured
    #[arg(long, default_value_t = 0.5)]
    pub ramp_time: f64,
    /// Share of reads in mixed operation, percent
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub rwmixread: u8,
    /// Span of the device that is used [default: all of it]; sequential jobs divide it among them
    #[arg(long)]
    pub size: Option<Bytes>,
    /// Stop after this many bytes instead of after the runtime
    #[arg(long)]
    pub io_size: Option<Bytes>,
    /// Write address- and generation-stamped data and check every block that is read; at the end, read all back
    #[arg(long)]
    pub verify: bool,
    /// Write nothing; read all of the span once and check what a run with --verify and this --seed wrote there
    #[arg(long, requires = "seed", conflicts_with_all = ["verify", "data", "dedupe_pct", "compress_ratio"])]
    pub verify_only: bool,
    /// Real data to write, cut at 4 KiB
    #[arg(long, conflicts_with_all = ["dedupe_pct", "compress_ratio", "verify"])]
    pub data: Option<PathBuf>,
    /// Give each 4 KiB of --data a number of its own in front, so that no block repeats when the file does
    #[arg(long, requires = "data")]
    pub stamp: bool,
    /// Write unique data, this share of 4 KiB blocks (percent) drawn from a small set that repeats. Without this and
    /// the next option the same prepared random buffers are written again and again, as other tools do: a
    /// deduplicating device stores them once
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub dedupe_pct: Option<u8>,
    /// How far the data compresses (zstd, level 1): 1.0 is incompressible
    #[arg(long)]
    pub compress_ratio: Option<f64>,
    /// Seed of offsets and data; drawn and printed when not given
    #[arg(long)]
    pub seed: Option<u64>,
    /// FUA on writes
    #[arg(long)]
    pub fua: bool,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

impl LoadArgs {
    /// What the options contradict, in one line.
    pub fn check(&self) -> Result<(), String> {
        if self.bs.0 == 0 || !self.bs.0.is_multiple_of(512) || self.bs.0 > 64 << 20 {
            return Err(format!("--bs {}: a multiple of 512 up to 64M is possible", self.bs.0));
        }
        if !(0.0..=1e6).contains(&self.runtime) || !(0.0..=1e6).contains(&self.ramp_time) {
            return Err("--runtime and --ramp-time are seconds from 0 to 1000000".into());
        }
        if self.runtime == 0.0 && self.io_size.is_none() {
            return Err("--runtime 0 needs --io-size".into());
        }
        if let Some(r) = self.compress_ratio
            && !(1.0..=100.0).contains(&r)
        {
            return Err(format!("--compress-ratio {r}: 1 to 100 is possible"));
        }
        Ok(())
    }

    /// The measured time.
    pub fn runtime(&self) -> Duration {
        Duration::from_secs_f64(self.runtime)
    }

    /// The time before it.
    pub fn ramp(&self) -> Duration {
        Duration::from_secs_f64(self.ramp_time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_cores() {
        for (text, bytes) in
            [("4096", 4096), ("4k", 4096), ("128K", 131_072), ("1MiB", 1 << 20), ("2G", 2 << 30)]
        {
            assert_eq!(text.parse(), Ok(Bytes(bytes)));
        }
        for bad in ["", "k", "-1", "1x", "99999999999T"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
        for (text, cores) in
            [("0", vec![0]), ("0-2", vec![0, 1, 2]), ("[0,3]", vec![0, 3]), ("0x5", vec![0, 2])]
        {
            assert_eq!(text.parse(), Ok(Cores(cores)));
        }
        for bad in ["", "a", "3-1", "0x", "0-99999", "0x0"] {
            assert!(bad.parse::<Cores>().is_err(), "{bad}");
        }
    }
}
