//! What can go wrong when devices are created, found, opened and removed. I/O errors are [`crate::Status`].

use thiserror::Error;

/// A refused request about a device.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BdevError {
    /// Nothing has this name, alias or UUID.
    #[error("bdev \"{0}\": No such device")]
    NotFound(String),
    /// The name, alias or UUID is taken.
    #[error("bdev \"{0}\": File exists (the name, an alias or the UUID is already in use)")]
    Exists(String),
    /// Another layer owns the device.
    #[error("bdev \"{name}\" is claimed by {by}: Device or resource busy")]
    Claimed {
        /// The device.
        name: String,
        /// Its owner.
        by: String,
    },
    /// The device is being removed.
    #[error("bdev \"{0}\" is being removed: No such device")]
    Removing(String),
    /// A parameter can not be used.
    #[error("Invalid parameters: {0}")]
    Invalid(String),
    /// A resource ran out.
    #[error("{0}: Cannot allocate memory")]
    NoResources(String),
    /// The operating system refused.
    #[error("{what}: {reason}")]
    Os {
        /// What was tried, and on what.
        what: String,
        /// Its answer.
        reason: String,
        /// Positive errno.
        errno: i32,
    },
    /// The device does not do this.
    #[error("{0}: Operation not supported")]
    Unsupported(String),
    /// The device answered with an I/O error.
    #[error("{what}: {status}")]
    Io {
        /// What was tried, and on what.
        what: String,
        /// The verdict.
        status: crate::Status,
    },
}

impl BdevError {
    /// The negative errno that SPDK's clients expect for this.
    pub fn code(&self) -> i32 {
        match self {
            BdevError::NotFound(_) | BdevError::Removing(_) => -19,
            BdevError::Exists(_) => -17,
            BdevError::Claimed { .. } => -16,
            BdevError::Invalid(_) => -32602,
            BdevError::NoResources(_) => -12,
            BdevError::Os { errno, .. } => -errno,
            BdevError::Unsupported(_) => -95,
            BdevError::Io { .. } => -5,
        }
    }

    /// What a failed call to the operating system means; `err` is its `errno`.
    pub fn os(what: impl Into<String>, err: &std::io::Error) -> BdevError {
        BdevError::Os { what: what.into(), reason: err.to_string(), errno: err.raw_os_error().unwrap_or(5) }
    }
}
