//! The two sides of DH-HMAC-CHAP (NVMe Base 2.0 section 8.13.5).
//!
//! ```text
//!   host                                     controller
//!   Negotiate(T_ID, hashes, groups)   --->
//!                                     <---   Challenge(hash, group, S1, C1, g^x)
//!   Reply(R1, S2, C2, g^y)            --->
//!                                     <---   Success1(R2)      or Failure1
//!   Success2, if C2 was sent          --->                     or Failure2
//! ```
//!
//! A machine takes one message where one is due; anything else ends it. T_ID has to be the transaction's in every
//! message; S1 and the challenges are fresh, so an old message fits nothing.
//!
//! With secure channel concatenation (SC_C in Negotiate) both sides have a key for TLS afterwards, made of the Diffie-Hellman
//! value and both challenges; the host then always sends C2, and S2 = 0 if the controller need not answer it.

use cryptfold_nvmf_spec::auth::{self, Concat, DhGroup, Failure, FromController, FromHost, HashId, Reply};
use zeroize::Zeroizing;

use crate::dh::{self, PRIVATE_BYTES};
use crate::mac::{hash, mac, same};
use crate::psk::TlsPsk;
use crate::secret::Secret;

/// What goes into the host's response.
const HOST_ROLE: &[u8] = b"HostHost";
/// What goes into the controller's response.
const CONTROLLER_ROLE: &[u8] = b"Controller";

/// Who talks to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// The host's NQN.
    pub host: String,
    /// The subsystem's NQN.
    pub subsystem: String,
}

/// The hash functions and groups that one side takes, by preference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Hash functions.
    pub hashes: Vec<HashId>,
    /// Groups; with [`DhGroup::Null`] there is no Diffie-Hellman exchange.
    pub groups: Vec<DhGroup>,
}

impl Default for Offer {
    /// Everything; a group before none, the cheap groups first.
    fn default() -> Self {
        Offer {
            hashes: vec![HashId::Sha256, HashId::Sha384, HashId::Sha512],
            groups: DhGroup::ALL[1..].iter().copied().chain([DhGroup::Null]).collect(),
        }
    }
}

impl Offer {
    /// What of it can be used with this kind of concatenation: a key for TLS needs a Diffie-Hellman value, and a hash that TLS has.
    pub fn with(mut self, concat: Concat) -> Offer {
        if concat != Concat::None {
            self.hashes.retain(|h| *h != HashId::Sha512);
            self.groups.retain(|g| *g != DhGroup::Null);
        }
        self
    }
}

/// Fresh random bytes for one step.
#[derive(Clone)]
pub struct Entropy {
    /// A challenge.
    pub challenge: [u8; 64],
    /// A private exponent.
    pub exponent: Zeroizing<[u8; PRIVATE_BYTES]>,
    /// A sequence number.
    pub seqnum: u32,
}

impl Entropy {
    /// From a cryptographic source of randomness.
    pub fn draw(fill: impl Fn(&mut [u8])) -> Entropy {
        let mut e = Entropy { challenge: [0; 64], exponent: Zeroizing::new([0; PRIVATE_BYTES]), seqnum: 0 };
        let mut seqnum = [0; 4];
        fill(&mut e.challenge);
        fill(&mut e.exponent[..]);
        fill(&mut seqnum);
        // 0 says that there is none.
        e.seqnum = u32::from_le_bytes(seqnum).max(1);
        e
    }
}

/// What both sides know once the challenge is out.
#[derive(Clone)]
struct Transaction {
    t_id: u16,
    concat: Concat,
    hash: HashId,
    group: DhGroup,
    exponent: Zeroizing<[u8; PRIVATE_BYTES]>,
    seqnum: u32,
    challenge: Zeroizing<Vec<u8>>,
}

impl Transaction {
    /// The key for TLS, if one is wanted; `c2` is the host's challenge.
    fn key(&self, names: &Names, shared: Option<&[u8]>, c2: &[u8]) -> Result<Option<TlsPsk>, Failure> {
        if self.concat == Concat::None {
            return Ok(None);
        }
        let session_key = hash(self.hash, shared.ok_or(Failure::DhGroup)?);
        let key = TlsPsk::generated(names, self.hash, &session_key, [&self.challenge, c2]);
        key.ok_or(Failure::Hash).map(Some)
    }
}

/// One response: HMAC(key, C' | seqnum | T_ID | SC_C | role | names), with C' the challenge itself, or with a group
/// HMAC(H(shared), C).
struct Response<'a> {
    hash: HashId,
    shared: Option<&'a [u8]>,
    t_id: u16,
    concat: Concat,
    seqnum: u32,
    challenge: &'a [u8],
}

impl Response<'_> {
    fn make(&self, key: &[u8], role: &[u8], first: &str, second: &str) -> Zeroizing<Vec<u8>> {
        let augmented = match self.shared {
            None => Zeroizing::new(self.challenge.to_vec()),
            Some(shared) => mac(self.hash, &hash(self.hash, shared), &[self.challenge]),
        };
        let (seqnum, t_id) = (self.seqnum.to_le_bytes(), self.t_id.to_le_bytes());
        let sc_c = [self.concat as u8];
        let parts = [&augmented[..], &seqnum, &t_id, &sc_c, role, first.as_bytes(), &[0], second.as_bytes()];
        mac(self.hash, key, &parts)
    }

    fn of_host(&self, secret: &Secret, names: &Names) -> Zeroizing<Vec<u8>> {
        self.make(secret.transformed(&names.host).expose(), HOST_ROLE, &names.host, &names.subsystem)
    }

    fn of_controller(&self, secret: &Secret, names: &Names) -> Zeroizing<Vec<u8>> {
        self.make(
            secret.transformed(&names.subsystem).expose(),
            CONTROLLER_ROLE,
            &names.subsystem,
            &names.host,
        )
    }
}

fn shared(t: &Transaction, peer: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, Failure> {
    if t.group == DhGroup::Null {
        return Ok(None);
    }
    dh::shared(t.group, &t.exponent, peer).map(Some).ok_or(Failure::Payload)
}

enum Step {
    AwaitNegotiate,
    SendChallenge(Transaction, Vec<u8>),
    AwaitReply(Transaction),
    SendSuccess1(Transaction, Option<Zeroizing<Vec<u8>>>),
    AwaitSuccess2(Transaction),
    SendFailure1(u16, Failure),
    Done(HashId, DhGroup),
    Failed(Failure),
}

/// Where a [`Controller`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A message from the host is due.
    Receive,
    /// The host has to fetch one.
    Send,
    /// The host is who it says.
    Done(HashId, DhGroup),
    /// It is not, or something else was wrong. For good.
    Failed(Failure),
}

/// The controller's side of one transaction.
pub struct Controller {
    names: Names,
    host: Secret,
    own: Option<Secret>,
    offer: Offer,
    accepts: &'static [Concat],
    step: Step,
    key: Option<TlsPsk>,
}

impl Controller {
    /// Waits for Negotiate. `own`: the controller's secret; without one it can not authenticate itself. `accepts`: what the host
    /// may want of concatenation.
    pub fn new(
        names: Names,
        host: Secret,
        own: Option<Secret>,
        offer: Offer,
        accepts: &'static [Concat],
    ) -> Controller {
        Controller { names, host, own, offer, accepts, step: Step::AwaitNegotiate, key: None }
    }

    /// The key for TLS that was generated, once, when it is done.
    pub fn take_key(&mut self) -> Option<TlsPsk> {
        if matches!(self.step, Step::Done(..)) { self.key.take() } else { None }
    }

    /// Where it is.
    pub fn progress(&self) -> Progress {
        match &self.step {
            Step::AwaitNegotiate | Step::AwaitReply(_) | Step::AwaitSuccess2(_) => Progress::Receive,
            Step::SendChallenge(..) | Step::SendSuccess1(..) | Step::SendFailure1(..) => Progress::Send,
            Step::Done(h, g) => Progress::Done(*h, *g),
            Step::Failed(why) => Progress::Failed(*why),
        }
    }

    /// Takes a message of the host (Authentication Send). Costs two exponentiations at most: up to 20 ms with ffdhe8192.
    pub fn receive(&mut self, message: &[u8], entropy: &Entropy) -> Progress {
        let before = std::mem::replace(&mut self.step, Step::Failed(Failure::Message));
        self.step = match (before, FromHost::parse(message)) {
            (Step::AwaitNegotiate, Ok(FromHost::Negotiate(n))) => match self.choose(&n, entropy) {
                Ok((t, public)) => Step::SendChallenge(t, public),
                Err(why) => Step::SendFailure1(n.t_id, why),
            },
            (Step::AwaitReply(t), Ok(FromHost::Reply)) => match self.check(&t, message) {
                Ok(response) => Step::SendSuccess1(t, response),
                Err(why) => Step::SendFailure1(t.t_id, why),
            },
            (Step::AwaitSuccess2(t), Ok(FromHost::Success2(t_id))) if t_id == t.t_id => {
                Step::Done(t.hash, t.group)
            }
            (Step::AwaitSuccess2(_) | Step::AwaitReply(_), Ok(FromHost::Failure2(..))) => {
                Step::Failed(Failure::Failed)
            }
            (Step::AwaitNegotiate, Err(why)) => Step::SendFailure1(0, why),
            (Step::AwaitReply(t) | Step::AwaitSuccess2(t), Err(why)) => Step::SendFailure1(t.t_id, why),
            (Step::AwaitReply(t) | Step::AwaitSuccess2(t), _) => Step::SendFailure1(t.t_id, Failure::Message),
            (Step::AwaitNegotiate, _) => Step::SendFailure1(0, Failure::Message),
            (Step::Failed(why), _) => Step::Failed(why),
            // A message was to be fetched, not sent, or all is over.
            _ => Step::Failed(Failure::Message),
        };
        self.progress()
    }

    /// The message that the host fetches (Authentication Receive). `None`: none is due, and the machine has failed.
    pub fn send(&mut self) -> Option<Vec<u8>> {
        let before = std::mem::replace(&mut self.step, Step::Failed(Failure::Message));
        let (message, next) = match before {
            Step::SendChallenge(t, public) => {
                let c = auth::Challenge {
                    t_id: t.t_id,
                    hash: t.hash,
                    group: t.group,
                    seqnum: t.seqnum,
                    challenge: &t.challenge,
                    public: &public,
                };
                (c.build(), Step::AwaitReply(t))
            }
            Step::SendSuccess1(t, None) => {
                (auth::success1(t.t_id, t.hash, None), Step::Done(t.hash, t.group))
            }
            Step::SendSuccess1(t, Some(response)) => {
                (auth::success1(t.t_id, t.hash, Some(&response)), Step::AwaitSuccess2(t))
            }
            Step::SendFailure1(t_id, why) => (auth::failure(false, t_id, why), Step::Failed(why)),
            Step::Failed(why) => {
                self.step = Step::Failed(why);
                return None;
            }
            _ => return None,
        };
        self.step = next;
        Some(message)
    }

    /// The first of ours that is also the host's: hosts put the null group first.
    fn choose(&self, n: &auth::Negotiate<'_>, entropy: &Entropy) -> Result<(Transaction, Vec<u8>), Failure> {
        let concat = Concat::from_u8(n.sc_c).filter(|c| self.accepts.contains(c));
        let concat = concat.ok_or(Failure::Concatenation)?;
        let (hashes, groups) = n.offer()?;
        let (hashes, groups): (Vec<_>, Vec<_>) = (hashes.collect(), groups.collect());
        let ours = self.offer.clone().with(concat);
        let hash = *ours.hashes.iter().find(|h| hashes.contains(h)).ok_or(Failure::Hash)?;
        let group = *ours.groups.iter().find(|g| groups.contains(g)).ok_or(Failure::DhGroup)?;
        let public = dh::public(group, &entropy.exponent).ok_or(Failure::Failed)?;
        let t = Transaction {
            t_id: n.t_id,
            concat,
            hash,
            group,
            exponent: entropy.exponent.clone(),
            seqnum: entropy.seqnum,
            challenge: Zeroizing::new(entropy.challenge[..hash.len_bytes()].to_vec()),
        };
        Ok((t, public))
    }

    /// Checks the host's response; makes the controller's own if it was challenged, and the key if one is wanted.
    fn check(&mut self, t: &Transaction, message: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, Failure> {
        let reply = Reply::parse(message, t.hash, t.group, t.concat)?;
        if reply.t_id != t.t_id {
            return Err(Failure::Payload);
        }
        let shared = shared(t, reply.public)?;
        let shared = shared.as_ref().map(|s| s.as_slice());
        let (hash, t_id, concat) = (t.hash, t.t_id, t.concat);
        let expected = Response { hash, shared, t_id, concat, seqnum: t.seqnum, challenge: &t.challenge };
        if !same(&expected.of_host(&self.host, &self.names), reply.response) {
            return Err(Failure::Failed);
        }
        let Some(challenge) = reply.challenge else { return Ok(None) };
        self.key = t.key(&self.names, shared, challenge)?;
        if reply.seqnum == 0 {
            return Ok(None);
        }
        // A host that wants to know who we are is not told "success" when we can not say.
        let own = self.own.as_ref().ok_or(Failure::Failed)?;
        let response = Response { seqnum: reply.seqnum, challenge, ..expected };
        Ok(Some(response.of_controller(own, &self.names)))
    }
}

enum HostStep {
    AwaitChallenge(u16),
    /// T_ID, the response that the controller owes, the key that is ours if all goes well.
    AwaitSuccess1(u16, Option<Zeroizing<Vec<u8>>>, Option<TlsPsk>),
    Over,
}

/// The host's side of one transaction.
pub struct Host {
    names: Names,
    own: Secret,
    controller: Option<Secret>,
    offer: Offer,
    concat: Concat,
    step: HostStep,
    key: Option<TlsPsk>,
}

/// What a host does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostNext {
    /// Sends this message, then fetches the next one.
    Send(Vec<u8>),
    /// Sends this message; both sides know each other then.
    Finish(Vec<u8>),
    /// The controller knows us, and we did not ask who it is.
    Done,
    /// It is over; this message says so to the controller, if there is one.
    Failed(Failure, Option<Vec<u8>>),
}

impl Host {
    /// Starts: returns the machine and Negotiate. `controller`: its secret, if it has to authenticate too.
    pub fn start(
        names: Names,
        own: Secret,
        controller: Option<Secret>,
        offer: Offer,
        concat: Concat,
        t_id: u16,
    ) -> (Host, Vec<u8>) {
        let offer = offer.with(concat);
        let message = auth::negotiate(t_id, concat, &offer.hashes, &offer.groups);
        let step = HostStep::AwaitChallenge(t_id);
        (Host { names, own, controller, offer, concat, step, key: None }, message)
    }

    /// The key for TLS that was generated, once, when it is done.
    pub fn take_key(&mut self) -> Option<TlsPsk> {
        self.key.take()
    }

    /// Takes a message of the controller.
    pub fn receive(&mut self, message: &[u8], entropy: &Entropy) -> HostNext {
        let (t_id, result) = match std::mem::replace(&mut self.step, HostStep::Over) {
            HostStep::AwaitChallenge(t_id) => (t_id, self.challenged(t_id, message, entropy)),
            HostStep::AwaitSuccess1(t_id, owed, key) => {
                let result = finished(t_id, owed, message);
                self.key = key.filter(|_| matches!(result, Ok(HostNext::Finish(_) | HostNext::Done)));
                (t_id, result)
            }
            HostStep::Over => (0, Err(Failure::Message)),
        };
        match result {
            Ok(next) => next,
            Err(why) => HostNext::Failed(why, Some(auth::failure(true, t_id, why))),
        }
    }

    fn challenged(&mut self, t_id: u16, message: &[u8], entropy: &Entropy) -> Result<HostNext, Failure> {
        let c = match FromController::parse(message)? {
            FromController::Challenge(c) if c.t_id == t_id => c,
            FromController::Failure1(_, why) => return Ok(refused(why)),
            FromController::Challenge(_) => return Err(Failure::Payload),
            FromController::Success1(..) => return Err(Failure::Message),
        };
        if !self.offer.hashes.contains(&c.hash) {
            return Err(Failure::Hash);
        }
        if !self.offer.groups.contains(&c.group) {
            return Err(Failure::DhGroup);
        }
        let t = Transaction {
            t_id,
            concat: self.concat,
            hash: c.hash,
            group: c.group,
            exponent: entropy.exponent.clone(),
            seqnum: c.seqnum,
            challenge: Zeroizing::new(c.challenge.to_vec()),
        };
        let shared = shared(&t, c.public)?;
        let shared = shared.as_ref().map(|s| s.as_slice());
        let (hash, concat) = (t.hash, t.concat);
        let response = Response { hash, shared, t_id, concat, seqnum: t.seqnum, challenge: c.challenge };
        let ours = &entropy.challenge[..t.hash.len_bytes()];
        let owed = self.controller.as_ref().map(|secret| {
            let r = Response { seqnum: entropy.seqnum, challenge: ours, ..response };
            r.of_controller(secret, &self.names)
        });
        let reply = Reply {
            t_id,
            seqnum: if owed.is_some() { entropy.seqnum } else { 0 },
            response: &response.of_host(&self.own, &self.names),
            challenge: (owed.is_some() || concat != Concat::None).then_some(ours),
            public: &dh::public(t.group, &t.exponent).ok_or(Failure::Failed)?,
        }
        .build();
        self.step = HostStep::AwaitSuccess1(t_id, owed, t.key(&self.names, shared, ours)?);
        Ok(HostNext::Send(reply))
    }
}

fn refused(why: u8) -> HostNext {
    HostNext::Failed(Failure::from_u8(why).unwrap_or(Failure::Failed), None)
}

fn finished(t_id: u16, owed: Option<Zeroizing<Vec<u8>>>, message: &[u8]) -> Result<HostNext, Failure> {
    match (FromController::parse(message)?, owed) {
        (FromController::Failure1(_, why), _) => Ok(refused(why)),
        (FromController::Success1(t, _), _) if t != t_id => Err(Failure::Payload),
        (FromController::Success1(_, None), None) => Ok(HostNext::Done),
        (FromController::Success1(_, Some(response)), Some(owed)) if same(response, &owed) => {
            Ok(HostNext::Finish(auth::success2(t_id)))
        }
        (FromController::Success1(..), Some(_)) => Err(Failure::Failed),
        (FromController::Success1(_, Some(_)), None) => Err(Failure::Payload),
        (FromController::Challenge(_), _) => Err(Failure::Message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names() -> Names {
        Names {
            host: "nqn.2024-01.io.cryptfold:host".into(),
            subsystem: "nqn.2024-01.io.cryptfold:sub".into(),
        }
    }

    fn entropy(seed: u8) -> Entropy {
        Entropy {
            challenge: [seed; 64],
            exponent: Zeroizing::new([seed; PRIVATE_BYTES]),
            seqnum: u32::from(seed) + 1,
        }
    }

    fn secret(byte: u8, transform: Option<HashId>) -> Secret {
        let len = transform.map_or(32, HashId::len_bytes);
        Secret::new(&vec![byte; len], transform).expect("legal")
    }

    fn controller(host: &Secret, own: Option<&Secret>) -> Controller {
        Controller::new(names(), host.clone(), own.cloned(), Offer::default(), &[Concat::None])
    }

    /// Both sides to the end: how the controller and the host see it.
    fn run(c: &mut Controller, h: (Host, Vec<u8>)) -> (Progress, HostNext) {
        let (mut h, negotiate) = h;
        c.receive(&negotiate, &entropy(1));
        let mut message = c.send().expect("a challenge or a failure");
        loop {
            let next = h.receive(&message, &entropy(2));
            match &next {
                HostNext::Send(m) => {
                    c.receive(m, &entropy(3));
                    match c.send() {
                        Some(m) => message = m,
                        None => return (c.progress(), next),
                    }
                }
                HostNext::Finish(m) => return (c.receive(m, &entropy(4)), next),
                HostNext::Failed(_, Some(m)) => return (c.receive(m, &entropy(4)), next),
                HostNext::Failed(_, None) | HostNext::Done => return (c.progress(), next),
            }
        }
    }

    #[test]
    fn every_hash_and_group_one_way_and_both() {
        for hash in HashId::ALL {
            for group in DhGroup::ALL {
                for transform in [None, Some(HashId::Sha256), Some(HashId::Sha384), Some(HashId::Sha512)] {
                    for both in [false, true] {
                        let (host, own) = (secret(1, transform), secret(2, transform));
                        let mut c = controller(&host, Some(&own));
                        let offer = Offer { hashes: vec![*hash], groups: vec![*group] };
                        let h = Host::start(names(), host, both.then_some(own), offer, Concat::None, 77);
                        let (progress, next) = run(&mut c, h);
                        assert_eq!(progress, Progress::Done(*hash, *group));
                        assert_eq!(matches!(next, HostNext::Finish(_)), both);
                        assert_eq!(matches!(next, HostNext::Done), !both);
                    }
                }
            }
        }
    }

    #[test]
    fn wrong_secrets_and_names() {
        let (host, own, other) = (secret(1, None), secret(2, None), secret(3, None));
        let offer = || Offer { hashes: vec![HashId::Sha256], groups: vec![DhGroup::Null] };
        let start = |own: &Secret, ctrl: Option<&Secret>| {
            Host::start(names(), own.clone(), ctrl.cloned(), offer(), Concat::None, 1)
        };
        let failed = Progress::Failed(Failure::Failed);
        let (progress, next) = run(&mut controller(&host, None), start(&other, None));
        assert_eq!((progress, next), (failed, HostNext::Failed(Failure::Failed, None)), "the host's");
        let (progress, next) = run(&mut controller(&host, Some(&other)), start(&host, Some(&own)));
        assert!(
            progress == failed && matches!(next, HostNext::Failed(Failure::Failed, Some(_))),
            "the controller's"
        );
        let (progress, _) = run(&mut controller(&host, None), start(&host, Some(&own)));
        assert_eq!(progress, failed, "a controller without a secret");
        let elsewhere = Names { subsystem: "nqn.2024-01.io.cryptfold:else".into(), ..names() };
        let (progress, _) = run(
            &mut controller(&host, None),
            Host::start(elsewhere, host.clone(), None, offer(), Concat::None, 1),
        );
        assert_eq!(progress, failed, "another subsystem's");
        // The same secret for both directions: a reflected response does not fit, because of the roles.
        let (hash, concat) = (HashId::Sha256, Concat::None);
        let r = Response { hash, shared: None, t_id: 1, concat, seqnum: 1, challenge: &[1; 32] };
        assert_ne!(*r.of_host(&host, &names()), *r.of_controller(&host, &names()));
    }

    #[test]
    fn nothing_in_common() {
        let fail = |offer: Offer, ours: Offer| {
            let mut c = Controller::new(names(), secret(1, None), None, ours, &[Concat::None]);
            run(&mut c, Host::start(names(), secret(1, None), None, offer, Concat::None, 5)).0
        };
        let hash = |h| Offer { hashes: vec![h], ..Offer::default() };
        assert_eq!(fail(hash(HashId::Sha512), hash(HashId::Sha256)), Progress::Failed(Failure::Hash));
        let group = |g| Offer { groups: vec![g], ..Offer::default() };
        assert_eq!(fail(group(DhGroup::Null), group(DhGroup::Ffdhe2048)), Progress::Failed(Failure::DhGroup));
        for sc_c in 1..=255 {
            let mut c = controller(&secret(1, None), None);
            let mut message = auth::negotiate(9, Concat::None, HashId::ALL, DhGroup::ALL);
            message[6] = sc_c;
            c.receive(&message, &entropy(1));
            assert_eq!(c.send(), Some(auth::failure(false, 9, Failure::Concatenation)), "SC_C {sc_c}");
        }
    }

    /// Both sides have the same key afterwards, another one each time; nobody has one without it.
    #[test]
    fn keys_are_generated() {
        let (host, own) = (secret(1, None), secret(2, None));
        let pair = |concat, accepts, hash, group, both: bool| {
            let c = Controller::new(names(), host.clone(), Some(own.clone()), Offer::default(), accepts);
            let offer = Offer { hashes: vec![hash], groups: vec![group] };
            (c, Host::start(names(), host.clone(), both.then(|| own.clone()), offer, concat, 77))
        };
        let mut seen = Vec::new();
        for concat in [Concat::New, Concat::Replace] {
            for (hash, both) in [
                (HashId::Sha256, false),
                (HashId::Sha256, true),
                (HashId::Sha384, false),
                (HashId::Sha384, true),
            ] {
                let (mut c, (mut h, message)) =
                    pair(concat, &[Concat::New, Concat::Replace], hash, DhGroup::Ffdhe2048, both);
                c.receive(&message, &entropy(seen.len() as u8 + 5));
                let HostNext::Send(reply) = h.receive(&c.send().expect("a challenge"), &entropy(2)) else {
                    panic!("a reply")
                };
                c.receive(&reply, &entropy(3));
                assert!(c.take_key().is_none() && h.take_key().is_none(), "not yet");
                match h.receive(&c.send().expect("success"), &entropy(2)) {
                    HostNext::Finish(m) if both => assert!(c.receive(&m, &entropy(4)) == c.progress()),
                    HostNext::Done if !both => {}
                    other => panic!("{other:?}"),
                }
                assert_eq!(c.progress(), Progress::Done(hash, DhGroup::Ffdhe2048));
                let (ours, theirs) = (c.take_key().expect("a key"), h.take_key().expect("a key"));
                assert_eq!(ours, theirs);
                assert_eq!((c.take_key(), h.take_key()), (None, None), "once");
                assert!(!seen.contains(&ours.identity));
                seen.push(ours.identity);
            }
        }
        let refused = |concat, accepts, hash, group, why| {
            let (mut c, h) = pair(concat, accepts, hash, group, false);
            assert_eq!(run(&mut c, h).0, Progress::Failed(why), "{concat:?} {hash:?} {group:?}");
            assert!(c.take_key().is_none());
        };
        let g = DhGroup::Ffdhe2048;
        refused(Concat::New, &[Concat::None], HashId::Sha256, g, Failure::Concatenation);
        refused(Concat::New, &[Concat::None, Concat::Replace], HashId::Sha256, g, Failure::Concatenation);
        refused(Concat::None, &[Concat::New], HashId::Sha256, g, Failure::Concatenation);
        // Our own host does not offer these; others may.
        for (hash, group, why) in
            [(HashId::Sha512, g, Failure::Hash), (HashId::Sha256, DhGroup::Null, Failure::DhGroup)]
        {
            let (mut c, _) = pair(Concat::New, &[Concat::New], hash, group, false);
            c.receive(&auth::negotiate(3, Concat::New, &[hash], &[group]), &entropy(1));
            assert_eq!(c.send(), Some(auth::failure(false, 3, why)));
        }
        // What was negotiated goes into the responses: it can not be changed on the way.
        let (mut c, (mut h, mut message)) =
            pair(Concat::New, &[Concat::New, Concat::Replace], HashId::Sha256, g, false);
        message[6] = Concat::Replace as u8;
        c.receive(&message, &entropy(1));
        let HostNext::Send(reply) = h.receive(&c.send().expect("a challenge"), &entropy(2)) else {
            panic!("a reply")
        };
        c.receive(&reply, &entropy(3));
        assert_eq!(c.send(), Some(auth::failure(false, 77, Failure::Failed)));
    }

    /// An old Reply in a new transaction, a skipped step, another transaction's number.
    #[test]
    fn replays_and_skipped_steps() {
        let host = secret(1, None);
        let offer = Offer { hashes: vec![HashId::Sha256], groups: vec![DhGroup::Null] };
        let (mut h, negotiate) = Host::start(names(), host.clone(), None, offer, Concat::None, 1);
        let mut c = controller(&host, None);
        c.receive(&negotiate, &entropy(1));
        let HostNext::Send(reply) = h.receive(&c.send().expect("a challenge"), &entropy(2)) else {
            panic!("a reply")
        };
        let mut again = controller(&host, None);
        again.receive(&negotiate, &entropy(9));
        again.send().expect("another challenge");
        again.receive(&reply, &entropy(3));
        assert_eq!(again.send(), Some(auth::failure(false, 1, Failure::Failed)), "replayed");
        assert_eq!(again.progress(), Progress::Failed(Failure::Failed));
        assert_eq!(
            (again.send(), again.receive(&negotiate, &entropy(1))),
            (None, Progress::Failed(Failure::Failed))
        );

        let mut skipped = controller(&host, None);
        skipped.receive(&reply, &entropy(1));
        assert_eq!(skipped.send(), Some(auth::failure(false, 0, Failure::Message)));
        let mut early = controller(&host, None);
        assert_eq!((early.send(), early.progress()), (None, Progress::Failed(Failure::Message)));
        let mut twice = controller(&host, None);
        twice.receive(&negotiate, &entropy(1));
        assert_eq!(twice.receive(&negotiate, &entropy(1)), Progress::Failed(Failure::Message));
        let mut other = reply;
        other[4] ^= 1;
        c.receive(&other, &entropy(1));
        assert_eq!(c.send(), Some(auth::failure(false, 1, Failure::Payload)), "T_ID");
        let mut skip_fetch = controller(&host, None);
        skip_fetch.receive(&negotiate, &entropy(1));
        assert_eq!(skip_fetch.receive(&auth::success2(1), &entropy(1)), Progress::Failed(Failure::Message));
    }

    proptest! {
        /// Whatever arrives in whatever order: never authenticated, never a panic.
        #[test]
        fn noise_authenticates_nobody(
            script in proptest::collection::vec((any::<bool>(), proptest::collection::vec(any::<u8>(), 0..120), 0u8..6), 1..12),
        ) {
            let mut c = controller(&secret(1, None), None);
            for (send, mut message, kind) in script {
                if send {
                    c.send();
                } else {
                    if kind == 0 {
                        message = auth::negotiate(1, Concat::None, HashId::ALL, &[DhGroup::Null]);
                    } else if message.len() > 80 {
                        message[..16].copy_from_slice(&[1, 2, 0, 0, 1, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                    }
                    c.receive(&message, &entropy(7));
                }
                prop_assert!(!matches!(c.progress(), Progress::Done(..)));
            }
        }
    }
}
