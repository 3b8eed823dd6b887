//! Pre-shared keys of NVMe/TCP's TLS 1.3: the interchange format in which they are handed around, and what both sides derive
//! from them (NVMe/TCP Transport 1.0 section 3.6.1: TP 8011 and TP 8018).
//!
//! ```text
//!   NVMeTLSkey-1:HH:BASE64(configured PSK | CRC-32):      HH: 00 as it is, 01 SHA-256, 02 SHA-384
//!     -> retained PSK: HKDF-Expand-Label(HKDF-Extract(0, configured), "HostNQN", host NQN)
//!     -> identity: "NVMe0RHH host subsystem" or "NVMe1RHH host subsystem DIGEST"
//!     -> TLS PSK: HKDF-Expand-Label(HKDF-Extract(0, retained), "nvme-tls-psk", identity or "HH DIGEST")
//!
//!   DH-HMAC-CHAP with secure channel concatenation: generated PSK = HMAC(H(g^xy), C1 | C2)
//!     -> identity: "NVMe1GHH host subsystem DIGEST", and the TLS PSK of that as above
//! ```
//!
//! HKDF-Expand-Label is that of RFC 8446 section 7.1, with its lengths. libnvme left these out until its commit fde6b1f5
//! (July 2025, "TLS PSK derivation fixes"); hosts with older tools are recognised by their version 1 identity, whose digest
//! differs, and get the key that belongs to it ([`Version::V1Old`]).

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cryptfold_nvmf_spec::auth::HashId;
use cryptfold_reactor::SecretBytes;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::chap::Names;
use crate::interchange::{self, TextError};
use crate::mac::{mac, same};

pub(crate) const PREFIX: &str = "NVMeTLSkey-1";
/// What goes into the digest of a version 1 identity beside the names.
const DIGEST_LABEL: &[u8] = b" NVMe-over-Fabrics";

/// Why a text is no pre-shared key. Says nothing about its bytes.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PskError {
    /// Not the form at all.
    #[error("a TLS key looks like NVMeTLSkey-1:HH:BASE64: with HH 00 to 02")]
    Form,
    /// An unknown hash.
    #[error("NVMeTLSkey-1:{0:02x}: the hash must be 00, 01 (SHA-256) or 02 (SHA-384)")]
    Hash(u8),
    /// A length that does not exist, or does not fit the hash.
    #[error("the key has {0} bytes; 32 (SHA-256) or 48 (SHA-384) are possible, as many as its hash has")]
    Length(usize),
    /// Mistyped.
    #[error("the key's CRC is wrong: it was mistyped or cut")]
    Crc,
}

impl From<TextError> for PskError {
    fn from(error: TextError) -> PskError {
        match error {
            TextError::Form => PskError::Form,
            TextError::Hash(code) => PskError::Hash(code),
            TextError::Crc => PskError::Crc,
        }
    }
}

/// A configured pre-shared key, in locked memory. Copies share it.
#[derive(Clone, PartialEq, Eq)]
pub struct Psk {
    key: Arc<SecretBytes>,
    /// Makes the retained key; none: the configured key is it.
    transform: Option<HashId>,
}

impl fmt::Debug for Psk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Psk({} bytes)", self.key.len())
    }
}

/// What TLS takes: an identity and its key.
#[derive(Clone, PartialEq, Eq)]
pub struct TlsPsk {
    /// Sent in the clear.
    pub identity: String,
    /// Secret, in locked memory; as long as the hash's output.
    pub key: Arc<SecretBytes>,
    /// SHA-256 goes with TLS_AES_128_GCM_SHA256, SHA-384 with TLS_AES_256_GCM_SHA384.
    pub hash: HashId,
}

impl fmt::Debug for TlsPsk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsPsk").field("hash", &self.hash).finish_non_exhaustive()
    }
}

/// How identity and key are derived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// `NVMe0R`: names only.
    V0,
    /// `NVMe1R`: names and a digest of the key.
    V1,
    /// `NVMe1R` as libnvme made it before July 2025. Only for keys that are transformed: for others the identity would be
    /// that of [`Version::V1`].
    V1Old,
}

/// The parts of an identity. Nothing of it is secret, and nothing of it is proven before the handshake is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity<'a> {
    /// 0 or 1.
    pub version: u8,
    /// SHA-256 or SHA-384.
    pub hash: HashId,
    /// The host's NQN.
    pub host: &'a str,
    /// The subsystem's NQN.
    pub subsystem: &'a str,
    /// Of a key that DH-HMAC-CHAP has generated, not of a configured one.
    pub generated: bool,
}

impl<'a> Identity<'a> {
    /// Takes an identity apart; `None` if it has not the form of one.
    pub fn parse(text: &'a str) -> Option<Identity<'a>> {
        let mut parts = text.split(' ');
        let (version, generated, hash) = match parts.next()? {
            "NVMe0R01" => (0, false, HashId::Sha256),
            "NVMe0R02" => (0, false, HashId::Sha384),
            "NVMe1R01" => (1, false, HashId::Sha256),
            "NVMe1R02" => (1, false, HashId::Sha384),
            "NVMe1G01" => (1, true, HashId::Sha256),
            "NVMe1G02" => (1, true, HashId::Sha384),
            _ => return None,
        };
        let (host, subsystem) = (parts.next()?, parts.next()?);
        // A digest in version 1, and nothing behind.
        let rest = parts.by_ref().count();
        let whole = rest == version as usize && !host.is_empty() && !subsystem.is_empty();
        whole.then_some(Identity { version, hash, host, subsystem, generated })
    }
}

impl Psk {
    /// From raw bytes: 32 or 48, and as many as `transform` (SHA-256 or SHA-384) has if there is one.
    ///
    /// # Errors
    /// [`PskError::Length`], [`PskError::Hash`].
    pub fn new(key: &[u8], transform: Option<HashId>) -> Result<Psk, PskError> {
        match transform {
            None if matches!(key.len(), 32 | 48) => {}
            Some(HashId::Sha512) => return Err(PskError::Hash(HashId::Sha512 as u8)),
            Some(h) if key.len() == h.len_bytes() => {}
            _ => return Err(PskError::Length(key.len())),
        }
        Ok(Psk { key: locked(key), transform })
    }

    /// From its text; white space around it is ignored.
    ///
    /// # Errors
    /// See [`PskError`].
    pub fn parse(text: &str) -> Result<Psk, PskError> {
        let (transform, key) = interchange::parse(PREFIX, text)?;
        Psk::new(&key, transform)
    }

    /// Its text.
    pub fn to_text(&self) -> Zeroizing<String> {
        interchange::to_text(PREFIX, self.transform, self.key.expose())
    }

    /// The hash that its identities name.
    pub fn hash(&self) -> HashId {
        match self.transform {
            Some(hash) => hash,
            None if self.key.len() == HashId::Sha256.len_bytes() => HashId::Sha256,
            None => HashId::Sha384,
        }
    }

    /// Identity and key for these two. `None`: the names are too long for version 0 (whose identity has 255 bytes at
    /// most), or [`Version::V1Old`] of a key that is not transformed.
    pub fn tls(&self, names: &Names, version: Version) -> Option<TlsPsk> {
        let (identity, key) = self.derived(names, version)?;
        Some(TlsPsk { identity, key: locked(&key), hash: self.hash() })
    }

    /// See [`Psk::tls`]; in ordinary memory, which is wiped.
    fn derived(&self, names: &Names, version: Version) -> Option<(String, Zeroizing<Vec<u8>>)> {
        let (hash, host) = (self.hash(), names.host.as_bytes());
        let code = hash as u8;
        let key = self.key.expose();
        let made = match (self.transform, version) {
            (None, Version::V1Old) => return None,
            (None, _) => None,
            (Some(h), Version::V1Old) => Some(derive_old(h, key, "HostNQN", host)),
            (Some(h), _) => Some(derive(h, key, "HostNQN", host)?),
        };
        let retained: &[u8] = made.as_ref().map_or(key, |made| made);
        let both = format!("{} {}", names.host, names.subsystem);
        if version == Version::V0 {
            let identity = format!("NVMe0R{code:02} {both}");
            let key = derive(hash, retained, "nvme-tls-psk", identity.as_bytes())?;
            return Some((identity, key));
        }
        let digest = digest(hash, retained, &both);
        let context = format!("{code:02} {digest}");
        let key = match version {
            Version::V1Old => derive_old(hash, retained, "nvme-tls-psk", context.as_bytes()),
            _ => derive(hash, retained, "nvme-tls-psk", context.as_bytes())?,
        };
        Some((format!("NVMe1R{code:02} {both} {digest}"), key))
    }

    /// The key that belongs to an identity which a host of this name offers for this subsystem, if it is one of ours.
    pub fn find(&self, names: &Names, identity: &str) -> Option<TlsPsk> {
        let parsed = Identity::parse(identity).filter(|i| !i.generated)?;
        let versions: &[Version] = match parsed.version {
            0 => &[Version::V0],
            _ => &[Version::V1, Version::V1Old],
        };
        // Only what fits gets locked memory: anybody may ask.
        let mut candidates = versions.iter().filter_map(|v| self.derived(names, *v));
        let (identity, key) = candidates.find(|(own, _)| same(own.as_bytes(), identity.as_bytes()))?;
        Some(TlsPsk { identity, key: locked(&key), hash: self.hash() })
    }
}

impl TlsPsk {
    /// What both sides have after DH-HMAC-CHAP with secure channel concatenation: `session_key` is the hash of the Diffie-Hellman
    /// value, `challenges` are C1 and C2 (NVMe Base 2.0 section 8.13.5.9, TP 8018). `None` for SHA-512, which TLS does not have.
    pub(crate) fn generated(
        names: &Names,
        hash: HashId,
        session_key: &[u8],
        challenges: [&[u8]; 2],
    ) -> Option<TlsPsk> {
        if hash == HashId::Sha512 {
            return None;
        }
        let psk = mac(hash, session_key, &challenges);
        let both = format!("{} {}", names.host, names.subsystem);
        let (code, digest) = (hash as u8, digest(hash, &psk, &both));
        let key = derive(hash, &psk, "nvme-tls-psk", format!("{code:02} {digest}").as_bytes())?;
        Some(TlsPsk { identity: format!("NVMe1G{code:02} {both} {digest}"), key: locked(&key), hash })
    }
}

fn locked(key: &[u8]) -> Arc<SecretBytes> {
    Arc::new(SecretBytes::from_slice(key))
}

/// What version 1 identities have behind the names.
fn digest(hash: HashId, retained: &[u8], names: &str) -> String {
    STANDARD.encode(&*mac(hash, retained, &[names.as_bytes(), DIGEST_LABEL]))
}

/// HKDF-Expand-Label over HKDF-Extract without salt (RFC 8446 section 7.1), for outputs as long as the hash's. `None`: the
/// context is too long.
fn derive(hash: HashId, key: &[u8], label: &str, context: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    expand_label(hash, &extract(hash, key), label, context, hash.len_bytes())
}

/// HKDF-Expand-Label (RFC 8446 section 7.1) of `len_bytes`, as many as the hash has at most: one block of HKDF-Expand.
/// `None`: the output, the label or the context is too long.
pub fn expand_label(
    hash: HashId,
    secret: &[u8],
    label: &str,
    context: &[u8],
    len_bytes: usize,
) -> Option<Zeroizing<Vec<u8>>> {
    let context_len = u8::try_from(context.len()).ok()?;
    let label_len = u8::try_from(6 + label.len()).ok()?;
    if len_bytes > hash.len_bytes() {
        return None;
    }
    let len = (len_bytes as u16).to_be_bytes();
    let parts: [&[u8]; 7] = [&len, &[label_len], b"tls13 ", label.as_bytes(), &[context_len], context, &[1]];
    let mut out = mac(hash, secret, &parts);
    out.truncate(len_bytes);
    Some(out)
}

/// As libnvme did it: the output's length little-endian, no lengths of label and context.
fn derive_old(hash: HashId, key: &[u8], label: &str, context: &[u8]) -> Zeroizing<Vec<u8>> {
    let prk = extract(hash, key);
    let len = (hash.len_bytes() as u16).to_le_bytes();
    mac(hash, &prk, &[&len, b"tls13 ", label.as_bytes(), context, &[1]])
}

fn extract(hash: HashId, key: &[u8]) -> Zeroizing<Vec<u8>> {
    let salt = [0; 64];
    mac(hash, &salt[..hash.len_bytes()], &[key])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys of libnvme's test/psk.c.
    const KEY_256: &str = "NVMeTLSkey-1:01:VRLbtnN9AQb2WXW3c9+wEf/DRLz0QuLdbYvEhwtdWwNf9LrZ:";
    const KEY_384: &str =
        "NVMeTLSkey-1:02:VRLbtnN9AQb2WXW3c9+wEf/DRLz0QuLdbYvEhwtdWwP/w0S89ELi3W2LxIcLXVsDn8kXZQ==:";

    fn names(host: &str, subsystem: &str) -> Names {
        Names { host: host.into(), subsystem: subsystem.into() }
    }

    /// Identities of libnvme's test/psk.c, as of its commit fde6b1f5 and (last two) as of before.
    #[test]
    fn identities_are_libnvmes() {
        let names = names("nqn.psk-test-host", "nqn.psk-test-subsys");
        let cases = [
            (KEY_256, Version::V1, "1", "iSbjiStwJ/1TrTvDlt2fjFmzvsytOJelidNnA+X5lEU="),
            (KEY_384, Version::V1, "2", "QhW2+Rp6RzHlNtCslyRxMnwJ11tKKhz8JCAQpQ+XUD8f9td1VeH5h53yz2wKJG1a"),
            (KEY_256, Version::V1Old, "1", "66GuqV08TsAGII39teWUfwQwizjv06Jy8jOcX3NAAzM="),
            (
                KEY_384,
                Version::V1Old,
                "2",
                "RsKmYJ3nAn1ApjjMloJFbAkLPivONDAX/xW327YBUsn2eGShXSjCZvBaOxscLqmz",
            ),
        ];
        for (key, version, hash, digest) in cases {
            let psk = Psk::parse(key).expect("libnvme made it");
            let tls = psk.tls(&names, version).expect("fits");
            let want = format!("NVMe1R0{hash} nqn.psk-test-host nqn.psk-test-subsys {digest}");
            assert_eq!(tls.identity, want);
            assert_eq!(psk.find(&names, &want), Some(tls));
        }
    }

    /// PSK, digest and TLS PSK of the Linux kernel's KUnit tests (drivers/nvme/common/tests/auth_kunit.c). They name the
    /// subsystem "subsysnqn" and the host "hostnqn", and generate the PSK of a session key of 'A', 'B'... and the challenges
    /// 0, 1... and 255, 254...
    #[test]
    fn keys_are_the_kernels() {
        let bytes = |hex: &str| -> Vec<u8> {
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hex")).collect()
        };
        let cases = [
            (
                "1733c59fa7f48fcf37f5f26fc4ff0268ad4f78e030f4f3b0bfd1d47e7bb1447a",
                "OldoKuTfKddMuyCznAZojkWD7P4D9/AtzDzLimtOxqI=",
                "3c17da628474a04d2247c4cab47968c915388193f7c071bd9489cc3666cd7cc8",
            ),
            (
                "f14b2dd3234c459694d3bc63f8968bd6b37c2c6de849e22e11874900\
                 1ce4bbe8640b9e3a748cb11ce4b1d71d359cce39",
                "cffMWk8TSS7HOQebjgYEIkrPrjWPV4JE5cdPB8WhEvY4JBW5YynKyv66XscN4A9n",
                "2774753233537b3fa50eb7d16a8e43457d85f4906c005b2236616c5d\
                 80939d0898fff15bb8b77119d2be0aac423e7590",
            ),
        ];
        for (psk, digest, key) in cases {
            let tls =
                Psk::new(&bytes(psk), None).expect("legal").tls(&names("hostnqn", "subsysnqn"), Version::V1);
            let tls = tls.expect("fits");
            assert!(tls.identity.ends_with(&format!(" hostnqn subsysnqn {digest}")), "{}", tls.identity);
            assert_eq!(tls.key.expose(), bytes(key));
            let hash = tls.hash;
            let up = |from: u8| -> Vec<u8> { (0..hash.len_bytes() as u8).map(|i| from + i).collect() };
            let (session, c1) = (up(b'A'), up(0));
            let c2: Vec<u8> = c1.iter().map(|i| 255 - i).collect();
            assert_eq!(*mac(hash, &session, &[&c1, &c2]), bytes(psk), "the kernel's generated PSK");
            let names = names("hostnqn", "subsysnqn");
            let made = TlsPsk::generated(&names, hash, &session, [&c1, &c2]).expect("fits");
            assert_eq!(made.identity, tls.identity.replace("NVMe1R", "NVMe1G"));
            assert_eq!(made.key, tls.key);
            assert!(Identity::parse(&made.identity).is_some_and(|i| i.generated && i.host == "hostnqn"));
            assert_eq!(TlsPsk::generated(&names, HashId::Sha512, &session, [&c1, &c2]), None);
            let configured = Psk::new(&bytes(psk), None).expect("legal");
            assert_eq!(configured.find(&names, &made.identity), None, "a configured key is no generated one");
        }
    }

    /// Computed with Python's hmac from the definition above.
    #[test]
    fn version_0_is_as_defined() {
        let names = names("nqn.psk-test-host", "nqn.psk-test-subsys");
        let tls = Psk::parse(KEY_256).expect("legal").tls(&names, Version::V0).expect("fits");
        assert_eq!(tls.identity, "NVMe0R01 nqn.psk-test-host nqn.psk-test-subsys");
        let hex: String = tls.key.expose().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "05c6503551ad136e6ee32e6eeb3f6d500b69701d84ec71e328f65c7f51566f68");
        // Names that do not fit: no key, rather than one that nobody else derives.
        let long = Names { host: "h".repeat(223), subsystem: "s".repeat(223) };
        let psk = Psk::parse(KEY_256).expect("legal");
        assert_eq!(psk.tls(&long, Version::V0), None);
        assert!(psk.tls(&long, Version::V1).is_some());
        assert_eq!(Psk::new(&[1; 32], None).expect("legal").tls(&long, Version::V1Old), None);
    }

    #[test]
    fn only_own_identities_are_found() {
        let n = names("nqn.a", "nqn.b");
        let psk = Psk::new(&[7; 48], Some(HashId::Sha384)).expect("legal");
        for v in [Version::V0, Version::V1, Version::V1Old] {
            let tls = psk.tls(&n, v).expect("fits");
            assert_eq!(psk.find(&n, &tls.identity).as_ref(), Some(&tls));
            assert_eq!(psk.find(&names("nqn.c", "nqn.b"), &tls.identity), None);
            assert_eq!(psk.find(&n, &tls.identity.replace("R02", "R01")), None);
            let other = Psk::new(&[8; 48], Some(HashId::Sha384)).expect("legal").tls(&n, v).expect("fits");
            assert_eq!(psk.find(&n, &other.identity).is_some(), v == Version::V0, "names only");
            let parsed = Identity::parse(&tls.identity).expect("well formed");
            assert_eq!((parsed.host, parsed.subsystem, parsed.hash), ("nqn.a", "nqn.b", HashId::Sha384));
        }
        for bad in [
            "",
            "NVMe0R01",
            "NVMe0R01 a",
            "NVMe0R01 a b c",
            "NVMe1R01 a b",
            "NVMe1R01 a b c d",
            "NVMe2R01 a b c",
            "NVMe0R03 a b",
            "NVMe0G01 a b",
            "NVMe1G01 a b",
            "NVMe1G03 a b c",
            "NVMe0R01  b",
            "NVMe0R01 a ",
        ] {
            assert_eq!(Identity::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn texts_come_and_go_and_what_is_wrong_is_said() {
        for text in [KEY_256, KEY_384, &KEY_256.replace(":01:", ":00:"), &KEY_384.replace(":02:", ":00:")] {
            let psk = Psk::parse(&format!(" {text}\n")).expect("legal");
            assert_eq!(psk.to_text().as_str(), text);
            assert!(!format!("{psk:?}").contains("55"), "never printed");
        }
        assert_eq!(Psk::parse(&KEY_256.replace(":01:", ":02:")), Err(PskError::Length(32)));
        assert_eq!(Psk::parse(&KEY_256.replace(":01:", ":03:")), Err(PskError::Hash(3)));
        assert_eq!(Psk::parse(&KEY_256.replace("VRL", "VRM")), Err(PskError::Crc));
        for bad in ["", "NVMeTLSkey-1", "NVMeTLSkey-1:01:", "NVMeTLSkey-1:1:AA==:", "DHHC-1:00:AA:"] {
            assert_eq!(Psk::parse(bad), Err(PskError::Form), "{bad}");
        }
        assert_eq!(Psk::parse(KEY_256.trim_end_matches(':')), Err(PskError::Form));
        assert_eq!(Psk::new(&[0; 33], None), Err(PskError::Length(33)));
    }
}
