//! The pool's on-disk structures, their sealing, and the codecs, fingerprints and keys behind them.
//!
//! Pure functions: no I/O, threads or clock; randomness (salts, ids, keys) is passed in. Everything that is parsed may be
//! hostile: it gives a typed value or an error that says what is wrong, never a panic. All numbers are little-endian and of
//! fixed width (varints where a module says so), reserved bytes are written zero and checked, lengths are bytes unless
//! the name says blocks (4 KiB).
//!
//! # A pool, from the outside in
//!
//! ```text
//! device   |A0|      |A1|  segments ...   |A2|  segments ...  journal rings  ...  |A3|
//!           0        1 MiB              middle                                    end
//!
//! anchor   | superblock | key block | owner block | reserved |          4 x 4 KiB, four copies
//!                |             |            '- who has the pool open, heartbeat
//!                |             '- the pool key, wrapped by key files, passwords, KMS keys
//!                '- devices, shards (journal rings and where replay begins), and the root:
//!
//! root --> pool record --> segment tables (per device): what each segment is, holds, has free
//!                     |--> domain records: wrapped keys by generation
//!                     |       '--> per shard: containers (slots -> references, fragments), fingerprints
//!                     '--> volume records
//!                             '--> map: block -> (container, slot) | zero | pattern | unmapped
//!
//! segment  | header | unit | unit | unit ... | unused |                 one class, one domain, one key
//! unit     | header | body, encrypted | tag |                           fragment (data) or node (metadata)
//! ring     | batch | batch | batch | old batches |                      records since the last checkpoint
//! ```
//!
//! A read: volume's map leaf gives a chunk address; the container's leaf gives the fragment that holds that slot, and its
//! place; the fragment is authenticated, decrypted, decompressed. A write: fingerprint; if known, one reference more, else
//! a fragment appended to an open segment; a map entry; records of both in the journal. Now and then a checkpoint writes
//! changed nodes to fresh places, bottom up, then the superblock, and the journal's tail moves on.
//!
//! # What makes it trustworthy
//!
//! - The superblock is MACed, each pointer carries its child's tag, and each leaf pins its children by table and place:
//!   a flipped, stale, lost, swapped or moved block does not open.
//! - A segment's key derives from its domain's data key, a random salt and its address and incarnation; the nonce is the
//!   place in it. Each place of an incarnation is sealed once, because a segment is never appended to after a crash.
//! - A journal batch is chained to the one before, and numbered; its key is drawn afresh by each opening of the pool.
//! - What derives from users' data is under the domain's keys (maps, fingerprints, patterns, their journal records): with
//!   the domain's keys gone, all of it is. What stays readable with the pool key is what the pool needs to free the space.
//! - Rolling back a whole device cannot be seen from inside.
//!
//! # How the format may change
//!
//! Stand-alone blocks have a version and feature flags ([`block`], [`superblock`]); records have tagged fields that an older
//! program keeps or refuses ([`record`]); leaves begin with a version; segments name their cipher, hash and codec; numbers of
//! kinds are never reused. `tests/golden_v1` pins the first version.
//!
//! # Modules, in the order a reader needs
//!
//! | module | what |
//! |---|---|
//! | [`ids`] | numbers and addresses |
//! | [`block`] | what superblock, key, owner and segment header blocks share |
//! | [`superblock`] | the root, and where everything lies |
//! | [`keys`], [`slots`] | secrets, derivations, wrapping; the key block |
//! | [`owner`] | one owner at a time |
//! | [`segment`], [`sealed`] | the segment header; sealed units and their key |
//! | [`fragment`], [`codec`], [`fingerprint`] | data: chunks, compressed together, sealed; what makes chunks the same |
//! | [`node`] | metadata: nodes and the pointers that vouch for them |
//! | [`map`], [`container`], [`segtable`], [`record`] | what the nodes hold |
//! | [`journal`], [`entry`] | batches; the records in them |
//! | [`probe`] | foreign contents |
//! | [`wire`] | strict reading of variable-length structures |

pub mod block;
pub mod codec;
pub mod container;
pub mod entry;
pub mod fingerprint;
pub mod fragment;
pub mod ids;
pub mod journal;
pub mod keys;
#[cfg(test)]
mod layout;
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
