//! `cryptfold rpc`, `pool` and `volume`: thin wrappers over the socket.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use cryptfold_control::client::{Client, ClientError};
use cryptfold_control::jsonrpc::RpcError;
use cryptfold_control::keys::default_key_dir;
use cryptfold_control::offline::{self, OfflineCheck};
use cryptfold_control::{Control, ControlConfig};
use serde_json::{Map, Value, json};

use crate::encryption::Passwords;
use crate::export::{ExportArgs, export};
use crate::shell::confirm;
use crate::status::{self, list};
use crate::work::{Background, background, check_text, patiently};
use crate::{Failure, SocketArgs, size};

#[derive(Args)]
pub struct RpcArgs {
    /// Method, for example bdev_get_bdevs; rpc_get_methods lists them.
    #[arg(required_unless_present = "doc")]
    method: Option<String>,
    /// Its parameters, a JSON object.
    params: Option<String>,
    #[command(flatten)]
    socket: SocketArgs,
    /// Print the documentation of all methods (Markdown) and end.
    #[arg(long)]
    doc: bool,
    /// Seconds to wait for the answer.
    #[arg(short = 't', long, default_value_t = 600)]
    timeout: u64,
}

/// Longest that the small commands wait for an answer.
const PATIENCE: Duration = Duration::from_secs(600);
/// Longer than any audit takes.
const AUDIT: Duration = Duration::from_secs(30 * 24 * 3600);

pub fn connect(socket: &SocketArgs) -> Result<Client, Failure> {
    Ok(Client::connect(&socket.socket, PATIENCE).map_err(|e| e.to_string())?)
}

pub fn call(client: &mut Client, method: &str, params: Option<Value>) -> Result<Value, Failure> {
    patiently(method, || client.call(method, params)).map_err(|e| match &e {
        ClientError::Rpc { error, .. } if error.code == -126 => Failure::Key(e.to_string()),
        ClientError::Rpc { error, .. } => match way_out(method, error) {
            Some(way) => Failure::Failed(format!("{e}; {way}")),
            None => Failure::Failed(e.to_string()),
        },
        _ => Failure::Failed(e.to_string()),
    })
}

/// What shows what there is instead, or is to be done first.
fn way_out(method: &str, error: &RpcError) -> Option<&'static str> {
    let volume = method.starts_with("bdev_lvol_");
    match error.code {
        RpcError::ENODEV if error.message.starts_with("pool ") => {
            Some("`cryptfold pool list` shows the pools")
        }
        RpcError::ENODEV if error.message.starts_with("bdev ") => {
            Some("`cryptfold rpc bdev_get_bdevs` shows the devices")
        }
        RpcError::ENODEV if volume => Some("`cryptfold volume list` shows the volumes"),
        RpcError::EBUSY if error.message.contains("claimed") => Some("`cryptfold status` shows what uses it"),
        RpcError::ENOSPC => Some("`cryptfold pool list` shows the space"),
        RpcError::METHOD_NOT_FOUND if !error.message.contains("did you mean") => {
            Some("`cryptfold rpc rpc_get_methods` shows the methods")
        }
        _ => None,
    }
}

pub fn print(v: &Value) {
    match v {
        Value::String(s) => println!("{s}"),
        v => println!("{v:#}"),
    }
}

pub fn run(args: RpcArgs) -> Result<(), Failure> {
    if args.doc {
        print!("{}", Control::new(ControlConfig::default()).table().markdown());
        return Ok(());
    }
    let method = args.method.unwrap_or_default();
    let params = match &args.params {
        None => None,
        Some(text) => match serde_json::from_str(text) {
            Ok(v @ (Value::Object(_) | Value::Array(_))) => Some(v),
            Ok(_) => {
                let what =
                    format!("parameters of {method}: a JSON object is needed, like '{{\"name\": \"x\"}}'");
                return Err(Failure::Usage(what));
            }
            Err(e) => return Err(Failure::Usage(format!("parameters of {method} are not JSON: {e}"))),
        },
    };
    let limit = Duration::from_secs(args.timeout.max(1));
    let mut client = Client::connect(&args.socket.socket, limit).map_err(|e| e.to_string())?;
    print(&call(&mut client, &method, params)?);
    Ok(())
}

#[derive(Subcommand)]
pub enum PoolCommand {
    /// Show all pools.
    List {
        #[command(flatten)]
        socket: SocketArgs,
        /// JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Create a pool on a block device of the target.
    Create {
        /// Name of the block device (see cryptfold rpc bdev_get_bdevs).
        bdev: String,
        /// Name of the pool.
        name: String,
        /// Key file: 32 bytes, raw or hexadecimal, mode 0600 [default: NAME.key in the target's key directory].
        #[arg(long, value_name = "FILE")]
        key_file: Option<String>,
        /// Make the key file, with a random key.
        #[arg(long)]
        create_key: bool,
        /// A password opens the pool: from the terminal or standard input. It starts locked.
        #[arg(long, conflicts_with_all = ["key_file", "create_key", "password_file", "kms_server"])]
        password: bool,
        /// File of the target's machine with a password (mode 0600), which opens the pool at each start, too.
        #[arg(long, value_name = "FILE", conflicts_with_all = ["key_file", "create_key", "kms_server"])]
        password_file: Option<String>,
        /// Key server that holds the pool's key (see the method keyring_kmip_add_server).
        #[arg(long, value_name = "NAME", conflicts_with_all = ["key_file", "create_key"])]
        kms_server: Option<String>,
        /// Unique identifier of the key there; a new one is made when not given.
        #[arg(long, value_name = "ID", requires = "kms_server")]
        kms_object: Option<String>,
        /// Also on a device that carries something.
        #[arg(long)]
        force: bool,
        /// RAM for indexes and caches.
        #[arg(long, value_name = "SIZE", value_parser = size::parse)]
        memory_budget: Option<u64>,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Open the pool that a block device of the target carries; prints its UUID.
    Open {
        /// Name of the block device.
        bdev: String,
        /// Key file [default: all keys at hand are tried].
        #[arg(long, value_name = "FILE")]
        key_file: Option<String>,
        /// File of the target's machine with a password that opens it.
        #[arg(long, value_name = "FILE")]
        password_file: Option<String>,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Close a pool: everything is made durable, its device is let go.
    Close {
        /// Name of the pool.
        name: String,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Delete a pool with all its volumes. The device forgets it; its data is not overwritten (see encryption erase).
    Delete {
        /// Name of the pool.
        name: String,
        /// Do not ask.
        #[arg(short = 'y', long)]
        yes: bool,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Read and verify all data of a pool in the background; prints how that stands.
    Scrub {
        /// Name of the pool.
        name: String,
        /// What to do.
        #[arg(value_enum, default_value_t = ScrubAction::Start)]
        action: ScrubAction,
        /// MB (10^6) of stored data per second at most [default: 100].
        #[arg(long, value_name = "MB/S", value_parser = clap::value_parser!(u32).range(1..))]
        rate: Option<u32>,
        /// Wait for its end, with a bar on a terminal; exit code 1 when something is damaged.
        #[arg(long)]
        wait: bool,
        /// JSON instead of text.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Find duplicates that the sampled index of a large pool has missed, in the background; prints how that stands.
    Dedupe {
        /// Name of the pool.
        name: String,
        /// What to do.
        #[arg(value_enum, default_value_t = ScrubAction::Start)]
        action: ScrubAction,
        /// Wait for its end, with a bar on a terminal.
        #[arg(long)]
        wait: bool,
        /// JSON instead of text.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Give a pool the rest of its device, which has become larger. Hosts go on.
    Grow {
        /// Name of the pool.
        name: String,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Check everything that a pool's metadata says; exit code 1 when something is wrong. Of a pool of the running target, hosts'
    /// writes wait until it is done (see scrub).
    Check {
        /// Name of a pool of the running target, or path (with a /) of a file or block device with a pool that no target has open
        /// (then nothing is written to it, unless it is repaired).
        #[arg(value_name = "POOL|DEVICE")]
        name: String,
        /// Also read and verify all stored data.
        #[arg(long)]
        data: bool,
        /// Put right what can be put right without guessing, and check again. Nothing that can be read is lost.
        #[arg(long)]
        repair: bool,
        /// DEVICE: key file of the pool [default: all of the key directory are tried].
        #[arg(long, value_name = "FILE")]
        key_file: Option<PathBuf>,
        /// DEVICE: file with the password of the pool.
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        /// DEVICE: directory of key files [default: as for the target].
        #[arg(long, value_name = "DIR")]
        keys: Option<PathBuf>,
        /// JSON instead of text.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        socket: SocketArgs,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub enum ScrubAction {
    /// Start it; a scrub that runs gets another rate.
    Start,
    /// End it.
    Stop,
    /// Show how it stands.
    Status,
}

impl ScrubAction {
    fn name(self) -> &'static str {
        match self {
            ScrubAction::Start => "start",
            ScrubAction::Stop => "stop",
            ScrubAction::Status => "status",
        }
    }
}

#[derive(Subcommand)]
pub enum VolumeCommand {
    /// Show all volumes.
    List {
        /// Only of this pool.
        pool: Option<String>,
        #[command(flatten)]
        socket: SocketArgs,
        /// JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Create a volume; prints its UUID, and with --export the line that connects a host to it.
    Create {
        /// POOL/VOLUME; the volume's name alone where there is one pool.
        volume: String,
        /// Size that hosts see, for example 10G.
        #[arg(value_parser = size::parse, required_unless_present = "size")]
        bytes: Option<u64>,
        /// The same.
        #[arg(long, value_name = "SIZE", value_parser = size::parse, conflicts_with = "bytes")]
        size: Option<u64>,
        /// Domain: volumes of a domain share data and keys [default: the pool's].
        #[arg(long)]
        domain: Option<String>,
        #[command(flatten)]
        export: ExportArgs,
        /// JSON instead of text.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Take a snapshot of a volume; prints its UUID.
    Snapshot {
        /// POOL/VOLUME or UUID.
        volume: String,
        /// Name of the snapshot.
        name: String,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Make a volume that begins with what a snapshot has; prints its UUID.
    Clone {
        /// POOL/SNAPSHOT or UUID.
        snapshot: String,
        /// Name of the new volume.
        name: String,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Change a volume's size, also while hosts use it. What lies beyond a smaller size is lost.
    Resize {
        /// POOL/VOLUME or UUID.
        volume: String,
        /// New size, for example 20G.
        #[arg(value_parser = size::parse)]
        size: u64,
        /// Do not ask before it is made smaller.
        #[arg(short = 'y', long)]
        yes: bool,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// End all sharing of a volume with snapshots.
    Inflate {
        /// POOL/VOLUME or UUID.
        volume: String,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Delete a volume or snapshot.
    Delete {
        /// POOL/VOLUME or UUID.
        volume: String,
        /// Do not ask.
        #[arg(short = 'y', long)]
        yes: bool,
        #[command(flatten)]
        socket: SocketArgs,
    },
}

/// An object of the members that have a value.
pub fn given(members: Value) -> Value {
    match members {
        Value::Object(o) => Value::Object(o.into_iter().filter(|(_, v)| !v.is_null()).collect::<Map<_, _>>()),
        v => v,
    }
}

pub fn pool(command: PoolCommand) -> Result<(), Failure> {
    match command {
        PoolCommand::List { socket, json } => {
            let pools = call(&mut connect(&socket)?, "bdev_lvol_get_lvstores", None)?;
            if json {
                print(&pools);
            } else {
                status::pools(&pools).print();
            }
        }
        PoolCommand::Create {
            bdev,
            name,
            key_file,
            create_key,
            password,
            password_file,
            kms_server,
            kms_object,
            force,
            memory_budget,
            socket,
        } => {
            let password = match password {
                true => Some(Passwords::default().new_one(None, "New password")?),
                false => None,
            };
            let params = given(json!({
                "bdev_name": bdev, "lvs_name": name, "key_file": key_file.map(absolute).transpose()?,
                "create_key": create_key, "force": force, "memory_budget_mib": memory_budget.map(|b| b >> 20),
                "password": password.as_deref(), "password_file": password_file.map(absolute).transpose()?,
                "kms_server": kms_server, "kms_object": kms_object,
            }));
            print(&call(&mut connect(&socket)?, "bdev_lvol_create_lvstore", Some(params))?);
        }
        PoolCommand::Open { bdev, key_file, password_file, socket } => {
            let params = given(json!({
                "base_bdev_name": bdev, "key_file": key_file.map(absolute).transpose()?,
                "password_file": password_file.map(absolute).transpose()?,
            }));
            print(&call(&mut connect(&socket)?, "cryptfold_pool_open", Some(params))?);
        }
        PoolCommand::Close { name, socket } => {
            call(&mut connect(&socket)?, "cryptfold_pool_close", Some(json!({"lvs_name": name})))?;
        }
        PoolCommand::Delete { name, yes, socket } => {
            let mut client = connect(&socket)?;
            confirm(&format!("delete pool {name} with all its volumes"), yes)?;
            call(&mut client, "bdev_lvol_delete_lvstore", Some(json!({"lvs_name": name})))?;
        }
        PoolCommand::Scrub { name, action, rate, wait, json, socket } => {
            let params = given(json!({"lvs_name": name, "action": action.name(), "rate_mb_s": rate}));
            background(&mut connect(&socket)?, Background::Scrub, &name, params, wait, json)?;
        }
        PoolCommand::Dedupe { name, action, wait, json, socket } => {
            let params = json!({"lvs_name": name, "action": action.name()});
            background(&mut connect(&socket)?, Background::Dedupe, &name, params, wait, json)?;
        }
        PoolCommand::Grow { name, socket } => {
            call(&mut connect(&socket)?, "bdev_lvol_grow_lvstore", Some(json!({"lvs_name": name})))?;
        }
        PoolCommand::Check { name, data, repair, key_file, password_file, keys, json, socket } => {
            let report = if name.contains('/') {
                let wanted = OfflineCheck {
                    device: name.clone().into(),
                    key_file,
                    password_file,
                    key_dir: keys.unwrap_or_else(default_key_dir),
                    data,
                    repair,
                };
                patiently("checking", || offline::check(&wanted))?
            } else {
                let params = json!({"lvs_name": name, "data": data, "repair": repair});
                // Whoever gave up would leave it going on.
                let mut client = Client::connect(&socket.socket, AUDIT).map_err(|e| e.to_string())?;
                call(&mut client, "cryptfold_pool_check", Some(params))?
            };
            if json {
                print(&report);
            } else {
                print!("{}", check_text(&report));
            }
            if report["clean"] != true {
                let repair =
                    if repair { "" } else { "; --repair puts right what can be put right without guessing" };
                return Err(format!("pool {name} has inconsistencies, listed above{repair}").into());
            }
        }
    }
    Ok(())
}

/// The target may run in another directory.
pub fn absolute(path: String) -> Result<String, Failure> {
    let p = std::path::absolute(&path).map_err(|e| Failure::Usage(format!("{path}: {e}")))?;
    Ok(p.to_string_lossy().into_owned())
}

/// The pool, where there is just one.
fn the_pool(client: &mut Client, volume: &str) -> Result<String, Failure> {
    let pools = call(client, "bdev_lvol_get_lvstores", None)?;
    let names: Vec<&str> = list(&pools).iter().filter_map(|p| p["name"].as_str()).collect();
    match names.as_slice() {
        [one] => Ok((*one).to_owned()),
        [] => Err(Failure::Failed(format!(
            "there is no pool for \"{volume}\"; `cryptfold pool create` makes one"
        ))),
        several => Err(Failure::Usage(format!(
            "\"{volume}\": which pool? POOL/VOLUME is needed, like {}/{volume}; there are {}",
            several[0],
            several.join(", ")
        ))),
    }
}

fn create_volume(client: &mut Client, params: Value, how: &ExportArgs, as_json: bool) -> Result<(), Failure> {
    let names =
        [&params["lvs_name"], &params["lvol_name"]].map(|v| v.as_str().unwrap_or_default().to_owned());
    let made = call(client, "bdev_lvol_create", Some(params))?;
    let uuid = made.as_str().unwrap_or_default();
    let exported = export(client, uuid, &names.join("-"), how);
    if exported.is_err() {
        // It is new and empty: the command can be given again. What failed is what the user has to know.
        let _ = call(client, "bdev_lvol_delete", Some(json!({"name": uuid})));
    }
    let lines = exported?;
    if as_json {
        print(&json!({"uuid": uuid, "name": names.join("/"), "connect": lines}));
    } else {
        print(&made);
        lines.iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}

/// What a volume's size is now.
fn volume_bytes(client: &mut Client, volume: &str) -> Result<u64, Failure> {
    let volumes = call(client, "bdev_lvol_get_lvols", None)?;
    let found = list(&volumes).iter().find(|v| v["alias"] == volume || v["uuid"] == volume);
    let bytes = found.and_then(|v| v["size_bytes"].as_u64());
    bytes.ok_or_else(|| {
        Failure::Failed(format!("there is no volume {volume}; `cryptfold volume list` shows them"))
    })
}

pub fn volume(command: VolumeCommand) -> Result<(), Failure> {
    match command {
        VolumeCommand::List { pool, socket, json } => {
            let params = pool.map(|p| json!({"lvs_name": p}));
            let volumes = call(&mut connect(&socket)?, "bdev_lvol_get_lvols", params)?;
            if json {
                print(&volumes);
            } else {
                status::volumes(&volumes).print();
            }
        }
        VolumeCommand::Create { volume, bytes, size, domain, export, json, socket } => {
            let mut client = connect(&socket)?;
            let (pool, name) = match volume.split_once('/') {
                Some((pool, name)) => (pool.to_owned(), name),
                None => (the_pool(&mut client, &volume)?, volume.as_str()),
            };
            let size = bytes.or(size);
            let params = given(json!({"lvs_name": pool, "lvol_name": name, "size": size, "domain": domain}));
            create_volume(&mut client, params, &export, json)?;
        }
        VolumeCommand::Snapshot { volume, name, socket } => {
            let params = json!({"lvol_name": volume, "snapshot_name": name});
            print(&call(&mut connect(&socket)?, "bdev_lvol_snapshot", Some(params))?);
        }
        VolumeCommand::Clone { snapshot, name, socket } => {
            let params = json!({"snapshot_name": snapshot, "clone_name": name});
            print(&call(&mut connect(&socket)?, "bdev_lvol_clone", Some(params))?);
        }
        VolumeCommand::Resize { volume, size, yes, socket } => {
            let mut client = connect(&socket)?;
            let now = volume_bytes(&mut client, &volume)?;
            if size < now {
                let (now, size) = (size::show(now), size::show(size));
                confirm(
                    &format!("shrink {volume} from {now} to {size}, with the loss of what lies beyond"),
                    yes,
                )?;
            }
            call(&mut client, "bdev_lvol_resize", Some(json!({"name": volume, "size": size})))?;
        }
        VolumeCommand::Inflate { volume, socket } => {
            call(&mut connect(&socket)?, "bdev_lvol_inflate", Some(json!({"name": volume})))?;
        }
        VolumeCommand::Delete { volume, yes, socket } => {
            let mut client = connect(&socket)?;
            confirm(&format!("delete {volume} with its data"), yes)?;
            call(&mut client, "bdev_lvol_delete", Some(json!({"name": volume})))?;
        }
    }
    Ok(())
}
