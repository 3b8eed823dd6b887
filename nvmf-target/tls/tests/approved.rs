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
