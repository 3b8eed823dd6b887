//! cryptfold-reduce-format: the pool's on-disk structures, without I/O.

pub mod block;
pub mod codec;
pub mod container;
pub mod entry;
pub mod fingerprint;
pub mod fragment;
pub mod ids;
pub mod journal;
pub mod keys;
pub mod map;
pub mod node;
pub mod owner;
pub mod probe;
pub mod record;
pub mod sealed;
pub mod segment;
pub mod segtable;
pub mod slots;
pub mod superblock;
pub mod wire;
