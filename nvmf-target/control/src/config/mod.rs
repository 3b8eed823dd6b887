//! Configuration files in SPDK's form: `{"subsystems":[{"subsystem":NAME,"config":[CALL, [CALL, ...], ...]}]}` where
//! CALL is `{"method":NAME,"params":{...}}` and an array is a batch. `//` and `/* */` comments are allowed.
//!
//! A file is read and checked whole (JSON, methods, parameters) before its first call runs, so that a wrong file
//! changes nothing.

mod save;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use thiserror::Error;

use crate::Control;
use crate::jsonrpc::{Handler as _, RpcError};
use crate::table::When;

pub use save::{SUBSYSTEMS, call, depends_on, save, save_subsystem};

/// Largest file that is read.
pub const MAX_CONFIG_BYTES: u64 = 64 << 20;

/// A configuration that can not be used. Says where.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// Not readable.
    #[error("configuration {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        error: std::io::Error,
    },
    /// Larger than any configuration.
    #[error("configuration {path} has {size_bytes} bytes; at most {MAX_CONFIG_BYTES} are read")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// Not JSON.
    #[error("{origin}:{line}:{column}: {what}")]
    Json {
        /// File name, or what stands for it.
        origin: String,
        /// 1 is the first.
        line: usize,
        /// 1 is the first.
        column: usize,
        /// What the parser said.
        what: String,
    },
    /// JSON of another shape.
    #[error("{origin}: {place}: {what}")]
    Shape {
        /// File name, or what stands for it.
        origin: String,
        /// Where in it.
        place: String,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// A call was refused.
    #[error("{origin}: {place}: {error}")]
    Call {
        /// File name, or what stands for it.
        origin: String,
        /// Where in it.
        place: String,
        /// What the method answered.
        error: RpcError,
    },
}

/// One call of a configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Method.
    pub method: String,
    /// Its parameters.
    pub params: Option<Value>,
    /// Where it stands, for messages.
    pub place: String,
    /// Part of the batch with this number.
    pub batch: Option<u32>,
}

/// A parsed configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// File name, or what stands for it.
    pub origin: String,
    /// All calls, in order.
    pub calls: Vec<Call>,
}

/// Overwrites comments by spaces, so that lines and columns stay. Strings are left alone.
///
/// # Errors
/// The offset of a `/*` that is not closed.
pub fn strip_comments(text: &str) -> Result<String, usize> {
    let mut out = text.as_bytes().to_vec();
    let blank = |out: &mut [u8]| out.iter_mut().filter(|b| **b != b'\n').for_each(|b| *b = b' ');
    let mut i = 0;
    while i < out.len() {
        match (out[i], out.get(i + 1)) {
            (b'"', _) => {
                i += 1;
                while i < out.len() && out[i] != b'"' {
                    i += if out[i] == b'\\' { 2 } else { 1 };
                }
                i += 1;
            }
            (b'/', Some(b'/')) => {
                let end = out[i..].iter().position(|b| *b == b'\n').map_or(out.len(), |n| i + n);
                blank(&mut out[i..end]);
                i = end;
            }
            (b'/', Some(b'*')) => {
                let end = text.get(i + 2..).and_then(|t| t.find("*/")).map(|n| i + 2 + n + 2).ok_or(i)?;
                blank(&mut out[i..end]);
                i = end;
            }
            _ => i += 1,
        }
    }
    // Only whole comments were replaced, byte by byte, by ASCII.
    String::from_utf8(out).map_err(|e| e.utf8_error().valid_up_to())
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// Not readable, not JSON, or of another shape.
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        let fail = |error| ConfigError::Read { path: path.into(), error };
        let size_bytes = std::fs::metadata(path).map_err(fail)?.len();
        if size_bytes > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLarge { path: path.into(), size_bytes });
        }
        Config::parse(&path.display().to_string(), &std::fs::read_to_string(path).map_err(fail)?)
    }

    /// Parses a file's text.
    ///
    /// # Errors
    /// Not JSON, or of another shape.
    pub fn parse(origin: &str, text: &str) -> Result<Config, ConfigError> {
        let json =
            |line, column, what: String| ConfigError::Json { origin: origin.into(), line, column, what };
        let plain = strip_comments(text).map_err(|at| {
            let line = 1 + text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count();
            json(line, 1, "comment is not closed".into())
        })?;
        let value: Value = serde_json::from_str(&plain).map_err(|e| {
            let what = e.to_string();
            let what = what.split(" at line ").next().unwrap_or(&what).to_string();
            json(e.line(), e.column(), what)
        })?;
        Config::from_value(origin, &value)
    }

    /// From JSON that has been parsed.
    ///
    /// # Errors
    /// JSON of another shape.
    pub fn from_value(origin: &str, value: &Value) -> Result<Config, ConfigError> {
        let shape = |place: &str, what: &str| ConfigError::Shape {
            origin: origin.into(),
            place: place.into(),
            what: what.into(),
        };
        let top = "top level";
        let o = value.as_object().ok_or_else(|| shape(top, "must be an object with \"subsystems\""))?;
        only(o, &["subsystems"]).map_err(|e| shape(top, &e))?;
        let subsystems = o
            .get("subsystems")
            .and_then(Value::as_array)
            .ok_or_else(|| shape(top, "\"subsystems\" must be there and be an array"))?;
        let mut calls = Vec::new();
        let mut batches = 0;
        for (i, s) in subsystems.iter().enumerate() {
            let place = format!("subsystems[{i}]");
            let o = s
                .as_object()
                .ok_or_else(|| shape(&place, "must be an object with \"subsystem\" and \"config\""))?;
            only(o, &["subsystem", "config"]).map_err(|e| shape(&place, &e))?;
            let name = o
                .get("subsystem")
                .and_then(Value::as_str)
                .ok_or_else(|| shape(&place, "\"subsystem\" must be there and be a string"))?;
            let entries = match o.get("config") {
                None | Some(Value::Null) => continue,
                Some(Value::Array(a)) => a,
                Some(_) => return Err(shape(&place, "\"config\" must be an array of calls")),
            };
            for (n, entry) in entries.iter().enumerate() {
                let place = format!("subsystem \"{name}\", config[{n}]");
                match entry {
                    Value::Array(batch) => {
                        for (k, c) in batch.iter().enumerate() {
                            let place = format!("{place}[{k}]");
                            calls.push(parse_call(c, &place, Some(batches)).map_err(|e| shape(&place, &e))?);
                        }
                        batches += 1;
                    }
                    c => calls.push(parse_call(c, &place, None).map_err(|e| shape(&place, &e))?),
                }
            }
        }
        Ok(Config { origin: origin.into(), calls })
    }

    /// Whether every call names a method and has parameters that it takes. Changes nothing.
    ///
    /// # Errors
    /// The first call that would be refused.
    pub fn check(&self, control: &Control) -> Result<(), ConfigError> {
        for c in &self.calls {
            let checked = control.table().find(&c.method).and_then(|m| m.check(c.params.as_ref()));
            checked.map_err(|error| self.refused(c, error))?;
        }
        Ok(())
    }

    /// Runs the calls: those that belong before initialisation, initialisation itself (if it has not happened), then
    /// the others, each group in the file's order. Everything is checked before the first.
    ///
    /// # Errors
    /// The first call that is refused; later ones do not run.
    pub fn load(&self, control: &Control) -> Result<(), ConfigError> {
        self.check(control)?;
        self.load_startup(control)?;
        control.initialize().map_err(|error| ConfigError::Call {
            origin: self.origin.clone(),
            place: "initialisation".into(),
            error,
        })?;
        self.load_runtime(control)
    }

    /// Runs the calls that belong before initialisation. Afterwards they are passed over, as SPDK's own client does.
    ///
    /// # Errors
    /// The first call that is refused.
    pub fn load_startup(&self, control: &Control) -> Result<(), ConfigError> {
        for c in self.calls.iter().filter(|c| self.is_startup(control, c)) {
            if control.is_initialized() {
                tracing::warn!(
                    method = c.method,
                    place = c.place,
                    "skipped: only possible before initialisation"
                );
            } else {
                self.run(control, c)?;
            }
        }
        Ok(())
    }

    /// Runs the other calls.
    ///
    /// # Errors
    /// The first call that is refused.
    pub fn load_runtime(&self, control: &Control) -> Result<(), ConfigError> {
        control.watch.spare(self.pool_devices());
        let mut calls = self.calls.iter().filter(|c| !self.is_startup(control, c));
        let loaded = calls.try_for_each(|c| self.run(control, c));
        control.watch.spare(BTreeSet::new());
        loaded
    }

    /// Devices whose pools this configuration opens or makes itself, with its own parameters.
    fn pool_devices(&self) -> BTreeSet<String> {
        let device = |c: &Call| {
            let name = match c.method.as_str() {
                "bdev_lvol_create_lvstore" => "bdev_name",
                "cryptfold_pool_open" => "base_bdev_name",
                _ => return None,
            };
            c.params.as_ref()?.get(name)?.as_str().map(str::to_string)
        };
        self.calls.iter().filter_map(device).collect()
    }

    fn is_startup(&self, control: &Control, c: &Call) -> bool {
        control.table().get(&c.method).is_some_and(|m| m.when == When::Startup)
    }

    fn run(&self, control: &Control, c: &Call) -> Result<(), ConfigError> {
        let Err(e) = control.call(&c.method, c.params.as_ref()) else { return Ok(()) };
        match control.deferred.take(control, &c.method, c.params.as_ref(), e) {
            Err(e) if is_about_held(control, c, &e) => {
                let (method, place, error) = (&c.method, &c.place, &e.message);
                tracing::warn!(method, place, error, "skipped: its pool was locked by the role security");
                Ok(())
            }
            taken => taken.map_err(|e| self.refused(c, e)),
        }
    }

    fn refused(&self, c: &Call, error: RpcError) -> ConfigError {
        ConfigError::Call { origin: self.origin.clone(), place: format!("{} ({})", c.place, c.method), error }
    }
}

/// Whether a call was refused because the pool that it names, or the pool of the volume that it names, is locked by the security role:
/// that stops no start.
fn is_about_held(control: &Control, c: &Call, e: &RpcError) -> bool {
    let Ok(pools) = control.pools() else { return false };
    let params = c.params.as_ref().and_then(Value::as_object);
    let names = || params.into_iter().flat_map(Map::values).filter_map(Value::as_str);
    let pool = |name: &str| pools.find_locked(name.split_once('/').map_or(name, |(pool, _)| pool));
    matches!(e.code, RpcError::ENODEV | RpcError::ENOKEY)
        && names().filter_map(pool).any(|locked| pools.held(locked.pool.uuid).is_some())
}

fn only(o: &Map<String, Value>, known: &[&str]) -> Result<(), String> {
    match o.keys().find(|k| !known.contains(&k.as_str())) {
        None => Ok(()),
        Some(k) => Err(format!("unknown member \"{k}\"; there may be {}", known.join(", "))),
    }
}

fn parse_call(v: &Value, place: &str, batch: Option<u32>) -> Result<Call, String> {
    let o = v.as_object().ok_or("must be a call: an object with \"method\" and \"params\"")?;
    only(o, &["method", "params"])?;
    let method = o.get("method").and_then(Value::as_str).ok_or("\"method\" must be there and be a string")?;
    let params = match o.get("params") {
        None | Some(Value::Null) => None,
        Some(p @ Value::Object(_)) => Some(p.clone()),
        Some(_) => return Err("\"params\" must be an object".into()),
    };
    Ok(Call { method: method.into(), params, place: place.into(), batch })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn comments_and_batches() {
        let text = r#"
            // a comment with "quotes"
            {"subsystems": [ /* one
              */ {"subsystem": "bdev", "config": [
                {"method": "a", "params": {"p": "// no comment /* here */"}},
                [{"method": "b"}, {"method": "c", "params": null}]
              ]},
              {"subsystem": "nvmf", "config": null}, {"subsystem": "vmd"}
            ]} // end"#;
        let c = Config::parse("x.json", text).unwrap();
        assert_eq!(c.calls.len(), 3);
        assert_eq!(c.calls[0].params.as_ref().unwrap()["p"], "// no comment /* here */");
        assert_eq!((c.calls[0].batch, c.calls[1].batch, c.calls[2].batch), (None, Some(0), Some(0)));
        assert_eq!(c.calls[2].place, "subsystem \"bdev\", config[1][1]");
    }

    #[test]
    fn errors_say_where() {
        let e = |t: &str| Config::parse("x.json", t).unwrap_err().to_string();
        assert_eq!(e("{\n /* é */ \"subsystems\": [,]}"), "x.json:2:26: expected value");
        assert_eq!(e("{}\n/* open"), "x.json:2:1: comment is not closed");
        assert!(e("[]").contains("top level"));
        assert!(e(r#"{"subsystem":[]}"#).contains("unknown member \"subsystem\""));
        assert!(
            e(r#"{"subsystems":[{"subsystem":"bdev","config":[{"method":5}]}]}"#)
                .starts_with("x.json: subsystem \"bdev\", config[0]: \"method\"")
        );
        assert!(matches!(Config::read(Path::new("/nonexistent/c.json")), Err(ConfigError::Read { .. })));
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused(text in r#"[ \n/*"\\a{}\[\]:,é]{0,40}"#) {
            if let Ok(plain) = strip_comments(&text) {
                prop_assert_eq!(plain.len(), text.len());
                prop_assert_eq!(plain.matches('\n').count(), text.matches('\n').count());
            }
            let _ = Config::parse("p", &text);
        }
    }
}
