//! How to connect.

use std::net::IpAddr;
use std::time::Duration;

use cryptfold_nvmf_auth::{Concat, Names, TlsPsk};
use cryptfold_nvmf_spec::nqn::Nqn;
use cryptfold_reactor as reactor;
use uuid::{Builder, Uuid};

use crate::{Credentials, Error, TlsKey};

/// Largest number of entries of a queue that can be asked for.
pub(crate) const MAX_QUEUE_SIZE: u16 = 4096;

/// How to connect to a subsystem.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Target's address: an IP address or a host name.
    pub traddr: String,
    /// Target's service: a port.
    pub trsvcid: String,
    /// The address of this host that connections come from; `None`: the system chooses.
    pub hostaddr: Option<IpAddr>,
    /// The subsystem.
    pub subnqn: String,
    /// This host's name.
    pub hostnqn: String,
    /// This host's identifier; not zero.
    pub hostid: [u8; 16],
    /// I/O queues that will be opened at most; the target may grant fewer.
    pub io_queues: u16,
    /// Entries of an I/O queue, 2 to 4096; one less can be under way. The target may allow fewer.
    pub queue_size: u16,
    /// Ask for header digests.
    pub hdgst: bool,
    /// Ask for data digests.
    pub ddgst: bool,
    /// Keep Alive timeout, milliseconds; 0 = none.
    pub kato_ms: u32,
    /// Limit for each step of setting up a connection.
    pub connect_timeout: Duration,
    /// A command that takes longer ends its connection.
    pub io_timeout: Duration,
    /// What to authenticate with where the target asks for it, or where it has to prove itself.
    pub credentials: Option<Credentials>,
    /// Connect with TLS, by this key.
    pub tls: Option<TlsKey>,
    /// Leave the records of TLS to the kernel, where it takes them.
    pub kernel_tls: bool,
    /// Secure channel concatenation: authenticate without TLS, and come back with TLS by the key that this has generated. With
    /// credentials, and no key for TLS.
    pub concat: bool,
}

impl ConnectOptions {
    /// Defaults for everything but the address: one I/O queue of 128 entries, no digests, Keep Alive of 15 s, time-outs of
    /// 10 s and 30 s, a host name and identifier drawn at random.
    pub fn new(
        traddr: impl Into<String>,
        trsvcid: impl Into<String>,
        subnqn: impl Into<String>,
    ) -> ConnectOptions {
        let host = random_uuid();
        ConnectOptions {
            traddr: traddr.into(),
            trsvcid: trsvcid.into(),
            hostaddr: None,
            subnqn: subnqn.into(),
            hostnqn: format!("{}{host}", cryptfold_nvmf_spec::nqn::UUID_PREFIX),
            hostid: *host.as_bytes(),
            io_queues: 1,
            queue_size: 128,
            hdgst: false,
            ddgst: false,
            kato_ms: 15_000,
            connect_timeout: Duration::from_secs(10),
            io_timeout: Duration::from_secs(30),
            credentials: None,
            tls: None,
            kernel_tls: false,
            concat: false,
        }
    }

    /// Host and port, for people.
    pub fn address(&self) -> String {
        if self.traddr.contains(':') {
            format!("[{}]:{}", self.traddr, self.trsvcid)
        } else {
            format!("{}:{}", self.traddr, self.trsvcid)
        }
    }

    /// Identity and key for TLS with this subsystem; `None` without TLS, or where they can not be derived.
    pub(crate) fn tls_psk(&self) -> Option<TlsPsk> {
        let names = Names { host: self.hostnqn.clone(), subsystem: self.subnqn.clone() };
        let tls = self.tls.as_ref()?;
        tls.psk.tls(&names, tls.version)
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let bad = |option, why: String| Err(Error::Option { option, why });
        for (option, nqn) in [("subnqn", &self.subnqn), ("hostnqn", &self.hostnqn)] {
            if let Err(e) = Nqn::parse(nqn) {
                return bad(option, format!("\"{nqn}\": {e}"));
            }
        }
        if self.hostid == [0; 16] {
            return bad("hostid", "must not be zero".into());
        }
        if self.trsvcid.parse::<u16>().is_err() {
            return bad("trsvcid", format!("\"{}\" is no port (0 to 65535)", self.trsvcid));
        }
        if !(2..=MAX_QUEUE_SIZE).contains(&self.queue_size) {
            return bad("queue_size", format!("{}: 2 to {MAX_QUEUE_SIZE} is possible", self.queue_size));
        }
        if self.io_queues == u16::MAX {
            return bad("io_queues", "65534 at most".into());
        }
        if self.tls.is_some() && self.tls_psk().is_none() {
            return bad(
                "tls",
                "hostnqn and subnqn are too long for version 0, or the version does not fit the key".into(),
            );
        }
        if self.concat {
            let offer = self.credentials.as_ref().map(|c| c.offer.clone().with(Concat::New));
            if self.tls.is_some() || offer.is_none_or(|o| o.hashes.is_empty() || o.groups.is_empty()) {
                let needs = "credentials with SHA-256 or SHA-384 and a Diffie-Hellman group are needed, and no key for TLS";
                return bad("concat", needs.into());
            }
        }
        if self.io_timeout.is_zero() || self.connect_timeout.is_zero() {
            return bad("timeout", "must not be zero".into());
        }
        Ok(())
    }
}

fn random_uuid() -> Uuid {
    let mut bytes = [0; 16];
    reactor::fill_random(&mut bytes);
    Builder::from_random_bytes(bytes).into_uuid()
}
