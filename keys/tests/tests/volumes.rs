//! Volumes of a pool on which a host puts LUKS2: the real `cryptsetup`'s headers and ciphertext, a key server (PyKMIP), and what
//! lies below and comes back.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptfold_bdev::{Access, Status};
use cryptfold_control::jsonrpc::Handler as _;
use cryptfold_control::{Control, ControlConfig};
use cryptfold_keys_tests::cryptsetup::Host;
use cryptfold_keys_tests::{KeyServer, SHARED_POLICY};
use cryptfold_kmip::{Client, NewObject, ObjectType, RevocationReason, Secret, State};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{IdlePolicy, MemoryConfig};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
const DISK: usize = 40 * MIB;
const PATIENCE: Duration = Duration::from_secs(60);

/// A target of this process with a pool in a file.
struct Target {
    control: Arc<Control>,
}

impl Target {
    fn new(dir: &Path, kms: &KeyServer, certificate: &(PathBuf, PathBuf)) -> Target {
        let control = Control::new(ControlConfig {
            cores: vec![0, 1],
            idle: IdlePolicy::Interrupt,
            pin: false,
            memory: MemoryConfig { hugepages: false, fixed_buffers: false, arena_bytes: 4 << 20 },
            key_dir: dir.join("keys"),
            ..ControlConfig::default()
        });
        control.initialize().expect("a target");
        let target = Target { control };
        let file = dir.join("pool");
        if !file.exists() {
            std::fs::File::create(&file).unwrap().set_len(512 << 20).unwrap();
        }
        target.ok(
            "keyring_kmip_add_server",
            json!({"name": "kms", "servers": [kms.address.to_string()], "ca_file": kms.authority.certificate(),
                "cert_file": certificate.0, "key_file": certificate.1, "rounds": 1, "timeout_ms": 60000, "connect_timeout_ms": 60000,
                "poll_interval_ms": 200}),
        );
        target.ok("bdev_uring_create", json!({"name": "disk", "filename": file, "block_size": 4096}));
        target
            .ok("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p", "exist_ok": true}));
        target
    }

    fn call(&self, method: &str, params: Value) -> Result<Value, (i64, String)> {
        self.control.call(method, Some(&params)).map_err(|e| (e.code, e.message))
    }

    fn ok(&self, method: &str, params: Value) -> Value {
        self.call(method, params).unwrap_or_else(|e| panic!("{method}: {e:?}"))
    }

    /// The volume `name` and the device `luks-NAME` on it.
    fn volume(&self, name: &str, more: Value) {
        let size = DISK / MIB;
        self.ok(
            "bdev_lvol_create",
            json!({"lvs_name": "p", "lvol_name": name, "size_in_mib": size, "exist_ok": true}),
        );
        // No subsystem has it, but for the volumes that say otherwise.
        let mut params = json!({"base_bdev_name": format!("p/{name}"), "name": format!("luks-{name}"), "kms_server": "kms",
            "allow_unauthenticated": true});
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.ok("bdev_luks_create", params);
    }

    fn status(&self, name: &str) -> Value {
        self.ok("bdev_luks_get_status", json!({"name": format!("luks-{name}")}))[0].clone()
    }

    /// Until the volume is that.
    fn becomes(&self, name: &str, state: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status(name);
            if status["state"] == state {
                return status;
            }
            assert!(Instant::now() < deadline, "not {state}: {status}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The volume is raw, for this reason.
    fn raw_because(&self, name: &str, reason: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let s = self.status(name);
            if s["state"] == "raw" && s["reason"].as_str().unwrap_or_default().contains(reason) {
                return;
            }
            assert!(Instant::now() < deadline, "not raw because of {reason}: {s}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn run<F, Fut, T>(&self, bdev: String, core: usize, access: Access, f: F) -> T
    where
        F: FnOnce(cryptfold_bdev::Channel) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let registry = self.control.registry().clone();
        let done = self.control.handles()[core].block_on(move || async move {
            let channel = registry.open(&bdev, access, |_| ()).unwrap().channel().unwrap();
            f(channel).await
        });
        done.unwrap()
    }

    /// A host's writes of 64 KiB each; blocks of zeros are left out.
    fn try_write(&self, name: &str, at: usize, data: &[u8]) -> Result<(), Status> {
        let data = data.to_vec();
        self.run(format!("luks-{name}"), 1, Access::ReadWrite, move |channel| async move {
            for (i, piece) in data.chunks(64 << 10).enumerate() {
                if piece.iter().any(|b| *b != 0) {
                    let lba = (at + i * (64 << 10)) / 4096;
                    channel.write(lba as u64, Buf::from_slice(piece), false).await?;
                }
            }
            channel.flush().await
        })
    }

    /// Also when it has to be looked at first, for however long.
    fn write(&self, name: &str, at: usize, data: &[u8]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.try_write(name, at, data) {
                Err(Status::NAMESPACE_NOT_READY) if Instant::now() < deadline => {}
                result => return result.unwrap(),
            }
        }
    }

    fn read_of(&self, bdev: String, at: usize, len: usize) -> Result<Vec<u8>, Status> {
        self.run(bdev, 0, Access::ReadOnly, move |channel| async move {
            let mut all = Vec::new();
            for start in (at..at + len).step_by(MIB) {
                let step = MIB.min(at + len - start);
                all.extend(
                    channel
                        .read((start / 4096) as u64, (step / 4096) as u64)
                        .await?
                        .to_contiguous()
                        .as_slice(),
                );
            }
            Ok(all)
        })
    }

    fn read(&self, name: &str, at: usize, len: usize) -> Result<Vec<u8>, Status> {
        self.read_of(format!("luks-{name}"), at, len)
    }

    /// What the pool holds.
    fn below(&self, name: &str, at: usize, len: usize) -> Vec<u8> {
        self.read_of(format!("p/{name}"), at, len).unwrap()
    }

    fn discard(&self, name: &str, at: usize, len: usize) {
        self.run(format!("luks-{name}"), 1, Access::ReadWrite, move |channel| async move {
            channel.unmap((at / 4096) as u64, (len / 4096) as u64).await.unwrap();
        });
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.control.shutdown();
    }
}

fn denied() -> Status {
    Status::ACCESS_DENIED.do_not_retry()
}

fn new_key(name: Option<&str>) -> NewObject {
    let name = name.map(str::to_owned);
    NewObject { name, length_bits: 0, usage: 0x0C, policy: Some(SHARED_POLICY.into()) }
}

/// A host whose volume key is at the server, under `name`; its identifier.
fn registered(owner: &Client, host: &Host, name: Option<&str>) -> String {
    let id =
        owner.register(&new_key(name), ObjectType::SymmetricKey, &Secret::new(host.key.clone())).unwrap();
    owner.activate(&id).unwrap();
    id
}

fn import_token(host: &Host, file: &str, id: &str) {
    let token = json!({"type": "cryptfold-kmip", "keyslots": [], "objects": [id]});
    std::fs::write(host.path("token"), token.to_string()).unwrap();
    host.cryptsetup(&format!("token import --json-file token {file}"));
}

/// A file `disk` that the host has encrypted; its plaintext.
fn encrypted(host: &Host, sector: usize) -> Vec<u8> {
    let plain = host.file("disk", 8 * MIB as u64);
    std::fs::OpenOptions::new().write(true).open(host.path("disk")).unwrap().set_len(DISK as u64).unwrap();
    host.cryptsetup(&format!(
        "reencrypt --encrypt {} --cipher aes-xts-plain64 --sector-size {sector} --reduce-device-size 32M disk",
        host.common()
    ));
    plain
}

#[test]
fn ciphertext_of_the_real_tool_is_plaintext_below() {
    let kms = KeyServer::start();
    let owner = kms.client("owner");
    let certificate = kms.authority.client("target");
    let target = Target::new(kms.dir.path(), &kms, &certificate);
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

/// A fresh header on a file of the volume's size, with a token; its 16 MiB.
fn formatted(host: &Host, id: Option<&str>) -> Vec<u8> {
    std::fs::File::create(host.path("disk")).unwrap().set_len(DISK as u64).unwrap();
    host.cryptsetup(&format!(
        "luksFormat {} --cipher aes-xts-plain64 --sector-size 4096 disk",
        host.common()
    ));
    if let Some(id) = id {
        import_token(host, "disk", id);
    }
    header(host)
}

fn header(host: &Host) -> Vec<u8> {
    std::fs::read(host.path("disk")).unwrap()[..16 * MIB].to_vec()
}

#[test]
fn the_life_of_a_volume_its_header_and_its_key() {
    let mut kms = KeyServer::start();
    let owner = kms.client("owner");
    let certificate = kms.authority.client("target");
    let host = Host::new(64);
    let id = registered(&owner, &host, None);
    let first = formatted(&host, Some(&id));
    let data: Vec<u8> = include_bytes!("volumes.rs").repeat(20)[..64 << 10].to_vec();
    let payload = 16 * MIB;
    let mut target = Target::new(kms.dir.path(), &kms, &certificate);
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
    let kms = KeyServer::start();
    let owner = kms.client("owner");
    let certificate = kms.authority.client("target");
    let target = Target::new(kms.dir.path(), &kms, &certificate);
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
    target.volume("late", json!({}));
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
