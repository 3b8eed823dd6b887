//! What can go wrong, with the facts a person needs.

use std::io;

use cryptfold_nvmf_spec as spec;
use spec::pdu::{Fes, PduError};

/// Why a connection ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// This end closed it.
    #[error("closed by this host")]
    Local,
    /// The other end closed it between two PDUs.
    #[error("closed by the target")]
    Eof,
    /// The other end closed it amid a PDU.
    #[error("closed by the target amid a PDU")]
    Truncated,
    /// The socket failed.
    #[error("{0}")]
    Socket(String),
    /// The target violated the protocol.
    #[error("protocol violation by the target: {0}")]
    Protocol(PduError),
    /// The target answered what nobody asked, or beyond what was asked.
    #[error("protocol violation by the target: {0}")]
    Answer(&'static str),
    /// The target accuses this host of a violation.
    #[error("the target ended the connection: {} (FES {fes:#04x}, FEI {fei:#x})", fes_text(*fes))]
    Terminated {
        /// Fatal Error Status.
        fes: u16,
        /// Fatal Error Information.
        fei: u32,
    },
    /// A command was not answered in time.
    #[error("no answer to a command within {0} s")]
    Timeout(u64),
}

impl CloseReason {
    pub(crate) fn socket(e: &io::Error) -> CloseReason {
        CloseReason::Socket(e.to_string())
    }
}

fn fes_text(fes: u16) -> &'static str {
    match Fes::from_u16(fes) {
        Some(Fes::InvalidHeaderField) => "invalid PDU header field",
        Some(Fes::SequenceError) => "PDU sequence error",
        Some(Fes::HeaderDigest) => "header digest error",
        Some(Fes::OutOfRange) => "data transfer out of range",
        Some(Fes::LimitExceeded) => "data transfer limit exceeded",
        Some(Fes::UnsupportedParameter) => "unsupported parameter",
        None => "unknown error",
    }
}

/// A failed connection, command or option.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An option can not be used.
    #[error("{option}: {why}")]
    Option {
        /// Its name.
        option: &'static str,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// The address has no meaning.
    #[error("{address}: can not be resolved: {why}")]
    Resolve {
        /// Host and port.
        address: String,
        /// The system's answer.
        why: String,
    },
    /// Nobody answers there.
    #[error("{address}: can not connect: {why}")]
    Connect {
        /// Host and port.
        address: String,
        /// The system's answer.
        why: String,
    },
    /// The connection ended.
    #[error("{address}: {reason}")]
    Closed {
        /// Host and port, queue.
        address: String,
        /// Why.
        reason: CloseReason,
    },
    /// Set-up took too long.
    #[error("{address}: no answer to {what} within {seconds} s")]
    Timeout {
        /// Host and port, queue.
        address: String,
        /// What was asked.
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// A command failed.
    #[error("{what}: {status}")]
    Status {
        /// The command.
        what: String,
        /// Its status.
        status: spec::Status,
    },
    /// The target does not do what is needed, or says what makes no sense.
    #[error("{what}: {why}")]
    Unsupported {
        /// What of the target.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
}
