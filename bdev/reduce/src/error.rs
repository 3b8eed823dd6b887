//! What can go wrong when pools, volumes and domains are made, opened and managed. I/O errors are
//! [`cryptfold_bdev::Status`].

use std::path::PathBuf;

use cryptfold_bdev::{BdevError, Status};
use cryptfold_reduce_format::block::BlockError;
use cryptfold_reduce_format::keys::KeyError;
use cryptfold_reduce_format::probe::Foreign;
use thiserror::Error;

/// A refused or failed request about a pool.
#[derive(Clone, Debug, Error)]
pub enum PoolError {
    /// The base device can not be opened, claimed or registered.
    #[error(transparent)]
    Bdev(#[from] BdevError),
    /// The base device failed.
    #[error("{what} of pool device {device}: {status}")]
    Io {
        /// Base device.
        device: String,
        /// What was tried.
        what: &'static str,
        /// The device's verdict.
        status: Status,
    },
    /// The base device is too small.
    #[error("{device} has {bytes} bytes, a pool needs at least {need_bytes}: No space left on device")]
    TooSmall {
        /// Base device.
        device: String,
        /// Its size.
        bytes: u64,
        /// What would do.
        need_bytes: u64,
    },
    /// In a FIPS mode: a pool with other algorithms.
    #[error(
        "the pool on {device} was not made for the FIPS modes (its fingerprints are BLAKE3, its nonces not the cipher module's): open it with \
         --fips-mode off, make a new pool in the FIPS mode, and copy the volumes"
    )]
    NotApproved {
        /// Base device.
        device: String,
    },
    /// The base device carries something else.
    #[error("{device} carries {found}; force overwrites it")]
    Foreign {
        /// Base device.
        device: String,
        /// What it carries.
        found: Foreign,
    },
    /// No pool on the device.
    #[error("{device} carries no pool: {reason}")]
    NotAPool {
        /// Base device.
        device: String,
        /// What its first block is.
        reason: BlockError,
    },
    /// A pool that this program does not open, or a damaged one.
    #[error("the pool on {device} can not be opened: {reason}")]
    Block {
        /// Base device.
        device: String,
        /// Why.
        reason: BlockError,
    },
    /// The key given does not open the pool.
    #[error("the key does not fit the pool on {device}")]
    WrongKey {
        /// Base device.
        device: String,
    },
    /// The pool was erased: no key opens it any more.
    #[error("the pool on {device} was erased: its key slots are overwritten")]
    Erased {
        /// Base device.
        device: String,
    },
    /// Its wrapped keys are where nobody knows.
    #[error(
        "pool \"{0}\" was made by a version whose wrapped keys can not be found again, so no single domain of it can be \
         erased (the whole pool can); copy what has to stay to a new pool"
    )]
    NotErasable(String),
    /// A change of key slots failed half-way.
    #[error(
        "key slots of pool \"{pool}\": {status}; the change may or may not have been made: look at them and repeat it"
    )]
    Slots {
        /// Pool.
        pool: String,
        /// What the device said.
        status: Status,
    },
    /// The key slots were changed by somebody else meanwhile.
    #[error("key slots of pool \"{0}\" have been changed meanwhile: Device or resource busy; try again")]
    SlotsChanged(String),
    /// The key can not be used.
    #[error("key for the pool on {device}: {reason}")]
    Key {
        /// Base device.
        device: String,
        /// Why.
        reason: KeyError,
    },
    /// The key file can not be read.
    #[error("key file {}: {reason}", path.display())]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        reason: String,
    },
    /// Somebody else has the pool open.
    #[error("the pool on {device} is open on {host} (owner {owner}, still alive); close it there first")]
    OpenElsewhere {
        /// Base device.
        device: String,
        /// The owner's host.
        host: String,
        /// The owner's id.
        owner: String,
    },
    /// The pool's metadata is damaged beyond what can be gone around.
    #[error("the pool on {device} is damaged: {what}")]
    Damaged {
        /// Base device.
        device: String,
        /// What, where.
        what: String,
    },
    /// No open pool has this name or UUID.
    #[error("pool \"{0}\": No such device")]
    NoPool(String),
    /// An open pool has this name.
    #[error("pool \"{0}\": File exists (a pool of this name is open)")]
    PoolExists(String),
    /// The pool has volumes that are in use.
    #[error("{0}: Device or resource busy")]
    Busy(String),
    /// No such volume.
    #[error("volume \"{volume}\" of pool \"{pool}\": No such device")]
    NoVolume {
        /// Pool.
        pool: String,
        /// Volume.
        volume: String,
    },
    /// The name is taken.
    #[error("volume \"{volume}\" of pool \"{pool}\": File exists")]
    VolumeExists {
        /// Pool.
        pool: String,
        /// Volume.
        volume: String,
    },
    /// Several volumes go on from it.
    #[error("{volume}: Operation not permitted, {} go on from it (delete or inflate all but one)", clones.join(", "))]
    HasClones {
        /// Pool and name.
        volume: String,
        /// Those.
        clones: Vec<String>,
    },
    /// No such domain.
    #[error("domain \"{domain}\" of pool \"{pool}\": No such device (create it first)")]
    NoDomain {
        /// Pool.
        pool: String,
        /// Domain.
        domain: String,
    },
    /// The name is taken.
    #[error("domain \"{domain}\" of pool \"{pool}\": File exists")]
    DomainExists {
        /// Pool.
        pool: String,
        /// Domain.
        domain: String,
    },
    /// A parameter can not be used.
    #[error("Invalid parameters: {0}")]
    Invalid(String),
    /// The pool has no space for this.
    #[error("pool \"{0}\" has no space left: No space left on device")]
    NoSpace(String),
    /// The pool stopped after a failure of its device; it has to be closed and opened again.
    #[error("pool \"{pool}\" stopped: {status}; close it and open it again")]
    Stopped {
        /// Pool.
        pool: String,
        /// What the device said.
        status: Status,
    },
    /// The reactor that runs the pool is gone.
    #[error("the reactor of the pool has stopped")]
    NoReactor,
}

impl PoolError {
    /// The negative errno that SPDK's clients expect for this.
    pub fn code(&self) -> i32 {
        match self {
            PoolError::Bdev(error) => error.code(),
            PoolError::Io { .. }
            | PoolError::Damaged { .. }
            | PoolError::Stopped { .. }
            | PoolError::Slots { .. } => -5,
            PoolError::TooSmall { .. } | PoolError::NoSpace(_) => -28,
            PoolError::Foreign { .. } | PoolError::PoolExists(_) => -17,
            PoolError::VolumeExists { .. } | PoolError::DomainExists { .. } => -17,
            PoolError::NotAPool { .. } | PoolError::NoPool(_) => -19,
            PoolError::NoVolume { .. } | PoolError::NoDomain { .. } => -19,
            PoolError::Block { .. } => -22,
            PoolError::WrongKey { .. } | PoolError::Key { .. } => -126,
            PoolError::Erased { .. } => -127,
            PoolError::NotErasable(_) | PoolError::NotApproved { .. } => -95,
            PoolError::SlotsChanged(_) => -16,
            PoolError::KeyFile { .. } => -2,
            PoolError::OpenElsewhere { .. } | PoolError::Busy(_) => -16,
            PoolError::HasClones { .. } => -1,
            PoolError::Invalid(_) => -32602,
            PoolError::NoReactor => -108,
        }
    }
}
