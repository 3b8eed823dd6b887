//! The FIPS modes from the outside: what the program refuses, what it makes, what it tells.

mod common;

use std::path::Path;

use common::{Target, program, refused, start};
use serde_json::{Value, json};

/// The modes that this program can be started in.
const MODES: &[&str] = if cfg!(feature = "fips") { &["approved", "validated"] } else { &["approved"] };

fn call(dir: &Path, method: &str, params: Value) -> Result<Value, String> {
    let mut rpc = program();
    rpc.args(["rpc", "-r"]).arg(dir.join("s.sock")).arg(method);
    if !params.is_null() {
        rpc.arg(params.to_string());
    }
    let out = rpc.output().expect("the program runs");
    if out.status.success() {
        // Plain text is shown without its quotes.
        let text = String::from_utf8(out.stdout).expect("text");
        return Ok(serde_json::from_str(&text).unwrap_or_else(|_| text.trim().into()));
    }
    Err(String::from_utf8_lossy(&out.stderr).into_owned())
}

fn done(dir: &Path, method: &str, params: Value) -> Value {
    call(dir, method, params).unwrap_or_else(|e| panic!("{method}: {e}"))
}

fn refusal(dir: &Path, method: &str, params: Value, words: &[&str]) {
    let why = call(dir, method, params).expect_err(method);
    for word in words {
        assert!(why.contains(word), "{method}: no \"{word}\" in: {why}");
    }
}

fn disk(dir: &Path, name: &str) {
    let path = dir.join(name);
    if !path.exists() {
        std::fs::File::create(&path).and_then(|f| f.set_len(96 << 20)).expect("a file for a disk");
    }
    done(dir, "bdev_uring_create", json!({"name": name, "filename": path, "block_size": 4096}));
}

fn started(dir: &Path, mode: &str) -> Target {
    let target = start(dir, &["--fips-mode", mode]);
    assert!(target.ready.starts_with("cryptfold: ready"), "{mode}: {}", target.ready);
    assert_eq!(done(dir, "cryptfold_get_fips_mode", Value::Null)["mode"], mode);
    target
}

fn pool(name: &str, password: &str) -> Value {
    json!({"bdev_name": name, "lvs_name": name, "password": password})
}

/// The audit and the repair of a pool whose device nobody has open.
fn checks_offline(dir: &Path, name: &str, password: &str) {
    use std::os::unix::fs::PermissionsExt;
    let file = dir.join(format!("{name}.password"));
    std::fs::write(&file, password).expect("a file");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).expect("its mode");
    for more in [&[][..], &["--repair"]] {
        let mut check = program();
        check.args(["pool", "check"]).arg(dir.join(name)).arg("--password-file").arg(&file).args(more);
        let out = check.output().expect("the program runs");
        assert!(out.status.success(), "{name} {more:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
}

#[test]
fn validated_wants_the_module() {
    if cfg!(feature = "fips") {
        return;
    }
    refused(&["target", "--fips-mode", "validated"], 1, &["not its FIPS module", "scripts/fips build"]);
    refused(&["target", "--fips-mode", "strict"], 2, &["approved", "validated"]);
}

#[test]
fn each_mode_keeps_to_its_algorithms() {
    for mode in MODES {
        let temp = tempfile::tempdir().expect("a directory");
        let dir = temp.path();
        let off = started(dir, "off");
        disk(dir, "old");
        done(dir, "bdev_lvol_create_lvstore", pool("old", "correct horse"));
        let saved = json!({"name": "old", "password": "of the back-up", "filename": dir.join("backup")});
        done(dir, "cryptfold_encryption_backup", saved);
        off.end("-TERM");

        let on = started(dir, mode);
        disk(dir, "old");
        refusal(dir, "cryptfold_pool_open", json!({"base_bdev_name": "old"}), &["--fips-mode off", "copy"]);
        let back = json!({"base_bdev_name": "old", "filename": dir.join("backup"), "password": "of the back-up",
            "pool_password": "correct horse", "force": true});
        refusal(dir, "cryptfold_encryption_restore", back, &["backup", "Argon2id", "--fips-mode off"]);
        disk(dir, "new");
        refusal(dir, "bdev_lvol_create_lvstore", pool("new", "correct hors"), &["12 bytes", "14"]);
        let open = json!({"bdev_name": "new", "lvs_name": "new", "encrypt": false});
        refusal(dir, "bdev_lvol_create_lvstore", open, &["encrypted"]);
        done(dir, "bdev_lvol_create_lvstore", pool("new", "correct horse battery"));
        done(dir, "bdev_lvol_create", json!({"lvs_name": "new", "lvol_name": "v", "size_in_mib": 8}));
        let shown = done(dir, "cryptfold_encryption_status", json!({"name": "new"}));
        assert_eq!(shown["pools"][0]["approved"], true, "{shown}");
        assert_eq!(shown["pools"][0]["slots"][0]["kdf"]["name"], "pbkdf2-sha256", "{shown}");
        refusal(dir, "cryptfold_encryption_disable", json!({"name": "new"}), &["always encrypted"]);
        let rotated = json!({"name": "new"});
        done(dir, "cryptfold_encryption_rotate", rotated);
        on.end("-TERM");

        // The other way round: the pool stays what it is.
        let off = started(dir, "off");
        disk(dir, "new");
        let unlock = json!({"name": "new", "password": "correct horse battery"});
        done(dir, "cryptfold_encryption_unlock", unlock);
        let change =
            |new: &str| json!({"name": "new", "password": "correct horse battery", "new_password": new});
        refusal(dir, "cryptfold_encryption_passwd", change("too short"), &["9 bytes", "14"]);
        done(dir, "cryptfold_encryption_passwd", change("another horse battery"));
        off.end("-TERM");

        let on = started(dir, mode);
        disk(dir, "new");
        let unlock = json!({"name": "new", "password": "another horse battery"});
        done(dir, "cryptfold_encryption_unlock", unlock);
        assert_eq!(done(dir, "bdev_get_bdevs", json!({"name": "new/v"}))[0]["num_blocks"], 2048);
        on.end("-TERM");
        checks_offline(dir, "old", "correct horse");
        checks_offline(dir, "new", "another horse battery");
    }
}

#[test]
fn what_a_mode_does_not_have_is_refused() {
    for mode in MODES {
        let temp = tempfile::tempdir().expect("a directory");
        let dir = temp.path();
        let target = started(dir, mode);
        let told = done(dir, "cryptfold_get_fips_mode", Value::Null);
        let library = told["library"].as_str().expect("a name");
        assert_eq!(library.starts_with("AWS-LC FIPS "), cfg!(feature = "fips"), "{told}");
        let short: String = (0..16).map(|n| format!("{n:02x}")).collect();
        let tweak: String = (16..32).map(|n| format!("{n:02x}")).collect();
        let key = json!({"name": "k", "cipher": "AES_XTS", "key": short, "key2": tweak});
        let group = json!({"dhchap_dhgroups": ["ffdhe2048"]});
        if *mode == "validated" {
            assert_eq!(told["certificate"]["number"], "#5314", "{told}");
            let services = told["services"].as_array().expect("a list");
            assert!(services.len() > 12 && services.iter().all(|s| s["approved"] == true), "{told}");
            refusal(dir, "accel_crypto_key_create", key, &["AES-128-XTS", "64 bytes"]);
            refusal(dir, "nvmf_set_config", group, &["ffdhe2048", "null"]);
            let kernel = json!({"impl_name": "ssl", "enable_ktls": true});
            refusal(dir, "sock_impl_set_options", kernel, &["enable_ktls", "kernel"]);
        } else {
            assert_eq!((&told["certificate"], &told["services"]), (&Value::Null, &Value::Null), "{told}");
            done(dir, "accel_crypto_key_create", key);
            done(dir, "nvmf_set_config", group);
            done(dir, "sock_impl_set_options", json!({"impl_name": "ssl", "enable_ktls": true}));
        }
        target.end("-TERM");
    }
}
