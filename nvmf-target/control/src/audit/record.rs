//! One record of the audit log, without I/O.
//!
//! ```text
//! {"seq":7,"time":"2026-11-23T01:02:03.456789Z","level":"warn","event":"access refused",...,"prev":HASH,"hash":HASH}
//! ```
//!
//! `hash` is SHA-256 (64 hexadecimal digits) over the line's own bytes in front of `,"hash"`, so nothing has to be put into a
//! canonical form to check it. `prev` is the `hash` of the record before, zeros in the first; `seq` counts from 1.

use aws_lc_rs::digest::{SHA256, digest};
use serde_json::{Map, Value, json};
use thiserror::Error;

/// Longest line, with its end.
pub const MAX_RECORD_BYTES: usize = 64 << 10;
/// `,"hash":"` + 64 digits + `"}`.
const TAIL_BYTES: usize = 9 + 64 + 2;
/// Members that are the chain's; an event's own ones with such a name get an underscore.
const RESERVED: [&str; 5] = ["seq", "time", "level", "prev", "hash"];

/// A record's hash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hash(pub [u8; 32]);

impl std::fmt::Display for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl std::str::FromStr for Hash {
    type Err = String;
    fn from_str(s: &str) -> Result<Hash, String> {
        let lower = s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let bytes = crate::params::unhex(s).filter(|_| lower);
        let bytes = bytes.and_then(|b| <[u8; 32]>::try_from(b.as_slice()).ok());
        bytes
            .map(Hash)
            .ok_or_else(|| format!("\"{s}\" is no hash: 64 hexadecimal digits in small letters are"))
    }
}

/// The last record of a chain: what the next one continues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// Its number; 0 while there is none.
    pub seq: u64,
    /// Its hash; zeros while there is none.
    pub hash: Hash,
}

/// A record whose own hash is right.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Number, from 1 on.
    pub seq: u64,
    /// Hash of the record before.
    pub prev: Hash,
    /// Its own.
    pub hash: Hash,
    /// When, UTC.
    pub time: String,
    /// What happened.
    pub event: String,
    /// All members, in their order.
    pub members: Map<String, Value>,
}

impl Record {
    /// What the next record continues.
    pub fn head(&self) -> Head {
        Head { seq: self.seq, hash: self.hash }
    }
}

/// Why a line is no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    /// Of another form.
    #[error("no record of an audit log")]
    Form,
    /// Its hash is another.
    #[error("the record has been changed: its hash does not fit")]
    Changed,
}

/// The line (with its end) that continues `head`, and the head that it is. `members` without a member "event" get an empty one;
/// what is too long for a line is cut, and says so.
pub fn encode(head: Head, time: &str, mut members: Map<String, Value>) -> (Vec<u8>, Head) {
    let event = members.shift_remove("event").unwrap_or_default();
    let body = |members: &Map<String, Value>| {
        let mut all = Map::new();
        let seq = head.seq + 1;
        all.insert("seq".into(), seq.into());
        all.insert("time".into(), time.into());
        all.insert("level".into(), members.get("level").cloned().unwrap_or_else(|| "info".into()));
        all.insert("event".into(), event.as_str().unwrap_or_default().into());
        for (name, value) in members.iter().filter(|(name, _)| *name != "level") {
            let taken = RESERVED.contains(&name.as_str());
            all.insert(if taken { format!("{name}_") } else { name.clone() }, value.clone());
        }
        all.insert("prev".into(), head.hash.to_string().into());
        let mut text = Value::Object(all).to_string();
        text.pop();
        text
    };
    let mut text = body(&members);
    if text.len() + TAIL_BYTES >= MAX_RECORD_BYTES {
        let kept: String = Value::Object(members).to_string().chars().take(MAX_RECORD_BYTES / 32).collect();
        members = Map::new();
        members.insert("cut".into(), json!(kept));
        text = body(&members);
    }
    let hash = hash_of(text.as_bytes());
    (format!("{text},\"hash\":\"{hash}\"}}\n").into_bytes(), Head { seq: head.seq + 1, hash })
}

fn hash_of(bytes: &[u8]) -> Hash {
    let mut hash = Hash::default();
    hash.0.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

/// Reads a line (without its end) whose own hash is right. What is in front of it is not looked at.
///
/// # Errors
/// No record, or a changed one.
pub fn parse(line: &[u8]) -> Result<Record, RecordError> {
    if line.len() >= MAX_RECORD_BYTES || line.len() < TAIL_BYTES {
        return Err(RecordError::Form);
    }
    let text = std::str::from_utf8(line).map_err(|_| RecordError::Form)?;
    let (body, tail) = line.split_at(line.len() - TAIL_BYTES);
    let members: Map<String, Value> = serde_json::from_str(text).map_err(|_| RecordError::Form)?;
    let word = |name: &str| members.get(name).and_then(Value::as_str).ok_or(RecordError::Form);
    let hash = |name: &str| word(name)?.parse::<Hash>().map_err(|_| RecordError::Form);
    let record = Record {
        seq: members.get("seq").and_then(Value::as_u64).filter(|n| *n > 0).ok_or(RecordError::Form)?,
        prev: hash("prev")?,
        hash: hash("hash")?,
        time: word("time")?.into(),
        event: word("event")?.into(),
        members: members.clone(),
    };
    // The hash stands in its place, in its form.
    if tail != format!(",\"hash\":\"{}\"}}", record.hash).as_bytes() {
        return Err(RecordError::Form);
    }
    if hash_of(body) == record.hash { Ok(record) } else { Err(RecordError::Changed) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn members(v: Value) -> Map<String, Value> {
        v.as_object().unwrap().clone()
    }

    #[test]
    fn a_line_is_what_the_documentation_says() {
        let (line, head) = encode(
            Head::default(),
            "2026-11-23T01:02:03.000000Z",
            members(
                json!({"event": "access refused", "peer": "192.0.2.1:5", "level": "warn", "prev": "mine"}),
            ),
        );
        let text = String::from_utf8(line).unwrap();
        let zeros = "0".repeat(64);
        // printf '%s' BODY | sha256sum
        let body = format!(
            r#"{{"seq":1,"time":"2026-11-23T01:02:03.000000Z","level":"warn","event":"access refused","peer":"192.0.2.1:5","prev_":"mine","prev":"{zeros}""#
        );
        assert_eq!(text, format!("{body},\"hash\":\"{}\"}}\n", hash_of(body.as_bytes())));
        let record = parse(text.trim_end().as_bytes()).unwrap();
        assert_eq!((record.head(), record.seq, record.event.as_str()), (head, 1, "access refused"));
        assert_eq!(record.members["prev_"], "mine");
    }

    #[test]
    fn what_is_too_long_is_cut_and_can_be_read() {
        let long = "\u{7f}\"ä".repeat(MAX_RECORD_BYTES);
        let (line, head) = encode(Head::default(), "t", members(json!({"event": "e", "what": long})));
        assert!(line.len() <= MAX_RECORD_BYTES, "{}", line.len());
        let record = parse(line.trim_ascii_end()).unwrap();
        assert_eq!(record.head(), head);
        assert!(record.members["cut"].as_str().unwrap().starts_with("{\"what\":"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(parse(&bytes).is_err(), "nobody guesses a hash");
        }

        #[test]
        fn what_is_written_is_read(event in ".*", name in ".*", value in ".*", seq in 0..u64::MAX - 1, hash in any::<[u8; 32]>()) {
            let head = Head { seq, hash: Hash(hash) };
            let mut given = Map::new();
            given.insert(name.clone(), value.clone().into());
            given.insert("event".into(), event.clone().into());
            let (line, next) = encode(head, "t", given);
            let record = parse(line.strip_suffix(b"\n").unwrap()).unwrap();
            prop_assert_eq!((record.prev, record.head(), record.event), (head.hash, next, event));
        }

        #[test]
        fn one_changed_bit_is_seen(value in ".{0,40}", at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let mut given = Map::new();
            given.insert("what".into(), value.into());
            let (mut line, _) = encode(Head::default(), "t", given);
            line.pop();
            let at = at.index(line.len());
            line[at] ^= 1 << bit;
            prop_assert!(parse(&line).is_err());
        }
    }
}
