//! The commands as a person or a script uses them: what they ask, what they say next, what they show while they wait.

mod common;

use std::io::{BufReader, Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use common::{PATIENCE, Target, refused, run, start};
use serde_json::Value;

/// A target with RAM disks `M0` and `M1`, and a way to its commands.
struct Machine {
    dir: tempfile::TempDir,
    sock: String,
    target: Option<Target>,
}

impl Machine {
    fn new() -> Machine {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("c.json");
        let disk = |name: &str| {
            format!(
                r#"{{"method":"bdev_malloc_create","params":{{"name":"{name}","num_blocks":16384,"block_size":4096}}}}"#
            )
        };
        let config_text =
            format!(r#"{{"subsystems":[{{"subsystem":"bdev","config":[{},{}]}}]}}"#, disk("M0"), disk("M1"));
        std::fs::write(&config, config_text).unwrap();
        let target = start(dir.path(), &["-c", config.to_str().unwrap()]);
        let sock = dir.path().join("s.sock").to_str().unwrap().to_owned();
        Machine { dir, sock, target: Some(target) }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// A file that only its owner can read.
    fn secret(&self, name: &str, content: &[u8]) -> String {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    fn ok(&self, args: &[&str]) -> String {
        let out = run(&[args, &["-r", &self.sock]].concat());
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e}: {text}"))
    }

    fn refused(&self, args: &[&str], code: i32, words: &[&str]) {
        refused(&[args, &["-r", &self.sock]].concat(), code, words);
    }

    fn end(mut self) {
        assert_eq!(self.target.take().unwrap().end("-TERM"), Some(0));
    }
}

/// The program on a terminal of its own (util-linux's script(1)).
struct Terminal {
    child: Child,
    shown: Receiver<u8>,
}

impl Terminal {
    fn new(args: &[&str]) -> Terminal {
        let quoted: Vec<String> = args.iter().map(|a| format!("'{}'", a.replace('\'', "'\\''"))).collect();
        let command = format!("'{}' {}", env!("CARGO_BIN_EXE_cryptfold"), quoted.join(" "));
        let mut child = Command::new("script")
            .args(["-qefc", &command, "/dev/null"])
            .env("TERM", "xterm")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("script(1) of util-linux is needed");
        let out = BufReader::new(child.stdout.take().unwrap());
        let (sender, shown) = channel();
        std::thread::spawn(move || {
            out.bytes().map_while(Result::ok).try_for_each(|byte| sender.send(byte).map_err(drop))
        });
        Terminal { child, shown }
    }

    /// What it shows up to `word`.
    fn until(&mut self, word: &str) {
        let (mut seen, limit) = (Vec::new(), Instant::now() + PATIENCE);
        while !String::from_utf8_lossy(&seen).contains(word) {
            let left = limit.saturating_duration_since(Instant::now());
            let byte = self.shown.recv_timeout(left);
            seen.push(byte.unwrap_or_else(|_| panic!("no {word:?} in {:?}", String::from_utf8_lossy(&seen))));
        }
    }

    /// The exit code and what else it shows.
    fn end(mut self) -> (Option<i32>, String) {
        let rest: Vec<u8> = self.shown.iter().collect();
        (self.child.wait().unwrap().code(), String::from_utf8_lossy(&rest).into_owned())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Types `answer` when it is asked; the exit code and the rest of what is shown.
fn answer(args: &[&str], question: &str, answer: &str) -> (Option<i32>, String) {
    let mut terminal = Terminal::new(args);
    terminal.until(question);
    writeln!(terminal.child.stdin.as_mut().unwrap(), "{answer}").unwrap();
    terminal.end()
}

/// Every command, by its words.
fn commands() -> Vec<Vec<String>> {
    fn below(words: &[&str], all: &mut Vec<Vec<String>>) {
        let out = run(&[words, &["--help"]].concat());
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{words:?}");
        all.push(words.iter().map(ToString::to_string).collect());
        let Some((_, list)) = text.split_once("\nCommands:\n") else { return };
        for line in list.lines().take_while(|line| !line.is_empty()) {
            let name = line.split_whitespace().next().unwrap_or_default();
            // What is further in is the rest of a description.
            if name != "help" && line.starts_with("  ") && !line.starts_with("   ") {
                below(&[words, &[name]].concat(), all);
            }
        }
    }
    let mut all = Vec::new();
    below(&[], &mut all);
    all
}

#[test]
fn every_command_has_help_exit_codes_and_a_manual_page() {
    let pages = tempfile::tempdir().unwrap();
    assert!(run(&["man", pages.path().to_str().unwrap()]).status.success());
    let all = commands();
    assert!(all.len() > 40, "{all:?}");
    for words in &all {
        let args: Vec<&str> = words.iter().map(String::as_str).chain(["--help"]).collect();
        let help = run(&args);
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        assert!(help.contains("Exit codes: 0 done"), "{words:?}: {help}");
        let name = std::iter::once("cryptfold").chain(words.iter().map(String::as_str));
        let page = pages.path().join(name.collect::<Vec<_>>().join("-") + ".1");
        let text = std::fs::read_to_string(&page).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
        assert!(text.contains("Exit codes: 0 done"), "{}", page.display());
    }
    // What tells something tells it to scripts, too.
    for command in [
        "status",
        "connect",
        "estimate",
        "pool list",
        "pool check",
        "pool scrub",
        "pool dedupe",
        "volume list",
        "volume create",
        "encryption status",
        "encryption rotate",
        "host status",
        "audit show",
    ] {
        let args: Vec<&str> = command.split(' ').chain(["--help"]).collect();
        assert!(String::from_utf8_lossy(&run(&args).stdout).contains("--json"), "{command}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completion", shell]);
        let script = String::from_utf8_lossy(&script.stdout).into_owned();
        assert!(script.contains("scrub") && script.contains("host-key"), "{shell}");
    }
}

#[test]
fn what_destroys_asks() {
    let m = Machine::new();
    m.ok(&["pool", "create", "M0", "p", "--memory-budget", "16M"]);
    m.ok(&["volume", "create", "p/v", "8M"]);
    let size = |m: &Machine| m.json(&["volume", "list"])[0]["size_bytes"].as_u64();
    // Nobody can be asked.
    m.refused(&["volume", "resize", "p/v", "4M"], 2, &["shrink p/v from 8.00 MiB to 4.00 MiB", "--yes"]);
    m.refused(&["volume", "delete", "p/v"], 2, &["delete p/v", "--yes"]);
    m.refused(&["pool", "delete", "p"], 2, &["delete pool p", "--yes"]);
    m.refused(&["encryption", "remove-slot", "p", "0"], 2, &["remove key slot 0 of p", "--yes"]);
    assert_eq!(size(&m), Some(8 << 20));
    // Somebody says no, nothing, yes.
    let shrink = ["volume", "resize", "p/v", "4M", "-r", &m.sock];
    for no in ["n", ""] {
        let (code, said) = answer(&shrink, "[y/N]", no);
        assert!(code == Some(1) && said.contains("nothing was done"), "{code:?} {said}");
        assert_eq!(size(&m), Some(8 << 20));
    }
    let (code, said) = answer(&shrink, "[y/N]", "y");
    assert_eq!((code, size(&m)), (Some(0), Some(4 << 20)), "{said}");
    m.ok(&["volume", "resize", "p/v", "2M", "--yes"]);
    // More is no loss.
    m.ok(&["volume", "resize", "p/v", "16M"]);
    assert_eq!(size(&m), Some(16 << 20));
    // The last slot stays, whoever says so; another one goes.
    m.refused(&["encryption", "remove-slot", "p", "0", "--yes"], 1, &["is the last one"]);
    let second = m.path("second.key");
    m.ok(&["encryption", "add-slot", "p", "key-file", "--key-file", &second]);
    m.ok(&["encryption", "remove-slot", "p", "1", "--yes"]);
    m.end();
}

#[test]
fn errors_say_what_to_do_next() {
    let m = Machine::new();
    m.refused(&["connect"], 1, &["volume create --export"]);
    m.refused(&["volume", "create", "v", "8M"], 1, &["no pool", "cryptfold pool create"]);
    m.ok(&["pool", "create", "M0", "p", "--memory-budget", "16M"]);
    m.refused(&["volume", "create", "q/v", "8M"], 1, &["\"q\"", "cryptfold pool list"]);
    m.refused(&["pool", "check", "q"], 1, &["\"q\"", "cryptfold pool list"]);
    m.refused(&["pool", "create", "none", "q"], 1, &["\"none\"", "bdev_get_bdevs"]);
    m.refused(&["pool", "create", "M0", "q"], 1, &["claimed", "cryptfold status"]);
    m.refused(&["volume", "delete", "p/none", "-y"], 1, &["\"p/none\"", "cryptfold volume list"]);
    m.refused(&["volume", "resize", "p/none", "8M"], 1, &["p/none", "cryptfold volume list"]);
    m.refused(&["rpc", "xyzzy"], 1, &["xyzzy", "rpc_get_methods"]);
    m.refused(&["rpc", "bdev_get_bdev"], 1, &["did you mean bdev_get_bdevs?"]);
    refused(&["host", "device", "nqn.none", "--timeout", "0"], 1, &["nqn.none", "nvme connect"]);
    m.end();
}

#[test]
fn volumes_of_the_only_pool_and_of_hosts_that_encrypt() {
    let m = Machine::new();
    m.ok(&["pool", "create", "M0", "p", "--memory-budget", "16M"]);
    let made = m.json(&["volume", "create", "v", "8M"]);
    assert_eq!(made["name"], "p/v");
    assert!(made["uuid"].is_string() && made["connect"].as_array().is_some_and(Vec::is_empty), "{made}");
    let key = m.secret("host.key", &[[7; 32], [9; 32]].concat());
    let args = ["volume", "create", "s", "8M", "--export", "--listen", "127.0.0.1:0", "--host-key"];
    // Without a key nothing is left behind.
    m.refused(&[&args[..], &["/nonexistent/key"]].concat(), 1, &["/nonexistent/key"]);
    let made = m.json(&[&args[..], &[&key]].concat());
    let line = made["connect"][0].as_str().unwrap();
    assert!(line.starts_with("nvme connect -t tcp -a 127.0.0.1 -s "), "{line}");
    assert_eq!(m.json(&["connect"]), made["connect"]);
    let subsystems = m.ok(&["rpc", "nvmf_get_subsystems"]);
    assert!(subsystems.contains("\"p-s-host\""), "{subsystems}");
    let device: Value =
        serde_json::from_str(&m.ok(&["rpc", "bdev_get_bdevs", r#"{"name":"p-s-host"}"#])).unwrap();
    assert_eq!(device[0]["product_name"], "hostcrypt", "{device}");
    // Of two pools one has to be named.
    m.ok(&["pool", "create", "M1", "q", "--memory-budget", "16M"]);
    m.refused(&["volume", "create", "w", "8M"], 2, &["which pool?", "p, q"]);
    m.refused(&["volume", "create", "p/w", "8M", "--host-key", &key], 2, &["--export"]);
    m.end();
}

#[test]
fn waiting_for_work_in_the_background() {
    let m = Machine::new();
    m.ok(&["pool", "create", "M0", "p", "--memory-budget", "16M"]);
    assert!(m.ok(&["pool", "scrub", "p", "status"]).contains("p: never since the pool was opened"));
    let said = m.ok(&["pool", "scrub", "p", "--rate", "1000", "--wait"]);
    assert!(said.starts_with("p: done, ") && said.contains("0 damaged"), "{said}");
    assert_eq!(m.json(&["pool", "scrub", "p", "status"])["state"], "done");
    assert!(m.ok(&["pool", "dedupe", "p", "--wait"]).starts_with("p: done, "));
    assert!(m.ok(&["pool", "check", "p"]).contains("p: clean; 0 problems in 0 volumes"));
    let said = m.ok(&["encryption", "rotate", "p", "--wait"]);
    assert!(said.contains("keys 2") && !said.contains("older keys"), "{said}");
    let domains = m.json(&["encryption", "rotate", "p", "--wait"]);
    assert!(domains[0]["generation"] == 3 && domains[0]["changing"] == false, "{domains}");
    m.end();
}

#[test]
fn exit_code_3_is_for_keys() {
    let m = Machine::new();
    let (right, wrong) = (m.secret("right", b"correct horse\n"), m.secret("wrong", b"battery staple\n"));
    m.ok(&["pool", "create", "M0", "p", "--memory-budget", "16M", "--password-file", &right]);
    m.ok(&["encryption", "lock", "p"]);
    m.refused(&["encryption", "unlock", "p", "--password-file", &wrong], 3, &["p"]);
    m.ok(&["encryption", "unlock", "p", "--password-file", &right]);
    m.end();
}

/// A call that takes its time says so on a terminal, and nothing elsewhere.
#[test]
fn a_long_call_shows_that_it_goes_on() {
    let m = Machine::new();
    let wait = ["rpc", "bdev_get_bdevs", r#"{"name":"late","timeout":600000}"#, "-r", &m.sock];
    let mut terminal = Terminal::new(&wait);
    // Only the spinner has these words before the device is there.
    terminal.until("bdev_get_bdevs: ");
    let late = r#"{"name":"late","num_blocks":16,"block_size":4096}"#;
    m.ok(&["rpc", "bdev_malloc_create", late]);
    let (code, said) = terminal.end();
    assert!(code == Some(0) && said.contains("\"num_blocks\": 16"), "{code:?} {said}");
    m.end();
}
