//! The identities that a ClientHello offers (RFC 8446 sections 4.1.2 and 4.2.11).

/// Type of the pre_shared_key extension.
const PRE_SHARED_KEY: u16 = 41;

/// Takes `n` bytes off the front.
fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(n)?;
    *bytes = rest;
    Some(head)
}

fn number(bytes: &mut &[u8], size: usize) -> Option<usize> {
    Some(take(bytes, size)?.iter().fold(0, |n, b| n << 8 | usize::from(*b)))
}

/// Takes a vector whose length is in its first `size` bytes.
fn vector<'a>(bytes: &mut &'a [u8], size: usize) -> Option<&'a [u8]> {
    let len = number(bytes, size)?;
    take(bytes, len)
}

fn extension(mut hello: &[u8], wanted: u16) -> Option<&[u8]> {
    // legacy_version and random.
    take(&mut hello, 2 + 32)?;
    let _session_id = vector(&mut hello, 1)?;
    let _cipher_suites = vector(&mut hello, 2)?;
    let _compression = vector(&mut hello, 1)?;
    let mut extensions = vector(&mut hello, 2)?;
    while !extensions.is_empty() {
        let kind = number(&mut extensions, 2)?;
        let data = vector(&mut extensions, 2)?;
        if kind == usize::from(wanted) {
            return Some(data);
        }
    }
    None
}

/// The identities in the body of a ClientHello (without its handshake header), by the host's preference; those that are no
/// UTF-8 are nobody's. What is malformed ends the list.
pub fn identities(hello: &[u8]) -> Vec<&str> {
    let mut found = Vec::new();
    let Some(mut psk) = extension(hello, PRE_SHARED_KEY) else { return found };
    let Some(mut list) = vector(&mut psk, 2) else { return found };
    while let Some(identity) = vector(&mut list, 2)
        && take(&mut list, 4).is_some()
    {
        found.extend(std::str::from_utf8(identity).ok());
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut h = vec![3, 3];
        h.extend([0; 32]);
        h.extend([2, 9, 9, 0, 2, 0x13, 1, 1, 0]);
        let all: Vec<u8> = extensions
            .iter()
            .flat_map(|(k, d)| [&k.to_be_bytes()[..], &(d.len() as u16).to_be_bytes(), d].concat())
            .collect();
        h.extend((all.len() as u16).to_be_bytes());
        h.extend(all);
        h
    }

    fn psks(names: &[&[u8]]) -> Vec<u8> {
        let list: Vec<u8> =
            names.iter().flat_map(|n| [&(n.len() as u16).to_be_bytes()[..], n, &[0; 4]].concat()).collect();
        // The binders behind are not looked at.
        [&(list.len() as u16).to_be_bytes()[..], &list, &[0, 33, 32], &[0; 32]].concat()
    }

    #[test]
    fn they_are_found() {
        let one = hello(&[(0, vec![1, 2]), (41, psks(&[b"alice", &[0xff, 0xfe], b"bob"]))]);
        assert_eq!(identities(&one), ["alice", "bob"]);
        assert!(identities(&hello(&[(0, vec![])])).is_empty());
        assert!(identities(&[]).is_empty());
    }

    proptest! {
        /// Cut or damaged anywhere: no panic, and never more than what is there.
        #[test]
        fn damage_is_survived(cut in 0usize..200, at in 0usize..200, value: u8) {
            let mut h = hello(&[(7, vec![0; 20]), (41, psks(&[b"alice", b"bob"]))]);
            let len = h.len();
            h[at % len] = value;
            let total: usize = identities(&h[..cut.min(len)]).iter().map(|i| i.len()).sum();
            prop_assert!(total < len);
        }
    }
}
