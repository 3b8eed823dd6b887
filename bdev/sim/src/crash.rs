//! What a disk's surface may look like after a power cut.
//!
//! An *event* is the submission or completion of a write or flush; they are numbered from 1. At a power cut after event
//! k a write is
//! - *unknown* when it was submitted after k;
//! - *durable* when it completed before k and was FUA, or completed before the submission of a flush that completed by k;
//! - *volatile* otherwise: any of its sectors may or may not have reached the surface.
//!
//! What reached the surface did so in the order of completion, then (in any order) what was still under way.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::image::SECTOR_BYTES;
use crate::{Image, Rng};

/// Which volatile writes reach the surface. Numbers count the volatile writes in order of completion, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survivors {
    /// None of them.
    None,
    /// All of them.
    All,
    /// All but this one.
    AllBut(usize),
    /// This one alone.
    Only(usize),
    /// The first so many.
    Prefix(usize),
    /// Each by the toss of a coin (whose bias is drawn first).
    Random,
}

/// What becomes of a write that reaches the surface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tear {
    /// It is whole.
    Whole,
    /// One write in two is torn: a random subset of its sectors, or a prefix, or all but one.
    Sectors,
}

#[derive(Clone, Debug)]
pub(crate) enum Payload {
    Bytes(Arc<[u8]>),
    Zeroes(u64),
}

impl Payload {
    pub fn len(&self) -> u64 {
        match self {
            Payload::Bytes(bytes) => bytes.len() as u64,
            Payload::Zeroes(len) => *len,
        }
    }

    fn put(&self, image: &mut Image, at: u64, from: usize, to: usize) {
        match self {
            Payload::Bytes(bytes) => image.write(at + from as u64, &bytes[from..to]),
            Payload::Zeroes(_) => image.write(at + from as u64, &vec![0; to - from]),
        }
    }

    pub fn put_all(&self, image: &mut Image, at: u64) {
        self.put(image, at, 0, self.len() as usize);
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Write {
    pub at: u64,
    pub payload: Payload,
    /// Durable when complete.
    pub through: bool,
    pub submitted: u64,
    pub completed: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Flush {
    pub submitted: u64,
    pub completed: Option<u64>,
}

/// All writes and flushes since a known surface. See the module's head.
#[derive(Clone, Debug, Default)]
pub struct Record {
    pub(crate) base: Image,
    pub(crate) writes: BTreeMap<u64, Write>,
    pub(crate) flushes: BTreeMap<u64, Flush>,
    pub(crate) events: u64,
}

impl Record {
    /// Events so far: the last possible crash point.
    pub fn events(&self) -> u64 {
        self.events
    }

    pub(crate) fn event(&mut self) -> u64 {
        self.events += 1;
        self.events
    }

    /// Writes that completed before this event are durable at a cut after event `k`.
    pub(crate) fn horizon(&self, k: u64) -> u64 {
        let done = self.flushes.values().filter(|f| f.completed.is_some_and(|c| c <= k));
        done.map(|f| f.submitted).max().unwrap_or(0)
    }

    /// Writes known at a cut after event `k`, in the order in which they reach the surface, with whether they must.
    fn at(&self, k: u64, rng: &mut Rng) -> Vec<(&Write, bool)> {
        let horizon = self.horizon(k);
        let mut known: Vec<_> = self
            .writes
            .values()
            .filter(|w| w.submitted <= k)
            .map(|w| {
                let completed = w.completed.filter(|c| *c <= k);
                let order = completed.unwrap_or_else(|| k + 1 + rng.below(1 << 32));
                let durable = completed.is_some_and(|c| w.through || c < horizon);
                (order, w, durable)
            })
            .collect();
        known.sort_by_key(|(order, w, _)| (*order, w.submitted));
        known.into_iter().map(|(_, w, durable)| (w, durable)).collect()
    }

    /// Number of writes that may be lost by a cut after event `k`.
    pub fn volatile(&self, k: u64) -> usize {
        self.at(k, &mut Rng::new(0)).iter().filter(|(_, durable)| !durable).count()
    }

    /// The surface after a power cut after event `k`.
    pub fn image(&self, k: u64, survivors: Survivors, tear: Tear, rng: &mut Rng) -> Image {
        let mut image = self.base.clone();
        let mut nth = 0;
        let bias = rng.range(1, 9);
        for (write, durable) in self.at(k, rng) {
            if durable {
                write.payload.put_all(&mut image, write.at);
                continue;
            }
            let survives = match survivors {
                Survivors::None => false,
                Survivors::All => true,
                Survivors::AllBut(n) => nth != n,
                Survivors::Only(n) => nth == n,
                Survivors::Prefix(n) => nth < n,
                Survivors::Random => rng.below(10) < bias,
            };
            nth += 1;
            if survives && (tear == Tear::Whole || rng.one_in(2)) {
                write.payload.put_all(&mut image, write.at);
            } else if survives {
                torn(write, &mut image, rng);
            }
        }
        image
    }

    /// Puts the writes that completed before event `horizon`, all durable, into the base and forgets them: bounds the
    /// memory of a long run.
    pub(crate) fn fold(&mut self, horizon: u64) {
        // A prefix in the order of completion, so that what stays comes after it.
        let mut durable: Vec<_> = self
            .writes
            .iter()
            .filter_map(|(id, w)| w.completed.filter(|c| *c < horizon).map(|c| (c, *id)))
            .collect();
        durable.sort_unstable();
        for (_, id) in durable {
            if let Some(write) = self.writes.remove(&id) {
                write.payload.put_all(&mut self.base, write.at);
            }
        }
        self.flushes.retain(|_, f| f.completed.is_none());
    }
}

/// Part of a write's sectors reach the surface.
fn torn(write: &Write, image: &mut Image, rng: &mut Rng) {
    let sectors = write.payload.len() as usize / SECTOR_BYTES;
    let way = rng.below(3);
    let cut = rng.below(sectors as u64 + 1) as usize;
    for sector in 0..sectors {
        let kept = match way {
            0 => sector < cut,
            1 => sector != cut,
            _ => rng.one_in(2),
        };
        if kept {
            write.payload.put(image, write.at, sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES);
        }
    }
}
