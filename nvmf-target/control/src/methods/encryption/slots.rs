//! Key slots: what opens a pool is changed, added, taken away and replaced.

use std::io::{Seek as _, Write as _};
use std::path::{Path, PathBuf};

use cryptfold_keystore::{Cost, Limits, NewSlot, Password, StoreError};
use cryptfold_nvmf_target::audit::TARGET as AUDIT;
use cryptfold_reduce::PoolInfo;
use cryptfold_reduce::keys::Kek;
use cryptfold_reduce::slots::{Kdf, KeyBlock, KeySlot, SlotKind};
use serde_json::json;

use super::{AddSlot, NewSlotKind, Passwd, RemoveSlot, RotateKek, given, is_encrypted, now_ms};
use crate::control::Control;
use crate::jsonrpc::{RpcError, RpcResult};
use crate::keys::{hex_line, random_key, read_key, write_key_file};
use crate::methods::crypto::absolute;
use crate::pools::{PoolKey, Pools, make_key, salt, short};

/// Changes a pool's slots, and writes that to the audit log.
fn change<T>(
    c: &Control,
    name: &str,
    event: &'static str,
    change: impl FnOnce(&mut KeyBlock, &cryptfold_reduce::keys::PoolKey) -> Result<T, RpcError>,
) -> Result<T, RpcError> {
    let pools = c.pools()?;
    let pool = pools.find(name)?.name;
    let done = pools.manager().change_keys(&pool, change);
    match &done {
        Ok(_) => tracing::info!(target: AUDIT, event, pool),
        Err(e) => tracing::warn!(target: AUDIT, event, pool, refused = e.message),
    }
    done
}

/// What a new password of a pool costs, and what its slots may ask for.
fn costs(c: &Control, pool: &str) -> Result<(Cost, Limits), RpcError> {
    Ok(c.config.fips.costs(c.pools()?.find(pool)?.approved))
}

/// Gives a password's slot another password, or the same with another salt: this slot, if it is given. The number of the slot.
fn change_password(
    c: &Control,
    (pool, event): (&str, &'static str),
    (old, new): (&Password, &Password),
    wanted: Option<usize>,
) -> Result<usize, RpcError> {
    let (cost, limits) = costs(c, pool)?;
    let fresh = NewSlot { cost, salt: salt(), created_ms: now_ms(), label: "" };
    change(c, pool, event, |block, _| {
        let old = (old, &c.config.fips.limits());
        let at = cryptfold_keystore::change_password(block, old, new, &fresh, &limits)?;
        match wanted.filter(|wanted| *wanted != at) {
            Some(wanted) => Err(RpcError::params(format!("password: it opens key slot {at}, not {wanted}"))),
            None => Ok(at),
        }
    })
}

pub(super) fn passwd(c: &Control, p: Passwd) -> RpcResult {
    let old = given("password", p.password, p.password_file)?;
    let new = given("new_password", p.new_password, p.new_password_file)?;
    let at = change_password(c, (&p.name, "password changed"), (&old, &new), None)?;
    Ok(json!(at))
}

/// Puts a slot into the first free place.
fn put(block: &mut KeyBlock, slot: KeySlot) -> Result<usize, RpcError> {
    let count = block.slots.len();
    let at = block.slots.iter().position(Option::is_none).ok_or(StoreError::Full(count))?;
    block.slots[at] = Some(slot);
    Ok(at)
}

fn seal(
    kek: &Kek,
    key: &cryptfold_reduce::keys::PoolKey,
    slot: SlotKind,
    label: &str,
    reference: &str,
) -> Result<KeySlot, RpcError> {
    let slot = KeySlot::seal(slot, Kdf::None, kek, key, now_ms()).map_err(StoreError::from)?;
    let slot = KeySlot { label: label.into(), reference: reference.into(), ..slot };
    slot.encode().map_err(StoreError::from)?;
    Ok(slot)
}

pub(super) fn file_kek(path: &Path) -> Result<Kek, RpcError> {
    let bytes = read_key(path, &[32])?;
    Kek::from_file(&bytes).map_err(|e| RpcError::params(format!("key_file: {}: {e}", path.display())))
}

pub(super) fn add_slot(c: &Control, p: AddSlot) -> RpcResult {
    let pools = c.pools()?;
    let info = pools.find(&p.name)?;
    if !is_encrypted(&pools.manager().key_block(&info.name)?) {
        return Err(RpcError::params(format!(
            "name: pool \"{}\" is not encrypted; another slot would keep nobody out",
            info.name
        )));
    }
    new_slot(c, p, false)
}

/// Adds a slot; with `alone` it takes the place of the open one.
pub(super) fn new_slot(c: &Control, p: AddSlot, alone: bool) -> RpcResult {
    let event = "key slot added";
    let close = |block: &mut KeyBlock| {
        for slot in block.slots.iter_mut().filter(|_| alone) {
            if slot.as_ref().is_some_and(|slot| slot.kind == SlotKind::Open) {
                *slot = None;
            }
        }
    };
    let at = match p.kind {
        NewSlotKind::Password => {
            let password = given("password", p.password, p.password_file)?;
            let label = p.label.unwrap_or_else(|| "password".into());
            let (cost, limits) = costs(c, &p.name)?;
            let new = NewSlot { cost, salt: salt(), created_ms: now_ms(), label: &label };
            change(c, &p.name, event, |block, key| {
                let at = cryptfold_keystore::add_password(block, key, &password, &new, &limits)?;
                close(block);
                Ok(at)
            })?
        }
        NewSlotKind::KeyFile => {
            let path =
                p.key_file.ok_or_else(|| RpcError::params("key_file: missing; the slot's file is needed"))?;
            let path = absolute(&path)?;
            let made = make_key(&path)?;
            let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            let label = p.label.unwrap_or_else(|| short(&name));
            let kek = file_kek(&path)?;
            let mut handed_over = false;
            let added = change(c, &p.name, event, |block, key| {
                let at = put(block, seal(&kek, key, SlotKind::KeyFile, &label, "")?)?;
                close(block);
                handed_over = true;
                Ok(at)
            });
            // Once the slot may have been written, the file may open it.
            if added.is_err() && made && !handed_over {
                let _ = std::fs::remove_file(&path);
            }
            added?
        }
        NewSlotKind::Kms => {
            let server = p
                .kms_server
                .ok_or_else(|| RpcError::params("kms_server: missing; the key server is needed"))?;
            let (id, kek) = c.kms.new_kek(&server, p.kms_object.as_deref())?;
            let label = p.label.unwrap_or_else(|| short(&server));
            change(c, &p.name, event, |block, key| {
                let at = put(block, seal(&kek, key, SlotKind::Kms, &label, &id)?)?;
                close(block);
                Ok(at)
            })?
        }
    };
    Ok(json!(at))
}

pub(super) fn remove_slot(c: &Control, p: RemoveSlot) -> RpcResult {
    change(c, &p.name, "key slot removed", |block, _| {
        Ok(cryptfold_keystore::remove(block, p.slot as usize)?)
    })?;
    Ok(json!(true))
}

pub(super) fn rotate_kek(c: &Control, p: RotateKek) -> RpcResult {
    let pools = c.pools()?;
    let info = pools.find(&p.name)?;
    let block = pools.manager().key_block(&info.name)?;
    let used: Vec<usize> = (0..block.slots.len()).filter(|at| block.slots[*at].is_some()).collect();
    let at = match (p.slot, &used[..]) {
        (Some(at), _) => at as usize,
        (None, [one]) => *one,
        (None, _) => {
            return Err(RpcError::params(
                "slot: missing; the pool has several (cryptfold_encryption_status shows them)",
            ));
        }
    };
    let slot = block.slots.get(at).cloned().flatten().ok_or(StoreError::Empty(at))?;
    let event = "key-encryption key rotated";
    let same = |block: &KeyBlock| match block.slots[at].as_ref() == Some(&slot) {
        true => Ok(()),
        false => Err(RpcError::busy(format!("key slot {at} was changed meanwhile"))),
    };
    match slot.kind {
        SlotKind::Open => Err(RpcError::params("slot: the pool is not encrypted; everybody knows this key")),
        SlotKind::Password => {
            let password = given("password", p.password, p.password_file)?;
            change_password(c, (&p.name, event), (&password, &password), Some(at))?;
            Ok(json!({"slot": at}))
        }
        SlotKind::KeyFile => {
            let path = match (p.key_file, pools.key_of(info.uuid)) {
                (Some(path), _) => absolute(&path)?,
                (None, Some(PoolKey::File(path))) => path,
                (None, _) => {
                    return Err(RpcError::params(
                        "key_file: missing; the file that is to be replaced is needed",
                    ));
                }
            };
            if slot.open(&file_kek(&path)?).is_err() {
                return Err(RpcError::new(-126, format!("{} does not open key slot {at}", path.display())));
            }
            let mut reply = json!({"slot": at, "key_file": path});
            if let Some((old, other)) = rotate_file(c, &info, (at, &slot), &path, event)? {
                reply["old_key_file"] = json!(old);
                reply["old_kept"] = kept(&other).into();
            }
            Ok(reply)
        }
        SlotKind::Kms => {
            // The old key has to be there, too: nobody else rotates.
            let (server, _) = c.kms.kek(&slot.reference)?;
            let (id, kek) = c.kms.new_kek(&server, None)?;
            let mut handed_over = false;
            let sealed = change(c, &p.name, event, |block, key| {
                same(block)?;
                block.slots[at] = Some(seal(&kek, key, SlotKind::Kms, &slot.label, &id)?);
                handed_over = true;
                Ok(())
            });
            match sealed {
                Ok(()) => {}
                // The slot may have been written, and then this key alone opens it.
                Err(e) if handed_over => {
                    let what = format!(
                        "{}; the new key \"{id}\" and the old one \"{}\" are kept at key server \"{server}\"",
                        e.message, slot.reference
                    );
                    return Err(RpcError::new(e.code, what));
                }
                Err(e) => {
                    // Nothing is wrapped with it.
                    let _ = c.kms.destroy_kek(&id);
                    return Err(e);
                }
            }
            let mut reply = json!({"slot": at, "kms_object": id, "old_kms_object": slot.reference});
            if let Some(other) = also_opens(pools, &slot, &info.base_bdev, Some(at)) {
                reply["old_destroyed"] = false.into();
                reply["old_kept"] = kept(&other).into();
            } else if !p.keep_old {
                match c.kms.destroy_kek(&slot.reference) {
                    Ok(_) => reply["old_destroyed"] = true.into(),
                    Err(e) => {
                        reply["old_destroyed"] = false.into();
                        reply["old_error"] = json!(e.to_string());
                    }
                }
            }
            Ok(reply)
        }
    }
}

/// Another slot that is opened by what opens `slot`: of which pool. Slots of all pools known here are looked at, open and locked,
/// but for slot `at` of the pool on `base` (all of them if it is `None`). Other machines' pools can not be seen.
pub(super) fn also_opens(pools: &Pools, slot: &KeySlot, base: &str, at: Option<usize>) -> Option<String> {
    // The same key, under whatever name; or the same object, whatever was wrapped with it. One reference at two servers counts
    // as one object: a key that is kept can still be destroyed.
    let is = |other: &KeySlot| {
        other.kek_id == slot.kek_id || (slot.kind == SlotKind::Kms && other.reference == slot.reference)
    };
    let opens = |block: &KeyBlock, device: &str| {
        let used = block.slots.iter().enumerate().filter_map(|(i, s)| Some((i, s.as_ref()?)));
        used.filter(|(i, _)| device != base || at.is_some_and(|at| at != *i)).any(|(_, s)| is(s))
    };
    let open = pools.manager().list().into_iter().find(|i| {
        let ours = i.base_bdev == base && at.is_none();
        // Slots that can not be looked at may be anything.
        !ours && pools.manager().key_block(&i.name).map_or(true, |block| opens(&block, &i.base_bdev))
    });
    let locked = || pools.locked().into_iter().find(|l| opens(&l.pool.keys, &l.pool.base_bdev));
    open.map(|i| i.name).or_else(|| locked().map(|l| l.pool.name))
}

pub(super) fn kept(pool: &str) -> String {
    format!("kept: it also opens {pool}")
}

/// Gives a key file a second name, which is free, and with which the search for keys finds it.
fn second_name(path: &Path) -> std::io::Result<PathBuf> {
    use std::os::unix::fs::MetadataExt as _;
    let file = |path: &Path| path.metadata().map(|m| (m.dev(), m.ino()));
    let mut taken = std::io::Error::from(std::io::ErrorKind::AlreadyExists);
    for n in 1..=64 {
        let aside = path.with_extension(format!("old-{n}.key"));
        match std::fs::hard_link(path, &aside) {
            Ok(()) => return Ok(aside),
            // A rotation that was cut short has left it.
            Err(_) if file(&aside).ok() == Some(file(path)?) => return Ok(aside),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => taken = e,
            Err(e) => return Err(e),
        }
    }
    Err(taken)
}

/// Moves the new key's slot to the place of the old one, if both are what they were.
fn take_over(
    block: &mut KeyBlock,
    (at, old): (usize, &KeySlot),
    (extra, new): (usize, &KeySlot),
) -> Result<(), RpcError> {
    for (at, slot) in [(at, old), (extra, new)] {
        if block.slots[at].as_ref() != Some(slot) {
            return Err(RpcError::busy(format!("key slot {at} was changed meanwhile")));
        }
    }
    block.slots[at] = block.slots[extra].take();
    Ok(())
}

/// A new key for a key file: both keys open the pool until the file is replaced, so a crash at any point leaves a file that does.
/// The old file has a second name meanwhile, and keeps it if it also opens something else: that name, and which pool.
fn rotate_file(
    c: &Control,
    info: &PoolInfo,
    (at, slot): (usize, &KeySlot),
    path: &Path,
    event: &'static str,
) -> Result<Option<(PathBuf, String)>, RpcError> {
    let pool = &info.name;
    let os = |path: &Path, e: &std::io::Error| {
        RpcError::new(-i64::from(e.raw_os_error().unwrap_or(5)), format!("{}: {e}", path.display()))
    };
    // Through links: what is replaced is the file that holds the key.
    let path = &path.canonicalize().map_err(|e| os(path, &e))?;
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let bytes = random_key(32);
    let kek = Kek::from_file(&bytes).map_err(StoreError::from)?;
    // What a rotation that was cut short has left.
    let _ = std::fs::remove_file(&beside);
    let aside = second_name(path).map_err(|e| os(path, &e))?;
    let undo = || {
        let _ = std::fs::remove_file(&beside);
        let _ = std::fs::remove_file(&aside);
    };
    write_key_file(&beside, hex_line(&bytes).as_bytes()).inspect_err(|_| undo())?;
    let put_new = change(c, pool, event, |block, key| {
        if block.slots[at].as_ref() != Some(slot) {
            return Err(RpcError::busy(format!("key slot {at} was changed meanwhile")));
        }
        let new = seal(&kek, key, SlotKind::KeyFile, &slot.label, "")?;
        Ok((put(block, new.clone())?, new))
    });
    // The old key opens the pool, whether the new slot is there or not.
    let (extra, new) = put_new.inspect_err(|_| undo())?;
    let failed = |e: std::io::Error| {
        let e = os(path, &e);
        RpcError::new(e.code, format!("{}; both keys open the pool now", e.message))
    };
    let mut old = std::fs::OpenOptions::new().write(true).open(&aside).map_err(failed)?;
    std::fs::rename(&beside, path).map_err(failed)?;
    let sync = || {
        let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let _ = std::fs::File::open(dir).and_then(|d| d.sync_all());
    };
    sync();
    change(c, pool, event, |block, _| take_over(block, (at, slot), (extra, &new))).map_err(|e| {
        let what =
            format!("{}; {} has the new key, {} the old one", e.message, path.display(), aside.display());
        RpcError::new(e.code, what)
    })?;
    let pools = c.pools()?;
    if let Some(other) = also_opens(pools, slot, &info.base_bdev, Some(at)) {
        pools.key_file_moved(path, &aside, info.uuid);
        return Ok(Some((aside, other)));
    }
    overwrite(&mut old).and_then(|()| std::fs::remove_file(&aside)).map_err(|e| {
        RpcError::internal(format!("the old key in {} is not overwritten: {e}", aside.display()))
    })?;
    sync();
    Ok(None)
}

/// Overwrites a file; what the file system or the drive keep of it is not known.
fn overwrite(old: &mut std::fs::File) -> std::io::Result<()> {
    let len = usize::try_from(old.metadata()?.len()).unwrap_or(0);
    old.seek(std::io::SeekFrom::Start(0))?;
    old.write_all(&vec![0; len])?;
    old.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(byte: u8) -> KeySlot {
        let (kind, kdf, kek_id) = (SlotKind::KeyFile, Kdf::None, [byte; 16]);
        let (label, reference) = (String::new(), String::new());
        KeySlot { kind, kdf, kek_id, wrapped: [byte; 40], created_ms: 5, label, reference }
    }

    #[test]
    fn a_new_slot_takes_over_only_if_both_are_what_they_were() {
        let (old, new) = (slot(1), slot(2));
        let mut slots = [const { None }; cryptfold_reduce::slots::MAX_KEY_SLOTS];
        (slots[0], slots[3]) = (Some(old.clone()), Some(new.clone()));
        let whole = KeyBlock { pool: uuid::Uuid::nil(), generation: 1, slots, erasure: [None; 2] };
        for (at, changed) in [(3, None), (3, Some(slot(4))), (0, None), (0, Some(slot(4)))] {
            let mut block = whole.clone();
            block.slots[at] = changed;
            let before = block.clone();
            assert_eq!(take_over(&mut block, (0, &old), (3, &new)).unwrap_err().code, -16);
            assert_eq!(block, before, "nothing is lost");
        }
        let mut block = whole;
        take_over(&mut block, (0, &old), (3, &new)).unwrap();
        assert_eq!((&block.slots[0], &block.slots[3]), (&Some(new), &None));
    }
}
