//! [`SgList`]: the scatter list that all I/O is expressed in. Invariant: no segment is empty.

use super::Buf;
use smallvec::SmallVec;
use std::fmt;
use std::ops::Range;

/// A sequence of buffers read as one string of bytes. Up to four segments need no allocation.
#[derive(Clone, Default)]
pub struct SgList(SmallVec<[Buf; 4]>);

impl SgList {
    /// An empty list.
    #[inline]
    pub fn new() -> SgList {
        SgList(SmallVec::new())
    }

    /// Appends a segment; empty ones are left out.
    #[inline]
    pub fn push(&mut self, buf: Buf) {
        if !buf.is_empty() {
            self.0.push(buf);
        }
    }

    /// Sum of the segments' lengths in bytes.
    #[inline]
    pub fn len_bytes(&self) -> usize {
        self.0.iter().map(Buf::len).sum()
    }

    /// Whether there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the only segment out, if there is just one.
    #[inline]
    pub fn take_single(&mut self) -> Option<Buf> {
        if self.0.len() == 1 { self.0.pop() } else { None }
    }

    /// The segments in order.
    #[inline]
    pub fn iter(&self) -> std::slice::Iter<'_, Buf> {
        self.0.iter()
    }

    /// The segments in order.
    #[inline]
    pub fn segments(&self) -> &[Buf] {
        &self.0
    }

    /// The segments in order, to be changed one by one (see [`Buf::get_mut`] and [`Buf::make_mut`]).
    #[inline]
    pub fn segments_mut(&mut self) -> &mut [Buf] {
        &mut self.0
    }

    /// Overwrites the bytes with those of `source`, piece by piece. False, and nothing promised about the bytes, when the
    /// lengths differ or a segment is shared.
    pub fn copy_from(&mut self, source: &SgList) -> bool {
        if source.len_bytes() != self.len_bytes() {
            return false;
        }
        let mut pieces = source.iter().map(Buf::as_slice);
        let mut piece: &[u8] = &[];
        for segment in &mut self.0 {
            let Some(mut target) = segment.get_mut() else { return false };
            while !target.is_empty() {
                if piece.is_empty() {
                    let Some(next) = pieces.next() else { return false };
                    piece = next;
                }
                let n = piece.len().min(target.len());
                let (head, rest) = target.split_at_mut(n);
                head.copy_from_slice(&piece[..n]);
                (target, piece) = (rest, &piece[n..]);
            }
        }
        true
    }

    /// A second view of a byte range.
    ///
    /// # Panics
    /// If the range is out of bounds.
    pub fn slice(&self, range: Range<usize>) -> SgList {
        assert!(range.start <= range.end, "slice {range:?} of a scatter list");
        let mut part = SgList::new();
        let mut start = 0;
        for buf in &self.0 {
            let end = start + buf.len();
            if end > range.start && start < range.end {
                part.push(buf.slice(range.start.max(start) - start..range.end.min(end) - start));
            }
            start = end;
        }
        assert!(range.end <= start, "slice {range:?} of a scatter list of {start} bytes");
        part
    }

    /// Cuts off and returns the first `n` bytes. Segments move; only one that straddles the cut is shared.
    ///
    /// # Panics
    /// If `n` exceeds the length.
    pub fn split_to(&mut self, n: usize) -> SgList {
        let mut rest = n;
        let mut whole = 0;
        while rest > 0 && whole < self.0.len() && self.0[whole].len() <= rest {
            rest -= self.0[whole].len();
            whole += 1;
        }
        assert!(rest == 0 || whole < self.0.len(), "split at {n} of a scatter list of {} bytes", n - rest);
        let mut head = SgList(self.0.drain(..whole).collect());
        if rest > 0 {
            head.push(self.0[0].split_to(rest));
        }
        head
    }

    /// Appends all segments of `other`.
    pub fn append(&mut self, other: SgList) {
        if self.0.is_empty() {
            *self = other;
        } else {
            self.0.extend(other.0);
        }
    }

    /// Copies all bytes out.
    ///
    /// # Panics
    /// If `target` has another length.
    pub fn copy_to_slice(&self, target: &mut [u8]) {
        assert_eq!(self.len_bytes(), target.len(), "copy out of a scatter list");
        let mut at = 0;
        for buf in &self.0 {
            target[at..at + buf.len()].copy_from_slice(buf);
            at += buf.len();
        }
    }

    /// Copies `source` into the segments. False, with nothing written, when a segment is shared or read-only.
    ///
    /// # Panics
    /// If `source` has another length.
    #[must_use]
    pub fn copy_from_slice(&mut self, source: &[u8]) -> bool {
        assert_eq!(self.len_bytes(), source.len(), "copy into a scatter list");
        let Some(segments) = self.get_mut_segments() else { return false };
        let mut at = 0;
        for segment in segments {
            segment.copy_from_slice(&source[at..at + segment.len()]);
            at += segment.len();
        }
        true
    }

    /// All segments for writing; none when one of them is shared or read-only (also with another of this list).
    pub fn get_mut_segments(&mut self) -> Option<SmallVec<[&mut [u8]; 4]>> {
        self.0.iter_mut().map(Buf::get_mut).collect()
    }

    /// One buffer with all bytes; no copy when there is one segment.
    pub fn to_contiguous(mut self) -> Buf {
        if self.0.len() <= 1 {
            return self.0.pop().unwrap_or_default();
        }
        let mut buf = Buf::alloc(self.len_bytes());
        self.copy_to_slice(buf.make_mut());
        buf
    }

    /// A read-only list of `len` zero bytes over the shared zero region; allocates no data at any length.
    pub fn zeroes(len: usize) -> SgList {
        let mut list = SgList::new();
        list.push_zeroes(len);
        list
    }

    /// Appends what [`SgList::zeroes`] makes.
    #[inline]
    pub fn push_zeroes(&mut self, len: usize) {
        const STEP: usize = 1 << 20;
        let mut rest = len;
        while rest > 0 {
            self.push(Buf::zeroes(rest.min(STEP)));
            rest -= rest.min(STEP);
        }
    }

    /// Whether all bytes are zero.
    pub fn is_zero(&self) -> bool {
        self.0.iter().all(Buf::is_zero)
    }

    /// Whether both lists hold the same bytes, however they are cut into segments.
    pub fn eq_bytes(&self, other: &SgList) -> bool {
        if self.len_bytes() != other.len_bytes() {
            return false;
        }
        let mut theirs = other.0.iter().map(Buf::as_slice);
        let mut right: &[u8] = &[];
        for buf in &self.0 {
            let mut left = buf.as_slice();
            while !left.is_empty() {
                if right.is_empty() {
                    right = theirs.next().unwrap_or_default();
                }
                let n = left.len().min(right.len());
                if left[..n] != right[..n] {
                    return false;
                }
                (left, right) = (&left[n..], &right[n..]);
            }
        }
        true
    }
}

impl From<Buf> for SgList {
    #[inline]
    fn from(buf: Buf) -> SgList {
        let mut list = SgList::new();
        list.push(buf);
        list
    }
}

impl FromIterator<Buf> for SgList {
    fn from_iter<I: IntoIterator<Item = Buf>>(bufs: I) -> SgList {
        SgList(bufs.into_iter().filter(|buf| !buf.is_empty()).collect())
    }
}

impl<'a> IntoIterator for &'a SgList {
    type Item = &'a Buf;
    type IntoIter = std::slice::Iter<'a, Buf>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl IntoIterator for SgList {
    type Item = Buf;
    type IntoIter = smallvec::IntoIter<[Buf; 4]>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// Contents are plaintext and stay out of logs.
impl fmt::Debug for SgList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SgList({} bytes, {} segments)", self.len_bytes(), self.0.len())
    }
}
