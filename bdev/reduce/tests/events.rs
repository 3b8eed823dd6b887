//! What a pool tells without being asked: room, capacity, failure, its end; and what of a volume has content.

mod support;

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cryptfold_bdev::{Access, Op, Registry, Room, Status};
use cryptfold_bdev_error::{ErrorOptions, Injection, Kind};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{IdlePolicy, Runtime, RuntimeConfig};
use cryptfold_reduce::{CreateOptions, KeySource, PoolEvent, PoolManager, VolumeOptions};

const MIB: u64 = 1 << 20;
/// Longest wait for what has to happen, on a machine that is busy.
const LONG: Duration = Duration::from_secs(120);

/// One reactor, a pool `pool` with a volume `a` on a disk that can be made to fail.
struct Rig {
    manager: Arc<PoolManager>,
    registry: Arc<Registry>,
    disk: String,
    events: Receiver<(String, PoolEvent)>,
    runtime: Runtime,
}

impl Rig {
    fn new() -> Rig {
        let config = RuntimeConfig {
            cores: vec![0],
            policy: IdlePolicy::Interrupt,
            pin: false,
            ..RuntimeConfig::default()
        };
        let runtime = Runtime::start(config).unwrap();
        let registry = Registry::new();
        support::RamDisk::create(&registry, "ram", 192 * MIB);
        // The rest is what it grows by.
        registry.get("ram").unwrap().set_blocks(96 * MIB / 4096);
        let layer = ErrorOptions { base_name: "ram".into(), uuid: None };
        let disk = cryptfold_bdev_error::create(&registry, layer).unwrap().name().to_owned();
        let manager = PoolManager::new(registry.clone(), runtime.handles().to_vec());
        let (tell, events) = channel();
        let tell = Mutex::new(tell);
        manager.listen(move |pool, event| {
            // A test that has ended does not want to know.
            let _ = tell.lock().unwrap().send((pool.to_owned(), event));
        });
        let mut options = CreateOptions::new(KeySource::Bytes((0..32).collect()));
        options.memory_budget = Some(16 * MIB);
        manager.create(&disk, "pool", &options).unwrap();
        let volume = VolumeOptions { name: "a".into(), size_bytes: 256 * MIB, ..VolumeOptions::default() };
        manager.create_volume("pool", &volume).unwrap();
        Rig { manager, registry, disk, events, runtime }
    }

    /// The next event, which has to be this one.
    fn expect(&self, event: PoolEvent) {
        let next = self.events.recv_timeout(LONG).unwrap_or_else(|e| panic!("{event:?}: {e}"));
        assert_eq!(next, ("pool".to_owned(), event));
    }

    /// Writes 1 MiB that nothing can make smaller, at this MiB.
    fn write(&self, at: u64) -> Result<(), Status> {
        let registry = self.registry.clone();
        let done = self.runtime.handles()[0].block_on(move || async move {
            let channel = registry.open("pool/a", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
            let mut state = at + 1;
            let data: Vec<u8> = (0..MIB / 8)
                .flat_map(|_| {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state ^ state >> 29).to_le_bytes()
                })
                .collect();
            channel.write(at * 256, Buf::from_slice(&data), false).await?;
            channel.flush().await
        });
        done.unwrap()
    }

    /// Writes until less than so many percent are left; where to go on.
    fn fill(&self, mut at: u64, percent: u64) -> u64 {
        loop {
            let info = self.manager.info("pool").unwrap();
            if info.free_bytes * 100 < info.capacity_bytes * percent {
                return at;
            }
            self.write(at).unwrap();
            at += 1;
        }
    }
}

impl Rig {
    /// Writes until less than so many percent are left and this is said, by which time the collector may have won some again.
    fn fill_until(&self, mut at: u64, percent: u64, event: PoolEvent) -> u64 {
        let end = Instant::now() + LONG;
        loop {
            at = self.fill(at, percent);
            match self.events.recv_timeout(Duration::from_secs(3)) {
                Ok(next) => {
                    assert_eq!(next, ("pool".to_owned(), event));
                    return at;
                }
                Err(error) => assert!(Instant::now() < end, "{event:?}: {error}"),
            }
        }
    }
}

#[test]
fn room_and_capacity() {
    let rig = Rig::new();
    let at = rig.fill_until(0, 9, PoolEvent::Room(Room::Low));
    rig.fill_until(at, 2, PoolEvent::Room(Room::Critical));
    rig.registry.get("ram").unwrap().set_blocks(192 * MIB / 4096);
    rig.manager.grow("pool").unwrap();
    rig.expect(PoolEvent::Capacity);
    rig.expect(PoolEvent::Room(Room::Enough));
    // Its device goes, and with it the pool.
    let _removal = rig.registry.unregister(&rig.disk).unwrap();
    let mut next = rig.events.recv_timeout(LONG).unwrap();
    if next.1 == PoolEvent::Failed {
        // It had something to write.
        next = rig.events.recv_timeout(LONG).unwrap();
    }
    assert_eq!(next, ("pool".to_owned(), PoolEvent::Closed));
}

#[test]
fn failure() {
    let rig = Rig::new();
    rig.write(0).unwrap();
    let injection = Injection {
        op: Some(Op::Write),
        kind: Kind::Failure,
        num: u64::MAX,
        corrupt_offset_bytes: 0,
        corrupt_value: 0,
    };
    cryptfold_bdev_error::inject(&rig.registry, &rig.disk, injection).unwrap();
    rig.write(1).unwrap_err();
    rig.expect(PoolEvent::Failed);
}

#[test]
fn what_has_content_is_counted() {
    let rig = Rig::new();
    let allocated = |name: &str| rig.registry.get(name).unwrap().device().allocated_bytes();
    let becomes = |name: &str, bytes: Option<u64>| {
        let end = Instant::now() + LONG;
        while allocated(name) != bytes {
            assert!(Instant::now() < end, "{name}: {:?}, not {bytes:?}", allocated(name));
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    assert_eq!(allocated("pool/a"), Some(0), "known from its making on");
    (0..3).for_each(|at| rig.write(at).unwrap());
    becomes("pool/a", Some(3 * MIB));
    let registry = rig.registry.clone();
    let unmapped = rig.runtime.handles()[0].block_on(move || async move {
        let channel = registry.open("pool/a", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        channel.unmap(128, 256).await
    });
    unmapped.unwrap().unwrap();
    becomes("pool/a", Some(2 * MIB));
    rig.manager.snapshot_volume("pool", "a", "then").unwrap();
    rig.manager.clone_volume("pool", "then", "twin").unwrap();
    rig.write(9).unwrap();
    becomes("pool/a", Some(3 * MIB));
    becomes("pool/then", Some(2 * MIB));
    becomes("pool/twin", None);
}
