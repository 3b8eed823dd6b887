//! What a volume's stored payload is: the record that the pool keeps with the volume.

use cryptfold_luks2::Payload;

/// First byte. From 2 on it says which objects of the key server are the key; from 3 on the payload may have blocks as they were sent,
/// which older programs take for blocks under the key.
const VERSION: u8 = 3;
const VERSION_UNIFORM: u8 = 2;
const VERSION_WITHOUT_OBJECTS: u8 = 1;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub offset_bytes: u64,
    pub identity: [u8; 32],
    /// Identifiers of the key at its server: the whole or two halves, of at most 255 bytes. Empty: not known.
    pub objects: Vec<String>,
    /// What was stored before the key was there has not all been looked at.
    pub converting: bool,
}

impl Stored {
    pub fn of(payload: &Payload, objects: Vec<String>) -> Stored {
        Stored {
            offset_bytes: payload.segment.offset_bytes,
            identity: payload.identity(),
            objects,
            converting: false,
        }
    }

    /// Whether this is what was stored.
    pub fn is(&self, payload: &Payload) -> bool {
        self.offset_bytes == payload.segment.offset_bytes && self.identity == payload.identity()
    }

    /// Version, offset (little-endian), identity, whether it is converting (0 or 1); then number of objects, and of each its length
    /// and its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut record = vec![VERSION];
        record.extend_from_slice(&self.offset_bytes.to_le_bytes());
        record.extend_from_slice(&self.identity);
        record.push(self.converting.into());
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
        let (converting, objects) = match *version {
            VERSION => match rest.split_first()? {
                (flag @ (0 | 1), rest) => (*flag == 1, objects(rest)?),
                _ => return None,
            },
            VERSION_UNIFORM => (false, objects(rest)?),
            VERSION_WITHOUT_OBJECTS if rest.is_empty() => (false, Vec::new()),
            _ => return None,
        };
        Some(Stored { offset_bytes: u64::from_le_bytes(*offset), identity: *identity, objects, converting })
    }
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
            for converting in [false, true] {
                let objects = objects.clone();
                let stored = Stored { offset_bytes: 16 << 20, identity: [7; 32], objects, converting };
                let mut record = stored.encode();
                assert_eq!(Stored::decode(&record), Some(stored));
                for len in 0..record.len() {
                    assert_eq!(Stored::decode(&record[..len]), None, "cut at {len}");
                }
                assert_eq!(Stored::decode(&[&record[..], &[0]].concat()), None);
                record[41] = 2;
                assert_eq!(Stored::decode(&record), None);
            }
        }
    }

    /// As they were before objects were in them, and before volumes were converted.
    #[test]
    fn old_records_are_read() {
        let mut record = vec![1, 0, 0, 0, 1, 0, 0, 0, 0];
        record.extend([9; 32]);
        let mut stored =
            Stored { offset_bytes: 16 << 20, identity: [9; 32], objects: vec![], converting: false };
        assert_eq!(Stored::decode(&record), Some(stored.clone()));
        record[0] = 2;
        record.extend([1, 2, b'4', b'7']);
        stored.objects = vec!["47".into()];
        assert_eq!(Stored::decode(&record), Some(stored));
        record[0] = 4;
        assert_eq!(Stored::decode(&record), None);
    }
}
