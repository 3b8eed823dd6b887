//! The text form that keys are handed around in, `PREFIX:HH:BASE64:`: two hexadecimal digits name a hash (00: none), the base64 is of
//! the key and its CRC-32, little endian (NVMe Base 2.0 section 8.13.5.8 for DH-HMAC-CHAP, NVMe/TCP Transport 1.0 section 3.6.1 for TLS).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cryptfold_nvmf_spec::auth::HashId;
use cryptfold_reactor::memory::on_wiped_stack;
use zeroize::Zeroizing;

/// Why a text is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextError {
    Form,
    Hash(u8),
    Crc,
}

/// The hash that a text names, and its key.
pub fn parse(prefix: &str, text: &str) -> Result<(Option<HashId>, Zeroizing<Vec<u8>>), TextError> {
    on_wiped_stack(|| taken_apart(prefix, text))
}

fn taken_apart(prefix: &str, text: &str) -> Result<(Option<HashId>, Zeroizing<Vec<u8>>), TextError> {
    let rest = text.trim().strip_prefix(prefix).and_then(|rest| rest.strip_prefix(':'));
    let (code, rest) = rest.and_then(|rest| rest.split_once(':')).ok_or(TextError::Form)?;
    let encoded = rest.strip_suffix(':').filter(|_| code.len() == 2).ok_or(TextError::Form)?;
    let hash = match u8::from_str_radix(code, 16).map_err(|_| TextError::Form)? {
        0 => None,
        c => Some(HashId::from_u8(c).ok_or(TextError::Hash(c))?),
    };
    let mut bytes = Zeroizing::new(STANDARD.decode(encoded).map_err(|_| TextError::Form)?);
    let crc = *bytes.last_chunk::<4>().ok_or(TextError::Form)?;
    let len = bytes.len() - crc.len();
    bytes.truncate(len);
    if crc_fast::crc32_iso_hdlc(&bytes) != u32::from_le_bytes(crc) {
        return Err(TextError::Crc);
    }
    Ok((hash, bytes))
}

/// The text of a key.
pub fn to_text(prefix: &str, hash: Option<HashId>, key: &[u8]) -> Zeroizing<String> {
    let code = hash.map_or(0, |h| h as u8);
    let mut bytes = Zeroizing::new(Vec::with_capacity(key.len() + 4));
    bytes.extend_from_slice(key);
    bytes.extend_from_slice(&crc_fast::crc32_iso_hdlc(key).to_le_bytes());
    let encoded = Zeroizing::new(STANDARD.encode(&*bytes));
    Zeroizing::new(format!("{prefix}:{code:02x}:{}:", encoded.as_str()))
}
