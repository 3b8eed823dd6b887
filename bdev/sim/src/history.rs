//! What was written to each block, when, and whether what is read now is legal.
//!
//! Time is a count of history events. A *version* of a block is what one write put there, from the write's start to its
//! end (no end: it never completed, or failed, and may or may not have happened). Version w is *gone for a reader* when
//! another one began after w's end and ended before the reader began. After a power cut it is *gone for good* when
//! another one that is durable began after w's end: durable = FUA, or ended before the start of a flush that succeeded.
//! Everything else that was ever begun may be found, block by block, but nothing that is not exactly one version.

use std::collections::HashMap;
use std::fmt;

/// A volume of the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VolumeId(pub usize);

/// A write under way: one version per block.
#[derive(Debug)]
#[must_use]
pub struct WriteId {
    volume: VolumeId,
    lba: u64,
    start: u64,
    blocks: u64,
}

/// A flush under way.
#[derive(Debug)]
#[must_use]
pub struct FlushId {
    volume: VolumeId,
    start: u64,
}

/// A read under way: when it began.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct ReadId(u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    print: u64,
    start: u64,
    end: Option<u64>,
    through: bool,
}

impl Version {
    /// What was there before anything was written.
    fn origin(print: u64) -> Version {
        Version { print, start: 0, end: Some(0), through: true }
    }
}

#[derive(Clone, Debug, Default)]
struct Volume {
    name: String,
    block_bytes: usize,
    blocks: HashMap<u64, Vec<Version>>,
    /// (start, end) of flushes that succeeded.
    flushes: Vec<(u64, u64)>,
    zero: u64,
    /// It never changes: what one read has found, all others find.
    fixed: bool,
    /// It is a copy that is being made: of what, since when.
    copying: Option<(usize, u64)>,
}

impl Volume {
    fn versions(&self, lba: u64) -> Vec<Version> {
        self.blocks.get(&lba).cloned().unwrap_or_else(|| vec![Version::origin(self.zero)])
    }

    fn horizon(&self) -> u64 {
        self.flushes.iter().map(|f| f.0).max().unwrap_or(0)
    }
}

/// Why a content is illegal.
#[derive(Clone, Debug)]
pub struct Violation(String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub struct History {
    volumes: Vec<Volume>,
    now: u64,
    /// The device's event count at each history event, for [`History::at`].
    stamps: Vec<u64>,
    stamp: u64,
}

/// Tells contents apart: equal for equal bytes, and different ones do not meet by chance.
pub fn fingerprint(bytes: &[u8]) -> u64 {
    let mut h = 0x243f_6a88_85a3_08d3u64 ^ bytes.len() as u64;
    for part in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..part.len()].copy_from_slice(part);
        h = (h ^ u64::from_le_bytes(word)).wrapping_mul(0x9fb2_1c65_1e98_df25);
        h ^= h >> 29;
    }
    h
}

impl History {
    /// Nothing written yet.
    pub fn new() -> History {
        History::default()
    }

    /// Adds a volume full of zeros.
    pub fn add_volume(&mut self, name: &str, block_bytes: usize) -> VolumeId {
        let zero = fingerprint(&vec![0; block_bytes]);
        self.volumes.push(Volume { name: name.into(), block_bytes, zero, ..Volume::default() });
        VolumeId(self.volumes.len() - 1)
    }

    /// Tells the device's event count, with which [`History::at`] finds its way back. Never goes back itself.
    pub fn stamp(&mut self, device_events: u64) {
        self.stamp = self.stamp.max(device_events);
    }

    /// The device's count begins anew: everything so far lies before its first event.
    pub fn restart_stamps(&mut self) {
        self.stamps.fill(0);
        self.stamp = 0;
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.stamps.push(self.stamp);
        self.now
    }

    /// Now: the number of the last event.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Something else happens; when.
    pub fn event(&mut self) -> u64 {
        self.tick()
    }

    /// A copy of a volume (snapshot or clone) begins to be made, as of one moment until it is done: per block what a reader
    /// might find in that time. Unless it is `writable` it never changes. The copy, and when it began.
    pub fn copy_started(&mut self, of: VolumeId, name: &str, writable: bool) -> (VolumeId, u64) {
        let start = self.tick();
        let Volume { block_bytes, zero, .. } = self.volumes[of.0];
        let (fixed, copying) = (!writable, Some((of.0, start)));
        let copy = Volume { name: name.into(), block_bytes, zero, fixed, copying, ..Volume::default() };
        self.volumes.push(copy);
        (VolumeId(self.volumes.len() - 1), start)
    }

    /// The copy has been made, or the power has failed and it may have been: when. Once is enough.
    pub fn copy_ended(&mut self, copy: VolumeId) -> u64 {
        let end = self.tick();
        let Some((of, start)) = self.volumes[copy.0].copying.take() else { return end };
        let blocks = self.volumes[of].blocks.iter();
        let copied = blocks.map(|(lba, versions)| {
            let overwritten = |v: &Version| {
                v.end.is_some_and(|end| {
                    versions.iter().any(|w| w.start > end && w.end.is_some_and(|e| e < start))
                })
            };
            let possible = versions.iter().filter(|v| !overwritten(v));
            let version = |v: &Version| Version { print: v.print, start, end: Some(start), through: true };
            (*lba, possible.map(version).collect())
        });
        self.volumes[copy.0].blocks = copied.collect();
        end
    }

    /// A write begins whose blocks, from `lba`, are those of `data`.
    pub fn write_started(&mut self, volume: VolumeId, lba: u64, data: &[u8], fua: bool) -> WriteId {
        let bs = self.volumes[volume.0].block_bytes;
        let prints: Vec<u64> = data.chunks(bs).map(fingerprint).collect();
        self.started(volume, lba, &prints, fua)
    }

    /// A write of zeros, or an unmap, begins.
    pub fn zeroes_started(&mut self, volume: VolumeId, lba: u64, blocks: u64, fua: bool) -> WriteId {
        let prints = vec![self.volumes[volume.0].zero; blocks as usize];
        self.started(volume, lba, &prints, fua)
    }

    fn started(&mut self, volume: VolumeId, lba: u64, prints: &[u64], through: bool) -> WriteId {
        let start = self.tick();
        let v = &mut self.volumes[volume.0];
        let zero = v.zero;
        for (i, print) in prints.iter().enumerate() {
            let versions = v.blocks.entry(lba + i as u64).or_insert_with(|| vec![Version::origin(zero)]);
            versions.push(Version { print: *print, start, end: None, through });
        }
        WriteId { volume, lba, start, blocks: prints.len() as u64 }
    }

    /// A write ended. One that failed may or may not have happened, block by block.
    pub fn write_ended(&mut self, id: WriteId, ok: bool) {
        let end = self.tick();
        let blocks = &mut self.volumes[id.volume.0].blocks;
        for lba in id.lba..id.lba + id.blocks {
            let version = blocks.get_mut(&lba).and_then(|vs| vs.iter_mut().find(|v| v.start == id.start));
            if let Some(version) = version.filter(|_| ok) {
                version.end = Some(end);
            }
        }
    }

    /// A flush of a volume begins.
    pub fn flush_started(&mut self, volume: VolumeId) -> FlushId {
        FlushId { volume, start: self.tick() }
    }

    /// A flush ended.
    pub fn flush_ended(&mut self, id: FlushId, ok: bool) {
        let end = self.tick();
        if ok {
            self.volumes[id.volume.0].flushes.push((id.start, end));
        }
    }

    /// The stack was closed in order: what completed is durable.
    pub fn closed(&mut self) {
        for n in 0..self.volumes.len() {
            let id = self.flush_started(VolumeId(n));
            self.flush_ended(id, true);
        }
    }

    /// A read begins.
    pub fn read_started(&mut self) -> ReadId {
        ReadId(self.tick())
    }

    /// A read has returned `data`, from `lba`.
    ///
    /// # Errors
    /// What it can not have returned.
    pub fn read_ended(
        &mut self,
        id: ReadId,
        volume: VolumeId,
        lba: u64,
        data: &[u8],
    ) -> Result<(), Violation> {
        self.tick();
        let bs = self.volumes[volume.0].block_bytes;
        for (lba, block) in (lba..).zip(data.chunks(bs)) {
            let print = fingerprint(block);
            let versions = self.volumes[volume.0].versions(lba);
            let overwritten = |v: &Version| {
                v.end.is_some_and(|end| {
                    versions.iter().any(|w| w.start > end && w.end.is_some_and(|e| e < id.0))
                })
            };
            if !versions.iter().any(|v| v.print == print && !overwritten(v)) {
                return Err(self.explain("read", volume, lba, block, &versions));
            }
            let v = &mut self.volumes[volume.0];
            if v.fixed
                && let Some(versions) = v.blocks.get_mut(&lba)
            {
                versions.retain(|v| v.print == print);
            }
        }
        Ok(())
    }

    /// Checks what was found after a power cut (or a kill) and recovery. From now on it is the only version, and durable:
    /// what a recovery has shown, the next one must show too.
    ///
    /// # Errors
    /// What can not have been found.
    pub fn recovered(&mut self, volume: VolumeId, lba: u64, data: &[u8]) -> Result<(), Violation> {
        let now = self.tick();
        let (bs, horizon) = (self.volumes[volume.0].block_bytes, self.volumes[volume.0].horizon());
        for (lba, block) in (lba..).zip(data.chunks(bs)) {
            let v = &mut self.volumes[volume.0];
            if !v.blocks.contains_key(&lba) && block.iter().all(|b| *b == 0) {
                continue;
            }
            let print = fingerprint(block);
            let versions = v.versions(lba);
            let durable = |w: &Version| w.end.is_some_and(|end| w.through || end < horizon);
            let gone =
                |v: &Version| v.end.is_some_and(|end| versions.iter().any(|w| w.start > end && durable(w)));
            if !versions.iter().any(|v| v.print == print && !gone(v)) {
                return Err(self.explain("recovery", volume, lba, block, &versions));
            }
            v.blocks.insert(lba, vec![Version { print, start: now, end: Some(now), through: true }]);
        }
        Ok(())
    }

    /// Blocks that were ever written, ascending.
    pub fn written(&self, volume: VolumeId) -> Vec<u64> {
        let mut lbas: Vec<u64> = self.volumes[volume.0].blocks.keys().copied().collect();
        lbas.sort_unstable();
        lbas
    }

    /// The history as it was at the last moment before device event `k + 1` (see [`History::stamp`]).
    #[must_use]
    pub fn at(&self, k: u64) -> History {
        let now = self.stamps.partition_point(|stamp| *stamp <= k) as u64;
        let mut past = self.clone();
        past.now = now;
        past.stamps.truncate(now as usize);
        past.stamp = past.stamps.last().copied().unwrap_or(0);
        for v in &mut past.volumes {
            v.flushes.retain(|f| f.1 <= now);
            for versions in v.blocks.values_mut() {
                versions.retain(|w| w.start <= now);
                versions.iter_mut().for_each(|w| w.end = w.end.filter(|end| *end <= now));
            }
        }
        past
    }

    #[cold]
    fn explain(&self, what: &str, volume: VolumeId, lba: u64, block: &[u8], legal: &[Version]) -> Violation {
        let v = &self.volumes[volume.0];
        let mut text = format!("{what} of {}, block {lba}: ", v.name);
        text += &self.identify(volume, lba, block);
        text += &format!("; now {}, flushed before {}; versions (start-end):", self.now, v.horizon());
        for w in legal.iter().rev().take(12) {
            let end = w.end.map_or("?".into(), |e| e.to_string());
            let fua = if w.through { " durable" } else { "" };
            let zero = if w.print == v.zero { " zeros" } else { "" };
            text += &format!(" [{}-{end}{fua}{zero} {:08x}]", w.start, w.print as u32);
        }
        Violation(text)
    }

    /// Whose content this is.
    fn identify(&self, volume: VolumeId, lba: u64, block: &[u8]) -> String {
        let print = fingerprint(block);
        if let Some(own) = self.volumes[volume.0].versions(lba).iter().find(|v| v.print == print) {
            return format!("an older version (of {}) than it may be", own.start);
        }
        for other in &self.volumes {
            for (at, versions) in &other.blocks {
                if let Some(w) = versions.iter().find(|w| w.print == print) {
                    return format!("the content of {}, block {at}, version of {}", other.name, w.start);
                }
            }
        }
        let zeros = block.chunks(512).filter(|s| s.iter().all(|b| *b == 0)).count();
        format!(
            "nobody's content, {zeros} of {} sectors zero, begins {:02x?}",
            block.len().div_ceil(512),
            &block[..16.min(block.len())]
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: VolumeId = VolumeId(0);

    fn data(n: u8) -> Vec<u8> {
        vec![n; 512]
    }

    fn history() -> History {
        let mut h = History::new();
        h.add_volume("v", 512);
        h
    }

    fn write(h: &mut History, n: u8, fua: bool) {
        let id = h.write_started(V, 5, &data(n), fua);
        h.write_ended(id, true);
    }

    fn flush(h: &mut History) {
        let id = h.flush_started(V);
        h.flush_ended(id, true);
    }

    fn found(h: &History, legal: &[u8], illegal: &[u8]) {
        for n in legal {
            h.clone().recovered(V, 5, &data(*n)).unwrap_or_else(|e| panic!("{n} is legal: {e}"));
        }
        for n in illegal {
            assert!(h.clone().recovered(V, 5, &data(*n)).is_err(), "{n} is not legal");
        }
    }

    #[test]
    fn unflushed_writes_may_be_lost_each() {
        let mut h = history();
        write(&mut h, 1, false);
        write(&mut h, 2, false);
        found(&h, &[0, 1, 2], &[3]);
        flush(&mut h);
        found(&h, &[2], &[0, 1]);
        write(&mut h, 3, false);
        let _ = h.write_started(V, 5, &data(4), false);
        found(&h, &[2, 3, 4], &[0, 1]);
    }

    #[test]
    fn a_flush_covers_what_completed_before_it_began() {
        let mut h = history();
        let w = h.write_started(V, 5, &data(1), false);
        let f = h.flush_started(V);
        h.write_ended(w, true);
        h.flush_ended(f, true);
        found(&h, &[0, 1], &[]);
        let f = h.flush_started(V);
        found(&h, &[0, 1], &[]);
        h.flush_ended(f, false);
        found(&h, &[0, 1], &[]);
        flush(&mut h);
        found(&h, &[1], &[0]);
    }

    #[test]
    fn fua_is_durable_and_concurrent_writes_may_win() {
        let mut h = history();
        let w = h.write_started(V, 5, &data(1), false);
        write(&mut h, 2, true);
        found(&h, &[1, 2], &[0]);
        h.write_ended(w, true);
        found(&h, &[1, 2], &[0]);
    }

    #[test]
    fn failed_writes_may_have_happened() {
        let mut h = history();
        write(&mut h, 1, true);
        let w = h.write_started(V, 5, &data(2), true);
        h.write_ended(w, false);
        found(&h, &[1, 2], &[0]);
    }

    #[test]
    fn mixtures_and_other_blocks_are_found() {
        let mut h = history();
        write(&mut h, 1, false);
        let mut mixed = data(1);
        mixed[256..].fill(0);
        let error = h.clone().recovered(V, 5, &mixed).unwrap_err().to_string();
        assert!(error.contains("nobody's content"), "{error}");
        let error = h.clone().recovered(V, 6, &data(1)).unwrap_err().to_string();
        assert!(error.contains("the content of v, block 5"), "{error}");
        flush(&mut h);
        let error = h.recovered(V, 5, &data(0)).unwrap_err().to_string();
        assert!(error.contains("older"), "{error}");
    }

    #[test]
    fn what_a_recovery_showed_stays() {
        let mut h = history();
        write(&mut h, 1, false);
        write(&mut h, 2, false);
        h.recovered(V, 5, &data(1)).unwrap();
        found(&h, &[1], &[0, 2]);
        h.recovered(V, 6, &data(0)).unwrap();
        assert!(h.recovered(V, 6, &data(1)).is_err());
    }

    #[test]
    fn running_reads() {
        let mut h = history();
        write(&mut h, 1, false);
        let early = h.read_started();
        let w = h.write_started(V, 5, &data(2), false);
        let during = h.read_started();
        h.write_ended(w, true);
        let late = h.read_started();
        for (read, legal) in [(early, &[1, 2][..]), (during, &[1, 2]), (late, &[2])] {
            for n in 0..3u8 {
                let verdict = h.clone().read_ended(read, V, 5, &data(n));
                assert_eq!(verdict.is_ok(), legal.contains(&n), "{n} at {read:?}");
            }
        }
    }

    #[test]
    fn unmapped_reads_zero() {
        let mut h = history();
        write(&mut h, 1, true);
        let w = h.zeroes_started(V, 4, 3, true);
        h.write_ended(w, true);
        found(&h, &[0], &[1]);
    }

    #[test]
    fn a_copy_is_of_one_moment() {
        let mut h = history();
        write(&mut h, 1, false);
        let early = h.write_started(V, 5, &data(2), false);
        let (copy, _) = h.copy_started(V, "copy", false);
        write(&mut h, 3, false);
        h.copy_ended(copy);
        h.write_ended(early, true);
        write(&mut h, 4, true);
        for n in 0..6u8 {
            let found = h.clone().recovered(copy, 5, &data(n));
            assert_eq!(found.is_ok(), [1, 2, 3].contains(&n), "{n}");
        }
        // What one reader has found is what it has.
        let read = h.read_started();
        h.read_ended(read, copy, 5, &data(2)).unwrap();
        let read = h.read_started();
        assert!(h.clone().read_ended(read, copy, 5, &data(3)).is_err());
        assert!(h.clone().recovered(copy, 5, &data(1)).is_err());
        h.read_ended(read, copy, 5, &data(2)).unwrap();
        h.recovered(copy, 6, &data(0)).unwrap();
    }

    #[test]
    fn the_past_can_be_asked() {
        let mut h = history();
        h.stamp(3);
        write(&mut h, 1, false);
        h.stamp(5);
        flush(&mut h);
        h.stamp(9);
        write(&mut h, 2, false);
        found(&h, &[1, 2], &[0]);
        found(&h.at(8), &[1], &[0, 2]);
        found(&h.at(4), &[0, 1], &[2]);
        found(&h.at(2), &[0], &[1, 2]);
    }
}
