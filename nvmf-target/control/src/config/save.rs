//! The configuration as it is now, in the form in which it is read.

use serde_json::{Value, json};

use crate::control::{Control, lock};
use crate::jsonrpc::RpcError;
use crate::methods::{bdev_config, crypto_config, keyring_config, nvmf_config, sock_config};

/// Subsystems in the order of initialisation and of the saved file.
pub const SUBSYSTEMS: &[&str] =
    &["scheduler", "sock", "iobuf", "keyring", "vmd", "accel", "bdev", "nvmf", "nbd"];

/// What a subsystem needs before it.
pub fn depends_on(subsystem: &str) -> &'static [&'static str] {
    match subsystem {
        "accel" => &["iobuf"],
        "bdev" => &["accel", "vmd", "sock", "iobuf", "keyring"],
        "nvmf" => &["bdev", "keyring", "sock"],
        "nbd" => &["bdev"],
        _ => &[],
    }
}

/// The calls that bring one subsystem back.
///
/// # Errors
/// Unknown subsystem; a key that can not be written to a file.
pub fn save_subsystem(c: &Control, name: &str) -> Result<Vec<(String, Value)>, RpcError> {
    match name {
        "sock" => Ok(sock_config(c)),
        "iobuf" => Ok(lock(&c.options).calls("iobuf")),
        "accel" => crypto_config(c),
        "bdev" => Ok([bdev_config(c)?, c.deferred.calls_of("bdev")].concat()),
        "keyring" => Ok(keyring_config(c)),
        "scheduler" | "vmd" | "nbd" => Ok(Vec::new()),
        "nvmf" => Ok([nvmf_config(c), c.deferred.calls_of("nvmf")].concat()),
        _ => {
            let known = SUBSYSTEMS.join(", ");
            Err(RpcError::params(format!("name: subsystem \"{name}\" not found; there are {known}")))
        }
    }
}

/// A call as it stands in a file.
pub fn call((method, params): (String, Value)) -> Value {
    if params.is_null() { json!({"method": method}) } else { json!({"method": method, "params": params}) }
}

/// The whole configuration.
///
/// # Errors
/// A key that can not be written to a file.
pub fn save(c: &Control) -> Result<Value, RpcError> {
    let mut subsystems = Vec::new();
    for name in SUBSYSTEMS {
        let calls: Vec<Value> = save_subsystem(c, name)?.into_iter().map(call).collect();
        subsystems.push(json!({"subsystem": name, "config": calls}));
    }
    Ok(json!({"subsystems": subsystems}))
}
