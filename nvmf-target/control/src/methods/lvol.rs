//! Pools and volumes under SPDK's names (lvol stores and lvols), and what SPDK has no name for.

use std::time::Instant;

use cryptfold_reduce::{
    CheckReport, Compression, CreateOptions, DEFAULT_SCRUB_BYTES_PER_S, PoolInfo, VolumeInfo, VolumeOptions,
};
use serde_json::{Value, json};

use super::crypto::absolute;
use crate::caller::Caller;
use crate::control::Control;
use crate::jsonrpc::{RpcError, RpcResult};
use crate::keys::read_password;
use crate::params::{FromJson, ParamError, SecretText, choices, params};
use crate::pools::{Locked, NewKey, PoolKey, Pools, Try};
use crate::table::Method;

choices! {
    /// SPDK's ways to clear a store.
    pub enum StoreClear {
        /// Nothing.
        None = "none",
        /// Unmap.
        Unmap = "unmap",
        /// Zeros.
        Zeroes = "write_zeroes",
    }
    /// What to do about work in the background.
    pub enum ScrubAction {
        /// Start it; a scrub that runs gets another rate.
        Start = "start",
        /// End it.
        Stop = "stop",
        /// Only show how it stands.
        Status = "status",
    }
    /// How a pool starts.
    pub enum Startup {
        /// It is opened.
        Unlocked = "unlocked",
        /// It is listed, and opened by cryptfold_encryption_unlock.
        Locked = "locked",
    }
    /// SPDK's ways to clear a volume.
    pub enum VolumeClear {
        /// The store's.
        Default = "default",
        /// Nothing.
        None = "none",
        /// Unmap.
        Unmap = "unmap",
        /// Zeros.
        Zeroes = "write_zeroes",
    }
}

/// A compression setting.
#[derive(Clone, Copy, Debug)]
pub struct Codec(pub Compression);

impl FromJson for Codec {
    fn kind() -> String {
        "\"adaptive\", \"off\", \"lz4\" or \"zstd:N\" (N from -7 to 19)".into()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        v.as_str().and_then(|s| s.parse().ok()).map(Codec).ok_or(None)
    }
}

params! {
    /// `bdev_lvol_create_lvstore`.
    pub struct CreateStore {
        /// Device for the pool.
        bdev_name: String,
        /// Name of the pool.
        lvs_name: String,
        /// No effect: space is given out by 4 KiB.
        cluster_sz: Option<u32>,
        /// No effect: nothing old can be read through a pool.
        clear_method: Option<StoreClear>,
        /// No effect.
        num_md_pages_per_cluster_ratio: Option<u32>,
        /// No effect.
        md_page_size: Option<u32>,
        /// Key file: 32 bytes, raw or hexadecimal, mode 0600. When not given, NAME.key is made in the key directory. Ours.
        key_file: Option<String>,
        /// Make key_file, with a random key, if it does not exist. Ours.
        create_key: bool = false,
        /// A password opens the pool, instead of a key file. Ours.
        password: Option<SecretText>,
        /// File with the password (mode 0600), which opens the pool again at the next start. Ours.
        password_file: Option<String>,
        /// Key server with the pool's key, instead of a key file (keyring_kmip_add_server). Ours.
        kms_server: Option<String>,
        /// Unique identifier of the key there (AES, 256 bits, active); a new one is made when not given. Ours.
        kms_object: Option<String>,
        /// Encrypt the pool; false is for pools on top of something that encrypts. Ours.
        encrypt: bool = true,
        /// Also on a device that carries something, which is lost. Ours.
        force: bool = false,
        /// RAM for indexes and caches, MiB; 512 + 250 per TiB when not given. Ours.
        memory_budget_mib: Option<u32>,
        /// Compression of its volumes. Ours.
        compression: Option<Codec>,
        /// Every completion is durable, and its volumes report no volatile cache. Ours.
        durable: bool = false,
        /// MiB in a segment, a power of two. Ours.
        segment_size_mib: Option<u32>,
        /// Open the pool if the device has it already. Ours.
        exist_ok: bool = false,
    }
    /// One store.
    pub struct Store {
        /// UUID of the pool.
        uuid: Option<String>,
        /// Name of the pool.
        lvs_name: Option<String>,
    }
    /// `bdev_lvol_rename_lvstore`, `bdev_lvol_rename`.
    pub struct Rename {
        /// Present name (of a volume: UUID or POOL/VOLUME).
        old_name: String,
        /// New name.
        new_name: String,
    }
    /// `bdev_lvol_create`.
    pub struct CreateVolume {
        /// Name of the volume.
        lvol_name: String,
        /// Size in MiB.
        size_in_mib: Option<u64>,
        /// Size in bytes, as older clients send it.
        size: Option<u64>,
        /// Volumes are always thin.
        thin_provision: Option<bool>,
        /// UUID of the pool.
        uuid: Option<String>,
        /// Name of the pool.
        lvs_name: Option<String>,
        /// No effect.
        clear_method: Option<VolumeClear>,
        /// Domain, made if it does not exist: volumes of a domain share data and keys; the pool's default when not
        /// given. Ours.
        domain: Option<String>,
        /// Bytes in a block: 512 or 4096. Ours.
        block_size: u32 = 4096,
        /// Compression of this volume; the pool's when not given. Ours.
        compression: Option<Codec>,
        /// Succeed if the volume exists with this size. Ours.
        exist_ok: bool = false,
    }
    /// A volume.
    pub struct Volume {
        /// UUID or POOL/VOLUME.
        name: String,
    }
    /// `bdev_lvol_resize`.
    pub struct Resize {
        /// UUID or POOL/VOLUME.
        name: String,
        /// New size in MiB.
        size_in_mib: Option<u64>,
        /// New size in bytes, as older clients send it.
        size: Option<u64>,
    }
    /// `bdev_lvol_snapshot`.
    pub struct Snapshot {
        /// Volume: UUID or POOL/VOLUME.
        lvol_name: String,
        /// Name of the snapshot.
        snapshot_name: String,
    }
    /// `bdev_lvol_clone`.
    pub struct CloneOf {
        /// Snapshot (or read-only volume): UUID or POOL/VOLUME.
        snapshot_name: String,
        /// Name of the new volume.
        clone_name: String,
    }
    /// `bdev_lvol_get_lvols`.
    pub struct GetVolumes {
        /// Only of the pool with this UUID.
        lvs_uuid: Option<String>,
        /// Only of the pool with this name.
        lvs_name: Option<String>,
    }
    /// `cryptfold_pool_open`.
    pub struct OpenPool {
        /// Device with the pool.
        base_bdev_name: String,
        /// Key file; all keys at hand are tried when not given.
        key_file: Option<String>,
        /// File with a password that opens it.
        password_file: Option<String>,
        /// False for a pool without encryption.
        encrypt: bool = true,
        /// What to do about its key now.
        startup: Startup = Startup::Unlocked,
        /// RAM for indexes and caches, MiB.
        memory_budget_mib: Option<u32>,
    }
    /// `cryptfold_pool_check`.
    pub struct Check {
        /// UUID of the pool.
        uuid: Option<String>,
        /// Name of the pool.
        lvs_name: Option<String>,
        /// Also read and verify all stored data.
        data: bool = false,
        /// Put right what can be put right without guessing, and check again.
        repair: bool = false,
    }
    /// `cryptfold_pool_scrub`.
    pub struct Scrub {
        /// UUID of the pool.
        uuid: Option<String>,
        /// Name of the pool.
        lvs_name: Option<String>,
        /// What to do.
        action: ScrubAction = ScrubAction::Start,
        /// Megabytes (10^6) of stored data per second at most; 100 when not given.
        rate_mb_s: Option<u32>,
    }
    /// `cryptfold_pool_dedupe`.
    pub struct Dedupe {
        /// UUID of the pool.
        uuid: Option<String>,
        /// Name of the pool.
        lvs_name: Option<String>,
        /// What to do.
        action: ScrubAction = ScrubAction::Start,
    }
    /// `cryptfold_pool_create_domain`.
    pub struct CreateDomain {
        /// Name of the pool.
        lvs_name: String,
        /// Name of the domain.
        name: String,
    }
}

pub fn methods() -> Vec<Method> {
    vec![
        Method::new("bdev_lvol_create_lvstore", "Creates a pool. Replies its UUID.", create_store),
        Method::new("bdev_lvol_delete_lvstore", "Destroys a pool with its volumes.", delete_store),
        Method::new(
            "bdev_lvol_get_lvstores",
            "Pools. A cluster is a segment; `logical_bytes` and what follows are the pool's accounting; `written_bytes` and `moved_bytes` \
             are what hosts and collection have appended since it was opened, reduced. A pool that is not open for \
             want of a key has no size and `locked` says why; one whose device went away has none and `failed` says so, until it is \
             back or closed.",
            get_stores,
        ),
        Method::new(
            "bdev_lvol_grow_lvstore",
            "Gives a pool the rest of its device, which has become larger (bdev_uring_rescan finds that out). Hosts go on.",
            |c, p: Store| {
                let (pools, info) = find_store(c, p)?;
                pools.manager().grow(&info.name)?;
                Ok(json!(true))
            },
        ),
        Method::new("bdev_lvol_rename_lvstore", "Renames a pool.", |c, p: Rename| {
            let pools = c.pools()?;
            pools.manager().rename(&pools.find(&p.old_name)?.name, &p.new_name)?;
            Ok(json!(true))
        }),
        Method::new(
            "bdev_lvol_create",
            "Creates a volume. Replies its name, which is its UUID; POOL/VOLUME is its alias.",
            create_volume,
        ),
        Method::new(
            "bdev_lvol_delete",
            "Deletes a volume or snapshot. Its space comes back in the background. A snapshot from which several others go \
             on is refused (-1).",
            |c, p: Volume| {
                let (pools, v) = find_volume(c, &p.name)?;
                pools.manager().delete_volume(&v.pool, &v.uuid.to_string())?;
                Ok(json!(true))
            },
        ),
        Method::new(
            "bdev_lvol_snapshot",
            "Takes a snapshot of a volume: a read-only volume of its own. Replies its UUID.",
            |c, p: Snapshot| {
                let (pools, v) = find_volume(c, &p.lvol_name)?;
                let name = own_name(&v.pool, &p.snapshot_name);
                let made = pools.manager().snapshot_volume(&v.pool, &v.uuid.to_string(), name)?;
                Ok(json!(made.uuid.to_string()))
            },
        ),
        Method::new(
            "bdev_lvol_clone",
            "Makes a volume that begins with what a snapshot has. Replies its UUID.",
            |c, p: CloneOf| {
                let (pools, v) = find_volume(c, &p.snapshot_name)?;
                let name = own_name(&v.pool, &p.clone_name);
                let made = pools.manager().clone_volume(&v.pool, &v.uuid.to_string(), name)?;
                Ok(json!(made.uuid.to_string()))
            },
        ),
        Method::new(
            "bdev_lvol_inflate",
            "Ends all sharing of a volume with snapshots: it goes on from none. Replies when that is so.",
            |c, p: Volume| own(c, &p.name, false),
        ),
        Method::new(
            "bdev_lvol_decouple_parent",
            "Ends a volume's sharing with the snapshot that it goes on from; it may go on from that one's own then.",
            |c, p: Volume| own(c, &p.name, true),
        ),
        Method::new("bdev_lvol_resize", "Changes a volume's size.", |c, p: Resize| {
            let (pools, v) = find_volume(c, &p.name)?;
            pools.manager().resize_volume(&v.pool, &v.uuid.to_string(), size(p.size_in_mib, p.size)?)?;
            Ok(json!(true))
        }),
        Method::new("bdev_lvol_rename", "Renames a volume.", |c, p: Rename| {
            let (pools, v) = find_volume(c, &p.old_name)?;
            let new = own_name(&v.pool, &p.new_name);
            pools.manager().rename_volume(&v.pool, &v.uuid.to_string(), new)?;
            Ok(json!(true))
        }),
        Method::new("bdev_lvol_set_read_only", "Makes a volume read-only.", |c, p: Volume| {
            let (pools, v) = find_volume(c, &p.name)?;
            pools.manager().set_read_only(&v.pool, &v.uuid.to_string(), true)?;
            Ok(json!(true))
        }),
        Method::new(
            "bdev_lvol_get_lvols",
            "Volumes and snapshots. `exclusive_bytes`: blocks with data that nothing else shows, so what deleting it takes \
             out of the pool before reduction; `reclaimable_bytes`: about what that gives back, at the average reduction of \
             its domain.",
            get_volumes,
        ),
        Method::new(
            "cryptfold_pool_open",
            "Opens the pool on a device. Replies its UUID. A pool whose key server does not answer is listed as locked, and opened \
             when it does. Ours.",
            open_pool,
        ),
        Method::new(
            "cryptfold_pool_close",
            "Closes a pool: flushes, writes a checkpoint, lets go of its device. One whose device is gone is no longer listed. Ours.",
            |c, p: Store| {
                let name = p.uuid.as_deref().or(p.lvs_name.as_deref()).unwrap_or_default();
                if c.pools()?.manager().forget_lost(name) {
                    return Ok(json!(true));
                }
                let (pools, info) = find_store(c, p)?;
                pools.manager().close(&info.name)?;
                c.watch.note("pool_close", &info.name);
                Ok(json!(true))
            },
        ),
        Method::new(
            "cryptfold_pool_check",
            "Audits a pool: maps against references, segments and fingerprints; changes wait meanwhile. `problems` lists \
             what is inconsistent, `repairs` what a repair did. A repair makes references, live bytes, counters and \
             fingerprint lists again from what they derive from; blocks whose data is gone become errors until they are \
             written again; nothing that can be read is lost. Ours.",
            check,
        ),
        Method::new(
            "cryptfold_pool_scrub",
            "Reads and verifies all stored data in the background. Blocks whose data is damaged read as errors; a later write \
             of the same data, anywhere in the domain, heals all of them. Replies how it stands. Ours.",
            scrub,
        ),
        Method::new(
            "cryptfold_pool_dedupe",
            "Looks in the background for duplicates that a sampled index has missed, and makes one chunk of two. Starts by itself \
             when 4 GiB of new data have come while the index is sampled. Replies how it stands. Ours.",
            dedupe,
        ),
        Method::new(
            "cryptfold_pool_create_domain",
            "Makes a domain in a pool. Ours.",
            |c, p: CreateDomain| {
                let pools = c.pools()?;
                let info = pools.manager().create_domain(&pools.find(&p.lvs_name)?.name, &p.name)?;
                Ok(json!(info.uuid.to_string()))
            },
        ),
        Method::new("cryptfold_pool_get_domains", "Domains of a pool. Ours.", get_domains),
    ]
}

fn find_store(c: &Control, p: Store) -> Result<(&Pools, PoolInfo), RpcError> {
    let pools = c.pools()?;
    match (p.uuid, p.lvs_name) {
        (Some(n), None) | (None, Some(n)) => Ok((pools, pools.find(&n)?)),
        _ => Err(RpcError::params("lvs_name: either this or uuid is needed")),
    }
}

/// A volume by UUID or alias.
pub fn find_volume<'a>(c: &'a Control, name: &str) -> Result<(&'a Pools, VolumeInfo), RpcError> {
    let pools = c.pools()?;
    let uuid = uuid::Uuid::parse_str(name).ok();
    let is =
        |v: &VolumeInfo| Some(v.uuid) == uuid || name.strip_prefix(&v.pool) == Some(&format!("/{}", v.name));
    for p in pools.manager().list() {
        if let Some(v) = pools.manager().volumes(&p.name)?.into_iter().find(is) {
            return Ok((pools, v));
        }
    }
    Err(RpcError::no_device(name))
}

/// A volume's name as SPDK's clients give it: with or without the pool's.
fn own_name<'a>(pool: &str, name: &'a str) -> &'a str {
    name.strip_prefix(pool).and_then(|rest| rest.strip_prefix('/')).unwrap_or(name)
}

fn own(c: &Control, name: &str, parent_only: bool) -> RpcResult {
    let (pools, v) = find_volume(c, name)?;
    pools.manager().own_volume(&v.pool, &v.uuid.to_string(), parent_only)?;
    Ok(json!(true))
}

fn size(mib: Option<u64>, bytes: Option<u64>) -> Result<u64, RpcError> {
    let bytes = match (mib, bytes) {
        (Some(m), None) => m.checked_mul(1 << 20),
        (None, Some(b)) => Some(b),
        _ => return Err(RpcError::params("size_in_mib: either this or size (bytes) is needed")),
    };
    match bytes {
        Some(b) if b > 0 && i64::try_from(b).is_ok() => Ok(b),
        _ => Err(RpcError::params("size_in_mib: a size from 1 MiB to 8 EiB is needed")),
    }
}

fn pool_key(key_file: Option<String>, encrypt: bool) -> Result<Option<PoolKey>, RpcError> {
    match (key_file, encrypt) {
        (Some(_), false) => Err(RpcError::params("key_file: a pool that does not encrypt has no key")),
        (Some(f), true) => Ok(Some(PoolKey::File(absolute(&f)?))),
        (None, false) => Ok(Some(PoolKey::None)),
        (None, true) => Ok(None),
    }
}

/// The key that the parameters name for a new pool; one way at most.
fn new_key(p: &CreateStore) -> Result<NewKey, RpcError> {
    let ways =
        [p.key_file.is_some(), p.password.is_some(), p.password_file.is_some(), p.kms_server.is_some()];
    let ways = ways.iter().filter(|given| **given).count() + usize::from(!p.encrypt);
    if ways > 1 {
        return Err(RpcError::params(
            "key_file: only one of key_file, password, password_file, kms_server and encrypt = false can be given",
        ));
    }
    if let Some(path) = &p.password_file {
        let path = absolute(path)?;
        return Ok(NewKey::Password(read_password(&path)?, Some(path)));
    }
    Ok(match (&p.key_file, &p.password, &p.kms_server) {
        (Some(path), ..) => NewKey::File { path: absolute(path)?, create: p.create_key },
        (_, Some(password), _) => NewKey::Password(super::encryption::password(password)?, None),
        (.., Some(server)) => NewKey::Kms { server: server.clone(), object: p.kms_object.clone() },
        _ if !p.encrypt => NewKey::None,
        _ => NewKey::Own,
    })
}

fn create_store(c: &Control, p: CreateStore) -> RpcResult {
    let pools = c.pools()?;
    let key = new_key(&p)?;
    let budget = p.memory_budget_mib.map(|m| u64::from(m) << 20);
    if p.exist_ok {
        let found = existing(pools, &p.bdev_name, &p.lvs_name, &key, budget);
        let locked = pools.find_locked(&p.bdev_name).filter(|l| found.is_err() && may_stay_locked(pools, l));
        if let Some(locked) = locked {
            return Ok(json!(locked.pool.uuid.to_string()));
        }
        if let Some(info) = found? {
            return Ok(json!(info.uuid.to_string()));
        }
    }
    let segment_bytes = p.segment_size_mib.map(|m| m.checked_mul(1 << 20)).map(|b| {
        b.ok_or_else(|| RpcError::params("segment_size_mib: a power of two from 1 to 1024 is needed"))
    });
    let segment_bytes = segment_bytes.transpose()?;
    let info = pools.create(&p.bdev_name, &p.lvs_name, key, |source| CreateOptions {
        force: p.force,
        segment_bytes,
        memory_budget: budget,
        compression: p.compression.map(|k| k.0),
        durable: p.durable,
        ..CreateOptions::new(source)
    })?;
    c.watch.note("pool_open", &info.name);
    Ok(json!(info.uuid.to_string()))
}

/// The pool of this name on this device, opened if need be.
fn existing(
    pools: &Pools,
    bdev: &str,
    name: &str,
    key: &NewKey,
    budget: Option<u64>,
) -> Result<Option<PoolInfo>, RpcError> {
    let key = match key {
        // A key file that is yet to be made opens nothing.
        NewKey::File { path, .. } if path.exists() => Try::Key(PoolKey::File(path.clone())),
        NewKey::File { .. } | NewKey::Own => Try::All,
        NewKey::Password(password, _) => Try::Password(password),
        NewKey::Kms { .. } => Try::Key(PoolKey::Kms),
        NewKey::None => Try::Key(PoolKey::None),
    };
    match pools.open(bdev, key, budget)? {
        Some(info) if info.name == name => Ok(Some(info)),
        Some(info) => {
            Err(RpcError::exists(format!("{bdev} carries the pool \"{}\", not \"{name}\"", info.name)))
        }
        None => Ok(None),
    }
}

fn delete_store(c: &Control, p: Store) -> RpcResult {
    let (pools, info) = find_store(c, p)?;
    pools.manager().destroy(&info.name)?;
    pools.forget(info.uuid);
    c.watch.note("pool_close", &info.name);
    Ok(json!(true))
}

fn ratio(r: f64) -> Value {
    if r > 0.0 { json!((r * 1000.0).round() / 1000.0) } else { Value::Null }
}

fn describe_store(pools: &Pools, p: &PoolInfo) -> Value {
    let segment = u64::from(p.segment_bytes).max(1);
    json!({
        "uuid": p.uuid.to_string(),
        "name": p.name,
        "base_bdev": p.base_bdev,
        "total_data_clusters": p.capacity_bytes / segment,
        "free_clusters": p.free_bytes / segment,
        "block_size": 4096,
        "cluster_size": p.segment_bytes,
        "max_growable_size": p.device_bytes,
        "size_bytes": p.capacity_bytes,
        "free_bytes": p.free_bytes,
        "reclaimable_bytes": p.dead_bytes,
        "logical_bytes": p.space.logical_bytes,
        "zero_bytes": p.space.zero_bytes,
        "unique_bytes": p.space.unique_bytes,
        "stored_bytes": p.space.stored_bytes,
        "metadata_bytes": p.space.metadata_bytes,
        "ratio": ratio(p.space.ratio()),
        "ratio_without_zeroes": ratio(p.space.ratio_without_zeroes()),
        "volumes": p.volumes,
        "domains": p.domains,
        "compression": p.compression,
        "memory_budget_bytes": p.memory_budget_bytes,
        "memory_bytes": p.memory_bytes,
        "index_entries": p.index_entries,
        "index_sampling": p.index_sampling,
        "damaged": p.damaged,
        "healed": p.healed,
        "scrub": p.scrub, "late_dedupe": p.late, "renewal": p.renewal, "deletion": p.deletion,
        "written_bytes": p.written_bytes, "moved_bytes": p.moved_bytes,
        "failed": p.failed,
        "key_file": pools.key_file(p.uuid),
    })
}

/// A pool that is not open, in the same shape as far as it is known.
fn describe_locked(l: &Locked) -> Value {
    json!({
        "uuid": l.pool.uuid.to_string(), "name": l.pool.name, "base_bdev": l.pool.base_bdev,
        "total_data_clusters": 0, "free_clusters": 0, "block_size": 4096, "cluster_size": 0,
        "locked": l.reason,
    })
}

fn get_stores(c: &Control, p: Store) -> RpcResult {
    let pools = c.pools()?;
    if p.uuid.is_none() && p.lvs_name.is_none() {
        let open = pools.manager().list();
        let open = open.iter().map(|i| describe_store(pools, i));
        let lost = pools.manager().lost();
        let lost = lost.iter().map(|pool| {
            let uuid = pool.uuid.to_string();
            json!({"uuid": uuid, "name": pool.name, "base_bdev": pool.base_bdev, "failed": "its device is gone"})
        });
        return Ok(open.chain(pools.locked().iter().map(describe_locked)).chain(lost).collect());
    }
    let (pools, info) = find_store(c, p)?;
    Ok(json!([describe_store(pools, &info)]))
}

fn create_volume(c: &Control, p: CreateVolume) -> RpcResult {
    let size_bytes = size(p.size_in_mib, p.size)?;
    let (pools, pool) = find_store(c, Store { uuid: p.uuid, lvs_name: p.lvs_name })?;
    let m = pools.manager();
    if p.exist_ok
        && let Some(v) = m.volumes(&pool.name)?.into_iter().find(|v| v.name == p.lvol_name)
    {
        if v.size_bytes == size_bytes.next_multiple_of(4096) {
            return Ok(json!(v.uuid.to_string()));
        }
        let what = format!("{}/{} has {} bytes, not {size_bytes}", pool.name, v.name, v.size_bytes);
        return Err(RpcError::exists(what));
    }
    if let Some(d) = &p.domain
        && !m.domains(&pool.name)?.iter().any(|x| x.name == *d)
    {
        m.create_domain(&pool.name, d)?;
    }
    let volume = m.create_volume(
        &pool.name,
        &VolumeOptions {
            name: p.lvol_name,
            size_bytes,
            block_size: Some(p.block_size),
            domain: p.domain,
            compression: p.compression.map(|k| k.0),
            uuid: None,
        },
    )?;
    Ok(json!(volume.uuid.to_string()))
}

fn get_volumes(c: &Control, p: GetVolumes) -> RpcResult {
    let pools = c.pools()?;
    let stores = match (p.lvs_uuid, p.lvs_name) {
        (None, None) => pools.manager().list(),
        (uuid, lvs_name) => vec![find_store(c, Store { uuid, lvs_name })?.1],
    };
    let mut list = Vec::new();
    for s in stores {
        for v in pools.manager().volumes(&s.name)? {
            let mut lvol = json!({
                "alias": format!("{}/{}", v.pool, v.name),
                "uuid": v.uuid.to_string(),
                "name": v.name,
                "is_thin_provisioned": true,
                "is_snapshot": v.snapshot,
                "is_clone": v.parent.is_some(),
                "is_esnap_clone": false,
                "is_degraded": false,
                "lvs": {"name": s.name, "uuid": s.uuid.to_string()},
                "size_bytes": v.size_bytes,
                "block_size": v.block_size,
                "domain": v.domain,
                "compression": v.compression,
                "read_only": v.read_only,
                "logical_bytes": v.logical_bytes,
                "zero_bytes": v.zero_bytes,
                "exclusive_bytes": v.exclusive_bytes,
                "reclaimable_bytes": v.reclaimable_bytes,
                "written_bytes": v.written_bytes,
                "created_ms": v.created_ms,
                "num_allocated_clusters": v.logical_bytes.div_ceil(u64::from(s.segment_bytes).max(1)),
            });
            if let Some(parent) = v.parent {
                lvol["base_snapshot"] = json!(parent);
            }
            if v.snapshot {
                lvol["clones"] = json!(v.clones);
            }
            list.push(lvol);
        }
    }
    Ok(Value::Array(list))
}

fn open_pool(c: &Control, p: OpenPool) -> RpcResult {
    let pools = c.pools()?;
    let key = match (p.password_file, pool_key(p.key_file, p.encrypt)?) {
        (Some(path), None) => Try::Key(PoolKey::PasswordFile(absolute(&path)?)),
        (Some(_), Some(_)) => {
            return Err(RpcError::params(
                "password_file: only one of key_file, password_file and encrypt = false can be given",
            ));
        }
        (None, Some(key)) => Try::Key(key),
        (None, None) => Try::All,
    };
    let budget = p.memory_budget_mib.map(|m| u64::from(m) << 20);
    let none = || {
        let what = format!(
            "{} carries no pool: No such device (bdev_lvol_create_lvstore makes one)",
            p.base_bdev_name
        );
        RpcError::new(RpcError::ENODEV, what)
    };
    if p.startup == Startup::Locked {
        return pools
            .list_locked(&p.base_bdev_name, budget)?
            .map(|uuid| json!(uuid.to_string()))
            .ok_or_else(none);
    }
    match pools.open(&p.base_bdev_name, key, budget) {
        Ok(Some(info)) => {
            c.watch.note("pool_open", &info.name);
            Ok(json!(info.uuid.to_string()))
        }
        Ok(None) => Err(none()),
        // It is listed, and opened when its key server answers, or when who has locked it unlocks it.
        Err(e) => {
            match pools.find_locked(&p.base_bdev_name).filter(|l| l.waiting || may_stay_locked(pools, l)) {
                Some(locked) => {
                    c.retry_unlocks();
                    Ok(json!(locked.pool.uuid.to_string()))
                }
                None => Err(e),
            }
        }
    }
}

/// Whether the security role has locked a pool that a configuration opens: the rest of it is loaded all the same.
fn may_stay_locked(pools: &Pools, locked: &Locked) -> bool {
    Caller::current().is_configuration() && pools.held(locked.pool.uuid).is_some()
}

fn check(c: &Control, p: Check) -> RpcResult {
    let (pools, info) = find_store(c, Store { uuid: p.uuid, lvs_name: p.lvs_name })?;
    let started = Instant::now();
    let manager = pools.manager();
    let r = if p.repair { manager.repair(&info.name, p.data) } else { manager.check(&info.name, p.data) }?;
    Ok(describe_check(&info.name, &r, started))
}

/// An audit's outcome, as `cryptfold_pool_check` replies it.
pub(crate) fn describe_check(pool: &str, r: &CheckReport, started: Instant) -> Value {
    json!({
        "pool": pool, "clean": r.is_clean(), "problem_count": r.problem_count, "problems": r.problems,
        "found_before_repair": r.found, "repair_count": r.repair_count, "repairs": r.repairs,
        "uncorrectable_blocks": r.uncorrectable, "damaged_fragments": r.damaged,
        "volumes": r.volumes, "blocks": r.blocks, "containers": r.containers, "fragments": r.fragments,
        "verified": r.verified, "nodes": r.nodes, "orphans": r.orphans,
        "seconds": (started.elapsed().as_secs_f64() * 100.0).round() / 100.0,
    })
}

fn scrub(c: &Control, p: Scrub) -> RpcResult {
    let (pools, info) = find_store(c, Store { uuid: p.uuid, lvs_name: p.lvs_name })?;
    if p.rate_mb_s == Some(0) {
        return Err(RpcError::params("rate_mb_s: at least 1 is needed"));
    }
    let scrub = match p.action {
        ScrubAction::Status => info.scrub,
        ScrubAction::Stop => pools.manager().stop_scrub(&info.name)?,
        ScrubAction::Start => {
            let rate = p.rate_mb_s.map_or(DEFAULT_SCRUB_BYTES_PER_S, |mb| u64::from(mb) * 1_000_000);
            pools.manager().start_scrub(&info.name, rate)?
        }
    };
    Ok(json!(scrub))
}

fn dedupe(c: &Control, p: Dedupe) -> RpcResult {
    let (pools, info) = find_store(c, Store { uuid: p.uuid, lvs_name: p.lvs_name })?;
    Ok(json!(match p.action {
        ScrubAction::Status => info.late,
        ScrubAction::Stop => pools.manager().stop_late(&info.name)?,
        ScrubAction::Start => pools.manager().start_late(&info.name)?,
    }))
}

fn get_domains(c: &Control, p: Store) -> RpcResult {
    let (pools, info) = find_store(c, p)?;
    let list = pools.manager().domains(&info.name)?;
    Ok(list
        .iter()
        .map(|d| {
            json!({
                "name": d.name, "uuid": d.uuid.to_string(), "volumes": d.volumes,
                "logical_bytes": d.space.logical_bytes, "zero_bytes": d.space.zero_bytes,
                "unique_bytes": d.space.unique_bytes, "stored_bytes": d.space.stored_bytes,
                "metadata_bytes": d.space.metadata_bytes, "ratio": ratio(d.space.ratio()),
            })
        })
        .collect())
}
