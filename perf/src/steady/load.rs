//! Hosts that overwrite a volume at random, and check at the end what they have written.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use cryptfold_bdev::Channel;
use cryptfold_reactor as reactor;
use hdrhistogram::Histogram;
use reactor::Nanos;

use crate::load::{Rng, Stamper};

const BLOCK: usize = 4096;
/// Sizes of writes in blocks, and their share in percent.
const MIX: [(u64, u64); 3] = [(1, 70), (4, 20), (16, 10)];
/// Blocks of the largest write.
pub const LARGEST: u64 = 16;
/// Blocks that are read together to be checked.
const CHECKED: u64 = 32;
/// Latencies up to this are told apart, ns.
const LONGEST_NS: u64 = 3_600_000_000_000;

/// Mean blocks of a write.
pub fn mean_blocks() -> f64 {
    MIX.iter().map(|(blocks, share)| (blocks * share) as f64).sum::<f64>() / 100.0
}

/// How a load is paced, and how long it lasts.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Writes a second, at random moments; none: as soon as one of the last has completed.
    pub per_second: Option<f64>,
    /// Writes under way at most.
    pub depth: u32,
    /// How long it lasts at most.
    pub time: Duration,
    /// Blocks to write at most.
    pub blocks: u64,
}

/// What a load has seen.
pub struct Seen {
    pub seconds: f64,
    pub writes: u64,
    pub bytes: u64,
    /// ns, from the moment that a write was due.
    pub latency: Histogram<u64>,
}

/// A volume and what was written to it.
pub struct Volume {
    channel: Channel,
    stamper: Stamper,
    rng: RefCell<Rng>,
    /// By block: how often it was written.
    written: RefCell<Vec<u32>>,
    /// By block: a write of it is under way.
    busy: RefCell<Vec<bool>>,
}

/// What the writers of one load share.
struct Run {
    volume: Rc<Volume>,
    pace: Pace,
    begun: Nanos,
    /// When the next write is due.
    due: Cell<Nanos>,
    blocks: Cell<u64>,
    latency: RefCell<Histogram<u64>>,
    error: RefCell<Option<String>>,
}

impl Volume {
    pub fn new(channel: Channel, seed: u64) -> Rc<Volume> {
        Rc::new(Volume {
            channel,
            stamper: Stamper::new(seed),
            rng: RefCell::new(Rng::new(seed)),
            written: RefCell::default(),
            busy: RefCell::default(),
        })
    }

    /// Blocks written so far, from the volume's beginning.
    pub fn blocks(&self) -> u64 {
        self.written.borrow().len() as u64
    }

    /// Writes `blocks` more blocks behind those written, as a host that writes files: in order, in the sizes of the mix.
    pub async fn extend(&self, blocks: u64) -> Result<(), String> {
        let end = self.blocks() + blocks;
        while self.blocks() < end {
            let (at, count) = (self.blocks(), self.size().min(end - self.blocks()));
            self.written.borrow_mut().resize((at + count) as usize, 0);
            self.busy.borrow_mut().resize((at + count) as usize, false);
            self.write(at, count).await?;
        }
        Ok(())
    }

    fn size(&self) -> u64 {
        let mut drawn = self.rng.borrow_mut().below(100);
        for (blocks, share) in MIX {
            if drawn < share {
                return blocks;
            }
            drawn -= share;
        }
        1
    }

    async fn write(&self, at: u64, count: u64) -> Result<(), String> {
        let range = at as usize..(at + count) as usize;
        self.busy.borrow_mut()[range.clone()].fill(true);
        let data = {
            let written = self.written.borrow();
            let stamped = range.clone().map(|block| {
                let generation = u64::from(written[block]) + 1;
                self.stamper.make((block * BLOCK) as u64, generation, BLOCK)
            });
            stamped.flat_map(|data| data.into_iter()).collect::<reactor::SgList>()
        };
        let done = self.channel.write(at, data, false).await;
        done.map_err(|status| format!("a write of {count} blocks at block {at} failed: {status}"))?;
        self.written.borrow_mut()[range.clone()].iter_mut().for_each(|times| *times += 1);
        self.busy.borrow_mut()[range].fill(false);
        Ok(())
    }

    /// A random place that no write is under way to.
    fn place(&self) -> (u64, u64) {
        loop {
            let count = self.size();
            let at = self.rng.borrow_mut().below(self.blocks() / count) * count;
            if !self.busy.borrow()[at as usize..(at + count) as usize].contains(&true) {
                return (at, count);
            }
        }
    }

    /// Overwrites at random until `pace` or `enough` says that it is over.
    pub async fn overwrite(
        self: &Rc<Self>,
        pace: Pace,
        enough: impl Fn() -> bool + 'static,
    ) -> Result<Seen, String> {
        let latency = Histogram::new_with_bounds(1, LONGEST_NS, 3).map_err(|e| e.to_string())?;
        let begun = reactor::now();
        let run = Rc::new(Run {
            volume: self.clone(),
            pace,
            begun,
            due: Cell::new(begun),
            blocks: Cell::new(0),
            latency: RefCell::new(latency),
            error: RefCell::default(),
        });
        let enough = Rc::new(enough);
        let writers: Vec<_> = (0..pace.depth)
            .map(|_| {
                let (run, enough) = (run.clone(), enough.clone());
                reactor::spawn_local(async move { run.write_all(&*enough).await })
            })
            .collect();
        for writer in writers {
            writer.await;
        }
        if let Some(error) = run.error.take() {
            return Err(error);
        }
        let latency = run.latency.borrow().clone();
        Ok(Seen {
            seconds: (reactor::now() - begun).as_secs_f64(),
            writes: latency.len(),
            bytes: run.blocks.get() * BLOCK as u64,
            latency,
        })
    }

    /// Reads everything and compares: the number of blocks.
    pub async fn check(&self) -> Result<u64, String> {
        for at in (0..self.blocks()).step_by(CHECKED as usize) {
            let count = CHECKED.min(self.blocks() - at);
            let read = self.channel.read(at, count).await;
            let data =
                read.map_err(|status| format!("block {at} can not be read: {status}"))?.to_contiguous();
            for (n, data) in data.chunks(BLOCK).enumerate() {
                let block = at as usize + n;
                let times = u64::from(self.written.borrow()[block]);
                let data = reactor::Buf::from_slice(data).into();
                self.stamper.check((block * BLOCK) as u64, times, &data).map_err(|e| e.to_string())?;
            }
        }
        Ok(self.blocks())
    }
}

impl Run {
    /// The moment of the next write; a load without a rate has one at once.
    fn next_due(&self) -> Nanos {
        let Some(rate) = self.pace.per_second else { return reactor::now() };
        // Arrivals that know nothing of each other.
        let uniform = (self.volume.rng.borrow_mut().next() >> 11) as f64 / (1u64 << 53) as f64;
        let gap = Duration::from_secs_f64(-(1.0 - uniform).ln() / rate);
        self.due.replace(self.due.get() + gap)
    }

    fn is_over(&self) -> bool {
        let late = self.due.get().max(reactor::now()) - self.begun >= self.pace.time;
        late || self.blocks.get() >= self.pace.blocks || self.error.borrow().is_some()
    }

    async fn write_all(&self, enough: &dyn Fn() -> bool) {
        while !self.is_over() && !enough() {
            let due = self.next_due();
            if due > reactor::now() {
                reactor::sleep_until(due).await;
            }
            let (at, count) = self.volume.place();
            self.blocks.set(self.blocks.get() + count);
            if let Err(error) = self.volume.write(at, count).await {
                self.error.borrow_mut().get_or_insert(error);
                return;
            }
            let took = (reactor::now() - due).as_nanos() as u64;
            self.latency.borrow_mut().saturating_record(took.max(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use cryptfold_bdev::{Access, Registry};
    use cryptfold_reactor::{SgList, Sim};

    use super::*;
    use crate::figures::ram_disk;

    #[test]
    fn a_paced_load_keeps_its_rate_and_a_wrong_block_is_found() {
        Sim::new(7).run(|| async {
            let registry = Registry::new();
            ram_disk(&registry, "ram", 16 << 20).unwrap();
            let disk = registry.open("ram", Access::ReadWrite, |_| ()).unwrap();
            let volume = Volume::new(disk.channel().unwrap(), 7);
            volume.extend(2048).await.unwrap();
            let time = Duration::from_secs(2);
            let pace = Pace { per_second: Some(1000.0), depth: 4, time, blocks: u64::MAX };
            let seen = volume.overwrite(pace, || false).await.unwrap();
            assert!((1800..2200).contains(&seen.writes), "{} writes in 2 s at 1000 a second", seen.writes);
            assert!((1.9..2.1).contains(&seen.seconds), "{} s", seen.seconds);
            assert_eq!(volume.check().await, Ok(2048));
            disk.channel().unwrap().write(77, SgList::zeroes(4096), false).await.unwrap();
            let wrong = volume.check().await.unwrap_err();
            assert!(wrong.contains(&format!("byte {}", 77 * 4096)), "{wrong}");
        });
    }
}
