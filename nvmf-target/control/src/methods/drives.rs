//! PCIe drives: what `bdev_nvme` does for trtype PCIe, and the methods that only they have.

use std::time::Duration;

use cryptfold_bdev_nvme::{DriveError, Hotplug, Options, pci};
use cryptfold_reactor::IdlePolicy;
use serde_json::{Value, json};

use crate::control::{Control, lock};
use crate::jsonrpc::{RpcError, RpcResult};
use crate::params::params;
use crate::table::{Method, When};

params! {
    /// A controller.
    pub struct Controller {
        /// Its name.
        name: String,
    }
    /// `bdev_nvme_set_hotplug`.
    pub struct SetHotplug {
        /// Whether drives that are bound to vfio-pci are attached by themselves, as HotInNvmeN.
        enable: bool,
        /// Microseconds between two looks: 1000 to 10000000; 100000 when 0 or not given.
        period_us: Option<u64>,
        /// Only these PCI addresses; all when not given. Ours.
        allowed: Option<Vec<String>>,
    }
}

/// Methods of PCIe drives alone.
pub fn methods() -> Vec<Method> {
    vec![
        Method::new(
            "bdev_nvme_get_controller_health_info",
            "SMART of a PCIe drive, and (ours) its firmware slots and its latest errors in words.",
            |c, p: Controller| Ok(c.drives.health(&p.name)?),
        ),
        Method::new(
            "bdev_nvme_set_hotplug",
            "Whether PCIe drives that come are attached by themselves. That a drive goes is always noticed.",
            set_hotplug,
        ),
        Method::plain(
            "framework_get_pci_devices",
            "NVMe controllers on PCI: who drives them, and whether we do. Other functions are not listed.",
            |c| Ok(c.drives.functions().into()),
        )
        .when(When::Any),
    ]
}

impl From<DriveError> for RpcError {
    fn from(e: DriveError) -> RpcError {
        RpcError::new(e.code().into(), e.to_string())
    }
}

/// Takes a drive over.
pub fn attach(c: &Control, name: &str, traddr: &str) -> RpcResult {
    let given = |key: &str| {
        lock(&c.options).get("bdev_nvme_set_options").and_then(|o| o.get(key)).and_then(Value::as_u64)
    };
    let mut options = Options { interrupts: c.config.idle != IdlePolicy::Poll, ..Options::default() };
    let us = |key| given(key).filter(|us| *us > 0).map(Duration::from_micros);
    options.io_timeout = us("timeout_us").unwrap_or(options.io_timeout);
    options.admin_timeout = us("timeout_admin_us").unwrap_or(options.admin_timeout);
    Ok(json!(c.drives.attach(c.handles(), name, traddr, options)?))
}

/// Gives a drive back.
pub fn detach(c: &Control, name: &str) -> RpcResult {
    c.drives.detach(name)?;
    Ok(json!(true))
}

/// The calls that bring all drives, and how new ones are found, back.
pub fn config(c: &Control) -> Vec<(String, Value)> {
    let attach = c.drives.saved().into_iter().map(|p| ("bdev_nvme_attach_controller".to_string(), p));
    let mut calls: Vec<_> = attach.collect();
    let hotplug = c.drives.hotplug();
    if hotplug.enable {
        let period_us = hotplug.period.as_micros() as u64;
        let mut params = json!({"enable": true, "period_us": period_us});
        if !hotplug.allowed.is_empty() {
            params["allowed"] = hotplug.allowed.into();
        }
        calls.push(("bdev_nvme_set_hotplug".into(), params));
    }
    calls
}

fn set_hotplug(c: &Control, p: SetHotplug) -> RpcResult {
    let mut allowed = Vec::new();
    for address in p.allowed.unwrap_or_default() {
        let canonical = pci::canonical(&address).ok_or_else(|| {
            RpcError::params(format!("allowed: \"{address}\" is no PCI address; 0000:04:00.0 is one"))
        })?;
        allowed.push(canonical);
    }
    let period = match p.period_us {
        Some(us) if us > 0 => Duration::from_micros(us),
        _ => Hotplug::default().period,
    };
    c.drives
        .set_hotplug(c.handles(), Hotplug { enable: p.enable, period, allowed })
        .map_err(|e| RpcError::params(format!("period_us: {e}")))?;
    Ok(json!(true))
}
