//! Controllers of NVMe drives and subsystems as devices: `bdev_nvme_*`. What a transport does is behind one `match` on its
//! type.

use std::net::IpAddr;
use std::time::Duration;

use cryptfold_bdev_remote::{
    AttachOptions, ControllerInfo, LinkInfo, Multipath, PathFilter, Recovery, RemoteError,
};
use cryptfold_nvmf_auth::{Psk, Secret, Version};
use cryptfold_nvmf_initiator::{ConnectOptions, Credentials, TlsKey};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::drives;
use super::nvmf::{OnlyFalse, check_concatenation, offer, ring_key, secret};
use super::options::object;
use crate::control::{Control, lock};
use crate::jsonrpc::{RpcError, RpcResult};
use crate::params::{FromJson, ParamError, choices, params};
use crate::table::{Method, When};

/// A transport of NVMe, in any case of letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// NVMe/TCP: a subsystem of another target.
    Tcp,
    /// A drive of this machine, through VFIO.
    Pcie,
}

impl FromJson for Transport {
    fn kind() -> String {
        "\"TCP\" or \"PCIe\"".into()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        match v.as_str().map(str::to_ascii_lowercase).as_deref() {
            Some("tcp") => Ok(Transport::Tcp),
            Some("pcie") => Ok(Transport::Pcie),
            _ => Err(None),
        }
    }
}

/// A string that has to be empty here.
#[derive(Clone, Debug)]
pub struct OnlyBlank;

impl FromJson for OnlyBlank {
    fn kind() -> String {
        "an empty string".into()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        if v == "" { Ok(OnlyBlank) } else { Err(None) }
    }
}

choices! {
    /// What a second attachment of a name means.
    pub enum MultipathMode {
        /// It is refused.
        Disable = "disable",
        /// Another address, used when the first is lost.
        Failover = "failover",
        /// Another association beside the first.
        Multipath = "multipath",
    }
    /// What happens when a command takes too long.
    pub enum TimeoutAction {
        /// Its connection ends, and it is sent again: there is no weaker answer.
        None = "none",
        /// The same.
        Reset = "reset",
        /// The same.
        Abort = "abort",
    }
}

params! {
    /// `bdev_nvme_attach_controller`.
    pub struct Attach {
        /// Name of the controller; its devices are called this, "n" and the number of the namespace.
        name: String,
        /// Transport.
        trtype: Transport,
        /// Address or host name; of a PCIe drive as "0000:04:00.0". A drive needs no other parameter.
        traddr: String,
        /// Family of the address; no effect: the address says it.
        adrfam: Option<String>,
        /// Port.
        trsvcid: Option<String>,
        /// Subsystem.
        subnqn: Option<String>,
        /// This host's name; one that is drawn once per run when not given. For a further path, that of the first.
        hostnqn: Option<String>,
        /// IP address of this host that connections come from; the system chooses when empty or not given.
        hostaddr: Option<String>,
        /// Only an empty string is possible: each queue's connection needs a port of its own, and the system chooses them.
        hostsvcid: Option<OnlyBlank>,
        /// No effect.
        priority: Option<String>,
        /// Only false is possible: there is no protection information.
        prchk_reftag: Option<OnlyFalse>,
        /// Only false is possible: there is no protection information.
        prchk_guard: Option<OnlyFalse>,
        /// Header digests.
        hdgst: bool = false,
        /// Data digests.
        ddgst: bool = false,
        /// Microseconds that each step of connecting may take; 10 s, or tcp_connect_timeout_ms, when not given.
        fabrics_connect_timeout_us: Option<u64>,
        /// What a second attachment of this name means.
        multipath: MultipathMode = MultipathMode::Failover,
        /// I/O queues at most; as many as there are cores are used, and fewer are refused.
        num_io_queues: u32 = 1024,
        /// Seconds until a lost path is given up; -1 = never, 0 = after one attempt.
        ctrlr_loss_timeout_sec: Option<i32>,
        /// Seconds between attempts; 0 = no further attempt.
        reconnect_delay_sec: Option<u32>,
        /// Seconds after which I/O fails without a path; 0 = as late as the path is given up.
        fast_io_fail_timeout_sec: Option<u32>,
        /// Key of the keyring for TLS.
        psk: Option<String>,
        /// Version of the TLS identity, 0 (as SPDK) or 1. Ours.
        psk_version: u8 = 0,
        /// Secure channel concatenation: authenticates without TLS (`dhchap_key`), and comes back with TLS by the key that this
        /// generates. Without `psk`. Ours.
        secure_concatenation: bool = false,
        /// Devices at most.
        max_bdevs: u32 = 128,
        /// Key of the keyring that this host proves itself with.
        dhchap_key: Option<String>,
        /// Key of the keyring that the controller has to prove itself with.
        dhchap_ctrlr_key: Option<String>,
        /// Only false is possible.
        allow_unrecognized_csi: Option<OnlyFalse>,
        /// No effect: I/O takes the first path of the best access state.
        multipath_opts: Option<Value>,
        /// No effect: I/O queues never use it.
        disable_sq_flow_control: Option<bool>,
    }
    /// `bdev_nvme_detach_controller`.
    pub struct Detach {
        /// Controller.
        name: String,
        /// Transport of the path.
        trtype: Option<Transport>,
        /// Address of the path; the whole controller when no part of a path is given.
        traddr: Option<String>,
        /// No effect.
        adrfam: Option<String>,
        /// Port of the path.
        trsvcid: Option<String>,
        /// Subsystem of the path.
        subnqn: Option<String>,
        /// Address of this host of the path.
        hostaddr: Option<String>,
        /// No effect.
        hostsvcid: Option<String>,
    }
    /// `bdev_nvme_get_controllers`.
    pub struct GetControllers {
        /// Controller; all when not given.
        name: Option<String>,
    }
    /// `bdev_nvme_reset_controller`.
    pub struct Reset {
        /// Controller.
        name: String,
        /// Only the association with this identifier; all when not given.
        cntlid: Option<u16>,
    }
    /// `bdev_nvme_set_options`.
    pub struct SetOptions {
        /// No effect: a command that takes too long ends its connection and is sent again.
        action_on_timeout: Option<TimeoutAction>,
        /// Microseconds that a command may take; 30 s (TCP) or 8 s (PCIe) when 0 or not given.
        timeout_us: Option<u64>,
        /// Microseconds that an admin command to a PCIe drive may take; 8 s when 0 or not given. TCP: as other commands.
        timeout_admin_us: Option<u64>,
        /// Keep Alive, milliseconds; 10 s when not given.
        keep_alive_timeout_ms: Option<u32>,
        /// No effect.
        arbitration_burst: Option<u32>,
        /// No effect.
        low_priority_weight: Option<u32>,
        /// No effect.
        medium_priority_weight: Option<u32>,
        /// No effect.
        high_priority_weight: Option<u32>,
        /// No effect: events are waited for.
        nvme_adminq_poll_period_us: Option<u64>,
        /// No effect.
        nvme_ioq_poll_period_us: Option<u64>,
        /// Commands under way on one I/O queue at most (as far as the target allows); 128 when not given.
        io_queue_requests: Option<u32>,
        /// No effect.
        delay_cmd_submit: Option<bool>,
        /// No effect.
        transport_retry_count: Option<u32>,
        /// How often an I/O that failed for a passing reason is sent again; -1 = without limit, 3 when not given.
        bdev_retry_count: Option<i32>,
        /// No effect.
        transport_ack_timeout: Option<u8>,
        /// See bdev_nvme_attach_controller.
        ctrlr_loss_timeout_sec: Option<i32>,
        /// See bdev_nvme_attach_controller.
        reconnect_delay_sec: Option<u32>,
        /// See bdev_nvme_attach_controller.
        fast_io_fail_timeout_sec: Option<u32>,
        /// Only false is possible: the first path of the best state is used.
        disable_auto_failback: Option<OnlyFalse>,
        /// No effect.
        generate_uuids: Option<bool>,
        /// No effect.
        transport_tos: Option<u8>,
        /// No effect.
        nvme_error_stat: Option<bool>,
        /// No effect.
        rdma_srq_size: Option<u32>,
        /// No effect.
        io_path_stat: Option<bool>,
        /// No effect.
        allow_accel_sequence: Option<bool>,
        /// No effect.
        rdma_max_cq_size: Option<u32>,
        /// No effect.
        rdma_cm_event_timeout_ms: Option<u16>,
        /// Hash functions of DH-HMAC-CHAP, by preference; all when not given.
        dhchap_digests: Option<Vec<String>>,
        /// Groups of DH-HMAC-CHAP, by preference; all when not given.
        dhchap_dhgroups: Option<Vec<String>>,
        /// No effect.
        rdma_umr_per_io: Option<bool>,
        /// Milliseconds that connecting may take; 10 s when 0 or not given.
        tcp_connect_timeout_ms: Option<u32>,
        /// No effect: flushes are always passed on.
        enable_flush: Option<bool>,
        /// No effect: I/O takes the first path of the best access state.
        multipath_opts: Option<Value>,
    }
}

pub fn methods() -> Vec<Method> {
    vec![
        Method::new(
            "bdev_nvme_attach_controller",
            "A device for each namespace of a subsystem, now and as they come and go. A second call with the name adds a path. \
             Replies the devices' names. What differs from SPDK: a first attempt that fails refuses the call, time-outs or not; \
             a flush is always passed on.",
            attach,
        ),
        Method::new(
            "bdev_nvme_detach_controller",
            "Removes the devices and what is on top of them (a pool is closed first, by cryptfold_pool_close), or one path.",
            detach,
        ),
        Method::new(
            "bdev_nvme_get_controllers",
            "Controllers and their paths. `state` is \"enabled\", \"resetting\", \"reconnect_is_delayed\", \"failed\" or \"deleting\".",
            get_controllers,
        ),
        Method::new(
            "bdev_nvme_reset_controller",
            "Connects anew, or resets the drive. I/O waits meanwhile. Replies when that is done.",
            |c, p: Reset| {
                if c.drives.has(&p.name) {
                    c.drives.reset(&p.name)?;
                } else {
                    c.remotes.reset(&p.name, p.cntlid)?;
                }
                Ok(json!(true))
            },
        ),
        Method::new(
            "bdev_nvme_set_options",
            "Defaults of controllers; possible while there are none.",
            set_options,
        )
        .when(When::Any),
    ]
}

impl From<RemoteError> for RpcError {
    fn from(e: RemoteError) -> RpcError {
        RpcError::new(e.code().into(), e.to_string())
    }
}

fn attach(c: &Control, p: Attach) -> RpcResult {
    match p.trtype {
        Transport::Pcie if c.remotes.list().iter().any(|i| i.name == p.name) => {
            Err(cryptfold_bdev_nvme::DriveError::Exists(p.name).into())
        }
        Transport::Pcie => drives::attach(c, &p.name, &p.traddr),
        Transport::Tcp if c.drives.has(&p.name) => {
            Err(cryptfold_bdev_nvme::DriveError::Exists(p.name).into())
        }
        Transport::Tcp => attach_tcp(c, p),
    }
}

fn detach(c: &Control, p: Detach) -> RpcResult {
    if c.drives.has(&p.name) {
        return drives::detach(c, &p.name);
    }
    let hostaddr = hostaddr(p.hostaddr.as_deref())?;
    let filter = PathFilter { traddr: p.traddr, trsvcid: p.trsvcid, subnqn: p.subnqn, hostaddr };
    c.remotes.detach(&p.name, &filter)?;
    Ok(json!(true))
}

/// An address of this host; none when empty, too.
fn hostaddr(given: Option<&str>) -> Result<Option<IpAddr>, RpcError> {
    let wrong =
        |a| RpcError::params(format!("hostaddr: \"{a}\" is no IP address; 192.0.2.10 and 2001:db8::1 are"));
    given.filter(|a| !a.is_empty()).map(|a| a.parse().map_err(|_| wrong(a))).transpose()
}

fn get_controllers(c: &Control, p: GetControllers) -> RpcResult {
    let mut all: Vec<Value> = c.remotes.list().iter().map(describe).chain(c.drives.list()).collect();
    if let Some(name) = p.name {
        all.retain(|i| i["name"] == name.as_str());
        if all.is_empty() {
            return Err(RemoteError::NotFound(name).into());
        }
    }
    Ok(all.into())
}

fn describe(i: &ControllerInfo) -> Value {
    let link = |l: &LinkInfo| {
        let mut o = json!({
            "state": l.state,
            "trid": l.trid,
            "cntlid": l.cntlid.unwrap_or_default(),
            "host": {"nqn": l.hostnqn, "addr": l.hostaddr.map(|a| a.to_string()).unwrap_or_default(), "svcid": ""},
            "numa_id": -1,
        });
        if let Some((send, receive)) = l.tls {
            o["tls"] = json!({"version": 13, "send": send.name(), "receive": receive.name()});
        }
        if !l.alternates.is_empty() {
            o["alternate_trids"] = json!(l.alternates);
        }
        o
    };
    json!({"name": i.name, "ctrlrs": i.links.iter().map(link).collect::<Vec<_>>()})
}

/// The calls that attach all controllers again.
pub fn config(c: &Control) -> impl Iterator<Item = (String, Value)> {
    c.remotes.saved().into_iter().map(|p| ("bdev_nvme_attach_controller".into(), p))
}

fn set_options(c: &Control, p: SetOptions) -> RpcResult {
    if !c.remotes.is_empty() || !c.drives.is_empty() {
        let what = "bdev_nvme_set_options: controllers are attached: Operation not permitted";
        return Err(RpcError::new(RpcError::INVALID_STATE, what));
    }
    if p.bdev_retry_count.is_some_and(|n| n < -1) {
        return Err(RpcError::params("bdev_retry_count: -1 or more is needed"));
    }
    let given = object(json!({
        "timeout_us": p.timeout_us, "timeout_admin_us": p.timeout_admin_us, "keep_alive_timeout_ms": p.keep_alive_timeout_ms,
        "io_queue_requests": p.io_queue_requests, "bdev_retry_count": p.bdev_retry_count,
        "ctrlr_loss_timeout_sec": p.ctrlr_loss_timeout_sec, "reconnect_delay_sec": p.reconnect_delay_sec,
        "fast_io_fail_timeout_sec": p.fast_io_fail_timeout_sec,
        "dhchap_digests": p.dhchap_digests, "dhchap_dhgroups": p.dhchap_dhgroups,
        "tcp_connect_timeout_ms": p.tcp_connect_timeout_ms,
    }));
    offer(c.config.fips, &given)?;
    let mut merged = options(c);
    merged.extend(given.clone());
    recovery(&merged, None, None, None)?;
    lock(&c.options).remember("bdev", "bdev_nvme_set_options", given);
    Ok(json!(true))
}

/// What `bdev_nvme_set_options` was given so far.
fn options(c: &Control) -> Map<String, Value> {
    lock(&c.options).get("bdev_nvme_set_options").cloned().unwrap_or_default()
}

fn recovery(
    defaults: &Map<String, Value>,
    loss: Option<i32>,
    delay: Option<u32>,
    fast: Option<u32>,
) -> Result<Recovery, RpcError> {
    let default = |name: &str| defaults.get(name).and_then(Value::as_i64).unwrap_or(0);
    let loss = loss.unwrap_or(default("ctrlr_loss_timeout_sec") as i32);
    let delay = delay.unwrap_or(default("reconnect_delay_sec") as u32);
    let fast = fast.unwrap_or(default("fast_io_fail_timeout_sec") as u32);
    Recovery::new(loss, delay, fast).map_err(RpcError::params)
}

/// What the call was given, for a configuration: with names of keys, and with the name of this host.
fn saved(p: &Attach, hostnqn: &str) -> Value {
    let all = json!({
        "name": p.name, "trtype": "TCP", "adrfam": p.adrfam, "traddr": p.traddr, "trsvcid": p.trsvcid, "subnqn": p.subnqn,
        "hostnqn": hostnqn, "hostaddr": p.hostaddr.as_ref().filter(|a| !a.is_empty()), "priority": p.priority, "hdgst": p.hdgst, "ddgst": p.ddgst,
        "fabrics_connect_timeout_us": p.fabrics_connect_timeout_us, "multipath": p.multipath.word(),
        "num_io_queues": p.num_io_queues, "ctrlr_loss_timeout_sec": p.ctrlr_loss_timeout_sec,
        "reconnect_delay_sec": p.reconnect_delay_sec, "fast_io_fail_timeout_sec": p.fast_io_fail_timeout_sec,
        "psk": p.psk, "psk_version": p.psk.as_ref().map(|_| p.psk_version),
        "secure_concatenation": p.secure_concatenation.then_some(true), "max_bdevs": p.max_bdevs,
        "dhchap_key": p.dhchap_key, "dhchap_ctrlr_key": p.dhchap_ctrlr_key,
    });
    Value::Object(object(all))
}

/// This host's name and identifier: those of the controller's first path, or as given, or drawn once.
fn host(c: &Control, p: &Attach) -> (String, [u8; 16]) {
    if let (None, Some(host)) = (&p.hostnqn, c.remotes.host_of(&p.name)) {
        return host;
    }
    let uuid_of = |nqn: &str| nqn.rsplit_once("uuid:").and_then(|(_, u)| Uuid::parse_str(u).ok());
    let own = *c.host_uuid.get_or_init(Uuid::new_v4);
    match &p.hostnqn {
        None => (format!("nqn.2014-08.org.nvmexpress:uuid:{own}"), own.into_bytes()),
        // Identifier and name belong together: one host, one of each.
        Some(nqn) => (nqn.clone(), uuid_of(nqn).filter(|u| !u.is_nil()).unwrap_or(own).into_bytes()),
    }
}

fn attach_tcp(c: &Control, p: Attach) -> RpcResult {
    let needed = |name: &str, v: &Option<String>| {
        v.clone().ok_or_else(|| RpcError::params(format!("{name}: missing; TCP needs it")))
    };
    let defaults = options(c);
    let number = |name: &str| defaults.get(name).and_then(Value::as_u64).filter(|n| *n > 0);
    let mut connect =
        ConnectOptions::new(&p.traddr, needed("trsvcid", &p.trsvcid)?, needed("subnqn", &p.subnqn)?);
    (connect.hostnqn, connect.hostid) = host(c, &p);
    connect.hostaddr = hostaddr(p.hostaddr.as_deref())?;
    (connect.hdgst, connect.ddgst) = (p.hdgst, p.ddgst);
    connect.io_queues = p.num_io_queues.min(u32::from(u16::MAX) - 1) as u16;
    connect.queue_size = number("io_queue_requests").unwrap_or(128).clamp(2, 4096) as u16;
    connect.kato_ms = number("keep_alive_timeout_ms").unwrap_or(10_000) as u32;
    if let Some(us) = number("timeout_us") {
        connect.io_timeout = Duration::from_micros(us);
    }
    let given = p.fabrics_connect_timeout_us.filter(|us| *us > 0).map(Duration::from_micros);
    if let Some(limit) = given.or(number("tcp_connect_timeout_ms").map(Duration::from_millis)) {
        connect.connect_timeout = limit;
    }
    let host_secret = secret(c, "dhchap_key", p.dhchap_key.clone())?;
    let controller: Option<Secret> =
        secret(c, "dhchap_ctrlr_key", p.dhchap_ctrlr_key.clone())?.map(|n| n.key);
    connect.credentials = match (host_secret, controller) {
        (Some(s), controller) => {
            Some(Credentials { secret: s.key, controller, offer: offer(c.config.fips, &defaults)? })
        }
        (None, None) => None,
        (None, Some(_)) => return Err(RpcError::params("dhchap_key: missing; dhchap_ctrlr_key needs it")),
    };
    let version = match p.psk_version {
        0 => Version::V0,
        1 => Version::V1,
        n => return Err(RpcError::params(format!("psk_version: {n} was given; 0 or 1 is needed"))),
    };
    let psk = ring_key(c, "psk", p.psk.clone(), Psk::parse)?;
    connect.tls = psk.map(|n| TlsKey { psk: n.key, version });
    connect.kernel_tls = lock(&c.options).kernel_tls();
    connect.concat = p.secure_concatenation;
    if connect.concat {
        check_concatenation(c.config.fips)?;
    }
    if connect.concat && (connect.tls.is_some() || connect.credentials.is_none()) {
        let why = "secure_concatenation: needs dhchap_key, and no psk";
        return Err(RpcError::params(why));
    }
    let retries = defaults.get("bdev_retry_count").and_then(Value::as_i64).unwrap_or(3);
    let attachment = AttachOptions {
        name: p.name.clone(),
        multipath: match p.multipath {
            MultipathMode::Disable => Multipath::Disable,
            MultipathMode::Failover => Multipath::Failover,
            MultipathMode::Multipath => Multipath::Multipath,
        },
        recovery: recovery(
            &defaults,
            p.ctrlr_loss_timeout_sec,
            p.reconnect_delay_sec,
            p.fast_io_fail_timeout_sec,
        )?,
        max_bdevs: p.max_bdevs as usize,
        retries: u32::try_from(retries).unwrap_or(u32::MAX),
        saved: saved(&p, &connect.hostnqn),
        connect,
    };
    Ok(json!(c.remotes.attach(c.handles(), attachment)?))
}
