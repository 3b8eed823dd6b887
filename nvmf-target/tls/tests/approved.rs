//! Sessions of the FIPS modes. A process of its own: the choice holds for all of it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_nvmf_auth::{HashId, Names, Psk, TlsPsk, Version};
use cryptfold_nvmf_tls::{Keys, Raw, Session, require_approved};

type OneWay = Rc<RefCell<VecDeque<u8>>>;

/// One end of a stream in memory.
struct End {
    incoming: OneWay,
    outgoing: OneWay,
}

impl Raw for End {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut bytes = self.incoming.borrow_mut();
        let buf = bufs.iter_mut().find(|b| !b.is_empty()).expect("there is room");
        let n = buf.len().min(bytes.len());
        if n == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        buf.iter_mut().zip(bytes.drain(..n)).for_each(|(to, from)| *to = from);
        Ok(n)
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let buf = bufs.iter().find(|b| !b.is_empty()).expect("there is something");
        self.outgoing.borrow_mut().extend(buf.iter());
        Ok(buf.len())
    }
}

struct One(Psk, Names);

impl Keys for One {
    fn find(&self, identity: &str) -> Option<TlsPsk> {
        self.0.find(&self.1, identity)
    }
}

fn number(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b))
}

fn words(bytes: &[u8]) -> Vec<usize> {
    bytes.chunks(2).map(number).collect()
}

/// Cipher suites and groups that a ClientHello offers (RFC 8446 sections 4.1.2 and 4.2.7), in the first record of a stream.
fn offered(stream: &[u8]) -> (Vec<usize>, Vec<usize>) {
    // Record header, handshake header, version, random.
    let mut rest = &stream[5 + 4 + 2 + 32..];
    let mut take = |length_bytes: usize| {
        let (length, after) = rest.split_at(length_bytes);
        let (taken, left) = after.split_at(number(length));
        rest = left;
        taken
    };
    let _session = take(1);
    let suites = words(take(2));
    let _compression = take(1);
    let mut extensions = take(2);
    while !extensions.is_empty() {
        let (head, after) = extensions.split_at(4);
        let (body, left) = after.split_at(number(&head[2..]));
        if number(&head[..2]) == 10 {
            return (suites, words(&body[2..]));
        }
        extensions = left;
    }
    panic!("no groups are offered");
}

#[test]
fn only_approved_suites_and_groups_are_offered_and_both_hashes_work() {
    require_approved();
    for hash in [HashId::Sha256, HashId::Sha384] {
        let names = Names { host: "nqn.host".into(), subsystem: "nqn.subsystem".into() };
        let key = Psk::new(&vec![7; hash.len_bytes()], Some(hash)).expect("legal");
        let tls = key.tls(&names, Version::V1).expect("fits");
        let mut server = Session::server(Arc::new(One(key, names))).expect("a session");
        let mut client = Session::client(&tls).expect("a session");
        let (a, b) = (OneWay::default(), OneWay::default());
        let (near, far) =
            (End { incoming: a.clone(), outgoing: b.clone() }, End { incoming: b.clone(), outgoing: a });
        assert!(!client.handshake(&near).expect("goes on"));
        let (suites, groups) = offered(b.borrow_mut().make_contiguous());
        // TLS_CHACHA20_POLY1305_SHA256; x25519, x448. AES-128 and AES-256; P-256.
        assert!(!suites.contains(&0x1303) && !groups.iter().any(|g| [0x1d, 0x1e].contains(g)));
        assert!(suites.contains(&0x1301) && suites.contains(&0x1302) && groups.contains(&0x17));
        let mut done = (false, false);
        for _ in 0..100 {
            done.0 |= !done.0 && server.handshake(&far).expect("the server goes on");
            done.1 |= !done.1 && client.handshake(&near).expect("the client goes on");
        }
        assert_eq!(done, (true, true), "{hash:?}");
        assert!(client.cipher().is_some_and(|c| c.starts_with("TLS_AES_")), "{:?}", client.cipher());
    }
}

/// The policy of the FIPS modes has TLS 1.2 and CBC suites as well.
#[test]
fn who_has_tls_1_2_only_is_refused() {
    require_approved();
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    // No session; ECDHE with ECDSA and RSA, AES-128-GCM and AES-128-CBC; no compression.
    hello.extend([0, 0, 8, 0xc0, 0x2b, 0xc0, 0x2f, 0xc0, 0x23, 0xc0, 0x27, 1, 0]);
    // Groups: P-256; point formats: uncompressed; signatures: ECDSA and RSA with SHA-256.
    let extensions = [0, 10, 0, 4, 0, 2, 0, 0x17, 0, 11, 0, 2, 1, 0, 0, 13, 0, 6, 0, 4, 4, 3, 4, 1];
    hello.extend([0, extensions.len() as u8]);
    hello.extend(extensions);
    let mut record = vec![22, 3, 1, 0, hello.len() as u8 + 4, 1, 0, 0, hello.len() as u8];
    record.extend(hello);

    let names = Names { host: "nqn.host".into(), subsystem: "nqn.subsystem".into() };
    let key = Psk::new(&[7; 32], Some(HashId::Sha256)).expect("legal");
    let mut server = Session::server(Arc::new(One(key, names))).expect("a session");
    let (a, b) = (OneWay::default(), OneWay::default());
    let far = End { incoming: b.clone(), outgoing: a.clone() };
    b.borrow_mut().extend(record);
    let ended = (0..100).find_map(|_| server.handshake(&far).map(|done| assert!(!done)).err());
    let why = ended.expect("refused").to_string();
    assert!(why.starts_with("TLS"), "{why}");
    assert!(a.borrow().front().is_none_or(|kind| *kind == 21), "at most an alert: {:?}", a.borrow());
    assert!(b.borrow().is_empty(), "the hello was read");
}
