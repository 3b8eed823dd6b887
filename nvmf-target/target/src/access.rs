//! What a host has to prove, and the thread that does the slow part of proving.
//!
//! An exponentiation of DH-HMAC-CHAP takes up to 10 ms, too long for a reactor: one ordinary thread does them, one after
//! the other, so that a flood of authentications costs one core at most.

use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use cryptfold_nvmf_auth::{Psk, Secret};

/// A key and the name under which a configuration refers to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named<T> {
    /// Its name.
    pub name: String,
    /// The key.
    pub key: T,
}

/// What a host of a subsystem's list has to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostAccess {
    /// DH-HMAC-CHAP: the host's secret. With it, the host has to authenticate on every queue.
    pub dhchap: Option<Named<Secret>>,
    /// DH-HMAC-CHAP: the controller's own secret, for hosts that ask who it is.
    pub dhchap_ctrlr: Option<Named<Secret>>,
    /// TLS: the host's key. With it, the host can connect at listeners with TLS, and only there.
    pub psk: Option<Named<Psk>>,
}

type Job = Box<dyn FnOnce() + Send>;

/// Runs `job` on the thread for slow work; gives it back if there can be no such thread.
pub(crate) fn off_reactor(job: Job) -> Result<(), Job> {
    static WORKER: OnceLock<Option<Sender<Job>>> = OnceLock::new();
    let worker = WORKER.get_or_init(|| {
        let (jobs, queue) = channel::<Job>();
        let run = move || queue.into_iter().for_each(|job| job());
        let thread = std::thread::Builder::new().name("nvmf_auth".into()).spawn(run);
        thread.map(|_| jobs).inspect_err(|e| tracing::warn!("no thread for authentication: {e}")).ok()
    });
    match worker {
        Some(jobs) => jobs.send(job).map_err(|e| e.0),
        None => Err(job),
    }
}
