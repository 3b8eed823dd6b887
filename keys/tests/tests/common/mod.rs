//! A target of this process with volumes on which hosts put LUKS2, and what hosts write there.

#![allow(dead_code, missing_docs)]

pub mod remote;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptfold_bdev::{Access, Status};
use cryptfold_control::jsonrpc::Handler as _;
use cryptfold_control::{Control, ControlConfig};
use cryptfold_keys_tests::cryptsetup::Host;
use cryptfold_keys_tests::{KeyServer, SHARED_POLICY};
use cryptfold_kmip::{Client, NewObject, ObjectType, Secret};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{IdlePolicy, MemoryConfig};
use serde_json::{Value, json};

pub const MIB: usize = 1 << 20;
pub const DISK: usize = 40 * MIB;
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A target of this process with a pool in a file.
pub struct Target {
    pub control: Arc<Control>,
}

impl Target {
    pub fn new(dir: &Path, kms: &KeyServer, certificate: &(PathBuf, PathBuf)) -> Target {
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
                "cert_file": certificate.0, "key_file": certificate.1, "rounds": 1, "timeout_ms": 600000, "connect_timeout_ms": 600000,
                "poll_interval_ms": 200}),
        );
        target.ok("bdev_uring_create", json!({"name": "disk", "filename": file, "block_size": 4096}));
        target
            .ok("bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p", "exist_ok": true}));
        target
    }

    pub fn call(&self, method: &str, params: Value) -> Result<Value, (i64, String)> {
        self.control.call(method, Some(&params)).map_err(|e| (e.code, e.message))
    }

    pub fn ok(&self, method: &str, params: Value) -> Value {
        self.call(method, params).unwrap_or_else(|e| panic!("{method}: {e:?}"))
    }

    /// The volume `name` and the device `luks-NAME` on it.
    pub fn volume(&self, name: &str, more: Value) {
        let size = DISK / MIB;
        self.ok(
            "bdev_lvol_create",
            json!({"lvs_name": "p", "lvol_name": name, "size_in_mib": size, "exist_ok": true}),
        );
        self.luks(name, more);
    }

    /// The device `luks-NAME` on a volume that is there.
    pub fn luks(&self, name: &str, more: Value) {
        // No subsystem has it, but for the volumes that say otherwise.
        let mut params = json!({"base_bdev_name": format!("p/{name}"), "name": format!("luks-{name}"), "kms_server": "kms",
            "allow_unauthenticated": true});
        params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.ok("bdev_luks_create", params);
    }

    pub fn status(&self, name: &str) -> Value {
        self.ok("bdev_luks_get_status", json!({"name": format!("luks-{name}")}))[0].clone()
    }

    /// Until the volume is that.
    pub fn becomes(&self, name: &str, state: &str) -> Value {
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
    pub fn raw_because(&self, name: &str, reason: &str) {
        self.is_because(name, "raw", reason);
    }

    /// Until the volume is that, for this reason.
    pub fn is_because(&self, name: &str, state: &str, reason: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let s = self.status(name);
            if s["state"] == state && s["reason"].as_str().unwrap_or_default().contains(reason) {
                return s;
            }
            assert!(Instant::now() < deadline, "not {state} because of {reason}: {s}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn run<F, Fut, T>(&self, bdev: String, core: usize, access: Access, f: F) -> T
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
    pub fn try_write(&self, name: &str, at: usize, data: &[u8]) -> Result<(), Status> {
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
    pub fn write(&self, name: &str, at: usize, data: &[u8]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.try_write(name, at, data) {
                Err(Status::NAMESPACE_NOT_READY) if Instant::now() < deadline => {}
                result => return result.unwrap(),
            }
        }
    }

    pub fn read_of(&self, bdev: String, at: usize, len: usize) -> Result<Vec<u8>, Status> {
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

    pub fn read(&self, name: &str, at: usize, len: usize) -> Result<Vec<u8>, Status> {
        self.read_of(format!("luks-{name}"), at, len)
    }

    /// What the pool holds.
    pub fn below(&self, name: &str, at: usize, len: usize) -> Vec<u8> {
        self.read_of(format!("p/{name}"), at, len).unwrap()
    }

    pub fn discard(&self, name: &str, at: usize, len: usize) {
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

/// A key server, its keys' owner, the certificate that targets have, and a target with an empty pool.
pub fn start() -> (KeyServer, Client, (PathBuf, PathBuf), Target) {
    let kms = KeyServer::start();
    let owner = kms.client("owner");
    let certificate = kms.authority.client("target");
    let target = Target::new(kms.dir.path(), &kms, &certificate);
    (kms, owner, certificate, target)
}

pub fn denied() -> Status {
    Status::ACCESS_DENIED.do_not_retry()
}

pub fn new_key(name: Option<&str>) -> NewObject {
    let name = name.map(str::to_owned);
    NewObject { name, length_bits: 0, usage: 0x0C, policy: Some(SHARED_POLICY.into()) }
}

/// A host whose volume key is at the server, under `name`; its identifier.
pub fn registered(owner: &Client, host: &Host, name: Option<&str>) -> String {
    let id =
        owner.register(&new_key(name), ObjectType::SymmetricKey, &Secret::new(host.key.clone())).unwrap();
    owner.activate(&id).unwrap();
    id
}

/// Another object takes the place of the one that the header names.
pub fn replace_token(host: &Host, file: &str, id: &str) {
    host.cryptsetup(&format!("token remove --token-id 0 {file}"));
    import_token(host, file, id);
}

pub fn import_token(host: &Host, file: &str, id: &str) {
    let token = json!({"type": "cryptfold-kmip", "keyslots": [], "objects": [id]});
    std::fs::write(host.path("token"), token.to_string()).unwrap();
    host.cryptsetup(&format!("token import --json-file token {file}"));
}

/// Encrypts the file `disk` in place, as the host does that, and makes it as large as a volume: its header is in front then.
pub fn encrypt(host: &Host, sector: usize) {
    std::fs::OpenOptions::new().write(true).open(host.path("disk")).unwrap().set_len(DISK as u64).unwrap();
    host.cryptsetup(&format!(
        "reencrypt --encrypt {} --cipher aes-xts-plain64 --sector-size {sector} --reduce-device-size 32M disk",
        host.common()
    ));
}

/// A fresh header on a file of the volume's size, with a token; its 16 MiB.
pub fn formatted(host: &Host, id: Option<&str>) -> Vec<u8> {
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

pub fn header(host: &Host) -> Vec<u8> {
    std::fs::read(host.path("disk")).unwrap()[..16 * MIB].to_vec()
}

/// Until there is something; what it is.
pub fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "it did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}
