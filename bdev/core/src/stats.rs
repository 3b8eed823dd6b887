//! What a device did: counters and latencies in coarse buckets (always), finer latency histograms (on request), written by
//! one channel each and read by control threads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hdrhistogram::Histogram;

use crate::latency::{Latencies, LatencyCounts};
use crate::registry::locked;
use crate::{Op, Status};

/// A counter with one writer: no read-modify-write on the data path.
#[derive(Default, Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; only its one writer may call this.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
    /// Now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Groups of operations that are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Class {
    /// Read and compare.
    Read,
    /// Write, write-zeroes, write-uncorrectable, compare-and-write.
    Write,
    /// Unmap.
    Unmap,
    /// Copy.
    Copy,
    /// Flush and reset.
    Other,
}

const CLASSES: usize = 5;

impl Class {
    /// All of them.
    pub const ALL: [Class; CLASSES] = [Class::Read, Class::Write, Class::Unmap, Class::Copy, Class::Other];
    /// Where an operation is counted.
    #[inline]
    pub const fn of(op: Op) -> Class {
        match op {
            Op::Read | Op::Compare => Class::Read,
            Op::Write | Op::WriteZeroes | Op::CompareAndWrite | Op::WriteUncorrectable => Class::Write,
            Op::Unmap => Class::Unmap,
            Op::Copy => Class::Copy,
            Op::Flush | Op::Reset => Class::Other,
        }
    }
}

/// A class's totals. Latencies in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassTotals {
    /// Completed operations.
    pub ops: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Sum of latencies.
    pub latency_ns: u64,
    /// Longest latency.
    pub max_latency_ns: u64,
    /// Shortest latency (0 while nothing completed).
    pub min_latency_ns: u64,
}

/// How many operations there were is in their latencies.
#[derive(Default)]
struct ClassCounters {
    bytes: Counter,
    latency: Counter,
    min: Counter,
    /// From the shortest to the longest latency: what lies within needs one comparison.
    span: Counter,
    max: Counter,
}

impl ClassCounters {
    /// A latency that is shorter or longer than all before.
    #[cold]
    fn widen(&self, latency_ns: u64) {
        let min = match self.min.get() {
            0 => latency_ns,
            min => min.min(latency_ns),
        };
        let max = self.max.get().max(latency_ns);
        self.min.0.store(min, Ordering::Relaxed);
        self.max.0.store(max, Ordering::Relaxed);
        self.span.0.store(max - min, Ordering::Relaxed);
    }
}

/// One channel's counters.
#[derive(Default)]
pub(crate) struct ChannelStats {
    classes: [ClassCounters; CLASSES],
    latencies: [Latencies; CLASSES],
    errors: Mutex<BTreeMap<(u8, u8), u64>>,
    histograms: Mutex<Option<Box<[Histogram<u64>; CLASSES]>>>,
}

fn new_histograms() -> Option<Box<[Histogram<u64>; CLASSES]>> {
    // 1 ns to 100 s with 1% resolution: 3 significant digits would triple the memory for nothing.
    let h = Histogram::new_with_bounds(1, 100_000_000_000, 2).ok()?;
    Some(Box::new([h.clone(), h.clone(), h.clone(), h.clone(), h]))
}

impl ChannelStats {
    #[inline]
    pub fn record(&self, op: Op, bytes: u64, latency_ns: u64, status: Status, histogram: bool) {
        let class = Class::of(op);
        let c = &self.classes[class as usize];
        c.bytes.add(bytes);
        c.latency.add(latency_ns);
        if latency_ns.wrapping_sub(c.min.get()) > c.span.get() {
            c.widen(latency_ns);
        }
        self.latencies[class as usize].record(latency_ns);
        if !status.is_ok() {
            *locked(&self.errors).entry((status.sct(), status.sc())).or_default() += 1;
        }
        if histogram {
            let mut h = locked(&self.histograms);
            if h.is_none() {
                *h = new_histograms();
            }
            if let Some(h) = h.as_mut() {
                h[class as usize].saturating_record(latency_ns);
            }
        }
    }

    fn totals(&self, class: Class) -> ClassTotals {
        let c = &self.classes[class as usize];
        ClassTotals {
            ops: self.latencies[class as usize].count(),
            bytes: c.bytes.get(),
            latency_ns: c.latency.get(),
            max_latency_ns: c.max.get(),
            min_latency_ns: c.min.get(),
        }
    }
}

impl ClassTotals {
    fn add(&mut self, o: &ClassTotals) {
        self.ops += o.ops;
        self.bytes += o.bytes;
        self.latency_ns += o.latency_ns;
        self.max_latency_ns = self.max_latency_ns.max(o.max_latency_ns);
        self.min_latency_ns = match (self.min_latency_ns, o.min_latency_ns) {
            (0, m) | (m, 0) => m,
            (a, b) => a.min(b),
        };
    }
    fn minus(&self, base: &ClassTotals) -> ClassTotals {
        ClassTotals {
            ops: self.ops - base.ops,
            bytes: self.bytes - base.bytes,
            latency_ns: self.latency_ns - base.latency_ns,
            ..*self
        }
    }
}

/// A device's statistics over all its channels, past and present.
#[derive(Default)]
pub struct BdevStats {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    live: Vec<Arc<ChannelStats>>,
    closed: [ClassTotals; CLASSES],
    latencies: [LatencyCounts; CLASSES],
    errors: BTreeMap<(u8, u8), u64>,
    histograms: Option<Box<[Histogram<u64>; CLASSES]>>,
    /// Totals at the last reset, subtracted from what is shown.
    base: [ClassTotals; CLASSES],
}

impl BdevStats {
    pub(crate) fn open(&self) -> Arc<ChannelStats> {
        let s = Arc::new(ChannelStats::default());
        locked(&self.inner).live.push(s.clone());
        s
    }

    pub(crate) fn close(&self, s: &Arc<ChannelStats>) {
        let mut i = locked(&self.inner);
        i.live.retain(|x| !Arc::ptr_eq(x, s));
        for class in Class::ALL {
            i.closed[class as usize].add(&s.totals(class));
            s.latencies[class as usize].add_to(&mut i.latencies[class as usize]);
        }
        for (k, v) in locked(&s.errors).iter() {
            *i.errors.entry(*k).or_default() += v;
        }
        if let Some(h) = locked(&s.histograms).take() {
            merge(&mut i.histograms, &h);
        }
    }

    /// Totals of a class since the last reset.
    pub fn totals(&self, class: Class) -> ClassTotals {
        let i = locked(&self.inner);
        i.sum(class).minus(&i.base[class as usize])
    }

    /// Latencies of a class since the device was made, over all channels: a reset does not touch them.
    pub fn latencies(&self, class: Class) -> LatencyCounts {
        let i = locked(&self.inner);
        let mut all = i.latencies[class as usize].clone();
        all.sum_ns = i.closed[class as usize].latency_ns;
        for s in &i.live {
            s.latencies[class as usize].add_to(&mut all);
            all.sum_ns += s.classes[class as usize].latency.get();
        }
        all
    }

    /// Failed operations by (status code type, status code).
    pub fn errors(&self) -> BTreeMap<(u8, u8), u64> {
        let i = locked(&self.inner);
        let mut all = i.errors.clone();
        for s in &i.live {
            for (k, v) in locked(&s.errors).iter() {
                *all.entry(*k).or_default() += v;
            }
        }
        all
    }

    /// Counts from zero again.
    pub fn reset(&self) {
        let mut i = locked(&self.inner);
        for class in Class::ALL {
            i.base[class as usize] = i.sum(class);
        }
        drop(i);
        self.reset_extremes();
        self.reset_errors();
    }

    /// Forgets the shortest and longest latencies. A concurrent I/O may bring the old one back.
    pub fn reset_extremes(&self) {
        let mut i = locked(&self.inner);
        for class in Class::ALL {
            let closed = &mut i.closed[class as usize];
            (closed.max_latency_ns, closed.min_latency_ns) = (0, 0);
            for s in &i.live {
                let c = &s.classes[class as usize];
                c.max.0.store(0, Ordering::Relaxed);
                c.min.0.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Forgets the failed operations.
    pub fn reset_errors(&self) {
        let mut i = locked(&self.inner);
        i.errors.clear();
        for s in &i.live {
            locked(&s.errors).clear();
        }
    }

    /// Latency histogram of a class in nanoseconds, over all channels; `None` if none was kept.
    pub fn histogram(&self, class: Class) -> Option<Histogram<u64>> {
        let i = locked(&self.inner);
        let mut all = i.histograms.clone();
        for s in &i.live {
            if let Some(h) = locked(&s.histograms).as_ref() {
                merge(&mut all, h);
            }
        }
        all.map(|h| h[class as usize].clone())
    }

    pub(crate) fn clear_histograms(&self) {
        let mut i = locked(&self.inner);
        i.histograms = None;
        for s in &i.live {
            *locked(&s.histograms) = None;
        }
    }
}

impl Inner {
    fn sum(&self, class: Class) -> ClassTotals {
        let mut t = self.closed[class as usize];
        for s in &self.live {
            t.add(&s.totals(class));
        }
        t
    }
}

fn merge(into: &mut Option<Box<[Histogram<u64>; CLASSES]>>, from: &[Histogram<u64>; CLASSES]) {
    if into.is_none() {
        *into = new_histograms();
    }
    if let Some(all) = into.as_mut() {
        for (a, b) in all.iter_mut().zip(from) {
            // Same bounds on both sides, so this can not fail.
            let _ = a.add(b);
        }
    }
}
