//! What the target says of itself at one moment.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cryptfold_bdev::{Class, ClassTotals, LatencyCounts};
use serde_json::{Value, json};

/// How far a target is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// Not initialised.
    #[default]
    Starting,
    /// In service.
    Running,
    /// It drains.
    Ending,
}

impl State {
    /// For people and programs.
    pub fn word(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Running => "running",
            State::Ending => "ending",
        }
    }
}

/// A device.
#[derive(Clone, Debug, Default)]
pub struct Device {
    /// Name.
    pub name: String,
    /// Another name, if it has one: POOL/VOLUME of a volume.
    pub alias: String,
    /// Identity: another device may come under the same name.
    pub uuid: String,
    /// What kind of device it is.
    pub product: String,
    /// Size.
    pub size_bytes: u64,
    /// The device that it stands on, if that is one.
    pub base: Option<String>,
    /// Of a device with a host's key: what may be done with it.
    pub key_access: Option<String>,
    /// By [`Class`].
    pub totals: [ClassTotals; Class::ALL.len()],
    /// By [`Class`], since the device was made.
    pub latencies: [LatencyCounts; Class::ALL.len()],
    /// Operations that failed, by status.
    pub errors: Vec<(String, u64)>,
}

/// Where samples come from: the control plane. Blocks as long as that takes.
pub trait Source: Send + Sync {
    /// The result of a method without side effects, as its documentation has it; else why there is none.
    ///
    /// # Errors
    /// The method's message.
    fn get(&self, method: &str, params: Option<&Value>) -> Result<Value, String>;
    /// How far it is, and since when it runs.
    fn state(&self) -> (State, Duration);
    /// All devices.
    fn devices(&self) -> Vec<Device>;
    /// The newest events first, each with `time`, `severity`, `text`.
    fn events(&self) -> Vec<Value>;
}

/// Results of methods, null where one gave none; and what the source tells besides.
#[derive(Debug)]
pub struct Sample {
    /// For differences.
    pub at: Instant,
    /// Seconds since 1970.
    pub time: f64,
    /// Since the program's start.
    pub uptime: Duration,
    /// How far it is.
    pub state: State,
    /// `spdk_get_version`.
    pub version: Value,
    /// `framework_get_reactors`.
    pub reactors: Value,
    /// All devices.
    pub devices: Vec<Device>,
    /// `bdev_lvol_get_lvstores`.
    pub pools: Value,
    /// `bdev_lvol_get_lvols`.
    pub volumes: Value,
    /// `cryptfold_pool_get_domains`, by pool.
    pub domains: Vec<(String, Value)>,
    /// `cryptfold_encryption_status`.
    pub encryption: Value,
    /// `bdev_luks_get_status`.
    pub luks: Value,
    /// `nvmf_get_stats`.
    pub nvmf: Value,
    /// `nvmf_get_subsystems`.
    pub subsystems: Value,
    /// `nvmf_subsystem_get_controllers`, by the NQN of their subsystem.
    pub controllers: Vec<(String, Value)>,
    /// `nvmf_subsystem_get_qpairs`, by the NQN of their subsystem.
    pub queues: Vec<(String, Value)>,
    /// `keyring_kmip_get_keys`.
    pub keys: Value,
    /// `keyring_kmip_get_servers`.
    pub key_servers: Value,
    /// The newest events first.
    pub events: Vec<Value>,
}

impl Default for Sample {
    fn default() -> Sample {
        Sample {
            at: Instant::now(),
            time: 0.0,
            uptime: Duration::ZERO,
            state: State::Starting,
            version: Value::Null,
            reactors: Value::Null,
            devices: Vec::new(),
            pools: Value::Null,
            volumes: Value::Null,
            domains: Vec::new(),
            encryption: Value::Null,
            luks: Value::Null,
            nvmf: Value::Null,
            subsystems: Value::Null,
            controllers: Vec::new(),
            queues: Vec::new(),
            keys: Value::Null,
            key_servers: Value::Null,
            events: Vec::new(),
        }
    }
}

impl Sample {
    /// Now.
    pub fn take(source: &dyn Source) -> Sample {
        let get_with = |method: &str, params: Option<&Value>| {
            source.get(method, params).unwrap_or_else(|error| {
                tracing::debug!(method, error, "no sample");
                Value::Null
            })
        };
        let get = |method: &str| get_with(method, None);
        let of_each = |all: &Value, key: &str, method: &str, param: &str| -> Vec<(String, Value)> {
            let one = |v: &Value| (text(&v[key]).to_owned(), get_with(method, Some(&json!({param: v[key]}))));
            // A locked pool may have the name of one that is open.
            list(all).iter().filter(|v| v["locked"].is_null()).map(one).collect()
        };
        let (state, uptime) = source.state();
        let subsystems = get("nvmf_get_subsystems");
        // What rates are of, right after each other: they have one moment. What takes long follows.
        let pools = get("bdev_lvol_get_lvstores");
        let at = Instant::now();
        let devices = source.devices();
        let controllers = of_each(&subsystems, "nqn", "nvmf_subsystem_get_controllers", "nqn");
        Sample {
            at,
            devices,
            controllers,
            time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64()),
            uptime,
            state,
            version: get("spdk_get_version"),
            reactors: get("framework_get_reactors"),
            domains: of_each(&pools, "name", "cryptfold_pool_get_domains", "lvs_name"),
            volumes: get("bdev_lvol_get_lvols"),
            encryption: get("cryptfold_encryption_status"),
            luks: get("bdev_luks_get_status"),
            nvmf: get("nvmf_get_stats"),
            queues: of_each(&subsystems, "nqn", "nvmf_subsystem_get_qpairs", "nqn"),
            keys: get("keyring_kmip_get_keys"),
            key_servers: get("keyring_kmip_get_servers"),
            events: source.events(),
            pools,
            subsystems,
        }
    }

    /// Finds devices.
    pub fn names(&self) -> Names<'_> {
        // Names go before aliases, and of two that are the same the first.
        let aliases = self.devices.iter().rev().filter(|d| !d.alias.is_empty());
        let aliases = aliases.map(|d| (d.alias.as_str(), d));
        Names(aliases.chain(self.devices.iter().rev().map(|d| (d.name.as_str(), d))).collect())
    }

    /// The devices of namespaces, with "NQN/NSID" of each.
    pub fn exports(&self) -> Vec<(&str, String)> {
        let of = |s: &'_ Value, n: &'_ Value| format!("{}/{}", text(&s["nqn"]), n["nsid"]);
        let all = list(&self.subsystems).iter();
        all.flat_map(|s| list(&s["namespaces"]).iter().map(move |n| (text(&n["bdev_name"]), of(s, n))))
            .collect()
    }
}

/// The devices of a sample by name and alias.
#[derive(Debug)]
pub struct Names<'a>(HashMap<&'a str, &'a Device>);

impl<'a> Names<'a> {
    /// By name or alias.
    pub fn device(&self, name: &str) -> Option<&'a Device> {
        self.0.get(name).copied()
    }

    /// The device and those that it stands on, itself first.
    pub fn stack(&self, device: &str) -> Vec<&'a Device> {
        let mut all: Vec<&Device> = Vec::new();
        let mut next = self.device(device);
        // A stack has an end; names that lead in a circle are no reason to hang, or to tell a device twice.
        while let Some(d) =
            next.filter(|d| all.len() < 32 && !all.iter().any(|known| std::ptr::eq(*known, *d)))
        {
            all.push(d);
            next = d.base.as_deref().and_then(|base| self.device(base));
        }
        all
    }
}

/// The elements of a list; none of anything else.
pub fn list(v: &Value) -> &[Value] {
    v.as_array().map_or(&[], Vec::as_slice)
}

/// A string; nothing of anything else.
pub fn text(v: &Value) -> &str {
    v.as_str().unwrap_or("")
}
