//! The audit log and the roles of a running target, from outside.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest wait for what has to happen, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(120);
const PROGRAM: &str = env!("CARGO_BIN_EXE_cryptfold");

struct Target {
    child: Child,
    dir: PathBuf,
}

impl Target {
    fn start(dir: &Path, more: &[&str]) -> Target {
        Target::spawn(dir, Command::new(PROGRAM), more)
    }

    fn spawn(dir: &Path, mut command: Command, more: &[&str]) -> Target {
        let child = command
            .args(["target", "--no-huge", "--idle", "interrupt", "-r"])
            .arg(dir.join("s.sock"))
            .arg("--keys")
            .arg(dir.join("keys"))
            .arg("--audit-log")
            .arg(dir.join("audit.log"))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::options().create(true).append(true).open(dir.join("log")).unwrap())
            .spawn()
            .unwrap();
        let mut target = Target { child, dir: dir.into() };
        let mut ready = String::new();
        BufReader::new(target.child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        assert!(ready.contains("ready"), "{}", target.log());
        target
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap()
    }

    fn rpc(&self, method: &str, params: &Value) -> Output {
        let params = params.to_string();
        run(&["rpc", "-r", self.dir.join("s.sock").to_str().unwrap(), method, &params])
    }

    fn ok(&self, method: &str, params: Value) {
        let out = self.rpc(method, &params);
        assert!(out.status.success(), "{method}: {}", String::from_utf8_lossy(&out.stderr));
    }

    fn end(mut self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        wait("the target's end", || self.child.try_wait().unwrap().is_some());
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let limit = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < limit, "not within two minutes: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn run(args: &[&str]) -> Output {
    Command::new(PROGRAM).args(args).stdin(Stdio::null()).output().unwrap()
}

/// Standard output of a success, standard error of a failure.
fn verify(more: &[&str], file: &Path) -> Result<String, String> {
    let out = run(&[&["audit", "verify"], more, &[file.to_str().unwrap()]].concat());
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if out.status.success() { Ok(text(out.stdout)) } else { Err(text(out.stderr)) }
}

fn records(file: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap();
    text.lines().map_while(|l| serde_json::from_str(l).ok()).collect()
}

const KEY: &str = "00112233445566778899aabbccddeeff";
const KEY2: &str = "ffeeddccbbaa99887766554433221100";

#[test]
fn changes_are_recorded_without_secrets_and_a_kill_does_not_break_the_chain() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("audit.log");
    let target = Target::start(dir.path(), &[]);
    target.ok("bdev_malloc_create", json!({"name": "m", "num_blocks": 64, "block_size": 512}));
    target.ok("accel_crypto_key_create", json!({"name": "k", "cipher": "AES_XTS", "key": KEY, "key2": KEY2}));
    target.ok("bdev_get_bdevs", json!({}));
    assert!(!target.rpc("bdev_malloc_delete", &json!({"name": "none"})).status.success());
    let changes =
        || -> Vec<Value> { records(&file).into_iter().filter(|r| r["event"] == "configuration").collect() };
    wait("the records", || changes().len() == 3);
    target.end("-KILL");
    let all = changes();
    let methods: Vec<&str> = all.iter().map(|r| r["method"].as_str().unwrap()).collect();
    assert_eq!(methods, ["bdev_malloc_create", "accel_crypto_key_create", "bdev_malloc_delete"]);
    assert_eq!(all[0]["params"], json!({"name": "m", "num_blocks": 64, "block_size": 512}));
    assert_eq!(
        all[1]["params"],
        json!({"name": "k", "cipher": "AES_XTS", "key": "(secret)", "key2": "(secret)"})
    );
    assert_eq!((&all[2]["code"], &all[0]["code"]), (&json!(-19), &Value::Null));
    assert!(all.iter().all(|r| r["by"].as_str().unwrap().starts_with("uid ")));

    let target = Target::start(dir.path(), &[]);
    target.end("-TERM");
    let said = verify(&[], &file).unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(said.contains(&format!("records 1 to {}", text.lines().count())), "{said}");
    let parts: Value = serde_json::from_str(&verify(&["--json"], &file).unwrap()).unwrap();
    assert_eq!(parts[0]["last"]["seq"], json!(text.lines().count()));
    assert_eq!(parts[0]["last"]["hash"], records(&file).last().unwrap()["hash"]);
    assert_eq!((&parts[0]["first"]["seq"], &parts[0]["torn_bytes"]), (&json!(1), &json!(0)));
    assert!(!text.contains(KEY) && !text.contains(KEY2));
    let opened = records(&file).iter().filter(|r| r["event"] == "audit log opened").count();
    assert_eq!((opened, &records(&file).last().unwrap()["event"]), (2, &json!("audit log closed")));
    let shown = run(&["audit", "show", file.to_str().unwrap()]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("configuration") && shown.contains("method=accel_crypto_key_create"), "{shown}");
    let json = run(&["audit", "show", "--json", file.to_str().unwrap()]);
    assert_eq!(String::from_utf8(json.stdout).unwrap(), text);
}

#[test]
fn what_was_done_to_a_log_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("audit.log");
    let target = Target::start(dir.path(), &[]);
    for name in ["a", "b", "c"] {
        target.ok("bdev_malloc_create", json!({"name": name, "num_blocks": 64, "block_size": 512}));
    }
    target.end("-TERM");
    let text = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let head = records(&file).last().unwrap()["hash"].as_str().unwrap().to_owned();
    let with = |lines: &[&str]| std::fs::write(&file, lines.join("\n") + "\n").unwrap();
    assert!(verify(&["--head", &head], &file).is_ok());
    // The program's own log has the last hash, too.
    assert!(std::fs::read_to_string(dir.path().join("log")).unwrap().contains(&head));

    let at = lines.iter().position(|l| l.contains("\"b\"")).unwrap();
    let mut edited = lines.clone();
    let replaced = lines[at].replace("\"b\"", "\"x\"");
    edited[at] = &replaced;
    with(&edited);
    let e = verify(&[], &file).unwrap_err();
    assert!(e.contains(&format!("line {}", at + 1)) && e.contains("has been changed"), "{e}");
    let shown = run(&["audit", "show", file.to_str().unwrap()]);
    assert_eq!(shown.status.code(), Some(1));
    // The one that was changed, and the next one, which continues another.
    assert_eq!(String::from_utf8(shown.stdout).unwrap().lines().count(), lines.len() - 2);

    with(&[&lines[..2], &lines[3..]].concat());
    assert!(verify(&[], &file).unwrap_err().contains("does not continue"));

    // An end that is cut off shows only against a hash that was noted.
    with(&lines[..lines.len() - 1]);
    assert!(verify(&[], &file).is_ok());
    let e = verify(&["--head", &head], &file).unwrap_err();
    assert!(e.contains("cut off"), "{e}");
    let e = verify(&["--head", "00"], &file).unwrap_err();
    assert!(e.contains("no hash"), "{e}");
    assert!(verify(&[], &dir.path().join("none")).unwrap_err().contains("No such file"));
}

/// The file may not grow any more, which is what a full disk looks like (a part of a write arrives, then it fails). The target
/// answers as before, says so, and writes what has waited when there is room.
#[test]
fn a_full_disk_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("audit.log");
    let mut command = Command::new("sh");
    // An ignored SIGXFSZ leaves the error. 8 KiB; dash counts in units of 512 bytes.
    command.args(["-c", "trap '' XFSZ; ulimit -S -f 16; exec \"$@\"", "sh", PROGRAM]);
    let target = Target::spawn(dir.path(), command, &[]);
    let flag = |n: usize| {
        target.ok(if n.is_multiple_of(2) { "log_set_flag" } else { "log_clear_flag" }, json!({"flag": "rpc"}))
    };
    let full = || target.log().contains("can not be written");
    let mut calls = 0;
    while !full() {
        flag(calls);
        calls += 1;
        assert!(calls < 2000, "it never gets full");
    }
    let size = std::fs::metadata(&file).unwrap().len();
    (0..10).for_each(|n| flag(calls + n));
    calls += 10;
    assert!(std::fs::metadata(&file).unwrap().len() <= 8192 && size <= 8192);
    let limit = ["--pid", &target.child.id().to_string(), "--fsize=unlimited"];
    assert!(Command::new("prlimit").args(limit).status().unwrap().success());
    wait("room", || target.log().contains("is written again"));
    target.end("-TERM");
    verify(&[], &file).unwrap();
    let recorded = records(&file).iter().filter(|r| r["event"] == "configuration").count();
    assert_eq!(recorded, calls, "nothing is lost");
}

/// Calls of a configuration are those of whoever has it loaded; at the start they are the target's.
#[test]
fn what_a_configuration_calls_is_its_loaders() {
    let dir = tempfile::tempdir().unwrap();
    let config = |name: &str| {
        json!({"subsystems": [{"subsystem": "bdev", "config": [
            {"method": "bdev_malloc_create", "params": {"name": name, "num_blocks": 64, "block_size": 512}}]}]})
    };
    let start = dir.path().join("start.json");
    std::fs::write(&start, config("first").to_string()).unwrap();
    let target = Target::start(dir.path(), &["-c", start.to_str().unwrap()]);
    target.ok("load_config", json!({"config": config("second")}));
    // One that loads itself ends, with an error.
    let own = dir.path().join("own.json");
    let load = json!({"method": "load_config", "params": {"filename": own}});
    std::fs::write(&own, json!({"subsystems": [{"subsystem": "bdev", "config": [load]}]}).to_string())
        .unwrap();
    let out = target.rpc("load_config", &json!({"filename": own}));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("Too many levels"), "{said}");
    target.end("-TERM");
    let file = dir.path().join("audit.log");
    verify(&[], &file).unwrap();
    let all = records(&file);
    let made = |name: &str| all.iter().find(|r| r["params"]["name"] == name).unwrap();
    let (first, second) = (made("first"), made("second"));
    assert_eq!(
        (&first["by"], &first["roles"], &first["within"]),
        (&json!("the target"), &Value::Null, &Value::Null)
    );
    assert!(second["by"].as_str().unwrap().starts_with("uid 0 "), "{second}");
    assert_eq!(
        (&second["roles"], &second["within"]),
        (&json!("viewer, operator, security"), &json!("load_config"))
    );
    let loads = all.iter().filter(|r| r["method"] == "load_config" && r["by"] == second["by"]).count();
    assert_eq!(loads, 1);
}

/// What was recorded before is in the file when the program is killed through its socket, and so is who did it.
#[test]
fn a_kill_by_request_is_the_last_record() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = Target::start(dir.path(), &[]);
    target.ok("bdev_malloc_create", json!({"name": "m", "num_blocks": 64, "block_size": 512}));
    // It does not live long enough to answer.
    target.rpc("spdk_kill_instance", &json!({"sig_name": "SIGKILL"}));
    wait("the target's end", || target.child.try_wait().unwrap().is_some());
    let file = dir.path().join("audit.log");
    verify(&[], &file).unwrap();
    let all = records(&file);
    let last = all.last().unwrap();
    assert_eq!(last["event"], "killed by request");
    assert!(last["by"].as_str().unwrap().starts_with("uid 0 "), "{last}");
    assert_eq!(all[all.len() - 2]["method"], "bdev_malloc_create");
}

/// A user that is not root calls the program; it has to be somewhere where that user can start it.
struct Other {
    program: PathBuf,
    socket: PathBuf,
}

impl Other {
    fn call(&self, id: u32, method: &str, params: &Value) -> Result<String, String> {
        let out = Command::new(&self.program)
            .args(["rpc", "-r", self.socket.to_str().unwrap(), method, &params.to_string()])
            .stdin(Stdio::null())
            .current_dir("/")
            .gid(id)
            .uid(id)
            .output()
            .expect("another user's process: this test runs as root");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        if out.status.success() { Ok(text(out.stdout)) } else { Err(text(out.stderr)) }
    }
}

/// Users as the kernel knows them, each with one role, and one without.
#[test]
fn each_role_may_do_its_own_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let other = Other { program: dir.path().join("cryptfold"), socket: dir.path().join("s.sock") };
    std::fs::copy(PROGRAM, &other.program).unwrap();
    let (viewer, operator, security, nobody) = (61_001, 61_002, 61_003, 61_004);
    let roles = ["viewer=uid:61001", "operator=gid:61002", "security=uid:61003"];
    let grants: Vec<&str> = roles.iter().flat_map(|r| ["--role", r]).collect();
    let target = Target::start(dir.path(), &grants);
    let file = dir.path().join("file");
    let create = |name: &str| json!({"name": name, "num_blocks": 64, "block_size": 512});
    let key = json!({"name": "k", "cipher": "AES_XTS", "key": KEY, "key2": KEY2});
    let reads = ("bdev_get_bdevs", json!({}));
    let stores = ("bdev_malloc_create", create("m"));
    let keys = ("accel_crypto_key_create", key);
    let both = ("save_config", json!({"filename": file}));
    for (id, may) in [
        (viewer, [true, false, false, false]),
        (operator, [true, true, false, false]),
        (security, [true, false, true, false]),
        (nobody, [false; 4]),
    ] {
        for ((method, params), may) in [&reads, &stores, &keys, &both].into_iter().zip(may) {
            match other.call(id, method, params) {
                Ok(_) => assert!(may, "{id} was allowed {method}"),
                Err(e) => {
                    assert!(!may, "{id} was not allowed {method}: {e}");
                    assert!(e.contains("Operation not permitted"), "{e}");
                }
            }
        }
    }
    assert!(!file.exists());
    let e = other.call(viewer, stores.0, &create("n")).unwrap_err();
    assert!(e.contains("the role operator is needed") && e.contains("uid 61001 has viewer"), "{e}");
    let raw = other.call(operator, "load_config", &json!({"config": {"subsystems": []}})).unwrap_err();
    assert!(raw.contains("operator and security"), "{raw}");
    // Root may do everything, as ever.
    target.ok(stores.0, create("n"));
    target.ok(both.0, both.1.clone());
    target.end("-TERM");
    let log = dir.path().join("audit.log");
    verify(&[], &log).unwrap();
    let refused: Vec<Value> = records(&log).into_iter().filter(|r| r["event"] == "call refused").collect();
    let by = |id: u32| {
        refused.iter().filter(|r| r["by"].as_str().unwrap().starts_with(&format!("uid {id} "))).count()
    };
    assert_eq!((by(viewer), by(operator), by(security), by(nobody)), (4, 3, 2, 4));
    assert!(!std::fs::read_to_string(&log).unwrap().contains(KEY));
}

/// A user who tries again and again takes a few records a minute, and the others are counted.
#[test]
fn refusals_do_not_fill_the_log_and_none_is_lost() {
    const CALLS: u64 = 60;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let other = Other { program: dir.path().join("cryptfold"), socket: dir.path().join("s.sock") };
    std::fs::copy(PROGRAM, &other.program).unwrap();
    let target = Target::start(dir.path(), &["--role", "viewer=uid:61001"]);
    for _ in 0..CALLS {
        other.call(61_001, "bdev_malloc_delete", &json!({"name": "m"})).unwrap_err();
    }
    other.call(61_001, "bdev_null_delete", &json!({"name": "m"})).unwrap_err();
    target.end("-TERM");
    let log = dir.path().join("audit.log");
    verify(&[], &log).unwrap();
    let all = records(&log);
    let of = |event: &str, method: &str| -> Vec<Value> {
        all.iter().filter(|r| r["event"] == event && r["method"] == method).cloned().collect()
    };
    let alone = of("call refused", "bdev_malloc_delete");
    let rest: Vec<&Value> = all.iter().filter(|r| r["event"] == "more calls refused").collect();
    let counted: u64 = rest.iter().map(|r| r["calls"].as_u64().unwrap()).sum();
    // However many minutes it took.
    assert_eq!(alone.len() as u64 + counted, CALLS);
    assert!(alone.len() >= 10 && !rest.is_empty(), "{} and {rest:?}", alone.len());
    assert!(rest.iter().all(|r| r["by"].as_str().unwrap().starts_with("uid 61001 ")));
    assert!(rest.iter().all(|r| r["methods"] == format!("bdev_malloc_delete: {}", r["calls"])));
    assert_eq!(of("call refused", "bdev_null_delete").len(), 1);
}

/// Nobody but root and the target's user reaches the socket then.
#[test]
fn without_roles_others_do_not_reach_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let other = Other { program: dir.path().join("cryptfold"), socket: dir.path().join("s.sock") };
    std::fs::copy(PROGRAM, &other.program).unwrap();
    let target = Target::start(dir.path(), &[]);
    assert!(other.call(61_001, "bdev_get_bdevs", &json!({})).unwrap_err().contains("Permission denied"));
    target.ok("bdev_get_bdevs", json!({}));
    target.end("-TERM");
    for bad in ["viewer", "root=uid:1", "viewer=uid:x"] {
        let out = run(&["target", "--role", bad]);
        assert_eq!(out.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&out.stderr).contains("ROLE=uid:NUMBER"));
    }
}
