//! What encryption costs: the pool without it, as it is by default, and with the algorithms of the FIPS modes (executed by the validated
//! module where that is built in), on one core, 4 and 128 KiB, compressible and not.
//!
//! Each figure stands beside the same without encryption, and beside what that would be with the ciphers' own time added: without
//! encryption there is a tag (GMAC) and a fingerprint (BLAKE3), too, so the difference between the bare loops of both is what is added.

use std::sync::{Arc, Mutex, PoisonError};

use cryptfold_reduce_format::fingerprint::HashId;
use cryptfold_reduce_format::fragment::CHUNK_BYTES;
use cryptfold_reduce_format::segment::Cipher;

use super::parts::{self, Algorithms, FRAGMENT_BYTES, Parts, RAW_BYTES, Span};
use super::rig::{Fresh, Protection};
use super::{DATA_BYTES, Data, IO_BYTES, Kind, subject};
use crate::figures::{Measure, Rounds, Row, Subject, median};

/// What is measured; the bytes of an I/O, whether it reads, what is in it.
const WORK: [(&str, usize, bool, Kind); 8] = [
    ("write-128k", IO_BYTES, false, Kind::Unique),
    ("write-128k-incompressible", IO_BYTES, false, Kind::Incompressible),
    ("read-128k", IO_BYTES, true, Kind::Unique),
    ("read-128k-incompressible", IO_BYTES, true, Kind::Incompressible),
    ("write-4k", CHUNK_BYTES, false, Kind::Unique),
    ("write-4k-incompressible", CHUNK_BYTES, false, Kind::Incompressible),
    ("read-4k", CHUNK_BYTES, true, Kind::Unique),
    ("read-4k-incompressible", CHUNK_BYTES, true, Kind::Incompressible),
];
/// Of what no encryption makes with the ciphers' own time added.
const GOAL: f64 = 0.97;
/// Large compressible writes, of what no encryption makes.
const WRITE_GOAL: f64 = 0.92;

struct Mode {
    name: &'static str,
    protection: Protection,
    algorithms: Algorithms,
}

const NONE: &str = "none";
const MODES: [Mode; 3] = [
    Mode {
        name: NONE,
        protection: Protection::None,
        algorithms: Algorithms { cipher: Cipher::Gmac, hash: HashId::Blake3 },
    },
    Mode { name: "default", protection: Protection::Default, algorithms: Algorithms::DEFAULT },
    Mode {
        name: if cfg!(feature = "fips") { "validated" } else { "approved" },
        protection: Protection::Approved,
        algorithms: Algorithms { cipher: Cipher::GcmStoredNonce, hash: HashId::HmacSha256 },
    },
];

/// A figure's name, for the rest of the run: there are few.
fn name(mode: &str, work: &str, bare: bool) -> &'static str {
    let bare = if bare { "bare-" } else { "" };
    Box::leak(format!("modes-{bare}{mode}-{work}").into_boxed_str())
}

/// A mode's pool, and its bare loops' memory.
struct Setup {
    fresh: Fresh,
    span: Arc<Mutex<Span>>,
    /// Fragments to open, of compressible data and of other.
    sealed: [Arc<(Span, Vec<parts::Sealed>)>; 2],
}

impl Setup {
    fn new(mode: &Mode, data: &Data) -> Result<Setup, String> {
        let sealed = |kind: Kind| {
            let mut target = Span::new(DATA_BYTES + DATA_BYTES / 8);
            let bytes = fragment_bytes(kind);
            let all = Parts::of(mode.algorithms).seal_all(data.of(kind), bytes, &mut target)?;
            Ok::<_, String>(Arc::new((target, all)))
        };
        Ok(Setup {
            fresh: Fresh::new(mode.protection)?,
            span: Arc::new(Mutex::new(Span::new(DATA_BYTES + DATA_BYTES / 8))),
            sealed: [sealed(Kind::Unique)?, sealed(Kind::Incompressible)?],
        })
    }

    fn bare<'a>(&'a self, data: &'a Data, mode: &Mode, work: (usize, bool, Kind)) -> Measure<'a> {
        let (algorithms, (bytes, read, kind)) = (mode.algorithms, work);
        let random = bytes == CHUNK_BYTES;
        Box::new(move |time| {
            let (span, sealed) = (self.span.clone(), self.sealed[usize::from(kind != Kind::Unique)].clone());
            let part = if random { data.chunks(kind) } else { data.of(kind).clone() };
            let run = move || {
                let mut span = span.lock().unwrap_or_else(PoisonError::into_inner);
                match (read, random) {
                    (true, _) => {
                        let per_op = if random { 1 } else { IO_BYTES / fragment_bytes(kind) };
                        parts::read(&sealed, algorithms, (random, per_op), 0, time)
                    }
                    (false, true) => parts::overwrite(&part, algorithms, kind, &mut span, time),
                    (false, false) => parts::write(&part, algorithms, kind, &mut span),
                }
            };
            self.fresh.rig.on_core(0, move || async move { run() })
        })
    }

    fn pool<'a>(&'a self, data: &'a Data, (bytes, read, kind): (usize, bool, Kind)) -> Measure<'a> {
        let random = bytes == CHUNK_BYTES;
        Box::new(move |time| match (read, random) {
            (true, _) => self.fresh.read(data, kind, random, 1, time),
            (false, true) => self.fresh.overwrite(data, kind, time),
            (false, false) => self.fresh.write(data, kind, 1),
        })
    }
}

fn fragment_bytes(kind: Kind) -> usize {
    if kind == Kind::Incompressible { RAW_BYTES } else { FRAGMENT_BYTES }
}

/// The figures, and for each mode and work how it compares with no encryption and the ciphers' own time.
pub fn modes(rounds: Rounds<'_>) -> Result<Vec<Row>, String> {
    let data = &Data::prepare();
    let setups = MODES.iter().map(|mode| Setup::new(mode, data)).collect::<Result<Vec<_>, _>>()?;
    let mut subjects = Vec::new();
    // All modes of one work beside each other.
    for (work, bytes, read, kind) in WORK {
        for (mode, setup) in MODES.iter().zip(&setups) {
            let of = (bytes, read, kind);
            subjects.push(subject(name(mode.name, work, true), bytes, setup.bare(data, mode, of)));
            let own = subject(name(mode.name, work, false), bytes, setup.pool(data, of));
            let large_write = work == "write-128k";
            subjects.push(match mode.name {
                NONE => own,
                _ => Subject {
                    of: Some(name(NONE, work, false)),
                    goal: large_write.then_some(WRITE_GOAL),
                    ..own
                },
            });
        }
    }
    let mut rows = rounds("modes", subjects)?;
    let costs: Vec<Row> = WORK
        .iter()
        .flat_map(|(work, ..)| MODES[1..].iter().filter_map(|mode| cost(&rows, mode.name, work)))
        .collect();
    rows.extend(costs);
    Ok(rows)
}

/// A mode beside what no encryption makes with the ciphers' own time added, round by round; if all four were measured.
fn cost(rows: &[Row], mode: &str, work: &str) -> Option<Row> {
    let find = |mode: &str, bare| {
        let name = name(mode, work, bare);
        rows.iter().find(|row| row.name == name)
    };
    let (own, none) = (find(mode, false)?, find(NONE, false)?);
    let (bare, bare_none) = (find(mode, true)?, find(NONE, true)?);
    let expected = |n: usize| 1.0 / (1.0 / none.rounds[n] - 1.0 / bare_none.rounds[n] + 1.0 / bare.rounds[n]);
    let expected: Vec<f64> = (0..own.rounds.len()).map(expected).collect();
    let ratios: Vec<f64> = own.rounds.iter().zip(&expected).map(|(own, expected)| own / expected).collect();
    Some(Row {
        name: Box::leak(format!("{}-and-ciphers", own.name).into_boxed_str()),
        value: median(&expected),
        rounds: expected,
        of: Some("no encryption and the ciphers"),
        ratio: Some(median(&ratios)),
        goal: Some(GOAL),
        p99_9_us: None,
        ..own.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::Unit;

    fn row(name: &'static str, rounds: [f64; 2]) -> Row {
        Row {
            group: "modes",
            name,
            unit: Unit::Ops,
            bytes_per_op: 4096,
            value: median(&rounds),
            rounds: rounds.to_vec(),
            of: None,
            scales: None,
            ratio: None,
            goal: None,
            p99_9_us: None,
            waited_pct: 0.0,
        }
    }

    #[test]
    fn what_a_cipher_needs_is_added() {
        // 10 us without, of which its tag needs 1; the mode's cipher needs 3; 15 us are taken where 12 would do.
        let rows = [
            row("modes-none-write-4k", [1e5, 1e5]),
            row("modes-bare-none-write-4k", [1e6, 1e6]),
            row("modes-bare-default-write-4k", [1e6 / 3.0, 1e6 / 3.0]),
            row("modes-default-write-4k", [1e6 / 15.0, 1e6 / 15.0]),
        ];
        let cost = cost(&rows, "default", "write-4k").expect("all four are there");
        assert!((cost.value - 1e6 / 12.0).abs() < 1.0, "{}", cost.value);
        assert!(cost.ratio.is_some_and(|ratio| (ratio - 0.8).abs() < 1e-9), "{:?}", cost.ratio);
        assert!(super::cost(&rows[1..], "default", "write-4k").is_none());
    }
}
