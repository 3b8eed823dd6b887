//! `cryptfold encryption`: who opens pools. Passwords come from a file, the terminal (not shown) or standard input, line by line;
//! never from the command line.

use std::io::{BufRead as _, IsTerminal as _, Read as _, Write as _};

use clap::{Args, Subcommand, ValueEnum};
use cryptfold_control::client::Client;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::rpc::{absolute, call, connect, given, print};
use crate::shell::confirm;
use crate::work::wait_for_keys;
use crate::{Failure, SocketArgs};

/// No password is longer.
const MAX_PASSWORD_BYTES: u64 = 1024;

#[derive(Args)]
pub struct PasswordArgs {
    /// File with the password; - is standard input [default: the terminal, else standard input].
    #[arg(long, value_name = "FILE")]
    password_file: Option<String>,
}

/// What opens a pool from now on.
#[derive(Args)]
pub struct NewSlotArgs {
    #[command(flatten)]
    password: PasswordArgs,
    /// Key file on the target's machine; made if it does not exist.
    #[arg(long, value_name = "FILE")]
    key_file: Option<String>,
    /// Key server.
    #[arg(long, value_name = "NAME")]
    kms_server: Option<String>,
}

impl NewSlotArgs {
    /// Adds it to the parameters of a call; a password is asked for if that is its kind.
    fn add_to(
        self,
        params: Value,
        kind: Option<SlotKind>,
        passwords: &mut Passwords,
    ) -> Result<Value, Failure> {
        let password = match kind {
            Some(SlotKind::Password) => {
                Some(passwords.new_one(self.password.password_file.as_deref(), "New password")?)
            }
            _ => None,
        };
        let mut params = given(params);
        for (name, value) in [
            ("kind", json!(kind.map(SlotKind::word))),
            ("password", json!(password.as_deref())),
            ("key_file", json!(self.key_file.map(absolute).transpose()?)),
            ("kms_server", json!(self.kms_server)),
        ] {
            params[name] = value;
        }
        Ok(given(params))
    }
}

#[derive(Args)]
pub struct ChangeArgs {
    /// Name or UUID of the pool.
    pool: String,
    /// A domain of it; all of them when not given.
    #[arg(long)]
    domain: Option<String>,
    /// Stored MB a second that are rewritten, at most [default: 100].
    #[arg(long, value_name = "MB/S")]
    rate: Option<u32>,
    #[command(flatten)]
    then: ThenArgs,
}

impl ChangeArgs {
    fn params(&self) -> Value {
        given(json!({"name": self.pool, "domain": self.domain, "rate_mb_s": self.rate}))
    }
}

/// What happens after work was begun that goes on in the background.
#[derive(Args)]
pub struct ThenArgs {
    /// Wait until nothing lies under older keys, with a bar on a terminal.
    #[arg(long)]
    wait: bool,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

impl ThenArgs {
    /// Waits if it should, and says how the pool stands; `answer` is what the call said.
    fn follow(&self, client: &mut Client, pool: &str, answer: &Value) -> Result<(), Failure> {
        if self.wait {
            wait_for_keys(client, pool)?;
        }
        if self.json && !self.wait {
            print(answer);
            return Ok(());
        }
        let status = call(client, "cryptfold_encryption_status", Some(json!({"name": pool})))?;
        if self.json {
            print(&status["pools"][0]["domains"])
        } else {
            show(&status)
        }
        Ok(())
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum SlotKind {
    /// A password.
    Password,
    /// A key file.
    KeyFile,
    /// A key of a key server.
    Kms,
}

impl SlotKind {
    fn word(self) -> &'static str {
        match self {
            SlotKind::Password => "password",
            SlotKind::KeyFile => "key_file",
            SlotKind::Kms => "kms",
        }
    }
}

#[derive(Subcommand)]
pub enum EncryptionCommand {
    /// Show which pools are locked, and what opens them.
    Status {
        /// Name or UUID; all pools when not given.
        pool: Option<String>,
        /// JSON instead of text.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Open a locked pool.
    Unlock {
        /// Name, UUID or device.
        pool: String,
        /// Key file on the target's machine instead of a password.
        #[arg(long, value_name = "FILE", conflicts_with = "password_file")]
        key_file: Option<String>,
        /// Ask for nothing: try key files, credentials and key servers that the target knows.
        #[arg(long, conflicts_with_all = ["password_file", "key_file"])]
        auto: bool,
        #[command(flatten)]
        password: PasswordArgs,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Close a pool and forget its keys; hosts lose its volumes.
    Lock {
        /// Name or UUID.
        pool: String,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Change a password. Standard input: the old one, then the new one, a line each.
    Passwd {
        /// Name or UUID.
        pool: String,
        #[command(flatten)]
        password: PasswordArgs,
        /// File with the new password.
        #[arg(long, value_name = "FILE")]
        new_password_file: Option<String>,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Let something more open a pool; prints the number of the slot.
    AddSlot {
        /// Name or UUID.
        pool: String,
        /// What opens it.
        #[arg(value_enum)]
        kind: SlotKind,
        #[command(flatten)]
        new: NewSlotArgs,
        /// Unique identifier of a key there; a new one is made when not given.
        #[arg(long, value_name = "ID")]
        kms_object: Option<String>,
        /// For people.
        #[arg(long)]
        label: Option<String>,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Take a slot away: what it was opened by opens the pool no more.
    RemoveSlot {
        /// Name or UUID.
        pool: String,
        /// Number of the slot.
        slot: u32,
        /// Do not ask.
        #[arg(short = 'y', long)]
        yes: bool,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Give a slot another key-encryption key.
    RotateKek {
        /// Name or UUID.
        pool: String,
        /// Number of the slot, if there are several.
        slot: Option<u32>,
        /// The slot is a password's, which stays: ask for it.
        #[arg(long)]
        password: bool,
        #[command(flatten)]
        source: PasswordArgs,
        /// Key file to replace [default: the one that the pool was opened with].
        #[arg(long, value_name = "FILE")]
        key_file: Option<String>,
        /// Keep the old key at the key server.
        #[arg(long)]
        keep_old: bool,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Give a domain, or all of a pool, a new data key and fingerprint secret; what is stored follows in the background.
    Rotate {
        #[command(flatten)]
        what: ChangeArgs,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Switch encryption of a domain, or of all of a pool, off; what is stored follows in the background.
    Disable {
        #[command(flatten)]
        what: ChangeArgs,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Switch encryption of a domain, or of all of a pool, on; what is stored follows in the background.
    Enable {
        #[command(flatten)]
        what: ChangeArgs,
        /// A pool that everybody can open: what opens it instead.
        #[arg(long, value_enum)]
        slot: Option<SlotKind>,
        #[command(flatten)]
        new: NewSlotArgs,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Go on with rewriting what is stored where that was stopped, or change its rate.
    Renew {
        /// Name or UUID of the pool.
        pool: String,
        /// Stored MB a second at most [default: 100].
        #[arg(long, value_name = "MB/S")]
        rate: Option<u32>,
        #[command(flatten)]
        then: ThenArgs,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Write a pool's key slots and superblock, encrypted, to a new file.
    Backup {
        /// Name or UUID.
        pool: String,
        /// File to write.
        file: String,
        #[command(flatten)]
        password: PasswordArgs,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Erase a pool, or a domain of it with all its volumes, at once and for good; prints the certificate.
    Erase {
        /// Name or UUID of the pool.
        pool: String,
        /// A domain of it; the whole pool when not given.
        #[arg(long)]
        domain: Option<String>,
        /// The name of what is to be erased, again.
        #[arg(long, value_name = "NAME")]
        confirm: String,
        /// Keep the pool's keys at key servers.
        #[arg(long)]
        keep_kms: bool,
        /// Write the certificate to this file, too.
        #[arg(long, value_name = "FILE")]
        certificate: Option<String>,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Check the signature of an erase certificate; prints the public key that signed it.
    VerifyCertificate {
        /// The file.
        file: String,
    },
    /// Bring key slots (and a lost superblock) back from such a file. Standard input: the back-up's password, then the pool's.
    Restore {
        /// Device of the pool.
        bdev: String,
        /// The file.
        file: String,
        #[command(flatten)]
        password: PasswordArgs,
        /// Key file (on the target's machine) that opens the pool [default: a password].
        #[arg(long, value_name = "FILE")]
        pool_key_file: Option<String>,
        /// File with the password that opens the pool.
        #[arg(long, value_name = "FILE", conflicts_with = "pool_key_file")]
        pool_password_file: Option<String>,
        /// Replace slots that are in order.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        socket: SocketArgs,
    },
}

/// Where passwords come from: standard input gives a line for each.
#[derive(Default)]
pub struct Passwords {
    lines: u32,
}

fn failed(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Failure {
    move |e| Failure::Failed(format!("{what}: {e}"))
}

impl Passwords {
    /// A password: from `file`, the terminal or standard input.
    pub fn one(&mut self, file: Option<&str>, prompt: &str) -> Result<Zeroizing<String>, Failure> {
        match file {
            Some("-") => self.line(prompt),
            Some(file) => {
                let mut text = Zeroizing::new(String::with_capacity(MAX_PASSWORD_BYTES as usize + 2));
                let opened = std::fs::File::open(file).map_err(failed(file))?;
                opened.take(MAX_PASSWORD_BYTES + 1).read_to_string(&mut text).map_err(failed(file))?;
                Ok(trimmed(text))
            }
            None if std::io::stdin().is_terminal() => ask(prompt),
            None => self.line(prompt),
        }
    }

    /// A new password; typed twice at a terminal.
    pub fn new_one(&mut self, file: Option<&str>, prompt: &str) -> Result<Zeroizing<String>, Failure> {
        let first = self.one(file, prompt)?;
        if file.is_none() && std::io::stdin().is_terminal() && *ask(&format!("{prompt} again"))? != *first {
            return Err(Failure::Usage("the two passwords are not the same".into()));
        }
        Ok(first)
    }

    fn line(&mut self, prompt: &str) -> Result<Zeroizing<String>, Failure> {
        let mut text = Zeroizing::new(String::with_capacity(MAX_PASSWORD_BYTES as usize + 2));
        let read = std::io::stdin().lock().take(MAX_PASSWORD_BYTES + 1).read_line(&mut text);
        self.lines += 1;
        match read.map_err(failed("standard input"))? {
            0 => Err(Failure::Usage(format!("standard input has no line {} ({prompt})", self.lines))),
            _ => Ok(trimmed(text)),
        }
    }
}

fn trimmed(mut text: Zeroizing<String>) -> Zeroizing<String> {
    if text.ends_with('\n') {
        text.pop();
    }
    text
}

/// Asks at the terminal, without showing what is typed.
fn ask(prompt: &str) -> Result<Zeroizing<String>, Failure> {
    let stdin = std::io::stdin();
    eprint!("{prompt}: ");
    let _ = std::io::stderr().flush();
    let before = tcgetattr(&stdin).map_err(|e| Failure::Failed(format!("terminal: {e}")))?;
    let mut quiet = before.clone();
    quiet.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&stdin, OptionalActions::Flush, &quiet)
        .map_err(|e| Failure::Failed(format!("terminal: {e}")))?;
    let mut text = Zeroizing::new(String::with_capacity(MAX_PASSWORD_BYTES as usize + 2));
    let read = stdin.lock().take(MAX_PASSWORD_BYTES + 1).read_line(&mut text);
    let _ = tcsetattr(&stdin, OptionalActions::Now, &before);
    eprintln!();
    read.map_err(failed("terminal"))?;
    Ok(trimmed(text))
}

fn show(status: &Value) {
    let text = |v: &Value| v.as_str().unwrap_or("-").to_owned();
    for pool in status["pools"].as_array().into_iter().flatten() {
        let encrypted = if pool["encrypted"] == true { "encrypted" } else { "not encrypted" };
        println!(
            "{}  {}  {}, {encrypted}",
            text(&pool["name"]),
            text(&pool["base_bdev"]),
            text(&pool["state"])
        );
        if let Some(reason) = pool["reason"].as_str() {
            println!("  {reason}");
        }
        for domain in pool["domains"].as_array().into_iter().flatten() {
            let encrypted = if domain["encrypted"] == true { "encrypted" } else { "not encrypted" };
            let changing = match domain["old_bytes"].as_u64().filter(|_| domain["changing"] == true) {
                Some(bytes) => format!(", {:.1} MB under older keys", bytes as f64 / 1e6),
                None => String::new(),
            };
            println!(
                "  domain {}  {encrypted}, keys {}{changing}",
                text(&domain["name"]),
                domain["generation"]
            );
        }
        if let Some(reason) = pool["renewal"]["reason"].as_str() {
            println!("  {reason}");
        }
        for slot in pool["slots"].as_array().into_iter().flatten() {
            let key = slot["kms_object"].as_str().map(|id| format!("  key {id}")).unwrap_or_default();
            println!("  slot {}  {}  {}{key}", slot["slot"], text(&slot["kind"]), text(&slot["label"]));
        }
    }
    let waiting = status["waiting_calls"].as_array().map_or(0, Vec::len);
    if waiting > 0 {
        println!("{waiting} calls of the configuration wait for locked pools");
    }
}

pub fn run(command: EncryptionCommand) -> Result<(), Failure> {
    let mut passwords = Passwords::default();
    match command {
        EncryptionCommand::Status { pool, json, socket } => {
            let params = pool.map(|name| json!({"name": name}));
            let status = call(&mut connect(&socket)?, "cryptfold_encryption_status", params)?;
            if json { print(&status) } else { show(&status) }
        }
        EncryptionCommand::Unlock { pool, key_file, auto, password, socket } => {
            let mut client = connect(&socket)?;
            let password = match auto || key_file.is_some() {
                true => None,
                false => Some(passwords.one(password.password_file.as_deref(), "Password")?),
            };
            let key_file = key_file.map(absolute).transpose()?;
            let params = given(json!({"name": pool, "password": password.as_deref(), "key_file": key_file}));
            print(&call(&mut client, "cryptfold_encryption_unlock", Some(params))?);
        }
        EncryptionCommand::Lock { pool, socket } => {
            let locked =
                call(&mut connect(&socket)?, "cryptfold_encryption_lock", Some(json!({"name": pool})))?;
            if let Some(warning) = locked["warning"].as_str() {
                eprintln!("warning: {warning}");
            }
        }
        EncryptionCommand::Passwd { pool, password, new_password_file, socket } => {
            let mut client = connect(&socket)?;
            let old = passwords.one(password.password_file.as_deref(), "Present password")?;
            let new = passwords.new_one(new_password_file.as_deref(), "New password")?;
            let params = json!({"name": pool, "password": *old, "new_password": *new});
            print(&call(&mut client, "cryptfold_encryption_passwd", Some(params))?);
        }
        EncryptionCommand::AddSlot { pool, kind, new, kms_object, label, socket } => {
            let mut client = connect(&socket)?;
            let params = json!({"name": pool, "label": label, "kms_object": kms_object});
            let params = new.add_to(params, Some(kind), &mut passwords)?;
            print(&call(&mut client, "cryptfold_encryption_add_slot", Some(params))?);
        }
        EncryptionCommand::RemoveSlot { pool, slot, yes, socket } => {
            let mut client = connect(&socket)?;
            confirm(
                &format!("remove key slot {slot} of {pool}: what it was opened by opens it no more"),
                yes,
            )?;
            let params = json!({"name": pool, "slot": slot});
            call(&mut client, "cryptfold_encryption_remove_slot", Some(params))?;
        }
        EncryptionCommand::RotateKek { pool, slot, password, source, key_file, keep_old, socket } => {
            let mut client = connect(&socket)?;
            let password = match password || source.password_file.is_some() {
                true => Some(passwords.one(source.password_file.as_deref(), "Password")?),
                false => None,
            };
            let params = given(json!({
                "name": pool, "slot": slot, "password": password.as_deref(),
                "key_file": key_file.map(absolute).transpose()?, "keep_old": keep_old,
            }));
            print(&call(&mut client, "cryptfold_encryption_rotate_kek", Some(params))?);
        }
        EncryptionCommand::Rotate { what, socket } => {
            let mut client = connect(&socket)?;
            let answer = call(&mut client, "cryptfold_encryption_rotate", Some(what.params()))?;
            what.then.follow(&mut client, &what.pool, &answer)?;
        }
        EncryptionCommand::Disable { what, socket } => {
            let mut client = connect(&socket)?;
            let answer = call(&mut client, "cryptfold_encryption_disable", Some(what.params()))?;
            what.then.follow(&mut client, &what.pool, &answer)?;
        }
        EncryptionCommand::Enable { what, slot, new, socket } => {
            let mut client = connect(&socket)?;
            let params = new.add_to(what.params(), slot, &mut passwords)?;
            let answer = call(&mut client, "cryptfold_encryption_enable", Some(params))?;
            what.then.follow(&mut client, &what.pool, &answer)?;
        }
        EncryptionCommand::Renew { pool, rate, then, socket } => {
            let mut client = connect(&socket)?;
            let params = given(json!({"name": pool, "rate_mb_s": rate}));
            let answer = call(&mut client, "cryptfold_encryption_renew", Some(params))?;
            then.follow(&mut client, &pool, &answer)?;
        }
        EncryptionCommand::Backup { pool, file, password, socket } => {
            let mut client = connect(&socket)?;
            let password = passwords.new_one(password.password_file.as_deref(), "Password of the back-up")?;
            let params = json!({"name": pool, "password": *password, "filename": absolute(file)?});
            call(&mut client, "cryptfold_encryption_backup", Some(params))?;
        }
        EncryptionCommand::Erase { pool, domain, confirm, keep_kms, certificate, socket } => {
            let params = given(json!({
                "name": pool, "domain": domain, "confirm": confirm, "keep_kms": keep_kms,
                "filename": certificate.map(absolute).transpose()?,
            }));
            print(&call(&mut connect(&socket)?, "cryptfold_encryption_erase", Some(params))?);
        }
        EncryptionCommand::VerifyCertificate { file } => {
            let text = std::fs::read_to_string(&file).map_err(failed(&file))?;
            let signed: Value =
                serde_json::from_str(&text).map_err(|e| Failure::Failed(format!("{file}: {e}")))?;
            cryptfold_control::certificate::verify(&signed)
                .map_err(|e| Failure::Failed(format!("{file}: {e}")))?;
            println!("signed by {}", signed["public_key"].as_str().unwrap_or_default());
        }
        EncryptionCommand::Restore {
            bdev,
            file,
            password,
            pool_key_file,
            pool_password_file,
            force,
            socket,
        } => {
            let mut client = connect(&socket)?;
            let password = passwords.one(password.password_file.as_deref(), "Password of the back-up")?;
            let pool_password = match pool_key_file {
                Some(_) => None,
                None => Some(passwords.one(pool_password_file.as_deref(), "Password of the pool")?),
            };
            let params = given(json!({
                "base_bdev_name": bdev, "filename": absolute(file)?, "password": *password, "force": force,
                "pool_key_file": pool_key_file.map(absolute).transpose()?, "pool_password": pool_password.as_deref(),
            }));
            print(&call(&mut client, "cryptfold_encryption_restore", Some(params))?);
        }
    }
    Ok(())
}
