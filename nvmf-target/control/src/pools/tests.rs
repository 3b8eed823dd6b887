//! Pools that the security role locks while something else happens to them.

use std::path::Path;

use cryptfold_reactor::{IdlePolicy, MemoryConfig};

use super::*;
use crate::control::{Control, ControlConfig};
use crate::jsonrpc::Handler as _;

/// A target with the pool "p" on a disk in memory.
fn target(dir: &Path) -> Arc<Control> {
    let control = Control::new(ControlConfig {
        idle: IdlePolicy::Interrupt,
        pin: false,
        memory: MemoryConfig { hugepages: false, fixed_buffers: false, arena_bytes: 4 << 20 },
        key_dir: dir.join("keys"),
        ..ControlConfig::default()
    });
    control.initialize().unwrap();
    ok(&control, "bdev_malloc_create", json!({"name": "disk", "num_blocks": 16384, "block_size": 4096}));
    ok(&control, "bdev_lvol_create_lvstore", json!({"bdev_name": "disk", "lvs_name": "p"}));
    control
}

fn ok(control: &Control, method: &str, params: Value) -> Value {
    control.call(method, Some(&params)).unwrap_or_else(|e| panic!("{method}: {}", e.message))
}

/// What waits for the pool takes long; a lock meanwhile counts.
#[test]
fn a_lock_while_it_is_unlocked_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let control = target(dir.path());
    let pools = control.pools().unwrap();
    let name = json!({"name": "p"});
    ok(&control, "cryptfold_encryption_lock", name.clone());
    // It is made while the pool is being unlocked.
    control.deferred.add("cryptfold_encryption_lock", name.clone());
    ok(&control, "cryptfold_encryption_unlock", name.clone());
    let locked = pools.find_locked("p").unwrap();
    assert!(pools.manager().list().is_empty() && pools.held(locked.pool.uuid).is_some());
    let e = pools.open("disk", Try::All, None).unwrap_err();
    assert_eq!(e.code, -126, "{}", e.message);
    ok(&control, "cryptfold_encryption_unlock", name);
    assert!(pools.held(locked.pool.uuid).is_none(), "and counts no longer than until the next unlock");
    control.shutdown().unwrap();
}

/// Between the look at a device and the opening another pool may come to it, or a lock.
#[test]
fn what_is_opened_is_what_was_looked_at_or_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let control = target(dir.path());
    let pools = control.pools().unwrap();
    let info = pools.find("p").unwrap();
    let seen = pools.manager().peek("disk").unwrap().unwrap();
    pools.keep(&seen, &info, For::Anybody).unwrap();
    let reopen = || pools.open("disk", Try::All, None).unwrap().unwrap();

    let other = SealedPool { uuid: Uuid::from_u128(1), ..seen.clone() };
    for whom in [For::Anybody, For::Security, For::Owner] {
        let e = pools.keep(&other, &info, whom).unwrap_err();
        assert!(e.message.contains(&info.uuid.to_string()), "{}", e.message);
        assert!(pools.manager().list().is_empty());
        reopen();
    }

    assert_eq!(pools.hold(info.uuid), None);
    pools.keep(&seen, &info, For::Security).unwrap();
    pools.keep(&seen, &info, For::Owner).unwrap();
    let e = pools.keep(&seen, &info, For::Anybody).unwrap_err();
    assert!(e.message.contains("locked while"), "{}", e.message);
    assert!(pools.manager().list().is_empty());
    control.shutdown().unwrap();
}
