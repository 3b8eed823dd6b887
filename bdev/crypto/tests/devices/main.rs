//! The two devices over in-memory bases, on one simulated core.

mod common;
mod crypto;
mod hostcrypt;
mod luks;
