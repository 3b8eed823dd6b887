//! `cryptfold host`: the host's side of an encrypted volume. Makes or finds the volume key at the key server, runs the host's
//! own `cryptsetup`, and notes in the header where the key is. Also: what a target makes of such volumes.
//!
//! A key passes through memory that is wiped and a pipe to `cryptsetup`: it is in no file and on no command line.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use cryptfold_control::keys::{random_key, read_key_file};
use cryptfold_kmip::message::USAGE_ENCRYPT_DECRYPT;
use cryptfold_kmip::{
    Client, ClientConfig, Filter, Identity, NewObject, ObjectType, RevocationReason, ServerAddress, State,
};
use cryptfold_luks2::{DEFAULT_MAX_ITERATIONS, Header, PROBE_BYTES, Payload, Place};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::rpc::{call, connect, given, print};
use crate::shell::confirm;
use crate::status::{Table, bytes, list};
use crate::work::patiently;
use crate::{Failure, SocketArgs};

/// Bytes of AES-256-XTS's key, both halves.
const KEY_BYTES: usize = 64;
/// Where the payload begins, in sectors of 512 bytes: what cryptsetup takes by itself.
const OFFSET_SECTORS: u32 = 32768;
/// Certificates are no larger, chains included.
const MAX_CERTIFICATES_BYTES: u64 = 256 * 1024;

/// How the key server is reached.
#[derive(Args)]
pub struct KmipArgs {
    /// Key server (KMIP); several with the same keys, the preferred one first.
    #[arg(long = "kmip", value_name = "HOST[:PORT]", required = true, value_delimiter = ',')]
    servers: Vec<ServerAddress>,
    /// Certificates (PEM) of who signs the server's certificate.
    #[arg(long, value_name = "FILE")]
    ca: PathBuf,
    /// This host's certificate (PEM).
    #[arg(long, value_name = "FILE")]
    cert: PathBuf,
    /// Its private key (PEM), mode 0600.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
}

#[derive(Args)]
pub struct EnrollArgs {
    /// Device; all that is on it is lost.
    device: PathBuf,
    #[command(flatten)]
    kmip: KmipArgs,
    /// A key that is at the server already, active; twice for two halves [default: a new one].
    #[arg(long = "object", value_name = "ID")]
    objects: Vec<String>,
    /// Make the new key as two objects of 256 bits, for servers without AES keys of 512 bits.
    #[arg(long, conflicts_with = "objects")]
    halves: bool,
    /// Operation policy of the new key, where the server has such: the target must be allowed to get it.
    #[arg(long, value_name = "NAME", conflicts_with = "objects")]
    policy: Option<String>,
    /// Bytes in a data unit: 512 or 4096.
    #[arg(long, value_name = "BYTES", default_value = "4096", value_parser = ["512", "4096"])]
    sector_size: String,
    /// Label in the header.
    #[arg(long)]
    label: Option<String>,
    /// Also make a keyslot with the passphrase in this file, for the day when there is no key server. All of its bytes count, as
    /// for cryptsetup's --key-file: one that is to be typed must not end in a newline.
    #[arg(long, value_name = "FILE")]
    recovery_file: Option<PathBuf>,
    /// Do not ask.
    #[arg(short = 'y', long)]
    yes: bool,
}

#[derive(Subcommand)]
pub enum HostCommand {
    /// On a host: make a device a LUKS2 volume whose key is at a key server.
    Enroll(EnrollArgs),
    /// On a host: open such a volume as /dev/mapper/NAME.
    Open {
        /// Device.
        device: PathBuf,
        /// Name of the mapping.
        name: String,
        #[command(flatten)]
        kmip: KmipArgs,
    },
    /// On a host: print the block device of a subsystem that it is connected to, as soon as it is there.
    Device {
        /// Name of the subsystem.
        nqn: String,
        /// Number of the namespace.
        #[arg(long, default_value_t = 1)]
        nsid: u32,
        /// Seconds to wait for it.
        #[arg(short = 't', long, default_value_t = 60)]
        timeout: u64,
    },
    /// On the target: what it makes of volumes on which hosts put LUKS2.
    Status {
        /// Name of a device; all when not given.
        name: Option<String>,
        /// JSON instead of a table.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        socket: SocketArgs,
    },
}

pub fn run(command: HostCommand) -> Result<(), Failure> {
    match command {
        HostCommand::Enroll(args) => enroll(&args),
        HostCommand::Open { device, name, kmip } => open(&device, &name, &kmip),
        HostCommand::Device { nqn, nsid, timeout } => {
            let limit = Duration::from_secs(timeout);
            let found = patiently("waiting for the device", || device(Path::new("/"), &nqn, nsid, limit))?;
            println!("{}", found.display());
            Ok(())
        }
        HostCommand::Status { name, json, socket } => {
            let params = given(json!({"name": name}));
            let found = call(&mut connect(&socket)?, "bdev_luks_get_status", Some(params))?;
            if json {
                print(&found);
            } else {
                table(&found).print();
            }
            Ok(())
        }
    }
}

fn table(found: &Value) -> Table {
    let mut table = Table::new(&["DEVICE", "STATE", "KEY", "LUKS VOLUME", "REASON"], &[false; 5]);
    let text = |v: &Value| v.as_str().unwrap_or("-").to_owned();
    for v in list(found) {
        let mut cells = [&v["name"], &v["state"], &v["key_state"], &v["uuid"], &v["reason"]].map(text);
        if v["state"] == "converting" && v["reason"].is_null() && v["left_bytes"].is_u64() {
            cells[4] = format!("{} left", bytes(&v["left_bytes"]));
        }
        table.row(cells.into());
    }
    table
}

// ---- the kernel's devices

/// Whether it is a namespace's device that can be opened: nvme0n1, and not nvme0c0n1, which is one path to it.
fn is_namespace(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let parts = name.strip_prefix("nvme").and_then(|rest| rest.split_once('n'));
    parts.is_some_and(|(subsystem, namespace)| digits(subsystem) && digits(namespace))
}

fn below(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// The device of namespace `nsid` of the subsystem `nqn`, if the kernel below `root` has it. A namespace is in the subsystem's
/// directory, or, where the kernel knows no multipath, in that of its controller.
fn find_device(root: &Path, nqn: &str, nsid: u32) -> Option<PathBuf> {
    let is =
        |file: PathBuf, text: &str| std::fs::read_to_string(file).is_ok_and(|found| found.trim() == text);
    let subsystems = below(&root.join("sys/class/nvme-subsystem"));
    let inside = subsystems.into_iter().filter(|s| is(s.join("subsysnqn"), nqn)).flat_map(|s| below(&s));
    let both = inside.flat_map(|path| [below(&path), vec![path]].concat());
    let mut names = both.filter(|path| is(path.join("nsid"), &nsid.to_string())).filter_map(|path| {
        let name = path.file_name()?.to_str()?;
        is_namespace(name).then(|| root.join("dev").join(name))
    });
    names.find(|node| node.exists())
}

fn device(root: &Path, nqn: &str, nsid: u32, limit: Duration) -> Result<PathBuf, Failure> {
    let begun = Instant::now();
    loop {
        if let Some(found) = find_device(root, nqn, nsid) {
            return Ok(found);
        }
        if begun.elapsed() >= limit {
            return Err(Failure::Failed(format!(
                "this machine has no namespace {nsid} of {nqn}: is it connected (nvme connect, nvme list-subsys)?"
            )));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

// ---- the key server

fn pem(path: &Path) -> Result<Vec<u8>, Failure> {
    let failed = |e: std::io::Error| Failure::Usage(format!("{}: {e}", path.display()));
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_CERTIFICATES_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn client(args: &KmipArgs) -> Result<Client, Failure> {
    let key = read_key_file(&args.key).map_err(|e| Failure::Usage(e.to_string()))?;
    let identity = Identity::from_pem(&pem(&args.ca)?, &pem(&args.cert)?, &key);
    let identity = identity.map_err(|e| Failure::Usage(e.to_string()))?;
    Ok(Client::new(ClientConfig::new(args.servers.clone()), &identity))
}

/// The key that these objects are, which must be active.
fn fetch(client: &Client, objects: &[String]) -> Result<Zeroizing<Vec<u8>>, Failure> {
    // Sized ahead: growing would leave a copy behind.
    let mut whole = Zeroizing::new(Vec::with_capacity(KEY_BYTES));
    for id in objects {
        let failed = |e: cryptfold_kmip::KmipError| Failure::Key(format!("key {id}: {e}"));
        match client.get_attributes(id).map_err(failed)?.state {
            Some(State::Active) => {}
            Some(state) => return Err(Failure::Key(format!("key {id} is {state}, not active"))),
            None => return Err(Failure::Key(format!("key {id} has no state"))),
        }
        let part = client.get(id).map_err(failed)?.key;
        if whole.len() + part.len() > KEY_BYTES {
            return Err(Failure::Key(format!("key {id}: more than {KEY_BYTES} bytes in all")));
        }
        whole.extend_from_slice(part.expose());
    }
    match whole.len() {
        32 | KEY_BYTES => Ok(whole),
        n => Err(Failure::Key(format!("the key has {n} bytes; 32 or {KEY_BYTES} are needed"))),
    }
}

/// New keys at the server, active.
fn create(client: &Client, args: &EnrollArgs) -> Result<Vec<String>, Failure> {
    let (count, length_bits) = if args.halves { (2, 256) } else { (1, 512) };
    let new =
        NewObject { name: None, length_bits, usage: USAGE_ENCRYPT_DECRYPT, policy: args.policy.clone() };
    let mut made = Vec::new();
    for _ in 0..count {
        let active = client.create(&new).and_then(|id| {
            made.push(id.clone());
            client.activate(&id)
        });
        if let Err(e) = active {
            destroy(client, &made);
            return Err(Failure::Failed(format!("no new key: {e}")));
        }
    }
    Ok(made)
}

/// Takes back what was made for nothing.
fn destroy(client: &Client, objects: &[String]) {
    for id in objects {
        let gone = client.revoke(id, RevocationReason::CessationOfOperation, "not used");
        if let Err(e) = gone.and_then(|()| client.destroy(id)) {
            eprintln!("cryptfold: key {id} stays at the key server, unused: {e}");
        }
    }
}

// ---- cryptsetup

/// Bytes that a program may read once, at a path.
struct Handed {
    reader: std::io::PipeReader,
}

impl Handed {
    fn new(bytes: &[u8]) -> Result<Handed, Failure> {
        let failed = |e: std::io::Error| Failure::Failed(format!("a pipe: {e}"));
        let (reader, mut writer) = std::io::pipe().map_err(failed)?;
        // Less than a pipe holds.
        writer.write_all(bytes).map_err(failed)?;
        fcntl_setfd(&reader, FdFlags::empty()).map_err(|e| failed(e.into()))?;
        Ok(Handed { reader })
    }

    /// In the program.
    fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.reader.as_raw_fd())
    }
}

fn tool(program: &str, args: &[&str], input: Option<&str>) -> Result<(), Failure> {
    let path = std::env::var("PATH").unwrap_or_default();
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let child = Command::new(program)
        .args(args)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .stdin(stdin)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.map_err(|e| Failure::Failed(format!("{program}: {e}")))?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        let sent = stdin.write_all(input.as_bytes());
        sent.map_err(|e| Failure::Failed(format!("{program}: {e}")))?;
    }
    let done = child.wait_with_output().map_err(|e| Failure::Failed(format!("{program}: {e}")))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let what = args.first().copied().unwrap_or_default();
    Err(Failure::Failed(format!("{program} {what}: {}: {}", done.status, said.trim())))
}

fn shown(device: &Path) -> Result<&str, Failure> {
    device.to_str().ok_or_else(|| Failure::Usage(format!("{}: no UTF-8", device.display())))
}

/// The header on a device, and its payload.
fn header(device: &Path) -> Result<(Header, Payload), Failure> {
    let failed = |e: std::io::Error| Failure::Failed(format!("{}: {e}", device.display()));
    let wrong = |e: String| Failure::Failed(format!("{}: {e}", device.display()));
    let mut file = File::open(device).map_err(failed)?;
    let size = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).map_err(failed)?;
    std::io::Seek::rewind(&mut file).map_err(failed)?;
    let mut area = Vec::new();
    (&mut file).take(PROBE_BYTES as u64).read_to_end(&mut area).map_err(failed)?;
    let bytes = Header::area_bytes(&area).unwrap_or(0) as u64;
    file.take(bytes.saturating_sub(area.len() as u64)).read_to_end(&mut area).map_err(failed)?;
    let header = Header::parse(&area).map_err(|e| wrong(e.to_string()))?;
    let header = header.ok_or_else(|| wrong("there is no LUKS2 header".into()))?;
    let payload = header.payload(Place::Attached, size).map_err(|e| wrong(e.to_string()))?;
    Ok((header, payload))
}

/// That nobody has a block device in use: no file system of it (or of a part of it) is mounted, no other device is made of it.
fn unused(device: &Path) -> Result<(), Failure> {
    // For block devices O_EXCL means that, without O_CREAT (open(2)).
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device);
    match opened {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => Err(Failure::Failed(format!(
            "{} is in use (mounted, or part of another device): is it the one that you mean?",
            device.display()
        ))),
        Err(e) => Err(Failure::Failed(format!("{}: {e}", device.display()))),
    }
}

fn enroll(args: &EnrollArgs) -> Result<(), Failure> {
    if args.objects.len() > 2 {
        return Err(Failure::Usage("--object: one, or two for halves".into()));
    }
    let device = shown(&args.device)?;
    let kind = std::fs::metadata(&args.device).map_err(|e| Failure::Failed(format!("{device}: {e}")))?;
    let is_block = kind.file_type().is_block_device();
    if is_block {
        unused(&args.device)?;
    }
    let client = client(&args.kmip)?;
    confirm(&format!("format {device}, with the loss of all that is on it"), args.yes)?;
    let made = args.objects.is_empty();
    let objects = if made { create(&client, args)? } else { args.objects.clone() };
    let formatted = fetch(&client, &objects).and_then(|key| {
        // Without -f: it takes the device for itself, or fails.
        if is_block && let Err(Failure::Failed(e)) = tool("blkdiscard", &[device], None) {
            eprintln!("cryptfold: what was on {device} could not be discarded: {e}");
        }
        patiently("formatting", || format(args, device, &objects, &key))
    });
    if formatted.is_err() && made {
        destroy(&client, &objects);
    }
    let uuid = formatted?;
    print(&json!({"device": device, "uuid": uuid, "objects": objects}));
    Ok(())
}

/// Makes the LUKS2 volume; its UUID. The note where its key is comes last: a target acts on it.
fn format(args: &EnrollArgs, device: &str, objects: &[String], key: &[u8]) -> Result<String, Failure> {
    let (bits, sector) = ((key.len() * 8).to_string(), &args.sector_size);
    let offset = OFFSET_SECTORS.to_string();
    let volume_key = Handed::new(key)?;
    // A keyslot has to be made with the header; without a passphrase for it, one that nobody knows, and then none.
    let nobody = random_key(32);
    let passphrase = match &args.recovery_file {
        Some(file) => Handed::new(&read_key_file(file).map_err(|e| Failure::Usage(e.to_string()))?)?,
        None => Handed::new(&nobody)?,
    };
    let (volume_key_path, passphrase_path) = (volume_key.path(), passphrase.path());
    let mut command = vec!["luksFormat", "-q", "--type", "luks2", "--cipher", "aes-xts-plain64"];
    command.extend(["--key-size", &bits, "--sector-size", sector, "--offset", &offset]);
    command.extend(["--volume-key-file", &volume_key_path, "--key-file", &passphrase_path]);
    if args.recovery_file.is_none() {
        command.extend(["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]);
    }
    if let Some(label) = &args.label {
        command.extend(["--label", label]);
    }
    command.push(device);
    tool("cryptsetup", &command, None)?;
    drop((volume_key, passphrase));
    if args.recovery_file.is_none() {
        tool("cryptsetup", &["luksKillSlot", "-q", device, "0"], None)?;
    }
    let token = json!({"type": "cryptfold-kmip", "keyslots": [], "objects": objects});
    tool("cryptsetup", &["token", "import", device], Some(&token.to_string()))?;
    let (header, payload) = header(&args.device)?;
    let proven = payload.digest.prove(key, DEFAULT_MAX_ITERATIONS);
    proven.map_err(|e| Failure::Key(format!("{device} after formatting: {e}")))?;
    Ok(header.uuid.to_string())
}

fn open(device: &Path, name: &str, kmip: &KmipArgs) -> Result<(), Failure> {
    let path = shown(device)?;
    let (header, payload) = header(device)?;
    let client = client(kmip)?;
    let token = header.kmip_token().map_err(|e| Failure::Failed(format!("{path}: {e}")))?;
    let objects = match token {
        Some(token) => token.objects,
        None => {
            let uuid = header.uuid.to_string();
            let (name, object_type) = (Some(uuid.clone()), Some(ObjectType::SymmetricKey));
            let found = client.locate(&Filter { name, object_type, ..Filter::default() });
            let found = found.map_err(|e| Failure::Key(e.to_string()))?;
            if found.len() != 1 {
                return Err(Failure::Key(format!(
                    "{path} has no token of type \"cryptfold-kmip\", and {} keys at the server are named {uuid}",
                    found.len()
                )));
            }
            found
        }
    };
    let key = fetch(&client, &objects)?;
    let proven = payload.digest.prove(&key, DEFAULT_MAX_ITERATIONS);
    proven.map_err(|e| Failure::Key(format!("{path}: {e}")))?;
    let handed = Handed::new(&key)?;
    let (bits, key_path) = ((key.len() * 8).to_string(), handed.path());
    let args = ["open", "--type", "luks2", "--key-size", &bits, "--volume-key-file", &key_path, path, name];
    tool("cryptsetup", &args, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_shown() {
        let converting = json!({"name": "a", "state": "converting", "left_bytes": 3 << 20});
        let stuck = json!({"name": "b", "state": "converting", "left_bytes": 3 << 20, "reason": "why"});
        let shown = table(&json!([converting, stuck])).render();
        let ends: Vec<&str> = shown.lines().map(|line| line.rsplit("  ").next().unwrap()).collect();
        assert_eq!(ends, ["REASON", "3.00 MiB left", "why"]);
    }

    #[test]
    fn devices_of_connected_subsystems() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str, content: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        };
        let find = |nqn: &str, nsid| find_device(root.path(), nqn, nsid);
        // With multipath: the device, and its path by one controller.
        make("sys/class/nvme-subsystem/nvme-subsys0/subsysnqn", "nqn.a\n");
        make("sys/class/nvme-subsystem/nvme-subsys0/nvme0n1/nsid", "1\n");
        make("sys/class/nvme-subsystem/nvme-subsys0/nvme0/nvme0c0n1/nsid", "1\n");
        assert_eq!(find("nqn.a", 1), None, "there is no node yet");
        make("dev/nvme0c0n1", "");
        assert_eq!(find("nqn.a", 1), None, "a path is no device");
        make("dev/nvme0n1", "");
        assert_eq!(find("nqn.a", 1), Some(root.path().join("dev/nvme0n1")));
        assert_eq!(find("nqn.a", 2), None);
        assert_eq!(find("nqn", 1), None);
        // Without: below the controller.
        make("sys/class/nvme-subsystem/nvme-subsys1/subsysnqn", "nqn.b\n");
        make("sys/class/nvme-subsystem/nvme-subsys1/nvme1/nvme1n2/nsid", "2\n");
        make("dev/nvme1n2", "");
        assert_eq!(find("nqn.b", 2), Some(root.path().join("dev/nvme1n2")));
        let none = device(root.path(), "nqn.c", 1, Duration::ZERO);
        assert!(matches!(none, Err(Failure::Failed(e)) if e.contains("nqn.c") && e.contains("nvme connect")));
    }
}
