//! Options of buffers, sockets and accelerators; and methods of SPDK's that its saved configurations contain and that
//! have nothing to set here.

use serde_json::{Map, Value, json};

use crate::control::{Control, lock};
use crate::fips::FipsMode;
use crate::jsonrpc::{RpcError, RpcResult};
use crate::params::params;
use crate::table::{Method, When};

params! {
    /// `iobuf_set_options`.
    pub struct Iobuf {
        /// Small buffers; with their size, the memory that is mapped at the start.
        small_pool_count: u64 = 8192,
        /// Large buffers; with their size, the memory that is mapped at the start.
        large_pool_count: u64 = 1024,
        /// Bytes in a small buffer.
        small_bufsize: u32 = 8192,
        /// Bytes in a large buffer.
        large_bufsize: u32 = 135168,
        /// Only false is possible.
        enable_numa: bool = false,
    }
    /// `sock_impl_get_options`, `sock_set_default_impl`.
    pub struct Impl {
        /// "posix", "uring" or "ssl": one implementation, over io_uring, answers to all three.
        impl_name: String,
    }
    /// `sock_impl_set_options`.
    pub struct SockOptions {
        /// "posix", "uring" or "ssl".
        impl_name: String,
        /// Bytes; 0 = the kernel's choice.
        recv_buf_size: Option<u32>,
        /// Bytes; 0 = the kernel's choice.
        send_buf_size: Option<u32>,
        /// No effect.
        enable_recv_pipe: Option<bool>,
        /// No effect.
        enable_quickack: Option<bool>,
        /// No effect.
        enable_placement_id: Option<u32>,
        /// No effect.
        enable_zerocopy_send_server: Option<bool>,
        /// No effect.
        enable_zerocopy_send_client: Option<bool>,
        /// No effect.
        zerocopy_threshold: Option<u32>,
        /// Only 0 and 13 are possible.
        tls_version: Option<u32>,
        /// Of "ssl", for connections and controllers from now on: with TLS, the kernel makes and opens records where it has its `tls`
        /// module; else the library does, as ever where this is false, as it is without this call.
        enable_ktls: Option<bool>,
    }
}

const NOTHING: &str = "Accepted for configurations that SPDK saved; there is nothing to set here.";

pub fn methods() -> Vec<Method> {
    let mut list = vec![
        Method::new(
            "iobuf_set_options",
            "Sets how much memory for I/O is mapped at the start; it grows with use beyond that.",
            iobuf_set,
        )
        .when(When::Startup),
        Method::plain(
            "iobuf_get_stats",
            "Use of the I/O memory, in SPDK's form (`cache`, `main`, `retry` count \
            requests there) and in bytes.",
            iobuf_stats,
        ),
        Method::new("sock_impl_set_options", "Options of sockets, for connections from now on.", sock_set)
            .when(When::Any),
        Method::new("sock_impl_get_options", "Options of sockets.", sock_get).when(When::Any),
        Method::new("sock_set_default_impl", "Accepts \"posix\", \"uring\" and \"ssl\".", |c, p: Impl| {
            known_impl(&p.impl_name)?;
            lock(&c.options).remember(
                "sock",
                "sock_set_default_impl",
                object(json!({"impl_name": p.impl_name})),
            );
            Ok(json!(true))
        })
        .when(When::Startup),
        Method::plain("sock_get_default_impl", "The implementation of sockets.", |c| {
            let set = lock(&c.options).get("sock_set_default_impl").and_then(|p| p.get("impl_name").cloned());
            Ok(json!({"impl_name": set.unwrap_or(json!("uring"))}))
        })
        .when(When::Any),
    ];
    for name in [
        "accel_set_options",
        "accel_set_driver",
        "accel_assign_opc",
        "scheduler_set_options",
        "bdev_raid_set_options",
        "bdev_iscsi_set_options",
        "framework_disable_cpumask_locks",
        "framework_enable_cpumask_locks",
        "vmd_enable",
        "nbd_set_options",
        "keyring_linux_set_options",
    ] {
        list.push(Method::accepted(name, NOTHING));
    }
    list
}

/// The members that are there.
pub fn object(v: Value) -> Map<String, Value> {
    match v {
        Value::Object(o) => o.into_iter().filter(|(_, v)| !v.is_null()).collect(),
        _ => Map::new(),
    }
}

fn iobuf_set(c: &Control, p: Iobuf) -> RpcResult {
    if p.enable_numa {
        return Err(RpcError::params("enable_numa: true was given; only false is possible"));
    }
    let small = p.small_pool_count.checked_mul(p.small_bufsize.into());
    let large = p.large_pool_count.checked_mul(p.large_bufsize.into());
    // A quarter of the address space is no size that anybody means.
    let (Some(small), Some(large)) = (small.filter(|b| *b < 1 << 46), large.filter(|b| *b < 1 << 46)) else {
        return Err(RpcError::params(
            "small_pool_count and large_pool_count: together more memory than there can be",
        ));
    };
    let mut o = lock(&c.options);
    o.set_pools(small, large);
    let given = json!({
        "small_pool_count": p.small_pool_count, "large_pool_count": p.large_pool_count,
        "small_bufsize": p.small_bufsize, "large_bufsize": p.large_bufsize, "enable_numa": false,
    });
    o.remember("iobuf", "iobuf_set_options", object(given));
    Ok(json!(true))
}

fn iobuf_stats(_: &Control) -> RpcResult {
    let m = cryptfold_reactor::memory::stats();
    let none = json!({"cache": 0, "main": 0, "retry": 0});
    Ok(json!([{
        "module": "cryptfold",
        "small_pool": none,
        "large_pool": none,
        "mapped_bytes": m.mapped_bytes,
        "huge_bytes": m.huge_bytes,
        "pool_bytes": m.slab_bytes,
        "in_use_bytes": m.in_use_bytes,
        "large_bytes": m.large_bytes,
        "lent_blocks": m.lent_blocks,
    }]))
}

const IMPLS: &[&str] = &["posix", "uring", "ssl"];

fn known_impl(name: &str) -> Result<(), RpcError> {
    if IMPLS.contains(&name) {
        return Ok(());
    }
    Err(RpcError::params(format!("impl_name: \"{name}\" was given; one of {} is needed", IMPLS.join(", "))))
}

fn sock_set(c: &Control, p: SockOptions) -> RpcResult {
    known_impl(&p.impl_name)?;
    if let Some(v) = p.tls_version.filter(|v| !matches!(v, 0 | 13)) {
        return Err(RpcError::params(format!("tls_version: {v} was given; 13 (TLS 1.3) is the only one")));
    }
    if p.enable_ktls == Some(true) && c.config.fips == FipsMode::Validated {
        return Err(RpcError::params(
            "enable_ktls: true is not possible with --fips-mode validated: the kernel's AES-GCM is outside of the module; leave it out",
        ));
    }
    let given = object(json!({
        "recv_buf_size": p.recv_buf_size, "send_buf_size": p.send_buf_size,
        "enable_recv_pipe": p.enable_recv_pipe, "enable_quickack": p.enable_quickack,
        "enable_placement_id": p.enable_placement_id,
        "enable_zerocopy_send_server": p.enable_zerocopy_send_server,
        "enable_zerocopy_send_client": p.enable_zerocopy_send_client,
        "zerocopy_threshold": p.zerocopy_threshold, "tls_version": p.tls_version, "enable_ktls": p.enable_ktls,
    }));
    let mut options = lock(&c.options);
    options.sock.entry(p.impl_name).or_default().extend(given);
    let kernel_tls = options.kernel_tls();
    // With the lock: the last call wins. Before there is a target, its start looks at the options.
    if let Ok(target) = c.target() {
        target.set_kernel_tls(kernel_tls);
    }
    Ok(json!(true))
}

fn sock_get(c: &Control, p: Impl) -> RpcResult {
    known_impl(&p.impl_name)?;
    let mut all = object(json!({
        "recv_buf_size": 0, "send_buf_size": 0, "enable_recv_pipe": false, "enable_quickack": false,
        "enable_placement_id": 0, "enable_zerocopy_send_server": false, "enable_zerocopy_send_client": false,
        "zerocopy_threshold": 0, "tls_version": 13, "enable_ktls": false,
    }));
    if let Some(set) = lock(&c.options).sock.get(&p.impl_name) {
        all.extend(set.clone());
    }
    Ok(Value::Object(all))
}

/// The calls that set the socket options again.
pub fn sock_config(c: &Control) -> Vec<(String, Value)> {
    let o = lock(&c.options);
    let mut calls = o.calls("sock");
    for (name, set) in &o.sock {
        let mut params = object(json!({"impl_name": name}));
        params.extend(set.clone());
        calls.push(("sock_impl_set_options".into(), Value::Object(params)));
    }
    calls
}
