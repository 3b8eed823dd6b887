//! The control plane as the source of what people see: its own methods, and its devices.

use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Bdev, Class};
use cryptfold_view::{Device, Look, Source, State};
use serde_json::Value;

use crate::control::Control;
use crate::pools::VOLUME_PRODUCT;

impl Source for Control {
    /// Nobody's call: nothing is written down, and nothing is looked for.
    fn get(&self, method: &str, params: Option<&Value>) -> Result<Value, String> {
        self.table().call(self, method, params).map_err(|e| e.message)
    }

    fn state(&self) -> (State, Duration) {
        let state = match self.is_ending() {
            true => State::Ending,
            false if self.is_initialized() => State::Running,
            false => State::Starting,
        };
        (state, self.uptime())
    }

    fn devices(&self) -> Vec<Device> {
        self.registry.list().iter().map(|b| device(b)).collect()
    }

    fn events(&self) -> Vec<Value> {
        self.log.events().newest()
    }
}

impl Control {
    /// The target now, or a moment ago, for people and for whoever collects figures. Blocks.
    pub fn look(&self) -> Arc<Look> {
        self.hub.look(self)
    }

    /// What was seen by looks so far, for charts.
    pub fn history(&self) -> Value {
        self.hub.history()
    }
}

fn device(b: &Bdev) -> Device {
    let (info, stats) = (b.info(), b.stats());
    // A volume stands on a pool, and to ask it costs a message.
    let layer = if info.product_name == VOLUME_PRODUCT { Value::Null } else { b.device().driver_specific() };
    let layer = layer.as_object().and_then(|o| o.values().next()).unwrap_or(&Value::Null);
    let base = ["base_bdev_name", "base_bdev"].iter().find_map(|key| layer[*key].as_str());
    Device {
        name: info.name.clone(),
        alias: b.aliases().into_iter().next().unwrap_or_default(),
        uuid: info.uuid.to_string(),
        product: crate::methods::product(b).to_owned(),
        size_bytes: b.blocks() * u64::from(b.block_size_bytes()),
        base: base.map(str::to_owned),
        key_access: layer["access"].as_str().map(str::to_owned),
        totals: Class::ALL.map(|class| stats.totals(class)),
        latencies: Class::ALL.map(|class| stats.latencies(class)),
        errors: stats
            .errors()
            .into_iter()
            .map(|((sct, sc), n)| (cryptfold_bdev::Status::new(sct, sc).to_string(), n))
            .collect(),
    }
}
