//! Headers that change while their volume is bound: other objects of the key server, other keys, and a server that does not answer.

mod common;

use std::time::Duration;

use common::*;
use cryptfold_control::jsonrpc::Handler as _;
use cryptfold_keys_tests::cryptsetup::Host;
use cryptfold_kmip::{RevocationReason, State};
use serde_json::{Value, json};

const PAYLOAD: usize = 16 * MIB;
const REVOKED: RevocationReason = RevocationReason::PrivilegeWithdrawn;

fn data() -> Vec<u8> {
    include_bytes!("tokens.rs")[..4096].to_vec()
}

/// The objects that are watched for the volume's key.
fn watched(target: &Target) -> Value {
    target.control.call("keyring_kmip_get_keys", None).unwrap()[0]["objects"].clone()
}

/// Until the header is known to name this object.
fn names(target: &Target, object: &str) -> Value {
    wait_for(|| Some(target.status("v")).filter(|s| s["objects"] == json!([object])))
}

#[test]
fn another_object_takes_over_when_it_is_proven_and_lifts_no_fence() {
    let (kms, owner, certificate, mut target) = start();
    let host = Host::new(64);
    let first = registered(&owner, &host, None);
    let second = registered(&owner, &host, None);
    let third = registered(&owner, &host, None);
    let wrong = registered(&owner, &Host::new(64), None);
    target.volume("v", json!({}));
    let with = |target: &Target, object: &str| {
        replace_token(&host, "disk", object);
        target.write("v", 0, &header(&host));
        names(target, object)
    };
    target.write("v", 0, &formatted(&host, Some(&first)));
    target.write("v", PAYLOAD, &data());
    target.becomes("v", "bound");
    assert_eq!(watched(&target), json!([first]));

    // One that is not the key: nothing changes.
    with(&target, &wrong);
    target.is_because("v", "bound", "not this header's");
    assert!(target.read("v", PAYLOAD, 4096).unwrap() == data());
    assert_eq!(watched(&target), json!([first]));
    // The same key: it takes over, and the end of the one before does not matter any more.
    with(&target, &second);
    wait_for(|| (watched(&target) == json!([second])).then_some(()));
    assert!(target.read("v", PAYLOAD, 4096).unwrap() == data());
    owner.revoke(&first, REVOKED, "").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(target.status("v")["state"], "bound");

    // Fenced: nothing can be written. After another start a header can, and one that names an object which is active does not lift that,
    // nor does one that has been another in between, nor one more start.
    owner.revoke(&second, REVOKED, "").unwrap();
    target.becomes("v", "fenced");
    assert_eq!(target.try_write("v", 0, &header(&host)), Err(denied()), "not a header either");
    drop(target);
    target = Target::new(kms.dir.path(), &kms, &certificate);
    target.volume("v", json!({}));
    target.is_because("v", "fenced", "the key is deactivated");
    with(&target, &third);
    let reason = format!("of the one before ({second}) the key is deactivated");
    let fenced = |target: &Target| {
        target.is_because("v", "fenced", &reason);
        assert_eq!(target.read("v", PAYLOAD, 4096), Err(denied()));
    };
    fenced(&target);
    let good = header(&host);
    let foreign = Host::new(64);
    target.write("v", 0, &formatted(&foreign, Some(&wrong)));
    target.is_because("v", "fenced", "of another key or payload");
    target.write("v", 0, &good);
    fenced(&target);
    drop(target);
    target = Target::new(kms.dir.path(), &kms, &certificate);
    target.volume("v", json!({}));
    fenced(&target);
    // Active again: it serves, by the object that the header names.
    kms.force_state(&second, State::Active);
    target.becomes("v", "bound");
    assert!(target.read("v", PAYLOAD, 4096).unwrap() == data());
    assert_eq!(watched(&target), json!([third]));
}

/// A header was read and the key server asked about its token before anything was shut: a server that did not answer kept the
/// volume open for as long as the client had patience.
#[test]
fn another_header_fences_while_the_key_server_is_silent() {
    let (kms, owner, _, target) = start();
    let host = Host::new(64);
    let first = registered(&owner, &host, None);
    let second = registered(&owner, &host, None);
    let foreign = Host::new(64);
    let other = formatted(&foreign, Some(&registered(&owner, &foreign, None)));
    target.volume("v", json!({}));
    target.write("v", 0, &formatted(&host, Some(&first)));
    target.write("v", PAYLOAD, &data());
    target.becomes("v", "bound");

    // The client waits for ten minutes: whatever happens from here on happens without an answer.
    kms.pause();
    replace_token(&host, "disk", &second);
    target.write("v", 0, &header(&host));
    assert_eq!(names(&target, &second)["state"], "bound");
    assert!(
        target.read("v", PAYLOAD, 4096).unwrap() == data(),
        "the key is not taken away before there is another"
    );
    target.write("v", PAYLOAD + 4096, &data());
    // While it is asked for that object.
    target.write("v", 0, &other);
    assert_eq!(target.try_write("v", PAYLOAD, &data()), Err(denied()));
    target.is_because("v", "fenced", "of another key or payload");
    assert_eq!(target.read("v", PAYLOAD, 4096), Err(denied()));
    kms.go_on();
    target.write("v", 0, &header(&host));
    target.becomes("v", "bound");
    assert!(target.read("v", PAYLOAD, 8192).unwrap() == data().repeat(2));
}
