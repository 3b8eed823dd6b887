//! Erase certificates: what was erased, what was done for it, and what is not claimed.
//!
//! `{"certificate": {...}, "sha256": HEX, "public_key": HEX, "signature": HEX}`: SHA-256 of the certificate's compact JSON (members in
//! alphabetical order), and an Ed25519 signature (RFC 8032) of those 32 bytes with a key that this machine made for it and keeps in
//! the key directory. Whoever wants to rely on the signature notes the public key beforehand.

use std::path::Path;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use serde_json::{Value, json};

use crate::jsonrpc::RpcError;
use crate::keys::{read_key_file, write_key_file};
use crate::params::unhex;

/// Name of the signing key in the key directory.
const KEY_FILE: &str = "certificates.pk8";
/// First member of every certificate.
const FORMAT: &str = "cryptfold erase certificate 1";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The key that signs; made the first time.
///
/// # Errors
/// It can not be read or made.
pub fn signer(dir: &Path) -> Result<Ed25519KeyPair, RpcError> {
    let path = dir.join(KEY_FILE);
    let bad = |what: String| RpcError::internal(format!("{}: {what}", path.display()));
    if !path.exists() {
        let pair = Ed25519KeyPair::generate().map_err(|e| bad(e.to_string()))?;
        let document = pair.to_pkcs8().map_err(|e| bad(e.to_string()))?;
        write_key_file(&path, document.as_ref())?;
    }
    Ed25519KeyPair::from_pkcs8(&read_key_file(&path)?).map_err(|e| bad(e.to_string()))
}

/// Signs a certificate's content, which gets its format and time.
pub fn sign(pair: &Ed25519KeyPair, mut content: Value, time_ms: u64) -> Value {
    content["format"] = FORMAT.into();
    content["time_ms"] = time_ms.into();
    content["by"] = concat!("cryptfold ", env!("CARGO_PKG_VERSION")).into();
    let sum = digest(&SHA256, content.to_string().as_bytes());
    let signature = pair.sign(sum.as_ref());
    json!({
        "certificate": content, "sha256": hex(sum.as_ref()), "public_key": hex(pair.public_key().as_ref()),
        "signature": hex(signature.as_ref()),
    })
}

/// Whether digest and signature are right.
///
/// # Errors
/// What is wrong, in one line.
pub fn verify(signed: &Value) -> Result<(), String> {
    let content = &signed["certificate"];
    if content["format"] != FORMAT {
        return Err("no erase certificate of this version".into());
    }
    let bytes = |name: &str| {
        signed[name]
            .as_str()
            .and_then(unhex)
            .ok_or_else(|| format!("\"{name}\" is missing or not hexadecimal"))
    };
    let sum = digest(&SHA256, content.to_string().as_bytes());
    if bytes("sha256")? != sum.as_ref() {
        return Err("the certificate was changed: its digest is another".into());
    }
    let key = UnparsedPublicKey::new(&ED25519, bytes("public_key")?);
    key.verify(sum.as_ref(), &bytes("signature")?)
        .map_err(|_| "the signature does not fit the certificate".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_verifies_until_it_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let pair = || signer(dir.path()).unwrap();
        let signed = sign(&pair(), json!({"what": "pool", "claims": ["a", "b"]}), 5);
        let again: Value = serde_json::from_str(&format!("{signed:#}")).unwrap();
        assert_eq!(verify(&again), Ok(()));
        assert_eq!(sign(&pair(), json!({}), 6)["public_key"], signed["public_key"], "one key");
        for (pointer, value, words) in [
            ("/certificate/what", json!("domain"), "digest"),
            ("/certificate/time_ms", json!(6), "digest"),
            ("/certificate/format", json!("x"), "version"),
            ("/sha256", json!("00"), "digest"),
            ("/signature", json!("00"), "signature"),
            ("/public_key", json!(5), "hexadecimal"),
        ] {
            let mut changed = again.clone();
            *changed.pointer_mut(pointer).unwrap() = value;
            assert!(verify(&changed).unwrap_err().contains(words), "{pointer}");
        }
    }
}
