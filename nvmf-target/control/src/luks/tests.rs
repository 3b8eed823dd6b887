//! Looks one by one, without a thread of the volume and without a key server.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Instant;

use cryptfold_luks2::testing;
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{IdlePolicy, MemoryConfig};

use super::*;
use crate::ControlConfig;
use crate::jsonrpc::Handler as _;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(120);

struct Bench {
    c: Arc<Control>,
    v: Arc<Volume>,
    _dir: tempfile::TempDir,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.c.shutdown();
    }
}

/// What cryptsetup writes, as far as it counts: two copies, a digest with this salt (which nothing is proven against).
fn header(payload_offset: u64, salt: &str) -> Vec<u8> {
    const COPY: usize = 16 << 10;
    let json = json!({
        "keyslots": {"0": {"type": "luks2", "key_size": 64, "kdf": {}, "af": {}, "area": {}}},
        "tokens": {},
        "segments": {"0": {"type": "crypt", "offset": payload_offset.to_string(), "size": "dynamic", "iv_tweak": "0",
            "encryption": "aes-xts-plain64", "sector_size": 4096}},
        "digests": {"0": {"type": "pbkdf2", "keyslots": ["0"], "segments": ["0"], "hash": "sha256", "iterations": 1000,
            "salt": salt, "digest": "po7Dyin8yWDVmfh8FOjtJrcJM0ddq9KiOFJQ5X21Q0A="}},
        "config": {"json_size": "12288", "keyslots_size": "16744448"}
    })
    .to_string();
    let mut area = vec![0; 2 * COPY];
    for (at, magic) in [(0, b"LUKS\xba\xbe\0\x02"), (COPY, b"SKUL\xba\xbe\0\x02")] {
        let copy = &mut area[at..at + COPY];
        copy[..8].copy_from_slice(magic);
        copy[8..16].copy_from_slice(&(COPY as u64).to_be_bytes());
        copy[16..24].copy_from_slice(&5u64.to_be_bytes());
        copy[168..204].copy_from_slice(b"aee8f3f8-4de0-4d78-99c2-0b076776073d");
        copy[256..264].copy_from_slice(&(at as u64).to_be_bytes());
        copy[4096..4096 + json.len()].copy_from_slice(json.as_bytes());
        testing::stamp(&mut area, at);
    }
    area
}

const SALT: &str = "c2FsdHNhbHRzYWx0c2FsdHNhbHRzYWx0c2FsdHNhbHQ=";
const OTHER_SALT: &str = "cGVwcGVycGVwcGVycGVwcGVycGVwcGVycGVwcGVyISE=";

impl Bench {
    /// A volume with the device `luks` on it. `prepare` has the volume before that.
    fn new(prepare: impl FnOnce(&Arc<Control>, &std::path::Path)) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let c = Control::new(ControlConfig {
            idle: IdlePolicy::Interrupt,
            pin: false,
            memory: MemoryConfig { hugepages: false, fixed_buffers: false, arena_bytes: 4 << 20 },
            key_dir: dir.path().join("keys"),
            ..ControlConfig::default()
        });
        c.initialize().unwrap();
        let file = dir.path().join("disk");
        std::fs::File::create(&file).unwrap().set_len(128 << 20).unwrap();
        ok(&c, "bdev_uring_create", json!({"name": "disk", "filename": file, "block_size": 4096}));
        ok(&c, "bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p"}));
        ok(&c, "bdev_lvol_create", json!({"lvs_name": "p", "lvol_name": "v", "size_in_mib": 40}));
        prepare(&c, dir.path());
        let base = c.registry.get("p/v").unwrap();
        let (_, info) = crate::methods::find_volume(&c, base.name()).unwrap();
        let device =
            LuksOptions { name: "luks".into(), base_bdev_name: "p/v".into(), uuid: None, params: json!({}) };
        let (_, switch) = cryptfold_bdev_crypto::luks::create(&c.registry, device).unwrap();
        let options = Options {
            name: "luks".into(),
            base_bdev_name: "p/v".into(),
            kms_server: "nowhere".into(),
            allow_unauthenticated: true,
            allowed_hosts: Vec::new(),
            max_iterations: 1000,
            late_mb_s: 1,
            uuid: None,
        };
        let v = Arc::new(Volume {
            base: base.name().to_owned(),
            pool: c.pools().unwrap().manager().info(&info.pool).unwrap().uuid.to_string(),
            volume: info.uuid.to_string(),
            open_to: Mutex::default(),
            strangers: AtomicBool::new(false),
            gate: Mutex::default(),
            trial: Mutex::default(),
            snapshot: false,
            pass: Mutex::default(),
            unkeyed_from: AtomicU64::new(u64::MAX),
            switch,
            options,
        });
        let bench = Bench { c, v, _dir: dir };
        bench.look();
        bench
    }

    fn write(&self, at: u64, data: Vec<u8>) {
        write(&self.c, "luks", at, data);
    }

    /// Looks until nothing is held back any more. What people are told then.
    fn look(&self) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let Wake::Look(look) = self.v.switch.wait(Some(Duration::ZERO)) else { panic!("it has ended") };
            let verdict = self.v.look(&self.c, look);
            self.v.act(&self.c, verdict, look);
            if self.v.switch.settle(look) {
                return self.v.switch.status();
            }
            assert!(Instant::now() < deadline, "looks do not end");
        }
    }

    /// Looks until it is so.
    fn looks(&self, mut is: impl FnMut(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.look();
            if is(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "{status}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn found(&self, header: &[u8]) -> Found {
        self.v.understand(&self.c, Header::parse(header).unwrap()).unwrap()
    }

    /// As if the header had been changed just when the record of its key had become durable.
    fn record(&self, header: &[u8]) {
        let stored = Stored {
            mixed: true,
            converting: true,
            ..Stored::of(&self.found(header).payload, vec!["1".into()])
        };
        self.v.store(&self.c, &stored).unwrap();
    }

    fn has_record(&self) -> bool {
        let manager = self.c.pools().unwrap().manager();
        manager.volume(&self.v.pool, &self.v.volume).unwrap().host_key.is_some()
    }

    fn is_raw(&self) -> bool {
        matches!(self.v.switch.layer(), Layer::Raw)
    }
}

fn ok(c: &Control, method: &str, params: Value) {
    c.call(method, Some(&params)).unwrap_or_else(|e| panic!("{method}: {}", e.message));
}

fn write(c: &Control, name: &'static str, at: u64, data: Vec<u8>) {
    let registry = c.registry.clone();
    let done = c.handles()[0].block_on(move || async move {
        let channel = registry.open(name, Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        channel.write(at / BLOCK_BYTES, Buf::from_slice(&data), false).await
    });
    done.unwrap().unwrap();
}

/// A block of an operator's device, at 17 MiB.
fn keyed(c: &Arc<Control>, dir: &std::path::Path) {
    let key: Vec<u8> = (0..64).collect();
    std::fs::write(dir.join("key"), key).unwrap();
    std::fs::set_permissions(dir.join("key"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let over = json!({"base_bdev_name": "p/v", "name": "over", "key_file": dir.join("key"), "sector_size": 4096,
        "payload_offset": 16 * MIB});
    ok(c, "bdev_hostcrypt_create", over);
    write(c, "over", 17 * MIB, vec![0x5A; 8192]);
    ok(c, "bdev_hostcrypt_delete", json!({"name": "over"}));
}

/// Once the record was durable, the key of a volume that was raw still was fetched while its writes were held back.
#[test]
fn a_header_that_changes_while_it_is_bound_holds_nothing_back() {
    let bench = Bench::new(|_, _| ());
    let header = header(16 * MIB, SALT);
    bench.write(20 * MIB, vec![1; 4096]);
    bench.write(0, header.clone());
    assert_eq!(bench.look()["state"], "raw");
    bench.record(&header);
    bench.write(0, header);
    // On a thread of its own, with the record.
    bench.looks(|status| {
        assert!(bench.is_raw() && status["state"] == "raw", "{status}");
        lock(&bench.v.trial).as_ref().is_some_and(|trial| trial.has_record())
    });
    let status = bench.looks(|status| status["reason"] != PROVING);
    assert!(bench.is_raw() && status["reason"].as_str().unwrap().contains("nowhere"), "{status}");
    bench.write(20 * MIB, vec![2; 4096]);
    assert!(bench.has_record());
}

/// Such a volume was shut, with a status that hosts do not try again after, and its whole map was asked whether it may be raw, which
/// it had been all the time.
#[test]
fn another_header_while_it_is_bound_leaves_it_raw() {
    // What the map would say.
    let bench = Bench::new(keyed);
    let first = header(16 * MIB, SALT);
    for second in [header(16 * MIB, OTHER_SALT), vec![0; 32 << 10]] {
        bench.write(0, first.clone());
        assert_eq!(bench.look()["state"], "raw");
        bench.record(&first);
        bench.write(0, second);
        let status = bench.look();
        assert!(bench.is_raw() && status["state"] == "raw", "{status}");
        assert!(!bench.has_record());
        bench.write(20 * MIB, vec![1; 4096]);
    }
    // A record without such blocks is of blocks that are all under its key.
    bench.write(0, first.clone());
    bench.look();
    bench.v.store(&bench.c, &Stored::of(&bench.found(&first).payload, Vec::new())).unwrap();
    bench.write(0, header(16 * MIB, OTHER_SALT));
    assert_eq!(bench.look()["state"], "fenced");
    assert!(bench.has_record());
}

/// That a payload has no blocks of unknown keys was taken for true of another header's, which began before it.
#[test]
fn blocks_of_unknown_keys_are_found_by_each_header() {
    let bench = Bench::new(keyed);
    let [near, middle, far] = [16, 18, 24].map(|at| bench.found(&header(at * MIB, SALT)));
    let check = |found: &Found| bench.v.check_unkeyed(&bench.c, found, || true);
    let not_yet = bench.v.check_unkeyed(&bench.c, &far, || false);
    assert!(matches!(not_yet, Err(Unproven::NotYet(_))), "{not_yet:?}");
    check(&far).unwrap();
    let refused = check(&near);
    assert!(matches!(refused, Err(Unproven::Refused(_))), "{refused:?}");
    check(&middle).unwrap();
    // Known by now.
    bench.v.check_unkeyed(&bench.c, &far, || false).unwrap();
    assert!(matches!(check(&near), Err(Unproven::Refused(_))));
}

/// A map may be large: it is gone through for a key that is there, not again and again for one that is not.
#[test]
fn the_key_comes_before_the_map() {
    let bench = Bench::new(keyed);
    bench.write(0, header(16 * MIB, SALT));
    let status = bench.looks(|status| status["reason"] != PROVING);
    assert!(status["reason"].as_str().unwrap().contains("nowhere"), "{status}");
    assert!(bench.is_raw());
}
