//! Secrets: their types, how they derive from each other, how they are wrapped.
//!
//! Hierarchy: key-encryption key (a key file, a password's hash, or a KMS object) -- wraps --> pool key -- derives the
//! wrap key that wraps --> each domain's data key and fingerprint secret, one pair per generation. An erasable domain may
//! put a key-encryption key of its own in between.
//!
//! Every derivation is HKDF-SHA-256 (RFC 5869). All of them:
//!
//! | info begins with | input key | salt | info continues with | gives |
//! |---|---|---|---|---|
//! | `cryptfold/1 block mac` | pool key | pool UUID | | HMAC key of superblock, key, owner, segment header blocks |
//! | `cryptfold/1 wrap` | pool key | pool UUID | | wrap key of the erasure secrets (and of the domains' secrets, where there are none) |
//! | `cryptfold/1 domain wrap` | erasure secret | the wrap key | | wrap key of the domains' secrets |
//! | `cryptfold/1 pool data` | pool key | pool UUID | | data key of domain 0: catalogue, segment table |
//! | `cryptfold/1 journal` | pool key | pool UUID | | journal root of the pool's records |
//! | `cryptfold/1 domain journal` | domain data key | pool UUID | | journal root of a domain's records |
//! | `cryptfold/1 host journal` | domain data key | host map key | | journal root of that volume's map records |
//! | `cryptfold/1 journal epoch` | a journal root | epoch salt | owner epoch u64, shard u16 | key of one shard's batches in one epoch |
//! | `cryptfold/1 segment` | domain data key | segment salt | pool UUID, device u16, segment u32, incarnation u64, domain u32, generation u32, class u8, cipher u8 | segment key |
//! | `cryptfold/1 host map` | host's volume key | pool UUID | volume UUID | inner key of that host's map leaves and journal records |
//! | `cryptfold/1 key id` | key-encryption key | | | public id of a key-encryption key, 16 bytes |
//!
//! A zero byte ends the label; numbers are little-endian and of fixed width: no two inputs give the same info.

use std::fmt;

use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap, KeyWrapPadded};
use aws_lc_rs::{constant_time, hkdf};
use smallvec::SmallVec;
use thiserror::Error;
use uuid::Uuid;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::block::BlockKey;

/// Bytes of every secret here.
pub const SECRET_BYTES: usize = 32;
/// Bytes of a wrapped secret (RFC 3394: eight more than the plain one).
pub const WRAPPED_BYTES: usize = SECRET_BYTES + 8;

/// 256 secret bits, zeroed when dropped, never printed. Boxed, so that moving it leaves no copy behind.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret(Box<[u8; SECRET_BYTES]>);

impl Secret {
    /// Takes the bytes over; the caller's copy is zeroed.
    pub fn take(bytes: &mut [u8; SECRET_BYTES]) -> Self {
        let mut secret = Box::new([0; SECRET_BYTES]);
        secret.copy_from_slice(bytes);
        bytes.zeroize();
        Self(secret)
    }

    /// The bytes, for a cipher or hash.
    pub fn expose(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        constant_time::verify_slices_are_equal(self.expose(), other.expose()).is_ok()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

macro_rules! secret {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name(pub Secret);
    };
}

secret!(
    /// Key-encryption key: lives outside of the pool.
    Kek
);
secret!(
    /// The pool's root secret.
    PoolKey
);
secret!(
    /// A domain's data key of one generation.
    DataKey
);
secret!(
    /// A domain's fingerprint secret of one generation.
    FingerprintSecret
);

/// Why a key could not be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum KeyError {
    /// Neither 32 raw bytes nor 64 hexadecimal digits.
    #[error("a key file holds 32 raw bytes or 64 hexadecimal digits, this one has {len} bytes")]
    FileLength {
        /// Bytes found.
        len: usize,
    },
    /// 64 bytes, but not hexadecimal digits.
    #[error("key file: byte {at} is not a hexadecimal digit")]
    FileDigit {
        /// Index of the byte.
        at: usize,
    },
    /// All bytes of the key are equal: not a random key.
    #[error("key file: all bytes are equal")]
    FileWeak,
    /// Unwrapping failed: not the key that wrapped this.
    #[error("the key does not fit")]
    DoesNotFit,
    /// The input of a wrap or unwrap has a length that the algorithm does not take.
    #[error("{len} bytes cannot be wrapped or unwrapped")]
    WrapLength {
        /// Bytes given.
        len: usize,
    },
}

impl Kek {
    /// Reads a key file's content: 32 raw bytes, or 64 hexadecimal digits with trailing white space.
    pub fn from_file(content: &[u8]) -> Result<Self, KeyError> {
        let mut bytes = Zeroizing::new([0u8; SECRET_BYTES]);
        if content.len() == SECRET_BYTES {
            bytes.copy_from_slice(content);
        } else {
            let digits = content.trim_ascii_end();
            if digits.len() != 2 * SECRET_BYTES {
                return Err(KeyError::FileLength { len: content.len() });
            }
            for (at, &digit) in digits.iter().enumerate() {
                let value = (digit as char).to_digit(16).ok_or(KeyError::FileDigit { at })?;
                bytes[at / 2] = bytes[at / 2] << 4 | value as u8;
            }
        }
        if bytes.iter().all(|&byte| byte == bytes[0]) {
            return Err(KeyError::FileWeak);
        }
        Ok(Self(Secret::take(&mut bytes)))
    }

    /// Public id of this key: tells which slot it fits without trying, and reveals nothing about it.
    pub fn id(&self) -> [u8; 16] {
        let full = derive(&self.0, &[], "key id", &[]);
        let mut id = [0; 16];
        id.copy_from_slice(&full.expose()[..16]);
        id
    }

    /// Wraps the pool key (RFC 3394).
    pub fn wrap(&self, key: &PoolKey) -> Result<[u8; WRAPPED_BYTES], KeyError> {
        wrap(&self.0, &key.0)
    }

    /// Unwraps the pool key.
    pub fn unwrap(&self, wrapped: &[u8; WRAPPED_BYTES]) -> Result<PoolKey, KeyError> {
        unwrap(&self.0, wrapped).map(PoolKey)
    }
}

/// AES-256 key wrap of one secret, RFC 3394 section 2.2.1.
pub fn wrap(kek: &Secret, secret: &Secret) -> Result<[u8; WRAPPED_BYTES], KeyError> {
    let mut out = [0; WRAPPED_BYTES];
    let failed = |_| KeyError::WrapLength { len: SECRET_BYTES };
    let kek = AesKek::new(&AES_256, kek.expose()).map_err(failed)?;
    kek.wrap(secret.expose(), &mut out).map_err(failed)?;
    Ok(out)
}

/// The reverse of [`wrap`], RFC 3394 section 2.2.2.
pub fn unwrap(kek: &Secret, wrapped: &[u8; WRAPPED_BYTES]) -> Result<Secret, KeyError> {
    let mut out = Zeroizing::new([0; SECRET_BYTES]);
    let kek = AesKek::new(&AES_256, kek.expose()).map_err(|_| KeyError::DoesNotFit)?;
    kek.unwrap(wrapped, out.as_mut_slice()).map_err(|_| KeyError::DoesNotFit)?;
    Ok(Secret::take(&mut out))
}

/// AES-256 key wrap with padding, RFC 5649: any length from 1 to 4096 bytes, for what is not 32 bytes (hosts' keys, exports).
pub fn wrap_padded(kek: &Secret, plain: &[u8]) -> Result<Vec<u8>, KeyError> {
    if plain.is_empty() || plain.len() > 4096 {
        return Err(KeyError::WrapLength { len: plain.len() });
    }
    let failed = |_| KeyError::WrapLength { len: plain.len() };
    let mut out = vec![0; plain.len().next_multiple_of(8) + 8];
    let kek = AesKek::new(&AES_256, kek.expose()).map_err(failed)?;
    let len = kek.wrap_with_padding(plain, &mut out).map_err(failed)?.len();
    out.truncate(len);
    Ok(out)
}

/// The reverse of [`wrap_padded`].
pub fn unwrap_padded(kek: &Secret, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    if wrapped.len() < 16 || wrapped.len() > 4104 || !wrapped.len().is_multiple_of(8) {
        return Err(KeyError::WrapLength { len: wrapped.len() });
    }
    let mut out = Zeroizing::new(vec![0; wrapped.len()]);
    let kek = AesKek::new(&AES_256, kek.expose()).map_err(|_| KeyError::DoesNotFit)?;
    let len = kek.unwrap_with_padding(wrapped, &mut out).map_err(|_| KeyError::DoesNotFit)?.len();
    out.truncate(len);
    Ok(out)
}

/// Root of a family of journal keys (of the pool's or of one domain's records).
#[derive(Clone, Debug)]
pub struct JournalRoot(pub(crate) Secret);

impl DataKey {
    /// Root of the keys of this domain's journal records.
    pub fn journal_root(&self, pool: Uuid) -> JournalRoot {
        JournalRoot(derive(&self.0, pool.as_bytes(), "domain journal", &[]))
    }
}

/// Everything that derives from the pool key.
#[derive(Clone, Debug)]
pub struct PoolKeys {
    pool: Uuid,
    block: BlockKey,
    wrap: Secret,
    data: DataKey,
    journal: JournalRoot,
}

impl PoolKeys {
    /// Derives the pool's keys (four HKDF calls).
    pub fn derive(key: &PoolKey, pool: Uuid) -> Self {
        let from = |label| derive(&key.0, pool.as_bytes(), label, &[]);
        Self {
            pool,
            block: BlockKey::new(from("block mac").expose()),
            wrap: from("wrap"),
            data: DataKey(from("pool data")),
            journal: JournalRoot(from("journal")),
        }
    }

    /// The pool that these keys are for.
    pub fn pool(&self) -> Uuid {
        self.pool
    }

    /// MAC key of the stand-alone blocks.
    pub fn block(&self) -> &BlockKey {
        &self.block
    }

    /// Data key of the pool's own metadata ([`crate::ids::POOL_DOMAIN`]).
    pub fn data(&self) -> &DataKey {
        &self.data
    }

    /// Root of the keys of the pool's journal.
    pub fn journal(&self) -> &JournalRoot {
        &self.journal
    }

    /// Wrap key of the erasure secrets.
    pub fn wrap_key(&self) -> &Secret {
        &self.wrap
    }
}

/// The wrap keys of the domains' secrets.
///
/// Each derives from the pool's wrap key and an erasure secret of the key block. There are two while a secret is being replaced:
/// then what either wraps is opened, and the current one wraps.
#[derive(Clone, Debug)]
pub struct DomainWraps {
    current: Secret,
    former: Option<Secret>,
}

impl DomainWraps {
    /// From the key block's secrets; without any, the pool's wrap key itself.
    ///
    /// # Errors
    /// [`KeyError::DoesNotFit`] when a secret does not unwrap.
    pub fn open(keys: &PoolKeys, erasure: &[Option<[u8; WRAPPED_BYTES]>; 2]) -> Result<Self, KeyError> {
        let derived = |wrapped: &[u8; WRAPPED_BYTES]| {
            let secret = unwrap(&keys.wrap, wrapped)?;
            Ok::<_, KeyError>(derive(&secret, keys.wrap.expose(), "domain wrap", &[]))
        };
        match erasure {
            [Some(current), former] => {
                Ok(Self { current: derived(current)?, former: former.as_ref().map(derived).transpose()? })
            }
            [None, _] => Ok(Self { current: keys.wrap.clone(), former: None }),
        }
    }

    /// Wraps a domain's secret with the current key.
    ///
    /// # Errors
    /// Wrapping fails.
    pub fn wrap(&self, secret: &Secret) -> Result<[u8; WRAPPED_BYTES], KeyError> {
        wrap(&self.current, secret)
    }

    /// Unwraps a domain's secret; whether the current key had wrapped it.
    ///
    /// # Errors
    /// [`KeyError::DoesNotFit`].
    pub fn unwrap(&self, wrapped: &[u8; WRAPPED_BYTES]) -> Result<(Secret, bool), KeyError> {
        match (unwrap(&self.current, wrapped), &self.former) {
            (Ok(secret), _) => Ok((secret, true)),
            (Err(_), Some(former)) => Ok((unwrap(former, wrapped)?, false)),
            (Err(error), None) => Err(error),
        }
    }

    /// Whether an erasure secret is being replaced.
    pub fn has_former(&self) -> bool {
        self.former.is_some()
    }
}

/// Inner key of the map leaves and journal records of a volume that a host has encrypted.
#[derive(Clone, Debug)]
pub struct HostMapKey(pub(crate) Secret);

impl HostMapKey {
    /// Derives it from the host's volume key (any length), which is not kept.
    pub fn derive(host_key: &[u8], pool: Uuid, volume: Uuid) -> Self {
        Self(expand(host_key, pool.as_bytes(), "host map", &[volume.as_bytes()]))
    }

    /// Root of the journal keys of this volume's map records: takes both the host's key and the domain's.
    pub fn journal_root(&self, data: &DataKey) -> JournalRoot {
        JournalRoot(derive(&data.0, self.0.expose(), "host journal", &[]))
    }
}

pub(crate) fn derive(secret: &Secret, salt: &[u8], label: &str, context: &[&[u8]]) -> Secret {
    expand(secret.expose(), salt, label, context)
}

fn expand(input: &[u8], salt: &[u8], label: &str, context: &[&[u8]]) -> Secret {
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(input);
    let head: [&[u8]; 3] = [b"cryptfold/1 ", label.as_bytes(), &[0]];
    let info: SmallVec<[&[u8]; 12]> = head.iter().chain(context).copied().collect();
    let mut out = Zeroizing::new([0; SECRET_BYTES]);
    // HKDF fails only for outputs beyond 255 hash lengths (RFC 5869 section 2.3).
    prk.expand(&info, hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(out.as_mut_slice()))
        .expect("32 bytes are within HKDF's limits");
    Secret::take(&mut out)
}
