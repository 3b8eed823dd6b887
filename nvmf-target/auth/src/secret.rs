//! Secrets of DH-HMAC-CHAP in the form in which they are handed around (NVMe Base 2.0 section 8.13.5.8):
//! `DHHC-1:HH:BASE64:`, with the secret and its CRC-32 (little-endian) behind the base64, and HH the hash that transforms
//! it: 00 none, 01 SHA-256, 02 SHA-384, 03 SHA-512.

use std::fmt;
use std::sync::Arc;

use cryptfold_nvmf_spec::auth::HashId;
use cryptfold_reactor::SecretBytes;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::interchange::{self, TextError};
use crate::mac::mac;

pub(crate) const PREFIX: &str = "DHHC-1";
/// What goes into a transformed key beside the name.
const TRANSFORM_LABEL: &[u8] = b"NVMe-over-Fabrics";

/// Why a text is no secret. Says nothing about its bytes.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SecretError {
    /// Not the form at all.
    #[error("a secret looks like DHHC-1:HH:BASE64: with HH 00 to 03")]
    Form,
    /// An unknown hash.
    #[error("DHHC-1:{0:02x}: the hash must be 00, 01 (SHA-256), 02 (SHA-384) or 03 (SHA-512)")]
    Hash(u8),
    /// A length that does not exist, or does not fit the hash.
    #[error("the secret has {0} bytes; 32, 48 or 64 are possible, and with a hash as many as that has")]
    Length(usize),
    /// Mistyped.
    #[error("the secret's CRC is wrong: it was mistyped or cut")]
    Crc,
}

impl From<TextError> for SecretError {
    fn from(error: TextError) -> SecretError {
        match error {
            TextError::Form => SecretError::Form,
            TextError::Hash(code) => SecretError::Hash(code),
            TextError::Crc => SecretError::Crc,
        }
    }
}

/// A secret, in locked memory. Copies share it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    key: Arc<SecretBytes>,
    transform: Option<HashId>,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} bytes)", self.key.len())
    }
}

impl Secret {
    /// From raw bytes: 32, 48 or 64, and as many as `transform` has if there is one.
    ///
    /// # Errors
    /// [`SecretError::Length`].
    pub fn new(key: &[u8], transform: Option<HashId>) -> Result<Secret, SecretError> {
        let fits = match transform {
            None => matches!(key.len(), 32 | 48 | 64),
            Some(h) => key.len() == h.len_bytes(),
        };
        if !fits {
            return Err(SecretError::Length(key.len()));
        }
        Ok(Secret { key: Arc::new(SecretBytes::from_slice(key)), transform })
    }

    /// From its text; white space around it is ignored.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn parse(text: &str) -> Result<Secret, SecretError> {
        let (transform, key) = interchange::parse(PREFIX, text)?;
        Secret::new(&key, transform)
    }

    /// Its text.
    pub fn to_text(&self) -> Zeroizing<String> {
        interchange::to_text(PREFIX, self.transform, self.key.expose())
    }

    /// The key that responses are made with by the holder of this name (NVMe Base 2.0 section 8.13.5.8).
    pub(crate) fn transformed(&self, nqn: &str) -> Arc<SecretBytes> {
        match self.transform {
            None => self.key.clone(),
            Some(h) => {
                let key = mac(h, self.key.expose(), &[nqn.as_bytes(), TRANSFORM_LABEL]);
                Arc::new(SecretBytes::from_slice(&key))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_and_go() {
        for (key, h) in
            [(32, None), (48, None), (64, None), (32, Some(HashId::Sha256)), (64, Some(HashId::Sha512))]
        {
            let s = Secret::new(&vec![0x5a; key], h).expect("legal");
            assert_eq!(Secret::parse(&format!(" {}\n", s.to_text().as_str())), Ok(s.clone()));
            assert!(!format!("{s:?}").contains("5a"), "never printed");
        }
        // Made by nvme-cli 2.3: nvme gen-dhchap-key --hmac=0 --secret=000102...1f
        let key: Vec<u8> = (0..32).collect();
        let text = Secret::new(&key, None).expect("legal").to_text();
        assert_eq!(text.as_str(), "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let good = Secret::new(&[7; 32], Some(HashId::Sha256)).expect("legal").to_text();
        assert_eq!(Secret::parse(&good.replace(":01:", ":02:")), Err(SecretError::Length(32)));
        assert_eq!(Secret::parse(&good.replace(":01:", ":04:")), Err(SecretError::Hash(4)));
        assert_eq!(Secret::parse(&good.replace("Bwc", "Bwd")), Err(SecretError::Crc));
        for bad in [
            "",
            "DHHC-1",
            "DHHC-1:00:",
            "DHHC-1:00::",
            "DHHC-1:1:AA==:",
            "DHHC-1:0x:AAAAAAAA:",
            "DHHC-2:00:x:",
        ] {
            assert_eq!(Secret::parse(bad), Err(SecretError::Form), "{bad}");
        }
        assert_eq!(Secret::parse(good.trim_end_matches(':')), Err(SecretError::Form));
        assert_eq!(Secret::new(&[0; 33], None), Err(SecretError::Length(33)));
    }
}
