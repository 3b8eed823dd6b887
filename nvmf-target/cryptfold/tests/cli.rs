//! The program from outside: exit codes, one line per error, start, end, status.

mod common;

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{PATIENCE, program, refused, run, start};

#[test]
fn wrong_usage_and_wrong_configurations() {
    let dir = tempfile::tempdir().unwrap();
    let path = |n: &str| dir.path().join(n).to_str().unwrap().to_string();
    let (sock, conf) = (path("s.sock"), path("c.json"));
    refused(&["nonsense"], 2, &["unrecognized"]);
    refused(&["rpc"], 2, &["METHOD"]);
    refused(&["rpc", "spdk_get_version", "{", "-r", &sock], 2, &["not JSON"]);
    refused(&["target", "--cores", "x"], 2, &["--cores"]);
    refused(&["target", "--cores", "1000", "-r", &sock], 1, &["no CPU 1000"]);
    refused(&["target", "-c", &conf, "-r", &sock], 1, &["c.json", "No such file"]);
    refused(&["rpc", "spdk_get_version", "-r", &sock], 1, &["s.sock", "no target answers"]);
    for (text, words) in [
        ("{", vec!["c.json:1:"]),
        ("{\"subsystems\": 5}", vec!["c.json", "subsystems"]),
        (
            r#"{"subsystems":[{"subsystem":"bdev","config":[{"method":"bdev_maloc_create"}]}]}"#,
            vec!["config[0] (bdev_maloc_create)", "did you mean bdev_malloc_create?"],
        ),
        (
            r#"{"subsystems":[{"subsystem":"bdev","config":[{"method":"bdev_malloc_create","params":{"name":5}}]}]}"#,
            vec![
                "config[0] (bdev_malloc_create)",
                "Invalid parameters: name: 5 was given; a string is needed",
            ],
        ),
        (
            r#"{"subsystems":[{"subsystem":"bdev","config":[
            {"method":"bdev_uring_create","params":{"name":"u","filename":"/nonexistent/disk"}}]}]}"#,
            vec!["bdev_uring_create", "/nonexistent/disk", "No such file"],
        ),
    ] {
        std::fs::write(&conf, text).unwrap();
        refused(&["target", "-c", &conf, "-r", &sock], 1, &words);
        assert!(!Path::new(&sock).exists(), "the socket is gone again");
    }
}

#[test]
fn a_port_in_use_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let conf = dir.path().join("c.json");
    let text = r#"{"subsystems":[{"subsystem":"nvmf","config":[
        {"method":"nvmf_create_transport","params":{"trtype":"TCP"}},
        {"method":"nvmf_create_subsystem","params":{"nqn":"nqn.2026-01.io.cryptfold:p"}},
        {"method":"nvmf_subsystem_add_listener","params":{"nqn":"nqn.2026-01.io.cryptfold:p",
            "listen_address":{"trtype":"TCP","traddr":"127.0.0.1","trsvcid":"PORT"}}}]}]}"#;
    std::fs::write(&conf, text.replace("PORT", &port)).unwrap();
    let sock = dir.path().join("s.sock");
    refused(
        &["target", "-c", conf.to_str().unwrap(), "-r", sock.to_str().unwrap()],
        1,
        &[&port, "config[2]"],
    );
}

#[test]
fn start_status_and_end() {
    let dir = tempfile::tempdir().unwrap();
    let conf = dir.path().join("c.json");
    let text = r#"{"subsystems":[
        {"subsystem":"bdev","config":[
            {"method":"bdev_malloc_create","params":{"name":"M0","num_blocks":1024,"block_size":4096}}]},
        {"subsystem":"nvmf","config":[
            {"method":"nvmf_create_transport","params":{"trtype":"TCP"}},
            {"method":"nvmf_create_subsystem","params":{"nqn":"nqn.2026-01.io.cryptfold:s","allow_any_host":true}},
            {"method":"nvmf_subsystem_add_ns","params":{"nqn":"nqn.2026-01.io.cryptfold:s","namespace":{"bdev_name":"M0"}}},
            {"method":"nvmf_subsystem_add_listener","params":{"nqn":"nqn.2026-01.io.cryptfold:s",
                "listen_address":{"trtype":"TCP","traddr":"127.0.0.1","trsvcid":"0"}}}]}]} // fine"#;
    std::fs::write(&conf, text).unwrap();
    let sock = dir.path().join("s.sock");
    let sock = sock.to_str().unwrap();
    for signal in ["-TERM", "-INT"] {
        let t = start(dir.path(), &["-c", conf.to_str().unwrap()]);
        assert!(
            t.ready.contains("ready; RPC on") && t.ready.contains("nqn.2026-01.io.cryptfold:s on 127.0.0.1:")
        );
        refused(&["target", "-r", sock], 1, &["already in use"]);
        let out = run(&["status", "-r", sock]);
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && text.contains("1=M0") && text.contains("app_thread"), "{text}");
        let out = run(&["status", "--json", "-r", sock]);
        assert!(String::from_utf8_lossy(&out.stdout).contains("\"busy_pct\""));
        refused(
            &["rpc", "bdev_get_bdevs", r#"{"name":"none"}"#, "-r", sock],
            1,
            &["bdev_get_bdevs", "No such device"],
        );
        assert_eq!(t.end(signal), Some(0));
        assert!(!Path::new(sock).exists());
    }
}

#[test]
fn page_metrics_and_health_over_http() {
    refused(&["target", "--http", "0.0.0.0:0"], 1, &["HTTP", "token is needed"]);
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("token");
    std::fs::write(&empty, " \n").unwrap();
    refused(
        &["target", "--http", "127.0.0.1:0", "--http-token", empty.to_str().unwrap()],
        1,
        &["the file is empty"],
    );
    let conf = dir.path().join("c.json");
    let text = r#"{"subsystems":[{"subsystem":"bdev","config":[
        {"method":"bdev_malloc_create","params":{"name":"M0","num_blocks":1024,"block_size":4096}}]}]}"#;
    std::fs::write(&conf, text).unwrap();
    let t = start(dir.path(), &["-c", conf.to_str().unwrap(), "--http", "127.0.0.1:0"]);
    let address = t.ready.split("http://").nth(1).and_then(|rest| rest.split('/').next()).unwrap();
    let get = |path: &str| {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
        let mut out = String::new();
        stream.read_to_string(&mut out).unwrap();
        out
    };
    // A look is a second old at most: the first one may be of before the configuration.
    let since = std::time::Instant::now();
    loop {
        let metrics = get("/metrics");
        if metrics.contains("cryptfold_bdev_size_bytes{bdev=\"M0\",alias=\"\"} 4194304") {
            break;
        }
        assert!(since.elapsed().as_secs() < 120, "{metrics}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(get("/healthz").contains("\"ok\""));
    assert!(get("/").contains("<title>"));
    // The page, the RPC and `top` say the same.
    let answer = get("/api/v1/snapshot");
    let seen: serde_json::Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    let sock = dir.path().join("s.sock");
    let out = run(&["rpc", "cryptfold_get_overview", "-r", sock.to_str().unwrap()]);
    let told: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let keys = |v: &serde_json::Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(
        (keys(&seen), &seen["devices"][0]["size_bytes"]),
        (keys(&told), &told["devices"][0]["size_bytes"])
    );
    assert_eq!(
        (&seen["devices"][0]["name"], &seen["state"]),
        (&serde_json::json!("M0"), &serde_json::json!("running"))
    );
    let erring = ["rpc", "bdev_error_create", r#"{"base_name":"M0"}"#, "-r", sock.to_str().unwrap()];
    assert!(run(&erring).status.success());
    let out = run(&["top", "--once", "-r", sock.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && text.contains("EE_M0") && text.contains("running"), "{text}");
    assert_eq!(t.end("-TERM"), Some(0));
}

#[test]
fn waiting_for_rpc() {
    let dir = tempfile::tempdir().unwrap();
    let sock = dir.path().join("s.sock");
    let sock = sock.to_str().unwrap().to_string();
    std::thread::scope(|s| {
        let t = s.spawn(|| start(dir.path(), &["--wait-for-rpc"]));
        let limit = Instant::now() + PATIENCE;
        while !run(&["rpc", "spdk_get_version", "-r", &sock]).status.success() {
            assert!(Instant::now() < limit);
            std::thread::sleep(Duration::from_millis(20));
        }
        refused(&["rpc", "bdev_get_bdevs", "-r", &sock], 1, &["framework_start_init"]);
        assert!(run(&["rpc", "framework_start_init", "-r", &sock]).status.success());
        assert!(run(&["rpc", "framework_wait_init", "-r", &sock]).status.success());
        assert!(run(&["rpc", "bdev_get_bdevs", "-r", &sock]).status.success());
        assert_eq!(t.join().unwrap().end("-TERM"), Some(0));
    });
}

#[test]
fn a_pool_is_checked_online_and_offline() {
    let dir = tempfile::tempdir().unwrap();
    let path = |n: &str| dir.path().join(n).to_str().unwrap().to_string();
    let (disk, sock, keys, conf) = (path("disk.img"), path("s.sock"), path("keys"), path("c.json"));
    std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let text = r#"{"subsystems":[{"subsystem":"bdev","config":[
        {"method":"bdev_uring_create","params":{"name":"u","filename":"DISK","block_size":4096}},
        {"method":"bdev_lvol_create_lvstore","params":{"bdev_name":"u","lvs_name":"p","memory_budget_mib":16}},
        {"method":"bdev_lvol_create","params":{"lvs_name":"p","lvol_name":"v","size_in_mib":16}}]}]}"#;
    std::fs::write(&conf, text.replace("DISK", &disk)).unwrap();
    let check =
        |more: &[&str]| run(&[&["pool", "check", "--json", "--keys", &keys, "-r", &sock], more].concat());
    let t = start(dir.path(), &["-c", &conf]);
    for more in [&["p"][..], &["p", "--data", "--repair"]] {
        let out = check(more);
        assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("\"clean\": true"));
    }
    let pool = |more: &[&str]| {
        let out = run(&[&["pool"], more, &["-r", &sock]].concat());
        assert!(out.status.success(), "{more:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    assert!(pool(&["dedupe", "p", "status", "--json"]).contains("\"never\""));
    assert!(pool(&["dedupe", "p", "--json"]).contains("\"running\""));
    assert!(pool(&["scrub", "p", "status", "--json"]).contains("\"never\""));
    assert!(pool(&["scrub", "p", "--rate", "50", "--json"]).contains("\"bytes_per_s\": 50000000"));
    let limit = Instant::now() + PATIENCE;
    while !pool(&["scrub", "p", "status", "--json"]).contains("\"done\"") {
        assert!(Instant::now() < limit, "the scrub of an empty pool does not end");
    }
    // What the log says are events for people, too.
    let seen = run(&["rpc", "cryptfold_get_overview", "-r", &sock]);
    let text = String::from_utf8_lossy(&seen.stdout);
    assert!(text.contains("scrub begins: pool p") && text.contains("scrub ended: pool p"), "{text}");
    // The file grows under the running target.
    std::fs::OpenOptions::new().write(true).open(&disk).unwrap().set_len(192 << 20).unwrap();
    assert!(run(&["rpc", "bdev_uring_rescan", r#"{"name":"u"}"#, "-r", &sock]).status.success());
    pool(&["grow", "p"]);
    assert!(pool(&["list", "--json"]).contains(&format!("\"max_growable_size\": {}", 192u64 << 20)));
    // The running target holds the file.
    let out = check(&[&disk]);
    assert!(out.status.code() == Some(1) && String::from_utf8_lossy(&out.stderr).contains("lock"));
    assert_eq!(t.end("-TERM"), Some(0));
    let before = std::fs::read(&disk).unwrap();
    let out = check(&[&disk, "--data"]);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success() && text.contains("\"clean\": true"),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(text.contains("\"volumes\": 1"), "{text}");
    assert!(std::fs::read(&disk).unwrap() == before, "a check wrote");
    assert!(check(&[&disk, "--repair"]).status.success());
    // Without its key, without a pool, without a file.
    refused(&["pool", "check", &disk, "--keys", &path("none")], 1, &["no key at hand", "disk.img"]);
    std::fs::File::create(path("empty.img")).unwrap().set_len(64 << 20).unwrap();
    refused(&["pool", "check", &path("empty.img"), "--keys", &keys], 1, &["empty.img carries no pool"]);
    refused(&["pool", "check", &path("none.img")], 1, &["none.img", "No such file"]);
}

/// From a pool to the line that a host types, and back.
#[test]
fn a_volume_is_exported_seen_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let path = |n: &str| dir.path().join(n).to_str().unwrap().to_string();
    let (sock, conf) = (path("s.sock"), path("c.json"));
    let text = r#"{"subsystems":[{"subsystem":"bdev","config":[
        {"method":"bdev_malloc_create","params":{"name":"M0","num_blocks":16384,"block_size":4096}}]}]}"#;
    std::fs::write(&conf, text).unwrap();
    let t = start(dir.path(), &["-c", &conf]);
    let ok = |args: &[&str]| {
        let out = run(&[args, &["-r", &sock]].concat());
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    refused(&["connect", "-r", &sock], 1, &["volume create --export"]);
    ok(&["pool", "create", "M0", "p", "--memory-budget", "16M"]);
    let made = ok(&["volume", "create", "p/v", "--size", "8M", "--export", "--listen", "127.0.0.1:0"]);
    let (uuid, line) = made.trim_end().split_once('\n').unwrap();
    assert!(line.starts_with("nvme connect -t tcp -a 127.0.0.1 -s ") && !line.contains("-s 0 "), "{line}");
    assert!(line.ends_with(&format!("-n nqn.2014-08.org.nvmexpress:uuid:{uuid}")), "{line}");
    // A second one listens where the first does, and lets in one host only.
    let host = "nqn.2026-01.io.cryptfold:h";
    let second = ok(&[
        "volume",
        "create",
        "p/w",
        "8M",
        "--export",
        "--nqn",
        "nqn.2026-01.io.cryptfold:w",
        "--host",
        host,
    ]);
    let port =
        |line: &str| line.split("-s ").nth(1).and_then(|rest| rest.split(' ').next()).map(str::to_owned);
    assert_eq!(port(second.trim_end()), port(line));
    assert_eq!(
        ok(&["connect", "nqn.2026-01.io.cryptfold:w"]).trim_end(),
        second.trim_end().split_once('\n').unwrap().1
    );
    assert_eq!(ok(&["connect"]).lines().count(), 2);
    let hosts = ok(&["rpc", "nvmf_get_subsystems", r#"{"nqn":"nqn.2026-01.io.cryptfold:w"}"#]);
    assert!(hosts.contains(host) && hosts.contains("\"allow_any_host\": false"), "{hosts}");
    // What fails leaves nothing behind, so that it can be given again.
    let again = ["volume", "create", "p/x", "8M", "--export", "--listen", "203.0.113.1:4420", "-r", &sock];
    refused(&again, 1, &["203.0.113.1"]);
    refused(&again, 1, &["203.0.113.1"]);
    assert_eq!(ok(&["connect"]).lines().count(), 2);
    let screen = ok(&["top", "--once"]);
    assert!(screen.contains("p/v") && screen.contains("% busy") && screen.contains("I/O queues"), "{screen}");
    refused(&["top", "-r", &sock], 2, &["no terminal", "--once"]);
    refused(&["volume", "delete", "p/w", "-r", &sock], 2, &["delete p/w", "--yes"]);
    refused(&["pool", "delete", "p", "-r", &sock], 2, &["delete pool p", "--yes"]);
    refused(&["volume", "delete", "p/w", "--yes", "-r", &sock], 1, &["p/w is claimed by NVMe-oF Target"]);
    ok(&["rpc", "nvmf_delete_subsystem", r#"{"nqn":"nqn.2026-01.io.cryptfold:w"}"#]);
    ok(&["volume", "delete", "p/w", "--yes"]);
    ok(&["pool", "close", "p"]);
    ok(&["pool", "open", "M0"]);
    assert!(ok(&["volume", "list"]).contains("p/v"));
    ok(&["pool", "delete", "p", "-y"]);
    assert_eq!(ok(&["pool", "list"]), "none\n");
    assert_eq!(t.end("-TERM"), Some(0));
}

/// Nobody reads what a command prints: it ends like others, without words.
#[test]
fn a_closed_pipe() {
    use std::os::unix::process::ExitStatusExt as _;
    let mut child =
        program().args(["completion", "bash"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stderr), "");
    assert!(out.status.success() || out.status.signal() == Some(13), "{}", out.status);
}

#[test]
fn completion_and_manual_pages() {
    let dir = tempfile::tempdir().unwrap();
    let out = run(&["completion", "bash"]);
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("complete -F"));
    let pages = dir.path().join("man");
    assert!(run(&["man", pages.to_str().unwrap()]).status.success());
    for page in ["cryptfold.1", "cryptfold-volume-create.1", "cryptfold-top.1"] {
        assert!(std::fs::read_to_string(pages.join(page)).unwrap().contains(".TH"), "{page}");
    }
}

/// `docs/configuration.md` ends with what the program says of itself.
#[test]
fn the_configuration_reference_is_the_programs() {
    let out = run(&["target", "--doc"]);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && text.contains("`-c`, `--config FILE`"), "{text}");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.md");
    let document = std::fs::read_to_string(path).unwrap();
    let (_, generated) = document.split_once("compares it with the program. -->\n\n").unwrap();
    assert!(generated == text, "docs/configuration.md: replace its last part by `cryptfold target --doc`");
}
