//! Sessions over a stream with a record layer, which is made here of the RFC (8446 section 5) and refuses what it is told to.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use cryptfold_nvmf_auth::{HashId, Version};
use proptest::prelude::*;
use s2n_tls::enums::PeerKeyUpdate;

use super::tests::{End, ends, key, pair, shake};
use super::*;

const DATA: u8 = 23;

struct Keys {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Keys {
    fn new(keys: &RecordKeys) -> Keys {
        let algorithm = if keys.key.len() == 16 { &AES_128_GCM } else { &AES_256_GCM };
        let key = LessSafeKey::new(UnboundKey::new(algorithm, &keys.key).expect("as long as it says"));
        Keys { key, iv: *keys.iv, sequence: keys.sequence }
    }

    fn nonce(&mut self) -> Nonce {
        let mut iv = self.iv;
        iv[4..].iter_mut().zip(self.sequence.to_be_bytes()).for_each(|(a, b)| *a ^= b);
        self.sequence += 1;
        Nonce::assume_unique_for_key(iv)
    }

    fn seal(&mut self, kind: u8, data: &[u8]) -> Vec<u8> {
        let mut inner = [data, &[kind]].concat();
        let len = (inner.len() as u16 + 16).to_be_bytes();
        let head = [DATA, 3, 3, len[0], len[1]];
        let nonce = self.nonce();
        self.key.seal_in_place_append_tag(nonce, Aad::from(head), &mut inner).expect("seals");
        [&head[..], &inner].concat()
    }

    fn open(&mut self, record: &[u8]) -> Option<(u8, VecDeque<u8>)> {
        let (head, body) = record.split_at(5);
        let mut body = body.to_vec();
        let head: [u8; 5] = head.try_into().expect("five");
        let nonce = self.nonce();
        let inner = self.key.open_in_place(nonce, Aad::from(head), &mut body).ok()?;
        let (kind, data) = inner.split_last()?;
        Some((*kind, data.iter().copied().collect()))
    }
}

#[derive(Clone, Copy, Default)]
struct Refuses {
    attach: bool,
    send: bool,
    receive: bool,
}

/// A stream whose kernel makes records.
struct Sim {
    end: End,
    refuses: Refuses,
    attached: Cell<bool>,
    sending: RefCell<Option<Keys>>,
    receiving: RefCell<Option<Keys>>,
    /// Came, and is no whole record yet.
    came: RefCell<Vec<u8>>,
    /// The record at the front.
    record: RefCell<Option<(u8, VecDeque<u8>)>>,
}

fn sim(end: End, refuses: Refuses) -> Sim {
    Sim {
        end,
        refuses,
        attached: Cell::default(),
        sending: RefCell::default(),
        receiving: RefCell::default(),
        came: RefCell::default(),
        record: RefCell::default(),
    }
}

fn errno(e: i32) -> io::Error {
    io::Error::from_raw_os_error(e)
}

impl Sim {
    /// Has a record at the front, or why not; `false`: the end.
    fn advance(&self, keys: &mut Keys) -> io::Result<bool> {
        if self.record.borrow().is_some() {
            return Ok(true);
        }
        let mut came = self.came.borrow_mut();
        loop {
            let wanted = match came.get(3..5) {
                Some(len) => 5 + usize::from(u16::from_be_bytes([len[0], len[1]])),
                None => 5,
            };
            if came.len() >= 5 && came[0] != DATA {
                return Err(errno(libc::EINVAL));
            }
            if came.len() == wanted && wanted > 5 {
                let opened = keys.open(&came).ok_or(errno(libc::EBADMSG))?;
                came.clear();
                *self.record.borrow_mut() = Some(opened);
                return Ok(true);
            }
            let mut more = vec![0; wanted - came.len()];
            match self.end.read(&mut more)? {
                0 => return Ok(false),
                n => came.extend_from_slice(&more[..n]),
            }
        }
    }

    fn take(&self, to: &mut [u8]) -> usize {
        let mut record = self.record.borrow_mut();
        let Some((_, data)) = &mut *record else { return 0 };
        let n = to.len().min(data.len());
        to.iter_mut().zip(data.drain(..n)).for_each(|(a, b)| *a = b);
        if data.is_empty() {
            *record = None;
        }
        n
    }

    fn put(&self, kind: u8, data: &[u8]) -> io::Result<()> {
        let mut keys = self.sending.borrow_mut();
        let keys = keys.as_mut().expect("it has keys");
        if self.end.capacity - self.end.outgoing.bytes.borrow().len() < data.len() + 22 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let record = keys.seal(kind, data);
        assert_eq!(self.end.write(&record).expect("room"), record.len());
        Ok(())
    }
}

impl Raw for Sim {
    /// At most one record a call.
    fn recv(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut keys = self.receiving.borrow_mut();
        let Some(keys) = &mut *keys else { return self.end.recv(bufs) };
        if !self.advance(keys)? {
            return Ok(0);
        }
        if self.record.borrow().as_ref().is_some_and(|(kind, _)| *kind != DATA) {
            return Err(errno(libc::EIO));
        }
        Ok(bufs.iter_mut().map(|b| self.take(b)).sum())
    }
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.sending.borrow().is_none() {
            return self.end.send(bufs);
        }
        let all: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).collect();
        let mut sent = 0;
        for piece in all.chunks(RECORD_BYTES) {
            match self.put(DATA, piece) {
                Err(_) if sent > 0 => break,
                other => other?,
            }
            sent += piece.len();
        }
        Ok(sent)
    }
    fn offload(&self) -> Option<&dyn Offload> {
        Some(self)
    }
}

impl Offload for Sim {
    fn attach(&self) -> io::Result<()> {
        self.attached.set(!self.refuses.attach);
        if self.refuses.attach { Err(errno(libc::ENOENT)) } else { Ok(()) }
    }
    fn install(&self, direction: Direction, keys: &RecordKeys) -> io::Result<()> {
        let (place, refused) = match direction {
            Direction::Send => (&self.sending, self.refuses.send),
            Direction::Receive => (&self.receiving, self.refuses.receive),
        };
        if !self.attached.get() || refused {
            return Err(errno(libc::EINVAL));
        }
        assert!(place.borrow().is_none(), "keys are set once");
        *place.borrow_mut() = Some(Keys::new(keys));
        Ok(())
    }
    fn send_control(&self, kind: u8, data: &[u8]) -> io::Result<()> {
        self.put(kind, data)
    }
    fn recv_control(&self, buf: &mut [u8]) -> io::Result<(u8, usize)> {
        let kind = self.record.borrow().as_ref().map(|(kind, _)| *kind);
        // Small pieces: a message may come in several.
        let few = buf.len().min(3);
        Ok((kind.ok_or(io::ErrorKind::WouldBlock)?, self.take(&mut buf[..few])))
    }
}

/// Server over `Sim`, client over `Sim` or a plain stream.
struct Both {
    server: Session,
    client: Session,
    s: Sim,
    c: Box<dyn Raw>,
    /// The stream between them, as its ends see it.
    to_server: std::rc::Rc<super::tests::OneWay>,
}

fn both(hash: HashId, server: Refuses, client: Option<Refuses>) -> Both {
    let psk = key(7, hash);
    let (mut server_session, mut client_session) = pair(&psk, &psk, Version::V1);
    let (se, ce) = ends(1 << 20);
    let to_server = se.incoming.clone();
    let s = sim(se, server);
    let c: Box<dyn Raw> = match client {
        Some(refuses) => Box::new(sim(ce, refuses)),
        None => Box::new(ce),
    };
    let (a, b) = shake((&mut server_session, &s), (&mut client_session, &*c));
    assert!(matches!((&a, &b), (Ok(true), Ok(true))), "{a:?} {b:?}");
    Both { server: server_session, client: client_session, s, c, to_server }
}

/// Everything that is sent arrives, pieces of any size, both ways.
fn talk(b: &mut Both) {
    for len in [1, 100, 16_384, 16_385, 70_000, 500_000] {
        let data: Vec<u8> = (0..len).map(|i| ((i * 31) >> 2) as u8).collect();
        let (x, y) = data.split_at(len / 3);
        let bufs = [IoSlice::new(x), IoSlice::new(&[]), IoSlice::new(y)];
        for to_server in [true, false] {
            let (from, below, to, under): (_, &dyn Raw, _, &dyn Raw) = match to_server {
                true => (&mut b.client, &*b.c, &mut b.server, &b.s),
                false => (&mut b.server, &b.s, &mut b.client, &*b.c),
            };
            assert_eq!(from.send(below, &bufs).expect("room"), len);
            let mut got = vec![0; len + 10];
            let (p, q) = got.split_at_mut(len / 2);
            let n = to.recv(under, &mut [IoSliceMut::new(p), IoSliceMut::new(q)]).expect("data");
            assert!(n == len && got[..n] == data, "{n} of {len} bytes at once: short would mean empty");
            let again = to.recv(under, &mut [IoSliceMut::new(&mut got)]).expect_err("nothing more");
            assert_eq!(again.kind(), io::ErrorKind::WouldBlock);
        }
    }
}

fn fails(r: io::Result<usize>) -> String {
    let e = r.expect_err("fails");
    let inner = e.get_ref().and_then(|e| e.downcast_ref::<TlsError>());
    inner.unwrap_or_else(|| panic!("our error: {e:?}")).to_string()
}

fn receive(session: &mut Session, raw: &dyn Raw) -> io::Result<usize> {
    session.recv(raw, &mut [IoSliceMut::new(&mut [0; 64])])
}

const KERNEL: (Layer, Layer) = (Layer::Kernel, Layer::Kernel);
const LIBRARY: (Layer, Layer) = (Layer::Library, Layer::Library);

#[test]
fn kernel_and_library_speak_with_each_other() {
    for hash in [HashId::Sha256, HashId::Sha384] {
        for client in [Some(Refuses::default()), None] {
            let mut b = both(hash, Refuses::default(), client);
            assert_eq!(b.server.layers(), KERNEL);
            assert_eq!(b.client.layers(), if client.is_some() { KERNEL } else { LIBRARY });
            // What the library has is wiped where it has nothing left to do.
            let known = |s: &Session| s.connection.negotiated_psk_identity_length().unwrap_or(0) > 0;
            assert_eq!((known(&b.server), known(&b.client)), (false, client.is_none()));
            assert!(
                b.server.identity().is_some_and(|i| i.starts_with("NVMe1R0")) && b.server.cipher().is_some()
            );
            talk(&mut b);
            // The good-bye, behind data.
            assert_eq!(b.client.send(&*b.c, &[IoSlice::new(b"last")]).expect("room"), 4);
            b.client.close(&*b.c);
            assert_eq!(receive(&mut b.server, &b.s).expect("data"), 4);
            assert_eq!(receive(&mut b.server, &b.s).expect("the end"), 0);
            b.server.close(&b.s);
            assert_eq!(receive(&mut b.client, &*b.c).expect("the end"), 0);
        }
    }
}

#[test]
fn who_is_refused_goes_on_with_the_library() {
    let no = Refuses::default();
    for (refuses, layers) in [
        (Refuses { attach: true, ..no }, LIBRARY),
        (Refuses { send: true, ..no }, LIBRARY),
        (Refuses { receive: true, ..no }, (Layer::Kernel, Layer::Library)),
    ] {
        for client in [Some(refuses), None, Some(no)] {
            let mut b = both(HashId::Sha384, refuses, client);
            assert_eq!(b.server.layers(), layers);
            assert!(b.server.identity().is_some() && b.client.cipher().is_some());
            talk(&mut b);
            b.server.close(&b.s);
            assert_eq!(receive(&mut b.client, &*b.c).expect("the end"), 0);
        }
    }
}

#[test]
fn a_cut_and_damage_end_the_session() {
    let mut b = both(HashId::Sha256, Refuses::default(), None);
    assert_eq!(b.client.send(&*b.c, &[IoSlice::new(b"hello")]).expect("room"), 5);
    b.to_server.closed.set(true);
    assert_eq!(receive(&mut b.server, &b.s).expect("data"), 5);
    assert!(fails(receive(&mut b.server, &b.s)).contains("was cut"));
    for (garbage, why) in [(false, "bad record MAC"), (true, "no record")] {
        let mut b = both(HashId::Sha256, Refuses::default(), None);
        assert_eq!(b.client.send(&*b.c, &[IoSlice::new(&[7; 100])]).expect("room"), 100);
        let at = if garbage { 0 } else { 50 };
        b.to_server.bytes.borrow_mut()[at] ^= 1;
        assert!(fails(receive(&mut b.server, &b.s)).contains(why));
        assert!(fails(b.server.send(&b.s, &[IoSlice::new(b"x")])).contains(why), "it stays over");
        let quiet = receive(&mut b.client, &*b.c).expect_err("no good-bye");
        assert_eq!(quiet.kind(), io::ErrorKind::WouldBlock);
    }
}

/// Sends records of the client's that are no data to the server, or the other way.
fn after(to_server: bool, records: &[(u8, &[u8])]) -> Result<(), String> {
    let psk = key(7, HashId::Sha256);
    let (mut server, mut client) = pair(&psk, &psk, Version::V1);
    let (se, ce) = ends(1 << 20);
    let (s, c) = (sim(se, Refuses::default()), sim(ce, Refuses::default()));
    assert!(matches!(shake((&mut server, &s), (&mut client, &c)), (Ok(true), Ok(true))));
    let (from, to, under) = if to_server { (&c, &mut server, &s) } else { (&s, &mut client, &c) };
    for (kind, data) in records {
        from.put(*kind, data).expect("room");
    }
    from.put(DATA, b"data").expect("room");
    let mut buf = [0; 100];
    match to.recv(under, &mut [IoSliceMut::new(&mut buf)]) {
        Ok(n) => {
            assert_eq!(&buf[..n], if n > 0 { &b"data"[..] } else { b"" });
            if n > 0 { Ok(()) } else { Err("the end".into()) }
        }
        other => Err(fails(other)),
    }
}

#[test]
fn records_that_are_no_data() {
    let ticket: &[u8] = &[&[4, 0, 0, 200][..], &[9; 200]].concat();
    let two: &[u8] = &[ticket, ticket].concat();
    // What a server may send: tickets, whole, in pieces, several in one record.
    for records in
        [&[(22, ticket)][..], &[(22, two)], &[(22, &ticket[..7]), (22, &ticket[7..])], &[(21, &[1, 90])]]
    {
        assert_eq!(after(false, records), Ok(()));
    }
    // Nobody keeps the reactor with records that fill no buffer.
    let canceled = (21, &[1, 90][..]);
    assert_eq!(after(true, &[canceled; 256]), Ok(()));
    assert!(after(true, &[canceled; 257]).is_err_and(|e| e.contains("record after record")));
    for (records, why) in [
        (&[(21, &[1, 0][..])][..], "the end"),
        (&[(21, &[1]), (21, &[0])], "the end"),
        (&[(21, &[2, 80])], "the other side says: internal error (alert 80)"),
        (&[(22, ticket)], "a handshake message (type 4, 200 bytes)"),
        (&[(22, &[1, 0, 0, 0])], "a handshake message (type 1, 0 bytes)"),
        (&[(22, &[24, 0, 0, 2, 0, 0])], "a handshake message (type 24, 2 bytes)"),
        (&[(22, &[24, 0, 0, 1, 0])], "changes its keys"),
        (&[(22, &[24, 0]), (22, &[0, 1, 1])], "changes its keys"),
        (&[(22, &[24, 0]), (21, &[1, 0])], "stops in the middle"),
        (&[(22, &[24, 0])], ""),
        (&[(24, &[1, 2, 3])], "a record of type 24"),
        (&[(20, &[1])], "a record of type 20"),
    ] {
        let result = after(true, records);
        if records == [(22, &[24, 0][..])] {
            // Data in the middle of a message: it may be read; the message never ends.
            assert_eq!(result, Ok(()));
            continue;
        }
        assert!(result.as_ref().is_err_and(|e| e.contains(why)), "{records:?}: {result:?}, not {why}");
    }
}

#[test]
fn whoever_changes_keys_has_to_connect_again() {
    let mut b = both(HashId::Sha384, Refuses::default(), None);
    talk(&mut b);
    b.client.connection.request_key_update(PeerKeyUpdate::KeyUpdateNotRequested).expect("established");
    assert_eq!(b.client.send(&*b.c, &[IoSlice::new(b"new")]).expect("room"), 3);
    let why = fails(receive(&mut b.server, &b.s));
    assert!(why.contains("changes its keys") && why.contains("enable_ktls"), "{why}");
    assert!(fails(b.server.send(&b.s, &[IoSlice::new(b"x")])).contains("changes its keys"), "it stays over");
}

/// A worn key ends its connection, with a good-bye: what was sent has arrived, and it is no cut.
#[test]
fn no_key_makes_more_records_than_it_may() {
    let mut b = both(HashId::Sha256, Refuses::default(), None);
    b.server.sending.as_mut().expect("the kernel's").records_max = 6;
    let mut buf = vec![0; 20_000];
    let mut sent = 0;
    let end = loop {
        // Two records each.
        match b.server.send(&b.s, &[IoSlice::new(&[5; 20_000])]) {
            Ok(n) => assert_eq!(n, 20_000),
            end => break end,
        }
        sent += 1;
        assert_eq!(b.client.recv(&*b.c, &mut [IoSliceMut::new(&mut buf)]).expect("data"), 20_000);
    };
    let records = b.s.sending.borrow().as_ref().expect("keys").sequence;
    assert_eq!((sent, records), (2, 5), "and the good-bye");
    assert!(fails(end).contains("has made 4 records and may make no more"));
    assert!(b.server.send(&b.s, &[IoSlice::new(b"x")]).is_err(), "it stays over");
    assert_eq!(receive(&mut b.client, &*b.c).expect("the end"), 0);
}

proptest! {
    /// Whatever records come, in whatever pieces: an error at most.
    #[test]
    fn any_record_is_survived(
        records in proptest::collection::vec(
            (prop_oneof![Just(21u8), Just(22), any::<u8>()], proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(4), Just(24), any::<u8>()], 0..12)),
            0..8,
        ),
        client: bool,
    ) {
        let mut receiving = Receiving::new(client);
        for (kind, bytes) in records {
            if receiving.understand(kind, &bytes).is_err() {
                break;
            }
            prop_assert!(receiving.part.1.len() <= 12 * 8);
        }
    }

    /// What is not the state that is known is refused.
    #[test]
    fn other_states_are_not_understood(at in 0usize..12, bit in 0u32..8, cut in 0usize..124) {
        let mut state = [&[0; 7][..], &[1, 3, 4, 0x13, 1], &[0; 16], &[0x40, 0], &[7; 96]].concat();
        prop_assert!(secrets(&state).is_some());
        // The third secret is not looked at.
        prop_assert_eq!(secrets(&state[..cut]).is_some(), cut >= 94);
        state[at] ^= 1 << bit;
        // The other suite needs longer secrets.
        prop_assert!(secrets(&state).is_none());
    }
}
