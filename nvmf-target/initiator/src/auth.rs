//! In-band authentication of a queue (DH-HMAC-CHAP), this host's side.

use std::sync::atomic::{AtomicU16, Ordering};

use cryptfold_nvmf_auth::{Concat, Entropy, Host, HostNext, Names, Offer, Psk, Secret, TlsPsk, Version};
use cryptfold_nvmf_spec::fabrics::Authentication;
use cryptfold_nvmf_spec::{Cid, Sqe};
use cryptfold_reactor as reactor;
use cryptfold_reactor::memory::Buf;

use crate::conn::{Conn, Payload};
use crate::{ConnectOptions, Error};

/// Room for a message of the controller, bytes.
const RECEIVE_BYTES: u32 = 4096;

/// What this host proves itself with.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// This host's secret.
    pub secret: Secret,
    /// The controller's secret: it has to prove itself too.
    pub controller: Option<Secret>,
    /// Hash functions and groups, by preference.
    pub offer: Offer,
}

/// What this host connects with TLS by.
#[derive(Clone, Debug)]
pub struct TlsKey {
    /// The configured key.
    pub psk: Psk,
    /// How identity and key are derived from it.
    pub version: Version,
}

/// Runs one transaction on a queue. Returns the key for TLS that it has generated, if it was to.
pub(crate) async fn authenticate(
    conn: &Conn,
    options: &ConnectOptions,
    credentials: &Credentials,
    concat: Concat,
) -> Result<Option<TlsPsk>, Error> {
    match reactor::timeout(options.connect_timeout, transaction(conn, options, credentials, concat)).await {
        Ok(result) => result,
        Err(_) => Err(Error::Timeout {
            address: conn.label().to_owned(),
            what: "authentication",
            seconds: options.connect_timeout.as_secs(),
        }),
    }
}

async fn transaction(
    conn: &Conn,
    options: &ConnectOptions,
    c: &Credentials,
    concat: Concat,
) -> Result<Option<TlsPsk>, Error> {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let names = Names { host: options.hostnqn.clone(), subsystem: options.subnqn.clone() };
    let t_id = NEXT.fetch_add(1, Ordering::Relaxed);
    let (mut host, negotiate) =
        Host::start(names, c.secret.clone(), c.controller.clone(), c.offer.clone(), concat, t_id);
    send(conn, &negotiate).await?;
    loop {
        let message = receive(conn).await?;
        match host.receive(&message, &Entropy::draw(reactor::fill_random)) {
            HostNext::Send(m) => send(conn, &m).await?,
            HostNext::Finish(m) => {
                send(conn, &m).await?;
                return Ok(host.take_key());
            }
            HostNext::Done => return Ok(host.take_key()),
            HostNext::Failed(why, message) => {
                let who = if message.is_some() { "the target failed" } else { "the target refused" };
                if let Some(m) = message {
                    // Whether it hears of it or not, this is over.
                    let _ = send(conn, &m).await;
                }
                return Err(Error::Unsupported {
                    what: "authentication",
                    why: format!("{who}: {}", why.name()),
                });
            }
        }
    }
}

async fn send(conn: &Conn, message: &[u8]) -> Result<(), Error> {
    let sqe = Sqe::from_view(&Authentication::send(Cid(0), message.len() as u32));
    let reply = conn.call(sqe, Payload::Out(Buf::from_slice(message).into()), true).await?;
    answered(conn, "Authentication Send", reply.cqe.status())
}

async fn receive(conn: &Conn) -> Result<Vec<u8>, Error> {
    let sqe = Sqe::from_view(&Authentication::receive(Cid(0), RECEIVE_BYTES));
    let reply = conn.call(sqe, Payload::In(RECEIVE_BYTES), true).await?;
    answered(conn, "Authentication Receive", reply.cqe.status())?;
    Ok(reply.data.to_contiguous().to_vec())
}

fn answered(conn: &Conn, what: &str, status: cryptfold_nvmf_spec::Status) -> Result<(), Error> {
    if status.is_success() {
        return Ok(());
    }
    Err(Error::Status { what: format!("{}: {what}", conn.label()), status })
}
