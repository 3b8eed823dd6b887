//! The blocking interface on real reactors: what the control plane calls.

mod support;

use std::sync::{Arc, mpsc};
use std::time::Duration;

use cryptfold_bdev::{Access, BdevEvent, Registry};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{IdlePolicy, Runtime, RuntimeConfig};
use cryptfold_reduce::{
    Compression, CreateOptions, KeyChange, KeySource, PoolError, PoolManager, VolumeOptions,
};
use support::key;

const MIB: u64 = 1 << 20;

fn runtime(cores: usize) -> Runtime {
    let config = RuntimeConfig {
        cores: vec![0; cores],
        policy: IdlePolicy::Interrupt,
        pin: false,
        ..RuntimeConfig::default()
    };
    Runtime::start(config).unwrap()
}

fn options() -> CreateOptions {
    let mut options = CreateOptions::new(key());
    options.memory_budget = Some(16 * MIB);
    options
}

fn volume(name: &str, size_bytes: u64) -> VolumeOptions {
    VolumeOptions { name: name.into(), size_bytes, ..VolumeOptions::default() }
}

/// Writes (on reactor `core`) blocks that carry `stamp` and their number.
fn write(
    runtime: &Runtime,
    registry: &Arc<Registry>,
    core: usize,
    name: &'static str,
    blocks: u64,
    stamp: u8,
) {
    let registry = registry.clone();
    let done = runtime.handles()[core].block_on(move || async move {
        let channel = registry.open(name, Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        for lba in (0..blocks).step_by(8) {
            let data: Vec<u8> = (lba..lba + 8).flat_map(|n| block(n, stamp)).collect();
            channel.write(lba, Buf::from_slice(&data), false).await.unwrap();
        }
        channel.flush().await.unwrap();
    });
    done.unwrap();
}

fn block(lba: u64, stamp: u8) -> Vec<u8> {
    let mut block = vec![stamp; 4096];
    for (n, word) in block.chunks_mut(64).enumerate() {
        word[..8].copy_from_slice(&(lba * 64 + n as u64 + 1).to_le_bytes());
    }
    block
}

fn verify(
    runtime: &Runtime,
    registry: &Arc<Registry>,
    core: usize,
    name: &'static str,
    blocks: u64,
    stamp: u8,
) {
    let registry = registry.clone();
    let done = runtime.handles()[core].block_on(move || async move {
        let channel = registry.open(name, Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        for lba in (0..blocks).step_by(16) {
            let data = channel.read(lba, 16).await.unwrap().to_contiguous();
            let expected: Vec<u8> = (lba..lba + 16).flat_map(|n| block(n, stamp)).collect();
            assert!(data.as_slice() == expected, "block {lba} of {name}");
        }
    });
    done.unwrap();
}

#[test]
fn a_pool_from_its_making_to_its_end() {
    let runtime = runtime(2);
    let registry = Registry::new();
    support::RamDisk::create(&registry, "ram", 128 * MIB);
    let manager = PoolManager::new(registry.clone(), runtime.handles().to_vec());
    let info = manager.create("ram", "pool", &options()).unwrap();
    assert_eq!((info.name.as_str(), info.base_bdev.as_str()), ("pool", "ram"));
    let a = manager.create_volume("pool", &volume("a", 16 * MIB)).unwrap();
    let b = manager.create_volume(&info.uuid.to_string(), &volume("b", 8 * MIB)).unwrap();
    assert_eq!(registry.get("pool/a").unwrap().name(), a.uuid.to_string());
    assert_eq!(registry.get("pool/a").unwrap().info().product_name, "Cryptfold volume");
    // From the pool's own core and from another one.
    write(&runtime, &registry, 0, "pool/a", 2048, 1);
    write(&runtime, &registry, 1, "pool/b", 2048, 2);
    verify(&runtime, &registry, 1, "pool/a", 2048, 1);
    verify(&runtime, &registry, 0, "pool/b", 2048, 2);
    let report = manager.check("pool", true).unwrap();
    assert!(report.is_clean() && report.blocks == 4096 && report.verified > 100, "{report:?}");

    let resized = manager.resize_volume("pool", "b", 20 * MIB).unwrap();
    assert_eq!(resized.size_bytes, 20 * MIB);
    assert_eq!(registry.get("pool/b").unwrap().blocks(), 5120);
    manager.resize_volume("pool", "b", 4 * MIB).unwrap();
    verify(&runtime, &registry, 0, "pool/b", 1024, 2);
    manager.resize_volume("pool", "b", 8 * MIB).unwrap();
    let space = manager.info("pool").unwrap().space;
    assert_eq!(space.logical_bytes, (2048 + 1024) * 4096);

    // Names and write protection change under whoever has it open.
    let held = registry.open("pool/b", Access::ReadWrite, |_| ()).unwrap();
    manager.rename_volume("pool", "b", "c").unwrap();
    assert!(registry.get("pool/b").is_err());
    verify(&runtime, &registry, 1, "pool/c", 1024, 2);
    manager.set_read_only("pool", "c", true).unwrap();
    assert!(held.bdev().is_read_only());
    manager.set_read_only("pool", "c", false).unwrap();
    assert!(!held.bdev().is_read_only());
    manager.set_compression("pool", Compression::Lz4).unwrap();
    manager.rename("pool", "tank").unwrap();
    assert_eq!(held.bdev().aliases(), ["tank/c"]);
    drop(held);
    manager.create_domain("tank", "tenant").unwrap();
    assert_eq!(manager.domains("tank").unwrap().len(), 2);
    manager.close("tank").unwrap();
    assert!(registry.get(&a.uuid.to_string()).is_err() && manager.list().is_empty());

    let again = manager.open("ram", &key(), Some(16 * MIB)).unwrap().unwrap();
    assert_eq!((again.name.as_str(), again.volumes, again.domains), ("tank", 2, 2));
    assert_eq!(again.compression, "lz4");
    verify(&runtime, &registry, 1, "tank/a", 2048, 1);
    verify(&runtime, &registry, 0, "tank/c", 1024, 2);
    snapshots(&runtime, &registry, &manager);
    manager.delete_volume("tank", &b.uuid.to_string()).unwrap();
    assert_eq!(manager.volumes("tank").unwrap().len(), 1);
    manager.destroy("tank").unwrap();
    assert!(manager.open("ram", &key(), None).unwrap().is_none());
    manager.create("ram", "next", &options()).unwrap();
    manager.shutdown();
    assert!(manager.list().is_empty());
    runtime.stop();
}

/// From another core than the pool's, too.
fn snapshots(runtime: &Runtime, registry: &Arc<Registry>, manager: &PoolManager) {
    let snapshot = manager.snapshot_volume("tank", "a", "then").unwrap();
    manager.clone_volume("tank", "then", "twin").unwrap();
    let lvol = |name: &str| registry.get(name).unwrap().device().driver_specific()["lvol"].clone();
    assert_eq!(lvol("tank/then")["clones"], serde_json::json!(["a", "twin"]));
    assert_eq!(lvol("tank/a")["base_snapshot"], "then");
    assert!(registry.get(&snapshot.uuid.to_string()).unwrap().is_read_only());
    write(runtime, registry, 1, "tank/a", 512, 3);
    write(runtime, registry, 0, "tank/twin", 256, 4);
    for core in 0..2 {
        verify(runtime, registry, core, "tank/a", 512, 3);
        verify(runtime, registry, core, "tank/then", 2048, 1);
        verify(runtime, registry, core, "tank/twin", 256, 4);
    }
    let refused = manager.delete_volume("tank", "then").unwrap_err();
    assert_eq!((refused.code(), refused.to_string().contains("a, twin")), (-1, true), "{refused}");
    assert!(matches!(manager.set_read_only("tank", "then", false), Err(PoolError::Invalid(_))));
    let owned = manager.own_volume("tank", "twin", false).unwrap();
    assert_eq!((owned.parent, owned.logical_bytes), (None, 2048 * 4096));
    manager.delete_volume("tank", "then").unwrap();
    manager.delete_volume("tank", "twin").unwrap();
    assert!(manager.check("tank", true).unwrap().is_clean());
}

#[test]
fn refusals_are_clear_and_change_nothing() {
    let runtime = runtime(1);
    let registry = Registry::new();
    support::RamDisk::create(&registry, "ram", 64 * MIB);
    support::RamDisk::create(&registry, "small", 8 * MIB);
    let manager = PoolManager::new(registry.clone(), runtime.handles().to_vec());
    let text = |error: PoolError| error.to_string();
    let missing = CreateOptions::new(KeySource::File("/nowhere/key".into()));
    assert!(text(manager.create("ram", "p", &missing).unwrap_err()).contains("/nowhere/key"));
    let weak = CreateOptions::new(KeySource::Bytes(vec![7; 32]));
    assert!(text(manager.create("ram", "p", &weak).unwrap_err()).contains("equal"));
    assert!(text(manager.create("nothing", "p", &options()).unwrap_err()).contains("nothing"));
    assert!(matches!(manager.create("small", "p", &options()), Err(PoolError::TooSmall { .. })));
    let mut bad = options();
    bad.segment_bytes = Some(3 * MIB as u32);
    assert!(matches!(manager.create("ram", "p", &bad), Err(PoolError::Invalid(_))));
    bad = options();
    bad.memory_budget = Some(4096);
    assert!(matches!(manager.create("ram", "p", &bad), Err(PoolError::Invalid(_))));
    assert!(manager.open("ram", &key(), None).unwrap().is_none(), "nothing was written");

    manager.create("ram", "p", &options()).unwrap();
    assert!(matches!(manager.create("small", "p", &options()), Err(PoolError::PoolExists(_))));
    assert!(matches!(manager.info("q"), Err(PoolError::NoPool(_))));
    assert!(matches!(manager.volume("p", "v"), Err(PoolError::NoVolume { .. })));
    manager.create_volume("p", &volume("v", MIB)).unwrap();
    assert!(matches!(manager.create_volume("p", &volume("v", MIB)), Err(PoolError::VolumeExists { .. })));
    manager.create_volume("p", &volume("w", MIB)).unwrap();
    assert!(matches!(manager.rename_volume("p", "v", "w"), Err(PoolError::VolumeExists { .. })));
    assert!(registry.get("p/v").is_ok(), "a refused renaming leaves the volume where it was");
    // A volume in somebody's hands is not taken away.
    let held = registry.open("p/v", Access::ReadWrite, |_| ()).unwrap();
    held.claim("a test").unwrap();
    assert!(text(manager.delete_volume("p", "v").unwrap_err()).contains("a test"));
    drop(held);
    manager.delete_volume("p", "v").unwrap();
    manager.close("p").unwrap();
    assert!(matches!(manager.create("ram", "p", &options()), Err(PoolError::Foreign { .. })));
    let wrong = KeySource::Bytes((1..33).collect());
    assert!(matches!(manager.open("ram", &wrong, None), Err(PoolError::WrongKey { .. })));
    assert_eq!(manager.open("ram", &key(), Some(16 * MIB)).unwrap().unwrap().volumes, 1);
    manager.shutdown();
    runtime.stop();
}

/// Real programs of this machine: what is stored is about what zstd makes of their distinct blocks.
#[test]
fn reduces_real_files() {
    let runtime = runtime(1);
    let registry = Registry::new();
    support::RamDisk::create(&registry, "ram", 192 * MIB);
    let manager = PoolManager::new(registry.clone(), runtime.handles().to_vec());
    manager.create("ram", "p", &options()).unwrap();
    let mut image = Vec::new();
    let mut names: Vec<_> = std::fs::read_dir("/usr/bin").unwrap().flatten().map(|e| e.path()).collect();
    names.sort();
    for name in names {
        if image.len() < 48 << 20
            && let Ok(bytes) = std::fs::read(&name)
        {
            image.extend_from_slice(&bytes);
            image.resize(image.len().next_multiple_of(4096), 0);
        }
    }
    image.truncate(48 << 20);
    if image.len() < 8 << 20 {
        println!("this machine has too few programs for this test");
        return;
    }
    let image = Arc::new(image);
    for name in ["one", "two"] {
        manager.create_volume("p", &volume(name, 64 * MIB)).unwrap();
        let (registry, image) = (registry.clone(), image.clone());
        let done = runtime.handles()[0].block_on(move || async move {
            let name = format!("p/{name}");
            let channel = registry.open(&name, Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
            for (n, part) in image.chunks(128 << 10).enumerate() {
                channel.write(n as u64 * 32, Buf::from_slice(part), false).await.unwrap();
            }
            for (n, part) in image.chunks(256 << 10).enumerate() {
                let blocks = part.len() as u64 / 4096;
                let found = channel.read(n as u64 * 64, blocks).await.unwrap().to_contiguous();
                assert!(found.as_slice() == part, "part {n}");
            }
        });
        done.unwrap();
    }
    manager.checkpoint("p").unwrap();
    let info = manager.info("p").unwrap();
    let distinct: std::collections::HashSet<&[u8]> =
        image.chunks(4096).filter(|c| c.chunks(8).any(|w| w != &c[..8])).collect();
    assert_eq!(info.space.unique_bytes, distinct.len() as u64 * 4096);
    assert_eq!(info.space.logical_bytes, 2 * image.len() as u64);
    // What zstd makes of the same, 64 KiB at a time and without our headers.
    let plain: Vec<u8> = distinct.iter().flat_map(|c| c.iter().copied()).collect();
    println!(
        "{} MiB twice: unique {} MiB, stored {} MiB, metadata {} KiB, ratio {:.2} ({:.2} without zeros)",
        image.len() >> 20,
        plain.len() >> 20,
        info.space.stored_bytes >> 20,
        info.space.metadata_bytes >> 10,
        info.space.ratio(),
        info.space.ratio_without_zeroes()
    );
    assert!(info.space.ratio() > 3.0, "{:?}", info.space);
    assert!(info.space.metadata_bytes * 20 < info.space.stored_bytes, "{:?}", info.space);
    assert!(manager.check("p", true).unwrap().is_clean());
    manager.shutdown();
    runtime.stop();
}

#[test]
fn a_domain_with_a_volume_in_use_is_not_erased_and_its_others_are_served() {
    let runtime = runtime(1);
    let registry = Registry::new();
    support::RamDisk::create(&registry, "ram", 128 * MIB);
    let manager = PoolManager::new(registry.clone(), runtime.handles().to_vec());
    manager.create("ram", "pool", &options()).unwrap();
    manager.create_domain("pool", "tenant").unwrap();
    for name in ["a", "b"] {
        let options = VolumeOptions { domain: Some("tenant".into()), ..volume(name, 4 * MIB) };
        manager.create_volume("pool", &options).unwrap();
    }
    write(&runtime, &registry, 0, "pool/a", 64, 1);
    // Somebody does not let go of a volume that is being removed already.
    let held = registry.open("pool/b", Access::ReadWrite, |_| ()).unwrap();
    let _removal = registry.unregister("pool/b").unwrap();
    assert!(manager.erase_domain("pool", "tenant").is_err());
    verify(&runtime, &registry, 0, "pool/a", 64, 1);
    drop(held);
    manager.erase_domain("pool", "tenant").unwrap();
    assert!(registry.get("pool/a").is_err() && manager.volumes("pool").unwrap().is_empty());
    manager.close("pool").unwrap();
}

/// Longest wait for what has to happen, on a machine that is busy.
const LONG: Duration = Duration::from_secs(120);

/// The pool kept its device open until somebody closed it, so a drive that was unplugged never went.
#[test]
fn a_pool_whose_device_goes_is_closed_when_its_hosts_have_let_go() {
    let runtime = runtime(2);
    let registry = Registry::new();
    support::RamDisk::create(&registry, "ram", 128 * MIB);
    support::RamDisk::create(&registry, "other", 128 * MIB);
    let manager = PoolManager::new(registry.clone(), runtime.handles().to_vec());
    for (disk, name) in [("ram", "pool"), ("other", "stays")] {
        manager.create(disk, name, &options()).unwrap();
        manager.create_volume(name, &volume("a", 4 * MIB)).unwrap();
    }
    manager.create_volume("pool", &volume("b", 4 * MIB)).unwrap();
    write(&runtime, &registry, 0, "pool/a", 64, 1);
    // A host on each core that writes until the volume refuses, and lets go when it is told to.
    let hosts: Vec<_> = [(0, "pool/a"), (1, "pool/b")]
        .into_iter()
        .map(|(core, name)| {
            let (registry, (tell, told)) = (registry.clone(), mpsc::channel());
            let (started, start) = mpsc::channel();
            runtime.handles()[core].send(move || {
                cryptfold_reactor::spawn_local(async move {
                    let open = registry.open(name, Access::ReadWrite, move |event| tell.send(event).unwrap());
                    let channel = open.unwrap().channel().unwrap();
                    while channel.write(0, Buf::from_slice(&block(0, 2)), true).await.is_ok() {
                        let _ = started.send(());
                    }
                    while told.try_recv() != Ok(BdevEvent::Removed) {
                        cryptfold_reactor::sleep(Duration::from_millis(1)).await;
                    }
                })
                .detach();
            });
            start
        })
        .collect();
    hosts.iter().for_each(|start| start.recv_timeout(LONG).unwrap());
    assert!(registry.unregister("ram").unwrap().wait(LONG), "its pool has it open");
    let left: Vec<String> = manager.list().into_iter().map(|pool| pool.name).collect();
    assert_eq!(left, ["stays"]);
    // It is told of until somebody has seen that.
    assert!(matches!(&manager.lost()[..], [lost] if lost.name == "pool" && lost.base_bdev == "ram"));
    assert!(manager.forget_lost("pool") && !manager.forget_lost("pool") && manager.lost().is_empty());
    assert!(registry.get("pool/a").is_err() && registry.get("pool/b").is_err());
    write(&runtime, &registry, 1, "stays/a", 64, 3);
    verify(&runtime, &registry, 0, "stays/a", 64, 3);
    manager.shutdown();
    runtime.stop();
}

/// Whenever the device goes while its pool is opened, nothing stays.
#[test]
fn a_device_goes_while_its_pool_is_opened() {
    let runtime = runtime(1);
    let registry = Registry::new();
    let manager = PoolManager::new(registry.clone(), runtime.handles().to_vec());
    let disk = support::RamDisk::create(&registry, "ram", 64 * MIB);
    manager.create("ram", "pool", &options()).unwrap();
    manager.create_volume("pool", &volume("a", 4 * MIB)).unwrap();
    write(&runtime, &registry, 0, "pool/a", 64, 1);
    manager.close("pool").unwrap();
    disk.after(u64::MAX, || ());
    manager.open("ram", &key(), Some(16 * MIB)).unwrap();
    let all = u64::MAX - disk.disarm().unwrap();
    manager.close("pool").unwrap();
    // After the last one it is open.
    for nth in [1, all / 2, all - 1, all] {
        let (removed, removal) = mpsc::channel();
        let gone = registry.clone();
        disk.after(nth, move || removed.send(gone.unregister("ram").unwrap()).unwrap());
        let opened = manager.open("ram", &key(), Some(16 * MIB));
        if disk.disarm().is_none() {
            let removal = removal.recv_timeout(LONG).unwrap();
            assert!(removal.wait(LONG), "at I/O {nth}: still open after {opened:?}");
            assert!(manager.list().is_empty() && registry.get("pool/a").is_err(), "at I/O {nth}");
            registry.register(disk.clone()).unwrap();
        } else {
            manager.close("pool").unwrap();
        }
    }
    manager.open("ram", &key(), Some(16 * MIB)).unwrap();
    assert_eq!(manager.lost(), [], "it is back");
    verify(&runtime, &registry, 0, "pool/a", 64, 1);
    manager.shutdown();
    runtime.stop();
}

/// The record of a host's key changes only while nothing is stored behind the header, survives, and is inherited.
#[test]
fn the_record_of_a_hosts_key_goes_with_what_is_stored_under_it() {
    let runtime = runtime(1);
    let registry = Registry::new();
    support::RamDisk::create(&registry, "ram", 64 * MIB);
    let manager = PoolManager::new(registry.clone(), runtime.handles().to_vec());
    manager.create("ram", "p", &options()).unwrap();
    manager.create_volume("p", &volume("v", 16 * MIB)).unwrap();
    let set = |volume: &str, from, record: Option<&[u8]>| {
        manager.set_host_key("p", volume, from, record.map(<[u8]>::to_vec)).unwrap()
    };
    let of = |volume: &str| manager.volume("p", volume).unwrap().host_key;
    let header = 2 * MIB + 4096;
    write(&runtime, &registry, 0, "p/v", 512, 1);
    assert!(!set("v", 2 * MIB - 4096, Some(b"early")), "its last block is stored");
    assert_eq!(of("v"), None);
    let empty = |from| manager.is_empty_behind("p", "v", from).unwrap();
    assert!(!empty(0) && !empty(2 * MIB - 4096) && empty(2 * MIB) && empty(1 << 40));
    assert!(set("v", header, Some(b"first")) && set("v", header, Some(b"second")));
    assert!(manager.set_host_key("p", "v", header, Some(Vec::new())).is_err());

    // Stored under it now: it stays, through a crash's replay, a checkpoint and in what is derived.
    write(&runtime, &registry, 0, "p/v", 600, 1);
    assert!(!set("v", header, None) && !set("v", header, Some(b"third")));
    manager.snapshot_volume("p", "v", "then").unwrap();
    manager.clone_volume("p", "then", "twin").unwrap();
    manager.close("p").unwrap();
    manager.open("ram", &key(), Some(16 * MIB)).unwrap().unwrap();
    for name in ["v", "then", "twin"] {
        assert_eq!(of(name).as_deref(), Some(&b"second"[..]), "{name}");
    }
    assert!(!set("twin", 8 * MIB, None), "a clone has what its snapshot has");
    assert!(!set("then", 8 * MIB, None), "a snapshot has what its volume has");

    // Given up: free for another one.
    let registry2 = registry.clone();
    let given_up = runtime.handles()[0].block_on(move || async move {
        let channel = registry2.open("p/v", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        channel.unmap(header / 4096, 3000).await.unwrap();
    });
    given_up.unwrap();
    assert!(set("v", header, None));
    assert_eq!((of("v"), of("then").as_deref()), (None, Some(&b"second"[..])));
    verify(&runtime, &registry, 0, "p/v", 512, 1);
    assert!(manager.check("p", true).unwrap().is_clean());
    manager.shutdown();
    runtime.stop();
}

#[test]
fn a_fips_mode_makes_and_opens_its_own_pools_only() {
    let runtime = runtime(1);
    let registry = Registry::new();
    support::RamDisk::create(&registry, "ram", 64 * MIB);
    support::RamDisk::create(&registry, "other", 64 * MIB);
    let plain = PoolManager::new(registry.clone(), runtime.handles().to_vec());
    assert!(!plain.create("ram", "p", &options()).unwrap().approved);
    plain.close("p").unwrap();

    let strict = PoolManager::new(registry.clone(), runtime.handles().to_vec());
    strict.require_approved();
    assert!(!strict.peek("ram").unwrap().unwrap().approved);
    let refused = strict.open("ram", &key(), None).unwrap_err();
    assert!(matches!(refused, PoolError::NotApproved { .. }));
    assert!(refused.to_string().contains("--fips-mode off"), "{refused}");
    let open = CreateOptions { key: KeySource::Open, ..options() };
    assert!(strict.create("other", "q", &open).unwrap_err().to_string().contains("encrypted"));
    assert!(strict.create("other", "q", &options()).unwrap().approved);
    strict.create_volume("q", &volume("v", MIB)).unwrap();
    write(&runtime, &registry, 0, "q/v", 64, 5);
    let off = strict.change_domain_keys("q", None, KeyChange::Disable, 1 << 30).unwrap_err();
    assert!(off.to_string().contains("always encrypted"), "{off}");
    strict.close("q").unwrap();

    // Outside of the mode both open.
    assert!(plain.open("ram", &key(), None).unwrap().is_some());
    assert!(plain.open("other", &key(), None).unwrap().is_some_and(|info| info.approved));
    verify(&runtime, &registry, 0, "q/v", 64, 5);
    plain.close("p").unwrap();
    plain.close("q").unwrap();
}
