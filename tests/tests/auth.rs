//! DH-HMAC-CHAP between our initiator and our target, over loopback.

use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::Registry;
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_nvmf_initiator::{
    ConnectOptions, Controller, Credentials, DhGroup, Error, HashId, Offer, Secret,
};
use cryptfold_nvmf_spec::Nsid;
use cryptfold_nvmf_target::{
    HostAccess, ListenAddr, Named, NsOptions, SubsystemOptions, Target, TransportOptions,
};
use cryptfold_reactor::{Handle, IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};

const NQN: &str = "nqn.2024-01.io.cryptfold:test";

struct Rig {
    target: Arc<Target>,
    options: ConnectOptions,
    host: Handle,
    _runtime: Runtime,
}

fn secret(byte: u8) -> Secret {
    Secret::new(&[byte; 48], Some(HashId::Sha384)).expect("48 bytes")
}

fn named(byte: u8) -> Option<Named<Secret>> {
    Some(Named { name: format!("key{byte}"), key: secret(byte) })
}

fn credentials(own: u8, controller: Option<u8>) -> Credentials {
    let offer = Offer { hashes: vec![HashId::Sha256], groups: vec![DhGroup::Ffdhe2048] };
    Credentials { secret: secret(own), controller: controller.map(secret), offer }
}

/// The host has key 1, the controller key 2.
fn rig() -> Rig {
    let memory = MemoryConfig { fixed_buffers: false, arena_bytes: 4 << 20, ..Default::default() };
    let policy = IdlePolicy::Interrupt;
    let config = RuntimeConfig { cores: vec![0, 1], policy, pin: false, memory, ..Default::default() };
    let runtime = Runtime::start(config).expect("reactors start");
    let registry = Registry::new();
    let disk = MallocOptions {
        name: "disk".into(),
        num_blocks: 1024,
        block_size_bytes: 512,
        uuid: None,
        optimal_io_boundary: 0,
    };
    cryptfold_bdev_malloc::create(&registry, disk).expect("a RAM disk");
    let target = Arc::new(Target::new(registry, &runtime.handles()[1..]));
    // Nothing in the capsule: Fabrics commands have their room all the same.
    // No deadline that a starved machine could miss.
    let transport = TransportOptions {
        in_capsule_data_size: 0,
        connect_timeout_ms: 300_000,
        auth_timeout_ms: 300_000,
        ..Default::default()
    };
    target.create_transport("TCP", transport).expect("transport");
    target.create_subsystem(SubsystemOptions::new(NQN)).expect("subsystem");
    target.add_ns(NQN, &NsOptions { bdev_name: "disk".into(), ..Default::default() }).expect("namespace");
    let any = ListenAddr::parse("TCP", Some("IPv4"), "127.0.0.1", "0").expect("an address");
    let port = target.add_listener(NQN, &any).expect("a free port").port;
    let mut options = ConnectOptions::new("127.0.0.1", port.to_string(), NQN);
    (options.connect_timeout, options.io_timeout) = (Duration::from_secs(300), Duration::from_secs(300));
    let access = HostAccess { dhchap: named(1), dhchap_ctrlr: named(2), ..Default::default() };
    target.add_host(NQN, &options.hostnqn, access).expect("a new host");
    Rig { target, options, host: runtime.handles()[0].clone(), _runtime: runtime }
}

impl Rig {
    /// What becomes of a connection with these credentials; it reads a block on an I/O queue when it comes that far.
    fn connect(&self, credentials: Option<Credentials>) -> Result<(), Error> {
        let options = ConnectOptions { credentials, ..self.options.clone() };
        self.host
            .block_on(move || async move {
                let c = Controller::connect(&options).await?;
                let info = c.namespace(Nsid(1)).await?;
                let queue = c.io_queue(8).await?;
                let ns = queue.namespace(&info);
                drop((ns, queue));
                c.shutdown().await;
                Ok(())
            })
            .expect("the reactor runs")
    }
}

#[test]
fn every_hash_and_group_on_admin_and_io_queues() {
    let rig = rig();
    for hash in HashId::ALL {
        for group in DhGroup::ALL {
            let both = *hash as u8 % 2 == *group as u8 % 2;
            let offer = Offer { hashes: vec![*hash], groups: vec![*group] };
            let c = Credentials { secret: secret(1), controller: both.then(|| secret(2)), offer };
            assert_eq!(rig.connect(Some(c)), Ok(()), "{} {} both: {both}", hash.name(), group.name());
        }
    }
}

#[test]
fn whoever_can_not_prove_it_stays_out() {
    let rig = rig();
    let refused = |c, what: &str| {
        let e = rig.connect(c).expect_err("refused").to_string();
        assert!(e.contains(what), "{e}");
    };
    refused(None, "requires authentication");
    refused(Some(credentials(3, None)), "the target refused: authentication failed");
    refused(Some(credentials(1, Some(3))), "the target failed: authentication failed");
    rig.target.set_auth_offer(Offer { hashes: vec![HashId::Sha512], ..Default::default() }).expect("legal");
    refused(Some(credentials(1, None)), "hash function not usable");
    rig.target
        .set_auth_offer(Offer { groups: vec![DhGroup::Ffdhe8192], ..Default::default() })
        .expect("legal");
    refused(Some(credentials(1, None)), "DH group not usable");
    rig.target.set_auth_offer(Offer::default()).expect("legal");
    for _ in 0..60_000 {
        if rig.target.controllers(NQN).is_ok_and(|c| c.is_empty()) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(rig.target.controllers(NQN).map(|c| c.len()), Ok(0), "the refused left nothing behind");
    // A controller without a secret of its own can not answer a host that asks.
    rig.target.set_keys(NQN, &rig.options.hostnqn, named(1), None).expect("known");
    refused(Some(credentials(1, Some(2))), "authentication failed");
    assert_eq!(rig.connect(Some(credentials(1, None))), Ok(()));
}

#[test]
fn keys_change_under_a_live_connection() {
    let rig = rig();
    let options = ConnectOptions { credentials: Some(credentials(1, Some(2))), ..rig.options.clone() };
    let (target, hostnqn) = (rig.target.clone(), rig.options.hostnqn.clone());
    rig.host
        .block_on(move || async move {
            let c = Controller::connect(&options).await.expect("connects");
            c.reauthenticate(&credentials(1, Some(2))).await.expect("again, with the same keys");
            target.set_keys(NQN, &hostnqn, named(5), named(6)).expect("known");
            c.namespaces().await.expect("the connection stays");
            c.reauthenticate(&credentials(5, Some(6))).await.expect("with the new keys");
            let info = c.namespace(Nsid(1)).await.expect("still there");
            assert_eq!(info.blocks, 1024);
            c.io_queue(4).await.err().expect("the options have the old keys");
            c.reauthenticate(&credentials(1, None)).await.expect_err("the old keys");
            assert!(c.namespaces().await.is_err(), "one failure ends the connection");
        })
        .expect("the reactor runs");
    assert!(rig.connect(Some(credentials(1, None))).is_err());
    assert_eq!(rig.connect(Some(credentials(5, None))), Ok(()));
    let hosts = &rig.target.subsystems()[1].hosts;
    assert_eq!(hosts[0].dhchap_key.as_deref(), Some("key5"));
}
