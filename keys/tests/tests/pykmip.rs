//! Our KMIP client against PyKMIP's server.

use cryptfold_keys_tests::{Authority, KeyServer, SHARED_POLICY};
use cryptfold_kmip::{
    Client, ClientConfig, Filter, KmipError, NewObject, ObjectType, Reason, RevocationReason, Secret,
    ServerAddress, State, Version,
};

fn new_key(name: &str, policy: Option<&str>) -> NewObject {
    NewObject { name: Some(name.into()), length_bits: 512, usage: 0x0C, policy: policy.map(str::to_owned) }
}

fn reason(e: KmipError) -> Reason {
    e.refusal().unwrap_or_else(|| panic!("no refusal: {e}")).reason
}

#[test]
fn a_key_from_creation_to_destruction() {
    let server = KeyServer::start();
    let owner = server.client("owner");
    assert_eq!(owner.version().unwrap(), Version { major: 1, minor: 4 });
    let (operations, vendor) = owner.query().unwrap();
    assert!([1, 3, 8, 10, 11, 18, 19, 20].iter().all(|o| operations.contains(o)), "{operations:?}");
    assert!(vendor.contains("PyKMIP"), "{vendor}");

    let id = owner.create(&new_key("volume-1", Some(SHARED_POLICY))).unwrap();
    let found = owner.get_attributes(&id).unwrap();
    assert_eq!((found.state, found.length_bits), (Some(State::PreActive), Some(512)));
    assert_eq!(
        (found.object_type, found.names),
        (Some(ObjectType::SymmetricKey), vec!["volume-1".to_string()])
    );
    let filter = Filter { name: Some("volume-1".into()), ..Filter::default() };
    assert_eq!(owner.locate(&filter).unwrap(), std::slice::from_ref(&id));
    assert!(owner.locate(&Filter { name: Some("volume-2".into()), ..Filter::default() }).unwrap().is_empty());

    let key = owner.get(&id).unwrap();
    assert_eq!((key.object_type, key.key.len()), (ObjectType::SymmetricKey, 64));
    owner.activate(&id).unwrap();
    assert_eq!(owner.get_attributes(&id).unwrap().state, Some(State::Active));
    assert_eq!(
        reason(owner.destroy(&id).unwrap_err()),
        Reason::PERMISSION_DENIED,
        "active keys are not destroyed"
    );

    // Another client may read this key, by policy, and not end it.
    let other = server.client("other");
    assert_eq!(other.get(&id).unwrap().key, key.key);
    assert_eq!(other.get_attributes(&id).unwrap().state, Some(State::Active));
    assert_eq!(
        reason(other.revoke(&id, RevocationReason::Unspecified, "").unwrap_err()),
        Reason::PERMISSION_DENIED
    );

    owner.revoke(&id, RevocationReason::CessationOfOperation, "no longer used").unwrap();
    assert_eq!(owner.get_attributes(&id).unwrap().state, Some(State::Deactivated));
    assert_eq!(
        owner.get(&id).unwrap().key,
        key.key,
        "this server hands out deactivated keys: look at the state"
    );
    owner.destroy(&id).unwrap();
    assert_eq!(reason(owner.get_attributes(&id).unwrap_err()), Reason::ITEM_NOT_FOUND);
}

#[test]
fn keys_that_are_handed_over_come_back() {
    let server = KeyServer::start();
    let owner = server.client("owner");
    let bytes: Vec<u8> = (0..64).map(|i| i * 3 + 1).collect();
    let secret = Secret::new(bytes);
    let half = Secret::new(secret.expose()[..32].to_vec());
    for (kind, key) in [
        (ObjectType::SymmetricKey, &half),
        (ObjectType::SymmetricKey, &secret),
        (ObjectType::SecretData, &secret),
    ] {
        let id = owner.register(&new_key(&format!("{kind}-{}", key.len()), None), kind, key).unwrap();
        let back = owner.get(&id).unwrap();
        assert_eq!((back.object_type, &back.key), (kind, key));
    }
    // Compromised, from any state.
    let id = owner.register(&new_key("lost", None), ObjectType::SymmetricKey, &half).unwrap();
    owner.revoke(&id, RevocationReason::KeyCompromise, "a laptop was stolen").unwrap();
    assert_eq!(owner.get_attributes(&id).unwrap().state, Some(State::Compromised));
    // The default policy hides one client's keys from another.
    let other = server.client("other");
    assert!(other.get(&id).unwrap_err().refusal().is_some());
    assert!(other.locate(&Filter { name: Some("lost".into()), ..Filter::default() }).unwrap().is_empty());
}

#[test]
fn servers_come_and_go() {
    let mut server = KeyServer::start();
    let identity = server.authority.identity("owner");
    let down = ServerAddress { host: "127.0.0.1".into(), port: 1 };
    let both = ClientConfig { rounds: 1, ..ClientConfig::new(vec![down, server.address.clone()]) };
    let client = Client::new(both, &identity);
    let id = client.create(&new_key("k", None)).unwrap();
    server.stop();
    let e = client.get(&id).unwrap_err();
    assert!(e.is_unavailable() && e.to_string().contains("127.0.0.1:1: no connection"), "{e}");
    server.resume();
    assert_eq!(client.get(&id).unwrap().key.len(), 64, "the same client, without a restart");
}

#[test]
fn nobody_talks_to_strangers() {
    let server = KeyServer::start();
    let strangers = Authority::new(server.dir.path(), "strangers");
    // A client that takes another authority's word does not believe the server.
    let client = Client::new(server.client_config(), &strangers.identity("owner"));
    let e = client.query().unwrap_err();
    assert!(e.is_unavailable() && e.to_string().contains("certificate"), "{e}");
    // The server does not believe a client of another authority.
    let (crt, key) = strangers.client("intruder");
    let read = |p: &std::path::Path| std::fs::read(p).unwrap();
    let identity =
        cryptfold_kmip::Identity::from_pem(&read(&server.authority.certificate()), &read(&crt), &read(&key))
            .unwrap();
    assert!(Client::new(server.client_config(), &identity).query().unwrap_err().is_unavailable());
    // Nor is a server that has another name than the one that was asked for.
    let elsewhere = ServerAddress { host: "localhost".into(), port: server.address.port };
    let config = ClientConfig { rounds: 1, ..ClientConfig::new(vec![elsewhere]) };
    let e = Client::new(config, &server.authority.identity("owner")).query().unwrap_err();
    assert!(e.is_unavailable(), "{e}");
}
