//! Finds where one JSON value ends and the next begins, in bytes that arrive in any pieces, and refuses what can not
//! become valid JSON at the first byte that shows it. Grammar: RFC 8259; only objects and arrays may stand at the top,
//! because that is all a JSON-RPC message can be. Constant memory besides the collected bytes.

use serde_json::Value;
use thiserror::Error;
use zeroize::Zeroize as _;

/// Deepest nesting of arrays and objects in a message.
pub const MAX_DEPTH: u32 = 32;

/// Why a stream of messages can not go on.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// Not JSON.
    #[error("malformed JSON at byte {at_byte} of the message: {what}")]
    Malformed {
        /// Offset in the message.
        at_byte: usize,
        /// What is wrong there.
        what: String,
    },
    /// The message does not end within the limit.
    #[error("message is larger than {limit_bytes} bytes; send fewer requests in a batch")]
    TooLarge {
        /// The limit.
        limit_bytes: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between messages.
    Top,
    Value,
    /// After `[`.
    ValueOrEnd,
    /// After `{`.
    KeyOrEnd,
    /// After `,` in an object.
    Key,
    Colon,
    CommaOrEnd,
    Str {
        key: bool,
    },
    Escape {
        key: bool,
    },
    Hex {
        key: bool,
        left: u8,
    },
    Minus,
    Zero,
    Int,
    Dot,
    Frac,
    E,
    ExpSign,
    Exp,
    Literal {
        rest: &'static [u8],
    },
}

/// A pushdown automaton over bytes. The stack is a bit per level: 1 = object.
#[derive(Debug)]
struct Scan {
    state: State,
    stack: u64,
    depth: u32,
}

enum Step {
    More,
    /// The byte was the last one of a message.
    Done,
    /// The byte is not part of a message (white space between messages).
    Skip,
}

const fn space(b: u8) -> bool {
    matches!(b, b' ' | b'\t' | b'\r' | b'\n')
}

impl Scan {
    const fn new() -> Scan {
        Scan { state: State::Top, stack: 0, depth: 0 }
    }

    fn open(&mut self, object: bool) -> Result<(), &'static str> {
        if self.depth == MAX_DEPTH {
            return Err("nested too deeply");
        }
        self.stack = self.stack << 1 | u64::from(object);
        self.depth += 1;
        self.state = if object { State::KeyOrEnd } else { State::ValueOrEnd };
        Ok(())
    }

    fn close(&mut self, object: bool) -> Result<Step, &'static str> {
        if self.depth == 0 || (self.stack & 1 == 1) != object {
            return Err("bracket does not match");
        }
        self.stack >>= 1;
        self.depth -= 1;
        if self.depth == 0 {
            self.state = State::Top;
            return Ok(Step::Done);
        }
        self.state = State::CommaOrEnd;
        Ok(Step::More)
    }

    fn value(&mut self, b: u8) -> Result<(), &'static str> {
        self.state = match b {
            b'{' => return self.open(true),
            b'[' => return self.open(false),
            b'"' => State::Str { key: false },
            b'-' => State::Minus,
            b'0' => State::Zero,
            b'1'..=b'9' => State::Int,
            b't' => State::Literal { rest: b"rue" },
            b'f' => State::Literal { rest: b"alse" },
            b'n' => State::Literal { rest: b"ull" },
            _ => return Err("a value must stand here"),
        };
        Ok(())
    }

    fn step(&mut self, b: u8) -> Result<Step, &'static str> {
        use State::*;
        match self.state {
            Top if space(b) => return Ok(Step::Skip),
            Top if b == b'{' || b == b'[' => self.open(b == b'{')?,
            Top => return Err("a message must be an object or an array"),
            Value | ValueOrEnd | KeyOrEnd | Key | Colon | CommaOrEnd if space(b) => {}
            ValueOrEnd if b == b']' => return self.close(false),
            Value | ValueOrEnd => self.value(b)?,
            KeyOrEnd if b == b'}' => return self.close(true),
            KeyOrEnd | Key if b == b'"' => self.state = Str { key: true },
            KeyOrEnd | Key => return Err("a member's name must stand here"),
            Colon if b == b':' => self.state = Value,
            Colon => return Err("\":\" must stand here"),
            CommaOrEnd => return self.after_value(b),
            Str { key } => match b {
                b'"' => self.state = if key { Colon } else { CommaOrEnd },
                b'\\' => self.state = Escape { key },
                0..0x20 => return Err("control character in a string"),
                _ => {}
            },
            Escape { key } => match b {
                b'u' => self.state = Hex { key, left: 4 },
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => self.state = Str { key },
                _ => return Err("unknown escape in a string"),
            },
            Hex { key, left } if b.is_ascii_hexdigit() => {
                self.state = if left == 1 { Str { key } } else { Hex { key, left: left - 1 } };
            }
            Hex { .. } => return Err("\\u needs four hexadecimal digits"),
            Literal { rest } => match rest.split_first() {
                Some((first, rest)) if *first == b => {
                    self.state = if rest.is_empty() { CommaOrEnd } else { Literal { rest } };
                }
                _ => return Err("unknown word"),
            },
            Minus | Zero | Int | Dot | Frac | E | ExpSign | Exp => return self.number(b),
        }
        Ok(Step::More)
    }

    fn number(&mut self, b: u8) -> Result<Step, &'static str> {
        use State::*;
        let digit = b.is_ascii_digit();
        self.state = match self.state {
            Minus if b == b'0' => Zero,
            Minus if digit => Int,
            Int if digit => Int,
            Zero | Int if b == b'.' => Dot,
            Zero | Int | Frac if b == b'e' || b == b'E' => E,
            Dot | Frac if digit => Frac,
            E if b == b'+' || b == b'-' => ExpSign,
            E | ExpSign | Exp if digit => Exp,
            Zero | Int | Frac | Exp => return self.after_value(b),
            _ => return Err("a digit must stand here"),
        };
        Ok(Step::More)
    }

    fn after_value(&mut self, b: u8) -> Result<Step, &'static str> {
        let object = self.stack & 1 == 1;
        match b {
            b',' => self.state = if object { State::Key } else { State::Value },
            b'}' => return self.close(true),
            b']' => return self.close(false),
            _ if space(b) => self.state = State::CommaOrEnd,
            _ => return Err("\",\" or the closing bracket must stand here"),
        }
        Ok(Step::More)
    }
}

/// Cuts a byte stream into JSON values.
#[derive(Debug)]
pub struct Framer {
    scan: Scan,
    /// Bytes not yet handed out; a message under way starts at `start`.
    buf: Vec<u8>,
    start: usize,
    at: usize,
    limit_bytes: usize,
    dead: Option<FrameError>,
}

impl Framer {
    /// For messages of at most `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Framer {
        Framer { scan: Scan::new(), buf: Vec::new(), start: 0, at: 0, limit_bytes, dead: None }
    }

    /// Takes what arrived. Call [`Framer::next_message`] until it returns `None` before pushing more, so that never
    /// much more than one message is held.
    pub fn push(&mut self, bytes: &[u8]) {
        self.forget_read();
        let len = self.buf.len() + bytes.len();
        if len > self.buf.capacity() {
            // Growing by itself would leave a copy behind.
            let mut larger = Vec::with_capacity(2 * len);
            larger.extend_from_slice(&self.buf);
            self.buf.zeroize();
            self.buf = larger;
        }
        self.buf.extend_from_slice(bytes);
    }

    /// Wipes what has been handed out: passwords and keys are among it.
    fn forget_read(&mut self) {
        if self.start == 0 {
            return;
        }
        self.buf.copy_within(self.start.., 0);
        let left = self.buf.len() - self.start;
        self.buf[left..].zeroize();
        self.buf.truncate(left);
        self.at -= self.start;
        self.start = 0;
    }

    /// Whether a message has begun and not ended.
    pub fn is_partial(&self) -> bool {
        self.scan.depth > 0
    }

    /// The next whole value, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// Malformed or oversized; the stream has no way to go on then, and every later call repeats the error.
    pub fn next_message(&mut self) -> Result<Option<Value>, FrameError> {
        if let Some(e) = &self.dead {
            return Err(e.clone());
        }
        let r = self.advance();
        if let Err(e) = &r {
            self.dead = Some(e.clone());
            self.buf.zeroize();
            (self.start, self.at) = (0, 0);
        }
        r
    }

    fn advance(&mut self) -> Result<Option<Value>, FrameError> {
        while let Some(b) = self.buf.get(self.at) {
            let step = self.scan.step(*b).map_err(|what| FrameError::Malformed {
                at_byte: self.at - self.start,
                what: what.to_string(),
            })?;
            self.at += 1;
            if self.at - self.start > self.limit_bytes {
                return Err(FrameError::TooLarge { limit_bytes: self.limit_bytes });
            }
            match step {
                Step::More => {}
                Step::Skip => self.start = self.at,
                Step::Done => {
                    let text = &self.buf[self.start..self.at];
                    // The automaton leaves UTF-8, lone surrogates and the range of numbers to the parser.
                    let value = serde_json::from_slice(text)
                        .map_err(|e| FrameError::Malformed { at_byte: text.len(), what: e.to_string() })?;
                    self.start = self.at;
                    return Ok(Some(value));
                }
            }
        }
        self.forget_read();
        Ok(None)
    }
}

impl Drop for Framer {
    fn drop(&mut self) {
        self.buf.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn all(bytes: &[u8], piece: usize) -> (Vec<Value>, Option<FrameError>) {
        let mut f = Framer::new(1 << 16);
        let mut out = Vec::new();
        for p in bytes.chunks(piece.max(1)) {
            f.push(p);
            loop {
                match f.next_message() {
                    Ok(Some(v)) => out.push(v),
                    Ok(None) => break,
                    Err(e) => return (out, Some(e)),
                }
            }
        }
        (out, None)
    }

    #[test]
    fn messages_without_separators_split_anywhere() {
        let text = r#" {"a":[1,-2.5e+3,true,null,"\u00e9\"}]"]}[{},[]]
            {"id":0,"x":{"y":"{["}}"#;
        let want = vec![
            json!({"a":[1,-2500.0,true,null,"\u{e9}\"}]"]}),
            json!([{}, []]),
            json!({"id":0,"x":{"y":"{["}}),
        ];
        for piece in 1..=text.len() {
            assert_eq!(all(text.as_bytes(), piece), (want.clone(), None), "pieces of {piece}");
        }
    }

    #[test]
    fn malformed_is_seen_at_its_first_byte() {
        for (text, at) in [
            ("x", 0),
            ("5", 0),
            ("}", 0),
            ("{]", 1),
            ("{\"a\" 1", 5),
            ("[1,]", 3),
            ("{\"a\":1,}", 7),
            ("[01", 2),
            ("[tru}", 4),
            ("[\"\\x", 3),
            ("[\"\n", 2),
            ("[1 2", 3),
            ("// c", 0),
        ] {
            match all(text.as_bytes(), 1).1 {
                Some(FrameError::Malformed { at_byte, .. }) => assert_eq!(at_byte, at, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let mut f = Framer::new(16);
        f.push(br#"["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"#);
        assert_eq!(f.next_message(), Err(FrameError::TooLarge { limit_bytes: 16 }));
        assert_eq!(f.next_message(), Err(FrameError::TooLarge { limit_bytes: 16 }), "the error stays");
        let deep = "[".repeat(MAX_DEPTH as usize + 1);
        assert!(matches!(all(deep.as_bytes(), 7).1, Some(FrameError::Malformed { .. })));
        let fits = "[".repeat(MAX_DEPTH as usize) + &"]".repeat(MAX_DEPTH as usize);
        assert_eq!(all(fits.as_bytes(), 7).0.len(), 1);
    }

    fn arb_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f32>().prop_map(|f| json!(f)),
            ".{0,8}".prop_map(Value::from),
        ];
        let tree = leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(".{0,6}", inner, 0..6)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        });
        tree.prop_map(|v| if v.is_array() || v.is_object() { v } else { json!([v]) })
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(values in prop::collection::vec(arb_json(), 1..4), piece in 1usize..40) {
            let text: String = values.iter().map(|v| v.to_string()).collect();
            let (got, error) = all(text.as_bytes(), piece);
            prop_assert_eq!(error, None);
            let again: Vec<Value> = values.iter().map(|v| serde_json::from_str(&v.to_string()).unwrap()).collect();
            prop_assert_eq!(got, again);
        }

        #[test]
        fn agrees_with_the_parser(text in r#"[\[\]{}:,"\\ 0-9eE+.truefalsn-]{0,24}"#) {
            let (got, error) = all(text.as_bytes(), 3);
            // The oracle: serde_json's own stream, for as long as it yields objects and arrays.
            let mut want = Vec::new();
            for v in serde_json::Deserializer::from_str(&text).into_iter::<Value>() {
                match v {
                    Ok(v) if v.is_array() || v.is_object() => want.push(v),
                    _ => break,
                }
            }
            prop_assert_eq!(&got, &want, "{:?}", error);
        }
    }
}
