//! What a volume's stored payload is: the record that the pool keeps with the volume.

use cryptfold_luks2::Payload;

/// First byte. From 2 on it says which objects of the key server are the key; 3 says that the payload may have blocks as they were
/// sent, which older programs would take for blocks under the key. Without such blocks it is 2, for these programs.
const VERSION_MIXED: u8 = 3;
const VERSION_UNIFORM: u8 = 2;
const VERSION_WITHOUT_OBJECTS: u8 = 1;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub offset_bytes: u64,
    pub identity: [u8; 32],
    /// Identifiers of the key at its server: the whole or two halves, of at most 255 bytes. Empty: not known.
    pub objects: Vec<String>,
    /// The payload may have blocks as they were sent, and the pool's map says which; otherwise all of it is under the key.
    pub mixed: bool,
    /// What was stored before the key was there has not all been looked at. Only if it is mixed.
    pub converting: bool,
}

impl Stored {
    pub fn of(payload: &Payload, objects: Vec<String>) -> Stored {
        Stored {
            offset_bytes: payload.segment.offset_bytes,
            identity: payload.identity(),
            objects,
            mixed: false,
            converting: false,
        }
    }

    /// Whether this is what was stored.
    pub fn is(&self, payload: &Payload) -> bool {
        self.offset_bytes == payload.segment.offset_bytes && self.identity == payload.identity()
    }

    /// Version, offset (little-endian), identity; if it is mixed, whether it is converting (0 or 1); then number of objects, and of
    /// each its length and its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut record = vec![if self.mixed { VERSION_MIXED } else { VERSION_UNIFORM }];
        record.extend_from_slice(&self.offset_bytes.to_le_bytes());
        record.extend_from_slice(&self.identity);
        if self.mixed {
            record.push(self.converting.into());
        }
        record.push(self.objects.len() as u8);
        for object in &self.objects {
            record.push(object.len() as u8);
            record.extend_from_slice(object.as_bytes());
        }
        record
    }

    pub fn decode(record: &[u8]) -> Option<Stored> {
        let (version, rest) = record.split_first()?;
        let (offset, rest) = rest.split_first_chunk::<8>()?;
        let (identity, rest) = rest.split_first_chunk::<32>()?;
        let mixed = *version == VERSION_MIXED;
        let (converting, objects) = match *version {
            VERSION_MIXED => match rest.split_first()? {
                (flag @ (0 | 1), rest) => (*flag == 1, objects(rest)?),
                _ => return None,
            },
            VERSION_UNIFORM => (false, objects(rest)?),
            VERSION_WITHOUT_OBJECTS if rest.is_empty() => (false, Vec::new()),
            _ => return None,
        };
        let offset_bytes = u64::from_le_bytes(*offset);
        Some(Stored { offset_bytes, identity: *identity, objects, mixed, converting })
    }
}

/// Whether a record says, or may say, that the payload has blocks of both kinds.
pub(crate) fn may_be_mixed(record: &[u8]) -> bool {
    Stored::decode(record).is_none_or(|stored| stored.mixed)
}

fn objects(rest: &[u8]) -> Option<Vec<String>> {
    let (count, mut rest) = rest.split_first()?;
    let mut objects = Vec::new();
    for _ in 0..*count {
        let (len, behind) = rest.split_first()?;
        let (object, behind) = behind.split_at_checked(usize::from(*len))?;
        objects.push(String::from_utf8(object.to_vec()).ok()?);
        rest = behind;
    }
    rest.is_empty().then_some(objects)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back() {
        for objects in [vec![], vec!["1".to_owned()], vec!["x".repeat(160), "y".repeat(160)]] {
            for (mixed, converting) in [(false, false), (true, false), (true, true)] {
                let objects = objects.clone();
                let stored = Stored { offset_bytes: 16 << 20, identity: [7; 32], objects, mixed, converting };
                let mut record = stored.encode();
                assert_eq!(Stored::decode(&record), Some(stored));
                for len in 0..record.len() {
                    assert_eq!(Stored::decode(&record[..len]), None, "cut at {len}");
                }
                assert_eq!(Stored::decode(&[&record[..], &[0]].concat()), None);
                if mixed {
                    record[41] = 2;
                    assert_eq!(Stored::decode(&record), None);
                }
            }
        }
    }

    /// As they were before objects were in them, and before volumes were converted; the latter stay what they are.
    #[test]
    fn old_records_are_read() {
        let mut record = vec![1, 0, 0, 0, 1, 0, 0, 0, 0];
        record.extend([9; 32]);
        let (offset_bytes, identity) = (16 << 20, [9; 32]);
        let mut stored = Stored { offset_bytes, identity, objects: vec![], mixed: false, converting: false };
        assert_eq!(Stored::decode(&record), Some(stored.clone()));
        record[0] = 2;
        record.extend([1, 2, b'4', b'7']);
        stored.objects = vec!["47".into()];
        assert_eq!(Stored::decode(&record), Some(stored.clone()));
        assert_eq!(stored.encode(), record);
        record[0] = 4;
        assert_eq!(Stored::decode(&record), None);
    }
}
