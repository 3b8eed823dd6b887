//! What can be wrong with a request to the target. Wire errors are NVMe statuses.

use cryptfold_bdev::BdevError;
use cryptfold_nvmf_spec::nqn::NqnError;
use thiserror::Error;

/// A refused control request.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum TargetError {
    /// The transport was created before.
    #[error("Transport type '{0}' already exists")]
    TransportExists(&'static str),
    /// No such kind of transport here, or not created yet.
    #[error("Transport type '{0}' not found; create it with nvmf_create_transport (TCP is available)")]
    NoTransport(String),
    /// The name is not an NQN.
    #[error("Invalid parameters: \"{nqn}\" is no NQN: {reason}")]
    Nqn {
        /// As given.
        nqn: String,
        /// What is wrong with it.
        reason: NqnError,
    },
    /// A parameter that can not be used.
    #[error("Invalid parameters: {0}: {1}")]
    Invalid(&'static str, String),
    /// A subsystem of this name exists.
    #[error("Subsystem {0} already exists")]
    SubsystemExists(String),
    /// No subsystem of this name.
    #[error("Subsystem {0} not found")]
    NoSubsystem(String),
    /// The limit on subsystems is reached.
    #[error("No more than {0} subsystems: raise it with nvmf_set_max_subsystems")]
    TooManySubsystems(u32),
    /// The namespace identifier is taken.
    #[error("Namespace {nsid} already exists in {nqn}")]
    NsidInUse {
        /// The subsystem.
        nqn: String,
        /// The identifier.
        nsid: u32,
    },
    /// No namespace of this identifier.
    #[error("Namespace {nsid} not found in {nqn}")]
    NoNamespace {
        /// The subsystem.
        nqn: String,
        /// The identifier.
        nsid: u32,
    },
    /// Every host sees the namespace: there is no list.
    #[error(
        "Invalid parameters: namespace {nsid} of {nqn} is visible to every host: add it with no_auto_visible"
    )]
    AutoVisible {
        /// The subsystem.
        nqn: String,
        /// The identifier.
        nsid: u32,
    },
    /// All identifiers of the subsystem are taken.
    #[error("{nqn} has all of its {max} namespaces: create it with a larger max_namespaces")]
    TooManyNamespaces {
        /// The subsystem.
        nqn: String,
        /// Its limit.
        max: u32,
    },
    /// The subsystem listens there already.
    #[error("Listener {addr} already exists in {nqn}")]
    ListenerExists {
        /// The subsystem.
        nqn: String,
        /// Address and port.
        addr: String,
    },
    /// The subsystem does not listen there.
    #[error("Listener {addr} not found in {nqn}")]
    NoListener {
        /// The subsystem.
        nqn: String,
        /// Address and port.
        addr: String,
    },
    /// The host is allowed already.
    #[error("Host {host} already exists in {nqn}")]
    HostExists {
        /// The subsystem.
        nqn: String,
        /// The host's NQN.
        host: String,
    },
    /// The host is not in the list.
    #[error("Host {host} not found in {nqn}")]
    NoHost {
        /// The subsystem.
        nqn: String,
        /// The host's NQN.
        host: String,
    },
    /// The referral is there already.
    #[error("Referral {0} already exists")]
    ReferralExists(String),
    /// No such referral.
    #[error("Referral {0} not found")]
    NoReferral(String),
    /// Not possible any more.
    #[error("{0}")]
    WrongState(&'static str),
    /// About the device.
    #[error(transparent)]
    Bdev(#[from] BdevError),
    /// The operating system refused.
    #[error("{what}: {reason}")]
    Os {
        /// What was tried.
        what: String,
        /// Its answer, with a way out.
        reason: String,
        /// Positive errno.
        errno: i32,
    },
    /// Connections did not end in time.
    #[error("{0} still has connections or I/O after {1} s: Device or resource busy")]
    Busy(String, u64),
    /// The reactors have stopped.
    #[error("the target has stopped")]
    Stopped,
}

impl TargetError {
    /// The JSON-RPC error code that SPDK's clients expect.
    pub fn code(&self) -> i32 {
        match self {
            TargetError::Bdev(e) => e.code(),
            TargetError::TransportExists(_) | TargetError::Stopped => -32603,
            TargetError::Os { .. } | TargetError::WrongState(_) => -32603,
            TargetError::Busy(..) => -16,
            _ => -32602,
        }
    }

    pub(crate) fn os(what: impl Into<String>, err: &std::io::Error, hint: &str) -> TargetError {
        let reason = if hint.is_empty() { err.to_string() } else { format!("{err}; {hint}") };
        TargetError::Os { what: what.into(), reason, errno: err.raw_os_error().unwrap_or(5) }
    }
}
