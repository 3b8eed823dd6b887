//! A host with LUKS in user space: the real `cryptsetup` on files.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// A host's files, and its volume key.
pub struct Host {
    /// Where they lie.
    pub dir: TempDir,
    /// The volume key, which is also the passphrase of its keyslots.
    pub key: Vec<u8>,
}

impl Host {
    /// A host with a random volume key of so many bytes.
    pub fn new(key_bytes: usize) -> Host {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut key = vec![0; key_bytes];
        let mut random = std::fs::File::open("/dev/urandom").expect("random bytes");
        std::io::Read::read_exact(&mut random, &mut key).expect("random bytes");
        std::fs::write(dir.path().join("key"), &key).expect("room for a key");
        Host { dir, key }
    }

    /// Path of a file.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A file of this size: text of our own sources, then zeros.
    pub fn file(&self, name: &str, size: u64) -> Vec<u8> {
        let mut content = include_str!("cryptsetup.rs").repeat(80).into_bytes();
        content.resize(size as usize, 0);
        std::fs::write(self.path(name), &content).expect("room for a file");
        content
    }

    /// Runs it with these arguments, split at blanks.
    pub fn cryptsetup(&self, args: &str) {
        let mut command = Command::new("cryptsetup");
        command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
        let done =
            command.args(args.split_whitespace()).current_dir(self.dir.path()).stdin(Stdio::null()).output();
        let done = done.unwrap_or_else(|e| panic!("cryptsetup: {e} (scripts/setup-deps kmip)"));
        assert!(done.status.success(), "cryptsetup {args}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// What every format and encryption says: our key, and a keyslot that costs little.
    pub fn common(&self) -> String {
        let bits = self.key.len() * 8;
        format!(
            "-q --type luks2 --key-size {bits} --volume-key-file key --key-file key --pbkdf pbkdf2 \
             --pbkdf-force-iterations 1000"
        )
    }
}
