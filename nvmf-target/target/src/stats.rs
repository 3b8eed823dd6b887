//! Counters of queues: written by the queue's reactor, read by anybody.

use std::ops::Add;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use cryptfold_nvmf_spec::auth::{DhGroup, HashId};

/// One queue's counters.
#[derive(Default, Debug)]
pub struct QueueStats {
    reads: AtomicU64,
    writes: AtomicU64,
    read_bytes: AtomicU64,
    write_bytes: AtomicU64,
    other: AtomicU64,
    errors: AtomicU64,
    executing: AtomicU64,
    /// Hash << 8 | group; 0 = not authenticated.
    auth: AtomicU32,
}

/// Totals of a queue, a controller or a reactor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Read and Compare commands.
    pub reads: u64,
    /// Write commands.
    pub writes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// All other commands, admin commands too.
    pub other: u64,
    /// Commands that failed.
    pub errors: u64,
}

impl Add for Totals {
    type Output = Totals;
    fn add(self, o: Totals) -> Totals {
        Totals {
            reads: self.reads + o.reads,
            writes: self.writes + o.writes,
            read_bytes: self.read_bytes + o.read_bytes,
            write_bytes: self.write_bytes + o.write_bytes,
            other: self.other + o.other,
            errors: self.errors + o.errors,
        }
    }
}

/// Adds; the counter has one writer, so no read-modify-write is needed.
#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

impl QueueStats {
    /// A read or compare of so many bytes.
    #[inline]
    pub(crate) fn read(&self, bytes: u64) {
        add(&self.reads, 1);
        add(&self.read_bytes, bytes);
    }
    /// A write of so many bytes.
    #[inline]
    pub(crate) fn write(&self, bytes: u64) {
        add(&self.writes, 1);
        add(&self.write_bytes, bytes);
    }
    /// Another command.
    #[inline]
    pub(crate) fn other(&self) {
        add(&self.other, 1);
    }
    /// A failure.
    #[inline]
    pub(crate) fn error(&self) {
        add(&self.errors, 1);
    }
    /// So many commands are with devices now.
    #[inline]
    pub(crate) fn set_executing(&self, n: usize) {
        self.executing.store(n as u64, Ordering::Relaxed);
    }
    /// Whether commands are with devices.
    pub(crate) fn is_busy(&self) -> bool {
        self.executing.load(Ordering::Relaxed) > 0
    }
    /// The host was authenticated this way.
    pub(crate) fn authenticated(&self, hash: HashId, group: DhGroup) {
        self.auth.store(u32::from(hash as u8) << 8 | u32::from(group as u8), Ordering::Relaxed);
    }
    /// How the host was authenticated, if it was.
    pub fn auth(&self) -> Option<(HashId, DhGroup)> {
        let v = self.auth.load(Ordering::Relaxed);
        HashId::from_u8((v >> 8) as u8).zip(DhGroup::from_u8(v as u8))
    }
    /// Now.
    pub fn totals(&self) -> Totals {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        Totals {
            reads: get(&self.reads),
            writes: get(&self.writes),
            read_bytes: get(&self.read_bytes),
            write_bytes: get(&self.write_bytes),
            other: get(&self.other),
            errors: get(&self.errors),
        }
    }
}
