//! Calls that make what stands on volumes of locked pools (namespaces, devices on top), kept until the pools are unlocked: those
//! of a configuration that could not be made at the start, and those that a lock has taken apart.

use std::sync::Mutex;

use serde_json::Value;

use crate::control::{Control, lock};
use crate::jsonrpc::{Handler as _, RpcError};

/// See the module.
#[derive(Default)]
pub struct Deferred(Mutex<Vec<(String, Value)>>);

impl Deferred {
    /// Keeps a call.
    pub fn add(&self, method: &str, params: Value) {
        tracing::warn!(method, "waits until a pool is unlocked");
        lock(&self.0).push((method.into(), params));
    }

    /// Keeps a call that was refused because its device is not there while a pool is locked; else gives the refusal back.
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
        let locked = c.pools().is_ok_and(|p| !p.locked().is_empty());
        match (e.code, params) {
            (RpcError::ENODEV, Some(params)) if locked => {
                self.add(method, params.clone());
                Ok(())
            }
            _ => Err(e),
        }
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
                Err(e) if e.code == RpcError::ENODEV => lock(&self.0).push((method, params)),
                Err(e) => {
                    tracing::error!(method, error = e.message, "could not be made after a pool was unlocked")
                }
            }
        }
    }
}
