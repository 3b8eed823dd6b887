//! What a running target tells over HTTP: `/metrics` for Prometheus, `/healthz` for whoever restarts it. Nothing can be changed
//! here.
//!
//! ```text
//!   TCP -> server -> sample (at most one a second, of the control plane's own methods) -> metrics, health
//! ```
//!
//! Runs on a thread of its own, off the reactors. Bounds: [`server::MAX_CONNECTIONS`], a time and a size for each request's
//! head, and for each connection a life; what is asked more often than once a second is answered from the last sample.
//! An address that others can reach needs a token.

mod health;
mod metrics;
mod sample;
mod server;

pub use server::{Web, WebConfig, WebError};

use serde_json::Value;

/// Where samples come from: the methods of the control plane.
pub trait Source: Send + Sync + 'static {
    /// The result of a method without side effects, as its documentation has it; else why there is none.
    ///
    /// # Errors
    /// The method's message.
    fn get(&self, method: &str, params: Option<&Value>) -> Result<Value, String>;
}

impl<F: Fn(&str, Option<&Value>) -> Result<Value, String> + Send + Sync + 'static> Source for F {
    fn get(&self, method: &str, params: Option<&Value>) -> Result<Value, String> {
        self(method, params)
    }
}
