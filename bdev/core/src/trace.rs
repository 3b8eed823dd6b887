//! Where I/O spends its time, stage by stage: from the socket through the layers and back. Off unless somebody asks.
//!
//! A stage is a stretch of code or of waiting between [`begin`] and [`Begun::end`]. While tracing is off that is a load of a flag
//! that nobody writes, and a branch; while it is on, two looks at the clock (the time stamp counter) and an entry in a histogram
//! of the thread's own. Stages of one I/O may lie inside each other: `Device` holds everything below the target.

use std::cell::OnceCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use cryptfold_reactor as reactor;
use hdrhistogram::Histogram;

use crate::registry::locked;

macro_rules! stages {
    ($($(#[doc = $what:literal])+ $stage:ident = $name:literal,)+) => {
        /// A part of an I/O's way.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Stage { $($(#[doc = $what])+ $stage,)+ }

        impl Stage {
            /// All of them, in the order of a write's way.
            pub const ALL: &[Stage] = &[$(Stage::$stage,)+];
            /// For reports.
            pub const fn name(self) -> &'static str {
                match self { $(Stage::$stage => $name,)+ }
            }
            /// What it is.
            pub const fn what(self) -> &'static str {
                match self { $(Stage::$stage => concat!($($what),+).trim_ascii(),)+ }
            }
        }
    };
}

stages! {
    /// One receive call of a connection.
    SocketReceive = "socket_receive",
    /// From a command's capsule until all of its data is here.
    Receive = "receive",
    /// From the target's handing an I/O to its device until it is back.
    Device = "device",
    /// Undoing the host's cipher.
    HostDecrypt = "host_decrypt",
    /// The host's cipher over what it reads.
    HostEncrypt = "host_encrypt",
    /// The cipher at rest.
    AtRest = "at_rest",
    /// Fingerprints of a batch of chunks.
    Hash = "hash",
    /// The codec over a fragment's chunks.
    Compress = "compress",
    /// Sealing a fragment.
    Seal = "seal",
    /// A pool's waiting for a write of its device.
    Store = "store",
    /// A pool's waiting for a read of its device.
    Fetch = "fetch",
    /// Verifying and decrypting a fragment.
    Open = "open",
    /// The codec over a fragment, in reverse.
    Decompress = "decompress",
    /// From a device's answer until the response is queued.
    Answer = "answer",
    /// One send call of a connection.
    SocketSend = "socket_send",
}

static ON: AtomicBool = AtomicBool::new(false);
/// Of every thread that has recorded.
static ALL: Mutex<Vec<Arc<Mutex<Stages>>>> = Mutex::new(Vec::new());

thread_local! {
    static OWN: OnceCell<Option<Arc<Mutex<Stages>>>> = const { OnceCell::new() };
}

struct Stages(Vec<Histogram<u64>>);

impl Stages {
    fn new() -> Option<Stages> {
        // 1 ns to 100 s; 1% of resolution.
        let one = Histogram::new_with_bounds(1, 100_000_000_000, 2).ok()?;
        Some(Stages(vec![one; Stage::ALL.len()]))
    }
}

/// When a stage began, if anybody wants to know.
#[derive(Clone, Copy, Debug, Default)]
pub struct Begun(u64);

/// A stage begins.
#[inline]
pub fn begin() -> Begun {
    if ON.load(Ordering::Relaxed) { Begun(reactor::now().0) } else { Begun(0) }
}

impl Begun {
    /// It ends.
    #[inline]
    pub fn end(self, stage: Stage) {
        if self.0 != 0 {
            record(stage, reactor::now().0.saturating_sub(self.0));
        }
    }

    /// It ends, and the next one begins.
    #[inline]
    pub fn next(&mut self, stage: Stage) {
        if self.0 != 0 {
            let now = reactor::now().0;
            record(stage, now.saturating_sub(self.0));
            self.0 = now;
        }
    }
}

#[cold]
fn record(stage: Stage, ns: u64) {
    OWN.with(|own| {
        let own = own.get_or_init(|| {
            let own = Arc::new(Mutex::new(Stages::new()?));
            locked(&ALL).push(own.clone());
            Some(own)
        });
        if let Some(own) = own {
            locked(own).0[stage as usize].saturating_record(ns.max(1));
        }
    });
}

/// Whether stages are recorded.
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Starts from nothing, or stops; what was recorded stays until the next start.
pub fn switch(on: bool) {
    if on && !is_on() {
        locked(&ALL).iter().for_each(|stages| locked(stages).0.iter_mut().for_each(Histogram::reset));
    }
    ON.store(on, Ordering::Relaxed);
}

/// What was recorded, nanoseconds; stages that nobody went through are left out.
pub fn recorded() -> Vec<(Stage, Histogram<u64>)> {
    let all = locked(&ALL);
    let of = |stage: Stage| {
        let mut sum: Option<Histogram<u64>> = None;
        for stages in all.iter() {
            let one = &locked(stages).0[stage as usize];
            match &mut sum {
                // The same bounds everywhere, so nothing can be out of them.
                Some(sum) => drop(sum.add(one)),
                None => sum = Some(one.clone()),
            }
        }
        sum.filter(|h| !h.is_empty()).map(|h| (stage, h))
    };
    Stage::ALL.iter().filter_map(|stage| of(*stage)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test, because the switch is the process's.
    #[test]
    fn stages_are_recorded_while_it_is_on() {
        let before = begin();
        before.end(Stage::Hash);
        assert!(recorded().is_empty(), "off: nothing");
        switch(true);
        before.end(Stage::Hash);
        assert!(recorded().is_empty(), "it began while tracing was off");
        let mut begun = begin();
        std::thread::sleep(std::time::Duration::from_millis(2));
        begun.next(Stage::Receive);
        begun.end(Stage::Device);
        std::thread::spawn(|| begin().end(Stage::Device)).join().expect("no panic");
        let found = recorded();
        let stages: Vec<(Stage, u64)> = found.iter().map(|(stage, h)| (*stage, h.len())).collect();
        assert_eq!(stages, [(Stage::Receive, 1), (Stage::Device, 2)], "of all threads, in order");
        assert!(found[0].1.min() >= 1_980_000, "2 ms, as exactly as the histogram is");
        switch(false);
        begin().end(Stage::Seal);
        assert_eq!(recorded().len(), 2, "what was recorded stays");
        switch(true);
        assert!(recorded().is_empty(), "until the next start");
        switch(false);
        assert_eq!(Stage::HostDecrypt.what(), "Undoing the host's cipher.");
    }
}
