//! What the subcommands that talk NVMe/TCP share: how a namespace is named, and the association with its controller.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cryptfold_nvmf_initiator::{
    ConnectOptions, Connector, Controller, Credentials, NamespaceInfo, Offer, Psk, Secret, TlsKey, Version,
};
use cryptfold_nvmf_spec::Nsid;
use cryptfold_reactor::{Handle, Runtime, RuntimeConfig};

use zeroize::Zeroizing;

use crate::load::Cores;

/// Where a namespace is.
#[derive(clap::Args, Clone, Debug)]
pub struct Namespace {
    /// Target's address
    #[arg(long)]
    pub traddr: String,
    /// Target's port
    #[arg(long, default_value = "4420")]
    pub trsvcid: String,
    /// Subsystem
    #[arg(long)]
    pub subnqn: String,
    /// Namespace
    #[arg(long, default_value_t = 1)]
    pub nsid: u32,
    /// This host's name [default: drawn at random]
    #[arg(long)]
    pub hostnqn: Option<String>,
    /// Header digests
    #[arg(long)]
    pub hdgst: bool,
    /// Data digests
    #[arg(long)]
    pub ddgst: bool,
    /// TLS, by the key in this file (NVMeTLSkey-1:...)
    #[arg(long, requires = "hostnqn")]
    pub psk: Option<PathBuf>,
    /// Version of the TLS identity: 1, or 0 for older targets
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    pub psk_version: u8,
    /// Authenticate with the secret in this file (DHHC-1:...)
    #[arg(long, requires = "hostnqn")]
    pub dhchap_key: Option<PathBuf>,
    /// Secure channel concatenation: TLS, by a key that authentication generates
    #[arg(long, requires = "dhchap_key", conflicts_with = "psk")]
    pub concat: bool,
    /// TLS records are made and opened by the kernel, where it has its tls module
    #[arg(long)]
    pub ktls: bool,
    /// Keep Alive timeout, ms; 0 = none
    #[arg(long, default_value_t = 15_000)]
    pub kato: u32,
    /// Seconds after which a command that is not answered ends the run
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub io_timeout: u64,
}

impl Namespace {
    /// The first namespace of a subsystem, without keys and digests.
    pub(crate) fn at(traddr: &str, trsvcid: &str, subnqn: &str) -> Namespace {
        Namespace {
            traddr: traddr.into(),
            trsvcid: trsvcid.into(),
            subnqn: subnqn.into(),
            nsid: 1,
            hostnqn: None,
            hdgst: false,
            ddgst: false,
            psk: None,
            psk_version: 1,
            dhchap_key: None,
            concat: false,
            ktls: false,
            kato: 15_000,
            io_timeout: 600,
        }
    }
}

thread_local! {
    /// Lives on the reactor that connected it.
    static CONTROLLER: RefCell<Option<Controller>> = const { RefCell::new(None) };
}

/// An association, for as long as this lives.
pub struct Session {
    handle: Handle,
    /// Opens I/O queues, on any reactor.
    pub connector: Arc<Connector>,
    /// The namespace.
    pub info: NamespaceInfo,
}

impl Session {
    /// Connects on this reactor. `queues`: I/O queues that will be opened; `depth`: commands under way in each.
    ///
    /// # Errors
    /// What failed, in one line.
    pub fn open(handle: &Handle, ns: &Namespace, queues: u32, depth: u32) -> Result<Session, String> {
        let mut options = ConnectOptions::new(&ns.traddr, &ns.trsvcid, &ns.subnqn);
        if let Some(hostnqn) = &ns.hostnqn {
            options.hostnqn.clone_from(hostnqn);
        }
        options.io_queues = u16::try_from(queues).map_err(|_| format!("{queues} I/O queues are too many"))?;
        // One entry of a queue always stays empty.
        options.queue_size = (depth + 1).clamp(2, 4096) as u16;
        (options.hdgst, options.ddgst) = (ns.hdgst, ns.ddgst);
        options.kato_ms = ns.kato;
        options.tls = ns.psk.as_deref().map(|file| tls_key(file, ns.psk_version)).transpose()?;
        options.credentials = ns.dhchap_key.as_deref().map(credentials).transpose()?;
        options.concat = ns.concat;
        options.kernel_tls = ns.ktls;
        options.io_timeout = Duration::from_secs(ns.io_timeout);
        let nsid = Nsid(ns.nsid);
        let connected = handle.block_on(move || async move {
            let controller = Controller::connect(&options).await?;
            let info = controller.namespace(nsid).await?;
            let connector = controller.connector().clone();
            CONTROLLER.set(Some(controller));
            Ok((connector, info))
        });
        let connected = connected.map_err(|e| e.to_string())?;
        let (connector, info) = connected.map_err(|e: cryptfold_nvmf_initiator::Error| e.to_string())?;
        if u32::from(connector.queues()) < queues {
            let n = connector.queues();
            return Err(format!("{} grants {n} I/O queues, {queues} are needed", ns.subnqn));
        }
        Ok(Session { handle: handle.clone(), connector, info })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // A reactor that has stopped has dropped its controller itself.
        let _ = self.handle.block_on(|| async {
            if let Some(controller) = CONTROLLER.take() {
                controller.shutdown().await;
            }
        });
    }
}

/// A key in a file.
fn key<T, E: std::fmt::Display>(file: &Path, parse: fn(&str) -> Result<T, E>) -> Result<T, String> {
    let said = |e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
    let text = Zeroizing::new(std::fs::read_to_string(file).map_err(|e| said(&e))?);
    parse(&text).map_err(|e| said(&e))
}

fn credentials(file: &Path) -> Result<Credentials, String> {
    Ok(Credentials { secret: key(file, Secret::parse)?, controller: None, offer: Offer::default() })
}

fn tls_key(file: &Path, version: u8) -> Result<TlsKey, String> {
    let psk = key(file, Psk::parse)?;
    Ok(TlsKey { psk, version: if version == 0 { Version::V0 } else { Version::V1 } })
}

/// Starts a reactor on each of these CPUs.
///
/// # Errors
/// What the machine does not have.
pub fn start(cores: &Cores) -> Result<Runtime, String> {
    let config = RuntimeConfig { cores: cores.0.clone(), ..RuntimeConfig::default() };
    Runtime::start(config).map_err(|e| e.to_string())
}
