//! Keys by reference: named XTS keys (`accel_crypto_key_create`) and the files that keys come from.
//!
//! A key file is refused when its group or others may read it. Key bytes live in locked memory, are never logged and
//! never leave in a reply; a saved configuration names files.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use cryptfold_bdev_crypto::engine::XtsKey;
use cryptfold_keystore::Password;
use cryptfold_reactor::SecretBytes;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::control::lock;
use crate::jsonrpc::RpcError;
use crate::params::unhex;

/// No key file is larger.
const MAX_KEY_FILE_BYTES: u64 = 4096;

/// A key file that can not be used.
#[derive(Debug, Error)]
pub enum KeyFileError {
    /// Not there, or not readable.
    #[error("key file {path}: {error}")]
    Os {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        error: std::io::Error,
    },
    /// Too many may read it.
    #[error("key file {path} may be read by others (mode {mode:04o}); run: chmod 600 {path}")]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Somebody else's.
    #[error("key file {path} belongs to user {owner}; root or user {me} (this process) has to own it")]
    Owner {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Who we are.
        me: u32,
    },
    /// Not what keys look like.
    #[error("key file {path}: {what}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        what: String,
    },
}

impl From<KeyFileError> for RpcError {
    fn from(e: KeyFileError) -> RpcError {
        match &e {
            KeyFileError::Os { error, .. } => {
                RpcError::new(-i64::from(error.raw_os_error().unwrap_or(5)), e.to_string())
            }
            KeyFileError::Mode { .. } | KeyFileError::Owner { .. } => RpcError::new(-13, e.to_string()),
            KeyFileError::Content { .. } => RpcError::params(e),
        }
    }
}

/// Reads a key file after looking at who else may.
///
/// # Errors
/// See [`KeyFileError`].
pub fn read_key_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    let os = |error| KeyFileError::Os { path: path.into(), error };
    // One open file for both questions: the path could be swapped in between.
    let file = File::open(path).map_err(os)?;
    let meta = file.metadata().map_err(os)?;
    let content = |what: String| KeyFileError::Content { path: path.into(), what };
    if !meta.is_file() {
        return Err(content("is not a regular file".into()));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(KeyFileError::Mode { path: path.into(), mode: meta.mode() & 0o7777 });
    }
    // Whoever owns a file may change who reads it.
    let me = std::fs::metadata("/proc/self").map_err(os)?.uid();
    if meta.uid() != 0 && meta.uid() != me {
        return Err(KeyFileError::Owner { path: path.into(), owner: meta.uid(), me });
    }
    if meta.len() > MAX_KEY_FILE_BYTES {
        return Err(content(format!("has {} bytes; no key is that long", meta.len())));
    }
    // Sized ahead: a growing vector would leave copies of the key behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_KEY_FILE_BYTES as usize + 64));
    file.take(MAX_KEY_FILE_BYTES).read_to_end(&mut bytes).map_err(os)?;
    Ok(bytes)
}

/// Key bytes of a file: raw, or hexadecimal digits with white space around, if that gives one of `sizes_bytes`.
///
/// # Errors
/// See [`KeyFileError`].
pub fn read_key(path: &Path, sizes_bytes: &[usize]) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    let raw = read_key_file(path)?;
    if sizes_bytes.contains(&raw.len()) {
        return Ok(raw);
    }
    let hex = std::str::from_utf8(&raw).ok().map(str::trim).and_then(unhex).map(Zeroizing::new);
    match hex {
        Some(key) if sizes_bytes.contains(&key.len()) => Ok(key),
        _ => {
            let sizes: Vec<String> = sizes_bytes.iter().map(usize::to_string).collect();
            let what = format!(
                "{} bytes; {} raw bytes or as many in hexadecimal are needed",
                raw.len(),
                sizes.join(" or ")
            );
            Err(KeyFileError::Content { path: path.into(), what })
        }
    }
}

/// A password: the file's text without the line feed at its end.
///
/// # Errors
/// See [`KeyFileError`].
pub fn read_password(path: &Path) -> Result<Password, KeyFileError> {
    let content = |what: String| KeyFileError::Content { path: path.into(), what };
    let raw = read_key_file(path)?;
    let text = std::str::from_utf8(&raw).map_err(|_| content("a password is UTF-8 text".into()))?;
    let text = text.strip_suffix('\n').unwrap_or(text);
    Password::new(text.into()).map_err(|e| content(e.to_string()))
}

/// Files with this extension in systemd's directory of credentials, if there is one.
pub fn credentials(extension: &str) -> Vec<PathBuf> {
    let dir = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    files_in(dir.as_deref(), extension)
}

/// Files with this extension, in order of their names.
pub fn files_in(dir: Option<&Path>, extension: &str) -> Vec<PathBuf> {
    let entries = dir.and_then(|d| std::fs::read_dir(d).ok()).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> =
        entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
    files.sort();
    files
}

/// Writes a new key file (mode 0600), durably. Never overwrites.
///
/// # Errors
/// [`KeyFileError::Os`], also when the file exists.
pub fn write_key_file(path: &Path, content: &[u8]) -> Result<(), KeyFileError> {
    let os = |error| KeyFileError::Os { path: path.into(), error };
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(os)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(os)?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    // The name must survive a power cut too: a pool without its key is lost.
    let written = written.and_then(|()| File::open(dir)?.sync_all());
    if let Err(e) = written {
        let _ = std::fs::remove_file(path);
        return Err(os(e));
    }
    Ok(())
}

/// Hexadecimal digits of a key, with a line feed.
pub fn hex_line(key: &[u8]) -> Zeroizing<String> {
    use std::fmt::Write as _;
    let mut s = Zeroizing::new(String::with_capacity(2 * key.len() + 1));
    for b in key {
        let _ = write!(s, "{b:02x}");
    }
    s.push('\n');
    s
}

/// Random bytes from where all keys come from ([`cryptfold_reactor::fill_random`]).
pub fn random_key(len: usize) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; len]);
    cryptfold_reactor::fill_random(&mut key);
    key
}

/// Where keys lie when nobody says: `$CRYPTFOLD_KEYS`, else `$XDG_STATE_HOME/cryptfold/keys`, else
/// `/var/lib/cryptfold/keys` for root and `~/.local/state/cryptfold/keys` for others.
pub fn default_key_dir() -> PathBuf {
    let var = |n| std::env::var_os(n).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = var("CRYPTFOLD_KEYS") {
        return dir;
    }
    if let Some(dir) = var("XDG_STATE_HOME") {
        return dir.join("cryptfold/keys");
    }
    let home = var("HOME").filter(|h| h != Path::new("/root") && h != Path::new("/"));
    home.map_or_else(|| "/var/lib/cryptfold/keys".into(), |h| h.join(".local/state/cryptfold/keys"))
}

/// Where a named key came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// Given in the request.
    Inline,
    /// Read from a file with both halves, or from two files with one each.
    Files(PathBuf, Option<PathBuf>),
}

/// A named key.
#[derive(Clone)]
pub struct NamedKey {
    /// Its name.
    pub name: String,
    /// Where it came from.
    pub source: KeySource,
    /// For the devices.
    pub key: Arc<XtsKey>,
    bytes: Arc<SecretBytes>,
}

/// The named XTS keys.
#[derive(Default)]
pub struct KeyStore {
    keys: Mutex<Vec<NamedKey>>,
}

impl KeyStore {
    /// Adds a key: both halves, one after the other.
    ///
    /// # Errors
    /// Taken name, wrong length, equal halves.
    pub fn add(&self, name: &str, halves: &[u8], source: KeySource) -> Result<(), RpcError> {
        let key = Arc::new(XtsKey::new(halves).map_err(RpcError::params)?);
        let mut keys = lock(&self.keys);
        if keys.iter().any(|k| k.name == name) {
            return Err(RpcError::exists(format!("crypto key \"{name}\"")));
        }
        let bytes = Arc::new(SecretBytes::from_slice(halves));
        keys.push(NamedKey { name: name.into(), source, key, bytes });
        Ok(())
    }

    /// By name.
    ///
    /// # Errors
    /// -2 when there is none.
    pub fn get(&self, name: &str) -> Result<NamedKey, RpcError> {
        let found = lock(&self.keys).iter().find(|k| k.name == name).cloned();
        found.ok_or_else(|| {
            RpcError::not_found(format!("crypto key \"{name}\" (create it with accel_crypto_key_create)"))
        })
    }

    /// All, in order of creation.
    pub fn list(&self) -> Vec<NamedKey> {
        lock(&self.keys).clone()
    }

    /// Forgets a key; devices that use it keep theirs.
    ///
    /// # Errors
    /// -2 when there is none.
    pub fn remove(&self, name: &str) -> Result<(), RpcError> {
        self.get(name)?;
        lock(&self.keys).retain(|k| k.name != name);
        Ok(())
    }

    /// The files that a configuration names for a key. A key that was given in the clear is written to a new file in
    /// `dir` (mode 0600) now, because a configuration must not hold it; that file is its source from then on.
    ///
    /// # Errors
    /// -2 for an unknown key; when the file can not be written.
    pub fn files_of(&self, name: &str, dir: &Path) -> Result<(PathBuf, Option<PathBuf>), RpcError> {
        let mut keys = lock(&self.keys);
        let Some(k) = keys.iter_mut().find(|k| k.name == name) else {
            return Err(RpcError::not_found(format!("crypto key \"{name}\"")));
        };
        if let KeySource::Files(a, b) = &k.source {
            return Ok((a.clone(), b.clone()));
        }
        let path = free_name(dir, name, "xts");
        write_key_file(&path, hex_line(k.bytes.expose()).as_bytes())?;
        tracing::info!(key = name, file = %path.display(), "key written to a file for the saved configuration");
        k.source = KeySource::Files(path.clone(), None);
        Ok((path, None))
    }
}

/// `DIR/NAME.EXTENSION`, or with a random part when that exists.
pub fn free_name(dir: &Path, name: &str, extension: &str) -> PathBuf {
    let name = file_name(name);
    let plain = dir.join(format!("{name}.{extension}"));
    if !plain.exists() {
        return plain;
    }
    let suffix = hex_line(&random_key(4));
    dir.join(format!("{name}-{}.{extension}", suffix.trim()))
}

/// A name as a file name: anything unusual becomes `%XX`.
pub fn file_name(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let encoded: String =
        name.bytes().map(|b| if plain(b) { (b as char).to_string() } else { format!("%{b:02X}") }).collect();
    match encoded.strip_prefix('.') {
        Some(rest) => format!("%2E{rest}"),
        None => encoded,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn key_files_are_private_and_of_the_right_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/k");
        let key = random_key(64);
        assert!(key.iter().any(|b| *b != key[0]));
        write_key_file(&path, hex_line(&key).as_bytes()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(dir.path().join("new")).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(*read_key(&path, &[32, 64]).unwrap(), *key);
        assert!(matches!(read_key(&path, &[32]), Err(KeyFileError::Content { .. })));
        assert!(write_key_file(&path, b"x").is_err(), "never overwritten");
        for mode in [0o640, 0o604, 0o666] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            let e = read_key(&path, &[64]).unwrap_err();
            assert!(e.to_string().contains("chmod 600"), "{e}");
            assert_eq!(RpcError::from(e).code, -13);
        }
        assert_eq!(RpcError::from(read_key(&dir.path().join("none"), &[64]).unwrap_err()).code, -2);
    }

    #[test]
    fn named_keys() {
        let s = KeyStore::default();
        let key: Vec<u8> = (0..64).collect();
        s.add("k", &key, KeySource::Inline).unwrap();
        assert_eq!(s.add("k", &key, KeySource::Inline).unwrap_err().code, -17);
        assert_eq!(s.add("short", &key[..31], KeySource::Inline).unwrap_err().code, -32602);
        assert_eq!(s.add("equal", &[7; 64], KeySource::Inline).unwrap_err().code, -32602);
        let dir = tempfile::tempdir().unwrap();
        let (path, none) = s.files_of("k", dir.path()).unwrap();
        assert_eq!((path.file_name().unwrap().to_str(), none), (Some("k.xts"), None));
        assert_eq!(read_key(&path, &[64]).unwrap().as_slice(), key);
        assert_eq!(s.files_of("k", dir.path()).unwrap().0, path, "written once");
        s.remove("k").unwrap();
        assert_eq!(s.remove("k").unwrap_err().code, -2);
        let other: Vec<u8> = (1..65).collect();
        s.add("k", &other, KeySource::Inline).unwrap();
        let (second, _) = s.files_of("k", dir.path()).unwrap();
        assert_ne!(second, path);
        assert_eq!(
            read_key(&path, &[64]).unwrap().as_slice(),
            key,
            "an older key of this name is left alone"
        );
        assert_eq!(read_key(&second, &[64]).unwrap().as_slice(), other);
    }

    #[test]
    fn file_names_do_not_leave_the_directory() {
        assert_eq!(file_name("../x y"), "%2E.%2Fx%20y");
        assert_eq!(file_name("key-1.a_B"), "key-1.a_B");
    }
}
