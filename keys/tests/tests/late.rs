//! Volumes whose keys come after their data: what was stored raw is reduced late, and hosts see the same bytes all the time.

mod common;

use std::path::PathBuf;

use common::*;
use cryptfold_bdev::Status;
use cryptfold_keys_tests::KeyServer;
use cryptfold_keys_tests::cryptsetup::Host;
use cryptfold_kmip::{ObjectType, RevocationReason, Secret, State};
use serde_json::{Value, json};

const PAYLOAD: usize = 16 * MIB;
const DATA: usize = 8 * MIB;

/// A file `disk` that the host has encrypted: numbers as text, of which no 4 KiB are equal, and which halve when compressed. No token.
fn encrypted(host: &Host) -> Vec<u8> {
    let mut plain = Vec::with_capacity(DATA + 32);
    let mut n = 1u64;
    while plain.len() < DATA {
        n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        plain.extend(format!("{:016x}{:016x}\n", n >> 24, n >> 8 & 0xF0F0).bytes());
    }
    plain.truncate(DATA);
    std::fs::write(host.path("disk"), &plain).unwrap();
    encrypt(host, 4096);
    plain
}

/// The header's UUID: the name that its key has at the server when there is no token.
fn uuid(disk: &[u8]) -> String {
    std::str::from_utf8(&disk[168..204]).unwrap().to_owned()
}

fn pool(target: &Target) -> Value {
    target.ok("bdev_lvol_get_lvstores", json!({"lvs_name": "p"}))[0].clone()
}

/// Bytes that the pool's chunks take.
fn stored(target: &Target) -> u64 {
    let pool = pool(target);
    pool["stored_bytes"].as_u64().unwrap_or_else(|| panic!("{pool:#}"))
}

/// Takes the device away, and makes it again with another rate.
fn at_rate(target: &Target, name: &str, mb_s: u32) {
    target.ok("bdev_luks_delete", json!({"name": format!("luks-{name}")}));
    target.volume(name, json!({"late_mb_s": mb_s}));
}

fn new_dir(kms: &KeyServer, name: &str) -> PathBuf {
    let dir = kms.dir.path().join(name);
    std::fs::create_dir(&dir).unwrap();
    dir
}

#[test]
fn what_was_stored_before_its_key_is_reduced() {
    let kms = KeyServer::start();
    let owner = kms.client("owner");
    let certificate = kms.authority.client("target");
    let host = Host::new(64);
    let plain = encrypted(&host);
    let disk = std::fs::read(host.path("disk")).unwrap();
    let (late_dir, once_dir) = (new_dir(&kms, "late"), new_dir(&kms, "once"));

    // Nobody has the key yet: it is stored as it comes, and a snapshot is taken of that.
    let target = Target::new(&late_dir, &kms, &certificate);
    target.volume("v", json!({}));
    target.write("v", 0, &disk[..PAYLOAD]);
    target.raw_because("v", "and 0 keys at the server are named");
    target.write("v", PAYLOAD, &disk[PAYLOAD..]);
    let same = |target: &Target| assert!(target.read("v", 0, DISK).unwrap() == disk);
    same(&target);
    assert!(target.below("v", PAYLOAD, DATA) == disk[PAYLOAD..][..DATA]);
    target.ok("bdev_lvol_snapshot", json!({"lvol_name": "p/v", "snapshot_name": "s"}));
    let raw = stored(&target);

    // Then there is one, and it is active.
    let key = Secret::new(host.key.clone());
    let id = owner.register(&new_key(Some(&uuid(&disk))), ObjectType::SymmetricKey, &key).unwrap();
    target.raw_because("v", "the key is pre-active");
    owner.activate(&id).unwrap();
    let status = target.becomes("v", "bound");
    assert_eq!((&status["reason"], &status["left_bytes"]), (&Value::Null, &Value::Null), "{status}");
    same(&target);
    assert!(target.below("v", PAYLOAD, DATA) == plain, "all of it is plaintext");

    // The snapshot shows what it did, under the volume's record; a clone of it is reduced for itself, and ends as the volume.
    assert!(target.below("s", PAYLOAD, DATA) == disk[PAYLOAD..][..DATA]);
    target.luks("s", json!({}));
    target.raw_because("s", "this is a snapshot of it");
    assert!(target.read("s", 0, DISK).unwrap() == disk);
    target.ok("bdev_lvol_clone", json!({"snapshot_name": "p/s", "clone_name": "c"}));
    target.ok("bdev_luks_delete", json!({"name": "luks-s"}));
    target.ok("bdev_luks_delete", json!({"name": "luks-v"}));
    // What takes all of it for being under one key is refused, also after the last of it was reduced.
    std::fs::write(host.path("key"), &host.key).unwrap();
    std::fs::set_permissions(host.path("key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let over = |base: &str| {
        let params = json!({"base_bdev_name": base, "name": "over", "key_file": host.path("key"), "sector_size": 4096,
            "payload_offset": PAYLOAD});
        target.call("bdev_hostcrypt_create", params)
    };
    let refused = over("p/v").unwrap_err().1;
    assert!(refused.contains("bdev_luks_create tells them apart"), "{refused}");
    // Without a record it is the caller's to know.
    over("p/c").unwrap();
    target.ok("bdev_hostcrypt_delete", json!({"name": "over"}));
    target.luks("c", json!({}));
    target.becomes("c", "bound");
    assert!(target.read("c", 0, DISK).unwrap() == disk);
    assert!(target.below("c", PAYLOAD, DATA) == plain);
    target.ok("bdev_luks_delete", json!({"name": "luks-c"}));
    target.ok("bdev_lvol_delete", json!({"name": "p/c"}));
    target.ok("bdev_lvol_delete", json!({"name": "p/s"}));

    // A volume that was bound before its data came, in a pool of its own.
    let once = {
        let target = Target::new(&once_dir, &kms, &certificate);
        target.volume("v", json!({}));
        target.write("v", 0, &disk[..PAYLOAD]);
        target.becomes("v", "bound");
        target.write("v", PAYLOAD, &disk[PAYLOAD..]);
        assert!(target.below("v", PAYLOAD, DATA) == plain);
        stored(&target)
    };
    // What the deleted ones had is given back in the background.
    let near = |late: u64| (99 * once..=101 * once).contains(&(100 * late));
    let late = wait_for(|| Some(stored(&target)).filter(|late| near(*late)));
    println!("raw {raw}, reduced late {late}, bound at once {once} bytes");
    assert!(raw - late > 2 * MIB as u64, "{raw} {late}");
    let report = target.ok("cryptfold_pool_check", json!({"lvs_name": "p", "data": true}));
    assert!(report["clean"].as_bool().unwrap(), "{report:#}");
    same_after_restart(target, &late_dir, &kms, &certificate, &disk);
}

/// It is bound at once, not converting: the record says so.
fn same_after_restart(
    target: Target,
    dir: &std::path::Path,
    kms: &KeyServer,
    certificate: &(PathBuf, PathBuf),
    disk: &[u8],
) {
    drop(target);
    let target = Target::new(dir, kms, certificate);
    target.volume("v", json!({"late_mb_s": 1}));
    target.becomes("v", "bound");
    assert!(target.read("v", 0, DISK).unwrap() == disk);
}

fn random(bytes: usize) -> Vec<u8> {
    let mut all = vec![0; bytes];
    let mut random = std::fs::File::open("/dev/urandom").unwrap();
    std::io::Read::read_exact(&mut random, &mut all).unwrap();
    all
}

/// Until the layer is on: a volume with data goes on raw until its key is proven, and a fenced one is so until it was looked at.
fn under_its_key(target: &Target) {
    wait_for(|| {
        ["converting", "bound"].contains(&target.status("v")["state"].as_str().unwrap()).then_some(())
    });
}

/// A file system was there, then LUKS was put over it without a discard: what lies there is no ciphertext, and stays as small as it is.
/// A header of another key in the middle fences, and all of it comes back with the first.
#[test]
fn what_is_no_ciphertext_stays_and_other_headers_fence() {
    let (_kms, owner, _, target) = start();
    let (host, other) = (Host::new(64), Host::new(64));
    let text: Vec<u8> = include_bytes!("late.rs").iter().cycle().take(MIB).copied().collect();
    let noise = random(MIB);
    target.volume("v", json!({"late_mb_s": 1}));
    target.write("v", PAYLOAD, &text);
    target.write("v", PAYLOAD + MIB, &noise);
    let header = formatted(&host, Some(&registered(&owner, &host, None)));
    let foreign = formatted(&other, Some(&registered(&owner, &other, None)));
    target.write("v", 0, &header);
    under_its_key(&target);
    target.write("v", PAYLOAD + 2 * MIB, &noise[..8192]);
    let all = [&text[..], &noise, &noise[..8192]].concat();
    let same = || assert!(target.read("v", PAYLOAD, all.len()).unwrap() == all);
    same();
    target.write("v", 0, &foreign);
    target.is_because("v", "fenced", "another key");
    assert_eq!(target.read("v", PAYLOAD, 4096), Err(denied()));
    target.write("v", 0, &header);
    under_its_key(&target);
    same();
    target.becomes("v", "bound");
    same();
    assert!(target.below("v", PAYLOAD, MIB) == text, "it would only have become larger");
    assert!(target.below("v", PAYLOAD + MIB, MIB) != noise);
    assert!(target.below("v", PAYLOAD + 2 * MIB, 8192) != noise[..8192], "written by its host");

    // Who does not want it, leaves such volumes raw.
    target.volume("w", json!({"late_mb_s": 0}));
    target.write("w", PAYLOAD, &noise);
    target.write("w", 0, &header);
    target.raw_because("w", "data was written behind the header");
    assert!(target.read("w", PAYLOAD, MIB).unwrap() == noise);
}

/// A volume's writes were held back while the server was asked for the key of a new header, and the key proven: a server that did not
/// answer stopped hosts whose data was there before.
#[test]
fn a_silent_key_server_holds_no_writes_of_a_volume_in_use() {
    let (kms, owner, _, target) = start();
    let (host, other) = (Host::new(64), Host::new(64));
    let header = formatted(&host, Some(&registered(&owner, &host, None)));
    let second = formatted(&other, Some(&registered(&owner, &other, None)));
    let data = random(MIB);
    let piece = MIB / 8;
    target.volume("v", json!({}));
    target.write("v", PAYLOAD, &data[..piece]);

    // The client waits for ten minutes: whatever happens from here on happens without an answer.
    kms.pause();
    let mut at = piece;
    let mut goes_on = || {
        // Not one has to be tried again.
        target.try_write("v", PAYLOAD + at, &data[at..][..piece]).unwrap();
        at += piece;
        let status = target.status("v");
        assert_eq!(status["state"], "raw", "{status}");
        assert!(target.below("v", PAYLOAD, at) == data[..at], "as it was sent");
    };
    target.write("v", 0, &header);
    target.raw_because("v", "being fetched and proven");
    goes_on();
    // Looked at again and again, also when it is another header, and the first one once more.
    for header in [&header, &second, &header, &second] {
        target.write("v", 0, header);
        goes_on();
    }
    let named = uuid(&second);
    wait_for(|| (target.status("v")["uuid"] == named.as_str()).then_some(()));
    goes_on();
    kms.go_on();
    goes_on_under(&target, &data, at);
    assert_eq!(target.becomes("v", "bound")["uuid"], named.as_str());
    assert!(target.read("v", PAYLOAD, MIB).unwrap() == data);
    let below = target.below("v", PAYLOAD, MIB);
    assert!(below.chunks(4096).zip(data.chunks(4096)).all(|(below, sent)| below != sent), "all is plaintext");
}

/// Whichever way it is stored by now. A read that the layer's coming meets has to be tried again.
fn goes_on_under(target: &Target, data: &[u8], at: usize) {
    target.write("v", PAYLOAD + at, &data[at..]);
    let read = wait_for(|| match target.read("v", PAYLOAD, MIB) {
        Err(Status::NAMESPACE_NOT_READY) => None,
        result => Some(result.unwrap()),
    });
    assert!(read == data);
}

/// Which blocks of 4 KiB lie below as they were sent, and that there are both kinds.
fn as_sent(target: &Target, name: &str, data: &[u8]) -> Vec<bool> {
    let below = target.below(name, PAYLOAD, data.len());
    let same: Vec<bool> = below.chunks(4096).zip(data.chunks(4096)).map(|(a, b)| a == b).collect();
    let count = same.iter().filter(|same| **same).count();
    println!("{count} of {} blocks are as they were sent", same.len());
    assert!(count > 0 && count < same.len(), "{count} of {}", same.len());
    same
}

/// A snapshot keeps what was there, so its volume takes as much again, but not the room that hosts need: there the pass waits, in the
/// middle, for as long as the test wants. A clone whose header is another one by now is free when what was under the key is discarded.
#[test]
fn room_is_left_for_hosts_and_clones_get_free() {
    let mut kms = KeyServer::start();
    let owner = kms.client("owner");
    let certificate = kms.authority.client("target");
    std::fs::File::create(kms.dir.path().join("pool")).unwrap().set_len(160 << 20).unwrap();
    let mut target = Target::new(kms.dir.path(), &kms, &certificate);
    let (host, other) = (Host::new(64), Host::new(64));
    let id = registered(&owner, &host, None);
    let header = formatted(&host, Some(&id));
    let foreign = formatted(&other, Some(&registered(&owner, &other, None)));
    let data = random(20 * MIB);
    target.volume("v", json!({}));
    target.write("v", PAYLOAD, &data);
    target.ok("bdev_lvol_snapshot", json!({"lvol_name": "p/v", "snapshot_name": "s"}));
    let free = || {
        let pool = pool(&target);
        (pool["free_clusters"].as_u64().unwrap() * pool["cluster_size"].as_u64().unwrap()) as usize
    };
    let mut fillers = 0;
    // The header takes 16 MiB of it, and what is left is not enough for all of the data again.
    while free() > 34 * MIB {
        let name = format!("filler{fillers}");
        target.volume(&name, json!({}));
        (0..16).take_while(|_| free() > 34 * MIB).for_each(|n| target.write(&name, n * MIB, &random(MIB)));
        fillers += 1;
    }
    target.write("v", 0, &header);
    let status = target.is_because("v", "converting", "short of space");
    assert!(status["left_bytes"].as_u64().unwrap() > 0, "{status}");
    // Nobody's writes have to wait; what its host writes again is under the key.
    target.write("v", PAYLOAD + 20 * MIB, &data[..64 << 10]);
    let same = |target: &Target| assert!(target.read("v", PAYLOAD, data.len()).unwrap() == data);
    let rewrite = |target: &Target| {
        let last = data.len() - 4096;
        target.write("v", PAYLOAD + last, &data[last..]);
        assert!(!as_sent(target, "v", &data)[last / 4096]);
        same(target);
    };
    rewrite(&target);
    // The key's end fences the volume as any other, and nothing goes on meanwhile, after another start and without a server.
    owner.revoke(&id, RevocationReason::PrivilegeWithdrawn, "").unwrap();
    target.becomes("v", "fenced");
    assert_eq!(target.read("v", PAYLOAD, 4096), Err(denied()));
    drop(target);
    kms.stop();
    target = Target::new(kms.dir.path(), &kms, &certificate);
    target.volume("v", json!({}));
    target.becomes("v", "waiting");
    assert_eq!(target.read("v", PAYLOAD, 4096), Err(Status::NAMESPACE_NOT_READY));
    kms.resume();
    target.becomes("v", "fenced");
    let before = as_sent(&target, "v", &data);
    kms.force_state(&id, State::Active);
    target.is_because("v", "converting", "short of space");
    rewrite(&target);
    // As it is, block by block, with nothing going on; hosts write meanwhile.
    at_rate(&target, "v", 0);
    target.becomes("v", "bound");
    same(&target);
    let at = before.iter().position(|as_sent| *as_sent).unwrap() * 4096;
    target.discard("v", PAYLOAD + at, 4096);
    assert!(target.read("v", PAYLOAD + at, 4096).unwrap() == [0; 4096]);
    target.write("v", PAYLOAD + at, &data[at..][..4096]);
    rewrite(&target);
    at_rate(&target, "v", 1000);
    for n in 0..fillers {
        target.ok("bdev_lvol_delete", json!({"name": format!("p/filler{n}")}));
    }
    target.becomes("v", "bound");
    assert!(target.read("v", PAYLOAD, data.len()).unwrap() == data);
    assert!(target.below("v", PAYLOAD, MIB) != data[..MIB]);

    target.ok("bdev_lvol_clone", json!({"snapshot_name": "p/s", "clone_name": "c"}));
    target.luks("c", json!({}));
    target.write("c", 0, &header);
    target.becomes("c", "bound");
    assert!(target.read("c", PAYLOAD, data.len()).unwrap() == data);
    target.write("c", 0, &foreign);
    target.is_because("c", "fenced", "another key");
    target.discard("c", PAYLOAD, DISK - PAYLOAD);
    target.becomes("c", "bound");
    assert!(target.read("c", PAYLOAD, DISK - PAYLOAD).unwrap().iter().all(|b| *b == 0));
    target.write("c", PAYLOAD, &data[..MIB]);
    assert!(target.read("c", PAYLOAD, MIB).unwrap() == data[..MIB]);
}

/// Blocks that an operator's device has stored under some key are not taken for the header's.
#[test]
fn blocks_of_unknown_keys_stay_what_they_are() {
    let (_kms, owner, _, target) = start();
    let (host, before) = (Host::new(64), Host::new(64));
    let header = formatted(&host, Some(&registered(&owner, &host, None)));
    std::fs::write(before.path("key"), &before.key).unwrap();
    std::fs::set_permissions(before.path("key"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .unwrap();
    let data = random(64 << 10);
    target.ok("bdev_lvol_create", json!({"lvs_name": "p", "lvol_name": "v", "size_in_mib": DISK / MIB}));
    target.ok(
        "bdev_hostcrypt_create",
        json!({"base_bdev_name": "p/v", "name": "luks-v", "key_file": before.path("key"), "sector_size": 4096, "payload_offset": PAYLOAD}),
    );
    target.write("v", PAYLOAD + MIB, &data);
    target.ok("bdev_hostcrypt_delete", json!({"name": "luks-v"}));
    target.volume("v", json!({}));
    let stored = target.read("v", PAYLOAD + MIB, data.len()).unwrap();
    assert!(stored != data);
    target.write("v", 0, &header);
    target.raw_because("v", "stored under a host's key");
    target.write("v", PAYLOAD + 2 * MIB, &data);
    assert!(target.read("v", PAYLOAD + MIB, data.len()).unwrap() == stored, "its bytes are what they were");
    // Given up, it is as any other.
    target.discard("v", PAYLOAD + MIB, data.len());
    target.write("v", 0, &header);
    target.becomes("v", "bound");
    assert!(target.read("v", PAYLOAD + 2 * MIB, data.len()).unwrap() == data);
}
