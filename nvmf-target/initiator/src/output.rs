//! What is still to be sent, in order: headers and digests in one flat buffer, data where it lies.

use std::collections::VecDeque;
use std::io::IoSlice;

use cryptfold_reactor::memory::{Buf, SgList};
use smallvec::SmallVec;

/// Pieces handed to the socket at once.
const MAX_PIECES: usize = 256;
/// Data up to this size is copied behind its header: cheaper than a piece of its own. Bytes.
const COPY_LIMIT: usize = 256;

enum Part {
    /// So many bytes of the flat buffer.
    Flat(usize),
    /// A buffer, and how much of it is sent.
    Data(Buf, usize),
}

/// The queue of one connection.
#[derive(Default)]
pub(crate) struct Output {
    flat: Vec<u8>,
    /// Bytes of `flat` that are sent.
    flat_sent: usize,
    parts: VecDeque<Part>,
}

impl Output {
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    pub fn push_bytes(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.flat.extend_from_slice(bytes);
        match self.parts.back_mut() {
            Some(Part::Flat(n)) => *n += bytes.len(),
            _ => self.parts.push_back(Part::Flat(bytes.len())),
        }
    }

    pub fn push_data(&mut self, data: &SgList) {
        for buf in data {
            if buf.len() <= COPY_LIMIT {
                self.push_bytes(buf);
            } else {
                self.parts.push_back(Part::Data(buf.clone(), 0));
            }
        }
    }

    /// The next bytes to send.
    pub fn pieces(&self) -> SmallVec<[IoSlice<'_>; 64]> {
        let mut at = self.flat_sent;
        let mut out = SmallVec::new();
        for part in self.parts.iter().take(MAX_PIECES) {
            match part {
                Part::Flat(n) => {
                    out.push(IoSlice::new(&self.flat[at..at + n]));
                    at += n;
                }
                Part::Data(buf, sent) => out.push(IoSlice::new(&buf[*sent..])),
            }
        }
        out
    }

    /// `n` bytes of what [`Output::pieces`] gave are sent.
    pub fn sent(&mut self, mut n: usize) {
        while n > 0 {
            let done = match self.parts.front_mut() {
                Some(Part::Flat(len)) => {
                    let k = n.min(*len);
                    *len -= k;
                    self.flat_sent += k;
                    n -= k;
                    *len == 0
                }
                Some(Part::Data(buf, sent)) => {
                    let k = n.min(buf.len() - *sent);
                    *sent += k;
                    n -= k;
                    *sent == buf.len()
                }
                None => return,
            };
            if done {
                self.parts.pop_front();
            }
        }
        if self.parts.is_empty() {
            self.flat.clear();
            self.flat_sent = 0;
        } else if self.flat_sent > 1 << 16 {
            self.flat.drain(..self.flat_sent);
            self.flat_sent = 0;
        }
    }

    pub fn clear(&mut self) {
        *self = Output::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flattened(out: &Output) -> Vec<u8> {
        out.pieces().iter().flat_map(|p| p.to_vec()).collect()
    }

    #[test]
    fn bytes_leave_in_order_however_they_are_cut() {
        let big = |b: u8| SgList::from(Buf::from_slice(&vec![b; 1000]));
        for step in [1, 7, 333, 1000, 5000] {
            let mut out = Output::default();
            let mut want = Vec::new();
            for i in 0..5u8 {
                out.push_bytes(&[i; 72]);
                out.push_bytes(&[i; 4]);
                out.push_data(&big(100 + i));
                out.push_data(&SgList::from(Buf::from_slice(&[200 + i; 16])));
                want.extend([vec![i; 76], vec![100 + i; 1000], vec![200 + i; 16]].concat());
            }
            let mut got = Vec::new();
            while !out.is_empty() {
                let next = flattened(&out);
                let n = step.min(next.len());
                got.extend_from_slice(&next[..n]);
                out.sent(n);
            }
            assert_eq!(got, want);
            assert!(out.flat.is_empty());
        }
    }
}
