//! Byte strings that must not be somewhere.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// Byte strings of 16 bytes or more.
pub struct Patterns(Vec<Vec<u8>>);

impl Patterns {
    /// # Panics
    /// When one is shorter: it would be found by chance.
    pub fn new(all: impl IntoIterator<Item = Vec<u8>>) -> Patterns {
        let all: Vec<_> = all.into_iter().collect();
        assert!(all.iter().all(|p| p.len() >= 16), "too short to be looked for");
        Patterns(all)
    }

    /// Which of them are in `bytes`, once for each place.
    pub fn found(&self, bytes: &[u8]) -> Vec<usize> {
        self.places(bytes).into_iter().map(|(n, _)| n).collect()
    }

    /// Which of them are in `bytes`, and where.
    pub fn places(&self, bytes: &[u8]) -> Vec<(usize, usize)> {
        // By their first two bytes, all in one pass.
        let start = |b: &[u8]| usize::from(u16::from_le_bytes([b[0], b[1]]));
        let mut by_start = vec![Vec::new(); 1 << 16];
        self.0.iter().enumerate().for_each(|(n, p)| by_start[start(p)].push(n));
        let mut found = Vec::new();
        for at in 0..bytes.len().saturating_sub(1) {
            let here = by_start[start(&bytes[at..])].iter();
            found.extend(here.filter(|n| bytes[at..].starts_with(&self.0[**n])).map(|n| (*n, at)));
        }
        found
    }

    /// At how many places of a file they are.
    ///
    /// # Errors
    /// The system's.
    pub fn count_in_file(&self, path: &Path) -> Result<usize, String> {
        let longest = self.0.iter().map(Vec::len).max().unwrap_or(1);
        let read = || -> std::io::Result<usize> {
            let mut file = File::open(path)?;
            let (mut piece, mut kept, mut count) = (vec![0; (4 << 20) + longest], 0, 0);
            loop {
                let n = file.read(&mut piece[kept..])?;
                if n == 0 {
                    return Ok(count);
                }
                let end = kept + n;
                count += self.found(&piece[..end]).len();
                // What may begin at the end of this piece; shorter than the shortest that could be counted twice.
                let rest = end.min(longest - 1);
                piece.copy_within(end - rest..end, 0);
                kept = rest;
            }
        };
        read().map_err(|e| format!("{}: {e}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_found_wherever_it_is() {
        let one: Vec<u8> = (1..17).collect();
        let two: Vec<u8> = (1..16).chain([99]).collect();
        let patterns = Patterns::new([one.clone(), two.clone()]);
        let mut bytes = vec![7; 5 << 20];
        bytes[3..19].copy_from_slice(&two);
        bytes[(4 << 20) + 5..(4 << 20) + 21].copy_from_slice(&one);
        let end = bytes.len() - 16;
        bytes[end..].copy_from_slice(&one);
        assert_eq!(patterns.found(&bytes), [1, 0, 0]);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        assert_eq!(patterns.count_in_file(file.path()), Ok(3));
        assert!(patterns.found(&bytes[..18]).is_empty());
    }
}
