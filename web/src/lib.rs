//! What a running target tells over HTTP: a page to look at, an interface for programs, `/metrics` for Prometheus, `/healthz` for
//! whoever restarts it. Nothing can be changed here.
//!
//! ```text
//!   TCP -> server -> answer -> page (files of the binary)
//!                        \---> Source::look (one a second at most) -> metrics, health, api/v1/snapshot, api/v1/history
//!                         \--> stream: one task looks once a second while somebody listens, and tells all of them
//! ```
//!
//! Runs on a thread of its own, off the reactors. Bounds: [`server::MAX_CONNECTIONS`], [`stream::MAX_LISTENERS`], a time and a size
//! for each request's head, and for each connection that does not listen a life; a listener that does not keep up is dropped.
//!
//! An address that others can reach needs a token for everything but the page itself, which holds nothing. Without a token
//! (loopback) requests have to name an address or `localhost`: a browser that a foreign name has led here gets nothing.

mod answer;
mod metrics;
pub mod page;
mod server;
mod stream;

pub use server::{Web, WebConfig, WebError};

use std::sync::Arc;

use cryptfold_view::Look;
use serde_json::Value;

/// What is told. Both block as long as the control plane takes.
pub trait Source: Send + Sync + 'static {
    /// The target now, or a moment ago; none at its end.
    fn look(&self) -> Option<Arc<Look>>;
    /// What charts show of the past.
    fn history(&self) -> Value;
}
