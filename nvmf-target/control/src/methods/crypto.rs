//! Named XTS keys, and the devices that encrypt with them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cryptfold_bdev_crypto::KeyRef;
use cryptfold_bdev_crypto::crypto::CryptoOptions;
use cryptfold_bdev_crypto::engine::XtsKey;
use cryptfold_bdev_crypto::gate::KeyGate;
use cryptfold_bdev_crypto::hostcrypt::HostcryptOptions;
use serde_json::{Value, json};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::devices::delete;
use crate::control::Control;
use crate::jsonrpc::{RpcError, RpcResult};
use crate::keys::{KeySource, NamedKey, read_key};
use crate::luks::record::may_be_mixed;
use crate::params::{FromJson, ParamError, SecretHex, choices, params};
use crate::table::Method;

choices! {
    /// Ciphers.
    pub enum Cipher {
        /// XTS.
        Xts = "AES_XTS",
    }
    /// How the tweak comes from the address.
    pub enum TweakMode {
        /// The block's number, in units of the device's block size.
        SimpleLba = "SIMPLE_LBA",
    }
}

choices! {
    /// Ciphers of hosts.
    pub enum HostCipher {
        /// dm-crypt's name.
        Dm = "aes-xts-plain64",
        /// SPDK's name.
        Spdk = "AES_XTS",
    }
}

/// A parameter that SPDK gave up; never shown, because it held keys.
#[derive(Clone, Debug)]
pub enum Obsolete {}

impl FromJson for Obsolete {
    const SECRET: bool = true;
    fn kind() -> String {
        "nothing (accel_crypto_key_create, then key_name)".into()
    }
    fn from_json(_: &Value) -> Result<Self, Option<ParamError>> {
        Err(None)
    }
}

params! {
    /// `accel_crypto_key_create`.
    pub struct KeyCreate {
        /// Name of the key.
        name: String,
        /// Cipher.
        cipher: Cipher,
        /// First half (data key). Rather use key_file: a key in a request may end up in somebody's log.
        key: Option<SecretHex>,
        /// Second half (tweak key).
        key2: Option<SecretHex>,
        /// File with both halves, or with the first half when key2_file is given; raw or hexadecimal, mode 0600. Ours.
        key_file: Option<String>,
        /// File with the second half. Ours.
        key2_file: Option<String>,
        /// Tweak mode.
        tweak_mode: Option<TweakMode>,
    }
    /// `accel_crypto_key_destroy`.
    pub struct KeyDestroy {
        /// Name of the key.
        key_name: String,
    }
    /// `accel_crypto_keys_get`.
    pub struct KeysGet {
        /// Name of the key; all when not given.
        key_name: Option<String>,
    }
    /// `bdev_crypto_create`.
    pub struct CryptoCreate {
        /// Device below.
        base_bdev_name: String,
        /// Name.
        name: String,
        /// Name of the key.
        key_name: Option<String>,
        /// File with both halves of the key, in place of key_name. Ours.
        key_file: Option<String>,
        /// UUID; made of the base's and the name when not given. Ours.
        uuid: Option<Uuid>,
        /// No effect.
        crypto_pmd: Option<String>,
        /// Not taken any more: use accel_crypto_key_create and key_name.
        key: Option<Obsolete>,
        /// Not taken any more.
        key2: Option<Obsolete>,
        /// Cipher.
        cipher: Option<Cipher>,
    }
    /// `bdev_hostcrypt_create`.
    pub struct HostcryptCreate {
        /// Device below, which will hold plaintext. Above a pool's volume with blocks of 512 bytes, what is discarded reads as zeros with a sector_size of 4096 only.
        base_bdev_name: String,
        /// Name.
        name: String,
        /// File with the host's volume key (32 or 64 bytes, raw or hexadecimal, mode 0600).
        key_file: Option<String>,
        /// Name of the key, in place of key_file.
        key_name: Option<String>,
        /// Name of a key of a key server (keyring_kmip_add_key), in place of key_file. The device is made also when the server does not answer; it serves when it has its key.
        kms_key_name: Option<String>,
        /// Number of the key in the map of the volume below, 1 to 65535.
        key_id: u16 = 1,
        /// Bytes in a data unit of the host's dm-crypt: 512 or 4096.
        sector_size: u32 = 512,
        /// Bytes in front of the encrypted payload, which pass as they are (a LUKS header).
        payload_offset: u64 = 0,
        /// Number of the payload's first 512-byte sector.
        iv_offset: u64 = 0,
        /// dm-crypt's iv_large_sectors: tweaks count data units instead of sectors of 512 bytes.
        iv_large_sectors: bool = false,
        /// The host's cipher: "aes-xts-plain64", or "AES_XTS", which means the same.
        cipher: Option<HostCipher>,
        /// UUID; made of the base's and the name when not given.
        uuid: Option<Uuid>,
    }
}

pub fn methods() -> Vec<Method> {
    vec![
        Method::new(
            "accel_crypto_key_create",
            "Makes an XTS key known under a name: 16 + 16 or 32 + 32 bytes, unequal halves. Replies true.",
            key_create,
        ),
        Method::new("accel_crypto_key_destroy", "Forgets a key that no device uses.", key_destroy),
        Method::new(
            "accel_crypto_keys_get",
            "The keys by name. Unlike SPDK's, the reply holds no key material; `key_file` says where it is.",
            keys_get,
        ),
        Method::new(
            "bdev_crypto_create",
            "Encrypts its base with XTS; the tweak is the block's number, so disks of SPDK's read back. Replies its name.",
            crypto_create,
        ),
        delete("bdev_crypto_delete", "bdev_crypto_create"),
        Method::new(
            "bdev_hostcrypt_create",
            "A host's dm-crypt layer in reverse: decrypts what the host writes, encrypts what it reads. Replies its \
             name. Ours.",
            hostcrypt_create,
        ),
        delete("bdev_hostcrypt_delete", "bdev_hostcrypt_create"),
    ]
}

/// The key of a device, by name or from a file.
fn device_key(
    c: &Control,
    name: Option<String>,
    file: Option<String>,
) -> Result<(Arc<XtsKey>, KeyRef), RpcError> {
    match (name, file) {
        (Some(n), None) => Ok((c.keys.get(&n)?.key, KeyRef::Name(n))),
        (None, Some(f)) => {
            let path = absolute(&f)?;
            let key = XtsKey::new(&read_key(&path, &[32, 64])?)
                .map_err(|e| RpcError::params(format!("key_file: {}: {e}", path.display())))?;
            Ok((Arc::new(key), KeyRef::File(path)))
        }
        _ => Err(RpcError::params("key_name: either this or key_file is needed")),
    }
}

fn crypto_create(c: &Control, p: CryptoCreate) -> RpcResult {
    let (key, key_ref) = device_key(c, p.key_name, p.key_file)?;
    let options =
        CryptoOptions { name: p.name, base_bdev_name: p.base_bdev_name, key, key_ref, uuid: p.uuid };
    Ok(json!(cryptfold_bdev_crypto::crypto::create(&c.registry, options)?.name()))
}

/// This device takes all of a payload for being under its key: a volume whose blocks are of both kinds is for `bdev_luks_create`.
fn check_uniform(c: &Control, base: &str) -> Result<(), RpcError> {
    let Ok(bdev) = c.registry.get(base) else { return Ok(()) };
    let record = super::find_volume(c, bdev.name()).ok().and_then(|(_, info)| info.host_key);
    match record.filter(|record| may_be_mixed(record)) {
        None => Ok(()),
        Some(_) => Err(RpcError::params(format!(
            "base_bdev_name: {base} has blocks that were stored before its host's key was there and blocks under the key; \
             bdev_luks_create tells them apart"
        ))),
    }
}

fn hostcrypt_create(c: &Control, p: HostcryptCreate) -> RpcResult {
    check_uniform(c, &p.base_bdev_name)?;
    let (key, key_ref) = match p.kms_key_name {
        None => {
            let (key, key_ref) = device_key(c, p.key_name, p.key_file)?;
            (KeyGate::fixed(key), key_ref)
        }
        Some(name) if p.key_name.is_none() && p.key_file.is_none() => {
            (c.kms.bind(&name, &p.name)?, KeyRef::Kms(name))
        }
        Some(_) => return Err(RpcError::params("kms_key_name: not together with key_name or key_file")),
    };
    let options = HostcryptOptions {
        name: p.name,
        base_bdev_name: p.base_bdev_name,
        key,
        key_ref,
        key_id: p.key_id,
        sector_size_bytes: p.sector_size,
        payload_offset_bytes: p.payload_offset,
        iv_offset: p.iv_offset,
        iv_large_sectors: p.iv_large_sectors,
        uuid: p.uuid,
    };
    Ok(json!(cryptfold_bdev_crypto::hostcrypt::create(&c.registry, options)?.name()))
}

fn key_create(c: &Control, p: KeyCreate) -> RpcResult {
    let (halves, source) = match (p.key, p.key2, p.key_file, p.key2_file) {
        (Some(k), Some(k2), None, None) => (both(&k.0, &k2.0), KeySource::Inline),
        (Some(_), None, None, None) => {
            return Err(RpcError::params("key2: missing; AES_XTS needs both halves"));
        }
        (None, None, Some(f), None) => {
            let path = absolute(&f)?;
            (read_key(&path, &[32, 64])?, KeySource::Files(path, None))
        }
        (None, None, Some(f), Some(f2)) => {
            let (path, path2) = (absolute(&f)?, absolute(&f2)?);
            let halves = both(&read_key(&path, &[16, 32])?, &read_key(&path2, &[16, 32])?);
            (halves, KeySource::Files(path, Some(path2)))
        }
        _ => {
            return Err(RpcError::params("key: either key and key2, or key_file (and key2_file) are needed"));
        }
    };
    c.keys.add(&p.name, &halves, source)?;
    Ok(json!(true))
}

fn both(a: &[u8], b: &[u8]) -> Zeroizing<Vec<u8>> {
    // Of one size from the start: growing would leave a copy behind.
    let mut whole = Zeroizing::new(Vec::with_capacity(a.len() + b.len()));
    whole.extend_from_slice(a);
    whole.extend_from_slice(b);
    whole
}

/// A path that means the same after a restart elsewhere.
pub fn absolute(path: &str) -> Result<PathBuf, RpcError> {
    std::path::absolute(Path::new(path)).map_err(|e| RpcError::params(format!("\"{path}\": {e}")))
}

/// Devices made with a named key; `parameter` is `key_name` or `kms_key_name`.
pub fn users(c: &Control, parameter: &str, key: &str) -> Vec<String> {
    let uses = |v: &Value| v[parameter].as_str() == Some(key);
    c.registry
        .list()
        .iter()
        .filter(|b| b.device().config().iter().any(|(_, p)| uses(p)))
        .map(|b| b.name().to_string())
        .collect()
}

fn key_destroy(c: &Control, p: KeyDestroy) -> RpcResult {
    c.keys.get(&p.key_name)?;
    if let Some(user) = users(c, "key_name", &p.key_name).first() {
        return Err(RpcError::busy(format!("crypto key \"{}\" is used by \"{user}\"", p.key_name)));
    }
    c.keys.remove(&p.key_name)?;
    Ok(json!(true))
}

fn describe(k: &NamedKey) -> Value {
    let mut v = json!({
        "name": k.name,
        "cipher": Cipher::Xts.word(),
        "key_bits": k.key.cipher().key_bytes() * 4,
        "tweak_mode": TweakMode::SimpleLba.word(),
    });
    if let KeySource::Files(a, b) = &k.source {
        v["key_file"] = json!(a);
        if let Some(b) = b {
            v["key2_file"] = json!(b);
        }
    }
    v
}

fn keys_get(c: &Control, p: KeysGet) -> RpcResult {
    match p.key_name {
        Some(name) => Ok(json!([describe(&c.keys.get(&name)?)])),
        None => Ok(c.keys.list().iter().map(describe).collect()),
    }
}

/// The calls that make the keys known again, by reference.
pub fn config(c: &Control) -> Result<Vec<(String, Value)>, RpcError> {
    c.keys
        .list()
        .iter()
        .map(|k| {
            let (a, b) = c.keys.files_of(&k.name, &c.config.key_dir)?;
            let mut params = json!({"name": k.name, "cipher": Cipher::Xts.word(), "key_file": a});
            if let Some(b) = b {
                params["key2_file"] = json!(b);
            }
            Ok(("accel_crypto_key_create".into(), params))
        })
        .collect()
}
