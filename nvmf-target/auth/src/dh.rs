//! Finite-field Diffie-Hellman over the groups of RFC 7919. All unsafe code of this crate.
//!
//! The primes are `2^b - 2^(b-64) + (floor(2^(b-130) e) + X) 2^64 - 1` (RFC 7919 appendix A): one constant, the digits of
//! e, and an X each. Values on the wire are big-endian and as long as the prime.

use std::ptr::NonNull;

#[cfg(feature = "fips")]
use aws_lc_fips_sys as ffi;
#[cfg(not(feature = "fips"))]
use aws_lc_sys as ffi;
use cryptfold_nvmf_spec::auth::DhGroup;
use zeroize::Zeroizing;

/// Bytes of a private exponent: twice what the largest group's strength asks for (RFC 7919 appendix A.5: 400 bits).
pub const PRIVATE_BYTES: usize = 64;

/// `floor(2^8062 e)`, hexadecimal.
#[rustfmt::skip]
const E: &str = "\
    adf85458a2bb4a9aafdc5620273d3cf1d8b9c583ce2d3695a9e13641146433fbcc939dce249b3ef97d2fe363630c75d8f681\
    b202aec4617ad3df1ed5d5fd65612433f51f5f066ed0856365553ded1af3b557135e7f57c935984f0c70e0e68b77e2a689da\
    f3efe8721df158a136ade73530acca4f483a797abc0ab182b324fb61d108a94bb2c8e3fbb96adab760d7f4681d4f42a3de39\
    4df4ae56ede76372bb190b07a7c8ee0a6d709e02fce1cdf7e2ecc03404cd28342f619172fe9ce98583ff8e4f1232eef28183\
    c3fe3b1b4c6fad733bb5fcbc2ec22005c58ef1837d1683b2c6f34a26c1b2effa886b4238611fcfdcde355b3b6519035bbc34\
    f4def99c023861b46fc9d6e6c9077ad91d2691f7f7ee598cb0fac186d91caefe130985139270b4130c93bc437944f4fd4452\
    e2d74dd364f2e21e71f54bff5cae82ab9c9df69ee86d2bc522363a0dabc521979b0deada1dbf9a42d5c4484e0abcd06bfa53\
    ddef3c1b20ee3fd59d7c25e41d2b669e1ef16e6f52c3164df4fb7930e9e4e58857b6ac7d5f42d69f6d187763cf1d55034004\
    87f55ba57e31cc7a7135c886efb4318aed6a1e012d9e6832a907600a918130c46dc778f971ad0038092999a333cb8b7a1a1d\
    b93d7140003c2a4ecea9f98d0acc0a8291cdcec97dcf8ec9b55a7f88a46b4db5a851f44182e1c68a007e5e0dd9020bfd64b6\
    45036c7a4e677d2c38532a3a23ba4442caf53ea63bb454329b7624c8917bdd64b1c0fd4cb38e8c334c701c3acdad0657fccf\
    ec719b1f5c3e4e46041f388147fb4cfdb477a52471f7a9a96910b855322edb6340d8a00ef092350511e30abec1fff9e3a26e\
    7fb29f8c183023c3587e38da0077d9b4763e4e4b94b2bbc194c6651e77caf992eeaac0232a281bf6b3a739c1226116820ae8\
    db5847a67cbef9c9091b462d538cd72b03746ae77f5e62292c311562a846505dc82db854338ae49f5235c95b91178ccf2dd5\
    cacef403ec9d1810c6272b045b3b71f9dc6b80d63fdd4a8e9adb1e6962a69526d43161c1a41d570d7938dad4a40e329ccff4\
    6aaa36ad004cf600c8381e425a31d951ae64fdb23fcec9509d43687feb69edd1cc5e0b8cc3bdf64b10ef86b63142a3ab8829\
    555b2f747c932665cb2c0f1cc01bd70229388839d2af05e454504ac78b7582822846c0ba35c35f5c59160cc046fd8251541f\
    c68c9c86b022bb7099876a460e7451a8a93109703fee1c217e6c3826e52c51aa691e0e423cfc99e9e31650c1217b624816cd\
    ad9a95f9d5b8019488d9c0a0a1fe3075a577e23183f81d4a3f2fa4571efc8ce0ba8a4fe8b6855dfe72b0a66eded2fbabfbe5\
    8a30fafabe1c5d71a87e2f741ef8c1fe86fea6bbfde530677f0d97d11d49f7a8443d0822e506a9f4614e011e2a94838ff88c\
    d68c8bb7c51eef6d";

/// The X of each group.
const fn x(group: DhGroup) -> u32 {
    match group {
        DhGroup::Null => 0,
        DhGroup::Ffdhe2048 => 560_316,
        DhGroup::Ffdhe3072 => 2_625_351,
        DhGroup::Ffdhe4096 => 5_736_041,
        DhGroup::Ffdhe6144 => 15_705_020,
        DhGroup::Ffdhe8192 => 10_965_728,
    }
}

fn nibble(c: u8) -> u8 {
    if c.is_ascii_digit() { c - b'0' } else { c - b'a' + 10 }
}

/// The group's prime. Empty for the null group.
fn prime(group: DhGroup) -> Vec<u8> {
    let len = group.len_bytes();
    if len == 0 {
        return Vec::new();
    }
    let digits = E.as_bytes()[..2 * (len - 16)].chunks_exact(2);
    let mut middle: Vec<u8> = digits.map(|d| nibble(d[0]) << 4 | nibble(d[1])).collect();
    // X - 1: the 1 that is subtracted at the end borrows from here and leaves 64 ones below.
    let mut carry = x(group) - 1;
    for byte in middle.iter_mut().rev() {
        carry += u32::from(*byte);
        *byte = carry as u8;
        carry >>= 8;
    }
    [&[0xff; 8][..], &middle, &[0xff; 8]].concat()
}

struct Bn(NonNull<ffi::BIGNUM>);

impl Bn {
    fn new() -> Option<Bn> {
        // SAFETY: no arguments; the result is owned by `Bn`.
        NonNull::new(unsafe { ffi::BN_new() }).map(Bn)
    }

    fn from_bytes(bytes: &[u8]) -> Option<Bn> {
        // SAFETY: the pointer and length are those of a live slice; null makes a new number, owned by `Bn`.
        NonNull::new(unsafe { ffi::BN_bin2bn(bytes.as_ptr(), bytes.len(), std::ptr::null_mut()) }).map(Bn)
    }
}

impl Drop for Bn {
    fn drop(&mut self) {
        // SAFETY: owned, freed once; clears, because it may hold a secret.
        unsafe { ffi::BN_clear_free(self.0.as_ptr()) }
    }
}

struct Ctx(NonNull<ffi::BN_CTX>);

impl Drop for Ctx {
    fn drop(&mut self) {
        // SAFETY: owned, freed once.
        unsafe { ffi::BN_CTX_free(self.0.as_ptr()) }
    }
}

/// `base ^ exponent` modulo the group's prime, in time that does not depend on the exponent's bits. `None` when out of
/// memory, or for a base that is not below the prime.
fn power(group: DhGroup, base: &[u8], exponent: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (p, base, exponent) =
        (Bn::from_bytes(&prime(group))?, Bn::from_bytes(base)?, Bn::from_bytes(exponent)?);
    let result = Bn::new()?;
    // SAFETY: no arguments; the result is owned by `Ctx`.
    let ctx = Ctx(NonNull::new(unsafe { ffi::BN_CTX_new() })?);
    // SAFETY: all are live numbers and a live context of ours; null: the Montgomery values are made for the call.
    let ok = unsafe {
        ffi::BN_mod_exp_mont_consttime(
            result.0.as_ptr(),
            base.0.as_ptr(),
            exponent.0.as_ptr(),
            p.0.as_ptr(),
            ctx.0.as_ptr(),
            std::ptr::null(),
        )
    };
    let mut out = Zeroizing::new(vec![0; group.len_bytes()]);
    // SAFETY: `out` has the length that is named; the number is live.
    let written =
        ok == 1 && unsafe { ffi::BN_bn2bin_padded(out.as_mut_ptr(), out.len(), result.0.as_ptr()) } == 1;
    written.then_some(out)
}

/// The public value `g^x` for a private exponent, with g = 2. Empty for the null group.
pub fn public(group: DhGroup, exponent: &[u8; PRIVATE_BYTES]) -> Option<Vec<u8>> {
    if group == DhGroup::Null {
        return Some(Vec::new());
    }
    power(group, &[2], exponent).map(|v| v.to_vec())
}

/// The shared value. `None` for a peer's value that is not within 2 to p - 2: it would make the secret guessable.
pub fn shared(group: DhGroup, exponent: &[u8; PRIVATE_BYTES], peer: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let mut top = prime(group);
    let last = top.last_mut()?;
    *last -= 1;
    let mut one = vec![0; top.len()];
    *one.last_mut()? = 1;
    // Big-endian and of equal length: the order of the bytes is that of the numbers.
    let within = peer.len() == top.len() && peer > &one[..] && peer < &top[..];
    if within { power(group, peer, exponent) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The library knows two of the primes; all have to be safe primes.
    #[test]
    fn the_primes_are_those_of_rfc_7919() {
        for group in &DhGroup::ALL[1..] {
            let p = prime(*group);
            assert_eq!(p.len(), group.len_bytes());
            let bn = Bn::from_bytes(&p).expect("memory");
            // SAFETY: live parameters of the library's own; only compared.
            let known = unsafe {
                match group {
                    DhGroup::Ffdhe2048 => ffi::DH_get0_p(ffi::DH_get_rfc7919_2048()),
                    DhGroup::Ffdhe4096 => ffi::DH_get0_p(ffi::DH_get_rfc7919_4096()),
                    _ => std::ptr::null(),
                }
            };
            if !known.is_null() {
                // SAFETY: both are live.
                assert_eq!(unsafe { ffi::BN_cmp(bn.0.as_ptr(), known) }, 0);
            }
            // Fermat, with q = (p - 1) / 2 as the order of g = 2: g^q = 1 exactly if 2 generates the prime-order half.
            let mut q = p.clone();
            let mut carry = 0;
            for byte in &mut q {
                let low = *byte & 1;
                *byte = *byte >> 1 | carry << 7;
                carry = low;
            }
            let one = power(*group, &[2], &q).expect("memory");
            assert!(
                one[..one.len() - 1].iter().all(|b| *b == 0) && one[one.len() - 1] == 1,
                "{}",
                group.name()
            );
        }
    }

    #[test]
    fn both_sides_agree_and_bad_values_are_refused() {
        let (a, b) = ([3; PRIVATE_BYTES], [7; PRIVATE_BYTES]);
        for group in &DhGroup::ALL[1..] {
            let (ga, gb) = (public(*group, &a).expect("memory"), public(*group, &b).expect("memory"));
            assert_ne!(ga, gb);
            assert_eq!(shared(*group, &a, &gb).expect("legal"), shared(*group, &b, &ga).expect("legal"));
            let n = group.len_bytes();
            let number = |low: u8| [vec![0; n - 1], vec![low]].concat();
            let p = prime(*group);
            let minus_one = [&p[..n - 1], &[p[n - 1] - 1]].concat();
            for bad in [number(0), number(1), p.clone(), minus_one, vec![0xff; n], vec![2; n - 1], vec![]] {
                assert!(shared(*group, &a, &bad).is_none(), "{}: {bad:?}", group.name());
            }
        }
        assert_eq!(public(DhGroup::Null, &a), Some(Vec::new()));
        assert!(shared(DhGroup::Null, &a, &[]).is_none());
    }
}
