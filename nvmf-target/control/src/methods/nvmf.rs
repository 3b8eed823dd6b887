//! The target: transport, subsystems, namespaces, listeners, hosts, statistics.

mod describe;

use cryptfold_nvmf_auth::{DhGroup, HashId, Offer, Psk, Secret};
use cryptfold_nvmf_target::{
    AnaState, DiscoveryFilter, HostAccess, ListenAddr, Named, NsOptions, PortSecurity, Referral,
    SubsystemOptions, Target, TargetError, TransportOptions,
};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::options::object;
use crate::control::{Control, lock};
use crate::fips::FipsMode;
use crate::jsonrpc::{RpcError, RpcResult};
use crate::params::{FromJson, Hex, ParamError, choices, object_params, params};
use crate::table::{Method, When};
use describe::{
    get_controllers, get_listeners, get_qpairs, get_stats, get_subsystems, get_transports, hex, host,
    transport,
};

/// Name of the discovery subsystem.
const DISCOVERY: &str = "nqn.2014-08.org.nvmexpress.discovery";

/// SPDK's name of the one target.
#[derive(Clone, Debug)]
pub struct TargetName;

impl FromJson for TargetName {
    fn kind() -> String {
        "\"nvmf_tgt\" (there is one target)".into()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        if v == "nvmf_tgt" { Ok(TargetName) } else { Err(None) }
    }
}

/// A switch that only has one position here.
#[derive(Clone, Debug)]
pub struct OnlyFalse;

impl FromJson for OnlyFalse {
    fn kind() -> String {
        "false".into()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        if v == false { Ok(OnlyFalse) } else { Err(None) }
    }
}

/// A list that has to be empty here.
#[derive(Clone, Debug)]
pub struct OnlyEmpty;

impl FromJson for OnlyEmpty {
    fn kind() -> String {
        "an empty array".into()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        if v.as_array().is_some_and(Vec::is_empty) { Ok(OnlyEmpty) } else { Err(None) }
    }
}

choices! {
    /// States of an ANA group.
    pub enum Ana {
        /// Optimized.
        Optimized = "optimized",
        /// Non-optimized.
        NonOptimized = "non_optimized",
        /// Inaccessible.
        Inaccessible = "inaccessible",
    }
    /// What a second connection of a host meets.
    pub enum DupHostPolicy {
        /// Nothing.
        Allow = "allow",
    }
}

params! {
    /// `nvmf_set_config`.
    pub struct SetConfig {
        /// No effect: there are no NVMe devices to pass commands to.
        admin_cmd_passthru: Option<Value>,
        /// No effect: queues spread over all reactors.
        poll_groups_mask: Option<String>,
        /// "match_any", or a list of "transport", "address", "svcid" with commas.
        discovery_filter: Option<String>,
        /// The same as an array.
        discovery_filters: Option<Vec<String>>,
        /// Hash functions of DH-HMAC-CHAP, by preference: "sha256", "sha384", "sha512"; all when not given.
        dhchap_digests: Option<Vec<String>>,
        /// Groups of DH-HMAC-CHAP, by preference: "null", "ffdhe2048", "ffdhe3072", "ffdhe4096", "ffdhe6144", "ffdhe8192"; all when not
        /// given.
        dhchap_dhgroups: Option<Vec<String>>,
        /// Duplicate hosts.
        dup_host_policy: Option<DupHostPolicy>,
    }
    /// `nvmf_set_max_subsystems`.
    pub struct MaxSubsystems {
        /// Subsystems at most, the discovery subsystem included.
        max_subsystems: u32,
    }
    /// `nvmf_set_crdt`.
    pub struct Crdt {
        /// First delay, in units of 100 ms.
        crdt1: u16 = 0,
        /// Second delay.
        crdt2: u16 = 0,
        /// Third delay.
        crdt3: u16 = 0,
    }
    /// `nvmf_create_transport`.
    pub struct CreateTransport {
        /// "TCP".
        trtype: String,
        /// Target.
        tgt_name: Option<TargetName>,
        /// Entries of an I/O queue.
        max_queue_depth: u16 = TransportOptions::default().max_queue_depth,
        /// I/O queues of a controller.
        max_io_qpairs_per_ctrlr: u16 = TransportOptions::default().max_io_qpairs_per_ctrlr,
        /// Bytes of data in a command capsule of an I/O queue.
        in_capsule_data_size: u32 = TransportOptions::default().in_capsule_data_size,
        /// Bytes that a command transfers at most.
        max_io_size: u32 = TransportOptions::default().max_io_size,
        /// Shown as given.
        io_unit_size: u32 = TransportOptions::default().io_unit_size,
        /// Entries of the admin queue.
        max_aq_depth: u16 = TransportOptions::default().max_aq_depth,
        /// Shown as given.
        num_shared_buffers: u32 = TransportOptions::default().num_shared_buffers,
        /// Shown as given.
        buf_cache_size: u32 = TransportOptions::default().buf_cache_size,
        /// No effect: buffers come from the arena.
        iobuf_small_cache_size: Option<u32>,
        /// No effect: buffers come from the arena.
        iobuf_large_cache_size: Option<u32>,
        /// Shown as given: there is nothing but zero copy where devices lend buffers.
        zcopy: bool = false,
        /// RDMA only; no effect.
        num_cqe: Option<i32>,
        /// RDMA only; no effect.
        max_srq_depth: Option<u32>,
        /// RDMA only; no effect.
        no_srq: Option<bool>,
        /// Let the last data stand for the completion where the host allows it.
        c2h_success: bool = true,
        /// Only false is possible.
        dif_insert_or_strip: bool = false,
        /// SO_PRIORITY of connections.
        sock_priority: u32 = 0,
        /// RDMA only; no effect.
        acceptor_backlog: Option<i32>,
        /// How long Abort waits for a command that a device promised to end, to say truthfully whether it was aborted, seconds.
        abort_timeout_sec: u32 = TransportOptions::default().abort_timeout_sec,
        /// RDMA only; no effect.
        no_wr_batching: Option<bool>,
        /// No effect.
        control_msg_num: Option<u16>,
        /// VFIO-USER only; no effect.
        disable_mappable_bar0: Option<bool>,
        /// VFIO-USER only; no effect.
        disable_adaptive_irq: Option<bool>,
        /// VFIO-USER only; no effect.
        disable_shadow_doorbells: Option<bool>,
        /// No effect: connections are accepted as they come.
        acceptor_poll_rate: Option<u32>,
        /// Milliseconds after which unacknowledged data ends a connection; 0 = the system's.
        ack_timeout: u32 = 0,
        /// RDMA only; no effect.
        data_wr_pool_size: Option<u32>,
        /// No effect: no command is passed through.
        disable_command_passthru: Option<bool>,
        /// Granularity of keep-alive timers in units of 100 ms.
        kas: u16 = TransportOptions::default().kas,
        /// Milliseconds that a keep-alive timer has at least.
        min_kato: u32 = TransportOptions::default().min_kato,
        /// Commands to hide.
        masked_oncs: Option<OnlyEmpty>,
        /// Fused commands to hide.
        masked_fuses: Option<OnlyEmpty>,
        /// Milliseconds in which a new connection has to say who it is. Ours.
        connect_timeout_ms: u32 = TransportOptions::default().connect_timeout_ms,
        /// Milliseconds in which a host has to authenticate. Ours.
        auth_timeout_ms: u32 = TransportOptions::default().auth_timeout_ms,
        /// Milliseconds in which a host has to send data that it was asked for or the other half of a fused operation, and to take some of what it is sent. Ours.
        r2t_timeout_ms: u32 = TransportOptions::default().r2t_timeout_ms,
        /// Connections of all hosts. For one more the oldest goes whose host has not connected or authenticated. Ours.
        max_connections: u32 = TransportOptions::default().max_connections,
        /// Connections of one host. Ours.
        max_connections_per_host: u32 = TransportOptions::default().max_connections_per_host,
        /// MiB for the data of all hosts' commands. Ours.
        max_buffer_mib: u32 = TransportOptions::default().max_buffer_mib,
        /// MiB for the data of one host's commands. Ours.
        max_buffer_mib_per_host: u32 = TransportOptions::default().max_buffer_mib_per_host,
    }
    /// `nvmf_get_transports`.
    pub struct GetTransports {
        /// Only this type.
        trtype: Option<String>,
        /// Target.
        tgt_name: Option<TargetName>,
    }
    /// `nvmf_get_subsystems`.
    pub struct GetSubsystems {
        /// Only this subsystem.
        nqn: Option<String>,
        /// Target.
        tgt_name: Option<TargetName>,
    }
    /// `nvmf_create_subsystem`.
    pub struct CreateSubsystem {
        /// Name.
        nqn: String,
        /// Target.
        tgt_name: Option<TargetName>,
        /// Serial number, up to 20 characters.
        serial_number: Option<String>,
        /// Model number, up to 40 characters.
        model_number: Option<String>,
        /// No effect.
        admin_label: Option<String>,
        /// Namespaces at most; 0 = 32.
        max_namespaces: u32 = 0,
        /// Any host may connect.
        allow_any_host: bool = false,
        /// Report asymmetric namespace access.
        ana_reporting: bool = false,
        /// Smallest controller identifier.
        min_cntlid: u16 = 1,
        /// Largest controller identifier.
        max_cntlid: u16 = 0xffef,
        /// No effect.
        dmrsl: Option<u32>,
        /// No effect.
        wzsl: Option<u8>,
        /// NVMe pass-through.
        passthrough: Option<OnlyFalse>,
        /// Subsystem reset.
        enable_nssr: Option<OnlyFalse>,
    }
    /// A subsystem's name.
    pub struct Subsystem {
        /// Name of the subsystem.
        nqn: String,
        /// Target.
        tgt_name: Option<TargetName>,
    }
    /// An address.
    pub struct Address {
        /// "TCP".
        trtype: String,
        /// "IPv4" or "IPv6"; as the address is when not given.
        adrfam: Option<String>,
        /// IP address.
        traddr: String,
        /// Port; "0" picks a free one.
        trsvcid: Option<String>,
    }
    /// `nvmf_subsystem_add_listener`.
    pub struct AddListener {
        /// Name of the subsystem; "discovery" for the discovery subsystem.
        nqn: String,
        /// Target.
        tgt_name: Option<TargetName>,
        /// Where to listen.
        listen_address: Address,
        /// TLS only: hosts need a key (`psk` of `nvmf_subsystem_add_host`).
        secure_channel: bool = false,
        /// Secure channel concatenation: hosts authenticate without TLS (`dhchap_key` of `nvmf_subsystem_add_host`), and come back with
        /// TLS by the key that this generates. Without TLS there is no I/O. Hosts with a `psk` come with TLS at once. Ours.
        secure_concatenation: bool = false,
        /// ANA state of all groups there.
        ana_state: Option<Ana>,
        /// No effect.
        sock_impl: Option<String>,
        /// No effect.
        numa_id: Option<i32>,
    }
    /// `nvmf_subsystem_remove_listener`.
    pub struct RemoveListener {
        /// Name of the subsystem; "discovery" for the discovery subsystem.
        nqn: String,
        /// Target.
        tgt_name: Option<TargetName>,
        /// Where it listens.
        listen_address: Address,
    }
    /// `nvmf_subsystem_listener_set_ana_state`.
    pub struct SetAna {
        /// Name of the subsystem.
        nqn: String,
        /// Target.
        tgt_name: Option<TargetName>,
        /// Where it listens.
        listen_address: Address,
        /// New state.
        ana_state: Ana,
        /// Group; all of them when not given.
        anagrpid: Option<u32>,
    }
    /// `nvmf_subsystem_set_ns_ana_group`.
    pub struct SetNsAna {
        /// Name of the subsystem.
        nqn: String,
        /// Namespace.
        nsid: u32,
        /// New group.
        anagrpid: u32,
        /// Target.
        tgt_name: Option<TargetName>,
    }
    /// A namespace.
    pub struct Namespace {
        /// Identifier; the lowest free one when not given.
        nsid: Option<u32>,
        /// Device: name, alias or UUID.
        bdev_name: String,
        /// 16-byte identifier; the UUID when not given.
        nguid: Option<Hex<16>>,
        /// 8-byte identifier.
        eui64: Option<Hex<8>>,
        /// UUID; the device's when not given.
        uuid: Option<Uuid>,
        /// ANA group; the namespace's identifier when not given.
        anagrpid: Option<u32>,
        /// File that keeps reservations and write protection over a power loss.
        ptpl_file: Option<String>,
        /// Hide from every host until `nvmf_ns_add_host` names it.
        no_auto_visible: bool = false,
        /// No effect: there is no metadata.
        hide_metadata: Option<bool>,
    }
    /// `nvmf_subsystem_add_ns`.
    pub struct AddNs {
        /// Name of the subsystem.
        nqn: String,
        /// What to add.
        namespace: Namespace,
        /// Target.
        tgt_name: Option<TargetName>,
    }
    /// `nvmf_subsystem_remove_ns`.
    pub struct RemoveNs {
        /// Name of the subsystem.
        nqn: String,
        /// Namespace.
        nsid: u32,
        /// Target.
        tgt_name: Option<TargetName>,
    }
    /// `nvmf_ns_add_host`, `nvmf_ns_remove_host`.
    pub struct NsHost {
        /// Name of the subsystem.
        nqn: String,
        /// Namespace.
        nsid: u32,
        /// Name of the host.
        host: String,
        /// Target.
        tgt_name: Option<TargetName>,
    }
    /// `nvmf_subsystem_add_host`.
    pub struct AddHost {
        /// Name of the subsystem.
        nqn: String,
        /// Name of the host.
        host: String,
        /// Target.
        tgt_name: Option<TargetName>,
        /// Key of the keyring: the host has to authenticate with it (DH-HMAC-CHAP).
        dhchap_key: Option<String>,
        /// Key of the keyring that the controller authenticates with where the host asks.
        dhchap_ctrlr_key: Option<String>,
        /// Key of the keyring for TLS (`NVMeTLSkey-1:...`): the host connects with TLS, at listeners with `secure_channel` or `secure_concatenation`, and only there.
        psk: Option<String>,
    }
    /// `nvmf_subsystem_set_keys`.
    pub struct SetKeys {
        /// Name of the subsystem.
        nqn: String,
        /// Name of the host.
        host: String,
        /// Target.
        tgt_name: Option<TargetName>,
        /// Key of the keyring; the host need not authenticate any more when not given.
        dhchap_key: Option<String>,
        /// Key of the keyring for the controller's side.
        dhchap_ctrlr_key: Option<String>,
    }
    /// `nvmf_subsystem_remove_host`.
    pub struct RemoveHost {
        /// Name of the subsystem.
        nqn: String,
        /// Name of the host.
        host: String,
        /// Target.
        tgt_name: Option<TargetName>,
        /// No effect.
        timeout_ms: Option<u64>,
    }
    /// `nvmf_subsystem_allow_any_host`.
    pub struct AllowAnyHost {
        /// Name of the subsystem.
        nqn: String,
        /// Any host, or only those of the list.
        allow_any_host: bool,
        /// Target.
        tgt_name: Option<TargetName>,
    }
    /// `nvmf_discovery_add_referral`, `nvmf_discovery_remove_referral`.
    pub struct ReferralParams {
        /// Where the other discovery service is.
        address: Address,
        /// Target.
        tgt_name: Option<TargetName>,
        /// It needs TLS.
        secure_channel: bool = false,
        /// Its name; the well-known discovery NQN when not given.
        subnqn: Option<String>,
    }
    /// `nvmf_get_stats`, `nvmf_discovery_get_referrals`.
    pub struct OfTarget {
        /// Target.
        tgt_name: Option<TargetName>,
    }
}
object_params!(Address, Namespace);

impl From<TargetError> for RpcError {
    fn from(e: TargetError) -> RpcError {
        RpcError::new(e.code().into(), e.to_string())
    }
}

const TRUE: Value = Value::Bool(true);

pub fn methods() -> Vec<Method> {
    vec![
        Method::new("nvmf_set_config", "Options of the target.", set_config).when(When::Any),
        Method::new("nvmf_set_max_subsystems", "Limits the number of subsystems.", |c, p: MaxSubsystems| {
            remember(c, "nvmf_set_max_subsystems", json!({"max_subsystems": p.max_subsystems}))
        })
        .when(When::Any),
        Method::new("nvmf_set_crdt", "Command retry delays that controllers report.", |c, p: Crdt| {
            remember(c, "nvmf_set_crdt", json!({"crdt1": p.crdt1, "crdt2": p.crdt2, "crdt3": p.crdt3}))
        })
        .when(When::Any),
        Method::new(
            "nvmf_create_transport",
            "Creates the transport; TCP is the only type.",
            create_transport,
        ),
        Method::new("nvmf_get_transports", "Transports with their parameters.", get_transports),
        Method::new("nvmf_create_subsystem", "Creates a subsystem.", create_subsystem),
        Method::new(
            "nvmf_delete_subsystem",
            "Ends a subsystem's controllers and deletes it.",
            |c, p: Subsystem| {
                c.target()?.delete_subsystem(&p.nqn)?;
                Ok(TRUE)
            },
        ),
        Method::new("nvmf_get_subsystems", "Subsystems, the discovery subsystem first.", get_subsystems),
        Method::new("nvmf_subsystem_add_ns", "Adds a device as a namespace. Replies its identifier.", add_ns),
        Method::new("nvmf_subsystem_remove_ns", "Takes a namespace out.", |c, p: RemoveNs| {
            c.target()?.remove_ns(&p.nqn, p.nsid)?;
            Ok(TRUE)
        }),
        Method::new(
            "nvmf_ns_add_host",
            "Shows a namespace that was added with `no_auto_visible` to a host.",
            |c, p: NsHost| {
                let all = c.target()?.subsystems();
                let mut of = all.iter().filter(|s| s.options.nqn == p.nqn).flat_map(|s| &s.namespaces);
                let ns = of.find(|n| n.nsid == p.nsid);
                let _door = ns.and_then(|n| c.luks.hosts_change(&n.bdev_name));
                c.target()?.set_ns_visible(&p.nqn, p.nsid, &p.host, true)?;
                Ok(TRUE)
            },
        ),
        Method::new(
            "nvmf_ns_remove_host",
            "Hides a namespace that was added with `no_auto_visible` from a host.",
            |c, p: NsHost| {
                c.target()?.set_ns_visible(&p.nqn, p.nsid, &p.host, false)?;
                Ok(TRUE)
            },
        ),
        Method::new(
            "nvmf_subsystem_add_listener",
            "Makes a subsystem reachable at an address.",
            add_listener,
        ),
        Method::new(
            "nvmf_subsystem_remove_listener",
            "Ends a listener and its connections.",
            |c, p: RemoveListener| {
                c.target()?.remove_listener(nqn(&p.nqn), &p.listen_address.parse()?)?;
                Ok(TRUE)
            },
        ),
        Method::new(
            "nvmf_subsystem_listener_set_ana_state",
            "Sets the ANA state behind a listener.",
            |c, p: SetAna| {
                c.target()?.set_ana_state(
                    &p.nqn,
                    &p.listen_address.parse()?,
                    p.ana_state.state(),
                    p.anagrpid,
                )?;
                Ok(TRUE)
            },
        ),
        Method::new(
            "nvmf_subsystem_set_ns_ana_group",
            "Moves a namespace to another ANA group.",
            |c, p: SetNsAna| {
                c.target()?.set_ns_ana_group(&p.nqn, p.nsid, p.anagrpid)?;
                Ok(TRUE)
            },
        ),
        Method::new("nvmf_subsystem_get_listeners", "Listeners of a subsystem.", get_listeners),
        Method::new(
            "nvmf_subsystem_get_controllers",
            "Controllers of a subsystem. Ours: counters, and `keep_alive_age_ms`, null without a keep-alive timer.",
            get_controllers,
        ),
        Method::new(
            "nvmf_subsystem_get_qpairs",
            "Queues of a subsystem's controllers. With TLS, `send` and `receive` of `tls` say who makes and who opens its records: \"kernel\" or \"library\".",
            get_qpairs,
        ),
        Method::new("nvmf_subsystem_add_host", "Lets a host connect.", |c, p: AddHost| {
            let access = HostAccess {
                dhchap: secret(c, "dhchap_key", p.dhchap_key)?,
                dhchap_ctrlr: secret(c, "dhchap_ctrlr_key", p.dhchap_ctrlr_key)?,
                psk: ring_key(c, "psk", p.psk, Psk::parse)?,
            };
            c.target()?.add_host(nqn(&p.nqn), &p.host, access)?;
            Ok(TRUE)
        }),
        Method::new(
            "nvmf_subsystem_set_keys",
            "Changes a host's DH-HMAC-CHAP keys (re-key). They count from its next authentication on; connections stay.",
            |c, p: SetKeys| {
                let host = secret(c, "dhchap_key", p.dhchap_key)?;
                let ctrlr = secret(c, "dhchap_ctrlr_key", p.dhchap_ctrlr_key)?;
                c.target()?.set_keys(&p.nqn, &p.host, host, ctrlr)?;
                Ok(TRUE)
            },
        ),
        Method::new(
            "nvmf_subsystem_remove_host",
            "Takes a host out of the list and ends its connections.",
            |c, p: RemoveHost| {
                c.target()?.remove_host(nqn(&p.nqn), &p.host)?;
                Ok(TRUE)
            },
        ),
        Method::new(
            "nvmf_subsystem_allow_any_host",
            "Lets any host connect, or only those of the list.",
            |c, p: AllowAnyHost| {
                c.target()?.allow_any_host(&p.nqn, p.allow_any_host)?;
                Ok(TRUE)
            },
        ),
        Method::new(
            "nvmf_get_stats",
            "What each reactor does for hosts; ours: connections, and how many made room for others or were refused.",
            get_stats,
        ),
        Method::new(
            "nvmf_discovery_add_referral",
            "Names another discovery service in the discovery log.",
            |c, p: ReferralParams| {
                c.target()?.add_referral(p.referral()?)?;
                Ok(TRUE)
            },
        ),
        Method::new(
            "nvmf_discovery_remove_referral",
            "Takes a referral out of the discovery log.",
            |c, p: ReferralParams| {
                let r = p.referral()?;
                c.target()?.remove_referral(&r.addr, &r.subnqn)?;
                Ok(TRUE)
            },
        ),
        Method::new("nvmf_discovery_get_referrals", "Referrals of the discovery log.", |c, _: OfTarget| {
            Ok(c.target()?.referrals().iter().map(referral).collect())
        }),
    ]
}

impl ReferralParams {
    fn referral(&self) -> Result<Referral, RpcError> {
        let subnqn = self.subnqn.clone().unwrap_or_else(|| DISCOVERY.into());
        Ok(Referral { addr: self.address.parse()?, subnqn, secure_channel: self.secure_channel })
    }
}

fn referral(r: &Referral) -> Value {
    json!({"address": address(&r.addr), "secure_channel": r.secure_channel, "subnqn": r.subnqn})
}

/// A DH-HMAC-CHAP secret of the keyring, read from its file now.
pub fn secret(c: &Control, param: &str, name: Option<String>) -> Result<Option<Named<Secret>>, RpcError> {
    ring_key(c, param, name, Secret::parse)
}

/// A key of the keyring, read from its file now.
pub fn ring_key<T, E: std::fmt::Display>(
    c: &Control,
    param: &str,
    name: Option<String>,
    parse: impl Fn(&str) -> Result<T, E>,
) -> Result<Option<Named<T>>, RpcError> {
    let Some(name) = name else { return Ok(None) };
    let text = c.ring.read(&name)?;
    let key =
        parse(&text).map_err(|e| RpcError::params(format!("{param}: key \"{name}\" of the keyring: {e}")))?;
    Ok(Some(Named { name, key }))
}

fn nqn(name: &str) -> &str {
    if name == "discovery" { DISCOVERY } else { name }
}

impl Ana {
    fn state(self) -> AnaState {
        match self {
            Ana::Optimized => AnaState::Optimized,
            Ana::NonOptimized => AnaState::NonOptimized,
            Ana::Inaccessible => AnaState::Inaccessible,
        }
    }
}

fn ana_word(s: AnaState) -> &'static str {
    match s {
        AnaState::Optimized => "optimized",
        AnaState::NonOptimized => "non_optimized",
        _ => "inaccessible",
    }
}

impl Address {
    fn parse(&self) -> Result<ListenAddr, RpcError> {
        let port =
            self.trsvcid.as_deref().ok_or_else(|| RpcError::params("trsvcid: missing; TCP needs a port"))?;
        Ok(ListenAddr::parse(&self.trtype, self.adrfam.as_deref(), &self.traddr, port)?)
    }
}

fn address(a: &ListenAddr) -> Value {
    json!({"trtype": "TCP", "adrfam": a.adrfam(), "traddr": a.ip.to_string(), "trsvcid": a.port.to_string()})
}

/// Stores options of the target and applies them if it runs.
fn remember(c: &Control, method: &'static str, params: Value) -> RpcResult {
    let fresh = object(params);
    if let Ok(t) = c.target() {
        apply(c.config.fips, t, method, &fresh)?;
    }
    lock(&c.options).remember("nvmf", method, fresh);
    Ok(TRUE)
}

/// Applies what was set before the target existed.
pub fn apply_options(c: &Control, t: &Target) -> Result<(), RpcError> {
    let o = lock(&c.options);
    t.set_kernel_tls(o.kernel_tls());
    for method in ["nvmf_set_config", "nvmf_set_max_subsystems", "nvmf_set_crdt"] {
        if let Some(params) = o.get(method) {
            apply(c.config.fips, t, method, params)?;
        }
    }
    Ok(())
}

fn apply(mode: FipsMode, t: &Target, method: &str, params: &Map<String, Value>) -> Result<(), RpcError> {
    let number = |k: &str| params.get(k).and_then(Value::as_u64).unwrap_or(0);
    match method {
        "nvmf_set_max_subsystems" => t.set_max_subsystems(number("max_subsystems") as u32)?,
        "nvmf_set_crdt" => {
            t.set_crdt([number("crdt1") as u16, number("crdt2") as u16, number("crdt3") as u16])
        }
        _ => {
            if let Some(f) =
                params.get("discovery_filter").and_then(Value::as_str).and_then(DiscoveryFilter::parse)
            {
                t.set_config(f);
            }
            t.set_auth_offer(offer(mode, params)?)?;
        }
    }
    Ok(())
}

/// What DH-HMAC-CHAP may use: as given, or everything.
pub fn offer(mode: FipsMode, params: &Map<String, Value>) -> Result<Offer, RpcError> {
    fn list<T: Copy>(
        params: &Map<String, Value>,
        key: &str,
        all: Vec<T>,
        parse: fn(&str) -> Option<T>,
    ) -> Result<Vec<T>, RpcError> {
        let Some(names) = params.get(key).and_then(Value::as_array) else { return Ok(all) };
        let one = |v: &Value| {
            v.as_str().and_then(parse).ok_or_else(|| RpcError::params(format!("{key}: {v} is not known")))
        };
        let list: Vec<T> = names.iter().map(one).collect::<Result<_, _>>()?;
        if list.is_empty() {
            return Err(RpcError::params(format!("{key}: at least one is needed")));
        }
        Ok(list)
    }
    let all = mode.offer();
    let groups = list(params, "dhchap_dhgroups", all.groups, DhGroup::from_name)?;
    if let Some(group) = groups.iter().find(|group| !mode.allows(**group)) {
        let (group, mode) = (group.name(), mode.name());
        return Err(RpcError::params(format!(
            "dhchap_dhgroups: \"{group}\" is not possible with --fips-mode {mode}: the module has no such key agreement; \"null\" is, and TLS \
             keeps a connection secret"
        )));
    }
    Ok(Offer { hashes: list(params, "dhchap_digests", all.hashes, HashId::from_name)?, groups })
}

/// Whether secure channel concatenation can work: it needs a group for its key.
pub fn check_concatenation(mode: FipsMode) -> Result<(), RpcError> {
    if mode.allows(DhGroup::Ffdhe2048) {
        return Ok(());
    }
    Err(RpcError::params(format!(
        "secure_concatenation: true is not possible with --fips-mode {}: the module has no such key agreement; TLS with a psk keeps a \
         connection secret",
        mode.name()
    )))
}

fn set_config(c: &Control, p: SetConfig) -> RpcResult {
    let filter = p.discovery_filter.or(p.discovery_filters.map(|f| f.join(",")));
    if let Some(f) = &filter
        && DiscoveryFilter::parse(f).is_none()
    {
        let what = "\"match_any\", or a list of \"transport\", \"address\" and \"svcid\" is needed";
        return Err(RpcError::params(format!("discovery_filter: \"{f}\" was given; {what}")));
    }
    let given = json!({"discovery_filter": filter, "dup_host_policy": p.dup_host_policy.map(DupHostPolicy::word),
        "dhchap_digests": p.dhchap_digests, "dhchap_dhgroups": p.dhchap_dhgroups});
    offer(c.config.fips, &object(given.clone()))?;
    remember(c, "nvmf_set_config", given)
}

fn create_transport(c: &Control, p: CreateTransport) -> RpcResult {
    let options = TransportOptions {
        max_queue_depth: p.max_queue_depth,
        max_io_qpairs_per_ctrlr: p.max_io_qpairs_per_ctrlr,
        in_capsule_data_size: p.in_capsule_data_size,
        max_io_size: p.max_io_size,
        io_unit_size: p.io_unit_size,
        max_aq_depth: p.max_aq_depth,
        num_shared_buffers: p.num_shared_buffers,
        buf_cache_size: p.buf_cache_size,
        dif_insert_or_strip: p.dif_insert_or_strip,
        zcopy: p.zcopy,
        c2h_success: p.c2h_success,
        sock_priority: p.sock_priority,
        ack_timeout: p.ack_timeout,
        abort_timeout_sec: p.abort_timeout_sec,
        kas: p.kas,
        min_kato: p.min_kato,
        connect_timeout_ms: p.connect_timeout_ms,
        auth_timeout_ms: p.auth_timeout_ms,
        r2t_timeout_ms: p.r2t_timeout_ms,
        max_connections: p.max_connections,
        max_connections_per_host: p.max_connections_per_host,
        max_buffer_mib: p.max_buffer_mib,
        max_buffer_mib_per_host: p.max_buffer_mib_per_host,
    };
    c.target()?.create_transport(&p.trtype, options)?;
    Ok(TRUE)
}

fn create_subsystem(c: &Control, p: CreateSubsystem) -> RpcResult {
    let d = SubsystemOptions::new(p.nqn);
    c.target()?.create_subsystem(SubsystemOptions {
        serial_number: p.serial_number.unwrap_or_else(|| d.serial_number.clone()),
        model_number: p.model_number.unwrap_or_else(|| d.model_number.clone()),
        allow_any_host: p.allow_any_host,
        ana_reporting: p.ana_reporting,
        max_namespaces: p.max_namespaces,
        min_cntlid: p.min_cntlid,
        max_cntlid: p.max_cntlid,
        ..d
    })?;
    Ok(TRUE)
}

fn add_ns(c: &Control, p: AddNs) -> RpcResult {
    let n = p.namespace;
    let options = NsOptions {
        bdev_name: n.bdev_name,
        nsid: n.nsid.filter(|n| *n != 0),
        nguid: n.nguid.map(|h| h.0),
        eui64: n.eui64.map(|h| h.0),
        uuid: n.uuid,
        anagrpid: n.anagrpid,
        ptpl_file: n.ptpl_file,
        no_auto_visible: n.no_auto_visible,
    };
    // By its own name, whichever of its names was given.
    let device = c.registry.get(&options.bdev_name).map(|device| device.name().to_owned());
    let _door = device.ok().and_then(|name| c.luks.hosts_change(&name));
    Ok(json!(c.target()?.add_ns(&p.nqn, &options)?))
}

fn add_listener(c: &Control, p: AddListener) -> RpcResult {
    let t = c.target()?;
    let (name, addr) = (nqn(&p.nqn), p.listen_address.parse()?);
    let security = match (p.secure_channel, p.secure_concatenation) {
        (false, false) => PortSecurity::None,
        (true, false) => PortSecurity::Tls,
        (false, true) => {
            check_concatenation(c.config.fips)?;
            PortSecurity::Concatenation
        }
        (true, true) => {
            let why = "secure_concatenation: true was given, and secure_channel, which lets nobody in without TLS; choose one";
            return Err(RpcError::params(why));
        }
    };
    let bound = t.add_secure_listener(name, &addr, security)?;
    if let Some(state) = p.ana_state.filter(|s| *s != Ana::Optimized)
        && let Err(e) = t.set_ana_state(name, &bound, state.state(), None)
    {
        // A half-made listener would be worse than none.
        t.remove_listener(name, &bound)?;
        return Err(e.into());
    }
    Ok(TRUE)
}

/// The calls that make the target's state again.
pub fn config(c: &Control) -> Vec<(String, Value)> {
    let mut calls = lock(&c.options).calls("nvmf");
    let Ok(t) = c.target() else { return calls };
    let mut add = |m: &str, p: Value| calls.push((m.into(), p));
    for (trtype, o) in t.transports() {
        add("nvmf_create_transport", transport(trtype, &o));
    }
    for r in t.referrals() {
        add("nvmf_discovery_add_referral", referral(&r));
    }
    for s in t.subsystems() {
        let (o, name) = (&s.options, &s.options.nqn);
        if !s.discovery {
            add(
                "nvmf_create_subsystem",
                json!({
                    "nqn": name, "allow_any_host": o.allow_any_host, "serial_number": o.serial_number,
                    "model_number": o.model_number, "max_namespaces": o.max_namespaces,
                    "min_cntlid": o.min_cntlid, "max_cntlid": o.max_cntlid, "ana_reporting": o.ana_reporting,
                }),
            );
        }
        for h in &s.hosts {
            let mut p = object(host(h));
            p.insert("nqn".into(), json!(name));
            p.insert("host".into(), json!(h.nqn));
            add("nvmf_subsystem_add_host", Value::Object(p));
        }
        for n in &s.namespaces {
            let mut ns = json!({"nsid": n.nsid, "bdev_name": n.bdev_name, "nguid": hex(&n.nguid),
                "uuid": n.uuid.to_string(), "anagrpid": n.anagrpid});
            if n.eui64 != [0; 8] {
                ns["eui64"] = hex(&n.eui64).into();
            }
            if let Some(file) = &n.ptpl_file {
                ns["ptpl_file"] = file.as_str().into();
            }
            if n.visible_to.is_some() {
                ns["no_auto_visible"] = true.into();
            }
            add("nvmf_subsystem_add_ns", json!({"nqn": name, "namespace": ns}));
            for h in n.visible_to.iter().flatten() {
                add("nvmf_ns_add_host", json!({"nqn": name, "nsid": n.nsid, "host": h}));
            }
        }
        for l in &s.listeners {
            let mut p = json!({"nqn": name, "listen_address": address(&l.addr)});
            match l.security {
                PortSecurity::None => {}
                PortSecurity::Tls => p["secure_channel"] = true.into(),
                PortSecurity::Concatenation => p["secure_concatenation"] = true.into(),
            }
            add("nvmf_subsystem_add_listener", p);
            for (group, state) in l.ana_states.iter().filter(|(_, s)| *s != AnaState::Optimized) {
                let p = json!({"nqn": name, "listen_address": address(&l.addr), "ana_state": ana_word(*state),
                    "anagrpid": group});
                add("nvmf_subsystem_listener_set_ana_state", p);
            }
        }
    }
    calls
}
