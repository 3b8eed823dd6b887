//! The FIPS modes: which algorithms security functions may use, and what has to execute them. Set once, at the program's start.
//!
//! | | `off` | `approved` | `validated` |
//! |---|---|---|---|
//! | new pools | AES-256-GCM with nonces by place, BLAKE3 | AES-256-GCM with nonces that the module makes, HMAC-SHA-256 | as `approved` |
//! | other pools | all are opened | only such | only such |
//! | passwords | Argon2id | PBKDF2-HMAC-SHA-256, 14 bytes at least | as `approved` |
//! | XTS (hosts, whole disks) | AES-128, AES-256 | AES-128, AES-256 | AES-256: what the module has |
//! | DH-HMAC-CHAP | all groups | all groups | `null`: the module has no such key agreement of its own |
//! | TLS of NVMe/TCP | X25519 and ChaCha20, too | P-256, P-384, P-521; AES-GCM | as `approved` |
//! | TLS to key servers | X25519 and ChaCha20, too | P-256, P-384; AES-GCM; of TLS 1.2 with the extended master secret only | as `approved` |
//! | keys, salts | the kernel's randomness | the module's generator | as `approved` |
//! | executed by | AWS-LC | AWS-LC | AWS-LC's FIPS module, tested at the start |

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, RandomizedNonceKey, UnboundKey};
use aws_lc_rs::agreement::{self, PrivateKey, UnparsedPublicKey};
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap as _, KeyWrapPadded as _};
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair as _};
use aws_lc_rs::{digest, hkdf, hmac, pbkdf2, rand, signature};
use cryptfold_bdev_crypto::engine::{self, XtsEngine as _, XtsKey, awslc};
use cryptfold_keystore::{Cost, Limits, MIN_APPROVED_BYTES};
use cryptfold_nvmf_auth::Offer;
use cryptfold_nvmf_spec::auth::DhGroup;
use serde_json::{Value, json};

/// See the module's head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FipsMode {
    /// All that cryptfold has.
    #[default]
    Off,
    /// Only algorithms that FIPS 140-3 approves.
    Approved,
    /// The same, executed by a module that has a certificate.
    Validated,
}

/// Why a mode can not be entered.
#[derive(Debug, PartialEq, Eq)]
pub enum FipsError {
    /// The ordinary library is built in.
    NoModule,
    /// No certificate is known for the module.
    NoCertificate(&'static str),
    /// The module's own tests fail.
    SelfTest,
    /// The module does not confirm a service.
    Service(&'static str),
}

impl fmt::Display for FipsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FipsError::NoModule => f.write_str(
                "--fips-mode validated: this binary has the ordinary AWS-LC, not its FIPS module; scripts/fips build makes one that has \
                 it (--fips-mode approved: the same algorithms without a validated module)",
            ),
            FipsError::NoCertificate(version) => write!(
                f,
                "--fips-mode validated: this binary has version {version} of AWS-LC's FIPS module, a branch for which no certificate \
                 is known; scripts/fips build makes one with branch 3, of which version {CERTIFIED_VERSION} has certificate {CERTIFICATE}"
            ),
            FipsError::SelfTest => f.write_str("--fips-mode validated: the self-test of AWS-LC's FIPS module fails"),
            FipsError::Service(service) => {
                write!(f, "--fips-mode validated: the FIPS module does not confirm {service} as an approved service")
            }
        }
    }
}

impl std::error::Error for FipsError {}

/// The certificate of the module's branch 3, static library: <https://csrc.nist.gov/projects/cryptographic-module-validation-program>.
const CERTIFICATE: &str = "#5314";
const CERTIFIED: &str = "AWS-LC Cryptographic Module (static)";
/// The version that it was given for; later ones of the branch are not named by it.
const CERTIFIED_VERSION: &str = "3.1.0";

/// The certificate of the branch that a version of the module is of.
fn certificate(version: &str) -> Option<&'static str> {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next() == Some(3) && parts.next() >= Some(1)).then_some(CERTIFICATE)
}

impl FipsMode {
    /// As options and replies name it.
    pub const fn name(self) -> &'static str {
        match self {
            FipsMode::Off => "off",
            FipsMode::Approved => "approved",
            FipsMode::Validated => "validated",
        }
    }

    /// Whether only approved algorithms may be used.
    pub const fn is_on(self) -> bool {
        !matches!(self, FipsMode::Off)
    }

    /// Has the whole process keep to the mode. Before anything makes keys or connections; in `validated` the module is tested first.
    ///
    /// # Errors
    /// See [`FipsError`].
    pub fn enter(self) -> Result<(), FipsError> {
        if self == FipsMode::Validated {
            let version = awslc::fips_module().ok_or(FipsError::NoModule)?;
            certificate(version).ok_or(FipsError::NoCertificate(version))?;
            if !awslc::self_test() {
                return Err(FipsError::SelfTest);
            }
            if let Some((service, _)) = services().into_iter().find(|(_, confirmed)| !confirmed) {
                return Err(FipsError::Service(service));
            }
            engine::require_module();
        }
        if self.is_on() {
            cryptfold_nvmf_tls::require_approved();
            cryptfold_kmip::require_approved();
            cryptfold_reactor::set_random_source(|target| {
                rand::fill(target).expect("a random generator that fails makes no keys");
            });
        }
        Ok(())
    }

    /// What slots (and back-ups) that are there may ask for.
    pub fn limits(self) -> Limits {
        Limits { approved: self.is_on(), ..Limits::default() }
    }

    /// What a new password costs, of a pool that was made for the FIPS modes or not, and what its slot may ask for.
    pub fn costs(self, approved_pool: bool) -> (Cost, Limits) {
        let approved = self.is_on() || approved_pool;
        let cost = if approved { Cost::APPROVED } else { Cost::DEFAULT };
        (cost, Limits { approved, ..Limits::default() })
    }

    /// What DH-HMAC-CHAP may use when nobody says.
    pub fn offer(self) -> Offer {
        let mut offer = Offer::default();
        offer.groups.retain(|group| self.allows(*group));
        offer
    }

    /// Whether a Diffie-Hellman group may be used.
    pub fn allows(self, group: DhGroup) -> bool {
        self != FipsMode::Validated || group == DhGroup::Null
    }

    /// `cryptfold_get_fips_mode`.
    pub(crate) fn describe(self) -> Value {
        let (module, validated) = (awslc::fips_module(), self == FipsMode::Validated);
        json!({
            "mode": self.name(),
            "library": format!("AWS-LC{} {}", if module.is_some() { " FIPS" } else { "" }, awslc::version()),
            "module_version": module,
            "certificate": module.filter(|_| validated).and_then(|version| Some(describe_certificate(version, certificate(version)?))),
            "services": module.filter(|_| validated).map(|_| {
                services().into_iter().map(|(name, confirmed)| json!({"name": name, "approved": confirmed})).collect::<Vec<_>>()
            }),
        })
    }
}

fn describe_certificate(version: &str, number: &str) -> Value {
    json!({
        "number": number,
        "module": CERTIFIED,
        "certified_version": CERTIFIED_VERSION,
        "exact_match": version == CERTIFIED_VERSION,
    })
}

/// A probe of services that are used: which, and whether the module says that each ran as an approved one.
fn services() -> Vec<(&'static str, bool)> {
    let mut all = services_of_pools();
    all.extend(services_of_connections());
    all
}

fn asked(name: &'static str, call: impl FnOnce() -> Option<()>) -> (&'static str, bool) {
    let (done, approved) = awslc::is_approved(call);
    (name, done.is_some() && approved)
}

/// What TLS and DH-HMAC-CHAP need besides the others.
fn services_of_connections() -> Vec<(&'static str, bool)> {
    let signed = |algorithm| {
        let _ = hmac::sign(&hmac::Key::new(algorithm, &[9; 48]), b"cryptfold");
        Some(())
    };
    // The keys are made outside: that they are is another service.
    let pair = |algorithm| {
        let (own, other) = (PrivateKey::generate(algorithm).ok()?, PrivateKey::generate(algorithm).ok()?);
        Some((own, other.compute_public_key().ok()?))
    };
    let agreed = |name, algorithm| {
        let keys = pair(algorithm);
        asked(name, || {
            let (own, other) = keys?;
            agreement::agree(&own, UnparsedPublicKey::new(algorithm, other.as_ref()), (), |_| Ok(())).ok()
        })
    };
    vec![
        asked("HMAC-SHA-384", || signed(hmac::HMAC_SHA384)),
        asked("HMAC-SHA-512", || signed(hmac::HMAC_SHA512)),
        agreed("ECDH with P-256", &agreement::ECDH_P256),
        agreed("ECDH with P-384", &agreement::ECDH_P384),
    ]
}

fn services_of_pools() -> Vec<(&'static str, bool)> {
    let mut bytes = [7; 4096];
    let key = [9; 32];
    let xts: Vec<u8> = (0..64).collect();
    let engine = XtsKey::new(&xts).ok().and_then(|key| awslc::AwsLc::new(&key).ok());
    let mut unit = [1; 64];
    let sealed = RandomizedNonceKey::new(&AES_256_GCM, &key)
        .and_then(|key| key.seal_in_place_separate_tag(Aad::empty(), &mut unit));
    vec![
        asked("AES-256-XTS encryption", || {
            engine.as_ref()?.encrypt_in_place(1, &mut bytes);
            Some(())
        }),
        asked("AES-256-XTS decryption", || {
            engine.as_ref()?.decrypt_in_place(1, &mut bytes);
            Some(())
        }),
        asked("AES-256-GCM with a nonce of the module", || {
            let key = RandomizedNonceKey::new(&AES_256_GCM, &key).ok()?;
            key.seal_in_place_separate_tag(Aad::empty(), &mut [1; 64]).ok().map(drop)
        }),
        asked("AES-256-GCM opening", || {
            let (nonce, tag) = sealed.ok()?;
            let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).ok()?);
            key.open_in_place_separate_tag(nonce, Aad::empty(), tag.as_ref(), &mut unit).ok().map(drop)
        }),
        asked("AES-256 key wrap", || {
            let mut out = [0; 40];
            AesKek::new(&AES_256, &key).ok()?.wrap(&[3; 32], &mut out).ok().map(drop)
        }),
        asked("AES-256 key wrap with padding", || {
            let mut out = [0; 48];
            AesKek::new(&AES_256, &key).ok()?.wrap_with_padding(&[3; 33], &mut out).ok().map(drop)
        }),
        asked("SHA-256", || {
            let _ = digest::digest(&digest::SHA256, b"cryptfold");
            Some(())
        }),
        asked("HMAC-SHA-256", || {
            let _ = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key), b"cryptfold");
            Some(())
        }),
        asked("HKDF-SHA-256", || {
            let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &[5; 32]).extract(&key);
            prk.expand(&[b"cryptfold"], hkdf::HKDF_SHA256).ok()?.fill(&mut [0; 32]).ok()
        }),
        asked("PBKDF2-HMAC-SHA-256", || {
            let iterations = std::num::NonZeroU32::new(1000)?;
            pbkdf2::derive(
                pbkdf2::PBKDF2_HMAC_SHA256,
                iterations,
                &[5; 32],
                &[6; MIN_APPROVED_BYTES],
                &mut [0; 32],
            );
            Some(())
        }),
        asked("CTR_DRBG", || rand::fill(&mut [0; 32]).ok()),
        asked("Ed25519", || {
            let pair = Ed25519KeyPair::generate().ok()?;
            signature::UnparsedPublicKey::new(&ED25519, pair.public_key().as_ref())
                .verify(b"cryptfold", pair.sign(b"cryptfold").as_ref())
                .ok()
        }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_of_a_branch() {
        assert_eq!(certificate("3.6.0"), Some("#5314"));
        let exact = |version| describe_certificate(version, "#5314")["exact_match"].clone();
        assert_eq!((exact("3.6.0"), exact("3.1.0")), (json!(false), json!(true)));
        for other in ["3.0.0", "2.9.9", "4.2.0", "5.12.0", "", "3"] {
            assert_eq!(certificate(other), None, "{other}");
        }
    }

    #[cfg(not(feature = "fips"))]
    #[test]
    fn without_the_module_nothing_is_validated() {
        assert_eq!(FipsMode::Validated.enter(), Err(FipsError::NoModule));
        let shown = FipsMode::Off.describe();
        assert_eq!((&shown["certificate"], &shown["services"]), (&Value::Null, &Value::Null));
    }

    #[cfg(feature = "fips")]
    #[test]
    fn the_module_confirms_what_is_used() {
        let (off, validated) = (FipsMode::Off.describe(), FipsMode::Validated.describe());
        assert_eq!((&off["certificate"], &off["services"]), (&Value::Null, &Value::Null));
        assert_eq!(validated["certificate"]["exact_match"], validated["module_version"] == CERTIFIED_VERSION);
        let refused: Vec<_> = services().into_iter().filter(|(_, confirmed)| !confirmed).collect();
        assert!(refused.is_empty(), "{refused:?}");
        // What it must not confirm: a nonce from outside.
        let foreign = awslc::is_approved(|| {
            use aws_lc_rs::aead::Nonce;
            let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[9; 32]).unwrap());
            key.seal_in_place_separate_tag(Nonce::assume_unique_for_key([1; 12]), Aad::empty(), &mut [1; 64])
                .is_ok()
        });
        assert_eq!(foreign, (true, false));
        assert_eq!(FipsMode::Validated.enter(), Ok(()));
    }

    #[test]
    fn modes_restrict() {
        assert_eq!(FipsMode::Validated.offer().groups, [DhGroup::Null]);
        assert_eq!(FipsMode::Approved.offer(), Offer::default());
        assert_eq!(FipsMode::Off.costs(false), (Cost::DEFAULT, Limits::default()));
        for (cost, limits) in [FipsMode::Off.costs(true), FipsMode::Approved.costs(false)] {
            assert!(cost == Cost::APPROVED && limits.approved);
        }
        // A pool of the FIPS modes with another slot: `off` opens that, and changes it.
        assert!(!FipsMode::Off.limits().approved && FipsMode::Approved.limits().approved);
    }
}
