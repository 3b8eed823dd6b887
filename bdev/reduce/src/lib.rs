//! The pool: deduplication, compression, encryption and thin volumes over one base device, crash-proof.
//!
//! ```text
//!   manager  ordinary threads: create, open, close, volumes, domains, check      info, error: what they say
//!   volume   a volume as a block device (per-core queue -> the pool's home reactor)
//!      |-- ingest   write path: hash, look up, compress, seal, journal, apply     log: the open data segments
//!      |-- read     read path: resolve, fetch, verify, decode
//!   shard    the state, and the fold of journal records over it                   tree, segments, index, family: its parts
//!   load     brings nodes to RAM     commit  group commit     checkpoint, meta  state to disk
//!   lend     what other cores than the home fill     core  what each core has
//!   open, anchors, owner, replay     making, opening, recovery
//!   keyslots, erase: the key block's slots and erasure secrets             generation, renew, wipe: new keys for domains; estimate: what a pool would make of data
//!   gc, check, repair, scrub, heal, late, grow, admin, snapshots                        what goes on behind, and what is asked for
//! ```
//!
//! Write order, in one line: data, flush, journal batch, flush, completion of the flush; a checkpoint is nodes, flush,
//! superblock, flush. Everything else follows from there; see the heads of `commit` and `checkpoint`.
//!
//! All state of a pool belongs to its home reactor. [`PoolManager`] is how other threads reach it.

mod admin;
mod aged;
mod ahead;
mod anchors;
mod base;
mod check;
mod checkpoint;
mod chunklock;
mod commit;
mod core;
mod damage;
mod erase;
mod error;
pub mod estimate;
mod family;
mod gc;
mod generation;
mod grow;
mod hash;
mod heal;
mod index;
mod info;
mod ingest;
mod journal;
mod keyslots;
mod late;
mod lend;
mod load;
mod local;
mod log;
mod manager;
mod meta;
mod open;
mod owner;
mod pace;
mod pool;
mod read;
mod recent;
mod renew;
mod repair;
mod replay;
mod scrub;
mod segments;
mod shard;
mod snapshots;
mod tally;
mod touch;
mod tree;
mod volume;
mod wipe;

#[doc(hidden)]
pub use aged::{Backlog, HeldCheckpoints};
pub use cryptfold_reduce_format::codec::Compression;
pub use cryptfold_reduce_format::ids::{DomainId, VolumeId};
pub use cryptfold_reduce_format::{block, keys, slots};
#[doc(hidden)]
pub use damage::{Falsify, Part};
pub use error::PoolError;
pub use info::{
    AsSent, CheckReport, CreateOptions, DeletionInfo, DomainInfo, ErasedDomain, ErasedPool, KeyChange,
    KeySource, LateInfo, LostPool, PoolEvent, PoolInfo, RenewalInfo, ScrubInfo, ScrubState, SealedPool,
    SlotKey, Space, VolumeInfo, VolumeOptions,
};
pub use local::LocalPool;
pub use manager::PoolManager;
pub use open::{DEFAULT_DOMAIN, MIN_MEMORY_BYTES, MIN_POOL_BYTES};
pub use renew::DEFAULT_RENEWAL_BYTES_PER_S;
pub use scrub::DEFAULT_SCRUB_BYTES_PER_S;
