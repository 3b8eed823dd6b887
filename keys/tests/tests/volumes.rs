//! Volumes of a pool on which a host puts LUKS2: the real `cryptsetup`'s headers and ciphertext, a key server (PyKMIP), and what
//! lies below and comes back.

mod common;

use std::time::{Duration, Instant};

use common::*;
use cryptfold_bdev::Status;
use cryptfold_control::jsonrpc::Handler as _;
use cryptfold_keys_tests::cryptsetup::Host;
use cryptfold_kmip::{ObjectType, RevocationReason, Secret, State};
use serde_json::{Value, json};

/// A file `disk` that the host has encrypted; its plaintext.
fn encrypted(host: &Host, sector: usize) -> Vec<u8> {
    let plain = host.file("disk", 8 * MIB as u64);
    encrypt(host, sector);
    plain
}

#[test]
fn ciphertext_of_the_real_tool_is_plaintext_below() {
    let (_kms, owner, _, target) = start();
    for (name, sector) in [("a", 512), ("b", 4096)] {
        let host = Host::new(64);
        let plain = encrypted(&host, sector);
        import_token(&host, "disk", &registered(&owner, &host, None));
        let disk = std::fs::read(host.path("disk")).unwrap();
        let (header, payload) = disk.split_at(16 * MIB);
        target.volume(name, json!({}));
        target.raw_because(name, "no LUKS header");
        // The payload follows the header at once: it waits for the look at it.
        target.write(name, 0, header);
        target.write(name, 16 * MIB, payload);
        let status = target.becomes(name, "bound");
        assert_eq!(
            (&status["state"], &status["sector_size"], &status["payload_offset"]),
            (&json!("bound"), &json!(sector), &json!(16 * MIB)),
            "{status}"
        );
        assert!(target.read(name, 0, DISK).unwrap() == disk, "the host sees what it wrote");
        assert!(target.below(name, 0, 16 * MIB) == header, "the header is raw");
        assert!(target.below(name, 16 * MIB, plain.len()) == plain, "sectors of {sector}");
    }
    assert!(
        target.ok("cryptfold_pool_check", json!({"lvs_name": "p", "data": true}))["clean"].as_bool().unwrap()
    );
}

#[test]
fn the_life_of_a_volume_its_header_and_its_key() {
    let (mut kms, owner, certificate, mut target) = start();
    let host = Host::new(64);
    let id = registered(&owner, &host, None);
    let first = formatted(&host, Some(&id));
    let data: Vec<u8> = include_bytes!("volumes.rs").repeat(20)[..64 << 10].to_vec();
    let payload = 16 * MIB;
    target.volume("v", json!({}));
    target.write("v", 0, &first);
    target.write("v", payload, &data);
    target.becomes("v", "bound");
    assert_ne!(target.below("v", payload, data.len()), data);

    // Another passphrase and label: the same volume, without a pause.
    host.cryptsetup("config disk --label other");
    host.cryptsetup("luksAddKey -q --key-file key --pbkdf pbkdf2 --pbkdf-force-iterations 1000 disk token");
    let second = header(&host);
    assert_ne!(first, second);
    target.write("v", 0, &second);
    assert!(target.read("v", payload, data.len()).unwrap() == data);
    assert_eq!(target.becomes("v", "bound")["label"], "other");

    // Revoked: nothing, not even reads. Active again: as before.
    owner.revoke(&id, RevocationReason::PrivilegeWithdrawn, "").unwrap();
    assert_eq!(target.becomes("v", "fenced")["reason"], "the key is deactivated");
    assert_eq!(target.read("v", payload, 4096), Err(denied()));
    kms.force_state(&id, State::Active);
    target.becomes("v", "bound");
    assert!(target.read("v", payload, data.len()).unwrap() == data);

    // Another start, while the server is down: it waits, and shows nothing raw meanwhile.
    drop(target);
    kms.stop();
    target = Target::new(kms.dir.path(), &kms, &certificate);
    target.volume("v", json!({}));
    target.becomes("v", "waiting");
    assert_eq!(target.read("v", payload, 4096), Err(Status::NAMESPACE_NOT_READY));
    assert_eq!(target.try_write("v", payload, &data), Err(Status::NAMESPACE_NOT_READY));
    kms.resume();
    target.becomes("v", "bound");
    assert!(target.read("v", payload, data.len()).unwrap() == data);

    // A header with another key: what is stored stays what it is, for nobody; also after another start, although that header's
    // key is at the server.
    let other = Host::new(64);
    let foreign = formatted(&other, Some(&registered(&owner, &other, None)));
    target.write("v", 0, &foreign);
    assert_eq!(target.try_write("v", payload, &data), Err(denied()));
    assert!(
        target.becomes("v", "fenced")["reason"].as_str().unwrap().contains("another key"),
        "{}",
        target.status("v")
    );
    assert_eq!(target.read("v", payload, 4096), Err(denied()));
    drop(target);
    target = Target::new(kms.dir.path(), &kms, &certificate);
    target.volume("v", json!({}));
    target.becomes("v", "fenced");
    assert_eq!(target.read("v", payload, 4096), Err(denied()));
    // Restored.
    target.write("v", 0, &second);
    target.becomes("v", "bound");
    assert!(target.read("v", payload, data.len()).unwrap() == data);

    // Given up, all of it: free, and bound to the other key then.
    target.discard("v", 0, DISK);
    target.raw_because("v", "no LUKS header");
    target.write("v", 0, &foreign);
    target.write("v", payload, &data);
    assert_eq!(target.becomes("v", "bound")["objects"].as_array().unwrap().len(), 1);
    assert!(target.read("v", payload, data.len()).unwrap() == data);
    assert_ne!(target.below("v", payload, data.len()), data);
    assert!(
        target.read("v", payload + MIB, 4096).unwrap() == [0; 4096],
        "what was never written is raw zeros"
    );

    // A saved configuration names no key and brings it back.
    let saved = target.control.call("save_config", None).unwrap();
    assert!(
        saved.to_string().contains("bdev_luks_create") && !saved.to_string().contains("keyring_kmip_add_key")
    );
    target.ok("bdev_luks_delete", json!({"name": "luks-v"}));
    assert!(target.call("bdev_luks_get_status", json!({"name": "luks-v"})).is_err());
    let deadline = Instant::now() + PATIENCE;
    while target.control.call("keyring_kmip_get_keys", None).unwrap() != json!([]) {
        assert!(Instant::now() < deadline, "its key is still known");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_is_not_bound_is_raw_and_says_why() {
    let (_kms, owner, _, target) = start();
    let payload = 16 * MIB;
    let data = [0x5A; 8192];
    let (host, other) = (Host::new(64), Host::new(64));
    let id = registered(&owner, &host, None);
    let wrong = registered(&owner, &other, None);
    let raw = |name: &str, reason: &str| {
        target.raw_because(name, reason);
        target.write(name, payload, &data);
        assert!(target.below(name, payload, data.len()) == data, "{name}");
        assert!(target.read(name, payload, data.len()).unwrap() == data, "{name}");
    };
    let volume = |name: &str, header: &[u8], more: Value| {
        target.volume(name, more);
        target.write(name, 0, header);
    };

    volume("wrong", &formatted(&host, Some(&wrong)), json!({}));
    raw("wrong", "not this header's");
    volume("missing", &formatted(&host, Some("4711")), json!({}));
    raw("missing", "not found");
    volume("unnamed", &formatted(&host, None), json!({}));
    raw("unnamed", "no token of type \"cryptfold-kmip\", and 0 keys");
    let good = formatted(&host, Some(&id));
    volume("slow", &good, json!({"max_iterations": 10}));
    raw("slow", "at most 10 are done");
    // Damaged while it was written.
    let mut torn = good.clone();
    torn[4200] ^= 1;
    torn[16384 + 4200] ^= 1;
    volume("torn", &torn, json!({}));
    raw("torn", "first copy: the checksum is wrong");
    // Re-encryption has begun.
    host.file("disk", DISK as u64);
    host.cryptsetup(&format!(
        "reencrypt --encrypt --init-only {} --cipher aes-xts-plain64 --reduce-device-size 32M disk",
        host.common()
    ));
    volume("changing", &header(&host), json!({}));
    raw("changing", "re-encryption is in progress");
    // Something was there first; it stays readable, and the volume is bound once that is given up.
    target.volume("late", json!({"late_mb_s": 0}));
    target.write("late", payload + MIB, &data);
    target.write("late", 0, &good);
    raw("late", "data was written behind the header");
    assert!(target.read("late", payload + MIB, data.len()).unwrap() == data);
    target.discard("late", 8 * MIB, DISK - 8 * MIB);
    target.write("late", 0, &good);
    target.becomes("late", "bound");

    // The key has the volume's UUID for its name.
    let named = formatted(&other, None);
    let uuid = std::str::from_utf8(&named[168..204]).unwrap().to_owned();
    registered(&owner, &other, Some(&uuid));
    volume("named", &named, json!({}));
    target.becomes("named", "bound");

    // Hosts that need not say who they are: not before it is bound, and not afterwards.
    let nqn = "nqn.2026-01.io.cryptfold:open";
    target.ok("nvmf_create_transport", json!({"trtype": "TCP"}));
    target.ok("nvmf_create_subsystem", json!({"nqn": nqn, "allow_any_host": true}));
    let late =
        owner.register(&new_key(None), ObjectType::SymmetricKey, &Secret::new(other.key.clone())).unwrap();
    volume("open", &formatted(&other, Some(&late)), json!({"allow_unauthenticated": false}));
    target.raw_because("open", "no subsystem has it");
    target.ok("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": {"bdev_name": "luks-open"}}));
    target.raw_because("open", "any host in");
    target.ok("nvmf_subsystem_allow_any_host", json!({"nqn": nqn, "allow_any_host": false}));
    assert_eq!(target.becomes("open", "waiting")["reason"], "the key is pre-active");
    owner.activate(&late).unwrap();
    target.becomes("open", "bound");
    target.ok("nvmf_subsystem_add_host", json!({"nqn": nqn, "host": "nqn.2026-01.io.cryptfold:somebody"}));
    let fenced = target.becomes("open", "fenced");
    assert!(fenced["reason"].as_str().unwrap().contains("does not have to authenticate"), "{fenced}");
    assert_eq!(target.read("open", payload, 4096), Err(denied()));
    // A device on it shows it to hosts of which nothing is known.
    volume("below", &good, json!({"allow_unauthenticated": false}));
    target.ok("bdev_passthru_create", json!({"base_bdev_name": "luks-below", "name": "above"}));
    target.raw_because("below", "whose hosts are not known");
    volume("allowed", &good, json!({}));
    target.ok("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": {"bdev_name": "luks-allowed"}}));
    assert_eq!(target.becomes("allowed", "bound")["reason"], Value::Null);

    let refused = |params: Value| target.call("bdev_luks_create", params).unwrap_err().1;
    let e = refused(json!({"base_bdev_name": "disk", "name": "x", "kms_server": "kms"}));
    assert!(e.contains("volume of a pool"), "{e}");
    let e = refused(json!({"base_bdev_name": "p/open", "name": "x", "kms_server": "nobody"}));
    assert!(e.contains("keyring_kmip_add_server"), "{e}");
    target.ok(
        "bdev_lvol_create",
        json!({"lvs_name": "p", "lvol_name": "small", "size_in_mib": 16, "block_size": 512}),
    );
    let e = refused(json!({"base_bdev_name": "p/small", "name": "x", "kms_server": "kms"}));
    assert!(e.contains("blocks of 4096"), "{e}");
}
