//! The keyring: names for key files.

use std::path::Path;

use serde_json::{Value, json};

use super::kms;
use crate::control::Control;
use crate::jsonrpc::RpcResult;
use crate::keyring::RingKey;
use crate::params::params;
use crate::table::{Method, When};

params! {
    /// `keyring_file_add_key`.
    pub struct AddKey {
        /// Name.
        name: String,
        /// File with one key, mode 0600; an absolute path.
        path: String,
    }
    /// `keyring_file_remove_key`.
    pub struct RemoveKey {
        /// Name.
        name: String,
    }
}

pub fn methods() -> Vec<Method> {
    vec![
        Method::new(
            "keyring_file_add_key",
            "Names a file with one key (`DHHC-1:...` or `NVMeTLSkey-1:...`). Only its owner may be able to read it. It is \
             read when the key is put to use.",
            |c, p: AddKey| {
                c.ring.add(&p.name, Path::new(&p.path))?;
                Ok(json!(true))
            },
        )
        .when(When::Any),
        Method::new(
            "keyring_file_remove_key",
            "Forgets a name. Hosts that were added with the key keep it.",
            |c, p: RemoveKey| {
                c.ring.remove(&p.name)?;
                Ok(json!(true))
            },
        )
        .when(When::Any),
        Method::plain("keyring_get_keys", "The named keys; never what is in them.", keys).when(When::Any),
    ]
}

fn keys(c: &Control) -> RpcResult {
    let users = |name: &str| {
        let all = c.target().map(|t| t.subsystems()).unwrap_or_default();
        let hosts = all.iter().flat_map(|s| &s.hosts);
        hosts
            .flat_map(|h| [&h.dhchap_key, &h.dhchap_ctrlr_key, &h.psk])
            .filter(|k| k.as_deref() == Some(name))
            .count()
    };
    let file = |k: &RingKey| {
        json!({"name": k.name, "module": "keyring_file", "removed": false, "probed": true,
            "refcnt": 1 + users(&k.name), "path": k.path})
    };
    Ok(c.ring.list().iter().map(file).chain(kms::ring_entries(c)).collect())
}

/// The calls that name the keys again.
pub fn config(c: &Control) -> Vec<(String, Value)> {
    let call = |k: &RingKey| ("keyring_file_add_key".into(), json!({"name": k.name, "path": k.path}));
    c.ring.list().iter().map(call).chain(kms::config(c)).collect()
}
