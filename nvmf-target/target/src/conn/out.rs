//! What a connection still has to send: one byte stream made of headers and of data where it lies.
//!
//! Headers and digests are written into one growing buffer, so that neighbouring PDUs without data leave as one segment;
//! payload is kept by reference until the kernel has taken it. Invariant: the lengths in `segments` sum up to `bytes`,
//! those of heads to `heads.len() - taken`.

use std::collections::VecDeque;
use std::io::IoSlice;

use cryptfold_reactor::memory::{Buf, SgList};
use smallvec::SmallVec;

/// Most segments handed to one system call (the kernel's IOV_MAX).
const MAX_SEGMENTS: usize = 1024;
/// Sent headers are cut off the front of the buffer once there are this many bytes of them.
const COMPACT_BYTES: usize = 64 << 10;

enum Segment {
    /// So many bytes of `heads`.
    Head(usize),
    /// Payload.
    Data(Buf),
}

/// The output queue of a connection.
#[derive(Default)]
pub struct Out {
    heads: Vec<u8>,
    /// Bytes at the front of `heads` that are sent.
    taken: usize,
    segments: VecDeque<Segment>,
    bytes: usize,
    /// Bytes sent so far.
    sent_bytes: u64,
}

/// Segments of one system call; rarely more than this many fit one turn.
pub type Slices<'a> = SmallVec<[IoSlice<'a>; 128]>;

impl Out {
    /// Bytes that wait.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes sent so far.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Whether all is sent.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Appends a header of at most `max` bytes that `write` fills in, returning its length.
    ///
    /// # Errors
    /// Those of `write`; then nothing is appended.
    pub fn head<E>(
        &mut self,
        max: usize,
        write: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        let start = self.heads.len();
        self.heads.resize(start + max, 0);
        let written = write(&mut self.heads[start..]);
        let len = *written.as_ref().unwrap_or(&0);
        self.heads.truncate(start + len);
        written.map(|_| self.count_head(len))
    }

    /// Appends bytes by copy (a digest).
    pub fn copy(&mut self, bytes: &[u8]) {
        self.heads.extend_from_slice(bytes);
        self.count_head(bytes.len());
    }

    /// Appends payload by reference.
    pub fn data(&mut self, data: SgList) {
        for buf in data {
            self.bytes += buf.len();
            self.segments.push_back(Segment::Data(buf));
        }
    }

    fn count_head(&mut self, len: usize) {
        if len == 0 {
            return;
        }
        self.bytes += len;
        match self.segments.back_mut() {
            Some(Segment::Head(n)) => *n += len,
            _ => self.segments.push_back(Segment::Head(len)),
        }
    }

    /// The front of the queue as segments of one system call.
    pub fn slices(&self) -> Slices<'_> {
        let mut at = self.taken;
        self.segments
            .iter()
            .take(MAX_SEGMENTS)
            .map(|segment| match segment {
                Segment::Head(n) => {
                    at += n;
                    IoSlice::new(&self.heads[at - n..at])
                }
                Segment::Data(buf) => IoSlice::new(buf),
            })
            .collect()
    }

    /// The first `n` bytes are sent: lets go of them.
    ///
    /// # Panics
    /// If fewer wait.
    pub fn sent(&mut self, mut n: usize) {
        assert!(n <= self.bytes, "{n} bytes sent of {} that wait", self.bytes);
        self.bytes -= n;
        self.sent_bytes += n as u64;
        while n > 0 {
            match self.segments.front_mut() {
                Some(Segment::Head(len)) if *len > n => {
                    *len -= n;
                    self.taken += n;
                    n = 0;
                }
                Some(Segment::Data(buf)) if buf.len() > n => {
                    drop(buf.split_to(n));
                    n = 0;
                }
                Some(Segment::Head(len)) => {
                    n -= *len;
                    self.taken += *len;
                    self.segments.pop_front();
                }
                Some(Segment::Data(buf)) => {
                    n -= buf.len();
                    self.segments.pop_front();
                }
                None => unreachable!("the lengths of the segments sum up to `bytes`"),
            }
        }
        if self.segments.is_empty() {
            self.heads.clear();
            self.taken = 0;
        } else if self.taken >= COMPACT_BYTES {
            self.heads.drain(..self.taken);
            self.taken = 0;
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Out::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn put(out: &mut Out, model: &mut Vec<u8>, head: &[u8], data: &[u8]) {
        let r: Result<(), ()> = out.head(200, |b| {
            b[..head.len()].copy_from_slice(head);
            Ok(head.len())
        });
        assert_eq!(r, Ok(()));
        out.data(SgList::from(Buf::from_slice(data)));
        model.extend_from_slice(head);
        model.extend_from_slice(data);
    }

    #[test]
    fn headers_without_data_share_a_segment() {
        let mut out = Out::default();
        for i in 0..100u8 {
            out.copy(&[i; 24]);
        }
        assert_eq!((out.slices().len(), out.bytes()), (1, 2400));
        let r = out.head(200, |_| Err("no"));
        assert_eq!((r, out.bytes()), (Err("no"), 2400));
    }

    proptest! {
        /// Whatever is queued and however little the kernel takes, the stream is the concatenation.
        #[test]
        fn the_stream_survives_partial_sends(
            pdus in proptest::collection::vec((0usize..150, 0usize..9000), 1..40),
            steps in proptest::collection::vec(1usize..20_000, 1..200),
        ) {
            let (mut out, mut model, mut sent) = (Out::default(), Vec::new(), Vec::new());
            let mut pdus = pdus.into_iter().enumerate();
            let mut steps = steps.into_iter().cycle();
            loop {
                for (i, (head, data)) in pdus.by_ref().take(3) {
                    put(&mut out, &mut model, &vec![i as u8; head], &vec![!(i as u8); data]);
                }
                if out.is_empty() {
                    break;
                }
                let n = steps.next().unwrap_or(1).min(out.bytes());
                let flat: Vec<u8> = out.slices().iter().flat_map(|s| s.to_vec()).collect();
                let n = n.min(flat.len());
                sent.extend_from_slice(&flat[..n]);
                out.sent(n);
            }
            prop_assert_eq!(sent, model);
        }
    }
}
