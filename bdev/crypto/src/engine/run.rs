//! A run of consecutive data units over scattered memory.

use std::cell::RefCell;

use zeroize::Zeroizing;

use super::{Direction, XtsContext, check_unit};

/// Consecutive data units: unit `i` has the tweak `first_tweak + i * tweak_step`.
///
/// A device that counts its units (SPDK's crypto bdev) steps by 1; dm-crypt's `plain64` counts 512-byte sectors
/// whatever the unit is, so it steps by 8 over units of 4096 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitRun {
    /// Data unit number of the first unit.
    pub first_tweak: u128,
    /// What it grows by from one unit to the next.
    pub tweak_step: u64,
    /// Bytes in a data unit: a multiple of 16 in 16..=[`super::MAX_UNIT_BYTES`].
    pub unit_bytes: usize,
}

/// Where a unit that straddles two pieces of memory is put together. Made on first use, wiped on drop.
#[derive(Default)]
pub(super) struct Scratch(RefCell<Zeroizing<Vec<u8>>>);

impl Scratch {
    fn with<R>(&self, bytes: usize, f: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut s = self.0.borrow_mut();
        if s.len() < bytes {
            *s = Zeroizing::new(vec![0; bytes]);
        }
        f(&mut s[..bytes])
    }
}

impl XtsContext {
    /// [`XtsContext::run`] of one buffer, the usual case.
    #[inline]
    pub fn run_buffer(&self, direction: Direction, run: UnitRun, src: &[u8], dst: &mut [u8]) {
        if src.len() == run.unit_bytes {
            self.unit(direction, run.first_tweak, src, dst);
        } else {
            self.run(direction, run, [src], [dst]);
        }
    }

    /// Runs the data units in the pieces of `src` into the pieces of `dst`. Pieces may be of any length; both sides
    /// hold the same number of bytes, a multiple of the unit.
    ///
    /// # Panics
    /// When the sides differ in length, or that is no multiple of the unit: our own bug.
    pub fn run<'s, 'd>(
        &self,
        direction: Direction,
        run: UnitRun,
        src: impl IntoIterator<Item = &'s [u8]>,
        dst: impl IntoIterator<Item = &'d mut [u8]>,
    ) {
        let unit = run.unit_bytes;
        check_unit(unit);
        let (mut src, mut dst) = (src.into_iter(), dst.into_iter());
        let (mut from, mut to): (&[u8], &mut [u8]) = (&[], &mut []);
        let mut tweak = run.first_tweak;
        loop {
            // A division costs as much as 100 bytes of cipher.
            let most = from.len().min(to.len());
            let whole = if most == unit || most == 0 { most } else { most / unit * unit };
            let (now, rest) = from.split_at(whole);
            let (now_to, rest_to) = std::mem::take(&mut to).split_at_mut(whole);
            for (s, d) in now.chunks_exact(unit).zip(now_to.chunks_exact_mut(unit)) {
                self.unit(direction, tweak, s, d);
                tweak = tweak.wrapping_add(u128::from(run.tweak_step));
            }
            (from, to) = (rest, rest_to);
            if !refill(&mut from, &mut src) {
                assert!(to.is_empty() && dst.all(|d| d.is_empty()), "destination longer than source");
                return;
            }
            while to.is_empty() {
                to = dst.next().expect("source longer than destination");
            }
            if from.len() < unit || to.len() < unit {
                self.scratch.with(unit, |buf| {
                    gather(buf, &mut from, &mut src);
                    self.unit_in_place(direction, tweak, buf);
                    scatter(buf, &mut to, &mut dst);
                });
                tweak = tweak.wrapping_add(u128::from(run.tweak_step));
            }
        }
    }

    /// Runs the data units in `pieces` where they lie. Pieces may be of any length; together a multiple of the unit.
    ///
    /// # Panics
    /// When the pieces end inside a unit: our own bug.
    pub fn run_in_place<'d>(
        &self,
        direction: Direction,
        run: UnitRun,
        pieces: impl IntoIterator<Item = &'d mut [u8]>,
    ) {
        let unit = run.unit_bytes;
        check_unit(unit);
        let mut pieces = pieces.into_iter();
        let mut tweak = run.first_tweak;
        let mut step = || {
            let now = tweak;
            tweak = tweak.wrapping_add(u128::from(run.tweak_step));
            now
        };
        while let Some(mut piece) = pieces.next() {
            while !piece.is_empty() {
                let (whole, tail) = piece.split_at_mut(piece.len() / unit * unit);
                for u in whole.chunks_exact_mut(unit) {
                    self.unit_in_place(direction, step(), u);
                }
                piece = if tail.is_empty() {
                    tail
                } else {
                    self.straddle(direction, step(), unit, tail, &mut pieces)
                };
            }
        }
    }

    /// One unit that begins with all of `head` and goes on in `pieces`; returns what is left of the last piece.
    fn straddle<'d>(
        &self,
        direction: Direction,
        tweak: u128,
        unit: usize,
        head: &'d mut [u8],
        pieces: &mut impl Iterator<Item = &'d mut [u8]>,
    ) -> &'d mut [u8] {
        self.scratch.with(unit, |buf| {
            let mut parts: Vec<&mut [u8]> = Vec::new();
            buf[..head.len()].copy_from_slice(head);
            let mut filled = head.len();
            parts.push(head);
            let mut rest: &mut [u8] = &mut [];
            while filled < unit {
                let piece = pieces.next().expect("the pieces end inside a data unit");
                let n = piece.len().min(unit - filled);
                let (part, after) = piece.split_at_mut(n);
                buf[filled..filled + n].copy_from_slice(part);
                filled += n;
                parts.push(part);
                rest = after;
            }
            self.unit_in_place(direction, tweak, buf);
            let mut at = 0;
            for part in parts {
                part.copy_from_slice(&buf[at..at + part.len()]);
                at += part.len();
            }
            rest
        })
    }
}

/// Makes `from` not empty; false when there is nothing left.
fn refill<'s>(from: &mut &'s [u8], src: &mut impl Iterator<Item = &'s [u8]>) -> bool {
    while from.is_empty() {
        match src.next() {
            Some(next) => *from = next,
            None => return false,
        }
    }
    true
}

fn gather<'s>(buf: &mut [u8], from: &mut &'s [u8], src: &mut impl Iterator<Item = &'s [u8]>) {
    let mut at = 0;
    while at < buf.len() {
        assert!(refill(from, src), "the source ends inside a data unit");
        let n = from.len().min(buf.len() - at);
        let (part, rest) = from.split_at(n);
        buf[at..at + n].copy_from_slice(part);
        at += n;
        *from = rest;
    }
}

fn scatter<'d>(buf: &[u8], to: &mut &'d mut [u8], dst: &mut impl Iterator<Item = &'d mut [u8]>) {
    let mut at = 0;
    while at < buf.len() {
        while to.is_empty() {
            *to = dst.next().expect("source longer than destination");
        }
        let n = to.len().min(buf.len() - at);
        let (part, rest) = std::mem::take(to).split_at_mut(n);
        part.copy_from_slice(&buf[at..at + n]);
        at += n;
        *to = rest;
    }
}
