//! Work on a pool whose device no target has open: the audit and the repair.
//!
//! The device's file lock is held meanwhile (shared for an audit, which writes nothing), and a pool that another machine has
//! open is refused.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptfold_bdev::Registry;
use cryptfold_bdev_uring::UringOptions;
use cryptfold_reactor::{IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};
use cryptfold_reduce::PoolManager;
use serde_json::Value;

use crate::fips::FipsMode;
use crate::methods::describe_check;
use crate::pools::{PoolKey, Pools, Try};

/// What to check.
#[derive(Clone, Debug)]
pub struct OfflineCheck {
    /// File or block device with the pool.
    pub device: PathBuf,
    /// Its key; all of `key_dir` are tried when not given.
    pub key_file: Option<PathBuf>,
    /// A file with its password.
    pub password_file: Option<PathBuf>,
    /// Directory of key files.
    pub key_dir: PathBuf,
    /// Read and verify all stored data too.
    pub data: bool,
    /// Put right what can be.
    pub repair: bool,
}

/// Audits (and repairs) a pool; the reply of `cryptfold_pool_check`.
///
/// # Errors
/// In one line: the device can not be opened, is in use, carries no pool, its key is not there; the pool can not be opened.
pub fn check(what: &OfflineCheck) -> Result<Value, String> {
    let started = Instant::now();
    let device = what.device.display();
    let runtime = Runtime::start(RuntimeConfig {
        cores: vec![0],
        policy: IdlePolicy::Interrupt,
        pin: false,
        memory: MemoryConfig { hugepages: false, ..MemoryConfig::default() },
        ..RuntimeConfig::default()
    });
    let runtime = runtime.map_err(|e| e.to_string())?;
    let registry = Registry::new();
    let options = UringOptions {
        name: base_name(&what.device),
        filename: what.device.clone(),
        block_size_bytes: None,
        uuid: None,
        read_only: !what.repair,
        unmap: true,
        method: "bdev_uring_create",
    };
    let base = cryptfold_bdev_uring::create(&registry, options).map_err(|e| e.to_string())?;
    let manager = PoolManager::new(registry.clone(), runtime.handles().to_vec());
    // A pool of the FIPS modes is repaired as in them; what can not be read here is an error below.
    let approved = manager.peek(base.name()).ok().flatten().is_some_and(|pool| pool.approved);
    let mode = if approved { FipsMode::Approved } else { FipsMode::Off };
    mode.enter().map_err(|e| e.to_string())?;
    let pools = Pools::new(manager, registry.clone(), Arc::default(), what.key_dir.clone(), mode);
    let key = || match (&what.key_file, &what.password_file) {
        (Some(file), _) => Try::Key(PoolKey::File(file.clone())),
        (None, Some(file)) => Try::Key(PoolKey::PasswordFile(file.clone())),
        (None, None) => Try::All,
    };
    let none = || format!("{device} carries no pool");
    let done = if what.repair {
        // Whoever runs this has the key.
        let info = pools.open_held(base.name(), key()).map_err(|e| e.message)?.ok_or_else(none)?;
        let report = pools.manager().repair(&info.name, what.data).map_err(|e| e.to_string());
        let closed = pools.manager().close(&info.name).map_err(|e| e.to_string());
        report.and_then(|report| closed.map(|()| describe_check(&info.name, &report, started)))
    } else {
        let audited = pools.audit(base.name(), key(), what.data);
        let (info, report) = audited.map_err(|e| e.message)?.ok_or_else(none)?;
        Ok(describe_check(&info.name, &report, started))
    };
    if let Ok(removal) = registry.unregister(base.name()) {
        removal.wait(Duration::from_secs(10));
    }
    drop(runtime);
    done
}

fn base_name(path: &Path) -> String {
    path.file_name().map_or_else(|| "device".into(), |name| name.to_string_lossy().into_owned())
}
