//! The methods, a module per subsystem.

mod bdev;
mod bdev_nvme;
mod config;
mod crypto;
mod devices;
mod drives;
mod encryption;
mod framework;
mod histogram;
mod keyring;
mod kms;
mod log;
mod luks;
mod lvol;
mod nvmf;
mod options;

use cryptfold_bdev::BdevError;
use serde_json::Value;

use crate::control::{Control, lock};
use crate::jsonrpc::RpcError;
use crate::table::Method;

pub(crate) use bdev::product;
pub(crate) use crypto::config as crypto_config;
pub(crate) use keyring::config as keyring_config;
pub(crate) use lvol::{describe_check, find_volume};
pub(crate) use nvmf::{apply_options as apply_nvmf_options, config as nvmf_config};
pub(crate) use options::sock_config;

/// The calls that make the devices again, in the order in which they were made.
pub(crate) fn bdev_config(c: &Control) -> Result<Vec<(String, Value)>, RpcError> {
    let mut calls = lock(&c.options).calls("bdev");
    // Before what stands on their devices; they themselves stand on nothing.
    calls.extend(bdev_nvme::config(c));
    calls.extend(drives::config(c));
    for b in c.registry.list() {
        calls.extend(b.device().config());
        calls.extend(c.pools().ok().and_then(|p| p.config(b.name())));
        calls.extend(bdev::qos_config(&b));
    }
    calls.push(("bdev_wait_for_examine".into(), Value::Null));
    Ok(calls)
}

/// The whole table.
pub fn all() -> Vec<Method> {
    [
        framework::methods(),
        config::methods(),
        log::methods(),
        bdev::methods(),
        devices::methods(),
        bdev_nvme::methods(),
        drives::methods(),
        encryption::methods(),
        crypto::methods(),
        keyring::methods(),
        kms::methods(),
        luks::methods(),
        lvol::methods(),
        nvmf::methods(),
        options::methods(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

impl From<BdevError> for RpcError {
    fn from(e: BdevError) -> RpcError {
        RpcError::new(e.code().into(), e.to_string())
    }
}
