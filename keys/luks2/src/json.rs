//! The JSON area (specification, section 3): requirements, the segment, its digest, tokens.
//!
//! Numbers of 64 bits are decimal strings there, because JSON has none.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use crate::proof::{Hash, KeyDigest};
use crate::{Refusal, Segment, shown};

/// Type of the token that names objects of a key server.
const KMIP_TOKEN: &str = "cryptfold-kmip";
/// LUKS2 has 32 of each (section 3.4 and 3.7).
const MAX_TOKENS: usize = 32;
/// Longest identifier of a key server's object, in bytes.
const MAX_OBJECT_BYTES: usize = 160;

/// A token: the host's note on where a key is.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its number.
    pub id: u32,
    /// What kind it is.
    pub kind: String,
    /// All of it.
    pub content: Value,
}

/// A token of type `cryptfold-kmip`: `{"type": "cryptfold-kmip", "keyslots": [], "objects": ["ID"]}`, or with two
/// identifiers for keys that a server holds in halves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmipToken {
    /// Identifiers at the key server: one, or two halves.
    pub objects: Vec<String>,
}

/// The parsed text.
#[derive(Clone, Debug, PartialEq)]
pub struct Json(Map<String, Value>);

fn wrong(what: &str) -> Refusal {
    Refusal::Json(what.into())
}

fn object<'a>(parent: &'a Map<String, Value>, name: &str) -> Result<&'a Map<String, Value>, Refusal> {
    parent
        .get(name)
        .and_then(Value::as_object)
        .ok_or_else(|| wrong(&format!("\"{name}\" is missing or no object")))
}

fn text<'a>(parent: &'a Map<String, Value>, name: &str) -> Result<&'a str, Refusal> {
    parent
        .get(name)
        .and_then(Value::as_str)
        .ok_or_else(|| wrong(&format!("\"{name}\" is missing or no string")))
}

/// A number of 64 bits in a string: digits only.
fn decimal(text: &str, name: &str) -> Result<u64, Refusal> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits
        .then(|| text.parse().ok())
        .flatten()
        .ok_or_else(|| wrong(&format!("\"{name}\" is no decimal number")))
}

fn number(parent: &Map<String, Value>, name: &str) -> Result<u64, Refusal> {
    let n = parent.get(name).and_then(Value::as_u64);
    n.ok_or_else(|| wrong(&format!("\"{name}\" is missing or no number")))
}

fn base64(parent: &Map<String, Value>, name: &str) -> Result<Vec<u8>, Refusal> {
    STANDARD.decode(text(parent, name)?).map_err(|_| wrong(&format!("\"{name}\" is no base64")))
}

fn strings(value: Option<&Value>) -> Option<Vec<&str>> {
    value?.as_array()?.iter().map(Value::as_str).collect()
}

impl Json {
    /// From the text of the area.
    pub fn parse(text: &[u8]) -> Result<Json, String> {
        match serde_json::from_slice(text) {
            Ok(Value::Object(all)) => Ok(Json(all)),
            Ok(_) => Err("the JSON is no object".into()),
            Err(e) => Err(format!("the JSON area: {e}")),
        }
    }

    /// Section 3.8: who does not know a mandatory requirement must not use the device.
    pub fn requirements(&self) -> Result<(), Refusal> {
        let config = object(&self.0, "config")?;
        let Some(requirements) = config.get("requirements") else { return Ok(()) };
        let all = requirements.as_object().ok_or_else(|| wrong("\"requirements\" is no object"))?;
        if let Some(name) = all.keys().find(|k| *k != "mandatory") {
            return Err(Refusal::Requirement(shown(name)));
        }
        let Some(mandatory) = all.get("mandatory") else { return Ok(()) };
        let names = strings(Some(mandatory)).ok_or_else(|| wrong("\"mandatory\" is no list of strings"))?;
        match names.first() {
            None => Ok(()),
            Some(name) if name.starts_with("online-reencrypt") || name.starts_with("offline-reencrypt") => {
                Err(Refusal::Reencryption)
            }
            Some(&"opal") => Err(Refusal::Opal),
            Some(&"inline-hw-tags") => Err(Refusal::Integrity),
            Some(name) => Err(Refusal::Requirement(shown(name))),
        }
    }

    /// Section 3.3: the one segment, if it is one of dm-crypt's with a cipher that we have.
    pub fn segment(&self) -> Result<Segment, Refusal> {
        let segments = object(&self.0, "segments")?;
        // Also known by this when a requirement is missing: only re-encryption marks its segments.
        let marked = |s: &Value| s.get("flags").and_then(Value::as_array).is_some_and(|f| !f.is_empty());
        if segments.values().any(marked) {
            return Err(Refusal::Reencryption);
        }
        if segments.len() != 1 {
            return Err(Refusal::Segments(segments.len()));
        }
        let segment = object(segments, "0")?;
        match text(segment, "type")? {
            "crypt" => {}
            "hw-opal" | "hw-opal-crypt" => return Err(Refusal::Opal),
            other => return Err(Refusal::SegmentType(shown(other))),
        }
        if segment.contains_key("integrity") {
            return Err(Refusal::Integrity);
        }
        let cipher = text(segment, "encryption")?;
        if cipher != "aes-xts-plain64" {
            return Err(Refusal::Cipher(shown(cipher)));
        }
        let sector_bytes = match number(segment, "sector_size")? {
            512 => 512,
            4096 => 4096,
            other => return Err(Refusal::SectorSize(other)),
        };
        let size_bytes = match text(segment, "size")? {
            "dynamic" => None,
            size => Some(decimal(size, "size")?),
        };
        Ok(Segment {
            offset_bytes: decimal(text(segment, "offset")?, "offset")?,
            size_bytes,
            iv_tweak: decimal(text(segment, "iv_tweak")?, "iv_tweak")?,
            sector_bytes,
        })
    }

    /// Section 3.6: the digest of segment 0's key, and that key's length if a keyslot of it tells.
    pub fn digest(&self) -> Result<(KeyDigest, Option<u32>), Refusal> {
        let refuse = |what: &str| Refusal::Digest(what.into());
        let digests = object(&self.0, "digests")?;
        let of_segment = digests
            .values()
            .filter_map(Value::as_object)
            .filter(|d| strings(d.get("segments")).is_some_and(|s| s.contains(&"0")));
        let found: Vec<_> = of_segment.collect();
        let [digest] = found[..] else {
            return Err(Refusal::Digest(format!("{} for the segment; one is needed", found.len())));
        };
        let kind = text(digest, "type")?;
        if kind != "pbkdf2" {
            return Err(Refusal::Digest(format!("type \"{}\"; \"pbkdf2\" is needed", shown(kind))));
        }
        let name = text(digest, "hash")?;
        let hash = Hash::from_name(name)
            .ok_or_else(|| Refusal::Digest(format!("hash \"{}\" is not known", shown(name))))?;
        let iterations = u32::try_from(number(digest, "iterations")?).ok().filter(|n| *n > 0);
        let iterations = iterations.ok_or_else(|| refuse("impossible iterations"))?;
        let (salt, value) = (base64(digest, "salt")?, base64(digest, "digest")?);
        if salt.is_empty() || salt.len() > 64 {
            return Err(refuse("a salt of 1 to 64 bytes is needed"));
        }
        if value.len() != hash.bytes() {
            return Err(refuse("its length is not the hash's"));
        }
        let slots =
            strings(digest.get("keyslots")).ok_or_else(|| refuse("\"keyslots\" is no list of strings"))?;
        Ok((KeyDigest { hash, iterations, salt, value }, self.key_bytes(&slots)?))
    }

    fn key_bytes(&self, slots: &[&str]) -> Result<Option<u32>, Refusal> {
        let all = object(&self.0, "keyslots")?;
        let mut bytes = None;
        for slot in slots {
            // A list may name slots that were wiped.
            let Some(slot) = all.get(*slot).and_then(Value::as_object) else { continue };
            let n = number(slot, "key_size")?;
            let valid = u32::try_from(n).ok().filter(|n| matches!(n, 32 | 64)).ok_or(Refusal::KeyBytes(n))?;
            if bytes.is_some_and(|b| b != valid) {
                return Err(wrong("keyslots with keys of different lengths"));
            }
            bytes = Some(valid);
        }
        Ok(bytes)
    }

    /// Section 3.7.
    pub fn tokens(&self) -> Vec<Token> {
        let all = self.0.get("tokens").and_then(Value::as_object).into_iter().flatten();
        let token = |(id, content): (&String, &Value)| {
            let kind = content.get("type")?.as_str()?.to_owned();
            Some(Token { id: id.parse().ok()?, kind, content: content.clone() })
        };
        let mut tokens: Vec<Token> = all.take(MAX_TOKENS).filter_map(token).collect();
        tokens.sort_by_key(|t| t.id);
        tokens
    }

    /// The token that names a key server's objects.
    pub fn kmip_token(&self) -> Result<Option<KmipToken>, Refusal> {
        let tokens = self.tokens();
        let ours: Vec<&Token> = tokens.iter().filter(|t| t.kind == KMIP_TOKEN).collect();
        let token = match ours[..] {
            [] => return Ok(None),
            [token] => token,
            _ => return Err(wrong("several tokens of type \"cryptfold-kmip\"")),
        };
        let objects = strings(token.content.get("objects")).filter(|o| matches!(o.len(), 1 | 2));
        let good = |o: &&str| !o.is_empty() && o.len() <= MAX_OBJECT_BYTES && !o.contains(char::is_control);
        match objects.filter(|o| o.iter().all(good)) {
            Some(objects) => {
                Ok(Some(KmipToken { objects: objects.into_iter().map(str::to_owned).collect() }))
            }
            None => Err(wrong("token \"cryptfold-kmip\": \"objects\" must be one or two identifiers")),
        }
    }
}
