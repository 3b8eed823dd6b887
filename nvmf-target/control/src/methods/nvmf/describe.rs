//! The target as it is: what the methods that read reply.

use cryptfold_nvmf_target::{HostInfo, PortSecurity, SubsystemInfo, TargetError, TransportOptions};
use serde_json::{Value, json};

use super::{DISCOVERY, GetSubsystems, GetTransports, OfTarget, Subsystem, address, ana_word, nqn};
use crate::control::Control;
use crate::jsonrpc::RpcResult;
use crate::methods::framework::{TICK_RATE, thread_name};
use crate::methods::options::object;

pub(super) fn transport(trtype: &str, o: &TransportOptions) -> Value {
    json!({
        "trtype": trtype,
        "max_queue_depth": o.max_queue_depth,
        "max_io_qpairs_per_ctrlr": o.max_io_qpairs_per_ctrlr,
        "in_capsule_data_size": o.in_capsule_data_size,
        "max_io_size": o.max_io_size,
        "io_unit_size": o.io_unit_size,
        "max_aq_depth": o.max_aq_depth,
        "num_shared_buffers": o.num_shared_buffers,
        "buf_cache_size": o.buf_cache_size,
        "dif_insert_or_strip": o.dif_insert_or_strip,
        "zcopy": o.zcopy,
        "c2h_success": o.c2h_success,
        "sock_priority": o.sock_priority,
        "ack_timeout": o.ack_timeout,
        "abort_timeout_sec": o.abort_timeout_sec,
        "kas": o.kas,
        "min_kato": o.min_kato,
        "connect_timeout_ms": o.connect_timeout_ms,
        "auth_timeout_ms": o.auth_timeout_ms,
        "r2t_timeout_ms": o.r2t_timeout_ms,
        "max_connections": o.max_connections,
        "max_connections_per_host": o.max_connections_per_host,
        "max_buffer_mib": o.max_buffer_mib,
        "max_buffer_mib_per_host": o.max_buffer_mib_per_host,
    })
}

pub(super) fn get_transports(c: &Control, p: GetTransports) -> RpcResult {
    let all = c.target()?.transports();
    let wanted = |t: &str| p.trtype.as_ref().is_none_or(|w| w.eq_ignore_ascii_case(t));
    let list: Vec<Value> = all.iter().filter(|(t, _)| wanted(t)).map(|(t, o)| transport(t, o)).collect();
    match p.trtype {
        Some(t) if list.is_empty() => Err(TargetError::NoTransport(t).into()),
        _ => Ok(json!(list)),
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02X}")).collect()
}

/// A host of the list; its keys by name.
pub(super) fn host(h: &HostInfo) -> Value {
    let keys = json!({"dhchap_key": h.dhchap_key, "dhchap_ctrlr_key": h.dhchap_ctrlr_key, "psk": h.psk});
    let mut v = object(json!({"nqn": h.nqn}));
    v.extend(object(keys));
    Value::Object(v)
}

fn describe(s: &SubsystemInfo) -> Value {
    let mut v = json!({
        "nqn": s.options.nqn,
        "subtype": if s.discovery { "Discovery" } else { "NVMe" },
        "listen_addresses": s.listeners.iter().map(|l| address(&l.addr)).collect::<Vec<_>>(),
        "allow_any_host": s.options.allow_any_host,
        "hosts": s.hosts.iter().map(host).collect::<Vec<_>>(),
    });
    if s.discovery {
        return v;
    }
    let o = &s.options;
    let namespaces: Vec<Value> = s
        .namespaces
        .iter()
        .map(|n| {
            let mut ns = json!({
                "nsid": n.nsid, "bdev_name": n.bdev_name, "name": n.bdev_name,
                "nguid": hex(&n.nguid), "uuid": n.uuid.to_string(), "anagrpid": n.anagrpid,
            });
            if n.eui64 != [0; 8] {
                ns["eui64"] = hex(&n.eui64).into();
            }
            if let Some(file) = &n.ptpl_file {
                ns["ptpl_file"] = file.as_str().into();
            }
            if let Some(hosts) = &n.visible_to {
                ns["no_auto_visible"] = true.into();
                ns["hosts"] = hosts.iter().map(|h| json!({"nqn": h})).collect();
            }
            ns
        })
        .collect();
    let rest = json!({
        "serial_number": o.serial_number, "model_number": o.model_number,
        "max_namespaces": if o.max_namespaces == 0 { 32 } else { o.max_namespaces },
        "min_cntlid": o.min_cntlid, "max_cntlid": o.max_cntlid, "ana_reporting": o.ana_reporting,
        "passthrough": false, "enable_nssr": false, "namespaces": namespaces,
    });
    if let (Value::Object(v), Value::Object(rest)) = (&mut v, rest) {
        v.extend(rest);
    }
    v
}

pub(super) fn get_subsystems(c: &Control, p: GetSubsystems) -> RpcResult {
    let all = c.target()?.subsystems();
    let Some(name) = p.nqn else { return Ok(all.iter().map(describe).collect()) };
    let found = all.iter().find(|s| s.options.nqn == nqn(&name));
    let found = found.ok_or(TargetError::NoSubsystem(name))?;
    Ok(json!([describe(found)]))
}

pub(super) fn get_listeners(c: &Control, p: Subsystem) -> RpcResult {
    let all = c.target()?.listeners(nqn(&p.nqn))?;
    let one = |l: &cryptfold_nvmf_target::ListenerInfo| {
        let states: Vec<Value> =
            l.ana_states.iter().map(|(g, s)| json!({"ana_group": g, "ana_state": ana_word(*s)})).collect();
        let first = l.ana_states.first().map_or("optimized", |(_, s)| ana_word(*s));
        json!({"address": address(&l.addr), "secure_channel": l.security == PortSecurity::Tls,
            "secure_concatenation": l.security == PortSecurity::Concatenation, "ana_state": first, "ana_states": states})
    };
    Ok(all.iter().map(one).collect())
}

pub(super) fn get_controllers(c: &Control, p: Subsystem) -> RpcResult {
    let all = c.target()?.controllers(nqn(&p.nqn))?;
    let kind = if nqn(&p.nqn) == DISCOVERY { "discovery" } else { "io" };
    Ok(all
        .iter()
        .map(|k| {
            json!({
                "cntlid": k.cntlid, "cntrltype": kind, "hostnqn": k.hostnqn, "hostid": k.hostid.to_string(),
                "num_io_qpairs": k.num_io_qpairs, "kato_ms": k.kato_ms,
                "keep_alive_age_ms": k.keep_alive_age.map(|age| age.as_millis() as u64),
                "reads": k.totals.reads, "writes": k.totals.writes, "read_bytes": k.totals.read_bytes,
                "write_bytes": k.totals.write_bytes, "other_commands": k.totals.other, "errors": k.totals.errors,
            })
        })
        .collect())
}

pub(super) fn get_qpairs(c: &Control, p: Subsystem) -> RpcResult {
    let all = c.target()?.qpairs(nqn(&p.nqn))?;
    Ok(all
        .iter()
        .map(|q| {
            let peer: Option<std::net::SocketAddr> = q.peer_address.parse().ok();
            let peer = peer.map_or_else(|| json!(q.peer_address), |a| address(&a.into()));
            let mut v = json!({
                "cntlid": q.cntlid, "qid": q.qid, "state": "active", "thread": thread_name(q.reactor),
                "hostnqn": q.hostnqn, "listen_address": address(&q.listen_address), "peer_address": peer,
                "queue_depth": q.depth, "reads": q.totals.reads, "writes": q.totals.writes,
                "errors": q.totals.errors,
            });
            if let Some((hash, group)) = q.auth {
                v["auth"] = json!({"state": "completed", "digest": hash.name(), "dhgroup": group.name()});
            }
            if let Some(tls) = &q.tls {
                v["tls"] = json!({
                    "version": 13, "cipher": tls.cipher, "send": tls.send.name(), "receive": tls.receive.name(),
                });
            }
            v
        })
        .collect())
}

pub(super) fn get_stats(c: &Control, _: OfTarget) -> RpcResult {
    let target = c.target()?;
    let door = target.door();
    let groups: Vec<Value> = target
        .stats()
        .iter()
        .map(|g| {
            json!({
                "name": g.name, "admin_qpairs": g.admin_qpairs, "io_qpairs": g.io_qpairs,
                "current_admin_qpairs": g.current_admin_qpairs, "current_io_qpairs": g.current_io_qpairs,
                "pending_bdev_io": 0, "completed_nvme_io": g.completed_nvme_io,
                "transports": [{"trtype": "TCP"}],
            })
        })
        .collect();
    let connections = json!({
        "current": door.connections, "unauthenticated": door.unauthenticated, "displaced": door.displaced,
        "refused": door.refused,
    });
    Ok(json!({"tick_rate": TICK_RATE, "poll_groups": groups, "connections": connections}))
}
