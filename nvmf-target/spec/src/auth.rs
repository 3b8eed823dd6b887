//! Messages of in-band authentication with DH-HMAC-CHAP (NVMe Base 2.0 section 8.13.5). Carried by Authentication Send
//! and Receive; layouts and checks of form only, no cryptography.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use crate::wire::wire;

/// AUTH_TYPE of messages common to all protocols.
pub const TYPE_COMMON: u8 = 0;
/// AUTH_TYPE of DH-HMAC-CHAP's messages.
pub const TYPE_DHCHAP: u8 = 1;
/// AUTH_ID of DH-HMAC-CHAP in a protocol descriptor.
pub const PROTOCOL_DHCHAP: u8 = 1;
/// Protocol descriptors that are looked at in AUTH_Negotiate.
const MAX_PROTOCOLS: usize = 8;
/// Identifiers in each half of a protocol descriptor.
const MAX_IDS: usize = 30;
/// Bytes of the longest message that is legal here: a Reply with SHA-512 and ffdhe8192.
pub const MAX_MESSAGE_BYTES: usize = 16 + 2 * 64 + 1024;

/// AUTH_ID of a message.
pub mod id {
    /// AUTH_Negotiate, host to controller.
    pub const NEGOTIATE: u8 = 0x00;
    /// DH-HMAC-CHAP_Challenge, controller to host.
    pub const CHALLENGE: u8 = 0x01;
    /// DH-HMAC-CHAP_Reply, host to controller.
    pub const REPLY: u8 = 0x02;
    /// DH-HMAC-CHAP_Success1, controller to host.
    pub const SUCCESS1: u8 = 0x03;
    /// DH-HMAC-CHAP_Success2, host to controller.
    pub const SUCCESS2: u8 = 0x04;
    /// AUTH_Failure2, host to controller.
    pub const FAILURE2: u8 = 0xf0;
    /// AUTH_Failure1, controller to host.
    pub const FAILURE1: u8 = 0xf1;
}

macro_rules! codes {
    ($(#[$meta:meta])* pub enum $name:ident { $( $(#[$vmeta:meta])* $variant:ident = $code:literal, $text:literal );+ $(;)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $( $(#[$vmeta])* $variant = $code ),+ }

        impl $name {
            /// All, ascending.
            pub const ALL: &[$name] = &[$( $name::$variant ),+];
            /// From the wire.
            pub fn from_u8(code: u8) -> Option<Self> {
                Self::ALL.iter().copied().find(|x| *x as u8 == code)
            }
            /// As in configurations and logs.
            pub const fn name(self) -> &'static str {
                match self { $( Self::$variant => $text ),+ }
            }
            /// From a configuration.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|x| x.name() == name)
            }
        }
    };
}

codes! {
    /// Hash functions (NVMe Base 2.0 section 8.13.5).
    pub enum HashId {
        /// SHA-256.
        Sha256 = 1, "sha256";
        /// SHA-384.
        Sha384 = 2, "sha384";
        /// SHA-512.
        Sha512 = 3, "sha512";
    }
}

codes! {
    /// Diffie-Hellman groups (NVMe Base 2.0 section 8.13.5).
    pub enum DhGroup {
        /// None: no Diffie-Hellman exchange.
        Null = 0, "null";
        /// ffdhe2048 of RFC 7919.
        Ffdhe2048 = 1, "ffdhe2048";
        /// ffdhe3072 of RFC 7919.
        Ffdhe3072 = 2, "ffdhe3072";
        /// ffdhe4096 of RFC 7919.
        Ffdhe4096 = 3, "ffdhe4096";
        /// ffdhe6144 of RFC 7919.
        Ffdhe6144 = 4, "ffdhe6144";
        /// ffdhe8192 of RFC 7919.
        Ffdhe8192 = 5, "ffdhe8192";
    }
}

codes! {
    /// Why authentication failed: Reason Code Explanation (NVMe Base 2.0 section 8.13.5).
    pub enum Failure {
        /// The response does not fit.
        Failed = 1, "authentication failed";
        /// No common protocol.
        Protocol = 2, "authentication protocol not usable";
        /// Secure channel concatenation is wanted or refused by one side.
        Concatenation = 3, "secure channel concatenation mismatch";
        /// No common hash function.
        Hash = 4, "hash function not usable";
        /// No common Diffie-Hellman group.
        DhGroup = 5, "DH group not usable";
        /// A field is wrong.
        Payload = 6, "incorrect payload";
        /// Another message was due.
        Message = 7, "incorrect protocol message";
    }
}

codes! {
    /// SC_C: what a host wants of secure channel concatenation (NVMe Base 2.0 section 8.13.5, TP 8018). 1 is obsolete.
    pub enum Concat {
        /// NOSC: nothing, no key is generated.
        None = 0, "none";
        /// NEWTLSPSK, on an Admin Queue without TLS: a key to come back with.
        New = 2, "new";
        /// REPLACETLSPSK, on an Admin Queue with TLS by a generated key: another one in its place.
        Replace = 3, "replace";
    }
}

impl HashId {
    /// Bytes of its output.
    pub const fn len_bytes(self) -> usize {
        match self {
            HashId::Sha256 => 32,
            HashId::Sha384 => 48,
            HashId::Sha512 => 64,
        }
    }
}

impl DhGroup {
    /// Bytes of a public value.
    pub const fn len_bytes(self) -> usize {
        match self {
            DhGroup::Null => 0,
            DhGroup::Ffdhe2048 => 256,
            DhGroup::Ffdhe3072 => 384,
            DhGroup::Ffdhe4096 => 512,
            DhGroup::Ffdhe6144 => 768,
            DhGroup::Ffdhe8192 => 1024,
        }
    }
}

wire! {
    /// AUTH_Negotiate without its protocol descriptors (NVMe Base 2.0 section 8.13.5).
    pub struct NegotiateHead: 8 {
        /// AUTH_TYPE.
        0 => pub auth_type: u8,
        /// AUTH_ID, see [`id`].
        1 => pub auth_id: u8,
        2 => _rsvd2: [u8; 2],
        /// T_ID: the transaction, chosen by the host.
        4 => pub t_id: U16,
        /// SC_C, a [`Concat`] code.
        6 => pub sc_c: u8,
        /// NAPD: protocol descriptors that follow.
        7 => pub napd: u8,
    }
}

wire! {
    /// A protocol descriptor of AUTH_Negotiate for DH-HMAC-CHAP (NVMe Base 2.0 section 8.13.5).
    pub struct ProtocolDescriptor: 64 {
        /// AUTH_ID: [`PROTOCOL_DHCHAP`].
        0 => pub auth_id: u8,
        1 => _rsvd1: u8,
        /// HALEN: hash identifiers in the list.
        2 => pub halen: u8,
        /// DHLEN: group identifiers in the list.
        3 => pub dhlen: u8,
        /// Hash identifiers, by preference.
        4 => pub hashes: [u8; 30],
        /// Group identifiers, by preference.
        34 => pub groups: [u8; 30],
    }
}

wire! {
    /// DH-HMAC-CHAP_Challenge without challenge and public value (NVMe Base 2.0 section 8.13.5).
    pub struct ChallengeHead: 16 {
        /// AUTH_TYPE.
        0 => pub auth_type: u8,
        /// AUTH_ID, see [`id`].
        1 => pub auth_id: u8,
        2 => _rsvd2: [u8; 2],
        /// T_ID.
        4 => pub t_id: U16,
        /// HL: bytes of the challenge, the hash's length.
        6 => pub hl: u8,
        7 => _rsvd7: u8,
        /// HashID.
        8 => pub hash: u8,
        /// DHgID.
        9 => pub group: u8,
        /// DHVLEN: bytes of the public value; 0 for the null group.
        10 => pub dhvlen: U16,
        /// SEQNUM, S1: never 0.
        12 => pub seqnum: U32,
    }
}

wire! {
    /// DH-HMAC-CHAP_Reply without response, challenge and public value (NVMe Base 2.0 section 8.13.5).
    pub struct ReplyHead: 16 {
        /// AUTH_TYPE.
        0 => pub auth_type: u8,
        /// AUTH_ID, see [`id`].
        1 => pub auth_id: u8,
        2 => _rsvd2: [u8; 2],
        /// T_ID.
        4 => pub t_id: U16,
        /// HL: bytes of the response and of the challenge.
        6 => pub hl: u8,
        7 => _rsvd7: u8,
        /// CVALID: 1 = the controller has to authenticate too.
        8 => pub cvalid: u8,
        9 => _rsvd9: u8,
        /// DHVLEN.
        10 => pub dhvlen: U16,
        /// SEQNUM, S2: 0 if the controller need not authenticate, whatever CVALID says.
        12 => pub seqnum: U32,
    }
}

wire! {
    /// DH-HMAC-CHAP_Success1 without response (NVMe Base 2.0 section 8.13.5). Success2 has the same first 16 bytes, with HL and
    /// RVALID reserved.
    pub struct SuccessHead: 16 {
        /// AUTH_TYPE.
        0 => pub auth_type: u8,
        /// AUTH_ID, see [`id`].
        1 => pub auth_id: u8,
        2 => _rsvd2: [u8; 2],
        /// T_ID.
        4 => pub t_id: U16,
        /// HL: bytes of the response.
        6 => pub hl: u8,
        7 => _rsvd7: u8,
        /// RVALID: 1 = the response is there.
        8 => pub rvalid: u8,
        9 => _rsvd9: [u8; 7],
    }
}

wire! {
    /// AUTH_Failure1 and AUTH_Failure2 (NVMe Base 2.0 section 8.13.5).
    pub struct FailureMessage: 8 {
        /// AUTH_TYPE.
        0 => pub auth_type: u8,
        /// AUTH_ID, see [`id`].
        1 => pub auth_id: u8,
        2 => _rsvd2: [u8; 2],
        /// T_ID.
        4 => pub t_id: U16,
        /// RC: 1 = authentication failure.
        6 => pub rc: u8,
        /// RCE, a [`Failure`] code.
        7 => pub rce: u8,
    }
}

/// What a host offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiate<'a> {
    /// T_ID.
    pub t_id: u16,
    /// SC_C.
    pub sc_c: u8,
    descriptors: &'a [ProtocolDescriptor],
}

/// What a controller asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Challenge<'a> {
    /// T_ID.
    pub t_id: u16,
    /// The hash function chosen.
    pub hash: HashId,
    /// The group chosen.
    pub group: DhGroup,
    /// S1.
    pub seqnum: u32,
    /// C1, as long as the hash.
    pub challenge: &'a [u8],
    /// The controller's public value, as long as the group's.
    pub public: &'a [u8],
}

/// What a host answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply<'a> {
    /// T_ID.
    pub t_id: u16,
    /// S2.
    pub seqnum: u32,
    /// R1.
    pub response: &'a [u8],
    /// C2, if the controller has to authenticate too, or a key is generated of it.
    pub challenge: Option<&'a [u8]>,
    /// The host's public value.
    pub public: &'a [u8],
}

/// A message from a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromHost<'a> {
    /// AUTH_Negotiate.
    Negotiate(Negotiate<'a>),
    /// DH-HMAC-CHAP_Reply; its lengths have to be checked against the challenge with [`Reply::parse`].
    Reply,
    /// DH-HMAC-CHAP_Success2, with T_ID.
    Success2(u16),
    /// AUTH_Failure2, with T_ID and explanation.
    Failure2(u16, u8),
}

/// A message from a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromController<'a> {
    /// DH-HMAC-CHAP_Challenge.
    Challenge(Challenge<'a>),
    /// DH-HMAC-CHAP_Success1: T_ID, and the response if there is one.
    Success1(u16, Option<&'a [u8]>),
    /// AUTH_Failure1, with T_ID and explanation.
    Failure1(u16, u8),
}

fn head<T: FromBytes>(message: &[u8]) -> Result<(T, &[u8]), Failure> {
    T::read_from_prefix(message).map_err(|_| Failure::Payload)
}

fn types(message: &[u8]) -> Result<(u8, u8), Failure> {
    message.first_chunk::<2>().map(|[t, i]| (*t, *i)).ok_or(Failure::Payload)
}

impl<'a> FromHost<'a> {
    /// Takes a message apart. Bytes behind its end are ignored: hosts may send a whole buffer.
    ///
    /// # Errors
    /// What Failure1 has to say.
    pub fn parse(message: &'a [u8]) -> Result<Self, Failure> {
        match types(message)? {
            (TYPE_COMMON, id::NEGOTIATE) => {
                let (h, rest) = head::<NegotiateHead>(message)?;
                let n = usize::from(h.napd);
                if n == 0 || n > MAX_PROTOCOLS {
                    return Err(Failure::Payload);
                }
                let descriptors = <[ProtocolDescriptor]>::ref_from_prefix_with_elems(rest, n);
                let (descriptors, _) = descriptors.map_err(|_| Failure::Payload)?;
                Ok(FromHost::Negotiate(Negotiate { t_id: h.t_id.get(), sc_c: h.sc_c, descriptors }))
            }
            (TYPE_DHCHAP, id::REPLY) => Ok(FromHost::Reply),
            (TYPE_DHCHAP, id::SUCCESS2) => Ok(FromHost::Success2(head::<SuccessHead>(message)?.0.t_id.get())),
            (TYPE_COMMON | TYPE_DHCHAP, id::FAILURE2) => {
                let f = head::<FailureMessage>(message)?.0;
                Ok(FromHost::Failure2(f.t_id.get(), f.rce))
            }
            _ => Err(Failure::Message),
        }
    }
}

impl<'a> Negotiate<'a> {
    /// The host's DH-HMAC-CHAP offer: hash functions and groups, by preference; unknown ones left out.
    ///
    /// # Errors
    /// No such offer, or lengths that leave the descriptor.
    pub fn offer(
        &self,
    ) -> Result<(impl Iterator<Item = HashId> + 'a, impl Iterator<Item = DhGroup> + 'a), Failure> {
        let d = self.descriptors.iter().find(|d| d.auth_id == PROTOCOL_DHCHAP).ok_or(Failure::Protocol)?;
        let (h, g) = (usize::from(d.halen), usize::from(d.dhlen));
        if h == 0 || h > MAX_IDS || g == 0 || g > MAX_IDS {
            return Err(Failure::Payload);
        }
        let hashes = d.hashes[..h].iter().filter_map(|c| HashId::from_u8(*c));
        Ok((hashes, d.groups[..g].iter().filter_map(|c| DhGroup::from_u8(*c))))
    }
}

impl<'a> Reply<'a> {
    /// Takes the answer to a challenge with this hash and group apart.
    ///
    /// # Errors
    /// Lengths that do not fit the challenge, or a CVALID or SEQNUM that can not be with what was negotiated.
    pub fn parse(message: &'a [u8], hash: HashId, group: DhGroup, concat: Concat) -> Result<Self, Failure> {
        if types(message)? != (TYPE_DHCHAP, id::REPLY) {
            return Err(Failure::Message);
        }
        let (h, rest) = head::<ReplyHead>(message)?;
        let (hl, dhl) = (hash.len_bytes(), group.len_bytes());
        let fits = usize::from(h.hl) == hl && usize::from(h.dhvlen.get()) == dhl && h.cvalid <= 1;
        // A challenge is there to be answered, or to generate a key of.
        let challenged = match concat {
            Concat::None => h.cvalid == 0 || h.seqnum.get() != 0,
            Concat::New | Concat::Replace => h.cvalid == 1,
        };
        if !fits || rest.len() < 2 * hl + dhl || !challenged {
            return Err(Failure::Payload);
        }
        let (response, rest) = rest.split_at(hl);
        let (challenge, rest) = rest.split_at(hl);
        Ok(Reply {
            t_id: h.t_id.get(),
            seqnum: h.seqnum.get(),
            response,
            challenge: (h.cvalid == 1).then_some(challenge),
            public: &rest[..dhl],
        })
    }

    /// Writes the message.
    pub fn build(&self) -> Vec<u8> {
        let hl = self.response.len();
        let head = ReplyHead {
            auth_type: TYPE_DHCHAP,
            auth_id: id::REPLY,
            t_id: self.t_id.into(),
            hl: hl as u8,
            cvalid: self.challenge.is_some().into(),
            dhvlen: U16::new(self.public.len() as u16),
            seqnum: self.seqnum.into(),
            ..Default::default()
        };
        let zeros = [0; 64];
        [head.as_bytes(), self.response, self.challenge.unwrap_or(&zeros[..hl]), self.public].concat()
    }
}

impl<'a> FromController<'a> {
    /// Takes a message apart; bytes behind its end are ignored.
    ///
    /// # Errors
    /// What Failure2 has to say.
    pub fn parse(message: &'a [u8]) -> Result<Self, Failure> {
        match types(message)? {
            (TYPE_DHCHAP, id::CHALLENGE) => {
                let (h, rest) = head::<ChallengeHead>(message)?;
                let hash = HashId::from_u8(h.hash).ok_or(Failure::Hash)?;
                let group = DhGroup::from_u8(h.group).ok_or(Failure::DhGroup)?;
                let (hl, dhl) = (hash.len_bytes(), group.len_bytes());
                let fits = usize::from(h.hl) == hl && usize::from(h.dhvlen.get()) == dhl;
                if !fits || rest.len() < hl + dhl || h.seqnum.get() == 0 {
                    return Err(Failure::Payload);
                }
                let (challenge, public) = (&rest[..hl], &rest[hl..hl + dhl]);
                let (t_id, seqnum) = (h.t_id.get(), h.seqnum.get());
                Ok(FromController::Challenge(Challenge { t_id, hash, group, seqnum, challenge, public }))
            }
            (TYPE_DHCHAP, id::SUCCESS1) => {
                let (h, rest) = head::<SuccessHead>(message)?;
                let response = match h.rvalid {
                    0 => None,
                    1 => Some(rest.get(..usize::from(h.hl)).ok_or(Failure::Payload)?),
                    _ => return Err(Failure::Payload),
                };
                Ok(FromController::Success1(h.t_id.get(), response))
            }
            (TYPE_COMMON | TYPE_DHCHAP, id::FAILURE1) => {
                let f = head::<FailureMessage>(message)?.0;
                Ok(FromController::Failure1(f.t_id.get(), f.rce))
            }
            _ => Err(Failure::Message),
        }
    }
}

impl Challenge<'_> {
    /// Writes the message.
    pub fn build(&self) -> Vec<u8> {
        let head = ChallengeHead {
            auth_type: TYPE_DHCHAP,
            auth_id: id::CHALLENGE,
            t_id: self.t_id.into(),
            hl: self.hash.len_bytes() as u8,
            hash: self.hash as u8,
            group: self.group as u8,
            dhvlen: U16::new(self.group.len_bytes() as u16),
            seqnum: self.seqnum.into(),
            ..Default::default()
        };
        [head.as_bytes(), self.challenge, self.public].concat()
    }
}

/// AUTH_Negotiate that offers DH-HMAC-CHAP with these hash functions and groups (at most 30 each), by preference.
pub fn negotiate(t_id: u16, concat: Concat, hashes: &[HashId], groups: &[DhGroup]) -> Vec<u8> {
    let head = NegotiateHead {
        auth_id: id::NEGOTIATE,
        t_id: t_id.into(),
        sc_c: concat as u8,
        napd: 1,
        ..Default::default()
    };
    let mut d = ProtocolDescriptor { auth_id: PROTOCOL_DHCHAP, ..Default::default() };
    for (to, from) in d.hashes.iter_mut().zip(hashes) {
        *to = *from as u8;
    }
    for (to, from) in d.groups.iter_mut().zip(groups) {
        *to = *from as u8;
    }
    (d.halen, d.dhlen) = (hashes.len().min(MAX_IDS) as u8, groups.len().min(MAX_IDS) as u8);
    [head.as_bytes(), d.as_bytes()].concat()
}

/// DH-HMAC-CHAP_Success1, with the response (as long as the hash) if the controller was challenged.
pub fn success1(t_id: u16, hash: HashId, response: Option<&[u8]>) -> Vec<u8> {
    let head = SuccessHead {
        auth_type: TYPE_DHCHAP,
        auth_id: id::SUCCESS1,
        t_id: t_id.into(),
        hl: hash.len_bytes() as u8,
        rvalid: response.is_some().into(),
        ..Default::default()
    };
    let zeros = [0; 64];
    [head.as_bytes(), response.unwrap_or(&zeros[..hash.len_bytes()])].concat()
}

/// DH-HMAC-CHAP_Success2.
pub fn success2(t_id: u16) -> Vec<u8> {
    let head = SuccessHead {
        auth_type: TYPE_DHCHAP,
        auth_id: id::SUCCESS2,
        t_id: t_id.into(),
        ..Default::default()
    };
    head.as_bytes().to_vec()
}

/// AUTH_Failure1 (from a controller) or AUTH_Failure2 (from a host).
pub fn failure(from_host: bool, t_id: u16, why: Failure) -> Vec<u8> {
    let auth_id = if from_host { id::FAILURE2 } else { id::FAILURE1 };
    let m = FailureMessage { auth_id, t_id: t_id.into(), rc: 1, rce: why as u8, ..Default::default() };
    m.as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_layouts() {
        let n = negotiate(0x0102, Concat::None, &[HashId::Sha384, HashId::Sha256], &[DhGroup::Ffdhe3072]);
        assert_eq!(n[..16], [0, 0, 0, 0, 2, 1, 0, 1, 1, 0, 2, 1, 2, 1, 0, 0]);
        assert_eq!((n.len(), n[42]), (72, 2));
        let c = Challenge {
            t_id: 7,
            hash: HashId::Sha256,
            group: DhGroup::Null,
            seqnum: 0x0a0b,
            challenge: &[9; 32],
            public: &[],
        };
        let bytes = c.build();
        assert_eq!(bytes[..16], [1, 1, 0, 0, 7, 0, 32, 0, 1, 0, 0, 0, 0x0b, 0x0a, 0, 0]);
        assert_eq!(FromController::parse(&bytes), Ok(FromController::Challenge(c)));
        let r = Reply { t_id: 7, seqnum: 5, response: &[1; 32], challenge: Some(&[2; 32]), public: &[] };
        assert_eq!(r.build()[..16], [1, 2, 0, 0, 7, 0, 32, 0, 1, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(Reply::parse(&r.build(), HashId::Sha256, DhGroup::Null, Concat::None), Ok(r));
        assert_eq!(failure(false, 7, Failure::Hash), [0, 0xf1, 0, 0, 7, 0, 1, 4]);
        assert_eq!(failure(true, 7, Failure::Failed), [0, 0xf0, 0, 0, 7, 0, 1, 1]);
        let s = success1(7, HashId::Sha256, Some(&[3; 32]));
        assert_eq!(FromController::parse(&s), Ok(FromController::Success1(7, Some(&[3; 32]))));
        assert_eq!(success2(7)[..8], [1, 4, 0, 0, 7, 0, 0, 0]);
    }

    #[test]
    fn lengths_that_lie() {
        let r = Reply { t_id: 7, seqnum: 5, response: &[1; 32], challenge: Some(&[2; 32]), public: &[] };
        let good = r.build();
        for (at, value) in [(6, 48), (6, 0), (8, 2), (10, 1), (11, 1), (12, 0)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(
                Reply::parse(&bad, HashId::Sha256, DhGroup::Null, Concat::None),
                Err(Failure::Payload),
                "byte {at}"
            );
        }
        for n in 0..good.len() {
            assert!(
                Reply::parse(&good[..n], HashId::Sha256, DhGroup::Null, Concat::None).is_err(),
                "{n} bytes"
            );
        }
        // To generate a key, a challenge has to come, and need not be answered.
        let unanswered = Reply { seqnum: 0, ..r }.build();
        let parse =
            |m: &[u8], concat| Reply::parse(m, HashId::Sha256, DhGroup::Null, concat).map(|r| r.seqnum);
        assert_eq!(parse(&unanswered, Concat::None), Err(Failure::Payload));
        let none = Reply { challenge: None, ..r }.build();
        assert_eq!(parse(&none, Concat::None), Ok(5));
        for concat in [Concat::New, Concat::Replace] {
            assert_eq!((parse(&unanswered, concat), parse(&good, concat)), (Ok(0), Ok(5)));
            assert_eq!(parse(&none, concat), Err(Failure::Payload));
        }
        let good = negotiate(1, Concat::None, &[HashId::Sha256], &[DhGroup::Null]);
        for (at, value) in [(7, 0), (7, 2), (7, 255)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(FromHost::parse(&bad), Err(Failure::Payload));
        }
        for (at, value, why) in [
            (8, 2, Failure::Protocol),
            (10, 0, Failure::Payload),
            (10, 31, Failure::Payload),
            (11, 255, Failure::Payload),
        ] {
            let mut bad = good.clone();
            bad[at] = value;
            let Ok(FromHost::Negotiate(n)) = FromHost::parse(&bad) else { panic!("the head is right") };
            assert_eq!(n.offer().map(|_| ()), Err(why), "byte {at} = {value}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes(message in proptest::collection::vec(any::<u8>(), 0..300), kind in 0u8..6, common in any::<bool>()) {
            let mut message = message;
            if message.len() > 2 {
                message[0] = u8::from(!common);
                message[1] = [0, 1, 2, 3, 4, 0xf0][usize::from(kind)];
            }
            if let Ok(FromHost::Negotiate(n)) = FromHost::parse(&message)
                && let Ok((hashes, groups)) = n.offer()
            {
                prop_assert!(hashes.count() <= 30 && groups.count() <= 30);
            }
            let _ = FromController::parse(&message);
            for h in HashId::ALL {
                for g in DhGroup::ALL {
                    for c in Concat::ALL {
                        let _ = Reply::parse(&message, *h, *g, *c);
                    }
                }
            }
        }
    }
}
