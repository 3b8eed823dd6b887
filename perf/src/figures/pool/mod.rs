//! The pool over a RAM disk, on one core and on two: writes of new, duplicate and incompressible data, reads, overwrites of
//! a pool that is 60% full; beside what hash, codec and cipher need for the same data by themselves.
//!
//! Large writes go once through prepared data, in order, to a fresh pool, and end with a flush, which counts. Overwrites go on
//! in a pool that lasts, so that garbage collection has its share. Two cores: the pool's home is core 0, each core makes the
//! load of half the data (or its own reads).

mod modes;
mod parts;
mod rig;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cryptfold_reactor::memory::Buf;
use cryptfold_reduce_format::fragment::CHUNK_BYTES;

use super::{Measure, Rounds, Row, Sample, Subject, Unit};
use crate::load::Rng;
use crate::primitives::data;
pub use modes::modes;
use parts::{Algorithms, FRAGMENT_BYTES, Parts, Span};
use rig::{Fresh, Full, Protection, both};

/// Data of each kind. Bytes.
const DATA_BYTES: usize = 384 << 20;
const IO_BYTES: usize = 128 << 10;
/// Chunks that overwrites write, each time with another stamp: of all the data, but so few that a cache holds them, as it
/// holds what a host has just sent.
const OVERWRITTEN_WITH: usize = 256;

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// What is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// New and compressible.
    Unique,
    /// The same again, to another volume.
    Duplicate,
    /// New, and nothing to compress.
    Incompressible,
}

impl Kind {
    /// The volume that it is written to.
    fn volume(self) -> &'static str {
        match self {
            Kind::Unique => "unique",
            Kind::Duplicate => "duplicate",
            Kind::Incompressible => "incompressible",
        }
    }
}

/// Prepared buffers of one large I/O each.
struct Data {
    /// Compress like a system disk's content.
    packs: Arc<[Buf]>,
    /// Do not compress.
    noise: Arc<[Buf]>,
}

impl Data {
    fn prepare() -> Data {
        let plain = data::generate(11, DATA_BYTES);
        let packs = plain.chunks_exact(IO_BYTES).map(Buf::from_slice).collect();
        let mut rng = Rng::new(12);
        let noise = (0..DATA_BYTES / IO_BYTES).map(|_| {
            let mut buf = Buf::alloc(IO_BYTES);
            buf.make_mut().as_chunks_mut::<8>().0.iter_mut().for_each(|w| *w = rng.next().to_le_bytes());
            buf
        });
        Data { packs, noise: noise.collect() }
    }

    fn of(&self, kind: Kind) -> &Arc<[Buf]> {
        if kind == Kind::Incompressible { &self.noise } else { &self.packs }
    }

    /// [`OVERWRITTEN_WITH`] chunks from all over the data.
    fn chunks(&self, kind: Kind) -> Arc<[Buf]> {
        let all = self.of(kind);
        let chunk = |n: usize| {
            let at = n * 7 % (IO_BYTES / CHUNK_BYTES) * CHUNK_BYTES;
            all[n * all.len() / OVERWRITTEN_WITH].slice(at..at + CHUNK_BYTES)
        };
        (0..OVERWRITTEN_WITH).map(chunk).collect()
    }

    /// The part of core `core` of `cores`.
    fn part(&self, kind: Kind, core: usize, cores: usize) -> Arc<[Buf]> {
        let all = self.of(kind);
        let each = all.len() / cores;
        Arc::from(&all[core * each..(core + 1) * each])
    }
}

/// The same on `cores` cores at once: rates add up.
fn sum(samples: impl IntoIterator<Item = Sample>) -> Sample {
    samples.into_iter().fold(Sample::new(0.0, 0.0), |a, b| Sample {
        per_second: a.per_second + b.per_second,
        waited_pct: a.waited_pct.max(b.waited_pct),
        p99_9_us: match (a.p99_9_us, b.p99_9_us) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (a, b) => a.or(b),
        },
    })
}

/// The bare loops' memory: a span for each core, and fragments to open.
struct Bare {
    spans: [Arc<Mutex<Span>>; 2],
    sealed: Arc<(Span, Vec<parts::Sealed>)>,
}

impl Bare {
    fn new(data: &Data) -> Result<Bare, String> {
        let span = || Arc::new(Mutex::new(Span::new(DATA_BYTES + DATA_BYTES / 8)));
        let mut target = Span::new(DATA_BYTES);
        let sealed = Parts::of(Algorithms::DEFAULT).seal_all(&data.packs, FRAGMENT_BYTES, &mut target)?;
        Ok(Bare { spans: [span(), span()], sealed: Arc::new((target, sealed)) })
    }
}

struct Group<'a> {
    data: &'a Data,
    bare: &'a Bare,
    fresh: &'a Fresh,
}

impl<'a> Group<'a> {
    fn bare_write(&self, kind: Kind, cores: usize) -> Measure<'a> {
        let (data, bare, rig) = (self.data, self.bare, &self.fresh.rig);
        Box::new(move |_| {
            let run = |core: usize| {
                let (part, span) = (data.part(kind, core, cores), bare.spans[core].clone());
                let work = move || {
                    let mut span = span.lock().unwrap_or_else(PoisonError::into_inner);
                    parts::write(&part, Algorithms::DEFAULT, kind, &mut span)
                };
                rig.on_core(core, move || async move { work() })
            };
            Ok(sum(both(cores, run)?))
        })
    }

    fn bare_read(&self, random: bool, cores: usize) -> Measure<'a> {
        let (bare, rig) = (self.bare, &self.fresh.rig);
        let per_op = if random { 1 } else { IO_BYTES / FRAGMENT_BYTES };
        Box::new(move |time| {
            let run = |core: usize| {
                let sealed = bare.sealed.clone();
                let from = core * sealed.1.len() / cores;
                let work = move || parts::read(&sealed, Algorithms::DEFAULT, (random, per_op), from, time);
                rig.on_core(core, move || async move { work() })
            };
            Ok(sum(both(cores, run)?))
        })
    }

    fn bare_overwrite(&self, kind: Kind) -> Measure<'a> {
        let (data, bare, rig) = (self.data, self.bare, &self.fresh.rig);
        Box::new(move |time| {
            let (part, span) = (data.chunks(kind), bare.spans[0].clone());
            let work = move || {
                let mut span = span.lock().unwrap_or_else(PoisonError::into_inner);
                parts::overwrite(&part, Algorithms::DEFAULT, kind, &mut span, time)
            };
            rig.on_core(0, move || async move { work() })
        })
    }

    fn write(&self, kind: Kind, cores: usize) -> Measure<'a> {
        let (data, fresh) = (self.data, self.fresh);
        Box::new(move |_| fresh.write(data, kind, cores))
    }

    fn read(&self, random: bool, cores: usize) -> Measure<'a> {
        let (data, fresh) = (self.data, self.fresh);
        Box::new(move |time: Duration| fresh.read(data, Kind::Unique, random, cores, time))
    }
}

fn subject<'a>(name: &'static str, bytes_per_op: usize, measure: Measure<'a>) -> Subject<'a> {
    let unit = if bytes_per_op == IO_BYTES { Unit::Megabytes } else { Unit::Ops };
    Subject { name, unit, bytes_per_op, of: None, scales: None, goal: None, measure }
}

/// A figure on one core and on two, each after its bare loop.
fn pair<'a>(
    [bare_1, one, bare_2, two]: [&'static str; 4],
    bytes: usize,
    goal: f64,
    [of_1, first, of_2, second]: [Measure<'a>; 4],
) -> [Subject<'a>; 4] {
    [
        subject(bare_1, bytes, of_1),
        Subject { of: Some(bare_1), goal: Some(goal), ..subject(one, bytes, first) },
        subject(bare_2, bytes, of_2),
        Subject { of: Some(bare_2), scales: Some(one), goal: Some(0.9), ..subject(two, bytes, second) },
    ]
}

/// The names of a figure, its bare loop, and both on two cores.
macro_rules! names {
    ($name:literal) => {
        [
            concat!("pool-bare-", $name),
            concat!("pool-", $name),
            concat!("pool-bare-", $name, "-x2"),
            concat!("pool-", $name, "-x2"),
        ]
    };
}

/// The pool's figures.
pub fn pool(rounds: Rounds<'_>) -> Result<Vec<Row>, String> {
    let data = &Data::prepare();
    let bare = &Bare::new(data)?;
    let fresh = &Fresh::new(Protection::Default)?;
    let full = &Full::new(&fresh.rig, data);
    let group = Group { data, bare, fresh };
    let writes = |kind| {
        [group.bare_write(kind, 1), group.write(kind, 1), group.bare_write(kind, 2), group.write(kind, 2)]
    };
    let reads = |random| {
        [group.bare_read(random, 1), group.read(random, 1), group.bare_read(random, 2), group.read(random, 2)]
    };
    let mut subjects = Vec::new();
    subjects.extend(pair(names!("unique"), IO_BYTES, 0.8, writes(Kind::Unique)));
    subjects.extend(pair(names!("duplicate"), IO_BYTES, 0.6, writes(Kind::Duplicate)));
    subjects.extend(pair(names!("incompressible"), IO_BYTES, 0.7, writes(Kind::Incompressible)));
    subjects.extend(pair(names!("read"), IO_BYTES, 0.7, reads(false)));
    subjects.extend(pair(names!("randread-4k"), CHUNK_BYTES, 0.7, reads(true)));
    for (kind, [base, name, ..]) in [
        (Kind::Unique, names!("overwrite-4k")),
        (Kind::Incompressible, names!("overwrite-4k-incompressible")),
    ] {
        subjects.push(subject(base, CHUNK_BYTES, group.bare_overwrite(kind)));
        let measure: Measure<'_> = Box::new(move |time| full.overwrite(kind, time));
        subjects.push(Subject { of: Some(base), goal: Some(0.65), ..subject(name, CHUNK_BYTES, measure) });
    }
    rounds("pool", subjects)
}
