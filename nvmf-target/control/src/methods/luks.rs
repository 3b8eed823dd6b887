//! Volumes on which hosts put LUKS2.

use cryptfold_nvmf_spec::Nqn;
use serde_json::json;
use uuid::Uuid;

use super::devices::delete;
use crate::control::Control;
use crate::jsonrpc::{RpcError, RpcResult};
use crate::luks::Options;
use crate::params::params;
use crate::table::Method;

/// Hosts that a volume can name.
const MAX_HOSTS: usize = 256;

params! {
    /// `bdev_luks_create`.
    pub struct LuksCreate {
        /// Volume below, with blocks of 4096 bytes.
        base_bdev_name: String,
        /// Name.
        name: String,
        /// Key server with the hosts' keys (keyring_kmip_add_server).
        kms_server: String,
        /// Bind also what hosts write that do not have to authenticate (DH-HMAC-CHAP or TLS).
        allow_unauthenticated: bool = false,
        /// NQNs of the hosts that may get at the volume while it is bound. When its subsystem lets another one in, or one is connected, it stays raw, or is fenced. Without this: all hosts that authenticate.
        allowed_hosts: Option<Vec<String>>,
        /// Most iterations of a header's digest that are done to prove a key: two million take about a second.
        max_iterations: u32 = 5_000_000,
        /// What was stored raw before its key was there is reduced in the background, so many MB/s of it at most. 0: it is not, a volume with data behind its header stays raw, and one that is converting already stays as it is.
        late_mb_s: u32 = 100,
        /// UUID; made of the base's and the name when not given.
        uuid: Option<Uuid>,
    }
    /// `bdev_luks_get_status`.
    pub struct LuksStatus {
        /// Name of the device; all when not given.
        name: Option<String>,
    }
}

pub fn methods() -> Vec<Method> {
    vec![
        Method::new(
            "bdev_luks_create",
            "A volume for hosts that put LUKS2 on it: raw, until a host has written a header whose key is at the key server; \
             then what the host encrypts is decrypted below. Replies its name. Ours.",
            create,
        ),
        delete("bdev_luks_delete", "bdev_luks_create"),
        Method::new(
            "bdev_luks_get_status",
            "What these volumes are: `state` (raw, converting, bound, waiting for the key, fenced), `reason`, the LUKS volume, what the key \
             server says about its key; while converting, `left_bytes`: about how much of what was stored before the key was there \
             has not been gone through. Ours.",
            |c: &Control, p: LuksStatus| Ok(json!(c.luks.status(c, p.name.as_deref())?)),
        ),
    ]
}

fn create(c: &Control, p: LuksCreate) -> RpcResult {
    if p.max_iterations == 0 {
        return Err(RpcError::params("max_iterations: 0 was given; at least 1 is needed"));
    }
    let allowed_hosts = p.allowed_hosts.unwrap_or_default();
    if allowed_hosts.len() > MAX_HOSTS {
        let n = allowed_hosts.len();
        return Err(RpcError::params(format!(
            "allowed_hosts: {n} were given; at most {MAX_HOSTS} are taken"
        )));
    }
    for host in &allowed_hosts {
        Nqn::parse(host).map_err(|e| RpcError::params(format!("allowed_hosts: \"{host}\": {e}")))?;
    }
    let options = Options {
        name: p.name,
        base_bdev_name: p.base_bdev_name,
        kms_server: p.kms_server,
        allow_unauthenticated: p.allow_unauthenticated,
        allowed_hosts,
        max_iterations: p.max_iterations,
        late_mb_s: p.late_mb_s,
        uuid: p.uuid,
    };
    Ok(json!(c.luks.add(c, options)?))
}
