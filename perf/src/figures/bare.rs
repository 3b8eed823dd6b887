//! The bare loops: what a figure's work needs by itself, without queues, devices and buffers.

use std::hint::black_box;
use std::time::{Duration, Instant};

use cryptfold_bdev_crypto::engine::awslc::AwsLc;
use cryptfold_bdev_crypto::engine::{Direction, XtsEngine, XtsKey};
use cryptfold_reactor::memory::Buf;

use super::Sample;
use super::machine::Watch;
use crate::load::Rng;

/// Memory is taken in buffers of this size. Bytes.
const BUF_BYTES: usize = 1 << 20;
/// Operations between two looks at the clock.
const BATCH: u64 = 64;

/// Repeats `step` for `time` on this thread.
pub fn repeat(time: Duration, mut step: impl FnMut()) -> Sample {
    let (watch, start) = (Watch::start(), Instant::now());
    let mut steps = 0u64;
    loop {
        for _ in 0..BATCH {
            step();
        }
        steps += BATCH;
        let took = start.elapsed();
        if took >= time {
            return Sample::new(steps as f64 / took.as_secs_f64(), watch.waited_pct());
        }
    }
}

/// A span of memory from the arena (2 MiB pages), written once, seen as units.
pub struct Span {
    bufs: Vec<Buf>,
    unit: usize,
}

impl Span {
    /// `bytes` of random data.
    pub fn new(bytes: usize, unit: usize) -> Span {
        let mut rng = Rng::new(1);
        let bufs = (0..bytes / BUF_BYTES).map(|_| {
            let mut buf = Buf::alloc(BUF_BYTES);
            for word in buf.make_mut().as_chunks_mut::<8>().0 {
                *word = rng.next().to_le_bytes();
            }
            buf
        });
        Span { bufs: bufs.collect(), unit }
    }

    fn units(&self) -> u64 {
        (self.bufs.len() * BUF_BYTES / self.unit) as u64
    }

    fn place(&self, unit: u64) -> (usize, usize) {
        let at = unit as usize * self.unit;
        (at / BUF_BYTES, at % BUF_BYTES)
    }
}

/// XTS over random units of a span, as the crypto device on a RAM disk does it: decryption goes from the span into one
/// hot buffer, encryption from 256 source buffers in turn into the span. The tweak is the unit's number.
pub fn xts(key: &XtsKey, direction: Direction, span: &mut Span, time: Duration) -> Result<Sample, String> {
    let engine = AwsLc::new(key).map_err(|e| e.to_string())?;
    let mut rng = Rng::new(2);
    let (units, unit) = (span.units(), span.unit);
    let mut hot = Buf::alloc(256 * unit);
    let hot = hot.make_mut();
    let mut turn = 0;
    Ok(repeat(time, || {
        let n = rng.below(units);
        let (buf, at) = span.place(n);
        match direction {
            Direction::Decrypt => engine.decrypt(n.into(), &span.bufs[buf][at..at + unit], &mut hot[..unit]),
            Direction::Encrypt => {
                turn = (turn + 1) % 256;
                let from = turn * unit;
                engine.encrypt(
                    n.into(),
                    &hot[from..from + unit],
                    &mut span.bufs[buf].make_mut()[at..at + unit],
                );
            }
        }
        black_box(&mut *hot);
    }))
}
