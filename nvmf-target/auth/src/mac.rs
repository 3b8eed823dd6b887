//! Hash functions and HMACs, by the identifiers of the wire. What goes in and comes out is secret: no copy stays on the stack.

use aws_lc_rs::{digest, hmac};
use cryptfold_nvmf_spec::auth::HashId;
use cryptfold_reactor::memory::on_wiped_stack;
use zeroize::Zeroizing;

/// HMAC over the concatenation of `parts`.
pub(crate) fn mac(hash: HashId, key: &[u8], parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    let algorithm = match hash {
        HashId::Sha256 => hmac::HMAC_SHA256,
        HashId::Sha384 => hmac::HMAC_SHA384,
        HashId::Sha512 => hmac::HMAC_SHA512,
    };
    on_wiped_stack(|| {
        let mut context = hmac::Context::with_key(&hmac::Key::new(algorithm, key));
        parts.iter().for_each(|p| context.update(p));
        Zeroizing::new(context.sign().as_ref().to_vec())
    })
}

/// The hash of some bytes.
pub(crate) fn hash(hash: HashId, bytes: &[u8]) -> Zeroizing<Vec<u8>> {
    let algorithm = match hash {
        HashId::Sha256 => &digest::SHA256,
        HashId::Sha384 => &digest::SHA384,
        HashId::Sha512 => &digest::SHA512,
    };
    on_wiped_stack(|| Zeroizing::new(digest::digest(algorithm, bytes).as_ref().to_vec()))
}

/// Whether both are the same, in time that depends on the lengths only.
pub(crate) fn same(a: &[u8], b: &[u8]) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(a, b).is_ok()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::{Names, Psk, Secret, Version};

    /// What is left below the caller's frame after `f`, whose callers give what must not be there.
    fn left_by(f: impl FnOnce() + Send + 'static) -> Vec<u8> {
        let memory = File::open("/proc/self/mem").unwrap();
        let look = move || {
            let (here, mut below) = (0_u8, vec![0; 128 << 10]);
            f();
            // One call of the system's, so that little of it is overwritten before.
            memory.read_exact_at(&mut below, (&raw const here) as u64 - (128 << 10)).unwrap();
            below
        };
        std::thread::Builder::new().stack_size(1 << 20).spawn(look).unwrap().join().unwrap()
    }

    fn parts(key: &[u8]) -> Vec<Vec<u8>> {
        key.chunks_exact(8).map(<[u8]>::to_vec).collect()
    }

    #[test]
    fn nothing_of_a_key_stays_on_the_stack() {
        let mut bytes = [0; 32];
        aws_lc_rs::rand::fill(&mut bytes).unwrap();
        let names = || Names { host: "nqn.a".into(), subsystem: "nqn.b".into() };
        let psk = Psk::new(&bytes, Some(HashId::Sha256)).unwrap();
        let tls = psk.tls(&names(), Version::V1).unwrap();
        let secret = Secret::new(&bytes, Some(HashId::Sha256)).unwrap();
        let transformed = secret.transformed("nqn.a");
        let mut wanted = parts(&bytes);
        wanted.extend([tls.key.expose(), transformed.expose()].iter().flat_map(|k| parts(k)));

        let is_left = |f: Box<dyn FnOnce() + Send>| {
            let below = left_by(f);
            wanted.iter().any(|part| below.windows(8).any(|w| w == part))
        };
        // The search finds what is there.
        let copied = bytes;
        assert!(is_left(Box::new(move || {
            let mut copies = [[0; 32]; 256];
            copies[0] = copied;
            std::hint::black_box(&copies);
        })));
        let texts = (psk.to_text(), secret.to_text());
        assert!(!is_left(Box::new(move || {
            assert!(Psk::parse(&texts.0).is_ok() && Secret::parse(&texts.1).is_ok());
        })));
        let used = (psk, secret, tls.identity.clone());
        assert!(!is_left(Box::new(move || {
            let (psk, secret, identity) = used;
            assert!(psk.find(&names(), &identity).is_some());
            assert_eq!(secret.transformed("nqn.a").len(), 32);
        })));
    }
}
