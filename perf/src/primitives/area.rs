//! The memory that the primitives run over: a small area that stays in the cache, or the span, in random order.
//!
//! Units: blocks of the area's current block size unless a name says bytes.

use cryptfold_reactor::memory::Buf;

use super::data::SplitMix;

/// Buffers of this size make up an area. Block sizes divide it.
pub const BUF_BYTES: usize = 1 << 20;

/// Memory seen as equal blocks. Filled with a sample of data, over and over.
pub struct Area {
    bufs: Vec<Buf>,
    /// Bytes in use of each buffer: less than [`BUF_BYTES`] for a single small one.
    buf_bytes: usize,
    block_bytes: usize,
    /// Order in which blocks are visited, all of them or those that a packer left.
    order: Vec<u32>,
    whole_order: bool,
    /// Length of what each block holds; blocks that hold their codec's output are shorter than the block.
    lengths: Vec<u32>,
    dirty: bool,
}

impl Area {
    /// An area of `bytes`, rounded up to a buffer; below one buffer, a power of two.
    pub fn new(bytes: usize) -> Area {
        let buf_bytes = bytes.min(BUF_BYTES).next_power_of_two();
        let bufs = (0..bytes.div_ceil(buf_bytes)).map(|_| Buf::alloc(buf_bytes)).collect();
        Area {
            bufs,
            buf_bytes,
            block_bytes: buf_bytes,
            order: Vec::new(),
            whole_order: false,
            lengths: Vec::new(),
            dirty: true,
        }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bufs.len() * self.buf_bytes
    }

    /// Sees the area as blocks of `block_bytes` (a power of two, no larger than the area's buffers) that hold
    /// `sample`, to be visited in a random order.
    pub fn prepare(&mut self, sample: &[u8], block_bytes: usize) {
        if self.dirty {
            let mut source = sample.iter().copied().cycle();
            for (i, buf) in self.bufs.iter_mut().enumerate() {
                let buf = buf.make_mut();
                let from = i * self.buf_bytes % sample.len();
                match sample.get(from..from + self.buf_bytes) {
                    Some(s) => buf.copy_from_slice(s),
                    None => buf.fill_with(|| source.next().unwrap_or_default()),
                }
            }
            self.dirty = false;
        }
        let blocks = self.bytes() / block_bytes;
        if blocks != self.lengths.len() || !self.whole_order {
            let mut rng = SplitMix(blocks as u64);
            self.order = (0..blocks as u32).collect();
            for i in (1..blocks).rev() {
                self.order.swap(i, rng.below(i + 1));
            }
            self.whole_order = true;
        }
        self.block_bytes = block_bytes;
        self.lengths = vec![block_bytes as u32; blocks];
    }

    /// Replaces the content of every block by `pack`'s output (its length, written to the second slice, at most a
    /// block); blocks for which it returns `None` are not visited. `sample` is what the area was prepared with: its
    /// repetitions are packed once. Returns packed bytes over bytes, of the blocks that are left.
    pub fn pack(
        &mut self,
        sample: &[u8],
        mut pack: impl FnMut(&[u8], &mut [u8]) -> Option<usize>,
    ) -> Option<f64> {
        self.dirty = true;
        let per_buf = self.buf_bytes / self.block_bytes;
        let period = if sample.len().is_multiple_of(self.buf_bytes) {
            sample.len() / self.buf_bytes
        } else {
            usize::MAX
        };
        let mut out = vec![0; self.block_bytes];
        for b in 0..self.bufs.len() {
            let slots = b * per_buf..(b + 1) * per_buf;
            if b >= period {
                let (done, rest) = self.bufs.split_at_mut(b);
                rest[0].make_mut().copy_from_slice(&done[b - period]);
                self.lengths.copy_within((b - period) * per_buf..(b - period + 1) * per_buf, slots.start);
                continue;
            }
            for (slot, block) in slots.zip(self.bufs[b].make_mut().chunks_exact_mut(self.block_bytes)) {
                let n = pack(block, &mut out).unwrap_or(0);
                block[..n].copy_from_slice(&out[..n]);
                self.lengths[slot] = n as u32;
            }
        }
        let lengths = &self.lengths;
        self.order.retain(|&i| lengths[i as usize] > 0);
        let packed: u64 = lengths.iter().map(|&n| u64::from(n)).sum();
        self.whole_order = false;
        (!self.order.is_empty()).then(|| packed as f64 / (self.order.len() * self.block_bytes) as f64)
    }

    /// Visits the blocks for reading, for ever.
    pub fn read(&self) -> Reader<'_> {
        Reader { area: self, at: 0 }
    }

    /// Visits the blocks for writing, for ever.
    pub fn write(&mut self) -> Writer<'_> {
        self.dirty = true;
        Writer { area: self, at: 0 }
    }

    #[inline]
    fn visit(&self, at: &mut usize) -> (usize, usize, usize) {
        let block = self.order[*at] as usize;
        *at += 1;
        if *at == self.order.len() {
            *at = 0;
        }
        let offset = block * self.block_bytes;
        (block, offset / self.buf_bytes, offset % self.buf_bytes)
    }
}

/// See [`Area::read`].
pub struct Reader<'a> {
    area: &'a Area,
    at: usize,
}

impl<'a> Reader<'a> {
    /// The next block: its number and content.
    #[inline]
    pub fn next(&mut self) -> (usize, &'a [u8]) {
        let (block, buf, offset) = self.area.visit(&mut self.at);
        (block, &self.area.bufs[buf][offset..offset + self.area.lengths[block] as usize])
    }
}

/// See [`Area::write`].
pub struct Writer<'a> {
    area: &'a mut Area,
    at: usize,
}

impl Writer<'_> {
    /// The next block: its number and memory.
    #[inline]
    pub fn next(&mut self) -> (usize, &mut [u8]) {
        let (block, buf, offset) = self.area.visit(&mut self.at);
        let bytes = self.area.block_bytes;
        (block, &mut self.area.bufs[buf].make_mut()[offset..offset + bytes])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_is_visited_once_a_round() {
        let sample: Vec<u8> = (0..BUF_BYTES).map(|i| (i / 4096) as u8).collect();
        let mut area = Area::new(2 * BUF_BYTES);
        area.prepare(&sample, 4096);
        let mut reader = area.read();
        let mut seen = vec![0; 512];
        for _ in 0..512 {
            let (n, data) = reader.next();
            assert!(data.len() == 4096 && data.iter().all(|&b| b == (n % 256) as u8));
            seen[n] += 1;
        }
        assert!(seen.iter().all(|&n| n == 1));
    }

    #[test]
    fn packed_blocks_hold_what_the_packer_made_and_the_next_test_starts_afresh() {
        let sample: Vec<u8> = (0..BUF_BYTES).map(|i| (i / 512) as u8).collect();
        let mut area = Area::new(3 * BUF_BYTES);
        area.prepare(&sample, 512);
        let mut calls = 0;
        let ratio = area.pack(&sample, |src, out| {
            calls += 1;
            out[..2].copy_from_slice(&[src[0], 9]);
            (src[0] != 3).then_some(2)
        });
        assert_eq!((calls, ratio), (2048, Some(2.0 / 512.0)), "repetitions are packed once");
        let mut reader = area.read();
        for _ in 0..6144 - 24 {
            let (n, data) = reader.next();
            assert_eq!(data, [n as u8, 9]);
            assert_ne!(n as u8, 3, "left out");
        }
        area.prepare(&sample, 512);
        let mut reader = area.read();
        assert!((0..6144).all(|_| reader.next().1.len() == 512));
    }
}
