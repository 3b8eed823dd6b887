//! Key servers (KMIP) and keys of theirs, in the manner of SPDK's keyring modules.

use std::path::PathBuf;
use std::time::Duration;

use cryptfold_kmip::ServerAddress;
use serde_json::{Value, json};

use super::crypto::{absolute, users};
use crate::control::Control;
use crate::jsonrpc::{RpcError, RpcResult};
use crate::kms::{KeyOptions, KeyView, OnEnd, Policy, ServerOptions, ServerView};
use crate::params::params;
use crate::table::{Method, When};

params! {
    /// `keyring_kmip_add_server`.
    pub struct AddServer {
        /// Name.
        name: String,
        /// Addresses of servers that hold the same keys, the preferred one first: HOST, HOST:PORT or [IPV6]:PORT; port 5696 unless given.
        servers: Vec<String>,
        /// PEM file with the certificates of who signs the servers' certificates.
        ca_file: String,
        /// PEM file with our certificate.
        cert_file: String,
        /// PEM file with our private key, mode 0600.
        key_file: String,
        /// Longest time for connecting, in ms.
        connect_timeout_ms: u32 = 3000,
        /// Longest time for an answer, in ms.
        timeout_ms: u32 = 5000,
        /// How often all servers are tried before an operation fails.
        rounds: u32 = 2,
        /// Time between two looks at the states of keys, in ms: a key that ends is fenced within it, one that is not found any more after a second look (at most 1 s later).
        poll_interval_ms: u32 = 10_000,
    }
    /// `keyring_kmip_remove_server`.
    pub struct RemoveServer {
        /// Name.
        name: String,
    }
    /// `keyring_kmip_add_key`.
    pub struct AddKey {
        /// Name.
        name: String,
        /// Name of the server.
        server: String,
        /// Unique identifiers at the server: one for the whole XTS key (32 or 64 bytes), or two for its halves.
        objects: Vec<String>,
        /// What a deactivated or archived key does.
        on_deactivated: OnEnd = OnEnd::Fence,
        /// What a compromised key does.
        on_compromised: OnEnd = OnEnd::Fence,
        /// What a destroyed key does.
        on_destroyed: OnEnd = OnEnd::Fence,
        /// What a key does that the server does not know or does not show to us.
        on_not_found: OnEnd = OnEnd::Fence,
    }
    /// `keyring_kmip_remove_key`.
    pub struct RemoveKey {
        /// Name.
        name: String,
    }
}

pub fn methods() -> Vec<Method> {
    vec![
        Method::new(
            "keyring_kmip_add_server",
            "Makes a key server known: KMIP 1.2 to 1.4 over TLS, with certificates on both sides. It is asked when a \
             device needs a key. Ours.",
            add_server,
        )
        .when(When::Any),
        Method::new("keyring_kmip_remove_server", "Forgets a key server without keys. Ours.", |c, p: RemoveServer| {
            c.kms.remove_server(&p.name)?;
            Ok(json!(true))
        })
        .when(When::Any),
        Method::plain(
            "keyring_kmip_get_servers",
            "The key servers. `reachable` is null until one is asked. Ours.",
            |c| Ok(c.kms.servers().iter().map(server).collect()),
        )
        .when(When::Any),
        Method::new(
            "keyring_kmip_add_key",
            "Names an XTS key that a key server holds, for bdev_hostcrypt_create (kms_key_name). It is fetched when a \
             device is made with it, and its state is looked at from then on: only an active key is used; \"fence\" ends all \
             I/O, reads too, with Access Denied and Do Not Retry until the key is active again, \"keep\" goes on. A server that \
             does not answer changes nothing for devices that have their key; those that do not, answer Namespace Not \
             Ready until it does. Ours.",
            |c, p: AddKey| {
                let policy = Policy {
                    deactivated: p.on_deactivated,
                    compromised: p.on_compromised,
                    destroyed: p.on_destroyed,
                    not_found: p.on_not_found,
                };
                let device = None;
                c.kms.add_key(KeyOptions { name: p.name, server: p.server, objects: p.objects, policy, device })?;
                Ok(json!(true))
            },
        )
        .when(When::Any),
        Method::new("keyring_kmip_remove_key", "Forgets a key that no device uses. Ours.", |c, p: RemoveKey| {
            c.kms.remove_key(&p.name)?;
            Ok(json!(true))
        })
        .when(When::Any),
        Method::plain(
            "keyring_kmip_get_keys",
            "The keys of key servers, never what is in them: what the server said last (`state`), what devices may do \
             (`access`: unused, waiting, open, fenced) and why. Ours.",
            |c| Ok(c.kms.keys().iter().map(|k| key(c, k)).collect()),
        )
        .when(When::Any),
    ]
}

fn add_server(c: &Control, p: AddServer) -> RpcResult {
    let at_least = |name: &str, ms: u32, least: u32| match ms < least {
        true => Err(RpcError::params(format!("{name}: {ms} was given; at least {least} is needed"))),
        false => Ok(Duration::from_millis(ms.into())),
    };
    if p.servers.is_empty() || p.servers.len() > 16 {
        return Err(RpcError::params(format!("servers: {} were given; 1 to 16 are needed", p.servers.len())));
    }
    if !(1..=10).contains(&p.rounds) {
        return Err(RpcError::params(format!("rounds: {} was given; 1 to 10 is needed", p.rounds)));
    }
    let address =
        |s: &String| s.parse::<ServerAddress>().map_err(|e| RpcError::params(format!("servers: {e}")));
    let path = |s: &str| -> Result<PathBuf, RpcError> { absolute(s) };
    c.kms.add_server(ServerOptions {
        addresses: p.servers.iter().map(address).collect::<Result<_, _>>()?,
        ca_file: path(&p.ca_file)?,
        cert_file: path(&p.cert_file)?,
        key_file: path(&p.key_file)?,
        connect_timeout: at_least("connect_timeout_ms", p.connect_timeout_ms, 10)?,
        timeout: at_least("timeout_ms", p.timeout_ms, 10)?,
        rounds: p.rounds,
        poll_interval: at_least("poll_interval_ms", p.poll_interval_ms, 100)?,
        name: p.name,
    })?;
    Ok(json!(true))
}

fn server_params(o: &ServerOptions) -> Value {
    let ms = |d: Duration| d.as_millis() as u64;
    json!({
        "name": o.name,
        "servers": o.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "ca_file": o.ca_file, "cert_file": o.cert_file, "key_file": o.key_file,
        "connect_timeout_ms": ms(o.connect_timeout), "timeout_ms": ms(o.timeout), "rounds": o.rounds,
        "poll_interval_ms": ms(o.poll_interval),
    })
}

fn key_params(o: &KeyOptions) -> Value {
    json!({
        "name": o.name, "server": o.server, "objects": o.objects,
        "on_deactivated": o.policy.deactivated.word(), "on_compromised": o.policy.compromised.word(),
        "on_destroyed": o.policy.destroyed.word(), "on_not_found": o.policy.not_found.word(),
    })
}

fn server(s: &ServerView) -> Value {
    let mut v = server_params(&s.options);
    v["reachable"] = json!(s.reachable);
    v["error"] = json!(s.error);
    v["last_answer_age_seconds"] = json!(s.answer_age.map(|age| age.as_secs_f64()));
    v
}

fn key(c: &Control, k: &KeyView) -> Value {
    let mut v = key_params(&k.options);
    v["state"] = json!(k.state);
    v["access"] = json!(k.access);
    v["reason"] = json!(k.reason);
    v["devices"] = match &k.options.device {
        Some(device) => json!([device]),
        None => json!(users(c, "kms_key_name", &k.options.name)),
    };
    v
}

/// The keys for `keyring_get_keys`.
pub fn ring_entries(c: &Control) -> Vec<Value> {
    let users = |k: &KeyView| users(c, "kms_key_name", &k.options.name).len();
    let entry = |k: &KeyView| {
        json!({"name": k.options.name, "module": "keyring_kmip", "removed": false, "probed": k.access != "unused",
            "refcnt": 1 + users(k), "server": k.options.server})
    };
    c.kms.keys().iter().map(entry).collect()
}

/// The calls that make servers and keys known again.
pub fn config(c: &Control) -> Vec<(String, Value)> {
    let (servers, keys) = c.kms.options();
    let servers = servers.iter().map(|s| ("keyring_kmip_add_server".to_string(), server_params(s)));
    let keys = keys.iter().map(|k| ("keyring_kmip_add_key".to_string(), key_params(k)));
    servers.chain(keys).collect()
}
