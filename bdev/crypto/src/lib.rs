//! XTS engines, and the devices that encrypt and decrypt with them.
//!
//! - [`crypto`] is the array's layer: what lies below it is ciphertext.
//! - [`hostcrypt`] is a host's layer in reverse: what lies above it is the host's ciphertext, below it plaintext.
//! - [`luks`] is the same layer, put on and taken off while hosts are connected, as the LUKS2 header says; [`late`]: what was stored before its key was there.
//!
//! Both hold one [`engine::XtsContext`] per queue and send data from source to final destination in one pass.

pub mod crypto;
pub mod engine;
pub mod gate;
pub mod hostcrypt;
pub mod late;
pub mod luks;
mod transform;
mod watched;

use std::path::PathBuf;

use serde_json::Value;

/// Where a device's key can be found again: what a saved configuration says in place of the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyRef {
    /// A named key (`accel_crypto_key_create`).
    Name(String),
    /// A key file.
    File(PathBuf),
    /// A key of a key server (`keyring_kmip_add_key`).
    Kms(String),
}

impl KeyRef {
    /// Writes the reference into the parameters of a create call: `key_name`, `key_file` or
    /// `kms_key_name`.
    fn put(&self, params: &mut Value) {
        match self {
            KeyRef::Name(name) => params["key_name"] = name.as_str().into(),
            KeyRef::File(path) => params["key_file"] = path.to_string_lossy().into(),
            KeyRef::Kms(name) => params["kms_key_name"] = name.as_str().into(),
        }
    }
}
