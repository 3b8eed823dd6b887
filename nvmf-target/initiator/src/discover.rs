//! Asking a discovery controller what there is.

use cryptfold_nvmf_spec as spec;
use spec::log::{DiscoveryEntry, DiscoveryHeader, Lid, SubsystemType, TransportType, sectype, treq};
use spec::nqn;
use zerocopy::FromBytes;

use crate::{ConnectOptions, Controller, Error};

/// Entries that are read at most.
const MAX_ENTRIES: u64 = 4096;
/// Entries per command.
const BATCH: u64 = 32;
/// The page may change while it is read; so often it is read again.
const ATTEMPTS: usize = 5;

/// An entry of the discovery log page that this initiator can use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveredSubsystem {
    /// The subsystem.
    pub subnqn: String,
    /// Its address.
    pub traddr: String,
    /// Its port.
    pub trsvcid: String,
    /// Port of the subsystem.
    pub portid: u16,
    /// It leads to another discovery service.
    pub referral: bool,
    /// It takes TLS only.
    pub secure: bool,
    /// It takes secure channel concatenation: no TLS first, TLS afterwards.
    pub concat: bool,
}

/// The TCP subsystems that the discovery controller at this address reports. Of `options`, the subsystem does not count.
///
/// # Errors
/// With the step that failed.
pub async fn discover(options: &ConnectOptions) -> Result<Vec<DiscoveredSubsystem>, Error> {
    // A discovery controller is asked and left: no Keep Alive.
    let options = ConnectOptions {
        subnqn: nqn::DISCOVERY.into(),
        io_queues: 0,
        kato_ms: 0,
        credentials: None,
        concat: false,
        ..options.clone()
    };
    let controller = Controller::connect(&options).await?;
    let mut found = Err(Error::Unsupported {
        what: "discovery log page",
        why: format!("it changed {ATTEMPTS} times while it was read"),
    });
    for _ in 0..ATTEMPTS {
        if let Some(entries) = read_page(&controller).await? {
            found = Ok(entries);
            break;
        }
    }
    controller.shutdown().await;
    found
}

/// `None`: the page changed meanwhile.
async fn read_page(controller: &Controller) -> Result<Option<Vec<DiscoveredSubsystem>>, Error> {
    let header = read_header(controller).await?;
    let count = header.numrec.get();
    if count > MAX_ENTRIES {
        let why = format!("{count} entries; {MAX_ENTRIES} are possible");
        return Err(Error::Unsupported { what: "discovery log page", why });
    }
    let mut found = Vec::new();
    let mut at = 0;
    while at < count {
        let n = BATCH.min(count - at);
        let size = size_of::<DiscoveryEntry>() as u64;
        let bytes = controller
            .log_page(Lid::Discovery, 0, size_of::<DiscoveryHeader>() as u64 + at * size, n * size)
            .await?;
        for entry in bytes.chunks_exact(size_of::<DiscoveryEntry>()) {
            found.extend(DiscoveryEntry::read_from_bytes(entry).ok().as_ref().and_then(usable));
        }
        at += n;
    }
    let same = read_header(controller).await?.genctr == header.genctr;
    Ok(same.then_some(found))
}

async fn read_header(controller: &Controller) -> Result<DiscoveryHeader, Error> {
    let bytes = controller.log_page(Lid::Discovery, 0, 0, size_of::<DiscoveryHeader>() as u64).await?;
    DiscoveryHeader::read_from_bytes(&bytes).map_err(|_| Error::Unsupported {
        what: "discovery log page",
        why: format!("a header of {} bytes", bytes.len()),
    })
}

fn usable(entry: &DiscoveryEntry) -> Option<DiscoveredSubsystem> {
    if entry.trtype != TransportType::Tcp as u8 || entry.subtype == SubsystemType::CurrentDiscovery as u8 {
        return None;
    }
    Some(DiscoveredSubsystem {
        subnqn: nqn::field_text(&entry.subnqn).ok()?.to_owned(),
        traddr: entry.traddr()?.to_owned(),
        trsvcid: entry.trsvcid()?.to_owned(),
        portid: entry.portid.get(),
        referral: entry.subtype == SubsystemType::Referral as u8,
        secure: entry.treq & 3 == treq::SECURE_REQUIRED && entry.tsas[0] == sectype::TLS13,
        concat: entry.treq & 3 == treq::SECURE_NOT_REQUIRED && entry.tsas[0] == sectype::TLS13,
    })
}
