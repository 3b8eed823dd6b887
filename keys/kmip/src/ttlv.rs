//! TTLV: tag, type, length, value (KMIP 1.4 specification, section 9.1). No I/O.
//!
//! ```text
//! 0  tag u24 | 3  type u8 | 4  length u32 (of the value, without padding) | 8  value, padded with zeros to 8 bytes
//! ```
//!
//! All numbers are big-endian. A structure's value is its items, one after the other.

use std::fmt;

use thiserror::Error;
use zeroize::Zeroizing;

/// Longest message that is read or written, in bytes: keys and attributes are small.
pub const MAX_MESSAGE_BYTES: usize = 256 * 1024;
/// Structures in structures; KMIP's own messages need 8.
pub const MAX_DEPTH: usize = 16;
/// Items of a message, all depths together.
pub const MAX_ITEMS: usize = 8192;
/// Bytes of tag, type and length.
pub const HEAD_BYTES: usize = 8;

/// Bytes that may be a key: zeroed when dropped, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes bytes over.
    pub fn new(bytes: Vec<u8>) -> Secret {
        Secret(Zeroizing::new(bytes))
    }

    /// The bytes. Do not copy them to where they are not wiped.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} bytes)", self.len())
    }
}

/// What an item is; 24 bits, `42....` for those of the standard.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tag(pub u32);

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06X}", self.0)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A value, by type (section 9.1.1.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Items.
    Structure(Vec<Item>),
    /// 32 bits.
    Integer(i32),
    /// 64 bits.
    LongInteger(i64),
    /// Two's complement; a multiple of 8 bytes, at least 8.
    BigInteger(Secret),
    /// One of a list.
    Enumeration(u32),
    /// True or false.
    Boolean(bool),
    /// UTF-8.
    Text(String),
    /// Bytes.
    Bytes(Secret),
    /// Seconds since 1970.
    DateTime(i64),
    /// Seconds.
    Interval(u32),
}

impl Value {
    fn type_code(&self) -> u8 {
        match self {
            Value::Structure(_) => 1,
            Value::Integer(_) => 2,
            Value::LongInteger(_) => 3,
            Value::BigInteger(_) => 4,
            Value::Enumeration(_) => 5,
            Value::Boolean(_) => 6,
            Value::Text(_) => 7,
            Value::Bytes(_) => 8,
            Value::DateTime(_) => 9,
            Value::Interval(_) => 10,
        }
    }

    /// Bytes of the value without padding.
    fn len(&self) -> usize {
        match self {
            Value::Structure(items) => items.iter().map(Item::len).sum(),
            Value::Integer(_) | Value::Enumeration(_) | Value::Interval(_) => 4,
            Value::LongInteger(_) | Value::Boolean(_) | Value::DateTime(_) => 8,
            Value::BigInteger(bytes) | Value::Bytes(bytes) => bytes.len(),
            Value::Text(text) => text.len(),
        }
    }
}

/// A tag and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What it is.
    pub tag: Tag,
    /// Its value.
    pub value: Value,
}

/// Bytes that are no TTLV. Offsets count from the message's first byte.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TtlvError {
    /// The bytes end inside an item, or an item leaves its structure.
    #[error("byte {at}: an item of {wanted} bytes, but {left} are left")]
    Short {
        /// Offset of the item.
        at: usize,
        /// Bytes that it needs.
        wanted: usize,
        /// Bytes that there are.
        left: usize,
    },
    /// Bytes behind the message.
    #[error("{extra} bytes behind the message")]
    Trailing {
        /// How many.
        extra: usize,
    },
    /// A type that the protocol does not have.
    #[error("byte {at}: unknown type {found}")]
    Type {
        /// Offset of the item.
        at: usize,
        /// The type.
        found: u8,
    },
    /// A length that the type can not have.
    #[error("byte {at}: type {kind} with {len} bytes")]
    Length {
        /// Offset of the item.
        at: usize,
        /// The type.
        kind: u8,
        /// The length.
        len: usize,
    },
    /// Padding that is not zero.
    #[error("byte {at}: padding is not zero")]
    Padding {
        /// Offset of the item.
        at: usize,
    },
    /// A boolean that is neither 0 nor 1, or text that is not UTF-8.
    #[error("byte {at}: {what}")]
    Content {
        /// Offset of the item.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// Larger, deeper or with more items than any message for us.
    #[error("more than {limit} {of}")]
    Limit {
        /// The limit.
        limit: usize,
        /// Of what.
        of: &'static str,
    },
}

impl Item {
    /// An item.
    pub fn new(tag: Tag, value: Value) -> Item {
        Item { tag, value }
    }

    /// A structure.
    pub fn structure(tag: Tag, items: Vec<Item>) -> Item {
        Item::new(tag, Value::Structure(items))
    }

    /// Text.
    pub fn text(tag: Tag, text: impl Into<String>) -> Item {
        Item::new(tag, Value::Text(text.into()))
    }

    /// A number.
    pub fn integer(tag: Tag, n: i32) -> Item {
        Item::new(tag, Value::Integer(n))
    }

    /// One of a list.
    pub fn enumeration(tag: Tag, n: u32) -> Item {
        Item::new(tag, Value::Enumeration(n))
    }

    /// Bytes with head and padding.
    fn len(&self) -> usize {
        HEAD_BYTES + self.value.len().next_multiple_of(8)
    }

    /// The message. Of one allocation, because a growing one would leave copies of keys behind.
    ///
    /// # Errors
    /// [`TtlvError::Limit`] when it would be larger than [`MAX_MESSAGE_BYTES`].
    pub fn encode(&self) -> Result<Zeroizing<Vec<u8>>, TtlvError> {
        let len = self.len();
        if len > MAX_MESSAGE_BYTES {
            return Err(TtlvError::Limit { limit: MAX_MESSAGE_BYTES, of: "bytes in a message" });
        }
        let mut out = Zeroizing::new(Vec::with_capacity(len));
        self.put(&mut out);
        debug_assert_eq!(out.len(), len);
        Ok(out)
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.tag.0.to_be_bytes()[1..]);
        out.push(self.value.type_code());
        out.extend_from_slice(&(self.value.len() as u32).to_be_bytes());
        match &self.value {
            Value::Structure(items) => items.iter().for_each(|i| i.put(out)),
            Value::Integer(n) => out.extend_from_slice(&n.to_be_bytes()),
            Value::Enumeration(n) | Value::Interval(n) => out.extend_from_slice(&n.to_be_bytes()),
            Value::LongInteger(n) | Value::DateTime(n) => out.extend_from_slice(&n.to_be_bytes()),
            Value::Boolean(b) => out.extend_from_slice(&u64::from(*b).to_be_bytes()),
            Value::BigInteger(b) | Value::Bytes(b) => out.extend_from_slice(b.expose()),
            Value::Text(t) => out.extend_from_slice(t.as_bytes()),
        }
        out.resize(out.len().next_multiple_of(8), 0);
    }

    /// Parses a whole message: one item, nothing behind it.
    ///
    /// # Errors
    /// See [`TtlvError`].
    pub fn decode(bytes: &[u8]) -> Result<Item, TtlvError> {
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(TtlvError::Limit { limit: MAX_MESSAGE_BYTES, of: "bytes in a message" });
        }
        let mut parser = Parser { bytes, at: 0, items: 0 };
        let item = parser.item(bytes.len(), 0)?;
        match bytes.len() - parser.at {
            0 => Ok(item),
            extra => Err(TtlvError::Trailing { extra }),
        }
    }
}

/// Length of the message that begins with this head, head included.
///
/// # Errors
/// [`TtlvError::Type`] when it is no structure, [`TtlvError::Limit`] when it is too long.
pub fn message_len(head: &[u8; HEAD_BYTES]) -> Result<usize, TtlvError> {
    let [_, _, _, kind, l0, l1, l2, l3] = *head;
    if kind != 1 {
        return Err(TtlvError::Type { at: 0, found: kind });
    }
    let len = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    if len > MAX_MESSAGE_BYTES - HEAD_BYTES {
        return Err(TtlvError::Limit { limit: MAX_MESSAGE_BYTES, of: "bytes in a message" });
    }
    Ok(HEAD_BYTES + len)
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
    items: usize,
}

impl<'a> Parser<'a> {
    /// One item that must end at or before `end`.
    fn item(&mut self, end: usize, depth: usize) -> Result<Item, TtlvError> {
        let at = self.at;
        let left = end - at;
        if left < HEAD_BYTES {
            return Err(TtlvError::Short { at, wanted: HEAD_BYTES, left });
        }
        self.items += 1;
        if self.items > MAX_ITEMS {
            return Err(TtlvError::Limit { limit: MAX_ITEMS, of: "items in a message" });
        }
        let head = &self.bytes[at..at + HEAD_BYTES];
        let tag = Tag(u32::from_be_bytes([0, head[0], head[1], head[2]]));
        let kind = head[3];
        // A message has at most 256 KiB, so nothing here overflows.
        let len = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let padded = len.checked_next_multiple_of(8).unwrap_or(usize::MAX);
        if padded > left - HEAD_BYTES {
            return Err(TtlvError::Short { at, wanted: padded.saturating_add(HEAD_BYTES), left });
        }
        self.at = at + HEAD_BYTES;
        let value = if kind == 1 {
            self.structure(at, len, depth)?
        } else {
            let value = &self.bytes[self.at..self.at + len];
            if self.bytes[self.at + len..self.at + padded].iter().any(|b| *b != 0) {
                return Err(TtlvError::Padding { at });
            }
            self.at += padded;
            scalar(at, kind, value)?
        };
        Ok(Item { tag, value })
    }

    fn structure(&mut self, at: usize, len: usize, depth: usize) -> Result<Value, TtlvError> {
        if !len.is_multiple_of(8) {
            return Err(TtlvError::Length { at, kind: 1, len });
        }
        if depth + 1 >= MAX_DEPTH {
            return Err(TtlvError::Limit { limit: MAX_DEPTH, of: "structures in each other" });
        }
        let end = self.at + len;
        let mut items = Vec::new();
        while self.at < end {
            items.push(self.item(end, depth + 1)?);
        }
        Ok(Value::Structure(items))
    }
}

fn scalar(at: usize, kind: u8, value: &[u8]) -> Result<Value, TtlvError> {
    let wrong = || TtlvError::Length { at, kind, len: value.len() };
    let four = || <[u8; 4]>::try_from(value).map_err(|_| wrong());
    let eight = || <[u8; 8]>::try_from(value).map_err(|_| wrong());
    Ok(match kind {
        2 => Value::Integer(i32::from_be_bytes(four()?)),
        3 => Value::LongInteger(i64::from_be_bytes(eight()?)),
        4 if value.is_empty() || !value.len().is_multiple_of(8) => return Err(wrong()),
        4 => Value::BigInteger(Secret::new(value.to_vec())),
        5 => Value::Enumeration(u32::from_be_bytes(four()?)),
        6 => match u64::from_be_bytes(eight()?) {
            n @ (0 | 1) => Value::Boolean(n == 1),
            _ => return Err(TtlvError::Content { at, what: "a boolean that is neither 0 nor 1" }),
        },
        7 => match std::str::from_utf8(value) {
            Ok(text) => Value::Text(text.to_owned()),
            Err(_) => return Err(TtlvError::Content { at, what: "text that is not UTF-8" }),
        },
        8 => Value::Bytes(Secret::new(value.to_vec())),
        9 => Value::DateTime(i64::from_be_bytes(eight()?)),
        10 => Value::Interval(u32::from_be_bytes(four()?)),
        found => return Err(TtlvError::Type { at, found }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The examples of the specification, section 9.1.2.
    #[test]
    fn examples_of_the_specification() {
        let tag = Tag(0x42_0020);
        for (value, hex) in [
            (Value::Integer(8), "42002002000000040000000800000000"),
            (Value::LongInteger(123_456_789_000_000_000), "420020030000000801B69B4BA5749200"),
            (
                Value::BigInteger(Secret::new(
                    1_234_567_890_000_000_000_000_000_000u128.to_be_bytes().to_vec(),
                )),
                "42002004000000100000000003FD35EB6BC2DF4618080000",
            ),
            (Value::Enumeration(255), "4200200500000004000000FF00000000"),
            (Value::Boolean(true), "42002006000000080000000000000001"),
            (Value::Text("Hello World".into()), "420020070000000B48656C6C6F20576F726C640000000000"),
            (Value::Bytes(Secret::new(vec![1, 2, 3])), "42002008000000030102030000000000"),
            (Value::DateTime(0x47DA_67F8), "42002009000000080000000047DA67F8"),
            (Value::Interval(864_000), "4200200A00000004000D2F0000000000"),
            (
                Value::Structure(vec![
                    Item::enumeration(Tag(0x42_0004), 254),
                    Item::integer(Tag(0x42_0005), 255),
                ]),
                "42002001000000204200040500000004000000FE000000004200050200000004000000FF00000000",
            ),
        ] {
            let item = Item::new(tag, value);
            let bytes = item.encode().unwrap();
            let shown: String = bytes.iter().map(|b| format!("{b:02X}")).collect();
            assert_eq!(shown, hex);
            assert_eq!(Item::decode(&bytes).unwrap(), item);
        }
    }

    #[test]
    fn bounds_hold() {
        let mut deep = Item::integer(Tag(1), 1);
        for _ in 0..MAX_DEPTH - 1 {
            deep = Item::structure(Tag(1), vec![deep]);
        }
        let fits = deep.encode().unwrap();
        assert!(Item::decode(&fits).is_ok());
        let deeper = Item::structure(Tag(1), vec![deep]).encode().unwrap();
        assert!(matches!(Item::decode(&deeper), Err(TtlvError::Limit { limit: MAX_DEPTH, .. })));
        let many = Item::structure(Tag(1), vec![Item::integer(Tag(2), 0); MAX_ITEMS]).encode().unwrap();
        assert!(matches!(Item::decode(&many), Err(TtlvError::Limit { limit: MAX_ITEMS, .. })));
        assert!(message_len(&[0x42, 0, 0x7B, 1, 0xFF, 0xFF, 0xFF, 0xFF]).is_err());
        assert_eq!(message_len(&[0x42, 0, 0x7B, 1, 0, 0, 1, 0]), Ok(264));
        assert!(Item::text(Tag(1), "x".repeat(MAX_MESSAGE_BYTES)).encode().is_err());
    }

    #[test]
    fn secrets_do_not_show() {
        let item = Item::new(Tag(0x42_0043), Value::Bytes(Secret::new(b"very secret bytes".to_vec())));
        let shown = format!("{item:?}");
        assert!(shown.contains("17 bytes") && !shown.contains("118"), "{shown}");
    }

    fn any_item() -> impl Strategy<Value = Item> {
        let scalar = prop_oneof![
            any::<i32>().prop_map(Value::Integer),
            any::<i64>().prop_map(Value::LongInteger),
            prop::collection::vec(any::<[u8; 8]>(), 1..4)
                .prop_map(|w| Value::BigInteger(Secret::new(w.concat()))),
            any::<u32>().prop_map(Value::Enumeration),
            any::<bool>().prop_map(Value::Boolean),
            ".{0,20}".prop_map(Value::Text),
            prop::collection::vec(any::<u8>(), 0..40).prop_map(|b| Value::Bytes(Secret::new(b))),
            any::<i64>().prop_map(Value::DateTime),
            any::<u32>().prop_map(Value::Interval),
        ];
        let leaf = (0u32..1 << 24, scalar).prop_map(|(t, v)| Item::new(Tag(t), v));
        leaf.prop_recursive(4, 40, 6, |inner| {
            (0u32..1 << 24, prop::collection::vec(inner, 0..6)).prop_map(|(t, i)| Item::structure(Tag(t), i))
        })
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes(item in any_item()) {
            let bytes = item.encode().unwrap();
            prop_assert_eq!(bytes.len() % 8, 0);
            prop_assert_eq!(Item::decode(&bytes).unwrap(), item);
        }

        #[test]
        fn any_bytes_are_refused_or_mean_themselves(mut bytes in prop::collection::vec(any::<u8>(), 0..120),
                                                    item in any_item(), flips in prop::collection::vec(any::<(u16, u8)>(), 0..4)) {
            if let Ok(item) = Item::decode(&bytes) {
                let again = item.encode().unwrap();
                prop_assert_eq!(&again[..], &bytes[..]);
            }
            bytes = item.encode().unwrap().to_vec();
            for (at, bits) in flips {
                let at = usize::from(at) % bytes.len();
                bytes[at] ^= bits;
            }
            if let Ok(item) = Item::decode(&bytes) {
                let again = item.encode().unwrap();
                prop_assert_eq!(&again[..], &bytes[..]);
            }
        }

        #[test]
        fn every_cut_is_refused(item in any_item(), cut in any::<u16>()) {
            let bytes = item.encode().unwrap();
            let cut = usize::from(cut) % bytes.len();
            prop_assert!(Item::decode(&bytes[..cut]).is_err());
        }
    }
}
