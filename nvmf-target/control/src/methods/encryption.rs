//! Encryption of pools: who opens them. What opens a pool lies in its key slots ([`slots`]); see `keys/store`.

mod slots;

use std::path::Path;

use cryptfold_keystore::{Backup, ExportError, Password, PasswordError};
use cryptfold_nvmf_target::audit::TARGET as AUDIT;
use cryptfold_reduce::keys::Kek;
use cryptfold_reduce::slots::{Kdf, KeyBlock, SlotKind};
use cryptfold_reduce::{DEFAULT_RENEWAL_BYTES_PER_S, DomainInfo, KeyChange, PoolError, PoolInfo};
use serde_json::{Value, json};

use super::crypto::absolute;
use super::{bdev_config, nvmf_config};
use crate::control::Control;
use crate::jsonrpc::{RpcError, RpcResult};
use crate::keys::{read_password, write_key_file};
use crate::params::{SecretText, choices, params};
use crate::pools::{Locked, PoolKey, Pools, Try, salt};
use crate::table::Method;
use slots::{add_slot, also_opens, file_kek, kept, new_slot, passwd, remove_slot, rotate_kek};

choices! {
    /// What a new slot is opened by.
    pub enum NewSlotKind {
        /// A password.
        Password = "password",
        /// A key file.
        KeyFile = "key_file",
        /// A key of a key server.
        Kms = "kms",
    }
}

params! {
    /// `cryptfold_encryption_status`.
    pub struct Status {
        /// Name or UUID of a pool; all pools when not given.
        name: Option<String>,
    }
    /// `cryptfold_encryption_unlock`.
    pub struct Unlock {
        /// Name or UUID of a locked pool, or its device.
        name: String,
        /// A password that opens it.
        password: Option<SecretText>,
        /// File with the password (mode 0600).
        password_file: Option<String>,
        /// Key file that opens it. Without one and without a password, everything at hand is tried, key servers too.
        key_file: Option<String>,
    }
    /// A pool.
    pub struct Name {
        /// Name or UUID of the pool.
        name: String,
    }
    /// `cryptfold_encryption_passwd`.
    pub struct Passwd {
        /// Name or UUID of the pool; it has to be unlocked.
        name: String,
        /// The present password.
        password: Option<SecretText>,
        /// File with it (mode 0600).
        password_file: Option<String>,
        /// The new password, at least 8 characters.
        new_password: Option<SecretText>,
        /// File with it (mode 0600).
        new_password_file: Option<String>,
    }
    /// `cryptfold_encryption_add_slot`.
    pub struct AddSlot {
        /// Name or UUID of the pool; it has to be unlocked.
        name: String,
        /// What opens the new slot.
        kind: NewSlotKind,
        /// Its password, at least 8 characters.
        password: Option<SecretText>,
        /// File with it (mode 0600).
        password_file: Option<String>,
        /// Its key file; made with a random key if it does not exist.
        key_file: Option<String>,
        /// Its key server.
        kms_server: Option<String>,
        /// Unique identifier of the key there (AES, 256 bits, active); a new one is made when not given.
        kms_object: Option<String>,
        /// For people, at most 48 bytes.
        label: Option<String>,
    }
    /// `cryptfold_encryption_remove_slot`.
    pub struct RemoveSlot {
        /// Name or UUID of the pool; it has to be unlocked.
        name: String,
        /// Number of the slot.
        slot: u32,
    }
    /// `cryptfold_encryption_rotate_kek`.
    pub struct RotateKek {
        /// Name or UUID of the pool; it has to be unlocked.
        name: String,
        /// Number of the slot; the only one when not given.
        slot: Option<u32>,
        /// A password's slot: the password, which stays.
        password: Option<SecretText>,
        /// File with it (mode 0600).
        password_file: Option<String>,
        /// A key file's slot: the file, which is replaced; the one that the pool was opened with when not given.
        key_file: Option<String>,
        /// A key server's slot: keep the old key there instead of destroying it.
        keep_old: bool = false,
    }
    /// `cryptfold_encryption_rotate` and `cryptfold_encryption_disable`.
    pub struct ChangeKeys {
        /// Name or UUID of the pool; it has to be unlocked.
        name: String,
        /// Name or UUID of one of its domains; all of them when not given.
        domain: Option<String>,
        /// Stored MB a second that are rewritten, at most [default: 100].
        rate_mb_s: Option<u32>,
    }
    /// `cryptfold_encryption_enable`.
    pub struct Enable {
        /// Name or UUID of the pool; it has to be unlocked.
        name: String,
        /// Name or UUID of one of its domains; all of them when not given.
        domain: Option<String>,
        /// Stored MB a second that are rewritten, at most [default: 100].
        rate_mb_s: Option<u32>,
        /// A pool that everybody can open: what opens it instead.
        kind: Option<NewSlotKind>,
        /// Its password, at least 8 characters.
        password: Option<SecretText>,
        /// File with it (mode 0600).
        password_file: Option<String>,
        /// Its key file; made with a random key if it does not exist.
        key_file: Option<String>,
        /// Its key server.
        kms_server: Option<String>,
        /// Unique identifier of the key there; a new one is made when not given.
        kms_object: Option<String>,
    }
    /// `cryptfold_encryption_renew`.
    pub struct Renew {
        /// Name or UUID of the pool; it has to be unlocked.
        name: String,
        /// Stored MB a second that are rewritten, at most [default: 100].
        rate_mb_s: Option<u32>,
    }
    /// `cryptfold_encryption_backup`.
    pub struct BackupTo {
        /// Name or UUID of the pool; it has to be unlocked.
        name: String,
        /// Password of the back-up, at least 8 characters.
        password: Option<SecretText>,
        /// File with it (mode 0600).
        password_file: Option<String>,
        /// File of the target's machine to write (never over another one); the text is replied when not given.
        filename: Option<String>,
    }
    /// `cryptfold_encryption_erase`.
    pub struct Erase {
        /// Name or UUID of the pool; it has to be unlocked.
        name: String,
        /// Name or UUID of one of its domains; the whole pool when not given.
        domain: Option<String>,
        /// The name of what is to be erased, again: the domain's, or the pool's.
        confirm: String,
        /// Keep the pool's keys at key servers instead of destroying them.
        keep_kms: bool = false,
        /// File of the target's machine for the certificate (never over another one), besides the reply.
        filename: Option<String>,
    }
    /// `cryptfold_encryption_restore`.
    pub struct Restore {
        /// Device of the pool, which must not be open.
        base_bdev_name: String,
        /// The back-up's text.
        backup: Option<String>,
        /// File with it.
        filename: Option<String>,
        /// Password of the back-up.
        password: Option<SecretText>,
        /// File with it (mode 0600).
        password_file: Option<String>,
        /// A password that opens the pool with the back-up's slots.
        pool_password: Option<SecretText>,
        /// File with it (mode 0600).
        pool_password_file: Option<String>,
        /// A key file that does.
        pool_key_file: Option<String>,
        /// Replace slots that are in order.
        force: bool = false,
    }
}

pub fn methods() -> Vec<Method> {
    vec![
        Method::new(
            "cryptfold_encryption_status",
            "Pools and what opens them. `state`: unlocked, or locked with the `reason`; `encrypted`: false when everybody can open \
             it; `domains`: of each whether what is written now is encrypted, the generation of its keys, and while they are `changing` how \
             many stored bytes (`old_bytes`) lie under older ones; `renewal`: how rewriting them stands; `slots`: number, kind (password, key_file, kms, open), since when, and where the key comes from; never a key. \
             `waiting_calls`: calls of the configuration that wait for volumes of locked pools. Ours.",
            status,
        ),
        Method::new(
            "cryptfold_encryption_unlock",
            "Opens a locked pool; then what stood on its volumes (namespaces, devices) is made again. Replies its UUID. -126: the \
             key does not fit. Ours.",
            unlock,
        ),
        Method::new(
            "cryptfold_encryption_lock",
            "Closes a pool and forgets its keys: its volumes are gone, hosts lose their namespaces, until cryptfold_encryption_unlock opens \
             it. Nothing else does, whatever key it is given, after a restart either (a file in the key directory, `locked/UUID`, says \
             so). A pool that is not open is locked alike. Replies true, or an object with a `warning` when that file can not be written: then it \
             is locked until the target ends. Ours.",
            |c, p: Name| lock_pool(c, &p.name),
        ),
        Method::new(
            "cryptfold_encryption_passwd",
            "Changes a password of a pool; replies the number of its slot. Afterwards only the new one opens the slot. Ours.",
            passwd,
        ),
        Method::new(
            "cryptfold_encryption_add_slot",
            "Lets something more open a pool; replies the number of the slot. Ours.",
            add_slot,
        ),
        Method::new(
            "cryptfold_encryption_remove_slot",
            "Takes a slot away: what it was opened by opens the pool no more. The last slot stays. Ours.",
            remove_slot,
        ),
        Method::new(
            "cryptfold_encryption_rotate_kek",
            "Gives a slot another key-encryption key: a key file gets a new random key (the old one is overwritten), a key server a new \
             key (the old one is revoked and destroyed unless keep_old), a password another salt. Data is not touched. A key that also opens another slot, or another pool \
             that is attached here (open or locked), is kept: `old_kept` says which, `old_key_file` where; pools that are not attached \
             can not be seen. Ours.",
            rotate_kek,
        ),
        Method::new(
            "cryptfold_encryption_rotate",
            "Gives a domain of a pool, or all of them, a new data key and a new fingerprint secret. What is written from now on is \
             written with them; what is there (snapshots, clones and metadata too) is rewritten in the background, also after restarts. When nothing \
             is left under the old keys, what opens them is overwritten and read back. Replies the domains. -16: their keys are \
             being changed already. Ours.",
            |c, p: ChangeKeys| change_domains(c, &p.name, p.domain, p.rate_mb_s, KeyChange::Rotate),
        ),
        Method::new(
            "cryptfold_encryption_disable",
            "Switches encryption of a domain, or of all of a pool, off: it gets new keys, with which what is stored is authenticated \
             and not encrypted; what is there is rewritten in the background. The pool keeps its slots, and is opened by them. \
             Replies the domains. Ours.",
            |c, p: ChangeKeys| change_domains(c, &p.name, p.domain, p.rate_mb_s, KeyChange::Disable),
        ),
        Method::new(
            "cryptfold_encryption_enable",
            "Switches encryption of a domain, or of all of a pool, on again, with new keys; what is there is rewritten in the \
             background. Then all free space of the device is overwritten once, because it may have data in clear. A pool that everybody can \
             open needs a slot for that (`kind` and what it needs), which takes the open one's place. Replies the domains. Ours.",
            enable,
        ),
        Method::new(
            "cryptfold_encryption_renew",
            "Goes on with rewriting data under new keys where it was stopped (`reason` of `renewal` in the status), or changes \
             its rate. Replies how it stands. Ours.",
            |c, p: Renew| {
                let (pools, rate) = (c.pools()?, rate(p.rate_mb_s)?);
                Ok(json!(pools.manager().start_renewal(&pools.find(&p.name)?.name, rate)?))
            },
        ),
        Method::new(
            "cryptfold_encryption_backup",
            "A pool's key slots and superblock, encrypted with a password of its own: for the day on which all copies on the device \
             are lost. Make it again after each change of slots and each erasure. Ours.",
            backup,
        ),
        Method::new(
            "cryptfold_encryption_erase",
            "Erases a pool, or a domain of it with all its volumes and snapshots, at once, whatever they hold: what opens their keys is \
             overwritten and read back, keys of the pool at key servers are destroyed, unless they also open another pool that is attached \
             here, open or locked (pools that are not attached can not be seen). Hosts lose the volumes; the space of a domain is \
             free. Replies a signed certificate that says what was done and what is not claimed, with a `warning` beside it if something failed after the erasure. There is no way back. Ours.",
            erase,
        ),
        Method::new(
            "cryptfold_encryption_restore",
            "Brings the key slots of a back-up to the pool's device. The superblock comes back only if no copy of it is left: then the \
             pool is as it was at the back-up, or does not open if what it consisted of has been overwritten since. Replies what was \
             brought back. Ours.",
            restore,
        ),
    ]
}

/// A password of a request.
pub fn password(text: &SecretText) -> Result<Password, RpcError> {
    Password::new(text.0.to_string()).map_err(|e| RpcError::params(format!("password: {e}")))
}

/// A password in the request or in a file; `what`: the parameter's name.
fn given(what: &str, text: Option<SecretText>, file: Option<String>) -> Result<Password, RpcError> {
    let other = || RpcError::params(format!("{what}: either this or {what}_file is needed"));
    given_if_any(text, file)?.ok_or_else(other)
}

fn given_if_any(text: Option<SecretText>, file: Option<String>) -> Result<Option<Password>, RpcError> {
    match (text, file) {
        (Some(text), None) => password(&text).map(Some),
        (None, Some(file)) => Ok(Some(read_password(&absolute(&file)?)?)),
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(RpcError::params("password: given twice, in the request and in a file")),
    }
}

fn kdf(kdf: &Kdf) -> Value {
    match kdf {
        Kdf::None => Value::Null,
        Kdf::Argon2id { memory_kib, passes, lanes, .. } => {
            json!({"name": "argon2id", "memory_kib": memory_kib, "passes": passes, "lanes": lanes})
        }
        Kdf::Pbkdf2 { iterations, .. } => json!({"name": "pbkdf2-sha256", "iterations": iterations}),
    }
}

fn kind(kind: SlotKind) -> &'static str {
    match kind {
        SlotKind::KeyFile => "key_file",
        SlotKind::Password => "password",
        SlotKind::Kms => "kms",
        SlotKind::Open => "open",
    }
}

fn describe_slots(block: &KeyBlock) -> Value {
    let used = block.slots.iter().enumerate().filter_map(|(at, slot)| Some((at, slot.as_ref()?)));
    used.map(|(at, s)| {
        let id: String = s.kek_id.iter().take(8).map(|b| format!("{b:02x}")).collect();
        let mut slot = json!({"slot": at, "kind": kind(s.kind), "label": s.label, "created_ms": s.created_ms, "key_id": id});
        if s.kind == SlotKind::Password {
            slot["kdf"] = kdf(&s.kdf);
        }
        if s.kind == SlotKind::Kms {
            slot["kms_object"] = json!(s.reference);
        }
        slot
    })
    .collect()
}

fn is_encrypted(block: &KeyBlock) -> bool {
    !block.slots.iter().flatten().any(|s| s.kind == SlotKind::Open)
}

fn opened_by(pools: &Pools, info: &PoolInfo) -> Value {
    match pools.key_of(info.uuid) {
        Some(PoolKey::File(path)) => json!({"key_file": path}),
        Some(PoolKey::PasswordFile(path)) => json!({"password_file": path}),
        Some(PoolKey::Kms) => json!({"kms": true}),
        Some(PoolKey::Given) => json!({"password": "given by hand; starts locked"}),
        Some(PoolKey::None) | None => Value::Null,
    }
}

fn describe(pools: &Pools, info: &PoolInfo) -> Result<Value, PoolError> {
    let block = pools.manager().key_block(&info.name)?;
    let domains = pools.manager().domains(&info.name)?;
    Ok(json!({
        "name": info.name, "uuid": info.uuid.to_string(), "base_bdev": info.base_bdev, "state": "unlocked",
        "encrypted": is_encrypted(&block), "approved": info.approved, "opened_by": opened_by(pools, info), "slots": describe_slots(&block),
        "erasable": block.erasure[0].is_some(), "renewal": info.renewal,
        "domains": domains.iter().map(describe_domain).collect::<Vec<_>>(),
    }))
}

fn describe_domain(d: &DomainInfo) -> Value {
    json!({
        "name": d.name, "uuid": d.uuid.to_string(), "encrypted": d.encrypted, "generation": d.generation,
        "changing": d.changing, "old_bytes": d.old_bytes,
    })
}

fn rate(mb_s: Option<u32>) -> Result<u64, RpcError> {
    match mb_s {
        Some(0) => Err(RpcError::params("rate_mb_s: at least 1 is needed")),
        Some(mb) => Ok(u64::from(mb) * 1_000_000),
        None => Ok(DEFAULT_RENEWAL_BYTES_PER_S),
    }
}

/// Changes keys of domains, and writes that to the audit log.
fn change_domains(
    c: &Control,
    name: &str,
    domain: Option<String>,
    rate_mb_s: Option<u32>,
    change: KeyChange,
) -> RpcResult {
    let (pools, rate) = (c.pools()?, rate(rate_mb_s)?);
    let pool = pools.find(name)?.name;
    let changed = pools.manager().change_domain_keys(&pool, domain.as_deref(), change, rate);
    match &changed {
        Ok(_) => tracing::info!(target: AUDIT, event = "domain keys changed", pool, domain, ?change),
        Err(e) => {
            tracing::warn!(target: AUDIT, event = "domain keys changed", pool, domain, ?change, refused = %e);
        }
    }
    Ok(changed?.iter().map(describe_domain).collect())
}

fn enable(c: &Control, p: Enable) -> RpcResult {
    let pools = c.pools()?;
    let info = pools.find(&p.name)?;
    let is_open = !is_encrypted(&pools.manager().key_block(&info.name)?);
    let Some(kind) = p.kind else {
        if is_open {
            return Err(RpcError::params(format!(
                "kind: pool \"{}\" opens for everybody; password, key_file or kms is needed: what is to open it instead",
                info.name
            )));
        }
        return change_domains(c, &p.name, p.domain, p.rate_mb_s, KeyChange::Enable);
    };
    if !is_open {
        return Err(RpcError::params(format!(
            "kind: pool \"{}\" has key slots; cryptfold_encryption_add_slot adds another",
            info.name
        )));
    }
    if p.domain.is_some() {
        return Err(RpcError::params("domain: a pool that opens for everybody is encrypted as a whole"));
    }
    rate(p.rate_mb_s)?;
    let key = match (kind, &p.password_file, &p.key_file) {
        (NewSlotKind::Password, Some(file), _) => PoolKey::PasswordFile(absolute(file)?),
        (NewSlotKind::Password, None, _) => PoolKey::Given,
        (NewSlotKind::KeyFile, _, Some(file)) => PoolKey::File(absolute(file)?),
        (NewSlotKind::KeyFile, _, None) => {
            return Err(RpcError::params("key_file: missing; the slot's file is needed"));
        }
        (NewSlotKind::Kms, ..) => PoolKey::Kms,
    };
    let Enable { name, password, password_file, key_file, kms_server, kms_object, .. } = p;
    new_slot(
        c,
        AddSlot {
            name: name.clone(),
            kind,
            password,
            password_file,
            key_file,
            kms_server,
            kms_object,
            label: None,
        },
        true,
    )?;
    pools.set_key(info.uuid, key);
    // What was under keys that everybody could have gets new ones, whether it was encrypted or not.
    let domains = pools.manager().domains(&info.name)?;
    let mut changed = Vec::new();
    for domain in domains {
        let change = if domain.encrypted { KeyChange::Rotate } else { KeyChange::Enable };
        let done = change_domains(c, &name, Some(domain.uuid.to_string()), p.rate_mb_s, change)?;
        changed.extend(done.as_array().cloned().unwrap_or_default());
    }
    Ok(changed.into())
}

fn describe_locked(l: &Locked) -> Value {
    json!({
        "name": l.pool.name, "uuid": l.pool.uuid.to_string(), "base_bdev": l.pool.base_bdev, "state": "locked",
        "reason": l.reason, "waits_for_key_server": l.waiting, "encrypted": is_encrypted(&l.pool.keys), "approved": l.pool.approved,
        "slots": describe_slots(&l.pool.keys), "erasable": l.pool.keys.erasure[0].is_some(),
    })
}

fn status(c: &Control, p: Status) -> RpcResult {
    let pools = c.pools()?;
    let list: Vec<Value> = match p.name {
        Some(name) => match pools.find_locked(&name) {
            Some(locked) => vec![describe_locked(&locked)],
            None => vec![describe(pools, &pools.find(&name)?)?],
        },
        None => {
            let open = pools.manager().list();
            // One that has been closed meanwhile hides no other.
            let open = open.iter().map(|i| describe(pools, i));
            let open = open.filter(|told| !matches!(told, Err(PoolError::NoPool(_))));
            open.collect::<Result<Vec<Value>, PoolError>>()?
                .into_iter()
                .chain(pools.locked().iter().map(describe_locked))
                .collect()
        }
    };
    let waiting: Vec<String> = c.deferred.calls().into_iter().map(|(method, _)| method).collect();
    Ok(json!({"pools": list, "waiting_calls": waiting}))
}

fn unlock(c: &Control, p: Unlock) -> RpcResult {
    let pools = c.pools()?;
    let Some(locked) = pools.find_locked(&p.name) else {
        // Says whether it is open or unknown.
        let info = pools.find(&p.name)?;
        return Err(RpcError::exists(format!("pool \"{}\" is not locked", info.name)));
    };
    let password = given_if_any(p.password, p.password_file)?;
    let key = match (&password, p.key_file) {
        (Some(password), None) => Try::Password(password),
        (None, Some(file)) => Try::Key(PoolKey::File(absolute(&file)?)),
        (None, None) => Try::All,
        (Some(_), Some(_)) => {
            return Err(RpcError::params("key_file: either this or a password can be given"));
        }
    };
    let opened = pools.unlock(&locked.pool.base_bdev, key, locked.memory_budget);
    let info = match opened {
        Ok(Some(info)) => info,
        Ok(None) => return Err(RpcError::no_device(&locked.pool.base_bdev)),
        Err(e) => {
            let reason = e.message.as_str();
            tracing::warn!(target: AUDIT, event = "unlock refused", pool = locked.pool.name, reason);
            return Err(e);
        }
    };
    c.pool_opened(&info.name);
    Ok(json!(info.uuid.to_string()))
}

fn lock_pool(c: &Control, name: &str) -> RpcResult {
    let pools = c.pools()?;
    let open_to_all = |name: &str| {
        RpcError::params(format!("name: pool \"{name}\" is not encrypted: locking it would keep nobody out"))
    };
    let reply = |warning: Option<String>| warning.map_or(json!(true), |w| json!({"warning": w}));
    if let Some(locked) = pools.find_locked(name).filter(|l| !is_encrypted(&l.pool.keys)) {
        return Err(open_to_all(&locked.pool.name));
    }
    let info = match pools.find(name) {
        Ok(info) => info,
        Err(_) => match pools.shut_closed(name) {
            Some(shut) => return Ok(reply(shut.warning)),
            // Unknown, or opened just now.
            None => pools.find(name)?,
        },
    };
    if pools.key_of(info.uuid) == Some(PoolKey::None) {
        return Err(open_to_all(&info.name));
    }
    // What stands on it; a configuration that can not be told keeps no pool open.
    let all = || {
        let bdevs = bdev_config(c).inspect_err(|e| {
            tracing::warn!(pool = info.name, error = e.message, "what stands on the pool can not be told");
        });
        [bdevs.unwrap_or_default(), nvmf_config(c)].concat()
    };
    let before = all();
    let shut = pools.shut(&info)?;
    let after = all();
    for (method, params) in before.into_iter().filter(|call| !after.contains(call)) {
        if method != "cryptfold_pool_open" {
            c.deferred.add(&method, params);
        }
    }
    c.watch.note("pool_close", &info.name);
    shut.closed?;
    Ok(reply(shut.warning))
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |t| t.as_millis() as u64)
}

fn backup(c: &Control, p: BackupTo) -> RpcResult {
    let password = given("password", p.password, p.password_file)?;
    let pools = c.pools()?;
    let info = pools.find(&p.name)?;
    let (pool, (cost, _)) = (info.name, c.config.fips.costs(info.approved));
    let (keys, superblock) = pools.manager().backup(&pool)?;
    let backup = Backup { keys, superblock };
    let text = cryptfold_keystore::export(&backup, &password, cost, salt(), now_ms())
        .map_err(|e| RpcError::internal(e.to_string()))?;
    tracing::info!(target: AUDIT, event = "key slots backed up", pool, file = p.filename);
    match p.filename {
        None => Ok(json!(text)),
        Some(file) => {
            write_key_file(&absolute(&file)?, text.as_bytes())?;
            Ok(json!(true))
        }
    }
}

/// What no erasure by overwriting can claim.
const NOT_CLAIMED: [&str; 4] = [
    "that the drive, or what is between here and the drive (file system, cache, snapshot, RAID), keeps no older copy of the blocks \
     that were overwritten",
    "anything about back-ups of key slots made before, and copies of the device or of parts of it",
    "anything about what hosts have read and kept, or about the memory of this machine",
    "that the names of volumes and domains, their sizes and the times of their changes can not be found on the device",
];

fn erase(c: &Control, p: Erase) -> RpcResult {
    let pools = c.pools()?;
    let info = pools.find(&p.name)?;
    let what = p.domain.as_ref().unwrap_or(&info.name);
    if p.confirm != *what {
        return Err(RpcError::params(format!("confirm: \"{what}\" is needed to erase it")));
    }
    if let Some(file) = &p.filename
        && absolute(file)?.exists()
    {
        return Err(RpcError::exists(file));
    }
    // What can fail without harm fails before anything is gone.
    let signer = crate::certificate::signer(&c.config.key_dir)?;
    let mut content = json!({
        "pool": {"name": info.name, "uuid": info.uuid.to_string()}, "base_bdev": info.base_bdev,
        "not_claimed": NOT_CLAIMED,
    });
    let places =
        |offsets: &[u64]| json!({"device": info.base_bdev, "byte_offsets": offsets, "bytes_each": 4096});
    let mut warning = None;
    match &p.domain {
        Some(domain) => {
            let erased = pools.manager().erase_domain(&info.name, domain)?;
            content["what"] = "domain".into();
            content["domain"] = json!({
                "name": erased.name, "uuid": erased.uuid.to_string(), "key_generations": erased.generations,
                "volumes": erased.volumes.iter().map(|(uuid, name)| json!({"uuid": uuid.to_string(), "name": name})).collect::<Vec<_>>(),
            });
            content["done"] = json!([
                "the domain's data key and fingerprint secret were wrapped through a secret that the pool keeps in the places below \
                 and nowhere else; it was replaced there, flushed, and the places were read back without it",
                "the keys of the pool's other domains were wrapped anew",
            ]);
            content["overwritten"] = places(&erased.overwritten);
        }
        None => {
            let block = pools.manager().key_block(&info.name)?;
            let budget = Some(info.memory_budget_bytes);
            content["what"] = "pool".into();
            let slots = match pools.manager().erase(&info.name) {
                Ok(erased) => {
                    content["done"] = json!([
                        "the places below, which alone had the pool's wrapped key, were overwritten with random bytes and with \
                         zeros, flushed and read back each time; then the superblocks were overwritten",
                    ]);
                    content["overwritten"] = places(&erased.overwritten);
                    erased.slots
                }
                Err(e) => {
                    not_erased(pools, &info, budget, &e)?;
                    warning = Some(format!("the pool is erased, but not everything was done for it: {e}"));
                    content["done"] = json!([
                        "the places that alone had the pool's wrapped key were overwritten; then the device failed, and the device \
                         was read: no copy of the wrapped key was found on it",
                    ]);
                    content["not_done"] = json!([format!(
                        "overwriting all of the places and the superblocks with zeros, and reading that back: {e}"
                    )]);
                    block.slots.into_iter().flatten().collect()
                }
            };
            pools.forget(info.uuid);
            content["slots"] =
                slots.iter().map(|s| json!({"kind": kind(s.kind), "label": s.label})).collect();
            content["key_servers"] = slots
                .iter()
                .filter(|s| s.kind == SlotKind::Kms)
                .map(|s| match also_opens(pools, s, &info.base_bdev, None) {
                    Some(other) => json!({"object": s.reference, "destroyed": false, "reason": kept(&other)}),
                    None if p.keep_kms => {
                        json!({"object": s.reference, "destroyed": false, "reason": "kept by request"})
                    }
                    None => match c.kms.destroy_kek(&s.reference) {
                        Ok(server) => json!({"object": s.reference, "destroyed": true, "server": server}),
                        Err(e) => json!({"object": s.reference, "destroyed": false, "reason": e.to_string()}),
                    },
                })
                .collect();
            c.watch.note("pool_close", &info.name);
        }
    }
    tracing::warn!(target: AUDIT, event = "erased", pool = info.name, domain = p.domain);
    let mut signed = crate::certificate::sign(&signer, content, now_ms());
    if let Some(file) = p.filename {
        let written = absolute(&file).and_then(|path| {
            write_key_file(&path, format!("{signed:#}\n").as_bytes()).map_err(RpcError::from)
        });
        // It is the only proof of what can not be done again: the reply has it.
        if let Err(e) = written {
            let what = format!("the certificate is not in a file, keep this one: {}", e.message);
            warning = Some(warning.map_or(what.clone(), |before: String| format!("{before}; {what}")));
        }
    }
    if let Some(warning) = warning {
        tracing::warn!(target: AUDIT, event = "erased with a warning", pool = info.name, warning);
        signed["warning"] = warning.into();
    }
    Ok(signed)
}

/// After an erasure of a pool that failed: `Ok` when its device shows that what opens it is gone all the same.
fn not_erased(
    pools: &Pools,
    info: &PoolInfo,
    memory_budget: Option<u64>,
    e: &PoolError,
) -> Result<(), RpcError> {
    if pools.manager().list().iter().any(|i| i.uuid == info.uuid) {
        return Err(e.clone().into());
    }
    match pools.manager().peek(&info.base_bdev) {
        // The superblocks go after the last copy of the key.
        Err(PoolError::Erased { .. }) | Ok(None) => Ok(()),
        Ok(Some(pool)) => {
            // Closed, and whole.
            pools.forget(info.uuid);
            let reason = format!("its erasure failed: {e}");
            pools.set_locked(Locked { pool, reason, waiting: false, memory_budget });
            Err(e.clone().into())
        }
        Err(_) => Err(RpcError::new(
            e.code().into(),
            format!(
                "{e}; whether pool \"{}\" still opens is not known: its device can not be read",
                info.name
            ),
        )),
    }
}

fn restore(c: &Control, p: Restore) -> RpcResult {
    let pools = c.pools()?;
    let text = match (p.backup, p.filename) {
        (Some(text), None) => text,
        (None, Some(file)) => read_backup(&absolute(&file)?)?,
        _ => return Err(RpcError::params("filename: either this or backup is needed")),
    };
    let password = given("password", p.password, p.password_file)?;
    let limits = c.config.fips.limits();
    let backup = cryptfold_keystore::import(&text, &password, &limits).map_err(|e| match e {
        ExportError::Password(PasswordError::NotApproved) => RpcError::params(
            "backup: its password goes through Argon2id, which FIPS 140-3 does not approve: it is of a pool that was not made for the FIPS \
             modes, and was made with --fips-mode off; restore it in that mode",
        ),
        e => RpcError::params(format!("backup: {e}")),
    })?;
    let base = c.registry.get(&p.base_bdev_name)?;
    if let Some(open) = pools.manager().list().into_iter().find(|i| i.base_bdev == base.name()) {
        return Err(RpcError::busy(format!("pool \"{}\" is open; lock or close it first", open.name)));
    }
    let pool_password = given_if_any(p.pool_password, p.pool_password_file)?;
    let kek = match (&pool_password, p.pool_key_file) {
        (Some(password), None) => cryptfold_keystore::find(&backup.keys, password, &limits)?.1,
        (None, Some(file)) => file_kek(&absolute(&file)?)?,
        (None, None) => kms_kek(c, &backup.keys)?,
        (Some(_), Some(_)) => {
            return Err(RpcError::params("pool_key_file: either this or a password can be given"));
        }
    };
    let restored = pools.manager().restore(base.name(), &backup.keys, &backup.superblock, &kek, p.force);
    let superblock = restored?;
    tracing::info!(target: AUDIT, event = "key slots restored", bdev = base.name(), pool = %backup.keys.pool, superblock);
    pools.list_locked(base.name(), None)?;
    Ok(json!({"pool": backup.keys.pool.to_string(), "slots": true, "superblock": superblock}))
}

/// The key of a key server that opens one of these slots.
fn kms_kek(c: &Control, block: &KeyBlock) -> Result<Kek, RpcError> {
    let mut refused = RpcError::params("pool_password: this, pool_password_file or pool_key_file is needed");
    for slot in block.slots.iter().flatten().filter(|s| s.kind == SlotKind::Kms) {
        match c.kms.kek(&slot.reference) {
            Ok((_, kek)) => return Ok(kek),
            Err(e) => refused = e.into(),
        }
    }
    Err(refused)
}

fn read_backup(path: &Path) -> Result<String, RpcError> {
    use std::io::Read as _;
    let failed = |e: std::io::Error| {
        RpcError::new(-i64::from(e.raw_os_error().unwrap_or(5)), format!("{}: {e}", path.display()))
    };
    let mut text = String::new();
    std::fs::File::open(path).map_err(failed)?.take(1 << 20).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}
