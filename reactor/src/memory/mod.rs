//! I/O memory: reference-counted buffers from per-thread pools over a hugepage arena, scatter lists, and locked key memory.
//!
//! Owns every data buffer of the process. Works on any thread, with or without a [`crate::Runtime`].
//!
//! Invariants:
//! - Everything mapped here is excluded from core dumps (`MADV_DONTDUMP`): buffers hold plaintext.
//! - A block is writable only through the one [`Buf`] that refers to it.
//! - Arena memory is never unmapped; freed blocks go back to free lists, so memory is bounded by the peak in use plus
//!   a fixed amount per thread.
//!
//! Units: bytes.

mod arena;
mod buf;
pub mod heap;
mod pool;
mod prefetch;
mod secret;
mod sg;
mod stream;

pub use arena::{MAX_INDEXED_SLABS, slab_at, slab_count};
pub use buf::{Buf, Place};
pub use prefetch::{Prefetch, prefetch};
pub use secret::{SecretBytes, forbid_core_dumps, on_wiped_stack};
pub use sg::SgList;
pub use stream::{fence_streams, stream};

/// Size of a slab: the unit the arena hands to the pools, and the unit of fixed-buffer registration. Bytes.
pub const SLAB_BYTES: usize = 2 << 20;

/// Alignment of every buffer's first byte: enough for `O_DIRECT` and for DMA. Bytes.
pub const ALIGNMENT: usize = 4096;

/// How the arena gets its memory.
#[derive(Clone, Debug)]
pub struct MemoryConfig {
    /// Use 2 MiB hugetlb pages when the kernel has some reserved; otherwise transparent huge pages are asked for.
    pub hugepages: bool,
    /// Bytes mapped when the runtime starts (rounded up to 2 MiB). The arena grows beyond it when needed.
    pub arena_bytes: usize,
    /// Register the arena with each reactor's ring as fixed buffers. This pins the arena's used part in RAM.
    pub fixed_buffers: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        MemoryConfig { hugepages: true, arena_bytes: 64 << 20, fixed_buffers: true }
    }
}

/// What the arena is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Nothing is mapped yet.
    Unused,
    /// All of it is reserved 2 MiB pages (hugetlb).
    Huge,
    /// Ordinary pages, transparent huge pages asked for.
    Ordinary,
    /// The reserved pages ran out: both kinds.
    Mixed,
}

/// A snapshot of the memory in use. Bytes.
#[derive(Clone, Copy, Debug)]
pub struct MemoryStats {
    /// Address space of the arena.
    pub mapped_bytes: u64,
    /// Of which hugetlb pages.
    pub huge_bytes: u64,
    /// Part of the arena that was ever handed to the pools.
    pub slab_bytes: u64,
    /// Held by live pool buffers (their size class, not their length).
    pub in_use_bytes: u64,
    /// Held by live buffers too large for the pools, each a mapping of its own.
    pub large_bytes: u64,
    /// Live blocks of lent memory ([`Buf::from_owner`]).
    pub lent_blocks: u64,
    /// What the arena is made of.
    pub pages: PageKind,
}

/// Sets how the arena grows from now on and maps `arena_bytes` at once. Called by [`crate::Runtime::start`].
pub fn configure(config: &MemoryConfig) {
    arena::configure(config);
}

/// The memory in use by the whole process. Exact only while no other thread allocates or frees.
pub fn stats() -> MemoryStats {
    let (mapped, huge, slabs) = arena::usage();
    MemoryStats {
        mapped_bytes: mapped,
        huge_bytes: huge,
        slab_bytes: slabs,
        in_use_bytes: pool::in_use_bytes(),
        large_bytes: buf::large_bytes(),
        lent_blocks: buf::lent_blocks(),
        pages: match (mapped, huge) {
            (0, _) => PageKind::Unused,
            (m, h) if m == h => PageKind::Huge,
            (_, 0) => PageKind::Ordinary,
            _ => PageKind::Mixed,
        },
    }
}
