//! The program, and a target of it.

#![allow(dead_code, reason = "each test file takes what it needs")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub fn program() -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_cryptfold"));
    c.env_remove("CRYPTFOLD_KEYS").stdin(Stdio::null());
    c
}

pub fn run(args: &[&str]) -> Output {
    program().args(args).output().unwrap()
}

/// The error is one line, and the code is as promised.
pub fn refused(args: &[&str], code: i32, words: &[&str]) {
    let out = run(args);
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {err}");
    for w in words {
        assert!(err.contains(w), "{args:?}: no \"{w}\" in: {err}");
    }
    if code == 1 {
        let lines = err.lines().filter(|l| l.starts_with("cryptfold: ")).count();
        assert_eq!(lines, 1, "{args:?}: {err}");
    }
    assert!(out.stdout.is_empty(), "{args:?}");
}

/// Longest wait for what has to happen, on a machine that is busy.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub struct Target {
    child: Child,
    /// What it said when it was ready.
    pub ready: String,
}

pub fn start(dir: &Path, more: &[&str]) -> Target {
    let mut child = program()
        .args(["target", "--idle", "interrupt", "-r"])
        .arg(dir.join("s.sock"))
        .arg("--keys")
        .arg(dir.join("keys"))
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    Target { child, ready }
}

impl Target {
    pub fn end(mut self, signal: &str) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        let limit = Instant::now() + PATIENCE;
        while Instant::now() < limit {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the target did not end");
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
