//! Refused requests about remote controllers.

use cryptfold_bdev::BdevError;
use cryptfold_nvmf_initiator as initiator;

/// Why a controller is not attached, detached or reset.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The name, or the path, is there already.
    #[error("{0}")]
    Already(String),
    /// A parameter can not be used.
    #[error("Invalid parameters: {0}")]
    Invalid(String),
    /// Nothing has this name.
    #[error("controller \"{0}\": No such device")]
    NotFound(String),
    /// The controller has no path with this address.
    #[error("controller \"{0}\" has no such path: No such device or address")]
    NoPath(String),
    /// The target can not be reached, or does not let us in.
    #[error("{0}: Input/output error")]
    Connect(#[from] initiator::Error),
    /// It was not connected again in time.
    #[error("controller \"{0}\" is not connected: Input/output error")]
    NotConnected(String),
    /// The block device layer refused.
    #[error(transparent)]
    Bdev(#[from] BdevError),
    /// The reactors are not running.
    #[error("not initialised: Operation not permitted")]
    NoReactor,
    /// Devices are still in use.
    #[error("devices of \"{0}\" are still in use: Device or resource busy")]
    Busy(String),
}

impl RemoteError {
    /// The code that SPDK's clients expect for this: JSON-RPC's, or a negative errno.
    pub fn code(&self) -> i32 {
        match self {
            RemoteError::Already(_) => -114,
            RemoteError::Invalid(_) => -32602,
            RemoteError::NotFound(_) => -19,
            RemoteError::NoPath(_) => -6,
            RemoteError::Connect(initiator::Error::Option { .. }) => -32602,
            RemoteError::Connect(_) | RemoteError::NotConnected(_) => -5,
            RemoteError::Bdev(e) => e.code(),
            RemoteError::NoReactor => -1,
            RemoteError::Busy(_) => -16,
        }
    }
}
