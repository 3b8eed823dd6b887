//! A volume whose host's key comes after its data, with power cuts: while the layer is put on, while hosts read and write and what
//! was stored before is reduced block by block. Every block is what the history allows, whichever way it is stored, also those of
//! snapshots that were taken before, meanwhile and afterwards, and of their clones, which get the layer by themselves.

mod support;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Registry, Status};
use cryptfold_bdev_crypto::engine::{XtsContext, XtsEngine, XtsKey};
use cryptfold_bdev_crypto::gate::KeyGate;
use cryptfold_bdev_crypto::hostcrypt::Shape;
use cryptfold_bdev_crypto::late::reduce_late;
use cryptfold_bdev_crypto::luks::{Bound, Layer, LuksOptions, Switch, WATCHED_BYTES, create};
use cryptfold_bdev_sim::harness::{Deed, LocalFuture, Machine, Manage, Options, Stack, life, seeds};
use cryptfold_bdev_sim::{Image, Rng};
use cryptfold_bdev_split::SplitOptions;
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::{self as reactor, Sim};
use cryptfold_reduce::{CreateOptions, LocalPool, Part, PoolError, VolumeOptions};
use support::key;

const MIB: u64 = 1 << 20;
/// First block of the payload.
const PAYLOAD: u64 = WATCHED_BYTES / 4096;

fn text(error: PoolError) -> String {
    error.to_string()
}

fn host_key() -> Arc<XtsKey> {
    Arc::new(XtsKey::new(&(0..64).collect::<Vec<u8>>()).unwrap())
}

fn bound(by_block: bool) -> Layer {
    let shape = Shape {
        payload_offset_bytes: WATCHED_BYTES,
        iv_offset: 0,
        iv_large_sectors: false,
        sector_size_bytes: 512,
        key_id: 1,
        by_block,
    };
    Layer::Bound(Arc::new(Bound { shape, gate: KeyGate::fixed(host_key()) }))
}

/// The key is there: changes are held back, and the record becomes durable.
async fn record(pool: &LocalPool, name: &str, switch: &Switch) -> Result<(), String> {
    while !switch.drain(Duration::ZERO) {
        reactor::sleep(Duration::from_micros(5)).await;
    }
    let done = pool.set_host_key(name, u64::MAX, Some(vec![1])).await.map_err(text)?;
    assert!(done, "behind the end there is nothing");
    Ok(())
}

/// Then the layer is put on.
async fn bind(pool: &LocalPool, name: &str, switch: &Switch) -> Result<(), String> {
    record(pool, name, switch).await?;
    switch.set(bound(true));
    assert!(switch.settle(1));
    Ok(())
}

/// Goes through all that was stored before; how many blocks became plaintext.
async fn convert(
    pool: &LocalPool,
    name: &str,
    channel: &Channel,
    goes_on: impl Fn() -> bool,
) -> Result<u64, String> {
    let (mut next, mut done) = (Some(PAYLOAD), 0);
    while let Some(from) = next {
        let found = pool.as_sent(name, from).await.map_err(text)?;
        next = found.next;
        for (start, blocks) in found.runs {
            let end = start + blocks;
            for at in (start..end).step_by(8) {
                if !goes_on() {
                    return Ok(done);
                }
                let count = 8.min(end - at);
                done += reduce_late(channel, at, count).await.map_err(|s| format!("block {at}: {s}"))?;
            }
        }
    }
    Ok(done)
}

/// A volume, its snapshots and their clones, the host's layer on each, and the parts behind the headers as the devices that are used.
#[derive(Clone)]
struct Late {
    seed: u64,
    by_block: bool,
    pool: Rc<RefCell<Option<LocalPool>>>,
    /// Of the device on each volume.
    switches: Rc<RefCell<BTreeMap<String, Arc<Switch>>>>,
    /// Layers that came while the volume was used.
    bindings: Rc<RefCell<BTreeMap<String, u64>>>,
    /// It has been read and checked after the power came back: reads that the layer's coming ends are then a worker's.
    verified: Rc<Cell<bool>>,
    stop: Rc<Cell<bool>>,
    running: Rc<Cell<bool>>,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    /// Blocks that became plaintext.
    reduced: AtomicU64,
    /// Of them those of clones.
    of_clones: AtomicU64,
    /// Recoveries with blocks of both kinds.
    mixed: AtomicU64,
    /// Snapshots and clones that were deleted.
    deleted: AtomicU64,
    /// Volumes that went on raw when the record was durable already.
    between: AtomicU64,
}

/// Device of a volume's payload.
fn payload_of(volume: &str) -> String {
    format!("luks-{volume}p1")
}

/// Volume of such a device.
fn volume_of(device: &str) -> String {
    let name = device.strip_prefix("luks-").and_then(|rest| rest.strip_suffix("p1"));
    name.unwrap_or_default().to_owned()
}

/// Takes the devices on a volume away.
async fn take_off(registry: &Registry, volume: &str) -> Result<(), String> {
    let removal = registry.unregister(&format!("luks-{volume}")).map_err(|e| e.to_string())?;
    while !removal.is_done() {
        reactor::sleep(Duration::from_micros(10)).await;
    }
    Ok(())
}

impl Late {
    fn make(seed: u64, by_block: bool, seen: &Arc<Seen>) -> Rc<dyn Stack> {
        Rc::new(Late {
            seed,
            by_block,
            pool: Rc::default(),
            switches: Rc::default(),
            bindings: Rc::default(),
            verified: Rc::default(),
            stop: Rc::default(),
            running: Rc::default(),
            seen: seen.clone(),
        })
    }

    fn current(&self) -> Result<LocalPool, String> {
        self.pool.borrow().clone().ok_or_else(|| "no pool is open".into())
    }

    fn is_known(pool: &LocalPool, volume: &str) -> bool {
        pool.volumes().iter().any(|v| v.name == volume && v.host_key.is_some())
    }

    /// The devices on a volume, with the layer if the record says so.
    fn put_on(&self, machine: &Machine, pool: &LocalPool, volume: &str) -> Result<(), String> {
        let failed = |e: cryptfold_bdev::BdevError| e.to_string();
        let options = LuksOptions {
            name: format!("luks-{volume}"),
            base_bdev_name: format!("pool/{volume}"),
            uuid: None,
            params: serde_json::json!({}),
        };
        let (bdev, switch) = create(&machine.registry, options).map_err(failed)?;
        switch.found_magic(false, 1);
        switch.set(if Late::is_known(pool, volume) { bound(self.by_block) } else { Layer::Raw });
        assert!(switch.settle(1));
        let split = SplitOptions { base_bdev: bdev.name().into(), split_count: 2, split_size_mb: None };
        cryptfold_bdev_split::create(&machine.registry, split).map_err(failed)?;
        self.switches.borrow_mut().insert(volume.into(), switch);
        Ok(())
    }

    /// The header may change again just when the record is durable: then hosts go on raw for so long, and the layer comes between
    /// two of their writes.
    async fn bind(&self, pool: &LocalPool, volume: &str, raw_for: Option<Duration>) -> Result<(), String> {
        let switch = self.switches.borrow()[volume].clone();
        record(pool, volume, &switch).await?;
        if let Some(time) = raw_for {
            assert!(switch.settle(1));
            self.seen.between.fetch_add(1, Ordering::Relaxed);
            let until = reactor::now().0 + time.as_nanos() as u64;
            while reactor::now().0 < until && !self.stop.get() {
                reactor::sleep(time / 64 + Duration::from_micros(10)).await;
            }
        }
        *self.bindings.borrow_mut().entry(volume.into()).or_default() += 1;
        switch.set(bound(self.by_block));
        assert!(switch.settle(1));
        Ok(())
    }

    async fn convert(&self, machine: &Machine, pool: &LocalPool, volume: &str) -> Result<(), String> {
        let opened = machine.registry.open(&format!("luks-{volume}"), Access::ReadOnly, |_| ());
        let channel = opened.and_then(|d| d.channel()).map_err(|e| e.to_string())?;
        let done = convert(pool, volume, &channel, || !self.stop.get()).await?;
        self.seen.reduced.fetch_add(done, Ordering::Relaxed);
        if volume != "v" {
            self.seen.of_clones.fetch_add(done, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The devices above the pool, and what happens to the first volume in the background.
    fn layers(&self, machine: &Machine, pool: LocalPool) -> Result<(), String> {
        for volume in pool.volumes() {
            self.put_on(machine, &pool, &volume.name)?;
        }
        *self.pool.borrow_mut() = Some(pool.clone());
        let (mine, machine, mut rng) = (self.clone(), machine.clone(), Rng::new(self.seed));
        self.running.set(true);
        reactor::spawn_local(async move {
            if !Late::is_known(&pool, "v") {
                let wait = rng.magnitude(50_000_000);
                let until = reactor::now().0 + wait;
                while (reactor::now().0 < until || !mine.verified.get()) && !mine.stop.get() {
                    reactor::sleep(Duration::from_nanos(wait / 64 + 10_000)).await;
                }
                if !mine.stop.get() {
                    let raw_for = rng.one_in(2).then(|| Duration::from_nanos(rng.below(2_000_000_000)));
                    mine.bind(&pool, "v", raw_for).await.unwrap();
                }
            }
            if !mine.stop.get() {
                mine.convert(&machine, &pool, "v").await.unwrap();
            }
            mine.running.set(false);
        })
        .detach();
        Ok(())
    }

    async fn delete(&self, machine: &Machine, pool: &LocalPool, volume: &str) -> Result<bool, String> {
        take_off(&machine.registry, volume).await?;
        match pool.delete_volume(volume).await {
            Ok(()) => {
                self.seen.deleted.fetch_add(1, Ordering::Relaxed);
                Ok(true)
            }
            Err(PoolError::HasClones { .. }) => self.put_on(machine, pool, volume).map(|()| false),
            Err(error) => Err(text(error)),
        }
    }

    /// A clone gets its key, then it is gone through; and now and then volumes are made independent of their snapshots.
    async fn maintain(
        &self,
        machine: &Machine,
        pool: &LocalPool,
        volume: &str,
        how: u64,
    ) -> Result<bool, String> {
        match how % 3 {
            0 => match pool.own_volume(volume, (how / 3).is_multiple_of(2)).await {
                Ok(()) => Ok(true),
                Err(PoolError::Invalid(_)) => Ok(false),
                Err(error) => Err(text(error)),
            },
            _ if volume == "v" => Ok(false),
            _ if !Late::is_known(pool, volume) => {
                let raw_for = (how / 3).is_multiple_of(2).then_some(Duration::from_micros(how / 6 % 10_000));
                self.bind(pool, volume, raw_for).await.map(|()| true)
            }
            _ => self.convert(machine, pool, volume).await.map(|()| true),
        }
    }
}

impl Stack for Late {
    fn create(&self, machine: Machine) -> LocalFuture<Result<(), String>> {
        let above = self.clone();
        Box::pin(async move {
            let mut options = CreateOptions::new(key());
            (options.force, options.segment_bytes) = (true, Some(MIB as u32));
            options.memory_budget = Some(24 * MIB);
            let pool = LocalPool::create(&machine.registry, &machine.disk, "pool", &options).await;
            let pool = pool.map_err(text)?;
            let volume =
                VolumeOptions { name: "v".into(), size_bytes: 2 * WATCHED_BYTES, ..VolumeOptions::default() };
            pool.create_volume(&volume).await.map_err(text)?;
            above.verified.set(true);
            above.layers(&machine, pool)
        })
    }

    fn open(&self, machine: Machine) -> LocalFuture<Result<(), String>> {
        let above = self.clone();
        Box::pin(async move {
            let pool = LocalPool::open(&machine.registry, &machine.disk, &key(), Some(24 * MIB)).await;
            above.layers(&machine, pool.map_err(text)?.ok_or("no pool on the disk")?)
        })
    }

    fn volumes(&self) -> Vec<String> {
        vec![payload_of("v")]
    }

    fn device(&self, _: &str, name: &str) -> String {
        payload_of(name)
    }

    /// A read that was under way when a layer came.
    fn interruptions(&self, device: &str) -> u64 {
        self.bindings.borrow().get(&volume_of(device)).copied().unwrap_or(0)
    }

    fn manage(&self, machine: Machine, deed: Deed) -> Manage {
        let mine = self.clone();
        Box::pin(async move {
            let pool = mine.current()?;
            let made = match &deed {
                Deed::Snapshot { of, name } => pool.snapshot_volume(&volume_of(of), name).await,
                Deed::Clone { of, name } => pool.clone_volume(&volume_of(of), name).await,
                Deed::Delete { name } => return mine.delete(&machine, &pool, &volume_of(name)).await,
                Deed::Maintain { name, how } => {
                    return mine.maintain(&machine, &pool, &volume_of(name), *how).await;
                }
                Deed::Resize { .. } => return Err(format!("{deed:?} was not asked for")),
            };
            mine.put_on(&machine, &pool, &made.map_err(text)?.name)?;
            Ok(true)
        })
    }

    fn check(&self, _: Machine) -> LocalFuture<Result<(), String>> {
        let (pool, seen, verified) = (self.current(), self.seen.clone(), self.verified.clone());
        Box::pin(async move {
            let pool = pool?;
            let report = pool.check(true).await.map_err(|status| status.to_string())?;
            if !report.is_clean() {
                return Err(format!("{} problems: {:?}", report.problem_count, report.problems));
            }
            let left = pool.as_sent("v", PAYLOAD).await.map_err(text)?;
            let mixed = Late::is_known(&pool, "v") && !left.runs.is_empty();
            seen.mixed.fetch_add(mixed.into(), Ordering::Relaxed);
            verified.set(true);
            Ok(())
        })
    }

    fn close(&self, machine: Machine) -> LocalFuture<Result<(), String>> {
        self.stop.set(true);
        let (pool, running) = (self.pool.borrow_mut().take(), self.running.clone());
        Box::pin(async move {
            while running.get() {
                reactor::sleep(Duration::from_micros(10)).await;
            }
            let pool = pool.ok_or("no pool is open")?;
            for volume in pool.volumes() {
                take_off(&machine.registry, &volume.name).await?;
            }
            pool.close().await.map_err(text)
        })
    }
}

/// All of the payload is used, and what was stored before is gone through slowly enough to be interrupted.
fn options(seed: u64) -> Options {
    let mut options = Options::new(128 * MIB);
    options.step_limit = 6_000_000;
    options.ops = if seed.is_multiple_of(2) { 200 } else { 60 };
    options.mix.hot_blocks = if seed.is_multiple_of(3) { 64 } else { 1024 };
    options.deeds = if seed % 4 < 3 { 30 } else { 0 };
    options.resize = false;
    options
}

const AGAIN: &str = "cargo test --release -p cryptfold-reduce --test late_keys power_cuts";

#[test]
fn power_cuts_while_it_is_reduced_late() {
    let seen = Arc::<Seen>::default();
    let of_one = |seed| life(&|| Late::make(seed, true, &seen), &options(seed), seed);
    seeds(AGAIN, if cfg!(debug_assertions) { 24 } else { 200 }, of_one);
    let counts = [&seen.reduced, &seen.of_clones, &seen.mixed, &seen.deleted, &seen.between];
    let [reduced, of_clones, mixed, deleted, between] = counts.map(|n| n.load(Ordering::Relaxed));
    println!(
        "{reduced} blocks reduced late, {of_clones} of them in clones; {mixed} recoveries with both kinds; {deleted} \
         snapshots and clones deleted; {between} volumes raw with a record"
    );
    let enough = reduced > 100 && of_clones > 10 && mixed > 10 && deleted > 10 && between > 3;
    assert!(std::env::var("CRYPTFOLD_SEED").is_ok() || enough);
}

/// The control: a layer that takes all for ciphertext below it.
#[test]
fn a_layer_that_does_not_look_at_blocks_is_caught() {
    let seen = Arc::<Seen>::default();
    let of_one = |seed| life(&|| Late::make(seed, false, &seen), &options(seed), seed);
    let failed: Vec<String> = (0..8).filter_map(|seed| of_one(seed).err()).collect();
    // By what was read, not by anything else that may go wrong.
    let caught = failed.iter().filter(|why| why.contains("; versions (start-end):")).count();
    assert!(caught >= 4, "{failed:?}");
}

/// As dm-crypt encrypts it.
fn encrypt(from: u64, mut data: Vec<u8>) -> Vec<u8> {
    let cipher = XtsContext::new(&host_key()).unwrap();
    for (n, sector) in data.chunks_mut(512).enumerate() {
        cipher.encrypt_in_place(u128::from((from - PAYLOAD) * 8 + n as u64), sector);
    }
    data
}

/// Blocks of a host's text, encrypted.
fn ciphertext(from: u64, blocks: u64) -> Vec<u8> {
    let mut data = Vec::new();
    for at in from..from + blocks {
        let line = format!("line of block {at}, {}\n", at % 7);
        data.extend(line.bytes().cycle().take(4096));
    }
    encrypt(from, data)
}

async fn read(registry: &Registry, name: &str, at: u64, blocks: u64) -> Vec<u8> {
    let channel = registry.open(name, Access::ReadOnly, |_| ()).unwrap().channel().unwrap();
    channel.read(at, blocks).await.unwrap().to_contiguous().to_vec()
}

/// The device on a volume or snapshot, with the layer on.
fn layered(registry: &Arc<Registry>, name: &str, layer: Layer) -> Arc<Switch> {
    let options = LuksOptions {
        name: format!("luks-{name}"),
        base_bdev_name: format!("p/{name}"),
        uuid: None,
        params: serde_json::json!({}),
    };
    let (_, switch) = create(registry, options).unwrap();
    switch.found_magic(false, 1);
    switch.set(layer);
    assert!(switch.settle(1));
    switch
}

/// Snapshots of before keep what they show, raw; a clone of one is gone through by itself; what is no ciphertext stays as it is; and
/// what was reduced late is as small as what was bound at once.
#[test]
fn snapshots_clones_and_what_is_no_ciphertext() {
    Sim::new(1).run(|| async {
        let (registry, _disk) = support::disk(96 * MIB, Image::zeroed());
        let mut options = CreateOptions::new(key());
        (options.segment_bytes, options.memory_budget) = (Some(MIB as u32), Some(16 * MIB));
        let pool = LocalPool::create(&registry, "disk", "p", &options).await.unwrap();
        for name in ["v", "at-once"] {
            let size_bytes = 2 * WATCHED_BYTES;
            let volume = VolumeOptions { name: name.into(), size_bytes, ..VolumeOptions::default() };
            pool.create_volume(&volume).await.unwrap();
        }
        let switch = layered(&registry, "v", Layer::Raw);
        let v = registry.open("luks-v", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        let encrypted = ciphertext(PAYLOAD, 512);
        for (nth, piece) in encrypted.chunks(32 * 4096).enumerate() {
            v.write(PAYLOAD + nth as u64 * 32, Buf::from_slice(piece), false).await.unwrap();
        }
        // What lay there before: text, zeros, a pattern.
        let stale: Vec<u8> = include_bytes!("late_keys.rs").iter().cycle().take(8 * 4096).copied().collect();
        v.write(PAYLOAD + 600, Buf::from_slice(&stale), false).await.unwrap();
        v.write(PAYLOAD + 620, Buf::from_slice(&[0; 8192]), false).await.unwrap();
        v.write(PAYLOAD + 630, Buf::from_slice(&[0x5A; 8192]), false).await.unwrap();
        let before = read(&registry, "luks-v", PAYLOAD, 700).await;
        let all = pool.as_sent("v", PAYLOAD).await.unwrap();
        assert_eq!((all.runs, all.keyed, all.next), (vec![(PAYLOAD, 512), (PAYLOAD + 600, 8)], false, None));
        pool.snapshot_volume("v", "s").await.unwrap();
        pool.clone_volume("s", "c").await.unwrap();

        bind(&pool, "v", &switch).await.unwrap();
        assert!(read(&registry, "luks-v", PAYLOAD, 700).await == before, "nothing is reduced yet");
        // Hosts go on: a block is written, one given up.
        let newer = ciphertext(PAYLOAD + 3, 1).iter().map(|b| b ^ 1).collect::<Vec<u8>>();
        v.write(PAYLOAD + 3, Buf::from_slice(&newer), false).await.unwrap();
        v.unmap(PAYLOAD + 5, 1).await.unwrap();
        let mut now = before.clone();
        now[3 * 4096..4 * 4096].copy_from_slice(&newer);
        now[5 * 4096..6 * 4096].fill(0);
        // Plaintext zeros beside raw ones: the pool has the same for both, but for the key.
        let zeros = encrypt(PAYLOAD + 622, vec![0; 4096]);
        v.write(PAYLOAD + 622, Buf::from_slice(&zeros), false).await.unwrap();
        now[622 * 4096..623 * 4096].copy_from_slice(&zeros);
        assert!(read(&registry, "luks-v", PAYLOAD + 620, 3).await == now[620 * 4096..623 * 4096]);
        assert_eq!(convert(&pool, "v", &v, || true).await.unwrap(), 510);
        assert!(read(&registry, "luks-v", PAYLOAD, 700).await == now);
        let below = read(&registry, "p/v", PAYLOAD + 100, 1).await;
        assert!(below.starts_with(format!("line of block {},", PAYLOAD + 100).as_bytes()), "it is plaintext");
        assert!(read(&registry, "p/v", PAYLOAD + 600, 8).await == stale);
        let left = pool.as_sent("v", PAYLOAD).await.unwrap();
        assert_eq!((&left.runs[..], left.keyed), (&[(PAYLOAD + 600, 8)][..], true));

        // The snapshot, raw or with the layer on, and its clone, which has no record yet.
        let on_s = layered(&registry, "s", Layer::Raw);
        assert!(read(&registry, "luks-s", PAYLOAD, 700).await == before);
        on_s.set(bound(true));
        assert!(read(&registry, "luks-s", PAYLOAD, 700).await == before);
        let s = registry.open("luks-s", Access::ReadOnly, |_| ()).unwrap().channel().unwrap();
        assert_eq!(reduce_late(&s, PAYLOAD, 8).await, Err(Status::NAMESPACE_WRITE_PROTECTED));
        layered(&registry, "c", bound(true));
        let c = registry.open("luks-c", Access::ReadOnly, |_| ()).unwrap().channel().unwrap();
        assert_eq!(pool.as_sent("c", PAYLOAD).await.unwrap().runs.len(), 2, "what it shows of the snapshot");
        assert_eq!(reduce_late(&c, PAYLOAD, 512).await, Ok(512));
        assert!(read(&registry, "luks-c", PAYLOAD, 700).await == before);
        assert_eq!(pool.as_sent("c", PAYLOAD).await.unwrap().runs, [(PAYLOAD + 600, 8)]);

        // As small as what was bound when it was written.
        layered(&registry, "at-once", bound(true));
        let other = registry.open("luks-at-once", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        let unique = pool.domains()[0].space.unique_bytes;
        for (nth, piece) in encrypted.chunks(32 * 4096).enumerate() {
            other.write(PAYLOAD + nth as u64 * 32, Buf::from_slice(piece), false).await.unwrap();
        }
        assert_eq!(pool.domains()[0].space.unique_bytes, unique, "all of it is there");
        let report = pool.check(true).await.unwrap();
        assert!(report.is_clean(), "{:#?}", report.problems);
        drop((v, c, s, other));
    });
}

/// What can not be read of the map is passed by, and may have been under a key.
#[test]
fn an_unreadable_leaf_does_not_hide_the_others() {
    Sim::new(1).run(|| async {
        let (registry, disk) = support::disk(96 * MIB, Image::zeroed());
        let mut options = CreateOptions::new(key());
        (options.segment_bytes, options.memory_budget) = (Some(MIB as u32), Some(16 * MIB));
        let pool = LocalPool::create(&registry, "disk", "p", &options).await.unwrap();
        let volume =
            VolumeOptions { name: "v".into(), size_bytes: 2 * WATCHED_BYTES, ..VolumeOptions::default() };
        pool.create_volume(&volume).await.unwrap();
        let v = registry.open("p/v", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        let data = ciphertext(PAYLOAD, 1536);
        for (nth, piece) in data.chunks(32 * 4096).enumerate() {
            v.write(PAYLOAD + nth as u64 * 32, Buf::from_slice(piece), false).await.unwrap();
        }
        let whole = pool.as_sent("v", PAYLOAD).await.unwrap();
        assert_eq!((whole.runs, whole.keyed, whole.next), (vec![(PAYLOAD, 1536)], false, None));
        drop(v);
        pool.checkpoint().await.unwrap();
        let (at, bytes) = pool.place_of("v", PAYLOAD + 700, Part::Map).await.unwrap();
        pool.close().await.unwrap();
        disk.rot(at + u64::from(bytes) / 2, 0x10);
        let pool = LocalPool::open(&registry, "disk", &key(), Some(16 * MIB)).await.unwrap().unwrap();
        let (mut next, mut runs, mut keyed) = (Some(PAYLOAD), Vec::new(), false);
        while let Some(from) = next {
            let found = pool.as_sent("v", from).await.unwrap();
            assert!(found.next.is_none_or(|next| next > from));
            (next, keyed) = (found.next, keyed | found.keyed);
            runs.extend(found.runs);
        }
        assert!(keyed);
        assert_eq!(runs, [(PAYLOAD, 512), (PAYLOAD + 1024, 512)]);
    });
}
