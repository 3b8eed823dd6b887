//! The lists of `docs/format.md`: kinds of journal records, tags of catalogue records. (Fixed structures: `src/layout.rs`.)

use cryptfold_reduce_format::entry::RecordReader;
use cryptfold_reduce_format::ids::{DomainId, VolumeId};
use cryptfold_reduce_format::node::Tree;
use cryptfold_reduce_format::record::{DomainRecord, MUST_KNOW, PoolRecord, VolumeRecord};
use cryptfold_reduce_format::wire::WireError;
use uuid::Uuid;

/// First column of the table below the line `<!-- marker -->`.
fn documented(marker: &str) -> Vec<u16> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../docs/format.md");
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let marker = format!("<!-- {marker} -->");
    let (_, rest) = text.split_once(&marker).unwrap_or_else(|| panic!("{path} has no {marker}"));
    let rows = rest.trim_start().lines().take_while(|line| line.starts_with('|')).skip(2);
    rows.map(|row| {
        let cell = row.trim_start_matches('|').split('|').next().unwrap_or_default().trim();
        let hex = cell.strip_prefix("0x").map(|digits| u16::from_str_radix(digits, 16));
        hex.unwrap_or_else(|| cell.parse()).unwrap_or_else(|e| panic!("{marker}: {row}: {e}"))
    })
    .collect()
}

#[test]
fn kinds_of_journal_records() {
    let known = |kind: &u8| {
        let record = [*kind, 0, 0, 0];
        let first = RecordReader::new(&record).next().expect("a record");
        !matches!(first, Err(WireError::Unknown { .. }))
    };
    let kinds: Vec<u16> = (0..=u8::MAX).filter(known).map(u16::from).collect();
    assert_eq!(documented("kinds"), kinds);
}

/// The tags that `decode` knows: of others it keeps the field or says that it does not know it.
fn tags(valid: &[u8], decode: impl Fn(&[u8]) -> Result<usize, WireError>) -> Vec<u16> {
    assert_eq!(decode(valid), Ok(0), "the record to begin with");
    let known = |tag: &u16| {
        // A known field that comes once more, or empty, or behind later ones, is refused as such.
        let more = [valid, &tag.to_le_bytes()[..], &[0, 0]].concat();
        !matches!(decode(&more), Ok(1) | Err(WireError::Unknown { .. }))
    };
    (0..256).chain(MUST_KNOW..MUST_KNOW + 256).filter(known).collect()
}

#[test]
fn tags_of_catalogue_records() {
    let pool = PoolRecord::default().encode().unwrap();
    let pool = tags(&pool, |bytes| PoolRecord::decode(bytes).map(|record| record.unknown.len()));
    assert_eq!(documented("tags: pool"), pool);
    let domain = DomainRecord::new(DomainId(1), Uuid::nil(), "d").encode().unwrap();
    let domain = tags(&domain, |bytes| DomainRecord::decode(bytes).map(|record| record.unknown.len()));
    assert_eq!(documented("tags: domain"), domain);
    let volume = VolumeRecord::new(VolumeId(1), Uuid::nil(), "v", DomainId(1), 1).encode().unwrap();
    let volume = tags(&volume, |bytes| VolumeRecord::decode(bytes).map(|record| record.unknown.len()));
    assert_eq!(documented("tags: volume"), volume);
}

#[test]
fn trees() {
    let trees: Vec<u16> = (0..=u8::MAX).filter(|n| Tree::from_raw(*n).is_some()).map(u16::from).collect();
    assert_eq!(documented("trees"), trees);
}
