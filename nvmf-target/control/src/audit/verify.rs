//! Checks a chain of records, line by line, without I/O.

use thiserror::Error;

use super::record::{Hash, Head, Record, RecordError, parse};

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Flaw {
    /// The line itself.
    #[error("{0}")]
    Record(#[from] RecordError),
    /// It continues another record than the one before it.
    #[error(
        "record {seq} does not continue record {before}: records were removed, inserted or put in another order"
    )]
    Chain {
        /// Its number.
        seq: u64,
        /// The number of the one before.
        before: u64,
    },
    /// The first one of all continues something.
    #[error("record 1 says that another one comes before it")]
    Beginning,
}

/// Goes through a chain. The first line may have any number: the log before it may have been put away.
#[derive(Clone, Debug, Default)]
pub struct Verifier {
    head: Option<Head>,
}

impl Verifier {
    /// The next line, without its end. What is no record is passed over, so the record behind it does not continue the chain
    /// either.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn next(&mut self, line: &[u8]) -> Result<Record, Flaw> {
        let record = parse(line)?;
        let before = self.head.replace(record.head());
        if record.seq == 1 && record.prev != Hash::default() {
            return Err(Flaw::Beginning);
        }
        match before {
            Some(b) if b.seq.checked_add(1) != Some(record.seq) || b.hash != record.prev => {
                Err(Flaw::Chain { seq: record.seq, before: b.seq })
            }
            _ => Ok(record),
        }
    }

    /// The last record so far.
    pub fn head(&self) -> Option<Head> {
        self.head
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::encode;
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// So many lines, without their ends.
    fn chain(n: usize) -> Vec<Vec<u8>> {
        let mut head = Head::default();
        let line = |i: usize| {
            let members = json!({"event": "e", "number": i}).as_object().unwrap().clone();
            let (mut line, next) = encode(head, "t", members);
            head = next;
            line.pop();
            line
        };
        (0..n).map(line).collect()
    }

    fn flaws(lines: &[Vec<u8>]) -> Vec<Flaw> {
        let mut v = Verifier::default();
        lines.iter().filter_map(|l| v.next(l).err()).collect()
    }

    #[test]
    fn a_chain_and_any_end_of_it_are_right() {
        let lines = chain(5);
        for from in 0..5 {
            assert_eq!(flaws(&lines[from..]), []);
        }
    }

    #[test]
    fn a_chain_that_begins_anew_is_seen() {
        let twice = [chain(3), chain(2)].concat();
        assert_eq!(flaws(&twice), [Flaw::Chain { seq: 1, before: 3 }]);
    }

    #[test]
    fn a_first_record_with_something_before_it_is_seen() {
        let (mut line, _) =
            encode(Head { seq: 0, hash: Hash([1; 32]) }, "t", json!({}).as_object().unwrap().clone());
        line.pop();
        assert_eq!(flaws(&[line]), [Flaw::Beginning]);
    }

    proptest! {
        /// Against a model: lines taken out, doubled or swapped (but for an end that is cut off, or a beginning) are seen.
        #[test]
        fn edits_are_seen(n in 3..12usize, a in 0..12usize, b in 0..12usize, edit in 0..3u8) {
            let (lines, a, b) = (chain(n), a % n, b % n);
            let mut edited = lines.clone();
            match edit {
                0 => drop(edited.remove(a)),
                1 => edited.insert(a, lines[b].clone()),
                _ => edited.swap(a, b),
            }
            let is_part = lines.windows(edited.len().min(n)).any(|w| w == edited.as_slice());
            prop_assert_eq!(flaws(&edited).is_empty(), is_part);
        }
    }
}
