//! Options that methods set and configurations save. `None` = never set, and then not saved.

use cryptfold_reactor::MemoryConfig;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What has been set. The maps hold parameters exactly as they were accepted.
#[derive(Default)]
pub(crate) struct Options {
    /// Parameters of methods that set options: (subsystem, method, parameters), in order of the first call.
    set: Vec<(&'static str, &'static str, Map<String, Value>)>,
    /// Socket options by implementation.
    pub sock: BTreeMap<String, Map<String, Value>>,
    /// Whether new devices are searched for pools.
    pub auto_examine: Option<bool>,
    small_pool: Option<u64>,
    large_pool: Option<u64>,
}

impl Options {
    /// Remembers the given (not null) parameters of a call, on top of earlier ones.
    pub fn remember(&mut self, subsystem: &'static str, method: &'static str, params: Map<String, Value>) {
        let at = self.set.iter().position(|(_, m, _)| *m == method).unwrap_or_else(|| {
            self.set.push((subsystem, method, Map::new()));
            self.set.len() - 1
        });
        self.set[at].2.extend(params.into_iter().filter(|(_, v)| !v.is_null()));
    }

    /// What a method was given so far.
    pub fn get(&self, method: &str) -> Option<&Map<String, Value>> {
        self.set.iter().find(|(_, m, _)| *m == method).map(|(_, _, p)| p)
    }

    /// The calls that set a subsystem's options again.
    pub fn calls(&self, subsystem: &str) -> Vec<(String, Value)> {
        self.set
            .iter()
            .filter(|(s, _, p)| *s == subsystem && !p.is_empty())
            .map(|(_, m, p)| (m.to_string(), Value::Object(p.clone())))
            .collect()
    }

    /// Whether TLS may leave records to the kernel (`enable_ktls` of "ssl").
    pub fn kernel_tls(&self) -> bool {
        let set = self.sock.get("ssl").and_then(|o| o.get("enable_ktls"));
        set.and_then(Value::as_bool).unwrap_or(false)
    }

    /// Sets the arena's size from SPDK's two pools.
    pub fn set_pools(&mut self, small_bytes: u64, large_bytes: u64) {
        self.small_pool = Some(small_bytes);
        self.large_pool = Some(large_bytes);
    }

    /// The arena as these options want it.
    pub fn memory(&self, base: &MemoryConfig) -> MemoryConfig {
        let mut m = base.clone();
        if let (Some(small), Some(large)) = (self.small_pool, self.large_pool) {
            m.arena_bytes = usize::try_from(small.saturating_add(large)).unwrap_or(usize::MAX);
        }
        m
    }
}
