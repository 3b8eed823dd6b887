//! Secure channel concatenation: keys for TLS that DH-HMAC-CHAP generates, by hosts that do it right and wrong.

mod common;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, Ordering};

use common::{Client, DISCOVERY, HOST, NQN, Rig, auth_receive, auth_send, pattern, wait};
use cryptfold_nvmf_auth::{
    Concat, DhGroup, Entropy, Failure, HashId, Host, HostNext, Names, Offer, Secret, TlsPsk,
};
use cryptfold_nvmf_spec::auth;
use cryptfold_nvmf_spec::fabrics::ConnectResult;
use cryptfold_nvmf_spec::identify::Cns;
use cryptfold_nvmf_spec::opcode::Admin;
use cryptfold_nvmf_spec::{Cntlid, Status};
use cryptfold_nvmf_target::{HostAccess, ListenAddr, Named, PortSecurity, TransportOptions};
use cryptfold_reactor::{IdlePolicy, SecretBytes};

const OTHER: &str = "nqn.2024-01.io.cryptfold:other-host";

fn secret(byte: u8) -> Secret {
    Secret::new(&[byte; 32], None).expect("32 bytes")
}

fn port(rig: &Rig, security: PortSecurity) -> SocketAddr {
    let any = ListenAddr::parse("TCP", Some("IPv4"), "127.0.0.1", "0").expect("an address");
    rig.target.add_secure_listener(NQN, &any, security).expect("a free port").socket_addr()
}

/// No deadline that a starved machine could miss.
fn patient() -> TransportOptions {
    TransportOptions { connect_timeout_ms: 300_000, auth_timeout_ms: 300_000, ..Default::default() }
}

/// HOST has secret 7 and asks for the controller's, 9; OTHER has secret 8. Returns the port for concatenation.
fn rig(options: TransportOptions) -> (Rig, SocketAddr) {
    let rig = Rig::with(2, IdlePolicy::Interrupt, options);
    let named = |byte| Some(Named { name: format!("k{byte}"), key: secret(byte) });
    for (host, key) in [(HOST, 7), (OTHER, 8)] {
        let access = HostAccess { dhchap: named(key), dhchap_ctrlr: named(9), ..Default::default() };
        rig.target.add_host(NQN, host, access).expect("a name");
    }
    let port = port(&rig, PortSecurity::Concatenation);
    (rig, port)
}

fn connect(c: &mut Client, qid: u16, cntlid: Cntlid) -> Status {
    c.connect(NQN, qid, 32, cntlid).status().code()
}

/// An admin queue without TLS, which has to authenticate and to concatenate.
fn plain(port: SocketAddr, host: &str) -> Client {
    let mut c = Client::open(port, false, false);
    c.hostnqn = host.into();
    let cqe = c.connect(NQN, 0, 32, Cntlid::DYNAMIC);
    let result = ConnectResult(cqe.dw0.get());
    assert_eq!((cqe.status(), result.atr(), result.ascr()), (Status::SUCCESS, 1, 1));
    c.cntlid = Cntlid(result.cntlid() as u16);
    c
}

/// A transaction to its end, as whoever has this secret.
fn prove(c: &mut Client, byte: u8, concat: Concat) -> Result<Option<TlsPsk>, Failure> {
    static FRESH: AtomicU8 = AtomicU8::new(1);
    let names = Names { host: c.hostnqn.clone(), subsystem: NQN.into() };
    let offer = Offer { hashes: vec![HashId::Sha384], groups: vec![DhGroup::Ffdhe2048] };
    let asks = (c.hostnqn == HOST).then(|| secret(9));
    let (mut host, mut message) = Host::start(names, secret(byte), asks, offer, concat, 3);
    loop {
        assert_eq!(auth_send(c, &message), Status::SUCCESS);
        let entropy = Entropy::draw(|bytes| bytes.fill(FRESH.fetch_add(1, Ordering::Relaxed)));
        match host.receive(&auth_receive(c, 4096).1, &entropy) {
            HostNext::Send(next) => message = next,
            HostNext::Finish(last) => {
                assert_eq!(auth_send(c, &last), Status::SUCCESS);
                return Ok(host.take_key());
            }
            HostNext::Done => return Ok(host.take_key()),
            HostNext::Failed(why, _) => return Err(why),
        }
    }
}

fn new_key(c: &mut Client, byte: u8) -> TlsPsk {
    prove(c, byte, Concat::New).expect("the right secret").expect("a key")
}

fn secure(port: SocketAddr, key: &TlsPsk) -> Client {
    Client::secure(port, key).expect("the key is known")
}

/// The handshake does not come to its end.
fn unknown(port: SocketAddr, key: &TlsPsk) {
    assert!(Client::secure(port, key).is_err(), "a key that is not known");
}

#[test]
fn a_key_opens_one_association_and_ends_with_it() {
    let (rig, port) = rig(patient());
    for (host, byte) in [(HOST, 7), (OTHER, 8)] {
        let mut first = plain(port, host);
        let key = new_key(&mut first, byte);
        // What hosts do before they come back; nothing that changes something, and no I/O.
        first.enable();
        let identify = first.admin_in(Admin::Identify, 0, Cns::Controller as u32, 4096);
        assert_eq!(identify.0.status(), Status::SUCCESS);
        let refused = first.feature(Admin::SetFeatures, 7, 0x0001_0001).status().code();
        assert_eq!(refused, Status::AUTHENTICATION_REQUIRED);
        let io = |mut c: Client, qid, cntlid| {
            c.hostnqn = host.into();
            let status = connect(&mut c, qid, cntlid);
            (c, status)
        };
        assert_eq!(io(Client::open(port, false, false), 1, first.cntlid).1, Status::CONNECT_INVALID_HOST);
        drop(first);

        let mut admin = secure(port, &key);
        admin.hostnqn = host.into();
        let cqe = admin.connect(NQN, 0, 32, Cntlid::DYNAMIC);
        let result = ConnectResult(cqe.dw0.get());
        assert_eq!((cqe.status(), result.atr(), result.ascr()), (Status::SUCCESS, 0, 0), "the key proves it");
        admin.cntlid = Cntlid(result.cntlid() as u16);
        admin.enable();
        let (mut first_io, status) = io(secure(port, &key), 1, admin.cntlid);
        assert_eq!(status, Status::SUCCESS);
        assert_eq!(first_io.write(0, &pattern(0, 8, byte)), Status::SUCCESS);
        assert_eq!(first_io.read(0, 8), (Status::SUCCESS, pattern(0, 8, byte)));
        let cipher = "TLS_AES_256_GCM_SHA384";
        let of = |q: &cryptfold_nvmf_target::QpairInfo| q.cntlid == admin.cntlid.0 && q.hostnqn == host;
        let queues = rig.target.qpairs(NQN).expect("it exists");
        assert!(queues.iter().filter(|q| of(q)).all(|q| q.tls.as_ref().is_some_and(|t| t.cipher == cipher)));

        // The same association without TLS, here and where there is none.
        for addr in [port, rig.addr] {
            let (_, status) = io(Client::open(addr, false, false), 2, admin.cntlid);
            assert_eq!(status, Status::CONNECT_INVALID_HOST);
        }
        // Another association, another host.
        assert_eq!(io(secure(port, &key), 0, Cntlid::DYNAMIC).1, Status::CONNECT_INVALID_HOST);
        let mut mallory = secure(port, &key);
        mallory.hostnqn = if host == HOST { OTHER.into() } else { HOST.into() };
        assert_eq!(connect(&mut mallory, 0, Cntlid::DYNAMIC), Status::CONNECT_INVALID_HOST);
        let renamed =
            TlsPsk { identity: key.identity.replace(&admin.hostnqn, &mallory.hostnqn), ..key.clone() };
        unknown(port, &renamed);

        // Another key takes its place, for queues from then on.
        let next = prove(&mut admin, byte, Concat::Replace).expect("the right secret").expect("a key");
        assert_ne!(next, key);
        unknown(port, &key);
        let (mut second_io, status) = io(secure(port, &next), 2, admin.cntlid);
        assert_eq!(status, Status::SUCCESS);
        for queue in [&mut first_io, &mut second_io] {
            assert_eq!(queue.read(0, 8), (Status::SUCCESS, pattern(0, 8, byte)));
        }
        assert_eq!(prove(&mut admin, byte, Concat::None), Ok(None), "without another key");
        assert_eq!(prove(&mut first_io, byte, Concat::None), Ok(None));
        assert_eq!(prove(&mut first_io, byte, Concat::Replace), Err(Failure::Concatenation), "an I/O queue");
        assert_eq!(rig.target.generated_keys(), 1);
        drop(admin);
        wait(|| rig.target.generated_keys() == 0);
        unknown(port, &next);
    }
    rig.wait_empty();
}

#[test]
fn whoever_does_it_wrong_gets_no_key() {
    let (rig, port) = rig(patient());
    let refused = |byte, concat, why| {
        let mut c = plain(port, OTHER);
        assert_eq!(prove(&mut c, byte, concat), Err(why));
        assert_eq!(c.recv(), common::Pdu::Closed);
    };
    refused(6, Concat::New, Failure::Failed);
    refused(8, Concat::None, Failure::Concatenation);
    refused(8, Concat::Replace, Failure::Concatenation);
    // Without a Diffie-Hellman value there is nothing to make a key of; TLS has no SHA-512.
    for (hash, group, why) in [
        (HashId::Sha256, DhGroup::Null, Failure::DhGroup),
        (HashId::Sha512, DhGroup::Ffdhe2048, Failure::Hash),
    ] {
        let mut c = plain(port, OTHER);
        assert_eq!(auth_send(&mut c, &auth::negotiate(3, Concat::New, &[hash], &[group])), Status::SUCCESS);
        assert!(auth_receive(&mut c, 64).1.starts_with(&auth::failure(false, 3, why)));
    }
    // Where any host may connect, whoever has no secret stays out nevertheless.
    let mut nobody = Client::open(port, false, false);
    nobody.hostnqn = "nqn.2024-01.io.cryptfold:nobody".into();
    assert_eq!(connect(&mut nobody, 0, Cntlid::DYNAMIC), Status::CONNECT_INVALID_HOST);
    let mut discovery = Client::open(port, false, false);
    assert_eq!(discovery.connect(DISCOVERY, 0, 32, Cntlid::DYNAMIC).status(), Status::SUCCESS);
    // At a port without TLS there is no concatenation, at one for TLS only no generated key.
    let mut c = Client::open(rig.addr, false, false);
    c.hostnqn = OTHER.into();
    let result = ConnectResult(c.connect(NQN, 0, 32, Cntlid::DYNAMIC).dw0.get());
    assert_eq!((result.atr(), result.ascr()), (1, 0));
    assert_eq!(prove(&mut c, 8, Concat::New), Err(Failure::Concatenation));
    assert_eq!(rig.target.generated_keys(), 0);
    let mut c = plain(port, OTHER);
    let key = new_key(&mut c, 8);
    unknown(self::port(&rig, PortSecurity::Tls), &key);
    let mut other = key.clone();
    let mut bytes = other.key.expose().to_vec();
    bytes[0] ^= 1;
    other.key = SecretBytes::from_vec(bytes).into();
    unknown(port, &other);
    secure(port, &key);
    // Somebody who begins with neither.
    let mut c = Client::raw(port);
    c.send(b"GET / HTTP/1.1\r\n\r\n");
    while c.recv() != common::Pdu::Closed {}
}

#[test]
fn keys_that_nobody_uses_are_wiped() {
    let (rig, port) = rig(patient());
    let mut c = plain(port, HOST);
    let (old, new) = (new_key(&mut c, 7), new_key(&mut c, 7));
    unknown(port, &old);
    secure(port, &new);
    let mut other = plain(port, OTHER);
    let key = new_key(&mut other, 8);
    assert_eq!(rig.target.generated_keys(), 2);
    rig.target.remove_host(NQN, OTHER).expect("it is there");
    assert_eq!(rig.target.generated_keys(), 1);
    unknown(port, &key);
    rig.target.delete_subsystem(NQN).expect("it ends");
    assert_eq!(rig.target.generated_keys(), 0);
    // Far more than an authentication takes.
    let (rig, port) = self::rig(TransportOptions { auth_timeout_ms: 30_000, ..patient() });
    let key = new_key(&mut plain(port, HOST), 7);
    wait(|| rig.target.generated_keys() == 0);
    unknown(port, &key);
}
