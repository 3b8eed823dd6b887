//! The surface of a disk: sparse pages, shared between copies until one writes.
//!
//! Units: bytes; ranges are whole 512-byte sectors.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::Rng;

/// Smallest unit that a power cut leaves whole.
pub const SECTOR_BYTES: usize = 512;
const PAGE: usize = 4096;
type Page = [u8; PAGE];

/// What is on a disk. Copies are cheap.
#[derive(Clone, Debug, Default)]
pub struct Image {
    pages: BTreeMap<u64, Arc<Page>>,
    /// What pages hold that were never written: zeros, or noise from this seed.
    noise: Option<u64>,
}

impl Image {
    /// A disk full of zeros.
    pub fn zeroed() -> Image {
        Image::default()
    }

    /// A used disk: every page holds noise derived from `seed`.
    pub fn noise(seed: u64) -> Image {
        Image { pages: BTreeMap::new(), noise: Some(seed) }
    }

    fn fresh(&self, page: u64) -> Page {
        let mut bytes = [0; PAGE];
        if let Some(seed) = self.noise {
            Rng::new(seed ^ page.wrapping_mul(0x9e37_79b9_7f4a_7c15)).fill(&mut bytes);
        }
        bytes
    }

    /// Copies `target.len()` bytes from `at`.
    pub fn read(&self, at: u64, target: &mut [u8]) {
        let mut at = at;
        let mut rest = target;
        while !rest.is_empty() {
            let (page, offset) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let n = rest.len().min(PAGE - offset);
            let (head, tail) = rest.split_at_mut(n);
            match self.pages.get(&page) {
                Some(bytes) => head.copy_from_slice(&bytes[offset..offset + n]),
                None if self.noise.is_none() => head.fill(0),
                None => head.copy_from_slice(&self.fresh(page)[offset..offset + n]),
            }
            (rest, at) = (tail, at + n as u64);
        }
    }

    /// Puts `data` at `at`.
    pub fn write(&mut self, at: u64, data: &[u8]) {
        let mut at = at;
        let mut rest = data;
        while !rest.is_empty() {
            let (page, offset) = (at / PAGE as u64, (at % PAGE as u64) as usize);
            let n = rest.len().min(PAGE - offset);
            if !self.pages.contains_key(&page) {
                let fresh = self.fresh(page);
                self.pages.insert(page, Arc::new(fresh));
            }
            if let Some(bytes) = self.pages.get_mut(&page) {
                Arc::make_mut(bytes)[offset..offset + n].copy_from_slice(&rest[..n]);
            }
            (rest, at) = (&rest[n..], at + n as u64);
        }
    }

    /// Flips the bits of `mask` in the byte at `at`: bit rot.
    pub fn flip(&mut self, at: u64, mask: u8) {
        let mut byte = [0];
        self.read(at, &mut byte);
        self.write(at, &[byte[0] ^ mask]);
    }

    /// Addresses of the pages that were ever written.
    pub fn written_pages(&self) -> impl Iterator<Item = u64> {
        self.pages.keys().map(|page| page * PAGE as u64)
    }
}
