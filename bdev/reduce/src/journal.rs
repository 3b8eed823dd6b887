//! The shard's journal at run time: records collected into batches, and the ring that batches are written to.
//!
//! Owns the batches that are not sealed yet, the sealer, and what is known about the ring. Does no I/O.
//!
//! Invariants: batches are sealed in order, at the moment they are cut, and written in order by the one committer; the ring
//! between `tail` and the sealer's cursor holds what recovery would replay.

use cryptfold_reduce_format::block::BLOCK_BYTES;
use cryptfold_reduce_format::entry::Record;
use cryptfold_reduce_format::ids::Sequence;
use cryptfold_reduce_format::journal::{
    Batch, BatchSealer, Cursor, JournalEpoch, JournalKey, Scope, SealBatchError,
};
use cryptfold_reduce_format::keys::JournalRoot;
use cryptfold_reduce_format::superblock::ShardEntry;
use cryptfold_reduce_format::wire::WireError;

/// A sealed batch, to be written.
pub(crate) struct Sealed {
    pub sequence: Sequence,
    /// Blocks since the pool was made.
    pub position: u64,
    pub bytes: Vec<u8>,
}

/// See the module's head.
pub(crate) struct Journal {
    sealer: BatchSealer,
    start_bytes: u64,
    blocks: u64,
    /// Oldest position that recovery needs.
    tail: u64,
    durable: Sequence,
    /// Full batches, oldest first, and the one being filled.
    pending: Vec<Batch>,
    spare: Vec<Batch>,
    /// Memory of batches that have been written.
    spare_bytes: Vec<Vec<u8>>,
    records: u64,
    pending_bytes: usize,
    stored_nonces: bool,
    /// After so many seals the keys are changed, with stored nonces.
    most_seals: u64,
}

/// Half of what random nonces allow one key (NIST SP 800-38D section 8.3: 2^32); all keys of an epoch are counted together.
const MOST_SEALS: u64 = 1 << 31;

impl Journal {
    /// A journal that goes on where `sealer` stands, in the ring of `entry`, whose content from `tail` on is needed; with
    /// `stored_nonces` as pools of the FIPS modes have it.
    pub fn new(sealer: BatchSealer, entry: &ShardEntry, tail: u64, stored_nonces: bool) -> Journal {
        Journal {
            durable: Sequence(sealer.cursor().sequence.0 - 1),
            sealer,
            start_bytes: entry.start_block * BLOCK_BYTES as u64,
            blocks: entry.blocks.into(),
            tail,
            pending: Vec::new(),
            spare: Vec::new(),
            spare_bytes: Vec::new(),
            records: 0,
            pending_bytes: 0,
            stored_nonces,
            most_seals: MOST_SEALS,
        }
    }

    /// Whether what is pending has to be sealed in a new epoch: [`Journal::renew`] before [`Journal::cut`].
    pub fn is_worn(&self) -> bool {
        self.stored_nonces && self.sealer.seals() >= self.most_seals
    }

    /// Goes on in another epoch; the domains' keys have to be of it, too.
    pub fn renew(&mut self, root: &JournalRoot, epoch: JournalEpoch) {
        self.sealer.renew(root, epoch);
    }

    /// For tests: [`Journal::is_worn`] after so many seals.
    pub fn limit_seals(&mut self, most: u64) {
        self.most_seals = most;
    }

    /// The batch that the last record is in: when it is durable, so is everything that has happened.
    pub fn now(&self) -> Sequence {
        Sequence(self.sealer.cursor().sequence.0 + self.pending.len() as u64 - 1)
    }

    /// Newest durable batch.
    pub fn durable(&self) -> Sequence {
        self.durable
    }

    /// Where the next batch goes.
    pub fn cursor(&self) -> &Cursor {
        self.sealer.cursor()
    }

    /// Records ever pushed.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Bytes of records that are not sealed, about.
    pub fn pending_bytes(&self) -> usize {
        self.pending_bytes
    }

    /// Whether there is anything to commit.
    pub fn is_dirty(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Adds a record that has been (or is about to be, in the same step) applied.
    pub fn push(&mut self, scope: Scope, record: &Record<'_>) -> Result<(), WireError> {
        self.records += 1;
        self.pending_bytes += record_bytes(record);
        if let Some(batch) = self.pending.last_mut()
            && batch.push(scope, record)?
        {
            return Ok(());
        }
        let mut batch = self.spare.pop().unwrap_or_else(|| match self.stored_nonces {
            true => Batch::with_stored_nonces(),
            false => Batch::new(),
        });
        batch.push(scope, record)?;
        self.pending.push(batch);
        Ok(())
    }

    /// Blocks that the pending batches will take.
    pub fn pending_blocks(&self) -> u64 {
        self.pending.iter().map(|batch| u64::from(batch.blocks())).sum()
    }

    /// Blocks of the ring in use, and of the ring.
    pub fn usage(&self) -> (u64, u64) {
        (self.sealer.cursor().position - self.tail, self.blocks)
    }

    /// Whether the pending batches fit the ring.
    pub fn has_room(&self) -> bool {
        let (used, all) = self.usage();
        used + self.pending_blocks() <= all
    }

    /// Seals everything pending. `key` gives the keys of the domains' groups.
    pub fn cut<'k>(
        &mut self,
        key: impl Fn(Scope) -> Option<&'k JournalKey>,
    ) -> Result<Vec<Sealed>, SealBatchError> {
        let mut sealed = Vec::with_capacity(self.pending.len());
        for mut batch in std::mem::take(&mut self.pending) {
            let mut bytes = self.spare_bytes.pop().unwrap_or_default();
            let header = self.sealer.seal(&batch, self.durable, &key, &mut bytes)?;
            sealed.push(Sealed { sequence: header.sequence, position: header.position, bytes });
            batch.clear();
            if self.spare.len() < 2 {
                self.spare.push(batch);
            }
        }
        self.pending_bytes = 0;
        Ok(sealed)
    }

    /// Takes back the memory of written batches.
    pub fn recycle(&mut self, sealed: Vec<Sealed>) {
        let room = 2usize.saturating_sub(self.spare_bytes.len());
        self.spare_bytes.extend(sealed.into_iter().take(room).map(|batch| batch.bytes));
    }

    /// All batches up to `sequence` are durable.
    pub fn set_durable(&mut self, sequence: Sequence) {
        self.durable = self.durable.max(sequence);
    }

    /// A checkpoint took over everything before `position`.
    pub fn set_tail(&mut self, position: u64) {
        self.tail = self.tail.max(position);
    }

    /// Splits a batch into at most two pieces of the ring: (byte offset on the device, range of the batch's bytes).
    pub fn places(&self, position: u64, len: usize) -> [(u64, std::ops::Range<usize>); 2] {
        let index = position % self.blocks;
        let first = (((self.blocks - index) as usize) * BLOCK_BYTES).min(len);
        [(self.start_bytes + index * BLOCK_BYTES as u64, 0..first), (self.start_bytes, first..len)]
    }
}

/// Bytes of a record, about.
fn record_bytes(record: &Record<'_>) -> usize {
    match record {
        Record::FragmentAdd { fingerprints, .. } => 32 + 16 * fingerprints.len(),
        Record::MapSet { runs, .. } => 16 + 18 * runs.len(),
        Record::Fingerprints { fingerprints, .. } => 16 + 16 * fingerprints.len(),
        _ => 48,
    }
}
