//! What the target says of itself at one moment, and the last of it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Source;

/// How old a sample may be that is given out again.
const FRESH: Duration = Duration::from_secs(1);

/// Results of methods; null where one gave none (before initialisation, say).
#[derive(Debug, Default)]
pub struct Sample {
    pub version: Value,
    pub reactors: Value,
    pub iostat: Value,
    pub bdevs: Value,
    pub pools: Value,
    pub volumes: Value,
    /// By pool.
    pub domains: Vec<(String, Value)>,
    pub nvmf: Value,
    pub subsystems: Value,
    /// By the NQN of their subsystem.
    pub controllers: Vec<(String, Value)>,
    pub keys: Value,
}

impl Sample {
    pub fn take(source: &dyn Source) -> Sample {
        let get_with = |method: &str, params: Option<&Value>| {
            source.get(method, params).unwrap_or_else(|error| {
                tracing::debug!(method, error, "no sample");
                Value::Null
            })
        };
        let get = |method: &str| get_with(method, None);
        let pools = get("bdev_lvol_get_lvstores");
        let domains = list(&pools).iter().map(|pool| {
            let of_pool = get_with("cryptfold_pool_get_domains", Some(&json!({"lvs_name": pool["name"]})));
            (pool["name"].as_str().unwrap_or("").to_owned(), of_pool)
        });
        let domains = domains.collect();
        let subsystems = get("nvmf_get_subsystems");
        let controllers = list(&subsystems).iter().map(|s| {
            let of_subsystem = get_with("nvmf_subsystem_get_controllers", Some(&json!({"nqn": s["nqn"]})));
            (s["nqn"].as_str().unwrap_or("").to_owned(), of_subsystem)
        });
        let controllers = controllers.collect();
        Sample {
            version: get("spdk_get_version"),
            reactors: get("framework_get_reactors"),
            iostat: get("bdev_get_iostat"),
            bdevs: get("bdev_get_bdevs"),
            domains,
            pools,
            volumes: get("bdev_lvol_get_lvols"),
            nvmf: get("nvmf_get_stats"),
            subsystems,
            controllers,
            keys: get("keyring_kmip_get_keys"),
        }
    }

    /// Whether the target has told anything: it runs, and its reactors answer.
    pub fn is_running(&self) -> bool {
        !self.iostat.is_null()
    }
}

/// Takes samples, and gives the last out again while it is fresh; one is taken at a time.
pub struct Sampler {
    source: Arc<dyn Source>,
    last: Mutex<Option<(Instant, Arc<Sample>)>>,
}

impl Sampler {
    pub fn new(source: Arc<dyn Source>) -> Sampler {
        Sampler { source, last: Mutex::default() }
    }

    /// Blocks as long as the control plane takes.
    pub fn get(&self) -> Arc<Sample> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, sample)) = &*last
            && at.elapsed() < FRESH
        {
            return sample.clone();
        }
        let sample = Arc::new(Sample::take(&*self.source));
        *last = Some((Instant::now(), sample.clone()));
        sample
    }
}

/// The elements of a list; none of anything else.
pub fn list(v: &Value) -> &[Value] {
    v.as_array().map_or(&[], Vec::as_slice)
}
