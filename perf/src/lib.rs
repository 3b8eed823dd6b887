//! `cryptfold-perf`: what this machine could do, and what the product makes of it.
//!
//! A module per subcommand, each with its `Args` and `run`; [`report`] has what their reports share.

pub mod bdev;
pub mod figures;
pub mod image;
pub mod load;
pub mod management;
pub mod nvmf;
pub mod primitives;
pub mod report;
pub mod session;
pub mod steady;
pub mod suite;
