//! Read-ahead: of volumes that are read in order in small pieces, the next fragments are decoded before they are asked for.
//!
//! Owns what a core knows of the streams that read from it; what is brought goes to the core's cache of fragments. Only reads of
//! at most [`MOST_READ`] blocks are followed: who reads more at once has the next read under way already, or means to have it
//! uncopied. A stream has one piece on its way, of at most [`WINDOW`] blocks, and a read of what is on its way waits for that
//! instead of asking the device again.

use cryptfold_reactor::sync::Notify;
use cryptfold_reduce_format::ids::VolumeId;
use std::cell::{Cell, RefCell};
use std::ops::Range;

/// Largest read that is followed, blocks: 64 KiB.
const MOST_READ: u64 = 16;
/// Reads in order that make a stream.
const NOTICED: u32 = 3;
/// Blocks that are brought ahead of a stream: 128 KiB, which the cache has for three of them at least.
const WINDOW: u64 = 32;
/// Streams of a core that are followed.
const STREAMS: usize = 16;

/// Reads of one volume, each behind the last.
struct Stream {
    volume: VolumeId,
    /// First block of the next read, in the volume's own blocks; all else is in 4 KiB.
    next: u64,
    /// Reads so far, and no more than count.
    reads: u32,
    /// What is on its way or was brought last.
    brought: Range<u64>,
    under_way: bool,
}

/// See the module's head.
#[derive(Default)]
pub(crate) struct Ahead {
    /// The one that was followed last is the last.
    streams: RefCell<Vec<Stream>>,
    /// Of them, those with something on its way.
    under_way: Cell<usize>,
    arrived: Notify,
}

impl Ahead {
    /// Takes note of a read of `blocks` of a volume, of which 4 KiB have `per_chunk`: what is to be brought now, if anything
    /// ([`Ahead::arrived`] follows), in 4 KiB.
    pub fn follow(&self, volume: VolumeId, blocks: Range<u64>, per_chunk: u64) -> Option<Range<u64>> {
        if blocks.end - blocks.start > MOST_READ * per_chunk {
            return None;
        }
        let mut streams = self.streams.borrow_mut();
        // The one that was followed last: a read that once ended there by chance is no stream.
        let at = streams.iter().rposition(|s| s.volume == volume && s.next == blocks.start);
        let Some(at) = at else {
            if streams.len() >= STREAMS {
                // One with something under way is known to who brings it.
                let idle = streams.iter().position(|s| !s.under_way)?;
                streams.remove(idle);
            }
            streams.push(Stream { volume, next: blocks.end, reads: 1, brought: 0..0, under_way: false });
            return None;
        };
        let last = streams.len() - 1;
        streams[at..].rotate_left(1);
        let stream = &mut streams[last];
        stream.next = blocks.end;
        stream.reads = (stream.reads + 1).min(NOTICED);
        let end = blocks.end.div_ceil(per_chunk);
        if stream.reads < NOTICED || stream.under_way || stream.brought.end >= end + WINDOW / 2 {
            return None;
        }
        stream.brought = stream.brought.end.max(end)..end + WINDOW;
        stream.under_way = true;
        self.under_way.set(self.under_way.get() + 1);
        Some(stream.brought.clone())
    }

    /// What [`Ahead::follow`] has asked for is there, or can not be had.
    pub fn arrived(&self, volume: VolumeId, blocks: &Range<u64>) {
        let mut streams = self.streams.borrow_mut();
        let stream = streams.iter_mut().find(|s| s.under_way && s.volume == volume && s.brought == *blocks);
        if let Some(stream) = stream {
            stream.under_way = false;
            self.under_way.set(self.under_way.get() - 1);
        }
        drop(streams);
        self.arrived.notify_waiters();
    }

    /// Waits until nothing is on its way.
    pub async fn ended(&self) {
        while self.under_way.get() > 0 {
            self.arrived.notified().await;
        }
    }

    /// Waits while `block` is on its way.
    pub async fn wait(&self, volume: VolumeId, block: u64) {
        let coming = |s: &Stream| s.under_way && s.volume == volume && s.brought.contains(&block);
        while self.under_way.get() > 0 && self.streams.borrow().iter().any(coming) {
            self.arrived.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: VolumeId = VolumeId(1);

    #[test]
    fn a_stream_is_seen_and_kept_ahead_of() {
        let ahead = Ahead::default();
        assert_eq!(ahead.follow(V, 0..1, 1), None);
        assert_eq!(ahead.follow(V, 1..2, 1), None);
        assert_eq!(ahead.follow(VolumeId(2), 2..3, 1), None, "another volume");
        assert_eq!(ahead.follow(V, 2..3, 1), Some(3..35));
        assert_eq!(ahead.follow(V, 3..4, 1), None, "it is on its way");
        ahead.arrived(V, &(3..35));
        for block in 4..18 {
            assert_eq!(ahead.follow(V, block..block + 1, 1), None, "enough is there");
        }
        assert_eq!(ahead.follow(V, 18..20, 1), Some(35..52));
        ahead.arrived(V, &(35..52));
        assert_eq!(ahead.follow(V, 20..100, 1), None, "a large read");
        assert_eq!(ahead.follow(V, 500..501, 1), None, "elsewhere");
        assert_eq!(ahead.follow(V, 20..28, 1), None, "enough is there");
        assert_eq!(ahead.follow(V, 28..40, 1), Some(52..72), "the stream goes on");
    }

    #[test]
    fn sectors_make_one_stream() {
        let ends = |range: Range<u64>| (range.start, range.end);
        let ahead = Ahead::default();
        let brought: Vec<_> =
            (0..64).filter_map(|sector| ahead.follow(V, sector..sector + 1, 8)).map(ends).collect();
        assert_eq!(brought, [(1, 33)]);
        let odd = Ahead::default();
        let brought: Vec<_> =
            (0..8).filter_map(|n| odd.follow(V, 8 * n + 3..8 * n + 11, 8)).map(ends).collect();
        assert_eq!(brought, [(4, 36)], "reads of 4 KiB that lie across two");
    }

    #[test]
    fn streams_are_bounded_and_one_that_waits_is_kept() {
        let ahead = Ahead::default();
        for block in 0..3 {
            ahead.follow(V, block..block + 1, 1);
        }
        for n in 0..100 {
            ahead.follow(VolumeId(7), 1000 * n..1000 * n + 1, 1);
            assert!(ahead.streams.borrow().len() <= STREAMS);
        }
        assert!(ahead.streams.borrow().iter().any(|s| s.under_way && s.brought == (3..35)));
    }
}
