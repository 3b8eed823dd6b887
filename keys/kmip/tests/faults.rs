//! Servers that are down, slow, old, forgetful or mad, behind connections in memory.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cryptfold_kmip::message::testing;
use cryptfold_kmip::{
    Client, ClientConfig, Connect, KmipError, NewObject, Operation, Reason, ServerAddress, SessionError,
    State, Stream, Version,
};

/// What a server does with one request.
#[derive(Clone)]
enum Act {
    /// Answers.
    Say(Vec<u8>),
    /// Closes the connection without an answer.
    Hang,
    /// Never answers.
    Sleep,
}

/// A server: what it does with each request, for all connections together.
type Brain = Box<dyn FnMut(Version, Operation) -> Act + Send>;

struct Server {
    up: bool,
    brain: Brain,
    connections: usize,
    seen: Vec<Operation>,
}

#[derive(Clone)]
struct Net(Arc<Mutex<Vec<Server>>>);

struct Pipe {
    net: Net,
    server: usize,
    asked: Vec<u8>,
    answer: VecDeque<u8>,
    closed: bool,
    slow: bool,
}

impl Connect for Net {
    fn connect(&self, server: &ServerAddress, _: Instant) -> Result<Box<dyn Stream>, SessionError> {
        let at = usize::from(server.port) - 1;
        let mut servers = self.0.lock().unwrap();
        if !servers[at].up {
            return Err(SessionError::Connect(io::ErrorKind::ConnectionRefused.into()));
        }
        servers[at].connections += 1;
        let (asked, answer) = (Vec::new(), VecDeque::new());
        Ok(Box::new(Pipe { net: self.clone(), server: at, asked, answer, closed: false, slow: false }))
    }
}

impl Write for Pipe {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.asked.extend_from_slice(buf);
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Pipe {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some((version, operation)) = testing::request(&self.asked) {
            self.asked.clear();
            let mut servers = self.net.0.lock().unwrap();
            let server = &mut servers[self.server];
            server.seen.push(operation);
            match (server.brain)(version, operation) {
                Act::Say(bytes) => self.answer.extend(bytes),
                Act::Hang => self.closed = true,
                Act::Sleep => self.slow = true,
            }
        }
        if self.slow {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // One byte at a time: answers come in pieces.
        match self.answer.pop_front() {
            Some(byte) => {
                buf[0] = byte;
                Ok(1)
            }
            None => Ok(0),
        }
    }
}

impl Stream for Pipe {
    fn set_deadline(&mut self, _: Instant) {}
}

impl Net {
    fn new(brains: Vec<Brain>) -> Net {
        let server = |brain| Server { up: true, brain, connections: 0, seen: Vec::new() };
        Net(Arc::new(Mutex::new(brains.into_iter().map(server).collect())))
    }

    fn client(&self, rounds: u32) -> Client {
        let n = self.0.lock().unwrap().len() as u16;
        let servers = (1..=n).map(|port| ServerAddress { host: "kms".into(), port }).collect();
        let config = ClientConfig { rounds, pause: Duration::ZERO, ..ClientConfig::new(servers) };
        Client::with_connect(config, Box::new(self.clone()))
    }

    fn set_up(&self, at: usize, up: bool) {
        self.0.lock().unwrap()[at].up = up;
    }

    fn seen(&self, at: usize, operation: Operation) -> usize {
        self.0.lock().unwrap()[at].seen.iter().filter(|o| **o == operation).count()
    }

    fn connections(&self, at: usize) -> usize {
        self.0.lock().unwrap()[at].connections
    }
}

/// A server that works.
fn sane(_: Version, operation: Operation) -> Act {
    Act::Say(match operation {
        Operation::DiscoverVersions => testing::success(operation, testing::versions(&Version::OURS)),
        Operation::GetAttributes => testing::success(operation, testing::state("1", State::Active)),
        Operation::Get => testing::success(operation, testing::key("1", &[5; 64])),
        Operation::Create => testing::success(operation, testing::state("99", State::PreActive)),
        _ => testing::success(operation, Vec::new()),
    })
}

fn new_key() -> NewObject {
    NewObject { name: Some("k".into()), length_bits: 256, usage: 12, policy: None }
}

fn v(minor: i32) -> Version {
    Version { major: 1, minor }
}

#[test]
fn another_server_takes_over_and_is_kept() {
    let net = Net::new(vec![Box::new(sane), Box::new(sane)]);
    let client = net.client(1);
    assert_eq!(client.get_attributes("1").unwrap().state, Some(State::Active));
    assert_eq!(client.get("1").unwrap().key.expose(), [5; 64]);
    assert_eq!((net.connections(0), net.connections(1)), (1, 0), "one connection for both");
    net.0.lock().unwrap()[0].brain = Box::new(|_, _| Act::Hang);
    net.set_up(0, false);
    client.get("1").unwrap();
    client.get("1").unwrap();
    assert_eq!(net.connections(1), 1);
    net.set_up(0, true);
    net.0.lock().unwrap()[0].brain = Box::new(sane);
    client.get("1").unwrap();
    assert_eq!((net.connections(0), net.connections(1)), (1, 1), "the one that answered last is asked first");
    net.set_up(0, false);
    net.0.lock().unwrap()[1].brain = Box::new(|_, _| Act::Hang);
    let e = client.get("1").unwrap_err();
    assert!(e.is_unavailable());
    let text = e.to_string();
    assert!(text.contains("kms:1: no connection") && text.contains("kms:2: connection lost"), "{text}");
}

#[test]
fn a_connection_that_went_idle_is_replaced_at_once() {
    let mut asked = 0;
    let forgetful = move |v, o| {
        asked += 1;
        // The second request on the first connection: the server has closed it.
        if asked == 3 { Act::Hang } else { sane(v, o) }
    };
    let net = Net::new(vec![Box::new(forgetful)]);
    let client = net.client(1);
    client.get_attributes("1").unwrap();
    client.get_attributes("1").unwrap();
    assert_eq!(net.connections(0), 2);
}

#[test]
fn changes_are_sent_once() {
    let lose = |v, o| if o == Operation::Create { Act::Hang } else { sane(v, o) };
    let net = Net::new(vec![Box::new(lose), Box::new(sane)]);
    let client = net.client(3);
    let e = client.create(&new_key()).unwrap_err();
    assert!(matches!(e, KmipError::OutcomeUnknown { .. }), "{e}");
    assert_eq!((net.seen(0, Operation::Create), net.seen(1, Operation::Create)), (1, 0), "not made twice");
    // A server that is not there was not told anything: the next one may be asked.
    net.set_up(0, false);
    assert_eq!(client.create(&new_key()).unwrap(), "99");
    assert_eq!(net.seen(1, Operation::Create), 1);
}

#[test]
fn a_refusal_is_final() {
    let no = |v, o| match o {
        Operation::Get => Act::Say(testing::failure(Some(o), Reason::ITEM_NOT_FOUND, "no such key")),
        _ => sane(v, o),
    };
    let net = Net::new(vec![Box::new(no), Box::new(sane)]);
    let e = net.client(3).get("1").unwrap_err();
    assert_eq!(e.refusal().unwrap().reason, Reason::ITEM_NOT_FOUND);
    assert_eq!(e.to_string(), "Get: key server kms:1 refuses: item not found (no such key)");
    assert_eq!((net.seen(0, Operation::Get), net.connections(1)), (1, 0));
}

#[test]
fn old_servers_are_spoken_to_in_their_version() {
    // Refuses headers of a version that it does not speak, as PyKMIP does.
    let old = |version: Version, o| {
        if version > v(2) {
            return Act::Say(testing::failure(None, Reason::INVALID_MESSAGE, "KMIP 1.4 is not supported"));
        }
        match o {
            Operation::DiscoverVersions => Act::Say(testing::success(o, testing::versions(&[v(2), v(1)]))),
            _ => sane(version, o),
        }
    };
    assert_eq!(Net::new(vec![Box::new(old)]).client(1).version().unwrap(), v(2));
    // Understands any header, and has no Discover Versions.
    let plain = |version, o| match o {
        Operation::DiscoverVersions => {
            Act::Say(testing::failure(Some(o), Reason::OPERATION_NOT_SUPPORTED, ""))
        }
        _ => sane(version, o),
    };
    assert_eq!(Net::new(vec![Box::new(plain)]).client(1).version().unwrap(), v(4));
    let ancient = |_, o| Act::Say(testing::success(o, testing::versions(&[v(1), v(0)])));
    let e = Net::new(vec![Box::new(ancient)]).client(1).get("1").unwrap_err().to_string();
    assert!(e.contains("KMIP 1.1"), "{e}");
    let deaf = |_, _| Act::Say(testing::failure(None, Reason::INVALID_MESSAGE, "no"));
    let e = Net::new(vec![Box::new(deaf)]).client(1).get("1").unwrap_err().to_string();
    assert!(e.contains("no common KMIP version: invalid message (no)"), "{e}");
}

#[test]
fn mad_servers() {
    let say = |bytes: Vec<u8>| -> Brain {
        Box::new(
            move |version, o| if o == Operation::Get { Act::Say(bytes.clone()) } else { sane(version, o) },
        )
    };
    for (answer, words) in [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "unknown type"),
        (vec![0x42, 0, 0x7B, 1, 0x7F, 0xFF, 0xFF, 0xFF], "more than 262144 bytes"),
        (vec![0x42, 0, 0x7B, 1, 0, 0, 0, 8, 0x42, 0, 0x7A, 1, 0, 0, 0, 0], "is missing"),
        (testing::success(Operation::Get, testing::key("2", &[1; 32])), "another identifier"),
        (testing::success(Operation::Locate, Vec::new()), "another operation"),
    ] {
        let e = Net::new(vec![say(answer)]).client(1).get("1").unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }
    let sleepy = |version, o| if o == Operation::Get { Act::Sleep } else { sane(version, o) };
    let net = Net::new(vec![Box::new(sleepy), Box::new(sane)]);
    net.client(1).get("1").unwrap();
    assert_eq!((net.seen(0, Operation::Get), net.seen(1, Operation::Get)), (1, 1));
}

#[test]
fn keys_do_not_show() {
    let net = Net::new(vec![Box::new(sane)]);
    let client = net.client(1);
    let object = client.get("1").unwrap();
    let shown = format!("{object:?} {client:?}");
    assert!(shown.contains("64 bytes") && !shown.contains("5, 5"), "{shown}");
    let long = "x".repeat(1000);
    assert!(matches!(client.get(&long).unwrap_err(), KmipError::Text { bytes: 1000, .. }));
    assert!(matches!(client.get("").unwrap_err(), KmipError::Text { .. }));
}
