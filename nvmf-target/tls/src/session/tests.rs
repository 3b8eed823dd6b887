use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use cryptfold_nvmf_auth::{HashId, Names, Psk, Version};
use proptest::prelude::*;

use super::*;

/// One direction of a stream in memory.
#[derive(Default)]
pub struct OneWay {
    pub bytes: RefCell<VecDeque<u8>>,
    pub closed: Cell<bool>,
}

/// One end: takes and gives at most `step` bytes at once, and holds at most `capacity`.
pub struct End {
    pub incoming: Rc<OneWay>,
    pub outgoing: Rc<OneWay>,
    step: Cell<usize>,
    pub capacity: usize,
}

pub fn ends(capacity: usize) -> (End, End) {
    let (a, b) = (Rc::<OneWay>::default(), Rc::<OneWay>::default());
    let one = End { incoming: a.clone(), outgoing: b.clone(), step: Cell::new(usize::MAX), capacity };
    (one, End { incoming: b, outgoing: a, step: Cell::new(usize::MAX), capacity })
}

impl End {
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let mut bytes = self.incoming.bytes.borrow_mut();
        let n = buf.len().min(bytes.len()).min(self.step.get());
        if n == 0 && !self.incoming.closed.get() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        for (to, from) in buf.iter_mut().zip(bytes.drain(..n)) {
            *to = from;
        }
        Ok(n)
    }
    pub fn write(&self, buf: &[u8]) -> io::Result<usize> {
        let mut bytes = self.outgoing.bytes.borrow_mut();
        let n = buf.len().min(self.step.get()).min(self.capacity - bytes.len());
        if n == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        bytes.extend(&buf[..n]);
        Ok(n)
    }
}

impl Raw for End {
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.read(bufs.iter_mut().find(|b| !b.is_empty()).expect("there is room"))
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.write(bufs.iter().find(|b| !b.is_empty()).expect("there is something"))
    }
}

struct One(Psk, Names);

impl Keys for One {
    fn find(&self, identity: &str) -> Option<TlsPsk> {
        self.0.find(&self.1, identity)
    }
}

fn names() -> Names {
    Names { host: "nqn.host".into(), subsystem: "nqn.subsystem".into() }
}

pub fn key(byte: u8, hash: HashId) -> Psk {
    Psk::new(&vec![byte; hash.len_bytes()], Some(hash)).expect("legal")
}

pub fn pair(server: &Psk, client: &Psk, version: Version) -> (Session, Session) {
    let tls = client.tls(&names(), version).expect("fits");
    let server = Session::server(Arc::new(One(server.clone(), names()))).expect("a session");
    (server, Session::client(&tls).expect("a session"))
}

/// Both go on until neither can; what became of the server and of the client.
pub fn shake(
    s: (&mut Session, &dyn Raw),
    c: (&mut Session, &dyn Raw),
) -> (io::Result<bool>, io::Result<bool>) {
    let mut last = (Ok(false), Ok(false));
    for _ in 0..10_000 {
        if last.1.is_ok() {
            last.1 = c.0.handshake(c.1);
        }
        if last.0.is_ok() {
            last.0 = s.0.handshake(s.1);
        }
        if !matches!(last, (Ok(false), _) | (_, Ok(false))) {
            break;
        }
    }
    last
}

fn reason(r: io::Result<bool>) -> TlsError {
    let e = r.expect_err("fails");
    let inner = e.into_inner().expect("our error");
    *inner.downcast::<TlsError>().expect("our error")
}

#[test]
fn every_version_and_hash() {
    for hash in [HashId::Sha256, HashId::Sha384] {
        for version in [Version::V0, Version::V1, Version::V1Old] {
            let psk = key(7, hash);
            let (mut server, mut client) = pair(&psk, &psk, version);
            let (se, ce) = ends(1 << 20);
            let (s, c) = shake((&mut server, &se), (&mut client, &ce));
            assert!(matches!((&s, &c), (Ok(true), Ok(true))), "{hash:?} {version:?}: {s:?} {c:?}");
            let identity = psk.tls(&names(), version).expect("fits").identity;
            assert_eq!(server.identity(), Some(identity.as_str()));
            assert_eq!(
                (client.identity(), server.claimed()),
                (Some(identity.as_str()), Some(identity.as_str()))
            );
            let bits = if hash == HashId::Sha256 { "AES_128_GCM_SHA256" } else { "AES_256_GCM_SHA384" };
            assert_eq!(server.cipher(), Some(format!("TLS_{bits}").as_str()));
        }
    }
}

#[test]
fn who_has_not_the_key_does_not_get_in() {
    let psk = key(7, HashId::Sha256);
    // Another key behind the same (version 0) identity.
    let (mut server, mut client) = pair(&psk, &key(8, HashId::Sha256), Version::V0);
    let (se, ce) = ends(1 << 20);
    let (s, c) = shake((&mut server, &se), (&mut client, &ce));
    assert!(matches!(reason(s), TlsError::Handshake(_)));
    assert!(reason(c).to_string().contains("another key"));
    assert_eq!((server.identity(), server.is_established()), (None, false));
    assert!(server.handshake(&se).is_err(), "it stays over");
    // An identity that nobody knows: version 1 has another digest.
    let (mut server, mut client) = pair(&psk, &key(8, HashId::Sha256), Version::V1);
    let (se, ce) = ends(1 << 20);
    let (s, c) = shake((&mut server, &se), (&mut client, &ce));
    assert_eq!(reason(s), TlsError::Identity);
    assert!(matches!(reason(c), TlsError::Handshake(_)));
    assert!(server.claimed().is_some_and(|i| i.starts_with("NVMe1R01 nqn.host nqn.subsystem ")));
}

#[test]
fn garbage_and_plain_text_fail_at_once() {
    let icreq = [&[0, 0, 128, 0, 128, 0, 0, 0][..], &[0; 120]].concat();
    for bytes in
        [icreq, b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0x16, 3, 1, 0xff, 0xff, 1, 2, 3], vec![0x16; 40_000]]
    {
        let psk = key(7, HashId::Sha256);
        let (mut server, _) = pair(&psk, &psk, Version::V1);
        let (se, ce) = ends(1 << 20);
        ce.write(&bytes).expect("room");
        let r = server.handshake(&se);
        // The announced record may still be on its way; with the end it is certain.
        let r = if r.is_ok() {
            ce.outgoing.closed.set(true);
            server.handshake(&se)
        } else {
            r
        };
        assert!(r.is_err(), "{bytes:x?}");
        assert!(!server.is_established());
    }
}

#[test]
fn a_cut_is_not_a_good_bye() {
    for good_bye in [true, false] {
        let psk = key(7, HashId::Sha256);
        let (mut server, mut client) = pair(&psk, &psk, Version::V1);
        let (se, ce) = ends(1 << 20);
        assert!(matches!(shake((&mut server, &se), (&mut client, &ce)), (Ok(true), Ok(true))));
        assert_eq!(client.send(&ce, &[IoSlice::new(b"hello")]).expect("room"), 5);
        if good_bye {
            client.close(&ce);
        }
        ce.outgoing.closed.set(true);
        let mut buf = [0; 100];
        assert_eq!(server.recv(&se, &mut [IoSliceMut::new(&mut buf)]).expect("data"), 5);
        let end = server.recv(&se, &mut [IoSliceMut::new(&mut buf)]);
        match good_bye {
            true => assert_eq!(end.expect("the end"), 0),
            false => assert_eq!(end.expect_err("cut").kind(), io::ErrorKind::UnexpectedEof),
        }
    }
}

/// Readiness comes as edges: less than there was room for has to mean that the stream was empty.
#[test]
fn a_short_receive_leaves_nothing_behind() {
    let psk = key(7, HashId::Sha256);
    let (mut server, mut client) = pair(&psk, &psk, Version::V1);
    let (se, ce) = ends(4 << 20);
    assert!(matches!(shake((&mut server, &se), (&mut client, &ce)), (Ok(true), Ok(true))));
    for len in [1, 20_000, 32 << 10, 40_000, 100_000, 600_000, 5, 300_000, 10] {
        let data: Vec<u8> = (0..len).map(|i| (i * 31) as u8).collect();
        assert_eq!(client.send(&ce, &[IoSlice::new(&data)]).expect("room"), len);
        let (mut got, mut buf) = (Vec::new(), vec![0; 256 << 10]);
        while let Ok(n) = server.recv(&se, &mut [IoSliceMut::new(&mut buf)]) {
            got.extend_from_slice(&buf[..n]);
            if n < buf.len() {
                break;
            }
        }
        assert!(got == data, "{len} bytes: {} came", got.len());
    }
}

#[test]
fn a_changed_record_ends_the_session() {
    let psk = key(7, HashId::Sha384);
    let (mut server, mut client) = pair(&psk, &psk, Version::V1);
    let (se, ce) = ends(1 << 20);
    assert!(matches!(shake((&mut server, &se), (&mut client, &ce)), (Ok(true), Ok(true))));
    client.send(&ce, &[IoSlice::new(&[9; 1000])]).expect("room");
    ce.outgoing.bytes.borrow_mut()[500] ^= 1;
    let mut buf = [0; 2000];
    let e = server.recv(&se, &mut [IoSliceMut::new(&mut buf)]).expect_err("damaged");
    assert_eq!(e.kind(), io::ErrorKind::InvalidData);
    assert!(server.send(&se, &[IoSlice::new(b"x")]).is_err());
    let end = client.recv(&ce, &mut [IoSliceMut::new(&mut buf)]);
    assert_eq!(end.expect_err("no good-bye").kind(), io::ErrorKind::WouldBlock);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Whatever pieces the stream takes and gives, in both directions at once: the bytes arrive, in order, and what is
    /// reported as sent is with the stream.
    #[test]
    fn bytes_survive_any_stream(
        steps in proptest::collection::vec(1usize..40_000, 1..20),
        capacity in 20_000usize..400_000,
        pieces in proptest::collection::vec(0usize..60_000, 1..12),
        room in 1usize..100_000,
    ) {
        let psk = key(7, HashId::Sha256);
        let (mut server, mut client) = pair(&psk, &psk, Version::V1);
        let (se, ce) = ends(capacity);
        prop_assert!(matches!(shake((&mut server, &se), (&mut client, &ce)), (Ok(true), Ok(true))));
        let data: Vec<u8> = (0..pieces.iter().sum::<usize>()).map(|i| ((i * 31) >> 3) as u8).collect();
        let (mut sent, mut got) = ([0, 0], [Vec::new(), Vec::new()]);
        let mut buf = vec![0; room];
        for step in steps.iter().cycle().take(1_000_000) {
            if got.iter().all(|g| g.len() == data.len()) {
                break;
            }
            for (i, (s, e)) in [(&mut server, &se), (&mut client, &ce)].into_iter().enumerate() {
                e.step.set(*step);
                let (mut at, mut bufs) = (0, Vec::new());
                for p in &pieces {
                    let from = sent[i].clamp(at, at + p);
                    bufs.push(IoSlice::new(&data[from..at + p]));
                    at += p;
                }
                match s.send(e, &bufs) {
                    Ok(n) => sent[i] += n,
                    Err(e) => prop_assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
                }
                let (a, b) = buf.split_at_mut(room / 3);
                match s.recv(e, &mut [IoSliceMut::new(a), IoSliceMut::new(b)]) {
                    Ok(n) => got[i].extend_from_slice(&buf[..n]),
                    Err(e) => prop_assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
                }
            }
        }
        prop_assert!(got.iter().all(|g| *g == data), "all arrived");
        prop_assert_eq!(sent, [data.len(); 2]);
    }

    /// Random bytes instead of what the client sends, at any point of the handshake: an error or waiting, no panic.
    #[test]
    fn a_damaged_handshake_fails(at in 0usize..600, value: u8) {
        let psk = key(7, HashId::Sha256);
        let (mut server, mut client) = pair(&psk, &psk, Version::V1);
        let (se, ce) = ends(1 << 20);
        client.handshake(&ce).expect("sends its hello");
        let changed = {
            let mut bytes = ce.outgoing.bytes.borrow_mut();
            let at = at % bytes.len();
            let before = std::mem::replace(&mut bytes[at], value);
            // The version in a record's header is nothing that anybody looks at (RFC 8446 section 5.1).
            before != value && !matches!(at, 1 | 2)
        };
        let (s, c) = shake((&mut server, &se), (&mut client, &ce));
        if changed {
            prop_assert!(!(matches!(s, Ok(true)) && matches!(c, Ok(true))));
        }
    }
}
