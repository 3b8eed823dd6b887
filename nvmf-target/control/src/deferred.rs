//! Calls that make what stands on volumes of locked pools (namespaces, devices on top), kept until the pools are unlocked: those
//! of a configuration that could not be made at the start, and those that a lock has taken apart.

use std::sync::Mutex;

use serde_json::Value;

use crate::control::{Control, lock};
use crate::jsonrpc::{Handler as _, RpcError};

/// What may wait: calls that make a volume, or make or set something on one. Their parameters are in saved configurations, so nothing that is
/// given a password or a key is among them.
const MAY_WAIT: &[&str] = &[
    "bdev_crypto_create",
    "bdev_delay_create",
    "bdev_enable_histogram",
    "bdev_error_create",
    "bdev_examine",
    "bdev_hostcrypt_create",
    "bdev_luks_create",
    "bdev_lvol_create",
    "bdev_passthru_create",
    "bdev_set_qos_limit",
    "bdev_split_create",
    "cryptfold_pool_open",
    "nvmf_ns_add_host",
    "nvmf_subsystem_add_ns",
    "nvmf_subsystem_set_ns_ana_group",
];

/// Whether a parameter, at any depth, is a secret itself: not a file with it and not a name of it.
fn has_secret(params: &Value) -> bool {
    let is_secret = |name: &str| {
        let what = ["password", "passphrase", "secret"].iter().any(|word| name.contains(word));
        (what && !name.ends_with("_file")) || matches!(name, "key" | "key2" | "psk")
    };
    match params {
        Value::Object(o) => o.iter().any(|(name, v)| is_secret(name) || has_secret(v)),
        Value::Array(a) => a.iter().any(has_secret),
        _ => false,
    }
}

/// See the module.
#[derive(Default)]
pub struct Deferred(Mutex<Vec<(String, Value)>>);

impl Deferred {
    /// Keeps a call.
    pub fn add(&self, method: &str, params: Value) {
        tracing::warn!(method, "waits until a pool is unlocked");
        lock(&self.0).push((method.into(), params));
    }

    /// Keeps a call that was refused because its device is not there while a pool is locked, or because its pool is locked, or its
    /// namespace waits for one, if it is one of those that may wait; else gives the refusal back.
    ///
    /// # Errors
    /// The refusal.
    pub fn take(
        &self,
        c: &Control,
        method: &str,
        params: Option<&Value>,
        e: RpcError,
    ) -> Result<(), RpcError> {
        match params {
            Some(params)
                if MAY_WAIT.contains(&method)
                    && !has_secret(params)
                    && self.lacks_pool(c, method, params, &e) =>
            {
                self.add(method, params.clone());
                Ok(())
            }
            _ => Err(e),
        }
    }

    /// Whether a call was refused because a pool is locked, as far as can be seen.
    fn lacks_pool(&self, c: &Control, method: &str, params: &Value, e: &RpcError) -> bool {
        let Ok(pools) = c.pools() else { return false };
        match (e.code, method) {
            // It names its pool.
            (_, "bdev_lvol_create") => {
                let named = ["lvs_name", "uuid"].iter().find_map(|name| params.get(name)?.as_str());
                e.code == RpcError::ENOKEY && named.is_some_and(|name| pools.find_locked(name).is_some())
            }
            (RpcError::ENODEV, _) => !pools.locked().is_empty(),
            // A bad parameter, as SPDK's clients expect it: that says not which.
            (RpcError::INVALID_PARAMS, "nvmf_ns_add_host" | "nvmf_subsystem_set_ns_ana_group") => {
                self.has_namespace(params)
            }
            _ => false,
        }
    }

    /// Whether the namespace that a call names is not there because it waits. One without a number may get any.
    fn has_namespace(&self, params: &Value) -> bool {
        let is = |(method, add): &(String, Value)| {
            let nsid = add.pointer("/namespace/nsid").filter(|nsid| !nsid.is_null());
            method == "nvmf_subsystem_add_ns"
                && add["nqn"] == params["nqn"]
                && nsid.is_none_or(|nsid| *nsid == params["nsid"])
        };
        lock(&self.0).iter().any(is)
    }

    /// The calls, in order.
    pub fn calls(&self) -> Vec<(String, Value)> {
        lock(&self.0).clone()
    }

    /// The calls of one of the configuration's subsystems.
    pub fn calls_of(&self, subsystem: &str) -> Vec<(String, Value)> {
        let is = |method: &str| method.starts_with("nvmf_") == (subsystem == "nvmf");
        self.calls().into_iter().filter(|(method, _)| is(method)).collect()
    }

    /// Makes the calls, after a pool was opened. Those whose device is still not there are kept.
    pub fn retry(&self, c: &Control) {
        let calls = std::mem::take(&mut *lock(&self.0));
        for (method, params) in calls {
            match c.call(&method, Some(&params)) {
                Ok(_) => {}
                Err(e) if e.code == RpcError::ENODEV || self.lacks_pool(c, &method, &params, &e) => {
                    lock(&self.0).push((method, params));
                }
                Err(e) => {
                    tracing::error!(method, error = e.message, "could not be made after a pool was unlocked")
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn secrets_are_found_at_any_depth() {
        for secret in [
            json!({"password": "x"}),
            json!({"a": [{"new_password": "x"}]}),
            json!({"key": "00"}),
            json!({"b": {"passphrase": "x"}}),
        ] {
            assert!(has_secret(&secret), "{secret}");
        }
        for plain in [json!({"password_file": "/f", "key_name": "k", "key_file": "/k"}), json!(null)] {
            assert!(!has_secret(&plain), "{plain}");
        }
    }
}
