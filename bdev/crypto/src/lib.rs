//! XTS engines, and the devices that encrypt and decrypt with them.

pub mod engine;
