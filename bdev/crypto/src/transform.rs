//! What both devices share: which bytes of an I/O go through the cipher, with which tweaks, and on the way of fewest
//! copies.
//!
//! Units: bytes; positions are counted from the start of the device unless said otherwise.

use std::ops::Range;

use cryptfold_bdev::{BlockRange, Status};
use cryptfold_reactor::memory::{Buf, SgList};
use smallvec::SmallVec;

use crate::engine::{Direction, UnitRun, XtsContext};

/// Ranges of bytes inside an I/O, in order, disjoint.
pub(crate) type Spans = SmallVec<[Range<usize>; 4]>;

/// How data units are numbered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbering {
    /// Where unit counting starts; bytes before are not for the cipher.
    pub origin: u64,
    /// Number of the first unit.
    pub first: u64,
    /// The number grows by one every so many bytes, a power of two.
    pub step_bytes: u64,
    /// Bytes in a data unit.
    pub unit_bytes: usize,
}

impl Numbering {
    /// The units from `position` on, which lies on a unit at or behind the origin.
    pub(crate) fn run_at(&self, position: u64) -> UnitRun {
        UnitRun {
            first_tweak: u128::from(self.first)
                + u128::from((position - self.origin) >> self.step_bytes.trailing_zeros()),
            tweak_step: self.unit_bytes as u64 >> self.step_bytes.trailing_zeros(),
            unit_bytes: self.unit_bytes,
        }
    }
}

/// The bytes of an I/O of `len` bytes at `start` that lie behind `origin` and in no unmapped range.
#[inline]
pub(crate) fn spans(
    origin: u64,
    start: u64,
    len: usize,
    block_bytes: usize,
    unmapped: &[BlockRange],
) -> Spans {
    let before = origin.saturating_sub(start).min(len as u64) as usize;
    let mut out = Spans::new();
    if unmapped.is_empty() {
        if before < len {
            out.push(before..len);
        }
        return out;
    }
    let mut at = before;
    let mut add = |range: Range<usize>| {
        if !range.is_empty() {
            out.push(range);
        }
    };
    let mut holes: SmallVec<[Range<usize>; 4]> = unmapped
        .iter()
        .map(|r| {
            let from = r.start as usize * block_bytes;
            from.min(len)..(from + r.blocks as usize * block_bytes).min(len)
        })
        .collect();
    if !holes.is_sorted_by_key(|h| h.start) {
        holes.sort_by_key(|h| h.start);
    }
    for hole in holes {
        add(at..hole.start.max(at));
        at = at.max(hole.end);
    }
    add(at..len);
    out
}

/// Runs `spans` of `data`, which is that of an I/O at `start`, through the cipher, and leaves the rest as it is. On an
/// error `data` holds nothing that can be used.
///
/// With `into`, the result lies there. Without, it lies where `data` did if nobody else holds that, else in a fresh
/// buffer.
///
/// # Errors
/// When `into` is shared or of another length.
pub(crate) fn apply(
    context: &XtsContext,
    direction: Direction,
    numbering: &Numbering,
    start: u64,
    spans: &[Range<usize>],
    data: &mut SgList,
    into: Option<SgList>,
) -> Result<(), Status> {
    let len = data.len_bytes();
    let whole = matches!(spans, [all] if *all == (0..len));
    if whole
        && into.is_none()
        && let [from] = data.segments_mut()
        && !from.is_unique()
    {
        // One buffer that somebody else holds too: the usual case.
        let mut to = Buf::alloc(len);
        let bytes = to.get_mut().ok_or(Status::INTERNAL_ERROR)?;
        let run = numbering.run_at(start);
        context.run_buffer(direction, run, from, bytes);
        *from = to;
        return Ok(());
    }
    let mut target = match into {
        None if spans.is_empty() => return Ok(()),
        None if in_place(context, direction, numbering, start, spans, data) => return Ok(()),
        None => Buf::alloc(len).into(),
        Some(target) if target.len_bytes() != len => return Err(Status::DATA_TRANSFER_ERROR),
        Some(target) => target,
    };
    if whole {
        let run = numbering.run_at(start);
        if let ([from], [to]) = (data.segments(), target.segments_mut()) {
            let to = to.get_mut().ok_or(Status::DATA_TRANSFER_ERROR)?;
            context.run(direction, run, [from.as_slice()], [to]);
        } else {
            let pieces = target.get_mut_segments().ok_or(Status::DATA_TRANSFER_ERROR)?;
            context.run(direction, run, data.iter().map(Buf::as_slice), pieces);
        }
    } else if !target.copy_from(data) || !in_place(context, direction, numbering, start, spans, &mut target) {
        return Err(Status::DATA_TRANSFER_ERROR);
    }
    *data = target;
    Ok(())
}

/// False, with nothing changed, when somebody else holds a piece of `data`.
fn in_place(
    context: &XtsContext,
    direction: Direction,
    numbering: &Numbering,
    start: u64,
    spans: &[Range<usize>],
    data: &mut SgList,
) -> bool {
    let Some(mut pieces) = data.get_mut_segments() else { return false };
    for span in spans {
        let run = numbering.run_at(start + span.start as u64);
        context.run_in_place(direction, run, window(&mut pieces, span.clone()));
    }
    true
}

/// The part of `pieces` that `range` covers.
fn window<'a>(pieces: &'a mut [&mut [u8]], range: Range<usize>) -> impl Iterator<Item = &'a mut [u8]> {
    let mut end = 0;
    pieces.iter_mut().map(move |piece| {
        let start = end;
        end += piece.len();
        let from = range.start.clamp(start, end) - start;
        let to = range.end.clamp(start, end) - start;
        &mut piece[from..to]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(start: u32, blocks: u32) -> BlockRange {
        BlockRange { start, blocks }
    }

    #[test]
    fn spans_leave_out_what_lies_before_the_origin_and_what_is_unmapped() {
        let s = |origin, start, unmapped: &[BlockRange]| {
            spans(origin, start, 4096, 512, unmapped).iter().map(|r| (r.start, r.end)).collect::<Vec<_>>()
        };
        assert_eq!(s(0, 0, &[]), [(0, 4096)]);
        assert_eq!(s(1 << 20, 0, &[]), []);
        assert_eq!(s(1024, 512, &[]), [(512, 4096)]);
        assert_eq!(s(1024, 1024, &[]), [(0, 4096)]);
        assert_eq!(s(0, 0, &[r(0, 8)]), []);
        assert_eq!(s(0, 0, &[r(1, 2), r(7, 1)]), [(0, 512), (1536, 3584)]);
        assert_eq!(
            s(0, 0, &[r(7, 9), r(1, 2)]),
            [(0, 512), (1536, 3584)],
            "any order, and no further than the I/O"
        );
        assert_eq!(s(1024, 0, &[r(0, 3), r(3, 1)]), [(2048, 4096)]);
        assert_eq!(s(1024, 0, &[r(4, 1)]), [(1024, 2048), (2560, 4096)]);
    }

    #[test]
    fn a_window_cuts_pieces() {
        let (mut a, mut b, mut c) = ([1u8, 2, 3], [4u8, 5], [6u8]);
        let mut pieces = [&mut a[..], &mut b[..], &mut c[..]];
        let got: Vec<u8> = window(&mut pieces, 2..5).flat_map(|p| p.to_vec()).collect();
        assert_eq!(got, [3, 4, 5]);
        assert_eq!(window(&mut pieces, 5..6).map(|p| p.len()).sum::<usize>(), 1);
    }
}
