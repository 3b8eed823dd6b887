//! Hash functions and HMACs, by the identifiers of the wire.

use aws_lc_rs::{digest, hmac};
use cryptfold_nvmf_spec::auth::HashId;
use zeroize::Zeroizing;

/// HMAC over the concatenation of `parts`.
pub(crate) fn mac(hash: HashId, key: &[u8], parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    let algorithm = match hash {
        HashId::Sha256 => hmac::HMAC_SHA256,
        HashId::Sha384 => hmac::HMAC_SHA384,
        HashId::Sha512 => hmac::HMAC_SHA512,
    };
    let mut context = hmac::Context::with_key(&hmac::Key::new(algorithm, key));
    parts.iter().for_each(|p| context.update(p));
    Zeroizing::new(context.sign().as_ref().to_vec())
}

/// The hash of some bytes.
pub(crate) fn hash(hash: HashId, bytes: &[u8]) -> Zeroizing<Vec<u8>> {
    let algorithm = match hash {
        HashId::Sha256 => &digest::SHA256,
        HashId::Sha384 => &digest::SHA384,
        HashId::Sha512 => &digest::SHA512,
    };
    Zeroizing::new(digest::digest(algorithm, bytes).as_ref().to_vec())
}

/// Whether both are the same, in time that depends on the lengths only.
pub(crate) fn same(a: &[u8], b: &[u8]) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(a, b).is_ok()
}
