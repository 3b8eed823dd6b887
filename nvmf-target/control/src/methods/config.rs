//! Saving and loading configurations.

use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::config::{self, Config, SUBSYSTEMS};
use crate::control::Control;
use crate::jsonrpc::{RpcError, RpcResult};
use crate::params::params;
use crate::table::{Method, When};

params! {
    /// `framework_get_config`.
    pub struct GetConfig {
        /// Subsystem.
        name: String,
        /// No effect: nothing is saved as a batch.
        with_batches: bool = false,
    }
    /// `save_config`.
    pub struct SaveConfig {
        /// File of the target's machine to write; the configuration is replied when not given.
        filename: Option<String>,
    }
    /// `load_config`.
    pub struct LoadConfig {
        /// File of the target's machine to read; comments are allowed.
        filename: Option<String>,
        /// The configuration itself.
        config: Option<Value>,
    }
}

pub fn methods() -> Vec<Method> {
    vec![
        Method::plain("framework_get_subsystems", "Subsystems in the order of initialisation.", |_| {
            let all = SUBSYSTEMS.iter();
            Ok(all.map(|s| json!({"subsystem": s, "depends_on": config::depends_on(s)})).collect())
        })
        .when(When::Any),
        Method::new(
            "framework_get_config",
            "The calls that configure a subsystem again. Keys appear as references to files; one that was given in the \
             clear is written to the key directory first.",
            |c, p: GetConfig| {
                let calls = config::save_subsystem(c, &p.name)?;
                Ok(calls.into_iter().map(config::call).collect())
            },
        )
        .when(When::Any),
        Method::new("save_config", "The whole configuration, as `-c` takes it. Ours.", save).when(When::Any),
        Method::new(
            "load_config",
            "Runs the calls of a configuration after checking all of them. Ours.",
            load,
        )
        .when(When::Any),
    ]
}

fn save(c: &Control, p: SaveConfig) -> RpcResult {
    let config = config::save(c)?;
    let Some(name) = p.filename else { return Ok(config) };
    let text = serde_json::to_string_pretty(&config).map_err(|e| RpcError::internal(e.to_string()))? + "\n";
    replace_file(Path::new(&name), &text)
        .map_err(|e| RpcError::new(-i64::from(e.raw_os_error().unwrap_or(5)), format!("{name}: {e}")))?;
    Ok(json!(true))
}

/// Writes a file as a whole or not at all.
fn replace_file(path: &Path, text: &str) -> std::io::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let mut f = std::fs::File::create(&fresh)?;
    f.write_all(text.as_bytes())?;
    f.sync_all()?;
    std::fs::rename(&fresh, path)
}

fn load(c: &Control, p: LoadConfig) -> RpcResult {
    let config = match (p.filename, p.config) {
        (Some(f), None) => Config::read(Path::new(&f)),
        (None, Some(v)) => Config::from_value("config", &v),
        _ => return Err(RpcError::params("filename: either this or config is needed")),
    };
    let config = config.map_err(|e| RpcError::params(e.to_string()))?;
    config.load(c).map_err(|e| {
        let code = match &e {
            config::ConfigError::Call { error, .. } => error.code,
            _ => RpcError::INVALID_PARAMS,
        };
        RpcError::new(code, e.to_string())
    })?;
    Ok(json!(true))
}
